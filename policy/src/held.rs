//! Policies whose object cannot be read, but whose chains the kernel still holds: what they allow is in
//! chains that stay as they are, and whom they isolate follows from whom they isolated. A selector looks at
//! nothing but labels, so pods with the labels of one that was there are judged like it. Of others it cannot
//! be told, so they are isolated.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::{Direction, Index, Key, Labels};

/// What the kernel told of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    directions: BTreeSet<Direction>,
    /// Whether it selects pods with these labels.
    selects: BTreeMap<Arc<Labels>, bool>,
}

impl Held {
    /// It isolates in this direction.
    pub fn add_direction(&mut self, direction: Direction) {
        self.directions.insert(direction);
    }

    /// Notes whether it selected a pod with these labels. Where pods with the same labels differ, the one
    /// that was selected counts: labels of the other changed since.
    pub fn note(&mut self, labels: &Arc<Labels>, selected: bool) {
        *self.selects.entry(labels.clone()).or_default() |= selected;
    }

    /// Whether it isolates the pods that it selects in a direction.
    pub(crate) fn isolates(&self, direction: Direction) -> bool {
        self.directions.contains(&direction)
    }

    /// Whether it selects a pod with these labels, as far as can be told.
    pub(crate) fn selects(&self, labels: &Labels) -> bool {
        self.selects.get(labels).copied().unwrap_or(true)
    }
}

impl Index {
    /// Keeps a policy that cannot be read in force: its pods stay in the groups they were in, whose chains
    /// jump to its chains, and pods of its namespace join them of which it cannot be told that they need not.
    /// The chains are none of this index's: who holds them sees that they stay. A policy that can be read is
    /// not held.
    pub fn hold_policy(&mut self, key: &Key, held: Held) {
        if self.policy(key).is_none() {
            self.held.insert(key.clone(), held);
            self.dirty.policies.insert(key.clone());
        }
    }

    /// The policy can be read, or is gone: nothing of it is held any more.
    pub fn release_policy(&mut self, key: &Key) {
        if self.held.remove(key).is_some() {
            self.dirty.policies.insert(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ferroute_iptables::Family;

    use super::*;
    use crate::{Exempt, Options, Pod, Policy, Selector, UnknownPods, group_chain, policy_chain};

    #[test]
    fn pods_that_come_are_judged_by_their_labels() {
        let labels = |app: &str| Arc::new(Labels::from([("app".into(), app.into())]));
        let mut held = Held::default();
        held.add_direction(Direction::Egress);
        for (app, selected) in [("web", true), ("db", false), ("mail", false), ("mail", true)] {
            held.note(&labels(app), selected);
        }
        let mut index = Index::new(Options {
            families: Family::BOTH.to_vec(),
            unknown_pods: UnknownPods::Deny,
            exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
        });
        index.set_pod_networks(vec!["10.1.0.0/24".parse().unwrap()]);
        index.hold_policy(&Key::new("shop", "lost"), held);
        let isolated = |index: &Index| -> Vec<String> {
            let told = index.isolated().map(|(direction, pod, _)| format!("{pod} {direction}"));
            told.collect()
        };
        for (at, (namespace, app, local)) in [
            ("shop", "web", true),
            ("shop", "db", true),
            ("shop", "mail", true),
            ("shop", "new", true),
            ("shop", "far", false),
            ("other", "web", true),
            ("other", "new", true),
        ]
        .into_iter()
        .enumerate()
        {
            index.put_namespace(&namespace.into(), Some(Arc::default()));
            let pod = Pod {
                labels: labels(app),
                ips: vec![format!("10.1.0.{}", at + 2).parse().unwrap()],
                host_network: false,
                local,
                ports: Vec::new(),
            };
            index.put_pod(&Key::new(namespace, app), Some(pod));
            // Some come together, some alone.
            if at % 2 == 0 {
                index.settle();
            }
        }
        let expected = ["shop/mail egress", "shop/new egress", "shop/web egress"];
        assert_eq!(isolated(&index), expected);
        // Nobody was like a pod whose labels change.
        let changed =
            Pod { labels: labels("changed"), ..index.pod(&Key::new("shop", "db")).unwrap().clone() };
        index.put_pod(&Key::new("shop", "db"), Some(changed));
        index.settle();
        assert_eq!(isolated(&index).len(), 4);
        index.release_policy(&Key::new("shop", "lost"));
        index.settle();
        assert!(isolated(&index).is_empty());
    }

    #[test]
    fn a_held_policy_keeps_its_groups_and_none_of_its_chains() {
        let mut index = Index::new(Options {
            families: Family::BOTH.to_vec(),
            unknown_pods: UnknownPods::Deny,
            exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
        });
        index.set_pod_networks(vec!["10.1.0.0/24".parse().unwrap()]);
        index.put_namespace(&"shop".into(), Some(Arc::default()));
        let (web, lost, other) =
            (Key::new("shop", "web"), Key::new("shop", "lost"), Key::new("shop", "other"));
        let pod = Pod {
            labels: Arc::default(),
            ips: vec!["10.1.0.5".parse().unwrap()],
            host_network: false,
            local: true,
            ports: Vec::new(),
        };
        let policy =
            |ingress| Some(Arc::new(Policy { pod_selector: Selector::default(), ingress, egress: None }));
        index.put_pod(&web, Some(pod.clone()));
        index.put_policy(&lost, policy(Some(Vec::new())));
        index.put_policy(&other, policy(Some(Vec::new())));
        index.settle();
        let (sets, chains) = (index.sets().clone(), index.ruleset(Family::V4).unwrap().clone());

        // The same without the object of one, but with what the kernel told of it.
        index.put_policy(&lost, None);
        let mut held = Held::default();
        held.add_direction(Direction::Ingress);
        held.note(&Arc::default(), true);
        index.hold_policy(&lost, held);
        index.settle();
        assert_eq!(*index.sets(), sets);
        let its_own = policy_chain(Direction::Ingress, &lost);
        let mut expected = chains.clone();
        assert!(expected.chains.remove(&its_own).is_some());
        assert_eq!(*index.ruleset(Family::V4).unwrap(), expected);
        // The pod goes and comes again, as it may while it is held.
        index.put_pod(&web, None);
        index.settle();
        index.put_pod(&web, Some(pod));
        index.settle();
        assert_eq!(*index.ruleset(Family::V4).unwrap(), expected);
        assert!(expected.chains.contains_key(&group_chain(Direction::Ingress, &[lost.clone(), other])));

        index.put_policy(&lost, policy(Some(Vec::new())));
        index.release_policy(&lost);
        index.settle();
        assert_eq!(*index.ruleset(Family::V4).unwrap(), chains);
        index.put_policy(&lost, None);
        index.settle();
        assert!(!index.ruleset(Family::V4).unwrap().chains.contains_key(&its_own));
        assert_ne!(*index.sets(), sets);
    }
}
