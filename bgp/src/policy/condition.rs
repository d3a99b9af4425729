//! What a policy asks of a route.

use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Neighbour, PrefixSet, Subject};
use crate::message::{AfiSafi, Asn, Community, ExtendedCommunity, LargeCommunity, Origin};

/// Where a route came from, as route selection and export see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// This speaker originates it.
    Local,
    /// An internal peer sent it.
    Internal,
    /// An external peer sent it.
    External,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Internal => "iBGP",
            Self::External => "eBGP",
        })
    }
}

/// A community, or all that share an administrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pattern<T: Tag> {
    /// This one.
    Exact(T),
    /// All of one administrator: `65001:*`.
    Administrator(T::Administrator),
    /// All: `*`.
    Any,
}

/// The three kinds of community.
pub trait Tag: Copy + Eq {
    /// Who defines the rest of it.
    type Administrator: Copy + Eq + std::fmt::Debug + std::hash::Hash;

    /// Who defines the rest of it.
    fn administrator(self) -> Self::Administrator;
}

impl Tag for Community {
    type Administrator = u16;

    fn administrator(self) -> u16 {
        self.parts().0
    }
}

impl Tag for LargeCommunity {
    type Administrator = Asn;

    fn administrator(self) -> Asn {
        self.administrator
    }
}

impl Tag for ExtendedCommunity {
    /// Type and subtype: they say what the rest means.
    type Administrator = [u8; 2];

    fn administrator(self) -> [u8; 2] {
        [self.0[0], self.0[1]]
    }
}

impl<T: Tag> Pattern<T> {
    /// Whether a community fits.
    pub fn matches(&self, community: T) -> bool {
        match *self {
            Self::Exact(exact) => exact == community,
            Self::Administrator(administrator) => administrator == community.administrator(),
            Self::Any => true,
        }
    }
}

/// Peers by address or AS. The empty set contains nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NeighbourSet {
    /// Peers with an address in here, as a prefix of full length.
    pub addresses: PrefixSet,
    /// Peers in these ASes.
    pub asns: Vec<Asn>,
}

impl NeighbourSet {
    /// Whether a peer is in the set.
    pub fn contains(&self, neighbour: &Neighbour) -> bool {
        self.addresses.contains(IpNet::from(neighbour.address)) || self.asns.contains(&neighbour.asn)
    }
}

/// A question to a route. Lists mean "any of these"; an empty list or set fits no route. Where all of
/// several must hold, a statement has several conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The prefix is in the set.
    Prefix(Arc<PrefixSet>),
    /// The policy is being applied to one of these peers: the sender on import, the receiver on export.
    Neighbour(Arc<NeighbourSet>),
    /// The route was learned from one of these peers. Never so for routes of this speaker.
    LearnedFrom(Arc<NeighbourSet>),
    /// It carries a community like one of these.
    Community(Vec<Pattern<Community>>),
    /// It carries a large community like one of these.
    LargeCommunity(Vec<Pattern<LargeCommunity>>),
    /// It carries an extended community like one of these.
    ExtendedCommunity(Vec<Pattern<ExtendedCommunity>>),
    /// One of these ASes is anywhere in the AS path.
    AsPathContains(Vec<Asn>),
    /// One of these ASes sent the route into ours.
    AsPathNeighbour(Vec<Asn>),
    /// The route began in one of these ASes.
    AsPathOrigin(Vec<Asn>),
    /// Length of the AS path as route selection counts it.
    AsPathLength(RangeInclusive<usize>),
    /// The next hop, as a prefix of full length, is in the set.
    NextHop(Arc<PrefixSet>),
    /// The prefix is of this family.
    Family(AfiSafi),
    /// Where the route came from is one of these.
    Source(Vec<Source>),
    /// ORIGIN is this.
    Origin(Origin),
    /// This speaker originates the route, with one of these tags: what they mean is the originator's
    /// choice, such as pod CIDR or load-balancer address.
    Tag(Vec<u16>),
    /// The condition does not hold.
    Not(Box<Self>),
}

impl Condition {
    /// Whether it holds.
    pub fn holds(&self, subject: &Subject<'_>) -> bool {
        let attributes = &*subject.attributes;
        match self {
            Self::Prefix(set) => set.contains(subject.prefix),
            Self::Neighbour(set) => set.contains(subject.neighbour),
            Self::LearnedFrom(set) => subject.learned_from.is_some_and(|peer| set.contains(peer)),
            Self::Community(patterns) => any(patterns, &attributes.communities),
            Self::LargeCommunity(patterns) => any(patterns, &attributes.large_communities),
            Self::ExtendedCommunity(patterns) => any(patterns, &attributes.extended_communities),
            Self::AsPathContains(asns) => attributes.as_path.asns().any(|asn| asns.contains(&asn)),
            Self::AsPathNeighbour(asns) => attributes.as_path.first().is_some_and(|asn| asns.contains(&asn)),
            Self::AsPathOrigin(asns) => attributes.as_path.origin().is_some_and(|asn| asns.contains(&asn)),
            Self::AsPathLength(range) => range.contains(&attributes.as_path.hops()),
            Self::NextHop(set) => set.contains(IpNet::from(attributes.next_hop.address())),
            Self::Family(family) => *family == AfiSafi::of(&subject.prefix),
            Self::Source(sources) => sources.contains(&subject.source),
            Self::Origin(origin) => *origin == attributes.origin,
            Self::Tag(tags) => subject.source == Source::Local && tags.contains(&subject.tag),
            Self::Not(condition) => !condition.holds(subject),
        }
    }

    /// The answers that depend on the prefix alone, added to `answers` one bit each; `false` when there
    /// is no room. Routes with equal answers, attributes and source get equal verdicts.
    pub(super) fn ask_prefix(&self, prefix: IpNet, answers: &mut Answers) -> bool {
        match self {
            Self::Prefix(set) => answers.push(set.contains(prefix)),
            Self::Not(condition) => condition.ask_prefix(prefix, answers),
            _ => true,
        }
    }
}

fn any<T: Tag>(patterns: &[Pattern<T>], communities: &[T]) -> bool {
    communities.iter().any(|&community| patterns.iter().any(|pattern| pattern.matches(community)))
}

/// Up to 64 answers of yes and no.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Answers {
    pub(super) bits: u64,
    count: u32,
}

impl Answers {
    fn push(&mut self, answer: bool) -> bool {
        if self.count == u64::BITS {
            return false;
        }
        self.bits |= u64::from(answer) << self.count;
        self.count += 1;
        true
    }
}
