use proptest::prelude::*;

use super::*;
use crate::cluster::service::{Protocol, ServiceType};
use crate::proxy::fixture as services;
use crate::routes::fixture;

/// A load balancer with one address of each kind, of both families where there are two.
fn load_balancer() -> Service {
    Service {
        kind: ServiceType::LoadBalancer,
        cluster_ips: vec![[10, 96, 0, 10].into(), fixture::address("fd00:96::10")],
        external_ips: vec![[203, 0, 113, 5].into()],
        load_balancer_ips: vec![[203, 0, 113, 200].into(), fixture::address("fd00:aa::1")],
        ports: vec![services::port("http", Protocol::Tcp, 80, Some(30080))],
        ..services::service("web")
    }
}

/// Endpoints as (flags, node), of both families.
fn slices(endpoints: &[(&str, &str)]) -> Slices {
    let all = endpoints.iter().zip(1..).flat_map(|((flags, node), host)| {
        let v4 = services::endpoint(host, flags, node);
        let mut v6 = v4.clone();
        v6.address = services::endpoint6(host.into(), node).address;
        [v4, v6]
    });
    Slices::from([(
        Arc::from("a"),
        Arc::new(services::slice(&[("http", Protocol::Tcp, 8080)], all.collect())),
    )])
}

fn wanted(settings: &Settings, node: &Node, service: &Service, slices: Option<&Slices>) -> String {
    let list = addresses(settings, &services::facts(), node, service, slices);
    list.iter().map(|claim| claim.address.to_string()).collect::<Vec<_>>().join(" ")
}

const ALL: &str = "10.96.0.10 203.0.113.5 203.0.113.200 fd00:96::10 fd00:aa::1";

#[test]
fn kinds_are_switched_by_flag_and_annotation() {
    let (node, here) = (fixture::node(1, &[]), slices(&[("rs", "n1")]));
    let of = |flags: [bool; 3], annotations: [Option<bool>; 3]| {
        let mut settings = fixture::settings();
        [
            settings.advertise.cluster_ips,
            settings.advertise.external_ips,
            settings.advertise.load_balancer_ips,
        ] = flags;
        let mut service = load_balancer();
        service.annotations.advertise = annotations;
        wanted(&settings, &node, &service, Some(&here))
    };
    assert_eq!(of([true; 3], [None; 3]), ALL);
    assert_eq!(of([false; 3], [None; 3]), "");
    assert_eq!(of([false; 3], [Some(true); 3]), ALL);
    assert_eq!(of([true; 3], [Some(false); 3]), "");
    assert_eq!(of([true, false, false], [None; 3]), "10.96.0.10 fd00:96::10");
    assert_eq!(of([false, true, false], [None; 3]), "203.0.113.5");
    assert_eq!(of([false, false, true], [None; 3]), "203.0.113.200 fd00:aa::1");
    assert_eq!(of([true, false, false], [Some(false), Some(true), None]), "203.0.113.5");
}

#[test]
fn policies_ask_for_endpoints_here_or_anywhere() {
    const CLUSTER: &str = "10.96.0.10 fd00:96::10";
    const OUTSIDE: &str = "203.0.113.5 203.0.113.200 fd00:aa::1";
    let local = |external: bool, internal: bool| {
        let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        Service { external_policy: policy(external), internal_policy: policy(internal), ..load_balancer() }
    };
    for (endpoints, cluster, external_local, both_local) in [
        (&[("rs", "n1")][..], ALL, ALL, ALL),
        (&[("rs", "n2")], ALL, CLUSTER, ""),
        (&[("rs", "n1"), ("rs", "n2")], ALL, ALL, ALL),
        // Not ready: nobody answers.
        (&[("", "n1")], "", "", ""),
        (&[], "", "", ""),
        // Ending, and standing in: served here, but clients should go elsewhere.
        (&[("st", "n1")], ALL, CLUSTER, ""),
        (&[("st", "n1"), ("rs", "n2")], ALL, CLUSTER, ""),
        (&[("rs", "")], ALL, CLUSTER, ""),
    ] {
        let (node, slices, settings) = (fixture::node(1, &[]), slices(endpoints), fixture::settings());
        let of = |service: &Service| wanted(&settings, &node, service, Some(&slices));
        assert_eq!(of(&local(false, false)), cluster, "{endpoints:?}");
        assert_eq!(of(&local(true, false)), external_local, "{endpoints:?}");
        assert_eq!(of(&local(true, true)), both_local, "{endpoints:?}");
        let expected = if endpoints.contains(&("rs", "n1")) {
            ALL
        } else if cluster.is_empty() {
            ""
        } else {
            OUTSIDE
        };
        assert_eq!(of(&local(false, true)), expected, "{endpoints:?}");
    }
    let settings = fixture::settings();
    assert_eq!(wanted(&settings, &fixture::node(1, &[]), &load_balancer(), None), "", "no slices at all");
}

#[test]
fn one_family_may_answer_alone() {
    let mut only4 =
        services::slice(&[("http", Protocol::Tcp, 8080)], vec![services::endpoint(1, "rs", "n1")]);
    only4.endpoints.truncate(1);
    let slices = Slices::from([(Arc::from("a"), Arc::new(only4))]);
    let rows = wanted(&fixture::settings(), &fixture::node(1, &[]), &load_balancer(), Some(&slices));
    assert_eq!(rows, "10.96.0.10 203.0.113.5 203.0.113.200");
}

#[test]
fn an_excluded_node_keeps_cluster_ips() {
    let mut node = fixture::node(1, &[]);
    node.excluded_from_external_lb = true;
    let rows = wanted(&fixture::settings(), &node, &load_balancer(), Some(&slices(&[("rs", "n1")])));
    assert_eq!(rows, "10.96.0.10 fd00:96::10");
}

#[test]
fn addresses_that_the_proxy_refuses_are_not_advertised() {
    let service = Service {
        external_ips: vec![[198, 51, 100, 1].into(), [10, 96, 7, 7].into(), [203, 0, 113, 9].into()],
        load_balancer_ips: vec![[198, 51, 100, 2].into()],
        ..load_balancer()
    };
    let here = slices(&[("rs", "n1")]);
    let mut settings = fixture::settings();
    let node = fixture::node(1, &[]);
    assert_eq!(wanted(&settings, &node, &service, Some(&here)), "10.96.0.10 203.0.113.9 fd00:96::10");
    settings.services.strict_external_ips = false;
    assert!(wanted(&settings, &node, &service, Some(&here)).contains("198.51.100.2"));
    let mut skipped = load_balancer();
    skipped.annotations.skip_lb_ips = true;
    assert_eq!(wanted(&settings, &node, &skipped, Some(&here)), "10.96.0.10 203.0.113.5 fd00:96::10");
}

#[test]
fn next_hops_are_the_nodes_addresses() {
    let facts = services::facts();
    let hop = |prefix: &str, facts: &Facts| {
        route(prefix.parse().unwrap(), Tag::PodCidr, facts).attributes.next_hop.address().to_string()
    };
    assert_eq!(hop("10.244.1.0/24", &facts), "10.10.0.11");
    assert_eq!(hop("fd00:244:1::/64", &facts), "fd00:10::11");
    assert_eq!(hop("10.244.1.0/24", &Facts::default()), "0.0.0.0", "the session's own is told");
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("shop", name)
}

fn claim(text: &str, tag: Tag) -> Claim {
    Claim { address: fixture::address(text), tag, local: false }
}

#[test]
fn an_address_goes_with_its_last_claim() {
    let mut all = Announcements::default();
    let vip = claim("203.0.113.5", Tag::ExternalIp);
    all.put(&key("a"), [vip].into());
    all.put(&key("b"), [vip].into());
    let prefix: IpNet = "203.0.113.5/32".parse().unwrap();
    let first = all.difference(|_| true);
    assert_eq!(first.advertise, [(prefix, Tag::ExternalIp)]);
    all.put(&key("a"), BTreeSet::new());
    assert!(all.difference(|_| true).is_empty(), "b still wants it");
    all.put(&key("b"), BTreeSet::new());
    assert_eq!(all.difference(|_| true).withdraw, [prefix]);
    assert!(all.difference(|_| true).is_empty());
}

#[test]
fn nothing_is_said_before_the_proxy_is_ready() {
    let mut all = Announcements::default();
    all.put_pods(&["10.244.1.0/24".parse().unwrap()]);
    all.put(&key("a"), [claim("203.0.113.5", Tag::LoadBalancerIp)].into());
    let first = all.difference(|_| false);
    assert_eq!(first.advertise, [("10.244.1.0/24".parse().unwrap(), Tag::PodCidr)], "pods need no proxy");
    assert_eq!(all.waiting(), 1);
    all.touch([fixture::address("203.0.113.5")]);
    assert_eq!(all.difference(|_| true).advertise.len(), 1);
    assert_eq!(all.waiting(), 0);
    all.touch([fixture::address("203.0.113.5")]);
    assert_eq!(all.difference(|_| false).withdraw.len(), 1, "and no longer when it is not");
    // A new speaker is told all.
    all.touch_all();
    let again = all.difference(|_| true);
    assert_eq!(again.advertise.len(), 2);
}

fn texts(difference: Difference) -> (Vec<String>, Vec<String>) {
    let advertise = difference.advertise.iter().map(|(prefix, _)| prefix.to_string()).collect();
    (advertise, difference.withdraw.iter().map(ToString::to_string).collect())
}

#[test]
fn a_range_stands_for_its_addresses_while_one_is_served() {
    let whole = BTreeMap::from([("203.0.113.0/24".parse().unwrap(), Tag::LoadBalancerIp)]);
    let mut all = Announcements::default();
    all.put_ranges(Ranges { whole: whole.clone(), specifics: false });
    let strings = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let step = |all: &mut Announcements, name: &str, claims: BTreeSet<Claim>, up: &[&str], down: &[&str]| {
        all.put(&key(name), claims);
        assert_eq!(texts(all.difference(|_| true)), (strings(up), strings(down)), "{name}");
    };
    let [a, b] = ["203.0.113.5", "203.0.113.6"].map(|text| claim(text, Tag::LoadBalancerIp));
    let local = Claim { local: true, ..b };
    step(&mut all, "a", [a].into(), &["203.0.113.0/24"], &["203.0.113.5/32"]);
    step(&mut all, "b", [b].into(), &[], &["203.0.113.6/32"]);
    assert_eq!(all.waiting(), 0);
    // Policy Local needs its own way; elsewhere nothing changes.
    step(&mut all, "b", [local].into(), &["203.0.113.6/32"], &[]);
    step(
        &mut all,
        "a",
        [claim("198.51.100.1", Tag::LoadBalancerIp)].into(),
        &["198.51.100.1/32"],
        &["203.0.113.5/32"],
    );
    assert_eq!(all.announced().count(), 3);
    // The last one takes the range along.
    step(&mut all, "b", BTreeSet::new(), &[], &["203.0.113.0/24", "203.0.113.6/32"]);
    // A node that drains serves nothing, and a new speaker is told all.
    step(&mut all, "b", [b].into(), &["203.0.113.0/24"], &["203.0.113.6/32"]);
    all.touch_wanted();
    assert!(texts(all.difference(|_| false)).1.contains(&"203.0.113.0/24".to_owned()));
    all.touch_wanted();
    assert_eq!(texts(all.difference(|_| true)).0, ["203.0.113.0/24", "198.51.100.1/32"]);
    all.touch_all();
    assert_eq!(texts(all.difference(|_| true)).0, ["203.0.113.0/24", "198.51.100.1/32"]);
    // Switched while it runs, by a ServiceCIDR or a Node that comes.
    all.put_ranges(Ranges { whole, specifics: true });
    assert_eq!(texts(all.difference(|_| true)).0, ["203.0.113.6/32"]);
    all.put_ranges(Ranges::default());
    assert_eq!(texts(all.difference(|_| true)), (vec![], vec!["203.0.113.0/24".to_owned()]));
}

#[test]
fn ranges_of_kinds_that_are_on_are_whole_unless_they_cover_machines_or_pods() {
    let mut settings = fixture::settings();
    assert_eq!(ranges(&settings, &services::facts()), (Ranges::default(), vec![]));
    settings.advertise.ranges = true;
    settings.services.external_ip_ranges.push("203.0.113.7/32".parse().unwrap());
    let mut facts = services::facts();
    facts.bound_ranges.extend(&settings.services.external_ip_ranges);
    facts.bound_ranges.extend(&settings.services.load_balancer_ranges);
    let of = |settings: &Settings, facts: &Facts| {
        let (ranges, told) = ranges(settings, facts);
        let ranges: Vec<String> = ranges.whole.keys().map(ToString::to_string).collect();
        (ranges.join(" "), told.into_iter().map(|problem| problem.message).collect::<Vec<_>>())
    };
    assert_eq!(
        of(&settings, &facts),
        ("10.96.0.0/12 203.0.113.0/25 203.0.113.128/25 fd00:aa::/64".to_owned(), vec![])
    );
    settings.advertise.cluster_ips = false;
    settings.advertise.load_balancer_ips = false;
    assert_eq!(of(&settings, &facts), ("203.0.113.0/25".to_owned(), vec![]));
    facts.pod_cidrs.push("203.0.113.64/27".parse().unwrap());
    let (none, told) = of(&settings, &facts);
    assert_eq!((none.as_str(), told.len()), ("", 1));
    assert!(told[0].contains("203.0.113.0/25 is not advertised whole"), "{told:?}");
    // It covers a node's address, so that it is not bound either.
    let facts = Facts { bound_ranges: vec![], ..services::facts() };
    assert_eq!(of(&settings, &facts).1.len(), 1);
}

proptest! {
    /// However the changes come, what is announced is what is wanted and ready.
    #[test]
    fn announced_is_wanted_and_ready(
        steps in prop::collection::vec(
            (0_u8..4, prop::collection::btree_set((0_u8..5, 0_usize..3, any::<bool>()), 0..4), 0_u8..32),
            1..40,
        ),
        whole: bool,
        specifics: bool,
    ) {
        let mut all = Announcements::default();
        // Hosts 2 and 3.
        let range: IpNet = "203.0.113.2/31".parse().unwrap();
        let whole: BTreeMap<IpNet, Tag> = whole.then_some((range, Tag::ExternalIp)).into_iter().collect();
        all.put_ranges(Ranges { whole: whole.clone(), specifics });
        let mut model: BTreeMap<u8, BTreeSet<Claim>> = BTreeMap::new();
        let mut told: BTreeMap<IpNet, Tag> = BTreeMap::new();
        for (service, claims, ready) in steps {
            let claim = |(host, tag, local)| {
                Claim { address: [203, 0, 113, host].into(), tag: Tag::VIPS[tag], local }
            };
            let claims: BTreeSet<Claim> = claims.into_iter().map(claim).collect();
            all.put(&key(&format!("s{service}")), claims.clone());
            model.insert(service, claims);
            let is_ready = |address: IpAddr| match address {
                IpAddr::V4(address) => ready & (1 << address.octets()[3]) != 0,
                IpAddr::V6(_) => false,
            };
            all.touch((0..5).map(|host| IpAddr::from([203, 0, 113, host])));
            let difference = all.difference(is_ready);
            for prefix in &difference.withdraw {
                told.remove(prefix);
            }
            told.extend(difference.advertise);
            let mut expected: BTreeMap<IpNet, Tag> = BTreeMap::new();
            let ready: Vec<&Claim> =
                model.values().flatten().filter(|claim| is_ready(claim.address)).collect();
            for Claim { address, tag, .. } in &ready {
                let known = expected.entry(IpNet::from(*address)).or_insert(*tag);
                *known = (*known).min(*tag);
            }
            for (range, tag) in &whole {
                let inside: Vec<_> = ready.iter().filter(|claim| range.contains(&claim.address)).collect();
                if !specifics {
                    let local = |prefix: &IpNet| {
                        inside.iter().any(|claim| claim.local && claim.address == prefix.addr())
                    };
                    expected.retain(|prefix, _| !range.contains(prefix) || local(prefix));
                }
                if !inside.is_empty() {
                    expected.insert(*range, *tag);
                }
            }
            prop_assert_eq!(&told, &expected);
            prop_assert_eq!(all.announced().collect::<BTreeMap<_, _>>(), expected);
        }
    }
}
