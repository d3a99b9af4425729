//! The Service room's thread: wakes, computes, compares, applies, checks.
//!
//! It alone writes the kernel tables of Services. An event narrows a pass to the keys it touches;
//! an audit reads the kernel back and compares everything. Both run the same code.

mod apply;
mod check;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ferroute_iptables::Family;
use ferroute_ipvs as ipvs;

use crate::chains::Rules;
use crate::cluster::service::{Problem, Service};
use crate::cluster::{Dirty, Interests, Kind, ServiceKey, Subscription};
use crate::proxy::desired::desired;
use crate::proxy::drain::Drains;
use crate::proxy::error::Error;
use crate::proxy::facts::Facts;
use crate::proxy::healthcheck::HealthServers;
use crate::proxy::hold::{Causes, Hold};
use crate::proxy::kernel::Kernel;
use crate::proxy::ledger::{Ledger, Touched};
use crate::proxy::mirror::{self, Changes, Mirror, Scope};
use crate::proxy::programmed::State;
use crate::proxy::settings::Settings;
use crate::proxy::status::Status;
use crate::proxy::view::{Request, Shared, View};
use crate::report::Reporter;
use crate::schedule::{Looks, Schedule};

/// Services taken per step: bounds the memory of a cold start and lets it begin serving at once.
const STEP: usize = 512;
/// How often draining destinations are looked at.
const DRAIN_TICK: Duration = Duration::from_secs(1);
/// How often it is asked whether a stranger wrote rules, however rare looks have become: it is one message.
const RULES_QUESTION: Duration = Duration::from_secs(1);
/// Longest sleep: the loop turns at least so often, which is what liveness means.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);
/// How long arrivals gather before a look, while the first lists are on their way.
const LISTING_GATHER: Duration = Duration::from_millis(10);
/// Kinds without which nothing may be decided.
/// Ranges are among them: without, a restart would unbind a range that is bound.
const NEEDED: [Kind; 4] = Interests::SERVICE_PROXY;

/// The Service room. [`Room::run`] is its thread.
pub struct Room {
    settings: Settings,
    subscription: Subscription,
    reporter: Reporter,
    shared: Arc<Shared>,
    requests: Receiver<Request>,
    kernel: Kernel,
    facts: Facts,
    ledger: Ledger,
    mirror: Mirror,
    drains: Drains,
    hold: Hold,
    next_drain_tick: Option<Instant>,
    missing_schedulers: BTreeSet<Box<str>>,
    health_servers: HealthServers,
    health: BTreeMap<ServiceKey, (u16, usize)>,
    /// Virtual servers that may not be in the kernel as wanted: a change of them was refused or failed.
    undone: HashSet<ipvs::VirtualServerKey>,
    /// Services of which something was refused by the kernel, until the next clean pass.
    troubled: BTreeSet<ServiceKey>,
    /// The facts could not be gathered when they changed; tried again on every turn.
    stale_facts: bool,
    /// Changes taken from the cluster that no pass has applied yet.
    pending: Dirty,
    schedule: Schedule,
    looks: Looks,
    /// When strangers' rules are asked for next.
    rules_question: Instant,
    /// Of the mirror's virtual servers, as looks compare it.
    fingerprint: Option<ipvs::Fingerprint>,
    /// The kernel refused single objects in this turn.
    refused: bool,
    /// The chains were read back and made right in this turn.
    rules_checked: bool,
    /// The chains could not be made right when last tried.
    rules_wrong: bool,
    /// The kernel has been read and compared once since every watch listed.
    adopted: bool,
}

impl Room {
    /// Opens the kernel handles and prepares the kernel (dummy link, sysctls, IPVS timeouts). Must
    /// be called inside a tokio runtime: the health check servers run there.
    pub fn open(
        settings: Settings,
        subscription: Subscription,
        reporter: Reporter,
    ) -> Result<(Self, View), Error> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| Error::Runtime)?;
        let (view, shared, requests) = View::new(subscription.waker());
        let kernel = Kernel::open(&settings)?;
        let ledger = Ledger::new(kernel.families());
        let schedule = Schedule::new(settings.audit_period, Instant::now());
        let room = Self {
            settings,
            subscription,
            reporter: reporter.room("proxy"),
            shared,
            requests,
            kernel,
            facts: Facts::default(),
            ledger,
            mirror: Mirror::default(),
            drains: Drains::default(),
            hold: Hold::default(),
            next_drain_tick: None,
            missing_schedulers: BTreeSet::new(),
            health_servers: HealthServers::new(runtime),
            health: BTreeMap::new(),
            undone: HashSet::new(),
            troubled: BTreeSet::new(),
            stale_facts: false,
            pending: Dirty::default(),
            schedule,
            looks: Looks::new(Instant::now()),
            rules_question: Instant::now(),
            fingerprint: None,
            refused: false,
            rules_checked: false,
            rules_wrong: false,
            adopted: false,
        };
        Ok((room, view))
    }

    /// Runs until [`View::stop`]. Kernel state stays as it is: the data plane outlives the daemon.
    pub fn run(mut self) -> Result<(), Error> {
        // Watch first, read afterwards: what changes in between is then seen, not missed.
        self.kernel.watch(self.subscription.waker())?;
        loop {
            let now = Instant::now();
            // Nothing can be decided before the lists are complete: until then one look at ten
            // thousand arrivals does, instead of ten thousand wake-ups.
            let listed = self.subscription.cluster().read().has_listed(&NEEDED);
            let sleep =
                if listed { self.next_due(now).saturating_duration_since(now) } else { LONGEST_SLEEP };
            let sleep = sleep.min(LONGEST_SLEEP);
            let dirty = self.subscription.wait(sleep, if listed { Duration::ZERO } else { LISTING_GATHER });
            // A change that came while this thread slept woke it at once; one look at the clock less is
            // worth having where each is a system call.
            let woken = dirty.since.map_or_else(Instant::now, |since| since.max(now));
            self.shared.turned(woken);
            if self.shared.is_stopping() {
                return Ok(());
            }
            merge(&mut self.pending, dirty);
            self.answer_requests();
            let Some(rest) = self.subscription.take_listed(&NEEDED) else {
                // Nothing is decided on an incomplete view; the kernel keeps what it has.
                continue;
            };
            merge(&mut self.pending, rest);
            self.turn(woken);
        }
    }

    /// When the next turn has something to do of itself. Audits begin with the adoption, which only a
    /// failure puts off.
    fn next_due(&self, now: Instant) -> Instant {
        if !self.adopted {
            return self.schedule.next_retry().unwrap_or(now);
        }
        let due = self.schedule.next_due().min(self.looks.next_due()).min(self.rules_question);
        self.next_drain_tick.map_or(due, |tick| tick.min(due))
    }

    /// One turn: what is pending, what drains, what is due.
    fn turn(&mut self, started: Instant) {
        let host_changed = self.kernel.take_host_changes();
        let mut clean = true;
        let mut worked = false;
        self.refused = false;
        self.rules_checked = false;

        if host_changed.routes {
            self.schedule.request_routes(started);
        }
        if host_changed.rules || self.rules_question <= started {
            self.rules_question = started + RULES_QUESTION;
            if self.kernel.are_rules_disturbed() {
                self.schedule.suspect_rules();
            }
        }
        if !self.adopted
            || host_changed.addresses
            || !self.pending.nodes.is_empty()
            || self.pending.service_cidrs
            || self.stale_facts
        {
            worked = true;
            // What woke us is forgotten below; a failure is not.
            self.stale_facts = !self.refresh_facts();
            clean &= !self.stale_facts;
        }
        if !self.adopted {
            clean &= self.read_kernel();
            self.shared.worked(|work| work.adopting += started.elapsed());
            clean = clean && self.ensure_sets();
            if !clean {
                self.fail(started);
                return;
            }
            self.hold = self.begin_hold();
        }
        let judge_leftovers = self.adopted && self.update_hold();
        let dirty = std::mem::take(&mut self.pending);
        if !dirty.services.is_empty() {
            worked = true;
            clean &= self.take_services(&dirty);
        }
        if judge_leftovers {
            worked = true;
            clean &= self.pass(&Scope::All);
        }
        if self.next_drain_tick.is_some_and(|tick| tick <= started) {
            worked = true;
            clean &= self.tick_drains();
        }
        if !self.adopted {
            // What was in the kernel before and nobody wants is removed only now that every
            // Service is known.
            self.keep_leftovers();
            // What is wanted was compared on the way; what failed there is compared once more.
            clean &= self.pass(if clean { &Scope::Leftovers } else { &Scope::All });
            clean &= self.sync_rules(!self.rules_checked);
            // What failed is compared again soon; it does not keep the rest from being adopted.
            self.adopted = true;
            self.shared.programmed.complete();
        } else if let Some(audit) = self.schedule.take_due(started) {
            worked = true;
            clean &= self.audit(audit);
        } else if !worked && self.looks.is_due(started) {
            self.look(started);
        }
        self.next_drain_tick = (!self.drains.is_empty())
            .then(|| self.next_drain_tick.filter(|tick| *tick > started).unwrap_or(started + DRAIN_TICK));
        if !worked && self.adopted && clean && !self.refused {
            return;
        }
        let messages = self.kernel.messages();
        self.shared.worked(|work| work.messages = messages);
        if clean && self.rules_wrong {
            // What changed is in the kernel, but the node is not as it should be, and a retry of the
            // chains is due already.
            self.shared.failed(started);
        } else if clean && self.refused {
            // Every stage ran; single objects that the kernel refused are told on the objects and
            // tried again, but do not make the node unready.
            self.schedule.failed(Instant::now());
            self.shared.passed(started, &dirty, self.ledger.served(), self.drains.len());
        } else if clean {
            let healed: Vec<ServiceKey> = std::mem::take(&mut self.troubled).into_iter().collect();
            self.report(&healed);
            self.schedule.succeeded();
            self.shared.passed(started, &dirty, self.ledger.served(), self.drains.len());
        } else {
            self.fail(started);
        }
    }

    fn fail(&mut self, started: Instant) {
        let retry = self.schedule.failed(Instant::now());
        self.shared.failed(started);
        tracing::warn!(retry_in = ?retry, "Service pass incomplete, the kernel is read and compared again");
    }

    /// Gathers the facts again; every Service depends on them.
    fn refresh_facts(&mut self) -> bool {
        let host = match self.kernel.host_addresses() {
            Ok(addresses) => addresses,
            Err(error) => {
                self.shared.error(&error);
                tracing::warn!(%error, "cannot list host addresses");
                return false;
            }
        };
        let facts = {
            let state = self.subscription.cluster().read();
            Facts::gather(&self.settings, &state, &host, self.kernel.has_ipv6())
        };
        if facts == self.facts {
            return true;
        }
        if self.adopted
            && let Some(moved) = facts.moved_elsewhere(&self.facts)
        {
            return self.take_moved(facts, moved);
        }
        tracing::info!(
            ipv4 = ?facts.ipv4, ipv6 = ?facts.ipv6, zone = ?facts.zone, pod_cidrs = ?facts.pod_cidrs,
            ranges = ?facts.bound_ranges, "node facts changed"
        );
        self.facts = facts;
        // Before the first virtual server: IPVS must hand its connections to netfilter.
        self.kernel.prepare(&self.facts);
        let mut touched = self.ledger.put_node(&self.facts);
        if !self.adopted {
            // All Services are pending anyway: none was taken yet.
            return true;
        }
        self.pending.services.extend(self.subscription.cluster().read().services.keys().cloned());
        // A range that comes takes the place of its single VIPs in one step.
        touched.routes = true;
        let clean = self.pass(&Scope::Touched(&touched));
        self.sync_rules(false) && clean
    }

    /// Addresses of other machines changed: what is served and bound at them may have to.
    fn take_moved(&mut self, facts: Facts, moved: HashSet<IpAddr>) -> bool {
        self.facts = facts;
        let concerned: Vec<ServiceKey> = {
            let state = self.subscription.cluster().read();
            let has = |service: &Service| {
                let vips = service.cluster_ips.iter().chain(&service.external_ips);
                vips.chain(&service.load_balancer_ips).any(|vip| moved.contains(vip))
            };
            state.services.iter().filter(|(_, service)| has(service)).map(|(key, _)| key.clone()).collect()
        };
        self.pending.services.extend(concerned);
        let touched = Touched { vips: moved.into_iter().collect(), ..Touched::default() };
        self.pass(&Scope::Touched(&touched))
    }

    /// Recomputes dirty Services step by step; the API server's own Service first and alone, so
    /// that nothing else can delay it.
    fn take_services(&mut self, dirty: &Dirty) -> bool {
        let mut clean = true;
        let api = ServiceKey::new("default", "kubernetes");
        if dirty.services.len() > 1 && dirty.services.contains(&api) {
            clean &= self.step(std::iter::once(&api));
            if !self.adopted {
                // Rules come before the many others: without masquerade the API Service is no use.
                clean &= self.write_rules_for(&api);
            }
        }
        let mut keys =
            dirty.services.iter().filter(|key| **key != api || dirty.services.len() == 1).peekable();
        while keys.peek().is_some() {
            clean &= self.step(keys.by_ref().take(STEP));
        }
        clean
    }

    /// Writes the rules, beginning with the families that the API server's own Service has.
    fn write_rules_for(&mut self, api: &ServiceKey) -> bool {
        let families: BTreeSet<Family> =
            self.ledger.frontends(api).iter().map(|frontend| Family::of(frontend.address)).collect();
        let (first, rest): (Rules, Rules) =
            self.wanted_rules().into_iter().partition(|((family, _), _)| families.contains(family));
        let served = !first.is_empty();
        let usable = self.write_rules(first, true);
        if served && usable {
            self.shared.worked(|work| work.api_usable = Some(Instant::now()));
        }
        let complete = self.write_rules(rest, true);
        self.rules_wrong = !(usable && complete);
        usable && complete
    }

    /// What cannot be read now, as far as it concerns this room.
    fn causes(&self) -> Causes {
        Causes::of(&self.subscription.cluster().read(), &self.settings.node_name)
    }

    fn begin_hold(&self) -> Hold {
        let causes = self.causes();
        Hold::begin(causes, &self.subscription.cluster().read(), &self.mirror, &self.facts, &self.settings)
    }

    fn keep_leftovers(&mut self) {
        self.hold.keep_leftovers(&self.mirror, &self.ledger, &self.facts, self.kernel.device());
        if self.hold.is_active() {
            tracing::warn!(
                objects = ?self.hold.causes().describe(),
                kept = self.hold.len(),
                services = self.hold.services(),
                "objects cannot be read, and what the kernel holds may be theirs: nothing that this leaves \
                 without an owner is removed until they are corrected or deleted"
            );
        }
        self.shared.held(self.hold.len() + self.hold.services());
    }

    /// Takes note of objects that were corrected or deleted; true when leftovers are to be judged.
    fn update_hold(&mut self) -> bool {
        if !self.hold.is_active() {
            return false;
        }
        let (mended, over) = self.hold.update(self.causes());
        self.pending.services.extend(mended);
        if !self.hold.is_active() {
            tracing::info!("every object can be read: kernel state without an owner is removed again");
        }
        self.shared.held(self.hold.len() + self.hold.services());
        over
    }

    fn step<'a>(&mut self, keys: impl Iterator<Item = &'a ServiceKey>) -> bool {
        let mut touched = Touched::default();
        let mut changed = Vec::new();
        for key in keys {
            let state = {
                let cluster = self.subscription.cluster().read();
                cluster.services.get(key).map(|service| {
                    let readable = cluster.slices.get(key);
                    let held = self.hold.slices(key, readable);
                    desired(
                        service,
                        held.as_ref().or(readable),
                        &self.facts,
                        &self.settings,
                        &self.missing_schedulers,
                    )
                })
            };
            match state.as_ref().and_then(|state| state.health) {
                Some(health) => self.health.insert(key.clone(), health),
                None => self.health.remove(key),
            };
            self.ledger.put_into(key, state, &mut touched);
            changed.push(key.clone());
        }
        changed.extend(std::mem::take(&mut touched.services));
        self.hold.release(&touched, &self.ledger);
        let clean = self.pass(&Scope::Touched(&touched));
        self.sync_health_servers();
        self.report(&changed);
        clean
    }

    /// Compares and applies. Returns whether everything asked for is now in the kernel.
    fn pass(&mut self, scope: &Scope<'_>) -> bool {
        let changes = self.compare(scope);
        let clean = if changes.is_empty() { self.found(&changes) } else { self.apply(changes) };
        self.note_programmed(scope);
        clean
    }

    /// Nothing differs, as far as was compared.
    fn found(&mut self, changes: &Changes) -> bool {
        if !self.undone.is_empty() {
            self.undone.retain(|key| !changes.wanted.contains_key(key));
        }
        true
    }

    /// Tells which VIPs are served now.
    fn note_programmed(&self, scope: &Scope<'_>) {
        let vips: Vec<IpAddr> = match scope {
            Scope::Touched(touched) if !touched.routes => touched.vips.iter().copied().collect(),
            _ => self.ledger.vips().chain(self.shared.programmed.all()).collect(),
        };
        let undone: HashSet<IpAddr> = self
            .undone
            .iter()
            .filter_map(|key| match key {
                ipvs::VirtualServerKey::Address { address, .. } => Some(*address),
                ipvs::VirtualServerKey::Mark { .. } => None,
            })
            .collect();
        let state = |vip: IpAddr| {
            if !self.ledger.has_vip(vip) {
                State::Gone
            } else if undone.contains(&vip) || !self.mirror.binds(vip, &self.facts) {
                State::Undone
            } else {
                State::Ready
            }
        };
        self.shared.programmed.note(vips.into_iter().map(|vip| (vip, state(vip))));
    }

    fn compare(&mut self, scope: &Scope<'_>) -> Changes {
        let changes = mirror::diff(
            &self.mirror,
            &self.ledger,
            &mut self.drains,
            &self.hold,
            &self.facts,
            self.kernel.device(),
            scope,
            self.settings.graceful_period,
            crate::proxy::kernel::now,
        );
        if !self.drains.is_empty() && self.next_drain_tick.is_none() {
            self.next_drain_tick = Some(Instant::now() + DRAIN_TICK);
        }
        changes
    }

    /// Looks at what drains; deletes what is quiet or out of time.
    fn tick_drains(&mut self) -> bool {
        self.next_drain_tick = None;
        let mut touched = Touched::default();
        for server in self.drains.servers() {
            match self.kernel.quiet_destinations(&server) {
                Ok(quiet) => {
                    for destination in quiet {
                        self.drains.set_quiet(&server, &destination);
                    }
                }
                Err(error) => {
                    // The virtual server may be gone; the next audit sees it.
                    self.failed_to("read draining destinations", &error);
                    self.schedule.request_full(Instant::now());
                }
            }
            if self.drains.end(&server, Instant::now()) {
                touched.servers.insert(server);
            }
        }
        touched.servers.is_empty() || self.pass(&Scope::Touched(&touched))
    }

    fn sync_health_servers(&mut self) {
        let wanted =
            self.health.iter().map(|(service, (port, local))| (*port, (service.clone(), *local))).collect();
        for (service, port, error) in self.health_servers.set(wanted) {
            let uid = self.uid(&service);
            self.reporter.problem(
                "Service",
                &service,
                &uid,
                &Problem {
                    reason: "HealthCheckPortTaken",
                    message: format!(
                        "node {} cannot listen on health check node port {port} of Service {service}: {error}; \
                         stop what listens there, it is tried again on every audit",
                        self.facts.name
                    ),
                },
            );
        }
    }

    /// Tells what cannot be honoured of these Services, and that what was told before is over.
    fn report(&self, keys: &[ServiceKey]) {
        for key in keys {
            self.reporter.replace("Service", key, &self.uid(key), &self.ledger.problems(key));
        }
    }

    fn uid(&self, key: &ServiceKey) -> Arc<str> {
        self.subscription.cluster().read().services.get(key).map(|s| s.uid.clone()).unwrap_or_default()
    }

    /// Notes a failure of the room; always `false`, the pass is not clean.
    fn failed_to(&self, action: &'static str, error: &Error) -> bool {
        tracing::warn!(%error, action, "kernel access failed");
        self.shared.error(error);
        false
    }

    fn answer_requests(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Status(reply) => {
                    let status = Status::gather(
                        &self.settings,
                        &self.facts,
                        &self.ledger,
                        // A question must not end a drain.
                        &mut self.drains.clone(),
                        &self.hold,
                        &mut self.kernel,
                        &self.mirror,
                    );
                    // The asker may have given up waiting.
                    let _ = reply.send(status);
                }
                Request::Statistics(reply) => {
                    let _ = reply.send(self.kernel.statistics(&self.ledger));
                }
            }
        }
    }
}

fn merge(pending: &mut Dirty, more: Dirty) {
    if pending.services.is_empty() {
        pending.services = more.services;
    } else {
        pending.services.extend(more.services);
    }
    pending.nodes.extend(more.nodes);
    pending.service_cidrs |= more.service_cidrs;
    pending.listed |= more.listed;
    pending.unreadable |= more.unreadable;
    pending.since = pending.since.into_iter().chain(more.since).min();
    for (service, at) in more.triggered {
        let first = pending.triggered.entry(service).or_insert(at);
        *first = at.min(*first);
    }
}
