//! Sets of prefixes with ranges of lengths.

use std::collections::HashMap;
use std::fmt;

use foldhash::fast::RandomState;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// One member of a set: prefixes inside `prefix` whose length is in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefixRange {
    /// What the prefix must lie in. Host bits do not count.
    pub prefix: IpNet,
    /// Shortest length that fits ("ge"), from the length of `prefix` up.
    pub shortest: u8,
    /// Longest length that fits ("le"), up to the length of an address.
    pub longest: u8,
}

/// Lengths that no prefix can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("lengths {shortest} to {longest} do not fit {prefix}: they go up from {} to {}", prefix.prefix_len(), prefix.max_prefix_len())]
pub struct InvalidRange {
    /// As given.
    pub prefix: IpNet,
    /// As given.
    pub shortest: u8,
    /// As given.
    pub longest: u8,
}

impl PrefixRange {
    /// The prefix alone.
    pub fn exact(prefix: IpNet) -> Self {
        Self { prefix: prefix.trunc(), shortest: prefix.prefix_len(), longest: prefix.prefix_len() }
    }

    /// The prefix and everything in it.
    pub fn orlonger(prefix: IpNet) -> Self {
        Self { prefix: prefix.trunc(), shortest: prefix.prefix_len(), longest: prefix.max_prefix_len() }
    }

    /// What lies in the prefix and has one of these lengths.
    ///
    /// # Errors
    ///
    /// [`InvalidRange`] when they are out of order, or out of the prefix's range.
    pub fn new(prefix: IpNet, shortest: u8, longest: u8) -> Result<Self, InvalidRange> {
        if prefix.prefix_len() <= shortest && shortest <= longest && longest <= prefix.max_prefix_len() {
            Ok(Self { prefix: prefix.trunc(), shortest, longest })
        } else {
            Err(InvalidRange { prefix, shortest, longest })
        }
    }
}

impl fmt::Display for PrefixRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = self.prefix.prefix_len();
        match (self.shortest, self.longest) {
            (shortest, longest) if shortest == own && longest == own => self.prefix.fmt(f),
            (shortest, longest) => write!(f, "{} ge {shortest} le {longest}", self.prefix),
        }
    }
}

/// Prefixes to look for. A look-up costs one hash for each length of prefix in the set, however many
/// members there are. The empty set contains nothing.
#[derive(Clone, Default)]
pub struct PrefixSet {
    ranges: HashMap<IpNet, Vec<(u8, u8)>, RandomState>,
    /// Lengths of members' prefixes, by family; few.
    lengths: [Vec<u8>; 2],
}

impl PrefixSet {
    /// Whether a prefix is in the set.
    pub fn contains(&self, prefix: IpNet) -> bool {
        let length = prefix.prefix_len();
        self.lengths(prefix).iter().take_while(|&&own| own <= length).any(|&own| {
            self.ranges.get(&shortened(prefix, own)).is_some_and(|ranges| {
                ranges.iter().any(|&(shortest, longest)| shortest <= length && length <= longest)
            })
        })
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The members, in no particular order.
    pub fn ranges(&self) -> impl Iterator<Item = PrefixRange> {
        self.ranges.iter().flat_map(|(&prefix, ranges)| {
            ranges.iter().map(move |&(shortest, longest)| PrefixRange { prefix, shortest, longest })
        })
    }

    fn lengths(&self, prefix: IpNet) -> &[u8] {
        &self.lengths[usize::from(matches!(prefix, IpNet::V6(_)))]
    }

    fn insert(&mut self, range: PrefixRange) {
        let prefix = range.prefix.trunc();
        let ranges = self.ranges.entry(prefix).or_default();
        if !ranges.contains(&(range.shortest, range.longest)) {
            ranges.push((range.shortest, range.longest));
            ranges.sort_unstable();
        }
        let lengths = &mut self.lengths[usize::from(matches!(prefix, IpNet::V6(_)))];
        if let Err(at) = lengths.binary_search(&prefix.prefix_len()) {
            lengths.insert(at, prefix.prefix_len());
        }
    }
}

/// The prefix cut to a length not above its own.
fn shortened(prefix: IpNet, length: u8) -> IpNet {
    match prefix {
        IpNet::V4(net) => Ipv4Net::new(net.addr(), length).map_or(prefix, |net| net.trunc().into()),
        IpNet::V6(net) => Ipv6Net::new(net.addr(), length).map_or(prefix, |net| net.trunc().into()),
    }
}

impl PartialEq for PrefixSet {
    fn eq(&self, other: &Self) -> bool {
        self.ranges == other.ranges
    }
}

impl Eq for PrefixSet {}

impl FromIterator<PrefixRange> for PrefixSet {
    fn from_iter<I: IntoIterator<Item = PrefixRange>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

impl FromIterator<IpNet> for PrefixSet {
    /// Exactly these prefixes.
    fn from_iter<I: IntoIterator<Item = IpNet>>(prefixes: I) -> Self {
        prefixes.into_iter().map(PrefixRange::exact).collect()
    }
}

impl fmt::Debug for PrefixSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.ranges().map(|range| range.to_string())).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn matches_lengths_in_range() {
        let set: PrefixSet = [
            PrefixRange::exact(net("10.0.0.0/8")),
            PrefixRange::orlonger(net("192.168.0.0/16")),
            PrefixRange::new(net("172.16.0.0/12"), 24, 28).unwrap(),
            PrefixRange::new(net("172.16.0.0/12"), 32, 32).unwrap(),
            PrefixRange::orlonger(net("2001:db8::/32")),
        ]
        .into_iter()
        .collect();
        for (prefix, expected) in [
            ("10.0.0.0/8", true),
            ("10.0.0.0/9", false),
            ("0.0.0.0/0", false),
            ("192.168.0.0/16", true),
            ("192.168.3.4/32", true),
            ("192.0.0.0/8", false),
            ("172.16.0.0/12", false),
            ("172.16.4.0/24", true),
            ("172.31.255.240/28", true),
            ("172.31.255.240/29", false),
            ("172.31.255.240/32", true),
            ("2001:db8::1/128", true),
            ("2001:db9::/32", false),
            ("::/0", false),
        ] {
            assert_eq!(set.contains(net(prefix)), expected, "{prefix}");
        }
        assert!(!PrefixSet::default().contains(net("10.0.0.0/8")), "an empty set matches nothing");
    }

    #[test]
    fn refuses_lengths_out_of_order() {
        for (shortest, longest) in [(7, 24), (24, 23), (24, 33)] {
            assert!(PrefixRange::new(net("10.0.0.0/8"), shortest, longest).is_err());
        }
        let error = PrefixRange::new(net("10.0.0.0/8"), 24, 33).unwrap_err();
        assert_eq!(error.to_string(), "lengths 24 to 33 do not fit 10.0.0.0/8: they go up from 8 to 32");
    }

    proptest! {
        /// The set agrees with a walk over all its ranges.
        #[test]
        fn agrees_with_a_walk(
            ranges in prop::collection::vec((0_u32..16, 0_u8..=6, 0_u8..=6, 0_u8..=6), 0..12),
            prefix in (0_u32..16, 0_u8..=6),
        ) {
            let net = |bits: u32, length: u8| IpNet::V4(Ipv4Net::new((bits << 28).into(), length).unwrap().trunc());
            let ranges: Vec<_> = ranges
                .into_iter()
                .filter_map(|(bits, length, shortest, longest)| PrefixRange::new(net(bits, length), shortest, longest).ok())
                .collect();
            let set: PrefixSet = ranges.iter().copied().collect();
            let prefix = net(prefix.0, prefix.1);
            let expected = ranges.iter().any(|range| {
                range.prefix.contains(&prefix) && (range.shortest..=range.longest).contains(&prefix.prefix_len())
            });
            prop_assert_eq!(set.contains(prefix), expected);
        }
    }
}
