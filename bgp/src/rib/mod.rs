//! Routing information base: Adj-RIB-In, Loc-RIB and Adj-RIB-Out of RFC 4271 section 3.2.
//!
//! [`Rib`] is plain data without clock, socket and task. Sessions feed it ([`Rib::up`],
//! [`Rib::receive`], [`Rib::down`]) and pull what is due: UPDATEs for a peer ([`Rib::advertise`]), route
//! changes for whoever programs the kernel ([`Rib::take_changes`]). Nothing is queued: what is due is a set of
//! prefixes, so whoever pulls late gets the latest state once.
//!
//! A change of one path chooses again among the paths of one prefix. Every path keeps why it was
//! chosen, lost or refused ([`Reason`](crate::decision::Reason)); what is not advertised says why
//! ([`Withheld`](crate::policy::Withheld)).
//!
//! - `table`: prefixes and their entries, shared by the three RIBs.
//! - `adj_in`: routes from peers, before and after import; limits; stale routes of restarting peers.
//! - `loc`: the chosen paths.
//! - `adj_out`: what peers were told and have to be told.
//! - [`view`]: tables as people ask for them.

mod adj_in;
mod adj_out;
mod few;
mod id_set;
mod interner;
mod loc;
mod next_hop;
mod peer;
mod table;
pub mod view;

use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use adj_in::{ImportMemo, Incoming};
use adj_out::Gathered;
use id_set::IdSet;
use loc::Core;
use next_hop::NextHops;
use peer::{Peer, Peers};
use table::Table;

pub use loc::{ChosenPath, RouteChange};
pub use next_hop::Resolution;
pub use peer::{AddPathSend, LimitEvent, Limits, PeerId, PeerOptions, Session};

use crate::decision::Options;
use crate::message::{AfiSafi, Asn, Attributes, Families, RouterId, Update};

/// Families with a table: those of [`AfiSafi::SUPPORTED`], in that order.
const FAMILIES: usize = AfiSafi::SUPPORTED.len();

const fn number(family: AfiSafi) -> Option<usize> {
    match family {
        AfiSafi::Ipv4Unicast => Some(0),
        AfiSafi::Ipv6Unicast => Some(1),
        AfiSafi::Other { .. } => None,
    }
}

/// What this speaker is.
#[derive(Debug, Clone)]
struct Speaker {
    asn: Asn,
    router_id: RouterId,
    cluster_id: RouterId,
    options: Options,
    /// Key of the fingerprints of what was advertised.
    fingerprints: RandomState,
}

/// Routes from all peers, to all peers and to the kernel.
#[derive(Debug)]
pub struct Rib {
    speaker: Speaker,
    peers: Peers,
    next_hops: NextHops,
    v4: Table<Ipv4Net>,
    v6: Table<Ipv6Net>,
    changed: [IdSet; FAMILIES],
}

/// How many routes of a family a peer and this speaker have for each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Received, refused ones included.
    pub received: u32,
    /// Of them, those that import policy took.
    pub accepted: u32,
    /// Of them, those from before the peer's restart.
    pub stale: u32,
    /// Told to the peer.
    pub advertised: u32,
    /// Prefixes to look at before the peer knows all.
    pub pending: usize,
}

/// Carries out `$call` on the part of the RIB of a family, whose type of prefix it need not know.
macro_rules! with_family {
    ($rib:expr, $number:expr, |$core:ident| $call:expr) => {
        match $number {
            0 => {
                let mut $core = $rib.v4();
                $call
            }
            _ => {
                let mut $core = $rib.v6();
                $call
            }
        }
    };
}

impl Rib {
    /// An empty RIB. `cluster_id` is the router id unless several reflectors share a cluster.
    pub fn new(asn: Asn, router_id: RouterId, cluster_id: RouterId, options: Options) -> Self {
        Self {
            speaker: Speaker { asn, router_id, cluster_id, options, fingerprints: RandomState::default() },
            peers: Peers::default(),
            next_hops: NextHops::default(),
            v4: Table::default(),
            v6: Table::default(),
            changed: Default::default(),
        }
    }

    /// Our AS.
    pub const fn asn(&self) -> Asn {
        self.speaker.asn
    }

    /// Compares paths by other rules from now on.
    pub fn set_options(&mut self, options: Options) {
        if self.speaker.options != options {
            self.speaker.options = options;
            for number in 0..FAMILIES {
                with_family!(self, number, |core| core.reselect_where(|_| true));
            }
        }
    }

    /// A peer without session.
    pub fn add_peer(&mut self, options: PeerOptions) -> PeerId {
        self.peers.add(Peer::new(options))
    }

    /// Treats a peer differently from now on. What it sent is imported again from memory, what it was
    /// told is compared with what it should be told; nothing flaps.
    pub fn set_peer(&mut self, peer: PeerId, options: PeerOptions) {
        let Some(known) = self.peers.get_mut(peer) else { return };
        let client = known.options.client != options.client;
        let (import, export) = known.reconfigure(options);
        for number in 0..FAMILIES {
            with_family!(self, number, |core| {
                if import {
                    core.import_again(peer);
                }
                if client {
                    core.pass_on_again(peer);
                }
                if export {
                    core.advertise_all(peer);
                }
            });
        }
    }

    /// Forgets a peer and its routes.
    pub fn remove_peer(&mut self, peer: PeerId) {
        self.down(peer, Families::NONE);
        self.peers.remove(peer);
    }

    /// A session is established. Everything is due to the peer. Stale routes of families that the session
    /// does not speak are gone; the others wait for [`Rib::sweep_stale`].
    pub fn up(&mut self, peer: PeerId, session: Session) {
        if self.peers.get(peer).is_some_and(|peer| peer.session.is_some()) {
            self.down(peer, Families::NONE);
        }
        let Some(known) = self.peers.get_mut(peer) else { return };
        let other = (known.neighbour.asn, known.router_id) != (session.asn, session.router_id);
        let keep = if other { Families::NONE } else { session.families };
        // Stale routes go under the name they came with.
        for (number, family) in AfiSafi::SUPPORTED.into_iter().enumerate() {
            if !keep.contains(family) {
                with_family!(self, number, |core| core.remove_received(peer, false));
            }
        }
        let Some(known) = self.peers.get_mut(peer) else { return };
        (known.neighbour.asn, known.router_id) = (session.asn, session.router_id);
        known.session = Some(session);
        for number in 0..FAMILIES {
            with_family!(self, number, |core| core.advertise_all(peer));
        }
    }

    /// A session is gone, and with it what the peer sent. Of the families in `keep` the routes stay in use as
    /// stale: the peer restarts and keeps forwarding meanwhile (RFC 4724 section 4.2).
    pub fn down(&mut self, peer: PeerId, keep: Families) {
        let Some(known) = self.peers.get_mut(peer) else { return };
        known.session = None;
        for (number, family) in AfiSafi::SUPPORTED.into_iter().enumerate() {
            with_family!(self, number, |core| {
                core.forget_advertised(peer);
                if keep.contains(family) {
                    core.mark_stale(peer);
                } else {
                    core.remove_received(peer, false);
                }
            });
        }
        if let Some(known) = self.peers.get_mut(peer) {
            known.attributes.sweep();
        }
    }

    /// Marks what a peer sent, before it sends all of it again (RFC 7313 section 4, Beginning of
    /// Route Refresh).
    pub fn mark_stale(&mut self, peer: PeerId, family: AfiSafi) {
        if let Some(number) = number(family) {
            with_family!(self, number, |core| core.mark_stale(peer));
        }
    }

    /// Drops what a peer has not sent again since it was marked: at End-of-RIB, when the peer's restart time
    /// is over, at the end of a route refresh.
    pub fn sweep_stale(&mut self, peer: PeerId, family: AfiSafi) {
        if let Some(number) = number(family) {
            with_family!(self, number, |core| core.remove_received(peer, true));
        }
    }

    /// Takes an UPDATE of a peer with a session: withdrawals, then announcements. `now` is the time in
    /// seconds since any moment. Returns limits that it met, each kind once for a group of routes.
    pub fn receive(&mut self, peer: PeerId, update: &Update, now: u32) -> Vec<LimitEvent> {
        let mut events = Vec::new();
        let Some(known) = self.peers.get(peer) else { return events };
        let Some(families) = known.session.as_ref().map(|session| session.families) else { return events };
        for nlri in update.withdrawn.iter().filter(|nlri| families.contains(nlri.family())) {
            let path_id = nlri.path_id.unwrap_or(0);
            match nlri.prefix {
                IpNet::V4(prefix) => self.v4().retract(peer, prefix, path_id),
                IpNet::V6(prefix) => self.v6().retract(peer, prefix, path_id),
            }
        }
        for group in &update.announced {
            let Some(known) = self.peers.get_mut(peer) else { break };
            let received = known.attributes.intern(Arc::clone(&group.attributes));
            let limit = known.options.limits.attribute_bytes;
            if known.attributes.bytes() > limit {
                known.attributes.sweep();
                if known.attributes.bytes() > limit {
                    events.push(LimitEvent::AttributesExceeded { limit });
                    break;
                }
            }
            let mut memo = ImportMemo::default();
            for nlri in group.nlri.iter().filter(|nlri| families.contains(nlri.family())) {
                let path_id = nlri.path_id.unwrap_or(0);
                match nlri.prefix {
                    IpNet::V4(prefix) => {
                        let route = Incoming { peer, prefix, path_id, received: &received, now };
                        self.v4().announce(&route, &mut memo, &mut events);
                    }
                    IpNet::V6(prefix) => {
                        let route = Incoming { peer, prefix, path_id, received: &received, now };
                        self.v6().announce(&route, &mut memo, &mut events);
                    }
                }
                events.dedup();
            }
        }
        events
    }

    /// Originates a route, or changes it. `id` tells several paths to a prefix apart; `tag` is for
    /// policies. A next hop that is not specified becomes our own address on each session.
    pub fn originate(&mut self, prefix: IpNet, id: u32, attributes: &Arc<Attributes>, tag: u16, now: u32) {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4().originate(prefix, id, attributes, tag, now),
            IpNet::V6(prefix) => self.v6().originate(prefix, id, attributes, tag, now),
        }
    }

    /// No longer originates a route.
    pub fn withdraw(&mut self, prefix: IpNet, id: u32) {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4().retract(PeerId::LOCAL, prefix, id),
            IpNet::V6(prefix) => self.v6().retract(PeerId::LOCAL, prefix, id),
        }
    }

    /// Next hops of learned routes, with what is known of them.
    pub fn next_hops(&self) -> impl Iterator<Item = (IpAddr, Resolution)> {
        self.next_hops.used()
    }

    /// A number that changes with the set of [`Rib::next_hops`].
    pub const fn next_hops_generation(&self) -> u64 {
        self.next_hops.generation()
    }

    /// Says what the way to a next hop is like. Costs a walk over all routes if it changed and is in
    /// use, so it is for changes of the network, not of routes.
    pub fn resolve(&mut self, next_hop: IpAddr, resolution: Resolution) {
        if self.next_hops.resolve(next_hop, resolution) && self.next_hops.is_used(next_hop) {
            for number in 0..FAMILIES {
                with_family!(self, number, |core| core.reselect_where(|path| {
                    path.effective.as_ref().is_some_and(|now| now.next_hop.address() == next_hop)
                }));
            }
        }
    }

    /// What a peer has to be told of up to `limit` prefixes, IPv4 first; it is taken for told. Empty and
    /// nothing pending: the peer knows all. Groups may be larger than a message. After the first
    /// time that a family is through, End-of-RIB is due.
    pub fn advertise(&mut self, peer: PeerId, limit: usize) -> Update {
        let mut gathered = Gathered::default();
        let mut left = limit;
        for number in 0..FAMILIES {
            left -= with_family!(self, number, |core| core.advertise(peer, left, &mut gathered));
        }
        gathered.update
    }

    /// Whether a peer has to be told something of a family, or may have to.
    pub fn is_pending(&self, peer: PeerId, family: AfiSafi) -> bool {
        self.counts(peer, family).is_some_and(|counts| counts.pending > 0)
    }

    /// Tells a peer everything of a family again (RFC 2918).
    pub fn refresh(&mut self, peer: PeerId, family: AfiSafi) {
        if let Some(number) = number(family) {
            with_family!(self, number, |core| core.refresh(peer));
        }
    }

    /// Up to `limit` prefixes whose routes may have changed since they were last asked for, as they are now.
    pub fn take_changes(&mut self, limit: usize) -> Vec<RouteChange> {
        let mut changes = Vec::new();
        for number in 0..FAMILIES {
            with_family!(self, number, |core| core.take_changes(limit, &mut changes));
        }
        changes
    }

    /// All routes of a family as they are now, whoever was told of them before.
    pub fn routes(&self, family: AfiSafi) -> Vec<RouteChange> {
        match number(family) {
            Some(0) => loc::routes(&self.v4, &self.speaker, &self.peers),
            Some(_) => loc::routes(&self.v6, &self.speaker, &self.peers),
            None => Vec::new(),
        }
    }

    /// Number of prefixes of a family.
    pub fn prefixes(&self, family: AfiSafi) -> usize {
        match number(family) {
            Some(0) => self.v4.len(),
            Some(_) => self.v6.len(),
            None => 0,
        }
    }

    /// Number of routes between a peer and us.
    pub fn counts(&self, peer: PeerId, family: AfiSafi) -> Option<Counts> {
        let family = &self.peers.get(peer)?.families[number(family)?];
        Some(Counts {
            received: family.routes,
            accepted: family.accepted,
            stale: family.stale,
            advertised: family.advertised_routes,
            pending: family.pending.len(),
        })
    }

    /// Memory of the distinct attribute sets that a peer sent, in bytes, estimated.
    pub fn attribute_bytes(&self, peer: PeerId) -> usize {
        self.peers.get(peer).map_or(0, |peer| peer.attributes.bytes())
    }

    fn v4(&mut self) -> Core<'_, Ipv4Net> {
        Core {
            speaker: &self.speaker,
            family: AfiSafi::Ipv4Unicast,
            at: 0,
            table: &mut self.v4,
            peers: &mut self.peers,
            next_hops: &mut self.next_hops,
            changed: &mut self.changed[0],
        }
    }

    fn v6(&mut self) -> Core<'_, Ipv6Net> {
        Core {
            speaker: &self.speaker,
            family: AfiSafi::Ipv6Unicast,
            at: 1,
            table: &mut self.v6,
            peers: &mut self.peers,
            next_hops: &mut self.next_hops,
            changed: &mut self.changed[1],
        }
    }
}

#[cfg(test)]
mod tests;
