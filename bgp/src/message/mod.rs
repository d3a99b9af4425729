//! The messages of BGP-4 as plain data, and their octets.
//!
//! ```
//! use ferroute_bgp::message::{Attributes, Codec, Families, FrameReader, Message, NextHop, Nlri};
//!
//! let codec = Codec { families: Families::ALL, four_octet_as: true, ..Codec::initial() };
//! let attributes = Attributes { next_hop: NextHop::V4([192, 0, 2, 1].into()), ..Attributes::default() };
//! let routes = ["10.96.0.0/16", "10.1.7.0/24"].map(|prefix| prefix.parse().map(Nlri::new));
//! let mut bytes = Vec::new();
//! let messages = codec.announce(&attributes, routes.into_iter().flatten(), &mut bytes)?;
//! assert_eq!(messages, 1);
//!
//! let mut reader = FrameReader::new();
//! reader.space()[..bytes.len()].copy_from_slice(&bytes);
//! reader.filled(bytes.len());
//! while let Some(frame) = reader.next_frame(&codec)? {
//!     let decoded = Message::decode(frame, &codec)?;
//!     assert!(decoded.flaws.is_empty());
//!     assert_eq!(decoded.message.name(), "UPDATE");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Reading is total: any octets give a message, a message with [`Flaw`]s whose consequences are drawn
//! already (RFC 7606), or a [`SessionReset`] with the NOTIFICATION to send. Memory taken for a message is a
//! small multiple of its length. What both sides agreed on is in the [`Codec`].
//!
//! Not here: when a message may come (the state machine), loops, addresses of this host and prefixes that
//! must not be learned (route import), families other than IPv4 and IPv6 unicast.

mod as4;
mod as_path;
mod attribute;
mod attributes;
mod capability;
mod codec;
mod community;
mod decode;
mod encode;
mod family;
mod flaw;
mod frame;
mod identity;
mod nlri;
mod notification;
mod open;
mod refresh;
mod update;

pub use as_path::{AsPath, Segment, SegmentKind, Segments};
pub use attributes::{Aggregator, Attributes, NextHop, Origin, Partial, UnknownAttribute};
pub use capability::{
    AddPath, AddPathMode, Capability, ExtendedNextHop, GracefulRestart, GracefulRestartFamily,
};
pub use codec::{Codec, EXTENDED_MESSAGE_MAX, MESSAGE_MAX};
pub use community::{Community, ExtendedCommunity, InvalidCommunity, LargeCommunity};
pub use decode::Decoded;
pub use encode::EncodeError;
pub use family::{AfiSafi, Families};
pub use flaw::{Action, Flaw, SessionReset, attribute_name};
pub use frame::{FrameReader, frame_length};
pub use identity::{Asn, RouterId};
pub use nlri::Nlri;
pub use notification::{
    Cease, FsmError, HeaderError, Notification, NotificationError, OpenError, RefreshError, UpdateError,
};
pub use open::Open;
pub use refresh::{RefreshKind, RouteRefresh};
pub use update::{Announcement, Update};

/// A BGP message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Type 1: opens a session.
    Open(Open),
    /// Type 2: changes routes.
    Update(Update),
    /// Type 3: ends a session.
    Notification(Notification),
    /// Type 4: keeps a session.
    Keepalive,
    /// Type 5: asks for routes again (RFC 2918).
    RouteRefresh(RouteRefresh),
}

impl Message {
    /// The name of the message's type.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Open(_) => "OPEN",
            Self::Update(_) => "UPDATE",
            Self::Notification(_) => "NOTIFICATION",
            Self::Keepalive => "KEEPALIVE",
            Self::RouteRefresh(_) => "ROUTE-REFRESH",
        }
    }
}
