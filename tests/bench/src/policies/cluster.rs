//! The cluster that is measured: policies in namespaces of ten, and pods of which a node runs 110.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use ferroute::cluster::network_policy::NetworkPolicy;
use ferroute::cluster::node::Node;
use ferroute::cluster::workload::{Labels, Namespace, Phase, Pod};
use ferroute::cluster::{Cluster, Kind, ObjectKey};
use ferroute_policy::{Peer, Policy, PolicyPort, PortMatch, Protocol, Requirement, Rule, Selector};

use crate::shape::NODE;

/// Pods on the measured node, the kubelet's usual limit.
pub const LOCAL_PODS: u32 = 110;
/// Pods elsewhere.
const REMOTE_PODS: u32 = 1_000;
/// Policies and local pods of one namespace.
const PER_NAMESPACE: u32 = 10;

/// What must be listed before the room decides.
pub const NEEDED: [Kind; 4] = [Kind::Pod, Kind::Namespace, Kind::NetworkPolicy, Kind::Node];

/// Stores the whole cluster; nothing is marked as listed.
pub fn fill(cluster: &Cluster, policies: u32) -> Result<()> {
    cluster.apply_node(Node {
        name: Arc::from(NODE),
        internal_ips: vec![[192, 0, 2, 11].into()],
        pod_cidrs: vec!["10.1.0.0/16".parse()?],
        ..Node::default()
    });
    let namespaces = policies.max(LOCAL_PODS).div_ceil(PER_NAMESPACE);
    for index in 0..namespaces {
        let labels = Labels::from([("team".into(), format!("t{}", index % 7).into())]);
        cluster.apply_namespace(Namespace { name: namespace(index), labels: Arc::new(labels) });
    }
    for index in 0..policies {
        add_policy(cluster, index / PER_NAMESPACE, index % PER_NAMESPACE, "policy");
    }
    for index in 0..LOCAL_PODS {
        let at = [10, 1, 1, u8::try_from(index + 2)?].into();
        add_pod(cluster, index / PER_NAMESPACE, index % PER_NAMESPACE, "pod", at, true);
    }
    for index in 0..REMOTE_PODS {
        let at = [10, 2, u8::try_from(index / 250)?, u8::try_from(index % 250 + 2)?].into();
        add_pod(cluster, index % namespaces, index / namespaces, "remote", at, false);
    }
    Ok(())
}

fn namespace(index: u32) -> Arc<str> {
    format!("ns-{index:05}").into()
}

fn app(index: u32) -> Selector {
    let value = format!("a{}", index % PER_NAMESPACE).into();
    Selector { requirements: vec![Requirement::In("app".into(), [value].into())] }
}

/// A policy as applications have it: their clients in, DNS and their servers out.
pub fn add_policy(cluster: &Cluster, ns: u32, index: u32, name: &str) {
    let port = |protocol, port| PolicyPort { protocol, ports: PortMatch::Range(port, port) };
    let own = |selector| Peer::Pods { namespaces: None, pods: selector };
    let policy = Policy {
        pod_selector: app(index),
        ingress: Some(vec![Rule {
            peers: Some(vec![own(app(index + 1))]),
            ports: Some(vec![port(Protocol::Tcp, 80)]),
        }]),
        egress: Some(vec![
            Rule {
                peers: Some(vec![Peer::Pods { namespaces: Some(Selector::default()), pods: app(3) }]),
                ports: Some(vec![port(Protocol::Udp, 53), port(Protocol::Tcp, 53)]),
            },
            Rule { peers: Some(vec![own(app(index + 9))]), ports: None },
        ]),
    };
    let key = ObjectKey::new(namespace(ns), format!("{name}-{index}"));
    cluster.apply_network_policy(NetworkPolicy {
        key,
        uid: "u".into(),
        policy: Arc::new(policy),
        problems: Vec::new(),
    });
}

/// Takes a policy of [`add_policy`] away.
pub fn remove_policy(cluster: &Cluster, ns: u32, index: u32, name: &str) {
    cluster.delete_network_policy(&ObjectKey::new(namespace(ns), format!("{name}-{index}")));
}

/// A pod with the label that policy `index` of its namespace selects.
pub fn add_pod(cluster: &Cluster, ns: u32, index: u32, name: &str, at: IpAddr, local: bool) {
    let labels = Labels::from([
        ("app".into(), format!("a{}", index % PER_NAMESPACE).into()),
        ("pod-template-hash".into(), "5d9c7b8f6".into()),
    ]);
    let node = if local { NODE } else { "n2" };
    cluster.apply_pod(Pod {
        key: pod_key(ns, index, name),
        uid: format!("{name}-{index}").into(),
        labels: Arc::new(labels),
        ips: vec![at],
        host_ips: Vec::new(),
        host_network: false,
        phase: Phase::Running,
        node: Some(node.into()),
        ports: Vec::new(),
        ready: true,
        terminating: false,
    });
}

/// The key of a pod of [`add_pod`].
pub fn pod_key(ns: u32, index: u32, name: &str) -> ObjectKey {
    ObjectKey::new(namespace(ns), format!("{name}-{index}"))
}

/// The same pod with another label.
pub fn relabel(cluster: &Cluster, key: &ObjectKey, index: u32) -> Result<()> {
    let mut pod: Pod = (**cluster.read().pods.get(key).context("no such pod")?).clone();
    let mut labels = (*pod.labels).clone();
    labels.insert("app".into(), format!("a{}", index % PER_NAMESPACE).into());
    pod.labels = Arc::new(labels);
    cluster.apply_pod(pod);
    Ok(())
}
