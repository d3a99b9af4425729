//! The messages of BGP-4 as plain data.

mod as_path;
mod attributes;
mod capability;
mod codec;
mod community;
mod family;
mod flaw;
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
pub use family::{AfiSafi, Families};
pub use flaw::{Action, Flaw, SessionReset, attribute_name};
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
