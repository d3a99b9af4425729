//! The cluster that is measured: many alike Services of ten endpoints each.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use ferroute::cluster::endpoints::{Endpoint, Slice, SlicePort};
use ferroute::cluster::node::Node;
use ferroute::cluster::service::{Annotations, Protocol, Service, ServicePort, ServiceType, TrafficPolicy};
use ferroute::cluster::{Cluster, ServiceKey};
use ferroute::proxy::Settings;
use serde_json::{Value, json};

/// Endpoints of each Service.
pub const ENDPOINTS: u32 = 10;
/// This node's name and address.
pub const NODE: &str = "n1";
/// This node's address, with its prefix.
pub const NODE_ADDRESS: &str = "192.0.2.11/24";
/// The range of cluster IPs.
pub const RANGE: &str = "10.96.0.0/12";

/// Size and kind of the cluster.
#[derive(Clone, Debug, Args)]
pub struct Shape {
    /// Number of Services.
    #[arg(long, default_value_t = 100)]
    pub services: u32,
    /// Scheduler of every Service (annotation kube-router.io/service.scheduler).
    #[arg(long)]
    pub scheduler: Option<String>,
    /// No service range is known: every VIP gets a route of its own.
    #[arg(long)]
    pub no_range: bool,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Services x {ENDPOINTS}", self.services)?;
        if let Some(scheduler) = &self.scheduler {
            write!(f, ", scheduler {scheduler}")?;
        }
        if self.no_range {
            write!(f, ", one route per VIP")?;
        }
        Ok(())
    }
}

impl Shape {
    /// The same as command line arguments.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--services".to_owned(), self.services.to_string()];
        if let Some(scheduler) = &self.scheduler {
            arguments.extend(["--scheduler".to_owned(), scheduler.clone()]);
        }
        if self.no_range {
            arguments.push("--no-range".to_owned());
        }
        arguments
    }

    /// Stores the whole cluster; nothing is marked as listed.
    pub fn fill(&self, cluster: &Cluster) -> Result<()> {
        cluster.apply_node(Node {
            name: Arc::from(NODE),
            internal_ips: vec![[192, 0, 2, 11].into()],
            pod_cidrs: vec!["10.128.0.0/24".parse()?],
            ..Node::default()
        });
        if !self.no_range {
            cluster.apply_service_cidr(Arc::from("kubernetes"), vec![RANGE.parse()?]);
        }
        let api = ServiceKey::new("default", "kubernetes");
        let member = Endpoint { address: [192, 0, 2, 1].into(), ..endpoint(0, None) };
        cluster.apply_slice(
            api.clone(),
            Arc::from("kubernetes"),
            Slice { ports: [slice_port("https", 6443)?].into(), endpoints: vec![member] },
        );
        cluster.apply_service(self.service_with(api, API_ADDRESS, port("https", 443)?, None));
        for index in 0..self.services {
            self.add(cluster, index)?;
        }
        Ok(())
    }

    /// Stores one Service with its endpoints; the Service last, so that it is one event.
    pub fn add(&self, cluster: &Cluster, index: u32) -> Result<()> {
        self.set_endpoints(cluster, index, ENDPOINTS)?;
        let scheduler = self.scheduler.as_deref().map(Box::from);
        cluster.apply_service(self.service_with(key(index), vip(index), port("http", 80)?, scheduler));
        Ok(())
    }

    /// Stores the endpoints of one Service.
    pub fn set_endpoints(&self, cluster: &Cluster, index: u32, count: u32) -> Result<()> {
        // As a decoder does it: ports and names are shared.
        let node: Arc<str> = Arc::from("n2");
        let endpoints = (0..count).map(|n| endpoint(index * 16 + n, Some(node.clone()))).collect();
        let name = Arc::from(format!("service-{index:05}-abcde"));
        cluster.apply_slice(key(index), name, Slice { ports: [slice_port("http", 8080)?].into(), endpoints });
        Ok(())
    }

    /// Removes one Service with its endpoints; the Service first, so that it is one event.
    pub fn remove(&self, cluster: &Cluster, index: u32) {
        cluster.delete_service(&key(index));
        cluster.delete_slice(&key(index), &format!("service-{index:05}-abcde"));
    }

    fn service_with(
        &self,
        key: ServiceKey,
        vip: IpAddr,
        port: ServicePort,
        scheduler: Option<Box<str>>,
    ) -> Service {
        Service {
            uid: Arc::from(format!("uid-{key}")),
            key,
            created: 0,
            kind: ServiceType::ClusterIp,
            cluster_ips: vec![vip],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: vec![port],
            affinity: None,
            external_policy: TrafficPolicy::Cluster,
            internal_policy: TrafficPolicy::Cluster,
            health_check_node_port: None,
            source_ranges: Vec::new(),
            publish_not_ready: false,
            annotations: Annotations { scheduler, ..Annotations::default() },
            problems: Vec::new(),
        }
    }

    /// The room's settings: the defaults of the command line.
    pub fn settings(&self) -> Result<Settings> {
        Ok(Settings {
            node_name: Arc::from(NODE),
            audit_period: Duration::from_secs(300),
            graceful_period: Some(Duration::from_secs(30)),
            hairpin_all: false,
            masquerade_all: false,
            node_port_on_all_addresses: false,
            firewall: true,
            excluded_cidrs: Vec::new(),
            strict_external_ips: true,
            external_ip_ranges: Vec::new(),
            load_balancer_ranges: Vec::new(),
            whole_ranges: Vec::new(),
            cluster_ip_ranges: vec![RANGE.parse()?],
            cluster_ip_ranges_given: false,
            node_port_range: 30000..=32767,
            tcp_timeout: 0,
            tcp_fin_timeout: 0,
            udp_timeout: 0,
        })
    }

    /// The Services as objects of the API.
    pub fn service_objects(&self) -> impl Iterator<Item = Value> + '_ {
        (0..self.services).map(|index| {
            let key = key(index);
            json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {
                    "namespace": &*key.namespace, "name": &*key.name, "uid": format!("uid-{key}"),
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                    "labels": {"app.kubernetes.io/name": &*key.name, "app.kubernetes.io/part-of": "shop"},
                },
                "spec": {
                    "type": "ClusterIP", "clusterIP": vip(index).to_string(),
                    "clusterIPs": [vip(index).to_string()], "ipFamilies": ["IPv4"],
                    "selector": {"app.kubernetes.io/name": &*key.name},
                    "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
                },
                "status": {"loadBalancer": {}},
            })
        })
    }

    /// The EndpointSlices as objects of the API.
    pub fn slice_objects(&self) -> impl Iterator<Item = Value> + '_ {
        (0..self.services).map(|index| {
            let key = key(index);
            let endpoints: Vec<Value> = (0..ENDPOINTS)
                .map(|n| {
                    json!({
                        "addresses": [pod(index * 16 + n).to_string()],
                        "conditions": {"ready": true, "serving": true, "terminating": false},
                        "nodeName": "n2",
                        "targetRef": {"kind": "Pod", "namespace": &*key.namespace,
                            "name": format!("{}-5d4f8c7b9-{n:05}", key.name), "uid": format!("pod-{index}-{n}")},
                    })
                })
                .collect();
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "namespace": &*key.namespace, "name": format!("{}-abcde", key.name),
                    "uid": format!("slice-{key}"), "creationTimestamp": "2026-01-01T00:00:00Z",
                    "labels": {"kubernetes.io/service-name": &*key.name,
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
                "endpoints": endpoints,
            })
        })
    }
}

fn key(index: u32) -> ServiceKey {
    ServiceKey::new("shop", format!("service-{index:05}"))
}

/// Address of the API server's own Service.
pub const API_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));

/// Address of a Service.
pub fn vip(index: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + index))
}

fn pod(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 129, 0, 0)) + number))
}

fn endpoint(number: u32, node: Option<Arc<str>>) -> Endpoint {
    Endpoint { address: pod(number), ready: true, serving: true, terminating: false, node, hints: None }
}

fn number(port: u16) -> Result<NonZeroU16> {
    NonZeroU16::new(port).context("port 0")
}

fn port(name: &str, value: u16) -> Result<ServicePort> {
    Ok(ServicePort { name: Arc::from(name), protocol: Protocol::Tcp, port: number(value)?, node_port: None })
}

fn slice_port(name: &str, value: u16) -> Result<SlicePort> {
    Ok(SlicePort { name: Arc::from(name), protocol: Protocol::Tcp, port: number(value)? })
}
