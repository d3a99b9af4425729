//! Pods that the API server has assigned to the cluster's nodes come alive, as a kubelet does it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::http::{Incoming, Request};
use crate::workload::{Identity, Workload};
use crate::{Cluster, Netns, Node, Pod, PodSpec, Protocol};

/// Between two looks at stop requests and pods whose time has come.
const TICK: Duration = Duration::from_millis(20);

/// How pods end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A pod serves this long after its deletion, but never longer than its grace period. (Real
    /// ones end when their processes do, mostly sooner than the 30 s they may take.)
    pub serve_after_deletion: Duration,
    /// Whether it stays Ready that long, as a pod whose probe goes on to succeed does (its endpoint
    /// is then serving and terminating), or is unready at once.
    pub ready_while_terminating: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { serve_after_deletion: Duration::from_secs(1), ready_while_terminating: true }
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Running {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `spec.nodeName`.
    pub node: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its namespace in the kernel (the node's for a hostNetwork pod).
    pub netns: Netns,
}

/// The kubelets of all nodes of a cluster. Dropped, their pods are gone, but not from the API.
#[derive(Debug)]
pub struct Kubelet {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

/// What the owner of a [`Kubelet`] can look at.
#[derive(Debug, Default)]
struct Seen {
    running: BTreeMap<String, Running>,
    problems: Vec<String>,
}

impl Kubelet {
    /// Watches the API server (plain HTTP, asked from the cluster's router).
    ///
    /// # Errors
    /// When the thread cannot be started. Trouble with the server is retried and kept in
    /// [`Kubelet::problems`].
    pub fn start(cluster: &Cluster, server: SocketAddr, settings: Settings) -> Result<Self> {
        let (stop, seen): (Arc<AtomicBool>, Arc<Mutex<Seen>>) = Default::default();
        let mut work = Work {
            api: Api { netns: cluster.router.clone(), server },
            nodes: cluster.nodes.clone(),
            settings,
            pods: BTreeMap::new(),
            stop: stop.clone(),
            seen: seen.clone(),
        };
        let thread = std::thread::Builder::new().name("kubelet".into()).spawn(move || work.run())?;
        Ok(Self { stop, seen, thread: Some(thread) })
    }

    /// The pods that run now, by namespace and name.
    pub fn running(&self) -> Vec<Running> {
        let mut running: Vec<_> = lock(&self.seen).running.values().cloned().collect();
        running.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        running
    }

    /// The first running pod whose name begins so.
    pub fn pod(&self, prefix: &str) -> Option<Running> {
        self.running().into_iter().find(|pod| pod.name.starts_with(prefix))
    }

    /// What went wrong so far: pods that could not be started, requests that failed.
    pub fn problems(&self) -> Vec<String> {
        lock(&self.seen).problems.clone()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if std::thread::panicking() {
            for problem in self.problems() {
                eprintln!("kubelet: {problem}");
            }
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Api {
    netns: Netns,
    server: SocketAddr,
}

impl Api {
    /// Sends a request; statuses from 400 are errors, but for 404 and 409 (somebody was faster).
    fn send(&self, method: &str, path: &str, content_type: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        let response = Request { method, path, content_type, body: &body }
            .send(&self.netns, self.server)
            .with_context(|| format!("{method} {path}"))?;
        ensure!(
            response.status < 400 || matches!(response.status, 404 | 409),
            "{method} {path}: {} {}",
            response.status,
            response.body
        );
        Ok(())
    }

    fn list(&self) -> Result<(Vec<Value>, String)> {
        let response = self.netns.http_get(self.server, "/api/v1/pods").context("list pods")?;
        ensure!(response.status == 200, "list pods: {} {}", response.status, response.body);
        let mut list: Value = serde_json::from_str(&response.body).context("list of pods")?;
        let revision = text(&list["metadata"]["resourceVersion"]);
        let Value::Array(items) = list["items"].take() else { bail!("list of pods has no items") };
        Ok((items, revision))
    }

    fn watch(&self, revision: &str) -> io::Result<Incoming> {
        let path = format!("/api/v1/pods?watch=true&allowWatchBookmarks=true&resourceVersion={revision}");
        let incoming = Request::get(&path).open(&self.netns, self.server)?;
        if incoming.status == 200 { Ok(incoming) } else { Err(io::Error::other(incoming.status.to_string())) }
    }
}

/// A pod under this kubelet.
#[derive(Debug)]
struct Held {
    namespace: String,
    name: String,
    uid: String,
    /// Held only so that it runs; none when it could not be started.
    _body: Option<Body>,
    ending: Option<Instant>,
}

#[derive(Debug)]
enum Body {
    Pod { _pod: Pod },
    Host { _workload: Workload },
}

impl Held {
    fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace, self.name)
    }
}

struct Work {
    api: Api,
    nodes: Vec<Node>,
    settings: Settings,
    /// By uid: a StatefulSet's new pod has the old one's name.
    pods: BTreeMap<String, Held>,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
}

impl Work {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(error) = self.follow() {
                self.report(&error);
                // The server is away or told to misbehave: what is to end still ends.
                self.finish_due();
                std::thread::sleep(5 * TICK);
            }
        }
        self.pods.clear();
        lock(&self.seen).running.clear();
    }

    fn report(&self, error: &anyhow::Error) {
        lock(&self.seen).problems.push(format!("{error:#}"));
    }

    /// Lists and watches until the watch ends.
    fn follow(&mut self) -> Result<()> {
        let (items, mut revision) = self.api.list()?;
        let listed: Vec<String> = items.iter().map(|pod| text(&pod["metadata"]["uid"])).collect();
        let gone: Vec<String> = self.pods.keys().filter(|uid| !listed.contains(uid)).cloned().collect();
        gone.iter().for_each(|uid| self.remove(uid));
        items.iter().for_each(|pod| self.observe(pod));
        let mut watch = self.api.watch(&revision).context("watch pods")?;
        while !self.stop.load(Ordering::Relaxed) {
            self.finish_due();
            let line = match watch.line(TICK) {
                Ok(Some(line)) => line,
                Ok(None) => continue,
                // Servers end watches now and then; go on from where it ended.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    watch = self.api.watch(&revision).context("watch pods again")?;
                    continue;
                }
                Err(error) => return Err(error).context("watch pods"),
            };
            let event: Value =
                serde_json::from_str(&line).with_context(|| format!("watch event {line:?}"))?;
            let object = &event["object"];
            match event["type"].as_str() {
                Some("ADDED" | "MODIFIED") => self.observe(object),
                Some("DELETED") => self.remove(&text(&object["metadata"]["uid"])),
                Some("BOOKMARK") => {}
                _ => bail!("watch pods: {line}"),
            }
            revision = text(&object["metadata"]["resourceVersion"]);
        }
        Ok(())
    }

    fn observe(&mut self, pod: &Value) {
        let uid = text(&pod["metadata"]["uid"]);
        let Some(node) = self.nodes.iter().find(|node| pod["spec"]["nodeName"] == node.name).cloned() else {
            return;
        };
        if !pod["metadata"]["deletionTimestamp"].is_null() {
            self.begin_end(&uid, pod);
            return;
        }
        if self.pods.contains_key(&uid) {
            return;
        }
        let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
        let started =
            start(&node, &namespace, &name, pod).with_context(|| format!("start pod {namespace}/{name}"));
        let mut held = Held { namespace, name, uid: uid.clone(), _body: None, ending: None };
        let result = started.and_then(|(body, running)| {
            held._body = Some(body);
            let status = running_status(pod, &running.ips, &node);
            lock(&self.seen).running.insert(uid.clone(), running);
            self.patch_status(&held, &status)
        });
        self.pods.insert(uid, held);
        if let Err(error) = result {
            self.report(&error);
        }
    }

    fn patch_status(&self, held: &Held, status: &Value) -> Result<()> {
        let body = json!({"metadata": {"uid": held.uid}, "status": status});
        self.api.send("PATCH", &format!("{}/status", held.path()), "application/merge-patch+json", &body)
    }

    fn begin_end(&mut self, uid: &str, pod: &Value) {
        let grace = pod["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(0);
        let end = Instant::now() + self.settings.serve_after_deletion.min(Duration::from_secs(grace));
        let metadata = &pod["metadata"];
        // One that never started here has only to be reported gone.
        let held = self.pods.entry(uid.to_owned()).or_insert_with(|| Held {
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]),
            uid: uid.to_owned(),
            _body: None,
            ending: None,
        });
        let first = held.ending.is_none();
        // A second deletion may shorten the time, never lengthen it.
        held.ending = Some(held.ending.map_or(end, |at| at.min(end)));
        if first && !self.settings.ready_while_terminating {
            let mut conditions = pod["status"]["conditions"].clone();
            for condition in conditions.as_array_mut().into_iter().flatten() {
                if condition["type"] == "Ready" || condition["type"] == "ContainersReady" {
                    condition["status"] = "False".into();
                }
            }
            let result = self
                .pods
                .get(uid)
                .map_or(Ok(()), |held| self.patch_status(held, &json!({"conditions": conditions})));
            if let Err(error) = result {
                self.report(&error);
            }
        }
    }

    fn finish_due(&mut self) {
        let now = Instant::now();
        let due: Vec<String> = self
            .pods
            .values()
            .filter(|held| held.ending.is_some_and(|at| at <= now))
            .map(|held| held.uid.clone())
            .collect();
        for uid in due {
            let Some(held) = self.pods.get_mut(&uid) else { continue };
            held._body = None;
            lock(&self.seen).running.remove(&uid);
            let options = json!({
                "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0, "preconditions": {"uid": uid},
            });
            let path = held.path();
            match self.api.send("DELETE", &path, "application/json", &options) {
                Ok(()) => drop(self.pods.remove(&uid)),
                // Kept, so that it is tried again.
                Err(error) => {
                    held.ending = Some(now + 5 * TICK);
                    self.report(&error);
                }
            }
        }
    }

    fn remove(&mut self, uid: &str) {
        self.pods.remove(uid);
        lock(&self.seen).running.remove(uid);
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The ports that the pod's containers name.
fn ports(pod: &Value) -> Result<Vec<(Protocol, u16)>> {
    let mut ports = Vec::new();
    for container in pod["spec"]["containers"].as_array().into_iter().flatten() {
        for port in container["ports"].as_array().into_iter().flatten() {
            let protocol = match port["protocol"].as_str() {
                None | Some("TCP") => Protocol::Tcp,
                Some("UDP") => Protocol::Udp,
                Some("SCTP") => Protocol::Sctp,
                Some(other) => bail!("protocol {other}"),
            };
            let number = port["containerPort"].as_u64().and_then(|number| u16::try_from(number).ok());
            ports.push((
                protocol,
                number.with_context(|| format!("containerPort {}", port["containerPort"]))?,
            ));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

fn start(node: &Node, namespace: &str, name: &str, pod: &Value) -> Result<(Body, Running)> {
    let ports = ports(pod)?;
    let running = |ips: &[IpAddr], netns: &Netns| Running {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        node: node.name.clone(),
        ips: ips.to_vec(),
        netns: netns.clone(),
    };
    if pod["spec"]["hostNetwork"] == true {
        let identity = Identity { pod: name.to_owned(), namespace: namespace.to_owned() };
        let workload = Workload::start(&node.netns, identity, &node.ips, &ports)?;
        return Ok((Body::Host { _workload: workload }, running(&node.ips, &node.netns)));
    }
    let pod = node.start_pod(PodSpec::new(name).namespace(namespace).ports(ports))?;
    let running = running(&pod.ips, pod.netns());
    Ok((Body::Pod { _pod: pod }, running))
}

fn running_status(pod: &Value, ips: &[IpAddr], node: &Node) -> Value {
    let list = |ips: &[IpAddr]| ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
    let conditions = ["PodScheduled", "PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"]
        .map(|kind| json!({"type": kind, "status": "True"}));
    let containers: Vec<Value> = pod["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|container| {
            json!({
                "name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0,
                "ready": true, "started": true, "state": {"running": {}},
            })
        })
        .collect();
    json!({
        "phase": "Running",
        "podIP": ips.first(), "podIPs": list(ips),
        "hostIP": node.ips.first(), "hostIPs": list(&node.ips),
        "conditions": conditions, "containerStatuses": containers,
    })
}
