//! The task that owns the RIB: nobody else touches it, so nobody waits for a lock.
//!
//! Peers send it what they hear and take from it what is due to them, a batch at a time. Beside the
//! RIB it keeps what depends on time: routes of peers that restart (RFC 4724 section 4.2), and this
//! node's own restart (section 4.1).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::Advertisement;
use super::config::SpeakerConfig;
use super::watch;
use crate::fsm::{Initiative, Pause};
use crate::message::{
    AfiSafi, Cease, Families, Notification, NotificationError, RefreshKind, RouteRefresh, Update,
};
use crate::peer::{Batch, Board, Command, FromPeer};
use crate::policy::LocalAddresses;
use crate::rib::{LimitEvent, PeerId, PeerOptions, Rib, Session};
use crate::session::Negotiated;

/// Prefixes that go to a peer together at most. More pack better into messages.
const BATCH: usize = 1024;
/// Arrivals that are taken in before anything goes out, so that many changes are told once.
const BURST: usize = 64;
/// Prefixes given to the watchers at once.
const CHANGES: usize = 4096;
/// Wait for peers' first routes where no restart is configured.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest wait for a peer that has to connect by itself.
const PASSIVE_PATIENCE: Duration = Duration::from_secs(10);

/// What the speaker tells the task.
pub(super) enum Control {
    Add {
        number: u32,
        options: Box<PeerOptions>,
        initiative: Initiative,
        restart_after: Option<Duration>,
        commands: mpsc::UnboundedSender<Command>,
        board: Arc<Board>,
    },
    Change {
        number: u32,
        options: Box<PeerOptions>,
        restart_after: Option<Duration>,
    },
    /// All peers that are wanted now are known.
    PeersSet,
    /// Routes of this node; `all`: and no others.
    Originate {
        all: bool,
        advertisements: Vec<Advertisement>,
    },
    Withdraw(Vec<(IpNet, u32)>),
    Watch(Arc<watch::Board>),
    Look(Box<dyn FnOnce(&mut Rib) + Send>),
    Stop,
}

pub(super) struct Table {
    rib: Rib,
    control: mpsc::UnboundedReceiver<Control>,
    inbox: mpsc::Receiver<(u32, FromPeer)>,
    peers: BTreeMap<u32, Peer>,
    originated: BTreeSet<(IpNet, u32)>,
    /// Whether the routes of this node are all there.
    originates: bool,
    convergence: Convergence,
    watchers: Vec<Arc<watch::Board>>,
    addresses: LocalAddresses,
    stale_time: Duration,
    started: Instant,
}

struct Peer {
    id: PeerId,
    commands: mpsc::UnboundedSender<Command>,
    board: Arc<Board>,
    passive: bool,
    restart_after: Option<Duration>,
    first: First,
    session: Option<Established>,
    /// When routes from before the peer's restart are given up.
    stale_until: Option<Instant>,
}

/// A peer's first routes, for which decisions after a restart of this node wait.
#[derive(Clone, Copy)]
enum First {
    /// It was not there yet.
    Expected,
    /// Its session is up; families whose End-of-RIB has not come.
    Coming(Families),
    /// Not waited for: it is through, or is not there.
    Settled,
}

/// A session that is up.
struct Established {
    negotiated: Box<Negotiated>,
    routes: mpsc::Sender<Batch>,
    /// Families whose End-of-RIB the peer has not got.
    end_of_rib: Families,
    refresh_begins: Families,
    refresh_ends: Families,
    /// The peer was told to go: what it still sends is not looked at.
    ending: bool,
}

/// Waiting for the first routes of the peers that are there.
struct Convergence {
    patience: Duration,
    /// This process took over from another, whose routes the kernel and the peers still have.
    restarting: Arc<AtomicBool>,
    wait: Wait,
}

enum Wait {
    /// For the peers to be known.
    Peers,
    /// For first routes, until then; passive peers have less time to connect.
    Routes { until: Instant, passive_until: Instant },
    /// No more.
    Over,
}

impl Wait {
    /// How long a peer is waited for.
    fn until(&self, peer: &Peer) -> Option<Instant> {
        let Self::Routes { until, passive_until } = self else { return None };
        match peer.first {
            First::Expected if peer.passive => Some(*passive_until),
            First::Expected | First::Coming(_) => Some(*until),
            First::Settled => None,
        }
    }
}

impl Table {
    pub(super) fn new(
        config: &SpeakerConfig,
        restarting: Arc<AtomicBool>,
        control: mpsc::UnboundedReceiver<Control>,
        inbox: mpsc::Receiver<(u32, FromPeer)>,
    ) -> Self {
        let cluster_id = config.cluster_id.unwrap_or(config.router_id);
        Self {
            rib: Rib::new(config.asn, config.router_id, cluster_id, config.decision),
            control,
            inbox,
            peers: BTreeMap::new(),
            originated: BTreeSet::new(),
            originates: false,
            convergence: Convergence {
                patience: config.restart.map_or(PATIENCE, |restart| restart.deferral),
                restarting,
                wait: Wait::Peers,
            },
            watchers: Vec::new(),
            addresses: config.addresses,
            stale_time: config.stale_time,
            started: Instant::now(),
        }
    }

    /// Runs until told to stop, or until the speaker is gone.
    pub(super) async fn run(mut self) {
        loop {
            let deadline = self.deadline();
            let mut first = tokio::select! {
                biased;
                control = self.control.recv() => match control {
                    None | Some(Control::Stop) => break,
                    Some(control) => {
                        self.control(control);
                        None
                    }
                },
                Some(arrival) = self.inbox.recv() => Some(arrival),
                () = sleep_until(deadline) => None,
            };
            for _ in 0..BURST {
                let next = first.take().or_else(|| self.inbox.try_recv().ok());
                if self.take_controls().is_break() {
                    return self.close();
                }
                let Some((number, arrival)) = next else { break };
                self.arrival(number, arrival);
            }
            self.expire(Instant::now());
            self.deliver();
        }
        self.close();
    }

    /// Takes in what the speaker said until now; broken off by its end. An arrival is looked at after this: a
    /// peer speaks only once it was added, but the two queues do not tell which came first.
    fn take_controls(&mut self) -> ControlFlow<()> {
        while let Ok(control) = self.control.try_recv() {
            if matches!(control, Control::Stop) {
                return ControlFlow::Break(());
            }
            self.control(control);
        }
        ControlFlow::Continue(())
    }

    fn close(self) {
        for watcher in &self.watchers {
            watcher.close();
        }
    }

    fn control(&mut self, control: Control) {
        match control {
            Control::Add { number, options, initiative, restart_after, commands, board } => {
                let id = self.rib.add_peer(*options);
                board.identify(id);
                let passive = initiative == Initiative::Passive;
                // Only those that are wanted from the start are waited for.
                let expected = matches!(self.convergence.wait, Wait::Peers);
                let first = if expected { First::Expected } else { First::Settled };
                let (session, stale_until) = (None, None);
                let peer = Peer { id, commands, board, passive, restart_after, first, session, stale_until };
                self.peers.insert(number, peer);
            }
            Control::Change { number, options, restart_after } => {
                if let Some(peer) = self.peers.get_mut(&number) {
                    peer.restart_after = restart_after;
                    self.rib.set_peer(peer.id, *options);
                }
            }
            Control::PeersSet => self.await_routes(Instant::now()),
            Control::Originate { all, advertisements } => self.originate(all, &advertisements),
            Control::Withdraw(routes) => {
                for (prefix, path) in routes {
                    self.withdraw(prefix.trunc(), path);
                }
            }
            Control::Watch(board) => self.watch(board),
            Control::Look(look) => look(&mut self.rib),
            // Seen by the loop.
            Control::Stop => {}
        }
    }

    fn now(&self) -> u32 {
        // A process that runs for 136 years may see its routes as young.
        u32::try_from(self.started.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    fn originate(&mut self, all: bool, advertisements: &[Advertisement]) {
        let now = self.now();
        let key = |advertisement: &Advertisement| (advertisement.prefix.trunc(), advertisement.path);
        if all {
            let wanted: BTreeSet<(IpNet, u32)> = advertisements.iter().map(key).collect();
            let gone: Vec<_> = self.originated.difference(&wanted).copied().collect();
            for (prefix, path) in gone {
                self.withdraw(prefix, path);
            }
            self.originates = true;
        }
        for advertisement in advertisements {
            let (prefix, path) = key(advertisement);
            self.originated.insert((prefix, path));
            self.rib.originate(prefix, path, &advertisement.attributes, advertisement.tag, now);
        }
    }

    fn withdraw(&mut self, prefix: IpNet, path: u32) {
        if self.originated.remove(&(prefix, path)) {
            self.rib.withdraw(prefix, path);
        }
    }

    fn watch(&mut self, board: Arc<watch::Board>) {
        // What is held back has not been taken from the RIB, and comes with the rest.
        if !self.is_deferring() {
            for family in AfiSafi::SUPPORTED {
                board.put(self.rib.routes(family));
            }
        }
        if matches!(self.convergence.wait, Wait::Over) {
            board.complete(Families::ALL);
        }
        self.watchers.push(board);
    }

    fn arrival(&mut self, number: u32, arrival: FromPeer) {
        match arrival {
            FromPeer::Up { negotiated, local, routes } => self.up(number, negotiated, local, routes),
            FromPeer::Updates(updates) => self.updates(number, &updates),
            FromPeer::Refresh(refresh) => self.refresh(number, refresh),
            // What is due is looked for after every arrival.
            FromPeer::Taken => {}
            FromPeer::Down { retain } => self.down(number, retain),
            FromPeer::Forget => self.forget(number),
            FromPeer::Failed => self.settled(number),
            FromPeer::Gone => {
                if let Some(peer) = self.peers.remove(&number) {
                    self.rib.remove_peer(peer.id);
                }
                self.converge(Instant::now());
            }
        }
    }

    fn up(
        &mut self,
        number: u32,
        negotiated: Box<Negotiated>,
        local: Option<SocketAddr>,
        routes: mpsc::Sender<Batch>,
    ) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        let codec = &negotiated.codec;
        let families = codec.families;
        let session = Session {
            asn: negotiated.peer_asn,
            router_id: negotiated.peer_router_id,
            addresses: session_addresses(self.addresses, local),
            families,
            add_path_receive: codec.add_path_receive,
            add_path_send: codec.add_path_send,
            extended_next_hop: codec.extended_next_hop,
        };
        self.rib.up(peer.id, session);
        // Routes of families that the peer did not go on forwarding are worth nothing (RFC 4724
        // section 4.2).
        let forwarding = negotiated.restart.map_or(Families::NONE, |restart| restart.forwarding);
        for family in families.iter().filter(|family| !forwarding.contains(*family)) {
            self.rib.sweep_stale(peer.id, family);
        }
        peer.stale_until = has_stale(&self.rib, peer.id).then(|| Instant::now() + self.stale_time);
        peer.board.keep_routes(peer.stale_until.is_some());
        // A peer that has just restarted itself waits for this node, and one that knows no graceful
        // restart does not say when it is through.
        let awaited = match negotiated.restart {
            Some(restart) if !restart.restarted => families,
            _ => Families::NONE,
        };
        peer.session = Some(Established {
            negotiated,
            routes,
            end_of_rib: families,
            refresh_begins: Families::NONE,
            refresh_ends: Families::NONE,
            ending: false,
        });
        if awaited.is_empty() {
            self.settled(number);
        } else if let First::Expected = peer.first {
            // Also where not all peers are known yet: this one may be through before they are.
            peer.first = First::Coming(awaited);
        }
    }

    fn updates(&mut self, number: u32, updates: &[Update]) {
        let now = self.now();
        let Some(peer) = self.peers.get_mut(&number) else { return };
        let Some(session) = peer.session.as_mut().filter(|session| !session.ending) else { return };
        let mut ended = Families::NONE;
        for update in updates {
            for event in self.rib.receive(peer.id, update, now) {
                if !event.is_exceeded() {
                    warn!(peer = %peer.board.key(), %event, "near the limit");
                    continue;
                }
                warn!(peer = %peer.board.key(), %event, "limit exceeded, the session ends");
                session.ending = true;
                // A task that has ended needs no end.
                let _ = peer.commands.send(end_at(event, peer.restart_after));
                break;
            }
            if session.ending {
                return;
            }
            if let Some(family) = update.end_of_rib {
                self.rib.sweep_stale(peer.id, family);
                ended.insert(family);
            }
        }
        if ended.is_empty() {
            return;
        }
        if !has_stale(&self.rib, peer.id) {
            peer.stale_until = None;
            peer.board.keep_routes(false);
        }
        if let First::Coming(families) = &mut peer.first {
            ended.iter().for_each(|family| families.remove(family));
            if families.is_empty() {
                self.settled(number);
            }
        }
    }

    fn refresh(&mut self, number: u32, refresh: RouteRefresh) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        let Some(session) = peer.session.as_mut() else { return };
        let (family, codec) = (refresh.family, &session.negotiated.codec);
        if !codec.families.contains(family) {
            return;
        }
        match refresh.kind {
            RefreshKind::Request => {
                self.rib.refresh(peer.id, family);
                session.refresh_begins.insert(family);
                session.refresh_ends.insert(family);
            }
            RefreshKind::Begin if codec.enhanced_refresh => self.rib.mark_stale(peer.id, family),
            RefreshKind::End if codec.enhanced_refresh => self.rib.sweep_stale(peer.id, family),
            _ => {}
        }
    }

    fn down(&mut self, number: u32, retain: bool) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        let Some(session) = peer.session.take() else { return };
        let restart = session.negotiated.restart.filter(|_| retain);
        let keep = restart.map_or(Families::NONE, |restart| restart.families);
        self.rib.down(peer.id, keep);
        peer.stale_until =
            restart.filter(|_| has_stale(&self.rib, peer.id)).map(|restart| Instant::now() + restart.time);
        peer.board.keep_routes(peer.stale_until.is_some());
        self.settled(number);
    }

    /// The path to a peer that restarts is broken: so are its routes.
    fn forget(&mut self, number: u32) {
        if let Some(peer) = self.peers.get_mut(&number)
            && peer.stale_until.is_some()
        {
            give_up(&mut self.rib, peer);
        }
    }

    /// Begins to wait for the first routes of the peers that are known now.
    fn await_routes(&mut self, now: Instant) {
        if !matches!(self.convergence.wait, Wait::Peers) {
            return;
        }
        let until = now + self.convergence.patience;
        self.convergence.wait = Wait::Routes { until, passive_until: until.min(now + PASSIVE_PATIENCE) };
        self.converge(now);
    }

    /// A peer is not waited for any more: it is through, or not there.
    fn settled(&mut self, number: u32) {
        if let Some(peer) = self.peers.get_mut(&number) {
            peer.first = First::Settled;
            self.converge(Instant::now());
        }
    }

    fn converge(&mut self, now: Instant) {
        let wait = &self.convergence.wait;
        if !matches!(wait, Wait::Routes { .. }) {
            return;
        }
        let mut awaited = false;
        for peer in self.peers.values_mut() {
            match wait.until(peer) {
                Some(until) if until > now => awaited = true,
                Some(_) => peer.first = First::Settled,
                None => {}
            }
        }
        if awaited {
            return;
        }
        info!("the first routes of all peers that are there have come");
        self.convergence.wait = Wait::Over;
        self.convergence.restarting.store(false, Ordering::Relaxed);
        self.inform();
        for watcher in &self.watchers {
            watcher.complete(Families::ALL);
        }
    }

    /// Whether what this node decides is held back: it restarted, and does not know all yet.
    fn is_deferring(&self) -> bool {
        self.convergence.restarting.load(Ordering::Relaxed)
    }

    fn deadline(&self) -> Option<Instant> {
        let wait = &self.convergence.wait;
        self.peers.values().flat_map(|peer| [peer.stale_until, wait.until(peer)]).flatten().min()
    }

    fn expire(&mut self, now: Instant) {
        for peer in self.peers.values_mut() {
            if peer.stale_until.is_none_or(|until| until > now) {
                continue;
            }
            give_up(&mut self.rib, peer);
        }
        self.converge(now);
    }

    /// Gives everybody what is due.
    fn deliver(&mut self) {
        let complete = self.originates && !self.is_deferring();
        for peer in self.peers.values_mut() {
            if let Some(session) = &mut peer.session {
                session.deliver(&mut self.rib, peer.id, complete);
            }
            for family in AfiSafi::SUPPORTED {
                if let Some(counts) = self.rib.counts(peer.id, family) {
                    peer.board.set_prefixes(family, counts);
                }
            }
        }
        if !self.is_deferring() {
            self.inform();
        }
    }

    /// Tells the watchers what changed.
    fn inform(&mut self) {
        // A watch that was dropped leaves this the only holder of its board.
        self.watchers.retain(|watcher| Arc::strong_count(watcher) > 1);
        loop {
            let changes = self.rib.take_changes(CHANGES);
            if changes.is_empty() {
                return;
            }
            if let Some((last, others)) = self.watchers.split_last() {
                for watcher in others {
                    watcher.put(changes.iter().cloned());
                }
                last.put(changes);
            }
        }
    }
}

impl Established {
    /// Hands the peer batches as long as it takes them. `complete`: what it hears is all there is.
    fn deliver(&mut self, rib: &mut Rib, id: PeerId, complete: bool) {
        let families = self.negotiated.codec.families;
        loop {
            let pending = |rib: &Rib| -> Families {
                families.iter().filter(|family| rib.is_pending(id, *family)).collect()
            };
            let ends = |rib: &Rib, due: Families| -> Families {
                let pending = pending(rib);
                due.iter().filter(|family| !pending.contains(*family)).collect()
            };
            let end_of_rib = if complete { self.end_of_rib } else { Families::NONE };
            let nothing = pending(rib).is_empty()
                && self.refresh_begins.is_empty()
                && ends(rib, end_of_rib.or(self.refresh_ends)).is_empty();
            // Full, or the peer is just going away.
            let Ok(room) = (if nothing { return } else { self.routes.try_reserve() }) else { return };
            let update = rib.advertise(id, BATCH);
            let batch = Batch {
                refresh_begins: self.refresh_begins,
                withdrawn: update.withdrawn,
                announced: update.announced,
                end_of_rib: ends(rib, end_of_rib),
                refresh_ends: ends(rib, self.refresh_ends),
            };
            if batch.is_empty() {
                // Nothing of all that was looked at has to be told.
                continue;
            }
            self.refresh_begins = Families::NONE;
            batch.end_of_rib.iter().for_each(|family| self.end_of_rib.remove(family));
            batch.refresh_ends.iter().for_each(|family| self.refresh_ends.remove(family));
            room.send(batch);
        }
    }
}

/// Lets go of what was kept from before a peer's restart.
fn give_up(rib: &mut Rib, peer: &mut Peer) {
    info!(peer = %peer.board.key(), "routes from before the peer's restart are given up");
    for family in AfiSafi::SUPPORTED {
        rib.sweep_stale(peer.id, family);
    }
    peer.stale_until = None;
    peer.board.keep_routes(false);
}

/// Whether a peer has routes from before its restart.
fn has_stale(rib: &Rib, id: PeerId) -> bool {
    AfiSafi::SUPPORTED.into_iter().any(|family| rib.counts(id, family).is_some_and(|counts| counts.stale > 0))
}

/// How a session ends that met a limit.
fn end_at(event: LimitEvent, restart_after: Option<Duration>) -> Command {
    let (notification, pause) = match event {
        LimitEvent::RoutesExceeded { family, limit } => {
            // Family and limit, as RFC 4486 section 4 has it.
            let [high, low] = family.afi().to_be_bytes();
            let mut data = vec![high, low, family.safi()];
            data.extend(limit.to_be_bytes());
            let error = NotificationError::Cease(Cease::MaximumPrefixes);
            (Notification::with_data(error, data), restart_after.map_or(Pause::UntilStarted, Pause::For))
        }
        _ => (Notification::cease(Cease::OutOfResources), restart_after.map_or(Pause::Growing, Pause::For)),
    };
    Command::Abort { notification, why: event.to_string(), pause }
}

/// This node's addresses on a session: that of the session itself for its family.
fn session_addresses(node: LocalAddresses, local: Option<SocketAddr>) -> LocalAddresses {
    let mut addresses = node;
    match local.map(|local| local.ip()) {
        Some(IpAddr::V4(address)) => addresses.v4 = Some(address),
        Some(IpAddr::V6(address)) if address.is_unicast_link_local() => addresses.link_local = Some(address),
        Some(IpAddr::V6(address)) => {
            (addresses.v6, addresses.link_local) = (Some(address), None);
        }
        None => {}
    }
    addresses
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
