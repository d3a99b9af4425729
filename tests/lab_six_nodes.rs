//! Six nodes in two subnets, and no route to any pod but those that ferroute makes: the real daemon on each,
//! an API server, packets from pods to pods in both families.
//!
//! Run it through `scripts/test --lab-only lab_six_nodes`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Daemon, Netns, Protocol, Stranger, serial};
use lab::*;
use serde_json::{Value, json};

/// Everything is running after this, also while other labs share the machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// Sessions of a node that came, went or moved have settled after this.
const SETTLED: Duration = Duration::from_secs(60);

/// n1, n3, n5 are in one subnet, n2, n4, n6 in the other.
const NODES: usize = 6;
const CNI: &str = r#"{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"kube-bridge",
"isDefaultGateway":true,"ipam":{"type":"host-local"}},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("ferroute-six-nodes-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for number in 1..=NODES {
            std::fs::write(folder.join(format!("n{number}.conflist")), CNI).unwrap();
        }
        // All nodes share one file system, so each is told of a network configuration of its own, by the
        // name that its command line has.
        let script = format!(
            "#!/bin/sh\nfor word in \"$@\"; do case $word in --hostname-override=*) node=${{word#*=}};; esac; done\n\
             export KUBE_ROUTER_CNI_CONF_FILE={}/$node.conflist\nexec {PROGRAM} \"$@\"\n",
            folder.display()
        );
        let program = folder.join("ferroute");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self(folder)
    }

    /// The first plugin of a node's network configuration.
    fn bridge(&self, number: usize) -> Value {
        let text = std::fs::read_to_string(self.0.join(format!("n{number}.conflist"))).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["plugins"][0].clone()
    }
}

struct Scene {
    lab: Lab,
    folder: Folder,
}

impl Scene {
    fn new() -> Self {
        let cluster = Cluster::builder().nodes(NODES).subnets(2).pods_per_node(1).unrouted();
        Self { lab: Lab::without_daemons(cluster), folder: Folder::new() }
    }

    fn start(&mut self, flags: &[&str]) {
        self.lab.daemons.clear();
        let master = format!("--master={}", self.lab.server.url());
        for node in self.lab.cluster.nodes.clone() {
            let socket = format!("--admin-socket={}", self.lab.admin_socket(&node));
            let mut all =
                vec![&*master, "--metrics-port=9090", &*socket, "--run-router", "--run-service-proxy=false"];
            all.extend(flags);
            self.lab.daemons.push(Daemon::ferroute(&node, self.folder.0.join("ferroute"), &all).unwrap());
        }
        for daemon in &mut self.lab.daemons {
            daemon.wait_ready(PATIENCE).unwrap();
        }
    }

    fn stop(&mut self) {
        for daemon in &mut self.lab.daemons {
            daemon.terminate(SOON).unwrap();
        }
    }

    /// Waits until each of these nodes' kernel has exactly the routes to the pods of the others of them.
    fn wait_routes(&self, nodes: &[usize], through_router: bool) {
        for node in nodes {
            let wanted: BTreeSet<String> = nodes
                .iter()
                .filter(|other| *other != node && (!through_router || *other % 2 == *node % 2))
                .flat_map(|other| [format!("10.244.{other}.0/24"), format!("fd00:244:{other}::/64")])
                .collect();
            eventually(&format!("routes of n{node}"), SETTLED, || {
                let found: BTreeSet<String> =
                    routes(self.lab.node(*node)).iter().map(|line| first(line).to_owned()).collect();
                if found == wanted { Ok(()) } else { Err(format!("{found:?}, not {wanted:?}")) }
            });
        }
    }

    /// Packets go from each of these nodes' pods to the pods of all others, with the pod's own address.
    fn assert_talk(&self, nodes: &[usize], when: &str) {
        for from in nodes {
            let pod = self.lab.pod(&format!("p{from}-1"));
            for to in nodes.iter().filter(|to| *to != from) {
                for (own, ip) in pod.ips.iter().zip(&self.lab.pod(&format!("p{to}-1")).ips) {
                    let at = SocketAddr::new(*ip, 8080);
                    let said = ask(pod.netns(), Protocol::Tcp, at, when);
                    assert_eq!(said.peer.ip(), *own, "{when}: p{from}-1 at {at}");
                }
            }
        }
    }
}

/// Lines of a shell, in a namespace.
fn script(netns: &Netns, lines: &str) -> String {
    netns.exec("sh", &["-ec", lines]).unwrap()
}

/// Routes of ours in table main, both families.
fn routes(node: &Netns) -> Vec<String> {
    let said = script(node, "ip route show proto 70; ip -6 route show proto 70");
    said.lines().map(str::to_owned).collect()
}

fn first(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}

/// Far ends of the tunnels of a node.
fn tunnels(node: &Netns) -> BTreeSet<IpAddr> {
    let said = script(node, "ip -d link show type ipip; ip -d link show type ip6tnl");
    let words: Vec<&str> = said.split_whitespace().collect();
    let ends = words.windows(2).filter(|pair| pair[0] == "remote");
    ends.filter_map(|pair| pair[1].parse::<IpAddr>().ok()).filter(|end| !end.is_unspecified()).collect()
}

fn ips(list: &[&str]) -> BTreeSet<IpAddr> {
    list.iter().map(|ip| ip.parse().unwrap()).collect()
}

#[test]
fn pods_reach_pods_while_nodes_die_return_and_move() {
    let _serial = serial();
    let mut scene = Scene::new();
    let strangers: Vec<Stranger> =
        [1, 2].map(|number| Stranger::plant(scene.lab.node(number)).unwrap()).into();
    scene.start(&[]);
    let all = [1, 2, 3, 4, 5, 6];

    // With tunnels between the subnets, of which the router between them knows nothing.
    scene.wait_routes(&all, false);
    scene.assert_talk(&all, "with tunnels");
    let far = [
        "10.10.1.12",
        "10.10.1.14",
        "10.10.1.16",
        "fd00:10:10:1::12",
        "fd00:10:10:1::14",
        "fd00:10:10:1::16",
    ];
    assert_eq!(tunnels(scene.lab.node(1)), ips(&far));
    let lines = routes(scene.lab.node(1));
    for wanted in ["10.244.3.0/24 via 10.10.0.13 dev eth0", "fd00:244:5::/64 via fd00:10:10::15 dev eth0"] {
        assert!(lines.iter().any(|line| line.starts_with(wanted)), "{wanted} is missing in {lines:#?}");
    }
    // What the runtime reads, and the largest packet of pods: 1500 less 40 bytes of an IPv6 header.
    for number in all {
        let bridge = scene.folder.bridge(number);
        let cidrs = json!([[{"subnet": format!("10.244.{number}.0/24")}], [{"subnet": format!("fd00:244:{number}::/64")}]]);
        assert_eq!((&bridge["ipam"]["ranges"], &bridge["mtu"]), (&cidrs, &json!(1460)), "n{number}");
    }
    // The outside sees the node; NAT is for what leaves the cluster.
    let outside = scene.lab.cluster.client.ips[0];
    let seen = scene.lab.pod("p1-1").netns().ping(outside).unwrap();
    assert!(seen, "a pod reaches the outside although no router knows its network");

    // A node dies: what led to it goes, and nothing else.
    let keep = [1, 2, 3, 4, 5];
    scene.lab.daemons[5].kill().unwrap();
    script(scene.lab.node(6), "ip link set eth0 down");
    scene.wait_routes(&keep, false);
    eventually("no tunnel to a dead node", SETTLED, || {
        let found = tunnels(scene.lab.node(1));
        let dead = ips(&["10.10.1.16", "fd00:10:10:1::16"]);
        if found.is_disjoint(&dead) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    scene.assert_talk(&keep, "without n6");

    // It returns, its kernel as it left it, but for the routes that went with its link.
    script(
        scene.lab.node(6),
        "ip link set eth0 up; ip -6 addr replace fd00:10:10:1::16/64 dev eth0 nodad
             ip route replace default via 10.10.1.1; ip -6 route replace default via fd00:10:10:1::1",
    );
    scene.lab.daemons[5].start().unwrap();
    scene.lab.daemons[5].wait_ready(PATIENCE).unwrap();
    scene.wait_routes(&all, false);
    scene.assert_talk(&all, "n6 is back");

    // It gets other addresses: the machine first, then the Node object.
    script(
        scene.lab.node(6),
        "ip addr del 10.10.1.16/24 dev eth0; ip -6 addr del fd00:10:10:1::16/64 dev eth0
             ip addr add 10.10.1.66/24 dev eth0; ip -6 addr add fd00:10:10:1::66/64 dev eth0 nodad
             ip route replace default via 10.10.1.1; ip -6 route replace default via fd00:10:10:1::1",
    );
    let addresses = json!([
        {"type": "InternalIP", "address": "10.10.1.66"},
        {"type": "InternalIP", "address": "fd00:10:10:1::66"},
    ]);
    scene.lab.server.patch_status("nodes", "", "n6", json!({"status": {"addresses": addresses}})).unwrap();
    eventually("ways to the new addresses", SETTLED, || {
        let (far, near) = (tunnels(scene.lab.node(1)), routes(scene.lab.node(2)));
        let moved = far.is_superset(&ips(&["10.10.1.66", "fd00:10:10:1::66"]))
            && far.is_disjoint(&ips(&["10.10.1.16", "fd00:10:10:1::16"]));
        let gateway = near.iter().any(|line| line.starts_with("10.244.6.0/24 via 10.10.1.66 "));
        if moved && gateway { Ok(()) } else { Err(format!("{far:?} {near:#?}")) }
    });
    scene.wait_routes(&all, false);
    scene.assert_talk(&all, "n6 has other addresses");

    // Without tunnels: the router must know pods; nodes of one subnet need no router.
    scene.stop();
    for number in all {
        let [v4, v6] = if number == 6 {
            ["10.10.1.66".to_owned(), "fd00:10:10:1::66".to_owned()]
        } else {
            let ips = &scene.lab.node(number).ips;
            [ips[0].to_string(), ips[1].to_string()]
        };
        let line = format!(
            "ip route add 10.244.{number}.0/24 via {v4}; ip -6 route add fd00:244:{number}::/64 via {v6}"
        );
        script(&scene.lab.cluster.router, &line);
    }
    scene.start(&["--enable-overlay=false"]);
    scene.wait_routes(&all, true);
    scene.assert_talk(&all, "without tunnels");
    let socket = format!("--admin-socket={}", scene.lab.admin_socket(scene.lab.node(1)));
    let text = scene.lab.node(1).exec(PROGRAM, &["status", &socket]).unwrap();
    for part in ["10.244.2.0/24: next hop 10.10.1.12 is not on a connected network", "MTU of pods 1500"] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
    for number in all {
        assert!(tunnels(scene.lab.node(number)).is_empty(), "a tunnel is left on n{number}");
        let rules = script(scene.lab.node(number), "ip rule; ip -6 rule");
        assert!(!rules.contains("lookup 77"), "a rule is left on n{number}:\n{rules}");
    }
    for stranger in &strangers {
        stranger.assert_untouched("after all of it");
    }
}
