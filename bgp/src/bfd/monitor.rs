//! The thread that keeps BFD sessions: one for all of them, with the sockets.
//!
//! It is a thread of its own, not a task among others, so that detection does not depend on how busy the
//! runtime is. After a pause of any kind it empties its sockets before it lets time pass: packets
//! that wait there were heard.
//!
//! A socket for each local address and port receives (opened with the first session that needs it, closed
//! with the last); each session sends from a port of its own, as RFC 5881 section 4 demands.

mod socket;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Poll, Token, Waker};
use tokio::sync::watch;

use self::socket::{Listener, Speaker};
use super::packet::{Diagnostic, Discriminator, State};
use super::session::{DownReason, Event, Timers};
use super::table::{Counters, Discard, PeerConfig, PeerKey, Table};

const WAKE: Token = Token(0);
/// Packets taken from one socket before timers get their turn.
const BURST: usize = 64;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorConfig {
    /// Local addresses to receive on. Unspecified addresses stand for all of their family; a family without
    /// address has no sessions.
    pub listen: Vec<IpAddr>,
}

impl Default for MonitorConfig {
    /// All addresses.
    fn default() -> Self {
        Self { listen: vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()] }
    }
}

/// Why a session cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The thread did not start.
    #[error("cannot start the BFD thread: {0}")]
    Start(#[source] io::Error),
    /// The thread has ended.
    #[error("the BFD thread has ended")]
    Ended,
    /// The port is not to be had.
    #[error("cannot receive BFD packets on {address}: {source}; another BFD daemon may hold the port")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No port to send from.
    #[error("cannot send BFD packets to {peer}: {source}")]
    Speak {
        /// To whom.
        peer: IpAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no local address of the peer's family.
    #[error("no address to receive BFD packets from {peer} on: none of its family is configured")]
    Family {
        /// From whom.
        peer: IpAddr,
    },
    /// There is such a session already.
    #[error("there is a BFD session with {peer} already")]
    Duplicate {
        /// With whom.
        peer: IpAddr,
    },
}

/// A session as its client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Our state.
    pub state: State,
    /// Why it is no longer up; none before it was up for the first time, and while it is.
    pub down: Option<DownReason>,
    /// Whether the peer's BFD outlives its control plane: then a lost session is a broken path even while
    /// the peer restarts (RFC 5882 section 4.3).
    pub peer_is_independent: bool,
    /// When it became so.
    pub since: Instant,
}

/// Everything about a session, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// With whom.
    pub key: PeerKey,
    /// Our state.
    pub state: State,
    /// The peer's state.
    pub remote_state: State,
    /// Why we last went down.
    pub diagnostic: Diagnostic,
    /// Why the peer says it last went down.
    pub remote_diagnostic: Diagnostic,
    /// After this time without packets the peer counts as lost.
    pub detection_time: Duration,
    /// Packets and changes.
    pub counters: Counters,
}

enum Command {
    Add(PeerConfig, Sender<Result<Added, MonitorError>>),
    Remove(Discriminator),
    SetTimers(Discriminator, Timers),
    SetAdminDown(Discriminator, bool),
    Report(Sender<Vec<Report>>),
    /// Close all, and end when the peers have been told.
    Stop,
}

struct Added {
    discriminator: Discriminator,
    status: watch::Receiver<Status>,
}

/// Sends commands and wakes the thread.
#[derive(Debug, Clone)]
struct Line {
    commands: Sender<Command>,
    waker: Arc<Waker>,
}

impl Line {
    fn send(&self, command: Command) -> Result<(), MonitorError> {
        self.commands.send(command).map_err(|_| MonitorError::Ended)?;
        // A failing wake-up means that the poll is gone, and with it the thread.
        self.waker.wake().map_err(|_| MonitorError::Ended)
    }
}

/// BFD sessions. When it is dropped they end without a word, as if the process had died; see
/// [`Monitor::stop`].
#[derive(Debug)]
pub struct Monitor {
    line: Line,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts the thread. It opens no socket until there is a session.
    ///
    /// # Errors
    ///
    /// [`MonitorError::Start`] when the system gives no thread or no poll.
    pub fn start(config: MonitorConfig) -> Result<Self, MonitorError> {
        let poll = Poll::new().map_err(MonitorError::Start)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).map_err(MonitorError::Start)?);
        let (commands, inbox) = mpsc::channel();
        let run = move || {
            Loop {
                poll,
                inbox,
                config,
                table: Table::default(),
                listeners: HashMap::new(),
                clients: HashMap::new(),
                next_token: WAKE.0 + 1,
                stopping: false,
            }
            .run();
        };
        let thread = thread::Builder::new().name("bfd".into()).spawn(run).map_err(MonitorError::Start)?;
        Ok(Self { line: Line { commands, waker }, thread: Some(thread) })
    }

    /// Keeps a session until the handle is dropped. Waits for the thread to open its sockets.
    ///
    /// # Errors
    ///
    /// [`MonitorError`] when there are no sockets for it, or such a session already.
    pub fn watch(&self, config: PeerConfig) -> Result<SessionHandle, MonitorError> {
        let (reply, answer) = mpsc::channel();
        self.line.send(Command::Add(config, reply))?;
        let Added { discriminator, status } = answer.recv().map_err(|_| MonitorError::Ended)??;
        Ok(SessionHandle { line: self.line.clone(), discriminator, status })
    }

    /// All sessions, those that are being closed included.
    ///
    /// # Errors
    ///
    /// [`MonitorError::Ended`] when the thread has ended.
    pub fn reports(&self) -> Result<Vec<Report>, MonitorError> {
        let (reply, answer) = mpsc::channel();
        self.line.send(Command::Report(reply))?;
        answer.recv().map_err(|_| MonitorError::Ended)
    }

    /// Tells all peers that the sessions end on purpose, for as long as they need to hear it (the longest
    /// detection time), and ends the thread. Peers then do not take the path for broken: so a planned
    /// restart does not cost the routes that graceful restart keeps (RFC 5882 section 4.3).
    pub fn stop(mut self) {
        if self.line.send(Command::Stop).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// A session that is kept while this is.
#[derive(Debug)]
pub struct SessionHandle {
    line: Line,
    discriminator: Discriminator,
    status: watch::Receiver<Status>,
}

impl SessionHandle {
    /// The session's status, always the latest: wait for changes with [`watch::Receiver::changed`]. A
    /// change that is undone before anybody looks is seen by [`Status::since`].
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Takes other timers; the session stays up.
    ///
    /// # Errors
    ///
    /// [`MonitorError::Ended`] when the thread has ended.
    pub fn set_timers(&self, timers: Timers) -> Result<(), MonitorError> {
        self.line.send(Command::SetTimers(self.discriminator, timers))
    }

    /// Holds the session down on purpose, or lets it go.
    ///
    /// # Errors
    ///
    /// [`MonitorError::Ended`] when the thread has ended.
    pub fn set_admin_down(&self, down: bool) -> Result<(), MonitorError> {
        self.line.send(Command::SetAdminDown(self.discriminator, down))
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        // If the thread has ended, so has the session.
        let _ = self.line.send(Command::Remove(self.discriminator));
    }
}

/// What the thread keeps for a session beside the protocol.
struct Client {
    speaker: Speaker,
    status: watch::Sender<Status>,
    listeners: Vec<SocketAddr>,
}

struct Loop {
    poll: Poll,
    inbox: Receiver<Command>,
    config: MonitorConfig,
    table: Table,
    listeners: HashMap<SocketAddr, (Token, Listener)>,
    clients: HashMap<Discriminator, Client>,
    next_token: usize,
    stopping: bool,
}

impl Loop {
    fn run(&mut self) {
        let mut events = mio::Events::with_capacity(64);
        let mut more = false;
        loop {
            let now = Instant::now();
            let wait = match self.table.deadline() {
                _ if more => Some(Duration::ZERO),
                Some(deadline) => Some(deadline.saturating_duration_since(now)),
                None => None,
            };
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The poll's descriptor is ours alone: this cannot get better.
                Err(_) => return,
            }
            if !self.obey(Instant::now()) {
                return;
            }
            // All sockets, not only those that were reported: it is few, and what waits must be heard
            // before time is let pass.
            more = false;
            let now = Instant::now();
            for (_, listener) in self.listeners.values() {
                let table = &mut self.table;
                more |= listener.receive(BURST, |bytes, received| {
                    let outcome = table.receive(bytes, received, now);
                    note(outcome);
                });
            }
            let clients = &self.clients;
            self.table.run(now, |discriminator, _, packet| {
                if let Some(client) = clients.get(&discriminator) {
                    client.speaker.send(&packet.encode());
                }
            });
            self.publish(now);
            self.clear_away();
            if self.stopping && self.table.is_empty() {
                return;
            }
        }
    }

    /// Carries out what was asked; `false` when nobody can ask any more.
    fn obey(&mut self, now: Instant) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Add(config, reply)) => {
                    let outcome = self.add(config, now);
                    let added = outcome.as_ref().ok().map(|added| added.discriminator);
                    if reply.send(outcome).is_err()
                        && let Some(discriminator) = added
                    {
                        self.table.close(discriminator, now);
                    }
                }
                Ok(Command::Remove(discriminator)) => self.table.close(discriminator, now),
                Ok(Command::SetTimers(discriminator, timers)) => self.table.set_timers(discriminator, timers),
                Ok(Command::SetAdminDown(discriminator, down)) => {
                    self.table.set_admin_down(discriminator, down);
                }
                Ok(Command::Report(reply)) => {
                    // Whoever asked may have stopped waiting.
                    let _ = reply.send(self.reports());
                }
                Ok(Command::Stop) => {
                    self.stopping = true;
                    let all: Vec<Discriminator> = self.table.discriminators().collect();
                    all.into_iter().for_each(|discriminator| self.table.close(discriminator, now));
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn add(&mut self, config: PeerConfig, now: Instant) -> Result<Added, MonitorError> {
        let peer = config.key.peer;
        let listeners = self.listen(&config.key)?;
        let speaker = Speaker::open(&config.key).map_err(|source| MonitorError::Speak { peer, source })?;
        let discriminator = self.table.add(config, now).map_err(|_| MonitorError::Duplicate { peer })?;
        let begin = Status { state: State::Down, down: None, peer_is_independent: false, since: now };
        let (sender, status) = watch::channel(begin);
        self.clients.insert(discriminator, Client { speaker, status: sender, listeners });
        Ok(Added { discriminator, status })
    }

    /// Opens the sockets that packets of a session may arrive at.
    fn listen(&mut self, key: &PeerKey) -> Result<Vec<SocketAddr>, MonitorError> {
        let family = self.config.listen.iter().filter(|address| address.is_ipv4() == key.peer.is_ipv4());
        let addresses: Vec<SocketAddr> = family.map(|&address| SocketAddr::new(address, key.port)).collect();
        if addresses.is_empty() {
            return Err(MonitorError::Family { peer: key.peer });
        }
        for &address in &addresses {
            if self.listeners.contains_key(&address) {
                continue;
            }
            let token = Token(self.next_token);
            let open = || {
                let listener = Listener::open(address)?;
                self.poll.registry().register(&mut SourceFd(&listener.fd()), token, Interest::READABLE)?;
                Ok(listener)
            };
            let listener = open().map_err(|source| MonitorError::Listen { address, source })?;
            self.next_token += 1;
            self.listeners.insert(address, (token, listener));
        }
        Ok(addresses)
    }

    fn publish(&mut self, now: Instant) {
        while let Some((discriminator, event)) = self.table.event() {
            let Some((_, session, _)) = self.table.get(discriminator) else { continue };
            let status = Status {
                state: session.state(),
                down: match event {
                    Event::Up => None,
                    Event::Down(reason) => Some(reason),
                },
                peer_is_independent: session.remote_is_independent(),
                since: now,
            };
            if let Some(client) = self.clients.get(&discriminator) {
                client.status.send_replace(status);
            }
        }
    }

    /// Closes what no session needs any more.
    fn clear_away(&mut self) {
        if self.clients.len() == self.table.discriminators().count() {
            return;
        }
        let table = &self.table;
        self.clients.retain(|&discriminator, _| table.get(discriminator).is_some());
        let clients = &self.clients;
        let registry = self.poll.registry();
        self.listeners.retain(|address, (_, listener)| {
            let used = clients.values().any(|client| client.listeners.contains(address));
            if !used {
                // Closing the socket would do.
                let _ = registry.deregister(&mut SourceFd(&listener.fd()));
            }
            used
        });
    }

    fn reports(&self) -> Vec<Report> {
        let all = self.table.discriminators().filter_map(|discriminator| self.table.get(discriminator));
        all.map(|(config, session, counters)| Report {
            key: config.key,
            state: session.state(),
            remote_state: session.remote_state(),
            diagnostic: session.diagnostic(),
            remote_diagnostic: session.remote_diagnostic(),
            detection_time: session.detection_time(),
            counters,
        })
        .collect()
    }
}

/// Packets of strangers are no news: they are told at the lowest level only.
fn note(outcome: Result<Discriminator, Discard>) {
    if let Err(discard) = outcome {
        tracing::trace!(%discard, "BFD packet discarded");
    }
}

#[cfg(test)]
mod tests;
