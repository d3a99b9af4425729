//! One BFD session in asynchronous mode (RFC 5880 section 6): a state machine without clock and socket.
//!
//! The caller passes in what happened and when ([`Session::receive`], [`Session::advance`], the
//! setters), then pulls what follows: packets ([`Session::transmit`]), changes worth telling
//! ([`Session::event`]) and the next moment at which time alone matters ([`Session::deadline`]).

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use super::packet::{Diagnostic, Discriminator, Packet, State};

/// Slowest rate allowed while a session is not up: one packet a second, in microseconds (RFC 5880
/// section 6.8.3).
const SLOW: u32 = 1_000_000;
/// `bfd.RemoteMinRxInterval` before anything is heard (RFC 5880 section 6.8.1).
const INITIAL_REMOTE_MIN_RX: u32 = 1;

/// What one side asks for: how often to send and to hear, and how many packets may be missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// Microseconds.
    desired_min_tx: u32,
    /// Microseconds.
    required_min_rx: u32,
    detect_multiplier: u8,
}

/// Timers that the protocol cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TimersError {
    /// An interval of zero or above the field's range.
    #[error("BFD {name} interval {interval:?} is not between 1 ms and 4294967 ms")]
    Interval {
        /// `transmit` or `receive`.
        name: &'static str,
        /// As given.
        interval: Duration,
    },
    /// A multiplier of zero.
    #[error("BFD detection multiplier is 0; it is the number of packets that may be missed, 1 to 255")]
    ZeroMultiplier,
}

impl Timers {
    /// Timers from the desired transmit interval, the required receive interval and the detection
    /// multiplier.
    ///
    /// # Errors
    ///
    /// [`TimersError`] for an interval below a millisecond or above 4294967 ms, and for multiplier 0.
    pub fn new(transmit: Duration, receive: Duration, detect_multiplier: u8) -> Result<Self, TimersError> {
        let microseconds = |name, interval: Duration| match u32::try_from(interval.as_micros()) {
            Ok(microseconds) if microseconds >= 1000 => Ok(microseconds),
            _ => Err(TimersError::Interval { name, interval }),
        };
        if detect_multiplier == 0 {
            return Err(TimersError::ZeroMultiplier);
        }
        Ok(Self {
            desired_min_tx: microseconds("transmit", transmit)?,
            required_min_rx: microseconds("receive", receive)?,
            detect_multiplier,
        })
    }
}

impl Default for Timers {
    /// 300 ms both ways, three packets: what most routers use unasked.
    fn default() -> Self {
        Self { desired_min_tx: 300_000, required_min_rx: 300_000, detect_multiplier: 3 }
    }
}

/// Why a session is no longer up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownReason {
    /// Nothing was heard for the detection time.
    DetectionTimeExpired,
    /// The neighbour says that its session is down, and why.
    NeighbourDown(Diagnostic),
    /// The neighbour holds its session down on purpose.
    NeighbourAdminDown,
    /// We hold the session down on purpose.
    AdminDown,
}

impl DownReason {
    /// Whether the path is to be taken for broken. Sessions that are shut on purpose say nothing about
    /// the path, and protocols above must not act on them (RFC 5882 section 3.2).
    pub const fn breaks_path(self) -> bool {
        match self {
            Self::DetectionTimeExpired | Self::NeighbourDown(_) => true,
            Self::NeighbourAdminDown | Self::AdminDown => false,
        }
    }
}

impl fmt::Display for DownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DetectionTimeExpired => f.write_str("nothing heard for the detection time"),
            Self::NeighbourDown(diagnostic) => write!(f, "neighbour signalled down: {diagnostic}"),
            Self::NeighbourAdminDown => f.write_str("neighbour is administratively down"),
            Self::AdminDown => f.write_str("administratively down"),
        }
    }
}

/// A change that the owner of a session wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Both sides hear each other.
    Up,
    /// They did, and no longer do.
    Down(DownReason),
}

/// Progress of a poll sequence (RFC 5880 section 6.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Poll {
    Idle,
    /// Packets carry P until one with F comes back. With `again`, values changed after the sequence
    /// began, so the answer may be to the old ones.
    Active {
        again: bool,
    },
    /// A packet without P separates two sequences; the next one begins after it.
    Gap,
}

/// State variables of one session (RFC 5880 section 6.8.1).
#[derive(Debug, Clone)]
pub struct Session {
    configured: Timers,
    passive: bool,
    local: Discriminator,
    state: State,
    diagnostic: Diagnostic,
    poll: Poll,
    /// What packets say.
    announced_tx: u32,
    announced_rx: u32,
    /// What is in force here: it lags behind while a poll sequence confirms a slower rate.
    active_tx: u32,
    active_rx: u32,

    remote: Option<Discriminator>,
    remote_state: State,
    remote_diagnostic: Diagnostic,
    remote_min_rx: u32,
    remote_min_tx: u32,
    remote_multiplier: u8,
    remote_demand: bool,
    remote_independent: bool,

    started: Instant,
    last_sent: Option<Instant>,
    last_received: Option<Instant>,
    /// Share of the interval until the next packet, in thousandths.
    jitter: u32,
    random: u64,
    /// The state changed since the last packet.
    changed: bool,
    /// A poll waits for its answer.
    answer: bool,
    events: VecDeque<Event>,
}

impl Session {
    /// A session that begins in state down. A passive one is silent until it hears its peer. `seed`
    /// moves the jitter: sessions that start together should not send together.
    pub fn new(timers: Timers, passive: bool, local: Discriminator, seed: u64, now: Instant) -> Self {
        let announced_tx = timers.desired_min_tx.max(SLOW);
        let mut session = Self {
            configured: timers,
            passive,
            local,
            state: State::Down,
            diagnostic: Diagnostic::None,
            poll: Poll::Idle,
            announced_tx,
            announced_rx: timers.required_min_rx,
            active_tx: announced_tx,
            active_rx: timers.required_min_rx,
            remote: None,
            remote_state: State::Down,
            remote_diagnostic: Diagnostic::None,
            remote_min_rx: INITIAL_REMOTE_MIN_RX,
            remote_min_tx: 0,
            remote_multiplier: 0,
            remote_demand: false,
            remote_independent: false,
            started: now,
            last_sent: None,
            last_received: None,
            jitter: 1000,
            random: seed,
            changed: false,
            answer: false,
            events: VecDeque::new(),
        };
        session.draw_jitter();
        session
    }

    /// Our name of the session.
    pub const fn local_discriminator(&self) -> Discriminator {
        self.local
    }

    /// The peer's name of the session, once heard.
    pub const fn remote_discriminator(&self) -> Option<Discriminator> {
        self.remote
    }

    /// Our state.
    pub const fn state(&self) -> State {
        self.state
    }

    /// The peer's state as last heard.
    pub const fn remote_state(&self) -> State {
        self.remote_state
    }

    /// Why we last went down.
    pub const fn diagnostic(&self) -> Diagnostic {
        self.diagnostic
    }

    /// Why the peer says it last went down.
    pub const fn remote_diagnostic(&self) -> Diagnostic {
        self.remote_diagnostic
    }

    /// Whether the peer's BFD outlives its control plane (C bit). If so, a session that goes down means
    /// a broken path even while the peer restarts gracefully (RFC 5882 section 4.3).
    pub const fn remote_is_independent(&self) -> bool {
        self.remote_independent
    }

    /// Time without packets after which the peer counts as lost (RFC 5880 section 6.8.4). Zero before
    /// anything was heard.
    pub fn detection_time(&self) -> Duration {
        let interval = u64::from(self.active_rx.max(self.remote_min_tx));
        Duration::from_micros(interval * u64::from(self.remote_multiplier))
    }

    /// Time without packets after which the peer takes us for lost.
    pub fn remote_detection_time(&self) -> Duration {
        Duration::from_micros(self.transmit_interval() * u64::from(self.configured.detect_multiplier))
    }

    /// Microseconds between our packets before jitter (RFC 5880 section 6.8.7).
    fn transmit_interval(&self) -> u64 {
        u64::from(self.active_tx.max(self.remote_min_rx))
    }

    /// Takes other timers. A change is agreed with the peer by a poll sequence; nothing flaps.
    pub fn set_timers(&mut self, timers: Timers) {
        self.configured = timers;
        self.announce();
    }

    /// Holds the session down on purpose, or lets it go again. The peer is told, and takes no harm.
    pub fn set_admin_down(&mut self, down: bool) {
        match (down, self.state) {
            (true, State::AdminDown) => {}
            (true, _) => self.leave(State::AdminDown, Diagnostic::AdminDown, DownReason::AdminDown),
            (false, State::AdminDown) => self.enter(State::Down),
            (false, _) => {}
        }
    }

    /// Takes in a packet of this session (RFC 5880 section 6.8.6, after the session was found).
    pub fn receive(&mut self, packet: &Packet, now: Instant) {
        self.remote = Some(packet.my_discriminator);
        self.remote_state = packet.state;
        self.remote_diagnostic = packet.diagnostic;
        self.remote_demand = packet.demand;
        self.remote_independent = packet.control_plane_independent;
        self.remote_min_rx = packet.required_min_rx;
        self.remote_min_tx = packet.desired_min_tx;
        self.remote_multiplier = packet.detect_multiplier;
        self.last_received = Some(now);
        if packet.final_ {
            self.end_poll();
        }
        if self.state == State::AdminDown {
            return;
        }
        match (self.state, packet.state) {
            (State::Down, State::AdminDown) => {}
            (_, State::AdminDown) => {
                self.leave(State::Down, Diagnostic::NeighbourDown, DownReason::NeighbourAdminDown);
            }
            (State::Down, State::Down) => self.enter(State::Init),
            (State::Down, State::Init) | (State::Init, State::Init | State::Up) => self.enter(State::Up),
            (State::Up, State::Down) => {
                let reason = DownReason::NeighbourDown(packet.diagnostic);
                self.leave(State::Down, Diagnostic::NeighbourDown, reason);
            }
            _ => {}
        }
        self.answer |= packet.poll;
    }

    /// Lets time pass: without packets for the detection time the session goes down.
    pub fn advance(&mut self, now: Instant) {
        if self.detection_deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        self.last_received = None;
        self.remote = None;
        self.remote_state = State::Down;
        self.remote_diagnostic = Diagnostic::None;
        self.remote_min_rx = INITIAL_REMOTE_MIN_RX;
        self.remote_min_tx = 0;
        self.remote_multiplier = 0;
        self.remote_demand = false;
        if matches!(self.state, State::Init | State::Up) {
            self.leave(State::Down, Diagnostic::DetectionTimeExpired, DownReason::DetectionTimeExpired);
        }
        // Nobody is there to answer, and whoever comes learns the values from the first packet.
        self.poll = Poll::Idle;
        self.settle();
    }

    /// When [`Session::advance`] or [`Session::transmit`] next has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let at_once = (self.answer || self.changed && self.may_send()).then_some(self.started);
        [at_once, self.periodic_deadline(), self.detection_deadline()].into_iter().flatten().min()
    }

    /// The packet that is due now, if any. Call until there is none.
    pub fn transmit(&mut self, now: Instant) -> Option<Packet> {
        if self.answer {
            // Whatever the timers, the state or demand mode say (RFC 5880 section 6.8.7). It carries a
            // changed state as well as any other packet.
            self.answer = false;
            self.changed = false;
            return Some(self.packet(false, true));
        }
        let changed = self.changed && self.may_send();
        if !changed && self.periodic_deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        self.changed = false;
        self.last_sent = Some(now);
        self.draw_jitter();
        let poll = matches!(self.poll, Poll::Active { .. });
        if self.poll == Poll::Gap {
            self.poll = Poll::Active { again: false };
        }
        Some(self.packet(poll, false))
    }

    /// The next change worth telling, oldest first. Call until there is none.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn packet(&self, poll: bool, final_: bool) -> Packet {
        Packet {
            diagnostic: self.diagnostic,
            state: self.state,
            poll,
            final_,
            // This code is part of the daemon: it goes when the control plane goes.
            control_plane_independent: false,
            demand: false,
            detect_multiplier: self.configured.detect_multiplier,
            my_discriminator: self.local,
            your_discriminator: self.remote,
            desired_min_tx: self.announced_tx,
            required_min_rx: self.announced_rx,
            required_min_echo_rx: 0,
        }
    }

    fn enter(&mut self, state: State) {
        if state == State::Up {
            self.diagnostic = Diagnostic::None;
            self.events.push_back(Event::Up);
        }
        self.state = state;
        self.changed = true;
        self.announce();
    }

    fn leave(&mut self, state: State, diagnostic: Diagnostic, reason: DownReason) {
        if self.state == State::Up {
            self.events.push_back(Event::Down(reason));
        }
        self.diagnostic = diagnostic;
        self.enter(state);
    }

    /// Brings the announced intervals in line with configuration and state, and begins a poll
    /// sequence if that changes them (RFC 5880 section 6.8.3).
    fn announce(&mut self) {
        let floor = if self.state == State::Up { 0 } else { SLOW };
        let tx = self.configured.desired_min_tx.max(floor);
        let rx = self.configured.required_min_rx;
        let differs = (tx, rx) != (self.announced_tx, self.announced_rx);
        (self.announced_tx, self.announced_rx) = (tx, rx);
        // While up, to send less often and to expect more has to wait for the peer's word; the other
        // way round nothing can be missed.
        if self.state != State::Up || tx < self.active_tx {
            self.active_tx = tx;
        }
        if self.state != State::Up || rx > self.active_rx {
            self.active_rx = rx;
        }
        if !differs || self.remote.is_none() {
            return;
        }
        self.poll = match self.poll {
            Poll::Idle => Poll::Active { again: false },
            Poll::Active { .. } => Poll::Active { again: true },
            Poll::Gap => Poll::Gap,
        };
    }

    fn end_poll(&mut self) {
        match self.poll {
            Poll::Active { again: true } => self.poll = Poll::Gap,
            Poll::Active { again: false } => {
                self.poll = Poll::Idle;
                self.settle();
            }
            Poll::Idle | Poll::Gap => {}
        }
    }

    fn settle(&mut self) {
        self.active_tx = self.announced_tx;
        self.active_rx = self.announced_rx;
    }

    /// A passive session speaks when spoken to.
    fn may_send(&self) -> bool {
        !self.passive || self.remote.is_some()
    }

    fn may_send_periodically(&self) -> bool {
        let demand = self.remote_demand && self.state == State::Up && self.remote_state == State::Up;
        self.may_send() && self.remote_min_rx != 0 && (!demand || self.poll != Poll::Idle)
    }

    fn periodic_deadline(&self) -> Option<Instant> {
        if !self.may_send_periodically() {
            return None;
        }
        let interval = Duration::from_micros(self.transmit_interval() * u64::from(self.jitter) / 1000);
        Some(self.last_sent.map_or(self.started, |sent| sent + interval))
    }

    fn detection_deadline(&self) -> Option<Instant> {
        self.last_received.map(|received| received + self.detection_time())
    }

    /// The interval shrinks by up to a quarter; with multiplier 1 by a tenth at least, so that it ends
    /// before the peer's patience does (RFC 5880 section 6.8.7).
    fn draw_jitter(&mut self) {
        let most = if self.configured.detect_multiplier == 1 { 900 } else { 1000 };
        // SplitMix64: jitter needs spread, not secrecy.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        self.jitter = 750 + (mixed % (most - 750 + 1)) as u32;
    }
}

#[cfg(test)]
mod tests;
