//! Chains on the running kernel, in fresh network namespaces, with every variant that works there.
//!
//! Needs root, the iptables programs and their kernel parts; a test without them fails and says so.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::process::Command as Process;

use ferroute_iptables::ipset::{Handle, Options, Set, SetType, Sets, diff};
use ferroute_iptables::{
    AddressType, Builtin, ChainName, Command, Direction, Error, Family, Jump, Match, Mss, Ours, Per, Physdev,
    PortRange, Position, Protocol, Reason, RejectWith, Rule, Ruleset, SetName, State, TableName, Target,
    TcpFlags, Variant, remove,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use Direction::{Destination, Source};

/// A network namespace for this thread and the programs it starts, with a lock file of its own for
/// legacy iptables.
fn namespace() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces (needs root)");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs on /run");
}

/// The commands to test with: both variants where the kernel has them, each in a namespace of its own.
fn each(test: impl Fn(Command)) {
    let mut tested = 0;
    for family in Family::BOTH {
        for variant in [Variant::Nft, Variant::Legacy] {
            namespace();
            let command = Command::new(family, variant).expect("iptables in both variants");
            let detected = Command::detect(family, Some(variant)).expect("a variant that works");
            if detected.command.variant() == variant {
                test(command);
                tested += 1;
            } else {
                // Only nft may be missing from a kernel, and detection has to say so.
                assert_eq!(variant, Variant::Nft, "legacy iptables is missing: {:?}", detected.passed_over);
                assert!(detected.passed_over.iter().any(|reason| reason.starts_with("nft:")), "{detected:?}");
            }
        }
    }
    assert!(tested >= 2, "legacy iptables and ip6tables are needed");
}

fn shell(program: &str, arguments: &str) -> String {
    let output = Process::new(program).args(arguments.split_whitespace()).output().expect(program);
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn tool(command: &Command, verb: &str) -> String {
    let program = if command.family() == Family::V4 { "iptables" } else { "ip6tables" };
    format!("{program}-{}{verb}", command.variant())
}

fn chain(name: &str) -> ChainName {
    ChainName::new(name).unwrap()
}

fn set(name: &str) -> SetName {
    SetName::new(name).unwrap()
}

fn sets(family: Family) {
    let marked = Options { skbinfo: true, ..Options::default() };
    let sets = Sets::from([
        (set("t-ip"), Set::new(SetType::HashIp, family, Options::default())),
        (set("t-port"), Set::new(SetType::HashIpPort, family, marked)),
        (set("t-pair"), Set::new(SetType::HashIpPortIp, family, Options::default())),
    ]);
    let mut handle = Handle::open().expect("a kernel with ipsets");
    assert_eq!(handle.apply(&diff(&Sets::new(), &sets).into_changes()).unwrap(), []);
}

fn ours() -> Ours {
    Ours::new(["T-"])
}

/// Every kind of rule of the filter table.
fn filter_rules(family: Family) -> Vec<Rule> {
    let (net, host, icmp) = match family {
        Family::V4 => ("10.1.0.0/16", "10.1.2.3/32", 8),
        Family::V6 => ("fd01::/16", "fd01::abcd/128", 128),
    };
    let (net, host) = (net.parse().unwrap(), host.parse().unwrap());
    let tcp = || Match::Protocol(Protocol::TCP);
    let range = PortRange { first: 30000, last: 32767 };
    vec![
        Rule { conditions: Vec::new(), target: None },
        Rule::new(Target::Accept).when(Match::Source(net)).unless(Match::Destination(host)),
        Rule::new(Target::Drop)
            .when(Match::InInterface("eth0".into()))
            .unless(Match::OutInterface("veth+".into())),
        Rule::new(Target::Return).unless(tcp()),
        Rule::new(Target::Accept).when(Match::Protocol(Protocol::SCTP)).when(Match::Port(Destination, range)),
        Rule::new(Target::Accept)
            .when(Match::Port(Source, PortRange::one(53)))
            .when(Match::Protocol(Protocol::UDP)),
        Rule::new(Target::Accept)
            .when(tcp())
            .when(Match::Port(Source, PortRange { first: 1024, last: 65535 }))
            .unless(Match::Port(Destination, PortRange::one(80)))
            .when(Match::TcpFlags { mask: TcpFlags::SYN_RST, set: TcpFlags::SYN }),
        Rule::new(Target::Reject(RejectWith::TcpReset)).when(tcp()).comment("reset"),
        Rule::new(Target::Reject(RejectWith::PortUnreachable))
            .unless(Match::set(set("t-ip"), &[Destination])),
        Rule::new(Target::Reject(RejectWith::AdminProhibited)),
        Rule::new(Target::Reject(RejectWith::ProtocolUnreachable)).when(Match::Protocol(Protocol::SCTP)),
        Rule::new(Target::Accept)
            .when(Match::set(set("t-port"), &[Destination, Destination]))
            .when(Match::set(set("t-pair"), &[Source, Destination, Destination])),
        Rule::new(Target::Return)
            .when(Match::AddressType(Destination, AddressType::Local))
            .unless(Match::AddressType(Source, AddressType::Local))
            .when(tcp())
            .when(Match::Ports(Destination, vec![range, PortRange::one(22)])),
        Rule::new(Target::Accept).when(Match::State(vec![State::Related, State::Established])),
        Rule::new(Target::Drop).unless(Match::State(vec![State::New, State::Invalid, State::Untracked])),
        Rule::new(Target::Accept).when(Match::State(vec![State::Dnat, State::Snat])),
        Rule::new(Target::Accept).when(Match::Mark { value: 0x4000_0000, mask: 0x4000_0000 }),
        Rule::new(Target::Accept).unless(Match::Mark { value: 5, mask: u32::MAX }),
        Rule::new(Target::Accept).when(Match::Physdev(Physdev::IsBridged)),
        Rule::new(Target::Accept)
            .when(Match::Physdev(Physdev::In("eth1".into())))
            .unless(Match::Physdev(Physdev::Out("eth2".into()))),
        Rule::new(Target::Accept).when(Match::Physdev(Physdev::IsIn)).unless(Match::Physdev(Physdev::IsOut)),
        Rule::new(Target::Accept)
            .when(Match::Icmp { kind: icmp, code: None })
            .comment("allow icmp echo requests"),
        Rule::new(Target::Accept).when(Match::Icmp { kind: 3, code: Some(1) }),
        Rule::new(Target::Nflog { group: 100, prefix: "it's a \"prefix\" \\ ".into() }).when(Match::Limit {
            rate: 10,
            per: Per::Minute,
            burst: 10,
        }),
        Rule::new(Target::Nflog { group: 0, prefix: String::new() }),
        Rule::new(Target::Log { prefix: "-dropped: ".replace('-', "") }).when(Match::Limit {
            rate: 1,
            per: Per::Second,
            burst: 5,
        }),
        Rule::new(Target::Log { prefix: String::new() }).when(Match::Limit {
            rate: 2,
            per: Per::Day,
            burst: 1,
        }),
        Rule::jump(chain("T-B")).comment("it's mine: a \"quoted\" \\ $word, `tick` %s \u{e9}\u{4e16}"),
        Rule::new(Target::Goto(chain("T-B"))).comment(""),
        Rule::new(Target::Accept).comment("plain"),
        Rule::new(Target::Accept).comment("-t looks like an option"),
        Rule::new(Target::Accept).comment("--comment"),
        Rule::new(Target::Accept).comment("!"),
        Rule::new(Target::Accept).comment(&"x".repeat(400)),
        Rule::new(Target::Accept).comment("line\nbreak\ttab"),
        Rule::new(Target::Raw(vec!["REJECT".into(), "--reject-with".into(), "tcp-reset".into()])).when(tcp()),
        Rule::new(Target::Accept).when(Match::Raw(
            [
                "-m",
                "hashlimit",
                "--hashlimit-upto",
                "5/sec",
                "--hashlimit-burst",
                "5",
                "--hashlimit-name",
                "t",
            ]
            .map(String::from)
            .to_vec(),
        )),
    ]
}

fn other_tables(family: Family) -> Vec<(TableName, Vec<Rule>)> {
    let to = if family == Family::V4 { "192.0.2.1" } else { "2001:db8::1" }.parse().unwrap();
    let syn = || {
        Rule::new(Target::Accept)
            .when(Match::Protocol(Protocol::TCP))
            .when(Match::TcpFlags { mask: TcpFlags::SYN_RST, set: TcpFlags::SYN })
    };
    vec![
        (
            TableName::Nat,
            vec![
                Rule::new(Target::Snat { to, random_fully: true }),
                Rule::new(Target::Snat { to, random_fully: false }),
                Rule::new(Target::Masquerade { random_fully: true }),
                Rule::new(Target::Masquerade { random_fully: false }).when(Match::Mark { value: 0, mask: 1 }),
            ],
        ),
        (
            TableName::Mangle,
            vec![
                Rule::new(Target::Mark { value: 0x4000_0001, mask: 0x4000_3fff }),
                Rule::new(Target::Mark { value: 0, mask: u32::MAX }),
                Rule::new(Target::MapMark { set: set("t-port"), flags: vec![Destination, Destination] }),
                Rule { target: Some(Target::TcpMss(Mss::Set(1440))), ..syn() },
                Rule { target: Some(Target::TcpMss(Mss::ClampToPmtu)), ..syn() },
            ],
        ),
        (TableName::Raw, vec![Rule::new(Target::Raw(vec!["CT".into(), "--notrack".into()]))]),
    ]
}

#[test]
fn every_kind_of_rule_is_seen_as_written() {
    each(|command| {
        let family = command.family();
        sets(family);
        let jump = |from, rule| Jump { from, rule, position: Position::First };
        let filter = Ruleset {
            chains: BTreeMap::from([(chain("T-A"), filter_rules(family)), (chain("T-B"), Vec::new())]),
            jumps: vec![
                jump(Builtin::Input, Rule::jump(chain("T-A")).when(Match::set(set("t-ip"), &[Destination]))),
                jump(Builtin::Forward, Rule::jump(chain("T-A")).comment("a jump")),
            ],
        };
        let mut tables = vec![(TableName::Filter, filter)];
        for (table, rules) in other_tables(family) {
            let from = if table == TableName::Raw { Builtin::Prerouting } else { Builtin::Postrouting };
            tables.push((
                table,
                Ruleset {
                    chains: BTreeMap::from([(chain("T-A"), rules)]),
                    jumps: vec![jump(from, Rule::jump(chain("T-A")))],
                },
            ));
        }
        for (table, wanted) in &tables {
            let done = command.sync(*table, &ours(), wanted).unwrap();
            assert!(!done.is_empty());
            // No drift is seen where there is none.
            let again = command.compare(*table, &ours(), wanted).unwrap();
            assert_eq!(again.document(*table), "", "{} {table}", tool(&command, ""));
        }
    });
}

fn small() -> Ruleset {
    Ruleset {
        chains: BTreeMap::from([
            (chain("T-A"), vec![Rule::new(Target::Accept).comment("a"), Rule::jump(chain("T-B"))]),
            (chain("T-B"), vec![Rule::new(Target::Drop)]),
        ]),
        jumps: vec![
            Jump { from: Builtin::Input, rule: Rule::jump(chain("T-A")), position: Position::First },
            Jump { from: Builtin::Output, rule: Rule::jump(chain("T-B")), position: Position::Last },
        ],
    }
}

/// Chains and rules of the filter table without comments and counters.
fn listing(command: &Command) -> Vec<String> {
    let save = shell(&tool(command, "-save"), "-t filter");
    save.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
}

#[test]
fn strangers_are_left_alone_and_drift_is_repaired() {
    each(|command| {
        let iptables = tool(&command, "");
        for arguments in
            ["-N STRANGER", "-A STRANGER -p tcp -j DROP", "-A INPUT -j STRANGER", "-A FORWARD -j STRANGER"]
        {
            shell(&iptables, arguments);
        }
        let before = listing(&command);
        command.sync(TableName::Filter, &ours(), &small()).unwrap();
        let settled = listing(&command);
        assert_eq!(settled.iter().filter(|line| line.contains("STRANGER")).count(), 3);

        // Somebody gets in front, loses one of our rules and copies a jump.
        for arguments in
            ["-I INPUT 1 -p udp -j STRANGER", "-D T-B -j DROP", "-A INPUT -j T-A", "-D OUTPUT -j T-B"]
        {
            shell(&iptables, arguments);
        }
        let done = command.sync(TableName::Filter, &ours(), &small()).unwrap();
        assert_eq!(done.written, [chain("T-B")]);
        let mut expected = settled.clone();
        let at = expected.iter().position(|line| line == "-A INPUT -j T-A").unwrap() + 1;
        expected.insert(at, "-A INPUT -p udp -j STRANGER".into());
        assert_eq!(listing(&command), expected);
        assert!(command.sync(TableName::Filter, &ours(), &small()).unwrap().is_empty());

        // A chain that is no longer wanted goes with its jumps.
        let mut less = small();
        less.chains.remove(&chain("T-B"));
        less.chains.get_mut(&chain("T-A")).unwrap().pop();
        less.jumps.pop();
        let done = command.sync(TableName::Filter, &ours(), &less).unwrap();
        assert_eq!(done.deleted, [chain("T-B")]);

        shell(&iptables, "-D INPUT -p udp -j STRANGER");
        let told = remove(std::slice::from_ref(&command), &ours(), None, true);
        assert_eq!(told.removed.len(), 2, "{told:?}");
        let done = remove(std::slice::from_ref(&command), &ours(), None, false);
        assert_eq!(told, done);
        assert_eq!(listing(&command), before);
        assert_eq!(
            remove(std::slice::from_ref(&command), &ours(), None, false),
            ferroute_iptables::Removal::default()
        );
    });
}

#[test]
fn a_refused_document_changes_nothing_and_names_the_rule() {
    each(|command| {
        command.sync(TableName::Filter, &ours(), &small()).unwrap();
        let before = listing(&command);
        let mut wanted = small();
        let missing = Rule::new(Target::Accept).when(Match::set(set("t-none"), &[Source]));
        wanted.chains.get_mut(&chain("T-B")).unwrap().push(missing);
        let error = command.sync(TableName::Filter, &ours(), &wanted).unwrap_err();
        let Error::Failed { line, stderr, .. } = &error else { panic!("{error:?}") };
        assert_eq!(line.as_deref(), Some("-A T-B -m set --match-set t-none src -j ACCEPT"), "{stderr}");
        assert!(error.to_string().contains("t-none"), "{error}");
        assert_eq!(listing(&command), before);
    });
}

#[test]
fn tables_are_made_right_together_and_one_refused_keeps_none_back() {
    each(|command| {
        let mangle = Ruleset {
            chains: BTreeMap::from([(chain("T-M"), vec![Rule::new(Target::Accept)])]),
            jumps: vec![Jump {
                from: Builtin::Output,
                rule: Rule::jump(chain("T-M")),
                position: Position::First,
            }],
        };
        let good = [(TableName::Filter, small()), (TableName::Mangle, mangle.clone())];
        let done = command.sync_tables(&ours(), &good);
        assert!(done.iter().all(|plan| !plan.as_ref().unwrap().is_empty()), "{done:?}");
        let again = command.sync_tables(&ours(), &good);
        assert!(again.iter().all(|plan| plan.as_ref().unwrap().is_empty()), "{again:?}");

        let mut bad = small();
        let missing = Rule::new(Target::Accept).when(Match::set(set("t-none"), &[Source]));
        bad.chains.get_mut(&chain("T-B")).unwrap().push(missing);
        let mut more = mangle;
        more.chains.get_mut(&chain("T-M")).unwrap().push(Rule::new(Target::Drop));
        let before = listing(&command);
        let done =
            command.sync_tables(&ours(), &[(TableName::Filter, bad), (TableName::Mangle, more.clone())]);
        let [Err(Error::Failed { stderr, .. }), Ok(plan)] = done.as_slice() else { panic!("{done:?}") };
        assert!(stderr.contains("t-none"), "{stderr}");
        assert_eq!(plan.written, [chain("T-M")]);
        assert_eq!(listing(&command), before);
        assert!(command.compare(TableName::Mangle, &ours(), &more).unwrap().is_empty());
    });
}

#[test]
fn sets_and_chains_are_removed_in_order_and_a_set_in_use_is_told() {
    each(|command| {
        sets(command.family());
        let mut handle = Handle::open().unwrap();
        let rule = Rule::new(Target::Accept).when(Match::set(set("t-ip"), &[Source]));
        let wanted = Ruleset { chains: BTreeMap::from([(chain("T-A"), vec![rule])]), jumps: Vec::new() };
        command.sync(TableName::Filter, &ours(), &wanted).unwrap();
        let stuck = remove(&[], &ours(), Some((&mut handle, &["t-"])), false);
        assert_eq!(stuck.removed.len(), 2);
        assert!(stuck.failed[0].contains("in use"), "{stuck:?}");
        let done = remove(std::slice::from_ref(&command), &ours(), Some((&mut handle, &["t-"])), false);
        assert_eq!(done.removed.len(), 2, "{done:?}");
        assert_eq!(done.failed, Vec::<String>::new());
        assert!(handle.headers().unwrap().is_empty());
    });
}

#[test]
fn the_variant_is_the_hosts() {
    for family in Family::BOTH {
        namespace();
        let both = [Variant::Nft, Variant::Legacy];
        let works: Vec<Variant> = both
            .into_iter()
            .filter(|variant| Command::detect(family, Some(*variant)).unwrap().command.variant() == *variant)
            .collect();
        assert!(works.contains(&Variant::Legacy), "legacy iptables is needed");
        for variant in &works {
            namespace();
            let command = Command::new(family, *variant).unwrap();
            let iptables = tool(&command, "");
            shell(&iptables, "-A INPUT -p tcp -j ACCEPT");
            let detected = Command::detect(family, None).unwrap();
            assert_eq!(detected.command, command);
            assert_eq!(detected.mixed, None);
            if works.len() == 2 {
                assert_eq!(detected.reason, Reason::MoreRules);
            }
            // The kubelet's word counts more than the number of rules, and the rest is reported.
            for other in works.iter().filter(|other| *other != variant) {
                shell(&tool(&Command::new(family, *other).unwrap(), ""), "-t mangle -N KUBE-IPTABLES-HINT");
                let detected = Command::detect(family, None).unwrap();
                assert_eq!((detected.command.variant(), detected.reason), (*other, Reason::Kubelet));
                let mixed = detected.mixed.unwrap();
                assert_eq!((mixed.other, mixed.rules), (*variant, 1));
            }
        }
    }
}
