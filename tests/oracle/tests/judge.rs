//! What the judge holds, sentence by sentence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use ferroute_oracle::{Cluster, Packet, Protocol, Side, allows, manifests};
use serde_json::{Value, json};

/// Two nodes, pods `web` and `db` on n1, `far` on n2 in namespace `b`, `host` on n2's network, `done`
/// that has ended with the address of `web`.
fn cluster(policies: Value) -> Cluster {
    let node = |name: &str, ip: &str| {
        let addresses = json!([{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": name}]);
        json!({"metadata": {"name": name}, "status": {"addresses": addresses}})
    };
    let pod = |namespace: &str, name: &str, node: &str, ips: &[&str], ports: Value| {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        json!({
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips},
        })
    };
    let port = |name: &str, number: u16| json!([{"name": name, "containerPort": number}]);
    let mut web = pod("a", "web", "n1", &["10.0.1.2", "fd00:1::2"], port("http", 80));
    web["spec"]["initContainers"] = json!([
        {"name": "sidecar", "restartPolicy": "Always", "ports": [{"name": "admin", "containerPort": 15000}]},
        {"name": "setup", "ports": [{"name": "setup", "containerPort": 15001}]},
    ]);
    let far = pod("b", "far", "n2", &["10.0.2.2", "fd00:2::2"], port("http", 8080));
    let mut host = pod("b", "host", "n2", &["10.10.0.2"], port("http", 9100));
    host["spec"]["hostNetwork"] = true.into();
    let mut done = pod("b", "done", "n1", &["10.0.1.2"], port("http", 81));
    done["status"]["phase"] = "Succeeded".into();
    let namespaces = json!([
        {"metadata": {"name": "a", "labels": {"team": "red"}}},
        {"metadata": {"name": "b", "labels": {"team": "blue"}}},
    ]);
    Cluster {
        namespaces: serde_json::from_value(namespaces).unwrap(),
        pods: serde_json::from_value(json!([
            done,
            web,
            pod("a", "db", "n1", &["10.0.1.3", "fd00:1::3"], json!([])),
            far,
            host,
        ]))
        .unwrap(),
        nodes: serde_json::from_value(json!([node("n1", "10.10.0.1"), node("n2", "10.10.0.2")])).unwrap(),
        policies: serde_json::from_value(policies).unwrap(),
        local_addresses: BTreeMap::from([("n1".to_owned(), vec!["10.0.1.1".parse().unwrap()])]),
    }
}

const WEB: &str = "10.0.1.2";
const DB: &str = "10.0.1.3";
const FAR: &str = "10.0.2.2";
const NODE1: &str = "10.10.0.1";
const NODE2: &str = "10.10.0.2";
const OUTSIDE: &str = "192.0.2.7";

fn policy(namespace: &str, spec: Value) -> Value {
    json!([{"metadata": {"name": "p", "namespace": namespace}, "spec": spec}])
}

fn ask(cluster: &Cluster, from: &str, to: &str, protocol: Protocol, port: u16) -> bool {
    let packet = Packet { from: from.parse().unwrap(), to: to.parse().unwrap(), protocol, port };
    allows(cluster, packet).allowed
}

/// Which of these may send to TCP port 80 of `to`.
fn senders(cluster: &Cluster, to: &str) -> Vec<&'static str> {
    let all = [WEB, DB, FAR, NODE1, NODE2, OUTSIDE];
    all.into_iter().filter(|from| ask(cluster, from, to, Protocol::Tcp, 80)).collect()
}

/// Which of these may `from` send to, on TCP port 80.
fn receivers(cluster: &Cluster, from: &str) -> Vec<&'static str> {
    let all = [WEB, DB, FAR, NODE1, NODE2, OUTSIDE];
    all.into_iter().filter(|to| ask(cluster, from, to, Protocol::Tcp, 80)).collect()
}

fn ingress(rules: Value) -> Cluster {
    cluster(policy("a", json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": rules})))
}

fn egress(rules: Value) -> Cluster {
    let spec =
        json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"], "egress": rules});
    cluster(policy("a", spec))
}

#[test]
fn an_isolated_pod_hears_itself_and_its_own_node() {
    let closed = ingress(json!([]));
    assert_eq!(senders(&closed, WEB), [WEB, NODE1]);
    assert!(ask(&closed, "10.0.1.1", WEB, Protocol::Udp, 1), "an address that only the node knows");
    assert!(!ask(&closed, "10.0.1.9", WEB, Protocol::Udp, 1));
    assert!(!ask(&closed, "fd00:1::3", "fd00:1::2", Protocol::Sctp, 5), "both families");
    assert_eq!(receivers(&closed, WEB).len(), 6, "and may send");
    let mute = egress(json!([]));
    assert_eq!(receivers(&mute, WEB), [WEB], "its own node is no exception there");
    assert_eq!(senders(&mute, WEB).len(), 6);
}

#[test]
fn an_ended_pod_is_nobody() {
    // `done` is selected, `web` has its address and is not.
    let of_done = cluster(policy("b", json!({"podSelector": {"matchLabels": {"app": "done"}}})));
    assert_eq!(senders(&of_done, WEB).len(), 6);
    let from_done = ingress(json!([{"from": [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "done"}}},
    ]}]));
    assert!(!ask(&from_done, DB, WEB, Protocol::Tcp, 80));
    // As a peer its address is web's.
    let db_from_done = cluster(policy(
        "a",
        json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"from": [
            {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "done"}}},
        ]}]}),
    ));
    assert_eq!(senders(&db_from_done, DB), [DB, NODE1]);
    // Its port 81 is called http, but it is web that would be asked.
    assert!(!ask(&ingress(json!([{"ports": [{"port": "http"}]}])), FAR, WEB, Protocol::Tcp, 81));
}

#[test]
fn a_host_network_pod_is_its_node() {
    let from_host = ingress(json!([{"from": [
        {"namespaceSelector": {"matchLabels": {"team": "blue"}}, "podSelector": {"matchLabels": {"app": "host"}}},
    ]}]));
    assert_eq!(senders(&from_host, WEB), [WEB, NODE1, NODE2]);
    let select_host = cluster(policy("b", json!({"podSelector": {"matchLabels": {"app": "host"}}})));
    assert_eq!(senders(&select_host, NODE2).len(), 6, "it cannot be selected");
    let named = egress(json!([{"ports": [{"port": "http"}]}]));
    assert!(ask(&named, WEB, NODE2, Protocol::Tcp, 9100));
    assert!(!ask(&named, WEB, NODE2, Protocol::Tcp, 80));
}

#[test]
fn peers_are_chosen_by_pod_by_namespace_or_by_both() {
    let from = |peers: Value| senders(&ingress(json!([{"from": peers}])), WEB);
    assert_eq!(from(json!([])), [WEB, DB, FAR, NODE1, NODE2, OUTSIDE]);
    assert_eq!(from(Value::Null), [WEB, DB, FAR, NODE1, NODE2, OUTSIDE]);
    assert_eq!(from(json!([{"podSelector": {}}])), [WEB, DB, NODE1], "of the policy's namespace");
    assert_eq!(from(json!([{"namespaceSelector": {}}])), [WEB, DB, FAR, NODE1, NODE2]);
    let blue = json!({"matchLabels": {"team": "blue"}});
    assert_eq!(from(json!([{"namespaceSelector": blue}])), [WEB, FAR, NODE1, NODE2]);
    let far = json!({"matchLabels": {"app": "far"}});
    assert_eq!(from(json!([{"namespaceSelector": blue, "podSelector": far}])), [WEB, FAR, NODE1]);
    assert_eq!(from(json!([{"podSelector": far}])), [WEB, NODE1]);
    let name = json!({"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["b"]}]});
    assert_eq!(from(json!([{"namespaceSelector": name}])), [WEB, DB, NODE1]);
    assert_eq!(from(json!([{}])), [WEB, NODE1], "a peer that names nothing");
}

#[test]
fn blocks_stand_for_themselves() {
    let from = |peers: Value| senders(&ingress(json!([{"from": peers}])), WEB);
    let block = |cidr: &str, except: &[&str]| json!({"ipBlock": {"cidr": cidr, "except": except}});
    assert_eq!(from(json!([block("0.0.0.0/0", &[])])), [WEB, DB, FAR, NODE1, NODE2, OUTSIDE]);
    assert_eq!(from(json!([block("::/0", &[])])), [WEB, NODE1], "of the other family");
    assert_eq!(from(json!([block("10.0.0.0/8", &["10.0.1.0/24"])])), [WEB, FAR, NODE1, NODE2]);
    let both = json!([block("10.0.0.0/8", &["10.0.1.0/24", "10.10.0.0/16"]), block("10.0.1.3/32", &[])]);
    assert_eq!(from(both), [WEB, DB, FAR, NODE1]);
    assert_eq!(from(json!([block("10.0.1.77/24", &[])])), [WEB, DB, NODE1], "bits after the prefix");
    let to = |peers: Value| receivers(&egress(json!([{"to": peers}])), WEB);
    assert_eq!(to(json!([block("192.0.2.0/24", &["192.0.2.6/31"])])), [WEB]);
    assert_eq!(
        to(json!([block("192.0.2.0/24", &["192.0.2.8/29"]), block("10.10.0.0/30", &[])])),
        [WEB, NODE1, NODE2, OUTSIDE]
    );
}

#[test]
fn ports_by_number_range_name_and_protocol() {
    let open = |ports: Value| -> Vec<String> {
        let cluster = ingress(json!([{"ports": ports}]));
        let mut open = Vec::new();
        for protocol in Protocol::ALL {
            for port in [79, 80, 81, 82, 15000, 15001] {
                if ask(&cluster, FAR, WEB, protocol, port) {
                    open.push(format!("{protocol} {port}"));
                }
            }
        }
        open
    };
    assert_eq!(open(json!([])).len(), 18);
    assert_eq!(open(Value::Null).len(), 18);
    assert_eq!(open(json!([{"port": 80}])), ["TCP 80"]);
    assert_eq!(open(json!([{"port": 80, "protocol": "UDP"}])), ["UDP 80"]);
    assert_eq!(open(json!([{"port": 80, "endPort": 81, "protocol": "SCTP"}])), ["SCTP 80", "SCTP 81"]);
    assert_eq!(open(json!([{"protocol": "UDP"}])).len(), 6);
    assert_eq!(open(json!([{}])).len(), 6, "TCP, when it does not say");
    assert_eq!(open(json!([{"port": "http"}])), ["TCP 80"]);
    assert_eq!(open(json!([{"port": "http", "protocol": "UDP"}])), Vec::<String>::new());
    assert_eq!(open(json!([{"port": "admin"}])), ["TCP 15000"], "a container that stays");
    assert_eq!(open(json!([{"port": "setup"}])), Vec::<String>::new(), "a container that ends");
    assert_eq!(open(json!([{"port": "none"}, {"port": 82}])), ["TCP 82"]);
    assert_eq!(open(json!([{"endPort": 90}])), Vec::<String>::new());
    assert_eq!(open(json!([{"port": "http", "endPort": 90}])), Vec::<String>::new());
}

#[test]
fn a_named_port_is_the_destinations() {
    let named = egress(json!([{"ports": [{"port": "http"}]}]));
    assert!(ask(&named, WEB, FAR, Protocol::Tcp, 8080));
    assert!(!ask(&named, WEB, FAR, Protocol::Tcp, 80), "80 is its own, not far's");
    assert!(!ask(&named, WEB, DB, Protocol::Tcp, 8080), "db has no such port");
    assert!(!ask(&named, WEB, OUTSIDE, Protocol::Tcp, 80));
    let block = json!([{"ipBlock": {"cidr": "10.0.2.0/24"}}]);
    let named = egress(json!([{"to": block, "ports": [{"port": "http"}]}]));
    assert!(ask(&named, WEB, FAR, Protocol::Tcp, 8080));
    assert!(!ask(&named, WEB, "10.0.2.3", Protocol::Tcp, 8080));
}

#[test]
fn peers_and_ports_of_one_rule_must_both_fit() {
    let two = ingress(json!([
        {"from": [{"podSelector": {}}], "ports": [{"port": 80}]},
        {"from": [{"namespaceSelector": {"matchLabels": {"team": "blue"}}}], "ports": [{"port": 81}]},
    ]));
    let got = [(DB, 80), (DB, 81), (FAR, 80), (FAR, 81)]
        .map(|(from, port)| ask(&two, from, WEB, Protocol::Tcp, port));
    assert_eq!(got, [true, false, false, true]);
}

#[test]
fn types_default_to_ingress_and_to_egress_where_it_has_rules() {
    let isolated = |spec: Value| {
        let cluster = cluster(policy("a", spec));
        (!ask(&cluster, FAR, WEB, Protocol::Tcp, 80), !ask(&cluster, WEB, FAR, Protocol::Tcp, 80))
    };
    let rule = json!([{"ports": [{"port": 1}]}]);
    assert_eq!(isolated(json!({})), (true, false));
    assert_eq!(isolated(json!({"egress": []})), (true, false));
    assert_eq!(isolated(json!({"egress": rule})), (true, true));
    assert_eq!(isolated(json!({"policyTypes": [], "egress": rule})), (true, true));
    assert_eq!(isolated(json!({"policyTypes": ["Egress"]})), (false, true));
    assert_eq!(isolated(json!({"policyTypes": ["Egress"], "ingress": rule})), (false, true));
    assert_eq!(isolated(json!({"policyTypes": ["Ingress"], "egress": [{}]})), (true, false));
    assert_eq!(isolated(json!({"policyTypes": ["Ingress", "Egress"]})), (true, true));
}

#[test]
fn both_sides_must_agree_and_each_says_why() {
    let mut cluster = egress(json!([{"to": [{"namespaceSelector": {}}]}]));
    let deny = policy("b", json!({"podSelector": {"matchLabels": {"app": "far"}}}));
    let deny: Vec<_> = serde_json::from_value(deny).unwrap();
    cluster.policies.extend(deny);
    let packet = |from: &str, to: &str| Packet {
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        protocol: Protocol::Tcp,
        port: 80,
    };
    let verdict = allows(&cluster, packet(WEB, FAR));
    assert!(!verdict.allowed);
    assert_eq!(verdict.to_string(), "refused: egress: rule 0 of a/p; ingress: no rule of b/p");
    assert_eq!(allows(&cluster, packet(WEB, DB)).why.ingress, Side::NotIsolated);
    assert_eq!(
        allows(&cluster, packet(WEB, NODE2)).to_string(),
        "allowed: egress: rule 0 of a/p; ingress: no pod",
        "a pod on the host network is one"
    );
    assert!(!allows(&cluster, packet(WEB, OUTSIDE)).allowed);
    assert_eq!(
        allows(&cluster, packet(NODE1, OUTSIDE)).to_string(),
        "allowed: egress: no pod; ingress: no pod"
    );
}

#[test]
fn the_manifests_hold_every_object() {
    let cluster = ingress(json!([{"ports": [{"port": "http"}, {"port": 80}]}]));
    let text = manifests(&cluster).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let kinds: Vec<&str> = documents.iter().map(|document| document["kind"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        ["Node", "Node", "Namespace", "Namespace", "Pod", "Pod", "Pod", "Pod", "Pod", "NetworkPolicy"]
    );
    assert!(text.starts_with("# node n1 also has 10.0.1.1\n"), "{text}");
    let back = |at: usize| serde_json::from_value(documents[at].clone()).unwrap();
    assert_eq!((back(9), back(0)), (json!(cluster.policies[0]), json!(cluster.nodes[0])));
}
