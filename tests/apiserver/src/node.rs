//! Nodes as tests describe them, and as objects.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::clock;

/// A node to register.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// Name, and hostname label.
    pub name: String,
    /// Internal addresses, primary family first.
    pub addresses: Vec<IpAddr>,
    /// External addresses.
    pub external: Vec<IpAddr>,
    /// `spec.podCIDRs`; taken from the server's pod ranges when empty.
    pub pod_cidrs: Vec<IpNet>,
    /// `topology.kubernetes.io/zone`
    pub zone: Option<String>,
    /// More labels.
    pub labels: Vec<(String, String)>,
}

impl NodeSpec {
    /// A node with internal addresses.
    pub fn new(name: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { name: name.into(), addresses: addresses.into_iter().collect(), ..Self::default() }
    }

    /// The same node with these pod ranges.
    #[must_use]
    pub fn pod_cidrs(mut self, cidrs: impl IntoIterator<Item = IpNet>) -> Self {
        self.pod_cidrs = cidrs.into_iter().collect();
        self
    }

    /// The same node in a zone.
    #[must_use]
    pub fn zone(mut self, zone: &str) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// The Node object: Ready.
    pub fn object(&self) -> Value {
        let now = clock::now();
        let mut labels = json!({
            "kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        });
        if let Some(zone) = &self.zone {
            labels["topology.kubernetes.io/zone"] = zone.as_str().into();
        }
        for (key, value) in &self.labels {
            labels[key] = value.as_str().into();
        }
        let address = |kind: &str, text: String| json!({"type": kind, "address": text});
        let mut addresses: Vec<Value> =
            self.addresses.iter().map(|a| address("InternalIP", a.to_string())).collect();
        addresses.extend(self.external.iter().map(|a| address("ExternalIP", a.to_string())));
        addresses.push(address("Hostname", self.name.clone()));
        let condition = |kind: &str, status: &str, reason: &str, message: &str| {
            json!({"type": kind, "status": status, "reason": reason, "message": message,
                "lastHeartbeatTime": now, "lastTransitionTime": now})
        };
        let capacity = json!({"cpu": "4", "memory": "8Gi", "pods": "110", "ephemeral-storage": "100Gi"});
        let mut spec = json!({});
        if let Some(first) = self.pod_cidrs.first() {
            spec["podCIDR"] = first.to_string().into();
            spec["podCIDRs"] = self.pod_cidrs.iter().map(ToString::to_string).collect();
        }
        json!({
            "kind": "Node", "apiVersion": "v1",
            "metadata": {"name": self.name, "labels": labels},
            "spec": spec,
            "status": {
                "addresses": addresses, "capacity": capacity, "allocatable": capacity,
                "conditions": [
                    condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "enough memory"),
                    condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "no disk pressure"),
                    condition("PIDPressure", "False", "KubeletHasSufficientPID", "enough pids"),
                    condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
                ],
                "nodeInfo": {
                    "kubeletVersion": "v1.33.1", "kubeProxyVersion": "", "osImage": "Debian GNU/Linux",
                    "kernelVersion": "6.1", "containerRuntimeVersion": "containerd://2.0.0", "architecture": "amd64",
                    "operatingSystem": "linux", "bootID": "", "machineID": "", "systemUUID": "",
                },
            },
        })
    }
}

/// The `nth` range for a node out of a cluster range: /24 for IPv4, /64 for IPv6 (or as much as fits).
pub fn node_range(cluster: &IpNet, nth: usize) -> Option<IpNet> {
    let wanted = if cluster.addr().is_ipv4() { 24 } else { 64 };
    let length = wanted.max(cluster.prefix_len().saturating_add(4)).min(cluster.max_prefix_len());
    match cluster {
        IpNet::V4(net) => net.subnets(length).ok()?.nth(nth).map(IpNet::V4),
        IpNet::V6(net) => net.subnets(length).ok()?.nth(nth).map(IpNet::V6),
    }
}
