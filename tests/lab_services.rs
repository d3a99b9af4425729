//! Services on a real kernel: what clients get when they speak to one.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Families, Protocol, Reply};
use lab::*;
use serde_json::json;

/// Most tests share one cluster; each has Services of its own.
fn shared() -> MutexGuard<'static, Lab> {
    static LAB: OnceLock<Mutex<Lab>> = OnceLock::new();
    let lab = LAB.get_or_init(|| {
        let cluster = Cluster::builder().nodes(3).pods_per_node(2).zones(["east", "west"]);
        let lab = Lab::start(
            cluster,
            &[
                "--service-external-ip-range=203.0.113.0/24,2001:db8:e::/64",
                "--loadbalancer-ip-range=198.18.0.0/24,2001:db8:1b::/64",
            ],
        );
        // The outside sends what is for load-balancer and external IPs to n1, unless a test says else.
        for network in VIP_NETWORKS {
            lab.cluster.client.route_via(&[lab.node(1)], network.parse().unwrap()).unwrap();
        }
        Mutex::new(lab)
    });
    lab.lock().unwrap_or_else(PoisonError::into_inner)
}

const VIP_NETWORKS: [&str; 6] = [
    "10.96.0.0/16",
    "fd00:96::/112",
    "203.0.113.0/24",
    "2001:db8:e::/64",
    "198.18.0.0/24",
    "2001:db8:1b::/64",
];

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn like(ips: &[IpAddr], vip: IpAddr) -> IpAddr {
    *ips.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4()).unwrap()
}

#[test]
fn a_cluster_ip_is_served_to_pods_nodes_and_the_outside() {
    let lab = shared();
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(10, 2);
    for vip in vips(10) {
        let to = at(vip, 80);
        for protocol in Protocol::ALL {
            for (from, own) in [
                (lab.pod("p1-2").netns(), like(&lab.pod("p1-2").ips, vip)),
                (lab.pod("p3-1").netns(), like(&lab.pod("p3-1").ips, vip)),
                (&lab.node(3).netns, like(&lab.node(3).ips, vip)),
            ] {
                let tally = from.spread(protocol, to, 6);
                assert_eq!((tally.ok, tally.failed), (6, 0), "{protocol} {to} from {}: {tally}", from.name());
                // Round robin; a turn that a repeated first packet took may be missing.
                assert_eq!(tally.pods.len(), 2, "{tally}");
                assert!(tally.pods.values().all(|answers| *answers >= 2), "{tally}");
                assert_eq!(tally.peers.into_iter().collect::<Vec<_>>(), [own], "no pod is masqueraded");
            }
            // From outside through n1: its own endpoint sees the client, the other one the node.
            for _ in 0..4 {
                let answer = ask(&lab.cluster.client, protocol, to, "from outside");
                let seen = if answer.pod == "p1-1" { &lab.cluster.client.ips } else { &lab.node(1).ips };
                assert_eq!(answer.peer.ip(), like(seen, vip), "{protocol} {to}: {answer:?}");
            }
        }
    }
}

#[test]
fn a_node_port_is_served_on_every_node() {
    let lab = shared();
    lab.put_service(&service("ports", 11, json!({"type": "NodePort", "ports": node_ports(30011)})));
    lab.put_slices("ports", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(11, 2);
    for node in &lab.cluster.nodes {
        for &own in &node.ips {
            wait_destinations(node, Protocol::Tcp, at(own, 30011), 2);
            for protocol in Protocol::ALL {
                let to = at(own, 30011);
                assert_eq!(who(&lab.cluster.client, protocol, to, 4), ["p1-1", "p2-1"], "from outside");
                assert_eq!(who(lab.pod("p3-1"), protocol, to, 4), ["p1-1", "p2-1"], "from a pod");
                assert_eq!(who(&lab.node(3).netns, protocol, to, 4), ["p1-1", "p2-1"], "from a node");
            }
            // Other ports of a node address are the host's business: its kernel answers, not a rule.
            assert_refused(&lab.cluster.client, Protocol::Tcp, at(own, 80), "the Service's own port");
        }
    }
}

#[test]
fn external_and_load_balancer_ips_are_served_inside_their_ranges_only() {
    let lab = shared();
    let external = ["203.0.113.12", "2001:db8:e::12", "192.0.2.12", "10.96.200.1"];
    let balancer = ["198.18.0.12", "2001:db8:1b::12", "198.51.100.12"];
    let mut object = service(
        "public",
        12,
        json!({
            "type": "LoadBalancer", "ports": node_ports(30012), "externalIPs": external,
            "status": load_balancer(&balancer),
        }),
    );
    // An address that the load balancer itself proxies is none of ours.
    object["status"]["loadBalancer"]["ingress"]
        .as_array_mut()
        .unwrap()
        .push(json!({"ip": "198.18.0.13", "ipMode": "Proxy"}));
    lab.put_service(&object);
    lab.put_slices("public", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(12, 2);
    for vip in ["203.0.113.12", "2001:db8:e::12", "198.18.0.12", "2001:db8:1b::12"].map(ip) {
        for protocol in Protocol::ALL {
            for from in [&lab.cluster.client, lab.pod("p3-1").netns(), &lab.node(2).netns] {
                assert_eq!(who(from, protocol, at(vip, 80), 4), ["p1-1", "p2-1"], "{vip}");
            }
        }
    }
    for refused in ["192.0.2.12", "10.96.200.1", "198.51.100.12", "198.18.0.13"].map(ip) {
        for node in &lab.cluster.nodes {
            assert_eq!(virtual_server(node, Protocol::Tcp, at(refused, 80)), None, "{refused}");
        }
    }
    let events = eventually("events about the three refused addresses", SOON, || {
        let events = lab.events("public");
        let told = |text: &str| events.iter().any(|(_, message)| message.contains(text));
        if told("192.0.2.12") && told("10.96.200.1") && told("198.51.100.12") {
            Ok(events)
        } else {
            Err(format!("{events:?}"))
        }
    });
    for cure in ["--service-external-ip-range", "--loadbalancer-ip-range", "cluster IP range"] {
        assert!(events.iter().any(|(_, message)| message.contains(cure)), "{cure}: {events:?}");
    }
    assert!(!events.iter().any(|(_, message)| message.contains("198.18.0.13")), "{events:?}");
}

#[test]
fn headless_external_names_and_other_proxies_services_are_left_alone() {
    let lab = shared();
    lab.put_service(&service("headless", 13, json!({"clusterIP": "None", "clusterIPs": ["None"]})));
    lab.put_service(&service(
        "elsewhere",
        14,
        json!({"type": "ExternalName", "externalName": "example.org", "clusterIP": null, "clusterIPs": null}),
    ));
    let label = json!({"service.kubernetes.io/service-proxy-name": "other"});
    lab.put_service(&service("foreign", 15, json!({"labels": label})));
    lab.put_service(&service("last", 16, json!({})));
    for name in ["headless", "elsewhere", "foreign", "last"] {
        lab.put_slices(name, &[Endpoint::of(lab.pod("p1-1"))]);
    }
    // Services are taken in order, so the others were looked at when the last one is served.
    lab.wait_served(16, 1);
    for vip in vips(15) {
        assert_eq!(virtual_server(lab.node(1), Protocol::Tcp, at(vip, 80)), None);
        assert_refused(lab.pod("p1-1"), Protocol::Tcp, at(vip, 80), "another proxy's Service");
    }
    let table = lab.node(1).exec("ipvsadm", &["-Sn"]).unwrap();
    assert!(!table.contains("10.96.0.13") && !table.contains("10.96.0.14"), "{table}");
}

#[test]
fn a_vip_answers_ping_and_its_services_ports_and_nothing_else() {
    let lab = shared();
    lab.put_service(&service("guarded", 18, json!({"externalIPs": ["203.0.113.18", "2001:db8:e::18"]})));
    lab.put_slices("guarded", &[Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(18, 1);
    // A host daemon on all addresses: on the node's own it is reached, through a VIP it is not.
    let identity = ferroute_kit::workload::Identity { pod: "daemon".into(), namespace: "host".into() };
    let own = lab.node(1).ips.clone();
    let _daemon = ferroute_kit::workload::Workload::start(
        &lab.node(1).netns,
        identity,
        &own,
        &[(Protocol::Tcp, 10250)],
    )
    .unwrap();
    for own in own {
        assert_eq!(ask(&lab.cluster.client, Protocol::Tcp, at(own, 10250), "host daemon").pod, "daemon");
        assert_eq!(ask(lab.pod("p1-1"), Protocol::Tcp, at(own, 10250), "host daemon").pod, "daemon");
    }
    let served = vips(18).into_iter().chain(["203.0.113.18", "2001:db8:e::18"].map(ip));
    let unused = [ip("10.96.77.77"), ip("fd00:96::7777")];
    for from in [&lab.cluster.client, lab.pod("p1-1").netns()] {
        for vip in served.clone() {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                assert_refused(from, protocol, at(vip, 81), "a port of a VIP that is no Service's");
            }
            assert_refused(from, Protocol::Tcp, at(vip, 10250), "a host daemon through a VIP");
            assert!(ping(from, vip), "ping {vip} from {}", from.name());
            assert_eq!(ask(from, Protocol::Tcp, at(vip, 80), "its port").pod, "p2-1");
        }
        for vip in unused {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                assert_refused(from, protocol, at(vip, 80), "an unused address of a service range");
            }
        }
    }
}

#[test]
fn terminating_endpoints_stand_in_when_nothing_is_ready() {
    let lab = shared();
    lab.put_service(&service("states", 19, json!({})));
    let [one, two, three] = ["p1-1", "p2-1", "p3-1"].map(|name| Endpoint::of(lab.pod(name)));
    let check = |endpoints: &[Endpoint], expected: &[&str]| {
        lab.put_slices("states", endpoints);
        for vip in vips(19) {
            eventually(&format!("{expected:?} serve"), SOON, || {
                let tally = lab.pod("p3-2").spread(Protocol::Tcp, at(vip, 80), 6);
                let pods: Vec<&str> = tally.pods.keys().map(String::as_str).collect();
                if pods == expected && (tally.failed == 0 || expected.is_empty()) {
                    Ok(())
                } else {
                    Err(tally.to_string())
                }
            });
        }
    };
    check(&[one.clone(), two.clone().state(false, false, false)], &["p1-1"]);
    check(&[one.clone(), two.clone().state(false, true, true)], &["p1-1"]);
    check(&[one.clone().state(false, true, true), two.clone().state(false, false, true)], &["p1-1"]);
    // Conditions that are not given mean ready (API).
    let mut bare = three.clone();
    bare.conditions = json!({});
    check(&[bare, one.clone().state(false, true, true)], &["p3-1"]);
    check(&[one.clone().state(false, false, true)], &[]);
    check(&[one, two, three], &["p1-1", "p2-1", "p3-1"]);
}

#[test]
fn external_policy_local_keeps_the_source_and_serves_local_clients_everywhere() {
    let lab = shared();
    lab.put_service(&service(
        "near",
        20,
        json!({
            "type": "LoadBalancer", "ports": node_ports(30020), "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32020,
            "status": load_balancer(&["198.18.0.20", "2001:db8:1b::20"]),
        }),
    ));
    lab.put_slices(
        "near",
        &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p1-2")), Endpoint::of(lab.pod("p2-1"))],
    );
    lab.wait_served(20, 3);
    for vip in ["198.18.0.20", "2001:db8:1b::20"].map(ip) {
        wait_destinations(lab.node(1), Protocol::Tcp, at(vip, 80), 2);
        wait_destinations(lab.node(3), Protocol::Tcp, at(vip, 80), 0);
        let network = VIP_NETWORKS.map(|n| n.parse::<ipnet::IpNet>().unwrap());
        let network = *network.iter().find(|n| n.contains(&vip)).unwrap();
        for protocol in Protocol::ALL {
            for (number, pods) in [(1, &["p1-1", "p1-2"][..]), (2, &["p2-1"])] {
                lab.cluster.client.route_via(&[lab.node(number)], network).unwrap();
                for to in [at(vip, 80), at(like(&lab.node(number).ips, vip), 30020)] {
                    let tally = lab.cluster.client.spread(protocol, to, 6);
                    assert_eq!(tally.failed, 0, "{protocol} {to} through n{number}: {tally}");
                    assert_eq!(tally.pods.into_keys().collect::<Vec<_>>(), pods, "{protocol} {to}");
                    let client = like(&lab.cluster.client.ips, vip);
                    assert_eq!(tally.peers.into_iter().collect::<Vec<_>>(), [client], "source kept");
                }
            }
            // No endpoint on n3, but elsewhere: dropped, so that a retry may reach another node.
            lab.cluster.client.route_via(&[lab.node(3)], network).unwrap();
            for to in [at(vip, 80), at(like(&lab.node(3).ips, vip), 30020)] {
                let reply = lab.cluster.client.ask(protocol, to, Duration::from_millis(300));
                assert_eq!(reply, Reply::Timeout, "{protocol} {to} through a node without endpoint");
            }
            // Local clients reach every endpoint of the cluster through the same addresses.
            for from in [lab.pod("p3-1").netns(), &lab.node(3).netns, lab.pod("p2-2").netns()] {
                let pods = who(from, protocol, at(vip, 80), 9);
                assert_eq!(pods, ["p1-1", "p1-2", "p2-1"], "{protocol} {vip} from {}", from.name());
            }
            let own = at(like(&lab.node(3).ips, vip), 30020);
            assert_eq!(who(lab.pod("p3-1"), protocol, own, 9), ["p1-1", "p1-2", "p2-1"], "{own}");
        }
        lab.cluster.client.route_via(&[lab.node(1)], network).unwrap();
    }
    // Health check node port: kube-proxy's answer, per node.
    for (number, local) in [(1, 2), (2, 1), (3, 0)] {
        for own in &lab.node(number).ips {
            let answer = lab.cluster.client.http_get(at(*own, 32020), "/healthz").unwrap();
            assert_eq!(answer.status, if local > 0 { 200 } else { 503 }, "{}", answer.body);
            let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
            assert_eq!(body["localEndpoints"], local, "{body}");
            assert_eq!(body["service"], json!({"namespace": "default", "name": "near"}));
        }
    }
    // Without any endpoint anywhere, clients are refused instead.
    lab.put_slices("near", &[]);
    lab.wait_served(20, 0);
    wait_destinations(lab.node(1), Protocol::Tcp, at(ip("198.18.0.20"), 80), 0);
    eventually("refused", SOON, || match lab.cluster.client.tcp(at(ip("198.18.0.20"), 80)) {
        Reply::Refused => Ok(()),
        reply => Err(format!("{reply:?}")),
    });
    lab.remove_service("near");
    eventually("health check port closed", SOON, || {
        match lab.cluster.client.tcp(at(lab.node(1).ips[0], 32020)) {
            Reply::Refused => Ok(()),
            reply => Err(format!("{reply:?}")),
        }
    });
}

#[test]
fn internal_policy_local_serves_only_what_is_here() {
    let lab = shared();
    lab.put_service(&service("inside", 21, json!({"internalTrafficPolicy": "Local"})));
    lab.put_slices("inside", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    for vip in vips(21) {
        for (number, expected) in [(1, 1), (2, 1), (3, 0)] {
            wait_destinations(lab.node(number), Protocol::Tcp, at(vip, 80), expected);
        }
        for protocol in Protocol::ALL {
            assert_eq!(who(lab.pod("p1-2"), protocol, at(vip, 80), 3), ["p1-1"]);
            assert_eq!(who(lab.pod("p2-2"), protocol, at(vip, 80), 3), ["p2-1"]);
        }
        assert_refused(lab.pod("p3-1"), Protocol::Tcp, at(vip, 80), "nothing here");
        assert_refused(&lab.node(3).netns, Protocol::Tcp, at(vip, 80), "nothing here");
    }
}

#[test]
fn zone_hints_keep_traffic_in_the_zone() {
    // n1 and n3 are in the east, n2 in the west.
    let lab = shared();
    lab.put_service(&service("zones", 22, json!({"trafficDistribution": "PreferSameZone"})));
    let [one, two, three] = ["p1-1", "p2-1", "p3-1"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_slices(
        "zones",
        &[one.clone().zones(&["east"]), two.clone().zones(&["west"]), three.clone().zones(&["east"])],
    );
    for vip in vips(22) {
        for (number, expected) in [(1, 2), (2, 1), (3, 2)] {
            wait_destinations(lab.node(number), Protocol::Tcp, at(vip, 80), expected);
        }
        assert_eq!(who(lab.pod("p1-2"), Protocol::Tcp, at(vip, 80), 4), ["p1-1", "p3-1"]);
        assert_eq!(who(lab.pod("p2-2"), Protocol::Udp, at(vip, 80), 4), ["p2-1"]);
    }
    // One endpoint without a hint: hints are not used.
    lab.put_slices("zones", &[one.zones(&["east"]), two, three.zones(&["east"])]);
    lab.wait_served(22, 3);
}

#[test]
fn node_hints_keep_traffic_on_the_node_and_zones_stand_in() {
    let lab = shared();
    lab.put_service(&service("near", 43, json!({"trafficDistribution": "PreferSameNode"})));
    let [one, two, three] = [("p1-1", "n1", "east"), ("p2-1", "n2", "west"), ("p3-1", "n3", "east")]
        .map(|(pod, node, zone)| Endpoint::of(lab.pod(pod)).nodes(&[node]).zones(&[zone]));
    lab.put_slices("near", &[one, two.clone(), three.clone()]);
    for vip in vips(43) {
        for (number, expected) in [(1, "p1-1"), (2, "p2-1"), (3, "p3-1")] {
            wait_destinations(lab.node(number), Protocol::Tcp, at(vip, 80), 1);
            for protocol in Protocol::ALL {
                assert_eq!(who(lab.pod(&format!("p{number}-2")), protocol, at(vip, 80), 3), [expected]);
                assert_eq!(who(&lab.node(number).netns, protocol, at(vip, 80), 3), [expected]);
            }
        }
    }
    // Nobody is on n1 any more: its zone serves it, and the other nodes keep to themselves.
    lab.put_slices("near", &[two, three]);
    for vip in vips(43) {
        for (number, expected) in [(1, "p3-1"), (2, "p2-1"), (3, "p3-1")] {
            wait_destinations(lab.node(number), Protocol::Udp, at(vip, 80), 1);
            eventually(expected, SOON, || {
                let found = lab.pod(&format!("p{number}-2")).spread(Protocol::Tcp, at(vip, 80), 2);
                if found.pods.keys().eq([expected]) { Ok(()) } else { Err(found.to_string()) }
            });
        }
    }
}

#[test]
fn addresses_that_are_not_ready_are_served_where_the_service_says_so() {
    let lab = shared();
    let starting = Endpoint::of(lab.pod("p1-1")).state(false, false, false);
    for (name, number, publish) in [("early", 44, true), ("patient", 45, false)] {
        lab.put_service(&service(name, number, json!({"publishNotReadyAddresses": publish})));
        lab.put_slices(name, std::slice::from_ref(&starting));
    }
    lab.wait_served(44, 1);
    lab.wait_served(45, 0);
    for (early, patient) in vips(44).into_iter().zip(vips(45)) {
        for protocol in Protocol::ALL {
            assert_eq!(who(lab.pod("p2-1"), protocol, at(early, 80), 2), ["p1-1"]);
            assert_refused(lab.pod("p2-1"), protocol, at(patient, 80), "not ready");
        }
    }
    // The Service changes its mind; the slices stay.
    lab.put_service(&service("early", 44, json!({"publishNotReadyAddresses": false})));
    lab.wait_served(44, 0);
}

#[test]
fn the_annotation_for_local_endpoints_holds_for_the_outside_only() {
    let lab = shared();
    let ips = ["198.18.0.40", "2001:db8:1b::40"];
    let spec = json!({
        "type": "LoadBalancer", "annotations": {"kube-router.io/service.local": "true"},
        "internalTrafficPolicy": "Local", "status": load_balancer(&ips), "ports": node_ports(30340),
    });
    lab.put_service(&service("kept", 46, spec));
    lab.put_slices("kept", &["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name))));
    lab.wait_served(46, 2);
    for lb in ips.map(ip) {
        let own = like(&lab.cluster.client.ips, lb);
        for protocol in Protocol::ALL {
            eventually("only the pod of n1", SOON, || {
                let tally = lab.cluster.client.spread(protocol, at(lb, 80), 4);
                if tally.failed == 0 && tally.pods.keys().eq(["p1-1"]) {
                    Ok(())
                } else {
                    Err(tally.to_string())
                }
            });
            let answer = ask(&lab.cluster.client, protocol, at(lb, 80), "the outside");
            assert_eq!(answer.peer.ip(), own, "the client's address is kept");
        }
        // n3 has none: remote clients get no answer there, pods of the cluster are served everywhere.
        let n3 = like(&lab.node(3).ips, lb);
        let reply = lab.cluster.client.ask(Protocol::Tcp, at(n3, 30340), Duration::from_millis(700));
        assert!(!matches!(reply, Reply::Answer(_)), "{reply:?}");
    }
    for vip in vips(46) {
        assert_eq!(who(lab.pod("p3-1"), Protocol::Tcp, at(vip, 80), 4), ["p1-1", "p2-1"]);
    }
}

#[test]
fn session_affinity_keeps_each_client_with_its_pod() {
    let lab = shared();
    let affinity = |seconds: u32| {
        service(
            "sticky",
            23,
            json!({
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
            }),
        )
    };
    lab.put_service(&affinity(600));
    lab.put_slices("sticky", &["p1-1", "p2-1", "p3-1"].map(|name| Endpoint::of(lab.pod(name))));
    lab.wait_served(23, 3);
    for vip in vips(23) {
        // Neighbouring addresses that differ only in their lowest bits: with a wrong netmask they
        // would be one client.
        let mut chosen = std::collections::BTreeSet::new();
        for number in 100..112 {
            let own = match vip {
                IpAddr::V4(_) => ip(&format!("10.20.0.{number}")),
                IpAddr::V6(_) => ip(&format!("fd00:10:20::{number:x}")),
            };
            let prefix = if own.is_ipv4() { 24 } else { 64 };
            lab.cluster.client.sh(&format!("ip addr add {own}/{prefix} dev eth0 nodad")).unwrap();
            let mut pods = std::collections::BTreeSet::new();
            for _ in 0..4 {
                pods.insert(ask_as(&lab.cluster.client, own, at(vip, 80)).pod);
            }
            assert_eq!(pods.len(), 1, "{own} stays with its pod: {pods:?}");
            chosen.extend(pods);
            lab.cluster.client.sh(&format!("ip addr del {own}/{prefix} dev eth0")).unwrap();
        }
        assert_eq!(chosen.len(), 3, "clients spread: {chosen:?}");
    }
    lab.put_service(&affinity(77));
    for node in &lab.cluster.nodes {
        for vip in vips(23) {
            eventually("the new timeout", SOON, || match virtual_server(node, Protocol::Tcp, at(vip, 80)) {
                Some((options, list)) if options.contains("-p 77") && active(&list) == 3 => Ok(()),
                other => Err(format!("{other:?}")),
            });
        }
    }
    lab.put_service(&service("sticky", 23, json!({})));
    eventually("no affinity any more", SOON, || {
        match virtual_server(lab.node(1), Protocol::Tcp, at(vips(23)[0], 80)) {
            Some((options, _)) if !options.contains("-p") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn schedulers_and_their_flags_are_the_services_choice() {
    let lab = shared();
    for (number, (scheduler, flags, expected)) in [
        ("mh", "flag-1,flag-2", "-s mh -b mh-fallback,mh-port"),
        ("sh", "flag-2", "-s sh -b sh-port"),
        ("lc", "", "-s lc"),
        ("fastest", "", "-s rr"),
    ]
    .into_iter()
    .enumerate()
    {
        let number = 24 + number as u8;
        let name = format!("by-{scheduler}");
        let annotations = json!({
            "kube-router.io/service.scheduler": scheduler, "kube-router.io/service.schedflags": flags,
        });
        lab.put_service(&service(&name, number, json!({"annotations": annotations})));
        lab.put_slices(&name, &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
        lab.wait_served(number, 2);
        for vip in vips(number) {
            for protocol in Protocol::ALL {
                let (options, _) = virtual_server(lab.node(2), protocol, at(vip, 80)).unwrap();
                assert!(options.trim().starts_with(expected), "{options:?} instead of {expected:?}");
                assert!(!who(lab.pod("p3-1"), protocol, at(vip, 80), 4).is_empty());
            }
        }
    }
    let told = lab.wait_event("by-fastest", "UnknownScheduler");
    assert!(told.contains("fastest") && told.contains("rr is used"), "{told}");
    // Chosen live.
    let annotations = json!({"kube-router.io/service.scheduler": "wrr"});
    lab.put_service(&service("by-lc", 26, json!({"annotations": annotations})));
    eventually("wrr", SOON, || match virtual_server(lab.node(1), Protocol::Udp, at(vips(26)[0], 80)) {
        Some((options, list)) if options.contains("-s wrr") && active(&list) == 2 => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

#[test]
fn a_pod_reaches_itself_through_its_service_where_hairpin_is_on() {
    let lab = shared();
    lab.put_service(&service("self-off", 28, json!({"type": "NodePort", "ports": node_ports(30028)})));
    let annotations = json!({"kube-router.io/service.hairpin": ""});
    let spec = json!({"annotations": annotations, "type": "NodePort", "ports": node_ports(30029)});
    lab.put_service(&service("self-on", 29, spec));
    lab.put_slices("self-on", &[Endpoint::of(lab.pod("p1-1"))]);
    lab.put_slices("self-off", &[Endpoint::of(lab.pod("p1-2"))]);
    lab.wait_served(28, 1);
    lab.wait_served(29, 1);
    let pod = lab.pod("p1-1");
    for protocol in Protocol::ALL {
        for (off, on) in vips(28).into_iter().zip(vips(29)) {
            let node = like(&lab.node(1).ips, on);
            for to in [at(on, 80), at(node, 30029)] {
                let answer = ask(pod, protocol, to, "itself");
                assert_eq!((answer.pod.as_str(), answer.peer.ip()), ("p1-1", node), "{protocol} {to}");
            }
            // Another pod of the node keeps its address.
            let answer = ask(lab.pod("p1-2"), protocol, at(on, 80), "a neighbour");
            assert_eq!(answer.peer.ip(), like(&lab.pod("p1-2").ips, on));
            let reply = lab.pod("p1-2").ask(protocol, at(off, 80), Duration::from_millis(300));
            assert!(reply.answer().is_none(), "{protocol} without hairpin: {reply:?}");
        }
    }
}

#[test]
fn load_balancer_source_ranges_admit_and_drop() {
    let lab = shared();
    let guarded = |ranges: &[&str]| {
        service(
            "fenced",
            30,
            json!({
                "type": "LoadBalancer", "ports": node_ports(30030), "loadBalancerSourceRanges": ranges,
                "status": load_balancer(&["198.18.0.30", "2001:db8:1b::30"]),
            }),
        )
    };
    lab.put_service(&guarded(&["10.20.0.0/24", "fd00:10:20::/64"]));
    lab.put_slices("fenced", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(30, 2);
    let patience = Duration::from_millis(300);
    for vip in ["198.18.0.30", "2001:db8:1b::30"].map(ip) {
        wait_destinations(lab.node(1), Protocol::Tcp, at(vip, 80), 2);
        for protocol in Protocol::ALL {
            assert_eq!(who(&lab.cluster.client, protocol, at(vip, 80), 2), ["p1-1", "p2-1"]);
            let reply = lab.pod("p1-2").ask(protocol, at(vip, 80), patience);
            assert_eq!(reply, Reply::Timeout, "{protocol} {vip}: a source that is not admitted");
        }
    }
    lab.put_service(&guarded(&["192.0.2.0/24", "0.0.0.0/1", "2001:db8::/32"]));
    eventually("the other range", SOON, || {
        match lab.cluster.client.ask(Protocol::Tcp, at(ip("2001:db8:1b::30"), 80), patience) {
            Reply::Timeout => Ok(()),
            reply => Err(format!("{reply:?}")),
        }
    });
    assert_eq!(who(&lab.cluster.client, Protocol::Udp, at(ip("198.18.0.30"), 80), 2), ["p1-1", "p2-1"]);
    // Cluster IP and node port are not guarded.
    assert_eq!(who(lab.pod("p3-1"), Protocol::Tcp, at(vips(30)[1], 80), 2), ["p1-1", "p2-1"]);
    assert_eq!(who(&lab.cluster.client, Protocol::Tcp, at(lab.node(1).ips[1], 30030), 2), ["p1-1", "p2-1"]);
    lab.put_service(&guarded(&[]));
    eventually("open again", SOON, || {
        match lab.cluster.client.ask(Protocol::Tcp, at(ip("2001:db8:1b::30"), 80), patience) {
            Reply::Answer(_) => Ok(()),
            reply => Err(format!("{reply:?}")),
        }
    });
}

#[test]
fn a_slice_may_come_before_its_service_and_in_several_pieces() {
    let lab = shared();
    let mut extra = slice("pieces", false, &[Endpoint::of(lab.pod("p3-1"))]);
    extra["metadata"]["name"] = json!("pieces-more");
    lab.put_slice(&extra);
    lab.put_slices("pieces", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    lab.put_service(&service("pieces", 31, json!({})));
    let vip = vips(31)[0];
    wait_destinations(lab.node(1), Protocol::Tcp, at(vip, 80), 3);
    assert_eq!(who(lab.pod("p1-2"), Protocol::Tcp, at(vip, 80), 6), ["p1-1", "p2-1", "p3-1"]);
    lab.server.remove_unchecked("endpointslices", "default", "pieces-more").unwrap();
    wait_destinations(lab.node(1), Protocol::Tcp, at(vip, 80), 2);
}

#[test]
fn flags_for_hairpin_masquerade_and_node_ports_hold_for_every_service() {
    drop(shared());
    let lab = Lab::start(
        Cluster::builder().nodes(2).pods_per_node(2),
        &["--hairpin-mode", "--masquerade-all", "--nodeport-bindon-all-ip"],
    );
    lab.node(1).sh("ip addr add 10.99.0.1/32 dev eth0").unwrap();
    lab.node(1).sh("ip addr add fd00:99::1/128 dev eth0 nodad").unwrap();
    for network in ["10.99.0.1/32", "fd00:99::1/128", "10.96.0.0/16", "fd00:96::/112"] {
        lab.cluster.client.route_via(&[lab.node(1)], network.parse().unwrap()).unwrap();
    }
    lab.put_service(&service("all", 40, json!({"type": "NodePort", "ports": node_ports(30040)})));
    lab.put_slices("all", &[Endpoint::of(lab.pod("p1-1"))]);
    lab.wait_served(40, 1);
    for (vip, other) in vips(40).into_iter().zip(["10.99.0.1", "fd00:99::1"].map(ip)) {
        let node = like(&lab.node(1).ips, vip);
        wait_destinations(lab.node(1), Protocol::Tcp, at(other, 30040), 1);
        for protocol in Protocol::ALL {
            for to in [at(other, 30040), at(node, 30040)] {
                assert_eq!(ask(&lab.cluster.client, protocol, to, "any address").pod, "p1-1");
            }
            // Everything is masqueraded, also to a local endpoint and from a local pod.
            for from in [&lab.cluster.client, lab.pod("p1-2").netns()] {
                let answer = ask(from, protocol, at(vip, 80), "masqueraded");
                assert_eq!(answer.peer.ip(), node, "{protocol} {vip} from {}", from.name());
            }
            assert_eq!(ask(lab.pod("p1-1"), protocol, at(vip, 80), "itself").pod, "p1-1");
        }
    }
    // An address that goes takes its node port with it.
    lab.node(1).sh("ip addr del 10.99.0.1/32 dev eth0").unwrap();
    wait_gone(lab.node(1), Protocol::Tcp, at(ip("10.99.0.1"), 30040));
}

#[test]
fn clusters_of_one_family_are_served_alike() {
    drop(shared());
    for (families, own) in [(Families::V4, 0), (Families::V6, 1)] {
        let lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(2).families(families), &[]);
        let vip = vips(10)[own];
        let spec = json!({
            "type": "NodePort", "ports": node_ports(30010), "clusterIP": vip, "clusterIPs": [vip],
            "ipFamilies": [if vip.is_ipv4() { "IPv4" } else { "IPv6" }],
        });
        lab.put_service(&service("web", 10, spec));
        let endpoints = ["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name)));
        lab.put_slice(&slice("web", vip.is_ipv6(), &endpoints));
        for node in &lab.cluster.nodes {
            wait_destinations(node, Protocol::Sctp, at(vip, 80), 2);
            for protocol in Protocol::ALL {
                assert_eq!(who(lab.pod("p1-2"), protocol, at(vip, 80), 2), ["p1-1", "p2-1"]);
                assert_eq!(who(node, protocol, at(vip, 80), 2), ["p1-1", "p2-1"]);
                let outside = who(&lab.cluster.client, protocol, at(node.ips[0], 30010), 2);
                assert_eq!(outside, ["p1-1", "p2-1"], "{protocol} through {}", node.name);
            }
            assert_eq!(metric(node, "ferroute_proxy_pass_failures_total"), 0.0);
        }
    }
}

#[test]
fn timeouts_a_switched_off_firewall_and_excluded_addresses() {
    drop(shared());
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(1).pods_per_node(2));
    // Somebody else's virtual server, on an address that lies in a service range.
    lab.node(1).sh("ipvsadm -A -t 10.96.200.1:80 -s rr").unwrap();
    lab.start_daemons(&[
        "--service-tcp-timeout=7m",
        "--service-tcpfin-timeout=33s",
        "--service-udp-timeout=44s",
        "--ipvs-permit-all=false",
        "--excluded-cidrs=10.96.200.0/24",
        "--ipvs-graceful-termination=false",
    ]);
    let node = lab.node(1);
    let timeouts = node.exec("ipvsadm", &["-l", "--timeout"]).unwrap();
    assert!(timeouts.contains("420 33 44"), "{timeouts}");
    let both = ["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &both);
    lab.wait_served(10, 2);
    let to = at(vips(10)[0], 80);
    assert_eq!(who(node, Protocol::Tcp, to, 4), ["p1-1", "p1-2"]);
    // Without the firewall the rest of INPUT decides: nothing accepts, nothing rejects.
    let rules = node.exec("iptables", &["-S"]).unwrap();
    assert!(!rules.contains("-j ACCEPT\n") && !rules.contains("REJECT"), "{rules}");
    // Without graceful termination an endpoint goes at once, open connections or not.
    let flows: Vec<_> = (0..4)
        .map(|_| ferroute_kit::Flow::start(node, Protocol::Tcp, to, Duration::from_millis(20)).unwrap())
        .collect();
    lab.put_slices("web", &both[..1]);
    for protocol in Protocol::ALL {
        eventually("one destination", SOON, || match virtual_server(node, protocol, to) {
            Some((_, list)) if list.len() == 1 => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
    drop(flows);
    assert!(virtual_server(node, Protocol::Tcp, at(ip("10.96.200.1"), 80)).is_some(), "a stranger's");
}
