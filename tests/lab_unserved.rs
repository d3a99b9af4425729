//! Services that nobody serves: clients are refused at once, wherever they are, and served from the
//! moment there is an endpoint.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Netns, Protocol, Reply, serial};
use lab::*;
use nix::errno::Errno;
use serde_json::json;

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn lab() -> Lab {
    let cluster = Cluster::builder().nodes(2).pods_per_node(2);
    let ranges = "--loadbalancer-ip-range=198.18.0.0/24,2001:db8:1b::/64";
    let lab = Lab::start(cluster, &[ranges, "--ipvs-graceful-period=2s"]);
    for network in ["10.96.0.0/16", "fd00:96::/112", "198.18.0.0/24", "2001:db8:1b::/64"] {
        lab.cluster.client.route_via(&[lab.node(1)], network.parse().unwrap()).unwrap();
    }
    lab
}

/// What `ferroute status` says is to be written on node 1.
fn difference(lab: &Lab) -> String {
    let socket = format!("--admin-socket={}", lab.admin_socket(lab.node(1)));
    let status = lab.node(1).exec(PROGRAM, &["status", &socket, "--output", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["services"]["difference"].to_string()
}

#[test]
fn without_endpoints_clients_are_refused_at_once() {
    let _serial = serial();
    let lab = lab();
    lab.put_service(&service(
        "empty",
        17,
        json!({"type": "LoadBalancer", "ports": node_ports(30017),
            "status": load_balancer(&["198.18.0.17", "2001:db8:1b::17"])}),
    ));
    let balancers = ["198.18.0.17", "2001:db8:1b::17"].map(|vip| at(ip(vip), 80));
    let targets: Vec<SocketAddr> = vips(17)
        .into_iter()
        .map(|vip| at(vip, 80))
        .chain(balancers)
        .chain(lab.node(1).ips.iter().map(|own| at(*own, 30017)))
        .collect();
    let refused = |what: &str| {
        for to in &targets {
            for protocol in Protocol::ALL {
                wait_destinations(lab.node(1), protocol, *to, 0);
                for from in [&lab.cluster.client, lab.pod("p1-1").netns(), &lab.node(1).netns] {
                    assert_refused(from, protocol, *to, what);
                }
            }
        }
        assert_eq!(difference(&lab), "[]", "{what}");
    };
    refused("never had an endpoint");
    lab.put_slices("empty", &[Endpoint::of(lab.pod("p1-1")), Endpoint::of(lab.pod("p2-1"))]);
    lab.wait_served(17, 2);
    for to in &targets {
        for protocol in Protocol::ALL {
            for from in [lab.pod("p1-2").netns(), &lab.node(1).netns] {
                ask(from, protocol, *to, "served");
            }
        }
    }
    assert_eq!(difference(&lab), "[]");
    lab.put_slices("empty", &[]);
    for to in &targets {
        for protocol in Protocol::ALL {
            // Connections that have just ended are still drained.
            eventually("no virtual server", 3 * SOON, || match virtual_server(lab.node(1), protocol, *to) {
                None => Ok(()),
                Some((_, list)) => Err(format!("{protocol} {to}: {list:?}")),
            });
        }
    }
    refused("lost its endpoints");
    assert_eq!(lab.metric(1, "ferroute_proxy_drift_repaired_total"), 0.0);
    assert_eq!(lab.metric(1, "ferroute_proxy_pass_failures_total"), 0.0);
}

/// One request: when it began, how long it took, what came.
type Asked = (Instant, Duration, Reply);

fn ask_on(netns: &Netns, protocol: Protocol, to: SocketAddr, stop: &AtomicBool) -> Vec<Asked> {
    let mut asked = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let reply = netns.ask(protocol, to, Duration::from_secs(2));
        asked.push((begin, begin.elapsed(), reply));
        std::thread::sleep(Duration::from_millis(3));
    }
    asked
}

#[test]
fn an_endpoint_that_comes_and_goes_under_load_loses_nobody() {
    let _serial = serial();
    let lab = lab();
    let to = at(vips(10)[0], 80);
    lab.put_service(&service("web", 10, json!({})));
    let stop = AtomicBool::new(false);
    let places: [(&str, &Netns); 3] =
        [("pod", lab.pod("p1-2").netns()), ("outside", &lab.cluster.client), ("node", &lab.node(1).netns)];
    let mut served: Vec<(Instant, Instant)> = Vec::new();
    let asked = std::thread::scope(|scope| {
        let clients: Vec<_> = places
            .iter()
            .flat_map(|(place, netns)| {
                [Protocol::Tcp, Protocol::Udp].map(|protocol| (*place, *netns, protocol))
            })
            .map(|(place, netns, protocol)| {
                let stop = &stop;
                (place, protocol, scope.spawn(move || ask_on(netns, protocol, to, stop)))
            })
            .collect();
        for round in 0..12 {
            let pod = lab.pod(if round % 2 == 0 { "p1-1" } else { "p2-1" });
            lab.put_slices("web", &[Endpoint::of(pod)]);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                wait_destinations(lab.node(1), protocol, to, 1);
            }
            // The entry by which clients are refused goes right after.
            eventually("nobody is refused", SOON, || {
                match lab.node(1).exec("ipset", &["save", "kube-router-svip-none"]).unwrap() {
                    text if text.contains("10.96.0.10,") => Err(text),
                    _ => Ok(()),
                }
            });
            let from = Instant::now();
            std::thread::sleep(Duration::from_millis(150));
            served.push((from, Instant::now()));
            lab.put_slices("web", &[]);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                wait_destinations(lab.node(1), protocol, to, 0);
            }
        }
        stop.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .map(|(place, protocol, it)| (place, protocol, it.join().unwrap()))
            .collect::<Vec<_>>()
    });
    for (place, protocol, asked) in asked {
        let inside = |begin: Instant, taken: Duration| {
            served.iter().any(|(from, until)| begin > *from && begin + taken < *until)
        };
        let (mut answered, mut refused) = (0, 0);
        for (begin, taken, reply) in &asked {
            match reply {
                Reply::Answer(_) => answered += 1,
                // A client that was told before a datagram is refused at its next.
                Reply::Refused => refused += 1,
                // Between the last endpoint and the entry by which clients are refused, IPVS refuses:
                // a datagram of this node ends in the system call that sends it.
                Reply::Unreachable(Errno::EPERM) if place == "node" && protocol == Protocol::Udp => {
                    refused += 1
                }
                // A datagram that was under way when its endpoint went.
                Reply::Timeout if protocol == Protocol::Udp => {}
                other => {
                    let since = served.iter().rev().find(|(from, _)| from < begin);
                    let since = since.map(|(from, until)| (*begin - *from, *until - *from));
                    panic!("{place} {protocol}: {other:?} after {taken:?}; served since, and for: {since:?}")
                }
            }
            if inside(*begin, *taken) {
                assert!(matches!(reply, Reply::Answer(_)), "{place} {protocol}: {reply:?} while served");
            }
        }
        println!("{place} {protocol}: {answered} answered, {refused} refused of {}", asked.len());
        assert!(answered > 20 && refused > 5, "{place} {protocol}: {answered} {refused}");
    }
    assert_eq!(lab.metric(1, "ferroute_proxy_pass_failures_total"), 0.0);
    assert_eq!(lab.metric(1, "ferroute_proxy_drift_repaired_total"), 0.0);
}
