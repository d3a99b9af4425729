//! Generated clusters are varied, valid and repeatable; the shrinker keeps what matters.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};

use ferroute_oracle::address::Block;
use ferroute_oracle::{Cluster, Judge, Probes, Random, Shape, Side, manifests, shrink};
use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

type Rule<'c> = (Option<&'c [NetworkPolicyPeer]>, Option<&'c [NetworkPolicyPort]>);

fn rules(cluster: &Cluster) -> Vec<Rule<'_>> {
    let specs = cluster.policies.iter().filter_map(|policy| policy.spec.as_ref());
    specs
        .flat_map(|spec| {
            let ingress =
                spec.ingress.iter().flatten().map(|rule| (rule.from.as_deref(), rule.ports.as_deref()));
            let egress = spec.egress.iter().flatten().map(|rule| (rule.to.as_deref(), rule.ports.as_deref()));
            ingress.chain(egress)
        })
        .collect()
}

fn blocks(cluster: &Cluster) -> Vec<&IPBlock> {
    let peers = rules(cluster).into_iter().flat_map(|(peers, _)| peers.unwrap_or_default());
    peers.filter_map(|peer| peer.ip_block.as_ref()).collect()
}

#[test]
fn a_seed_gives_one_cluster() {
    let shape = Shape::default();
    assert_eq!(shape.cluster(7), shape.cluster(7));
    assert_ne!(shape.cluster(7), shape.cluster(8));
}

/// Every trap is there often, and everything would pass the API server's validation.
#[test]
fn clusters_hold_every_trap() {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..400 {
        let cluster = if seed % 4 == 0 { Shape::large() } else { Shape::default() }.cluster(seed);
        let mut traps = BTreeSet::new();
        let mut see = |what: &'static str, is: bool| is.then(|| traps.insert(what));
        let mut texts = BTreeSet::new();
        for block in blocks(&cluster) {
            let outer = Block::parse(&block.cidr).unwrap();
            see("every address", outer.prefix == 0);
            see("one address", outer.prefix == if outer.address.is_ipv4() { 32 } else { 128 });
            see("host bits", outer != outer.truncated());
            see("a block twice", !texts.insert(block.cidr.clone()));
            for except in block.except.iter().flatten() {
                let inner = Block::parse(except).unwrap();
                assert!(inner.prefix > outer.prefix && outer.contains(inner.address), "{block:?}");
                see("an exception that is a block", texts.contains(except));
                see("a block of an IPv6 exception", !inner.address.is_ipv4());
            }
        }
        for (peers, ports) in rules(&cluster) {
            see("no peers field", peers.is_none());
            see("empty peers", peers.is_some_and(<[_]>::is_empty));
            see("no ports field", ports.is_none());
            see("empty ports", ports.is_some_and(<[_]>::is_empty));
            for peer in peers.unwrap_or_default() {
                let set =
                    (peer.ip_block.is_some(), peer.namespace_selector.is_some(), peer.pod_selector.is_some());
                assert!(set.0 != (set.1 || set.2), "{peer:?}");
                see("both selectors", set == (false, true, true));
            }
            for port in ports.unwrap_or_default() {
                match (&port.port, port.end_port) {
                    (None, end) => {
                        assert_eq!(end, None);
                        see("a whole protocol", true);
                    }
                    (Some(IntOrString::Int(first)), end) => {
                        assert!(
                            (1..=65_535).contains(first)
                                && end.is_none_or(|end| (*first..=65_535).contains(&end))
                        );
                        see("a range", end.is_some());
                    }
                    (Some(IntOrString::String(name)), end) => {
                        assert_eq!(end, None);
                        see("a name nobody has", name == "nowhere");
                        see("a name", name != "nowhere");
                    }
                }
                see("no protocol", port.protocol.is_none());
            }
        }
        let mut numbers: BTreeMap<(&str, &str), BTreeSet<i32>> = BTreeMap::new();
        let mut living = BTreeSet::new();
        let mut ended = BTreeSet::new();
        for pod in &cluster.pods {
            let (spec, status) = (pod.spec.as_ref().unwrap(), pod.status.as_ref().unwrap());
            let mut names = BTreeSet::new();
            see("a sidecar", spec.init_containers.iter().flatten().any(|c| c.restart_policy.is_some()));
            see(
                "an init container",
                spec.init_containers.iter().flatten().any(|c| c.restart_policy.is_none()),
            );
            for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
                let mut own = BTreeSet::new();
                for port in container.ports.iter().flatten() {
                    let Some(name) = port.name.as_deref() else { continue };
                    let protocol = port.protocol.as_deref().unwrap_or("TCP");
                    assert!(own.insert(name), "{name} twice in a container");
                    assert!(names.insert((name, protocol)), "{name} twice in a pod");
                    numbers.entry((name, protocol)).or_default().insert(port.container_port);
                }
            }
            see(
                "a name in two protocols",
                names.len() > names.iter().map(|(name, _)| name).collect::<BTreeSet<_>>().len(),
            );
            let is_host = spec.host_network == Some(true);
            see("a host-network pod", is_host);
            see("a pod without address", status.pod_ips.is_none());
            let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            for ip in status.pod_ips.iter().flatten().filter(|_| !is_host) {
                if over {
                    ended.insert(&ip.ip)
                } else {
                    assert!(living.insert(&ip.ip));
                    true
                };
            }
        }
        see("a name with two numbers", numbers.values().any(|numbers| numbers.len() > 1));
        see("an address used again", ended.intersection(&living).next().is_some());
        let homes: BTreeSet<_> = cluster.pods.iter().map(|pod| pod.metadata.namespace.as_ref()).collect();
        see(
            "a policy without pods",
            cluster.policies.iter().any(|it| !homes.contains(&it.metadata.namespace.as_ref())),
        );
        let v4 = living.iter().any(|ip| ip.contains('.'));
        let v6 = living.iter().any(|ip| ip.contains(':'));
        see("IPv4 only", v4 && !v6);
        see("IPv6 only", v6 && !v4);
        see("both families", v4 && v6);
        for trap in traps {
            *seen.entry(trap).or_default() += 1;
        }
    }
    assert_eq!(seen.len(), 27, "{seen:?}");
    assert!(seen.values().all(|count| *count >= 20), "{seen:?}");
}

/// Neither all open nor all closed, and every reason comes up.
#[test]
fn verdicts_are_mixed() {
    let (mut passed, mut asked, mut reasons) = (0, 0, BTreeMap::new());
    for seed in 0..100 {
        let cluster = Shape::large().cluster(seed);
        let judge = Judge::new(&cluster);
        let packets = Probes::of(&cluster).sample(&mut Random::new(seed), 200);
        assert_eq!(packets.len(), 200);
        for packet in packets {
            let verdict = judge.verdict(packet);
            asked += 1;
            passed += usize::from(verdict.allowed);
            for side in [verdict.why.egress, verdict.why.ingress] {
                let name = match side {
                    Side::NoPod => "no pod",
                    Side::Itself => "itself",
                    Side::OwnNode => "own node",
                    Side::NotIsolated => "not isolated",
                    Side::Permitted(..) => "permitted",
                    Side::Refused(_) => "refused",
                };
                *reasons.entry(name).or_insert(0) += 1;
            }
        }
    }
    assert!((asked / 10..asked * 9 / 10).contains(&passed), "{passed} of {asked} passed");
    assert_eq!(reasons.len(), 6, "{reasons:?}");
    assert!(reasons.values().all(|count| *count > 50), "{reasons:?}");
}

#[test]
fn all_probes_reach_both_sides_of_every_border() {
    let cluster = Shape::default().cluster(3);
    let probes = Probes::of(&cluster);
    let all: BTreeSet<_> = probes.all().collect();
    assert!(all.iter().all(|probe| probe.from.is_ipv4() == probe.to.is_ipv4()));
    assert!(probes.sample(&mut Random::new(1), 500).iter().all(|probe| all.contains(probe)));
    for block in blocks(&cluster) {
        let (first, last) = Block::parse(&block.cidr).unwrap().ends();
        for end in [first, last] {
            assert!(probes.others.contains(&end) || probes.pods.contains(&end), "{end} of {}", block.cidr);
        }
    }
}

/// A judge with a mistake stands in for the implementation: exceptions of one block veto the others.
#[test]
fn a_mismatch_shrinks_to_what_matters() {
    let is_vetoed = |cluster: &Cluster| {
        let excepts: Vec<_> = blocks(cluster).into_iter().flat_map(|it| it.except.iter().flatten()).collect();
        let judge = Judge::new(cluster);
        Probes::of(cluster).all().take(20_000).any(|packet| {
            let verdict = judge.verdict(packet);
            let by_rule = matches!(verdict.why.ingress, Side::Permitted(..));
            let vetoed = excepts.iter().any(|it| Block::parse(it).unwrap().contains(packet.from));
            verdict.allowed && by_rule && vetoed
        })
    };
    let seed = (0..).find(|seed| is_vetoed(&Shape::default().cluster(*seed))).unwrap();
    let before = Shape::default().cluster(seed);
    let after = shrink(before.clone(), is_vetoed);
    assert!(is_vetoed(&after));
    assert_eq!(after.nodes.len(), 0, "nodes do not matter here");
    assert!(after.policies.len() <= 2 && after.pods.len() <= 2, "{}", manifests(&after).unwrap());
    assert!(manifests(&after).unwrap().len() < manifests(&before).unwrap().len());
    assert_eq!(blocks(&after).iter().flat_map(|block| block.except.iter().flatten()).count(), 1);
    let sound = shrink(before.clone(), |_| false);
    assert_eq!(sound, before, "nothing to shrink without a failure");
}
