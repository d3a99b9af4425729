//! `--cleanup-config` for the pod network: its chains, sets, routes, rules and tunnels, and nothing else.
//! What is ours is known by name or by protocol number, so no API server and no running daemon is needed.
//!
//! The network configuration of runtimes and MTUs stay: they belong to whoever comes next.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::egress::{BRIDGE, CHAINS, set_names};
use super::fib::TABLE_PODS;
use super::overlay;
use crate::chains;
use crate::cleanup::{Cleanup, present};
use crate::host::fou::Listeners;
use crate::host::route::{PROTOCOL, RouteChange, RouteFilter, TABLE_MAIN};
use crate::host::rule::RuleChange;
use crate::host::tunnel::Encapsulation;
use crate::host::{Error, Network};

/// Removes chains, then the sets they name; routes and rules, then the tunnels they lead to; the pod
/// bridge where nobody uses it. Every failure is told and the rest is still done. With `dry_run` only
/// tells.
pub fn cleanup(dry_run: bool) -> Cleanup {
    let mut cleanup = Cleanup::default();
    chains::remove_everywhere(&CHAINS, dry_run, &mut cleanup);
    cleanup.destroy_sets(|kernel| present(set_names(), kernel), dry_run);
    match Network::open() {
        Ok(mut network) => {
            let steps: [Step; 4] = [remove_rules, remove_routes, remove_tunnels, remove_bridge];
            for step in steps {
                if let Err(error) = step(&mut network, dry_run, &mut cleanup) {
                    cleanup.failures.push(error.to_string());
                }
            }
        }
        Err(error) => cleanup.failures.push(error.to_string()),
    }
    cleanup
}

type Step = fn(&mut Network, bool, &mut Cleanup) -> Result<(), Error>;

fn remove_rules(network: &mut Network, dry_run: bool, cleanup: &mut Cleanup) -> Result<(), Error> {
    let present = network.rules_into(TABLE_PODS)?;
    let changes = overlay::diff_rules(&present, &[]);
    let failures = if dry_run { Vec::new() } else { network.apply_rules(&changes)? };
    let failed: BTreeSet<usize> = failures.iter().map(|(index, _)| *index).collect();
    let gone = changes.iter().enumerate().filter(|(index, _)| !failed.contains(index));
    cleanup.removed.extend(gone.map(|(_, change): (usize, &RuleChange)| format!("rule {}", change.rule())));
    cleanup.failures.extend(failures.iter().map(|(_, error)| error.to_string()));
    Ok(())
}

fn remove_routes(network: &mut Network, dry_run: bool, cleanup: &mut Cleanup) -> Result<(), Error> {
    let mut routes = Vec::new();
    for table in [TABLE_MAIN, TABLE_PODS] {
        let filter = RouteFilter { protocol: Some(PROTOCOL), table: Some(table), ..RouteFilter::default() };
        routes.extend(network.forwarding_routes(filter)?);
    }
    let changes: Vec<_> = routes.iter().cloned().map(RouteChange::Delete).collect();
    let failures = if dry_run { Vec::new() } else { network.apply_routes(&changes)? };
    for (index, route) in routes.iter().enumerate() {
        match failures.iter().find(|failure| failure.change == index) {
            Some(failure) => cleanup.failures.push(failure.error.to_string()),
            None => cleanup.removed.push(format!("route {route}")),
        }
    }
    Ok(())
}

fn remove_tunnels(network: &mut Network, dry_run: bool, cleanup: &mut Cleanup) -> Result<(), Error> {
    let mut ports = BTreeSet::new();
    for found in network.tunnels()?.iter().filter(|found| overlay::is_ours(found)) {
        if let Encapsulation::Gue(port) = found.tunnel.encapsulation {
            ports.insert(port);
        }
        let outcome = if dry_run { Ok(()) } else { network.delete_link(found.link.index) };
        match outcome {
            Ok(()) => cleanup.removed.push(format!("link {} ({})", found.link.name, found.tunnel)),
            Err(error) => cleanup.failures.push(error.to_string()),
        }
    }
    if ports.is_empty() {
        return Ok(());
    }
    let Some(mut listeners) = Listeners::open()? else { return Ok(()) };
    for listener in listeners.list()? {
        if listener.gue && ports.contains(&listener.port) {
            if !dry_run {
                listeners.delete(listener)?;
            }
            cleanup.removed.push(format!("fou listener on port {} ({:?})", listener.port, listener.family));
        }
    }
    Ok(())
}

/// A bridge that has pods, or the address by which a plugin made it their gateway, stays: the network of
/// pods outlives whoever routed it.
fn remove_bridge(network: &mut Network, dry_run: bool, cleanup: &mut Cleanup) -> Result<(), Error> {
    let links = network.links()?;
    let Some(bridge) = links.iter().find(|link| link.name == BRIDGE) else { return Ok(()) };
    let has_pods = links.iter().any(|link| link.master == Some(bridge.index));
    if bridge.kind.as_deref() != Some("bridge") || has_pods {
        return Ok(());
    }
    // The kernel gives every link that is up an address of its own.
    let is_given = |address: IpAddr| !matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local());
    if network.addresses()?.iter().any(|at| at.link == bridge.index && is_given(at.address.addr())) {
        return Ok(());
    }
    if !dry_run {
        network.delete_link(bridge.index)?;
    }
    cleanup.removed.push(format!("link {BRIDGE}"));
    Ok(())
}
