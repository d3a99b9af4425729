use std::collections::BTreeMap;

use ferroute_bgp::message::{Asn, Families, RouterId};

use super::*;
use crate::network::node_address::Addresses;
use crate::routes::fixture;
use crate::routes::identity::identify;
use crate::routes::policies::{policies, wishes};
use crate::routes::settings::RouterIdChoice;

/// `address AS source families (client) who` for each peer of node 1.
fn rows(settings: &Settings, nodes: &[Node]) -> (Vec<String>, Vec<String>) {
    let own = &nodes[0];
    let (identity, problems) = identify(settings, own, &Addresses::new());
    let mut problems: Vec<String> = problems.into_iter().map(|problem| problem.message).collect();
    let Some(identity) = identity else { return (Vec::new(), problems) };
    let (external, told) = external(settings, own, None, &Secrets::default(), &[]);
    problems.extend(told.into_iter().map(|problem| problem.message));
    let wishes = wishes(own, &Default::default()).0;
    let policies = policies(settings, &wishes, false, None);
    let (peers, told) = peers(settings, &identity, own, nodes, &external, &policies);
    problems.extend(told.into_iter().map(|(_, problem)| problem.message));
    let row = |Peer { kind, config }: &Peer| {
        let who = match kind {
            Kind::Internal { node } => node.to_string(),
            Kind::External => "external".to_owned(),
        };
        let families = match config.families {
            Families::ALL => "both",
            Families::IPV4 => "v4",
            _ => "v6",
        };
        let asn = match config.asn {
            PeerAsn::Exactly(asn) => asn.to_string(),
            _ => "any".to_owned(),
        };
        let source = config.source.map_or("-".to_owned(), |source| source.to_string());
        let client = if config.routes.client { " client" } else { "" };
        format!("{who} {} AS{asn} from {source} {families}{client}", config.key)
    };
    (peers.iter().map(row).collect(), problems)
}

#[test]
fn the_mesh_is_everybody_but_this_node() {
    let nodes = [fixture::node(1, &[]), fixture::node(2, &[]), fixture::node(3, &[])];
    let settings = fixture::settings();
    let (peers, problems) = rows(&settings, &nodes);
    assert_eq!(
        peers,
        ["n2 10.10.0.12 ASany from 10.10.0.11 both", "n3 10.10.0.13 ASany from 10.10.0.11 both"]
    );
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(rows(&Settings { mesh: false, ..settings }, &nodes).0, Vec::<String>::new());
}

#[test]
fn sessions_run_over_the_family_that_both_have() {
    let only = |number: u8, ipv6: bool| {
        let mut node = fixture::node(number, &[]);
        node.internal_ips.retain(|address| address.is_ipv6() == ipv6);
        node
    };
    let settings = fixture::settings();
    let of = |nodes: &[Node]| rows(&settings, nodes).0;
    assert_eq!(of(&[only(1, true), only(2, true)]), ["n2 fd00:10::12 ASany from fd00:10::11 v6"]);
    assert_eq!(of(&[only(1, false), only(2, true)]), Vec::<String>::new());
    assert_eq!(of(&[fixture::node(1, &[]), only(2, true)]), ["n2 fd00:10::12 ASany from fd00:10::11 v6"]);
    let mut first6 = fixture::node(1, &[]);
    first6.internal_ips.reverse();
    assert_eq!(of(&[first6, fixture::node(2, &[])]), ["n2 fd00:10::12 ASany from fd00:10::11 both"]);
    let mut bare = fixture::node(2, &[]);
    bare.internal_ips.clear();
    assert_eq!(of(&[fixture::node(1, &[]), bare.clone()]), Vec::<String>::new());
    bare.external_ips = vec![fixture::address("203.0.113.2")];
    assert_eq!(of(&[fixture::node(1, &[]), bare]), ["n2 203.0.113.2 ASany from 10.10.0.11 v4"]);
}

#[test]
fn reflectors_and_clients() {
    let (server, client) = (&[("rr.server", "42")][..], &[("rr.client", "0.0.0.42")][..]);
    let names = |own: &[(&str, &str)]| -> Vec<String> {
        let nodes = [
            fixture::node(1, own),
            fixture::node(2, server),
            fixture::node(3, client),
            fixture::node(4, &[]),
        ];
        let rows = rows(&fixture::settings(), &nodes).0;
        rows.iter()
            .map(|row| {
                let client = if row.ends_with("client") { "*" } else { "" };
                format!("{}{client}", row.split(' ').next().unwrap())
            })
            .collect()
    };
    assert_eq!(names(server), ["n2", "n3*", "n4"]);
    assert_eq!(names(client), ["n2"]);
    assert_eq!(names(&[]), ["n2", "n4"], "a client would refuse this one");
    assert_eq!(names(&[("rr.server", "42"), ("rr.client", "42")]), ["n2", "n3*", "n4"]);
}

#[test]
fn cluster_ids_are_numbers_in_either_form() {
    for (text, expected) in [
        ("42", Some("0.0.0.42")),
        ("0.0.0.42", Some("0.0.0.42")),
        ("10.0.0.1", Some("10.0.0.1")),
        ("0x0a000001", Some("10.0.0.1")),
        (" 7 ", Some("0.0.0.7")),
        ("0", None),
        ("0.0.0.0", None),
        ("-1", None),
        ("+1", None),
        ("4294967296", None),
        ("fd00::1", None),
        ("", None),
    ] {
        let (identity, problems) =
            identify(&fixture::settings(), &fixture::node(1, &[("rr.server", text)]), &Addresses::new());
        let id = identity.map(|identity| match identity.reflection {
            Reflection::Server(id) => id.to_string(),
            other => panic!("{other:?}"),
        });
        assert_eq!(id.as_deref(), expected, "{text:?}");
        assert_eq!(problems.len(), usize::from(expected.is_none()), "{text:?}: {problems:?}");
    }
}

#[test]
fn nodes_with_as_numbers_of_their_own() {
    let settings = Settings { cluster_asn: None, ..fixture::settings() };
    let nodes = [
        fixture::node(1, &[("node.asn", "65001")]),
        fixture::node(2, &[("node.asn", "0xfde9")]),
        fixture::node(3, &[("node.asn", "65002")]),
        fixture::node(4, &[]),
        fixture::node(5, &[("node.asn", "sixty")]),
    ];
    let (peers, problems) = rows(&settings, &nodes);
    assert_eq!(peers, ["n2 10.10.0.12 AS65001 from 10.10.0.11 both"]);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("kube-router.io/node.asn of Node n5: \"sixty\""), "{problems:?}");
    for text in ["0", "65535", "23456", "4294967295", "4294967296", "x", "-1", ""] {
        let (identity, problems) =
            identify(&settings, &fixture::node(1, &[("node.asn", text)]), &Addresses::new());
        assert_eq!((identity, problems.len()), (None, 1), "{text}");
    }
    let (_, problems) = rows(&settings, &[fixture::node(1, &[])]);
    assert!(problems[0].contains("no annotation kube-router.io/node.asn"), "{problems:?}");
}

#[test]
fn router_ids() {
    let of = |choice, node: &Node| {
        let settings = Settings { router_id: choice, ..fixture::settings() };
        identify(&settings, node, &Addresses::new()).0.unwrap().router_id.to_string()
    };
    let node = fixture::node(1, &[]);
    assert_eq!(of(RouterIdChoice::NodeAddress, &node), "10.10.0.11");
    assert_eq!(of(RouterIdChoice::Given(RouterId(7.into())), &node), "0.0.0.7");
    // FNV-1a over ::ffff:10.10.0.11, as computed by hand.
    let by_hand = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 10, 0, 11]
        .iter()
        .fold(0x811c_9dc5_u32, |hash, byte: &u32| (hash ^ byte).wrapping_mul(0x0100_0193));
    assert_eq!(of(RouterIdChoice::Generated, &node), RouterId::from(by_hand).to_string());
    let mut v6 = fixture::node(1, &[]);
    v6.internal_ips.remove(0);
    assert_eq!(of(RouterIdChoice::NodeAddress, &v6), of(RouterIdChoice::Generated, &v6), "IPv6 alone works");
}

#[test]
fn addresses_to_listen_on() {
    let of = |text: Option<&str>| {
        let annotations: Vec<(&str, &str)> = text.iter().map(|text| ("bgp-local-addresses", *text)).collect();
        let (identity, problems) =
            identify(&fixture::settings(), &fixture::node(1, &annotations), &Addresses::new());
        let listen: Vec<String> = identity.unwrap().listen.iter().map(ToString::to_string).collect();
        (listen.join(" "), problems.len())
    };
    assert_eq!(of(None), ("10.10.0.11 fd00:10::11".to_owned(), 0));
    assert_eq!(of(Some("192.0.2.1, fd00::1")), ("192.0.2.1 fd00::1".to_owned(), 0));
    assert_eq!(of(Some("192.0.2.1,eth0,224.0.0.1")), ("192.0.2.1".to_owned(), 2));
    assert_eq!(of(Some("eth0")), ("10.10.0.11 fd00:10::11".to_owned(), 1));
}

#[test]
fn external_peers_of_flags_win_over_annotations() {
    let mut settings = fixture::settings();
    settings.mesh = false;
    let annotated = ("peers", "[{remoteip: 192.0.2.1, remoteasn: 65001}]");
    let node = [fixture::node(1, &[annotated])];
    assert_eq!(rows(&settings, &node).0, ["external 192.0.2.1 AS65001 from 10.10.0.11 both"]);
    settings.external.peers = vec![fixture::external("2001:db8::1", 65002)];
    assert_eq!(rows(&settings, &node).0, ["external 2001:db8::1 AS65002 from fd00:10::11 both"]);
}

#[test]
fn peers_that_cannot_be_do_not_keep_the_others_away() {
    let mut settings = fixture::settings();
    settings.external.peers = [
        ("10.10.0.11", 65001),
        ("192.0.2.1", 65001),
        ("192.0.2.1", 65002),
        ("0.0.0.0", 65003),
        ("fe80::1", 65004),
        ("10.10.0.12", 64512),
        ("192.0.2.9", 65009),
    ]
    .map(|(address, asn)| fixture::external(address, asn))
    .to_vec();
    let (peers, problems) = rows(&settings, &[fixture::node(1, &[]), fixture::node(2, &[])]);
    assert_eq!(
        peers,
        [
            "external 192.0.2.1 AS65001 from 10.10.0.11 both",
            "external 10.10.0.12 AS64512 from 10.10.0.11 both",
            "external 192.0.2.9 AS65009 from 10.10.0.11 both",
        ]
    );
    for words in [
        "external peer 10.10.0.11: 10.10.0.11 is its own address; correct it in --peer-router-ips",
        "external peer 192.0.2.1: another peer has the address",
        "external peer 0.0.0.0: no peer can have this address",
        "external peer fe80::1: the address is link-local",
        "Node n2: another peer has the address 10.10.0.12",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(words)), "{words}: {problems:#?}");
    }
    assert_eq!(problems.len(), 5);
}

#[test]
fn timers_hops_and_ports_are_those_of_the_flags() {
    let mut settings = fixture::settings();
    settings.port = 1790;
    settings.external.hold_time = 9;
    settings.external.multihop = Some(3);
    settings.external.peers = vec![fixture::external("192.0.2.1", 65001)];
    let (own, other) = (fixture::node(1, &[]), fixture::node(2, &[]));
    let identity = identify(&settings, &own, &Addresses::new()).0.unwrap();
    let policies = policies(&settings, &Default::default(), false, None);
    let (peers, _) = peers(&settings, &identity, &own, [&own, &other], &settings.external.peers, &policies);
    let by: BTreeMap<String, &PeerConfig> =
        peers.iter().map(|peer| (peer.config.key.to_string(), &peer.config)).collect();
    let (outside, inside) = (by["192.0.2.1"], by["10.10.0.12"]);
    assert_eq!((outside.port, outside.hold_time, outside.reach), (179, 9, Some(Reach::Hops(3))));
    assert_eq!((inside.port, inside.hold_time, inside.reach), (1790, 90, None));
    assert_eq!(outside.asn, PeerAsn::Exactly(Asn(65001)));
}

#[test]
fn a_passwords_file_belongs_to_the_flags() {
    let mut settings = fixture::settings();
    settings.external.peers =
        vec![fixture::external("192.0.2.1", 65001), fixture::external("192.0.2.2", 65002)];
    let node = fixture::node(1, &[]);
    let signed = |secrets: Option<Result<Vec<Option<Password>>, String>>, last: &[ExternalPeer]| {
        let (peers, problems) = external(&settings, &node, secrets.as_ref(), &Secrets::default(), last);
        (peers.iter().map(|peer| peer.password.is_some()).collect::<Vec<_>>(), problems)
    };
    let secret = Some(Password::new(b"secret").unwrap());
    let mut last = settings.external.peers.clone();
    last[1].password = secret.clone();
    assert_eq!(signed(None, &[]).0, [false, false]);
    assert_eq!(signed(Some(Ok(vec![secret.clone(), None])), &last).0, [true, false]);
    for broken in [Ok(vec![secret]), Err("/x: gone".to_owned())] {
        let (signed, problems) = signed(Some(broken), &last);
        assert_eq!(signed, [false, true], "as before");
        assert!(problems[0].message.contains("--peer-router-passwords-file of Node n1"), "{problems:?}");
    }
}

#[test]
fn secrets_do_not_show() {
    let node = fixture::node(1, &[("peer.passwords", "c2VjcmV0"), ("peers", "- password: c2VjcmV0")]);
    let text = format!("{node:?}");
    assert!(text.contains("peer.passwords") && !text.contains("c2Vj"), "{text}");
}
