//! Path attributes: what is said of a route, apart from its prefix.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{AsPath, Asn, Community, ExtendedCommunity, LargeCommunity, RouterId};

/// All attributes of a route. Equal sets compare and hash equal, so that they can be shared by all
/// routes that have them and be sent once for many prefixes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// ORIGIN (1).
    pub origin: Origin,
    /// AS_PATH (2), completed from AS4_PATH if the peer knows two octets only.
    pub as_path: AsPath,
    /// NEXT_HOP (3), or that of MP_REACH_NLRI (14).
    pub next_hop: NextHop,
    /// MULTI_EXIT_DISC (4).
    pub med: Option<u32>,
    /// LOCAL_PREF (5): from internal peers only.
    pub local_preference: Option<u32>,
    /// ATOMIC_AGGREGATE (6).
    pub atomic_aggregate: bool,
    /// AGGREGATOR (7).
    pub aggregator: Option<Aggregator>,
    /// COMMUNITIES (8), in the order sent.
    pub communities: Vec<Community>,
    /// ORIGINATOR_ID (9): from internal peers only (RFC 4456).
    pub originator_id: Option<RouterId>,
    /// CLUSTER_LIST (10), nearest first: from internal peers only (RFC 4456).
    pub cluster_list: Vec<RouterId>,
    /// EXTENDED COMMUNITIES (16), in the order sent.
    pub extended_communities: Vec<ExtendedCommunity>,
    /// LARGE_COMMUNITY (32), in the order sent.
    pub large_communities: Vec<LargeCommunity>,
    /// Transitive attributes that nobody here understands, in the order sent: passed on as they are.
    pub unknown: Vec<UnknownAttribute>,
    /// Attributes that came with the Partial bit; it must be passed on (RFC 4271 section 4.3).
    pub partial: Partial,
}

/// How the route came into BGP (RFC 4271 section 5.1.1). Ordered by preference, best first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// 0: interior to its AS.
    #[default]
    Igp,
    /// 1: learned by EGP.
    Egp,
    /// 2: by other means.
    Incomplete,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Igp => "IGP",
            Self::Egp => "EGP",
            Self::Incomplete => "incomplete",
        })
    }
}

/// Where packets to the prefix go. IPv6 prefixes have an IPv6 next hop; IPv4 prefixes either (RFC 8950).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NextHop {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// An IPv6 address, and the link-local one of the same router (RFC 2545 section 3). On a session
    /// between link-local addresses `global` may be link-local too.
    V6 {
        /// The first address.
        global: Ipv6Addr,
        /// The second address, if there is one.
        link_local: Option<Ipv6Addr>,
    },
}

impl NextHop {
    /// The address to forward to: the global one unless it is unspecified.
    pub const fn address(&self) -> IpAddr {
        match *self {
            Self::V4(address) => IpAddr::V4(address),
            Self::V6 { global, link_local: Some(link_local) } if global.is_unspecified() => {
                IpAddr::V6(link_local)
            }
            Self::V6 { global, .. } => IpAddr::V6(global),
        }
    }

    /// Whether no address has been chosen yet, as for a route of this speaker before export.
    pub const fn is_unspecified(&self) -> bool {
        self.address().is_unspecified()
    }
}

impl Default for NextHop {
    /// Unspecified: to be set on export.
    fn default() -> Self {
        Self::V4(Ipv4Addr::UNSPECIFIED)
    }
}

impl From<IpAddr> for NextHop {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(global) => Self::V6 { global, link_local: None },
        }
    }
}

impl fmt::Display for NextHop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(address) => address.fmt(f),
            Self::V6 { global, link_local: None } => global.fmt(f),
            Self::V6 { global, link_local: Some(link_local) } => write!(f, "{global} {link_local}"),
        }
    }
}

/// Who formed the aggregate (RFC 4271 section 5.1.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Aggregator {
    /// Its AS.
    pub asn: Asn,
    /// Its BGP identifier.
    pub router_id: RouterId,
}

/// A transitive attribute with a type unknown here. Its flags are always optional, transitive and
/// partial: whoever does not understand an attribute must set the last (RFC 4271 section 5).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UnknownAttribute {
    /// Attribute type (IANA "BGP Path Attributes").
    pub code: u8,
    /// Its value.
    pub value: Vec<u8>,
}

impl UnknownAttribute {
    /// Attribute flags, without the extended length bit, which follows from the length.
    pub const FLAGS: u8 = 0xe0;
}

/// Which of the known optional transitive attributes are partial: some AS on the way did not
/// understand them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Partial {
    /// AGGREGATOR.
    pub aggregator: bool,
    /// COMMUNITIES.
    pub communities: bool,
    /// EXTENDED COMMUNITIES.
    pub extended_communities: bool,
    /// LARGE_COMMUNITY.
    pub large_communities: bool,
}
