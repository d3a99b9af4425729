//! The daemon from a folder of YAML, on a real kernel: traffic of every kind, a live change, drift, clean-up.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Daemon, Families, KernelSnapshot, Netns, Protocol, Reply, Stranger, serial};

const PORTS: [(Protocol, u16); 3] = [(Protocol::Tcp, 8080), (Protocol::Udp, 8080), (Protocol::Sctp, 8080)];
const SOON: Duration = Duration::from_secs(10);

struct Folder(PathBuf);

impl Folder {
    fn new(cluster: &Cluster) -> Self {
        let path = std::env::temp_dir().join(format!("ferroute-manifests-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let folder = Self(path);
        let nodes: Vec<String> = cluster.node_objects().iter().map(ToString::to_string).collect();
        folder.write("nodes.yaml", &nodes.join("\n---\n"));
        folder
    }

    /// Replaces a file as editors and `kubectl cp` do: whole.
    fn write(&self, name: &str, text: &str) {
        let new = self.0.join(format!(".{name}.new"));
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.0.join(name)).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Service and slices `web` over the pods whose index passes `wanted`.
fn web(cluster: &Cluster, wanted: impl Fn(usize) -> bool) -> String {
    let mut text = String::from(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: shop\n  \
         annotations: { kube-router.io/service.hairpin: \"\" }\nspec:\n  type: LoadBalancer\n  \
         clusterIP: 10.96.0.10\n  clusterIPs: [10.96.0.10, \"fd00:96::10\"]\n  externalIPs: [198.51.100.10]\n  ports:\n  \
         - { name: tcp, protocol: TCP, port: 80, nodePort: 30080 }\n  \
         - { name: udp, protocol: UDP, port: 80, nodePort: 30080 }\n  \
         - { name: sctp, protocol: SCTP, port: 80, nodePort: 30080 }\n\
         status: { loadBalancer: { ingress: [{ ip: 203.0.113.10 }, { ip: \"fd00:203::10\" }] } }\n",
    );
    for (family, ipv6) in [("IPv4", false), ("IPv6", true)] {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-{}\n  namespace: shop\n  \
             labels: {{ kubernetes.io/service-name: web }}\naddressType: {family}\nports:\n\
             - {{ name: tcp, protocol: TCP, port: 8080 }}\n- {{ name: udp, protocol: UDP, port: 8080 }}\n\
             - {{ name: sctp, protocol: SCTP, port: 8080 }}\nendpoints:\n",
            family.to_lowercase()
        );
        for (_, pod) in cluster.pods.iter().enumerate().filter(|(index, _)| wanted(*index)) {
            let ip = pod.ips.iter().find(|ip| ip.is_ipv6() == ipv6).unwrap();
            text += &format!("- {{ addresses: [\"{ip}\"], nodeName: {} }}\n", pod.node());
        }
    }
    text
}

fn start(cluster: &Cluster, folder: &Path) -> Vec<Daemon> {
    let folder = folder.to_str().unwrap();
    let mut daemons: Vec<Daemon> = cluster
        .nodes
        .iter()
        .map(|node| {
            Daemon::ferroute(
                node,
                env!("CARGO_BIN_EXE_ferroute"),
                &[
                    "--manifests",
                    folder,
                    "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
                    "--service-external-ip-range=198.51.100.0/24",
                    "--loadbalancer-ip-range=203.0.113.0/24,fd00:203::/64",
                ],
            )
            .unwrap()
        })
        .collect();
    for daemon in &mut daemons {
        daemon.wait_ready(SOON).unwrap();
    }
    daemons
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Every pod in `expected` answers, and nobody else.
fn spread(from: &Netns, who: &str, protocol: Protocol, to: SocketAddr, expected: &[String]) {
    let tally = from.spread(protocol, to, expected.len() * 3);
    assert_eq!(tally.failed, 0, "{who} {protocol} {to}: {tally}");
    let mut pods: Vec<String> = tally.pods.keys().cloned().collect();
    pods.sort();
    assert_eq!(pods, expected, "{who} {protocol} {to}");
}

#[test]
fn a_folder_of_yaml_serves_every_kind_of_client() {
    let _serial = serial();
    ferroute_kit::kernel::require().unwrap();
    let cluster = Cluster::builder()
        .families(Families::Dual)
        .nodes(3)
        .pods_per_node(2)
        .pod_ports(PORTS)
        .build()
        .unwrap();
    let strangers: Vec<Stranger> = cluster.nodes.iter().map(|node| Stranger::plant(node).unwrap()).collect();
    let before: Vec<KernelSnapshot> =
        cluster.nodes.iter().map(|node| KernelSnapshot::settled(node, SOON).unwrap()).collect();
    let folder = Folder::new(&cluster);
    folder.write("web.yaml", &web(&cluster, |_| true));
    let mut daemons = start(&cluster, &folder.0);

    let first = &cluster.nodes[0];
    for network in ["198.51.100.0/24", "203.0.113.0/24", "fd00:203::/64"] {
        cluster.client.route_via(&[first], network.parse().unwrap()).unwrap();
    }
    let mut all: Vec<String> = cluster.pods.iter().map(|pod| pod.spec.name.clone()).collect();
    all.sort();
    for protocol in Protocol::ALL {
        for vip in ["10.96.0.10", "fd00:96::10"] {
            for pod in [&cluster.pods[0], &cluster.pods[5]] {
                spread(pod.netns(), &pod.spec.name, protocol, at(vip, 80), &all);
            }
            spread(&cluster.nodes[1], "node n2", protocol, at(vip, 80), &all);
        }
        for vip in ["198.51.100.10", "203.0.113.10", "fd00:203::10"] {
            spread(&cluster.client, "client", protocol, at(vip, 80), &all);
        }
        for node in &cluster.nodes {
            for ip in &node.ips {
                spread(&cluster.client, "client", protocol, SocketAddr::new(*ip, 30080), &all);
            }
        }
    }
    // What is no Service is refused at once, ICMP is answered.
    for closed in [at("10.96.0.10", 81), at("10.96.7.7", 80), at("203.0.113.10", 22)] {
        let reply = cluster.pods[0].tcp(closed);
        assert!(matches!(reply, Reply::Refused | Reply::Unreachable(_)), "{closed}: {reply:?}");
    }
    for vip in ["10.96.0.10", "fd00:96::10", "203.0.113.10"] {
        assert!(cluster.pods[0].ping(vip.parse().unwrap()).unwrap(), "{vip} answers no ping");
    }

    // A live change of the file reaches every node.
    folder.write("web.yaml", &web(&cluster, |index| index < 3));
    let left: Vec<String> = cluster.pods[..3].iter().map(|pod| pod.spec.name.clone()).collect();
    eventually("removed endpoints get no new connection", SOON, || {
        let tally = cluster.nodes[2].spread(Protocol::Tcp, at("10.96.0.10", 80), 12);
        let gone: Vec<_> = tally.pods.keys().filter(|pod| !left.contains(*pod)).collect();
        if tally.failed == 0 && gone.is_empty() { Ok(()) } else { Err(format!("{tally}")) }
    });

    for daemon in &mut daemons {
        assert!(daemon.terminate(SOON).unwrap().success(), "{:?}", daemon.log());
    }
    // The data plane outlives the daemon.
    spread(&cluster.nodes[2], "node n3", Protocol::Tcp, at("10.96.0.10", 80), &left);

    for (node, before) in cluster.nodes.iter().zip(&before) {
        for _ in 0..2 {
            node.exec(env!("CARGO_BIN_EXE_ferroute"), &["--cleanup-config"]).unwrap();
        }
        let ours = |line: &str| !line.contains("sysctl");
        before.only(ours).assert_same(&KernelSnapshot::take(node).unwrap().only(ours), "after clean-up");
    }
    for stranger in &strangers {
        stranger.assert_untouched("in the end");
    }
}
