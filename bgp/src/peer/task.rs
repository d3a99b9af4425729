//! The task of a peer: sockets, timers and commands in; messages, routes and status out.
//!
//! It waits for everything at once and never for the peer. What the peer does not read stays in the
//! RIB as a set of prefixes to be told: the next batch is asked for when the last one is nearly
//! written, and says what is true then. What the RIB does not take yet is not read from the socket.

use std::collections::VecDeque;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, info, warn};

use super::config::{Identity, PeerConfig, PeerKey};
use super::pack::{Unsendable, pack};
use super::status::Board;
use super::wire::{Heard, Ready, Wire, read_budget, ready};
use super::{Batch, PeerEvent, PeerEventKind};
use crate::fsm::{Action, ConnectionId, Down, Event, Machine, Pause, Shutdown, State};
use crate::message::{Cease, Families, Message, Notification, RefreshKind, RouteRefresh, Update};
use crate::session::Negotiated;
use crate::transport::{Dial, DialError, adopt, scoped};

/// Batches for the RIB that may wait before the socket is not read any more.
const BACKLOG: usize = 16;
/// UPDATEs that go to the RIB together at most.
const BATCH: usize = 256;
/// Least send hold time (RFC 9687 section 3.2).
const SEND_HOLD: Duration = Duration::from_secs(8 * 60);

/// What a peer's task is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// The peer opened a connection.
    Accepted(TcpStream),
    /// New settings.
    Configure(Box<PeerConfig>),
    /// End a pause.
    Resume,
    /// End the session, begin another.
    Reset(Shutdown),
    /// End the session for a reason in the routes.
    Abort { notification: Notification, why: String, pause: Pause },
    /// The path to the peer broke, in words. `independent`: whatever the peer's control plane does;
    /// `restarts`: if the peer can restart gracefully, take it for that.
    PathDown { why: String, independent: bool, restarts: bool },
    /// Ask the peer for its routes again.
    Refresh(Families),
    /// End the session and the task.
    Stop(Shutdown),
}

/// What a peer's task tells the RIB, in this order.
#[derive(Debug)]
pub(crate) enum FromPeer {
    /// The session is up; put its routes here.
    Up { negotiated: Box<Negotiated>, local: Option<SocketAddr>, routes: mpsc::Sender<Batch> },
    /// A batch was taken: there is room for another.
    Taken,
    /// Routes arrived.
    Updates(Vec<Update>),
    /// The peer asks for routes, or marks an answer to such a question.
    Refresh(RouteRefresh),
    /// The session is down. `retain`: keep the routes until the peer is back (RFC 4724).
    Down { retain: bool },
    /// An attempt at a session failed.
    Failed,
    /// Routes that were kept for a restarting peer are not to be used.
    Forget,
    /// The peer is not wanted any more.
    Gone,
}

/// What a task works with.
pub(crate) struct Task {
    pub key: PeerKey,
    /// This peer's number in the RIB.
    pub number: u32,
    pub identity: Arc<Identity>,
    pub config: PeerConfig,
    pub board: Arc<Board>,
    pub commands: mpsc::UnboundedReceiver<Command>,
    pub table: mpsc::Sender<(u32, FromPeer)>,
    pub events: tokio::sync::broadcast::Sender<PeerEvent>,
}

struct Running {
    task: Task,
    machine: Machine,
    wires: Vec<Wire>,
    dial: Option<JoinHandle<Result<TcpStream, DialError>>>,
    next_connection: u64,
    backlog: VecDeque<FromPeer>,
    routes: Option<mpsc::Receiver<Batch>>,
    closing: JoinSet<()>,
    /// The task ends once this is on its way.
    leaving: bool,
}

/// What happened.
enum Wake {
    Command(Option<Command>),
    Io(Ready),
    Dialed(Result<TcpStream, DialError>),
    Room,
    Routes(Option<Batch>),
    Time,
}

impl Task {
    /// Runs until the peer is stopped.
    pub async fn run(self) {
        let seed = seed(&self.key);
        let machine = Machine::new(self.config.settings(&self.identity), seed);
        let mut running = Running {
            machine,
            task: self,
            wires: Vec::new(),
            dial: None,
            next_connection: 0,
            backlog: VecDeque::new(),
            routes: None,
            closing: JoinSet::new(),
            leaving: false,
        };
        running.task.board.describe(&running.task.config.description);
        running.on(Event::Start);
        while !(running.leaving && running.backlog.is_empty()) {
            let wake = running.wait().await;
            running.woken(wake);
        }
        // The last words, each with a time limit of its own.
        while running.closing.join_next().await.is_some() {}
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(dial) = &self.dial {
            dial.abort();
        }
    }
}

/// Spreads the timers of peers. Different in each process, so that two nodes that started together
/// do not retry together.
fn seed(key: &PeerKey) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(key)
}

impl Running {
    async fn wait(&mut self) -> Wake {
        let deadline = self.deadline();
        let reading = self.backlog.len() < BACKLOG;
        let room = self.established_wire().is_some_and(Wire::has_room);
        tokio::select! {
            command = self.task.commands.recv(), if !self.leaving => Wake::Command(command),
            room = self.task.table.reserve(), if !self.backlog.is_empty() => {
                match (room, self.backlog.pop_front()) {
                    (Ok(room), Some(first)) => room.send((self.task.number, first)),
                    // The RIB is gone with the speaker.
                    _ => self.backlog.clear(),
                }
                Wake::Room
            }
            io = ready(&self.wires, reading), if !self.wires.is_empty() => Wake::Io(io),
            stream = join(&mut self.dial), if self.dial.is_some() => Wake::Dialed(stream),
            batch = taken(&mut self.routes), if room => Wake::Routes(batch),
            () = sleep_until(deadline) => Wake::Time,
        }
    }

    fn woken(&mut self, wake: Wake) {
        match wake {
            Wake::Command(Some(command)) => self.command(command),
            // The speaker is gone without a word: so are its peers.
            Wake::Command(None) => self.leave(Shutdown::Silent),
            Wake::Io(Ready::Read(id)) => self.read(id),
            Wake::Io(Ready::Write(id)) => self.write(id),
            Wake::Dialed(outcome) => self.dialed(outcome),
            Wake::Room | Wake::Routes(None) => {}
            Wake::Routes(Some(batch)) => self.put(&batch),
            Wake::Time => self.time(),
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Accepted(stream) => self.accepted(stream),
            Command::Configure(config) => self.configure(*config),
            Command::Resume => self.on(Event::Start),
            Command::Reset(shutdown) => {
                self.on(Event::Stop(shutdown));
                self.on(Event::Start);
            }
            Command::Abort { notification, why, pause } => self.on(Event::Abort { notification, why, pause }),
            Command::PathDown { why, independent, restarts } => self.path_down(why, independent, restarts),
            Command::Refresh(families) => self.ask_for_routes(families),
            Command::Stop(shutdown) => self.leave(shutdown),
        }
    }

    /// RFC 5882 section 4.3, RFC 9384.
    fn path_down(&mut self, why: String, independent: bool, restarts: bool) {
        let Some(id) = self.machine.established() else {
            if independent {
                self.backlog.push_back(FromPeer::Forget);
            }
            return;
        };
        let restarts =
            restarts && self.machine.negotiated(id).is_some_and(|negotiated| negotiated.restart.is_some());
        self.on(if restarts {
            Event::Closed(id, Some(why))
        } else {
            let notification = Notification::cease(Cease::BfdDown);
            Event::Abort { notification, why, pause: Pause::Growing }
        });
    }

    fn leave(&mut self, shutdown: Shutdown) {
        self.on(Event::Stop(shutdown));
        self.backlog.push_back(FromPeer::Gone);
        self.leaving = true;
    }

    fn configure(&mut self, config: PeerConfig) {
        self.task.board.describe(&config.description);
        let keeps = config.keeps_session_of(&self.task.config);
        self.task.config = config;
        let settings = self.task.config.settings(&self.task.identity);
        if keeps {
            self.machine.set_longest_pause(settings.longest_pause);
            return;
        }
        info!(peer = %self.task.key, "settings changed, the session begins anew");
        self.on(Event::Stop(Shutdown::Changed));
        self.machine = Machine::new(settings, seed(&self.task.key));
        self.on(Event::Start);
    }

    fn ask_for_routes(&mut self, families: Families) {
        let now = Instant::now();
        let Some(id) = self.machine.established() else { return };
        let Some(negotiated) = self.machine.negotiated(id) else { return };
        if !negotiated.route_refresh {
            return;
        }
        let families = families.and(negotiated.codec.families);
        for family in families.iter() {
            let refresh = RouteRefresh { family, kind: RefreshKind::Request };
            self.send(id, &Message::RouteRefresh(refresh), now);
        }
    }

    fn accepted(&mut self, stream: TcpStream) {
        let id = self.number();
        if let Err(error) = adopt(&stream, self.task.config.reach(self.task.identity.asn)) {
            self.fail(format!("cannot set up the connection that the peer opened: {error}"));
            return;
        }
        self.wires.push(Wire::new(id, stream));
        self.on(Event::Accepted(id));
    }

    fn dialed(&mut self, outcome: Result<TcpStream, DialError>) {
        match outcome {
            Ok(stream) => {
                let id = self.number();
                self.wires.push(Wire::new(id, stream));
                self.on(Event::Dialed(id));
            }
            Err(error) => self.on(Event::DialFailed(error.to_string())),
        }
    }

    fn number(&mut self) -> ConnectionId {
        self.next_connection += 1;
        ConnectionId(self.next_connection)
    }

    fn dial(&mut self) {
        let config = &self.task.config;
        let remote = scoped(config.key.address, config.port, config.key.interface.as_deref());
        let reach = config.reach(self.task.identity.asn);
        let (source, password, timeout) = (config.source, config.password.clone(), config.dial_timeout);
        self.dial = Some(tokio::spawn(async move {
            Dial { remote: remote?, source, reach, password, timeout }.connect().await
        }));
    }

    /// Lets the machine see an event and does what it says.
    fn on(&mut self, event: Event) {
        let now = Instant::now();
        self.machine.set_restarted(self.task.identity.restarting.load(Ordering::Relaxed));
        for action in self.machine.handle(event, now) {
            self.act(action, now);
        }
        let state = self.machine.state();
        if self.task.board.enter(state, now) {
            debug!(peer = %self.task.key, %state, "state");
        }
    }

    fn act(&mut self, action: Action, now: Instant) {
        match action {
            Action::Dial => self.dial(),
            Action::AbandonDial => {
                if let Some(dial) = self.dial.take() {
                    dial.abort();
                }
            }
            Action::Send(id, message) => self.send(id, &message, now),
            Action::Close(id) => {
                if let Some(index) = self.wires.iter().position(|wire| wire.id == id) {
                    let wire = self.wires.swap_remove(index);
                    self.closing.spawn(wire.close());
                }
            }
            Action::Up(id, negotiated) => self.up(id, negotiated),
            Action::Down(down) => self.down(&down),
            Action::Failed(cause) => {
                self.fail(cause.to_string());
                self.backlog.push_back(FromPeer::Failed);
            }
        }
    }

    fn fail(&self, text: String) {
        debug!(peer = %self.task.key, error = text, "no session");
        self.task.board.fail(text);
    }

    fn send(&mut self, id: ConnectionId, message: &Message, now: Instant) {
        let Some(wire) = self.wires.iter_mut().find(|wire| wire.id == id) else { return };
        if let Err(error) = wire.send(message, now) {
            warn!(peer = %self.task.key, message = message.name(), %error, "a message cannot be written");
            return;
        }
        self.task.board.sent.count(message);
        if let Message::Open(open) = message {
            self.task.board.opened(Some(open), None);
        }
        self.flush(id, now);
    }

    fn up(&mut self, id: ConnectionId, negotiated: Box<Negotiated>) {
        let Some(wire) = self.wires.iter().find(|wire| wire.id == id) else { return };
        let local = wire.local_address();
        self.task.board.agreed(&negotiated, local);
        self.task.board.enter(State::Established, Instant::now());
        info!(peer = %self.task.key, asn = %negotiated.peer_asn, families = ?negotiated.codec.families, "session up");
        // One batch ahead, so that the next is there when this one is written.
        let (routes, receiver) = mpsc::channel(1);
        self.routes = Some(receiver);
        self.tell(PeerEventKind::Up);
        self.backlog.push_back(FromPeer::Up { negotiated, local, routes });
    }

    fn down(&mut self, down: &Down) {
        let cause = down.cause.to_string();
        info!(peer = %self.task.key, cause, retain = down.retain, "session down");
        self.routes = None;
        self.backlog.push_back(FromPeer::Down { retain: down.retain });
        self.tell(PeerEventKind::Down { cause, retain: down.retain });
    }

    fn tell(&self, kind: PeerEventKind) {
        // Nobody listening is fine.
        let _ = self.task.events.send(PeerEvent { peer: self.task.key.clone(), kind });
    }

    fn established_wire(&self) -> Option<&Wire> {
        let id = self.machine.established()?;
        self.wires.iter().find(|wire| wire.id == id)
    }

    fn deadline(&self) -> Option<Instant> {
        let stalls =
            self.wires.iter().filter_map(|wire| Some(wire.stalled_since()? + self.send_hold(wire.id)));
        self.machine.deadline().into_iter().chain(stalls).min()
    }

    fn send_hold(&self, id: ConnectionId) -> Duration {
        let hold = self.machine.negotiated(id).and_then(Negotiated::hold).unwrap_or_default();
        SEND_HOLD.max(hold * 2)
    }

    fn time(&mut self) {
        let now = Instant::now();
        let stalled: Vec<ConnectionId> = self
            .wires
            .iter()
            .filter(|wire| wire.stalled_since().is_some_and(|since| since + self.send_hold(wire.id) <= now))
            .map(|wire| wire.id)
            .collect();
        for id in stalled {
            self.on(Event::SendStalled(id));
        }
        self.on(Event::Tick);
    }

    fn read(&mut self, id: ConnectionId) {
        let mut updates = Vec::new();
        let mut messages = 0;
        let mut broken = None;
        'reading: while messages * 64 < read_budget() {
            let Some(wire) = self.wires.iter_mut().find(|wire| wire.id == id) else { break };
            match wire.fill() {
                Ok(true) => {}
                Ok(false) => break,
                Err(heard) => {
                    broken = Some(heard);
                    break;
                }
            }
            loop {
                let Some(wire) = self.wires.iter_mut().find(|wire| wire.id == id) else { break 'reading };
                match wire.next() {
                    None => break,
                    Some(Heard::Message(decoded)) => {
                        messages += 1;
                        if !decoded.flaws.is_empty() {
                            self.flawed(&decoded.flaws);
                        }
                        self.heard(id, decoded.message, &mut updates);
                    }
                    Some(other) => {
                        broken = Some(other);
                        break 'reading;
                    }
                }
            }
        }
        self.deliver(&mut updates);
        match broken {
            None | Some(Heard::Message(_)) => {}
            Some(Heard::Closed(words)) => self.on(Event::Closed(id, words)),
            Some(Heard::Garbage(reset)) => {
                self.on(Event::Malformed(id, reset.notification, reset.reason.into_owned()));
            }
        }
    }

    fn flawed(&self, flaws: &[crate::message::Flaw]) {
        self.task.board.flawed_updates.fetch_add(1, Ordering::Relaxed);
        for flaw in flaws {
            debug!(peer = %self.task.key, %flaw, "an UPDATE has errors");
        }
    }

    fn heard(&mut self, id: ConnectionId, message: Message, updates: &mut Vec<Update>) {
        self.task.board.received.count(&message);
        match message {
            Message::Update(update) => {
                self.on(Event::Update(id));
                if self.machine.established() == Some(id) {
                    updates.push(update);
                    if updates.len() == BATCH {
                        self.deliver(updates);
                    }
                }
            }
            Message::Keepalive => self.on(Event::Keepalive(id)),
            Message::RouteRefresh(refresh) => {
                self.on(Event::Refresh(id));
                if self.machine.established() == Some(id) {
                    self.deliver(updates);
                    self.backlog.push_back(FromPeer::Refresh(refresh));
                }
            }
            Message::Open(open) => {
                self.task.board.opened(None, Some(&open));
                self.on(Event::Open(id, open));
                let codec = self.machine.negotiated(id).map(|negotiated| negotiated.codec.clone());
                if let (Some(codec), Some(wire)) = (codec, self.wires.iter_mut().find(|wire| wire.id == id)) {
                    wire.codec = codec;
                }
            }
            Message::Notification(notification) => {
                self.deliver(updates);
                self.on(Event::Notification(id, notification));
            }
        }
    }

    fn deliver(&mut self, updates: &mut Vec<Update>) {
        if !updates.is_empty() {
            self.backlog.push_back(FromPeer::Updates(std::mem::take(updates)));
        }
    }

    fn write(&mut self, id: ConnectionId) {
        self.flush(id, Instant::now());
    }

    fn flush(&mut self, id: ConnectionId, now: Instant) {
        let Some(wire) = self.wires.iter_mut().find(|wire| wire.id == id) else { return };
        // What breaks while writing shows while reading, with what the peer had to say before.
        if let Err(error) = wire.flush(now) {
            debug!(peer = %self.task.key, %error, "cannot write");
        }
    }

    /// Turns routes into messages.
    fn put(&mut self, batch: &Batch) {
        self.backlog.push_back(FromPeer::Taken);
        let now = Instant::now();
        let Some(id) = self.machine.established() else { return };
        let Some(wire) = self.wires.iter_mut().find(|wire| wire.id == id) else { return };
        let codec = wire.codec.clone();
        for Unsendable { error, prefixes } in pack(batch, &codec, &self.task.board, wire.outgoing(now)) {
            self.task.board.unsendable.fetch_add(prefixes as u64, Ordering::Relaxed);
            warn!(peer = %self.task.key, %error, prefixes, "routes cannot be sent");
        }
        self.flush(id, now);
    }
}

async fn join(dial: &mut Option<JoinHandle<Result<TcpStream, DialError>>>) -> Result<TcpStream, DialError> {
    let Some(handle) = dial else { return pending().await };
    let outcome = handle.await;
    *dial = None;
    match outcome {
        Ok(outcome) => outcome,
        // It ends otherwise only when the runtime does.
        Err(_) => pending().await,
    }
}

async fn taken(routes: &mut Option<mpsc::Receiver<Batch>>) -> Option<Batch> {
    let batch = match routes {
        Some(routes) => routes.recv().await,
        None => pending().await,
    };
    if batch.is_none() {
        // The RIB is gone with the speaker.
        *routes = None;
    }
    batch
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}
