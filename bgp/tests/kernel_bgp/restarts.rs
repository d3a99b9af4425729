//! How sessions with each make of router end and begin again: two connections at once, silence, and processes
//! that are killed on either side.

use ferroute_bgp::speaker::Watch;
use ferroute_kit::assert::throughout;
use ferroute_kit::serial;

use super::interop::{Role, learns, router_as_peer};
use super::router::{Make, Neighbor, OWN, Router};
use super::*;

/// TCP connections of BGP that this host has.
fn connections(host: &Host) -> usize {
    let bgp = ["-Htn", "state", "established", "( sport = :179 or dport = :179 )"];
    host.netns.exec("ss", &bgp).unwrap().lines().count()
}

/// Both dial and both connections come up before either side can say a word on them: one session comes of
/// it and stays (RFC 4271 section 6.8). Then one side falls silent for the hold time, and the other.
fn two_connections_and_silence(make: Make, name: &str, role: Role) {
    let _serial = serial();
    let (a, b) = wire(name);
    let words = ["-p", "tcp", "--tcp-flags", "PSH", "PSH"];
    [&a, &b].iter().for_each(|host| host.filter("-A", &words));
    let _router = Router::start(make, &b, role.router_asn(), &[role.neighbor(&a, a.v4())]);
    let node = a.start(role.of_node(a.settings()));
    // What BIRD has to say when a timer ends it says up to 3 s later (its poll does not know of it), and
    // this side would have lost patience too.
    let hold_time = if make == Make::Bird { 6 } else { 3 };
    node.peers(vec![PeerConfig { hold_time, ..router_as_peer(&b, b.v4(), role.router_asn()) }]);
    // GoBGP stops to dial when it has accepted a connection, and closes what it accepts when it has dialed.
    let both = if make == Make::Gobgp { 1 } else { 2 };
    eventually("all connections", PATIENCE, || match connections(&a) {
        count if count == both => Ok(()),
        count => Err(format!("{count} connections")),
    });
    [&a, &b].iter().for_each(|host| host.filter("-D", &words));
    assert_eq!(node.established(b.v4()).negotiated.unwrap().hold_time, hold_time);
    eventually("one connection", PATIENCE, || match connections(&a) {
        1 => Ok(()),
        count => Err(format!("{count} connections")),
    });
    throughout("one session", Duration::from_secs(1), || match node.peer(b.v4()) {
        status if (status.established, status.flaps) == (1, 0) => Ok(()),
        status => Err(format!("{status:#?}")),
    });
    // Acknowledgements pass, or the other side's words would wait behind each other (RFC 896).
    let silent = format!("nothing heard from the peer for {hold_time} s (hold time)");
    for (host, error) in [(&a, "hold timer expired (4/0)"), (&b, &*silent)] {
        host.filter("-A", &words);
        node.error(b.v4(), error);
        host.filter("-D", &words);
        node.established(b.v4());
    }
    learns(&node, &OWN);
}

#[test]
fn bird_ends_sessions() {
    two_connections_and_silence(Make::Bird, "eb", Role::External);
}

#[test]
fn frr_ends_sessions() {
    two_connections_and_silence(Make::Frr, "ef", Role::External);
}

#[test]
fn gobgp_ends_sessions() {
    two_connections_and_silence(Make::Gobgp, "eg", Role::External);
}

#[test]
fn bird_reflecting_ends_sessions() {
    two_connections_and_silence(Make::Bird, "ib", Role::Reflector);
}

#[test]
fn frr_reflecting_ends_sessions() {
    two_connections_and_silence(Make::Frr, "if", Role::Reflector);
}

#[test]
fn gobgp_reflecting_ends_sessions() {
    two_connections_and_silence(Make::Gobgp, "ig", Role::Reflector);
}

/// Prefixes of which a watch has seen no path at some time since the last look.
fn lost(watch: &mut Watch) -> Vec<String> {
    let gone = watch.take(usize::MAX).routes.into_iter().filter(|route| route.paths.is_empty());
    let mut prefixes: Vec<String> = gone.map(|route| route.prefix.to_string()).collect();
    prefixes.sort();
    prefixes.dedup();
    prefixes
}

/// A watch that has seen what there is.
fn watched(node: &Node) -> Watch {
    let mut watch = node.speaker.watch();
    node.runtime.block_on(watch.next(usize::MAX));
    watch.take(usize::MAX);
    watch
}

/// No path from before a restart is left.
fn refreshed(node: &Node, key: IpAddr) {
    eventually("fresh routes", PATIENCE, || {
        let status = node.peer(key);
        let stale = status.prefixes.iter().any(|(_, counts)| counts.stale > 0);
        if stale || status.keeping_routes { Err(format!("{status:#?}")) } else { Ok(()) }
    });
}

/// Two nodes and a router between them, of three ASes or of one in which the router reflects. A node is
/// killed and comes back with a route less; then the router is, and does. What comes back is never lost,
/// neither at the neighbour nor behind it, and what does not is gone at the end.
fn kills(make: Make, name: &str, role: Role) {
    let _serial = serial();
    let (a, r, c) = star(name);
    let router_asn = role.router_asn();
    let as_neighbor = |host: &Host, address: IpAddr| Neighbor {
        v6_next_hops: address.is_ipv6(),
        ..role.neighbor(host, address)
    };
    let neighbors = [as_neighbor(&a, a.v4()), as_neighbor(&c, c.v6())];
    let own = [OWN[0], OWN[1], "203.0.113.0/24", "2001:db8:c::/48"];
    let router = Router::originating(make, &r, router_asn, &neighbors, &own);
    let start = |host: &Host, address: IpAddr, restarted| {
        let node = host.start(role.of_node(host.restarting(restarted)));
        let peer = router_as_peer(&r, address, router_asn);
        node.peers(vec![PeerConfig { extended_next_hop: address.is_ipv6(), ..peer }]);
        node
    };
    let (left, right) = (start(&a, r.v4(), false), start(&c, r.v6(), false));
    let said = ["10.96.0.10/32", "2001:db8:a::10/128"];
    left.advertises(&[said[0], said[1], "10.96.0.11/32"]);
    right.advertises(&[]);
    let all = [&own[..], &said, &["10.96.0.11/32"]].concat();
    learns(&left, &own);
    learns(&right, &all);
    let mut watch = watched(&right);

    left.kill();
    throughout("kept routes", Duration::from_secs(1), || {
        match said.iter().find(|prefix| !router.has(prefix)) {
            None => Ok(()),
            Some(prefix) => Err(format!("{prefix} is withdrawn")),
        }
    });
    let left = start(&a, r.v4(), true);
    left.established(r.v4());
    learns(&left, &own);
    assert!(all.iter().all(|prefix| router.has(prefix)));
    left.advertises(&said);
    router.loses("10.96.0.11/32");
    learns(&right, &said);
    eventually("the withdrawal", PATIENCE, || match right.learned(AfiSafi::Ipv4Unicast) {
        learned if learned.iter().any(|route| route.starts_with("10.96.0.11/32")) => {
            Err(format!("{learned:?}"))
        }
        _ => Ok(()),
    });
    assert_eq!(lost(&mut watch), ["10.96.0.11/32"]);

    let mut watches = [(&left, r.v4(), watched(&left)), (&right, r.v6(), watch)];
    router.kill();
    for (node, address, _) in &watches {
        eventually("kept routes", PATIENCE, || {
            let status = node.peer(*address);
            let stale: u64 = status.prefixes.iter().map(|(_, counts)| counts.stale).sum();
            if status.keeping_routes && stale >= 4 { Ok(()) } else { Err(format!("{status:#?}")) }
        });
        learns(node, &own);
    }
    let router = Router::restart(make, &r, router_asn, &neighbors, &OWN);
    for (node, address, watch) in &mut watches {
        node.established(*address);
        refreshed(node, *address);
        learns(node, &OWN);
        assert_eq!(lost(watch), ["2001:db8:c::/48", "203.0.113.0/24"]);
    }
    learns(&right, &said);
    assert!(said.iter().all(|prefix| router.has(prefix)));
}

#[test]
fn bird_and_kills() {
    kills(Make::Bird, "kb", Role::External);
}

#[test]
fn frr_and_kills() {
    kills(Make::Frr, "kf", Role::External);
}

#[test]
fn gobgp_and_kills() {
    kills(Make::Gobgp, "kg", Role::External);
}

#[test]
fn bird_reflecting_and_kills() {
    kills(Make::Bird, "lb", Role::Reflector);
}

#[test]
fn frr_reflecting_and_kills() {
    kills(Make::Frr, "lf", Role::Reflector);
}

#[test]
fn gobgp_reflecting_and_kills() {
    kills(Make::Gobgp, "lg", Role::Reflector);
}
