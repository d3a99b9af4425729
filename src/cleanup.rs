//! `--cleanup-config`: takes out of this machine's kernel what is ours, and nothing else.
//!
//! Each room knows what it owns; here only the outcome is put together. No API server is needed.
//! Doing it twice finds nothing the second time and is no error.

use std::fmt::Write as _;

use crate::{netpol, proxy};

/// What one room removed, or would remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    /// One line per object.
    pub removed: Vec<String>,
    /// What stays although it is ours, and why.
    pub failures: Vec<String>,
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
pub fn run(dry_run: bool) -> Outcome {
    // Rules of policies name sets of the service proxy, so they go first.
    let Cleanup { mut removed, mut failures } = netpol::cleanup(dry_run);
    let services = proxy::cleanup(dry_run);
    removed.extend(services.removed);
    // What both miss, such as iptables, is said once.
    failures.extend(
        services.failures.into_iter().filter(|failure| !failures.contains(failure)).collect::<Vec<_>>(),
    );
    Outcome::new(dry_run, &removed, failures)
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
