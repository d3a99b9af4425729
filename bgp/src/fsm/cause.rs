//! Why a session ended or did not begin: what the peer is told, and what the operator reads.

use std::fmt;
use std::time::Duration;

use super::State;
use crate::message::{Cease, FsmError, Notification, NotificationError, OpenError as Subcode};
use crate::session::{OpenError, Requirement};

/// How to say goodbye.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shutdown {
    /// Say nothing and close: the peer keeps routes and waits for this side to come back, if
    /// graceful restart was negotiated.
    Silent,
    /// Cease, administrative shutdown, with a text for the peer's operator (RFC 9003).
    Administrative(String),
    /// Cease, administrative reset, with a text.
    Reset(String),
    /// Cease, peer de-configured.
    Deconfigured,
    /// Cease, other configuration change: the session comes back at once.
    Changed,
}

impl Shutdown {
    pub(super) fn notification(&self) -> Option<Notification> {
        Some(match self {
            Self::Silent => return None,
            Self::Administrative(text) => Notification::shutdown(text),
            Self::Reset(text) => Notification::reset(text),
            Self::Deconfigured => Notification::cease(Cease::PeerDeconfigured),
            Self::Changed => Notification::cease(Cease::ConfigurationChange),
        })
    }
}

/// Why a session ended or did not begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// This side ended it on request.
    Stopped(Shutdown),
    /// No connection, in words.
    Dial(String),
    /// The peer closed the connection, or it broke (in words), in this state.
    Closed(State, Option<String>),
    /// The peer's OPEN was refused.
    Open(OpenError),
    /// The peer sent this.
    Received(Notification),
    /// The peer sent something that cannot be read, in words, and was told so.
    Malformed(Notification, String),
    /// The peer sent a message that the state does not allow.
    Unexpected(&'static str, State),
    /// The peer's OPEN did not come in time.
    NoOpen(Duration),
    /// The peer was not heard in time.
    HoldTimer(Duration),
    /// The peer took nothing in time.
    SendStalled,
    /// Of two connections the other was kept.
    Collision,
    /// The peer opened a new connection: it has restarted.
    Restarted,
    /// This side ended it for a reason of its own, in words.
    Aborted(Notification, String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped(Shutdown::Silent) => f.write_str("stopped here without notice, to come back"),
            Self::Stopped(Shutdown::Administrative(text)) => write!(f, "shut down here: {text:?}"),
            Self::Stopped(Shutdown::Reset(text)) => write!(f, "reset here: {text:?}"),
            Self::Stopped(Shutdown::Deconfigured) => f.write_str("removed from the configuration here"),
            Self::Stopped(Shutdown::Changed) => f.write_str("configuration changed here"),
            Self::Dial(words) => f.write_str(words),
            Self::Closed(State::OpenSent, None) => f.write_str(
                "peer closed the connection before its OPEN: perhaps it does not know this node as a neighbour",
            ),
            Self::Closed(state, None) => write!(f, "peer closed the connection in state {state}"),
            Self::Closed(state, Some(words)) => write!(f, "connection lost in state {state}: {words}"),
            Self::Open(error) => error.fmt(f),
            Self::Received(notification) => write!(f, "peer sent NOTIFICATION {notification}"),
            Self::Malformed(notification, words) => write!(f, "{words}: sent NOTIFICATION {notification}"),
            Self::Unexpected(message, state) => write!(f, "peer sent {message} in state {state}"),
            Self::NoOpen(time) => write!(
                f,
                "connected, but no OPEN came from the peer within {} s: it is stuck, or TTL security on one \
                 side drops what the other sends",
                time.as_secs()
            ),
            Self::HoldTimer(time) => {
                write!(f, "nothing heard from the peer for {} s (hold time)", time.as_secs())
            }
            Self::SendStalled => f.write_str("peer took nothing for the send hold time (RFC 9687)"),
            Self::Collision => f.write_str("of two connections the other was kept"),
            Self::Restarted => f.write_str("peer opened a new connection: it has restarted"),
            Self::Aborted(notification, words) => write!(f, "{words}: sent NOTIFICATION {notification}"),
        }
    }
}

impl Cause {
    /// What the peer is told; `None` when there is nobody to tell or nothing to say.
    pub(super) fn notification(&self) -> Option<Notification> {
        Some(match self {
            Self::Stopped(shutdown) => return shutdown.notification(),
            Self::Dial(_) | Self::Closed(..) | Self::Received(_) | Self::Restarted => return None,
            Self::Open(error) => error.notification(),
            Self::Malformed(notification, _) | Self::Aborted(notification, _) => notification.clone(),
            Self::Unexpected(_, state) => Notification::new(NotificationError::Fsm(match state {
                State::OpenSent => FsmError::OpenSent,
                State::OpenConfirm => FsmError::OpenConfirm,
                State::Established => FsmError::Established,
                State::Idle | State::Connect | State::Active => FsmError::Unspecified,
            })),
            Self::NoOpen(_) | Self::HoldTimer(_) => Notification::new(NotificationError::HoldTimerExpired),
            Self::SendStalled => Notification::new(NotificationError::SendHoldTimerExpired),
            Self::Collision => Notification::cease(Cease::Collision),
        })
    }

    /// Whether the peer is to forget routes even if it could keep them over a NOTIFICATION: when
    /// this side does not mean to come back soon, or its routes are not to be used (RFC 8538
    /// section 5).
    pub(super) fn is_hard(&self) -> bool {
        match self {
            Self::Stopped(Shutdown::Administrative(_) | Shutdown::Deconfigured) => true,
            Self::Aborted(notification, _) => matches!(
                notification.error,
                NotificationError::Cease(
                    Cease::MaximumPrefixes | Cease::BfdDown | Cease::AdministrativeShutdown
                )
            ),
            Self::Received(notification) => notification.is_hard_reset(),
            _ => false,
        }
    }

    /// Whether the connection ended without a word.
    pub(super) fn is_silent(&self) -> bool {
        matches!(self, Self::Closed(..) | Self::Restarted | Self::Stopped(Shutdown::Silent))
    }
}

impl OpenError {
    /// What the peer is told (RFC 4271 section 6.2).
    pub fn notification(&self) -> Notification {
        let (subcode, data) = match self {
            Self::WrongAsn { .. } | Self::ZeroAsn => (Subcode::BadPeerAs, Vec::new()),
            Self::ZeroRouterId | Self::SameRouterId(_) => (Subcode::BadIdentifier, Vec::new()),
            Self::HoldTime(_) => (Subcode::UnacceptableHoldTime, Vec::new()),
            Self::Missing(requirement) => (Subcode::UnsupportedCapability, requirement.wanted()),
            Self::NoFamily { own, .. } => (
                Subcode::UnsupportedCapability,
                own.iter().flat_map(|family| Requirement::Family(family).wanted()).collect(),
            ),
        };
        Notification::with_data(NotificationError::Open(subcode), data)
    }
}

impl Requirement {
    /// The capability as it should have been in the OPEN (RFC 5492 section 5).
    fn wanted(self) -> Vec<u8> {
        let (code, value) = match self {
            Self::Family(family) => {
                let [high, low] = family.afi().to_be_bytes();
                (1, vec![high, low, 0, family.safi()])
            }
            Self::FourOctetAsn => (65, vec![0; 4]),
            Self::RouteRefresh => (2, Vec::new()),
            Self::GracefulRestart => (64, vec![0; 2]),
            Self::PathsFrom(family) | Self::PathsTo(family) => {
                let [high, low] = family.afi().to_be_bytes();
                let mode = if matches!(self, Self::PathsFrom(_)) { 2 } else { 1 };
                (69, vec![high, low, family.safi(), mode])
            }
            Self::ExtendedNextHop => (5, vec![0, 1, 0, 1, 0, 2]),
        };
        let mut bytes = vec![code, value.len() as u8];
        bytes.extend(value);
        bytes
    }
}
