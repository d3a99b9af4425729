use ferroute_bgp::message::{AsPath, Attributes, RouterId};
use ferroute_bgp::policy::{
    Exporter, Importer, LearnedFrom, LocalAddresses, Neighbour, Outgoing, export, import,
};

use super::*;
use crate::routes::fixture;

const OWN: Asn = Asn(64512);

fn neighbour(external: bool) -> Neighbour {
    let (address, asn) = if external { ("192.0.2.1", Asn(65001)) } else { ("10.10.0.12", OWN) };
    Neighbour { address: fixture::address(address), asn }
}

/// What a peer is told of a route: `prefix next-hop path communities`, or why not.
fn told(policies: &Policies, external: bool, prefix: &str, tag: u16, from: Option<bool>) -> String {
    let (receiver, prefix) = (neighbour(external), prefix.parse::<IpNet>().unwrap());
    let next_hop = if prefix.addr().is_ipv6() { "fd00:10::11" } else { "10.10.0.11" };
    let attributes = Attributes { next_hop: fixture::address(next_hop).into(), ..Attributes::default() };
    let mut sender = from.map(neighbour);
    if let Some(sender) = &mut sender {
        sender.address = fixture::address(if from == Some(true) { "192.0.2.2" } else { "10.10.0.13" });
    }
    let learned_from = sender.as_ref().map(|neighbour| LearnedFrom {
        neighbour,
        router_id: RouterId::from(3),
        client: true,
        is_receiver: false,
    });
    let policy = if external { &policies.external_export } else { &policies.internal_export };
    let exporter = Exporter {
        own: OWN,
        cluster_id: RouterId::from(1),
        neighbour: &receiver,
        router_id: RouterId::from(2),
        client: false,
        addresses: LocalAddresses {
            v4: Some([10, 99, 0, 1].into()),
            v6: Some("fd99::1".parse().unwrap()),
            link_local: None,
        },
        extended_next_hop: false,
        next_hop_self: false,
        policy: Some(policy),
    };
    match export(&exporter, &Outgoing { prefix, attributes: &attributes, tag, learned_from }) {
        Err(withheld) => withheld.to_string(),
        Ok(given) => {
            let mut text = format!("{} [{}]", given.next_hop.address(), given.as_path);
            given.communities.iter().for_each(|community| text += &format!(" {community}"));
            given.large_communities.iter().for_each(|community| text += &format!(" {community}"));
            text
        }
    }
}

fn read(annotations: &[(&str, &str)]) -> (Wishes, Vec<String>) {
    let (wishes, problems) = wishes(&fixture::node(1, annotations), &Wishes::default());
    (wishes, problems.into_iter().map(|problem| problem.message).collect())
}

#[test]
fn nodes_get_pod_networks_and_others_get_what_flags_say() {
    let mut settings = fixture::settings();
    let plain = policies(&settings, &Wishes::default(), false, None);
    for (external, prefix, tag, expected) in [
        (false, "10.244.1.0/24", Tag::PodCidr, "10.10.0.11 []"),
        (false, "fd00:244:1::/64", Tag::PodCidr, "fd00:10::11 []"),
        (false, "10.96.0.1/32", Tag::ClusterIp, "export policy"),
        (false, "203.0.113.1/32", Tag::LoadBalancerIp, "export policy"),
        (true, "10.244.1.0/24", Tag::PodCidr, "10.10.0.11 [64512]"),
        (true, "10.96.0.1/32", Tag::ClusterIp, "10.10.0.11 [64512]"),
        (true, "203.0.113.1/32", Tag::ExternalIp, "10.10.0.11 [64512]"),
        (true, "fd00:aa::1/128", Tag::LoadBalancerIp, "fd00:10::11 [64512]"),
    ] {
        assert_eq!(told(&plain, external, prefix, tag.number(), None), expected, "{external} {prefix}");
    }
    settings.advertise.pod_cidrs = false;
    settings.external.override_next_hop = true;
    let other = policies(&settings, &Wishes::default(), false, None);
    assert_eq!(told(&other, true, "10.244.1.0/24", 1, None), "export policy");
    assert_eq!(told(&other, false, "10.244.1.0/24", 1, None), "10.10.0.11 []");
    assert_eq!(told(&other, true, "203.0.113.1/32", 4, None), "10.99.0.1 [64512]");
    assert_eq!(told(&other, true, "fd00:aa::1/128", 4, None), "fd99::1 [64512]");
}

#[test]
fn nothing_learned_leaves_but_what_a_reflector_reflects() {
    let settings = fixture::settings();
    let node = policies(&settings, &Wishes::default(), false, None);
    let server = policies(&settings, &Wishes::default(), true, [fixture::address("192.0.2.7")]);
    for external in [false, true] {
        for from in [false, true] {
            assert_eq!(told(&node, external, "10.1.0.0/16", 0, Some(from)), "export policy");
        }
        assert_eq!(told(&server, external, "10.1.0.0/16", 0, Some(true)), "export policy", "no transit");
    }
    assert_eq!(told(&server, false, "10.1.0.0/16", 0, Some(false)), "10.10.0.11 []");
    assert_eq!(told(&server, true, "10.1.0.0/16", 0, Some(false)), "export policy");
    // A router outside that shares the cluster's AS is no node.
    let outside = policies(&settings, &Wishes::default(), true, [fixture::address("10.10.0.13")]);
    assert_eq!(told(&outside, false, "10.1.0.0/16", 0, Some(false)), "export policy");
}

#[test]
fn annotations_shape_what_external_peers_get() {
    let (wishes, problems) = read(&[
        ("node.bgp.communities", "no-export, 65001:7,4294901761,64512:1:2"),
        ("path-prepend.as", "65009"),
        ("path-prepend.repeat-n", "2"),
    ]);
    assert_eq!(problems, Vec::<String>::new());
    let policies = policies(&fixture::settings(), &wishes, false, None);
    assert_eq!(
        told(&policies, true, "203.0.113.1/32", 4, None),
        "10.10.0.11 [64512 65009 65009] no-export 65001:7 accept-own 64512:1:2"
    );
    assert_eq!(told(&policies, false, "10.244.1.0/24", 1, None), "10.10.0.11 []");
}

#[test]
fn a_node_that_goes_says_so_to_everybody() {
    let wishes = Wishes { draining: true, ..Wishes::default() };
    let policies = policies(&fixture::settings(), &wishes, false, None);
    assert_eq!(told(&policies, true, "203.0.113.1/32", 4, None), "10.10.0.11 [64512] graceful-shutdown");
    assert_eq!(told(&policies, false, "10.244.1.0/24", 1, None), "10.10.0.11 [] graceful-shutdown");
    assert_eq!(told(&policies, false, "203.0.113.1/32", 4, None), "export policy");
}

#[test]
fn bad_wishes_are_told_and_the_others_stay() {
    let last = Wishes {
        prepend: Some((Asn(65009), 2)),
        refused: vec!["10.7.0.0/16".parse().unwrap()],
        ..Wishes::default()
    };
    for (annotations, words) in [
        (&[("node.bgp.communities", "65001:1,hello")][..], "\"hello\""),
        (&[("node.bgp.communities", "65001:1,70000:1")], "70000:1"),
        (&[("path-prepend.as", "65009")], "repeat-n must say how often"),
        (&[("path-prepend.as", "65009"), ("path-prepend.repeat-n", "300")], "\"300\""),
        (&[("path-prepend.as", "x"), ("path-prepend.repeat-n", "3")], "\"x\""),
        (&[("path-prepend.as", "0"), ("path-prepend.repeat-n", "3")], "AS 0 is reserved"),
        (&[("path-prepend.repeat-n", "3")], "no effect without"),
        (&[("node.bgp.customimportreject", "10.0.0.0/8,10.0.0/33")], "\"10.0.0/33\""),
    ] {
        let (wishes, problems) = wishes(&fixture::node(1, annotations), &last);
        assert_eq!(problems.len(), 1, "{annotations:?} {problems:?}");
        assert!(problems[0].message.contains(words), "{problems:?}");
        assert!(problems[0].message.contains("of Node n1"), "{problems:?}");
        match annotations[0].0 {
            "node.bgp.communities" => assert_eq!(wishes.communities, [Community::new(65001, 1)]),
            "path-prepend.as" => assert_eq!(wishes.prepend, last.prepend),
            "path-prepend.repeat-n" => assert_eq!(wishes.prepend, None),
            _ => assert_eq!(wishes.refused, ["10.0.0.0/8", "10.7.0.0/16"].map(|text| text.parse().unwrap())),
        }
    }
}

#[test]
fn what_may_come_in() {
    let (wishes, problems) = read(&[("node.bgp.customimportreject", "172.16.0.0/12 , fd77::/16")]);
    assert_eq!(problems, Vec::<String>::new());
    let policies = policies(&fixture::settings(), &wishes, false, None);
    for (policy, external) in [(&policies.internal_import, false), (&policies.external_import, true)] {
        let from = neighbour(external);
        let importer = Importer {
            own: OWN,
            router_id: RouterId::from(1),
            cluster_id: RouterId::from(1),
            neighbour: &from,
            allow_own_as: 0,
            enforce_first_as: false,
            policy: Some(policy),
        };
        let mut attributes = Attributes { as_path: AsPath::default(), ..Attributes::default() };
        if external {
            attributes.as_path.prepend(Asn(65001), 1);
        }
        let takes = |prefix: &str, attributes: &Attributes| {
            import(&importer, prefix.parse().unwrap(), attributes).map(|taken| taken.local_preference)
        };
        for prefix in ["10.0.0.0/8", "10.244.2.0/24", "10.244.0.0/16", "::/1", "2001:db8::/32", "172.0.0.0/8"]
        {
            assert_eq!(takes(prefix, &attributes), Ok(None), "{prefix}");
        }
        for prefix in [
            "0.0.0.0/0",
            "::/0",
            "172.16.0.0/12",
            "172.17.5.0/24",
            "fd77:1::/32",
            "10.244.1.0/24",
            "10.244.1.128/25",
            "fd00:244:1::5/128",
        ] {
            assert!(takes(prefix, &attributes).is_err(), "{prefix}");
        }
        attributes.communities.push(Community::GRACEFUL_SHUTDOWN);
        assert_eq!(takes("10.0.0.0/8", &attributes), Ok(Some(0)));
    }
}
