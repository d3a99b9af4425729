//! Create, update, patch and delete: admission around the store's transactions.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::admission;
use crate::clock;
use crate::events;
use crate::patch::{self, PatchKind};
use crate::registry::Resource;
use crate::selector::Scope;
use crate::state::State;
use crate::status::{Cause, Refusal};
use crate::store::{Decision, Key, Object};

/// Which part of an object a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All but the status, where the status is a subresource.
    Main,
    /// `/status`
    Status,
    /// `/scale`
    Scale,
}

/// Options of a deletion (meta/v1 DeleteOptions).
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// `gracePeriodSeconds`
    pub grace: Option<i64>,
    /// `preconditions.uid`
    pub uid: Option<String>,
    /// `preconditions.resourceVersion`
    pub resource_version: Option<String>,
    /// `propagationPolicy: Orphan`
    pub orphan: bool,
    /// Validate only.
    pub dry_run: bool,
}

impl State {
    /// Reads one object.
    pub fn find(&self, resource: &Resource, key: &Key) -> Result<Arc<Object>, Refusal> {
        let found = self.store.get(&resource.storage, key);
        found.ok_or_else(|| Refusal::not_found(&resource.qualified(), &key.name))
    }

    /// Creates an object.
    pub fn create(
        &self,
        resource: &Resource,
        namespace: &str,
        mut object: Value,
        dry_run: bool,
    ) -> Result<Arc<Value>, Refusal> {
        admission::identify(resource, namespace, &mut object)?;
        if resource.namespaced && self.namespace_missing(namespace) {
            return Err(Refusal::not_found("namespaces", namespace));
        }
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let key = Key::new(if resource.namespaced { namespace } else { "" }, &name);
        if resource.status && resource.storage != "nodes" && resource.storage != "services" {
            // A new object of a kind with a status subresource starts without one.
            if let Some(map) = object.as_object_mut() {
                map.remove("status");
            }
        }
        if resource.group == "events.k8s.io" {
            events::to_core(&mut object);
        }
        admission::set_defaults(resource, &mut object, true);
        let made = self.store.transact(&resource.storage, &key, |current| {
            if current.is_some() {
                return Err(Refusal::already_exists(&resource.qualified(), &name));
            }
            self.settle(resource, &key, None, &mut object, dry_run)?;
            Ok(if dry_run { Decision::Keep(Some(object)) } else { Decision::Put(object) })
        })?;
        if !dry_run && resource.storage.starts_with("customresourcedefinitions.") {
            self.register(|registry| registry.insert_definition(&made));
        }
        Ok(made)
    }

    fn namespace_missing(&self, namespace: &str) -> bool {
        self.store.get("namespaces", &Key::new("", namespace)).is_none()
    }

    /// Validation and allocation, under the store's lock.
    fn settle(
        &self,
        resource: &Resource,
        key: &Key,
        old: Option<&Value>,
        object: &mut Value,
        dry_run: bool,
    ) -> Result<(), Refusal> {
        if resource.storage != "services" {
            return admission::validate(resource, object, old);
        }
        let mut allocator = self.allocator();
        let assigned = allocator.assign(key, old, object);
        admission::validate(resource, object, old)?;
        assigned.map_err(|causes| Refusal::invalid("Service", "", &key.name, &causes))?;
        if !dry_run {
            allocator.release(key);
            allocator.adopt(key, object);
        }
        Ok(())
    }

    /// Replaces an object by what `revise` makes of it.
    pub fn revise(
        &self,
        resource: &Resource,
        key: &Key,
        part: Part,
        dry_run: bool,
        revise: impl FnOnce(&Value) -> Result<Value, Refusal>,
    ) -> Result<Arc<Value>, Refusal> {
        let mut gone = false;
        let written = self.store.transact(&resource.storage, key, |current| {
            let Some(current) = current else {
                return Err(Refusal::not_found(&resource.qualified(), &key.name));
            };
            let old = current.value();
            let shown = crate::form::in_version(resource, old);
            let mut new = revise(&shown)?;
            admission::check_kind(resource, &mut new)?;
            if admission::child(&mut new, "metadata").is_none() {
                return Err(Refusal::bad_request("metadata must be an object"));
            }
            check_precondition(resource, key, old, &new)?;
            if resource.group == "events.k8s.io" {
                events::to_core(&mut new);
            }
            let mut new = carry_over(resource, old, new, part);
            if part != Part::Status {
                admission::set_defaults(resource, &mut new, false);
                self.settle(resource, key, Some(old), &mut new, dry_run)?;
            }
            if dry_run {
                return Ok(Decision::Keep(Some(new)));
            }
            let meta = &new["metadata"];
            let held = meta["finalizers"].as_array().is_some_and(|f| !f.is_empty());
            if !meta["deletionTimestamp"].is_null() && !held && resource.storage != "pods" {
                gone = resource.storage != "namespaces";
            }
            Ok(if gone { Decision::Remove } else { Decision::Put(new) })
        })?;
        if gone {
            self.forget(resource, key, &written);
        } else if !dry_run && resource.storage.starts_with("customresourcedefinitions.") {
            self.register(|registry| registry.insert_definition(&written));
        }
        Ok(written)
    }

    /// Replaces an object (PUT).
    pub fn update(
        &self,
        resource: &Resource,
        key: &Key,
        part: Part,
        object: Value,
        dry_run: bool,
    ) -> Result<Arc<Value>, Refusal> {
        if part == Part::Scale {
            let wanted = object["spec"]["replicas"].clone();
            return self.revise(resource, key, part, dry_run, |old| scaled(old, wanted));
        }
        self.revise(resource, key, part, dry_run, |_| Ok(object))
    }

    /// Patches an object. Server-side apply creates it when it is missing; the second value says so.
    #[allow(clippy::too_many_arguments)]
    pub fn patch(
        &self,
        resource: &Resource,
        key: &Key,
        part: Part,
        kind: PatchKind,
        body: Value,
        manager: &str,
        dry_run: bool,
    ) -> Result<(Arc<Value>, bool), Refusal> {
        if kind == PatchKind::Strategic && resource.custom {
            let why = "strategic merge patch is not supported for custom resources";
            return Err(Refusal::new(415, "UnsupportedMediaType", why));
        }
        if kind == PatchKind::Apply {
            return self.apply_patch(resource, key, part, body, manager, dry_run);
        }
        let written = self.revise(resource, key, part, dry_run, |old| {
            let mut new = if part == Part::Scale { scale_of(old) } else { old.clone() };
            match kind {
                PatchKind::Json => patch::json(&mut new, body)?,
                PatchKind::Merge => patch::merge(&mut new, &body),
                PatchKind::Strategic | PatchKind::Apply => patch::strategic(&mut new, &body),
            }
            if part == Part::Scale { scaled(old, new["spec"]["replicas"].clone()) } else { Ok(new) }
        })?;
        Ok((written, false))
    }

    fn apply_patch(
        &self,
        resource: &Resource,
        key: &Key,
        part: Part,
        body: Value,
        manager: &str,
        dry_run: bool,
    ) -> Result<(Arc<Value>, bool), Refusal> {
        let slot = (resource.storage.clone(), key.clone(), manager.to_owned());
        let last = self.applied().get(&slot).cloned();
        let missing = self.store.get(&resource.storage, key).is_none();
        let written = if missing && part == Part::Main {
            let mut object = body.clone();
            admission::check_kind(resource, &mut object)?;
            if let Some(metadata) = admission::child(&mut object, "metadata") {
                admission::default(metadata, "name", key.name.as_str());
            }
            self.create(resource, &key.namespace, object, dry_run)?
        } else {
            self.revise(resource, key, part, dry_run, |old| {
                let mut new = old.clone();
                patch::apply(&mut new, last.as_ref(), &body);
                Ok(new)
            })?
        };
        if !dry_run && part == Part::Main {
            self.applied().insert(slot, body);
        }
        Ok((written, missing))
    }

    /// Deletes an object; returns it, and whether it is gone at once.
    pub fn delete(
        &self,
        resource: &Resource,
        key: &Key,
        options: &DeleteOptions,
    ) -> Result<(Arc<Value>, bool), Refusal> {
        let mut gone = false;
        let written = self.store.transact(&resource.storage, key, |current| {
            let Some(current) = current else {
                return Err(Refusal::not_found(&resource.qualified(), &key.name));
            };
            let old = current.value();
            let meta = &old["metadata"];
            for (wanted, field) in [(&options.uid, "uid"), (&options.resource_version, "resourceVersion")] {
                if wanted.as_ref().is_some_and(|w| meta[field] != w.as_str()) {
                    let why = format!("the {field} in the precondition ({wanted:?}) does not match");
                    return Err(Refusal::conflict(&resource.qualified(), &key.name, &why));
                }
            }
            if options.dry_run {
                return Ok(Decision::Keep(None));
            }
            match self.marked_for_deletion(resource, old, options.grace) {
                Some(marked) => Ok(Decision::Put(marked)),
                None => {
                    gone = true;
                    Ok(Decision::Remove)
                }
            }
        })?;
        if options.orphan && !options.dry_run {
            self.orphan_dependents(&written["metadata"]["uid"]);
        }
        if gone {
            self.forget(resource, key, &written);
        }
        Ok((written, gone))
    }

    /// The object with a deletion timestamp, when it has to wait for its end.
    fn marked_for_deletion(&self, resource: &Resource, old: &Value, grace: Option<i64>) -> Option<Value> {
        let meta = old.get("metadata")?;
        let held = meta["finalizers"].as_array().is_some_and(|f| !f.is_empty());
        let namespace = resource.storage == "namespaces" && self.settings.controllers;
        let mut seconds = 0;
        if resource.storage == "pods" {
            seconds =
                grace.unwrap_or_else(|| old["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30));
            let idle = old["spec"]["nodeName"].as_str().unwrap_or_default().is_empty()
                || matches!(old["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
            if idle || !self.settings.controllers {
                seconds = 0;
            }
        }
        if !(held || namespace || seconds > 0) {
            return None;
        }
        let mut marked = old.clone();
        if marked["metadata"]["deletionTimestamp"].is_null() {
            marked["metadata"]["deletionTimestamp"] = clock::in_seconds(seconds).into();
            marked["metadata"]["deletionGracePeriodSeconds"] = seconds.into();
        } else if seconds < marked["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(i64::MAX) {
            marked["metadata"]["deletionGracePeriodSeconds"] = seconds.into();
        }
        if namespace {
            marked["status"] = json!({"phase": "Terminating"});
        }
        Some(marked)
    }

    fn orphan_dependents(&self, uid: &Value) {
        for storage in ["pods", "replicasets.apps", "endpointslices.discovery.k8s.io"] {
            for object in self.store.all(storage, &Scope::default()) {
                let owned = |owner: &Value| owner["uid"] == *uid;
                let owners =
                    object.value()["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
                if !owners.iter().any(owned) {
                    continue;
                }
                let kept: Vec<Value> = owners.into_iter().filter(|o| !owned(o)).collect();
                let _ = self.store.transact(storage, &object.key, |current| {
                    let Some(current) = current else { return Ok(Decision::Keep(None)) };
                    let mut new = (**current.value()).clone();
                    new["metadata"]["ownerReferences"] = Value::Array(kept);
                    Ok(Decision::Put(new))
                });
            }
        }
    }

    /// Clears what the server remembers beside a deleted object.
    fn forget(&self, resource: &Resource, key: &Key, object: &Value) {
        self.applied().retain(|(storage, k, _), _| !(*storage == resource.storage && k == key));
        if resource.storage == "services" {
            self.allocator().release(key);
        } else if resource.storage.starts_with("customresourcedefinitions.") {
            let group = object["spec"]["group"].as_str().unwrap_or_default();
            let plural = object["spec"]["names"]["plural"].as_str().unwrap_or_default();
            let storage = format!("{plural}.{group}");
            for instance in self.store.all(&storage, &Scope::default()) {
                let _ = self.store.transact(&storage, &instance.key, |_| Ok(Decision::Remove));
            }
            self.register(|registry| registry.remove_definition(object));
        } else if resource.storage == "namespaces" && !self.settings.controllers {
            self.empty_namespace(&key.name);
        }
    }

    /// Deletes everything in a namespace; returns how many objects have to wait for their end.
    pub fn empty_namespace(&self, namespace: &str) -> usize {
        let scope = Scope { namespace: namespace.to_owned(), ..Scope::default() };
        let resources: Vec<_> =
            self.read(|registry| registry.all().filter(|r| r.namespaced).cloned().collect());
        let mut waiting = 0;
        for resource in resources {
            for object in self.store.all(&resource.storage, &scope) {
                let deleting = !object.value()["metadata"]["deletionTimestamp"].is_null();
                let gone = !deleting
                    && matches!(
                        self.delete(&resource, &object.key, &DeleteOptions::default()),
                        Ok((_, true))
                    );
                waiting += usize::from(!gone);
            }
        }
        waiting
    }
}

fn check_precondition(resource: &Resource, key: &Key, old: &Value, new: &Value) -> Result<(), Refusal> {
    let (before, after) = (&old["metadata"], &new["metadata"]);
    let given = after["resourceVersion"].as_str().unwrap_or_default();
    if !given.is_empty() && before["resourceVersion"] != given {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        return Err(Refusal::conflict(&resource.qualified(), &key.name, why));
    }
    if after["uid"].is_string() && after["uid"] != before["uid"] {
        let why = format!(
            "Precondition failed: UID in precondition: {}, UID in object meta: {}",
            after["uid"], before["uid"]
        );
        return Err(Refusal::conflict(&resource.qualified(), &key.name, &why));
    }
    if after["name"].is_string() && after["name"] != key.name.as_str() {
        return Err(Refusal::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            after["name"], key.name
        )));
    }
    Ok(())
}

/// What a write may not change comes from the stored object.
fn carry_over(resource: &Resource, old: &Value, mut new: Value, part: Part) -> Value {
    if part == Part::Status {
        let mut result = old.clone();
        if let Some(map) = result.as_object_mut() {
            match new.get_mut("status").map(Value::take) {
                Some(status) if !status.is_null() => map.insert("status".into(), status),
                _ => map.remove("status"),
            };
        }
        return result;
    }
    const KEPT: [&str; 8] = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "resourceVersion",
    ];
    if let Some(metadata) = admission::child(&mut new, "metadata").and_then(Value::as_object_mut) {
        for field in KEPT {
            match old["metadata"].get(field) {
                Some(value) => metadata.insert(field.into(), value.clone()),
                None => metadata.remove(field),
            };
        }
        metadata.remove("managedFields");
    }
    if let Some(map) = new.as_object_mut() {
        if resource.status {
            match old.get("status") {
                Some(status) => map.insert("status".into(), status.clone()),
                None => map.remove("status"),
            };
        }
        if map.get("status").is_some_and(Value::is_null) {
            map.remove("status");
        }
    }
    if admission::has_generation(resource) {
        let desired = |value: &Value| -> Vec<(String, Value)> {
            let fields = value.as_object().into_iter().flatten();
            fields
                .filter(|(k, _)| *k != "metadata" && *k != "status")
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        if desired(old) != desired(&new) {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
            new["metadata"]["generation"] = generation.into();
        }
    }
    new
}

/// The Scale (autoscaling/v1) of an object.
pub fn scale_of(object: &Value) -> Value {
    let selector = object["spec"]["selector"]["matchLabels"].as_object().into_iter().flatten();
    let selector: Vec<String> =
        selector.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    let meta = &object["metadata"];
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"], "creationTimestamp": meta["creationTimestamp"],
        },
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or(0)},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0), "selector": selector.join(",")},
    })
}

fn scaled(object: &Value, replicas: Value) -> Result<Value, Refusal> {
    if replicas.as_i64().is_none_or(|n| n < 0) {
        let cause = Cause::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(Refusal::invalid("Scale", "autoscaling", "", &[cause]));
    }
    let mut object = object.clone();
    match admission::child(&mut object, "spec") {
        Some(spec) => spec["replicas"] = replicas,
        None => return Err(Refusal::bad_request("spec is not an object")),
    }
    Ok(object)
}
