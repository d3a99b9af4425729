//! Routes that a speaker learned, as this room sees them: prefixes with next hops, and what is stale.
//!
//! A speaker that starts anew knows nothing at first. Until it says that it has heard all of a family,
//! what was known before stays; then what it did not tell again goes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferroute_bgp::message::{AfiSafi, Families};
use ferroute_bgp::rib::RouteChange;
use ferroute_bgp::speaker::Changes;
use ipnet::IpNet;

use crate::cluster::Waker;
use crate::host::Family;
use crate::routes::CurrentSpeaker;

/// Prefixes taken from a speaker at once.
const BATCH: usize = 4096;

/// What was learned so far.
#[derive(Clone, Debug, Default)]
pub struct Learned {
    routes: BTreeMap<IpNet, Vec<IpAddr>>,
    /// How many routes name each next hop.
    next_hops: BTreeMap<IpAddr, usize>,
    /// Known from a speaker before, not told again yet.
    former: BTreeSet<IpNet>,
    complete: BTreeSet<Family>,
}

impl Learned {
    /// Next hops of a prefix, sorted; none when it is not known.
    pub fn next_hops(&self, prefix: &IpNet) -> &[IpAddr] {
        self.routes.get(prefix).map_or(&[], Vec::as_slice)
    }

    /// All prefixes with their next hops.
    pub fn routes(&self) -> impl Iterator<Item = (&IpNet, &[IpAddr])> {
        self.routes.iter().map(|(prefix, hops)| (prefix, hops.as_slice()))
    }

    /// Every next hop that any route names.
    pub fn all_next_hops(&self) -> impl Iterator<Item = IpAddr> {
        self.next_hops.keys().copied()
    }

    /// Prefixes known.
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Whether all of a family has been heard: what the kernel has beyond it is stale.
    pub fn is_complete(&self, family: Family) -> bool {
        self.complete.contains(&family)
    }

    /// Takes news in; returns the prefixes whose next hops changed.
    pub fn take(&mut self, news: News) -> BTreeSet<IpNet> {
        let mut changed = BTreeSet::new();
        if news.began {
            self.former = self.routes.keys().copied().collect();
            self.complete.clear();
        }
        for (prefix, hops) in news.routes {
            self.former.remove(&prefix);
            if self.set(prefix, hops) {
                changed.insert(prefix);
            }
        }
        for family in news.complete {
            let is_of = |prefix: &IpNet| Family::of(prefix.addr()) == family;
            let gone: Vec<IpNet> = self.former.iter().filter(|prefix| is_of(prefix)).copied().collect();
            for prefix in gone {
                self.former.remove(&prefix);
                self.set(prefix, Vec::new());
                changed.insert(prefix);
            }
            self.complete.insert(family);
        }
        changed
    }

    fn set(&mut self, prefix: IpNet, hops: Vec<IpAddr>) -> bool {
        let before = if hops.is_empty() {
            self.routes.remove(&prefix).unwrap_or_default()
        } else {
            self.routes.insert(prefix, hops.clone()).unwrap_or_default()
        };
        if before == hops {
            return false;
        }
        for hop in hops {
            *self.next_hops.entry(hop).or_default() += 1;
        }
        for hop in before {
            if let Some(count) = self.next_hops.get_mut(&hop) {
                *count -= 1;
                if *count == 0 {
                    self.next_hops.remove(&hop);
                }
            }
        }
        true
    }
}

/// What came since the room last looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// A new speaker began; what follows is its.
    pub began: bool,
    /// Prefixes with their next hops, sorted; without: gone.
    pub routes: BTreeMap<IpNet, Vec<IpAddr>>,
    /// Families of which all was told.
    pub complete: BTreeSet<Family>,
}

impl News {
    /// Whether nothing came.
    pub fn is_empty(&self) -> bool {
        !self.began && self.routes.is_empty() && self.complete.is_empty()
    }
}

/// Where a speaker's changes are put for the room. Clones put into the same place.
#[derive(Clone)]
pub struct Feed {
    inbox: Arc<Mutex<News>>,
    waker: Waker,
}

impl Feed {
    pub(super) fn new(waker: Waker) -> Self {
        Self { inbox: Arc::default(), waker }
    }

    /// A new speaker begins with all it knows.
    pub fn begin(&self) {
        // What an earlier one told and the room has not seen is of no use any more, but what that one
        // knew for good is: the room keeps it until this one is complete.
        self.tell(News { began: true, ..News::default() });
    }

    /// Puts changes of the current speaker.
    pub fn put(&self, changes: Changes) {
        let mut news = News::default();
        for change in changes.routes {
            let (prefix, hops) = next_hops(&change);
            news.routes.insert(prefix, hops);
        }
        for (family, afi) in [(Family::V4, AfiSafi::Ipv4Unicast), (Family::V6, AfiSafi::Ipv6Unicast)] {
            if Families::contains(changes.complete, afi) {
                news.complete.insert(family);
            }
        }
        self.tell(news);
    }

    /// Puts news of whatever else learns routes. Next hops must be sorted.
    pub fn tell(&self, news: News) {
        let mut inbox = self.lock();
        if news.began {
            *inbox = News::default();
            inbox.began = true;
        }
        inbox.routes.extend(news.routes);
        inbox.complete.extend(news.complete);
        drop(inbox);
        self.waker.wake();
    }

    pub(super) fn take(&self) -> News {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, News> {
        // Each write is whole: see `Learned::take`.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A change as prefix and next hops. A route of our own is none that was learned.
fn next_hops(change: &RouteChange) -> (IpNet, Vec<IpAddr>) {
    let mut hops: Vec<IpAddr> = if change.paths.iter().any(|path| path.peer.is_none()) {
        Vec::new()
    } else {
        change.paths.iter().map(|path| path.attributes.next_hop.address()).collect()
    };
    hops.sort_unstable();
    hops.dedup();
    (change.prefix.trunc(), hops)
}

/// Carries every speaker's changes to the feed, one speaker after the other. Ends when no further one
/// can come.
pub async fn follow(mut current: CurrentSpeaker, feed: Feed) {
    loop {
        let speaker = current.borrow_and_update().clone();
        if let Some(speaker) = speaker {
            feed.begin();
            let mut watch = speaker.watch();
            loop {
                tokio::select! {
                    changed = current.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        break;
                    }
                    changes = watch.next(BATCH) => match changes {
                        Some(changes) => feed.put(changes),
                        // It was stopped; what it told stays until the next one is complete.
                        None => {
                            if current.changed().await.is_err() {
                                return;
                            }
                            break;
                        }
                    },
                }
            }
        } else if current.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn news(began: bool, routes: &[(&str, &[&str])], complete: &[Family]) -> News {
        let routes = routes
            .iter()
            .map(|(prefix, hops)| (net(prefix), hops.iter().map(|hop| ip(hop)).collect()))
            .collect();
        News { began, routes, complete: complete.iter().copied().collect() }
    }

    #[test]
    fn what_a_new_speaker_does_not_tell_goes_when_its_family_is_complete() {
        let mut learned = Learned::default();
        let all: &[(&str, &[&str])] = &[
            ("10.1.0.0/24", &["192.168.0.1"]),
            ("10.2.0.0/24", &["192.168.0.2"]),
            ("fd01::/64", &["fd00::1"]),
        ];
        assert_eq!(learned.take(news(true, all, &Family::BOTH)).len(), 3);
        assert!(learned.is_complete(Family::V4));

        let changed = learned.take(news(true, &[("10.1.0.0/24", &["192.168.0.1"])], &[]));
        assert!(changed.is_empty() && !learned.is_complete(Family::V4));
        assert_eq!(learned.len(), 3);
        let changed = learned.take(news(false, &[], &[Family::V4]));
        assert_eq!(changed, [net("10.2.0.0/24")].into());
        assert_eq!(learned.len(), 2, "IPv6 is not complete");
        let changed = learned.take(news(false, &[("fd01::/64", &[])], &[Family::V6]));
        assert_eq!(changed, [net("fd01::/64")].into());
        assert_eq!(learned.all_next_hops().collect::<Vec<_>>(), [ip("192.168.0.1")]);
    }

    /// Waits for news that satisfy; everything that came meanwhile, together.
    async fn news_until(feed: &Feed, right: impl Fn(&News) -> bool) -> News {
        let gather = async {
            let mut all = News::default();
            while !right(&all) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                let more = feed.take();
                all.began |= more.began;
                all.routes.extend(more.routes);
                all.complete.extend(more.complete);
            }
            all
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), gather).await.unwrap()
    }

    #[tokio::test]
    async fn each_speaker_is_followed_until_the_next() {
        use ferroute_bgp::message::{Asn, Attributes, RouterId};
        use ferroute_bgp::speaker::{Advertisement, Speaker, SpeakerConfig};

        let subscription = crate::cluster::Cluster::new().subscribe();
        let feed = Feed::new(subscription.waker());
        let (current, receiver) = tokio::sync::watch::channel(None);
        let following = tokio::spawn(follow(receiver, feed.clone()));
        for number in 1..=2 {
            let id = RouterId(std::net::Ipv4Addr::new(127, 0, 0, number));
            let speaker = Speaker::start(SpeakerConfig::new(Asn(64512), id)).unwrap();
            speaker.set_peers(Vec::new());
            let own = net(&format!("10.{number}.0.0/24"));
            let attributes = Arc::new(Attributes::default());
            speaker.set_advertisements(vec![Advertisement { prefix: own, path: 0, attributes, tag: 0 }]);
            current.send(Some(speaker)).unwrap();
            let told =
                news_until(&feed, |news| news.routes.contains_key(&own) && news.complete.len() == 2).await;
            assert!(told.began);
            assert_eq!(
                told.routes,
                [(own, Vec::new())].into(),
                "a route of our own is none that was learned"
            );
        }
        drop(current);
        tokio::time::timeout(std::time::Duration::from_secs(20), following).await.unwrap().unwrap();
    }

    proptest! {
        #[test]
        fn next_hops_are_those_of_the_routes(
            steps in prop::collection::vec((0u8..6, prop::collection::btree_set(0u8..4, 0..3)), 0..40),
        ) {
            let mut learned = Learned::default();
            for (prefix, hops) in steps {
                let hops: Vec<IpAddr> = hops.into_iter().map(|hop| ip(&format!("10.0.0.{hop}"))).collect();
                let prefix = net(&format!("10.1.{prefix}.0/24"));
                let known = learned.next_hops(&prefix).to_vec();
                let changed = learned.take(News { routes: [(prefix, hops.clone())].into(), ..News::default() });
                prop_assert_eq!(changed.is_empty(), known == hops);
            }
            let mut wanted: Vec<IpAddr> = learned.routes().flat_map(|(_, hops)| hops.to_vec()).collect();
            wanted.sort_unstable();
            wanted.dedup();
            prop_assert_eq!(learned.all_next_hops().collect::<Vec<_>>(), wanted);
        }
    }
}
