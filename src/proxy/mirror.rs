//! The kernel tables of the Service room as last read or written, and what differs from desire.
//! Pure: a change is computed from the mirror and only for the keys that may have changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroute_iptables::ipset::{self, Sets};
use ferroute_ipvs as ipvs;
use ipnet::IpNet;

use super::drain::Drains;
use super::facts::Facts;
use super::ledger::{Ledger, Touched};
use crate::cluster::service::Protocol;
use crate::host::route::{self, Route, RouteChange, RouteKey};

/// Kernel state that is ours.
#[derive(Default)]
pub struct Mirror {
    /// Virtual servers.
    pub servers: ipvs::Table,
    /// Sets of ours.
    pub sets: Sets,
    /// Routes of ours to the dummy link.
    pub routes: BTreeMap<RouteKey, Route>,
}

/// Which keys to compare.
pub enum Scope<'a> {
    /// Every key on either side.
    All,
    /// Only these.
    Touched(&'a Touched),
}

/// Everything to write, in parts whose order is safety: sets before the rules that name them, a
/// virtual server before its VIP is bound; on removal first unbind, then delete.
#[derive(Default)]
pub struct Changes {
    /// Sets to create and entries to add.
    pub sets_first: Vec<ipset::Change>,
    /// Sets of another type than wanted: the rules that name them must go first.
    pub retype: Vec<ipset::Retype>,
    /// Virtual servers to create or update, with their destinations.
    pub servers: Vec<ipvs::Change>,
    /// VIPs to bind, then VIPs to unbind.
    pub routes: Vec<RouteChange>,
    /// Virtual servers to delete.
    pub servers_last: Vec<ipvs::Change>,
    /// Entries to remove.
    pub sets_last: Vec<ipset::Change>,
    /// What every compared virtual server must be afterwards.
    pub wanted: BTreeMap<ipvs::VirtualServerKey, Option<Arc<ipvs::VirtualServer>>>,
}

impl Changes {
    /// Number of writes.
    pub fn len(&self) -> usize {
        self.sets_first.len()
            + self.retype.len()
            + self.servers.len()
            + self.routes.len()
            + self.servers_last.len()
            + self.sets_last.len()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One line per change, for people.
    pub fn describe(&self) -> Vec<String> {
        let sets = |changes: &[ipset::Change]| changes.iter().flat_map(describe_set).collect::<Vec<_>>();
        let mut lines = sets(&self.sets_first);
        lines.extend(self.retype.iter().map(|retype| {
            format!("replace set {} of type {} by one of type {}", retype.set, retype.from, retype.to)
        }));
        lines.extend(self.servers.iter().map(ToString::to_string));
        lines.extend(self.routes.iter().map(|change| match change {
            RouteChange::Add(route) => format!("add route {route}"),
            RouteChange::Replace(route) => format!("replace route {route}"),
            RouteChange::Delete(route) => format!("delete route {route}"),
        }));
        lines.extend(self.servers_last.iter().map(ToString::to_string));
        lines.extend(sets(&self.sets_last));
        lines
    }

    /// Endpoints whose UDP flows became stale: removed ones, and VIPs that had nobody before.
    pub fn udp(
        &self,
        mirror: &Mirror,
        protocol: impl Fn(&ipvs::VirtualServerKey) -> Option<Protocol>,
    ) -> UdpChanges {
        let mut udp = UdpChanges::default();
        for (key, wanted) in &self.wanted {
            if protocol(key) != Some(Protocol::Udp) {
                continue;
            }
            let had = mirror.servers.get(key);
            let destinations = |server: Option<&Arc<ipvs::VirtualServer>>| -> BTreeSet<(IpAddr, u16)> {
                server.into_iter().flat_map(|s| s.destinations.iter().map(|d| (d.address, d.port))).collect()
            };
            let (before, after) = (destinations(had), destinations(wanted.as_ref()));
            if before.is_empty() && !after.is_empty() {
                udp.appeared.push(*key);
            }
            udp.removed.extend(before.difference(&after).map(|(address, port)| (*key, *address, *port)));
        }
        udp
    }
}

fn describe_set(change: &ipset::Change) -> Vec<String> {
    match change {
        ipset::Change::Create { set, kind, .. } => vec![format!("create set {set} of type {kind}")],
        ipset::Change::Add { set, entries } => {
            entries.iter().map(|(entry, _)| format!("add {entry} to set {set}")).collect()
        }
        ipset::Change::Delete { set, entries } => {
            entries.iter().map(|entry| format!("remove {entry} from set {set}")).collect()
        }
        ipset::Change::Replace { set, .. } => vec![format!("replace set {set} for other options")],
        ipset::Change::Destroy { set } => vec![format!("destroy set {set}")],
    }
}

/// UDP destinations that came or went.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct UdpChanges {
    /// Removed destinations.
    pub removed: Vec<(ipvs::VirtualServerKey, IpAddr, u16)>,
    /// Virtual servers that had no destination and now have one.
    pub appeared: Vec<ipvs::VirtualServerKey>,
}

/// Compares the mirror with the ledger. `device` is the index of the dummy link.
#[allow(clippy::too_many_arguments)]
pub fn diff(
    mirror: &Mirror,
    ledger: &Ledger,
    drains: &mut Drains,
    facts: &Facts,
    device: u32,
    scope: &Scope<'_>,
    period: Option<Duration>,
    now: Instant,
) -> Changes {
    let mut changes = Changes::default();

    let keys: BTreeSet<ipvs::VirtualServerKey> = match scope {
        Scope::All => mirror.servers.keys().chain(ledger.servers().keys()).copied().collect(),
        Scope::Touched(touched) => touched.servers.clone(),
    };
    let mut wanted = ipvs::Table::default();
    for key in &keys {
        let server = drains.effective(
            *key,
            ledger.protocol(key),
            mirror.servers.get(key),
            ledger.servers().get(key),
            period,
            now,
        );
        if let Some(server) = &server {
            wanted.insert(*key, server.clone());
        }
        changes.wanted.insert(*key, server);
    }
    for change in ipvs::diff(&mirror.servers, &wanted, keys) {
        match change {
            ipvs::Change::DeleteServer { .. } => changes.servers_last.push(change),
            _ => changes.servers.push(change),
        }
    }

    let difference = match scope {
        Scope::All => ipset::diff(&mirror.sets, ledger.sets()),
        Scope::Touched(touched) => {
            ipset::diff_entries(&mirror.sets, ledger.sets(), touched.entries.iter().copied())
        }
    };
    changes.retype = difference.retype;
    for change in difference.changes {
        match change {
            ipset::Change::Delete { .. } => changes.sets_last.push(change),
            _ => changes.sets_first.push(change),
        }
    }
    changes.sets_last.extend(difference.destroy);

    changes.routes = match scope {
        Scope::All => {
            let desired = desired_routes(ledger, facts, device);
            route::diff(mirror.routes.values(), desired.values())
        }
        Scope::Touched(touched) => {
            let mut actual = Vec::new();
            let mut desired = Vec::new();
            for vip in &touched.vips {
                let route = vip_route(*vip, facts, device);
                actual.extend(mirror.routes.get(&route.key));
                // A range may consist of one address: it stays bound whatever Services do.
                let in_use = ledger.has_vip(*vip) && facts.needs_binding(*vip);
                if in_use || facts.bound_ranges.contains(&IpNet::from(*vip)) {
                    desired.push(route);
                }
            }
            route::diff(actual, &desired)
        }
    };
    changes
}

/// Every route that binds VIPs: one per range that is certain, one per VIP outside them.
pub fn desired_routes(ledger: &Ledger, facts: &Facts, device: u32) -> BTreeMap<RouteKey, Route> {
    let ranges = facts
        .bound_ranges
        .iter()
        .map(|range| Route::local(*range, device, facts.address(range.addr().is_ipv6())));
    let vips = ledger.vips().filter(|vip| facts.needs_binding(*vip)).map(|vip| vip_route(vip, facts, device));
    vips.chain(ranges).map(|route| (route.key, route)).collect()
}

fn vip_route(vip: IpAddr, facts: &Facts, device: u32) -> Route {
    Route::local(IpNet::from(vip), device, facts.address(vip.is_ipv6()))
}
