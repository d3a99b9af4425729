//! Reading attributes (`struct nlattr`): total on any bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::align;

/// `NLA_F_NESTED | NLA_F_NET_BYTEORDER`, the bits of `nla_type` that are not the type.
const FLAG_BITS: u16 = 0xc000;

/// An answer that does not have the shape the protocol promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A header announces more bytes than there are, or fewer than its own size.
    #[error("{what} of {length} bytes announced where {available} are left")]
    Length {
        /// What was being read: "message", "attribute", ...
        what: &'static str,
        /// The announced length in bytes.
        length: usize,
        /// The bytes there are.
        available: usize,
    },
    /// An attribute has another size than its type demands.
    #[error("attribute {kind} has {actual} bytes instead of {expected}")]
    Size {
        /// Attribute type.
        kind: u16,
        /// Bytes demanded.
        expected: usize,
        /// Bytes found.
        actual: usize,
    },
    /// A text attribute is not UTF-8.
    #[error("attribute {kind} is not valid text")]
    Text {
        /// Attribute type.
        kind: u16,
    },
    /// A required attribute is missing.
    #[error("{what} is missing")]
    Missing {
        /// The attribute's name in the kernel header.
        what: &'static str,
    },
    /// A value that the protocol does not define.
    #[error("{what} has the undefined value {value}")]
    Value {
        /// The attribute's or field's name in the kernel header.
        what: &'static str,
        /// The value found.
        value: u64,
    },
}

/// One attribute: its type without the flag bits, and its payload without padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// `nla_type` with `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER` masked off.
    pub kind: u16,
    /// The bytes after the attribute header.
    pub payload: &'a [u8],
}

impl<'a> Attribute<'a> {
    fn array<const N: usize>(&self) -> Result<[u8; N], DecodeError> {
        self.payload.try_into().map_err(|_| DecodeError::Size {
            kind: self.kind,
            expected: N,
            actual: self.payload.len(),
        })
    }

    /// The payload as one byte.
    pub fn u8(&self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_ne_bytes)
    }

    /// The payload as 16 bits in host order.
    pub fn u16(&self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_ne_bytes)
    }

    /// The payload as 32 bits in host order.
    pub fn u32(&self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_ne_bytes)
    }

    /// The payload as 64 bits in host order.
    pub fn u64(&self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_ne_bytes)
    }

    /// The payload as 32 signed bits in host order.
    pub fn i32(&self) -> Result<i32, DecodeError> {
        self.array().map(i32::from_ne_bytes)
    }

    /// The payload as 16 bits in network order.
    pub fn be16(&self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    /// The payload as 32 bits in network order.
    pub fn be32(&self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    /// The payload as 64 bits in network order.
    pub fn be64(&self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// The payload as an address: 4 bytes are IPv4, 16 are IPv6.
    pub fn address(&self) -> Result<IpAddr, DecodeError> {
        if self.payload.len() == 4 {
            return self.array::<4>().map(|octets| Ipv4Addr::from(octets).into());
        }
        self.array::<16>().map(|octets| Ipv6Addr::from(octets).into())
    }

    /// The payload as text, up to its first NUL.
    pub fn string(&self) -> Result<&'a str, DecodeError> {
        let end = self.payload.iter().position(|&byte| byte == 0).unwrap_or(self.payload.len());
        std::str::from_utf8(&self.payload[..end]).map_err(|_| DecodeError::Text { kind: self.kind })
    }

    /// The attributes nested in the payload.
    pub fn nested(&self) -> Attributes<'a> {
        attributes(self.payload)
    }
}

/// The attributes of a payload, in order. Ends after the first malformed one.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

/// Iterates over the attributes of a payload (what follows the family's fixed header).
pub fn attributes(payload: &[u8]) -> Attributes<'_> {
    Attributes { rest: payload }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<Attribute<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let available = self.rest.len();
        let [l0, l1, k0, k1, ..] = *self.rest else {
            self.rest = &[];
            return Some(Err(DecodeError::Length { what: "attribute header", length: 4, available }));
        };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        if length < 4 || length > available {
            self.rest = &[];
            return Some(Err(DecodeError::Length { what: "attribute", length, available }));
        }
        let payload = &self.rest[4..length];
        // The kernel leaves the padding of the very last attribute out now and then.
        self.rest = self.rest.get(align(length)..).unwrap_or_default();
        Some(Ok(Attribute { kind: u16::from_ne_bytes([k0, k1]) & !FLAG_BITS, payload }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Batch, HEADER};

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut covered = 0;
            for attribute in attributes(&bytes) {
                let Ok(attribute) = attribute else { break };
                covered += 4 + attribute.payload.len();
                let _ = (attribute.u8(), attribute.u16(), attribute.u32(), attribute.u64(), attribute.i32());
                let _ = (attribute.be16(), attribute.be32(), attribute.be64());
                let _ = (attribute.address(), attribute.string(), attribute.nested().count());
            }
            prop_assert!(covered <= bytes.len());
        }

        #[test]
        fn what_is_written_is_read(values in prop::collection::vec((0..0x4000u16, prop::collection::vec(any::<u8>(), 0..40)), 0..8)) {
            let mut batch = Batch::new();
            batch.message(1, 0, |body| {
                body.nest(7, |body| values.iter().for_each(|(kind, value)| body.bytes(*kind, value)));
            });
            prop_assert_eq!(batch.bytes().len() % 4, 0);
            let outer: Vec<_> = attributes(&batch.bytes()[HEADER..]).collect::<Result<_, _>>().unwrap();
            prop_assert_eq!(outer.len(), 1);
            prop_assert_eq!(outer[0].kind, 7);
            let inner: Vec<_> = outer[0]
                .nested()
                .map(|attribute| attribute.map(|attribute| (attribute.kind, attribute.payload.to_vec())))
                .collect::<Result<_, _>>()
                .unwrap();
            prop_assert_eq!(inner, values);
        }

        #[test]
        fn numbers_and_text_come_back(a: u8, b: u16, c: u32, d: u64, text in "[^\0]{0,20}") {
            let mut batch = Batch::new();
            batch.message(1, 0, |body| {
                body.u8(1, a);
                body.u16(2, b);
                body.u32(3, c);
                body.u64(4, d);
                body.be16(5, b);
                body.be32(6, c);
                body.string(7, &text);
                body.flag(8);
            });
            let all: Vec<_> = attributes(&batch.bytes()[HEADER..]).collect::<Result<_, _>>().unwrap();
            prop_assert_eq!((all[0].u8(), all[1].u16(), all[2].u32(), all[3].u64()), (Ok(a), Ok(b), Ok(c), Ok(d)));
            prop_assert_eq!((all[4].be16(), all[5].be32(), all[6].string()), (Ok(b), Ok(c), Ok(text.as_str())));
            prop_assert_eq!(all[7].payload, &[] as &[u8]);
            prop_assert!(all[0].u32().is_err());
        }
    }
}
