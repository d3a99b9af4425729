//! What peers are given and what they may send, as policies of the `bgp` crate. Pure.
//!
//! Own routes carry a tag that says what they are ([`Tag`]), so policies stay the
//! same while Services come and go, and nothing but own routes and, on a reflector, those of other nodes ever
//! leaves: no transit. A prefix that this node advertises itself needs no import rule: its own path
//! wins whatever a peer sends.

use std::net::IpAddr;
use std::sync::Arc;

use ferroute_bgp::message::{Asn, Community, LargeCommunity};
use ferroute_bgp::policy::{
    Action, Condition, Disposition, Edit, NeighbourSet, NextHopChoice, Policy, PrefixRange, PrefixSet,
    Source, Statement,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::advertise::Tag;
use super::identity::annotation;
use super::settings::Settings;
use crate::cluster::node::Node;
use crate::cluster::service::Problem;

/// Annotation with the AS to put in front of paths, and how often.
pub const PREPEND_AS: &str = "kube-router.io/path-prepend.as";
/// How often.
pub const PREPEND_TIMES: &str = "kube-router.io/path-prepend.repeat-n";
/// Annotation with communities for routes to external peers.
pub const COMMUNITIES: &str = "kube-router.io/node.bgp.communities";
/// Annotation with networks that are taken from nobody.
pub const IMPORT_REJECT: &str = "kube-router.io/node.bgp.customimportreject";

/// What a Node's annotations want of its policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Communities of routes to external peers.
    pub communities: Vec<Community>,
    /// The same of twelve octets.
    pub large_communities: Vec<LargeCommunity>,
    /// AS to put in front of paths to external peers, and how often.
    pub prepend: Option<(Asn, u8)>,
    /// Networks that are taken from nobody.
    pub refused: Vec<IpNet>,
    /// Its pod networks: more precise routes than these lead nowhere else.
    pub own: Vec<IpNet>,
    /// Traffic is to leave this node (RFC 8326).
    pub draining: bool,
}

/// Reads the wishes. An item that cannot be read is left out and told; of `last`, what was wished
/// before, comes what is all or nothing.
pub fn wishes(node: &Node, last: &Wishes) -> (Wishes, Vec<Problem>) {
    let mut problems = Vec::new();
    let mut wishes = Wishes { own: node.pod_cidrs.clone(), draining: node.draining, ..Wishes::default() };
    let items = |name: &str| {
        let text = node.annotations.get(name).map_or("", |text| text);
        text.split(',').map(str::trim).filter(|item| !item.is_empty())
    };
    for item in items(COMMUNITIES) {
        if item.matches(':').count() == 2
            && let Ok(community) = item.parse()
        {
            wishes.large_communities.push(community);
        } else {
            match item.parse() {
                Ok(community) => wishes.communities.push(community),
                Err(error) => {
                    problems.push(annotation(node, COMMUNITIES, item, &format!("{error}; it is left out")))
                }
            }
        }
    }
    for item in items(IMPORT_REJECT) {
        match item.parse::<IpNet>() {
            Ok(network) => wishes.refused.push(network.trunc()),
            Err(_) => {
                problems.push(annotation(
                    node,
                    IMPORT_REJECT,
                    item,
                    "this is no CIDR; what was refused before stays refused",
                ));
                wishes.refused.extend(&last.refused);
            }
        }
    }
    wishes.refused.sort_unstable();
    wishes.refused.dedup();
    let (asn, times) = (node.annotations.get(PREPEND_AS), node.annotations.get(PREPEND_TIMES));
    match (asn, times) {
        (None, None) => {}
        (Some(asn), None) => {
            problems.push(annotation(node, PREPEND_AS, asn, &format!("{PREPEND_TIMES} must say how often")));
            wishes.prepend = last.prepend;
        }
        (None, Some(times)) => {
            let why = format!("it has no effect without {PREPEND_AS}");
            problems.push(annotation(node, PREPEND_TIMES, times, &why));
        }
        (Some(asn), Some(times)) => {
            let number = super::identity::asn(asn).map_err(|why| annotation(node, PREPEND_AS, asn, &why));
            let count = times
                .trim()
                .parse()
                .map_err(|_| annotation(node, PREPEND_TIMES, times, "this is no number up to 255"));
            match (number, count) {
                (Ok(asn), Ok(count)) => wishes.prepend = Some((asn, count)),
                (number, count) => {
                    problems.extend([number.err(), count.err()].into_iter().flatten());
                    wishes.prepend = last.prepend;
                }
            }
        }
    }
    (wishes, problems)
}

/// The four policies of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policies {
    /// For routes from other nodes.
    pub internal_import: Arc<Policy>,
    /// For routes to other nodes.
    pub internal_export: Arc<Policy>,
    /// For routes from external peers.
    pub external_import: Arc<Policy>,
    /// For routes to external peers.
    pub external_export: Arc<Policy>,
}

/// Builds them. A reflector passes on to nodes what came from nodes: whatever an internal session
/// brought, unless it came from one of `external`.
pub fn policies(
    settings: &Settings,
    wishes: &Wishes,
    reflects: bool,
    external: impl IntoIterator<Item = IpAddr>,
) -> Policies {
    let import = Arc::new(import(wishes));
    Policies {
        internal_import: import.clone(),
        internal_export: Arc::new(internal_export(wishes, reflects, external)),
        external_import: import,
        external_export: Arc::new(external_export(settings, wishes)),
    }
}

fn import(wishes: &Wishes) -> Policy {
    let reject = |name: &str, ranges: Vec<PrefixRange>| Statement {
        name: name.into(),
        conditions: vec![Condition::Prefix(Arc::new(ranges.into_iter().collect::<PrefixSet>()))],
        actions: Vec::new(),
        disposition: Some(Disposition::Reject),
    };
    let defaults = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())].map(PrefixRange::exact);
    let mut statements = vec![Statement::graceful_shutdown(), reject("default-route", defaults.to_vec())];
    for (name, networks) in [("own-pod-cidrs", &wishes.own), ("customimportreject", &wishes.refused)] {
        if !networks.is_empty() {
            statements.push(reject(name, networks.iter().copied().map(PrefixRange::orlonger).collect()));
        }
    }
    Policy { statements, otherwise: Disposition::Accept }
}

/// Neighbours that honour it send their traffic elsewhere; those that do not lose nothing.
fn shutdown(wishes: &Wishes) -> Option<Statement> {
    wishes.draining.then(|| Statement {
        name: "draining".into(),
        conditions: Vec::new(),
        actions: vec![Action::Communities(Edit::Add(vec![Community::GRACEFUL_SHUTDOWN]))],
        disposition: None,
    })
}

fn accept(name: &str, conditions: Vec<Condition>, actions: Vec<Action>) -> Statement {
    Statement { name: name.into(), conditions, actions, disposition: Some(Disposition::Accept) }
}

fn internal_export(wishes: &Wishes, reflects: bool, external: impl IntoIterator<Item = IpAddr>) -> Policy {
    let mut statements: Vec<Statement> = shutdown(wishes).into_iter().collect();
    statements.push(accept("pod-cidrs", vec![Condition::Tag(vec![Tag::PodCidr.number()])], Vec::new()));
    if reflects {
        let mut conditions = vec![Condition::Source(vec![Source::Internal])];
        let addresses: PrefixSet = external.into_iter().map(IpNet::from).collect();
        if !addresses.is_empty() {
            let outside = NeighbourSet { addresses, asns: Vec::new() };
            conditions.push(Condition::Not(Box::new(Condition::LearnedFrom(Arc::new(outside)))));
        }
        statements.push(accept("reflected", conditions, Vec::new()));
    }
    Policy { statements, otherwise: Disposition::Reject }
}

fn external_export(settings: &Settings, wishes: &Wishes) -> Policy {
    let mut actions = Vec::new();
    if !wishes.communities.is_empty() {
        actions.push(Action::Communities(Edit::Add(wishes.communities.clone())));
    }
    if !wishes.large_communities.is_empty() {
        actions.push(Action::LargeCommunities(Edit::Add(wishes.large_communities.clone())));
    }
    if let Some((asn, times)) = wishes.prepend {
        actions.push(Action::Prepend { asn: Some(asn), times });
    }
    if settings.external.override_next_hop {
        actions.push(Action::NextHop(NextHopChoice::SelfAddress));
    }
    let mut statements: Vec<Statement> = shutdown(wishes).into_iter().collect();
    let vips = Tag::VIPS.map(Tag::number).to_vec();
    statements.push(accept("vips", vec![Condition::Tag(vips)], actions.clone()));
    if settings.advertise.pod_cidrs {
        statements.push(accept("pod-cidrs", vec![Condition::Tag(vec![Tag::PodCidr.number()])], actions));
    }
    Policy { statements, otherwise: Disposition::Reject }
}

#[cfg(test)]
mod tests;
