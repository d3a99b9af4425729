//! What can go wrong in the policy room as a whole. What goes wrong with one policy is a
//! [`Problem`](crate::cluster::service::Problem) of that object instead.

use ferroute_iptables as iptables;

use crate::host;

/// A failure of the room. Passes are repeated after any of these; only opening is fatal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// ipset does not answer.
    #[error("{0}")]
    Ipset(#[from] iptables::ipset::Error),
    /// A set without which nothing can be enforced could not be written.
    #[error("{0}")]
    Set(#[source] Box<iptables::ipset::Failed>),
    /// iptables does not answer or refused a whole document.
    #[error("{0}")]
    Iptables(#[from] iptables::Error),
    /// Conntrack.
    #[error("{0}")]
    Host(#[from] host::Error),
    /// A part of the kernel that nothing works without.
    #[error("{0}")]
    Kernel(String),
}
