//! What only a kernel can tell: signatures, scopes, hops.

use std::io::{Read, Write};
use std::net::TcpStream;

use ferroute_bgp::fsm::Initiative;
use ferroute_bgp::message::{Codec, FrameReader, Message, Open};
use ferroute_bgp::transport::{Password, Reach};
use ferroute_kit::serial;

use super::*;

fn password(text: &str) -> Option<Password> {
    Some(Password::new(text.as_bytes()).unwrap())
}

/// Over each kind of address that two hosts on a wire can have.
#[test]
fn signed_sessions_over_every_kind_of_address() {
    let _serial = serial();
    let (a, b) = wire("md");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    let pairs = [
        (PeerKey::from(a.v4()), PeerKey::from(b.v4())),
        (a.v6().into(), b.v6().into()),
        (a.link_local(), b.link_local()),
    ];
    for (from, to) in pairs {
        let mut there = b.as_peer(to.clone());
        let mut here = a.as_peer(from.clone());
        (there.password, here.password) = (password("open sesame"), password("open sesame"));
        left.peers(vec![there]);
        right.peers(vec![here]);
        left.established(to);
        right.established(from);
        left.peers(vec![]);
        right.peers(vec![]);
    }
}

#[test]
fn a_wrong_password_is_said_and_a_right_one_works_at_once() {
    let _serial = serial();
    let (a, b) = wire("pw");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    let mut there = b.as_peer(b.v4());
    let mut here = a.as_peer(a.v4());
    // Wrong.
    (there.password, here.password) = (password("right"), password("wrong"));
    left.peers(vec![there.clone()]);
    right.peers(vec![here.clone()]);
    left.error(b.v4(), "another TCP MD5 password for this node");
    right.error(a.v4(), "another TCP MD5 password for this node");
    // On one side only.
    here.password = None;
    right.peers(vec![here.clone()]);
    right.error(a.v4(), "or wants a TCP MD5 password");
    assert_ne!(left.peer(b.v4()).state, State::Established);
    // Right.
    here.password = password("right");
    right.peers(vec![here.clone()]);
    left.established(b.v4());
    // A new one on both sides, without a restart of anything.
    (there.password, here.password) = (password("newer"), password("newer"));
    left.peers(vec![there]);
    right.peers(vec![here]);
    eventually("a new session", PATIENCE, || {
        let status = left.peer(b.v4());
        let new = status.state == State::Established && status.established >= 2;
        if new { Ok(()) } else { Err(format!("{status:#?}")) }
    });
    // No secret in anything that is shown.
    let shown = format!("{:?} {:?}", left.speaker.peers(), left.speaker);
    assert!(!shown.contains("newer") && !shown.contains("right"), "{shown}");
}

#[test]
fn routes_of_both_families_over_ipv6_and_link_local_sessions() {
    let _serial = serial();
    let (a, b) = wire("ll");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    left.advertises(&["192.0.2.0/24", "2001:db8::/32"]);
    left.peers(vec![b.as_peer(b.v6())]);
    right.peers(vec![a.as_peer(a.v6())]);
    right.learns(AfiSafi::Ipv4Unicast, &["192.0.2.0/24 via 10.9.0.1"]);
    right.learns(AfiSafi::Ipv6Unicast, &["2001:db8::/32 via fd09::1"]);
    left.peers(vec![]);
    right.peers(vec![]);
    // Over link-local addresses, with IPv6 next hops for IPv4 (RFC 8950).
    let (mut there, mut here) = (b.as_peer(b.link_local()), a.as_peer(a.link_local()));
    (there.extended_next_hop, here.extended_next_hop) = (true, true);
    left.peers(vec![there]);
    right.peers(vec![here]);
    right.learns(AfiSafi::Ipv6Unicast, &["2001:db8::/32 via fd09::1 fe80::1"]);
    let status = right.peer(a.link_local());
    assert!(status.negotiated.unwrap().codec.extended_next_hop);
}

#[test]
fn hops_are_counted() {
    let _serial = serial();
    let (a, b) = wire("gt");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    for (from, to) in [(a.v4(), b.v4()), (a.v6(), b.v6())] {
        for reach in [Reach::Security(1), Reach::Hops(1)] {
            let (mut there, mut here) = (b.as_peer(to), a.as_peer(from));
            (there.reach, here.reach) = (Some(reach), Some(reach));
            left.peers(vec![there]);
            right.peers(vec![here]);
            left.established(to);
            left.peers(vec![]);
            right.peers(vec![]);
        }
    }
    // One demands TTL 255, the other sends 1. A connection that is dialed is checked from its first segment.
    let mut there = b.as_peer(b.v4());
    there.initiative = Initiative::DialOnly;
    there.reach = Some(Reach::Security(1));
    left.peers(vec![there]);
    right.peers(vec![a.as_peer(a.v4())]);
    // Connections come about, since listeners answer with 255; nothing passes over them.
    ferroute_kit::assert::throughout("distance", Duration::from_secs(3), || match left.peer(b.v4()).state {
        State::OpenConfirm | State::Established => Err("an OPEN with TTL 1 passed".into()),
        _ => Ok(()),
    });
}

#[test]
fn a_wire_that_is_cut_is_noticed_by_the_hold_time() {
    let _serial = serial();
    let (a, b) = wire("ct");
    let (left, right) = (a.start(a.settings()), b.start(b.settings()));
    let (mut there, mut here) = (b.as_peer(b.v4()), a.as_peer(a.v4()));
    (there.hold_time, here.hold_time) = (3, 3);
    left.peers(vec![there]);
    right.peers(vec![here]);
    left.established(b.v4());
    a.netns.sh("ip link set eth0 down").unwrap();
    right.error(a.v4(), "nothing heard from the peer for 3 s (hold time)");
    a.netns.sh("ip link set eth0 up").unwrap();
    left.established(b.v4());
}

/// What a peer by hand hears of an OPEN until the other side closes.
fn answer_to(open: &Open, from: &Host, to: IpAddr) -> Vec<Message> {
    let mut stream = from.netns.run(|| TcpStream::connect((to, 179))).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut bytes, codec) = (Vec::new(), Codec::initial());
    Message::Open(open.clone()).encode(&codec, &mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
    let (mut heard, mut reader) = (Vec::new(), FrameReader::new());
    loop {
        while let Some(frame) = reader.next_frame(&codec).unwrap() {
            heard.push(Message::decode(frame, &codec).unwrap().message);
        }
        match stream.read(reader.space()).unwrap() {
            0 => return heard,
            count => reader.filled(count),
        }
    }
}

/// A hold time of one or two seconds is refused and said (RFC 4271 section 6.2), three are taken, and the
/// session with another peer does not notice.
#[test]
fn a_hold_time_that_is_too_short_is_refused() {
    let _serial = serial();
    let (a, r, c) = star("ht");
    let (node, other) = (r.start(r.settings()), a.start(a.settings()));
    let by_hand = PeerConfig { initiative: Initiative::Passive, ..c.as_peer(c.v4()) };
    node.peers(vec![a.as_peer(a.v4()), by_hand]);
    other.peers(vec![r.as_peer(r.v4())]);
    other.advertises(&["192.0.2.0/24"]);
    node.learns(AfiSafi::Ipv4Unicast, &["192.0.2.0/24 via 10.9.0.1"]);
    for (hold_time, numbers) in [(1, (2, 6)), (2, (2, 6)), (3, (4, 0))] {
        let open = Open {
            asn: c.asn(),
            four_octet_as: true,
            hold_time,
            router_id: RouterId(Ipv4Addr::new(10, 9, 0, 3)),
            capabilities: vec![],
        };
        // After an error the node takes a breath, in which it takes no connection of this peer.
        let heard = eventually("an answer", PATIENCE, || match answer_to(&open, &c, r.v4()) {
            heard if heard.is_empty() => Err("none".to_owned()),
            heard => Ok(heard),
        });
        let Some(Message::Notification(notification)) = heard.last() else { panic!("{heard:?}") };
        assert_eq!(notification.error.numbers(), numbers, "{heard:?}");
        if hold_time < 3 {
            node.error(c.v4(), &format!("hold time of {hold_time} s"));
        }
    }
    node.never_flapped([a.v4()]);
    assert_eq!(node.learned(AfiSafi::Ipv4Unicast).len(), 1);
}
