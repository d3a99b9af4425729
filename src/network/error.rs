//! Why the pod network could not be made right.

use ferroute_iptables::ipset;

use crate::cni::install;
use crate::host;

/// A failure of the room; what concerns one route or tunnel does not stop the others.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Links, routes, tunnels, rules.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// An ipset could not be read or written.
    #[error(transparent)]
    Sets(#[from] ipset::Error),
    /// One change of an ipset was refused.
    #[error(transparent)]
    Set(#[from] Box<ipset::Failed>),
    /// The chains could not be read or written.
    #[error(transparent)]
    Chains(#[from] ferroute_iptables::Error),
    /// The network configuration.
    #[error(transparent)]
    Cni(#[from] install::Error),
    /// No thread for network events.
    #[error("cannot start a thread: {0}; raise the limit of processes")]
    Thread(std::io::Error),
    /// This kernel cannot do what the flags ask for.
    #[error("{0}")]
    Kernel(String),
}
