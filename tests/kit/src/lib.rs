//! A cluster in one kernel, for tests.
//!
//! Nodes, pods, an outside client and a router are network namespaces of this process; pods are echo
//! servers inside it; the `ferroute` binary runs once per node with its real command line.
//!
//! - [`netns`]: one namespace, entered per closure, gone when dropped.
//! - [`link`]: links, addresses and routes by rtnetlink, written apart from the code under test.
//! - [`cluster`]: the layout: nodes, router, client, pod CIDRs, Node objects.
//! - [`pod`] and [`workload`]: pods and the echo servers they run.
//! - [`traffic`]: clients, request tallies, steady load and long-lived flows.
//! - [`reach`]: who reaches whom, thousands of attempts a second.
//! - [`daemon`]: a real process in a node: start, ready, terminate, kill, logs.
//! - [`kubelet`]: pods that the API server assigned come alive.
//! - [`snapshot`] and [`stranger`]: what the kernel holds, and objects that must stay untouched.
//! - [`kernel`]: what this kernel offers; says what is missing outside a lab.
//! - [`mod@assert`]: poll to a deadline; a failure prints desired, actual and difference.
//!
//! Test binaries that use it are named `lab_*` and run through `scripts/lab`. Each test takes
//! [`serial`] first and builds its own cluster.

pub mod assert;
pub mod cluster;
pub mod daemon;
pub mod http;
pub mod kernel;
pub mod kubelet;
pub mod link;
pub mod netns;
pub mod pod;
pub mod reach;
pub mod router;
pub mod snapshot;
pub mod stranger;
pub mod traffic;
pub mod workload;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use cluster::{Cluster, Families, Node};
pub use daemon::Daemon;
pub use kubelet::Kubelet;
pub use netns::Netns;
pub use pod::{Pod, PodSpec};
pub use reach::{Host, Outcome, Probe, Prober};
pub use snapshot::KernelSnapshot;
pub use stranger::Stranger;
pub use traffic::{Answer, Flow, Load, Protocol, Reply, Tally};

static SERIAL: Mutex<()> = Mutex::new(());

/// Held by each lab test while it runs: the lab kernel has one CPU and one set of modules, so tests
/// of a binary run one after the other. A failed test does not stop the next.
pub fn serial() -> MutexGuard<'static, ()> {
    SERIAL.lock().unwrap_or_else(PoisonError::into_inner)
}
