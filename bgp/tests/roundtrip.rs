//! What is written is read back the same, whatever was negotiated.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::Arc;

use ferroute_bgp::message::*;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn codec() -> impl Strategy<Value = Codec> {
    let families =
        prop_oneof![Just(Families::NONE), Just(Families::IPV4), Just(Families::IPV6), Just(Families::ALL)];
    (any::<[bool; 4]>(), families).prop_map(|([internal, four_octet_as, extended, next_hop], add_path)| {
        let max = if extended { EXTENDED_MESSAGE_MAX } else { MESSAGE_MAX };
        Codec {
            internal,
            four_octet_as,
            families: Families::ALL,
            add_path_receive: add_path,
            add_path_send: add_path,
            extended_next_hop: next_hop,
            enhanced_refresh: true,
            receive_max: max,
            send_max: max,
            first_as: None,
            accept_as_sets: true,
        }
    })
}

fn asn() -> impl Strategy<Value = Asn> {
    prop_oneof![1..=65535_u32, 65536..=u32::MAX, Just(23456)].prop_map(Asn)
}

fn router_id() -> impl Strategy<Value = RouterId> {
    (1..=u32::MAX).prop_map(RouterId::from)
}

fn family() -> impl Strategy<Value = AfiSafi> {
    prop_oneof![
        Just(AfiSafi::Ipv4Unicast),
        Just(AfiSafi::Ipv6Unicast),
        (any::<u16>(), any::<u8>()).prop_map(|(afi, safi)| AfiSafi::new(afi, safi)),
    ]
}

fn capability() -> impl Strategy<Value = Capability> {
    let mode = prop_oneof![Just(AddPathMode::Receive), Just(AddPathMode::Send), Just(AddPathMode::Both)];
    let restart_family = (family(), any::<bool>())
        .prop_map(|(family, forwarding_preserved)| GracefulRestartFamily { family, forwarding_preserved });
    let restart = (any::<[bool; 2]>(), 0..4096_u16, vec(restart_family, 0..5));
    prop_oneof![
        family().prop_map(Capability::Multiprotocol),
        Just(Capability::RouteRefresh),
        vec((family(), any::<u16>()), 0..5).prop_map(|entries| {
            let entry = |(family, next_hop_afi)| ExtendedNextHop { family, next_hop_afi };
            Capability::ExtendedNextHop(entries.into_iter().map(entry).collect())
        }),
        Just(Capability::ExtendedMessage),
        restart.prop_map(|([restarted, notification], restart_time, families)| {
            Capability::GracefulRestart(GracefulRestart { restarted, notification, restart_time, families })
        }),
        vec((family(), mode), 0..5).prop_map(|entries| {
            Capability::AddPath(entries.into_iter().map(|(family, mode)| AddPath { family, mode }).collect())
        }),
        Just(Capability::EnhancedRouteRefresh),
        ("[a-zé0-9-]{0,60}", "[a-z.]{0,60}").prop_map(|(host, domain)| Capability::Fqdn { host, domain }),
        (74..=255_u8, vec(any::<u8>(), 0..=255))
            .prop_map(|(code, value)| Capability::Unknown { code, value }),
    ]
}

fn open() -> impl Strategy<Value = Open> {
    let hold_time = prop_oneof![Just(0), 3..=u16::MAX];
    (asn(), any::<bool>(), hold_time, router_id(), vec(capability(), 0..12)).prop_filter_map(
        "AS_TRANS is nobody",
        |(asn, four_octet_as, hold_time, router_id, capabilities)| {
            let asn = if four_octet_as { asn } else { Asn(asn.0 & 0xffff | 1) };
            (asn != Asn::TRANS).then_some(Open { asn, four_octet_as, hold_time, router_id, capabilities })
        },
    )
}

fn nlri() -> impl Strategy<Value = Nlri> {
    let v4 = (any::<[u8; 4]>(), 0..=32_u8)
        .prop_map(|(octets, length)| IpNet::from(Ipv4Net::new(octets.into(), length).unwrap()));
    let v6 = (any::<[u8; 16]>(), 0..=128_u8)
        .prop_map(|(octets, length)| IpNet::from(Ipv6Net::new(octets.into(), length).unwrap()));
    (prop_oneof![v4, v6], any::<u32>()).prop_map(|(prefix, id)| Nlri::with_path_id(prefix, id))
}

/// Up to so many, all of one family.
fn routes(most: usize) -> impl Strategy<Value = Vec<Nlri>> {
    vec(nlri(), 1..most).prop_map(|mut routes| {
        let family = routes[0].family();
        routes.retain(|route| route.family() == family);
        routes
    })
}

fn as_path() -> impl Strategy<Value = AsPath> {
    let kind = prop_oneof![5 => Just(SegmentKind::Sequence), 1 => Just(SegmentKind::Set)];
    let confederation = option::weighted(0.2, vec(asn(), 1..4));
    let long = option::weighted(0.05, vec(asn(), 250..300));
    (confederation, vec((kind, vec(asn(), 1..6)), 0..4), long).prop_map(|(confederation, segments, long)| {
        let mut path = AsPath::empty();
        path.push(SegmentKind::ConfederationSequence, confederation.into_iter().flatten());
        segments.into_iter().for_each(|(kind, asns)| path.push(kind, asns));
        path.push(SegmentKind::Sequence, long.into_iter().flatten());
        path
    })
}

fn next_hop() -> impl Strategy<Value = NextHop> {
    let link_local = option::of(any::<u64>().prop_map(|low| (0xfe80 << 112 | u128::from(low)).into()));
    prop_oneof![
        (1..0xe000_0000_u32).prop_map(|address| NextHop::V4(address.into())),
        (1..0xff00_u128 << 112, link_local)
            .prop_map(|(address, link_local)| NextHop::V6 { global: address.into(), link_local }),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let origin = prop_oneof![Just(Origin::Igp), Just(Origin::Egp), Just(Origin::Incomplete)];
    let aggregator = (asn(), router_id()).prop_map(|(asn, router_id)| Aggregator { asn, router_id });
    let large = (asn(), any::<[u32; 2]>()).prop_map(|(asn, [a, b])| LargeCommunity::new(asn, a, b));
    let unknown = (33..=255_u8, prop_oneof![vec(any::<u8>(), 0..20), vec(any::<u8>(), 250..300)]);
    (
        (origin, as_path(), next_hop(), option::of(any::<u32>()), option::of(any::<u32>()), any::<bool>()),
        option::of(aggregator),
        vec(any::<u32>().prop_map(Community), 0..80),
        (option::of(router_id()), vec(router_id(), 0..4)),
        vec(any::<[u8; 8]>().prop_map(ExtendedCommunity), 0..40),
        vec(large, 0..30),
        vec(unknown, 0..3),
        any::<[bool; 4]>(),
    )
        .prop_map(
            |(basic, aggregator, communities, reflection, extended, large, mut unknown, partial)| {
                unknown.sort();
                unknown.dedup_by_key(|(code, _)| *code);
                Attributes {
                    origin: basic.0,
                    as_path: basic.1,
                    next_hop: basic.2,
                    med: basic.3,
                    local_preference: basic.4,
                    atomic_aggregate: basic.5,
                    aggregator,
                    originator_id: reflection.0,
                    cluster_list: reflection.1,
                    unknown: unknown
                        .into_iter()
                        .map(|(code, value)| UnknownAttribute { code, value })
                        .collect(),
                    partial: Partial {
                        aggregator: partial[0] && aggregator.is_some(),
                        communities: partial[1] && !communities.is_empty(),
                        extended_communities: partial[2] && !extended.is_empty(),
                        large_communities: partial[3] && !large.is_empty(),
                    },
                    communities,
                    extended_communities: extended,
                    large_communities: large,
                }
            },
        )
}

fn update() -> impl Strategy<Value = Update> {
    let announcement = (attributes(), routes(1000))
        .prop_map(|(attributes, nlri)| Announcement { attributes: Arc::new(attributes), nlri });
    (vec(nlri(), 0..1000), vec(announcement, 0..3), option::of(family()))
        .prop_map(|(withdrawn, announced, end_of_rib)| Update { withdrawn, announced, end_of_rib })
}

/// What a session can carry of an UPDATE.
fn carried(mut update: Update, codec: &Codec) -> Update {
    let fit = |nlri: &mut Nlri| {
        if !codec.add_path_send.contains(nlri.family()) {
            nlri.path_id = None;
        }
    };
    update.withdrawn.iter_mut().for_each(fit);
    for announcement in &mut update.announced {
        announcement.nlri.iter_mut().for_each(fit);
        let attributes = Arc::make_mut(&mut announcement.attributes);
        match (announcement.nlri[0].family(), attributes.next_hop) {
            (AfiSafi::Ipv6Unicast, NextHop::V4(address)) => {
                attributes.next_hop = NextHop::V6 { global: address.to_ipv6_mapped(), link_local: None };
            }
            (AfiSafi::Ipv4Unicast, NextHop::V6 { .. }) if !codec.extended_next_hop => {
                attributes.next_hop = NextHop::V4([192, 0, 2, 1].into());
            }
            _ => {}
        }
        if codec.internal {
            attributes.local_preference.get_or_insert(100);
            if !codec.four_octet_as {
                // AS4_PATH must not hold confederation segments, so their numbers have to fit.
                let mut fitting = AsPath::empty();
                for segment in attributes.as_path.segments() {
                    let cut = |asn: Asn| {
                        if segment.kind.is_confederation() { Asn(asn.0 & 0xffff | 1) } else { asn }
                    };
                    fitting.push(segment.kind, segment.asns().map(cut));
                }
                attributes.as_path = fitting;
            }
        } else {
            attributes.local_preference = None;
            attributes.originator_id = None;
            attributes.cluster_list.clear();
            let mut plain = AsPath::empty();
            for segment in attributes.as_path.segments() {
                if !segment.kind.is_confederation() {
                    plain.push(segment.kind, segment.asns());
                }
            }
            attributes.as_path = plain;
        }
    }
    update
}

/// All messages in the bytes.
fn read(bytes: &[u8], codec: &Codec) -> Vec<Message> {
    let (mut reader, mut rest, mut messages) = (FrameReader::new(), bytes, Vec::new());
    while !rest.is_empty() {
        let space = reader.space();
        let count = space.len().min(rest.len());
        space[..count].copy_from_slice(&rest[..count]);
        reader.filled(count);
        rest = &rest[count..];
        while let Some(frame) = reader.next_frame(codec).unwrap() {
            let decoded = Message::decode(frame, codec).unwrap();
            assert_eq!(decoded.flaws, [], "{:?}", decoded.message);
            messages.push(decoded.message);
        }
    }
    assert_eq!(reader.pending(), 0);
    messages
}

fn written(message: &Message, codec: &Codec) -> Vec<u8> {
    let mut bytes = b"before".to_vec();
    message.encode(codec, &mut bytes).unwrap();
    assert_eq!(&bytes[..6], b"before");
    bytes.split_off(6)
}

/// Several UPDATEs as one: announcements with the same attributes and family that follow each other are
/// joined.
fn joined(messages: Vec<Message>) -> Update {
    let mut whole = Update::default();
    for message in messages {
        let Message::Update(update) = message else { panic!("{message:?}") };
        let kinds = [!update.withdrawn.is_empty(), !update.announced.is_empty(), update.end_of_rib.is_some()];
        let kinds = kinds.into_iter().filter(|kind| *kind).count();
        assert_eq!(kinds, 1, "one kind of change to a message (RFC 7606 section 5.1)");
        whole.withdrawn.extend(update.withdrawn);
        for announcement in update.announced {
            match whole.announced.last_mut() {
                Some(last)
                    if last.attributes == announcement.attributes
                        && last.nlri[0].family() == announcement.nlri[0].family() =>
                {
                    last.nlri.extend(announcement.nlri);
                }
                _ => whole.announced.push(announcement),
            }
        }
        if let Some(family) = update.end_of_rib {
            assert_eq!(whole.end_of_rib.replace(family), None);
        }
    }
    whole
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn opens(open in open(), codec in codec()) {
        let message = Message::Open(open);
        prop_assert_eq!(read(&written(&message, &codec), &codec), [message]);
    }

    #[test]
    fn updates(update in update(), codec in codec()) {
        let update = carried(update, &codec);
        let message = Message::Update(update.clone());
        prop_assert_eq!(joined(read(&written(&message, &codec), &codec)), update);
    }

    #[test]
    fn refreshes(family in family(), kind in any::<u8>(), codec in codec()) {
        let message = Message::RouteRefresh(RouteRefresh { family, kind: RefreshKind::from_number(kind) });
        prop_assert_eq!(read(&written(&message, &codec), &codec), [message]);
    }

    #[test]
    fn notifications(numbers in any::<(u8, u8)>(), data in vec(any::<u8>(), 0..5000), codec in codec()) {
        let error = NotificationError::from_numbers(numbers.0, numbers.1);
        let message = Message::Notification(Notification::with_data(error, &data[..]));
        let room = data.len().min(usize::from(codec.send_max) - 21);
        let expected = Message::Notification(Notification::with_data(error, &data[..room]));
        prop_assert_eq!(read(&written(&message, &codec), &codec), [expected]);
    }

    #[test]
    fn anything_is_read_or_refused(
        kind in 1..=5_u8,
        body in vec(any::<u8>(), 0..400),
        codec in codec(),
    ) {
        let mut frame = vec![0xff; 16];
        frame.extend((19 + body.len() as u16).to_be_bytes());
        frame.push(kind);
        frame.extend(body);
        if let Err(reset) = Message::decode(&frame, &codec) {
            // What is sent for it is a message too.
            let message = Message::Notification(reset.notification);
            prop_assert_eq!(read(&written(&message, &codec), &codec), [message]);
        }
    }
}

#[test]
fn keepalives() {
    let codec = Codec::initial();
    let bytes = written(&Message::Keepalive, &codec);
    assert_eq!(bytes.len(), 19);
    assert_eq!(read(&bytes, &codec), [Message::Keepalive]);
}
