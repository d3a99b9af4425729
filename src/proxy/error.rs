//! What can go wrong in the Service room as a whole. What goes wrong with one object is a
//! [`Problem`](crate::cluster::service::Problem) of that object instead.

use ferroute_iptables as iptables;
use ferroute_ipvs as ipvs;

use crate::host;

/// A failure of the room. Passes are repeated after any of these; only opening is fatal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// IPVS does not answer or refused a whole request.
    #[error("IPVS: {0}")]
    Ipvs(#[from] ipvs::Error),
    /// ipset does not answer.
    #[error("{0}")]
    Ipset(#[from] iptables::ipset::Error),
    /// A set that must be replaced could not be.
    #[error("{0}")]
    Set(#[source] Box<iptables::ipset::Failed>),
    /// iptables does not answer or refused a whole document.
    #[error("{0}")]
    Iptables(#[from] iptables::Error),
    /// Routes, links, addresses or conntrack.
    #[error("{0}")]
    Host(#[from] host::Error),
    /// The link for VIPs exists with another type.
    #[error(
        "link {name} exists but is no dummy link (it is {kind:?}); VIPs cannot be bound to it: rename or remove it"
    )]
    ForeignLink {
        /// Its name.
        name: &'static str,
        /// What the kernel says it is.
        kind: Option<String>,
    },
    /// The link for VIPs is not there after it was created.
    #[error("link {0} vanished right after it was created; something else removes it")]
    LinkVanished(&'static str),
    /// A part of the kernel that nothing works without.
    #[error("{0}")]
    Kernel(String),
    /// The thread that watches the network cannot start.
    #[error("cannot start the thread that watches network changes: {0}")]
    Thread(std::io::Error),
    /// `Room::open` was called outside a tokio runtime.
    #[error("the Service room must be opened inside the runtime its health check servers run on")]
    Runtime,
}
