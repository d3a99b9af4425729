//! One run of each side, each in a process and a network namespace of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferroute::cluster::node::Node;
use ferroute::cluster::{Cluster, Kind};
use ferroute::host::route::{PROTOCOL, TABLE_LOCAL};
use ferroute::proxy::work::Messages;
use ferroute::proxy::{Room, View, Work};
use ferroute::report::Reporter;
use ferroute_ipvs as ipvs;
use ferroute_netlink::{Batch, Protocol, Socket, flags};
use serde::{Deserialize, Serialize};

use crate::shape::{API_ADDRESS, ENDPOINTS, NODE_ADDRESS, Shape};
use crate::tables::{Script, Step, Tables, cold, ipvs_family, steps};

/// Events of each kind in one run; the run's figure is their median.
pub const EVENTS: u32 = 20;

/// One measured step.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds.
    pub ms: f64,
    /// Netlink messages that write.
    pub written: f64,
    /// Netlink messages that ask.
    pub asked: f64,
}

/// The steps of one run, by name.
pub type Samples = BTreeMap<String, Sample>;

/// A network namespace like a node's: loopback up, one address. Must be called before any thread starts.
pub fn enter_namespace() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    for line in ["link set lo up", "link add eth0 type dummy", "link set eth0 up"] {
        ip(line)?;
    }
    ip(&format!("address add {NODE_ADDRESS} dev eth0"))
}

fn ip(line: &str) -> Result<()> {
    let status = Command::new("ip").args(line.split(' ')).status().context("cannot run ip")?;
    ensure!(status.success(), "ip {line}: {status}");
    Ok(())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The middle value.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A room on its thread.
struct Running {
    cluster: Cluster,
    view: View,
    /// When the handles were open and the thread started.
    opened: Instant,
    thread: std::thread::JoinHandle<Result<(), ferroute::proxy::Error>>,
}

impl Running {
    fn start(shape: &Shape, cluster: &Cluster) -> Result<Self> {
        let (room, view) = Room::open(shape.settings()?, cluster.subscribe(), Reporter::new("n1"))?;
        let opened = Instant::now();
        let thread = std::thread::Builder::new().name("proxy".into()).spawn(move || room.run())?;
        // Until it waits for the first list.
        std::thread::sleep(Duration::from_millis(50));
        Ok(Self { cluster: cluster.clone(), view, opened, thread })
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done(self) {
            ensure!(!self.thread.is_finished(), "the room ended while waiting for {what}");
            if let Some(error) = self.view.health().last_error {
                bail!("{what}: {error}");
            }
            ensure!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The time of `count` events that `cause` makes, one after another, from decoded to the last
    /// acknowledgement.
    fn events(&self, count: u32, mut cause: impl FnMut(&Cluster, u32) -> Result<()>) -> Result<Sample> {
        let before = self.view.work();
        let mut times = Vec::new();
        for index in 0..count {
            let last = self.view.work();
            cause(&self.cluster, index)?;
            self.wait("an event", |running| running.view.work().changes > last.changes)?;
            times.push(ms(self.view.work().latency.saturating_sub(last.latency)));
        }
        Ok(Sample { ms: median(times), ..between(&before, &self.view.work(), count) })
    }

    fn stop(self) -> Result<()> {
        self.view.stop();
        self.thread.join().map_err(|_| anyhow::anyhow!("the room panicked"))??;
        Ok(())
    }
}

fn total(work: &Work) -> Messages {
    work.messages.iter().fold(Messages::default(), |sum, part| Messages {
        written: sum.written + part.written,
        asked: sum.asked + part.asked,
    })
}

fn between(before: &Work, after: &Work, count: u32) -> Sample {
    let (first, last) = (total(before), total(after));
    Sample {
        ms: ms(after.latency.saturating_sub(before.latency)) / f64::from(count),
        written: (last.written - first.written) as f64 / f64::from(count),
        asked: (last.asked - first.asked) as f64 / f64::from(count),
    }
}

const NEEDED: [Kind; 4] = [Kind::ServiceCidr, Kind::EndpointSlice, Kind::Node, Kind::Service];

/// One run of ferroute's Service room. With `capture` the kernel is read between the steps and the
/// floor's script written to that folder; such a run's times are not to be used.
pub fn ferroute(shape: &Shape, capture: Option<&Path>) -> Result<Samples> {
    enter_namespace()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _inside = runtime.enter();
    let mut samples = Samples::new();
    let mut put = |name: &str, sample: Sample| samples.insert(name.to_owned(), sample);
    let mut states = Vec::new();
    let mut snapshot = |capture: Option<&Path>| -> Result<()> {
        if capture.is_some() {
            states.push(Tables::read()?);
        }
        Ok(())
    };

    let cluster = Cluster::new();
    shape.fill(&cluster)?;
    let running = Running::start(shape, &cluster)?;
    let opened = running.view.work();
    let watcher = capture.map(|_| std::thread::spawn(api_service_served));
    let started = Instant::now();
    NEEDED.into_iter().for_each(|kind| cluster.set_listed(kind));
    running.wait("the cold start", |running| running.view.health().passes > 0)?;
    let passed = running.view.health().last_clean_pass.context("no pass")?;
    let work = running.view.work();
    let sample = between(&opened, &work, 1);
    let all = passed.saturating_duration_since(started);
    put("cold start", Sample { ms: ms(all), ..sample });
    put("cold start: tables", Sample { ms: ms(all.saturating_sub(work.rules)), ..sample });
    put("cold start: chains", Sample { ms: ms(work.rules), ..Sample::default() });
    let usable = work.api_usable.context("no API Service")?;
    put(
        "API Service usable",
        Sample { ms: ms(usable.saturating_duration_since(started)), ..Sample::default() },
    );
    if let Some(watcher) = watcher {
        let seen = watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))??;
        put(
            "API Service served",
            Sample { ms: ms(seen.saturating_duration_since(started)), ..Sample::default() },
        );
    }
    snapshot(capture)?;
    if let Some(folder) = capture {
        save_commands(folder)?;
    }

    let before = running.view.work();
    running.wait("an audit", |running| running.view.work().audits > 0)?;
    // The counters are published after the audit's own.
    std::thread::sleep(Duration::from_millis(20));
    let after = running.view.work();
    put("full audit", Sample { ms: ms(after.auditing), ..between(&before, &after, 1) });

    let stride = (shape.services / EVENTS).max(1);
    let one_more = ENDPOINTS + 1;
    let added = running.events(EVENTS, |cluster, n| shape.set_endpoints(cluster, n * stride, one_more))?;
    put("one endpoint added", added);
    put("one endpoint added, woken", added);
    snapshot(capture)?;
    put("one Service added", running.events(EVENTS, |cluster, n| shape.add(cluster, shape.services + n))?);
    snapshot(capture)?;
    let removed = running.events(EVENTS, |cluster, n| {
        shape.remove(cluster, shape.services + n);
        Ok(())
    })?;
    put("one Service removed", removed);
    snapshot(capture)?;
    running.stop()?;

    let opening = Instant::now();
    let running = Running::start(shape, &cluster)?;
    let opened = running.opened;
    running.wait("the warm restart", |running| running.view.health().passes > 0)?;
    let passed = running.view.health().last_clean_pass.context("no pass")?;
    let work = running.view.work();
    let restart = passed.saturating_duration_since(opened);
    let sample = between(&Work::default(), &work, 1);
    put("warm restart", Sample { ms: ms(restart), ..sample });
    put(
        "opening the handles",
        Sample { ms: ms(opened.saturating_duration_since(opening)), ..Sample::default() },
    );
    put("warm restart: tables", Sample { ms: ms(restart.saturating_sub(work.rules)), ..sample });
    running.wait("an audit", |running| running.view.work().audits > 0)?;
    std::thread::sleep(Duration::from_millis(20));
    put(
        "one endpoint removed",
        running.events(EVENTS, |cluster, n| shape.set_endpoints(cluster, n * stride, ENDPOINTS))?,
    );
    snapshot(capture)?;
    running.stop()?;

    if let Some(folder) = capture {
        let [start, endpoints, services, fewer, drained] =
            states.as_slice().try_into().ok().map(|states: &[Tables; 5]| states).context("five states")?;
        let script = Script {
            digest: start.digest(),
            cold: cold(start)?,
            endpoints_added: steps(start, endpoints)?,
            services_added: steps(endpoints, services)?,
            services_removed: steps(services, fewer)?,
            endpoints_removed: steps(fewer, drained)?,
        };
        let expected = usize::try_from(EVENTS)?;
        for part in [
            &script.endpoints_added,
            &script.services_added,
            &script.services_removed,
            &script.endpoints_removed,
        ] {
            ensure!(part.len() == expected, "{} of {expected} events are in the kernel", part.len());
        }
        script.save(&folder.join("script"))?;
        std::fs::write(folder.join("ipvsadm"), start.ipvsadm()?)?;
    }
    Ok(samples)
}

/// When the API server's own Service was in the kernel.
fn api_service_served() -> Result<Instant> {
    let mut handle = ipvs::Handle::open()?;
    let server =
        ipvs::VirtualServerKey::Address { protocol: ipvs::Protocol::Tcp, address: API_ADDRESS, port: 443 };
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if handle.dump_destinations(server).is_ok_and(|found| !found.is_empty()) {
            return Ok(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("no Service came in a minute")
}

/// What the usual commands need to make the same state.
fn save_commands(folder: &Path) -> Result<()> {
    let output = Command::new("ipset").arg("save").output().context("cannot run ipset")?;
    ensure!(output.status.success(), "ipset save: {}", output.status);
    std::fs::write(folder.join("ipset"), output.stdout)?;
    for family in ferroute_iptables::Family::BOTH {
        let Ok(found) = ferroute_iptables::Command::detect(family, None) else { continue };
        let variant = found.command.variant().name();
        let program = if family == ferroute_iptables::Family::V4 { "iptables" } else { "ip6tables" };
        let save = format!("{program}-{variant}-save");
        let output = Command::new(&save).output().with_context(|| format!("cannot run {save}"))?;
        ensure!(output.status.success(), "{save}: {}", output.status);
        std::fs::write(folder.join(format!("{program}-{variant}-restore")), output.stdout)?;
    }
    Ok(())
}

/// The floor's sockets.
struct Sockets {
    sets: Socket,
    servers: Socket,
    routes: Socket,
}

impl Sockets {
    fn open() -> Result<Self> {
        Ok(Self {
            sets: Socket::open(Protocol::Netfilter)?,
            servers: Socket::open(Protocol::Generic)?,
            routes: Socket::open(Protocol::Route)?,
        })
    }

    fn replay(&mut self, step: &Step) -> Result<()> {
        for (socket, batch) in [
            (&mut self.sets, &step.sets),
            (&mut self.servers, &step.servers),
            (&mut self.routes, &step.routes),
        ] {
            if !batch.is_empty() {
                let failures = socket.execute(batch)?;
                ensure!(failures.is_empty(), "the floor was refused: {:?}", failures.first());
            }
        }
        Ok(())
    }

    /// Reads every table and drops the answers.
    fn read(&mut self, servers: &[Batch]) -> Result<()> {
        let mut batch = Batch::new();
        batch.message(6 << 8 | 7, flags::DUMP, |body| {
            body.raw(&[2, 0, 0, 0]);
            body.u8(1, 7);
        });
        self.sets.dump(&batch, |_, _| Ok(None::<()>))?;
        batch.clear();
        let family = ipvs_family()?;
        ipvs::wire::get_servers(&mut batch, family);
        self.servers.dump(&batch, |_, _| Ok(None::<()>))?;
        for request in servers {
            self.servers.dump(request, |_, _| Ok(None::<()>))?;
        }
        for family in [2, 10] {
            batch.clear();
            batch.message(26, flags::DUMP, |body| {
                body.raw(&[family, 0, 0, 0, 255, PROTOCOL, 0, 0, 0, 0, 0, 0]);
                body.u32(15, TABLE_LOCAL);
            });
            // "No such table" where the family has no route in it.
            let _ = self.routes.dump(&batch, |_, _| Ok(None::<()>));
        }
        Ok(())
    }

    fn messages(&self) -> f64 {
        (self.sets.messages_sent() + self.servers.messages_sent() + self.routes.messages_sent()) as f64
    }
}

fn measured(sockets: &mut Sockets, steps: &[Step]) -> Result<Sample> {
    let before = sockets.messages();
    let mut times = Vec::new();
    for step in steps {
        let started = Instant::now();
        sockets.replay(step)?;
        times.push(ms(started.elapsed()));
        // Like ferroute, which waits for the next event.
        std::thread::sleep(Duration::from_millis(2));
    }
    let count = steps.len().max(1) as f64;
    Ok(Sample { ms: median(times), written: (sockets.messages() - before) / count, asked: 0.0 })
}

/// One run of the floor: the script's messages, already encoded. With `verify` the tables are read
/// back after the cold start and compared with ferroute's.
pub fn floor(folder: &Path, verify: bool) -> Result<Samples> {
    enter_namespace()?;
    ip("link add kube-dummy-if type dummy")?;
    ip("link set kube-dummy-if up")?;
    let script = Script::load(&folder.join("script"))?;
    let mut samples = Samples::new();
    let mut sockets = Sockets::open()?;
    let tables = measured(&mut sockets, std::slice::from_ref(&script.cold))?;
    if verify {
        ensure!(
            Tables::read()?.digest() == script.digest,
            "the floor's messages do not make the state that ferroute made"
        );
    }
    let started = Instant::now();
    restore_chains(folder)?;
    let chains = ms(started.elapsed());
    samples.insert("cold start".into(), Sample { ms: tables.ms + chains, ..tables });
    samples.insert("cold start: tables".into(), tables);
    samples.insert("cold start: chains".into(), Sample { ms: chains, ..Sample::default() });

    let family = ipvs_family()?;
    let mut requests = Vec::new();
    for key in ipvs::Handle::open()?.dump()?.keys() {
        let mut batch = Batch::new();
        ipvs::wire::get_destinations(&mut batch, family, key);
        requests.push(batch);
    }
    let before = sockets.messages();
    let started = Instant::now();
    sockets.read(&requests)?;
    let audit = Sample { ms: ms(started.elapsed()), written: 0.0, asked: sockets.messages() - before };
    samples.insert("full audit".into(), audit);
    samples.insert("warm restart: tables".into(), audit);

    // Twice on the same messages would be refused, so half of them after a wake-up.
    let (plain, woken) = script.endpoints_added.split_at(script.endpoints_added.len() / 2);
    samples.insert("one endpoint added, woken".into(), after_wake(&mut sockets, woken)?);
    samples.insert("one endpoint added".into(), measured(&mut sockets, plain)?);
    for (name, part) in [
        ("one Service added", &script.services_added),
        ("one Service removed", &script.services_removed),
        ("one endpoint removed", &script.endpoints_removed),
    ] {
        samples.insert(name.into(), measured(&mut sockets, part)?);
    }
    Ok(samples)
}

/// As [`measured`], but from a change of the shared state that wakes the thread which replays: what the
/// hand-over between decoder and room costs by itself.
fn after_wake(sockets: &mut Sockets, steps: &[Step]) -> Result<Sample> {
    let cluster = Cluster::new();
    let subscription = cluster.subscribe();
    let before = sockets.messages();
    let mut times = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let replayer = scope.spawn(|| -> Result<()> {
            for step in steps {
                let dirty = subscription.wait(Duration::from_secs(60), Duration::ZERO);
                sockets.replay(step)?;
                times.push(ms(dirty.since.context("no change came")?.elapsed()));
            }
            Ok(())
        });
        for index in 0..steps.len() {
            std::thread::sleep(Duration::from_millis(2));
            cluster.apply_node(Node { name: format!("n{index}").into(), ..Node::default() });
        }
        replayer.join().map_err(|_| anyhow::anyhow!("the replaying thread panicked"))?
    })?;
    let count = steps.len().max(1) as f64;
    Ok(Sample { ms: median(times), written: (sockets.messages() - before) / count, asked: 0.0 })
}

/// One program per family, all tables in one document.
fn restore_chains(folder: &Path) -> Result<()> {
    for (program, file) in restores(folder)? {
        restore(&[&program, "--noflush"], &file)?;
    }
    Ok(())
}

fn restores(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with("-restore") {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn restore(command: &[&str], file: &Path) -> Result<()> {
    let (program, arguments) = command.split_first().context("no command")?;
    let status = Command::new(program)
        .args(arguments)
        .stdin(std::fs::File::open(file)?)
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}

/// The usual commands, once.
pub fn commands(folder: &Path) -> Result<Samples> {
    enter_namespace()?;
    let mut samples = Samples::new();
    for (name, command) in [("ipset", ["ipset", "restore"]), ("ipvsadm", ["ipvsadm", "--restore"])] {
        let started = Instant::now();
        restore(&command, &folder.join(name))?;
        samples.insert(command.join(" "), Sample { ms: ms(started.elapsed()), ..Sample::default() });
    }
    Ok(samples)
}
