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
