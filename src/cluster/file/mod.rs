//! The cluster from a folder instead of an API server (`--manifests`).
//!
//! Every `*.yaml`, `*.yml` and `*.json` below the folder is read; names that begin with a dot are
//! left out. A change costs the files that changed. A document that does not parse is reported with
//! file and line; what its file last gave stays in force until it parses again or is deleted. Kinds
//! that are not watched are passed over. Where a Service has no EndpointSlice, `endpoints` makes
//! one from Pods.

mod endpoints;
mod parse;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use serde::Deserialize;
use serde_json::Value;

use super::feed::{Feed, Stored};
use super::health::WatchHealth;
use super::interests::Interests;
use super::service::Problem;
use super::wire::{
    ApiKind, Item, NamespaceObject, NetworkPolicyObject, NodeObject, PodObject, SecretObject,
    ServiceCidrObject, ServiceObject, SliceObject,
};
use super::{Cluster, Kind, ObjectKey, Unreadable, decode};
use crate::report::Reporter;
use endpoints::Selecting;
use parse::Document;

/// Changes that the kernel did not announce (network file systems) are found this often.
const POLL: Duration = Duration::from_secs(5);
/// A file written less than this ago, and not announced as complete, may still be growing.
const SETTLE: Duration = Duration::from_millis(1000);
/// Announcements come in flocks.
const GATHER: Duration = Duration::from_millis(20);
/// How fast a stop is noticed.
const STOP: Duration = Duration::from_millis(500);
/// A bigger file is a mistake.
const MAX_FILE: u64 = 256 << 20;
/// The namespace of objects that name none.
const DEFAULT_NAMESPACE: &str = "default";
/// The kind under which files are reported.
const REPORTED_AS: &str = "Manifest";

/// A folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, cannot be read or is no folder.
    #[error("--manifests={folder}: {source}; give a folder with YAML or JSON files that this user can read")]
    Folder {
        /// The flag's value.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The reading thread died.
    #[error("the reader of --manifests={folder} ended unexpectedly")]
    Died {
        /// The flag's value.
        folder: PathBuf,
    },
}

/// Keeps `cluster` true to the folder until dropped.
///
/// # Errors
/// When the folder cannot be used at start. One that goes away later is waited for, and the last
/// state stays.
pub async fn watch(
    folder: PathBuf,
    cluster: Cluster,
    interests: &Interests,
    reporter: &Reporter,
) -> Result<(), Error> {
    struct StopOnDrop(Arc<AtomicBool>);
    impl Drop for StopOnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = StopOnDrop(Arc::default());
    let stopped = stop.0.clone();
    let mut reader = Reader::new(folder.clone(), cluster, interests, reporter);
    let thread = tokio::task::spawn_blocking(move || reader.run(&stopped));
    thread.await.map_err(|_| Error::Died { folder })?
}

/// What a file gave when it last parsed, and how to see that it changed.
#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    /// All of it parsed at least once.
    known: bool,
    objects: BTreeSet<(Kind, ObjectKey)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    length: u64,
    modified: SystemTime,
}

struct Reader {
    folder: PathBuf,
    cluster: Cluster,
    interests: Interests,
    health: WatchHealth,
    reporter: Reporter,
    feeds: Feeds,
    files: BTreeMap<PathBuf, File>,
    /// Which file an object was taken from; another file's is refused.
    owners: BTreeMap<(Kind, ObjectKey), PathBuf>,
    selecting: BTreeMap<ObjectKey, Selecting>,
    pods: BTreeMap<ObjectKey, PodObject>,
    /// EndpointSlices that `endpoints` made.
    made: BTreeSet<ObjectKey>,
    /// Files read as a whole, or gone, in this look.
    mended: Vec<Unreadable>,
}

struct Feeds {
    services: Feed<ServiceObject>,
    slices: Feed<SliceObject>,
    nodes: Feed<NodeObject>,
    cidrs: Feed<ServiceCidrObject>,
    pods: Feed<PodObject>,
    namespaces: Feed<NamespaceObject>,
    policies: Feed<NetworkPolicyObject>,
}

impl Reader {
    fn new(folder: PathBuf, cluster: Cluster, interests: &Interests, reporter: &Reporter) -> Self {
        let health = cluster.watch_health();
        // As for kubectl: the namespace of what names none.
        cluster.set_namespace(DEFAULT_NAMESPACE);
        for kind in &interests.kinds {
            health.started(*kind);
        }
        Self {
            folder,
            cluster: cluster.clone(),
            interests: interests.clone(),
            health,
            feeds: Feeds {
                services: Feed::new(cluster.clone(), reporter),
                slices: Feed::new(cluster.clone(), reporter),
                nodes: Feed::new(cluster.clone(), reporter),
                cidrs: Feed::new(cluster.clone(), reporter),
                pods: Feed::new(cluster.clone(), reporter),
                namespaces: Feed::new(cluster.clone(), reporter),
                policies: Feed::new(cluster, reporter),
            },
            reporter: reporter.room("cluster"),
            files: BTreeMap::new(),
            owners: BTreeMap::new(),
            selecting: BTreeMap::new(),
            pods: BTreeMap::new(),
            made: BTreeSet::new(),
            mended: Vec::new(),
        }
    }

    fn run(&mut self, stopped: &AtomicBool) -> Result<(), Error> {
        let failed = |source| Error::Folder { folder: self.folder.clone(), source };
        fs::read_dir(&self.folder).map_err(failed)?;
        let mut announcer = Announcer::new();
        let mut announced = BTreeSet::new();
        let mut first = true;
        while !stopped.load(Ordering::Relaxed) {
            // Watches are added before the folder is read, so no change falls between. Adding one
            // that exists changes nothing.
            let unsettled = self.scan(&mut announcer, &announced, first);
            if first {
                for kind in self.interests.kinds.clone() {
                    if kind == Kind::Secret {
                        self.cluster.set_secrets_complete();
                    }
                    self.feeds.set_listed(kind);
                    self.health.listed(kind);
                }
                first = false;
            }
            announced = announcer.wait(if unsettled { SETTLE } else { POLL }, stopped);
        }
        Ok(())
    }

    /// Reads what changed. True when a file may still be growing and is left for the next look.
    fn scan(&mut self, announcer: &mut Announcer, announced: &BTreeSet<PathBuf>, first: bool) -> bool {
        let folder_key = ObjectKey::new("", self.folder.to_string_lossy().as_ref());
        let mut found = BTreeMap::new();
        if let Err(error) = walk(&self.folder, announcer, &mut found) {
            // Half a view is no view: nothing is deleted for a folder that could not be read.
            let message = format!(
                "cannot read {}: {error}; the last good state stays in force until it can be read",
                self.folder.display()
            );
            for kind in &self.interests.kinds {
                self.health.failed(*kind, &message);
            }
            let problem = Problem { reason: "Unreadable", message };
            self.reporter.replace(REPORTED_AS, &folder_key, "", &[problem]);
            if first {
                self.cluster.set_unreadable(Unreadable::manifest(folder_key), None);
            }
            return true;
        }
        self.reporter.resolved(REPORTED_AS, &folder_key);
        let now = SystemTime::now();
        let (mut unsettled, mut changed) = (false, false);
        let gone: Vec<PathBuf> =
            self.files.keys().filter(|path| !found.contains_key(*path)).cloned().collect();
        // Before the new ones are read: a renamed file gives its objects to the new name. Nothing
        // looks at the cluster in between, or sees two changes of which the second undoes the first.
        let mut orphans = BTreeSet::new();
        for path in gone {
            if let Some(file) = self.files.remove(&path) {
                orphans.extend(file.objects);
            }
            let key = self.file_key(&path);
            self.reporter.resolved(REPORTED_AS, &key);
            self.mended.push(Unreadable::manifest(key));
            changed = true;
        }
        for object in &orphans {
            self.owners.remove(object);
        }
        for (path, stamp) in found {
            if self.files.get(&path).is_some_and(|file| file.stamp == Some(stamp)) {
                continue;
            }
            let fresh = now.duration_since(stamp.modified).is_ok_and(|age| age < SETTLE);
            let complete =
                announced.contains(&path) || path.parent().is_some_and(|folder| announced.contains(folder));
            if !first && fresh && !complete {
                unsettled = true;
                continue;
            }
            orphans.extend(self.read(&path, stamp));
            changed = true;
        }
        if changed {
            let mut reread = false;
            for object in orphans {
                if !self.owners.contains_key(&object) {
                    self.delete(&object);
                    reread = true;
                }
            }
            if reread {
                self.forget_refused();
            }
            self.make_endpoints();
        }
        // Only now that all of it has been taken, made endpoints included.
        self.mended.push(Unreadable::manifest(folder_key));
        for what in std::mem::take(&mut self.mended) {
            self.cluster.set_readable(&what);
        }
        let now = Instant::now();
        for kind in &self.interests.kinds {
            self.health.received(*kind, now);
        }
        unsettled
    }

    /// Reads one file; returns the objects it no longer gives.
    fn read(&mut self, path: &Path, stamp: Stamp) -> Vec<(Kind, ObjectKey)> {
        let mut problems = Vec::new();
        let mut objects = BTreeSet::new();
        let text = if stamp.length > MAX_FILE {
            Err(io::Error::other(format!("{} bytes are too many (limit {MAX_FILE})", stamp.length)))
        } else {
            fs::read(path).and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other))
        };
        let whole = match text {
            Err(error) => {
                problems.push(Problem {
                    reason: "Unreadable",
                    message: format!(
                        "{}: {error}; what the file last gave stays in force, correct it or delete it",
                        path.display()
                    ),
                });
                false
            }
            Ok(text) => {
                let (documents, broken) = parse::parse(path, &text);
                for mistake in &broken {
                    problems.push(Problem {
                        reason: "Unparsable",
                        message: format!(
                            "{}:{}: {}; what this file last gave stays in force, correct it",
                            path.display(),
                            mistake.line,
                            mistake.message
                        ),
                    });
                }
                for document in documents {
                    match self.place(path, &document) {
                        Ok(Some((kind, key))) => {
                            let object = (kind, key);
                            if objects.insert(object.clone()) {
                                self.owners.insert(object.clone(), path.to_owned());
                                self.apply(object, document.value);
                            } else {
                                problems.push(repeated(path, document.line, &object, path));
                            }
                        }
                        Ok(None) => {}
                        Err(problem) => problems.push(problem),
                    }
                }
                broken.is_empty()
            }
        };
        let key = self.file_key(path);
        self.reporter.replace(REPORTED_AS, &key, "", &problems);
        let file = self.files.entry(path.to_owned()).or_default();
        file.stamp = Some(stamp);
        let what = Unreadable::manifest(key);
        if whole {
            file.known = true;
            self.mended.push(what);
        } else if !file.known {
            self.cluster.set_unreadable(what, None);
        }
        let missing: Vec<_> = file.objects.difference(&objects).cloned().collect();
        if whole {
            file.objects = objects;
            for object in &missing {
                self.owners.remove(object);
            }
            missing
        } else {
            file.objects.append(&mut objects);
            Vec::new()
        }
    }

    /// Kind and key of a document that is to be applied; `None` for one that is not for us.
    fn place(&self, path: &Path, document: &Document) -> Result<Option<(Kind, ObjectKey)>, Problem> {
        let at = |what: String| Problem {
            reason: "Unparsable",
            message: format!("{}:{}: {what}; it is ignored, correct it", path.display(), document.line),
        };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (Some(kind), Some(version)) =
            (text(&document.value["kind"]), text(&document.value["apiVersion"]))
        else {
            return Err(at("the document has no kind or no apiVersion".to_owned()));
        };
        let group = version.split_once('/').map_or("", |(group, _)| group);
        let known = match (group, kind.as_str()) {
            ("", "Service") => Kind::Service,
            ("discovery.k8s.io", "EndpointSlice") => Kind::EndpointSlice,
            ("", "Node") => Kind::Node,
            ("networking.k8s.io", "ServiceCIDR") => Kind::ServiceCidr,
            ("", "Pod") => Kind::Pod,
            ("", "Namespace") => Kind::Namespace,
            ("networking.k8s.io", "NetworkPolicy") => Kind::NetworkPolicy,
            ("", "Secret") => Kind::Secret,
            _ => {
                tracing::debug!(path = %path.display(), line = document.line, kind, "manifest of a kind that is not read");
                return Ok(None);
            }
        };
        let metadata = &document.value["metadata"];
        let Some(name) = metadata["name"].as_str().filter(|name| !name.is_empty()) else {
            return Err(at(format!("the {kind} has no metadata.name")));
        };
        let namespace = if namespaced(known) {
            metadata["namespace"].as_str().filter(|name| !name.is_empty()).unwrap_or(DEFAULT_NAMESPACE)
        } else {
            ""
        };
        let object = (known, ObjectKey::new(namespace, name));
        match self.owners.get(&object) {
            Some(owner) if owner != path => Err(repeated(path, document.line, &object, owner)),
            _ => Ok(Some(object)),
        }
    }

    fn apply(&mut self, (kind, key): (Kind, ObjectKey), mut value: Value) {
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut)
            && namespaced(kind)
        {
            metadata.insert("namespace".to_owned(), Value::from(&*key.namespace));
        }
        match kind {
            Kind::Service => {
                if let Some(item) = item::<ServiceObject>(&value) {
                    let spec = &item.object.spec;
                    if spec.selector.is_empty() {
                        self.selecting.remove(&key);
                    } else {
                        let selecting =
                            Selecting { selector: spec.selector.clone(), ports: spec.ports.clone() };
                        self.selecting.insert(key, selecting);
                    }
                    self.feeds.services.apply(item);
                }
            }
            Kind::Pod => {
                if let Some(item) = item::<PodObject>(&value) {
                    self.pods.insert(key, item.object.clone());
                    if self.interests.kinds.contains(&Kind::Pod) {
                        self.feeds.pods.apply(item);
                    }
                }
            }
            _ if !self.interests.kinds.contains(&kind) => {}
            Kind::EndpointSlice => feed(&mut self.feeds.slices, &value),
            Kind::Node => feed(&mut self.feeds.nodes, &value),
            Kind::ServiceCidr => feed(&mut self.feeds.cidrs, &value),
            Kind::Namespace => feed(&mut self.feeds.namespaces, &value),
            Kind::NetworkPolicy => feed(&mut self.feeds.policies, &value),
            Kind::Secret => {
                if let Some(item) = item::<SecretObject>(&value) {
                    self.cluster.apply_secret(key, decode::secret::secret(&item));
                }
            }
        }
    }

    fn delete(&mut self, (kind, key): &(Kind, ObjectKey)) {
        match kind {
            Kind::Service => {
                self.selecting.remove(key);
                self.feeds.services.delete(key);
            }
            Kind::EndpointSlice => self.feeds.slices.delete(key),
            Kind::Node => self.feeds.nodes.delete(key),
            Kind::ServiceCidr => self.feeds.cidrs.delete(key),
            Kind::Pod => {
                self.pods.remove(key);
                self.feeds.pods.delete(key);
            }
            Kind::Namespace => self.feeds.namespaces.delete(key),
            Kind::NetworkPolicy => self.feeds.policies.delete(key),
            Kind::Secret => self.cluster.forget_secret(key),
        }
    }

    /// An object that a second file also has may now be that file's: read such files again. They
    /// are few, being mistakes.
    fn forget_refused(&mut self) {
        let standing = self.reporter.current();
        let keys: BTreeSet<&str> = standing
            .iter()
            .filter(|problem| problem.kind == REPORTED_AS && problem.reason == "Duplicate")
            .map(|problem| &*problem.name)
            .collect();
        let paths: Vec<PathBuf> =
            self.files.keys().filter(|path| keys.contains(&*self.file_key(path).name)).cloned().collect();
        for path in paths {
            if let Some(stamp) = self.files.get(&path).and_then(|file| file.stamp) {
                // Only adds: what it no longer gives was noticed when it changed.
                self.read(&path, stamp);
            }
        }
    }

    fn make_endpoints(&mut self) {
        if self.pods.is_empty() && self.made.is_empty() {
            return;
        }
        let served: BTreeSet<&ObjectKey> = self
            .feeds
            .slices
            .known()
            .filter(|(key, _)| !self.made.contains(*key))
            .map(|(_, service)| service)
            .collect();
        let mut wanted = BTreeMap::new();
        for (service, selecting) in &self.selecting {
            if !served.contains(service) {
                for (name, slice) in endpoints::slices(service, selecting, &self.pods) {
                    wanted.insert(ObjectKey::new(service.namespace.clone(), name), slice);
                }
            }
        }
        for key in &self.made {
            if !wanted.contains_key(key) {
                self.feeds.slices.delete(key);
            }
        }
        self.made = wanted.keys().cloned().collect();
        for slice in wanted.into_values() {
            self.feeds.slices.apply(Item::new(slice));
        }
    }

    fn file_key(&self, path: &Path) -> ObjectKey {
        ObjectKey::new("", path.to_string_lossy().as_ref())
    }
}

impl Feeds {
    fn set_listed(&mut self, kind: Kind) {
        match kind {
            Kind::Service => self.services.set_listed(),
            Kind::EndpointSlice => self.slices.set_listed(),
            Kind::Node => self.nodes.set_listed(),
            Kind::ServiceCidr => self.cidrs.set_listed(),
            Kind::Pod => self.pods.set_listed(),
            Kind::Namespace => self.namespaces.set_listed(),
            Kind::NetworkPolicy => self.policies.set_listed(),
            // Nobody waits for Secrets as a kind.
            Kind::Secret => {}
        }
    }
}

fn namespaced(kind: Kind) -> bool {
    !matches!(kind, Kind::Node | Kind::ServiceCidr | Kind::Namespace)
}

fn repeated(path: &Path, line: usize, (kind, key): &(Kind, ObjectKey), owner: &Path) -> Problem {
    Problem {
        reason: "Duplicate",
        message: format!(
            "{}:{line}: {kind} {key} is already in {}; this one is ignored, remove one of them",
            path.display(),
            owner.display()
        ),
    }
}

/// Decoding takes any value, so this is `None` only in theory.
fn item<T: ApiKind>(value: &Value) -> Option<Item<T>> {
    Item::deserialize(value).ok()
}

fn feed<T: Stored>(feed: &mut Feed<T>, value: &Value) {
    if let Some(item) = item(value) {
        feed.apply(item);
    }
}

/// The kernel's announcements of changed files.
struct Announcer {
    inotify: Option<Inotify>,
    folders: HashMap<WatchDescriptor, PathBuf>,
}

impl Announcer {
    fn new() -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        if let Err(errno) = &inotify {
            tracing::warn!(%errno, "cannot be told of changed manifests; looking every 5 seconds");
        }
        Self { inotify: inotify.ok(), folders: HashMap::new() }
    }

    /// Watches a folder; doing so again changes nothing.
    fn watch(&mut self, folder: &Path) {
        let Some(inotify) = &self.inotify else { return };
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_ONLYDIR;
        match inotify.add_watch(folder, flags) {
            Ok(descriptor) => {
                self.folders.insert(descriptor, folder.to_owned());
            }
            Err(errno) => {
                tracing::debug!(folder = %folder.display(), %errno, "folder is not watched, only looked at");
            }
        }
    }

    /// Waits for an announcement; returns the files that are complete. A folder among them means
    /// all of its files.
    fn wait(&mut self, timeout: Duration, stopped: &AtomicBool) -> BTreeSet<PathBuf> {
        let mut complete = BTreeSet::new();
        let deadline = Instant::now() + timeout;
        while !stopped.load(Ordering::Relaxed) {
            let left = deadline.saturating_duration_since(Instant::now()).min(STOP);
            if left.is_zero() {
                break;
            }
            let Some(inotify) = &self.inotify else {
                std::thread::sleep(left);
                continue;
            };
            let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
            // Up to the millisecond, or the last part of one would be spent spinning.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            if !poll(&mut fds, timeout).is_ok_and(|ready| ready > 0) {
                continue;
            }
            std::thread::sleep(GATHER);
            while let Ok(events) = inotify.read_events() {
                for event in events {
                    if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                        self.folders.remove(&event.wd);
                        continue;
                    }
                    let done = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
                    if let (Some(folder), Some(name)) = (self.folders.get(&event.wd), event.name)
                        && event.mask.intersects(done)
                    {
                        if name.as_encoded_bytes().starts_with(b"..") {
                            // A mounted ConfigMap: its files change by renaming one link.
                            complete.insert(folder.clone());
                        } else {
                            complete.insert(folder.join(name));
                        }
                    }
                }
            }
            break;
        }
        complete
    }
}

/// Finds the files and watches the folders they are in.
fn walk(folder: &Path, announcer: &mut Announcer, found: &mut BTreeMap<PathBuf, Stamp>) -> io::Result<()> {
    announcer.watch(folder);
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // Files are followed through links (a mounted ConfigMap is made of them), folders are not:
        // they may lead in circles.
        if entry.file_type()?.is_dir() {
            match walk(&path, announcer, found) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
            continue;
        }
        let wanted = path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| {
            matches!(extension.to_ascii_lowercase().as_str(), "yaml" | "yml" | "json")
        });
        if !wanted {
            continue;
        }
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                let stamp =
                    Stamp { inode: metadata.ino(), length: metadata.len(), modified: metadata.modified()? };
                found.insert(path, stamp);
            }
            Ok(_) => {}
            // Gone since the folder was read, or a link to nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests;
