//! Trouble on demand: what a test or a demo can make the server do wrong.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;

/// What `sendInitialEvents` meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StreamingLists {
    /// Streaming lists work.
    #[default]
    Served,
    /// Refused with 422, as by a server whose WatchList gate is off.
    Refused,
    /// The parameter is unknown and ignored, as by servers before 1.27.
    Ignored,
}

/// Requests that will fail.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Only requests for this plural name (`services`); all when none.
    #[serde(default)]
    pub resource: Option<String>,
    /// Only this verb: `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`; all when none.
    #[serde(default)]
    pub verb: Option<String>,
    /// How many requests fail.
    pub count: usize,
    /// HTTP status. 0 cuts the connection instead of answering.
    pub status: u16,
    /// Seconds in a `Retry-After` header.
    #[serde(default)]
    pub retry_after: Option<u64>,
}

/// One fault, as POSTed to `/__faults`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "fault", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Fault {
    /// End every running watch: cleanly, or by cutting its connection.
    DropWatches {
        /// Cut instead of ending cleanly.
        #[serde(default)]
        cut: bool,
    },
    /// Fail the next requests.
    Fail(Failure),
    /// Answer every request this much later.
    Delay {
        /// Milliseconds; 0 ends the fault.
        milliseconds: u64,
    },
    /// Take no connections and cut the open ones.
    Outage {
        /// Start or end the outage.
        on: bool,
    },
    /// Serve every list as of the revision at which the fault began.
    StaleLists {
        /// Start or end.
        on: bool,
    },
    /// Send a line that is not JSON in every running watch of a resource.
    GarbageLine {
        /// Plural name; all watches when none.
        #[serde(default)]
        resource: Option<String>,
    },
    /// Send no event, not even bookmarks, while watches stay open.
    MuteWatches {
        /// Start or end.
        on: bool,
    },
    /// Forget the history: watches from older revisions get 410.
    Compact {
        /// `plural` or `plural.group`; all resources when none.
        #[serde(default)]
        resource: Option<String>,
    },
    /// How streaming lists are served.
    StreamingLists {
        /// The mode.
        mode: StreamingLists,
    },
    /// Serve at most this many objects per page, asked for or not.
    PageLimit {
        /// Objects; 0 ends the fault.
        limit: usize,
    },
    /// Store an object without any admission.
    Insert {
        /// `plural` or `plural.group`.
        resource: String,
        /// The object; `metadata.name` and `metadata.namespace` say where.
        object: serde_json::Value,
    },
    /// End all lasting faults.
    Clear,
}

/// Signals that running watches follow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WatchFaults {
    pub drops: u64,
    pub cut: bool,
    pub garbage: u64,
    pub garbage_resource: Option<String>,
    pub muted: bool,
}

/// The server's current faults. All methods take effect at once.
#[derive(Debug)]
pub struct Faults {
    failures: Mutex<Vec<Failure>>,
    delay: AtomicU64,
    page_limit: AtomicUsize,
    streaming: Mutex<StreamingLists>,
    stale: Mutex<Option<u64>>,
    pub(crate) outage: watch::Sender<bool>,
    pub(crate) watches: watch::Sender<WatchFaults>,
    counts: Mutex<HashMap<(String, String), u64>>,
    clean: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            failures: Mutex::default(),
            delay: AtomicU64::new(0),
            page_limit: AtomicUsize::new(0),
            streaming: Mutex::default(),
            stale: Mutex::default(),
            outage: watch::Sender::new(false),
            watches: watch::Sender::new(WatchFaults::default()),
            counts: Mutex::default(),
            clean: AtomicBool::new(true),
        }
    }
}

impl Faults {
    /// Ends every running watch; `cut` breaks the connection in the middle of the stream.
    pub fn drop_watches(&self, cut: bool) {
        self.watches.send_modify(|w| {
            w.drops += 1;
            w.cut = cut;
        });
    }

    /// Fails the next requests that fit.
    pub fn fail(&self, failure: Failure) {
        locked(&self.failures).push(failure);
        self.clean.store(false, Ordering::Release);
    }

    /// Answers every request this much later.
    pub fn delay(&self, delay: Duration) {
        let milliseconds = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.delay.store(milliseconds, Ordering::Release);
    }

    /// Takes no connections (they are refused) and cuts the open ones, until called with false.
    pub fn outage(&self, on: bool) {
        self.outage.send_replace(on);
    }

    /// Serves lists as of a revision; none ends it.
    pub fn stale_lists(&self, revision: Option<u64>) {
        *locked(&self.stale) = revision;
    }

    /// Sends a line that is not JSON in the running watches of a resource (all when none).
    pub fn garbage_line(&self, resource: Option<&str>) {
        self.watches.send_modify(|w| {
            w.garbage += 1;
            w.garbage_resource = resource.map(str::to_owned);
        });
    }

    /// Holds back all events while watches stay open, as a dead network path does.
    pub fn mute_watches(&self, on: bool) {
        self.watches.send_modify(|w| w.muted = on);
    }

    /// How streaming lists are served.
    pub fn streaming_lists(&self, mode: StreamingLists) {
        *locked(&self.streaming) = mode;
    }

    /// Serves at most this many objects per page; 0 ends it.
    pub fn page_limit(&self, limit: usize) {
        self.page_limit.store(limit, Ordering::Release);
    }

    /// Ends all lasting faults.
    pub fn clear(&self) {
        locked(&self.failures).clear();
        self.clean.store(true, Ordering::Release);
        self.delay.store(0, Ordering::Release);
        self.page_limit.store(0, Ordering::Release);
        self.streaming_lists(StreamingLists::Served);
        self.stale_lists(None);
        self.mute_watches(false);
        self.outage(false);
    }

    /// Requests served so far for a verb (`list`, `watch`, ...) of a resource's plural name.
    pub fn served(&self, verb: &str, plural: &str) -> u64 {
        locked(&self.counts).get(&(verb.to_owned(), plural.to_owned())).copied().unwrap_or(0)
    }

    pub(crate) fn count(&self, verb: &str, plural: &str) {
        *locked(&self.counts).entry((verb.to_owned(), plural.to_owned())).or_default() += 1;
    }

    /// The failure this request meets, using it up.
    pub(crate) fn take_failure(&self, verb: &str, plural: &str) -> Option<Failure> {
        if self.clean.load(Ordering::Acquire) {
            return None;
        }
        let mut failures = locked(&self.failures);
        let fits = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|w| w == is);
        let at =
            failures.iter().position(|f| f.count > 0 && fits(&f.resource, plural) && fits(&f.verb, verb))?;
        failures[at].count -= 1;
        let taken = failures[at].clone();
        failures.retain(|f| f.count > 0);
        self.clean.store(failures.is_empty(), Ordering::Release);
        Some(taken)
    }

    pub(crate) fn current_delay(&self) -> Duration {
        Duration::from_millis(self.delay.load(Ordering::Acquire))
    }

    pub(crate) fn current_page_limit(&self) -> Option<usize> {
        Some(self.page_limit.load(Ordering::Acquire)).filter(|limit| *limit > 0)
    }

    pub(crate) fn current_streaming(&self) -> StreamingLists {
        *locked(&self.streaming)
    }

    pub(crate) fn stale_revision(&self) -> Option<u64> {
        *locked(&self.stale)
    }
}
