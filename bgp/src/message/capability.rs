//! Capabilities: what a speaker says of itself in its OPEN (RFC 5492).

use super::AfiSafi;

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
        /// Host name, at most 255 octets.
        host: String,
        /// Domain, at most 255 octets; may be empty.
        domain: String,
    },
    /// Any other.
    Unknown {
        /// Capability code (IANA "Capability Codes").
        code: u8,
        /// Its value, at most 255 octets unless the OPEN is of the long form.
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
