//! What a connection and a byte pay for being judged: from outside, through the node's FORWARD hook, to one
//! of its pods.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferroute::cluster::Cluster;
use ferroute::cluster::ObjectKey;
use ferroute::cluster::network_policy::NetworkPolicy;
use ferroute::cluster::node::Node;
use ferroute::cluster::workload::{Labels, Namespace, Phase, Pod};
use ferroute::netpol::Room;
use ferroute::report::Reporter;
use ferroute_kit::Netns;
use ferroute_policy::{Peer, Policy, PolicyPort, PortMatch, Protocol, Requirement, Rule, Selector};

use super::Packets;
use super::cluster::NEEDED;
use super::room::settings;
use crate::shape::NODE;

/// How long each figure is taken.
const SPAN: Duration = Duration::from_millis(1500);
/// Where connections are accepted and closed, and where bytes are read.
const PORTS: [u16; 2] = [80, 81];

/// One measurement: as many pods, each isolated by a policy of its own that lets the client in.
pub fn packets(isolated: u32) -> Result<Packets> {
    // The room's handles belong to the namespace of the thread that opens them.
    let [node, outside, pod] = ["node", "outside", "pod"].map(Netns::new);
    let (node, outside, pod) = (node?, outside?, pod?);
    let target: IpAddr = [10, 1, 1, 2].into();
    connect(&node, &outside, "out", [192, 0, 2, 1].into(), [192, 0, 2, 9].into())?;
    connect(&node, &pod, "pod", [10, 1, 0, 1].into(), target)?;
    node.set_sysctl("net/ipv4/ip_forward", "1")?;
    outside.links()?.set_route("10.1.0.0/16".parse()?, &[[192, 0, 2, 1].into()])?;
    pod.links()?.set_route("0.0.0.0/0".parse()?, &[[10, 1, 0, 1].into()])?;

    let cluster = Cluster::new();
    fill(&cluster, isolated)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _inside = runtime.enter();
    let (view, thread) = node.run(|| -> Result<_> {
        let (room, view) = Room::open(settings()?, cluster.subscribe(), Reporter::new(NODE))?;
        // A new thread is born in the namespace of the one that makes it.
        let thread = std::thread::Builder::new().name("netpol".into()).spawn(move || room.run())?;
        Ok((view, thread))
    })?;
    NEEDED.into_iter().for_each(|kind| cluster.set_listed(kind));
    let deadline = Instant::now() + Duration::from_secs(60);
    while view.health().last_clean_pass.is_none() {
        ensure!(Instant::now() < deadline && !thread.is_finished(), "{:?}", view.health().last_error);
        std::thread::sleep(Duration::from_millis(5));
    }

    pod.run(|| -> Result<()> {
        for port in PORTS {
            let listener = TcpListener::bind((target, port))?;
            std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 17];
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { continue };
                    // The client decides when to end.
                    while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
                }
            });
        }
        Ok(())
    })?;
    let figures = outside.run(|| -> Result<Packets> {
        let to = |port| SocketAddr::new(target, port);
        let begun = Instant::now();
        let mut made = 0u32;
        while begun.elapsed() < SPAN {
            drop(TcpStream::connect_timeout(&to(PORTS[0]), Duration::from_secs(2)).context("connect")?);
            made += 1;
        }
        let connections = f64::from(made) / begun.elapsed().as_secs_f64();
        let mut stream = TcpStream::connect_timeout(&to(PORTS[1]), Duration::from_secs(2))?;
        let (chunk, begun, mut sent) = (vec![0; 1 << 16], Instant::now(), 0usize);
        while begun.elapsed() < SPAN {
            sent += stream.write(&chunk)?;
        }
        let throughput = sent as f64 / begun.elapsed().as_secs_f64() / 1e6;
        Ok(Packets { isolated, connections, throughput })
    })?;
    if isolated > 0 {
        let refused =
            outside.run(|| TcpStream::connect_timeout(&SocketAddr::new(target, 99), Duration::from_secs(2)));
        ensure!(refused.is_err(), "nothing was judged: a port that no policy allows answered");
    }
    view.stop();
    thread.join().map_err(|_| anyhow::anyhow!("the room panicked"))??;
    Ok(figures)
}

/// A cable between the node and another namespace; each end has one address.
fn connect(node: &Netns, other: &Netns, name: &str, near: IpAddr, far: IpAddr) -> Result<()> {
    node.links()?.add_veth(name, "eth0", other.fd())?;
    for (netns, link, own, peer) in [(node, name, near, far), (other, "eth0", far, near)] {
        let links = netns.links()?;
        links.up(link)?;
        let index = netns.link_index(link)?;
        links.add_address(index, own.into())?;
        links.set_link_route(peer.into(), index)?;
    }
    Ok(())
}

fn fill(cluster: &Cluster, isolated: u32) -> Result<()> {
    cluster.apply_node(Node {
        name: NODE.into(),
        internal_ips: vec![[192, 0, 2, 1].into()],
        pod_cidrs: vec!["10.1.0.0/16".parse()?],
        ..Node::default()
    });
    cluster.apply_namespace(Namespace { name: "n".into(), labels: Arc::default() });
    for index in 0..isolated.max(1) {
        let own = format!("a{index}");
        cluster.apply_pod(Pod {
            key: ObjectKey::new("n", own.as_str()),
            uid: own.as_str().into(),
            labels: Arc::new(Labels::from([("app".into(), own.as_str().into())])),
            ips: vec![[10, 1, 1, u8::try_from(index % 250 + 2)?].into()],
            host_ips: Vec::new(),
            host_network: false,
            phase: Phase::Running,
            node: Some(NODE.into()),
            ports: Vec::new(),
            ready: true,
            terminating: false,
        });
    }
    for index in 0..isolated {
        let requirement = Requirement::In("app".into(), [format!("a{index}").into()].into());
        let port = |port| PolicyPort { protocol: Protocol::Tcp, ports: PortMatch::Range(port, port) };
        let policy = Policy {
            pod_selector: Selector { requirements: vec![requirement] },
            ingress: Some(vec![Rule {
                peers: Some(vec![Peer::Block { cidr: "192.0.2.0/24".parse()?, except: Vec::new() }]),
                ports: Some(PORTS.map(port).to_vec()),
            }]),
            egress: Some(Vec::new()),
        };
        let key = ObjectKey::new("n", format!("p{index}"));
        cluster.apply_network_policy(NetworkPolicy {
            key,
            uid: "u".into(),
            policy: Arc::new(policy),
            problems: Vec::new(),
        });
    }
    Ok(())
}
