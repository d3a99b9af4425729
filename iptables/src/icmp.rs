//! The ICMP that IP needs, as kube-router lets it through both of its firewalls.

use crate::{Family, Match, Rule, Target};

/// Rules that accept echo requests and error messages, and in IPv6 neighbour discovery, with kube-router's
/// comments. Type numbers are those of RFC 792 and RFC 4443.
#[must_use]
pub fn icmp_accepts(family: Family) -> Vec<Rule> {
    let kinds: &[(u8, &str)] = match family {
        Family::V4 => &[
            (8, "allow icmp echo requests"),
            (3, "allow icmp destination unreachable messages"),
            (11, "allow icmp time exceeded messages"),
        ],
        Family::V6 => &[
            (128, "allow icmp echo requests"),
            (1, "allow icmp destination unreachable messages"),
            (2, "allow icmp packet too big messages"),
            (3, "allow icmp time exceeded messages"),
            (135, "allow icmp neighbor solicitation messages"),
            (136, "allow icmp neighbor advertisement messages"),
            (129, "allow icmp echo reply messages"),
        ],
    };
    kinds
        .iter()
        .map(|(kind, comment)| {
            Rule::new(Target::Accept).when(Match::Icmp { kind: *kind, code: None }).comment(comment)
        })
        .collect()
}
