//! What happens to traffic and to the kernel while things change: endpoints come and go, the daemon
//! dies, the API server is away, others meddle with the kernel.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ferroute_apiserver::Kubelet as Runs;
use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::kubelet::Settings;
use ferroute_kit::{
    Cluster, Families, Flow, KernelSnapshot, Kubelet, Load, Protocol, Reply, Stranger, serial,
};
use lab::*;
use serde_json::{Value, json};

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// A Service with one TCP port, 80 to 8080, and one address.
fn tcp_only(name: &str, number: u8) -> Value {
    let spec = json!({
        "clusterIPs": [vips(number)[0]], "ipFamilies": ["IPv4"],
        "ports": [{"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
    });
    service(name, number, spec)
}

/// Messages that changed a table of node 1's kernel so far.
fn written(lab: &Lab, table: &str) -> u64 {
    lab.metric(1, &format!("ferroute_netlink_messages_total{{table=\"{table}\",purpose=\"write\"}}")) as u64
}

/// The same for all tables.
fn all_written(lab: &Lab) -> [u64; 4] {
    ["ipvs", "ipset", "route", "conntrack"].map(|table| written(lab, table))
}

fn difference(before: [u64; 4], after: [u64; 4]) -> [u64; 4] {
    [0, 1, 2, 3].map(|i| after[i] - before[i])
}

#[test]
fn one_change_costs_its_own_messages() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(5).families(Families::V4), &[]);
    let all: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    for number in 10..60 {
        lab.put_service(&tcp_only(&format!("s{number}"), number));
        lab.put_slices(&format!("s{number}"), &all[..4]);
    }
    lab.wait_served(59, 4);
    lab.wait_served(10, 4);
    let node = lab.node(1);
    let vip = at(vips(33)[0], 80);
    let step = |what: &str, expected: [u64; 4], change: &dyn Fn(), wait: &dyn Fn()| {
        let before = all_written(&lab);
        change();
        wait();
        // The counters are told at the end of the pass, just after the kernel's.
        eventually(what, SOON, || {
            let now = difference(before, all_written(&lab));
            if now == expected { Ok(()) } else { Err(format!("{now:?} instead of {expected:?}")) }
        });
        throughout(what, Duration::from_millis(100), || {
            let now = difference(before, all_written(&lab));
            if now == expected { Ok(()) } else { Err(format!("{now:?} instead of {expected:?}")) }
        });
    };
    step("an endpoint more is one message", [1, 0, 0, 0], &|| lab.put_slices("s33", &all), &|| {
        wait_destinations(node, Protocol::Tcp, vip, 5)
    });
    // Nobody is connected, so the drain is over at its first look: weight 0, then deleted.
    step("an endpoint less is two messages", [2, 0, 0, 0], &|| lab.put_slices("s33", &all[1..]), &|| {
        wait_destinations(node, Protocol::Tcp, vip, 4)
    });
    step("the same slice again is none", [0, 0, 0, 0], &|| lab.put_slices("s33", &all[1..]), &|| {});
    // Its slices are known before it comes: a Service that nobody serves yet costs messages of its own.
    let slices = || lab.metric(1, "ferroute_watch_events_total{kind=\"EndpointSlice\"}");
    let before = slices();
    lab.put_slices("s60", &all[..4]);
    eventually("the slices of both families", SOON, || {
        if slices() >= before + 2.0 { Ok(()) } else { Err(format!("{before} {}", slices())) }
    });
    step(
        "a Service more: virtual server and destinations, its address, and its port",
        [5, 2, 0, 0],
        &|| lab.put_service(&tcp_only("s60", 60)),
        &|| lab.wait_served(60, 4),
    );
    step(
        "a Service less: one virtual server, its address, and its port",
        [1, 2, 0, 0],
        // Its slices stay: their watch may be ahead, and endpoints that go first cost messages of their own.
        &|| lab.server.remove_unchecked("services", "default", "s60").map(drop).unwrap(),
        &|| wait_gone(node, Protocol::Tcp, at(vips(60)[0], 80)),
    );
    println!("drift: {}", lab.metric(1, "ferroute_proxy_drift_repaired_total"));
    assert_eq!(lab.metric(1, "ferroute_proxy_drift_repaired_total"), 0.0, "audits found nothing to repair");
    assert_eq!(lab.metric(1, "ferroute_proxy_pass_failures_total"), 0.0);
}

#[test]
fn programming_is_timed_from_what_the_slice_says() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(3).families(Families::V4), &[]);
    let all: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    lab.put_service(&tcp_only("web", 10));
    lab.put_slice(&slice("web", false, &all[..1]));
    wait_destinations(lab.node(1), Protocol::Tcp, at(vips(10)[0], 80), 1);
    std::thread::sleep(Duration::from_secs(3));
    let timed = || {
        ["kubeproxy_network_programming_duration_seconds", "ferroute_proxy_change_duration_seconds"]
            .map(|name| [lab.metric(1, &format!("{name}_count")), lab.metric(1, &format!("{name}_sum"))])
    };
    let taken = |trigger: &str, endpoints: usize| {
        let before = timed();
        let time = lab.node(1).exec("date", &["-u", "-d", trigger, "+%Y-%m-%dT%H:%M:%S.%NZ"]).unwrap();
        let mut changed = slice("web", false, &all[..endpoints]);
        changed["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": time.trim()});
        lab.put_slice(&changed);
        wait_destinations(lab.node(1), Protocol::Tcp, at(vips(10)[0], 80), endpoints);
        let after = eventually("both are counted", SOON, || {
            let now = timed();
            if now[0][0] == before[0][0] + 1.0 { Ok(now) } else { Err(format!("{now:?}")) }
        });
        println!("{trigger}: {:?}", [0, 1].map(|which: usize| after[which][1] - before[which][1]));
        assert_eq!(after[1][0], before[1][0] + 1.0);
        assert!(after[1][1] - before[1][1] < 1.0, "from its decoding: {before:?} {after:?}");
        after[0][1] - before[0][1]
    };
    let told = taken("-2 seconds", 2);
    assert!((2.0..4.0).contains(&told), "{told}");
    // Before the process began, and of a clock that is ahead: from the decoding.
    assert!(taken("-1 day", 3) < 1.0);
    assert!(taken("+1 day", 2) < 1.0);
}

fn deployment(version: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "replicas": 4,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}, "annotations": {"version": version}},
                "spec": {"containers": [{"name": "web", "image": "web", "ports": [{"containerPort": 8080}]}]},
            },
        },
    })
}

#[test]
fn a_rolling_update_under_load_loses_no_request() {
    let _serial = serial();
    let mut lab =
        Lab::without_daemons_by(Cluster::builder().nodes(2).pods_per_node(1), |b| b.kubelet(Runs::External));
    let settings = Settings { serve_after_deletion: Duration::from_secs(3), ..Settings::default() };
    let kubelet = Kubelet::start(&lab.cluster, lab.server.address(), settings).unwrap();
    lab.start_daemons(&[]);
    lab.server.apply_object(deployment("one")).unwrap();
    let ports = json!([{"port": 80, "targetPort": 8080, "protocol": "TCP"}]);
    let spec = json!({"selector": {"app": "web"}, "ports": ports, "ipFamilyPolicy": "RequireDualStack"});
    lab.server.apply_object(service("web", 10, spec)).unwrap();
    lab.server.wait_rolled_out(SOON).unwrap();
    lab.wait_served(10, 4);
    for network in ["10.96.0.0/16", "fd00:96::/112"] {
        lab.cluster.client.route_via(&[lab.node(1)], network.parse().unwrap()).unwrap();
    }
    let pause = Duration::from_millis(5);
    let loads = vips(10).map(|vip| {
        [&*lab.cluster.client, lab.pod("p2-1").netns()]
            .map(|from| Load::start(from, Protocol::Tcp, at(vip, 80), 1, pause).unwrap())
    });
    let first: Vec<String> = kubelet.running().into_iter().map(|pod| pod.name).collect();
    for version in ["two", "three"] {
        lab.server.apply_object(deployment(version)).unwrap();
        lab.server.wait_rolled_out(2 * SOON).unwrap();
        // Until the pods that go have ended, which is when a late table would hurt.
        std::thread::sleep(Duration::from_millis(3500));
    }
    let last: Vec<String> = kubelet.running().into_iter().map(|pod| pod.name).collect();
    assert!(first.iter().all(|name| !last.contains(name)) || last.len() > 4, "{first:?} {last:?}");
    for load in loads.into_iter().flatten() {
        let tally = load.stop();
        println!("rolled twice: {tally}");
        assert_eq!(tally.failed, 0, "{tally}");
        assert!(tally.ok > 50 && tally.pods.len() >= 8, "{tally}");
    }
    assert_eq!(kubelet.problems(), Vec::<String>::new());
}

/// Lines of `destination -m -w WEIGHT` of a virtual server on node 1.
fn destinations(lab: &Lab, protocol: Protocol, vip: SocketAddr) -> Vec<String> {
    virtual_server(lab.node(1), protocol, vip).map(|(_, list)| list).unwrap_or_default()
}

fn weight(lab: &Lab, protocol: Protocol, vip: SocketAddr, pod: IpAddr) -> Option<u32> {
    let head = format!("{} ", at(pod, 8080));
    let list = destinations(lab, protocol, vip);
    let line = list.iter().find_map(|line| line.strip_prefix(&head))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_removed_endpoint_drains_and_a_returning_one_does_not() {
    let _serial = serial();
    let mut lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(3), &["--ipvs-graceful-period=12s"]);
    let both = ["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_service(&service("web", 10, json!({})));
    for (vip, family) in vips(10).into_iter().zip([0, 1]) {
        let pod_ip = |lab: &Lab, name: &str| lab.pod(name).ips[family];
        for protocol in [Protocol::Tcp, Protocol::Sctp] {
            let to = at(vip, 80);
            lab.put_slices("web", &both);
            lab.wait_served(10, 2);
            let flow_to = |lab: &Lab, pod: &str| {
                for _ in 0..8 {
                    let from = lab.pod("p1-3").netns();
                    let flow = Flow::start(from, protocol, to, Duration::from_millis(20)).unwrap();
                    eventually("an answer", SOON, || {
                        if flow.tally().ok > 0 { Ok(()) } else { Err("none".into()) }
                    });
                    if flow.tally().pods.contains_key(pod) {
                        return flow;
                    }
                }
                panic!("no flow to {pod}");
            };
            let leaving = pod_ip(&lab, "p1-2");
            let flow = flow_to(&lab, "p1-2");
            // Leaves, comes back, and stays past the period.
            lab.put_slices("web", &both[..1]);
            eventually("weight 0", SOON, || match weight(&lab, protocol, to, leaving) {
                Some(0) => Ok(()),
                other => Err(format!("{other:?}")),
            });
            lab.put_slices("web", &both);
            eventually("weight 1", SOON, || match weight(&lab, protocol, to, leaving) {
                Some(1) => Ok(()),
                other => Err(format!("{other:?}")),
            });
            if protocol == Protocol::Tcp && family == 0 {
                throughout("a returned endpoint stays", Duration::from_millis(12500), || {
                    match weight(&lab, protocol, to, leaving) {
                        Some(1) => Ok(()),
                        other => Err(format!("{other:?}")),
                    }
                });
            }
            // Leaves for good: new connections go elsewhere, the flow lives, also past a crash.
            lab.put_slices("web", &both[..1]);
            eventually("weight 0", SOON, || match weight(&lab, protocol, to, leaving) {
                Some(0) => Ok(()),
                other => Err(format!("{other:?}")),
            });
            let begin = Instant::now();
            assert_eq!(who(lab.pod("p1-3"), protocol, to, 4), ["p1-1"]);
            if protocol == Protocol::Tcp {
                lab.daemons[0].kill().unwrap();
                lab.daemons[0].start().unwrap();
                lab.daemons[0].wait_ready(SOON).unwrap();
                assert_eq!(weight(&lab, protocol, to, leaving), Some(0), "the drain outlives the daemon");
            }
            let before = flow.tally();
            eventually("the flow goes on", SOON, || {
                if flow.tally().ok > before.ok + 3 { Ok(()) } else { Err(flow.tally().to_string()) }
            });
            assert_eq!(flow.tally().failed, 0, "{}", flow.tally());
            eventually("deleted at last", 2 * SOON, || match weight(&lab, protocol, to, leaving) {
                None => Ok(()),
                some => Err(format!("{some:?}")),
            });
            let lasted = begin.elapsed();
            println!("{protocol} {to}: drained {lasted:?}; {}", flow.stop());
            assert!(lasted > Duration::from_secs(11), "drained while connected: {lasted:?}");
        }
    }
}

#[test]
fn an_endpoint_without_connections_goes_at_once() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(2), &[]);
    let both = ["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &both);
    lab.wait_served(10, 2);
    let begin = Instant::now();
    lab.put_slices("web", &both[..1]);
    for vip in vips(10) {
        for protocol in Protocol::ALL {
            eventually("gone", SOON, || {
                let list = destinations(&lab, protocol, at(vip, 80));
                if list.len() == 1 { Ok(()) } else { Err(format!("{list:?}")) }
            });
        }
    }
    println!("gone after {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(10), "long before the period of 30 s");
}

#[test]
fn udp_flows_of_a_removed_endpoint_move_at_once_and_others_stay() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(2), &[]);
    let both = ["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name)));
    lab.put_service(&service("dns", 10, json!({})));
    for vip in vips(10) {
        lab.put_slices("dns", &both);
        lab.wait_served(10, 2);
        let to = at(vip, 80);
        let flows: Vec<Flow> = (0..6)
            .map(|_| Flow::start(lab.pod("p1-2"), Protocol::Udp, to, Duration::from_millis(30)).unwrap())
            .collect();
        eventually("all flows answered", SOON, || {
            if flows.iter().all(|flow| flow.tally().ok > 1) { Ok(()) } else { Err("not yet".into()) }
        });
        let first: Vec<String> =
            flows.iter().map(|flow| flow.tally().pods.into_keys().next().unwrap()).collect();
        assert!(first.contains(&"p1-1".into()) && first.contains(&"p2-1".into()), "{first:?}");
        let begin = Instant::now();
        lab.put_slices("dns", &both[..1]);
        eventually("every flow is answered by the endpoint that is left", SOON, || {
            let late = flows.iter().filter(|flow| !flow.tally().pods.contains_key("p1-1")).count();
            if late == 0 { Ok(()) } else { Err(format!("{late} flows are not")) }
        });
        println!("flows moved after {:?}", begin.elapsed());
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        for (flow, first) in flows.into_iter().zip(first) {
            let tally = flow.stop();
            if first == "p1-1" {
                assert_eq!(
                    (tally.failed, tally.pods.len()),
                    (0, 1),
                    "a healthy flow is not touched: {tally}"
                );
            } else {
                assert!(tally.failed <= 2, "{tally}");
            }
        }
        // From nobody to somebody: a client that kept asking is answered by the same port of its own.
        lab.put_slices("dns", &[]);
        wait_destinations(lab.node(1), Protocol::Udp, to, 0);
        let flow = Flow::start(lab.pod("p2-2"), Protocol::Udp, to, Duration::from_millis(30)).unwrap();
        eventually("refused", SOON, || {
            if flow.tally().failed > 2 { Ok(()) } else { Err(flow.tally().to_string()) }
        });
        let begin = Instant::now();
        lab.put_slices("dns", &both[1..]);
        eventually("answered", SOON, || {
            if flow.tally().ok > 0 { Ok(()) } else { Err(flow.tally().to_string()) }
        });
        println!("first answer after {:?}", begin.elapsed());
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    }
}

#[test]
fn a_crash_and_restart_under_load_fails_nothing_and_writes_nothing() {
    let _serial = serial();
    let mut lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(2), &[]);
    let spec = json!({"type": "NodePort", "ports": node_ports(30010), "externalTrafficPolicy": "Local"});
    lab.put_service(&service("web", 10, spec));
    lab.put_slices("web", &["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name))));
    lab.put_service(&service(
        "sticky",
        11,
        json!({"sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}),
    ));
    lab.put_slices("sticky", &[Endpoint::of(lab.pod("p2-2"))]);
    lab.put_service(&service("empty", 12, json!({})));
    lab.wait_served(10, 2);
    lab.wait_served(11, 1);
    lab.wait_served(12, 0);
    wait_destinations(lab.node(1), Protocol::Sctp, at(lab.node(1).ips[1], 30010), 1);
    let before = KernelSnapshot::take(lab.node(1)).unwrap();
    let pause = Duration::from_millis(5);
    let (mut loads, mut flows) = (Vec::new(), Vec::new());
    for vip in vips(10) {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            loads.push(Load::start(lab.pod("p1-2"), protocol, at(vip, 80), 1, pause).unwrap());
        }
        // Associations are not opened in quick succession: SCTP takes a source port again at once, and
        // IPVS still knows the old association then.
        flows.push(Flow::start(lab.pod("p1-2"), Protocol::Sctp, at(vip, 80), pause).unwrap());
    }
    loads.push(
        Load::start(&lab.cluster.client, Protocol::Tcp, at(lab.node(1).ips[0], 30010), 1, pause).unwrap(),
    );
    flows.push(Flow::start(lab.pod("p1-2"), Protocol::Tcp, at(vips(11)[0], 80), pause).unwrap());
    for round in 0..4 {
        if round % 2 == 0 {
            lab.daemons[0].kill().unwrap();
            before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "after a crash");
        } else {
            let status = lab.daemons[0].terminate(SOON).unwrap();
            assert!(status.success(), "{status}");
            before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "after an orderly stop");
        }
        lab.daemons[0].start().unwrap();
        lab.daemons[0].wait_ready(SOON).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(all_written(&lab), [0; 4], "round {round}: a restart without drift writes nothing");
        before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "after a restart");
    }
    for load in loads {
        let tally = load.stop();
        println!("four restarts: {tally}");
        assert!(tally.failed == 0 && tally.ok > 50, "{tally}");
    }
    for flow in flows {
        let tally = flow.stop();
        assert!(tally.failed == 0 && tally.ok > 50, "{tally}");
    }
}

#[test]
fn services_go_on_while_the_api_server_is_away() {
    let _serial = serial();
    let mut lab = Lab::start(Cluster::builder().nodes(1).pods_per_node(4), &[]);
    let all: Vec<Endpoint> = lab.cluster.pods[..3].iter().map(Endpoint::of).collect();
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &all[..2]);
    lab.wait_served(10, 2);
    let before = KernelSnapshot::take(lab.node(1)).unwrap();
    let load = Load::start(lab.pod("p1-4"), Protocol::Tcp, at(vips(10)[0], 80), 1, Duration::from_millis(5))
        .unwrap();
    lab.server.faults().outage(true);
    std::thread::sleep(Duration::from_secs(2));
    before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "during the outage");
    let health = lab.node(1).http_get(at([127, 0, 0, 1].into(), 20244), "/livez").unwrap();
    assert_eq!(health.status, 200, "an outage is no reason to restart: {}", health.body);
    // Changes that come meanwhile are applied when the server is back.
    lab.put_slices("web", &all);
    lab.put_service(&service("new", 11, json!({})));
    lab.put_slices("new", &all[..1]);
    lab.server.faults().outage(false);
    let begin = Instant::now();
    lab.wait_served(10, 3);
    lab.wait_served(11, 1);
    println!("caught up after {:?}", begin.elapsed());
    // Started while the server is down: what is in the kernel stays and serves.
    lab.server.faults().outage(true);
    let before = KernelSnapshot::take(lab.node(1)).unwrap();
    lab.daemons[0].kill().unwrap();
    lab.daemons[0].start().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(lab.daemons[0].is_running().unwrap());
    let ready = lab.node(1).http_get(at([127, 0, 0, 1].into(), 20244), "/readyz").unwrap();
    assert_eq!(ready.status, 503, "not ready before the first clean pass: {}", ready.body);
    before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "started without API server");
    lab.server.remove_unchecked("services", "default", "new").unwrap();
    lab.server.faults().outage(false);
    lab.daemons[0].wait_ready(3 * SOON).unwrap();
    wait_gone(lab.node(1), Protocol::Tcp, at(vips(11)[0], 80));
    let tally = load.stop();
    println!("through two outages: {tally}");
    assert_eq!(tally.failed, 0, "{tally}");
}

#[test]
fn what_others_change_is_put_right_and_nothing_else() {
    let _serial = serial();
    let lab = Lab::without_daemons(Cluster::builder().nodes(1).pods_per_node(2));
    let stranger = Stranger::plant(lab.node(1)).unwrap();
    let mut lab = lab;
    // Chains are read by programs and therefore rarely; here they are, too, within seconds.
    lab.start_daemons(&["--ipvs-sync-period=1s", "--loadbalancer-ip-range=198.18.0.0/24,2001:db8:1b::/64"]);
    let spec = json!({
        "type": "LoadBalancer", "ports": node_ports(30010), "externalTrafficPolicy": "Local",
        "status": load_balancer(&["198.18.0.10", "2001:db8:1b::10"]),
    });
    lab.put_service(&service("web", 10, spec));
    lab.put_slices("web", &["p1-1", "p1-2"].map(|name| Endpoint::of(lab.pod(name))));
    lab.wait_served(10, 2);
    let node = lab.node(1);
    wait_destinations(node, Protocol::Sctp, at("2001:db8:1b::10".parse().unwrap(), 80), 2);
    let settled = || KernelSnapshot::take(node).unwrap();
    let before = settled();
    std::thread::sleep(Duration::from_millis(1500));
    before.assert_same(&settled(), "settled");
    let pod = lab.pod("p1-1").ips[0];
    for sabotage in [
        "ipvsadm -D -t 10.96.0.10:80".to_owned(),
        "ipvsadm -D -u [fd00:96::a]:80".to_owned(),
        format!("ipvsadm -d -t 10.96.0.10:80 -r {pod}:8080"),
        format!("ipvsadm -e -t 10.96.0.10:80 -r {pod}:8080 -m -w 7"),
        "ipvsadm -a -t 10.96.0.10:80 -r 10.244.1.99:8080 -m".to_owned(),
        "ipvsadm -E -t 10.96.0.10:80 -s wlc -p 99".to_owned(),
        "ipset del kube-router-svip 10.96.0.10".to_owned(),
        "ipset add kube-router-svip-prt 10.96.0.10,tcp:4444".to_owned(),
        "ipset flush inet6:kube-router-svip-prt".to_owned(),
        "ipset flush kube-router-local-ips".to_owned(),
        "ip route del local 198.18.0.10 dev kube-dummy-if table local".to_owned(),
        "ip route del local 10.96.0.0/16 dev kube-dummy-if table local".to_owned(),
        "ip -6 route del local 2001:db8:1b::10 dev kube-dummy-if table local".to_owned(),
        "ip link del kube-dummy-if".to_owned(),
        "ip link set kube-dummy-if down".to_owned(),
        "iptables -F KUBE-ROUTER-SERVICES".to_owned(),
        "iptables -t nat -F KUBE-ROUTER-MASQUERADE".to_owned(),
        "ip6tables -t mangle -F PREROUTING".to_owned(),
        "iptables -I KUBE-ROUTER-SERVICES -j ACCEPT".to_owned(),
    ] {
        node.sh(&sabotage).unwrap();
        let begin = Instant::now();
        eventually(&sabotage, SOON, || {
            let difference = before.difference(&settled());
            if difference.is_empty() { Ok(()) } else { Err(difference.join("\n")) }
        });
        println!("{sabotage}: put right after {} ms", begin.elapsed().as_millis());
    }
    // A whole set can only be taken away after the rules that name it.
    node.sh("iptables -t mangle -F").unwrap();
    node.sh("ipset destroy kube-router-svip-mark").unwrap();
    eventually("a destroyed set", SOON, || {
        let difference = before.difference(&settled());
        if difference.is_empty() { Ok(()) } else { Err(difference.join("\n")) }
    });
    stranger.assert_untouched("through repairs");
    assert!(lab.metric(1, "ferroute_proxy_drift_repaired_total") >= 15.0);
}

#[test]
fn strangers_stay_and_clean_up_leaves_nothing() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(1).pods_per_node(2));
    let stranger = Stranger::plant(lab.node(1)).unwrap();
    let before = KernelSnapshot::take(lab.node(1)).unwrap();
    lab.start_daemons(&["--loadbalancer-ip-range=198.18.0.0/24,2001:db8:1b::/64"]);
    stranger.assert_untouched("after the start");
    let spec = json!({
        "type": "LoadBalancer", "ports": node_ports(30010), "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["0.0.0.0/0"], "annotations": {"kube-router.io/service.hairpin": ""},
        "status": load_balancer(&["198.18.0.10", "2001:db8:1b::10"]),
    });
    for round in 0..5 {
        for number in 10..20 {
            let name = format!("s{number}");
            lab.put_service(&service(&name, number, if number == 10 { spec.clone() } else { json!({}) }));
            let pod = if round % 2 == 0 { "p1-1" } else { "p1-2" };
            lab.put_slices(&name, &[Endpoint::of(lab.pod(pod))]);
        }
    }
    lab.wait_served(19, 1);
    lab.wait_served(10, 1);
    stranger.assert_untouched("after churn");
    lab.daemons[0].kill().unwrap();
    stranger.assert_untouched("after a crash");
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    lab.remove_service("s19");
    wait_gone(lab.node(1), Protocol::Tcp, at(vips(19)[0], 80));
    stranger.assert_untouched("after a restart");
    assert!(lab.daemons[0].terminate(SOON).unwrap().success());
    let full = KernelSnapshot::take(lab.node(1)).unwrap();
    let told = lab.node(1).exec(PROGRAM, &["--cleanup-config", "--dry-run"]).unwrap();
    full.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "after a dry run");
    assert!(told.contains("would remove link kube-dummy-if"), "{told}");
    let done = lab.node(1).exec(PROGRAM, &["--cleanup-config"]).unwrap();
    let plain = |text: &str, verb: &str| {
        let mut lines: Vec<String> =
            text.lines().filter_map(|line| line.strip_prefix(verb)).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(plain(&done, "removed "), plain(&told, "would remove "), "the dry run told what is done");
    before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "after clean-up");
    stranger.assert_untouched("after clean-up");
    let again = lab.node(1).exec(PROGRAM, &["--cleanup-config"]).unwrap();
    assert!(again.contains("nothing of ferroute is left"), "{again}");
    before.assert_same(&KernelSnapshot::take(lab.node(1)).unwrap(), "after the second clean-up");
    // And it starts again from nothing.
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    lab.wait_served(18, 1);
    let reply = lab.pod("p1-2").tcp(at(vips(18)[1], 80));
    assert!(matches!(reply, Reply::Answer(_)), "{reply:?}");
    stranger.assert_untouched("after another start");
}

/// `ferroute plan` of all three rooms: what a start would write, and after it that there is nothing left.
#[test]
fn a_plan_tells_what_a_start_writes_and_writes_nothing() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(1).pods_per_node(1));
    lab.put_service(&service("web", 10, json!({})));
    lab.put_slices("web", &[Endpoint::of(lab.pod("p1-1"))]);
    let node = lab.cluster.nodes[0].clone();
    let rooms = ["--run-service-proxy=true", "--run-firewall=true", "--run-router=true"];
    let (master, name) =
        (format!("--master={}", lab.server.url()), format!("--hostname-override={}", node.name));
    let words = [&["plan", &master, &name], &rooms[..]].concat();
    let plan = || node.exec(PROGRAM, &words).unwrap();
    let before = KernelSnapshot::take(&node).unwrap();
    let told = plan();
    for wanted in [
        "create virtual server TCP 10.96.0.10:80",
        "create ipset kube-router-local-pods",
        "would add rule from 10.244.1.0/24",
    ] {
        assert!(told.contains(wanted), "no {wanted:?} in {told}");
    }
    before.assert_same(&KernelSnapshot::take(&node).unwrap(), "after a plan");
    lab.start_daemons(&rooms);
    lab.wait_served(10, 1);
    let full = KernelSnapshot::take(&node).unwrap();
    let told = plan();
    let agree = told.matches("kernel and desired state agree").count();
    assert!(agree == 2 && !told.contains("would "), "{told}");
    full.assert_same(&KernelSnapshot::take(&node).unwrap(), "after a plan beside the daemon");
}

#[test]
fn the_last_local_endpoint_finishes_its_flows_while_new_remote_clients_are_dropped() {
    let _serial = serial();
    let lab = Lab::start(Cluster::builder().nodes(2).pods_per_node(1), &[]);
    let [here, there] = ["p1-1", "p2-1"].map(|name| Endpoint::of(lab.pod(name)));
    let spec = json!({"type": "NodePort", "ports": node_ports(30010), "externalTrafficPolicy": "Local"});
    lab.put_service(&service("web", 10, spec));
    for own in &lab.node(1).ips {
        let to = at(*own, 30010);
        lab.put_slices("web", &[here.clone(), there.clone()]);
        wait_destinations(lab.node(1), Protocol::Tcp, to, 1);
        let client = &lab.cluster.client;
        let flow = Flow::start(client, Protocol::Tcp, to, Duration::from_millis(20)).unwrap();
        lab.put_slices("web", std::slice::from_ref(&there));
        wait_destinations(lab.node(1), Protocol::Tcp, to, 0);
        eventually("new clients are dropped", SOON, || {
            match client.ask(Protocol::Tcp, to, Duration::from_millis(300)) {
                Reply::Timeout => Ok(()),
                reply => Err(format!("{reply:?}")),
            }
        });
        let before = flow.tally();
        eventually("the flow goes on", SOON, || {
            if flow.tally().ok > before.ok + 5 { Ok(()) } else { Err(flow.tally().to_string()) }
        });
        let tally = flow.stop();
        assert_eq!(tally.failed, 0, "{tally}");
    }
}
