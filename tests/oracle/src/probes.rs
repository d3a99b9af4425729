//! Packets worth asking about.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::address::{Block, bits, from_bits, width};
use crate::judge::{Cluster, Packet, Protocol};
use crate::random::Random;

/// Addresses and ports at which the policies of a cluster may change their mind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probes {
    /// Of pods, living and ended, without those of nodes.
    pub pods: Vec<IpAddr>,
    /// Of nodes, then of nobody: the ends of every block, and their neighbours.
    pub others: Vec<IpAddr>,
    /// Every port mentioned, and its neighbours.
    pub ports: Vec<u16>,
}

impl Probes {
    /// Those of a cluster.
    pub fn of(cluster: &Cluster) -> Self {
        let mut pods = BTreeSet::new();
        let mut others: BTreeSet<IpAddr> = cluster.local_addresses.values().flatten().copied().collect();
        let mut ports = BTreeSet::from([1, 80, 65_535]);
        for node in &cluster.nodes {
            let told = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            others.extend(told.filter_map(|one| one.address.parse::<IpAddr>().ok()));
        }
        for pod in &cluster.pods {
            let spec = pod.spec.as_ref();
            let to =
                if spec.and_then(|spec| spec.host_network) == Some(true) { &mut others } else { &mut pods };
            let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
            to.extend(ips.filter_map(|ip| ip.ip.parse::<IpAddr>().ok()));
            let containers = spec
                .iter()
                .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
            for port in containers.flat_map(|container| container.ports.iter().flatten()) {
                near(&mut ports, port.container_port);
            }
        }
        let mut outside: Vec<IpAddr> =
            ["203.0.113.10", "2001:db8:cafe::10"].iter().filter_map(|ip| ip.parse().ok()).collect();
        for policy in &cluster.policies {
            let Some(spec) = &policy.spec else { continue };
            for rule in spec.ingress.iter().flatten() {
                mentioned(rule.from.as_deref(), rule.ports.as_deref(), &mut outside, &mut ports);
            }
            for rule in spec.egress.iter().flatten() {
                mentioned(rule.to.as_deref(), rule.ports.as_deref(), &mut outside, &mut ports);
            }
        }
        others.extend(outside);
        others.retain(|other| !pods.contains(other));
        Self {
            pods: pods.into_iter().collect(),
            others: others.into_iter().collect(),
            ports: ports.into_iter().collect(),
        }
    }

    /// Every packet with a pod at one end at least.
    pub fn all(&self) -> impl Iterator<Item = Packet> + '_ {
        let out =
            self.pods.iter().flat_map(|pod| self.pods.iter().chain(&self.others).map(move |to| (*pod, *to)));
        let into = self.others.iter().flat_map(|from| self.pods.iter().map(move |pod| (*from, *pod)));
        out.chain(into).filter(|(from, to)| from.is_ipv4() == to.is_ipv4()).flat_map(move |(from, to)| {
            Protocol::ALL.into_iter().flat_map(move |protocol| {
                self.ports.iter().map(move |&port| Packet { from, to, protocol, port })
            })
        })
    }

    /// So many packets by chance; fewer where there is nothing to choose from.
    pub fn sample(&self, random: &mut Random, count: usize) -> Vec<Packet> {
        let mut packets = Vec::with_capacity(count);
        if self.pods.is_empty() {
            return packets;
        }
        // Most pairs of addresses are of one family; the limit is for clusters without any.
        for _ in 0..count * 8 {
            if packets.len() == count {
                break;
            }
            let pod = *random.pick(&self.pods);
            let other = if self.others.is_empty() || random.chance(60) {
                *random.pick(&self.pods)
            } else {
                *random.pick(&self.others)
            };
            if pod.is_ipv4() != other.is_ipv4() {
                continue;
            }
            let (from, to) = if random.chance(50) { (pod, other) } else { (other, pod) };
            let (protocol, port) = (*random.pick(&Protocol::ALL), *random.pick(&self.ports));
            packets.push(Packet { from, to, protocol, port });
        }
        packets
    }
}

fn mentioned(
    peers: Option<&[NetworkPolicyPeer]>,
    ports: Option<&[NetworkPolicyPort]>,
    addresses: &mut Vec<IpAddr>,
    numbers: &mut BTreeSet<u16>,
) {
    for block in peers.unwrap_or_default().iter().filter_map(|peer| peer.ip_block.as_ref()) {
        ends(block, addresses);
    }
    for port in ports.unwrap_or_default() {
        if let Some(IntOrString::Int(number)) = port.port {
            near(numbers, number);
        }
        if let Some(last) = port.end_port {
            near(numbers, last);
        }
    }
}

/// First and last address of a block and its exceptions, and the addresses before and after.
fn ends(block: &IPBlock, addresses: &mut Vec<IpAddr>) {
    for block in std::iter::once(&block.cidr).chain(block.except.iter().flatten()) {
        let Some(block) = Block::parse(block) else { continue };
        let (first, last) = block.ends();
        let highest = if width(first) == 32 { u128::from(u32::MAX) } else { u128::MAX };
        addresses.extend([first, last]);
        addresses.extend(bits(first).checked_sub(1).map(|before| from_bits(first, before)));
        addresses.extend((bits(last) < highest).then(|| from_bits(last, bits(last) + 1)));
    }
}

fn near(numbers: &mut BTreeSet<u16>, number: i32) {
    for near in [number - 1, number, number + 1] {
        numbers.extend(u16::try_from(near).ok().filter(|near| *near != 0));
    }
}
