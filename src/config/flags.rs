//! The table of flags: names, kinds and defaults, compatible with kube-router's.
//!
//! Where a default differs from kube-router's, the help text says so and the README lists it.

/// What a flag's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A boolean; `--flag` alone means true.
    Switch,
    /// A Go duration.
    Duration,
    /// An unsigned decimal number up to this one.
    Number(u64),
    /// Any text.
    Text,
    /// Texts by comma or repetition.
    List,
}

/// Whose flag it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Room {
    /// The process: API access, logs, health, metrics.
    Daemon,
    /// The service proxy.
    Proxy,
    /// Network policy.
    Policy,
    /// BGP, tunnels, kernel routes, CNI file.
    Routes,
    /// Load-balancer addresses.
    LoadBalancer,
}

impl Room {
    /// Heading of the help text.
    pub(super) fn heading(self) -> &'static str {
        match self {
            Room::Daemon => "Process, API access, health, metrics, logs",
            Room::Proxy => "Service proxy",
            Room::Policy => "Network policy",
            Room::Routes => "Routes, BGP and the pod network",
            Room::LoadBalancer => "Load-balancer addresses (not part of this version)",
        }
    }

    /// What a message calls it.
    pub(super) fn words(self) -> &'static str {
        match self {
            Room::Daemon => "the process",
            Room::Proxy => "the service proxy",
            Room::Policy => "network policy",
            Room::Routes => "routes and BGP",
            Room::LoadBalancer => "load-balancer address assignment",
        }
    }
}

/// One flag.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// The default as it would be written; empty for an empty text or list.
    pub(super) default: &'static str,
    pub(super) room: Room,
    /// Whether a value other than the default asks for something that users would miss if the
    /// room is absent (peers, advertisements, default deny), as opposed to tuning it.
    pub(super) asks: bool,
    pub(super) help: &'static str,
}

const fn flag(room: Room, name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, default, room, asks: false, help }
}

impl Flag {
    const fn asking(mut self) -> Flag {
        self.asks = true;
        self
    }
}

const PORT: Kind = Kind::Number(u16::MAX as u64);
const U32: Kind = Kind::Number(u32::MAX as u64);

use Kind::{Duration, List, Number, Switch, Text};
use Room::{Daemon, LoadBalancer, Policy, Proxy, Routes};

/// Every flag of the daemon.
#[rustfmt::skip]
pub(super) const FLAGS: &[Flag] = &[
    flag(Daemon, "admin-socket", Text, "/run/ferroute/ferroute.sock",
        "Unix socket for `ferroute status` and the log level; root only"),
    flag(Daemon, "cache-sync-timeout", Duration, "1m0s",
        "Warn when the first lists of the cluster are not complete after this time; the process keeps trying and kernel state stays (kube-router exits)"),
    flag(Daemon, "cleanup-config", Switch, "false",
        "Remove everything of ours from this machine's kernel, nothing else, and exit"),
    flag(Daemon, "dry-run", Switch, "false",
        "With --cleanup-config: print what would be removed, remove nothing"),
    flag(Daemon, "enable-ipv4", Switch, "true",
        "Refuse IPv4 ranges when false; Services and policies follow the addresses that are there"),
    flag(Daemon, "enable-ipv6", Switch, "false",
        "Refuse IPv6 ranges when explicitly false; Services and policies follow the addresses that are there"),
    flag(Daemon, "enable-pprof", Switch, "false",
        "Refused when true: there are no Go profiles here; see /metrics"),
    flag(Daemon, "health-addr", Text, "127.0.0.1",
        "Address of /healthz, /livez and /readyz; empty means all addresses (kube-router's default; here it is loopback, which probes reach with `host: 127.0.0.1`)"),
    flag(Daemon, "health-port", PORT, "20244",
        "Port of /healthz, /livez and /readyz; 0 turns them off"),
    flag(Daemon, "hostname-override", Text, "",
        "Name of this machine's Node object; default: environment NODE_NAME, else the host name"),
    flag(Daemon, "kubeconfig", Text, "",
        "Kubeconfig file; default: the pod's service account"),
    flag(Daemon, "log-format", Text, "text",
        "Log lines on standard error as `text` or `json`"),
    flag(Daemon, "manifests", Text, "",
        "Read objects from the YAML and JSON files of this folder instead of an API server; changes are picked up live"),
    flag(Daemon, "master", Text, "",
        "URL of the API server; overrides the one of --kubeconfig or of the service account"),
    flag(Daemon, "metrics-addr", Text, "",
        "Address of the metrics server; empty means all addresses"),
    flag(Daemon, "metrics-path", Text, "/metrics",
        "HTTP path of the metrics"),
    flag(Daemon, "metrics-port", PORT, "0",
        "Port of the metrics server; 0 turns it off"),
    flag(Daemon, "run-firewall", Switch, "true",
        "Network policy"),
    flag(Daemon, "run-loadbalancer", Switch, "false",
        "Load-balancer address assignment; not part of this version: refused when true"),
    flag(Daemon, "run-router", Switch, "true",
        "Routes, BGP and the pod network; with --manifests only where it is written"),
    flag(Daemon, "run-service-proxy", Switch, "true",
        "IPVS service proxy"),
    flag(Daemon, "v", Text, "0",
        "Log level: 0 changes of state, 1 passes, 2 every object, 4 libraries too"),

    flag(Proxy, "excluded-cidrs", List, "",
        "Virtual servers on addresses in these CIDRs belong to somebody else and are never touched"),
    flag(Proxy, "hairpin-mode", Switch, "false",
        "Let the endpoints of every Service reach themselves through its VIPs"),
    flag(Proxy, "ipvs-graceful-period", Duration, "30s",
        "How long a removed endpoint may drain at weight 0; 0s deletes at once"),
    flag(Proxy, "ipvs-graceful-termination", Switch, "true",
        "Drain removed endpoints (kube-router's default is false); false deletes at once"),
    flag(Proxy, "ipvs-permit-all", Switch, "true",
        "Guard VIPs: their ports that are no Service's are rejected"),
    flag(Proxy, "ipvs-sync-period", Duration, "5m0s",
        "Period of the full audit"),
    flag(Proxy, "loadbalancer-ip-range", List, "",
        "Load-balancer IPs that Services may use"),
    flag(Proxy, "masquerade-all", Switch, "false",
        "Source-NAT all traffic through virtual servers"),
    flag(Proxy, "nodeport-bindon-all-ip", Switch, "false",
        "Serve NodePorts on every local address, not only the node's primary ones"),
    flag(Proxy, "runtime-endpoint", Text, "",
        "Container runtime socket for direct server return; not used in this version"),
    flag(Proxy, "service-cluster-ip-range", List, "10.96.0.0/12",
        "CIDRs of cluster IPs: one, or one per family"),
    flag(Proxy, "service-external-ip-range", List, "",
        "External IPs that Services may use"),
    flag(Proxy, "service-node-port-range", Text, "30000-32767",
        "Range of node ports, first-last or first:last"),
    flag(Proxy, "service-tcp-timeout", Duration, "0s",
        "IPVS timeout of idle TCP connections, whole seconds; 0s leaves the kernel's"),
    flag(Proxy, "service-tcpfin-timeout", Duration, "0s",
        "IPVS timeout after a FIN, whole seconds; 0s leaves the kernel's"),
    flag(Proxy, "service-udp-timeout", Duration, "0s",
        "IPVS timeout of UDP flows, whole seconds; 0s leaves the kernel's"),
    flag(Proxy, "strict-external-ip-validation", Switch, "true",
        "Refuse external and load-balancer IPs outside their ranges"),

    flag(Policy, "cni-conf-dir", Text, "",
        "Keep the CNI plugin in the network configuration of this folder, such as /etc/cni/net.d; empty leaves it alone"),
    flag(Policy, "cni-socket", Text, crate::cni::SOCKET,
        "Unix socket of the CNI plugin; root only; empty turns it off"),
    flag(Policy, "iptables-sync-period", Duration, "5m0s",
        "Period of the full policy audit"),
    flag(Policy, "netpol-default-deny", Switch, "false",
        "Close pods until their policies are known: what --netpol-unknown-pods=deny, the default here, does anyway"),
    flag(Policy, "netpol-unknown-pods", Text, "deny",
        "Addresses in this node's pod networks that no known pod has: `deny` closes them, `allow` leaves them open"),
    flag(Policy, "use-nftables-for-netpol", Switch, "false",
        "No effect: policies are written through iptables, in the form (nft or legacy) the host uses"),

    flag(Routes, "advertise-cluster-ip", Switch, "false",
        "Advertise cluster IPs to external peers").asking(),
    flag(Routes, "advertise-external-ip", Switch, "false",
        "Advertise external IPs to external peers").asking(),
    flag(Routes, "advertise-loadbalancer-ip", Switch, "false",
        "Advertise load-balancer IPs to external peers").asking(),
    flag(Routes, "advertise-pod-cidr", Switch, "true",
        "Advertise the node's pod CIDRs to external peers"),
    flag(Routes, "advertise-range-specifics", Switch, "false",
        "With --advertise-ranges: advertise the addresses inside as well"),
    flag(Routes, "advertise-ranges", Switch, "false",
        "Advertise ranges of Services whole, of the kinds above that are on, while an address inside is served"),
    flag(Routes, "auto-mtu", Switch, "true",
        "Set the MTU of kube-bridge and of the CNI file: that of the link between nodes, less what tunnels add"),
    flag(Routes, "bfd-desired-min-tx-interval", U32, "1000",
        "BFD transmit interval in milliseconds"),
    flag(Routes, "bfd-detection-multiplier", U32, "3",
        "BFD detection multiplier"),
    flag(Routes, "bfd-port", U32, "3784",
        "BFD port"),
    flag(Routes, "bfd-required-min-rx-interval", U32, "1000",
        "BFD receive interval in milliseconds"),
    flag(Routes, "bgp-graceful-restart", Switch, "false",
        "BGP graceful restart"),
    flag(Routes, "bgp-graceful-restart-deferral-time", Duration, "6m0s",
        "How long route selection may wait after a restart"),
    flag(Routes, "bgp-graceful-restart-time", Duration, "1m30s",
        "How long peers keep our routes while we restart"),
    flag(Routes, "bgp-holdtime", Duration, "1m30s",
        "BGP hold time of external peers"),
    flag(Routes, "bgp-next-hop-address", Text, "kubernetes-internal-ip",
        "Which address of this node routes lead to: kubernetes-internal-ip, first-found, can-reach=HOST, interface=REGEX,..., skip-interface=REGEX,... or cidr=CIDR,..."),
    flag(Routes, "bgp-port", U32, "179",
        "BGP port to listen on, and of node peers"),
    flag(Routes, "bgp-source-address", Text, "kubernetes-internal-ip",
        "From which address of this node sessions to external peers start, chosen in the same ways; other nodes know each other by their Node objects"),
    flag(Routes, "cluster-asn", U32, "0",
        "ASN of the node mesh; 0 means 64512"),
    flag(Routes, "disable-source-dest-check", Switch, "true",
        "On AWS, switch the source and destination check of this node's own instance off, in the background"),
    flag(Routes, "enable-bfd", Switch, "false",
        "BFD with the peers of the command line").asking(),
    flag(Routes, "enable-cni", Switch, "true",
        "Keep this node's pod CIDRs, and with --auto-mtu the MTU, in the CNI file (environment KUBE_ROUTER_CNI_CONF_FILE, else /etc/cni/net.d/10-kuberouter.conf)"),
    flag(Routes, "enable-ibgp", Switch, "true",
        "Peer with the other nodes"),
    flag(Routes, "enable-overlay", Switch, "true",
        "Tunnels to nodes in other subnets"),
    flag(Routes, "enable-pod-egress", Switch, "true",
        "Masquerade pod traffic that leaves the cluster"),
    flag(Routes, "gobgp-admin-address", Text, "127.0.0.1",
        "Address of the BGP admin server"),
    flag(Routes, "gobgp-admin-port", PORT, "50051",
        "Port of the BGP admin server; 0 turns it off"),
    flag(Routes, "injected-routes-sync-period", Duration, "1m0s",
        "Period in which learned routes are checked in the kernel"),
    flag(Routes, "nodes-full-mesh", Switch, "true",
        "All nodes share --cluster-asn and peer with each other"),
    flag(Routes, "overlay-address", Text, "",
        "Which address of this node tunnels start from, chosen as --bgp-next-hop-address, which is the default; they end at the next hop of the other node"),
    flag(Routes, "overlay-encap", Text, "ipip",
        "Tunnel encapsulation: ipip or fou"),
    flag(Routes, "overlay-encap-port", PORT, "5555",
        "Port of the fou encapsulation"),
    flag(Routes, "overlay-type", Text, "subnet",
        "Tunnels only across subnets (subnet) or to all nodes (full)"),
    flag(Routes, "override-nexthop", Switch, "false",
        "Own address of each external peering as next hop"),
    flag(Routes, "peer-router-asns", List, "",
        "ASNs of the external peers, one per address").asking(),
    flag(Routes, "peer-router-ips", List, "",
        "Addresses of the external peers").asking(),
    flag(Routes, "peer-router-multihop-ttl", Number(u8::MAX as u64), "0",
        "TTL for external peers more than one hop away"),
    flag(Routes, "peer-router-passwords", List, "",
        "TCP-MD5 secrets of the external peers in base64, blank for none").asking(),
    flag(Routes, "peer-router-passwords-file", Text, "",
        "File with the same list").asking(),
    flag(Routes, "peer-router-ports", List, "",
        "Ports of the external peers; default 179"),
    flag(Routes, "pod-egress-exclude-cidrs", List, "",
        "Destinations outside the cluster that see pods' own addresses in spite of --enable-pod-egress"),
    flag(Routes, "router-id", Text, "",
        "BGP router id: an IPv4 address or `generate`; default the node's IPv4 address"),
    flag(Routes, "routes-sync-period", Duration, "5m0s",
        "Period of the route audit"),

    flag(LoadBalancer, "loadbalancer-default-class", Switch, "true",
        "Also serve Services without a load-balancer class"),
    flag(LoadBalancer, "loadbalancer-sync-period", Duration, "1m0s",
        "Period of the assignment audit"),
];

/// Flags of older releases that are accepted with a warning: name, and what became of it.
pub(super) const DEPRECATED: &[(&str, &str)] = &[
    ("cluster-cidr", "has no effect: pod CIDRs are read from the Node objects"),
    ("config-sync-period", "has no effect: objects are watched, not polled"),
];

/// Flags that are refused with advice: name, and what to do.
pub(super) const REMOVED: &[(&str, &str)] = &[
    ("nodes-full-mesh-password", "never had an effect; remove it"),
    ("peer-router", "became --peer-router-ips, a list"),
    ("peer-asn", "became --peer-router-asns, a list"),
    ("run-network-policy-controller", "never existed; network policy is --run-firewall"),
];

/// The flag of this name.
pub(super) fn find(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}
