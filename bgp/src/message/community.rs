//! Communities: tags on a route (RFC 1997, 8092, 4360).

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use super::Asn;

/// A community of four octets, written `65001:100` or by its well-known name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Community(pub u32);

impl Community {
    /// Traffic is to be drained from this path (RFC 8326).
    pub const GRACEFUL_SHUTDOWN: Self = Self(0xffff_0000);
    /// To be accepted into own tables although policy would refuse (RFC 7611).
    pub const ACCEPT_OWN: Self = Self(0xffff_0001);
    /// Kept over a long-lived graceful restart (RFC 9494).
    pub const LLGR_STALE: Self = Self(0xffff_0006);
    /// Not to be kept over a long-lived graceful restart (RFC 9494).
    pub const NO_LLGR: Self = Self(0xffff_0007);
    /// Traffic to the prefix is to be dropped (RFC 7999).
    pub const BLACKHOLE: Self = Self(0xffff_029a);
    /// Not to leave the AS or confederation (RFC 1997).
    pub const NO_EXPORT: Self = Self(0xffff_ff01);
    /// Not to be advertised to anyone (RFC 1997).
    pub const NO_ADVERTISE: Self = Self(0xffff_ff02);
    /// Not to be advertised to external peers, confederation members included (RFC 1997).
    pub const NO_EXPORT_SUBCONFED: Self = Self(0xffff_ff03);
    /// Not to be advertised to bilateral peers (RFC 3765).
    pub const NO_PEER: Self = Self(0xffff_ff04);

    const NAMES: [(Self, &'static str); 9] = [
        (Self::GRACEFUL_SHUTDOWN, "graceful-shutdown"),
        (Self::ACCEPT_OWN, "accept-own"),
        (Self::LLGR_STALE, "llgr-stale"),
        (Self::NO_LLGR, "no-llgr"),
        (Self::BLACKHOLE, "blackhole"),
        (Self::NO_EXPORT, "no-export"),
        (Self::NO_ADVERTISE, "no-advertise"),
        (Self::NO_EXPORT_SUBCONFED, "no-export-subconfed"),
        (Self::NO_PEER, "no-peer"),
    ];

    /// The community that an AS of two octets defines.
    pub const fn new(asn: u16, value: u16) -> Self {
        Self((asn as u32) << 16 | value as u32)
    }

    /// The two halves: AS and its value.
    pub const fn parts(self) -> (u16, u16) {
        ((self.0 >> 16) as u16, self.0 as u16)
    }
}

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.iter().find(|(community, _)| community == self) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "{}:{}", self.0 >> 16, self.0 & 0xffff),
        }
    }
}

/// A text that is no community.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {expected}")]
pub struct InvalidCommunity {
    /// The text.
    pub text: String,
    /// What it should have been.
    pub expected: &'static str,
}

impl FromStr for Community {
    type Err = InvalidCommunity;

    /// Reads `65001:100`, a name like `no-export` in any case and with `_` or `-`, or the plain number.
    fn from_str(text: &str) -> Result<Self, InvalidCommunity> {
        let name = text.to_ascii_lowercase().replace('_', "-");
        if let Some((community, _)) = Self::NAMES.iter().find(|(_, known)| *known == name) {
            return Ok(*community);
        }
        let parsed = match text.split_once(':') {
            Some((asn, value)) => {
                asn.parse().ok().zip(value.parse().ok()).map(|(asn, value)| Self::new(asn, value))
            }
            None => text.parse().ok().map(Self),
        };
        parsed.ok_or_else(|| InvalidCommunity {
            text: text.to_owned(),
            expected: "community: write two numbers up to 65535 like 65001:100, or a name like no-export",
        })
    }
}

/// A community of twelve octets (RFC 8092), written `4200000001:1:2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LargeCommunity {
    /// The AS that defines the rest.
    pub administrator: Asn,
    /// First local data part, by custom a function.
    pub data1: u32,
    /// Second local data part, by custom a parameter.
    pub data2: u32,
}

impl LargeCommunity {
    /// A community from its three numbers.
    pub const fn new(administrator: Asn, data1: u32, data2: u32) -> Self {
        Self { administrator, data1, data2 }
    }
}

impl fmt::Display for LargeCommunity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.administrator, self.data1, self.data2)
    }
}

impl FromStr for LargeCommunity {
    type Err = InvalidCommunity;

    /// Reads `4200000001:1:2`, also with MetalLB's prefix `large:`.
    fn from_str(text: &str) -> Result<Self, InvalidCommunity> {
        let mut numbers =
            text.strip_prefix("large:").unwrap_or(text).split(':').map(|number| number.parse::<u32>().ok());
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Some(administrator)), Some(Some(data1)), Some(Some(data2)), None) => {
                Ok(Self::new(Asn(administrator), data1, data2))
            }
            _ => Err(InvalidCommunity {
                text: text.to_owned(),
                expected: "large community: write three numbers up to 4294967295 like 65001:1:2",
            }),
        }
    }
}

/// A community of eight octets: type, mostly a sub-type, and a value (RFC 4360).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExtendedCommunity(pub [u8; 8]);

impl ExtendedCommunity {
    /// Link bandwidth in bytes per second (draft-ietf-idr-link-bandwidth), non-transitive.
    pub const fn link_bandwidth(asn: u16, bytes_per_second: f32) -> Self {
        let [a, b] = asn.to_be_bytes();
        let [c, d, e, f] = bytes_per_second.to_be_bytes();
        Self([0x40, 0x04, a, b, c, d, e, f])
    }

    /// The bandwidth in bytes per second, if this is a link bandwidth community (transitive or not) and
    /// its value a finite number not below zero.
    pub fn bandwidth(self) -> Option<f32> {
        match self.0 {
            [0x00 | 0x40, 0x04, _, _, a, b, c, d] => {
                Some(f32::from_be_bytes([a, b, c, d])).filter(|value| value.is_finite() && *value >= 0.0)
            }
            _ => None,
        }
    }

    /// Whether it may leave the AS: the T bit is clear (RFC 4360 section 2).
    pub const fn is_transitive(self) -> bool {
        self.0[0] & 0x40 == 0
    }
}

impl fmt::Display for ExtendedCommunity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kind, subtype, a, b, c, d, e, g] = self.0;
        let name = match (kind, subtype) {
            (0..=2, 2) => "rt",
            (0..=2, 3) => "soo",
            (0x00 | 0x40, 4) => {
                return write!(
                    f,
                    "bandwidth:{}:{}",
                    u16::from_be_bytes([a, b]),
                    f32::from_be_bytes([c, d, e, g])
                );
            }
            _ => return write!(f, "{:#018x}", u64::from_be_bytes(self.0)),
        };
        match kind {
            0 => {
                write!(f, "{name}:{}:{}", u16::from_be_bytes([a, b]), u32::from_be_bytes([c, d, e, g]))
            }
            1 => write!(f, "{name}:{}:{}", Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([e, g])),
            _ => write!(f, "{name}:{}:{}", u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, g])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn communities_read_what_they_write() {
        for (text, community) in [
            ("65001:100", Community(0xfde9_0064)),
            ("no-export", Community::NO_EXPORT),
            ("graceful-shutdown", Community::GRACEFUL_SHUTDOWN),
            ("blackhole", Community::new(65535, 666)),
            ("65535:2", Community(0xffff_0002)),
        ] {
            assert_eq!(community.to_string(), text);
            assert_eq!(text.parse(), Ok(community));
        }
        assert_eq!("NO_ADVERTISE".parse(), Ok(Community::NO_ADVERTISE));
        assert_eq!("4294967041".parse(), Ok(Community::NO_EXPORT));
        for text in ["", "65536:1", "1:2:3", "1:-2", "no-such"] {
            assert!(text.parse::<Community>().is_err(), "{text}");
        }
    }

    #[test]
    fn large_communities_read_what_they_write() {
        let community = LargeCommunity::new(Asn(4_200_000_001), 1, 4_294_967_295);
        assert_eq!(community.to_string().parse(), Ok(community));
        assert_eq!(format!("large:{community}").parse(), Ok(community));
        for text in ["1:2", "1:2:3:4", "1:2:4294967296", "large:"] {
            assert!(text.parse::<LargeCommunity>().is_err(), "{text}");
        }
    }

    #[test]
    fn extended_communities_are_named() {
        let bandwidth = ExtendedCommunity::link_bandwidth(65001, 1.25e9);
        assert_eq!((bandwidth.bandwidth(), bandwidth.is_transitive()), (Some(1.25e9), false));
        assert_eq!(bandwidth.to_string(), "bandwidth:65001:1250000000");
        assert_eq!(ExtendedCommunity::link_bandwidth(1, f32::NAN).bandwidth(), None);
        assert_eq!(ExtendedCommunity([0, 2, 0xfd, 0xe9, 0, 0, 0, 7]).to_string(), "rt:65001:7");
        assert_eq!(ExtendedCommunity([1, 3, 10, 0, 0, 1, 0, 7]).to_string(), "soo:10.0.0.1:7");
        assert_eq!(ExtendedCommunity([2, 2, 0, 1, 0, 0, 0, 7]).to_string(), "rt:65536:7");
        assert_eq!(ExtendedCommunity([6, 0, 1, 2, 3, 4, 5, 6]).to_string(), "0x0600010203040506");
    }
}
