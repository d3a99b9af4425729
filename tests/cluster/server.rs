//! An API server that does exactly what a test tells it, faults above all.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How the server takes `sendInitialEvents`.
#[derive(Clone, Copy, Default, PartialEq)]
pub enum Streaming {
    #[default]
    Served,
    /// As a server whose feature gate is off.
    Refused,
    /// As a server before 1.27: a plain watch, whose list never ends.
    Ignored,
}

#[derive(Default)]
pub struct Script {
    pub objects: Vec<(&'static str, Value)>,
    /// Every change since the start: version, plural, line.
    history: Vec<(u64, String, String)>,
    version: u64,
    /// Versions before this are too old to resume from.
    pub oldest: u64,
    pub streaming: Streaming,
    /// Statuses to answer the next requests with.
    pub faults: VecDeque<u16>,
    /// Plurals that do not exist (404) and that are not allowed (403).
    pub absent: Vec<&'static str>,
    pub forbidden: Vec<&'static str>,
    pub requests: Vec<String>,
    watchers: Vec<(String, mpsc::UnboundedSender<String>)>,
    /// Objects made for a list of slices beyond `objects`: how many, each with ten endpoints.
    pub generated_slices: usize,
}

#[derive(Clone)]
pub struct Server {
    pub script: Arc<Mutex<Script>>,
    pub address: SocketAddr,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Server {
    pub async fn start() -> Self {
        let script = Arc::new(Mutex::new(Script { version: 100, ..Script::default() }));
        let server = Self { script, address: SocketAddr::from(([127, 0, 0, 1], 0)), task: Arc::default() };
        server.listen().await
    }

    /// An address on which nobody listens yet.
    pub async fn reserved() -> Self {
        let server = Self::start().await;
        server.stop();
        server
    }

    async fn listen(mut self) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(64).unwrap();
        self.address = listener.local_addr().unwrap();
        let app = Router::new().fallback(handle).with_state(self.script.clone());
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        *self.task.lock().unwrap() = Some(task);
        self
    }

    pub fn stop(&self) {
        if let Some(task) = self.task.lock().unwrap().take() {
            task.abort();
        }
        self.drop_watches();
    }

    pub async fn restart(&self) {
        self.stop();
        self.clone().listen().await;
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn drop_watches(&self) {
        self.script().watchers.clear();
    }

    /// Stores an object and tells the watchers.
    pub fn put(&self, plural: &'static str, object: Value) {
        self.change(plural, "MODIFIED", object, true);
    }

    pub fn delete(&self, plural: &'static str, object: Value) {
        self.change(plural, "DELETED", object, false);
    }

    /// Changes what the server has without any watcher hearing of it.
    pub fn put_silently(&self, plural: &'static str, object: Value) {
        let mut script = self.script();
        script.version += 1;
        let version = script.version;
        script.store(plural, object, version, true);
    }

    pub fn delete_silently(&self, plural: &'static str, object: Value) {
        let mut script = self.script();
        script.version += 1;
        let version = script.version;
        script.store(plural, object, version, false);
    }

    /// Forgets the history: whoever resumes gets 410.
    pub fn compact(&self) {
        let mut script = self.script();
        script.version += 1;
        script.oldest = script.version;
        script.history.clear();
    }

    /// Sends a raw line to the watchers of a kind.
    pub fn say(&self, plural: &str, line: &str) {
        let mut script = self.script();
        script
            .watchers
            .retain(|(watched, sender)| watched != plural || sender.send(format!("{line}\n")).is_ok());
    }

    fn change(&self, plural: &'static str, kind: &str, object: Value, keep: bool) {
        let line = {
            let mut script = self.script();
            script.version += 1;
            let version = script.version;
            let object = script.store(plural, object, version, keep);
            let line = json!({"type": kind, "object": object}).to_string();
            script.history.push((version, plural.to_owned(), line.clone()));
            line
        };
        self.say(plural, &line);
    }

    pub fn count(&self, part: &str) -> usize {
        self.script().requests.iter().filter(|request| request.contains(part)).count()
    }
}

impl Script {
    fn store(&mut self, plural: &'static str, mut object: Value, version: u64, keep: bool) -> Value {
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("resourceVersion".to_owned(), Value::from(version.to_string()));
        }
        let id =
            |object: &Value| (object["metadata"]["namespace"].clone(), object["metadata"]["name"].clone());
        self.objects.retain(|(kind, known)| *kind != plural || id(known) != id(&object));
        if keep {
            self.objects.push((plural, object.clone()));
        }
        object
    }

    /// The objects from `start` on, at most `limit`, and whether there are more.
    fn page(&self, plural: &str, start: usize, limit: usize) -> (Vec<String>, bool) {
        let made = if plural == "endpointslices" { self.generated_slices } else { 0 };
        let own: Vec<&Value> =
            self.objects.iter().filter(|(kind, _)| *kind == plural).map(|(_, value)| value).collect();
        let total = own.len() + made;
        let end = start.saturating_add(limit).min(total);
        let object = |index: usize| match own.get(index) {
            Some(value) => value.to_string(),
            None => generated_slice(index - own.len()),
        };
        ((start..end).map(object).collect(), end < total)
    }
}

/// A slice as a real server sends it, managedFields included (4.5 kB).
fn generated_slice(index: usize) -> String {
    let endpoints: Vec<Value> = (0..10)
        .map(|n| {
            json!({
                "addresses": [format!("10.{}.{}.{}", index / 256, index % 256, n + 1)],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{}.example.internal", (index * 10 + n) % 500),
                "zone": format!("zone-{}", n % 3),
                "targetRef": {"kind": "Pod", "namespace": "load", "name": format!("app-{index}-5d8f7c9b4-{n}"), "uid": format!("7b0c4f3e-0000-4000-8000-{index:06}{n:06}")},
            })
        })
        .collect();
    json!({
        "metadata": {
            "name": format!("app-{index}-x7k2p"), "generateName": format!("app-{index}-"), "namespace": "load",
            "uid": format!("6f9619ff-8b86-4011-b42d-{index:012}"), "resourceVersion": "50", "generation": 3,
            "creationTimestamp": "2024-01-02T03:04:05Z",
            "labels": {"app": format!("app-{index}"), "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io", "kubernetes.io/service-name": format!("app-{index}")},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2024-01-02T03:04:05Z"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": format!("app-{index}"), "uid": "u", "controller": true}],
            "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "apiVersion": "discovery.k8s.io/v1", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:addressType": {}, "f:endpoints": {}, "f:metadata": {"f:annotations": {".": {}}, "f:labels": {".": {}}}, "f:ports": {}}}],
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
    .to_string()
}

fn status(code: u16, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": "Test", "code": code, "metadata": {}});
    (StatusCode::from_u16(code).unwrap(), body.to_string()).into_response()
}

async fn handle(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response {
    let uri = request.uri().clone();
    let plural = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    let query: Vec<(String, String)> = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let get = |name: &str| query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let mut locked = script.lock().unwrap();
    locked.requests.push(format!("{} {uri}", request.method()));
    if request.method() != "GET" {
        return (StatusCode::CREATED, "{}").into_response();
    }
    if locked.forbidden.contains(&plural.as_str()) {
        return status(403, "forbidden");
    }
    if locked.absent.contains(&plural.as_str()) {
        return (StatusCode::NOT_FOUND, "404 page not found").into_response();
    }
    if let Some(code) = locked.faults.pop_front() {
        return status(code, "told to fail");
    }
    if get("watch").is_none() {
        let start: usize = get("continue").map_or(0, |text| text.parse().unwrap());
        let limit: usize = get("limit").map_or(usize::MAX, |text| text.parse().unwrap());
        let (items, more) = locked.page(&plural, start, limit);
        let mut metadata = json!({"resourceVersion": locked.version.to_string()});
        if more {
            metadata["continue"] = Value::from((start + limit).to_string());
        }
        return format!(
            r#"{{"kind":"List","apiVersion":"v1","metadata":{metadata},"items":[{}]}}"#,
            items.join(",")
        )
        .into_response();
    }
    let (sender, receiver) = mpsc::unbounded_channel();
    let added = |object: String| format!("{{\"type\":\"ADDED\",\"object\":{object}}}\n");
    let initial = get("sendInitialEvents") == Some("true");
    if initial && locked.streaming == Streaming::Refused {
        return status(
            422,
            "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
        );
    }
    let mut waiting: VecDeque<String> = VecDeque::new();
    if initial {
        waiting.extend(locked.page(&plural, 0, usize::MAX).0.into_iter().map(added));
        if locked.streaming == Streaming::Served {
            let bookmark = json!({"type": "BOOKMARK", "object": {"kind": "X", "apiVersion": "v1", "metadata": {
                "resourceVersion": locked.version.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}}});
            waiting.push_back(format!("{bookmark}\n"));
        }
    } else {
        let from: u64 = get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0);
        if from < locked.oldest {
            let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired", "message": "too old resource version", "code": 410}});
            return format!("{gone}\n").into_response();
        }
        for (version, kind, line) in &locked.history {
            if *version > from && *kind == plural {
                waiting.push_back(format!("{line}\n"));
            }
        }
    }
    locked.watchers.push((plural, sender));
    drop(locked);
    let lines = stream::unfold((waiting, receiver), |(mut waiting, mut receiver)| async move {
        let line = match waiting.pop_front() {
            Some(line) => line,
            None => receiver.recv().await?,
        };
        Some((Ok::<_, std::io::Error>(Bytes::from(line)), (waiting, receiver)))
    });
    Body::from_stream(lines).into_response()
}
