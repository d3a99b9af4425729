//! The policy room's thread: wakes, computes, compares, applies, checks.
//!
//! It alone writes the chains and sets of policies. An event narrows a pass to what it touches; an
//! audit reads the kernel back and compares everything. Both run the same code.

mod answers;
mod chains;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ferroute_iptables::ipset::{Change, Entry, Sets};
use ferroute_iptables::{ChainName, Family};
use ferroute_policy::{Gate, Index, Key, Touched};
use ipnet::IpNet;

use self::chains::Written;
use super::error::Error;
use super::exclude::Excluded;
use super::gather;
use super::hold::{self, Hold};
use super::kernel::Kernel;
use super::order::{self, Ordered};
use super::settings::{Services, Settings};
use super::starting::Starting;
use super::view::{Request, Shared, View};
use crate::chains::writes;
use crate::cluster::{Dirty, Interests, Kind, Subscription};
use crate::metrics::lock;
use crate::proxy::sets::{Role, SetId};
use crate::report::Reporter;
use crate::schedule::{Due, Looks, Schedule, Stopwatch};

/// Longest sleep: the loop turns at least so often, which is what liveness means, and looks whether
/// somebody else changed rules.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// While another program holds the lock that chains need, it is looked at so often.
const LOCK_LOOK: Duration = Duration::from_millis(10);
/// How long arrivals gather before a look, while the first lists are on their way.
const LISTING_GATHER: Duration = Duration::from_millis(10);
/// Kinds without which nothing may be decided.
const NEEDED: [Kind; 4] = Interests::NETWORK_POLICY;
/// Forgetting flows dumps them all: where that takes longer, it waits for company.
const CHEAP_DUMP: Duration = Duration::from_millis(10);
/// And at most so long.
const FORGET_DELAY: Duration = Duration::from_secs(1);

/// The policy room. [`Room::run`] is its thread.
pub struct Room {
    settings: Settings,
    subscription: Subscription,
    reporter: Reporter,
    shared: Arc<Shared>,
    requests: Receiver<Request>,
    kernel: Kernel,
    index: Index,
    /// The sets of ours as the kernel was last known to hold them.
    mirror: Sets,
    networks: Vec<IpNet>,
    starting: Starting,
    excluded: Excluded,
    hold: Hold,
    /// Policies that were told they are not enforced as written.
    troubled: BTreeSet<Key>,
    /// Changes taken from the cluster that no pass has looked at yet.
    pending: Dirty,
    /// Chains that a failed pass left behind.
    unwritten: BTreeSet<(Family, ChainName)>,
    /// A failed pass left behind all chains that there may be.
    unwritten_all: bool,
    /// Since when chains wait for another program's lock.
    waiting: Option<Instant>,
    /// Addresses that a local pod had and has no more: their flows are to be forgotten.
    gone: BTreeSet<IpAddr>,
    forget_at: Option<Instant>,
    forget_cost: Duration,
    schedule: Schedule,
    looks: Looks,
    /// The kernel has been read and made right once since everything was listed.
    adopted: bool,
    /// Writes of chains in this process when ours were last made right, and our own so far.
    chain_writes: u64,
    own_writes: u64,
    /// The last pass was clean: what differs from it now was changed by somebody else.
    trusted: bool,
}

/// What a pass is about.
enum Scope {
    /// What the index says changed.
    Touched(Touched),
    /// Everything; the chains too, or the sets alone.
    All { chains: bool },
    /// What the lock of another program kept from being written, as far as this room knows the kernel.
    Again,
}

impl Room {
    /// Opens the kernel handles and prepares the kernel (modules, sysctls).
    pub fn open(
        settings: Settings,
        subscription: Subscription,
        reporter: Reporter,
    ) -> Result<(Self, View), Error> {
        let (view, shared, requests) = View::new(subscription.waker());
        let kernel = Kernel::open()?;
        let index = Index::new(gather::options(&settings, kernel.families()));
        let schedule = Schedule::new(settings.audit_period, Instant::now());
        let room = Self {
            settings,
            subscription,
            reporter: reporter.room("netpol"),
            shared,
            requests,
            kernel,
            index,
            mirror: Sets::new(),
            networks: Vec::new(),
            starting: Starting::default(),
            excluded: Excluded::default(),
            hold: Hold::default(),
            troubled: BTreeSet::new(),
            pending: Dirty::default(),
            unwritten: BTreeSet::new(),
            unwritten_all: false,
            waiting: None,
            gone: BTreeSet::new(),
            forget_at: None,
            forget_cost: Duration::ZERO,
            schedule,
            looks: Looks::new(Instant::now()),
            adopted: false,
            chain_writes: 0,
            own_writes: 0,
            trusted: false,
        };
        Ok((room, view))
    }

    /// Runs until [`View::stop`]. Kernel state stays as it is: what is enforced outlives the daemon.
    pub fn run(mut self) -> Result<(), Error> {
        loop {
            let now = Instant::now();
            let listed = self.subscription.cluster().read().has_listed(&NEEDED);
            // Audits begin with the adoption, which waits for the lists and is put off by a failure.
            let pass = match (self.adopted, listed) {
                (true, _) => Some(self.schedule.next_due()),
                (false, true) => Some(self.schedule.next_retry().unwrap_or(now)),
                (false, false) => None,
            };
            let look = self.waiting.map(|_| now + LOCK_LOOK);
            let due = [self.starting.next_deadline(), self.forget_at, pass, look];
            let sleep = due
                .into_iter()
                .flatten()
                .min()
                .map_or(LONGEST_SLEEP, |due| due.saturating_duration_since(now))
                .min(LONGEST_SLEEP);
            let dirty = self.subscription.wait(sleep, if listed { Duration::ZERO } else { LISTING_GATHER });
            let woken = Instant::now();
            self.shared.turned(woken);
            if self.shared.is_stopping() {
                return Ok(());
            }
            merge(&mut self.pending, dirty);
            self.answer_requests();
            let rest = self.subscription.take_listed(&NEEDED);
            let listed = rest.is_some();
            if let Some(rest) = rest {
                merge(&mut self.pending, rest);
                self.turn(woken);
            }
            // Otherwise nothing is decided on an incomplete view; the kernel keeps what it has.
            self.answer_starting(listed);
        }
    }

    /// One turn: what is pending, what is due.
    fn turn(&mut self, started: Instant) {
        let dirty = std::mem::take(&mut self.pending);
        self.take_changes(&dirty);
        self.release_held(started);
        let touched = self.index.settle();
        self.forget_flows(started);
        let mut worked = false;
        let mut clean = true;
        let again = self.waiting.is_some() && (!touched.chains.is_empty() || self.kernel.may_write_chains());
        if !self.adopted {
            worked = true;
            clean = self.adopt();
        } else {
            if again {
                worked = true;
                // What waits may be needed by what comes.
                self.unwritten.extend(touched.chains);
                clean = self.pass(Scope::Again);
            } else if !touched.is_empty() {
                worked = true;
                clean = self.pass(Scope::Touched(touched));
            }
            if self.waiting.is_some() {
                // Who holds the lock is looked after when he has let go of it.
            } else if self.chain_writes != writes() {
                // The proxy may have put its jump in front of ours.
                self.schedule.request_rules(started);
            } else if self.kernel.are_chains_disturbed() {
                self.schedule.suspect_rules();
            }
            if !worked && self.trusted && self.looks.is_due(started) {
                self.look(started);
            }
            if let Some(due) = self.schedule.take_due(started) {
                worked = true;
                clean &= self.audit(due);
            }
        }
        if !worked {
            return;
        }
        self.count();
        self.trusted = clean && self.waiting.is_none();
        if !clean {
            let retry = self.schedule.failed(Instant::now());
            self.shared.failed(started);
            tracing::warn!(retry_in = ?retry, "policy pass incomplete, the kernel is read and compared again");
        } else if self.waiting.is_some() {
            // Told when the wait began; what waits is late from its event on.
            self.pending.since = dirty.since;
        } else {
            self.schedule.succeeded();
            self.shared.passed(started, dirty.since);
        }
    }

    /// Lets go of what is held for objects that can be read now.
    fn release_held(&mut self, now: Instant) {
        if self.hold.is_empty() {
            return;
        }
        let state = self.subscription.cluster().read();
        let mut released = self.hold.release_readable(&state, &mut self.index);
        if !hold::is_blind(&state) {
            tracing::info!("everything can be read; nothing is held any more");
            self.hold = Hold::default();
            released = true;
        }
        if released {
            self.kernel.keep_chains(self.hold.chains());
            self.schedule.request_full(now);
            self.schedule.request_rules(now);
            // What goes now was ours to keep, not a stranger's to change.
            self.trusted = false;
        }
    }

    /// Brings what changed in the cluster into the index.
    fn take_changes(&mut self, dirty: &Dirty) {
        let state = self.subscription.cluster().read();
        if !dirty.nodes.is_empty() || !self.adopted {
            let networks = gather::pod_networks(&state, &self.settings.node_name);
            if networks != self.networks {
                tracing::info!(?networks, "pod networks of this node changed");
                self.networks.clone_from(&networks);
                self.index.set_pod_networks(networks);
            }
            if self.networks.is_empty() && !self.adopted {
                tracing::warn!(
                    node = %self.settings.node_name,
                    "the Node object has no pod CIDR, so an address of a pod that is not known yet cannot be told \
                     from others and is not closed; set spec.podCIDRs or the annotation kube-router.io/pod-cidrs"
                );
            }
        }
        for name in &dirty.namespaces {
            self.index
                .put_namespace(name, state.namespaces.get(name).map(|namespace| namespace.labels.clone()));
        }
        for object in &dirty.pods {
            let known = state.pods.get(object).map(Arc::as_ref);
            self.starting.observe(object, known);
            let key = gather::key(object);
            let pod = known.and_then(|pod| gather::pod(pod, &self.settings.node_name, &self.starting));
            if let Some(before) = self.index.pod(&key).filter(|pod| pod.is_enforced_here()) {
                let kept = |ip: &&IpAddr| pod.as_ref().is_some_and(|pod| pod.ips.contains(ip));
                self.gone.extend(before.ips.iter().filter(|ip| !kept(ip)));
            }
            if let Some(pod) = pod.as_ref().filter(|_| !self.hold.is_empty()) {
                let had = |ip: &&IpAddr| self.index.pod(&key).is_some_and(|before| before.ips.contains(ip));
                pod.ips.iter().filter(|ip| !had(ip)).for_each(|ip| self.hold.release(*ip));
            }
            self.index.put_pod(&key, pod);
        }
        for object in &dirty.network_policies {
            let policy = state.network_policies.get(object).map(|policy| policy.policy.clone());
            self.index.put_policy(&gather::key(object), policy);
        }
    }

    /// The first pass: what is in the kernel is read and only what differs is written. Nothing stale
    /// went before, since only now everything is known.
    fn adopt(&mut self) -> bool {
        if !self.ensure_service_sets() {
            return false;
        }
        match self.kernel.read_sets() {
            Ok(sets) => self.mirror = sets,
            Err(error) => return self.failed_to("read ipsets", &error),
        }
        if hold::is_blind(&self.subscription.cluster().read()) {
            match self.kernel.read_all_chains() {
                Ok(chains) => {
                    let state = self.subscription.cluster().read();
                    self.hold = Hold::begin(&state, &chains, &self.mirror, &mut self.index);
                }
                Err(error) => return self.failed_to("read policy chains", &error),
            }
            self.kernel.keep_chains(self.hold.chains());
            if !self.hold.is_empty() {
                tracing::warn!(
                    held = ?self.hold.describe(),
                    "something that decides about pods cannot be read; what the kernel holds of it stays until it is \
                     mended or gone"
                );
            }
        }
        let clean = self.pass(Scope::All { chains: true });
        // What failed is compared again soon; it does not keep events from being handled.
        self.adopted = true;
        clean
    }

    /// Rules of ours name sets of the service proxy. It starts beside this room, so whoever comes
    /// first makes them, the way it does.
    fn ensure_service_sets(&mut self) -> bool {
        if !matches!(self.settings.services, Services::Own { .. }) {
            return true;
        }
        let mut changes = Vec::new();
        for family in self.kernel.families().to_vec() {
            for role in [Role::VipPorts, Role::Vips, Role::ServiceRanges] {
                let id = SetId { role, family };
                match self.kernel.read_set(id.name()) {
                    Ok(Some(_)) => {}
                    Ok(None) => {
                        let empty = id.empty();
                        let (kind, options) = (empty.kind(), *empty.options());
                        changes.push(Change::Create { set: id.name(), kind, options, hashsize: 1024 });
                    }
                    Err(error) => return self.failed_to("read ipsets", &error),
                }
            }
        }
        match self.kernel.apply_sets(&changes, &mut Sets::new()) {
            Ok(failures) => match failures.into_iter().next() {
                None => true,
                Some(failure) => self.failed_to("make the sets of services", &Error::Set(Box::new(failure))),
            },
            Err(error) => self.failed_to("make the sets of services", &error),
        }
    }

    /// Looks whether somebody else changed sets, as far as their sizes tell; if so, they are read at once.
    fn look(&mut self, now: Instant) {
        let watch = Stopwatch::start();
        let alarmed = match self.kernel.set_sizes() {
            Ok(sizes) => {
                self.mirror.iter().any(|(name, set)| sizes.get(name.as_str()) != Some(&set.entries().len()))
            }
            Err(error) => {
                tracing::debug!(%error, "cannot look at the sets, audits will");
                false
            }
        };
        if alarmed {
            self.schedule.request_full(now);
        }
        self.looks.looked(Instant::now(), watch.cost(), alarmed);
    }

    /// Reads the kernel back and repairs what differs.
    fn audit(&mut self, due: Due) -> bool {
        let (begun, own_before) = (Instant::now(), self.own_writes);
        if !self.trusted && !self.ensure_service_sets() {
            return false;
        }
        if due.rules && self.excluded.forget_rules() {
            tracing::info!("rules that the kernel refused are tried again");
        }
        match self.kernel.read_sets() {
            Ok(sets) => self.mirror = sets,
            Err(error) => return self.failed_to("read ipsets", &error),
        }
        let read = begun.elapsed();
        // While the lock is held, chains are written when it is free.
        let chains = due.rules && self.waiting.is_none();
        let scope = if self.waiting.is_some() { Scope::Again } else { Scope::All { chains } };
        let clean = self.pass(scope);
        self.schedule.tables_cost(read);
        if chains {
            self.kernel.prepare();
            self.schedule.rules_cost(begun.elapsed(), self.own_writes != own_before);
        }
        self.shared.count(|numbers| &numbers.audits, 1);
        clean
    }

    /// Compares and applies, in the order that [`order`] gives. Returns whether everything asked for
    /// is now in the kernel.
    fn pass(&mut self, scope: Scope) -> bool {
        let (mut ordered, mut chains) = match &scope {
            Scope::Touched(touched) => {
                let ordered = order::touched(&self.mirror, self.index.sets(), touched);
                (ordered, (!touched.chains.is_empty()).then(|| self.chain_changes(&touched.chains)))
            }
            Scope::All { chains } => {
                (order::whole(&self.mirror, self.index.sets()), chains.then(BTreeMap::new))
            }
            Scope::Again => {
                let all = self.unwritten_all;
                let chains = if all { BTreeMap::new() } else { self.chain_changes(&self.unwritten) };
                (order::whole(&self.mirror, self.index.sets()), Some(chains))
            }
        };
        self.hold.keep(&mut ordered, &self.mirror, self.index.sets());
        let is_audit = matches!(scope, Scope::All { .. }) && self.trusted;
        if is_audit {
            // What could not be made is no drift; it is tried again with the chains, less often.
            let missing: BTreeSet<_> = self.excluded.sets().copied().collect();
            let again: Vec<Change> =
                ordered.before.extract_if(.., |change| missing.contains(&change.set())).collect();
            self.looks.audited(!ordered.is_empty());
            if !ordered.is_empty() {
                self.shared.count(|numbers| &numbers.drift, ordered.len());
                tracing::warn!(
                    changes = ?ordered.describe(), "ipsets differed from what was programmed, repairing"
                );
            }
            if chains.is_some() {
                ordered.before.extend(again);
            }
        }
        let mut clean = true;
        if !ordered.retype.is_empty() {
            if let Err(error) = self.kernel.retype(&ordered.retype) {
                clean = self.failed_to("replace ipsets of another type", &error);
            }
            match self.kernel.read_sets() {
                Ok(sets) => self.mirror = sets,
                Err(error) => return self.failed_to("read ipsets", &error),
            }
            ordered = order::whole(&self.mirror, self.index.sets());
            self.hold.keep(&mut ordered, &self.mirror, self.index.sets());
            // The chains went with the sets.
            chains = Some(BTreeMap::new());
        }
        let Some(chains) = chains else {
            // No rule changes: one batch.
            let Ordered { before, gates, after, .. } = ordered;
            let changes = [before, gates, after].concat();
            let made = self.apply_sets(&changes);
            return clean & made.clean & (!made.newly_possible || self.pass(Scope::All { chains: true }));
        };
        let whole = matches!(scope, Scope::All { .. }) || chains.is_empty();
        let mut before = ordered.before;
        let mut gates = ordered.gates;
        if whole && !self.in_force() {
            // Nobody is judged yet: with the gates filled, the first packets after the chains meet
            // complete rules, and no pod is closed in between.
            before.append(&mut gates);
        }
        let made = self.apply_sets(&before);
        clean &= made.clean;
        let begun = Instant::now();
        let (mut written, mut locked) = (true, false);
        let (before_it, own_before) = (writes(), self.own_writes);
        let others = self.chain_writes != before_it;
        if whole {
            self.kernel.begin_chain_check();
        }
        for family in self.kernel.families().to_vec() {
            let changes = if whole { None } else { Some(chains.get(&family).cloned().unwrap_or_default()) };
            match self.write_chains(family, changes, is_audit) {
                Written::Yes => {}
                Written::No => written = false,
                // One lock for both: waiting for it twice would only hold up what needs no chain.
                Written::Locked => {
                    (written, locked) = (false, true);
                    break;
                }
            }
        }
        self.wait_for_lock(locked, begun);
        lock(&self.shared.numbers.chains_time).observe(begun.elapsed());
        if whole || !others {
            // Not as it is now: another room may have written since ours.
            self.chain_writes = before_it + (self.own_writes - own_before);
        }
        if written {
            if whole || matches!(scope, Scope::Again) {
                self.unwritten.clear();
                self.unwritten_all = false;
            }
            gates.extend(ordered.after);
        } else {
            self.unwritten_all |= whole;
            if let Scope::Touched(touched) = &scope {
                self.unwritten.extend(touched.chains.iter().copied());
            }
            // A pod that was open stays so until its rules are there. One that was not is let in as
            // far as its rules are; where they are missing it is refused.
            gates = newcomers(gates, &self.mirror);
        }
        // Waiting is no failure: what waits is tried as soon as the lock is free.
        clean &= self.apply_sets(&gates).clean & (written | locked);
        self.tell_left_out();
        clean
    }

    /// Forgets flows of addresses that changed hands: the next pod must not inherit what was allowed
    /// to the last.
    fn forget_flows(&mut self, now: Instant) {
        if self.gone.is_empty() {
            self.forget_at = None;
            return;
        }
        let reused = |ip: &IpAddr| self.index.pods_with(*ip).any(|(_, pod)| pod.is_enforced_here());
        let due = self.forget_at.is_some_and(|at| at <= now)
            || self.forget_cost <= CHEAP_DUMP
            || self.gone.iter().any(reused);
        if !due {
            self.forget_at.get_or_insert(now + FORGET_DELAY);
            return;
        }
        let addresses: Vec<IpAddr> = std::mem::take(&mut self.gone).into_iter().collect();
        self.forget_at = None;
        let begun = Instant::now();
        match self.kernel.forget_flows(&addresses) {
            Ok(count) => self.shared.count(|numbers| &numbers.forgotten_flows, count),
            // Flows end by themselves in time; policy for new ones does not depend on it.
            Err(error) => tracing::warn!(%error, "flows of pods that are gone stay until they time out"),
        }
        self.forget_cost = begun.elapsed();
    }

    /// Notes a failure of the room; always `false`, the pass is not clean.
    fn failed_to(&self, action: &'static str, error: &Error) -> bool {
        tracing::warn!(%error, action, "kernel access failed");
        self.shared.error(error);
        false
    }

    /// Gauges, and what programs and sockets cost.
    fn count(&mut self) {
        use std::sync::atomic::Ordering::Relaxed;
        let numbers = &self.shared.numbers;
        for run in self.kernel.take_runs() {
            let at = usize::from(run.family == Family::V6);
            let times = if run.wrote { &numbers.restores[at] } else { &numbers.saves[at] };
            lock(times).observe(run.time);
        }
        *lock(&numbers.messages) = self.kernel.messages();
        let chains: usize = self
            .kernel
            .families()
            .iter()
            .filter_map(|family| self.index.ruleset(*family))
            .map(|ruleset| ruleset.chains.len())
            .sum();
        let isolated: BTreeSet<&Key> = self.index.isolated().map(|(_, key, _)| key).collect();
        for (gauge, value) in [
            (&numbers.chains, chains),
            (&numbers.sets, self.index.sets().len()),
            (&numbers.isolated, isolated.len()),
            (&numbers.policies, self.index.policy_count()),
            (&numbers.enforced, self.index.enforced_policies().count()),
            (&numbers.excluded, self.excluded.describe().len()),
        ] {
            gauge.store(value as u64, Relaxed);
        }
    }
}

/// Of the pods that go through a gate, those that no gate has let in before.
fn newcomers(gates: Vec<Change>, kernel: &Sets) -> Vec<Change> {
    let is_known = |entry: &Entry| {
        kernel
            .iter()
            .any(|(name, set)| Gate::of(*name) == Some(Gate::Known) && set.entries().contains_key(entry))
    };
    gates
        .into_iter()
        .filter_map(|change| match change {
            Change::Add { set, entries } => {
                let entries: Vec<_> = entries.into_iter().filter(|(entry, _)| !is_known(entry)).collect();
                (!entries.is_empty()).then_some(Change::Add { set, entries })
            }
            other => Some(other),
        })
        .collect()
}

fn merge(pending: &mut Dirty, more: Dirty) {
    pending.pods.extend(more.pods);
    pending.namespaces.extend(more.namespaces);
    pending.network_policies.extend(more.network_policies);
    pending.nodes.extend(more.nodes);
    pending.listed |= more.listed;
    pending.unreadable |= more.unreadable;
    pending.since = pending.since.into_iter().chain(more.since).min();
}
