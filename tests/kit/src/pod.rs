//! A pod: a namespace behind a veth pair, and the echo servers in it.

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;

use crate::Netns;
use crate::cluster::{NodeRef, default_route};
use crate::traffic::Protocol;
use crate::workload::{Identity, Workload};

/// What a pod is called and listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Ports that echo.
    pub ports: Vec<(Protocol, u16)>,
}

impl PodSpec {
    /// A pod of namespace `default` that echoes on port 8080 by TCP and UDP.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            namespace: "default".into(),
            ports: vec![(Protocol::Tcp, 8080), (Protocol::Udp, 8080)],
        }
    }

    /// In this namespace.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Echoing on exactly these ports.
    pub fn ports(mut self, ports: impl Into<Vec<(Protocol, u16)>>) -> Self {
        self.ports = ports.into();
        self
    }
}

/// A running pod. Dropped: servers closed, veth pair deleted, addresses free again.
///
/// Dereferences to its namespace, so `pod.tcp(address)` is a client inside the pod.
#[derive(Debug)]
pub struct Pod {
    /// What it was made from.
    pub spec: PodSpec,
    /// Its addresses, IPv4 before IPv6.
    pub ips: Vec<IpAddr>,
    workload: Option<Workload>,
    netns: Netns,
    node: Arc<NodeRef>,
    link: String,
}

impl Pod {
    /// `chain` runs between the pod's network and its first process, as further CNI plugins do.
    pub(crate) fn start(
        node: &Arc<NodeRef>,
        spec: PodSpec,
        chain: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<Self> {
        let ips = node.take_addresses().with_context(|| format!("pod {}", spec.name))?;
        let identity = Identity { pod: spec.name.clone(), namespace: spec.namespace.clone() };
        let link = node.next_link();
        let netns = Netns::new(format!("{}-{}", node.name, spec.name))?;
        let mut pod = Self { spec, ips, workload: None, netns, node: node.clone(), link };
        pod.connect().and_then(|()| chain(&pod)).with_context(|| format!("pod {identity}"))?;
        pod.workload = Some(Workload::start(&pod.netns, identity, &pod.ips, &pod.spec.ports)?);
        Ok(pod)
    }

    /// As the `bridge` CNI plugin does it: a veth pair, one end on kube-bridge in hairpin mode, the
    /// other called eth0, the default route through the bridge's address.
    fn connect(&self) -> Result<()> {
        let bridge = self.node.netns.link_index("kube-bridge")?;
        let outside = self.node.netns.links()?;
        crate::cluster::quiet_ipv6(&self.netns)?;
        outside.add_veth(&self.link, "eth0", self.netns.fd())?;
        outside.enslave(&self.link, bridge, true)?;
        let inside = self.netns.links()?;
        inside.up("eth0")?;
        let index = self.netns.link_index("eth0")?;
        for (ip, cidr) in self.ips.iter().zip(&self.node.pod_cidrs) {
            inside.add_address(index, IpNet::new(*ip, cidr.prefix_len())?)?;
            inside.set_route(default_route(*ip), &[crate::cluster::host(*cidr, 1)])?;
        }
        Ok(())
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The name of the node it runs on.
    pub fn node(&self) -> &str {
        &self.node.name
    }

    /// Its end of the veth pair in the node.
    pub fn link(&self) -> &str {
        &self.link
    }

    /// Its IPv4 address.
    pub fn ipv4(&self) -> Option<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv4)
    }

    /// Its IPv6 address.
    pub fn ipv6(&self) -> Option<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv6)
    }

    /// The echo servers, until [`Pod::crash`].
    pub fn workload(&self) -> Option<&Workload> {
        self.workload.as_ref()
    }

    /// Ends the servers at once; the pod's address stays and refuses connections.
    pub fn crash(&mut self) {
        self.workload = None;
    }
}

impl Deref for Pod {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.workload = None;
        // The kernel takes a namespace apart some time after its last user has gone; the link must
        // not be seen until then.
        if let Err(error) = self.node.netns.links().and_then(|links| links.delete(&self.link)) {
            eprintln!("pod {}: {error:#}", self.spec.name);
        }
        self.node.free_addresses(&self.ips);
    }
}
