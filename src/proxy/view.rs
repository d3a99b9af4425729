//! What other threads see of the Service room: health, status, metrics, and how to stop it.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use super::kernel::ServiceStatistics;
use super::metrics::Numbers;
use super::programmed::Programmed;
use super::status::Status;
use super::work::Work;
use crate::cluster::{Dirty, Waker};
use crate::health::Passes;
use crate::metrics::lock;

/// Questions the room answers between two passes, since it alone owns the kernel handles.
pub(super) enum Request {
    /// Desired, actual and difference.
    Status(SyncSender<Status>),
    /// Traffic counters of every virtual server.
    Statistics(SyncSender<Vec<ServiceStatistics>>),
}

/// Numbers written by the room and read by everybody.
pub(super) struct Shared {
    started_at: SystemTime,
    stopping: AtomicBool,
    health: Mutex<Passes>,
    pub(super) numbers: Numbers,
    pub(super) programmed: Arc<Programmed>,
}

impl Shared {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn turned(&self, now: Instant) {
        lock(&self.health).last_turn = now;
    }

    pub(super) fn passed(&self, started: Instant, dirty: &Dirty, servers: usize, draining: usize) {
        let (now, wall) = (Instant::now(), SystemTime::now());
        lock(&self.health).passed(now);
        self.numbers.virtual_servers.store(servers as u64, Ordering::Relaxed);
        self.numbers.draining.store(draining as u64, Ordering::Relaxed);
        lock(&self.numbers.passes).observe(now - started);
        if let Some(since) = dirty.since {
            let mut latency = lock(&self.numbers.latency);
            for duration in programming_durations(dirty, self.started_at, wall, now - since) {
                latency.observe(duration);
            }
            drop(latency);
            lock(&self.numbers.changes).observe(now - since);
            let mut work = lock(&self.numbers.work);
            work.changes += 1;
            work.latency += now - since;
        }
        let unix = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let unix = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        self.numbers.last_clean_unix_ms.store(unix, Ordering::Relaxed);
    }

    pub(super) fn worked(&self, note: impl FnOnce(&mut Work)) {
        note(&mut lock(&self.numbers.work));
    }

    pub(super) fn failed(&self, started: Instant) {
        lock(&self.health).failures += 1;
        lock(&self.numbers.passes).observe(started.elapsed());
    }

    pub(super) fn error(&self, error: &impl Display) {
        lock(&self.health).last_error = Some(error.to_string());
    }

    pub(super) fn drifted(&self, changes: usize) {
        self.numbers.drift.fetch_add(changes as u64, Ordering::Relaxed);
    }

    pub(super) fn drift(&self) -> u64 {
        self.numbers.drift.load(Ordering::Relaxed)
    }

    pub(super) fn held(&self, count: usize) {
        self.numbers.held.store(count as u64, Ordering::Relaxed);
    }

    pub(super) fn expired_flows(&self, count: usize) {
        self.numbers.expired_flows.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// A handle on the running room. Cheap to clone.
#[derive(Clone)]
pub struct View {
    shared: Arc<Shared>,
    requests: Sender<Request>,
    waker: Waker,
}

impl View {
    pub(super) fn new(waker: Waker) -> (Self, Arc<Shared>, Receiver<Request>) {
        let now = Instant::now();
        let shared = Arc::new(Shared {
            started_at: SystemTime::now(),
            stopping: AtomicBool::new(false),
            health: Mutex::new(Passes::new(now)),
            numbers: Numbers::default(),
            programmed: Arc::default(),
        });
        let (requests, receiver) = channel();
        (Self { shared: shared.clone(), requests, waker }, shared, receiver)
    }

    /// Ends the room's thread after the pass it is in. Kernel state stays.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// State of the room.
    pub fn health(&self) -> Passes {
        lock(&self.shared.health).clone()
    }

    /// The VIPs that are in the kernel.
    pub fn programmed(&self) -> Arc<Programmed> {
        self.shared.programmed.clone()
    }

    /// What the room cost the kernel so far.
    pub fn work(&self) -> Work {
        *lock(&self.shared.numbers.work)
    }

    /// Desired, actual and difference; `None` when the room does not answer in time.
    pub fn status(&self, timeout: Duration) -> Option<Status> {
        self.ask(Request::Status, timeout)
    }

    /// Writes the room's metrics in Prometheus text format; per-Service counters are read from the
    /// kernel now and left out when the room does not answer within two seconds.
    pub fn metrics(&self, out: &mut String) {
        let statistics = self.ask(Request::Statistics, Duration::from_secs(2)).unwrap_or_default();
        let health = self.health();
        super::metrics::write(out, &self.shared.numbers, (health.passes, health.failures), &statistics);
    }

    fn ask<T>(&self, request: impl FnOnce(SyncSender<T>) -> Request, timeout: Duration) -> Option<T> {
        let (reply, answer) = sync_channel(1);
        self.requests.send(request(reply)).ok()?;
        self.waker.wake();
        answer.recv_timeout(timeout).ok()
    }
}

/// How long changes took to reach the kernel, as kube-proxy counts: from the time that EndpointSlices
/// give, one per Service. Times before the process began say when it began, and those of a clock that is
/// ahead say nothing; where none is left it is the time since the oldest change was `decoded`.
fn programming_durations(
    dirty: &Dirty,
    started: SystemTime,
    now: SystemTime,
    decoded: Duration,
) -> Vec<Duration> {
    let times = dirty.triggered.values().filter(|at| **at > started);
    let mut durations: Vec<Duration> = times.filter_map(|at| now.duration_since(*at).ok()).collect();
    if durations.is_empty() {
        durations.push(decoded);
    }
    durations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ServiceKey;

    #[test]
    fn programming_begins_where_the_slice_says_if_that_can_be() {
        let started = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at = |seconds: i64| {
            let distance = Duration::from_secs(seconds.unsigned_abs());
            if seconds < 0 { started - distance } else { started + distance }
        };
        let decoded = Duration::from_millis(3);
        for (times, expected) in [
            (&[][..], &[3][..]),
            (&[95], &[5000]),
            (&[95, 98], &[5000, 2000]),
            // Before the start, of a clock that is ahead, and one good one among them.
            (&[-10], &[3]),
            (&[101], &[3]),
            (&[-10, 99, 200], &[1000]),
        ] {
            let mut dirty = Dirty::default();
            for (index, seconds) in times.iter().enumerate() {
                dirty.triggered.insert(ServiceKey::new("shop", format!("s{index}")), at(*seconds));
            }
            let found: Vec<u128> = programming_durations(&dirty, started, at(100), decoded)
                .iter()
                .map(Duration::as_millis)
                .collect();
            assert_eq!(found, expected, "{times:?}");
        }
    }
}
