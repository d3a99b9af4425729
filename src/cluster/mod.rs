//! What the cluster wants, as this node sees it.
//!
//! [`State`] is plain data with lookups. One writer (the API watches in `watch`, or the folder
//! reader in `file`) applies whole objects through [`Cluster`]; each room holds a [`Subscription`]
//! that collects the keys that changed since it last looked, so no queue grows and a burst of
//! events costs one wake-up. No socket, no clock and no Kubernetes client type lives in here.

pub mod access;
mod decode;
pub mod endpoints;
mod feed;
pub mod file;
pub mod health;
mod interests;
pub mod network_policy;
pub mod node;
pub mod secret;
pub mod service;
pub mod source;
mod token;
pub(crate) mod trouble;
mod unreadable;
mod watch;
pub mod wire;
pub mod workload;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;

use endpoints::{Slice, Slices};
use network_policy::NetworkPolicy;
use node::Node;
use secret::Secrets;
use service::Service;
use workload::{Namespace, Pod};

pub use access::Access;
pub use health::WatchHealth;
pub use interests::Interests;
pub use source::{Error, Source, run};
pub use unreadable::Unreadable;

/// Namespace and name of an object.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// `metadata.namespace`; empty for cluster-scoped objects.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// A key from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{}", self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The key of a Service.
pub type ServiceKey = ObjectKey;

/// Kinds of objects that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// core/v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// core/v1 Node.
    Node,
    /// networking.k8s.io/v1 ServiceCIDR; servers without it count as listed with none.
    ServiceCidr,
    /// core/v1 Pod.
    Pod,
    /// core/v1 Namespace.
    Namespace,
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy,
    /// core/v1 Secret: single ones, while a room wants them ([`Cluster::want_secrets`]).
    Secret,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::ServiceCidr,
        Self::Pod,
        Self::Namespace,
        Self::NetworkPolicy,
        Self::Secret,
    ];

    /// The kind as written in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
            Kind::Pod => "Pod",
            Kind::Namespace => "Namespace",
            Kind::NetworkPolicy => "NetworkPolicy",
            Kind::Secret => "Secret",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Everything known about the cluster. Read through [`Cluster::read`].
#[derive(Debug, Default)]
pub struct State {
    /// Services that this proxy handles (headless, ExternalName and foreign ones are left out).
    pub services: HashMap<ServiceKey, Arc<Service>>,
    /// EndpointSlices by the Service they belong to, then by slice name. Slices that arrive before
    /// their Service wait here: nothing reads them until the Service exists.
    pub slices: HashMap<ServiceKey, Slices>,
    /// Nodes by name.
    pub nodes: HashMap<Arc<str>, Arc<Node>>,
    /// CIDRs of ServiceCIDR objects that are ready, by object name.
    pub service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    /// Pods; only when a room asked for them.
    pub pods: HashMap<ObjectKey, Arc<Pod>>,
    /// Namespaces by name; only when a room asked for them.
    pub namespaces: HashMap<Arc<str>, Arc<Namespace>>,
    /// NetworkPolicies; only when a room asked for them.
    pub network_policies: HashMap<ObjectKey, Arc<NetworkPolicy>>,
    /// Secrets that a room wanted.
    pub secrets: Secrets,
    /// Kinds whose first list is complete. No room acts on a kind before that.
    pub listed: BTreeSet<Kind>,
    /// What cannot be parsed and has no last good state, with the Service whose endpoints alone it
    /// may tell, where that is known.
    pub unreadable: BTreeMap<Unreadable, Option<ServiceKey>>,
}

impl State {
    /// Whether the first list of all these kinds is complete.
    pub fn has_listed(&self, kinds: &[Kind]) -> bool {
        kinds.iter().all(|kind| self.listed.contains(kind))
    }
}

/// Keys that changed since a room last looked.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Dirty {
    /// Services whose own object or any of whose slices changed, appeared or went.
    pub services: BTreeSet<ServiceKey>,
    /// Nodes that changed, appeared or went.
    pub nodes: BTreeSet<Arc<str>>,
    /// Whether the set of service CIDRs changed.
    pub service_cidrs: bool,
    /// Pods that changed, appeared or went.
    pub pods: BTreeSet<ObjectKey>,
    /// Namespaces that changed, appeared or went.
    pub namespaces: BTreeSet<Arc<str>>,
    /// NetworkPolicies that changed, appeared or went.
    pub network_policies: BTreeSet<ObjectKey>,
    /// Whether something about Secrets changed.
    pub secrets: bool,
    /// Whether a kind finished its first list.
    pub listed: bool,
    /// Whether [`State::unreadable`] changed.
    pub unreadable: bool,
    /// When the oldest of these changes was decoded (for latency metrics).
    pub since: Option<Instant>,
    /// When the oldest change of a Service's endpoints happened, where its EndpointSlice says so.
    pub triggered: BTreeMap<ServiceKey, SystemTime>,
}

impl Dirty {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
            && self.nodes.is_empty()
            && self.pods.is_empty()
            && self.namespaces.is_empty()
            && self.network_policies.is_empty()
            && !self.service_cidrs
            && !self.secrets
            && !self.listed
            && !self.unreadable
    }
}

/// The shared state: one writer, many readers. Cheap to clone.
#[derive(Clone, Default)]
pub struct Cluster {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    subscribers: Mutex<Vec<Arc<Inbox>>>,
    wanted_secrets: tokio::sync::watch::Sender<BTreeSet<ObjectKey>>,
    health: WatchHealth,
}

#[derive(Default)]
struct Inbox {
    /// Only changes of these are collected.
    kinds: BTreeSet<Kind>,
    content: Mutex<InboxContent>,
    arrived: Condvar,
}

#[derive(Default)]
struct InboxContent {
    dirty: Dirty,
    /// Set by [`Waker::wake`]: end the wait although nothing in the cluster changed.
    woken: bool,
    /// The reader sleeps. Waking one that does not would be a system call per object of a list.
    waiting: bool,
}

/// A room's view of what changed. Dropping it unsubscribes.
pub struct Subscription {
    inbox: Arc<Inbox>,
    cluster: Cluster,
}

/// Ends another thread's [`Subscription::wait`], e.g. for an orderly stop.
#[derive(Clone)]
pub struct Waker {
    inbox: Arc<Inbox>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means a thread panicked while writing plain data; each write is one insert or
    // remove, so the data is still whole, and the supervisor ends the process anyway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cluster {
    /// An empty cluster of which nothing has been listed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Locks the state for reading. Hold it only while computing, never across IO.
    pub fn read(&self) -> MutexGuard<'_, State> {
        lock(&self.inner.state)
    }

    /// Starts collecting changes of every kind. Everything already known counts as changed.
    pub fn subscribe(&self) -> Subscription {
        self.subscribe_to(&Kind::ALL)
    }

    /// Starts collecting changes of these kinds; others do not wake the reader. Everything already
    /// known counts as changed.
    pub fn subscribe_to(&self, kinds: &[Kind]) -> Subscription {
        let inbox = Arc::new(Inbox { kinds: kinds.iter().copied().collect(), ..Inbox::default() });
        let wants = |kind| inbox.kinds.contains(&kind);
        let state = self.read();
        {
            let mut content = lock(&inbox.content);
            let dirty = &mut content.dirty;
            if wants(Kind::Service) || wants(Kind::EndpointSlice) {
                dirty.services = state.services.keys().cloned().collect();
            }
            if wants(Kind::Node) {
                dirty.nodes = state.nodes.keys().cloned().collect();
            }
            if wants(Kind::Pod) {
                dirty.pods = state.pods.keys().cloned().collect();
            }
            if wants(Kind::Namespace) {
                dirty.namespaces = state.namespaces.keys().cloned().collect();
            }
            if wants(Kind::NetworkPolicy) {
                dirty.network_policies = state.network_policies.keys().cloned().collect();
            }
            dirty.service_cidrs = wants(Kind::ServiceCidr) && !state.service_cidrs.is_empty();
            dirty.secrets = wants(Kind::Secret) && !state.secrets.known.is_empty();
            dirty.listed = state.listed.iter().any(|kind| wants(*kind));
            dirty.unreadable = state.unreadable.keys().any(|what| what.kind.is_none_or(wants));
            if !dirty.is_empty() {
                dirty.since = Some(Instant::now());
            }
        }
        lock(&self.inner.subscribers).push(inbox.clone());
        drop(state);
        Subscription { inbox, cluster: self.clone() }
    }

    /// Stores a Service; wakes readers only if it differs from the one known.
    pub fn apply_service(&self, service: Service) {
        let key = service.key.clone();
        let mut state = self.read();
        if state.services.get(&key).is_some_and(|known| **known == service) {
            return;
        }
        state.services.insert(key.clone(), Arc::new(service));
        drop(state);
        self.mark(Kind::Service, |dirty| {
            dirty.services.insert(key.clone());
        });
    }

    /// Forgets a Service (deleted, or no longer ours to serve).
    pub fn delete_service(&self, key: &ServiceKey) {
        if self.read().services.remove(key).is_some() {
            self.mark(Kind::Service, |dirty| {
                dirty.services.insert(key.clone());
            });
        }
    }

    /// Stores an EndpointSlice under its Service; wakes readers only if it differs.
    pub fn apply_slice(&self, service: ServiceKey, name: Arc<str>, slice: Slice) {
        self.apply_slice_of(service, name, slice, None);
    }

    /// The same for a change that happened at the time `triggered`.
    pub fn apply_slice_of(
        &self,
        service: ServiceKey,
        name: Arc<str>,
        slice: Slice,
        triggered: Option<SystemTime>,
    ) {
        let mut state = self.read();
        let slices = state.slices.entry(service.clone()).or_default();
        if slices.get(&name).is_some_and(|known| **known == slice) {
            return;
        }
        slices.insert(name, Arc::new(slice));
        let known = state.services.contains_key(&service);
        drop(state);
        if known {
            self.mark(Kind::EndpointSlice, |dirty| {
                dirty.services.insert(service.clone());
                if let Some(at) = triggered {
                    let first = dirty.triggered.entry(service.clone()).or_insert(at);
                    *first = at.min(*first);
                }
            });
        }
    }

    /// Forgets an EndpointSlice.
    pub fn delete_slice(&self, service: &ServiceKey, name: &str) {
        let mut state = self.read();
        let Some(slices) = state.slices.get_mut(service) else { return };
        if slices.remove(name).is_none() {
            return;
        }
        if slices.is_empty() {
            state.slices.remove(service);
        }
        let known = state.services.contains_key(service);
        drop(state);
        if known {
            self.mark(Kind::EndpointSlice, |dirty| {
                dirty.services.insert(service.clone());
            });
        }
    }

    /// Stores a Node; wakes readers only if it differs.
    pub fn apply_node(&self, node: Node) {
        let name = node.name.clone();
        let mut state = self.read();
        if state.nodes.get(&name).is_some_and(|known| **known == node) {
            return;
        }
        state.nodes.insert(name.clone(), Arc::new(node));
        self.mark(Kind::Node, |dirty| {
            dirty.nodes.insert(name.clone());
        });
    }

    /// Forgets a Node.
    pub fn delete_node(&self, name: &str) {
        let removed = self.read().nodes.remove_entry(name);
        if let Some((name, _)) = removed {
            self.mark(Kind::Node, |dirty| {
                dirty.nodes.insert(name.clone());
            });
        }
    }

    /// Stores the CIDRs of one ServiceCIDR object; an empty list forgets it.
    pub fn apply_service_cidr(&self, name: Arc<str>, cidrs: Vec<IpNet>) {
        let mut state = self.read();
        let changed = if cidrs.is_empty() {
            state.service_cidrs.remove(&name).is_some()
        } else {
            state.service_cidrs.insert(name, cidrs.clone()) != Some(cidrs)
        };
        if changed {
            self.mark(Kind::ServiceCidr, |dirty| dirty.service_cidrs = true);
        }
    }

    /// Stores a Pod; wakes readers only if it differs.
    pub fn apply_pod(&self, pod: Pod) {
        let key = pod.key.clone();
        let mut state = self.read();
        if state.pods.get(&key).is_some_and(|known| **known == pod) {
            return;
        }
        state.pods.insert(key.clone(), Arc::new(pod));
        self.mark(Kind::Pod, |dirty| {
            dirty.pods.insert(key.clone());
        });
    }

    /// Forgets a Pod.
    pub fn delete_pod(&self, key: &ObjectKey) {
        if self.read().pods.remove(key).is_some() {
            self.mark(Kind::Pod, |dirty| {
                dirty.pods.insert(key.clone());
            });
        }
    }

    /// Stores a Namespace; wakes readers only if it differs.
    pub fn apply_namespace(&self, namespace: Namespace) {
        let name = namespace.name.clone();
        let mut state = self.read();
        if state.namespaces.get(&name).is_some_and(|known| **known == namespace) {
            return;
        }
        state.namespaces.insert(name.clone(), Arc::new(namespace));
        self.mark(Kind::Namespace, |dirty| {
            dirty.namespaces.insert(name.clone());
        });
    }

    /// Forgets a Namespace.
    pub fn delete_namespace(&self, name: &str) {
        let removed = self.read().namespaces.remove_entry(name);
        if let Some((name, _)) = removed {
            self.mark(Kind::Namespace, |dirty| {
                dirty.namespaces.insert(name.clone());
            });
        }
    }

    /// Stores a NetworkPolicy; wakes readers only if it differs.
    pub fn apply_network_policy(&self, policy: NetworkPolicy) {
        let key = policy.key.clone();
        let mut state = self.read();
        if state.network_policies.get(&key).is_some_and(|known| **known == policy) {
            return;
        }
        state.network_policies.insert(key.clone(), Arc::new(policy));
        self.mark(Kind::NetworkPolicy, |dirty| {
            dirty.network_policies.insert(key.clone());
        });
    }

    /// Forgets a NetworkPolicy.
    pub fn delete_network_policy(&self, key: &ObjectKey) {
        if self.read().network_policies.remove(key).is_some() {
            self.mark(Kind::NetworkPolicy, |dirty| {
                dirty.network_policies.insert(key.clone());
            });
        }
    }

    /// How the watches (or the folder reader) are doing.
    pub fn watch_health(&self) -> WatchHealth {
        self.inner.health.clone()
    }

    /// Records that the first list of a kind is complete.
    pub fn set_listed(&self, kind: Kind) {
        if self.read().listed.insert(kind) {
            self.mark(kind, |dirty| dirty.listed = true);
        }
    }

    /// Adds a change to the inbox of everyone who reads that kind, and wakes them.
    fn mark(&self, kind: Kind, change: impl Fn(&mut Dirty)) {
        for inbox in lock(&self.inner.subscribers).iter().filter(|inbox| inbox.kinds.contains(&kind)) {
            let mut content = lock(&inbox.content);
            change(&mut content.dirty);
            // Only the oldest change needs a time.
            content.dirty.since.get_or_insert_with(Instant::now);
            let waiting = std::mem::take(&mut content.waiting);
            // Who wakes up needs the lock at once.
            drop(content);
            if waiting {
                inbox.arrived.notify_all();
            }
        }
    }
}

impl Subscription {
    /// Waits until something changed, [`Waker::wake`] was called or `timeout` passed, and takes
    /// what changed. A quick burst is gathered: once something arrived, waits `gather` for more.
    pub fn wait(&self, timeout: Duration, gather: Duration) -> Dirty {
        let deadline = Instant::now() + timeout;
        let mut content = lock(&self.inbox.content);
        while content.dirty.is_empty() && !content.woken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            content.waiting = true;
            content =
                self.inbox.arrived.wait_timeout(content, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        content.waiting = false;
        if !gather.is_zero() && !content.woken && !content.dirty.is_empty() {
            drop(content);
            std::thread::sleep(gather);
            content = lock(&self.inbox.content);
        }
        content.woken = false;
        std::mem::take(&mut content.dirty)
    }

    /// Once all of these kinds are listed: what changed since the last [`Subscription::wait`]. The two belong
    /// together: a list may end between a wait and a look at what is listed, and a room that decided then
    /// would take what that list brought for objects that are gone.
    pub fn take_listed(&self, kinds: &[Kind]) -> Option<Dirty> {
        // A kind counts as listed only after its objects were marked.
        self.cluster.read().has_listed(kinds).then(|| std::mem::take(&mut lock(&self.inbox.content).dirty))
    }

    /// The cluster this subscription reads.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// A handle that ends [`Subscription::wait`] from another thread.
    pub fn waker(&self) -> Waker {
        Waker { inbox: self.inbox.clone() }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.cluster.inner.subscribers).retain(|inbox| !Arc::ptr_eq(inbox, &self.inbox));
    }
}

impl Waker {
    /// Ends the wait of the subscription this came from.
    pub fn wake(&self) {
        lock(&self.inbox.content).woken = true;
        self.inbox.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> Service {
        Service {
            key: ObjectKey::new("shop", name),
            uid: "u".into(),
            created: 0,
            kind: service::ServiceType::ClusterIp,
            cluster_ips: Vec::new(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: Vec::new(),
            affinity: None,
            external_policy: service::TrafficPolicy::Cluster,
            internal_policy: service::TrafficPolicy::Cluster,
            health_check_node_port: None,
            source_ranges: Vec::new(),
            publish_not_ready: false,
            annotations: service::Annotations::default(),
            problems: Vec::new(),
        }
    }

    fn taken(subscription: &Subscription) -> Dirty {
        subscription.wait(Duration::ZERO, Duration::ZERO)
    }

    #[test]
    fn only_what_differs_wakes_and_only_its_key() {
        let cluster = Cluster::new();
        cluster.apply_service(service("a"));
        let subscription = cluster.subscribe();
        assert_eq!(taken(&subscription).services.len(), 1, "what was known before counts as changed");
        cluster.apply_service(service("a"));
        assert!(taken(&subscription).is_empty());
        cluster.apply_service(service("b"));
        let dirty = taken(&subscription);
        assert_eq!(dirty.services, BTreeSet::from([ObjectKey::new("shop", "b")]));
        assert!(dirty.since.is_some());
        cluster.delete_service(&ObjectKey::new("shop", "gone"));
        assert!(taken(&subscription).is_empty());
    }

    #[test]
    fn a_reader_is_woken_by_its_own_kinds_only() {
        let cluster = Cluster::new();
        cluster.apply_service(service("a"));
        let subscription = cluster.subscribe_to(&[Kind::Namespace]);
        assert!(taken(&subscription).is_empty());
        cluster.apply_service(service("b"));
        cluster.set_listed(Kind::Service);
        assert!(taken(&subscription).is_empty());
        cluster.apply_namespace(Namespace { name: "shop".into(), ..Namespace::default() });
        cluster.set_listed(Kind::Namespace);
        let dirty = taken(&subscription);
        assert!(dirty.namespaces.contains("shop") && dirty.listed);
    }

    #[test]
    fn early_slices_wait_for_their_service() {
        let cluster = Cluster::new();
        let subscription = cluster.subscribe();
        let key = ObjectKey::new("shop", "a");
        cluster.apply_slice(key.clone(), "a-1".into(), Slice::default());
        assert!(taken(&subscription).is_empty(), "nobody serves it yet");
        cluster.apply_service(service("a"));
        assert!(taken(&subscription).services.contains(&key));
        assert_eq!(cluster.read().slices[&key].len(), 1);
        cluster.delete_slice(&key, "a-1");
        assert!(taken(&subscription).services.contains(&key));
        assert!(cluster.read().slices.is_empty());
    }

    #[test]
    fn what_a_list_brought_comes_with_its_end() {
        let cluster = Cluster::new();
        let subscription = cluster.subscribe();
        cluster.set_listed(Kind::Namespace);
        assert!(taken(&subscription).services.is_empty());
        assert!(subscription.take_listed(&[Kind::Namespace, Kind::Service]).is_none());
        // Between a wait and the look at what is listed.
        cluster.apply_service(service("a"));
        cluster.set_listed(Kind::Service);
        let dirty = subscription.take_listed(&[Kind::Namespace, Kind::Service]).unwrap();
        assert!(dirty.listed && dirty.services.contains(&ObjectKey::new("shop", "a")));
        assert!(taken(&subscription).is_empty());
    }

    #[test]
    fn a_kind_is_listed_once_and_a_waker_ends_a_wait() {
        let cluster = Cluster::new();
        let subscription = cluster.subscribe();
        cluster.set_listed(Kind::Service);
        assert!(taken(&subscription).listed);
        cluster.set_listed(Kind::Service);
        assert!(taken(&subscription).is_empty());
        assert!(!cluster.read().has_listed(&[Kind::Service, Kind::Node]));
        subscription.waker().wake();
        let started = Instant::now();
        assert!(subscription.wait(Duration::from_secs(60), Duration::ZERO).is_empty());
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
