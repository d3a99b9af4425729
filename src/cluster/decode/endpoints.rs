//! discovery.k8s.io/v1 EndpointSlice to the Service it belongs to and a [`Slice`].

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::jiff::Timestamp;

use super::service::HEADLESS;
use super::{Decoded, Pool, given, key, port, protocol, shortened, usable_address, whole};
use crate::cluster::endpoints::{Endpoint, Hints, Slice, SlicePort};
use crate::cluster::service::Problem;
use crate::cluster::wire::{EndpointSpec, HintsSpec, Item, LAST_CHANGE, Meta, SliceObject, SlicePortSpec};
use crate::cluster::{ObjectKey, ServiceKey};

/// Label naming the Service of an EndpointSlice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// More bad endpoints than this in one slice are counted, not listed.
const MAX_LISTED: usize = 4;

/// What slices share.
#[derive(Default)]
pub struct Shared {
    /// Node names, zones, namespaces, Service and port names.
    pub texts: Pool<str>,
    hints: Pool<Hints>,
    ports: Pool<[SlicePort]>,
}

/// A slice and where it belongs.
#[derive(Debug)]
pub struct PlacedSlice {
    /// The slice's own key.
    pub key: ObjectKey,
    /// The Service it belongs to.
    pub service: ServiceKey,
    /// The content.
    pub slice: Slice,
    /// When the change it tells of happened, if it says so.
    pub triggered: Option<SystemTime>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// Validates an EndpointSlice.
pub fn slice(item: Item<SliceObject>, shared: &mut Shared) -> Decoded<PlacedSlice> {
    let key = match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => key,
        Err(problem) => return Decoded::Broken(problem),
    };
    let key = ObjectKey { namespace: shared.texts.share(&*key.namespace), name: key.name };
    let object = item.object;
    if object.metadata.labels.contains_key(HEADLESS) {
        return Decoded::NotOurs;
    }
    let ipv6 = match object.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => return Decoded::NotOurs,
        other => {
            return Decoded::Broken(Problem {
                reason: "UnknownAddressType",
                message: format!(
                    "addressType {:?} is not IPv4, IPv6 or FQDN; the last good state stays in force",
                    shortened(other)
                ),
            });
        }
    };
    let Some(service) = service_name(&object.metadata) else { return Decoded::NotOurs };
    let service = ServiceKey { namespace: key.namespace.clone(), name: shared.texts.share(service) };
    let mut problems = Vec::new();
    let ports = ports(&object.ports, shared, &mut problems);
    let endpoints = endpoints(&object.endpoints, ipv6, shared, &mut problems);
    let triggered =
        object.metadata.annotations.0.get(LAST_CHANGE).and_then(|at| at.parse::<Timestamp>().ok());
    Decoded::Ours(PlacedSlice {
        key,
        service,
        slice: Slice { ports, endpoints },
        triggered: triggered.map(SystemTime::from),
        problems,
    })
}

/// The Service that a slice says it belongs to, whatever else in it cannot be read.
pub fn service_of(metadata: &Meta) -> Option<ServiceKey> {
    Some(ServiceKey::new(metadata.namespace.as_str(), service_name(metadata)?))
}

/// The label, else the only owner that is a Service, else what the name was generated from.
fn service_name(metadata: &Meta) -> Option<&str> {
    if let Some(name) = metadata.labels.get(SERVICE_NAME).and_then(|name| given(name)) {
        return Some(name);
    }
    let mut owners = metadata.owner_references.iter().filter(|owner| owner.kind == "Service");
    if let (Some(owner), None) = (owners.next(), owners.next())
        && let Some(name) = given(&owner.name)
    {
        return Some(name);
    }
    given(metadata.generate_name.strip_suffix('-').unwrap_or(&metadata.generate_name))
}

fn ports(written: &[SlicePortSpec], shared: &mut Shared, problems: &mut Vec<Problem>) -> Arc<[SlicePort]> {
    let mut list = Vec::with_capacity(written.len());
    for (index, entry) in written.iter().enumerate() {
        // No number means every port, which no virtual server can express.
        let Some(number) = entry.port else { continue };
        match (protocol(&entry.protocol), port(number)) {
            (Some(protocol), Some(port)) => {
                list.push(SlicePort { name: shared.texts.share(entry.name.as_str()), protocol, port });
            }
            (None, _) => problems.push(Problem {
                reason: "UnknownProtocol",
                message: format!(
                    "ports[{index}].protocol {:?} is not TCP, UDP or SCTP; the port is not served",
                    shortened(&entry.protocol)
                ),
            }),
            (_, None) => problems.push(Problem {
                reason: "InvalidPort",
                message: format!(
                    "ports[{index}].port {number} is not a port (1 to 65535); the port is not served"
                ),
            }),
        }
    }
    shared.ports.share(list)
}

fn endpoints(
    written: &[EndpointSpec],
    ipv6: bool,
    shared: &mut Shared,
    problems: &mut Vec<Problem>,
) -> Vec<Endpoint> {
    let mut list = Vec::with_capacity(written.len());
    let mut seen = HashSet::with_capacity(written.len());
    let mut bad = Vec::new();
    let mut bad_count = 0usize;
    for (index, entry) in written.iter().enumerate() {
        // The addresses of one endpoint are interchangeable (API reference): the first that can be
        // used stands for all.
        let mut address = None;
        for text in &entry.addresses {
            match usable_address(text) {
                Ok(parsed) if parsed.is_ipv6() == ipv6 => {
                    address = Some(parsed);
                    break;
                }
                outcome => {
                    bad_count += 1;
                    if bad.len() < MAX_LISTED {
                        let why = match outcome {
                            Ok(other) => format!("{other} is not of the slice's addressType"),
                            Err(why) => why,
                        };
                        bad.push(format!("endpoints[{index}]: {why}"));
                    }
                }
            }
        }
        let Some(address) = address else { continue };
        if !seen.insert(address) {
            continue;
        }
        let conditions = &entry.conditions;
        let ready = conditions.ready.unwrap_or(true);
        list.push(Endpoint {
            address,
            ready,
            serving: conditions.serving.unwrap_or(ready),
            terminating: conditions.terminating.unwrap_or(false),
            node: given(&entry.node_name).map(|name| shared.texts.share(name)),
            hints: hints(&entry.hints, shared),
        });
    }
    if bad_count > 0 {
        let more = bad_count - bad.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        problems.push(Problem {
            reason: "InvalidAddress",
            message: format!(
                "{}{more}; these addresses get no traffic, the others are served",
                bad.join("; ")
            ),
        });
    }
    list.shrink_to_fit();
    list
}

fn hints(written: &HintsSpec, shared: &mut Shared) -> Option<Arc<Hints>> {
    if written.for_zones.is_empty() && written.for_nodes.is_empty() {
        return None;
    }
    let mut share = |names: &[crate::cluster::wire::Named]| -> Vec<Arc<str>> {
        names.iter().filter_map(|entry| given(&entry.name)).map(|name| shared.texts.share(name)).collect()
    };
    let hints = Hints { zones: share(&written.for_zones), nodes: share(&written.for_nodes) };
    Some(shared.hints.share(hints))
}
