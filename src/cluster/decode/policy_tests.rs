//! From API objects to the verdict of chains and sets, on random clusters, against a judge written apart.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferroute_iptables::{Builtin, Family};
use ferroute_oracle::{Cluster, Judge, Packet, Probes, Random, Shape, manifests, shrink};
use ferroute_policy::{Exempt, Explanation, Flow, Index, Options, Protocol, UnknownPods, Verdict, trace};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Decoded, network_policy, workload};
use crate::cluster::wire::{ApiKind, Item};
use crate::netpol::gather;
use crate::netpol::starting::Starting;

/// Clusters compared by every test run; `FERROUTE_ORACLE_CLUSTERS` asks for more.
const CLUSTERS: u64 = 2_000;
/// Packets asked about in each.
const PACKETS: usize = 100;

fn decoded<T: ApiKind, V>(object: &impl Serialize, decode: impl FnOnce(Item<T>) -> Decoded<V>) -> V
where
    Item<T>: DeserializeOwned,
{
    let text = serde_json::to_string(object).unwrap();
    match decode(serde_json::from_str(&text).unwrap()) {
        Decoded::Ours(value) => value,
        _ => panic!("refused: {text}"),
    }
}

/// What each node would have in its kernel.
fn indexes(cluster: &Cluster) -> BTreeMap<String, Index> {
    let mut shared = workload::Shared::default();
    let pods: Vec<_> =
        cluster.pods.iter().map(|pod| decoded(pod, |item| workload::pod(item, &mut shared))).collect();
    let mut indexes = BTreeMap::new();
    for node in &cluster.nodes {
        let name = node.metadata.name.clone().unwrap();
        let mut index = Index::new(Options {
            families: Family::BOTH.to_vec(),
            unknown_pods: UnknownPods::Allow,
            exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
        });
        for policy in &cluster.policies {
            let policy = decoded(policy, network_policy::network_policy);
            assert!(policy.problems.is_empty(), "{:?}", policy.problems);
            index.put_policy(&gather::key(&policy.key), Some(policy.policy));
        }
        for pod in &pods {
            index.put_pod(&gather::key(&pod.key), gather::pod(pod, &name, &Starting::default()));
        }
        for namespace in &cluster.namespaces {
            let namespace = decoded(namespace, workload::namespace);
            index.put_namespace(&namespace.name, Some(namespace.labels));
        }
        index.settle();
        indexes.insert(name, index);
    }
    indexes
}

/// Addresses of each node.
fn node_addresses(cluster: &Cluster) -> BTreeMap<String, Vec<IpAddr>> {
    cluster
        .nodes
        .iter()
        .map(|node| {
            let name = node.metadata.name.clone().unwrap();
            let told = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            let told = told.filter_map(|one| one.address.parse().ok());
            let untold = cluster.local_addresses.get(&name).into_iter().flatten().copied();
            let addresses = told.chain(untold).collect();
            (name, addresses)
        })
        .collect()
}

/// What all nodes that see the packet do with it; and what the meaning of the policies says.
fn enforced(
    indexes: &BTreeMap<String, Index>,
    nodes: &BTreeMap<String, Vec<IpAddr>>,
    packet: Packet,
) -> (bool, Explanation) {
    let protocol = match packet.protocol {
        ferroute_oracle::Protocol::Tcp => Protocol::Tcp,
        ferroute_oracle::Protocol::Udp => Protocol::Udp,
        ferroute_oracle::Protocol::Sctp => Protocol::Sctp,
    };
    let flow = Flow { source: packet.from, destination: packet.to, protocol, port: packet.port };
    let mut passes = true;
    let mut own_node = false;
    for (name, index) in indexes {
        let own = |ip: IpAddr| nodes.get(name).is_some_and(|addresses| addresses.contains(&ip));
        let here = |ip: IpAddr| index.pods_with(ip).any(|(_, pod)| pod.is_enforced_here());
        if !here(packet.from) && !here(packet.to) {
            continue;
        }
        own_node |= own(packet.from) && here(packet.to);
        // A pod meets itself through its own Service: IPVS sends from OUTPUT.
        let hook = match () {
            () if own(packet.from) || packet.from == packet.to => Builtin::Output,
            () if own(packet.to) => Builtin::Input,
            () => Builtin::Forward,
        };
        let packet = ferroute_policy::Packet {
            flow,
            hook,
            local_source: own(packet.from),
            local_destination: own(packet.to),
        };
        let ruleset = index.ruleset(Family::of(flow.source)).unwrap();
        passes &= trace(ruleset, index.sets(), &packet).unwrap().verdict != Verdict::Refused;
    }
    // Every node knows the whole cluster.
    let explanation = indexes.values().next().unwrap().explain(&flow, own_node);
    (passes, explanation)
}

/// The first packet on which anybody disagrees.
fn mismatch(cluster: &Cluster, packets: &[Packet]) -> Option<String> {
    if cluster.nodes.is_empty() {
        return None;
    }
    let (indexes, nodes, judge) = (indexes(cluster), node_addresses(cluster), Judge::new(cluster));
    packets.iter().find_map(|packet| {
        let wanted = judge.verdict(*packet);
        let (passes, explanation) = enforced(&indexes, &nodes, *packet);
        (passes != wanted.allowed || explanation.allows() != wanted.allowed).then(|| {
            let word = if passes { "allowed" } else { "refused" };
            format!("{packet}: the judge says {wanted}\nchains: {word}\nexplained: {explanation}")
        })
    })
}

fn compare(shape: &Shape, clusters: u64) -> usize {
    let mut compared = 0;
    for seed in 0..clusters {
        let cluster = shape.cluster(seed);
        let packets = Probes::of(&cluster).sample(&mut Random::new(seed), PACKETS);
        compared += packets.len();
        if mismatch(&cluster, &packets).is_some() {
            let smallest = shrink(cluster, |cluster| mismatch(cluster, &packets).is_some());
            panic!(
                "seed {seed}\n{}\n{}",
                mismatch(&smallest, &packets).unwrap_or_default(),
                manifests(&smallest).unwrap()
            );
        }
    }
    compared
}

#[test]
fn random_clusters_are_judged_alike() {
    let asked = std::env::var("FERROUTE_ORACLE_CLUSTERS").map(|text| text.parse().unwrap());
    let clusters = asked.unwrap_or(CLUSTERS);
    let compared = compare(&Shape::default(), clusters) + compare(&Shape::large(), clusters / 100);
    println!("{clusters} small and {} large clusters, {compared} packets compared", clusters / 100);
    assert!(compared > 50 * usize::try_from(clusters).unwrap(), "hardly anything was asked: {compared}");
}
