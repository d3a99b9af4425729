//! What must be written for a table to hold what it shall, as one atomic restore document. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::rule::Rule;
use crate::table::{Builtin, Found, FoundJump, Jump, Ours, Position, Ruleset, TableName, forms};
use crate::{ChainName, Family};

/// A restore document and what it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Chains created or filled anew.
    pub written: Vec<ChainName>,
    /// Chains deleted.
    pub deleted: Vec<ChainName>,
    /// Jumps inserted, as `CHAIN: words`.
    pub jumps_added: Vec<String>,
    /// Jumps removed, as `CHAIN: words`.
    pub jumps_removed: Vec<String>,
    /// Chains that are wanted away but stay, emptied: a chain that is not ours leads to them.
    pub held: Vec<ChainName>,
    lines: Vec<String>,
    /// What the written chains will hold, in normal form.
    forms: Vec<(ChainName, Vec<String>)>,
}

/// Chains that shall change: their rules, or `None` for one that shall go.
pub type ChainChanges = BTreeMap<ChainName, Option<Vec<Rule>>>;

/// A ruleset that would write what is not ours, or that could not be recognised again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A chain without one of our prefixes.
    #[error("chain {0} does not carry a prefix of ours")]
    ForeignChain(ChainName),
    /// A jump that does not lead to a chain of ours.
    #[error("the jump {0:?} from {1} does not lead to a chain of ours")]
    ForeignJump(String, &'static str),
}

impl Plan {
    /// Nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The input for `iptables-restore --noflush`; empty when there is nothing to write.
    #[must_use]
    pub fn document(&self, table: TableName) -> String {
        if self.lines.is_empty() {
            return String::new();
        }
        let mut document =
            String::with_capacity(self.lines.iter().map(|line| line.len() + 1).sum::<usize>() + 24);
        document.push('*');
        document.push_str(table.name());
        document.push('\n');
        for line in &self.lines {
            document.push_str(line);
            document.push('\n');
        }
        document.push_str("COMMIT\n");
        document
    }

    /// What it does, one line each, for people.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let chains = self.written.iter().map(|chain| format!("write chain {chain}"));
        let added = self.jumps_added.iter().map(|jump| format!("add jump {jump}"));
        let removed = self.jumps_removed.iter().map(|jump| format!("remove jump {jump}"));
        let deleted = self.deleted.iter().map(|chain| format!("delete chain {chain}"));
        chains.chain(added).chain(removed).chain(deleted).collect()
    }
}

/// Compares what is there with what shall be. Rules are compared in their normal form, so a table that
/// needs nothing gives an empty plan.
///
/// Order within the document: chains with their rules, jumps, deletions. Restore commits a table as a whole,
/// so packets see the old rules or the new ones.
///
/// # Errors
/// The ruleset holds something that is not ours.
pub fn plan(found: &Found, wanted: &Ruleset, ours: &Ours, family: Family) -> Result<Plan, PlanError> {
    if let Some(chain) = wanted.chains.keys().find(|chain| !ours.owns(chain.as_str())) {
        return Err(PlanError::ForeignChain(*chain));
    }
    for Jump { from, rule, .. } in &wanted.jumps {
        let to = rule.target.as_ref().and_then(crate::target::Target::chain);
        if !to.is_some_and(|to| ours.owns(to.as_str())) {
            return Err(PlanError::ForeignJump(rule.render(family), from.name()));
        }
    }
    let mut plan = Plan::default();
    let mut rules = Vec::new();
    for (chain, want) in &wanted.chains {
        plan.fill(*chain, want, found, family, &mut rules);
    }
    let unwanted: Vec<ChainName> =
        found.chains.keys().filter(|chain| !wanted.chains.contains_key(*chain)).copied().collect();
    // Emptied before any is deleted: they may lead to each other.
    plan.lines.extend(unwanted.iter().map(|chain| format!(":{chain} - [0:0]")));
    plan.lines.append(&mut rules);

    let mut by_chain: BTreeMap<&'static str, Vec<&Jump>> = BTreeMap::new();
    for from in Builtin::ALL {
        let jumps: Vec<&Jump> = wanted.jumps.iter().filter(|jump| jump.from == from).collect();
        if !jumps.is_empty() || found.jumps.contains_key(from.name()) {
            by_chain.insert(from.name(), jumps);
        }
    }
    for (from, wanted) in by_chain {
        let have = found.jumps.get(from).map(Vec::as_slice).unwrap_or_default();
        plan.place(from, have, &wanted, family);
    }
    plan.remove(unwanted, found);
    Ok(plan)
}

/// [`plan`] for some chains alone, compared with what is known to be there: the cost follows the change.
/// Jumps in the kernel's own chains stay as they are.
///
/// # Errors
/// A chain that is not ours.
pub fn plan_chains(
    found: &Found,
    changes: &ChainChanges,
    ours: &Ours,
    family: Family,
) -> Result<Plan, PlanError> {
    if let Some(chain) = changes.keys().find(|chain| !ours.owns(chain.as_str())) {
        return Err(PlanError::ForeignChain(*chain));
    }
    let mut plan = Plan::default();
    let mut rules = Vec::new();
    for (chain, want) in changes {
        if let Some(want) = want {
            plan.fill(*chain, want, found, family, &mut rules);
        }
    }
    let gone = |(chain, want): (&ChainName, &Option<Vec<Rule>>)| {
        (want.is_none() && found.chains.contains_key(chain)).then_some(*chain)
    };
    let unwanted: Vec<ChainName> = changes.iter().filter_map(gone).collect();
    plan.lines.extend(unwanted.iter().map(|chain| format!(":{chain} - [0:0]")));
    plan.lines.append(&mut rules);
    plan.remove(unwanted, found);
    Ok(plan)
}

impl Found {
    /// Notes that a plan was written: its chains are now as it made them. Jumps in the kernel's own chains
    /// are not followed.
    pub fn note(&mut self, plan: &Plan) {
        for (chain, forms) in &plan.forms {
            self.chains.insert(*chain, forms.clone());
        }
        for chain in &plan.deleted {
            self.chains.remove(chain);
        }
        for chain in &plan.held {
            self.chains.insert(*chain, Vec::new());
        }
    }
}

fn is_builtin(chain: &str) -> bool {
    Builtin::ALL.iter().any(|builtin| builtin.name() == chain)
}

impl Plan {
    /// A chain of ours with its rules, unless it is there already.
    fn fill(
        &mut self,
        chain: ChainName,
        want: &[Rule],
        found: &Found,
        family: Family,
        rules: &mut Vec<String>,
    ) {
        let want = forms(want, family);
        if found.chains.get(&chain).is_some_and(|have| have.iter().eq(want.iter().map(|(_, form)| form))) {
            return;
        }
        self.written.push(chain);
        // Declaring a chain of a user creates it or empties it.
        self.lines.push(format!(":{chain} - [0:0]"));
        let mut forms = Vec::with_capacity(want.len());
        for (text, form) in want {
            rules.push(format!("-A {chain} {text}").trim_end().to_owned());
            forms.push(form);
        }
        self.forms.push((chain, forms));
    }

    /// Chains that go; those a stranger leads to stay, emptied.
    fn remove(&mut self, unwanted: Vec<ChainName>, found: &Found) {
        let strangers = found.jumps.iter().filter(|(from, _)| !is_builtin(from));
        let held: BTreeSet<&str> =
            strangers.flat_map(|(_, jumps)| jumps).map(|jump| jump.to.as_str()).collect();
        for chain in unwanted {
            if held.contains(chain.as_str()) {
                // Already empty and held: nothing to say each time.
                if found.chains.get(&chain).is_some_and(Vec::is_empty) {
                    self.lines.retain(|line| *line != format!(":{chain} - [0:0]"));
                }
                self.held.push(chain);
            } else {
                self.lines.push(format!("-X {chain}"));
                self.deleted.push(chain);
            }
        }
    }

    /// Jumps of one builtin chain.
    fn place(&mut self, from: &'static str, have: &[FoundJump], wanted: &[&Jump], family: Family) {
        let of = |position: Position| -> Vec<(String, String)> {
            wanted
                .iter()
                .filter(|jump| jump.position == position)
                .flat_map(|jump| forms(std::slice::from_ref(&jump.rule), family))
                .collect()
        };
        let (first, top, last) = (of(Position::First), of(Position::Top), of(Position::Last));
        // Those at the top that are right, in order and without a gap.
        let settled = first
            .iter()
            .enumerate()
            .all(|(at, (_, form))| have.iter().any(|jump| jump.index == at && jump.form == *form));
        let mut remove: Vec<&FoundJump> = Vec::new();
        let mut missing: Vec<&(String, String)> = last.iter().collect();
        let mut missing_top: Vec<&(String, String)> = top.iter().collect();
        for jump in have {
            let at_top = first.get(jump.index).is_some_and(|(_, form)| *form == jump.form);
            if settled && at_top {
                continue;
            }
            let wanted = [&mut missing_top, &mut missing].into_iter().find_map(|list| {
                let at = list.iter().position(|(_, form)| *form == jump.form)?;
                Some(list.remove(at))
            });
            if wanted.is_none() {
                remove.push(jump);
            }
        }
        // `-D` takes away the first equal rule. Equal rules are equal, but a copy further down must not cost
        // the one at its place: then all copies go and the right ones are written again.
        let copies = settled && remove.iter().any(|gone| first.iter().any(|(_, form)| *form == gone.form));
        if copies {
            remove.extend(
                have.iter().filter(|jump| first.get(jump.index).is_some_and(|(_, f)| *f == jump.form)),
            );
        }
        for jump in remove {
            self.lines.push(format!("-D {from} {}", jump.text));
            self.jumps_removed.push(format!("{from}: {}", jump.text));
        }
        for (text, _) in missing_top.into_iter().rev() {
            self.lines.push(format!("-I {from} 1 {text}"));
            self.jumps_added.push(format!("{from}: {text}"));
        }
        if !settled || copies {
            for (text, _) in first.iter().rev() {
                self.lines.push(format!("-I {from} 1 {text}"));
                self.jumps_added.push(format!("{from}: {text}"));
            }
        }
        for (text, _) in missing {
            self.lines.push(format!("-A {from} {text}"));
            self.jumps_added.push(format!("{from}: {text}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::parse;
    use crate::target::Target;

    fn chain(name: &str) -> ChainName {
        ChainName::new(name).unwrap()
    }

    fn jump(from: Builtin, to: &str, position: Position) -> Jump {
        Jump { from, rule: Rule::jump(chain(to)), position }
    }

    fn check(save: &str, wanted: &Ruleset) -> Plan {
        let ours = Ours::new(["K-"]);
        let save = format!("*filter\n{save}COMMIT\n");
        plan(&parse(&save, TableName::Filter, &ours).unwrap(), wanted, &ours, Family::V4).unwrap()
    }

    fn wanted() -> Ruleset {
        Ruleset {
            chains: BTreeMap::from([
                (chain("K-A"), vec![Rule::new(Target::Accept).comment("it's \"a\"")]),
                (chain("K-B"), vec![Rule::jump(chain("K-A"))]),
            ]),
            jumps: vec![
                jump(Builtin::Input, "K-A", Position::First),
                jump(Builtin::Input, "K-B", Position::First),
                jump(Builtin::Output, "K-B", Position::Last),
            ],
        }
    }

    #[test]
    fn an_empty_table_is_filled() {
        let plan = check("", &wanted());
        assert_eq!(
            plan.document(TableName::Filter),
            "*filter\n:K-A - [0:0]\n:K-B - [0:0]\n-A K-A -m comment --comment \"it's \\\"a\\\"\" -j ACCEPT\n\
             -A K-B -j K-A\n-I INPUT 1 -j K-B\n-I INPUT 1 -j K-A\n-A OUTPUT -j K-B\nCOMMIT\n"
        );
    }

    const SETTLED: &str = ":INPUT ACCEPT [0:0]\n:K-A - [0:0]\n:K-B - [0:0]\n-A INPUT -j K-A\n-A INPUT -j K-B\n\
        -A INPUT -s 9.9.9.9/32 -j DROP\n-A OUTPUT -j K-B\n-A OUTPUT -j OTHER\n\
        -A K-A -m comment --comment \"it\\'s \\\"a\\\"\" -j ACCEPT\n-A K-B -j K-A\n";

    #[test]
    fn a_settled_table_is_left_alone() {
        let plan = check(SETTLED, &wanted());
        assert!(plan.is_empty(), "{plan:?}");
        assert_eq!(plan.document(TableName::Filter), "");
    }

    #[test]
    fn only_what_changed_is_written() {
        let drifted = SETTLED.replace("-A K-B -j K-A\n", "-A K-B -j K-A\n-A K-B -j DROP\n");
        let plan = check(&drifted, &wanted());
        assert_eq!(plan.document(TableName::Filter), "*filter\n:K-B - [0:0]\n-A K-B -j K-A\nCOMMIT\n");
    }

    #[test]
    fn a_jump_that_lost_its_place_is_moved_back() {
        let drifted = SETTLED.replace("-A INPUT -j K-A\n", "-A INPUT -j OTHER\n-A INPUT -j K-A\n");
        let plan = check(&drifted, &wanted());
        assert_eq!(
            plan.document(TableName::Filter),
            "*filter\n-D INPUT -j K-A\n-D INPUT -j K-B\n-I INPUT 1 -j K-B\n-I INPUT 1 -j K-A\nCOMMIT\n"
        );
    }

    #[test]
    fn copies_and_old_jumps_go_and_missing_ones_come() {
        let drifted = SETTLED
            .replace("-A OUTPUT -j K-B\n", "")
            .replace("-A OUTPUT -j OTHER\n", "-A OUTPUT -j OTHER\n-A OUTPUT -s 1.1.1.1/32 -j K-OLD\n")
            .replace("-A INPUT -s 9", "-A INPUT -j K-A\n-A INPUT -s 9");
        let plan = check(&drifted, &wanted());
        assert_eq!(
            plan.document(TableName::Filter),
            "*filter\n-D INPUT -j K-A\n-D INPUT -j K-A\n-D INPUT -j K-B\n-I INPUT 1 -j K-B\n-I INPUT 1 -j K-A\n\
             -D OUTPUT -s 1.1.1.1/32 -j K-OLD\n-A OUTPUT -j K-B\nCOMMIT\n"
        );
    }

    #[test]
    fn everything_of_ours_goes_and_nothing_else() {
        let plan = check(SETTLED, &Ruleset::default());
        assert_eq!(
            plan.document(TableName::Filter),
            "*filter\n:K-A - [0:0]\n:K-B - [0:0]\n-D INPUT -j K-A\n-D INPUT -j K-B\n-D OUTPUT -j K-B\n\
             -X K-A\n-X K-B\nCOMMIT\n"
        );
        assert!(check("", &Ruleset::default()).is_empty());
    }

    #[test]
    fn a_chain_that_a_stranger_leads_to_is_emptied_and_kept() {
        let held = format!("{SETTLED}-A OTHER -j K-A\n");
        let plan = check(&held, &Ruleset::default());
        assert_eq!(plan.held, [chain("K-A")]);
        assert!(!plan.document(TableName::Filter).contains("-X K-A"));
        assert!(!plan.document(TableName::Filter).contains("OTHER"));
        // Once emptied there is nothing left to do.
        assert!(check(":K-A - [0:0]\n-A OTHER -j K-A\n", &Ruleset::default()).is_empty());
    }

    #[test]
    fn some_chains_alone_cost_no_more_than_they_change() {
        let ours = Ours::new(["K-"]);
        let mut found = parse(&format!("*filter\n{SETTLED}COMMIT\n"), TableName::Filter, &ours).unwrap();
        let changes = |chains: &[(&str, Option<Vec<Rule>>)]| -> ChainChanges {
            chains.iter().map(|(name, rules)| (chain(name), rules.clone())).collect()
        };
        let same = changes(&[("K-B", Some(vec![Rule::jump(chain("K-A"))])), ("K-Z", None)]);
        assert!(plan_chains(&found, &same, &ours, Family::V4).unwrap().is_empty());
        let more = changes(&[
            ("K-B", Some(vec![Rule::jump(chain("K-C"))])),
            ("K-C", Some(vec![Rule::new(Target::Drop)])),
            ("K-A", None),
        ]);
        let plan = plan_chains(&found, &more, &ours, Family::V4).unwrap();
        assert_eq!(
            plan.document(TableName::Filter),
            "*filter\n:K-B - [0:0]\n:K-C - [0:0]\n:K-A - [0:0]\n-A K-B -j K-C\n-A K-C -j DROP\n-X K-A\nCOMMIT\n"
        );
        found.note(&plan);
        assert!(plan_chains(&found, &more, &ours, Family::V4).unwrap().is_empty());
        let foreign = changes(&[("DOCKER", None)]);
        assert!(plan_chains(&found, &foreign, &ours, Family::V4).is_err());
        found.note(&check(SETTLED, &Ruleset::default()));
        assert!(found.chains.keys().eq(&[chain("K-C")]), "{found:?}");
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let ours = Ours::new(["K-"]);
        let foreign = Ruleset { chains: BTreeMap::from([(chain("INPUT"), Vec::new())]), jumps: Vec::new() };
        let found = Found::default();
        assert!(matches!(plan(&found, &foreign, &ours, Family::V4), Err(PlanError::ForeignChain(_))));
        let foreign =
            Ruleset { chains: BTreeMap::new(), jumps: vec![jump(Builtin::Input, "DOCKER", Position::First)] };
        assert!(matches!(plan(&found, &foreign, &ours, Family::V4), Err(PlanError::ForeignJump(..))));
    }

    #[test]
    fn a_jump_at_the_top_is_put_there_once_and_stays_where_it_is() {
        let wanted = Ruleset {
            chains: BTreeMap::from([(chain("K-A"), Vec::new()), (chain("K-B"), Vec::new())]),
            jumps: vec![
                jump(Builtin::Input, "K-A", Position::Top),
                jump(Builtin::Input, "K-B", Position::Top),
            ],
        };
        let chains = ":INPUT ACCEPT [0:0]\n:K-A - [0:0]\n:K-B - [0:0]\n";
        let plan = check(&format!("{chains}-A INPUT -j ACCEPT\n"), &wanted);
        assert_eq!(
            plan.document(TableName::Filter),
            "*filter\n-I INPUT 1 -j K-B\n-I INPUT 1 -j K-A\nCOMMIT\n"
        );
        let moved = "-A INPUT -j OTHER\n-A INPUT -j K-B\n-A INPUT -j K-A\n";
        assert!(check(&format!("{chains}{moved}"), &wanted).is_empty());
        let twice = check(&format!("{chains}{moved}-A INPUT -j K-A\n"), &wanted);
        assert_eq!(twice.jumps_removed, ["INPUT: -j K-A"]);
    }
}
