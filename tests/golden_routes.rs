//! Golden folders of the route room: `cluster.yaml` and `flags.txt` in, what node `n1` says in BGP out.
//!
//! Compared with `bgp.txt` beside them. `FERROUTE_BLESS=1 cargo test --test golden_routes` writes the files
//! anew; look at the difference before committing it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use ferroute::cluster::{self, Cluster, Interests, Source};
use ferroute::config::{self, Command, Environment};
use ferroute::network::node_address::Addresses;
use ferroute::proxy::facts::Facts;
use ferroute::report::Reporter;
use ferroute::routes::Settings;
use ferroute::routes::advertise::{self, Announcements};
use ferroute::routes::identity::{Reflection, identify};
use ferroute::routes::peers::{Kind, external, peers};
use ferroute::routes::policies::{Wishes, policies, wishes};
use ferroute_bgp::policy::{Condition, PrefixSet};

/// Reads a folder the way the daemon does.
fn read(folder: &Path) -> Cluster {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cluster = Cluster::new();
    let (source, watched) = (Source::Manifests(folder.to_owned()), cluster.clone());
    runtime.block_on(async {
        let reader = tokio::spawn(async move {
            cluster::run(source, watched, Interests::routes(), Reporter::new("n1")).await
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while !cluster.read().has_listed(&Interests::ROUTES) {
            assert!(
                Instant::now() < deadline && !reader.is_finished(),
                "{} is never listed",
                folder.display()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        reader.abort();
    });
    cluster
}

fn settings(folder: &Path) -> Settings {
    let flags = std::fs::read_to_string(folder.join("flags.txt")).unwrap();
    let words = flags.split_whitespace().map(Into::into).collect();
    match config::parse(words, &Environment::default()) {
        Ok(Command::Run(config)) => config.routes.unwrap(),
        other => panic!("{other:?}"),
    }
}

fn render(cluster: &Cluster, settings: &Settings) -> String {
    let state = cluster.read();
    let node = &state.nodes[&settings.node_name];
    let facts = Facts::gather(&settings.services, &state, &[], true);
    let (identity, mut problems) = identify(settings, node, &Addresses::new());
    let identity = identity.unwrap();
    let (wishes, told) = wishes(node, &Wishes::default());
    problems.extend(told);
    let (external, told) = external(settings, node, None, &state.secrets, &[]);
    problems.extend(told);
    let reflects = matches!(identity.reflection, Reflection::Server(_));
    let policies = policies(settings, &wishes, reflects, external.iter().map(|peer| peer.address));
    let nodes = state.nodes.values().map(AsRef::as_ref);
    let (list, told) = peers(settings, &identity, node, nodes, &external, &policies);
    problems.extend(told.into_iter().map(|(_, problem)| problem));
    let mut announcements = Announcements::default();
    announcements.put_pods(&node.pod_cidrs);
    for (key, service) in state.services.iter().collect::<BTreeMap<_, _>>() {
        let wanted = advertise::addresses(settings, &facts, node, service, state.slices.get(key));
        announcements.put(key, wanted);
    }
    announcements.difference(|_| true);

    let mut text = String::from("# this node\n");
    let listen: Vec<String> = identity.listen.iter().map(ToString::to_string).collect();
    writeln!(text, "AS {} router id {} listens on {}", identity.asn, identity.router_id, listen.join(" "))
        .unwrap();
    writeln!(text, "{:?}", identity.reflection).unwrap();
    writeln!(text, "\n# peers").unwrap();
    for peer in &list {
        let config = &peer.config;
        let who = match &peer.kind {
            Kind::Internal { node } => format!("node {node}"),
            Kind::External => "external".to_owned(),
        };
        writeln!(
            text,
            "{} port {} AS {} ({who}) from {:?} hold {} {:?}{}{}",
            config.key,
            config.port,
            config.asn,
            config.source,
            config.hold_time,
            config.families,
            if config.routes.client { " client" } else { "" },
            if config.password.is_some() { " signed" } else { "" },
        )
        .unwrap();
    }
    writeln!(text, "\n# routes").unwrap();
    for (prefix, tag) in announcements.announced() {
        let next_hop = advertise::route(prefix, tag, &facts).attributes.next_hop;
        writeln!(text, "{prefix} {tag:?} via {next_hop}").unwrap();
    }
    for (name, policy) in [
        ("import from all", &policies.external_import),
        ("export to nodes", &policies.internal_export),
        ("export to external peers", &policies.external_export),
    ] {
        writeln!(text, "\n# {name}").unwrap();
        for statement in &policy.statements {
            let disposition = statement.disposition.map_or("go on".to_owned(), |is| format!("{is:?}"));
            let conditions: Vec<String> = statement.conditions.iter().map(words).collect();
            let (name, all) = (&statement.name, conditions.join(" and "));
            writeln!(text, "{name}: {all} {:?} {disposition}", statement.actions).unwrap();
        }
        writeln!(text, "otherwise {:?}", policy.otherwise).unwrap();
    }
    writeln!(text, "\n# problems").unwrap();
    for problem in &problems {
        writeln!(text, "{}: {}", problem.reason, problem.message).unwrap();
    }
    text
}

/// A condition; members of sets are in no order of their own.
fn words(condition: &Condition) -> String {
    let sorted = |set: &PrefixSet| {
        let mut ranges: Vec<String> = set.ranges().map(|range| range.to_string()).collect();
        ranges.sort();
        ranges.join(", ")
    };
    match condition {
        Condition::Prefix(set) => format!("prefix in {}", sorted(set)),
        Condition::LearnedFrom(peers) => format!("learned from {}", sorted(&peers.addresses)),
        Condition::Not(condition) => format!("not {}", words(condition)),
        other => format!("{other:?}"),
    }
}

fn check(case: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    let actual = render(&read(&folder), &settings(&folder));
    assert!(!actual.contains("c2VjcmV0"), "a secret shows");
    ferroute_kit::assert::golden(&folder.join("bgp.txt"), &actual);
}

#[test]
fn mesh_and_routers() {
    check("routes-mesh-and-routers");
}
