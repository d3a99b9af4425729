//! Every rule of the decoders, on objects as they travel.

use ferroute_policy::{Peer, PortMatch};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::cluster::endpoints::Slice;
use crate::cluster::network_policy::NetworkPolicy;
use crate::cluster::node::Node;
use crate::cluster::service::{Service, ServiceType, TrafficPolicy};
use crate::cluster::wire::*;
use crate::cluster::workload::{Phase, Pod};

fn item<T: ApiKind>(value: Value) -> Item<T>
where
    Item<T>: DeserializeOwned,
{
    // Through text, as it arrives.
    serde_json::from_str(&value.to_string()).unwrap()
}

/// `base` with `patch` merged into it (RFC 7386).
fn merged(mut base: Value, patch: Value) -> Value {
    fn merge(base: &mut Value, patch: Value) {
        match (base, patch) {
            (Value::Object(base), Value::Object(patch)) => {
                for (key, value) in patch {
                    if value.is_null() {
                        base.remove(&key);
                    } else {
                        merge(base.entry(key).or_insert(Value::Null), value);
                    }
                }
            }
            (base, patch) => *base = patch,
        }
    }
    merge(&mut base, patch);
    base
}

fn plain_service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "cart", "namespace": "shop", "uid": "u1", "creationTimestamp": "2024-01-02T03:04:05Z",
            "managedFields": [{"manager": "x", "fieldsV1": {"f:spec": {}}}],
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00::10"],
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}],
        },
    })
}

fn decoded(patch: Value) -> Decoded<Service> {
    service::service(item(merged(plain_service(), patch)))
}

fn ours(patch: Value) -> Service {
    match decoded(patch.clone()) {
        Decoded::Ours(service) => service,
        other => panic!("{patch}: {other:?}"),
    }
}

fn reasons(problems: &[Problem]) -> Vec<&str> {
    problems.iter().map(|problem| problem.reason).collect()
}

#[test]
fn a_plain_service_is_taken_whole() {
    let service = ours(json!({}));
    assert_eq!(service.key.to_string(), "shop/cart");
    assert_eq!((&*service.uid, service.created), ("u1", 1_704_164_645));
    assert_eq!(service.kind, ServiceType::ClusterIp);
    assert_eq!(
        service.cluster_ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.96.0.10", "fd00::10"]
    );
    let port = &service.ports[0];
    assert_eq!(
        (&*port.name, port.protocol, port.port.get(), port.node_port),
        ("http", Protocol::Tcp, 80, None)
    );
    assert_eq!(service.affinity, None);
    assert_eq!(service.problems, []);
}

#[test]
fn services_that_are_not_ours() {
    for patch in [
        json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}),
        json!({"spec": {"clusterIP": "", "clusterIPs": null}}),
        json!({"spec": {"clusterIP": null, "clusterIPs": null}}),
        json!({"spec": {"type": "ExternalName"}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}}),
    ] {
        assert!(matches!(decoded(patch.clone()), Decoded::NotOurs), "{patch}");
    }
    for name in ["kube-router", "ferroute"] {
        ours(json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": name}}}));
    }
}

#[test]
fn bad_parts_are_named_and_the_rest_is_served() {
    type Check = fn(&Service) -> bool;
    let table: &[(Value, &str, Check)] = &[
        (json!({"spec": {"externalIPs": ["1.2.3.4", "010.0.0.1", "1.2.3.4"]}}), "InvalidAddress", |s| {
            s.external_ips.len() == 1
        }),
        (json!({"spec": {"externalIPs": ["127.0.0.1"]}}), "InvalidAddress", |s| s.external_ips.is_empty()),
        (json!({"spec": {"externalIPs": ["224.0.0.1"]}}), "InvalidAddress", |s| s.external_ips.is_empty()),
        (json!({"spec": {"externalIPs": ["169.254.1.1"]}}), "InvalidAddress", |s| s.external_ips.is_empty()),
        (json!({"spec": {"externalIPs": ["0.0.0.0"]}}), "InvalidAddress", |s| s.external_ips.is_empty()),
        (json!({"spec": {"externalIPs": ["::ffff:1.2.3.4"]}}), "InvalidAddress", |s| {
            s.external_ips.is_empty()
        }),
        (json!({"spec": {"externalIPs": ["fe80::1"]}}), "InvalidAddress", |s| s.external_ips.is_empty()),
        (json!({"spec": {"externalIPs": ["fd00::1%eth0"]}}), "InvalidAddress", |s| s.external_ips.is_empty()),
        (json!({"spec": {"clusterIPs": ["10.96.0.10", "10.96.0.11"]}}), "InvalidAddress", |s| {
            s.cluster_ips.len() == 1
        }),
        (json!({"spec": {"clusterIPs": ["10.96.0.10", "x"]}}), "InvalidAddress", |s| {
            s.cluster_ips.len() == 1
        }),
        (json!({"spec": {"ports": [{"port": 80}, {"port": 80, "name": "b"}]}}), "DuplicatePort", |s| {
            s.ports.len() == 1
        }),
        (json!({"spec": {"ports": [{"port": 80}, {"port": 81}]}}), "DuplicatePort", |s| s.ports.len() == 1),
        (json!({"spec": {"ports": [{"port": 80, "protocol": "ICMP"}]}}), "UnknownProtocol", |s| {
            s.ports.is_empty()
        }),
        (json!({"spec": {"ports": [{"port": 0}]}}), "InvalidPort", |s| s.ports.is_empty()),
        (json!({"spec": {"ports": [{"port": 65536}]}}), "InvalidPort", |s| s.ports.is_empty()),
        (json!({"spec": {"ports": [{"name": "x"}]}}), "InvalidPort", |s| s.ports.is_empty()),
        (json!({"spec": {"ports": [{"port": 80, "nodePort": 70000}]}}), "InvalidPort", |s| {
            s.ports[0].node_port.is_none()
        }),
        (
            json!({"spec": {"ports": [{"name": "a", "port": 80, "nodePort": 30000}, {"name": "b", "port": 81, "nodePort": 30000}]}}),
            "DuplicatePort",
            |s| s.ports.len() == 2 && s.ports[1].node_port.is_none(),
        ),
        (json!({"spec": {"sessionAffinity": "Cookie"}}), "UnknownSessionAffinity", |s| s.affinity.is_none()),
        (
            json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}}),
            "InvalidAffinityTimeout",
            |s| s.affinity == Some(10_800),
        ),
        (
            json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}}),
            "InvalidAffinityTimeout",
            |s| s.affinity == Some(10_800),
        ),
        (json!({"spec": {"externalTrafficPolicy": "Near"}}), "UnknownTrafficPolicy", |s| {
            s.external_policy == TrafficPolicy::Cluster
        }),
        (json!({"spec": {"loadBalancerSourceRanges": ["10.0.0.0/8", "x"]}}), "InvalidSourceRange", |s| {
            s.source_ranges.len() == 1
        }),
        // Nothing readable is left of a restriction: it admits nobody, not everybody.
        (json!({"spec": {"loadBalancerSourceRanges": ["x"]}}), "InvalidSourceRange", |s| {
            s.source_ranges.len() == 2
                && s.source_ranges.iter().all(|r| r.addr().is_unspecified() && r.prefix_len() >= 32)
        }),
        (
            json!({"metadata": {"annotations": {"kube-router.io/service.scheduler": "round robin"}}}),
            "UnknownScheduler",
            |s| s.annotations.scheduler.is_none(),
        ),
        (
            json!({"metadata": {"annotations": {"kube-router.io/service.schedflags": "flag-1"}}}),
            "SchedulerFlagsIgnored",
            |s| s.annotations.sched_flags == 0,
        ),
        (
            json!({"metadata": {"annotations": {"kube-router.io/service.scheduler": "mh", "kube-router.io/service.schedflags": "flag-1, flag-9,flag-2"}}}),
            "UnknownSchedulerFlag",
            |s| s.annotations.sched_flags == 0x18,
        ),
        (
            json!({"metadata": {"annotations": {"kube-router.io/service.advertise.clusterip": "yes"}}}),
            "InvalidAnnotation",
            |s| s.annotations.advertise[0] == Some(false),
        ),
    ];
    for (patch, reason, check) in table {
        let service = ours(patch.clone());
        assert_eq!(reasons(&service.problems), [*reason], "{patch}");
        assert!(check(&service), "{patch}: {service:?}");
    }
}

#[test]
fn good_parts_are_read() {
    let service = ours(json!({
        "metadata": {"annotations": {
            "kube-router.io/service.scheduler": " WLC ", "kube-router.io/service.hairpin": "false",
            "kube-router.io/service.hairpin.externalips": "", "kube-router.io/service.skiplbips": "",
            "kube-router.io/service.dsr": "tunnel", "kube-router.io/service.advertise.loadbalancerip": "T",
        }},
        "spec": {
            "type": "LoadBalancer", "sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32000, "internalTrafficPolicy": "Local", "publishNotReadyAddresses": true,
            "loadBalancerSourceRanges": [" 10.0.0.1/8 "],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}, {"ip": "192.0.2.3", "ipMode": "VIP"}, {"hostname": "x.example"},
        ]}},
    }));
    assert_eq!(service.problems, []);
    let annotations = &service.annotations;
    assert_eq!(annotations.scheduler.as_deref(), Some("wlc"));
    assert!(annotations.hairpin && annotations.hairpin_external_ips && annotations.skip_lb_ips);
    assert_eq!(annotations.dsr.as_deref(), Some("tunnel"));
    assert_eq!(annotations.advertise, [None, None, Some(true)]);
    assert_eq!(
        service.load_balancer_ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["192.0.2.1", "192.0.2.3"]
    );
    assert_eq!(service.affinity, Some(10_800));
    assert_eq!(service.health_check_node_port.map(|port| port.get()), Some(32000));
    assert_eq!(
        (service.external_policy, service.internal_policy),
        (TrafficPolicy::Local, TrafficPolicy::Local)
    );
    assert_eq!(service.source_ranges, ["10.0.0.0/8".parse().unwrap()]);
    assert!(service.publish_not_ready);
    // Only the exact text forces the policies; the health check port needs Local.
    let forced = json!({"metadata": {"annotations": {"kube-router.io/service.local": "true"}}, "spec": {"internalTrafficPolicy": "Local"}});
    let service = ours(forced);
    assert_eq!(
        (service.external_policy, service.internal_policy),
        (TrafficPolicy::Local, TrafficPolicy::Cluster)
    );
    let service = ours(
        json!({"metadata": {"annotations": {"kube-router.io/service.local": "True"}}, "spec": {"type": "LoadBalancer", "healthCheckNodePort": 32000}}),
    );
    assert_eq!((service.external_policy, service.health_check_node_port), (TrafficPolicy::Cluster, None));
}

#[test]
fn what_cannot_be_parsed_is_broken_and_says_where() {
    for (patch, words) in [
        (json!({"spec": {"ports": {"a": 1}}}), "spec.ports is not a list"),
        (json!({"spec": {"ports": [{"port": "80"}]}}), "spec.ports[0].port is not a whole number"),
        (json!({"spec": {"ports": [{"port": 80.5}]}}), "spec.ports[0].port is not a whole number"),
        (json!({"spec": {"ports": [{"port": u64::MAX}]}}), "spec.ports[0].port is not a whole number"),
        (json!({"spec": 7}), "spec is not an object"),
        (json!({"spec": {"externalIPs": [[]]}}), "spec.externalIPs[0] is not a string"),
        (json!({"metadata": {"labels": []}}), "metadata.labels is not a map of strings"),
        (json!({"spec": {"type": "Magic"}}), "spec.type \"Magic\""),
        (json!({"spec": {"clusterIPs": ["x"]}}), "\"x\" is not an IP address"),
        (json!({"metadata": {"name": ""}}), "no metadata.name"),
        (json!({"metadata": {"name": "n".repeat(10_000)}}), "10000 characters"),
    ] {
        match decoded(patch.clone()) {
            Decoded::Broken(problem) => {
                assert!(problem.message.contains(words), "{patch}: {}", problem.message);
                assert!(problem.message.len() < 500);
            }
            other => panic!("{patch}: {other:?}"),
        }
    }
}

fn plain_slice() -> Value {
    json!({
        "metadata": {"name": "cart-abc", "namespace": "shop", "generateName": "made-", "labels": {"kubernetes.io/service-name": "cart"},
            "ownerReferences": [{"kind": "Service", "name": "owner"}]},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.1.0.1"], "conditions": {"ready": true}, "nodeName": "n1"}],
    })
}

fn slice_of(patch: Value) -> Decoded<endpoints::PlacedSlice> {
    endpoints::slice(item(merged(plain_slice(), patch)), &mut endpoints::Shared::default())
}

fn our_slice(patch: Value) -> (String, Slice, Vec<Problem>) {
    match slice_of(patch.clone()) {
        Decoded::Ours(placed) => (placed.service.to_string(), placed.slice, placed.problems),
        other => panic!("{patch}: {other:?}"),
    }
}

#[test]
fn slices_find_their_service() {
    assert_eq!(our_slice(json!({})).0, "shop/cart");
    assert_eq!(our_slice(json!({"metadata": {"labels": null}})).0, "shop/owner");
    assert_eq!(our_slice(json!({"metadata": {"labels": null, "ownerReferences": null}})).0, "shop/made");
    let two = json!([{"kind": "Service", "name": "a"}, {"kind": "Service", "name": "b"}]);
    assert_eq!(our_slice(json!({"metadata": {"labels": null, "ownerReferences": two}})).0, "shop/made");
    for patch in [
        json!({"metadata": {"labels": null, "ownerReferences": null, "generateName": null}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}),
        json!({"addressType": "FQDN"}),
    ] {
        assert!(matches!(slice_of(patch.clone()), Decoded::NotOurs), "{patch}");
    }
    for patch in [json!({"addressType": null}), json!({"endpoints": [7]}), json!({"ports": "x"})] {
        assert!(matches!(slice_of(patch.clone()), Decoded::Broken(_)), "{patch}");
    }
}

#[test]
fn slice_conditions_mean_what_the_api_says() {
    for (conditions, expected) in [
        (json!(null), (true, true, false)),
        (json!({"ready": null}), (true, true, false)),
        (json!({"ready": false}), (false, false, false)),
        (json!({"ready": false, "serving": true, "terminating": true}), (false, true, true)),
        (json!({"ready": true, "serving": false}), (true, false, false)),
    ] {
        let endpoint = json!([{"addresses": ["10.1.0.1"], "conditions": conditions}]);
        let (_, slice, _) = our_slice(json!({"endpoints": endpoint}));
        let one = &slice.endpoints[0];
        assert_eq!((one.ready, one.serving, one.terminating), expected, "{conditions}");
    }
}

#[test]
fn slices_leave_out_what_cannot_be_served() {
    let (_, slice, problems) = our_slice(json!({
        "ports": [{"name": "all"}, {"port": 53, "protocol": "UDP"}, {"port": 0}, {"port": 1, "protocol": "X"}, {"name": null, "port": 9}],
        "endpoints": [
            {"addresses": ["fd00::1"]}, {"addresses": ["x", "10.1.0.2", "10.1.0.3"]}, {"addresses": ["127.0.0.1"]},
            {"addresses": ["169.254.0.1"]}, {"addresses": ["224.0.0.1"]}, {"addresses": ["0.0.0.0"]}, {"addresses": []},
            {"addresses": ["10.1.0.2"]}, {}, {"addresses": null},
        ],
    }));
    let ports: Vec<_> =
        slice.ports.iter().map(|port| (&*port.name, port.protocol, port.port.get())).collect();
    assert_eq!(ports, [("", Protocol::Udp, 53), ("", Protocol::Tcp, 9)]);
    assert_eq!(slice.endpoints.iter().map(|e| e.address.to_string()).collect::<Vec<_>>(), ["10.1.0.2"]);
    assert_eq!(reasons(&problems), ["InvalidPort", "UnknownProtocol", "InvalidAddress"]);
    assert!(problems[2].message.contains("and 2 more"), "{}", problems[2].message);
    let (_, slice, problems) = our_slice(
        json!({"addressType": "IPv6", "endpoints": [{"addresses": ["10.1.0.1"]}, {"addresses": ["fd00::1"]}]}),
    );
    assert_eq!((slice.endpoints.len(), reasons(&problems)), (1, vec!["InvalidAddress"]));
}

#[test]
fn equal_parts_of_slices_are_shared() {
    let mut shared = endpoints::Shared::default();
    let mut one = || {
        let value = merged(
            plain_slice(),
            json!({"endpoints": [
            {"addresses": ["10.1.0.1"], "nodeName": "n1", "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "n1"}]}}]}),
        );
        match endpoints::slice(item(value), &mut shared) {
            Decoded::Ours(placed) => placed.slice,
            other => panic!("{other:?}"),
        }
    };
    let (first, second) = (one(), one());
    assert!(Arc::ptr_eq(&first.ports, &second.ports));
    let (a, b) = (&first.endpoints[0], &second.endpoints[0]);
    assert!(Arc::ptr_eq(a.node.as_ref().unwrap(), b.node.as_ref().unwrap()));
    assert!(Arc::ptr_eq(a.hints.as_ref().unwrap(), b.hints.as_ref().unwrap()));
    let hints = a.hints.as_ref().unwrap();
    assert_eq!((&*hints.zones[0], &*hints.nodes[0]), ("a", "n1"));
}

#[test]
fn pools_forget_what_nobody_holds() {
    let mut pool = Pool::<str>::default();
    let kept = pool.share("kept");
    for index in 0..10_000 {
        pool.share(format!("passing {index}"));
    }
    assert!(pool.known.len() <= 1025, "{}", pool.known.len());
    assert!(Arc::ptr_eq(&kept, &pool.share("kept")));
}

fn our_node(patch: Value) -> (Node, Vec<Problem>) {
    let plain = json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z"}},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"]},
        "status": {"addresses": [{"type": "Hostname", "address": "n1"}, {"type": "ExternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "10.0.0.1"}, {"type": "InternalIP", "address": "fd00::1"}]}});
    match node::node(item(merged(plain, patch.clone()))) {
        Decoded::Ours(node) => node,
        other => panic!("{patch}: {other:?}"),
    }
}

#[test]
fn node_addresses_and_pod_cidrs() {
    let (node, problems) = our_node(json!({}));
    assert_eq!((problems.len(), node.zone.as_deref(), node.excluded_from_external_lb), (0, Some("z"), false));
    assert_eq!(node.address(false).unwrap().to_string(), "10.0.0.1");
    assert_eq!(node.address(true).unwrap().to_string(), "fd00::1");
    let cidrs =
        |patch: Value| our_node(patch).0.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(cidrs(json!({})), ["10.1.0.0/24", "fd00:1::/64"]);
    assert_eq!(cidrs(json!({"spec": {"podCIDRs": null}})), ["10.1.0.0/24"]);
    assert_eq!(
        cidrs(json!({"metadata": {"annotations": {"kube-router.io/pod-cidr": "10.2.0.0/24"}}})),
        ["10.2.0.0/24"]
    );
    let both = json!({"metadata": {"annotations": {"kube-router.io/pod-cidr": "10.2.0.0/24", "kube-router.io/pod-cidrs": "10.3.0.0/24, fd00:3::/64"}}});
    assert_eq!(cidrs(both), ["10.3.0.0/24", "fd00:3::/64"]);
    assert_eq!(cidrs(json!({"spec": null})), [""; 0]);
    let (node, problems) = our_node(
        json!({"metadata": {"labels": {"node.kubernetes.io/exclude-from-external-load-balancers": "false"},
        "annotations": {"kube-router.io/pod-cidrs": "nonsense", "other": "dropped"}}, "status": {"addresses": [{"type": "InternalIP", "address": "x"}]}}),
    );
    assert!(node.excluded_from_external_lb && node.pod_cidrs.is_empty() && node.internal_ips.is_empty());
    assert_eq!(reasons(&problems), ["InvalidAddress", "InvalidCIDR"]);
    assert_eq!(node.annotations.len(), 1);
}

#[test]
fn a_machine_that_goes_is_draining() {
    let draining = |patch: Value| our_node(patch).0.draining;
    let tainted = |key: &str| json!({"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}});
    assert!(!draining(json!({})));
    assert!(draining(tainted("ToBeDeletedByClusterAutoscaler")));
    assert!(draining(tainted("node.kubernetes.io/out-of-service")));
    // A cordoned machine may serve for weeks.
    assert!(!draining(tainted("node.kubernetes.io/unschedulable")));
    assert!(draining(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})));
}

#[test]
fn service_cidrs_count_when_ready() {
    let cidr = |status: Value, deleted: Value| {
        node::service_cidr(item(
            json!({"metadata": {"name": "k", "deletionTimestamp": deleted}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/108"]}, "status": status}),
        ))
    };
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    let refused = json!({"conditions": [{"type": "Ready", "status": "False"}]});
    assert!(matches!(cidr(ready, Value::Null), Decoded::Ours((_, ranges, _)) if ranges.len() == 2));
    assert!(matches!(cidr(Value::Null, Value::Null), Decoded::Ours(_)));
    assert!(matches!(cidr(refused.clone(), Value::Null), Decoded::NotOurs));
    assert!(matches!(cidr(refused, json!("2024-01-01T00:00:00Z")), Decoded::Ours(_)));
}

#[test]
fn pods_keep_what_policy_needs() {
    let value = json!({"metadata": {"name": "p", "namespace": "shop", "labels": {"app": "cart"}, "deletionTimestamp": "2024-01-01T00:00:00Z"},
        "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "web", "containerPort": 8080}, {"containerPort": 1}]}],
            "initContainers": [{"ports": [{"name": "once", "containerPort": 2}]}, {"restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 3, "protocol": "UDP"}]}]},
        "status": {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}, {"ip": "x"}], "conditions": [{"type": "Ready", "status": "True"}]}});
    let Decoded::Ours(Pod { labels, ips, host_network, phase, node, ports, ready, terminating, .. }) =
        workload::pod(item(value), &mut workload::Shared::default())
    else {
        panic!()
    };
    assert_eq!((&*labels["app"], ips.len(), host_network, phase), ("cart", 2, false, Phase::Running));
    assert_eq!((node.as_deref(), ready, terminating), (Some("n1"), true, true));
    assert_eq!(
        ports.iter().map(|port| (&*port.name, port.port.get())).collect::<Vec<_>>(),
        [("web", 8080), ("side", 3)]
    );
}

/// The kubelet gives the object of a static pod the static pod's uid as annotation; CNI names the pod
/// by it.
#[test]
fn a_static_pod_has_the_uid_that_the_runtime_knows() {
    for (annotations, uid) in [
        (json!({}), "object"),
        (json!({"kubernetes.io/config.mirror": "static", "kubernetes.io/config.hash": "static"}), "static"),
    ] {
        let value = json!({"metadata": {"name": "p", "namespace": "shop", "uid": "object", "annotations": annotations}, "spec": {}});
        let Decoded::Ours(pod) = workload::pod(item(value), &mut workload::Shared::default()) else {
            panic!()
        };
        assert_eq!(&*pod.uid, uid);
    }
}

fn policy(spec: Value) -> Decoded<NetworkPolicy> {
    network_policy::network_policy(item(
        json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}),
    ))
}

#[test]
fn network_policies_narrow_what_they_cannot_read() {
    let decoded = |spec: Value| match policy(spec.clone()) {
        Decoded::Ours(policy) => policy,
        other => panic!("{spec}: {other:?}"),
    };
    let ours = |spec: Value| (*decoded(spec).policy).clone();
    let deny = ours(json!({"podSelector": {}}));
    assert_eq!((deny.ingress, deny.egress), (Some(vec![]), None));
    let both = ours(json!({"egress": [{}]}));
    assert_eq!(both.ingress, Some(vec![]));
    assert_eq!(
        both.egress.as_ref().map(|rules| (rules[0].peers.is_none(), rules[0].ports.is_none())),
        Some((true, true))
    );
    let egress = ours(json!({"policyTypes": ["Egress"], "ingress": [{}]}));
    assert_eq!((egress.ingress, egress.egress), (None, Some(vec![])));
    let unknown = decoded(json!({"policyTypes": ["Sideways"]}));
    assert_eq!((unknown.policy.ingress.as_deref(), unknown.policy.egress.is_none()), (Some(&[][..]), true));
    assert_eq!(reasons(&unknown.problems), ["UnknownPolicyType"]);
    let rich = decoded(json!({"ingress": [{
        "from": [{"podSelector": {"matchLabels": {"a": "b"}}}, {"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.9.0.0/8", "except": ["10.1.0.0/16"]}},
            {}, {"ipBlock": {"cidr": "x"}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}},
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.3.0.0/8"]}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["y"]}},
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
            {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}, "podSelector": {}},
            {"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}],
        "ports": [{"port": 80}, {"port": "web", "protocol": "UDP"}, {"port": 1, "endPort": 9}, {"port": 9, "endPort": 1}, {}, {"endPort": 3},
            {"port": "web", "endPort": 3}, {"port": 1, "protocol": "ICMP"}, {"port": 70000}],
    }]}));
    let rule = &rich.policy.ingress.as_ref().unwrap()[0];
    let peers = rule.peers.as_ref().unwrap();
    assert_eq!(peers.len(), 3);
    assert!(
        matches!(&peers[1], Peer::Pods { namespaces: Some(n), pods } if n.requirements.is_empty() && pods.requirements.is_empty())
    );
    assert!(matches!(&peers[2], Peer::Block { cidr, .. } if cidr.to_string() == "10.0.0.0/8"));
    let ports: Vec<_> = rule.ports.as_ref().unwrap().iter().map(|port| port.ports.clone()).collect();
    assert_eq!(
        ports,
        [PortMatch::Range(80, 80), PortMatch::Named("web".into()), PortMatch::Range(1, 9), PortMatch::Any]
    );
    let told = |reason: &str| rich.problems.iter().filter(|problem| problem.reason == reason).count();
    assert_eq!((told("InvalidPeer"), told("InvalidPort"), rich.problems.len()), (8, 5, 13));
    for (index, part) in [
        (0, "spec.ingress[0].from[3] is empty"),
        (2, "except 11.0.0.0/16 is not inside 10.0.0.0/8"),
        (3, "except 10.0.0.0/8 is the whole block"),
        (6, "from[9].namespaceSelector: operator \"Near\" is not known"),
        (8, "ports[3]: 9 to 1 is not a range"),
        (11, "protocol \"ICMP\" is not TCP, UDP or SCTP"),
    ] {
        assert!(rich.problems[index].message.contains(part), "{part}: {:?}", rich.problems[index]);
    }
    for spec in [
        json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}}),
        json!({"ingress": 5}),
    ] {
        assert!(matches!(policy(spec.clone()), Decoded::Broken(_)), "{spec}");
    }
    // A list that became empty because nothing in it was readable still allows nothing.
    let none = ours(json!({"ingress": [{"from": [{}], "ports": [{"port": 0}]}]}));
    let rule = &none.ingress.as_ref().unwrap()[0];
    assert_eq!((rule.peers.as_deref(), rule.ports.as_deref()), (Some(&[][..]), Some(&[][..])));
    // Nor does one whose peers stand in the other direction's field.
    let swapped =
        decoded(json!({"ingress": [{"to": [{"podSelector": {}}]}, {"from": [{"podSelector": {}}]}]}));
    let rules = swapped.policy.ingress.as_ref().unwrap();
    assert_eq!((rules[0].peers.as_deref(), rules[1].peers.as_ref().map(Vec::len)), (Some(&[][..]), Some(1)));
    assert_eq!(reasons(&swapped.problems), ["InvalidRule"]);
}

#[test]
fn a_policy_may_be_as_large_as_the_api_admits() {
    let expressions: Vec<Value> = (0..100)
        .map(|n| json!({"key": format!("k{n}"), "operator": "NotIn", "values": (0..20).map(|v| v.to_string()).collect::<Vec<_>>()}))
        .collect();
    let rules: Vec<Value> =
        (0..500).map(|n| json!({"ports": [{"port": n + 1}], "from": [{"podSelector": {"matchExpressions": expressions}}]})).collect();
    let value = json!({"metadata": {"name": "p".repeat(253), "namespace": "n".repeat(63)}, "spec": {"podSelector": {"matchExpressions": expressions}, "ingress": rules}});
    let Decoded::Ours(policy) = network_policy::network_policy(item(value)) else { panic!() };
    assert!(policy.problems.is_empty());
    assert_eq!(policy.policy.ingress.as_ref().unwrap().len(), 500);
    assert_eq!(policy.policy.pod_selector.requirements.len(), 100);
}

#[test]
fn selectors_match_as_the_api_says() {
    let labels = [("app".into(), "cart".into()), ("tier".into(), "x".into())].into();
    for (selector, expected) in [
        (json!({}), true),
        (json!({"matchLabels": {"app": "cart"}}), true),
        (json!({"matchLabels": {"app": "shop"}}), false),
        (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["cart", "b"]}]}), true),
        (json!({"matchExpressions": [{"key": "gone", "operator": "NotIn", "values": ["b"]}]}), true),
        (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["cart"]}]}), false),
        (json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}), true),
        (json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}), false),
    ] {
        let Decoded::Ours(policy) = policy(json!({"podSelector": selector})) else { panic!("{selector}") };
        assert_eq!(policy.policy.pod_selector.matches(&labels), expected, "{selector}");
    }
}

/// Any JSON, with the API's own field names often enough that it gets deep into the decoders.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        prop::sample::select(vec![
            "None",
            "ClusterIP",
            "10.0.0.1",
            "::1",
            "TCP",
            "IPv4",
            "IPv6",
            "Local",
            "ClientIP",
            "mh",
            "10.0.0.0/8",
            "In"
        ])
        .prop_map(Value::from),
    ];
    let names = prop::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "name",
        "namespace",
        "labels",
        "annotations",
        "ports",
        "port",
        "nodePort",
        "protocol",
        "clusterIP",
        "clusterIPs",
        "externalIPs",
        "type",
        "loadBalancer",
        "ingress",
        "ip",
        "addressType",
        "endpoints",
        "addresses",
        "conditions",
        "ready",
        "hints",
        "forZones",
        "ownerReferences",
        "kind",
        "podCIDRs",
        "address",
        "kubernetes.io/service-name",
        "kube-router.io/service.scheduler",
        "kube-router.io/service.schedflags",
        "podSelector",
        "matchExpressions",
        "key",
        "operator",
        "values",
        "from",
        "to",
        "egress",
        "ipBlock",
        "cidr",
        "except",
        "endPort",
        "sessionAffinity",
        "loadBalancerSourceRanges",
        "podIPs",
        "containers",
        "containerPort",
        "cidrs",
    ])
    .prop_map(str::to_owned);
    leaf.prop_recursive(6, 96, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(names.clone(), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_json_breaks_a_decoder(value in any_value(), metadata in any_value(), spec in any_value()) {
        let named = json!({"metadata": {"name": "a", "namespace": "b", "labels": {"kubernetes.io/service-name": "c"}}, "spec": spec, "addressType": "IPv4",
            "endpoints": value["endpoints"], "ports": value["ports"], "status": value});
        for value in [value, json!({"metadata": metadata, "spec": spec}), named] {
            let _ = service::service(item(value.clone()));
            let _ = endpoints::slice(item(value.clone()), &mut endpoints::Shared::default());
            let _ = node::node(item(value.clone()));
            let _ = node::service_cidr(item(value.clone()));
            let _ = workload::pod(item(value.clone()), &mut workload::Shared::default());
            let _ = workload::namespace(item(value.clone()));
            let _ = network_policy::network_policy(item(value));
        }
    }

    #[test]
    fn decoding_from_text_and_from_values_agree(patch in any_value()) {
        let value = merged(plain_service(), json!({"spec": patch}));
        let from_text: Item<ServiceObject> = serde_json::from_str(&value.to_string()).unwrap();
        let from_value: Item<ServiceObject> = serde_json::from_value(value).unwrap();
        prop_assert_eq!(format!("{:?}", from_text), format!("{:?}", from_value));
    }
}
