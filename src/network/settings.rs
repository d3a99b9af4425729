//! What the user chose for the pod network, as typed values.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::node_address::Methods;
use crate::host::tunnel::Encapsulation;

/// Who is reached through tunnels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// Nobody (`--enable-overlay=false`).
    Off,
    /// Nodes in other subnets (`--overlay-type=subnet`).
    #[default]
    Subnet,
    /// All nodes (`--overlay-type=full`).
    Full,
}

/// Choices of the room, built by the command line from its flags.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Name of the Node object this process runs for.
    pub node_name: Arc<str>,
    /// Period of the full audit (`--routes-sync-period`, `--injected-routes-sync-period`).
    pub audit_period: Duration,
    /// `--enable-overlay`, `--overlay-type`.
    pub overlay: Reach,
    /// `--overlay-encap`, `--overlay-encap-port`.
    pub encapsulation: Encapsulation,
    /// Masquerade traffic of pods that leaves the cluster (`--enable-pod-egress`).
    pub egress: bool,
    /// Destinations outside the cluster that still see pods' own addresses.
    pub egress_exclude: Vec<IpNet>,
    /// Set MTUs (`--auto-mtu`).
    pub auto_mtu: bool,
    /// The network configuration to keep (`--enable-cni`, environment KUBE_ROUTER_CNI_CONF_FILE).
    pub cni_file: Option<PathBuf>,
    /// How node addresses are chosen.
    pub addresses: Methods,
    /// On AWS, let this node's instance send and take packets of pods (`--disable-source-dest-check`).
    pub disable_source_check: bool,
}
