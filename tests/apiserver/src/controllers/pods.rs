//! The scheduler, and the kubelet where it is simulated.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Controllers, Task, has_condition, is_terminating};
use crate::clock;
use crate::selector::{LabelSelector, Scope};
use crate::state::Kubelet;
use crate::store::{Key, Object};
use crate::verbs::Part;

/// Addresses and appointments of the simulated kubelets.
#[derive(Debug, Default)]
pub struct Bookkeeping {
    /// Holder of each pod address.
    addresses: HashMap<IpAddr, Key>,
    /// The offset last given in each range: freed addresses rest for a while.
    last: HashMap<IpNet, u128>,
    /// When a pod is to become ready, or to be gone, by uid.
    ready_at: HashMap<String, Instant>,
    gone_at: HashMap<String, Instant>,
}

impl Bookkeeping {
    /// Frees what a pod held.
    pub fn forget(&mut self, key: &Key) {
        self.addresses.retain(|_, holder| holder != key);
    }

    fn address(&mut self, range: &IpNet, key: &Key) -> Option<IpAddr> {
        let bits = u32::from(range.max_prefix_len() - range.prefix_len());
        let size = if bits >= 64 { 1_u128 << 64 } else { 1_u128 << bits };
        if size < 4 {
            return None;
        }
        // The first address is the node's own on the bridge, the last one a broadcast address.
        let usable = size - 3;
        let last = self.last.get(range).copied().unwrap_or(1);
        for step in 0..usable {
            let offset = 2 + (last - 1 + step) % usable;
            let ip = match range.network() {
                IpAddr::V4(base) => IpAddr::V4((u32::from(base) | u32::try_from(offset).ok()?).into()),
                IpAddr::V6(base) => IpAddr::V6((u128::from(base) | offset).into()),
            };
            if let Entry::Vacant(slot) = self.addresses.entry(ip) {
                slot.insert(key.clone());
                self.last.insert(*range, offset);
                return Some(ip);
            }
        }
        None
    }
}

impl Controllers {
    pub(super) fn look_at_pod(&mut self, key: &Key) {
        let Some(pod) = self.find("pods", key) else { return };
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if is_terminating(&pod) {
            self.end_pod(key, &pod);
        } else if node.is_empty() {
            self.schedule(key, &pod);
        } else {
            self.start_pod(key, &pod, node);
        }
    }

    /// Pods of a node that is gone go too; pods that wait for a node are looked at again.
    pub(super) fn look_at_node(&mut self, name: &str) {
        let gone = self.state.store.get("nodes", &Key::new("", name)).is_none();
        for pod in self.state.store.all("pods", &Scope::default()) {
            let at = pod.value()["spec"]["nodeName"].as_str().unwrap_or_default();
            if gone && at == name {
                self.delete("pods", &pod.key, Some(0));
            } else if at.is_empty() {
                self.due.insert(Task::Pod(pod.key.clone()));
            }
        }
    }

    /// The Ready node with the fewest pods of the same owner, then with the fewest pods.
    fn schedule(&self, key: &Key, pod: &Value) {
        let wanted = LabelSelector::from_map(&pod["spec"]["nodeSelector"]);
        let nodes = self.state.store.all("nodes", &Scope::default());
        let fits = |node: &&Arc<Object>| {
            has_condition(node.value(), "Ready")
                && node.value()["spec"]["unschedulable"] != true
                && wanted.matches(&node.labels)
        };
        let mut loads: BTreeMap<&str, (usize, usize)> =
            nodes.iter().filter(fits).map(|n| (n.key.name.as_str(), (0, 0))).collect();
        let pods = self.state.store.all("pods", &Scope::default());
        let owner = &pod["metadata"]["ownerReferences"][0]["uid"];
        for other in &pods {
            let other = other.value();
            if let Some(load) = other["spec"]["nodeName"].as_str().and_then(|n| loads.get_mut(n)) {
                load.1 += 1;
                load.0 += usize::from(other["metadata"]["ownerReferences"][0]["uid"] == *owner);
            }
        }
        let chosen = loads.iter().min_by_key(|(name, load)| (**load, **name)).map(|(name, _)| *name);
        let now = clock::now();
        let Some(node) = chosen else {
            let message =
                format!("0/{} nodes are available: none is Ready, schedulable and selected", nodes.len());
            self.write("pods", key, Part::Status, |pod| {
                set_condition(
                    pod,
                    json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                    "message": message, "lastProbeTime": null, "lastTransitionTime": now}),
                );
            });
            return;
        };
        self.write("pods", key, Part::Main, |pod| pod["spec"]["nodeName"] = node.into());
        self.write("pods", key, Part::Status, |pod| {
            set_condition(
                pod,
                json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
                "lastTransitionTime": now}),
            );
        });
    }

    /// Plays the kubelet: after the delay the pod runs and is ready, with addresses of its node.
    fn start_pod(&mut self, key: &Key, pod: &Value, node: &str) {
        let Kubelet::Simulated { ready_after, .. } = self.state.settings.kubelet else { return };
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        if pod["status"]["phase"].as_str().is_some_and(|phase| phase != "Pending") {
            self.kubelet.ready_at.remove(uid);
            return;
        }
        let now = Instant::now();
        let at = *self.kubelet.ready_at.entry(uid.to_owned()).or_insert(now + ready_after);
        if at > now {
            self.timers.push(Reverse((at, Task::Pod(key.clone()))));
            return;
        }
        let Some(node) = self.find("nodes", &Key::new("", node)) else { return };
        let hosts = internal_addresses(&node);
        let ips: Vec<IpAddr> = if pod["spec"]["hostNetwork"] == true {
            hosts.clone()
        } else {
            let ranges = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
            let ranges: Vec<IpNet> = ranges.filter_map(|r| r.as_str()?.parse().ok()).collect();
            ranges.iter().filter_map(|range| self.kubelet.address(range, key)).collect()
        };
        self.write("pods", key, Part::Status, |pod| report_running(pod, &ips, &hosts));
    }

    /// Plays the kubelet: a deleted pod is gone after its time.
    fn end_pod(&mut self, key: &Key, pod: &Value) {
        let Kubelet::Simulated { gone_after, .. } = self.state.settings.kubelet else { return };
        let grace = pod["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(0);
        let now = Instant::now();
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let after = gone_after.min(Duration::from_secs(grace));
        let at = *self.kubelet.gone_at.entry(uid.clone()).or_insert(now + after);
        if at > now {
            self.timers.push(Reverse((at, Task::Pod(key.clone()))));
            return;
        }
        self.kubelet.gone_at.remove(&uid);
        self.kubelet.ready_at.remove(&uid);
        self.delete("pods", key, Some(0));
    }
}

/// The node's InternalIP addresses.
pub fn internal_addresses(node: &Value) -> Vec<IpAddr> {
    let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
    addresses
        .filter(|a| a["type"] == "InternalIP")
        .filter_map(|a| a["address"].as_str()?.parse().ok())
        .collect()
}

fn report_running(pod: &mut Value, ips: &[IpAddr], hosts: &[IpAddr]) {
    let now = clock::now();
    let list = |ips: &[IpAddr]| -> Vec<Value> { ips.iter().map(|ip| json!({"ip": ip})).collect() };
    let containers = pod["spec"]["containers"].as_array().cloned().unwrap_or_default();
    let statuses: Vec<Value> = containers
        .iter()
        .map(|c| {
            json!({"name": c["name"], "image": c["image"], "imageID": "", "containerID": "containerd://simulated",
                "ready": true, "started": true, "restartCount": 0, "state": {"running": {"startedAt": now}},
                "lastState": {}})
        })
        .collect();
    let scheduled = pod["status"]["conditions"].clone();
    pod["status"] = json!({
        "phase": "Running", "qosClass": "BestEffort", "startTime": now,
        "podIPs": list(ips), "hostIPs": list(hosts), "containerStatuses": statuses, "conditions": scheduled,
    });
    if let Some(ip) = ips.first() {
        pod["status"]["podIP"] = json!(ip);
    }
    if let Some(ip) = hosts.first() {
        pod["status"]["hostIP"] = json!(ip);
    }
    for kind in ["Initialized", "Ready", "ContainersReady", "PodScheduled"] {
        set_condition(
            pod,
            json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": now}),
        );
    }
}

fn set_condition(object: &mut Value, condition: Value) {
    let Some(status) = crate::admission::child(object, "status") else { return };
    if !status["conditions"].is_array() {
        status["conditions"] = json!([]);
    }
    let Some(list) = status["conditions"].as_array_mut() else { return };
    match list.iter_mut().find(|c| c["type"] == condition["type"]) {
        Some(present) if present["status"] == condition["status"] => {}
        Some(present) => *present = condition,
        None => list.push(condition),
    }
}
