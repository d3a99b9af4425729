//! Golden folders: `cluster.yaml` in, what the kernel must hold out.
//!
//! `tests/golden/<case>/cluster.yaml` is read as `--manifests` reads it, on node `n1`, and compared with
//! `kernel.txt` beside it. `FERROUTE_BLESS=1 cargo test --test golden` writes the files anew; look at the
//! difference before committing it.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroute::cluster::{self, Cluster, Interests, Kind, Source};
use ferroute::proxy::desired::desired;
use ferroute::proxy::facts::Facts;
use ferroute::proxy::ledger::Ledger;
use ferroute::proxy::mirror::desired_routes;
use ferroute::proxy::rules;
use ferroute::proxy::settings::Settings;
use ferroute::report::Reporter;
use ferroute_iptables::Family;

fn settings() -> Settings {
    Settings {
        node_name: Arc::from("n1"),
        audit_period: Duration::from_secs(300),
        graceful_period: Some(Duration::from_secs(30)),
        hairpin_all: false,
        masquerade_all: false,
        node_port_on_all_addresses: false,
        firewall: true,
        excluded_cidrs: Vec::new(),
        strict_external_ips: true,
        external_ip_ranges: vec!["203.0.113.0/25".parse().unwrap()],
        load_balancer_ranges: vec!["203.0.113.128/25".parse().unwrap(), "2001:db8:aa::/64".parse().unwrap()],
        whole_ranges: Vec::new(),
        cluster_ip_ranges: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        cluster_ip_ranges_given: true,
        node_port_range: 30000..=32767,
        tcp_timeout: 0,
        tcp_fin_timeout: 0,
        udp_timeout: 0,
    }
}

/// Reads a folder the way the daemon does.
fn read(folder: &Path) -> Cluster {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cluster = Cluster::new();
    let subscription = cluster.subscribe();
    let (source, watched) = (Source::Manifests(folder.to_owned()), cluster.clone());
    runtime.block_on(async {
        let reader = tokio::spawn(async move {
            cluster::run(source, watched, Interests::service_proxy(), Reporter::new("n1")).await
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while !cluster.read().has_listed(&[Kind::Service, Kind::EndpointSlice, Kind::Node]) {
            assert!(
                Instant::now() < deadline && !reader.is_finished(),
                "{} is never listed",
                folder.display()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        reader.abort();
    });
    drop(subscription);
    cluster
}

/// What the kernel must hold, sorted, one object a line.
fn render(cluster: &Cluster, settings: &Settings) -> String {
    let state = cluster.read();
    let host = ["192.0.2.11".parse().unwrap(), "2001:db8::11".parse().unwrap()];
    let facts = Facts::gather(settings, &state, &host, true);
    let mut ledger = Ledger::new(&Family::BOTH);
    ledger.put_node(&facts);
    let services: BTreeMap<_, _> = state.services.iter().collect();
    for (key, service) in &services {
        let wanted = desired(service, state.slices.get(*key), &facts, settings, &BTreeSet::new());
        ledger.put(key, Some(wanted));
    }

    let mut text = String::new();
    let servers: BTreeMap<_, _> =
        ledger.servers().iter().filter(|(_, server)| !server.destinations.is_empty()).collect();
    writeln!(text, "# virtual servers").unwrap();
    for (key, server) in servers {
        let owner = ledger.owner(key).map(|owner| owner.to_string()).unwrap_or_default();
        write!(text, "{key} {}", server.scheduler).unwrap();
        if server.flags.bits() != 0 {
            write!(text, " flags {:#x} timeout {}", server.flags.bits(), server.timeout).unwrap();
        }
        writeln!(text, "  # {owner}").unwrap();
        for destination in &server.destinations {
            writeln!(text, "  -> {} weight {}", destination.key(), destination.weight).unwrap();
        }
    }
    writeln!(text, "\n# sets").unwrap();
    for (name, set) in ledger.sets() {
        for (entry, extra) in set.entries() {
            let mark = extra.mark.map(|mark| format!(" mark {:#x}", mark.value)).unwrap_or_default();
            writeln!(text, "{name} {entry}{mark}").unwrap();
        }
    }
    writeln!(text, "\n# routes").unwrap();
    for route in desired_routes(&ledger, &facts, 7).values() {
        writeln!(text, "{route}").unwrap();
    }
    writeln!(text, "\n# chains").unwrap();
    for ((family, table), ruleset) in rules::desired(settings, &facts, &Family::BOTH) {
        for jump in &ruleset.jumps {
            writeln!(text, "{family} {table} {} {}", jump.from.name(), jump.rule.render(family)).unwrap();
        }
        for (chain, rules) in &ruleset.chains {
            for rule in rules {
                writeln!(text, "{family} {table} {chain} {}", rule.render(family)).unwrap();
            }
        }
    }
    writeln!(text, "\n# problems").unwrap();
    for (key, service) in &services {
        for problem in service.problems.iter().chain(&ledger.problems(key)) {
            writeln!(text, "{key} {}: {}", problem.reason, problem.message).unwrap();
        }
    }
    text
}

fn check(case: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    let actual = render(&read(&folder), &settings());
    ferroute_kit::assert::golden(&folder.join("kernel.txt"), &actual);
}

#[test]
fn every_kind() {
    check("every-kind");
}

#[test]
fn local_policies() {
    check("local-policies");
}

#[test]
fn dual_stack() {
    check("dual-stack");
}

#[test]
fn guards() {
    check("guards");
}
