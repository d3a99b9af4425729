//! What the user chose for the Service room, as typed values.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

/// Choices of the Service room, built by the command line from its flags.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Name of the Node object this process runs for.
    pub node_name: Arc<str>,
    /// Period of the full audit (`--ipvs-sync-period`).
    pub audit_period: Duration,
    /// How long a removed TCP or SCTP destination may drain at weight 0
    /// (`--ipvs-graceful-period`); `None` deletes at once (`--ipvs-graceful-termination=false`).
    pub graceful_period: Option<Duration>,
    /// Hairpin for every Service (`--hairpin-mode`).
    pub hairpin_all: bool,
    /// Source-NAT all traffic through virtual servers (`--masquerade-all`).
    pub masquerade_all: bool,
    /// NodePorts on every local address (`--nodeport-bindon-all-ip`).
    pub node_port_on_all_addresses: bool,
    /// Guard VIPs in the filter table (`--ipvs-permit-all`).
    pub firewall: bool,
    /// Virtual servers on these addresses belong to somebody else (`--excluded-cidrs`).
    pub excluded_cidrs: Vec<IpNet>,
    /// Refuse external and load-balancer IPs outside the ranges below
    /// (`--strict-external-ip-validation`).
    pub strict_external_ips: bool,
    /// Allowed `externalIPs` (`--service-external-ip-range`).
    pub external_ip_ranges: Vec<IpNet>,
    /// Allowed load-balancer IPs (`--loadbalancer-ip-range`).
    pub load_balancer_ranges: Vec<IpNet>,
    /// Those of both that are bound whole, because they are advertised whole (`--advertise-ranges`): packets
    /// to an address that no Service has would else go back to the router, and come again.
    pub whole_ranges: Vec<IpNet>,
    /// Cluster IP ranges (`--service-cluster-ip-range`).
    pub cluster_ip_ranges: Vec<IpNet>,
    /// Whether the user gave the ranges; the default is a guess and is never bound as a whole.
    pub cluster_ip_ranges_given: bool,
    /// NodePort range (`--service-node-port-range`); a node port outside it is served and told.
    pub node_port_range: RangeInclusive<u16>,
    /// IPVS TCP timeout in whole seconds (`--service-tcp-timeout`); 0 leaves the kernel's.
    pub tcp_timeout: u32,
    /// IPVS FIN-WAIT timeout in whole seconds (`--service-tcpfin-timeout`); 0 leaves the kernel's.
    pub tcp_fin_timeout: u32,
    /// IPVS UDP timeout in whole seconds (`--service-udp-timeout`); 0 leaves the kernel's.
    pub udp_timeout: u32,
}
