//! The four patch types: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge patch and
//! server-side apply without conflicts.

use serde_json::{Map, Value};

use crate::status::Refusal;

/// What a PATCH body is, by its content type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchKind {
    /// `application/json-patch+json`
    Json,
    /// `application/merge-patch+json`
    Merge,
    /// `application/strategic-merge-patch+json`
    Strategic,
    /// `application/apply-patch+yaml`
    Apply,
}

impl PatchKind {
    /// Reads a content type.
    ///
    /// # Errors
    /// 415 for any other type.
    pub fn from_content_type(text: &str) -> Result<Self, Refusal> {
        match text.split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" | "application/apply-patch+json" => Ok(Self::Apply),
            other => Err(Refusal::new(
                415,
                "UnsupportedMediaType",
                format!("the body of the request was in an unknown format: {other:?}"),
            )),
        }
    }
}

/// Applies an RFC 6902 patch.
///
/// # Errors
/// 400 for a malformed patch, 422 for one that does not fit the object.
pub fn json(target: &mut Value, patch: Value) -> Result<(), Refusal> {
    let patch: json_patch::Patch = serde_json::from_value(patch)
        .map_err(|e| Refusal::bad_request(format!("error decoding patch: {e}")))?;
    json_patch::patch(target, &patch)
        .map_err(|e| Refusal::new(422, "Invalid", format!("the server rejected our request: {e}")))
}

/// Applies an RFC 7386 merge patch.
pub fn merge(target: &mut Value, patch: &Value) {
    json_patch::merge(target, patch);
}

/// How a list of objects is merged: the fields that identify an element, by the list's field name and
/// its parent's (types in k8s.io/api, tags `patchMergeKey` and `listMapKey`).
fn merge_keys(parent: &str, field: &str, elements: &[&Value]) -> Option<&'static [&'static str]> {
    let has = |key: &str| elements.iter().any(|e| e.get(key).is_some());
    match field {
        "containers" | "initContainers" | "ephemeralContainers" | "volumes" | "env" | "imagePullSecrets" => {
            Some(&["name"])
        }
        "volumeMounts" => Some(&["mountPath"]),
        "volumeDevices" => Some(&["devicePath"]),
        "ports" if has("containerPort") => Some(&["containerPort", "protocol"]),
        "ports" if parent == "spec" && has("port") => Some(&["port", "protocol"]),
        "conditions" | "addresses" => Some(&["type"]),
        "hostAliases" => Some(&["ip"]),
        "topologySpreadConstraints" => Some(&["topologyKey", "whenUnsatisfiable"]),
        "podIPs" | "hostIPs" => Some(&["ip"]),
        "ownerReferences" => Some(&["uid"]),
        "secrets" if parent.is_empty() => Some(&["name"]),
        "taints" => Some(&["key", "effect"]),
        _ => None,
    }
}

/// Lists of plain values that merge as sets.
fn merges_as_set(field: &str) -> bool {
    matches!(field, "finalizers" | "podCIDRs")
}

fn same_element(a: &Value, b: &Value, keys: &[&str]) -> bool {
    keys.iter().all(|key| match (a.get(*key), b.get(*key)) {
        (x, y) if x == y => true,
        // A missing protocol means TCP.
        (None, Some(Value::String(p))) | (Some(Value::String(p)), None) => *key == "protocol" && p == "TCP",
        // A partial key, as a delete directive gives it, matches on what it has.
        (_, None) => *key == "protocol",
        _ => false,
    })
}

/// Applies a strategic merge patch, directives included (`$patch`, `$retainKeys`,
/// `$deleteFromPrimitiveList/…`, `$setElementOrder/…`).
pub fn strategic(target: &mut Value, patch: &Value) {
    let mut patch = patch.clone();
    if let Value::Object(patch) = &mut patch {
        strategic_object(target, patch, "", "");
    }
}

fn strategic_object(target: &mut Value, patch: &mut Map<String, Value>, parent: &str, name: &str) {
    match patch.remove("$patch").as_ref().and_then(Value::as_str) {
        Some("replace") => {
            *target = Value::Object(std::mem::take(patch));
            return;
        }
        Some("delete") => {
            *target = Value::Null;
            return;
        }
        _ => {}
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(map) = target else { return };
    if let Some(Value::Array(keep)) = patch.remove("$retainKeys") {
        map.retain(|key, _| keep.iter().any(|k| k == key));
    }
    let mut orders: Vec<(String, Vec<Value>)> = Vec::new();
    for (key, value) in std::mem::take(patch) {
        if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
            if let (Some(Value::Array(list)), Value::Array(gone)) = (map.get_mut(field), value) {
                list.retain(|v| !gone.contains(v));
            }
        } else if let Some(field) = key.strip_prefix("$setElementOrder/") {
            if let Value::Array(order) = value {
                orders.push((field.to_owned(), order));
            }
        } else {
            strategic_field(map, &key, value, name);
        }
    }
    for (field, order) in orders {
        if let Some(Value::Array(list)) = map.get_mut(&field) {
            reorder(list, &order, name, &field);
        }
    }
    let _ = parent;
}

fn strategic_field(map: &mut Map<String, Value>, key: &str, value: Value, parent: &str) {
    match value {
        Value::Null => {
            map.remove(key);
        }
        Value::Object(mut inner) => {
            let slot = map.entry(key.to_owned()).or_insert(Value::Null);
            strategic_object(slot, &mut inner, parent, key);
            if slot.is_null() {
                map.remove(key);
            }
        }
        Value::Array(elements) => {
            let slot = map.entry(key.to_owned()).or_insert_with(|| Value::Array(Vec::new()));
            if !slot.is_array() {
                *slot = Value::Array(Vec::new());
            }
            if let Value::Array(list) = slot {
                strategic_list(list, elements, parent, key);
            }
        }
        plain => {
            map.insert(key.to_owned(), plain);
        }
    }
}

fn strategic_list(list: &mut Vec<Value>, elements: Vec<Value>, parent: &str, field: &str) {
    let replaced = elements.iter().any(|e| e.get("$patch").and_then(Value::as_str) == Some("replace"));
    let seen: Vec<&Value> = list.iter().chain(&elements).collect();
    let keys = merge_keys(parent, field, &seen);
    if let (Some(keys), false) = (keys, replaced) {
        for element in elements {
            let at = list.iter().position(|e| same_element(e, &element, keys));
            if element.get("$patch").and_then(Value::as_str) == Some("delete") {
                list.retain(|e| !same_element(e, &element, keys));
                continue;
            }
            let Value::Object(mut element) = element else { continue };
            match at {
                Some(at) => strategic_object(&mut list[at], &mut element, parent, field),
                None => {
                    let mut fresh = Value::Null;
                    strategic_object(&mut fresh, &mut element, parent, field);
                    list.push(fresh);
                }
            }
        }
    } else if merges_as_set(field) {
        for element in elements {
            if !list.contains(&element) {
                list.push(element);
            }
        }
    } else {
        *list = elements.into_iter().filter(|e| e.get("$patch").is_none()).collect();
    }
}

fn reorder(list: &mut [Value], order: &[Value], parent: &str, field: &str) {
    let seen: Vec<&Value> = list.iter().collect();
    let Some(keys) = merge_keys(parent, field, &seen) else { return };
    list.sort_by_key(|e| order.iter().position(|o| same_element(e, o, keys)).unwrap_or(usize::MAX));
}

/// The result of applying a configuration on top of an object: fields of the manager's last
/// configuration that are no longer there go, the rest is merged. Conflicts are not detected.
pub fn apply(target: &mut Value, last: Option<&Value>, applied: &Value) {
    if let Some(last) = last {
        prune(target, last, applied, "", "");
    }
    strategic(target, applied);
}

fn prune(target: &mut Value, last: &Value, applied: &Value, parent: &str, name: &str) {
    match (target, last) {
        (Value::Object(target), Value::Object(last)) => {
            for (key, old) in last {
                match applied.get(key) {
                    None => {
                        target.remove(key);
                    }
                    Some(new) => {
                        if let Some(slot) = target.get_mut(key) {
                            prune(slot, old, new, name, key);
                        }
                    }
                }
            }
        }
        (Value::Array(target), Value::Array(last)) => {
            let Value::Array(applied) = applied else { return };
            let seen: Vec<&Value> = target.iter().chain(last).collect();
            let Some(keys) = merge_keys(parent, name, &seen) else { return };
            for old in last {
                let Some(at) = target.iter().position(|e| same_element(e, old, keys)) else { continue };
                match applied.iter().find(|e| same_element(e, old, keys)) {
                    Some(new) => prune(&mut target[at], old, new, parent, name),
                    None => {
                        target.remove(at);
                    }
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn strategic_merge_knows_ports_and_containers() {
        let mut object = json!({"spec": {
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000}, {"port": 53, "protocol": "UDP"}],
            "template": {"spec": {"containers": [{"name": "a", "image": "x", "env": [{"name": "E", "value": "1"}]}]}},
        }});
        strategic(
            &mut object,
            &json!({"spec": {
                "$setElementOrder/ports": [{"port": 81}, {"port": 80}],
                "ports": [{"port": 80, "name": "web"}, {"port": 53, "protocol": "UDP", "$patch": "delete"},
                          {"port": 81}],
                "template": {"spec": {"containers": [{"name": "a", "image": "y"}, {"name": "b"}]}},
            }}),
        );
        assert_eq!(
            object,
            json!({"spec": {
                "ports": [{"port": 81}, {"port": 80, "protocol": "TCP", "nodePort": 30000, "name": "web"}],
                "template": {"spec": {"containers": [
                    {"name": "a", "image": "y", "env": [{"name": "E", "value": "1"}]}, {"name": "b"}]}},
            }})
        );
    }

    #[test]
    fn strategic_merge_follows_directives() {
        let mut object = json!({"metadata": {"finalizers": ["a", "b"], "labels": {"x": "1", "y": "2"}},
            "spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        strategic(
            &mut object,
            &json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "labels": {"x": null}},
                "spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
        );
        assert_eq!(
            object,
            json!({"metadata": {"finalizers": ["b"], "labels": {"y": "2"}},
                "spec": {"strategy": {"type": "Recreate"}}})
        );
    }

    #[test]
    fn apply_removes_only_what_the_manager_left_out() {
        let last = json!({"metadata": {"labels": {"a": "1", "b": "1"}}, "spec": {"ports": [{"port": 80}, {"port": 81}]}});
        let mut object = json!({"metadata": {"labels": {"a": "1", "b": "1", "other": "1"}},
            "spec": {"ports": [{"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "TCP"}], "clusterIP": "10.0.0.1"}});
        apply(
            &mut object,
            Some(&last),
            &json!({"metadata": {"labels": {"a": "2"}}, "spec": {"ports": [{"port": 81}]}}),
        );
        assert_eq!(
            object,
            json!({"metadata": {"labels": {"a": "2", "other": "1"}},
                "spec": {"ports": [{"port": 81, "protocol": "TCP"}], "clusterIP": "10.0.0.1"}})
        );
    }
}
