//! AS_PATH (RFC 4271 section 5.1.2, with four-octet numbers of RFC 6793).

use std::fmt;

use super::Asn;

/// The ASes a route has crossed, nearest first. Kept in one allocation as on the wire between
/// four-octet speakers, so that comparing, hashing and sending it costs no more than its bytes.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct AsPath(Vec<u8>);

/// A run of ASes in a path.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// How the run is to be read.
    pub kind: SegmentKind,
    /// Four octets each, at least one and at most 255 of them.
    numbers: &'a [[u8; 4]],
}

/// Kinds of segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SegmentKind {
    /// Type 1: unordered, from aggregation (deprecated by RFC 9774).
    Set,
    /// Type 2: in order.
    Sequence,
    /// Type 3: in order, members of the sender's confederation (RFC 5065).
    ConfederationSequence,
    /// Type 4: unordered, members of the sender's confederation (RFC 5065).
    ConfederationSet,
}

impl SegmentKind {
    /// The kind of a segment type.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Set),
            2 => Some(Self::Sequence),
            3 => Some(Self::ConfederationSequence),
            4 => Some(Self::ConfederationSet),
            _ => None,
        }
    }

    /// The segment type.
    pub const fn number(self) -> u8 {
        match self {
            Self::Set => 1,
            Self::Sequence => 2,
            Self::ConfederationSequence => 3,
            Self::ConfederationSet => 4,
        }
    }

    /// Whether the segment belongs to a confederation.
    pub const fn is_confederation(self) -> bool {
        matches!(self, Self::ConfederationSequence | Self::ConfederationSet)
    }

    /// Whether the segment has no order.
    pub const fn is_set(self) -> bool {
        matches!(self, Self::Set | Self::ConfederationSet)
    }
}

impl<'a> Segment<'a> {
    /// How many ASes are in it, 1 to 255.
    #[allow(clippy::len_without_is_empty, reason = "a segment is never empty")]
    pub const fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The ASes, as on the wire.
    pub fn asns(self) -> impl DoubleEndedIterator<Item = Asn> + ExactSizeIterator + 'a {
        self.numbers.iter().map(|number| Asn(u32::from_be_bytes(*number)))
    }

    /// What it adds to the length of the path: a set counts once (RFC 4271 section 9.1.2.2 a),
    /// confederation segments do not count (RFC 5065 section 5.3).
    pub const fn hops(&self) -> usize {
        match self.kind {
            SegmentKind::Set => 1,
            SegmentKind::Sequence => self.numbers.len(),
            SegmentKind::ConfederationSequence | SegmentKind::ConfederationSet => 0,
        }
    }
}

impl AsPath {
    /// The path of a route that begins in this AS.
    pub const fn empty() -> Self {
        Self(Vec::new())
    }

    /// One path in order; more than 255 ASes become several segments.
    pub fn sequence(asns: impl IntoIterator<Item = Asn>) -> Self {
        let mut path = Self::empty();
        path.push(SegmentKind::Sequence, asns);
        path
    }

    /// Adds ASes behind all others; more than 255 become several segments, none adds nothing.
    pub fn push(&mut self, kind: SegmentKind, asns: impl IntoIterator<Item = Asn>) {
        let mut asns = asns.into_iter().peekable();
        while asns.peek().is_some() {
            let head = self.0.len();
            self.0.extend([kind.number(), 0]);
            let mut count = 0;
            for asn in asns.by_ref().take(255) {
                self.0.extend(asn.0.to_be_bytes());
                count += 1;
            }
            self.0[head + 1] = count;
        }
    }

    /// Puts an AS in front, so many times; in the first segment if that is a sequence with room.
    pub fn prepend(&mut self, asn: Asn, times: usize) {
        let mut rest = times;
        while rest > 0 {
            let room = match self.0[..] {
                [2, length, ..] => 255 - usize::from(length),
                _ => 0,
            };
            if room == 0 {
                self.0.splice(0..0, [SegmentKind::Sequence.number(), 0]);
                continue;
            }
            let count = rest.min(room);
            let numbers = std::iter::repeat_n(asn.0.to_be_bytes(), count).flatten();
            self.0.splice(2..2, numbers);
            self.0[1] += count as u8;
            rest -= count;
        }
    }

    /// The segments in order.
    pub fn segments(&self) -> Segments<'_> {
        Segments(&self.0)
    }

    /// All ASes, of whatever kind of segment.
    pub fn asns(&self) -> impl Iterator<Item = Asn> + '_ {
        self.segments().flat_map(Segment::asns)
    }

    /// Whether the AS is anywhere in the path.
    pub fn contains(&self, asn: Asn) -> bool {
        self.asns().any(|other| other == asn)
    }

    /// Length of the path for route selection (RFC 4271 section 9.1.2.2 a).
    pub fn hops(&self) -> usize {
        self.segments().map(|segment| segment.hops()).sum()
    }

    /// The neighbour that sent the route: first AS of a leading sequence, behind confederation segments.
    pub fn first(&self) -> Option<Asn> {
        let segment = self.segments().find(|segment| !segment.kind.is_confederation())?;
        if segment.kind == SegmentKind::Sequence { segment.asns().next() } else { None }
    }

    /// Where the route began: last AS of a closing sequence.
    pub fn origin(&self) -> Option<Asn> {
        let segment = self.segments().last()?;
        if segment.kind == SegmentKind::Sequence { segment.asns().next_back() } else { None }
    }

    /// Whether the route began in the neighbour's own AS, or in this one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a sequence into the last segment, if that is a sequence too and has room for all of it.
    pub(super) fn extend_last_sequence(&mut self, segment: &Segment<'_>) -> bool {
        let mut head = 0;
        let mut last = None;
        for segment in self.segments() {
            last = Some((head, segment.kind, segment.len()));
            head += 2 + 4 * segment.len();
        }
        let Some((head, SegmentKind::Sequence, length)) = last else { return false };
        if segment.kind != SegmentKind::Sequence || length + segment.len() > 255 {
            return false;
        }
        self.0[head + 1] += segment.len() as u8;
        self.0.extend(segment.numbers.as_flattened());
        true
    }

    /// The attribute's value between four-octet speakers.
    pub(super) fn as_wire(&self) -> &[u8] {
        &self.0
    }

    /// A path of bytes known to be whole segments of at least one AS.
    pub(super) fn from_wire(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// Iterator over the segments of a path.
#[derive(Clone)]
pub struct Segments<'a>(&'a [u8]);

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    fn next(&mut self) -> Option<Segment<'a>> {
        let (&[kind, count], rest) = self.0.split_first_chunk()?;
        let (numbers, rest) = rest.split_at_checked(usize::from(count) * 4)?;
        self.0 = rest;
        Some(Segment { kind: SegmentKind::from_number(kind)?, numbers: numbers.as_chunks().0 })
    }
}

impl fmt::Display for AsPath {
    /// As routers print it: `65001 65002 {65003,65004} (65005 65006) [65007,65008]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, segment) in self.segments().enumerate() {
            let (open, between, close) = match segment.kind {
                SegmentKind::Sequence => ("", " ", ""),
                SegmentKind::Set => ("{", ",", "}"),
                SegmentKind::ConfederationSequence => ("(", " ", ")"),
                SegmentKind::ConfederationSet => ("[", ",", "]"),
            };
            f.write_str(if index > 0 { " " } else { "" })?;
            f.write_str(open)?;
            for (index, asn) in segment.asns().enumerate() {
                f.write_str(if index > 0 { between } else { "" })?;
                asn.fmt(f)?;
            }
            f.write_str(close)?;
        }
        Ok(())
    }
}

impl fmt::Debug for AsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AsPath({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(asns: &[u32]) -> AsPath {
        AsPath::sequence(asns.iter().copied().map(Asn))
    }

    #[test]
    fn prepends_into_the_first_sequence_until_it_is_full() {
        let mut prepended = path(&[65002]);
        prepended.prepend(Asn(65001), 2);
        assert_eq!(prepended, path(&[65001, 65001, 65002]));

        let mut long = AsPath::sequence((0..254).map(Asn));
        long.prepend(Asn(7), 3);
        assert_eq!(long.segments().map(|segment| segment.len()).collect::<Vec<_>>(), [2, 255]);
        assert_eq!((long.hops(), long.first(), long.origin()), (257, Some(Asn(7)), Some(Asn(253))));

        let mut set = AsPath::empty();
        set.push(SegmentKind::Set, [Asn(1), Asn(2)]);
        assert_eq!((set.first(), set.origin(), set.hops()), (None, None, 1));
        set.prepend(Asn(3), 1);
        assert_eq!(set.to_string(), "3 {1,2}");
        set.prepend(Asn(3), 0);
        assert_eq!(set.hops(), 2);
    }

    #[test]
    fn confederations_do_not_count() {
        let mut path = AsPath::empty();
        path.push(SegmentKind::ConfederationSequence, [Asn(65010), Asn(65011)]);
        path.push(SegmentKind::ConfederationSet, [Asn(65012)]);
        path.push(SegmentKind::Sequence, [Asn(1), Asn(2)]);
        path.push(SegmentKind::Sequence, []);
        assert_eq!(path.to_string(), "(65010 65011) [65012] 1 2");
        assert_eq!((path.hops(), path.first(), path.origin()), (2, Some(Asn(1)), Some(Asn(2))));
        assert!(path.contains(Asn(65012)) && !path.contains(Asn(3)));
    }

    #[test]
    fn splits_long_sequences() {
        let long = AsPath::sequence((0..600).map(Asn));
        assert_eq!(long.segments().map(|segment| segment.len()).collect::<Vec<_>>(), [255, 255, 90]);
        assert!(long.asns().eq((0..600).map(Asn)));
    }
}
