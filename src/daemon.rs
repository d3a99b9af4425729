//! The composition: which rooms there are, what runs where, start and stop.
//!
//! ```text
//!   API server or folder
//!          |
//!     task "cluster" ---- Cluster (shared state) --- wakes -+-> thread "proxy"  ---> IPVS, sets, chains, routes
//!          |                                                +-> thread "netpol" ---> sets, chains
//!          |                                                +-> thread "routes" ---> BGP speaker (tasks)
//!          |                                                |                   task "learned routes" |
//!          |                                                +-> thread "network" <--------------------+
//!          |                                                                 ---> tunnels, routes, sets, chains, CNI file
//!          +-- Reporter <---- problems of objects ------------------+
//!                                                                   | Views (health, status, metrics)
//!     task "health server"   TCP   /healthz /livez /readyz  <-------+
//!     task "metrics server"  TCP   /metrics                 <-------+
//!     task "admin socket"    Unix  /status /explain ...     <-------+
//!     task "CNI socket"      Unix  one JSON line each way   <-------+
//!     thread "CNI keeper"    keeps the plugin in the network configuration
//! ```
//!
//! Start: checks and sockets that can fail go first, then capabilities are given up, then the
//! rooms take their kernel handles (the last use of SYS_MODULE), then they start. Stop: each room ends
//! its pass, the tasks are cancelled; the kernel keeps everything.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::subscriber::NoSubscriber;

use crate::admin::{self, Desk};
use crate::aws;
use crate::capabilities;
use crate::cluster::{self, Access, Cluster, Interests};
use crate::cni::keeper::Keeper;
use crate::cni::server::{Enforcement, FirewallOff};
use crate::cni::{self, install};
use crate::config::{Cni, Config, Metrics, Output, Source};
use crate::http::{self, Answer, Listener, Request, StatusCode};
use crate::log;
use crate::metrics::ExportTime;
use crate::netpol;
use crate::network;
use crate::proxy::{self, settings::Settings};
use crate::report::Reporter;
use crate::routes;
use crate::supervise::Supervisor;

/// An orderly stop takes at most this long.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs the daemon until it is told to stop.
pub fn run(config: Config, level: log::Level) -> anyhow::Result<()> {
    let Config {
        source,
        node_name,
        cache_sync_timeout,
        health,
        metrics,
        admin_socket,
        cni: Cni { socket: cni_socket, conf_dir },
        log: _,
        proxy,
        netpol,
        routes,
        network,
        notices,
    } = config;
    require_root()?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = &*node_name, "ferroute starts");
    for notice in notices {
        tracing::info!(notice, "about the flags");
    }
    if netpol.is_none() {
        conf_dir.iter().for_each(|folder| take_plugin_out(folder));
    }
    let Some(interests) = interests(&node_name, proxy.is_some(), netpol.is_some(), routes.is_some()) else {
        tracing::info!("nothing to run: every part is switched off");
        return Ok(());
    };
    let source = cluster_source(source, proxy.as_ref(), netpol.as_ref())?;

    let health = health.map(|address| bind("health", address)).transpose()?;
    let metrics =
        metrics.map(|Metrics { address, path }| anyhow::Ok((bind("metrics", address)?, path))).transpose()?;
    let (admin, _bound) = admin::listen("admin-socket", &admin_socket)?;
    let keeper = conf_dir.zip(cni_socket.as_ref()).map(|(folder, socket)| Keeper::new(folder, socket));
    let plugin = cni_socket.map(|path| admin::listen("cni-socket", &path)).transpose()?;
    let (plugin, _plugin_bound) = plugin.unzip();
    // After the ports, which may be privileged; before any thread, since the sets are per thread.
    let bgp = routes.as_ref().map(|_| capabilities::BGP);
    let kept = |list: &[caps::Capability]| -> Vec<_> { list.iter().copied().chain(bgp).collect() };
    let always = kept(&capabilities::ALWAYS);
    capabilities::keep(&kept(&capabilities::AT_START))?;

    let (started, started_at) = (Instant::now(), SystemTime::now());
    let cluster = Cluster::new();
    let reporter = Reporter::new(&node_name);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(4)
        .thread_name("tasks")
        .on_thread_start({
            let always = always.clone();
            move || {
                if let Err(error) = capabilities::keep(&always) {
                    tracing::warn!(%error, "a thread keeps more capabilities than it needs");
                }
            }
        })
        .enable_all()
        .build()
        .context("cannot start the task runtime")?;
    let checks_source;
    let (proxy, netpol, network, routes) = {
        // The API client and the health check node port servers belong to the runtime.
        let _inside = runtime.enter();
        check_access(&source)?;
        let proxy = proxy
            .map(|settings| {
                let period = settings.audit_period;
                let subscription = cluster.subscribe_to(&Interests::SERVICE_PROXY);
                let (room, view) = proxy::Room::open(settings, subscription, reporter.room("proxy"))?;
                anyhow::Ok((room, view, period))
            })
            .transpose()?;
        let netpol = netpol
            .map(|settings| {
                let period = settings.audit_period;
                let subscription = cluster.subscribe_to(&Interests::NETWORK_POLICY);
                let (room, view) = netpol::Room::open(settings, subscription, reporter.room("netpol"))?;
                anyhow::Ok((room, view, period))
            })
            .transpose()?;
        checks_source = network.as_ref().is_some_and(|settings| settings.disable_source_check);
        let network = network
            .map(|settings| {
                let period = settings.audit_period;
                let subscription = cluster.subscribe_to(&network::room::NEEDED);
                let (room, view) = network::Room::open(settings, subscription, &reporter)?;
                anyhow::Ok((room, view, period))
            })
            .transpose()?;
        let own = network.as_ref().map(|(_, view, _)| view.addresses()).unwrap_or_default();
        let routes = routes
            .map(|settings| {
                let period = settings.audit_period;
                let subscription = cluster.subscribe_to(&Interests::ROUTES_AND_SECRETS);
                let programmed = proxy.as_ref().map(|(_, view, _)| view.programmed());
                let (room, view) = routes::Room::open(settings, subscription, &reporter, programmed, &own)?;
                anyhow::Ok((room, view, period))
            })
            .transpose()?;
        (proxy, netpol, network, routes)
    };
    capabilities::keep(&always)?;

    let desk = Arc::new(Desk {
        node: node_name,
        started,
        started_at,
        proxy: proxy.as_ref().map(|(_, view, period)| (view.clone(), *period)),
        netpol: netpol.as_ref().map(|(_, view, period)| (view.clone(), *period)),
        routes: routes.as_ref().map(|(_, view, period)| (view.clone(), *period)),
        network: network.as_ref().map(|(_, view, period)| (view.clone(), *period)),
        cluster: cluster.clone(),
        reporter: reporter.clone(),
        level,
        export_time: ExportTime::new()?,
    });
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new().context("cannot handle signals")?;
        let mut rooms = Supervisor::default();
        if let Some(listener) = health {
            let listener = Listener::Tcp(tokio::net::TcpListener::from_std(listener)?);
            rooms.task("health server", http::serve(listener, answer(&desk, Desk::health)));
        }
        if let Some((listener, path)) = metrics {
            let listener = Listener::Tcp(tokio::net::TcpListener::from_std(listener)?);
            let page = move |desk: &Desk, request: &Request| desk.metrics(request, &path);
            rooms.task("metrics server", http::serve(listener, answer(&desk, page)));
        }
        let admin = Listener::Unix(tokio::net::UnixListener::from_std(admin)?);
        rooms.task("admin socket", http::serve(admin, answer(&desk, Desk::admin)));
        if let Some(listener) = plugin {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            let enforcement: Arc<dyn Enforcement> = match &netpol {
                Some((_, view, _)) => Arc::new(view.clone()),
                None => Arc::new(FirewallOff),
            };
            rooms.task("CNI socket", cni::server::serve(listener, enforcement));
        }
        let mut stops: Vec<Box<dyn Fn() + Send>> = Vec::new();
        if let Some((room, view, _)) = proxy {
            stops.push(Box::new(move || view.stop()));
            rooms.thread("proxy", move || Ok(room.run()?)).context("cannot start the proxy's thread")?;
        }
        if let (Some(keeper), Some((_, view, _))) = (keeper, &netpol) {
            let (view, stop) = (view.clone(), keeper.stop());
            stops.push(Box::new(stop));
            let body = move || {
                keeper.run(|| view.health().last_clean_pass.is_some());
                Ok(())
            };
            rooms.thread("CNI keeper", body).context("cannot start the CNI keeper's thread")?;
        }
        if let Some((room, view, _)) = netpol {
            stops.push(Box::new(move || view.stop()));
            rooms
                .thread("netpol", move || Ok(room.run()?))
                .context("cannot start the policy room's thread")?;
        }
        if let Some((room, view, _)) = network {
            if let Some((_, routes, _)) = &routes {
                let following = network::learned::follow(routes.follow(), view.feed());
                rooms.task("learned routes", async move {
                    following.await;
                    Ok(())
                });
            }
            stops.push(Box::new(move || view.stop()));
            rooms
                .thread("network", move || Ok(room.run()?))
                .context("cannot start the pod network's thread")?;
        }
        if let Some((room, view, _)) = routes {
            stops.push(Box::new(move || view.stop()));
            let body = move || {
                room.run();
                Ok(())
            };
            rooms.thread("routes", body).context("cannot start the route room's thread")?;
        }
        if checks_source {
            let (cluster, reporter) = (cluster.clone(), reporter.room("aws"));
            tokio::spawn(aws::run(cluster, desk.node.clone(), reporter, aws::Environment::of_process()));
        }
        let wanted = interests.listed_kinds();
        let watched = cluster.clone();
        rooms.task("cluster", async move { Ok(cluster::run(source, watched, interests, reporter).await?) });
        tokio::spawn(warn_when_unlisted(cluster, wanted, cache_sync_timeout));
        let outcome = tokio::select! {
            () = signals.next() => Ok(()),
            ended = rooms.first_end() => Err(anyhow::anyhow!("{ended}")),
        };
        stops.iter().for_each(|stop| stop());
        let stopped = tokio::select! {
            stopped = rooms.stop(STOP_DEADLINE) => stopped,
            () = signals.next() => bail!("stopped at once by a second signal; the kernel keeps its state"),
        };
        for ended in &stopped.failed {
            tracing::error!(error = %ended, "failed while stopping");
        }
        outcome?;
        if !stopped.running.is_empty() {
            bail!("did not stop within {}s: {}", STOP_DEADLINE.as_secs(), stopped.running.join(", "));
        }
        tracing::info!("stopped; the kernel keeps its state");
        Ok(())
    });
    // A blocked answer must not hold the process back.
    runtime.shutdown_timeout(Duration::from_millis(200));
    outcome
}

/// What a daemon with these flags would change; reads the kernel and the cluster, writes nothing.
pub fn plan(config: Config, output: Output) -> anyhow::Result<String> {
    require_root()?;
    let (proxy, netpol, network) = (config.proxy, config.netpol, config.network);
    let Some(interests) = interests(&config.node_name, proxy.is_some(), netpol.is_some(), network.is_some())
    else {
        bail!("nothing to plan: --run-service-proxy=false, --run-firewall=false and --run-router=false");
    };
    let source = cluster_source(config.source, proxy.as_ref(), netpol.as_ref())?;
    let cluster = Cluster::new();
    let wanted = interests.listed_kinds();
    let limit = config.cache_sync_timeout;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the task runtime")?;
    runtime.block_on(async {
        tokio::select! {
            ended = cluster::run(source, cluster.clone(), interests, Reporter::new(&config.node_name)) => {
                Err(ended.err().map_or_else(|| anyhow::anyhow!("the cluster's watch ended"), Into::into))
            }
            () = until_listed(&cluster, &wanted) => Ok(()),
            () = tokio::time::sleep(limit) => {
                let errors: Vec<String> = cluster
                    .watch_health()
                    .kinds()
                    .into_iter()
                    .filter_map(|(kind, health)| Some(format!("{}: {}", kind.name(), health.last_error?)))
                    .collect();
                let errors = if errors.is_empty() { "no answer".to_owned() } else { errors.join("; ") };
                Err(anyhow::anyhow!(
                    "the cluster was not listed within {}s (--cache-sync-timeout), {} missing: {errors}",
                    limit.as_secs(),
                    unlisted(&cluster, &wanted)
                ))
            }
        }
    })?;
    let plan = Plan {
        services: proxy.map(|settings| proxy::plan(&settings, &cluster)).transpose()?,
        policies: netpol.map(|settings| netpol::plan(&settings, &cluster)).transpose()?,
        network: network.map(|settings| network::plan(&settings, &cluster)).transpose()?,
    };
    Ok(match output {
        Output::Text => {
            let services = plan.services.as_ref().map(ToString::to_string);
            let policies = plan.policies.as_ref().map(ToString::to_string);
            let network = plan.network.as_ref().map(ToString::to_string);
            services.into_iter().chain(policies).chain(network).collect::<Vec<_>>().join("\n")
        }
        Output::Json => serde_json::to_string(&plan)?,
    })
}

/// The answer of `ferroute plan`: the rooms that would run.
#[derive(serde::Serialize)]
struct Plan {
    /// As in `ferroute status`, at the top for those who asked before there were policies.
    #[serde(flatten)]
    services: Option<proxy::Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policies: Option<netpol::Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<network::Status>,
}

/// Without a firewall nothing has to be waited for. The socket answers nevertheless: a plugin that
/// another hand put there must not keep pods from starting.
fn take_plugin_out(folder: &std::path::Path) {
    let (removed, errors) = install::deconfigure(folder, false);
    for line in removed {
        tracing::info!(removed = line, "the firewall is off");
    }
    for error in errors {
        tracing::warn!(%error, "the CNI plugin stays in the network configuration");
    }
}

/// What the rooms that run want to know; `None` when none does.
fn interests(node: &Arc<str>, proxy: bool, netpol: bool, routes: bool) -> Option<Interests> {
    let proxy = proxy.then(Interests::service_proxy);
    let netpol = netpol.then(|| Interests::network_policy(node.clone()));
    let routes = routes.then(Interests::routes);
    [proxy, netpol, routes].into_iter().flatten().reduce(Interests::and)
}

/// Only root may change or read the kernel's tables.
pub fn require_root() -> anyhow::Result<()> {
    let user = nix::unistd::geteuid();
    if !user.is_root() {
        bail!("must run as root (user 0), runs as user {user}; use sudo, or a pod with runAsUser: 0");
    }
    Ok(())
}

/// Where objects come from, with what can be checked before anything starts.
fn cluster_source(
    source: Source,
    proxy: Option<&Settings>,
    netpol: Option<&netpol::Settings>,
) -> anyhow::Result<cluster::Source> {
    let foreign = netpol.and_then(|settings| match &settings.services {
        netpol::Services::Own { .. } => None,
        netpol::Services::Foreign { cluster, .. } => Some(cluster),
    });
    let cluster_ranges = proxy.map(|settings| &settings.cluster_ip_ranges).or(foreign);

    Ok(match source {
        Source::Manifests(folder) => {
            let known = std::fs::metadata(&folder).with_context(|| {
                format!(
                    "--manifests={}: cannot be read; give a folder of YAML or JSON files",
                    folder.display()
                )
            })?;
            if !known.is_dir() {
                bail!(
                    "--manifests={}: is no folder; give the folder that holds the YAML or JSON files",
                    folder.display()
                );
            }
            cluster::Source::Manifests(folder)
        }
        Source::Api { kubeconfig, master } => cluster::Source::Api(Access {
            kubeconfig,
            master,
            own_cluster_ranges: cluster_ranges.cloned().unwrap_or_default(),
        }),
    })
}

/// A wrong kubeconfig must show before the kernel is touched. The client made here is dropped, so
/// its log line would only be said twice.
fn check_access(source: &cluster::Source) -> anyhow::Result<()> {
    if let cluster::Source::Api(access) = source {
        tracing::subscriber::with_default(NoSubscriber::new(), || access.client())?;
    }
    Ok(())
}

fn bind(what: &str, address: std::net::SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    http::bind(address).with_context(|| {
        format!(
            "cannot listen on {address} (--{what}-addr, --{what}-port); choose another, or stop who uses it"
        )
    })
}

/// An answer that may block, on a thread where that is allowed.
fn answer<F>(
    desk: &Arc<Desk>,
    respond: F,
) -> impl Fn(Request) -> futures::future::BoxFuture<'static, Answer> + Send + Sync + 'static
where
    F: Fn(&Desk, &Request) -> Answer + Clone + Send + Sync + 'static,
{
    let desk = desk.clone();
    move |request| {
        let (desk, respond) = (desk.clone(), respond.clone());
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || respond(&desk, &request)).await {
                Ok(answer) => answer,
                Err(error) => match error.try_into_panic() {
                    // Not swallowed here: the server's end names it.
                    Ok(payload) => std::panic::resume_unwind(payload),
                    Err(_) => Answer::text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
                },
            }
        })
    }
}

/// SIGTERM and SIGINT, from the moment this exists: none is lost between two looks.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "told to stop");
    }
}

async fn until_listed(cluster: &Cluster, kinds: &[cluster::Kind]) {
    while !cluster.read().has_listed(kinds) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The kinds that are not listed yet, by name.
fn unlisted(cluster: &Cluster, kinds: &[cluster::Kind]) -> String {
    let state = cluster.read();
    let missing = kinds.iter().filter(|kind| !state.has_listed(&[**kind]));
    missing.map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

async fn warn_when_unlisted(cluster: Cluster, kinds: Vec<cluster::Kind>, limit: Duration) {
    if tokio::time::timeout(limit, until_listed(&cluster, &kinds)).await.is_err() {
        tracing::warn!(
            seconds = limit.as_secs(),
            missing = unlisted(&cluster, &kinds),
            "the cluster is not listed yet (--cache-sync-timeout); the kernel keeps its state and the watches go on"
        );
    }
}
