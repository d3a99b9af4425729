//! What other threads see of the room: health, status, metrics, and how to stop it.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::learned::Feed;
use super::own_addresses::OwnAddresses;
use crate::cluster::Waker;
use crate::health::Passes;
use crate::metrics::{Histogram, head, line, lock};

/// Asks for the status; the room answers between two passes.
pub(super) type Request = SyncSender<Status>;

/// Numbers written by the room and read by everybody.
#[derive(Default)]
pub(super) struct Numbers {
    pub(super) learned: AtomicU64,
    pub(super) routes: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) tunnels: AtomicU64,
    pub(super) drift: AtomicU64,
    pub(super) audits: AtomicU64,
    /// Netlink messages about links and routes, then sets: written and asked.
    pub(super) messages: Mutex<[(u64, u64); 2]>,
    pub(super) passes: Mutex<Histogram>,
}

pub(super) struct Shared {
    stopping: AtomicBool,
    health: Mutex<Passes>,
    pub(super) numbers: Numbers,
    pub(super) own: OwnAddresses,
}

impl Shared {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn turned(&self, now: Instant) {
        lock(&self.health).last_turn = now;
    }

    pub(super) fn passed(&self, started: Instant) {
        let now = Instant::now();
        lock(&self.health).passed(now);
        lock(&self.numbers.passes).observe(now - started);
    }

    pub(super) fn failed(&self, started: Instant) {
        lock(&self.health).failures += 1;
        lock(&self.numbers.passes).observe(started.elapsed());
    }

    pub(super) fn error(&self, error: &impl Display) {
        lock(&self.health).last_error = Some(error.to_string());
    }

    pub(super) fn last_error(&self) -> Option<String> {
        lock(&self.health).last_error.clone()
    }
}

/// What the room wants, has and refuses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// This node's addresses by purpose and family.
    pub addresses: Vec<String>,
    /// What stands against them.
    pub address_problems: Vec<String>,
    /// What stands against this node's pods.
    pub problems: Vec<String>,
    /// Prefixes learned.
    pub learned: usize,
    /// Families of which all was heard since the speaker began.
    pub complete: Vec<String>,
    /// Routes as programmed, one line each.
    pub routes: Vec<String>,
    /// Learned prefixes that are not programmed, and why.
    pub refused: Vec<String>,
    /// Tunnels as programmed.
    pub tunnels: Vec<String>,
    /// Largest packet of pods, in bytes; none before it is known.
    pub mtu: Option<u32>,
    /// What would be written now to make actual equal desired, but for learned routes and their tunnels.
    pub difference: Vec<String>,
    /// What failed last.
    pub errors: Vec<String>,
}

impl Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "pod network: {} prefixes learned, {} routes, {} tunnels, {} refused",
            self.learned,
            self.routes.len(),
            self.tunnels.len(),
            self.refused.len()
        )?;
        for (what, lines) in [
            ("address", &self.addresses),
            ("address problem", &self.address_problems),
            ("problem:", &self.problems),
            ("complete", &self.complete),
            ("route", &self.routes),
            ("tunnel", &self.tunnels),
            ("refused", &self.refused),
            ("would", &self.difference),
            ("error", &self.errors),
        ] {
            for line in lines {
                writeln!(f, "  {what} {line}")?;
            }
        }
        match self.mtu {
            Some(mtu) => writeln!(f, "  MTU of pods {mtu}"),
            None => Ok(()),
        }
    }
}

/// A handle on the running room. Cheap to clone.
#[derive(Clone)]
pub struct View {
    shared: Arc<Shared>,
    requests: Sender<Request>,
    waker: Waker,
    feed: Feed,
}

impl View {
    pub(super) fn new(waker: Waker) -> (Self, Arc<Shared>, Receiver<Request>, Feed) {
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            health: Mutex::new(Passes::new(Instant::now())),
            numbers: Numbers::default(),
            own: OwnAddresses::default(),
        });
        let (requests, receiver) = channel();
        let feed = Feed::new(waker.clone());
        (Self { shared: shared.clone(), requests, waker, feed: feed.clone() }, shared, receiver, feed)
    }

    /// Where learned routes are put.
    pub fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// This node's addresses, as the room chose them.
    pub fn addresses(&self) -> OwnAddresses {
        self.shared.own.clone()
    }

    /// Ends the room's thread after the pass it is in. Kernel state stays.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// State of the room.
    pub fn health(&self) -> Passes {
        lock(&self.shared.health).clone()
    }

    /// What the room wants, has and refuses; `None` when it does not answer in time.
    pub fn status(&self, timeout: Duration) -> Option<Status> {
        let (reply, answer) = sync_channel(1);
        self.requests.send(reply).ok()?;
        self.waker.wake();
        answer.recv_timeout(timeout).ok()
    }

    /// Netlink messages that wrote, so far: links and routes, then sets.
    pub fn writes(&self) -> [u64; 2] {
        lock(&self.shared.numbers.messages).map(|(written, _)| written)
    }

    /// Writes the room's metrics in Prometheus text format.
    pub fn metrics(&self, out: &mut String) {
        let health = self.health();
        write(out, &self.shared.numbers, (health.passes, health.failures));
    }
}

fn write(out: &mut String, numbers: &Numbers, (passes, failures): (u64, u64)) {
    let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
    for (name, kind, help, value) in [
        ("ferroute_network_learned_prefixes", "gauge", "Prefixes learned by BGP", load(&numbers.learned)),
        ("ferroute_network_routes", "gauge", "Routes of ours in the kernel", load(&numbers.routes)),
        (
            "ferroute_network_refused_prefixes",
            "gauge",
            "Learned prefixes that are not programmed, see ferroute status",
            load(&numbers.refused),
        ),
        ("ferroute_network_tunnels", "gauge", "Tunnels to other nodes", load(&numbers.tunnels)),
        (
            "ferroute_network_drift_repaired_total",
            "counter",
            "Routes, rules, tunnels and set entries that differed from what was programmed and were put right",
            load(&numbers.drift),
        ),
        ("ferroute_network_audits_total", "counter", "Audits of the kernel", load(&numbers.audits)),
        (
            "ferroute_network_passes_total",
            "counter",
            "Passes after which the kernel held all that was wanted",
            passes,
        ),
        ("ferroute_network_pass_failures_total", "counter", "Passes that left something undone", failures),
    ] {
        head(out, name, kind, help);
        line(out, name, "", value);
    }
    const MESSAGES: &str = "ferroute_network_netlink_messages_total";
    head(out, MESSAGES, "counter", "Netlink messages sent by the pod network room, by table and purpose");
    for (table, (written, asked)) in ["route", "ipset"].iter().zip(*lock(&numbers.messages)) {
        for (purpose, count) in [("write", written), ("read", asked)] {
            line(out, MESSAGES, &format!("{{table=\"{table}\",purpose=\"{purpose}\"}}"), count);
        }
    }
    lock(&numbers.passes).write(out, "ferroute_network_pass_seconds", "Time of one pass in seconds");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_there_once_under_its_name() {
        let numbers = Numbers::default();
        numbers.routes.store(3, Ordering::Relaxed);
        let mut out = String::new();
        write(&mut out, &numbers, (7, 1));
        for text in [
            "ferroute_network_routes 3\n",
            "ferroute_network_passes_total 7\n",
            "ferroute_network_netlink_messages_total{table=\"route\",purpose=\"write\"} 0\n",
        ] {
            assert!(out.contains(text), "{text} is missing in\n{out}");
        }
        let mut names: Vec<&str> = out.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn the_status_is_one_line_for_each_thing() {
        let status = Status {
            learned: 2,
            routes: vec!["unicast 10.1.0.0/24".to_owned()],
            refused: vec!["10.2.0.0/24: no".to_owned()],
            mtu: Some(1480),
            ..Status::default()
        };
        assert_eq!(
            status.to_string(),
            "pod network: 2 prefixes learned, 1 routes, 0 tunnels, 1 refused\n  route unicast 10.1.0.0/24\n  refused \
             10.2.0.0/24: no\n  MTU of pods 1480\n"
        );
    }
}
