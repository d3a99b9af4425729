//! Load-balancer addresses, where the server was given ranges for them.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::Controllers;
use crate::admission::child;
use crate::selector::Scope;
use crate::store::Key;
use crate::verbs::Part;

impl Controllers {
    /// Gives a LoadBalancer Service an address of each of its families, and takes it back when the
    /// type changes. A `loadBalancerClass` means somebody else does it.
    pub(super) fn assign_load_balancer(&self, key: &Key) {
        let ranges = &self.state.settings.load_balancers;
        if ranges.is_empty() {
            return;
        }
        let Some(service) = self.find("services", key) else { return };
        let spec = &service["spec"];
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array().map_or(0, Vec::len);
        if spec["type"] != "LoadBalancer" {
            if ingress > 0 {
                self.write_status("services", key, json!({"loadBalancer": {}}));
            }
            return;
        }
        if ingress > 0 || spec["loadBalancerClass"].is_string() {
            return;
        }
        let services = self.state.store.all("services", &Scope::default());
        let taken: HashSet<IpAddr> = services
            .iter()
            .flat_map(|s| {
                let list = s.value()["status"]["loadBalancer"]["ingress"].as_array().cloned();
                list.into_iter().flatten().filter_map(|i| i["ip"].as_str()?.parse().ok()).collect::<Vec<_>>()
            })
            .collect();
        let wanted = spec["loadBalancerIP"].as_str().and_then(|ip| ip.parse::<IpAddr>().ok());
        let families = spec["ipFamilies"].as_array().cloned().unwrap_or_default();
        let chosen: Vec<Value> = families
            .iter()
            .filter_map(|family| {
                let v4 = family == "IPv4";
                let ask = wanted.filter(|ip| ip.is_ipv4() == v4 && !taken.contains(ip));
                ask.or_else(|| {
                    ranges.iter().filter(|r| r.addr().is_ipv4() == v4).find_map(|r| free(r, &taken))
                })
            })
            .map(|ip| json!({"ip": ip, "ipMode": "VIP"}))
            .collect();
        if !chosen.is_empty() {
            self.write("services", key, Part::Status, |s| {
                if let Some(status) = child(s, "status") {
                    status["loadBalancer"] = json!({"ingress": chosen});
                }
            });
        }
    }
}

fn free(range: &IpNet, taken: &HashSet<IpAddr>) -> Option<IpAddr> {
    range.hosts().find(|ip| !taken.contains(ip) && *ip != range.network())
}
