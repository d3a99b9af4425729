//! Address families: which kind of route a session carries.

use std::fmt;

use ipnet::IpNet;

/// Address family and subsequent address family (RFC 4760 section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AfiSafi {
    /// AFI 1, SAFI 1.
    Ipv4Unicast,
    /// AFI 2, SAFI 1.
    Ipv6Unicast,
    /// Any other: it can be named, and its routes are ignored. Never a pair that has a name here: make it
    /// with [`AfiSafi::new`].
    Other {
        /// Address family number.
        afi: u16,
        /// Subsequent address family number.
        safi: u8,
    },
}

impl AfiSafi {
    /// Families whose routes can be decoded and encoded.
    pub const SUPPORTED: [Self; 2] = [Self::Ipv4Unicast, Self::Ipv6Unicast];

    /// The family with these numbers.
    pub const fn new(afi: u16, safi: u8) -> Self {
        match (afi, safi) {
            (1, 1) => Self::Ipv4Unicast,
            (2, 1) => Self::Ipv6Unicast,
            (afi, safi) => Self::Other { afi, safi },
        }
    }

    /// The family of a unicast prefix.
    pub const fn of(prefix: &IpNet) -> Self {
        match prefix {
            IpNet::V4(_) => Self::Ipv4Unicast,
            IpNet::V6(_) => Self::Ipv6Unicast,
        }
    }

    /// Address family number (IANA "Address Family Numbers").
    pub const fn afi(self) -> u16 {
        match self {
            Self::Ipv4Unicast => 1,
            Self::Ipv6Unicast => 2,
            Self::Other { afi, .. } => afi,
        }
    }

    /// Subsequent address family number (IANA "SAFI Values").
    pub const fn safi(self) -> u8 {
        match self {
            Self::Ipv4Unicast | Self::Ipv6Unicast => 1,
            Self::Other { safi, .. } => safi,
        }
    }
}

impl fmt::Display for AfiSafi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ipv4Unicast => f.write_str("IPv4 unicast"),
            Self::Ipv6Unicast => f.write_str("IPv6 unicast"),
            Self::Other { afi, safi } => write!(f, "AFI {afi} SAFI {safi}"),
        }
    }
}

/// A set of the families in [`AfiSafi::SUPPORTED`].
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Families(u8);

impl Families {
    /// No family.
    pub const NONE: Self = Self(0);
    /// IPv4 unicast alone: what a peer without multiprotocol capability speaks.
    pub const IPV4: Self = Self(1);
    /// IPv6 unicast alone.
    pub const IPV6: Self = Self(2);
    /// Both.
    pub const ALL: Self = Self(3);

    const fn bit(family: AfiSafi) -> u8 {
        match family {
            AfiSafi::Ipv4Unicast => 1,
            AfiSafi::Ipv6Unicast => 2,
            AfiSafi::Other { .. } => 0,
        }
    }

    /// Adds a family; one that is not supported is left out.
    pub const fn insert(&mut self, family: AfiSafi) {
        self.0 |= Self::bit(family);
    }

    /// Removes a family.
    pub const fn remove(&mut self, family: AfiSafi) {
        self.0 &= !Self::bit(family);
    }

    /// Whether the family is in the set.
    pub const fn contains(self, family: AfiSafi) -> bool {
        self.0 & Self::bit(family) != 0
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Families in both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Families in either set.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The families, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = AfiSafi> {
        AfiSafi::SUPPORTED.into_iter().filter(move |family| self.contains(*family))
    }
}

impl FromIterator<AfiSafi> for Families {
    fn from_iter<I: IntoIterator<Item = AfiSafi>>(families: I) -> Self {
        let mut set = Self::NONE;
        families.into_iter().for_each(|family| set.insert(family));
        set
    }
}

impl fmt::Debug for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
