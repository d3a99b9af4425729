//! Settings that cannot be: a clear error each, and everybody else goes on.

use ferroute_bgp::message::Families;
use ferroute_bgp::peer::{ConfigError, ConfigFlaw};
use ferroute_bgp::speaker::{RestartConfig, StartError};

use super::*;

#[tokio::test]
async fn speakers_that_cannot_be() {
    for (change, error) in [
        ((|config| config.asn = Asn(0)) as fn(&mut SpeakerConfig), StartError::ZeroAsn),
        (|config| config.router_id = RouterId::from(0), StartError::ZeroRouterId),
        (
            |config| {
                config.restart = Some(RestartConfig {
                    time: 5000,
                    forwarding: Families::ALL,
                    restarted: false,
                    deferral: Duration::from_secs(1),
                });
            },
            StartError::RestartTime(5000),
        ),
    ] {
        let mut config = settings(1);
        change(&mut config);
        assert_eq!(Speaker::start(config).err(), Some(error));
    }
}

#[tokio::test]
async fn peers_that_cannot_be_leave_the_others_alone() {
    let (a, b) = pair().await;
    let good = b.as_peer_of(&a);
    let with = |change: fn(&mut PeerConfig)| {
        let mut config = PeerConfig::new("127.0.0.77".parse().unwrap(), PeerAsn::Exactly(Asn(65077)));
        change(&mut config);
        config
    };
    let mut itself = with(|_| ());
    itself.key = a.key();
    itself.port = a.address.port();
    let bad = vec![
        (with(|config| config.asn = PeerAsn::Exactly(Asn(0))), ConfigFlaw::ZeroAsn),
        (with(|config| config.hold_time = 1), ConfigFlaw::HoldTime(1)),
        (with(|config| config.key.address = "fe80::1".parse().unwrap()), ConfigFlaw::NoInterface),
        (itself, ConfigFlaw::Itself),
        (good.clone(), ConfigFlaw::Duplicate),
    ];
    for (config, flaw) in bad {
        let key = config.key.clone();
        let errors = a.speaker.set_peers(vec![good.clone(), config]);
        assert_eq!(errors, [ConfigError { key, flaw }]);
        assert_eq!(a.speaker.peers().len(), 1);
    }
    let errors = a.speaker.set_peers(vec![good.clone(), with(|config| config.hold_time = 2)]);
    assert_eq!(
        errors[0].to_string(),
        "peer 127.0.0.77: a hold time of 2 s is not allowed: 0 for none, or at least 3 (RFC 4271)"
    );
    // A bad change of a good peer keeps what was.
    let mut bad = good.clone();
    bad.hold_time = 2;
    assert_eq!(a.speaker.set_peers(vec![bad]).len(), 1);
    assert_eq!((a.state(&b), a.sees(&b).flaps, b.sees(&a).flaps), (State::Established, 0, 0));
}

#[tokio::test]
async fn a_node_that_peers_with_itself_is_told() {
    let a = Node::new(1);
    // Hidden from the check of the settings by another address of the same node.
    let mut listens_everywhere = settings(1);
    listens_everywhere.listen = vec!["0.0.0.0:0".parse().unwrap()];
    let b = Node::start(listens_everywhere);
    let mut config = PeerConfig::new("127.0.0.5".parse().unwrap(), PeerAsn::Any);
    config.port = b.address.port();
    config.source = Some("127.0.0.5".parse().unwrap());
    b.peers(vec![config]);
    until("words", || async {
        let text = b.speaker.peers()[0].last_error().map(|error| error.text.clone());
        text.filter(|text| text.contains("of this node: give one of them another router id"))
    })
    .await;
    drop(a);
}

#[tokio::test]
async fn a_port_in_use_is_said_and_taken_when_it_is_free() {
    let taken = Node::new(1);
    let mut config = settings(2);
    config.listen = vec![taken.address, "127.0.0.2:0".parse().unwrap()];
    let speaker = Speaker::start(config).unwrap();
    let status = speaker.listeners();
    let failed = status.iter().find(|status| status.wanted == taken.address).unwrap();
    assert_eq!(failed.address, None);
    assert!(failed.error.as_ref().unwrap().contains("the port is in use"), "{failed:?}");
    // The other address serves.
    let b =
        Node { address: status.iter().find_map(|status| status.address).unwrap(), speaker, asn: Asn(64002) };
    let c = Node::new(3);
    connect(&b, &c, |_| ()).await;
    taken.speaker.stop(ferroute_bgp::fsm::Shutdown::Silent).await;
    until("the port", || async { b.speaker.listeners().iter().all(|status| status.address.is_some()) }).await;
    assert_eq!(b.state(&c), State::Established);
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_explained() {
    let (a, b) = (Node::new(1), Node::new(2));
    let mut config = b.as_peer_of(&a);
    config.port = 9;
    a.peers(vec![config.clone()]);
    until("words", || async { a.last_error(&b).await.contains("refuses the connection: no BGP speaker") })
        .await;
    config.source = Some("192.0.2.55".parse().unwrap());
    a.peers(vec![config]);
    until("words", || async { a.last_error(&b).await.contains("is it an address of this node?") }).await;
}
