//! Reading messages: headers, errors and the extended acknowledgement. Total on any bytes.

use crate::{DecodeError, HEADER, align, attributes, flags};

/// `NLMSG_NOOP`.
pub(crate) const NOOP: u16 = 1;
/// `NLMSG_ERROR`: an error, or with code 0 an acknowledgement.
pub(crate) const ERROR: u16 = 2;
/// `NLMSG_DONE`: end of a dump.
pub(crate) const DONE: u16 = 3;
/// `NLMSG_OVERRUN`.
pub(crate) const OVERRUN: u16 = 4;

/// `NLMSGERR_ATTR_MSG`: the kernel's text.
const EXT_TEXT: u16 = 1;
/// `NLMSGERR_ATTR_OFFS`: where in the request the offending attribute starts.
const EXT_OFFSET: u16 = 2;
/// `NLMSGERR_ATTR_MISS_TYPE`: an attribute that is missing (since 6.1).
const EXT_MISSING: u16 = 5;

/// One received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// Splits a datagram into messages. Ends after the first malformed one.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, DecodeError>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let available = rest.len();
        let Some((header, _)) = rest.split_first_chunk::<HEADER>() else {
            rest = &[];
            return Some(Err(DecodeError::Length { what: "message header", length: HEADER, available }));
        };
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length < HEADER || length > available {
            rest = &[];
            return Some(Err(DecodeError::Length { what: "message", length, available }));
        }
        let payload = &rest[HEADER..length];
        rest = rest.get(align(length)..).unwrap_or_default();
        Some(Ok(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload,
        }))
    })
}

/// Errno (positive, 0 for an acknowledgement) and text of an `NLMSG_ERROR` or `NLMSG_DONE` message.
pub(crate) fn outcome(message: &Message<'_>) -> Result<(i32, Option<String>), DecodeError> {
    let payload = message.payload;
    let Some((code, rest)) = payload.split_first_chunk::<4>() else {
        // Old kernels end a dump with an empty NLMSG_DONE.
        if message.kind == DONE {
            return Ok((0, None));
        }
        return Err(DecodeError::Length { what: "error message", length: 4, available: payload.len() });
    };
    let errno = i32::from_ne_bytes(*code).saturating_neg();
    if message.flags & flags::ACK_TLVS == 0 || errno == 0 {
        return Ok((errno, None));
    }
    let skipped = match (message.kind, rest.first_chunk::<4>()) {
        (DONE, _) => 0,
        (_, Some(length)) if message.flags & flags::CAPPED == 0 => {
            align(usize::try_from(u32::from_ne_bytes(*length)).unwrap_or(usize::MAX))
        }
        _ => HEADER,
    };
    Ok((errno, extended(rest.get(skipped..).unwrap_or_default())))
}

/// The extended acknowledgement as one line. What cannot be read is left out: the errno stands.
fn extended(payload: &[u8]) -> Option<String> {
    let (mut text, mut detail) = (None, None);
    for attribute in attributes(payload).map_while(Result::ok) {
        match attribute.kind {
            EXT_TEXT => text = attribute.string().ok().filter(|text| !text.is_empty()),
            EXT_OFFSET => detail = attribute.u32().ok().map(|at| format!("attribute at byte {at}")),
            EXT_MISSING => detail = attribute.u32().ok().map(|kind| format!("attribute {kind} is missing")),
            _ => {}
        }
    }
    match (text, detail) {
        (Some(text), Some(detail)) => Some(format!("{text} ({detail})")),
        (Some(text), None) => Some(text.to_owned()),
        (None, detail) => detail,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Batch;

    /// An `NLMSG_ERROR` for a request, with the extended acknowledgement the kernel would add.
    fn refusal(errno: i32, capped: bool, extended: &[(u16, &[u8])]) -> Vec<u8> {
        let mut request = Batch::new();
        request.message(0x20, 0, |body| body.u32(1, 1));
        let mut reply = Batch::new();
        let flags = flags::ACK_TLVS | if capped { flags::CAPPED } else { 0 };
        reply.message(ERROR, flags, |body| {
            body.raw(&(-errno).to_ne_bytes());
            body.raw(if capped { &request.bytes()[..HEADER] } else { request.bytes() });
            extended.iter().for_each(|(kind, value)| body.bytes(*kind, value));
        });
        reply.bytes().to_vec()
    }

    fn read(datagram: &[u8]) -> (i32, Option<String>) {
        let message = messages(datagram).next().unwrap().unwrap();
        outcome(&message).unwrap()
    }

    #[test]
    fn the_text_is_found_behind_whole_and_capped_requests() {
        for capped in [false, true] {
            let text = |extended: &[(u16, &[u8])]| read(&refusal(22, capped, extended));
            assert_eq!(text(&[]), (22, None));
            assert_eq!(text(&[(EXT_TEXT, b"no\0")]), (22, Some("no".to_owned())));
            let at = 20u32.to_ne_bytes();
            let both = text(&[(EXT_TEXT, b"no\0"), (EXT_OFFSET, &at)]);
            assert_eq!(both, (22, Some("no (attribute at byte 20)".to_owned())));
            assert_eq!(text(&[(EXT_MISSING, &at)]), (22, Some("attribute 20 is missing".to_owned())));
        }
    }

    #[test]
    fn the_end_of_a_dump_may_carry_an_error() {
        let mut reply = Batch::new();
        reply.message(DONE, flags::ACK_TLVS, |body| {
            body.raw(&(-16i32).to_ne_bytes());
            body.string(EXT_TEXT, "busy");
        });
        assert_eq!(read(reply.bytes()), (16, Some("busy".to_owned())));
        reply.clear();
        reply.message(DONE, 0, |_| {});
        assert_eq!(read(reply.bytes()), (0, None));
    }

    proptest! {
        #[test]
        fn any_datagram_is_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for message in messages(&bytes).map_while(Result::ok) {
                let _ = outcome(&message);
            }
        }

        #[test]
        fn any_damaged_refusal_is_read(
            at: prop::sample::Index,
            byte: u8,
            end: prop::sample::Index,
            capped: bool,
        ) {
            let mut bytes = refusal(2, capped, &[(EXT_TEXT, b"text\0"), (EXT_OFFSET, &[1, 0, 0, 0])]);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(end.index(bytes.len() + 1));
            for message in messages(&bytes).map_while(Result::ok) {
                let _ = outcome(&message);
            }
        }
    }
}
