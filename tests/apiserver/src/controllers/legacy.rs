//! The older Endpoints object of a Service, which older kubectl describes Services by.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::endpoints::{pod_address, resolve_ports};
use super::{Controllers, has_condition, is_terminating};
use crate::store::{Key, Object};
use crate::verbs::Part;

impl Controllers {
    /// Endpoints hold the primary family only, ready and not ready addresses apart.
    pub(super) fn write_legacy(&self, key: &Key, service: &Value, pods: &[Arc<Object>]) {
        let family = service["spec"]["ipFamilies"][0].as_str().unwrap_or("IPv4");
        let mut groups: BTreeMap<String, (Vec<Value>, Vec<Value>)> = BTreeMap::new();
        for pod in pods {
            let pod = pod.value();
            let Some(ip) = pod_address(pod, family) else { continue };
            let meta = &pod["metadata"];
            let address = json!({"ip": ip, "nodeName": pod["spec"]["nodeName"], "targetRef": {
                "kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]}});
            let ports = Value::Array(resolve_ports(service, pod)).to_string();
            let publish = service["spec"]["publishNotReadyAddresses"] == true;
            let (ready, waiting) = groups.entry(ports).or_default();
            if publish || has_condition(pod, "Ready") && !is_terminating(pod) {
                ready.push(address);
            } else if !is_terminating(pod) {
                waiting.push(address);
            }
        }
        let mut subsets = Vec::new();
        for (ports, (ready, waiting)) in groups {
            let mut subset = json!({"ports": serde_json::from_str::<Value>(&ports).unwrap_or(Value::Null)});
            if !ready.is_empty() {
                subset["addresses"] = ready.into();
            }
            if !waiting.is_empty() {
                subset["notReadyAddresses"] = waiting.into();
            }
            if subset.as_object().is_some_and(|s| s.len() > 1) {
                subsets.push(subset);
            }
        }
        if self.find("endpoints", key).is_some() {
            self.write("endpoints", key, Part::Main, |object| object["subsets"] = subsets.into());
            return;
        }
        let labels = service["metadata"]["labels"].clone();
        let object = json!({"kind": "Endpoints", "apiVersion": "v1",
            "metadata": {"name": key.name, "labels": labels}, "subsets": subsets});
        self.create("endpoints", &key.namespace, object);
    }
}
