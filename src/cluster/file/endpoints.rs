//! EndpointSlices for folders that have none: a Service with a selector and Pods with addresses
//! are enough on an edge host, where nobody runs the controller that would join them.
//!
//! A Service with any EndpointSlice of its own in the folder is left alone. Small by intent: all
//! Pods of a namespace are tried against all its Services whenever the folder changes.

use std::collections::BTreeMap;

use crate::cluster::ObjectKey;
use crate::cluster::decode::protocol;
use crate::cluster::wire::{
    Conditions, EndpointSpec, Meta, NumberOrName, PodObject, ServicePortSpec, SliceObject, SlicePortSpec,
};
use crate::cluster::workload::Labels;

/// What of a Service is needed to find its Pods.
#[derive(Clone, Debug)]
pub struct Selecting {
    /// `spec.selector`, never empty.
    pub selector: Labels,
    /// `spec.ports`.
    pub ports: Vec<ServicePortSpec>,
}

/// The slices a controller would have made for one Service, by name. Pods that give different
/// numbers to a named target port are in different slices.
pub fn slices(
    service: &ObjectKey,
    selecting: &Selecting,
    pods: &BTreeMap<ObjectKey, PodObject>,
) -> BTreeMap<String, SliceObject> {
    let mut slices = BTreeMap::new();
    for (key, pod) in pods {
        let labels = &pod.metadata.labels;
        let selected = key.namespace == service.namespace
            && selecting.selector.iter().all(|(name, value)| labels.get(name) == Some(value));
        if !selected || matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
            continue;
        }
        let ports: Vec<SlicePortSpec> = selecting.ports.iter().filter_map(|port| target(port, pod)).collect();
        let numbers: Vec<String> =
            ports.iter().map(|port| port.port.unwrap_or_default().to_string()).collect();
        let mut addresses: Vec<&str> = pod.status.pod_ips.iter().map(|entry| entry.ip.as_str()).collect();
        if addresses.is_empty() && !pod.status.pod_ip.is_empty() {
            addresses.push(&pod.status.pod_ip);
        }
        for address in addresses {
            let family = if address.contains(':') { "IPv6" } else { "IPv4" };
            let name = format!("{}-{}-{}", service.name, family.to_lowercase(), numbers.join("-"));
            let slice = slices.entry(name.clone()).or_insert_with(|| SliceObject {
                metadata: Meta {
                    name,
                    namespace: service.namespace.to_string(),
                    labels: Labels::from([("kubernetes.io/service-name".into(), (&*service.name).into())]),
                    ..Meta::default()
                },
                address_type: family.to_owned(),
                ports: ports.clone(),
                endpoints: Vec::new(),
            });
            slice.endpoints.push(EndpointSpec {
                addresses: vec![address.to_owned()],
                conditions: conditions(pod),
                node_name: pod.spec.node_name.clone(),
                ..EndpointSpec::default()
            });
        }
    }
    slices
}

/// The port of a Pod that a Service port leads to; `None` if the Pod has no port of that name.
fn target(port: &ServicePortSpec, pod: &PodObject) -> Option<SlicePortSpec> {
    let number = match &port.target_port {
        NumberOrName::Number(number) => *number,
        NumberOrName::Absent => port.port?,
        NumberOrName::Name(name) => {
            pod.spec
                .containers
                .iter()
                .flat_map(|container| &container.ports)
                .find(|declared| declared.name == *name && same_protocol(&declared.protocol, &port.protocol))?
                .container_port?
        }
    };
    Some(SlicePortSpec { name: port.name.clone(), protocol: port.protocol.clone(), port: Some(number) })
}

fn same_protocol(one: &str, other: &str) -> bool {
    protocol(one).is_some() && protocol(one) == protocol(other)
}

/// A Pod written by hand seldom has conditions; without `Ready` it counts as ready.
fn conditions(pod: &PodObject) -> Conditions {
    let ready = pod.status.conditions.iter().find(|c| c.kind == "Ready").is_none_or(|c| c.status == "True");
    let terminating = !pod.metadata.deletion_timestamp.is_empty();
    Conditions { ready: Some(ready && !terminating), serving: Some(ready), terminating: Some(terminating) }
}
