//! Tunnels to other nodes: their names, what they must be, and what of the kernel's is ours. Pure.
//!
//! kube-router names a tunnel by a hash of the far end's digits: 1.1.11.1 and 11.1.1.1 have one name.
//! That name is kept, so that its tunnels are adopted; where two ends share it, the second one's comes
//! from the address itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::fib::TABLE_PODS;
use crate::host::Family;
use crate::host::route::PROTOCOL;
use crate::host::rule::{Rule, RuleChange};
use crate::host::tunnel::{Tunnel, TunnelLink};

/// Priority of rules that send packets from pods to [`TABLE_PODS`]: before table main (32766).
pub const RULE_PRIORITY: u32 = 32_760;

/// How tunnel names begin.
const PREFIX: &str = "tun-";
/// Hexadecimal digits behind it.
const DIGITS: usize = 11;

fn hashed(bytes: &[u8]) -> String {
    let mut name = PREFIX.to_owned();
    for byte in Sha256::digest(bytes).iter().take(DIGITS.div_ceil(2)) {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name.truncate(PREFIX.len() + DIGITS);
    name
}

/// kube-router's name of the tunnel to this address.
pub fn name(remote: IpAddr) -> String {
    let digits: String = remote.to_string().chars().filter(|c| !matches!(c, '.' | ':')).collect();
    hashed(digits.as_bytes())
}

/// The name where another tunnel has that one.
pub fn second_name(remote: IpAddr) -> String {
    match remote {
        IpAddr::V4(remote) => hashed(&remote.octets()),
        IpAddr::V6(remote) => hashed(&remote.octets()),
    }
}

/// Whether a tunnel is ours (or kube-router's): its name follows from its far end.
pub fn is_ours(found: &TunnelLink) -> bool {
    let remote = found.tunnel.remote;
    found.link.name == name(remote) || found.link.name == second_name(remote)
}

/// A name for each far end; one that has a tunnel already keeps its name.
pub fn assign(ends: &BTreeSet<IpAddr>, present: &[TunnelLink]) -> BTreeMap<IpAddr, String> {
    let mut names: BTreeMap<IpAddr, String> = present
        .iter()
        .filter(|found| ends.contains(&found.tunnel.remote) && is_ours(found))
        .map(|found| (found.tunnel.remote, found.link.name.clone()))
        .collect();
    for end in ends {
        if names.contains_key(end) {
            continue;
        }
        let first = name(*end);
        let is_taken = names.values().any(|taken| *taken == first);
        names.insert(*end, if is_taken { second_name(*end) } else { first });
    }
    names
}

/// A tunnel as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Name of the link.
    pub name: String,
    /// Ends and form.
    pub tunnel: Tunnel,
    /// Largest packet inside, in bytes.
    pub mtu: u32,
}

/// One change of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunnelChange {
    /// Make it.
    Create(Wanted),
    /// Give the link of this index these ends, form and MTU; set it up.
    Change(u32, Wanted),
    /// A link of another kind that was a tunnel of ours: delete and make.
    Recreate(u32, Wanted),
    /// Delete the link of this index and name.
    Delete(u32, String),
}

/// What turns the kernel's tunnels into those wanted. Of others, ours go where `may_delete`. Links
/// that are no tunnels and have a name that is wanted are told by the kernel when the tunnel is made.
pub fn diff(
    present: &[TunnelLink],
    wanted: &[Wanted],
    may_delete: impl Fn(Family) -> bool,
) -> Vec<TunnelChange> {
    let mut changes = Vec::new();
    let mut gone = Vec::new();
    for found in present {
        let is_wanted = wanted.iter().any(|wanted| wanted.name == found.link.name);
        if !is_wanted && is_ours(found) && may_delete(Family::of(found.tunnel.remote)) {
            gone.push(TunnelChange::Delete(found.link.index, found.link.name.clone()));
        }
    }
    for wanted in wanted {
        let Some(found) = present.iter().find(|found| found.link.name == wanted.name) else {
            changes.push(TunnelChange::Create(wanted.clone()));
            continue;
        };
        if found.link.kind.as_deref() != Some(wanted.tunnel.kind()) {
            changes.push(TunnelChange::Recreate(found.link.index, wanted.clone()));
        } else if found.tunnel != wanted.tunnel
            || found.carries != carried(&wanted.tunnel)
            || found.link.mtu != wanted.mtu
            || !found.link.is_up()
        {
            changes.push(TunnelChange::Change(found.link.index, wanted.clone()));
        }
    }
    // One that goes may hold the ends that another one is to have.
    gone.extend(changes);
    gone
}

/// What a tunnel of ours is limited to: `ipip` to IPv4 (the kernel says 4), `ip6tnl` to nothing.
fn carried(tunnel: &Tunnel) -> u8 {
    if tunnel.remote.is_ipv4() { 4 } else { 0 }
}

/// What turns the kernel's rules into `pods`, one rule each, lookup [`TABLE_PODS`]. Rules of
/// kube-router (no protocol) are adopted, and go when their network is none of `pods`; rules that
/// somebody else made stay.
pub fn diff_rules(present: &[Rule], pods: &[IpNet]) -> Vec<RuleChange> {
    let mut changes = Vec::new();
    let mut kept = BTreeSet::new();
    for rule in present {
        let is_ours = rule.table == TABLE_PODS && matches!(rule.protocol, 0 | PROTOCOL);
        if pods.contains(&rule.source) && rule.table == TABLE_PODS && kept.insert(rule.source) {
            continue;
        }
        if is_ours {
            changes.push(RuleChange::Delete(*rule));
        }
    }
    let missing = pods.iter().filter(|pods| !kept.contains(*pods)).map(|pods| {
        RuleChange::Add(Rule {
            source: *pods,
            table: TABLE_PODS,
            priority: RULE_PRIORITY,
            protocol: PROTOCOL,
        })
    });
    let mut all: Vec<RuleChange> = missing.collect();
    all.extend(changes);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::link::Link;
    use crate::host::tunnel::Encapsulation;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn found(index: u32, name: &str, remote: &str) -> TunnelLink {
        let remote = ip(remote);
        let kind = if remote.is_ipv4() { "ipip" } else { "ip6tnl" };
        TunnelLink {
            link: Link {
                index,
                name: name.to_owned(),
                kind: Some(kind.to_owned()),
                flags: 1,
                mtu: 1480,
                master: None,
            },
            tunnel: Tunnel {
                local: if remote.is_ipv4() { ip("10.0.0.1") } else { ip("fd00::1") },
                remote,
                encapsulation: Encapsulation::Plain,
            },
            carries: if remote.is_ipv4() { 4 } else { 0 },
        }
    }

    fn wanted(like: &TunnelLink) -> Wanted {
        Wanted { name: like.link.name.clone(), tunnel: like.tunnel, mtu: 1480 }
    }

    #[test]
    fn names_are_kube_routers() {
        // printf 10012 | sha256sum; printf fd00c | sha256sum
        assert_eq!(name(ip("10.0.1.2")), format!("tun-{}", &sha("10012")[..11]));
        assert_eq!(name(ip("fd00::c")), format!("tun-{}", &sha("fd00c")[..11]));
        assert_eq!(name(ip("1.1.11.1")), name(ip("11.1.1.1")));
        assert_eq!(name(ip("11.1.1.1")).len(), crate::host::link::NAME_LIMIT);
        assert_ne!(second_name(ip("1.1.11.1")), second_name(ip("11.1.1.1")));
    }

    fn sha(text: &str) -> String {
        Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn two_ends_with_one_name_get_two_and_keep_them() {
        let ends: BTreeSet<IpAddr> = ["1.1.11.1", "11.1.1.1", "9.9.9.9"].map(ip).into();
        let fresh = assign(&ends, &[]);
        assert_eq!(fresh[&ip("1.1.11.1")], name(ip("1.1.11.1")));
        assert_eq!(fresh[&ip("11.1.1.1")], second_name(ip("11.1.1.1")));
        assert_eq!(fresh[&ip("9.9.9.9")], name(ip("9.9.9.9")));
        // The other one was there first, under the shared name.
        let present = [found(5, &name(ip("11.1.1.1")), "11.1.1.1")];
        let kept = assign(&ends, &present);
        assert_eq!(kept[&ip("11.1.1.1")], name(ip("11.1.1.1")));
        assert_eq!(kept[&ip("1.1.11.1")], second_name(ip("1.1.11.1")));
    }

    #[test]
    fn only_what_differs_is_changed_and_strangers_stay() {
        let right = found(5, &name(ip("10.0.1.2")), "10.0.1.2");
        let stale = found(6, &name(ip("fd00::2")), "fd00::2");
        let foreign = found(7, "tun-0123456789a", "10.0.9.9");
        let present = [right.clone(), stale.clone(), foreign];
        let keep = [wanted(&right)];
        assert_eq!(diff(&present, &keep, |_| true), [TunnelChange::Delete(6, stale.link.name.clone())]);
        assert_eq!(diff(&present, &keep, |family| family == Family::V4), []);
        // Somebody gave it another end, took it down, changed its form or MTU.
        let spoil: [fn(&mut TunnelLink); 5] = [
            |found| found.tunnel.remote = "10.0.1.3".parse().unwrap(),
            |found| found.tunnel.local = "10.0.0.9".parse().unwrap(),
            |found| found.tunnel.encapsulation = Encapsulation::Gue(5555),
            |found| found.link.flags = 0,
            |found| found.link.mtu = 1400,
        ];
        for spoil in spoil {
            let mut broken = right.clone();
            spoil(&mut broken);
            assert_eq!(diff(&[broken], &keep, |_| true), [TunnelChange::Change(5, keep[0].clone())]);
        }
        let mut other = found(5, &right.link.name, "fd00::2");
        other.link.name = right.link.name.clone();
        assert_eq!(diff(&[other], &keep, |_| true), [TunnelChange::Recreate(5, keep[0].clone())]);
        assert_eq!(diff(&[], &keep, |_| true), [TunnelChange::Create(keep[0].clone())]);
    }

    #[test]
    fn rules_follow_the_pod_networks() {
        let rule = |source: &str, table, protocol| Rule {
            source: source.parse().unwrap(),
            table,
            priority: 32765,
            protocol,
        };
        let pods: [IpNet; 2] = ["10.1.0.0/24", "fd10::/64"].map(|net| net.parse().unwrap());
        let present = [
            rule("10.1.0.0/24", 77, 0),
            rule("10.1.0.0/24", 77, PROTOCOL),
            rule("10.9.0.0/24", 77, 0),
            rule("10.8.0.0/24", 77, 3),
            rule("10.1.0.0/24", 78, 0),
        ];
        let changes = diff_rules(&present, &pods);
        assert_eq!(
            changes,
            [
                RuleChange::Add(Rule { priority: RULE_PRIORITY, ..rule("fd10::/64", 77, PROTOCOL) }),
                RuleChange::Delete(present[1]),
                RuleChange::Delete(present[2]),
            ]
        );
        assert_eq!(diff_rules(&present[..1], &pods[..1]), []);
    }

    proptest! {
        #[test]
        fn every_end_has_a_name_of_its_own(ends in prop::collection::btree_set((1u8..3, 1u8..3, 10u8..13, 1u8..3), 0..16)) {
            let ends: BTreeSet<IpAddr> = ends.into_iter().map(|(a, b, c, d)| IpAddr::from([a, b, c, d])).collect();
            let names = assign(&ends, &[]);
            let distinct: BTreeSet<&String> = names.values().collect();
            prop_assert_eq!((names.len(), distinct.len()), (ends.len(), ends.len()));
        }
    }
}
