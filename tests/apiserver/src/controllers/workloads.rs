//! ReplicaSets, StatefulSets and DaemonSets to pods.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Controllers, has_condition, is_active, is_available, is_terminating, owner};
use crate::clock;
use crate::selector::{LabelSelector, Scope};
use crate::store::{Key, Object};

/// A pod of a template: labels, annotations and spec are the template's.
fn pod_of(template: &Value, labels: &[(&str, &str)], owner: Value) -> Value {
    let mut metadata = json!({"labels": template["metadata"]["labels"], "ownerReferences": [owner]});
    if template["metadata"]["annotations"].is_object() {
        metadata["annotations"] = template["metadata"]["annotations"].clone();
    }
    for (key, value) in labels {
        metadata["labels"][*key] = (*value).into();
    }
    json!({"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": template["spec"]})
}

fn replicas(object: &Value) -> usize {
    usize::try_from(object["spec"]["replicas"].as_i64().unwrap_or(1)).unwrap_or(0)
}

fn count(pods: &[Arc<Object>], is: impl Fn(&Value) -> bool) -> usize {
    pods.iter().filter(|p| is(p.value())).count()
}

impl Controllers {
    pub(super) fn look_at_replica_set(&mut self, key: &Key) {
        const STORAGE: &str = "replicasets.apps";
        let Some(set) = self.find(STORAGE, key).filter(|s| !is_terminating(s)) else { return };
        let mut pods = self.owned("pods", &key.namespace, &set["metadata"]["uid"]);
        pods.retain(|p| is_active(p.value()));
        let wanted = replicas(&set);
        for _ in pods.len()..wanted {
            let mut pod = pod_of(&set["spec"]["template"], &[], owner("ReplicaSet", "apps/v1", &set));
            pod["metadata"]["generateName"] = format!("{}-", key.name).into();
            self.create("pods", &key.namespace, pod);
        }
        if pods.len() > wanted {
            // Those that serve stay, then the oldest.
            pods.sort_by_key(|p| {
                (!is_available(p.value()), p.value()["metadata"]["creationTimestamp"].to_string())
            });
            for pod in &pods[wanted..] {
                self.delete("pods", &pod.key, None);
            }
        }
        let mut now = self.owned("pods", &key.namespace, &set["metadata"]["uid"]);
        now.retain(|p| is_active(p.value()));
        let ready = count(&now, |p| has_condition(p, "Ready"));
        let status = json!({
            "replicas": now.len(), "fullyLabeledReplicas": now.len(), "readyReplicas": ready,
            "availableReplicas": ready, "observedGeneration": set["metadata"]["generation"],
        });
        self.write_status(STORAGE, key, status);
    }

    pub(super) fn look_at_stateful_set(&mut self, key: &Key) {
        const STORAGE: &str = "statefulsets.apps";
        let Some(set) = self.find(STORAGE, key).filter(|s| !is_terminating(s)) else { return };
        let wanted = replicas(&set);
        let start = usize::try_from(set["spec"]["ordinals"]["start"].as_u64().unwrap_or(0)).unwrap_or(0);
        let ordered = set["spec"]["podManagementPolicy"] != "Parallel";
        let revision = format!("{}-{}", key.name, clock::digest(&set["spec"]["template"]));
        let pods = self.owned("pods", &key.namespace, &set["metadata"]["uid"]);
        let of = |ordinal: usize| {
            let name = format!("{}-{ordinal}", key.name);
            pods.iter().find(|p| p.key.name == name)
        };
        let mut settled = true;
        for ordinal in start..start + wanted {
            match of(ordinal) {
                None => {
                    self.create("pods", &key.namespace, self.ordinal_pod(&set, key, ordinal, &revision));
                    settled = false;
                }
                Some(pod) => settled &= is_available(pod.value()),
            }
            if ordered && !settled {
                break;
            }
        }
        let ordinal_of = |pod: &Arc<Object>| -> usize {
            pod.key.name.rsplit_once('-').and_then(|(_, n)| n.parse().ok()).unwrap_or(0)
        };
        let mut extra: Vec<_> = pods.iter().filter(|p| ordinal_of(p) >= start + wanted).collect();
        extra.sort_by_key(|p| std::cmp::Reverse(ordinal_of(p)));
        if ordered {
            extra.truncate(1);
        }
        for pod in extra.iter().filter(|p| !is_terminating(p.value())) {
            self.delete("pods", &pod.key, None);
        }
        let old = |pod: &Value| pod["metadata"]["labels"]["controller-revision-hash"] != revision.as_str();
        if settled && extra.is_empty() && set["spec"]["updateStrategy"]["type"] != "OnDelete" {
            let partition = set["spec"]["updateStrategy"]["rollingUpdate"]["partition"].as_u64().unwrap_or(0);
            let partition = usize::try_from(partition).unwrap_or(0);
            let stale = (start..start + wanted).rev().filter(|n| *n >= partition).filter_map(&of);
            if let Some(pod) = stale.into_iter().find(|p| old(p.value())) {
                self.delete("pods", &pod.key, None);
            }
        }
        let mut now = self.owned("pods", &key.namespace, &set["metadata"]["uid"]);
        now.retain(|p| is_active(p.value()));
        let ready = count(&now, |p| has_condition(p, "Ready"));
        let updated = count(&now, |p| !old(p));
        let done = updated == now.len();
        let current =
            set["status"]["currentRevision"].as_str().filter(|_| !done).unwrap_or(&revision).to_owned();
        let status = json!({
            "replicas": now.len(), "readyReplicas": ready, "availableReplicas": ready,
            "updatedReplicas": updated, "currentReplicas": if done { updated } else { now.len() - updated },
            "currentRevision": current, "updateRevision": revision, "collisionCount": 0,
            "observedGeneration": set["metadata"]["generation"],
        });
        self.write_status(STORAGE, key, status);
    }

    fn ordinal_pod(&self, set: &Value, key: &Key, ordinal: usize, revision: &str) -> Value {
        let name = format!("{}-{ordinal}", key.name);
        let index = ordinal.to_string();
        let labels = [
            ("controller-revision-hash", revision),
            ("statefulset.kubernetes.io/pod-name", name.as_str()),
            ("apps.kubernetes.io/pod-index", index.as_str()),
        ];
        let mut pod = pod_of(&set["spec"]["template"], &labels, owner("StatefulSet", "apps/v1", set));
        pod["spec"]["hostname"] = name.as_str().into();
        pod["spec"]["subdomain"] = set["spec"]["serviceName"].clone();
        pod["metadata"]["name"] = name.into();
        pod
    }

    pub(super) fn look_at_daemon_set(&mut self, key: &Key) {
        const STORAGE: &str = "daemonsets.apps";
        let Some(set) = self.find(STORAGE, key).filter(|s| !is_terminating(s)) else { return };
        let template = &set["spec"]["template"];
        let selector = LabelSelector::from_map(&template["spec"]["nodeSelector"]);
        let hash = clock::digest(template);
        let nodes = self.state.store.all("nodes", &Scope::default());
        let nodes: Vec<&str> =
            nodes.iter().filter(|n| selector.matches(&n.labels)).map(|n| n.key.name.as_str()).collect();
        let pods = self.owned("pods", &key.namespace, &set["metadata"]["uid"]);
        let node_of = |pod: &Value| pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
        for node in &nodes {
            // A pod that is ending still has the node.
            if pods.iter().any(|p| node_of(p.value()) == **node) {
                continue;
            }
            let owner = owner("DaemonSet", "apps/v1", &set);
            let mut pod = pod_of(template, &[("controller-revision-hash", &hash)], owner);
            pod["metadata"]["generateName"] = format!("{}-", key.name).into();
            pod["spec"]["nodeName"] = (*node).into();
            self.create("pods", &key.namespace, pod);
        }
        let old = |pod: &Value| pod["metadata"]["labels"]["controller-revision-hash"] != hash.as_str();
        for pod in pods.iter().filter(|p| is_active(p.value())) {
            if !nodes.contains(&node_of(pod.value()).as_str()) {
                self.delete("pods", &pod.key, None);
            }
        }
        let strategy = &set["spec"]["updateStrategy"];
        let allowed =
            super::rollout::share(&strategy["rollingUpdate"]["maxUnavailable"], nodes.len(), false).max(1);
        let available = count(&pods, is_available);
        let mut down = nodes.len().saturating_sub(available);
        if strategy["type"] != "OnDelete" {
            for pod in pods.iter().filter(|p| is_active(p.value()) && old(p.value())) {
                if !is_available(pod.value()) {
                    self.delete("pods", &pod.key, None);
                } else if down < allowed {
                    down += 1;
                    self.delete("pods", &pod.key, None);
                }
            }
        }
        let mut now = self.owned("pods", &key.namespace, &set["metadata"]["uid"]);
        now.retain(|p| is_active(p.value()));
        let ready = count(&now, |p| has_condition(p, "Ready"));
        let status = json!({
            "desiredNumberScheduled": nodes.len(), "currentNumberScheduled": now.len(), "numberMisscheduled": 0,
            "numberReady": ready, "numberAvailable": ready, "updatedNumberScheduled": count(&now, |p| !old(p)),
            "numberUnavailable": nodes.len().saturating_sub(ready),
            "observedGeneration": set["metadata"]["generation"],
        });
        self.write_status(STORAGE, key, status);
    }
}
