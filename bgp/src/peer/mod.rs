//! One peer: its settings, its task, what it has yet to be told, what is known of it.

mod config;
mod pack;
mod status;
mod task;
mod wire;

pub use config::{ConfigError, ConfigFlaw, PORT, PeerBfd, PeerConfig, PeerKey};
pub use status::{MessageCounts, PathStatus, PeerError, PeerStatus, PrefixCounts};

pub(crate) use config::Identity;
pub(crate) use status::Board;
pub(crate) use task::{Command, FromPeer, Task};

use crate::message::{Announcement, Families, Nlri};

/// Routes for a peer, as many as go out together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Families of which an answer to a refresh begins here (RFC 7313).
    pub refresh_begins: Families,
    /// Routes that are gone.
    pub withdrawn: Vec<Nlri>,
    /// Routes by attributes.
    pub announced: Vec<Announcement>,
    /// Families whose initial routes are complete with these.
    pub end_of_rib: Families,
    /// Families of which the answer to a refresh is complete with these.
    pub refresh_ends: Families,
}

impl Batch {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.withdrawn.is_empty()
            && self.announced.is_empty()
            && self.refresh_begins.or(self.end_of_rib).or(self.refresh_ends).is_empty()
    }
}

/// A change of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerEvent {
    /// Whose.
    pub peer: PeerKey,
    /// What.
    pub kind: PeerEventKind,
}

/// What happened to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEventKind {
    /// It is up.
    Up,
    /// It is down.
    Down {
        /// Why, in words.
        cause: String,
        /// Whether the peer's routes are kept for a while (RFC 4724).
        retain: bool,
    },
}
