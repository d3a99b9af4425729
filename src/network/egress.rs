//! What leaves the pod network, and what passes through this host for it: chains and sets. Pure.
//!
//! Rules do not grow with nodes: pod networks and node addresses of the whole cluster are in sets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferroute_iptables::ipset::{Entry, Extra, Options, Set, SetType, Sets};
use ferroute_iptables::{
    Builtin, ChainName, Direction, Family, Jump, Match, Mss, Position, Protocol, Rule, Ruleset, SetName,
    TableName, Target, TcpFlags,
};
use ipnet::IpNet;

use crate::chains::Rules;

/// Masquerades, in `nat`.
pub const EGRESS: &str = "KUBE-ROUTER-EGRESS";
/// Accepts, in `filter`.
pub const PODS: &str = "KUBE-ROUTER-PODS";
/// Limits TCP segments to what tunnels carry, in `mangle`.
pub const TUNNELS: &str = "KUBE-ROUTER-TUNNELS";

/// Every chain of ours.
pub const CHAINS: [&str; 3] = [EGRESS, PODS, TUNNELS];

/// Pod networks of all nodes; kube-router's name.
pub const POD_SUBNETS: &str = "kube-router-pod-subnets";
/// Addresses of all nodes; kube-router's name.
pub const NODE_IPS: &str = "kube-router-node-ips";

/// The bridge of this node's pods.
pub const BRIDGE: &str = "kube-bridge";

fn chain(name: &str) -> ChainName {
    // Three fixed names of at most 19 bytes; the kernel takes 28.
    #[allow(clippy::expect_used)]
    ChainName::new(name).expect("fixed chain names are short enough")
}

/// A set's name in a family.
pub fn set_name(name: &str, family: Family) -> SetName {
    let name = if family == Family::V4 { name.to_owned() } else { format!("inet6:{name}") };
    // Two fixed names of at most 29 bytes; the kernel takes 31.
    #[allow(clippy::expect_used)]
    SetName::new(&name).expect("fixed set names are short enough")
}

/// All names of our sets.
pub fn set_names() -> Vec<SetName> {
    let of = |family| [POD_SUBNETS, NODE_IPS].map(|name| set_name(name, family));
    Family::BOTH.into_iter().flat_map(of).collect()
}

/// The sets, filled with what is known of all nodes.
pub fn sets(families: &[Family], pods: &[IpNet], nodes: &[IpAddr]) -> Sets {
    let mut sets = Sets::new();
    for family in families {
        // kube-router creates them so; an equal set is adopted.
        let options = Options { timeout: Some(0), ..Options::default() };
        let mut subnets = Set::new(SetType::HashNet, *family, options);
        for net in pods.iter().filter(|net| Family::of(net.addr()) == *family) {
            // A set of networks takes no /0, and no node has all addresses.
            let _ = subnets.insert(Entry::Net(*net), Extra::default());
        }
        let mut addresses = Set::new(SetType::HashIp, *family, options);
        for ip in nodes.iter().filter(|ip| Family::of(**ip) == *family) {
            let _ = addresses.insert(Entry::Ip(*ip), Extra::default());
        }
        sets.insert(set_name(POD_SUBNETS, *family), subnets);
        sets.insert(set_name(NODE_IPS, *family), addresses);
    }
    sets
}

/// What the rules are decided by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Masquerade at all.
    pub egress: bool,
    /// Destinations that are not masqueraded.
    pub exclude: Vec<IpNet>,
    /// Links that carry a node address: traffic of NodePorts leaves there.
    pub node_links: Vec<String>,
    /// There may be tunnels.
    pub overlay: bool,
}

/// What the chains must be. A table without chains of ours is named with none, so that what is there
/// from another setting goes.
pub fn rules(facts: &Facts, families: &[Family]) -> Rules {
    families
        .iter()
        .flat_map(|family| {
            [
                ((*family, TableName::Nat), nat(facts, *family)),
                ((*family, TableName::Filter), filter(facts)),
                ((*family, TableName::Mangle), mangle(facts)),
            ]
        })
        .collect()
}

fn through(from: Builtin, name: &str, position: Position, test: Option<Match>, comment: &str) -> Jump {
    let mut rule = Rule::jump(chain(name));
    if let Some(test) = test {
        rule = rule.when(test);
    }
    Jump { from, position, rule: rule.comment(comment) }
}

fn nat(facts: &Facts, family: Family) -> Ruleset {
    if !facts.egress {
        return Ruleset::default();
    }
    let pods = |flag| Match::set(set_name(POD_SUBNETS, family), &[flag]);
    let mut rules = Vec::new();
    for net in facts.exclude.iter().filter(|net| Family::of(net.addr()) == family) {
        rules.push(
            Rule::new(Target::Return)
                .when(Match::Destination(net.trunc()))
                .comment("these see addresses of pods (--pod-egress-exclude-cidrs)"),
        );
    }
    rules.push(
        Rule::new(Target::Masquerade { random_fully: true })
            .unless(pods(Direction::Destination))
            .unless(Match::set(set_name(NODE_IPS, family), &[Direction::Destination]))
            .comment("masquerade traffic of pods that leaves the cluster"),
    );
    let jump = through(
        Builtin::Postrouting,
        EGRESS,
        Position::Last,
        Some(pods(Direction::Source)),
        "traffic of pods on its way out",
    );
    Ruleset { chains: BTreeMap::from([(chain(EGRESS), rules)]), jumps: vec![jump] }
}

fn filter(facts: &Facts) -> Ruleset {
    let accept = |test: Match, comment: &str| Rule::new(Target::Accept).when(test).comment(comment);
    let mut rules = vec![
        accept(Match::InInterface(BRIDGE.to_owned()), "allow outbound traffic from pods"),
        accept(Match::OutInterface(BRIDGE.to_owned()), "allow inbound traffic to pods"),
    ];
    for link in &facts.node_links {
        rules.push(accept(
            Match::OutInterface(link.clone()),
            "allow outbound node port traffic on node interface with which node ip is associated",
        ));
    }
    // Behind policies, which are first, and behind what the host's own rules forbid.
    let jump = through(Builtin::Forward, PODS, Position::Last, None, "forward for pods and node ports");
    Ruleset { chains: BTreeMap::from([(chain(PODS), rules)]), jumps: vec![jump] }
}

fn mangle(facts: &Facts) -> Ruleset {
    if !facts.overlay {
        return Ruleset::default();
    }
    let rules = vec![
        Rule::new(Target::TcpMss(Mss::ClampToPmtu))
            .when(Match::Protocol(Protocol::TCP))
            .when(Match::TcpFlags { mask: TcpFlags(TcpFlags::SYN.0 | TcpFlags::RST.0), set: TcpFlags::SYN })
            .comment("segments no larger than the tunnel carries"),
    ];
    let jump = through(
        Builtin::Forward,
        TUNNELS,
        Position::Last,
        Some(Match::OutInterface("tun-+".to_owned())),
        "traffic into tunnels to other nodes",
    );
    Ruleset { chains: BTreeMap::from([(chain(TUNNELS), rules)]), jumps: vec![jump] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            egress: true,
            exclude: vec!["198.51.100.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            node_links: vec!["eth0".to_owned()],
            overlay: true,
        }
    }

    fn lines(rules: &Rules, family: Family, table: TableName) -> Vec<String> {
        let ruleset = &rules[&(family, table)];
        let jumps = ruleset.jumps.iter().map(|jump| format!("{:?} {}", jump.from, jump.rule.render(family)));
        jumps.chain(ruleset.chains.values().flatten().map(|rule| rule.render(family))).collect()
    }

    #[test]
    fn only_what_leaves_the_cluster_is_masqueraded() {
        let rules = rules(&facts(), &Family::BOTH);
        let nat = lines(&rules, Family::V4, TableName::Nat);
        assert_eq!(nat.len(), 3, "{nat:?}");
        assert!(
            nat[0].starts_with("Postrouting") && nat[0].contains("--match-set kube-router-pod-subnets src")
        );
        assert!(nat[1].contains("-d 198.51.100.0/24") && nat[1].contains("-j RETURN"));
        for part in [
            "! --match-set kube-router-pod-subnets dst",
            "! --match-set kube-router-node-ips dst",
            "MASQUERADE --random-fully",
        ] {
            assert!(nat[2].contains(part), "{part} is missing in {}", nat[2]);
        }
        let nat = lines(&rules, Family::V6, TableName::Nat);
        assert!(nat[1].contains("2001:db8::/32") && nat[2].contains("inet6:kube-router-node-ips"));
        assert!(lines(&rules, Family::V6, TableName::Mangle)[0].contains("-o tun-+"));
        assert_eq!(lines(&rules, Family::V4, TableName::Filter).len(), 4);
    }

    #[test]
    fn what_is_switched_off_leaves_empty_tables() {
        let rules = rules(&Facts::default(), &[Family::V4]);
        assert_eq!(rules[&(Family::V4, TableName::Nat)], Ruleset::default());
        assert_eq!(rules[&(Family::V4, TableName::Mangle)], Ruleset::default());
        assert_eq!(rules[&(Family::V4, TableName::Filter)].chains.len(), 1);
    }

    #[test]
    fn sets_are_by_family() {
        let pods: Vec<IpNet> = ["10.1.0.0/24", "fd10::/64"].map(|net| net.parse().unwrap()).to_vec();
        let nodes: Vec<IpAddr> =
            ["192.168.0.1", "fd00::1", "192.168.0.2"].map(|ip| ip.parse().unwrap()).to_vec();
        let sets = sets(&Family::BOTH, &pods, &nodes);
        let count = |name: SetName| sets[&name].entries().len();
        assert_eq!(set_names().into_iter().map(count).collect::<Vec<_>>(), [1, 2, 1, 1]);
    }

    #[test]
    fn names_of_no_other_room_are_taken() {
        for name in CHAINS {
            let others = ferroute_policy::CHAIN_PREFIXES.iter().chain(&crate::proxy::rules::CHAINS);
            for other in others {
                assert!(!name.starts_with(other) && !other.starts_with(name), "{name} {other}");
            }
        }
        for name in [POD_SUBNETS, NODE_IPS] {
            assert!(ferroute_policy::SET_PREFIXES.iter().all(|other| !name.starts_with(other)), "{name}");
        }
    }
}
