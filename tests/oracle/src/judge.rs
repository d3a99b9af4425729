//! The verdict on one packet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ContainerPort, Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::address::Block;
use crate::selector::{Labels, selects};

/// The objects that decide.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Namespaces.
    pub namespaces: Vec<Namespace>,
    /// Pods, whatever their phase.
    pub pods: Vec<Pod>,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Policies.
    pub policies: Vec<NetworkPolicy>,
    /// Addresses that a node has without any object saying so, such as its end of the pod bridge. By
    /// node name.
    pub local_addresses: BTreeMap<String, Vec<IpAddr>>,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// As the API writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The first packet of a connection, as the pods at both ends see it: no translation in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    /// Source.
    pub from: IpAddr,
    /// Destination.
    pub to: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {} {}", self.from, self.to, self.protocol, self.port)
    }
}

/// Whether a packet passes, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict<'c> {
    /// Both sides let it pass.
    pub allowed: bool,
    /// What each side says.
    pub why: Why<'c>,
}

/// What each side says.
#[derive(Clone, Debug, PartialEq)]
pub struct Why<'c> {
    /// The pod that sends.
    pub egress: Side<'c>,
    /// The pod that receives.
    pub ingress: Side<'c>,
}

/// What the policies of one pod in one direction say.
#[derive(Clone, Debug, PartialEq)]
pub enum Side<'c> {
    /// No pod of the cluster's network is here: nothing to judge.
    NoPod,
    /// The pod talks to itself.
    Itself,
    /// The sender is the node that the pod runs on.
    OwnNode,
    /// No policy selects the pod for this direction.
    NotIsolated,
    /// This rule (counted from 0) of this policy allows it.
    Permitted(&'c NetworkPolicy, usize),
    /// These policies select the pod, and no rule of theirs allows it.
    Refused(Vec<&'c NetworkPolicy>),
}

impl Side<'_> {
    /// Whether this side lets it pass.
    pub fn passes(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }
}

impl fmt::Display for Verdict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.allowed { "allowed" } else { "refused" };
        write!(f, "{word}: {}", self.why)
    }
}

impl fmt::Display for Why<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "egress: {}; ingress: {}", self.egress, self.ingress)
    }
}

impl fmt::Display for Side<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |policy: &NetworkPolicy| {
            let text = |part: &Option<String>| part.clone().unwrap_or_default();
            format!("{}/{}", text(&policy.metadata.namespace), text(&policy.metadata.name))
        };
        match self {
            Self::NoPod => f.write_str("no pod"),
            Self::Itself => f.write_str("the pod itself"),
            Self::OwnNode => f.write_str("the pod's own node"),
            Self::NotIsolated => f.write_str("not isolated"),
            Self::Permitted(policy, rule) => write!(f, "rule {rule} of {}", name(policy)),
            Self::Refused(policies) => {
                let names: Vec<String> = policies.iter().map(|policy| name(policy)).collect();
                write!(f, "no rule of {}", names.join(", "))
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Direction {
    Ingress,
    Egress,
}

/// A pod that has not ended, with its addresses read.
#[derive(Debug)]
struct Live<'c> {
    pod: &'c Pod,
    namespace: &'c str,
    labels: Labels,
    addresses: Vec<IpAddr>,
    on_host_network: bool,
}

/// A cluster made ready for questions.
#[derive(Debug)]
pub struct Judge<'c> {
    live: Vec<Live<'c>>,
    /// Labels by namespace.
    namespaces: BTreeMap<&'c str, Labels>,
    /// Own addresses by node.
    nodes: BTreeMap<&'c str, BTreeSet<IpAddr>>,
    policies: &'c [NetworkPolicy],
}

/// The verdict on one packet. To ask about many, make one [`Judge`].
///
/// ```
/// use ferroute_oracle::{Cluster, Packet, Protocol, allows};
/// let [from, to] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().unwrap());
/// let empty = Cluster::default();
/// assert!(allows(&empty, Packet { from, to, protocol: Protocol::Tcp, port: 80 }).allowed);
/// ```
pub fn allows(cluster: &Cluster, packet: Packet) -> Verdict<'_> {
    Judge::new(cluster).verdict(packet)
}

impl<'c> Judge<'c> {
    /// Reads addresses and labels.
    pub fn new(cluster: &'c Cluster) -> Self {
        let live: Vec<Live<'c>> = cluster.pods.iter().filter_map(Live::of).collect();
        let mut namespaces = BTreeMap::new();
        for namespace in &cluster.namespaces {
            let Some(name) = namespace.metadata.name.as_deref() else { continue };
            let mut labels = namespace.metadata.labels.clone().unwrap_or_default();
            // The API server sets it and lets nobody change it.
            labels.insert("kubernetes.io/metadata.name".into(), name.into());
            namespaces.insert(name, labels);
        }
        let mut nodes: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
        for node in &cluster.nodes {
            let Some(name) = node.metadata.name.as_deref() else { continue };
            let status = node.status.as_ref().and_then(|status| status.addresses.as_ref());
            // Host names among them are no addresses.
            let told = status.into_iter().flatten().filter_map(|one| one.address.parse().ok());
            let untold = cluster.local_addresses.get(name).into_iter().flatten().copied();
            nodes.entry(name).or_default().extend(told.chain(untold));
        }
        for pod in live.iter().filter(|pod| pod.on_host_network) {
            if let Some(node) = node_of(pod.pod) {
                nodes.entry(node).or_default().extend(pod.addresses.iter().copied());
            }
        }
        Self { live, namespaces, nodes, policies: &cluster.policies }
    }

    /// The verdict on one packet.
    pub fn verdict(&self, packet: Packet) -> Verdict<'c> {
        let why = Why { egress: self.egress(packet), ingress: self.ingress(packet) };
        Verdict { allowed: why.egress.passes() && why.ingress.passes(), why }
    }

    fn egress(&self, packet: Packet) -> Side<'c> {
        let Some(sender) = self.pod_at(packet.from) else { return Side::NoPod };
        if sender.addresses.contains(&packet.to) {
            return Side::Itself;
        }
        self.side(Direction::Egress, sender, packet)
    }

    fn ingress(&self, packet: Packet) -> Side<'c> {
        let Some(receiver) = self.pod_at(packet.to) else { return Side::NoPod };
        if receiver.addresses.contains(&packet.from) {
            return Side::Itself;
        }
        let own_node = node_of(receiver.pod).and_then(|node| self.nodes.get(node));
        if own_node.is_some_and(|addresses| addresses.contains(&packet.from)) {
            return Side::OwnNode;
        }
        self.side(Direction::Ingress, receiver, packet)
    }

    /// The pod of the pod network that has an address. Pods on the host network share their node's.
    fn pod_at(&self, address: IpAddr) -> Option<&Live<'c>> {
        self.live.iter().find(|pod| !pod.on_host_network && pod.addresses.contains(&address))
    }

    fn side(&self, direction: Direction, pod: &Live<'c>, packet: Packet) -> Side<'c> {
        let mut isolating = Vec::new();
        for policy in self.policies {
            let Some(spec) = &policy.spec else { continue };
            if !is_for(spec, direction) || !selects_pod(policy, spec, pod) {
                continue;
            }
            if let Some(rule) = self.permitting_rule(policy, spec, direction, packet) {
                return Side::Permitted(policy, rule);
            }
            isolating.push(policy);
        }
        if isolating.is_empty() { Side::NotIsolated } else { Side::Refused(isolating) }
    }

    fn permitting_rule(
        &self,
        policy: &NetworkPolicy,
        spec: &NetworkPolicySpec,
        direction: Direction,
        packet: Packet,
    ) -> Option<usize> {
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        match direction {
            Direction::Ingress => spec.ingress.iter().flatten().position(|rule| {
                self.any_peer(rule.from.as_deref(), namespace, packet.from)
                    && self.any_port(rule.ports.as_deref(), packet)
            }),
            Direction::Egress => spec.egress.iter().flatten().position(|rule| {
                self.any_peer(rule.to.as_deref(), namespace, packet.to)
                    && self.any_port(rule.ports.as_deref(), packet)
            }),
        }
    }

    /// "If this field is empty or missing, this rule matches all" sources or destinations.
    fn any_peer(&self, peers: Option<&[NetworkPolicyPeer]>, namespace: &str, address: IpAddr) -> bool {
        let peers = peers.unwrap_or_default();
        peers.is_empty() || peers.iter().any(|peer| self.is_peer(peer, namespace, address))
    }

    fn is_peer(&self, peer: &NetworkPolicyPeer, policy_namespace: &str, address: IpAddr) -> bool {
        if let Some(block) = &peer.ip_block {
            return in_block(block, address);
        }
        if peer.pod_selector.is_none() && peer.namespace_selector.is_none() {
            // The API refuses a peer that names nothing.
            return false;
        }
        // Pods on the host network too: as peers they are the addresses of their node.
        self.live.iter().any(|pod| {
            pod.addresses.contains(&address)
                && self.is_in_peer_namespace(peer.namespace_selector.as_ref(), policy_namespace, pod)
                && peer.pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.labels))
        })
    }

    fn is_in_peer_namespace(
        &self,
        selector: Option<&LabelSelector>,
        policy_namespace: &str,
        pod: &Live<'_>,
    ) -> bool {
        match selector {
            None => pod.namespace == policy_namespace,
            Some(selector) => {
                self.namespaces.get(pod.namespace).is_some_and(|labels| selects(selector, labels))
            }
        }
    }

    /// "If this field is empty or missing, this rule matches all ports".
    fn any_port(&self, ports: Option<&[NetworkPolicyPort]>, packet: Packet) -> bool {
        let ports = ports.unwrap_or_default();
        ports.is_empty() || ports.iter().any(|port| self.is_port(port, packet))
    }

    fn is_port(&self, port: &NetworkPolicyPort, packet: Packet) -> bool {
        if port.protocol.as_deref().unwrap_or("TCP") != packet.protocol.name() {
            return false;
        }
        match (&port.port, port.end_port) {
            (None, None) => true,
            (Some(IntOrString::Int(number)), None) => i32::from(packet.port) == *number,
            (Some(IntOrString::Int(first)), Some(last)) => (*first..=last).contains(&i32::from(packet.port)),
            (Some(IntOrString::String(name)), None) => self.has_named_port(name, packet),
            // The API refuses endPort without a number to start from.
            (None | Some(IntOrString::String(_)), Some(_)) => false,
        }
    }

    /// A name stands for the number that the destination gives it.
    fn has_named_port(&self, name: &str, packet: Packet) -> bool {
        self.live.iter().filter(|pod| pod.addresses.contains(&packet.to)).any(|pod| {
            declared_ports(pod.pod).iter().any(|port| {
                port.name.as_deref() == Some(name)
                    && port.protocol.as_deref().unwrap_or("TCP") == packet.protocol.name()
                    && port.container_port == i32::from(packet.port)
            })
        })
    }
}

impl<'c> Live<'c> {
    /// `None` once the pod has ended: its address may be another's by now.
    fn of(pod: &'c Pod) -> Option<Self> {
        let status = pod.status.as_ref()?;
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let mut addresses: Vec<IpAddr> =
            status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
        if addresses.is_empty() {
            addresses.extend(status.pod_ip.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()));
        }
        Some(Self {
            pod,
            namespace: pod.metadata.namespace.as_deref().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            addresses,
            on_host_network: pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false),
        })
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// Ports of containers that run beside each other. An init container ends before the others start,
/// unless its restart policy is Always.
fn declared_ports(pod: &Pod) -> Vec<&ContainerPort> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let stays = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(stays);
    spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten()).collect()
}

/// "If this field is not specified, it will default based on the existence of ingress or egress
/// rules": always ingress, and egress when there is at least one egress rule.
fn is_for(spec: &NetworkPolicySpec, direction: Direction) -> bool {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    match direction {
        Direction::Ingress => types.is_empty() || types.iter().any(|one| one == "Ingress"),
        Direction::Egress if types.is_empty() => spec.egress.iter().flatten().next().is_some(),
        Direction::Egress => types.iter().any(|one| one == "Egress"),
    }
}

/// "An empty podSelector matches all pods in this namespace."
fn selects_pod(policy: &NetworkPolicy, spec: &NetworkPolicySpec, pod: &Live<'_>) -> bool {
    policy.metadata.namespace.as_deref() == Some(pod.namespace)
        && spec.pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.labels))
}

/// Whether an address is in the block and in none of its exceptions. Whoever has the address.
fn in_block(block: &IPBlock, address: IpAddr) -> bool {
    let inside = |text: &str| Block::parse(text).is_some_and(|block| block.contains(address));
    inside(&block.cidr) && !block.except.iter().flatten().any(|except| inside(except))
}
