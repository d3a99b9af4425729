//! The pod network room on a real kernel: two nodes in different subnets behind a router, each with the
//! room, fed with what BGP would tell them.
//!
//! Run it through `scripts/test --lab-only lab_pod_network`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferroute::chains;
use ferroute::cluster::node::Node;
use ferroute::cluster::{Cluster, Kind};
use ferroute::host::Family;
use ferroute::host::tunnel::Encapsulation;
use ferroute::network::learned::News;
use ferroute::network::node_address::Methods;
use ferroute::network::settings::Reach;
use ferroute::network::{self, Room, Settings, View, overlay};
use ferroute::report::Reporter;
use ferroute_kit::Netns;

/// How long a first pass may take here, where a program takes tens of milliseconds to start.
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon drift must be repaired.
const REPAIR: Duration = Duration::from_secs(1);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Lines of a shell, in a namespace.
trait Script {
    fn script(&self, lines: &str) -> anyhow::Result<String>;
}

impl Script for Netns {
    fn script(&self, lines: &str) -> anyhow::Result<String> {
        self.exec("sh", &["-ec", lines])
    }
}

/// Waits until a command's output satisfies; returns how long it took.
fn until(netns: &Netns, line: &str, patience: Duration, right: impl Fn(&str) -> bool) -> Duration {
    let begun = Instant::now();
    loop {
        let said = netns.script(line).unwrap();
        let took = begun.elapsed();
        if right(&said) {
            return took;
        }
        assert!(took < patience, "after {took:?} `{line}` in {} says:\n{said}", netns.name());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A room that runs in a namespace.
struct Running {
    view: View,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(netns: &Netns, settings: Settings, cluster: &Cluster) -> Self {
        let subscription = cluster.subscribe_to(&[Kind::Node]);
        let (view, thread) = netns.run(|| {
            let (room, view) = Room::open(settings, subscription, &Reporter::new("here")).unwrap();
            (view, std::thread::spawn(move || room.run().unwrap()))
        });
        Self { view, thread: Some(thread) }
    }

    /// Waits for a clean pass.
    fn clean(&self) {
        let begun = Instant::now();
        loop {
            // Answered between two passes.
            let status = self.view.status(PATIENCE).unwrap();
            let health = self.view.health();
            if health.last_clean_pass.is_some() && health.last_error.is_none() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{health:?}\n{status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(mut self) {
        self.view.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Scene {
    a: Netns,
    b: Netns,
    router: Netns,
    cluster: Cluster,
}

impl Scene {
    fn new() -> Self {
        let [a, b, router] = ["a", "b", "r"].map(|name| Netns::new(name).unwrap());
        for (node, number) in [(&a, 1), (&b, 2)] {
            let links = router.links().unwrap();
            links.add_veth(&format!("to{number}"), "eth0", node.fd()).unwrap();
            router
                .script(&format!(
                    "ip addr add 192.168.{number}.254/24 dev to{number}
                     ip -6 addr add fd0{number}::254/64 dev to{number} nodad
                     ip link set to{number} up"
                ))
                .unwrap();
            node.script(&format!(
                "ip addr add 192.168.{number}.1/24 dev eth0
                 ip -6 addr add fd0{number}::1/64 dev eth0 nodad
                 ip link set eth0 up
                 ip route add default via 192.168.{number}.254
                 ip -6 route add default via fd0{number}::254"
            ))
            .unwrap();
        }
        for netns in [&a, &b, &router] {
            netns.set_sysctl("net/ipv4/ip_forward", "1").unwrap();
            netns.set_sysctl("net/ipv6/conf/all/forwarding", "1").unwrap();
        }
        let cluster = Cluster::new();
        for number in 1..=3 {
            cluster.apply_node(Node {
                name: format!("n{number}").into(),
                internal_ips: if number == 3 {
                    // Beside n1.
                    vec![ip("192.168.1.3"), ip("fd01::3")]
                } else {
                    vec![ip(&format!("192.168.{number}.1")), ip(&format!("fd0{number}::1"))]
                },
                pod_cidrs: vec![
                    format!("10.244.{number}.0/24").parse().unwrap(),
                    format!("fd10:{number}::/64").parse().unwrap(),
                ],
                ..Node::default()
            });
        }
        cluster.set_listed(Kind::Node);
        Self { a, b, router, cluster }
    }

    fn settings(node: &str) -> Settings {
        Settings {
            node_name: node.into(),
            audit_period: Duration::from_secs(300),
            overlay: Reach::Subnet,
            encapsulation: Encapsulation::Plain,
            egress: true,
            egress_exclude: Vec::new(),
            auto_mtu: true,
            cni_file: None,
            addresses: Methods::default(),
            disable_source_check: false,
        }
    }
}

fn news(began: bool, routes: &[(&str, &[&str])], complete: bool) -> News {
    let routes: BTreeMap<_, _> = routes
        .iter()
        .map(|(prefix, hops)| (prefix.parse().unwrap(), hops.iter().map(|hop| ip(hop)).collect()))
        .collect();
    News { began, routes, complete: if complete { Family::BOTH.into() } else { [].into() } }
}

/// What n1 hears: n2 behind the router, n3 beside it, a network with two gateways, one that it is
/// connected to, one that a stranger has routed elsewhere, one with no way to it.
const OF_A: &[(&str, &[&str])] = &[
    ("10.244.2.0/24", &["192.168.2.1"]),
    ("fd10:2::/64", &["fd02::1"]),
    ("10.244.3.0/24", &["192.168.1.3"]),
    ("fd10:3::/64", &["fd01::3"]),
    ("198.51.100.0/24", &["192.168.1.253", "192.168.1.254"]),
    ("2001:db8::/32", &["fd01::253", "fd01::254"]),
    ("2001:db8:77::/64", &["fd01::3", "fd02::1"]),
    ("192.168.1.0/24", &["192.168.1.3"]),
    ("203.0.113.0/24", &["192.168.1.3"]),
    ("10.244.9.0/24", &["172.31.9.9"]),
];
const OF_B: &[(&str, &[&str])] = &[("10.244.1.0/24", &["192.168.1.1"]), ("fd10:1::/64", &["fd01::1"])];

#[test]
fn learned_routes_reach_the_kernel_are_kept_right_and_go_without_a_trace() {
    let scene = Scene::new();
    let Scene { a, b, .. } = &scene;
    // Strangers: a route of the same prefix, a rule, a tunnel of a similar name, a set.
    a.script(
        "ip route add 203.0.113.0/24 via 192.168.1.254 proto static
          ip rule add from 10.66.0.0/16 lookup 77 pref 100 protocol static
          ip link add tun-0123456789a type ipip local 192.168.1.1 remote 192.168.99.99
          ipset create theirs hash:ip
          ip link set tun-0123456789a up
          ip route add 10.66.0.0/16 dev tun-0123456789a table 77 proto static
          ip route add 10.77.0.0/24 via 192.168.1.254 proto 17",
    )
    .unwrap();
    let strangers = "ip route show proto static table all; ip rule show from 10.66.0.0/16; ip link show tun-0123456789a; ipset list -n theirs";
    let before = a.script(strangers).unwrap();
    let connected = "ip route show proto kernel dev eth0; ip -6 route show proto kernel dev eth0";
    let connected_before = a.script(connected).unwrap();

    let on_a = Running::start(a, Scene::settings("n1"), &scene.cluster);
    let on_b = Running::start(b, Scene::settings("n2"), &scene.cluster);
    on_a.view.feed().tell(news(true, OF_A, true));
    on_b.view.feed().tell(news(true, OF_B, true));
    let tunnel = overlay::name(ip("192.168.2.1"));
    let tunnel6 = overlay::name(ip("fd02::1"));
    until(a, "ip route show proto 70", PATIENCE, |said| {
        said.contains(&format!("10.244.2.0/24 dev {tunnel} "))
    });
    until(b, "ip route show proto 70", PATIENCE, |said| said.contains("10.244.1.0/24 dev tun-"));
    on_a.clean();
    on_b.clean();

    // The right ways, in both families.
    let v4 = a.script("ip route show proto 70").unwrap();
    for line in [
        format!("10.244.2.0/24 dev {tunnel} scope link src 192.168.1.1 metric 20000"),
        "10.244.3.0/24 via 192.168.1.3 dev eth0 metric 20000".to_owned(),
        "nexthop via 192.168.1.253 dev eth0 weight 1".to_owned(),
        "nexthop via 192.168.1.254 dev eth0 weight 1".to_owned(),
        "203.0.113.0/24 via 192.168.1.3 dev eth0 metric 20000".to_owned(),
    ] {
        assert!(v4.contains(&line), "{line} is missing in\n{v4}");
    }
    assert!(!v4.contains("192.168.1.0/24") && !v4.contains("10.244.9.0"), "{v4}");
    let v6 = a.script("ip -6 route show proto 70").unwrap();
    for line in [format!("fd10:2::/64 dev {tunnel6} "), "fd10:3::/64 via fd01::3 dev eth0 ".to_owned()] {
        assert!(v6.contains(&line), "{line} is missing in\n{v6}");
    }
    assert_eq!(v6.matches("via fd01::25").count(), 2, "{v6}");
    for way in ["via fd01::3 dev eth0 ".to_owned(), format!("via fe80::1 dev {tunnel6} ")] {
        assert!(v6.contains(&format!("nexthop {way}")), "{way} is missing in\n{v6}");
    }
    assert!(
        a.script("ip route get 203.0.113.9").unwrap().contains("via 192.168.1.254"),
        "the stranger's route is used"
    );
    assert_eq!(a.script("ip route show proto 17").unwrap(), "", "what kube-router left is gone");
    let table = a.script("ip route show table 77; ip -6 route show table 77; ip rule; ip -6 rule").unwrap();
    for part in [
        &format!("192.168.2.1 dev {tunnel} proto 70"),
        &format!("fd02::1 dev {tunnel6} proto 70"),
        "from 10.244.1.0/24 lookup 77",
        "from fd10:1::/64 lookup 77",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    let links = a.script("ip -d link").unwrap();
    for part in ["ipip remote 192.168.2.1 local 192.168.1.1", "mtu 1480", "mtu 1460", "kube-bridge: "] {
        assert!(links.contains(part), "{part} is missing in\n{links}");
    }
    let status = on_a.view.status(PATIENCE).unwrap();
    assert_eq!(status.mtu, Some(1460));
    assert_eq!(status.refused.len(), 2, "{status}");

    // Packets: from pods' networks on one node to those of the other.
    for (node, number) in [(a, 1), (b, 2)] {
        node.script(&format!(
            "ip addr add 10.244.{number}.1/24 dev kube-bridge; ip -6 addr add fd10:{number}::1/64 dev kube-bridge nodad"
        ))
        .unwrap();
    }
    for (from, to) in [("10.244.1.1", "10.244.2.1"), ("fd10:1::1", "fd10:2::1")] {
        let receiver = b.run(|| UdpSocket::bind((ip(to), 7000))).unwrap();
        let sender = a.run(|| UdpSocket::bind((ip(from), 0))).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // The router knows no pod network: only the tunnel brings it there, with its own source.
        sender.send_to(b"hello", (ip(to), 7000)).unwrap();
        let (_, source) = receiver.recv_from(&mut [0; 16]).unwrap();
        assert_eq!(source, sender.local_addr().unwrap());
    }
    // A prefix behind a gateway and a tunnel: of its addresses some are sent through the one, some the other.
    b.script("ip -6 route add local 2001:db8:77::/64 dev lo").unwrap();
    let receiver = b.run(|| UdpSocket::bind("[::]:7001")).unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let sender = a.run(|| UdpSocket::bind("[fd01::1]:0")).unwrap();
    let arrived = (1..=32)
        .filter(|host| {
            sender.send_to(b"hello", (ip(&format!("2001:db8:77::{host:x}")), 7001)).unwrap();
            receiver.recv_from(&mut [0; 16]).is_ok()
        })
        .count();
    assert!((1..32).contains(&arrived), "{arrived} of 32 came through the tunnel");
    b.script("ip -6 route del local 2001:db8:77::/64 dev lo").unwrap();
    let firewall = a.script("iptables-save; ip6tables-save; ipset list kube-router-pod-subnets").unwrap();
    for part in [
        "-A KUBE-ROUTER-EGRESS -m set ! --match-set kube-router-pod-subnets dst",
        "--match-set inet6:kube-router-node-ips dst",
        "-A KUBE-ROUTER-PODS -i kube-bridge",
        "-A KUBE-ROUTER-TUNNELS -p tcp",
        "10.244.3.0/24",
    ] {
        assert!(firewall.contains(part), "{part} is missing in\n{firewall}");
    }

    // Drift of each kind is repaired, and quickly.
    on_a.clean();
    for (spoil, look, right) in [
        ("ip route del 10.244.2.0/24", "ip route", format!("10.244.2.0/24 dev {tunnel} ")),
        ("ip route del 198.51.100.0/24", "ip route", "198.51.100.0/24 ".to_owned()),
        ("ip -6 route del fd10:3::/64", "ip -6 route", "fd10:3::/64 via fd01::3".to_owned()),
        ("ip rule del from 10.244.1.0/24 lookup 77", "ip rule", "from 10.244.1.0/24 lookup 77".to_owned()),
        (&format!("ip link del {tunnel}"), "ip route", format!("10.244.2.0/24 dev {tunnel} ")),
        (&format!("ip link set {tunnel6} down"), "ip -6 route", format!("fd10:2::/64 dev {tunnel6} ")),
        (
            &format!("ip link set {tunnel} type ipip local 192.168.1.1 remote 192.168.77.7"),
            "ip -d link show type ipip",
            "ipip remote 192.168.2.1 local".to_owned(),
        ),
        ("ip link set kube-bridge mtu 1200", "ip link show kube-bridge", "mtu 1460".to_owned()),
    ] as [(&str, &str, String); 8]
    {
        a.script(spoil).unwrap();
        let took = until(a, look, REPAIR, |said| said.contains(&right));
        println!("{spoil}: seen repaired after {took:?}");
    }
    on_a.clean();
    assert_eq!(a.script(connected).unwrap(), connected_before);

    // A withdrawn route goes, and the tunnel that only it needed.
    on_a.view.feed().tell(news(false, &[("10.244.2.0/24", &[])], false));
    until(a, "ip route show proto 70; ip link", PATIENCE, |said| {
        !said.contains("10.244.2.0/24") && !said.contains(&tunnel)
    });
    on_a.view.feed().tell(news(false, &OF_A[..1], false));
    until(a, "ip route show proto 70", PATIENCE, |said| said.contains("10.244.2.0/24"));
    on_a.clean();

    // Stopped, everything stays; started again with the same news, nothing is written. Link-local addresses
    // come when the kernel has found them to be nobody else's.
    on_a.stop();
    let everything = "(ip route show table all; ip -6 route show table all) | grep -v fe80::; ip rule; ip -6 rule; ip link; \
        ip -d link show type ipip; ip -d link show type ip6tnl; ipset list; iptables-save | grep KUBE";
    let kept = a.script(everything).unwrap();
    on_b.stop();
    let chain_writes = chains::writes();
    let again = Running::start(a, Scene::settings("n1"), &scene.cluster);
    again.clean();
    assert_eq!(again.view.writes(), [0, 0], "before the speaker told anything");
    again.view.feed().tell(news(true, OF_A, true));
    again.clean();
    let status = again.view.status(PATIENCE).unwrap();
    assert_eq!(again.view.writes(), [0, 0], "{status}");
    assert_eq!(chains::writes(), chain_writes);
    assert_eq!(a.script(everything).unwrap(), kept);

    // A speaker that starts anew and does not tell a route: it stays until all was heard.
    again.view.feed().tell(news(true, &OF_A[..4], false));
    again.clean();
    assert!(a.script("ip route show proto 70").unwrap().contains("198.51.100.0/24"));
    again.view.feed().tell(news(false, &[], true));
    until(a, "ip route show proto 70", PATIENCE, |said| !said.contains("198.51.100.0/24"));
    again.stop();

    // Cleaning up takes ours and leaves theirs; a bridge that is somebody's gateway is theirs.
    let told = a.run(|| network::cleanup(true));
    assert!(!told.removed.iter().any(|line| line.contains("kube-bridge")), "{told:?}");
    a.script("ip addr flush dev kube-bridge scope global; ip -6 addr flush dev kube-bridge scope global")
        .unwrap();
    let told = a.run(|| network::cleanup(true));
    let done = a.run(|| network::cleanup(false));
    assert_eq!(told.removed, done.removed);
    assert!(done.failures.is_empty(), "{:?}", done.failures);
    let left = a
        .script("ip route show table all proto 70; ip -6 route show table all proto 70; ip rule; ip -6 rule; ip link; \
             ipset list -n; iptables-save; ip6tables-save")
        .unwrap();
    for gone in
        ["proto 70", "10.244.", "fd10:", &tunnel, &tunnel6, "kube-router-", "KUBE-ROUTER", "kube-bridge"]
    {
        assert!(!left.contains(gone), "{gone} is left in\n{left}");
    }
    assert_eq!(a.script(strangers).unwrap(), before);
    assert_eq!(a.script(connected).unwrap(), connected_before);
    let nothing = a.run(|| network::cleanup(false));
    assert!(nothing.removed.is_empty() && nothing.failures.is_empty(), "{nothing:?}");
    drop(scene.router);
}

/// Whether this kernel wraps tunnels in UDP.
fn has_gue() -> bool {
    let probe = Netns::new("gue").unwrap();
    let tunnel = "ip link add probe type ipip local 192.0.2.1 remote 192.0.2.2 encap gue encap-sport auto encap-dport 5555";
    probe.script("ip fou add port 5555 gue").is_ok() && probe.script(tunnel).is_ok()
}

#[test]
fn tunnels_in_udp_carry_packets_or_the_missing_piece_is_named_and_all_else_goes_on() {
    let scene = Scene::new();
    let Scene { a, b, .. } = &scene;
    let gue = |node| Settings { encapsulation: Encapsulation::Gue(5555), ..Scene::settings(node) };
    let on_a = Running::start(a, gue("n1"), &scene.cluster);
    let on_b = Running::start(b, gue("n2"), &scene.cluster);
    on_a.view.feed().tell(news(true, &OF_A[..3], true));
    on_b.view.feed().tell(news(true, OF_B, true));
    until(a, "ip route", PATIENCE, |said| said.contains("10.244.3.0/24 via 192.168.1.3"));
    if has_gue() {
        println!("this kernel has GUE");
        until(a, "ip route", PATIENCE, |said| said.contains("10.244.2.0/24 dev tun-"));
        until(b, "ip route", PATIENCE, |said| said.contains("10.244.1.0/24 dev tun-"));
        a.script("ip addr add 10.244.1.1/24 dev kube-bridge").unwrap();
        b.script("ip addr add 10.244.2.1/24 dev kube-bridge").unwrap();
        let receiver = b.run(|| UdpSocket::bind((ip("10.244.2.1"), 7000))).unwrap();
        let sender = a.run(|| UdpSocket::bind((ip("10.244.1.1"), 0))).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        sender.send_to(b"hello", (ip("10.244.2.1"), 7000)).unwrap();
        receiver.recv_from(&mut [0; 16]).unwrap();
        let links = a.script("ip -d link show type ipip").unwrap();
        assert!(links.contains("encap gue") && links.contains("mtu 1468"), "{links}");
        // The other form, on the same tunnels.
        on_a.stop();
        let plain = Running::start(a, Scene::settings("n1"), &scene.cluster);
        plain.view.feed().tell(news(true, &OF_A[..3], true));
        until(a, "ip -d link show type ipip", PATIENCE, |said| {
            said.contains("mtu 1480") && !said.contains("encap gue")
        });
        plain.stop();
    } else {
        println!("this kernel has no GUE");
        let begun = Instant::now();
        loop {
            let status = on_a.view.status(PATIENCE).unwrap();
            if status.errors.iter().any(|error| error.contains("CONFIG_NET_FOU")) {
                assert!(
                    status.refused.iter().any(|line| line.contains("no tunnel to 192.168.2.1")),
                    "{status}"
                );
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{status}");
            std::thread::sleep(Duration::from_millis(20));
        }
        on_a.stop();
    }
    on_b.stop();
    let done = a.run(|| network::cleanup(false));
    assert!(done.failures.is_empty(), "{:?}", done.failures);
    let left = a.script("ip link; ip route show table all proto 70; ip rule").unwrap();
    assert!(!left.contains("tun-") && !left.contains("10.244.3"), "{left}");
}
