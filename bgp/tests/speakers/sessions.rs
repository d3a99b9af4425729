//! How sessions begin and end.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use ferroute_bgp::fsm::Shutdown;
use ferroute_bgp::message::{
    Announcement, AsPath, Codec, Families, FrameReader, Message, Nlri, Open, RefreshKind, RouteRefresh,
    Update,
};
use ferroute_bgp::transport::Reach;

use super::*;

#[tokio::test]
async fn a_session_comes_up_at_once_and_is_described() {
    let started = Instant::now();
    let (a, b) = pair().await;
    let took = started.elapsed();
    assert!(took < Duration::from_millis(300), "session after {took:?}");
    let status = a.sees(&b);
    let negotiated = status.negotiated.unwrap();
    assert_eq!(negotiated.peer_asn, b.asn);
    assert_eq!(negotiated.codec.families, Families::ALL);
    assert_eq!(negotiated.peer_host.as_deref(), Some("node-2"));
    assert_eq!(status.local_address.unwrap().ip(), a.address.ip());
    assert!(status.sent_open.unwrap().capabilities.len() > 4);
    assert!(status.received_open.unwrap().capabilities.len() > 4);
    assert!(status.uptime.is_some() && status.flaps == 0 && status.established == 1);
    assert!(status.sent.open >= 1 && status.received.keepalive >= 1);
}

#[tokio::test]
async fn ipv6_and_as_numbers_of_four_octets() {
    let node = |number: u8, asn: u32| {
        let mut config = settings(number);
        config.asn = Asn(asn);
        config.listen = vec!["[::1]:0".parse().unwrap()];
        Node::start(config)
    };
    let (a, b) = (node(1, 4_200_000_001), node(2, 4_200_000_002));
    connect(&a, &b, |config| config.source = None).await;
    // Both sides have the same address here, which cannot be a next hop: others are given.
    a.speaker.set_advertisements(
        [(prefixes(1)[0], "127.0.0.1"), (prefixes_v6(1)[0], "2001:db8::1")]
            .into_iter()
            .map(|(prefix, next_hop)| Advertisement {
                attributes: Arc::new(Attributes {
                    next_hop: next_hop.parse::<IpAddr>().unwrap().into(),
                    ..Attributes::default()
                }),
                ..advertisement(prefix)
            })
            .collect(),
    );
    until("both routes", || async {
        b.learned(AfiSafi::Ipv4Unicast).await.len() == 1 && b.learned(AfiSafi::Ipv6Unicast).await.len() == 1
    })
    .await;
    let negotiated = b.sees(&a).negotiated.unwrap();
    assert_eq!((negotiated.peer_asn, negotiated.codec.four_octet_as), (Asn(4_200_000_001), true));
    let paths = b.speaker.rib(|rib| rib.paths(AfiSafi::Ipv6Unicast)).await.unwrap();
    assert_eq!(paths[0].attributes.next_hop.to_string(), "2001:db8::1");
    assert_eq!(paths[0].attributes.as_path.first(), Some(Asn(4_200_000_001)));
}

#[tokio::test]
async fn a_wrong_as_is_told_to_both_operators() {
    let (a, b) = (Node::new(1), Node::new(2));
    let mut wrong = b.as_peer_of(&a);
    wrong.asn = PeerAsn::Exactly(Asn(65009));
    a.peers(vec![wrong]);
    b.peers(vec![a.as_peer_of(&b)]);
    until("words at a", || async { a.last_error(&b).await == "peer says AS 64002, configured 65009" }).await;
    until("words at b", || async {
        let error = b.last_error(&a).await;
        if error.contains("OPEN error: bad peer AS (2/2)") { Ok(()) } else { Err(error) }
    })
    .await;
    // Once it is right, it works without a restart.
    a.peers(vec![b.as_peer_of(&a)]);
    established(&a, &b).await;
}

#[tokio::test]
async fn one_side_may_be_passive_but_not_both() {
    let (a, b) = (Node::new(1), Node::new(2));
    let mut passive = b.as_peer_of(&a);
    passive.initiative = Initiative::Passive;
    a.peers(vec![passive]);
    b.peers(vec![a.as_peer_of(&b)]);
    established(&a, &b).await;
    let (a, b) = (Node::new(3), Node::new(4));
    for (node, other) in [(&a, &b), (&b, &a)] {
        let mut passive = other.as_peer_of(node);
        passive.initiative = Initiative::Passive;
        node.peers(vec![passive]);
    }
    until("both wait", || async { a.state(&b) == State::Active && b.state(&a) == State::Active }).await;
    stays("silence", Duration::from_millis(200), || a.state(&b) == State::Active).await;
}

#[tokio::test]
async fn a_speaker_that_does_not_listen_dials() {
    let mut config = settings(1);
    config.listen.clear();
    let speaker = Speaker::start(config).unwrap();
    let a = Node { speaker, address: "127.0.0.1:0".parse().unwrap(), asn: Asn(64001) };
    let b = Node::new(2);
    let mut from_b = a.as_peer_of(&b);
    // Nobody listens there: b's own dials fail, and do no harm.
    from_b.port = 9;
    b.peers(vec![from_b]);
    let mut from_a = b.as_peer_of(&a);
    from_a.initiative = Initiative::DialOnly;
    a.peers(vec![from_a]);
    established(&a, &b).await;
}

#[tokio::test]
async fn two_that_dial_each_other_end_with_one_session() {
    for _ in 0..20 {
        let (a, b) = pair().await;
        stays("the session", Duration::from_millis(20), || {
            a.state(&b) == State::Established && b.state(&a) == State::Established
        })
        .await;
        assert_eq!((a.sees(&b).established, b.sees(&a).established), (1, 1), "{:#?}", a.sees(&b).errors);
    }
}

#[tokio::test]
async fn many_peers_mesh() {
    let nodes: Vec<Node> = (1..=12).map(Node::new).collect();
    for node in &nodes {
        let others = nodes.iter().filter(|other| other.address != node.address);
        node.peers(others.map(|other| other.as_peer_of(node)).collect());
    }
    for node in &nodes {
        for other in nodes.iter().filter(|other| other.address != node.address) {
            established(node, other).await;
        }
    }
}

#[tokio::test]
async fn ttl_security_and_hops() {
    for reach in [Reach::Security(1), Reach::Hops(1), Reach::Hops(5), Reach::Any] {
        let (a, b) = (Node::new(1), Node::new(2));
        connect(&a, &b, |config| config.reach = Some(reach)).await;
    }
    // One that insists on TTL 255, one that sends 1.
    let (a, b) = (Node::new(1), Node::new(2));
    let mut secure = b.as_peer_of(&a);
    secure.reach = Some(Reach::Security(1));
    secure.dial_timeout = Duration::from_millis(300);
    a.peers(vec![secure]);
    let mut near = a.as_peer_of(&b);
    near.dial_timeout = Duration::from_millis(300);
    b.peers(vec![near]);
    stays("distance", Duration::from_millis(800), || a.state(&b) != State::Established).await;
}

#[tokio::test]
async fn the_last_words_reach_the_peer() {
    let (a, b) = pair().await;
    let mut events = b.speaker.events();
    a.speaker.stop(Shutdown::Administrative("drain node-1".into())).await;
    until("the text", || async { b.last_error(&a).await.contains("\"drain node-1\"") }).await;
    let event = events.recv().await.unwrap();
    assert_eq!(event.peer, a.key());
    assert!(format!("{:?}", event.kind).contains("administrative shutdown"), "{event:?}");
    // The RIB and the tasks are gone.
    assert_eq!(a.speaker.rib(|_| ()).await, None);
}

#[tokio::test]
async fn a_reset_comes_back_at_once() {
    let (a, b) = pair().await;
    assert!(a.speaker.reset(&b.key(), "maintenance"));
    until("another session", || async { a.sees(&b).established == 2 && b.sees(&a).established == 2 }).await;
    established(&a, &b).await;
    assert!(b.last_error(&a).await.contains("administrative reset"));
    assert!(!a.speaker.reset(&a.key(), "nobody"));
}

#[tokio::test]
async fn a_broken_path_ends_the_session() {
    let (a, b) = pair().await;
    assert!(a.speaker.path_down(&b.key(), "BFD session down"));
    until("the end", || async { b.last_error(&a).await.contains("BFD down") }).await;
    established(&a, &b).await;
}

#[tokio::test]
async fn a_speaker_that_is_dropped_closes_its_sockets() {
    let (a, b) = pair().await;
    let address = a.address;
    drop(a);
    until("the end", || async { b.speaker.peers()[0].state != State::Established }).await;
    until("the port", || async { TcpListener::bind(address) }).await;
}

/// A peer made by hand, that does only what it is told.
pub(crate) struct Puppet {
    stream: TcpStream,
    reader: FrameReader,
    codec: Codec,
    asn: Asn,
}

impl Puppet {
    /// Connects to a node from 127.0.0.`number`.
    pub(crate) fn connect(number: u8, node: &Node) -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(Ipv4Addr::new(127, 0, 0, number).into(), 0).into()).unwrap();
        socket.connect(&node.address.into()).unwrap();
        let stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            reader: FrameReader::new(),
            codec: Codec::initial(),
            asn: Asn(64000 + u32::from(number)),
        }
    }

    pub(crate) fn config(number: u8) -> PeerConfig {
        let address = Ipv4Addr::new(127, 0, 0, number);
        let mut config = PeerConfig::new(address.into(), PeerAsn::Exactly(Asn(64000 + u32::from(number))));
        config.initiative = Initiative::Passive;
        config.routes.import = Some(Arc::new(Policy::accept_all()));
        config.routes.export = Some(Arc::new(Policy::accept_all()));
        config
    }

    pub(crate) fn open(number: u8, hold_time: u16) -> Open {
        Open {
            asn: Asn(64000 + u32::from(number)),
            four_octet_as: true,
            hold_time,
            router_id: RouterId::from(u32::from(number)),
            capabilities: vec![],
        }
    }

    pub(crate) fn send(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&self.codec, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next message; `None` when the connection is closed.
    pub(crate) fn hear(&mut self) -> Option<Message> {
        loop {
            if let Some(frame) = self.reader.next_frame(&self.codec).unwrap() {
                return Some(Message::decode(frame, &self.codec).unwrap().message);
            }
            match self.stream.read(self.reader.space()).unwrap() {
                0 => return None,
                count => self.reader.filled(count),
            }
        }
    }

    /// Brings a session up.
    pub(crate) fn establish(number: u8, hold_time: u16, node: &Node) -> Self {
        Self::establish_with(number, Self::open(number, hold_time), node)
    }

    pub(crate) fn establish_with(number: u8, open: Open, node: &Node) -> Self {
        let mut puppet = Self::connect(number, node);
        puppet.send(&Message::Open(open.clone()));
        let Some(Message::Open(theirs)) = puppet.hear() else { panic!("no OPEN") };
        puppet.codec = Codec::negotiate(&open, &theirs);
        assert_eq!(puppet.hear(), Some(Message::Keepalive));
        puppet.send(&Message::Keepalive);
        puppet
    }

    pub(crate) fn announce(&mut self, prefixes: &[IpNet]) {
        let attributes = Arc::new(Attributes {
            as_path: AsPath::sequence([self.asn]),
            next_hop: IpAddr::from([127, 0, 0, 7]).into(),
            ..Attributes::default()
        });
        let nlri = prefixes.iter().map(|prefix| Nlri::new(*prefix)).collect();
        let announced = vec![Announcement { attributes, nlri }];
        self.send(&Message::Update(Update { announced, ..Update::default() }));
    }

    pub(crate) fn end_of_rib(&mut self, family: AfiSafi) {
        self.send(&Message::Update(Update { end_of_rib: Some(family), ..Update::default() }));
    }

    pub(crate) fn refresh(&mut self, kind: RefreshKind) {
        self.send(&Message::RouteRefresh(RouteRefresh { family: AfiSafi::Ipv4Unicast, kind }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_a_session_after_the_hold_time() {
    let a = Node::new(1);
    a.peers(vec![Puppet::config(7)]);
    let started = Instant::now();
    let mut puppet = Puppet::establish(7, 3, &a);
    let mut heard = Vec::new();
    while let Some(message) = puppet.hear() {
        heard.push(message);
    }
    let took = started.elapsed();
    assert!((2900..4500).contains(&took.as_millis()), "ended after {took:?}");
    let Some(Message::Notification(notification)) = heard.last() else { panic!("{heard:?}") };
    assert_eq!(notification.to_string(), "hold timer expired (4/0)");
    let keepalives = heard.iter().filter(|message| **message == Message::Keepalive).count();
    assert!(keepalives >= 2, "{heard:?}");
    let status = a.speaker.peers().remove(0);
    assert_eq!(status.last_error().unwrap().text, "nothing heard from the peer for 3 s (hold time)");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_answered_and_explained() {
    let a = Node::new(1);
    a.peers(vec![Puppet::config(7)]);
    let mut puppet = Puppet::connect(7, &a);
    puppet.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut last = None;
    while let Some(message) = puppet.hear() {
        last = Some(message);
    }
    let Some(Message::Notification(notification)) = last else { panic!("{last:?}") };
    assert_eq!(notification.error.numbers(), (1, 1));
    until("words", || async {
        a.speaker.peers()[0].last_error().is_some_and(|error| error.text.contains("marker"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_not_let_in() {
    let a = Node::new(1);
    a.peers(vec![Puppet::config(7)]);
    let mut stranger = Puppet::connect(8, &a);
    assert_eq!(stranger.hear(), None);
}
