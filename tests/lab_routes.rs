//! BGP between nodes that really run ferroute, and with a BIRD at the router: who peers with whom, what
//! each is told, what becomes of it when objects change, fail or restart.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::TcpListener;
use std::time::Duration;

use base64::Engine;
use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::{Cluster, serial};
use lab::bgp::*;
use lab::bird::Bird;
use lab::*;
use serde_json::{Value, json};

const ROUTER: &[&str] = &["--run-router=true", "--peer-router-ips=10.10.0.1", "--peer-router-asns=65000"];
/// Everything is running after this, also while other labs share the machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A BIRD at the cluster's router, AS 65000, with a session for each node. It touches no kernel route.
fn bird_at_the_router(cluster: &Cluster) -> Bird {
    let mut config = "router id 10.10.0.1; graceful restart wait 3;
             protocol device { }
             protocol static { ipv4; route 198.51.100.0/24 blackhole; route 0.0.0.0/0 blackhole; }\n"
        .to_owned();
    for node in &cluster.nodes {
        config += &format!(
            "protocol bgp {name} {{
                   local 10.10.0.1 as 65000; neighbor {address} as 64512;
                   connect delay time 1; connect retry time 1; error wait time 1, 2; graceful restart on;
                   ipv4 {{ import all; export where source = RTS_STATIC; next hop self; }};
                   ipv6 {{ import all; export none; }};
                 }}\n",
            name = node.name,
            address = node.ips[0],
        );
    }
    Bird::start(&cluster.router, &config)
}

/// Waits until a node's kernel has routes of ours that begin so.
fn wait_kernel(lab: &Lab, number: usize, wanted: &[&str]) {
    eventually(&format!("routes in the kernel of node {number}"), SESSION, || {
        let show = "ip route show proto 70; ip -6 route show proto 70";
        let found = lab.node(number).exec("sh", &["-c", show]).unwrap();
        let has = |line: &&str| found.lines().any(|route| route.starts_with(*line));
        if wanted.iter().all(has) { Ok(()) } else { Err(format!("not all of {wanted:?} in\n{found}")) }
    });
}

fn annotate(lab: &Lab, node: &str, name: &str, text: Option<&str>) {
    let patch = json!({"metadata": {"annotations": {(format!("kube-router.io/{name}")): text}}});
    lab.server.patch("nodes", "", node, patch).unwrap();
}

fn external(ips: &[&str], policy: &str) -> Value {
    json!({"externalIPs": ips, "externalTrafficPolicy": policy})
}

/// So many nodes with a pod each: `everywhere` has an endpoint on the first, `here`, of policy Local, on the second.
fn lab_with_two_services(nodes: usize) -> (Lab, Vec<Endpoint>) {
    let lab = Lab::without_daemons(Cluster::builder().nodes(nodes).pods_per_node(1));
    let pods: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    lab.put_service(&service("everywhere", 10, external(&["203.0.113.10", "2001:db8:7::10"], "Cluster")));
    lab.put_slices("everywhere", &pods[..1]);
    lab.put_service(&service("here", 11, external(&["203.0.113.11"], "Local")));
    lab.put_slices("here", &pods[1..2]);
    (lab, pods)
}

#[test]
fn nodes_learn_pods_and_the_router_learns_services() {
    let _serial = serial();
    let (mut lab, pods) = lab_with_two_services(3);
    let bird = bird_at_the_router(&lab.cluster);
    lab.put_service(&service("nowhere", 12, external(&["203.0.113.12"], "Cluster")));
    lab.put_service(&service("refused", 13, external(&["192.0.2.13"], "Cluster")));
    lab.put_slices("refused", &pods[..1]);
    let mut off = service("off", 14, external(&["203.0.113.14"], "Cluster"));
    off["metadata"]["annotations"] = json!({"kube-router.io/service.advertise.externalip": "false"});
    lab.put_service(&off);
    lab.put_slices("off", &pods[..1]);
    let ranges = "--service-external-ip-range=203.0.113.0/24,2001:db8:7::/64";
    let flags: Vec<&str> = ROUTER.iter().copied().chain([ranges, "--advertise-external-ip"]).collect();
    lab.start_daemons_within(PATIENCE, &flags);

    wait_sessions(
        &lab,
        1,
        &["10.10.0.1 Established 0", "10.10.0.12 Established 0", "10.10.0.13 Established 0"],
    );
    // Every node knows the way to the pods of every other, in both families.
    for (node, other) in [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)] {
        for row in [
            format!("10.244.{other}.0/24 via 10.10.0.1{other}: best"),
            format!("fd00:244:{other}::/64 via fd00:10:10::1{other}: best"),
        ] {
            wait_row(&lab, node, &["routes"], &row);
        }
    }
    // And so does its kernel, in both.
    for (node, other) in [(1, 2), (2, 3), (3, 1)] {
        wait_kernel(
            &lab,
            node,
            &[
                &format!("10.244.{other}.0/24 via 10.10.0.1{other} dev eth0"),
                &format!("fd00:244:{other}::/64 via fd00:10:10::1{other} dev eth0"),
                "198.51.100.0/24 via 10.10.0.1 dev eth0",
            ],
        );
    }
    // The router knows all pods, and Services where somebody answers.
    let everywhere = ["203.0.113.10/32", "2001:db8:7::10/128"];
    bird.learns("n1", &["10.244.1.0/24", "fd00:244:1::/64", everywhere[0], everywhere[1]]);
    bird.learns("n2", &["10.244.2.0/24", "fd00:244:2::/64", everywhere[0], everywhere[1], "203.0.113.11/32"]);
    bird.learns("n3", &["10.244.3.0/24", "fd00:244:3::/64", everywhere[0], everywhere[1]]);
    // Nodes are not told Services, and not what the router said.
    let told = rows(&bgp(&lab, 1, &["advertised", "10.10.0.12"]));
    assert!(told.contains("10.244.1.0/24 via 10.10.0.11: advertised"), "{told:#?}");
    assert!(told.contains("203.0.113.10/32 via 10.10.0.11: not advertised: export policy"), "{told:#?}");
    assert!(
        told.iter().any(|row| row.starts_with("198.51.100.0/24") && row.contains("not advertised")),
        "{told:#?}"
    );
    // The router's routes are taken, a default route is not.
    wait_row(&lab, 1, &["received", "10.10.0.1"], "198.51.100.0/24 via 10.10.0.1: best");
    let received = rows(&bgp(&lab, 1, &["received", "10.10.0.1"]));
    assert!(
        received.iter().any(|row| row.starts_with("0.0.0.0/0 ") && row.contains("\"default-route\"")),
        "{received:#?}"
    );

    // Endpoints come and go, ready or not.
    let mut unready = pods[1].clone();
    unready.conditions = json!({"ready": false, "serving": false, "terminating": false});
    lab.put_slices("here", &[unready]);
    bird.learns("n2", &["10.244.2.0/24", "fd00:244:2::/64", everywhere[0], everywhere[1]]);
    lab.put_slices("here", &pods[2..]);
    bird.learns("n3", &["10.244.3.0/24", "fd00:244:3::/64", everywhere[0], everywhere[1], "203.0.113.11/32"]);
    lab.remove_service("here");
    bird.learns("n3", &["10.244.3.0/24", "fd00:244:3::/64", everywhere[0], everywhere[1]]);
    lab.put_slices("nowhere", &pods[..1]);
    bird.learns("n3", &["10.244.3.0/24", "fd00:244:3::/64", everywhere[0], everywhere[1], "203.0.113.12/32"]);

    // A node that is excluded keeps its pods only; another that goes says so, and then takes back its own.
    let label = "node.kubernetes.io/exclude-from-external-load-balancers";
    lab.server.patch("nodes", "", "n1", json!({"metadata": {"labels": {(label): "true"}}})).unwrap();
    bird.learns("n1", &["10.244.1.0/24", "fd00:244:1::/64"]);
    let taint = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    lab.server.patch("nodes", "", "n3", json!({"spec": {"taints": taint}})).unwrap();
    eventually("graceful shutdown", SOON, || {
        let route = bird.ask("show route 203.0.113.10/32 protocol n3 all")?;
        if route.contains("(65535,0)") { Ok(()) } else { Err(route) }
    });
    bird.learns("n3", &["10.244.3.0/24", "fd00:244:3::/64"]);

    // What people and machines are told.
    let socket = format!("--admin-socket={}", lab.admin_socket(lab.node(1)));
    let text = lab.node(1).exec(PROGRAM, &["bgp", "neighbors", &socket]).unwrap();
    assert!(text.contains("BGP: AS 64512, router id 10.10.0.11"), "{text}");
    assert!(text.contains("node n2") && text.contains("external peer"), "{text}");
    let text = lab.node(1).exec(PROGRAM, &["status", &socket]).unwrap();
    for part in [
        "BGP: AS 64512",
        "pod network: 5 prefixes learned, 5 routes, 0 tunnels, 0 refused",
        "[+] network: ",
        "there is no /etc/cni/net.d/10-kuberouter.conf on Node n1",
    ] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
    assert_eq!(lab.metric(1, "ferroute_network_routes"), 5.0);
    let info = "kube_router_bgp_peer_info{address=\"10.10.0.1\",type=\"external\",asn=\"65000\",state=\"established\"}";
    assert_eq!(lab.metric(1, info), 1.0);
    assert_eq!(lab.metric(1, "ferroute_bgp_session_up{address=\"10.10.0.12\"}"), 1.0);
    let refused = lab.node(1).exec(PROGRAM, &["bgp", "received", "192.0.2.99", &socket]).unwrap_err();
    assert!(refused.to_string().contains("no BGP peer 192.0.2.99"), "{refused}");

    // An orderly stop takes everything back at once; sessions of the others stay.
    lab.daemons[1].terminate(SOON).unwrap();
    bird.learns("n2", &[]);
    assert!(sessions(&lab, 1).contains(&"10.10.0.13 Established 0".to_owned()), "{:?}", sessions(&lab, 1));
}

#[test]
fn what_is_wrong_is_told_and_touches_nobody_else() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(2).pods_per_node(1));
    let bird = bird_at_the_router(&lab.cluster);
    // On node 2 another speaker has the port.
    let address = (lab.node(2).ips[0], 179);
    let holder = lab.node(2).netns.run(|| TcpListener::bind(address)).unwrap();
    let peers = "[{remoteip: 10.10.0.1, remoteasn: 65000}, {remoteip: 192.0.2.9, remoteasn: 0}, \
                  {remoteip: 10.10.0.11, remoteasn: 65000}, {remoteip: 10.10.0.1, remoteasn: 65001}]";
    annotate(&lab, "n1", "peers", Some(peers));
    lab.start_daemons_within(PATIENCE, &["--run-router=true"]);
    let both = ["10.10.0.1 Established 0", "10.10.0.12 Established 0"];
    wait_sessions(&lab, 1, &both);
    wait_sessions(&lab, 2, &["10.10.0.11 Established 0"]);
    for (reason, words) in [
        (
            "InvalidPeer",
            "annotation kube-router.io/peers of Node n1: peer 2 (192.0.2.9) is left out: AS 0 is reserved",
        ),
        ("PeerIsItself", "10.10.0.11 is its own address"),
        ("DuplicatePeer", "another peer has the address 10.10.0.1"),
    ] {
        let text = lab.wait_event("n1", reason);
        assert!(text.contains(words), "{reason}: {text}");
    }
    let text = lab.wait_event("n2", "BgpPortTaken");
    assert!(text.contains("10.10.0.12:179") && text.contains("choose another --bgp-port"), "{text}");
    drop(holder);
    eventually("the port is taken when it is free", SOON, || {
        let listeners = bgp(&lab, 2, &["neighbors"])["listeners"].clone();
        let free = listeners.as_array().unwrap().iter().all(|one| one["error"].is_null());
        if free { Ok(()) } else { Err(listeners.to_string()) }
    });

    // A community reaches the peer without a new session.
    annotate(&lab, "n1", "node.bgp.communities", Some("65001:77,nonsense"));
    eventually("a community", SOON, || {
        let route = bird.ask("show route 10.244.1.0/24 protocol n1 all")?;
        if route.contains("(65001,77)") { Ok(()) } else { Err(route) }
    });
    assert!(lab.wait_event("n1", "InvalidAnnotation").contains("\"nonsense\""));
    assert_eq!(sessions(&lab, 1), both);

    // A wrong password ends one session and no other; the words say what to look at.
    annotate(&lab, "n1", "peers", Some("[{remoteip: 10.10.0.1, remoteasn: 65000, password: c2VjcmV0}]"));
    let text = lab.wait_event("n1", "BgpSessionDown");
    println!("{text}");
    assert!(text.contains("10.10.0.1 (external peer)"), "{text}");
    eventually("the password is suspected", SESSION, || {
        let status = bgp(&lab, 1, &["neighbors"]);
        let text = status["neighbors"][0]["lastError"]["text"].to_string();
        if text.contains("password") { Ok(()) } else { Err(text) }
    });
    assert!(sessions(&lab, 1).contains(&both[1].to_owned()), "{:?}", sessions(&lab, 1));
    // A wrong AS.
    annotate(&lab, "n1", "peers", Some("[{remoteip: 10.10.0.1, remoteasn: 65099}]"));
    eventually("the AS is named", SESSION, || {
        let status = bgp(&lab, 1, &["neighbors"]);
        let text = status["neighbors"][0]["lastError"]["text"].to_string();
        if text.contains("65099") && text.contains("65000") { Ok(()) } else { Err(text) }
    });
    // A text that is no list leaves all as it was; a good one brings the session back.
    annotate(&lab, "n1", "peers", Some("[{remoteip: 10.10.0.1, remoteasn: 65000}]"));
    eventually("the session", SESSION, || {
        let rows = sessions(&lab, 1);
        if rows[0].starts_with("10.10.0.1 Established") { Ok(()) } else { Err(format!("{rows:?}")) }
    });
    assert!(lab.wait_event("n1", "BgpSessionUp").contains("10.10.0.1"));
    let before = sessions(&lab, 1);
    annotate(&lab, "n1", "peers", Some("[{remoteip: 10.10.0.1, remoteasn: 65000}"));
    throughout("nothing happens", Duration::from_secs(2), || {
        let now = sessions(&lab, 1);
        if now == before { Ok(()) } else { Err(format!("{now:?}")) }
    });
    annotate(&lab, "n1", "peers", None);
    wait_sessions(&lab, 1, &both[1..]);
    for daemon in &lab.daemons {
        let log = daemon.log().join("\n");
        assert!(!log.contains("c2VjcmV0") && !log.contains("secret"), "a secret is in the log");
    }
}

#[test]
fn a_range_is_told_whole_while_something_in_it_is_served() {
    let _serial = serial();
    let (mut lab, pods) = lab_with_two_services(2);
    let bird = bird_at_the_router(&lab.cluster);
    let ranges = "--service-external-ip-range=203.0.113.0/24,2001:db8:7::/64";
    let more = [ranges, "--advertise-external-ip", "--advertise-ranges"];
    let flags: Vec<&str> = ROUTER.iter().copied().chain(more).collect();
    lab.start_daemons_within(PATIENCE, &flags);
    // Where policy Local needs a way of its own it has one.
    let own = |number: usize| [format!("10.244.{number}.0/24"), format!("fd00:244:{number}::/64")];
    let learns = |number: usize, more: &[&str]| {
        let own = own(number);
        let all: Vec<&str> = own.iter().map(String::as_str).chain(more.iter().copied()).collect();
        bird.learns(&format!("n{number}"), &all);
    };
    learns(1, &["203.0.113.0/24", "2001:db8:7::/64"]);
    learns(2, &["203.0.113.0/24", "2001:db8:7::/64", "203.0.113.11/32"]);
    // What the router sends to an address that nobody has ends here, and does not go back to it.
    for unused in ["203.0.113.99", "2001:db8:7::99"] {
        let route = lab.node(1).exec("ip", &["route", "get", unused]).unwrap();
        assert!(route.starts_with("local "), "{route}");
    }
    // Without an endpoint nothing is served, and the family goes that has none left.
    lab.put_slices("everywhere", &[]);
    learns(1, &[]);
    learns(2, &["203.0.113.0/24", "203.0.113.11/32"]);
    lab.put_slices("everywhere", &pods[..1]);
    lab.remove_service("here");
    learns(1, &["203.0.113.0/24", "2001:db8:7::/64"]);
    learns(2, &["203.0.113.0/24", "2001:db8:7::/64"]);
}

fn put_password(lab: &Lab, password: &str) {
    let data = base64::engine::general_purpose::STANDARD.encode(password);
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/basic-auth",
        "metadata": {"name": "tor", "namespace": "default"}, "data": {"password": data},
    });
    lab.server.apply(&secret.to_string()).unwrap();
}

#[test]
fn a_secret_holds_the_password_of_one_session_and_touches_no_other() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(2).pods_per_node(1));
    let address = lab.node(1).ips[0];
    let bird = Bird::start(
        &lab.cluster.router,
        &format!(
            "router id 10.10.0.1; protocol device {{ }}
             protocol bgp n1 {{
               local 10.10.0.1 as 65000; neighbor {address} as 64512; password \"correct horse\";
               connect delay time 1; connect retry time 1; error wait time 1, 2;
               ipv4 {{ import all; export none; }}; ipv6 {{ import all; export none; }};
             }}\n"
        ),
    );
    let peers = "[{remoteip: 10.10.0.1, remoteasn: 65000, passwordSecret: {name: tor}}]";
    annotate(&lab, "n1", "peers", Some(peers));
    lab.start_daemons_within(PATIENCE, &["--run-router=true"]);
    // Without its Secret the peer is not dialled; the mesh does not wait for it.
    let mesh = "10.10.0.12 Established 0";
    wait_sessions(&lab, 1, &[mesh]);
    let text = lab.wait_event("n1", "PasswordMissing");
    assert!(
        text.contains("10.10.0.1, which is not dialled without one: there is no Secret default/tor"),
        "{text}"
    );
    put_password(&lab, "correct horse");
    wait_sessions(&lab, 1, &["10.10.0.1 Established 0", mesh]);
    bird.learns("n1", &["10.244.1.0/24", "fd00:244:1::/64"]);
    // Another password ends this session, and the right one brings it back.
    put_password(&lab, "battery staple");
    eventually("the password is suspected", SESSION, || {
        let text = bgp(&lab, 1, &["neighbors"])["neighbors"][0]["lastError"]["text"].to_string();
        if text.contains("password") { Ok(()) } else { Err(text) }
    });
    put_password(&lab, "correct horse");
    eventually("the session", SESSION, || {
        let rows = sessions(&lab, 1);
        if rows[0].starts_with("10.10.0.1 Established") { Ok(()) } else { Err(format!("{rows:?}")) }
    });
    // A Secret that goes takes no session along.
    let before = sessions(&lab, 1);
    assert_eq!(before[1], mesh);
    lab.server.delete("secrets", "default", "tor").unwrap();
    eventually("it is told", SOON, || {
        let events = lab.events("n1");
        let kept = events.iter().any(|(_, text)| text.contains("10.10.0.1, which keeps the password it had"));
        if kept { Ok(()) } else { Err(format!("{events:?}")) }
    });
    throughout("nothing happens", Duration::from_secs(2), || {
        let now = sessions(&lab, 1);
        if now == before { Ok(()) } else { Err(format!("{now:?}")) }
    });
    let socket = format!("--admin-socket={}", lab.admin_socket(lab.node(1)));
    let status = lab.node(1).exec(PROGRAM, &["status", &socket]).unwrap();
    let told = format!("{status}{:?}", lab.server.list("events", "default"));
    for daemon in &lab.daemons {
        let said = daemon.log().join("\n") + &told;
        for secret in ["correct horse", "battery staple", "Y29ycmVjdCBob3JzZQ", "YmF0dGVyeSBzdGFwbGU"] {
            assert!(!said.contains(secret), "a secret is shown");
        }
    }
}

#[test]
fn peers_keep_routes_while_the_daemon_is_killed_and_starts_again() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(2).pods_per_node(1));
    let bird = bird_at_the_router(&lab.cluster);
    let pods: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    lab.put_service(&service("web", 10, json!({"externalIPs": ["203.0.113.10"]})));
    lab.put_slices("web", &pods);
    let more =
        ["--advertise-external-ip", "--service-external-ip-range=203.0.113.0/24", "--bgp-graceful-restart"];
    let flags: Vec<&str> = ROUTER.iter().copied().chain(more).collect();
    lab.start_daemons_within(PATIENCE, &flags);
    let all = ["10.244.1.0/24", "fd00:244:1::/64", "203.0.113.10/32"];
    bird.learns("n1", &all);
    wait_row(&lab, 2, &["routes"], "10.244.1.0/24 via 10.10.0.11: best");
    let kept = |lab: &Lab, what: &str, time: Duration| {
        throughout(what, time, || {
            let routes = bird.routes("n1");
            let there = all.iter().all(|prefix| routes.contains(*prefix));
            let mine = rows(&bgp(lab, 2, &["routes"]));
            let other = mine.iter().any(|row| row.starts_with("10.244.1.0/24 via 10.10.0.11: best"));
            if there && other { Ok(()) } else { Err(format!("{routes:?} {mine:#?}")) }
        });
    };
    kept(&lab, "before", Duration::from_millis(500));
    lab.daemons[0].kill().unwrap();
    kept(&lab, "while it is away", Duration::from_secs(2));
    lab.daemons[0].start().unwrap();
    kept(&lab, "while it comes back", Duration::from_secs(6));
    lab.daemons[0].wait_ready(SOON).unwrap();
    wait_sessions(&lab, 1, &["10.10.0.1 Established 0", "10.10.0.12 Established 0"]);
    assert!(
        lab.daemons[0].log().iter().any(|line| line.contains("restarted=true")),
        "{:#?}",
        lab.daemons[0].log()
    );
    // Nothing is left from before: what is gone meanwhile is withdrawn.
    lab.daemons[0].terminate(SOON).unwrap();
    throughout("an orderly stop is silent too", Duration::from_secs(1), || {
        let routes = bird.routes("n1");
        if routes.len() == all.len() { Ok(()) } else { Err(format!("{routes:?}")) }
    });
    lab.remove_service("web");
    lab.daemons[0].start().unwrap();
    bird.learns("n1", &all[..2]);
}
