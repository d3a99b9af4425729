//! Rules that look at IPVS connections. Needs root, legacy iptables and a kernel with xt_ipvs:
//! where this machine has none, run it with `scripts/lab`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use ferroute_iptables::{
    Builtin, ChainName, Command, Family, Ipvs, IpvsDirection, IpvsMethod, Jump, Match, Ours, Position,
    Protocol, Rule, Ruleset, TableName, Target, Variant,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

fn rules(family: Family) -> Vec<Rule> {
    let (vip, net, node) = match family {
        Family::V4 => ("10.96.0.1/32", "10.96.0.0/16", "192.0.2.1"),
        Family::V6 => ("fd00::1/128", "fd00::/64", "2001:db8::1"),
    };
    let (vip, net) = (vip.parse().unwrap(), net.parse().unwrap());
    let original = || Match::Ipvs(Ipvs::Direction(IpvsDirection::Original));
    vec![
        Rule::new(Target::Snat { to: node.parse().unwrap(), random_fully: true })
            .when(Match::Ipvs(Ipvs::Any))
            .when(original())
            .when(Match::Ipvs(Ipvs::Method(IpvsMethod::Masq))),
        Rule::new(Target::Return)
            .when(Match::Ipvs(Ipvs::Address(vip)))
            .when(Match::Ipvs(Ipvs::Port(80)))
            .when(Match::Ipvs(Ipvs::Protocol(Protocol::SCTP))),
        Rule::new(Target::Return)
            .unless(Match::Ipvs(Ipvs::Address(net)))
            .unless(Match::Ipvs(Ipvs::Port(80)))
            .unless(Match::Ipvs(Ipvs::Method(IpvsMethod::Ipip)))
            .when(Match::Ipvs(Ipvs::Direction(IpvsDirection::Reply))),
        Rule::new(Target::Return).unless(Match::Ipvs(Ipvs::Any)),
        Rule::new(Target::Masquerade { random_fully: true }).when(Match::Source(vip)).when(original()),
    ]
}

#[test]
fn rules_about_ipvs_are_seen_as_written() {
    for family in Family::BOTH {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces (needs root)");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("private mounts");
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs on /run");

        let command = Command::new(family, Variant::Legacy).expect("legacy iptables");
        let chain = ChainName::new("T-A").unwrap();
        let jump = Rule::jump(chain).when(Match::Ipvs(Ipvs::Direction(IpvsDirection::Original)));
        let wanted = Ruleset {
            chains: BTreeMap::from([(chain, rules(family))]),
            jumps: vec![Jump { from: Builtin::Postrouting, rule: jump, position: Position::Last }],
        };
        let ours = Ours::new(["T-"]);
        command.sync(TableName::Nat, &ours, &wanted).expect("a kernel with xt_ipvs (see scripts/lab)");
        assert_eq!(command.compare(TableName::Nat, &ours, &wanted).unwrap().document(TableName::Nat), "");
    }
}
