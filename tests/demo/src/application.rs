//! What the API server says must be served: frontends with the pods behind them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferroute_apiserver::ApiServer;
use ferroute_kit::Protocol;
use serde_json::Value;

/// One port of one Service.
#[derive(Debug)]
pub struct Front {
    /// Namespace.
    pub namespace: String,
    /// `namespace/service`.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on VIPs.
    pub port: u16,
    /// Port on nodes.
    pub node_port: Option<u16>,
    /// Cluster IPs.
    pub inside: Vec<IpAddr>,
    /// External and load-balancer IPs.
    pub outside: Vec<IpAddr>,
    /// Whether remote clients stay on the node they reach.
    pub local_only: bool,
    /// Whether a client stays with one endpoint.
    pub affinity: bool,
    /// Whether every client meets all endpoints in turn: no affinity, no scheduler of its own, no
    /// preference for near endpoints.
    pub takes_turns: bool,
    /// Ready pods behind it and their nodes.
    pub pods: BTreeMap<String, String>,
    /// The Deployment behind it, if it is one.
    pub deployment: Option<String>,
}

impl Front {
    /// `namespace/service port/protocol`.
    pub fn port_name(&self) -> String {
        format!("{} {}/{}", self.name, self.port, self.protocol)
    }

    /// Names of all pods.
    pub fn all(&self) -> Vec<String> {
        self.pods.keys().cloned().collect()
    }

    /// Names of the pods of one node.
    pub fn on(&self, node: &str) -> Vec<String> {
        self.pods.iter().filter(|(_, at)| *at == node).map(|(pod, _)| pod.clone()).collect()
    }

    /// Whether it has a family.
    pub fn serves(&self, ip: IpAddr) -> bool {
        self.inside.iter().any(|own| own.is_ipv6() == ip.is_ipv6())
    }
}

/// All Services.
#[derive(Debug, Default)]
pub struct Application {
    /// What has a virtual server.
    pub fronts: Vec<Front>,
    /// Headless and ExternalName Services, and those nobody backs.
    pub skipped: Vec<String>,
}

impl Application {
    /// Reads Services, slices and Deployments.
    pub fn read(server: &ApiServer) -> Self {
        let mut application = Self::default();
        let slices = server.list("endpointslices.discovery.k8s.io", "");
        let deployments = server.list("deployments.apps", "");
        for service in server.list("services", "") {
            let (namespace, short) =
                (text(&service["metadata"]["namespace"]), text(&service["metadata"]["name"]));
            let name = format!("{namespace}/{short}");
            if (namespace.as_str(), short.as_str()) == ("default", "kubernetes") {
                continue;
            }
            let spec = &service["spec"];
            let inside: Vec<IpAddr> = addresses(&spec["clusterIPs"]);
            let mut pods = BTreeMap::new();
            for slice in slices.iter().filter(|slice| {
                text(&slice["metadata"]["namespace"]) == namespace
                    && text(&slice["metadata"]["labels"]["kubernetes.io/service-name"]) == short
            }) {
                for endpoint in list(&slice["endpoints"]) {
                    if endpoint["conditions"]["ready"] != Value::Bool(false) {
                        pods.insert(text(&endpoint["targetRef"]["name"]), text(&endpoint["nodeName"]));
                    }
                }
            }
            if inside.is_empty() || pods.is_empty() {
                application.skipped.push(name);
                continue;
            }
            let mut outside: Vec<IpAddr> = addresses(&spec["externalIPs"]);
            outside.extend(
                list(&service["status"]["loadBalancer"]["ingress"])
                    .filter_map(|entry| entry["ip"].as_str()?.parse::<IpAddr>().ok()),
            );
            let deployment = deployments
                .iter()
                .find(|deployment| {
                    text(&deployment["metadata"]["namespace"]) == namespace
                        && pods.keys().all(|pod| {
                            pod.starts_with(&format!("{}-", text(&deployment["metadata"]["name"])))
                        })
                })
                .map(|deployment| text(&deployment["metadata"]["name"]));
            for port in list(&spec["ports"]) {
                application.fronts.push(Front {
                    namespace: namespace.clone(),
                    name: name.clone(),
                    protocol: match port["protocol"].as_str() {
                        Some("UDP") => Protocol::Udp,
                        Some("SCTP") => Protocol::Sctp,
                        _ => Protocol::Tcp,
                    },
                    port: number(&port["port"]).unwrap_or_default(),
                    node_port: number(&port["nodePort"]).filter(|port| *port != 0),
                    inside: inside.clone(),
                    outside: outside.clone(),
                    local_only: spec["externalTrafficPolicy"] == "Local",
                    affinity: spec["sessionAffinity"] == "ClientIP",
                    takes_turns: spec["sessionAffinity"] != "ClientIP"
                        && spec["trafficDistribution"].is_null()
                        && spec["internalTrafficPolicy"] != "Local"
                        && service["metadata"]["annotations"]["kube-router.io/service.scheduler"].is_null(),
                    pods: pods.clone(),
                    deployment: deployment.clone(),
                });
            }
        }
        application
    }

    /// A frontend fit for load while its Deployment rolls: TCP, without affinity, for everybody;
    /// preferably one with a node port and several pods.
    pub fn rollable(&self) -> Option<&Front> {
        self.fronts
            .iter()
            .filter(|f| f.protocol == Protocol::Tcp && f.deployment.is_some() && !f.affinity && !f.local_only)
            .max_by_key(|front| (front.node_port.is_some(), front.pods.len()))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn addresses(value: &Value) -> Vec<IpAddr> {
    list(value).filter_map(|entry| entry.as_str()?.parse().ok()).collect()
}

fn number(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|value| u16::try_from(value).ok())
}
