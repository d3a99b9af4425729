//! The room's chains in the kernel: one iptables command per family, and what was last written.

use std::collections::BTreeMap;

use ferroute_iptables::{Command, Family, Ours, Removal, Ruleset, TableName, remove};

use super::error::Error;
use super::rules::{CHAINS, Rules};

/// Reads and writes the chains of [`super::rules`].
pub struct Chains {
    commands: BTreeMap<Family, Command>,
    ours: Ours,
    /// What was written or found right last, to know a change of ours from none without reading.
    known: BTreeMap<(Family, TableName), Ruleset>,
}

impl Chains {
    /// Chooses the variant of iptables the host uses, per family. A family whose programs are
    /// missing or do not work is dropped from `families`, but IPv4 must work.
    pub fn open(families: &mut Vec<Family>) -> Result<Self, Error> {
        let mut commands = BTreeMap::new();
        for family in families.clone() {
            match Command::detect(family, None) {
                Ok(found) => {
                    tracing::info!(
                        ?family, variant = %found.command.variant(), reason = ?found.reason,
                        passed_over = ?found.passed_over, "iptables chosen"
                    );
                    if let Some(mixed) = found.mixed {
                        tracing::warn!(
                            ?family, variant = %found.command.variant(), other = %mixed.other, rules = mixed.rules,
                            "this host has rules in both variants of iptables; packets meet both, programs see one"
                        );
                    }
                    commands.insert(family, found.command);
                }
                Err(error) if family == Family::V6 => {
                    tracing::warn!(%error, "IPv6 is not served");
                    families.retain(|kept| *kept != family);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { commands, ours: Ours::new(CHAINS), known: BTreeMap::new() })
    }

    /// Makes the chains right; returns how many tables were not. With `check` they are read back,
    /// else only tables whose rules changed since the last call are looked at. One table that
    /// fails does not keep the others from being written.
    pub fn sync(&mut self, wanted: Rules, check: bool) -> Result<usize, Error> {
        let mut repaired = 0;
        let mut failure = None;
        let mut families: BTreeMap<Family, Vec<(TableName, Ruleset)>> = BTreeMap::new();
        for (key, ruleset) in wanted {
            if check || self.known.get(&key) != Some(&ruleset) {
                families.entry(key.0).or_default().push((key.1, ruleset));
            }
        }
        for (family, tables) in families {
            let Some(command) = self.commands.get(&family) else { continue };
            // Programs are dear, so one reads and one writes all tables of a family.
            let results = command.sync_tables(&self.ours, &tables);
            for ((table, ruleset), result) in tables.into_iter().zip(results) {
                match result {
                    Ok(plan) => {
                        if !plan.is_empty() {
                            repaired += 1;
                            tracing::info!(?family, %table, changes = ?plan.describe(), "iptables written");
                        }
                        self.known.insert((family, table), ruleset);
                    }
                    Err(error) => {
                        self.known.remove(&(family, table));
                        tracing::warn!(?family, %table, %error, "iptables refused");
                        failure = Some(error);
                    }
                }
            }
        }
        failure.map_or(Ok(repaired), |error| Err(error.into()))
    }

    /// What [`Chains::sync`] would write, one line each.
    pub fn difference(&self, wanted: &Rules) -> Result<Vec<String>, Error> {
        let mut lines = Vec::new();
        for ((family, table), ruleset) in wanted {
            let Some(command) = self.commands.get(family) else { continue };
            let plan = command.compare(*table, &self.ours, ruleset)?;
            lines.extend(plan.describe().into_iter().map(|line| format!("{family} {table}: {line}")));
        }
        Ok(lines)
    }

    /// Removes the chains and the jumps to them.
    pub fn remove(&mut self, dry_run: bool) -> Removal {
        self.known.clear();
        let commands: Vec<Command> = self.commands.values().cloned().collect();
        remove(&commands, &self.ours, None, dry_run)
    }
}
