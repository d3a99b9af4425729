//! Wrong input: what the user sees, and that everything else goes on.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::{Cluster, Daemon, Families, KernelSnapshot, Netns, Protocol, serial};
use lab::*;
use serde_json::{Value, json};

/// One cluster for all wrong objects.
fn shared() -> MutexGuard<'static, Lab> {
    static LAB: OnceLock<Mutex<Lab>> = OnceLock::new();
    let lab = LAB.get_or_init(|| {
        let lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(2), &[]);
        lab.put_service(&service("good", 10, json!({})));
        lab.put_slices("good", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
        lab.wait_served(10, 2);
        Mutex::new(lab)
    });
    lab.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The good Service is served, a change of it too, and the daemons are the ones that were started.
fn assert_the_rest_works(lab: &mut Lab) {
    let [one, two] = ["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_slices("good", std::slice::from_ref(&one));
    lab.wait_served(10, 1);
    lab.put_slices("good", &[one, two]);
    lab.wait_served(10, 2);
    for vip in vips(10) {
        for protocol in Protocol::ALL {
            assert_eq!(who(lab.pod("p1-2"), protocol, at(vip, 80), 4), ["p1-1", "p2-1"]);
        }
    }
    for daemon in &mut lab.daemons {
        assert!(daemon.is_running().unwrap());
        daemon.wait_ready(SOON).unwrap();
        let log = daemon.log().join("\n");
        assert!(!log.contains("panicked"), "{log}");
        assert_eq!(log.matches("ferroute starts").count(), 1, "{log}");
    }
}

fn at(ip: std::net::IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// Runs ferroute; its exit status and all it said.
fn run(netns: &Netns, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(PROGRAM);
    command.args(arguments).env("NODE_NAME", "n1");
    let output = netns.run(|| command.output()).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ferroute-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_wrong_place_to_read_from_ends_the_start_before_the_kernel_is_touched() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).families(Families::V4).build().unwrap();
    let node = &cluster.nodes[0];
    let before = KernelSnapshot::take(node).unwrap();
    let folder = folder("places");
    let file = folder.join("file.yaml");
    std::fs::write(&file, "kind: Service\n").unwrap();
    let broken = folder.join("broken");
    std::fs::write(&broken, "clusters: [{{{ token: secret-of-ours").unwrap();
    let hollow = folder.join("hollow");
    std::fs::write(&hollow, "apiVersion: v1\nkind: Config\ncurrent-context: none\n").unwrap();
    let missing = folder.join("missing");
    for (arguments, expected) in [
        (format!("--manifests={}", text(&missing)), &["--manifests", "cannot be read"][..]),
        (format!("--manifests={}", text(&file)), &["--manifests", "is no folder"]),
        (format!("--kubeconfig={}", text(&missing)), &["kubeconfig", "missing"]),
        (format!("--kubeconfig={}", text(&broken)), &["kubeconfig", "broken"]),
        (format!("--kubeconfig={}", text(&hollow)), &["kubeconfig", "hollow"]),
        ("--master=nonsense://".to_owned(), &["master"]),
        ("--bgp-holdtime=1s".to_owned(), &["--bgp-holdtime=1s", "between 3s and"]),
    ] {
        let (status, said) = run(node, &[&arguments, "--admin-socket=/run/ferroute-bad/a.sock"]);
        println!("{arguments}: {status:?}: {said}");
        assert!(matches!(status, Some(1 | 2)), "{arguments}: {status:?}: {said}");
        for word in expected {
            assert!(said.contains(word), "{arguments}: {word:?} is not in {said:?}");
        }
        assert!(!said.contains("secret-of-ours") && !said.contains("panicked"), "{said}");
    }
    for (arguments, expected) in [
        (&["--no-such-flag"][..], "--no-such-flag"),
        (&["--manifests=/", "extra"], "extra"),
        (&["--manifests=/", "--ipvs-sync-period=soon"], "--ipvs-sync-period"),
    ] {
        let (status, said) = run(node, arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{said}");
    }
    before.assert_same(&KernelSnapshot::take(node).unwrap(), "after wrong starts");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn iptables_that_is_not_installed_is_named() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).families(Families::V4).build().unwrap();
    let node = &cluster.nodes[0];
    let folder = folder("no-iptables");
    for rooms in ["--run-firewall=true --run-service-proxy=false", "--run-firewall=false"] {
        // All its programs are links to these two.
        let script = format!(
            "for file in /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi; do \
               mount --bind /dev/null $file || exit 99; done; \
             exec timeout 60 {PROGRAM} --manifests={} --hostname-override=n1 {rooms} \
               --admin-socket=/run/ferroute-bare/a.sock --cni-socket=/run/ferroute-bare/c.sock",
            text(&folder)
        );
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "bash", "-c", &script]);
        let output = node.run(|| command.output()).unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        println!("{rooms}: {:?}: {said}", output.status);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("install the package iptables"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn an_unreachable_api_server_is_told_and_waited_for() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).families(Families::V4).build().unwrap();
    let node = &cluster.nodes[0];
    let flags = ["--master=http://10.10.0.100:8001", "--cache-sync-timeout=2s"];
    let mut daemon = Daemon::ferroute(node, PROGRAM, &flags).unwrap();
    eventually("the log tells", SOON, || {
        let log = daemon.log().join("\n");
        let tells = log.contains("10.10.0.100:8001") && log.contains("--cache-sync-timeout");
        if tells { Ok(()) } else { Err(log) }
    });
    let log = daemon.log();
    println!("{}", log.join("\n"));
    let ready = node.http_get(daemon.health, "/readyz").unwrap();
    println!("{}", ready.body);
    assert_eq!(ready.status, 503, "{}", ready.body);
    assert_eq!(node.http_get(daemon.health, "/livez").unwrap().status, 200);
    assert!(daemon.is_running().unwrap());
    // Told, not shouted: the same trouble is not repeated for every attempt.
    throughout("it stays calm", Duration::from_secs(2), || {
        let warnings = daemon.log().iter().filter(|line| line.contains("WARN")).count();
        if warnings < 20 { Ok(()) } else { Err(format!("{warnings} warnings:\n{}", daemon.log().join("\n"))) }
    });
    assert!(daemon.terminate(SOON).unwrap().success());
}

#[test]
fn a_broken_file_among_manifests_leaves_the_others_served() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(1).pods_per_node(2).pod_ports(POD_PORTS).build().unwrap();
    let node = &cluster.nodes[0];
    let folder = folder("manifests");
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    let endpoints = [Endpoint::of(&cluster.pods[0])];
    let items: Vec<Value> = [node.object(), service("good", 10, json!({}))]
        .into_iter()
        .chain([false, true].map(|ipv6| slice("good", ipv6, &endpoints)))
        .collect();
    write("good.yaml", &json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string());
    write("broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: [[[\n");
    write("strange.yaml", "just a text\n---\n- a\n- list\n---\nkind: 7\n");
    std::fs::write(folder.join("binary.yaml"), [0xff, 0xfe, 0, 1, 2, 3]).unwrap();
    let manifests = format!("--manifests={}", text(&folder));
    let mut daemon = Daemon::ferroute(node, PROGRAM, &[&manifests]).unwrap();
    daemon.wait_ready(SOON).unwrap();
    for vip in vips(10) {
        wait_destinations(node, Protocol::Tcp, at(vip, 80), 1);
        assert_eq!(who(&cluster.pods[1], Protocol::Tcp, at(vip, 80), 2), ["p1-1"]);
    }
    eventually("each broken file is named", SOON, || {
        let log = daemon.log().join("\n");
        let all = ["broken.yaml", "strange.yaml", "binary.yaml"].iter().all(|name| log.contains(name));
        if all { Ok(()) } else { Err(log) }
    });
    println!(
        "{}",
        daemon.log().iter().filter(|l| l.contains(".yaml")).cloned().collect::<Vec<_>>().join("\n")
    );
    // The good file breaks: what it said before is kept, and it is told. Repaired, it counts again.
    let good = std::fs::read_to_string(folder.join("good.yaml")).unwrap();
    write("good.yaml", &good[..good.len() / 2]);
    eventually("the half file is named", SOON, || {
        let log = daemon.log().join("\n");
        if log.contains("good.yaml") { Ok(()) } else { Err(log) }
    });
    throughout("its Service stays", Duration::from_millis(500), || {
        match virtual_server(node, Protocol::Tcp, at(vips(10)[0], 80)) {
            Some((_, list)) if active(&list) == 1 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    write("good.yaml", &good.replace(&vips(10)[0].to_string(), &vips(11)[0].to_string()));
    wait_destinations(node, Protocol::Tcp, at(vips(11)[0], 80), 1);
    wait_gone(node, Protocol::Tcp, at(vips(10)[0], 80));
    assert!(daemon.is_running().unwrap());
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn wrong_services_are_told_on_themselves_and_the_others_served() {
    let _serial = serial();
    let mut lab = shared();
    let long = "x".repeat(10_000);
    let wrong = [
        ("bad-address", json!({"clusterIP": "10.96.0.999", "clusterIPs": ["10.96.0.999"]})),
        ("bad-external", json!({"externalIPs": ["not an address", "300.1.1.1"]})),
        ("bad-port", json!({"ports": [{"name": "a", "port": 70000, "protocol": "TCP"}]})),
        ("bad-protocol", json!({"ports": [{"name": "a", "port": 80, "protocol": "QUIC"}]})),
        ("bad-shape", json!({"ports": "eighty", "clusterIPs": {"a": "b"}})),
        (
            "bad-affinity",
            json!({"sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": -5}}}),
        ),
        (
            "bad-ranges",
            json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["everybody"],
            "status": load_balancer(&["198.18.0.1"])}),
        ),
    ];
    for (number, (name, spec)) in wrong.iter().enumerate() {
        lab.put_service(&service(name, 20 + number as u8, spec.clone()));
        lab.put_slices(name, &[Endpoint::of(lab.pod("p1-1"))]);
    }
    lab.put_service(&service(&long, 40, json!({"annotations": {&long: long}})));
    lab.put_slices(&long, &[Endpoint::of(lab.pod("p1-1"))]);
    eventually("the long name is told, and shortened", SOON, || {
        let log = lab.daemons[0].log();
        let told = log.iter().any(|line| line.contains("InvalidName") && line.contains("10000 characters"));
        if told { Ok(()) } else { Err(log.join("\n")) }
    });
    assert!(lab.daemons[0].log().iter().all(|line| line.len() < 2000), "no line as long as the name");
    for (name, _) in &wrong {
        let told = eventually(&format!("an event about {name}"), SOON, || {
            let events = lab.events(name);
            if events.is_empty() { Err("no event".to_owned()) } else { Ok(events) }
        });
        println!("{name}: {told:?}");
        let logged = lab.daemons[0].log().iter().any(|line| line.contains(&format!("default/{name}")));
        assert!(logged, "{name} is not in the log");
    }
    assert_the_rest_works(&mut lab);
    for (name, _) in &wrong {
        lab.remove_service(name);
    }
    lab.remove_service(&long);
    assert_the_rest_works(&mut lab);
}

#[test]
fn the_same_port_twice_is_served_once_and_the_second_service_is_told() {
    let _serial = serial();
    let mut lab = shared();
    lab.put_service(&service(
        "twice",
        50,
        json!({"ports": [
            {"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"},
            {"name": "other", "port": 80, "targetPort": 9090, "protocol": "TCP"},
        ]}),
    ));
    lab.put_slices("twice", &[Endpoint::of(lab.pod("p1-1"))]);
    lab.wait_served(50, 1);
    let told = lab.wait_event("twice", "DuplicatePort");
    assert!(told.contains("spec.ports[1]") && told.contains("the first one is served"), "{told}");
    // Another, younger Service claims the address of the first.
    let mut rival = service("rival", 50, json!({}));
    rival["metadata"]["creationTimestamp"] = json!("2026-06-01T00:00:00Z");
    lab.put_service(&rival);
    lab.put_slices("rival", &[Endpoint::of(lab.pod("p2-1"))]);
    let told = lab.wait_event("rival", "AddressConflict");
    assert!(told.contains("default/twice"), "{told}");
    assert_eq!(who(lab.pod("p1-2"), Protocol::Tcp, at(vips(50)[0], 80), 4), ["p1-1"]);
    // The older one goes: the other takes its place.
    lab.remove_service("twice");
    eventually("the rival serves", SOON, || {
        let tally = lab.pod("p1-2").spread(Protocol::Tcp, at(vips(50)[0], 80), 2);
        if tally.failed == 0 && tally.pods.contains_key("p2-1") { Ok(()) } else { Err(tally.to_string()) }
    });
    lab.remove_service("rival");
    assert_the_rest_works(&mut lab);
}

#[test]
fn slices_that_make_no_sense_do_no_harm() {
    let _serial = serial();
    let mut lab = shared();
    let put = |object: &Value| lab.put_slice(object);
    // For a Service that is not there, for none, and with addresses that are none or of another family.
    put(&slice("nobody", false, &[Endpoint::of(lab.pod("p1-1"))]));
    let mut orphan = slice("orphan", false, &[Endpoint::of(lab.pod("p1-1"))]);
    orphan["metadata"]["labels"] = json!({});
    put(&orphan);
    lab.put_service(&service("mixed", 60, json!({})));
    let mut mixed = slice("mixed", false, &[Endpoint::of(lab.pod("p1-1"))]);
    mixed["endpoints"].as_array_mut().unwrap().extend([
        json!({"addresses": ["fd00:244:1::77"], "conditions": {"ready": true}}),
        json!({"addresses": ["10.244.1.999"], "conditions": {"ready": true}}),
        json!({"addresses": ["127.0.0.1"], "conditions": {"ready": true}}),
        json!({"addresses": []}),
    ]);
    put(&mixed);
    let mut names = slice("mixed", true, &[]);
    names["addressType"] = json!("FQDN");
    names["endpoints"] = json!([{"addresses": ["example.org"]}]);
    put(&names);
    wait_destinations(lab.node(2), Protocol::Tcp, at(vips(60)[0], 80), 1);
    assert_eq!(who(lab.pod("p2-1"), Protocol::Tcp, at(vips(60)[0], 80), 3), ["p1-1"]);
    assert_the_rest_works(&mut lab);
    // Ports without number or name.
    let mut bare = slice("mixed", false, &[Endpoint::of(lab.pod("p1-1"))]);
    bare["ports"] =
        json!([{}, {"name": null, "port": null}, {"name": "tcp", "port": 8080, "protocol": "TCP"}]);
    lab.put_slice(&bare);
    wait_destinations(lab.node(1), Protocol::Udp, at(vips(60)[0], 80), 0);
    wait_destinations(lab.node(1), Protocol::Tcp, at(vips(60)[0], 80), 1);
    let mut shapeless = slice("mixed", true, &[]);
    shapeless["endpoints"] = json!("none");
    shapeless["ports"] = json!(7);
    lab.put_slice(&shapeless);
    assert_the_rest_works(&mut lab);
    // Not even JSON, in the middle of every watch.
    lab.server.faults().garbage_line(None);
    assert_the_rest_works(&mut lab);
    for name in ["nobody-4", "orphan-4"] {
        lab.server.remove_unchecked("endpointslices", "default", name).unwrap();
    }
    lab.remove_service("mixed");
    assert_the_rest_works(&mut lab);
}

#[test]
fn a_scheduler_that_does_not_exist_is_told_and_rr_is_used() {
    let _serial = serial();
    let mut lab = shared();
    lab.put_service(&service(
        "odd",
        70,
        json!({"annotations": {"kube-router.io/service.scheduler": "no-such-scheduler",
            "kube-router.io/service.schedflags": "flag-9,,x"}}),
    ));
    lab.put_slices("odd", &[Endpoint::of(lab.pod("p1-1"))]);
    lab.wait_served(70, 1);
    let told = lab.wait_event("odd", "UnknownScheduler");
    assert!(told.contains("no-such-scheduler") && told.contains("rr"), "{told}");
    assert_the_rest_works(&mut lab);
    lab.remove_service("odd");
}

#[test]
fn an_address_of_another_node_is_no_vip() {
    let _serial = serial();
    let flags = ["--strict-external-ip-validation=false", "--ipvs-graceful-period=1s"];
    let lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(1), &flags);
    let node = lab.node(1);
    let mut external = lab.node(2).ips.clone();
    let later: [std::net::IpAddr; 2] = ["203.0.113.9".parse().unwrap(), "2001:db8:e::9".parse().unwrap()];
    external.extend(later);
    lab.put_service(&service("web", 10, json!({"externalIPs": external})));
    lab.put_slices("web", &[Endpoint::of(lab.pod("p2-1"))]);
    for vip in later {
        wait_destinations(node, Protocol::Tcp, at(vip, 80), 1);
    }
    let told = lab.wait_event("web", "NodeAddress");
    assert!(told.contains("is an address of node n2"), "{told}");
    for own in &lab.node(2).ips {
        wait_destinations(lab.node(2), Protocol::Tcp, at(*own, 80), 1);
        assert!(!is_known(node, Protocol::Tcp, at(*own, 80)), "{own} is not served on n1");
        assert_eq!(virtual_server(node, Protocol::Tcp, at(*own, 80)), None);
        // Who speaks to that machine reaches it, also at a port of the Service.
        assert_eq!(ask(&node.netns, Protocol::Tcp, at(*own, 80), "n2 serves its own address").pod, "p2-1");
    }
    let bound =
        || ["ip -4", "ip -6"].map(|ip| node.sh(&format!("{ip} route show table local")).unwrap()).concat();
    assert!(
        later.iter().all(|vip| bound().contains(&format!("local {vip} dev kube-dummy-if"))),
        "{}",
        bound()
    );
    // A machine with such an address joins: unbound, and no longer served.
    let object = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n9", "uid": "uid-n9"},
        "status": {"addresses": later.map(|ip| json!({"type": "InternalIP", "address": ip}))},
    });
    lab.server.insert_unchecked("nodes", object).unwrap();
    for vip in later {
        wait_gone(node, Protocol::Tcp, at(vip, 80));
        eventually("unbound", SOON, || {
            let table = bound();
            if table.contains(&vip.to_string()) { Err(table) } else { Ok(()) }
        });
    }
    let log = lab.daemons[0].log().join("\n");
    assert!(log.contains("203.0.113.9 of Service default/web is an address of node n9"), "{log}");
    assert!(!log.contains("node facts changed ipv4=None"), "{log}");
    lab.server.remove_unchecked("nodes", "", "n9").unwrap();
    for vip in later {
        wait_destinations(node, Protocol::Tcp, at(vip, 80), 1);
        assert!(bound().contains(&format!("local {vip} dev kube-dummy-if")), "{}", bound());
        assert_eq!(ask(&node.netns, Protocol::Tcp, at(vip, 80), "served again").pod, "p2-1");
    }
    assert_eq!(lab.metric(1, "ferroute_proxy_drift_repaired_total"), 0.0);
}
