//! How the watches are doing, for `/readyz`, `ferroute status` and metrics.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::Serialize;

use super::{Kind, lock};

/// Shared view of every watch. Cheap to clone.
#[derive(Clone, Default)]
pub struct WatchHealth {
    kinds: Arc<Mutex<BTreeMap<Kind, KindHealth>>>,
}

/// One kind's watch.
#[derive(Clone, Debug, Default)]
pub struct KindHealth {
    /// The first list is complete.
    pub listed: bool,
    /// The last thing that happened was a success: a list or an event, not an error.
    pub connected: bool,
    /// When the server (or the folder) last said something.
    pub last_event: Option<Instant>,
    /// Objects received, lists included.
    pub events: u64,
    /// Complete lists, the first included.
    pub lists: u64,
    /// Errors of lists and watches.
    pub errors: u64,
    /// The last error; kept for reference after recovery.
    pub last_error: Option<String>,
}

/// [`KindHealth`] as `ferroute status` prints it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KindReport {
    /// The kind as written in manifests.
    pub kind: &'static str,
    /// The first list is complete.
    pub listed: bool,
    /// The last thing that happened was a success.
    pub connected: bool,
    /// Seconds since the server last said something.
    pub last_event_seconds: Option<f64>,
    /// Objects received.
    pub events: u64,
    /// Complete lists.
    pub lists: u64,
    /// Errors of lists and watches.
    pub errors: u64,
    /// The last error.
    pub last_error: Option<String>,
}

impl WatchHealth {
    /// The watches by kind; empty before any was started.
    pub fn kinds(&self) -> BTreeMap<Kind, KindHealth> {
        lock(&self.kinds).clone()
    }

    /// The same, ready to print.
    pub fn report(&self) -> Vec<KindReport> {
        lock(&self.kinds)
            .iter()
            .map(|(kind, health)| KindReport {
                kind: kind.name(),
                listed: health.listed,
                connected: health.connected,
                last_event_seconds: health.last_event.map(|at| at.elapsed().as_secs_f64()),
                events: health.events,
                lists: health.lists,
                errors: health.errors,
                last_error: health.last_error.clone(),
            })
            .collect()
    }

    /// Whether every watched kind has been listed once.
    pub fn all_listed(&self) -> bool {
        let kinds = lock(&self.kinds);
        !kinds.is_empty() && kinds.values().all(|health| health.listed)
    }

    pub(super) fn started(&self, kind: Kind) {
        lock(&self.kinds).entry(kind).or_default();
    }

    /// An object came, in what was read at this time.
    pub(super) fn received(&self, kind: Kind, at: Instant) {
        self.update(kind, |health| {
            health.events += 1;
            health.connected = true;
            health.last_event = Some(at);
        });
    }

    pub(super) fn listed(&self, kind: Kind) {
        self.update(kind, |health| {
            health.listed = true;
            health.lists += 1;
            health.connected = true;
            health.last_event = Some(Instant::now());
        });
    }

    pub(super) fn failed(&self, kind: Kind, error: &str) {
        self.update(kind, |health| {
            health.connected = false;
            health.errors += 1;
            health.last_error = Some(error.to_owned());
        });
    }

    fn update(&self, kind: Kind, change: impl FnOnce(&mut KindHealth)) {
        change(lock(&self.kinds).entry(kind).or_default());
    }
}
