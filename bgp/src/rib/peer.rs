//! Peers as the RIB knows them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use super::id_set::IdSet;
use super::interner::Interner;
use super::loc::Path;
use super::{FAMILIES, Speaker};
use crate::message::{AfiSafi, Asn, Families, RouterId};
use crate::policy::{Exporter, Importer, LearnedFrom, LocalAddresses, Neighbour, Policy, Source};

/// A peer of one RIB. Never used again for another peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub(super) u32);

impl PeerId {
    /// Stands for this speaker in paths that it originates.
    pub(super) const LOCAL: Self = Self(u32::MAX);
}

/// Which paths to a prefix a peer gets where add-path was negotiated (RFC 7911).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddPathSend {
    /// So many of the best.
    Best(u16),
    /// Every eligible one.
    All,
}

/// What a peer may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Routes of each family, every path of a prefix counted; more are not taken.
    pub routes: Option<u32>,
    /// Percent of `routes` at which to warn, once until fewer than that are left.
    pub warning_percent: u8,
    /// Paths to one prefix; more are ignored.
    pub paths_per_prefix: u16,
    /// Memory of distinct attribute sets, in bytes; what brings more is not taken.
    pub attribute_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { routes: None, warning_percent: 80, paths_per_prefix: 64, attribute_bytes: 256 << 20 }
    }
}

/// A limit that was reached while routes were taken in. After all but the warning, routes are missing:
/// the session must end (Cease, RFC 4486) or the limit grow and the routes be asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitEvent {
    /// The warning threshold was crossed.
    RoutesWarning {
        /// Of this family.
        family: AfiSafi,
        /// Routes now.
        routes: u32,
        /// Routes allowed.
        limit: u32,
    },
    /// More routes came than are allowed.
    RoutesExceeded {
        /// Of this family.
        family: AfiSafi,
        /// Routes allowed.
        limit: u32,
    },
    /// More paths to one prefix came than are allowed.
    PathsExceeded {
        /// Of this family.
        family: AfiSafi,
        /// Paths allowed.
        limit: u16,
    },
    /// More memory would be needed than is allowed.
    AttributesExceeded {
        /// Bytes allowed.
        limit: usize,
    },
}

impl LimitEvent {
    /// Whether routes of the peer are missing now.
    pub const fn is_exceeded(&self) -> bool {
        !matches!(self, Self::RoutesWarning { .. })
    }
}

impl fmt::Display for LimitEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RoutesWarning { family, routes, limit } => {
                write!(f, "{routes} of at most {limit} {family} routes received")
            }
            Self::RoutesExceeded { family, limit } => write!(f, "more than {limit} {family} routes received"),
            Self::PathsExceeded { family, limit } => {
                write!(f, "more than {limit} paths to one {family} prefix received")
            }
            Self::AttributesExceeded { limit } => {
                write!(f, "path attributes received need more than {limit} bytes")
            }
        }
    }
}

/// How a peer is treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerOptions {
    /// Its address.
    pub address: IpAddr,
    /// Whether it is our reflection client.
    pub client: bool,
    /// What is taken from it; without, everything from an internal peer and nothing from an external one.
    pub import: Option<Arc<Policy>>,
    /// What it is given; without, everything to an internal peer and nothing to an external one.
    pub export: Option<Arc<Policy>>,
    /// Our address as next hop of all but reflected routes. Learned routes have it towards external
    /// peers anyway; with this also those of our own, and towards internal peers.
    pub next_hop_self: bool,
    /// How often our AS may be in the path of what it sends.
    pub allow_own_as: u8,
    /// Whether the path of what an external peer sends must begin with its AS.
    pub enforce_first_as: bool,
    /// Which paths it gets where it takes several.
    pub add_path_send: AddPathSend,
    /// What it may cost.
    pub limits: Limits,
}

impl PeerOptions {
    /// No policy, no exceptions.
    pub fn new(address: IpAddr) -> Self {
        Self {
            address,
            client: false,
            import: None,
            export: None,
            next_hop_self: false,
            allow_own_as: 0,
            enforce_first_as: false,
            add_path_send: AddPathSend::All,
            limits: Limits::default(),
        }
    }

    fn takes_like(&self, other: &Self) -> bool {
        (self.address, &self.import, self.allow_own_as, self.enforce_first_as)
            == (other.address, &other.import, other.allow_own_as, other.enforce_first_as)
    }

    fn gives_like(&self, other: &Self) -> bool {
        (self.address, self.client, &self.export, self.next_hop_self, self.add_path_send)
            == (other.address, other.client, &other.export, other.next_hop_self, other.add_path_send)
    }
}

/// What an established session agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The peer's AS.
    pub asn: Asn,
    /// The peer's BGP identifier.
    pub router_id: RouterId,
    /// Our addresses on the session.
    pub addresses: LocalAddresses,
    /// Families that both speak.
    pub families: Families,
    /// Families in which the peer sends several paths to a prefix.
    pub add_path_receive: Families,
    /// Families in which the peer takes several paths to a prefix.
    pub add_path_send: Families,
    /// Whether the peer takes IPv6 next hops for IPv4 prefixes (RFC 8950).
    pub extended_next_hop: bool,
}

/// Routes of one family, from and to a peer.
#[derive(Debug, Default)]
pub(super) struct PeerFamily {
    /// Prefixes with a path from the peer.
    pub(super) received: IdSet,
    /// Paths from the peer.
    pub(super) routes: u32,
    /// Of them, those that import policy took.
    pub(super) accepted: u32,
    /// Of them, those from before the last restart.
    pub(super) stale: u32,
    /// Whether the warning threshold was reported.
    pub(super) warned: bool,
    /// Prefixes with a path that the peer was told.
    pub(super) advertised: IdSet,
    /// Paths that the peer was told.
    pub(super) advertised_routes: u32,
    /// Prefixes to look at before the peer knows all.
    pub(super) pending: IdSet,
}

/// A peer.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) options: PeerOptions,
    /// Kept over a restart: stale routes are still the peer's.
    pub(super) neighbour: Neighbour,
    pub(super) router_id: RouterId,
    pub(super) session: Option<Session>,
    /// Attributes of its routes, before and after import.
    pub(super) attributes: Interner,
    pub(super) families: [PeerFamily; FAMILIES],
}

impl Peer {
    pub(super) fn new(options: PeerOptions) -> Self {
        Self {
            neighbour: Neighbour { address: options.address, asn: Asn(0) },
            router_id: RouterId(Ipv4Addr::UNSPECIFIED),
            options,
            session: None,
            attributes: Interner::default(),
            families: Default::default(),
        }
    }

    /// What a change of options makes necessary: to import again, to export again.
    pub(super) fn reconfigure(&mut self, options: PeerOptions) -> (bool, bool) {
        let before = std::mem::replace(&mut self.options, options);
        self.neighbour.address = self.options.address;
        (!before.takes_like(&self.options), !before.gives_like(&self.options))
    }

    pub(super) fn speaks(&self, family: AfiSafi) -> bool {
        self.session.as_ref().is_some_and(|session| session.families.contains(family))
    }

    pub(super) fn sends_paths(&self, family: AfiSafi) -> bool {
        self.session.as_ref().is_some_and(|session| session.add_path_send.contains(family))
    }

    pub(super) fn importer<'a>(&'a self, speaker: &Speaker) -> Importer<'a> {
        Importer {
            own: speaker.asn,
            router_id: speaker.router_id,
            cluster_id: speaker.cluster_id,
            neighbour: &self.neighbour,
            allow_own_as: self.options.allow_own_as,
            enforce_first_as: self.options.enforce_first_as,
            policy: self.options.import.as_deref(),
        }
    }

    pub(super) fn exporter<'a>(&'a self, speaker: &Speaker, session: &Session) -> Exporter<'a> {
        Exporter {
            own: speaker.asn,
            cluster_id: speaker.cluster_id,
            neighbour: &self.neighbour,
            router_id: self.router_id,
            client: self.options.client,
            addresses: session.addresses,
            extended_next_hop: session.extended_next_hop,
            next_hop_self: self.options.next_hop_self,
            policy: self.options.export.as_deref(),
        }
    }
}

/// All peers, by number.
#[derive(Debug, Default)]
pub(super) struct Peers(Vec<Option<Box<Peer>>>);

impl Peers {
    pub(super) fn add(&mut self, peer: Peer) -> PeerId {
        let id = PeerId(self.0.len() as u32);
        self.0.push(Some(Box::new(peer)));
        id
    }

    pub(super) fn remove(&mut self, id: PeerId) {
        if let Some(peer) = self.0.get_mut(id.0 as usize) {
            *peer = None;
        }
    }

    pub(super) fn get(&self, id: PeerId) -> Option<&Peer> {
        self.0.get(id.0 as usize)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.0.get_mut(id.0 as usize)?.as_deref_mut()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (PeerId, &mut Peer)> {
        let numbered = self.0.iter_mut().enumerate();
        numbered.filter_map(|(index, peer)| Some((PeerId(index as u32), peer.as_deref_mut()?)))
    }

    /// Where a path came from.
    pub(super) fn source(&self, path: &Path, own: Asn) -> Source {
        match self.get(path.peer) {
            None => Source::Local,
            Some(peer) if peer.neighbour.asn == own => Source::Internal,
            Some(_) => Source::External,
        }
    }

    /// Who sent a path, as export to `receiver` wants to know it.
    pub(super) fn learned_from(&self, path: &Path, receiver: PeerId) -> Option<LearnedFrom<'_>> {
        self.get(path.peer).map(|peer| LearnedFrom {
            neighbour: &peer.neighbour,
            router_id: peer.router_id,
            client: peer.options.client,
            is_receiver: path.peer == receiver,
        })
    }
}
