//! A kernel that lacks a type of set: policies that need it are told and closed in part, all others
//! are enforced, and it is made up for when the type appears. A binary of its own: it takes modules out
//! of the lab's kernel.
//!
//! Run it through `scripts/lab`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Netns, Pod, PodSpec, Protocol};
use lab::*;
use serde_json::{Value, json};

fn put(lab: &Lab, resource: &str, object: Value) {
    lab.server.insert_unchecked(resource, object).unwrap();
}

fn policy(lab: &Lab, name: &str, app: &str, rule: Value) {
    let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "ingress": [rule]});
    let metadata = json!({"name": name, "namespace": "shop", "uid": format!("uid-{name}")});
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec});
    put(lab, "networkpolicies", object);
}

fn start(lab: &Lab, name: &str) -> Pod {
    let pod = lab.node(1).start_pod(PodSpec::new(name).namespace("shop")).unwrap();
    let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
    put(
        lab,
        "pods",
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "labels": {"app": name}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": ips},
        }),
    );
    pod
}

fn expect(from: &Netns, pod: &Pod, allowed: bool) {
    for ip in &pod.ips {
        let to = SocketAddr::new(*ip, 8080);
        eventually(&format!("{to} from {} allowed: {allowed}", from.name()), SOON, || {
            let reply = from.ask(Protocol::Tcp, to, Duration::from_millis(500));
            if reply.answer().is_some() == allowed { Ok(()) } else { Err(format!("{reply:?}")) }
        });
    }
}

#[test]
fn a_missing_set_type_closes_what_needs_it_and_nothing_else() {
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(1));
    let kind = std::env::var("FERROUTE_LAB").unwrap_or_default();
    // Only a kernel that was booted for this test is taken apart.
    if kind.starts_with("uml") || kind == "qemu" {
        let _ = Command::new("rmmod").arg("ip_set_hash_ipport").output();
        // The kernel must not load it again by itself.
        std::fs::write("/proc/sys/kernel/modprobe", "/nonexistent").unwrap();
    }
    assert!(
        lab.node(1).exec("ipset", &["create", "probe", "hash:ip,port"]).is_err(),
        "this kernel keeps hash:ip,port, or it is not the lab's own ({kind:?}): run it with --kernel uml"
    );
    put(&lab, "namespaces", json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}));
    let (a, b, c) = (start(&lab, "a"), start(&lab, "b"), start(&lab, "c"));
    policy(&lab, "by-name", "a", json!({"ports": [{"port": "web"}]}));
    policy(&lab, "by-pod", "b", json!({"from": [{"podSelector": {"matchLabels": {"app": "c"}}}]}));
    lab.start_daemons(&[
        "--run-firewall=true",
        "--run-service-proxy=false",
        "--run-router=false",
        "--iptables-sync-period=2s",
    ]);
    expect(c.netns(), &b, true);
    expect(a.netns(), &b, false);
    expect(c.netns(), &a, false);
    let text = lab.wait_event("by-name", "NotEnforcedAsWritten");
    assert!(text.contains("hash:ip,port") && text.contains("ip_set_hash_"), "{text}");
    assert!(lab.events("by-pod").is_empty(), "{:?}", lab.events("by-pod"));
    // Changes of others go on.
    policy(&lab, "by-pod", "b", json!({"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}));
    expect(a.netns(), &b, true);
    expect(c.netns(), &b, false);
    assert!(lab.metric(1, "ferroute_netpol_rules_left_out") >= 1.0);
    // The type appears: what was left out is written.
    let drift = lab.metric(1, "ferroute_netpol_drift_repaired_total");
    assert!(Command::new("modprobe").arg("ip_set_hash_ipport").status().unwrap().success());
    expect(c.netns(), &a, true);
    eventually("nothing is left out", SOON, || {
        let left = lab.metric(1, "ferroute_netpol_rules_left_out");
        if left == 0.0 { Ok(()) } else { Err(left.to_string()) }
    });
    assert_eq!(drift, 0.0, "what cannot be written is no drift");
}
