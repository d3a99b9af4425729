//! `--cleanup-config` for the policy room: takes away its chains, the jumps to them and its sets,
//! and nothing else. What is ours is known by name, so no API server and no running daemon is
//! needed; kube-router's own leftovers of the same names go too.

use ferroute_iptables::SetName;
use ferroute_iptables::ipset::Header;
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
    let prefixes = set_prefixes();
    let is_ours = |header: &&Header| prefixes.iter().any(|prefix| header.name.starts_with(prefix));
    let ours = |present: &[Header]| {
        present.iter().filter(is_ours).filter_map(|header| SetName::new(&header.name).ok()).collect()
    };
    cleanup.destroy_sets(ours, dry_run);
    cleanup
}
