//! Routes: decided by prefix, compared, applied.

use std::collections::{BTreeMap, HashSet};

use ipnet::IpNet;

use super::Room;
use crate::host::forwarding::ForwardingRoute;
use crate::host::route::{self, RouteChange, RouteKey, TABLE_MAIN};
use crate::host::{self, Family};
use crate::network::fib::{self, Refusal};

impl Room {
    pub(super) fn decide_all(&mut self) {
        self.desired.clear();
        self.refused.clear();
        let prefixes: Vec<IpNet> = self.learned.routes().map(|(prefix, _)| *prefix).collect();
        for prefix in prefixes {
            self.decide(prefix);
        }
        let to_nodes = self.surroundings.routes_to_nodes();
        self.desired.extend(to_nodes.map(|route| (route.key, route)));
    }

    pub(super) fn decide(&mut self, prefix: IpNet) {
        let key = fib::key(prefix);
        let hops = self.learned.next_hops(&prefix);
        self.desired.remove(&key);
        self.refused.remove(&prefix);
        if hops.is_empty() {
            return;
        }
        match self.surroundings.route(prefix, hops) {
            Ok(route) => {
                self.desired.insert(key, route);
            }
            Err(why) => {
                self.refused.insert(prefix, why);
            }
        }
    }

    /// Compares and applies: all, or these keys. Routes of a former life go when their family is
    /// complete; a prefix that was withdrawn goes at once.
    pub(super) fn write_routes(&mut self, keys: Option<&HashSet<RouteKey>>, is_audit: bool) -> bool {
        let mut changes = match keys {
            Some(keys) => route::diff(
                keys.iter().filter_map(|key| self.mirror.get(key)).flatten(),
                keys.iter().filter_map(|key| self.desired.get(key)),
            ),
            None => route::diff(self.mirror.values().flatten(), self.desired.values()),
        };
        if keys.is_none() {
            let may_go = |key: &RouteKey| {
                let family = Family::of(key.destination.addr());
                self.desired.contains_key(key) || (self.learned.is_complete(family) && !self.cluster.blind)
            };
            changes.retain(|change| !matches!(change, RouteChange::Delete(route) if !may_go(&route.key)));
        }
        if changes.is_empty() {
            return true;
        }
        let is_taken = |change: &RouteChange<ForwardingRoute>| {
            self.refused.get(&change.route().key.destination) == Some(&Refusal::Taken)
        };
        if is_audit && !changes.iter().all(is_taken) {
            self.drift(changes.len(), "routes differed from what was programmed, repairing");
        }
        let failures = match self.kernel.apply_routes(&changes) {
            Ok(failures) => failures,
            Err(error) => return self.failed_to("write routes", &error),
        };
        let mut failed: BTreeMap<usize, host::Error> =
            failures.into_iter().map(|failure| (failure.change, failure.error)).collect();
        let mut clean = true;
        for (index, change) in changes.into_iter().enumerate() {
            if let Some(error) = failed.remove(&index) {
                clean &= self.route_refused(&change, &error);
                continue;
            }
            match change {
                RouteChange::Add(route) | RouteChange::Replace(route) => {
                    self.refused.remove(&route.key.destination);
                    self.mirror.insert(route.key, vec![route]);
                }
                RouteChange::Delete(route) => {
                    if let Some(found) = self.mirror.get_mut(&route.key) {
                        found.retain(|other| *other != route);
                        if found.is_empty() {
                            self.mirror.remove(&route.key);
                        }
                    }
                }
            }
        }
        clean
    }

    /// Notes a refused route; whether all others can go on as if it were made.
    fn route_refused(&mut self, change: &RouteChange<ForwardingRoute>, error: &host::Error) -> bool {
        let key = change.route().key;
        let is_taken = matches!(change, RouteChange::Add(_)) && error.errno() == Some(nix::libc::EEXIST);
        if key.table == TABLE_MAIN {
            let why = if is_taken { Refusal::Taken } else { Refusal::Kernel };
            if self.refused.insert(key.destination, why) != Some(why) {
                tracing::warn!(%error, "route refused");
            }
        }
        if !is_taken {
            self.shared.error(error);
        }
        is_taken
    }

    /// Takes away routes that kube-router left: with a smaller metric they would stand before ours, and
    /// nobody else ever removes them.
    pub(super) fn move_in(&mut self) -> bool {
        let left = match self.kernel.read_leftovers() {
            Ok(left) => left,
            Err(error) => return self.failed_to("read routes", &error),
        };
        let changes: Vec<_> = left.into_iter().map(RouteChange::Delete).collect();
        if !changes.is_empty() {
            tracing::info!(routes = changes.len(), "removing routes that kube-router left (protocol 17)");
        }
        match self.kernel.apply_routes(&changes) {
            Ok(failures) if failures.is_empty() => {
                self.moved_in = true;
                true
            }
            Ok(failures) => {
                failures.iter().for_each(|failure| self.shared.error(&failure.error));
                false
            }
            Err(error) => self.failed_to("remove routes that kube-router left", &error),
        }
    }
}
