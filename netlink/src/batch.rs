//! Writing requests.

use crate::{HEADER, align, flags};

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Encoded requests, one after another. Reusable: [`Batch::clear`] keeps the memory.
///
/// Sequence numbers and the acknowledgement flag are left at zero; [`crate::Socket`] sets them.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    count: usize,
    too_long: Option<usize>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty batch with room for this many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), count: 0, too_long: None }
    }

    /// Appends one request of type `kind` (`nlmsg_type`). `NLM_F_REQUEST` is added to `flags`.
    #[inline]
    pub fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Body<'_>)) {
        let start = self.bytes.len();
        let mut header = [0; HEADER];
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | flags::REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&header);
        let mut writer = Body { bytes: &mut self.bytes, too_long: false };
        body(&mut writer);
        let mut too_long = writer.too_long;
        match u32::try_from(self.bytes.len() - start) {
            Ok(length) => self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => too_long = true,
        }
        if too_long {
            self.too_long.get_or_insert(self.count);
        }
        self.bytes.resize(align(self.bytes.len()), 0);
        self.count += 1;
    }

    /// How many messages it holds.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it holds no message.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The encoded messages, each padded to four bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Removes all messages and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
        self.too_long = None;
    }

    /// Index of the first message with an attribute that 16 bits of length cannot describe: such a
    /// batch is refused before anything is sent.
    pub fn too_long(&self) -> Option<usize> {
        self.too_long
    }
}

/// The body of one message, or of one nested attribute: fixed headers first ([`Body::raw`]), then
/// attributes.
#[derive(Debug)]
pub struct Body<'a> {
    bytes: &'a mut Vec<u8>,
    too_long: bool,
}

impl Body<'_> {
    /// Bytes as they are: the family's fixed header. Padded to four bytes.
    #[inline]
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(align(self.bytes.len()), 0);
    }

    /// One byte.
    #[inline]
    pub fn u8(&mut self, kind: u16, value: u8) {
        self.word(kind, 5, [value, 0, 0, 0]);
    }

    /// 16 bits in host order.
    #[inline]
    pub fn u16(&mut self, kind: u16, value: u16) {
        let [a, b] = value.to_ne_bytes();
        self.word(kind, 6, [a, b, 0, 0]);
    }

    /// 32 bits in host order.
    #[inline]
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.word(kind, 8, value.to_ne_bytes());
    }

    /// 64 bits in host order.
    #[inline]
    pub fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    /// 16 bits in network order.
    #[inline]
    pub fn be16(&mut self, kind: u16, value: u16) {
        let [a, b] = value.to_be_bytes();
        self.word(kind, 6, [a, b, 0, 0]);
    }

    /// 32 bits in network order.
    #[inline]
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.word(kind, 8, value.to_be_bytes());
    }

    /// Any bytes, padded to four.
    #[inline]
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = self.length(4 + value.len());
        let header = header(length, kind);
        self.bytes.reserve(align(4 + value.len()));
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(value);
        const PADDING: [u8; 3] = [0; 3];
        self.bytes.extend_from_slice(&PADDING[..align(value.len()) - value.len()]);
    }

    /// Text with a terminating NUL.
    #[inline]
    pub fn string(&mut self, kind: u16, value: &str) {
        let length = self.length(5 + value.len());
        self.bytes.extend_from_slice(&header(length, kind));
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.bytes.resize(align(self.bytes.len()), 0);
    }

    /// An attribute without payload.
    #[inline]
    pub fn flag(&mut self, kind: u16) {
        self.bytes.extend_from_slice(&header(4, kind));
    }

    /// Attributes inside an attribute, marked `NLA_F_NESTED`. At most 65,531 bytes.
    #[inline]
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Body<'_>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&header(0, kind | NESTED));
        body(self);
        let length = self.length(self.bytes.len() - start);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// How many bytes were written to the batch so far: lets a caller start a new message before a
    /// nest grows past its limit.
    pub fn written(&self) -> usize {
        self.bytes.len()
    }

    #[inline]
    fn word(&mut self, kind: u16, length: u16, value: [u8; 4]) {
        let [l0, l1, k0, k1] = header(length, kind);
        let [v0, v1, v2, v3] = value;
        self.bytes.extend_from_slice(&[l0, l1, k0, k1, v0, v1, v2, v3]);
    }

    /// The 16-bit length of an attribute, noticing when it does not fit.
    #[inline]
    fn length(&mut self, length: usize) -> u16 {
        u16::try_from(length).unwrap_or_else(|_| {
            self.too_long = true;
            u16::MAX
        })
    }
}

#[inline]
fn header(length: u16, kind: u16) -> [u8; 4] {
    let [l0, l1] = length.to_ne_bytes();
    let [k0, k1] = kind.to_ne_bytes();
    [l0, l1, k0, k1]
}
