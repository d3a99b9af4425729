//! What the API server adds to objects, and what it refuses.

mod pods;
pub mod services;

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::clock;
use crate::registry::Resource;
use crate::selector::LabelSelector;
use crate::status::{Cause, Refusal};
use crate::store::labels_of;

/// Sets a field that is missing or null.
pub fn default(object: &mut Value, field: &str, value: impl Into<Value>) {
    let value = value.into();
    if let Some(map) = object.as_object_mut()
        && !value.is_null()
    {
        let slot = map.entry(field).or_insert(Value::Null);
        if slot.is_null() {
            *slot = value;
        }
    }
}

/// A child object, made when missing; none when the field holds something else.
pub fn child<'a>(object: &'a mut Value, field: &str) -> Option<&'a mut Value> {
    let slot = object.as_object_mut()?.entry(field).or_insert(Value::Null);
    if slot.is_null() {
        *slot = Value::Object(Map::new());
    }
    Some(slot).filter(|slot| slot.is_object())
}

/// Checks the envelope of a new object and fills in what every object has.
///
/// # Errors
/// 400 when kind or namespace contradict the path, 422 for a bad name.
pub fn identify(resource: &Resource, namespace: &str, object: &mut Value) -> Result<(), Refusal> {
    check_kind(resource, object)?;
    let Some(metadata) = child(object, "metadata") else {
        return Err(Refusal::bad_request("metadata must be an object"));
    };
    if resource.namespaced {
        let given = metadata["namespace"].as_str().unwrap_or(namespace);
        if given != namespace {
            return Err(Refusal::bad_request(format!(
                "the namespace of the provided object does not match the namespace sent on the request ({given} != {namespace})"
            )));
        }
        metadata["namespace"] = namespace.into();
    } else if let Some(map) = metadata.as_object_mut() {
        map.remove("namespace");
    }
    if metadata["name"].as_str().unwrap_or_default().is_empty() {
        let Some(prefix) = metadata["generateName"].as_str().filter(|p| !p.is_empty()) else {
            let cause = Cause::required("metadata.name", "name or generateName is required");
            return Err(Refusal::invalid(&resource.kind, &resource.group, "", &[cause]));
        };
        metadata["name"] = format!("{prefix}{}", clock::suffix()).into();
    }
    metadata["uid"] = clock::uid().into();
    metadata["creationTimestamp"] = clock::now().into();
    if has_generation(resource) {
        metadata["generation"] = 1.into();
    }
    Ok(())
}

/// Checks `kind` and `apiVersion` against the path, and sets them when absent.
///
/// # Errors
/// 400 when they contradict it.
pub fn check_kind(resource: &Resource, object: &mut Value) -> Result<(), Refusal> {
    if !object.is_object() {
        return Err(Refusal::bad_request("the object provided is unrecognized: not a JSON object"));
    }
    let version = resource.api_version();
    default(object, "kind", resource.kind.as_str());
    default(object, "apiVersion", version.as_str());
    if object["kind"] != resource.kind.as_str() || object["apiVersion"] != version.as_str() {
        return Err(Refusal::bad_request(format!(
            "the object provided ({} {}) does not match the expected kind {} in version {version}",
            object["apiVersion"], object["kind"], resource.kind
        )));
    }
    Ok(())
}

/// Whether the server counts versions of the desired state in `metadata.generation`.
pub fn has_generation(resource: &Resource) -> bool {
    !resource.group.is_empty()
        && !matches!(
            resource.group.as_str(),
            "events.k8s.io" | "coordination.k8s.io" | "rbac.authorization.k8s.io"
        )
        || resource.custom
}

/// Fills in defaults, by kind. Total: fields of wrong types are left alone.
pub fn set_defaults(resource: &Resource, object: &mut Value, fresh: bool) {
    if resource.custom {
        return;
    }
    match resource.qualified().as_str() {
        "pods" => {
            if let Some(spec) = child(object, "spec") {
                pods::set_defaults(spec);
            }
            if fresh {
                object["status"] = json!({"phase": "Pending", "qosClass": "BestEffort"});
            }
        }
        "services" => services::set_defaults(object),
        "namespaces" => {
            let name = object["metadata"]["name"].clone();
            if let Some(labels) = child(object, "metadata").and_then(|m| child(m, "labels")) {
                default(labels, "kubernetes.io/metadata.name", name);
            }
            if let Some(spec) = child(object, "spec") {
                default(spec, "finalizers", json!(["kubernetes"]));
            }
            if let Some(status) = child(object, "status") {
                default(status, "phase", "Active");
            }
        }
        "deployments.apps" => {
            workload_defaults(object);
            if let Some(spec) = child(object, "spec") {
                default(spec, "progressDeadlineSeconds", 600);
                default(spec, "strategy", json!({}));
                let strategy = &mut spec["strategy"];
                default(strategy, "type", "RollingUpdate");
                if strategy["type"] == "RollingUpdate"
                    && let Some(rolling) = child(strategy, "rollingUpdate")
                {
                    default(rolling, "maxSurge", "25%");
                    default(rolling, "maxUnavailable", "25%");
                }
            }
        }
        "statefulsets.apps" => {
            workload_defaults(object);
            if let Some(spec) = child(object, "spec") {
                default(spec, "podManagementPolicy", "OrderedReady");
                default(
                    spec,
                    "updateStrategy",
                    json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}),
                );
            }
        }
        "replicasets.apps" => workload_defaults(object),
        "daemonsets.apps" => {
            workload_defaults(object);
            if let Some(spec) = object.get_mut("spec") {
                if let Some(map) = spec.as_object_mut() {
                    map.remove("replicas");
                }
                let rolling =
                    json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}});
                default(spec, "updateStrategy", rolling);
            }
        }
        "networkpolicies.networking.k8s.io" => policy_defaults(object),
        "endpointslices.discovery.k8s.io" => {
            for port in object.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
                default(port, "name", "");
                default(port, "protocol", "TCP");
            }
        }
        "customresourcedefinitions.apiextensions.k8s.io" => definition_defaults(object),
        _ => {}
    }
}

fn workload_defaults(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    if let Some(spec) = spec.get_mut("template").and_then(|t| child(t, "spec")) {
        pods::set_defaults(spec);
    }
}

fn policy_defaults(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    if spec["policyTypes"].is_null() {
        let egress = spec["egress"].as_array().is_some_and(|rules| !rules.is_empty());
        spec["policyTypes"] = if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
    }
    for direction in ["ingress", "egress"] {
        for rule in spec.get_mut(direction).and_then(Value::as_array_mut).into_iter().flatten() {
            for port in rule.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
                default(port, "protocol", "TCP");
            }
        }
    }
}

fn definition_defaults(object: &mut Value) {
    let names = object["spec"]["names"].clone();
    let kind = names["kind"].as_str().unwrap_or_default().to_owned();
    if let Some(names) = child(object, "spec").and_then(|s| child(s, "names")) {
        default(names, "singular", kind.to_lowercase());
        default(names, "listKind", format!("{kind}List"));
    }
    let now = clock::now();
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now});
    if let Some(status) = child(object, "status") {
        default(
            status,
            "conditions",
            json!([
                condition("NamesAccepted", "NoConflicts", "no conflicts found"),
                condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
            ]),
        );
        default(status, "acceptedNames", names);
    }
}

/// Refuses what the real server refuses, as far as network objects and workloads go.
///
/// # Errors
/// 422 with a cause per field.
pub fn validate(resource: &Resource, object: &Value, old: Option<&Value>) -> Result<(), Refusal> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let mut causes = Vec::new();
    if old.is_none() {
        check_name(resource, name, &mut causes);
    }
    check_labels(object, &mut causes);
    match resource.qualified().as_str() {
        "services" => services::validate(object, old, &mut causes),
        "endpointslices.discovery.k8s.io" => check_slice(object, old, &mut causes),
        "deployments.apps" | "replicasets.apps" | "statefulsets.apps" | "daemonsets.apps" => {
            check_workload(object, old, &mut causes);
        }
        "pods" if object["spec"]["containers"].as_array().is_none_or(Vec::is_empty) => {
            causes.push(Cause::required("spec.containers", "must have at least one container"));
        }
        "servicecidrs.networking.k8s.io" => {
            for (at, cidr) in object["spec"]["cidrs"].as_array().into_iter().flatten().enumerate() {
                let parsed = cidr.as_str().and_then(|c| c.parse::<IpNet>().ok());
                if parsed.is_none_or(|net| net.trunc() != net) {
                    let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
                    causes.push(Cause::invalid(format!("spec.cidrs[{at}]"), cidr, why));
                }
            }
        }
        _ => {}
    }
    if causes.is_empty() {
        return Ok(());
    }
    Err(Refusal::invalid(&resource.kind, &resource.group, name, &causes))
}

fn check_name(resource: &Resource, name: &str, causes: &mut Vec<Cause>) {
    let label = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-')
    };
    let ok = match resource.qualified().as_str() {
        "services" => name.len() <= 63 && label(name) && name.starts_with(|c: char| c.is_ascii_lowercase()),
        "namespaces" => name.len() <= 63 && label(name),
        "roles.rbac.authorization.k8s.io"
        | "rolebindings.rbac.authorization.k8s.io"
        | "clusterroles.rbac.authorization.k8s.io"
        | "clusterrolebindings.rbac.authorization.k8s.io" => !name.is_empty() && !name.contains(['/', '%']),
        _ => name.len() <= 253 && name.split('.').all(label),
    };
    if !ok {
        let shown: String = name.chars().take(300).collect();
        causes.push(Cause::invalid(
            "metadata.name",
            shown,
            "must consist of lower case alphanumeric characters, '-' or '.', start and end with an alphanumeric \
             character, and be no longer than the kind allows",
        ));
    }
}

fn check_labels(object: &Value, causes: &mut Vec<Cause>) {
    for field in ["labels", "annotations"] {
        let map = &object["metadata"][field];
        if !(map.is_null() || map.is_object()) {
            causes.push(Cause::invalid(format!("metadata.{field}"), map, "must be a map of strings"));
        }
        for (key, value) in map.as_object().into_iter().flatten() {
            let Some(text) = value.as_str() else {
                causes.push(Cause::invalid(format!("metadata.{field}.{key}"), value, "must be a string"));
                continue;
            };
            if field == "labels" && !valid_label_value(text) {
                causes.push(Cause::invalid("metadata.labels", text, "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character"));
            }
        }
    }
}

fn valid_label_value(text: &str) -> bool {
    let alphanumeric = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    text.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && alphanumeric(bytes.first())
        && alphanumeric(bytes.last())
}

fn check_workload(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let spec = &object["spec"];
    let selector = LabelSelector::from_object(&spec["selector"]);
    if selector.is_empty() {
        causes.push(Cause::required("spec.selector", ""));
    } else if !selector.matches(&labels_of(&spec["template"])) {
        causes.push(Cause::invalid(
            "spec.template.metadata.labels",
            &spec["template"]["metadata"]["labels"],
            "`selector` does not match template `labels`",
        ));
    }
    if spec["template"]["spec"]["containers"].as_array().is_none_or(Vec::is_empty) {
        causes.push(Cause::required("spec.template.spec.containers", "must have at least one container"));
    }
    if old.is_some_and(|old| old["spec"]["selector"] != spec["selector"]) {
        causes.push(Cause::invalid("spec.selector", &spec["selector"], "field is immutable"));
    }
    if spec["replicas"].as_i64().is_some_and(|n| n < 0) {
        causes.push(Cause::invalid("spec.replicas", &spec["replicas"], "must be greater than or equal to 0"));
    }
}

fn check_slice(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let kind = object["addressType"].as_str().unwrap_or_default();
    if !matches!(kind, "IPv4" | "IPv6" | "FQDN") {
        causes.push(Cause::unsupported("addressType", kind, &["FQDN", "IPv4", "IPv6"]));
    }
    if old.is_some_and(|old| old["addressType"] != object["addressType"]) {
        causes.push(Cause::invalid("addressType", kind, "field is immutable"));
    }
    for (at, endpoint) in object["endpoints"].as_array().into_iter().flatten().enumerate() {
        let addresses = endpoint["addresses"].as_array().map_or(&[][..], Vec::as_slice);
        if addresses.is_empty() {
            causes.push(Cause::required(
                format!("endpoints[{at}].addresses"),
                "must contain at least 1 address",
            ));
        }
        for (nth, address) in addresses.iter().enumerate() {
            let parsed = address.as_str().and_then(|a| a.parse::<IpAddr>().ok());
            let fits = match kind {
                "IPv4" => parsed.is_some_and(|a| a.is_ipv4()),
                "IPv6" => parsed.is_some_and(|a| a.is_ipv6()),
                _ => true,
            };
            if !fits {
                let field = format!("endpoints[{at}].addresses[{nth}]");
                causes.push(Cause::invalid(field, address, format!("must be a valid {kind} address")));
            }
        }
    }
    let mut names = std::collections::HashSet::new();
    for (at, port) in object["ports"].as_array().into_iter().flatten().enumerate() {
        if !names.insert(port["name"].as_str().unwrap_or_default()) {
            causes.push(Cause::duplicate(format!("ports[{at}].name"), &port["name"]));
        }
    }
}
