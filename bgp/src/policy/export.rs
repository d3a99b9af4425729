//! What is given to a peer, and in which form.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{Disposition, Neighbour, NextHopChoice, Policy, Source, Subject};
use crate::message::{Asn, Attributes, Community, NextHop, RouterId};

/// LOCAL_PREF of routes for which nobody chose one (the value all implementations share).
pub(crate) const DEFAULT_LOCAL_PREFERENCE: u32 = 100;

/// Why a route is not advertised to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Withheld {
    /// Another path is advertised in its place.
    NotSelected,
    /// The peer itself sent it.
    SplitHorizon,
    /// It comes from an internal peer, and neither that one nor this is our reflection client (RFC 4456
    /// section 6).
    NotReflected,
    /// The peer brought it into the AS (RFC 4456 section 8).
    Originator,
    /// It carries NO_ADVERTISE (RFC 1997).
    NoAdvertise,
    /// It carries NO_EXPORT, and the peer is external (RFC 1997).
    NoExport,
    /// It carries NO_EXPORT_SUBCONFED, and the peer is external (RFC 1997).
    NoExportSubconfed,
    /// There is no export policy for an external peer (RFC 8212).
    NoPolicy,
    /// The export policy rejects it: a statement by number, or the policy's own disposition.
    Policy(Option<u16>),
    /// There is no next hop of a family that the peer understands.
    NoNextHop,
    /// The peer itself is the next hop (RFC 4271 section 5.1.3).
    NextHopIsPeer,
}

impl fmt::Display for Withheld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotSelected => "another path is advertised",
            Self::SplitHorizon => "learned from this peer",
            Self::NotReflected => "internal route, and neither peer is a reflection client",
            Self::Originator => "the peer originated it",
            Self::NoAdvertise => "community no-advertise",
            Self::NoExport => "community no-export",
            Self::NoExportSubconfed => "community no-export-subconfed",
            Self::NoPolicy => "no export policy for an external peer",
            Self::Policy(None) => "export policy",
            Self::Policy(Some(index)) => {
                return write!(f, "export policy, statement {}", u32::from(*index) + 1);
            }
            Self::NoNextHop => "no next hop of a family that the peer understands",
            Self::NextHopIsPeer => "the peer is the next hop",
        })
    }
}

/// Our addresses on a session, for "next hop self".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LocalAddresses {
    /// For IPv4 prefixes.
    pub v4: Option<Ipv4Addr>,
    /// For IPv6 prefixes, and IPv4 ones where the peer takes IPv6 next hops for them.
    pub v6: Option<Ipv6Addr>,
    /// On the link that is shared with the peer; told only to a peer on the link (RFC 2545 section 3).
    pub link_local: Option<Ipv6Addr>,
}

impl LocalAddresses {
    fn next_hop_v6(&self) -> Option<NextHop> {
        match (self.v6, self.link_local) {
            (Some(global), link_local) => Some(NextHop::V6 { global, link_local }),
            (None, Some(link_local)) => Some(NextHop::V6 { global: link_local, link_local: None }),
            (None, None) => None,
        }
    }

    fn next_hop(&self, prefix: IpNet, extended: bool) -> Option<NextHop> {
        match prefix {
            IpNet::V4(_) => self.v4.map(NextHop::V4).or_else(|| self.next_hop_v6().filter(|_| extended)),
            IpNet::V6(_) => self.next_hop_v6(),
        }
    }
}

/// Who gets routes, and by which rules.
#[derive(Debug, Clone, Copy)]
pub struct Exporter<'a> {
    /// Our AS.
    pub own: Asn,
    /// Our cluster, where this speaker reflects.
    pub cluster_id: RouterId,
    /// The receiver.
    pub neighbour: &'a Neighbour,
    /// Its BGP identifier.
    pub router_id: RouterId,
    /// Whether it is our reflection client.
    pub client: bool,
    /// Our addresses towards it.
    pub addresses: LocalAddresses,
    /// Whether it takes IPv6 next hops for IPv4 prefixes (RFC 8950).
    pub extended_next_hop: bool,
    /// Our address as next hop of all but reflected routes, internal peers included.
    pub next_hop_self: bool,
    /// The export policy.
    pub policy: Option<&'a Policy>,
}

/// A selected route on its way out.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// Where it leads.
    pub prefix: IpNet,
    /// After import.
    pub attributes: &'a Attributes,
    /// The originator's tag; 0 for learned routes.
    pub tag: u16,
    /// Who sent it; none for our own.
    pub learned_from: Option<LearnedFrom<'a>>,
}

/// The sender of a route.
#[derive(Debug, Clone, Copy)]
pub struct LearnedFrom<'a> {
    /// Who it is.
    pub neighbour: &'a Neighbour,
    /// Its BGP identifier.
    pub router_id: RouterId,
    /// Whether it is our reflection client.
    pub client: bool,
    /// Whether it is the very peer that the route would go to.
    pub is_receiver: bool,
}

impl Outgoing<'_> {
    fn source(&self, own: Asn) -> Source {
        match self.learned_from {
            None => Source::Local,
            Some(from) if from.neighbour.asn == own => Source::Internal,
            Some(_) => Source::External,
        }
    }
}

/// The attributes with which a route is advertised.
///
/// Only a learned route is held back by its well-known communities, and loses MED and non-transitive
/// communities at the border of the AS: on a route of our own they are meant for the
/// neighbour. What the policy sets is kept in either case.
///
/// # Errors
///
/// [`Withheld`] when it is not advertised.
pub fn export<'a>(exporter: &Exporter<'a>, route: &Outgoing<'a>) -> Result<Cow<'a, Attributes>, Withheld> {
    let internal = exporter.neighbour.asn == exporter.own;
    let source = route.source(exporter.own);
    if let Some(from) = &route.learned_from {
        may_pass_on(exporter, route.attributes, from, source, internal)?;
    }
    let mut subject = Subject {
        prefix: route.prefix,
        attributes: Cow::Borrowed(route.attributes),
        source,
        tag: route.tag,
        learned_from: route.learned_from.as_ref().map(|from| from.neighbour),
        neighbour: exporter.neighbour,
    };
    if !internal && source != Source::Local {
        leave_the_as(&mut subject.attributes);
    }
    let mut choice = None;
    match exporter.policy {
        Some(policy) => {
            let verdict = policy.evaluate(&mut subject, exporter.own);
            if verdict.disposition == Disposition::Reject {
                return Err(Withheld::Policy(verdict.statement));
            }
            choice = verdict.next_hop;
        }
        None if internal => {}
        None => return Err(Withheld::NoPolicy),
    }
    let mut attributes = subject.attributes;
    let next_hop = next_hop(exporter, route.prefix, &attributes.next_hop, source, internal, choice)?;
    if next_hop != attributes.next_hop {
        attributes.to_mut().next_hop = next_hop;
    }
    if internal {
        if attributes.local_preference.is_none() {
            attributes.to_mut().local_preference = Some(DEFAULT_LOCAL_PREFERENCE);
        }
        if let Some(from) = route.learned_from.filter(|_| source == Source::Internal) {
            let reflected = attributes.to_mut();
            reflected.originator_id.get_or_insert(from.router_id);
            reflected.cluster_list.insert(0, exporter.cluster_id);
        }
    } else {
        let attributes = attributes.to_mut();
        attributes.as_path.prepend(exporter.own, 1);
        attributes.local_preference = None;
        attributes.originator_id = None;
        attributes.cluster_list.clear();
    }
    Ok(attributes)
}

/// Reflection and well-known communities, for learned routes.
fn may_pass_on(
    exporter: &Exporter<'_>,
    attributes: &Attributes,
    from: &LearnedFrom<'_>,
    source: Source,
    internal: bool,
) -> Result<(), Withheld> {
    if from.is_receiver {
        return Err(Withheld::SplitHorizon);
    }
    if internal && source == Source::Internal {
        if !from.client && !exporter.client {
            return Err(Withheld::NotReflected);
        }
        if attributes.originator_id.unwrap_or(from.router_id) == exporter.router_id {
            return Err(Withheld::Originator);
        }
    }
    let carries = |community| attributes.communities.contains(&community);
    if carries(Community::NO_ADVERTISE) {
        return Err(Withheld::NoAdvertise);
    }
    if !internal && carries(Community::NO_EXPORT) {
        return Err(Withheld::NoExport);
    }
    if !internal && carries(Community::NO_EXPORT_SUBCONFED) {
        return Err(Withheld::NoExportSubconfed);
    }
    Ok(())
}

/// What one AS says to itself does not reach the next: MED (RFC 4271 section 5.1.4), extended
/// communities that are not transitive (RFC 4360 section 6).
fn leave_the_as(attributes: &mut Cow<'_, Attributes>) {
    if attributes.med.is_some() {
        attributes.to_mut().med = None;
    }
    if attributes.extended_communities.iter().any(|community| !community.is_transitive()) {
        attributes.to_mut().extended_communities.retain(|community| community.is_transitive());
    }
}

/// The next hop to tell the peer (RFC 4271 section 5.1.3): towards external peers our own address, or the
/// one that we originated the route with; towards internal peers as received, for a reflected route
/// always unless the policy itself says otherwise (RFC 4456 section 10).
fn next_hop(
    exporter: &Exporter<'_>,
    prefix: IpNet,
    received: &NextHop,
    source: Source,
    internal: bool,
    choice: Option<NextHopChoice>,
) -> Result<NextHop, Withheld> {
    let own = || exporter.addresses.next_hop(prefix, exporter.extended_next_hop).ok_or(Withheld::NoNextHop);
    let unchanged = || match received.address() {
        address if address.is_unspecified() => own(),
        // A link-local address means nothing on another link.
        IpAddr::V6(address) if address.is_unicast_link_local() => own(),
        address => Ok(NextHop::from(address)),
    };
    let reflected = internal && source == Source::Internal;
    let next_hop = match choice {
        Some(NextHopChoice::SelfAddress) => own()?,
        Some(NextHopChoice::Unchanged) => unchanged()?,
        Some(NextHopChoice::Address(address)) => NextHop::from(address),
        Some(NextHopChoice::Peer) | None => {
            if (exporter.next_hop_self && !reflected) || (!internal && source != Source::Local) {
                own()?
            } else {
                unchanged()?
            }
        }
    };
    match (prefix, next_hop) {
        (IpNet::V4(_), NextHop::V6 { .. }) if !exporter.extended_next_hop => Err(Withheld::NoNextHop),
        (IpNet::V6(_), NextHop::V4(_)) => Err(Withheld::NoNextHop),
        _ if next_hop.address() == exporter.neighbour.address => Err(Withheld::NextHopIsPeer),
        _ => Ok(next_hop),
    }
}
