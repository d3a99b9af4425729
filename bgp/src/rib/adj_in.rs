//! Adj-RIB-In: what peers sent, what import made of it, and what this speaker originates.

use std::borrow::Cow;
use std::sync::Arc;

use super::loc::{Core, Path, free_local_id};
use super::peer::{LimitEvent, PeerId};
use super::table::Prefix;
use crate::decision::Reason;
use crate::message::Attributes;
use crate::policy::{Refusal, import};

/// What import made of attributes.
pub(super) type Imported = Result<Arc<Attributes>, Refusal>;

/// What import makes of one set of attributes: one outcome for each kind of prefix that the policy can
/// tell apart.
#[derive(Default)]
pub(super) struct ImportMemo(Vec<(u64, Imported)>);

/// A route on its way in.
pub(super) struct Incoming<'a, P> {
    pub(super) peer: PeerId,
    pub(super) prefix: P,
    pub(super) path_id: u32,
    /// Interned by the peer.
    pub(super) received: &'a Arc<Attributes>,
    pub(super) now: u32,
}

impl<P: Prefix> Core<'_, P> {
    /// Takes a route of a peer.
    pub(super) fn announce(
        &mut self,
        route: &Incoming<'_, P>,
        memo: &mut ImportMemo,
        events: &mut Vec<LimitEvent>,
    ) {
        let id = self.table.find_or_insert(route.prefix);
        let paths = self.table.get(id).paths.as_slice();
        let known = paths.iter().position(|path| path.is(route.peer, route.path_id));
        if known.is_none() && !self.has_room(id, route.peer, events) {
            self.table.release(id);
            return;
        }
        let effective = self.imported(route.peer, route.prefix, route.received, memo);
        if let Some(place) = known {
            let path = &mut self.table.get_mut(id).paths.as_mut_slice()[place];
            let refreshed = std::mem::take(&mut path.stale);
            let same = Arc::ptr_eq(&path.received, route.received);
            if let Some(peer) = self.peers.get_mut(route.peer)
                && refreshed
            {
                peer.families[self.at].stale -= 1;
            }
            if same && is_outcome(path, &effective) {
                return;
            }
        }
        let before = self.before(id);
        let paths = &mut self.table.get_mut(id).paths;
        let place = match known {
            Some(place) => {
                let path = &mut paths.as_mut_slice()[place];
                if !Arc::ptr_eq(&path.received, route.received) {
                    path.received = Arc::clone(route.received);
                    path.since = route.now;
                }
                if let Some(peer) = self.peers.get_mut(route.peer) {
                    peer.attributes.release();
                }
                place
            }
            None => {
                let local_id = free_local_id(paths.as_slice());
                paths.push(Path {
                    received: Arc::clone(route.received),
                    effective: None,
                    peer: route.peer,
                    path_id: route.path_id,
                    local_id,
                    since: route.now,
                    reason: Reason::Refused(Refusal::NoPolicy),
                    tag: 0,
                    stale: false,
                });
                if let Some(peer) = self.peers.get_mut(route.peer) {
                    let family = &mut peer.families[self.at];
                    family.received.insert(id);
                    family.routes += 1;
                }
                paths.as_slice().len() - 1
            }
        };
        self.set_effective(id, place, effective);
        self.reselect(id, &before);
    }

    /// Takes a route of a peer back, if there is one.
    pub(super) fn retract(&mut self, peer: PeerId, prefix: P, path_id: u32) {
        if let Some(id) = self.table.find(prefix) {
            self.remove_paths(id, |path| path.is(peer, path_id));
        }
    }

    /// Originates a route, or changes it.
    pub(super) fn originate(&mut self, prefix: P, id: u32, attributes: &Arc<Attributes>, tag: u16, now: u32) {
        let entry = self.table.find_or_insert(prefix);
        let before = self.before(entry);
        let paths = &mut self.table.get_mut(entry).paths;
        let mut local = paths.as_mut_slice().iter_mut().filter(|path| path.is(PeerId::LOCAL, id));
        if let Some(path) = local.next() {
            if path.received == *attributes && path.tag == tag {
                return;
            }
            (path.received, path.effective) = (Arc::clone(attributes), Some(Arc::clone(attributes)));
            (path.tag, path.since) = (tag, now);
        } else {
            let local_id = free_local_id(paths.as_slice());
            paths.push(Path {
                received: Arc::clone(attributes),
                effective: Some(Arc::clone(attributes)),
                peer: PeerId::LOCAL,
                path_id: id,
                local_id,
                since: now,
                // Until the choice is made.
                reason: Reason::Refused(Refusal::NoPolicy),
                tag,
                stale: false,
            });
        }
        self.reselect(entry, &before);
    }

    /// Removes the paths of a prefix that `concerns`.
    pub(super) fn remove_paths(&mut self, id: u32, concerns: impl Fn(&Path) -> bool) {
        if !self.table.get(id).paths.as_slice().iter().any(&concerns) {
            return;
        }
        let before = self.before(id);
        let (at, peers, next_hops) = (self.at, &mut *self.peers, &mut *self.next_hops);
        let mut touched = Vec::new();
        self.table.get_mut(id).paths.retain(|path| {
            if !concerns(path) {
                return true;
            }
            if let Some(peer) = peers.get_mut(path.peer) {
                let family = &mut peer.families[at];
                family.routes -= 1;
                family.accepted -= u32::from(path.effective.is_some());
                family.stale -= u32::from(path.stale);
                peer.attributes.release();
                touched.push(path.peer);
                if let Some(attributes) = &path.effective {
                    next_hops.release(attributes.next_hop.address());
                }
            }
            false
        });
        for peer in touched {
            let left = self.table.get(id).paths.as_slice().iter().any(|path| path.peer == peer);
            if let Some(peer) = self.peers.get_mut(peer) {
                let family = &mut peer.families[at];
                if !left {
                    family.received.remove(id);
                }
                if let Some(limit) = peer.options.limits.routes
                    && family.routes < warning(limit, peer.options.limits.warning_percent)
                {
                    family.warned = false;
                }
            }
        }
        self.reselect(id, &before);
    }

    /// Imports everything that a peer sent again: its policy changed.
    pub(super) fn import_again(&mut self, peer: PeerId) {
        for id in self.received(peer) {
            let before = self.before(id);
            let prefix = self.table.get(id).prefix;
            let mut changed = false;
            for place in 0..self.table.get(id).paths.as_slice().len() {
                let path = &self.table.get(id).paths.as_slice()[place];
                if path.peer != peer {
                    continue;
                }
                let received = Arc::clone(&path.received);
                let effective = self.imported(peer, prefix, &received, &mut ImportMemo::default());
                if !is_outcome(&self.table.get(id).paths.as_slice()[place], &effective) {
                    self.set_effective(id, place, effective);
                    changed = true;
                }
            }
            if changed {
                self.reselect(id, &before);
            }
        }
    }

    /// Marks everything that a peer sent as from before its restart.
    pub(super) fn mark_stale(&mut self, peer: PeerId) {
        for id in self.received(peer) {
            for path in self.table.get_mut(id).paths.as_mut_slice() {
                path.stale |= path.peer == peer;
            }
        }
        if let Some(peer) = self.peers.get_mut(peer) {
            let family = &mut peer.families[self.at];
            family.stale = family.routes;
        }
    }

    /// Removes what a peer sent: all, or what it did not send again since it was marked.
    pub(super) fn remove_received(&mut self, peer: PeerId, stale_only: bool) {
        if stale_only && self.peers.get(peer).is_none_or(|peer| peer.families[self.at].stale == 0) {
            return;
        }
        for id in self.received(peer) {
            self.remove_paths(id, |path| path.peer == peer && (path.stale || !stale_only));
        }
    }

    /// The prefixes that a peer sent. A list of its own, since what is done with them changes the set.
    fn received(&self, peer: PeerId) -> Vec<u32> {
        self.peers.get(peer).map(|peer| peer.families[self.at].received.iter().collect()).unwrap_or_default()
    }

    /// Whether one more route of a peer may be taken.
    fn has_room(&mut self, id: u32, peer_id: PeerId, events: &mut Vec<LimitEvent>) -> bool {
        let paths = self.table.get(id).paths.as_slice();
        let to_this_prefix = paths.iter().filter(|path| path.peer == peer_id).count();
        let Some(peer) = self.peers.get_mut(peer_id) else { return false };
        let (family, limits) = (&mut peer.families[self.at], &peer.options.limits);
        if to_this_prefix >= usize::from(limits.paths_per_prefix.max(1)) {
            events.push(LimitEvent::PathsExceeded { family: self.family, limit: limits.paths_per_prefix });
            return false;
        }
        let Some(limit) = limits.routes else { return true };
        if family.routes >= limit {
            events.push(LimitEvent::RoutesExceeded { family: self.family, limit });
            return false;
        }
        let routes = family.routes + 1;
        if !family.warned && routes >= warning(limit, limits.warning_percent) {
            family.warned = true;
            events.push(LimitEvent::RoutesWarning { family: self.family, routes, limit });
        }
        true
    }

    /// What import makes of a route.
    fn imported(
        &mut self,
        peer_id: PeerId,
        prefix: P,
        received: &Arc<Attributes>,
        memo: &mut ImportMemo,
    ) -> Imported {
        let Some(peer) = self.peers.get_mut(peer_id) else { return Err(Refusal::NoPolicy) };
        let prefix = prefix.into();
        let signature = peer.options.import.as_ref().map_or(Some(0), |policy| policy.signature(prefix));
        if let Some(signature) = signature
            && let Some((_, outcome)) = memo.0.iter().find(|(known, _)| *known == signature)
        {
            return outcome.clone();
        }
        let outcome = match import(&peer.importer(self.speaker), prefix, received) {
            Ok(Cow::Borrowed(_)) => Ok(Arc::clone(received)),
            Ok(Cow::Owned(changed)) if changed == **received => Ok(Arc::clone(received)),
            Ok(Cow::Owned(changed)) => Ok(peer.attributes.intern(Arc::new(changed))),
            Err(refusal) => Err(refusal),
        };
        if let Some(signature) = signature {
            memo.0.push((signature, outcome.clone()));
        }
        outcome
    }

    fn set_effective(&mut self, id: u32, place: usize, outcome: Imported) {
        let path = &mut self.table.get_mut(id).paths.as_mut_slice()[place];
        let (effective, reason) = match outcome {
            Ok(attributes) => (Some(attributes), path.reason),
            Err(refusal) => (None, Reason::Refused(refusal)),
        };
        path.reason = reason;
        if let Some(new) = &effective {
            self.next_hops.acquire(new.next_hop.address());
        }
        let accepted = effective.is_some();
        let old = std::mem::replace(&mut path.effective, effective);
        if let Some(old) = &old {
            self.next_hops.release(old.next_hop.address());
        }
        if let Some(peer) = self.peers.get_mut(path.peer) {
            let family = &mut peer.families[self.at];
            family.accepted = family.accepted + u32::from(accepted) - u32::from(old.is_some());
        }
    }
}

/// Whether a path has this outcome of import already.
fn is_outcome(path: &Path, outcome: &Imported) -> bool {
    match (&path.effective, outcome) {
        (Some(old), Ok(new)) => Arc::ptr_eq(old, new) || old == new,
        (None, Err(refusal)) => path.reason == Reason::Refused(*refusal),
        _ => false,
    }
}

fn warning(limit: u32, percent: u8) -> u32 {
    (u64::from(limit) * u64::from(percent) / 100).clamp(1, u64::from(u32::MAX)) as u32
}
