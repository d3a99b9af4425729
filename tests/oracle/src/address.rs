//! Blocks of addresses.

use std::net::IpAddr;

/// An address and how many of its first bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Block {
    /// Any address inside; bits after the prefix do not count.
    pub address: IpAddr,
    /// Number of bits that count.
    pub prefix: u8,
}

/// Length of an address of this family in bits.
pub fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// An address as a number.
pub fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

/// The address of this family with this number; bits too many for it are dropped.
pub fn from_bits(like: IpAddr, bits: u128) -> IpAddr {
    match like {
        #[allow(clippy::cast_possible_truncation)] // dropped on purpose
        IpAddr::V4(_) => IpAddr::V4((bits as u32).into()),
        IpAddr::V6(_) => IpAddr::V6(bits.into()),
    }
}

impl Block {
    /// Reads CIDR notation; `None` when it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let (address, prefix) = (address.parse().ok()?, prefix.parse().ok()?);
        (prefix <= width(address)).then_some(Self { address, prefix })
    }

    /// Whether an address is inside: same family, same first bits.
    pub fn contains(&self, address: IpAddr) -> bool {
        if self.address.is_ipv4() != address.is_ipv4() {
            return false;
        }
        (bits(self.address) ^ bits(address)) & self.mask() == 0
    }

    /// First and last address.
    pub fn ends(&self) -> (IpAddr, IpAddr) {
        let first = bits(self.address) & self.mask();
        let last = first | (self.mask() ^ bits_of_width(width(self.address)));
        (from_bits(self.address, first), from_bits(self.address, last))
    }

    /// With the bits after the prefix cleared.
    pub fn truncated(&self) -> Self {
        Self { address: self.ends().0, prefix: self.prefix }
    }

    fn mask(&self) -> u128 {
        let all = bits_of_width(width(self.address));
        let host = width(self.address) - self.prefix;
        if host == 128 { 0 } else { all >> host << host }
    }
}

fn bits_of_width(width: u8) -> u128 {
    if width == 128 { u128::MAX } else { (1 << width) - 1 }
}

impl std::fmt::Display for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_holds_the_addresses_with_its_first_bits() {
        for (block, inside, outside) in [
            ("10.1.2.0/24", "10.1.2.255", "10.1.3.0"),
            ("10.1.2.7/24", "10.1.2.0", "10.1.1.255"),
            ("10.1.2.3/32", "10.1.2.3", "10.1.2.2"),
            ("0.0.0.0/0", "255.255.255.255", "::"),
            ("::/0", "ffff::1", "1.2.3.4"),
            ("fd00::/64", "fd00::ffff:ffff:ffff:ffff", "fd00:0:0:1::"),
            ("fd00::4/127", "fd00::5", "fd00::6"),
        ] {
            let block = Block::parse(block).unwrap();
            assert!(block.contains(inside.parse().unwrap()), "{block} {inside}");
            assert!(!block.contains(outside.parse().unwrap()), "{block} {outside}");
        }
        for wrong in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "10.0.0/8", "x/8"] {
            assert_eq!(Block::parse(wrong), None, "{wrong}");
        }
        let ends = |text| Block::parse(text).unwrap().ends();
        assert_eq!(ends("10.1.2.3/30"), ("10.1.2.0".parse().unwrap(), "10.1.2.3".parse().unwrap()));
        assert_eq!(ends("0.0.0.0/0"), ("0.0.0.0".parse().unwrap(), "255.255.255.255".parse().unwrap()));
        let all = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap();
        assert_eq!(ends("::/0"), ("::".parse().unwrap(), all));
    }
}
