//! The watches against an API server that misbehaves on purpose.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on shall say where

mod server;

use std::time::Duration;

use ferroute::cluster::{Access, Cluster, Interests, Kind, ObjectKey, Source, State, run};
use ferroute::report::Reporter;
use serde_json::{Value, json};
use server::{Server, Streaming};

fn service(name: &str, address: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "uid": "u"},
        "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"port": 80}]}})
}

fn slice(name: &str, service: &str, address: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": [{"addresses": [address]}]})
}

/// A daemon's watches on a server; they end when dropped.
struct Watching {
    cluster: Cluster,
    reporter: Reporter,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn watch(server: &Server) -> Watching {
    let cluster = Cluster::new();
    let reporter = Reporter::new("n1");
    let access = Access { master: Some(server.url()), ..Access::default() };
    let (shared, said) = (cluster.clone(), reporter.clone());
    let task = tokio::spawn(async move {
        let interests = Interests { only_node: Some("n1".into()), ..Interests::service_proxy() };
        let ended = run(Source::Api(access), shared, interests, said).await;
        panic!("watches ended: {ended:?}");
    });
    Watching { cluster, reporter, task }
}

impl Watching {
    async fn until(&self, what: &str, condition: impl Fn(&State) -> bool) {
        for _ in 0..1500 {
            if condition(&self.cluster.read()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!(
            "not seen in 15 s: {what}: {:?} {:?}",
            names(&self.cluster.read()),
            self.cluster.watch_health().report()
        );
    }

    async fn listed(&self) {
        let all = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr];
        self.until("first lists", |state| state.has_listed(&all)).await;
    }
}

fn names(state: &State) -> Vec<String> {
    let mut names: Vec<String> = state.services.keys().map(|key| key.name.to_string()).collect();
    names.sort();
    names
}

fn address(state: &State, name: &str) -> String {
    state.services.get(&ObjectKey::new("shop", name)).map_or(String::new(), |s| s.cluster_ips[0].to_string())
}

#[tokio::test]
async fn lists_streams_and_follows() {
    let server = Server::start().await;
    server.put("services", service("a", "10.96.0.1"));
    server.put("endpointslices", slice("a-1", "a", "10.1.0.1"));
    server.put("endpointslices", slice("early", "later", "10.1.0.9"));
    server.put("nodes", json!({"metadata": {"name": "n1"}, "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}}));
    server.put(
        "servicecidrs",
        json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}}),
    );
    let watching = watch(&server);
    watching.listed().await;
    {
        let state = watching.cluster.read();
        assert_eq!(names(&state), ["a"]);
        assert_eq!(state.slices.len(), 2);
        assert_eq!(state.nodes["n1"].internal_ips.len(), 1);
        assert_eq!(state.service_cidrs.len(), 1);
    }
    assert!(watching.cluster.watch_health().all_listed());
    assert_eq!(server.count("sendInitialEvents=true"), 4, "one streaming list per kind");
    assert_eq!(server.count("labelSelector=%21service.kubernetes.io%2Fheadless"), 1);
    assert_eq!(server.count("fieldSelector=metadata.name%3Dn1"), 1);
    let subscription = watching.cluster.subscribe();
    subscription.wait(Duration::ZERO, Duration::ZERO);
    // Equal objects wake nobody; a slice of no Service neither.
    server.put("services", service("a", "10.96.0.1"));
    server.put("endpointslices", slice("early", "later", "10.1.0.8"));
    server.put("services", service("b", "10.96.0.2"));
    watching.until("b", |state| names(state) == ["a", "b"]).await;
    let dirty = subscription.wait(Duration::ZERO, Duration::ZERO);
    assert_eq!(dirty.services.iter().map(|key| &*key.name).collect::<Vec<_>>(), ["b"]);
    server.delete("services", service("a", "10.96.0.1"));
    watching.until("a gone", |state| names(state) == ["b"]).await;
    // A slice may move to another Service, or stop being ours.
    server.put("endpointslices", slice("a-1", "b", "10.1.0.1"));
    watching
        .until("moved", |state| {
            state.slices.contains_key(&ObjectKey::new("shop", "b"))
                && !state.slices.contains_key(&ObjectKey::new("shop", "a"))
        })
        .await;
}

#[tokio::test]
async fn pages_where_streaming_is_refused_or_ignored() {
    for streaming in [Streaming::Refused, Streaming::Ignored] {
        let server = Server::start().await;
        server.script().streaming = streaming;
        server.script().generated_slices = 1200;
        server.put("services", service("a", "10.96.0.1"));
        let watching = watch(&server);
        watching.listed().await;
        assert_eq!(names(&watching.cluster.read()), ["a"]);
        assert_eq!(watching.cluster.read().slices.len(), 1200);
        assert_eq!(server.count("headless&limit=500"), 3, "{:?}", server.script().requests);
        server.put("services", service("b", "10.96.0.2"));
        watching.until("b", |state| names(state) == ["a", "b"]).await;
    }
}

#[tokio::test]
async fn starts_while_the_server_is_down_and_survives_restarts() {
    let server = Server::reserved().await;
    server.put("services", service("a", "10.96.0.1"));
    let watching = watch(&server);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(watching.cluster.read().listed.is_empty());
    assert!(!watching.cluster.watch_health().all_listed());
    server.restart().await;
    watching.listed().await;
    server.stop();
    server.put("services", service("b", "10.96.0.2"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(names(&watching.cluster.read()), ["a"], "the last state stays");
    let lists = server.count("sendInitialEvents=true");
    server.restart().await;
    watching.until("resumed", |state| names(state) == ["a", "b"]).await;
    assert_eq!(server.count("sendInitialEvents=true"), lists, "a resumed watch lists nothing");
}

#[tokio::test]
async fn lists_again_after_a_gap_and_drops_what_went() {
    let server = Server::start().await;
    for (name, address) in [("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")] {
        server.put("services", service(name, address));
    }
    server.put("endpointslices", slice("b-1", "b", "10.1.0.1"));
    let watching = watch(&server);
    watching.listed().await;
    let subscription = watching.cluster.subscribe();
    subscription.wait(Duration::ZERO, Duration::ZERO);
    server.delete_silently("services", service("b", ""));
    server.delete_silently("endpointslices", slice("b-1", "b", ""));
    server.put_silently("services", service("c", "10.96.0.33"));
    server.compact();
    server.drop_watches();
    watching
        .until("relist", |state| {
            names(state) == ["a", "c"] && address(state, "c") == "10.96.0.33" && state.slices.is_empty()
        })
        .await;
    let dirty = subscription.wait(Duration::ZERO, Duration::ZERO);
    assert_eq!(
        dirty.services.iter().map(|key| &*key.name).collect::<Vec<_>>(),
        ["b", "c"],
        "what stayed equal wakes nobody"
    );
}

#[tokio::test]
async fn errors_are_waited_out() {
    let server = Server::start().await;
    server.script().faults.extend([500, 429, 503, 401, 500, 504, 429, 500]);
    server.put("services", service("a", "10.96.0.1"));
    let watching = watch(&server);
    watching.listed().await;
    server.script().faults.extend([500, 429, 503, 500]);
    server.drop_watches();
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.put("services", service("b", "10.96.0.2"));
    watching.until("b", |state| names(state) == ["a", "b"]).await;
    let errors: u64 = watching.cluster.watch_health().report().iter().map(|kind| kind.errors).sum();
    assert!(errors >= 12, "{errors}");
}

#[tokio::test]
async fn garbage_spares_the_others_and_the_last_good_state() {
    let server = Server::start().await;
    server.put("services", service("good", "10.96.0.1"));
    server.put("services", service("turns", "10.96.0.2"));
    server.put(
        "services",
        json!({"metadata": {"name": "bad", "namespace": "shop"}, "spec": {"clusterIP": ["x"], "ports": 7}}),
    );
    server.put(
        "services",
        json!({"metadata": {"name": "n".repeat(10_000), "namespace": "shop"}, "spec": null}),
    );
    server.put("services", json!({"metadata": null}));
    let watching = watch(&server);
    watching.listed().await;
    assert_eq!(names(&watching.cluster.read()), ["good", "turns"]);
    server.put(
        "services",
        json!({"metadata": {"name": "turns", "namespace": "shop"}, "spec": {"clusterIP": 5}}),
    );
    server.put("services", service("good", "10.96.0.11"));
    watching.until("good goes on", |state| address(state, "good") == "10.96.0.11").await;
    assert_eq!(address(&watching.cluster.read(), "turns"), "10.96.0.2");
    let reported: Vec<String> = watching.reporter.current().iter().map(|p| p.name.to_string()).collect();
    assert!(["bad", "turns"].iter().all(|name| reported.iter().any(|known| known == name)), "{reported:?}");
    // Lines that are no events, or events that cannot be.
    let lists = server
        .count("services?&watch=true&timeoutSeconds=240&allowWatchBookmarks=true&sendInitialEvents=true");
    server.put_silently("services", service("lost", "10.96.0.4"));
    server.say("services", "{\"type\":\"ADDED\",\"object\":{\"metadata\":");
    server.say("services", "nonsense");
    watching.until("lost event found by a list", |state| names(state).contains(&"lost".to_owned())).await;
    assert!(server.count("sendInitialEvents=true") > lists);
    server.put("services", service("turns", "10.96.0.22"));
    watching.until("turns is good again", |state| address(state, "turns") == "10.96.0.22").await;
    assert!(!watching.reporter.current().iter().any(|p| &*p.name == "turns"));
    assert!(server.count("POST /api/v1/namespaces/shop/events") >= 2);
}

#[tokio::test]
async fn servers_without_service_cidrs_count_as_listed() {
    for forbidden in [false, true] {
        let server = Server::start().await;
        if forbidden {
            server.script().forbidden.push("servicecidrs");
        } else {
            server.script().absent.push("servicecidrs");
        }
        let watching = watch(&server);
        watching.listed().await;
        assert!(watching.cluster.read().service_cidrs.is_empty());
        let asked: Vec<usize> = ["v1/", "v1beta1/"]
            .iter()
            .map(|version| server.count(&format!("networking.k8s.io/{version}servicecidrs")))
            .collect();
        assert_eq!(asked, if forbidden { [1, 0] } else { [1, 1] });
    }
}
