//! The demonstration: three nodes, an application's manifests, real requests, a rollout and a crash under
//! load, and a clean-up that leaves nothing. Runs inside `scripts/lab`; `scripts/demo` starts it.
//!
//! Usage: ferroute-demo FERROUTE MANIFESTS...

mod application;
mod figures;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use application::{Application, Front};
use ferroute_apiserver::{ApiServer, Kubelet as Runs, NodeSpec};
use ferroute_kit::{
    Cluster, Daemon, Families, KernelSnapshot, Kubelet, Load, Node, Protocol, Reply, kubelet,
};
use figures::Figures;

const SOON: Duration = Duration::from_secs(30);
const SERVICES: [&str; 2] = ["10.96.0.0/16", "fd00:96::/112"];
const LOAD_BALANCERS: [&str; 2] = ["203.0.113.0/25", "fd00:203::/64"];
const EXTERNAL: &str = "198.51.100.0/24";
const METRICS: &str = "127.0.0.1:20241";

fn main() -> ExitCode {
    match run() {
        Ok(figures) => {
            println!("\ndemo passed: {} requests, {} failed", figures.requests, figures.failed);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("\ndemo FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn step(number: u32, text: &str) {
    println!("\n{number}. {text}");
}

fn run() -> Result<Figures> {
    let mut arguments = std::env::args_os().skip(1);
    let program: PathBuf = arguments.next().context("usage: ferroute-demo FERROUTE MANIFESTS...")?.into();
    let manifests: Vec<String> = arguments.map(|path| path.to_string_lossy().into_owned()).collect();
    ensure!(!manifests.is_empty(), "usage: ferroute-demo FERROUTE MANIFESTS...");
    ferroute_kit::kernel::require()?;
    let mut figures = Figures::default();

    step(1, "A cluster of three nodes, a router and an outside client, in one kernel");
    let begin = Instant::now();
    let cluster = Cluster::builder().families(Families::Dual).nodes(3).zones(["a", "b", "c"]).build()?;
    let before =
        cluster.nodes.iter().map(|node| KernelSnapshot::settled(node, SOON)).collect::<Result<Vec<_>>>()?;
    let server = start_api_server(&cluster)?;
    let settings = kubelet::Settings { serve_after_deletion: Duration::from_secs(2), ..Default::default() };
    let kubelet = Kubelet::start(&cluster, server.address(), settings)?;
    let kubeconfig = std::env::temp_dir().join("ferroute-demo.kubeconfig");
    server.kubeconfig(&kubeconfig)?;
    let kubectl = Kubectl { cluster: &cluster, kubeconfig: kubeconfig.to_string_lossy().into_owned() };
    println!("   up in {} ms, Kubernetes API at {}", begin.elapsed().as_millis(), server.url());

    step(2, &format!("kubectl apply -f {}", manifests.join(" -f ")));
    for path in &manifests {
        let said = kubectl.run(&["apply", "-f", path])?;
        println!("   {} objects from {path}", said.lines().count());
    }
    server.wait_rolled_out(SOON).map_err(anyhow::Error::msg)?;
    let running = kubelet.running().len();
    println!("   {running} pods run (the echo stands in for the images), {}", kubectl.summary()?);

    step(3, "ferroute starts on every node, with its real command line");
    let arguments = [
        format!("--master={}", server.url()),
        format!("--service-cluster-ip-range={}", SERVICES.join(",")),
        format!("--loadbalancer-ip-range={}", LOAD_BALANCERS.join(",")),
        format!("--service-external-ip-range={EXTERNAL}"),
        "--metrics-addr=127.0.0.1".to_owned(),
        "--metrics-port=20241".to_owned(),
    ];
    println!("   ferroute {}", arguments.join(" "));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let begin = Instant::now();
    let mut daemons = cluster
        .nodes
        .iter()
        .map(|node| Daemon::ferroute(node, &program, &arguments))
        .collect::<Result<Vec<_>>>()?;
    for daemon in &mut daemons {
        daemon.wait_ready(SOON)?;
    }
    println!("   all three ready after {} ms", begin.elapsed().as_millis());

    step(4, "Requests to every port of every Service, from pods, nodes and outside");
    let application = Application::read(&server);
    for name in &application.skipped {
        println!("   {name}: no virtual server wanted");
    }
    for front in &application.fronts {
        drive(&cluster, &kubelet, front, &mut figures)?;
    }
    figures.print_table();
    figures.all_reached(&application)?;
    println!("   every endpoint answered where the scheduler is to take turns");
    affinity(&cluster, &application, &mut figures)?;

    step(5, "What the kernel and ferroute say on n1");
    excerpt("ipvsadm -Ln", &cluster.nodes[0].sh("ipvsadm -Ln")?, 12);
    let socket = format!("--admin-socket={}", Daemon::admin_socket(&cluster.nodes[0]));
    let program_text = program.to_string_lossy();
    let status = cluster.nodes[0].exec(&program_text, &["status", &socket])?;
    excerpt("ferroute status", &status, 10);
    let verdict = status.lines().find(|line| line.contains("kernel and desired state agree"));
    let verdict = verdict.with_context(|| format!("ferroute status shows a difference:\n{status}"))?;
    println!("   | ...\n   | {verdict}");

    step(6, "A Deployment is rolled under load");
    let target = application.rollable().context("no Deployment with a TCP Service to roll")?;
    let loads = start_load(&cluster, target)?;
    let (changes, seconds) = programming(&cluster)?;
    let begin = Instant::now();
    let deployment = format!("deployment/{}", target.deployment.as_deref().unwrap_or_default());
    kubectl.run(&["-n", &target.namespace, "rollout", "restart", &deployment])?;
    std::thread::sleep(Duration::from_millis(300));
    server.wait_rolled_out(SOON).map_err(anyhow::Error::msg)?;
    std::thread::sleep(Duration::from_secs(3));
    let (requests, failed) = stop_load(loads, &mut figures)?;
    println!("   {deployment} in {} ms: {requests} requests, {failed} failed", begin.elapsed().as_millis());
    let (changes, seconds) = (programming(&cluster)?.0 - changes, programming(&cluster)?.1 - seconds);
    println!(
        "   n2 programmed {changes} changes, {:.1} ms on average from the event to the kernel's last answer",
        1000.0 * seconds / changes.max(1.0)
    );

    step(7, "The agent of n1 is stopped, started, killed and started, under load");
    let loads = start_load(&cluster, target)?;
    daemons[0].restart(SOON)?;
    println!("   SIGTERM and start: ready again");
    daemons[0].kill()?;
    std::thread::sleep(Duration::from_millis(300));
    daemons[0].start()?;
    daemons[0].wait_ready(SOON)?;
    println!("   SIGKILL and start: ready again");
    let (requests, failed) = stop_load(loads, &mut figures)?;
    println!("   {requests} requests, {failed} failed");
    step(8, "Everything is taken back");
    for path in &manifests {
        kubectl.run(&["delete", "--ignore-not-found", "--wait=false", "-f", path])?;
    }
    for daemon in &mut daemons {
        ensure!(daemon.terminate(SOON)?.success(), "an agent did not stop in order");
    }
    let deadline = Instant::now() + SOON;
    while !kubelet.running().is_empty() {
        ensure!(Instant::now() < deadline, "pods are left: {:?}", kubelet.running());
        std::thread::sleep(Duration::from_millis(100));
    }
    for (node, before) in cluster.nodes.iter().zip(&before) {
        let said = node.exec(&program_text, &["--cleanup-config"])?;
        node.exec(&program_text, &["--cleanup-config"])?;
        let left = before.difference(&KernelSnapshot::take(node)?);
        ensure!(left.is_empty(), "{} is not as before: {}", node.name, left.join("; "));
        println!(
            "   {}: {} objects removed, the kernel is as before the start",
            node.name,
            said.lines().filter(|line| line.starts_with("removed")).count()
        );
    }
    if figures.failed > 0 {
        bail!("{} of {} requests failed", figures.failed, figures.requests);
    }
    Ok(figures)
}

fn start_api_server(cluster: &Cluster) -> Result<ApiServer> {
    let nodes: Vec<NodeSpec> = cluster
        .nodes
        .iter()
        .map(|node| {
            let spec = NodeSpec::new(&node.name, node.ips.iter().copied());
            spec.pod_cidrs(node.pod_cidrs.iter().copied()).zone(node.zone.as_deref().unwrap_or_default())
        })
        .collect();
    let parse = |list: &[&str]| list.iter().map(|net| net.parse()).collect::<Result<Vec<_>, _>>();
    let (services, balancers) = (parse(&SERVICES)?, parse(&LOAD_BALANCERS)?);
    let listen = SocketAddr::new(cluster.api_ips[0], 8001);
    let builder = ApiServer::builder()
        .listen(listen)
        .nodes(nodes)
        .service_cidrs(services)
        .load_balancers(balancers)
        .kubelet(Runs::External);
    Ok(cluster.router.run(|| builder.start())?)
}

/// Asks one frontend from everywhere it should answer, and nowhere else.
fn drive(cluster: &Cluster, kubelet: &Kubelet, front: &Front, figures: &mut Figures) -> Result<()> {
    let running = kubelet.running();
    let rounds = (front.pods.len() * 2).max(4);
    for node in &cluster.nodes {
        // A pod that is an endpoint may reach itself only where the Service asks for hairpin.
        let pod = running.iter().find(|pod| pod.node == node.name && !front.pods.contains_key(&pod.name));
        if let Some(pod) = pod {
            for ip in &front.inside {
                figures.ask(
                    front,
                    &pod.netns,
                    "pod",
                    SocketAddr::new(*ip, front.port),
                    rounds,
                    &front.all(),
                )?;
            }
        }
        for ip in &front.inside {
            figures.ask(front, node, "node", SocketAddr::new(*ip, front.port), rounds, &front.all())?;
        }
        if let Some(port) = front.node_port {
            for ip in node.ips.iter().filter(|ip| front.serves(**ip)) {
                outside(cluster, node, front, SocketAddr::new(*ip, port), rounds, figures)?;
            }
        }
        // The router sends external and load-balancer addresses to each node in turn.
        if !front.outside.is_empty() {
            route_outside(cluster, node)?;
        }
        for ip in &front.outside {
            outside(cluster, node, front, SocketAddr::new(*ip, front.port), rounds, figures)?;
        }
    }
    Ok(())
}

/// Asks from outside at one node. With the external policy Local only its own pods answer and see the
/// client's own address; where it has none, nobody answers.
fn outside(
    cluster: &Cluster,
    node: &Node,
    front: &Front,
    to: SocketAddr,
    rounds: usize,
    figures: &mut Figures,
) -> Result<()> {
    let expected = if front.local_only { front.on(&node.name) } else { front.all() };
    if expected.is_empty() {
        let reply = cluster.client.ask(front.protocol, to, Duration::from_millis(300));
        let name = &front.name;
        ensure!(
            !matches!(reply, Reply::Answer(_)),
            "{name} at {to} answers on {} without an endpoint there",
            node.name
        );
        return Ok(());
    }
    let peers = figures.ask(front, &cluster.client, "outside", to, rounds, &expected)?;
    ensure!(
        !front.local_only || peers.iter().all(|peer| cluster.client.ips.contains(peer)),
        "{} at {to}: the policy Local keeps the client's address, but pods saw {peers:?}",
        front.name
    );
    Ok(())
}

/// The router sends external and load-balancer addresses to this node.
fn route_outside(cluster: &Cluster, node: &Node) -> Result<()> {
    LOAD_BALANCERS
        .iter()
        .chain([&EXTERNAL])
        .try_for_each(|network| cluster.client.route_via(&[node], network.parse()?))
}

/// A client of a Service with session affinity stays with one endpoint.
fn affinity(cluster: &Cluster, application: &Application, figures: &mut Figures) -> Result<()> {
    for front in application.fronts.iter().filter(|front| front.affinity && front.pods.len() > 1) {
        for node in &cluster.nodes {
            let Some(ip) = front.inside.first() else { continue };
            let tally = node.spread(front.protocol, SocketAddr::new(*ip, front.port), 10);
            figures.count(&tally);
            ensure!(
                tally.failed == 0 && tally.pods.len() == 1,
                "{} has session affinity, but {} met {}",
                front.name,
                node.name,
                tally
            );
        }
        println!("   {}: session affinity holds, one endpoint per client", front.name);
    }
    Ok(())
}

fn start_load(cluster: &Cluster, front: &Front) -> Result<Vec<Load>> {
    let ip = front.inside.first().context("a Service without cluster IP cannot be loaded")?;
    let inside = SocketAddr::new(*ip, front.port);
    let pause = Duration::from_millis(5);
    let mut loads = Vec::new();
    for node in &cluster.nodes {
        loads.push(Load::start(node, Protocol::Tcp, inside, 2, pause)?);
    }
    if let Some(port) = front.node_port
        && let Some(IpAddr::V4(ip)) = cluster.nodes[0].ips.first()
    {
        let outside = SocketAddr::new((*ip).into(), port);
        loads.push(Load::start(&cluster.client, Protocol::Tcp, outside, 2, pause)?);
    }
    std::thread::sleep(Duration::from_secs(1));
    Ok(loads)
}

fn stop_load(loads: Vec<Load>, figures: &mut Figures) -> Result<(u64, u64)> {
    std::thread::sleep(Duration::from_secs(1));
    let (mut requests, mut failed) = (0, 0);
    for load in loads {
        let tally = load.stop();
        figures.count(&tally);
        requests += tally.ok + tally.failed;
        failed += tally.failed;
        if tally.failed > 0 {
            println!("   {tally}");
        }
    }
    ensure!(failed == 0, "{failed} of {requests} requests under load failed");
    Ok((requests, failed))
}

fn excerpt(title: &str, text: &str, lines: usize) {
    println!("   $ {title}");
    for line in text.lines().take(lines) {
        println!("   | {line}");
    }
}

/// How many changes n2 has programmed, and the seconds they took in all.
fn programming(cluster: &Cluster) -> Result<(f64, f64)> {
    let page = cluster.nodes[1].http_get(METRICS.parse()?, "/metrics")?.body;
    let name = "ferroute_proxy_change_duration_seconds";
    Ok((metric(&page, &format!("{name}_count")), metric(&page, &format!("{name}_sum"))))
}

fn metric(page: &str, name: &str) -> f64 {
    page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap_or_default()
}

/// The real kubectl, against the API server, from the router.
struct Kubectl<'a> {
    cluster: &'a Cluster,
    kubeconfig: String,
}

impl Kubectl<'_> {
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let flag = format!("--kubeconfig={}", self.kubeconfig);
        let mut all = vec![flag.as_str()];
        all.extend(arguments);
        self.cluster.router.exec("kubectl", &all).with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    fn summary(&self) -> Result<String> {
        let services = self.run(&["get", "services", "--all-namespaces", "--no-headers"])?.lines().count();
        let deployments =
            self.run(&["get", "deployments", "--all-namespaces", "--no-headers"])?.lines().count();
        Ok(format!("{deployments} Deployments, {services} Services"))
    }
}
