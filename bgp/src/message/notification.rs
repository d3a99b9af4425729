//! NOTIFICATION (RFC 4271 section 4.5): why a session ends.

use std::fmt;

/// Ends a session. Displayed for people, with the text of a shutdown where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// What went wrong.
    pub error: NotificationError,
    /// What helps to find out why; depends on the error.
    pub data: Vec<u8>,
}

/// Error code with its subcode (IANA "BGP Error Codes").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotificationError {
    /// 1: the header of a message.
    Header(HeaderError),
    /// 2: the OPEN.
    Open(OpenError),
    /// 3: an UPDATE.
    Update(UpdateError),
    /// 4: nothing was heard for the hold time.
    HoldTimerExpired,
    /// 5: a message that the state does not allow.
    Fsm(FsmError),
    /// 6: the session ends although all is well.
    Cease(Cease),
    /// 7: a ROUTE-REFRESH (RFC 7313).
    RouteRefresh(RefreshError),
    /// 8: the peer took nothing for the send hold time (RFC 9687).
    SendHoldTimerExpired,
    /// Any other code, or a subcode where the code has none.
    Other {
        /// Error code.
        code: u8,
        /// Error subcode.
        subcode: u8,
    },
}

/// Makes an enum of subcodes that keeps unknown numbers.
macro_rules! subcodes {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// A number not in this list: make it with `from_number`.
            Other(u8),
        }

        impl $name {
            /// The subcode with this number.
            pub const fn from_number(number: u8) -> Self {
                match number {
                    $($number => Self::$variant,)*
                    number => Self::Other(number),
                }
            }

            /// The subcode's number.
            pub const fn number(self) -> u8 {
                match self {
                    $(Self::$variant => $number,)*
                    Self::Other(number) => number,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$variant => f.write_str($text),)*
                    Self::Other(number) => write!(f, "subcode {number}"),
                }
            }
        }
    };
}

subcodes! {
    /// Errors of a message header (RFC 4271 section 6.1).
    HeaderError {
        /// 0.
        Unspecific = 0 "unspecific",
        /// 1: the marker is not all ones.
        NotSynchronized = 1 "connection not synchronized",
        /// 2: too short or too long; data is the length field.
        BadLength = 2 "bad message length",
        /// 3: data is the type field.
        BadType = 3 "bad message type",
    }
}

subcodes! {
    /// Errors of an OPEN (RFC 4271 section 6.2).
    OpenError {
        /// 0: also for malformed optional parameters.
        Unspecific = 0 "unspecific",
        /// 1: data is the highest version supported, in two octets.
        UnsupportedVersion = 1 "unsupported version number",
        /// 2.
        BadPeerAs = 2 "bad peer AS",
        /// 3: zero, or the peer's own (RFC 6286).
        BadIdentifier = 3 "bad BGP identifier",
        /// 4.
        UnsupportedParameter = 4 "unsupported optional parameter",
        /// 6: one or two seconds.
        UnacceptableHoldTime = 6 "unacceptable hold time",
        /// 7: data is the capabilities that are missed (RFC 5492).
        UnsupportedCapability = 7 "unsupported capability",
        /// 11: roles do not fit (RFC 9234).
        RoleMismatch = 11 "role mismatch",
    }
}

subcodes! {
    /// Errors of an UPDATE that end the session (RFC 4271 section 6.3, few left by RFC 7606).
    UpdateError {
        /// 0.
        Unspecific = 0 "unspecific",
        /// 1.
        MalformedAttributeList = 1 "malformed attribute list",
        /// 2: data is the attribute.
        UnrecognizedWellKnown = 2 "unrecognized well-known attribute",
        /// 3: data is the attribute's type.
        MissingWellKnown = 3 "missing well-known attribute",
        /// 4: data is the attribute.
        AttributeFlags = 4 "attribute flags error",
        /// 5: data is the attribute.
        AttributeLength = 5 "attribute length error",
        /// 6: data is the attribute.
        InvalidOrigin = 6 "invalid ORIGIN",
        /// 8: data is the attribute.
        InvalidNextHop = 8 "invalid NEXT_HOP",
        /// 9: data is the attribute.
        OptionalAttribute = 9 "optional attribute error",
        /// 10.
        InvalidNetwork = 10 "invalid network field",
        /// 11.
        MalformedAsPath = 11 "malformed AS_PATH",
    }
}

subcodes! {
    /// In which state the message was not expected (RFC 6608).
    FsmError {
        /// 0.
        Unspecified = 0 "unspecified state",
        /// 1.
        OpenSent = 1 "in state OpenSent",
        /// 2.
        OpenConfirm = 2 "in state OpenConfirm",
        /// 3.
        Established = 3 "in state Established",
    }
}

subcodes! {
    /// Why a session ends although all is well (RFC 4486).
    Cease {
        /// 0.
        Unspecific = 0 "unspecific",
        /// 1: data may be the family and the limit.
        MaximumPrefixes = 1 "maximum number of prefixes reached",
        /// 2: data may be a text (RFC 9003).
        AdministrativeShutdown = 2 "administrative shutdown",
        /// 3.
        PeerDeconfigured = 3 "peer de-configured",
        /// 4: data may be a text (RFC 9003).
        AdministrativeReset = 4 "administrative reset",
        /// 5.
        ConnectionRejected = 5 "connection rejected",
        /// 6.
        ConfigurationChange = 6 "other configuration change",
        /// 7.
        Collision = 7 "connection collision resolution",
        /// 8.
        OutOfResources = 8 "out of resources",
        /// 9: data is the NOTIFICATION that it hardens (RFC 8538).
        HardReset = 9 "hard reset",
        /// 10 (RFC 9384).
        BfdDown = 10 "BFD down",
    }
}

subcodes! {
    /// Errors of a ROUTE-REFRESH (RFC 7313 section 5).
    RefreshError {
        /// 0: reserved.
        Reserved = 0 "reserved",
        /// 1: data is the message.
        InvalidLength = 1 "invalid message length",
    }
}

impl NotificationError {
    /// The error with these numbers.
    pub const fn from_numbers(code: u8, subcode: u8) -> Self {
        match (code, subcode) {
            (1, _) => Self::Header(HeaderError::from_number(subcode)),
            (2, _) => Self::Open(OpenError::from_number(subcode)),
            (3, _) => Self::Update(UpdateError::from_number(subcode)),
            (4, 0) => Self::HoldTimerExpired,
            (5, _) => Self::Fsm(FsmError::from_number(subcode)),
            (6, _) => Self::Cease(Cease::from_number(subcode)),
            (7, _) => Self::RouteRefresh(RefreshError::from_number(subcode)),
            (8, 0) => Self::SendHoldTimerExpired,
            (code, subcode) => Self::Other { code, subcode },
        }
    }

    /// Error code and subcode.
    pub const fn numbers(self) -> (u8, u8) {
        match self {
            Self::Header(subcode) => (1, subcode.number()),
            Self::Open(subcode) => (2, subcode.number()),
            Self::Update(subcode) => (3, subcode.number()),
            Self::HoldTimerExpired => (4, 0),
            Self::Fsm(subcode) => (5, subcode.number()),
            Self::Cease(subcode) => (6, subcode.number()),
            Self::RouteRefresh(subcode) => (7, subcode.number()),
            Self::SendHoldTimerExpired => (8, 0),
            Self::Other { code, subcode } => (code, subcode),
        }
    }
}

impl fmt::Display for NotificationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(subcode) => write!(f, "message header error: {subcode}"),
            Self::Open(subcode) => write!(f, "OPEN error: {subcode}"),
            Self::Update(subcode) => write!(f, "UPDATE error: {subcode}"),
            Self::HoldTimerExpired => f.write_str("hold timer expired"),
            Self::Fsm(subcode) => write!(f, "state machine error: unexpected message {subcode}"),
            Self::Cease(subcode) => write!(f, "cease: {subcode}"),
            Self::RouteRefresh(subcode) => write!(f, "ROUTE-REFRESH error: {subcode}"),
            Self::SendHoldTimerExpired => f.write_str("send hold timer expired"),
            Self::Other { code, subcode } => write!(f, "error code {code} subcode {subcode}"),
        }?;
        let (code, subcode) = self.numbers();
        write!(f, " ({code}/{subcode})")
    }
}

impl Notification {
    /// Longest text of a shutdown, in octets of UTF-8 (RFC 9003 section 2).
    pub const SHUTDOWN_TEXT_MAX: usize = 255;

    /// An error without data.
    pub const fn new(error: NotificationError) -> Self {
        Self { error, data: Vec::new() }
    }

    /// An error with data.
    pub fn with_data(error: NotificationError, data: impl Into<Vec<u8>>) -> Self {
        Self { error, data: data.into() }
    }

    /// A cease without data.
    pub const fn cease(subcode: Cease) -> Self {
        Self::new(NotificationError::Cease(subcode))
    }

    /// An administrative shutdown with a text for the peer's operator, cut at 255 octets (RFC 9003).
    pub fn shutdown(text: &str) -> Self {
        Self::with_text(Cease::AdministrativeShutdown, text)
    }

    /// An administrative reset with a text for the peer's operator, cut at 255 octets (RFC 9003).
    pub fn reset(text: &str) -> Self {
        Self::with_text(Cease::AdministrativeReset, text)
    }

    fn with_text(subcode: Cease, text: &str) -> Self {
        let mut end = text.len().min(Self::SHUTDOWN_TEXT_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let cut = &text[..end];
        let mut data = Vec::with_capacity(1 + cut.len());
        data.push(cut.len() as u8);
        data.extend(cut.as_bytes());
        Self::with_data(NotificationError::Cease(subcode), data)
    }

    /// The same reason as a hard reset: the peer is not to keep routes by graceful restart (RFC 8538
    /// section 3.1). A hard reset is left as it is.
    #[must_use]
    pub fn hard(&self) -> Self {
        if self.is_hard_reset() {
            return self.clone();
        }
        let (code, subcode) = self.error.numbers();
        let mut data = vec![code, subcode];
        data.extend(&self.data);
        Self::with_data(NotificationError::Cease(Cease::HardReset), data)
    }

    /// Whether this is a hard reset.
    pub fn is_hard_reset(&self) -> bool {
        self.error == NotificationError::Cease(Cease::HardReset)
    }

    /// The NOTIFICATION inside of a hard reset. Not followed further: hard resets do not nest.
    pub fn inner(&self) -> Option<Self> {
        match self.data[..] {
            [code, subcode, ref data @ ..] if self.is_hard_reset() => {
                Some(Self::with_data(NotificationError::from_numbers(code, subcode), data))
            }
            _ => None,
        }
    }

    /// The text of an administrative shutdown or reset, also inside of a hard reset. Control characters
    /// and broken UTF-8 are replaced, so that it is safe in a log; a wrong length is taken as the
    /// sender's mistake and all that is there is read.
    pub fn shutdown_text(&self) -> Option<String> {
        let data = match self.error {
            NotificationError::Cease(Cease::AdministrativeShutdown | Cease::AdministrativeReset) => {
                &self.data[..]
            }
            NotificationError::Cease(Cease::HardReset) => match self.data[..] {
                [6, 2 | 4, ref data @ ..] => data,
                _ => return None,
            },
            _ => return None,
        };
        let (&length, text) = data.split_first()?;
        let text = text.get(..usize::from(length)).unwrap_or(text);
        let text = String::from_utf8_lossy(text);
        let clean: String =
            text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
        Some(clean).filter(|text| !text.is_empty())
    }
}

impl fmt::Display for Notification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)?;
        if let Some(inner) = self.inner() {
            write!(f, ": {}", inner.error)?;
        }
        match self.shutdown_text() {
            Some(text) => write!(f, ": {text:?}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives() {
        for code in 0..=255 {
            for subcode in 0..=255 {
                assert_eq!(NotificationError::from_numbers(code, subcode).numbers(), (code, subcode));
            }
        }
    }

    #[test]
    fn shutdown_texts_are_cut_and_cleaned() {
        let drained = Notification::shutdown("drain node-7");
        assert_eq!(drained.data, b"\x0cdrain node-7");
        assert_eq!(drained.to_string(), "cease: administrative shutdown (6/2): \"drain node-7\"");
        assert_eq!(
            drained.hard().to_string(),
            "cease: hard reset (6/9): cease: administrative shutdown (6/2): \"drain node-7\""
        );
        assert_eq!(drained.hard().inner(), Some(drained.clone()));
        assert_eq!(drained.hard().hard(), drained.hard());

        let long = Notification::reset(&"ü".repeat(200));
        assert_eq!(long.data.len(), 255);
        assert_eq!(long.shutdown_text().unwrap().chars().count(), 127);

        let nasty =
            Notification::with_data(NotificationError::from_numbers(6, 2), b"\x09\x1b[2J\xff\nok".to_vec());
        assert_eq!(nasty.shutdown_text().unwrap(), "\u{fffd}[2J\u{fffd}\u{fffd}ok");
        assert_eq!(Notification::shutdown("").shutdown_text(), None);
        assert_eq!(Notification::cease(Cease::Collision).shutdown_text(), None);
        assert_eq!(Notification::cease(Cease::HardReset).inner(), None);
    }

    #[test]
    fn errors_are_named() {
        for (numbers, text) in [
            ((2, 6), "OPEN error: unacceptable hold time (2/6)"),
            ((5, 2), "state machine error: unexpected message in state OpenConfirm (5/2)"),
            ((6, 10), "cease: BFD down (6/10)"),
            ((2, 5), "OPEN error: subcode 5 (2/5)"),
            ((4, 1), "error code 4 subcode 1 (4/1)"),
        ] {
            assert_eq!(NotificationError::from_numbers(numbers.0, numbers.1).to_string(), text);
        }
    }
}
