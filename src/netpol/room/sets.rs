//! The room's sets, and telling policies what of them could not be written.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use ferroute_iptables::ipset::{self, Change};
use ferroute_policy::{Direction, Key, policy_chain};

use super::Room;
use crate::cluster::service::Problem;
use crate::metrics::lock;
use crate::netpol::gather;

/// What became of set changes.
pub(super) struct Made {
    /// Everything asked for is in the kernel, or can be missed.
    pub(super) clean: bool,
    /// A set that could not be made before now exists: rules that were left out can be written.
    pub(super) newly_possible: bool,
}

impl Room {
    pub(super) fn apply_sets(&mut self, changes: &[Change]) -> Made {
        let mut made = Made { clean: true, newly_possible: false };
        if changes.is_empty() {
            return made;
        }
        let begun = Instant::now();
        let failures = match self.kernel.apply_sets(changes, &mut self.mirror) {
            Ok(failures) => failures,
            Err(error) => {
                made.clean = self.failed_to("write ipsets", &error);
                return made;
            }
        };
        let took = begun.elapsed();
        for (at, is_v6) in [false, true].into_iter().enumerate() {
            if changes.iter().any(|change| change.set().as_str().starts_with("inet6:") == is_v6) {
                lock(&self.shared.numbers.set_changes[at]).observe(took);
            }
        }
        if !self.excluded.is_empty() {
            for change in changes {
                if let Change::Create { set, .. } = change
                    && !failures.iter().any(|failure| failure.set == *set)
                {
                    made.newly_possible |= self.excluded.remove_set(*set);
                }
            }
        }
        for failure in failures {
            made.clean &= self.set_refused(&failure);
        }
        made
    }

    /// Notes that the kernel refused a change; whether everything else can go on as if it were made.
    fn set_refused(&mut self, failure: &ipset::Failed) -> bool {
        let was_told = self.excluded.sets().any(|set| *set == failure.set);
        let can_be_missed = match failure.action {
            "create" => self.excluded.add_set(failure.set, failure.refusal.to_string()),
            // Its creation was refused, which was told.
            "add to" => was_told,
            _ => false,
        };
        if !was_told {
            tracing::warn!(error = %failure, can_be_missed, "ipset change refused");
        }
        if !can_be_missed {
            self.shared.error(failure);
        }
        can_be_missed
    }

    /// Tells policies of which something is left out, and those of which nothing is any more.
    pub(super) fn tell_left_out(&mut self) {
        if self.excluded.is_empty() && self.troubled.is_empty() {
            return;
        }
        let mut told = BTreeSet::new();
        let keys: Vec<Key> = self.index.enforced_policies().cloned().collect();
        for key in keys {
            let chains = Direction::BOTH.map(|direction| policy_chain(direction, &key));
            let Some(reason) = self.excluded.reason(chains) else { continue };
            let object = gather::object_key(&key);
            let problem = Problem {
                reason: "NotEnforcedAsWritten",
                message: format!(
                    "node {}: rules of this NetworkPolicy cannot be written: {reason}; what they allow is refused, the \
                     rest is enforced, and it is tried again on every audit",
                    self.settings.node_name
                ),
            };
            self.reporter.replace("NetworkPolicy", &object, &self.uid(&key), &[problem]);
            told.insert(key);
        }
        for key in self.troubled.difference(&told) {
            self.reporter.resolved("NetworkPolicy", &gather::object_key(key));
        }
        self.troubled = told;
    }

    fn uid(&self, key: &Key) -> Arc<str> {
        let state = self.subscription.cluster().read();
        state.network_policies.get(&gather::object_key(key)).map(|p| p.uid.clone()).unwrap_or_default()
    }
}
