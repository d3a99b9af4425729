//! What `ferroute bgp` says on the nodes of a lab.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use ferroute_kit::assert::{eventually, eventually_equal};
use serde_json::Value;

use super::{Lab, PROGRAM, SESSION};

/// The JSON answer of `ferroute bgp WORDS...` on a node.
pub fn bgp(lab: &Lab, number: usize, words: &[&str]) -> Value {
    let socket = format!("--admin-socket={}", lab.admin_socket(lab.node(number)));
    let mut all = vec!["bgp"];
    all.extend(words);
    all.extend(["--output=json", &socket]);
    serde_json::from_str(&lab.node(number).exec(PROGRAM, &all).unwrap()).unwrap()
}

/// `address state flaps` of each neighbor of a node.
pub fn sessions(lab: &Lab, number: usize) -> Vec<String> {
    let status = bgp(lab, number, &["neighbors"]);
    let rows = status["neighbors"].as_array().unwrap().iter();
    rows.map(|row| {
        format!("{} {} {}", row["address"].as_str().unwrap(), row["state"].as_str().unwrap(), row["flaps"])
    })
    .collect()
}

/// Waits until a node has exactly these, as [`sessions`] writes them.
pub fn wait_sessions(lab: &Lab, number: usize, wanted: &[&str]) {
    let wanted: Vec<String> = wanted.iter().map(|row| (*row).to_owned()).collect();
    eventually_equal(&format!("sessions of node {number}"), SESSION, &wanted, || sessions(lab, number));
}

/// `prefix via next hop: verdict` of a list of routes.
pub fn rows(list: &Value) -> BTreeSet<String> {
    let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
    let list = list.as_array().unwrap().iter();
    list.map(|row| format!("{} via {}: {}", text(row, "prefix"), text(row, "nextHop"), text(row, "verdict")))
        .collect()
}

/// Waits until one of [`rows`] is this.
pub fn wait_row(lab: &Lab, number: usize, words: &[&str], wanted: &str) {
    eventually(&format!("{words:?} on node {number}"), SESSION, || {
        let rows = rows(&bgp(lab, number, words));
        if rows.contains(wanted) { Ok(()) } else { Err(format!("no {wanted:?} in {rows:#?}")) }
    });
}
