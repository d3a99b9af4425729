//! The layout of a cluster.
//!
//! ```text
//!   client 10.20.0.10 --- router --- lan 10.10.S.0/24 --- n1 eth0 10.10.S.11
//!                           |                             |  kube-bridge 10.244.1.1/24
//!                    API 10.10.0.100                      +- vethXXXXXXXX -- pod eth0 10.244.1.2
//! ```
//!
//! IPv6 twins: `fd00:10:10:S::11`, `fd00:10:20::10`, `fd00:244:1::2`. Nodes and router know the way to
//! every pod CIDR by static routes through the node's address, unless the cluster is [`Builder::unrouted`].

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::link::Links;
use crate::{Netns, Pod, PodSpec, kernel};

/// Address families of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Families {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both, IPv4 first.
    Dual,
}

impl Families {
    /// All three, for tests that run once for each.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Dual];

    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
            Self::Dual => true,
        }
    }

    /// Those of these networks that the cluster has.
    fn networks<const N: usize>(self, networks: [&str; N]) -> Result<Vec<IpNet>> {
        let parse = |text: &str| text.parse::<IpNet>().with_context(|| format!("network {text}"));
        let all = networks.into_iter().map(parse).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().filter(|network| self.has(network.addr())).collect())
    }
}

/// The default route of an address's family.
pub(crate) fn default_route(like: IpAddr) -> IpNet {
    match like {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

/// The `number`th address of a network.
pub(crate) fn host(network: IpNet, number: u32) -> IpAddr {
    match network.network() {
        IpAddr::V4(address) => IpAddr::from((u32::from(address) + number).to_be_bytes()),
        IpAddr::V6(address) => IpAddr::from((u128::from(address) + u128::from(number)).to_be_bytes()),
    }
}

/// No duplicate address detection and no router solicitation: nothing here waits for them.
pub(crate) fn quiet_ipv6(netns: &Netns) -> Result<()> {
    for (name, value) in [("accept_dad", "0"), ("router_solicitations", "0"), ("accept_ra", "0")] {
        for link in ["all", "default"] {
            netns.set_sysctl(&format!("net/ipv6/conf/{link}/{name}"), value)?;
        }
    }
    Ok(())
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Builder {
    nodes: usize,
    families: Families,
    pods_per_node: usize,
    pod_ports: Vec<(crate::Protocol, u16)>,
    zones: Vec<String>,
    subnets: usize,
    named: bool,
    unrouted: bool,
}

impl Builder {
    /// Number of nodes, 1 to 80 (default 3).
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes;
        self
    }

    /// Address families (default both).
    pub fn families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    /// Echo pods `pN-K` started on each node (default none).
    pub fn pods_per_node(mut self, pods: usize) -> Self {
        self.pods_per_node = pods;
        self
    }

    /// Ports of those pods (default TCP and UDP 8080).
    pub fn pod_ports(mut self, ports: impl Into<Vec<(crate::Protocol, u16)>>) -> Self {
        self.pod_ports = ports.into();
        self
    }

    /// Zones, dealt to the nodes in turn as `topology.kubernetes.io/zone` (default none).
    pub fn zones<S: Into<String>>(mut self, zones: impl IntoIterator<Item = S>) -> Self {
        self.zones = zones.into_iter().map(Into::into).collect();
        self
    }

    /// Number of subnets behind the router, dealt to the nodes in turn (default 1).
    pub fn subnets(mut self, subnets: usize) -> Self {
        self.subnets = subnets;
        self
    }

    /// Makes nodes, `router` and `client` visible to `ip netns`; one such cluster at a time.
    pub fn named(mut self) -> Self {
        self.named = true;
        self
    }

    /// Nobody knows the way to pods of other nodes: that is for a program under test to make.
    pub fn unrouted(mut self) -> Self {
        self.unrouted = true;
        self
    }

    /// Builds it.
    ///
    /// # Errors
    /// When the kernel lacks something (named), or refuses a step.
    pub fn build(self) -> Result<Cluster> {
        kernel::require()?;
        ensure!((1..=80).contains(&self.nodes), "a cluster has 1 to 80 nodes, not {}", self.nodes);
        ensure!((1..=8).contains(&self.subnets), "a cluster has 1 to 8 subnets, not {}", self.subnets);
        let make = |name: &str| if self.named { Netns::named(name) } else { Netns::new(name) };
        let router = make("router")?;
        forward(&router)?;
        router.set_sysctl("net/ipv4/fib_multipath_hash_policy", "1")?;
        router.set_sysctl("net/ipv6/fib_multipath_hash_policy", "1")?;
        let links = router.links()?;
        for subnet in 0..self.subnets {
            let bridge = format!("lan{subnet}");
            links.add(&bridge, "bridge")?;
            links.pin_address(&bridge)?;
            let index = router.link_index(&bridge)?;
            for lan in self.lan(subnet)? {
                links.add_address(index, IpNet::new(host(lan, 1), lan.prefix_len())?)?;
                if subnet == 0 {
                    links.add_address(index, IpNet::new(host(lan, API), lan.prefix_len())?)?;
                }
            }
        }
        let client = make("client")?;
        quiet_ipv6(&client)?;
        links.add_veth("outside", "eth0", client.fd())?;
        links.up("outside")?;
        let outside = router.link_index("outside")?;
        let inside = client.links()?;
        inside.up("eth0")?;
        let eth0 = client.link_index("eth0")?;
        let mut client_ips = Vec::new();
        for network in self.families.networks(["10.20.0.0/24", "fd00:10:20::/64"])? {
            let (gateway, address) = (host(network, 1), host(network, host_number(network, 10)));
            links.add_address(outside, IpNet::new(gateway, network.prefix_len())?)?;
            inside.add_address(eth0, IpNet::new(address, network.prefix_len())?)?;
            inside.set_route(default_route(gateway), &[gateway])?;
            client_ips.push(address);
        }
        let mut nodes = Vec::new();
        for number in 1..=self.nodes {
            let name = format!("n{number}");
            nodes.push(
                self.node(number, make(&name)?, &router, &links).with_context(|| format!("node {name}"))?,
            );
        }
        if !self.unrouted {
            connect_pods(&nodes, &links)?;
        }
        let api_ips = self.lan(0)?.into_iter().map(|lan| host(lan, API)).collect();
        let client = Client { netns: client, ips: client_ips, router: router.clone() };
        let mut cluster =
            Cluster { pods: Vec::new(), nodes, client, router, api_ips, families: self.families };
        for number in 1..=self.nodes {
            for pod in 1..=self.pods_per_node {
                let spec = PodSpec::new(format!("p{number}-{pod}")).ports(self.pod_ports.clone());
                let pod = cluster.nodes[number - 1].start_pod(spec)?;
                cluster.pods.push(pod);
            }
        }
        Ok(cluster)
    }

    fn lan(&self, subnet: usize) -> Result<Vec<IpNet>> {
        // Subnet 0 is written fd00:10:10::/64.
        self.families.networks([&format!("10.10.{subnet}.0/24"), &format!("fd00:10:10:{subnet}::/64")])
    }

    fn node(&self, number: usize, netns: Netns, router: &Netns, outside: &Links) -> Result<Node> {
        forward(&netns)?;
        // Bridged pod traffic must meet the node's iptables, as on a real node. Kernels before 5.3
        // have one switch for all namespaces; where the bridge filter is missing there is none.
        for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
            let _ = netns.set_sysctl(&format!("net/bridge/{name}"), "1");
        }
        let subnet = (number - 1) % self.subnets;
        let port = format!("port-n{number}");
        outside.add_veth(&port, "eth0", netns.fd())?;
        outside.enslave(&port, router.link_index(&format!("lan{subnet}"))?, false)?;
        let links = netns.links()?;
        links.up("eth0")?;
        let eth0 = netns.link_index("eth0")?;
        let mut ips = Vec::new();
        for lan in self.lan(subnet)? {
            // Node 1 is .11 and ::11: read alike in both families.
            let ip = host(lan, host_number(lan, 10 + number as u32));
            links.add_address(eth0, IpNet::new(ip, lan.prefix_len())?)?;
            links.set_route(default_route(ip), &[host(lan, 1)])?;
            ips.push(ip);
        }
        links.add("kube-bridge", "bridge")?;
        links.pin_address("kube-bridge")?;
        let bridge = netns.link_index("kube-bridge")?;
        let pod_cidrs =
            self.families.networks([&format!("10.244.{number}.0/24"), &format!("fd00:244:{number}::/64")])?;
        for cidr in &pod_cidrs {
            links.add_address(bridge, IpNet::new(host(*cidr, 1), cidr.prefix_len())?)?;
        }
        let zone = match self.zones.len() {
            0 => None,
            zones => Some(self.zones[(number - 1) % zones].clone()),
        };
        let name = format!("n{number}");
        let (links, addresses) = (AtomicU64::new(1), Mutex::default());
        Ok(Node(Arc::new(NodeRef { name, netns, ips, pod_cidrs, subnet, zone, links, addresses })))
    }
}

/// The API server's host number; no node has it.
const API: u32 = 100;

/// Makes IPv6 host numbers read like the decimal IPv4 ones (11 is `::11`).
fn host_number(network: IpNet, decimal: u32) -> u32 {
    match network {
        IpNet::V4(_) => decimal,
        IpNet::V6(_) => decimal % 10 + (decimal / 10 % 10) * 16 + (decimal / 100) * 256,
    }
}

fn forward(netns: &Netns) -> Result<()> {
    quiet_ipv6(netns)?;
    netns.set_sysctl("net/ipv4/ip_forward", "1")?;
    netns.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    // Answers of a service may come by another link than its requests went.
    netns.set_sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    netns.set_sysctl("net/ipv4/conf/default/rp_filter", "0")
}

/// Static routes to every pod CIDR; across subnets the router forwards.
fn connect_pods(nodes: &[Node], router: &Links) -> Result<()> {
    for node in nodes {
        let links = node.netns.links()?;
        for other in nodes {
            for (cidr, ip) in other.pod_cidrs.iter().zip(&other.ips) {
                if node.name == other.name {
                    router.set_route(*cidr, &[*ip])?;
                } else if node.subnet == other.subnet {
                    links.set_route(*cidr, &[*ip])?;
                }
            }
        }
    }
    Ok(())
}

/// A cluster of namespaces. Dropped, everything in it is gone.
#[derive(Debug)]
pub struct Cluster {
    /// Pods started with the cluster; others belong to whoever started them.
    pub pods: Vec<Pod>,
    /// `n1`, `n2`, ...
    pub nodes: Vec<Node>,
    /// A host outside the cluster, behind the router.
    pub client: Client,
    /// The router; the API server listens here.
    pub router: Netns,
    /// Addresses for the API server (10.10.0.100, fd00:10:10::64), reachable from every node.
    pub api_ips: Vec<IpAddr>,
    /// Its families.
    pub families: Families,
}

impl Cluster {
    /// Three nodes, both families, no pods, unless told otherwise.
    pub fn builder() -> Builder {
        Builder {
            nodes: 3,
            families: Families::Dual,
            pods_per_node: 0,
            pod_ports: PodSpec::new("").ports,
            zones: Vec::new(),
            subnets: 1,
            named: false,
            unrouted: false,
        }
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// core/v1 Node objects of all nodes.
    pub fn node_objects(&self) -> Vec<Value> {
        self.nodes.iter().map(|node| node.object()).collect()
    }
}

/// A host outside the cluster. Dereferences to its namespace.
#[derive(Debug)]
pub struct Client {
    netns: Netns,
    /// Its addresses, IPv4 before IPv6.
    pub ips: Vec<IpAddr>,
    router: Netns,
}

impl Client {
    /// Traffic of the outside to a network goes through these nodes (several: equal cost, a flow
    /// stays on one). Replaces an earlier route to the same network.
    ///
    /// # Errors
    /// When a node has no address of the network's family.
    pub fn route_via(&self, nodes: &[&Node], network: IpNet) -> Result<()> {
        let same = |ip: &&IpAddr| ip.is_ipv4() == network.addr().is_ipv4();
        let gateways = nodes
            .iter()
            .map(|node| {
                node.ips.iter().find(same).copied().with_context(|| format!("{} for {network}", node.name))
            })
            .collect::<Result<Vec<_>>>()?;
        self.router.links()?.set_route(network, &gateways)
    }

    /// Takes such a route away.
    ///
    /// # Errors
    /// When there is none.
    pub fn unroute(&self, network: IpNet) -> Result<()> {
        self.router.links()?.delete_route(network)
    }
}

impl Deref for Client {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

/// A node; clones are the same node. Dereferences to [`NodeRef`].
#[derive(Clone, Debug)]
pub struct Node(pub(crate) Arc<NodeRef>);

/// Host numbers of the pod CIDR that are taken.
#[derive(Debug, Default)]
struct Addresses {
    taken: BTreeSet<u32>,
    last: u32,
}

/// What there is to know about a node. Dereferences to its namespace.
#[derive(Debug)]
pub struct NodeRef {
    /// `nN`.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its addresses on the LAN, IPv4 before IPv6.
    pub ips: Vec<IpAddr>,
    /// Its pod CIDRs, IPv4 before IPv6.
    pub pod_cidrs: Vec<IpNet>,
    /// Number of its subnet.
    pub subnet: usize,
    /// `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    links: AtomicU64,
    addresses: Mutex<Addresses>,
}

impl Node {
    /// Starts a pod here; addresses go up from .2 and begin anew at the end, as the `host-local` CNI
    /// plugin gives them: who knew a pod that is gone must not take the next one for it.
    ///
    /// # Errors
    /// When the pod CIDR is full, the kernel refuses, or a port cannot be listened on.
    pub fn start_pod(&self, spec: PodSpec) -> Result<Pod> {
        Pod::start(&self.0, spec, |_| Ok(()))
    }

    /// Starts a pod here; `chain` runs when it has its network and before anything runs in it, as the
    /// CNI plugins behind `bridge` do. An error of it ends the start.
    ///
    /// # Errors
    /// As [`Node::start_pod`], and those of `chain`.
    pub fn start_pod_after(&self, spec: PodSpec, chain: impl FnOnce(&Pod) -> Result<()>) -> Result<Pod> {
        Pod::start(&self.0, spec, chain)
    }

    /// Its core/v1 Node object.
    pub fn object(&self) -> Value {
        let mut labels = json!({
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
        });
        if let Some(zone) = &self.zone {
            labels["topology.kubernetes.io/zone"] = json!(zone);
        }
        let mut addresses: Vec<Value> =
            self.ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
        addresses.push(json!({"type": "Hostname", "address": self.name}));
        let cidrs: Vec<String> = self.pod_cidrs.iter().map(IpNet::to_string).collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
            "status": {
                "addresses": addresses,
                "allocatable": {"cpu": "64", "memory": "256Gi", "pods": "250"},
                "capacity": {"cpu": "64", "memory": "256Gi", "pods": "250"},
                "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            },
        })
    }
}

impl NodeRef {
    /// A name as the bridge plugin gives: veth and eight hexadecimal digits.
    pub(crate) fn next_link(&self) -> String {
        format!("veth{:08x}", self.links.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn take_addresses(&self) -> Result<Vec<IpAddr>> {
        let mut taken = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let mut order = (taken.last.max(1) + 1..255).chain(2..255);
        let number = order.find(|number| !taken.taken.contains(number)).context("pod CIDR is full")?;
        taken.taken.insert(number);
        taken.last = number;
        Ok(self.pod_cidrs.iter().map(|cidr| host(*cidr, number)).collect())
    }

    /// The next pod gets these addresses if they are free, as an address manager that knows no order
    /// may give them.
    pub fn reuse(&self, ips: &[IpAddr]) {
        let mut taken = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let number =
            (2..255).find(|number| self.pod_cidrs.iter().any(|cidr| ips.contains(&host(*cidr, *number))));
        if let Some(number) = number {
            taken.last = number - 1;
        }
    }

    pub(crate) fn free_addresses(&self, ips: &[IpAddr]) {
        let mut taken = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        taken.taken.retain(|number| !self.pod_cidrs.iter().any(|cidr| ips.contains(&host(*cidr, *number))));
    }

    /// Its address of a family, by example.
    pub fn ip_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.ips.iter().copied().find(|ip| ip.is_ipv4() == like.is_ipv4())
    }
}

impl Deref for Node {
    type Target = NodeRef;

    fn deref(&self) -> &NodeRef {
        &self.0
    }
}

impl Deref for NodeRef {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}
