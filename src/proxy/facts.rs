//! What the Service room must know about this node: its addresses, zone, pod networks and the
//! service ranges that are certain. Gathered from the Node object and the host; pure data.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::settings::Settings;
use crate::cluster::State;

/// This node, as far as Services care.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Node name; endpoints with this `nodeName` are local.
    pub name: Arc<str>,
    /// `topology.kubernetes.io/zone`, for hints.
    pub zone: Option<Arc<str>>,
    /// Best IPv4 address: source of masqueraded traffic, default NodePort address.
    pub ipv4: Option<IpAddr>,
    /// Best IPv6 address.
    pub ipv6: Option<IpAddr>,
    /// Whether this kernel speaks IPv6 at all.
    pub kernel_ipv6: bool,
    /// Addresses NodePorts are served on.
    pub node_port_addresses: Vec<IpAddr>,
    /// All addresses of links that are not dummy, kube or docker ones: daemons of the host listen
    /// there, so the proxy firewall never rejects on them.
    pub local_addresses: BTreeSet<IpAddr>,
    /// Addresses of every Node of the cluster: never bound as a VIP, that would cut the node off.
    pub cluster_addresses: HashSet<IpAddr>,
    /// Those of them that belong to other machines, with the Node's name: no VIP at all here, or programs
    /// of this node that speak to that machine would be led elsewhere.
    pub other_machines: HashMap<IpAddr, Arc<str>>,
    /// Pod networks of this node: their members are local clients.
    pub pod_cidrs: Vec<IpNet>,
    /// Service ranges known to be true (given by flag, or ServiceCIDR objects), and those that are advertised
    /// whole: bound whole.
    pub bound_ranges: Vec<IpNet>,
    /// Service ranges for refusing external IPs inside them: the bound ones or the default guess.
    pub cluster_ranges: Vec<IpNet>,
}

impl Facts {
    /// Gathers the facts; `host` are the addresses of links that are not dummy, kube or docker ones. Without a Node object (a folder of manifests need not have one, and cloud
    /// providers add addresses late) the host's own first global addresses stand in.
    pub fn gather(settings: &Settings, state: &State, host: &[IpAddr], kernel_ipv6: bool) -> Self {
        let node = state.nodes.get(&settings.node_name);
        // Link-local addresses can be no VIP, and every pod's link brings one: they would make each
        // pod start a change of facts.
        let local_addresses: BTreeSet<IpAddr> =
            host.iter().copied().filter(|address| !is_link_local(*address)).collect();
        let best = |ipv6: bool| {
            node.and_then(|node| node.address(ipv6)).or_else(|| {
                // With a Node object only its own addresses count, so that a family the cluster
                // does not use stays unused.
                if node.is_some_and(|node| !node.internal_ips.is_empty() || !node.external_ips.is_empty()) {
                    return None;
                }
                host.iter().copied().find(|address| address.is_ipv6() == ipv6 && is_global(*address))
            })
        };
        let (ipv4, ipv6) = (best(false), best(true));
        let node_port_addresses = if settings.node_port_on_all_addresses {
            local_addresses.iter().copied().filter(|address| is_global(*address)).collect()
        } else {
            ipv4.into_iter().chain(ipv6).collect()
        };
        let mut known: Vec<IpNet> = state.service_cidrs.values().flatten().copied().collect();
        if settings.cluster_ip_ranges_given {
            known.extend(&settings.cluster_ip_ranges);
        }
        known.sort();
        known.dedup();
        let cluster_addresses: HashSet<IpAddr> = state
            .nodes
            .values()
            .flat_map(|node| node.internal_ips.iter().chain(&node.external_ips))
            .copied()
            .collect();
        let own = node.into_iter().flat_map(|node| node.internal_ips.iter().chain(&node.external_ips));
        let own: HashSet<IpAddr> = own.chain(host).copied().collect();
        // By name, so that two Nodes with one address are always told alike.
        let mut others: Vec<_> =
            state.nodes.values().filter(|other| other.name != settings.node_name).collect();
        others.sort_by(|a, b| b.name.cmp(&a.name));
        let other_machines = others
            .into_iter()
            .flat_map(|other| {
                let addresses = other.internal_ips.iter().chain(&other.external_ips);
                addresses.map(|address| (*address, other.name.clone()))
            })
            .filter(|(address, _)| !own.contains(address))
            .collect();
        // A range that covers an address of a node or of this host cannot be a pure service range:
        // binding it whole would cut real machines off. Its VIPs are bound one by one instead.
        let bound_ranges = known
            .iter()
            .chain(settings.whole_ranges.iter().filter(|range| !known.contains(range)))
            .filter(|range| {
                range.prefix_len() > 0
                    && !local_addresses
                        .iter()
                        .chain(&cluster_addresses)
                        .any(|address| range.contains(address))
            })
            .copied()
            .collect();
        Self {
            name: settings.node_name.clone(),
            zone: node.and_then(|node| node.zone.clone()),
            ipv4,
            ipv6,
            kernel_ipv6,
            node_port_addresses,
            local_addresses,
            cluster_addresses,
            other_machines,
            pod_cidrs: node.map(|node| node.pod_cidrs.clone()).unwrap_or_default(),
            bound_ranges,
            cluster_ranges: if known.is_empty() { settings.cluster_ip_ranges.clone() } else { known },
        }
    }

    /// The addresses that other Nodes got or lost, where nothing else differs: then only Services with
    /// such a VIP are concerned.
    pub fn moved_elsewhere(&self, before: &Self) -> Option<HashSet<IpAddr>> {
        let alike = Self {
            cluster_addresses: before.cluster_addresses.clone(),
            other_machines: before.other_machines.clone(),
            ..self.clone()
        };
        if alike != *before {
            return None;
        }
        let mut moved: HashSet<IpAddr> =
            self.cluster_addresses.symmetric_difference(&before.cluster_addresses).copied().collect();
        for (one, other) in [(self, before), (before, self)] {
            let differs =
                |(address, name): &(&IpAddr, &Arc<str>)| other.other_machines.get(*address) != Some(*name);
            moved.extend(one.other_machines.iter().filter(differs).map(|(address, _)| *address));
        }
        Some(moved)
    }

    /// Best node address of a family.
    pub fn address(&self, ipv6: bool) -> Option<IpAddr> {
        if ipv6 { self.ipv6 } else { self.ipv4 }
    }

    /// The address that traffic of this node may carry as source: the best one, where this host
    /// really has it. The kernel refuses a foreign one in a route, and answers to it would not
    /// come back here.
    pub fn source(&self, ipv6: bool) -> Option<IpAddr> {
        self.address(ipv6).filter(|address| self.local_addresses.contains(address))
    }

    /// Whether an address lies in a service range that is bound as a whole.
    pub fn in_bound_range(&self, address: IpAddr) -> bool {
        self.bound_ranges.iter().any(|range| range.contains(&address))
    }

    /// Whether an address lies in a pod network of this node.
    pub fn is_local_pod(&self, address: IpAddr) -> bool {
        self.pod_cidrs.iter().any(|cidr| cidr.contains(&address))
    }

    /// Whether a VIP needs a route of its own: not an address of a machine, not in a bound range.
    pub fn needs_binding(&self, vip: IpAddr) -> bool {
        !self.in_bound_range(vip)
            && !self.local_addresses.contains(&vip)
            && !self.cluster_addresses.contains(&vip)
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn is_global(address: IpAddr) -> bool {
    !address.is_loopback() && !address.is_unspecified() && !is_link_local(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::node::Node;
    use crate::proxy::fixture;

    fn node(name: &str, internal: &[[u8; 4]], external: &[[u8; 4]]) -> Arc<Node> {
        let list = |list: &[[u8; 4]]| list.iter().map(|ip| IpAddr::from(*ip)).collect();
        Arc::new(Node {
            name: Arc::from(name),
            internal_ips: list(internal),
            external_ips: list(external),
            ..Node::default()
        })
    }

    fn gather(nodes: &[Arc<Node>]) -> Facts {
        let mut state = State::default();
        state.nodes.extend(nodes.iter().map(|node| (node.name.clone(), node.clone())));
        Facts::gather(&fixture::settings(), &state, &[[10, 10, 0, 11].into(), [10, 10, 0, 99].into()], true)
    }

    #[test]
    fn other_machines_are_those_whose_addresses_are_not_here() {
        let own = node("n1", &[[10, 10, 0, 11]], &[[198, 51, 100, 1]]);
        // The last address of n2 has moved here, whatever its Node still says.
        let other = node("n2", &[[10, 10, 0, 12], [10, 10, 0, 99]], &[[198, 51, 100, 2]]);
        let facts = gather(&[own.clone(), other.clone()]);
        let mut others: Vec<String> = facts.other_machines.keys().map(ToString::to_string).collect();
        others.sort();
        assert_eq!(others, ["10.10.0.12", "198.51.100.2"]);
        assert_eq!(facts.cluster_addresses.len(), 5);
        // A node more, and one less, concerns its own addresses only.
        let third = node("n3", &[[10, 10, 0, 13]], &[]);
        let more = gather(&[own.clone(), other, third.clone()]);
        assert_eq!(more.moved_elsewhere(&facts), Some(HashSet::from([[10, 10, 0, 13].into()])));
        assert_eq!(facts.moved_elsewhere(&more), Some(HashSet::from([[10, 10, 0, 13].into()])));
        // An address that goes from one to another.
        let taken = node("n2", &[[10, 10, 0, 13]], &[]);
        let moved = gather(&[own.clone(), taken]).moved_elsewhere(&gather(&[own, third])).unwrap();
        assert_eq!(moved, HashSet::from([[10, 10, 0, 13].into()]));
        // This node's own change concerns everything.
        let elsewhere = gather(&[node("n1", &[[10, 10, 0, 99]], &[])]);
        assert_eq!(elsewhere.moved_elsewhere(&facts), None);
    }
}
