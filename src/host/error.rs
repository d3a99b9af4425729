//! What the kernel refused, about which object, and what to try.

use ferroute_netlink::Failure;
use nix::errno::Errno;

/// A host operation that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The netlink socket itself failed; nothing is known about the object. Retry on the next pass.
    #[error("cannot {action}: {source}")]
    Transport {
        /// The verb, as in "list routes".
        action: &'static str,
        /// What the transport said.
        source: ferroute_netlink::Error,
    },
    /// The kernel refused one object; the others of the same batch were applied.
    #[error("cannot {action} {object}: {}{}; {cure}", Errno::from_raw(*errno).desc(), text.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Refused {
        /// The verb, as in "add route".
        action: &'static str,
        /// The object in the words of `ip`.
        object: String,
        /// Positive errno.
        errno: i32,
        /// The kernel's extended acknowledgement, when it gave one.
        text: Option<String>,
        /// What to try.
        cure: &'static str,
    },
}

impl Error {
    pub(super) fn refused(action: &'static str, object: String, failure: Failure) -> Self {
        let cure = cure(failure.errno, &object);
        Error::Refused { action, object, errno: failure.errno, text: failure.text, cure }
    }

    /// The errno of a refusal.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Transport { .. } => None,
            Error::Refused { errno, .. } => Some(*errno),
        }
    }
}

/// What a refusal by rtnetlink or ctnetlink usually means for the objects we write.
fn cure(errno: i32, object: &str) -> &'static str {
    match Errno::from_raw(errno) {
        Errno::EPERM | Errno::EACCES if object.contains(':') => {
            "run with CAP_NET_ADMIN, and see that IPv6 is not disabled on the link (net.ipv6.conf.LINK.disable_ipv6)"
        }
        Errno::EPERM | Errno::EACCES => "run as root or with CAP_NET_ADMIN",
        Errno::EEXIST => "something else made an object with the same key; remove it or leave it in charge",
        Errno::EOPNOTSUPP => {
            "this kernel lacks the type of object: load its module (modprobe) or choose a kernel that has it"
        }
        Errno::ENODEV | Errno::ENETDOWN => "the link is gone or down; it is made again on the next pass",
        Errno::EINVAL => {
            "a preferred source must be an address of this node that has finished duplicate address detection"
        }
        Errno::ESRCH | Errno::ENOENT | Errno::EADDRNOTAVAIL => {
            "it is gone already; the next pass reads the kernel again"
        }
        Errno::ENOMEM | Errno::ENOBUFS => "the kernel is out of memory; it is tried again on the next pass",
        _ => "it is tried again on the next pass",
    }
}
