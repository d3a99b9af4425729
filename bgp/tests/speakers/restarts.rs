//! Graceful restart, of this side and of the other.

use ferroute_bgp::fsm::Shutdown;
use ferroute_bgp::message::{Capability, Families, GracefulRestart, GracefulRestartFamily, Message};
use ferroute_bgp::speaker::RestartConfig;

use super::sessions::Puppet;
use super::*;

/// A node that keeps forwarding while it restarts.
fn restarting(number: u8, time: u16, restarted: bool) -> SpeakerConfig {
    let mut config = settings(number);
    config.restart =
        Some(RestartConfig { time, forwarding: Families::ALL, restarted, deferral: Duration::from_secs(5) });
    config
}

/// Withdrawn prefixes that a watch has seen.
fn losses(watch: &mut ferroute_bgp::speaker::Watch) -> usize {
    watch.take(usize::MAX).routes.iter().filter(|route| route.paths.is_empty()).count()
}

#[tokio::test]
async fn a_restart_keeps_the_routes_at_the_peer() {
    let (mut a, b) = (Node::start(restarting(1, 60, false)), Node::new(2));
    connect(&a, &b, |_| ()).await;
    a.advertises(prefixes(50).into_iter().chain(prefixes_v6(50)));
    until("routes", || async { b.learned(AfiSafi::Ipv6Unicast).await.len() == 50 }).await;
    let mut watch = b.speaker.watch();
    watch.next(usize::MAX).await;
    for round in 1..=3 {
        a.speaker.stop(Shutdown::Silent).await;
        until("the end", || async { b.state(&a) != State::Established }).await;
        let status = b.sees(&a);
        assert!(status.keeping_routes);
        assert_eq!(b.learned(AfiSafi::Ipv4Unicast).await.len(), 50);
        // The next life of the node, with one route less and one more.
        let mut config = restarting(1, 60, true);
        config.listen = vec![a.address];
        a = Node::start(config);
        let peer = b.as_peer_of(&a);
        a.peers(vec![peer]);
        until("the session", || async { b.state(&a) == State::Established }).await;
        let restart = b.sees(&a).negotiated.unwrap().restart.unwrap();
        assert!(restart.restarted && restart.forwarding == Families::ALL);
        // Nothing is lost before the node has said what it has.
        stays("the routes", Duration::from_millis(50), || b.sees(&a).prefixes[0].1.accepted == 50).await;
        assert_eq!(losses(&mut watch), 0);
        a.advertises(prefixes(51 + round).into_iter().skip(1 + round as usize).chain(prefixes_v6(50)));
        until("the new routes", || async {
            let status = b.sees(&a);
            (!status.keeping_routes && status.prefixes.iter().all(|(_, counts)| counts.stale == 0))
                .then_some(())
                .ok_or(status)
        })
        .await;
        let learned = b.learned(AfiSafi::Ipv4Unicast).await;
        assert_eq!(learned.len(), 50);
        assert!(learned.contains(&prefixes(51)[50]) && !learned.contains(&prefixes(1)[0]));
        assert_eq!(losses(&mut watch), if round == 1 { 2 } else { 1 });
        // The word that it restarted is for the first sessions only.
        until("the end of the restart", || async {
            a.speaker.reset(&b.key(), "again");
            established(&a, &b).await;
            b.sees(&a).negotiated.is_some_and(|negotiated| !negotiated.restart.unwrap().restarted)
        })
        .await;
        until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 50 }).await;
        watch.take(usize::MAX);
    }
}

#[tokio::test]
async fn a_peer_that_does_not_come_back_is_forgotten() {
    let (a, b) = (Node::start(restarting(1, 1, false)), Node::new(2));
    connect(&a, &b, |_| ()).await;
    a.advertises(prefixes(5));
    until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 5 }).await;
    let stopped = Instant::now();
    a.speaker.stop(Shutdown::Silent).await;
    until("the end", || async { b.state(&a) != State::Established }).await;
    assert_eq!(b.learned(AfiSafi::Ipv4Unicast).await.len(), 5);
    until("nothing", || async { b.learned(AfiSafi::Ipv4Unicast).await.is_empty() }).await;
    assert!(stopped.elapsed() > Duration::from_millis(900), "kept for {:?}", stopped.elapsed());
    assert!(!b.sees(&a).keeping_routes);
}

#[tokio::test]
async fn an_administrative_shutdown_takes_the_routes_away_at_once() {
    let (a, b) = (Node::start(restarting(1, 60, false)), Node::new(2));
    connect(&a, &b, |_| ()).await;
    a.advertises(prefixes(5));
    until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 5 }).await;
    a.speaker.stop(Shutdown::Administrative("gone for good".into())).await;
    until("nothing", || async { b.learned(AfiSafi::Ipv4Unicast).await.is_empty() }).await;
    assert!(b.last_error(&a).await.contains("hard reset"));
}

#[tokio::test]
async fn a_reset_keeps_the_routes() {
    let (a, b) = (Node::start(restarting(1, 60, false)), Node::start(restarting(2, 60, false)));
    connect(&a, &b, |_| ()).await;
    a.advertises(prefixes(5));
    until("routes", || async { b.learned(AfiSafi::Ipv4Unicast).await.len() == 5 }).await;
    let mut watch = b.speaker.watch();
    watch.next(usize::MAX).await;
    a.speaker.reset(&b.key(), "new cable");
    until("the next session", || async { b.sees(&a).established == 2 }).await;
    until("all fresh", || async { b.sees(&a).prefixes[0].1.stale == 0 }).await;
    assert_eq!((b.learned(AfiSafi::Ipv4Unicast).await.len(), losses(&mut watch)), (5, 0));
}

fn capable(number: u8, restarted: bool) -> ferroute_bgp::message::Open {
    let family = AfiSafi::Ipv4Unicast;
    let mut open = Puppet::open(number, 90);
    open.capabilities = vec![
        Capability::Multiprotocol(family),
        Capability::GracefulRestart(GracefulRestart {
            restarted,
            notification: true,
            restart_time: 60,
            families: vec![GracefulRestartFamily { family, forwarding_preserved: true }],
        }),
    ];
    open
}

/// A node that restarted says End-of-RIB only after the peers that are there have told it theirs,
/// and does not wait for those that are not.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_rib_waits_for_live_peers_only() {
    let mut config = restarting(1, 60, true);
    if let Some(restart) = &mut config.restart {
        restart.deferral = Duration::from_secs(600);
    }
    let a = Node::start(config);
    let b = Node::new(9);
    let mut dead = b.as_peer_of(&a);
    dead.port = 9;
    a.peers(vec![dead, Puppet::config(7)]);
    a.advertises(prefixes(1));
    let mut watch = a.speaker.watch();
    let mut puppet = Puppet::establish_with(7, capable(7, false), &a);
    puppet.announce(&prefixes(2));
    let Some(Message::Update(update)) = puppet.hear() else { panic!() };
    assert_eq!((update.announced.len(), update.end_of_rib), (1, None));
    until("routes", || async { a.speaker.peers()[0].prefixes[0].1.accepted == 2 }).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(watch.take(usize::MAX).is_empty(), "the kernel's routes are left alone meanwhile");
    puppet.end_of_rib(AfiSafi::Ipv4Unicast);
    let Some(Message::Update(update)) = puppet.hear() else { panic!() };
    assert_eq!(update.end_of_rib, Some(AfiSafi::Ipv4Unicast));
    let mut changes = watch.next(usize::MAX).await.unwrap();
    while changes.complete != Families::ALL {
        changes.routes.extend(watch.next(usize::MAX).await.unwrap().routes);
        changes.complete = Families::ALL;
    }
    assert!(changes.routes.len() >= 2, "{changes:?}");
}

/// A node does not say that it is through before it was told what to advertise.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_rib_waits_for_the_advertisements() {
    let a = Node::new(1);
    a.peers(vec![Puppet::config(7)]);
    let mut puppet = Puppet::establish_with(7, capable(7, false), &a);
    a.speaker.advertise(vec![advertisement(prefixes(1)[0])]);
    let Some(Message::Update(update)) = puppet.hear() else { panic!() };
    assert_eq!((update.announced.len(), update.end_of_rib), (1, None));
    a.advertises(prefixes(1));
    let Some(Message::Update(update)) = puppet.hear() else { panic!() };
    assert_eq!(update.end_of_rib, Some(AfiSafi::Ipv4Unicast));
}

/// A peer that died without a word and comes back before that was noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_of_a_peer_that_restarts_takes_over() {
    let a = Node::new(1);
    a.peers(vec![Puppet::config(7)]);
    let mut first = Puppet::establish_with(7, capable(7, false), &a);
    first.announce(&prefixes(3));
    until("routes", || async { a.learned(AfiSafi::Ipv4Unicast).await.len() == 3 }).await;
    let mut second = Puppet::establish_with(7, capable(7, true), &a);
    until("stale routes", || async { a.speaker.peers()[0].prefixes[0].1.stale == 3 }).await;
    assert_eq!(a.learned(AfiSafi::Ipv4Unicast).await.len(), 3);
    second.announce(&prefixes(2));
    second.end_of_rib(AfiSafi::Ipv4Unicast);
    until("two routes", || async { a.learned(AfiSafi::Ipv4Unicast).await.len() == 2 }).await;
    while let Some(message) = first.hear() {
        assert!(!matches!(message, Message::Notification(_)), "{message:?}");
    }
}
