//! What a policy does to a route.

use std::net::IpAddr;

use super::{Neighbour, Pattern, Subject, Tag};
use crate::message::{Asn, Attributes, Community, ExtendedCommunity, LargeCommunity};

/// A change of a list of communities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit<T: Tag> {
    /// These and no others.
    Set(Vec<T>),
    /// These as well, behind those that are there; none twice.
    Add(Vec<T>),
    /// Those like these go.
    Remove(Vec<Pattern<T>>),
}

impl<T: Tag> Edit<T> {
    fn changes(&self, list: &[T]) -> bool {
        match self {
            Self::Set(new) => new != list,
            Self::Add(new) => new.iter().any(|community| !list.contains(community)),
            Self::Remove(patterns) => {
                list.iter().any(|&community| patterns.iter().any(|pattern| pattern.matches(community)))
            }
        }
    }

    fn apply(&self, list: &mut Vec<T>) {
        match self {
            Self::Set(new) => list.clone_from(new),
            Self::Add(new) => {
                for &community in new {
                    if !list.contains(&community) {
                        list.push(community);
                    }
                }
            }
            Self::Remove(patterns) => {
                list.retain(|&community| !patterns.iter().any(|pattern| pattern.matches(community)));
            }
        }
    }
}

/// Which next hop a route is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextHopChoice {
    /// Our own address on the session. On import: nothing changes.
    SelfAddress,
    /// As received. On import: nothing changes.
    Unchanged,
    /// This address.
    Address(IpAddr),
    /// The peer's address. On export nothing changes: a peer must not be told to use itself (RFC 4271
    /// section 5.1.3).
    Peer,
}

/// A change of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// LOCAL_PREF. It leaves this speaker towards internal peers only.
    LocalPreference(u32),
    /// MULTI_EXIT_DISC, or none.
    Med(Option<u32>),
    /// Puts an AS in front of the path so many times; without a number, this speaker's own. Towards
    /// internal peers its own is left out: they would take it for a loop. An external export gets the own AS
    /// once more, as always.
    Prepend {
        /// Which.
        asn: Option<Asn>,
        /// How often.
        times: u8,
    },
    /// COMMUNITIES.
    Communities(Edit<Community>),
    /// LARGE_COMMUNITY.
    LargeCommunities(Edit<LargeCommunity>),
    /// EXTENDED COMMUNITIES.
    ExtendedCommunities(Edit<ExtendedCommunity>),
    /// NEXT_HOP. Of several choices the last counts.
    NextHop(NextHopChoice),
}

impl Action {
    /// Carries it out. Attributes are copied only if it changes them. A choice of next hop on export is
    /// only noted: the rules that follow the policy carry it out.
    pub(super) fn apply(&self, subject: &mut Subject<'_>, own: Asn, next_hop: &mut Option<NextHopChoice>) {
        let changes = {
            let attributes = &*subject.attributes;
            match self {
                Self::LocalPreference(value) => attributes.local_preference != Some(*value),
                Self::Med(med) => attributes.med != *med,
                Self::Prepend { asn, times } => {
                    *times > 0 && (asn.is_some_and(|asn| asn != own) || subject.neighbour.asn != own)
                }
                Self::Communities(edit) => edit.changes(&attributes.communities),
                Self::LargeCommunities(edit) => edit.changes(&attributes.large_communities),
                Self::ExtendedCommunities(edit) => edit.changes(&attributes.extended_communities),
                Self::NextHop(choice) => {
                    *next_hop = Some(*choice);
                    false
                }
            }
        };
        if changes {
            self.change(subject.attributes.to_mut(), own);
        }
    }

    fn change(&self, attributes: &mut Attributes, own: Asn) {
        match self {
            Self::LocalPreference(value) => attributes.local_preference = Some(*value),
            Self::Med(med) => attributes.med = *med,
            Self::Prepend { asn, times } => {
                attributes.as_path.prepend(asn.unwrap_or(own), usize::from(*times));
            }
            Self::Communities(edit) => edit.apply(&mut attributes.communities),
            Self::LargeCommunities(edit) => edit.apply(&mut attributes.large_communities),
            Self::ExtendedCommunities(edit) => edit.apply(&mut attributes.extended_communities),
            Self::NextHop(_) => {}
        }
    }
}

/// The next hop that a choice means on import; none if it stays.
pub(super) fn imported_next_hop(choice: NextHopChoice, neighbour: &Neighbour) -> Option<IpAddr> {
    match choice {
        NextHopChoice::SelfAddress | NextHopChoice::Unchanged => None,
        NextHopChoice::Address(address) => Some(address),
        NextHopChoice::Peer => Some(neighbour.address),
    }
}
