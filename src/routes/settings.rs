//! What the user chose for BGP, as typed values.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ferroute_bgp::bfd::Timers;
use ferroute_bgp::message::{Asn, RouterId};
use ferroute_bgp::transport::Password;

use crate::cluster::ObjectKey;
use crate::network::node_address::Methods;
use crate::proxy;

/// The AS of the node mesh unless `--cluster-asn` says another.
pub const DEFAULT_ASN: Asn = Asn(64512);

/// Choices for BGP, built by the command line from its flags.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Name of the Node object this process runs for.
    pub node_name: Arc<str>,
    /// Which addresses Services may use: the service proxy's choices, whether it runs here or not.
    pub services: proxy::Settings,
    /// Period in which everything is compared again (`--routes-sync-period`).
    pub audit_period: Duration,
    /// Peer with other nodes (`--enable-ibgp`).
    pub mesh: bool,
    /// AS of all nodes (`--cluster-asn`); `None` when each Node says its own (`--nodes-full-mesh=false`).
    pub cluster_asn: Option<Asn>,
    /// Port to listen on, and of other nodes (`--bgp-port`).
    pub port: u16,
    /// Identifier of this node (`--router-id`).
    pub router_id: RouterIdChoice,
    /// Graceful restart (RFC 4724), where it is on.
    pub restart: Option<Restart>,
    /// What is advertised unless a Service says otherwise.
    pub advertise: Advertise,
    /// External peers (`--peer-router-*`).
    pub external: External,
    /// How this node's addresses are chosen (`--bgp-source-address`, `--bgp-next-hop-address`).
    pub addresses: Methods,
}

/// How this node gets its BGP identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterIdChoice {
    /// The node's primary IPv4 address.
    NodeAddress,
    /// A number made from the node's primary address (`generate`): for nodes without IPv4.
    Generated,
    /// This one.
    Given(RouterId),
}

/// `--bgp-graceful-restart-*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// Seconds that peers keep this node's routes, 1 to 4095.
    pub time: u16,
    /// Longest wait for the routes of peers after a restart.
    pub deferral: Duration,
}

/// `--advertise-*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advertise {
    /// Cluster IPs, to external peers.
    pub cluster_ips: bool,
    /// `spec.externalIPs`, to external peers.
    pub external_ips: bool,
    /// Load-balancer IPs, to external peers.
    pub load_balancer_ips: bool,
    /// Pod CIDRs, to external peers; other nodes get them anyway.
    pub pod_cidrs: bool,
    /// Ranges of Services whole, in place of the addresses inside.
    pub ranges: bool,
    /// These addresses as well.
    pub specifics: bool,
}

/// What holds for peers outside the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct External {
    /// Peers of every node (`--peer-router-ips` and its companions). If there are any, annotations of
    /// Nodes name none.
    pub peers: Vec<ExternalPeer>,
    /// File with a secret for each of them (`--peer-router-passwords-file`), read again when it changes.
    pub passwords_file: Option<PathBuf>,
    /// Hold time in seconds (`--bgp-holdtime`), 3 and more.
    pub hold_time: u16,
    /// How many hops away peers may be (`--peer-router-multihop-ttl`), where it is more than one.
    pub multihop: Option<u8>,
    /// Own address of each peering as next hop (`--override-nexthop`).
    pub override_next_hop: bool,
}

/// A router outside the cluster, as the flags or annotations have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalPeer {
    /// Its address.
    pub address: IpAddr,
    /// Its AS.
    pub asn: Asn,
    /// Port to dial.
    pub port: u16,
    /// TCP MD5 secret (RFC 2385); never shown.
    pub password: Option<Password>,
    /// Where that secret is kept, if not here.
    pub secret: Option<SecretReference>,
    /// Address of this node to speak from, where it is not the usual.
    pub source: Option<IpAddr>,
    /// Timers of BFD, where it is on.
    pub bfd: Option<Timers>,
}

/// A value in a Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretReference {
    /// Namespace and name.
    pub secret: ObjectKey,
    /// The key in its `data`.
    pub key: Arc<str>,
}

/// Whether no peer can have this AS number (kube-router's list: 0, 23456, 64000-64511, 65535-131071 and
/// the last one).
pub fn is_reserved(asn: u32) -> bool {
    !matches!(
        asn,
        1..=23455 | 23457..=63999 | 64512..=65534 | 131_072..=4_199_999_999 | 4_200_000_000..=4_294_967_294
    )
}
