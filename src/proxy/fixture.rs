//! Builders of test values for this room.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use super::drain::Now;
use super::facts::Facts;
use super::settings::Settings;
use crate::cluster::ServiceKey;
use crate::cluster::endpoints::{Endpoint, Slice, SlicePort};
use crate::cluster::service::{Annotations, Protocol, Service, ServicePort, ServiceType, TrafficPolicy};

pub(crate) fn service(name: &str) -> Service {
    Service {
        key: ServiceKey::new("shop", name),
        uid: Arc::from(name),
        created: 0,
        kind: ServiceType::ClusterIp,
        cluster_ips: vec![[10, 96, 0, 10].into()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![port("http", Protocol::Tcp, 80, None)],
        affinity: None,
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        health_check_node_port: None,
        source_ranges: Vec::new(),
        publish_not_ready: false,
        annotations: Annotations::default(),
        problems: Vec::new(),
    }
}

pub(crate) fn port(name: &str, protocol: Protocol, port: u16, node_port: Option<u16>) -> ServicePort {
    ServicePort {
        name: Arc::from(name),
        protocol,
        port: NonZeroU16::new(port).unwrap(),
        node_port: node_port.and_then(NonZeroU16::new),
    }
}

/// Flags: r ready, s serving, t terminating.
pub(crate) fn endpoint(host: u8, flags: &str, node: &str) -> Endpoint {
    Endpoint {
        address: [10, 244, 1, host].into(),
        ready: flags.contains('r'),
        serving: flags.contains('s'),
        terminating: flags.contains('t'),
        node: (!node.is_empty()).then(|| Arc::from(node)),
        hints: None,
    }
}

pub(crate) fn endpoint6(host: u16, node: &str) -> Endpoint {
    let address = IpAddr::from([0xfd00, 0x244, 1, 0, 0, 0, 0, host]);
    Endpoint { address, ..endpoint(0, "rs", node) }
}

pub(crate) fn slice(ports: &[(&str, Protocol, u16)], endpoints: Vec<Endpoint>) -> Slice {
    let ports = ports
        .iter()
        .map(|(name, protocol, port)| SlicePort {
            name: Arc::from(*name),
            protocol: *protocol,
            port: NonZeroU16::new(*port).unwrap(),
        })
        .collect();
    Slice { ports, endpoints }
}

pub(crate) fn facts() -> Facts {
    let ipv4: IpAddr = [10, 10, 0, 11].into();
    let ipv6 = IpAddr::from([0xfd00, 0x10, 0, 0, 0, 0, 0, 0x11]);
    Facts {
        name: Arc::from("n1"),
        zone: Some(Arc::from("z1")),
        ipv4: Some(ipv4),
        ipv6: Some(ipv6),
        kernel_ipv6: true,
        node_port_addresses: vec![ipv4, ipv6],
        local_addresses: [ipv4, ipv6].into(),
        cluster_addresses: [ipv4, ipv6].into(),
        other_machines: std::collections::HashMap::new(),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:244:1::/64".parse().unwrap()],
        bound_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        cluster_ranges: vec!["10.96.0.0/12".parse().unwrap()],
    }
}

pub(crate) fn settings() -> Settings {
    Settings {
        node_name: Arc::from("n1"),
        audit_period: std::time::Duration::from_secs(300),
        graceful_period: Some(std::time::Duration::from_secs(30)),
        hairpin_all: false,
        masquerade_all: false,
        node_port_on_all_addresses: false,
        firewall: true,
        excluded_cidrs: Vec::new(),
        strict_external_ips: true,
        external_ip_ranges: vec!["203.0.113.0/25".parse().unwrap()],
        load_balancer_ranges: vec!["203.0.113.128/25".parse().unwrap(), "fd00:aa::/64".parse().unwrap()],
        whole_ranges: Vec::new(),
        cluster_ip_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        cluster_ip_ranges_given: true,
        node_port_range: 30000..=32767,
        tcp_timeout: 0,
        tcp_fin_timeout: 0,
        udp_timeout: 0,
    }
}

pub(crate) fn now() -> Now {
    Now { instant: std::time::Instant::now(), boot_seconds: 1000 }
}
