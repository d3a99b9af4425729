//! One run of the policy room, in process.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferroute::cluster::Cluster;
use ferroute::netpol::{Room, Services, Settings, View};
use ferroute::report::Reporter;
use ferroute_policy::UnknownPods;

use super::cluster::{self, LOCAL_PODS};
use super::floor::{Recorder, State};
use super::{EVENTS, Run, Sample};
use crate::shape::NODE;
use crate::sides::{enter_namespace, median};

/// The numbers of the room's own metrics that a row needs.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    changes: f64,
    seconds: f64,
    messages: f64,
    restores: f64,
}

fn work(view: &View) -> Work {
    let mut text = String::new();
    view.metrics(&mut text);
    let value = |name: &str| {
        text.lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter_map(|rest| rest.trim().parse::<f64>().ok())
            .sum()
    };
    Work {
        changes: value("ferroute_netpol_enforcement_seconds_count"),
        seconds: value("ferroute_netpol_enforcement_seconds_sum"),
        messages: value("ferroute_netpol_netlink_messages_total{table=\"ipset\",purpose=\"write\"}"),
        restores: value("ferroute_netpol_chain_writes_total"),
    }
}

struct Running {
    cluster: Cluster,
    view: View,
    thread: std::thread::JoinHandle<Result<(), ferroute::netpol::Error>>,
}

impl Running {
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

    /// The median of events that `cause` makes one after another; the state after each goes to `recorder`.
    fn events(
        &self,
        recorder: &mut Option<Recorder>,
        mut cause: impl FnMut(&Cluster, u32) -> Result<()>,
    ) -> Result<Sample> {
        let before = work(&self.view);
        let mut times = Vec::new();
        for index in 0..EVENTS {
            let last = work(&self.view);
            cause(&self.cluster, index)?;
            self.wait("an event", |running| work(&running.view).changes > last.changes)?;
            times.push((work(&self.view).seconds - last.seconds) * 1000.0);
            if let Some(recorder) = recorder {
                recorder.record()?;
            }
        }
        let after = work(&self.view);
        let each = |first: f64, last: f64| (last - first) / f64::from(EVENTS);
        Ok(Sample {
            ms: median(times),
            messages: each(before.messages, after.messages),
            restores: each(before.restores, after.restores),
            ..Sample::default()
        })
    }
}

/// The room as a node runs it, without a proxy of ours beside it.
pub fn settings() -> Result<Settings> {
    Ok(Settings {
        node_name: NODE.into(),
        audit_period: Duration::from_secs(300),
        unknown_pods: UnknownPods::Deny,
        services: Services::Foreign {
            cluster: vec!["10.96.0.0/12".parse()?],
            external: Vec::new(),
            load_balancer: Vec::new(),
            node_ports: 30_000..=32_767,
        },
    })
}

fn start(cluster: &Cluster) -> Result<Running> {
    let (room, view) = Room::open(settings()?, cluster.subscribe(), Reporter::new(NODE))?;
    let thread = std::thread::Builder::new().name("netpol".into()).spawn(move || room.run())?;
    // Until it waits for the first list.
    std::thread::sleep(Duration::from_millis(50));
    Ok(Running { cluster: cluster.clone(), view, thread })
}

/// One run. With `capture` the kernel is read after each event and the floor's script written to that
/// folder; such a run's times are not to be used.
pub fn room(policies: u32, capture: Option<&Path>) -> Result<Run> {
    enter_namespace()?;
    let cluster = Cluster::new();
    cluster::fill(&cluster, policies)?;
    let running = start(&cluster)?;
    let mut run = Run::default();
    let started = Instant::now();
    cluster::NEEDED.into_iter().for_each(|kind| cluster.set_listed(kind));
    running.wait("the cold start", |running| running.view.health().last_clean_pass.is_some())?;
    let passed = running.view.health().last_clean_pass.context("no pass")?;
    let cold = work(&running.view);
    let mut put = |name: &str, sample: Sample| run.samples.insert(name.to_owned(), sample);
    put(
        "cold start",
        Sample {
            ms: passed.saturating_duration_since(started).as_secs_f64() * 1000.0,
            messages: cold.messages,
            restores: cold.restores,
            ..Sample::default()
        },
    );

    let mut recorder = capture.map(|_| Recorder::start()).transpose()?;
    if let Some(folder) = capture {
        State::save_commands(folder)?;
    }
    put(
        "policy added",
        running.events(&mut recorder, |cluster, n| {
            cluster::add_policy(cluster, 0, n, "more");
            Ok(())
        })?,
    );
    put(
        "pod added",
        running.events(&mut recorder, |cluster, n| {
            let at = [10, 1, 2, u8::try_from(n + 2)?].into();
            cluster::add_pod(cluster, 0, n, "new", at, true);
            Ok(())
        })?,
    );
    put(
        "label changed",
        running.events(&mut recorder, |cluster, n| {
            cluster::relabel(cluster, &cluster::pod_key(0, n, "new"), n + 1)
        })?,
    );
    put(
        "pod removed",
        running.events(&mut recorder, |cluster, n| {
            cluster.delete_pod(&cluster::pod_key(0, n, "new"));
            Ok(())
        })?,
    );
    put(
        "policy removed",
        running.events(&mut recorder, |cluster, n| {
            cluster::remove_policy(cluster, 0, n, "more");
            Ok(())
        })?,
    );
    if let (Some(folder), Some(recorder)) = (capture, recorder) {
        recorder.save(folder)?;
    }
    let isolated = running.view.status(Duration::from_secs(10)).context("no status")?;
    ensure!(isolated.in_sync(), "the kernel differs from what is wanted");
    run.resident = resident()?;
    running.view.stop();
    running.thread.join().map_err(|_| anyhow::anyhow!("the room panicked"))??;
    ensure!(LOCAL_PODS > 0 && policies > 0, "nothing was enforced");
    Ok(run)
}

/// Resident memory of this process in MiB.
fn resident() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}
