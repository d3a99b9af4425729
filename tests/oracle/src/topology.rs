//! Nodes and addresses for generated clusters.

use std::net::IpAddr;

use crate::generate::Shape;
use crate::random::Random;

/// A node and the addresses on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Node name.
    pub node: String,
    /// Addresses of the node that its object tells.
    pub addresses: Vec<IpAddr>,
    /// Addresses of the node that no object tells.
    pub local: Vec<IpAddr>,
    /// Addresses of each pod.
    pub pods: Vec<Vec<IpAddr>>,
}

/// Nodes and addresses, before anybody has a name or a label.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// The nodes.
    pub places: Vec<Place>,
    /// Addresses outside the cluster that blocks should contain or narrowly miss.
    pub outside: Vec<IpAddr>,
}

impl Topology {
    /// Nodes of a flat network with a pod network of each family, IPv4 only, IPv6 only or both.
    pub fn random(shape: &Shape, random: &mut Random) -> Self {
        let all = [vec![true, false], vec![true, false], vec![true], vec![false]];
        let families = random.pick(&all);
        let ips = |v4: String, v6: String| -> Vec<IpAddr> {
            let text = |v4_wanted: bool| if v4_wanted { &v4 } else { &v6 };
            families.iter().filter_map(|family| text(*family).parse().ok()).collect()
        };
        let mut places = Vec::new();
        for node in 1..=random.within(&shape.nodes) {
            let mut addresses = ips(format!("10.10.0.{}", 10 + node), format!("fd00:10:10::1{node}"));
            if random.chance(20) {
                addresses.extend(ips(format!("198.51.100.{node}"), format!("2001:db8:1::{node}")));
            }
            let pods = (0..random.within(&shape.pods_per_node))
                .map(|pod| {
                    ips(format!("10.244.{node}.{}", 2 + pod), format!("fd00:244:{node}::{:x}", 2 + pod))
                })
                .collect();
            let local = ips(format!("10.244.{node}.1"), format!("fd00:244:{node}::1"));
            places.push(Place { node: format!("n{node}"), addresses, local, pods });
        }
        let outside = ips("203.0.113.10".into(), "2001:db8:cafe::10".into());
        Self { places, outside }
    }
}
