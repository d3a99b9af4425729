//! Takes away exactly what is ours: chains, jumps and sets.

use crate::ipset::{Change, Handle};
use crate::table::{Ours, Ruleset, TableName};
use crate::{Command, SetName};

/// What was, or would be, removed. Everything that failed is told and the rest was still done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// One line each, as in "iptables filter: delete chain X", "ipset X".
    pub removed: Vec<String>,
    /// What stays and why.
    pub failed: Vec<String>,
}

/// Removes our chains and jumps through `commands` from all tables, then the sets with `prefixes`. With
/// `dry_run` only tells. Doing it again finds nothing.
///
/// Both variants may hold chains of ours (a host that was switched): pass a command for each.
#[must_use]
pub fn remove(
    commands: &[Command],
    ours: &Ours,
    sets: Option<(&mut Handle, &[&str])>,
    dry_run: bool,
) -> Removal {
    let mut removal = Removal::default();
    for command in commands {
        let program = format!("{}-{}", crate::command::program(command.family()), command.variant());
        // Naming a legacy table would load it where it is not in use.
        let present = match command.tables() {
            Ok(present) => present,
            Err(error) => {
                removal.failed.push(format!("{program}: {error}"));
                continue;
            }
        };
        for table in TableName::ALL.into_iter().filter(|table| present.contains(table)) {
            let plan = command.compare(table, ours, &Ruleset::default());
            let plan = plan.and_then(|plan| {
                if !dry_run {
                    command.write(table, &plan)?;
                }
                Ok(plan)
            });
            match plan {
                Ok(plan) => {
                    let lines = plan.describe();
                    removal
                        .removed
                        .extend(lines.into_iter().map(|line| format!("{program} {table}: {line}")));
                    removal.failed.extend(plan.held.iter().map(|chain| {
                        format!("{program} {table}: chain {chain} stays, empty: a rule of another program leads to it")
                    }));
                }
                Err(error) => removal.failed.push(format!("{program} {table}: {error}")),
            }
        }
    }
    if let Some((handle, prefixes)) = sets {
        remove_sets(handle, prefixes, dry_run, &mut removal);
    }
    removal
}

fn remove_sets(handle: &mut Handle, prefixes: &[&str], dry_run: bool, removal: &mut Removal) {
    let headers = match handle.headers() {
        Ok(headers) => headers,
        Err(error) => return removal.failed.push(error.to_string()),
    };
    let ours = |name: &str| prefixes.iter().any(|prefix| !prefix.is_empty() && name.starts_with(prefix));
    let changes: Vec<Change> = headers
        .iter()
        .filter(|header| ours(&header.name))
        .filter_map(|header| SetName::new(&header.name).ok())
        .map(|set| Change::Destroy { set })
        .collect();
    let failed = if dry_run {
        Vec::new()
    } else {
        match handle.apply(&changes) {
            Ok(failed) => failed,
            Err(error) => return removal.failed.push(error.to_string()),
        }
    };
    for (index, change) in changes.iter().enumerate() {
        match failed.iter().find(|failed| failed.change == index) {
            Some(failed) => removal.failed.push(failed.to_string()),
            None => removal.removed.push(format!("ipset {}", change.set())),
        }
    }
}
