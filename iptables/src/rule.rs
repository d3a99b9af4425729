//! Rules as plain values, and their text in restore syntax.

use std::fmt::Write as _;

use crate::matches::{Direction, Match};
use crate::target::Target;
use crate::text::{join, push_word};
use crate::{ChainName, Family, Protocol};

/// One rule: all conditions must hold, then the target acts. Without a target it only counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Conditions in order. Addresses, interfaces and protocol are written first whatever their place,
    /// as the kernel tests them first.
    pub conditions: Vec<Condition>,
    /// What to do.
    pub target: Option<Target>,
}

/// A match or its opposite.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Condition {
    /// Holds when the match does not. Refused by iptables for matches that have no opposite
    /// (comment, limit).
    pub negated: bool,
    /// What is looked at.
    pub test: Match,
}

impl Rule {
    /// A rule without conditions.
    #[must_use]
    pub fn new(target: Target) -> Self {
        Self { conditions: Vec::new(), target: Some(target) }
    }

    /// A rule that jumps to `chain`.
    #[must_use]
    pub fn jump(chain: ChainName) -> Self {
        Self::new(Target::Jump(chain))
    }

    /// Adds a condition that must hold.
    #[must_use]
    pub fn when(mut self, test: Match) -> Self {
        self.conditions.push(Condition { negated: false, test });
        self
    }

    /// Adds a condition that must not hold.
    #[must_use]
    pub fn unless(mut self, test: Match) -> Self {
        self.conditions.push(Condition { negated: true, test });
        self
    }

    /// Adds a comment; see [`Match::comment`].
    #[must_use]
    pub fn comment(self, text: &str) -> Self {
        self.when(Match::comment(text))
    }

    /// The rule as words behind `-A CHAIN`, quoted for restore.
    #[must_use]
    pub fn render(&self, family: Family) -> String {
        let mut text = Text { out: String::with_capacity(96), module: None, used: Vec::new() };
        let icmp = match family {
            Family::V4 => Protocol::ICMP,
            Family::V6 => Protocol::ICMPV6,
        };
        for condition in &self.conditions {
            text.header(condition);
        }
        let protocol = self.conditions.iter().find_map(|condition| match condition {
            Condition { negated: false, test: Match::Protocol(protocol) } => Some(*protocol),
            _ => None,
        });
        if protocol.is_none() && self.conditions.iter().any(|c| matches!(c.test, Match::Icmp { .. })) {
            text.words(false, &["-p", &icmp.to_string()]);
        }
        for condition in &self.conditions {
            text.extension(condition, protocol, family);
        }
        if let Some(target) = &self.target {
            for word in target.words(family) {
                text.word(&word);
            }
        }
        text.out
    }
}

/// A rule's text as it grows.
struct Text {
    out: String,
    /// The match extension that options now belong to.
    module: Option<&'static str>,
    /// Its options given so far: an option given twice needs the extension again.
    used: Vec<&'static str>,
}

impl Text {
    fn word(&mut self, word: &str) {
        if !self.out.is_empty() {
            self.out.push(' ');
        }
        push_word(&mut self.out, word);
    }

    fn words(&mut self, negated: bool, words: &[&str]) {
        if negated {
            self.plain("!");
        }
        for (at, word) in words.iter().enumerate() {
            if at == 0 { self.plain(word) } else { self.word(word) }
        }
    }

    /// A word of the syntax itself: never quoted.
    fn plain(&mut self, word: &str) {
        if !self.out.is_empty() {
            self.out.push(' ');
        }
        self.out.push_str(word);
    }

    fn header(&mut self, condition: &Condition) {
        let negated = condition.negated;
        match &condition.test {
            Match::Source(net) => self.words(negated, &["-s", &net.to_string()]),
            Match::Destination(net) => self.words(negated, &["-d", &net.to_string()]),
            Match::InInterface(name) => self.words(negated, &["-i", name]),
            Match::OutInterface(name) => self.words(negated, &["-o", name]),
            Match::Protocol(protocol) => self.words(negated, &["-p", &protocol.to_string()]),
            _ => {}
        }
    }

    /// Names the extension unless the option can join the one before.
    fn option(&mut self, module: &'static str, negated: bool, option: &'static str, values: &[&str]) {
        if self.module != Some(module) || self.used.contains(&option) {
            self.plain("-m");
            self.plain(module);
            self.module = Some(module);
            self.used.clear();
        }
        self.used.push(option);
        if negated {
            self.plain("!");
        }
        self.plain(option);
        for value in values {
            self.word(value);
        }
    }

    fn extension(&mut self, condition: &Condition, protocol: Option<Protocol>, family: Family) {
        let negated = condition.negated;
        match &condition.test {
            Match::Source(_)
            | Match::Destination(_)
            | Match::InInterface(_)
            | Match::OutInterface(_)
            | Match::Protocol(_) => {}
            Match::Comment(comment) => self.option("comment", negated, "--comment", &[comment]),
            Match::Set { set, flags } => {
                // One set a match: each names its own.
                self.module = None;
                self.option("set", negated, "--match-set", &[set.as_str(), &join(flags)]);
            }
            Match::AddressType(direction, kind) => {
                let option = match direction {
                    Direction::Source => "--src-type",
                    Direction::Destination => "--dst-type",
                };
                self.option("addrtype", negated, option, &[kind.name()]);
            }
            Match::Port(direction, ports) => {
                let option = match direction {
                    Direction::Source => "--sport",
                    Direction::Destination => "--dport",
                };
                // Without a protocol iptables refuses the port, and names the rule.
                let module = protocol.and_then(Protocol::name).unwrap_or("tcp");
                self.option(module, negated, option, &[&ports.to_string()]);
            }
            Match::Ports(direction, ports) => {
                let option = match direction {
                    Direction::Source => "--sports",
                    Direction::Destination => "--dports",
                };
                self.module = None;
                self.option("multiport", negated, option, &[&join(ports)]);
            }
            Match::TcpFlags { mask, set } => {
                self.option("tcp", negated, "--tcp-flags", &[&mask.to_string(), &set.to_string()]);
            }
            Match::State(states) => self.option("conntrack", negated, "--ctstate", &[&join(states)]),
            Match::Mark { value, mask } => {
                let text = match *mask {
                    u32::MAX => format!("{value:#x}"),
                    mask => format!("{value:#x}/{mask:#x}"),
                };
                self.module = None;
                self.option("mark", negated, "--mark", &[&text]);
            }
            Match::Physdev(test) => {
                let (option, name) = test.words();
                self.option("physdev", negated, option, name.as_slice());
            }
            Match::Ipvs(test) => {
                let (option, value) = test.words();
                let values: Vec<&str> = value.iter().map(String::as_str).collect();
                self.option("ipvs", negated, option, &values);
            }
            Match::Icmp { kind, code } => {
                let mut text = kind.to_string();
                if let Some(code) = code {
                    // Writing to a String cannot fail.
                    let _ = write!(text, "/{code}");
                }
                match family {
                    Family::V4 => self.option("icmp", negated, "--icmp-type", &[&text]),
                    Family::V6 => self.option("icmp6", negated, "--icmpv6-type", &[&text]),
                }
            }
            Match::Limit { rate, per, burst } => {
                self.module = None;
                self.option("limit", negated, "--limit", &[&format!("{rate}/{}", per.name())]);
                self.option("limit", false, "--limit-burst", &[&burst.to_string()]);
            }
            Match::Raw(words) => {
                if negated {
                    self.plain("!");
                }
                for word in words {
                    self.word(word);
                }
                self.module = None;
            }
        }
    }
}
