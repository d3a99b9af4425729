//! The pass for network policy: Pods, Namespaces and NetworkPolicies to chains and sets.
//!
//! What policies mean and which chains and sets they become is the crate `ferroute_policy`; here is
//! what keeps a kernel true to it.
//!
//! - [`gather`]: the cluster's objects in the policy crate's words. Pure.
//! - [`starting`]: pods whose network is being made, before the API server knows their addresses. Pure.
//! - [`order`]: in which order sets and chains change. Pure.
//! - [`exclude`]: what this kernel cannot take, left out so that the rest is enforced. Pure.
//! - [`hold`]: what stays as it was found while an object cannot be read. Pure.
//! - [`explain`]: whether a connection is allowed, by meaning and by the kernel. Pure.
//! - `room`: the thread that wakes, compares and applies through `kernel`.

mod error;
pub mod exclude;
pub mod explain;
pub mod gather;
pub mod hold;
mod kernel;
mod metrics;
pub mod order;
mod removal;
mod room;
pub mod settings;
pub mod starting;
pub mod status;
mod view;

pub use error::Error;
pub use explain::{Answer, Question, Unanswerable};
pub use removal::cleanup;
pub use room::Room;
pub use settings::{Services, Settings};
pub use starting::{NotProgrammed, StartingPod};
pub use status::Status;
pub use view::View;

use ferroute_iptables::Family;
use ferroute_policy::Index;

use crate::cluster::{Cluster, State};

/// What this node's kernel must hold for everything that the cluster says.
pub fn desired(settings: &Settings, state: &State, families: &[Family]) -> Index {
    let mut index = Index::new(gather::options(settings, families));
    let starting = starting::Starting::default();
    index.set_pod_networks(gather::pod_networks(state, &settings.node_name));
    for (name, namespace) in &state.namespaces {
        index.put_namespace(name, Some(namespace.labels.clone()));
    }
    for (key, pod) in &state.pods {
        index.put_pod(&gather::key(key), gather::pod(pod, &settings.node_name, &starting));
    }
    for (key, policy) in &state.network_policies {
        index.put_policy(&gather::key(key), Some(policy.policy.clone()));
    }
    index.settle();
    index
}

/// What a pass would write now, without writing: reads the kernel once and compares.
pub fn plan(settings: &Settings, cluster: &Cluster) -> Result<Status, Error> {
    let mut kernel = kernel::Kernel::open_to_read()?;
    let (mut index, networks) = {
        let state = cluster.read();
        let networks = gather::pod_networks(&state, &settings.node_name);
        (desired(settings, &state, kernel.families()), networks)
    };
    let starting = starting::Starting::default();
    let mut excluded = exclude::Excluded::default();
    let mut hold = hold::Hold::default();
    if hold::is_blind(&cluster.read()) {
        let (chains, sets) = (kernel.read_all_chains()?, kernel.read_sets()?);
        hold = hold::Hold::begin(&cluster.read(), &chains, &sets, &mut index);
        kernel.keep_chains(hold.chains());
    }
    Ok(Status::gather(settings, &networks, &index, &mut kernel, &mut excluded, &starting, &hold))
}
