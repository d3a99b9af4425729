//! core/v1 Pod and Namespace to [`Pod`] and [`Namespace`].

use std::net::IpAddr;

use super::{Decoded, Pool, given, key, policy_protocol, port, usable_address, whole};
use crate::cluster::wire::{Item, MIRROR, NamespaceObject, PodIp, PodObject};
use crate::cluster::workload::{Labels, NamedPort, Namespace, Phase, Pod};

/// What pods share.
#[derive(Default)]
pub struct Shared {
    /// Node names.
    pub texts: Pool<str>,
    /// Labels: equal for all pods of a ReplicaSet.
    labels: Pool<Labels>,
}

/// Validates a Pod.
pub fn pod(item: Item<PodObject>, shared: &mut Shared) -> Decoded<Pod> {
    let key = match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => key,
        Err(problem) => return Decoded::Broken(problem),
    };
    let PodObject { metadata, spec, status } = item.object;
    let kept = spec.init_containers.iter().filter(|container| container.restart_policy == "Always");
    let ports = spec
        .containers
        .iter()
        .chain(kept)
        .flat_map(|container| &container.ports)
        .filter_map(|written| {
            Some(NamedPort {
                name: given(&written.name)?.into(),
                protocol: policy_protocol(&written.protocol)?,
                port: port(written.container_port?)?,
            })
        })
        .collect();
    // The runtime knows a static pod by another uid than the object that stands for it.
    let uid = metadata.annotations.0.get(MIRROR).map_or(metadata.uid.as_str(), |uid| uid);
    Decoded::Ours(Pod {
        key,
        uid: uid.into(),
        labels: shared.labels.share(metadata.labels),
        ips: addresses(&status.pod_ips, &status.pod_ip),
        host_ips: addresses(&status.host_ips, &status.host_ip),
        host_network: spec.host_network.unwrap_or(false),
        phase: match status.phase.as_str() {
            "Running" => Phase::Running,
            "Succeeded" => Phase::Succeeded,
            "Failed" => Phase::Failed,
            "Unknown" => Phase::Unknown,
            _ => Phase::Pending,
        },
        node: given(&spec.node_name).map(|name| shared.texts.share(name)),
        ports,
        ready: status.conditions.iter().any(|entry| entry.kind == "Ready" && entry.status == "True"),
        terminating: !metadata.deletion_timestamp.is_empty(),
    })
}

/// Validates a Namespace.
pub fn namespace(item: Item<NamespaceObject>) -> Decoded<Namespace> {
    match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => Decoded::Ours(Namespace { name: key.name, labels: item.object.metadata.labels.into() }),
        Err(problem) => Decoded::Broken(problem),
    }
}

/// The kubelet writes these, so one that does not parse is dropped without a word.
fn addresses(list: &[PodIp], single: &str) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let written = list.iter().map(|entry| entry.ip.as_str()).chain(given(single).filter(|_| list.is_empty()));
    for address in written.filter_map(|text| usable_address(text).ok()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}
