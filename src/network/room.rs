//! The room's thread: wakes, computes, compares, applies, checks.
//!
//! It alone writes forwarding routes, tunnels, rules into the table of pods, and the chains and sets of
//! [`super::egress`]. Learned routes narrow a pass to their prefixes; network events, changed Nodes and
//! audits widen it to all. Both run the same code.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ferroute_iptables::ipset::{self, Change, Sets};
use ipnet::IpNet;

use super::cni_file;
use super::egress::{self, BRIDGE};
use super::error::Error;
use super::facts::{ClusterFacts, Machine};
use super::fib::{self, Refusal, Surroundings};
use super::kernel::Kernel;
use super::learned::{Feed, Learned};
use super::node_address::{Host, NodeAddresses, Purpose, reach};
use super::overlay::{self, TunnelChange, Wanted};
use super::settings::{Reach, Settings};
use super::view::{Request, Shared, Status, View};
use crate::chains;
use crate::cluster::{Kind, Subscription};
use crate::disturbance::Disturbance;
use crate::host::forwarding::ForwardingRoute;
use crate::host::fou::Listener;
use crate::host::route::{self, RouteChange, RouteKey, TABLE_MAIN};
use crate::host::sysctl::{Outcome, Sysctls, policy_settings};
use crate::host::tunnel::Encapsulation;
use crate::host::{self, Family};
use crate::metrics::lock;
use crate::schedule::Schedule;

/// Longest sleep: the loop turns at least so often, which is what liveness means.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// Kinds without which nothing may be decided.
pub const NEEDED: [Kind; 1] = [Kind::Node];

/// The pod network room. [`Room::run`] is its thread.
pub struct Room {
    settings: Settings,
    subscription: Subscription,
    shared: Arc<Shared>,
    requests: Receiver<Request>,
    feed: Feed,
    kernel: Kernel,
    learned: Learned,
    addresses: NodeAddresses,
    cluster: ClusterFacts,
    machine: Machine,
    surroundings: Surroundings,
    tunnels: Vec<Wanted>,
    desired: BTreeMap<RouteKey, ForwardingRoute>,
    refused: BTreeMap<IpNet, Refusal>,
    /// Routes of ours as the kernel was last known to hold them; more than one under a key only
    /// where somebody appended one.
    mirror: BTreeMap<RouteKey, Vec<ForwardingRoute>>,
    mtu: Option<u32>,
    /// Prefixes whose next hops changed and that no pass has looked at yet.
    touched: BTreeSet<IpNet>,
    /// Failures told, so that each is told once.
    told: BTreeSet<String>,
    schedule: Schedule,
    disturbance: Disturbance,
    chain_writes: u64,
    /// A whole pass has been made.
    adopted: bool,
    /// How long programs of iptables took in the last whole pass.
    chains_took: Duration,
    /// The last pass was clean: what differs from it now was changed by somebody else.
    trusted: bool,
    /// Routes that kube-router left have been taken away.
    moved_in: bool,
}

/// Why everything is looked at.
#[derive(Clone, Copy, Debug, Default)]
struct Whole {
    /// Nothing of ours is known to have changed: a difference is drift.
    audit: bool,
    /// Chains are read back.
    rules: bool,
}

impl Room {
    /// Opens the kernel handles.
    ///
    /// # Errors
    /// What the kernel lacks.
    pub fn open(settings: Settings, subscription: Subscription) -> Result<(Self, View), Error> {
        let (view, shared, requests, feed) = View::new(subscription.waker());
        let mut kernel = Kernel::open()?;
        kernel.watch(subscription.waker())?;
        let schedule = Schedule::new(settings.audit_period, Instant::now());
        let disturbance = Disturbance::open(kernel.variant());
        let room = Self {
            settings,
            subscription,
            shared,
            requests,
            feed,
            kernel,
            learned: Learned::default(),
            addresses: NodeAddresses::default(),
            cluster: ClusterFacts::default(),
            machine: Machine::default(),
            surroundings: Surroundings::default(),
            tunnels: Vec::new(),
            desired: BTreeMap::new(),
            refused: BTreeMap::new(),
            mirror: BTreeMap::new(),
            mtu: None,
            touched: BTreeSet::new(),
            told: BTreeSet::new(),
            schedule,
            disturbance,
            chain_writes: 0,
            adopted: false,
            chains_took: Duration::ZERO,
            trusted: false,
            moved_in: false,
        };
        Ok((room, view))
    }

    /// Runs until [`View::stop`]. Kernel state stays as it is.
    ///
    /// # Errors
    /// None at present: what fails is tried again.
    pub fn run(mut self) -> Result<(), Error> {
        let mut nodes_changed = false;
        loop {
            let sleep = self.schedule.next_due().saturating_duration_since(Instant::now()).min(LONGEST_SLEEP);
            let dirty = self.subscription.wait(sleep, Duration::ZERO);
            let woken = Instant::now();
            self.shared.turned(woken);
            if self.shared.is_stopping() {
                return Ok(());
            }
            nodes_changed |= !dirty.nodes.is_empty() || dirty.unreadable || dirty.listed;
            let news = self.feed.take();
            let completes = !news.complete.is_empty();
            self.touched.extend(self.learned.take(news));
            // Otherwise nothing is decided on an incomplete view; the kernel keeps what it has.
            if self.subscription.cluster().read().has_listed(&NEEDED) {
                self.turn(woken, std::mem::take(&mut nodes_changed) || completes);
            }
            while let Ok(reply) = self.requests.try_recv() {
                // The asker may have given up waiting.
                let _ = reply.send(self.status());
            }
        }
    }

    /// One turn: what is pending, what is due.
    fn turn(&mut self, started: Instant, changed: bool) {
        if self.kernel.take_routes_changed() {
            self.schedule.request_routes(started);
        }
        let links_changed = self.kernel.take_links_changed();
        if self.adopted && self.chain_writes != chains::writes() {
            self.schedule.request_rules(started);
        } else if self.disturbance.is_seen() {
            self.schedule.suspect_rules();
        }
        let due = self.schedule.take_due(started);
        let whole = if !self.adopted {
            Some(Whole { audit: false, rules: true })
        } else if changed || links_changed || due.is_some() {
            let audit = self.trusted && !changed && self.touched.is_empty();
            Some(Whole { audit, rules: due.is_some_and(|due| due.rules) })
        } else {
            None
        };
        let clean = match whole {
            Some(whole) => {
                let clean = self.settle(whole);
                let cost = started.elapsed();
                self.schedule.tables_cost(cost.saturating_sub(self.chains_took));
                if whole.rules {
                    self.schedule.rules_cost(self.chains_took);
                }
                if due.is_some() {
                    self.shared.numbers.audits.fetch_add(1, Ordering::Relaxed);
                }
                self.adopted = true;
                clean
            }
            None if !self.touched.is_empty() => {
                let touched = std::mem::take(&mut self.touched);
                self.change(touched)
            }
            None => return,
        };
        self.trusted = clean;
        self.count();
        if clean {
            self.schedule.succeeded();
            self.shared.passed(started);
        } else {
            let retry = self.schedule.failed(Instant::now());
            self.shared.failed(started);
            tracing::debug!(retry_in = ?retry, "pod network incomplete, the kernel is read and compared again");
        }
    }

    /// A pass over these prefixes; over all where other nodes need a tunnel now than before.
    fn change(&mut self, touched: BTreeSet<IpNet>) -> bool {
        let ends = self.surroundings.tunnel_ends(self.learned.all_next_hops());
        let known: BTreeSet<IpAddr> = self.tunnels.iter().map(|wanted| wanted.tunnel.remote).collect();
        if ends != known {
            self.touched = touched;
            return self.settle(Whole::default());
        }
        for prefix in &touched {
            self.decide(*prefix);
        }
        let keys: HashSet<RouteKey> = touched.iter().map(|prefix| fib::key(*prefix)).collect();
        self.write_routes(Some(&keys), false)
    }

    /// A pass over everything. Each part that fails leaves the others to be done.
    fn settle(&mut self, whole: Whole) -> bool {
        self.cluster = ClusterFacts::gather(&self.subscription.cluster().read(), &self.settings.node_name);
        if let Err(error) = self.read_machine() {
            return self.failed_to("read links", &error);
        }
        let vips = self.vips();
        let host = Host { links: &self.machine.links, addresses: &self.machine.addresses, vips: &vips };
        self.addresses.update(&self.settings.addresses, self.cluster.own.as_deref(), &host, reach);
        let mut clean = true;
        let mut step = |room: &mut Self, action, outcome: Result<(), Error>| {
            if let Err(error) = outcome {
                clean = room.failed_to(action, &error);
            }
        };
        if !self.adopted {
            self.prepare();
        }
        let outcome = self.settle_firewall(whole);
        step(self, "write sets and chains", outcome);
        let outcome = self.settle_rules(whole);
        step(self, "write rules", outcome);
        let outcome = self.settle_bridge();
        step(self, "set up the pod bridge", outcome);
        let outcome = self.settle_cni();
        step(self, "write the network configuration", outcome);
        let surroundings = self.machine.surroundings(&self.settings, &self.cluster, &self.addresses);
        let outcome = self.settle_tunnels(&surroundings, whole);
        step(self, "make tunnels", outcome);
        let working = self.working_tunnels();
        let surroundings = Surroundings { tunnels: working, ..surroundings };
        if surroundings != self.surroundings || !self.adopted {
            self.surroundings = surroundings;
            self.decide_all();
        } else {
            for prefix in std::mem::take(&mut self.touched) {
                self.decide(prefix);
            }
        }
        self.touched.clear();
        match self.kernel.read_routes() {
            Ok(routes) => {
                self.mirror.clear();
                for route in routes {
                    self.mirror.entry(route.key).or_default().push(route);
                }
            }
            Err(error) => return self.failed_to("read routes", &error),
        }
        clean &= self.write_routes(None, whole.audit);
        if clean && !self.moved_in && Family::BOTH.iter().all(|family| self.learned.is_complete(*family)) {
            clean = self.move_in();
        }
        clean
    }

    fn read_machine(&mut self) -> Result<(), Error> {
        self.machine = self.kernel.read_machine()?;
        Ok(())
    }

    /// Addresses of Services: no method may take one for the node's.
    fn vips(&self) -> HashSet<IpAddr> {
        let state = self.subscription.cluster().read();
        let mut vips = HashSet::new();
        for service in state.services.values() {
            vips.extend(service.cluster_ips.iter().chain(&service.external_ips));
            vips.extend(service.load_balancer_ips.iter());
        }
        vips
    }

    /// What the kernel needs once.
    fn prepare(&mut self) {
        for applied in Sysctls::of_host().apply_all(&policy_settings()) {
            match &applied.outcome {
                Outcome::AlreadyRight => {}
                Outcome::Written { .. } => tracing::info!(%applied, "sysctl"),
                Outcome::Missing | Outcome::Refused { .. } => tracing::warn!(%applied, "sysctl"),
            }
        }
    }

    /// Sets before the rules that name them.
    fn settle_firewall(&mut self, whole: Whole) -> Result<(), Error> {
        let families = self.kernel.families().to_vec();
        let pods: Vec<IpNet> = self.cluster.pods.iter().copied().collect();
        let nodes: Vec<IpAddr> = self.cluster.nodes.iter().copied().collect();
        let desired = egress::sets(&families, &pods, &nodes);
        let actual = self.kernel.read_sets()?;
        let ipset::Difference { mut changes, retype, destroy: _ } = ipset::diff(&actual, &desired);
        if self.cluster.blind {
            // A node that cannot be read keeps its place.
            changes.retain(|change| !matches!(change, Change::Delete { .. } | Change::Replace { .. }));
        }
        let mut replaced = false;
        if !retype.is_empty() {
            // The kernel destroys no set that a rule names.
            self.kernel.sync_chains(egress::rules(&egress::Facts::default(), &families), true)?;
            replaced = true;
            changes.extend(retype.into_iter().flat_map(|retype| retype.changes));
        }
        if whole.audit && !changes.is_empty() {
            self.drift(changes.len(), "ipsets differed from what was programmed, repairing");
        }
        if !changes.is_empty()
            && let Some(failed) = self.kernel.apply_sets(&changes, &mut Sets::new())?.into_iter().next()
        {
            return Err(Error::Set(Box::new(failed)));
        }
        let facts = egress::Facts {
            egress: self.settings.egress,
            exclude: self.settings.egress_exclude.clone(),
            node_links: self.machine.node_links(&self.cluster),
            overlay: self.settings.overlay != Reach::Off,
        };
        let check = whole.rules || replaced;
        if check {
            self.disturbance.settle();
        }
        let (before, begun) = (chains::writes(), Instant::now());
        let written = self.kernel.sync_chains(egress::rules(&facts, &families), check);
        self.chains_took = begun.elapsed();
        let written = written?;
        if written > 0 {
            // Our own doing.
            self.disturbance.settle();
        }
        if check {
            self.chain_writes = before + written as u64;
        } else if self.chain_writes == before {
            self.chain_writes += written as u64;
        }
        if whole.audit && written > 0 {
            self.drift(written, "chains differed from what was programmed, repaired");
        }
        Ok(())
    }

    fn settle_rules(&mut self, whole: Whole) -> Result<(), Error> {
        let pods = if self.settings.overlay == Reach::Off { Vec::new() } else { self.cluster.own_pods() };
        if pods.is_empty() && self.cluster.blind {
            return Ok(());
        }
        let changes = overlay::diff_rules(&self.kernel.read_rules()?, &pods);
        if whole.audit && !changes.is_empty() {
            self.drift(changes.len(), "policy-routing rules differed from what was programmed, repairing");
        }
        match self.kernel.apply_rules(&changes)?.into_iter().next() {
            None => Ok(()),
            Some((_, error)) => Err(error.into()),
        }
    }

    /// The bridge is normally the bridge plugin's work; made early it has its MTU before the first pod.
    fn settle_bridge(&mut self) -> Result<(), Error> {
        let wanted = self.machine.pod_mtu(&self.settings, &self.addresses).filter(|_| self.settings.auto_mtu);
        if self.machine.link(BRIDGE).is_none() {
            self.kernel.network().create_link(BRIDGE, "bridge")?;
            self.read_machine()?;
        }
        let Some(bridge) = self.machine.link(BRIDGE) else { return Ok(()) };
        if bridge.kind.as_deref() != Some("bridge") {
            return Err(Error::Kernel(format!("link {BRIDGE} is no bridge; remove it, pods need the name")));
        }
        let (index, now, is_up) = (bridge.index, bridge.mtu, bridge.is_up());
        // What it has counts, should the kernel refuse another.
        self.mtu = self.settings.auto_mtu.then_some(now);
        if !is_up {
            self.kernel.network().set_link_up(index)?;
        }
        if let Some(mtu) = wanted.filter(|mtu| *mtu != now) {
            self.kernel.network().set_mtu(index, mtu)?;
            tracing::info!(mtu, was = now, "MTU of pods");
            self.mtu = Some(mtu);
        }
        Ok(())
    }

    fn settle_cni(&mut self) -> Result<(), Error> {
        let pods = self.cluster.own_pods();
        let Some(path) = self.settings.cni_file.as_ref().filter(|_| !pods.is_empty()) else { return Ok(()) };
        if cni_file::keep(path, &pods, self.mtu)? {
            tracing::info!(file = %path.display(), ?pods, mtu = ?self.mtu, "network configuration written");
        }
        Ok(())
    }

    /// Makes tunnels right, one by one: one that cannot be made does not stop the others. Those that
    /// nobody needs go only when all routes of their family have been heard.
    fn settle_tunnels(&mut self, around: &Surroundings, whole: Whole) -> Result<(), Error> {
        let ends = around.tunnel_ends(self.learned.all_next_hops());
        let names = overlay::assign(&ends, &self.machine.tunnels);
        let (wanted, without) = self.machine.tunnels_to(names, &self.settings, &self.addresses);
        let mut failure = None;
        for remote in without {
            let problem = format!(
                "no tunnel to {remote}: this node has no tunnel end of that family; see --overlay-address"
            );
            failure = Some(Error::Kernel(problem));
        }
        if let Encapsulation::Gue(port) = self.settings.encapsulation
            && self.settings.overlay != Reach::Off
            && let Err(error) = self.settle_listeners(port)
        {
            failure = Some(error);
        }
        let learned = &self.learned;
        let is_blind = self.cluster.blind;
        let changes =
            overlay::diff(&self.machine.tunnels, &wanted, |family| learned.is_complete(family) && !is_blind);
        self.tunnels = wanted;
        if changes.is_empty() {
            return failure.map_or(Ok(()), Err);
        }
        if whole.audit {
            self.drift(changes.len(), "tunnels differed from what was programmed, repairing");
        }
        for change in &changes {
            tracing::debug!(?change, "tunnel");
            if let Err(error) = self.apply_tunnel(change) {
                failure = Some(error);
            }
        }
        self.machine.tunnels = self.kernel.network().tunnels()?;
        failure.map_or(Ok(()), Err)
    }

    fn apply_tunnel(&mut self, change: &TunnelChange) -> Result<(), Error> {
        let network = self.kernel.network();
        let outcome = match change {
            TunnelChange::Create(wanted) => network.create_tunnel(&wanted.name, &wanted.tunnel, wanted.mtu),
            TunnelChange::Change(index, wanted) => network
                .change_tunnel(*index, &wanted.tunnel, wanted.mtu)
                // Some changes are not possible in place.
                .or_else(|_| {
                    network.delete_link(*index)?;
                    network.create_tunnel(&wanted.name, &wanted.tunnel, wanted.mtu)
                }),
            TunnelChange::Recreate(index, wanted) => network
                .delete_link(*index)
                .and_then(|()| network.create_tunnel(&wanted.name, &wanted.tunnel, wanted.mtu)),
            TunnelChange::Delete(index, _) => network.delete_link(*index),
        };
        outcome.map_err(|error| lacking(error, self.settings.encapsulation))
    }

    /// Packets that come in GUE are unwrapped by a listener for each family this node has an end in.
    fn settle_listeners(&mut self, port: u16) -> Result<(), Error> {
        let Some(present) = self.kernel.read_listeners()? else {
            return Err(Error::Kernel(format!(
                "--overlay-encap=fou: this kernel cannot unwrap GUE on port {port}; load fou on the host (modprobe fou \
                 fou6), choose a kernel with CONFIG_NET_FOU and CONFIG_NET_FOU_IP_TUNNELS, or use --overlay-encap=ipip"
            )));
        };
        let mut failure = None;
        for family in Family::BOTH {
            let listener = Listener { port, family, gue: true };
            if self.addresses.get(Purpose::Overlay, family).is_some()
                && !present.contains(&listener)
                && let Err(error) = self.kernel.add_listener(listener)
            {
                failure = Some(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Tunnels that are as they must be, by their far end.
    fn working_tunnels(&self) -> BTreeMap<IpAddr, u32> {
        let working = self.tunnels.iter().filter_map(|wanted| {
            let found = self.machine.tunnels.iter().find(|found| found.link.name == wanted.name)?;
            (found.tunnel == wanted.tunnel && found.link.is_up())
                .then_some((wanted.tunnel.remote, found.link.index))
        });
        working.collect()
    }

    fn decide_all(&mut self) {
        self.desired.clear();
        self.refused.clear();
        let prefixes: Vec<IpNet> = self.learned.routes().map(|(prefix, _)| *prefix).collect();
        for prefix in prefixes {
            self.decide(prefix);
        }
        let to_nodes = self.surroundings.routes_to_nodes();
        self.desired.extend(to_nodes.map(|route| (route.key, route)));
    }

    fn decide(&mut self, prefix: IpNet) {
        let key = fib::key(prefix);
        let hops = self.learned.next_hops(&prefix);
        self.desired.remove(&key);
        self.refused.remove(&prefix);
        if hops.is_empty() {
            return;
        }
        match self.surroundings.route(prefix, hops) {
            Ok(route) => {
                self.desired.insert(key, route);
            }
            Err(why) => {
                self.refused.insert(prefix, why);
            }
        }
    }

    /// Compares and applies: all, or these keys. Routes of a former life go when their family is
    /// complete; a prefix that was withdrawn goes at once.
    fn write_routes(&mut self, keys: Option<&HashSet<RouteKey>>, is_audit: bool) -> bool {
        let mut changes = match keys {
            Some(keys) => route::diff(
                keys.iter().filter_map(|key| self.mirror.get(key)).flatten(),
                keys.iter().filter_map(|key| self.desired.get(key)),
            ),
            None => route::diff(self.mirror.values().flatten(), self.desired.values()),
        };
        if keys.is_none() {
            let may_go = |key: &RouteKey| {
                let family = Family::of(key.destination.addr());
                self.desired.contains_key(key) || (self.learned.is_complete(family) && !self.cluster.blind)
            };
            changes.retain(|change| !matches!(change, RouteChange::Delete(route) if !may_go(&route.key)));
        }
        if changes.is_empty() {
            return true;
        }
        let is_taken = |change: &RouteChange<ForwardingRoute>| {
            self.refused.get(&change.route().key.destination) == Some(&Refusal::Taken)
        };
        if is_audit && !changes.iter().all(is_taken) {
            self.drift(changes.len(), "routes differed from what was programmed, repairing");
        }
        let failures = match self.kernel.apply_routes(&changes) {
            Ok(failures) => failures,
            Err(error) => return self.failed_to("write routes", &error),
        };
        let mut failed: BTreeMap<usize, host::Error> =
            failures.into_iter().map(|failure| (failure.change, failure.error)).collect();
        let mut clean = true;
        for (index, change) in changes.into_iter().enumerate() {
            if let Some(error) = failed.remove(&index) {
                clean &= self.route_refused(&change, &error);
                continue;
            }
            match change {
                RouteChange::Add(route) | RouteChange::Replace(route) => {
                    self.refused.remove(&route.key.destination);
                    self.mirror.insert(route.key, vec![route]);
                }
                RouteChange::Delete(route) => {
                    if let Some(found) = self.mirror.get_mut(&route.key) {
                        found.retain(|other| *other != route);
                        if found.is_empty() {
                            self.mirror.remove(&route.key);
                        }
                    }
                }
            }
        }
        clean
    }

    /// Notes a refused route; whether all others can go on as if it were made.
    fn route_refused(&mut self, change: &RouteChange<ForwardingRoute>, error: &host::Error) -> bool {
        let key = change.route().key;
        let is_taken = matches!(change, RouteChange::Add(_)) && error.errno() == Some(nix::libc::EEXIST);
        if key.table == TABLE_MAIN {
            let why = if is_taken { Refusal::Taken } else { Refusal::Kernel };
            if self.refused.insert(key.destination, why) != Some(why) {
                tracing::warn!(%error, "route refused");
            }
        }
        if !is_taken {
            self.shared.error(error);
        }
        is_taken
    }

    /// Takes away routes that kube-router left: with a smaller metric they would stand before ours, and
    /// nobody else ever removes them.
    fn move_in(&mut self) -> bool {
        let left = match self.kernel.read_leftovers() {
            Ok(left) => left,
            Err(error) => return self.failed_to("read routes", &error),
        };
        let changes: Vec<_> = left.into_iter().map(RouteChange::Delete).collect();
        if !changes.is_empty() {
            tracing::info!(routes = changes.len(), "removing routes that kube-router left (protocol 17)");
        }
        match self.kernel.apply_routes(&changes) {
            Ok(failures) if failures.is_empty() => {
                self.moved_in = true;
                true
            }
            Ok(failures) => {
                failures.iter().for_each(|failure| self.shared.error(&failure.error));
                false
            }
            Err(error) => self.failed_to("remove routes that kube-router left", &error),
        }
    }

    /// Notes a failure; always `false`, the pass is not clean.
    fn failed_to(&mut self, action: &'static str, error: &Error) -> bool {
        let text = format!("{action}: {error}");
        self.shared.error(error);
        if self.told.len() > 100 {
            self.told.clear();
        }
        if self.told.insert(text) {
            tracing::warn!(%error, action, "kernel access failed, tried again");
        }
        false
    }

    fn drift(&self, count: usize, what: &'static str) {
        self.shared.numbers.drift.fetch_add(count as u64, Ordering::Relaxed);
        tracing::warn!(count, "{what}");
    }

    fn count(&self) {
        let numbers = &self.shared.numbers;
        *lock(&numbers.messages) = self.kernel.messages();
        for (gauge, value) in [
            (&numbers.learned, self.learned.len()),
            (&numbers.routes, self.mirror.len()),
            (&numbers.refused, self.refused.len()),
            (&numbers.tunnels, self.surroundings.tunnels.len()),
        ] {
            gauge.store(value as u64, Ordering::Relaxed);
        }
    }

    fn status(&self) -> Status {
        let mut addresses = Vec::new();
        for purpose in Purpose::ALL {
            for family in Family::BOTH {
                if let Some(chosen) = self.addresses.get(purpose, family) {
                    addresses.push(format!("{} {}", purpose.words(), chosen.address));
                }
            }
        }
        let complete = Family::BOTH.into_iter().filter(|family| self.learned.is_complete(*family));
        Status {
            addresses,
            address_problems: self.addresses.problems().collect(),
            learned: self.learned.len(),
            complete: complete.map(|family| format!("{family:?}")).collect(),
            routes: self.mirror.values().flatten().map(ToString::to_string).collect(),
            refused: self.refused.iter().map(|(prefix, why)| format!("{prefix}: {why}")).collect(),
            tunnels: self
                .tunnels
                .iter()
                .map(|wanted| format!("{}: {}", wanted.name, wanted.tunnel))
                .collect(),
            mtu: self.mtu,
            errors: self.shared.last_error().into_iter().collect(),
        }
    }
}

/// Says what the kernel lacks for tunnels, where that is what a refusal means.
fn lacking(error: host::Error, encapsulation: Encapsulation) -> Error {
    match (error.errno(), encapsulation) {
        (Some(nix::libc::EINVAL | nix::libc::EOPNOTSUPP), Encapsulation::Gue(_)) => Error::Kernel(format!(
            "{error}; tunnels in UDP need CONFIG_NET_FOU_IP_TUNNELS (IPv6: CONFIG_IPV6_FOU_TUNNEL), modules fou and \
             fou6; or use --overlay-encap=ipip"
        )),
        (Some(nix::libc::EOPNOTSUPP), _) => Error::Kernel(format!(
            "{error}; tunnels need the modules ipip and ip6_tunnel (CONFIG_NET_IPIP, CONFIG_IPV6_TUNNEL)"
        )),
        _ => Error::Host(error),
    }
}
