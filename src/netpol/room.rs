//! The policy room's thread: wakes, computes, compares, applies, checks.
//!
//! It alone writes the chains and sets of policies. An event narrows a pass to what it touches; an
//! audit reads the kernel back and compares everything. Both run the same code.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ferroute_iptables::ipset::{self, Change, Entry, Sets};
use ferroute_iptables::{ChainChanges, ChainName, Family, Plan};
use ferroute_policy::{Direction, Exempt, Gate, Index, Key, Touched, group_chain, policy_chain};
use ipnet::IpNet;

use super::error::Error;
use super::exclude::Excluded;
use super::explain::{self, Answer, KernelState, Question, Unanswerable};
use super::gather;
use super::hold::{self, Hold};
use super::kernel::Kernel;
use super::order::{self, Ordered};
use super::settings::{Services, Settings};
use super::starting::{NotProgrammed, Starting};
use super::status::Status;
use super::view::{Request, Shared, View, lock};
use crate::chains;
use crate::cluster::service::Problem;
use crate::cluster::{Dirty, Interests, Kind, ObjectKey, Subscription};
use crate::disturbance::Disturbance;
use crate::proxy::sets::{Role, SetId};
use crate::report::Reporter;
use crate::schedule::{Due, Schedule};

/// Longest sleep: the loop turns at least so often, which is what liveness means, and looks whether
/// somebody else changed rules.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);
/// How long arrivals gather before a look, while the first lists are on their way.
const LISTING_GATHER: Duration = Duration::from_millis(10);
/// Kinds without which nothing may be decided.
const NEEDED: [Kind; 4] = Interests::NETWORK_POLICY;
/// Rules that one write may leave out one after the other before it counts as failed.
const MOST_LEFT_OUT: usize = 32;
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
    /// Addresses that a local pod had and has no more: their flows are to be forgotten.
    gone: BTreeSet<IpAddr>,
    forget_at: Option<Instant>,
    forget_cost: Duration,
    schedule: Schedule,
    disturbance: Disturbance,
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
        let disturbance = Disturbance::open(kernel.variant());
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
            gone: BTreeSet::new(),
            forget_at: None,
            forget_cost: Duration::ZERO,
            schedule,
            disturbance,
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
            let due = [self.starting.next_deadline(), self.forget_at, Some(self.schedule.next_due())];
            let sleep = due
                .into_iter()
                .flatten()
                .min()
                .map_or(LONGEST_SLEEP, |due| due.saturating_duration_since(now))
                .min(LONGEST_SLEEP);
            let listed = self.subscription.cluster().read().has_listed(&NEEDED);
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
        if !self.hold.is_empty() && !hold::is_blind(&self.subscription.cluster().read()) {
            tracing::info!("everything can be read; nothing is held any more");
            self.hold = Hold::default();
            self.schedule.request_full(started);
            // What goes now was ours to keep, not a stranger's to change.
            self.trusted = false;
        }
        let touched = self.index.settle();
        self.forget_flows(started);
        let mut worked = false;
        let mut clean = true;
        if !self.adopted {
            worked = true;
            clean = self.adopt();
        } else {
            if !touched.is_empty() {
                worked = true;
                clean = self.pass(Scope::Touched(touched));
            }
            if self.chain_writes != chains::writes() {
                // The proxy may have put its jump in front of ours.
                self.schedule.request_rules(started);
            } else if self.disturbance.is_seen() {
                self.schedule.suspect_rules();
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
        self.trusted = clean;
        if clean {
            self.schedule.succeeded();
            self.shared.passed(started, dirty.since);
        } else {
            let retry = self.schedule.failed(Instant::now());
            self.shared.failed(started);
            tracing::warn!(retry_in = ?retry, "policy pass incomplete, the kernel is read and compared again");
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
            if let Some(pod) =
                pod.as_ref().filter(|_| !self.hold.is_empty() && self.index.pod(&key).is_none())
            {
                pod.ips.iter().for_each(|ip| self.hold.release(*ip));
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
            self.hold = Hold::begin(&self.mirror, self.index.sets());
            if !self.hold.is_empty() {
                tracing::warn!(
                    held = ?self.hold.describe(),
                    "something that decides about pods cannot be read; pods that were isolated stay so until it is \
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

    /// Reads the kernel back and repairs what differs.
    fn audit(&mut self, due: Due) -> bool {
        let begun = Instant::now();
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
        let clean = self.pass(Scope::All { chains: due.rules });
        self.schedule.tables_cost(read);
        if due.rules {
            self.kernel.prepare();
            self.schedule.rules_cost(begun.elapsed());
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
        };
        self.hold.keep(&mut ordered);
        let is_audit = matches!(scope, Scope::All { .. }) && self.trusted;
        if is_audit {
            // What could not be made is no drift; it is tried again with the chains, less often.
            let missing: BTreeSet<_> = self.excluded.sets().copied().collect();
            let again: Vec<Change> =
                ordered.before.extract_if(.., |change| missing.contains(&change.set())).collect();
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
            self.hold.keep(&mut ordered);
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
        let mut written = true;
        let (before_it, own_before) = (chains::writes(), self.own_writes);
        let others = self.chain_writes != before_it;
        if whole {
            // Before reading: what others do meanwhile is seen again.
            self.disturbance.settle();
        } else if self.disturbance.is_seen() {
            self.schedule.suspect_rules();
        }
        for family in self.kernel.families().to_vec() {
            let changes = if whole { None } else { Some(chains.get(&family).cloned().unwrap_or_default()) };
            match self.write_chains(family, changes, is_audit) {
                Written::Yes => {}
                Written::No => written = false,
                // One lock for both: waiting for it twice would only hold up what needs no chain.
                Written::Locked => {
                    written = false;
                    break;
                }
            }
        }
        lock(&self.shared.numbers.chains_time).observe(begun.elapsed());
        if self.own_writes != own_before {
            // Our own doing.
            self.disturbance.settle();
        }
        if whole || !others {
            // Not as it is now: another room may have written since ours.
            self.chain_writes = before_it + (self.own_writes - own_before);
        }
        if written {
            if whole {
                self.unwritten.clear();
            }
            gates.extend(ordered.after);
        } else {
            if let Scope::Touched(touched) = &scope {
                self.unwritten.extend(touched.chains.iter().copied());
            }
            // A pod that was open stays so until its rules are there. One that was not is let in as
            // far as its rules are; where they are missing it is refused.
            gates = newcomers(gates, &self.mirror);
        }
        clean &= self.apply_sets(&gates).clean & written;
        self.tell_left_out();
        clean
    }

    /// The rules of these chains, by family.
    fn chain_changes(&self, chains: &BTreeSet<(Family, ChainName)>) -> BTreeMap<Family, ChainChanges> {
        let mut changes: BTreeMap<Family, ChainChanges> = BTreeMap::new();
        for (family, chain) in chains {
            let rules = self.index.ruleset(*family).and_then(|ruleset| ruleset.chains.get(chain)).cloned();
            changes.entry(*family).or_default().insert(*chain, rules);
        }
        changes
    }

    /// Whether the kernel judges pods by our chains already.
    fn in_force(&self) -> bool {
        // The first chain of dispatch is there as long as anything is enforced.
        let Ok(chain) = ChainName::new("KUBE-NWPLCY-INGRESS") else { return false };
        self.kernel.families().iter().all(|family| {
            self.kernel.has_chain(*family, chain)
                || self.kernel.read_chains(*family).is_ok_and(|found| found.chains.contains_key(&chain))
        })
    }

    /// Writes single chains, or reads all of a family and makes them right. A rule that this kernel
    /// cannot take is left out where that allows less, not more.
    fn write_chains(&mut self, family: Family, changes: Option<ChainChanges>, is_audit: bool) -> Written {
        if changes.as_ref().is_some_and(BTreeMap::is_empty) {
            return Written::Yes;
        }
        for _ in 0..=MOST_LEFT_OUT {
            let outcome = match &changes {
                Some(changes) => {
                    let changes = self.excluded.changes(family, changes.clone());
                    self.kernel.change_chains(family, &changes)
                }
                None => {
                    let Some(wanted) = self.index.ruleset(family) else { return Written::Yes };
                    let wanted = self.excluded.ruleset(family, wanted);
                    self.kernel.settle_chains(family, &wanted)
                }
            };
            match outcome {
                Ok(plan) => {
                    self.wrote(family, &plan, is_audit);
                    return Written::Yes;
                }
                Err(error) => {
                    if let Some((line, reason)) = refused_line(&error)
                        && self.excluded.add_line(family, &line, reason)
                    {
                        tracing::warn!(?family, %error, "a rule is left out, what it allows is refused");
                        continue;
                    }
                    let locked = matches!(error, ferroute_iptables::Error::Locked { .. });
                    self.failed_to("write policy chains", &Error::from(error));
                    return if locked { Written::Locked } else { Written::No };
                }
            }
        }
        Written::No
    }

    fn wrote(&mut self, family: Family, plan: &Plan, is_audit: bool) {
        if plan.is_empty() {
            return;
        }
        self.own_writes += 1;
        self.shared.count(|numbers| &numbers.chain_writes, 1);
        if is_audit {
            let count =
                plan.written.len() + plan.deleted.len() + plan.jumps_added.len() + plan.jumps_removed.len();
            self.shared.count(|numbers| &numbers.drift, count);
            tracing::warn!(
                ?family, changes = ?plan.describe(), "policy chains differed from what was programmed, repaired"
            );
        } else {
            tracing::debug!(?family, changes = ?plan.describe(), "policy chains written");
        }
    }

    fn apply_sets(&mut self, changes: &[Change]) -> Made {
        let mut made = Made { clean: true, newly_possible: false };
        if changes.is_empty() {
            return made;
        }
        let begun = Instant::now();
        let failures = match self.kernel.apply_sets(changes, &mut self.mirror) {
            Ok(failures) => failures,
            Err(error) => {
                made.clean = self.failed_to("write ipsets", &error);
                return made;
            }
        };
        let took = begun.elapsed();
        for (at, is_v6) in [false, true].into_iter().enumerate() {
            if changes.iter().any(|change| change.set().as_str().starts_with("inet6:") == is_v6) {
                lock(&self.shared.numbers.set_changes[at]).observe(took);
            }
        }
        if !self.excluded.is_empty() {
            for change in changes {
                if let Change::Create { set, .. } = change
                    && !failures.iter().any(|failure| failure.set == *set)
                {
                    made.newly_possible |= self.excluded.remove_set(*set);
                }
            }
        }
        for failure in failures {
            made.clean &= self.set_refused(&failure);
        }
        made
    }

    /// Notes that the kernel refused a change; whether everything else can go on as if it were made.
    fn set_refused(&mut self, failure: &ipset::Failed) -> bool {
        let was_told = self.excluded.sets().any(|set| *set == failure.set);
        let can_be_missed = match failure.action {
            "create" => self.excluded.add_set(failure.set, failure.refusal.to_string()),
            // Its creation was refused, which was told.
            "add to" => was_told,
            _ => false,
        };
        if !was_told {
            tracing::warn!(error = %failure, can_be_missed, "ipset change refused");
        }
        if !can_be_missed {
            self.shared.error(failure);
        }
        can_be_missed
    }

    /// Tells policies of which something is left out, and those of which nothing is any more.
    fn tell_left_out(&mut self) {
        if self.excluded.is_empty() && self.troubled.is_empty() {
            return;
        }
        let mut told = BTreeSet::new();
        let keys: Vec<Key> = self.index.enforced_policies().cloned().collect();
        for key in keys {
            let chains = Direction::BOTH.map(|direction| policy_chain(direction, &key));
            let Some(reason) = self.excluded.reason(chains) else { continue };
            let object = gather::object_key(&key);
            let problem = Problem {
                reason: "NotEnforcedAsWritten",
                message: format!(
                    "node {}: rules of this NetworkPolicy cannot be written: {reason}; what they allow is refused, the \
                     rest is enforced, and it is tried again on every audit",
                    self.settings.node_name
                ),
            };
            self.reporter.replace("NetworkPolicy", &object, &self.uid(&key), &[problem]);
            told.insert(key);
        }
        for key in self.troubled.difference(&told) {
            self.reporter.resolved("NetworkPolicy", &gather::object_key(key));
        }
        self.troubled = told;
    }

    fn uid(&self, key: &Key) -> Arc<str> {
        let state = self.subscription.cluster().read();
        state.network_policies.get(&gather::object_key(key)).map(|p| p.uid.clone()).unwrap_or_default()
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

    fn answer_requests(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Status(reply) => {
                    let mut status = Status::gather(
                        &self.settings,
                        &self.networks,
                        &self.index,
                        &mut self.kernel,
                        &mut self.excluded,
                        &self.starting,
                        &self.hold,
                    );
                    status.last_clean_pass_seconds =
                        self.shared.last_clean_pass().map(|at| at.elapsed().as_secs_f64());
                    status.errors.extend(self.shared.last_error());
                    // The asker may have given up waiting.
                    let _ = reply.send(status);
                }
                Request::Explain(question, reply) => {
                    let _ = reply.send(self.explain(&question));
                }
                Request::Starting(pod, deadline, reply) => {
                    // Also of pods that claim nothing: the API server still shows the address on them.
                    for address in &pod.addresses {
                        let holders = self.index.pods_with(*address).map(|(key, _)| gather::object_key(key));
                        self.pending.pods.extend(holders);
                    }
                    let changed = self.starting.claim(pod, deadline, reply);
                    self.pending.pods.extend(changed);
                }
                Request::Programmed(key, addresses, reply) => {
                    let _ = reply.send(self.programmed(&key, &addresses));
                }
                Request::Stopped(key, uid, addresses) => {
                    // Of a pod that nobody knows nothing would ever end the memory.
                    let is_known = self.subscription.cluster().read().pods.contains_key(&key);
                    if self.starting.stop(&key, uid, addresses) {
                        if !is_known {
                            self.starting.observe(&key, None);
                        }
                        self.pending.pods.insert(key);
                    }
                }
            }
        }
    }

    fn answer_starting(&mut self, listed: bool) {
        if self.starting.next_deadline().is_none() {
            return;
        }
        let waiting: Vec<_> = self.starting.waiting().cloned().collect();
        let obstacles: BTreeMap<_, _> = waiting
            .into_iter()
            .filter_map(|key| Some((key.clone(), self.obstacle(&gather::key(&key))?)))
            .collect();
        let state = self.subscription.cluster().read();
        self.starting.answer(
            Instant::now(),
            listed,
            |key| obstacles.get(key).cloned(),
            |key| state.pods.get(key).map(Arc::as_ref),
        );
    }

    fn programmed(&self, object: &ObjectKey, addresses: &[IpAddr]) -> Result<(), NotProgrammed> {
        let listed = self.subscription.cluster().read().has_listed(&NEEDED);
        if !listed || !self.adopted {
            return Err(NotProgrammed::NotListed(object.clone()));
        }
        let key = gather::key(object);
        if self.index.pod(&key).is_none() {
            return Err(NotProgrammed::UnknownPod(object.clone()));
        }
        let is_its_own =
            |ip: &IpAddr| self.index.pods_with(*ip).any(|(holder, pod)| *holder == key && pod.local);
        if let Some(foreign) = addresses.iter().find(|ip| !is_its_own(ip)) {
            let reason = format!("{foreign} is not known to be an address of it");
            return Err(NotProgrammed::NotWritten { pod: object.clone(), reason });
        }
        match self.obstacle(&key) {
            None => Ok(()),
            Some(reason) => Err(NotProgrammed::NotWritten { pod: object.clone(), reason }),
        }
    }

    /// What stands against a pod's policies being in the kernel, if anything does.
    fn obstacle(&self, key: &Key) -> Option<String> {
        let reason = || self.shared.last_error().unwrap_or_else(|| "the pass is not done".to_owned());
        if !self.adopted {
            return Some(reason());
        }
        let Some(pod) = self.index.pod(key) else {
            return Some("its addresses belong to another pod".to_owned());
        };
        let differs = |ip: &IpAddr| {
            let entry = Entry::Ip(*ip);
            self.index.sets().iter().any(|(name, set)| {
                set.entries().contains_key(&entry)
                    != self.mirror.get(name).is_some_and(|set| set.entries().contains_key(&entry))
            })
        };
        if pod.ips.iter().any(differs) {
            return Some(reason());
        }
        if self.unwritten.is_empty() {
            return None;
        }
        let unwritten = |chain: ChainName| self.unwritten.iter().any(|(_, name)| *name == chain);
        let waits =
            self.index.isolated().filter(|(_, pod, _)| *pod == key).any(|(direction, _, policies)| {
                unwritten(group_chain(direction, policies))
                    || policies.iter().any(|policy| unwritten(policy_chain(direction, policy)))
            });
        waits.then(reason)
    }

    fn explain(&mut self, question: &Question) -> Result<Answer, Unanswerable> {
        let failed = |error: Error| Unanswerable(format!("the kernel cannot be read: {error}"));
        if !self.adopted {
            return Err(Unanswerable("the cluster is not listed yet, so nothing is decided".to_owned()));
        }
        let mut sets = self.kernel.read_sets().map_err(failed)?;
        if let Exempt::Sets(services) = gather::options(&self.settings, self.kernel.families()).exempt {
            for named in services.into_values() {
                for name in named.addresses.into_iter().chain([named.frontends]) {
                    if let Some(set) = self.kernel.read_set(name).map_err(failed)? {
                        sets.insert(name, set);
                    }
                }
            }
        }
        let mut rulesets = BTreeMap::new();
        for family in self.kernel.families() {
            let found = self.kernel.read_chains(*family).map_err(failed)?;
            if let Some(wanted) = self.index.ruleset(*family) {
                rulesets.insert(*family, found.rules(wanted, *family));
            }
        }
        let kernel = KernelState { rulesets, sets };
        let state = self.subscription.cluster().read();
        explain::explain(question, &self.settings.node_name, &state, &self.index, &kernel)
    }
}

/// What became of chains to be written.
enum Written {
    /// They are in the kernel.
    Yes,
    /// They are not.
    No,
    /// They are not, since another program holds the lock.
    Locked,
}

/// What became of set changes.
struct Made {
    /// Everything asked for is in the kernel, or can be missed.
    clean: bool,
    /// A set that could not be made before now exists: rules that were left out can be written.
    newly_possible: bool,
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

/// The line of a restore document that the kernel cannot take for good, with the reason. A set that
/// is missing comes back with the next audit of the sets.
fn refused_line(error: &ferroute_iptables::Error) -> Option<(String, String)> {
    match error {
        ferroute_iptables::Error::Failed { stderr, line: Some(line), .. }
            if !(stderr.contains("Set ") && stderr.contains("doesn't exist")) =>
        {
            Some((line.clone(), stderr.lines().next().unwrap_or_default().to_owned()))
        }
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lasting_refusals_leave_rules_out() {
        let failed = |stderr: &str, line: Option<&str>| ferroute_iptables::Error::Failed {
            program: "iptables-restore".to_owned(),
            status: "exit status: 2".to_owned(),
            stderr: stderr.to_owned(),
            line: line.map(str::to_owned),
        };
        let missing_match =
            failed("Couldn't load match `x'\nError occurred at line: 3", Some("-A KUBE-X -m x"));
        let (line, reason) = refused_line(&missing_match).unwrap();
        assert_eq!((line.as_str(), reason.as_str()), ("-A KUBE-X -m x", "Couldn't load match `x'"));
        assert_eq!(refused_line(&failed("Set KUBE-SRC-A doesn't exist.", Some("-A X"))), None);
        assert_eq!(refused_line(&failed("line 3 failed", None)), None);
    }
}
