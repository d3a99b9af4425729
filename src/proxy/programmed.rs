//! Which VIPs packets may be sent to: the virtual servers are in the kernel and the VIP is bound. Whoever
//! attracts traffic asks here first.
//!
//! An address counts from the first pass that left nothing of it undone until no Service has it any
//! more: while a later change of it fails, the kernel goes on with what it has.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cluster::Waker;

/// The VIPs that are programmed; written by the Service room, read by one other.
#[derive(Default)]
pub struct Programmed {
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    vips: HashSet<IpAddr>,
    changed: BTreeSet<IpAddr>,
    complete: bool,
    reader: Option<Waker>,
}

impl Programmed {
    /// Begins to tell a reader of changes: it is woken at each, and takes them. All that is programmed
    /// already counts as changed.
    pub fn follow(&self, reader: Waker) {
        let mut content = self.lock();
        content.changed = content.vips.iter().copied().collect();
        content.reader = Some(reader);
    }

    /// What came or went since the last look.
    pub fn take_changes(&self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.lock().changed)
    }

    /// Whether packets to this address are served, or refused on purpose.
    pub fn contains(&self, vip: IpAddr) -> bool {
        self.lock().vips.contains(&vip)
    }

    /// Whether all Services that were known at the start have had their turn.
    pub fn is_complete(&self) -> bool {
        self.lock().complete
    }

    /// Notes what a pass left: for each VIP whether it is in the kernel.
    pub(super) fn note(&self, vips: impl IntoIterator<Item = (IpAddr, State)>) {
        let mut content = self.lock();
        let mut changed = false;
        for (vip, state) in vips {
            let news = match state {
                State::Ready => content.vips.insert(vip),
                State::Gone => content.vips.remove(&vip),
                State::Undone => false,
            };
            if news && content.reader.is_some() {
                content.changed.insert(vip);
                changed = true;
            }
        }
        if changed {
            content.wake();
        }
    }

    pub(super) fn complete(&self) {
        let mut content = self.lock();
        if !std::mem::replace(&mut content.complete, true) {
            content.wake();
        }
    }

    pub(super) fn all(&self) -> Vec<IpAddr> {
        self.lock().vips.iter().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        // Each change is one insert or remove: a poisoned lock holds whole values.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn wake(&self) {
        if let Some(reader) = &self.reader {
            reader.wake();
        }
    }
}

/// A VIP after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Everything of it is in the kernel.
    Ready,
    /// Something is not; what was there before stays.
    Undone,
    /// No Service has it.
    Gone,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cluster::Cluster;

    #[test]
    fn a_reader_is_woken_by_changes_alone() {
        let (cluster, programmed) = (Cluster::new(), Programmed::default());
        let subscription = cluster.subscribe();
        let [a, b] = [1, 2].map(|host| IpAddr::from([203, 0, 113, host]));
        programmed.note([(a, State::Ready)]);
        assert!(programmed.take_changes().is_empty(), "nobody reads, nothing is kept");
        programmed.follow(subscription.waker());
        assert_eq!(programmed.take_changes(), [a].into());
        // A wake-up that comes before the wait ends it at once.
        let woken = || {
            let begun = std::time::Instant::now();
            subscription.wait(Duration::from_millis(300), Duration::ZERO);
            begun.elapsed() < Duration::from_millis(200)
        };
        programmed.note([(a, State::Ready), (b, State::Undone)]);
        assert!(!woken());
        programmed.note([(b, State::Ready)]);
        assert!(woken());
        assert_eq!(programmed.take_changes(), [b].into());
        programmed.note([(a, State::Undone)]);
        assert!(programmed.contains(a), "the kernel goes on with what it has");
        programmed.note([(a, State::Gone)]);
        assert!(woken() && !programmed.contains(a));
        assert!(!programmed.is_complete());
        programmed.complete();
        assert!(woken() && programmed.is_complete());
        programmed.complete();
        assert!(!woken());
    }
}
