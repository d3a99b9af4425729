//! Says what cannot be honoured: a log line, an event on the object and a metric, each once.
//!
//! Rooms call [`Reporter::problem`] as often as they meet a problem; what was said in the last ten
//! minutes is not said again. Nothing here blocks: events wait in a bounded queue for
//! [`Reporter::post_events`], and without an API server they are simply not posted.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use serde::Serialize;
use serde_json::json;
use tokio::sync::Notify;

use crate::cluster::ObjectKey;
use crate::cluster::service::Problem;

/// The same problem of the same object is said again after this.
const REPEAT_AFTER: Duration = Duration::from_secs(600);
/// Events waiting for the API server; the oldest is dropped for a new one.
const QUEUE_LIMIT: usize = 256;
/// Remembered sayings; beyond it the expired ones go, and with none expired all do.
const MEMORY_LIMIT: usize = 8192;
/// The API's limit on an event's message, in bytes.
const MAX_MESSAGE: usize = 1024;

/// Reports problems of objects. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    inner: Arc<Inner>,
    room: &'static str,
}

struct Inner {
    node: Box<str>,
    content: Mutex<Content>,
    queued: Notify,
}

#[derive(Default)]
struct Content {
    standing: BTreeMap<(&'static str, ObjectKey), Vec<Standing>>,
    said: HashMap<u64, Instant>,
    counters: BTreeMap<(&'static str, &'static str), u64>,
    queue: VecDeque<Event>,
    dropped: u64,
}

struct Standing {
    room: &'static str,
    problem: Problem,
    since: Instant,
}

#[derive(Clone)]
struct Event {
    kind: &'static str,
    key: ObjectKey,
    uid: Box<str>,
    problem: Problem,
    hash: u64,
    /// Good news: an event of type Normal.
    is_good: bool,
}

/// A problem that stands, for `ferroute status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CurrentProblem {
    /// Kind of the object.
    pub kind: &'static str,
    /// Namespace of the object; empty for cluster-scoped ones.
    pub namespace: Arc<str>,
    /// Name of the object.
    pub name: Arc<str>,
    /// CamelCase reason.
    pub reason: &'static str,
    /// What, where and what to do.
    pub message: String,
    /// Seconds since it was first met.
    pub since_seconds: u64,
}

impl Reporter {
    /// A reporter for the node of this name.
    pub fn new(node: &str) -> Self {
        Self {
            inner: Arc::new(Inner { node: node.into(), content: Mutex::default(), queued: Notify::new() }),
            room: "",
        }
    }

    /// The same reporter for another room: [`Self::resolved`] and [`Self::replace`] touch only what
    /// the same room reported.
    pub fn room(&self, room: &'static str) -> Self {
        Self { inner: self.inner.clone(), room }
    }

    /// Reports a problem of an object. Saying the same again is cheap and silent.
    pub fn problem(&self, kind: &'static str, key: &ObjectKey, uid: &str, problem: &Problem) {
        let mut content = self.lock();
        let standing = content.standing.entry((kind, key.clone())).or_default();
        if !standing.iter().any(|known| known.room == self.room && known.problem == *problem) {
            standing.push(Standing { room: self.room, problem: problem.clone(), since: Instant::now() });
        }
        self.say(&mut content, kind, key, uid, problem);
    }

    /// Makes `problems` all that this room has to say about an object.
    pub fn replace(&self, kind: &'static str, key: &ObjectKey, uid: &str, problems: &[Problem]) {
        let mut content = self.lock();
        let entry = (kind, key.clone());
        if problems.is_empty() && !content.standing.contains_key(&entry) {
            return;
        }
        let standing = content.standing.entry(entry.clone()).or_default();
        standing.retain(|known| known.room != self.room || problems.contains(&known.problem));
        for problem in problems {
            if !standing.iter().any(|known| known.room == self.room && known.problem == *problem) {
                standing.push(Standing { room: self.room, problem: problem.clone(), since: Instant::now() });
            }
        }
        if standing.is_empty() {
            content.standing.remove(&entry);
        }
        for problem in problems {
            self.say(&mut content, kind, key, uid, problem);
        }
    }

    /// Forgets what this room reported about an object: it is sound again, or gone.
    pub fn resolved(&self, kind: &'static str, key: &ObjectKey) {
        self.replace(kind, key, "", &[]);
    }

    /// The problems that stand, by kind and object.
    pub fn current(&self) -> Vec<CurrentProblem> {
        let content = self.lock();
        let mut list = Vec::new();
        for ((kind, key), standing) in &content.standing {
            for (index, entry) in standing.iter().enumerate() {
                // Two rooms may have met the same problem.
                if standing.iter().take(index).any(|earlier| earlier.problem == entry.problem) {
                    continue;
                }
                list.push(CurrentProblem {
                    kind,
                    namespace: key.namespace.clone(),
                    name: key.name.clone(),
                    reason: entry.problem.reason,
                    message: entry.problem.message.clone(),
                    since_seconds: entry.since.elapsed().as_secs(),
                });
            }
        }
        list
    }

    /// How often a problem was said, by kind and reason.
    pub fn counters(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        self.lock().counters.clone()
    }

    /// Events that were never posted because the queue was full.
    pub fn dropped_events(&self) -> u64 {
        self.lock().dropped
    }

    /// Posts events as they come, for ever.
    pub async fn post_events(&self, client: kube::Client) {
        loop {
            let event = self.lock().queue.pop_front();
            let Some(event) = event else {
                self.inner.queued.notified().await;
                continue;
            };
            if let Err(error) = self.post(&client, &event).await {
                // The log line and the metric have said it already; an event is a courtesy and is
                // not worth a retry that outlives the API server's bad times.
                tracing::debug!(object = %event.key, reason = event.problem.reason, %error, "event not posted");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    fn say(&self, content: &mut Content, kind: &'static str, key: &ObjectKey, uid: &str, problem: &Problem) {
        // Fixed seed: every node gives one problem one name, so a cluster of 1,000 nodes posts one
        // event and not 1,000.
        let hash = foldhash::fast::FixedState::default().hash_one((kind, key, uid, problem));
        let now = Instant::now();
        if content.said.get(&hash).is_some_and(|at| now.duration_since(*at) < REPEAT_AFTER) {
            return;
        }
        if content.said.len() >= MEMORY_LIMIT {
            content.said.retain(|_, at| now.duration_since(*at) < REPEAT_AFTER);
            if content.said.len() >= MEMORY_LIMIT {
                content.said.clear();
            }
        }
        content.said.insert(hash, now);
        *content.counters.entry((kind, problem.reason)).or_default() += 1;
        tracing::warn!(kind, object = %key, reason = problem.reason, message = problem.message, "object has a problem");
        self.enqueue(
            content,
            Event { kind, key: key.clone(), uid: uid.into(), problem: problem.clone(), hash, is_good: false },
        );
    }

    /// Tells good news of an object: a log line and an event of type Normal. It is no problem, so it
    /// neither stands nor counts as one.
    pub fn good_news(&self, kind: &'static str, key: &ObjectKey, uid: &str, news: &Problem) {
        let hash = foldhash::fast::FixedState::default().hash_one((kind, key, uid, news));
        tracing::info!(kind, object = %key, reason = news.reason, message = news.message, "object is well");
        let event =
            Event { kind, key: key.clone(), uid: uid.into(), problem: news.clone(), hash, is_good: true };
        self.enqueue(&mut self.lock(), event);
    }

    fn enqueue(&self, content: &mut Content, event: Event) {
        if content.queue.len() >= QUEUE_LIMIT {
            content.queue.pop_front();
            content.dropped += 1;
        }
        content.queue.push_back(event);
        self.inner.queued.notify_one();
    }

    async fn post(&self, client: &kube::Client, event: &Event) -> Result<(), kube::Error> {
        let namespace = if event.key.namespace.is_empty() { "default" } else { &*event.key.namespace };
        let path = format!("/api/v1/namespaces/{namespace}/events");
        let name = event_name(&event.key.name, event.hash);
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let body = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": name, "namespace": namespace },
            "involvedObject": {
                "apiVersion": api_version(event.kind),
                "kind": event.kind,
                "namespace": &*event.key.namespace,
                "name": &*event.key.name,
                "uid": &*event.uid,
            },
            "reason": event.problem.reason,
            "message": clipped(&event.problem.message),
            "type": if event.is_good { "Normal" } else { "Warning" },
            "source": { "component": "ferroute", "host": &*self.inner.node },
            "reportingComponent": "ferroute",
            "reportingInstance": &*self.inner.node,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        let requests = kube::api::Request::new(path);
        let body = serde_json::to_vec(&body).map_err(kube::Error::SerdeError)?;
        let create = requests.create(&PostParams::default(), body).map_err(kube::Error::BuildRequest)?;
        match client.request::<EventCount>(create).await {
            Ok(_) => return Ok(()),
            // Another node said it, or this one did earlier.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error),
        }
        let get = requests.get(&name, &kube::api::GetParams::default()).map_err(kube::Error::BuildRequest)?;
        let known = client.request::<EventCount>(get).await?;
        let patch = json!({ "count": known.count.unwrap_or(1) + 1, "lastTimestamp": now });
        let patch = requests
            .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .map_err(kube::Error::BuildRequest)?;
        client.request::<EventCount>(patch).await.map(|_| ())
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        // Each change leaves the content whole, also when a thread died with the lock.
        self.inner.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(serde::Deserialize)]
struct EventCount {
    count: Option<i64>,
}

/// `NAME.HASH`, within the limit on names.
fn event_name(object: &str, hash: u64) -> String {
    let kept: String = object.chars().take(200).collect();
    format!("{kept}.{hash:016x}")
}

fn clipped(message: &str) -> &str {
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

fn api_version(kind: &str) -> &'static str {
    match kind {
        "EndpointSlice" => "discovery.k8s.io/v1",
        "ServiceCIDR" | "NetworkPolicy" => "networking.k8s.io/v1",
        _ => "v1",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(message: &str) -> Problem {
        Problem { reason: "InvalidAddress", message: message.to_owned() }
    }

    #[test]
    fn says_a_problem_once_and_lists_it_until_resolved() {
        let reporter = Reporter::new("n1");
        let key = ObjectKey::new("shop", "cart");
        for _ in 0..3 {
            reporter.problem("Service", &key, "u1", &problem("a"));
        }
        assert_eq!(reporter.counters(), BTreeMap::from([(("Service", "InvalidAddress"), 1)]));
        assert_eq!(reporter.lock().queue.len(), 1);
        let current = reporter.current();
        assert_eq!(current.len(), 1);
        assert_eq!((&*current[0].name, current[0].message.as_str()), ("cart", "a"));
        reporter.resolved("Service", &key);
        assert!(reporter.current().is_empty());
        // A flapping object does not flood the event list.
        reporter.problem("Service", &key, "u1", &problem("a"));
        assert_eq!(reporter.lock().queue.len(), 1);
        assert_eq!(reporter.current().len(), 1);
    }

    #[test]
    fn rooms_do_not_resolve_each_other() {
        let reporter = Reporter::new("n1");
        let cluster = reporter.room("cluster");
        let key = ObjectKey::new("shop", "cart");
        cluster.replace("Service", &key, "u", &[problem("a"), problem("b")]);
        reporter.problem("Service", &key, "u", &problem("b"));
        assert_eq!(reporter.current().len(), 2, "the same problem of two rooms is listed once");
        reporter.resolved("Service", &key);
        assert_eq!(reporter.current().len(), 2);
        cluster.replace("Service", &key, "u", &[problem("b")]);
        assert_eq!(reporter.current().iter().map(|p| p.message.as_str()).collect::<Vec<_>>(), ["b"]);
        cluster.resolved("Service", &key);
        assert!(reporter.current().is_empty());
    }

    #[test]
    fn good_news_is_no_problem() {
        let reporter = Reporter::new("n1");
        reporter.good_news("Node", &ObjectKey::new("", "n1"), "u", &problem("a"));
        assert!(reporter.current().is_empty() && reporter.counters().is_empty());
        assert!(reporter.lock().queue.front().unwrap().is_good);
    }

    #[test]
    fn queue_and_message_are_bounded() {
        let reporter = Reporter::new("n1");
        for index in 0..QUEUE_LIMIT + 10 {
            let key = ObjectKey::new("shop", format!("s{index}"));
            reporter.problem("Service", &key, "u", &problem("a"));
        }
        assert_eq!(reporter.lock().queue.len(), QUEUE_LIMIT);
        assert_eq!(reporter.dropped_events(), 10);
        assert_eq!(clipped(&"é".repeat(1000)).len(), 1024);
        assert!(event_name(&"x".repeat(10_000), 1).len() <= 253);
    }
}
