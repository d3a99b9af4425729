//! What the kernel refuses, in words.

use std::fmt;

use super::{Entry, Kind};
use crate::SetName;

/// Why sets could not be read or written at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel answered that it knows no ipset messages.
    #[error("this kernel has no ipsets (module ip_set): load it, or use a kernel built with CONFIG_IP_SET")]
    NoKernelSupport,
    /// Older than Linux 4.20.
    #[error("this kernel speaks ipset protocol {found}, {needed} is needed (Linux 4.20 or newer)")]
    OldProtocol {
        /// The kernel's version.
        found: u8,
        /// Ours.
        needed: u8,
    },
    /// What was being done when netlink failed.
    #[error("cannot {action}: {source}")]
    Netlink {
        /// As in "list the ipsets".
        action: String,
        /// Why.
        source: ferroute_netlink::Error,
    },
}

/// One change that the kernel refused; the other changes were carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Failed {
    /// Index in the list of changes.
    pub change: usize,
    /// The set.
    pub set: SetName,
    /// What was tried: "create", "add to", "delete from", "replace", "destroy".
    pub action: &'static str,
    /// The entry, where it is one entry's fault.
    pub entry: Option<Entry>,
    /// Why.
    pub refusal: Refusal,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.entry {
            Some(entry) => write!(f, "cannot {} ipset {}: {entry}: {}", self.action, self.set, self.refusal),
            None => write!(f, "cannot {} ipset {}: {}", self.action, self.set, self.refusal),
        }
    }
}

/// The kernel's reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No room for another entry.
    #[error("the set is full: maxelem {maxelem}")]
    Full {
        /// Its limit; 0 when it could not be read.
        maxelem: u32,
    },
    /// A rule, a list or another program's dump holds it.
    #[error("the set is in use by a rule or another set: remove those first")]
    InUse,
    /// No such set.
    #[error("the kernel has no such set; something else may have destroyed it")]
    NoSet,
    /// Exists with another type or other options.
    #[error("a set of that name exists with another type or other options")]
    Exists,
    /// The kernel cannot make such sets.
    #[error("this kernel has no set type {kind}: load its module (ip_set_hash_*) or use another kernel")]
    NoType {
        /// What was wanted.
        kind: Kind,
    },
    /// The kernel's revision of the type is too old for an option.
    #[error(
        "this kernel's {kind} (revision {found}) lacks {extension}, which came with revision {needed}: \
         use a newer kernel"
    )]
    NoExtension {
        /// The type.
        kind: Kind,
        /// As in "skbinfo".
        extension: &'static str,
        /// The kernel's highest revision.
        found: u8,
        /// The lowest that has it.
        needed: u8,
    },
    /// The kernel only knows revisions newer than this program.
    #[error("this kernel's {kind} starts at revision {lowest}, newer than this program knows: upgrade it")]
    TooNew {
        /// The type.
        kind: Kind,
        /// The kernel's lowest revision.
        lowest: u8,
    },
    /// Anything else.
    #[error("{text} (code {code})")]
    Other {
        /// errno, or an ipset code from 4096 on.
        code: i32,
        /// In words, with the kernel's own where it gave some.
        text: String,
    },
}

pub(super) const ENOENT: i32 = 2;
pub(super) const EINVAL: i32 = 22;
pub(super) const FIND_TYPE: i32 = 4098;

impl Refusal {
    /// From a netlink failure. A full set's limit is filled in by the caller.
    pub(super) fn new(code: i32, text: Option<&str>) -> Self {
        match code {
            ENOENT => Self::NoSet,
            17 => Self::Exists,
            4100 | 4108 => Self::InUse,
            4352 => Self::Full { maxelem: 0 },
            _ => {
                let mut words = words(code);
                if let Some(text) = text {
                    words = format!("{words}: {text}");
                }
                Self::Other { code, text: words }
            }
        }
    }
}

/// The codes of linux/netfilter/ipset/ip_set.h and ip_set_hash.h in words.
fn words(code: i32) -> String {
    let text = match code {
        4096 => "unspecified ipset error",
        4097 => "the kernel does not understand the message",
        4098 => "unknown set type or revision",
        4099 => "no room for another set",
        4101 => "a set of the new name exists",
        4102 => "the sets are of different types",
        4103 => "element exists",
        4104 => "prefix length out of range",
        4105 => "netmask out of range",
        4106 => "wrong address family",
        4107 => "the set has no timeouts",
        4109 => "an IPv4 address is expected",
        4110 => "an IPv6 address is expected",
        4111 => "the set has no counters",
        4112 => "the set has no comments",
        4113 => "markmask out of range",
        4114 => "the set has no skbinfo",
        4115 => "netmask and bitmask exclude each other",
        4353 => "a null element cannot be stored",
        4354 => "protocol not allowed in this set",
        4355 => "protocol missing",
        4356 => "ranges are not supported in this set",
        4357 => "range out of bounds",
        _ => return ferroute_netlink::errno_text(code),
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_read_as_words() {
        assert_eq!(Refusal::new(4100, None), Refusal::InUse);
        assert_eq!(Refusal::new(4352, None), Refusal::Full { maxelem: 0 });
        assert_eq!(Refusal::new(4103, None).to_string(), "element exists (code 4103)");
        assert!(Refusal::new(1, Some("nope")).to_string().contains("nope"));
        let failed = Failed {
            change: 0,
            set: SetName::new("s").unwrap(),
            action: "add to",
            entry: Some(Entry::Ip("10.0.0.1".parse().unwrap())),
            refusal: Refusal::Full { maxelem: 5 },
        };
        assert_eq!(failed.to_string(), "cannot add to ipset s: 10.0.0.1: the set is full: maxelem 5");
    }
}
