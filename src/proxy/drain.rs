//! Graceful removal: a destination that is no longer wanted keeps weight 0, so that it gets no new
//! connection, until its connections are gone or its time is up. Time is passed in.
//!
//! The kernel itself remembers what drains: a destination that is present but not wanted drains, also
//! after a restart. And since when: the upper threshold of its connections, which means nothing at
//! weight 0, holds that second of the time since boot. So a restart does not start the period anew.

use std::cell::LazyCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferroute_ipvs as ipvs;
use foldhash::fast::FixedState;

use crate::cluster::service::Protocol;

/// Destinations that drain.
#[derive(Clone, Debug, Default)]
pub struct Drains {
    servers: HashMap<ipvs::VirtualServerKey, HashMap<ipvs::DestinationKey, Draining, FixedState>, FixedState>,
}

#[derive(Clone, Copy, Debug)]
struct Draining {
    deadline: Instant,
    /// As [`Now::boot_seconds`].
    since: u32,
    /// It has no connection left, or no time.
    over: bool,
}

/// A moment by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// The process's own.
    pub instant: Instant,
    /// Whole seconds since boot: that clock goes on while the process restarts.
    pub boot_seconds: u32,
}

impl Draining {
    /// A destination found in the kernel that is not known to drain.
    fn begin(found: &ipvs::Destination, period: Duration, now: Now) -> Self {
        // The next whole second: no drain is shorter than its period.
        let next = now.boot_seconds.saturating_add(1);
        let since = match found.upper_threshold {
            since if found.weight == 0 && (1..=next).contains(&since) => since,
            _ => next,
        };
        let gone = now.boot_seconds.saturating_sub(since);
        let left = period.saturating_sub(Duration::from_secs(gone.into()));
        Self { deadline: now.instant + left, since, over: left.is_zero() }
    }
}

impl Drains {
    /// What a virtual server must be right now: the wanted one, plus destinations that still drain.
    ///
    /// `None` where neither is left: IPVS takes the packets of this node's own programs before any rule
    /// sees them, and refuses by ICMP, which a TCP client gets while its connect() holds the socket: it is
    /// put aside and the client tries again a second later. Without a virtual server the rules refuse.
    ///
    /// A virtual server that is not wanted at all goes at once with everything on it. UDP has no
    /// connection to finish, and the `dh` scheduler keeps sending clients to a destination of
    /// weight 0 only to refuse them, so neither drains. `period` is `None` where draining is off; `now` is
    /// asked for only when something drains.
    pub fn effective(
        &mut self,
        key: ipvs::VirtualServerKey,
        protocol: Option<Protocol>,
        actual: Option<&Arc<ipvs::VirtualServer>>,
        wanted: Option<&Arc<ipvs::VirtualServer>>,
        period: Option<Duration>,
        now: impl FnOnce() -> Now,
    ) -> Option<Arc<ipvs::VirtualServer>> {
        self.with_draining(key, protocol, actual, wanted, period, now)
            .filter(|server| !server.destinations.is_empty())
    }

    fn with_draining(
        &mut self,
        key: ipvs::VirtualServerKey,
        protocol: Option<Protocol>,
        actual: Option<&Arc<ipvs::VirtualServer>>,
        wanted: Option<&Arc<ipvs::VirtualServer>>,
        period: Option<Duration>,
        now: impl FnOnce() -> Now,
    ) -> Option<Arc<ipvs::VirtualServer>> {
        let (Some(wanted), Some(actual), Some(period)) = (wanted, actual, period) else {
            self.servers.remove(&key);
            return wanted.cloned();
        };
        if protocol == Some(Protocol::Udp) || wanted.scheduler == ipvs::Scheduler::DH {
            self.servers.remove(&key);
            return Some(wanted.clone());
        }
        // Equal lists are the common case on an audit; both are sorted by key.
        if Arc::ptr_eq(actual, wanted) {
            self.servers.remove(&key);
            return Some(wanted.clone());
        }
        // Most changes remove nothing, and need no clock.
        let now = LazyCell::new(now);
        let mut draining = self.servers.remove(&key).unwrap_or_default();
        let mut still = HashMap::default();
        let mut kept = Vec::new();
        for destination in &actual.destinations {
            let destination_key = destination.key();
            if wanted.destinations.binary_search_by_key(&destination_key, ipvs::Destination::key).is_ok() {
                continue;
            }
            let state = draining
                .remove(&destination_key)
                .unwrap_or_else(|| Draining::begin(destination, period, *now));
            if state.over {
                continue;
            }
            still.insert(destination_key, state);
            kept.push(ipvs::Destination {
                weight: 0,
                upper_threshold: state.since,
                lower_threshold: 0,
                ..*destination
            });
        }
        if kept.is_empty() {
            return Some(wanted.clone());
        }
        self.servers.insert(key, still);
        let mut options = wanted.options();
        if wanted.scheduler == ipvs::Scheduler::SH {
            // Without its fallback flag the sh scheduler refuses clients whose bucket falls on a
            // destination of weight 0 instead of choosing another.
            options.flags |= ipvs::Flags::SH_FALLBACK;
        }
        kept.extend(wanted.destinations.iter().copied());
        Some(Arc::new(ipvs::VirtualServer::new(options, kept)))
    }

    /// Virtual servers with destinations that drain.
    pub fn servers(&self) -> Vec<ipvs::VirtualServerKey> {
        self.servers.keys().copied().collect()
    }

    /// Number of destinations that drain.
    pub fn len(&self) -> usize {
        self.servers.values().map(HashMap::len).sum()
    }

    /// Whether nothing drains.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// Notes that a draining destination has no connection left.
    pub fn set_quiet(&mut self, server: &ipvs::VirtualServerKey, destination: &ipvs::DestinationKey) {
        if let Some(state) = self.servers.get_mut(server).and_then(|known| known.get_mut(destination)) {
            state.over = true;
        }
    }

    /// Ends the drains of a server that are out of time; whether any is over. Nothing else ends one for the
    /// time: an audit that did would take it for something that a stranger changed.
    pub fn end(&mut self, server: &ipvs::VirtualServerKey, now: Instant) -> bool {
        let Some(known) = self.servers.get_mut(server) else { return false };
        known.values_mut().for_each(|state| state.over |= now >= state.deadline);
        known.values().any(|state| state.over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Option<Duration> = Some(Duration::from_secs(30));

    fn now() -> Now {
        Now { instant: Instant::now(), boot_seconds: 1000 }
    }

    fn after(now: Now, seconds: u32) -> Now {
        Now {
            instant: now.instant + Duration::from_secs(seconds.into()),
            boot_seconds: now.boot_seconds + seconds,
        }
    }

    fn server(scheduler: ipvs::Scheduler, destinations: &[(u8, u32)]) -> Arc<ipvs::VirtualServer> {
        let list = destinations
            .iter()
            .map(|(host, weight)| ipvs::Destination::masquerade([10, 0, 0, *host].into(), 80, *weight))
            .collect();
        let options = ipvs::Options {
            scheduler,
            flags: ipvs::Flags::NONE,
            timeout: 0,
            netmask: ipvs::Netmask::host(ipvs::Family::V4),
        };
        Arc::new(ipvs::VirtualServer::new(options, list))
    }

    fn key() -> ipvs::VirtualServerKey {
        ipvs::VirtualServerKey::Address {
            protocol: ipvs::Protocol::Tcp,
            address: [10, 96, 0, 1].into(),
            port: 80,
        }
    }

    fn weights(server: &ipvs::VirtualServer) -> Vec<(String, u32)> {
        server.destinations.iter().map(|d| (d.key().address.to_string(), d.weight)).collect()
    }

    #[test]
    fn removed_destination_drains_until_its_deadline() {
        let mut drains = Drains::default();
        let now = now();
        let actual = server(ipvs::Scheduler::RR, &[(1, 1), (2, 1)]);
        let wanted = server(ipvs::Scheduler::RR, &[(1, 1)]);
        let tcp = Some(Protocol::Tcp);
        let draining = drains.effective(key(), tcp, Some(&actual), Some(&wanted), PERIOD, || now).unwrap();
        assert_eq!(weights(&draining), [("10.0.0.1".into(), 1), ("10.0.0.2".into(), 0)]);
        assert!(!drains.end(&key(), now.instant) && drains.len() == 1);
        let later = after(now, 30);
        let still = drains.effective(key(), tcp, Some(&draining), Some(&wanted), PERIOD, || later).unwrap();
        assert_eq!(still, draining, "until it is ended");
        assert!(drains.end(&key(), later.instant));
        let done = drains.effective(key(), tcp, Some(&draining), Some(&wanted), PERIOD, || later).unwrap();
        assert_eq!(weights(&done), [("10.0.0.1".into(), 1)]);
        assert!(drains.is_empty());
    }

    #[test]
    fn returning_destination_cancels_its_drain() {
        let mut drains = Drains::default();
        let now = now();
        let both = server(ipvs::Scheduler::RR, &[(1, 1), (2, 1)]);
        let one = server(ipvs::Scheduler::RR, &[(1, 1)]);
        let draining =
            drains.effective(key(), Some(Protocol::Tcp), Some(&both), Some(&one), PERIOD, || now).unwrap();
        let back = drains
            .effective(key(), Some(Protocol::Tcp), Some(&draining), Some(&both), PERIOD, || now)
            .unwrap();
        assert_eq!(back, both);
        assert!(drains.is_empty());
        // Its next drain has the whole period again.
        let again = after(now, 40);
        drains.effective(key(), Some(Protocol::Tcp), Some(&both), Some(&one), PERIOD, || again).unwrap();
        assert!(!drains.end(&key(), again.instant + Duration::from_secs(29)));
    }

    #[test]
    fn a_restart_goes_on_where_the_drain_was() {
        let both = server(ipvs::Scheduler::RR, &[(1, 1), (2, 1)]);
        let one = server(ipvs::Scheduler::RR, &[(1, 1)]);
        let tcp = Some(Protocol::Tcp);
        let begun = now();
        let effective = |actual: &Arc<ipvs::VirtualServer>, at: Now| {
            let mut drains = Drains::default();
            let server = drains.effective(key(), tcp, Some(actual), Some(&one), PERIOD, || at).unwrap();
            (server, drains)
        };
        let (draining, _) = effective(&both, begun);
        assert_eq!(draining.destinations[1].upper_threshold, 1001);
        // Another process, twelve seconds later: nothing to write, and eighteen are left, or a part of
        // a second more.
        let (adopted, mut drains) = effective(&draining, after(begun, 12));
        assert_eq!(adopted, draining);
        assert!(!drains.end(&key(), after(begun, 30).instant));
        assert!(drains.end(&key(), after(begun, 31).instant));
        assert_eq!(effective(&draining, begun).0, draining);
        // One that comes after the end finds nothing left to wait for.
        assert_eq!(effective(&draining, after(begun, 31)).0, one);
        assert_eq!(effective(&draining, after(begun, 3000)).0, one);
        // Nonsense, and what an older version left: from now on.
        for nonsense in [0, 1014] {
            let mut list = draining.destinations.clone();
            list[1].upper_threshold = nonsense;
            let strange = Arc::new(ipvs::VirtualServer::new(draining.options(), list));
            let (adopted, mut drains) = effective(&strange, after(begun, 12));
            assert_eq!(adopted.destinations[1].upper_threshold, 1013);
            assert!(!drains.end(&key(), after(begun, 41).instant));
        }
    }

    #[test]
    fn quiet_destination_goes_before_its_deadline() {
        let mut drains = Drains::default();
        let now = now();
        let both = server(ipvs::Scheduler::RR, &[(1, 1), (2, 1)]);
        let one = server(ipvs::Scheduler::RR, &[(1, 1)]);
        let tcp = Some(Protocol::Tcp);
        let draining = drains.effective(key(), tcp, Some(&both), Some(&one), PERIOD, || now).unwrap();
        drains.set_quiet(&key(), &draining.destinations[1].key());
        assert!(drains.end(&key(), now.instant));
        let done = drains.effective(key(), tcp, Some(&draining), Some(&one), PERIOD, || now).unwrap();
        assert_eq!(done, one);
    }

    #[test]
    fn a_server_goes_with_its_last_destination_and_not_before() {
        let mut drains = Drains::default();
        let now = now();
        let one = server(ipvs::Scheduler::RR, &[(1, 1)]);
        let none = server(ipvs::Scheduler::RR, &[]);
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let protocol = Some(protocol);
            assert_eq!(drains.effective(key(), protocol, None, Some(&none), PERIOD, || now), None);
            assert_eq!(
                drains.effective(key(), protocol, None, Some(&one), PERIOD, || now),
                Some(one.clone())
            );
        }
        let draining = drains.effective(key(), Some(Protocol::Tcp), Some(&one), Some(&none), PERIOD, || now);
        assert_eq!(weights(draining.as_ref().unwrap()), [("10.0.0.1".into(), 0)]);
        assert!(drains.end(&key(), after(now, 30).instant));
        assert_eq!(
            drains.effective(key(), Some(Protocol::Tcp), draining.as_ref(), Some(&none), PERIOD, || now),
            None
        );
        assert_eq!(
            drains.effective(key(), Some(Protocol::Udp), Some(&one), Some(&none), PERIOD, || now),
            None
        );
        assert_eq!(drains.effective(key(), Some(Protocol::Tcp), Some(&one), Some(&none), None, || now), None);
        assert!(drains.is_empty());
    }

    #[test]
    fn udp_dh_and_switched_off_do_not_drain_and_sh_falls_back() {
        let now = now();
        for (scheduler, protocol, period) in [
            (ipvs::Scheduler::RR, Protocol::Udp, PERIOD),
            (ipvs::Scheduler::DH, Protocol::Tcp, PERIOD),
            (ipvs::Scheduler::RR, Protocol::Tcp, None),
        ] {
            let both = server(scheduler, &[(1, 1), (2, 1)]);
            let one = server(scheduler, &[(1, 1)]);
            let mut drains = Drains::default();
            assert_eq!(
                drains.effective(key(), Some(protocol), Some(&both), Some(&one), period, || now).unwrap(),
                one
            );
            assert!(drains.is_empty());
        }
        let both = server(ipvs::Scheduler::SH, &[(1, 1), (2, 1)]);
        let one = server(ipvs::Scheduler::SH, &[(1, 1)]);
        let mut drains = Drains::default();
        let draining =
            drains.effective(key(), Some(Protocol::Sctp), Some(&both), Some(&one), PERIOD, || now).unwrap();
        assert!(draining.flags.contains(ipvs::Flags::SH_FALLBACK));
    }
}
