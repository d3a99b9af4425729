//! Where the time of a cold start goes that is not the kernel's: needs no kernel, for profilers.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;
use ferroute::cluster::{Cluster, ServiceKey};
use ferroute::host::route::RouteChange;
use ferroute::proxy::desired::desired;
use ferroute::proxy::drain::{Drains, Now};
use ferroute::proxy::facts::Facts;
use ferroute::proxy::hold::Hold;
use ferroute::proxy::ledger::{Ledger, Touched};
use ferroute::proxy::mirror::{Mirror, Scope, diff};
use ferroute_iptables::{Family, ipset};
use ferroute_ipvs as ipvs;
use ferroute_netlink::Batch;

use crate::shape::Shape;

/// Services per step, as in the room.
const STEP: usize = 512;

/// Computes, compares and encodes a cold start, then compares everything once more, and prints the
/// time of each.
pub fn pure(shape: &Shape) -> Result<()> {
    let cluster = Cluster::new();
    let mut spent: Vec<(&str, Duration)> = Vec::new();
    let mut note = |what: &'static str, since: Instant| {
        let elapsed = since.elapsed();
        match spent.iter_mut().find(|(known, _)| *known == what) {
            Some((_, sum)) => *sum += elapsed,
            None => spent.push((what, elapsed)),
        }
    };
    let since = Instant::now();
    shape.fill(&cluster)?;
    note("fill the shared state", since);
    let settings = shape.settings()?;
    let host = ["192.0.2.11".parse()?];
    let facts = Facts::gather(&settings, &cluster.read(), &host, true);
    let mut ledger = Ledger::new(&Family::BOTH);
    ledger.put_node(&facts);
    let (mut mirror, mut drains, missing) = (Mirror::default(), Drains::default(), BTreeSet::new());
    let keys: BTreeSet<ServiceKey> = cluster.read().services.keys().cloned().collect();
    let mut batch = Batch::new();
    let period = settings.graceful_period;
    let (hold, now) = (Hold::default(), Now { instant: Instant::now(), boot_seconds: 1 });
    for step in keys.iter().collect::<Vec<_>>().chunks(STEP) {
        let mut touched = Touched::default();
        for key in step {
            let since = Instant::now();
            let state = {
                let state = cluster.read();
                state
                    .services
                    .get(*key)
                    .map(|service| desired(service, state.slices.get(*key), &facts, &settings, &missing))
            };
            note("desired", since);
            let since = Instant::now();
            ledger.put_into(key, state, &mut touched);
            note("ledger", since);
        }
        let since = Instant::now();
        let scope = Scope::Touched(&touched);
        let changes = diff(&mirror, &ledger, &mut drains, &hold, &facts, 3, &scope, period, || now);
        note("diff", since);
        let since = Instant::now();
        let _ = changes.udp(&mirror, |key| ledger.protocol(key));
        note("udp", since);
        let since = Instant::now();
        batch.clear();
        for change in &changes.servers {
            ipvs::wire::change(&mut batch, 33, change);
        }
        note("encode", since);
        let since = Instant::now();
        ipset::apply_to(&mut mirror.sets, &changes.sets_first);
        for change in &changes.routes {
            if let RouteChange::Add(route) | RouteChange::Replace(route) = change {
                mirror.routes.insert(route.key, *route);
            }
        }
        for (key, wanted) in changes.wanted {
            if let Some(server) = wanted {
                mirror.servers.insert(key, server);
            }
        }
        note("mirror", since);
    }
    let since = Instant::now();
    let changes = diff(&mirror, &ledger, &mut drains, &hold, &facts, 3, &Scope::All, period, || now);
    note("compare all", since);
    println!("{} changes left", changes.len());
    for (what, time) in spent {
        println!("{what:<24} {:>10.3} ms", time.as_secs_f64() * 1000.0);
    }
    Ok(())
}
