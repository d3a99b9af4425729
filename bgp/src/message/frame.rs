//! Where one message ends and the next begins (RFC 4271 section 4.1).

use super::{Codec, HeaderError, MESSAGE_MAX, NotificationError, SessionReset};

/// Length of the header, and of the shortest message, in octets.
pub(super) const HEADER: usize = 19;

pub(super) const OPEN: u8 = 1;
pub(super) const UPDATE: u8 = 2;
pub(super) const NOTIFICATION: u8 = 3;
pub(super) const KEEPALIVE: u8 = 4;
pub(super) const ROUTE_REFRESH: u8 = 5;

/// Length of the message that begins here, as soon as its header is there. What cannot become a message
/// is refused at the header, before its body is waited for.
///
/// # Errors
///
/// A header that RFC 4271 section 6.1 refuses: the session must end.
pub fn frame_length(bytes: &[u8], codec: &Codec) -> Result<Option<usize>, SessionReset> {
    let Some((header, _)) = bytes.split_first_chunk::<HEADER>() else {
        // A marker that is wrong already will not become right.
        return if bytes.iter().take(16).all(|octet| *octet == 0xff) { Ok(None) } else { Err(no_marker()) };
    };
    let [marker @ .., high, low, kind] = header;
    if marker != &[0xff; 16] {
        return Err(no_marker());
    }
    let length = u16::from_be_bytes([*high, *low]);
    let (least, most) = match *kind {
        OPEN => (29, MESSAGE_MAX),
        UPDATE => (23, codec.receive_max),
        NOTIFICATION => (21, codec.receive_max),
        KEEPALIVE => (19, 19),
        // RFC 7313 section 5 has an error of its own for these once it is agreed.
        ROUTE_REFRESH if codec.enhanced_refresh => (19, codec.receive_max),
        ROUTE_REFRESH => (23, 23),
        kind => {
            let reason = format!("message type {kind} is unknown");
            return Err(SessionReset::new(NotificationError::Header(HeaderError::BadType), [kind], reason));
        }
    };
    if !(least..=most).contains(&length) {
        let reason = format!("a message of type {kind} cannot have {length} octets");
        let error = NotificationError::Header(HeaderError::BadLength);
        return Err(SessionReset::new(error, length.to_be_bytes(), reason));
    }
    Ok(Some(usize::from(length)))
}

fn no_marker() -> SessionReset {
    let error = NotificationError::Header(HeaderError::NotSynchronized);
    SessionReset::new(error, [], "the marker of a message is not all ones")
}

/// Gathers octets of a stream and hands out whole messages. Holds at most one message and what came with
/// it; grows only where messages or reads are large.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl FrameReader {
    /// First size of the buffer, in octets.
    const LEAST: usize = 4096;
    /// Largest size of the buffer, in octets: room for the longest message.
    const MOST: usize = 65536;

    /// An empty reader; it allocates on the first use.
    pub const fn new() -> Self {
        Self { buffer: Vec::new(), start: 0, end: 0 }
    }

    /// Where to put what comes next; never empty after [`FrameReader::next_frame`] returned none. Tell
    /// [`FrameReader::filled`] how much it was.
    pub fn space(&mut self) -> &mut [u8] {
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            // The last read took all there was: more is waiting, so fewer and larger reads are better.
            let size = (self.buffer.len() * 2).clamp(Self::LEAST, Self::MOST);
            self.buffer.resize(size, 0);
        }
        &mut self.buffer[self.end..]
    }

    /// So many octets were put at the beginning of [`FrameReader::space`]; more than it had are taken as
    /// all.
    pub fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.buffer.len());
    }

    /// The next whole message with its header, if it is there; for [`super::Message::decode`].
    ///
    /// # Errors
    ///
    /// As [`frame_length`]. The reader is of no more use then.
    pub fn next_frame(&mut self, codec: &Codec) -> Result<Option<&[u8]>, SessionReset> {
        let pending = &self.buffer[self.start..self.end];
        match frame_length(pending, codec)? {
            Some(length) if length <= pending.len() => {
                let begin = self.start;
                self.start += length;
                Ok(Some(&self.buffer[begin..begin + length]))
            }
            _ => {
                if self.start == self.end {
                    (self.start, self.end) = (0, 0);
                }
                Ok(None)
            }
        }
    }

    /// Octets that wait for the rest of their message.
    pub const fn pending(&self) -> usize {
        self.end - self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEPALIVE_BYTES: [u8; 19] = {
        let mut bytes = [0xff; 19];
        (bytes[16], bytes[17], bytes[18]) = (0, 19, 4);
        bytes
    };

    fn header(length: u16, kind: u8) -> Vec<u8> {
        let mut bytes = vec![0xff; 16];
        bytes.extend(length.to_be_bytes());
        bytes.push(kind);
        bytes
    }

    #[test]
    fn lengths_are_checked_at_the_header() {
        let plain = Codec::initial();
        let extended = Codec { receive_max: 65535, enhanced_refresh: true, ..Codec::initial() };
        for (kind, length, codec, fine) in [
            (OPEN, 29, &plain, true),
            (OPEN, 28, &plain, false),
            (OPEN, 4096, &extended, true),
            (OPEN, 4097, &extended, false),
            (UPDATE, 22, &plain, false),
            (UPDATE, 23, &plain, true),
            (UPDATE, 4096, &plain, true),
            (UPDATE, 4097, &plain, false),
            (UPDATE, 65535, &extended, true),
            (NOTIFICATION, 20, &plain, false),
            (NOTIFICATION, 21, &plain, true),
            (KEEPALIVE, 19, &plain, true),
            (KEEPALIVE, 20, &plain, false),
            (ROUTE_REFRESH, 23, &plain, true),
            (ROUTE_REFRESH, 24, &plain, false),
            (ROUTE_REFRESH, 24, &extended, true),
            (UPDATE, 18, &plain, false),
            (UPDATE, 0, &plain, false),
        ] {
            let result = frame_length(&header(length, kind), codec);
            match fine {
                true => assert_eq!(result, Ok(Some(usize::from(length))), "type {kind} length {length}"),
                false => {
                    let notification = result.unwrap_err().notification;
                    assert_eq!(notification.error, NotificationError::Header(HeaderError::BadLength));
                    assert_eq!(notification.data, length.to_be_bytes());
                }
            }
        }
        let unknown = frame_length(&header(19, 6), &plain).unwrap_err().notification;
        assert_eq!((unknown.error.numbers(), unknown.data), ((1, 3), vec![6]));
    }

    #[test]
    fn a_wrong_marker_is_seen_at_once() {
        let codec = Codec::initial();
        assert_eq!(frame_length(&[], &codec), Ok(None));
        assert_eq!(frame_length(&[0xff; 18], &codec), Ok(None));
        for bytes in
            [&b"GET"[..], &[0xff, 0xff, 0], &[0xff; 15].iter().chain(&[0; 4]).copied().collect::<Vec<_>>()]
        {
            assert_eq!(frame_length(bytes, &codec).unwrap_err().notification.error.numbers(), (1, 1));
        }
    }

    #[test]
    fn messages_come_out_however_the_stream_is_cut() {
        let codec = Codec { receive_max: 65535, ..Codec::initial() };
        let mut long = header(65535, UPDATE);
        long.resize(65535, 7);
        let frames = [&KEEPALIVE_BYTES[..], &long, &KEEPALIVE_BYTES, &long, &KEEPALIVE_BYTES];
        let stream = frames.concat();
        for step in [1, 7, 4096, 65536, 1 << 20] {
            let (mut reader, mut rest, mut seen) = (FrameReader::new(), &stream[..], 0);
            while !rest.is_empty() {
                let space = reader.space();
                let count = step.min(space.len()).min(rest.len());
                assert!(count > 0);
                space[..count].copy_from_slice(&rest[..count]);
                reader.filled(count);
                rest = &rest[count..];
                while let Some(frame) = reader.next_frame(&codec).unwrap() {
                    assert_eq!(frame, frames[seen]);
                    seen += 1;
                }
            }
            assert_eq!((seen, reader.pending()), (frames.len(), 0), "in steps of {step}");
            assert!(reader.buffer.len() <= 65536);
        }
    }
}
