//! core/v1 Node to [`Node`], networking.k8s.io ServiceCIDR to its ranges.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Decoded, given, key, shortened, whole};
use crate::cluster::node::{Annotations, Node};
use crate::cluster::service::Problem;
use crate::cluster::wire::{Item, NodeObject, ServiceCidrObject};

/// Label that keeps a node out of external load balancers, whatever its value.
const EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Taints of machines that are about to go, whatever their effect: the autoscaler removes it, or
/// somebody has found it dead.
const GOING: [&str; 2] = ["ToBeDeletedByClusterAutoscaler", "node.kubernetes.io/out-of-service"];
/// Label naming the zone of a node.
const ZONE: &str = "topology.kubernetes.io/zone";

/// Validates a Node.
pub fn node(item: Item<NodeObject>) -> Decoded<(Node, Vec<Problem>)> {
    let key = match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => key,
        Err(problem) => return Decoded::Broken(problem),
    };
    let NodeObject { metadata, spec, status } = item.object;
    let mut problems = Vec::new();
    let (mut internal_ips, mut external_ips) = (Vec::new(), Vec::new());
    for entry in &status.addresses {
        let list = match entry.kind.as_str() {
            "InternalIP" => &mut internal_ips,
            "ExternalIP" => &mut external_ips,
            _ => continue,
        };
        // Link-local node addresses exist, so only what cannot be an address at all is refused.
        match entry.address.parse::<IpAddr>() {
            Ok(address) if address.is_unspecified() || address.is_multicast() => problems.push(Problem {
                reason: "InvalidAddress",
                message: format!(
                    "status.addresses: {address} cannot be a {} of a node and is ignored",
                    entry.kind
                ),
            }),
            Ok(address) if !list.contains(&address) => list.push(address),
            Ok(_) => {}
            Err(_) => problems.push(Problem {
                reason: "InvalidAddress",
                message: format!(
                    "status.addresses: {} {:?} is not an IP address and is ignored",
                    entry.kind,
                    shortened(&entry.address)
                ),
            }),
        }
    }
    let annotations = metadata.annotations.0;
    let annotation = |name: &str| annotations.get(name).and_then(|text| given(text.trim()));
    let (source, written): (&str, Vec<&str>) = if let Some(text) = annotation("kube-router.io/pod-cidrs") {
        ("annotation kube-router.io/pod-cidrs", text.split(',').map(str::trim).collect())
    } else if let Some(text) = annotation("kube-router.io/pod-cidr") {
        ("annotation kube-router.io/pod-cidr", vec![text])
    } else if spec.pod_cidrs.is_empty() {
        ("spec.podCIDR", given(&spec.pod_cidr).into_iter().collect())
    } else {
        ("spec.podCIDRs", spec.pod_cidrs.iter().map(String::as_str).collect())
    };
    let pod_cidrs = cidrs(source, written.into_iter().filter(|text| !text.is_empty()), &mut problems);
    let node = Node {
        name: key.name,
        uid: metadata.uid.as_str().into(),
        internal_ips,
        external_ips,
        pod_cidrs,
        provider_id: given(&spec.provider_id).map(Into::into),
        zone: metadata.labels.get(ZONE).and_then(|zone| given(zone)).map(Into::into),
        excluded_from_external_lb: metadata.labels.contains_key(EXCLUDE),
        draining: !metadata.deletion_timestamp.is_empty()
            || spec.taints.iter().any(|taint| GOING.contains(&taint.key.as_str())),
        annotations: Annotations(annotations),
    };
    Decoded::Ours((node, problems))
}

/// A ServiceCIDR's name, ranges and problems.
pub type ServiceCidr = (Arc<str>, Vec<IpNet>, Vec<Problem>);

/// Validates a ServiceCIDR. One that is not ready has no ranges.
pub fn service_cidr(item: Item<ServiceCidrObject>) -> Decoded<ServiceCidr> {
    let key = match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => key,
        Err(problem) => return Decoded::Broken(problem),
    };
    let object = item.object;
    let refused = object
        .status
        .conditions
        .iter()
        .any(|condition| condition.kind == "Ready" && condition.status != "True");
    // A range that is being deleted still has Services in it until the object is gone.
    let terminating = !object.metadata.deletion_timestamp.is_empty();
    if refused && !terminating {
        return Decoded::NotOurs;
    }
    let mut problems = Vec::new();
    let ranges = cidrs("spec.cidrs", object.spec.cidrs.iter().map(String::as_str), &mut problems);
    Decoded::Ours((key.name, ranges, problems))
}

fn cidrs<'a>(
    source: &str,
    written: impl Iterator<Item = &'a str>,
    problems: &mut Vec<Problem>,
) -> Vec<IpNet> {
    let mut list: Vec<IpNet> = Vec::new();
    for text in written {
        match text.parse::<IpNet>() {
            Ok(range) if !list.contains(&range.trunc()) => list.push(range.trunc()),
            Ok(_) => {}
            Err(_) => problems.push(Problem {
                reason: "InvalidCIDR",
                message: format!("{source}: {:?} is not a CIDR and is ignored, correct it", shortened(text)),
            }),
        }
    }
    list
}
