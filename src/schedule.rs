//! When a room looks at the kernel again: a full audit each period, cheap ones in between, and soon
//! after anything failed. Time is passed in.
//!
//! A cheap audit may cost a fortieth of a percent of one core, so its interval follows what it
//! cost last time: a second on a small node, minutes where a hundred thousand destinations must be
//! read. Looks, which notice most of what others do, may cost more: both together stay below a
//! thousandth of a core.

use std::time::{Duration, Instant};

/// Shortest interval between cheap audits.
const SHORTEST: Duration = Duration::from_secs(1);
/// Share of one core that audits of one kind may take: 1 in this many.
const SHARE: u32 = 4000;
/// The same for looks.
const LOOK_SHARE: u32 = 1500;
/// The same for looks at rules that somebody may have changed, after none, one, two and more of them in a
/// row that found nothing wrong: who writes rules of his own all the time shall cost little, and who breaks
/// ours is answered soon.
const FAIR_SHARES: [u32; 4] = [2, 4, 8, 10];
/// First and last delay after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Delay while another program holds a lock.
const LOCK_RETRY: Duration = Duration::from_secs(1);

/// Shortest and longest pause between cheap looks.
const LOOK_PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(300));

/// What is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Virtual servers, sets and routes.
    pub tables: bool,
    /// Routes alone (a network event spoke of them).
    pub routes: bool,
    /// Chains and jumps.
    pub rules: bool,
}

/// The room's timers.
#[derive(Debug)]
pub struct Schedule {
    period: Duration,
    tables: Instant,
    rules: Instant,
    fair_rules: Instant,
    /// The next look at the rules follows a suspicion.
    suspected: bool,
    /// Suspicions in a row that were wrong.
    futile: usize,
    routes: Option<Instant>,
    retry: Option<Instant>,
    delay: Duration,
}

impl Schedule {
    /// Timers with this period for full audits; the first is a period away.
    pub fn new(period: Duration, now: Instant) -> Self {
        let next = now + period.min(SHORTEST);
        Self {
            period,
            tables: next,
            rules: now + period,
            fair_rules: now,
            suspected: false,
            futile: 0,
            routes: None,
            retry: None,
            delay: RETRY.0,
        }
    }

    /// When something is due next.
    pub fn next_due(&self) -> Instant {
        [self.tables, self.rules]
            .into_iter()
            .chain(self.routes)
            .chain(self.retry)
            .min()
            .unwrap_or(self.tables)
    }

    /// When everything is tried again after a failure.
    pub fn next_retry(&self) -> Option<Instant> {
        self.retry
    }

    /// What is due now; it counts as done until asked for again.
    pub fn take_due(&mut self, now: Instant) -> Option<Due> {
        let retry = self.retry.take_if(|retry| *retry <= now).is_some();
        let due = Due {
            tables: retry || self.tables <= now,
            routes: self.routes.take_if(|routes| *routes <= now).is_some(),
            rules: retry || self.rules <= now,
        };
        if due.tables {
            self.tables = now + self.period;
        }
        if due.rules {
            self.rules = now + self.period;
        }
        (due != Due::default()).then_some(due)
    }

    /// Looks at routes soon; a burst of network events is one look.
    pub fn request_routes(&mut self, now: Instant) {
        self.routes.get_or_insert(now + Duration::from_millis(50));
    }

    /// Audits everything at once.
    pub fn request_full(&mut self, now: Instant) {
        self.tables = now;
    }

    /// Looks at the rules at once.
    pub fn request_rules(&mut self, now: Instant) {
        self.rules = now;
    }

    /// Looks at the rules as soon as it is fair: somebody may change them all the time.
    pub fn suspect_rules(&mut self) {
        self.suspected |= self.fair_rules < self.rules;
        self.rules = self.rules.min(self.fair_rules);
    }

    /// What the last look at the tables cost: sets the time of the next.
    pub fn tables_cost(&mut self, cost: Duration) {
        self.tables = self.tables.min(Instant::now() + affordable(cost).min(self.period));
    }

    /// What the last look at the rules cost, and whether it found anything wrong.
    pub fn rules_cost(&mut self, cost: Duration, found: bool) {
        let suspected = std::mem::take(&mut self.suspected);
        if found {
            self.futile = 0;
        } else if suspected {
            self.futile = (self.futile + 1).min(FAIR_SHARES.len() - 1);
        }
        self.fair_rules = Instant::now() + cost * FAIR_SHARES.get(self.futile).copied().unwrap_or(1);
        self.rules = self.rules.min(Instant::now() + affordable(cost).min(self.period));
    }

    /// A pass failed: everything is compared again after a growing delay, which is returned.
    pub fn failed(&mut self, now: Instant) -> Duration {
        let delay = self.delay;
        self.retry = Some(now + delay);
        self.delay = (self.delay * 2).min(RETRY.1);
        delay
    }

    /// Another program holds a lock that is needed: the next failure is retried soon, however many there
    /// were.
    pub fn lock_is_held(&mut self) {
        self.delay = LOCK_RETRY;
    }

    /// A pass was clean: the next failure is retried quickly again.
    pub fn succeeded(&mut self) {
        self.delay = RETRY.0;
        self.retry = None;
    }
}

/// When to look cheaply whether tables changed, between audits that read them. A look that alarms has
/// everything read; where that finds nothing wrong, looks become rarer.
#[derive(Debug)]
pub struct Looks {
    next: Instant,
    pause: Duration,
    /// What the last one cost: on a busy machine one alone says little.
    last_cost: Duration,
    alarmed: bool,
}

impl Looks {
    /// The first is due after the shortest pause.
    pub fn new(now: Instant) -> Self {
        Self { next: now + LOOK_PAUSES.0, pause: LOOK_PAUSES.0, last_cost: Duration::ZERO, alarmed: false }
    }

    /// When the next one is due.
    pub fn next_due(&self) -> Instant {
        self.next
    }

    /// Whether a look is due.
    pub fn is_due(&self, now: Instant) -> bool {
        self.next <= now
    }

    /// Notes a look, how much of a processor's time it took, and whether something seemed changed.
    pub fn looked(&mut self, now: Instant, cost: Duration, alarmed: bool) {
        self.alarmed = alarmed;
        let usual = std::mem::replace(&mut self.last_cost, cost).min(cost);
        self.next = now + (usual * LOOK_SHARE).clamp(self.pause, LOOK_PAUSES.1);
    }

    /// Notes whether an audit found something wrong.
    pub fn audited(&mut self, found: bool) {
        if std::mem::take(&mut self.alarmed) {
            self.pause = if found { LOOK_PAUSES.0 } else { (self.pause * 2).min(LOOK_PAUSES.1) };
        }
    }
}

/// Times a look.
#[derive(Debug)]
pub struct Stopwatch {
    started: Instant,
    thread: Duration,
}

impl Stopwatch {
    /// Starts now, for the calling thread.
    pub fn start() -> Self {
        Self { started: Instant::now(), thread: thread_time() }
    }

    /// The processor's time that the calling thread has taken since the start, kernel work for it included.
    pub fn cost(&self) -> Duration {
        let taken = self.started.elapsed();
        cost(taken, thread_time().saturating_sub(self.thread))
    }
}

/// Waiting for others on a busy node is no cost; but some kernels count whole ticks, mostly none.
fn cost(taken: Duration, thread: Duration) -> Duration {
    if thread.is_zero() { taken } else { thread.min(taken) }
}

fn thread_time() -> Duration {
    // Where there is no such clock, what a look takes is its cost.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}

fn affordable(cost: Duration) -> Duration {
    (cost * SHARE).max(SHORTEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_back_off_and_success_resets() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Duration::from_secs(300), now);
        assert_eq!(schedule.failed(now), Duration::from_millis(100));
        assert_eq!(schedule.failed(now), Duration::from_millis(200));
        for _ in 0..20 {
            schedule.failed(now);
        }
        assert_eq!(schedule.failed(now), Duration::from_secs(30));
        schedule.succeeded();
        assert_eq!(schedule.failed(now), Duration::from_millis(100));
        let due = schedule.take_due(now + Duration::from_millis(100)).unwrap();
        assert!(due.tables && due.rules);
        for _ in 0..20 {
            schedule.lock_is_held();
            assert_eq!(schedule.failed(now), LOCK_RETRY);
        }
    }

    #[test]
    fn dear_audits_are_rare_and_cheap_ones_frequent() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Duration::from_secs(300), now);
        assert!(schedule.take_due(now + SHORTEST).unwrap().tables);
        schedule.tables_cost(Duration::from_micros(100));
        assert!(schedule.next_due() <= Instant::now() + Duration::from_secs(1));
        schedule.take_due(Instant::now() + Duration::from_secs(2));
        schedule.tables_cost(Duration::from_millis(80));
        assert!(schedule.next_due() > Instant::now() + Duration::from_secs(150));
    }

    #[test]
    fn suspicion_is_followed_at_once_and_then_in_fair_intervals() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Duration::from_secs(300), now);
        let mut pause = |found: bool| {
            schedule.suspect_rules();
            assert!(schedule.take_due(schedule.rules).unwrap().rules);
            let looked = Instant::now();
            schedule.rules_cost(Duration::from_millis(100), found);
            schedule.suspect_rules();
            (schedule.rules - looked).as_millis() / 100
        };
        assert_eq!([(); 4].map(|()| pause(false)), [4, 8, 10, 10]);
        assert_eq!(pause(true), 2, "ours were broken");
        assert_eq!(pause(false), 4);
    }

    #[test]
    fn looks_that_alarm_for_nothing_become_rare() {
        let now = Instant::now();
        let mut looks = Looks::new(now);
        assert!(!looks.is_due(now) && looks.is_due(now + LOOK_PAUSES.0));
        looks.looked(now, Duration::from_millis(9), false);
        assert!(looks.is_due(now + LOOK_PAUSES.0), "once is no rule");
        looks.looked(now, Duration::from_millis(1), false);
        assert!(
            !looks.is_due(now + Duration::from_millis(1499))
                && looks.is_due(now + Duration::from_millis(1500))
        );
        for _ in 0..20 {
            looks.looked(now, Duration::ZERO, true);
            looks.audited(false);
        }
        looks.looked(now, Duration::ZERO, true);
        assert!(!looks.is_due(now + Duration::from_secs(299)) && looks.is_due(now + LOOK_PAUSES.1));
        looks.audited(true);
        looks.looked(now, Duration::ZERO, false);
        assert!(looks.is_due(now + LOOK_PAUSES.0));
    }

    #[test]
    fn a_thread_whose_time_is_told_in_ticks_counts_by_the_clock() {
        let ms = Duration::from_millis;
        for (taken, thread, expected) in [(8, 0, 8), (8, 3, 3), (8, 10, 8)] {
            assert_eq!(cost(ms(taken), ms(thread)), ms(expected));
        }
    }

    #[test]
    fn route_events_are_gathered() {
        let now = Instant::now();
        let mut schedule = Schedule::new(Duration::from_secs(300), now);
        schedule.request_routes(now);
        schedule.request_routes(now + Duration::from_millis(40));
        let due = schedule.take_due(now + Duration::from_millis(50)).unwrap();
        assert_eq!(due, Due { tables: false, routes: true, rules: false });
        assert_eq!(schedule.take_due(now + Duration::from_millis(51)), None);
    }
}
