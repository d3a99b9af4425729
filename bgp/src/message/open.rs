//! OPEN (RFC 4271 section 4.2).

use std::borrow::Cow;

use super::{Asn, Capability, EncodeError, NotificationError, OpenError, RouterId, SessionReset, capability};

/// The first message of a session. The four-octet AS capability is not in the list: it is written from
/// `asn` and read back into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// The sender's AS: from its four-octet AS capability, else from the two-octet field.
    pub asn: Asn,
    /// Whether the sender announced four-octet AS numbers (RFC 6793).
    pub four_octet_as: bool,
    /// Seconds; 0 means no keepalives, 1 and 2 are refused on decode.
    pub hold_time: u16,
    /// Never zero on decode.
    pub router_id: RouterId,
    /// In the order sent, of all optional parameters. A capability may come several times.
    pub capabilities: Vec<Capability>,
}

const VERSION: u8 = 4;
/// Parameter type of capabilities (RFC 5492 section 4).
const CAPABILITIES: u8 = 2;
/// Parameter type that says that lengths have two octets (RFC 9072 section 2).
const EXTENDED: u8 = 255;

/// Why optional parameters cannot be taken.
enum Refusal {
    Malformed(&'static str),
    Unsupported(u8),
}

impl Open {
    /// Reads the body of an OPEN.
    pub(super) fn decode(body: &[u8]) -> Result<Self, SessionReset> {
        let refuse = |error, data: &[u8], reason: Cow<'static, str>| {
            Err(SessionReset::new(NotificationError::Open(error), data, reason))
        };
        let Some((&[version, a, b, c, d, e, f, g, h, length], parameters)) = body.split_first_chunk::<10>()
        else {
            return refuse(OpenError::Unspecific, &[], "the OPEN is too short".into());
        };
        if version != VERSION {
            let reason = format!("BGP version {version} is not supported");
            return refuse(OpenError::UnsupportedVersion, &[0, VERSION], reason.into());
        }
        let mut open = Self {
            asn: Asn(u16::from_be_bytes([a, b]).into()),
            four_octet_as: false,
            hold_time: u16::from_be_bytes([c, d]),
            router_id: RouterId::from(u32::from_be_bytes([e, f, g, h])),
            capabilities: Vec::new(),
        };
        match open.read_parameters(length, parameters) {
            Ok(()) => {}
            Err(Refusal::Malformed(reason)) => return refuse(OpenError::Unspecific, &[], reason.into()),
            Err(Refusal::Unsupported(kind)) => {
                let reason = format!("optional parameter {kind} is not supported");
                return refuse(OpenError::UnsupportedParameter, &[], reason.into());
            }
        }
        if open.asn == Asn(0) || open.asn == Asn::TRANS {
            // RFC 7607 section 2; AS_TRANS names nobody (RFC 6793 section 9).
            let reason = format!("no speaker can be of AS {}", open.asn);
            return refuse(OpenError::BadPeerAs, &[], reason.into());
        }
        if u32::from(open.router_id) == 0 {
            return refuse(OpenError::BadIdentifier, &[], "the BGP identifier is zero".into());
        }
        if matches!(open.hold_time, 1 | 2) {
            let reason = format!("a hold time of {} s is too short", open.hold_time);
            return refuse(OpenError::UnacceptableHoldTime, &[], reason.into());
        }
        Ok(open)
    }

    fn read_parameters(&mut self, length: u8, bytes: &[u8]) -> Result<(), Refusal> {
        const CUT: Refusal =
            Refusal::Malformed("the optional parameters of the OPEN do not fill their length");
        let (wide, length, mut rest) = match bytes {
            [EXTENDED, high, low, rest @ ..] if length != 0 => {
                (true, usize::from(u16::from_be_bytes([*high, *low])), rest)
            }
            _ => (false, usize::from(length), bytes),
        };
        if rest.len() != length {
            return Err(CUT);
        }
        while !rest.is_empty() {
            let (kind, length, after) = match rest {
                [kind, high, low, after @ ..] if wide => {
                    (*kind, usize::from(u16::from_be_bytes([*high, *low])), after)
                }
                [kind, length, after @ ..] if !wide => (*kind, usize::from(*length), after),
                _ => return Err(CUT),
            };
            let (value, after) = after.split_at_checked(length).ok_or(CUT)?;
            rest = after;
            if kind != CAPABILITIES {
                return Err(Refusal::Unsupported(kind));
            }
            self.read_capabilities(value)?;
        }
        Ok(())
    }

    fn read_capabilities(&mut self, mut bytes: &[u8]) -> Result<(), Refusal> {
        const CUT: Refusal = Refusal::Malformed("the capabilities of the OPEN do not fill their length");
        const BAD: Refusal = Refusal::Malformed("a capability of the OPEN has a length that it cannot have");
        while let [code, length, rest @ ..] = bytes {
            let (value, rest) = rest.split_at_checked(usize::from(*length)).ok_or(CUT)?;
            bytes = rest;
            if *code == capability::FOUR_OCTET_AS {
                let asn = Asn(u32::from_be_bytes(value.try_into().map_err(|_| BAD)?));
                // The first counts, should there be several.
                if !self.four_octet_as {
                    (self.asn, self.four_octet_as) = (asn, true);
                }
            } else {
                self.capabilities.push(Capability::decode(*code, value).ok_or(BAD)?);
            }
        }
        if bytes.is_empty() { Ok(()) } else { Err(CUT) }
    }

    /// Appends the body of an OPEN. All capabilities go into one parameter; the form of RFC 9072 is used
    /// only if they need it.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.push(VERSION);
        out.extend(self.asn.two_octets().to_be_bytes());
        out.extend(self.hold_time.to_be_bytes());
        out.extend(self.router_id.0.octets());
        let mut capabilities = Vec::with_capacity(64);
        for capability in &self.capabilities {
            capability.encode(&mut capabilities)?;
        }
        if self.four_octet_as {
            capabilities.extend([capability::FOUR_OCTET_AS, 4]);
            capabilities.extend(self.asn.0.to_be_bytes());
        }
        match capabilities.len() {
            0 => out.push(0),
            length @ 1..=253 => out.extend([length as u8 + 2, CAPABILITIES, length as u8]),
            length => {
                // Longer than a message can be is refused by the caller; the cast does not matter then.
                out.extend([EXTENDED, EXTENDED]);
                out.extend((length as u16).wrapping_add(3).to_be_bytes());
                out.push(CAPABILITIES);
                out.extend((length as u16).to_be_bytes());
            }
        }
        out.append(&mut capabilities);
        Ok(())
    }
}
