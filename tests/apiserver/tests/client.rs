//! The client library the agent uses, against this server.

// A test fails by panicking, in helpers too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeSet;

use ferroute_apiserver::{ApiServer, Fault, StreamingLists};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::json;
use support::SOON;

fn client(server: &ApiServer) -> Client {
    let mut config = Config::new(server.url().parse().unwrap());
    // Plain HTTP: no certificates are asked of the system.
    config.root_cert = Some(vec![]);
    Client::try_from(config).unwrap()
}

async fn follow(server: &ApiServer, config: watcher::Config) {
    let mut events = watcher(Api::<ConfigMap>::default_namespaced(client(server)), config).boxed();
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut expect = async |wanted: &[&str]| {
        let reach = async {
            loop {
                // Errors are what the faults cause; the watcher goes on by itself.
                match events.try_next().await {
                    Ok(Some(Event::Init)) => seen.clear(),
                    Ok(Some(Event::InitApply(o) | Event::Apply(o))) => drop(seen.insert(o.name_any())),
                    Ok(Some(Event::Delete(o))) => drop(seen.remove(&o.name_any())),
                    Ok(Some(Event::InitDone)) | Err(_) => {}
                    Ok(None) => panic!("the watcher ended"),
                }
                if seen.iter().map(String::as_str).eq(wanted.iter().copied()) {
                    return;
                }
            }
        };
        tokio::time::timeout(SOON, reach).await.unwrap_or_else(|_| panic!("never saw {wanted:?}"));
    };
    let create =
        |name: &str| server.create("configmaps", "default", json!({"metadata": {"name": name}})).unwrap();
    for name in ["a", "b", "c"] {
        create(name);
    }
    expect(&["a", "b", "c"]).await;
    server.delete("configmaps", "default", "b").unwrap();
    expect(&["a", "c"]).await;
    server.faults().drop_watches(true);
    create("d");
    expect(&["a", "c", "d"]).await;
    // The watch is lost, and so is the history it could resume from.
    server.faults().outage(true);
    create("e");
    server.delete("configmaps", "default", "a").unwrap();
    server.inflict(Fault::Compact { resource: None }).unwrap();
    let refused = |s: &ApiServer| std::net::TcpStream::connect(s.address()).is_err();
    server.wait_for("refused connections", SOON, refused).unwrap();
    server.faults().outage(false);
    expect(&["c", "d", "e"]).await;
}

#[tokio::test]
async fn a_watcher_follows_by_paged_lists() {
    let server = ApiServer::builder().start().unwrap();
    server.faults().streaming_lists(StreamingLists::Refused);
    follow(&server, watcher::Config::default().page_size(2)).await;
    // Two pages at first, and again after the outage.
    assert!(server.faults().served("list", "configmaps") >= 3);
}

#[tokio::test]
async fn a_watcher_follows_by_streaming_lists() {
    let server = ApiServer::builder().start().unwrap();
    follow(&server, watcher::Config::default().streaming_lists()).await;
    assert_eq!(server.faults().served("list", "configmaps"), 0);
    assert!(server.faults().served("watch", "configmaps") >= 3);
}
