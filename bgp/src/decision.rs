//! Route selection (RFC 4271 section 9.1, with RFC 4456 section 9): which of several paths to a prefix
//! is best, which others may share its traffic, and why the rest lost.
//!
//! [`select`] narrows the candidates step by step, in the order of [`Step`]. Whoever drops out at a step
//! lost by it. Dropping candidates, not comparing pairs, is what makes the outcome independent of the order
//! of arrival: MED counts only between paths from the same neighbour AS, so pairs can form a
//! circle.

use std::fmt;
use std::net::IpAddr;

use crate::message::{Asn, Attributes, RouterId};
use crate::policy::{DEFAULT_LOCAL_PREFERENCE, Refusal, Source};

/// What one path is preferred for, in the order of the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Routes of this speaker before learned ones.
    Local,
    /// Higher LOCAL_PREF.
    LocalPreference,
    /// Shorter AS_PATH.
    AsPathLength,
    /// Lower ORIGIN.
    Origin,
    /// Lower MULTI_EXIT_DISC.
    Med,
    /// External peers before internal ones.
    External,
    /// Shorter way to the next hop. Paths that are still equal here may share the traffic.
    IgpMetric,
    /// The external path that has been there longest, if asked for.
    Age,
    /// Lower BGP identifier of whoever brought the path into the AS.
    RouterId,
    /// Fewer reflections.
    ClusterListLength,
    /// Lower address of the peer.
    PeerAddress,
    /// Lower path identifier.
    PathId,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "originated here",
            Self::LocalPreference => "local preference",
            Self::AsPathLength => "AS path length",
            Self::Origin => "origin",
            Self::Med => "MED",
            Self::External => "eBGP before iBGP",
            Self::IgpMetric => "IGP metric to the next hop",
            Self::Age => "age",
            Self::RouterId => "router id",
            Self::ClusterListLength => "cluster list length",
            Self::PeerAddress => "peer address",
            Self::PathId => "path id",
        })
    }
}

/// What became of a path, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is the best.
    Best,
    /// It shares the traffic with the best, and is behind it only by this step.
    Multipath(Step),
    /// Another is better by this step.
    Lost(Step),
    /// It takes no part.
    Refused(Refusal),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Best => f.write_str("best"),
            Self::Multipath(step) => write!(f, "multipath, behind the best by {step}"),
            Self::Lost(step) => write!(f, "lost by {step}"),
            Self::Refused(refusal) => write!(f, "refused: {refusal}"),
        }
    }
}

/// How paths are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Compare MED between neighbour ASes as well.
    pub always_compare_med: bool,
    /// A missing MED counts as the worst and not as 0.
    pub missing_med_as_worst: bool,
    /// Prefer the older of external paths before looking at identifiers: fewer changes, but the
    /// outcome depends on history.
    pub prefer_oldest: bool,
    /// How many paths may share the traffic of a prefix; 1 is none but the best.
    pub maximum_paths: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            always_compare_med: false,
            missing_med_as_worst: false,
            prefer_oldest: false,
            maximum_paths: 1,
        }
    }
}

/// A path that may be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// After import.
    pub attributes: &'a Attributes,
    /// Where it came from.
    pub source: Source,
    /// Cost of the way to its next hop.
    pub igp_metric: u32,
    /// When it came, in any unit.
    pub since: u32,
    /// BGP identifier of the peer.
    pub router_id: RouterId,
    /// Address of the peer.
    pub peer_address: IpAddr,
    /// The peer's identifier of the path.
    pub path_id: u32,
}

impl Candidate<'_> {
    /// The neighbour that MED is about. None stands for our own AS.
    fn neighbour_as(&self) -> Option<Asn> {
        self.attributes.as_path.first()
    }

    fn med(&self, options: &Options) -> u32 {
        self.attributes.med.unwrap_or(if options.missing_med_as_worst { u32::MAX } else { 0 })
    }

    /// Who brought it into the AS (RFC 4456 section 9).
    fn originator(&self) -> RouterId {
        self.attributes.originator_id.unwrap_or(self.router_id)
    }
}

/// The index of the best candidate, and in `reasons` what became of each, in their order. Candidates
/// that are equal in every step are told apart by their order.
pub fn select(candidates: &[Candidate<'_>], options: &Options, reasons: &mut Vec<Reason>) -> Option<usize> {
    reasons.clear();
    match candidates {
        [] => return None,
        [_] => {
            reasons.push(Reason::Best);
            return Some(0);
        }
        _ => reasons.resize(candidates.len(), Reason::Best),
    }
    let mut field = Field { candidates, left: (0..candidates.len()).collect(), reasons, equal: false };
    field.keep_lowest(Step::Local, |path| path.source != Source::Local);
    field.keep_lowest(Step::LocalPreference, |path| {
        u32::MAX - path.attributes.local_preference.unwrap_or(DEFAULT_LOCAL_PREFERENCE)
    });
    field.keep_lowest(Step::AsPathLength, |path| path.attributes.as_path.hops());
    field.keep_lowest(Step::Origin, |path| path.attributes.origin);
    field.compare_med(options);
    field.keep_lowest(Step::External, |path| path.source != Source::External);
    field.keep_lowest(Step::IgpMetric, |path| path.igp_metric);
    field.equal = true;
    // Past the step before last either all are external or none is.
    if options.prefer_oldest && candidates[field.left[0]].source == Source::External {
        field.keep_lowest(Step::Age, |path| path.since);
    }
    field.keep_lowest(Step::RouterId, |path| path.originator());
    field.keep_lowest(Step::ClusterListLength, |path| path.attributes.cluster_list.len());
    field.keep_lowest(Step::PeerAddress, |path| path.peer_address);
    field.keep_lowest(Step::PathId, |path| path.path_id);
    let best = field.left[0];
    for &other in &field.left[1..] {
        field.reasons[other] = Reason::Multipath(Step::PathId);
    }
    limit_multipath(candidates, options, reasons);
    Some(best)
}

/// The best `count` candidates, best first: each is the best of those that the ones before leave.
pub fn rank(candidates: &[Candidate<'_>], options: &Options, count: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..candidates.len()).collect();
    let (mut ranked, mut reasons) = (Vec::new(), Vec::new());
    while ranked.len() < count {
        let rest: Vec<Candidate<'_>> = left.iter().map(|&index| candidates[index]).collect();
        match select(&rest, options, &mut reasons) {
            Some(best) => ranked.push(left.remove(best)),
            None => break,
        }
    }
    ranked
}

/// Of paths that could share the traffic only the limit's number does: the next best. They are equal up to
/// [`Step::IgpMetric`], so the names alone put them in an order.
fn limit_multipath(candidates: &[Candidate<'_>], options: &Options, reasons: &mut [Reason]) {
    let mut sharing: Vec<usize> =
        (0..reasons.len()).filter(|&index| !matches!(reasons[index], Reason::Lost(_))).collect();
    sharing.sort_by_key(|&index| {
        let path = &candidates[index];
        let age = if options.prefer_oldest && path.source == Source::External { path.since } else { 0 };
        (age, path.originator(), path.attributes.cluster_list.len(), path.peer_address, path.path_id)
    });
    for index in sharing.into_iter().skip(usize::from(options.maximum_paths.max(1))) {
        if let Reason::Multipath(step) = reasons[index] {
            reasons[index] = Reason::Lost(step);
        }
    }
}

struct Field<'a> {
    candidates: &'a [Candidate<'a>],
    left: Vec<usize>,
    reasons: &'a mut Vec<Reason>,
    /// Whoever drops out from here on is as good as the best, but for its name.
    equal: bool,
}

impl Field<'_> {
    fn keep_lowest<K: Ord>(&mut self, step: Step, key: impl Fn(&Candidate<'_>) -> K) {
        if self.left.len() < 2 {
            return;
        }
        let Some(lowest) = self.left.iter().map(|&index| key(&self.candidates[index])).min() else { return };
        self.drop_out(step, |candidate| key(candidate) > lowest);
    }

    /// RFC 4271 section 9.1.2.2 c: of paths from one neighbour AS those with a higher MED go.
    fn compare_med(&mut self, options: &Options) {
        if self.left.len() < 2 {
            return;
        }
        let mut lowest: Vec<(Option<Asn>, u32)> = Vec::new();
        let group = |candidate: &Candidate<'_>| {
            if options.always_compare_med { None } else { candidate.neighbour_as() }
        };
        for &index in &self.left {
            let candidate = &self.candidates[index];
            let (neighbour, med) = (group(candidate), candidate.med(options));
            match lowest.iter_mut().find(|(known, _)| *known == neighbour) {
                Some((_, known)) => *known = med.min(*known),
                None => lowest.push((neighbour, med)),
            }
        }
        self.drop_out(Step::Med, |candidate| {
            let neighbour = group(candidate);
            lowest.iter().any(|&(known, med)| known == neighbour && candidate.med(options) > med)
        });
    }

    fn drop_out(&mut self, step: Step, loses: impl Fn(&Candidate<'_>) -> bool) {
        let (candidates, reasons, equal) = (self.candidates, &mut *self.reasons, self.equal);
        self.left.retain(|&index| {
            let lost = loses(&candidates[index]);
            if lost {
                reasons[index] = if equal { Reason::Multipath(step) } else { Reason::Lost(step) };
            }
            !lost
        });
    }
}

#[cfg(test)]
mod tests;
