//! Builders of test values for this room.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ferroute_bgp::message::Asn;

use super::settings::{Advertise, DEFAULT_ASN, External, ExternalPeer, RouterIdChoice, Settings};
use crate::cluster::node::{Annotations, Node};
use crate::network::node_address::Methods;
use crate::proxy;

pub(crate) fn settings() -> Settings {
    Settings {
        node_name: Arc::from("n1"),
        services: proxy::fixture::settings(),
        audit_period: Duration::from_secs(300),
        mesh: true,
        cluster_asn: Some(DEFAULT_ASN),
        port: 179,
        router_id: RouterIdChoice::NodeAddress,
        restart: None,
        advertise: Advertise {
            cluster_ips: true,
            external_ips: true,
            load_balancer_ips: true,
            pod_cidrs: true,
            ranges: false,
            specifics: false,
        },
        external: External {
            peers: Vec::new(),
            passwords_file: None,
            hold_time: 90,
            multihop: None,
            override_next_hop: false,
        },
        addresses: Methods::default(),
    }
}

/// Node `nN`: 10.10.0.1N and fd00:10::1N, pods 10.244.N.0/24 and fd00:244:N::/64.
pub(crate) fn node(number: u8, annotations: &[(&str, &str)]) -> Node {
    let pairs =
        annotations.iter().map(|(name, text)| (format!("kube-router.io/{name}").into(), (*text).into()));
    Node {
        name: format!("n{number}").into(),
        internal_ips: vec![address(&format!("10.10.0.1{number}")), address(&format!("fd00:10::1{number}"))],
        pod_cidrs: vec![
            format!("10.244.{number}.0/24").parse().unwrap(),
            format!("fd00:244:{number}::/64").parse().unwrap(),
        ],
        annotations: Annotations(pairs.collect()),
        ..Node::default()
    }
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn external(text: &str, asn: u32) -> ExternalPeer {
    ExternalPeer {
        address: address(text),
        asn: Asn(asn),
        port: 179,
        password: None,
        secret: None,
        source: None,
        bfd: None,
    }
}
