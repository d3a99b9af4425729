//! A Service as the rooms see it: validated, annotations parsed, defaults filled in.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

use super::ServiceKey;

/// Transport protocol of a Service port. Others are refused with a [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
    /// SCTP, IP protocol 132.
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// `spec.type`, without the types that have no virtual server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceType {
    /// `ClusterIP`.
    ClusterIp,
    /// `NodePort`.
    NodePort,
    /// `LoadBalancer`.
    LoadBalancer,
}

/// `spec.externalTrafficPolicy` and `spec.internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster.
    #[default]
    Cluster,
    /// Only endpoints on the node that received the packet.
    Local,
}

/// An object (or part of one) that cannot be honoured as written. The rest of it is served.
/// Reported as an event on the object, a log line and a metric.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// CamelCase reason, as in an event.
    pub reason: &'static str,
    /// What, where and what to do.
    pub message: String,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Port name; empty for the single unnamed port. Matches the name in EndpointSlices.
    pub name: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on every VIP.
    pub port: NonZeroU16,
    /// Port on node addresses.
    pub node_port: Option<NonZeroU16>,
}

/// `kube-router.io/service.*` annotations, parsed.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Annotations {
    /// `service.scheduler`, as written and lower-cased (validated by the proxy room against what
    /// the kernel has); `None` means `rr`.
    pub scheduler: Option<Box<str>>,
    /// `service.schedflags`: bits for flag-1 (0x08), flag-2 (0x10), flag-3 (0x20).
    pub sched_flags: u32,
    /// `service.hairpin` present.
    pub hairpin: bool,
    /// `service.hairpin.externalips` present.
    pub hairpin_external_ips: bool,
    /// `service.skiplbips` present: load-balancer IPs are not programmed.
    pub skip_lb_ips: bool,
    /// `service.dsr`, as written.
    pub dsr: Option<Box<str>>,
    /// `service.advertise.clusterip|externalip|loadbalancerip`, for the routes room.
    pub advertise: [Option<bool>; 3],
}

/// A Service that has virtual servers: it has a cluster IP, is not ExternalName, not headless and
/// not claimed by another proxy (`service.kubernetes.io/service-proxy-name`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub key: ServiceKey,
    /// `metadata.uid`, for events.
    pub uid: Arc<str>,
    /// `metadata.creationTimestamp` in Unix seconds; the older of two claimants of one VIP and
    /// port wins.
    pub created: i64,
    /// `spec.type`.
    pub kind: ServiceType,
    /// `spec.clusterIPs` (or `clusterIP`), one per family at most.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs` that parse.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose `ipMode` is absent or `VIP`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Ports, in the order written; duplicates are dropped with a problem.
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` with its timeout in seconds (default 10800).
    pub affinity: Option<u32>,
    /// External policy; `kube-router.io/service.local: "true"` forces Local here.
    pub external_policy: TrafficPolicy,
    /// Internal policy; `kube-router.io/service.local: "true"` forces Cluster here.
    pub internal_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`, only with external policy Local and type LoadBalancer.
    pub health_check_node_port: Option<NonZeroU16>,
    /// `spec.loadBalancerSourceRanges` that parse; empty admits everybody.
    pub source_ranges: Vec<IpNet>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Parsed annotations.
    pub annotations: Annotations,
    /// What could not be honoured in this object.
    pub problems: Vec<Problem>,
}
