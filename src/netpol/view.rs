//! What other threads see of the policy room: health, status, metrics, starting pods, and how to
//! stop it.

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::explain::{Answer, Question, Unanswerable};
use super::metrics::Numbers;
use super::starting::{NotProgrammed, Reply, StartingPod};
use super::status::Status;
use crate::cluster::{ObjectKey, Waker};
use crate::health::Passes;
use crate::metrics::lock;

/// An answer may come this much after its deadline: the room ends the pass it is in first.
const GRACE: Duration = Duration::from_millis(500);

/// Questions the room answers between two passes, since it alone owns the kernel handles.
pub(super) enum Request {
    /// Desired, actual and difference.
    Status(SyncSender<Status>),
    /// Whether one pod may talk to another, and why.
    Explain(Box<Question>, SyncSender<Result<Answer, Unanswerable>>),
    /// A pod's network is being made: program it.
    Starting(StartingPod, Instant, Reply),
    /// Whether a pod is programmed with these addresses.
    Programmed(ObjectKey, Vec<IpAddr>, SyncSender<Result<(), NotProgrammed>>),
    /// These addresses are taken away from a pod.
    Stopped(ObjectKey, Option<Arc<str>>, Vec<IpAddr>),
}

/// Numbers written by the room and read by everybody.
pub(super) struct Shared {
    stopping: AtomicBool,
    health: Mutex<Passes>,
    pub(super) numbers: Numbers,
}

impl Shared {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn turned(&self, now: Instant) {
        lock(&self.health).last_turn = now;
    }

    pub(super) fn passed(&self, started: Instant, since: Option<Instant>) {
        let now = Instant::now();
        lock(&self.health).passed(now);
        lock(&self.numbers.passes).observe(now - started);
        if let Some(since) = since {
            lock(&self.numbers.latency).observe(now - since);
        }
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let unix = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        self.numbers.last_clean_unix_ms.store(unix, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, started: Instant) {
        lock(&self.health).failures += 1;
        lock(&self.numbers.passes).observe(started.elapsed());
    }

    pub(super) fn error(&self, error: &impl Display) {
        lock(&self.health).last_error = Some(error.to_string());
    }

    pub(super) fn last_error(&self) -> Option<String> {
        lock(&self.health).last_error.clone()
    }

    pub(super) fn last_clean_pass(&self) -> Option<Instant> {
        lock(&self.health).last_clean_pass
    }

    pub(super) fn count(&self, counter: impl Fn(&Numbers) -> &std::sync::atomic::AtomicU64, more: usize) {
        counter(&self.numbers).fetch_add(more as u64, Ordering::Relaxed);
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
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            health: Mutex::new(Passes::new(Instant::now())),
            numbers: Numbers::default(),
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

    /// Desired, actual and difference; `None` when the room does not answer in time.
    pub fn status(&self, timeout: Duration) -> Option<Status> {
        self.ask(Request::Status, timeout)
    }

    /// Whether a connection is allowed, by the policies and by what the kernel holds; `None` when
    /// the room does not answer in time.
    pub fn explain(&self, question: Question, timeout: Duration) -> Option<Result<Answer, Unanswerable>> {
        self.ask(|reply| Request::Explain(Box::new(question), reply), timeout)
    }

    /// Programs a pod whose network is being made, and returns when its policies are in the kernel:
    /// its addresses are open as far as its policies allow, from now on and not before. Blocks for
    /// at most `timeout`; the pod stays closed, and is programmed as soon as it can be, when this
    /// returns an error.
    pub fn pod_starting(&self, pod: StartingPod, timeout: Duration) -> Result<(), NotProgrammed> {
        let begun = Instant::now();
        let (reply, answer) = sync_channel(1);
        let request = Request::Starting(pod, begun + timeout, reply);
        if self.requests.send(request).is_err() {
            return Err(NotProgrammed::NoAnswer);
        }
        self.waker.wake();
        let outcome = answer.recv_timeout(timeout + GRACE).unwrap_or(Err(NotProgrammed::NoAnswer));
        if outcome.is_ok() {
            lock(&self.shared.numbers.starting).observe(begun.elapsed());
        }
        outcome
    }

    /// Whether a pod's policies are in the kernel for these addresses, now.
    pub fn is_programmed(
        &self,
        key: ObjectKey,
        addresses: Vec<IpAddr>,
        timeout: Duration,
    ) -> Result<(), NotProgrammed> {
        self.ask(|reply| Request::Programmed(key, addresses, reply), timeout)
            .unwrap_or(Err(NotProgrammed::NoAnswer))
    }

    /// These addresses were taken away from a pod: they are closed until a pod gets them again,
    /// whatever the API server still shows. `uid` keeps the end of an old pod apart from a new one of
    /// the same name. Does not wait.
    pub fn pod_stopped(&self, key: ObjectKey, uid: Option<Arc<str>>, addresses: Vec<IpAddr>) {
        // A room that is gone has nothing to forget.
        if self.requests.send(Request::Stopped(key, uid, addresses)).is_ok() {
            self.waker.wake();
        }
    }

    /// Writes the room's metrics in Prometheus text format.
    pub fn metrics(&self, out: &mut String) {
        let health = self.health();
        super::metrics::write(out, &self.shared.numbers, (health.passes, health.failures));
    }

    fn ask<T>(&self, request: impl FnOnce(SyncSender<T>) -> Request, timeout: Duration) -> Option<T> {
        let (reply, answer) = sync_channel(1);
        self.requests.send(request(reply)).ok()?;
        self.waker.wake();
        answer.recv_timeout(timeout).ok()
    }
}
