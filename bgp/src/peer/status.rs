//! What is known of a peer, for people and metrics: written by the peer's task and the RIB, read by
//! anybody at any time.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::config::PeerKey;
use crate::bfd;
use crate::fsm::State;
use crate::message::{AfiSafi, Message, Open};
use crate::rib::{Counts, PeerId};
use crate::session::Negotiated;

/// Last errors that are kept per peer.
const ERRORS: usize = 8;

/// One peer, at one moment.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// Who.
    pub key: PeerKey,
    /// Its name in the RIB.
    pub id: Option<PeerId>,
    /// From the configuration.
    pub description: String,
    /// State of the session.
    pub state: State,
    /// How long it has been in this state.
    pub in_state: Duration,
    /// How long the session has been up; `None` unless Established.
    pub uptime: Option<Duration>,
    /// Local address of the session.
    pub local_address: Option<SocketAddr>,
    /// The OPEN sent last, with the capabilities offered.
    pub sent_open: Option<Open>,
    /// The OPEN received last, with the peer's capabilities.
    pub received_open: Option<Open>,
    /// What both agreed on; of the session that is up, else of the last.
    pub negotiated: Option<Negotiated>,
    /// Prefixes per family.
    pub prefixes: Vec<(AfiSafi, PrefixCounts)>,
    /// Routes of a session that ended are kept because the peer may come back (RFC 4724).
    pub keeping_routes: bool,
    /// Why there is or was no session, newest last.
    pub errors: Vec<PeerError>,
    /// Messages sent.
    pub sent: MessageCounts,
    /// Messages received.
    pub received: MessageCounts,
    /// UPDATEs with errors that the session survived (RFC 7606).
    pub flawed_updates: u64,
    /// Routes that do not fit into a message to this peer.
    pub unsendable: u64,
    /// Sessions that came up.
    pub established: u64,
    /// Sessions that went down again.
    pub flaps: u64,
    /// BFD with the peer, where it is wanted.
    pub path: Option<PathStatus>,
}

/// The BFD session with a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathStatus {
    /// Our state.
    pub state: bfd::State,
    /// Since when.
    pub since: Instant,
    /// Why there can be no session, in words.
    pub error: Option<String>,
}

impl PeerStatus {
    /// The newest error.
    pub fn last_error(&self) -> Option<&PeerError> {
        self.errors.last()
    }
}

/// Why a session failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerError {
    /// When it happened last.
    pub at: SystemTime,
    /// In words.
    pub text: String,
    /// How often in a row.
    pub times: u64,
}

/// Prefixes of one family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixCounts {
    /// Paths that the peer has sent.
    pub received: u64,
    /// Of these, paths that the import policy lets in.
    pub accepted: u64,
    /// Of these, paths from before the peer's restart.
    pub stale: u64,
    /// Paths that the peer was told, or is being told.
    pub sent: u64,
    /// Prefixes to look at before the peer knows all.
    pub pending: u64,
}

/// Messages by type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MessageCounts {
    /// OPEN.
    pub open: u64,
    /// UPDATE.
    pub update: u64,
    /// NOTIFICATION.
    pub notification: u64,
    /// KEEPALIVE.
    pub keepalive: u64,
    /// ROUTE-REFRESH.
    pub refresh: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters([AtomicU64; 5]);

impl Counters {
    pub fn count(&self, message: &Message) {
        let index = match message {
            Message::Open(_) => 0,
            Message::Update(_) => 1,
            Message::Notification(_) => 2,
            Message::Keepalive => 3,
            Message::RouteRefresh(_) => 4,
        };
        self.0[index].fetch_add(1, Ordering::Relaxed);
    }

    pub fn count_updates(&self, updates: usize) {
        self.0[1].fetch_add(updates as u64, Ordering::Relaxed);
    }

    fn read(&self) -> MessageCounts {
        let [open, update, notification, keepalive, refresh] =
            self.0.each_ref().map(|counter| counter.load(Ordering::Relaxed));
        MessageCounts { open, update, notification, keepalive, refresh }
    }
}

/// Prefix counters of one family: received, accepted, stale, sent, pending.
#[derive(Debug, Default)]
struct PrefixCounters([AtomicU64; 5]);

/// The board on which a peer's state is written.
#[derive(Debug)]
pub(crate) struct Board {
    slow: Mutex<Slow>,
    pub sent: Counters,
    pub received: Counters,
    pub flawed_updates: AtomicU64,
    pub unsendable: AtomicU64,
    prefixes: [PrefixCounters; 2],
}

/// What changes with the session only.
#[derive(Debug)]
struct Slow {
    key: PeerKey,
    id: Option<PeerId>,
    description: String,
    state: State,
    since: Instant,
    local_address: Option<SocketAddr>,
    sent_open: Option<Open>,
    received_open: Option<Open>,
    negotiated: Option<Negotiated>,
    keeping_routes: bool,
    errors: VecDeque<PeerError>,
    established: u64,
    flaps: u64,
    path: Option<PathStatus>,
}

impl Board {
    pub fn new(key: PeerKey) -> Self {
        Self {
            slow: Mutex::new(Slow {
                key,
                id: None,
                description: String::new(),
                state: State::Idle,
                since: Instant::now(),
                local_address: None,
                sent_open: None,
                received_open: None,
                negotiated: None,
                keeping_routes: false,
                errors: VecDeque::new(),
                established: 0,
                flaps: 0,
                path: None,
            }),
            sent: Counters::default(),
            received: Counters::default(),
            flawed_updates: AtomicU64::new(0),
            unsendable: AtomicU64::new(0),
            prefixes: Default::default(),
        }
    }

    /// Notes the numbers of routes of a family.
    pub fn set_prefixes(&self, family: AfiSafi, counts: Counts) {
        let Some(index) = AfiSafi::SUPPORTED.iter().position(|supported| *supported == family) else {
            return;
        };
        let Counts { received, accepted, stale, advertised, pending } = counts;
        let values = [received.into(), accepted.into(), stale.into(), advertised.into(), pending as u64];
        for (counter, value) in self.prefixes[index].0.iter().zip(values) {
            counter.store(value, Ordering::Relaxed);
        }
    }

    /// Whose board it is.
    pub fn key(&self) -> PeerKey {
        self.lock().key.clone()
    }

    /// Notes the name of the peer in the RIB.
    pub fn identify(&self, id: PeerId) {
        self.lock().id = Some(id);
    }

    fn lock(&self) -> MutexGuard<'_, Slow> {
        // Plain assignments under the lock: a poisoned one is whole.
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn describe(&self, description: &str) {
        let mut slow = self.lock();
        if slow.description != description {
            description.clone_into(&mut slow.description);
        }
    }

    /// Notes the state; whether it is a new one.
    pub fn enter(&self, state: State, now: Instant) -> bool {
        let mut slow = self.lock();
        if slow.state == state {
            return false;
        }
        if slow.state == State::Established {
            slow.flaps += 1;
        }
        if state == State::Established {
            slow.established += 1;
        }
        (slow.state, slow.since) = (state, now);
        true
    }

    pub fn opened(&self, sent: Option<&Open>, received: Option<&Open>) {
        let mut slow = self.lock();
        if let Some(open) = sent {
            slow.sent_open = Some(open.clone());
        }
        if let Some(open) = received {
            slow.received_open = Some(open.clone());
        }
    }

    pub fn agreed(&self, negotiated: &Negotiated, local_address: Option<SocketAddr>) {
        let mut slow = self.lock();
        slow.negotiated = Some(negotiated.clone());
        slow.local_address = local_address;
    }

    pub fn keep_routes(&self, keeping: bool) {
        self.lock().keeping_routes = keeping;
    }

    /// Notes the state of the BFD session; `None` when none is wanted.
    pub fn set_path(&self, path: Option<PathStatus>) {
        self.lock().path = path;
    }

    /// Notes an error; the same one again only counts.
    pub fn fail(&self, text: String) {
        let at = SystemTime::now();
        let mut slow = self.lock();
        match slow.errors.back_mut() {
            Some(last) if last.text == text => {
                last.times += 1;
                last.at = at;
            }
            _ => {
                if slow.errors.len() == ERRORS {
                    slow.errors.pop_front();
                }
                slow.errors.push_back(PeerError { at, text, times: 1 });
            }
        }
    }

    pub fn read(&self) -> PeerStatus {
        let slow = self.lock();
        let in_state = slow.since.elapsed();
        let counts = |counters: &PrefixCounters| {
            let [received, accepted, stale, sent, pending] =
                counters.0.each_ref().map(|counter| counter.load(Ordering::Relaxed));
            PrefixCounts { received, accepted, stale, sent, pending }
        };
        PeerStatus {
            key: slow.key.clone(),
            id: slow.id,
            description: slow.description.clone(),
            state: slow.state,
            in_state,
            uptime: (slow.state == State::Established).then_some(in_state),
            local_address: slow.local_address,
            sent_open: slow.sent_open.clone(),
            received_open: slow.received_open.clone(),
            negotiated: slow.negotiated.clone(),
            prefixes: AfiSafi::SUPPORTED.into_iter().zip(self.prefixes.iter().map(counts)).collect(),
            keeping_routes: slow.keeping_routes,
            errors: slow.errors.iter().cloned().collect(),
            sent: self.sent.read(),
            received: self.received.read(),
            flawed_updates: self.flawed_updates.load(Ordering::Relaxed),
            unsendable: self.unsendable.load(Ordering::Relaxed),
            established: slow.established,
            flaps: slow.flaps,
            path: slow.path.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_in_a_row_are_counted_and_few_are_kept() {
        let board = Board::new("192.0.2.1".parse::<std::net::IpAddr>().unwrap().into());
        for _ in 0..3 {
            board.fail("refused".into());
        }
        let status = board.read();
        assert_eq!(status.last_error().map(|error| (error.text.as_str(), error.times)), Some(("refused", 3)));
        for number in 0..20 {
            board.fail(format!("error {number}"));
        }
        let status = board.read();
        assert_eq!(status.errors.len(), ERRORS);
        assert_eq!(status.last_error().unwrap().text, "error 19");
    }

    #[test]
    fn flaps_are_sessions_that_went_down() {
        let board = Board::new("192.0.2.1".parse::<std::net::IpAddr>().unwrap().into());
        let now = Instant::now();
        for state in [State::Connect, State::OpenSent, State::Established, State::Idle, State::Established] {
            assert!(board.enter(state, now));
        }
        assert!(!board.enter(State::Established, now));
        let status = board.read();
        assert_eq!((status.established, status.flaps), (2, 1));
        assert!(status.uptime.is_some());
    }
}
