//! The BFD control packet (RFC 5880 section 4.1).

use std::fmt;
use std::num::NonZeroU32;

/// Bytes of a packet without authentication section: all that is ever sent here.
pub const LENGTH: usize = 24;
/// Shortest packet with the authentication bit set (RFC 5880 section 6.8.6).
const LENGTH_AUTHENTICATED: u8 = 26;
const VERSION: u8 = 1;

const POLL: u8 = 0x20;
const FINAL: u8 = 0x10;
const INDEPENDENT: u8 = 0x08;
const AUTHENTICATED: u8 = 0x04;
const DEMAND: u8 = 0x02;
const MULTIPOINT: u8 = 0x01;

/// The number by which one system knows a session. Never zero: zero on the wire means "not known yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Discriminator(pub NonZeroU32);

impl Discriminator {
    /// A discriminator; nothing for zero.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl fmt::Display for Discriminator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

/// State of a session as its owner sees it (RFC 5880 section 6.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// Held down on purpose; says nothing about the path.
    AdminDown,
    /// Nothing is heard, or the session just failed.
    #[default]
    Down,
    /// The peer is heard, and it is not known yet whether it hears us.
    Init,
    /// Both hear each other.
    Up,
}

impl State {
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::AdminDown,
            1 => Self::Down,
            2 => Self::Init,
            _ => Self::Up,
        }
    }

    const fn bits(self) -> u8 {
        match self {
            Self::AdminDown => 0,
            Self::Down => 1,
            Self::Init => 2,
            Self::Up => 3,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AdminDown => "admin down",
            Self::Down => "down",
            Self::Init => "init",
            Self::Up => "up",
        })
    }
}

/// Why a session last left the state up (RFC 5880 section 4.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Diagnostic {
    /// 0: no reason to give.
    #[default]
    None,
    /// 1: nothing was heard for the detection time.
    DetectionTimeExpired,
    /// 2: the echo function failed.
    EchoFailed,
    /// 3: the neighbour says that its session is down.
    NeighbourDown,
    /// 4: the forwarding plane was reset.
    ForwardingReset,
    /// 5: the path is down by other knowledge.
    PathDown,
    /// 6: a path behind this one is down.
    ConcatenatedPathDown,
    /// 7: held down on purpose.
    AdminDown,
    /// 8: a path behind this one is down in the other direction.
    ReverseConcatenatedPathDown,
    /// 9 to 31: reserved.
    Other(u8),
}

impl Diagnostic {
    const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::None,
            1 => Self::DetectionTimeExpired,
            2 => Self::EchoFailed,
            3 => Self::NeighbourDown,
            4 => Self::ForwardingReset,
            5 => Self::PathDown,
            6 => Self::ConcatenatedPathDown,
            7 => Self::AdminDown,
            8 => Self::ReverseConcatenatedPathDown,
            other => Self::Other(other),
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::DetectionTimeExpired => 1,
            Self::EchoFailed => 2,
            Self::NeighbourDown => 3,
            Self::ForwardingReset => 4,
            Self::PathDown => 5,
            Self::ConcatenatedPathDown => 6,
            Self::AdminDown => 7,
            Self::ReverseConcatenatedPathDown => 8,
            Self::Other(other) => other & 0x1f,
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no diagnostic",
            Self::DetectionTimeExpired => "detection time expired",
            Self::EchoFailed => "echo failed",
            Self::NeighbourDown => "neighbour signalled session down",
            Self::ForwardingReset => "forwarding plane reset",
            Self::PathDown => "path down",
            Self::ConcatenatedPathDown => "concatenated path down",
            Self::AdminDown => "administratively down",
            Self::ReverseConcatenatedPathDown => "reverse concatenated path down",
            Self::Other(code) => return write!(f, "diagnostic {code}"),
        })
    }
}

/// A control packet. Intervals are microseconds, as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Why the sender's session last went down.
    pub diagnostic: Diagnostic,
    /// The sender's state.
    pub state: State,
    /// The sender asks for an answer at once (P).
    pub poll: bool,
    /// This is the answer to a poll (F).
    pub final_: bool,
    /// The sender's BFD outlives its control plane (C).
    pub control_plane_independent: bool,
    /// The sender wants no periodic packets while up (D).
    pub demand: bool,
    /// How many of the sender's packets may be missed. Never zero.
    pub detect_multiplier: u8,
    /// The sender's name of the session.
    pub my_discriminator: Discriminator,
    /// The receiver's name of the session, if the sender knows it.
    pub your_discriminator: Option<Discriminator>,
    /// How often the sender would like to send.
    pub desired_min_tx: u32,
    /// How often the sender can receive; 0: it wants no periodic packets at all.
    pub required_min_rx: u32,
    /// How often the sender can reflect echoes; 0: not at all.
    pub required_min_echo_rx: u32,
}

/// A packet to be ignored, and why (RFC 5880 section 6.8.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Fewer bytes than a header.
    #[error("{0} bytes are too short for a BFD packet of {LENGTH}")]
    Truncated(usize),
    /// Not version 1.
    #[error("BFD version {0} is not 1")]
    Version(u8),
    /// The length field does not fit the packet.
    #[error("BFD length field {field} does not fit a packet of {bytes} bytes")]
    Length {
        /// What the packet says.
        field: u8,
        /// What arrived.
        bytes: usize,
    },
    /// A detection multiplier of zero.
    #[error("BFD detection multiplier is 0")]
    ZeroMultiplier,
    /// The multipoint bit is reserved.
    #[error("BFD multipoint bit is set")]
    Multipoint,
    /// The sender has no discriminator.
    #[error("BFD my-discriminator is 0")]
    ZeroDiscriminator,
    /// Your discriminator may be missing only while the sender is down.
    #[error("BFD your-discriminator is 0 in state {0}")]
    UnknownReceiver(State),
    /// An authentication section, and no session here has a key.
    #[error("BFD packet is authenticated, and authentication is not configured")]
    Authenticated,
}

impl Packet {
    /// Reads a packet. Bytes behind its length are ignored.
    ///
    /// # Errors
    ///
    /// [`PacketError`] for what section 6.8.6 says to discard before a session is looked up.
    pub fn decode(bytes: &[u8]) -> Result<Self, PacketError> {
        let header: &[u8; LENGTH] = bytes.first_chunk().ok_or(PacketError::Truncated(bytes.len()))?;
        let &[first, flags, detect_multiplier, length, ..] = header;
        if first >> 5 != VERSION {
            return Err(PacketError::Version(first >> 5));
        }
        let authenticated = flags & AUTHENTICATED != 0;
        let shortest = if authenticated { LENGTH_AUTHENTICATED } else { LENGTH as u8 };
        if length < shortest || usize::from(length) > bytes.len() {
            return Err(PacketError::Length { field: length, bytes: bytes.len() });
        }
        if detect_multiplier == 0 {
            return Err(PacketError::ZeroMultiplier);
        }
        if flags & MULTIPOINT != 0 {
            return Err(PacketError::Multipoint);
        }
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let state = State::from_bits(flags >> 6);
        let my_discriminator = Discriminator::new(word(4)).ok_or(PacketError::ZeroDiscriminator)?;
        let your_discriminator = Discriminator::new(word(8));
        if your_discriminator.is_none() && !matches!(state, State::Down | State::AdminDown) {
            return Err(PacketError::UnknownReceiver(state));
        }
        if authenticated {
            return Err(PacketError::Authenticated);
        }
        Ok(Self {
            diagnostic: Diagnostic::from_code(first & 0x1f),
            state,
            poll: flags & POLL != 0,
            final_: flags & FINAL != 0,
            control_plane_independent: flags & INDEPENDENT != 0,
            demand: flags & DEMAND != 0,
            detect_multiplier,
            my_discriminator,
            your_discriminator,
            desired_min_tx: word(12),
            required_min_rx: word(16),
            required_min_echo_rx: word(20),
        })
    }

    /// The bytes of the packet.
    pub fn encode(&self) -> [u8; LENGTH] {
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let mut bytes = [0; LENGTH];
        bytes[0] = VERSION << 5 | self.diagnostic.code();
        bytes[1] = self.state.bits() << 6
            | flag(self.poll, POLL)
            | flag(self.final_, FINAL)
            | flag(self.control_plane_independent, INDEPENDENT)
            | flag(self.demand, DEMAND);
        bytes[2] = self.detect_multiplier;
        bytes[3] = LENGTH as u8;
        let words = [
            self.my_discriminator.0.get(),
            self.your_discriminator.map_or(0, |discriminator| discriminator.0.get()),
            self.desired_min_tx,
            self.required_min_rx,
            self.required_min_echo_rx,
        ];
        for (field, word) in bytes[4..].chunks_exact_mut(4).zip(words) {
            field.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A packet as BIRD 2 sends it: up, 100 ms, multiplier 3.
    const UP: [u8; LENGTH] = [
        0x20, 0xc0, 3, 24, 0x11, 0x22, 0x33, 0x44, 0xaa, 0xbb, 0xcc, 0xdd, 0, 1, 0x86, 0xa0, 0, 0, 0x27,
        0x10, 0, 0, 0, 0,
    ];

    #[test]
    fn reads_every_field() {
        let packet = Packet::decode(&UP).unwrap();
        let expected = Packet {
            diagnostic: Diagnostic::None,
            state: State::Up,
            poll: false,
            final_: false,
            control_plane_independent: false,
            demand: false,
            detect_multiplier: 3,
            my_discriminator: Discriminator::new(0x1122_3344).unwrap(),
            your_discriminator: Discriminator::new(0xaabb_ccdd),
            desired_min_tx: 100_000,
            required_min_rx: 10_000,
            required_min_echo_rx: 0,
        };
        assert_eq!(packet, expected);
        assert_eq!(packet.encode(), UP);
    }

    #[test]
    fn discards_what_the_rfc_says() {
        let with = |at: usize, value: u8| {
            let mut bytes = UP.to_vec();
            bytes[at] = value;
            bytes
        };
        let cases: [(Vec<u8>, PacketError); 9] = [
            (UP[..23].to_vec(), PacketError::Truncated(23)),
            (with(0, 0x00), PacketError::Version(0)),
            (with(0, 0x40), PacketError::Version(2)),
            (with(3, 23), PacketError::Length { field: 23, bytes: 24 }),
            (with(3, 25), PacketError::Length { field: 25, bytes: 24 }),
            (with(2, 0), PacketError::ZeroMultiplier),
            (with(1, 0xc1), PacketError::Multipoint),
            ([&UP[..4], &[0; 4], &UP[8..]].concat(), PacketError::ZeroDiscriminator),
            ([&UP[..8], &[0; 4], &UP[12..]].concat(), PacketError::UnknownReceiver(State::Up)),
        ];
        for (bytes, error) in cases {
            assert_eq!(Packet::decode(&bytes), Err(error));
        }
    }

    #[test]
    fn refuses_authentication() {
        // Simple password, key id 1, password "secret"; too short a length is an error of length first.
        let mut bytes = UP.to_vec();
        bytes[1] |= AUTHENTICATED;
        assert_eq!(Packet::decode(&bytes), Err(PacketError::Length { field: 24, bytes: 24 }));
        bytes.extend_from_slice(&[1, 9, 1]);
        bytes.extend_from_slice(b"secret");
        bytes[3] = 33;
        assert_eq!(Packet::decode(&bytes), Err(PacketError::Authenticated));
    }

    #[test]
    fn knows_the_receiver_only_when_down_without_discriminator() {
        for state in [State::AdminDown, State::Down, State::Init, State::Up] {
            let mut bytes = UP;
            bytes[1] = state.bits() << 6;
            bytes[8..12].fill(0);
            let accepted = Packet::decode(&bytes).is_ok();
            assert_eq!(accepted, matches!(state, State::AdminDown | State::Down), "{state}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_reads_back_what_it_took(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(packet) = Packet::decode(&bytes) {
                prop_assert_eq!(Packet::decode(&packet.encode()), Ok(packet));
            }
        }

        /// Headers that are right in the first four bytes get past the cheap checks.
        #[test]
        fn round_trips(flags in any::<u8>(), multiplier in 1u8.., diagnostic in 0u8..32, words in any::<[u32; 5]>()) {
            let mut bytes = [0; LENGTH];
            bytes[0] = VERSION << 5 | diagnostic;
            bytes[1] = flags & !(AUTHENTICATED | MULTIPOINT);
            bytes[2] = multiplier;
            bytes[3] = LENGTH as u8;
            for (field, word) in bytes[4..].chunks_exact_mut(4).zip(words) {
                field.copy_from_slice(&word.to_be_bytes());
            }
            if let Ok(packet) = Packet::decode(&bytes) {
                prop_assert_eq!(packet.encode(), bytes);
            }
        }
    }
}
