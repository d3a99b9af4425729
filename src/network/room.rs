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

use ipnet::IpNet;

use super::error::Error;
use super::facts::{ClusterFacts, Machine};
use super::fib::{self, Refusal, Surroundings};
use super::kernel::Kernel;
use super::learned::{Feed, Learned};
use super::node_address::{Host, NodeAddresses, reach};
use super::overlay::{self, Wanted};
use super::plan;
use super::settings::{Reach, Settings};
use super::view::{Request, Shared, Status, View};
use crate::chains;
use crate::cluster::service::Problem;
use crate::cluster::{Kind, Subscription};
use crate::host::Family;
use crate::host::forwarding::ForwardingRoute;
use crate::host::route::RouteKey;
use crate::host::sysctl::{Outcome, Sysctls, policy_settings};
use crate::metrics::lock;
use crate::report::Reporter;
use crate::schedule::Schedule;

mod firewall;
mod pods;
mod routes;
mod tunnels;

/// Longest sleep: the loop turns at least so often, which is what liveness means.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// Kinds without which nothing may be decided.
pub const NEEDED: [Kind; 1] = [Kind::Node];

/// The pod network room. [`Room::run`] is its thread.
pub struct Room {
    settings: Settings,
    subscription: Subscription,
    reporter: Reporter,
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
    /// What stands against this Node's pods, as told on it.
    problems: Vec<Problem>,
    /// Routes of ours as the kernel was last known to hold them; more than one under a key only
    /// where somebody appended one.
    mirror: BTreeMap<RouteKey, Vec<ForwardingRoute>>,
    mtu: Option<u32>,
    /// Prefixes whose next hops changed and that no pass has looked at yet.
    touched: BTreeSet<IpNet>,
    /// Failures told, so that each is told once.
    told: BTreeSet<String>,
    schedule: Schedule,
    chain_writes: u64,
    /// A whole pass has been made.
    adopted: bool,
    /// How long programs of iptables took in the last whole pass.
    chains_took: Duration,
    chains_written: bool,
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
    pub fn open(
        settings: Settings,
        subscription: Subscription,
        reporter: &Reporter,
    ) -> Result<(Self, View), Error> {
        let (view, shared, requests, feed) = View::new(subscription.waker());
        let mut kernel = Kernel::open()?;
        kernel.watch(subscription.waker())?;
        let schedule = Schedule::new(settings.audit_period, Instant::now());
        let room = Self {
            settings,
            subscription,
            reporter: reporter.room("network"),
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
            problems: Vec::new(),
            mirror: BTreeMap::new(),
            mtu: None,
            touched: BTreeSet::new(),
            told: BTreeSet::new(),
            schedule,
            chain_writes: 0,
            adopted: false,
            chains_took: Duration::ZERO,
            chains_written: false,
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
                if self.knows_node() {
                    self.turn(woken, std::mem::take(&mut nodes_changed) || completes);
                } else if std::mem::take(&mut nodes_changed) | self.schedule.take_due(woken).is_some() {
                    // Without a Node there are no pods to make a network for, and nothing is touched.
                    self.shared.passed(woken);
                }
            }
            while let Ok(reply) = self.requests.try_recv() {
                // The asker may have given up waiting.
                let _ = reply.send(self.status());
            }
        }
    }

    /// Whether this node has, or once had, a Node object.
    fn knows_node(&self) -> bool {
        self.cluster.own.is_some()
            || self.subscription.cluster().read().nodes.contains_key(&self.settings.node_name)
    }

    /// One turn: what is pending, what is due.
    fn turn(&mut self, started: Instant, changed: bool) {
        if self.kernel.take_routes_changed() {
            self.schedule.request_routes(started);
        }
        let links_changed = self.kernel.take_links_changed();
        if self.adopted && self.chain_writes != chains::writes() {
            self.schedule.request_rules(started);
        } else if self.kernel.are_chains_disturbed() {
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
                    self.schedule.rules_cost(self.chains_took, self.chains_written);
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
        let facts = ClusterFacts::gather(&self.subscription.cluster().read(), &self.settings.node_name);
        let facts = facts.after(&self.cluster);
        // A Node that changed since this room was last told is no drift.
        let whole = Whole { audit: whole.audit && facts == self.cluster, ..whole };
        self.cluster = facts;
        if let Err(error) = self.read_machine() {
            return self.failed_to("read links", &error);
        }
        let vips = plan::vips(&self.subscription.cluster().read());
        let host = Host { links: &self.machine.links, addresses: &self.machine.addresses, vips: &vips };
        self.addresses.update(&self.settings.addresses, self.cluster.own.as_deref(), &host, reach);
        self.shared.own.put(self.addresses.all());
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
        self.settle_pods();
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

    fn status(&mut self) -> Status {
        let mut errors: Vec<String> = self.shared.last_error().into_iter().collect();
        let difference = if self.adopted {
            plan::difference(&mut self.kernel, &self.settings, &self.cluster, &self.machine, &self.addresses)
        } else {
            Ok(Vec::new())
        };
        let difference = difference.unwrap_or_else(|error| {
            errors.push(error.to_string());
            Vec::new()
        });
        let complete = Family::BOTH.into_iter().filter(|family| self.learned.is_complete(*family));
        Status {
            addresses: self.addresses.describe(),
            address_problems: self.addresses.problems().collect(),
            problems: self.problems.iter().map(|problem| problem.message.clone()).collect(),
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
            difference,
            errors,
        }
    }
}
