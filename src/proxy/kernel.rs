//! The room's kernel handles: dump and apply, and what is ours in each table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferroute_iptables::ipset::{self, Entry, Sets};
use ferroute_iptables::{Family, SetName};
use ferroute_ipvs as ipvs;

use super::drain::Now;
use super::error::Error;
use super::facts::Facts;
use super::ledger::Ledger;
use super::marks;
use super::mirror::Mirror;
use super::rules::CHAINS;
use super::sets::{self, Role, SetId};
use super::settings::Settings;
use super::work::{Messages, TABLES};
use crate::chains::{Chains, Rules};
use crate::cluster::service::Protocol;
use crate::cluster::{ServiceKey, Waker};
use crate::host::conntrack::{Conntrack, RemovedEndpoint};
use crate::host::events::{Event, Events, Interest, Watching};
use crate::host::kernel::Presence;
use crate::host::release::Release;
use crate::host::route::{PROTOCOL, Route, RouteChange, RouteFailure, RouteFilter, RouteKey, TABLE_LOCAL};
use crate::host::{Network, address, extension, kernel, sysctl};

/// The link that VIPs are bound to; kube-router's name.
pub const DUMMY_LINK: &str = "kube-dummy-if";
/// The pods' bridge; kube-router's name.
const BRIDGE: &str = "kube-bridge";
/// Most virtual servers for which the listing is read, in quadratic time: no change shall wait for it.
const LARGEST_LISTED: usize = 4096;
/// What the Service room cannot do without, by the names [`kernel::inspect`] gives.
const VITAL: [&str; 3] = ["IPVS", "ipset", "dummy links"];

/// Counters of one frontend of a Service, as the kernel has them.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceStatistics {
    /// The Service.
    pub service: ServiceKey,
    /// Address clients speak to.
    pub vip: IpAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port clients speak to.
    pub port: u16,
    /// Counters and rates.
    pub stats: ipvs::Statistics,
}

/// What changed on the host since the room last looked.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostChanges {
    /// Addresses or links came or went.
    pub addresses: bool,
    /// A route of ours went, or its link did.
    pub routes: bool,
    /// A program that may write rules of the legacy variant ran.
    pub rules: bool,
}

#[derive(Default)]
struct HostFlags {
    addresses: AtomicBool,
    routes: AtomicBool,
    rules: AtomicBool,
}

/// The handles. Each belongs to the network namespace of the thread that opened it.
pub struct Kernel {
    ipvs: ipvs::Handle,
    sets: ipset::Handle,
    rules: Chains,
    network: Network,
    conntrack: Conntrack,
    families: Vec<Family>,
    device: u32,
    flags: Arc<HostFlags>,
    _watching: Vec<Watching>,
    /// Sysctls whose refusal was told, so that it is told once.
    told: BTreeSet<String>,
    /// What the rules cannot be written without and was not found at the start.
    lacking: Vec<String>,
    listing: ipvs::Listing,
}

impl Kernel {
    /// Opens every handle for writing, makes the dummy link and sets the IPVS timeouts.
    pub fn open(settings: &Settings) -> Result<Self, Error> {
        let mut vital = Vec::new();
        for finding in kernel::inspect() {
            match finding.present {
                Presence::Present => tracing::debug!(%finding, "kernel"),
                Presence::Missing if VITAL.contains(&finding.name.as_str()) => {
                    vital.push(finding.to_string())
                }
                Presence::Missing if finding.name.starts_with("IPVS scheduler") => {
                    // Told again, on the Service, if one asks for it.
                    tracing::info!(%finding, "kernel");
                }
                Presence::Missing | Presence::Unknown => tracing::warn!(%finding, "kernel"),
            }
        }
        if !vital.is_empty() {
            return Err(Error::Kernel(vital.join("; ")));
        }
        let mut kernel = Self::open_handles()?;
        kernel.inspect_rules();
        kernel.ensure_link()?;
        kernel.set_timeouts(settings)?;
        Ok(kernel)
    }

    /// Looks for what the rules need. Services are served without rules as far as that goes, and the
    /// rules are tried again and again: the module may be loaded later.
    fn inspect_rules(&mut self) {
        let families: Vec<_> = self.families.iter().map(|family| host_family(*family)).collect();
        for finding in extension::inspect(&extension::OF_PROXY, &families, self.rules.uses_nft()) {
            match finding.present {
                Presence::Present => tracing::debug!(%finding, "kernel"),
                // The kernel loads it when a rule names it, if it has it.
                Presence::Unknown => tracing::info!(%finding, "kernel"),
                Presence::Missing => {
                    tracing::warn!(%finding, "kernel");
                    self.lacking.push(finding.to_string());
                }
            }
        }
    }

    /// Starts watching the network and the rules; `waker` is called when they change. Called on the room's own
    /// thread, so that the watching thread has no more capabilities than the room.
    pub fn watch(&mut self, waker: Waker) -> Result<(), Error> {
        let (flags, told) = (self.flags.clone(), waker.clone());
        self._watching = vec![watch(self.flags.clone(), waker)?];
        self._watching.extend(self.rules.watch(move || {
            flags.rules.store(true, Ordering::Release);
            told.wake();
        }));
        Ok(())
    }

    /// Opens every handle for reading; nothing is made or changed.
    pub fn open_to_read() -> Result<Self, Error> {
        Self::open_handles()
    }

    fn open_handles() -> Result<Self, Error> {
        let mut families = vec![Family::V4];
        if Path::new("/proc/sys/net/ipv6").exists() {
            families.push(Family::V6);
        }
        let rules = Chains::open(&mut families, CHAINS)?;
        let mut network = Network::open()?;
        let device = network.link(DUMMY_LINK)?.map_or(0, |link| link.index);
        Ok(Self {
            ipvs: ipvs::Handle::open()?,
            sets: ipset::Handle::open()?,
            rules,
            network,
            conntrack: Conntrack::open()?,
            families,
            device,
            flags: Arc::default(),
            _watching: Vec::new(),
            told: BTreeSet::new(),
            lacking: Vec::new(),
            listing: ipvs::Listing::default(),
        })
    }

    /// Families served: IPv6 only where the kernel and its iptables have it.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// Whether IPv6 is served.
    pub fn has_ipv6(&self) -> bool {
        self.families.contains(&Family::V6)
    }

    /// Index of the dummy link; 0 while there is none.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Netlink messages sent so far, by table.
    pub fn messages(&self) -> [Messages; TABLES.len()] {
        [
            Messages::of(self.ipvs.messages_sent(), self.ipvs.requests_sent()),
            Messages::of(self.sets.messages_sent(), self.sets.requests_sent()),
            Messages::of(self.network.messages_sent(), self.network.requests_sent()),
            Messages::of(self.conntrack.messages_sent(), self.conntrack.requests_sent()),
        ]
    }

    /// What changed on the host since this was last asked.
    pub fn take_host_changes(&self) -> HostChanges {
        HostChanges {
            addresses: self.flags.addresses.swap(false, Ordering::AcqRel),
            routes: self.flags.routes.swap(false, Ordering::AcqRel),
            rules: self.flags.rules.swap(false, Ordering::AcqRel),
        }
    }

    /// Addresses of links that are not dummy, kube or docker ones.
    pub fn host_addresses(&mut self) -> Result<Vec<IpAddr>, Error> {
        let links = self.network.links()?;
        let addresses = self.network.addresses()?;
        Ok(address::node_addresses(&links, &addresses))
    }

    /// Makes the dummy link exist and be up.
    pub fn ensure_link(&mut self) -> Result<(), Error> {
        let link = match self.network.link(DUMMY_LINK)? {
            Some(link) => link,
            None => {
                self.network.create_link(DUMMY_LINK, "dummy")?;
                self.network.link(DUMMY_LINK)?.ok_or(Error::LinkVanished(DUMMY_LINK))?
            }
        };
        if link.kind.as_deref() != Some("dummy") {
            return Err(Error::ForeignLink { name: DUMMY_LINK, kind: link.kind });
        }
        if !link.is_up() {
            self.network.set_link_up(link.index)?;
        }
        self.device = link.index;
        Ok(())
    }

    /// Makes the sysctls right; what is refused is told once.
    pub fn prepare(&mut self, facts: &Facts) {
        let node_link = self.node_link(facts);
        let mut interfaces = vec![BRIDGE, DUMMY_LINK];
        interfaces.extend(node_link.as_deref());
        let Some(release) = Release::running() else { return };
        for applied in sysctl::Sysctls::of_host().apply_all(&sysctl::proxy_settings(release, &interfaces)) {
            match &applied.outcome {
                sysctl::Outcome::AlreadyRight => {}
                sysctl::Outcome::Written { .. } => tracing::info!(%applied, "sysctl"),
                // The bridge appears with the first pod.
                sysctl::Outcome::Missing if applied.setting.key.contains(BRIDGE) => {}
                sysctl::Outcome::Missing | sysctl::Outcome::Refused { .. } => {
                    if self.told.insert(applied.setting.key.clone()) {
                        tracing::warn!(%applied, "sysctl");
                    }
                }
            }
        }
        let families: Vec<_> = self.families.iter().map(|family| host_family(*family)).collect();
        for finding in kernel::forwarding(&sysctl::Sysctls::of_host(), &families) {
            if finding.present == Presence::Missing && self.told.insert(finding.name.clone()) {
                tracing::warn!(%finding, "kernel");
            }
        }
    }

    fn node_link(&mut self, facts: &Facts) -> Option<String> {
        let node = facts.ipv4.or(facts.ipv6)?;
        let index = self.network.addresses().ok()?.into_iter().find(|a| a.address.addr() == node)?.link;
        self.network.links().ok()?.into_iter().find(|link| link.index == index).map(|link| link.name)
    }

    fn set_timeouts(&mut self, settings: &Settings) -> Result<(), Error> {
        if settings.tcp_timeout == 0 && settings.tcp_fin_timeout == 0 && settings.udp_timeout == 0 {
            return Ok(());
        }
        let now = self.ipvs.timeouts()?;
        let pick = |wanted: u32, kept: u32| if wanted == 0 { kept } else { wanted };
        let wanted = ipvs::Timeouts {
            tcp: pick(settings.tcp_timeout, now.tcp),
            tcp_fin: pick(settings.tcp_fin_timeout, now.tcp_fin),
            udp: pick(settings.udp_timeout, now.udp),
        };
        if wanted != now {
            self.ipvs.set_timeouts(&wanted)?;
        }
        Ok(())
    }

    /// Reads back what is ours. IPVS has no place for an owner's name, so a virtual server is ours
    /// when its mark is in our range, when the set of VIP ports (which carries our name and
    /// outlives us) lists it, or when it is wanted or was written by this process.
    pub fn read(&mut self, settings: &Settings, ledger: &Ledger, before: &Mirror) -> Result<Mirror, Error> {
        let sets = self.read_sets()?;
        let mut servers = self.ipvs.dump()?;
        servers.retain(|key, _| match *key {
            ipvs::VirtualServerKey::Mark { mark, .. } => marks::is_ours(mark),
            ipvs::VirtualServerKey::Address { protocol, address, port } => {
                let wanted = ledger.servers().contains_key(key);
                let excluded = settings.excluded_cidrs.iter().any(|cidr| cidr.contains(&address));
                let entry = Entry::IpPort(address, ferroute_iptables::Protocol(protocol.number()), port);
                let listed = || {
                    let set = SetId::of(Role::VipPorts, address).name();
                    sets.get(&set).is_some_and(|set| set.entries().contains_key(&entry))
                };
                wanted || (!excluded && (before.servers.contains_key(key) || listed()))
            }
        });
        // A table that equals what is wanted shares its memory with it.
        for (key, server) in &mut servers {
            if let Some(wanted) = ledger.servers().get(key)
                && **wanted == **server
            {
                *server = wanted.clone();
            }
        }
        Ok(Mirror { servers, sets, routes: self.read_routes()? })
    }

    /// Whether the tables differ from the mirror as far as a cheap look tells: one listing of IPVS, while
    /// that is cheap, and one request for the sizes of all sets. `known` is the mirror's fingerprint, if it
    /// was taken already.
    pub fn looks_changed(
        &mut self,
        mirror: &Mirror,
        ledger: &Ledger,
        known: &mut Option<ipvs::Fingerprint>,
    ) -> Result<bool, Error> {
        if mirror.servers.len() <= LARGEST_LISTED {
            let listed = self.listing.fingerprint(|key| match *key {
                ipvs::VirtualServerKey::Mark { mark, .. } => marks::is_ours(mark),
                ipvs::VirtualServerKey::Address { .. } => {
                    mirror.servers.contains_key(key) || ledger.servers().contains_key(key)
                }
            });
            if listed.is_some_and(|listed| {
                listed != *known.get_or_insert_with(|| ipvs::fingerprint(&mirror.servers))
            }) {
                return Ok(true);
            }
        }
        let headers = self.sets.headers()?;
        Ok(mirror.sets.iter().any(|(name, set)| {
            let header = headers.iter().find(|header| header.name == name.as_str());
            header.is_none_or(|header| usize::try_from(header.elements) != Ok(set.entries().len()))
        }))
    }

    /// Whether another program may have written rules since ours were last read.
    pub fn are_rules_disturbed(&mut self) -> bool {
        self.rules.is_disturbed()
    }

    /// Reads the sets of ours.
    pub fn read_sets(&mut self) -> Result<Sets, Error> {
        let mut sets = Sets::new();
        for name in set_names(&self.families) {
            if let Some(set) = self.sets.list(name)? {
                sets.insert(name, set);
            }
        }
        Ok(sets)
    }

    /// Reads the routes of ours to the dummy link.
    pub fn read_routes(&mut self) -> Result<BTreeMap<RouteKey, Route>, Error> {
        let filter =
            RouteFilter { protocol: Some(PROTOCOL), table: Some(TABLE_LOCAL), ..RouteFilter::default() };
        Ok(self.network.routes(filter)?.into_iter().map(|route| (route.key, route)).collect())
    }

    /// Applies set changes; those that succeed are noted in `sets`.
    pub fn apply_sets(
        &mut self,
        changes: &[ipset::Change],
        sets: &mut Sets,
    ) -> Result<Vec<ipset::Failed>, Error> {
        Ok(self.sets.apply_noting(changes, sets)?)
    }

    /// Replaces sets of another type: our chains go first, since the kernel destroys no set that a
    /// rule names. The caller writes the chains again at once.
    pub fn retype(&mut self, retype: &[ipset::Retype]) -> Result<(), Error> {
        if let Some(failure) = self.rules.remove(false).failed.into_iter().next() {
            return Err(Error::Kernel(failure));
        }
        for step in retype {
            tracing::info!(set = %step.set, from = %step.from, to = %step.to, "replacing a set of another type");
            if let Some(failure) = self.sets.apply(&step.changes)?.into_iter().next() {
                return Err(Error::Set(Box::new(failure)));
            }
        }
        Ok(())
    }

    /// Applies changes to virtual servers.
    pub fn apply_servers(&mut self, changes: &[ipvs::Change]) -> Result<Vec<ipvs::ChangeFailure>, Error> {
        Ok(self.ipvs.apply(changes)?)
    }

    /// Applies route changes; those that succeed are noted in `routes`.
    pub fn apply_routes(
        &mut self,
        changes: &[RouteChange],
        routes: &mut BTreeMap<RouteKey, Route>,
    ) -> Result<Vec<RouteFailure>, Error> {
        let failures = self.network.apply_routes(changes)?;
        for (index, change) in changes.iter().enumerate() {
            if failures.iter().any(|failure| failure.change == index) {
                continue;
            }
            match change {
                RouteChange::Add(route) | RouteChange::Replace(route) => {
                    routes.insert(route.key, *route);
                }
                RouteChange::Delete(route) => {
                    routes.remove(&route.key);
                }
            }
        }
        Ok(failures)
    }

    /// Makes the chains right and returns how many were not. With `check` they are read back first.
    pub fn sync_rules(&mut self, wanted: Rules, check: bool) -> Result<usize, Error> {
        self.rules.sync(wanted, check).map_err(|error| {
            if self.lacking.is_empty() {
                return error.into();
            }
            Error::Kernel(format!("{}; {error}", self.lacking.join("; ")))
        })
    }

    /// Deletes the stale UDP flows; returns how many.
    pub fn expire_udp(
        &mut self,
        removed: &[RemovedEndpoint],
        appeared: &[SocketAddr],
    ) -> Result<usize, Error> {
        let done = self.conntrack.delete_stale_udp(removed, appeared)?;
        for error in &done.failures {
            tracing::warn!(%error, "stale UDP flow stays");
        }
        Ok(done.deleted)
    }

    /// Destinations of weight 0 that have no connection left.
    pub fn quiet_destinations(
        &mut self,
        server: &ipvs::VirtualServerKey,
    ) -> Result<Vec<ipvs::DestinationKey>, Error> {
        Ok(self
            .ipvs
            .dump_destinations(*server)?
            .into_iter()
            .filter(|(destination, stats)| {
                destination.weight == 0 && stats.active_connections == 0 && stats.inactive_connections == 0
            })
            .map(|(destination, _)| destination.key())
            .collect())
    }

    /// Traffic counters of every virtual server that belongs to a Service.
    pub fn statistics(&mut self, ledger: &Ledger) -> Vec<ServiceStatistics> {
        let stats = match self.ipvs.dump_stats() {
            Ok(stats) => stats,
            Err(error) => {
                tracing::warn!(%error, "cannot read IPVS counters");
                return Vec::new();
            }
        };
        stats
            .into_iter()
            .filter_map(|(key, stats)| match key {
                ipvs::VirtualServerKey::Address { protocol, address, port } => Some(ServiceStatistics {
                    service: ledger.owner(&key)?,
                    vip: address,
                    protocol: sets::service_protocol(protocol),
                    port,
                    stats,
                }),
                ipvs::VirtualServerKey::Mark { .. } => None,
            })
            .collect()
    }

    /// What [`Kernel::sync_rules`] would write, one line each.
    pub fn rules_difference(&self, wanted: &Rules) -> Result<Vec<String>, Error> {
        Ok(self.rules.difference(wanted)?)
    }
}

/// This moment, for [`super::drain`].
pub fn now() -> Now {
    let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from);
    // Without that clock every drain found in the kernel seems to begin now.
    let seconds = boot.unwrap_or_default().as_secs();
    Now { instant: Instant::now(), boot_seconds: u32::try_from(seconds).unwrap_or(0) }
}

/// Names of every set of ours.
pub fn set_names(families: &[Family]) -> Vec<SetName> {
    Role::ALL
        .into_iter()
        .flat_map(|role| families.iter().map(move |family| SetId { role, family: *family }.name()))
        .collect()
}

fn host_family(family: Family) -> crate::host::Family {
    match family {
        Family::V4 => crate::host::Family::V4,
        Family::V6 => crate::host::Family::V6,
    }
}

fn watch(flags: Arc<HostFlags>, waker: Waker) -> Result<Watching, Error> {
    let lost = flags.clone();
    let events = Events::subscribe(Interest::ALL)?;
    let told = waker.clone();
    events
        .spawn(
            move |event| {
                let (addresses, routes) = match event {
                    Event::Address(_) | Event::AddressGone(_) => (true, true),
                    Event::LinkGone(link) | Event::Link(link) => (false, link.name == DUMMY_LINK),
                    Event::RouteGone(route) => (false, route.protocol == PROTOCOL),
                    Event::Route(_) | Event::RuleGone => (false, false),
                    Event::Overrun => (true, true),
                };
                flags.addresses.fetch_or(addresses, Ordering::AcqRel);
                flags.routes.fetch_or(routes, Ordering::AcqRel);
                if addresses || routes {
                    waker.wake();
                }
            },
            move |error| {
                // The periodic audit still sees every change, only later.
                tracing::warn!(%error, "network changes are seen by the periodic audit only");
                lost.addresses.store(true, Ordering::Release);
                told.wake();
            },
        )
        .map_err(Error::Thread)
}
