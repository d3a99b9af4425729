//! Own iptables chains and own ipsets on a host that others use too.
//!
//! Two halves, each usable alone:
//!
//! - [`ipset`]: sets as plain data, their difference as ordered changes, and a [`ipset::Handle`]
//!   that reads and writes them over netlink. No `ipset` program.
//! - chains: rules as plain values, one atomic `iptables-restore --noflush` document per table and family
//!   that names only chains of ours that changed, for the variant (nft or legacy) the host uses.
//!
//! Everything is told what is "ours" by name prefixes; a stranger's sets, chains and rules are skipped on
//! reading and never written.

mod command;
mod detect;
mod icmp;
pub mod ipset;
mod matches;
mod name;
mod plan;
mod remove;
mod rule;
mod table;
mod target;
mod text;

use std::fmt;
use std::net::IpAddr;

pub use command::{Command, Error, Variant};
pub use detect::{Detected, Mixed, Reason};
pub use icmp::icmp_accepts;
pub use matches::{
    AddressType, Direction, Ipvs, IpvsDirection, IpvsMethod, Match, Per, Physdev, PortRange, State, TcpFlags,
};
pub use name::{ChainName, NameError, SetName, hashed};
pub use plan::{ChainChanges, Plan, PlanError, plan, plan_chains};
pub use remove::{Removal, remove};
pub use rule::{Condition, Rule};
pub use table::{Builtin, CutOff, Found, FoundJump, Jump, Ours, Position, Ruleset, TableName, parse};
pub use target::{Mss, RejectWith, Target};

/// Address family of a table or set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4: iptables.
    V4,
    /// IPv6: ip6tables.
    V6,
}

impl Family {
    /// Both, in the order they are worked on.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    /// As ipset(8) writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "inet",
            Self::V6 => "inet6",
        })
    }
}

/// IP protocol number (IANA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// SCTP.
    pub const SCTP: Self = Self(132);

    /// Whether packets of it carry ports that ipset understands (`ip_set_proto_with_ports`).
    #[must_use]
    pub fn has_ports(self) -> bool {
        matches!(self.0, 6 | 17 | 132 | 136)
    }

    /// The name that iptables uses with and without `/etc/protocols`, if there is one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            1 => "icmp",
            6 => "tcp",
            17 => "udp",
            50 => "esp",
            51 => "ah",
            58 => "ipv6-icmp",
            132 => "sctp",
            136 => "udplite",
            _ => return None,
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "{}", self.0),
        }
    }
}
