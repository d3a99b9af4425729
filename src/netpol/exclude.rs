//! Rules that this kernel cannot take: left out, so that they allow nothing and all others are
//! still enforced. Pure.
//!
//! A restore is taken as a whole or not at all, so one rule that names a set of a type the kernel
//! lacks, or a match it does not have, would keep every policy from being written. Only rules that
//! allow, and those that log, may be left out: without them less is allowed, never more.

use std::collections::{BTreeMap, BTreeSet};

use ferroute_iptables::{ChainChanges, ChainName, Condition, Family, Match, Rule, Ruleset, SetName, Target};

/// Chains of one policy each: every rule in them allows.
const POLICY_CHAIN: &str = "KUBE-NWPLCY-";
/// Length of the hash behind it; fixed chains have words there.
const HASH: usize = 16;

/// What cannot be written, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excluded {
    sets: BTreeMap<SetName, String>,
    /// Rules by family and restore line, `-A CHAIN WORDS`.
    rules: BTreeMap<(Family, String), String>,
    /// Chains of policies that were written with rules missing, and the reason.
    affected: BTreeMap<ChainName, String>,
}

impl Excluded {
    /// Whether everything can be written.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.rules.is_empty()
    }

    /// A set could not be made; rules that name it are left out from now on. Returns whether that is
    /// possible: without some sets nothing can be enforced.
    pub fn add_set(&mut self, set: SetName, reason: String) -> bool {
        let expendable = is_expendable_set(set);
        if expendable {
            self.sets.insert(set, reason);
        }
        expendable
    }

    /// A set is there after all.
    pub fn remove_set(&mut self, set: SetName) -> bool {
        self.sets.remove(&set).is_some()
    }

    /// Sets that are missing.
    pub fn sets(&self) -> impl Iterator<Item = &SetName> {
        self.sets.keys()
    }

    /// iptables refused this line of a restore document. Returns whether it can be left out.
    pub fn add_line(&mut self, family: Family, line: &str, reason: String) -> bool {
        let Some(rest) = line.strip_prefix("-A ") else { return false };
        let chain = rest.split(' ').next().unwrap_or_default();
        let expendable = is_policy_chain(chain) || rest.contains(" -j NFLOG");
        expendable && self.rules.insert((family, line.to_owned()), reason).is_none()
    }

    /// Tries every rule again, as after the kernel may have learnt something.
    pub fn forget_rules(&mut self) -> bool {
        let had = !self.rules.is_empty();
        self.rules.clear();
        had
    }

    /// The chains of one family without what cannot be written.
    pub fn ruleset(&mut self, family: Family, wanted: &Ruleset) -> Ruleset {
        self.affected.clear();
        let chains = wanted
            .chains
            .iter()
            .map(|(chain, rules)| (*chain, self.rules_of(family, *chain, rules)))
            .collect();
        Ruleset { chains, jumps: wanted.jumps.clone() }
    }

    /// The same of single chains.
    pub fn changes(&mut self, family: Family, wanted: ChainChanges) -> ChainChanges {
        if self.is_empty() {
            return wanted;
        }
        wanted
            .into_iter()
            .map(|(chain, rules)| (chain, rules.map(|rules| self.rules_of(family, chain, &rules))))
            .collect()
    }

    fn rules_of(&mut self, family: Family, chain: ChainName, rules: &[Rule]) -> Vec<Rule> {
        if self.is_empty() {
            return rules.to_vec();
        }
        let mut kept = Vec::with_capacity(rules.len());
        for rule in rules {
            let reason = named_sets(rule).find_map(|set| self.sets.get(&set)).or_else(|| {
                (!self.rules.is_empty())
                    .then(|| format!("-A {chain} {}", rule.render(family)).trim_end().to_owned())
                    .and_then(|line| self.rules.get(&(family, line)))
            });
            match reason {
                None => kept.push(rule.clone()),
                Some(reason) => {
                    if is_policy_chain(chain.as_str()) {
                        self.affected.insert(chain, reason.clone());
                    }
                }
            }
        }
        kept
    }

    /// Why a policy is not enforced as written, by its chains.
    pub fn reason(&self, chains: impl IntoIterator<Item = ChainName>) -> Option<&str> {
        chains.into_iter().find_map(|chain| self.affected.get(&chain)).map(String::as_str)
    }

    /// One line for each thing left out.
    pub fn describe(&self) -> Vec<String> {
        let sets = self.sets.iter().map(|(set, reason)| format!("ipset {set}: {reason}"));
        let rules = self.rules.iter().map(|((family, line), reason)| format!("{family} {line}: {reason}"));
        let lines: BTreeSet<String> = sets.chain(rules).collect();
        lines.into_iter().collect()
    }
}

fn is_policy_chain(chain: &str) -> bool {
    chain.strip_prefix(POLICY_CHAIN).is_some_and(|hash| hash.len() == HASH && !hash.contains('-'))
}

/// Sets of peers and ports are named by rules that allow; so is the set of pods that reach
/// themselves. The groups, gates and pod networks are what enforcement stands on.
fn is_expendable_set(set: SetName) -> bool {
    let base = set.as_str().strip_prefix("inet6:").unwrap_or(set.as_str());
    base == "kube-router-pod-self" || base.starts_with("KUBE-SRC-") || base.starts_with("KUBE-DST-")
}

/// Sets that a rule that only allows names.
fn named_sets(rule: &Rule) -> impl Iterator<Item = SetName> + '_ {
    let allows = matches!(&rule.target, Some(Target::Accept | Target::Goto(_)));
    rule.conditions.iter().filter(move |_| allows).filter_map(|condition| match condition {
        Condition { negated: false, test: Match::Set { set, .. } } => Some(*set),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use ferroute_iptables::Direction;

    use super::*;

    fn chain(name: &str) -> ChainName {
        ChainName::new(name).unwrap()
    }

    fn set(name: &str) -> SetName {
        SetName::new(name).unwrap()
    }

    const POLICY: &str = "KUBE-NWPLCY-ABCDEFGHIJKLMNOP";

    #[test]
    fn rules_that_allow_are_left_out_with_their_set() {
        let peers = set("KUBE-SRC-ABCDEFGHIJKLMNOP");
        let allow = |set| {
            Rule::new(Target::Goto(chain("KUBE-NWPLCY-DEFAULT"))).when(Match::set(set, &[Direction::Source]))
        };
        let other = allow(set("KUBE-SRC-QQQQQQQQQQQQQQQQ"));
        let wanted = Ruleset {
            chains: BTreeMap::from([(chain(POLICY), vec![allow(peers), other.clone()])]),
            jumps: Vec::new(),
        };
        let mut excluded = Excluded::default();
        assert_eq!(excluded.ruleset(Family::V4, &wanted), wanted);
        assert!(excluded.add_set(peers, "no such type".to_owned()));
        assert!(!excluded.add_set(set("inet6:kube-router-isolated-in"), String::new()), "never expendable");
        assert_eq!(excluded.ruleset(Family::V4, &wanted).chains[&chain(POLICY)], [other]);
        assert_eq!(excluded.reason([chain(POLICY)]), Some("no such type"));
        assert_eq!(excluded.describe(), ["ipset KUBE-SRC-ABCDEFGHIJKLMNOP: no such type"]);
        assert!(excluded.remove_set(peers));
        assert_eq!(excluded.ruleset(Family::V4, &wanted), wanted);
        assert_eq!(excluded.reason([chain(POLICY)]), None);
    }

    #[test]
    fn a_refused_line_is_left_out_unless_it_protects() {
        let log = Rule::new(Target::Nflog { group: 100, prefix: String::new() });
        let reject = Rule::new(Target::Drop);
        let group = chain("KUBE-POD-FW-ABCDEFGHIJKLMNOP");
        let changes = || ChainChanges::from([(group, Some(vec![log.clone(), reject.clone()]))]);
        let line = |rule: &Rule| format!("-A {group} {}", rule.render(Family::V4));
        let mut excluded = Excluded::default();
        assert!(!excluded.add_line(Family::V4, &line(&reject), String::new()));
        assert!(!excluded.add_line(Family::V4, "COMMIT", String::new()));
        assert!(!excluded.add_line(Family::V4, "-A KUBE-NWPLCY-DEFAULT -j MARK", String::new()));
        assert!(excluded.add_line(Family::V4, &line(&log), "no NFLOG".to_owned()));
        assert!(!excluded.add_line(Family::V4, &line(&log), "no NFLOG".to_owned()), "once is enough");
        assert_eq!(excluded.changes(Family::V4, changes())[&group], Some(vec![reject.clone()]));
        assert_eq!(excluded.changes(Family::V6, changes()), changes());
        assert!(excluded.add_line(Family::V4, &format!("-A {POLICY} -p sctp -j X"), String::new()));
        assert!(excluded.forget_rules() && excluded.is_empty());
    }
}
