//! The state machine of a peer (RFC 4271 section 8) as pure code: events and the time go in, actions
//! come out. No sockets, no clock, no routes.
//!
//! A peer has one machine, which holds all its connections: two speakers that dial each other have
//! two for a moment (RFC 4271 section 6.8), and a peer that restarted opens a new one while the old
//! one still seems alive (RFC 4724 section 4.2). The state of the peer is that of its most advanced
//! connection.

mod cause;
mod machine;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, Instant};

pub use cause::{Cause, Shutdown};
pub use machine::Machine;

use crate::message::{Message, Notification, Open};
use crate::session::{Negotiated, Terms};

/// A connection of a peer, numbered by whoever opens and accepts them; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// State of a peer (RFC 4271 section 8.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Stopped, or pausing after a failure; connections are refused.
    Idle,
    /// Dialing.
    Connect,
    /// Waiting for the peer to connect, or to dial again.
    Active,
    /// Connected, the peer's OPEN is awaited.
    OpenSent,
    /// The peer's OPEN is accepted, its KEEPALIVE is awaited.
    OpenConfirm,
    /// Routes are exchanged.
    Established,
}

impl State {
    /// All states, in the order of a session's life.
    pub const ALL: [Self; 6] =
        [Self::Idle, Self::Connect, Self::Active, Self::OpenSent, Self::OpenConfirm, Self::Established];

    /// The name in RFC 4271.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Connect => "Connect",
            Self::Active => "Active",
            Self::OpenSent => "OpenSent",
            Self::OpenConfirm => "OpenConfirm",
            Self::Established => "Established",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who opens connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Initiative {
    /// Both sides.
    #[default]
    Both,
    /// The peer only.
    Passive,
    /// This side only: connections from the peer are refused.
    DialOnly,
}

/// What a machine is told once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What is offered and demanded.
    pub terms: Terms,
    /// Who opens connections.
    pub initiative: Initiative,
    /// Longest pause between attempts: they begin at a second and double.
    pub longest_pause: Duration,
}

/// What happens to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The peer is wanted; also ends a pause.
    Start,
    /// The peer is not wanted any more.
    Stop(Shutdown),
    /// The dial asked for succeeded.
    Dialed(ConnectionId),
    /// The dial asked for failed, in words.
    DialFailed(String),
    /// The peer opened a connection.
    Accepted(ConnectionId),
    /// A connection broke or was closed by the peer; the error in words, if there was one.
    Closed(ConnectionId, Option<String>),
    /// An OPEN arrived.
    Open(ConnectionId, Open),
    /// A KEEPALIVE arrived.
    Keepalive(ConnectionId),
    /// An UPDATE arrived. What it says is for the RIB, if [`Machine::established`] is this
    /// connection afterwards.
    Update(ConnectionId),
    /// A ROUTE-REFRESH arrived: as with an UPDATE.
    Refresh(ConnectionId),
    /// A NOTIFICATION arrived.
    Notification(ConnectionId, Notification),
    /// Something arrived that cannot be read; this is the answer to it.
    Malformed(ConnectionId, Notification, String),
    /// The peer has taken nothing for too long (RFC 9687).
    SendStalled(ConnectionId),
    /// The session is to end although the peer is wanted.
    Abort {
        /// What the peer is told.
        notification: Notification,
        /// The same for the operator.
        why: String,
        /// When to try again.
        pause: Pause,
    },
    /// Time has passed. Due when [`Machine::deadline`] is over; early ones do nothing.
    Tick,
}

/// When to try again after a session was ended here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pause {
    /// Soon, later after each failure.
    Growing,
    /// After this time.
    For(Duration),
    /// When an operator says so: at the next [`Event::Start`].
    UntilStarted,
}

/// What a machine wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Open a connection; answered by [`Event::Dialed`] or [`Event::DialFailed`].
    Dial,
    /// Give up the dial under way; it is not answered.
    AbandonDial,
    /// Send a message.
    Send(ConnectionId, Message),
    /// Close a connection after what was sent. Nothing more is to be heard of it.
    Close(ConnectionId),
    /// The session is up: send the routes.
    Up(ConnectionId, Box<Negotiated>),
    /// The session is down.
    Down(Down),
    /// An attempt failed: the peer's last error.
    Failed(Cause),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Down {
    /// Why.
    pub cause: Cause,
    /// Whether the peer's routes are to be kept for a while, because it can restart gracefully
    /// (RFC 4724, RFC 8538).
    pub retain: bool,
}

/// Longest wait for an OPEN. RFC 4271 section 8.2.2 suggests four minutes; no speaker needs one, and
/// meanwhile an operator sees no reason.
pub const OPEN_WAIT: Duration = Duration::from_secs(60);
/// First pause after a failure.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// A session that lasted this long was no failure: pauses begin anew.
pub const STABLE: Duration = Duration::from_secs(30);

/// The earlier of two deadlines.
fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
