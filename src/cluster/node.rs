//! Nodes as the rooms see them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use ipnet::IpNet;

/// A Node, trimmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.uid`, for events.
    pub uid: Arc<str>,
    /// `status.addresses` of type InternalIP, in order.
    pub internal_ips: Vec<IpAddr>,
    /// `status.addresses` of type ExternalIP, in order.
    pub external_ips: Vec<IpAddr>,
    /// Pod CIDRs: annotation `kube-router.io/pod-cidrs`, else `pod-cidr`, else `spec.podCIDRs`,
    /// else `spec.podCIDR`.
    pub pod_cidrs: Vec<IpNet>,
    /// `spec.providerID`: whose machine it is, and which.
    pub provider_id: Option<Arc<str>>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Label `node.kubernetes.io/exclude-from-external-load-balancers` present.
    pub excluded_from_external_lb: bool,
    /// The machine is going: deletion has begun, or a taint says so
    /// (`ToBeDeletedByClusterAutoscaler`, `node.kubernetes.io/out-of-service`).
    pub draining: bool,
    /// `kube-router.io/*` annotations as written, for the routes room.
    pub annotations: Annotations,
}

/// Annotations by name. Some hold secrets of BGP peers: values are never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Annotations(pub BTreeMap<Box<str>, Box<str>>);

impl Deref for Annotations {
    type Target = BTreeMap<Box<str>, Box<str>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl fmt::Debug for Annotations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Node {
    /// The node's best address of a family: first InternalIP, else first ExternalIP.
    pub fn address(&self, ipv6: bool) -> Option<IpAddr> {
        self.internal_ips.iter().chain(&self.external_ips).find(|address| address.is_ipv6() == ipv6).copied()
    }
}
