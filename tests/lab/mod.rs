//! A cluster in which ferroute runs on every node, for the lab tests of the root package.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod bgp;
pub mod bird;

use std::io::{BufRead, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ferroute_apiserver::{ApiServer, NodeSpec};
use ferroute_kit::assert::eventually;
use ferroute_kit::cluster::Builder;
use ferroute_kit::{Answer, Cluster, Daemon, Netns, Node, Pod, Protocol, Reply};
use ipnet::IpNet;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ferroute");
/// Enough for whatever should happen soon, on a slow lab kernel.
pub const SOON: Duration = Duration::from_secs(30);
/// A BGP session takes this long at most.
pub const SESSION: Duration = Duration::from_secs(60);
/// Until a refusal must be told.
pub const AT_ONCE: Duration = Duration::from_millis(200);
/// A packet that is dropped is missed after this.
pub const MISSED: Duration = Duration::from_millis(400);
/// Ports every pod of the lab echoes on.
pub const POD_PORTS: [(Protocol, u16); 3] =
    [(Protocol::Tcp, 8080), (Protocol::Udp, 8080), (Protocol::Sctp, 8080)];
const API_PORT: u16 = 8001;

/// Nodes, pods, a client, an API server and a ferroute per node.
pub struct Lab {
    pub daemons: Vec<Daemon>,
    pub server: ApiServer,
    pub cluster: Cluster,
    number: usize,
}

impl Lab {
    /// Builds the cluster and starts ferroute with these flags everywhere; ready when it returns.
    pub fn start(builder: Builder, flags: &[&str]) -> Self {
        let mut lab = Self::without_daemons(builder);
        lab.start_daemons(flags);
        lab
    }

    /// The cluster and its API server; no ferroute yet.
    pub fn without_daemons(builder: Builder) -> Self {
        Self::without_daemons_by(builder, |server| server)
    }

    /// The same with an API server of other settings.
    pub fn without_daemons_by(
        builder: Builder,
        settings: impl FnOnce(ferroute_apiserver::Builder) -> ferroute_apiserver::Builder,
    ) -> Self {
        let cluster = builder.pod_ports(POD_PORTS).build().unwrap();
        let nodes = cluster.nodes.iter().map(|node| {
            let spec = NodeSpec::new(&node.name, node.ips.clone()).pod_cidrs(node.pod_cidrs.clone());
            match &node.zone {
                Some(zone) => spec.zone(zone),
                None => spec,
            }
        });
        let listen = SocketAddr::new(cluster.api_ips[0], API_PORT);
        let ranges: Vec<IpNet> = ["10.96.0.0/16", "fd00:96::/112"]
            .into_iter()
            .map(|range| range.parse::<IpNet>().unwrap())
            .filter(|range| cluster.api_ips.iter().any(|ip| ip.is_ipv4() == range.addr().is_ipv4()))
            .collect();
        let server = cluster
            .router
            .run(|| {
                let server = ApiServer::builder().listen(listen).nodes(nodes).service_cidrs(ranges);
                settings(server).start()
            })
            .unwrap();
        // Linux tells one client of at most six refusals in a row, then of one a second; tests refuse
        // more, and measure how long one takes.
        for node in &cluster.nodes {
            node.set_sysctl("net/ipv4/icmp_ratelimit", "0").unwrap();
            node.set_sysctl("net/ipv6/icmp/ratelimit", "0").unwrap();
        }
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self { daemons: Vec::new(), server, cluster, number }
    }

    pub fn start_daemons(&mut self, flags: &[&str]) {
        self.start_daemons_within(SOON, flags);
    }

    pub fn start_daemons_within(&mut self, patience: Duration, flags: &[&str]) {
        let all: Vec<usize> = (1..=self.cluster.nodes.len()).collect();
        self.start_daemons_on(&all, patience, flags);
    }

    /// On these nodes only.
    pub fn start_daemons_on(&mut self, numbers: &[usize], patience: Duration, flags: &[&str]) {
        let master = format!("--master={}", self.server.url());
        for number in numbers {
            let node = &self.cluster.nodes[number - 1];
            let socket = format!("--admin-socket={}", self.admin_socket(node));
            let mut all = vec![master.as_str(), "--metrics-port=9090", &socket];
            all.extend(flags);
            self.daemons.push(Daemon::ferroute(node, PROGRAM, &all).unwrap());
        }
        for daemon in &mut self.daemons {
            daemon.wait_ready(patience).unwrap();
        }
    }

    /// The admin socket of a node's ferroute: all labs share one file system.
    pub fn admin_socket(&self, node: &Node) -> String {
        format!("/run/ferroute-{}-{}/ferroute.sock", self.number, node.name)
    }

    /// Where a node's ferroute listens for the CNI plugin.
    pub fn cni_socket(&self, node: &Node) -> String {
        self.admin_socket(node).replace("ferroute.sock", "cni.sock")
    }

    pub fn node(&self, number: usize) -> &Node {
        &self.cluster.nodes[number - 1]
    }

    /// Pod `pN-K`.
    pub fn pod(&self, name: &str) -> &Pod {
        self.cluster.pods.iter().find(|pod| pod.spec.name == name).unwrap()
    }

    /// Stores a Service in namespace `default` as it is; `spec` may override what
    /// [`service`] gives.
    pub fn put_service(&self, object: &Value) {
        self.server.insert_unchecked("services", object.clone()).unwrap();
    }

    /// Stores the EndpointSlices of a Service, one per family, for [`PORTS`].
    pub fn put_slices(&self, service: &str, endpoints: &[Endpoint]) {
        for ipv6 in [false, true] {
            self.put_slice(&slice(service, ipv6, endpoints));
        }
    }

    pub fn put_slice(&self, object: &Value) {
        self.server.insert_unchecked("endpointslices", object.clone()).unwrap();
    }

    /// Removes a Service and its slices.
    pub fn remove_service(&self, name: &str) {
        self.server.remove_unchecked("services", "default", name).unwrap();
        for family in ["4", "6"] {
            let _ = self.server.remove_unchecked("endpointslices", "default", &format!("{name}-{family}"));
        }
    }

    /// Waits until every node serves the Service of [`service`] with this number to so many endpoints
    /// on its TCP port, in both families.
    pub fn wait_served(&self, number: u8, endpoints: usize) {
        for node in &self.cluster.nodes {
            for vip in vips(number) {
                if node.ip_like(vip).is_some() {
                    wait_destinations(node, Protocol::Tcp, SocketAddr::new(vip, 80), endpoints);
                }
            }
        }
    }

    /// A value of the metrics page of a node.
    pub fn metric(&self, number: usize, name: &str) -> f64 {
        metric(self.node(number), name)
    }

    /// Messages of events about an object, with their reasons.
    pub fn events(&self, name: &str) -> Vec<(String, String)> {
        self.server
            .list("events", "")
            .into_iter()
            .filter(|event| event["involvedObject"]["name"] == name || event["regarding"]["name"] == name)
            .map(|event| {
                let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
                (text("reason"), if text("note").is_empty() { text("message") } else { text("note") })
            })
            .collect()
    }

    /// Waits for an event about an object.
    pub fn wait_event(&self, name: &str, reason: &str) -> String {
        eventually(&format!("event {reason} about {name}"), SOON, || {
            let events = self.events(name);
            let found = events.iter().find(|(is, _)| is == reason).map(|(_, text)| text.clone());
            found.ok_or_else(|| format!("{events:?}"))
        })
    }
}

/// The cluster IPs of the Service with this number.
pub fn vips(number: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 96, 0, number]), format!("fd00:96::{number:x}").parse().unwrap()]
}

/// A Service with three ports, 80 to 8080, by TCP, UDP and SCTP, in both families. `spec` goes over it.
pub fn service(name: &str, number: u8, spec: Value) -> Value {
    let ips: Vec<String> = vips(number).iter().map(ToString::to_string).collect();
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": name, "namespace": "default", "uid": format!("uid-{name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": ["IPv4", "IPv6"],
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "ports": [
                {"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"},
                {"name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP"},
                {"name": "sctp", "port": 80, "targetPort": 8080, "protocol": "SCTP"},
            ],
        },
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        match field.as_str() {
            "annotations" | "labels" => object["metadata"][field] = value.clone(),
            "status" => object["status"] = value.clone(),
            _ => object["spec"][field] = value.clone(),
        }
    }
    object
}

/// The three ports of [`service`] with these node ports.
pub fn node_ports(first: u16) -> Value {
    json!([
        {"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP", "nodePort": first},
        {"name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP", "nodePort": first},
        {"name": "sctp", "port": 80, "targetPort": 8080, "protocol": "SCTP", "nodePort": first},
    ])
}

/// `status` with these load-balancer addresses.
pub fn load_balancer(ips: &[&str]) -> Value {
    let ingress: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
    json!({"loadBalancer": {"ingress": ingress}})
}

/// One endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub ips: Vec<IpAddr>,
    pub node: String,
    pub conditions: Value,
    pub hints: Value,
}

impl Endpoint {
    /// A ready pod.
    pub fn of(pod: &Pod) -> Self {
        Self {
            ips: pod.ips.clone(),
            node: pod.node().to_owned(),
            conditions: json!({"ready": true, "serving": true, "terminating": false}),
            hints: Value::Null,
        }
    }

    pub fn state(mut self, ready: bool, serving: bool, terminating: bool) -> Self {
        self.conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
        self
    }

    pub fn zones(self, zones: &[&str]) -> Self {
        self.hint("forZones", zones)
    }

    pub fn nodes(self, nodes: &[&str]) -> Self {
        self.hint("forNodes", nodes)
    }

    fn hint(mut self, field: &str, names: &[&str]) -> Self {
        self.hints[field] = names.iter().map(|name| json!({"name": name})).collect();
        self
    }
}

/// The EndpointSlice of one family for the ports of [`service`].
pub fn slice(service: &str, ipv6: bool, endpoints: &[Endpoint]) -> Value {
    let list: Vec<Value> = endpoints
        .iter()
        .filter_map(|endpoint| {
            let ip = endpoint.ips.iter().find(|ip| ip.is_ipv6() == ipv6)?;
            Some(json!({
                "addresses": [ip.to_string()], "nodeName": endpoint.node,
                "conditions": endpoint.conditions, "hints": endpoint.hints,
            }))
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", if ipv6 { "6" } else { "4" }), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if ipv6 { "IPv6" } else { "IPv4" },
        "ports": [
            {"name": "tcp", "port": 8080, "protocol": "TCP"},
            {"name": "udp", "port": 8080, "protocol": "UDP"},
            {"name": "sctp", "port": 8080, "protocol": "SCTP"},
        ],
        "endpoints": list,
    })
}

/// A value of a node's metrics page; 0 while there is none.
pub fn metric(node: &Node, name: &str) -> f64 {
    let page = node.http_get(SocketAddr::from(([127, 0, 0, 1], 9090)), "/metrics").unwrap();
    assert_eq!(page.status, 200, "{}", page.body);
    page.body
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
        .unwrap_or(0.0)
}

/// One virtual server as `ipvsadm -Sn` prints it: the line of the server, then those of its
/// destinations without the server; none when there is no such virtual server.
pub fn virtual_server(node: &Netns, protocol: Protocol, at: SocketAddr) -> Option<(String, Vec<String>)> {
    // A table of this size is read in one go; `-Sn` alone names ports and addresses in full.
    let table = node.exec("ipvsadm", &["-Sn"]).unwrap();
    let head = match protocol {
        Protocol::Tcp => format!("-A -t {at} "),
        Protocol::Udp => format!("-A -u {at} "),
        Protocol::Sctp => format!("-A --sctp-service {at} "),
    };
    let server = table.lines().find_map(|line| line.strip_prefix(&head))?.to_owned();
    let member = format!("-a{}-r ", &head[2..]);
    let list = table.lines().filter_map(|line| line.strip_prefix(&member).map(str::to_owned)).collect();
    Some((server, list))
}

/// Waits until a virtual server has so many destinations that take new connections. Without any it is
/// there only while something drains, but its address, protocol and port are in a set of ours.
pub fn wait_destinations(node: &Node, protocol: Protocol, at: SocketAddr, number: usize) {
    eventually(&format!("{number} destinations of {protocol} {at} on {}", node.name), SOON, || {
        match virtual_server(node, protocol, at) {
            Some((_, list)) if active(&list) == number => Ok(()),
            None if number == 0 && is_known(node, protocol, at) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

/// Whether a frontend is one of a Service, served or not.
pub fn is_known(node: &Netns, protocol: Protocol, at: SocketAddr) -> bool {
    let set = if at.is_ipv4() { "kube-router-svip-prt" } else { "inet6:kube-router-svip-prt" };
    let protocol = protocol.to_string().to_lowercase();
    let entry = format!("{},{protocol}:{}", at.ip(), at.port());
    node.exec("ipset", &["-q", "test", set, &entry]).is_ok()
}

/// How many destinations are not draining.
pub fn active(destinations: &[String]) -> usize {
    destinations.iter().filter(|line| !line.ends_with(" -w 0")).count()
}

/// Waits until a virtual server is gone.
pub fn wait_gone(node: &Node, protocol: Protocol, at: SocketAddr) {
    eventually(&format!("no {protocol} {at} on {}", node.name), SOON, || {
        match virtual_server(node, protocol, at) {
            None => Ok(()),
            some => Err(format!("{some:?}")),
        }
    });
}

/// One request that must be answered; who did, and whom it saw.
pub fn ask(from: &Netns, protocol: Protocol, to: SocketAddr, what: &str) -> Answer {
    match from.ask(protocol, to, Duration::from_secs(2)) {
        Reply::Answer(answer) => answer,
        reply => panic!("{what}: {protocol} {to} from {}: {reply:?}", from.name()),
    }
}

/// One TCP request from this source address; who answered.
pub fn ask_as(from: &Netns, own: IpAddr, to: SocketAddr) -> Answer {
    let text = from.run(|| -> std::io::Result<String> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(own, 0).into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
        let mut stream = std::net::TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"who\n")?;
        let mut line = String::new();
        std::io::BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    });
    Answer::parse(text.unwrap().trim()).unwrap()
}

/// One ICMP echo request (RFC 792, RFC 4443); whether it was answered.
pub fn ping(from: &Netns, to: IpAddr) -> bool {
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, 128, 129),
    };
    let mut packet = [request, 0, 0, 0, 0x12, 0x34, 0, 1];
    if to.is_ipv4() {
        // The one's complement sum; the kernel does it for ICMPv6.
        let sum: u32 = packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        let check = !(sum + (sum >> 16)) as u16;
        packet[2..4].copy_from_slice(&check.to_be_bytes());
    }
    from.run(|| {
        let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
        socket.connect(&SocketAddr::new(to, 0).into()).unwrap();
        socket.send(&packet).unwrap();
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut socket = socket;
        let mut answer = [0; 256];
        while Instant::now() < deadline {
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let Ok(length) = socket.read(&mut answer) else { continue };
            // A raw IPv4 socket gives the IP header too.
            let skip = if to.is_ipv4() { usize::from(answer[0] & 15) * 4 } else { 0 };
            if length > skip && answer[skip] == reply {
                return true;
            }
        }
        false
    })
}

/// Asserts that a request is refused, and at once.
pub fn assert_refused(from: &Netns, protocol: Protocol, to: SocketAddr, what: &str) {
    let (reply, taken) = timed(from, protocol, to);
    // What a client makes of "protocol unreachable", which refuses SCTP in IPv4.
    let unknown = Reply::Failed(std::io::Error::from_raw_os_error(nix::libc::ENOPROTOOPT).to_string());
    let fits = reply == Reply::Refused || (protocol == Protocol::Sctp && to.is_ipv4() && reply == unknown);
    assert!(fits, "{what}: {protocol} {to} from {} after {taken:?}: {reply:?}", from.name());
    assert!(taken < AT_ONCE, "{what}: {protocol} {to} from {} refused after {taken:?}", from.name());
}

fn timed(from: &Netns, protocol: Protocol, to: SocketAddr) -> (Reply, Duration) {
    let begin = Instant::now();
    (from.ask(protocol, to, Duration::from_secs(2)), begin.elapsed())
}

/// Names of the pods that answer, over so many requests; all must be answered.
pub fn who(from: &Netns, protocol: Protocol, to: SocketAddr, times: usize) -> Vec<String> {
    let tally = from.spread(protocol, to, times);
    assert_eq!(tally.failed, 0, "{protocol} {to} from {}: {tally}", from.name());
    tally.pods.into_keys().collect()
}

/// Stores a Namespace with these labels and its name's.
pub fn put_namespace(lab: &Lab, name: &str, labels: Value) {
    let mut labels = labels;
    labels["kubernetes.io/metadata.name"] = json!(name);
    let object =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    lab.server.insert_unchecked("namespaces", object).unwrap();
}

/// Stores a NetworkPolicy.
pub fn put_policy(lab: &Lab, namespace: &str, name: &str, spec: Value) {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{name}")}, "spec": spec,
    });
    lab.server.insert_unchecked("networkpolicies", object).unwrap();
}

/// A running pod as the API has it, with its ports of [`POD_PORTS`] by name.
pub fn pod_object(pod: &Pod, labels: Value) -> Value {
    let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
    let port =
        |name: &str, protocol: &str| json!({"name": name, "containerPort": 8080, "protocol": protocol});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod.spec.name, "namespace": pod.spec.namespace, "labels": labels,
            "uid": format!("uid-{}-{}", pod.spec.name, ips[0]["ip"]),
        },
        "spec": {
            "nodeName": pod.node(),
            "containers": [{"name": "c", "ports": [port("web", "TCP"), port("web-u", "UDP"), port("web-s", "SCTP")]}],
        },
        "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips, "hostIP": "192.0.2.1"},
    })
}

/// Waits until a request is answered, or is not.
pub fn expect(from: &Netns, protocol: Protocol, to: SocketAddr, allowed: bool) {
    if protocol == Protocol::Sctp {
        // An SCTP refusal while connect(2) holds the socket is told by the next INIT only: do not wait 3 s
        // for it. The kernel asks for minimum <= initial.
        for name in ["rto_min", "rto_initial"] {
            from.set_sysctl(&format!("net/sctp/{name}"), "60").unwrap();
        }
    }
    let verdict = if allowed { "allowed" } else { "refused" };
    eventually(&format!("{protocol} {to} from {} {verdict}", from.name()), SOON, || {
        let patience = if allowed { Duration::from_secs(2) } else { MISSED };
        let reply = from.ask(protocol, to, patience);
        match (reply.answer().is_some() == allowed, reply) {
            (true, _) => Ok(()),
            (false, reply) => Err(format!("{reply:?}")),
        }
    });
}
