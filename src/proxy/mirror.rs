//! The kernel tables of the Service room as last read or written, and what differs from desire.
//! Pure: a change is computed from the mirror and only for the keys that may have changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ferroute_iptables::ipset::{self, Sets};
use ferroute_ipvs as ipvs;
use ipnet::IpNet;

use super::drain::{Drains, Now};
use super::facts::Facts;
use super::hold::Hold;
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

impl Mirror {
    /// Whether packets to a VIP are delivered here: by a route of its own, or by that of its range.
    pub fn binds(&self, vip: IpAddr, facts: &Facts) -> bool {
        let bound = |network: IpNet| {
            self.routes.range(route_keys(network)).any(|(key, _)| key.destination == network.trunc())
        };
        let mut ranges = facts.bound_ranges.iter().filter(|range| range.contains(&vip));
        bound(IpNet::from(vip)) || ranges.any(|range| bound(*range))
    }
}

/// All keys of routes to one network.
fn route_keys(destination: IpNet) -> std::ops::RangeInclusive<RouteKey> {
    let destination = destination.trunc();
    RouteKey { destination, table: 0, metric: 0 }..=RouteKey {
        destination,
        table: u32::MAX,
        metric: u32::MAX,
    }
}

/// Which keys to compare.
pub enum Scope<'a> {
    /// Every key on either side.
    All,
    /// Only these.
    Touched(&'a Touched),
    /// What the kernel holds and nobody wants, and every route: the rest of an adoption, whose wanted keys
    /// were compared already.
    Leftovers,
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
    hold: &Hold,
    facts: &Facts,
    device: u32,
    scope: &Scope<'_>,
    period: Option<Duration>,
    now: impl Fn() -> Now,
) -> Changes {
    let mut changes = Changes::default();

    let keys: BTreeSet<ipvs::VirtualServerKey> = match scope {
        Scope::All => mirror.servers.keys().chain(ledger.servers().keys()).copied().collect(),
        Scope::Touched(touched) => touched.servers.clone(),
        Scope::Leftovers => {
            mirror.servers.keys().filter(|key| !ledger.servers().contains_key(key)).copied().collect()
        }
    };
    let mut wanted = ipvs::Table::default();
    for key in &keys {
        let server = if hold.keeps_server(key) {
            mirror.servers.get(key).cloned()
        } else {
            drains.effective(
                *key,
                ledger.protocol(key),
                mirror.servers.get(key),
                ledger.servers().get(key),
                period,
                &now,
            )
        };
        if let Some(server) = &server {
            wanted.insert(*key, server.clone());
        }
        changes.wanted.insert(*key, server);
    }
    let goes = |change: &ipvs::Change| matches!(change, ipvs::Change::DeleteServer { .. });
    changes.servers = ipvs::diff(&mirror.servers, &wanted, keys);
    changes.servers_last = changes.servers.extract_if(.., |change| goes(change)).collect();

    let difference = match scope {
        Scope::All => ipset::diff(&mirror.sets, ledger.sets()),
        Scope::Touched(touched) => {
            ipset::diff_entries(&mirror.sets, ledger.sets(), touched.entries.iter().copied())
        }
        Scope::Leftovers => ipset::diff_leftovers(&mirror.sets, ledger.sets()),
    };
    changes.retype = difference.retype;
    for change in difference.changes {
        match change {
            ipset::Change::Delete { .. } => changes.sets_last.push(change),
            _ => changes.sets_first.push(change),
        }
    }
    hold.spare_entries(&mut changes.sets_last);
    changes.sets_last.extend(difference.destroy);

    changes.routes = match scope {
        Scope::Touched(touched) if !touched.routes => {
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
        _ => {
            let desired = desired_routes(ledger, facts, device);
            route::diff(mirror.routes.values(), desired.values())
        }
    };
    hold.spare_routes(&mut changes.routes);
    changes
}

/// Every route that binds VIPs: one per range that is certain, one per VIP outside them.
pub fn desired_routes(ledger: &Ledger, facts: &Facts, device: u32) -> BTreeMap<RouteKey, Route> {
    let ranges = facts
        .bound_ranges
        .iter()
        .map(|range| Route::local(*range, device, facts.source(range.addr().is_ipv6())));
    let vips = ledger.vips().filter(|vip| facts.needs_binding(*vip)).map(|vip| vip_route(vip, facts, device));
    vips.chain(ranges).map(|route| (route.key, route)).collect()
}

fn vip_route(vip: IpAddr, facts: &Facts, device: u32) -> Route {
    Route::local(IpNet::from(vip), device, facts.source(vip.is_ipv6()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ferroute_iptables::Family;
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::ServiceKey;
    use crate::cluster::service::{Service, ServiceType, TrafficPolicy};
    use crate::proxy::desired::{Slices, desired};
    use crate::proxy::fixture;

    #[test]
    fn a_vip_is_bound_by_itself_or_by_its_range() {
        let facts = fixture::facts();
        let mut mirror = Mirror::default();
        let [in_range, alone]: [IpAddr; 2] = [[10, 96, 0, 10].into(), [203, 0, 113, 5].into()];
        let bind = |mirror: &mut Mirror, network: IpNet| {
            let route = Route::local(network, 7, None);
            mirror.routes.insert(route.key, route);
        };
        assert!(!mirror.binds(in_range, &facts) && !mirror.binds(alone, &facts));
        bind(&mut mirror, alone.into());
        assert!(mirror.binds(alone, &facts) && !mirror.binds(in_range, &facts));
        bind(&mut mirror, facts.bound_ranges[0]);
        assert!(mirror.binds(in_range, &facts));
        assert!(!mirror.binds([203, 0, 113, 6].into(), &facts));
    }

    /// One random state of one of a few Services that compete for a few addresses.
    #[derive(Clone, Debug)]
    struct Move {
        name: u8,
        gone: bool,
        created: i64,
        external: Vec<u8>,
        node_port: Option<u16>,
        local: bool,
        guarded: bool,
        hairpin: bool,
        udp: bool,
        endpoints: BTreeSet<(u8, bool)>,
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let one = (
            0u8..4,
            proptest::bool::weighted(0.2),
            0i64..3,
            proptest::collection::vec(1u8..4, 0..3),
            proptest::option::of(30_000u16..30_002),
            any::<(bool, bool, bool, bool)>(),
            proptest::collection::btree_set((1u8..5, any::<bool>()), 0..4),
        )
            .prop_map(
                |(name, gone, created, external, node_port, (local, guarded, hairpin, udp), endpoints)| {
                    Move { name, gone, created, external, node_port, local, guarded, hairpin, udp, endpoints }
                },
            );
        proptest::collection::vec(one, 1..24)
    }

    fn state(step: &Move) -> (ServiceKey, Option<crate::proxy::desired::ServiceState>) {
        let name = format!("s{}", step.name);
        let protocol = if step.udp { Protocol::Udp } else { Protocol::Tcp };
        let mut service = Service {
            created: step.created,
            kind: ServiceType::LoadBalancer,
            cluster_ips: vec![[10, 96, 0, step.name].into()],
            external_ips: step.external.iter().map(|host| [203, 0, 113, *host].into()).collect(),
            load_balancer_ips: step.external.iter().map(|host| [203, 0, 113, 128 + *host].into()).collect(),
            ports: vec![fixture::port("http", protocol, 80, step.node_port)],
            external_policy: if step.local { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
            source_ranges: if step.guarded { vec!["192.0.2.0/24".parse().unwrap()] } else { Vec::new() },
            ..fixture::service(&name)
        };
        service.annotations.hairpin = step.hairpin;
        let endpoints = step
            .endpoints
            .iter()
            .map(|(host, here)| fixture::endpoint(*host, "rs", if *here { "n1" } else { "n2" }))
            .collect();
        let slices = Slices::from([(
            std::sync::Arc::from("a"),
            std::sync::Arc::new(fixture::slice(&[("http", protocol, 8080)], endpoints)),
        )]);
        let wanted =
            desired(&service, Some(&slices), &fixture::facts(), &fixture::settings(), &BTreeSet::new());
        (service.key.clone(), (!step.gone).then_some(wanted))
    }

    fn apply(mirror: &mut Mirror, changes: &Changes) {
        ipset::apply_to(&mut mirror.sets, &changes.sets_first);
        for change in changes.servers.iter().chain(&changes.servers_last) {
            ipvs::apply_to(&mut mirror.servers, change).unwrap();
        }
        for change in &changes.routes {
            match change {
                RouteChange::Add(route) | RouteChange::Replace(route) => {
                    mirror.routes.insert(route.key, *route);
                }
                RouteChange::Delete(route) => {
                    mirror.routes.remove(&route.key).unwrap();
                }
            }
        }
        ipset::apply_to(&mut mirror.sets, &changes.sets_last);
    }

    fn compare(mirror: &Mirror, ledger: &Ledger, scope: &Scope<'_>) -> Changes {
        let (drains, hold) = (&mut Drains::default(), &Hold::default());
        diff(mirror, ledger, drains, hold, &fixture::facts(), 7, scope, None, fixture::now)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Whatever the order of events: applying only what each event touched leaves the kernel as a
        /// full comparison wants it, and as a ledger that only ever saw the end.
        #[test]
        fn narrow_passes_reach_what_a_full_pass_wants(steps in moves()) {
            let mut ledger = Ledger::new(&Family::BOTH);
            let mut mirror = Mirror::default();
            let node = ledger.put_node(&fixture::facts());
            let changes = compare(&mirror, &ledger, &Scope::Touched(&node));
            apply(&mut mirror, &changes);
            let changes = compare(&mirror, &ledger, &Scope::All);
            apply(&mut mirror, &changes);
            let mut last = BTreeMap::new();
            for step in &steps {
                let (key, wanted) = state(step);
                let touched = ledger.put(&key, wanted.clone());
                let changes = compare(&mirror, &ledger, &Scope::Touched(&touched));
                apply(&mut mirror, &changes);
                let rest = compare(&mirror, &ledger, &Scope::All);
                prop_assert!(rest.is_empty(), "left after {step:?}: {:?}", rest.describe());
                // The same state again costs nothing.
                let again = ledger.put(&key, wanted.clone());
                prop_assert!(again.servers.is_empty() && again.entries.is_empty() && again.vips.is_empty());
                last.insert(key, wanted);
            }
            let mut fresh = Ledger::new(&Family::BOTH);
            fresh.put_node(&fixture::facts());
            for (key, wanted) in last {
                fresh.put(&key, wanted);
            }
            prop_assert_eq!(fresh.servers(), ledger.servers());
            prop_assert_eq!(fresh.sets(), ledger.sets());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// An adoption compares every wanted key and then only what is left over: that is everything.
        #[test]
        fn wanted_keys_and_leftovers_are_everything(before in moves(), after in moves()) {
            let mut old = Ledger::new(&Family::BOTH);
            let mut mirror = Mirror::default();
            old.put_node(&fixture::facts());
            for (key, wanted) in before.iter().map(state) {
                old.put(&key, wanted);
            }
            let changes = compare(&mirror, &old, &Scope::All);
            apply(&mut mirror, &changes);
            let mut ledger = Ledger::new(&Family::BOTH);
            let mut touched = ledger.put_node(&fixture::facts());
            for (key, wanted) in after.iter().map(state) {
                ledger.put_into(&key, wanted, &mut touched);
            }
            for scope in [Scope::Touched(&touched), Scope::Leftovers] {
                let changes = compare(&mirror, &ledger, &scope);
                apply(&mut mirror, &changes);
            }
            let rest = compare(&mirror, &ledger, &Scope::All);
            prop_assert!(rest.is_empty(), "left: {:?}", rest.describe());
        }
    }

    #[test]
    fn one_endpoint_is_one_message() {
        let mut ledger = Ledger::new(&[Family::V4]);
        let mut mirror = Mirror::default();
        let step = |endpoints: &[(u8, bool)]| Move {
            name: 1,
            gone: false,
            created: 0,
            external: Vec::new(),
            node_port: None,
            local: false,
            guarded: false,
            hairpin: false,
            udp: false,
            endpoints: endpoints.iter().copied().collect(),
        };
        let (key, wanted) = state(&step(&[(1, true), (2, false)]));
        ledger.put(&key, wanted);
        let changes = compare(&mirror, &ledger, &Scope::All);
        apply(&mut mirror, &changes);
        let (key, wanted) = state(&step(&[(1, true), (2, false), (3, false)]));
        let touched = ledger.put(&key, wanted);
        let changes = compare(&mirror, &ledger, &Scope::Touched(&touched));
        assert_eq!(
            changes.describe(),
            ["add destination 10.244.1.3:8080 to virtual server TCP 10.96.0.1:80"]
        );
    }

    #[test]
    fn a_range_that_comes_is_bound_before_its_vips_are_unbound() {
        let mut ledger = Ledger::new(&[Family::V4]);
        let single = Facts { bound_ranges: Vec::new(), ..fixture::facts() };
        ledger.put_node(&single);
        let (key, wanted) = state(&Move {
            name: 1,
            gone: false,
            created: 0,
            external: Vec::new(),
            node_port: None,
            local: false,
            guarded: false,
            hairpin: false,
            udp: false,
            endpoints: BTreeSet::new(),
        });
        ledger.put(&key, wanted);
        let mut mirror = Mirror::default();
        let run = |mirror: &Mirror, facts: &Facts, scope: &Scope<'_>| {
            let (drains, hold) = (&mut Drains::default(), &Hold::default());
            diff(mirror, &ledger, drains, hold, facts, 7, scope, None, fixture::now)
        };
        let changes = run(&mirror, &single, &Scope::All);
        apply(&mut mirror, &changes);
        let touched = Touched { routes: true, ..Touched::default() };
        let changes = run(&mirror, &fixture::facts(), &Scope::Touched(&touched)).describe();
        assert!(
            changes.len() == 2
                && changes[0].starts_with("add route local 10.96.0.0/12 ")
                && changes[1].starts_with("delete route local 10.96.0.1/32 "),
            "{changes:?}"
        );
    }

    #[test]
    fn udp_changes_name_what_went_and_what_has_somebody_at_last() {
        let server = |hosts: &[u8]| {
            let options = ipvs::Options {
                scheduler: ipvs::Scheduler::RR,
                flags: ipvs::Flags::NONE,
                timeout: 0,
                netmask: ipvs::Netmask::host(ipvs::Family::V4),
            };
            let list =
                hosts.iter().map(|h| ipvs::Destination::masquerade([10, 0, 0, *h].into(), 53, 1)).collect();
            Arc::new(ipvs::VirtualServer::new(options, list))
        };
        let key = |port| ipvs::VirtualServerKey::Address {
            protocol: ipvs::Protocol::Udp,
            address: [10, 96, 0, 53].into(),
            port,
        };
        let mut mirror = Mirror::default();
        mirror.servers.insert(key(53), server(&[1, 2]));
        mirror.servers.insert(key(54), server(&[]));
        let changes = Changes {
            wanted: BTreeMap::from([
                (key(53), Some(server(&[2, 3]))),
                (key(54), Some(server(&[1]))),
                (key(55), None),
            ]),
            ..Changes::default()
        };
        let udp = changes.udp(&mirror, |_| Some(Protocol::Udp));
        assert_eq!(udp.removed, [(key(53), [10, 0, 0, 1].into(), 53)]);
        assert_eq!(udp.appeared, [key(54)]);
        assert_eq!(changes.udp(&mirror, |_| Some(Protocol::Tcp)), UdpChanges::default());
    }
}
