//! Loc-RIB as a program of routes sees it: the latest state of each prefix that changed.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::FixedState;
use ipnet::IpNet;
use tokio::sync::Notify;

use crate::message::Families;
use crate::rib::RouteChange;

/// Changes of the best routes. Starts with all that are there. A prefix that changes often before it is
/// looked at is seen once, as it is then: a slow reader costs memory for its prefixes at most.
#[derive(Debug)]
pub struct Watch {
    board: Arc<Board>,
}

/// What changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Prefixes with the paths that they have now; without paths they are gone.
    pub routes: Vec<RouteChange>,
    /// Families whose routes are complete with these, said once: the initial routes of all peers that are
    /// there have come, or the wait for them is over. What the kernel has beyond them, from a former life,
    /// is stale.
    pub complete: Families,
}

impl Changes {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty() && self.complete.is_empty()
    }
}

impl Watch {
    pub(super) fn new() -> (Self, Arc<Board>) {
        let board = Arc::new(Board::default());
        (Self { board: board.clone() }, board)
    }

    /// Waits for changes and takes up to `limit` prefixes; `None` once the speaker has stopped and
    /// all is taken. Cancelling it loses nothing.
    pub async fn next(&mut self, limit: usize) -> Option<Changes> {
        loop {
            let (changes, closed) = self.board.take(limit);
            if !changes.is_empty() {
                return Some(changes);
            }
            if closed {
                return None;
            }
            self.board.changed.notified().await;
        }
    }

    /// What is there now, up to `limit` prefixes.
    pub fn take(&mut self, limit: usize) -> Changes {
        self.board.take(limit).0
    }
}

/// Where the RIB puts changes and the watch takes them.
#[derive(Debug, Default)]
pub(super) struct Board {
    pending: Mutex<Pending>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    routes: HashMap<IpNet, RouteChange, FixedState>,
    order: VecDeque<IpNet>,
    complete: Families,
    closed: bool,
}

/// Prefixes above which emptied memory is given back.
const LARGE: usize = 4096;

impl Board {
    pub(super) fn put(&self, changes: impl IntoIterator<Item = RouteChange>) {
        let mut pending = self.lock();
        let Pending { routes, order, .. } = &mut *pending;
        for change in changes {
            match routes.entry(change.prefix) {
                Entry::Occupied(mut entry) => {
                    entry.insert(change);
                }
                Entry::Vacant(entry) => {
                    order.push_back(change.prefix);
                    entry.insert(change);
                }
            }
        }
        drop(pending);
        self.changed.notify_one();
    }

    pub(super) fn complete(&self, families: Families) {
        let mut pending = self.lock();
        pending.complete = pending.complete.or(families);
        drop(pending);
        self.changed.notify_one();
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    fn take(&self, limit: usize) -> (Changes, bool) {
        let mut pending = self.lock();
        let Pending { routes: waiting, order, complete, closed } = &mut *pending;
        let count = limit.min(order.len());
        let routes = order.drain(..count).filter_map(|prefix| waiting.remove(&prefix)).collect();
        let mut done = Families::NONE;
        if order.is_empty() {
            done = std::mem::take(complete);
            // A full table comes once: its memory is not kept for the few changes after it.
            if waiting.capacity() > LARGE {
                *waiting = HashMap::default();
                *order = VecDeque::new();
            }
        }
        (Changes { routes, complete: done }, *closed)
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        // Nothing that can panic runs half-way through a change.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(prefix: &str) -> RouteChange {
        RouteChange { prefix: prefix.parse().unwrap(), paths: Vec::new() }
    }

    #[tokio::test]
    async fn the_latest_state_of_each_prefix_is_seen_once() {
        let (mut watch, board) = Watch::new();
        for _ in 0..1000 {
            board.put([change("10.0.0.0/8"), change("2001:db8::/32")]);
        }
        board.complete(Families::IPV4);
        let first = watch.next(1).await.unwrap();
        assert_eq!((first.routes, first.complete), (vec![change("10.0.0.0/8")], Families::NONE));
        let last = watch.next(9).await.unwrap();
        assert_eq!((last.routes, last.complete), (vec![change("2001:db8::/32")], Families::IPV4));
        assert!(watch.take(9).is_empty());
        board.close();
        assert_eq!(watch.next(9).await, None);
    }

    #[tokio::test]
    async fn a_change_wakes_the_reader() {
        let (mut watch, board) = Watch::new();
        let reader = tokio::spawn(async move { watch.next(9).await });
        tokio::task::yield_now().await;
        board.put([change("10.0.0.0/8")]);
        assert_eq!(reader.await.unwrap().unwrap().routes, [change("10.0.0.0/8")]);
    }
}
