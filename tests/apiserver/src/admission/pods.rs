//! Defaults of a pod spec.

use serde_json::{Value, json};

use super::default;

/// The defaults that other parts of a cluster read.
pub fn set_defaults(spec: &mut Value) {
    default(spec, "restartPolicy", "Always");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "securityContext", json!({}));
    let host = spec["hostNetwork"] == Value::Bool(true);
    for list in ["containers", "initContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            default(container, "imagePullPolicy", "IfNotPresent");
            default(container, "terminationMessagePath", "/dev/termination-log");
            default(container, "terminationMessagePolicy", "File");
            default(container, "resources", json!({}));
            for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
                default(port, "protocol", "TCP");
                if host {
                    let number = port["containerPort"].clone();
                    default(port, "hostPort", number);
                }
            }
        }
    }
}
