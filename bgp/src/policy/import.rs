//! What is taken from a peer.

use std::borrow::Cow;
use std::fmt;

use ipnet::IpNet;

use super::action::imported_next_hop;
use super::{Disposition, Neighbour, Policy, Source, Subject};
use crate::message::{Asn, Attributes, RouterId};

/// Why a received route is not eligible. It is kept, and shown with the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Our AS is in its path more often than allowed (RFC 4271 section 9.1.2).
    OwnAs,
    /// The peer's AS is not the first of the path, and it is asked for (RFC 4271 section 6.3).
    FirstAs,
    /// We brought it into the AS (RFC 4456 section 8).
    OwnOriginator,
    /// Our cluster reflected it (RFC 4456 section 8).
    OwnCluster,
    /// There is no import policy for an external peer (RFC 8212).
    NoPolicy,
    /// The import policy rejects it: a statement by number, or the policy's own disposition.
    Policy(Option<u16>),
    /// Its next hop is one of our own addresses (RFC 4271 section 5.1.3).
    NextHopOwn,
    /// There is no way to its next hop (RFC 4271 section 9.1.2).
    NextHopUnreachable,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnAs => "own AS in the AS path",
            Self::FirstAs => "first AS of the path is not the peer's",
            Self::OwnOriginator => "originator is this router",
            Self::OwnCluster => "own cluster in the cluster list",
            Self::NoPolicy => "no import policy for an external peer",
            Self::Policy(None) => "import policy",
            Self::Policy(Some(index)) => {
                return write!(f, "import policy, statement {}", u32::from(*index) + 1);
            }
            Self::NextHopOwn => "next hop is an own address",
            Self::NextHopUnreachable => "next hop is unreachable",
        })
    }
}

/// Whose routes are taken, and by which rules.
#[derive(Debug, Clone, Copy)]
pub struct Importer<'a> {
    /// Our AS.
    pub own: Asn,
    /// Our BGP identifier.
    pub router_id: RouterId,
    /// Our cluster, where this speaker reflects.
    pub cluster_id: RouterId,
    /// The sender.
    pub neighbour: &'a Neighbour,
    /// How often our AS may be in the path: 0 normally, 1 where sites of one AS speak through another.
    pub allow_own_as: u8,
    /// Whether an external peer's path must begin with its AS. Route servers break it.
    pub enforce_first_as: bool,
    /// The import policy.
    pub policy: Option<&'a Policy>,
}

/// The attributes by which a received route takes part in route selection.
///
/// # Errors
///
/// [`Refusal`] when it does not.
pub fn import<'a>(
    importer: &Importer<'a>,
    prefix: IpNet,
    attributes: &'a Attributes,
) -> Result<Cow<'a, Attributes>, Refusal> {
    let internal = importer.neighbour.asn == importer.own;
    let path = &attributes.as_path;
    let crossed = path.asns().filter(|&asn| asn == importer.own).count();
    if crossed > usize::from(importer.allow_own_as) {
        return Err(Refusal::OwnAs);
    }
    if !internal && importer.enforce_first_as && path.first() != Some(importer.neighbour.asn) {
        return Err(Refusal::FirstAs);
    }
    if internal && attributes.originator_id == Some(importer.router_id) {
        return Err(Refusal::OwnOriginator);
    }
    if internal && attributes.cluster_list.contains(&importer.cluster_id) {
        return Err(Refusal::OwnCluster);
    }
    let Some(policy) = importer.policy else {
        return if internal { Ok(Cow::Borrowed(attributes)) } else { Err(Refusal::NoPolicy) };
    };
    let mut subject = Subject {
        prefix,
        attributes: Cow::Borrowed(attributes),
        source: if internal { Source::Internal } else { Source::External },
        tag: 0,
        learned_from: Some(importer.neighbour),
        neighbour: importer.neighbour,
    };
    let verdict = policy.evaluate(&mut subject, importer.own);
    if verdict.disposition == Disposition::Reject {
        return Err(Refusal::Policy(verdict.statement));
    }
    let chosen = verdict.next_hop.and_then(|choice| imported_next_hop(choice, importer.neighbour));
    if let Some(address) = chosen.filter(|&address| address != subject.attributes.next_hop.address()) {
        subject.attributes.to_mut().next_hop = address.into();
    }
    Ok(subject.attributes)
}
