//! Loc-RIB: of all paths to a prefix, which is best and which share its traffic.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::Speaker;
use super::few::Few;
use super::id_set::IdSet;
use super::next_hop::{NextHops, Resolution};
use super::peer::{PeerId, Peers};
use super::table::{Entry, Prefix, Table};
use crate::decision::{self, Candidate, Reason};
use crate::message::{AfiSafi, Attributes};
use crate::policy::{Refusal, Source};

/// One path to a prefix: as received, as imported, and what became of it.
#[derive(Debug, Clone)]
pub(super) struct Path {
    pub(super) received: Arc<Attributes>,
    /// After import; none if import refused it.
    pub(super) effective: Option<Arc<Attributes>>,
    pub(super) peer: PeerId,
    /// The peer's identifier of the path; for our own routes the originator's.
    pub(super) path_id: u32,
    /// Our identifier of the path towards all peers; the same as long as the path is there.
    pub(super) local_id: u32,
    /// When these attributes came.
    pub(super) since: u32,
    pub(super) reason: Reason,
    /// The originator's tag.
    pub(super) tag: u16,
    /// From before the peer's restart.
    pub(super) stale: bool,
}

impl Path {
    pub(super) fn is(&self, peer: PeerId, path_id: u32) -> bool {
        self.peer == peer && self.path_id == path_id
    }

    /// The attributes it may be chosen with, if it takes part in route selection.
    pub(super) fn eligible(&self) -> Option<&Arc<Attributes>> {
        match self.reason {
            Reason::Refused(_) => None,
            _ => self.effective.as_ref(),
        }
    }
}

/// The smallest number from 1 that none of these paths has.
pub(super) fn free_local_id(paths: &[Path]) -> u32 {
    if paths.is_empty() {
        return 1;
    }
    let mut used: Vec<u32> = paths.iter().map(|path| path.local_id).collect();
    used.sort_unstable();
    let mut free = 1;
    for id in used {
        if id == free {
            free += 1;
        }
    }
    free
}

/// A path that traffic takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenPath {
    /// After import.
    pub attributes: Arc<Attributes>,
    /// Who sent it; none for a route of our own.
    pub peer: Option<PeerId>,
    /// Where it came from.
    pub source: Source,
}

/// What routes to a prefix look like now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteChange {
    /// Where they lead.
    pub prefix: IpNet,
    /// The best path and those that share its traffic; none: the prefix is gone.
    pub paths: Vec<ChosenPath>,
}

/// What of an entry others may have to hear of when it changes.
pub(super) struct Before {
    best: Option<(PeerId, u32, u16, Arc<Attributes>)>,
    sharing: usize,
}

/// One family's part of the RIB, with what it needs of the rest.
pub(super) struct Core<'a, P> {
    pub(super) speaker: &'a Speaker,
    pub(super) family: AfiSafi,
    /// Number of the family.
    pub(super) at: usize,
    pub(super) table: &'a mut Table<P>,
    pub(super) peers: &'a mut Peers,
    pub(super) next_hops: &'a mut NextHops,
    /// Prefixes whose routes may have changed.
    pub(super) changed: &'a mut IdSet,
}

impl<P: Prefix> Core<'_, P> {
    /// To be taken before an entry is changed, for [`Core::reselect`].
    pub(super) fn before(&self, id: u32) -> Before {
        let paths = self.table.get(id).paths.as_slice();
        let best = paths.first().filter(|path| path.reason == Reason::Best);
        Before {
            best: best.and_then(|path| {
                let attributes = Arc::clone(path.effective.as_ref()?);
                Some((path.peer, path.path_id, path.tag, attributes))
            }),
            sharing: sharing(paths),
        }
    }

    /// Chooses again among the paths of one prefix, and notes who has to hear of it.
    pub(super) fn reselect(&mut self, id: u32, before: &Before) {
        choose(&mut self.table.get_mut(id).paths, self.speaker, self.peers, self.next_hops);
        let paths = self.table.get(id).paths.as_slice();
        let best = paths.first().filter(|path| path.reason == Reason::Best);
        let same = match (&before.best, best) {
            (None, None) => true,
            (Some((peer, path_id, tag, attributes)), Some(path)) => {
                path.is(*peer, *path_id)
                    && path.tag == *tag
                    && path
                        .effective
                        .as_ref()
                        .is_some_and(|now| Arc::ptr_eq(now, attributes) || now == attributes)
            }
            _ => false,
        };
        if !same || before.sharing > 1 || sharing(paths) > 1 {
            self.changed.insert(id);
        }
        for (_, peer) in self.peers.iter_mut() {
            if peer.speaks(self.family) && (!same || peer.sends_paths(self.family)) {
                peer.families[self.at].pending.insert(id);
            }
        }
        self.table.release(id);
    }

    /// Chooses again for every prefix with a path that `concerns`.
    pub(super) fn reselect_where(&mut self, concerns: impl Fn(&Path) -> bool) {
        for id in self.table.ids() {
            if self.table.get(id).paths.as_slice().iter().any(&concerns) {
                let before = self.before(id);
                self.reselect(id, &before);
            }
        }
    }

    /// Up to `limit` prefixes whose routes may have changed since they were last asked for.
    pub(super) fn take_changes(&mut self, limit: usize, changes: &mut Vec<RouteChange>) {
        let mut from = 0;
        while changes.len() < limit
            && let Some(id) = self.changed.next_from(from)
        {
            self.changed.remove(id);
            from = id + 1;
            let entry = self.table.get_mut(id);
            let paths = chosen(entry, self.speaker, self.peers);
            let was_installed = std::mem::replace(&mut entry.installed, !paths.is_empty());
            if was_installed || !paths.is_empty() {
                changes.push(RouteChange { prefix: entry.prefix.into(), paths });
            }
            self.table.release(id);
        }
    }
}

/// Every prefix with a chosen path.
pub(super) fn routes<P: Prefix>(table: &Table<P>, speaker: &Speaker, peers: &Peers) -> Vec<RouteChange> {
    let entries = table.ids().map(|id| table.get(id));
    entries
        .map(|entry| RouteChange { prefix: entry.prefix.into(), paths: chosen(entry, speaker, peers) })
        .filter(|route| !route.paths.is_empty())
        .collect()
}

/// The best path and those that share its traffic, best first.
pub(super) fn chosen<P>(entry: &Entry<P>, speaker: &Speaker, peers: &Peers) -> Vec<ChosenPath> {
    let paths = entry.paths.as_slice().iter();
    paths
        .filter(|path| matches!(path.reason, Reason::Best | Reason::Multipath(_)))
        .filter_map(|path| {
            Some(ChosenPath {
                attributes: Arc::clone(path.effective.as_ref()?),
                peer: Some(path.peer).filter(|&peer| peer != PeerId::LOCAL),
                source: peers.source(path, speaker.asn),
            })
        })
        .collect()
}

fn sharing(paths: &[Path]) -> usize {
    paths.iter().filter(|path| matches!(path.reason, Reason::Best | Reason::Multipath(_))).count()
}

/// A path as route selection sees it; none if it takes no part, and then why.
fn candidate<'a>(
    path: &'a Path,
    speaker: &Speaker,
    peers: &Peers,
    next_hops: &NextHops,
) -> Result<Candidate<'a>, Refusal> {
    let attributes = path.effective.as_deref().ok_or(match path.reason {
        Reason::Refused(refusal) => refusal,
        _ => Refusal::NoPolicy,
    })?;
    let (router_id, peer_address, igp_metric) = match peers.get(path.peer) {
        // The next hop of our own route is what we tell others, not where we send packets.
        None => (speaker.router_id, IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        Some(peer) => match next_hops.resolution(attributes.next_hop.address()) {
            Resolution::Reachable { metric } => (peer.router_id, peer.neighbour.address, metric),
            Resolution::Unreachable => return Err(Refusal::NextHopUnreachable),
            Resolution::Own => return Err(Refusal::NextHopOwn),
        },
    };
    Ok(Candidate {
        attributes,
        source: peers.source(path, speaker.asn),
        igp_metric,
        since: path.since,
        router_id,
        peer_address,
        path_id: path.path_id,
    })
}

/// Notes for every path what becomes of it, and puts the best in front.
fn choose(paths: &mut Few<Path>, speaker: &Speaker, peers: &Peers, next_hops: &NextHops) {
    let slice = paths.as_mut_slice();
    if let [only] = slice {
        only.reason = match candidate(only, speaker, peers, next_hops) {
            Ok(_) => Reason::Best,
            Err(refusal) => Reason::Refused(refusal),
        };
        return;
    }
    let mut reasons: Vec<Reason> = Vec::with_capacity(slice.len());
    let (mut candidates, mut places) = (Vec::with_capacity(slice.len()), Vec::with_capacity(slice.len()));
    for (place, path) in slice.iter().enumerate() {
        match candidate(path, speaker, peers, next_hops) {
            Ok(candidate) => {
                candidates.push(candidate);
                places.push(place);
                reasons.push(Reason::Best);
            }
            Err(refusal) => reasons.push(Reason::Refused(refusal)),
        }
    }
    let mut outcome = Vec::with_capacity(candidates.len());
    let best = decision::select(&candidates, &speaker.options, &mut outcome).map(|best| places[best]);
    for (place, reason) in places.into_iter().zip(outcome) {
        reasons[place] = reason;
    }
    for (path, reason) in slice.iter_mut().zip(reasons) {
        path.reason = reason;
    }
    if let Some(best) = best {
        slice.swap(0, best);
    }
}

/// The eligible paths that a peer with add-path gets, best first where a number limits them.
pub(super) fn best_paths<'a, P>(
    entry: &'a Entry<P>,
    speaker: &Speaker,
    peers: &Peers,
    next_hops: &NextHops,
    receiver: PeerId,
    count: usize,
) -> Vec<&'a Path> {
    let paths: Vec<&Path> = entry
        .paths
        .as_slice()
        .iter()
        .filter(|path| path.eligible().is_some() && path.peer != receiver)
        .collect();
    if paths.len() <= count {
        return paths;
    }
    let candidates: Vec<Candidate<'_>> =
        paths.iter().filter_map(|path| candidate(path, speaker, peers, next_hops).ok()).collect();
    // An eligible path is a candidate, so the places agree.
    decision::rank(&candidates, &speaker.options, count).into_iter().map(|place| paths[place]).collect()
}
