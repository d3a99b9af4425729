//! What stays in the kernel although nobody asks for it: state that this process found when it began
//! and that may belong to objects it cannot read. Pure.
//!
//! An object that breaks while the process runs keeps its last good state by itself. After a restart
//! there is none, so as long as anything unreadable may own a leftover, it stays: virtual servers, set
//! entries and routes, and, where it is an EndpointSlice that cannot be read, the endpoints of its
//! Service. When the object is mended or gone, they are judged like everything else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ferroute_iptables::SetName;
use ferroute_iptables::ipset::{self, Entry};
use ferroute_ipvs as ipvs;
use ipnet::IpNet;

use super::desired::{self, Slices};
use super::facts::Facts;
use super::ledger::{Ledger, Touched};
use super::mirror::{self, Mirror};
use super::sets::{self, Role, SetId};
use super::settings::Settings;
use crate::cluster::endpoints::{Endpoint, Slice, SlicePort};
use crate::cluster::service::Service;
use crate::cluster::{Kind, ServiceKey, State, Unreadable};
use crate::host::route::{RouteChange, RouteKey};

/// What cannot be read, as far as this node's Services may depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Causes(BTreeMap<Unreadable, Option<ServiceKey>>);

impl Causes {
    /// Those of the cluster's state that matter to `node`.
    pub fn of(state: &State, node: &str) -> Self {
        let matters = |what: &Unreadable| match what.kind {
            None | Some(Kind::Service | Kind::EndpointSlice | Kind::ServiceCidr) => true,
            Some(Kind::Node) => *what.key.name == *node,
            Some(Kind::Pod | Kind::Namespace | Kind::NetworkPolicy | Kind::Secret) => false,
        };
        Self(
            state
                .unreadable
                .iter()
                .filter(|(what, _)| matters(what))
                .map(|(w, s)| (w.clone(), s.clone()))
                .collect(),
        )
    }

    /// Whether everything can be read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One line each.
    pub fn describe(&self) -> Vec<String> {
        self.0.keys().map(ToString::to_string).collect()
    }

    /// Whether virtual servers, entries and routes without an owner may belong to one of these.
    fn may_own_leftovers(&self) -> bool {
        self.0.values().any(Option::is_none)
    }

    /// Whether endpoints of a Service may be told by one of these.
    fn may_tell_endpoints_of(&self, service: &ServiceKey) -> bool {
        self.0.iter().any(|(what, only)| match (what.kind, only) {
            (None | Some(Kind::EndpointSlice), None) => true,
            (_, only) => only.as_ref() == Some(service),
        })
    }
}

/// Kernel state that is kept.
#[derive(Debug, Default)]
pub struct Hold {
    causes: Causes,
    servers: BTreeSet<ipvs::VirtualServerKey>,
    entries: BTreeSet<(SetName, Entry)>,
    routes: BTreeSet<RouteKey>,
    /// Endpoints as the kernel had them, for Services of which a slice cannot be read.
    endpoints: HashMap<ServiceKey, Slices>,
}

impl Hold {
    /// Whether anything is kept.
    pub fn is_active(&self) -> bool {
        !self.causes.is_empty()
    }

    /// Number of virtual servers, entries and routes kept.
    pub fn len(&self) -> usize {
        self.servers.len() + self.entries.len() + self.routes.len()
    }

    /// Whether no virtual server, entry or route is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of Services whose endpoints are those of the kernel.
    pub fn services(&self) -> usize {
        self.endpoints.len()
    }

    /// For whose sake.
    pub fn causes(&self) -> &Causes {
        &self.causes
    }

    /// Begins: remembers the endpoints that the kernel has for Services whose slices cannot be read.
    pub fn begin(causes: Causes, state: &State, mirror: &Mirror, facts: &Facts, settings: &Settings) -> Self {
        let endpoints = state
            .services
            .iter()
            .filter(|(key, _)| causes.may_tell_endpoints_of(key))
            .map(|(key, service)| {
                (key.clone(), kernel_endpoints(service, state.slices.get(key), mirror, facts, settings))
            })
            .filter(|(_, slices)| !slices.is_empty())
            .collect();
        Self { causes, endpoints, ..Self::default() }
    }

    /// Every Service that can be read is in the ledger now: what is left over is kept.
    pub fn keep_leftovers(&mut self, mirror: &Mirror, ledger: &Ledger, facts: &Facts, device: u32) {
        if !self.causes.may_own_leftovers() {
            return;
        }
        self.servers =
            mirror.servers.keys().filter(|key| !ledger.servers().contains_key(key)).copied().collect();
        self.entries = mirror
            .sets
            .iter()
            .filter_map(|(name, set)| ledger.sets().get(name).map(|wanted| (name, set, wanted)))
            .flat_map(|(name, set, wanted)| {
                set.entries()
                    .keys()
                    .filter(|entry| !wanted.entries().contains_key(*entry))
                    .map(|entry| (*name, *entry))
            })
            .collect();
        let routes = mirror::desired_routes(ledger, facts, device);
        self.routes = mirror.routes.keys().filter(|key| !routes.contains_key(*key)).copied().collect();
    }

    /// Takes note of what can be read by now; returns the Services to compute again, and whether the
    /// leftovers are to be judged.
    pub fn update(&mut self, causes: Causes) -> (Vec<ServiceKey>, bool) {
        self.causes.0.retain(|what, _| causes.0.contains_key(what));
        let mended: Vec<ServiceKey> =
            self.endpoints.keys().filter(|key| !self.causes.may_tell_endpoints_of(key)).cloned().collect();
        for service in &mended {
            self.endpoints.remove(service);
        }
        let over = !self.is_empty() && !self.causes.may_own_leftovers();
        if over {
            self.servers.clear();
            self.entries.clear();
            self.routes.clear();
        }
        (mended, over)
    }

    /// What a Service that can be read asks for is its own from now on.
    pub fn release(&mut self, touched: &Touched, ledger: &Ledger) {
        if self.is_empty() {
            return;
        }
        for key in &touched.servers {
            if ledger.servers().contains_key(key) {
                self.servers.remove(key);
            }
        }
        for (name, entry) in &touched.entries {
            if ledger.sets().get(name).is_some_and(|set| set.entries().contains_key(entry)) {
                self.entries.remove(&(*name, *entry));
            }
        }
    }

    /// The slices of a Service with those that the kernel stands in for.
    pub fn slices(&self, service: &ServiceKey, readable: Option<&Slices>) -> Option<Slices> {
        let mut slices = self.endpoints.get(service)?.clone();
        slices.extend(readable.into_iter().flatten().cloned());
        Some(slices)
    }

    /// Whether a virtual server that nobody asks for stays as it is.
    pub fn keeps_server(&self, key: &ipvs::VirtualServerKey) -> bool {
        self.servers.contains(key)
    }

    /// Takes what is kept out of the entries to be removed.
    pub fn spare_entries(&self, changes: &mut Vec<ipset::Change>) {
        if self.entries.is_empty() {
            return;
        }
        for change in changes.iter_mut() {
            if let ipset::Change::Delete { set, entries } = change {
                entries.retain(|entry| !self.entries.contains(&(*set, *entry)));
            }
        }
        changes
            .retain(|change| !matches!(change, ipset::Change::Delete { entries, .. } if entries.is_empty()));
    }

    /// Takes what is kept out of the routes to be removed.
    pub fn spare_routes(&self, changes: &mut Vec<RouteChange>) {
        changes.retain(
            |change| !matches!(change, RouteChange::Delete(route) if self.routes.contains(&route.key)),
        );
    }
}

/// Endpoints that take new clients in the kernel and that no readable slice of the Service speaks of.
fn kernel_endpoints(
    service: &Service,
    readable: Option<&Slices>,
    mirror: &Mirror,
    facts: &Facts,
    settings: &Settings,
) -> Slices {
    let told: BTreeSet<IpAddr> = readable
        .into_iter()
        .flat_map(|s| s.values())
        .flat_map(|s| s.endpoints.iter().map(|e| e.address))
        .collect();
    // The set of local pods names those of this node's endpoints that no pod network covers.
    let is_local = |address: IpAddr| {
        facts.is_local_pod(address)
            || mirror
                .sets
                .get(&SetId::of(Role::LocalPods, address).name())
                .is_some_and(|set| set.entries().contains_key(&Entry::Net(IpNet::from(address))))
    };
    let mut found: BTreeMap<(u16, u16, bool), BTreeSet<IpAddr>> = BTreeMap::new();
    for front in desired::desired(service, None, facts, settings, &BTreeSet::new()).frontends {
        let protocol = ferroute_iptables::Protocol(front.protocol.number());
        let entry = Entry::IpPort(front.address, protocol, front.port);
        // The set tells the mark under which local clients were served.
        let mark = mirror
            .sets
            .get(&SetId::of(Role::Marks, front.address).name())
            .and_then(|set| set.entries().get(&entry)?.mark)
            .map(|mark| ipvs::VirtualServerKey::Mark {
                family: sets::family(front.address),
                mark: mark.value,
            });
        let keys = [Some(sets::server_key(front.address, front.protocol, front.port)), mark];
        for server in keys.into_iter().flatten().filter_map(|key| mirror.servers.get(&key)) {
            for destination in
                server.destinations.iter().filter(|d| d.weight > 0 && !told.contains(&d.address))
            {
                let place = (front.port_index, destination.port, destination.address.is_ipv6());
                found.entry(place).or_default().insert(destination.address);
            }
        }
    }
    found
        .into_iter()
        .filter_map(|((index, number, ipv6), addresses)| {
            let port = service.ports.get(usize::from(index))?;
            let port = SlicePort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: NonZeroU16::new(number)?,
            };
            let endpoints = addresses.into_iter().map(|address| Endpoint {
                address,
                ready: true,
                serving: true,
                terminating: false,
                node: is_local(address).then(|| facts.name.clone()),
                hints: None,
            });
            let slice = Slice { ports: [port].into(), endpoints: endpoints.collect() };
            // No object has a name with a slash.
            Some((Arc::from(format!("kernel/{index}/{number}/{ipv6}")), Arc::new(slice)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use ferroute_iptables::Family;

    use super::*;
    use crate::cluster::service::{Protocol, ServiceType, TrafficPolicy};
    use crate::proxy::drain::Drains;
    use crate::proxy::fixture;
    use crate::proxy::mirror::Scope;

    fn service(name: &str, number: u8) -> Service {
        Service {
            kind: ServiceType::LoadBalancer,
            cluster_ips: vec![[10, 96, 0, number].into()],
            load_balancer_ips: vec![[203, 0, 113, 128 + number].into()],
            ports: vec![
                fixture::port("http", Protocol::Tcp, 80, None),
                fixture::port("dns", Protocol::Udp, 53, None),
            ],
            external_policy: TrafficPolicy::Local,
            ..fixture::service(name)
        }
    }

    fn slice() -> Arc<Slice> {
        let endpoints = vec![fixture::endpoint(1, "rs", "n1"), fixture::endpoint(2, "rs", "n2")];
        let ports = [("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 5353)];
        let mut slice = fixture::slice(&ports, endpoints);
        // Of this node it is the first that has a pod network here.
        slice.endpoints[1].address = [10, 244, 2, 2].into();
        Arc::new(slice)
    }

    fn state(services: &[Service], unreadable: &[(Unreadable, Option<ServiceKey>)]) -> State {
        let mut state = State::default();
        for service in services {
            state.services.insert(service.key.clone(), Arc::new(service.clone()));
        }
        state.unreadable = unreadable.iter().cloned().collect();
        state
    }

    /// What is asked for by these Services, as `hold` lets them be seen.
    fn ledger(state: &State, hold: &Hold) -> Ledger {
        let (facts, settings) = (fixture::facts(), fixture::settings());
        let mut ledger = Ledger::new(&[Family::V4]);
        ledger.put_node(&facts);
        for (key, service) in &state.services {
            let held = hold.slices(key, state.slices.get(key));
            let slices = held.as_ref().or(state.slices.get(key));
            ledger.put(key, Some(desired::desired(service, slices, &facts, &settings, &BTreeSet::new())));
        }
        ledger
    }

    fn mirror_of(ledger: &Ledger) -> Mirror {
        let mut servers = ledger.servers().clone();
        servers.retain(|_, server| !server.destinations.is_empty());
        let routes = mirror::desired_routes(ledger, &fixture::facts(), 7);
        Mirror { servers, sets: ledger.sets().clone(), routes }
    }

    fn changes(mirror: &Mirror, ledger: &Ledger, hold: &Hold) -> Vec<String> {
        let (drains, facts) = (&mut Drains::default(), fixture::facts());
        mirror::diff(mirror, ledger, drains, hold, &facts, 7, &Scope::All, None, fixture::now).describe()
    }

    fn programmed() -> (State, Mirror) {
        let mut full = state(&[service("web", 1), service("api", 2)], &[]);
        for key in full.services.keys() {
            full.slices.insert(key.clone(), Slices::from([(Arc::from("a"), slice())]));
        }
        let mirror = mirror_of(&ledger(&full, &Hold::default()));
        (full, mirror)
    }

    fn restart(now: &State, mirror: &Mirror) -> (Hold, Ledger) {
        let (facts, settings) = (fixture::facts(), fixture::settings());
        let mut hold = Hold::begin(Causes::of(now, "n1"), now, mirror, &facts, &settings);
        let ledger = ledger(now, &hold);
        hold.keep_leftovers(mirror, &ledger, &facts, 7);
        (hold, ledger)
    }

    #[test]
    fn nothing_is_removed_while_a_service_cannot_be_read_and_all_of_it_afterwards() {
        let (mut now, mirror) = programmed();
        let key = ServiceKey::new("shop", "web");
        now.services.remove(&key);
        now.unreadable.insert(Unreadable::object(Kind::Service, key), None);
        let (mut hold, ledger) = restart(&now, &mirror);
        assert!(hold.is_active() && hold.len() > 6, "{hold:?}");
        assert_eq!(changes(&mirror, &ledger, &hold), Vec::<String>::new());
        // Another cause that came later holds nothing; the first one's end is the end.
        assert_eq!(hold.update(Causes::of(&now, "n1")), (Vec::new(), false));
        assert_eq!(hold.update(Causes::default()), (Vec::new(), true));
        let removed = changes(&mirror, &ledger, &hold);
        assert!(removed.iter().any(|line| line == "delete virtual server TCP 10.96.0.1:80"), "{removed:?}");
        assert!(
            removed.iter().any(|line| line.starts_with("delete route local 203.0.113.129/32")),
            "{removed:?}"
        );
        assert!(
            removed.iter().all(|line| !line.contains("10.96.0.2") && !line.contains("113.130")),
            "{removed:?}"
        );
    }

    #[test]
    fn a_slice_that_cannot_be_read_keeps_the_endpoints_of_its_service_only() {
        let (mut now, mirror) = programmed();
        let [web, api] = ["web", "api"].map(|name| ServiceKey::new("shop", name));
        now.slices.remove(&web);
        let slice = Unreadable::object(Kind::EndpointSlice, ServiceKey::new("shop", "web-1"));
        now.unreadable.insert(slice.clone(), Some(web.clone()));
        let (mut hold, ledger_now) = restart(&now, &mirror);
        assert_eq!(
            changes(&mirror, &ledger_now, &hold),
            Vec::<String>::new(),
            "local and marked servers too"
        );
        assert_eq!((hold.len(), hold.services()), (0, 1));
        // What a readable slice says of an endpoint counts.
        let mut gone = (*self::slice()).clone();
        gone.endpoints.truncate(1);
        gone.endpoints[0].ready = false;
        gone.endpoints[0].serving = false;
        now.slices.insert(web.clone(), Slices::from([(Arc::from("b"), Arc::new(gone))]));
        let (_, narrower) = restart(&now, &mirror);
        let server = &narrower.servers()[&sets::server_key([10, 96, 0, 1].into(), Protocol::Tcp, 80)];
        assert_eq!(
            server.destinations.iter().map(|d| d.address.to_string()).collect::<Vec<_>>(),
            ["10.244.2.2"]
        );
        // Mended: its Service is computed again, from what can be read.
        assert_eq!(hold.update(Causes::default()), (vec![web], false));
        assert!(!hold.is_active());
        // The other Service lost its slices for good: that is no leftover to keep.
        now.slices.remove(&api);
        let (hold, ledger) = restart(&now, &mirror);
        let removed = changes(&mirror, &ledger, &hold);
        assert!(removed.iter().any(|line| line == "delete virtual server TCP 10.96.0.2:80"), "{removed:?}");
        // Of whom a slice is cannot be told: then it may be of any.
        now.unreadable.insert(slice, None);
        let (hold, ledger) = restart(&now, &mirror);
        let removed = changes(&mirror, &ledger, &hold);
        assert!(removed.iter().all(|line| !line.contains("10.96.0.2:80")), "{removed:?}");
    }

    #[test]
    fn what_a_service_asks_for_is_no_longer_kept_for_another() {
        let (mut now, mirror) = programmed();
        let key = ServiceKey::new("shop", "web");
        let back = now.services.remove(&key).unwrap();
        now.unreadable.insert(Unreadable::manifest(ServiceKey::new("", "a.yaml")), None);
        let (mut hold, mut ledger) = restart(&now, &mirror);
        let before = hold.len();
        let (facts, settings) = (fixture::facts(), fixture::settings());
        let wanted = desired::desired(&back, now.slices.get(&key), &facts, &settings, &BTreeSet::new());
        let touched = ledger.put(&key, Some(wanted));
        hold.release(&touched, &ledger);
        assert!(hold.len() < before);
        assert!(!hold.keeps_server(&sets::server_key([10, 96, 0, 1].into(), Protocol::Tcp, 80)));
    }

    #[test]
    fn objects_of_other_rooms_and_nodes_hold_nothing() {
        let of = |kind, name| (Unreadable::object(kind, ServiceKey::new("", name)), None);
        let others = [of(Kind::Pod, "p"), of(Kind::Node, "n2"), of(Kind::NetworkPolicy, "n1")];
        assert!(Causes::of(&state(&[], &others), "n1").is_empty());
        assert!(!Causes::of(&state(&[], &[of(Kind::Node, "n1")]), "n1").is_empty());
    }
}
