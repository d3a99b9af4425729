//! Adj-RIB-Out: what peers were told, and what they have still to be told.
//!
//! Of what a peer was told only a fingerprint is kept: sixteen bytes a route, whatever its attributes.
//! It says whether a route differs from what the peer knows; the attributes themselves follow from
//! Loc-RIB. What is due to a peer is a set of prefixes, looked at when the peer can take more: changes that
//! pile up for a slow peer cost nothing and are sent once.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;
use ipnet::IpNet;

use super::Speaker;
use super::loc::{Core, Path, best_paths};
use super::next_hop::NextHops;
use super::peer::{AddPathSend, Peer, PeerId, Peers, Session};
use super::table::{Entry, Prefix};
use crate::decision::Reason;
use crate::message::{AfiSafi, Announcement, Attributes, Nlri, Update};
use crate::policy::{Outgoing, Withheld, export};

/// A path that a peer was told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Advertised {
    pub(super) peer: PeerId,
    /// Our identifier of the path; 0 without add-path.
    pub(super) path_id: u32,
    /// Hash of the attributes; [`Advertised::AGAIN`] if they are to be told again in any case.
    pub(super) fingerprint: u64,
}

impl Advertised {
    /// No attributes have this fingerprint.
    pub(super) const AGAIN: u64 = 0;
}

/// Attributes on their way out, with their fingerprint; or why they stay.
pub(super) type Exported = Result<(Arc<Attributes>, u64), Withheld>;

/// What the outcome of an export depends on, beside the receiver.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct ExportKey {
    /// Address of the shared attributes; they live while the memo does, since the table is not changed.
    attributes: usize,
    learned_from: PeerId,
    tag: u16,
    /// Answers of the policy's questions about the prefix.
    signature: u64,
}

/// Exports to one peer, with what it remembers of them.
pub(super) struct Export<'a> {
    speaker: &'a Speaker,
    peers: &'a Peers,
    next_hops: &'a NextHops,
    receiver: PeerId,
    peer: &'a Peer,
    session: &'a Session,
    family: AfiSafi,
    fingerprints: &'a RandomState,
    memo: HashMap<ExportKey, Exported, RandomState>,
}

impl<'a> Export<'a> {
    /// An export to a peer with a session that speaks the family.
    pub(super) fn new(
        speaker: &'a Speaker,
        peers: &'a Peers,
        next_hops: &'a NextHops,
        receiver: PeerId,
        family: AfiSafi,
    ) -> Option<Self> {
        let peer = peers.get(receiver).filter(|peer| peer.speaks(family))?;
        let session = peer.session.as_ref()?;
        let fingerprints = &speaker.fingerprints;
        let memo = HashMap::default();
        Some(Self { speaker, peers, next_hops, receiver, peer, session, family, fingerprints, memo })
    }

    /// The paths of a prefix that are offered to the peer, before policy, with our identifiers.
    pub(super) fn offered<'e, P>(&self, entry: &'e Entry<P>) -> Vec<(u32, &'e Path)> {
        if !self.session.add_path_send.contains(self.family) {
            let best = entry.paths.as_slice().first().filter(|path| path.reason == Reason::Best);
            return best.map(|path| (0, path)).into_iter().collect();
        }
        let count = match self.peer.options.add_path_send {
            AddPathSend::Best(count) => usize::from(count),
            AddPathSend::All => usize::MAX,
        };
        let mut offered: Vec<_> =
            best_paths(entry, self.speaker, self.peers, self.next_hops, self.receiver, count)
                .into_iter()
                .map(|path| (path.local_id, path))
                .collect();
        offered.sort_unstable_by_key(|(id, _)| *id);
        offered
    }

    /// What the peer is told of a path.
    pub(super) fn export(&mut self, prefix: IpNet, path: &Path) -> Exported {
        let Some(attributes) = path.eligible() else { return Err(Withheld::NotSelected) };
        let signature = self.peer.options.export.as_ref().map_or(Some(0), |policy| policy.signature(prefix));
        let key = signature.map(|signature| ExportKey {
            attributes: Arc::as_ptr(attributes).addr(),
            learned_from: path.peer,
            tag: path.tag,
            signature,
        });
        if let Some(known) = key.and_then(|key| self.memo.get(&key)) {
            return known.clone();
        }
        let route = Outgoing {
            prefix,
            attributes,
            tag: path.tag,
            learned_from: self.peers.learned_from(path, self.receiver),
        };
        let exporter = self.peer.exporter(self.speaker, self.session);
        let outcome = export(&exporter, &route).map(|told| {
            let fingerprint = self.fingerprints.hash_one(&*told).max(Advertised::AGAIN + 1);
            (Arc::new(told.into_owned()), fingerprint)
        });
        if let Some(key) = key {
            self.memo.insert(key, outcome.clone());
        }
        outcome
    }
}

/// Routes gathered for one UPDATE or several, announcements with equal attributes together.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) update: Update,
    groups: HashMap<u64, usize, RandomState>,
}

impl Gathered {
    fn announce(&mut self, nlri: Nlri, attributes: Arc<Attributes>, fingerprint: u64) {
        let announced = &mut self.update.announced;
        // Prefixes of both families must not share a group.
        let group = *self.groups.entry(fingerprint ^ u64::from(nlri.family().afi())).or_insert_with(|| {
            announced.push(Announcement { attributes, nlri: Vec::new() });
            announced.len() - 1
        });
        announced[group].nlri.push(nlri);
    }
}

impl<P: Prefix> Core<'_, P> {
    /// Gathers what a peer has to be told of up to `limit` prefixes, and takes it for told. Returns how
    /// many prefixes were looked at.
    pub(super) fn advertise(&mut self, receiver: PeerId, limit: usize, gathered: &mut Gathered) -> usize {
        let Some(peer) = self.peers.get_mut(receiver) else { return 0 };
        if peer.families[self.at].pending.is_empty() {
            return 0;
        }
        // Taken out so that the other peers can be looked at meanwhile.
        let mut state = std::mem::take(&mut peer.families[self.at]);
        let mut looked_at = 0;
        let peers = &*self.peers;
        if let Some(mut exports) = Export::new(self.speaker, peers, self.next_hops, receiver, self.family) {
            let add_path = exports.session.add_path_send.contains(self.family);
            let mut from = 0;
            let mut told = Vec::new();
            while looked_at < limit
                && let Some(id) = state.pending.next_from(from)
            {
                state.pending.remove(id);
                from = id + 1;
                looked_at += 1;
                let entry = self.table.get(id);
                let prefix: IpNet = entry.prefix.into();
                told.clear();
                for (path_id, path) in exports.offered(entry) {
                    if let Ok((attributes, fingerprint)) = exports.export(prefix, path) {
                        told.push((path_id, attributes, fingerprint));
                    }
                }
                let nlri = |path_id| Nlri { path_id: add_path.then_some(path_id), prefix };
                let advertised = &mut self.table.get_mut(id).advertised;
                let before = state.advertised_routes;
                advertised.retain(|old| {
                    let keep =
                        old.peer != receiver || told.iter().any(|(path_id, ..)| *path_id == old.path_id);
                    if !keep {
                        gathered.update.withdrawn.push(nlri(old.path_id));
                        state.advertised_routes -= 1;
                    }
                    keep
                });
                for (path_id, attributes, fingerprint) in told.drain(..) {
                    let known = advertised
                        .as_slice()
                        .binary_search_by_key(&(receiver, path_id), |old| (old.peer, old.path_id));
                    match known {
                        Ok(place) => {
                            let old = &mut advertised.as_mut_slice()[place];
                            if old.fingerprint == fingerprint {
                                continue;
                            }
                            old.fingerprint = fingerprint;
                        }
                        Err(place) => {
                            advertised.insert(place, Advertised { peer: receiver, path_id, fingerprint });
                            state.advertised_routes += 1;
                        }
                    }
                    gathered.announce(nlri(path_id), attributes, fingerprint);
                }
                if state.advertised_routes > before {
                    state.advertised.insert(id);
                } else if state.advertised_routes < before
                    && !advertised.as_slice().iter().any(|old| old.peer == receiver)
                {
                    state.advertised.remove(id);
                }
                self.table.release(id);
            }
        }
        if let Some(peer) = self.peers.get_mut(receiver) {
            peer.families[self.at] = state;
        }
        looked_at
    }

    /// Looks at every prefix again for a peer.
    pub(super) fn advertise_all(&mut self, receiver: PeerId) {
        let end = self.table.end();
        if let Some(peer) = self.peers.get_mut(receiver)
            && peer.speaks(self.family)
        {
            peer.families[self.at].pending.fill(end);
        }
    }

    /// Tells a peer everything again, unchanged routes included (RFC 2918).
    pub(super) fn refresh(&mut self, receiver: PeerId) {
        let Some(peer) = self.peers.get_mut(receiver) else { return };
        for id in peer.families[self.at].advertised.iter() {
            for told in self.table.get_mut(id).advertised.as_mut_slice() {
                if told.peer == receiver {
                    told.fingerprint = Advertised::AGAIN;
                }
            }
        }
        self.advertise_all(receiver);
    }

    /// Forgets what a peer was told: its session is gone.
    pub(super) fn forget_advertised(&mut self, receiver: PeerId) {
        let Some(peer) = self.peers.get_mut(receiver) else { return };
        let family = &mut peer.families[self.at];
        let advertised = std::mem::take(&mut family.advertised);
        family.advertised_routes = 0;
        family.pending = Default::default();
        for id in advertised.iter() {
            self.table.get_mut(id).advertised.retain(|told| told.peer != receiver);
            self.table.release(id);
        }
    }

    /// Looks at what came from one peer again for all others: how it may be passed on changed.
    pub(super) fn pass_on_again(&mut self, sender: PeerId) {
        let Some(peer) = self.peers.get(sender) else { return };
        let received: Vec<u32> = peer.families[self.at].received.iter().collect();
        for (_, peer) in self.peers.iter_mut().filter(|(id, _)| *id != sender) {
            if peer.speaks(self.family) {
                received.iter().for_each(|&id| {
                    peer.families[self.at].pending.insert(id);
                });
            }
        }
    }
}
