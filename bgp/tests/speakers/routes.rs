//! What speakers tell each other.

use ferroute_bgp::message::{Capability, Community, Families, Message, RefreshKind};
use ferroute_bgp::policy::{Action, Condition, Disposition, Edit, PrefixRange, PrefixSet, Statement};
use ferroute_bgp::speaker::Watch;

use super::sessions::Puppet;
use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_prefixes_of_each_family_go_over_and_back() {
    let (a, b) = pair().await;
    let started = Instant::now();
    a.advertises(prefixes(10_000).into_iter().chain(prefixes_v6(10_000)));
    until("all routes", || async {
        let counts = b.sees(&a).prefixes;
        counts.iter().all(|(_, counts)| counts.accepted == 10_000).then_some(()).ok_or(counts)
    })
    .await;
    println!("20,000 routes in {:?}", started.elapsed());
    assert_eq!(b.learned(AfiSafi::Ipv4Unicast).await, prefixes(10_000).into_iter().collect());
    assert_eq!(b.learned(AfiSafi::Ipv6Unicast).await, prefixes_v6(10_000).into_iter().collect());
    let status = a.sees(&b);
    assert!(status.prefixes.iter().all(|(_, counts)| counts.sent == 10_000 && counts.pending == 0));
    // Packed: hundreds of prefixes to a message.
    assert!(status.sent.update < 200, "{} UPDATEs", status.sent.update);
    // One change costs one message.
    let before = a.sees(&b).sent.update;
    a.speaker.withdraw(vec![(prefixes(1)[0], 0)]);
    until("the withdrawal", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 9_999 }).await;
    assert_eq!(a.sees(&b).sent.update, before + 1);
    a.advertises([]);
    until("nothing", || async {
        b.learned(AfiSafi::Ipv4Unicast).await.is_empty() && b.learned(AfiSafi::Ipv6Unicast).await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn the_same_advertisements_again_are_not_sent() {
    let (a, b) = pair().await;
    a.advertises(prefixes(10));
    until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 10 }).await;
    let before = a.sees(&b).sent.update;
    a.advertises(prefixes(10));
    a.advertises(prefixes(11));
    until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 11 }).await;
    assert_eq!(a.sees(&b).sent.update, before + 1);
}

#[tokio::test]
async fn routes_pass_through_to_a_third_and_an_unset_next_hop_is_our_own() {
    let nodes: Vec<Node> = (1..=3).map(Node::new).collect();
    let [a, b, c] = &nodes[..] else { panic!() };
    a.peers(vec![b.as_peer_of(a)]);
    b.peers(vec![a.as_peer_of(b), c.as_peer_of(b)]);
    c.peers(vec![b.as_peer_of(c)]);
    established(a, b).await;
    established(b, c).await;
    a.advertises(prefixes(1));
    until("the route", || async { c.learned(AfiSafi::Ipv4Unicast).await.len() == 1 }).await;
    let paths = c.speaker.rib(|rib| rib.paths(AfiSafi::Ipv4Unicast)).await.unwrap();
    assert_eq!(paths[0].attributes.next_hop.to_string(), "127.0.0.2");
    assert_eq!(paths[0].attributes.as_path.to_string(), "64002 64001");
    // Gone with its speaker.
    a.speaker.stop(ferroute_bgp::fsm::Shutdown::Administrative(String::new())).await;
    until("nothing", || async { c.learned(AfiSafi::Ipv4Unicast).await.is_empty() }).await;
}

#[tokio::test]
async fn without_policy_nothing_passes_between_ases() {
    let (a, b) = (Node::new(1), Node::new(2));
    connect(&a, &b, |config| (config.routes.import, config.routes.export) = (None, None)).await;
    a.advertises(prefixes(3));
    stays("nothing", Duration::from_millis(200), || b.sees(&a).prefixes[0].1.received == 0).await;
}

#[tokio::test]
async fn policies_change_without_a_reset() {
    let (a, b) = pair().await;
    a.advertises(prefixes(10));
    until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 10 }).await;
    // Export: only a part, with a community.
    let half = PrefixRange::orlonger("10.0.0.0/30".parse().unwrap());
    let policy = |otherwise| Policy {
        statements: vec![Statement {
            name: "half".into(),
            conditions: vec![Condition::Prefix(Arc::new(PrefixSet::from_iter([half])))],
            actions: vec![Action::Communities(Edit::Add(vec![Community::NO_EXPORT]))],
            disposition: Some(Disposition::Accept),
        }],
        otherwise,
    };
    let mut config = b.as_peer_of(&a);
    config.routes.export = Some(Arc::new(policy(Disposition::Reject)));
    a.peers(vec![config]);
    until("four routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 4 }).await;
    let paths = b.speaker.rib(|rib| rib.paths(AfiSafi::Ipv4Unicast)).await.unwrap();
    assert!(paths.iter().all(|path| path.attributes.communities == [Community::NO_EXPORT]));
    // Import: from memory, nothing is asked for again.
    let refreshes = b.sees(&a).sent.refresh;
    let mut config = a.as_peer_of(&b);
    config.routes.import = Some(Arc::new(Policy::reject_all()));
    b.peers(vec![config]);
    until("nothing", || async { b.learned(AfiSafi::Ipv4Unicast).await.is_empty() }).await;
    let counts = b.sees(&a).prefixes[0].1;
    assert_eq!((counts.received, counts.accepted), (4, 0));
    b.peers(vec![a.as_peer_of(&b)]);
    until("four routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 4 }).await;
    assert_eq!((a.sees(&b).flaps, b.sees(&a).flaps, b.sees(&a).sent.refresh), (0, 0, refreshes));
}

#[tokio::test]
async fn only_a_peer_that_changed_is_touched() {
    let nodes: Vec<Node> = (1..=3).map(Node::new).collect();
    let [a, b, c] = &nodes[..] else { panic!() };
    a.peers(vec![b.as_peer_of(a), c.as_peer_of(a)]);
    b.peers(vec![a.as_peer_of(b)]);
    c.peers(vec![a.as_peer_of(c)]);
    established(a, b).await;
    established(a, c).await;
    let mut changed = c.as_peer_of(a);
    changed.hold_time = 30;
    a.peers(vec![b.as_peer_of(a), changed]);
    until("a new session", || async { a.sees(c).established == 2 }).await;
    assert_eq!((a.sees(b).flaps, a.sees(b).established), (0, 1));
    until("the new hold time", || async {
        c.sees(a).negotiated.is_some_and(|negotiated| negotiated.hold_time == 30)
    })
    .await;
    // One that is removed hears why, the other hears nothing.
    a.peers(vec![b.as_peer_of(a)]);
    until("the reason", || async { c.last_error(a).await.contains("peer de-configured") }).await;
    assert_eq!((a.state(b), a.sees(b).flaps), (State::Established, 0));
}

#[tokio::test]
async fn a_refresh_brings_everything_again() {
    let (a, b) = pair().await;
    a.advertises(prefixes(100).into_iter().chain(prefixes_v6(100)));
    until("routes", || async { b.learned(AfiSafi::Ipv6Unicast).await.len() == 100 }).await;
    let before = b.sees(&a);
    assert!(b.speaker.refresh(&a.key(), Families::ALL));
    until("the routes again", || async {
        let now = b.sees(&a);
        // Beginning and end of both families, and the routes.
        now.received.refresh == before.received.refresh + 4
            && now.received.update >= before.received.update + 2
    })
    .await;
    assert_eq!(b.learned(AfiSafi::Ipv4Unicast).await.len(), 100);
    assert_eq!(b.sees(&a).prefixes[0].1.stale, 0);
}

/// What a peer says in its answer to a refresh is all there is: the rest is stale (RFC 7313).
#[tokio::test(flavor = "multi_thread")]
async fn what_a_refresh_does_not_bring_is_gone() {
    let a = Node::new(1);
    a.peers(vec![Puppet::config(7)]);
    let mut open = Puppet::open(7, 90);
    open.capabilities = vec![
        Capability::Multiprotocol(AfiSafi::Ipv4Unicast),
        Capability::RouteRefresh,
        Capability::EnhancedRouteRefresh,
    ];
    let mut puppet = Puppet::establish_with(7, open, &a);
    puppet.announce(&prefixes(3));
    until("routes", || async { a.learned(AfiSafi::Ipv4Unicast).await.len() == 3 }).await;
    puppet.refresh(RefreshKind::Begin);
    puppet.announce(&prefixes(2));
    puppet.refresh(RefreshKind::End);
    until("two routes", || async { a.learned(AfiSafi::Ipv4Unicast).await.len() == 2 }).await;
    // And it gets an answer to its own question, with marks around it.
    puppet.refresh(RefreshKind::Request);
    let mut kinds = Vec::new();
    while kinds.len() < 2 {
        if let Some(Message::RouteRefresh(refresh)) = puppet.hear() {
            kinds.push(refresh.kind);
        }
    }
    assert_eq!(kinds, [RefreshKind::Begin, RefreshKind::End]);
}

#[tokio::test]
async fn a_peer_that_sends_too_much_is_stopped_alone() {
    let nodes: Vec<Node> = (1..=3).map(Node::new).collect();
    let [a, b, c] = &nodes[..] else { panic!() };
    let mut limited = b.as_peer_of(a);
    limited.routes.limits.routes = Some(10);
    a.peers(vec![limited.clone(), c.as_peer_of(a)]);
    b.peers(vec![a.as_peer_of(b)]);
    c.peers(vec![a.as_peer_of(c)]);
    established(a, b).await;
    established(a, c).await;
    b.advertises(prefixes(10));
    until("ten", || async { a.learned(AfiSafi::Ipv4Unicast).await.len() == 10 }).await;
    b.advertises(prefixes(11));
    until("the end", || async { a.state(b) == State::Idle }).await;
    assert!(a.last_error(b).await.starts_with("more than 10 IPv4 unicast routes received"));
    until("the reason", || async { b.last_error(a).await.contains("maximum number of prefixes") }).await;
    until("none left", || async { a.learned(AfiSafi::Ipv4Unicast).await.is_empty() }).await;
    // It stays down, and the other stays up.
    stays("the pause", Duration::from_millis(300), || a.state(b) == State::Idle).await;
    assert_eq!((a.state(c), a.sees(c).flaps), (State::Established, 0));
    // A higher limit lets it in again at once.
    limited.routes.limits.routes = Some(100);
    a.peers(vec![limited, c.as_peer_of(a)]);
    until("eleven", || async { a.learned(AfiSafi::Ipv4Unicast).await.len() == 11 }).await;
}

/// Collects what a watch says until there are so many prefixes.
async fn watched(watch: &mut Watch, count: usize) -> Vec<ferroute_bgp::rib::RouteChange> {
    let mut routes = std::collections::BTreeMap::new();
    let collect = async {
        while routes.len() < count {
            for route in watch.next(100).await.unwrap().routes {
                routes.insert(route.prefix, route);
            }
        }
    };
    tokio::time::timeout(PATIENCE, collect).await.unwrap();
    routes.into_values().collect()
}

#[tokio::test]
async fn a_watch_sees_all_paths_that_share_traffic() {
    let nodes: Vec<Node> = (2..=4).map(Node::new).collect();
    let [b, c, d] = &nodes[..] else { panic!() };
    let mut config = settings(1);
    config.decision.maximum_paths = 8;
    let a = Node::start(config);
    a.peers(nodes.iter().map(|node| node.as_peer_of(&a)).collect());
    let mut watch = a.speaker.watch();
    for node in &nodes {
        node.peers(vec![a.as_peer_of(node)]);
        node.advertises(prefixes(2));
    }
    for node in [b, c, d] {
        established(&a, node).await;
    }
    until("three paths", || async {
        let routes = a.speaker.rib(|rib| rib.routes(AfiSafi::Ipv4Unicast)).await.unwrap();
        routes.len() == 2 && routes.iter().all(|route| route.paths.len() == 3)
    })
    .await;
    let mut latest = watched(&mut watch, 2).await;
    while latest.iter().any(|route| route.paths.len() != 3) {
        latest = watched(&mut watch, 1).await;
    }
    // A second one begins with all that is there.
    let mut second = a.speaker.watch();
    let first = watched(&mut second, 2).await;
    assert!(first.iter().all(|route| route.paths.len() == 3), "{first:?}");
    // One next hop goes, then all.
    b.speaker.stop(ferroute_bgp::fsm::Shutdown::Administrative(String::new())).await;
    for watch in [&mut watch, &mut second] {
        let routes = watched(watch, 2).await;
        assert!(routes.iter().all(|route| route.paths.len() == 2), "{routes:?}");
    }
    for node in [c, d] {
        node.advertises([]);
    }
    let mut gone = 0;
    while gone < 2 {
        gone += watch.next(100).await.unwrap().routes.iter().filter(|route| route.paths.is_empty()).count();
    }
    a.speaker.stop(ferroute_bgp::fsm::Shutdown::Silent).await;
    while watch.next(100).await.is_some() {}
}

#[tokio::test]
async fn several_paths_of_a_prefix_go_over_where_agreed() {
    let nodes: Vec<Node> = (1..=4).map(Node::new).collect();
    let [a, b, c, d] = &nodes[..] else { panic!() };
    // A takes all paths from B, which has three.
    let mut to_b = b.as_peer_of(a);
    to_b.add_path_receive = Families::ALL;
    a.peers(vec![to_b]);
    let mut to_a = a.as_peer_of(b);
    to_a.add_path_send = Families::ALL;
    b.peers(vec![to_a, c.as_peer_of(b), d.as_peer_of(b)]);
    for node in [c, d] {
        node.peers(vec![b.as_peer_of(node)]);
        established(b, node).await;
    }
    established(a, b).await;
    for node in [c, d] {
        node.advertises(prefixes(1));
    }
    b.speaker.set_advertisements(vec![advertisement(prefixes(1)[0])]);
    until("three paths", || async { a.sees(b).prefixes[0].1.accepted == 3 }).await;
    c.advertises([]);
    until("two paths", || async { a.sees(b).prefixes[0].1.accepted == 2 }).await;
}

/// A peer that reads nothing: its routes wait as prefixes, everybody else hears at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_peer_delays_nobody() {
    let (a, b) = (Node::new(1), Node::new(2));
    a.peers(vec![Puppet::config(7), b.as_peer_of(&a)]);
    b.peers(vec![a.as_peer_of(&b)]);
    established(&a, &b).await;
    let puppet = Puppet::establish(7, 90, &a);
    let slow = || a.speaker.peer(&IpAddr::from([127, 0, 0, 7]).into()).unwrap();
    until("the slow session", || async { slow().state == State::Established }).await;
    // Each route has attributes of its own, so each is a message: far more than sockets buffer.
    let all: Vec<Advertisement> = prefixes(10_000)
        .into_iter()
        .enumerate()
        .map(|(number, prefix)| Advertisement {
            attributes: Arc::new(Attributes {
                communities: (0..256).map(|part| Community(number as u32 * 256 + part)).collect(),
                ..Attributes::default()
            }),
            ..advertisement(prefix)
        })
        .collect();
    a.speaker.set_advertisements(all);
    until("routes at the other", || async { b.sees(&a).prefixes[0].1.accepted == 10_000 }).await;
    let waiting = slow().prefixes[0].1.pending;
    assert!(waiting > 1_000, "only {waiting} wait");
    // What changes while it waits is not queued: the peer never hears of it.
    a.advertises([]);
    until("nothing at the other", || async { b.sees(&a).prefixes[0].1.accepted == 0 }).await;
    assert_eq!(slow().state, State::Established);
    drop(puppet);
}
