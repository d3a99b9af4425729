//! The judge agrees with the upstream suite.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use ferroute_oracle::cases::{self, Case};
use ferroute_oracle::{Judge, Packet};
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

/// Plays a case against the judge; what differs.
fn play(case: &Case) -> Vec<String> {
    let names = ["n1", "n2"];
    let nodes: Vec<Node> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            let addresses = json!([{"type": "InternalIP", "address": format!("10.10.0.1{at}")}]);
            let object = json!({"metadata": {"name": name}, "status": {"addresses": addresses}});
            serde_json::from_value(object).unwrap()
        })
        .collect();
    let members = cases::members(&names, |node, pod| {
        let ips = [format!("10.244.{node}.{}", pod + 2), format!("fd00:244:{node}::{}", pod + 2)];
        ips.iter().map(|ip| ip.parse().unwrap()).collect()
    });
    let mut cluster = cases::base(nodes, &members).unwrap();
    let mut wrong = Vec::new();
    for (number, step) in case.steps.iter().enumerate() {
        step.apply(&mut cluster, &members).unwrap();
        let judge = Judge::new(&cluster);
        let mut asked = 0;
        for expected in step.expectations(&members).unwrap() {
            for (&from, &to) in members[expected.from].addresses.iter().zip(&members[expected.to].addresses) {
                let packet = Packet { from, to, protocol: expected.protocol, port: expected.port };
                let verdict = judge.verdict(packet);
                if verdict.allowed != expected.allowed {
                    let (from, to) = (&members[expected.from], &members[expected.to]);
                    wrong.push(format!(
                        "step {number}: {}/{} -> {}/{} ({packet}): {verdict}",
                        from.namespace, from.name, to.namespace, to.name
                    ));
                }
                asked += 1;
            }
        }
        assert!(
            asked >= 162,
            "{}: step {number} expects something of every pair in both families",
            case.name
        );
    }
    wrong
}

#[test]
fn the_judge_agrees_with_every_case() {
    let cases = cases::all().unwrap();
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "no name twice");
    // test/e2e/network/netpol/network_policy.go has 42 cases, and three again by UDP and by SCTP.
    let upstream = names.iter().filter(|name| !name.starts_with("ours: ")).count();
    assert_eq!(upstream, 42 + 3 + 3);
    for case in &cases {
        assert_eq!(play(case), Vec::<String>::new(), "{}", case.name);
    }
}

/// A case that could not fail would prove nothing: each must tell the right matrix from the one that
/// another policy leads to.
#[test]
fn a_wrong_expectation_is_told() {
    let text = "name: wrong\nsteps:\n- apply:\n  - {kind: NetworkPolicy, metadata: {name: p, namespace: x}, \
                spec: {podSelector: {}}}\n  expect: {TCP 80: []}\n";
    let case: Case = serde_saphyr::from_str(text).unwrap();
    // 9 senders to 3 receivers but for themselves, in two families.
    assert_eq!(play(&case).len(), (9 * 3 - 3) * 2);
}

#[test]
fn steps_that_name_what_is_not_there_are_errors() {
    let members =
        cases::members(&["n1"], |_, pod| vec![IpAddr::from([10, 0, 0, u8::try_from(pod).unwrap()])]);
    for wrong in [
        "{name: w, steps: [{delete: [x/none], expect: {}}]}",
        "{name: w, steps: [{apply: [{kind: Pod, metadata: {name: q, namespace: x}}], expect: {}}]}",
        "{name: w, steps: [{apply: [{kind: Secret, metadata: {name: a}}], expect: {}}]}",
        "{name: w, steps: [{apply: [{kind: NetworkPolicy, metadata: {name: '{x/q 4}'}}], expect: {}}]}",
        "{name: w, steps: [{apply: [{kind: NetworkPolicy, metadata: {name: '{x/a 6}'}}], expect: {}}]}",
    ] {
        let case: Case = serde_saphyr::from_str(wrong).unwrap();
        let mut cluster = cases::base(Vec::new(), &members).unwrap();
        assert!(case.steps[0].apply(&mut cluster, &members).is_err(), "{wrong}");
    }
    for wrong in ["{TCP: []}", "{QUIC 80: []}", "{TCP 80: [maybe x/a -> x/b]}", "{TCP 80: [no x/a to x/b]}"] {
        let case: Case =
            serde_saphyr::from_str(&format!("{{name: w, steps: [{{expect: {wrong}}}]}}")).unwrap();
        assert!(case.steps[0].expectations(&members).is_err(), "{wrong}");
    }
}
