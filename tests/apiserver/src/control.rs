//! `/__faults`: faults by HTTP, for demos and for tests in other languages.

use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::faults::Fault;
use crate::state::State;
use crate::status::Refusal;
use crate::store::{Decision, Key};

/// Carries out the POSTed fault.
///
/// # Errors
/// 405 for other methods, 400 for what is no fault.
pub fn handle(state: &State, method: &Method, body: &Value) -> Result<Value, Refusal> {
    if *method != Method::POST {
        return Err(Refusal::new(405, "MethodNotAllowed", "POST a fault here"));
    }
    let fault: Fault = serde_json::from_value(body.clone())
        .map_err(|e| Refusal::bad_request(format!("no such fault: {e}")))?;
    inflict(state, fault)?;
    Ok(json!({"kind": "Status", "apiVersion": "v1", "status": "Success", "metadata": {}}))
}

/// Carries out a fault.
///
/// # Errors
/// 404 when it names an unknown resource.
pub fn inflict(state: &State, fault: Fault) -> Result<(), Refusal> {
    let faults = &state.faults;
    match fault {
        Fault::DropWatches { cut } => faults.drop_watches(cut),
        Fault::Fail(failure) => faults.fail(failure),
        Fault::Delay { milliseconds } => faults.delay(Duration::from_millis(milliseconds)),
        Fault::Outage { on } => faults.outage(on),
        Fault::StaleLists { on } => faults.stale_lists(on.then(|| state.store.revision())),
        Fault::GarbageLine { resource } => faults.garbage_line(resource.as_deref()),
        Fault::MuteWatches { on } => faults.mute_watches(on),
        Fault::Compact { resource } => {
            let storage = resource.map(|name| storage(state, &name)).transpose()?;
            state.store.compact(storage.as_deref());
        }
        Fault::StreamingLists { mode } => faults.streaming_lists(mode),
        Fault::PageLimit { limit } => faults.page_limit(limit),
        Fault::Insert { resource, object } => {
            let storage = storage(state, &resource)?;
            insert_unchecked(state, &storage, object);
        }
        Fault::Clear => faults.clear(),
    }
    Ok(())
}

/// Stores an object as it is, malformed or not; controllers do not react.
pub fn insert_unchecked(state: &State, storage: &str, object: Value) {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    let key = Key::new(&text("namespace"), &text("name"));
    state.store.load(storage, [(key, object)]);
}

/// Removes an object without grace, finalizers or hooks.
pub fn remove_unchecked(state: &State, storage: &str, key: &Key) {
    let _ = state.store.transact(storage, key, |_| Ok(Decision::Remove));
}

/// Where a named resource keeps its objects.
///
/// # Errors
/// 404 for an unknown name.
pub fn storage(state: &State, name: &str) -> Result<String, Refusal> {
    let found = state.read(|registry| registry.named(name));
    found.map(|r| r.storage.clone()).ok_or_else(Refusal::no_route)
}
