//! What a table holds of ours, read from save output; and what it shall hold.

use std::collections::{BTreeMap, HashMap};

use crate::matches::Match;
use crate::rule::Rule;
use crate::target::Target;
use crate::text::{canonical, words};
use crate::{ChainName, Family};

/// A table of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableName {
    /// Accept and drop.
    Filter,
    /// Address translation.
    Nat,
    /// Packet changes.
    Mangle,
    /// Before connection tracking.
    Raw,
}

impl TableName {
    /// All that this crate reads and writes.
    pub const ALL: [Self; 4] = [Self::Filter, Self::Nat, Self::Mangle, Self::Raw];

    /// As iptables calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Mangle => "mangle",
            Self::Raw => "raw",
        }
    }
}

impl std::fmt::Display for TableName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A chain of the kernel's own, where packets enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Builtin {
    /// As they arrive.
    Prerouting,
    /// To this host.
    Input,
    /// Through it.
    Forward,
    /// From it.
    Output,
    /// As they leave.
    Postrouting,
}

impl Builtin {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Prerouting, Self::Input, Self::Forward, Self::Output, Self::Postrouting];

    /// As iptables calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }
}

/// Which chains are ours: those whose names start with one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ours {
    prefixes: Vec<String>,
}

impl Ours {
    /// By prefixes; a whole name is a prefix too.
    pub fn new(prefixes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        // An empty prefix would make everything ours.
        Self { prefixes: prefixes.into_iter().map(Into::into).filter(|prefix| !prefix.is_empty()).collect() }
    }

    /// Whether a chain is.
    #[must_use]
    pub fn owns(&self, chain: &str) -> bool {
        self.prefixes.iter().any(|prefix| chain.starts_with(prefix.as_str()))
    }
}

/// What one table of one family shall hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Our chains with all their rules.
    pub chains: BTreeMap<ChainName, Vec<Rule>>,
    /// How packets come into them.
    pub jumps: Vec<Jump>,
}

/// A rule in a chain of the kernel's that leads to a chain of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jump {
    /// Where packets come from.
    pub from: Builtin,
    /// A rule that jumps (or goes) to a chain of ours: that is how it is recognised again.
    pub rule: Rule,
    /// Where it stands.
    pub position: Position,
}

/// Place of a jump among the rules of its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Position {
    /// Before all others; moved back there when something got in front. Several keep their order.
    First,
    /// Put in front of all others when missing; not moved when others insert before it, so that two programs
    /// that both like to be first do not fight.
    Top,
    /// Appended when missing; not moved when others append behind it.
    Last,
}

/// What one table holds of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Our chains, each rule in its normal form.
    pub chains: BTreeMap<ChainName, Vec<String>>,
    /// Rules in other chains that lead to ours, by chain.
    pub jumps: BTreeMap<String, Vec<FoundJump>>,
}

impl Found {
    /// What was found, as rules, for looking at them: lines that are rules of `wanted`, of whichever chain,
    /// become those; of any other only the text is kept, as [`Match::Raw`] without target.
    #[must_use]
    pub fn rules(&self, wanted: &Ruleset, family: Family) -> Ruleset {
        let jumps = wanted.jumps.iter().map(|jump| &jump.rule);
        let known: HashMap<String, &Rule> = wanted
            .chains
            .values()
            .flatten()
            .chain(jumps)
            .map(|rule| (canonical(&rule.render(family)), rule))
            .collect();
        let rule = |form: &String| match known.get(form) {
            Some(rule) => (*rule).clone(),
            None => Rule { conditions: Vec::new(), target: None }.when(Match::Raw(vec![form.clone()])),
        };
        let chains =
            self.chains.iter().map(|(chain, forms)| (*chain, forms.iter().map(rule).collect())).collect();
        let mut found = Vec::new();
        for from in Builtin::ALL {
            for jump in self.jumps.get(from.name()).into_iter().flatten() {
                let position = if jump.index == 0 { Position::First } else { Position::Top };
                let mut rule = rule(&jump.form);
                if rule.target.is_none() {
                    rule.target = ChainName::new(&jump.to).ok().map(Target::Jump);
                }
                found.push(Jump { from, rule, position });
            }
        }
        Ruleset { chains, jumps: found }
    }
}

/// A rule of another chain that leads to one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundJump {
    /// Place among all rules of its chain, from 0.
    pub index: usize,
    /// Chain it leads to.
    pub to: String,
    /// Its words behind `-A CHAIN`, as printed.
    pub text: String,
    /// The same in normal form.
    pub form: String,
}

/// Save output that ends in the middle: acting on it could delete what was cut off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the listing of table {table} has no COMMIT line: it was cut off")]
pub struct CutOff {
    /// The table.
    pub table: TableName,
}

/// Reads our part of a table from `iptables-save` output; everything else is skipped. A table that does not
/// appear is empty.
///
/// # Errors
/// The table's section does not end.
pub fn parse(save: &str, table: TableName, ours: &Ours) -> Result<Found, CutOff> {
    let mut found = Found::default();
    let mut lengths: BTreeMap<&str, usize> = BTreeMap::new();
    let mut inside = false;
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            inside = name.trim() == table.name();
        } else if !inside {
            continue;
        } else if line.trim() == "COMMIT" {
            inside = false;
        } else if let Some(chain) = line.strip_prefix(':') {
            let chain = chain.split_whitespace().next().unwrap_or_default();
            if ours.owns(chain)
                && let Ok(chain) = ChainName::new(chain)
            {
                found.chains.entry(chain).or_default();
            }
        } else if let Some((chain, text)) = appended(line) {
            let length = lengths.entry(chain).or_default();
            let index = *length;
            *length += 1;
            if ours.owns(chain) {
                if let Ok(chain) = ChainName::new(chain) {
                    found.chains.entry(chain).or_default().push(canonical(text));
                }
            } else if let Some(to) = destination(text).filter(|to| ours.owns(to)) {
                let jump = FoundJump { index, to, text: text.to_owned(), form: canonical(text) };
                found.jumps.entry(chain.to_owned()).or_default().push(jump);
            }
        }
    }
    if inside { Err(CutOff { table }) } else { Ok(found) }
}

/// Chain and words of an `-A` line, with or without counters in front.
fn appended(line: &str) -> Option<(&str, &str)> {
    let line = match line.strip_prefix('[') {
        Some(rest) => rest.split_once("] ").map(|(_, line)| line)?,
        None => line,
    };
    let rest = line.strip_prefix("-A ")?;
    Some(rest.split_once(' ').unwrap_or((rest, "")))
}

/// Where a rule leads. Only foreign rules that might lead to us are taken apart.
fn destination(text: &str) -> Option<String> {
    if !text.contains("-j ") && !text.contains("-g ") {
        return None;
    }
    let words = words(text);
    let mut free = false;
    for (at, word) in words.iter().enumerate() {
        // A comment may say "-j".
        if std::mem::take(&mut free) {
            continue;
        }
        match word.as_str() {
            "--comment" | "--log-prefix" | "--nflog-prefix" => free = true,
            "-j" | "-g" => return words.get(at + 1).cloned(),
            _ => {}
        }
    }
    None
}

/// Counts what save output says about a host: rules, and whether the kubelet left its hint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Census {
    pub(crate) rules: usize,
    pub(crate) hint: bool,
    pub(crate) tables: bool,
}

pub(crate) fn census(save: &str) -> Census {
    let mut census = Census::default();
    for line in save.lines() {
        census.rules += usize::from(line.starts_with("-A "));
        census.tables |= line.starts_with('*');
        census.hint |= line.starts_with(":KUBE-IPTABLES-HINT ") || line.starts_with(":KUBE-KUBELET-CANARY ");
    }
    census
}

/// The normal forms of a chain's wanted rules.
pub(crate) fn forms(rules: &[Rule], family: Family) -> Vec<(String, String)> {
    rules
        .iter()
        .map(|rule| {
            let text = rule.render(family);
            let form = canonical(&text);
            (text, form)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAVE: &str = "\
# Generated by iptables-save v1.8.9 on Fri Nov 20 20:41:50 2026
*nat
:POSTROUTING ACCEPT [0:0]
:KUBE-ROUTER-HAIRPIN - [0:0]
-A POSTROUTING -m ipvs --vdir ORIGINAL -j KUBE-ROUTER-HAIRPIN
COMMIT
*filter
:INPUT ACCEPT [12:345]
:KUBE-ROUTER-SERVICES - [0:0]
:DOCKER - [0:0]
-A INPUT -m comment --comment \"see -j KUBE-ROUTER-SERVICES \" -j DOCKER
-A INPUT -m set --match-set kube-router-svip dst -j KUBE-ROUTER-SERVICES
[3:180] -A DOCKER -s 1.2.3.4/32 -g KUBE-ROUTER-SERVICES
-A KUBE-ROUTER-SERVICES -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A KUBE-ROUTER-SERVICES
COMMIT
# Completed
";

    #[test]
    fn only_ours_is_read() {
        let ours = Ours::new(["KUBE-ROUTER-"]);
        let found = parse(SAVE, TableName::Filter, &ours).unwrap();
        let chain = ChainName::new("KUBE-ROUTER-SERVICES").unwrap();
        assert_eq!(found.chains.len(), 1);
        assert_eq!(
            found.chains[&chain],
            [canonical("-p icmp --icmp-type echo-request -j ACCEPT"), String::new()]
        );
        assert_eq!(found.jumps["INPUT"].len(), 1);
        assert_eq!(found.jumps["INPUT"][0].index, 1);
        assert_eq!(found.jumps["DOCKER"][0].index, 0);
        assert_eq!(parse(SAVE, TableName::Mangle, &ours), Ok(Found::default()));
        assert_eq!(parse(SAVE, TableName::Filter, &Ours::new([""])), Ok(Found::default()));
    }

    #[test]
    fn what_was_found_reads_as_rules() {
        let ours = Ours::new(["KUBE-ROUTER-"]);
        let found = parse(SAVE, TableName::Filter, &ours).unwrap();
        let chain = ChainName::new("KUBE-ROUTER-SERVICES").unwrap();
        let ping = Rule::new(Target::Accept).when(Match::Icmp { kind: 8, code: None });
        let wanted = Ruleset { chains: BTreeMap::from([(chain, vec![ping.clone()])]), jumps: Vec::new() };
        let rules = found.rules(&wanted, Family::V4);
        assert_eq!(rules.chains[&chain][0], ping);
        assert_eq!(rules.chains[&chain][1].target, None, "a stranger's rule in our chain");
        assert_eq!(rules.jumps.len(), 1);
        assert_eq!(rules.jumps[0].rule.target, Some(Target::Jump(chain)));
        assert_eq!(rules.jumps[0].position, Position::Top, "another rule comes first");
    }

    #[test]
    fn a_cut_listing_is_refused() {
        let cut = &SAVE[..SAVE.rfind("COMMIT").unwrap()];
        let ours = Ours::new(["KUBE-ROUTER-"]);
        assert_eq!(parse(cut, TableName::Filter, &ours), Err(CutOff { table: TableName::Filter }));
        assert!(parse(cut, TableName::Nat, &ours).is_ok());
    }

    #[test]
    fn a_census_counts_rules_and_sees_the_kubelet() {
        assert_eq!(census(SAVE), Census { rules: 5, hint: false, tables: true });
        assert!(census(":KUBE-KUBELET-CANARY - [0:0]").hint);
        assert_eq!(census(""), Census::default());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\*filter\n|:K - \n|-A K |-j K\n|\"|\\\\|COMMIT\n|.{0,8}|\n){0,20}") {
            let _ = parse(&text, TableName::Filter, &Ours::new(["K"]));
            let _ = census(&text);
        }
    }
}
