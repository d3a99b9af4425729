//! A Kubernetes API server for tests.
//!
//! It speaks enough of the real protocol for `kubectl`, for client libraries and for a node agent:
//! list (paged, at a revision), watch (bookmarks, streaming lists, 410 Gone), every write verb with
//! the four patch types, `/status` and `/scale`, discovery, custom resources. It plays the
//! controllers that turn Deployments, DaemonSets and StatefulSets into Pods and Services into
//! EndpointSlices, and, when asked, the kubelet. It misbehaves on demand ([`Faults`]).
//!
//! ```no_run
//! use ferroute_apiserver::{ApiServer, NodeSpec};
//! let server = ApiServer::builder()
//!     .service_cidrs(["10.96.0.0/16".parse()?])
//!     .node(NodeSpec::new("a", ["192.0.2.1".parse()?]))
//!     .start()?;
//! server.apply("kind: Service ...")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Everything lives in memory, in one process, behind one lock: objects are serialised once per
//! version, and lists and watches copy those bytes.

mod admission;
mod builder;
mod clock;
mod control;
mod controllers;
mod discovery;
mod events;
mod faults;
mod form;
mod node;
mod patch;
mod registry;
mod routes;
mod selector;
mod serve;
mod state;
mod status;
mod store;
mod tables;
mod tls;
mod verbs;
mod watch;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use builder::Builder;
pub use faults::{Failure, Fault, Faults, StreamingLists};
pub use node::NodeSpec;
pub use registry::Resource;
pub use state::Kubelet;
pub use status::{Cause, Refusal};
pub use tls::{Authority, Identity, Tls};

use patch::PatchKind;
use selector::Scope;
use state::State;
use store::Key;
use verbs::{DeleteOptions, Part};

/// A running server. Dropping it stops it.
///
/// Resources are named as kubectl names them: `services`, `deployments.apps`,
/// `endpointslices.discovery.k8s.io`; a plural name without group is found where it is unique.
#[derive(Debug)]
pub struct ApiServer {
    state: Arc<State>,
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ApiServer {
    /// Settings with their defaults.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// `http://address:port`, or `https://` when it speaks TLS.
    pub fn url(&self) -> String {
        let scheme = if self.state.settings.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The listening address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The listening port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Writes a kubeconfig for this server, with the token of its token file if it has one.
    ///
    /// # Errors
    /// Those of reading the token and writing the file.
    pub fn kubeconfig(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let user = match &self.state.settings.token_file {
            Some(file) => format!("{{token: \"{}\"}}", std::fs::read_to_string(file)?.trim()),
            None => "{}".to_owned(),
        };
        let url = self.url();
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters: [{{name: lab, cluster: {{server: \"{url}\"}}}}]\n\
             users: [{{name: lab, user: {user}}}]\n\
             contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n"
        );
        std::fs::write(path, text)
    }

    fn resource(&self, name: &str) -> Result<Arc<Resource>, Refusal> {
        let found = self.state.read(|registry| {
            registry.named(name).or_else(|| registry.all().find(|r| r.plural == name).cloned())
        });
        found.ok_or_else(|| Refusal::new(404, "NotFound", format!("no resource named {name:?} is served")))
    }

    /// Applies the objects of a YAML text (several documents, lists), as `kubectl apply` would, into
    /// the namespace `default` where they name none.
    ///
    /// # Errors
    /// The first refusal; documents before it stay applied.
    pub fn apply(&self, yaml: &str) -> Result<(), Refusal> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(yaml)
            .map_err(|e| Refusal::bad_request(format!("the text is not YAML: {e}")))?;
        for document in documents {
            match document.get("items").and_then(Value::as_array) {
                Some(items) => items.iter().try_for_each(|item| self.apply_object(item.clone()))?,
                None if document.is_null() => {}
                None => self.apply_object(document)?,
            }
        }
        Ok(())
    }

    /// Applies one object.
    ///
    /// # Errors
    /// As the real server refuses.
    pub fn apply_object(&self, object: Value) -> Result<(), Refusal> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
        let resource = self.state.read(|registry| registry.of_kind(&version, &kind)).ok_or_else(|| {
            Refusal::bad_request(format!("no matches for kind {kind:?} in version {version:?}"))
        })?;
        let mut namespace = String::new();
        if resource.namespaced {
            namespace = text(&object["metadata"]["namespace"]);
            if namespace.is_empty() {
                namespace = "default".into();
            }
        }
        let key = Key::new(&namespace, &text(&object["metadata"]["name"]));
        self.state.patch(&resource, &key, Part::Main, PatchKind::Apply, object, "library", false)?;
        Ok(())
    }

    /// Creates one object as it is (admission applies).
    ///
    /// # Errors
    /// As the real server refuses.
    pub fn create(&self, resource: &str, namespace: &str, object: Value) -> Result<Value, Refusal> {
        let made = self.state.create(&*self.resource(resource)?, namespace, object, false)?;
        Ok((*made).clone())
    }

    /// Reads one object; the namespace is empty for cluster-scoped ones.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        let resource = self.resource(resource).ok()?;
        let object = self.state.store.get(&resource.storage, &Key::new(namespace, name))?;
        Some((**object.value()).clone())
    }

    /// Reads all objects of a resource, of one namespace unless it is empty.
    pub fn list(&self, resource: &str, namespace: &str) -> Vec<Value> {
        let Ok(resource) = self.resource(resource) else { return Vec::new() };
        let scope = Scope { namespace: namespace.to_owned(), ..Scope::default() };
        self.state.store.all(&resource.storage, &scope).iter().map(|o| (**o.value()).clone()).collect()
    }

    /// Changes an object by a merge patch.
    ///
    /// # Errors
    /// As the real server refuses.
    pub fn patch(&self, resource: &str, namespace: &str, name: &str, patch: Value) -> Result<Value, Refusal> {
        self.patch_part(resource, namespace, name, patch, Part::Main)
    }

    /// Changes an object's status by a merge patch, through `/status`.
    ///
    /// # Errors
    /// As the real server refuses.
    pub fn patch_status(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        patch: Value,
    ) -> Result<Value, Refusal> {
        self.patch_part(resource, namespace, name, patch, Part::Status)
    }

    fn patch_part(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        patch: Value,
        part: Part,
    ) -> Result<Value, Refusal> {
        let resource = self.resource(resource)?;
        let key = Key::new(namespace, name);
        let (written, _) =
            self.state.patch(&resource, &key, part, PatchKind::Merge, patch, "library", false)?;
        Ok((*written).clone())
    }

    /// Deletes an object; pods with their grace period.
    ///
    /// # Errors
    /// 404 when it does not exist.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> Result<(), Refusal> {
        let resource = self.resource(resource)?;
        self.state.delete(&resource, &Key::new(namespace, name), &DeleteOptions::default())?;
        Ok(())
    }

    /// Deletes an object at once, pods too, as a kubelet finishes a pod.
    ///
    /// # Errors
    /// 404 when it does not exist.
    pub fn delete_now(&self, resource: &str, namespace: &str, name: &str) -> Result<(), Refusal> {
        let resource = self.resource(resource)?;
        let options = DeleteOptions { grace: Some(0), ..DeleteOptions::default() };
        self.state.delete(&resource, &Key::new(namespace, name), &options)?;
        Ok(())
    }

    /// Waits until a condition holds, looking whenever something changed; says what it waited for
    /// when it does not come true in time.
    ///
    /// # Errors
    /// The text, after the timeout.
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        mut condition: impl FnMut(&Self) -> bool,
    ) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        while !condition(self) {
            if Instant::now() > deadline {
                return Err(format!("waited {timeout:?} in vain for: {what}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until every Deployment, StatefulSet and DaemonSet has all its pods up to date and ready.
    ///
    /// # Errors
    /// Names the first workload that is not, after the timeout.
    pub fn wait_rolled_out(&self, timeout: Duration) -> Result<(), String> {
        let mut late = String::new();
        let waited = self.wait_for("all workloads rolled out", timeout, |server| {
            late = server.not_rolled_out().unwrap_or_default();
            late.is_empty()
        });
        waited.map_err(|text| format!("{text}; not ready: {late}"))
    }

    fn not_rolled_out(&self) -> Option<String> {
        for resource in ["deployments.apps", "statefulsets.apps", "daemonsets.apps"] {
            for object in self.list(resource, "") {
                let status = |field: &str| object["status"][field].as_i64().unwrap_or(0);
                let wanted = object["spec"]["replicas"].as_i64();
                let done = match wanted {
                    Some(n) => {
                        ["replicas", "updatedReplicas", "readyReplicas"].iter().all(|f| status(f) == n)
                    }
                    None => {
                        let wanted = status("desiredNumberScheduled");
                        status("numberReady") == wanted && status("updatedNumberScheduled") == wanted
                    }
                };
                let seen = object["status"]["observedGeneration"] == object["metadata"]["generation"];
                if !(done && seen) {
                    let meta = &object["metadata"];
                    return Some(format!("{resource} {}/{}", meta["namespace"], meta["name"]));
                }
            }
        }
        None
    }

    /// The switchboard of faults.
    pub fn faults(&self) -> &Faults {
        &self.state.faults
    }

    /// Carries out one fault, as a POST to `/__faults` does.
    ///
    /// # Errors
    /// 404 when it names an unknown resource.
    pub fn inflict(&self, fault: Fault) -> Result<(), Refusal> {
        control::inflict(&self.state, fault)
    }

    /// Stores many objects at once, as they are: no admission, no controllers.
    ///
    /// # Errors
    /// 404 for an unknown resource.
    pub fn load(&self, resource: &str, objects: impl IntoIterator<Item = Value>) -> Result<(), Refusal> {
        let resource = self.resource(resource)?;
        let mut allocator = (resource.storage == "services").then(|| self.state.allocator());
        let keyed = objects.into_iter().map(|object| {
            let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
            let key = Key::new(text("namespace"), text("name"));
            if let Some(allocator) = &mut allocator {
                allocator.adopt(&key, &object);
            }
            (key, object)
        });
        let keyed: Vec<(Key, Value)> = keyed.collect();
        self.state.store.load(&resource.storage, keyed);
        Ok(())
    }

    /// Stores one object as it is, malformed or not.
    ///
    /// # Errors
    /// 404 for an unknown resource.
    pub fn insert_unchecked(&self, resource: &str, object: Value) -> Result<(), Refusal> {
        control::insert_unchecked(&self.state, &self.resource(resource)?.storage, object);
        Ok(())
    }

    /// Stores bytes that need not be JSON in place of an object.
    ///
    /// # Errors
    /// 404 for an unknown resource.
    pub fn plant(&self, resource: &str, namespace: &str, name: &str, bytes: Vec<u8>) -> Result<(), Refusal> {
        self.state.store.plant(&self.resource(resource)?.storage, Key::new(namespace, name), bytes.into());
        Ok(())
    }

    /// Removes an object without grace, finalizers or controllers' consent.
    ///
    /// # Errors
    /// 404 for an unknown resource.
    pub fn remove_unchecked(&self, resource: &str, namespace: &str, name: &str) -> Result<(), Refusal> {
        let storage = &self.resource(resource)?.storage;
        control::remove_unchecked(&self.state, storage, &Key::new(namespace, name));
        if storage == "services" {
            self.state.allocator().release(&Key::new(namespace, name));
        }
        Ok(())
    }

    /// Serves one more resource.
    pub fn register(&self, resource: Resource) {
        self.state.register(|registry| registry.insert(resource));
    }

    /// Registers a node.
    ///
    /// # Errors
    /// 409 when it exists.
    pub fn add_node(&self, node: &NodeSpec) -> Result<(), Refusal> {
        self.create("nodes", "", node.object())?;
        Ok(())
    }

    /// The current revision.
    pub fn revision(&self) -> u64 {
        self.state.store.revision()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
