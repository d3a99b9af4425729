//! From learned routes to routes of the kernel: which way a next hop is reached, and what is refused.
//! Pure.
//!
//! A next hop on a connected network is a gateway. One that is another node, and is not on a connected
//! network (or all of them, with `--overlay-type=full`), is reached through the tunnel to that node.
//! Routers outside the cluster never get a tunnel. What can be reached in neither way is refused, and so
//! is what would cut this node off: its own addresses, its own pods, networks it is connected to.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::settings::Reach;
use crate::host::Family;
use crate::host::forwarding::{ForwardingRoute, Hop};
use crate::host::route::{RouteKey, TABLE_MAIN};

/// The table of routes to other nodes' addresses through tunnels, for packets from pods; kube-router's
/// number.
pub const TABLE_PODS: u32 = 77;

/// The gateway of a shared IPv6 route in a tunnel: any link-local address will do, since nobody is asked for it.
const TUNNEL_END: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// What routes are decided by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Addresses of this machine.
    pub own: HashSet<IpAddr>,
    /// Networks of links on which routers or nodes may be, with the link's index.
    pub connected: Vec<(IpNet, u32)>,
    /// Networks of this machine's other links (pod bridges): never routed elsewhere.
    pub local: Vec<IpNet>,
    /// Addresses of the other nodes of the cluster.
    pub nodes: HashSet<IpAddr>,
    /// Tunnels that work, by their far end: the link's index.
    pub tunnels: BTreeMap<IpAddr, u32>,
    /// Who is reached through tunnels.
    pub overlay: Reach,
    /// Source for packets of this host into tunnels, by family.
    pub sources: BTreeMap<Family, IpAddr>,
    /// This node's pod networks.
    pub pods: Vec<IpNet>,
}

/// How a next hop is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As gateway on a connected network, over this link.
    Direct(u32),
    /// Through the tunnel to it.
    Tunnel,
}

/// Why a route is not in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// The next hop is an address of this machine.
    OwnNextHop(IpAddr),
    /// The next hop is none: unspecified, multicast, loopback or without its link.
    NoNextHop(IpAddr),
    /// The next hop is neither on a connected network nor a node that has a tunnel.
    NoWay(IpAddr),
    /// The tunnel to the next hop could not be made.
    NoTunnel(IpAddr),
    /// The tunnel's own packets would go into the tunnel.
    Recursive(IpAddr),
    /// It leads to this node's pods or addresses.
    OwnNetwork,
    /// The machine is connected to it.
    Connected,
    /// Somebody else has a route under the same key.
    Taken,
    /// The kernel refused it.
    Kernel,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::OwnNextHop(hop) => write!(
                f,
                "next hop {hop} is this machine; the peer must not send routes back, see its next hop settings"
            ),
            Refusal::NoNextHop(hop) => write!(f, "{hop} is no next hop; see the peer's next hop settings"),
            Refusal::NoWay(hop) => write!(
                f,
                "next hop {hop} is not on a connected network and no node of the cluster; let the peer set itself as \
                 next hop, or connect this machine to that network"
            ),
            Refusal::NoTunnel(hop) => write!(f, "there is no tunnel to {hop}; see the errors about tunnels"),
            Refusal::Recursive(hop) => {
                write!(f, "it covers {hop}, the far end of its own tunnel; advertise it without that address")
            }
            Refusal::OwnNetwork => {
                f.write_str("it leads to pods or addresses of this node; two nodes may not have the same pod CIDR")
            }
            Refusal::Connected => f.write_str("this machine is connected to that network, and keeps its own route"),
            Refusal::Taken => f.write_str(
                "another program has a route with the same prefix and metric; remove that one, or leave it in charge",
            ),
            Refusal::Kernel => f.write_str("the kernel refused it, see the last error"),
        }
    }
}

impl Surroundings {
    /// How a next hop is reached.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn way(&self, hop: IpAddr) -> Result<Way, Refusal> {
        let is_link_local = match hop {
            IpAddr::V4(hop) => hop.is_link_local() || hop.is_broadcast(),
            IpAddr::V6(hop) => hop.is_unicast_link_local(),
        };
        if is_link_local || hop.is_unspecified() || hop.is_loopback() || hop.is_multicast() {
            return Err(Refusal::NoNextHop(hop));
        }
        if self.own.contains(&hop) {
            return Err(Refusal::OwnNextHop(hop));
        }
        let direct = self
            .connected
            .iter()
            .filter(|(network, _)| network.contains(&hop))
            .max_by_key(|(network, link)| (network.prefix_len(), std::cmp::Reverse(*link)));
        let is_node = self.nodes.contains(&hop);
        match (direct, self.overlay) {
            (_, Reach::Full) | (None, Reach::Subnet) if is_node => Ok(Way::Tunnel),
            (Some((_, link)), _) => Ok(Way::Direct(*link)),
            (None, _) => Err(Refusal::NoWay(hop)),
        }
    }

    /// Far ends of the tunnels that these next hops need.
    pub fn tunnel_ends(&self, hops: impl IntoIterator<Item = IpAddr>) -> BTreeSet<IpAddr> {
        hops.into_iter().filter(|hop| self.way(*hop) == Ok(Way::Tunnel)).collect()
    }

    /// The route of a prefix, through every next hop that can be used.
    ///
    /// # Errors
    /// Why there is none; of several reasons the first next hop's.
    pub fn route(&self, prefix: IpNet, hops: &[IpAddr]) -> Result<ForwardingRoute, Refusal> {
        let prefix = prefix.trunc();
        let covers_own = prefix.prefix_len() == prefix.max_prefix_len() && self.own.contains(&prefix.addr());
        if covers_own || self.pods.iter().chain(&self.local).any(|own| own.trunc().contains(&prefix)) {
            return Err(Refusal::OwnNetwork);
        }
        if self.connected.iter().any(|(network, _)| network.trunc() == prefix) {
            return Err(Refusal::Connected);
        }
        let mut ways = Vec::new();
        let mut refusal = None;
        for hop in hops {
            match self.hop(prefix, *hop) {
                Ok(way) => ways.push(way),
                Err(why) => {
                    refusal.get_or_insert(why);
                }
            }
        }
        if ways.is_empty() {
            return Err(refusal.unwrap_or(Refusal::NoWay(Family::of(prefix.addr()).unspecified())));
        }
        let through_tunnel = ways.iter().any(|way| way.gateway.is_none());
        if prefix.addr().is_ipv6() && ways.len() > 1 {
            // IPv6 shares a route among gateways only, and a tunnel has just one end to go to.
            ways.iter_mut().for_each(|way| way.gateway = way.gateway.or(Some(TUNNEL_END)));
        }
        let source = through_tunnel.then(|| self.sources.get(&Family::of(prefix.addr())).copied()).flatten();
        Ok(ForwardingRoute::new(prefix, TABLE_MAIN, ways, source))
    }

    fn hop(&self, prefix: IpNet, hop: IpAddr) -> Result<Hop, Refusal> {
        match self.way(hop)? {
            Way::Direct(device) => Ok(Hop { device, gateway: Some(hop) }),
            Way::Tunnel if prefix.contains(&hop) => Err(Refusal::Recursive(hop)),
            // An IPv4 tunnel carries IPv4 only.
            Way::Tunnel if prefix.addr().is_ipv6() && hop.is_ipv4() => Err(Refusal::NoNextHop(hop)),
            Way::Tunnel => match self.tunnels.get(&hop) {
                Some(device) => Ok(Hop { device: *device, gateway: None }),
                None => Err(Refusal::NoTunnel(hop)),
            },
        }
    }

    /// Routes to other nodes' own addresses, for packets from pods: through the tunnel too, so that a
    /// firewall between the subnets never sees pod addresses.
    pub fn routes_to_nodes(&self) -> impl Iterator<Item = ForwardingRoute> {
        self.tunnels.iter().map(|(end, device)| {
            let hop = Hop { device: *device, gateway: None };
            ForwardingRoute::new(IpNet::from(*end), TABLE_PODS, vec![hop], None)
        })
    }
}

/// The key of a prefix's route in table main.
pub fn key(prefix: IpNet) -> RouteKey {
    RouteKey { destination: prefix.trunc(), table: TABLE_MAIN, metric: crate::host::forwarding::METRIC }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A node in 192.168.1.0/24 and fd01::/64; others beside it (.2) and behind a router (192.168.2.2,
    /// fd02::2), with tunnels to those; a router (.254) outside the cluster.
    fn scene(overlay: Reach) -> Surroundings {
        let tunnels = match overlay {
            Reach::Off => BTreeMap::new(),
            Reach::Subnet => BTreeMap::from([(ip("192.168.2.2"), 11), (ip("fd02::2"), 12)]),
            Reach::Full => {
                BTreeMap::from([(ip("192.168.2.2"), 11), (ip("fd02::2"), 12), (ip("192.168.1.2"), 13)])
            }
        };
        Surroundings {
            own: ["192.168.1.1", "fd01::1", "10.1.0.1"].map(ip).into(),
            connected: vec![(net("192.168.1.0/24"), 2), (net("fd01::/64"), 2)],
            local: vec![net("10.1.0.0/24")],
            nodes: ["192.168.1.2", "192.168.2.2", "192.168.2.3", "fd02::2"].map(ip).into(),
            tunnels,
            overlay,
            sources: [(Family::V4, ip("192.168.1.1")), (Family::V6, ip("fd01::1"))].into(),
            pods: vec![net("10.1.0.0/24"), net("fd10:1::/64")],
        }
    }

    fn route(scene: &Surroundings, prefix: &str, hops: &[&str]) -> Result<String, Refusal> {
        let hops: Vec<IpAddr> = hops.iter().map(|hop| ip(hop)).collect();
        scene.route(net(prefix), &hops).map(|route| route.to_string().replace(" metric 20000 proto 70", ""))
    }

    #[test]
    fn a_node_in_another_subnet_gets_a_tunnel_and_a_neighbour_none() {
        let scene = scene(Reach::Subnet);
        let is = |prefix, hops, wanted: &str| assert_eq!(route(&scene, prefix, hops), Ok(wanted.to_owned()));
        is("10.2.0.0/24", &["192.168.1.2"], "unicast 10.2.0.0/24 via 192.168.1.2 dev index 2 table 254");
        is("10.3.0.0/24", &["192.168.2.2"], "unicast 10.3.0.0/24 dev index 11 table 254 src 192.168.1.1");
        is("fd10:3::/64", &["fd02::2"], "unicast fd10:3::/64 dev index 12 table 254 src fd01::1");
        // A tunnel over IPv6 carries IPv4.
        is("10.3.0.0/24", &["fd02::2"], "unicast 10.3.0.0/24 dev index 12 table 254 src 192.168.1.1");
        is(
            "203.0.113.0/24",
            &["192.168.1.254", "192.168.1.2"],
            "unicast 203.0.113.0/24 via 192.168.1.2 dev index 2 and via 192.168.1.254 dev index 2 table 254",
        );
        is(
            "2001:db8::/64",
            &["fd02::2", "fd01::7"],
            "unicast 2001:db8::/64 via fd01::7 dev index 2 and via fe80::1 dev index 12 table 254 src fd01::1",
        );
        // One way that works is enough.
        is(
            "10.4.0.0/24",
            &["192.168.9.9", "192.168.1.2"],
            "unicast 10.4.0.0/24 via 192.168.1.2 dev index 2 table 254",
        );
    }

    #[test]
    fn full_tunnels_to_neighbours_too_but_never_to_routers() {
        let full = scene(Reach::Full);
        assert_eq!(
            route(&full, "10.2.0.0/24", &["192.168.1.2"]),
            Ok("unicast 10.2.0.0/24 dev index 13 table 254 src 192.168.1.1".to_owned())
        );
        assert_eq!(
            route(&full, "10.9.0.0/24", &["192.168.1.254"]),
            Ok("unicast 10.9.0.0/24 via 192.168.1.254 dev index 2 table 254".to_owned())
        );
        assert_eq!(route(&full, "10.9.0.0/24", &["198.51.100.1"]), Err(Refusal::NoWay(ip("198.51.100.1"))));
        let off = scene(Reach::Off);
        assert_eq!(route(&off, "10.3.0.0/24", &["192.168.2.2"]), Err(Refusal::NoWay(ip("192.168.2.2"))));
        assert!(route(&off, "10.2.0.0/24", &["192.168.1.2"]).is_ok());
    }

    #[test]
    fn what_would_cut_the_node_off_is_refused() {
        let scene = scene(Reach::Subnet);
        for (prefix, hop, why) in [
            ("192.168.1.0/24", "192.168.1.2", Refusal::Connected),
            ("fd01::/64", "fd02::2", Refusal::Connected),
            ("10.1.0.0/24", "192.168.1.2", Refusal::OwnNetwork),
            ("10.1.0.128/25", "192.168.1.2", Refusal::OwnNetwork),
            ("fd10:1::5/128", "fd02::2", Refusal::OwnNetwork),
            ("192.168.1.1/32", "192.168.1.2", Refusal::OwnNetwork),
            ("10.2.0.0/24", "192.168.1.1", Refusal::OwnNextHop(ip("192.168.1.1"))),
            ("10.2.0.0/24", "0.0.0.0", Refusal::NoNextHop(ip("0.0.0.0"))),
            ("fd10:2::/64", "fe80::1", Refusal::NoNextHop(ip("fe80::1"))),
            ("10.2.0.0/24", "224.0.0.5", Refusal::NoNextHop(ip("224.0.0.5"))),
            ("192.168.0.0/16", "192.168.2.2", Refusal::Recursive(ip("192.168.2.2"))),
            ("0.0.0.0/0", "192.168.2.2", Refusal::Recursive(ip("192.168.2.2"))),
            ("10.2.0.0/24", "192.168.2.3", Refusal::NoTunnel(ip("192.168.2.3"))),
            ("fd10:2::/64", "192.168.2.2", Refusal::NoNextHop(ip("192.168.2.2"))),
        ] {
            assert_eq!(route(&scene, prefix, &[hop]), Err(why), "{prefix} via {hop}");
            assert!(why.to_string().len() > 20);
        }
        // A wider one does no harm: the kernel prefers what is narrower.
        assert!(route(&scene, "10.0.0.0/8", &["192.168.1.2"]).is_ok());
    }

    #[test]
    fn pods_reach_other_nodes_through_their_tunnels() {
        let scene = scene(Reach::Subnet);
        let routes: Vec<String> = scene.routes_to_nodes().map(|route| route.to_string()).collect();
        assert_eq!(
            routes,
            [
                "unicast 192.168.2.2/32 dev index 11 table 77 metric 20000 proto 70",
                "unicast fd02::2/128 dev index 12 table 77 metric 20000 proto 70",
            ]
        );
        let hops = ["192.168.1.2", "192.168.2.2", "192.168.2.3", "198.51.100.1"].map(ip);
        assert_eq!(scene.tunnel_ends(hops), ["192.168.2.2", "192.168.2.3"].map(ip).into());
    }

    proptest! {
        #[test]
        fn no_route_leads_home_or_to_nowhere(
            prefix in any::<IpAddr>(), length in 0u8..=32, hops in prop::collection::vec(0usize..8, 1..4),
        ) {
            const HOPS: [&str; 8] = [
                "192.168.1.1", "192.168.1.2", "192.168.1.254", "192.168.2.2", "192.168.2.3", "fd02::2", "fd01::7", "::",
            ];
            let prefix = IpNet::new(prefix, length).unwrap();
            let hops: Vec<IpAddr> = hops.into_iter().map(|hop| ip(HOPS[hop])).collect();
            let scene = scene(Reach::Subnet);
            if let Ok(route) = scene.route(prefix, &hops) {
                prop_assert!(!route.hops.is_empty() && route.key == key(prefix));
                for hop in &route.hops {
                    prop_assert!(hop.device != 0 && hop.gateway.is_none_or(|via| !scene.own.contains(&via)));
                }
                prop_assert!(prefix.addr().is_ipv4() || route.hops.len() == 1
                    || route.hops.iter().all(|hop| hop.gateway.is_some()));
            }
        }
    }
}
