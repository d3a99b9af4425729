//! What 10,000 EndpointSlices of ten endpoints cost. A process of its own, so that no other test's
//! memory is counted.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on shall say where

#[path = "cluster/server.rs"]
#[allow(dead_code)] // this test needs little of it
mod server;

use std::time::{Duration, Instant};

use ferroute::cluster::{Access, Cluster, Interests, Kind, Source, run};
use ferroute::report::Reporter;
use server::{Server, Streaming};

/// Resident memory of this process, test server included, in KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn a_hundred_thousand_endpoints_are_small() {
    let server = Server::start().await;
    server.script().generated_slices = 10_000;
    server.script().streaming = Streaming::Refused;
    let before = resident();
    let started = Instant::now();
    let cluster = Cluster::new();
    let access = Access { master: Some(server.url()), ..Access::default() };
    let task = tokio::spawn(run(
        Source::Api(access),
        cluster.clone(),
        Interests::service_proxy(),
        Reporter::new("n1"),
    ));
    while !cluster.read().has_listed(&[Kind::EndpointSlice]) {
        assert!(started.elapsed() < Duration::from_secs(60), "not listed in a minute");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let endpoints: usize = cluster
        .read()
        .slices
        .values()
        .flat_map(|slices| slices.values())
        .map(|slice| slice.endpoints.len())
        .sum();
    assert_eq!(endpoints, 100_000);
    let grown = resident() - before;
    println!(
        "100,000 endpoints in 10,000 slices: {grown} KiB of resident memory (server's pages included), {:?}",
        started.elapsed()
    );
    assert!(grown < 48 * 1024, "{grown} KiB");
    task.abort();
}
