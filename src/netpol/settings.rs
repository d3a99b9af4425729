//! What the user chose for the policy room, as typed values.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use ferroute_policy::UnknownPods;
use ipnet::IpNet;

/// Choices of the policy room, built by the command line from its flags.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Name of the Node object this process runs for.
    pub node_name: Arc<str>,
    /// Period of the full audit (`--iptables-sync-period`).
    pub audit_period: Duration,
    /// What happens to addresses of this node's pod networks that no known pod has
    /// (`--netpol-unknown-pods`, `--netpol-default-deny`).
    pub unknown_pods: UnknownPods,
    /// Who serves Services, and so where their traffic is judged.
    pub services: Services,
}

/// How traffic from pods to Services is told from traffic to this node: it is judged with its
/// endpoint's address, after translation.
#[derive(Clone, Debug, PartialEq)]
pub enum Services {
    /// Our own proxy: its sets say exactly which addresses and ports are Services.
    Own {
        /// Its firewall guards other ports of VIPs (`--ipvs-permit-all`): they are left to it.
        guarded: bool,
    },
    /// Another proxy: these ranges, as kube-router has it.
    Foreign {
        /// `--service-cluster-ip-range`
        cluster: Vec<IpNet>,
        /// `--service-external-ip-range`
        external: Vec<IpNet>,
        /// `--loadbalancer-ip-range`
        load_balancer: Vec<IpNet>,
        /// `--service-node-port-range`
        node_ports: RangeInclusive<u16>,
    },
}
