//! The controllers, in one task: changes of the store name the objects to look at, each look is a
//! function of the store's present state, writes go through the same verbs as clients' writes.

mod endpoints;
mod legacy;
mod pods;
mod rollout;
mod services;
mod workloads;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::builder::own_service;
use crate::registry::Resource;
use crate::selector::{LabelSelector, Labels, Scope};
use crate::state::State;
use crate::store::{Change, Key, Object};
use crate::verbs::{DeleteOptions, Part};

/// Something to look at. Pods come first, so that what depends on them sees their new state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    Pod(Key),
    Node(String),
    ReplicaSet(Key),
    Deployment(Key),
    StatefulSet(Key),
    DaemonSet(Key),
    Service(Key),
    Namespace(String),
}

const WATCHED: [&str; 8] = [
    "pods",
    "services",
    "nodes",
    "namespaces",
    "replicasets.apps",
    "deployments.apps",
    "statefulsets.apps",
    "daemonsets.apps",
];

const SLICES: &str = "endpointslices.discovery.k8s.io";

/// What the controllers remember between looks.
struct Controllers {
    state: Arc<State>,
    cursors: HashMap<&'static str, u64>,
    due: BTreeSet<Task>,
    timers: BinaryHeap<Reverse<(Instant, Task)>>,
    /// Selectors of Services that came through the API, by namespace.
    selectors: BTreeMap<String, BTreeMap<String, LabelSelector>>,
    /// Our slices by Service.
    slices: HashMap<Key, BTreeSet<String>>,
    kubelet: pods::Bookkeeping,
}

/// Runs all controllers until the task is dropped.
pub async fn run(state: Arc<State>) {
    let mut changed = state.store.subscribe();
    let mut controllers = Controllers {
        state,
        cursors: WATCHED.iter().map(|storage| (*storage, 0)).collect(),
        due: BTreeSet::new(),
        timers: BinaryHeap::new(),
        selectors: BTreeMap::new(),
        slices: HashMap::new(),
        kubelet: pods::Bookkeeping::default(),
    };
    loop {
        changed.borrow_and_update();
        controllers.observe();
        while let Some(task) = controllers.due.pop_first() {
            controllers.look(&task);
            if controllers.due.is_empty() {
                controllers.observe();
                // Let requests in between the steps of a long rollout.
                tokio::task::yield_now().await;
            }
        }
        let next = controllers.timers.peek().map(|Reverse((at, _))| *at);
        let wake = async {
            match next {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changed.changed() => {}
            () = wake => {}
        }
        let now = Instant::now();
        while controllers.timers.peek().is_some_and(|Reverse((at, _))| *at <= now) {
            if let Some(Reverse((_, task))) = controllers.timers.pop() {
                controllers.due.insert(task);
            }
        }
    }
}

impl Controllers {
    /// Turns the changes since the last time into tasks.
    fn observe(&mut self) {
        for storage in WATCHED {
            let cursor = self.cursors.get(storage).copied().unwrap_or(0);
            match self.state.store.changes(storage, cursor) {
                Ok((changes, revision)) => {
                    self.cursors.insert(storage, revision);
                    for change in changes.iter().filter(|c| !c.object.quiet) {
                        self.note(storage, change);
                    }
                }
                Err(_) => {
                    // The history was compacted: look at everything.
                    self.cursors.insert(storage, self.state.store.revision());
                    let all = self.state.store.all(storage, &Scope::default());
                    for object in all.into_iter().filter(|o| !o.quiet) {
                        let revision = object.revision;
                        let change = Change { revision, object, previous: None, deleted: false };
                        self.note(storage, &change);
                    }
                }
            }
        }
    }

    fn note(&mut self, storage: &str, change: &Change) {
        let object = &change.object;
        let key = object.key.clone();
        let value = object.value().clone();
        if change.deleted {
            self.delete_dependents(&value["metadata"]["uid"]);
        }
        match storage {
            "pods" => {
                self.note_pod(change, &value);
                self.due.insert(Task::Pod(key));
            }
            "services" => {
                if change.deleted && key.namespace == "default" && key.name == "kubernetes" {
                    // The server's own Service always comes back.
                    for (storage, object) in own_service(&self.state.settings) {
                        self.create(storage, "default", object);
                    }
                    return;
                }
                let selector = LabelSelector::from_map(&value["spec"]["selector"]);
                let names = self.selectors.entry(key.namespace.clone()).or_default();
                if change.deleted || selector.is_empty() {
                    names.remove(&key.name);
                } else {
                    names.insert(key.name.clone(), selector);
                }
                self.due.insert(Task::Service(key));
            }
            "nodes" => {
                self.due.insert(Task::Node(key.name));
                for set in self.state.store.all("daemonsets.apps", &Scope::default()) {
                    self.due.insert(Task::DaemonSet(set.key.clone()));
                }
            }
            "namespaces" => {
                self.due.insert(Task::Namespace(key.name));
            }
            "replicasets.apps" => {
                self.note_owner(&value);
                self.due.insert(Task::ReplicaSet(key));
            }
            "deployments.apps" => {
                self.due.insert(Task::Deployment(key));
            }
            "statefulsets.apps" => {
                self.due.insert(Task::StatefulSet(key));
            }
            "daemonsets.apps" => {
                self.due.insert(Task::DaemonSet(key));
            }
            _ => {}
        }
    }

    fn note_pod(&mut self, change: &Change, pod: &Value) {
        let key = &change.object.key;
        self.note_owner(pod);
        if change.deleted {
            self.kubelet.forget(key);
            let namespace = self.state.store.get("namespaces", &Key::new("", &key.namespace));
            if namespace.is_some_and(|n| !n.value()["metadata"]["deletionTimestamp"].is_null()) {
                self.due.insert(Task::Namespace(key.namespace.clone()));
            }
        }
        let before = change.previous.as_ref().map(|o| &o.labels);
        for (name, selector) in self.selectors.get(&key.namespace).into_iter().flatten() {
            let selects = |labels: &Labels| selector.matches(labels);
            if selects(&change.object.labels) || before.is_some_and(selects) {
                self.due.insert(Task::Service(Key::new(&key.namespace, name)));
            }
        }
    }

    fn note_owner(&mut self, value: &Value) {
        let namespace = value["metadata"]["namespace"].as_str().unwrap_or_default();
        for owner in value["metadata"]["ownerReferences"].as_array().into_iter().flatten() {
            let key = Key::new(namespace, owner["name"].as_str().unwrap_or_default());
            match owner["kind"].as_str() {
                Some("ReplicaSet") => self.due.insert(Task::ReplicaSet(key)),
                Some("Deployment") => self.due.insert(Task::Deployment(key)),
                Some("StatefulSet") => self.due.insert(Task::StatefulSet(key)),
                Some("DaemonSet") => self.due.insert(Task::DaemonSet(key)),
                _ => false,
            };
        }
    }

    fn look(&mut self, task: &Task) {
        match task {
            Task::Pod(key) => self.look_at_pod(key),
            Task::Node(name) => self.look_at_node(name),
            Task::ReplicaSet(key) => self.look_at_replica_set(key),
            Task::Deployment(key) => self.look_at_deployment(key),
            Task::StatefulSet(key) => self.look_at_stateful_set(key),
            Task::DaemonSet(key) => self.look_at_daemon_set(key),
            Task::Service(key) => {
                self.assign_load_balancer(key);
                self.look_at_endpoints(key);
            }
            Task::Namespace(name) => self.look_at_namespace(name),
        }
    }

    /// The garbage collector: what a deleted object owned goes too.
    fn delete_dependents(&mut self, uid: &Value) {
        for storage in ["replicasets.apps", "pods"] {
            let owned = self.state.store.all(storage, &Scope::default());
            for object in owned.iter().filter(|o| is_owned(o.value(), uid)) {
                self.delete(storage, &object.key, None);
            }
        }
    }

    fn look_at_namespace(&mut self, name: &str) {
        let Some(namespace) = self.state.store.get("namespaces", &Key::new("", name)) else { return };
        if namespace.value()["metadata"]["deletionTimestamp"].is_null() {
            return;
        }
        if self.state.empty_namespace(name) == 0 {
            crate::control::remove_unchecked(&self.state, "namespaces", &namespace.key);
        }
    }

    fn resource(&self, storage: &str) -> Arc<Resource> {
        let found = self.state.read(|registry| registry.named(storage));
        // Only built-in resources are asked for; they cannot be removed.
        found.unwrap_or_else(|| Arc::new(Resource::new("", "v1", storage, "", true)))
    }

    fn find(&self, storage: &str, key: &Key) -> Option<Arc<Value>> {
        self.state.store.get(storage, key).map(|object| object.value().clone())
    }

    fn in_namespace(&self, storage: &str, namespace: &str) -> Vec<Arc<Object>> {
        let scope = Scope { namespace: namespace.to_owned(), ..Scope::default() };
        self.state.store.all(storage, &scope)
    }

    /// Objects of a namespace that the object with this uid owns.
    fn owned(&self, storage: &str, namespace: &str, uid: &Value) -> Vec<Arc<Object>> {
        let mut all = self.in_namespace(storage, namespace);
        all.retain(|o| is_owned(o.value(), uid));
        all
    }

    /// Creates an object; one that exists already is left alone.
    fn create(&self, storage: &str, namespace: &str, object: Value) {
        if let Err(refusal) = self.state.create(&self.resource(storage), namespace, object, false) {
            tracing::debug!(storage, namespace, %refusal, "controller could not create");
        }
    }

    /// Writes an object or its status; one that is gone by now is left alone.
    fn write(&self, storage: &str, key: &Key, part: Part, change: impl FnOnce(&mut Value)) {
        let written = self.state.revise(&self.resource(storage), key, part, false, |old| {
            let mut new = old.clone();
            change(&mut new);
            Ok(new)
        });
        if let Err(refusal) = written {
            tracing::debug!(storage, name = key.name, %refusal, "controller could not write");
        }
    }

    fn write_status(&self, storage: &str, key: &Key, status: Value) {
        self.write(storage, key, Part::Status, |object| object["status"] = status);
    }

    fn delete(&self, storage: &str, key: &Key, grace: Option<i64>) {
        let options = DeleteOptions { grace, ..DeleteOptions::default() };
        let _ = self.state.delete(&self.resource(storage), key, &options);
    }
}

fn is_owned(value: &Value, uid: &Value) -> bool {
    let mut owners = value["metadata"]["ownerReferences"].as_array().into_iter().flatten();
    owners.any(|owner| owner["uid"] == *uid)
}

/// An `ownerReferences` entry for an object that controls another.
fn owner(kind: &str, api_version: &str, object: &Value) -> Value {
    json!({
        "apiVersion": api_version, "kind": kind, "name": object["metadata"]["name"],
        "uid": object["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true,
    })
}

/// Whether a condition of `status.conditions` is True.
fn has_condition(object: &Value, kind: &str) -> bool {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|c| c["type"] == kind && c["status"] == "True")
}

fn is_terminating(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

/// A pod that counts for its controller: not ended, not being deleted.
fn is_active(pod: &Value) -> bool {
    !is_terminating(pod) && !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

/// A pod that counts as available.
fn is_available(pod: &Value) -> bool {
    is_active(pod) && has_condition(pod, "Ready")
}
