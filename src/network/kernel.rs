//! The kernel handles of the room: dump and apply, nothing clever.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ferroute_iptables::Family;
use ferroute_iptables::ipset::{self, Change, Sets};

use super::egress::{CHAINS, NODE_IPS, POD_SUBNETS};
use super::error::Error;
use super::facts::Machine;
use super::fib::TABLE_PODS;
use crate::chains::{Chains, Rules};
use crate::cluster::Waker;
use crate::host::events::{Event, Events, Interest, Watching};
use crate::host::forwarding::ForwardingRoute;
use crate::host::fou::{Listener, Listeners};
use crate::host::route::{PROTOCOL, RouteChange, RouteFailure, RouteFilter, RouteKey, TABLE_MAIN};
use crate::host::rule::{Rule, RuleChange};
use crate::host::{self, Network};

/// The route protocol number of kube-router.
pub const KUBE_ROUTER_PROTOCOL: u8 = 17;

/// Beginnings of the names of our sets.
pub fn set_prefixes() -> [String; 4] {
    [POD_SUBNETS.to_owned(), NODE_IPS.to_owned(), format!("inet6:{POD_SUBNETS}"), format!("inet6:{NODE_IPS}")]
}

/// What network events told since they were last asked for.
#[derive(Debug, Default)]
struct Suspicion {
    /// A link or an address changed.
    links: AtomicBool,
    /// A route of ours went, and not by our doing.
    routes: AtomicBool,
    /// Routes that we are deleting.
    expected: Mutex<HashSet<RouteKey>>,
}

/// The handles. Each belongs to the network namespace of the thread that opened it.
pub struct Kernel {
    network: Network,
    sets: ipset::Handle,
    chains: Chains,
    listeners: Option<Listeners>,
    families: Vec<Family>,
    suspicion: Arc<Suspicion>,
    watching: Option<Watching>,
}

impl Kernel {
    /// Opens every handle. Where ipset is missing, nothing can be done here.
    ///
    /// # Errors
    /// What is missing, with its cure.
    pub fn open() -> Result<Self, Error> {
        let mut families = vec![Family::V4];
        if Path::new("/proc/sys/net/ipv6").exists() {
            families.push(Family::V6);
        }
        let chains = Chains::open(&mut families, CHAINS)?;
        Ok(Self {
            network: Network::open()?,
            sets: ipset::Handle::open()?,
            chains,
            listeners: None,
            families,
            suspicion: Arc::default(),
            watching: None,
        })
    }

    /// Begins to listen to network events; each that matters wakes the room. Before the first dump, so
    /// that nothing is missed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn watch(&mut self, waker: Waker) -> Result<(), Error> {
        let events = Events::subscribe(Interest { rules: true, ..Interest::ALL })?;
        let (suspicion, again) = (self.suspicion.clone(), waker.clone());
        let event = move |event| {
            if suspicion.note(event) {
                waker.wake();
            }
        };
        let lost = self.suspicion.clone();
        let failed = move |error: host::Error| {
            tracing::warn!(%error, "changes of the network are seen by audits only");
            lost.links.store(true, Ordering::Release);
            again.wake();
        };
        self.watching = Some(events.spawn(event, failed).map_err(Error::Thread)?);
        Ok(())
    }

    /// Families of chains and sets.
    pub fn families(&self) -> &[Family] {
        &self.families
    }
    /// Whether links or addresses changed since this was last asked.
    pub fn take_links_changed(&self) -> bool {
        self.suspicion.links.swap(false, Ordering::AcqRel)
    }

    /// Whether somebody took a route of ours since this was last asked.
    pub fn take_routes_changed(&self) -> bool {
        self.suspicion.routes.swap(false, Ordering::AcqRel)
    }

    /// Links, addresses and tunnels.
    pub fn read_machine(&mut self) -> Result<Machine, Error> {
        Ok(Machine {
            links: self.network.links()?,
            addresses: self.network.addresses()?,
            tunnels: self.network.tunnels()?,
        })
    }

    /// Routes of ours in the tables of this room.
    pub fn read_routes(&mut self) -> Result<Vec<ForwardingRoute>, Error> {
        self.read_routes_of(PROTOCOL)
    }

    fn read_routes_of(&mut self, protocol: u8) -> Result<Vec<ForwardingRoute>, Error> {
        let mut routes = Vec::new();
        for table in [TABLE_MAIN, TABLE_PODS] {
            let filter =
                RouteFilter { protocol: Some(protocol), table: Some(table), ..RouteFilter::default() };
            routes.extend(self.network.forwarding_routes(filter)?);
        }
        Ok(routes)
    }

    /// Routes that kube-router left.
    pub fn read_leftovers(&mut self) -> Result<Vec<ForwardingRoute>, Error> {
        self.read_routes_of(KUBE_ROUTER_PROTOCOL)
    }

    /// Applies changes of routes; those that the kernel refused are returned.
    pub fn apply_routes(
        &mut self,
        changes: &[RouteChange<ForwardingRoute>],
    ) -> Result<Vec<RouteFailure>, Error> {
        let deletions = changes.iter().filter_map(|change| match change {
            RouteChange::Delete(route) => Some(route.key),
            _ => None,
        });
        {
            let mut expected = self.suspicion.expected.lock().unwrap_or_else(PoisonError::into_inner);
            expected.extend(deletions);
        }
        Ok(self.network.apply_routes(changes)?)
    }

    /// Rules into the table of pods.
    pub fn read_rules(&mut self) -> Result<Vec<Rule>, Error> {
        Ok(self.network.rules_into(TABLE_PODS)?)
    }

    /// Applies changes of rules.
    pub fn apply_rules(&mut self, changes: &[RuleChange]) -> Result<Vec<(usize, host::Error)>, Error> {
        Ok(self.network.apply_rules(changes)?)
    }

    /// Links are written one at a time.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    /// Listeners that unwrap GUE; `None` when this kernel has none of it.
    pub fn read_listeners(&mut self) -> Result<Option<Vec<Listener>>, Error> {
        if self.listeners.is_none() {
            self.listeners = Listeners::open()?;
        }
        self.listeners.as_mut().map(Listeners::list).transpose().map_err(Error::from)
    }

    /// Begins to unwrap GUE on a port.
    pub fn add_listener(&mut self, listener: Listener) -> Result<(), Error> {
        self.listeners.as_mut().map_or(Ok(()), |listeners| listeners.add(listener).map_err(Error::from))
    }

    /// Reads the sets of ours.
    pub fn read_sets(&mut self) -> Result<Sets, Error> {
        let prefixes = set_prefixes();
        let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
        Ok(self.sets.read(&prefixes)?)
    }

    /// Applies set changes; those that succeed are noted in `sets`.
    pub fn apply_sets(&mut self, changes: &[Change], sets: &mut Sets) -> Result<Vec<ipset::Failed>, Error> {
        Ok(self.sets.apply_noting(changes, sets)?)
    }

    /// Makes the chains right; with `check` they are read first. Returns how many tables were not.
    pub fn sync_chains(&mut self, rules: Rules, check: bool) -> Result<usize, Error> {
        Ok(self.chains.sync(rules, check)?)
    }

    /// Whether another program may have written rules since they were last read.
    pub fn are_chains_disturbed(&mut self) -> bool {
        self.chains.is_disturbed()
    }

    /// What [`Kernel::sync_chains`] would write, one line each.
    pub fn chain_difference(&self, rules: &Rules) -> Result<Vec<String>, Error> {
        Ok(self.chains.difference(rules)?)
    }

    /// Netlink messages about links and routes, then sets: written and asked.
    pub fn messages(&self) -> [(u64, u64); 2] {
        let split = |sent: u64, asked: u64| (sent.saturating_sub(asked), asked);
        [
            split(self.network.messages_sent(), self.network.requests_sent()),
            split(self.sets.messages_sent(), self.sets.requests_sent()),
        ]
    }
}

impl Suspicion {
    /// Whether the room should look.
    fn note(&self, event: Event) -> bool {
        match event {
            Event::RouteGone(route)
                if route.protocol == PROTOCOL && matches!(route.key.table, TABLE_MAIN | TABLE_PODS) =>
            {
                let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
                if expected.remove(&route.key) {
                    return false;
                }
                drop(expected);
                self.routes.store(true, Ordering::Release);
                true
            }
            // Additions are ours, or do not concern us.
            Event::Route(_) | Event::RouteGone(_) => false,
            Event::RuleGone | Event::Overrun => {
                self.routes.store(true, Ordering::Release);
                self.links.store(true, Ordering::Release);
                true
            }
            Event::Link(_) | Event::LinkGone(_) | Event::Address(_) | Event::AddressGone(_) => {
                self.links.store(true, Ordering::Release);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::route::Route;

    #[test]
    fn only_what_others_take_is_suspicious() {
        let suspicion = Suspicion::default();
        let ours = Route::unicast("10.1.0.0/24".parse().unwrap(), 3, None);
        let foreign = Route { protocol: 4, ..ours };
        assert!(!suspicion.note(Event::RouteGone(foreign)) && !suspicion.note(Event::Route(ours)));
        suspicion.expected.lock().unwrap().insert(ours.key);
        assert!(!suspicion.note(Event::RouteGone(ours)), "our own doing");
        assert!(!suspicion.routes.load(Ordering::Acquire));
        assert!(suspicion.note(Event::RouteGone(ours)), "the second time it was somebody else");
        assert!(suspicion.routes.load(Ordering::Acquire) && !suspicion.links.load(Ordering::Acquire));
        assert!(suspicion.note(Event::Overrun) && suspicion.links.load(Ordering::Acquire));
    }
}
