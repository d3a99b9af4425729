//! Policies whose object cannot be read, but whose chains the kernel still holds: which pods they isolate
//! is known, what they allow is in chains that stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Direction, Index, Key};

/// Pods that a policy isolates, as the kernel told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held(BTreeMap<Direction, BTreeSet<Key>>);

impl Held {
    /// Adds a pod that it isolates in a direction.
    pub fn insert(&mut self, direction: Direction, pod: Key) {
        self.0.entry(direction).or_default().insert(pod);
    }

    /// Whether it isolates a pod in a direction.
    #[must_use]
    pub fn isolates(&self, direction: Direction, pod: &Key) -> bool {
        self.0.get(&direction).is_some_and(|pods| pods.contains(pod))
    }

    /// Every pod, once for each direction.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Key> {
        self.0.values().flatten()
    }

    pub(crate) fn has(&self, pod: &Key) -> bool {
        self.pods().any(|held| held == pod)
    }
}

impl Index {
    /// Keeps a policy that cannot be read in force: its pods stay in the groups they were in, whose chains
    /// jump to its chains. These are none of this index's: who holds them sees that they stay. A policy that
    /// can be read is not held.
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
        held.insert(Direction::Ingress, web.clone());
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
