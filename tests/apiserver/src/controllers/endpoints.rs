//! Services and pods to EndpointSlices.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Controllers, SLICES, has_condition, is_terminating, owner};
use crate::clock;
use crate::selector::LabelSelector;
use crate::store::{Key, Object};
use crate::verbs::Part;

/// Endpoints per slice, the default of the real controller.
const FULL: usize = 100;
const MANAGER: &str = "endpointslice-controller.k8s.io";

/// Port list of a slice (as JSON text, so that it orders), and its endpoints by pod uid.
type Groups = BTreeMap<String, BTreeMap<String, Value>>;

impl Controllers {
    pub(super) fn look_at_endpoints(&mut self, key: &Key) {
        let Some(service) = self.find("services", key).filter(|s| !is_terminating(s)) else {
            for name in self.slices.remove(key).into_iter().flatten() {
                self.delete(SLICES, &Key::new(&key.namespace, &name), None);
            }
            self.delete("endpoints", key, None);
            return;
        };
        let spec = &service["spec"];
        let selector = LabelSelector::from_map(&spec["selector"]);
        if selector.is_empty() || spec["type"] == "ExternalName" {
            // Slices of a Service without selector are the user's; ours go with the selector.
            for name in self.slices.remove(key).into_iter().flatten() {
                self.delete(SLICES, &Key::new(&key.namespace, &name), None);
            }
            return;
        }
        let mut pods = self.in_namespace("pods", &key.namespace);
        pods.retain(|p| {
            let ended = matches!(p.value()["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
            !ended && selector.matches(&p.labels)
        });
        let zones = self.zones();
        let mut kept = BTreeSet::new();
        for family in spec["ipFamilies"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let groups = group(&service, &pods, family, &zones);
            kept.extend(self.write_slices(key, &service, family, groups));
        }
        let before = self.slices.insert(key.clone(), kept.clone()).unwrap_or_default();
        for name in before.difference(&kept) {
            self.delete(SLICES, &Key::new(&key.namespace, name), None);
        }
        self.write_legacy(key, &service, &pods);
    }

    fn zones(&self) -> HashMap<String, String> {
        let nodes = self.state.store.all("nodes", &crate::selector::Scope::default());
        let zone = |o: &Arc<Object>| o.labels.get("topology.kubernetes.io/zone").cloned();
        nodes.iter().filter_map(|o| Some((o.key.name.clone(), zone(o)?))).collect()
    }

    /// Writes the slices of one family; returns their names. Endpoints stay in the slice they are in,
    /// so that a change touches one slice.
    fn write_slices(&self, key: &Key, service: &Value, family: &str, groups: Groups) -> Vec<String> {
        let mut names = Vec::new();
        let present: Vec<Arc<Value>> = self
            .slices
            .get(key)
            .into_iter()
            .flatten()
            .filter_map(|name| self.find(SLICES, &Key::new(&key.namespace, name)))
            .filter(|slice| slice["addressType"] == family)
            .collect();
        let empty = groups.is_empty();
        for (ports, mut wanted) in groups {
            let ports: Value = serde_json::from_str(&ports).unwrap_or(Value::Null);
            for slice in present.iter().filter(|s| s["ports"] == ports) {
                let mut endpoints: Vec<Value> = Vec::new();
                for old in slice["endpoints"].as_array().into_iter().flatten() {
                    let uid = old["targetRef"]["uid"].as_str().unwrap_or_default();
                    endpoints.extend(wanted.remove(uid));
                }
                let name = slice["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                names.push((name, ports.clone(), endpoints));
            }
            // New endpoints fill the slices of their port list, then new slices.
            let mut fresh = wanted.into_values();
            let own = names.iter_mut().filter(|(_, p, _)| *p == ports);
            for (_, _, endpoints) in own {
                let room = FULL.saturating_sub(endpoints.len());
                endpoints.extend(fresh.by_ref().take(room));
            }
            loop {
                let chunk: Vec<Value> = fresh.by_ref().take(FULL).collect();
                if chunk.is_empty() {
                    break;
                }
                names.push((String::new(), ports.clone(), chunk));
            }
        }
        names.retain(|(_, _, endpoints)| !endpoints.is_empty());
        if empty {
            // The placeholder of a Service without endpoints.
            let reuse = present.first().and_then(|s| s["metadata"]["name"].as_str()).unwrap_or_default();
            names.push((reuse.to_owned(), Value::Null, Vec::new()));
        }
        names
            .into_iter()
            .map(|(name, ports, endpoints)| {
                let name = if name.is_empty() { format!("{}-{}", key.name, clock::suffix()) } else { name };
                self.write_slice(key, service, family, &name, ports, endpoints);
                name
            })
            .collect()
    }

    fn write_slice(
        &self,
        key: &Key,
        service: &Value,
        family: &str,
        name: &str,
        ports: Value,
        endpoints: Vec<Value>,
    ) {
        let slice_key = Key::new(&key.namespace, name);
        let labels = slice_labels(key, service);
        // Absent lists are null, as the real server answers.
        let endpoints = if endpoints.is_empty() { Value::Null } else { Value::Array(endpoints) };
        if let Some(present) = self.find(SLICES, &slice_key) {
            let same = present["endpoints"] == endpoints
                && present["ports"] == ports
                && present["metadata"]["labels"] == labels;
            if !same {
                self.write(SLICES, &slice_key, Part::Main, |slice| {
                    slice["endpoints"] = endpoints;
                    slice["ports"] = ports;
                    slice["metadata"]["labels"] = labels;
                    slice["metadata"]["annotations"][TRIGGER] = clock::now().into();
                });
            }
            return;
        }
        let slice = json!({
            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
            "metadata": {
                "name": name, "generateName": format!("{}-", key.name), "labels": labels,
                "annotations": {TRIGGER: clock::now()},
                "ownerReferences": [owner("Service", "v1", service)],
            },
            "addressType": family, "endpoints": endpoints, "ports": ports,
        });
        self.create(SLICES, &key.namespace, slice);
    }
}

/// When the change behind a slice happened: agents compute their programming latency from it.
const TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

fn slice_labels(key: &Key, service: &Value) -> Value {
    let own = service["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    let mut labels: Map<String, Value> = own;
    labels.insert("kubernetes.io/service-name".into(), key.name.as_str().into());
    labels.insert("endpointslice.kubernetes.io/managed-by".into(), MANAGER.into());
    if service["spec"]["clusterIP"] == "None" {
        labels.insert("service.kubernetes.io/headless".into(), "".into());
    }
    Value::Object(labels)
}

/// The ports of a Service as one pod has them: named target ports are looked up in its containers; a
/// port the pod does not name is left out.
pub fn resolve_ports(service: &Value, pod: &Value) -> Vec<Value> {
    let containers = || pod["spec"]["containers"].as_array().into_iter().flatten();
    let mut resolved = Vec::new();
    for port in service["spec"]["ports"].as_array().into_iter().flatten() {
        let number = match &port["targetPort"] {
            Value::String(name) => containers()
                .flat_map(|c| c["ports"].as_array().into_iter().flatten())
                .find(|p| p["name"] == name.as_str() && p["protocol"] == port["protocol"])
                .map(|p| p["containerPort"].clone()),
            number => Some(number.clone()),
        };
        let Some(number) = number else { continue };
        let name = port["name"].as_str().unwrap_or_default();
        let mut entry = json!({"name": name, "port": number, "protocol": port["protocol"]});
        if port["appProtocol"].is_string() {
            entry["appProtocol"] = port["appProtocol"].clone();
        }
        resolved.push(entry);
    }
    resolved
}

/// The pod's address of a family.
pub fn pod_address(pod: &Value, family: &str) -> Option<IpAddr> {
    let status = &pod["status"];
    let ips = status["podIPs"].as_array().into_iter().flatten().map(|entry| &entry["ip"]);
    let mut ips = ips.chain([&status["podIP"]]).filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok());
    ips.find(|ip| ip.is_ipv4() == (family == "IPv4"))
}

fn group(service: &Value, pods: &[Arc<Object>], family: &str, zones: &HashMap<String, String>) -> Groups {
    let mut groups = Groups::new();
    for pod in pods {
        let pod = pod.value();
        let Some(address) = pod_address(pod, family) else { continue };
        let ports = Value::Array(resolve_ports(service, pod)).to_string();
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        groups.entry(ports).or_default().insert(uid, endpoint(service, pod, address, zones));
    }
    groups
}

fn endpoint(service: &Value, pod: &Value, address: IpAddr, zones: &HashMap<String, String>) -> Value {
    let spec = &service["spec"];
    let meta = &pod["metadata"];
    let terminating = is_terminating(pod);
    let serving = has_condition(pod, "Ready");
    let ready = spec["publishNotReadyAddresses"] == true || serving && !terminating;
    let mut endpoint = json!({
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "targetRef": {"kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]},
    });
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    let zone = zones.get(node);
    if !node.is_empty() {
        endpoint["nodeName"] = node.into();
    }
    if let Some(zone) = zone {
        endpoint["zone"] = zone.as_str().into();
    }
    if pod["spec"]["subdomain"] == service["metadata"]["name"] && pod["spec"]["hostname"].is_string() {
        endpoint["hostname"] = pod["spec"]["hostname"].clone();
    }
    let mut hints = json!({});
    match spec["trafficDistribution"].as_str() {
        Some("PreferClose" | "PreferSameZone") if ready => {
            if let Some(zone) = zone {
                hints["forZones"] = json!([{"name": zone}]);
            }
        }
        Some("PreferSameNode") if ready && !node.is_empty() => {
            hints["forNodes"] = json!([{"name": node}]);
            if let Some(zone) = zone {
                hints["forZones"] = json!([{"name": zone}]);
            }
        }
        _ => {}
    }
    if hints != json!({}) {
        endpoint["hints"] = hints;
    }
    endpoint
}
