//! core/v1 Service to [`Service`].

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

use super::{Decoded, given, key, port, protocol, shortened, usable_address, whole};
use crate::cluster::service::{Annotations, Problem, Service, ServicePort, ServiceType, TrafficPolicy};
use crate::cluster::wire::{Item, Meta, ServiceObject, ServiceSpec};

/// Label naming the proxy that serves a Service.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label on Services and EndpointSlices that no proxy shall serve.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` when absent.
const DEFAULT_AFFINITY: u32 = 10_800;
/// The API's upper bound of it: one day.
const MAX_AFFINITY: i64 = 86_400;
/// IPVS scheduler names hold 15 characters (`IP_VS_SCHEDNAME_MAXLEN`, linux/ip_vs.h).
const MAX_SCHEDULER: usize = 15;

/// Validates a Service.
pub fn service(item: Item<ServiceObject>) -> Decoded<Service> {
    let key = match key(&item.object.metadata).and_then(|key| whole(&item).map(|()| key)) {
        Ok(key) => key,
        Err(problem) => return Decoded::Broken(problem),
    };
    let ServiceObject { metadata, spec, status } = item.object;
    if !is_ours(&metadata, &spec) {
        return Decoded::NotOurs;
    }
    let mut problems = Problems::default();
    let kind = match spec.kind.as_str() {
        "" | "ClusterIP" => ServiceType::ClusterIp,
        "NodePort" => ServiceType::NodePort,
        "LoadBalancer" => ServiceType::LoadBalancer,
        other => {
            return Decoded::Broken(Problem {
                reason: "UnknownType",
                message: format!(
                    "spec.type {:?} is not known; the last good state stays in force",
                    shortened(other)
                ),
            });
        }
    };
    let cluster_ips = cluster_ips(&spec, &mut problems);
    if cluster_ips.is_empty() {
        let message = problems.list.iter().map(|problem| problem.message.as_str()).collect::<Vec<_>>();
        return Decoded::Broken(Problem {
            reason: "InvalidAddress",
            message: format!("no usable cluster IP: {}; the Service is not served", message.join("; ")),
        });
    }
    let external_ips = addresses("spec.externalIPs", spec.external_ips.iter(), &mut problems);
    let virtual_ips =
        status.load_balancer.ingress.iter().filter(|entry| entry.ip_mode != "Proxy" && !entry.ip.is_empty());
    let load_balancer_ips =
        addresses("status.loadBalancer.ingress", virtual_ips.map(|entry| &entry.ip), &mut problems);
    let annotations = annotations(&metadata, &mut problems);
    let local = metadata.annotations.0.get("kube-router.io/service.local").is_some_and(|v| &**v == "true");
    let external_policy = if local {
        TrafficPolicy::Local
    } else {
        policy("spec.externalTrafficPolicy", &spec.external_traffic_policy, &mut problems)
    };
    let internal_policy = if local {
        TrafficPolicy::Cluster
    } else {
        policy("spec.internalTrafficPolicy", &spec.internal_traffic_policy, &mut problems)
    };
    let health_check_node_port = match spec.health_check_node_port {
        Some(number) if number != 0 => {
            let checked = port(number);
            if checked.is_none() {
                problems.add(
                    "InvalidPort",
                    format!("spec.healthCheckNodePort {number} is not a port (1 to 65535)"),
                );
            }
            checked.filter(|_| external_policy == TrafficPolicy::Local && kind == ServiceType::LoadBalancer)
        }
        _ => None,
    };
    Decoded::Ours(Service {
        uid: metadata.uid.as_str().into(),
        created: metadata.creation_timestamp.parse::<Timestamp>().map_or(0, |at| at.as_second()),
        kind,
        cluster_ips,
        external_ips,
        load_balancer_ips,
        ports: ports(&spec, &mut problems),
        affinity: affinity(&spec, &mut problems),
        external_policy,
        internal_policy,
        health_check_node_port,
        source_ranges: source_ranges(&spec, &mut problems),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        annotations,
        problems: problems.list,
        key,
    })
}

/// Whether this proxy serves the Service at all. A cluster IP that is still empty comes later,
/// with another event.
fn is_ours(metadata: &Meta, spec: &ServiceSpec) -> bool {
    if metadata.labels.contains_key(HEADLESS) || spec.kind == "ExternalName" {
        return false;
    }
    // Whoever installs ferroute in place of kube-router keeps the label as it was.
    if metadata.labels.get(PROXY_NAME).is_some_and(|name| !matches!(&**name, "kube-router" | "ferroute")) {
        return false;
    }
    let headless = |address: &String| address.is_empty() || address == "None";
    !(headless(&spec.cluster_ip) && spec.cluster_ips.iter().all(headless))
}

#[derive(Default)]
struct Problems {
    list: Vec<Problem>,
}

impl Problems {
    fn add(&mut self, reason: &'static str, message: String) {
        self.list.push(Problem { reason, message });
    }
}

fn cluster_ips(spec: &ServiceSpec, problems: &mut Problems) -> Vec<IpAddr> {
    let written: Vec<&String> =
        if spec.cluster_ips.is_empty() { vec![&spec.cluster_ip] } else { spec.cluster_ips.iter().collect() };
    let mut list: Vec<IpAddr> = Vec::with_capacity(written.len());
    for address in addresses("spec.clusterIPs", written.into_iter(), problems) {
        if list.iter().any(|known| known.is_ipv4() == address.is_ipv4()) {
            problems.add(
                "InvalidAddress",
                format!("spec.clusterIPs: {address} is the second of its family and is not served"),
            );
        } else {
            list.push(address);
        }
    }
    list
}

/// The addresses that can be served, each once, in the order written.
fn addresses<'a>(
    field: &str,
    written: impl Iterator<Item = &'a String>,
    problems: &mut Problems,
) -> Vec<IpAddr> {
    let mut list = Vec::new();
    let mut seen = HashSet::new();
    for text in written {
        match usable_address(text) {
            Ok(address) if seen.insert(address) => list.push(address),
            Ok(_) => {}
            Err(why) => {
                problems.add("InvalidAddress", format!("{field}: {why}; it is not served, correct it"));
            }
        }
    }
    list
}

fn policy(field: &str, text: &str, problems: &mut Problems) -> TrafficPolicy {
    match text {
        "" | "Cluster" => TrafficPolicy::Cluster,
        "Local" => TrafficPolicy::Local,
        other => {
            problems.add(
                "UnknownTrafficPolicy",
                format!("{field} {:?} is neither Cluster nor Local; Cluster is used", shortened(other)),
            );
            TrafficPolicy::Cluster
        }
    }
}

fn ports(spec: &ServiceSpec, problems: &mut Problems) -> Vec<ServicePort> {
    let mut list: Vec<ServicePort> = Vec::with_capacity(spec.ports.len());
    let (mut numbers, mut names, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, written) in spec.ports.iter().enumerate() {
        let Some(protocol) = protocol(&written.protocol) else {
            problems.add(
                "UnknownProtocol",
                format!(
                    "spec.ports[{index}].protocol {:?} is not TCP, UDP or SCTP; the port is not served",
                    shortened(&written.protocol)
                ),
            );
            continue;
        };
        let Some(number) = written.port.and_then(port) else {
            let number = written.port.map_or("(absent)".to_owned(), |number| number.to_string());
            problems.add(
                "InvalidPort",
                format!(
                    "spec.ports[{index}].port {number} is not a port (1 to 65535); the port is not served"
                ),
            );
            continue;
        };
        if !numbers.insert((protocol, number)) {
            problems.add(
                "DuplicatePort",
                format!("spec.ports[{index}] repeats {protocol} port {number}; the first one is served"),
            );
            continue;
        }
        if !names.insert(written.name.as_str()) {
            problems.add(
                "DuplicatePort",
                format!(
                    "spec.ports[{index}] repeats the name {:?}; the first one is served",
                    shortened(&written.name)
                ),
            );
            continue;
        }
        let mut node_port = None;
        if let Some(written) = written.node_port.filter(|number| *number != 0) {
            node_port = port(written);
            match node_port {
                None => problems.add(
                    "InvalidPort",
                    format!("spec.ports[{index}].nodePort {written} is not a port (1 to 65535)"),
                ),
                Some(number) if !node_ports.insert((protocol, number)) => {
                    problems.add(
                        "DuplicatePort",
                        format!("spec.ports[{index}] repeats nodePort {protocol} {number}; the first one is served"),
                    );
                    node_port = None;
                }
                Some(_) => {}
            }
        }
        list.push(ServicePort { name: written.name.as_str().into(), protocol, port: number, node_port });
    }
    list
}

fn affinity(spec: &ServiceSpec, problems: &mut Problems) -> Option<u32> {
    match spec.session_affinity.as_str() {
        "" | "None" => return None,
        "ClientIP" => {}
        other => {
            problems.add(
                "UnknownSessionAffinity",
                format!("spec.sessionAffinity {:?} is not known; None is used", shortened(other)),
            );
            return None;
        }
    }
    match spec.session_affinity_config.client_ip.timeout_seconds {
        None => Some(DEFAULT_AFFINITY),
        Some(seconds) => {
            let checked = u32::try_from(seconds).ok().filter(|_| (1..=MAX_AFFINITY).contains(&seconds));
            if checked.is_none() {
                problems.add(
                    "InvalidAffinityTimeout",
                    format!(
                        "spec.sessionAffinityConfig.clientIP.timeoutSeconds {seconds} is outside 1 to \
                         {MAX_AFFINITY}; {DEFAULT_AFFINITY} is used"
                    ),
                );
            }
            Some(checked.unwrap_or(DEFAULT_AFFINITY))
        }
    }
}

fn source_ranges(spec: &ServiceSpec, problems: &mut Problems) -> Vec<IpNet> {
    let mut list: Vec<IpNet> = Vec::new();
    for text in &spec.load_balancer_source_ranges {
        match text.trim().parse::<IpNet>() {
            Ok(range) if !list.contains(&range.trunc()) => list.push(range.trunc()),
            Ok(_) => {}
            Err(_) => problems.add(
                "InvalidSourceRange",
                format!(
                    "spec.loadBalancerSourceRanges: {:?} is not a CIDR; it admits nobody, correct it",
                    shortened(text)
                ),
            ),
        }
    }
    if list.is_empty() && !spec.load_balancer_source_ranges.is_empty() {
        // An empty list would admit everybody although the author wanted a restriction. No packet
        // comes from the unspecified addresses.
        list.extend(
            [IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)]
                .map(IpNet::from),
        );
    }
    list
}

/// `kube-router.io/service.*`.
fn annotations(metadata: &Meta, problems: &mut Problems) -> Annotations {
    let annotation = |name: &str| {
        metadata.annotations.0.get(format!("kube-router.io/service.{name}").as_str()).map(|value| &**value)
    };
    let scheduler = annotation("scheduler").map(|text| text.trim().to_ascii_lowercase()).and_then(|name| {
        if name.is_empty() {
            return None;
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if name.len() > MAX_SCHEDULER || !name.chars().all(plain) {
            problems.add(
                "UnknownScheduler",
                format!(
                    "annotation kube-router.io/service.scheduler {:?} is not the name of an IPVS scheduler; \
                     rr is used",
                    shortened(&name)
                ),
            );
            return None;
        }
        Some(name.into_boxed_str())
    });
    let mut sched_flags = 0;
    if let Some(text) = annotation("schedflags").filter(|text| !text.trim().is_empty()) {
        if matches!(scheduler.as_deref(), Some("mh" | "sh")) {
            for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
                match item {
                    "flag-1" => sched_flags |= 0x08,
                    "flag-2" => sched_flags |= 0x10,
                    "flag-3" => sched_flags |= 0x20,
                    other => problems.add(
                        "UnknownSchedulerFlag",
                        format!(
                            "annotation kube-router.io/service.schedflags: {:?} is not flag-1, flag-2 or \
                             flag-3 and is ignored",
                            shortened(other)
                        ),
                    ),
                }
            }
        } else {
            problems.add(
                "SchedulerFlagsIgnored",
                "annotation kube-router.io/service.schedflags has a meaning only with the schedulers mh and \
                 sh and is ignored"
                    .to_owned(),
            );
        }
    }
    let mut advertise = |name: &str| {
        annotation(&format!("advertise.{name}")).map(|text| match text {
            "1" | "t" | "T" | "TRUE" | "true" | "True" => true,
            "0" | "f" | "F" | "FALSE" | "false" | "False" => false,
            other => {
                problems.add(
                    "InvalidAnnotation",
                    format!(
                        "annotation kube-router.io/service.advertise.{name} {:?} is not a boolean; false is \
                         used",
                        shortened(other)
                    ),
                );
                false
            }
        })
    };
    Annotations {
        advertise: [advertise("clusterip"), advertise("externalip"), advertise("loadbalancerip")],
        scheduler,
        sched_flags,
        hairpin: annotation("hairpin").is_some(),
        hairpin_external_ips: annotation("hairpin.externalips").is_some(),
        skip_lb_ips: annotation("skiplbips").is_some(),
        dsr: annotation("dsr").and_then(given).map(Into::into),
    }
}
