//! Bidirectional Forwarding Detection: says within a fraction of a second that the path to a peer broke.
//!
//! - [`packet`]: the control packet, total on any bytes (RFC 5880 section 4.1).
//! - [`session`]: one session's state machine in asynchronous mode (RFC 5880 section 6). Time is passed
//!   in, packets and events are pulled by the caller.
//! - [`table`]: which session a packet belongs to, and whether it may be believed: hop limit 255 for a
//!   neighbour on the link (RFC 5881 section 5), a floor for peers further away (RFC 5883).
//! - [`monitor`]: the thread with the sockets.
//!
//! What a client of the session does about it is the speaker's matter, by RFC 5882:
//! [`DownReason::breaks_path`] says whether there is anything to do.
//!
//! Not here: the echo function, demand mode of our own (a peer's demand mode is respected),
//! authentication. A packet with an authentication section is refused, as section 6.8.6 of RFC 5880 demands
//! of a session without, so a peer that insists on it stays down.

pub mod monitor;
pub mod packet;
pub mod session;
pub mod table;

pub use monitor::{Monitor, MonitorConfig, MonitorError, Report, SessionHandle, Status};
pub use packet::{Diagnostic, Discriminator, Packet, PacketError, State};
pub use session::{DownReason, Event, Session, Timers, TimersError};
pub use table::{Discard, Hops, PeerConfig, PeerKey, Received, Table};
