//! Watch streams: initial events, changes from the history, bookmarks, 410 and the end by timeout.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep_until};

use crate::faults::{StreamingLists, WatchFaults};
use crate::form::Form;
use crate::registry::Resource;
use crate::selector::Scope;
use crate::state::State;
use crate::status::{Cause, Refusal};
use crate::store::{Change, Object};

/// What a watch request asks for.
#[derive(Debug)]
pub struct WatchRequest {
    pub resource: Arc<Resource>,
    pub scope: Scope,
    pub form: Form,
    /// `resourceVersion`: none and 0 begin with the current objects.
    pub from: Option<u64>,
    pub bookmarks: bool,
    /// `sendInitialEvents`.
    pub initial: Option<bool>,
    /// `resourceVersionMatch=NotOlderThan` was given.
    pub not_older_than: bool,
    pub timeout: Duration,
}

/// Chunks go out when they reach this size, so that a large first list flows.
const CHUNK: usize = 64 * 1024;

/// Starts a watch; the chunks of its body arrive on the channel, an error cuts the connection.
pub fn start(
    state: Arc<State>,
    mut request: WatchRequest,
) -> Result<mpsc::Receiver<io::Result<Bytes>>, Refusal> {
    match (request.initial, state.faults.current_streaming()) {
        (Some(_), StreamingLists::Refused) => {
            let cause = Cause::forbidden(
                "sendInitialEvents",
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            );
            return Err(Refusal::invalid("ListOptions", "meta.k8s.io", "", &[cause]));
        }
        (Some(_), StreamingLists::Ignored) => request.initial = None,
        (Some(_), StreamingLists::Served) if !request.not_older_than => {
            let cause = Cause::forbidden(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            );
            return Err(Refusal::invalid("ListOptions", "meta.k8s.io", "", &[cause]));
        }
        _ => {}
    }
    let (sender, receiver) = mpsc::channel(8);
    // From here on a fault hits this watch, even before its task runs.
    let faults = state.faults.watches.subscribe();
    let began = faults.borrow().clone();
    tokio::spawn(async move {
        let mut stream = Stream { state, request, sender, buffer: BytesMut::new() };
        if let Err(Ended::Cut) = stream.run(faults, began).await {
            let _ = stream.sender.send(Err(io::ErrorKind::ConnectionAborted.into())).await;
        }
    });
    Ok(receiver)
}

/// Why a stream is over.
enum Ended {
    Cleanly,
    Cut,
}

struct Stream {
    state: Arc<State>,
    request: WatchRequest,
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: BytesMut,
}

impl Stream {
    async fn run(&mut self, mut faults: Receiver<WatchFaults>, began: WatchFaults) -> Result<(), Ended> {
        let storage = self.request.resource.storage.clone();
        let mut changed = self.state.store.subscribe_to(&storage);
        let deadline = Instant::now() + self.request.timeout;
        let mut bookmark_at = Instant::now() + self.state.settings.bookmark_interval;
        let mut cursor = self.first(&storage).await?;
        loop {
            let faulty = faults.borrow_and_update().clone();
            self.follow_faults(&began, &faulty)?;
            if faulty.garbage != began.garbage
                && faulty.garbage_resource.as_deref().is_none_or(|r| r == self.request.resource.plural)
            {
                self.buffer.extend_from_slice(b"{\"type\":\"MODIFIED\",\"object\":{\"kind\": garbage\n");
                self.flush().await?;
                return Err(Ended::Cleanly);
            }
            if !faulty.muted {
                changed.borrow_and_update();
                match self.state.store.changes(&storage, cursor) {
                    Ok((changes, revision)) => {
                        for change in &changes {
                            self.change(change);
                            if self.buffer.len() >= CHUNK {
                                self.flush().await?;
                            }
                        }
                        cursor = revision;
                    }
                    Err(refusal) => {
                        self.event("ERROR", &to_bytes(&refusal.body()));
                        self.flush().await?;
                        return Err(Ended::Cleanly);
                    }
                }
                self.flush().await?;
            }
            let sender = self.sender.clone();
            tokio::select! {
                _ = changed.changed() => {}
                _ = faults.changed() => {}
                () = sender.closed() => return Err(Ended::Cleanly),
                () = sleep_until(bookmark_at) => {
                    bookmark_at = Instant::now() + self.state.settings.bookmark_interval;
                    if !faulty.muted {
                        self.bookmark(cursor, false);
                    }
                }
                () = sleep_until(deadline) => {
                    if !faulty.muted {
                        self.bookmark(cursor, false);
                    }
                    self.flush().await?;
                    return Ok(());
                }
            }
        }
    }

    fn follow_faults(&self, began: &WatchFaults, now: &WatchFaults) -> Result<(), Ended> {
        if now.drops == began.drops {
            return Ok(());
        }
        Err(if now.cut { Ended::Cut } else { Ended::Cleanly })
    }

    /// Sends the current objects where they are asked for; returns the revision to go on from.
    async fn first(&mut self, storage: &str) -> Result<u64, Ended> {
        let from = self.request.from.filter(|r| *r > 0);
        let initial = self.request.initial.unwrap_or(from.is_none());
        if !initial {
            return Ok(from.unwrap_or_else(|| self.state.store.revision()));
        }
        let Ok(page) = self.state.store.page(storage, &self.request.scope, None, None, None) else {
            return Err(Ended::Cleanly);
        };
        for object in &page.items {
            let bytes = self.request.form.object(&self.request.resource, object);
            self.event("ADDED", &bytes);
            if self.buffer.len() >= CHUNK {
                self.flush().await?;
            }
        }
        if self.request.initial == Some(true) {
            self.bookmark(page.revision, true);
        }
        self.flush().await?;
        Ok(page.revision)
    }

    fn change(&mut self, change: &Change) {
        let scope = &self.request.scope;
        let before = change.previous.as_ref().is_some_and(|o| scope.contains(o));
        let after = !change.deleted && scope.contains(&change.object);
        let kind = match (before, after) {
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
            (false, false) => return,
        };
        let bytes = self.object(&change.object);
        self.event(kind, &bytes);
    }

    fn object(&self, object: &Object) -> Bytes {
        self.request.form.object(&self.request.resource, object)
    }

    fn bookmark(&mut self, revision: u64, initial_end: bool) {
        if !self.request.bookmarks {
            return;
        }
        let resource = &self.request.resource;
        let mut object = json!({
            "kind": resource.kind, "apiVersion": resource.api_version(),
            "metadata": {"resourceVersion": revision.to_string(), "creationTimestamp": null},
        });
        if initial_end {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        self.event("BOOKMARK", &to_bytes(&object));
    }

    fn event(&mut self, kind: &str, object: &[u8]) {
        self.buffer.extend_from_slice(b"{\"type\":\"");
        self.buffer.extend_from_slice(kind.as_bytes());
        self.buffer.extend_from_slice(b"\",\"object\":");
        self.buffer.extend_from_slice(object);
        self.buffer.extend_from_slice(b"}\n");
    }

    async fn flush(&mut self) -> Result<(), Ended> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = self.buffer.split().freeze();
        self.sender.send(Ok(chunk)).await.map_err(|_| Ended::Cleanly)
    }
}

fn to_bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
