//! Processes, snapshots, strangers and kubelets of the kit, on the lab kernel.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use ferroute_apiserver::{ApiServer, Kubelet as Runs, NodeSpec};
use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::kubelet::Settings;
use ferroute_kit::{
    Cluster, Daemon, Families, KernelSnapshot, Kubelet, Load, PodSpec, Protocol, Stranger, serial,
};
use serde_json::json;

const SOON: Duration = Duration::from_secs(5);

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists() || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    }
}

#[test]
fn a_daemon_runs_in_its_node_and_leaves_nothing() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(2).families(Families::V4).build().unwrap();
    let node = &cluster.nodes[1];
    let script = "echo out $0; echo err >&2; ip -o -4 addr show dev eth0; exec sleep 1000";
    let mut daemon = Daemon::program(&node.netns, "n2-sleep", "/bin/sh", &["-c", script, "name"]).unwrap();
    eventually("its log", SOON, || {
        let log = daemon.log();
        let has = |text: &str| log.iter().any(|line| line.contains(text));
        if has("out name") && has("err") && has("10.10.0.12") { Ok(()) } else { Err(format!("{log:?}")) }
    });
    assert!(daemon.is_running().unwrap());
    assert!(daemon.usage().unwrap().0 > 0);
    assert!(daemon.start().is_err(), "it runs already");
    let pid = daemon.pid().unwrap();
    daemon.kill().unwrap();
    assert!(!is_alive(pid));
    assert!(daemon.signal(nix::sys::signal::Signal::SIGTERM).is_err(), "nothing to signal");
    daemon.start().unwrap();
    let second = daemon.pid().unwrap();
    // Until setpriv has become the shell, SIGTERM ends setpriv: the same to the kit.
    let status = daemon.terminate(SOON).unwrap();
    assert!(!status.success() && !is_alive(second), "{status}");
    daemon.start().unwrap();
    let third = daemon.pid().unwrap();
    drop(daemon);
    assert!(!is_alive(third), "dropped and gone");
    let missing = Daemon::program(&node.netns, "none", "/no/such/program", &[]);
    assert!(missing.unwrap_err().to_string().contains("/no/such/program"));
}

#[test]
fn a_daemon_outlives_the_thread_that_started_it() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).build().unwrap();
    let netns = cluster.nodes[0].netns.clone();
    let mut daemon =
        std::thread::spawn(move || Daemon::program(&netns, "sleeper", "sleep", &["1000"]).unwrap())
            .join()
            .unwrap();
    throughout("the process runs", Duration::from_millis(300), || {
        if daemon.is_running().unwrap() { Ok(()) } else { Err("ended".into()) }
    });
}

#[test]
fn readiness_is_asked_in_the_node_and_failure_shows_the_log() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).build().unwrap();
    let node = &cluster.nodes[0];
    let mut deaf =
        Daemon::program(&node.netns, "deaf", "sh", &["-c", "echo last words; exec sleep 1000"]).unwrap();
    let error = deaf.wait_ready(Duration::from_millis(300)).unwrap_err().to_string();
    assert!(error.contains("not ready within 300 ms") && error.contains("last words"), "{error}");
    let mut short = Daemon::program(&node.netns, "short", "sh", &["-c", "echo bye; exit 3"]).unwrap();
    let error = short.wait_ready(SOON).unwrap_err().to_string();
    assert!(error.contains("ended before it was ready") && error.contains("bye"), "{error}");
    // Any HTTP 200 is ready: a pod's echo stands in for the daemon's health server.
    let pod = node.start_pod(PodSpec::new("health").ports([(Protocol::Tcp, 20244)])).unwrap();
    deaf.health = SocketAddr::new(pod.ips[0], 20244);
    deaf.wait_ready(SOON).unwrap();
    let answer = cluster.client.http_get(deaf.health, "/who").unwrap();
    assert_eq!(answer.status, 200);
    let seen = ferroute_kit::Answer::parse(&answer.body).unwrap();
    assert_eq!((seen.pod.as_str(), seen.peer.ip()), ("health", cluster.client.ips[0]));
    assert_eq!(cluster.client.http_get(deaf.health, "/healthz").unwrap().body, "ok\n");
}

#[test]
fn snapshots_see_every_kind_of_object_and_nothing_else() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).pods_per_node(1).build().unwrap();
    let node = &cluster.nodes[0];
    let before = KernelSnapshot::take(node).unwrap();
    for section in ["route", "rule", "link", "address"] {
        assert!(!before.sections[section].is_empty(), "{section}:\n{before}");
    }
    // Traffic, and reading tables (which loads them), change nothing.
    assert!(cluster.client.tcp(SocketAddr::new(cluster.pods[0].ips[0], 8080)).pod().is_some());
    node.sh("iptables -t mangle -S").unwrap();
    before.assert_same(&KernelSnapshot::take(node).unwrap(), "after traffic");

    let cases: [(&str, &[&str], &[&str]); 10] = [
        ("ipvs", &["ipvsadm -A -t 192.0.2.1:80 -s rr"], &["ipvsadm -D -t 192.0.2.1:80"]),
        ("ipvs", &["ipvsadm -A -u [2001:db8::1]:80 -s rr"], &["ipvsadm -D -u [2001:db8::1]:80"]),
        ("ipset", &["ipset create probe hash:ip"], &["ipset destroy probe"]),
        ("ipset", &["ipset create probe hash:ip", "ipset add probe 192.0.2.1"], &["ipset destroy probe"]),
        ("iptables", &["iptables -t nat -N PROBE"], &["iptables -t nat -X PROBE"]),
        ("ip6tables", &["ip6tables -A INPUT -j ACCEPT"], &["ip6tables -D INPUT -j ACCEPT"]),
        ("route", &["ip route add local 192.0.2.0/24 dev lo"], &["ip route del local 192.0.2.0/24 dev lo"]),
        ("rule", &["ip -6 rule add prio 99 table 99"], &["ip -6 rule del prio 99"]),
        ("link", &["ip link add probe type dummy"], &["ip link del probe"]),
        ("address", &["ip addr add 2001:db8::1/128 dev lo"], &["ip addr del 2001:db8::1/128 dev lo"]),
    ];
    for (section, change, undo) in cases {
        change.iter().for_each(|line| drop(node.sh(line).unwrap()));
        let difference = before.difference(&KernelSnapshot::take(node).unwrap());
        assert!(difference.iter().any(|line| line.starts_with(section)), "{change:?}: {difference:?}");
        undo.iter().for_each(|line| drop(node.sh(line).unwrap()));
        before.assert_same(&KernelSnapshot::take(node).unwrap(), undo[0]);
    }
}

#[test]
fn a_stranger_notices_every_touch() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).build().unwrap();
    let node = &cluster.nodes[0];
    let stranger = Stranger::plant(node).unwrap();
    stranger.assert_untouched("at once");
    // Others' objects beside them are no touch.
    node.sh("ipvsadm -A -t 10.96.0.1:443 -s rr").unwrap();
    node.sh("iptables -I INPUT -j ACCEPT").unwrap();
    node.sh("ipset create other hash:ip").unwrap();
    stranger.assert_untouched("with neighbours");
    for (touch, undo) in [
        (
            "ipvsadm -e -t 203.0.113.77:4444 -r 203.0.113.78:4444 -m -w 8",
            "ipvsadm -e -t 203.0.113.77:4444 -r 203.0.113.78:4444 -m -w 7",
        ),
        ("ipvsadm -d -f 4242 -r 203.0.113.79", "ipvsadm -a -f 4242 -r 203.0.113.79 -g -w 1"),
        ("ipset add stranger-v4 203.0.113.64/28", "ipset del stranger-v4 203.0.113.64/28"),
        ("ip route del 198.51.100.0/24", "ip route add 198.51.100.0/24 dev stranger0"),
        (
            "ip route del local 2001:db8:77:2::/64 table local dev stranger0",
            "ip route add local 2001:db8:77:2::/64 dev stranger0 table local",
        ),
        (
            "ip addr del 2001:db8:77::77/128 dev stranger0",
            "ip addr add 2001:db8:77::77/128 dev stranger0 nodad",
        ),
        ("ip6tables -t nat -D POSTROUTING -j STRANGER", "ip6tables -t nat -A POSTROUTING -j STRANGER"),
        ("iptables -I STRANGER -j ACCEPT", "iptables -D STRANGER -j ACCEPT"),
    ] {
        node.sh(touch).unwrap();
        assert!(!stranger.difference().unwrap().is_empty(), "unnoticed: {touch}");
        node.sh(undo).unwrap();
        stranger.assert_untouched(undo);
    }
}

fn deployment(replicas: u32, version: &str) -> serde_json::Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}, "annotations": {"version": version}},
                "spec": {"containers": [{"name": "web", "image": "web", "ports": [
                    {"containerPort": 8080}, {"containerPort": 53, "protocol": "UDP"},
                    {"containerPort": 9000, "protocol": "SCTP"},
                ]}]},
            },
        },
    })
}

#[test]
fn pods_of_the_api_server_come_alive_roll_and_go() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(2).build().unwrap();
    let specs: Vec<NodeSpec> = cluster
        .nodes
        .iter()
        .map(|node| {
            let (ips, cidrs) = (node.ips.iter().copied(), node.pod_cidrs.iter().copied());
            NodeSpec::new(&node.name, ips).pod_cidrs(cidrs)
        })
        .collect();
    let listen = SocketAddr::new(cluster.api_ips[0], 8001);
    let server = cluster
        .router
        .run(|| ApiServer::builder().listen(listen).nodes(specs).kubelet(Runs::External).start())
        .unwrap();
    for node in &cluster.nodes {
        assert_eq!(node.http_get(listen, "/version").unwrap().status, 200, "reachable from every node");
    }
    let settings = Settings { serve_after_deletion: Duration::from_millis(500), ..Settings::default() };
    let kubelet = Kubelet::start(&cluster, listen, settings).unwrap();
    let begin = Instant::now();
    server.apply_object(deployment(4, "one")).unwrap();
    server.wait_rolled_out(SOON).unwrap();
    println!("4 pods ready after {} ms", begin.elapsed().as_millis());
    let first = kubelet.running();
    assert_eq!(first.len(), 4);
    for pod in &first {
        let reported = server.get("pods", "default", &pod.name).unwrap();
        assert_eq!(reported["status"]["podIP"], pod.ips[0].to_string());
        assert_eq!(reported["status"]["podIPs"].as_array().unwrap().len(), 2);
        for &ip in &pod.ips {
            for (protocol, port) in [(Protocol::Tcp, 8080), (Protocol::Udp, 53), (Protocol::Sctp, 9000)] {
                let reply = cluster.client.ask(protocol, SocketAddr::new(ip, port), Duration::from_secs(2));
                assert_eq!(reply.pod(), Some(pod.name.as_str()), "{protocol} {ip}: {reply:?}");
            }
        }
    }

    // A deleted pod serves on, Ready and terminating, until its time has come.
    let leaving = first[0].clone();
    let address = SocketAddr::new(leaving.ips[0], 8080);
    let load = Load::start(&cluster.client, Protocol::Tcp, address, 1, Duration::from_millis(5)).unwrap();
    let begin = Instant::now();
    server.delete("pods", "default", &leaving.name).unwrap();
    eventually("the pod is gone", SOON, || match server.get("pods", "default", &leaving.name) {
        None => Ok(()),
        Some(_) => Err("still there".into()),
    });
    let lasted = begin.elapsed();
    assert!(lasted >= Duration::from_millis(500) && lasted < Duration::from_secs(2), "{lasted:?}");
    drop(leaving);
    let tally = load.stop();
    let (at, reply) = tally.first_failure.clone().unwrap_or((Duration::MAX, ferroute_kit::Reply::Timeout));
    assert!(at >= Duration::from_millis(450), "it served until then: {at:?} {reply:?}");

    server.apply_object(deployment(4, "two")).unwrap();
    eventually("all pods are new", Duration::from_secs(20), || {
        server.wait_rolled_out(SOON)?;
        let now = kubelet.running();
        let old = now.iter().filter(|pod| first.iter().any(|old| old.name == pod.name)).count();
        if now.len() == 4 && old == 0 { Ok(()) } else { Err(format!("{} pods, {old} old", now.len())) }
    });
    server.delete("deployments", "default", "web").unwrap();
    eventually("all pods are gone", SOON, || {
        let left = server.list("pods", "default").len() + kubelet.running().len();
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    });
    assert_eq!(kubelet.problems(), Vec::<String>::new());
    let ports = cluster.nodes[0].sh("ip -o link show master kube-bridge").unwrap();
    assert_eq!(ports, "", "no pod's link is left");
    let v6: Vec<IpAddr> = cluster.api_ips.iter().copied().filter(IpAddr::is_ipv6).collect();
    assert_eq!(v6.len(), 1);
}
