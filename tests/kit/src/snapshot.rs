//! What the kernel of a node holds, as text that can be compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::assert::difference;
use crate::{Netns, kernel};

/// Virtual servers, sets, rules, routes, links and addresses of a namespace. Counters, timers and
/// random seeds are left out; where order means nothing, lines are sorted; tables of iptables in which
/// nobody has put anything are left out, whether loaded or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSnapshot {
    /// Lines by section.
    pub sections: BTreeMap<&'static str, Vec<String>>,
}

impl KernelSnapshot {
    /// Asks the kernel, by the same commands that users trust.
    ///
    /// # Errors
    /// When one of the commands fails.
    pub fn take(netns: &Netns) -> Result<Self> {
        let kernel = kernel::require()?;
        let mut sections = BTreeMap::new();
        sections.insert("ipvs", sorted(&netns.exec("ipvsadm", &["-Sn"])?, |line| Some(line.to_owned())));
        sections.insert(
            "ipset",
            sorted(&netns.exec("ipset", &["save"])?, |line| {
                Some(without_pairs(line, &["initval", "timeout", "hashsize"]))
            }),
        );
        sections.insert("iptables", tables(&netns.exec("iptables-legacy-save", &[])?));
        sections.insert("ip6tables", tables(&netns.exec("ip6tables-legacy-save", &[])?));
        if kernel.nft {
            sections.insert("iptables-nft", tables(&netns.exec("iptables-nft-save", &[])?));
            sections.insert("ip6tables-nft", tables(&netns.exec("ip6tables-nft-save", &[])?));
        }
        let route = |line: &str| {
            // Link-local and multicast routes come and go with links.
            let ours = !line.contains("fe80::") && !line.contains("ff00::/8");
            ours.then(|| without_pairs(line, &["expires"]).replace(" linkdown", ""))
        };
        let routes = netns.exec("ip", &["route", "show", "table", "all"])?
            + &netns.exec("ip", &["-6", "route", "show", "table", "all"])?;
        sections.insert("route", sorted(&routes, route));
        let rules = netns.exec("ip", &["rule", "show"])? + &netns.exec("ip", &["-6", "rule", "show"])?;
        sections.insert("rule", sorted(&rules, |line| Some(line.to_owned())));
        let links = netns.exec("ip", &["-o", "link", "show"])?;
        sections
            .insert("link", sorted(&links, |line| Some(line.split([':', '@']).nth(1)?.trim().to_owned())));
        let addresses = netns.exec("ip", &["-o", "addr", "show"])?;
        sections.insert(
            "address",
            sorted(&addresses, |line| {
                let line = line.split('\\').next()?.split_once(": ")?.1;
                (!line.contains("fe80::")).then(|| line.split_whitespace().collect::<Vec<_>>().join(" "))
            }),
        );
        Ok(Self { sections })
    }

    /// Takes one when the kernel has made the local routes of the namespace's own IPv6 addresses: it does
    /// so some time after they are set, and on a busy machine that would look like something left behind.
    ///
    /// # Errors
    /// When a table cannot be read, or a route is not there at the deadline.
    pub fn settled(netns: &Netns, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let snapshot = Self::take(netns)?;
            let routes = snapshot.sections.get("route").map(Vec::as_slice).unwrap_or_default();
            let missing = snapshot.sections.get("address").into_iter().flatten().find(|line| {
                let address = line.split_once(" inet6 ").and_then(|(_, rest)| rest.split('/').next());
                address.is_some_and(|own| {
                    !routes.iter().any(|route| route.starts_with(&format!("local {own} ")))
                })
            });
            let Some(missing) = missing else { return Ok(snapshot) };
            ensure!(Instant::now() < deadline, "{}: no local route for {missing}", netns.name());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Only the lines that meet this.
    pub fn only(&self, keep: impl Fn(&str) -> bool) -> Self {
        let filter = |lines: &Vec<String>| lines.iter().filter(|line| keep(line)).cloned().collect();
        Self { sections: self.sections.iter().map(|(name, lines)| (*name, filter(lines))).collect() }
    }

    /// What is gone (`-`) and what is new (`+`) in a later one, with the section in front.
    pub fn difference(&self, later: &Self) -> Vec<String> {
        let names: BTreeSet<_> = self.sections.keys().chain(later.sections.keys()).collect();
        let lines = |of: &Self, name| of.sections.get(name).cloned().unwrap_or_default();
        names
            .into_iter()
            .flat_map(|name| {
                let changed = difference(&lines(self, *name), &lines(later, *name));
                changed.into_iter().map(move |line| format!("{name}: {line}"))
            })
            .collect()
    }

    /// Asserts that a later one is the same.
    ///
    /// # Panics
    /// With the difference.
    pub fn assert_same(&self, later: &Self, what: &str) {
        let difference = self.difference(later);
        assert!(difference.is_empty(), "{what}: the kernel has changed:\n{}", difference.join("\n"));
    }
}

impl fmt::Display for KernelSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, lines) in &self.sections {
            writeln!(f, "[{name}]")?;
            lines.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        }
        Ok(())
    }
}

/// Flows that connection tracking knows, as `conntrack -L` prints them, both families.
///
/// # Errors
/// When the command fails.
pub fn flows(netns: &Netns) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in ["ipv4", "ipv6"] {
        lines.extend(netns.exec("conntrack", &["-L", "-f", family])?.lines().map(str::to_owned));
    }
    Ok(lines)
}

fn sorted(text: &str, line: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut lines: Vec<String> =
        text.lines().filter_map(|text| line(text.trim())).filter(|line| !line.is_empty()).collect();
    lines.sort();
    lines
}

/// The line without these words and the word that follows each.
fn without_pairs(line: &str, names: &[&str]) -> String {
    let mut words = Vec::new();
    let mut rest = line.split_whitespace();
    while let Some(word) = rest.next() {
        if names.contains(&word) {
            rest.next();
        } else {
            words.push(word);
        }
    }
    words.join(" ")
}

/// iptables-save text by table: order kept within, counters and comments dropped, empty tables left out.
fn tables(text: &str) -> Vec<String> {
    let mut tables: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            // ":INPUT ACCEPT [0:0]"; a built-in chain that accepts is how every table starts.
            let chain = chain.split('[').next().unwrap_or_default().trim();
            if !chain.ends_with(" ACCEPT") {
                tables.entry(table).or_default().push(format!("{table} :{chain}"));
            }
        } else if line.starts_with('-') {
            tables.entry(table).or_default().push(format!("{table} {line}"));
        }
    }
    for lines in tables.values_mut() {
        // Chains first, by name: the order of their creation means nothing.
        lines.sort_by_key(|line| {
            if line.contains(" :") && !line.contains(" -A ") { (0, line.clone()) } else { (1, String::new()) }
        });
    }
    tables.into_values().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_keep_rule_order_and_drop_what_means_nothing() {
        let text = "# Generated\n*nat\n:PREROUTING ACCEPT [1:2]\nCOMMIT\n*filter\n:INPUT ACCEPT [3:4]\n:ZED - [0:0]\n:FORWARD DROP [0:0]\n\
                    -A INPUT -j ZED\n-A INPUT -j ACCEPT\n-A ZED -m comment --comment \"a :b\" -j RETURN\nCOMMIT\n";
        assert_eq!(
            tables(text),
            [
                "filter :FORWARD DROP",
                "filter :ZED -",
                "filter -A INPUT -j ZED",
                "filter -A INPUT -j ACCEPT",
                "filter -A ZED -m comment --comment \"a :b\" -j RETURN",
            ]
        );
    }

    #[test]
    fn differences_name_their_section() {
        let one = |line: &str| KernelSnapshot { sections: [("ipset", vec![line.to_owned()])].into() };
        assert_eq!(one("a").difference(&one("b")), ["ipset: - a", "ipset: + b"]);
        assert_eq!(
            without_pairs("create s hash:ip initval 0x1 maxelem 5", &["initval"]),
            "create s hash:ip maxelem 5"
        );
    }
}
