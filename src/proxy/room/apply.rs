//! Writes what differs: sets before the rules that name them, virtual servers before their VIPs are bound.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ferroute_iptables::ipset;
use ferroute_ipvs as ipvs;

use super::Room;
use crate::cluster::service::{Problem, Protocol};
use crate::host::conntrack::RemovedEndpoint;
use crate::host::route::RouteChange;
use crate::proxy::mirror::{Changes, UdpChanges};

impl Room {
    /// Makes every set exist, with at least what is wanted so far: rules name them all.
    pub(super) fn ensure_sets(&mut self) -> bool {
        let difference = ipset::diff(&self.mirror.sets, self.ledger.sets());
        let mut changes = Changes { retype: difference.retype, ..Changes::default() };
        changes.sets_first = difference.changes;
        changes.sets_first.retain(|change| !matches!(change, ipset::Change::Delete { .. }));
        self.apply(changes)
    }

    /// Carries out a difference and notes what succeeded. Returns whether every stage ran.
    pub(super) fn apply(&mut self, changes: Changes) -> bool {
        tracing::debug!(changes = ?changes.describe(), "kernel tables change");
        let udp = changes.udp(&self.mirror, |key| self.ledger.protocol(key));
        let mut clean = true;

        if !changes.retype.is_empty() {
            if let Err(error) = self.kernel.retype(&changes.retype) {
                clean = self.failed_to("replace sets of another type", &error);
            }
            clean &= self.sync_rules(true);
        }
        let mut refused = BTreeSet::new();
        clean &= self.apply_sets(&changes.sets_first);
        clean &= self.apply_servers(&changes.servers, &mut refused);
        clean &= self.apply_routes(&changes.routes);
        clean &= self.apply_servers(&changes.servers_last, &mut refused);
        clean &= self.apply_sets(&changes.sets_last);
        if !changes.retype.is_empty() {
            clean &= self.read_kernel();
        }
        if !changes.servers.is_empty() || !changes.servers_last.is_empty() {
            self.fingerprint = None;
        }
        if clean {
            for (key, wanted) in changes.wanted {
                if refused.contains(&key) {
                    // Half done perhaps; the retry reads it back.
                    self.undone.insert(key);
                    continue;
                }
                self.undone.remove(&key);
                match wanted {
                    Some(server) => self.mirror.servers.insert(key, server),
                    None => self.mirror.servers.remove(&key),
                };
            }
            if !udp.removed.is_empty() || !udp.appeared.is_empty() {
                clean &= self.expire_udp(&udp);
            }
        } else {
            self.undone.extend(changes.wanted.keys());
        }
        clean
    }

    fn apply_sets(&mut self, changes: &[ipset::Change]) -> bool {
        if changes.is_empty() {
            return true;
        }
        match self.kernel.apply_sets(changes, &mut self.mirror.sets) {
            Ok(failures) => {
                for failure in &failures {
                    tracing::warn!(error = %failure, "set change refused");
                    self.shared.error(failure);
                }
                self.refused |= !failures.is_empty();
                true
            }
            Err(error) => self.failed_to("write sets", &error),
        }
    }

    fn apply_servers(
        &mut self,
        changes: &[ipvs::Change],
        refused: &mut BTreeSet<ipvs::VirtualServerKey>,
    ) -> bool {
        if changes.is_empty() {
            return true;
        }
        let failures = match self.kernel.apply_servers(changes) {
            Ok(failures) => failures,
            Err(error) => return self.failed_to("write virtual servers", &error),
        };
        self.refused |= !failures.is_empty();
        for failure in failures {
            let Some(change) = changes.get(failure.index) else { continue };
            let server = change.server();
            refused.insert(server);
            let service = self.ledger.owner(&server);
            if let (Some(service), Some(scheduler)) = (&service, missing_scheduler(&failure.error)) {
                tracing::warn!(%service, %scheduler, "kernel has no such scheduler, rr is used");
                self.missing_schedulers.insert(scheduler.name().into());
                // Every Service may name it; the facts did not change, so ask for all of them.
                self.pending.services.extend(self.ledger.service_keys().cloned());
                continue;
            }
            let service_text = service.as_ref().map(ToString::to_string);
            tracing::warn!(service = service_text, change = %change, error = %failure.error, "virtual server change refused");
            self.shared.error(&failure.error);
            if let Some(service) = service {
                let uid = self.uid(&service);
                self.troubled.insert(service.clone());
                self.reporter.problem(
                    "Service",
                    &service,
                    &uid,
                    &Problem {
                        reason: "NotProgrammed",
                        message: format!(
                            "node {} could not {change} for Service {service}: {}; it is tried again on the next pass",
                            self.facts.name, failure.error
                        ),
                    },
                );
            }
        }
        true
    }

    fn apply_routes(&mut self, changes: &[RouteChange]) -> bool {
        if changes.is_empty() {
            return true;
        }
        match self.kernel.apply_routes(changes, &mut self.mirror.routes) {
            Ok(failures) => {
                for failure in &failures {
                    tracing::warn!(error = %failure.error, "VIP route refused");
                    self.shared.error(&failure.error);
                }
                self.refused |= !failures.is_empty();
                true
            }
            Err(error) => self.failed_to("write VIP routes", &error),
        }
    }

    /// Expires the UDP flows of removed endpoints, and those that met a VIP while nobody served it.
    fn expire_udp(&mut self, udp: &UdpChanges) -> bool {
        let removed: Vec<RemovedEndpoint> = udp
            .removed
            .iter()
            .flat_map(|(key, address, port)| {
                let endpoint = SocketAddr::new(*address, *port);
                self.fronts(key)
                    .into_iter()
                    .map(move |virtual_server| RemovedEndpoint { virtual_server, endpoint })
            })
            .collect();
        let appeared: Vec<SocketAddr> = udp.appeared.iter().flat_map(|key| self.fronts(key)).collect();
        match self.kernel.expire_udp(&removed, &appeared) {
            Ok(expired) => {
                self.shared.expired_flows(expired);
                true
            }
            Err(error) => self.failed_to("expire stale UDP flows", &error),
        }
    }

    /// Where clients meet a virtual server; those with a mark are met at every frontend of the port.
    fn fronts(&self, key: &ipvs::VirtualServerKey) -> Vec<SocketAddr> {
        match *key {
            ipvs::VirtualServerKey::Address { address, port, .. } => vec![SocketAddr::new(address, port)],
            ipvs::VirtualServerKey::Mark { .. } => self
                .ledger
                .owner(key)
                .map(|service| self.ledger.frontends(&service))
                .unwrap_or_default()
                .into_iter()
                .filter(|front| front.protocol == Protocol::Udp && front.local_clients.is_some())
                .map(|front| SocketAddr::new(front.address, front.port))
                .collect(),
        }
    }
}

/// The scheduler that the kernel does not have, where that is why a change failed.
fn missing_scheduler(error: &ipvs::ChangeError) -> Option<ipvs::Scheduler> {
    match error {
        ipvs::ChangeError::NoScheduler { scheduler, .. } => Some(*scheduler),
        _ => None,
    }
}
