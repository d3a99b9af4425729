//! What a kernel with IPVS, but without the match that rules know its packets by, makes of a node. A
//! binary of its own: it takes a module out of the lab's kernel and keeps others from being loaded.
//!
//! Run it through `scripts/lab`; it refuses a kernel that is not the lab's own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Protocol};
use lab::*;
use serde_json::json;

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn sh(line: &str) {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn without_the_ipvs_match_the_node_serves_what_it_can_and_says_what_is_missing() {
    let kind = std::env::var("FERROUTE_LAB").unwrap_or_default();
    assert!(
        kind.starts_with("uml") || kind == "qemu",
        "this test takes a module out of the kernel, so it needs the lab's own ({kind:?}): run it with --kernel uml"
    );
    let mut lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(2), &[]);
    lab.put_service(&service("web", 10, json!({"type": "NodePort", "ports": node_ports(30010)})));
    lab.put_slices("web", &["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name))));
    lab.wait_served(10, 2);
    // All that is needed is loaded now; the match goes, and nothing can be loaded.
    for number in [1, 2] {
        assert!(lab.daemons[number - 1].terminate(SOON).unwrap().success());
        lab.node(number).exec(PROGRAM, &["--cleanup-config"]).unwrap();
    }
    sh("rmmod xt_ipvs");
    sh("echo /bin/false > /proc/sys/kernel/modprobe && mount --bind /bin/false $(command -v modprobe)");
    for daemon in &mut lab.daemons {
        daemon.start().unwrap();
    }
    let readyz = |lab: &Lab| {
        let answer = lab.node(1).http_get(lab.daemons[0].health, "/readyz");
        answer.map_or_else(|error| (0, error.to_string()), |answer| (answer.status, answer.body))
    };
    // Programs that look for the match in vain take their time.
    eventually("the probe names it", 6 * SOON, || match readyz(&lab) {
        (503, text) if text.contains("modprobe xt_ipvs") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    lab.wait_served(10, 2);
    let log = lab.daemons[0].log();
    let told =
        log.iter().find(|line| line.contains("iptables match ipvs missing")).expect("the log names it");
    assert!(told.contains("CONFIG_NETFILTER_XT_MATCH_IPVS"), "{told}");
    let socket = format!("--admin-socket={}", lab.admin_socket(lab.node(1)));
    // What a pass found is told at its end, which the same programs hold up.
    eventually("the status names it, and the chain that lacks it", 6 * SOON, || {
        let status = lab.node(1).exec(PROGRAM, &["status", &socket]).unwrap();
        let told = status.contains("modprobe xt_ipvs") && status.contains("KUBE-ROUTER-MASQUERADE");
        if told { Ok(()) } else { Err(status) }
    });
    // Pods and programs of the node reach every endpoint, and a change does not make it ready.
    for vip in vips(10) {
        for protocol in Protocol::ALL {
            assert_eq!(who(lab.pod("p1-2"), protocol, at(vip, 80), 4), ["p1-1", "p2-1"]);
            assert_eq!(who(&lab.node(1).netns, protocol, at(vip, 80), 4), ["p1-1", "p2-1"]);
        }
    }
    lab.put_slices("web", &[Endpoint::of(lab.pod("p1-1"))]);
    lab.wait_served(10, 1);
    assert_eq!(ask(&lab.cluster.client, Protocol::Tcp, at(lab.node(1).ips[0], 30010), "local").pod, "p1-1");
    assert_eq!(readyz(&lab).0, 503);
    assert!(lab.daemons[0].is_running().unwrap());
    // The cure works without a restart.
    sh("umount $(command -v modprobe) && echo /sbin/modprobe > /proc/sys/kernel/modprobe");
    sh("modprobe xt_ipvs");
    lab.put_slices("web", &[Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(10, 1);
    for daemon in &mut lab.daemons {
        daemon.wait_ready(5 * SOON).unwrap();
    }
    for own in &lab.node(1).ips {
        assert_eq!(ask(&lab.cluster.client, Protocol::Tcp, at(*own, 30010), "elsewhere").pod, "p2-1");
    }
    let status = lab.node(1).exec(PROGRAM, &["status", &socket]).unwrap();
    assert!(status.contains("kernel and desired state agree"), "{status}");
}
