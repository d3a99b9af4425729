//! Services: defaults, validation, and the allocation of cluster addresses and node ports.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{child, default};
use crate::status::Cause;
use crate::store::Key;

/// Defaults that need no knowledge of the cluster.
pub fn set_defaults(service: &mut Value) {
    let Some(spec) = child(service, "spec") else { return };
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    if spec["sessionAffinity"] == "ClientIP" {
        if let Some(client) = child(spec, "sessionAffinityConfig").and_then(|c| child(c, "clientIP")) {
            default(client, "timeoutSeconds", 10_800);
        }
    } else if let Some(map) = spec.as_object_mut() {
        map.remove("sessionAffinityConfig");
    }
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    if external || spec["externalIPs"].as_array().is_some_and(|ips| !ips.is_empty()) {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if external || kind == "ClusterIP" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
    }
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        default(port, "protocol", "TCP");
        if port["targetPort"].is_null() || port["targetPort"] == 0 || port["targetPort"] == "" {
            let number = port["port"].clone();
            if let Some(map) = port.as_object_mut() {
                map.insert("targetPort".into(), number);
            }
        }
    }
    if let Some(status) = child(service, "status") {
        default(status, "loadBalancer", json!({}));
    }
}

/// Refuses malformed Services.
pub fn validate(service: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let spec = &service["spec"];
    let kind = spec["type"].as_str().unwrap_or_default();
    if !matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer" | "ExternalName") {
        let known = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
        causes.push(Cause::unsupported("spec.type", &spec["type"], &known));
    }
    let headless = spec["clusterIP"] == "None";
    validate_ports(spec, headless || kind == "ExternalName", causes);
    if kind == "ExternalName" {
        if spec["externalName"].as_str().unwrap_or_default().is_empty() {
            causes.push(Cause::required("spec.externalName", ""));
        }
        return;
    }
    if headless && kind != "ClusterIP" {
        let why = format!("may not be set to 'None' for {kind} services");
        causes.push(Cause::invalid("spec.clusterIPs[0]", "None", why));
    }
    match spec["sessionAffinity"].as_str() {
        Some("None") => {}
        Some("ClientIP") => {
            let seconds = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
            if seconds.as_i64().is_none_or(|s| !(1..=86_400).contains(&s)) {
                let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                causes.push(Cause::invalid(field, seconds, "must be greater than 0 and less than 86400"));
            }
        }
        _ => causes.push(Cause::unsupported(
            "spec.sessionAffinity",
            &spec["sessionAffinity"],
            &["ClientIP", "None"],
        )),
    }
    for field in ["externalTrafficPolicy", "internalTrafficPolicy"] {
        let policy = &spec[field];
        if !(policy.is_null() || policy == "Cluster" || policy == "Local") {
            causes.push(Cause::unsupported(format!("spec.{field}"), policy, &["Cluster", "Local"]));
        }
    }
    let preference = &spec["trafficDistribution"];
    let known = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    if !preference.is_null() && !known.iter().any(|k| preference == *k) {
        causes.push(Cause::unsupported("spec.trafficDistribution", preference, &known));
    }
    for (at, ip) in spec["externalIPs"].as_array().into_iter().flatten().enumerate() {
        let parsed = ip.as_str().and_then(|ip| ip.parse::<IpAddr>().ok());
        if parsed.is_none_or(|ip| ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()) {
            let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            causes.push(Cause::invalid(format!("spec.externalIPs[{at}]"), ip, why));
        }
    }
    let ranges = spec["loadBalancerSourceRanges"].as_array().map_or(&[][..], Vec::as_slice);
    if !ranges.is_empty() && kind != "LoadBalancer" {
        let why = "may only be used when `type` is 'LoadBalancer'";
        causes.push(Cause::forbidden("spec.LoadBalancerSourceRanges", why));
    }
    for (at, range) in ranges.iter().enumerate() {
        if range.as_str().and_then(|r| r.trim().parse::<IpNet>().ok()).is_none() {
            let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            causes.push(Cause::invalid(format!("spec.loadBalancerSourceRanges[{at}]"), range, why));
        }
    }
    if let Some(old) = old {
        let before = &old["spec"];
        if kind != "ExternalName"
            && before["type"] != "ExternalName"
            && !before["clusterIP"].is_null()
            && before["clusterIP"] != spec["clusterIP"]
        {
            let why = "may not change once set";
            causes.push(Cause::invalid("spec.clusterIPs[0]", &spec["clusterIP"], why));
        }
    }
}

fn validate_ports(spec: &Value, may_be_empty: bool, causes: &mut Vec<Cause>) {
    let ports = spec["ports"].as_array().map_or(&[][..], Vec::as_slice);
    if ports.is_empty() && !may_be_empty {
        causes.push(Cause::required("spec.ports", ""));
    }
    let mut names = HashSet::new();
    let mut numbers = HashSet::new();
    for (at, port) in ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{at}].{name}");
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            causes.push(Cause::required(field("name"), ""));
        } else if !name.is_empty() && !names.insert(name) {
            causes.push(Cause::duplicate(field("name"), name));
        }
        if !(1..=65_535).contains(&port["port"].as_i64().unwrap_or(0)) {
            causes.push(Cause::invalid(
                field("port"),
                &port["port"],
                "must be between 1 and 65535, inclusive",
            ));
        }
        if let Some(target) = port["targetPort"].as_i64()
            && !(1..=65_535).contains(&target)
        {
            causes.push(Cause::invalid(
                field("targetPort"),
                target,
                "must be between 1 and 65535, inclusive",
            ));
        }
        let protocol = port["protocol"].as_str().unwrap_or_default();
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            causes.push(Cause::unsupported(field("protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]));
        }
        if !numbers.insert((port["port"].as_i64(), protocol)) {
            causes.push(Cause::duplicate(format!("spec.ports[{at}]"), port));
        }
    }
}

/// Which Service holds which cluster address and node port.
#[derive(Debug)]
pub struct Allocator {
    ranges: Vec<IpNet>,
    node_ports: RangeInclusive<u16>,
    addresses: HashMap<IpAddr, Key>,
    ports: HashMap<u16, Key>,
}

impl Allocator {
    /// An allocator for the cluster's ranges, primary family first.
    pub fn new(ranges: &[IpNet], node_ports: RangeInclusive<u16>) -> Self {
        Self { ranges: ranges.to_vec(), node_ports, addresses: HashMap::new(), ports: HashMap::new() }
    }

    /// Forgets what a Service holds.
    pub fn release(&mut self, key: &Key) {
        self.addresses.retain(|_, holder| holder != key);
        self.ports.retain(|_, holder| holder != key);
    }

    /// Remembers what a stored Service holds.
    pub fn adopt(&mut self, key: &Key, service: &Value) {
        let spec = &service["spec"];
        for ip in spec["clusterIPs"].as_array().into_iter().flatten().chain([&spec["clusterIP"]]) {
            if let Some(ip) = ip.as_str().and_then(|ip| ip.parse().ok()) {
                self.addresses.insert(ip, key.clone());
            }
        }
        let ports = spec["ports"].as_array().into_iter().flatten().map(|p| &p["nodePort"]);
        for port in ports.chain([&spec["healthCheckNodePort"]]) {
            if let Some(port) = port.as_u64().and_then(|p| u16::try_from(p).ok()).filter(|p| *p > 0) {
                self.ports.insert(port, key.clone());
            }
        }
    }

    /// Fills in addresses and ports of a Service about to be stored; `old` is its stored version.
    /// Nothing is remembered until [`Allocator::adopt`].
    ///
    /// # Errors
    /// A cause per field that asks for something taken, out of range or impossible here.
    pub fn assign(&self, key: &Key, old: Option<&Value>, service: &mut Value) -> Result<(), Vec<Cause>> {
        let Some(spec) = child(service, "spec") else { return Ok(()) };
        if let Some(old) = old {
            keep_assigned(&old["spec"], spec);
        }
        let mut causes = Vec::new();
        if spec["type"] == "ExternalName" {
            if let Some(map) = spec.as_object_mut() {
                for field in
                    ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"]
                {
                    map.remove(field);
                }
            }
            return Ok(());
        }
        self.assign_families(spec, old.is_none(), &mut causes);
        if spec["clusterIP"] != "None" && causes.is_empty() {
            self.assign_addresses(key, spec, &mut causes);
        }
        self.assign_ports(key, spec, &mut causes);
        if causes.is_empty() { Ok(()) } else { Err(causes) }
    }

    fn family_of(net: &IpNet) -> &'static str {
        if net.addr().is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// `ipFamilyPolicy` and `ipFamilies` (service networking, dual stack).
    fn assign_families(&self, spec: &mut Value, fresh: bool, causes: &mut Vec<Cause>) {
        let headless = spec["clusterIP"] == "None";
        let no_selector = spec["selector"].as_object().is_none_or(serde_json::Map::is_empty);
        let served: Vec<&str> = self.ranges.iter().map(Self::family_of).collect();
        let texts = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
        };
        let mut families = texts(&spec["ipFamilies"]);
        let mut given = texts(&spec["clusterIPs"]);
        if given.is_empty()
            && let Some(ip) = spec["clusterIP"].as_str().filter(|ip| !ip.is_empty())
        {
            given.push(ip.to_owned());
        }
        let of_given =
            |ip: &String| ip.parse::<IpAddr>().ok().map(|a| if a.is_ipv4() { "IPv4" } else { "IPv6" });
        for (at, ip) in given.iter().enumerate() {
            match of_given(ip) {
                Some(family) if families.get(at).is_none() => families.push(family.into()),
                Some(family) if families[at] != family => {
                    let why =
                        format!("expected an {} value as indicated by `ipFamilies[{at}]`", families[at]);
                    causes.push(Cause::invalid(format!("spec.clusterIPs[{at}]"), ip, why));
                }
                _ => {}
            }
        }
        if headless && no_selector && fresh {
            default(spec, "ipFamilyPolicy", "RequireDualStack");
        } else {
            let both = families.len() > 1 || given.len() > 1;
            default(spec, "ipFamilyPolicy", if both { "PreferDualStack" } else { "SingleStack" });
        }
        let policy = spec["ipFamilyPolicy"].as_str().unwrap_or_default().to_owned();
        for (at, family) in families.iter().enumerate() {
            let anything_goes = headless && no_selector;
            if !anything_goes && !served.contains(&family.as_str()) {
                let why = "not configured on this cluster";
                causes.push(Cause::invalid(format!("spec.ipFamilies[{at}]"), family, why));
            }
        }
        if families.is_empty()
            && let Some(first) = served.first()
        {
            families.push((*first).into());
        }
        match policy.as_str() {
            "SingleStack" => families.truncate(1),
            "PreferDualStack" | "RequireDualStack" => {
                let second = if families.first().is_some_and(|f| f == "IPv4") { "IPv6" } else { "IPv4" };
                let possible = served.contains(&second) || headless && no_selector;
                if families.len() < 2 && possible {
                    families.push(second.into());
                }
                if policy == "RequireDualStack" && families.len() < 2 {
                    let why = "this cluster is not configured for dual-stack services";
                    causes.push(Cause::invalid("spec.ipFamilyPolicy", &policy, why));
                }
            }
            other => {
                let known = ["SingleStack", "PreferDualStack", "RequireDualStack"];
                causes.push(Cause::unsupported("spec.ipFamilyPolicy", other, &known));
            }
        }
        if headless {
            spec["clusterIPs"] = json!(["None"]);
        } else {
            given.truncate(families.len());
            spec["clusterIPs"] = json!(given);
        }
        spec["ipFamilies"] = json!(families);
    }

    fn assign_addresses(&self, key: &Key, spec: &mut Value, causes: &mut Vec<Cause>) {
        let families = spec["ipFamilies"].as_array().cloned().unwrap_or_default();
        let mut ips: Vec<String> = spec["clusterIPs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect();
        for (at, ip) in ips.iter().enumerate() {
            let field = format!("spec.clusterIPs[{at}]");
            let Ok(parsed) = ip.parse::<IpAddr>() else {
                causes.push(Cause::invalid(
                    field,
                    ip,
                    "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
                ));
                continue;
            };
            if !self.ranges.iter().any(|net| net.contains(&parsed)) {
                let ranges: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
                let why = format!(
                    "failed to allocate IP {ip}: the provided network does not match the current range: {}",
                    ranges.join(",")
                );
                causes.push(Cause::invalid(field, ip, why));
            } else if self.addresses.get(&parsed).is_some_and(|holder| holder != key) {
                let why = format!("failed to allocate IP {ip}: provided IP is already allocated");
                causes.push(Cause::invalid(field, ip, why));
            }
        }
        for family in families.iter().skip(ips.len()) {
            let net = self.ranges.iter().find(|net| *family == Self::family_of(net));
            match net.and_then(|net| self.free_address(net)) {
                Some(ip) => ips.push(ip.to_string()),
                None => causes.push(Cause::invalid("spec.clusterIPs", family, "the range is full")),
            }
        }
        if let Some(first) = ips.first() {
            spec["clusterIP"] = first.as_str().into();
        }
        spec["clusterIPs"] = json!(ips);
    }

    /// The lowest free address above the band that real servers keep for fixed addresses.
    fn free_address(&self, net: &IpNet) -> Option<IpAddr> {
        let bits = u32::from(net.max_prefix_len() - net.prefix_len());
        let size = if bits >= 32 { 1_u128 << 32 } else { 1_u128 << bits };
        let band = (size / 16).clamp(16, 256).min(size / 2);
        let at = |offset: u128| match net.network() {
            IpAddr::V4(base) => u32::try_from(offset).ok().map(|o| IpAddr::V4((u32::from(base) | o).into())),
            IpAddr::V6(base) => Some(IpAddr::V6((u128::from(base) | offset).into())),
        };
        let free = |ip: &IpAddr| !self.addresses.contains_key(ip);
        (band..size - 1).chain(1..band).filter_map(at).find(free)
    }

    fn assign_ports(&self, key: &Key, spec: &mut Value, causes: &mut Vec<Cause>) {
        let kind = spec["type"].as_str().unwrap_or_default().to_owned();
        let wanted =
            kind == "NodePort" || kind == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != false;
        let local = kind == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local";
        let taken = |port: u16| self.ports.get(&port).is_some_and(|holder| holder != key);
        let mut here: HashSet<u16> = HashSet::new();
        let mut same: HashSet<(u16, String)> = HashSet::new();
        let ports = spec.get_mut("ports").and_then(Value::as_array_mut);
        let mut ports: Vec<&mut Value> = ports.into_iter().flatten().collect();
        for (at, port) in ports.iter_mut().enumerate() {
            let given = port["nodePort"].as_u64().unwrap_or(0);
            if given == 0 {
                continue;
            }
            let field = format!("spec.ports[{at}].nodePort");
            if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
                causes.push(Cause::forbidden(field, "may not be used when `type` is 'ClusterIP'"));
                continue;
            }
            let protocol = port["protocol"].as_str().unwrap_or_default().to_owned();
            match u16::try_from(given).ok().filter(|p| self.node_ports.contains(p)) {
                None => {
                    let range = format!("{}-{}", self.node_ports.start(), self.node_ports.end());
                    let why = format!(
                        "provided port is not in the valid range. The range of valid ports is {range}"
                    );
                    causes.push(Cause::invalid(field, given, why));
                }
                Some(number) if taken(number) => {
                    causes.push(Cause::invalid(field, given, "provided port is already allocated"));
                }
                Some(number) if !same.insert((number, protocol)) => {
                    causes.push(Cause::duplicate(field, given));
                }
                Some(number) => {
                    here.insert(number);
                }
            }
        }
        let mut pick = |field: &str| {
            let found = self.node_ports.clone().find(|p| !self.ports.contains_key(p) && !here.contains(p));
            match found {
                Some(port) => {
                    here.insert(port);
                    Some(port)
                }
                None => {
                    causes.push(Cause::invalid(field, "", "the range of node ports is full"));
                    None
                }
            }
        };
        if wanted {
            for port in &mut ports {
                if port["nodePort"].as_u64().unwrap_or(0) == 0
                    && let (Some(number), Some(map)) = (pick("spec.ports.nodePort"), port.as_object_mut())
                {
                    map.insert("nodePort".into(), number.into());
                }
            }
        }
        if local && spec["healthCheckNodePort"].as_u64().unwrap_or(0) == 0 {
            if let Some(number) = pick("spec.healthCheckNodePort") {
                spec["healthCheckNodePort"] = number.into();
            }
        } else if let Some(map) = spec.as_object_mut().filter(|_| !local) {
            map.remove("healthCheckNodePort");
        }
    }
}

/// An update that leaves assigned fields out keeps them; a change of type wipes those it ends.
fn keep_assigned(old: &Value, spec: &mut Value) {
    let external = |spec: &Value| matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"));
    if old["type"] != "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            default(spec, field, old[field].clone());
        }
    }
    if spec["clusterIP"] == "" {
        spec["clusterIP"] = old["clusterIP"].clone();
        spec["clusterIPs"] = old["clusterIPs"].clone();
    }
    let now_external = external(spec);
    let before = old["ports"].as_array().cloned().unwrap_or_default();
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        let same = before.iter().find(|b| b["port"] == port["port"] && b["protocol"] == port["protocol"]);
        if now_external && external(old) {
            if let Some(same) = same {
                default(port, "nodePort", same["nodePort"].clone());
            }
        } else if !now_external
            && external(old)
            && let Some(map) = port.as_object_mut()
        {
            map.remove("nodePort");
        }
    }
    if now_external {
        default(spec, "healthCheckNodePort", old["healthCheckNodePort"].clone());
    }
    if !now_external
        && spec["externalTrafficPolicy"] == old["externalTrafficPolicy"]
        && spec["externalIPs"].as_array().is_none_or(Vec::is_empty)
        && let Some(map) = spec.as_object_mut()
    {
        map.remove("externalTrafficPolicy");
        map.remove("allocateLoadBalancerNodePorts");
    }
}
