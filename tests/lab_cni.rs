//! Policy before the first packet: pods that send from their first microsecond, started through the
//! CNI step and without it, while policies and labels change.
//!
//! Run it through `scripts/lab`; elsewhere it fails and says what the kernel lacks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferroute_apiserver::Kubelet as Runs;
use ferroute_kit::assert::eventually;
use ferroute_kit::{Cluster, Daemon, Netns, Node, Pod, PodSpec, serial};
use lab::*;
use serde_json::{Value, json};

/// Targets listen for datagrams here, test pods there.
const SINK: u16 = 9000;
const DOOR: u16 = 9001;
/// Datagrams sent as soon as the pod may run.
const FIRST: usize = 10;
const NAMESPACE: &str = "default";
/// The lab's kernel has one processor, and a test machine others to serve: waiting is no failure here.
const READY: Duration = Duration::from_secs(240);
const PATIENT: &str = ",\"timeout\":\"60s\"";

/// Counts datagrams by the word they begin with, and sends them back.
struct Sink {
    seen: Arc<Mutex<HashMap<String, usize>>>,
    stop: Arc<AtomicBool>,
}

impl Sink {
    fn open(netns: &Netns, ips: &[IpAddr]) -> Self {
        let (seen, stop): (Arc<Mutex<HashMap<String, usize>>>, Arc<AtomicBool>) = Default::default();
        let at: Vec<SocketAddr> = ips.iter().map(|ip| SocketAddr::new(*ip, SINK)).collect();
        for at in at {
            let socket = netns.run(|| UdpSocket::bind(at)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let (seen, stop) = (seen.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut datagram = [0; 128];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut datagram) else { continue };
                    let text = String::from_utf8_lossy(&datagram[..length]).into_owned();
                    let word = text.split(' ').next().unwrap().to_owned();
                    *seen.lock().unwrap().entry(word).or_default() += 1;
                    let _ = socket.send_to(&datagram[..length], from);
                }
            });
        }
        Self { seen, stop }
    }

    fn count(&self, word: &str) -> usize {
        self.seen.lock().unwrap().get(word).copied().unwrap_or_default()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A pod that everybody talks to and that may talk to everybody but by the policies of the others.
struct Target {
    pod: Pod,
    sink: Sink,
}

/// What a test pod may do, told by its label `role`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    /// From and to the first target only.
    A,
    /// From and to the second target only.
    B,
    /// Not isolated.
    Free,
}

impl Role {
    fn of(number: usize) -> Self {
        [Role::A, Role::B, Role::Free][number % 3]
    }

    fn label(self) -> &'static str {
        match self {
            Role::A => "a",
            Role::B => "b",
            Role::Free => "free",
        }
    }

    fn allows(self, target: usize) -> bool {
        match self {
            Role::A => target == 0,
            Role::B => target == 1,
            Role::Free => true,
        }
    }
}

fn policy(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec,
    })
}

/// Pods with label `role` may exchange with pods of the same `takes` and with nobody else.
fn role_policy(role: &str) -> Value {
    let peer = json!([{"podSelector": {"matchLabels": {"takes": role}}}]);
    policy(
        &format!("role-{role}"),
        json!({
            "podSelector": {"matchLabels": {"role": role}}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peer}], "egress": [{"to": peer}],
        }),
    )
}

/// The uid is chosen here: the runtime knows it before the watch does.
fn pod_object(name: &str, node: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "labels": labels, "uid": uid(name),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
    })
}

fn running(ips: &[IpAddr], node: &Node) -> Value {
    let list = |ips: &[IpAddr]| ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
    json!({
        "phase": "Running", "podIP": ips[0], "podIPs": list(ips),
        "hostIP": node.ips[0], "hostIPs": list(&node.ips),
    })
}

fn uid(name: &str) -> String {
    format!("uid-{name}")
}

/// Two nodes, the first with a firewall, a target on each, the policies of the roles.
struct Stage {
    lab: Lab,
    targets: Vec<Target>,
}

impl Stage {
    fn set(flags: &[&str]) -> Self {
        let mut lab = Lab::without_daemons_by(Cluster::builder().nodes(2), |b| b.kubelet(Runs::External));
        let mut targets = Vec::new();
        for (number, takes) in [(1, "a"), (2, "b")] {
            let node = lab.node(number);
            let name = format!("target-{takes}");
            let object = pod_object(&name, &node.name, json!({"takes": takes}));
            lab.server.insert_unchecked("pods", object).unwrap();
            let pod = node.start_pod(PodSpec::new(&name).ports(POD_PORTS)).unwrap();
            lab.server
                .patch_status("pods", NAMESPACE, &name, json!({"status": running(&pod.ips, node)}))
                .unwrap();
            lab.server.apply_object(role_policy(takes)).unwrap();
            let sink = Sink::open(pod.netns(), &pod.ips);
            targets.push(Target { pod, sink });
        }
        // Only node 1 starts pods; the other is where the second target lives.
        let (master, socket) = (
            format!("--master={}", lab.server.url()),
            format!("--admin-socket={}", lab.admin_socket(lab.node(1))),
        );
        let mut all = vec![
            &*master,
            &*socket,
            "--metrics-port=9090",
            "--run-firewall=true",
            "--run-service-proxy=false",
        ];
        all.extend(flags);
        let mut daemon = Daemon::ferroute(lab.node(1), PROGRAM, &all).unwrap();
        daemon.wait_ready(READY).unwrap();
        lab.daemons.push(daemon);
        Self { lab, targets }
    }

    /// Runs the plugin for a pod of node 1. `extra` goes into the configuration.
    fn call(&self, command: &str, name: &str, container: &str, ips: &[IpAddr], extra: &str) -> Output {
        let socket = self.lab.cni_socket(self.lab.node(1));
        let ips: Vec<String> = ips
            .iter()
            .map(|ip| {
                format!("{{\"address\":\"{ip}/{}\",\"interface\":0}}", if ip.is_ipv4() { 24 } else { 64 })
            })
            .collect();
        let configuration = format!(
            "{{\"cniVersion\":\"1.0.0\",\"name\":\"mynet\",\"type\":\"ferroute-cni\",\"socket\":\"{socket}\"{extra},\
             \"prevResult\":{{\"cniVersion\":\"1.0.0\",\"interfaces\":[{{\"name\":\"eth0\",\"sandbox\":\"/x\"}}],\"ips\":[{}]}}}}",
            ips.join(",")
        );
        let mut child = Command::new(PROGRAM)
            .arg("cni")
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", format!("/var/run/netns/{container}"))
            .env("CNI_IFNAME", "eth0")
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID={}",
                    uid(name)
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(configuration.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }
}

/// Sends to or from a pod until dropped: whoever wants to slip through.
struct Hostile {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<usize>>,
}

impl Hostile {
    fn start(routes: Vec<(UdpSocket, SocketAddr)>, word: String) -> Self {
        let stop: Arc<AtomicBool> = Arc::default();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                for (socket, to) in &routes {
                    sent += usize::from(socket.send_to(word.as_bytes(), to).is_ok());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        Self { stop, thread: Some(thread) }
    }

    fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// What was seen of all pods.
#[derive(Debug, Default)]
struct Seen {
    starts: AtomicUsize,
    /// Datagrams that somebody sent where policy forbids it.
    tried: AtomicUsize,
    /// Of these, how many arrived.
    leaked: AtomicUsize,
    /// Allowed ones sent after the step returned 0.
    allowed: AtomicUsize,
    /// Of these, how many were not answered.
    refused: AtomicUsize,
    /// Words for the first few of both.
    notes: Mutex<Vec<String>>,
    steps: Mutex<Vec<Duration>>,
}

impl Seen {
    fn note(&self, text: String) {
        let mut notes = self.notes.lock().unwrap();
        if notes.len() < 20 {
            notes.push(text);
        }
    }

    fn add(counter: &AtomicUsize, more: usize) {
        counter.fetch_add(more, Ordering::Relaxed);
    }

    fn get(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::Relaxed)
    }
}

fn like(ips: &[IpAddr], ipv4: bool) -> IpAddr {
    *ips.iter().find(|ip| ip.is_ipv4() == ipv4).unwrap()
}

fn any(ipv4: bool) -> SocketAddr {
    SocketAddr::new(if ipv4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) }, 0)
}

/// A started pod with its sockets.
struct Started {
    pod: Pod,
    name: String,
    container: String,
    role: Role,
    doors: Vec<UdpSocket>,
}

impl Stage {
    /// One pod from its object to its first packets. `late` holds the object back from the API server
    /// until the step is waiting for it.
    fn start_pod(&self, seen: &Seen, name: &str, role: Role, late: bool) -> Started {
        let node = self.lab.node(1);
        let object = pod_object(name, &node.name, json!({"role": role.label(), "v": "0"}));
        let create = || self.lab.server.insert_unchecked("pods", object.clone()).unwrap();
        if !late {
            create();
        }
        let container = format!("c-{name}");
        let (mut doors, mut outs, mut hostile) = (Vec::new(), Vec::new(), None);
        let pod = node
            .start_pod_after(PodSpec::new(name).ports([]), |pod| {
                for ipv4 in [true, false] {
                    let ip = like(&pod.ips, ipv4);
                    doors.push(pod.netns().run(|| UdpSocket::bind(SocketAddr::new(ip, DOOR))).unwrap());
                    outs.push(pod.netns().run(|| UdpSocket::bind(SocketAddr::new(ip, 0))).unwrap());
                }
                hostile = Some(self.hostile(pod, name, role, &outs));
                std::thread::sleep(Duration::from_millis(3));
                let begun = Instant::now();
                let output = std::thread::scope(|scope| {
                    if late {
                        scope.spawn(|| {
                            std::thread::sleep(Duration::from_millis(150));
                            create();
                        });
                    }
                    self.call("ADD", name, &container, &pod.ips, PATIENT)
                });
                seen.steps.lock().unwrap().push(begun.elapsed());
                assert!(output.status.success(), "ADD {name}: {output:?}");
                Ok(())
            })
            .unwrap();
        // From here on the pod runs.
        self.first_packets(seen, name, role, &pod, &outs, &doors);
        let tried = hostile.take().unwrap().stop();
        Seen::add(&seen.tried, tried);
        self.lab
            .server
            .patch_status("pods", NAMESPACE, name, json!({"status": running(&pod.ips, node)}))
            .unwrap();
        Seen::add(&seen.starts, 1);
        Started { pod, name: name.to_owned(), container, role, doors }
    }

    /// From the pod to where it may not, and from there to the pod.
    fn hostile(&self, pod: &Pod, name: &str, role: Role, outs: &[UdpSocket]) -> Hostile {
        let mut routes = Vec::new();
        for (_, target) in self.targets.iter().enumerate().filter(|(number, _)| !role.allows(*number)) {
            for (out, ipv4) in outs.iter().zip([true, false]) {
                routes.push((out.try_clone().unwrap(), SocketAddr::new(like(&target.pod.ips, ipv4), SINK)));
                let from = target.pod.netns().run(|| UdpSocket::bind(any(ipv4))).unwrap();
                routes.push((from, SocketAddr::new(like(&pod.ips, ipv4), DOOR)));
            }
        }
        Hostile::start(routes, format!("{name} hostile"))
    }

    /// What the pod is allowed works with its first packets, both ways and by TCP.
    fn first_packets(
        &self,
        seen: &Seen,
        name: &str,
        role: Role,
        pod: &Pod,
        outs: &[UdpSocket],
        doors: &[UdpSocket],
    ) {
        let patience = Duration::from_secs(10);
        for (number, target) in self.targets.iter().enumerate() {
            for (index, ipv4) in [true, false].into_iter().enumerate() {
                let at = SocketAddr::new(like(&target.pod.ips, ipv4), SINK);
                let tcp = SocketAddr::new(at.ip(), 8080);
                if !role.allows(number) {
                    let connected =
                        pod.netns().run(|| TcpStream::connect_timeout(&tcp, Duration::from_millis(50)));
                    Seen::add(&seen.tried, 1);
                    if connected.is_ok() {
                        Seen::add(&seen.leaked, 1);
                        seen.note(format!("{name} ({role:?}) connected to {tcp}"));
                    }
                    continue;
                }
                // A burst at once, then the answers.
                for count in 0..FIRST {
                    outs[index].send_to(format!("{name} first {count}").as_bytes(), at).unwrap();
                }
                let answers =
                    receive(&outs[index], FIRST, patience, |text| text.starts_with(&format!("{name} first")));
                let from = target.pod.netns().run(|| UdpSocket::bind(any(ipv4))).unwrap();
                let door = SocketAddr::new(like(&pod.ips, ipv4), DOOR);
                for count in 0..FIRST {
                    from.send_to(format!("target{number} {count}").as_bytes(), door).unwrap();
                }
                let word = format!("target{number} ");
                let arrivals = receive(&doors[index], FIRST, patience, |text| {
                    if text.contains("hostile") {
                        Seen::add(&seen.leaked, 1);
                        seen.note(format!("{text} reached it ({role:?})"));
                    }
                    text.starts_with(&word)
                });
                let connected = pod.netns().run(|| TcpStream::connect_timeout(&tcp, patience));
                Seen::add(&seen.allowed, 2 * FIRST + 1);
                let missing = (FIRST - answers) + (FIRST - arrivals) + usize::from(connected.is_err());
                if missing > 0 {
                    Seen::add(&seen.refused, missing);
                    seen.note(format!(
                        "{name} ({role:?}) and {at}: {answers} answers, {arrivals} arrivals, {connected:?}"
                    ));
                }
            }
        }
    }

    /// The pod's end, as the kubelet has it: DEL, the namespace goes, then the object. Before, what
    /// slipped through is counted.
    fn end_pod(&self, seen: &Seen, started: Started) {
        let name = self.end_network(seen, started);
        self.lab.server.delete_now("pods", NAMESPACE, &name).unwrap();
    }

    /// The same but for the object, which stays; its name.
    fn end_network(&self, seen: &Seen, started: Started) -> String {
        let Started { pod, name, container, role, doors } = started;
        for (number, target) in self.targets.iter().enumerate().filter(|(number, _)| !role.allows(*number)) {
            let leaked = target.sink.count(&name);
            if leaked > 0 {
                Seen::add(&seen.leaked, leaked);
                seen.note(format!("{leaked} datagrams of {name} ({role:?}) reached target {number}"));
            }
        }
        for door in &doors {
            let leaked = receive(door, usize::MAX, Duration::from_millis(1), |text| text.contains("hostile"));
            if leaked > 0 {
                Seen::add(&seen.leaked, leaked);
                seen.note(format!("{leaked} datagrams reached {name} ({role:?})"));
            }
        }
        let output = self.call("DEL", &name, &container, &pod.ips, "");
        assert!(output.status.success(), "DEL {name}: {output:?}");
        drop((doors, pod));
        name
    }
}

/// Datagrams that meet this, until so many came or time is over.
fn receive(socket: &UdpSocket, most: usize, patience: Duration, meets: impl Fn(&str) -> bool) -> usize {
    let deadline = Instant::now() + patience;
    let (mut count, mut datagram) = (0, [0; 128]);
    while count < most {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left)).unwrap();
        match socket.recv_from(&mut datagram) {
            Ok((length, _)) => count += usize::from(meets(&String::from_utf8_lossy(&datagram[..length]))),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            // What an earlier refusal left in the socket.
            Err(_) => {}
        }
    }
    count
}

/// Policies and labels that change all the time, none of which changes what a role means: policies
/// only add peers that nobody is, and select pods that are isolated anyway.
fn churn(stage: &Stage, names: &Mutex<VecDeque<String>>, stop: &AtomicBool) -> usize {
    let server = &stage.lab.server;
    let mut turn = 0_usize;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let name = format!("extra-{}", turn % 7);
        match turn % 4 {
            0 => drop(server.delete_now("networkpolicies", NAMESPACE, &name)),
            1 | 2 => {
                let nobody = json!([{"podSelector": {"matchLabels": {"nobody": (turn % 5).to_string()}}}]);
                let ports = json!([{"protocol": "TCP", "port": 1000 + turn % 50}]);
                let spec = json!({
                    "podSelector": {"matchExpressions": [
                        {"key": "role", "operator": "In", "values": ["a", "b"]},
                        {"key": "v", "operator": if turn.is_multiple_of(3) { "In" } else { "NotIn" }, "values": [(turn % 3).to_string()]},
                    ]},
                    "policyTypes": ["Ingress", "Egress"],
                    "ingress": [{"from": nobody, "ports": ports}], "egress": [{"to": nobody, "ports": ports}],
                });
                server.apply_object(policy(&name, spec)).unwrap();
            }
            _ => {
                let pod = names.lock().unwrap().front().cloned();
                if let Some(pod) = pod {
                    let labels =
                        json!({"metadata": {"labels": {"v": (turn % 3).to_string(), "x": turn.to_string()}}});
                    // It may just have ended.
                    let _ = server.patch("pods", NAMESPACE, &pod, labels);
                }
            }
        }
        // Each change of a policy is two runs of iptables-restore, which share the lab's processor.
        std::thread::sleep(Duration::from_millis(200));
    }
    turn
}

fn figures(what: &str, mut all: Vec<Duration>) -> String {
    all.sort();
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    format!(
        "{what}: median {:.1} ms, p95 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
        at(0.5),
        at(0.95),
        at(0.99),
        at(1.0)
    )
}

#[test]
fn pods_start_behind_their_policy() {
    let _serial = serial();
    // A start takes most of a second of the lab's one processor: a thousand take a quarter of an hour.
    let starts: usize = std::env::var("FERROUTE_CNI_STARTS").map_or(40, |text| text.parse().unwrap());
    let stage = Stage::set(&[]);
    let (seen, stop) = (Seen::default(), AtomicBool::new(false));
    let names = Mutex::new(VecDeque::new());
    let begun = Instant::now();
    let changes = std::thread::scope(|scope| {
        let churning = scope.spawn(|| churn(&stage, &names, &stop));
        let starters: Vec<_> = (0..4)
            .map(|starter| {
                let (stage, seen, names) = (&stage, &seen, &names);
                scope.spawn(move || {
                    let mut alive = VecDeque::new();
                    for number in 0..starts / 4 {
                        let name = format!("p{starter}-{number}");
                        let late = number % 25 == 24;
                        names.lock().unwrap().push_front(name.clone());
                        names.lock().unwrap().truncate(20);
                        // Roles in another order for each starter: addresses change roles.
                        let role = Role::of(number + starter + number / 3);
                        alive.push_back(stage.start_pod(seen, &name, role, late));
                        if alive.len() > 5 {
                            stage.end_pod(seen, alive.pop_front().unwrap());
                        }
                    }
                    alive.into_iter().for_each(|pod| stage.end_pod(seen, pod));
                })
            })
            .collect();
        let results: Vec<_> = starters.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        let changes = churning.join().unwrap();
        results.into_iter().for_each(|result| result.unwrap());
        changes
    });
    let steps = std::mem::take(&mut *seen.steps.lock().unwrap());
    println!(
        "{} pod starts in {:.0} s beside {changes} changes of policies and labels; forbidden: {} sent, {} leaked; \
         allowed: {} sent after the step, {} refused",
        Seen::get(&seen.starts),
        begun.elapsed().as_secs_f64(),
        Seen::get(&seen.tried),
        Seen::get(&seen.leaked),
        Seen::get(&seen.allowed),
        Seen::get(&seen.refused),
    );
    println!("{}", figures("the CNI step, process and all", steps));
    for note in seen.notes.lock().unwrap().iter() {
        println!("  {note}");
    }
    assert_eq!(Seen::get(&seen.starts), starts / 4 * 4);
    assert!(Seen::get(&seen.tried) > 10 * starts && Seen::get(&seen.allowed) > 50 * starts);
    assert_eq!(Seen::get(&seen.leaked), 0, "packets past policy");
    assert_eq!(Seen::get(&seen.refused), 0, "allowed packets refused after the step");
    assert_eq!(stage.lab.metric(1, "ferroute_netpol_pass_failures_total"), 0.0);
}

/// What the plugin printed, as JSON.
fn said(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

#[test]
fn without_the_step_an_unknown_pod_is_closed_until_known() {
    let _serial = serial();
    let stage = Stage::set(&["--netpol-unknown-pods=deny"]);
    let seen = Seen::default();
    let (node, mut known) = (stage.lab.node(1), Vec::new());
    for number in 0..15 {
        let (name, role) = (format!("q{number}"), Role::of(number));
        let object = pod_object(&name, &node.name, json!({"role": role.label()}));
        stage.lab.server.insert_unchecked("pods", object).unwrap();
        let pod = node.start_pod(PodSpec::new(&name).ports([])).unwrap();
        let door = pod.netns().run(|| UdpSocket::bind(SocketAddr::new(pod.ips[0], DOOR))).unwrap();
        let outs: Vec<UdpSocket> = [true, false]
            .map(|ipv4| {
                pod.netns().run(|| UdpSocket::bind(SocketAddr::new(like(&pod.ips, ipv4), 0))).unwrap()
            })
            .into();
        let hostile = stage.hostile(&pod, &name, role, &outs);
        let target = usize::from(role == Role::B);
        let at = SocketAddr::new(like(&stage.targets[target].pod.ips, true), SINK);
        let asks = |patience| {
            outs[0].send_to(format!("{name} asks").as_bytes(), at).unwrap();
            receive(&outs[0], 1, patience, |text| text.starts_with(&format!("{name} asks"))) == 1
        };
        for _ in 0..5 {
            assert!(!asks(Duration::from_millis(4)), "{name} is open before it is known");
        }
        let begun = Instant::now();
        stage
            .lab
            .server
            .patch_status("pods", NAMESPACE, &name, json!({"status": running(&pod.ips, node)}))
            .unwrap();
        while !asks(Duration::from_millis(1)) {
            assert!(begun.elapsed() < SOON, "{name} stays closed");
        }
        known.push(begun.elapsed());
        Seen::add(&seen.tried, hostile.stop());
        let started =
            Started { pod, name: name.clone(), container: format!("c-{name}"), role, doors: vec![door] };
        stage.end_pod(&seen, started);
    }
    println!(
        "{}",
        figures("without the step, from the pod's status at the API server to its first answer", known)
    );
    println!("forbidden: {} sent, {} leaked", Seen::get(&seen.tried), Seen::get(&seen.leaked));
    assert!(Seen::get(&seen.tried) > 375);
    assert_eq!(Seen::get(&seen.leaked), 0, "{:?}", seen.notes);
}

#[test]
fn an_address_brings_nothing_along_from_its_last_pod() {
    let _serial = serial();
    let stage = Stage::set(&[]);
    let seen = Seen::default();
    for number in 0..12 {
        let (old, new) = (format!("old{number}"), format!("new{number}"));
        let started = stage.start_pod(&seen, &old, Role::of(number), false);
        let ips = started.pod.ips.clone();
        // Its object still says that it runs, and with which addresses.
        stage.end_network(&seen, started);
        stage.lab.node(1).reuse(&ips);
        let started = stage.start_pod(&seen, &new, Role::of(number + 1), number % 5 == 4);
        assert_eq!(started.pod.ips, ips);
        stage.end_pod(&seen, started);
        stage.lab.server.delete_now("pods", NAMESPACE, &old).unwrap();
    }
    println!(
        "forbidden: {} sent, {} leaked; allowed: {} sent, {} refused",
        Seen::get(&seen.tried),
        Seen::get(&seen.leaked),
        Seen::get(&seen.allowed),
        Seen::get(&seen.refused),
    );
    assert!(Seen::get(&seen.tried) > 200);
    assert_eq!((Seen::get(&seen.leaked), Seen::get(&seen.refused)), (0, 0), "{:?}", seen.notes);
}

#[test]
fn a_pod_that_gets_a_new_sandbox_is_open_at_its_new_address() {
    let _serial = serial();
    let stage = Stage::set(&[]);
    let seen = Seen::default();
    let node = stage.lab.node(1);
    let mut started = stage.start_pod(&seen, "web-0", Role::A, false);
    for number in 0..5 {
        let before = started.pod.ips.clone();
        stage.end_network(&seen, started);
        // The object is the same, and says the old addresses until the kubelet tells the new ones.
        let container = format!("c-web-0-{number}");
        let (mut outs, mut doors) = (Vec::new(), Vec::new());
        let pod = node
            .start_pod_after(PodSpec::new("web-0").ports([]), |pod| {
                for ip in &pod.ips {
                    outs.push(pod.netns().run(|| UdpSocket::bind(SocketAddr::new(*ip, 0))).unwrap());
                    doors.push(pod.netns().run(|| UdpSocket::bind(SocketAddr::new(*ip, DOOR))).unwrap());
                }
                let output = stage.call("ADD", "web-0", &container, &pod.ips, PATIENT);
                assert!(output.status.success(), "{output:?}");
                // A late DEL of the sandbox before changes nothing.
                let output = stage.call("DEL", "web-0", "c-web-0", &before, "");
                assert!(output.status.success(), "{output:?}");
                Ok(())
            })
            .unwrap();
        assert_ne!(pod.ips, before);
        stage.first_packets(&seen, "web-0", Role::A, &pod, &outs, &doors);
        let status = json!({"status": running(&pod.ips, node)});
        stage.lab.server.patch_status("pods", NAMESPACE, "web-0", status).unwrap();
        started = Started { pod, name: "web-0".to_owned(), container, role: Role::A, doors };
    }
    assert_eq!((Seen::get(&seen.leaked), Seen::get(&seen.refused)), (0, 0), "{:?}", seen.notes);
}

#[test]
fn without_the_daemon_the_plugin_is_bounded_and_says_so() {
    let _serial = serial();
    let mut stage = Stage::set(&[]);
    let seen = Seen::default();
    let started = stage.start_pod(&seen, "web", Role::A, false);
    let ips = started.pod.ips.clone();
    let short = ",\"timeout\":\"500ms\"";
    let check = |stage: &Stage, name: &str| stage.call("CHECK", name, "c-web", &ips, short);
    assert!(check(&stage, "web").status.success());
    let output = check(&stage, "nobody");
    assert!(!output.status.success(), "a pod that nobody knows");
    assert!(said(&output)["msg"].as_str().unwrap().contains("pod default/nobody"), "{output:?}");
    // Still the first pod's, whatever was asked about.
    assert!(check(&stage, "web").status.success());

    let mut daemon = stage.lab.daemons.remove(0);
    daemon.kill().unwrap();
    let begun = Instant::now();
    let output = stage.call("ADD", "next", "c-next", &["10.244.1.250".parse().unwrap()], short);
    let took = begun.elapsed();
    assert!(!output.status.success());
    assert_eq!(said(&output)["code"], 11);
    let text = said(&output)["msg"].as_str().unwrap().to_owned();
    println!("{text}");
    assert!(
        text.contains("pod default/next was not started") && text.contains("no ferroute daemon answers"),
        "{text}"
    );
    assert!(took < Duration::from_secs(2), "{took:?}");
    let open = ",\"timeout\":\"200ms\",\"whenUnavailable\":\"allow\"";
    let output = stage.call("ADD", "next", "c-next", &["10.244.1.250".parse().unwrap()], open);
    assert!(output.status.success());
    assert_eq!(said(&output)["ips"][0]["address"], "10.244.1.250/24");
    assert!(stage.call("DEL", "next", "c-next", &["10.244.1.250".parse().unwrap()], "").status.success());

    // A pod that starts while the daemon restarts only waits.
    let object = pod_object("patient", "n1", json!({"role": "a"}));
    stage.lab.server.insert_unchecked("pods", object).unwrap();
    let output = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let address = "10.244.1.249".parse().unwrap();
            stage.call("ADD", "patient", "c-patient", &[address], ",\"timeout\":\"20s\"")
        });
        std::thread::sleep(Duration::from_millis(300));
        daemon.start().unwrap();
        waiting.join().unwrap()
    });
    assert!(output.status.success(), "{output:?}");
    // After a restart nothing of a pod is forgotten.
    assert!(check(&stage, "web").status.success());
    stage.end_pod(&seen, started);
    assert_eq!((Seen::get(&seen.leaked), Seen::get(&seen.refused)), (0, 0), "{:?}", seen.notes);
}

#[test]
fn the_plugin_is_put_back_into_a_rewritten_list_and_clean_up_takes_it_out() {
    let _serial = serial();
    let lab = Lab::without_daemons_by(Cluster::builder().nodes(1), |b| b.kubelet(Runs::External));
    let node = lab.node(1);
    let folder = std::env::temp_dir().join(format!("ferroute-net.d-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let list = folder.join("10-net.conflist");
    let text = |mtu: u32| {
        format!(
            "{{\"cniVersion\": \"1.0.0\",\n  \"name\": \"net\", \"plugins\": [{{\"type\": \"bridge\", \"mtu\": {mtu}}}]}}\n"
        )
    };
    std::fs::write(&list, text(1500)).unwrap();
    let master = format!("--master={}", lab.server.url());
    let socket = format!("--admin-socket={}", lab.admin_socket(node));
    let conf_dir = format!("--cni-conf-dir={}", folder.display());
    let flags = [&*master, &*socket, &*conf_dir, "--run-firewall=true", "--run-service-proxy=false"];
    let mut daemon = Daemon::ferroute(node, PROGRAM, &flags).unwrap();
    daemon.wait_ready(READY).unwrap();
    let plugins = || -> Vec<String> {
        // A writer may be in the middle of it.
        let Ok(object) = serde_json::from_slice::<Value>(&std::fs::read(&list).unwrap()) else {
            return Vec::new();
        };
        let plugins = object["plugins"].as_array().cloned().unwrap_or_default();
        plugins.iter().map(|plugin| plugin["type"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let chained = |when: &str| {
        eventually(&format!("the plugin is in the list {when}"), SOON, || {
            let plugins = plugins();
            if plugins == ["bridge", "ferroute-cni"] { Ok(()) } else { Err(format!("{plugins:?}")) }
        });
    };
    chained("of a ready daemon");
    // As the network's own installer writes it when its settings change.
    let begun = Instant::now();
    std::fs::write(&list, text(1400)).unwrap();
    chained("that was rewritten");
    println!("put back within {:?}", begun.elapsed());
    let object: Value = serde_json::from_slice(&std::fs::read(&list).unwrap()).unwrap();
    assert_eq!(object["plugins"][0]["mtu"], 1400, "the owner's change stays");
    assert_eq!(object["plugins"][1]["socket"], lab.cni_socket(node), "{object}");
    let log = daemon.log().join("\n");
    assert!(log.contains("another program took the CNI plugin out"), "{log}");
    assert!(daemon.terminate(SOON).unwrap().success());
    assert_eq!(plugins(), ["bridge", "ferroute-cni"], "a stop opens nothing");
    let clean = || node.run(|| Command::new(PROGRAM).args(["--cleanup-config", &conf_dir]).output()).unwrap();
    let output = clean();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("10-net.conflist"), "{output:?}");
    assert_eq!(std::fs::read_to_string(&list).unwrap(), text(1400), "byte for byte as its owner left it");
    assert_eq!(String::from_utf8_lossy(&clean().stdout), "nothing of ferroute is left on this machine\n");
    std::fs::remove_dir_all(folder).unwrap();
}
