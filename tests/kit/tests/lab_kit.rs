//! The kit proves itself on the lab kernel: what its clients say is what happened.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ferroute_kit::cluster::Builder;
use ferroute_kit::{Cluster, Families, Flow, Load, PodSpec, Protocol, Reply, serial};

const PORTS: [(Protocol, u16); 3] = [(Protocol::Tcp, 8080), (Protocol::Udp, 8080), (Protocol::Sctp, 8080)];

fn build(builder: Builder) -> Cluster {
    // Loading modules is the lab's boot, not the cluster's cost.
    ferroute_kit::kernel::require().expect("lab kernel");
    let begin = Instant::now();
    let cluster = builder.pod_ports(PORTS).build().expect("cluster");
    let taken = begin.elapsed();
    println!("built in {} ms", taken.as_millis());
    assert!(taken < Duration::from_secs(2), "a cluster takes less than 2 s, took {taken:?}");
    cluster
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

#[test]
fn everybody_reaches_every_pod_in_every_family() {
    let _serial = serial();
    for families in Families::ALL {
        let cluster = build(Cluster::builder().families(families).nodes(3).pods_per_node(2));
        let expected = if families == Families::Dual { 2 } else { 1 };
        let pods = &cluster.pods;
        assert_eq!(pods.len(), 6);
        for target in pods {
            assert_eq!(target.ips.len(), expected);
            for (number, &ip) in target.ips.iter().enumerate() {
                for protocol in Protocol::ALL {
                    let sources = [
                        (pods[0].netns(), pods[0].ips[number], "pod of n1"),
                        (pods[5].netns(), pods[5].ips[number], "pod of n3"),
                        (&cluster.client, cluster.client.ips[number], "client"),
                    ];
                    for (source, own, who) in sources {
                        let reply = source.ask(protocol, at(ip, 8080), Duration::from_secs(2));
                        let answer =
                            reply.answer().unwrap_or_else(|| panic!("{who} {protocol} {ip}: {reply:?}"));
                        assert_eq!(
                            (&answer.pod, answer.ip, answer.port),
                            (&target.spec.name, ip, 8080),
                            "{who}"
                        );
                        assert_eq!(answer.peer.ip(), own, "{who} {protocol}: no translation on the way");
                    }
                }
                let reply = cluster.nodes[1].tcp(at(ip, 8080));
                assert_eq!(reply.pod(), Some(target.spec.name.as_str()), "node: {reply:?}");
            }
        }
    }
}

#[test]
fn nodes_in_different_subnets_reach_each_other_through_the_router() {
    let _serial = serial();
    let cluster = build(Cluster::builder().nodes(3).subnets(2).pods_per_node(1).zones(["a", "b"]));
    assert_ne!(cluster.nodes[0].subnet, cluster.nodes[1].subnet);
    for target in &cluster.pods {
        for &ip in &target.ips {
            let reply = cluster.pods[0].tcp(at(ip, 8080));
            assert_eq!(reply.pod(), Some(target.spec.name.as_str()), "{reply:?}");
        }
    }
    let zones: Vec<_> = cluster
        .node_objects()
        .iter()
        .map(|node| node["metadata"]["labels"]["topology.kubernetes.io/zone"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(zones, [Some("a".to_owned()), Some("b".to_owned()), Some("a".to_owned())]);
}

#[test]
fn clients_tell_refused_silent_unreachable_and_reset_apart() {
    let _serial = serial();
    let mut cluster = build(Cluster::builder().nodes(1).pods_per_node(1));
    for ip in cluster.pods[0].ips.clone() {
        for protocol in Protocol::ALL {
            let reply = cluster.client.ask(protocol, at(ip, 9), Duration::from_secs(1));
            assert_eq!(reply, Reply::Refused, "{protocol} to a closed port of {ip}");
        }
    }
    let silent = Duration::from_millis(300);
    let netns = cluster.pods[0].netns().clone();
    netns.sh("iptables -A INPUT -p tcp -j DROP").expect("drop rule");
    let v4 = cluster.pods[0].ipv4().expect("IPv4");
    assert_eq!(cluster.client.ask(Protocol::Tcp, at(v4, 8080), silent), Reply::Timeout);
    netns.sh("iptables -F INPUT").expect("flush");
    netns.sh("iptables -A INPUT -p tcp -j REJECT --reject-with icmp-host-prohibited").expect("reject rule");
    assert!(matches!(cluster.client.tcp(at(v4, 8080)), Reply::Unreachable(_)));
    netns.sh("iptables -F INPUT").expect("flush");

    let flow =
        Flow::start(&cluster.client, Protocol::Tcp, at(v4, 8080), Duration::from_millis(5)).expect("flow");
    while flow.tally().ok < 3 {
        std::thread::sleep(Duration::from_millis(5));
    }
    cluster.pods[0].crash();
    std::thread::sleep(Duration::from_millis(50));
    let tally = flow.stop();
    assert_eq!(tally.failed, 1, "a broken connection is one failure: {tally}");
    assert!(matches!(tally.first_failure, Some((_, Reply::Reset))), "{tally}");
    assert_eq!(cluster.client.tcp(at(v4, 8080)), Reply::Refused, "servers gone, address there");
    let ips = cluster.pods[0].ips.clone();
    cluster.pods.clear();
    let again = cluster.nodes[0].start_pod(PodSpec::new("again").ports(PORTS)).expect("pod");
    assert_ne!(again.ips, ips, "an address just freed is not given out at once");
    assert_eq!(cluster.client.tcp(at(again.ips[0], 8080)).pod(), Some("again"));
    assert_eq!(
        again.exec("ip", &["-o", "link", "show", "type", "veth"]).expect("ip").lines().count(),
        1,
        "one link in the pod"
    );
    let ports = cluster.nodes[0].exec("ip", &["-o", "link", "show", "master", "kube-bridge"]).expect("ip");
    assert_eq!(ports.lines().count(), 1, "the first pod's port is gone: {ports}");
}

/// The virtual server of the next test, by `ipvsadm`.
fn virtual_server(cluster: &Cluster, protocol: Protocol, vip: SocketAddr) {
    let node = &cluster.nodes[0];
    let service = vip.to_string();
    node.exec("ipvsadm", &["-A", protocol.ipvsadm(), &service, "-s", "rr"]).expect("add service");
    for pod in &cluster.pods {
        let ip = pod.ips.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4()).expect("family");
        let destination = at(*ip, 8080).to_string();
        node.exec("ipvsadm", &["-a", protocol.ipvsadm(), &service, "-r", &destination, "-m"])
            .expect("add destination");
    }
}

#[test]
fn a_virtual_server_spreads_all_protocols_of_both_families() {
    let _serial = serial();
    let cluster = build(Cluster::builder().nodes(3).pods_per_node(1));
    let node = &cluster.nodes[0];
    node.set_sysctl("net/ipv4/vs/conntrack", "1").expect("sysctl");
    node.links().expect("links").add("kube-dummy-if", "dummy").expect("dummy");
    for (iptables, vip, network) in
        [("iptables", "10.96.0.10", "10.96.0.0/16"), ("ip6tables", "fd00:96::10", "fd00:96::/112")]
    {
        let vip: IpAddr = vip.parse().expect("address");
        let like = |ip: &&IpAddr| ip.is_ipv4() == vip.is_ipv4();
        node.sh(&format!("ip route add local {network} dev kube-dummy-if table local")).expect("local route");
        node.sh(&format!(
            "{iptables} -t nat -A POSTROUTING -m ipvs --ipvs --vdir ORIGINAL --vmethod MASQ -j MASQUERADE"
        ))
        .expect("masquerade");
        cluster.client.route_via(&[node], network.parse().expect("network")).expect("route");
        for protocol in Protocol::ALL {
            let service = at(vip, 80);
            virtual_server(&cluster, protocol, service);
            let node_ip = *node.ips.iter().find(like).expect("family");
            let tally = cluster.client.spread(protocol, service, 9);
            assert_eq!((tally.ok, tally.failed), (9, 0), "{protocol} {service}: {tally}");
            let pods: Vec<_> = tally.pods.into_iter().collect();
            let even = [("p1-1".to_owned(), 3), ("p2-1".to_owned(), 3), ("p3-1".to_owned(), 3)];
            assert_eq!(pods, even, "round robin is even: {protocol} {service}");
            assert!(tally.peers.contains(&node_ip), "masqueraded by {node_ip}: {:?}", tally.peers);
            assert!(
                cluster.pods[0].ask(protocol, service, Duration::from_secs(2)).pod().is_some(),
                "from a pod"
            );
            assert!(node.ask(protocol, service, Duration::from_secs(2)).pod().is_some(), "from the node");
        }
        // A pod reaches itself: hairpin mode of its bridge port.
        let tally = cluster.pods[0].spread(Protocol::Tcp, at(vip, 80), 3);
        assert_eq!(tally.pods.len(), 3, "{tally}");

        let load = Load::start(&cluster.client, Protocol::Tcp, at(vip, 80), 4, Duration::from_millis(1))
            .expect("load");
        let flow = Flow::start(&cluster.client, Protocol::Sctp, at(vip, 80), Duration::from_millis(5))
            .expect("flow");
        std::thread::sleep(Duration::from_millis(500));
        let (tally, steady) = (load.stop(), flow.stop());
        println!("load: {tally}; flow: {steady}");
        assert_eq!(tally.failed, 0, "{tally}");
        assert_eq!(tally.ok, tally.pods.values().sum::<u64>());
        let (least, most) =
            (tally.pods.values().min().expect("pods"), tally.pods.values().max().expect("pods"));
        assert!(most - least <= 1, "round robin is even under load: {tally}");
        assert_eq!((steady.failed, steady.pods.len()), (0, 1), "a flow stays with its pod: {steady}");
    }
}

#[test]
fn equal_cost_routes_spread_flows_over_nodes() {
    let _serial = serial();
    let cluster = build(Cluster::builder().nodes(2).pods_per_node(1));
    for (vip, own) in [("10.96.0.10", "10.96.0.10/32"), ("fd00:96::10", "fd00:96::10/128")] {
        let nodes: Vec<_> = cluster.nodes.iter().collect();
        cluster.client.route_via(&nodes, own.parse().expect("network")).expect("route");
        for node in nodes {
            node.sh(&format!("ip addr add {own} dev lo")).expect("address");
        }
        let servers: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| {
                let identity =
                    ferroute_kit::workload::Identity { pod: node.name.clone(), namespace: "host".into() };
                let vip: IpAddr = vip.parse().expect("address");
                ferroute_kit::workload::Workload::start(&node.netns, identity, &[vip], &[(Protocol::Tcp, 80)])
                    .expect("server")
            })
            .collect();
        let tally = cluster.client.spread(Protocol::Tcp, at(vip.parse().expect("address"), 80), 40);
        assert_eq!((tally.ok, tally.pods.len()), (40, 2), "both nodes serve: {tally}");
        drop(servers);
    }
}

#[test]
fn a_hundred_pods_are_cheap() {
    let _serial = serial();
    let cluster = build(Cluster::builder().nodes(1));
    let begin = Instant::now();
    let pods: Vec<_> = (0..100)
        .map(|number| cluster.nodes[0].start_pod(PodSpec::new(format!("pod{number}"))).expect("pod"))
        .collect();
    let started = begin.elapsed();
    for pod in &pods {
        assert_eq!(cluster.client.tcp(at(pod.ips[0], 8080)).pod(), Some(pod.spec.name.as_str()));
    }
    let asked = begin.elapsed();
    drop(pods);
    println!("100 pods: started {started:?}, asked {asked:?}, gone {:?}", begin.elapsed());
    assert!(started < Duration::from_secs(5), "{started:?}");
    let ports = cluster.nodes[0].exec("ip", &["-o", "link", "show", "master", "kube-bridge"]).expect("ip");
    assert_eq!(ports, "", "no port left");
}
