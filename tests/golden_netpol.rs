//! Golden folders of network policy: `cluster.yaml` in, the sets and rules of node `n1` out.
//!
//! `tests/golden/netpol-*/cluster.yaml` is read as `--manifests` reads it and compared with
//! `kernel.txt` beside it. `FERROUTE_BLESS=1 cargo test --test golden_netpol` writes the files anew;
//! look at the difference before committing it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use ferroute::cluster::{self, Cluster, Interests, Source};
use ferroute::netpol::{self, Services, Settings};
use ferroute::report::Reporter;
use ferroute_iptables::Family;
use ferroute_policy::UnknownPods;

fn settings() -> Settings {
    Settings {
        node_name: "n1".into(),
        audit_period: Duration::from_secs(300),
        unknown_pods: UnknownPods::Deny,
        services: Services::Own { guarded: true },
    }
}

/// Reads a folder the way the daemon does; what was told of its objects comes with it.
fn read(folder: &Path) -> (Cluster, Vec<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (cluster, reporter) = (Cluster::new(), Reporter::new("n1"));
    let (source, watched, told) = (Source::Manifests(folder.to_owned()), cluster.clone(), reporter.clone());
    runtime.block_on(async {
        let reader = tokio::spawn(async move {
            cluster::run(source, watched, Interests::network_policy("n1"), told).await
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while !cluster.read().has_listed(&Interests::NETWORK_POLICY) {
            assert!(
                Instant::now() < deadline && !reader.is_finished(),
                "{} is never listed",
                folder.display()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        reader.abort();
    });
    let mut problems: Vec<String> = reporter
        .current()
        .into_iter()
        .map(|p| format!("{} {}/{} {}: {}", p.kind, p.namespace, p.name, p.reason, p.message))
        .collect();
    problems.sort();
    (cluster, problems)
}

/// What the kernel must hold, sorted, one object a line.
fn render(folder: &Path, settings: &Settings) -> String {
    let (cluster, problems) = read(folder);
    let index = netpol::desired(settings, &cluster.read(), &Family::BOTH);
    let mut text = "# isolated\n".to_owned();
    let mut isolated = BTreeMap::new();
    for (direction, pod, policies) in index.isolated() {
        let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
        isolated.insert((pod.to_string(), direction.to_string()), names.join(", "));
    }
    for ((pod, direction), policies) in isolated {
        writeln!(text, "{pod} {direction}: {policies}").unwrap();
    }
    writeln!(text, "\n# sets").unwrap();
    for (name, set) in index.sets() {
        writeln!(text, "{name} {}", set.kind()).unwrap();
        for (entry, extra) in set.entries() {
            writeln!(text, "  {entry}{}", if extra.nomatch { " nomatch" } else { "" }).unwrap();
        }
    }
    for family in Family::BOTH {
        let ruleset = index.ruleset(family).unwrap();
        writeln!(text, "\n# {family} filter").unwrap();
        for jump in &ruleset.jumps {
            writeln!(text, "{} {}", jump.from.name(), jump.rule.render(family)).unwrap();
        }
        for (chain, rules) in &ruleset.chains {
            writeln!(text, "{chain}").unwrap();
            for rule in rules {
                writeln!(text, "  {}", rule.render(family)).unwrap();
            }
        }
    }
    writeln!(text, "\n# problems").unwrap();
    for problem in problems {
        writeln!(text, "{problem}").unwrap();
    }
    text
}

fn check(case: &str, settings: &Settings) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    let actual = render(&folder, settings);
    ferroute_kit::assert::golden(&folder.join("kernel.txt"), &actual);
}

/// Isolation by direction, defaults of `policyTypes`, empty lists, groups of policies.
#[test]
fn directions() {
    check("netpol-directions", &settings());
}

/// Every kind of peer and port, and those that cannot be read.
#[test]
fn peers_and_ports() {
    let foreign = Services::Foreign {
        cluster: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        external: vec!["203.0.113.0/24".parse().unwrap()],
        load_balancer: Vec::new(),
        node_ports: 30000..=32767,
    };
    check("netpol-peers-and-ports", &Settings { services: foreign, ..settings() });
}

/// Pods of other nodes, on the host's network, completed, without an address, outside the pod network.
#[test]
fn lifecycle() {
    check("netpol-lifecycle", &Settings { unknown_pods: UnknownPods::Allow, ..settings() });
}
