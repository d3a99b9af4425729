//! The pass for Services: Services and endpoints to what the kernel must hold.
//!
//! - [`desired`], [`eligible`]: one Service to frontends, virtual servers and set entries. Pure.
//! - [`ledger`]: all Services together, one change at a time. Pure.
//! - [`mirror`]: the kernel as last known, and the difference. Pure.
//! - [`hold`]: leftovers that may belong to objects that cannot be read. Pure.
//! - [`drain`]: graceful removal, time passed in. Pure.
//! - [`rules`], [`sets`], [`marks`]: the constant chains, the sets they name, the marks. Pure.
//! - [`Programmed`]: the VIPs that are in the kernel, for whoever attracts traffic to them.
//! - `room`: the thread that wakes, compares and applies through `kernel`.

pub mod desired;
pub mod drain;
pub mod eligible;
mod error;
pub mod facts;
#[cfg(test)]
pub(crate) mod fixture;
mod healthcheck;
pub mod hold;
mod kernel;
pub mod ledger;
pub mod marks;
pub mod metrics;
pub mod mirror;
mod programmed;
mod removal;
mod room;
pub mod rules;
pub mod sets;
pub mod settings;
pub mod status;
mod view;
pub mod work;

use std::collections::BTreeSet;

pub use error::Error;
pub use programmed::Programmed;
pub use removal::cleanup;
pub use room::Room;
pub use settings::Settings;
pub use status::Status;
pub use view::View;
pub use work::Work;

use crate::cluster::Cluster;

/// What a pass would write now, without writing: reads the kernel once and compares.
pub fn plan(settings: &Settings, cluster: &Cluster) -> Result<Status, Error> {
    let mut kernel = kernel::Kernel::open_to_read()?;
    let mut ledger = ledger::Ledger::new(kernel.families());
    let host = kernel.host_addresses()?;
    let actual = kernel.read(settings, &ledger, &mirror::Mirror::default())?;
    let (facts, mut hold) = {
        let state = cluster.read();
        let facts = facts::Facts::gather(settings, &state, &host, kernel.has_ipv6());
        ledger.put_node(&facts);
        let causes = hold::Causes::of(&state, &facts.name);
        let hold = hold::Hold::begin(causes, &state, &actual, &facts, settings);
        for (key, service) in &state.services {
            let readable = state.slices.get(key);
            let held = hold.slices(key, readable);
            let slices = held.as_ref().or(readable);
            let wanted = desired::desired(service, slices, &facts, settings, &BTreeSet::new());
            ledger.put(key, Some(wanted));
        }
        (facts, hold)
    };
    hold.keep_leftovers(&actual, &ledger, &facts, kernel.device());
    Ok(Status::gather(
        settings,
        &facts,
        &ledger,
        &mut drain::Drains::default(),
        &hold,
        &mut kernel,
        &mirror::Mirror::default(),
    ))
}
