//! The room's chains: what is written, what a kernel cannot take, and waiting for another program's lock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ferroute_iptables::{ChainChanges, ChainName, Family, Plan};

use super::Room;
use crate::netpol::error::Error;

/// Rules that one write may leave out one after the other before it counts as failed.
const MOST_LEFT_OUT: usize = 32;

/// What became of chains to be written.
pub(super) enum Written {
    /// They are in the kernel.
    Yes,
    /// They are not.
    No,
    /// They are not, since another program holds the lock.
    Locked,
}

impl Room {
    /// The rules of these chains, by family.
    pub(super) fn chain_changes(
        &self,
        chains: &BTreeSet<(Family, ChainName)>,
    ) -> BTreeMap<Family, ChainChanges> {
        let mut changes: BTreeMap<Family, ChainChanges> = BTreeMap::new();
        for (family, chain) in chains {
            let rules = self.index.ruleset(*family).and_then(|ruleset| ruleset.chains.get(chain)).cloned();
            changes.entry(*family).or_default().insert(*chain, rules);
        }
        changes
    }

    /// Whether the kernel judges pods by our chains already.
    pub(super) fn in_force(&self) -> bool {
        // The first chain of dispatch is there as long as anything is enforced.
        let Ok(chain) = ChainName::new("KUBE-NWPLCY-INGRESS") else { return false };
        self.kernel.families().iter().all(|family| {
            self.kernel.has_chain(*family, chain)
                || self.kernel.read_chains(*family).is_ok_and(|found| found.chains.contains_key(&chain))
        })
    }

    /// Writes single chains, or reads all of a family and makes them right. A rule that this kernel
    /// cannot take is left out where that allows less, not more.
    pub(super) fn write_chains(
        &mut self,
        family: Family,
        changes: Option<ChainChanges>,
        is_audit: bool,
    ) -> Written {
        if changes.as_ref().is_some_and(BTreeMap::is_empty) {
            return Written::Yes;
        }
        for _ in 0..=MOST_LEFT_OUT {
            let outcome = match &changes {
                Some(changes) => {
                    let changes = self.excluded.changes(family, changes.clone());
                    self.kernel.change_chains(family, &changes)
                }
                None => {
                    let Some(wanted) = self.index.ruleset(family) else { return Written::Yes };
                    let wanted = self.excluded.ruleset(family, wanted);
                    self.kernel.settle_chains(family, &wanted)
                }
            };
            match outcome {
                Ok(plan) => {
                    self.wrote(family, &plan, is_audit);
                    return Written::Yes;
                }
                Err(error) => {
                    if let Some((line, reason)) = refused_line(&error)
                        && self.excluded.add_line(family, &line, reason)
                    {
                        tracing::warn!(?family, %error, "a rule is left out, what it allows is refused");
                        continue;
                    }
                    let error = Error::from(error);
                    if matches!(error, Error::Iptables(ferroute_iptables::Error::Locked { .. })) {
                        if self.waiting.is_some() {
                            self.shared.error(&error);
                        } else {
                            self.failed_to("write policy chains", &error);
                        }
                        return Written::Locked;
                    }
                    self.failed_to("write policy chains", &error);
                    return Written::No;
                }
            }
        }
        Written::No
    }

    /// Notes whether chains wait for another program's lock, of a write that began then.
    pub(super) fn wait_for_lock(&mut self, locked: bool, begun: Instant) {
        match self.waiting {
            None if locked => {
                self.waiting = Some(begun);
                self.shared.failed(begun);
            }
            Some(since) if !locked => {
                self.waiting = None;
                tracing::info!(waited = ?since.elapsed(), "the xtables lock is free again");
            }
            _ => {}
        }
    }

    fn wrote(&mut self, family: Family, plan: &Plan, is_audit: bool) {
        if plan.is_empty() {
            return;
        }
        self.own_writes += 1;
        self.shared.count(|numbers| &numbers.chain_writes, 1);
        if is_audit {
            let count =
                plan.written.len() + plan.deleted.len() + plan.jumps_added.len() + plan.jumps_removed.len();
            self.shared.count(|numbers| &numbers.drift, count);
            tracing::warn!(
                ?family, changes = ?plan.describe(), "policy chains differed from what was programmed, repaired"
            );
        } else {
            tracing::debug!(?family, changes = ?plan.describe(), "policy chains written");
        }
    }
}

/// The line of a restore document that the kernel cannot take for good, with the reason. A set that
/// is missing comes back with the next audit of the sets.
fn refused_line(error: &ferroute_iptables::Error) -> Option<(String, String)> {
    match error {
        ferroute_iptables::Error::Failed { stderr, line: Some(line), .. }
            if !(stderr.contains("Set ") && stderr.contains("doesn't exist")) =>
        {
            Some((line.clone(), stderr.lines().next().unwrap_or_default().to_owned()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lasting_refusals_leave_rules_out() {
        let failed = |stderr: &str, line: Option<&str>| ferroute_iptables::Error::Failed {
            program: "iptables-restore".to_owned(),
            status: "exit status: 2".to_owned(),
            stderr: stderr.to_owned(),
            line: line.map(str::to_owned),
        };
        let missing_match =
            failed("Couldn't load match `x'\nError occurred at line: 3", Some("-A KUBE-X -m x"));
        let (line, reason) = refused_line(&missing_match).unwrap();
        assert_eq!((line.as_str(), reason.as_str()), ("-A KUBE-X -m x", "Couldn't load match `x'"));
        assert_eq!(refused_line(&failed("Set KUBE-SRC-A doesn't exist.", Some("-A X"))), None);
        assert_eq!(refused_line(&failed("line 3 failed", None)), None);
    }
}
