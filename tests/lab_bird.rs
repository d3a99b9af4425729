//! BIRD configured as the guides of others publish it: Porter's router with equal-cost paths, and a node
//! of Calico's mesh.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::net::SocketAddr;
use std::time::Duration;

use ferroute_kit::assert::{eventually, throughout};
use ferroute_kit::{Cluster, Protocol, Tally, serial};
use lab::bgp::*;
use lab::bird::Bird;
use lab::*;
use serde_json::json;

/// Everything is running after this, also while other labs share the machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// New connections whose spread over the nodes is counted.
const FLOWS: u64 = 60;

/// The router of Porter's guide: AS 65001, nodes of AS 65000 at port 17900, several paths to a prefix
/// asked for and merged into one route of the kernel.
fn porter(cluster: &Cluster) -> String {
    let mut config = "router id 10.10.0.1;
        protocol device { scan time 60; }
        protocol kernel { scan time 60; merge paths on; ipv4 { import none; export all; }; }
        protocol kernel { scan time 60; merge paths on; ipv6 { import none; export all; }; }\n"
        .to_owned();
    for node in &cluster.nodes {
        config += &format!(
            "protocol bgp {name} {{
               description \"{name}\"; local as 65001; neighbor {address} port 17900 as 65000;
               source address 10.10.0.1; enable route refresh off;
               connect delay time 1; connect retry time 1; error wait time 1, 2;
               ipv4 {{ import all; export all; add paths on; }};
               ipv6 {{ import all; export all; add paths on; }};
             }}\n",
            name = node.name,
            address = node.ips[0],
        );
    }
    config
}

#[test]
fn flows_to_an_address_spread_over_the_nodes_that_porters_router_learns() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(3).pods_per_node(1));
    for (name, value) in [
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/fib_multipath_hash_policy", "1"),
        ("net/ipv6/fib_multipath_hash_policy", "1"),
    ] {
        lab.cluster.router.set_sysctl(name, value).unwrap();
    }
    let bird = Bird::start(&lab.cluster.router, &porter(&lab.cluster));
    let pods: Vec<Endpoint> = lab.cluster.pods.iter().map(Endpoint::of).collect();
    let mut web = service("web", 10, json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}));
    web["status"] = load_balancer(&["203.0.113.10", "2001:db8:7::10"]);
    lab.put_service(&web);
    lab.put_slices("web", &pods);
    lab.start_daemons_within(
        PATIENCE,
        &[
            "--run-router=true",
            "--cluster-asn=65000",
            "--bgp-port=17900",
            "--peer-router-ips=10.10.0.1",
            "--peer-router-asns=65001",
            "--advertise-loadbalancer-ip",
            "--loadbalancer-ip-range=203.0.113.0/24,2001:db8:7::/64",
        ],
    );
    let paths = |wanted: usize| {
        for (family, prefix, next_hop) in
            [("-4", "203.0.113.10", "via 10.10.0.1"), ("-6", "2001:db8:7::10", "via fd00:10:10::1")]
        {
            eventually(&format!("{wanted} ways to {prefix}"), SESSION, || {
                let route = lab.cluster.router.exec("ip", &[family, "route", "show", prefix]);
                let route = route.map_err(|error| error.to_string())?;
                let routes = bird.ask("show route")?;
                let hops = route.matches(next_hop).count();
                if hops == wanted && route.contains("proto bird") {
                    Ok(())
                } else {
                    Err(format!("{route}\n{routes}"))
                }
            });
        }
    };
    let flows = || -> Vec<Tally> {
        let all = ["203.0.113.10:80", "[2001:db8:7::10]:80"];
        let all = all.map(|address| address.parse::<SocketAddr>().unwrap());
        all.map(|address| lab.cluster.client.spread(Protocol::Tcp, address, FLOWS as usize)).into()
    };
    paths(3);
    for tally in flows() {
        println!("three nodes: {tally:?}");
        assert_eq!(tally.pods.len(), 3, "{tally:?}");
        assert!(tally.pods.values().all(|count| *count >= FLOWS / 10), "{tally:?}");
        assert_eq!(tally.ok, FLOWS, "{tally:?}");
    }
    // A node where nobody answers is none of them.
    lab.put_slices("web", &pods[..2]);
    paths(2);
    for tally in flows() {
        assert_eq!(tally.pods.keys().collect::<Vec<_>>(), ["p1-1", "p2-1"], "{tally:?}");
        assert_eq!(tally.ok, FLOWS, "{tally:?}");
    }
    for number in 1..=3 {
        wait_sessions(&lab, number, &sessions_of(number));
    }
}

/// The router and the other nodes, with no session lost.
fn sessions_of(number: usize) -> Vec<&'static str> {
    let all = ["10.10.0.11 Established 0", "10.10.0.12 Established 0", "10.10.0.13 Established 0"];
    let others = all.into_iter().enumerate().filter(|(index, _)| index + 1 != number).map(|(_, row)| row);
    std::iter::once("10.10.0.1 Established 0").chain(others).collect()
}

/// A node of Calico's mesh: a template with multihop, recursive next hops, several paths and graceful
/// restart; its own block as a blackhole, and nothing but that for others. It waits for one neighbour and
/// dials the other.
fn calico() -> String {
    "router id 10.10.0.13;
     protocol static { ipv4; route 10.244.3.0/24 blackhole; }
     protocol device { scan time 2; }
     protocol kernel {
       learn; persist; scan time 2; graceful restart; merge paths on;
       ipv4 { import all; export where source = RTS_BGP; };
     }
     protocol direct { ipv4; interface -\"cali*\", -\"kube-ipvs*\", \"*\"; }
     filter calico_export_to_bgp_peers { if net = 10.244.3.0/24 then accept; reject; }
     template bgp bgp_template {
       local as 64512; multihop; graceful restart; source address 10.10.0.13;
       connect delay time 2; connect retry time 5; error wait time 5, 30;
       ipv4 { gateway recursive; import all; export filter calico_export_to_bgp_peers; add paths on; };
     }
     protocol bgp Mesh_10_10_0_11 from bgp_template { neighbor 10.10.0.11 as 64512; passive on; }
     protocol bgp Mesh_10_10_0_12 from bgp_template { neighbor 10.10.0.12 as 64512; }\n"
        .to_owned()
}

#[test]
fn a_node_that_still_runs_calico_is_in_the_mesh() {
    let _serial = serial();
    let mut lab = Lab::without_daemons(Cluster::builder().nodes(3).pods_per_node(1));
    let mut bird = Bird::start(lab.node(3), &calico());
    lab.start_daemons_on(&[1, 2], PATIENCE, &["--run-router=true", "--bgp-graceful-restart"]);
    let others = [
        ["10.10.0.12 Established 0", "10.10.0.13 Established 0"],
        ["10.10.0.11 Established 0", "10.10.0.13 Established 0"],
    ];
    let block = "10.244.3.0/24 via 10.10.0.13: best";
    for (number, others) in [1, 2].into_iter().zip(others) {
        wait_sessions(&lab, number, &others);
        wait_row(&lab, number, &["routes"], block);
        bird.learns(&format!("Mesh_10_10_0_1{number}"), &[&format!("10.244.{number}.0/24")]);
    }
    let kept = |lab: &Lab, what: &str, time| {
        throughout(what, time, || {
            let rows = rows(&bgp(lab, 1, &["routes"]));
            if rows.iter().any(|row| row.starts_with("10.244.3.0/24 via 10.10.0.13: best")) {
                Ok(())
            } else {
                Err(format!("{rows:#?}"))
            }
        });
    };
    // Its BIRD dies and comes back as Calico starts it: the way to its pods stays.
    bird.kill();
    kept(&lab, "while its BIRD is away", Duration::from_secs(2));
    bird.recover();
    kept(&lab, "while its BIRD comes back", Duration::from_secs(5));
    for number in [1, 2] {
        eventually("the session is back", SESSION, || {
            let rows = sessions(&lab, number);
            if rows.iter().any(|row| row.starts_with("10.10.0.13 Established")) {
                Ok(())
            } else {
                Err(format!("{rows:?}"))
            }
        });
        wait_row(&lab, number, &["routes"], block);
    }
    // The other way round.
    lab.daemons[0].kill().unwrap();
    throughout("BIRD keeps the routes of a node that was killed", Duration::from_secs(2), || {
        let routes = bird.routes("Mesh_10_10_0_11");
        if routes.contains("10.244.1.0/24") { Ok(()) } else { Err(format!("{routes:?}")) }
    });
    lab.daemons[0].start().unwrap();
    lab.daemons[0].wait_ready(SOON).unwrap();
    wait_row(&lab, 1, &["routes"], block);
    bird.learns("Mesh_10_10_0_11", &["10.244.1.0/24"]);
}
