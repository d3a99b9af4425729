//! Deployments to ReplicaSets: rolling updates within maxSurge and maxUnavailable.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Controllers, is_active, is_available, is_terminating, owner};
use crate::clock;
use crate::store::{Key, Object};
use crate::verbs::Part;

const DEPLOYMENTS: &str = "deployments.apps";
const SETS: &str = "replicasets.apps";
const REVISION: &str = "deployment.kubernetes.io/revision";

/// A number, or a percentage of the total, rounded up or down.
pub fn share(value: &Value, total: usize, up: bool) -> usize {
    if let Some(number) = value.as_u64() {
        return usize::try_from(number).unwrap_or(usize::MAX);
    }
    let percent = value.as_str().and_then(|s| s.strip_suffix('%')?.parse::<usize>().ok()).unwrap_or(0);
    let scaled = total.saturating_mul(percent);
    if up { scaled.div_ceil(100) } else { scaled / 100 }
}

/// A ReplicaSet of the Deployment, with what is known of its pods.
struct Set {
    key: Key,
    wanted: usize,
    available: usize,
    /// Pods that exist and are not ending.
    active: usize,
    /// Pods that exist at all.
    all: usize,
    revision: u64,
}

fn wanted(set: &Value) -> usize {
    usize::try_from(set["spec"]["replicas"].as_i64().unwrap_or(0)).unwrap_or(0)
}

impl Controllers {
    pub(super) fn look_at_deployment(&mut self, key: &Key) {
        let Some(deployment) = self.find(DEPLOYMENTS, key).filter(|d| !is_terminating(d)) else { return };
        let hash = clock::digest(&deployment["spec"]["template"]);
        let new_key = Key::new(&key.namespace, &format!("{}-{hash}", key.name));
        let uid = &deployment["metadata"]["uid"];
        let objects = self.owned(SETS, &key.namespace, uid);
        let mut sets: Vec<Set> = objects.iter().map(|o| self.describe_set(o)).collect();
        let newest = sets.iter().map(|s| s.revision).max().unwrap_or(0);
        let paused = deployment["spec"]["paused"] == true;
        match sets.iter().find(|s| s.key == new_key) {
            None if paused => {}
            None => {
                self.create_set(&deployment, &new_key, &hash, newest + 1);
                // The new set's own change brings us back here.
                sets.push(Set {
                    key: new_key.clone(),
                    wanted: 0,
                    available: 0,
                    active: 0,
                    all: 0,
                    revision: newest + 1,
                });
                self.set_revision(DEPLOYMENTS, key, newest + 1);
            }
            Some(set) if set.revision < newest => {
                self.set_revision(SETS, &set.key, newest + 1);
                self.set_revision(DEPLOYMENTS, key, newest + 1);
            }
            Some(_) => {}
        }
        let total = usize::try_from(deployment["spec"]["replicas"].as_i64().unwrap_or(1)).unwrap_or(0);
        let (new, mut old): (Vec<Set>, Vec<Set>) = sets.into_iter().partition(|s| s.key == new_key);
        if let Some(new) = new.first().filter(|_| !paused) {
            if deployment["spec"]["strategy"]["type"] == "Recreate" {
                self.recreate(total, new, &old);
            } else {
                self.roll(&deployment["spec"]["strategy"]["rollingUpdate"], total, new, &mut old);
            }
        }
        self.drop_history(&deployment, &old);
        self.report_deployment(key, &deployment, total, new.first(), &old);
    }

    fn describe_set(&self, object: &Arc<Object>) -> Set {
        let value = object.value();
        let pods = self.owned("pods", &object.key.namespace, &value["metadata"]["uid"]);
        let revision = value["metadata"]["annotations"][REVISION].as_str().and_then(|r| r.parse().ok());
        Set {
            key: object.key.clone(),
            wanted: wanted(value),
            available: pods.iter().filter(|p| is_available(p.value())).count(),
            active: pods.iter().filter(|p| is_active(p.value())).count(),
            all: pods.len(),
            revision: revision.unwrap_or(0),
        }
    }

    fn create_set(&self, deployment: &Value, key: &Key, hash: &str, revision: u64) {
        let spec = &deployment["spec"];
        let mut template = spec["template"].clone();
        template["metadata"]["labels"]["pod-template-hash"] = hash.into();
        let mut selector = spec["selector"].clone();
        selector["matchLabels"]["pod-template-hash"] = hash.into();
        let set = json!({
            "kind": "ReplicaSet", "apiVersion": "apps/v1",
            "metadata": {
                "name": key.name, "labels": template["metadata"]["labels"],
                "annotations": {REVISION: revision.to_string()},
                "ownerReferences": [owner("Deployment", "apps/v1", deployment)],
            },
            "spec": {"replicas": 0, "selector": selector, "template": template},
        });
        self.create(SETS, &key.namespace, set);
    }

    fn set_revision(&self, storage: &str, key: &Key, revision: u64) {
        self.write(storage, key, Part::Main, |object| {
            object["metadata"]["annotations"][REVISION] = revision.to_string().into();
        });
    }

    fn scale(&self, set: &Set, to: usize) {
        if set.wanted != to {
            self.write(SETS, &set.key, Part::Main, |object| object["spec"]["replicas"] = to.into());
        }
    }

    fn recreate(&self, total: usize, new: &Set, old: &[Set]) {
        old.iter().for_each(|set| self.scale(set, 0));
        // Ending pods count: the old ones are to be gone before new ones come.
        if old.iter().all(|set| set.all == 0) {
            self.scale(new, total);
        }
    }

    fn roll(&self, limits: &Value, total: usize, new: &Set, old: &mut [Set]) {
        let surge = share(&limits["maxSurge"], total, true);
        let mut unavailable = share(&limits["maxUnavailable"], total, false).min(total);
        if surge == 0 && unavailable == 0 {
            unavailable = 1;
        }
        let asked: usize = new.wanted + old.iter().map(|s| s.wanted).sum::<usize>();
        if new.wanted > total {
            self.scale(new, total);
        } else {
            let room = (total + surge).saturating_sub(asked);
            self.scale(new, total.min(new.wanted + room));
        }
        // Old pods that do not serve go first, then serving ones while enough others do.
        old.sort_by_key(|s| s.revision);
        let least = total.saturating_sub(unavailable);
        let serving: usize = new.available.min(new.wanted) + old.iter().map(|s| s.available).sum::<usize>();
        let mut spare = serving.saturating_sub(least);
        for set in old.iter() {
            // Pods asked for but not there yet are not counted as idle: they may be starting.
            let idle = set.active.saturating_sub(set.available).min(set.wanted);
            let gone = spare.min(set.wanted - idle).min(set.available);
            spare -= gone;
            self.scale(set, set.wanted - idle - gone);
        }
    }

    fn drop_history(&self, deployment: &Value, old: &[Set]) {
        let keep = deployment["spec"]["revisionHistoryLimit"].as_u64().unwrap_or(10);
        let mut idle: Vec<&Set> = old.iter().filter(|s| s.wanted == 0 && s.all == 0).collect();
        idle.sort_by_key(|s| std::cmp::Reverse(s.revision));
        for set in idle.iter().skip(usize::try_from(keep).unwrap_or(10)) {
            self.delete(SETS, &set.key, None);
        }
    }

    fn report_deployment(&self, key: &Key, deployment: &Value, total: usize, new: Option<&Set>, old: &[Set]) {
        let sum = |field: fn(&Set) -> usize| new.map_or(0, field) + old.iter().map(field).sum::<usize>();
        let (active, available) = (sum(|s| s.active), sum(|s| s.available));
        let updated = new.map_or(0, |s| s.active);
        let limits = &deployment["spec"]["strategy"]["rollingUpdate"];
        let enough = available + share(&limits["maxUnavailable"], total, false) >= total;
        let complete = updated == total && active == total && available == total;
        let before = &deployment["status"]["conditions"];
        let now = clock::now();
        let condition = |kind: &str, status: bool, reason: &str, message: String| {
            let status = if status { "True" } else { "False" };
            let same = before.as_array().into_iter().flatten().find(|c| c["type"] == kind);
            let since = same
                .filter(|c| c["status"] == status)
                .map_or(json!(now), |c| c["lastTransitionTime"].clone());
            let updated =
                same.filter(|c| c["reason"] == reason).map_or(json!(now), |c| c["lastUpdateTime"].clone());
            json!({"type": kind, "status": status, "reason": reason, "message": message,
                "lastTransitionTime": since, "lastUpdateTime": updated})
        };
        let name = new.map_or("", |s| s.key.name.as_str());
        let mut status = json!({
            "observedGeneration": deployment["metadata"]["generation"], "replicas": active,
            "updatedReplicas": updated, "readyReplicas": available, "availableReplicas": available,
            "conditions": [
                if enough {
                    condition("Available", true, "MinimumReplicasAvailable", "Deployment has minimum availability.".into())
                } else {
                    condition("Available", false, "MinimumReplicasUnavailable",
                        "Deployment does not have minimum availability.".into())
                },
                if complete {
                    condition("Progressing", true, "NewReplicaSetAvailable",
                        format!("ReplicaSet \"{name}\" has successfully progressed."))
                } else {
                    condition("Progressing", true, "ReplicaSetUpdated", format!("ReplicaSet \"{name}\" is progressing."))
                },
            ],
        });
        if total > available {
            status["unavailableReplicas"] = (total - available).into();
        }
        self.write_status(DEPLOYMENTS, key, status);
    }
}
