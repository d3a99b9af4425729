//! Sets as plain data: kinds, options, entries. No bytes, no kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::{Family, Protocol, SetName};

/// How a set stores what it holds (ipset(8), "SET TYPES").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetType {
    /// `hash:ip`
    HashIp,
    /// `hash:net`
    HashNet,
    /// `hash:ip,port`
    HashIpPort,
    /// `hash:ip,port,ip`
    HashIpPortIp,
    /// `hash:ip,port,net`
    HashIpPortNet,
    /// `hash:net,net`
    HashNetNet,
    /// A type this crate reads but never writes: such a set can only be destroyed.
    Other,
}

impl SetType {
    /// The types this crate writes.
    pub const WRITTEN: [SetType; 6] = [
        Self::HashIp,
        Self::HashNet,
        Self::HashIpPort,
        Self::HashIpPortIp,
        Self::HashIpPortNet,
        Self::HashNetNet,
    ];

    /// The kernel's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::HashIp => "hash:ip",
            Self::HashNet => "hash:net",
            Self::HashIpPort => "hash:ip,port",
            Self::HashIpPortIp => "hash:ip,port,ip",
            Self::HashIpPortNet => "hash:ip,port,net",
            Self::HashNetNet => "hash:net,net",
            Self::Other => "other",
        }
    }

    /// The type the kernel calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        Self::WRITTEN.into_iter().find(|t| t.name() == name).unwrap_or(Self::Other)
    }
}

/// Type and family: what can never change in a living set, not even by a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    /// How it stores.
    pub set_type: SetType,
    /// Of which addresses.
    pub family: Family,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} family {}", self.set_type.name(), self.family)
    }
}

/// What is fixed when a set is created; a change needs a new set swapped into its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// Most entries the set may hold. A limit only: it costs no memory.
    pub maxelem: u32,
    /// Default life of an entry in seconds; `Some(0)` is kube-router's "timeouts possible, none by default".
    pub timeout: Option<u32>,
    /// Entries may carry a packet mark.
    pub skbinfo: bool,
    /// Seen on a set of the kernel: options this crate never writes (counters, comments,
    /// netmask, bitmask, forceadd). Leave `false` in a desired set.
    pub others: bool,
}

impl Default for Options {
    /// One million entries; no timeout, no marks. The kernel's own limit of 65,536 is too small
    /// for big clusters and shows only when the set is full.
    fn default() -> Self {
        Self { maxelem: 1 << 20, timeout: None, skbinfo: false, others: false }
    }
}

/// One element: what the kernel's hash is keyed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// Of `hash:ip`.
    Ip(IpAddr),
    /// Of `hash:net`; host bits are cleared on entry into a [`Set`].
    Net(IpNet),
    /// Of `hash:ip,port`.
    IpPort(IpAddr, Protocol, u16),
    /// Of `hash:ip,port,ip`.
    IpPortIp(IpAddr, Protocol, u16, IpAddr),
    /// Of `hash:ip,port,net`.
    IpPortNet(IpAddr, Protocol, u16, IpNet),
    /// Of `hash:net,net`; host bits are cleared as for [`Entry::Net`].
    NetNet(IpNet, IpNet),
}

/// What hangs on an entry; changed by adding the entry again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extra {
    /// An exception: a packet that meets this entry does not match (types with networks).
    pub nomatch: bool,
    /// Mark given by `SET --map-set ... --map-mark`; needs [`Options::skbinfo`].
    pub mark: Option<Mark>,
}

impl Extra {
    /// Only a mark.
    #[must_use]
    pub fn marked(value: u32, mask: u32) -> Self {
        Self { nomatch: false, mark: Some(Mark { value, mask }) }
    }
}

/// Bits of the packet mark: those of `mask` take the value of `value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark {
    /// New bits.
    pub value: u32,
    /// Which bits.
    pub mask: u32,
}

/// Why an entry cannot be in a set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// Another type's entry.
    #[error("{entry} is no entry of a set of type {kind}")]
    Shape {
        /// What was to be added.
        entry: Entry,
        /// What the set is.
        kind: Kind,
    },
    /// An address of the other family.
    #[error("{entry} is of the other family than its set, {kind}")]
    Family {
        /// What was to be added.
        entry: Entry,
        /// What the set is.
        kind: Kind,
    },
    /// The kernel's hash types hold no network of length 0 and no unspecified address.
    #[error("{entry}: the kernel refuses a zero prefix or address; add both halves (/1) instead")]
    Zero {
        /// What was to be added.
        entry: Entry,
    },
    /// A port on a protocol that has none, or protocol 0.
    #[error("{entry}: the protocol has no ports")]
    Port {
        /// What was to be added.
        entry: Entry,
    },
    /// `nomatch` on a type without networks.
    #[error("{entry}: nomatch exists only in types with networks")]
    Nomatch {
        /// What was to be added.
        entry: Entry,
    },
    /// A mark in a set without `skbinfo`, or one the kernel would not report back.
    #[error("{entry}: a mark needs a set with skbinfo and a non-zero mask")]
    Mark {
        /// What was to be added.
        entry: Entry,
    },
}

impl Entry {
    /// The entry as the kernel would list it.
    #[must_use]
    pub fn normal(self) -> Self {
        match self {
            Self::Net(net) => Self::Net(net.trunc()),
            Self::IpPortNet(ip, protocol, port, net) => Self::IpPortNet(ip, protocol, port, net.trunc()),
            Self::NetNet(first, second) => Self::NetNet(first.trunc(), second.trunc()),
            other => other,
        }
    }

    /// Whether a set of this kind and these options takes the entry.
    ///
    /// # Errors
    /// The first reason why the kernel would refuse it, or list it differently.
    pub fn fits(self, kind: Kind, options: &Options, extra: Extra) -> Result<(), Misfit> {
        let same = |ip: IpAddr| Family::of(ip) == kind.family;
        let entry = self;
        let (family, zero, networks) = match (self, kind.set_type) {
            (Self::Ip(ip), SetType::HashIp) => (same(ip), ip.is_unspecified(), false),
            (Self::Net(net), SetType::HashNet) => (same(net.addr()), net.prefix_len() == 0, true),
            (Self::IpPort(ip, ..), SetType::HashIpPort) => (same(ip), false, false),
            (Self::IpPortIp(ip, _, _, second), SetType::HashIpPortIp) => {
                (same(ip) && same(second), false, false)
            }
            (Self::IpPortNet(ip, _, _, net), SetType::HashIpPortNet) => {
                (same(ip) && same(net.addr()), net.prefix_len() == 0, true)
            }
            (Self::NetNet(first, second), SetType::HashNetNet) => (
                same(first.addr()) && same(second.addr()),
                first.prefix_len() == 0 || second.prefix_len() == 0,
                true,
            ),
            _ => return Err(Misfit::Shape { entry, kind }),
        };
        if !family {
            return Err(Misfit::Family { entry, kind });
        }
        if zero {
            return Err(Misfit::Zero { entry });
        }
        if let Self::IpPort(_, protocol, port)
        | Self::IpPortIp(_, protocol, port, _)
        | Self::IpPortNet(_, protocol, port, _) = self
        {
            let icmp = match kind.family {
                Family::V4 => Protocol::ICMP,
                Family::V6 => Protocol::ICMPV6,
            };
            if protocol.0 == 0 || (port != 0 && !protocol.has_ports() && protocol != icmp) {
                return Err(Misfit::Port { entry });
            }
        }
        if extra.nomatch && !networks {
            return Err(Misfit::Nomatch { entry });
        }
        if extra.mark.is_some_and(|mark| !options.skbinfo || mark.mask == 0) {
            return Err(Misfit::Mark { entry });
        }
        Ok(())
    }
}

impl fmt::Display for Entry {
    /// As `ipset list` prints it, with the protocol as a number where it has no common name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Net(net) => write!(f, "{net}"),
            Self::IpPort(ip, protocol, port) => write!(f, "{ip},{protocol}:{port}"),
            Self::IpPortIp(ip, protocol, port, second) => write!(f, "{ip},{protocol}:{port},{second}"),
            Self::IpPortNet(ip, protocol, port, net) => write!(f, "{ip},{protocol}:{port},{net}"),
            Self::NetNet(first, second) => write!(f, "{first},{second}"),
        }
    }
}

/// One set: what it is, and what it holds. Holds only entries that fit it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    kind: Kind,
    options: Options,
    entries: BTreeMap<Entry, Extra>,
}

impl Set {
    /// An empty set.
    #[must_use]
    pub fn new(set_type: SetType, family: Family, options: Options) -> Self {
        Self { kind: Kind { set_type, family }, options, entries: BTreeMap::new() }
    }

    /// Type and family.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What it was, or will be, created with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What it holds.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<Entry, Extra> {
        &self.entries
    }

    /// Adds an entry, or changes what hangs on it. Returns whether the set changed.
    ///
    /// # Errors
    /// The entry can never be in such a set; the set is as before.
    pub fn insert(&mut self, entry: Entry, extra: Extra) -> Result<bool, Misfit> {
        entry.fits(self.kind, &self.options, extra)?;
        Ok(self.entries.insert(entry.normal(), extra) != Some(extra))
    }

    /// Removes an entry. Returns whether it was there.
    pub fn remove(&mut self, entry: &Entry) -> bool {
        self.entries.remove(&entry.normal()).is_some()
    }

    /// Removes all entries.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

/// All sets in view, by name.
pub type Sets = BTreeMap<SetName, Set>;

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(set_type: SetType, family: Family) -> Kind {
        Kind { set_type, family }
    }

    #[test]
    fn entries_that_the_kernel_refuses_are_refused_here() {
        let plain = Options::default();
        let none = Extra::default();
        let v4 = "10.0.0.1".parse().unwrap();
        let v6 = "fd00::1".parse().unwrap();
        let ip = |family| kind(SetType::HashIp, family);
        assert_eq!(Entry::Ip(v4).fits(ip(Family::V4), &plain, none), Ok(()));
        assert!(matches!(Entry::Ip(v6).fits(ip(Family::V4), &plain, none), Err(Misfit::Family { .. })));
        assert!(matches!(
            Entry::Ip(v4).fits(kind(SetType::HashNet, Family::V4), &plain, none),
            Err(Misfit::Shape { .. })
        ));
        for zero in ["0.0.0.0/0", "::/0"] {
            let net: IpNet = zero.parse().unwrap();
            let set = kind(SetType::HashNet, Family::of(net.addr()));
            assert!(matches!(Entry::Net(net).fits(set, &plain, none), Err(Misfit::Zero { .. })));
        }
        let port = kind(SetType::HashIpPort, Family::V4);
        assert_eq!(Entry::IpPort(v4, Protocol::SCTP, 53).fits(port, &plain, none), Ok(()));
        assert!(matches!(
            Entry::IpPort(v4, Protocol(47), 53).fits(port, &plain, none),
            Err(Misfit::Port { .. })
        ));
        let marked = Extra::marked(1, 1);
        assert!(matches!(Entry::Ip(v4).fits(ip(Family::V4), &plain, marked), Err(Misfit::Mark { .. })));
        let skbinfo = Options { skbinfo: true, ..plain };
        assert_eq!(Entry::Ip(v4).fits(ip(Family::V4), &skbinfo, marked), Ok(()));
        let nomatch = Extra { nomatch: true, mark: None };
        assert!(matches!(Entry::Ip(v4).fits(ip(Family::V4), &plain, nomatch), Err(Misfit::Nomatch { .. })));
    }

    #[test]
    fn host_bits_do_not_make_another_entry() {
        let mut set = Set::new(SetType::HashNet, Family::V4, Options::default());
        assert_eq!(set.insert(Entry::Net("10.1.2.3/8".parse().unwrap()), Extra::default()), Ok(true));
        assert_eq!(set.insert(Entry::Net("10.0.0.0/8".parse().unwrap()), Extra::default()), Ok(false));
        assert!(set.remove(&Entry::Net("10.9.9.9/8".parse().unwrap())));
        assert!(set.entries().is_empty());
    }
}
