//! What a restart must not lose: state of objects that broke while the daemon was away.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::{Cluster, Daemon, Flow, KernelSnapshot, Load, Netns, Protocol, Reply, serial};
use lab::*;
use serde_json::{Value, json};

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn status(lab: &Lab) -> Value {
    let socket = format!("--admin-socket={}", lab.admin_socket(lab.node(1)));
    let text = lab.node(1).exec(PROGRAM, &["status", &socket, "--output", "json"]).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["services"].take()
}

fn answers(from: &Netns, to: SocketAddr, pod: &str) {
    for protocol in Protocol::ALL {
        assert_eq!(ask(from, protocol, to, "still served").pod, pod);
    }
}

#[test]
fn objects_that_broke_while_the_daemon_was_away_keep_what_they_had() {
    let _serial = serial();
    let mut lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(3), &["--ipvs-graceful-period=2s"]);
    let [one, two] = ["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name)));
    let spec = json!({"type": "NodePort", "ports": node_ports(30010), "externalTrafficPolicy": "Local"});
    lab.put_service(&service("web", 10, spec.clone()));
    lab.put_slices("web", std::slice::from_ref(&one));
    lab.put_service(&service("sliced", 11, json!({})));
    lab.put_slices("sliced", std::slice::from_ref(&one));
    lab.put_service(&service("old", 12, json!({})));
    lab.put_slices("old", std::slice::from_ref(&one));
    for number in [10, 11, 12] {
        for vip in vips(number) {
            for protocol in Protocol::ALL {
                wait_destinations(lab.node(1), protocol, at(vip, 80), 1);
            }
        }
    }
    let before = KernelSnapshot::settled(lab.node(1), SOON).unwrap();
    let load =
        Load::start(lab.pod("p1-3").netns(), Protocol::Tcp, at(vips(10)[0], 80), 1, Duration::from_millis(5))
            .unwrap();
    assert!(lab.daemons[0].terminate(SOON).unwrap().success());
    lab.put_service(&service("web", 10, json!({"ports": "eighty", "clusterIPs": {"a": "b"}})));
    for ipv6 in [false, true] {
        let mut garbage = slice("sliced", ipv6, &[]);
        garbage["endpoints"] = json!("none");
        lab.put_slice(&garbage);
    }
    lab.remove_service("old");
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    throughout("nothing is lost", Duration::from_millis(1500), || {
        let difference = before.difference(&KernelSnapshot::take(lab.node(1)).unwrap());
        if difference.is_empty() { Ok(()) } else { Err(difference.join("\n")) }
    });
    for number in [10, 11, 12] {
        for vip in vips(number) {
            answers(lab.pod("p1-3").netns(), at(vip, 80), "p1-1");
        }
    }
    for own in &lab.node(1).ips {
        answers(&lab.cluster.client, at(*own, 30010), "p1-1");
    }
    let said = status(&lab);
    assert_eq!(
        said["heldFor"],
        json!(["Service default/web", "EndpointSlice default/sliced-4", "EndpointSlice default/sliced-6"]),
        "{said}"
    );
    assert_eq!(said["difference"], json!([]), "{said}");
    assert!(lab.metric(1, "ferroute_proxy_held_objects") > 10.0);
    let log = lab.daemons[0].log().join("\n");
    assert!(log.contains("objects cannot be read") && log.contains("Service default/web"), "{log}");
    assert_eq!(lab.metric(1, "ferroute_proxy_drift_repaired_total"), 0.0);
    // The Service is mended, and says something else by now: what it had, and what nobody asks for, goes.
    lab.put_slices("web", std::slice::from_ref(&two));
    lab.put_service(&service("web", 10, json!({})));
    for vip in vips(10) {
        eventually("its new endpoint", SOON, || match lab.pod("p1-3").tcp(at(vip, 80)).pod() {
            Some("p1-2") => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
    for own in lab.node(1).ips.clone() {
        wait_gone(lab.node(1), Protocol::Tcp, at(own, 30010));
    }
    for vip in vips(12) {
        wait_gone(lab.node(1), Protocol::Tcp, at(vip, 80));
    }
    for vip in vips(11) {
        answers(lab.pod("p1-3").netns(), at(vip, 80), "p1-1");
    }
    // The slices are mended one after the other.
    for (ipv6, vip) in [false, true].into_iter().zip(vips(11)) {
        lab.put_slice(&slice("sliced", ipv6, std::slice::from_ref(&two)));
        eventually("its new endpoint", SOON, || match lab.pod("p1-3").tcp(at(vip, 80)).pod() {
            Some("p1-2") => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
    eventually("nothing is kept", SOON, || {
        let said = status(&lab);
        if said["heldFor"] == json!([]) && said["difference"] == json!([]) {
            Ok(())
        } else {
            Err(said.to_string())
        }
    });
    assert_eq!(lab.metric(1, "ferroute_proxy_held_objects"), 0.0);
    let tally = load.stop();
    println!("through all of it: {tally}");
    assert_eq!(tally.failed, 0, "{tally}");
    // Deleted instead of mended.
    lab.daemons[0].kill().unwrap();
    lab.put_service(&service("web", 10, json!({"ports": "eighty"})));
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    answers(lab.pod("p1-3").netns(), at(vips(10)[1], 80), "p1-2");
    lab.remove_service("web");
    for vip in vips(10) {
        for protocol in Protocol::ALL {
            wait_gone(lab.node(1), protocol, at(vip, 80));
        }
        let reply = lab.pod("p1-3").tcp(at(vip, 80));
        assert_eq!(reply, Reply::Refused);
    }
    assert_eq!(lab.metric(1, "ferroute_proxy_pass_failures_total"), 0.0);
}

#[test]
fn a_drain_ends_when_it_would_have_without_a_restart() {
    let _serial = serial();
    let mut lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(3), &["--ipvs-graceful-period=20s"]);
    let both = ["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &both);
    lab.wait_served(10, 2);
    let flows: Vec<Flow> = vips(10)
        .into_iter()
        .flat_map(|vip| (0..4).map(move |_| vip))
        .map(|vip| {
            let from = lab.pod("p1-3").netns();
            Flow::start(from, Protocol::Tcp, at(vip, 80), Duration::from_millis(50)).unwrap()
        })
        .collect();
    let leaving = |lab: &Lab| -> Vec<String> {
        let table = lab.node(1).exec("ipvsadm", &["-Sn"]).unwrap();
        let pod = &lab.pod("p1-2").ips;
        let ends = pod.iter().map(|ip| format!("-r {} ", at(*ip, 8080))).collect::<Vec<_>>();
        let tcp = |line: &&str| line.starts_with("-a -t") && ends.iter().any(|end| line.contains(end));
        table.lines().filter(tcp).map(str::to_owned).collect()
    };
    assert_eq!(leaving(&lab).len(), 2);
    let begin = Instant::now();
    lab.put_slices("web", &both[..1]);
    lab.wait_served(10, 1);
    std::thread::sleep(Duration::from_secs(8));
    let draining = leaving(&lab);
    assert!(draining.len() == 2 && draining.iter().all(|line| line.contains("-w 0")), "{draining:?}");
    let before = KernelSnapshot::take(lab.node(1)).unwrap();
    lab.daemons[0].kill().unwrap();
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "a restart while something drains");
    assert_eq!(lab.metric(1, "ferroute_netlink_messages_total{table=\"ipvs\",purpose=\"write\"}"), 0.0);
    let ended = eventually("the end of the drain", 3 * SOON, || match leaving(&lab).as_slice() {
        [] => Ok(begin.elapsed()),
        list => Err(format!("{list:?}")),
    });
    println!("drained {ended:?} with a restart after 8 s");
    assert!((20..24).contains(&ended.as_secs()), "{ended:?}");
    let (staying, gone): (Vec<_>, Vec<_>) =
        flows.into_iter().map(Flow::stop).partition(|tally| tally.pods.contains_key("p1-1"));
    assert!(!gone.is_empty(), "nobody was connected to the endpoint that left");
    for tally in staying {
        assert_eq!(tally.failed, 0, "{tally}");
    }
    // It comes back as if nothing had been.
    lab.put_slices("web", &both);
    lab.wait_served(10, 2);
    assert_eq!(who(lab.pod("p1-3"), Protocol::Tcp, at(vips(10)[0], 80), 4), ["p1-1", "p1-2"]);
}

#[test]
fn a_manifest_that_broke_while_the_daemon_was_away_keeps_what_it_had() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).pods_per_node(2).pod_ports(POD_PORTS).build().unwrap();
    let node = &cluster.nodes[0];
    let folder = std::env::temp_dir().join(format!("ferroute-{}-restart", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, items: &[Value]| {
        let text = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        std::fs::write(folder.join(name), &text).unwrap();
        text
    };
    let files = |number: u8| {
        let endpoints = [Endpoint::of(&cluster.pods[0])];
        let slices = [false, true].map(|ipv6| slice("web", ipv6, &endpoints));
        [service("web", number, json!({}))].into_iter().chain(slices).collect::<Vec<_>>()
    };
    write("node.yaml", &[node.object()]);
    let good = write("web.yaml", &files(10));
    let manifests = format!("--manifests={}", folder.display());
    let mut daemon = Daemon::ferroute(node, PROGRAM, &[&manifests]).unwrap();
    daemon.wait_ready(SOON).unwrap();
    for vip in vips(10) {
        wait_destinations(node, Protocol::Sctp, at(vip, 80), 1);
    }
    let before = KernelSnapshot::settled(node, SOON).unwrap();
    daemon.kill().unwrap();
    std::fs::write(folder.join("web.yaml"), &good[..good.len() / 2]).unwrap();
    daemon.start().unwrap();
    daemon.wait_ready(SOON).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    before.assert_same(&KernelSnapshot::take(node).unwrap(), "after a start with half a file");
    for vip in vips(10) {
        answers(cluster.pods[1].netns(), at(vip, 80), "p1-1");
    }
    write("web.yaml", &files(11));
    for vip in vips(11) {
        wait_destinations(node, Protocol::Tcp, at(vip, 80), 1);
        answers(cluster.pods[1].netns(), at(vip, 80), "p1-1");
    }
    wait_gone(node, Protocol::Tcp, at(vips(10)[0], 80));
    // Broken once more, and this time deleted.
    daemon.kill().unwrap();
    std::fs::write(folder.join("web.yaml"), "apiVersion: v1\nkind: [[[\n").unwrap();
    daemon.start().unwrap();
    daemon.wait_ready(SOON).unwrap();
    answers(cluster.pods[1].netns(), at(vips(11)[0], 80), "p1-1");
    std::fs::remove_file(folder.join("web.yaml")).unwrap();
    wait_gone(node, Protocol::Tcp, at(vips(11)[0], 80));
    std::fs::remove_dir_all(folder).unwrap();
}

/// Audits of tables are some ten seconds apart here and those of chains minutes, as dear as they are;
/// looks in between notice what another program did.
#[test]
fn drift_is_seen_long_before_the_next_audit() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(2), &[]);
    let all = ["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name)));
    for number in 10..20 {
        lab.put_service(&service(&format!("s{number}"), number, json!({})));
        lab.put_slices(&format!("s{number}"), &all);
    }
    lab.wait_served(19, 2);
    let node = lab.node(1);
    let before = KernelSnapshot::settled(node, SOON).unwrap();
    let audits = || lab.metric(1, "ferroute_proxy_audits_total");
    // What the start made due.
    std::thread::sleep(Duration::from_secs(3));
    let pod = lab.pod("p1-1").ips[0];
    for sabotage in [
        "ipvsadm -D -t 10.96.0.10:80".to_owned(),
        format!("ipvsadm -d -u 10.96.0.11:80 -r {pod}:8080"),
        format!("ipvsadm -e -t 10.96.0.12:80 -r {pod}:8080 -m -w 7"),
        "ipvsadm -E -t 10.96.0.13:80 -s wlc".to_owned(),
        "ipset del kube-router-svip-prt 10.96.0.14,tcp:80".to_owned(),
        "ip route del local 10.96.0.0/16 dev kube-dummy-if table local".to_owned(),
        "iptables -F KUBE-ROUTER-SERVICES".to_owned(),
        "iptables -t nat -F KUBE-ROUTER-MASQUERADE".to_owned(),
    ] {
        node.sh(&sabotage).unwrap();
        let begin = Instant::now();
        eventually(&sabotage, 2 * SOON, || {
            let difference = before.difference(&KernelSnapshot::take(node).unwrap());
            if difference.is_empty() { Ok(()) } else { Err(difference.join("\n")) }
        });
        println!("{sabotage}: put right after {} ms", begin.elapsed().as_millis());
    }
    // A stranger's table is no alarm.
    let count = audits();
    node.sh("ipvsadm -A -t 192.0.2.200:80").unwrap();
    node.sh("ipvsadm -a -t 192.0.2.200:80 -r 192.0.2.201:80 -m").unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(audits() <= count + 1.0, "{} audits for a stranger's virtual server", audits() - count);
}
