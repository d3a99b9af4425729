//! What the server says about itself: versions, groups, resources and an empty schema.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::registry::{Registry, Resource};

/// `/version`
pub fn version(git_version: &str) -> Value {
    let mut parts = git_version.trim_start_matches('v').split('.');
    json!({
        "major": parts.next().unwrap_or("1"), "minor": parts.next().unwrap_or("33"),
        "gitVersion": git_version, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "2025-01-01T00:00:00Z", "goVersion": "", "compiler": "", "platform": "linux/amd64",
    })
}

/// `/api`
pub fn core_versions(address: &str) -> Value {
    json!({
        "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
    })
}

/// `/apis`
pub fn groups(registry: &Registry) -> Value {
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for resource in registry.all().filter(|r| !r.group.is_empty()) {
        let versions = groups.entry(&resource.group).or_default();
        if !versions.contains(&resource.version.as_str()) {
            versions.push(&resource.version);
        }
    }
    groups.entry("authorization.k8s.io").or_default().push("v1");
    let groups: Vec<Value> = groups.into_iter().map(|(name, versions)| group(name, versions)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/<group>`
pub fn one_group(registry: &Registry, name: &str) -> Option<Value> {
    let all = groups(registry);
    let found = all["groups"].as_array()?.iter().find(|g| g["name"] == name)?;
    let mut found = found.clone();
    found["kind"] = "APIGroup".into();
    found["apiVersion"] = "v1".into();
    Some(found)
}

fn group(name: &str, mut versions: Vec<&str>) -> Value {
    // Stable versions first: v2, v1, v1beta1, ...
    versions.sort_by_key(|v| (v.contains("alpha"), v.contains("beta"), std::cmp::Reverse((*v).to_owned())));
    let versions: Vec<Value> =
        versions.iter().map(|v| json!({"groupVersion": format!("{name}/{v}"), "version": v})).collect();
    json!({"name": name, "preferredVersion": versions.first(), "versions": versions})
}

/// `/api/v1` or `/apis/<group>/<version>`
pub fn resources(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let mut list: Vec<Value> = Vec::new();
    for resource in registry.all().filter(|r| r.group == group && r.version == version) {
        describe(resource, &mut list);
    }
    if group == "authorization.k8s.io" {
        for (plural, kind) in [
            ("selfsubjectaccessreviews", "SelfSubjectAccessReview"),
            ("selfsubjectrulesreviews", "SelfSubjectRulesReview"),
            ("subjectaccessreviews", "SubjectAccessReview"),
        ] {
            list.push(json!({"name": plural, "singularName": kind.to_lowercase(), "namespaced": false,
                "kind": kind, "verbs": ["create"]}));
        }
    }
    if list.is_empty() {
        return None;
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Some(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}),
    )
}

fn describe(resource: &Resource, list: &mut Vec<Value>) {
    const VERBS: [&str; 8] =
        ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
    let mut main = json!({
        "name": resource.plural, "singularName": resource.singular(), "namespaced": resource.namespaced,
        "kind": resource.kind, "verbs": VERBS,
    });
    if !resource.short_names.is_empty() {
        main["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        main["categories"] = json!(resource.categories);
    }
    list.push(main);
    let mut sub = |name: &str, kind: &str, more: Value, verbs: &[&str]| {
        let mut entry = json!({
            "name": format!("{}/{name}", resource.plural), "singularName": "",
            "namespaced": resource.namespaced, "kind": kind, "verbs": verbs,
        });
        if let (Some(entry), Value::Object(more)) = (entry.as_object_mut(), more) {
            entry.extend(more);
        }
        list.push(entry);
    };
    if resource.status {
        sub("status", &resource.kind, json!({}), &["get", "patch", "update"]);
    }
    if resource.scale {
        sub("scale", "Scale", json!({"group": "autoscaling", "version": "v1"}), &["get", "patch", "update"]);
    }
    if resource.storage == "pods" {
        sub("eviction", "Eviction", json!({"group": "policy", "version": "v1"}), &["create"]);
    }
}

/// `/openapi/v2` as the protobuf document older kubectl insists on (gnostic openapi.v2.Document):
/// swagger "2.0", a title, a version, and no definitions, so that no object is checked by the client.
pub const OPENAPI_V2_PROTOBUF: &[u8] = b"\x0a\x032.0\x12\x0e\x0a\x08ferroute\x12\x02v1\x42\x00";

/// `/openapi/v2` as JSON.
pub fn openapi_v2() -> Value {
    json!({"swagger": "2.0", "info": {"title": "ferroute", "version": "v1"}, "paths": {}, "definitions": {}})
}
