//! One kind's way into the [`Cluster`]: decode, store, report; a relist drops what it did not name.
//!
//! The API watches and the folder reader both end here, so they mean the same.

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};

use super::decode::endpoints::{PlacedSlice, Shared};
use super::decode::{self, Decoded, shortened};
use super::service::Problem;
use super::wire::{
    ApiKind, Item, NamespaceObject, NetworkPolicyObject, NodeObject, PodObject, ServiceCidrObject,
    ServiceObject, SliceObject,
};
use super::{Cluster, ObjectKey, ServiceKey, Unreadable};
use crate::report::Reporter;

/// A kind that can be stored.
pub trait Stored: ApiKind {
    /// Where an object is stored, beyond its key.
    type Place: Clone + PartialEq + Send;
    /// What objects of the kind share.
    type Shared: Default + Send;

    /// Decodes and stores; on success says where, and what was wrong in part.
    fn store(
        item: Item<Self>,
        cluster: &Cluster,
        shared: &mut Self::Shared,
    ) -> Decoded<(Self::Place, Vec<Problem>)>;

    /// Forgets.
    fn forget(key: &ObjectKey, place: &Self::Place, cluster: &Cluster);

    /// The only Service whose endpoints an object may tell, where it can be read that far.
    fn tells_endpoints_of(_: &Item<Self>) -> Option<ServiceKey> {
        None
    }
}

/// Feeds one kind into the cluster.
pub struct Feed<T: Stored> {
    cluster: Cluster,
    reporter: Reporter,
    shared: T::Shared,
    known: HashMap<ObjectKey, T::Place>,
    /// Those that cannot be parsed and are not known.
    unreadable: HashSet<ObjectKey>,
    listing: Option<Listing>,
}

#[derive(Default)]
struct Listing {
    seen: HashSet<ObjectKey>,
    /// An object whose name cannot be read may be any of the known ones.
    nameless: bool,
}

impl<T: Stored> Feed<T> {
    /// A feed that knows nothing yet.
    pub fn new(cluster: Cluster, reporter: &Reporter) -> Self {
        Self {
            cluster,
            reporter: reporter.room("cluster"),
            shared: T::Shared::default(),
            known: HashMap::new(),
            unreadable: HashSet::new(),
            listing: None,
        }
    }

    /// A complete list starts.
    pub fn begin_list(&mut self) {
        self.listing = Some(Listing { seen: HashSet::with_capacity(self.known.len()), nameless: false });
    }

    /// The list is complete: what it did not name is gone.
    pub fn end_list(&mut self) {
        let Some(listing) = self.listing.take() else { return };
        if !listing.nameless {
            let gone: Vec<ObjectKey> = self
                .known
                .keys()
                .chain(&self.unreadable)
                .filter(|key| !listing.seen.contains(*key))
                .cloned()
                .collect();
            for key in gone {
                self.delete(&key);
            }
        }
        self.set_listed();
    }

    /// The first list is complete, or there is nothing to list.
    pub fn set_listed(&self) {
        self.cluster.set_listed(T::KIND);
    }

    /// An object as it is now.
    pub fn apply(&mut self, item: Item<T>) {
        let metadata = item.object.metadata();
        let uid = metadata.uid.clone();
        let key = match decode::key(metadata) {
            Ok(key) => key,
            Err(problem) => {
                if metadata.name.is_empty()
                    && let Some(listing) = &mut self.listing
                {
                    listing.nameless = true;
                    self.set_unreadable(ObjectKey::new("", ""), None);
                }
                let key = ObjectKey::new(shortened(&metadata.namespace), shortened(&metadata.name));
                self.reporter.problem(T::KIND.name(), &key, &uid, &problem);
                return;
            }
        };
        if let Some(listing) = &mut self.listing {
            listing.seen.insert(key.clone());
        }
        let unknown = !self.known.contains_key(&key);
        let service = if unknown { T::tells_endpoints_of(&item) } else { None };
        match T::store(item, &self.cluster, &mut self.shared) {
            Decoded::Ours((place, problems)) => {
                self.set_readable(&key);
                if let Some(before) = self.known.insert(key.clone(), place.clone())
                    && before != place
                {
                    T::forget(&key, &before, &self.cluster);
                }
                self.reporter.replace(T::KIND.name(), &key, &uid, &problems);
            }
            Decoded::NotOurs => self.delete(&key),
            Decoded::Broken(problem) => {
                self.reporter.replace(T::KIND.name(), &key, &uid, &[problem]);
                if unknown {
                    self.set_unreadable(key, service);
                }
            }
        }
    }

    fn set_unreadable(&mut self, key: ObjectKey, service: Option<ServiceKey>) {
        self.cluster.set_unreadable(Unreadable::object(T::KIND, key.clone()), service);
        self.unreadable.insert(key);
    }

    fn set_readable(&mut self, key: &ObjectKey) {
        if self.unreadable.remove(key) {
            self.cluster.set_readable(&Unreadable::object(T::KIND, key.clone()));
        }
    }

    /// The objects that are stored, with their places.
    pub fn known(&self) -> impl Iterator<Item = (&ObjectKey, &T::Place)> {
        self.known.iter()
    }

    /// The server says an object is gone.
    pub fn delete_item(&mut self, item: &Item<T>) {
        if let Ok(key) = decode::key(item.object.metadata()) {
            self.delete(&key);
        }
    }

    /// An object is gone.
    pub fn delete(&mut self, key: &ObjectKey) {
        if let Some(place) = self.known.remove(key) {
            T::forget(key, &place, &self.cluster);
        }
        self.set_readable(key);
        self.reporter.resolved(T::KIND.name(), key);
    }
}

impl Stored for ServiceObject {
    type Place = ();
    type Shared = ();

    fn store(item: Item<Self>, cluster: &Cluster, (): &mut ()) -> Decoded<((), Vec<Problem>)> {
        match decode::service::service(item) {
            Decoded::Ours(service) => {
                let problems = service.problems.clone();
                cluster.apply_service(service);
                Decoded::Ours(((), problems))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, (): &(), cluster: &Cluster) {
        cluster.delete_service(key);
    }
}

impl Stored for SliceObject {
    type Place = ServiceKey;
    type Shared = Shared;

    fn store(
        item: Item<Self>,
        cluster: &Cluster,
        shared: &mut Shared,
    ) -> Decoded<(ServiceKey, Vec<Problem>)> {
        match decode::endpoints::slice(item, shared) {
            Decoded::Ours(PlacedSlice { key, service, slice, triggered, problems }) => {
                cluster.apply_slice_of(service.clone(), key.name, slice, triggered);
                Decoded::Ours((service, problems))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, service: &ServiceKey, cluster: &Cluster) {
        cluster.delete_slice(service, &key.name);
    }

    fn tells_endpoints_of(item: &Item<Self>) -> Option<ServiceKey> {
        decode::endpoints::service_of(&item.object.metadata)
    }
}

impl Stored for NodeObject {
    type Place = ();
    type Shared = ();

    fn store(item: Item<Self>, cluster: &Cluster, (): &mut ()) -> Decoded<((), Vec<Problem>)> {
        match decode::node::node(item) {
            Decoded::Ours((node, problems)) => {
                cluster.apply_node(node);
                Decoded::Ours(((), problems))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, (): &(), cluster: &Cluster) {
        cluster.delete_node(&key.name);
    }
}

impl Stored for ServiceCidrObject {
    type Place = ();
    type Shared = ();

    fn store(item: Item<Self>, cluster: &Cluster, (): &mut ()) -> Decoded<((), Vec<Problem>)> {
        match decode::node::service_cidr(item) {
            Decoded::Ours((name, ranges, problems)) => {
                cluster.apply_service_cidr(name, ranges);
                Decoded::Ours(((), problems))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, (): &(), cluster: &Cluster) {
        cluster.apply_service_cidr(key.name.clone(), Vec::new());
    }
}

impl Stored for PodObject {
    type Place = ();
    type Shared = decode::workload::Shared;

    fn store(item: Item<Self>, cluster: &Cluster, shared: &mut Self::Shared) -> Decoded<((), Vec<Problem>)> {
        match decode::workload::pod(item, shared) {
            Decoded::Ours(pod) => {
                cluster.apply_pod(pod);
                Decoded::Ours(((), Vec::new()))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, (): &(), cluster: &Cluster) {
        cluster.delete_pod(key);
    }
}

impl Stored for NamespaceObject {
    type Place = ();
    type Shared = ();

    fn store(item: Item<Self>, cluster: &Cluster, (): &mut ()) -> Decoded<((), Vec<Problem>)> {
        match decode::workload::namespace(item) {
            Decoded::Ours(namespace) => {
                cluster.apply_namespace(namespace);
                Decoded::Ours(((), Vec::new()))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, (): &(), cluster: &Cluster) {
        cluster.delete_namespace(&key.name);
    }
}

impl Stored for NetworkPolicyObject {
    type Place = ();
    type Shared = ();

    fn store(item: Item<Self>, cluster: &Cluster, (): &mut ()) -> Decoded<((), Vec<Problem>)> {
        match decode::network_policy::network_policy(item) {
            Decoded::Ours(policy) => {
                let problems = policy.problems.clone();
                cluster.apply_network_policy(policy);
                Decoded::Ours(((), problems))
            }
            Decoded::NotOurs => Decoded::NotOurs,
            Decoded::Broken(problem) => Decoded::Broken(problem),
        }
    }

    fn forget(key: &ObjectKey, (): &(), cluster: &Cluster) {
        cluster.delete_network_policy(key);
    }
}
