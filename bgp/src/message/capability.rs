//! Capabilities: what a speaker says of itself in its OPEN (RFC 5492).

use super::{AfiSafi, EncodeError};

/// One capability of an OPEN. Four-octet AS (RFC 6793) is [`super::Open::asn`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Capability {
    /// Code 1: the sender exchanges routes of this family (RFC 4760).
    Multiprotocol(AfiSafi),
    /// Code 2: the sender answers ROUTE-REFRESH (RFC 2918).
    RouteRefresh,
    /// Code 5: IPv6 next hops are understood for these IPv4 families (RFC 8950).
    ExtendedNextHop(Vec<ExtendedNextHop>),
    /// Code 6: messages up to 65535 octets are understood (RFC 8654).
    ExtendedMessage,
    /// Code 64: what happens to routes while the sender restarts (RFC 4724).
    GracefulRestart(GracefulRestart),
    /// Code 69: several paths per prefix (RFC 7911).
    AddPath(Vec<AddPath>),
    /// Code 70: refreshes have a beginning and an end (RFC 7313).
    EnhancedRouteRefresh,
    /// Code 73: the sender's name, for people (draft-walton-bgp-hostname-capability).
    Fqdn {
        /// Host name; with the domain at most 253 octets.
        host: String,
        /// Domain; may be empty.
        domain: String,
    },
    /// Any other, and one that cannot be understood.
    Unknown {
        /// Capability code (IANA "Capability Codes").
        code: u8,
        /// Its value, at most 255 octets.
        value: Vec<u8>,
    },
}

/// A family of which next hops of another family are understood (RFC 8950 section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExtendedNextHop {
    /// Family of the routes.
    pub family: AfiSafi,
    /// Address family of the next hop; 2 is IPv6.
    pub next_hop_afi: u16,
}

/// Graceful restart (RFC 4724 section 3).
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct GracefulRestart {
    /// R bit: the sender has just restarted.
    pub restarted: bool,
    /// N bit: NOTIFICATIONs other than hard resets are survived too (RFC 8538).
    pub notification: bool,
    /// Seconds until the session should be back, at most 4095.
    pub restart_time: u16,
    /// Families that take part.
    pub families: Vec<GracefulRestartFamily>,
}

/// A family in [`GracefulRestart`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GracefulRestartFamily {
    /// Which.
    pub family: AfiSafi,
    /// F bit: forwarding went on during the last restart.
    pub forwarding_preserved: bool,
}

/// A family with several paths per prefix (RFC 7911 section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddPath {
    /// Which.
    pub family: AfiSafi,
    /// In which direction, as the sender of the OPEN sees it.
    pub mode: AddPathMode,
}

/// Direction of several paths, from the OPEN's sender's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AddPathMode {
    /// 1: it can receive several.
    Receive,
    /// 2: it would send several.
    Send,
    /// 3: both.
    Both,
}

impl AddPathMode {
    /// Whether receiving is meant.
    pub const fn receives(self) -> bool {
        matches!(self, Self::Receive | Self::Both)
    }

    /// Whether sending is meant.
    pub const fn sends(self) -> bool {
        matches!(self, Self::Send | Self::Both)
    }
}

/// Capability code of four-octet AS numbers (RFC 6793 section 9).
pub(super) const FOUR_OCTET_AS: u8 = 65;

const MULTIPROTOCOL: u8 = 1;
const ROUTE_REFRESH: u8 = 2;
const EXTENDED_NEXT_HOP: u8 = 5;
const EXTENDED_MESSAGE: u8 = 6;
const GRACEFUL_RESTART: u8 = 64;
const ADD_PATH: u8 = 69;
const ENHANCED_ROUTE_REFRESH: u8 = 70;
const FQDN: u8 = 73;

/// Flags of the restart time (RFC 4724 section 3, RFC 8538 section 2).
const RESTARTED: u16 = 0x8000;
const NOTIFICATION: u16 = 0x4000;
const RESTART_TIME: u16 = 0x0fff;
/// Flag of a family in graceful restart (RFC 4724 section 3).
const FORWARDING: u8 = 0x80;

impl Capability {
    /// Capability code (IANA "Capability Codes").
    pub const fn code(&self) -> u8 {
        match self {
            Self::Multiprotocol(_) => MULTIPROTOCOL,
            Self::RouteRefresh => ROUTE_REFRESH,
            Self::ExtendedNextHop(_) => EXTENDED_NEXT_HOP,
            Self::ExtendedMessage => EXTENDED_MESSAGE,
            Self::GracefulRestart(_) => GRACEFUL_RESTART,
            Self::AddPath(_) => ADD_PATH,
            Self::EnhancedRouteRefresh => ENHANCED_ROUTE_REFRESH,
            Self::Fqdn { .. } => FQDN,
            Self::Unknown { code, .. } => *code,
        }
    }

    /// Reads a value. None if the length is impossible for a capability that says how routes are to be
    /// read; others that cannot be understood are kept as unknown, which is as if they were not there.
    pub(super) fn decode(code: u8, value: &[u8]) -> Option<Self> {
        Some(match (code, value) {
            (MULTIPROTOCOL, _) => {
                let &[high, low, _, safi] = value else { return None };
                Self::Multiprotocol(AfiSafi::new(u16::from_be_bytes([high, low]), safi))
            }
            (ROUTE_REFRESH, []) => Self::RouteRefresh,
            (EXTENDED_NEXT_HOP, _) => {
                let entries = whole(value)?.iter().map(|&[a, b, c, d, e, f]| ExtendedNextHop {
                    // The SAFI has two octets here; one that does not fit in one cannot be meant.
                    family: AfiSafi::new(u16::from_be_bytes([a, b]), if c == 0 { d } else { 0 }),
                    next_hop_afi: u16::from_be_bytes([e, f]),
                });
                Self::ExtendedNextHop(entries.collect())
            }
            (EXTENDED_MESSAGE, []) => Self::ExtendedMessage,
            (GRACEFUL_RESTART, _) => {
                let (time, families) = value.split_first_chunk()?;
                let time = u16::from_be_bytes(*time);
                let families = whole(families)?.iter().map(|&[a, b, safi, flags]| GracefulRestartFamily {
                    family: AfiSafi::new(u16::from_be_bytes([a, b]), safi),
                    forwarding_preserved: flags & FORWARDING != 0,
                });
                Self::GracefulRestart(GracefulRestart {
                    restarted: time & RESTARTED != 0,
                    notification: time & NOTIFICATION != 0,
                    restart_time: time & RESTART_TIME,
                    families: families.collect(),
                })
            }
            (ADD_PATH, _) => {
                let entries = whole(value)?.iter().filter_map(|&[a, b, safi, mode]| {
                    let mode = match mode {
                        1 => AddPathMode::Receive,
                        2 => AddPathMode::Send,
                        3 => AddPathMode::Both,
                        // RFC 7911 section 4: to be ignored.
                        _ => return None,
                    };
                    Some(AddPath { family: AfiSafi::new(u16::from_be_bytes([a, b]), safi), mode })
                });
                Self::AddPath(entries.collect())
            }
            (ENHANCED_ROUTE_REFRESH, []) => Self::EnhancedRouteRefresh,
            (FQDN, _) => match names(value) {
                Some((host, domain)) => Self::Fqdn { host: host.to_owned(), domain: domain.to_owned() },
                None => Self::Unknown { code, value: value.to_owned() },
            },
            (code, value) => Self::Unknown { code, value: value.to_owned() },
        })
    }

    /// Appends code, length and value.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let head = out.len();
        out.extend([self.code(), 0]);
        match self {
            Self::Multiprotocol(family) => {
                out.extend(family.afi().to_be_bytes());
                out.extend([0, family.safi()]);
            }
            Self::RouteRefresh | Self::ExtendedMessage | Self::EnhancedRouteRefresh => {}
            Self::ExtendedNextHop(entries) => {
                for entry in entries {
                    out.extend(entry.family.afi().to_be_bytes());
                    out.extend([0, entry.family.safi()]);
                    out.extend(entry.next_hop_afi.to_be_bytes());
                }
            }
            Self::GracefulRestart(restart) => {
                let restarted = if restart.restarted { RESTARTED } else { 0 };
                let notification = if restart.notification { NOTIFICATION } else { 0 };
                let time = restart.restart_time.min(RESTART_TIME);
                out.extend((restarted | notification | time).to_be_bytes());
                for entry in &restart.families {
                    out.extend(entry.family.afi().to_be_bytes());
                    out.extend([
                        entry.family.safi(),
                        if entry.forwarding_preserved { FORWARDING } else { 0 },
                    ]);
                }
            }
            Self::AddPath(entries) => {
                for entry in entries {
                    out.extend(entry.family.afi().to_be_bytes());
                    let mode = match entry.mode {
                        AddPathMode::Receive => 1,
                        AddPathMode::Send => 2,
                        AddPathMode::Both => 3,
                    };
                    out.extend([entry.family.safi(), mode]);
                }
            }
            Self::Fqdn { host, domain } => {
                for name in [host, domain] {
                    // A length that does not fit is refused below: the value is even longer.
                    out.push(name.len() as u8);
                    out.extend(name.as_bytes());
                }
            }
            Self::Unknown { value, .. } => out.extend(value),
        }
        let length = out.len() - head - 2;
        out[head + 1] =
            length.try_into().map_err(|_| EncodeError::Capability { code: self.code(), length })?;
        Ok(())
    }
}

/// The value as entries of one size, if nothing remains.
fn whole<const N: usize>(value: &[u8]) -> Option<&[[u8; N]]> {
    let (entries, rest) = value.as_chunks();
    rest.is_empty().then_some(entries)
}

/// Host name and domain, if both are text and fill the value.
fn names(value: &[u8]) -> Option<(&str, &str)> {
    let (length, rest) = value.split_first()?;
    let (host, rest) = rest.split_at_checked(usize::from(*length))?;
    let (length, domain) = rest.split_first()?;
    if usize::from(*length) != domain.len() {
        return None;
    }
    Some((str::from_utf8(host).ok()?, str::from_utf8(domain).ok()?))
}
