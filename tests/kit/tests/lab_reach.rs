//! The prober tells what happened, and fast enough to ask about whole clusters.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ferroute_kit::cluster::{Cluster, Families};
use ferroute_kit::{Host, Outcome, Probe, Prober, Protocol, serial};
use nix::errno::Errno;

const PORTS: [u16; 3] = [80, 81, 5353];

/// Nodes with both ends of the pod bridge, pods, and the outside client.
fn hosts(cluster: &Cluster) -> Vec<Host> {
    let mut hosts = Vec::new();
    for node in &cluster.nodes {
        let mut addresses = node.ips.clone();
        addresses.extend(node.pod_cidrs.iter().map(|cidr| cidr.hosts().next().unwrap()));
        for address in &mut addresses {
            // The first host of fd00:244:1::/64 is its all-routers address.
            if let IpAddr::V6(v6) = address
                && v6.segments()[7] == 0
            {
                *address = (u128::from(*v6) + 1).to_be_bytes().into();
            }
        }
        hosts.push(Host { name: node.name.clone(), netns: node.netns.clone(), addresses });
    }
    for pod in &cluster.pods {
        hosts.push(Host {
            name: pod.spec.name.clone(),
            netns: pod.netns().clone(),
            addresses: pod.ips.clone(),
        });
    }
    let client = &cluster.client;
    hosts.push(Host { name: "client".into(), netns: (**client).clone(), addresses: client.ips.clone() });
    hosts
}

/// Everything to everything on every port.
fn all(prober: &Prober, ports: &[u16]) -> Vec<Probe> {
    let addresses: Vec<IpAddr> = prober.hosts().iter().flat_map(|host| host.addresses.clone()).collect();
    let mut probes = Vec::new();
    for &from in &addresses {
        for &to in addresses.iter().filter(|to| to.is_ipv4() == from.is_ipv4()) {
            for protocol in Protocol::ALL {
                for &port in ports {
                    probes.push(Probe { from, to: SocketAddr::new(to, port), protocol });
                }
            }
        }
    }
    probes
}

fn tally(outcomes: &[Outcome]) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for outcome in outcomes {
        *tally.entry(format!("{outcome:?}")).or_default() += 1;
    }
    tally
}

#[test]
fn without_rules_everybody_reaches_everybody() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(3).pods_per_node(6).pod_ports([]).build().unwrap();
    let mut prober = Prober::listen(hosts(&cluster), &PORTS).unwrap();
    for protocol in Protocol::ALL {
        let probes: Vec<Probe> =
            all(&prober, &PORTS).into_iter().filter(|probe| probe.protocol == protocol).collect();
        let begin = Instant::now();
        let outcomes = prober.probe(&probes).unwrap();
        // Shown, not asserted: it is what this machine had to spare at this moment.
        let rate = probes.len() as f64 / begin.elapsed().as_secs_f64();
        println!("{protocol}: {} attempts, {rate:.0} a second; {:?}", probes.len(), tally(&outcomes));
        for (probe, outcome) in probes.iter().zip(&outcomes) {
            assert_eq!(*outcome, Outcome::Reached, "{probe}");
        }
    }
}

#[test]
fn refusals_are_told_apart() {
    let _serial = serial();
    let cluster = Cluster::builder().nodes(2).pods_per_node(2).pod_ports([]).build().unwrap();
    for node in &cluster.nodes {
        // Neither the limit for a client nor the one for all.
        node.set_sysctl("net/ipv4/icmp_ratemask", "0").unwrap();
        node.set_sysctl("net/ipv6/icmp/ratemask", "3-127").unwrap();
    }
    let mut prober = Prober::listen(hosts(&cluster), &PORTS).unwrap();
    let n1 = &cluster.nodes[0];
    let target = cluster.pods[0].ips.clone();
    for (command, reject) in
        [("iptables-legacy", "icmp-port-unreachable"), ("ip6tables-legacy", "icmp6-port-unreachable")]
    {
        let to = target[usize::from(command.starts_with("ip6"))];
        for rule in [
            format!(
                "-A FORWARD -d {to} -m conntrack --ctstate NEW -m multiport -p tcp --dports 80 -j REJECT --reject-with {reject}"
            ),
            format!("-A FORWARD -d {to} -p udp --dport 80 -j REJECT --reject-with {reject}"),
            format!("-A FORWARD -d {to} -p sctp --dport 80 -j REJECT --reject-with {reject}"),
            format!("-A FORWARD -d {to} -p tcp --dport 81 -j DROP"),
            format!("-A FORWARD -d {to} -p udp --dport 81 -j DROP"),
            format!("-A FORWARD -d {to} -p sctp --dport 81 -j DROP"),
        ] {
            n1.sh(&format!("{command} {rule}")).unwrap();
        }
    }
    // From a pod of the same node, a pod of another and the outside; the node itself is not FORWARD's.
    for (number, &to) in target.iter().enumerate() {
        let sources = [cluster.pods[1].ips[number], cluster.pods[3].ips[number], cluster.client.ips[number]];
        let node = n1.ips[number];
        let bridge = prober.hosts()[0].addresses[2 + number];
        for protocol in Protocol::ALL {
            let ask = |prober: &mut Prober, from: IpAddr, port: u16| {
                let begin = Instant::now();
                let outcome =
                    prober.probe(&[Probe { from, to: SocketAddr::new(to, port), protocol }]).unwrap()[0];
                (outcome, begin.elapsed())
            };
            for from in sources {
                let (outcome, time) = ask(&mut prober, from, 80);
                match (protocol, outcome) {
                    (Protocol::Sctp, Outcome::Refused) => {}
                    (_, Outcome::Rejected(by, Errno::ECONNREFUSED)) => {
                        assert!(by == node || by == bridge, "{protocol} from {from}: rejected by {by}");
                    }
                    other => panic!("{protocol} from {from}: {other:?}"),
                }
                assert!(time < Duration::from_millis(250), "{protocol} from {from}: told after {time:?}");
                assert_eq!(ask(&mut prober, from, 81).0, Outcome::Silent, "{protocol} from {from}");
                assert_eq!(ask(&mut prober, from, 5353).0, Outcome::Reached, "{protocol} from {from}");
                // Nobody listens: the pod itself says so.
                let nobody = ask(&mut prober, from, 9999).0;
                let expected = if protocol == Protocol::Udp {
                    Outcome::Rejected(to, Errno::ECONNREFUSED)
                } else {
                    Outcome::Refused
                };
                assert_eq!(nobody, expected, "{protocol} from {from}");
            }
            assert_eq!(ask(&mut prober, node, 80).0, Outcome::Reached, "{protocol} from the node");
        }
    }
    // A mixture, all at once, comes out the same.
    let probes = all(&prober, &PORTS);
    let begin = Instant::now();
    let outcomes = prober.probe(&probes).unwrap();
    println!("{} attempts in {:?}: {:?}", probes.len(), begin.elapsed(), tally(&outcomes));
    let own: Vec<IpAddr> = prober.hosts()[0].addresses.iter().chain(&target).copied().collect();
    for (probe, outcome) in probes.iter().zip(outcomes) {
        let ruled = target.contains(&probe.to.ip()) && !own.contains(&probe.from);
        let fits = match (ruled, probe.to.port()) {
            (true, 80) => matches!(outcome, Outcome::Rejected(_, Errno::ECONNREFUSED) | Outcome::Refused),
            (true, 81) => outcome == Outcome::Silent,
            _ => outcome == Outcome::Reached,
        };
        assert!(fits, "{probe}: {outcome:?}");
    }
}

#[test]
fn a_call_knows_nothing_of_the_flows_of_an_earlier_one() {
    let _serial = serial();
    let cluster =
        Cluster::builder().families(Families::V4).nodes(1).pods_per_node(2).pod_ports([]).build().unwrap();
    cluster.nodes[0].set_sysctl("net/ipv4/icmp_ratemask", "0").unwrap();
    let mut prober = Prober::listen(hosts(&cluster), &PORTS).unwrap();
    let [from, to] = [1, 0].map(|pod: usize| cluster.pods[pod].ips[0]);
    let probes = Protocol::ALL.map(|protocol| Probe { from, to: SocketAddr::new(to, 80), protocol });
    let node = &cluster.nodes[0];
    node.sh("iptables-legacy -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT").unwrap();
    for round in 0..3 {
        assert_eq!(prober.probe(&probes).unwrap(), [Outcome::Reached; 3], "round {round}");
        node.sh(&format!("iptables-legacy -A FORWARD -d {to} -j REJECT")).unwrap();
        let outcomes = prober.probe(&probes).unwrap();
        assert!(!outcomes.contains(&Outcome::Reached), "round {round}: {outcomes:?}");
        node.sh(&format!("iptables-legacy -D FORWARD -d {to} -j REJECT")).unwrap();
    }
}
