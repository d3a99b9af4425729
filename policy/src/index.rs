//! Pods, namespaces and policies as they come and go, and the chains and sets that follow from them.
//!
//! Changes are taken one by one and worked out together when [`Index::settle`] is called: which policies
//! select local pods, which sets their rules look at, and which entries every changed pod puts in them. The
//! work follows the change. What results does not depend on the order of changes, so a restart arrives at
//! the same names and the same entries.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ferroute_iptables::ipset::{Entry, SetType, Sets};
use ferroute_iptables::{ChainName, Family, Rule as ChainRule, Ruleset};
use ipnet::IpNet;

use crate::block::{self, Block};
use crate::chain::{self, Group, Options};
use crate::compile::compile;
use crate::definition::{self, Definition, Namespaces};
use crate::held::Held;
use crate::members::Members;
use crate::name;
use crate::{Direction, Key, Labels, Pod, Policy};

/// Policies by namespace and name.
pub(crate) type Policies = BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<Policy>>>;

/// What changed in the wanted state since the last [`Index::settle`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Sets that came or went.
    pub sets: BTreeSet<ferroute_iptables::SetName>,
    /// Entries of sets that came or went.
    pub entries: BTreeSet<(ferroute_iptables::SetName, Entry)>,
    /// Chains that came, went or have other rules.
    pub chains: BTreeSet<(Family, ChainName)>,
}

impl Touched {
    /// Nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.entries.is_empty() && self.chains.is_empty()
    }
}

/// What is known of the cluster, and the chains and sets of this node.
pub struct Index {
    options: Options,
    pod_networks: Vec<IpNet>,
    pub(crate) namespaces: Namespaces,
    pub(crate) pods: BTreeMap<Key, Pod>,
    pub(crate) policies: Policies,
    pub(crate) by_address: BTreeMap<IpAddr, BTreeSet<Key>>,
    names_by_namespace: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Local pods that each policy selects; policies that select none are not here and not in the kernel.
    selected: BTreeMap<Key, BTreeSet<Key>>,
    /// Policies that select each local pod: the same the other way round.
    selecting: BTreeMap<Key, BTreeSet<Key>>,
    /// Policies that isolate each local pod, by direction, sorted.
    isolating: BTreeMap<(Direction, Key), Vec<Key>>,
    groups: BTreeMap<(Direction, Vec<Key>), BTreeSet<Key>>,
    definitions: BTreeMap<String, Active>,
    /// Definitions that pods of a namespace can be in.
    concerning: BTreeMap<Arc<str>, BTreeSet<String>>,
    /// Definitions that each policy's chain of a direction looks at.
    uses: BTreeMap<(Direction, Key), BTreeSet<String>>,
    /// Policies that cannot be read and are in force as the kernel has them.
    pub(crate) held: BTreeMap<Key, Held>,
    members: Members,
    rulesets: BTreeMap<Family, Ruleset>,
    touched: Touched,
    pub(crate) dirty: Dirty,
}

struct Active {
    definition: Definition,
    users: usize,
}

#[derive(Default)]
pub(crate) struct Dirty {
    pods: BTreeSet<Key>,
    pub(crate) policies: BTreeSet<Key>,
    namespaces: BTreeSet<Arc<str>>,
    /// Directions whose groups changed.
    groups: BTreeSet<Direction>,
}

impl Index {
    /// An index without pods; its rules and fixed sets are there from the start.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let members = Members::new(options.families.clone());
        let mut index = Self {
            options,
            pod_networks: Vec::new(),
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            policies: BTreeMap::new(),
            by_address: BTreeMap::new(),
            names_by_namespace: BTreeMap::new(),
            selected: BTreeMap::new(),
            selecting: BTreeMap::new(),
            isolating: BTreeMap::new(),
            groups: BTreeMap::new(),
            definitions: BTreeMap::new(),
            concerning: BTreeMap::new(),
            uses: BTreeMap::new(),
            held: BTreeMap::new(),
            members,
            rulesets: BTreeMap::new(),
            touched: Touched::default(),
            dirty: Dirty::default(),
        };
        for (base, set_type) in [
            (name::POD_NETS, SetType::HashNet),
            (name::LOCAL_PODS, SetType::HashIp),
            (name::SELF, SetType::HashNetNet),
            (name::isolated(Direction::Ingress), SetType::HashIp),
            (name::isolated(Direction::Egress), SetType::HashIp),
        ] {
            index.members.create(base, set_type, &mut index.touched);
        }
        for family in index.options.families.clone() {
            let fixed = chain::fixed(&index.options, family);
            index.touched.chains.extend(fixed.chains.keys().map(|chain| (family, *chain)));
            index.rulesets.insert(family, fixed);
        }
        index.dirty.groups.extend(Direction::BOTH);
        index.settle_groups();
        index
    }

    /// Other options; chains that do not depend on policies are written anew. The families stay.
    pub fn set_options(&mut self, options: Options) {
        self.options = Options { families: std::mem::take(&mut self.options.families), ..options };
        for (family, ruleset) in &mut self.rulesets {
            let fixed = chain::fixed(&self.options, *family);
            for (chain, rules) in fixed.chains {
                put_chain(ruleset, *family, chain, Some(rules), &mut self.touched);
            }
            ruleset.jumps = fixed.jumps;
        }
    }

    /// The networks that pods of this node get their addresses from.
    pub fn set_pod_networks(&mut self, mut networks: Vec<IpNet>) {
        networks.iter_mut().for_each(|net| *net = net.trunc());
        networks.sort_unstable();
        networks.dedup();
        if networks == self.pod_networks {
            return;
        }
        self.pod_networks = networks;
        let node = Key::new("", "node");
        let entries = self
            .pod_networks
            .iter()
            .flat_map(|net| block::entries(&[Block { cidr: *net, except: &[] }], Family::of(net.addr())))
            .map(|(net, _)| (Family::of(net.addr()), Entry::Net(net)))
            .collect();
        self.members.put(name::POD_NETS, &node, entries, &mut self.touched);
        let local: Vec<Key> =
            self.pods.iter().filter(|(_, pod)| pod.is_enforced_here()).map(|(key, _)| key.clone()).collect();
        self.dirty.pods.extend(local);
    }

    /// A pod that runs, or `None` when it is gone, completed or failed.
    pub fn put_pod(&mut self, key: &Key, pod: Option<Pod>) {
        if self.pods.get(key) == pod.as_ref() {
            return;
        }
        if let Some(old) = self.pods.get(key) {
            for ip in &old.ips {
                if let Some(keys) = self.by_address.get_mut(ip) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.by_address.remove(ip);
                    }
                }
            }
        }
        match pod {
            Some(pod) => {
                for ip in &pod.ips {
                    self.by_address.entry(*ip).or_default().insert(key.clone());
                }
                let names = self.names_by_namespace.entry(key.namespace.clone()).or_default();
                if names.is_empty() {
                    self.dirty.namespaces.insert(key.namespace.clone());
                }
                names.insert(key.name.clone());
                self.pods.insert(key.clone(), pod);
            }
            None => {
                if let Some(names) = self.names_by_namespace.get_mut(&key.namespace) {
                    names.remove(&key.name);
                    if names.is_empty() {
                        self.names_by_namespace.remove(&key.namespace);
                    }
                }
                self.pods.remove(key);
            }
        }
        self.dirty.pods.insert(key.clone());
    }

    /// A namespace's labels, or `None` when it is gone.
    pub fn put_namespace(&mut self, name: &Arc<str>, labels: Option<Arc<Labels>>) {
        if self.namespaces.get(name) == labels.as_ref() {
            return;
        }
        match labels {
            Some(labels) => self.namespaces.insert(name.clone(), labels),
            None => self.namespaces.remove(name),
        };
        self.dirty.namespaces.insert(name.clone());
    }

    /// A policy, or `None` when it is gone.
    pub fn put_policy(&mut self, key: &Key, policy: Option<Arc<Policy>>) {
        let policies = self.policies.entry(key.namespace.clone()).or_default();
        if policies.get(&key.name) == policy.as_ref() {
            return;
        }
        match policy {
            Some(policy) => policies.insert(key.name.clone(), policy),
            None => policies.remove(&key.name),
        };
        if policies.is_empty() {
            self.policies.remove(&key.namespace);
        }
        self.dirty.policies.insert(key.clone());
    }

    /// Works out everything that was put since the last call and tells what it changed.
    pub fn settle(&mut self) -> Touched {
        // Pods of a namespace whose labels changed may be peers of other rules now.
        for namespace in std::mem::take(&mut self.dirty.namespaces) {
            let concerning = self
                .definitions
                .iter()
                .filter(|(_, active)| active.definition.concerns(&namespace, &self.namespaces))
                .map(|(name, _)| name.clone())
                .collect();
            let before = self.concerning.insert(namespace.clone(), concerning).unwrap_or_default();
            self.dirty.pods.extend(self.pods_of(&namespace));
            let pods: Vec<Key> =
                self.dirty.pods.iter().filter(|pod| pod.namespace == namespace).cloned().collect();
            for pod in pods {
                for name in &before {
                    self.put_members(name, &pod);
                }
            }
            if !self.names_by_namespace.contains_key(&namespace) && !self.namespaces.contains_key(&namespace)
            {
                self.concerning.remove(&namespace);
            }
        }
        let changed_policies = std::mem::take(&mut self.dirty.policies);
        let mut regroup: BTreeSet<Key> = BTreeSet::new();
        for key in &changed_policies {
            let now = self.selection(key);
            let before = match now.is_empty() {
                true => self.selected.remove(key),
                false => self.selected.insert(key.clone(), now.clone()),
            };
            for pod in before.iter().flatten().filter(|pod| !now.contains(*pod)) {
                drop_from(&mut self.selecting, pod, key);
            }
            for pod in &now {
                self.selecting.entry(pod.clone()).or_default().insert(key.clone());
            }
            // A policy that speaks of other directions now isolates the same pods otherwise.
            regroup.extend(before.into_iter().flatten());
            regroup.extend(now);
        }
        let mut rewrite = changed_policies;
        let pods = std::mem::take(&mut self.dirty.pods);
        for key in &pods {
            rewrite.extend(self.reselect(key));
        }
        regroup.extend(pods.iter().cloned());
        for key in &rewrite {
            self.write_policy(key);
        }
        for key in &regroup {
            self.group_pod(key);
        }
        for key in &pods {
            if let Some((namespace, names)) = self.concerning.remove_entry(&key.namespace) {
                for name in &names {
                    self.put_members(name, key);
                }
                self.concerning.insert(namespace, names);
            }
        }
        self.settle_groups();
        std::mem::take(&mut self.touched)
    }

    /// The sets wanted in the kernel.
    #[must_use]
    pub fn sets(&self) -> &Sets {
        self.members.sets()
    }

    /// The filter table wanted in the kernel: our chains and the jumps to them.
    #[must_use]
    pub fn ruleset(&self, family: Family) -> Option<&Ruleset> {
        self.rulesets.get(&family)
    }

    /// Families that are enforced.
    #[must_use]
    pub fn families(&self) -> &[Family] {
        &self.options.families
    }

    /// Local pods and the policies that isolate them, by direction.
    pub fn isolated(&self) -> impl Iterator<Item = (Direction, &Key, &[Key])> {
        self.isolating.iter().map(|((direction, pod), policies)| (*direction, pod, policies.as_slice()))
    }

    /// Policies that select a local pod: those in the kernel.
    pub fn enforced_policies(&self) -> impl Iterator<Item = &Key> {
        self.selected.keys()
    }

    /// How many policies there are in the cluster.
    #[must_use]
    pub fn policy_count(&self) -> usize {
        self.policies.values().map(BTreeMap::len).sum()
    }

    /// A pod that is known.
    #[must_use]
    pub fn pod(&self, key: &Key) -> Option<&Pod> {
        self.pods.get(key)
    }

    /// Pods that have an address.
    pub fn pods_with(&self, ip: IpAddr) -> impl Iterator<Item = (&Key, &Pod)> {
        self.by_address.get(&ip).into_iter().flatten().filter_map(|key| self.pods.get_key_value(key))
    }

    fn pods_of(&self, namespace: &Arc<str>) -> Vec<Key> {
        let names = self.names_by_namespace.get(namespace);
        names.into_iter().flatten().map(|name| Key::new(namespace.clone(), name.clone())).collect()
    }

    pub(crate) fn policy(&self, key: &Key) -> Option<&Arc<Policy>> {
        self.policies.get(&key.namespace)?.get(&key.name)
    }

    /// Local pods that a policy selects.
    fn selection(&self, key: &Key) -> BTreeSet<Key> {
        let (policy, held) = (self.policy(key), self.held.get(key));
        let selects = |labels: &Labels| match (policy, held) {
            (Some(policy), _) => policy.pod_selector.matches(labels),
            (None, Some(held)) => held.selects(labels),
            (None, None) => false,
        };
        self.pods_of(&key.namespace)
            .into_iter()
            .filter(|pod| {
                self.pods.get(pod).is_some_and(|pod| pod.is_enforced_here() && selects(&pod.labels))
            })
            .collect()
    }

    /// Notes which policies select a changed pod; returns those that select their first or no pod now.
    fn reselect(&mut self, key: &Key) -> Vec<Key> {
        let mut now = BTreeSet::new();
        if let Some(pod) = self.pods.get(key).filter(|pod| pod.is_enforced_here()) {
            let policies = self.policies.get(&key.namespace).into_iter().flatten();
            now.extend(
                policies
                    .filter(|(_, policy)| policy.pod_selector.matches(&pod.labels))
                    .map(|(name, _)| Key::new(key.namespace.clone(), name.clone())),
            );
            let held = self
                .held
                .iter()
                .filter(|(policy, held)| policy.namespace == key.namespace && held.selects(&pod.labels));
            now.extend(held.map(|(policy, _)| policy.clone()));
        }
        let before = match now.is_empty() {
            true => self.selecting.remove(key),
            false => self.selecting.insert(key.clone(), now.clone()),
        }
        .unwrap_or_default();
        let mut flipped = Vec::new();
        for policy in now.difference(&before) {
            let pods = self.selected.entry(policy.clone()).or_default();
            if pods.is_empty() {
                flipped.push(policy.clone());
            }
            pods.insert(key.clone());
        }
        for policy in before.difference(&now) {
            drop_from(&mut self.selected, policy, key);
            if !self.selected.contains_key(policy) {
                flipped.push(policy.clone());
            }
        }
        flipped
    }

    /// Puts a pod where it belongs in the fixed sets and in the groups of both directions.
    fn group_pod(&mut self, key: &Key) {
        let pod = self.pods.get(key).filter(|pod| pod.is_enforced_here());
        let addresses: Vec<IpAddr> = pod.map(|pod| definition::addresses(pod).collect()).unwrap_or_default();
        let ips = || addresses.iter().map(|ip| (Family::of(*ip), Entry::Ip(*ip))).collect::<Vec<_>>();
        let outside = addresses
            .iter()
            .filter(|ip| !self.pod_networks.iter().any(|net| net.contains(*ip)))
            .map(|ip| (Family::of(*ip), Entry::Net(IpNet::from(*ip))))
            .collect();
        self.members.put(name::LOCAL_PODS, key, ips(), &mut self.touched);
        self.members.put(name::POD_NETS, key, outside, &mut self.touched);
        let mut isolated = false;
        for direction in Direction::BOTH {
            let policies: Vec<Key> = self
                .selecting
                .get(key)
                .into_iter()
                .flatten()
                .filter(|policy| match self.policy(policy) {
                    Some(policy) => policy.rules(direction).is_some(),
                    None => self.held.get(*policy).is_some_and(|held| held.isolates(direction)),
                })
                .cloned()
                .collect();
            isolated |= !policies.is_empty();
            let entries = if policies.is_empty() { Vec::new() } else { ips() };
            self.members.put(name::isolated(direction), key, entries, &mut self.touched);
            self.join_group(direction, key, policies, ips());
        }
        let pairs = addresses
            .iter()
            .filter(|_| isolated)
            .map(|ip| (Family::of(*ip), Entry::NetNet(IpNet::from(*ip), IpNet::from(*ip))))
            .collect();
        self.members.put(name::SELF, key, pairs, &mut self.touched);
    }

    fn join_group(
        &mut self,
        direction: Direction,
        pod: &Key,
        policies: Vec<Key>,
        entries: Vec<(Family, Entry)>,
    ) {
        let slot = (direction, pod.clone());
        let before = match policies.is_empty() {
            true => self.isolating.remove(&slot),
            false => self.isolating.insert(slot, policies.clone()),
        };
        if !policies.is_empty() {
            let names = name::group(direction, &policies);
            let members = self.groups.entry((direction, policies.clone())).or_default();
            if members.is_empty() {
                self.members.create(&names.set, SetType::HashIp, &mut self.touched);
                let chains: Vec<(Key, ChainName)> =
                    policies.iter().map(|key| (key.clone(), name::policy(direction, key))).collect();
                let rules = chain::group(direction, chains.iter().map(|(key, chain)| (key, *chain)));
                self.put_chain_everywhere(names.chain, Some(&rules));
            }
            let new = self
                .groups
                .get_mut(&(direction, policies.clone()))
                .is_some_and(|members| members.insert(pod.clone()));
            let changed = self.members.put(&names.set, pod, entries, &mut self.touched);
            if new || changed {
                self.dirty.groups.insert(direction);
            }
        }
        if let Some(before) = before.filter(|before| *before != policies) {
            let names = name::group(direction, &before);
            let slot = (direction, before);
            if let Some(members) = self.groups.get_mut(&slot) {
                members.remove(pod);
                self.members.put(&names.set, pod, Vec::new(), &mut self.touched);
                if members.is_empty() {
                    self.groups.remove(&slot);
                    self.members.destroy(&names.set, &mut self.touched);
                    self.put_chain_everywhere(names.chain, None);
                }
            }
            self.dirty.groups.insert(direction);
        }
    }

    /// Writes the dispatch chains of directions whose groups changed.
    fn settle_groups(&mut self) {
        for direction in std::mem::take(&mut self.dirty.groups) {
            for (family, ruleset) in &mut self.rulesets {
                let groups: Vec<Group> = self
                    .groups
                    .range((direction, Vec::new())..)
                    .take_while(|((of, _), _)| *of == direction)
                    .filter_map(|((_, policies), pods)| {
                        let addresses: Vec<IpAddr> = pods
                            .iter()
                            .filter_map(|pod| self.pods.get(pod))
                            .flat_map(definition::addresses)
                            .filter(|ip| Family::of(*ip) == *family)
                            .collect();
                        if addresses.is_empty() {
                            return None;
                        }
                        let names = name::group(direction, policies);
                        Some(Group { chain: names.chain, set: name::set(&names.set, *family), addresses })
                    })
                    .collect();
                let wanted = chain::dispatch(direction, &groups);
                let root = name::dispatch(direction, "");
                let stale: Vec<ChainName> = ruleset
                    .chains
                    .range(root..)
                    .map(|(chain, _)| *chain)
                    .take_while(|chain| chain.as_str().starts_with(root.as_str()))
                    .filter(|chain| !wanted.contains_key(chain))
                    .collect();
                for chain in stale {
                    put_chain(ruleset, *family, chain, None, &mut self.touched);
                }
                for (chain, rules) in wanted {
                    put_chain(ruleset, *family, chain, Some(rules), &mut self.touched);
                }
            }
        }
    }

    /// Writes the chains of a policy, or takes them away when it selects no local pod.
    fn write_policy(&mut self, key: &Key) {
        let policy = self.policy(key).cloned().filter(|_| self.selected.contains_key(key));
        for direction in Direction::BOTH {
            let rules = policy.as_ref().and_then(|policy| Some((policy, policy.rules(direction)?)));
            let mut used = BTreeMap::new();
            let mut chains: BTreeMap<Family, Vec<ChainRule>> =
                self.options.families.iter().map(|family| (*family, Vec::new())).collect();
            for (policy, rule) in
                rules.into_iter().flat_map(|(policy, rules)| rules.iter().map(move |r| (policy, r)))
            {
                for (family, chain) in &mut chains {
                    compile(key, &policy.pod_selector, direction, rule, *family, chain, &mut used);
                }
            }
            self.use_definitions(direction, key, used);
            let name = name::policy(direction, key);
            for (family, ruleset) in &mut self.rulesets {
                let rules = rules.is_some().then(|| chains.remove(family).unwrap_or_default());
                put_chain(ruleset, *family, name, rules, &mut self.touched);
            }
        }
    }

    /// Counts who looks at which definition; fills sets that come and drops those nobody looks at.
    fn use_definitions(&mut self, direction: Direction, key: &Key, used: BTreeMap<String, Definition>) {
        let names: BTreeSet<String> = used.keys().cloned().collect();
        for (name, definition) in used {
            let before = self.uses.get(&(direction, key.clone()));
            if before.is_some_and(|before| before.contains(&name)) {
                continue;
            }
            if let Some(active) = self.definitions.get_mut(&name) {
                active.users += 1;
                continue;
            }
            self.activate(name, definition);
        }
        let before = match names.is_empty() {
            true => self.uses.remove(&(direction, key.clone())),
            false => self.uses.insert((direction, key.clone()), names.clone()),
        };
        for name in before.unwrap_or_default().difference(&names) {
            let Some(active) = self.definitions.get_mut(name) else { continue };
            active.users -= 1;
            if active.users == 0 {
                self.definitions.remove(name);
                self.concerning.values_mut().for_each(|names| {
                    names.remove(name);
                });
                self.members.destroy(name, &mut self.touched);
            }
        }
    }

    fn activate(&mut self, name: String, definition: Definition) {
        if let Definition::Blocks { blocks } = &definition {
            let blocks: Vec<Block<'_>> =
                blocks.iter().map(|(cidr, except)| Block { cidr: *cidr, except }).collect();
            for family in self.options.families.clone() {
                let entries = block::entries(&blocks, family);
                self.members.create_filled(&name, family, entries, &mut self.touched);
            }
        } else {
            self.members.create(&name, definition.set_type(), &mut self.touched);
        }
        let namespaces: Vec<Arc<str>> = self
            .concerning
            .keys()
            .filter(|namespace| definition.concerns(namespace, &self.namespaces))
            .cloned()
            .collect();
        self.definitions.insert(name.clone(), Active { definition, users: 1 });
        for namespace in namespaces {
            for pod in self.pods_of(&namespace) {
                self.put_members(&name, &pod);
            }
            self.concerning.entry(namespace).or_default().insert(name.clone());
        }
    }

    /// Puts what a pod contributes to a definition's set.
    fn put_members(&mut self, name: &str, key: &Key) {
        let Some(active) = self.definitions.get(name) else { return };
        let entries = self
            .pods
            .get(key)
            .map(|pod| active.definition.entries(key, pod, &self.namespaces))
            .unwrap_or_default();
        self.members.put(name, key, entries, &mut self.touched);
    }

    fn put_chain_everywhere(&mut self, chain: ChainName, rules: Option<&Vec<ChainRule>>) {
        for (family, ruleset) in &mut self.rulesets {
            put_chain(ruleset, *family, chain, rules.cloned(), &mut self.touched);
        }
    }
}

/// Takes `member` out of the set at `key`; an empty set goes.
fn drop_from(sets: &mut BTreeMap<Key, BTreeSet<Key>>, key: &Key, member: &Key) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(member);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}

fn put_chain(
    ruleset: &mut Ruleset,
    family: Family,
    chain: ChainName,
    rules: Option<Vec<ChainRule>>,
    touched: &mut Touched,
) {
    let changed = match rules {
        None => ruleset.chains.remove(&chain).is_some(),
        Some(rules) => {
            let changed = ruleset.chains.get(&chain) != Some(&rules);
            ruleset.chains.insert(chain, rules);
            changed
        }
    };
    if changed {
        touched.chains.insert((family, chain));
    }
}
