//! What all Services together ask of the kernel, kept up to date one Service at a time.
//!
//! Several Services may want the same VIP, and two may even claim the same VIP, protocol and port:
//! the older one is served, the other waits and is told so. Shared things are counted, so that a
//! change costs what it touches, whatever the size of the cluster.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ferroute_iptables::ipset::{Entry, Extra, Sets};
use ferroute_iptables::{Family, SetName};
use ferroute_ipvs as ipvs;
use foldhash::fast::FixedState;

use super::desired::{Frontend, ServiceState, VipKind};
use super::facts::Facts;
use super::marks::{MarkOwner, Marks};
use super::sets::{self, Role, SetId};
use crate::cluster::ServiceKey;
use crate::cluster::service::{Problem, Protocol};

type Map<K, V> = HashMap<K, V, FixedState>;

/// VIP, protocol and port: at most one Service is served there.
pub type FrontendKey = (IpAddr, Protocol, u16);

/// The keys of kernel tables that a change may have altered.
#[derive(Debug, Default)]
pub struct Touched {
    /// Virtual servers.
    pub servers: BTreeSet<ipvs::VirtualServerKey>,
    /// Set entries.
    pub entries: BTreeSet<(SetName, Entry)>,
    /// VIPs that may need binding or unbinding.
    pub vips: BTreeSet<IpAddr>,
    /// Every route may: the node's facts changed.
    pub routes: bool,
    /// Services that won or lost a frontend to another.
    pub services: BTreeSet<ServiceKey>,
}

/// Desired kernel state of all Services.
#[derive(Default)]
pub struct Ledger {
    services: Map<ServiceKey, Arc<ServiceState>>,
    claims: Map<FrontendKey, Vec<(i64, ServiceKey)>>,
    marks: Marks,
    servers: ipvs::Table,
    /// How many of the servers have a destination.
    served: usize,
    sets: Sets,
    /// How often entries are wanted beyond the first time: few are.
    more_uses: Map<(SetName, Entry), u32>,
    node_entries: BTreeSet<(SetId, Entry)>,
    vips: Map<IpAddr, u32>,
}

impl Touched {
    /// Adds the keys of another change.
    pub fn extend(&mut self, more: Touched) {
        self.servers.extend(more.servers);
        self.entries.extend(more.entries);
        self.vips.extend(more.vips);
        self.routes |= more.routes;
        self.services.extend(more.services);
    }
}

impl Ledger {
    /// No Services yet; sets for these families, still empty.
    pub fn new(families: &[Family]) -> Self {
        let ids = Role::ALL
            .into_iter()
            .flat_map(|role| families.iter().map(move |family| SetId { role, family: *family }));
        Self { sets: ids.map(|id| (id.name(), id.empty())).collect(), ..Self::default() }
    }

    /// Replaces what the node itself asks for: its addresses, pod networks and service ranges.
    pub fn put_node(&mut self, facts: &Facts) -> Touched {
        let mut touched = Touched::default();
        let new: BTreeSet<(SetId, Entry)> = sets::node_entries(facts).into_iter().collect();
        let old = std::mem::replace(&mut self.node_entries, new.clone());
        for (set, entry) in new.difference(&old) {
            self.count_entry(*set, *entry, Extra::default(), true, &mut touched);
        }
        for (set, entry) in old.difference(&new) {
            self.count_entry(*set, *entry, Extra::default(), false, &mut touched);
        }
        touched
    }

    /// Replaces what one Service asks for; `None` when it is gone.
    pub fn put(&mut self, key: &ServiceKey, state: Option<ServiceState>) -> Touched {
        let mut touched = Touched::default();
        self.put_into(key, state, &mut touched);
        touched
    }

    /// [`Ledger::put`] that adds to what others touched: many Services share the memory for it.
    pub fn put_into(&mut self, key: &ServiceKey, state: Option<ServiceState>, touched: &mut Touched) {
        let new = state.map(Arc::new);
        let old = match &new {
            Some(new) => self.services.insert(key.clone(), new.clone()),
            None => self.services.remove(key),
        };
        if old.as_deref() == new.as_deref() {
            return;
        }
        let affected: HashSet<FrontendKey, FixedState> =
            old.iter().chain(&new).flat_map(|state| state.frontends.iter().map(frontend_key)).collect();

        // The claims still name the old winners here, and `old` still describes our own part.
        for frontend in &affected {
            if let Some(winner) = self.winner(frontend) {
                let state = if winner == *key { old.clone() } else { self.services.get(&winner).cloned() };
                self.account(&winner, state.as_deref(), frontend, false, touched);
            }
        }
        if let Some(old) = &old {
            self.account_service(old, false, touched);
            for frontend in &old.frontends {
                self.unclaim(&frontend_key(frontend), key, touched);
            }
        }
        if let Some(new) = &new {
            self.account_service(new, true, touched);
            for frontend in &new.frontends {
                self.claim(frontend_key(frontend), new.created, key, touched);
            }
        }
        for frontend in &affected {
            if let Some(winner) = self.winner(frontend) {
                let state = self.services.get(&winner).cloned();
                self.account(&winner, state.as_deref(), frontend, true, touched);
            }
        }
    }

    /// Desired virtual servers, also those of frontends that nobody serves: these are in the kernel only
    /// while something drains, see [`Drains::effective`](super::drain::Drains::effective).
    pub fn servers(&self) -> &ipvs::Table {
        &self.servers
    }

    /// How many of [`Ledger::servers`] have a destination.
    pub fn served(&self) -> usize {
        self.served
    }

    /// Desired sets, of the families given to [`Ledger::new`].
    pub fn sets(&self) -> &Sets {
        &self.sets
    }

    /// VIPs of Services (not node addresses).
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.vips.keys().copied()
    }

    /// Whether an address is a VIP of a Service.
    pub fn has_vip(&self, vip: IpAddr) -> bool {
        self.vips.contains_key(&vip)
    }

    /// Keys of all Services known.
    pub fn service_keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys()
    }

    /// What one Service asks for.
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<ServiceState>> {
        self.services.get(key)
    }

    /// The Service served at a virtual server.
    pub fn owner(&self, server: &ipvs::VirtualServerKey) -> Option<ServiceKey> {
        match *server {
            ipvs::VirtualServerKey::Address { protocol, address, port } => {
                self.winner(&(address, sets::service_protocol(protocol), port))
            }
            ipvs::VirtualServerKey::Mark { mark, .. } => {
                self.marks.owner(mark).map(|owner| owner.service.clone())
            }
        }
    }

    /// The transport protocol of a virtual server, marks included.
    pub fn protocol(&self, server: &ipvs::VirtualServerKey) -> Option<Protocol> {
        match *server {
            ipvs::VirtualServerKey::Address { protocol, .. } => Some(sets::service_protocol(protocol)),
            ipvs::VirtualServerKey::Mark { mark, .. } => self.marks.owner(mark).map(|owner| owner.protocol),
        }
    }

    /// The virtual server of a frontend's local clients, where it has one of its own.
    pub fn mark(&self, service: &ServiceKey, frontend: &Frontend) -> Option<ipvs::VirtualServerKey> {
        frontend.local_clients.as_ref()?;
        let mark = self.marks.get(&mark_owner(service, frontend))?;
        Some(ipvs::VirtualServerKey::Mark { family: sets::family(frontend.address), mark })
    }

    /// The winning frontends of a Service.
    pub fn frontends(&self, key: &ServiceKey) -> Vec<Frontend> {
        let Some(state) = self.services.get(key) else { return Vec::new() };
        state
            .frontends
            .iter()
            .filter(|frontend| self.winner(&frontend_key(frontend)).as_ref() == Some(key))
            .cloned()
            .collect()
    }

    /// What cannot be honoured of a Service: its own problems and frontends lost to others.
    pub fn problems(&self, key: &ServiceKey) -> Vec<Problem> {
        let Some(state) = self.services.get(key) else { return Vec::new() };
        let mut problems = state.problems.clone();
        for frontend in &state.frontends {
            let claims = self.claims.get(&frontend_key(frontend));
            let Some((_, winner)) = claims.and_then(|claims| claims.first()) else { continue };
            if winner != key {
                problems.push(Problem {
                    reason: "AddressConflict",
                    message: format!(
                        "{} {}:{} of Service {key} is not served: the older Service {winner} has it; \
                         change or remove it in one of them",
                        frontend.protocol, frontend.address, frontend.port
                    ),
                });
            }
        }
        problems
    }

    fn winner(&self, frontend: &FrontendKey) -> Option<ServiceKey> {
        self.claims.get(frontend)?.first().map(|(_, key)| key.clone())
    }

    fn claim(&mut self, frontend: FrontendKey, created: i64, key: &ServiceKey, touched: &mut Touched) {
        let claims = self.claims.entry(frontend).or_default();
        // Nearly always the only one.
        claims.reserve_exact(1);
        claims.push((created, key.clone()));
        if claims.len() > 1 {
            claims.sort();
            touched.services.extend(claims.iter().map(|(_, key)| key.clone()));
        }
    }

    fn unclaim(&mut self, frontend: &FrontendKey, key: &ServiceKey, touched: &mut Touched) {
        let Some(claims) = self.claims.get_mut(frontend) else { return };
        claims.retain(|(_, claimant)| claimant != key);
        touched.services.extend(claims.iter().map(|(_, key)| key.clone()));
        if claims.is_empty() {
            self.claims.remove(frontend);
        }
    }

    /// Adds or takes back what a winning frontend puts into the tables.
    fn account(
        &mut self,
        winner: &ServiceKey,
        state: Option<&ServiceState>,
        key: &FrontendKey,
        add: bool,
        touched: &mut Touched,
    ) {
        let Some(frontend) = state.and_then(|state| state.frontends.iter().find(|f| frontend_key(f) == *key))
        else {
            return;
        };
        let server = sets::server_key(frontend.address, frontend.protocol, frontend.port);
        self.set_server(server, add.then(|| frontend.server.clone()), touched);
        let mark = frontend.local_clients.as_ref().map(|local| {
            let owner = mark_owner(winner, frontend);
            let (mark, last) =
                if add { (self.marks.acquire(&owner), false) } else { self.marks.release(&owner) };
            let server = ipvs::VirtualServerKey::Mark { family: sets::family(frontend.address), mark };
            if add || last {
                self.set_server(server, add.then(|| local.clone()), touched);
            }
            mark
        });
        for (set, entry, extra) in sets::frontend_entries(frontend, mark) {
            self.count_entry(set, entry, extra, add, touched);
        }
        if frontend.kind != VipKind::NodePort {
            touched.vips.insert(frontend.address);
            if add {
                *self.vips.entry(frontend.address).or_default() += 1;
            } else if let Some(uses) = self.vips.get_mut(&frontend.address) {
                *uses -= 1;
                if *uses == 0 {
                    self.vips.remove(&frontend.address);
                }
            }
        }
    }

    fn account_service(&mut self, state: &ServiceState, add: bool, touched: &mut Touched) {
        for (set, entry, extra) in sets::service_entries(state) {
            self.count_entry(set, entry, extra, add, touched);
        }
    }

    fn set_server(
        &mut self,
        key: ipvs::VirtualServerKey,
        server: Option<Arc<ipvs::VirtualServer>>,
        touched: &mut Touched,
    ) {
        let serves = |server: &Arc<ipvs::VirtualServer>| usize::from(!server.destinations.is_empty());
        self.served += server.as_ref().map_or(0, serves);
        let before = match server {
            Some(server) => self.servers.insert(key, server),
            None => self.servers.remove(&key),
        };
        self.served -= before.as_ref().map_or(0, serves);
        touched.servers.insert(key);
    }

    fn count_entry(&mut self, id: SetId, entry: Entry, extra: Extra, add: bool, touched: &mut Touched) {
        let (name, entry) = (id.name(), entry.normal());
        let Some(set) = self.sets.get_mut(&name) else { return };
        touched.entries.insert((name, entry));
        let key = (name, entry);
        let present = set.entries().contains_key(&entry);
        if add {
            // Entries are built to fit their set; one that does not is reported by the kernel's
            // own words when the whole frontend fails, so nothing is lost here.
            if set.insert(entry, extra).is_ok() && present {
                *self.more_uses.entry(key).or_default() += 1;
            }
        } else if let Some(more) = self.more_uses.get_mut(&key) {
            *more -= 1;
            if *more == 0 {
                self.more_uses.remove(&key);
            }
        } else {
            set.remove(&entry);
        }
    }
}

fn mark_owner(service: &ServiceKey, frontend: &Frontend) -> MarkOwner {
    MarkOwner {
        service: service.clone(),
        protocol: frontend.protocol,
        port_index: frontend.port_index,
        ipv6: frontend.address.is_ipv6(),
    }
}

fn frontend_key(frontend: &Frontend) -> FrontendKey {
    (frontend.address, frontend.protocol, frontend.port)
}
