//! What a rule can look at.

use std::fmt;

use ipnet::IpNet;

use crate::{Protocol, SetName};

/// One thing a rule looks at (iptables-extensions(8)).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Match {
    /// `-s`
    Source(IpNet),
    /// `-d`
    Destination(IpNet),
    /// `-p`
    Protocol(Protocol),
    /// `-i`; a trailing `+` matches any end.
    InInterface(String),
    /// `-o`; a trailing `+` matches any end.
    OutInterface(String),
    /// `-m comment`; build it with [`Match::comment`], which keeps to the kernel's limits.
    Comment(String),
    /// `-m set --match-set`: one direction per dimension of the set.
    Set {
        /// The set.
        set: SetName,
        /// Which end of the packet each dimension is compared with.
        flags: Vec<Direction>,
    },
    /// `-m addrtype`
    AddressType(Direction, AddressType),
    /// `--sport` or `--dport`; needs a positive [`Match::Protocol`] of TCP, UDP, UDPLITE or SCTP.
    Port(Direction, PortRange),
    /// `-m multiport`: at most 15 ports, a range counts as two.
    Ports(Direction, Vec<PortRange>),
    /// `--tcp-flags`; needs [`Match::Protocol`] TCP.
    TcpFlags {
        /// Flags looked at.
        mask: TcpFlags,
        /// Those of them that must be set.
        set: TcpFlags,
    },
    /// `-m conntrack --ctstate`
    State(Vec<State>),
    /// `-m mark`: the masked packet mark equals `value`.
    Mark {
        /// Expected bits.
        value: u32,
        /// Bits looked at.
        mask: u32,
    },
    /// `-m physdev`
    Physdev(Physdev),
    /// `-m ipvs`
    Ipvs(Ipvs),
    /// `--icmp-type` or `--icmpv6-type`, by the family the rule is written for; implies the protocol.
    Icmp {
        /// ICMP type number of that family.
        kind: u8,
        /// ICMP code, or any.
        code: Option<u8>,
    },
    /// `-m limit`
    Limit {
        /// Matches per time.
        rate: u32,
        /// The time.
        per: Per,
        /// Matches allowed at once.
        burst: u32,
    },
    /// Words of iptables for what has no variant here, beginning with `-m NAME`, one word each, unquoted.
    /// Write them as iptables-save prints them (defaults included): otherwise each pass sees a difference.
    Raw(Vec<String>),
}

impl Match {
    /// Longest comment in bytes (`XT_MAX_COMMENT_LEN` less its zero byte).
    pub const COMMENT_LIMIT: usize = 255;

    /// A comment within the kernel's limit, control characters replaced by spaces.
    #[must_use]
    pub fn comment(text: &str) -> Self {
        let mut out = String::with_capacity(text.len().min(Self::COMMENT_LIMIT));
        if text.starts_with('-') {
            // iptables-restore takes some words with a leading dash for options of its own, quoted or not.
            out.push(' ');
        }
        for c in text.chars() {
            let c = if c.is_control() { ' ' } else { c };
            if out.len() + c.len_utf8() > Self::COMMENT_LIMIT {
                break;
            }
            out.push(c);
        }
        Self::Comment(out)
    }

    /// Membership in a set.
    #[must_use]
    pub fn set(set: SetName, flags: &[Direction]) -> Self {
        Self::Set { set, flags: flags.to_vec() }
    }
}

/// An end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// `src`
    Source,
    /// `dst`
    Destination,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "src",
            Self::Destination => "dst",
        })
    }
}

/// What the routing tables say an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressType {
    /// Of this host.
    Local,
    /// Of a host.
    Unicast,
    /// A broadcast address.
    Broadcast,
    /// A multicast address.
    Multicast,
}

impl AddressType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "LOCAL",
            Self::Unicast => "UNICAST",
            Self::Broadcast => "BROADCAST",
            Self::Multicast => "MULTICAST",
        }
    }
}

/// Ports from first to last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// Lowest.
    pub first: u16,
    /// Highest.
    pub last: u16,
}

impl PortRange {
    /// A single port.
    #[must_use]
    pub fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}:{}", self.first, self.last)
        }
    }
}

/// TCP flags as in the header (RFC 9293 section 3.1): FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// FIN
    pub const FIN: Self = Self(1);
    /// SYN
    pub const SYN: Self = Self(2);
    /// RST
    pub const RST: Self = Self(4);
    /// ACK
    pub const ACK: Self = Self(16);
    /// SYN and RST, the usual mask for "opens a connection".
    pub const SYN_RST: Self = Self(6);
}

impl fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
        let mut first = true;
        for (bit, name) in names.iter().enumerate() {
            if self.0 & (1 << bit) != 0 {
                if !first {
                    f.write_str(",")?;
                }
                f.write_str(name)?;
                first = false;
            }
        }
        if first { f.write_str("NONE") } else { Ok(()) }
    }
}

/// Connection tracking state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Fits no connection.
    Invalid,
    /// Opens one.
    New,
    /// Belongs to one, such as an ICMP error.
    Related,
    /// Part of one.
    Established,
    /// Exempt from tracking.
    Untracked,
    /// Its source is translated.
    Snat,
    /// Its destination is translated.
    Dnat,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Invalid => "INVALID",
            Self::New => "NEW",
            Self::Related => "RELATED",
            Self::Established => "ESTABLISHED",
            Self::Untracked => "UNTRACKED",
            Self::Snat => "SNAT",
            Self::Dnat => "DNAT",
        })
    }
}

/// Bridge ports of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Physdev {
    /// Came in through this port.
    In(String),
    /// Leaves through this port.
    Out(String),
    /// Came in through a bridge.
    IsIn,
    /// Leaves through a bridge.
    IsOut,
    /// Is bridged, not routed.
    IsBridged,
}

impl Physdev {
    pub(crate) fn words(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::In(name) => ("--physdev-in", Some(name)),
            Self::Out(name) => ("--physdev-out", Some(name)),
            Self::IsIn => ("--physdev-is-in", None),
            Self::IsOut => ("--physdev-is-out", None),
            Self::IsBridged => ("--physdev-is-bridged", None),
        }
    }
}

/// The IPVS connection of a packet. Neighbouring conditions share one look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ipvs {
    /// It has one.
    Any,
    /// Protocol of its virtual server.
    Protocol(Protocol),
    /// Address of its virtual server.
    Address(IpNet),
    /// Port of its virtual server.
    Port(u16),
    /// `--vdir`: from the client (original) or to it (reply).
    Direction(IpvsDirection),
    /// `--vmethod`: forwarding method of its destination.
    Method(IpvsMethod),
}

/// Which way a packet of an IPVS connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpvsDirection {
    /// From the client.
    Original,
    /// To the client.
    Reply,
}

/// Forwarding method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpvsMethod {
    /// Direct routing.
    Gate,
    /// Tunnel.
    Ipip,
    /// Address translation.
    Masq,
}

impl Ipvs {
    pub(crate) fn words(self) -> (&'static str, Option<String>) {
        match self {
            Self::Any => ("--ipvs", None),
            Self::Protocol(protocol) => ("--vproto", Some(protocol.0.to_string())),
            Self::Address(net) if net.prefix_len() == net.max_prefix_len() => {
                ("--vaddr", Some(net.addr().to_string()))
            }
            Self::Address(net) => ("--vaddr", Some(net.to_string())),
            Self::Port(port) => ("--vport", Some(port.to_string())),
            Self::Direction(IpvsDirection::Original) => ("--vdir", Some("ORIGINAL".into())),
            Self::Direction(IpvsDirection::Reply) => ("--vdir", Some("REPLY".into())),
            Self::Method(IpvsMethod::Gate) => ("--vmethod", Some("GATE".into())),
            Self::Method(IpvsMethod::Ipip) => ("--vmethod", Some("IPIP".into())),
            Self::Method(IpvsMethod::Masq) => ("--vmethod", Some("MASQ".into())),
        }
    }
}

/// Unit of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Per {
    /// Second.
    Second,
    /// Minute.
    Minute,
    /// Hour.
    Hour,
    /// Day.
    Day,
}

impl Per {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Second => "sec",
            Self::Minute => "min",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }
}
