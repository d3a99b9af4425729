//! Objects by resource, namespace and name; one revision counter; a bounded history per resource.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;

use crate::selector::{Labels, Scope};
use crate::status::Refusal;

/// Namespace (empty for cluster-scoped objects) and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Namespace, empty for cluster-scoped objects.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Key {
    /// A key from its parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// One version of one object, serialised once.
#[derive(Debug)]
pub struct Object {
    /// Where it lives.
    pub key: Key,
    /// The revision that wrote it.
    pub revision: u64,
    /// `metadata.labels`.
    pub labels: Labels,
    /// Loaded or planted: controllers do not react to it.
    pub quiet: bool,
    /// Its JSON, as lists and watches send it.
    pub bytes: Bytes,
    value: OnceLock<Arc<Value>>,
}

impl Object {
    fn new(key: Key, revision: u64, value: Value, quiet: bool) -> Self {
        let labels = labels_of(&value);
        let bytes = Bytes::from(serde_json::to_vec(&value).unwrap_or_default());
        let cell = OnceLock::new();
        // Bulk loads stay small: they are parsed when somebody asks.
        if !quiet {
            let _ = cell.set(Arc::new(value));
        }
        Self { key, revision, labels, quiet, bytes, value: cell }
    }

    /// The parsed object; null when its bytes are not JSON (garbage planted by a test).
    pub fn value(&self) -> &Arc<Value> {
        self.value.get_or_init(|| Arc::new(serde_json::from_slice(&self.bytes).unwrap_or(Value::Null)))
    }
}

/// `metadata.labels` of an object, leaving out values that are no strings.
pub fn labels_of(value: &Value) -> Labels {
    let labels = value["metadata"]["labels"].as_object().into_iter().flatten();
    labels.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}

/// What happened to an object.
#[derive(Debug)]
pub struct Change {
    /// The revision of the change.
    pub revision: u64,
    /// The new version; for a deletion the last one, with the revision of the deletion.
    pub object: Arc<Object>,
    /// The version before; none when the object was created.
    pub previous: Option<Arc<Object>>,
    /// Whether the object is gone.
    pub deleted: bool,
}

#[derive(Debug)]
struct Table {
    objects: BTreeMap<Key, Arc<Object>>,
    history: VecDeque<Arc<Change>>,
    /// Changes up to and including this revision are forgotten.
    compacted: u64,
    latest: watch::Sender<u64>,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            compacted: 0,
            latest: watch::Sender::new(0),
        }
    }
}

#[derive(Debug)]
struct Inner {
    revision: u64,
    tables: HashMap<String, Table>,
}

/// What a transaction decides about an object.
#[derive(Debug)]
pub enum Decision {
    /// Store this value. Nothing happens when it equals the stored one.
    Put(Value),
    /// Remove the object.
    Remove,
    /// Leave it, and answer with this value (dry run) or the stored one.
    Keep(Option<Value>),
}

/// A page of a list.
#[derive(Debug)]
pub struct Page {
    /// The objects asked for.
    pub items: Vec<Arc<Object>>,
    /// Revision of the snapshot.
    pub revision: u64,
    /// The last key scanned, and how many objects are left, when there is more.
    pub more: Option<(Key, usize)>,
}

/// The objects of the server.
#[derive(Debug)]
pub struct Store {
    inner: Mutex<Inner>,
    latest: watch::Sender<u64>,
    history_limit: usize,
}

impl Store {
    /// An empty store that remembers up to `history_limit` changes per resource.
    pub fn new(history_limit: usize) -> Self {
        Self {
            inner: Mutex::new(Inner { revision: 1, tables: HashMap::new() }),
            latest: watch::Sender::new(1),
            history_limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while holding the lock is a bug a test should see elsewhere; data stays usable.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current revision.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// Wakes at every change of any resource.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    /// Wakes at every change of one resource.
    pub fn subscribe_to(&self, storage: &str) -> watch::Receiver<u64> {
        self.lock().tables.entry(storage.to_owned()).or_default().latest.subscribe()
    }

    /// One object.
    pub fn get(&self, storage: &str, key: &Key) -> Option<Arc<Object>> {
        self.lock().tables.get(storage)?.objects.get(key).cloned()
    }

    /// Decides about one object under the lock; returns its value after the decision.
    ///
    /// # Errors
    /// Whatever `decide` refuses with; nothing is changed then.
    pub fn transact(
        &self,
        storage: &str,
        key: &Key,
        decide: impl FnOnce(Option<&Arc<Object>>) -> Result<Decision, Refusal>,
    ) -> Result<Arc<Value>, Refusal> {
        let mut inner = self.lock();
        let current = inner.tables.get(storage).and_then(|t| t.objects.get(key)).cloned();
        match decide(current.as_ref())? {
            Decision::Keep(answer) => Ok(match (answer, current) {
                (Some(answer), _) => Arc::new(answer),
                (None, Some(current)) => current.value().clone(),
                (None, None) => Arc::new(Value::Null),
            }),
            Decision::Put(mut value) => {
                if let Some(current) = &current {
                    stamp(&mut value, current.revision);
                    if **current.value() == value {
                        return Ok(current.value().clone());
                    }
                }
                let object = self.commit(&mut inner, storage, key.clone(), value, current, false);
                Ok(object.value().clone())
            }
            Decision::Remove => {
                let Some(current) = current else { return Ok(Arc::new(Value::Null)) };
                Ok(self.remove(&mut inner, storage, current).value().clone())
            }
        }
    }

    fn commit(
        &self,
        inner: &mut Inner,
        storage: &str,
        key: Key,
        mut value: Value,
        previous: Option<Arc<Object>>,
        quiet: bool,
    ) -> Arc<Object> {
        inner.revision += 1;
        let revision = inner.revision;
        stamp(&mut value, revision);
        let object = Arc::new(Object::new(key.clone(), revision, value, quiet));
        let table = inner.tables.entry(storage.to_owned()).or_default();
        table.objects.insert(key, object.clone());
        let change = Change { revision, object: object.clone(), previous, deleted: false };
        self.record(table, change);
        object
    }

    fn remove(&self, inner: &mut Inner, storage: &str, current: Arc<Object>) -> Arc<Object> {
        inner.revision += 1;
        let revision = inner.revision;
        let mut value = (**current.value()).clone();
        stamp(&mut value, revision);
        let object = Arc::new(Object::new(current.key.clone(), revision, value, false));
        let table = inner.tables.entry(storage.to_owned()).or_default();
        table.objects.remove(&current.key);
        let change = Change { revision, object: object.clone(), previous: Some(current), deleted: true };
        self.record(table, change);
        object
    }

    fn record(&self, table: &mut Table, change: Change) {
        let revision = change.revision;
        table.history.push_back(Arc::new(change));
        while table.history.len() > self.history_limit {
            if let Some(forgotten) = table.history.pop_front() {
                table.compacted = forgotten.revision;
            }
        }
        table.latest.send_replace(revision);
        self.latest.send_replace(revision);
    }

    /// Stores objects without admission and without waking controllers. Values are used as they are,
    /// except for `metadata.resourceVersion`.
    pub fn load(&self, storage: &str, objects: impl IntoIterator<Item = (Key, Value)>) {
        let mut inner = self.lock();
        for (key, value) in objects {
            let previous = inner.tables.get(storage).and_then(|t| t.objects.get(&key)).cloned();
            self.commit(&mut inner, storage, key, value, previous, true);
        }
    }

    /// Stores bytes that need not even be JSON.
    pub fn plant(&self, storage: &str, key: Key, bytes: Bytes) {
        let mut inner = self.lock();
        inner.revision += 1;
        let revision = inner.revision;
        let object = Arc::new(Object {
            key: key.clone(),
            revision,
            labels: Labels::new(),
            quiet: true,
            bytes,
            value: OnceLock::new(),
        });
        let table = inner.tables.entry(storage.to_owned()).or_default();
        let previous = table.objects.insert(key, object.clone());
        self.record(table, Change { revision, object, previous, deleted: false });
    }

    /// All objects of a resource that a scope contains.
    pub fn all(&self, storage: &str, scope: &Scope) -> Vec<Arc<Object>> {
        self.page(storage, scope, None, None, None).map(|page| page.items).unwrap_or_default()
    }

    /// A page of the objects of a resource, as of revision `at` (now when none), after a key.
    ///
    /// # Errors
    /// 410 when the history no longer reaches back to `at`.
    pub fn page(
        &self,
        storage: &str,
        scope: &Scope,
        at: Option<u64>,
        after: Option<&Key>,
        limit: Option<usize>,
    ) -> Result<Page, Refusal> {
        let inner = self.lock();
        let revision = at.unwrap_or(inner.revision);
        let Some(table) = inner.tables.get(storage) else {
            return Ok(Page { items: Vec::new(), revision, more: None });
        };
        // The first change of a key after `at` knows what the key held at `at`.
        let mut past: BTreeMap<&Key, Option<&Arc<Object>>> = BTreeMap::new();
        if revision < inner.revision {
            if revision < table.compacted {
                return Err(Refusal::expired(
                    "The provided continue parameter is too old to display a consistent list result",
                ));
            }
            for change in table.history.iter().filter(|c| c.revision > revision) {
                past.entry(&change.object.key).or_insert(change.previous.as_ref());
            }
        }
        let first = match after {
            Some(key) => Bound::Excluded(key.clone()),
            None if scope.namespace.is_empty() => Bound::Unbounded,
            None => Bound::Included(Key::new(&scope.namespace, "")),
        };
        let mut found: Vec<&Arc<Object>> = Vec::new();
        let range = (first.clone(), Bound::Unbounded);
        for (key, object) in table.objects.range(range) {
            if !scope.namespace.is_empty() && key.namespace != scope.namespace {
                break;
            }
            if !past.contains_key(key) && scope.contains(object) {
                found.push(object);
            }
        }
        let range = (first.as_ref(), Bound::Unbounded);
        let restored: Vec<_> =
            past.range::<Key, _>(range).filter_map(|(_, old)| *old).filter(|o| scope.contains(o)).collect();
        if !restored.is_empty() {
            found.extend(restored);
            found.sort_by(|a, b| a.key.cmp(&b.key));
        }
        let limit = limit.unwrap_or(usize::MAX);
        let rest = found.len().saturating_sub(limit);
        found.truncate(limit);
        let more = found.last().filter(|_| rest > 0).map(|o| (o.key.clone(), rest));
        Ok(Page { items: found.into_iter().cloned().collect(), revision, more })
    }

    /// The changes of a resource after a revision, and the revision they lead to.
    ///
    /// # Errors
    /// 410 when the history no longer reaches back that far.
    pub fn changes(&self, storage: &str, after: u64) -> Result<(Vec<Arc<Change>>, u64), Refusal> {
        let inner = self.lock();
        let Some(table) = inner.tables.get(storage) else { return Ok((Vec::new(), inner.revision)) };
        if after < table.compacted {
            return Err(Refusal::expired(format!(
                "too old resource version: {after} ({})",
                table.compacted + 1
            )));
        }
        let start = table.history.partition_point(|c| c.revision <= after);
        Ok((table.history.range(start..).cloned().collect(), inner.revision))
    }

    /// Forgets the history of one resource, or of all.
    pub fn compact(&self, storage: Option<&str>) {
        let mut inner = self.lock();
        let revision = inner.revision;
        for (name, table) in &mut inner.tables {
            if storage.is_none_or(|wanted| wanted == name) {
                table.history.clear();
                table.compacted = revision;
            }
        }
    }
}

fn stamp(value: &mut Value, revision: u64) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".into(), Value::String(revision.to_string()));
    }
}
