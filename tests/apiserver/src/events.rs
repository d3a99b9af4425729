//! Events live once and are served as core/v1 and as events.k8s.io/v1.

use serde_json::Value;

/// (core/v1 field, events.k8s.io/v1 field)
const FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// Turns a core/v1 event into its events.k8s.io/v1 form.
pub fn to_new(event: &mut Value) {
    rename(event, FIELDS.iter().map(|(core, new)| (*core, *new)), "events.k8s.io/v1");
}

/// Turns an events.k8s.io/v1 event into the core/v1 form it is stored in.
pub fn to_core(event: &mut Value) {
    rename(event, FIELDS.iter().map(|(core, new)| (*new, *core)), "v1");
}

fn rename<'a>(event: &mut Value, fields: impl Iterator<Item = (&'a str, &'a str)>, api_version: &str) {
    let Some(map) = event.as_object_mut() else { return };
    for (from, to) in fields {
        // `reportingInstance` and the rest carry the same name in both.
        if let Some(value) = map.remove(from) {
            map.insert(to.into(), value);
        }
    }
    map.insert("apiVersion".into(), api_version.into());
}
