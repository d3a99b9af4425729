//! What can go wrong, in words that say what to do.

use ferroute_netlink::{Failure, errno_text};

use crate::{Change, Destination, DestinationKey, Family, Scheduler, VirtualServerKey};

/// A request that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no IPVS.
    #[error(
        "the kernel has no IPVS: load it with \"modprobe ip_vs\", or use a kernel built with CONFIG_IP_VS"
    )]
    NoIpvs,
    /// The netlink socket failed, or an answer was not understood.
    #[error("cannot talk to IPVS: {0}")]
    Netlink(#[from] ferroute_netlink::Error),
    /// The kernel refused.
    #[error("cannot {action}: {failure}")]
    Refused {
        /// What was asked for.
        action: &'static str,
        /// The kernel's answer.
        failure: Failure,
    },
}

/// A change that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct ChangeFailure {
    /// Index in the list given to [`crate::Handle::apply`].
    pub index: usize,
    /// Why.
    pub error: ChangeError,
}

/// Why the kernel refused a change. IPVS itself gives no text, so the errno is read in the light
/// of the change (`net/netfilter/ipvs/ip_vs_ctl.c`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The server to create is there: the table was changed by somebody else, or read too early.
    #[error("cannot create virtual server {0}: it exists; read the table again and compare")]
    ServerExists(VirtualServerKey),
    /// The server is not there, or not any more.
    #[error(
        "the kernel has no virtual server {0}; something else may have flushed IPVS: read the table again"
    )]
    NoServer(VirtualServerKey),
    /// The destination to add is there.
    #[error(
        "cannot add destination {destination} to virtual server {server}: it exists; read the table again"
    )]
    DestinationExists {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        destination: DestinationKey,
    },
    /// The destination is not there.
    #[error("virtual server {server} has no destination {destination}; read the table again and compare")]
    NoDestination {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        destination: DestinationKey,
    },
    /// The scheduler's module is missing.
    #[error(
        "virtual server {server} cannot use scheduler {scheduler}: the kernel has no such scheduler; load it \
         with \"modprobe ip_vs_{scheduler}\" or choose another"
    )]
    NoScheduler {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        scheduler: Scheduler,
    },
    /// The kernel does not do this family.
    #[error(
        "the kernel does not balance {family}, so not virtual server {server} either: load the module ipv6, or build IPVS with it"
    )]
    NoFamily {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        family: Family,
    },
    /// The address can be no real server.
    #[error(
        "virtual server {server} cannot have destination {destination}: the kernel takes unicast and own \
         addresses only (is lo up?), and GUE tunnels need a port"
    )]
    UnusableDestination {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        destination: DestinationKey,
    },
    /// Weight or thresholds are out of range.
    #[error(
        "virtual server {server} cannot have destination {} with weight {} and thresholds {} and {}: the weight \
         is at most 2147483647, and the lower threshold at most the upper",
        destination.key(), destination.weight, destination.lower_threshold, destination.upper_threshold
    )]
    OutOfRange {
        /// Of which server.
        server: VirtualServerKey,
        /// Which.
        destination: Destination,
    },
    /// The process may not.
    #[error("cannot {0}: not permitted; CAP_NET_ADMIN in the network namespace is needed")]
    NotPermitted(Change),
    /// Anything else.
    #[error("cannot {change}: {}{}", errno_text(*errno), text.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
    Other {
        /// What was asked for.
        change: Change,
        /// Positive errno.
        errno: i32,
        /// The kernel's extended acknowledgement, where it gave one.
        text: Option<String>,
    },
}

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const ESRCH: i32 = 3;
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
const ERANGE: i32 = 34;
const EAFNOSUPPORT: i32 = 97;

impl ChangeError {
    /// The meaning of a refusal.
    pub fn of(change: &Change, failure: Failure) -> Self {
        let server = change.server();
        match (failure.errno, *change) {
            (EPERM, change) => Self::NotPermitted(change),
            (ESRCH, _) => Self::NoServer(server),
            (EAFNOSUPPORT, _) => Self::NoFamily { server, family: server.family() },
            (EEXIST, Change::CreateServer { key, .. }) => Self::ServerExists(key),
            (ENOENT, Change::CreateServer { options, .. } | Change::UpdateServer { options, .. }) => {
                Self::NoScheduler { server, scheduler: options.scheduler }
            }
            (EEXIST, Change::CreateDestination { destination, .. }) => {
                Self::DestinationExists { server, destination: destination.key() }
            }
            (ENOENT, Change::UpdateDestination { destination, .. }) => {
                Self::NoDestination { server, destination: destination.key() }
            }
            (ENOENT, Change::DeleteDestination { destination, .. }) => {
                Self::NoDestination { server, destination }
            }
            (
                EINVAL,
                Change::CreateDestination { destination, .. } | Change::UpdateDestination { destination, .. },
            ) => Self::UnusableDestination { server, destination: destination.key() },
            (
                ERANGE,
                Change::CreateDestination { destination, .. } | Change::UpdateDestination { destination, .. },
            ) => Self::OutOfRange { server, destination },
            (errno, change) => Self::Other { change, errno, text: failure.text },
        }
    }

    /// Whether the kernel's table is not what the caller believed: reading it again helps.
    pub const fn is_drift(&self) -> bool {
        matches!(
            self,
            Self::ServerExists(_)
                | Self::NoServer(_)
                | Self::DestinationExists { .. }
                | Self::NoDestination { .. }
        )
    }
}
