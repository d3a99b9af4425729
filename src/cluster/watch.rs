//! The API watches: one task per kind, and the only place that builds them.
//!
//! Each starts with a complete list (streamed where the server can, in pages else), goes on with
//! changes and resumes where it was when the connection ends. After a gap it lists again, and what
//! the new list does not name is gone. Whatever the server does, the last state stays until a
//! complete answer replaces it.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, join_all};
use futures::{FutureExt, Stream, StreamExt};
use kube::runtime::watcher::{self, Config, Event};
use kube::{Api, Client};

use super::access::WATCH_SECONDS;
use super::feed::{Feed, Stored};
use super::health::WatchHealth;
use super::interests::Interests;
use super::trouble::describe;
use super::wire::{
    Item, NamespaceObject, NetworkPolicyObject, NodeObject, PodObject, ServiceCidrObject, ServiceObject,
    SliceObject, Version,
};
use super::{Cluster, Kind};
use crate::report::Reporter;

mod secrets;

/// Objects per page: more costs memory, fewer costs requests.
const PAGE: u32 = 500;
/// The first retry follows at once, a server in trouble is asked every half minute.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(30);
/// A streaming list that says nothing for this long is not coming: servers before 1.27 take the
/// request for a plain watch, which never marks the end of the list.
const STREAM_SILENCE: Duration = Duration::from_secs(10);
/// Nor is one that is not complete by then; pages make progress on slow links.
const STREAM_LIMIT: Duration = Duration::from_secs(120);
/// A page that does not come within this will not come.
const PAGE_SILENCE: Duration = Duration::from_secs(60);
/// A kind that the server does not have is asked for again after this: servers are upgraded.
const ABSENT_DELAY: Duration = Duration::from_secs(600);
/// After this long without trouble the next retry is a fast one again.
const QUIET: Duration = Duration::from_secs(60);
/// An outage is logged when it begins and then this often.
const SAY_AGAIN: Duration = Duration::from_secs(300);

/// Watches every kind of interest for ever.
pub async fn watch_all(client: &Client, cluster: &Cluster, interests: &Interests, reporter: &Reporter) {
    let watches = interests.kinds.iter().map(|kind| -> BoxFuture<'_, ()> {
        let mut config = Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        match kind {
            Kind::Service => watch::<ServiceObject>(client, cluster, reporter, config).boxed(),
            Kind::EndpointSlice => {
                config = config.labels("!service.kubernetes.io/headless");
                watch::<SliceObject>(client, cluster, reporter, config).boxed()
            }
            Kind::Node => {
                if let Some(name) = &interests.only_node {
                    config = config.fields(&format!("metadata.name={name}"));
                }
                watch::<NodeObject>(client, cluster, reporter, config).boxed()
            }
            Kind::ServiceCidr => watch::<ServiceCidrObject>(client, cluster, reporter, config).boxed(),
            Kind::Pod => watch::<PodObject>(client, cluster, reporter, config).boxed(),
            Kind::Namespace => watch::<NamespaceObject>(client, cluster, reporter, config).boxed(),
            Kind::NetworkPolicy => watch::<NetworkPolicyObject>(client, cluster, reporter, config).boxed(),
            Kind::Secret => secrets::watch_wanted(client, cluster).boxed(),
        }
    });
    join_all(watches).await;
}

async fn watch<T: Stored>(client: &Client, cluster: &Cluster, reporter: &Reporter, config: Config) {
    let feed = Feed::new(cluster.clone(), reporter);
    let mut watch = Watch::<T> {
        client: client.clone(),
        feed,
        health: cluster.watch_health(),
        config: config.streaming_lists(),
        version: 0,
        phase: Phase::Connecting,
        list_started: Instant::now(),
        heard: Instant::now(),
        outage: Outage::default(),
        resume_failures: 0,
    };
    watch.health.started(T::KIND);
    watch.run().await;
}

/// Where a watch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing heard yet.
    Connecting,
    /// Between the start and the end of a list.
    Listing,
    /// Following changes.
    Following,
}

/// What to do after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Go on with the same stream; it resumes where it was.
    Resume,
    /// Begin with a list.
    Relist,
    /// The server refuses streaming lists.
    UsePages,
    /// The server does not have this kind or this version of it.
    Absent,
    /// The server does not let us see this kind.
    Forbidden,
}

type Events<T> = Pin<Box<dyn Stream<Item = watcher::Result<Event<Item<T>>>> + Send>>;

struct Watch<T: Stored> {
    client: Client,
    feed: Feed<T>,
    health: WatchHealth,
    config: Config,
    version: usize,
    phase: Phase,
    list_started: Instant,
    /// When the server last made us wait and then said something.
    heard: Instant,
    outage: Outage,
    resume_failures: u32,
}

impl<T: Stored> Watch<T> {
    async fn run(&mut self) {
        let mut events = self.open();
        loop {
            // What has arrived already needs neither a timer nor a look at the clock, which the
            // thousands of objects of a list would pay one by one.
            let heard = match events.next().now_or_never() {
                Some(event) => Ok(event),
                None => {
                    let heard = match self.patience() {
                        Some(patience) => tokio::time::timeout(patience, events.next()).await,
                        None => Ok(events.next().await),
                    };
                    self.heard = Instant::now();
                    heard
                }
            };
            let next = match heard {
                Ok(Some(Ok(event))) => {
                    self.take(event);
                    continue;
                }
                Ok(Some(Err(error))) => {
                    let next = self.judge(&error);
                    self.failed(&describe(&error), next);
                    next
                }
                Ok(None) => Next::Relist,
                Err(_) if self.streaming() && self.phase == Phase::Listing => {
                    tracing::debug!(kind = %T::KIND, "no streaming list came, listing in pages");
                    Next::UsePages
                }
                Err(_) => {
                    self.failed("no answer to a list request", Next::Relist);
                    Next::Relist
                }
            };
            match next {
                Next::Resume => tokio::time::sleep(self.outage.delay()).await,
                Next::Relist => {
                    tokio::time::sleep(self.outage.delay()).await;
                    events = self.open();
                }
                Next::UsePages => {
                    self.config.initial_list_strategy = watcher::InitialListStrategy::ListWatch;
                    events = self.open();
                }
                Next::Absent if self.version + 1 < T::VERSIONS.len() => {
                    self.version += 1;
                    events = self.open();
                }
                // ServiceCIDRs came with Kubernetes 1.29 and need a rule in the ClusterRole: being
                // without them is normal. What was known of them stays.
                Next::Absent | Next::Forbidden if T::KIND == Kind::ServiceCidr => {
                    self.feed.set_listed();
                    self.health.listed(T::KIND);
                    tokio::time::sleep(ABSENT_DELAY).await;
                    self.version = 0;
                    events = self.open();
                }
                Next::Absent | Next::Forbidden => {
                    tokio::time::sleep(self.outage.delay()).await;
                    self.version = 0;
                    events = self.open();
                }
            }
        }
    }

    fn open(&mut self) -> Events<T> {
        self.phase = Phase::Connecting;
        self.list_started = Instant::now();
        let version = Version(T::VERSIONS.get(self.version).copied().unwrap_or("v1"));
        let api = Api::<Item<T>>::all_with(self.client.clone(), &version);
        watcher::watcher(api, self.config.clone()).boxed()
    }

    fn streaming(&self) -> bool {
        self.config.initial_list_strategy == watcher::InitialListStrategy::StreamingList
    }

    /// How long the next word may take; `None` while following, where the watch's own end bounds it.
    fn patience(&self) -> Option<Duration> {
        match (self.phase, self.streaming()) {
            (Phase::Following, _) => None,
            (Phase::Listing, true) => {
                Some(STREAM_SILENCE.min(STREAM_LIMIT.saturating_sub(self.list_started.elapsed())))
            }
            _ => Some(PAGE_SILENCE),
        }
    }

    fn take(&mut self, event: Event<Item<T>>) {
        match event {
            Event::Init => {
                self.phase = Phase::Listing;
                self.list_started = Instant::now();
                self.feed.begin_list();
                // The paged watcher says this before it has asked.
                return;
            }
            Event::InitApply(item) => {
                self.health.received(T::KIND, self.heard);
                self.feed.apply(item);
            }
            Event::InitDone => {
                self.phase = Phase::Following;
                self.feed.end_list();
                self.health.listed(T::KIND);
                tracing::debug!(kind = %T::KIND, took = ?self.list_started.elapsed(), "listed");
            }
            Event::Apply(item) => {
                self.health.received(T::KIND, self.heard);
                self.feed.apply(item);
            }
            Event::Delete(item) => {
                self.health.received(T::KIND, self.heard);
                self.feed.delete_item(&item);
            }
        }
        self.resume_failures = 0;
        self.outage.over(T::KIND);
    }

    fn judge(&mut self, error: &watcher::Error) -> Next {
        use kube::Error as Client;
        use watcher::Error as Watch;
        let streamed = self.phase != Phase::Following && self.streaming();
        match error {
            Watch::WatchStartFailed(Client::Api(status)) | Watch::InitialListFailed(Client::Api(status)) => {
                match status.code {
                    404 => Next::Absent,
                    403 => Next::Forbidden,
                    // sendInitialEvents is refused as invalid where the feature is off.
                    400 | 405 | 406 | 415 | 422 if streamed => Next::UsePages,
                    401 | 429 | 500..=599 => self.resume(),
                    // Too old a version, among others: the watcher would ask for the same again.
                    _ => Next::Relist,
                }
            }
            Watch::WatchError(status) if streamed && matches!(status.code, 400 | 422) => Next::UsePages,
            Watch::WatchError(_) | Watch::NoResourceVersion => Next::Relist,
            // A line that is no JSON was an event, and now it is lost.
            Watch::WatchFailed(Client::SerdeError(_)) => Next::Relist,
            Watch::WatchFailed(_) | Watch::WatchStartFailed(_) | Watch::InitialListFailed(_) => self.resume(),
        }
    }

    /// Resuming, but not for ever: a server that was restored from a backup may never know the
    /// version again.
    fn resume(&mut self) -> Next {
        self.resume_failures += 1;
        if self.phase == Phase::Following && self.resume_failures.is_multiple_of(20) {
            Next::Relist
        } else {
            Next::Resume
        }
    }

    fn failed(&mut self, error: &str, next: Next) {
        let forbidden;
        let error = match next {
            Next::Forbidden => {
                forbidden = format!(
                    "not allowed to list and watch {}{}: {error}; bind the ClusterRole of daemonset/rbac.yaml to this \
                     account, or add the rule to its own",
                    T::PLURAL,
                    if T::GROUP.is_empty() { String::new() } else { format!(".{}", T::GROUP) }
                );
                &*forbidden
            }
            _ => error,
        };
        self.health.failed(T::KIND, error);
        match next {
            Next::UsePages => {
                tracing::debug!(kind = %T::KIND, error, "streaming list refused, listing in pages");
            }
            Next::Absent if self.version + 1 < T::VERSIONS.len() => {}
            Next::Absent if T::KIND == Kind::ServiceCidr => {
                tracing::info!("the API server has no ServiceCIDR objects");
            }
            Next::Forbidden if T::KIND == Kind::ServiceCidr => {
                tracing::warn!(kind = %T::KIND, error, "going on without ServiceCIDRs");
            }
            _ => self.outage.say(T::KIND, error),
        }
    }
}

/// How long the trouble has lasted, for the retry and for the log.
#[derive(Default)]
struct Outage {
    attempts: u32,
    last_attempt: Option<Instant>,
    since: Option<Instant>,
    said: Option<Instant>,
}

impl Outage {
    /// The next delay: doubling, half of it random so that a cluster of nodes does not come back
    /// as one. It falls back only after a quiet minute: a server that answers every list and
    /// breaks every watch must not be listed ten times a second.
    fn delay(&mut self) -> Duration {
        if self.last_attempt.is_some_and(|at| at.elapsed() > QUIET) {
            self.attempts = 0;
        }
        let full = self.full_delay();
        self.attempts = self.attempts.saturating_add(1);
        // Each RandomState is seeded anew; no generator is worth a dependency here.
        let random = RandomState::new().hash_one(0u8) % 1000;
        let delay = full.mul_f64(0.5 + f64::from(u32::try_from(random).unwrap_or(0)) / 2000.0);
        self.last_attempt = Some(Instant::now() + delay);
        delay
    }

    fn full_delay(&self) -> Duration {
        FIRST_DELAY.saturating_mul(1 << self.attempts.min(16)).min(MAX_DELAY)
    }

    fn say(&mut self, kind: Kind, error: &str) {
        let now = Instant::now();
        // A watch that ends and resumes at once is no news.
        if self.since.is_none() {
            self.since = Some(now);
            tracing::debug!(%kind, error, "watch interrupted");
            return;
        }
        if self.said.is_some_and(|at| now.duration_since(at) < SAY_AGAIN) {
            tracing::debug!(%kind, error, "still no answer from the API server");
            return;
        }
        self.said = Some(now);
        tracing::warn!(
            %kind,
            error,
            retry_seconds = self.full_delay().as_secs_f64(),
            "API server unreachable or refusing; kernel state is kept, retrying"
        );
    }

    fn over(&mut self, kind: Kind) {
        if let (Some(since), Some(_)) = (self.since, self.said) {
            tracing::info!(%kind, seconds = since.elapsed().as_secs(), "API server answers again");
        }
        (self.since, self.said) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_fast_at_first_and_bounded() {
        let mut outage = Outage::default();
        let first = outage.delay();
        assert!((FIRST_DELAY / 2..=FIRST_DELAY).contains(&first), "{first:?}");
        let mut total = first;
        for _ in 0..40 {
            let delay = outage.delay();
            assert!(delay <= MAX_DELAY, "{delay:?}");
            total += delay;
        }
        assert!(outage.delay() >= MAX_DELAY / 2);
        assert!(total > MAX_DELAY * 15);
        // Good news does not make a flapping server be asked more often.
        outage.over(Kind::Service);
        assert!(outage.delay() >= MAX_DELAY / 2);
    }
}
