//! Path attributes on the wire, read as RFC 7606 says.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    Action, AfiSafi, Aggregator, AsPath, Asn, Attributes, Codec, Community, ExtendedCommunity, Flaw,
    LargeCommunity, NextHop, NotificationError, Origin, RouterId, SegmentKind, SessionReset,
    UnknownAttribute, UpdateError, as4, attribute_name,
};

pub(super) const ORIGIN: u8 = 1;
pub(super) const AS_PATH: u8 = 2;
pub(super) const NEXT_HOP: u8 = 3;
pub(super) const MED: u8 = 4;
pub(super) const LOCAL_PREF: u8 = 5;
pub(super) const ATOMIC_AGGREGATE: u8 = 6;
pub(super) const AGGREGATOR: u8 = 7;
pub(super) const COMMUNITIES: u8 = 8;
pub(super) const ORIGINATOR_ID: u8 = 9;
pub(super) const CLUSTER_LIST: u8 = 10;
pub(super) const MP_REACH: u8 = 14;
pub(super) const MP_UNREACH: u8 = 15;
pub(super) const EXTENDED_COMMUNITIES: u8 = 16;
pub(super) const AS4_PATH: u8 = 17;
pub(super) const AS4_AGGREGATOR: u8 = 18;
pub(super) const LARGE_COMMUNITIES: u8 = 32;

/// Attribute flags (RFC 4271 section 4.3).
pub(super) const OPTIONAL: u8 = 0x80;
pub(super) const TRANSITIVE: u8 = 0x40;
pub(super) const PARTIAL: u8 = 0x20;
pub(super) const EXTENDED_LENGTH: u8 = 0x10;

/// The optional and transitive flags that an attribute must have; none for one unknown here.
pub(super) const fn flags(code: u8) -> Option<u8> {
    match code {
        ORIGIN | AS_PATH | NEXT_HOP | LOCAL_PREF | ATOMIC_AGGREGATE => Some(TRANSITIVE),
        MED | ORIGINATOR_ID | CLUSTER_LIST | MP_REACH | MP_UNREACH => Some(OPTIONAL),
        AGGREGATOR | COMMUNITIES | EXTENDED_COMMUNITIES | AS4_PATH | AS4_AGGREGATOR | LARGE_COMMUNITIES => {
            Some(OPTIONAL | TRANSITIVE)
        }
        _ => None,
    }
}

/// What the attributes of one UPDATE say.
#[derive(Default)]
pub(super) struct Parsed<'a> {
    /// All but the next hop.
    pub(super) attributes: Attributes,
    /// NEXT_HOP, for the classic field.
    pub(super) next_hop: Option<Ipv4Addr>,
    /// MP_REACH_NLRI of a family in use.
    pub(super) reach: Option<(AfiSafi, NextHop, &'a [u8])>,
    /// MP_UNREACH_NLRI of any family.
    pub(super) unreach: Option<(AfiSafi, &'a [u8])>,
    /// Whether MP_REACH_NLRI announces anything, of whatever family.
    pub(super) reaches: bool,
    /// How many attributes there were.
    pub(super) count: usize,
    /// Which there were.
    seen: Seen,
    as4_path: Option<AsPath>,
    as4_aggregator: Option<Aggregator>,
}

/// A set of attribute types.
#[derive(Default, Clone, Copy)]
struct Seen([u64; 4]);

impl Seen {
    const fn contains(self, code: u8) -> bool {
        self.0[code as usize / 64] & 1 << (code % 64) != 0
    }

    /// Whether the type is new.
    const fn insert(&mut self, code: u8) -> bool {
        let new = !self.contains(code);
        self.0[code as usize / 64] |= 1 << (code % 64);
        new
    }
}

/// Why an attribute is not taken.
enum Refusal {
    Flaw(Action, &'static str),
    /// Only for the attributes that hold routes: without them nobody knows what to withdraw.
    Reset(&'static str),
}

use Action::{AttributeDiscard as Discard, TreatAsWithdraw as Withdraw};

/// Reads all attributes of an UPDATE.
pub(super) fn decode<'a>(
    mut bytes: &'a [u8],
    codec: &Codec,
    flaws: &mut Vec<Flaw>,
) -> Result<Parsed<'a>, SessionReset> {
    let mut parsed = Parsed::default();
    while !bytes.is_empty() {
        let Some((flags, code, value, rest)) = split(bytes) else {
            // RFC 7606 section 4: the fields around are found by the total length all the same.
            Flaw::note(flaws, bytes.get(1).copied(), Withdraw, "the attribute does not end where all end");
            break;
        };
        let whole = &bytes[..bytes.len() - rest.len()];
        bytes = rest;
        parsed.count += 1;
        if !parsed.seen.insert(code) {
            // RFC 7606 section 3 g.
            if matches!(code, MP_REACH | MP_UNREACH) {
                let error = NotificationError::Update(UpdateError::MalformedAttributeList);
                return Err(SessionReset::new(error, [], format!("{} is there twice", attribute_name(code))));
            }
            Flaw::note(flaws, code, Discard, "is there again; the first counts");
            continue;
        }
        match parsed.take(flags, code, value, codec, flaws) {
            Ok(()) => {}
            Err(Refusal::Flaw(action, reason)) => Flaw::note(flaws, code, action, reason),
            Err(Refusal::Reset(reason)) => {
                let error = NotificationError::Update(UpdateError::OptionalAttribute);
                let reason = format!("{}: {reason}", attribute_name(code));
                return Err(SessionReset::new(error, whole, reason));
            }
        }
    }
    Ok(parsed)
}

/// Flags, type and value of the first attribute, and what follows it.
fn split(bytes: &[u8]) -> Option<(u8, u8, &[u8], &[u8])> {
    let (&[flags, code], rest) = bytes.split_first_chunk()?;
    let (length, rest) = if flags & EXTENDED_LENGTH != 0 {
        let (length, rest) = rest.split_first_chunk()?;
        (usize::from(u16::from_be_bytes(*length)), rest)
    } else {
        let (length, rest) = rest.split_first()?;
        (usize::from(*length), rest)
    };
    let (value, rest) = rest.split_at_checked(length)?;
    Some((flags, code, value, rest))
}

impl<'a> Parsed<'a> {
    fn take(
        &mut self,
        flags: u8,
        code: u8,
        value: &'a [u8],
        codec: &Codec,
        flaws: &mut Vec<Flaw>,
    ) -> Result<(), Refusal> {
        match code {
            // Not looked at any further: what is in them cannot matter (RFC 7606 sections 7.5, 7.9 and 7.10,
            // RFC 6793 section 4.1).
            LOCAL_PREF | ORIGINATOR_ID | CLUSTER_LIST if !codec.internal => {
                return Err(Refusal::Flaw(Discard, "came from an external peer"));
            }
            AS4_PATH | AS4_AGGREGATOR if codec.four_octet_as => {
                return Err(Refusal::Flaw(Discard, "came from a peer that needs it not"));
            }
            _ => {}
        }
        if let Some(expected) = self::flags(code)
            && (flags ^ expected) & (OPTIONAL | TRANSITIVE) != 0
        {
            // RFC 7606 sections 3 c and 5.3.
            return Err(match code {
                MP_REACH | MP_UNREACH => Refusal::Reset("has the flags of another kind of attribute"),
                _ => Refusal::Flaw(Withdraw, "has the flags of another kind of attribute"),
            });
        }
        let partial = flags & PARTIAL != 0;
        let attributes = &mut self.attributes;
        match code {
            ORIGIN => {
                attributes.origin = match value {
                    [0] => Origin::Igp,
                    [1] => Origin::Egp,
                    [2] => Origin::Incomplete,
                    [_] => return Err(Refusal::Flaw(Withdraw, "has an undefined value")),
                    _ => return Err(Refusal::Flaw(Withdraw, "is not of one octet")),
                };
            }
            AS_PATH => {
                attributes.as_path =
                    as_path(value, codec).map_err(|reason| Refusal::Flaw(Withdraw, reason))?
            }
            NEXT_HOP => self.next_hop = Some(fixed(value)?.into()),
            MED => attributes.med = Some(u32::from_be_bytes(fixed(value)?)),
            LOCAL_PREF => attributes.local_preference = Some(u32::from_be_bytes(fixed(value)?)),
            ATOMIC_AGGREGATE => {
                if !value.is_empty() {
                    return Err(Refusal::Flaw(Discard, "is not empty"));
                }
                attributes.atomic_aggregate = true;
            }
            AGGREGATOR => {
                attributes.aggregator = Some(aggregator(value, codec.four_octet_as)?);
                attributes.partial.aggregator = partial;
            }
            COMMUNITIES => {
                attributes.communities = list(value, |octets| Community(u32::from_be_bytes(octets)))?;
                attributes.partial.communities = partial;
            }
            ORIGINATOR_ID => attributes.originator_id = Some(RouterId(fixed(value)?.into())),
            CLUSTER_LIST => attributes.cluster_list = list(value, |octets: [u8; 4]| RouterId(octets.into()))?,
            EXTENDED_COMMUNITIES => {
                attributes.extended_communities = list(value, ExtendedCommunity)?;
                attributes.partial.extended_communities = partial;
            }
            LARGE_COMMUNITIES => {
                attributes.large_communities = list(value, |[a, b, c, d, e, f, g, h, i, j, k, l]| {
                    LargeCommunity::new(
                        Asn(u32::from_be_bytes([a, b, c, d])),
                        u32::from_be_bytes([e, f, g, h]),
                        u32::from_be_bytes([i, j, k, l]),
                    )
                })?;
                attributes.partial.large_communities = partial;
            }
            AS4_PATH => {
                let path = as4::decode_path(value).map_err(|reason| Refusal::Flaw(Discard, reason))?;
                // RFC 9774 section 3 asks the same of it as of AS_PATH.
                if !codec.accept_as_sets && path.segments().any(|segment| segment.kind.is_set()) {
                    return Err(Refusal::Flaw(Withdraw, AS_SET));
                }
                self.as4_path = Some(path);
            }
            AS4_AGGREGATOR => self.as4_aggregator = Some(aggregator(value, true)?),
            MP_REACH => self.reach(value, codec, flaws)?,
            MP_UNREACH => {
                let (&[high, low, safi], routes) =
                    value.split_first_chunk().ok_or(Refusal::Reset("is shorter than three octets"))?;
                self.unreach = Some((AfiSafi::new(u16::from_be_bytes([high, low]), safi), routes));
            }
            _ if flags & OPTIONAL == 0 => {
                return Err(Refusal::Flaw(
                    Withdraw,
                    "is not known here, although it claims to be well known",
                ));
            }
            // RFC 4271 section 5: passed on if transitive, else quietly ignored.
            _ if flags & TRANSITIVE != 0 => {
                attributes.unknown.push(UnknownAttribute { code, value: value.to_owned() });
            }
            _ => {}
        }
        Ok(())
    }

    /// MP_REACH_NLRI (RFC 4760 section 3). Until its prefixes are found, every error ends the session
    /// (RFC 7606 sections 5.3 and 7.11).
    fn reach(&mut self, value: &'a [u8], codec: &Codec, flaws: &mut Vec<Flaw>) -> Result<(), Refusal> {
        const CUT: Refusal = Refusal::Reset("is cut off");
        let (&[high, low, safi, length], rest) =
            value.split_first_chunk().ok_or(Refusal::Reset("is shorter than five octets"))?;
        let (next_hop, rest) = rest.split_at_checked(usize::from(length)).ok_or(CUT)?;
        // The octet between is reserved and to be ignored.
        let (_, routes) = rest.split_first().ok_or(CUT)?;
        self.reaches = !routes.is_empty();
        let family = AfiSafi::new(u16::from_be_bytes([high, low]), safi);
        if !codec.families.contains(family) {
            let reason = format!("{family} is not in use on this session");
            Flaw::note(flaws, MP_REACH, Discard, reason);
            return Ok(());
        }
        let next_hop = match (family, next_hop.len()) {
            (AfiSafi::Ipv4Unicast, 4) => NextHop::V4(fixed(next_hop)?.into()),
            (_, 16) => NextHop::V6 { global: address(next_hop), link_local: None },
            (_, 32) => {
                let (global, link_local) = next_hop.split_at(16);
                // Some routers fill the second place with anything; only a link-local address counts.
                let link_local = Some(address(link_local)).filter(Ipv6Addr::is_unicast_link_local);
                NextHop::V6 { global: address(global), link_local }
            }
            _ => return Err(Refusal::Reset("has a next hop of a length that its family cannot have")),
        };
        self.reach = Some((family, next_hop, routes));
        if !is_host(&next_hop) {
            return Err(Refusal::Flaw(Withdraw, "has a next hop that is no address of a host"));
        }
        // GoBGP sends these over every IPv6 session. Their lengths are those of RFC 8950, so the
        // prefixes are found, and the session need not end (RFC 7606 section 7.11).
        if family == AfiSafi::Ipv4Unicast && next_hop.address().is_ipv6() && !codec.extended_next_hop {
            return Err(Refusal::Flaw(Withdraw, "has an IPv6 next hop, which was not agreed on for IPv4"));
        }
        Ok(())
    }

    /// Checks that need all attributes: those that must be there, and what a two-octet speaker split.
    pub(super) fn complete(&mut self, classic: bool, codec: &Codec, flaws: &mut Vec<Flaw>) {
        // RFC 7606 section 3 d; section 5.2: without routes nothing is mandatory.
        if classic || self.reaches {
            for code in [ORIGIN, AS_PATH].into_iter().chain(classic.then_some(NEXT_HOP)) {
                if !self.seen.contains(code) {
                    Flaw::note(flaws, code, Withdraw, "is missing");
                }
            }
        }
        if classic && self.next_hop.is_some_and(|next_hop| !is_host(&NextHop::V4(next_hop))) {
            Flaw::note(flaws, NEXT_HOP, Withdraw, "is no address of a host");
        }
        if !codec.four_octet_as {
            let (path, aggregator) = (self.as4_path.take(), self.as4_aggregator.take());
            as4::merge(&mut self.attributes, path, aggregator);
        }
        if let Some(first) = codec.first_as
            && self.seen.contains(AS_PATH)
            && (classic || self.reaches)
            && self.attributes.as_path.first() != Some(first)
        {
            Flaw::note(flaws, AS_PATH, Withdraw, format!("does not begin with AS {first}, the neighbour's"));
        }
    }
}

/// A value of exactly so many octets.
fn fixed<const N: usize>(value: &[u8]) -> Result<[u8; N], Refusal> {
    value.try_into().map_err(|_| Refusal::Flaw(Withdraw, "has not the length that it must have"))
}

/// One or more entries of one size.
fn list<const N: usize, T>(value: &[u8], entry: impl Fn([u8; N]) -> T) -> Result<Vec<T>, Refusal> {
    match value.as_chunks() {
        ([], []) => Err(Refusal::Flaw(Withdraw, "is empty")),
        (entries, []) => Ok(entries.iter().map(|octets| entry(*octets)).collect()),
        _ => Err(Refusal::Flaw(Withdraw, "does not consist of whole entries")),
    }
}

fn address(octets: &[u8]) -> Ipv6Addr {
    <[u8; 16]>::try_from(octets).map_or(Ipv6Addr::UNSPECIFIED, Ipv6Addr::from)
}

/// Whether packets can be sent to the address. Addresses of this host are left to route import.
fn is_host(next_hop: &NextHop) -> bool {
    match next_hop {
        NextHop::V4(address) => !address.is_unspecified() && address.octets()[0] < 224,
        NextHop::V6 { global, .. } => !next_hop.is_unspecified() && !global.is_multicast(),
    }
}

fn aggregator(value: &[u8], four_octet_as: bool) -> Result<Aggregator, Refusal> {
    let (asn, id) = match *value {
        [a, b, c, d, e, f] if !four_octet_as => (u32::from(u16::from_be_bytes([a, b])), [c, d, e, f]),
        [a, b, c, d, e, f, g, h] if four_octet_as => (u32::from_be_bytes([a, b, c, d]), [e, f, g, h]),
        _ => return Err(Refusal::Flaw(Discard, "has not the length that it must have")),
    };
    match asn {
        // RFC 7607 section 2.
        0 => Err(Refusal::Flaw(Discard, "names AS 0")),
        asn => Ok(Aggregator { asn: Asn(asn), router_id: RouterId(id.into()) }),
    }
}

const AS_SET: &str = "has an AS_SET (RFC 9774)";

/// AS_PATH of either kind of speaker (RFC 7606 section 7.2).
fn as_path(value: &[u8], codec: &Codec) -> Result<AsPath, &'static str> {
    let width = if codec.four_octet_as { 4 } else { 2 };
    check_path(value, width, |kind| {
        if kind.is_confederation() && !codec.internal {
            // RFC 5065 section 5.
            return Err("has confederation segments, but the peer is in none with this speaker");
        }
        if kind.is_set() && !codec.accept_as_sets {
            return Err(AS_SET);
        }
        Ok(())
    })?;
    Ok(if codec.four_octet_as { AsPath::from_wire(value.to_owned()) } else { as4::widen(value) })
}

/// Walks over the segments of a path.
pub(super) fn check_path(
    mut value: &[u8],
    width: usize,
    segment: impl Fn(SegmentKind) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    while !value.is_empty() {
        let (&[kind, count], rest) = value.split_first_chunk().ok_or("ends within a segment's header")?;
        let kind = SegmentKind::from_number(kind).ok_or("has a segment of unknown type")?;
        if count == 0 {
            return Err("has an empty segment");
        }
        let (numbers, rest) =
            rest.split_at_checked(usize::from(count) * width).ok_or("has a segment longer than itself")?;
        segment(kind)?;
        // RFC 7607 section 2.
        if numbers.chunks_exact(width).any(|number| number.iter().all(|octet| *octet == 0)) {
            return Err("names AS 0");
        }
        value = rest;
    }
    Ok(())
}
