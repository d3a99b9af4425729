//! A lab whose policies are judged: every address of its nodes and pods can be asked from and listens.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ferroute_apiserver::Kubelet;
use ferroute_kit::{Cluster as Namespaces, Host, Outcome, Probe, Prober, Protocol};
use ferroute_oracle::{Cluster, Judge, Packet, Place, Probes, Random, Topology, manifests, shrink};
use serde_json::Value;

use crate::lab::Lab;

/// How long a change may take to be in force. Not a promise: the nodes share one processor and, because
/// they share a file system, one lock of iptables, and the machine may be busy.
pub const IN_FORCE: Duration = Duration::from_secs(120);
/// Between two looks at what differs: at first, and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(40), Duration::from_secs(2)];

/// Nodes, pods and an outside client with a prober on all of them, and ferroute on the nodes.
pub struct Field {
    pub lab: Lab,
    pub prober: Prober,
    pub topology: Topology,
    ports: Vec<u16>,
    /// What the API server holds of namespaces, pods and policies, by resource, namespace and name.
    stored: BTreeMap<(&'static str, String, String), Value>,
    /// Attempts so far, and how many of them were let through.
    pub asked: usize,
    pub reached: usize,
}

/// An attempt that ended otherwise than the judge says.
pub struct Mismatch {
    pub packet: Packet,
    pub outcome: Outcome,
    pub verdict: String,
}

impl Field {
    /// Builds it; ferroute runs everywhere with these flags when it returns.
    pub fn start(nodes: usize, pods_per_node: usize, ports: &[u16], flags: &[&str]) -> Self {
        let builder = Namespaces::builder().nodes(nodes).pods_per_node(pods_per_node);
        // The objects are ours: nobody else makes, ends or garbage-collects pods.
        let mut lab =
            Lab::without_daemons_by(builder, |server| server.controllers(false).kubelet(Kubelet::External));
        for node in &lab.cluster.nodes {
            // Neither the limit of ICMP errors for one client nor that for all.
            node.set_sysctl("net/ipv4/icmp_ratemask", "0").unwrap();
            node.set_sysctl("net/ipv6/icmp/ratemask", "3-127").unwrap();
        }
        // Their own servers would hold port 8080.
        lab.cluster.pods.iter_mut().for_each(ferroute_kit::Pod::crash);
        let mut hosts = Vec::new();
        let mut topology = Topology { places: Vec::new(), outside: lab.cluster.client.ips.clone() };
        for node in &lab.cluster.nodes {
            let bridge: Vec<IpAddr> = node.pod_cidrs.iter().map(|cidr| first(cidr.addr())).collect();
            let addresses = node.ips.iter().chain(&bridge).copied().collect();
            hosts.push(Host { name: node.name.clone(), netns: node.netns.clone(), addresses });
            let pods = lab.cluster.pods.iter().filter(|pod| pod.node() == node.name);
            topology.places.push(Place {
                node: node.name.clone(),
                addresses: node.ips.clone(),
                local: bridge,
                pods: pods.map(|pod| pod.ips.clone()).collect(),
            });
        }
        for pod in &lab.cluster.pods {
            let (name, netns) = (pod.spec.name.clone(), pod.netns().clone());
            hosts.push(Host { name, netns, addresses: pod.ips.clone() });
        }
        let client = &lab.cluster.client;
        hosts.push(Host { name: "client".into(), netns: (**client).clone(), addresses: client.ips.clone() });
        let prober = Prober::listen(hosts, ports).unwrap();
        // What counts here is what is in force, not when; the machine may be busy.
        lab.start_daemons_within(Duration::from_secs(300), flags);
        let (ports, stored) = (ports.to_vec(), BTreeMap::new());
        Self { lab, prober, topology, ports, stored, asked: 0, reached: 0 }
    }

    /// Makes the API server hold exactly these namespaces, pods and policies; only what differs is
    /// written.
    pub fn put(&mut self, cluster: &Cluster) {
        let mut wanted: BTreeMap<(&'static str, String, String), Value> = BTreeMap::new();
        let mut want = |resource: &'static str, object: Value| {
            let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
            wanted.insert((resource, text("namespace"), text("name")), object);
        };
        for namespace in &cluster.namespaces {
            want("namespaces", serde_json::to_value(namespace).unwrap());
        }
        for pod in &cluster.pods {
            want("pods", serde_json::to_value(pod).unwrap());
        }
        for policy in &cluster.policies {
            want("networkpolicies.networking.k8s.io", serde_json::to_value(policy).unwrap());
        }
        let gone: Vec<_> = self.stored.keys().filter(|key| !wanted.contains_key(key)).cloned().collect();
        for key in gone {
            self.lab.server.remove_unchecked(key.0, &key.1, &key.2).unwrap();
            self.stored.remove(&key);
        }
        for (key, object) in wanted {
            if self.stored.get(&key) != Some(&object) {
                self.lab.server.insert_unchecked(key.0, object.clone()).unwrap();
                self.stored.insert(key, object);
            }
        }
    }

    /// So many packets that can be sent and answered here, from, to or between pods.
    pub fn sample(&self, random: &mut Random, count: usize) -> Vec<Packet> {
        let pods: Vec<IpAddr> = self.topology.places.iter().flat_map(|place| place.pods.concat()).collect();
        let hosts = self.prober.hosts().iter().flat_map(|host| host.addresses.iter().copied());
        let others = hosts.filter(|ip| !pods.contains(ip)).collect();
        Probes { pods, others, ports: self.ports.clone() }.sample(random, count)
    }

    /// Asks, and compares with the judge.
    pub fn compare(&mut self, cluster: &Cluster, packets: &[Packet]) -> Vec<Mismatch> {
        let probes: Vec<Probe> = packets.iter().map(probe).collect();
        let outcomes = self.prober.probe(&probes).unwrap();
        self.asked += packets.len();
        self.reached += outcomes.iter().filter(|outcome| **outcome == Outcome::Reached).count();
        let judge = Judge::new(cluster);
        let mut mismatches = Vec::new();
        for (packet, outcome) in packets.iter().zip(outcomes) {
            let verdict = judge.verdict(*packet);
            if verdict.allowed != (outcome == Outcome::Reached) {
                mismatches.push(Mismatch { packet: *packet, outcome, verdict: verdict.to_string() });
            }
        }
        mismatches
    }

    /// Waits until all these packets fare as the judge says; what still differs at the end.
    pub fn settle(&mut self, cluster: &Cluster, packets: &[Packet], patience: Duration) -> Vec<Mismatch> {
        let (begin, mut pause) = (Instant::now(), PAUSES[0]);
        let mut mismatches = self.compare(cluster, packets);
        while !mismatches.is_empty() && begin.elapsed() < patience {
            std::thread::sleep(pause);
            // Looking keeps the nodes from working.
            pause = (pause * 2).min(PAUSES[1]);
            let again: Vec<Packet> = mismatches.iter().map(|mismatch| mismatch.packet).collect();
            mismatches = self.compare(cluster, &again);
        }
        mismatches
    }

    /// Puts a cluster and compares `count` packets; a report of what differs, with the smallest
    /// cluster that still shows it.
    pub fn check(&mut self, cluster: &Cluster, random: &mut Random, count: usize) -> Result<(), String> {
        self.put(cluster);
        // Those that wait for the change to be in force say nothing of the others: these are asked
        // when it is.
        for packets in [self.sample(random, count / 3), self.sample(random, count)] {
            let mismatches = self.settle(cluster, &packets, IN_FORCE);
            if !mismatches.is_empty() {
                return Err(self.report(cluster, &mismatches));
            }
        }
        Ok(())
    }

    fn report(&mut self, cluster: &Cluster, mismatches: &[Mismatch]) -> String {
        let mut text = format!("{} packets fare otherwise than judged:\n", mismatches.len());
        for Mismatch { packet, outcome, verdict } in mismatches.iter().take(8) {
            text += &format!("  {packet}: {outcome:?}, but {verdict}\n");
        }
        let packets: Vec<Packet> = mismatches.iter().map(|mismatch| mismatch.packet).take(4).collect();
        let slots: BTreeSet<IpAddr> =
            self.topology.places.iter().flat_map(|place| place.pods.concat()).collect();
        let begin = Instant::now();
        let smallest = shrink(cluster.clone(), |smaller| {
            // An address that no pod has any more is closed for being unknown: another matter.
            let known: BTreeSet<IpAddr> = Probes::of(smaller).pods.into_iter().collect();
            if !slots.is_subset(&known) || begin.elapsed() > Duration::from_secs(60) {
                return false;
            }
            self.put(smaller);
            !self.settle(smaller, &packets, Duration::from_millis(700)).is_empty()
        });
        self.put(&smallest);
        let left = self.settle(&smallest, &packets, Duration::from_secs(2));
        for Mismatch { packet, outcome, verdict } in &left {
            text += &format!("smallest: {packet}: {outcome:?}, but {verdict}\n");
        }
        if left.is_empty() {
            text += "the smallest cluster below shows it no more: it came from the change to it, or late\n";
        }
        text += &manifests(&smallest).unwrap();
        for place in &self.topology.places {
            let node = self.lab.cluster.node(&place.node).unwrap();
            if left
                .iter()
                .any(|it| place.pods.concat().iter().any(|ip| *ip == it.packet.from || *ip == it.packet.to))
            {
                for program in ["iptables-save", "ip6tables-save"] {
                    text += &format!("# {} {program}\n", place.node);
                    text +=
                        &node.sh(&format!("{program} -t filter -c")).unwrap_or_else(|e| format!("{e:#}\n"));
                }
                text += &node.sh("ipset save").unwrap_or_else(|e| format!("{e:#}\n"));
            }
        }
        text
    }
}

fn probe(packet: &Packet) -> Probe {
    let protocol = match packet.protocol {
        ferroute_oracle::Protocol::Tcp => Protocol::Tcp,
        ferroute_oracle::Protocol::Udp => Protocol::Udp,
        ferroute_oracle::Protocol::Sctp => Protocol::Sctp,
    };
    Probe { from: packet.from, to: SocketAddr::new(packet.to, packet.port), protocol }
}

/// The node's own address in a pod CIDR: host number 1.
fn first(network: IpAddr) -> IpAddr {
    match network {
        IpAddr::V4(network) => (u32::from(network) + 1).to_be_bytes().into(),
        IpAddr::V6(network) => (u128::from(network) + 1).to_be_bytes().into(),
    }
}
