//! The way to the API server: a Pod's service account over TLS, a path that swallows packets, and
//! ServiceCIDR objects that come and go.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use ferroute_apiserver::{Authority, Fault, Tls};
use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::{Cluster, Daemon, KernelSnapshot, Load, Protocol, serial};
use lab::*;
use serde_json::{Value, json};

/// Where Kubernetes mounts a service account. The lab's files are thrown away at its end.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A silent path is noticed by then: the kernel asks every 10 s and gives up after 30 s of silence.
const NOTICED: Duration = Duration::from_secs(45);
/// The longest pause between two attempts (30 s) and one attempt that fails (5 s), and some.
const RETRIED: Duration = Duration::from_secs(45);

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn wait_log(daemon: &Daemon, words: &[&str], limit: Duration) -> String {
    eventually(&format!("a line of the log with {words:?}"), limit, || {
        let log = daemon.log();
        let found = log.iter().find(|line| words.iter().all(|word| line.contains(word)));
        found.cloned().ok_or_else(|| log.join("\n"))
    })
}

#[test]
fn a_service_account_is_used_over_tls_through_rotation_and_trouble() {
    let _serial = serial();
    std::fs::create_dir_all(ACCOUNT).unwrap();
    let account = Path::new(ACCOUNT);
    let write = |name: &str, text: &str| std::fs::write(account.join(name), text).unwrap();
    let (authority, stranger) = (Authority::new("kubernetes").unwrap(), Authority::new("stranger").unwrap());
    let theirs = std::env::temp_dir().join(format!("ferroute-token-{}", std::process::id()));
    std::fs::write(&theirs, "token-one-7f3a").unwrap();
    write("token", "token-one-7f3a");
    write("namespace", "kube-system");
    write("ca.crt", &authority.pem());
    let names: Vec<IpAddr> = ["10.10.0.100", "fd00:10:10::64"].map(|ip| ip.parse().unwrap()).to_vec();
    let tls = Tls { identity: authority.server(&names).unwrap(), client_authority: None };
    let mut lab = Lab::without_daemons_by(Cluster::builder().nodes(1).pods_per_node(2), |server| {
        server.tls(tls).token_file(&theirs)
    });
    let node = lab.node(1).clone();
    let socket = format!("--admin-socket={}", lab.admin_socket(&node));
    let address = lab.server.address();
    let (host, port) = (
        format!("KUBERNETES_SERVICE_HOST={}", address.ip()),
        format!("KUBERNETES_SERVICE_PORT={}", address.port()),
    );
    let arguments = [
        &*host,
        &port,
        PROGRAM,
        "--hostname-override=n1",
        "--metrics-port=9090",
        "--run-firewall=false",
        &socket,
    ];
    let mut daemon = Daemon::program(&node, "n1", "env", &arguments).unwrap();
    daemon.wait_ready(3 * SOON).unwrap();
    let url = lab.server.url();
    assert!(url.starts_with("https://"));
    wait_log(&daemon, &["API server", &url], SOON);
    let pods: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &pods[..1]);
    lab.wait_served(10, 1);
    let load = Load::start(lab.pod("p1-2"), Protocol::Tcp, at(vips(10)[0], 80), 1, Duration::from_millis(10))
        .unwrap();

    // The kubelet replaces the token; the server takes the new one only.
    write("token", "token-two-91bc");
    std::fs::write(&theirs, "token-two-91bc").unwrap();
    lab.server.faults().drop_watches(true);
    lab.put_service(&service("two", 11, json!({})));
    lab.put_slices("two", &pods[..1]);
    lab.wait_served(11, 1);

    // The token ends: told with the cure, and everything stays as it is.
    let before = KernelSnapshot::take(&node).unwrap();
    std::fs::write(&theirs, "token-three-c4d2").unwrap();
    lab.server.faults().drop_watches(true);
    let line = wait_log(&daemon, &["WARN", "Unauthorized (401)", "token has ended"], SOON);
    println!("{line}");
    assert!(!daemon.log().iter().any(|line| line.contains("token-two-91bc")), "the token is in the log");
    before.assert_same(&KernelSnapshot::take(&node).unwrap(), "without a valid token");
    assert_eq!(node.http_get(daemon.health, "/livez").unwrap().status, 200);
    write("token", "token-three-c4d2");
    lab.put_service(&service("three", 12, json!({})));
    lab.put_slices("three", &pods[..1]);
    eventually("served again", RETRIED, || {
        virtual_server(&node, Protocol::Tcp, at(vips(12)[0], 80))
            .map(drop)
            .ok_or_else(|| "not yet".to_owned())
    });

    // Another authority: not believed, told, nothing changed; put right, it goes on by itself.
    write("ca.crt", &stranger.pem());
    daemon.kill().unwrap();
    let before = KernelSnapshot::take(&node).unwrap();
    daemon.start().unwrap();
    let line = wait_log(&daemon, &["WARN", "UnknownIssuer", "ca.crt"], SOON);
    println!("{line}");
    assert_eq!(node.http_get(daemon.health, "/readyz").unwrap().status, 503);
    before.assert_same(&KernelSnapshot::take(&node).unwrap(), "while nobody is trusted");
    write("ca.crt", &authority.pem());
    let begin = Instant::now();
    // The file is read again when it is a minute old.
    daemon.wait_ready(Duration::from_secs(60) + RETRIED).unwrap();
    println!("ready {:?} after the authority was put right", begin.elapsed());
    let tally = load.stop();
    println!("through all of it: {tally}");
    assert_eq!(tally.failed, 0, "{tally}");
    lab.daemons.push(daemon);
    let _ = std::fs::remove_file(theirs);
    std::fs::remove_dir_all(ACCOUNT).unwrap();
}

#[test]
fn a_path_that_swallows_packets_is_noticed_and_no_change_is_missed() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(2), &[]);
    let all: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    for (name, number) in [("web", 10), ("gone", 11)] {
        lab.put_service(&service(name, number, json!({})));
        lab.put_slices(name, &all[..2]);
        lab.wait_served(number, 2);
    }
    let errors = |node: usize| lab.metric(node, "ferroute_watch_errors_total{kind=\"Service\"}");
    let before = errors(1);
    let load =
        Load::start(&lab.node(1).netns, Protocol::Tcp, at(vips(10)[0], 80), 1, Duration::from_millis(20))
            .unwrap();
    let rules = |verb: &str| {
        let ip = lab.node(1).ips[0].to_string();
        for (chain, side) in [("INPUT", "-s"), ("OUTPUT", "-d")] {
            lab.cluster.router.exec("iptables", &["-w", verb, chain, side, &ip, "-j", "DROP"]).unwrap();
        }
    };
    rules("-I");
    let silent = Instant::now();
    // All that happens meanwhile, and the server forgets how it came about.
    lab.remove_service("gone");
    lab.put_slices("web", &all[..3]);
    lab.put_service(&service("new", 12, json!({})));
    lab.put_slices("new", &all[2..3]);
    lab.server.inflict(Fault::Compact { resource: None }).unwrap();
    // The other node's way is free.
    wait_gone(lab.node(2), Protocol::Tcp, at(vips(11)[0], 80));
    wait_destinations(lab.node(2), Protocol::Tcp, at(vips(12)[0], 80), 1);
    eventually("the silence is noticed", NOTICED, || {
        let (now, page) = (errors(1), lab.metric(1, "ferroute_watch_connected{kind=\"Service\"}"));
        if now > before && page == 0.0 { Ok(()) } else { Err(format!("{now} errors, connected {page}")) }
    });
    let noticed = silent.elapsed();
    println!("noticed after {noticed:?}");
    assert!(noticed > Duration::from_secs(5), "a busy moment is no dead path");
    wait_destinations(lab.node(1), Protocol::Tcp, at(vips(11)[0], 80), 2);
    rules("-D");
    let free = Instant::now();
    eventually("all changes are in", RETRIED, || {
        let seen = |number: u8| {
            virtual_server(lab.node(1), Protocol::Tcp, at(vips(number)[0], 80)).map(|(_, l)| active(&l))
        };
        let seen = (seen(10), seen(11), seen(12));
        if seen == (Some(3), None, Some(1)) { Ok(()) } else { Err(format!("{seen:?}")) }
    });
    println!("caught up {:?} after the path was free", free.elapsed());
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{tally}");
}

/// Routes of a node to `kube-dummy-if`, one family.
fn routes(lab: &Lab, ipv6: bool) -> Vec<String> {
    let family = if ipv6 { "-6" } else { "-4" };
    let table = lab
        .node(1)
        .exec("ip", &[family, "route", "show", "table", "local", "proto", "70", "dev", "kube-dummy-if"])
        .unwrap();
    let target = |line: &str| line.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let mut list: Vec<String> = table.lines().map(target).collect();
    list.sort();
    list
}

#[test]
fn a_service_range_that_comes_and_goes_costs_no_request() {
    let _serial = serial();
    let ranges = ["10.96.0.0/16", "fd00:96::/112"];
    // The server names no range, and none is given by flag: each VIP has a route.
    let lab = Lab::without_daemons_by(Cluster::builder().nodes(1).pods_per_node(2), |server| {
        server.service_cidrs([])
    });
    let mut lab = lab;
    lab.start_daemons(&[]);
    // Not the pod that asks: it would meet itself.
    let pods: Vec<Endpoint> = lab.cluster.pods.iter().skip(1).map(Endpoint::of).collect();
    for number in [10, 11] {
        lab.put_service(&service(&format!("s{number}"), number, json!({})));
        lab.put_slices(&format!("s{number}"), &pods);
        lab.wait_served(number, 1);
    }
    for range in ranges {
        lab.cluster.client.route_via(&[lab.node(1)], range.parse().unwrap()).unwrap();
    }
    let single = |ipv6: bool| [10, 11].map(|number| vips(number)[usize::from(ipv6)].to_string()).to_vec();
    for ipv6 in [false, true] {
        assert_eq!(routes(&lab, ipv6), single(ipv6));
    }
    let loads: Vec<Load> = vips(10)
        .into_iter()
        .flat_map(|vip| {
            [&*lab.cluster.client, lab.pod("p1-1").netns(), &lab.node(1).netns].map(|from| {
                Load::start(from, Protocol::Tcp, at(vip, 80), 1, Duration::from_millis(2)).unwrap()
            })
        })
        .collect();
    let object = |cidrs: Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "late"},
            "spec": {"cidrs": cidrs}, "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        })
    };
    for round in 1..=3 {
        lab.server.insert_unchecked("servicecidrs.networking.k8s.io", object(json!(ranges))).unwrap();
        for ipv6 in [false, true] {
            let range = vec![ranges[usize::from(ipv6)].to_owned()];
            eventually("the range alone", SOON, || {
                let now = routes(&lab, ipv6);
                if now == range { Ok(()) } else { Err(format!("{now:?}")) }
            });
        }
        // A VIP that nobody has is refused inside the range.
        assert_refused(&lab.cluster.client, Protocol::Tcp, at(vips(99)[0], 80), "no such Service");
        std::thread::sleep(Duration::from_millis(300));
        lab.server.remove_unchecked("servicecidrs.networking.k8s.io", "", "late").unwrap();
        for ipv6 in [false, true] {
            eventually("each VIP alone", SOON, || {
                let now = routes(&lab, ipv6);
                if now == single(ipv6) { Ok(()) } else { Err(format!("{now:?}")) }
            });
        }
        println!("round {round} done");
    }
    throughout("it stays so", Duration::from_millis(300), || {
        let now = routes(&lab, false);
        if now == single(false) { Ok(()) } else { Err(format!("{now:?}")) }
    });
    for load in loads {
        let tally = load.stop();
        println!("{tally}");
        assert!(tally.failed == 0 && tally.ok > 50, "{tally}");
    }
}
