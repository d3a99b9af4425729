//! Random clusters that are hard to get right.
//!
//! Few label keys and values, so that selectors overlap; blocks of addresses around the pods, nodes
//! and each other, with exceptions that other blocks contain; ports of every kind, names that stand
//! for different numbers on different pods, or for none; empty and missing lists everywhere; pods that
//! have ended and share their address with a live one.
//!
//! Everything made here would be accepted by the API server's validation.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, Namespace, Node, NodeAddress, NodeStatus, Pod, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
    NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, LabelSelectorRequirement, ObjectMeta, Time,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;

use crate::address::{Block, bits, from_bits, width};
use crate::judge::{Cluster, Protocol};
use crate::random::Random;
use crate::selector::Labels;
use crate::topology::{Place, Topology};

/// How many of what.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of nodes.
    pub nodes: RangeInclusive<usize>,
    /// Pods with an address of their own, per node.
    pub pods_per_node: RangeInclusive<usize>,
    /// Number of namespaces; one more has policies and no pods.
    pub namespaces: RangeInclusive<usize>,
    /// Number of policies.
    pub policies: RangeInclusive<usize>,
    /// Port numbers to choose from; some policies take their neighbours.
    pub ports: Vec<u16>,
    /// Whether pods of the pod network may lack one family or not run yet. Off where the addresses
    /// are those of pods that do run.
    pub odd_pods: bool,
}

impl Default for Shape {
    /// Few objects: a mismatch in such a cluster is nearly small enough to read.
    fn default() -> Self {
        Self {
            nodes: 1..=3,
            pods_per_node: 1..=3,
            namespaces: 1..=3,
            policies: 1..=5,
            ports: vec![53, 80, 81, 443, 5353, 8080],
            odd_pods: true,
        }
    }
}

impl Shape {
    /// Up to 6 nodes with 20 pods each, and 30 policies.
    pub fn large() -> Self {
        let (nodes, pods_per_node, namespaces, policies) = (3..=6, 5..=20, 2..=5, 5..=30);
        Self { nodes, pods_per_node, namespaces, policies, ..Self::default() }
    }

    /// The cluster of this seed.
    pub fn cluster(&self, seed: u64) -> Cluster {
        let mut random = Random::new(seed);
        let topology = Topology::random(self, &mut random);
        self.cluster_on(&topology, random.number())
    }

    /// The cluster of this seed on given nodes and addresses: every address of the topology is that of
    /// a live pod.
    pub fn cluster_on(&self, topology: &Topology, seed: u64) -> Cluster {
        Generator::new(self, topology, seed).cluster()
    }
}

const KEYS: [&str; 3] = ["app", "tier", "zone"];
const VALUES: [&str; 3] = ["a", "b", "c"];
/// A key that no object has.
const ABSENT_KEY: &str = "absent";
const METADATA_NAME: &str = "kubernetes.io/metadata.name";
const PORT_NAMES: [&str; 4] = ["web", "dns", "admin", "metrics"];
/// A port name that no pod has.
const ABSENT_PORT: &str = "nowhere";

struct Generator<'a> {
    shape: &'a Shape,
    topology: &'a Topology,
    random: Random,
    namespaces: Vec<String>,
    /// Addresses that blocks are made around.
    anchors: Vec<IpAddr>,
    /// Blocks and exceptions so far, to overlap with.
    blocks: Vec<Block>,
}

impl<'a> Generator<'a> {
    fn new(shape: &'a Shape, topology: &'a Topology, seed: u64) -> Self {
        let mut anchors = topology.outside.clone();
        for place in &topology.places {
            anchors.extend(place.addresses.iter().chain(&place.local));
            anchors.extend(place.pods.iter().flatten());
        }
        let random = Random::new(seed);
        Self { shape, topology, random, namespaces: Vec::new(), anchors, blocks: Vec::new() }
    }

    fn cluster(mut self) -> Cluster {
        let count = self.random.within(&self.shape.namespaces);
        self.namespaces = (0..count).map(|number| format!("ns{number}")).collect();
        let mut cluster = Cluster::default();
        for place in &self.topology.places {
            cluster.nodes.push(node(place));
            cluster.local_addresses.insert(place.node.clone(), place.local.clone());
        }
        for place in &self.topology.places {
            for addresses in &place.pods {
                let name = format!("pod{}", cluster.pods.len());
                let pod = self.pod(name, &place.node, addresses, false);
                cluster.pods.push(pod);
            }
            if self.random.chance(30) {
                let name = format!("host{}", cluster.pods.len());
                let pod = self.pod(name, &place.node, &place.addresses, true);
                cluster.pods.push(pod);
            }
        }
        self.end_some(&mut cluster);
        self.namespaces.push("empty".into());
        cluster.namespaces = self.namespaces.clone().iter().map(|name| self.namespace(name)).collect();
        for number in 0..self.random.within(&self.shape.policies) {
            let policy = self.policy(number);
            cluster.policies.push(policy);
        }
        cluster
    }

    fn namespace(&mut self, name: &str) -> Namespace {
        let mut labels = self.labels();
        labels.insert(METADATA_NAME.into(), name.into());
        let metadata = ObjectMeta { name: Some(name.into()), labels: Some(labels), ..ObjectMeta::default() };
        Namespace { metadata, ..Namespace::default() }
    }

    fn labels(&mut self) -> Labels {
        let mut labels = Labels::new();
        for key in KEYS {
            if self.random.chance(60) {
                labels.insert(key.into(), (*self.random.pick(&VALUES)).into());
            }
        }
        labels
    }

    fn pod(&mut self, name: String, node: &str, addresses: &[IpAddr], on_host_network: bool) -> Pod {
        let labels = self.labels();
        let metadata = ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(self.random.pick(&self.namespaces).clone()),
            // A pod without labels may have no field for them.
            labels: if labels.is_empty() && self.random.chance(50) { None } else { Some(labels) },
            uid: Some(format!("uid-{name}")),
            ..ObjectMeta::default()
        };
        // The kubelet reports one address of each family.
        let mut ips: Vec<IpAddr> = Vec::new();
        for &address in addresses {
            if ips.iter().all(|ip| ip.is_ipv4() != address.is_ipv4()) {
                ips.push(address);
            }
        }
        let mut phase = "Running";
        if self.shape.odd_pods && self.random.chance(15) {
            match self.random.below(3) {
                0 => ips.truncate(1),
                // Its init containers run: it has an address and counts.
                1 => phase = "Pending",
                _ => (phase, ips) = ("Pending", Vec::new()),
            }
        }
        let (containers, init_containers) = self.containers();
        let spec = PodSpec {
            node_name: Some(node.into()),
            host_network: if on_host_network { Some(true) } else { None },
            containers,
            init_containers,
            ..PodSpec::default()
        };
        Pod { metadata, spec: Some(spec), status: Some(status(phase, &ips)) }
    }

    /// Up to two containers, and an init container that may or may not stay.
    fn containers(&mut self) -> (Vec<Container>, Option<Vec<Container>>) {
        // A name is given once in a pod, but for the names of one port in two protocols.
        let mut names: Vec<(&str, Protocol)> = Vec::new();
        for name in PORT_NAMES {
            if self.random.chance(45) {
                let protocol = *self.random.pick(&Protocol::ALL);
                names.push((name, protocol));
                if self.random.chance(15) {
                    names.extend(
                        Protocol::ALL.into_iter().find(|one| *one != protocol).map(|one| (name, one)),
                    );
                }
            }
        }
        let count = 1 + self.random.below(2);
        let mut containers: Vec<Container> =
            (0..count).map(|number| container(format!("c{number}"))).collect();
        let mut init = container("init".into());
        init.restart_policy = self.random.chance(50).then(|| "Always".to_owned());
        for (name, protocol) in names {
            let port = ContainerPort {
                name: Some(name.into()),
                container_port: i32::from(*self.random.pick(&self.shape.ports)),
                protocol: self.written(protocol),
                ..ContainerPort::default()
            };
            // One container cannot have a name twice.
            let free = |container: &Container| {
                container.ports.iter().flatten().all(|port| port.name.as_deref() != Some(name))
            };
            let at = self.random.below(count + 1);
            let home = if at < count { &mut containers[at] } else { &mut init };
            if free(home) {
                home.ports.get_or_insert_default().push(port);
            }
        }
        if self.random.chance(30) {
            let container_port = i32::from(*self.random.pick(&self.shape.ports));
            let nameless = ContainerPort { container_port, ..ContainerPort::default() };
            containers[0].ports.get_or_insert_default().push(nameless);
        }
        (containers, init.ports.is_some().then(|| vec![init]))
    }

    /// Now and then TCP is left to be the default.
    fn written(&mut self, protocol: Protocol) -> Option<String> {
        let left_out = protocol == Protocol::Tcp && self.random.chance(50);
        (!left_out).then(|| protocol.name().to_owned())
    }

    /// Pods that have ended: with the address of one that lives, or with one that is nobody's now.
    fn end_some(&mut self, cluster: &mut Cluster) {
        for place in &self.topology.places {
            while self.random.chance(35) && !place.pods.is_empty() {
                let name = format!("ended{}", cluster.pods.len());
                let ips = self.random.pick(&place.pods).clone();
                let mut pod = self.pod(name, &place.node, &ips, false);
                let phase = *self.random.pick(&["Succeeded", "Failed"]);
                pod.status = Some(status(phase, &ips));
                // Before or after the live one.
                let at = self.random.below(cluster.pods.len() + 1);
                cluster.pods.insert(at, pod);
            }
        }
        if self.shape.odd_pods {
            for pod in &mut cluster.pods {
                // Being deleted is not being gone: it serves, and is served, to its end.
                if self.random.chance(5) {
                    pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
                    pod.metadata.deletion_grace_period_seconds = Some(30);
                }
            }
        }
    }

    fn policy(&mut self, number: usize) -> NetworkPolicy {
        let metadata = ObjectMeta {
            name: Some(format!("policy{number}")),
            namespace: Some(if self.random.chance(5) {
                "empty".to_owned()
            } else {
                self.random.pick(&self.namespaces).clone()
            }),
            uid: Some(format!("uid-policy{number}")),
            ..ObjectMeta::default()
        };
        let (ingress, egress) = ("Ingress".to_owned(), "Egress".to_owned());
        let policy_types = match self.random.below(8) {
            0 | 1 => None,
            2 => Some(Vec::new()),
            3 => Some(vec![ingress]),
            4 | 5 => Some(vec![egress]),
            6 => Some(vec![egress, ingress]),
            _ => Some(vec![ingress, egress]),
        };
        let spec = NetworkPolicySpec {
            pod_selector: if self.random.chance(3) { None } else { Some(self.selector(false)) },
            policy_types,
            ingress: self.list(60, 3, |it| {
                let from = it.list(70, 3, Self::peer);
                NetworkPolicyIngressRule { from, ports: it.list(60, 3, Self::port) }
            }),
            egress: self.list(60, 3, |it| {
                let to = it.list(70, 3, Self::peer);
                NetworkPolicyEgressRule { to, ports: it.list(60, 3, Self::port) }
            }),
        };
        NetworkPolicy { metadata, spec: Some(spec) }
    }

    /// A list with up to `most` members so many times in a hundred; else empty or missing.
    fn list<T>(
        &mut self,
        percent: usize,
        most: usize,
        mut one: impl FnMut(&mut Self) -> T,
    ) -> Option<Vec<T>> {
        if self.random.chance(percent) {
            let count = 1 + self.random.below(most);
            return Some((0..count).map(|_| one(self)).collect());
        }
        self.random.chance(50).then(Vec::new)
    }

    fn selector(&mut self, of_namespaces: bool) -> LabelSelector {
        let mut selector = LabelSelector::default();
        let by_name = of_namespaces && self.random.chance(25);
        if self.random.chance(50) {
            let key = if by_name { METADATA_NAME } else { *self.random.pick(&KEYS) };
            let value = self.value(by_name);
            selector.match_labels = Some(BTreeMap::from([(key.to_owned(), value)]));
        }
        if self.random.chance(35) {
            let operator = *self.random.pick(&["In", "NotIn", "Exists", "DoesNotExist"]);
            let key = match self.random.below(10) {
                0 => ABSENT_KEY,
                _ if by_name => METADATA_NAME,
                _ => *self.random.pick(&KEYS),
            };
            let values = operator.ends_with("In").then(|| {
                let count = 1 + self.random.below(2);
                (0..count).map(|_| self.value(by_name)).collect()
            });
            let requirement = LabelSelectorRequirement { key: key.into(), operator: operator.into(), values };
            selector.match_expressions = Some(vec![requirement]);
        }
        selector
    }

    fn value(&mut self, of_name: bool) -> String {
        if of_name { self.random.pick(&self.namespaces).clone() } else { (*self.random.pick(&VALUES)).into() }
    }

    fn peer(&mut self) -> NetworkPolicyPeer {
        let mut peer = NetworkPolicyPeer::default();
        match self.random.below(5) {
            0 => peer.pod_selector = Some(self.selector(false)),
            1 => peer.namespace_selector = Some(self.selector(true)),
            2 => {
                peer.pod_selector = Some(self.selector(false));
                peer.namespace_selector = Some(self.selector(true));
            }
            _ => peer.ip_block = Some(self.ip_block()),
        }
        peer
    }

    fn ip_block(&mut self) -> IPBlock {
        let block = self.block();
        self.blocks.push(block);
        let mut except = Vec::new();
        while block.prefix < width(block.address) && except.len() < 4 && self.random.chance(40) {
            let inner = self.block_inside(&block);
            self.blocks.push(inner);
            except.push(self.text(&inner));
        }
        // An empty list now and then.
        let except = if except.is_empty() { self.random.chance(20).then_some(except) } else { Some(except) };
        IPBlock { cidr: self.text(&block), except }
    }

    /// Around an address of the cluster, or one of the blocks already there.
    fn block(&mut self) -> Block {
        if !self.blocks.is_empty() && self.random.chance(30) {
            return *self.random.pick(&self.blocks);
        }
        let anchor = *self.random.pick(&self.anchors);
        let prefixes: &[u8] = if anchor.is_ipv4() {
            &[0, 1, 4, 8, 15, 16, 22, 23, 24, 27, 28, 29, 30, 31, 32, 32]
        } else {
            &[0, 1, 7, 16, 32, 47, 48, 63, 64, 96, 120, 124, 125, 126, 127, 128, 128]
        };
        Block { address: anchor, prefix: *self.random.pick(prefixes) }
    }

    /// Strictly inside, as the API asks of exceptions.
    fn block_inside(&mut self, outer: &Block) -> Block {
        let inside = |block: &Block| block.prefix > outer.prefix && outer.contains(block.address);
        let known: Vec<Block> = self.blocks.iter().copied().filter(inside).collect();
        if !known.is_empty() && self.random.chance(40) {
            return *self.random.pick(&known);
        }
        let anchors: Vec<IpAddr> =
            self.anchors.iter().copied().filter(|anchor| outer.contains(*anchor)).collect();
        let width = width(outer.address);
        let address = if !anchors.is_empty() && self.random.chance(80) {
            *self.random.pick(&anchors)
        } else {
            // The first, the last, or any other address.
            let (first, last) = outer.ends();
            let within = (u128::from(self.random.number()) << 64) | u128::from(self.random.number());
            let any = bits(first) | (within & (bits(first) ^ bits(last)));
            *self.random.pick(&[first, last, from_bits(first, any)])
        };
        let longer = usize::from(width - outer.prefix);
        let more = match self.random.below(4) {
            0 => longer,
            1 => 1,
            _ => 1 + self.random.below(longer),
        };
        #[allow(clippy::cast_possible_truncation)] // at most 128
        Block { address, prefix: outer.prefix + more as u8 }
    }

    /// Mostly with the bits after the prefix cleared; the API does not insist.
    fn text(&mut self, block: &Block) -> String {
        if self.random.chance(10) { block.to_string() } else { block.truncated().to_string() }
    }

    fn port(&mut self) -> NetworkPolicyPort {
        let protocol = *self.random.pick(&Protocol::ALL);
        let mut port = NetworkPolicyPort { protocol: self.written(protocol), ..NetworkPolicyPort::default() };
        let near = i32::from(*self.random.pick(&self.shape.ports));
        match self.random.below(10) {
            // Every port of the protocol.
            0 => {}
            1..=3 => port.port = Some(IntOrString::Int(near)),
            4 | 5 => {
                let (first, last) = *self.random.pick(&[
                    (near, near),
                    (near, near + 1),
                    (near - 1, near),
                    (near - 1, near + 1),
                    (1, near),
                    (near, 65_535),
                    (near + 1, near + 300),
                    (1, 65_535),
                ]);
                port.port = Some(IntOrString::Int(first));
                port.end_port = Some(last);
            }
            6 => port.port = Some(IntOrString::String(ABSENT_PORT.into())),
            _ => port.port = Some(IntOrString::String((*self.random.pick(&PORT_NAMES)).into())),
        }
        port
    }
}

fn container(name: String) -> Container {
    Container {
        name,
        image: Some("registry.k8s.io/e2e-test-images/agnhost:2.53".into()),
        ..Container::default()
    }
}

fn status(phase: &str, ips: &[IpAddr]) -> PodStatus {
    let pod_ips: Vec<PodIP> = ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect();
    PodStatus {
        phase: Some(phase.into()),
        pod_ip: pod_ips.first().map(|ip| ip.ip.clone()),
        pod_ips: (!pod_ips.is_empty()).then_some(pod_ips),
        ..PodStatus::default()
    }
}

fn node(place: &Place) -> Node {
    let kind = |at: usize| if at < 2 { "InternalIP" } else { "ExternalIP" };
    let mut addresses: Vec<NodeAddress> = Vec::new();
    for (at, address) in place.addresses.iter().enumerate() {
        addresses.push(NodeAddress { address: address.to_string(), type_: kind(at).into() });
    }
    addresses.push(NodeAddress { address: place.node.clone(), type_: "Hostname".into() });
    Node {
        metadata: ObjectMeta { name: Some(place.node.clone()), ..ObjectMeta::default() },
        status: Some(NodeStatus { addresses: Some(addresses), ..NodeStatus::default() }),
        ..Node::default()
    }
}
