//! Numbers that name speakers.

use std::fmt;
use std::net::Ipv4Addr;
use std::num::ParseIntError;
use std::str::FromStr;

/// An autonomous system number of four octets (RFC 6793).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asn(pub u32);

impl Asn {
    /// Stands for a number above 65535 where a peer knows two octets only (RFC 6793 section 9).
    pub const TRANS: Self = Self(23456);

    /// The number in two octets, [`Asn::TRANS`] if it does not fit.
    pub const fn two_octets(self) -> u16 {
        if self.0 <= u16::MAX as u32 { self.0 as u16 } else { Self::TRANS.0 as u16 }
    }

    /// Whether the number is for private use (RFC 6996).
    pub const fn is_private(self) -> bool {
        matches!(self.0, 64512..=65534 | 4_200_000_000..=4_294_967_294)
    }
}

impl From<u32> for Asn {
    fn from(number: u32) -> Self {
        Self(number)
    }
}

impl fmt::Display for Asn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Asn {
    type Err = ParseIntError;

    /// Reads `4200000001`, and `64086.59905`, which is the same number in the dotted form of RFC 5396.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('.') {
            Some((high, low)) => {
                Ok(Self(u32::from(high.parse::<u16>()?) << 16 | u32::from(low.parse::<u16>()?)))
            }
            None => text.parse().map(Self),
        }
    }
}

/// A BGP identifier: any number but zero, unique within an AS (RFC 6286), written like an IPv4 address.
/// Also the type of cluster ids (RFC 4456).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouterId(pub Ipv4Addr);

impl From<u32> for RouterId {
    fn from(number: u32) -> Self {
        Self(number.into())
    }
}

impl From<Ipv4Addr> for RouterId {
    fn from(address: Ipv4Addr) -> Self {
        Self(address)
    }
}

impl From<RouterId> for u32 {
    fn from(id: RouterId) -> Self {
        id.0.into()
    }
}

impl fmt::Display for RouterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for RouterId {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}
