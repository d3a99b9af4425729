//! Laws of the index: the order of changes does not matter, touched tells all, and what chains and sets do
//! to a packet is what the policies mean.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A failed test may panic anywhere.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ferroute_iptables::{Builtin, Family};
use ferroute_policy::{
    Direction, Exempt, Flow, Index, Key, Labels, NamedPort, Options, Packet, Peer, Pod, Policy, PolicyPort,
    PortMatch, Protocol, Requirement, Rule, Selector, UnknownPods, Verdict, trace,
};
use ipnet::IpNet;
use proptest::prelude::*;

fn index() -> Index {
    let mut index = Index::new(Options {
        families: Family::BOTH.to_vec(),
        unknown_pods: UnknownPods::Deny,
        exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
    });
    index.set_pod_networks(vec!["10.1.0.0/28".parse().unwrap(), "fd00:1::/64".parse().unwrap()]);
    index
}

/// One change of the cluster.
#[derive(Clone, Debug)]
enum Change {
    Pod(Key, Option<Pod>),
    Namespace(Arc<str>, Option<Labels>),
    Policy(Key, Option<Policy>),
}

fn apply(index: &mut Index, change: &Change) {
    match change {
        Change::Pod(key, pod) => index.put_pod(key, pod.clone()),
        Change::Namespace(name, labels) => index.put_namespace(name, labels.clone().map(Arc::new)),
        Change::Policy(key, policy) => index.put_policy(key, policy.clone().map(Arc::new)),
    }
}

fn any_labels() -> impl Strategy<Value = Labels> {
    prop::collection::btree_map("[ab]", "[xy]", 0..3)
        .prop_map(|labels| labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
}

fn any_selector() -> impl Strategy<Value = Selector> {
    let requirement =
        (0u8..4, "[ab]", prop::collection::btree_set("[xy]", 1..3)).prop_map(|(kind, key, values)| {
            let key = key.into();
            let values = values.into_iter().map(Into::into).collect();
            match kind {
                0 => Requirement::In(key, values),
                1 => Requirement::NotIn(key, values),
                2 => Requirement::Exists(key),
                _ => Requirement::DoesNotExist(key),
            }
        });
    prop::collection::vec(requirement, 0..2).prop_map(|requirements| Selector { requirements })
}

fn any_net() -> impl Strategy<Value = IpNet> {
    let v4 = (0u8..16, prop::sample::select(vec![0u8, 8, 24, 28, 30, 32]))
        .prop_map(|(last, length)| IpNet::new([10, 1, 0, last].into(), length).unwrap());
    let v6 = (0u16..16, prop::sample::select(vec![0u8, 64, 124, 126, 128])).prop_map(|(last, length)| {
        IpNet::new(IpAddr::from([0xfd00, 1, 0, 0, 0, 0, 0, last]), length).unwrap()
    });
    prop_oneof![v4, v6].prop_map(|net| net.trunc())
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let pods = (prop::option::of(any_selector()), any_selector())
        .prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods });
    let block = (any_net(), prop::collection::vec(any_net(), 0..3)).prop_map(|(cidr, except)| Peer::Block {
        cidr,
        except: except.into_iter().filter(|net| cidr.contains(net)).collect(),
    });
    prop_oneof![pods, block]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(Protocol::ALL.to_vec())
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let ports = prop_oneof![
        Just(PortMatch::Any),
        (1u16..6, 0u16..3).prop_map(|(first, more)| PortMatch::Range(first, first + more)),
        "[pq]".prop_map(|name| PortMatch::Named(name.into())),
    ];
    let port = (any_protocol(), ports).prop_map(|(protocol, ports)| PolicyPort { protocol, ports });
    (
        prop::option::of(prop::collection::vec(any_peer(), 0..3)),
        prop::option::of(prop::collection::vec(port, 0..3)),
    )
        .prop_map(|(peers, ports)| Rule { peers, ports })
}

fn any_key() -> impl Strategy<Value = Key> {
    ("[mn]", "[a-l]").prop_map(|(namespace, name)| Key::new(namespace, name))
}

fn any_change() -> impl Strategy<Value = Change> {
    let named = ("[pq]", any_protocol(), 1u16..6).prop_map(|(name, protocol, port)| NamedPort {
        name: name.into(),
        protocol,
        port: NonZeroU16::new(port).unwrap(),
    });
    let pod = (any_labels(), 1u8..15, any::<(bool, bool)>(), 0u8..8, prop::collection::vec(named, 0..3))
        .prop_map(|(labels, last, (local, v6), host, ports)| {
            let net = if local { 1 } else { 2 };
            let mut ips = vec![IpAddr::from([10, net, 0, last])];
            if v6 {
                ips.push(IpAddr::from([0xfd00, u16::from(net), 0, 0, 0, 0, 0, u16::from(last)]));
            }
            let host_network = host == 0;
            if host_network {
                ips = vec![IpAddr::from([192, 168, 0, net])];
            }
            Pod { labels: Arc::new(labels), ips, host_network, local, ports }
        });
    let rules = || prop::option::of(prop::collection::vec(any_rule(), 0..3));
    let policy = (any_selector(), rules(), rules()).prop_map(|(pod_selector, ingress, egress)| Policy {
        pod_selector,
        ingress,
        egress,
    });
    prop_oneof![
        5 => (any_key(), prop::option::weighted(0.8, pod)).prop_map(|(key, pod)| Change::Pod(key, pod)),
        3 => (any_key(), prop::option::weighted(0.8, policy)).prop_map(|(key, policy)| Change::Policy(key, policy)),
        1 => ("[mn]", prop::option::weighted(0.8, any_labels()))
            .prop_map(|(name, labels)| Change::Namespace(name.into(), labels)),
    ]
}

/// Sets and chains of both families, comparable.
fn state(index: &Index) -> (ferroute_iptables::ipset::Sets, Vec<ferroute_iptables::Ruleset>) {
    (
        index.sets().clone(),
        Family::BOTH.iter().map(|family| index.ruleset(*family).unwrap().clone()).collect(),
    )
}

/// The chains a local pod's packet passes where it is sent and where it arrives: here both.
fn judged(index: &Index, flow: &Flow) -> bool {
    let ruleset = index.ruleset(Family::of(flow.source)).unwrap();
    let packet =
        Packet { flow: *flow, hook: Builtin::Forward, local_source: false, local_destination: false };
    let trace = trace(ruleset, index.sets(), &packet).unwrap();
    assert_ne!(trace.verdict, Verdict::LeftToOthers, "about a local pod");
    trace.verdict == Verdict::Accepted
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_way_there_does_not_matter_and_touched_tells_all(
        changes in prop::collection::vec(any_change(), 1..40), pauses in prop::collection::vec(any::<bool>(), 40),
    ) {
        let mut stepwise = index();
        stepwise.settle();
        for (change, pause) in changes.iter().zip(&pauses) {
            apply(&mut stepwise, change);
            if *pause {
                let before = state(&stepwise);
                let touched = stepwise.settle();
                let after = state(&stepwise);
                for (name, set) in after.0.iter().chain(&before.0) {
                    let (old, new) = (before.0.get(name), after.0.get(name));
                    let known = touched.sets.contains(name);
                    prop_assert!(known || (old.is_some() && new.is_some()), "{} came or went untold", name);
                    for entry in set.entries().keys() {
                        let same = old.map(|s| s.entries().get(entry)) == new.map(|s| s.entries().get(entry));
                        prop_assert!(same || known || touched.entries.contains(&(*name, *entry)), "{} in {}", entry, name);
                    }
                }
                for (at, family) in Family::BOTH.into_iter().enumerate() {
                    let chains = before.1[at].chains.keys().chain(after.1[at].chains.keys());
                    for chain in chains {
                        let same = before.1[at].chains.get(chain) == after.1[at].chains.get(chain);
                        prop_assert!(same || touched.chains.contains(&(family, *chain)), "{}", chain);
                    }
                }
            }
        }
        stepwise.settle();
        // Only the last word about each object, in another order, all at once.
        let mut last: BTreeMap<String, &Change> = BTreeMap::new();
        for change in &changes {
            let name = match change {
                Change::Pod(key, _) => format!("c pod {key}"),
                Change::Policy(key, _) => format!("a policy {key}"),
                Change::Namespace(name, _) => format!("b namespace {name}"),
            };
            last.insert(name, change);
        }
        let mut fresh = index();
        for change in last.values() {
            apply(&mut fresh, change);
        }
        fresh.settle();
        prop_assert_eq!(state(&stepwise), state(&fresh));
        prop_assert!(stepwise.settle().is_empty(), "nothing is left to do");
    }

    #[test]
    fn chains_and_sets_do_what_the_policies_mean(changes in prop::collection::vec(any_change(), 1..40)) {
        let mut index = index();
        for change in &changes {
            apply(&mut index, change);
        }
        index.settle();
        let mut addresses: Vec<IpAddr> = Vec::new();
        for net in [1u8, 2] {
            for last in 1u8..15 {
                addresses.push([10, net, 0, last].into());
                addresses.push([0xfd00, u16::from(net), 0, 0, 0, 0, 0, u16::from(last)].into());
            }
            addresses.push([192, 168, 0, net].into());
        }
        let pods = |ip: IpAddr| index.pods_with(ip).filter(|(_, pod)| pod.is_enforced_here()).count();
        for source in &addresses {
            for destination in &addresses {
                let here = (pods(*source), pods(*destination));
                // Two pods with one address at once: which of them is meant cannot be known. An address of
                // the local pod network that nobody has is closed, which explain does not speak of.
                let local = |ip: &IpAddr| {
                    ["10.1.0.0/28", "fd00:1::/64"].iter().any(|net| net.parse::<IpNet>().unwrap().contains(ip))
                };
                let unknown = (local(source) && here.0 == 0) || (local(destination) && here.1 == 0);
                if source.is_ipv4() != destination.is_ipv4() || here.0 > 1 || here.1 > 1 || here == (0, 0) || unknown
                    || source == destination || index.pods_with(*source).count() > 1 || index.pods_with(*destination).count() > 1
                {
                    continue;
                }
                for protocol in Protocol::ALL {
                    for port in 1..9 {
                        let flow = Flow { source: *source, destination: *destination, protocol, port };
                        let explanation = index.explain(&flow, false);
                        // A pod elsewhere is judged elsewhere.
                        let meant = match &explanation {
                            ferroute_policy::Explanation::Judged { egress, ingress } => {
                                egress.iter().filter(|_| here.0 == 1).chain(ingress.iter().filter(|_| here.1 == 1)).all(|side| side.allows())
                            }
                            other => other.allows(),
                        };
                        prop_assert_eq!(judged(&index, &flow), meant, "{:?}: {}", flow, explanation);
                    }
                }
            }
        }
    }
}

#[test]
fn rules_met_do_not_grow_with_the_pods() {
    let met = |pods: u8| {
        let mut index = index();
        index.set_pod_networks(vec!["10.1.0.0/24".parse().unwrap()]);
        for pod in 1..=pods {
            let labels = Labels::from([("own".into(), format!("{pod}").into())]);
            let selector = |value: String| Selector {
                requirements: vec![Requirement::In("own".into(), [value.into()].into())],
            };
            // Each pod has a policy of its own: nothing can be shared.
            index.put_policy(
                &Key::new("n", format!("p{pod}")),
                Some(Arc::new(Policy {
                    pod_selector: selector(pod.to_string()),
                    ingress: Some(vec![Rule { peers: None, ports: None }]),
                    egress: None,
                })),
            );
            index.put_pod(
                &Key::new("n", format!("pod{pod}")),
                Some(Pod {
                    labels: Arc::new(labels),
                    ips: vec![IpAddr::from([10, 1, 0, pod])],
                    host_network: false,
                    local: true,
                    ports: Vec::new(),
                }),
            );
        }
        index.settle();
        (1..=pods)
            .map(|pod| {
                let flow = Flow {
                    source: [10, 9, 0, 1].into(),
                    destination: [10, 1, 0, pod].into(),
                    protocol: Protocol::Tcp,
                    port: 80,
                };
                let packet =
                    Packet { flow, hook: Builtin::Forward, local_source: false, local_destination: false };
                let trace = trace(index.ruleset(Family::V4).unwrap(), index.sets(), &packet).unwrap();
                assert_eq!(trace.verdict, Verdict::Accepted);
                trace.rules_met
            })
            .max()
            .unwrap()
    };
    let (few, many) = (met(8), met(250));
    // Five more levels of the tree, at most two rules each.
    assert!(many <= few + 10, "{few} rules met with 8 pods, {many} with 250");
}

#[test]
fn a_pod_start_is_set_entries_only() {
    let mut index = index();
    let policy = Policy {
        pod_selector: Selector::default(),
        ingress: Some(vec![Rule {
            peers: Some(vec![Peer::Pods { namespaces: None, pods: Selector::default() }]),
            ports: None,
        }]),
        egress: None,
    };
    index.put_policy(&Key::new("n", "p"), Some(Arc::new(policy)));
    let pod = |last: u8| Pod {
        labels: Arc::default(),
        ips: vec![IpAddr::from([10, 1, 0, last])],
        host_network: false,
        local: true,
        ports: Vec::new(),
    };
    index.put_pod(&Key::new("n", "a"), Some(pod(1)));
    index.settle();
    index.put_pod(&Key::new("n", "b"), Some(pod(2)));
    let touched = index.settle();
    assert!(touched.chains.is_empty() && touched.sets.is_empty(), "{touched:?}");
    // Known, isolated, itself, in the group, and a peer of the others.
    assert_eq!(touched.entries.len(), 5, "{touched:?}");
    let isolated: Vec<_> = index.isolated().map(|(direction, pod, _)| (direction, pod.to_string())).collect();
    assert_eq!(isolated, [(Direction::Ingress, "n/a".to_owned()), (Direction::Ingress, "n/b".to_owned())]);
}
