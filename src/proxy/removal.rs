//! `--cleanup-config` for the Service room: takes away exactly what is ours, and nothing twice.
//!
//! Needs no API server and no state of a running daemon: what is ours is known by name (sets,
//! chains, the dummy link), by number (routes, marks) and, for virtual servers, by the set of VIP
//! ports, which is therefore destroyed last.

use ferroute_iptables::Family;
use ferroute_iptables::ipset::{self, Entry};
use ferroute_ipvs as ipvs;

use super::kernel::{DUMMY_LINK, set_names};
use super::marks;
use super::rules::CHAINS;
use super::sets::{Role, SetId};
use crate::chains;
use crate::cleanup::{Cleanup, present};
use crate::host::Network;
use crate::host::route::{PROTOCOL, RouteChange, RouteFilter, TABLE_LOCAL};

/// Removes chains and jumps, virtual servers, routes, the dummy link and sets, in this order: rules
/// before the sets they name, virtual servers while the set still tells which are ours. Every
/// failure is told and the rest is still done. With `dry_run` only tells.
///
/// Sysctls stay: other programs may rely on them by now.
pub fn cleanup(dry_run: bool) -> Cleanup {
    let mut cleanup = Cleanup::default();
    chains::remove_everywhere(&CHAINS, dry_run, &mut cleanup);
    match ipset::Handle::open() {
        Ok(mut sets) => {
            remove_servers(&mut cleanup, &mut sets, dry_run);
            remove_routes(&mut cleanup, dry_run);
            let ours = |kernel: &[ipset::Header]| present(set_names(&Family::BOTH), kernel);
            cleanup.destroy_sets_in(&mut sets, ours, dry_run);
        }
        Err(ipset::Error::NoKernelSupport) => remove_routes(&mut cleanup, dry_run),
        Err(error) => {
            cleanup.failures.push(error.to_string());
            remove_routes(&mut cleanup, dry_run);
        }
    }
    cleanup
}

fn remove_servers(cleanup: &mut Cleanup, sets: &mut ipset::Handle, dry_run: bool) {
    let mut handle = match ipvs::Handle::open() {
        Ok(handle) => handle,
        Err(ipvs::Error::NoIpvs) => return,
        Err(error) => return cleanup.failures.push(error.to_string()),
    };
    let table = match handle.dump() {
        Ok(table) => table,
        Err(error) => return cleanup.failures.push(error.to_string()),
    };
    let mut listed = Vec::new();
    for family in Family::BOTH {
        match sets.list(SetId { role: Role::VipPorts, family }.name()) {
            Ok(Some(set)) => listed.extend(set.entries().keys().copied()),
            Ok(None) => {}
            Err(error) => cleanup.failures.push(error.to_string()),
        }
    }
    listed.sort_unstable();
    let is_ours = |key: &ipvs::VirtualServerKey| match *key {
        ipvs::VirtualServerKey::Mark { mark, .. } => marks::is_ours(mark),
        ipvs::VirtualServerKey::Address { protocol, address, port } => {
            let entry = Entry::IpPort(address, ferroute_iptables::Protocol(protocol.number()), port);
            listed.binary_search(&entry).is_ok()
        }
    };
    let mut keys: Vec<_> = table.keys().filter(|key| is_ours(key)).copied().collect();
    keys.sort_unstable();
    let changes: Vec<_> = keys.iter().map(|key| ipvs::Change::DeleteServer { key: *key }).collect();
    let failures = if dry_run { Ok(Vec::new()) } else { handle.apply(&changes) };
    match failures {
        Ok(failures) => {
            for (index, key) in keys.iter().enumerate() {
                match failures.iter().find(|failure| failure.index == index) {
                    Some(failure) => cleanup.failures.push(failure.error.to_string()),
                    None => cleanup.removed.push(format!("virtual server {key}")),
                }
            }
        }
        Err(error) => cleanup.failures.push(error.to_string()),
    }
}

fn remove_routes(cleanup: &mut Cleanup, dry_run: bool) {
    if let Err(error) = try_remove_routes(cleanup, dry_run) {
        cleanup.failures.push(error.to_string());
    }
}

fn try_remove_routes(cleanup: &mut Cleanup, dry_run: bool) -> Result<(), crate::host::Error> {
    let mut network = Network::open()?;
    let filter = RouteFilter { protocol: Some(PROTOCOL), table: Some(TABLE_LOCAL), ..RouteFilter::default() };
    let routes = network.routes(filter)?;
    let changes: Vec<_> = routes.iter().map(|route| RouteChange::Delete(*route)).collect();
    let failures = if dry_run { Vec::new() } else { network.apply_routes(&changes)? };
    for (index, route) in routes.iter().enumerate() {
        match failures.iter().find(|failure| failure.change == index) {
            Some(failure) => cleanup.failures.push(failure.error.to_string()),
            None => cleanup.removed.push(format!("route {route}")),
        }
    }
    if let Some(link) = network.link(DUMMY_LINK)? {
        if link.kind.as_deref() == Some("dummy") {
            if !dry_run {
                network.delete_link(link.index)?;
            }
            cleanup.removed.push(format!("link {DUMMY_LINK}"));
        } else {
            cleanup.failures.push(format!("link {DUMMY_LINK} is no dummy link, so it is not ours; it stays"));
        }
    }
    Ok(())
}
