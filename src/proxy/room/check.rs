//! Reads the kernel back and repairs what somebody else changed: looks, audits, and the chains.

use std::time::Instant;

use super::Room;
use crate::chains::Rules;
use crate::proxy::error::Error;
use crate::proxy::mirror::Scope;
use crate::proxy::rules;
use crate::schedule::{Due, Stopwatch};

/// So many changes are told one by one.
const DESCRIBED: usize = 16;

impl Room {
    /// Looks whether anything seems to have changed; if so, it is read back on the next turn.
    pub(super) fn look(&mut self, started: Instant) {
        let watch = Stopwatch::start();
        if self.kernel.are_rules_disturbed() {
            self.schedule.suspect_rules();
        }
        let looks_changed = self.kernel.looks_changed(&self.mirror, &self.ledger, &mut self.fingerprint);
        let alarmed = looks_changed.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot look at the kernel tables, audits will");
            false
        });
        if alarmed {
            self.schedule.request_full(started);
        }
        let cost = watch.cost();
        tracing::debug!(?cost, alarmed, "looked at the kernel tables");
        self.looks.looked(started, cost, alarmed);
    }

    /// Reads kernel tables back and repairs what differs.
    pub(super) fn audit(&mut self, audit: Due) -> bool {
        let started = Instant::now();
        let mut clean = true;
        if audit.tables {
            let before = self.shared.drift();
            // What took the link away may be heard of while everything is looked at anyway.
            let linked = self.ensure_link();
            clean = self.read_kernel() && self.repair() && linked;
            self.looks.audited(self.shared.drift() > before);
            self.kernel.prepare(&self.facts);
        } else if audit.routes {
            clean = self.ensure_link() && self.read_routes() && self.repair();
        }
        let cost = started.elapsed();
        self.schedule.tables_cost(cost);
        if audit.tables {
            self.shared.worked(|work| {
                work.audits += 1;
                work.auditing += cost;
            });
        }
        if audit.rules {
            let (started, before) = (Instant::now(), self.shared.drift());
            clean &= self.sync_rules(true);
            self.schedule.rules_cost(started.elapsed(), self.shared.drift() > before);
        }
        self.sync_health_servers();
        clean
    }

    /// Replaces the mirror by what the kernel holds of ours.
    pub(super) fn read_kernel(&mut self) -> bool {
        match self.kernel.read(&self.settings, &self.ledger, &self.mirror) {
            Ok(mirror) => {
                self.mirror = mirror;
                self.fingerprint = None;
                true
            }
            Err(error) => self.failed_to("read kernel tables", &error),
        }
    }

    /// Makes the link again that VIP routes lead to; its index is another then.
    fn ensure_link(&mut self) -> bool {
        match self.kernel.ensure_link() {
            Ok(()) => true,
            Err(error) => self.failed_to("make the dummy link", &error),
        }
    }

    fn read_routes(&mut self) -> bool {
        match self.kernel.read_routes() {
            Ok(routes) => {
                self.mirror.routes = routes;
                true
            }
            Err(error) => self.failed_to("read VIP routes", &error),
        }
    }

    /// Makes the chains right; `check` reads them back first, else only a change of ours is written.
    pub(super) fn sync_rules(&mut self, check: bool) -> bool {
        let wanted = self.wanted_rules();
        self.write_rules(wanted, check)
    }

    /// The chains of every family.
    pub(super) fn wanted_rules(&self) -> Rules {
        rules::desired(&self.settings, &self.facts, self.kernel.families())
    }

    /// [`Room::sync_rules`] of some families.
    pub(super) fn write_rules(&mut self, wanted: Rules, check: bool) -> bool {
        let started = Instant::now();
        let result = self.kernel.sync_rules(wanted, check);
        self.shared.worked(|work| work.rules += started.elapsed());
        match result {
            Ok(repaired) => {
                self.rules_checked |= check;
                self.rules_wrong = false;
                if repaired > 0 && self.adopted && check {
                    self.shared.drifted(repaired);
                }
                true
            }
            Err(error) => {
                self.rules_wrong = true;
                if matches!(error, Error::Iptables(ferroute_iptables::Error::Locked { .. })) {
                    self.schedule.lock_is_held();
                }
                self.failed_to("write proxy rules", &error)
            }
        }
    }

    /// A pass over everything after the kernel was read back: what differs was not our doing.
    fn repair(&mut self) -> bool {
        let changes = self.compare(&Scope::All);
        let clean = if changes.is_empty() {
            self.found(&changes)
        } else {
            self.shared.drifted(changes.len());
            // All of a flushed table would be a book.
            let what = if changes.len() <= DESCRIBED { changes.describe() } else { Vec::new() };
            tracing::warn!(
                changes = changes.len(),
                ?what,
                "kernel state differed from what was programmed, repairing"
            );
            self.apply(changes)
        };
        self.note_programmed(&Scope::All);
        clean
    }
}
