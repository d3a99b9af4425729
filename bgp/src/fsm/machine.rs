//! The machine itself.

use std::time::{Duration, Instant};

use super::{
    Action, Cause, ConnectionId, Down, Event, FIRST_PAUSE, Initiative, OPEN_WAIT, Pause, STABLE, Settings,
    Shutdown, State, earlier,
};
use crate::message::{Message, Notification, NotificationError, Open, OpenError};
use crate::session::{Negotiated, Offer};

/// One peer's state. Deterministic: the same settings, seed, events and times give the same
/// actions.
#[derive(Debug, Clone)]
pub struct Machine {
    settings: Settings,
    /// State of the generator that spreads timers (RFC 4271 section 10).
    random: u64,
    phase: Phase,
    connections: Vec<Connection>,
    /// Dials in a row that failed.
    failed_dials: u32,
    /// Sessions in a row that failed.
    failures: u32,
    offer: Offer,
    restarted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Stopped,
    /// A pause in which connections are refused; until started by hand if there is no end.
    Held {
        until: Option<Instant>,
    },
    Running {
        dialing: bool,
        /// When to dial again.
        retry: Option<Instant>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Ours,
    Theirs,
}

#[derive(Debug, Clone)]
struct Connection {
    id: ConnectionId,
    opened_by: Side,
    /// There was a session when it was opened.
    anew: bool,
    stage: Stage,
    hold: Option<Instant>,
    keepalive: Option<Instant>,
}

#[derive(Debug, Clone)]
enum Stage {
    OpenSent(Offer),
    OpenConfirm(Box<Negotiated>),
    Established { negotiated: Box<Negotiated>, since: Instant },
}

impl Connection {
    fn state(&self) -> State {
        match self.stage {
            Stage::OpenSent(_) => State::OpenSent,
            Stage::OpenConfirm(_) => State::OpenConfirm,
            Stage::Established { .. } => State::Established,
        }
    }

    fn negotiated(&self) -> Option<&Negotiated> {
        match &self.stage {
            Stage::OpenSent(_) => None,
            Stage::OpenConfirm(negotiated) | Stage::Established { negotiated, .. } => Some(negotiated),
        }
    }
}

impl Machine {
    /// A machine that is stopped. `seed` spreads its timers: give each peer another one.
    pub fn new(settings: Settings, seed: u64) -> Self {
        Self {
            settings,
            random: seed,
            phase: Phase::Stopped,
            connections: Vec::new(),
            failed_dials: 0,
            failures: 0,
            offer: Offer::Full,
            restarted: false,
        }
    }

    /// Whether sessions from now on begin with the word that this process has restarted and its
    /// routes survived in the kernel (R bit, RFC 4724 section 3).
    pub fn set_restarted(&mut self, restarted: bool) {
        self.restarted = restarted;
    }

    /// Changes the longest pause, which the peer cannot see.
    pub fn set_longest_pause(&mut self, pause: Duration) {
        self.settings.longest_pause = pause;
    }

    /// The peer's state.
    pub fn state(&self) -> State {
        let connected = self.connections.iter().map(Connection::state).max();
        connected.unwrap_or(match self.phase {
            Phase::Stopped | Phase::Held { .. } => State::Idle,
            Phase::Running { dialing: true, .. } => State::Connect,
            Phase::Running { dialing: false, .. } => State::Active,
        })
    }

    /// The connection over which routes are exchanged.
    pub fn established(&self) -> Option<ConnectionId> {
        self.connections
            .iter()
            .find(|connection| connection.state() == State::Established)
            .map(|connection| connection.id)
    }

    /// What was agreed on a connection, from the peer's OPEN on.
    pub fn negotiated(&self, id: ConnectionId) -> Option<&Negotiated> {
        self.connections.iter().find(|connection| connection.id == id)?.negotiated()
    }

    /// When [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        let own = match self.phase {
            Phase::Stopped => None,
            Phase::Held { until } => until,
            Phase::Running { retry, .. } => retry,
        };
        self.connections.iter().fold(own, |deadline, connection| {
            earlier(deadline, earlier(connection.hold, connection.keepalive))
        })
    }

    /// Lets an event happen.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Start => self.start(&mut actions),
            Event::Stop(shutdown) => self.stop(shutdown, &mut actions),
            Event::Dialed(id) => self.dialed(id, now, &mut actions),
            Event::DialFailed(words) => self.dial_failed(words, now, &mut actions),
            Event::Accepted(id) => self.accepted(id, now, &mut actions),
            Event::Closed(id, words) => {
                if let Some(state) = self.state_of(id) {
                    self.end(id, Cause::Closed(state, words), Pause::Growing, now, &mut actions);
                }
            }
            Event::Open(id, open) => self.open(id, &open, now, &mut actions),
            Event::Keepalive(id) => self.keepalive(id, now, &mut actions),
            Event::Update(id) => self.routes(id, "UPDATE", now, &mut actions),
            Event::Refresh(id) => self.routes(id, "ROUTE-REFRESH", now, &mut actions),
            Event::Notification(id, notification) => self.notification(id, notification, now, &mut actions),
            Event::Malformed(id, notification, words) => {
                let cause = Cause::Malformed(notification, words);
                self.end(id, cause, Pause::Growing, now, &mut actions);
            }
            Event::SendStalled(id) => {
                self.end(id, Cause::SendStalled, Pause::Growing, now, &mut actions);
            }
            Event::Abort { notification, why, pause } => {
                self.abort(Cause::Aborted(notification, why), pause, now, &mut actions);
            }
            Event::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    fn start(&mut self, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Running { .. }) {
            (self.failures, self.failed_dials) = (0, 0);
            self.run(actions);
        }
    }

    fn run(&mut self, actions: &mut Vec<Action>) {
        let dialing = self.settings.initiative != Initiative::Passive;
        self.phase = Phase::Running { dialing, retry: None };
        if dialing {
            actions.push(Action::Dial);
        }
    }

    fn stop(&mut self, shutdown: Shutdown, actions: &mut Vec<Action>) {
        self.halt(Cause::Stopped(shutdown), actions);
        self.phase = Phase::Stopped;
    }

    fn abort(&mut self, cause: Cause, pause: Pause, now: Instant, actions: &mut Vec<Action>) {
        if self.phase == Phase::Stopped {
            return;
        }
        self.halt(cause.clone(), actions);
        actions.push(Action::Failed(cause));
        self.failures = self.failures.saturating_add(1);
        self.hold(pause, now);
    }

    /// Ends everything that is under way.
    fn halt(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Running { dialing: true, .. }) {
            actions.push(Action::AbandonDial);
        }
        for connection in std::mem::take(&mut self.connections) {
            farewell(&connection, &cause, actions);
        }
    }

    fn dialed(&mut self, id: ConnectionId, now: Instant, actions: &mut Vec<Action>) {
        let Phase::Running { dialing: true, .. } = self.phase else {
            // Given up meanwhile.
            actions.push(Action::Close(id));
            return;
        };
        self.failed_dials = 0;
        self.phase = Phase::Running { dialing: false, retry: None };
        self.greet(id, Side::Ours, now, actions);
    }

    fn dial_failed(&mut self, words: String, now: Instant, actions: &mut Vec<Action>) {
        let Phase::Running { dialing: true, .. } = self.phase else { return };
        self.failed_dials = self.failed_dials.saturating_add(1);
        let retry = Some(now + self.pause_after(self.failed_dials));
        self.phase = Phase::Running { dialing: false, retry };
        actions.push(Action::Failed(Cause::Dial(words)));
    }

    fn accepted(&mut self, id: ConnectionId, now: Instant, actions: &mut Vec<Action>) {
        let welcome =
            matches!(self.phase, Phase::Running { .. }) && self.settings.initiative != Initiative::DialOnly;
        if !welcome {
            actions.push(Action::Close(id));
            return;
        }
        // A peer that connects again has given up its last attempt.
        let (given_up, kept) = std::mem::take(&mut self.connections).into_iter().partition(|connection| {
            connection.opened_by == Side::Theirs && connection.state() != State::Established
        });
        self.connections = kept;
        let given_up: Vec<Connection> = given_up;
        for connection in given_up {
            farewell(&connection, &Cause::Collision, actions);
        }
        self.greet(id, Side::Theirs, now, actions);
    }

    fn greet(&mut self, id: ConnectionId, opened_by: Side, now: Instant, actions: &mut Vec<Action>) {
        let anew = self.established().is_some();
        self.connections.push(Connection {
            id,
            opened_by,
            anew,
            stage: Stage::OpenSent(self.offer),
            hold: Some(now + OPEN_WAIT),
            keepalive: None,
        });
        let open = self.settings.terms.open(self.offer, self.restarted);
        actions.push(Action::Send(id, Message::Open(open)));
    }

    fn open(&mut self, id: ConnectionId, open: &Open, now: Instant, actions: &mut Vec<Action>) {
        let Some(index) = self.index_of(id) else { return };
        let Stage::OpenSent(offer) = self.connections[index].stage else {
            self.unexpected(id, "OPEN", now, actions);
            return;
        };
        let negotiated = match self.settings.terms.agree(offer, open) {
            Ok(negotiated) => negotiated,
            Err(error) => {
                self.end(id, Cause::Open(error), Pause::Growing, now, actions);
                return;
            }
        };
        if !self.wins(index, &negotiated, actions) {
            return;
        }
        let Some(index) = self.index_of(id) else { return };
        actions.push(Action::Send(id, Message::Keepalive));
        let keepalive = self.keepalive_after(&negotiated, now);
        let connection = &mut self.connections[index];
        connection.hold = negotiated.hold().map(|hold| now + hold);
        connection.keepalive = keepalive;
        connection.stage = Stage::OpenConfirm(Box::new(negotiated));
    }

    /// Resolves a collision with another connection (RFC 4271 section 6.8): whether the one whose
    /// OPEN has come may go on. At most one other has come this far.
    fn wins(&mut self, index: usize, negotiated: &Negotiated, actions: &mut Vec<Action>) -> bool {
        let Some(other) = (0..self.connections.len())
            .filter(|other| *other != index)
            .max_by_key(|other| self.connections[*other].state())
        else {
            return true;
        };
        let theirs = self.connections[index].opened_by == Side::Theirs;
        let (cause, wins) = if self.connections[other].state() == State::Established {
            // A peer that can restart and connects anew has restarted: its old connection is dead
            // (RFC 4724 section 4.2). Else, as when both dialed at once, the session that works is
            // kept.
            let restarts =
                self.connections[other].negotiated().is_some_and(|negotiated| negotiated.restart.is_some());
            (Cause::Restarted, restarts && theirs && self.connections[index].anew)
        } else {
            // The connection opened by the side with the higher identifier is kept; of equal
            // identifiers, by the side with the higher AS (RFC 6286 section 2.3). Both sides see
            // the same.
            let own = (u32::from(negotiated.router_id), negotiated.asn);
            let peer = (u32::from(negotiated.peer_router_id), negotiated.peer_asn);
            (Cause::Collision, theirs == (own < peer))
        };
        let loser = if wins { other } else { index };
        let cause = if wins { cause } else { Cause::Collision };
        farewell(&self.connections.remove(loser), &cause, actions);
        wins
    }

    fn keepalive(&mut self, id: ConnectionId, now: Instant, actions: &mut Vec<Action>) {
        let Some(index) = self.index_of(id) else { return };
        let connection = &mut self.connections[index];
        match &connection.stage {
            Stage::OpenSent(_) => self.unexpected(id, "KEEPALIVE", now, actions),
            Stage::OpenConfirm(negotiated) => {
                let negotiated = negotiated.clone();
                connection.hold = negotiated.hold().map(|hold| now + hold);
                connection.stage = Stage::Established { negotiated: negotiated.clone(), since: now };
                self.offer = Offer::Full;
                if matches!(self.phase, Phase::Running { dialing: true, .. }) {
                    actions.push(Action::AbandonDial);
                }
                self.phase = Phase::Running { dialing: false, retry: None };
                actions.push(Action::Up(id, negotiated));
            }
            Stage::Established { negotiated, .. } => {
                connection.hold = negotiated.hold().map(|hold| now + hold);
            }
        }
    }

    fn routes(&mut self, id: ConnectionId, name: &'static str, now: Instant, actions: &mut Vec<Action>) {
        let Some(index) = self.index_of(id) else { return };
        let connection = &mut self.connections[index];
        match &connection.stage {
            Stage::Established { negotiated, .. } => {
                connection.hold = negotiated.hold().map(|hold| now + hold);
            }
            _ => self.unexpected(id, name, now, actions),
        }
    }

    fn notification(
        &mut self,
        id: ConnectionId,
        notification: Notification,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let Some(state) = self.state_of(id) else { return };
        if state != State::Established {
            // An old speaker that knows no capabilities, or none of these: once more with fewer
            // (RFC 5492 section 3). An OPEN with fewer that is refused as well is not what it minds.
            self.offer = match (notification.error, self.offer) {
                (
                    NotificationError::Open(OpenError::UnsupportedParameter),
                    Offer::Full | Offer::Essential,
                ) => Offer::Bare,
                (NotificationError::Open(OpenError::UnsupportedCapability), Offer::Full) => Offer::Essential,
                _ => Offer::Full,
            };
        }
        self.end(id, Cause::Received(notification), Pause::Growing, now, actions);
    }

    fn unexpected(&mut self, id: ConnectionId, name: &'static str, now: Instant, actions: &mut Vec<Action>) {
        if let Some(state) = self.state_of(id) {
            self.end(id, Cause::Unexpected(name, state), Pause::Growing, now, actions);
        }
    }

    /// Ends a connection that failed and decides what comes next.
    fn end(&mut self, id: ConnectionId, cause: Cause, pause: Pause, now: Instant, actions: &mut Vec<Action>) {
        let Some(index) = self.index_of(id) else { return };
        let connection = self.connections.remove(index);
        farewell(&connection, &cause, actions);
        if let Stage::Established { since, .. } = connection.stage
            && now.saturating_duration_since(since) >= STABLE
        {
            self.failures = 0;
        }
        if !self.connections.is_empty() {
            // The other connection goes on.
            return;
        }
        actions.push(Action::Failed(cause.clone()));
        let Phase::Running { dialing, .. } = self.phase else { return };
        self.failures = self.failures.saturating_add(1);
        let blamed_on_peer = !cause.is_silent() && !matches!(cause, Cause::Received(_));
        if blamed_on_peer {
            // What this side could not accept will not be better in a moment.
            if dialing {
                actions.push(Action::AbandonDial);
            }
            self.hold(pause, now);
        } else if !dialing && self.settings.initiative != Initiative::Passive {
            // The peer may come back any time and is welcome.
            let retry = Some(now + self.pause_after(self.failures));
            self.phase = Phase::Running { dialing, retry };
        }
    }

    fn hold(&mut self, pause: Pause, now: Instant) {
        let until = match pause {
            Pause::Growing => Some(now + self.pause_after(self.failures)),
            Pause::For(time) => Some(now + time),
            Pause::UntilStarted => None,
        };
        self.phase = Phase::Held { until };
    }

    fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let silent: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|connection| due(connection.hold))
            .map(|connection| connection.id)
            .collect();
        for id in silent {
            let cause = match self.negotiated(id).and_then(Negotiated::hold) {
                Some(hold) => Cause::HoldTimer(hold),
                None => Cause::NoOpen(OPEN_WAIT),
            };
            self.end(id, cause, Pause::Growing, now, actions);
        }
        for index in 0..self.connections.len() {
            if !due(self.connections[index].keepalive) {
                continue;
            }
            actions.push(Action::Send(self.connections[index].id, Message::Keepalive));
            let negotiated = self.connections[index].negotiated().cloned();
            let next = negotiated.and_then(|negotiated| self.keepalive_after(&negotiated, now));
            self.connections[index].keepalive = next;
        }
        match self.phase {
            Phase::Held { until } if due(until) => self.run(actions),
            Phase::Running { retry, .. } if due(retry) => self.run(actions),
            _ => {}
        }
    }

    fn keepalive_after(&mut self, negotiated: &Negotiated, now: Instant) -> Option<Instant> {
        let third = negotiated.hold()? / 3;
        Some(now + self.jitter(third))
    }

    /// A pause that doubles with each failure.
    fn pause_after(&mut self, failures: u32) -> Duration {
        let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
        self.jitter(doubled.min(self.settings.longest_pause))
    }

    /// Between three quarters of a time and all of it (RFC 4271 section 10).
    fn jitter(&mut self, time: Duration) -> Duration {
        // splitmix64: spreads peers apart, guards nothing.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let part = (mixed >> 40) as u32 % 1024;
        time - time / 4096 * part
    }

    fn index_of(&self, id: ConnectionId) -> Option<usize> {
        self.connections.iter().position(|connection| connection.id == id)
    }

    fn state_of(&self, id: ConnectionId) -> Option<State> {
        self.index_of(id).map(|index| self.connections[index].state())
    }
}

/// Tells the peer why, closes, and reports the end of a session.
fn farewell(connection: &Connection, cause: &Cause, actions: &mut Vec<Action>) {
    let restart = match &connection.stage {
        Stage::Established { negotiated, .. } => negotiated.restart,
        _ => None,
    };
    let over_notification = restart.is_some_and(|restart| restart.notification);
    if let Some(notification) = cause.notification() {
        let notification =
            if over_notification && cause.is_hard() { notification.hard() } else { notification };
        actions.push(Action::Send(connection.id, Message::Notification(notification)));
    }
    actions.push(Action::Close(connection.id));
    if matches!(connection.stage, Stage::Established { .. }) {
        let retain = restart.is_some() && !cause.is_hard() && (cause.is_silent() || over_notification);
        actions.push(Action::Down(Down { cause: cause.clone(), retain }));
    }
}
