//! The same stories with each make of router: as an external peer, signed, and as a route reflector.

use ferroute_bgp::message::{Community, LargeCommunity};
use ferroute_bgp::transport::{Password, Reach};
use ferroute_kit::serial;

use super::router::{Make, Neighbor, OWN, Router};
use super::*;

/// Four octets are needed for it.
pub const ROUTER_ASN: u32 = 4_200_000_002;

pub fn advertisement(prefix: &str, path: u32, attributes: Attributes) -> Advertisement {
    Advertisement { prefix: prefix.parse().unwrap(), path, attributes: Arc::new(attributes), tag: 0 }
}

pub fn router_as_peer(host: &Host, address: IpAddr, asn: u32) -> PeerConfig {
    PeerConfig { asn: PeerAsn::Exactly(Asn(asn)), ..host.as_peer(address) }
}

/// What a router is to the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A router of another AS, each node being one of its own.
    External,
    /// It reflects the routes of nodes that share its AS.
    Reflector,
}

impl Role {
    const SHARED_ASN: u32 = 64_512;

    pub fn router_asn(self) -> u32 {
        match self {
            Self::External => ROUTER_ASN,
            Self::Reflector => Self::SHARED_ASN,
        }
    }

    /// The same settings with the AS that a node has.
    pub fn of_node(self, settings: SpeakerConfig) -> SpeakerConfig {
        match self {
            Self::External => settings,
            Self::Reflector => SpeakerConfig { asn: Asn(Self::SHARED_ASN), ..settings },
        }
    }

    /// A node as the router's neighbour.
    pub fn neighbor(self, host: &Host, address: IpAddr) -> Neighbor {
        let asn = self.of_node(host.settings()).asn.0;
        Neighbor { address: Some(address), asn, client: self == Self::Reflector, ..Neighbor::default() }
    }
}

/// Each side asks the other for its routes again; GoBGP is only asked.
fn refresh_both_ways(router: &Router, host: &Host, node: &Node, key: IpAddr) {
    let before = node.peer(key).received.update;
    node.speaker.refresh(&key.into(), Families::ALL);
    eventually("a refresh", PATIENCE, || {
        let now = node.peer(key).received.update;
        if now > before { Ok(()) } else { Err(format!("{before} {now}")) }
    });
    let before = node.peer(key);
    let own = if key.is_ipv4() { host.v4() } else { host.v6() };
    if router.asks_again(own) {
        eventually("the router's refresh", PATIENCE, || {
            let now = node.peer(key);
            let asked = now.received.refresh > before.received.refresh;
            if asked && now.sent.update > before.sent.update { Ok(()) } else { Err(format!("{now:#?}")) }
        });
    }
}

/// Prefixes learned, whoever they are from.
pub fn learns(node: &Node, wanted: &[&str]) {
    eventually("routes", PATIENCE, || {
        let mut learned = node.learned(AfiSafi::Ipv4Unicast);
        learned.extend(node.learned(AfiSafi::Ipv6Unicast));
        match wanted.iter().find(|prefix| !learned.iter().any(|route| route.starts_with(**prefix))) {
            Some(prefix) => Err(format!("no {prefix} in {learned:?}")),
            None => Ok(()),
        }
    });
}

/// Both families over sessions of both families, attributes, refresh both ways, a wrong AS.
fn an_external_router(make: Make, name: &str) {
    let _serial = serial();
    let (a, b) = wire(name);
    let neighbors = [a.v4(), a.v6()].map(|address| Role::External.neighbor(&a, address));
    let router = Router::start(make, &b, ROUTER_ASN, &neighbors);
    let peers = |asn| [b.v4(), b.v6()].map(|address| router_as_peer(&b, address, asn)).to_vec();
    let attributes = Attributes {
        communities: vec![Community::new(64001, 7)],
        large_communities: vec![LargeCommunity { administrator: Asn(4_200_000_000), data1: 1, data2: 2 }],
        med: Some(50),
        ..Attributes::default()
    };
    let own = ["10.96.0.10/32", "2001:db8:a::10/128"];

    let node = a.start(a.restarting(false));
    node.speaker.set_advertisements(own.map(|prefix| advertisement(prefix, 0, attributes.clone())).to_vec());
    node.peers(peers(64_999));
    node.error(b.v4(), "4200000002");
    node.peers(peers(ROUTER_ASN));
    node.established(b.v4());
    node.established(b.v6());
    let community = router.community(64001, 7);
    router.shows(own[0], &["64001", "10.9.0.1", &community]);
    router.shows(own[1], &["64001", "fd09::1", &community]);
    learns(&node, &OWN);
    refresh_both_ways(&router, &a, &node, b.v4());
    node.never_flapped([b.v4(), b.v6()]);

    node.speaker.set_advertisements(vec![advertisement(own[1], 0, attributes.clone())]);
    router.loses(own[0]);
    router.shows(own[1], &["64001"]);
    node.never_flapped([b.v4(), b.v6()]);
}

#[test]
fn bird_as_an_external_router() {
    an_external_router(Make::Bird, "xb");
}

#[test]
fn frr_as_an_external_router() {
    an_external_router(Make::Frr, "xf");
}

#[test]
fn gobgp_as_an_external_router() {
    an_external_router(Make::Gobgp, "xg");
}

/// MD5 and TTL security at once, over both families; a wrong password is told.
fn a_signed_router(make: Make, name: &str) {
    let _serial = serial();
    let (a, b) = wire(name);
    let signed = |address| Neighbor {
        password: Some("open-sesame"),
        security: true,
        ..Role::External.neighbor(&a, address)
    };
    let router = Router::start(make, &b, ROUTER_ASN, &[signed(a.v4()), signed(a.v6())]);
    let node = a.start(a.settings());
    node.advertises(&["10.96.0.10/32", "2001:db8:a::10/128"]);
    let peers = |password: &str| {
        [b.v4(), b.v6()]
            .map(|address| PeerConfig {
                password: Some(Password::new(password.as_bytes()).unwrap()),
                reach: Some(Reach::Security(1)),
                ..router_as_peer(&b, address, ROUTER_ASN)
            })
            .to_vec()
    };
    node.peers(peers("wrong"));
    node.error(b.v4(), "another TCP MD5 password");
    node.error(b.v6(), "another TCP MD5 password");
    node.peers(peers("open-sesame"));
    node.established(b.v4());
    node.established(b.v6());
    router.shows("10.96.0.10/32", &["10.9.0.1"]);
    router.shows("2001:db8:a::10/128", &["fd09::1"]);
    learns(&node, &OWN);
    node.never_flapped([b.v4(), b.v6()]);
}

#[test]
fn bird_signed() {
    a_signed_router(Make::Bird, "sb");
}

#[test]
fn frr_signed() {
    a_signed_router(Make::Frr, "sf");
}

#[test]
fn gobgp_signed() {
    a_signed_router(Make::Gobgp, "sg");
}

/// Routes of both families over a single IPv6 session: first IPv4 with IPv6 next hops both ways (RFC 8950),
/// as where there are no other addresses, then with IPv4 next hops of which only the prefixes come by IPv6.
fn v4_over_v6(make: Make, name: &str) {
    let _serial = serial();
    let (a, b) = wire(name);
    const ASN: u32 = 4_200_000_001;
    for v6_next_hops in [true, false] {
        let peer = Neighbor { address: Some(a.v6()), asn: ASN, v6_next_hops, ..Neighbor::default() };
        let router = Router::start(make, &b, ROUTER_ASN, &[peer]);
        let mut settings = SpeakerConfig { asn: Asn(ASN), ..a.settings() };
        if v6_next_hops {
            settings.addresses.v4 = None;
        }
        let node = a.start(settings);
        let mut peer = router_as_peer(&b, b.v6(), ROUTER_ASN);
        peer.extended_next_hop = v6_next_hops;
        node.peers(vec![peer]);
        node.advertises(&["10.96.0.10/32", "2001:db8:a::10/128"]);
        let negotiated = node.established(b.v6()).negotiated.unwrap();
        assert_eq!(negotiated.codec.extended_next_hop, v6_next_hops);
        let hop = if v6_next_hops { "fd09::1" } else { "10.9.0.1" };
        router.shows("10.96.0.10/32", &["4200000001", hop]);
        router.shows("2001:db8:a::10/128", &["4200000001", "fd09::1"]);
        if v6_next_hops || make == Make::Bird {
            let hop = if v6_next_hops { "fd09::2" } else { "10.9.0.2" };
            learns(&node, &[&format!("{} via {hop}", OWN[0]), &format!("{} via fd09::2", OWN[1])]);
        } else {
            // GoBGP sends IPv6 next hops whether they are agreed or not, and FRR without zebra knows no IPv4
            // address of its own: the route counts as withdrawn, and the session stays (RFC 7606).
            learns(&node, &[&format!("{} via fd09::2", OWN[1])]);
            eventually("a flaw", PATIENCE, || match node.peer(b.v6()) {
                status if status.flawed_updates > 0 => Ok(()),
                status => Err(format!("{status:#?}")),
            });
            assert_eq!(node.learned(AfiSafi::Ipv4Unicast), [""; 0]);
        }
        node.never_flapped([b.v6()]);
    }
}

#[test]
fn bird_over_ipv6_alone() {
    v4_over_v6(Make::Bird, "vb");
}

#[test]
fn frr_over_ipv6_alone() {
    v4_over_v6(Make::Frr, "vf");
}

#[test]
fn gobgp_over_ipv6_alone() {
    v4_over_v6(Make::Gobgp, "vg");
}

/// A node says two paths to one prefix, the reflector passes both on, and another node takes both. The one
/// session is over IPv4, the other over IPv6, both with passwords and TTL security; a wrong AS and a wrong
/// password are told.
fn a_reflector(make: Make, name: &str) {
    let _serial = serial();
    let (a, r, c) = star(name);
    let role = Role::Reflector;
    let client = |host, address| Neighbor {
        password: Some("open-sesame"),
        security: true,
        add_paths: true,
        ..role.neighbor(host, address)
    };
    let router = Router::start(make, &r, role.router_asn(), &[client(&a, a.v4()), client(&c, c.v6())]);
    let start = |host: &Host, address| {
        let node = host.start(role.of_node(host.settings()));
        let peer = |asn, password: &str| {
            let mut peer = router_as_peer(&r, address, asn);
            (peer.add_path_send, peer.add_path_receive) = (Families::ALL, Families::ALL);
            peer.password = Some(Password::new(password.as_bytes()).unwrap());
            peer.reach = Some(Reach::Security(1));
            node.peers(vec![peer]);
        };
        peer(64_999, "open-sesame");
        node.error(address, "peer says AS 64512, configured 64999");
        peer(role.router_asn(), "wrong");
        node.error(address, "another TCP MD5 password");
        peer(role.router_asn(), "open-sesame");
        node
    };
    let (left, right) = (start(&a, r.v4()), start(&c, r.v6()));
    let path = |prefix, path: u32| {
        let attributes =
            Attributes { communities: vec![Community::new(64001, path as u16)], ..Attributes::default() };
        advertisement(prefix, path, attributes)
    };
    let (v4, v6) = ("10.96.0.10/32", "2001:db8:a::10/128");
    left.speaker.set_advertisements(vec![path(v4, 1), path(v4, 2), path(v6, 1), path(v6, 2)]);
    right.advertises(&["10.96.0.12/32"]);
    let negotiated = right.established(r.v6()).negotiated.unwrap();
    left.established(r.v4());
    assert_eq!(negotiated.peer_asn, Asn(role.router_asn()));
    router.shows(v4, &[&router.community(64001, 1), &router.community(64001, 2)]);
    for (prefix, next_hop) in [(v4, "10.9.0.1"), (v6, "fd09::1")] {
        let family = if prefix == v4 { AfiSafi::Ipv4Unicast } else { AfiSafi::Ipv6Unicast };
        eventually("both paths", PATIENCE, || {
            let paths = right.runtime.block_on(right.speaker.rib(move |rib| rib.paths(family))).unwrap();
            let mut reflected = Vec::new();
            for path in paths.iter().filter(|path| path.peer.is_some() && path.prefix.to_string() == prefix) {
                assert_eq!(path.attributes.originator_id, Some(RouterId(Ipv4Addr::new(10, 9, 0, 1))));
                assert_eq!(path.attributes.cluster_list, [RouterId(Ipv4Addr::new(10, 9, 0, 2))]);
                assert_eq!(path.attributes.next_hop.to_string(), next_hop);
                reflected.push(path.attributes.communities.clone());
            }
            reflected.sort();
            let wanted = [1, 2].map(|path| vec![Community::new(64001, path)]);
            if reflected == wanted { Ok(()) } else { Err(format!("{reflected:?} of {paths:#?}")) }
        });
    }
    refresh_both_ways(&router, &a, &left, r.v4());
    refresh_both_ways(&router, &c, &right, r.v6());
    // One of them goes, the other stays.
    left.speaker.set_advertisements(vec![path(v4, 2), path(v6, 2)]);
    eventually("one path", PATIENCE, || match right.learned(AfiSafi::Ipv4Unicast) {
        learned if learned.iter().filter(|route| route.starts_with(v4)).count() == 1 => Ok(()),
        learned => Err(format!("{learned:?}")),
    });
    left.never_flapped([r.v4()]);
    right.never_flapped([r.v6()]);
}

#[test]
fn bird_as_a_reflector() {
    a_reflector(Make::Bird, "rb");
}

#[test]
fn frr_as_a_reflector() {
    a_reflector(Make::Frr, "rf");
}

#[test]
fn gobgp_as_a_reflector() {
    a_reflector(Make::Gobgp, "rg");
}
