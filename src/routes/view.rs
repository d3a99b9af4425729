//! What other threads see of the route room: health, sessions, metrics, and how to stop it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferroute_bgp::peer::PeerKey;
use ferroute_bgp::rib::Rib;
use ferroute_bgp::speaker::Speaker;
use tokio::runtime::Handle;

use super::CurrentSpeaker;
use super::identity::Identity;
use super::metrics::Numbers;
use super::peers::Kind;
use crate::cluster::Waker;
use crate::health::Passes;
use crate::metrics::lock;

/// Written by the room and read by everybody.
pub(super) struct Shared {
    stopping: AtomicBool,
    health: Mutex<Passes>,
    known: Mutex<Known>,
    pub(super) waiting: AtomicU64,
    pub(super) numbers: Numbers,
}

/// Who this node is, and who its peers are.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub identity: Option<Identity>,
    pub peers: BTreeMap<PeerKey, Kind>,
}

impl Shared {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn turned(&self, now: Instant) {
        lock(&self.health).last_turn = now;
    }

    pub(super) fn passed(&self) {
        lock(&self.health).passed(Instant::now());
    }

    pub(super) fn failed(&self, error: String) {
        let mut health = lock(&self.health);
        health.failures += 1;
        health.last_error = Some(error);
    }

    pub(super) fn set_known(&self, known: Known) {
        *lock(&self.known) = known;
    }
}

/// A handle on the running room. Cheap to clone.
#[derive(Clone)]
pub struct View {
    pub(super) shared: Arc<Shared>,
    speaker: CurrentSpeaker,
    runtime: Handle,
    waker: Waker,
}

impl View {
    pub(super) fn new(speaker: CurrentSpeaker, runtime: Handle, waker: Waker) -> (Self, Arc<Shared>) {
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            health: Mutex::new(Passes::new(Instant::now())),
            known: Mutex::default(),
            waiting: AtomicU64::new(0),
            numbers: Numbers::default(),
        });
        (Self { shared: shared.clone(), speaker, runtime, waker }, shared)
    }

    /// Ends the room's thread, with a goodbye to the peers unless they keep this node's routes.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// State of the room.
    pub fn health(&self) -> Passes {
        lock(&self.shared.health).clone()
    }

    /// The speaker, as it comes and changes.
    pub fn follow(&self) -> CurrentSpeaker {
        self.speaker.clone()
    }

    /// The speaker that runs now.
    pub(super) fn speaker(&self) -> Option<Speaker> {
        self.speaker.borrow().clone()
    }

    pub(super) fn known(&self) -> Known {
        lock(&self.shared.known).clone()
    }

    /// Looks into the RIB; `None` without a speaker, or when it does not answer in time. Blocks: not to
    /// be called from a task.
    pub(super) fn look<T: Send + 'static>(
        &self,
        timeout: Duration,
        look: impl FnOnce(&mut Rib) -> T + Send + 'static,
    ) -> Option<T> {
        let speaker = self.speaker()?;
        self.runtime.block_on(async { tokio::time::timeout(timeout, speaker.rib(look)).await.ok().flatten() })
    }
}
