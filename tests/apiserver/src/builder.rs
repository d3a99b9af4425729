//! From settings to a running server.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::node::{NodeSpec, node_range};
use crate::registry::Resource;
use crate::state::{Kubelet, Settings, State};
use crate::tls::Tls;
use crate::{ApiServer, controllers, serve};

/// Settings of a server to start.
#[derive(Debug, Clone)]
pub struct Builder {
    settings: Settings,
    nodes: Vec<NodeSpec>,
    pod_cidrs: Vec<IpNet>,
    resources: Vec<Resource>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            settings: Settings {
                listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                service_cidrs: vec![IpNet::new_assert(IpAddr::from([10, 96, 0, 0]), 12)],
                node_ports: 30_000..=32_767,
                load_balancers: Vec::new(),
                kubelet: Kubelet::default(),
                controllers: true,
                token_file: None,
                tls: None,
                bookmark_interval: Duration::from_secs(60),
                history_limit: 50_000,
                advertise: Vec::new(),
                advertise_port: None,
                git_version: "v1.33.1".into(),
            },
            nodes: Vec::new(),
            pod_cidrs: vec![IpNet::new_assert(IpAddr::from([10, 244, 0, 0]), 16)],
            resources: Vec::new(),
        }
    }
}

impl Builder {
    /// Listens here; port 0 takes a free one. Default: 127.0.0.1:0.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.settings.listen = address;
        self
    }

    /// Service ranges, primary family first; one or two. Default: 10.96.0.0/12.
    #[must_use]
    pub fn service_cidrs(mut self, ranges: impl IntoIterator<Item = IpNet>) -> Self {
        self.settings.service_cidrs = ranges.into_iter().map(|net| net.trunc()).collect();
        self
    }

    /// Pod ranges nodes get theirs from. Default: 10.244.0.0/16.
    #[must_use]
    pub fn pod_cidrs(mut self, ranges: impl IntoIterator<Item = IpNet>) -> Self {
        self.pod_cidrs = ranges.into_iter().map(|net| net.trunc()).collect();
        self
    }

    /// Node ports. Default: 30000-32767.
    #[must_use]
    pub fn node_ports(mut self, range: RangeInclusive<u16>) -> Self {
        self.settings.node_ports = range;
        self
    }

    /// Gives Services of type LoadBalancer addresses from these ranges. Default: none, they stay pending.
    #[must_use]
    pub fn load_balancers(mut self, ranges: impl IntoIterator<Item = IpNet>) -> Self {
        self.settings.load_balancers = ranges.into_iter().map(|net| net.trunc()).collect();
        self
    }

    /// Registers a node.
    #[must_use]
    pub fn node(mut self, node: NodeSpec) -> Self {
        self.nodes.push(node);
        self
    }

    /// Registers nodes.
    #[must_use]
    pub fn nodes(mut self, nodes: impl IntoIterator<Item = NodeSpec>) -> Self {
        self.nodes.extend(nodes);
        self
    }

    /// Who runs the pods. Default: simulated.
    #[must_use]
    pub fn kubelet(mut self, kubelet: Kubelet) -> Self {
        self.settings.kubelet = kubelet;
        self
    }

    /// Whether the controllers run at all. Default: yes.
    #[must_use]
    pub fn controllers(mut self, run: bool) -> Self {
        self.settings.controllers = run;
        self
    }

    /// Asks every request for the bearer token in this file, read anew each time.
    #[must_use]
    pub fn token_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.settings.token_file = Some(path.into());
        self
    }

    /// Speaks TLS only, with this certificate.
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.settings.tls = Some(tls);
        self
    }

    /// Time between bookmarks of an open watch. Default: 60 s.
    #[must_use]
    pub fn bookmark_interval(mut self, interval: Duration) -> Self {
        self.settings.bookmark_interval = interval;
        self
    }

    /// Changes remembered per resource. Default: 50,000.
    #[must_use]
    pub fn history_limit(mut self, changes: usize) -> Self {
        self.settings.history_limit = changes;
        self
    }

    /// Addresses under which pods reach this server, for the Service default/kubernetes. Default: the
    /// listening address, unless it is a wildcard.
    #[must_use]
    pub fn advertise(mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        self.settings.advertise = addresses.into_iter().collect();
        self
    }

    /// Serves one more resource.
    #[must_use]
    pub fn resource(mut self, resource: Resource) -> Self {
        self.resources.push(resource);
        self
    }

    /// Starts the server on threads of its own, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the address cannot be bound, or settings do not fit (a node name twice, ...).
    pub fn start(mut self) -> io::Result<ApiServer> {
        let tls = self.settings.tls.as_ref().map(Tls::acceptor).transpose()?;
        let listener = std::net::TcpListener::bind(self.settings.listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        if self.settings.advertise.is_empty() && !address.ip().is_unspecified() {
            self.settings.advertise = vec![address.ip()];
        }
        self.settings.advertise_port.get_or_insert(address.port());
        let state = Arc::new(State::new(self.settings.clone()));
        self.furnish(&state)?;
        // Threads inherit the network namespace of their creator.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("apiserver")
            .enable_all()
            .build()?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let shared = state.clone();
        let thread = std::thread::Builder::new().name("apiserver".into()).spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                if shared.settings.controllers {
                    tokio::spawn(controllers::run(shared.clone()));
                }
                tokio::select! {
                    _ = serve::run(shared, listener, tls) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(ApiServer { state, address, stop: Some(stop), thread: Some(thread) })
    }

    /// The objects every cluster has, and the nodes.
    fn furnish(&self, state: &State) -> io::Result<()> {
        for resource in &self.resources {
            state.register(|registry| registry.insert(resource.clone()));
        }
        let refuse = |e: crate::status::Refusal| io::Error::new(io::ErrorKind::InvalidInput, e.to_string());
        let create = |name: &str, namespace: &str, object: Value| {
            let resource = state.read(|registry| registry.named(name));
            let Some(resource) = resource else { return Ok(()) };
            state.create(&resource, namespace, object, false).map(drop).map_err(refuse)
        };
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            create("namespaces", "", json!({"metadata": {"name": name}}))?;
            create("serviceaccounts", name, json!({"metadata": {"name": "default"}}))?;
        }
        let cidrs: Vec<String> = self.settings.service_cidrs.iter().map(ToString::to_string).collect();
        create(
            "servicecidrs.networking.k8s.io",
            "",
            json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}}),
        )?;
        for (at, node) in self.nodes.iter().enumerate() {
            let mut node = node.clone();
            if node.pod_cidrs.is_empty() {
                node.pod_cidrs = self.pod_cidrs.iter().filter_map(|net| node_range(net, at)).collect();
            }
            create("nodes", "", node.object())?;
        }
        for (resource, object) in own_service(&self.settings) {
            create(resource, "default", object)?;
        }
        Ok(())
    }
}

/// default/kubernetes, with its slice and Endpoints: the address of this server.
pub fn own_service(settings: &Settings) -> Vec<(&'static str, Value)> {
    let Some(range) = settings.service_cidrs.first() else { return Vec::new() };
    let v4 = range.addr().is_ipv4();
    let addresses: Vec<String> =
        settings.advertise.iter().filter(|a| a.is_ipv4() == v4).map(ToString::to_string).collect();
    let Some(port) = settings.advertise_port.filter(|_| !addresses.is_empty()) else { return Vec::new() };
    let first = match range.network() {
        IpAddr::V4(base) => IpAddr::V4((u32::from(base) | 1).into()),
        IpAddr::V6(base) => IpAddr::V6((u128::from(base) | 1).into()),
    };
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "kind": "Service", "apiVersion": "v1", "metadata": {"name": "kubernetes", "labels": labels},
        "spec": {"clusterIP": first, "ports": [{"name": "https", "port": 443, "targetPort": port}]},
    });
    let endpoints: Vec<Value> =
        addresses.iter().map(|a| json!({"addresses": [a], "conditions": {"ready": true}})).collect();
    let slice = json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if v4 { "IPv4" } else { "IPv6" }, "endpoints": endpoints,
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    });
    let ips: Vec<Value> = addresses.iter().map(|a| json!({"ip": a})).collect();
    let legacy = json!({
        "kind": "Endpoints", "apiVersion": "v1", "metadata": {"name": "kubernetes"},
        "subsets": [{"addresses": ips, "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}],
    });
    vec![("services", service), ("endpointslices.discovery.k8s.io", slice), ("endpoints", legacy)]
}
