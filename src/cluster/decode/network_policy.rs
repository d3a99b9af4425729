//! networking.k8s.io/v1 NetworkPolicy to [`NetworkPolicy`].
//!
//! Policy protects, so a part that cannot be read narrows what is allowed and never widens it: a
//! bad peer, port or rule allows nothing, and the rest of the policy stays in force. Only when it
//! cannot be told which pods a policy is about is the object as a whole unparsable.

use ferroute_policy::{Direction, Peer, Policy, PolicyPort, PortMatch, Requirement, Rule, Selector};
use ipnet::IpNet;

use super::{Decoded, key, policy_protocol, port, shortened, whole};
use crate::cluster::network_policy::NetworkPolicy;
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
        Err(why) => {
            return Decoded::Broken(Problem {
                reason: "InvalidSelector",
                message: format!(
                    "spec.podSelector: {why}; it cannot be told which pods this NetworkPolicy isolates, so its \
                     last good state stays in force, or nothing if it never had one; correct it"
                ),
            });
        }
    };
    for name in spec.policy_types.iter().filter(|name| !matches!(name.as_str(), "Ingress" | "Egress")) {
        problems.push(Problem {
            reason: "UnknownPolicyType",
            message: format!(
                "spec.policyTypes: {:?} is neither Ingress nor Egress and is ignored, correct it",
                shortened(name)
            ),
        });
    }
    let names = |wanted: &str| spec.policy_types.iter().any(|written| written == wanted);
    // The API's defaults: ingress always, egress when there are rules for it.
    let (wants_ingress, wants_egress) = match (names("Ingress"), names("Egress")) {
        (false, false) => (true, !spec.egress.is_empty()),
        named => named,
    };
    let mut rules = |direction, written: &[RuleSpec]| -> Vec<Rule> {
        written
            .iter()
            .enumerate()
            .map(|(index, entry)| rule(direction, index, entry, &mut problems))
            .collect()
    };
    let ingress = wants_ingress.then(|| rules(Direction::Ingress, &spec.ingress));
    let egress = wants_egress.then(|| rules(Direction::Egress, &spec.egress));
    Decoded::Ours(NetworkPolicy {
        key,
        uid: metadata.uid.as_str().into(),
        policy: Policy { pod_selector, ingress, egress }.into(),
        problems,
    })
}

fn rule(direction: Direction, index: usize, written: &RuleSpec, problems: &mut Vec<Problem>) -> Rule {
    let field = format!("spec.{direction}[{index}]");
    let (name, peers, (wrong_name, wrong)) = match direction {
        Direction::Ingress => ("from", &written.from, ("to", &written.to)),
        Direction::Egress => ("to", &written.to, ("from", &written.from)),
    };
    if !wrong.is_empty() {
        // Passing it over would leave a rule that names nobody, which allows everybody.
        problems.push(Problem {
            reason: "InvalidRule",
            message: format!(
                "{field} has {wrong_name:?}, which does not exist in {direction} rules; the rule allows nothing, \
                 write {name:?}"
            ),
        });
        return Rule { peers: Some(Vec::new()), ports: None };
    }
    let mut list = Vec::with_capacity(peers.len());
    for (index, entry) in peers.iter().enumerate() {
        match peer(entry) {
            Ok(peer) => list.push(peer),
            Err(why) => problems.push(Problem {
                reason: "InvalidPeer",
                message: format!("{field}.{name}[{index}]{why}; the peer allows nothing, correct it"),
            }),
        }
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
    Rule { peers, ports: (!written.ports.is_empty()).then_some(list) }
}

fn peer(written: &PeerSpec) -> Result<Peer, String> {
    if let Some(block) = &written.ip_block {
        if written.pod_selector.is_some() || written.namespace_selector.is_some() {
            return Err(" has both ipBlock and a selector".to_owned());
        }
        let Ok(cidr) = block.cidr.parse::<IpNet>() else {
            return Err(format!(".ipBlock.cidr {:?} is not a CIDR", shortened(&block.cidr)));
        };
        let cidr = cidr.trunc();
        let mut except = Vec::with_capacity(block.except.len());
        for text in &block.except {
            // Leaving one exception out would allow what its author wanted refused.
            match text.parse::<IpNet>().map(|inner| inner.trunc()) {
                Err(_) => return Err(format!(".ipBlock.except {:?} is not a CIDR", shortened(text))),
                Ok(inner) if inner == cidr => {
                    return Err(format!(".ipBlock.except {inner} is the whole block, which leaves nothing"));
                }
                Ok(inner) if cidr.contains(&inner) => except.push(inner),
                Ok(inner) => return Err(format!(".ipBlock.except {inner} is not inside {cidr}")),
            }
        }
        return Ok(Peer::Block { cidr, except });
    }
    let part = |name: &str, written: &Option<Box<LabelSelector>>| {
        let selector = written.as_deref().map(selector).transpose();
        selector.map_err(|why| format!(".{name}: {why}"))
    };
    match (
        part("namespaceSelector", &written.namespace_selector)?,
        part("podSelector", &written.pod_selector)?,
    ) {
        (None, None) => Err(" is empty".to_owned()),
        (namespaces, pods) => Ok(Peer::Pods { namespaces, pods: pods.unwrap_or_default() }),
    }
}

fn policy_port(written: &PolicyPortSpec) -> Result<PolicyPort, String> {
    let protocol = policy_protocol(&written.protocol)
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
