use super::*;
use crate::routes::fixture;

fn read(annotations: &[(&str, &str)], last: &[ExternalPeer]) -> (Vec<String>, Vec<String>) {
    read_with(annotations, &Secrets::default(), last)
}

fn read_with(
    annotations: &[(&str, &str)],
    secrets: &Secrets,
    last: &[ExternalPeer],
) -> (Vec<String>, Vec<String>) {
    let (peers, problems) = annotated(&fixture::node(1, annotations), secrets, last);
    let peers = peers.iter().map(|peer| {
        let password = if peer.password.is_some() { " signed" } else { "" };
        let source = peer.source.map_or(String::new(), |source| format!(" from {source}"));
        let bfd = if peer.bfd.is_some() { " bfd" } else { "" };
        format!("{}:{} AS{}{password}{source}{bfd}", peer.address, peer.port, peer.asn)
    });
    (peers.collect(), problems.into_iter().map(|problem| problem.message).collect())
}

#[test]
fn the_yaml_list_is_read() {
    let yaml = "
- remoteip: 192.0.2.1
  remoteasn: 65001
- remoteip: 2001:db8::1
  remoteasn: '4200000001'
  port: 1179
  password: c2VjcmV0
  localip: 2001:db8::9
  unknown: {deep: [1]}
";
    let (peers, problems) = read(&[("peers", yaml), ("peer.ips", "198.51.100.1")], &[]);
    assert_eq!(peers, ["192.0.2.1:179 AS65001", "2001:db8::1:1179 AS4200000001 signed from 2001:db8::9"]);
    assert_eq!(problems, Vec::<String>::new());
    for empty in ["[]", "", "~", " \n"] {
        assert_eq!(
            read(&[("peers", empty)], &[fixture::external("192.0.2.1", 1)]),
            (vec![], vec![]),
            "{empty:?}"
        );
    }
}

#[test]
fn bfd_is_asked_for_by_peer() {
    let of = |bfd: &str| {
        let list = format!("- {{remoteip: 192.0.2.1, remoteasn: 65001, bfd: {bfd}}}");
        let (peers, problems) = annotated(&fixture::node(1, &[("peers", &list)]), &Secrets::default(), &[]);
        assert_eq!(problems, [], "{bfd}");
        peers[0].bfd
    };
    assert_eq!(of("~"), None);
    assert_eq!(of("{enabled: false, port: 1}"), None);
    assert_eq!(of("{detection_multiplier: 5}"), None);
    assert_eq!(of("{enabled: true}"), Some(timers(1000, 1000, 3, 3784).unwrap()));
    assert_eq!(
        of("{enabled: true, port: 3784, detection_multiplier: 5, desired_min_tx_interval: 100, \
            required_min_rx_interval: 200}"),
        Some(timers(100, 200, 5, 3784).unwrap())
    );
}

#[test]
fn one_bad_peer_does_not_take_the_others_along() {
    let good = "\n- {remoteip: 192.0.2.9, remoteasn: 65009}";
    for (entry, words) in [
        ("{remoteip: 192.0.2.1, remoteasn: 0}", "(192.0.2.1) is left out: AS 0 is reserved"),
        ("{remoteip: 192.0.2.1, remoteasn: 23456}", "AS 23456 is reserved"),
        ("{remoteip: 192.0.2.1, remoteasn: -1}", "\"-1\" is no AS number"),
        ("{remoteip: 192.0.2.1}", "it has no AS number (remoteasn)"),
        ("{remoteasn: 65001}", "it has no address (remoteip)"),
        ("{remoteip: router7, remoteasn: 65001}", "\"router7\" is no IP address"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, port: 0}", "\"0\" is no port"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, password: 'sec ret'}", "password is not base64"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, password: 12345}", "password is no text; put it in quotes"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, localip: '::1'}", "::1 is not of the peer's family"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, bfd: true}", "bfd: write enabled: true"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, bfd: {enabled: 7}}", "bfd: enabled is true or false"),
        ("{remoteip: 192.0.2.1, remoteasn: 65001, bfd: {enabled: true, port: 3785}}", "bfd: port 3785"),
        (
            "{remoteip: 192.0.2.1, remoteasn: 65001, bfd: {enabled: true, detection_multiplier: 256}}",
            "multiplier 256 is above 255",
        ),
        (
            "{remoteip: 192.0.2.1, remoteasn: 65001, bfd: {enabled: true, desired_min_tx_interval: 0}}",
            "BFD transmit interval 0ns",
        ),
        ("17", "write remoteip: and remoteasn:"),
    ] {
        let (peers, problems) = read(&[("peers", &format!("- {entry}{good}"))], &[]);
        assert_eq!(peers, ["192.0.2.9:179 AS65009"], "{entry}");
        assert_eq!(problems.len(), 1, "{entry}: {problems:?}");
        let problem = &problems[0];
        assert!(problem.contains(words) && problem.contains("Node n1: peer 1"), "{entry}: {problem}");
        assert!(!problem.contains("sec ret") && !problem.contains("12345"), "{problem}");
    }
    // One that was good before stays as it was.
    let last = [fixture::external("192.0.2.1", 65001)];
    let (peers, problems) =
        read(&[("peers", &format!("- {{remoteip: 192.0.2.1, remoteasn: 0}}{good}"))], &last);
    assert_eq!(peers, ["192.0.2.1:179 AS65001", "192.0.2.9:179 AS65009"]);
    assert!(problems[0].contains("stays as it was"), "{problems:?}");
}

#[test]
fn an_unreadable_list_keeps_all_and_quotes_no_secret() {
    let last = [fixture::external("192.0.2.1", 65001)];
    for text in ["- remoteip: 192.0.2.1\n  password: hunter2: [", "remoteip: 1\npassword: hunter2", "hunter2"]
    {
        let (peers, problems) = read(&[("peers", text)], &last);
        assert_eq!(peers, ["192.0.2.1:179 AS65001"], "{text}");
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("kube-router.io/peers of Node n1: line "), "{problems:?}");
        assert!(!problems[0].contains("hunter2"), "{problems:?}");
    }
}

#[test]
fn the_older_annotations_are_read() {
    let both = [("peer.ips", "192.0.2.1, 2001:db8::1"), ("peer.asns", "65001,65002")];
    assert_eq!(read(&both, &[]).0, ["192.0.2.1:179 AS65001", "2001:db8::1:179 AS65002"]);
    let mut all = both.to_vec();
    all.extend([
        ("peer.ports", "1179,179"),
        ("peer.passwords", ",c2VjcmV0"),
        ("peer.localips", "192.0.2.7,"),
    ]);
    let (peers, problems) = read(&all, &[]);
    assert_eq!(peers, ["192.0.2.1:1179 AS65001 from 192.0.2.7", "2001:db8::1:179 AS65002 signed"]);
    assert_eq!(problems, Vec::<String>::new());
    let last = [fixture::external("192.0.2.7", 65007)];
    for (name, text) in [
        ("peer.asns", "65001"),
        ("peer.ports", "179"),
        ("peer.passwords", "c2VjcmV0"),
        ("peer.localips", "192.0.2.7"),
    ] {
        let mut wrong = both.to_vec();
        wrong.retain(|(known, _)| *known != name);
        wrong.push((name, text));
        let (peers, problems) = read(&wrong, &last);
        assert_eq!(peers, ["192.0.2.7:179 AS65007"], "{name}");
        assert!(problems[0].contains(name) && problems[0].contains("1 items for the 2"), "{problems:?}");
    }
    let (peers, problems) = read(&[("peer.ips", "192.0.2.1,192.0.2.2"), ("peer.asns", "64000,65002")], &[]);
    assert_eq!(peers, ["192.0.2.2:179 AS65002"]);
    assert!(problems[0].contains("AS 64000 is reserved"), "{problems:?}");
}

#[test]
fn secrets_of_a_file() {
    assert_eq!(passwords("").unwrap(), []);
    assert_eq!(passwords("\n").unwrap(), []);
    let list = passwords("c2VjcmV0,,cHc=\n").unwrap();
    assert_eq!(list.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(passwords("cHc=,hunter2").unwrap_err(), "item 2 is not base64");
    let long = STANDARD.encode([7; 81]);
    assert_eq!(passwords(&long).unwrap_err(), "item 1 a TCP MD5 password has 1 to 80 bytes, this one has 81");
    assert_eq!(format!("{:?}", list[0]), "Some(Password(****))");
}

proptest::proptest! {
    #[test]
    fn no_annotation_panics(list in "\\PC{0,40}", ips in "[0-9.,:a ]{0,20}", asns in "[0-9, ]{0,20}") {
        read(&[("peers", &list)], &[]);
        read(&[("peer.ips", &ips), ("peer.asns", &asns), ("peer.ports", &asns)], &[]);
    }
}

fn secrets(known: &[(&str, Knowledge)]) -> Secrets {
    let known = known.iter().map(|(name, what)| (ObjectKey::new("kube-system", *name), what.clone()));
    Secrets { namespace: "kube-system".into(), known: known.collect(), complete: false }
}

fn present(key: &str, value: &[u8]) -> Knowledge {
    let values = std::collections::BTreeMap::from([(key.into(), Some(value.into()))]);
    Knowledge::Present(std::sync::Arc::new(crate::cluster::secret::Secret::new(values)))
}

#[test]
fn a_secret_gives_the_password_and_without_one_nobody_is_dialled() {
    let yaml = "
- {remoteip: 192.0.2.1, remoteasn: 65001, passwordSecret: {name: tor}}
- {remoteip: 192.0.2.2, remoteasn: 65002, passwordSecret: {name: tor, key: second, namespace: kube-system}}
- {remoteip: 192.0.2.3, remoteasn: 65003}
";
    let node = fixture::node(1, &[("peers", yaml)]);
    assert_eq!(super::secrets(&node, "kube-system"), BTreeSet::from([ObjectKey::new("kube-system", "tor")]));
    // Before the first answer nothing is told; then what is missing is.
    let open = "192.0.2.3:179 AS65003";
    let read = |secrets: &Secrets, last: &[ExternalPeer]| read_with(&[("peers", yaml)], secrets, last);
    assert_eq!(read(&secrets(&[]), &[]), (vec![open.to_owned()], vec![]));
    let (peers, told) = read(&secrets(&[("tor", Knowledge::Missing)]), &[]);
    assert_eq!(peers, [open]);
    assert!(
        told[0].contains(
            "no password for 192.0.2.1, which is not dialled without one: there is no Secret kube-system/tor"
        ),
        "{told:?}"
    );
    assert_eq!(told.len(), 2);
    let (_, told) = read(&secrets(&[("tor", Knowledge::Unreadable("forbidden".into()))]), &[]);
    assert!(told[1].ends_with("Secret kube-system/tor cannot be read: forbidden"), "{told:?}");
    // Files end in a newline.
    let there = secrets(&[("tor", present("password", b"hunter2\n"))]);
    let (peers, told) = annotated(&node, &there, &[]);
    assert_eq!(peers[0].password, Some(Password::new(b"hunter2").unwrap()));
    assert_eq!(peers.len(), 2);
    assert_eq!(told.len(), 1);
    assert!(
        told[0].message.ends_with("Secret kube-system/tor: it has no key second, only [password]"),
        "{told:?}"
    );
    assert_eq!(told[0].reason, "PasswordMissing");
    assert!(!format!("{peers:?}{told:?}").contains("hunter2"));
    // What was known stays in use, whatever becomes of the Secret or of the list.
    for gone in [Knowledge::Missing, Knowledge::Unreadable("forbidden".into()), present("password", b"")] {
        let (after, told) = annotated(&node, &secrets(&[("tor", gone)]), &peers);
        assert_eq!(after[0], peers[0]);
        assert!(told[0].message.contains("which keeps the password it had"), "{told:?}");
    }
    assert_eq!(annotated(&node, &secrets(&[]), &peers).0[0], peers[0]);
    let broken = fixture::node(1, &[("peers", "[")]);
    let changed = secrets(&[("tor", present("password", b"other"))]);
    assert_eq!(annotated(&broken, &changed, &peers).0[0].password, Some(Password::new(b"other").unwrap()));
}

#[test]
fn a_reference_is_whole_and_to_the_own_namespace() {
    for (secret, words) in [
        ("tor", "passwordSecret: write {name: NAME}"),
        ("{key: password}", "passwordSecret: it has no name"),
        ("{name: 7}", "name is no text; put it in quotes"),
        ("{name: tor, namespace: shop}", "namespace \"shop\": Secrets are read in \"kube-system\" only"),
        ("{name: tor}, password: c2VjcmV0", "it has both password and passwordSecret"),
    ] {
        let list = format!("[{{remoteip: 192.0.2.1, remoteasn: 65001, passwordSecret: {secret}}}]");
        let (peers, told) = read_with(&[("peers", &list)], &secrets(&[]), &[]);
        assert_eq!(peers, Vec::<String>::new(), "{secret}");
        assert!(told[0].contains(words), "{secret}: {told:?}");
    }
}
