//! Rules of policies as rules of chains, and the sets that these look at. Pure.

use std::collections::BTreeMap;

use ferroute_iptables::{Family, Rule as ChainRule};
use ipnet::IpNet;

use crate::chain::{self, Peers, Ports};
use crate::definition::{Definition, Whose};
use crate::name;
use crate::{Direction, Key, Peer, PortMatch, Rule};

/// One rule of a policy as rules of its chain, and the definitions that they look at.
pub(crate) fn compile(
    key: &Key,
    selector: &crate::Selector,
    direction: Direction,
    rule: &Rule,
    family: Family,
    chain: &mut Vec<ChainRule>,
    used: &mut BTreeMap<String, Definition>,
) {
    let source = direction == Direction::Ingress;
    let mut use_set = |definition: Definition| {
        let name = definition.name(source && !matches!(definition, Definition::Ports { .. }));
        let set = name::set(&name, family);
        used.insert(name, definition);
        set
    };
    // Who, each with the words of its comment.
    let mut peers: Vec<(Peers, &str)> = Vec::new();
    match &rule.peers {
        None => peers.push((Peers::Anybody, "any")),
        Some(list) => {
            let mut pods: Vec<(Option<crate::Selector>, crate::Selector)> = Vec::new();
            let mut blocks: Vec<(IpNet, Vec<IpNet>)> = Vec::new();
            for peer in list {
                match peer {
                    Peer::Pods { namespaces, pods: selector } => {
                        pods.push((namespaces.clone(), selector.clone()));
                    }
                    Peer::Block { cidr, except } => {
                        let mut except = except.clone();
                        except.sort_unstable();
                        except.dedup();
                        blocks.push((*cidr, except));
                    }
                }
            }
            pods.sort();
            pods.dedup();
            blocks.sort();
            blocks.dedup();
            if !pods.is_empty() {
                let set = use_set(Definition::Pods { namespace: key.namespace.clone(), peers: pods });
                peers.push((Peers::Set(set), "pods"));
            }
            if !blocks.is_empty() {
                let here = blocks.iter().any(|(cidr, _)| Family::of(cidr.addr()) == family);
                let set = use_set(Definition::Blocks { blocks });
                if here {
                    peers.push((Peers::Set(set), "cidr"));
                }
            }
        }
    }
    let Some(ports) = &rule.ports else {
        for (peers, kind) in &peers {
            let comment = chain::rule_comment(key, direction, kind);
            chain.extend(chain::allow(direction, peers, &Ports::Any, &comment));
        }
        return;
    };
    for (peers, kind) in &peers {
        let comment = chain::rule_comment(key, direction, kind);
        chain.extend(chain::allow(direction, peers, &Ports::Numbers(ports), &comment));
    }
    let mut names: Vec<_> = ports
        .iter()
        .filter_map(|port| match &port.ports {
            PortMatch::Named(name) => Some((port.protocol, name.clone())),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        return;
    }
    names.sort();
    names.dedup();
    match direction {
        Direction::Ingress => {
            let whose = Whose::Targets { namespace: key.namespace.clone(), selector: selector.clone() };
            let set = use_set(Definition::Ports { whose, names });
            for (peers, kind) in &peers {
                let comment = chain::rule_comment(key, direction, &format!("{kind} np"));
                chain.push(chain::allow_named(direction, peers, set, &comment));
            }
        }
        Direction::Egress => {
            let mut listed = rule.peers.clone();
            if let Some(listed) = &mut listed {
                listed.sort();
                listed.dedup();
            }
            let whose = Whose::Destinations { namespace: key.namespace.clone(), peers: listed };
            let set = use_set(Definition::Ports { whose, names });
            let comment = chain::rule_comment(key, direction, "pods np");
            chain.push(chain::allow_named(direction, &Peers::Anybody, set, &comment));
        }
    }
}
