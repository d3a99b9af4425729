//! BFD: paths that break, and peers that only restart.

use std::time::Instant;

use ferroute_bgp::bfd::{Hops, State as PathState, Timers};
use ferroute_bgp::fsm::Initiative;
use ferroute_bgp::peer::PeerBfd;
use ferroute_kit::serial;

use super::bird::Bird;
use super::*;

/// 100 ms x 3.
fn fast(hops: Hops) -> Option<PeerBfd> {
    let interval = Duration::from_millis(100);
    let timers = Timers::new(interval, interval, 3).unwrap();
    Some(PeerBfd { timers, hops, passive: false, graceful: false })
}

fn path_is(node: &Node, key: impl Into<PeerKey>, wanted: PathState) {
    let key = key.into();
    eventually("BFD", PATIENCE, || {
        let path = node.peer(key.clone()).path;
        if path.as_ref().is_some_and(|path| path.state == wanted) { Ok(()) } else { Err(format!("{path:?}")) }
    });
}

/// Waits for the end of a session that is up, and how long it took.
fn ends(node: &Node, key: impl Into<PeerKey>, since: Instant) -> Duration {
    let key = key.into();
    while node.peer(key.clone()).state == State::Established {
        assert!(since.elapsed() < PATIENCE, "{:#?}", node.peer(key));
        std::thread::sleep(Duration::from_millis(2));
    }
    since.elapsed()
}

/// Over one hop of both families and a link-local address, and over several.
#[test]
fn a_cut_wire_ends_the_session_long_before_the_hold_time() {
    let _serial = serial();
    let (a, b) = wire("bf");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    let far = Hops::Multi { minimum_ttl: 200 };
    let cases = [
        (PeerKey::from(a.v4()), PeerKey::from(b.v4()), Hops::Single),
        (a.v6().into(), b.v6().into(), Hops::Single),
        (a.link_local(), b.link_local(), Hops::Single),
        (a.v4().into(), b.v4().into(), far),
    ];
    for (from, to, hops) in cases {
        let mut there = b.as_peer(to.clone());
        let mut here = a.as_peer(from.clone());
        (there.bfd, here.bfd) = (fast(hops), fast(hops));
        left.peers(vec![there]);
        right.peers(vec![here]);
        left.established(to.clone());
        right.established(from.clone());
        path_is(&left, to.clone(), PathState::Up);
        path_is(&right, from.clone(), PathState::Up);
        let cut = Instant::now();
        // The far end sees a link that is up and silent.
        a.silence("-A");
        let taken = ends(&right, from.clone(), cut);
        println!("{from} {hops:?}: down after {} ms", taken.as_millis());
        right.error(from.clone(), "BFD session down");
        assert!(taken < Duration::from_secs(2), "{taken:?}");
        a.silence("-D");
        right.established(from);
        left.peers(vec![]);
        right.peers(vec![]);
    }
}

/// A session that is switched off, and a speaker that stops, are no broken paths; BFD comes and goes under a
/// session that stays.
#[test]
fn what_ends_on_purpose_breaks_nothing() {
    let _serial = serial();
    let (a, b) = wire("bp");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    let (mut there, mut here) = (b.as_peer(b.v4()), a.as_peer(a.v4()));
    // One side dials: two connections at once may end one session that is up already.
    (there.initiative, here.initiative) = (Initiative::DialOnly, Initiative::Passive);
    left.peers(vec![there.clone()]);
    right.peers(vec![here.clone()]);
    left.established(b.v4());
    right.established(a.v4());
    for _ in 0..2 {
        (there.bfd, here.bfd) = (fast(Hops::Single), fast(Hops::Single));
        left.peers(vec![there.clone()]);
        right.peers(vec![here.clone()]);
        path_is(&left, b.v4(), PathState::Up);
        path_is(&right, a.v4(), PathState::Up);
        there.bfd = None;
        left.peers(vec![there.clone()]);
        assert_eq!(left.peer(b.v4()).path, None);
        ferroute_kit::assert::throughout("the session", Duration::from_secs(1), || {
            let status = right.peer(a.v4());
            if status.flaps == 0 { Ok(()) } else { Err(format!("{status:#?}")) }
        });
    }
}

#[test]
fn bird_is_watched_and_watches() {
    let _serial = serial();
    let (a, b) = wire("bw");
    let bird = Bird::start(&b, &a, "bfd on;");
    let node = a.start(a.settings());
    let peer = |hops| PeerConfig { bfd: fast(hops), ..b.as_peer(b.v4()) };
    node.peers(vec![peer(Hops::Single)]);
    node.advertises(&["10.96.0.10/32"]);
    node.established(b.v4());
    path_is(&node, b.v4(), PathState::Up);
    bird.shows("show bfd sessions", "Up");
    bird.learns("v4", &["10.96.0.10/32"]);
    let learned = ["198.51.100.0/24 via 10.9.0.2", "203.0.113.7/32 via 10.9.0.2"];
    // Silent towards BIRD, which says so; then BIRD is silent, and we notice.
    for (host, error) in [(&a, "NOTIFICATION"), (&b, "BFD session down: nothing heard")] {
        host.silence("-A");
        node.error(b.v4(), error);
        assert_eq!(node.learned(AfiSafi::Ipv4Unicast), [""; 0]);
        if error == "NOTIFICATION" {
            bird.shows("show protocols all v4", "Error: BFD session down");
        }
        host.silence("-D");
        node.established(b.v4());
        path_is(&node, b.v4(), PathState::Up);
        node.learns(AfiSafi::Ipv4Unicast, &learned);
    }
    // BIRD dies, and its BFD with it: its routes are kept all the same.
    drop(bird);
    path_is(&node, b.v4(), PathState::Down);
    assert_eq!(node.learned(AfiSafi::Ipv4Unicast).len(), 2);
    assert!(node.peer(b.v4()).keeping_routes);
    // What the network knows by other means still counts.
    assert!(node.speaker.path_down(&b.v4().into(), "the switch says so"));
    eventually("no routes", PATIENCE, || match node.learned(AfiSafi::Ipv4Unicast).len() {
        0 => Ok(()),
        routes => Err(routes.to_string()),
    });
}
