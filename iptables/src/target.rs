//! What a rule can do.

use std::net::IpAddr;

use crate::matches::Direction;
use crate::text::join;
use crate::{ChainName, Family, SetName};

/// What happens to a packet that meets all conditions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Accept.
    Accept,
    /// Drop silently.
    Drop,
    /// Back to the calling chain.
    Return,
    /// Refuse, and say so.
    Reject(RejectWith),
    /// `MARK --set-xmark`: bits of `mask` become those of `value`.
    Mark {
        /// New bits.
        value: u32,
        /// Which bits.
        mask: u32,
    },
    /// Change the source address (nat POSTROUTING or INPUT).
    Snat {
        /// New source.
        to: IpAddr,
        /// Choose the port at random, against clashes under load.
        random_fully: bool,
    },
    /// Change the source to the address of the outgoing link.
    Masquerade {
        /// Choose the port at random, against clashes under load.
        random_fully: bool,
    },
    /// Limit the TCP segment size (mangle; needs protocol TCP and the SYN flag).
    TcpMss(Mss),
    /// Copy to a netlink group.
    Nflog {
        /// The group.
        group: u16,
        /// At most 63 bytes, may be empty.
        prefix: String,
    },
    /// Write to the kernel log at warning level.
    Log {
        /// At most 29 bytes, may be empty.
        prefix: String,
    },
    /// `SET --map-set ... --map-mark`: take the mark of the entry (mangle only).
    MapMark {
        /// A set with `skbinfo`.
        set: SetName,
        /// Which end of the packet each dimension is compared with.
        flags: Vec<Direction>,
    },
    /// Call a chain.
    Jump(ChainName),
    /// Continue in a chain and do not come back here.
    Goto(ChainName),
    /// Words behind `-j`, one word each, unquoted, as iptables-save prints them (defaults included).
    Raw(Vec<String>),
}

/// How a refused sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RejectWith {
    /// ICMP port unreachable.
    PortUnreachable,
    /// ICMP protocol unreachable. IPv4 only: what says it in IPv6 (a parameter problem) is none of the
    /// messages that `ip6tables` knows, and the nearest that it does know is sent there.
    ProtocolUnreachable,
    /// ICMP communication administratively prohibited.
    AdminProhibited,
    /// TCP reset; needs protocol TCP.
    TcpReset,
}

/// A segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mss {
    /// This many bytes.
    Set(u16),
    /// What the path allows.
    ClampToPmtu,
}

impl Target {
    /// The chain it leads to.
    #[must_use]
    pub fn chain(&self) -> Option<ChainName> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(*chain),
            _ => None,
        }
    }

    pub(crate) fn words(&self, family: Family) -> Vec<String> {
        let mut words = vec!["-j".to_owned()];
        let mut add = |more: &[&str]| words.extend(more.iter().map(|w| (*w).to_owned()));
        match self {
            Self::Accept => add(&["ACCEPT"]),
            Self::Drop => add(&["DROP"]),
            Self::Return => add(&["RETURN"]),
            Self::Reject(with) => add(&["REJECT", "--reject-with", with.name(family)]),
            Self::Mark { value, mask } => add(&["MARK", "--set-xmark", &format!("{value:#x}/{mask:#x}")]),
            Self::Snat { to, random_fully } => {
                add(&["SNAT", "--to-source", &to.to_string()]);
                if *random_fully {
                    add(&["--random-fully"]);
                }
            }
            Self::Masquerade { random_fully } => {
                add(&["MASQUERADE"]);
                if *random_fully {
                    add(&["--random-fully"]);
                }
            }
            Self::TcpMss(Mss::Set(size)) => add(&["TCPMSS", "--set-mss", &size.to_string()]),
            Self::TcpMss(Mss::ClampToPmtu) => add(&["TCPMSS", "--clamp-mss-to-pmtu"]),
            Self::Nflog { group, prefix } => {
                add(&["NFLOG"]);
                if !prefix.is_empty() {
                    add(&["--nflog-prefix", prefix]);
                }
                add(&["--nflog-group", &group.to_string()]);
            }
            Self::Log { prefix } => {
                add(&["LOG"]);
                if !prefix.is_empty() {
                    add(&["--log-prefix", prefix]);
                }
            }
            Self::MapMark { set, flags } => {
                add(&["SET", "--map-set", set.as_str(), &join(flags), "--map-mark"]);
            }
            Self::Jump(chain) => add(&[chain.as_str()]),
            Self::Goto(chain) => return vec!["-g".to_owned(), chain.to_string()],
            Self::Raw(raw) => words.extend(raw.iter().cloned()),
        }
        words
    }
}

impl RejectWith {
    fn name(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::PortUnreachable, Family::V4) => "icmp-port-unreachable",
            (Self::ProtocolUnreachable, Family::V4) => "icmp-proto-unreachable",
            (Self::PortUnreachable | Self::ProtocolUnreachable, Family::V6) => "icmp6-port-unreachable",
            (Self::AdminProhibited, Family::V4) => "icmp-admin-prohibited",
            (Self::AdminProhibited, Family::V6) => "icmp6-adm-prohibited",
            (Self::TcpReset, _) => "tcp-reset",
        }
    }
}
