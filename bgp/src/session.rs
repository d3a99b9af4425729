//! What two speakers agree on when they meet: the OPEN that is sent, the checks on the one that
//! comes back (RFC 4271 section 6.2), and what follows from both.

use std::fmt;
use std::time::Duration;

use crate::message::{
    AddPath, AddPathMode, AfiSafi, Asn, Capability, Codec, ExtendedNextHop, Families, GracefulRestart,
    GracefulRestartFamily, Open, RouterId,
};

/// AFI of IPv6, as a next hop (RFC 8950).
const AFI_IPV6: u16 = 2;

/// What this side offers and demands on one session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// AS of this side.
    pub asn: Asn,
    /// Identifier of this side.
    pub router_id: RouterId,
    /// Which AS the peer must be.
    pub peer_asn: PeerAsn,
    /// Hold time in seconds: 0 (no keepalives) or 3 and more.
    pub hold_time: u16,
    /// Families to exchange.
    pub families: Families,
    /// Families in which several paths per prefix are sent, if the peer takes them (RFC 7911).
    pub add_path_send: Families,
    /// Families in which several paths per prefix are taken.
    pub add_path_receive: Families,
    /// Whether IPv4 routes may have IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// Graceful restart of this side. `None`: the peer forgets this side's routes at once, but this
    /// side still keeps those of a peer that restarts.
    pub restart: Option<Restart>,
    /// Whether paths with AS_SETs are taken (RFC 9774 advises against).
    pub accept_as_sets: bool,
    /// Capabilities without which there is no session.
    pub required: Vec<Requirement>,
    /// Name of this host, shown in the peer's summary.
    pub host: Option<String>,
}

/// This side's promise for its own restarts (RFC 4724).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Restart {
    /// Seconds until this side is back, at most 4095.
    pub time: u16,
    /// Families that the kernel goes on forwarding without this process.
    pub forwarding: Families,
}

/// Which AS a peer must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerAsn {
    /// This one.
    Exactly(Asn),
    /// The same as this side.
    Internal,
    /// Any but that of this side.
    External,
    /// Whatever it says.
    Any,
}

impl PeerAsn {
    /// Whether a peer may be this AS.
    pub fn admits(self, own: Asn, peer: Asn) -> bool {
        match self {
            Self::Exactly(wanted) => wanted == peer,
            Self::Internal => own == peer,
            Self::External => own != peer,
            Self::Any => true,
        }
    }
}

impl fmt::Display for PeerAsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(asn) => asn.fmt(f),
            Self::Internal => f.write_str("that of this node"),
            Self::External => f.write_str("any other than that of this node"),
            Self::Any => f.write_str("any"),
        }
    }
}

/// A capability that the peer must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Requirement {
    /// Routes of this family.
    Family(AfiSafi),
    /// AS numbers of four octets (RFC 6793).
    FourOctetAsn,
    /// ROUTE-REFRESH (RFC 2918).
    RouteRefresh,
    /// Keeping routes while the other side restarts (RFC 4724).
    GracefulRestart,
    /// Several paths per prefix from the peer in this family (RFC 7911).
    PathsFrom(AfiSafi),
    /// Several paths per prefix to the peer in this family (RFC 7911).
    PathsTo(AfiSafi),
    /// IPv6 next hops for IPv4 routes (RFC 8950).
    ExtendedNextHop,
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Family(family) => write!(f, "the family {family}"),
            Self::FourOctetAsn => f.write_str("four-octet AS numbers"),
            Self::RouteRefresh => f.write_str("route refresh"),
            Self::GracefulRestart => f.write_str("graceful restart"),
            Self::PathsFrom(family) => write!(f, "sending several paths of {family}"),
            Self::PathsTo(family) => write!(f, "receiving several paths of {family}"),
            Self::ExtendedNextHop => f.write_str("IPv6 next hops for IPv4 routes"),
        }
    }
}

/// How much of the terms goes into an OPEN. Peers that know no capabilities refuse a full one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Offer {
    /// Everything.
    #[default]
    Full,
    /// Families and four-octet AS numbers only.
    Essential,
    /// No capabilities at all: IPv4 unicast (RFC 5492 section 3).
    Bare,
}

impl Terms {
    /// The OPEN of this side. `restarted` says that this process is new and its kernel state is not.
    pub fn open(&self, offer: Offer, restarted: bool) -> Open {
        let mut capabilities = Vec::new();
        if offer != Offer::Bare {
            capabilities.extend(self.families.iter().map(Capability::Multiprotocol));
        }
        if offer == Offer::Full {
            self.optional(restarted, &mut capabilities);
        }
        Open {
            asn: self.asn,
            four_octet_as: offer != Offer::Bare,
            hold_time: self.hold_time,
            router_id: self.router_id,
            capabilities,
        }
    }

    fn optional(&self, restarted: bool, capabilities: &mut Vec<Capability>) {
        capabilities.push(Capability::RouteRefresh);
        capabilities.push(Capability::EnhancedRouteRefresh);
        capabilities.push(Capability::ExtendedMessage);
        if self.offers_extended_next_hop() {
            let families = vec![ExtendedNextHop { family: AfiSafi::Ipv4Unicast, next_hop_afi: AFI_IPV6 }];
            capabilities.push(Capability::ExtendedNextHop(families));
        }
        let paths: Vec<AddPath> = self
            .families
            .iter()
            .filter_map(|family| {
                let mode = match (self.add_path_receive.contains(family), self.add_path_send.contains(family))
                {
                    (true, true) => AddPathMode::Both,
                    (true, false) => AddPathMode::Receive,
                    (false, true) => AddPathMode::Send,
                    (false, false) => return None,
                };
                Some(AddPath { family, mode })
            })
            .collect();
        if !paths.is_empty() {
            capabilities.push(Capability::AddPath(paths));
        }
        // Without families it says: you may restart, I keep your routes (RFC 4724 section 3).
        let promised = self.restart.map_or(Families::NONE, |_| self.families);
        capabilities.push(Capability::GracefulRestart(GracefulRestart {
            restarted: restarted && self.restart.is_some(),
            notification: true,
            restart_time: self.restart.map_or(0, |restart| restart.time.min(4095)),
            families: promised
                .iter()
                .map(|family| GracefulRestartFamily {
                    family,
                    forwarding_preserved: self
                        .restart
                        .is_some_and(|restart| restart.forwarding.contains(family)),
                })
                .collect(),
        }));
        if let Some(host) = &self.host {
            // The capability counts its octets in one.
            let end =
                host.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= 255).last();
            let host = host[..end.unwrap_or(0)].to_owned();
            capabilities.push(Capability::Fqdn { host, domain: String::new() });
        }
    }

    fn offers_extended_next_hop(&self) -> bool {
        self.extended_next_hop && self.families.contains(AfiSafi::Ipv4Unicast)
    }

    /// Checks the peer's OPEN in answer to `offer` and says what both sides agreed on.
    ///
    /// # Errors
    ///
    /// [`OpenError`], the first that applies in the order of RFC 4271 section 6.2.
    pub fn agree(&self, offer: Offer, open: &Open) -> Result<Negotiated, OpenError> {
        if open.asn.0 == 0 {
            return Err(OpenError::ZeroAsn);
        }
        if !self.peer_asn.admits(self.asn, open.asn) {
            return Err(OpenError::WrongAsn { said: open.asn, wanted: self.peer_asn });
        }
        if u32::from(open.router_id) == 0 {
            return Err(OpenError::ZeroRouterId);
        }
        // Between different ASes equal identifiers are fine (RFC 6286 section 2.2).
        if open.router_id == self.router_id && open.asn == self.asn {
            return Err(OpenError::SameRouterId(open.router_id));
        }
        if matches!(open.hold_time, 1 | 2) {
            return Err(OpenError::HoldTime(open.hold_time));
        }
        let negotiated = self.combine(offer, open);
        for requirement in &self.required {
            if !negotiated.meets(*requirement) {
                return Err(OpenError::Missing(*requirement));
            }
        }
        if negotiated.codec.families.is_empty() {
            return Err(OpenError::NoFamily { own: self.families, peer: families_of(open) });
        }
        Ok(negotiated)
    }

    fn combine(&self, offer: Offer, open: &Open) -> Negotiated {
        let full = offer == Offer::Full;
        let mut codec = Codec::negotiate(&self.open(offer, false), open);
        // Without capabilities of this side the codec takes IPv4 as given.
        codec.families = codec.families.and(self.families);
        codec.accept_as_sets = self.accept_as_sets;
        let families = codec.families;
        let mut negotiated = Negotiated {
            asn: self.asn,
            router_id: self.router_id,
            peer_asn: open.asn,
            peer_router_id: open.router_id,
            hold_time: self.hold_time.min(open.hold_time),
            codec,
            route_refresh: false,
            restart: None,
            peer_keeps: Families::NONE,
            peer_host: None,
        };
        for capability in &open.capabilities {
            match capability {
                Capability::RouteRefresh => negotiated.route_refresh = full,
                Capability::GracefulRestart(restart) if full => {
                    let of = |wanted: fn(&GracefulRestartFamily) -> bool| {
                        let entries = restart.families.iter().filter(|entry| wanted(entry));
                        entries.map(|entry| entry.family).collect::<Families>().and(families)
                    };
                    negotiated.restart = Some(PeerRestart {
                        restarted: restart.restarted,
                        notification: restart.notification,
                        time: Duration::from_secs(restart.restart_time.into()),
                        families: of(|_| true),
                        forwarding: of(|entry| entry.forwarding_preserved),
                    });
                    negotiated.peer_keeps = self.restart.map_or(Families::NONE, |_| families);
                }
                Capability::Fqdn { host, .. } => negotiated.peer_host = Some(host.clone()),
                _ => {}
            }
        }
        negotiated
    }
}

/// Families that a peer speaks: without any multiprotocol capability, IPv4 (RFC 4760 section 8).
fn families_of(open: &Open) -> Families {
    let mut named = open.capabilities.iter().filter_map(|capability| match capability {
        Capability::Multiprotocol(family) => Some(*family),
        _ => None,
    });
    match named.next() {
        None => Families::IPV4,
        Some(first) => std::iter::once(first).chain(named).collect(),
    }
}

/// What both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// AS of this side.
    pub asn: Asn,
    /// Identifier of this side.
    pub router_id: RouterId,
    /// The peer's AS.
    pub peer_asn: Asn,
    /// The peer's identifier.
    pub peer_router_id: RouterId,
    /// Seconds of silence that end the session; 0 is never.
    pub hold_time: u16,
    /// How messages are written and read, families included.
    pub codec: Codec,
    /// Whether the peer answers route refresh.
    pub route_refresh: bool,
    /// What the peer says of its restarts.
    pub restart: Option<PeerRestart>,
    /// Families in which the peer keeps this side's routes while this side restarts.
    pub peer_keeps: Families,
    /// The peer's name for itself: to be shown, not to be believed.
    pub peer_host: Option<String>,
}

/// What a peer says of its restarts (RFC 4724).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerRestart {
    /// It has just restarted, and sends End-of-RIB without waiting for this side's.
    pub restarted: bool,
    /// Sessions that end with a NOTIFICATION are survived too (RFC 8538).
    pub notification: bool,
    /// How long it takes at most to come back.
    pub time: Duration,
    /// Families whose routes are to be kept meanwhile.
    pub families: Families,
    /// Families that it did go on forwarding during its last restart.
    pub forwarding: Families,
}

impl Negotiated {
    /// Whether both sides are in one AS.
    pub fn is_internal(&self) -> bool {
        self.asn == self.peer_asn
    }

    /// Silence that ends the session; `None` is never.
    pub const fn hold(&self) -> Option<Duration> {
        match self.hold_time {
            0 => None,
            seconds => Some(Duration::from_secs(seconds as u64)),
        }
    }

    fn meets(&self, requirement: Requirement) -> bool {
        let codec = &self.codec;
        match requirement {
            Requirement::Family(family) => codec.families.contains(family),
            Requirement::FourOctetAsn => codec.four_octet_as,
            Requirement::RouteRefresh => self.route_refresh,
            Requirement::GracefulRestart => self.restart.is_some(),
            Requirement::PathsFrom(family) => codec.add_path_receive.contains(family),
            Requirement::PathsTo(family) => codec.add_path_send.contains(family),
            Requirement::ExtendedNextHop => codec.extended_next_hop,
        }
    }
}

/// Why an OPEN is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Bad Peer AS.
    #[error("peer says AS {said}, configured {wanted}")]
    WrongAsn {
        /// What the peer said.
        said: Asn,
        /// What it should have said.
        wanted: PeerAsn,
    },
    /// Bad Peer AS.
    #[error("peer says AS 0, which nobody may use (RFC 7607)")]
    ZeroAsn,
    /// Bad BGP Identifier.
    #[error("peer has no router id (0.0.0.0)")]
    ZeroRouterId,
    /// Bad BGP Identifier.
    #[error(
        "peer has AS and router id {0} of this node: give one of them another router id, or remove the peer if \
         it is this node itself"
    )]
    SameRouterId(RouterId),
    /// Unacceptable Hold Time.
    #[error("peer offers a hold time of {0} s: it must be 0 or at least 3")]
    HoldTime(u16),
    /// Unsupported Capability.
    #[error("peer lacks {0}, which is required here")]
    Missing(Requirement),
    /// Unsupported Capability.
    #[error("no family in common: peer has {peer:?}, configured {own:?}")]
    NoFamily {
        /// Families configured here.
        own: Families,
        /// Families of the peer that are known here.
        peer: Families,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn terms(asn: u32, id: u32, peer: PeerAsn) -> Terms {
        Terms {
            asn: Asn(asn),
            router_id: RouterId::from(id),
            peer_asn: peer,
            hold_time: 90,
            families: Families::ALL,
            add_path_send: Families::NONE,
            add_path_receive: Families::NONE,
            extended_next_hop: false,
            restart: None,
            accept_as_sets: false,
            required: Vec::new(),
            host: None,
        }
    }

    fn refusal(own: &Terms, change: impl Fn(&mut Open)) -> String {
        let mut open = terms(65001, 2, PeerAsn::Any).open(Offer::Full, false);
        change(&mut open);
        own.agree(Offer::Full, &open).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn refusals_name_both_sides() {
        let own = terms(65000, 1, PeerAsn::Exactly(Asn(65001)));
        assert_eq!(refusal(&own, |open| open.asn = Asn(65002)), "peer says AS 65002, configured 65001");
        assert_eq!(
            refusal(&own, |open| open.asn = Asn(0)),
            "peer says AS 0, which nobody may use (RFC 7607)"
        );
        assert_eq!(refusal(&own, |open| open.router_id = 0.into()), "peer has no router id (0.0.0.0)");
        for hold in [1, 2] {
            assert_eq!(
                refusal(&own, |open| open.hold_time = hold),
                format!("peer offers a hold time of {hold} s: it must be 0 or at least 3")
            );
        }
        let internal = terms(65001, 2, PeerAsn::Internal);
        assert!(refusal(&internal, |_| ()).contains("AS and router id 0.0.0.2 of this node"));
        assert_eq!(
            refusal(&own, |open| open.capabilities = vec![Capability::Multiprotocol(AfiSafi::new(1, 128))]),
            "no family in common: peer has {}, configured {Ipv4Unicast, Ipv6Unicast}"
        );
    }

    #[test]
    fn which_as_a_peer_may_be() {
        let (own, other) = (Asn(65000), Asn(65001));
        for (wanted, same, different) in [
            (PeerAsn::Exactly(other), false, true),
            (PeerAsn::Internal, true, false),
            (PeerAsn::External, false, true),
            (PeerAsn::Any, true, true),
        ] {
            assert_eq!(wanted.admits(own, own), same, "{wanted:?}");
            assert_eq!(wanted.admits(own, other), different, "{wanted:?}");
        }
    }

    #[test]
    fn equal_router_ids_between_ases_are_fine() {
        let own = terms(65000, 7, PeerAsn::External);
        let open = terms(65001, 7, PeerAsn::Any).open(Offer::Full, false);
        assert!(own.agree(Offer::Full, &open).is_ok());
    }

    #[test]
    fn the_shorter_hold_time_wins_and_zero_is_none() {
        for (own, peer, seconds) in [(90, 30, Some(30)), (3, 90, Some(3)), (0, 90, None), (90, 0, None)] {
            let mut side = terms(65000, 1, PeerAsn::Any);
            side.hold_time = own;
            let mut open = terms(65001, 2, PeerAsn::Any).open(Offer::Full, false);
            open.hold_time = peer;
            let negotiated = side.agree(Offer::Full, &open).unwrap();
            assert_eq!(negotiated.hold(), seconds.map(Duration::from_secs), "{own} and {peer}");
        }
    }

    #[test]
    fn a_peer_without_capabilities_speaks_ipv4() {
        let own = terms(65000, 1, PeerAsn::Any);
        let open = terms(65001, 2, PeerAsn::Any).open(Offer::Bare, false);
        assert!(open.capabilities.is_empty());
        let negotiated = own.agree(Offer::Full, &open).unwrap();
        assert_eq!(negotiated.codec.families, Families::IPV4);
        assert!(!negotiated.codec.four_octet_as && !negotiated.route_refresh && negotiated.restart.is_none());
        let mut ipv6 = own.clone();
        ipv6.families = Families::IPV6;
        assert!(matches!(ipv6.agree(Offer::Full, &open), Err(OpenError::NoFamily { .. })));
    }

    #[test]
    fn capabilities_count_only_if_both_have_them() {
        let mut own = terms(65000, 1, PeerAsn::Any);
        own.add_path_send = Families::ALL;
        own.add_path_receive = Families::IPV6;
        own.extended_next_hop = true;
        own.restart = Some(Restart { time: 120, forwarding: Families::ALL });
        own.host = Some("node-1".into());
        let mut peer = terms(65001, 2, PeerAsn::Any);
        peer.add_path_send = Families::ALL;
        peer.add_path_receive = Families::IPV4;
        peer.extended_next_hop = true;
        peer.restart = Some(Restart { time: 60, forwarding: Families::IPV4 });
        let here = own.agree(Offer::Full, &peer.open(Offer::Full, true)).unwrap();
        let there = peer.agree(Offer::Full, &own.open(Offer::Full, false)).unwrap();
        assert_eq!((here.codec.add_path_send, here.codec.add_path_receive), (Families::IPV4, Families::IPV6));
        assert_eq!(
            (there.codec.add_path_send, there.codec.add_path_receive),
            (Families::IPV6, Families::IPV4)
        );
        assert!(here.codec.extended_next_hop && here.route_refresh && here.codec.enhanced_refresh);
        assert_eq!(here.codec.send_max, 65535);
        assert_eq!(
            here.restart,
            Some(PeerRestart {
                restarted: true,
                notification: true,
                time: Duration::from_secs(60),
                families: Families::ALL,
                forwarding: Families::IPV4,
            })
        );
        assert_eq!(here.peer_keeps, Families::ALL);
        assert_eq!(there.peer_host.as_deref(), Some("node-1"));
        // What was not offered is not in force, whatever the peer says.
        let reduced = own.agree(Offer::Essential, &peer.open(Offer::Full, true)).unwrap();
        assert!(
            reduced.codec.add_path_send.is_empty() && reduced.restart.is_none() && !reduced.route_refresh
        );
        assert_eq!((reduced.codec.send_max, reduced.codec.four_octet_as), (4096, true));
    }

    #[test]
    fn what_is_required_must_be_there() {
        let mut peer = terms(65001, 2, PeerAsn::Any);
        peer.families = Families::IPV4;
        for (requirement, offer) in [
            (Requirement::Family(AfiSafi::Ipv6Unicast), Offer::Full),
            (Requirement::FourOctetAsn, Offer::Bare),
            (Requirement::RouteRefresh, Offer::Essential),
            (Requirement::GracefulRestart, Offer::Essential),
            (Requirement::PathsFrom(AfiSafi::Ipv4Unicast), Offer::Full),
            (Requirement::PathsTo(AfiSafi::Ipv4Unicast), Offer::Full),
            (Requirement::ExtendedNextHop, Offer::Full),
        ] {
            let mut own = terms(65000, 1, PeerAsn::Any);
            own.required = vec![requirement];
            assert_eq!(
                own.agree(Offer::Full, &peer.open(offer, false)),
                Err(OpenError::Missing(requirement))
            );
        }
    }

    #[test]
    fn a_long_host_name_is_cut_between_characters() {
        let mut own = terms(65000, 1, PeerAsn::Any);
        own.host = Some("é".repeat(200));
        let open = own.open(Offer::Full, false);
        let Some(Capability::Fqdn { host, .. }) = open.capabilities.last() else { panic!("no name") };
        assert_eq!(host.len(), 254);
    }
}
