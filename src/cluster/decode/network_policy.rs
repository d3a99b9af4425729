//! networking.k8s.io/v1 NetworkPolicy to [`NetworkPolicy`].
//!
//! Policy protects, so a part that cannot be read narrows what is allowed and never widens it: a
//! bad selector makes the whole object unparsable, a bad peer or port allows nothing.

use ipnet::IpNet;

use super::{Decoded, key, port, protocol, shortened, whole};
use crate::cluster::network_policy::{
    NetworkPolicy, Peer, PolicyPort, PortMatch, Requirement, Rule, Selector,
};
use crate::cluster::service::Problem;
use crate::cluster::wire::{
    Item, LabelSelector, NetworkPolicyObject, NumberOrName, PeerSpec, PolicyPortSpec, RuleSpec,
};

/// Validates a NetworkPolicy.
pub fn network_policy(item: Item<NetworkPolicyObject>) -> Decoded<NetworkPolicy> {
    let key = match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => key,
        Err(problem) => return Decoded::Broken(problem),
    };
    let NetworkPolicyObject { metadata, spec } = item.object;
    let mut problems = Vec::new();
    let pod_selector = match selector(&spec.pod_selector) {
        Ok(selector) => selector,
        Err(why) => return Decoded::Broken(broken_selector("spec.podSelector", &why)),
    };
    let (wants_ingress, wants_egress) = if spec.policy_types.is_empty() {
        (true, !spec.egress.is_empty())
    } else {
        let names = |wanted: &str| spec.policy_types.iter().any(|written| written == wanted);
        (names("Ingress"), names("Egress"))
    };
    let mut rules = |wanted: bool, field: &str, written: &[RuleSpec]| {
        if !wanted {
            return Ok(None);
        }
        let egress = field == "egress";
        written
            .iter()
            .enumerate()
            .map(|(index, entry)| rule(&format!("spec.{field}[{index}]"), entry, egress, &mut problems))
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    };
    let ingress = match rules(wants_ingress, "ingress", &spec.ingress) {
        Ok(rules) => rules,
        Err(problem) => return Decoded::Broken(problem),
    };
    let egress = match rules(wants_egress, "egress", &spec.egress) {
        Ok(rules) => rules,
        Err(problem) => return Decoded::Broken(problem),
    };
    Decoded::Ours(NetworkPolicy {
        key,
        uid: metadata.uid.as_str().into(),
        pod_selector,
        ingress,
        egress,
        problems,
    })
}

fn broken_selector(field: &str, why: &str) -> Problem {
    Problem {
        reason: "InvalidSelector",
        message: format!("{field}: {why}; the last good state of this NetworkPolicy stays in force"),
    }
}

fn rule(field: &str, written: &RuleSpec, egress: bool, problems: &mut Vec<Problem>) -> Result<Rule, Problem> {
    let (name, peers) = if egress { ("to", &written.to) } else { ("from", &written.from) };
    let mut list = Vec::with_capacity(peers.len());
    for (index, entry) in peers.iter().enumerate() {
        let field = format!("{field}.{name}[{index}]");
        list.extend(peer(&field, entry, problems)?);
    }
    let peers = (!peers.is_empty()).then_some(list);
    let mut list = Vec::with_capacity(written.ports.len());
    for (index, entry) in written.ports.iter().enumerate() {
        match policy_port(entry) {
            Ok(port) => list.push(port),
            Err(why) => problems.push(Problem {
                reason: "InvalidPort",
                message: format!("{field}.ports[{index}]: {why}; it allows nothing, correct it"),
            }),
        }
    }
    Ok(Rule { peers, ports: (!written.ports.is_empty()).then_some(list) })
}

fn peer(field: &str, written: &PeerSpec, problems: &mut Vec<Problem>) -> Result<Option<Peer>, Problem> {
    let mut refuse = |message: String| {
        problems.push(Problem {
            reason: "InvalidPeer",
            message: format!("{field}{message}; the peer allows nothing, correct it"),
        });
        Ok(None)
    };
    if let Some(block) = &written.ip_block {
        if written.pod_selector.is_some() || written.namespace_selector.is_some() {
            return refuse(" has both ipBlock and a selector".to_owned());
        }
        let Ok(cidr) = block.cidr.parse::<IpNet>() else {
            return refuse(format!(".ipBlock.cidr {:?} is not a CIDR", shortened(&block.cidr)));
        };
        let mut except = Vec::with_capacity(block.except.len());
        for text in &block.except {
            match text.parse::<IpNet>() {
                Ok(inner) if cidr.contains(&inner) => except.push(inner.trunc()),
                // Leaving one exception out would allow what its author wanted refused.
                _ => {
                    return refuse(format!(".ipBlock.except {:?} is not inside {cidr}", shortened(text)));
                }
            }
        }
        return Ok(Some(Peer::Block { cidr: cidr.trunc(), except }));
    }
    let part = |name: &str, written: &LabelSelector| {
        selector(written).map_err(|why| broken_selector(&format!("{field}.{name}"), &why))
    };
    match (&written.namespace_selector, &written.pod_selector) {
        (None, None) => refuse(" is empty".to_owned()),
        (namespaces, pods) => Ok(Some(Peer::Pods {
            namespaces: namespaces.as_deref().map(|s| part("namespaceSelector", s)).transpose()?,
            pods: pods.as_deref().map(|s| part("podSelector", s)).transpose()?.unwrap_or_default(),
        })),
    }
}

fn policy_port(written: &PolicyPortSpec) -> Result<PolicyPort, String> {
    let protocol = protocol(&written.protocol)
        .ok_or_else(|| format!("protocol {:?} is not TCP, UDP or SCTP", shortened(&written.protocol)))?;
    let ports = match (&written.port, written.end_port) {
        (NumberOrName::Absent, None) => PortMatch::Any,
        (NumberOrName::Name(name), None) if !name.is_empty() => PortMatch::Named(name.as_str().into()),
        (NumberOrName::Number(first), end) => {
            let last = end.unwrap_or(*first);
            match (port(*first), port(last)) {
                (Some(first), Some(last)) if first <= last => PortMatch::Range(first.get(), last.get()),
                _ => return Err(format!("{first} to {last} is not a range of ports (1 to 65535)")),
            }
        }
        _ => return Err("endPort needs a port that is a number".to_owned()),
    };
    Ok(PolicyPort { protocol, ports })
}

fn selector(written: &LabelSelector) -> Result<Selector, String> {
    let mut requirements: Vec<Requirement> = written
        .match_labels
        .iter()
        .map(|(key, value)| Requirement::In(key.clone(), [value.clone()].into()))
        .collect();
    for entry in &written.match_expressions {
        let key: Box<str> = entry.key.as_str().into();
        let values = || entry.values.iter().map(|value| value.as_str().into()).collect();
        requirements.push(match (entry.operator.as_str(), entry.values.is_empty()) {
            ("In", false) => Requirement::In(key, values()),
            ("NotIn", false) => Requirement::NotIn(key, values()),
            ("Exists", true) => Requirement::Exists(key),
            ("DoesNotExist", true) => Requirement::DoesNotExist(key),
            ("In" | "NotIn", true) => {
                return Err(format!("{} on {:?} needs values", entry.operator, shortened(&entry.key)));
            }
            ("Exists" | "DoesNotExist", false) => {
                return Err(format!("{} on {:?} takes no values", entry.operator, shortened(&entry.key)));
            }
            (other, _) => return Err(format!("operator {:?} is not known", shortened(other))),
        });
    }
    Ok(Selector { requirements })
}
