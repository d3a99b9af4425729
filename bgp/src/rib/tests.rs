//! Tables by hand, and a model that computes everything from scratch.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::view::Stage;
use super::*;
use crate::decision::{self, Candidate, Reason, Step};
use crate::message::{Announcement, AsPath, Community, NextHop, Nlri, Origin};
use crate::policy::{
    Action, Condition, Disposition, Edit, LearnedFrom, LocalAddresses, Neighbour, NextHopChoice, Outgoing,
    Policy, PrefixRange, Refusal, Source, Statement, Withheld, export, import,
};

const OWN: Asn = Asn(65000);
const OWN_ID: RouterId = RouterId(std::net::Ipv4Addr::new(10, 255, 0, 1));
const CLUSTER: RouterId = RouterId(std::net::Ipv4Addr::new(10, 255, 0, 99));

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn rib() -> Rib {
    Rib::new(OWN, OWN_ID, CLUSTER, Options::default())
}

fn session(asn: u32, id: u8) -> Session {
    Session {
        asn: Asn(asn),
        router_id: RouterId([10, 255, 0, id].into()),
        addresses: LocalAddresses {
            v4: Some([192, 0, 2, 1].into()),
            v6: Some("2001:db8::1".parse().unwrap()),
            link_local: None,
        },
        families: Families::ALL,
        add_path_receive: Families::NONE,
        add_path_send: Families::NONE,
        extended_next_hop: false,
    }
}

fn accepting(address: &str) -> PeerOptions {
    let all = Some(Arc::new(Policy::accept_all()));
    PeerOptions { import: all.clone(), export: all, ..PeerOptions::new(ip(address)) }
}

fn attributes(next_hop: &str, path: &[u32]) -> Attributes {
    Attributes {
        as_path: AsPath::sequence(path.iter().copied().map(Asn)),
        next_hop: NextHop::from(ip(next_hop)),
        ..Attributes::default()
    }
}

fn announce(attributes: &Attributes, nlri: impl IntoIterator<Item = Nlri>) -> Update {
    let group = Announcement { attributes: Arc::new(attributes.clone()), nlri: nlri.into_iter().collect() };
    Update { announced: vec![group], ..Update::default() }
}

fn withdraw(nlri: impl IntoIterator<Item = Nlri>) -> Update {
    Update { withdrawn: nlri.into_iter().collect(), ..Update::default() }
}

/// What a peer knows after these updates, as `prefix path-id next-hop as-path`.
fn told(rib: &mut Rib, peer: PeerId) -> Vec<String> {
    let update = rib.advertise(peer, usize::MAX);
    let mut lines: Vec<String> = update.withdrawn.iter().map(|nlri| format!("-{nlri}")).collect();
    for group in &update.announced {
        for nlri in &group.nlri {
            lines.push(format!("{nlri} via {} path {}", group.attributes.next_hop, group.attributes.as_path));
        }
    }
    lines.sort();
    lines
}

#[test]
fn passes_routes_on_and_takes_them_back() {
    let mut rib = rib();
    let a = rib.add_peer(accepting("192.0.2.10"));
    let b = rib.add_peer(accepting("192.0.2.20"));
    rib.up(a, session(65010, 10));
    rib.up(b, session(65020, 20));
    let route = attributes("192.0.2.10", &[65010, 65099]);
    let prefixes = ["203.0.113.0/24", "198.51.100.0/24"].map(|text| Nlri::new(net(text)));
    assert_eq!(rib.receive(a, &announce(&route, prefixes), 1), []);
    assert_eq!(
        told(&mut rib, b),
        [
            "198.51.100.0/24 via 192.0.2.1 path 65000 65010 65099",
            "203.0.113.0/24 via 192.0.2.1 path 65000 65010 65099"
        ]
    );
    assert_eq!(told(&mut rib, a), [""; 0], "not back to where it came from");
    // The same again changes nothing; nor does a change that export hides.
    rib.receive(a, &announce(&route, prefixes), 2);
    let hidden = Attributes { med: Some(7), ..route.clone() };
    rib.receive(a, &announce(&hidden, prefixes), 3);
    assert_eq!(told(&mut rib, b), [""; 0]);
    assert_eq!(rib.paths_to(prefixes[0].prefix)[0].since, 3);
    // Back and forth between two pulls is nothing.
    rib.receive(a, &withdraw(prefixes), 4);
    rib.receive(a, &announce(&route, prefixes), 5);
    assert!(rib.is_pending(b, AfiSafi::Ipv4Unicast));
    assert_eq!(told(&mut rib, b), [""; 0]);
    assert!(!rib.is_pending(b, AfiSafi::Ipv4Unicast));
    rib.receive(a, &withdraw(prefixes), 6);
    assert_eq!(told(&mut rib, b), ["-198.51.100.0/24", "-203.0.113.0/24"]);
    assert_eq!(rib.prefixes(AfiSafi::Ipv4Unicast), 0, "nothing is left behind");
}

#[test]
fn tells_everything_again_when_asked() {
    let mut rib = rib();
    let peer = rib.add_peer(PeerOptions::new(ip("192.0.2.20")));
    rib.up(peer, session(65000, 20));
    rib.originate(net("10.1.0.0/24"), 0, &Arc::new(Attributes::default()), 1, 0);
    rib.originate(net("2001:db8:1::/64"), 0, &Arc::new(Attributes::default()), 1, 0);
    assert_eq!(
        told(&mut rib, peer),
        ["10.1.0.0/24 via 192.0.2.1 path ", "2001:db8:1::/64 via 2001:db8::1 path "]
    );
    assert_eq!(told(&mut rib, peer), [""; 0]);
    rib.refresh(peer, AfiSafi::Ipv6Unicast);
    assert_eq!(told(&mut rib, peer), ["2001:db8:1::/64 via 2001:db8::1 path "]);
    rib.withdraw(net("10.1.0.0/24"), 0);
    assert_eq!(told(&mut rib, peer), ["-10.1.0.0/24"]);
}

#[test]
fn limits_what_a_peer_costs() {
    let mut rib = rib();
    let limits = Limits { routes: Some(10), warning_percent: 80, paths_per_prefix: 2, ..Limits::default() };
    let peer = rib.add_peer(PeerOptions { limits, ..accepting("192.0.2.10") });
    rib.up(peer, Session { add_path_receive: Families::ALL, ..session(65010, 10) });
    let route = attributes("192.0.2.10", &[65010]);
    let nlri = |index: u8, id| Nlri::with_path_id(net(&format!("10.0.{index}.0/24")), id);
    let family = AfiSafi::Ipv4Unicast;
    assert_eq!(
        rib.receive(peer, &announce(&route, (1..=3).map(|id| nlri(0, id))), 0),
        [LimitEvent::PathsExceeded { family, limit: 2 }]
    );
    assert_eq!(rib.receive(peer, &announce(&route, (1..=5).map(|index| nlri(index, 1))), 0), []);
    assert_eq!(
        rib.receive(peer, &announce(&route, (6..=20).map(|index| nlri(index, 1))), 0),
        [
            LimitEvent::RoutesWarning { family, routes: 8, limit: 10 },
            LimitEvent::RoutesExceeded { family, limit: 10 }
        ]
    );
    assert_eq!(rib.counts(peer, family).unwrap().received, 10);
    // A known route may change at the limit; the warning comes again after there was room.
    assert_eq!(rib.receive(peer, &announce(&attributes("192.0.2.11", &[65010]), [nlri(1, 1)]), 0), []);
    rib.receive(peer, &withdraw([nlri(1, 1), nlri(2, 1), nlri(3, 1)]), 0);
    let again = rib.receive(peer, &announce(&route, [nlri(1, 1)]), 0);
    assert_eq!(again, [LimitEvent::RoutesWarning { family, routes: 8, limit: 10 }]);

    let limits = Limits { attribute_bytes: 10_000, ..Limits::default() };
    let greedy = rib.add_peer(PeerOptions { limits, ..accepting("192.0.2.66") });
    rib.up(greedy, session(65066, 66));
    let mut exceeded = 0;
    for index in 0..100 {
        let long: Vec<u32> = (0..200).map(|hop| 65066 + hop + index).collect();
        exceeded +=
            rib.receive(greedy, &announce(&attributes("192.0.2.66", &long), [nlri(index as u8, 0)]), 0).len();
    }
    assert!(exceeded > 80 && rib.attribute_bytes(greedy) <= 12_000);
    rib.down(greedy, Families::NONE);
    assert_eq!(rib.attribute_bytes(greedy), 0);
}

#[test]
fn keeps_stale_routes_over_a_restart() {
    let mut rib = rib();
    let a = rib.add_peer(accepting("192.0.2.10"));
    let b = rib.add_peer(accepting("192.0.2.20"));
    rib.up(a, session(65010, 10));
    rib.up(b, session(65020, 20));
    let route = attributes("192.0.2.10", &[65010]);
    let (kept, lost) = (Nlri::new(net("10.1.0.0/16")), Nlri::new(net("10.2.0.0/16")));
    let six = Nlri::new(net("2001:db8:6::/48"));
    rib.receive(a, &announce(&route, [kept, lost]), 0);
    rib.receive(a, &announce(&attributes("2001:db8::10", &[65010]), [six]), 0);
    assert_eq!(told(&mut rib, b).len(), 3);

    rib.down(a, Families::IPV4);
    assert_eq!(told(&mut rib, b), ["-2001:db8:6::/48"], "only what the peer keeps forwarding stays");
    let family = AfiSafi::Ipv4Unicast;
    assert_eq!(rib.counts(a, family).map(|counts| (counts.received, counts.stale)), Some((2, 2)));
    assert_eq!(rib.paths_to(kept.prefix)[0].reason, Reason::Best, "stale routes count in full");
    rib.up(a, session(65010, 10));
    rib.receive(a, &announce(&route, [kept]), 9);
    assert_eq!(rib.counts(a, family).map(|counts| (counts.received, counts.stale)), Some((2, 1)));
    assert_eq!(told(&mut rib, b), [""; 0]);
    rib.sweep_stale(a, family);
    assert_eq!(told(&mut rib, b), ["-10.2.0.0/16"]);
    assert_eq!(rib.paths_to(kept.prefix)[0].since, 0, "a route that did not change is as old as it was");

    // Enhanced route refresh marks and sweeps by the same means.
    rib.mark_stale(a, family);
    rib.sweep_stale(a, family);
    assert_eq!(told(&mut rib, b), ["-10.1.0.0/16"]);
    // A peer that comes back as somebody else keeps nothing.
    rib.receive(a, &announce(&route, [kept]), 9);
    rib.down(a, Families::ALL);
    rib.up(a, session(65011, 10));
    assert_eq!(rib.counts(a, family).unwrap().received, 0);
}

#[test]
fn follows_the_way_to_next_hops() {
    let mut rib = rib();
    let peers = [1, 2, 3].map(|index| {
        let peer = rib.add_peer(accepting(&format!("192.0.2.{index}0")));
        rib.up(peer, session(65000, index * 10));
        let route = attributes(&format!("192.0.2.{index}0"), &[65099]);
        rib.receive(peer, &announce(&route, [Nlri::new(net("10.0.0.0/8"))]), 0);
        peer
    });
    rib.set_options(Options { maximum_paths: 2, ..Options::default() });
    let reasons = |rib: &Rib| -> BTreeMap<PeerId, Reason> {
        let paths = rib.paths_to(net("10.0.0.0/8"));
        paths.into_iter().map(|path| (path.peer.unwrap(), path.reason)).collect()
    };
    let chosen = |rib: &mut Rib| -> Vec<Vec<PeerId>> {
        let changes = rib.take_changes(usize::MAX);
        changes.iter().map(|change| change.paths.iter().filter_map(|path| path.peer).collect()).collect()
    };
    assert_eq!(chosen(&mut rib), [[peers[0], peers[1]]]);
    assert_eq!(reasons(&rib)[&peers[2]], Reason::Lost(Step::RouterId));
    let generation = rib.next_hops_generation();
    assert_eq!(rib.next_hops().count(), 3);
    rib.resolve(ip("192.0.2.10"), Resolution::Reachable { metric: 5 });
    assert_eq!(chosen(&mut rib), [[peers[1], peers[2]]]);
    assert_eq!(reasons(&rib)[&peers[0]], Reason::Lost(Step::IgpMetric));
    rib.resolve(ip("192.0.2.20"), Resolution::Unreachable);
    rib.resolve(ip("192.0.2.30"), Resolution::Own);
    assert_eq!(reasons(&rib)[&peers[1]], Reason::Refused(Refusal::NextHopUnreachable));
    assert_eq!(reasons(&rib)[&peers[2]], Reason::Refused(Refusal::NextHopOwn));
    assert_eq!(chosen(&mut rib), [[peers[0]]]);
    rib.resolve(ip("192.0.2.10"), Resolution::Unreachable);
    assert_eq!(rib.take_changes(9), [RouteChange { prefix: net("10.0.0.0/8"), paths: Vec::new() }]);
    assert_eq!(rib.take_changes(9), []);
    assert_eq!(rib.next_hops_generation(), generation);
    rib.remove_peer(peers[0]);
    assert_ne!(rib.next_hops_generation(), generation);
    assert_eq!(rib.next_hops().count(), 2);
}

#[test]
fn shows_what_policy_did() {
    let reject = Statement {
        name: "no-defaults".into(),
        conditions: vec![Condition::Prefix(Arc::new([net("0.0.0.0/0")].into_iter().collect()))],
        actions: Vec::new(),
        disposition: Some(Disposition::Reject),
    };
    let policy = |first: Vec<Action>| {
        let change = Statement { name: "mark".into(), conditions: vec![], actions: first, disposition: None };
        Some(Arc::new(Policy { statements: vec![change, reject.clone()], otherwise: Disposition::Accept }))
    };
    let community = Community::new(65000, 1);
    let mut rib = rib();
    let a = rib.add_peer(PeerOptions {
        import: policy(vec![Action::LocalPreference(300)]),
        export: policy(vec![Action::Communities(Edit::Add(vec![community]))]),
        ..PeerOptions::new(ip("192.0.2.10"))
    });
    let b =
        rib.add_peer(PeerOptions { export: policy(vec![Action::Med(Some(9))]), ..accepting("192.0.2.20") });
    rib.up(a, session(65010, 10));
    rib.up(b, session(65020, 20));
    let family = AfiSafi::Ipv4Unicast;
    let route = attributes("192.0.2.10", &[65010]);
    rib.receive(a, &announce(&route, [Nlri::new(net("0.0.0.0/0")), Nlri::new(net("10.0.0.0/8"))]), 0);
    let before = rib.received(a, family, Stage::Before);
    let lines: BTreeSet<String> = before.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines.into_iter().collect::<Vec<_>>(),
        [
            "0.0.0.0/0 via 192.0.2.10: refused: import policy, statement 2 \"no-defaults\"",
            "10.0.0.0/8 via 192.0.2.10: best"
        ]
    );
    let after = rib.received(a, family, Stage::After);
    assert_eq!(after.len(), 1);
    assert_eq!(after[0].attributes.local_preference, Some(300));
    assert_eq!(rib.counts(a, family).map(|counts| (counts.received, counts.accepted)), Some((2, 1)));

    // A default route of our own is held back from b by its policy, and due to it until then.
    rib.originate(net("0.0.0.0/0"), 0, &Arc::new(Attributes::default()), 7, 0);
    let view = rib.advertised(b, family, Stage::Before);
    assert!(view.iter().any(|route| {
        route.withheld == Some(Withheld::Policy(Some(1))) && route.statement.as_deref() == Some("no-defaults")
    }));
    let after = rib.advertised(b, family, Stage::After);
    assert_eq!((after.len(), after[0].attributes.med, after[0].is_current), (1, Some(9), false));
    assert_eq!(after[0].to_string(), "10.0.0.0/8 via 192.0.2.1: advertised, pending");
    told(&mut rib, b);
    assert!(rib.advertised(b, family, Stage::After)[0].is_current);
    let back = rib.advertised(a, family, Stage::Before);
    assert!(back.iter().any(|route| route.withheld == Some(Withheld::SplitHorizon)));

    // Without a policy an external peer gets nothing, and what it sent takes no part.
    rib.set_peer(a, PeerOptions::new(ip("192.0.2.10")));
    assert_eq!(rib.paths_to(net("10.0.0.0/8"))[0].reason, Reason::Refused(Refusal::NoPolicy));
    assert_eq!(told(&mut rib, b), ["-10.0.0.0/8"]);
    rib.set_peer(b, PeerOptions { export: None, ..accepting("192.0.2.20") });
    rib.originate(net("10.9.0.0/16"), 0, &Arc::new(Attributes::default()), 7, 0);
    assert_eq!(told(&mut rib, b), [""; 0]);
    let view = rib.advertised(b, family, Stage::Before);
    assert!(view.iter().all(|route| route.withheld == Some(Withheld::NoPolicy)));
}

#[test]
fn sends_several_paths_with_stable_identifiers() {
    let mut rib = rib();
    let peers: Vec<PeerId> = (1..=3)
        .map(|index| {
            let peer = rib.add_peer(accepting(&format!("192.0.2.{index}0")));
            rib.up(peer, session(65000 + u32::from(index) * 10, index * 10));
            let route = attributes(&format!("192.0.2.{index}0"), &[65000 + u32::from(index) * 10]);
            rib.receive(peer, &announce(&route, [Nlri::new(net("10.0.0.0/8"))]), 0);
            peer
        })
        .collect();
    let client = PeerOptions { client: true, ..PeerOptions::new(ip("192.0.2.99")) };
    let all = rib.add_peer(client.clone());
    rib.up(all, Session { add_path_send: Families::ALL, ..session(65000, 99) });
    let line =
        |index: u32| format!("10.0.0.0/8 path {index} via 192.0.2.{index}0 path {}", 65000 + index * 10);
    assert_eq!(told(&mut rib, all), [line(1), line(2), line(3)]);
    // One path goes, the others keep their names; a new one takes the free name.
    rib.receive(peers[0], &withdraw([Nlri::new(net("10.0.0.0/8"))]), 0);
    assert_eq!(told(&mut rib, all), ["-10.0.0.0/8 path 1"]);
    rib.receive(peers[2], &announce(&attributes("192.0.2.31", &[65030]), [Nlri::new(net("10.0.0.0/8"))]), 0);
    assert_eq!(told(&mut rib, all), ["10.0.0.0/8 path 3 via 192.0.2.31 path 65030"]);
    rib.set_peer(all, PeerOptions { add_path_send: AddPathSend::Best(1), ..client });
    assert_eq!(told(&mut rib, all), ["-10.0.0.0/8 path 3"]);
    assert_eq!(rib.counts(all, AfiSafi::Ipv4Unicast).unwrap().advertised, 1);
}

// The model: everything from scratch.

const PREFIXES: [&str; 6] =
    ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "192.168.0.0/16", "2001:db8:1::/48", "2001:db8:2::/48"];
const NEXT_HOPS: [(&str, &str); 3] =
    [("192.0.2.101", "2001:db8::101"), ("192.0.2.102", "2001:db8::102"), ("192.0.2.20", "2001:db8::20")];
/// Address, AS, last octet of the router id.
const PEERS: [(&str, u32, u8); 5] = [
    ("192.0.2.10", 65010, 10),
    ("192.0.2.20", 65020, 20),
    ("192.0.2.30", 65000, 30),
    ("192.0.2.40", 65000, 40),
    ("192.0.2.50", 65000, 50),
];

#[derive(Debug, Clone)]
enum Operation {
    Up(usize, usize),
    Down(usize, u8),
    Announce(usize, Vec<(usize, u32)>, Box<Attributes>),
    Withdraw(usize, usize, u32),
    Originate(usize, u32, Box<Attributes>, u16),
    Unoriginate(usize, u32),
    Resolve(usize, Resolution),
    Configure(usize, usize),
    MarkStale(usize, bool),
    Sweep(usize, bool),
    Advertise(usize, usize),
    Refresh(usize, bool),
    TakeChanges(usize),
    Options(usize),
}

fn next_hop(prefix: IpNet, index: usize) -> NextHop {
    let (v4, v6) = NEXT_HOPS[index];
    NextHop::from(ip(if matches!(prefix, IpNet::V4(_)) { v4 } else { v6 }))
}

/// The next hop is set by the prefix later: `aggregator` is not used for anything else here.
fn any_attributes() -> impl Strategy<Value = Attributes> {
    let path = prop::collection::vec(prop::sample::select(vec![65010, 65020, 65030, 65099, 65000]), 0..3);
    let communities = prop::collection::vec(
        prop::sample::select(vec![
            Community::NO_EXPORT,
            Community::NO_ADVERTISE,
            Community::NO_EXPORT_SUBCONFED,
            Community::GRACEFUL_SHUTDOWN,
            Community::new(65000, 1),
        ]),
        0..2,
    );
    let id = |last: u8| RouterId([10, 255, 0, last].into());
    (
        path,
        prop::option::of(100_u32..103),
        prop::option::of(0_u32..3),
        prop::sample::select(vec![Origin::Igp, Origin::Incomplete]),
        prop_oneof![4 => Just(vec![]), 1 => communities],
        prop::option::weighted(0.2, prop::sample::select(vec![id(1), id(30), id(40)])),
        prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(prop::sample::select(vec![CLUSTER, id(98)]), 1..3)],
    )
        .prop_map(|(path, local_preference, med, origin, communities, originator_id, cluster_list)| Attributes {
            as_path: AsPath::sequence(path.into_iter().map(Asn)),
            local_preference,
            med,
            origin,
            communities,
            originator_id,
            cluster_list,
            ..Attributes::default()
        })
}

fn operation() -> impl Strategy<Value = Operation> {
    let peer = 0..PEERS.len();
    let prefix = 0..PREFIXES.len();
    let hopped = (any_attributes(), 0..NEXT_HOPS.len()).prop_map(|(mut attributes, hop)| {
        // Kept in a field that the model does not use, until the prefix is known.
        attributes.next_hop = NextHop::V4([0, 0, 0, hop as u8].into());
        Box::new(attributes)
    });
    let resolution = prop::sample::select(vec![
        Resolution::Reachable { metric: 0 },
        Resolution::Reachable { metric: 10 },
        Resolution::Unreachable,
        Resolution::Own,
    ]);
    prop_oneof![
        3 => (peer.clone(), 0..3_usize).prop_map(|(peer, kind)| Operation::Up(peer, kind)),
        1 => (peer.clone(), 0_u8..4).prop_map(|(peer, keep)| Operation::Down(peer, keep)),
        12 => (peer.clone(), prop::collection::vec((prefix.clone(), 0_u32..3), 1..4), hopped)
            .prop_map(|(peer, nlri, attributes)| Operation::Announce(peer, nlri, attributes)),
        5 => (peer.clone(), prefix.clone(), 0_u32..3).prop_map(|(peer, prefix, id)| Operation::Withdraw(peer, prefix, id)),
        3 => (prefix.clone(), 0_u32..2, any_attributes(), 0_u16..3)
            .prop_map(|(prefix, id, attributes, tag)| Operation::Originate(prefix, id, Box::new(attributes), tag)),
        1 => (prefix, 0_u32..2).prop_map(|(prefix, id)| Operation::Unoriginate(prefix, id)),
        1 => (0..NEXT_HOPS.len(), resolution).prop_map(|(hop, resolution)| Operation::Resolve(hop, resolution)),
        2 => (peer.clone(), 0..6_usize).prop_map(|(peer, kind)| Operation::Configure(peer, kind)),
        1 => (peer.clone(), any::<bool>()).prop_map(|(peer, v6)| Operation::MarkStale(peer, v6)),
        1 => (peer.clone(), any::<bool>()).prop_map(|(peer, v6)| Operation::Sweep(peer, v6)),
        6 => (peer.clone(), 1..5_usize).prop_map(|(peer, limit)| Operation::Advertise(peer, limit)),
        1 => (peer, any::<bool>()).prop_map(|(peer, v6)| Operation::Refresh(peer, v6)),
        2 => (1..5_usize).prop_map(Operation::TakeChanges),
        1 => (0..4_usize).prop_map(Operation::Options),
    ]
}

/// Options of peers, by number.
fn options_of(peer: usize, kind: usize) -> PeerOptions {
    let inside =
        |text: &str| Condition::Prefix(Arc::new([PrefixRange::orlonger(net(text))].into_iter().collect()));
    let statement = |conditions, actions, disposition| Statement {
        name: "test".into(),
        conditions,
        actions,
        disposition,
    };
    let picky = Policy {
        statements: vec![
            Statement::graceful_shutdown(),
            statement(vec![inside("10.1.0.0/16")], vec![], Some(Disposition::Reject)),
            statement(
                vec![Condition::Not(Box::new(inside("10.0.0.0/8")))],
                vec![Action::LocalPreference(101), Action::Med(Some(1))],
                None,
            ),
            statement(
                vec![Condition::Source(vec![Source::Local]), Condition::Tag(vec![1])],
                vec![
                    Action::Communities(Edit::Add(vec![Community::new(65000, 2)])),
                    Action::NextHop(NextHopChoice::Address(ip("192.0.2.77"))),
                ],
                None,
            ),
            statement(
                vec![Condition::Community(vec![crate::policy::Pattern::Administrator(65000)])],
                vec![Action::Prepend { asn: None, times: 2 }],
                Some(Disposition::Accept),
            ),
        ],
        otherwise: Disposition::Accept,
    };
    let base = PeerOptions::new(ip(PEERS[peer].0));
    let all = Some(Arc::new(Policy::accept_all()));
    match kind {
        0 => base,
        1 => PeerOptions { import: all.clone(), export: all, ..base },
        2 => PeerOptions { import: all.clone(), export: all, client: true, ..base },
        3 => PeerOptions {
            import: Some(Arc::new(picky.clone())),
            export: Some(Arc::new(picky)),
            client: true,
            add_path_send: AddPathSend::Best(2),
            ..base
        },
        4 => PeerOptions { import: all.clone(), export: all, next_hop_self: true, allow_own_as: 1, ..base },
        _ => PeerOptions {
            import: all,
            export: Some(Arc::new(Policy::reject_all())),
            enforce_first_as: true,
            ..base
        },
    }
}

fn options_by(kind: usize) -> Options {
    match kind {
        0 => Options::default(),
        1 => Options { maximum_paths: 2, ..Options::default() },
        2 => Options {
            maximum_paths: 8,
            always_compare_med: true,
            missing_med_as_worst: true,
            ..Options::default()
        },
        _ => Options { prefer_oldest: true, maximum_paths: 2, ..Options::default() },
    }
}

#[derive(Debug, Clone, PartialEq)]
struct ModelPath {
    received: Attributes,
    since: u32,
    stale: bool,
    tag: u16,
}

struct ModelPeer {
    id: PeerId,
    options: PeerOptions,
    session: Option<Session>,
    /// What it was told.
    knows: BTreeMap<(IpNet, u32), Attributes>,
}

/// `None` is this speaker; prefix, peer, path id.
type PathKey = (IpNet, Option<usize>, u32);

struct Model {
    rib: Rib,
    peers: Vec<ModelPeer>,
    paths: BTreeMap<PathKey, ModelPath>,
    resolutions: BTreeMap<IpAddr, Resolution>,
    options: Options,
    fib: BTreeMap<IpNet, Vec<ChosenPath>>,
    local_ids: BTreeMap<PathKey, u32>,
    now: u32,
}

/// A path of the model after import.
struct Imported {
    key: PathKey,
    effective: Result<Attributes, Refusal>,
    reason: Reason,
}

impl Model {
    fn new() -> Self {
        let mut rib = rib();
        let peers = (0..PEERS.len())
            .map(|peer| {
                let options = options_of(peer, 0);
                ModelPeer {
                    id: rib.add_peer(options.clone()),
                    options,
                    session: None,
                    knows: BTreeMap::new(),
                }
            })
            .collect();
        Self {
            rib,
            peers,
            paths: BTreeMap::new(),
            resolutions: BTreeMap::new(),
            options: Options::default(),
            fib: BTreeMap::new(),
            local_ids: BTreeMap::new(),
            now: 0,
        }
    }

    fn neighbour(&self, peer: usize) -> Neighbour {
        Neighbour { address: ip(PEERS[peer].0), asn: Asn(PEERS[peer].1) }
    }

    fn drop_paths(&mut self, peer: usize, family: AfiSafi, stale_only: bool) {
        self.paths.retain(|(prefix, from, _), path| {
            *from != Some(peer) || AfiSafi::of(prefix) != family || (stale_only && !path.stale)
        });
    }

    fn mark(&mut self, peer: usize, family: AfiSafi) {
        for ((prefix, from, _), path) in &mut self.paths {
            path.stale |= *from == Some(peer) && AfiSafi::of(prefix) == family;
        }
    }

    fn down(&mut self, peer: usize, keep: Families) {
        self.rib.down(self.peers[peer].id, keep);
        self.peers[peer].session = None;
        self.peers[peer].knows.clear();
        for family in AfiSafi::SUPPORTED {
            if keep.contains(family) {
                self.mark(peer, family);
            } else {
                self.drop_paths(peer, family, false);
            }
        }
    }

    fn run(&mut self, operation: Operation) {
        self.apply(operation);
        // A path that comes again may have another identifier.
        self.local_ids.retain(|key, _| self.paths.contains_key(key));
    }

    fn apply(&mut self, operation: Operation) {
        self.now += 1;
        let family = |v6| if v6 { AfiSafi::Ipv6Unicast } else { AfiSafi::Ipv4Unicast };
        match operation {
            Operation::Up(peer, kind) => {
                if self.peers[peer].session.is_some() {
                    return;
                }
                let (_, asn, id) = PEERS[peer];
                let mut session = session(asn, id);
                if kind == 1 {
                    session.add_path_receive = Families::ALL;
                    session.add_path_send = Families::IPV4;
                } else if kind == 2 {
                    session.families = Families::IPV4;
                    session.add_path_receive = Families::IPV4;
                    self.drop_paths(peer, AfiSafi::Ipv6Unicast, false);
                }
                self.rib.up(self.peers[peer].id, session.clone());
                self.peers[peer].session = Some(session);
            }
            Operation::Down(peer, keep) => {
                if self.peers[peer].session.is_some() {
                    self.down(
                        peer,
                        [Families::NONE, Families::IPV4, Families::IPV6, Families::ALL][usize::from(keep)],
                    );
                }
            }
            Operation::Announce(peer, nlri, attributes) => {
                let Some(session) = self.peers[peer].session.clone() else { return };
                let NextHop::V4(hop) = attributes.next_hop else { return };
                let mut update = Update::default();
                for (prefix, path_id) in nlri {
                    let prefix = net(PREFIXES[prefix]);
                    let family = AfiSafi::of(&prefix);
                    let path_id = if session.add_path_receive.contains(family) { path_id } else { 0 };
                    let hop = next_hop(prefix, usize::from(hop.octets()[3]));
                    let attributes = Attributes { next_hop: hop, ..(*attributes).clone() };
                    if session.families.contains(family) {
                        let key = (prefix, Some(peer), path_id);
                        let since = match self.paths.get(&key) {
                            Some(old) if old.received == attributes => old.since,
                            _ => self.now,
                        };
                        let path = ModelPath { received: attributes.clone(), since, stale: false, tag: 0 };
                        self.paths.insert(key, path);
                    }
                    update.announced.push(Announcement {
                        attributes: Arc::new(attributes),
                        nlri: vec![Nlri::with_path_id(prefix, path_id)],
                    });
                }
                assert_eq!(self.rib.receive(self.peers[peer].id, &update, self.now), []);
            }
            Operation::Withdraw(peer, prefix, path_id) => {
                let Some(session) = self.peers[peer].session.clone() else { return };
                let prefix = net(PREFIXES[prefix]);
                let path_id =
                    if session.add_path_receive.contains(AfiSafi::of(&prefix)) { path_id } else { 0 };
                let nlri = Nlri { path_id: Some(path_id).filter(|&id| id > 0), prefix };
                self.rib.receive(self.peers[peer].id, &withdraw([nlri]), self.now);
                if session.families.contains(AfiSafi::of(&prefix)) {
                    self.paths.remove(&(prefix, Some(peer), path_id));
                }
            }
            Operation::Originate(prefix, id, attributes, tag) => {
                let prefix = net(PREFIXES[prefix]);
                self.rib.originate(prefix, id, &Arc::new((*attributes).clone()), tag, self.now);
                let key = (prefix, None, id);
                let since = match self.paths.get(&key) {
                    Some(old) if old.received == *attributes && old.tag == tag => old.since,
                    _ => self.now,
                };
                self.paths.insert(key, ModelPath { received: *attributes, since, stale: false, tag });
            }
            Operation::Unoriginate(prefix, id) => {
                let prefix = net(PREFIXES[prefix]);
                self.rib.withdraw(prefix, id);
                self.paths.remove(&(prefix, None, id));
            }
            Operation::Resolve(hop, resolution) => {
                for address in [NEXT_HOPS[hop].0, NEXT_HOPS[hop].1].map(ip) {
                    self.rib.resolve(address, resolution);
                    self.resolutions.insert(address, resolution);
                }
            }
            Operation::Configure(peer, kind) => {
                let options = options_of(peer, kind);
                self.rib.set_peer(self.peers[peer].id, options.clone());
                self.peers[peer].options = options;
            }
            Operation::MarkStale(peer, v6) => {
                self.rib.mark_stale(self.peers[peer].id, family(v6));
                self.mark(peer, family(v6));
            }
            Operation::Sweep(peer, v6) => {
                self.rib.sweep_stale(self.peers[peer].id, family(v6));
                self.drop_paths(peer, family(v6), true);
            }
            Operation::Advertise(peer, limit) => self.pull(peer, limit),
            Operation::Refresh(peer, v6) => self.rib.refresh(self.peers[peer].id, family(v6)),
            Operation::TakeChanges(limit) => self.take_changes(limit),
            Operation::Options(kind) => {
                self.options = options_by(kind);
                self.rib.set_options(self.options);
            }
        }
    }

    /// The peer applies an update to what it knows, as RFC 4271 section 9 says.
    fn pull(&mut self, peer: usize, limit: usize) {
        let update = self.rib.advertise(self.peers[peer].id, limit);
        let knows = &mut self.peers[peer].knows;
        for nlri in &update.withdrawn {
            let gone = knows.remove(&(nlri.prefix, nlri.path_id.unwrap_or(0)));
            assert!(gone.is_some(), "withdrew {nlri}, which the peer was not told");
        }
        let mut seen = BTreeSet::new();
        for group in &update.announced {
            assert!(!group.nlri.is_empty());
            let family = group.nlri[0].family();
            for nlri in &group.nlri {
                assert_eq!(nlri.family(), family, "a group is of one family");
                assert!(seen.insert(*nlri) && !update.withdrawn.contains(nlri), "{nlri} twice in an update");
                knows.insert((nlri.prefix, nlri.path_id.unwrap_or(0)), (*group.attributes).clone());
            }
        }
    }

    fn take_changes(&mut self, limit: usize) {
        for change in self.rib.take_changes(limit) {
            if change.paths.is_empty() {
                assert!(self.fib.remove(&change.prefix).is_some(), "{} was never there", change.prefix);
            } else {
                self.fib.insert(change.prefix, change.paths);
            }
        }
    }

    /// All paths to a prefix with their fate.
    fn imported(&self, prefix: IpNet) -> Vec<Imported> {
        let mut all: Vec<Imported> = Vec::new();
        let keys: Vec<PathKey> = self.paths.keys().filter(|(other, ..)| *other == prefix).copied().collect();
        for key in keys {
            let path = &self.paths[&key];
            let effective = match key.1 {
                None => Ok(path.received.clone()),
                Some(peer) => {
                    let options = &self.peers[peer].options;
                    let importer = crate::policy::Importer {
                        own: OWN,
                        router_id: OWN_ID,
                        cluster_id: CLUSTER,
                        neighbour: &self.neighbour(peer),
                        allow_own_as: options.allow_own_as,
                        enforce_first_as: options.enforce_first_as,
                        policy: options.import.as_deref(),
                    };
                    import(&importer, prefix, &path.received).map(std::borrow::Cow::into_owned)
                }
            };
            all.push(Imported { key, effective, reason: Reason::Best });
        }
        let mut candidates = Vec::new();
        let mut places = Vec::new();
        let mut refused = Vec::new();
        for (place, path) in all.iter().enumerate() {
            match self.candidate(path) {
                Ok(candidate) => {
                    candidates.push(candidate);
                    places.push(place);
                }
                Err(refusal) => refused.push((place, refusal)),
            }
        }
        let mut reasons = Vec::new();
        decision::select(&candidates, &self.options, &mut reasons);
        for (place, reason) in places.into_iter().zip(reasons) {
            all[place].reason = reason;
        }
        for (place, refusal) in refused {
            all[place].reason = Reason::Refused(refusal);
        }
        all
    }

    fn candidate<'a>(&self, path: &'a Imported) -> Result<Candidate<'a>, Refusal> {
        let attributes = path.effective.as_ref().map_err(|refusal| *refusal)?;
        let (prefix, peer, path_id) = path.key;
        let since = self.paths[&(prefix, peer, path_id)].since;
        let Some(peer) = peer else {
            return Ok(Candidate {
                attributes,
                source: Source::Local,
                igp_metric: 0,
                since,
                router_id: OWN_ID,
                peer_address: ip("0.0.0.0"),
                path_id,
            });
        };
        let resolution = self.resolutions.get(&attributes.next_hop.address()).copied().unwrap_or_default();
        let igp_metric = match resolution {
            Resolution::Reachable { metric } => metric,
            Resolution::Unreachable => return Err(Refusal::NextHopUnreachable),
            Resolution::Own => return Err(Refusal::NextHopOwn),
        };
        let (address, asn, id) = PEERS[peer];
        Ok(Candidate {
            attributes,
            source: if Asn(asn) == OWN { Source::Internal } else { Source::External },
            igp_metric,
            since,
            router_id: RouterId([10, 255, 0, id].into()),
            peer_address: ip(address),
            path_id,
        })
    }

    /// What a peer should know of a prefix, path by path.
    fn desired(&self, receiver: usize, prefix: IpNet) -> Vec<(PathKey, Attributes)> {
        let Some(session) = &self.peers[receiver].session else { return Vec::new() };
        let options = &self.peers[receiver].options;
        if !session.families.contains(AfiSafi::of(&prefix)) {
            return Vec::new();
        }
        let paths = self.imported(prefix);
        let offered: Vec<&Imported> = if session.add_path_send.contains(AfiSafi::of(&prefix)) {
            let eligible: Vec<&Imported> = paths
                .iter()
                .filter(|path| self.candidate(path).is_ok() && path.key.1 != Some(receiver))
                .collect();
            let candidates: Vec<Candidate<'_>> =
                eligible.iter().map(|path| self.candidate(path).unwrap()).collect();
            let count = match options.add_path_send {
                AddPathSend::All => usize::MAX,
                AddPathSend::Best(count) => usize::from(count),
            };
            decision::rank(&candidates, &self.options, count.min(candidates.len()))
                .into_iter()
                .map(|place| eligible[place])
                .collect()
        } else {
            paths.iter().filter(|path| path.reason == Reason::Best).collect()
        };
        let neighbour = self.neighbour(receiver);
        let exporter = crate::policy::Exporter {
            own: OWN,
            cluster_id: CLUSTER,
            neighbour: &neighbour,
            router_id: session.router_id,
            client: options.client,
            addresses: session.addresses,
            extended_next_hop: session.extended_next_hop,
            next_hop_self: options.next_hop_self,
            policy: options.export.as_deref(),
        };
        let mut desired = Vec::new();
        for path in offered {
            let sender = path.key.1.map(|peer| self.neighbour(peer));
            let learned_from = path.key.1.zip(sender.as_ref()).map(|(peer, neighbour)| LearnedFrom {
                neighbour,
                router_id: RouterId([10, 255, 0, PEERS[peer].2].into()),
                client: self.peers[peer].options.client,
                is_receiver: peer == receiver,
            });
            let attributes = path.effective.as_ref().unwrap();
            let route = Outgoing { prefix, attributes, tag: self.paths[&path.key].tag, learned_from };
            if let Ok(attributes) = export(&exporter, &route) {
                desired.push((path.key, attributes.into_owned()));
            }
        }
        desired
    }

    fn key_of(&self, view: &view::PathView) -> PathKey {
        let peer = view.peer.map(|id| self.peers.iter().position(|peer| peer.id == id).unwrap());
        (view.prefix, peer, view.path_id)
    }

    /// Adj-RIB-In and Loc-RIB are what they should be, whatever is still due to others.
    fn check_tables(&mut self) {
        let mut seen = BTreeSet::new();
        for family in AfiSafi::SUPPORTED {
            for view in self.rib.paths(family) {
                let key = self.key_of(&view);
                let path = self.paths.get(&key).unwrap_or_else(|| panic!("{view} should be gone"));
                assert_eq!(*view.attributes, path.received);
                assert_eq!((view.since, view.stale, view.tag), (path.since, path.stale, path.tag), "{view}");
                assert!(seen.insert(key));
                let id = *self.local_ids.entry(key).or_insert(view.local_id);
                assert_eq!(id, view.local_id, "the identifier of {view} changed");
            }
        }
        assert!(seen.iter().eq(self.paths.keys()), "a path is missing");
        self.local_ids.retain(|key, _| seen.contains(key));
        let distinct: BTreeSet<(IpNet, u32)> = self.local_ids.iter().map(|(key, id)| (key.0, *id)).collect();
        assert_eq!(distinct.len(), self.local_ids.len(), "two paths share an identifier");
        for prefix in PREFIXES.map(net) {
            let expected: BTreeMap<PathKey, Reason> =
                self.imported(prefix).into_iter().map(|path| (path.key, path.reason)).collect();
            let views = self.rib.paths_to(prefix);
            let actual: BTreeMap<PathKey, Reason> =
                views.iter().map(|view| (self.key_of(view), view.reason)).collect();
            assert_eq!(actual, expected, "{prefix}");
            let best = views.iter().position(|view| view.reason == Reason::Best);
            assert!(best.is_none_or(|place| place == 0), "the best is not the first");
        }
        for (number, peer) in self.peers.iter().enumerate() {
            for family in AfiSafi::SUPPORTED {
                let own = self
                    .paths
                    .iter()
                    .filter(|((prefix, from, _), _)| *from == Some(number) && AfiSafi::of(prefix) == family);
                let counts = self.rib.counts(peer.id, family).unwrap();
                let stale = own.clone().filter(|(_, path)| path.stale).count();
                assert_eq!((counts.received, counts.stale), (own.clone().count() as u32, stale as u32));
                assert_eq!(self.rib.received(peer.id, family, Stage::Before).len(), own.count());
                let after = self.rib.received(peer.id, family, Stage::After);
                assert_eq!(counts.accepted as usize, after.len());
                let knows = peer.knows.keys().filter(|(prefix, _)| AfiSafi::of(prefix) == family).count();
                assert_eq!(counts.advertised as usize, knows);
            }
        }
        let used: BTreeSet<IpAddr> = self.rib.next_hops().map(|(address, _)| address).collect();
        let prefixes = PREFIXES.map(net);
        let expected: BTreeSet<IpAddr> = prefixes
            .iter()
            .flat_map(|&prefix| self.imported(prefix))
            .filter(|path| path.key.1.is_some())
            .filter_map(|path| Some(path.effective.ok()?.next_hop.address()))
            .collect();
        assert_eq!(used, expected);
    }

    /// When everybody has pulled everything, peers and kernel know exactly what they should.
    fn check_settled(&mut self) {
        #[allow(clippy::needless_range_loop)] // the index names the peer for half a dozen lookups
        for peer in 0..self.peers.len() {
            self.pull(peer, usize::MAX);
            let again = self.rib.advertise(self.peers[peer].id, usize::MAX);
            assert_eq!(again, Update::default(), "a second pull is empty");
            let mut expected = BTreeMap::new();
            let add_path = self.peers[peer].session.as_ref().map(|session| session.add_path_send);
            for prefix in PREFIXES.map(net) {
                for (key, attributes) in self.desired(peer, prefix) {
                    let several = add_path.is_some_and(|families| families.contains(AfiSafi::of(&prefix)));
                    let id = if several { self.local_ids[&key] } else { 0 };
                    expected.insert((prefix, id), attributes);
                }
            }
            assert_eq!(self.peers[peer].knows, expected, "peer {}", PEERS[peer].0);
            for family in AfiSafi::SUPPORTED {
                assert!(!self.rib.is_pending(self.peers[peer].id, family));
                let views = self.rib.advertised(self.peers[peer].id, family, Stage::After);
                let of_family = expected.iter().filter(|((prefix, _), _)| AfiSafi::of(prefix) == family);
                assert_eq!(views.len(), of_family.count());
                for view in views {
                    assert!(view.is_current);
                    assert_eq!(*view.attributes, expected[&(view.prefix, view.path_id)]);
                }
                let before = self.rib.advertised(self.peers[peer].id, family, Stage::Before);
                assert!(before.iter().all(|view| view.is_current));
            }
        }
        self.take_changes(usize::MAX);
        assert_eq!(self.rib.take_changes(usize::MAX), []);
        for prefix in PREFIXES.map(net) {
            let share: BTreeSet<Option<PeerId>> = self
                .imported(prefix)
                .into_iter()
                .filter(|path| matches!(path.reason, Reason::Best | Reason::Multipath(_)))
                .map(|path| path.key.1.map(|peer| self.peers[peer].id))
                .collect();
            let installed = self.fib.get(&prefix).map(Vec::as_slice).unwrap_or_default();
            assert_eq!(installed.iter().map(|path| path.peer).collect::<BTreeSet<_>>(), share, "{prefix}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order, the tables are what a computation from scratch gives, and
    /// peers and kernel end up with what they should have.
    #[test]
    fn incremental_is_from_scratch(operations in prop::collection::vec(operation(), 1..120)) {
        let mut model = Model::new();
        for peer in 0..PEERS.len() {
            model.run(Operation::Configure(peer, 1 + peer % 3));
            model.run(Operation::Up(peer, peer % 2));
        }
        for (index, operation) in operations.into_iter().enumerate() {
            model.run(operation);
            if index % 4 == 3 {
                model.check_tables();
            }
            if index % 16 == 15 {
                model.check_settled();
            }
        }
        model.check_tables();
        model.check_settled();
        // With all gone nothing is left.
        for peer in 0..PEERS.len() {
            if model.peers[peer].session.is_some() {
                model.down(peer, Families::NONE);
            }
            for family in AfiSafi::SUPPORTED {
                model.rib.sweep_stale(model.peers[peer].id, family);
                model.drop_paths(peer, family, true);
            }
        }
        for prefix in 0..PREFIXES.len() {
            model.run(Operation::Unoriginate(prefix, 0));
            model.run(Operation::Unoriginate(prefix, 1));
        }
        model.check_tables();
        model.check_settled();
        prop_assert_eq!(model.rib.prefixes(AfiSafi::Ipv4Unicast) + model.rib.prefixes(AfiSafi::Ipv6Unicast), 0);
        for peer in &model.peers {
            model.rib.peers.get_mut(peer.id).unwrap().attributes.sweep();
            prop_assert_eq!(model.rib.attribute_bytes(peer.id), 0);
        }
    }
}
