//! What must change for the kernel's sets to become the wanted ones. Pure.

use std::collections::BTreeMap;

use super::{Entry, Extra, Kind, Options, Set, Sets};
use crate::SetName;

/// One step. Entries of one set travel together: as many per netlink message as fit.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Create an empty set.
    Create {
        /// Its name.
        set: SetName,
        /// Type and family.
        kind: Kind,
        /// Fixed options.
        options: Options,
        /// Buckets to start with, so that a bulk fill does not grow the table step by step.
        hashsize: u32,
    },
    /// Add entries, or change what hangs on them.
    Add {
        /// To which set.
        set: SetName,
        /// The entries.
        entries: Vec<(Entry, Extra)>,
    },
    /// Remove entries.
    Delete {
        /// From which set.
        set: SetName,
        /// The entries.
        entries: Vec<Entry>,
    },
    /// Fill a temporary set beside this one and swap them: packets see the old content or the new one,
    /// and rules that name the set stay valid. Possible because type and family are the same.
    Replace {
        /// The set to replace.
        set: SetName,
        /// What takes its place.
        with: Set,
    },
    /// Destroy a set; refused by the kernel as long as a rule or list names it.
    Destroy {
        /// Its name.
        set: SetName,
    },
}

impl Change {
    /// The set it is about.
    #[must_use]
    pub fn set(&self) -> SetName {
        match self {
            Self::Create { set, .. }
            | Self::Add { set, .. }
            | Self::Delete { set, .. }
            | Self::Replace { set, .. }
            | Self::Destroy { set } => *set,
        }
    }
}

/// A set that exists with another type or family than wanted. The kernel swaps only equals, so the rules
/// that name it must go first.
#[derive(Clone, Debug, PartialEq)]
pub struct Retype {
    /// The set.
    pub set: SetName,
    /// What it is.
    pub from: Kind,
    /// What it shall be.
    pub to: Kind,
    /// Destroy, create and fill: to be applied while no rule names the set.
    pub changes: Vec<Change>,
}

/// The whole way from one state to another, in three parts with the rules' own changes between them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Difference {
    /// Safe while rules name the sets; apply before writing rules. Creates come before adds,
    /// adds before deletes.
    pub changes: Vec<Change>,
    /// Each needs the rules that name its set removed first, and written again afterwards.
    pub retype: Vec<Retype>,
    /// Unwanted sets; apply after the rules that named them are gone.
    pub destroy: Vec<Change>,
}

impl Difference {
    /// Nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.retype.is_empty() && self.destroy.is_empty()
    }

    /// All steps in order, for callers without rules.
    #[must_use]
    pub fn into_changes(self) -> Vec<Change> {
        let mut all = self.changes;
        all.extend(self.retype.into_iter().flat_map(|retype| retype.changes));
        all.extend(self.destroy);
        all
    }
}

/// The way from `actual` to `desired`, over the union of their names. Everything in `actual` is taken for
/// ours: list by prefix.
#[must_use]
pub fn diff(actual: &Sets, desired: &Sets) -> Difference {
    let mut steps = Steps::default();
    for (name, want) in desired {
        steps.towards(*name, actual.get(name), want);
    }
    let destroy = actual.keys().filter(|name| !desired.contains_key(name));
    let destroy = destroy.map(|name| Change::Destroy { set: *name }).collect();
    Difference { changes: steps.in_order(), retype: steps.retype, destroy }
}

/// The way for some entries only: cost follows the keys, not the sets. A set that is missing or
/// differs as a whole is handled as by [`diff`]; a set that is not desired is left to [`diff`].
#[must_use]
pub fn diff_entries(
    actual: &Sets,
    desired: &Sets,
    keys: impl IntoIterator<Item = (SetName, Entry)>,
) -> Difference {
    let mut wanted: BTreeMap<SetName, Vec<Entry>> = BTreeMap::new();
    let mut keys = keys.into_iter().peekable();
    while let Some((set, entry)) = keys.next() {
        let entries = wanted.entry(set).or_default();
        entries.push(entry.normal());
        // Keys mostly come sorted.
        while let Some((_, entry)) = keys.next_if(|(next, _)| *next == set) {
            entries.push(entry.normal());
        }
    }
    let mut steps = Steps::default();
    for (name, mut entries) in wanted {
        let Some(want) = desired.get(&name) else { continue };
        match actual.get(&name) {
            Some(have) if have.kind() == want.kind() && have.options() == want.options() => {
                entries.sort_unstable();
                entries.dedup();
                let (mut add, mut delete) = (Vec::new(), Vec::new());
                for entry in entries {
                    match (have.entries().get(&entry), want.entries().get(&entry)) {
                        (have, Some(want)) if have != Some(want) => add.push((entry, *want)),
                        (Some(_), None) => delete.push(entry),
                        _ => {}
                    }
                }
                steps.entries(name, add, delete);
            }
            have => steps.towards(name, have, want),
        }
    }
    Difference { changes: steps.in_order(), retype: steps.retype, destroy: Vec::new() }
}

/// The part of [`diff`] that removes: entries and sets that are not desired.
#[must_use]
pub fn diff_leftovers(actual: &Sets, desired: &Sets) -> Difference {
    let mut steps = Steps::default();
    let mut destroy = Vec::new();
    for (name, have) in actual {
        let Some(want) = desired.get(name) else {
            destroy.push(Change::Destroy { set: *name });
            continue;
        };
        // Another type or other options: the whole set is to be replaced, and that is no leftover.
        if have.kind() == want.kind() && have.options() == want.options() {
            steps.entries(*name, Vec::new(), unwanted(have, want));
        }
    }
    Difference { changes: steps.in_order(), retype: Vec::new(), destroy }
}

/// Steps by their place in the order.
#[derive(Default)]
struct Steps {
    create: Vec<Change>,
    add: Vec<Change>,
    replace: Vec<Change>,
    delete: Vec<Change>,
    retype: Vec<Retype>,
}

impl Steps {
    fn towards(&mut self, name: SetName, have: Option<&Set>, want: &Set) {
        match have {
            None => {
                self.create.push(create(name, want));
                self.entries(name, all(want), Vec::new());
            }
            Some(have) if have.kind() != want.kind() => {
                let mut changes = vec![Change::Destroy { set: name }, create(name, want)];
                if !want.entries().is_empty() {
                    changes.push(Change::Add { set: name, entries: all(want) });
                }
                self.retype.push(Retype { set: name, from: have.kind(), to: want.kind(), changes });
            }
            Some(have) if have.options() != want.options() => {
                self.replace.push(Change::Replace { set: name, with: want.clone() });
            }
            Some(have) => {
                let add =
                    want.entries().iter().filter(|(entry, extra)| have.entries().get(entry) != Some(extra));
                let add = add.map(|(entry, extra)| (*entry, *extra)).collect();
                self.entries(name, add, unwanted(have, want));
            }
        }
    }

    fn entries(&mut self, set: SetName, add: Vec<(Entry, Extra)>, delete: Vec<Entry>) {
        if !add.is_empty() {
            self.add.push(Change::Add { set, entries: add });
        }
        if !delete.is_empty() {
            self.delete.push(Change::Delete { set, entries: delete });
        }
    }

    fn in_order(&mut self) -> Vec<Change> {
        let mut all = std::mem::take(&mut self.create);
        all.append(&mut self.add);
        all.append(&mut self.replace);
        all.append(&mut self.delete);
        all
    }
}

fn all(set: &Set) -> Vec<(Entry, Extra)> {
    set.entries().iter().map(|(entry, extra)| (*entry, *extra)).collect()
}

fn unwanted(have: &Set, want: &Set) -> Vec<Entry> {
    have.entries().keys().filter(|entry| !want.entries().contains_key(entry)).copied().collect()
}

fn create(set: SetName, want: &Set) -> Change {
    Change::Create {
        set,
        kind: want.kind(),
        options: *want.options(),
        hashsize: hashsize(want.entries().len()),
    }
}

/// Buckets for `entries`: one each, within the kernel's default of 1,024 and a bound of 8 MiB of table.
pub(super) fn hashsize(entries: usize) -> u32 {
    u32::try_from(entries).unwrap_or(u32::MAX).clamp(1 << 10, 1 << 20).next_power_of_two()
}

/// What the kernel makes of `changes`, for tests and for mirrors kept in memory. A change of a set
/// that is not there does nothing, as in the kernel.
pub fn apply_to(sets: &mut Sets, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Create { set, kind, options, .. } => {
                sets.entry(*set).or_insert_with(|| Set::new(kind.set_type, kind.family, *options));
            }
            Change::Add { set, entries } => {
                if let Some(set) = sets.get_mut(set) {
                    for (entry, extra) in entries {
                        // An entry that does not fit is refused by the kernel too.
                        let _ = set.insert(*entry, *extra);
                    }
                }
            }
            Change::Delete { set, entries } => {
                if let Some(set) = sets.get_mut(set) {
                    for entry in entries {
                        set.remove(entry);
                    }
                }
            }
            Change::Replace { set, with } => {
                if let Some(old) = sets.get_mut(set)
                    && old.kind() == with.kind()
                {
                    old.clone_from(with);
                }
            }
            Change::Destroy { set } => {
                sets.remove(set);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::ipset::SetType;
    use crate::{Family, Protocol};

    fn ip(last: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
    }

    fn name(text: &str) -> SetName {
        SetName::new(text).unwrap()
    }

    /// Small sets of two types over few names and few entries, so that all cases meet.
    fn any_sets() -> impl Strategy<Value = Sets> {
        let entries = prop::collection::vec((1u8..6, 0u32..3), 0..6);
        let set =
            (any::<bool>(), any::<bool>(), 1u32..3, entries).prop_map(|(port, skbinfo, maxelem, entries)| {
                let set_type = if port { SetType::HashIpPort } else { SetType::HashIp };
                let options = Options { maxelem: maxelem * 100, skbinfo, ..Options::default() };
                let mut set = Set::new(set_type, Family::V4, options);
                for (last, mark) in entries {
                    let entry = match port {
                        true => Entry::IpPort(ip(last), Protocol::TCP, u16::from(last)),
                        false => Entry::Ip(ip(last)),
                    };
                    let extra = if skbinfo && mark > 0 { Extra::marked(mark, 3) } else { Extra::default() };
                    set.insert(entry, extra).unwrap();
                }
                set
            });
        prop::collection::btree_map("[abc]".prop_map(|n| name(&n)), set, 0..4)
    }

    proptest! {
        #[test]
        fn applying_the_difference_reaches_the_goal(mut a in any_sets(), b in any_sets()) {
            let changes = diff(&a, &b).into_changes();
            apply_to(&mut a, &changes);
            prop_assert_eq!(a, b);
        }

        #[test]
        fn no_difference_no_changes(a in any_sets()) {
            prop_assert!(diff(&a, &a).is_empty());
        }

        #[test]
        fn narrow_and_wide_agree_on_all_keys(mut a in any_sets(), b in any_sets()) {
            let keys: Vec<_> = a.iter().chain(&b)
                .flat_map(|(name, set)| set.entries().keys().map(|entry| (*name, *entry)))
                .collect();
            let narrow = diff_entries(&a, &b, keys.clone());
            // Wanted sets that a key names end up right; the others stay.
            let before = a.clone();
            apply_to(&mut a, &narrow.into_changes());
            for (name, set) in &a {
                let touched = keys.iter().any(|(key, _)| key == name);
                match b.get(name) {
                    Some(want) if touched => prop_assert_eq!(set, want),
                    _ => prop_assert_eq!(Some(set), before.get(name)),
                }
            }
        }
    }

    proptest! {
        #[test]
        fn leftovers_are_the_removals_of_the_whole_difference(a in any_sets(), b in any_sets()) {
            let (mut whole, left) = (diff(&a, &b), diff_leftovers(&a, &b));
            whole.changes.retain(|change| matches!(change, Change::Delete { .. }));
            prop_assert_eq!(left.changes, whole.changes);
            prop_assert_eq!(left.destroy, whole.destroy);
            prop_assert_eq!(left.retype, []);
        }
    }

    #[test]
    fn steps_come_in_the_safe_order() {
        let set = |last: &[u8], maxelem| {
            let mut set = Set::new(SetType::HashIp, Family::V4, Options { maxelem, ..Options::default() });
            for last in last {
                set.insert(Entry::Ip(ip(*last)), Extra::default()).unwrap();
            }
            set
        };
        let actual = Sets::from([
            (name("changed"), set(&[1, 2], 9)),
            (name("gone"), set(&[1], 9)),
            (name("small"), set(&[1], 9)),
            (name("typed"), Set::new(SetType::HashNet, Family::V4, Options::default())),
        ]);
        let desired = Sets::from([
            (name("changed"), set(&[2, 3], 9)),
            (name("new"), set(&[7], 9)),
            (name("small"), set(&[1], 10)),
            (name("typed"), set(&[1], 9)),
        ]);
        let difference = diff(&actual, &desired);
        let steps: Vec<_> = difference
            .changes
            .iter()
            .map(|change| match change {
                Change::Create { set, .. } => format!("create {set}"),
                Change::Add { set, entries } => format!("add {} to {set}", entries.len()),
                Change::Delete { set, entries } => format!("delete {} from {set}", entries.len()),
                Change::Replace { set, .. } => format!("replace {set}"),
                Change::Destroy { set } => format!("destroy {set}"),
            })
            .collect();
        let expected =
            ["create new", "add 1 to changed", "add 1 to new", "replace small", "delete 1 from changed"];
        assert_eq!(steps, expected);
        assert_eq!(difference.retype.len(), 1);
        assert_eq!(difference.retype[0].set, name("typed"));
        assert_eq!(difference.retype[0].changes.len(), 3);
        assert_eq!(difference.destroy, [Change::Destroy { set: name("gone") }]);
    }

    #[test]
    fn one_changed_endpoint_is_one_change() {
        let mut a = Sets::new();
        a.insert(name("s"), Set::new(SetType::HashIp, Family::V4, Options::default()));
        let mut b = a.clone();
        b.get_mut(&name("s")).unwrap().insert(Entry::Ip(ip(1)), Extra::default()).unwrap();
        let narrow = diff_entries(&a, &b, [(name("s"), Entry::Ip(ip(1)))]);
        assert_eq!(narrow.changes.len(), 1);
        assert_eq!(narrow, diff(&a, &b));
    }

    #[test]
    fn tables_start_big_enough_and_bounded() {
        assert_eq!([0, 1024, 1025, 50_000, usize::MAX].map(hashsize), [1024, 1024, 2048, 65_536, 1 << 20]);
    }
}
