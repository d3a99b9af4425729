//! What the room knows of the cluster and of this machine, as its decisions need it. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::egress;
use super::fib::Surroundings;
use super::node_address::{NodeAddresses, Purpose, is_ignored};
use super::overlay::Wanted;
use super::settings::{Reach, Settings};
use crate::cluster::node::Node;
use crate::cluster::{Kind, State};
use crate::host::Family;
use crate::host::address::LinkAddress;
use crate::host::link::Link;
use crate::host::tunnel::{Tunnel, TunnelLink};

/// RT_SCOPE_UNIVERSE.
const SCOPE_GLOBAL: u8 = 0;
/// What a link carries where nothing is known of it.
const ETHERNET: u32 = 1500;

/// What Nodes and Services say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterFacts {
    /// This node, once it is known.
    pub own: Option<Arc<Node>>,
    /// Pod networks of all nodes.
    pub pods: BTreeSet<IpNet>,
    /// Addresses of all nodes.
    pub nodes: BTreeSet<IpAddr>,
    /// Addresses of the others.
    pub others: HashSet<IpAddr>,
    /// A Node cannot be read, so nothing may be taken for gone.
    pub blind: bool,
}

impl ClusterFacts {
    /// From what is known of the cluster.
    pub fn gather(state: &State, node: &str) -> Self {
        let mut facts = Self {
            own: state.nodes.get(node).cloned(),
            blind: state.unreadable.keys().any(|what| matches!(what.kind, None | Some(Kind::Node))),
            ..Self::default()
        };
        for (name, known) in &state.nodes {
            facts.pods.extend(known.pod_cidrs.iter().map(IpNet::trunc));
            let addresses = known.internal_ips.iter().chain(&known.external_ips);
            facts.nodes.extend(addresses.clone());
            if **name != *node {
                facts.others.extend(addresses);
            }
        }
        facts
    }

    /// These facts, given those known before: a Node object that went keeps its place, as long as this
    /// process runs.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        if self.own.is_none()
            && let Some(own) = &before.own
        {
            self.pods.extend(own.pod_cidrs.iter().map(IpNet::trunc));
            self.nodes.extend(own.internal_ips.iter().chain(&own.external_ips));
            self.own = before.own.clone();
        }
        self
    }

    /// This node's pod networks.
    pub fn own_pods(&self) -> Vec<IpNet> {
        self.own.iter().flat_map(|node| node.pod_cidrs.iter().map(IpNet::trunc)).collect()
    }
}

/// This machine as it was last read.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// All links.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<LinkAddress>,
    /// All tunnels.
    pub tunnels: Vec<TunnelLink>,
}

impl Machine {
    /// The link of a name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Links that carry addresses of the Node object, by name.
    pub fn node_links(&self, cluster: &ClusterFacts) -> Vec<String> {
        let Some(own) = &cluster.own else { return Vec::new() };
        let is_own = |found: &&LinkAddress| {
            let address = found.address.addr();
            own.internal_ips.contains(&address) || own.external_ips.contains(&address)
        };
        let links: BTreeSet<u32> = self.addresses.iter().filter(is_own).map(|found| found.link).collect();
        self.links.iter().filter(|link| links.contains(&link.index)).map(|link| link.name.clone()).collect()
    }

    /// What chains are decided by.
    pub fn egress(&self, settings: &Settings, cluster: &ClusterFacts) -> egress::Facts {
        egress::Facts {
            egress: settings.egress,
            exclude: settings.egress_exclude.clone(),
            node_links: self.node_links(cluster),
            overlay: settings.overlay != Reach::Off,
        }
    }

    /// What routes are decided by, but for the tunnels.
    pub fn surroundings(
        &self,
        settings: &Settings,
        cluster: &ClusterFacts,
        addresses: &NodeAddresses,
    ) -> Surroundings {
        let own: HashSet<IpAddr> = self.addresses.iter().map(|found| found.address.addr()).collect();
        let chosen: HashSet<u32> = Purpose::ALL
            .into_iter()
            .flat_map(|purpose| Family::BOTH.map(|family| addresses.get(purpose, family)))
            .filter_map(|chosen| chosen?.link)
            .collect();
        let (mut connected, mut local) = (Vec::new(), Vec::new());
        for found in &self.addresses {
            let Some(link) = self.links.iter().find(|link| link.index == found.link) else { continue };
            let network = found.address.trunc();
            if found.scope != SCOPE_GLOBAL || network.prefix_len() == network.max_prefix_len() {
                continue;
            }
            let is_tunnel = matches!(link.kind.as_deref(), Some("ipip" | "ip6tnl"));
            if (chosen.contains(&link.index) || !is_ignored(&link.name)) && !is_tunnel {
                if link.is_up() {
                    connected.push((network, link.index));
                }
            } else {
                local.push(network);
            }
        }
        connected.sort_unstable();
        connected.dedup();
        local.sort_unstable();
        local.dedup();
        let source = |family| {
            let chosen = addresses.get(Purpose::NextHop, family)?.address;
            own.contains(&chosen).then_some((family, chosen))
        };
        Surroundings {
            connected,
            local,
            nodes: cluster.others.difference(&own).copied().collect(),
            tunnels: BTreeMap::new(),
            overlay: settings.overlay,
            sources: Family::BOTH.into_iter().filter_map(source).collect(),
            pods: cluster.own_pods(),
            own,
        }
    }

    /// The largest packet of the link that carries this node's address for a purpose.
    fn mtu(&self, purpose: Purpose, family: Family, addresses: &NodeAddresses) -> Option<u32> {
        let index = addresses.get(purpose, family)?.link?;
        self.links.iter().find(|link| link.index == index).map(|link| link.mtu)
    }

    /// Largest packet of pods: that of the links between nodes, less what tunnels add where there may
    /// be tunnels. `None` while no address of this node is on a link.
    pub fn pod_mtu(&self, settings: &Settings, addresses: &NodeAddresses) -> Option<u32> {
        let of = |family| {
            let plain = self.mtu(Purpose::NextHop, family, addresses);
            let outside =
                self.mtu(Purpose::Overlay, family, addresses).filter(|_| settings.overlay != Reach::Off);
            let inside = outside.map(|mtu| mtu.saturating_sub(settings.encapsulation.overhead(family)));
            plain.into_iter().chain(inside).min()
        };
        Family::BOTH.into_iter().filter_map(of).min()
    }

    /// The tunnels to these ends. Ends of a family in which this node has no tunnel end are left out,
    /// and returned apart.
    pub fn tunnels_to(
        &self,
        names: BTreeMap<IpAddr, String>,
        settings: &Settings,
        addresses: &NodeAddresses,
    ) -> (Vec<Wanted>, Vec<IpAddr>) {
        let (mut wanted, mut without) = (Vec::new(), Vec::new());
        for (remote, name) in names {
            let family = Family::of(remote);
            let Some(local) = addresses.get(Purpose::Overlay, family) else {
                without.push(remote);
                continue;
            };
            let outside = self.mtu(Purpose::Overlay, family, addresses).unwrap_or(ETHERNET);
            let encapsulation = settings.encapsulation;
            wanted.push(Wanted {
                name,
                tunnel: Tunnel { local: local.address, remote, encapsulation },
                mtu: outside.saturating_sub(encapsulation.overhead(family)),
            });
        }
        (wanted, without)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tunnel::Encapsulation;
    use crate::network::egress::BRIDGE;
    use crate::network::node_address::{Host, Methods};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn settings(overlay: Reach, encapsulation: Encapsulation) -> Settings {
        Settings {
            node_name: "a".into(),
            audit_period: std::time::Duration::from_secs(300),
            overlay,
            encapsulation,
            egress: true,
            egress_exclude: Vec::new(),
            auto_mtu: true,
            cni_file: None,
            addresses: Methods::default(),
            disable_source_check: false,
        }
    }

    fn machine() -> Machine {
        let link = |index, name: &str, mtu| Link {
            index,
            name: name.to_owned(),
            kind: None,
            flags: 1,
            mtu,
            master: None,
        };
        let on = |link, address: &str, scope| LinkAddress {
            link,
            address: address.parse().unwrap(),
            scope,
            flags: 0x80,
        };
        Machine {
            links: vec![link(1, "lo", 65536), link(2, "eth0", 9000), link(3, BRIDGE, 1500)],
            addresses: vec![
                on(1, "127.0.0.1/8", 254),
                on(2, "192.168.1.1/24", 0),
                on(2, "fd01::1/64", 0),
                on(2, "fe80::1/64", 253),
                on(3, "10.1.0.1/24", 0),
            ],
            tunnels: Vec::new(),
        }
    }

    fn cluster() -> ClusterFacts {
        let node = |name: &str, addresses: &[&str], pods: &str| {
            let node = Node {
                name: name.into(),
                internal_ips: addresses.iter().map(|address| ip(address)).collect(),
                pod_cidrs: vec![pods.parse().unwrap()],
                ..Node::default()
            };
            (node.name.clone(), Arc::new(node))
        };
        let state = State {
            nodes: [
                node("a", &["192.168.1.1", "fd01::1"], "10.1.0.0/24"),
                node("b", &["192.168.2.1"], "10.2.0.0/24"),
            ]
            .into(),
            ..State::default()
        };
        ClusterFacts::gather(&state, "a")
    }

    fn addresses(cluster: &ClusterFacts, machine: &Machine) -> NodeAddresses {
        let mut addresses = NodeAddresses::default();
        let vips = HashSet::new();
        let host = Host { links: &machine.links, addresses: &machine.addresses, vips: &vips };
        addresses.update(&Methods::default(), cluster.own.as_deref(), &host, |_, _| unreachable!());
        addresses
    }

    #[test]
    fn what_is_connected_local_and_elsewhere() {
        let (machine, cluster) = (machine(), cluster());
        let addresses = addresses(&cluster, &machine);
        let settings = settings(Reach::Subnet, Encapsulation::Plain);
        let found = machine.surroundings(&settings, &cluster, &addresses);
        let net = |text: &str| -> IpNet { text.parse().unwrap() };
        assert_eq!(found.connected, [(net("192.168.1.0/24"), 2), (net("fd01::/64"), 2)]);
        assert_eq!(found.local, [net("10.1.0.0/24")]);
        assert_eq!(found.nodes, [ip("192.168.2.1")].into());
        assert_eq!(found.sources[&Family::V6], ip("fd01::1"));
        assert_eq!(machine.node_links(&cluster), ["eth0"]);
        assert!(!cluster.blind);
        assert_eq!(cluster.pods.len(), 2);
    }

    #[test]
    fn an_own_node_that_went_keeps_its_place() {
        let before = cluster();
        let mut state = State::default();
        let after = ClusterFacts::gather(&state, "a").after(&before);
        assert_eq!(after.own, before.own);
        assert_eq!(after.own_pods(), before.own_pods());
        assert_eq!(after.pods.len(), 1, "others' pods go");
        // Known anew, it is taken as it is.
        let node = Node { name: "a".into(), ..Node::default() };
        state.nodes.insert("a".into(), Arc::new(node));
        let after = ClusterFacts::gather(&state, "a").after(&before);
        assert!(after.own_pods().is_empty() && after.pods.is_empty());
    }

    #[test]
    fn tunnels_take_their_bytes_from_the_mtu() {
        let (machine, cluster) = (machine(), cluster());
        let addresses = addresses(&cluster, &machine);
        for (reach, form, pods) in [
            (Reach::Off, Encapsulation::Plain, 9000),
            (Reach::Subnet, Encapsulation::Plain, 8960),
            (Reach::Full, Encapsulation::Gue(5555), 8948),
        ] {
            let settings = settings(reach, form);
            assert_eq!(machine.pod_mtu(&settings, &addresses), Some(pods), "{reach:?} {form}");
            let names = [(ip("192.168.2.1"), "tun-1".to_owned()), (ip("fd02::1"), "tun-2".to_owned())].into();
            let (wanted, without) = machine.tunnels_to(names, &settings, &addresses);
            let mtu: Vec<u32> = wanted.iter().map(|wanted| wanted.mtu).collect();
            let gue = form != Encapsulation::Plain;
            assert_eq!(mtu, if gue { [8968, 8948] } else { [8980, 8960] });
            assert_eq!(wanted[1].tunnel.local, ip("fd01::1"));
            assert!(without.is_empty());
        }
        let names = [(ip("192.168.2.1"), "tun-1".to_owned())].into();
        let settings = settings(Reach::Subnet, Encapsulation::Plain);
        let (wanted, without) = machine.tunnels_to(names, &settings, &NodeAddresses::default());
        assert!(wanted.is_empty() && without == [ip("192.168.2.1")]);
    }
}
