//! Pods that stay as closed or as open as this process found them at its start, because what says
//! otherwise may be in an object it cannot read. Pure.
//!
//! An object that breaks while the process runs keeps its last good state by itself. After a restart
//! there is none, and a policy that cannot be read would count as deleted: its pods would open. So
//! they stay isolated; what that policy allowed is refused, since its rules are not known. When the
//! object is mended or gone, its pods are judged like all others.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ferroute_iptables::SetName;
use ferroute_iptables::ipset::{Change, Entry, Sets};
use ferroute_policy::Gate;

use super::order::Ordered;
use crate::cluster::{Kind, State};

/// Whether something cannot be read that decides about pods of this node.
pub fn is_blind(state: &State) -> bool {
    state
        .unreadable
        .keys()
        .any(|what| matches!(what.kind, None | Some(Kind::NetworkPolicy | Kind::Namespace | Kind::Pod)))
}

/// Entries of gates that stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    entries: BTreeSet<(SetName, Entry)>,
}

impl Hold {
    /// What was found in the gates at the start and nobody wants.
    pub fn begin(found: &Sets, desired: &Sets) -> Self {
        let entries = found
            .iter()
            .filter(|(name, _)| Gate::of(**name).is_some())
            .flat_map(|(name, set)| set.entries().keys().map(|entry| (*name, *entry)))
            .filter(|(name, entry)| !desired.get(name).is_some_and(|set| set.entries().contains_key(entry)))
            .collect();
        Self { entries }
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes what is held out of the changes to make.
    pub fn keep(&self, ordered: &mut Ordered) {
        if self.is_empty() {
            return;
        }
        let before = std::mem::take(&mut ordered.before);
        ordered.before = before
            .into_iter()
            .filter_map(|change| match change {
                Change::Delete { set, mut entries } => {
                    entries.retain(|entry| !self.entries.contains(&(set, *entry)));
                    (!entries.is_empty()).then_some(Change::Delete { set, entries })
                }
                other => Some(other),
            })
            .collect();
    }

    /// A pod came and has this address now: it is judged by what is known of it.
    pub fn release(&mut self, address: IpAddr) {
        self.entries.retain(|(_, entry)| *entry != Entry::Ip(address));
    }

    /// One line for each address, for people.
    pub fn describe(&self) -> Vec<String> {
        let line = |(set, entry): &(SetName, Entry)| {
            let how = match Gate::of(*set) {
                Some(Gate::Isolated) => "stays isolated",
                _ => "stays known",
            };
            format!("{entry} {how} ({set}): an object that cannot be read may say so")
        };
        self.entries.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use ferroute_iptables::Family;
    use ferroute_iptables::ipset::{Extra, Options, Set, SetType};

    use super::*;
    use crate::cluster::{ObjectKey, Unreadable};
    use crate::netpol::order;

    fn sets(entries: &[(&str, &[&str])]) -> Sets {
        entries
            .iter()
            .map(|(name, addresses)| {
                let mut set = Set::new(SetType::HashIp, Family::V4, Options::default());
                for address in *addresses {
                    set.insert(Entry::Ip(address.parse().unwrap()), Extra::default()).unwrap();
                }
                (SetName::new(name).unwrap(), set)
            })
            .collect()
    }

    #[test]
    fn pods_of_a_policy_that_cannot_be_read_stay_isolated() {
        let found = sets(&[
            ("kube-router-isolated-in", &["10.1.0.1", "10.1.0.2"]),
            ("kube-router-local-pods", &["10.1.0.1", "10.1.0.2", "10.1.0.3"]),
            ("KUBE-SRC-ABCDEFGHIJKLMNOP", &["10.1.0.9"]),
        ]);
        let desired = sets(&[
            ("kube-router-isolated-in", &["10.1.0.1"]),
            ("kube-router-local-pods", &["10.1.0.1", "10.1.0.2"]),
            ("KUBE-SRC-ABCDEFGHIJKLMNOP", &[]),
        ]);
        let mut hold = Hold::begin(&found, &desired);
        assert_eq!(hold.describe().len(), 2, "{:?}", hold.describe());
        let mut ordered = order::whole(&found, &desired);
        hold.keep(&mut ordered);
        assert!(ordered.before.is_empty() && ordered.after.len() == 1, "{:?}", ordered.describe());
        hold.release("10.1.0.2".parse().unwrap());
        let mut ordered = order::whole(&found, &desired);
        hold.keep(&mut ordered);
        assert_eq!(ordered.describe()[0], "delete from ipset kube-router-isolated-in: 10.1.0.2");
        assert_eq!(ordered.before.len(), 1);
    }

    #[test]
    fn only_what_decides_about_pods_blinds() {
        let mut state = State::default();
        let mut blind = |what: Unreadable| {
            state.unreadable = [(what, None)].into();
            is_blind(&state)
        };
        let key = ObjectKey::new("shop", "x");
        assert!(blind(Unreadable::object(Kind::NetworkPolicy, key.clone())));
        assert!(blind(Unreadable::manifest(key.clone())));
        assert!(!blind(Unreadable::object(Kind::Service, key)));
    }
}
