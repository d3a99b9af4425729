//! `--cleanup-config` for the policy room: takes away its chains, the jumps to them and its sets,
//! and nothing else. What is ours is known by name, so no API server and no running daemon is
//! needed; kube-router's own leftovers of the same names go too.

use ferroute_iptables::SetName;
use ferroute_iptables::ipset::{self, Change};
use ferroute_policy::CHAIN_PREFIXES;

use super::kernel::set_prefixes;
use crate::chains;
use crate::cleanup::Cleanup;

/// Removes chains and jumps, then the sets they name. Every failure is told and the rest is still
/// done. With `dry_run` only tells.
///
/// Sysctls stay: other programs may rely on them by now.
pub fn cleanup(dry_run: bool) -> Cleanup {
    let mut cleanup = Cleanup::default();
    chains::remove_everywhere(&CHAIN_PREFIXES, dry_run, &mut cleanup);
    match ipset::Handle::open() {
        Ok(mut sets) => {
            if let Err(error) = remove_sets(&mut sets, dry_run, &mut cleanup) {
                cleanup.failures.push(error.to_string());
            }
        }
        Err(ipset::Error::NoKernelSupport) => {}
        Err(error) => cleanup.failures.push(error.to_string()),
    }
    cleanup
}

fn remove_sets(sets: &mut ipset::Handle, dry_run: bool, cleanup: &mut Cleanup) -> Result<(), ipset::Error> {
    let prefixes = set_prefixes();
    let ours: Vec<SetName> = sets
        .headers()?
        .iter()
        .filter(|header| prefixes.iter().any(|prefix| header.name.starts_with(prefix)))
        .filter_map(|header| SetName::new(&header.name).ok())
        .collect();
    let changes: Vec<Change> = ours.iter().map(|set| Change::Destroy { set: *set }).collect();
    let failures = if dry_run { Vec::new() } else { sets.apply(&changes)? };
    for (index, name) in ours.iter().enumerate() {
        match failures.iter().find(|failure| failure.change == index) {
            Some(failure) => cleanup.failures.push(failure.to_string()),
            None => cleanup.removed.push(format!("ipset {name}")),
        }
    }
    Ok(())
}
