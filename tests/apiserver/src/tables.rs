//! Tables (meta.k8s.io/v1), as `kubectl get` prints them.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::clock;
use crate::registry::Resource;

/// Name, whether only `-o wide` shows it, and how to read it.
type Column = (&'static str, bool, fn(&Value) -> Value);

/// The table of some objects.
pub fn table(resource: &Resource, objects: &[Arc<Value>], metadata: Option<&Value>) -> Value {
    let columns = columns(&resource.storage);
    let definitions: Vec<Value> = columns
        .iter()
        .enumerate()
        .map(|(at, (name, wide, _))| {
            json!({"name": name, "type": "string", "format": if at == 0 { "name" } else { "" },
                "description": "", "priority": u8::from(*wide)})
        })
        .collect();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let cells: Vec<Value> = columns.iter().map(|(_, _, read)| read(object)).collect();
            json!({"cells": cells, "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"],
            }})
        })
        .collect();
    let own = objects.first().map(|o| json!({"resourceVersion": o["metadata"]["resourceVersion"]}));
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata.cloned().or(own).unwrap_or_else(|| json!({})),
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn columns(storage: &str) -> Vec<Column> {
    let name: Column = ("Name", false, |o| o["metadata"]["name"].clone());
    let age: Column = ("Age", false, age);
    let middle: Vec<Column> = match storage {
        "pods" => vec![
            ("Ready", false, ready_containers),
            ("Status", false, pod_status),
            ("Restarts", false, |_| "0".into()),
            age,
            ("IP", true, |o| or_none(&o["status"]["podIP"])),
            ("Node", true, |o| or_none(&o["spec"]["nodeName"])),
            ("Nominated Node", true, |_| "<none>".into()),
            ("Readiness Gates", true, |_| "<none>".into()),
        ],
        "services" => vec![
            ("Type", false, |o| o["spec"]["type"].clone()),
            ("Cluster-IP", false, |o| or_none(&o["spec"]["clusterIP"])),
            ("External-IP", false, external_ip),
            ("Port(s)", false, service_ports),
            age,
            ("Selector", true, |o| pairs(&o["spec"]["selector"])),
        ],
        "nodes" => vec![
            ("Status", false, node_status),
            ("Roles", false, |_| "<none>".into()),
            age,
            ("Version", false, |o| or_none(&o["status"]["nodeInfo"]["kubeletVersion"])),
            ("Internal-IP", true, |o| node_address(o, "InternalIP")),
            ("External-IP", true, |o| node_address(o, "ExternalIP")),
            ("OS-Image", true, |o| or_none(&o["status"]["nodeInfo"]["osImage"])),
            ("Kernel-Version", true, |o| or_none(&o["status"]["nodeInfo"]["kernelVersion"])),
            ("Container-Runtime", true, |o| or_none(&o["status"]["nodeInfo"]["containerRuntimeVersion"])),
        ],
        "deployments.apps" => vec![
            ("Ready", false, |o| ratio(&o["status"]["readyReplicas"], &o["spec"]["replicas"])),
            ("Up-to-date", false, |o| count(&o["status"]["updatedReplicas"])),
            ("Available", false, |o| count(&o["status"]["availableReplicas"])),
            age,
            ("Containers", true, |o| containers(o, "name")),
            ("Images", true, |o| containers(o, "image")),
            ("Selector", true, |o| pairs(&o["spec"]["selector"]["matchLabels"])),
        ],
        "replicasets.apps" => vec![
            ("Desired", false, |o| count(&o["spec"]["replicas"])),
            ("Current", false, |o| count(&o["status"]["replicas"])),
            ("Ready", false, |o| count(&o["status"]["readyReplicas"])),
            age,
            ("Containers", true, |o| containers(o, "name")),
            ("Images", true, |o| containers(o, "image")),
        ],
        "statefulsets.apps" => vec![
            ("Ready", false, |o| ratio(&o["status"]["readyReplicas"], &o["spec"]["replicas"])),
            age,
            ("Containers", true, |o| containers(o, "name")),
            ("Images", true, |o| containers(o, "image")),
        ],
        "daemonsets.apps" => vec![
            ("Desired", false, |o| count(&o["status"]["desiredNumberScheduled"])),
            ("Current", false, |o| count(&o["status"]["currentNumberScheduled"])),
            ("Ready", false, |o| count(&o["status"]["numberReady"])),
            ("Up-to-date", false, |o| count(&o["status"]["updatedNumberScheduled"])),
            ("Available", false, |o| count(&o["status"]["numberAvailable"])),
            age,
        ],
        "endpointslices.discovery.k8s.io" => vec![
            ("AddressType", false, |o| o["addressType"].clone()),
            ("Ports", false, slice_ports),
            ("Endpoints", false, slice_endpoints),
            age,
        ],
        "events" => vec![
            ("Last Seen", false, last_seen),
            ("Type", false, |o| o["type"].clone()),
            ("Reason", false, |o| o["reason"].clone()),
            ("Object", false, |o| {
                let involved = &o["involvedObject"];
                format!("{}/{}", text(&involved["kind"]).to_lowercase(), text(&involved["name"])).into()
            }),
            ("Message", false, |o| o["message"].clone()),
        ],
        "namespaces" => vec![("Status", false, |o| o["status"]["phase"].clone()), age],
        "configmaps" => {
            vec![("Data", false, |o| o["data"].as_object().map_or(0, serde_json::Map::len).into()), age]
        }
        "networkpolicies.networking.k8s.io" => {
            vec![("Pod-Selector", false, |o| pairs(&o["spec"]["podSelector"]["matchLabels"])), age]
        }
        "leases.coordination.k8s.io" => {
            vec![("Holder", false, |o| or_none(&o["spec"]["holderIdentity"])), age]
        }
        "servicecidrs.networking.k8s.io" => vec![("CIDRs", false, |o| joined(&o["spec"]["cidrs"])), age],
        _ => vec![age],
    };
    if storage == "events" { middle } else { [vec![name], middle].concat() }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn or_none(value: &Value) -> Value {
    if value.as_str().unwrap_or_default().is_empty() { "<none>".into() } else { value.clone() }
}

fn count(value: &Value) -> Value {
    value.as_i64().unwrap_or(0).into()
}

fn ratio(part: &Value, whole: &Value) -> Value {
    format!("{}/{}", part.as_i64().unwrap_or(0), whole.as_i64().unwrap_or(0)).into()
}

fn joined(list: &Value) -> Value {
    let words: Vec<&str> = list.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    words.join(",").into()
}

fn pairs(map: &Value) -> Value {
    let map = map.as_object().into_iter().flatten();
    let pairs: Vec<String> = map.map(|(k, v)| format!("{k}={}", text(v))).collect();
    if pairs.is_empty() { "<none>".into() } else { pairs.join(",").into() }
}

fn age(object: &Value) -> Value {
    clock::seconds_since(&object["metadata"]["creationTimestamp"])
        .map_or_else(|| "<unknown>".into(), |s| clock::age(s).into())
}

fn last_seen(event: &Value) -> Value {
    let times = ["lastTimestamp", "eventTime", "firstTimestamp"];
    let seen = times.iter().find_map(|field| clock::seconds_since(&event[*field]));
    seen.map_or_else(|| "<unknown>".into(), |s| clock::age(s).into())
}

fn containers(object: &Value, field: &str) -> Value {
    let list = object["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten();
    list.map(|c| text(&c[field])).collect::<Vec<_>>().join(",").into()
}

fn ready_containers(pod: &Value) -> Value {
    let all = pod["spec"]["containers"].as_array().map_or(0, Vec::len);
    let statuses = pod["status"]["containerStatuses"].as_array();
    let ready = statuses.map_or(0, |list| list.iter().filter(|c| c["ready"] == true).count());
    format!("{ready}/{all}").into()
}

fn pod_status(pod: &Value) -> Value {
    if !pod["metadata"]["deletionTimestamp"].is_null() {
        return "Terminating".into();
    }
    match pod["status"]["phase"].as_str() {
        Some("Pending") if !pod["spec"]["nodeName"].is_null() => "ContainerCreating".into(),
        Some(phase) => phase.into(),
        None => "Unknown".into(),
    }
}

fn node_status(node: &Value) -> Value {
    let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.into_iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
    let mut status = if ready { "Ready" } else { "NotReady" }.to_owned();
    if node["spec"]["unschedulable"] == true {
        status.push_str(",SchedulingDisabled");
    }
    status.into()
}

fn node_address(node: &Value, kind: &str) -> Value {
    let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
    addresses.into_iter().find(|a| a["type"] == kind).map_or("<none>".into(), |a| a["address"].clone())
}

fn external_ip(service: &Value) -> Value {
    let spec = &service["spec"];
    if spec["type"] == "ExternalName" {
        return spec["externalName"].clone();
    }
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
    let mut ips: Vec<&str> = ingress.map(|i| i["ip"].as_str().unwrap_or(text(&i["hostname"]))).collect();
    ips.extend(spec["externalIPs"].as_array().into_iter().flatten().map(text));
    if !ips.is_empty() {
        return ips.join(",").into();
    }
    if spec["type"] == "LoadBalancer" { "<pending>".into() } else { "<none>".into() }
}

fn service_ports(service: &Value) -> Value {
    let ports = service["spec"]["ports"].as_array().into_iter().flatten();
    let ports: Vec<String> = ports
        .map(|p| match p["nodePort"].as_u64() {
            Some(node) if node > 0 => format!("{}:{node}/{}", p["port"], text(&p["protocol"])),
            _ => format!("{}/{}", p["port"], text(&p["protocol"])),
        })
        .collect();
    if ports.is_empty() { "<none>".into() } else { ports.join(",").into() }
}

fn slice_ports(slice: &Value) -> Value {
    let ports = slice["ports"].as_array().into_iter().flatten();
    let ports: Vec<String> =
        ports.map(|p| p["port"].as_u64().map_or("*".into(), |n| n.to_string())).collect();
    if ports.is_empty() { "<unset>".into() } else { ports.join(",").into() }
}

fn slice_endpoints(slice: &Value) -> Value {
    let endpoints = slice["endpoints"].as_array().into_iter().flatten();
    let all: Vec<&str> =
        endpoints.flat_map(|e| e["addresses"].as_array().into_iter().flatten()).map(text).collect();
    match all.len() {
        0 => "<unset>".into(),
        n @ 1..=3 => all[..n].join(",").into(),
        n => format!("{} + {} more...", all[..3].join(","), n - 3).into(),
    }
}
