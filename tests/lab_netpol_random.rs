//! Network policy by packets: random clusters against an independent judge, the cases of the upstream
//! suite by name, and policies that others have published.
//!
//! `FERROUTE_CLUSTERS`, `FERROUTE_PACKETS`, `FERROUTE_SEED` and `FERROUTE_SECONDS` choose how many
//! clusters, how many packets each, where to begin, and after what time no further cluster is begun (a
//! busy machine gets through fewer, though never through next to none); a failure names its seed. By
//! default it is a sample; all of it:
//!
//!     FERROUTE_CLUSTERS=300 FERROUTE_SECONDS=1100 scripts/test lab_netpol_random -- random
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;
#[path = "lab/netpol.rs"]
mod netpol;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ferroute_kit::serial;
use ferroute_oracle::cases::{self, Member};
use ferroute_oracle::{Cluster, Judge, Packet, Protocol, Random, Shape};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use netpol::{Field, IN_FORCE};
use serde_json::json;

/// Ports that everybody listens on.
const PORTS: [u16; 5] = [53, 80, 81, 443, 5353];
/// Policy alone: what Services add is other tests' matter, and their rules take the same lock. The
/// metrics' port is one that a published policy speaks of.
const FLAGS: [&str; 3] = ["--run-firewall=true", "--run-service-proxy=false", "--metrics-port=0"];

/// So many clusters are compared whatever the time.
const ENOUGH: u64 = 15;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

#[test]
fn random_clusters_fare_as_the_judge_says() {
    let _serial = serial();
    let mut field = Field::start(3, 6, &PORTS, &FLAGS);
    let shape = Shape {
        namespaces: 1..=4,
        policies: 1..=12,
        ports: PORTS.to_vec(),
        odd_pods: false,
        ..Shape::default()
    };
    let (clusters, packets) = (number("FERROUTE_CLUSTERS", 60), number("FERROUTE_PACKETS", 240));
    let first = number("FERROUTE_SEED", 1);
    let time = Duration::from_secs(number("FERROUTE_SECONDS", 60));
    let begin = Instant::now();
    let mut done = 0;
    for seed in first..first + clusters {
        if begin.elapsed() > time && done >= clusters.min(ENOUGH) {
            break;
        }
        let cluster = shape.cluster_on(&field.topology, seed);
        let mut random = Random::new(seed);
        if let Err(text) = field.check(&cluster, &mut random, usize::try_from(packets).unwrap()) {
            panic!("FERROUTE_SEED={seed}: {text}");
        }
        done += 1;
    }
    println!(
        "{done} clusters, {} packets, {} let through, no mismatch, in {:?}",
        field.asked,
        field.reached,
        begin.elapsed()
    );
    let share = field.reached * 100 / field.asked;
    assert!(
        (10..=90).contains(&share),
        "{share} of a hundred packets let through: the clusters are too tame"
    );
}

/// The suite's nine pods on the first three places of each node; the other places have pods too.
fn suite(field: &Field) -> (Cluster, Vec<Member>) {
    let names: Vec<&str> = field.topology.places.iter().map(|place| place.node.as_str()).collect();
    let members = cases::members(&names, |node, pod| field.topology.places[node].pods[pod].clone());
    let nodes: Vec<Node> =
        field.lab.cluster.node_objects().into_iter().map(|it| serde_json::from_value(it).unwrap()).collect();
    let mut cluster = cases::base(nodes, &members).unwrap();
    for place in &field.topology.places {
        cluster.local_addresses.insert(place.node.clone(), place.local.clone());
    }
    (cluster, members)
}

#[test]
fn the_cases_of_the_upstream_suite_hold() {
    let _serial = serial();
    let mut field = Field::start(3, 3, &cases::PORTS, &FLAGS);
    for case in cases::all().unwrap() {
        let (mut cluster, members) = suite(&field);
        let begin = Instant::now();
        for (number, step) in case.steps.iter().enumerate() {
            step.apply(&mut cluster, &members).unwrap();
            field.put(&cluster);
            let judge = Judge::new(&cluster);
            let mut packets = Vec::new();
            for expected in step.expectations(&members).unwrap() {
                for (&from, &to) in
                    members[expected.from].addresses.iter().zip(&members[expected.to].addresses)
                {
                    let packet = Packet { from, to, protocol: expected.protocol, port: expected.port };
                    // A pod on the same node as its client is no exception: the case's word is the
                    // judge's.
                    assert_eq!(judge.verdict(packet).allowed, expected.allowed, "{}: {packet}", case.name);
                    packets.push(packet);
                }
            }
            let mismatches = field.settle(&cluster, &packets, IN_FORCE);
            let told: Vec<String> = mismatches
                .iter()
                .map(|it| format!("{}: {:?}, but {}", it.packet, it.outcome, it.verdict))
                .collect();
            assert!(told.is_empty(), "{}: step {number}: {} differ: {told:#?}", case.name, told.len());
        }
        println!("{} ({} ms)", case.name, begin.elapsed().as_millis());
    }
    println!("{} packets, {} let through", field.asked, field.reached);
}

/// The pods of the published applications: namespace, name, labels, ports.
const APPLICATIONS: [(&str, &str, &str, &[u16]); 19] = [
    ("shop", "frontend", "app=frontend", &[8080]),
    ("shop", "adservice", "app=adservice", &[9555]),
    ("shop", "currencyservice", "app=currencyservice", &[7000]),
    ("shop", "cartservice", "app=cartservice", &[7070]),
    ("shop", "redis-cart", "app=redis-cart", &[6379]),
    ("shop", "loadgenerator", "app=loadgenerator", &[]),
    ("shop", "recommendationservice", "app=recommendationservice", &[8080]),
    ("shop", "checkoutservice", "app=checkoutservice", &[5050]),
    ("shop", "emailservice", "app=emailservice", &[8080]),
    ("shop", "paymentservice", "app=paymentservice", &[50051]),
    ("shop", "shippingservice", "app=shippingservice", &[50051]),
    ("shop", "productcatalogservice", "app=productcatalogservice", &[3550]),
    ("monitoring", "alertmanager", "alert-router main", &[9093, 9094, 8080]),
    ("monitoring", "blackbox-exporter", "exporter", &[19115, 9115]),
    ("monitoring", "grafana", "grafana", &[3000]),
    ("monitoring", "kube-state-metrics", "exporter", &[8443, 9443]),
    ("monitoring", "prometheus", "prometheus k8s", &[9090, 8080]),
    ("monitoring", "prometheus-adapter", "metrics-adapter", &[6443]),
    ("monitoring", "prometheus-operator", "controller", &[8080, 8443]),
];

/// Labels as the applications' manifests write them: `key=value`, or for kube-prometheus the component
/// and, where it has one, the instance.
fn labels(name: &str, text: &str) -> BTreeMap<String, String> {
    if let Some((key, value)) = text.split_once('=') {
        return BTreeMap::from([(key.to_owned(), value.to_owned())]);
    }
    let mut words = text.split(' ');
    let keys = ["name", "part-of", "component", "instance"];
    let values = [Some(name), Some("kube-prometheus"), words.next(), words.next()];
    let pairs = keys.iter().zip(values).filter_map(|(key, value)| Some((key, value?)));
    pairs.map(|(key, value)| (format!("app.kubernetes.io/{key}"), value.to_owned())).collect()
}

fn published(text: &str, namespace: &str) -> Vec<NetworkPolicy> {
    let mut policies: Vec<NetworkPolicy> = serde_saphyr::from_multiple(text).unwrap();
    for policy in &mut policies {
        policy.metadata.namespace.get_or_insert_with(|| namespace.to_owned());
    }
    policies
}

#[test]
fn published_policies_let_pass_what_their_applications_need() {
    let _serial = serial();
    let mut ports: Vec<u16> =
        APPLICATIONS.iter().flat_map(|(_, _, _, ports)| ports.iter().copied()).collect();
    ports.extend([80, 9100]);
    ports.sort_unstable();
    ports.dedup();
    let mut field = Field::start(3, 7, &ports, &FLAGS);
    let (mut cluster, _) = suite(&field);
    cluster.pods.clear();
    cluster.namespaces.clear();
    for name in ["shop", "monitoring", "elsewhere"] {
        cluster.namespaces.push(serde_json::from_value(json!({"metadata": {"name": name}})).unwrap());
    }
    let mut add =
        |namespace: &str, name: &str, labels: &BTreeMap<String, String>, node: &str, ips: &[_], host| {
            let ips: Vec<_> = ips.iter().map(|ip: &std::net::IpAddr| json!({"ip": ip})).collect();
            let object = json!({
                "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"nodeName": node, "hostNetwork": host, "containers": [{"name": "c"}]},
                "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
            });
            cluster.pods.push(serde_json::from_value::<Pod>(object).unwrap());
        };
    let mut addresses: BTreeMap<&str, Vec<std::net::IpAddr>> = BTreeMap::new();
    let mut applications = APPLICATIONS.iter();
    for (pod, place) in (0..7).flat_map(|pod| field.topology.places.iter().map(move |place| (pod, place))) {
        let ips = &place.pods[pod];
        match applications.next() {
            Some((namespace, name, text, _)) => {
                add(namespace, name, &labels(name, text), &place.node, ips, false);
                addresses.insert(name, ips.clone());
            }
            // Pods of others.
            None => add(
                "elsewhere",
                &format!("stranger-{pod}-{}", place.node),
                &BTreeMap::new(),
                &place.node,
                ips,
                false,
            ),
        }
        if pod == 0 {
            // It runs on the host network: its policy cannot select it.
            let exporter = labels("node-exporter", "exporter");
            add(
                "monitoring",
                &format!("exporter-{}", place.node),
                &exporter,
                &place.node,
                &place.addresses,
                true,
            );
        }
    }
    cluster.policies = published(include_str!("published/online-boutique.yaml"), "shop");
    cluster.policies.extend(published(include_str!("published/kube-prometheus.yaml"), "monitoring"));
    assert_eq!(cluster.policies.len(), 13 + 8);
    // Everybody to every port that a pod serves, and one it does not.
    let everybody: Vec<std::net::IpAddr> =
        field.prober.hosts().iter().flat_map(|host| host.addresses.iter().copied()).collect();
    let mut packets = Vec::new();
    for (_, name, _, served) in APPLICATIONS {
        for &to in &addresses[name] {
            for &from in everybody.iter().filter(|from| from.is_ipv4() == to.is_ipv4()) {
                for &port in served.iter().chain(&[80]) {
                    packets.push(Packet { from, to, protocol: Protocol::Tcp, port });
                }
            }
        }
    }
    let mut random = Random::new(1);
    packets.extend(field.sample(&mut random, 600));
    field.put(&cluster);
    let mismatches = field.settle(&cluster, &packets, IN_FORCE);
    let told: Vec<String> = mismatches
        .iter()
        .take(20)
        .map(|it| format!("{}: {:?}, but {}", it.packet, it.outcome, it.verdict))
        .collect();
    assert!(told.is_empty(), "{} differ: {told:#?}", mismatches.len());
    // What the authors meant, without the judge.
    let judge = Judge::new(&cluster);
    for (from, to, port, allowed) in [
        ("frontend", "cartservice", 7070, true),
        ("checkoutservice", "emailservice", 8080, true),
        ("cartservice", "redis-cart", 6379, true),
        ("frontend", "redis-cart", 6379, false),
        ("loadgenerator", "frontend", 8080, true),
        ("loadgenerator", "cartservice", 7070, false),
        ("prometheus", "grafana", 3000, true),
        ("grafana", "prometheus", 9090, true),
        ("grafana", "alertmanager", 9093, false),
        ("prometheus", "alertmanager", 9093, true),
        ("prometheus-operator", "prometheus-adapter", 6443, true),
        ("frontend", "grafana", 3000, false),
    ] {
        for (&from, &to) in addresses[from].iter().zip(&addresses[to]) {
            let packet = Packet { from, to, protocol: Protocol::Tcp, port };
            assert_eq!(judge.verdict(packet).allowed, allowed, "{packet}");
            assert!(packets.contains(&packet), "{packet} was asked");
        }
    }
    println!("{} packets, {} let through", field.asked, field.reached);
}
