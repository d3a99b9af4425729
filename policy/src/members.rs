//! Sets with who put each entry in: two pods may have the same entry, and it stays until both are gone.

use std::collections::{BTreeMap, HashMap};

use ferroute_iptables::Family;
use ferroute_iptables::ipset::{Entry, Extra, Options, Set, SetType, Sets};
use ipnet::IpNet;

use crate::index::Touched;
use crate::{Key, name};

/// All sets, by their IPv4 names, each in every family.
pub(crate) struct Members {
    families: Vec<Family>,
    sets: Sets,
    by_pod: HashMap<String, BTreeMap<Key, Vec<(Family, Entry)>>>,
    /// Entries that more than one pod put in, and how many did.
    shared: HashMap<(String, Entry), usize>,
}

impl Members {
    pub(crate) fn new(families: Vec<Family>) -> Self {
        Self { families, sets: Sets::new(), by_pod: HashMap::new(), shared: HashMap::new() }
    }

    pub(crate) fn sets(&self) -> &Sets {
        &self.sets
    }

    /// Makes an empty set in every family.
    pub(crate) fn create(&mut self, base: &str, set_type: SetType, touched: &mut Touched) {
        for family in &self.families {
            let name = name::set(base, *family);
            self.sets.insert(name, Set::new(set_type, *family, Options::default()));
            touched.sets.insert(name);
        }
    }

    /// Makes a set of networks in one family that no pod changes.
    pub(crate) fn create_filled(
        &mut self,
        base: &str,
        family: Family,
        entries: Vec<(IpNet, bool)>,
        touched: &mut Touched,
    ) {
        let name = name::set(base, family);
        let mut set = Set::new(SetType::HashNet, family, Options::default());
        for (net, nomatch) in entries {
            // Of this family and without a zero prefix by construction, so each fits.
            let _ = set.insert(Entry::Net(net), Extra { nomatch, ..Extra::default() });
        }
        self.sets.insert(name, set);
        touched.sets.insert(name);
    }

    /// Takes a set away in every family.
    pub(crate) fn destroy(&mut self, base: &str, touched: &mut Touched) {
        self.by_pod.remove(base);
        self.shared.retain(|(of, _), _| of != base);
        for family in &self.families {
            let name = name::set(base, *family);
            if self.sets.remove(&name).is_some() {
                touched.sets.insert(name);
            }
        }
    }

    /// What one pod (or the node) puts into a set from now on. Returns whether that changed.
    pub(crate) fn put(
        &mut self,
        base: &str,
        key: &Key,
        entries: Vec<(Family, Entry)>,
        touched: &mut Touched,
    ) -> bool {
        let owners = match self.by_pod.get_mut(base) {
            Some(owners) => owners,
            None if entries.is_empty() => return false,
            None => self.by_pod.entry(base.to_owned()).or_default(),
        };
        let before = match entries.is_empty() {
            true => owners.remove(key),
            false => owners.insert(key.clone(), entries.clone()),
        }
        .unwrap_or_default();
        if before == entries {
            return false;
        }
        for added in entries.iter().filter(|entry| !before.contains(entry)) {
            self.add(base, *added, touched);
        }
        for removed in before.iter().filter(|entry| !entries.contains(entry)) {
            self.remove(base, *removed, touched);
        }
        true
    }

    fn add(&mut self, base: &str, (family, entry): (Family, Entry), touched: &mut Touched) {
        let name = name::set(base, family);
        // A family that is not enforced has no set.
        let Some(set) = self.sets.get_mut(&name) else { return };
        match set.insert(entry, Extra::default()) {
            Ok(true) => {
                touched.entries.insert((name, entry));
            }
            Ok(false) => *self.shared.entry((base.to_owned(), entry)).or_insert(1) += 1,
            // Entries are made for their set; one that the kernel could not hold names nothing.
            Err(_) => {}
        }
    }

    fn remove(&mut self, base: &str, (family, entry): (Family, Entry), touched: &mut Touched) {
        let slot = (base.to_owned(), entry);
        if let Some(owners) = self.shared.get_mut(&slot) {
            *owners -= 1;
            if *owners == 1 {
                self.shared.remove(&slot);
            }
            return;
        }
        let name = name::set(base, family);
        if self.sets.get_mut(&name).is_some_and(|set| set.remove(&entry)) {
            touched.entries.insert((name, entry));
        }
    }
}
