//! In which order sets and chains change, so that no packet meets half of a change. Pure.
//!
//! 1. Sets are made and filled: nothing looks at them yet, or they only allow more of what the new
//!    rules will allow anyway.
//! 2. Pods that go are forgotten, which closes their addresses.
//! 3. Chains.
//! 4. Pods become isolated, then known: the rules they meet are complete.
//! 5. What no rule needs any more is taken out, and away.
//!
//! Without a change of chains, all of it is one batch of messages.

use ferroute_iptables::ipset::{Change, Difference, Retype, Sets, diff, diff_entries};
use ferroute_policy::{Gate, Touched};

/// Changes of sets, before and after those of chains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ordered {
    /// Sets of another type: the chains that name them go first.
    pub retype: Vec<Retype>,
    /// Stages 1 and 2.
    pub before: Vec<Change>,
    /// Stage 4.
    pub gates: Vec<Change>,
    /// Stage 5.
    pub after: Vec<Change>,
}

impl Ordered {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many steps.
    pub fn len(&self) -> usize {
        self.retype.len() + self.before.len() + self.gates.len() + self.after.len()
    }

    /// One line per step, for people.
    pub fn describe(&self) -> Vec<String> {
        let retype = self.retype.iter().map(|step| format!("replace ipset {} by {}", step.set, step.to));
        let change = |change: &Change| match change {
            Change::Create { set, kind, .. } => format!("create ipset {set} ({kind})"),
            Change::Add { set, entries } => {
                format!("add to ipset {set}: {}", listed(entries.iter().map(|e| e.0)))
            }
            Change::Delete { set, entries } => {
                format!("delete from ipset {set}: {}", listed(entries.iter().copied()))
            }
            Change::Replace { set, .. } => format!("replace ipset {set} for other options"),
            Change::Destroy { set } => format!("destroy ipset {set}"),
        };
        retype.chain(self.before.iter().chain(&self.gates).chain(&self.after).map(change)).collect()
    }
}

fn listed(entries: impl Iterator<Item = ferroute_iptables::ipset::Entry>) -> String {
    const SHOWN: usize = 5;
    let all: Vec<String> = entries.map(|entry| entry.to_string()).collect();
    match all.len() {
        count if count > SHOWN => format!("{} and {} more", all[..SHOWN].join(" "), count - SHOWN),
        _ => all.join(" "),
    }
}

/// Everything that differs.
pub fn whole(actual: &Sets, desired: &Sets) -> Ordered {
    ordered(diff(actual, desired))
}

/// What differs of what was touched: the cost follows the change.
pub fn touched(actual: &Sets, desired: &Sets, touched: &Touched) -> Ordered {
    let mut difference = Difference::default();
    for name in &touched.sets {
        let part =
            |sets: &Sets| -> Sets { sets.get(name).map(|set| (*name, set.clone())).into_iter().collect() };
        let one = diff(&part(actual), &part(desired));
        difference.changes.extend(one.changes);
        difference.retype.extend(one.retype);
        difference.destroy.extend(one.destroy);
    }
    let entries = touched.entries.iter().filter(|(set, _)| !touched.sets.contains(set)).copied();
    let rest = diff_entries(actual, desired, entries);
    difference.changes.extend(rest.changes);
    difference.retype.extend(rest.retype);
    ordered(difference)
}

fn ordered(difference: Difference) -> Ordered {
    let mut ordered = Ordered { retype: difference.retype, ..Ordered::default() };
    let (mut add, mut replace, mut leave) = (Vec::new(), Vec::new(), Vec::new());
    for change in difference.changes {
        match (&change, Gate::of(change.set())) {
            (Change::Create { .. }, _) => ordered.before.push(change),
            (Change::Replace { .. }, _) => replace.push(change),
            (Change::Add { .. }, None) => add.push(change),
            (Change::Add { .. }, Some(_)) => ordered.gates.push(change),
            (Change::Delete { .. }, Some(_)) => leave.push(change),
            (Change::Delete { .. }, None) | (Change::Destroy { .. }, _) => ordered.after.push(change),
        }
    }
    ordered.gates.sort_by_key(|change| Gate::of(change.set()));
    leave.sort_by_key(|change| std::cmp::Reverse(Gate::of(change.set())));
    ordered.before.append(&mut add);
    ordered.before.append(&mut replace);
    ordered.before.append(&mut leave);
    ordered.after.extend(difference.destroy);
    ordered
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ferroute_iptables::Family;
    use ferroute_iptables::ipset::apply_to;
    use ferroute_policy::{Exempt, Index, Key, Options, Peer, Pod, Policy, Rule, Selector, UnknownPods};

    use super::*;

    fn index() -> Index {
        let mut index = Index::new(Options {
            families: Family::BOTH.to_vec(),
            unknown_pods: UnknownPods::Deny,
            exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
        });
        index.set_pod_networks(vec!["10.1.0.0/24".parse().unwrap()]);
        let policy = Policy {
            pod_selector: Selector::default(),
            ingress: Some(vec![Rule {
                peers: Some(vec![Peer::Pods { namespaces: None, pods: Selector::default() }]),
                ports: None,
            }]),
            egress: None,
        };
        index.put_policy(&Key::new("shop", "same"), Some(Arc::new(policy)));
        index.put_namespace(&"shop".into(), Some(Arc::default()));
        index
    }

    fn pod(ip: &str) -> Option<Pod> {
        Some(Pod {
            labels: Arc::default(),
            ips: vec![ip.parse().unwrap()],
            host_network: false,
            local: true,
            ports: Vec::new(),
        })
    }

    fn names(changes: &[Change]) -> Vec<String> {
        let name = |change: &Change| {
            let verb = match change {
                Change::Create { .. } => "create",
                Change::Add { .. } => "add",
                Change::Delete { .. } => "delete",
                Change::Replace { .. } => "replace",
                Change::Destroy { .. } => "destroy",
            };
            let set = change.set().as_str().to_owned();
            // Hashes say nothing here.
            format!("{verb} {}", set.get(..9).filter(|p| p.starts_with("KUBE-")).unwrap_or(&set))
        };
        changes.iter().map(name).collect()
    }

    #[test]
    fn a_pod_comes_after_its_rules_and_goes_before_them() {
        let mut index = index();
        let mut kernel = Sets::new();
        index.settle();
        apply_to(&mut kernel, &whole(&Sets::new(), index.sets()).before);
        assert!(whole(&kernel, index.sets()).is_empty());
        index.put_pod(&Key::new("shop", "a"), pod("10.1.0.5"));
        let started = index.settle();
        let ordered = touched(&kernel, index.sets(), &started);
        let before = names(&ordered.before);
        assert!(before[0].starts_with("create KUBE-"), "{before:?}");
        assert!(before.contains(&"add KUBE-SRC-".to_owned()) && before.contains(&"add KUBE-DST-".to_owned()));
        assert_eq!(names(&ordered.gates), ["add kube-router-isolated-in", "add kube-router-local-pods"]);
        assert!(ordered.after.is_empty());
        assert_eq!(whole(&kernel, index.sets()), ordered, "what was touched is what differs");
        for changes in [&ordered.before, &ordered.gates] {
            apply_to(&mut kernel, changes);
        }
        assert!(whole(&kernel, index.sets()).is_empty());

        index.put_pod(&Key::new("shop", "a"), None);
        let ended = index.settle();
        let ordered = touched(&kernel, index.sets(), &ended);
        assert_eq!(
            names(&ordered.before),
            ["delete kube-router-local-pods", "delete kube-router-isolated-in"]
        );
        assert!(ordered.gates.is_empty());
        let after = names(&ordered.after);
        assert!(after.iter().all(|step| !step.starts_with("add")), "{after:?}");
        assert!(after.last().unwrap().starts_with("destroy inet6:KUBE-"), "{after:?}");
    }

    #[test]
    fn a_pod_of_a_known_kind_costs_its_entries() {
        let mut index = index();
        index.put_pod(&Key::new("shop", "a"), pod("10.1.0.5"));
        index.settle();
        let kernel = index.sets().clone();
        index.put_pod(&Key::new("shop", "b"), pod("10.1.0.6"));
        let started = index.settle();
        assert!(started.chains.is_empty());
        let ordered = touched(&kernel, index.sets(), &started);
        assert_eq!(ordered.len(), 5, "{:?}", ordered.describe());
        assert!(ordered.describe().iter().all(|line| line.contains("10.1.0.6")), "{:?}", ordered.describe());
    }
}
