//! The thread of the control half: wakes, computes who the peers are and what they are told, and gives
//! it to the speaker, which compares. It writes nothing into the kernel.
//!
//! The speaker lives on the task runtime and goes on while this thread sleeps. What it is given is
//! said once and changed by differences: a Service costs its own addresses.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferroute_bgp::decision;
use ferroute_bgp::fsm::Shutdown;
use ferroute_bgp::message::Families;
use ferroute_bgp::peer::PeerKey;
use ferroute_bgp::policy::LocalAddresses;
use ferroute_bgp::speaker::{Advertisement, RestartConfig, Speaker, SpeakerConfig};
use ferroute_bgp::transport::Password;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::advertise::{self, Announcements, Claim, Difference};
use super::identity::{Identity, Reflection, identify};
use super::peers::{Peer, external, peers, read_passwords};
use super::policies::{Wishes, policies, wishes};
use super::settings::{ExternalPeer, Settings};
use super::view::{Known, Shared, View};
use crate::cluster::node::Node;
use crate::cluster::service::Problem;
use crate::cluster::{Dirty, Interests, Kind, ObjectKey, ServiceKey, State as ClusterState, Subscription};
use crate::host::Network;
use crate::host::route::{PROTOCOL, RouteFilter};
use crate::network::OwnAddresses;
use crate::network::node_address::{Addresses, Method, Purpose};
use crate::proxy::Programmed;
use crate::proxy::facts::Facts;
use crate::report::Reporter;

mod secrets;
mod sessions;

/// Longest sleep: sessions, listeners and the passwords file are looked at so often.
const LONGEST_SLEEP: Duration = Duration::from_secs(2);
/// How long arrivals gather while the first lists are on their way.
const LISTING_GATHER: Duration = Duration::from_millis(10);
/// Services computed under one lock of the cluster.
const STEP: usize = 512;
/// Kinds without which nothing may be decided.
const NEEDED: [Kind; 4] = Interests::ROUTES;
/// Paths that may share the traffic to a prefix.
const MAXIMUM_PATHS: u16 = 16;
/// How long neighbours have to move their traffic before a machine that goes takes its addresses back
/// (RFC 8326 section 4).
const DRAIN: Duration = Duration::from_secs(10);
/// The protocol number of learned routes, kube-router's.
const LEARNED: u8 = 17;

/// The room cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("routes need a task runtime: open the room inside one")]
pub struct NoRuntime;

/// The control half. [`Room::run`] is its thread.
pub struct Room {
    settings: Settings,
    subscription: Subscription,
    reporter: Reporter,
    shared: Arc<Shared>,
    runtime: Handle,
    /// This node's addresses as the pod network's room chooses them; `None` when all are the Node object's.
    own: Option<OwnAddresses>,
    /// What it chose when that was last looked at.
    chosen: Addresses,
    /// VIPs in the kernel; `None` when another program serves them.
    programmed: Option<Arc<Programmed>>,
    current: watch::Sender<Option<Speaker>>,
    speaker: Option<Speaker>,
    /// The kernel holds routes of a process before this one.
    restarted: bool,
    node: Option<Arc<Node>>,
    facts: Facts,
    identity: Option<Identity>,
    wishes: Wishes,
    external: Vec<ExternalPeer>,
    secrets: Option<Result<Vec<Option<Password>>, String>>,
    /// When Secrets were first asked for.
    secrets_since: Option<Instant>,
    /// When each peer began to be wanted.
    wanted: BTreeMap<PeerKey, Instant>,
    announcements: Announcements,
    /// The speaker has been told all that there is.
    complete: bool,
    /// What is known of this node gives it no part in BGP.
    nobody: bool,
    /// Since when the machine is going.
    draining: Option<Instant>,
    /// Addresses of Services are taken back because of it.
    drained: bool,
    /// Sessions changed since they were last looked at.
    sessions_changed: Arc<AtomicBool>,
    sessions_seen: Option<Instant>,
    session_problems: Vec<Problem>,
    /// Peers whose missing session was told.
    missing: BTreeSet<PeerKey>,
    /// What cannot be honoured, by Node, as computed from objects and flags.
    problems: BTreeMap<Arc<str>, Vec<Problem>>,
    /// Nodes of which something was told.
    told: BTreeSet<Arc<str>>,
    pending: Dirty,
    started: bool,
}

impl Room {
    /// Prepares the room; the speaker starts with [`Room::run`]. `programmed` are the VIPs of a service
    /// proxy in this process, `own` the addresses that the pod network's room chooses. Must be called inside
    /// a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`NoRuntime`].
    pub fn open(
        settings: Settings,
        subscription: Subscription,
        reporter: &Reporter,
        programmed: Option<Arc<Programmed>>,
        own: &OwnAddresses,
    ) -> Result<(Self, View), NoRuntime> {
        let runtime = Handle::try_current().map_err(|_| NoRuntime)?;
        let (current, receiver) = watch::channel(None);
        let (view, shared) = View::new(receiver, runtime.clone(), subscription.waker());
        if let Some(programmed) = &programmed {
            programmed.follow(subscription.waker());
        }
        let is_own = |purpose| *settings.addresses.of(purpose) != Method::KubernetesInternalIp;
        let own = [Purpose::Source, Purpose::NextHop].into_iter().any(is_own).then(|| own.clone());
        if let Some(own) = &own {
            own.follow(subscription.waker());
        }
        let room = Self {
            settings,
            subscription,
            reporter: reporter.room("routes"),
            shared,
            runtime,
            own,
            chosen: Addresses::new(),
            programmed,
            current,
            speaker: None,
            restarted: has_routes(),
            node: None,
            facts: Facts::default(),
            identity: None,
            wishes: Wishes::default(),
            external: Vec::new(),
            secrets: None,
            secrets_since: None,
            wanted: BTreeMap::new(),
            announcements: Announcements::default(),
            complete: false,
            nobody: false,
            draining: None,
            drained: false,
            sessions_changed: Arc::default(),
            sessions_seen: None,
            session_problems: Vec::new(),
            missing: BTreeSet::new(),
            problems: BTreeMap::new(),
            told: BTreeSet::new(),
            pending: Dirty::default(),
            started: false,
        };
        Ok((room, view))
    }

    /// Runs until [`View::stop`].
    pub fn run(mut self) {
        let runtime = self.runtime.clone();
        // The speaker's tasks are started from this thread.
        let _inside = runtime.enter();
        loop {
            let listed = self.is_listed();
            let gather = if listed { Duration::ZERO } else { LISTING_GATHER };
            let dirty = self.subscription.wait(LONGEST_SLEEP, gather);
            self.shared.turned(Instant::now());
            if self.shared.is_stopping() {
                return self.stop(&runtime);
            }
            self.pending.services.extend(dirty.services);
            self.pending.nodes.extend(dirty.nodes);
            self.pending.service_cidrs |= dirty.service_cidrs;
            self.pending.secrets |= dirty.secrets;
            // Nothing is decided on an incomplete view: peers keep what they have.
            if self.is_listed() && self.has_secrets() {
                self.turn();
            }
        }
    }

    fn is_listed(&self) -> bool {
        let knows_itself = self.own.as_ref().is_none_or(|own| own.get().is_some());
        knows_itself && self.subscription.cluster().read().has_listed(&NEEDED)
    }

    /// With graceful restart peers wait for the next start; without, they are told that this one is over.
    fn stop(mut self, runtime: &Handle) {
        let Some(speaker) = self.speaker.take() else { return };
        let goodbye = if self.settings.restart.is_some() {
            Shutdown::Silent
        } else {
            Shutdown::Administrative(format!("{} stops", self.settings.node_name))
        };
        runtime.block_on(speaker.stop(goodbye));
    }

    fn turn(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let secrets = self.settings.external.passwords_file.as_deref().map(read_passwords);
        let first = !std::mem::replace(&mut self.started, true);
        let chosen = self.own.as_ref().and_then(OwnAddresses::get).unwrap_or_default();
        let moved = chosen != std::mem::replace(&mut self.chosen, chosen.clone());
        let changed = !pending.nodes.is_empty() || pending.service_cidrs || pending.secrets;
        if first || moved || changed || secrets != self.secrets {
            let begun = Instant::now();
            self.secrets = secrets;
            self.take_nodes();
            self.shared.numbers.peers_took(begun.elapsed());
        }
        let mut services = pending.services;
        services.extend(std::mem::take(&mut self.pending.services));
        self.take_services(&services);
        if let Some(programmed) = &self.programmed {
            self.announcements.touch(programmed.take_changes());
        }
        self.drain();
        self.announce();
        self.report();
    }

    /// Everything that follows from Node objects: who this node is, its peers and policies.
    fn take_nodes(&mut self) {
        let (facts, named, node, nodes) = {
            let state = self.subscription.cluster().read();
            let facts = Facts::gather(&self.settings.services, &state, &[], true);
            let nodes: Vec<Arc<Node>> = state.nodes.values().cloned().collect();
            let node = state.nodes.get(&self.settings.node_name).cloned();
            (facts, state.secrets.clone(), node, nodes)
        };
        let mut problems: BTreeMap<Arc<str>, Vec<Problem>> = BTreeMap::new();
        let Some(node) = node.or_else(|| self.node.clone()) else {
            let name = self.settings.node_name.clone();
            let problem = Problem {
                reason: "NodeMissing",
                message: format!(
                    "there is no Node {name}, so it has no address, no pods and no peers: start the kubelet there, give \
                     --hostname-override, add a Node to the folder of --manifests, or use --run-router=false"
                ),
            };
            self.problems = BTreeMap::from([(name, vec![problem])]);
            self.nobody = true;
            return;
        };
        let own = problems.entry(node.name.clone()).or_default();
        let (identity, told) = identify(&self.settings, &node, &self.chosen);
        own.extend(told);
        let (wishes, told) = wishes(&node, &self.wishes);
        own.extend(told);
        let (external, told) = external(&self.settings, &node, self.secrets.as_ref(), &named, &self.external);
        own.extend(told);
        let (ranges, told) = advertise::ranges(&self.settings, &facts);
        own.extend(told);
        self.announcements.put_ranges(ranges);
        (self.wishes, self.external) = (wishes, external);
        self.want_secrets(&node, &named);
        self.draining = if node.draining { self.draining.or_else(|| Some(Instant::now())) } else { None };
        self.take_facts(facts, &node);
        self.nobody = identity.is_none() && self.identity.is_none();
        // Without a sound identity the one before stays.
        if let Some(identity) = identity {
            self.take_identity(identity);
        }
        if let (Some(identity), Some(speaker)) = (&self.identity, &self.speaker) {
            let reflects = matches!(identity.reflection, Reflection::Server(_));
            let addresses = self.external.iter().map(|peer| peer.address);
            let policies = policies(&self.settings, &self.wishes, reflects, addresses);
            let nodes = nodes.iter().map(AsRef::as_ref);
            let (wanted, told) = peers(&self.settings, identity, &node, nodes, &self.external, &policies);
            for (name, problem) in told {
                problems.entry(name).or_default().push(problem);
            }
            let kinds =
                wanted.iter().map(|Peer { kind, config }| (config.key.clone(), kind.clone())).collect();
            self.shared.set_known(Known { identity: Some(identity.clone()), peers: kinds });
            let now = Instant::now();
            self.wanted = wanted
                .iter()
                .map(|Peer { config, .. }| {
                    (config.key.clone(), self.wanted.get(&config.key).copied().unwrap_or(now))
                })
                .collect();
            for error in speaker.set_peers(wanted.into_iter().map(|peer| peer.config).collect()) {
                let message = format!("Node {}: {error}", node.name);
                problems
                    .entry(node.name.clone())
                    .or_default()
                    .push(Problem { reason: "InvalidPeer", message });
            }
        }
        self.node = Some(node);
        self.problems = problems;
    }

    /// What Services depend on: all are looked at again when it changes.
    fn take_facts(&mut self, facts: Facts, node: &Arc<Node>) {
        self.announcements.put_pods(&node.pod_cidrs);
        if (facts.ipv4, facts.ipv6) != (self.facts.ipv4, self.facts.ipv6) {
            self.announcements.touch_all();
        }
        let excluded = |node: &Node| node.excluded_from_external_lb;
        if facts != self.facts || self.node.as_deref().map(excluded) != Some(excluded(node)) {
            let state = self.subscription.cluster().read();
            self.pending.services.extend(state.services.keys().cloned());
            self.facts = facts;
        }
    }

    /// Starts a speaker, or another in place of the one that was somebody else.
    fn take_identity(&mut self, identity: Identity) {
        let listen: Vec<SocketAddr> =
            identity.listen.iter().map(|address| SocketAddr::new(*address, self.settings.port)).collect();
        if let (Some(speaker), Some(known)) = (&self.speaker, &self.identity)
            && same_speaker(&identity, known)
        {
            speaker.set_listen(&listen);
            self.identity = Some(identity);
            return;
        }
        let mut config = SpeakerConfig::new(identity.asn, identity.router_id);
        if let Reflection::Server(cluster) = identity.reflection {
            config.cluster_id = Some(cluster);
        }
        config.decision = decision::Options { maximum_paths: MAXIMUM_PATHS, ..decision::Options::default() };
        config.listen = listen;
        config.addresses =
            LocalAddresses { v4: identity.next_hop.v4, v6: identity.next_hop.v6, link_local: None };
        config.host = Some(self.settings.node_name.to_string());
        config.restart = self.settings.restart.map(|restart| RestartConfig {
            time: restart.time,
            // After a reboot nothing was forwarded, and routes from before are worth nothing.
            forwarding: if self.restarted { identity.families() } else { Families::NONE },
            restarted: self.restarted,
            deferral: restart.deferral,
        });
        if let Some(old) = self.speaker.take() {
            tracing::info!("this node changed in BGP: all sessions begin again");
            self.runtime.block_on(old.stop(Shutdown::Changed));
        }
        tracing::info!(
            asn = %identity.asn, router_id = %identity.router_id, listen = ?config.listen,
            restarted = self.restarted, "BGP starts"
        );
        match Speaker::start(config) {
            Ok(speaker) => {
                self.follow_sessions(&speaker);
                self.current.send_replace(Some(speaker.clone()));
                self.speaker = Some(speaker);
                self.identity = Some(identity);
                self.complete = false;
                self.wanted.clear();
                self.announcements.touch_all();
                // Sessions of a second speaker of this process are no restart.
                self.restarted = true;
            }
            Err(error) => self.shared.failed(error.to_string()),
        }
    }

    fn take_services(&mut self, services: &BTreeSet<ServiceKey>) {
        let Some(node) = self.node.clone() else { return };
        let keys: Vec<&ServiceKey> = services.iter().collect();
        for step in keys.chunks(STEP) {
            let state = self.subscription.cluster().read();
            for key in step {
                let wanted = addresses(&self.settings, &self.facts, &node, &state, key);
                self.announcements.put(key, wanted);
            }
        }
    }

    /// A machine that goes says so at once (its policies do), and takes its Services' addresses back
    /// when neighbours had time to turn.
    fn drain(&mut self) {
        let drained = self.draining.is_some_and(|since| since.elapsed() >= DRAIN);
        if drained != std::mem::replace(&mut self.drained, drained) {
            self.announcements.touch_wanted();
        }
    }

    fn announce(&mut self) {
        let Some(speaker) = &self.speaker else { return };
        let (programmed, drained) = (self.programmed.clone(), self.drained);
        let ready = |vip| !drained && programmed.as_ref().is_none_or(|programmed| programmed.contains(vip));
        let difference = self.announcements.difference(ready);
        self.shared.waiting.store(self.announcements.waiting() as u64, Ordering::Relaxed);
        let advertisement = |(prefix, tag)| advertise::route(prefix, tag, &self.facts);
        self.shared.numbers.count(&difference);
        let is_complete = self.programmed.as_ref().is_none_or(|programmed| programmed.is_complete());
        if !self.complete && is_complete {
            let all: Vec<Advertisement> = self.announcements.announced().map(advertisement).collect();
            tracing::info!(routes = all.len(), "all routes of this node are advertised");
            speaker.set_advertisements(all);
            self.complete = true;
            return;
        }
        let Difference { advertise, withdraw } = difference;
        // A range comes before the addresses go that it stands for, and these come before it goes.
        if !advertise.is_empty() {
            tracing::debug!(?advertise, "routes advertised");
            speaker.advertise(advertise.into_iter().map(advertisement).collect());
        }
        if !withdraw.is_empty() {
            tracing::debug!(?withdraw, "routes withdrawn");
            speaker.withdraw(withdraw.into_iter().map(|prefix| (prefix, 0)).collect());
        }
    }

    /// Tells what is wrong now, and that what was told before is over.
    fn report(&mut self) {
        let mut problems = self.problems.clone();
        let name = self.settings.node_name.clone();
        let own = problems.entry(name.clone()).or_default();
        if let Some(speaker) = self.speaker.clone() {
            // All sessions are read: not once for each change of a Service.
            let due = self.sessions_seen.is_none_or(|seen| seen.elapsed() >= LONGEST_SLEEP / 2);
            if self.sessions_changed.swap(false, Ordering::AcqRel) || due {
                self.session_problems = self.listener_problems(&speaker);
                let down = self.missing_sessions(&speaker);
                self.session_problems.extend(down);
                self.sessions_seen = Some(Instant::now());
            }
            own.extend(self.session_problems.iter().cloned());
        }
        let cluster = self.subscription.cluster().read();
        let uids: HashMap<Arc<str>, Arc<str>> = problems
            .keys()
            .filter_map(|name| Some((name.clone(), cluster.nodes.get(name)?.uid.clone())))
            .collect();
        drop(cluster);
        for name in self.told.iter().filter(|name| !problems.contains_key(*name)) {
            self.reporter.resolved("Node", &ObjectKey::new("", name.clone()));
        }
        for (name, list) in &problems {
            let uid = uids.get(name).cloned().unwrap_or_default();
            self.reporter.replace("Node", &ObjectKey::new("", name.clone()), &uid, list);
        }
        self.told = problems.into_keys().collect();
        // Without an identity there is nobody to speak as: that is told on the Node, and nothing is left to do.
        if self.nobody || (self.speaker.is_some() && self.complete) {
            self.shared.passed();
        }
    }
}

fn addresses(
    settings: &Settings,
    facts: &Facts,
    node: &Node,
    state: &ClusterState,
    key: &ServiceKey,
) -> BTreeSet<Claim> {
    let Some(service) = state.services.get(key) else { return BTreeSet::new() };
    advertise::addresses(settings, facts, node, service, state.slices.get(key))
}

/// Whether a speaker can go on being this one: what its OPEN says, and its next hops, are the same.
fn same_speaker(a: &Identity, b: &Identity) -> bool {
    let cluster = |identity: &Identity| match identity.reflection {
        Reflection::Server(id) => Some(id),
        _ => None,
    };
    (a.asn, a.router_id, a.next_hop, cluster(a)) == (b.asn, b.router_id, b.next_hop, cluster(b))
}

/// Whether the kernel holds routes of a former process: then this start is a restart, in the sense of
/// RFC 4724, and forwarding went on. After a reboot there are none.
fn has_routes() -> bool {
    let held = |protocol| {
        let filter = RouteFilter { protocol: Some(protocol), ..RouteFilter::default() };
        Network::open().and_then(|mut network| network.routes(filter)).map(|routes| !routes.is_empty())
    };
    match held(PROTOCOL).and_then(|vips| Ok(vips || held(LEARNED)?)) {
        Ok(has) => has,
        Err(error) => {
            tracing::warn!(%error, "cannot see whether this is a restart; peers are told that it is none");
            false
        }
    }
}
