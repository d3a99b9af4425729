//! Pods that stay as closed or as open as this process found them at its start, because what says
//! otherwise may be in an object it cannot read. Pure.
//!
//! An object that breaks while the process runs keeps its last good state by itself. After a restart
//! there is none, and a policy that cannot be read would count as deleted: its pods would open. What the
//! kernel holds of it is its last good state then. Chains have the policy's name in theirs: who jumps to
//! them are the chains of the pods it isolates, so these stay isolated, and its own chains and the sets they
//! look at stay as they are, so what it allowed stays allowed. Pods of its namespace that start later are
//! isolated by it too, unless a pod with the same labels was here and was not. It refuses peers that come
//! later.
//!
//! Where its chains are gone too, or a manifest as a whole cannot be read, pods that were isolated stay so,
//! and what may have been allowed is refused. Pods that start later are judged without it: nothing tells it
//! from a policy that never was in force. When the object is mended or gone, its pods are judged like all
//! others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferroute_iptables::ipset::{Change, Entry, Sets};
use ferroute_iptables::{ChainName, Family, Found, SetName};
use ferroute_policy::{Direction, Gate, Held, Index, Key, Pod, group_of, policy_chain};

use super::gather;
use super::order::Ordered;
use crate::cluster::{Kind, State, Unreadable};

/// Whether something cannot be read that decides about pods of this node.
pub fn is_blind(state: &State) -> bool {
    state
        .unreadable
        .keys()
        .any(|what| matches!(what.kind, None | Some(Kind::NetworkPolicy | Kind::Namespace | Kind::Pod)))
}

/// What stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// Entries of gates.
    entries: BTreeSet<(SetName, Entry)>,
    /// Policies that are in force as the kernel has them.
    policies: BTreeMap<Key, Kept>,
    /// Addresses that another pod has now: what allowed the last one allows it nothing.
    reused: BTreeSet<IpAddr>,
}

/// The kernel's part of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    chains: BTreeSet<ChainName>,
    /// Sets that its chains look at.
    sets: BTreeSet<SetName>,
}

impl Hold {
    /// What was found at the start and belongs to policies that cannot be read, which are held in the index
    /// too; and what was found in the gates and nobody wants.
    pub fn begin(state: &State, chains: &BTreeMap<Family, Found>, sets: &Sets, index: &mut Index) -> Self {
        let mut hold = Self::default();
        for what in state.unreadable.keys().filter(|what| what.kind == Some(Kind::NetworkPolicy)) {
            let key = gather::key(&what.key);
            if let Some((kept, held)) = found_of(&key, chains, sets, index) {
                index.hold_policy(&key, held);
                hold.policies.insert(key, kept);
            }
        }
        index.settle();
        hold.keep_gates(sets, index.sets());
        hold
    }

    /// Entries found in the gates that nobody wants.
    fn keep_gates(&mut self, found: &Sets, desired: &Sets) {
        self.entries = found
            .iter()
            .filter(|(name, _)| Gate::of(**name).is_some())
            .flat_map(|(name, set)| set.entries().keys().map(|entry| (*name, *entry)))
            .filter(|(name, entry)| !desired.get(name).is_some_and(|set| set.entries().contains_key(entry)))
            .collect();
    }

    /// Chains that stay as they are.
    pub fn chains(&self) -> BTreeSet<ChainName> {
        self.policies.values().flat_map(|kept| kept.chains.iter().copied()).collect()
    }

    /// Lets go of policies that can be read now, or are gone; whether there were any.
    pub fn release_readable(&mut self, state: &State, index: &mut Index) -> bool {
        let before = self.policies.len();
        self.policies.retain(|key, _| {
            let what = Unreadable::object(Kind::NetworkPolicy, gather::object_key(key));
            let stays = state.unreadable.contains_key(&what);
            if !stays {
                index.release_policy(key);
            }
            stays
        });
        self.policies.len() != before
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.policies.is_empty()
    }

    /// Takes what is held out of the changes to make. `actual` are the kernel's sets.
    pub fn keep(&self, ordered: &mut Ordered, actual: &Sets, desired: &Sets) {
        if self.is_empty() {
            return;
        }
        let sets: BTreeSet<SetName> =
            self.policies.values().flat_map(|kept| kept.sets.iter().copied()).collect();
        for stage in [&mut ordered.before, &mut ordered.after] {
            let changes = std::mem::take(stage);
            *stage = changes
                .into_iter()
                .filter_map(|change| match change {
                    Change::Delete { set, mut entries } => {
                        entries.retain(|entry| !self.entries.contains(&(set, *entry)));
                        (!entries.is_empty()).then_some(Change::Delete { set, entries })
                    }
                    Change::Destroy { set } if sets.contains(&set) => None,
                    other => Some(other),
                })
                .collect();
        }
        // Sets that somebody wants have their entries from there.
        for set in sets.into_iter().filter(|set| !desired.contains_key(set)) {
            let Some(found) = actual.get(&set) else { continue };
            let is_stale = |entry: &&Entry| self.reused.iter().any(|ip| names(entry, *ip));
            let entries: Vec<Entry> = found.entries().keys().filter(is_stale).copied().collect();
            if !entries.is_empty() {
                ordered.before.push(Change::Delete { set, entries });
            }
        }
    }

    /// A pod came and has this address now: it is judged by what is known of it.
    pub fn release(&mut self, address: IpAddr) {
        self.entries.retain(|(_, entry)| *entry != Entry::Ip(address));
        if !self.policies.is_empty() {
            self.reused.insert(address);
        }
    }

    /// One line for each policy and address, for people.
    pub fn describe(&self) -> Vec<String> {
        let line = |(set, entry): &(SetName, Entry)| {
            let how = match Gate::of(*set) {
                Some(Gate::Isolated) => "stays isolated",
                _ => "stays known",
            };
            format!("{entry} {how} ({set}): an object that cannot be read may say so")
        };
        let policies = self.policies.keys().map(|key| {
            format!(
                "NetworkPolicy {key} stays in force as the kernel has it, for new pods of unknown labels too: its \
                 object cannot be read"
            )
        });
        policies.chain(self.entries.iter().map(line)).collect()
    }
}

/// Whether an entry of a set of pods is an address's.
fn names(entry: &Entry, address: IpAddr) -> bool {
    match entry {
        Entry::Ip(ip) | Entry::IpPort(ip, ..) => *ip == address,
        Entry::IpPortIp(ip, _, _, other) => *ip == address || *other == address,
        // Blocks are of addresses, whoever has them.
        Entry::IpPortNet(ip, ..) => *ip == address,
        Entry::Net(_) | Entry::NetNet(..) => false,
    }
}

/// What the kernel holds of a policy: its chains and their sets, and the pods it isolates. `None` where no
/// chain of it is there in every family.
fn found_of(key: &Key, chains: &BTreeMap<Family, Found>, sets: &Sets, index: &Index) -> Option<(Kept, Held)> {
    let (mut kept, mut held) = (Kept::default(), Held::default());
    let entries = |set: &SetName| sets.get(set).into_iter().flat_map(|set| set.entries().keys());
    let pods = |entry: &Entry| {
        let Entry::Ip(ip) = entry else { return Vec::new() };
        let local = |(pod, it): &(&Key, &Pod)| it.is_enforced_here() && pod.namespace == key.namespace;
        index.pods_with(*ip).filter(local).map(|(_, it)| it.labels.clone()).collect()
    };
    for direction in Direction::BOTH {
        let its_own = policy_chain(direction, key);
        if chains.is_empty() || !chains.values().all(|found| found.chains.contains_key(&its_own)) {
            continue;
        }
        kept.chains.insert(its_own);
        held.add_direction(direction);
        for (family, found) in chains {
            let says = |forms: &[String], word: &str| {
                forms.iter().any(|form| form.split_whitespace().any(|is| is == word))
            };
            if let Some(forms) = found.chains.get(&its_own) {
                kept.sets.extend(sets.keys().filter(|set| says(forms, set.as_str())));
            }
            let groups = found.chains.iter().filter(|(_, forms)| says(forms, its_own.as_str()));
            let groups = groups.filter_map(|(group, _)| group_of(*group, direction, *family));
            groups.for_each(|set| {
                entries(&set).flat_map(pods).for_each(|labels| held.note(&labels, true));
            });
        }
    }
    // Those that were here and that it let be.
    let known = sets.keys().filter(|set| Gate::of(**set) == Some(Gate::Known));
    known.flat_map(entries).flat_map(pods).for_each(|labels| held.note(&labels, false));
    (!kept.chains.is_empty()).then_some((kept, held))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ferroute_iptables::Ours;
    use ferroute_iptables::ipset::{Extra, Options as SetOptions, Set, SetType};
    use ferroute_policy::{
        CHAIN_PREFIXES, Exempt, Options, Peer, Policy, Requirement, Rule, Selector, UnknownPods,
    };

    use super::*;
    use crate::cluster::{ObjectKey, Unreadable};
    use crate::netpol::order;

    fn sets(entries: &[(&str, &[&str])]) -> Sets {
        entries
            .iter()
            .map(|(name, addresses)| {
                let mut set = Set::new(SetType::HashIp, Family::V4, SetOptions::default());
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
        let mut hold = Hold::default();
        hold.keep_gates(&found, &desired);
        assert_eq!(hold.describe().len(), 2, "{:?}", hold.describe());
        let mut ordered = order::whole(&found, &desired);
        hold.keep(&mut ordered, &found, &desired);
        assert!(ordered.before.is_empty() && ordered.after.len() == 1, "{:?}", ordered.describe());
        hold.release("10.1.0.2".parse().unwrap());
        let mut ordered = order::whole(&found, &desired);
        hold.keep(&mut ordered, &found, &desired);
        assert_eq!(ordered.describe()[0], "delete from ipset kube-router-isolated-in: 10.1.0.2");
        assert_eq!(ordered.before.len(), 1);
    }

    fn app(name: &str) -> Selector {
        Selector { requirements: vec![Requirement::In("app".into(), [name.into()].into())] }
    }

    fn pod(ip: &str, app: &str, local: bool) -> Option<Pod> {
        let labels = Arc::new([("app".into(), app.into())].into());
        Some(Pod { labels, ips: vec![ip.parse().unwrap()], host_network: false, local, ports: Vec::new() })
    }

    fn index(policy: bool) -> Index {
        let mut index = Index::new(Options {
            families: Family::BOTH.to_vec(),
            unknown_pods: UnknownPods::Deny,
            exempt: Exempt::Ranges { networks: Vec::new(), node_ports: None },
        });
        index.set_pod_networks(vec!["10.1.0.0/24".parse().unwrap()]);
        index.put_namespace(&"shop".into(), Some(Arc::default()));
        index.put_pod(&Key::new("shop", "web"), pod("10.1.0.5", "web", true));
        index.put_pod(&Key::new("shop", "client"), pod("10.2.0.9", "client", false));
        if policy {
            let client = app("client");
            let peer = Peer::Pods { namespaces: None, pods: client };
            let policy = Policy {
                pod_selector: app("web"),
                ingress: Some(vec![Rule { peers: Some(vec![peer]), ports: None }]),
                egress: None,
            };
            index.put_policy(&Key::new("shop", "lost"), Some(Arc::new(policy)));
        }
        index.settle();
        index
    }

    #[test]
    fn a_policy_that_cannot_be_read_stays_as_the_kernel_has_it() {
        let known = index(true);
        let sets = known.sets().clone();
        let ours = Ours::new(CHAIN_PREFIXES);
        let found: BTreeMap<Family, Found> = Family::BOTH
            .into_iter()
            .map(|family| {
                let mut found = Found::default();
                let ruleset = known.ruleset(family).unwrap();
                found.note(&ferroute_iptables::plan(&found, ruleset, &ours, family).unwrap());
                (family, found)
            })
            .collect();
        let key = ObjectKey::new("shop", "lost");
        let what = Unreadable::object(Kind::NetworkPolicy, key);
        let mut state = State { unreadable: [(what, None)].into(), ..State::default() };
        let mut blind = index(false);
        let mut hold = Hold::begin(&state, &found, &sets, &mut blind);
        assert_eq!(hold.describe().len(), 1, "{:?}", hold.describe());
        // Nothing changes but that its chain is left alone.
        let mut ordered = order::whole(&sets, blind.sets());
        hold.keep(&mut ordered, &sets, blind.sets());
        assert!(ordered.is_empty(), "{:?}", ordered.describe());
        let mut chains = known.ruleset(Family::V4).unwrap().chains.clone();
        chains.retain(|chain, _| !hold.chains().contains(chain));
        assert_eq!(blind.ruleset(Family::V4).unwrap().chains, chains);
        assert_eq!(hold.chains().len(), 1);
        // Whoever gets the client's address is not the client.
        hold.release("10.2.0.9".parse().unwrap());
        let mut ordered = order::whole(&sets, blind.sets());
        hold.keep(&mut ordered, &sets, blind.sets());
        let told = ordered.describe();
        assert!(told.len() == 1 && told[0].ends_with(": 10.2.0.9"), "{told:?}");
        // Mended.
        assert!(!hold.release_readable(&state, &mut blind));
        state.unreadable.clear();
        assert!(hold.release_readable(&state, &mut blind) && hold.is_empty());
        blind.settle();
        assert!(blind.isolated().next().is_none());
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
