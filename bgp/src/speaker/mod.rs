//! The speaker: the public face of this crate.
//!
//! ```text
//!   set_peers, set_advertisements, stop            status, events, watch
//!        |                                                ^
//!        v                                                |
//!   Speaker ------------------ commands ---------> table task: the RIB, one owner, no lock
//!        |                                          ^   |                 ^    |
//!        | commands            routes, in batches   |   | batch of what   |    |
//!        v                     that wait their turn |   v a peer has yet  |    v
//!   peer task (one for each peer): state machine, sockets, timers        peer task ...
//!        ^            ^
//!        | accepted   | dialed
//!   listeners       transport
//! ```
//!
//! Whoever wants something says all of it: all peers, all advertisements, all addresses. What did
//! not change is not touched.

mod config;
mod detect;
mod listen;
mod table;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::{info, warn};

pub use config::{RestartConfig, SpeakerConfig, StartError};
pub use listen::ListenerStatus;
pub use watch::{Changes, Watch};

use crate::fsm::Shutdown;
use crate::message::{Attributes, Families};
use crate::peer::{
    Board, Command, ConfigError, ConfigFlaw, FromPeer, Identity, PeerConfig, PeerEvent, PeerKey, PeerStatus,
    Task,
};
use crate::rib::Rib;
use detect::Detector;
use listen::{Directory, Listeners};
use table::{Control, Table};

/// Session changes that a slow reader may miss.
const EVENTS: usize = 256;
/// Batches from all peers that wait for the RIB.
const INBOX: usize = 64;
/// How long peers may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// A route that this node originates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertisement {
    /// Where it leads.
    pub prefix: IpNet,
    /// Tells several paths to one prefix apart (RFC 7911); 0 is the usual.
    pub path: u32,
    /// What is said of it. An unspecified next hop stands for this node's address on each session.
    pub attributes: Arc<Attributes>,
    /// For policies: what kind of route it is.
    pub tag: u16,
}

/// A running speaker. Clones are handles to the same one; it stops when [`Speaker::stop`] is called,
/// or without a word to its peers when all handles are gone.
#[derive(Debug, Clone)]
pub struct Speaker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    identity: Arc<Identity>,
    directory: Arc<Directory>,
    listeners: Listeners,
    detector: Arc<Detector>,
    peers: Mutex<BTreeMap<PeerKey, Peer>>,
    /// Numbers peers for the RIB's task.
    peers_ever: AtomicU32,
    control: mpsc::UnboundedSender<Control>,
    inbox: mpsc::Sender<(u32, FromPeer)>,
    events: broadcast::Sender<PeerEvent>,
    table: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Peer {
    config: PeerConfig,
    number: u32,
    commands: mpsc::UnboundedSender<Command>,
    board: Arc<Board>,
    task: JoinHandle<()>,
    /// Keeps the BFD session.
    detection: Option<JoinHandle<()>>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(detection) = &self.detection {
            detection.abort();
        }
    }
}

impl Speaker {
    /// Starts a speaker without peers. Must be called within a tokio runtime. An address that cannot
    /// be listened on is no error here: it is tried again, and [`Speaker::listeners`] says why.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn start(config: SpeakerConfig) -> Result<Self, StartError> {
        config.check()?;
        let restarting = Arc::new(AtomicBool::new(config.restart.is_some_and(|restart| restart.restarted)));
        let identity = Arc::new(Identity {
            restarting: restarting.clone(),
            asn: config.asn,
            router_id: config.router_id,
            host: config.host.clone(),
            restart: config.promise(),
        });
        let directory = Arc::new(Directory::default());
        let listeners = Listeners::new(directory.clone());
        listeners.set(&config.listen);
        let (control, commands) = mpsc::unbounded_channel();
        let (inbox, arrivals) = mpsc::channel(INBOX);
        let (events, _) = broadcast::channel(EVENTS);
        let table = Table::new(&config, restarting, commands, arrivals);
        let table = tokio::spawn(table.run());
        let inner = Inner {
            identity,
            directory,
            listeners,
            detector: Arc::default(),
            peers: Mutex::default(),
            peers_ever: AtomicU32::new(0),
            control,
            inbox,
            events,
            table: Mutex::new(Some(table)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Listens on these addresses and no others.
    pub fn set_listen(&self, addresses: &[SocketAddr]) {
        self.inner.listeners.set(addresses);
    }

    /// Has these peers and no others. A peer that did not change is not touched; one of which only
    /// policies, limits or the description changed keeps its session. A peer that cannot be is
    /// reported and left as it was, the others go on.
    pub fn set_peers(&self, wanted: Vec<PeerConfig>) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let mut peers = lock(&self.inner.peers);
        let own = self.inner.listeners.addresses();
        let mut seen = BTreeSet::new();
        for config in wanted {
            let key = config.key.clone();
            let mut flaws = config.flaws();
            if own.contains(&SocketAddr::new(key.address, config.port)) {
                flaws.push(ConfigFlaw::Itself);
            }
            if !seen.insert(key.clone()) {
                flaws.push(ConfigFlaw::Duplicate);
            }
            if !flaws.is_empty() {
                errors.extend(flaws.into_iter().map(|flaw| ConfigError { key: key.clone(), flaw }));
                continue;
            }
            match peers.get_mut(&key) {
                Some(peer) if peer.config == config => {}
                Some(peer) => self.change(peer, config),
                None => {
                    let peer = self.add(config);
                    peers.insert(key, peer);
                }
            }
        }
        let gone: Vec<PeerKey> = peers.keys().filter(|key| !seen.contains(*key)).cloned().collect();
        for key in gone {
            if let Some(peer) = peers.remove(&key) {
                info!(peer = %key, "peer removed");
                self.part(&peer, Shutdown::Deconfigured);
            }
        }
        self.inner.control(Control::PeersSet);
        errors
    }

    fn add(&self, config: PeerConfig) -> Peer {
        let inner = &self.inner;
        let key = config.key.clone();
        info!(peer = %key, asn = %config.asn, "peer added");
        let board = Arc::new(Board::new(key.clone()));
        let (commands, receiver) = mpsc::unbounded_channel();
        let number = inner.peers_ever.fetch_add(1, Ordering::Relaxed);
        inner.control(Control::Add {
            number,
            options: Box::new(config.routes.clone()),
            initiative: config.initiative,
            restart_after: config.restart_after_limit,
            commands: commands.clone(),
            board: board.clone(),
        });
        let task = Task {
            key: key.clone(),
            number,
            identity: inner.identity.clone(),
            config: config.clone(),
            board: board.clone(),
            commands: receiver,
            table: inner.inbox.clone(),
            events: inner.events.clone(),
        };
        let task = tokio::spawn(task.run());
        let mut peer = Peer { config, number, commands, board, task, detection: None };
        self.admit(&peer);
        self.detect(&mut peer);
        peer
    }

    /// Lets a peer's connections in, signed if they have to be.
    fn admit(&self, peer: &Peer) {
        let key = &peer.config.key;
        let outcome = self.inner.listeners.set_password(key.address, peer.config.password.as_ref());
        let mut directory = self.inner.directory.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = outcome {
            let text = format!(
                "connections from the peer are refused: the kernel does not take its TCP MD5 password: {error} \
                 (CONFIG_TCP_MD5SIG is needed)"
            );
            warn!(peer = %key, error = text);
            peer.board.fail(text);
            directory.remove(key);
        } else {
            directory.insert(key.clone(), peer.commands.clone());
        }
    }

    /// Keeps the BFD session that a peer's configuration asks for, and no other.
    fn detect(&self, peer: &mut Peer) {
        if let Some(old) = peer.detection.take() {
            old.abort();
            peer.board.set_path(None);
        }
        let detector = &self.inner.detector;
        peer.detection = peer
            .config
            .bfd
            .map(|bfd| detector.watch(&peer.config, bfd, peer.board.clone(), peer.commands.clone()));
    }

    fn change(&self, peer: &mut Peer, config: PeerConfig) {
        let old = std::mem::replace(&mut peer.config, config);
        let config = &peer.config;
        self.inner.control(Control::Change {
            number: peer.number,
            options: Box::new(config.routes.clone()),
            restart_after: config.restart_after_limit,
        });
        if old.password != config.password {
            self.admit(peer);
        }
        if (old.bfd, old.source) != (config.bfd, config.source) {
            self.detect(peer);
        }
        let config = &peer.config;
        // A task that has ended was stopped, and is not in the list.
        let _ = peer.commands.send(Command::Configure(Box::new(config.clone())));
        if old.routes.limits != config.routes.limits {
            // A peer that sent too much may try again.
            let _ = peer.commands.send(Command::Resume);
        }
    }

    fn part(&self, peer: &Peer, shutdown: Shutdown) {
        let key = &peer.config.key;
        self.inner.directory.write().unwrap_or_else(PoisonError::into_inner).remove(key);
        if peer.config.password.is_some()
            && let Err(error) = self.inner.listeners.set_password(key.address, None)
        {
            warn!(peer = %key, %error, "the TCP MD5 password of a peer that is gone stays with the listener");
        }
        let _ = peer.commands.send(Command::Stop(shutdown));
    }

    /// Advertises these routes and no others, to the peers that policies let them go to. Until this was
    /// called once, peers are not told that they have heard everything (End-of-RIB), so that a restart
    /// withdraws nothing.
    pub fn set_advertisements(&self, advertisements: Vec<Advertisement>) {
        self.inner.control(Control::Originate { all: true, advertisements });
    }

    /// Advertises these routes as well, or changes them.
    pub fn advertise(&self, advertisements: Vec<Advertisement>) {
        self.inner.control(Control::Originate { all: false, advertisements });
    }

    /// Advertises these routes no more: prefix and path.
    pub fn withdraw(&self, routes: Vec<(IpNet, u32)>) {
        self.inner.control(Control::Withdraw(routes));
    }

    /// Changes of the best routes, for whoever programs them.
    pub fn watch(&self) -> Watch {
        let (watch, board) = Watch::new();
        self.inner.control(Control::Watch(board));
        watch
    }

    /// Sessions that come up and go down, from now on.
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        self.inner.events.subscribe()
    }

    /// All peers as they are, by address.
    pub fn peers(&self) -> Vec<PeerStatus> {
        lock(&self.inner.peers).values().map(|peer| peer.board.read()).collect()
    }

    /// One peer as it is.
    pub fn peer(&self, key: &PeerKey) -> Option<PeerStatus> {
        lock(&self.inner.peers).get(key).map(|peer| peer.board.read())
    }

    /// Addresses to be listened on, and how that went.
    pub fn listeners(&self) -> Vec<ListenerStatus> {
        self.inner.listeners.status()
    }

    /// Looks into the RIB. `None` once the speaker has stopped.
    pub async fn rib<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Rib) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.inner.control(Control::Look(Box::new(move |rib| {
            // Whoever asked may have gone.
            let _ = sender.send(look(rib));
        })));
        answer.await.ok()
    }

    /// Ends a session and begins it again, with a text for the peer's operator; also ends a pause.
    /// Returns whether there is such a peer.
    pub fn reset(&self, key: &PeerKey, text: &str) -> bool {
        self.tell(key, Command::Reset(Shutdown::Reset(text.to_owned())))
    }

    /// Asks a peer for its routes again (RFC 2918). Returns whether there is such a peer.
    pub fn refresh(&self, key: &PeerKey, families: Families) -> bool {
        self.tell(key, Command::Refresh(families))
    }

    /// Ends a session, or forgets the routes kept for it, because somebody else found that the path to the
    /// peer is broken (RFC 9384). Returns whether there is such a peer.
    pub fn path_down(&self, key: &PeerKey, why: &str) -> bool {
        self.tell(key, Command::PathDown { why: why.to_owned(), independent: true, restarts: false })
    }

    fn tell(&self, key: &PeerKey, command: Command) -> bool {
        match lock(&self.inner.peers).get(key) {
            Some(peer) => peer.commands.send(command).is_ok(),
            None => false,
        }
    }

    /// Says goodbye to all peers and waits until they have heard it, for some seconds at most.
    /// [`Shutdown::Silent`] lets them keep routes and wait for the next start (RFC 4724).
    pub async fn stop(&self, shutdown: Shutdown) {
        self.inner.listeners.set(&[]);
        let peers = std::mem::take(&mut *lock(&self.inner.peers));
        for peer in peers.values() {
            self.part(peer, shutdown.clone());
        }
        let paths = self.inner.detector.clone().stop();
        let words = async {
            for (key, mut peer) in peers {
                if let Err(error) = (&mut peer.task).await {
                    warn!(peer = %key, %error, "the task of a peer failed");
                }
            }
        };
        if tokio::time::timeout(GOODBYE, async { tokio::join!(words, paths) }).await.is_err() {
            warn!("some peers did not hear the goodbye");
        }
        self.inner.control(Control::Stop);
        let table = lock(&self.inner.table).take();
        if let Some(table) = table {
            // It ends at the command above.
            let _ = table.await;
        }
    }

    /// The address of this node from which a peer is spoken to, where a session is up.
    pub fn local_address(&self, key: &PeerKey) -> Option<IpAddr> {
        Some(self.peer(key)?.local_address?.ip())
    }
}

impl Inner {
    fn control(&self, control: Control) {
        // After a stop nobody listens, and nothing is to be done.
        let _ = self.control.send(control);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is locked here is changed by single calls: a poisoned lock holds whole values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
