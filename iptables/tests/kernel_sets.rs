//! ipsets on the running kernel, each test in a network namespace of its own.
//!
//! Needs root and a kernel with ip_set, hash types included; a test without them fails and says so.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::IpAddr;

use ferroute_iptables::ipset::{
    Change, Entry, Extra, Handle, Options, Refusal, Set, SetType, Sets, apply_to, diff, diff_entries,
};
use ferroute_iptables::{Family, Protocol, SetName};
use nix::sched::{CloneFlags, unshare};

/// A handle in a new network namespace. Each test runs on a thread of its own, and a network namespace
/// belongs to the thread that made it.
fn handle() -> Handle {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
    Handle::open().expect("a kernel with ipsets")
}

fn name(text: &str) -> SetName {
    SetName::new(text).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn set(set_type: SetType, family: Family, options: Options, entries: &[(Entry, Extra)]) -> Set {
    let mut set = Set::new(set_type, family, options);
    for (entry, extra) in entries {
        set.insert(*entry, *extra).unwrap();
    }
    set
}

fn plain(entries: &[Entry]) -> Vec<(Entry, Extra)> {
    entries.iter().map(|entry| (*entry, Extra::default())).collect()
}

/// Applies and expects no refusal.
fn apply(handle: &mut Handle, changes: &[Change]) {
    assert_eq!(handle.apply(changes).unwrap(), []);
}

/// One set of each type and family, with what each can carry.
fn all_kinds() -> Sets {
    let marked = Options { skbinfo: true, ..Options::default() };
    let nomatch = Extra { nomatch: true, mark: None };
    let mut sets = Sets::new();
    for (family, prefix, a, b, wide, narrow) in [
        (Family::V4, "t-", "10.0.0.1", "10.0.0.2", "10.0.0.0/8", "10.1.0.0/16"),
        (Family::V6, "inet6:t-", "fd00::1", "fd00::2", "fd00::/8", "fd01::/16"),
    ] {
        let (a, b) = (ip(a), ip(b));
        let icmp = if family == Family::V4 { Protocol::ICMP } else { Protocol::ICMPV6 };
        let nets = [
            (Entry::Net(wide.parse().unwrap()), Extra::default()),
            (Entry::Net(narrow.parse().unwrap()), nomatch),
            (Entry::Net(a.into()), Extra { nomatch: false, ..Extra::default() }),
        ];
        let ports = [
            (Entry::IpPort(a, Protocol::TCP, 80), Extra::marked(0x4000_0001, 0x4000_3fff)),
            (Entry::IpPort(a, Protocol::UDP, 80), Extra::default()),
            (Entry::IpPort(b, Protocol::SCTP, 65535), Extra::marked(0, 0xff)),
            (Entry::IpPort(b, icmp, 0x0800), Extra::marked(u32::MAX, u32::MAX)),
        ];
        let pairs = plain(&[
            Entry::IpPortIp(a, Protocol::TCP, 80, b),
            Entry::IpPortIp(a, Protocol::TCP, 80, a),
            Entry::IpPortIp(b, Protocol::SCTP, 1, a),
        ]);
        let port_nets = [
            (Entry::IpPortNet(a, Protocol::TCP, 80, wide.parse().unwrap()), Extra::default()),
            (Entry::IpPortNet(a, Protocol::TCP, 80, narrow.parse().unwrap()), nomatch),
        ];
        let timeout = Options { timeout: Some(0), maxelem: 65536, ..Options::default() };
        let name = |text: &str| name(&format!("{prefix}{text}"));
        sets.insert(name("ip"), set(SetType::HashIp, family, timeout, &plain(&[Entry::Ip(a), Entry::Ip(b)])));
        sets.insert(name("net"), set(SetType::HashNet, family, Options::default(), &nets));
        sets.insert(name("port"), set(SetType::HashIpPort, family, marked, &ports));
        sets.insert(name("pair"), set(SetType::HashIpPortIp, family, Options::default(), &pairs));
        sets.insert(name("portnet"), set(SetType::HashIpPortNet, family, Options::default(), &port_nets));
        let host = |ip| ipnet::IpNet::from(ip);
        let net_nets =
            plain(&[Entry::NetNet(host(a), host(a)), Entry::NetNet(wide.parse().unwrap(), host(b))]);
        sets.insert(name("nets"), set(SetType::HashNetNet, family, Options::default(), &net_nets));
        sets.insert(name("empty"), set(SetType::HashIp, family, Options::default(), &[]));
    }
    sets
}

const OURS: [&str; 2] = ["t-", "inet6:t-"];

#[test]
fn every_kind_of_set_reads_back_as_written() {
    let mut handle = handle();
    let wanted = all_kinds();
    apply(&mut handle, &diff(&Sets::new(), &wanted).into_changes());
    let found = handle.read(&OURS).unwrap();
    assert_eq!(found, wanted);
    assert!(diff(&found, &wanted).is_empty());

    // And back to nothing, strangers apart.
    let stranger = Sets::from([(name("other"), set(SetType::HashIp, Family::V4, Options::default(), &[]))]);
    apply(&mut handle, &diff(&Sets::new(), &stranger).into_changes());
    let found = handle.read(&OURS).unwrap();
    apply(&mut handle, &diff(&found, &Sets::new()).into_changes());
    assert_eq!(handle.read(&OURS).unwrap(), Sets::new());
    assert_eq!(handle.read(&[""]).unwrap(), stranger);
}

#[test]
fn one_entry_costs_one_message() {
    let mut handle = handle();
    let mut actual = all_kinds();
    apply(&mut handle, &diff(&Sets::new(), &actual).into_changes());
    let mut wanted = actual.clone();
    let entry = Entry::IpPort(ip("10.9.9.9"), Protocol::TCP, 1);
    wanted.get_mut(&name("t-port")).unwrap().insert(entry, Extra::default()).unwrap();
    let changes = diff_entries(&actual, &wanted, [(name("t-port"), entry)]).changes;
    let (messages, sends) = (handle.messages_sent(), handle.sends());
    apply(&mut handle, &changes);
    assert_eq!((handle.messages_sent() - messages, handle.sends() - sends), (1, 1));

    // A changed mark is one message too, and one that comes with a removal two, in one send.
    apply_to(&mut actual, &changes);
    let port = wanted.get_mut(&name("t-port")).unwrap();
    port.insert(entry, Extra::marked(7, 7)).unwrap();
    let gone = Entry::IpPort(ip("10.0.0.1"), Protocol::UDP, 80);
    port.remove(&gone);
    let keys = [(name("t-port"), entry), (name("t-port"), gone)];
    let changes = diff_entries(&actual, &wanted, keys).changes;
    let (messages, sends) = (handle.messages_sent(), handle.sends());
    apply(&mut handle, &changes);
    assert_eq!((handle.messages_sent() - messages, handle.sends() - sends), (2, 1));
    assert_eq!(handle.read(&OURS).unwrap(), wanted);
}

#[test]
fn fifty_thousand_entries_travel_in_few_messages() {
    let mut handle = handle();
    let entries: Vec<_> = (0..50_000u32)
        .map(|n| {
            Entry::IpPort(IpAddr::from((0x0a00_0000 + n / 4).to_be_bytes()), Protocol::TCP, (n % 4) as u16)
        })
        .collect();
    let wanted = Sets::from([(
        name("t-big"),
        set(SetType::HashIpPort, Family::V4, Options::default(), &plain(&entries)),
    )]);
    let messages = handle.messages_sent();
    apply(&mut handle, &diff(&Sets::new(), &wanted).into_changes());
    let taken = handle.messages_sent() - messages;
    assert!(taken <= 150, "{taken} messages");
    assert_eq!(handle.read(&OURS).unwrap(), wanted);
}

#[test]
fn other_options_are_swapped_in_and_leave_no_temporary_set() {
    let mut handle = handle();
    let entries = plain(&[Entry::Ip(ip("10.0.0.1"))]);
    let options = Options { timeout: Some(0), maxelem: 65536, ..Options::default() };
    let old = Sets::from([(name("t-s"), set(SetType::HashIp, Family::V4, options, &entries))]);
    apply(&mut handle, &diff(&Sets::new(), &old).into_changes());
    let mut new = old.clone();
    let more = plain(&[Entry::Ip(ip("10.0.0.1")), Entry::Ip(ip("10.0.0.3"))]);
    new.insert(name("t-s"), set(SetType::HashIp, Family::V4, Options::default(), &more));
    let difference = diff(&old, &new);
    assert!(matches!(difference.changes[..], [Change::Replace { .. }]));
    apply(&mut handle, &difference.changes);
    assert_eq!(handle.read(&[""]).unwrap(), new);
    assert_eq!(handle.headers().unwrap().len(), 1);

    // A replacement that does not fit leaves the old set as it was.
    let tiny = Options { maxelem: 1, ..Options::default() };
    let failed = handle
        .apply(&[Change::Replace { set: name("t-s"), with: set(SetType::HashIp, Family::V4, tiny, &more) }]);
    assert_eq!(failed.unwrap().len(), 1);
    assert_eq!(handle.read(&[""]).unwrap(), new);
}

#[test]
fn another_type_is_reported_apart_and_done_once_nothing_refers_to_it() {
    let mut handle = handle();
    let old = Sets::from([(name("t-s"), set(SetType::HashIp, Family::V4, Options::default(), &[]))]);
    apply(&mut handle, &diff(&Sets::new(), &old).into_changes());
    let nets = plain(&[Entry::Net("10.0.0.0/8".parse().unwrap())]);
    let new = Sets::from([(name("t-s"), set(SetType::HashNet, Family::V4, Options::default(), &nets))]);
    let difference = diff(&old, &new);
    assert!(difference.changes.is_empty());
    apply(&mut handle, &difference.retype[0].changes);
    assert_eq!(handle.read(&OURS).unwrap(), new);
}

#[test]
fn refusals_name_the_entry_and_the_rest_goes_on() {
    let mut handle = handle();
    let tiny = Options { maxelem: 3, ..Options::default() };
    let sets = Sets::from([(name("t-s"), set(SetType::HashIp, Family::V4, tiny, &[]))]);
    apply(&mut handle, &diff(&Sets::new(), &sets).into_changes());
    let entries = plain(&(1..=5).map(|n| Entry::Ip(IpAddr::from([10, 0, 0, n]))).collect::<Vec<_>>());
    let other = name("t-none");
    let failed = handle
        .apply(&[
            Change::Add { set: name("t-s"), entries },
            Change::Add { set: other, entries: plain(&[Entry::Ip(ip("10.0.0.1"))]) },
            Change::Delete {
                set: name("t-s"),
                entries: vec![Entry::Ip(ip("10.0.0.8")), Entry::Ip(ip("9.9.9.9"))],
            },
            Change::Destroy { set: other },
        ])
        .unwrap();
    let full: Vec<_> = failed.iter().filter(|f| f.refusal == Refusal::Full { maxelem: 3 }).collect();
    assert_eq!(full.len(), 2, "{failed:?}");
    assert!(full.iter().all(|f| f.change == 0 && f.entry.is_some()));
    assert_eq!(failed.len(), 3, "{failed:?}");
    assert_eq!((failed[2].set, &failed[2].refusal), (other, &Refusal::NoSet));
    assert_eq!(handle.read(&OURS).unwrap()[&name("t-s")].entries().len(), 3);
}

#[test]
fn swap_rename_and_flush_work_and_refuse_in_words() {
    let mut handle = handle();
    let one = plain(&[Entry::Ip(ip("10.0.0.1"))]);
    let sets = Sets::from([
        (name("t-a"), set(SetType::HashIp, Family::V4, Options::default(), &one)),
        (name("t-b"), set(SetType::HashIp, Family::V4, Options::default(), &[])),
        (name("t-n"), set(SetType::HashNet, Family::V4, Options::default(), &[])),
    ]);
    apply(&mut handle, &diff(&Sets::new(), &sets).into_changes());
    handle.swap(name("t-a"), name("t-b")).unwrap().unwrap();
    handle.rename(name("t-b"), name("t-c")).unwrap().unwrap();
    assert_eq!(handle.list(name("t-c")).unwrap().unwrap().entries().len(), 1);
    handle.flush(name("t-c")).unwrap().unwrap();
    assert_eq!(handle.list(name("t-c")).unwrap().unwrap().entries().len(), 0);
    assert_eq!(handle.list(name("t-b")).unwrap(), None);
    assert!(
        handle.swap(name("t-a"), name("t-n")).unwrap().unwrap_err().to_string().contains("different types")
    );
    assert_eq!(handle.flush(name("t-b")).unwrap(), Err(Refusal::NoSet));
    let network = Change::Create {
        set: name("t-a"),
        kind: sets[&name("t-n")].kind(),
        options: Options::default(),
        hashsize: 1024,
    };
    assert_eq!(handle.apply(&[network]).unwrap()[0].refusal, Refusal::Exists);
}
