//! The cluster's objects in the policy crate's words. Pure.

use std::net::IpAddr;

use ferroute_iptables::{Family, PortRange};
use ferroute_policy::{Exempt, Key, Options, Pod, ServiceSets};
use ipnet::IpNet;

use super::settings::{Services, Settings};
use super::starting::Starting;
use crate::cluster::workload::{self, Phase};
use crate::cluster::{ObjectKey, State};
use crate::proxy::sets::{Role, SetId};

/// A key in the policy crate's words.
pub fn key(object: &ObjectKey) -> Key {
    Key { namespace: object.namespace.clone(), name: object.name.clone() }
}

/// And back.
pub fn object_key(key: &Key) -> ObjectKey {
    ObjectKey { namespace: key.namespace.clone(), name: key.name.clone() }
}

/// A pod as policies see it; `None` for one that has ended, has no address yet, or whose addresses
/// all belong to others by now.
pub fn pod(pod: &workload::Pod, node: &str, starting: &Starting) -> Option<Pod> {
    if matches!(pod.phase, Phase::Succeeded | Phase::Failed) {
        return None;
    }
    let claimed = starting.addresses(pod);
    let ips = if pod.host_network {
        // All that its node says of itself: traffic may come from any of them.
        let mut ips = pod.ips.clone();
        ips.extend(pod.host_ips.iter().filter(|address| !pod.ips.contains(address)));
        ips
    } else {
        // What the runtime says of this node's pods is newer than what the API server does: a pod
        // whose sandbox was replaced has other addresses than its status still tells.
        let known = claimed.unwrap_or(&pod.ips);
        let free = |ip: &IpAddr| !starting.is_taken(*ip, pod) && !starting.is_stopped(*ip, pod);
        known.iter().copied().filter(free).collect()
    };
    if ips.is_empty() {
        return None;
    }
    Some(Pod {
        labels: pod.labels.clone(),
        ips,
        host_network: pod.host_network,
        local: claimed.is_some() || pod.node.as_deref() == Some(node),
        ports: pod.ports.clone(),
    })
}

/// Pod networks of this node.
pub fn pod_networks(state: &State, node: &str) -> Vec<IpNet> {
    state.nodes.get(node).map(|node| node.pod_cidrs.clone()).unwrap_or_default()
}

/// How rules are written, by what the user chose.
pub fn options(settings: &Settings, families: &[Family]) -> Options {
    let exempt = match &settings.services {
        Services::Own { guarded } => Exempt::Sets(
            families
                .iter()
                .map(|family| {
                    let name = |role| SetId { role, family: *family }.name();
                    let addresses =
                        if *guarded { vec![name(Role::Vips), name(Role::ServiceRanges)] } else { Vec::new() };
                    (*family, ServiceSets { frontends: name(Role::VipPorts), addresses })
                })
                .collect(),
        ),
        Services::Foreign { cluster, external, load_balancer, node_ports } => {
            let words = |ranges: &[IpNet], what: &str| -> Vec<(IpNet, String)> {
                ranges.iter().map(|range| (*range, format!("{what}: {range}"))).collect()
            };
            let mut networks = words(cluster, "cluster IP range");
            networks.extend(words(external, "external IP range"));
            networks.extend(words(load_balancer, "load balancer IP range"));
            let node_ports = PortRange { first: *node_ports.start(), last: *node_ports.end() };
            Exempt::Ranges { networks, node_ports: Some(node_ports) }
        }
    };
    Options { families: families.to_vec(), unknown_pods: settings.unknown_pods, exempt }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::sync_channel;
    use std::time::Instant;

    use super::super::starting::StartingPod;
    use super::*;

    fn object(name: &str, ips: &[&str]) -> workload::Pod {
        workload::Pod {
            key: ObjectKey::new("shop", name),
            uid: name.into(),
            labels: Arc::default(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            host_ips: vec!["192.168.1.1".parse().unwrap()],
            host_network: false,
            phase: Phase::Running,
            node: Some("n1".into()),
            ports: Vec::new(),
            ready: true,
            terminating: false,
        }
    }

    fn seen(object: &workload::Pod, starting: &Starting) -> Option<(Vec<String>, bool)> {
        let pod = pod(object, "n1", starting)?;
        Some((pod.ips.iter().map(ToString::to_string).collect(), pod.local))
    }

    #[test]
    fn pods_as_policies_see_them() {
        let none = Starting::default();
        let running = object("a", &["10.1.0.1", "fd00::1"]);
        assert_eq!(seen(&running, &none), Some((vec!["10.1.0.1".into(), "fd00::1".into()], true)));
        let remote = workload::Pod { node: Some("n2".into()), ..running.clone() };
        assert_eq!(seen(&remote, &none).map(|(_, local)| local), Some(false));
        for phase in [Phase::Succeeded, Phase::Failed] {
            assert_eq!(seen(&workload::Pod { phase, ..running.clone() }, &none), None);
        }
        let terminating = workload::Pod { terminating: true, ..running.clone() };
        assert!(seen(&terminating, &none).is_some(), "its containers still run");
        assert_eq!(seen(&object("b", &[]), &none), None);
        let host = workload::Pod { host_network: true, ..object("c", &[]) };
        assert_eq!(seen(&host, &none), Some((vec!["192.168.1.1".into()], true)));
    }

    #[test]
    fn a_starting_pod_has_its_addresses_at_once_and_alone() {
        let mut starting = Starting::default();
        let (reply, _answer) = sync_channel(1);
        let claim = StartingPod {
            key: ObjectKey::new("shop", "new"),
            uid: Some("new".into()),
            addresses: vec!["10.1.0.1".parse().unwrap()],
        };
        starting.claim(claim, Instant::now(), reply);
        let new = workload::Pod { node: None, phase: Phase::Pending, ..object("new", &[]) };
        assert_eq!(seen(&new, &starting), Some((vec!["10.1.0.1".into()], true)));
        let old = object("old", &["10.1.0.1", "fd00::1"]);
        assert_eq!(seen(&old, &starting), Some((vec!["fd00::1".into()], true)));
        assert_eq!(seen(&object("gone", &["10.1.0.1"]), &starting), None);
        // Its sandbox is replaced: the status still tells the addresses of the one before.
        let replaced = object("new", &["10.1.0.9"]);
        assert_eq!(seen(&replaced, &starting), Some((vec!["10.1.0.1".into()], true)));
        // And then it is stopped.
        let address = vec!["10.1.0.1".parse().unwrap()];
        assert!(starting.stop(&new.key, None, address));
        assert_eq!(seen(&object("new", &["10.1.0.1"]), &starting), None);
        assert!(seen(&object("next", &["10.1.0.1"]), &starting).is_some());
    }

    #[test]
    fn services_are_exempt_by_our_sets_or_by_ranges() {
        let mut settings = Settings {
            node_name: "n1".into(),
            audit_period: std::time::Duration::from_secs(300),
            unknown_pods: ferroute_policy::UnknownPods::Deny,
            services: Services::Own { guarded: true },
        };
        let Exempt::Sets(sets) = options(&settings, &Family::BOTH).exempt else { panic!() };
        assert_eq!(sets[&Family::V6].frontends.as_str(), "inet6:kube-router-svip-prt");
        assert_eq!(sets[&Family::V4].addresses.len(), 2);
        settings.services = Services::Foreign {
            cluster: vec!["10.96.0.0/12".parse().unwrap()],
            external: vec!["203.0.113.0/24".parse().unwrap()],
            load_balancer: Vec::new(),
            node_ports: 30000..=32767,
        };
        let Exempt::Ranges { networks, node_ports } = options(&settings, &Family::BOTH).exempt else {
            panic!()
        };
        assert_eq!(networks[1].1, "external IP range: 203.0.113.0/24");
        assert_eq!(node_ports, Some(PortRange { first: 30000, last: 32767 }));
    }
}
