//! From messages to octets, straight into the buffer that is to be sent.

use super::attribute::{self, EXTENDED_LENGTH, PARTIAL};
use super::frame::{self, HEADER};
use super::{
    AfiSafi, Attributes, Codec, MESSAGE_MAX, Message, NextHop, Nlri, Origin, SegmentKind, UnknownAttribute,
    as4,
};

/// Why a message cannot be written. Nothing of it has been then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The message, or the attributes with a single prefix, do not fit. The route cannot be advertised.
    #[error("{what} of {length} octets does not fit into a message of {max}")]
    TooLarge {
        /// What is to be written.
        what: &'static str,
        /// Its length in octets.
        length: usize,
        /// Longest message of this session.
        max: u16,
    },
    /// A capability's value has more than 255 octets.
    #[error("the value of capability {code} has {length} octets, 255 are the most")]
    Capability {
        /// Capability code.
        code: u8,
        /// Length of its value in octets.
        length: usize,
    },
    /// Routes of the family are not exchanged with this peer.
    #[error("{family} routes are not exchanged on this session")]
    Family {
        /// Which.
        family: AfiSafi,
    },
    /// The next hop is unspecified or of a family that the peer cannot take for these routes.
    #[error("{family} routes cannot have next hop {next_hop} on this session")]
    NextHop {
        /// Family of the routes.
        family: AfiSafi,
        /// Their next hop.
        next_hop: NextHop,
    },
}

/// What is written for LOCAL_PREF to an internal peer where a route has none: the attribute must be there
/// (RFC 4271 section 5.1.5), and this is what others assume.
const LOCAL_PREFERENCE: u32 = 100;

impl Message {
    /// Appends the message; an UPDATE becomes as few messages as its routes fit into, none if it says
    /// nothing.
    ///
    /// # Errors
    ///
    /// As [`EncodeError`]; the buffer is as before then.
    pub fn encode(&self, codec: &Codec, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let result = self.append(codec, out);
        if result.is_err() {
            out.truncate(start);
        }
        result
    }

    fn append(&self, codec: &Codec, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        match self {
            Self::Open(open) => {
                header(frame::OPEN, out);
                open.encode(out)?;
                finish("an OPEN", start, MESSAGE_MAX, out)
            }
            Self::Update(update) => {
                codec.withdraw(update.withdrawn.iter().copied(), out)?;
                for announcement in &update.announced {
                    codec.announce(&announcement.attributes, announcement.nlri.iter().copied(), out)?;
                }
                update.end_of_rib.into_iter().for_each(|family| codec.end_of_rib(family, out));
                Ok(())
            }
            Self::Notification(notification) => {
                header(frame::NOTIFICATION, out);
                let (code, subcode) = notification.error.numbers();
                out.extend([code, subcode]);
                // Data that is too long is a copy of what the peer sent: its beginning says enough.
                let room = usize::from(codec.send_max) - HEADER - 2;
                out.extend(notification.data.iter().take(room));
                finish("a NOTIFICATION", start, codec.send_max, out)
            }
            Self::Keepalive => {
                header(frame::KEEPALIVE, out);
                finish("a KEEPALIVE", start, MESSAGE_MAX, out)
            }
            Self::RouteRefresh(refresh) => {
                header(frame::ROUTE_REFRESH, out);
                let [high, low] = refresh.family.afi().to_be_bytes();
                out.extend([high, low, refresh.kind.number(), refresh.family.safi()]);
                finish("a ROUTE-REFRESH", start, MESSAGE_MAX, out)
            }
        }
    }
}

/// Appends a header whose length is not known yet.
fn header(kind: u8, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xff; 16]);
    out.extend_from_slice(&[0, 0, kind]);
}

/// Writes the length of the message that begins at `start`.
fn finish(what: &'static str, start: usize, max: u16, out: &mut [u8]) -> Result<(), EncodeError> {
    let length = out.len() - start;
    match u16::try_from(length) {
        Ok(short) if short <= max => {
            out[start + 16..start + 18].copy_from_slice(&short.to_be_bytes());
            Ok(())
        }
        _ => Err(EncodeError::TooLarge { what, length, max }),
    }
}

impl Codec {
    /// Appends UPDATEs that announce the prefixes, as many to a message as fit, and gives the number of
    /// messages. Prefixes of one family should stand together: a change of family begins a new message.
    ///
    /// # Errors
    ///
    /// As [`EncodeError`]; the buffer is as before then.
    pub fn announce(
        &self,
        attributes: &Attributes,
        nlri: impl IntoIterator<Item = Nlri>,
        out: &mut Vec<u8>,
    ) -> Result<usize, EncodeError> {
        self.pack(nlri, out, |family, out| self.announcement(attributes, family, out))
    }

    /// Appends UPDATEs that withdraw the prefixes, as many to a message as fit, and gives the number of
    /// messages. Prefixes of one family should stand together.
    ///
    /// # Errors
    ///
    /// As [`EncodeError`]; the buffer is as before then.
    pub fn withdraw(
        &self,
        nlri: impl IntoIterator<Item = Nlri>,
        out: &mut Vec<u8>,
    ) -> Result<usize, EncodeError> {
        self.pack(nlri, out, |family, out| self.withdrawal(family, out))
    }

    /// Appends the mark that the initial routes of a family are complete (RFC 4724 section 2).
    pub fn end_of_rib(&self, family: AfiSafi, out: &mut Vec<u8>) {
        header(frame::UPDATE, out);
        let length = out.len() - 3;
        match family {
            AfiSafi::Ipv4Unicast => {
                out.extend([0; 4]);
                out[length..length + 2].copy_from_slice(&23_u16.to_be_bytes());
            }
            family => {
                let [high, low] = family.afi().to_be_bytes();
                out.extend([
                    0,
                    0,
                    0,
                    6,
                    attribute::OPTIONAL,
                    attribute::MP_UNREACH,
                    3,
                    high,
                    low,
                    family.safi(),
                ]);
                out[length..length + 2].copy_from_slice(&29_u16.to_be_bytes());
            }
        }
    }

    /// Fills messages: `begin` writes one up to its prefixes and says what follows them.
    fn pack(
        &self,
        nlri: impl IntoIterator<Item = Nlri>,
        out: &mut Vec<u8>,
        begin: impl Fn(AfiSafi, &mut Vec<u8>) -> Result<Shape, EncodeError>,
    ) -> Result<usize, EncodeError> {
        let start = out.len();
        let mut packer = Packer { max: self.send_max, shape: None, start, messages: 0 };
        let fill = || {
            for nlri in nlri {
                let family = nlri.family();
                let add_path = self.add_path_send.contains(family);
                packer.room(family, nlri.encoded_len(add_path), &begin, out)?;
                nlri.encode(add_path, out);
            }
            packer.close(out);
            Ok(packer.messages)
        };
        let result = fill();
        if result.is_err() {
            out.truncate(start);
        }
        result
    }

    fn check(&self, family: AfiSafi) -> Result<(), EncodeError> {
        if self.families.contains(family) { Ok(()) } else { Err(EncodeError::Family { family }) }
    }

    fn withdrawal(&self, family: AfiSafi, out: &mut Vec<u8>) -> Result<Shape, EncodeError> {
        self.check(family)?;
        let start = out.len();
        header(frame::UPDATE, out);
        if family == AfiSafi::Ipv4Unicast {
            out.extend_from_slice(&[0, 0]);
            return Ok(Shape { family, head: HEADER + 2, lengths: [Some(HEADER), None], tail: vec![0, 0] });
        }
        out.extend_from_slice(&[0; 4]);
        let flags = attribute::OPTIONAL | EXTENDED_LENGTH;
        let [high, low] = family.afi().to_be_bytes();
        out.extend_from_slice(&[flags, attribute::MP_UNREACH, 0, 0, high, low, family.safi()]);
        let lengths = [Some(HEADER + 6), Some(HEADER + 2)];
        Ok(Shape { family, head: out.len() - start, lengths, tail: Vec::new() })
    }

    fn announcement(
        &self,
        attributes: &Attributes,
        family: AfiSafi,
        out: &mut Vec<u8>,
    ) -> Result<Shape, EncodeError> {
        self.check(family)?;
        let next_hop = attributes.next_hop;
        let refused = EncodeError::NextHop { family, next_hop };
        if next_hop.is_unspecified() {
            return Err(refused);
        }
        let start = out.len();
        header(frame::UPDATE, out);
        out.extend_from_slice(&[0; 4]);
        let begin = out.len();
        match (family, next_hop) {
            (AfiSafi::Ipv4Unicast, NextHop::V4(address)) => {
                self.attributes(attributes, Some(address.octets()), out)?;
                let length = out.len() - begin;
                let Ok(short) = u16::try_from(length) else {
                    return Err(EncodeError::TooLarge { what: ATTRIBUTES, length, max: self.send_max });
                };
                out[begin - 2..begin].copy_from_slice(&short.to_be_bytes());
                Ok(Shape { family, head: out.len() - start, lengths: [None, None], tail: Vec::new() })
            }
            (_, NextHop::V6 { global, link_local })
                if family == AfiSafi::Ipv6Unicast || self.extended_next_hop =>
            {
                // MP_REACH_NLRI comes first (RFC 7606 section 5.1), so the others follow the prefixes.
                let flags = attribute::OPTIONAL | EXTENDED_LENGTH;
                let [high, low] = family.afi().to_be_bytes();
                let length = if link_local.is_some() { 32 } else { 16 };
                out.extend_from_slice(&[flags, attribute::MP_REACH, 0, 0, high, low, family.safi(), length]);
                out.extend_from_slice(&global.octets());
                link_local.iter().for_each(|address| out.extend_from_slice(&address.octets()));
                out.push(0);
                let mut tail = Vec::with_capacity(128);
                self.attributes(attributes, None, &mut tail)?;
                let lengths = [Some(begin - start + 2), Some(begin - start - 2)];
                Ok(Shape { family, head: out.len() - start, lengths, tail })
            }
            _ => Err(refused),
        }
    }

    /// Appends all attributes but MP_REACH_NLRI.
    fn attributes(
        &self,
        attributes: &Attributes,
        next_hop: Option<[u8; 4]>,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let mut writer = Writer { out, max: self.send_max, four_octet_as: self.four_octet_as };
        writer.all(attributes, next_hop, self.internal)
    }
}

const ATTRIBUTES: &str = "a set of attributes";

/// How the messages of one family look around their prefixes.
struct Shape {
    family: AfiSafi,
    /// Length of what stands before the prefixes.
    head: usize,
    /// Where in the message two octets count what follows them: up to the end of the prefixes, and up to
    /// the end of the message.
    lengths: [Option<usize>; 2],
    /// What stands behind the prefixes.
    tail: Vec<u8>,
}

/// Fills one message after the other.
struct Packer {
    max: u16,
    shape: Option<Shape>,
    /// Where the open message begins.
    start: usize,
    messages: usize,
}

impl Packer {
    /// Makes sure that a message of this family is open and has room for so many octets.
    fn room(
        &mut self,
        family: AfiSafi,
        size: usize,
        begin: impl Fn(AfiSafi, &mut Vec<u8>) -> Result<Shape, EncodeError>,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let max = usize::from(self.max);
        match &self.shape {
            Some(shape) if shape.family == family => {
                if out.len() - self.start + size + shape.tail.len() <= max {
                    return Ok(());
                }
                // The next message begins as this one did.
                let (start, head) = (self.start, shape.head);
                self.close_message(out);
                self.start = out.len();
                out.extend_from_within(start..start + head);
            }
            _ => {
                self.close(out);
                self.start = out.len();
                self.shape = Some(begin(family, out)?);
            }
        }
        let tail = self.shape.as_ref().map_or(0, |shape| shape.tail.len());
        let length = out.len() - self.start + size + tail;
        if length > max {
            return Err(EncodeError::TooLarge { what: ATTRIBUTES, length, max: self.max });
        }
        self.messages += 1;
        Ok(())
    }

    /// Ends the open message, if there is one.
    fn close(&mut self, out: &mut Vec<u8>) {
        self.close_message(out);
        self.shape = None;
    }

    fn close_message(&mut self, out: &mut Vec<u8>) {
        let Some(shape) = &self.shape else { return };
        let prefixes = out.len();
        out.extend_from_slice(&shape.tail);
        let mut count = |at: usize, end: usize| {
            // At most the length of the message, which has been checked.
            let at = self.start + at;
            let length = (end - at - 2) as u16;
            out[at..at + 2].copy_from_slice(&length.to_be_bytes());
        };
        let ends = [prefixes, prefixes + shape.tail.len()];
        for (at, end) in shape.lengths.into_iter().zip(ends) {
            at.into_iter().for_each(|at| count(at, end));
        }
        let length = (ends[1] - self.start) as u16;
        out[self.start + 16..self.start + 18].copy_from_slice(&length.to_be_bytes());
    }
}

/// Writes attributes in the order of their types (RFC 4271 section 5).
struct Writer<'a> {
    out: &'a mut Vec<u8>,
    max: u16,
    four_octet_as: bool,
}

impl Writer<'_> {
    fn all(
        &mut self,
        attributes: &Attributes,
        next_hop: Option<[u8; 4]>,
        internal: bool,
    ) -> Result<(), EncodeError> {
        let partial = attributes.partial;
        let origin = match attributes.origin {
            Origin::Igp => 0,
            Origin::Egp => 1,
            Origin::Incomplete => 2,
        };
        self.fixed(attribute::ORIGIN, false, [origin])?;
        let as4_path = self.as_path(attributes)?;
        next_hop.map_or(Ok(()), |octets| self.fixed(attribute::NEXT_HOP, false, octets))?;
        attributes.med.map_or(Ok(()), |med| self.fixed(attribute::MED, false, med.to_be_bytes()))?;
        if internal {
            let preference = attributes.local_preference.unwrap_or(LOCAL_PREFERENCE);
            self.fixed(attribute::LOCAL_PREF, false, preference.to_be_bytes())?;
        }
        if attributes.atomic_aggregate {
            self.fixed(attribute::ATOMIC_AGGREGATE, false, [])?;
        }
        if let Some(aggregator) = attributes.aggregator {
            let [a, b, c, d] = aggregator.asn.0.to_be_bytes();
            let [e, f, g, h] = aggregator.router_id.0.octets();
            if self.four_octet_as {
                self.fixed(attribute::AGGREGATOR, partial.aggregator, [a, b, c, d, e, f, g, h])?;
            } else {
                let [a, b] = aggregator.asn.two_octets().to_be_bytes();
                self.fixed(attribute::AGGREGATOR, partial.aggregator, [a, b, e, f, g, h])?;
            }
        }
        let communities = attributes.communities.iter().map(|community| community.0.to_be_bytes());
        self.list(attribute::COMMUNITIES, partial.communities, communities)?;
        if internal {
            let id = attributes.originator_id;
            id.map_or(Ok(()), |id| self.fixed(attribute::ORIGINATOR_ID, false, id.0.octets()))?;
            let clusters = attributes.cluster_list.iter().map(|id| id.0.octets());
            self.list(attribute::CLUSTER_LIST, false, clusters)?;
        }
        let extended = attributes.extended_communities.iter().map(|community| community.0);
        self.list(attribute::EXTENDED_COMMUNITIES, partial.extended_communities, extended)?;
        if let Some(path) = as4_path {
            self.head(attribute::AS4_PATH, false, path.as_wire().len())?;
            self.out.extend_from_slice(path.as_wire());
        }
        if let Some(aggregator) = attributes.aggregator
            && !self.four_octet_as
            && aggregator.asn.0 > u32::from(u16::MAX)
        {
            let [a, b, c, d] = aggregator.asn.0.to_be_bytes();
            let [e, f, g, h] = aggregator.router_id.0.octets();
            self.fixed(attribute::AS4_AGGREGATOR, partial.aggregator, [a, b, c, d, e, f, g, h])?;
        }
        let large = attributes.large_communities.iter().map(|community| {
            let [a, b, c, d] = community.administrator.0.to_be_bytes();
            let [e, f, g, h] = community.data1.to_be_bytes();
            let [i, j, k, l] = community.data2.to_be_bytes();
            [a, b, c, d, e, f, g, h, i, j, k, l]
        });
        self.list(attribute::LARGE_COMMUNITIES, partial.large_communities, large)?;
        // One that is known has its own field and must not come twice.
        for unknown in attributes.unknown.iter().filter(|unknown| attribute::flags(unknown.code).is_none()) {
            self.raw_head(unknown.code, UnknownAttribute::FLAGS, unknown.value.len())?;
            self.out.extend_from_slice(&unknown.value);
        }
        Ok(())
    }

    /// AS_PATH; what of it a two-octet speaker cannot hold is given back.
    fn as_path(&mut self, attributes: &Attributes) -> Result<Option<super::AsPath>, EncodeError> {
        let path = &attributes.as_path;
        if self.four_octet_as {
            self.head(attribute::AS_PATH, false, path.as_wire().len())?;
            self.out.extend_from_slice(path.as_wire());
            return Ok(None);
        }
        let length = path.segments().map(|segment| 2 + 2 * segment.len()).sum();
        self.head(attribute::AS_PATH, false, length)?;
        for segment in path.segments() {
            self.out.extend_from_slice(&[segment.kind.number(), segment.len() as u8]);
            segment.asns().for_each(|asn| self.out.extend_from_slice(&asn.two_octets().to_be_bytes()));
        }
        let plain = |kind: SegmentKind| !kind.is_confederation();
        let lost = path
            .segments()
            .filter(|segment| plain(segment.kind))
            .any(|segment| segment.asns().any(|asn| asn.0 > u32::from(u16::MAX)));
        Ok(lost.then(|| as4::without_confederation(path)))
    }

    fn fixed<const N: usize>(&mut self, code: u8, partial: bool, value: [u8; N]) -> Result<(), EncodeError> {
        self.head(code, partial, N)?;
        self.out.extend_from_slice(&value);
        Ok(())
    }

    /// Nothing at all for an empty list: no list may be empty on the wire.
    fn list<const N: usize>(
        &mut self,
        code: u8,
        partial: bool,
        entries: impl ExactSizeIterator<Item = [u8; N]>,
    ) -> Result<(), EncodeError> {
        if entries.len() == 0 {
            return Ok(());
        }
        self.head(code, partial, entries.len() * N)?;
        entries.for_each(|entry| self.out.extend_from_slice(&entry));
        Ok(())
    }

    fn head(&mut self, code: u8, partial: bool, length: usize) -> Result<(), EncodeError> {
        // Every caller names a known type.
        let flags = attribute::flags(code).unwrap_or(UnknownAttribute::FLAGS);
        self.raw_head(code, if partial { flags | PARTIAL } else { flags }, length)
    }

    fn raw_head(&mut self, code: u8, flags: u8, length: usize) -> Result<(), EncodeError> {
        if let Ok(short) = u8::try_from(length) {
            self.out.extend_from_slice(&[flags, code, short]);
        } else if let Ok(length) = u16::try_from(length) {
            let [high, low] = length.to_be_bytes();
            self.out.extend_from_slice(&[flags | EXTENDED_LENGTH, code, high, low]);
        } else {
            return Err(EncodeError::TooLarge { what: ATTRIBUTES, length, max: self.max });
        }
        Ok(())
    }
}
