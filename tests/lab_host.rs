//! The host room on a real kernel: links, addresses, routes, sysctls, flows and events.
//!
//! Run it in the lab: `scripts/lab -- cargo test --test lab_host`, or the test binary itself. Needs
//! root and a kernel with dummy, veth and IPVS, and the programs ip, ipvsadm, iptables and modprobe; without
//! them it fails and says so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferroute::host::address::node_addresses;
use ferroute::host::conntrack::{Conntrack, FlowFilter, RemovedEndpoint};
use ferroute::host::events::{Event, Events, Interest};
use ferroute::host::kernel::{self, Presence};
use ferroute::host::release::Release;
use ferroute::host::route::{self, Route, RouteChange, RouteFilter, TABLE_LOCAL};
use ferroute::host::sysctl::{Outcome, Setting, Sysctls, Want, proxy_settings};
use ferroute::host::{Family, Network};
use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};

/// How long the kernel may take for what it does at once.
const SOON: Duration = Duration::from_secs(1);

/// Runs a program in the calling thread's namespaces; it must succeed.
fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("{line}: {error}; this test runs in scripts/lab"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace and the thread that lives in it.
struct Namespace {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// The namespace as `ip link set netns` takes it.
    path: String,
}

impl Namespace {
    fn new() -> Self {
        static MODULES: Once = Once::new();
        // Some kernels have them built in; what is really missing shows in the test that needs it.
        MODULES.call_once(|| {
            let _ = Command::new("modprobe")
                .args(["-a", "ipv6", "dummy", "veth", "bridge", "br_netfilter", "ip_vs", "ip_vs_rr"])
                .arg("nf_conntrack_netlink")
                .status();
        });
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces need root: run in scripts/lab");
            tell.send(format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid())).unwrap();
            inbox.into_iter().for_each(|job| job());
        });
        let path = told.recv().expect("network namespaces need root: run in scripts/lab");
        let namespace = Self { jobs: Some(jobs), thread: Some(thread), path };
        namespace.run(|| run("ip link set lo up"));
        namespace
    }

    /// Runs a closure inside; a panic there fails the test.
    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let job: Job = Box::new(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let _ = answer.send(result);
        });
        self.jobs.as_ref().unwrap().send(job).unwrap();
        answered.recv().unwrap().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs.take();
        let _ = self.thread.take().unwrap().join();
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// One family's addresses for the same scene.
#[derive(Clone, Copy)]
struct Scene {
    family: Family,
    range: &'static str,
    vip: &'static str,
    other_vip: &'static str,
    node: &'static str,
    second: &'static str,
    neighbour: [&'static str; 2],
    length: u8,
}

const SCENES: [Scene; 2] = [
    Scene {
        family: Family::V4,
        range: "10.96.0.0/12",
        vip: "10.96.0.10",
        other_vip: "10.96.0.11",
        node: "192.168.7.1",
        second: "192.168.7.5",
        neighbour: ["192.168.7.2", "192.168.7.3"],
        length: 24,
    },
    Scene {
        family: Family::V6,
        range: "fd00:10:96::/108",
        vip: "fd00:10:96::a",
        other_vip: "fd00:10:96::b",
        node: "fd00:7::1",
        second: "fd00:7::5",
        neighbour: ["fd00:7::2", "fd00:7::3"],
        length: 64,
    },
];

/// A node with a neighbour on a veth pair, both with the addresses of both scenes, and the dummy.
/// Returns the node's namespace, the neighbour's, and the index of the dummy.
fn node_and_neighbour() -> (Namespace, Namespace, u32) {
    let (node, neighbour) = (Namespace::new(), Namespace::new());
    let path = neighbour.path.clone();
    let dummy = node.run(move || {
        run("ip link add eth0 type veth peer name peer0");
        run(&format!("ip link set peer0 netns {path}"));
        let mut network = Network::open().unwrap();
        let eth0 = network.link("eth0").unwrap().unwrap().index;
        network.set_link_up(eth0).unwrap();
        for scene in SCENES {
            network.add_address(eth0, IpNet::new(ip(scene.node), scene.length).unwrap()).unwrap();
        }
        network.create_link("kube-dummy-if", "dummy").unwrap();
        network.link("kube-dummy-if").unwrap().unwrap().index
    });
    neighbour.run(|| {
        run("ip link set peer0 up");
        for scene in SCENES {
            let nodad = if scene.family == Family::V6 { "nodad" } else { "" };
            for address in scene.neighbour {
                run(&format!("ip address add {address}/{} dev peer0 {nodad}", scene.length));
            }
            run(&format!("ip route add {} via {}", scene.range, scene.node));
        }
    });
    (node, neighbour, dummy)
}

fn ours(family: Family) -> RouteFilter {
    RouteFilter { family: Some(family), protocol: Some(route::PROTOCOL), ..RouteFilter::default() }
}

fn apply(network: &mut Network, changes: &[RouteChange]) {
    let failures = network.apply_routes(changes).unwrap();
    assert!(failures.is_empty(), "{}", failures[0].error);
}

#[test]
fn a_dummy_link_is_made_found_and_deleted() {
    Namespace::new().run(|| {
        let mut network = Network::open().unwrap();
        assert_eq!(network.link("kube-dummy-if").unwrap(), None);
        let before = network.messages_sent();
        network.create_link("kube-dummy-if", "dummy").unwrap();
        assert_eq!(network.messages_sent() - before, 1);
        let link = network.link("kube-dummy-if").unwrap().unwrap();
        assert_eq!(link.kind.as_deref(), Some("dummy"));
        assert!(link.is_up());
        assert!(network.link("lo").unwrap().unwrap().is_loopback());

        let twice = network.create_link("kube-dummy-if", "dummy").unwrap_err();
        assert_eq!(twice.errno(), Some(nix::libc::EEXIST));
        let unknown = network.create_link("x", "no-such-kind").unwrap_err();
        assert_eq!(unknown.errno(), Some(nix::libc::EOPNOTSUPP));
        assert!(unknown.to_string().contains("modprobe"), "{unknown}");

        run("ip link set kube-dummy-if down");
        assert!(!network.link("kube-dummy-if").unwrap().unwrap().is_up());
        network.set_link_up(link.index).unwrap();
        assert!(network.link("kube-dummy-if").unwrap().unwrap().is_up());

        run("ip link add br0 type bridge");
        run("ip link set kube-dummy-if master br0");
        let bridge = network.link("br0").unwrap().unwrap();
        assert_eq!(bridge.kind.as_deref(), Some("bridge"));
        assert_eq!(network.link("kube-dummy-if").unwrap().unwrap().master, Some(bridge.index));

        network.delete_link(link.index).unwrap();
        assert_eq!(network.link("kube-dummy-if").unwrap(), None);
        assert_eq!(network.delete_link(link.index).unwrap_err().errno(), Some(nix::libc::ENODEV));
    });
}

#[test]
fn addresses_are_listed_added_and_deleted() {
    let (node, _neighbour, dummy) = node_and_neighbour();
    node.run(move || {
        let mut network = Network::open().unwrap();
        for address in ["10.96.0.1/32", "fd00:96::1/128"] {
            network.add_address(dummy, net(address)).unwrap();
        }
        let addresses = network.addresses().unwrap();
        let on_dummy: Vec<IpNet> = addresses.iter().filter(|a| a.link == dummy).map(|a| a.address).collect();
        assert!(on_dummy.contains(&net("10.96.0.1/32")) && on_dummy.contains(&net("fd00:96::1/128")));
        let listed = addresses.iter().find(|a| a.address == net("fd00:96::1/128")).unwrap();
        assert!(listed.is_usable(), "our IPv6 addresses skip duplicate address detection");

        let links = network.links().unwrap();
        let nodes = node_addresses(&links, &addresses);
        for scene in SCENES {
            assert!(nodes.contains(&ip(scene.node)), "{nodes:?}");
        }
        assert!(nodes.contains(&ip("127.0.0.1")) && nodes.contains(&ip("::1")));
        assert!(!nodes.contains(&ip("10.96.0.1")) && !nodes.contains(&ip("fd00:96::1")));

        for address in ["10.96.0.1/32", "fd00:96::1/128"] {
            network.delete_address(dummy, net(address)).unwrap();
            let gone = network.delete_address(dummy, net(address)).unwrap_err();
            assert_eq!(gone.errno(), Some(nix::libc::EADDRNOTAVAIL), "{gone}");
        }
    });
}

/// Connects to an echo of one byte, returns the client's address.
fn talk(to: SocketAddr) -> std::io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(stream.local_addr()?.ip())
}

#[test]
fn a_local_prefix_route_serves_the_node_and_its_neighbour() {
    let (node, neighbour, dummy) = node_and_neighbour();
    for scene in SCENES {
        let vip = ip(scene.vip);
        // The IPv6 wildcard takes IPv4 too, so each family has a port of its own.
        let port = if vip.is_ipv4() { 8080 } else { 8086 };
        node.run(move || {
            let wildcard = if vip.is_ipv4() { ip("0.0.0.0") } else { Ipv6Addr::UNSPECIFIED.into() };
            let listener = TcpListener::bind((wildcard, port)).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let mut byte = [0];
                    if stream.read_exact(&mut byte).is_ok() {
                        stream.write_all(&byte).unwrap();
                    }
                }
            });
        });
        let address = SocketAddr::new(vip, port);
        assert!(node.run(move || talk(address)).is_err(), "no route yet");
        node.run(move || {
            let mut network = Network::open().unwrap();
            let route = Route::local(net(scene.range), dummy, Some(ip(scene.node)));
            let before = network.messages_sent();
            apply(&mut network, &[RouteChange::Add(route)]);
            assert_eq!(network.messages_sent() - before, 1);
            assert_eq!(network.routes(ours(scene.family)).unwrap(), [route]);
            assert_eq!(network.messages_sent() - before, 2);
        });
        let from = node.run(move || talk(address)).expect("the node reaches the VIP");
        assert_eq!(from, ip(scene.node), "programs of the host speak from the node's address");
        let from = neighbour.run(move || talk(address)).expect("the neighbour reaches the VIP");
        assert!(scene.neighbour.contains(&from.to_string().as_str()));

        node.run(move || {
            let mut network = Network::open().unwrap();
            let route = network.routes(ours(scene.family)).unwrap()[0];
            apply(&mut network, &[RouteChange::Delete(route), RouteChange::Delete(route)]);
            assert_eq!(network.routes(ours(scene.family)).unwrap(), []);
        });
        assert!(node.run(move || talk(address)).is_err(), "the route is gone");
    }
}

#[test]
fn a_new_preferred_source_leaves_no_gap() {
    let (node, _neighbour, dummy) = node_and_neighbour();
    for scene in SCENES {
        node.run(move || {
            let mut network = Network::open().unwrap();
            let eth0 = network.link("eth0").unwrap().unwrap().index;
            network.add_address(eth0, IpNet::new(ip(scene.second), scene.length).unwrap()).unwrap();
            let before = Route::local(net(scene.range), dummy, Some(ip(scene.node)));
            apply(&mut network, &[RouteChange::Add(before)]);

            let mut events =
                Events::subscribe(Interest { links: false, addresses: false, routes: true, rules: false })
                    .unwrap();
            let done = Arc::new(AtomicBool::new(false));
            let prober = {
                let done = done.clone();
                // A thread made here lives in this namespace too. There is no default route: a
                // moment without the route is "network unreachable".
                std::thread::spawn(move || {
                    let mut probes = 0u32;
                    while !done.load(Ordering::Relaxed) {
                        let wildcard = if scene.family == Family::V4 { "0.0.0.0:0" } else { "[::]:0" };
                        let socket = UdpSocket::bind(wildcard).unwrap();
                        socket.connect((ip(scene.vip), 53)).expect("a gap");
                        let from = socket.local_addr().unwrap().ip();
                        assert!(from == ip(scene.node) || from == ip(scene.second), "{from}");
                        probes += 1;
                    }
                    probes
                })
            };
            let mut now = before;
            for round in 0..200 {
                let source = if round % 2 == 0 { scene.second } else { scene.node };
                let wanted = Route { source: Some(ip(source)), ..now };
                let changes = route::diff([&now], [&wanted]);
                assert_eq!(changes, [RouteChange::Replace(wanted)]);
                apply(&mut network, &changes);
                now = wanted;
                if round % 20 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(prober.join().unwrap() > 0);
            assert_eq!(network.routes(ours(scene.family)).unwrap(), [now]);

            // The kernel's own account: replaced each time, never removed.
            let (mut replaced, mut removed) = (0, 0);
            while events
                .wait(Some(Duration::ZERO), |event| match event {
                    Event::Route(route) if route.key == now.key => replaced += 1,
                    Event::RouteGone(route) if route.key == now.key => removed += 1,
                    _ => {}
                })
                .unwrap()
                > 0
            {}
            assert_eq!((replaced, removed), (200, 0));
        });
    }
}

#[test]
fn routes_of_strangers_stay() {
    let (node, _neighbour, dummy) = node_and_neighbour();
    node.run(move || {
        let mut network = Network::open().unwrap();
        for scene in SCENES {
            let flag = if scene.family == Family::V6 { "-6" } else { "-4" };
            // One beside ours, one over another link, one that took our key before us.
            let host = if scene.family == Family::V6 { 128 } else { 32 };
            run(&format!(
                "ip {flag} route add local {} dev kube-dummy-if table local proto 99 metric 5",
                scene.range
            ));
            run(&format!(
                "ip {flag} route add local {} dev lo table local proto static metric 9",
                scene.range
            ));
            run(&format!(
                "ip {flag} route add local {}/{host} dev lo table local proto static metric {}",
                scene.other_vip,
                route::METRIC
            ));
            let whole = RouteFilter { family: Some(scene.family), ..RouteFilter::default() };
            let sorted = |mut routes: Vec<Route>| {
                routes.sort_unstable();
                routes
            };
            let strangers = sorted(network.routes(whole).unwrap());
            assert!(strangers.iter().all(|route| route.protocol != route::PROTOCOL) && strangers.len() >= 3);

            let range = Route::local(net(scene.range), dummy, Some(ip(scene.node)));
            let single = Route::local(IpNet::from(ip(scene.vip)), dummy, Some(ip(scene.node)));
            let taken = Route::local(IpNet::from(ip(scene.other_vip)), dummy, Some(ip(scene.node)));
            let desired = [range, single, taken];
            let changes = route::diff(&network.routes(ours(scene.family)).unwrap(), &desired);
            assert_eq!(changes.len(), 3);
            let failures = network.apply_routes(&changes).unwrap();
            assert_eq!(failures.len(), 1, "only the taken key fails, the rest of the batch is applied");
            assert_eq!((failures[0].change, failures[0].error.errno()), (2, Some(nix::libc::EEXIST)));
            assert!(failures[0].error.to_string().contains(scene.other_vip), "{}", failures[0].error);

            // Filters, as far as the kernel has them and beyond.
            let find = |network: &mut Network, filter| sorted(network.routes(filter).unwrap());
            assert_eq!(find(&mut network, ours(scene.family)), sorted(vec![range, single]));
            let on_dummy = RouteFilter { device: Some(dummy), table: Some(TABLE_LOCAL), ..whole };
            let found = find(&mut network, on_dummy);
            assert!(found.contains(&range) && found.contains(&single));
            assert!(found.iter().any(|route| route.protocol == 99));
            assert!(found.iter().all(|route| route.device == Some(dummy) && route.key.table == TABLE_LOCAL));
            assert_eq!(find(&mut network, RouteFilter { table: Some(77), ..whole }), []);
            assert_eq!(find(&mut network, RouteFilter { device: Some(9999), ..whole }), []);

            // Everything of ours goes, and even deletions of what we never had touch no stranger.
            let actual = network.routes(ours(scene.family)).unwrap();
            let changes = route::diff(&actual, []);
            assert_eq!(changes.len(), 2);
            apply(&mut network, &changes);
            apply(&mut network, &[RouteChange::Delete(taken), RouteChange::Delete(range)]);
            assert_eq!(sorted(network.routes(whole).unwrap()), strangers);
        }
    });
}

#[test]
fn a_route_with_an_unusable_source_names_the_cure() {
    let (node, _neighbour, dummy) = node_and_neighbour();
    node.run(move || {
        let mut network = Network::open().unwrap();
        for scene in SCENES {
            let elsewhere = Route::local(net(scene.range), dummy, Some(ip(scene.neighbour[0])));
            let failures = network.apply_routes(&[RouteChange::Add(elsewhere)]).unwrap();
            let text = failures[0].error.to_string();
            assert_eq!(failures[0].error.errno(), Some(nix::libc::EINVAL), "{text}");
            assert!(text.contains("must be an address of this node") && text.contains(scene.range), "{text}");
        }
    });
}

#[test]
fn ten_thousand_routes_take_one_message_each() {
    let (node, _neighbour, dummy) = node_and_neighbour();
    node.run(move || {
        let mut network = Network::open().unwrap();
        for scene in SCENES {
            let desired: Vec<Route> = (0u32..10_000)
                .map(|n| {
                    let address = match net(scene.range).network() {
                        IpAddr::V4(base) => IpAddr::from((u32::from(base) + n).to_be_bytes()),
                        IpAddr::V6(base) => IpAddr::from((u128::from(base) + u128::from(n)).to_be_bytes()),
                    };
                    Route::local(IpNet::from(address), dummy, Some(ip(scene.node)))
                })
                .collect();
            let before = network.messages_sent();
            let begun = Instant::now();
            apply(&mut network, &route::diff([], &desired));
            let added = begun.elapsed();
            assert_eq!(network.messages_sent() - before, 10_000);
            let begun = Instant::now();
            let mut actual = network.routes(ours(scene.family)).unwrap();
            let listed = begun.elapsed();
            assert_eq!(route::diff(&actual, &desired), []);
            assert_eq!(network.messages_sent() - before, 10_001);
            actual.truncate(9_999);
            assert_eq!(route::diff(&actual, &desired).len(), 1);
            println!("{:?}: 10,000 routes added in {added:?}, listed in {listed:?}", scene.family);
        }
    });
}

#[test]
fn sysctls_are_written_only_when_they_differ() {
    let (node, _neighbour, _dummy) = node_and_neighbour();
    node.run(|| {
        run("ip link add kube-bridge type bridge");
        let sysctls = Sysctls::of_host();
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/rp_filter", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/kube-dummy-if/rp_filter", "0").unwrap();
        let release = Release::running().unwrap();
        let settings = proxy_settings(release, &["kube-bridge", "kube-dummy-if", "eth0"]);
        let first = sysctls.apply_all(&settings);
        for applied in &first {
            assert!(applied.is_right(), "{applied}");
        }
        let outcome = |key: &str| &first.iter().find(|a| a.setting.key == key).unwrap().outcome;
        let written = |from: &str| Outcome::Written { from: from.to_owned() };
        assert_eq!(*outcome("net/ipv4/conf/eth0/rp_filter"), written("1"));
        assert_eq!(*outcome("net/ipv4/conf/kube-dummy-if/rp_filter"), Outcome::AlreadyRight);
        assert_eq!(*outcome("net/ipv4/conf/all/arp_announce"), written("0"));
        assert_eq!(*outcome("net/ipv4/vs/conntrack"), written("0"));
        for applied in sysctls.apply_all(&settings) {
            assert_eq!(applied.outcome, Outcome::AlreadyRight, "{applied}");
        }
        let gone = Setting {
            key: "net/ipv4/conf/eth7/rp_filter".to_owned(),
            want: Want::Instead { of: 1, is: 2 },
            reason: "r",
        };
        assert_eq!(sysctls.apply(&gone).outcome, Outcome::Missing);
    });
    // Another namespace has its own values.
    Namespace::new().run(|| {
        assert_eq!(Sysctls::of_host().read("net/ipv4/vs/conntrack").unwrap().as_deref(), Some("0"));
        // In a container without privileges /proc/sys is mounted read-only.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        run("mount --make-rprivate /");
        run("mount --bind /proc/sys /proc/sys");
        run("mount -o remount,ro,bind /proc/sys");
        let setting = Setting {
            key: "net/ipv4/vs/conntrack".to_owned(),
            want: Want::Exactly(1),
            reason: "flows matter",
        };
        let applied = Sysctls::of_host().apply(&setting);
        let refused = Outcome::Refused { errno: nix::libc::EROFS, value: Some("0".to_owned()) };
        assert_eq!(applied.outcome, refused);
        assert!(applied.to_string().contains("flows matter; set it on the host"), "{applied}");
    });
}

#[test]
fn this_kernel_has_what_the_proxy_needs() {
    // In the namespace of the process: modules are loaded for it.
    let findings = kernel::inspect();
    for name in ["IPVS", "ipset", "dummy links", "conntrack netlink", "bridge netfilter", "IPVS scheduler rr"]
    {
        let finding = findings.iter().find(|finding| finding.name == name).unwrap();
        assert_eq!(finding.present, Presence::Present, "{finding}");
    }
    assert!(findings.iter().all(|finding| finding.present != Presence::Unknown), "{findings:?}");
}

/// Answers every datagram with its first byte raised by one, until the namespace ends.
fn serve_udp(at: SocketAddr) {
    let socket = UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if length > 0 && buffer[0] == b'q' {
                return;
            }
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// Sends one datagram and waits for its answer.
fn ask(socket: &UdpSocket, to: SocketAddr) -> std::io::Result<()> {
    socket.set_read_timeout(Some(SOON))?;
    socket.send_to(b"a", to)?;
    socket.recv_from(&mut [0; 16]).map(|_| ())
}

#[test]
fn only_flows_to_the_removed_endpoint_vanish() {
    let (node, neighbour, dummy) = node_and_neighbour();
    for scene in SCENES {
        let endpoints = scene.neighbour.map(|address| SocketAddr::new(ip(address), 5353));
        neighbour.run(move || endpoints.into_iter().for_each(serve_udp));
        node.run(move || {
            let vip = SocketAddr::new(ip(scene.vip), 53);
            let mut network = Network::open().unwrap();
            let route = Route::local(IpNet::from(vip.ip()), dummy, Some(ip(scene.node)));
            apply(&mut network, &[RouteChange::Add(route)]);
            // A namespace tracks flows once something asks for them, as the masquerade rule of a
            // node does.
            let iptables = if scene.family == Family::V4 { "iptables" } else { "ip6tables" };
            run(&format!("{iptables} -A INPUT -m conntrack --ctstate INVALID"));
            for key in ["conntrack", "expire_nodest_conn"] {
                std::fs::write(format!("/proc/sys/net/ipv4/vs/{key}"), "1").unwrap();
            }
            let mut conntrack = Conntrack::open().unwrap();
            let wildcard = if scene.family == Family::V4 { "0.0.0.0:0" } else { "[::]:0" };
            let socket = || UdpSocket::bind(wildcard).unwrap();
            let to_vip = FlowFilter { destination: Some(vip.ip()), ..FlowFilter::all(scene.family) };

            // A client that asked before there was an endpoint.
            let early = socket();
            assert_eq!(ask(&early, vip).unwrap_err().kind(), ErrorKind::WouldBlock);
            let waiting = conntrack.flows(to_vip, |_| true).unwrap();
            assert_eq!(waiting.len(), 1);
            assert_eq!(waiting[0].reply.source, vip, "never translated");

            run(&format!("ipvsadm -A -u {vip} -s rr"));
            for endpoint in endpoints {
                run(&format!("ipvsadm -a -u {vip} -r {endpoint} -m"));
            }
            // Bystanders: straight to an endpoint, and to another port of the VIP.
            let straight = socket();
            ask(&straight, endpoints[0]).unwrap();
            let other = socket();
            let _ = other.send_to(b"a", SocketAddr::new(vip.ip(), 54));
            for _ in 0..20 {
                let _ = socket().send_to(b"a", SocketAddr::new(ip(scene.node), 9));
            }

            let deleted = conntrack.delete_stale_udp(&[], &[vip]).unwrap();
            assert_eq!((deleted.deleted, deleted.gone, deleted.failures.len()), (1, 0, 0));
            assert_eq!(deleted.examined, 1, "the kernel filters by address and port");
            ask(&early, vip).expect("served once its old flow is gone");

            let clients = [socket(), socket()];
            clients.iter().for_each(|client| ask(client, vip).unwrap());
            let port = |flow: &ferroute::host::conntrack::Flow| flow.original.source.port();
            let is_client = |flow: &ferroute::host::conntrack::Flow| {
                clients.iter().any(|client| client.local_addr().unwrap().port() == port(flow))
            };
            let flows = conntrack.flows(to_vip, is_client).unwrap();
            let mut answered: Vec<SocketAddr> = flows.iter().map(|flow| flow.reply.source).collect();
            answered.sort_unstable();
            assert_eq!(answered, endpoints, "round robin gave one flow to each endpoint");

            // One endpoint goes.
            run(&format!("ipvsadm -d -u {vip} -r {}", endpoints[0]));
            let removed = [RemovedEndpoint { virtual_server: vip, endpoint: endpoints[0] }];
            let all = FlowFilter::all(scene.family);
            let before = conntrack.flows(all, |_| true).unwrap();
            let sent = conntrack.messages_sent();
            let deleted = conntrack.delete_stale_udp(&removed, &[]).unwrap();
            let stale: Vec<_> = before
                .iter()
                .filter(|flow| flow.original.destination == vip && flow.reply.source == endpoints[0])
                .copied()
                .collect();
            assert!(!stale.is_empty());
            assert_eq!(deleted.deleted, stale.len());
            assert_eq!(
                conntrack.messages_sent() - sent,
                1 + stale.len() as u64,
                "one dump, one deletion each"
            );
            let mut left = conntrack.flows(all, |_| true).unwrap();
            let mut wanted: Vec<_> = before.iter().filter(|flow| !stale.contains(flow)).copied().collect();
            left.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(left, wanted, "all others stay, with their numbers");
            // What ended by itself in between is no error.
            let again = conntrack.delete(&stale).unwrap();
            assert_eq!((again.deleted, again.gone, again.failures.len()), (0, stale.len(), 0));
            clients.iter().for_each(|client| ask(client, vip).unwrap());
            let flows = conntrack.flows(to_vip, is_client).unwrap();
            assert!(flows.len() == 2 && flows.iter().all(|flow| flow.reply.source == endpoints[1]));
        });
    }
}

#[test]
fn changes_are_heard_of_at_once() {
    let (node, _neighbour, dummy) = node_and_neighbour();
    node.run(move || {
        let (tell, told) = mpsc::channel();
        let watching = Events::subscribe(Interest::ALL)
            .unwrap()
            .spawn(move |event| tell.send(event).unwrap(), |error| panic!("{error}"))
            .unwrap();
        let hear = |wanted: &dyn Fn(&Event) -> bool| {
            let deadline = Instant::now() + SOON;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if wanted(&told.recv_timeout(left).expect("an event within a second")) {
                    return;
                }
            }
        };
        for (text, flag) in [("192.168.7.9/24", "-4"), ("fd00:7::9/64", "-6")] {
            let address = net(text);
            run(&format!("ip address add {text} dev eth0"));
            hear(&|event| matches!(event, Event::Address(found) if found.address == address));
            run(&format!("ip address del {text} dev eth0"));
            hear(&|event| matches!(event, Event::AddressGone(found) if found.address == address));

            let range = if flag == "-4" { "10.96.0.0/12" } else { "fd00:10:96::/108" };
            let route = Route::local(net(range), dummy, None);
            apply(&mut Network::open().unwrap(), &[RouteChange::Add(route)]);
            hear(&|event| *event == Event::Route(route));
            run(&format!("ip {flag} route flush table local proto {}", route::PROTOCOL));
            hear(&|event| *event == Event::RouteGone(route));
        }
        run("ip link set kube-dummy-if down");
        hear(&|event| matches!(event, Event::Link(link) if link.index == dummy && !link.is_up()));
        run("ip link del kube-dummy-if");
        hear(&|event| matches!(event, Event::LinkGone(link) if link.name == "kube-dummy-if"));
        let begun = Instant::now();
        drop(watching);
        assert!(begun.elapsed() < SOON, "dropping the handle ends the thread");
        assert!(told.try_iter().count() < 100 && told.recv().is_err(), "and its callback with it");

        // Nothing happens any more (IPv6 settles by timers): the wait ends when it should.
        let mut events = Events::subscribe(Interest::ALL).unwrap();
        let settling = Instant::now();
        let waited = loop {
            let begun = Instant::now();
            if events.wait(Some(Duration::from_millis(50)), |_| {}).unwrap() == 0 {
                break begun.elapsed();
            }
            assert!(settling.elapsed() < SOON * 5, "events without end");
        };
        assert!(waited >= Duration::from_millis(50));

        // More than the socket holds: said, and the subscription goes on.
        let mut network = Network::open().unwrap();
        network.create_link("flood-dummy", "dummy").unwrap();
        let flood = network.link("flood-dummy").unwrap().unwrap().index;
        let routes: Vec<Route> = (0u32..40_000)
            .map(|n| Route::local(IpNet::from(IpAddr::from((0x0a00_0000 + n).to_be_bytes())), flood, None))
            .collect();
        apply(&mut network, &route::diff([], &routes));
        let mut overruns = 0;
        let mut last = None;
        while events
            .wait(Some(Duration::from_millis(20)), |event| match event {
                Event::Overrun => overruns += 1,
                event => last = Some(event),
            })
            .unwrap()
            > 0
        {}
        assert_eq!(overruns, 1);
        let farewell = routes[0];
        apply(&mut network, &[RouteChange::Delete(farewell)]);
        events.wait(Some(SOON), |event| last = Some(event)).unwrap();
        assert_eq!(last, Some(Event::RouteGone(farewell)));
    });
}
