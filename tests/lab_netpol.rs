//! Network policy on a real kernel: who may talk to whom, and what stays of it.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ferroute_kit::assert::eventually;
use ferroute_kit::workload::{Identity, Workload};
use ferroute_kit::{
    Cluster, Daemon, Flow, KernelSnapshot, Netns, Node, Pod, PodSpec, Protocol, Reply, Stranger, kernel,
};
use lab::*;
use serde_json::{Value, json};

const FLAGS: [&str; 2] = ["--run-firewall=true", "--run-router=false"];
/// What hosts listen on.
const HOST_PORT: u16 = 9999;

/// Most tests share one cluster and daemons; each has a namespace and pods of its own.
fn shared() -> MutexGuard<'static, Lab> {
    static LAB: OnceLock<Mutex<Lab>> = OnceLock::new();
    let lab = LAB.get_or_init(|| {
        let ranges = "--loadbalancer-ip-range=198.18.0.0/24,2001:db8:1b::/64";
        Mutex::new(Lab::start(Cluster::builder().nodes(2), &[FLAGS[0], FLAGS[1], ranges]))
    });
    lab.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A namespace with pods on both nodes: `a1`, `b1`, `c1` on n1, `a2`, `b2` on n2; label `app` is the
/// first letter.
struct Town<'a> {
    lab: &'a Lab,
    namespace: &'static str,
    pods: Vec<Pod>,
}

impl<'a> Town<'a> {
    fn build(lab: &'a Lab, namespace: &'static str) -> Self {
        put_namespace(lab, namespace, json!({"team": namespace}));
        let mut town = Self { lab, namespace, pods: Vec::new() };
        for name in ["a1", "b1", "c1", "a2", "b2"] {
            town.start(name);
        }
        town
    }

    fn start(&mut self, name: &str) {
        let number = name[1..].parse().unwrap();
        let spec = PodSpec::new(name).namespace(self.namespace).ports(POD_PORTS);
        let pod = self.lab.node(number).start_pod(spec).unwrap();
        self.lab.server.insert_unchecked("pods", pod_object(&pod, json!({"app": &name[..1]}))).unwrap();
        self.pods.push(pod);
    }

    fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.spec.name == name).unwrap()
    }

    fn policy(&self, name: &str, spec: Value) {
        put_policy(self.lab, self.namespace, name, spec);
    }

    /// Both families and all protocols from a namespace to a pod.
    fn expect(&self, from: &Netns, to: &str, allowed: bool) {
        for ip in &self.pod(to).ips {
            for protocol in Protocol::ALL {
                expect(from, protocol, SocketAddr::new(*ip, 8080), allowed);
            }
        }
    }

    fn expect_pods(&self, from: &str, to: &str, allowed: bool) {
        self.expect(self.pod(from).netns(), to, allowed);
    }
}

impl Drop for Town<'_> {
    fn drop(&mut self) {
        for policy in self.lab.server.list("networkpolicies", self.namespace) {
            let name = policy["metadata"]["name"].as_str().unwrap_or_default();
            let _ = self.lab.server.remove_unchecked("networkpolicies", self.namespace, name);
        }
        for pod in &self.pods {
            let _ = self.lab.server.remove_unchecked("pods", self.namespace, &pod.spec.name);
        }
    }
}

fn ferroute(lab: &Lab, number: usize, words: &[&str]) -> (bool, String) {
    let node = lab.node(number);
    let socket = format!("--admin-socket={}", lab.admin_socket(node));
    let output =
        node.netns.run(|| std::process::Command::new(PROGRAM).args(words).arg(&socket).output()).unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// What `ferroute status` says of policies on a node.
fn status(lab: &Lab, number: usize) -> Value {
    let (ok, text) = ferroute(lab, number, &["status", "--output=json"]);
    assert!(ok, "{text}");
    serde_json::from_str::<Value>(&text).unwrap()["policies"].clone()
}

fn in_sync(lab: &Lab, number: usize) {
    eventually("kernel and desired state agree", SOON, || {
        let status = status(lab, number);
        if status["difference"] == json!([]) && status["errors"] == json!([]) {
            Ok(())
        } else {
            Err(format!("{} {}", status["difference"], status["errors"]))
        }
    });
}

#[test]
fn ingress_is_judged_wherever_it_comes_from() {
    let lab = shared();
    let town = Town::build(&lab, "ingress");
    town.expect_pods("b1", "a1", true);
    town.policy(
        "to-a",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}],
        }),
    );
    // Over the bridge of one node and between nodes.
    town.expect_pods("c1", "a1", false);
    town.expect_pods("b1", "a1", true);
    town.expect_pods("b2", "a1", true);
    town.expect_pods("c1", "a2", false);
    town.expect_pods("a2", "a1", false);
    // Who is not isolated takes everything; an isolated pod may still speak.
    town.expect_pods("c1", "b2", true);
    town.expect_pods("a1", "c1", true);
    // A pod to itself, its own node, another node, the outside.
    town.expect_pods("a1", "a1", true);
    town.expect(&lab.node(1).netns, "a1", true);
    town.expect(&lab.node(2).netns, "a1", false);
    town.expect(&lab.cluster.client, "a1", false);
    town.expect(&lab.cluster.client, "c1", true);
    // Named ports, of one protocol only.
    town.policy(
        "to-c",
        json!({
            "podSelector": {"matchLabels": {"app": "c"}},
            "ingress": [{"ports": [{"port": "web"}, {"port": "missing"}]}],
        }),
    );
    for ip in &town.pod("c1").ips {
        let to = SocketAddr::new(*ip, 8080);
        expect(town.pod("a2").netns(), Protocol::Udp, to, false);
        expect(town.pod("a2").netns(), Protocol::Sctp, to, false);
        expect(town.pod("a2").netns(), Protocol::Tcp, to, true);
        assert!(town.pod("a2").ping(*ip).unwrap(), "ping is always allowed");
    }
    in_sync(&lab, 1);
}

#[test]
fn egress_is_judged_wherever_it_goes() {
    let lab = shared();
    let town = Town::build(&lab, "egress");
    let hosts: Vec<Workload> =
        [(&lab.node(1).netns, &lab.node(1).ips), (&lab.node(2).netns, &lab.node(2).ips)]
            .into_iter()
            .map(|(netns, ips)| {
                let identity = Identity { pod: "host".into(), namespace: "host".into() };
                Workload::start(
                    netns,
                    identity,
                    ips,
                    &[(Protocol::Tcp, HOST_PORT), (Protocol::Udp, HOST_PORT)],
                )
                .unwrap()
            })
            .collect();
    town.policy(
        "from-a",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"],
            "egress": [
                {"to": [{"podSelector": {"matchLabels": {"app": "b"}}}], "ports": [
                    {"port": 8080}, {"port": 8000, "endPort": 8100, "protocol": "UDP"}, {"port": "web-s", "protocol": "SCTP"},
                ]},
                {"to": [{"ipBlock": {"cidr": "10.10.0.0/16", "except": ["10.10.0.12/32"]}}]},
                {"to": [{"ipBlock": {"cidr": "fd00:10:10::/48", "except": ["fd00:10:10::12/128"]}}]},
            ],
        }),
    );
    town.expect_pods("a1", "c1", false);
    town.expect_pods("a1", "b1", true);
    town.expect_pods("a1", "b2", true);
    town.expect_pods("a1", "a2", false);
    town.expect_pods("b1", "a1", true);
    town.expect_pods("a1", "a1", true);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for (at, allowed) in [(1, true), (2, false)] {
            for ip in &lab.node(at).ips {
                expect(town.pod("a1").netns(), protocol, SocketAddr::new(*ip, HOST_PORT), allowed);
                expect(town.pod("c1").netns(), protocol, SocketAddr::new(*ip, HOST_PORT), true);
            }
        }
    }
    drop(hosts);
    // A policy of both directions lets its members talk to nobody, each other included.
    town.policy("nothing", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
    town.expect_pods("b1", "c1", false);
    town.expect_pods("a1", "b1", false);
    in_sync(&lab, 1);
    in_sync(&lab, 2);
}

#[test]
fn services_are_judged_by_their_endpoint() {
    let lab = shared();
    let town = Town::build(&lab, "services");
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": node_ports(30100),
        "status": load_balancer(&["198.18.0.40", "2001:db8:1b::40"]),
        "annotations": {"kube-router.io/service.hairpin": ""},
    });
    // The Service is in another namespace than its endpoint; policies do not know Services.
    lab.put_service(&service("judged", 40, spec));
    lab.put_slices("judged", &[Endpoint::of(town.pod("a1"))]);
    lab.wait_served(40, 1);
    for network in ["198.18.0.0/24", "2001:db8:1b::/64"] {
        lab.cluster.client.route_via(&[lab.node(1)], network.parse().unwrap()).unwrap();
    }
    town.policy(
        "to-a",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [{"from": [
                {"podSelector": {"matchLabels": {"app": "b"}}},
                {"ipBlock": {"cidr": "10.20.0.0/24"}}, {"ipBlock": {"cidr": "fd00:10:20::/64"}},
            ]}],
        }),
    );
    for ip in &town.pod("a1").ips {
        expect(town.pod("c1").netns(), Protocol::Tcp, SocketAddr::new(*ip, 8080), false);
    }
    let client = &lab.cluster.client;
    for vip in vips(40) {
        for protocol in Protocol::ALL {
            let to = SocketAddr::new(vip, 80);
            expect(town.pod("c1").netns(), protocol, to, false);
            expect(town.pod("b1").netns(), protocol, to, true);
            expect(town.pod("b2").netns(), protocol, to, true);
            // Its own node, and the pod itself by way of its own Service.
            expect(&lab.node(1).netns, protocol, to, true);
            expect(town.pod("a1").netns(), protocol, to, true);
            // The client's address is kept, so a block of addresses can allow it.
            let front = if vip.is_ipv4() { "198.18.0.40" } else { "2001:db8:1b::40" };
            let front: IpAddr = front.parse().unwrap();
            for to in [SocketAddr::new(front, 80), SocketAddr::new(lab.node(1).ip_like(vip).unwrap(), 30100)]
            {
                expect(client, protocol, to, true);
                let Reply::Answer(answer) = client.ask(protocol, to, Duration::from_secs(2)) else {
                    panic!()
                };
                assert!(client.ips.contains(&answer.peer.ip()), "{answer:?}");
            }
        }
    }
    town.policy("to-a", json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": []}));
    for vip in vips(40) {
        let node_port = SocketAddr::new(lab.node(1).ip_like(vip).unwrap(), 30100);
        expect(client, Protocol::Tcp, node_port, false);
        expect(town.pod("b1").netns(), Protocol::Tcp, SocketAddr::new(vip, 80), false);
    }
    lab.remove_service("judged");
}

#[test]
fn changes_take_effect_at_once_and_flows_go_on() {
    let lab = shared();
    let mut town = Town::build(&lab, "changes");
    let to = SocketAddr::new(town.pod("a1").ipv4().unwrap(), 8080);
    let flow = Flow::start(town.pod("b1").netns(), Protocol::Tcp, to, Duration::from_millis(50)).unwrap();
    town.policy("deny", json!({"podSelector": {}}));
    town.expect_pods("b1", "a1", false);
    // A flow that was there goes on.
    let before = flow.tally();
    std::thread::sleep(Duration::from_millis(500));
    let after = flow.stop();
    assert!(after.ok > before.ok && after.failed == 0, "{after}");
    // Namespaces by label, changed while it runs.
    put_namespace(&lab, "guests", json!({"may": "no"}));
    let guest = lab.node(2).start_pod(PodSpec::new("guest").namespace("guests").ports(POD_PORTS)).unwrap();
    lab.server.insert_unchecked("pods", pod_object(&guest, json!({"kind": "guest"}))).unwrap();
    town.policy(
        "guests",
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"may": "yes"}},
            "podSelector": {"matchExpressions": [{"key": "kind", "operator": "In", "values": ["guest"]}]}}]}]}),
    );
    town.expect(guest.netns(), "a1", false);
    put_namespace(&lab, "guests", json!({"may": "yes"}));
    town.expect(guest.netns(), "a1", true);
    town.expect_pods("b1", "a1", false);
    lab.server.insert_unchecked("pods", pod_object(&guest, json!({"kind": "other"}))).unwrap();
    town.expect(guest.netns(), "a1", false);
    lab.server.remove_unchecked("networkpolicies", "changes", "deny").unwrap();
    lab.server.remove_unchecked("networkpolicies", "changes", "guests").unwrap();
    town.expect_pods("b1", "a1", true);
    // A pod that ended has no policies and no address, though its object is still there.
    let mut ended = pod_object(town.pod("a1"), json!({"app": "a"}));
    ended["status"]["phase"] = json!("Succeeded");
    lab.server.insert_unchecked("pods", ended).unwrap();
    town.expect_pods("b1", "a1", false);
    // A pod that nobody has told of is closed, in and out, until somebody does.
    let stray = lab.node(1).start_pod(PodSpec::new("stray").namespace("changes").ports(POD_PORTS)).unwrap();
    for ip in &stray.ips {
        for protocol in Protocol::ALL {
            expect(town.pod("b1").netns(), protocol, SocketAddr::new(*ip, 8080), false);
        }
    }
    town.expect(stray.netns(), "b2", false);
    lab.server.insert_unchecked("pods", pod_object(&stray, json!({}))).unwrap();
    town.expect(stray.netns(), "b2", true);
    lab.server.remove_unchecked("pods", "changes", "stray").unwrap();
    lab.server.remove_unchecked("pods", "guests", "guest").unwrap();
    town.start("d1");
    town.expect_pods("b2", "d1", true);
    in_sync(&lab, 1);
}

#[test]
fn explain_says_what_policies_mean_and_the_kernel_does() {
    let lab = shared();
    let town = Town::build(&lab, "explain");
    town.policy(
        "to-a",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [{"ports": [{"port": 1}]}, {"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}],
        }),
    );
    town.expect_pods("c1", "a1", false);
    let (ok, text) = ferroute(&lab, 1, &["explain", "explain/b1", "explain/a1:8080"]);
    assert!(ok && text.starts_with("ALLOWED  explain/b1 (10.244.1."), "{text}");
    assert!(text.contains("allowed by explain/to-a, ingress rule 1"), "{text}");
    assert!(text.contains("kernel: accepted in FORWARD"), "{text}");
    assert!(!text.contains("DIFFER"), "{text}");
    let (ok, text) = ferroute(&lab, 1, &["explain", "explain/c1", "explain/a1:web-u/udp", "-o", "json"]);
    assert!(ok, "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["paths"].as_array().unwrap().len(), 2, "{text}");
    for path in answer["paths"].as_array().unwrap() {
        assert_eq!((&path["allowed"], &path["agrees"]), (&json!(false), &json!(true)), "{text}");
        assert_eq!(path["kernel"]["verdict"], "refused", "{text}");
        assert_eq!(path["sides"][1]["isolatedBy"], json!(["explain/to-a"]), "{text}");
    }
    for (words, part) in [
        (["explain", "n1", "explain/a1:8080"], "always allowed"),
        (["explain", "10.20.0.10", "explain/a1:8080"], "REFUSED"),
        (["explain", "explain/a1", "n2:10250"], "ALLOWED"),
        (["explain", "explain/a1", "192.0.2.1:443"], "kernel: accepted in FORWARD"),
        (["explain", "explain/a1", "explain/b2:8080"], "ALLOWED"),
    ] {
        let (ok, text) = ferroute(&lab, 1, &words);
        assert!(ok && text.contains(part), "{words:?}: {text}");
        assert!(!text.contains("DIFFER"), "{words:?}: {text}");
    }
    let (ok, text) = ferroute(&lab, 1, &["explain", "explain/nobody", "explain/a1:8080"]);
    assert!(!ok && text.contains("there is no pod explain/nobody"), "{text}");
    // The kernel is asked, not believed.
    let node = lab.node(1);
    let set = node
        .exec("ipset", &["list", "-n"])
        .unwrap()
        .lines()
        .find(|name| {
            name.starts_with("KUBE-SRC-")
                && node
                    .exec("ipset", &["-q", "test", name, &town.pod("b1").ipv4().unwrap().to_string()])
                    .is_ok()
        })
        .map(str::to_owned)
        .unwrap();
    let differs = (0..20).any(|_| {
        node.exec("ipset", &["flush", &set]).unwrap();
        ferroute(&lab, 1, &["explain", "explain/b1", "explain/a1:8080"])
            .1
            .contains("KERNEL AND DESIRED STATE DIFFER")
    });
    assert!(differs, "a set that was emptied shows before the audit puts it right");
    town.expect_pods("b1", "a1", true);
}

#[test]
fn what_cannot_be_honoured_is_told_and_closed() {
    let lab = shared();
    let town = Town::build(&lab, "wrong");
    town.policy(
        "bad",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [
                {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}, {"ipBlock": {"cidr": "nonsense"}}]},
                {"from": [{"podSelector": {"matchExpressions": [{"key": "app", "operator": "Near", "values": ["c"]}]}}]},
                {"from": [{"podSelector": {"matchLabels": {"app": "c"}}}], "ports": [{"port": 9000, "endPort": 80}, {"port": 8080, "protocol": "ICMP"}]},
                {"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]},
            ],
        }),
    );
    // What could be read of it is enforced, the rest allows nothing.
    town.expect_pods("c1", "a1", false);
    town.expect_pods("b1", "a1", true);
    let text = lab.wait_event("bad", "InvalidPeer");
    assert!(
        text.contains("spec.ingress[0].from[0].ipBlock.except 11.0.0.0/8 is not inside 10.0.0.0/8"),
        "{text}"
    );
    let events = lab.events("bad");
    assert!(
        events.iter().any(|(reason, text)| reason == "InvalidPort" && text.contains("ICMP")),
        "{events:?}"
    );
    // Unparsable as a whole: the last good state stays.
    town.policy("bad", json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "?"}]}}));
    lab.wait_event("bad", "InvalidSelector");
    town.expect_pods("c1", "a1", false);
    town.expect_pods("b1", "a1", true);
    // As large as the API admits.
    let long = "p".repeat(253);
    let expressions: Vec<Value> =
        (0..100).map(|n| json!({"key": format!("k{n}"), "operator": "NotIn", "values": ["x"]})).collect();
    let mut rules: Vec<Value> = (0..499)
        .map(|n| json!({"from": [{"podSelector": {"matchExpressions": expressions}}], "ports": [{"port": n + 1}]}))
        .collect();
    rules.push(json!({"from": [{"podSelector": {"matchLabels": {"app": "b"}}}], "ports": [{"port": 8080}]}));
    town.policy(&long, json!({"podSelector": {"matchLabels": {"app": "c"}}, "ingress": rules}));
    for ip in &town.pod("c1").ips {
        expect(town.pod("a1").netns(), Protocol::Tcp, SocketAddr::new(*ip, 8080), false);
        expect(town.pod("b2").netns(), Protocol::Tcp, SocketAddr::new(*ip, 8080), true);
    }
    in_sync(&lab, 1);
}

/// One node of its own, for tests that stop the daemon or break its kernel.
fn alone() -> Lab {
    let lab = Lab::without_daemons(Cluster::builder().nodes(1));
    put_namespace(&lab, "shop", json!({}));
    lab
}

fn shop(lab: &Lab, name: &str) -> Pod {
    let pod = lab.node(1).start_pod(PodSpec::new(name).namespace("shop").ports(POD_PORTS)).unwrap();
    lab.server.insert_unchecked("pods", pod_object(&pod, json!({"app": name}))).unwrap();
    pod
}

fn only_from_b(lab: &Lab) {
    put_policy(
        lab,
        "shop",
        "only-b",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}, {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}],
                "ports": [{"port": "web"}]}],
        }),
    );
}

/// Ours: what clean-up shall take away, and a restart shall not touch.
fn ours(line: &str) -> bool {
    [
        "KUBE-POD-FW",
        "KUBE-NWPLCY",
        "KUBE-ROUTER-INPUT",
        "KUBE-ROUTER-FORWARD",
        "KUBE-ROUTER-OUTPUT",
        "KUBE-SRC",
        "KUBE-DST",
        "kube-router-local-pods",
        "kube-router-isolated",
        "kube-router-pod-",
    ]
    .iter()
    .any(|part| line.contains(part))
}

#[test]
fn a_restart_writes_nothing_and_clean_up_takes_everything() {
    let mut lab = alone();
    let (a, b, c) = (shop(&lab, "a"), shop(&lab, "b"), shop(&lab, "c"));
    only_from_b(&lab);
    let before = KernelSnapshot::settled(&lab.node(1).netns, SOON).unwrap();
    let stranger = Stranger::plant(&lab.node(1).netns).unwrap();
    lab.start_daemons(&FLAGS);
    let to = SocketAddr::new(a.ipv4().unwrap(), 8080);
    expect(c.netns(), Protocol::Tcp, to, false);
    expect(b.netns(), Protocol::Tcp, to, true);
    in_sync(&lab, 1);
    stranger.assert_untouched("while running");
    let running = KernelSnapshot::take(&lab.node(1).netns).unwrap();
    let flow = Flow::start(b.netns(), Protocol::Tcp, to, Duration::from_millis(20)).unwrap();
    for _ in 0..2 {
        lab.daemons[0].terminate(SOON).unwrap();
        expect(c.netns(), Protocol::Tcp, to, false);
        running.assert_same(&KernelSnapshot::take(&lab.node(1).netns).unwrap(), "while stopped");
        lab.daemons[0].start().unwrap();
        lab.daemons[0].wait_ready(SOON).unwrap();
        let written = |table: &str| {
            lab.metric(
                1,
                &format!("ferroute_netpol_netlink_messages_total{{table=\"{table}\",purpose=\"write\"}}"),
            )
        };
        assert_eq!(written("ipset"), 0.0);
        assert_eq!(lab.metric(1, "ferroute_netpol_chain_writes_total"), 0.0);
        assert!(lab.metric(1, "ferroute_netpol_passes_total") >= 1.0);
        running.assert_same(&KernelSnapshot::take(&lab.node(1).netns).unwrap(), "after a restart");
    }
    // What changed while nobody looked is made up for.
    lab.daemons[0].terminate(SOON).unwrap();
    lab.server.remove_unchecked("networkpolicies", "shop", "only-b").unwrap();
    put_policy(
        &lab,
        "shop",
        "only-c",
        json!({
            "podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "c"}}}]}],
        }),
    );
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    expect(c.netns(), Protocol::Tcp, to, true);
    expect(b.netns(), Protocol::Tcp, to, false);
    let tally = flow.stop();
    assert_eq!(tally.failed, 0, "{tally}");
    in_sync(&lab, 1);
    lab.daemons[0].terminate(SOON).unwrap();
    let clean = |dry: bool| {
        let mut words = vec!["--cleanup-config"];
        words.extend(dry.then_some("--dry-run"));
        let output =
            lab.node(1).netns.run(|| std::process::Command::new(PROGRAM).args(&words).output()).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text} {}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let told = clean(true);
    assert!(told.contains("would remove ipset kube-router-local-pods"), "{told}");
    assert!(KernelSnapshot::take(&lab.node(1).netns).unwrap().only(ours).to_string().contains("KUBE-NWPLCY"));
    let removed = clean(false);
    assert!(removed.contains("chain KUBE-ROUTER-FORWARD"), "{removed}");
    let left = KernelSnapshot::take(&lab.node(1).netns).unwrap().only(ours);
    assert!(left.sections.values().all(Vec::is_empty), "{left}");
    stranger.assert_untouched("after clean-up");
    assert_eq!(clean(false), "nothing of ferroute is left on this machine\n");
    drop(before);
}

#[test]
fn an_audit_repairs_what_others_broke_and_touches_nothing_else() {
    let mut lab = alone();
    let (a, b, c) = (shop(&lab, "a"), shop(&lab, "b"), shop(&lab, "c"));
    only_from_b(&lab);
    let stranger = Stranger::plant(&lab.node(1).netns).unwrap();
    // The audit is far off: what others change is noticed.
    lab.start_daemons(&FLAGS);
    let to = SocketAddr::new(a.ipv4().unwrap(), 8080);
    expect(c.netns(), Protocol::Tcp, to, false);
    expect(b.netns(), Protocol::Tcp, to, true);
    in_sync(&lab, 1);
    let node = &lab.node(1).netns;
    let good = KernelSnapshot::take(node).unwrap().only(ours);
    let kernel = kernel::require().unwrap();
    for (program, twin) in [(kernel.iptables, false), (kernel.ip6tables(), true)] {
        let chain = node
            .exec(program, &["-S"])
            .unwrap()
            .lines()
            .find_map(|line| line.strip_prefix("-N KUBE-POD-FW-").map(|hash| format!("KUBE-POD-FW-{hash}")))
            .unwrap();
        let set = if twin { "inet6:kube-router-isolated-in" } else { "kube-router-isolated-in" };
        type Damage<'a> = (&'a str, Vec<Vec<&'a str>>);
        let damages: Vec<Damage<'_>> = vec![
            (
                "a jump that lost its place",
                vec![vec![
                    program,
                    "-I",
                    "FORWARD",
                    "1",
                    "-m",
                    "comment",
                    "--comment",
                    "in front",
                    "-j",
                    "RETURN",
                ]],
            ),
            ("a jump that is gone", vec![vec![program, "-D", "OUTPUT", "1"]]),
            ("a rule that is gone", vec![vec![program, "-D", "KUBE-ROUTER-FORWARD", "1"]]),
            ("a chain that was emptied", vec![vec![program, "-F", &chain]]),
            ("a rule that nobody of ours wrote", vec![vec![program, "-I", &chain, "1", "-j", "ACCEPT"]]),
            ("a set that was emptied", vec![vec!["ipset", "flush", set]]),
            (
                "a foreign entry in a set",
                vec![vec!["ipset", "add", "kube-router-local-pods", "10.244.1.250"]],
            ),
        ];
        for (what, commands) in damages {
            let drift = lab.metric(1, "ferroute_netpol_drift_repaired_total");
            let begun = Instant::now();
            for command in commands {
                node.exec(command[0], &command[1..]).unwrap();
            }
            // The cheapest look comes first: programs that look keep the node's one processor from repairing.
            eventually(&format!("{program}: {what}: the repair is counted"), SOON, || {
                let now = lab.metric(1, "ferroute_netpol_drift_repaired_total");
                if now > drift { Ok(()) } else { Err(format!("{now}")) }
            });
            eventually(&format!("{program}: {what} repaired"), SOON, || {
                let now = KernelSnapshot::take(node).unwrap().only(ours);
                let difference = good.difference(&now);
                if difference.is_empty() { Ok(()) } else { Err(difference.join("\n")) }
            });
            // Order counts too.
            eventually(&format!("{program}: {what}: in sync"), SOON, || {
                let status = status(&lab, 1);
                if status["difference"] == json!([]) { Ok(()) } else { Err(status["difference"].to_string()) }
            });
            eprintln!("{program}: {what}: repaired within {:?}", begun.elapsed());
        }
        // The rule in front stays, behind our jump.
        let rules = node.exec(program, &["-S", "FORWARD"]).unwrap();
        let lines: Vec<&str> = rules.lines().filter(|line| line.starts_with("-A")).collect();
        assert!(lines[0].contains("KUBE-ROUTER-FORWARD") && lines[1].contains("in front"), "{rules}");
    }
    expect(c.netns(), Protocol::Tcp, to, false);
    expect(b.netns(), Protocol::Tcp, to, true);
    stranger.assert_untouched("after repairs");
}

#[test]
fn a_pod_start_costs_set_entries_and_a_held_lock_holds_back_chains_only() {
    let mut lab = alone();
    let (a, b) = (shop(&lab, "a"), shop(&lab, "b"));
    only_from_b(&lab);
    lab.start_daemons(&FLAGS);
    let port = |pod: &Pod| SocketAddr::new(pod.ipv4().unwrap(), 8080);
    expect(b.netns(), Protocol::Tcp, port(&a), true);
    in_sync(&lab, 1);
    let written = |lab: &Lab| {
        let messages =
            lab.metric(1, "ferroute_netpol_netlink_messages_total{table=\"ipset\",purpose=\"write\"}");
        (messages, lab.metric(1, "ferroute_netpol_chain_writes_total"))
    };
    let before = written(&lab);
    // Of the same kind as one that runs: entries only.
    let twin = lab.node(1).start_pod(PodSpec::new("a-twin").namespace("shop").ports(POD_PORTS)).unwrap();
    lab.server.insert_unchecked("pods", pod_object(&twin, json!({"app": "a"}))).unwrap();
    expect(b.netns(), Protocol::Tcp, port(&twin), true);
    let after = written(&lab);
    assert_eq!(after.1, before.1, "no chain was written");
    // Group, named port, pair, isolated twice, known; per family.
    assert!(after.0 - before.0 <= 16.0, "{} messages", after.0 - before.0);
    let stray = lab.node(1).start_pod(PodSpec::new("late").namespace("shop").ports(POD_PORTS)).unwrap();
    expect(b.netns(), Protocol::Tcp, port(&stray), false);

    // Another program holds the lock that the legacy variant takes.
    let variant = status(&lab, 1)["iptables"].as_str().unwrap().to_owned();
    let no_b = json!({"podSelector": {"matchLabels": {"app": "b"}}});
    if variant != "legacy" {
        put_policy(&lab, "shop", "no-b", no_b);
        lab.server.insert_unchecked("pods", pod_object(&stray, json!({"app": "a"}))).unwrap();
        expect(b.netns(), Protocol::Tcp, port(&stray), true);
        expect(&lab.cluster.client, Protocol::Tcp, port(&b), false);
        in_sync(&lab, 1);
        return;
    }
    let failures = lab.metric(1, "ferroute_netpol_pass_failures_total");
    let mut holder =
        Daemon::program(&lab.node(1).netns, "lock", "flock", &["-o", "/run/xtables.lock", "sleep", "30"])
            .unwrap();
    let held = Instant::now();
    eventually("the lock is held", SOON, || {
        let free = lab.node(1).exec("flock", &["-n", "/run/xtables.lock", "true"]).is_ok();
        if free { Err("free".to_owned()) } else { Ok(()) }
    });
    put_policy(&lab, "shop", "no-b", no_b);
    eventually("the lock is named", SOON, || {
        let errors = status(&lab, 1)["errors"].to_string();
        if errors.contains("xtables lock") && errors.contains("fuser") { Ok(()) } else { Err(errors) }
    });
    assert!(lab.metric(1, "ferroute_netpol_pass_failures_total") > failures);
    // What needs no chain goes on: a pod is let in, and its policy holds.
    let begun = Instant::now();
    lab.server.insert_unchecked("pods", pod_object(&stray, json!({"app": "a"}))).unwrap();
    expect(b.netns(), Protocol::Tcp, port(&stray), true);
    println!("a pod start while the lock was held took {:?}", begun.elapsed());
    while held.elapsed() < Duration::from_secs(28) {
        expect(twin.netns(), Protocol::Tcp, port(&stray), false);
        expect(twin.netns(), Protocol::Tcp, port(&a), false);
        expect(b.netns(), Protocol::Tcp, port(&a), true);
        assert!(lab.cluster.client.tcp(port(&b)).answer().is_some(), "the new policy waits");
        std::thread::sleep(Duration::from_secs(2));
    }
    assert_eq!(lab.node(1).http_get(lab.daemons[0].health, "/livez").unwrap().status, 200);
    holder.wait_exit(SOON).unwrap();
    let begun = Instant::now();
    let in_force = |to: &Pod, allowed: bool| {
        eventually("the policy is in force", SOON, || {
            let reply = lab.cluster.client.ask(Protocol::Tcp, port(to), MISSED);
            if reply.answer().is_some() == allowed { Ok(()) } else { Err(format!("{reply:?}")) }
        });
    };
    in_force(&b, false);
    println!("after 30 s of a held lock the policy was in force within {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    in_sync(&lab, 1);
    let log = lab.daemons[0].log();
    let told: Vec<&String> = log.iter().filter(|line| line.contains("xtables lock")).collect();
    assert!((2..8).contains(&told.len()), "told, not shouted: {told:#?}");

    // One that takes it again and again.
    let bursts = "for turn in $(seq 40); do flock -o /run/xtables.lock sleep 0.5; done";
    let mut holder = Daemon::program(&lab.node(1).netns, "bursts", "bash", &["-c", bursts]).unwrap();
    for (turn, allowed) in [true, false, true].into_iter().enumerate() {
        let rules = if allowed { json!([{}]) } else { json!([]) };
        let begun = Instant::now();
        put_policy(
            &lab,
            "shop",
            "no-b",
            json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": rules}),
        );
        in_force(&b, allowed);
        println!("change {turn} under bursts of the lock was in force within {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    }
    assert!(holder.is_running().unwrap());
    holder.kill().unwrap();
    in_sync(&lab, 1);
}

/// What NFLOG delivers to whoever listens on a group (linux/netfilter/nfnetlink_log.h): source and
/// destination address, and destination port.
struct Logged(ferroute_netlink::Socket);

impl Logged {
    fn listen(node: &Netns, group: u16) -> Self {
        // NFNL_SUBSYS_ULOG, NFULNL_MSG_CONFIG.
        const CONFIG: u16 = 4 << 8 | 1;
        let socket = node.run(|| {
            let mut socket = ferroute_netlink::Socket::open(ferroute_netlink::Protocol::Netfilter).unwrap();
            let mut batch = ferroute_netlink::Batch::new();
            let header = [0, 0, (group >> 8) as u8, group as u8];
            batch.message(CONFIG, 0, |body| {
                body.raw(&header);
                body.u8(1, 1); // NFULA_CFG_CMD: NFULNL_CFG_CMD_BIND
            });
            batch.message(CONFIG, 0, |body| {
                body.raw(&header);
                body.bytes(2, &[0, 0, 0, 128, 2, 0]); // NFULA_CFG_MODE: 128 bytes, NFULNL_COPY_PACKET
            });
            let failures = socket.execute(&batch).unwrap();
            assert!(failures.is_empty(), "{failures:?}");
            socket
        });
        Self(socket)
    }

    fn take(&mut self) -> Vec<(IpAddr, IpAddr, u16)> {
        let mut packets = Vec::new();
        let mut event = |kind: u16, payload: &[u8]| {
            if kind != 4 << 8 {
                return;
            }
            for attribute in ferroute_netlink::attributes(&payload[4..]).map_while(Result::ok) {
                // NFULA_PAYLOAD
                if attribute.kind != 9 {
                    continue;
                }
                let p = attribute.payload;
                let port = |at: usize| u16::from_be_bytes([p[at + 2], p[at + 3]]);
                packets.push(if p[0] >> 4 == 4 {
                    let ip = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&p[at..at + 4]).unwrap());
                    (ip(12), ip(16), port(usize::from(p[0] & 15) * 4))
                } else {
                    let ip = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&p[at..at + 16]).unwrap());
                    (ip(8), ip(24), port(40))
                });
            }
        };
        self.0.receive_events(Some(Duration::from_millis(200)), &mut event).unwrap();
        packets
    }
}

#[test]
fn refused_packets_are_logged() {
    let mut lab = alone();
    let (a, c) = (shop(&lab, "a"), shop(&lab, "c"));
    only_from_b(&lab);
    lab.start_daemons(&FLAGS);
    let mut logged = Logged::listen(&lab.node(1).netns, 100);
    for (ip, own) in a.ips.iter().zip(&c.ips) {
        expect(c.netns(), Protocol::Tcp, SocketAddr::new(*ip, 8080), false);
        let mut seen = Vec::new();
        eventually("the refused packet is delivered", SOON, || {
            seen.extend(logged.take());
            if seen.contains(&(*own, *ip, 8080)) { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    }
    let kernel = kernel::require().unwrap();
    for program in [kernel.iptables, kernel.ip6tables()] {
        let rules = lab.node(1).exec(program, &["-nvxL"]).unwrap();
        assert!(rules.contains("limit: avg 10/min burst 10"), "{program}: {rules}");
    }
}

#[test]
fn flows_end_with_their_pod() {
    let mut lab = alone();
    let (a, b) = (shop(&lab, "a"), shop(&lab, "b"));
    only_from_b(&lab);
    lab.start_daemons(&FLAGS);
    let flows = |ip: &IpAddr| {
        let family = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
        let table = lab.node(1).exec("conntrack", &["-L", "-f", family]).unwrap();
        table.lines().filter(|line| line.contains(&format!("src={ip} "))).count()
    };
    for (ip, own) in a.ips.iter().zip(&b.ips) {
        expect(b.netns(), Protocol::Tcp, SocketAddr::new(*ip, 8080), true);
        assert!(flows(own) > 0, "the flow is tracked, at least as one that ended");
    }
    lab.server.remove_unchecked("pods", "shop", "b").unwrap();
    for own in &b.ips {
        eventually(&format!("flows of {own} are forgotten"), SOON, || {
            let left = flows(own);
            if left == 0 { Ok(()) } else { Err(left.to_string()) }
        });
    }
    assert!(lab.metric(1, "ferroute_netpol_flows_forgotten_total") >= 2.0);
}

#[test]
fn a_policy_that_cannot_be_read_stays_in_force_across_a_restart() {
    let cluster = Cluster::builder().nodes(1).build().unwrap();
    let node = &cluster.nodes[0];
    let folder = std::env::temp_dir().join(format!("ferroute-hold-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, object: &Value| {
        std::fs::write(folder.join(name), serde_json::to_string_pretty(object).unwrap()).unwrap();
    };
    let pods: Vec<Pod> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            let pod = node.start_pod(PodSpec::new(name).namespace("shop").ports(POD_PORTS)).unwrap();
            write(&format!("pod-{name}.json"), &pod_object(&pod, json!({"app": name})));
            pod
        })
        .collect();
    write("node.json", &node.object());
    write("namespace.json", &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}));
    let policy = |operator: &str| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "only-b", "namespace": "shop"},
            "spec": {
                "podSelector": {"matchExpressions": [{"key": "app", "operator": operator, "values": ["a"]}]},
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}],
            },
        })
    };
    write("policy.json", &policy("In"));
    let manifests = format!("--manifests={}", folder.display());
    let mut daemon =
        Daemon::ferroute(node, PROGRAM, &[&manifests, FLAGS[0], FLAGS[1], "--run-service-proxy=false"])
            .unwrap();
    daemon.wait_ready(SOON).unwrap();
    let (a, b, c) = (&pods[0], &pods[1], &pods[2]);
    let to = SocketAddr::new(a.ipv4().unwrap(), 8080);
    expect(c.netns(), Protocol::Tcp, to, false);
    expect(b.netns(), Protocol::Tcp, to, true);
    // Broken while it runs: the last good state stays.
    write("policy.json", &policy("Near"));
    std::thread::sleep(Duration::from_secs(2));
    expect(c.netns(), Protocol::Tcp, to, false);
    expect(b.netns(), Protocol::Tcp, to, true);
    // And across a restart: the kernel's chains are its last good state then.
    daemon.terminate(SOON).unwrap();
    let before = KernelSnapshot::take(&node.netns).unwrap();
    daemon.start().unwrap();
    daemon.wait_ready(SOON).unwrap();
    before.assert_same(&KernelSnapshot::take(&node.netns).unwrap(), "after a restart");
    for _ in 0..3 {
        assert!(c.ask(Protocol::Tcp, to, MISSED).answer().is_none());
        assert!(b.ask(Protocol::Tcp, to, SOON).answer().is_some());
        std::thread::sleep(Duration::from_millis(500));
    }
    expect(a.netns(), Protocol::Tcp, SocketAddr::new(c.ipv4().unwrap(), 8080), true);
    let said = node
        .netns
        .run(|| {
            std::process::Command::new(PROGRAM)
                .args(["status", &format!("--admin-socket={}", Daemon::admin_socket(node))])
                .output()
        })
        .unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("NetworkPolicy shop/only-b stays in force as the kernel has it"), "{said}");
    assert!(said.contains("InvalidSelector"), "{said}");
    // Pods that start meanwhile are judged like those with their labels; one unlike all others is closed.
    let late: Vec<Pod> = [("like-a", "a"), ("like-c", "c"), ("unlike", "d")]
        .into_iter()
        .map(|(name, app)| {
            let pod = node.start_pod(PodSpec::new(name).namespace("shop").ports(POD_PORTS)).unwrap();
            write(&format!("pod-{name}.json"), &pod_object(&pod, json!({"app": app})));
            pod
        })
        .collect();
    for (pod, open) in late.iter().zip([false, true, false]) {
        let to = SocketAddr::new(pod.ipv4().unwrap(), 8080);
        expect(b.netns(), Protocol::Tcp, to, true);
        expect(c.netns(), Protocol::Tcp, to, open);
    }
    // Mended: judged like all others.
    write("policy.json", &policy("In"));
    expect(c.netns(), Protocol::Tcp, SocketAddr::new(late[2].ipv4().unwrap(), 8080), true);
    expect(b.netns(), Protocol::Tcp, to, true);
    expect(c.netns(), Protocol::Tcp, to, false);
    std::fs::remove_file(folder.join("policy.json")).unwrap();
    expect(c.netns(), Protocol::Tcp, to, true);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn policy_without_the_proxy_and_with_open_unknown_pods() {
    let mut lab = alone();
    let (a, b) = (shop(&lab, "a"), shop(&lab, "b"));
    only_from_b(&lab);
    lab.start_daemons(&[
        "--run-firewall=true",
        "--run-router=false",
        "--run-service-proxy=false",
        "--netpol-unknown-pods=allow",
    ]);
    let stray = lab.node(1).start_pod(PodSpec::new("stray").ports(POD_PORTS)).unwrap();
    for ip in &a.ips {
        let to = SocketAddr::new(*ip, 8080);
        expect(stray.netns(), Protocol::Tcp, to, false);
        expect(b.netns(), Protocol::Tcp, to, true);
    }
    for ip in &stray.ips {
        expect(b.netns(), Protocol::Tcp, SocketAddr::new(*ip, 8080), true);
    }
    let node: &Node = lab.node(1);
    let sets = node.exec("ipset", &["list", "-n"]).unwrap();
    assert!(!sets.contains("kube-router-svip"), "{sets}");
    assert_eq!(node.exec("ipvsadm", &["-Sn"]).unwrap(), "");
    let (ok, text) = ferroute(&lab, 1, &["status"]);
    assert!(ok && text.contains("shop/a (10.244.1."), "{text}");
    assert!(text.contains("  ingress isolated by shop/only-b"), "{text}");
    assert!(text.contains("[+] netpol: last clean pass") && !text.contains("proxy"), "{text}");
    in_sync(&lab, 1);
}
