//! Speakers that know AS numbers of two octets only (RFC 6793).

use super::attribute::check_path;
use super::{Aggregator, AsPath, Asn, Attributes, SegmentKind};

/// AS4_PATH. Confederation segments do not belong there and are left out (RFC 6793 section 6).
pub(super) fn decode_path(value: &[u8]) -> Result<AsPath, &'static str> {
    if value.is_empty() {
        return Err("is empty");
    }
    check_path(value, 4, |_| Ok(()))?;
    let path = AsPath::from_wire(value.to_owned());
    Ok(if path.segments().any(|segment| segment.kind.is_confederation()) {
        without_confederation(&path)
    } else {
        path
    })
}

/// A path of two-octet numbers, checked before, in four octets each.
pub(super) fn widen(mut value: &[u8]) -> AsPath {
    let mut wide = Vec::with_capacity(value.len() * 2);
    while let Some((&[kind, count], rest)) = value.split_first_chunk()
        && let Some((numbers, rest)) = rest.split_at_checked(usize::from(count) * 2)
    {
        wide.extend_from_slice(&[kind, count]);
        for &[high, low] in numbers.as_chunks().0 {
            wide.extend_from_slice(&[0, 0, high, low]);
        }
        value = rest;
    }
    AsPath::from_wire(wide)
}

/// Puts together what a two-octet speaker passed on in two pieces (RFC 6793 section 4.2.3).
pub(super) fn merge(attributes: &mut Attributes, path: Option<AsPath>, aggregator: Option<Aggregator>) {
    if let (Some(old), Some(_)) = (attributes.aggregator, aggregator) {
        if old.asn != Asn::TRANS {
            // The aggregate was formed by a two-octet speaker later on: what is said of the way before is
            // no longer true.
            return;
        }
        attributes.aggregator = aggregator;
    }
    let Some(path) = path else { return };
    let Some(mut missing) = attributes.as_path.hops().checked_sub(path.hops()) else { return };
    // So many hops were added by two-octet speakers since; confederation segments that lead or stand
    // among them are kept.
    let mut merged = AsPath::empty();
    for segment in attributes.as_path.segments() {
        if missing == 0 && !segment.kind.is_confederation() {
            break;
        }
        let take =
            if segment.kind == SegmentKind::Sequence { missing.min(segment.len()) } else { segment.len() };
        merged.push(segment.kind, segment.asns().take(take));
        missing = missing.saturating_sub(segment.hops());
    }
    let mut rest = path.segments().peekable();
    if let Some(first) = rest.peek()
        && merged.extend_last_sequence(first)
    {
        rest.next();
    }
    for segment in rest {
        merged.push(segment.kind, segment.asns());
    }
    attributes.as_path = merged;
}

/// The path without segments of confederations.
pub(super) fn without_confederation(path: &AsPath) -> AsPath {
    let mut plain = AsPath::empty();
    for segment in path.segments().filter(|segment| !segment.kind.is_confederation()) {
        plain.push(segment.kind, segment.asns());
    }
    plain
}
