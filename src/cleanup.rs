//! `--cleanup-config`: takes out of this machine's kernel what is ours, and nothing else.
//!
//! Each room knows what it owns; here only the outcome is put together. No API server is needed.
//! Doing it twice finds nothing the second time and is no error.

use std::fmt::Write as _;
use std::path::Path;

use ferroute_iptables::SetName;
use ferroute_iptables::ipset::{self, Change, Header};

use crate::cni::install::{self, BIN_DIR};
use crate::{netpol, network, proxy};

/// What one room removed, or would remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    /// One line per object.
    pub removed: Vec<String>,
    /// What stays although it is ours, and why.
    pub failures: Vec<String>,
}

impl Cleanup {
    /// Destroys the sets that `ours` picks of those the kernel has, in that order; nothing may name them any
    /// more. With `dry_run` only tells. A kernel that knows no sets has none of ours.
    pub fn destroy_sets(&mut self, ours: impl FnOnce(&[Header]) -> Vec<SetName>, dry_run: bool) {
        match ipset::Handle::open() {
            Ok(mut sets) => self.destroy_sets_in(&mut sets, ours, dry_run),
            Err(ipset::Error::NoKernelSupport) => {}
            Err(error) => self.failures.push(error.to_string()),
        }
    }

    /// The same through a handle that is open.
    pub fn destroy_sets_in(
        &mut self,
        sets: &mut ipset::Handle,
        ours: impl FnOnce(&[Header]) -> Vec<SetName>,
        dry_run: bool,
    ) {
        let present = match sets.headers() {
            Ok(present) => present,
            Err(error) => return self.failures.push(error.to_string()),
        };
        let ours = ours(&present);
        let changes: Vec<_> = ours.iter().map(|set| Change::Destroy { set: *set }).collect();
        let failures = match if dry_run { Ok(Vec::new()) } else { sets.apply(&changes) } {
            Ok(failures) => failures,
            Err(error) => return self.failures.push(error.to_string()),
        };
        for (index, name) in ours.iter().enumerate() {
            match failures.iter().find(|failure| failure.change == index) {
                Some(failure) => self.failures.push(failure.to_string()),
                None => self.removed.push(format!("ipset {name}")),
            }
        }
    }
}

/// Of these sets, those that the kernel has.
pub fn present(names: Vec<SetName>, kernel: &[Header]) -> Vec<SetName> {
    names.into_iter().filter(|name| kernel.iter().any(|header| header.name == name.as_str())).collect()
}

/// What was done, ready to print.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// One line per object, and a closing one.
    pub text: String,
    /// One line per object that could not be removed.
    pub failures: Vec<String>,
}

/// Removes everything of ours, or only says what that would be.
pub fn run(cni_conf_dir: &Path, dry_run: bool) -> Outcome {
    // First, so that pods start without the daemon again.
    let plugin = install::uninstall(cni_conf_dir, Path::new(BIN_DIR), dry_run);
    let (mut removed, mut failures) = (plugin.removed, plugin.failures);
    // Rules of policies name sets of the service proxy, so they go before it.
    for room in [netpol::cleanup, network::cleanup, proxy::cleanup] {
        let Cleanup { removed: more, failures: failed } = room(dry_run);
        removed.extend(more);
        // What both miss, such as iptables, is said once.
        let new: Vec<String> = failed.into_iter().filter(|failure| !failures.contains(failure)).collect();
        failures.extend(new);
    }
    let mut outcome = Outcome::new(dry_run, &removed, failures);
    for note in plugin.notes {
        // Writing to a String cannot fail.
        let _ = writeln!(outcome.text, "{note}");
    }
    outcome
}

impl Outcome {
    fn new(dry_run: bool, removed: &[String], failures: Vec<String>) -> Self {
        let verb = if dry_run { "would remove" } else { "removed" };
        let mut text = String::new();
        // Writing to a String cannot fail.
        for object in removed {
            let _ = writeln!(text, "{verb} {object}");
        }
        let _ = match (removed.len(), failures.len()) {
            (0, 0) => writeln!(text, "nothing of ferroute is left on this machine"),
            (count, 0) => writeln!(text, "{verb} {count} objects"),
            (count, failed) => writeln!(text, "{verb} {count} objects; {failed} failures"),
        };
        Self { text, failures }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_was_done() {
        let objects = ["link kube-dummy-if".to_owned(), "ipset kube-router-svip".to_owned()];
        assert_eq!(
            Outcome::new(false, &objects, vec![]).text,
            "removed link kube-dummy-if\nremoved ipset kube-router-svip\nremoved 2 objects\n"
        );
        assert_eq!(
            Outcome::new(true, &objects[..1], vec![]).text,
            "would remove link kube-dummy-if\nwould remove 1 objects\n"
        );
        assert_eq!(Outcome::new(false, &[], vec![]).text, "nothing of ferroute is left on this machine\n");
        let failed = Outcome::new(false, &[], vec!["ipset x: busy".to_owned()]);
        assert_eq!(failed.text, "removed 0 objects; 1 failures\n");
    }
}
