//! Routes carrying a protocol number of ours: list, add, replace, delete, and the pure difference.
//!
//! A VIP is a local route to the dummy link in table local with the node's address as preferred
//! source: packets to it are delivered here, and programs of the host do not speak from it.
//!
//! Both families number a route by destination, table and metric. Ours carry [`METRIC`], so they
//! never meet the kernel's own local routes (metric 0) of an address with the same prefix.
//!
//! Wire format: `struct rtmsg` and RTA_* of linux/rtnetlink.h.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;

use ferroute_netlink::{Batch, Body, DecodeError, attributes, flags};
use ipnet::IpNet;

use super::{Error, Family, Network};

/// The route protocol number (rtm_protocol) that marks every route of ours.
pub const PROTOCOL: u8 = 70;

/// Metric of our routes: the one the kernel gives to IPv6 routes that name none, used for both
/// families so that a key means the same.
pub const METRIC: u32 = 1024;

/// Table local (RT_TABLE_LOCAL), searched before all others.
pub const TABLE_LOCAL: u32 = 255;

/// Table main (RT_TABLE_MAIN).
pub const TABLE_MAIN: u32 = 254;

/// Scope of IPv4 routes to this host (RT_SCOPE_HOST). IPv6 has no route scopes and reports 0.
const SCOPE_HOST: u8 = 254;
/// Scope of IPv4 routes to a directly connected network (RT_SCOPE_LINK).
pub(super) const SCOPE_LINK: u8 = 253;

pub(super) const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;

pub(super) const RTA_DST: u16 = 1;
pub(super) const RTA_OIF: u16 = 4;
pub(super) const RTA_GATEWAY: u16 = 5;
pub(super) const RTA_PRIORITY: u16 = 6;
pub(super) const RTA_PREFSRC: u16 = 7;
pub(super) const RTA_TABLE: u16 = 15;

/// Placeholder in the 8-bit table field when RTA_TABLE holds the number (RT_TABLE_COMPAT).
const TABLE_COMPAT: u8 = 252;
/// rtm_flags of cached copies, which are no routes (RTM_F_CLONED).
pub(super) const CLONED: u32 = 0x200;

/// Length of `struct rtmsg`.
pub(super) const HEADER: usize = 12;

/// What happens to packets that take a route (RTN_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// Forwarded to a gateway or onto a link.
    Unicast,
    /// Delivered to this host.
    Local,
    /// Dropped silently.
    Blackhole,
    /// Refused with a host-unreachable message.
    Unreachable,
    /// Any other RTN_* number.
    Other(u8),
}

impl RouteKind {
    fn number(self) -> u8 {
        match self {
            RouteKind::Unicast => 1,
            RouteKind::Local => 2,
            RouteKind::Blackhole => 6,
            RouteKind::Unreachable => 7,
            RouteKind::Other(number) => number,
        }
    }

    pub(super) fn from_number(number: u8) -> Self {
        match number {
            1 => RouteKind::Unicast,
            2 => RouteKind::Local,
            6 => RouteKind::Blackhole,
            7 => RouteKind::Unreachable,
            number => RouteKind::Other(number),
        }
    }
}

impl fmt::Display for RouteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteKind::Unicast => f.write_str("unicast"),
            RouteKind::Local => f.write_str("local"),
            RouteKind::Blackhole => f.write_str("blackhole"),
            RouteKind::Unreachable => f.write_str("unreachable"),
            RouteKind::Other(number) => write!(f, "type {number}"),
        }
    }
}

/// What tells one route of ours from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey {
    /// Destination, host bits zero.
    pub destination: IpNet,
    /// Routing table number.
    pub table: u32,
    /// Metric; lower wins.
    pub metric: u32,
}

/// One route with at most one next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// Destination, table and metric.
    pub key: RouteKey,
    /// What happens to the packets.
    pub kind: RouteKind,
    /// Index of the outgoing link.
    pub device: Option<u32>,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Source address for packets of this host that name none.
    pub source: Option<IpAddr>,
    /// Who made the route (RTPROT_*); ours is [`PROTOCOL`].
    pub protocol: u8,
    /// RT_SCOPE_*; always 0 for IPv6.
    pub scope: u8,
}

impl Route {
    /// The local route that binds a VIP or a whole range of VIPs to `device`, speaking from
    /// `source`.
    pub fn local(destination: IpNet, device: u32, source: Option<IpAddr>) -> Self {
        let destination = destination.trunc();
        Route {
            key: RouteKey { destination, table: TABLE_LOCAL, metric: METRIC },
            kind: RouteKind::Local,
            device: Some(device),
            gateway: None,
            source,
            protocol: PROTOCOL,
            scope: if destination.addr().is_ipv4() { SCOPE_HOST } else { 0 },
        }
    }

    /// A route in table main to `destination` over `device`, through `gateway` where given.
    pub fn unicast(destination: IpNet, device: u32, gateway: Option<IpAddr>) -> Self {
        let destination = destination.trunc();
        let scope = if destination.addr().is_ipv4() && gateway.is_none() { SCOPE_LINK } else { 0 };
        Route {
            key: RouteKey { destination, table: TABLE_MAIN, metric: METRIC },
            kind: RouteKind::Unicast,
            device: Some(device),
            gateway,
            source: None,
            protocol: PROTOCOL,
            scope,
        }
    }

    /// Reads an RTM_NEWROUTE or RTM_DELROUTE payload; `None` for what is no IP route (other
    /// families, cached copies, values outside their range). Next hops of a multipath route are
    /// not read: we make none.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (header, rest) = super::split_header::<HEADER>(payload)?;
        let [family, prefix_length, _, _, table, protocol, scope, kind, bits @ ..] = *header;
        let Some(family) = Family::from_number(family) else { return Ok(None) };
        if u32::from_ne_bytes(bits) & CLONED != 0 {
            return Ok(None);
        }
        let mut destination = family.unspecified();
        let mut route_table = u32::from(table);
        let mut metric = 0;
        let (mut device, mut gateway, mut source) = (None, None, None);
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                RTA_DST => destination = attribute.address()?,
                RTA_OIF => device = Some(attribute.u32()?),
                RTA_GATEWAY => gateway = Some(attribute.address()?),
                RTA_PRIORITY => metric = attribute.u32()?,
                RTA_PREFSRC => source = Some(attribute.address()?),
                RTA_TABLE => route_table = attribute.u32()?,
                _ => {}
            }
        }
        if Family::of(destination) != family {
            return Ok(None);
        }
        let Ok(destination) = IpNet::new(destination, prefix_length) else { return Ok(None) };
        Ok(Some(Route {
            key: RouteKey { destination: destination.trunc(), table: route_table, metric },
            kind: RouteKind::from_number(kind),
            device,
            gateway,
            source,
            protocol,
            scope,
        }))
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RouteKey { destination, table, metric } = self.key;
        write!(f, "{} {destination}", self.kind)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(device) = self.device {
            write!(f, " dev index {device}")?;
        }
        write!(f, " table {table} metric {metric} proto {}", self.protocol)?;
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        Ok(())
    }
}

/// Which routes to list; empty lists all of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteFilter {
    /// Only this family.
    pub family: Option<Family>,
    /// Only routes made by this protocol number.
    pub protocol: Option<u8>,
    /// Only this table.
    pub table: Option<u32>,
    /// Only routes over this link.
    pub device: Option<u32>,
}

impl RouteFilter {
    /// Whether a route passes.
    pub fn admits(&self, route: &Route) -> bool {
        self.family.is_none_or(|family| family == Family::of(route.key.destination.addr()))
            && self.protocol.is_none_or(|protocol| protocol == route.protocol)
            && self.table.is_none_or(|table| table == route.key.table)
            && self.device.is_none_or(|device| Some(device) == route.device)
    }
}

/// A route as it is written and compared: with one next hop ([`Route`]) or several
/// ([`super::forwarding::ForwardingRoute`]).
pub trait RouteRecord: Clone + Ord + fmt::Display {
    /// Destination, table and metric.
    fn key(&self) -> RouteKey;
    /// Who made it (RTPROT_*).
    fn protocol(&self) -> u8;
    /// RT_SCOPE_*.
    fn scope(&self) -> u8;
    /// What happens to the packets.
    fn kind(&self) -> RouteKind;
    /// Writes the attributes behind destination, table and metric: links, gateways, source.
    fn write(&self, body: &mut Body<'_>);
}

impl RouteRecord for Route {
    fn key(&self) -> RouteKey {
        self.key
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn scope(&self) -> u8 {
        self.scope
    }

    fn kind(&self) -> RouteKind {
        self.kind
    }

    fn write(&self, body: &mut Body<'_>) {
        if let Some(device) = self.device {
            body.u32(RTA_OIF, device);
        }
        if let Some(gateway) = self.gateway {
            super::write_address(body, RTA_GATEWAY, gateway);
        }
        if let Some(source) = self.source {
            super::write_address(body, RTA_PREFSRC, source);
        }
    }
}

/// One write to the routing tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteChange<R = Route> {
    /// Add; fails when the key is taken by anybody.
    Add(R),
    /// Put this in place of our route with the same key, with no moment without either.
    Replace(R),
    /// Remove exactly this route.
    Delete(R),
}

impl<R> RouteChange<R> {
    /// The route that is written or removed.
    pub fn route(&self) -> &R {
        match self {
            RouteChange::Add(route) | RouteChange::Replace(route) | RouteChange::Delete(route) => route,
        }
    }

    fn action(&self) -> &'static str {
        match self {
            RouteChange::Add(_) => "add route",
            RouteChange::Replace(_) => "replace route",
            RouteChange::Delete(_) => "delete route",
        }
    }
}

/// The writes that turn `actual` into `desired`: additions and replacements first, in the order of
/// `desired`, then deletions. Routes in `actual` that do not carry [`PROTOCOL`] are a stranger's
/// and stay. Give both sides narrowed to the same keys to work on a part of the table.
pub fn diff<'a, R: RouteRecord + 'a>(
    actual: impl IntoIterator<Item = &'a R>,
    desired: impl IntoIterator<Item = &'a R>,
) -> Vec<RouteChange<R>> {
    // More than one route of ours under a key means that somebody appended one (IPv4 allows it).
    let mut present: HashMap<RouteKey, Vec<&R>, foldhash::fast::RandomState> = HashMap::default();
    for route in actual {
        if route.protocol() == PROTOCOL {
            present.entry(route.key()).or_default().push(route);
        }
    }
    let mut changes = Vec::new();
    let mut deletions: Vec<&R> = Vec::new();
    for route in desired {
        match present.remove(&route.key()) {
            None => changes.push(RouteChange::Add(route.clone())),
            Some(mut found) => {
                match found.iter().position(|candidate| *candidate == route) {
                    Some(position) => {
                        found.remove(position);
                    }
                    None => {
                        // The kernel replaces the first route of the key.
                        found.remove(0);
                        changes.push(RouteChange::Replace(route.clone()));
                    }
                }
                deletions.extend(found);
            }
        }
    }
    deletions.extend(present.into_values().flatten());
    deletions.sort_unstable();
    changes.extend(deletions.into_iter().map(|route| RouteChange::Delete(route.clone())));
    changes
}

/// A change of a batch that the kernel refused.
#[derive(Debug)]
pub struct RouteFailure {
    /// Index in the list of changes.
    pub change: usize,
    /// What the kernel said.
    pub error: Error,
}

impl Network {
    /// Lists routes. The kernel filters where it can (strict checking, 4.20 and later); every
    /// route is checked again here.
    pub fn routes(&mut self, filter: RouteFilter) -> Result<Vec<Route>, Error> {
        self.list_routes(filter, |payload| Ok(Route::decode(payload)?.filter(|route| filter.admits(route))))
    }

    /// Lists what `decode` makes of routes; it has to filter again.
    pub(super) fn list_routes<R>(
        &mut self,
        filter: RouteFilter,
        decode: impl Fn(&[u8]) -> Result<Option<R>, DecodeError>,
    ) -> Result<Vec<R>, Error> {
        let mut routes = Vec::new();
        for family in Family::BOTH {
            if filter.family.is_some_and(|wanted| wanted != family) {
                continue;
            }
            encode_dump(&mut self.batch, family, &filter);
            let found =
                self.socket.dump(
                    &self.batch,
                    |kind, payload| {
                        if kind == RTM_NEWROUTE { decode(payload) } else { Ok(None) }
                    },
                );
            match found {
                Ok(found) => routes.extend(found),
                // A kernel that filters says "no such table" or "no such link" instead of listing
                // nothing.
                Err(source) if filter_matches_nothing(&source) => {}
                Err(source) => return Err(Error::Transport { action: "list routes", source }),
            }
        }
        Ok(routes)
    }

    /// Applies changes in order, one message each, in as few sends as fit. Deleting what is gone
    /// already is no failure.
    pub fn apply_routes<R: RouteRecord>(
        &mut self,
        changes: &[RouteChange<R>],
    ) -> Result<Vec<RouteFailure>, Error> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        self.batch.clear();
        for change in changes {
            encode(&mut self.batch, change);
        }
        let failures = self
            .socket
            .execute(&self.batch)
            .map_err(|source| Error::Transport { action: "write routes", source })?;
        Ok(failures
            .into_iter()
            .filter_map(|failure| {
                let index = failure.index;
                let change = changes.get(index)?;
                let gone = failure.errno == nix::libc::ESRCH && matches!(change, RouteChange::Delete(_));
                (!gone).then(|| RouteFailure {
                    change: index,
                    error: Error::refused(change.action(), change.route().to_string(), failure),
                })
            })
            .collect())
    }
}

fn filter_matches_nothing(error: &ferroute_netlink::Error) -> bool {
    matches!(error.errno(), Some(nix::libc::ENOENT | nix::libc::ENODEV))
}

fn table_byte(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(TABLE_COMPAT)
}

fn encode_dump(batch: &mut Batch, family: Family, filter: &RouteFilter) {
    let mut header = [0; HEADER];
    header[0] = family.number();
    header[4] = filter.table.map_or(0, table_byte);
    header[5] = filter.protocol.unwrap_or(0);
    batch.clear();
    batch.message(RTM_GETROUTE, flags::DUMP, |body| {
        body.raw(&header);
        if let Some(table) = filter.table {
            body.u32(RTA_TABLE, table);
        }
        if let Some(device) = filter.device {
            body.u32(RTA_OIF, device);
        }
    });
}

pub(super) fn encode<R: RouteRecord>(batch: &mut Batch, change: &RouteChange<R>) {
    let (kind, mode) = match change {
        RouteChange::Add(_) => (RTM_NEWROUTE, flags::CREATE | flags::EXCL),
        // CREATE too: should the route have vanished since it was read, it is made.
        RouteChange::Replace(_) => (RTM_NEWROUTE, flags::CREATE | flags::REPLACE),
        RouteChange::Delete(_) => (RTM_DELROUTE, 0),
    };
    let route = change.route();
    let RouteKey { destination, table, metric } = route.key();
    let mut header = [0; HEADER];
    header[0] = Family::of(destination.addr()).number();
    header[1] = destination.prefix_len();
    header[4] = table_byte(table);
    header[5] = route.protocol();
    header[6] = route.scope();
    header[7] = route.kind().number();
    batch.message(kind, mode, |body| {
        body.raw(&header);
        super::write_address(body, RTA_DST, destination.addr());
        body.u32(RTA_TABLE, table);
        if metric != 0 {
            body.u32(RTA_PRIORITY, metric);
        }
        route.write(body);
    });
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

    #[test]
    fn a_vip_route_in_bytes() {
        let mut batch = Batch::new();
        let route = Route::local(net("10.96.0.10/32"), 5, Some(ip("192.168.0.2")));
        encode(&mut batch, &RouteChange::Add(route));
        assert_eq!(batch.len(), 1);
        // Header: AF_INET, /32, no source, tos 0, table 255, protocol 70, scope host, type local.
        assert_eq!(batch.bytes()[16..28], [2, 32, 0, 0, 255, 70, 254, 2, 0, 0, 0, 0]);
        assert_eq!(u16::from_ne_bytes([batch.bytes()[4], batch.bytes()[5]]), RTM_NEWROUTE);
        let mode = u16::from_ne_bytes([batch.bytes()[6], batch.bytes()[7]]);
        assert_eq!(mode & (flags::CREATE | flags::EXCL | flags::REPLACE), flags::CREATE | flags::EXCL);

        let v6 = Route::local(net("fd00:10:96::/108"), 5, None);
        assert_eq!(v6.scope, 0);
        assert_eq!(v6.to_string(), "local fd00:10:96::/108 dev index 5 table 255 metric 1024 proto 70");
    }

    #[test]
    fn a_change_of_source_replaces() {
        let before = Route::local(net("10.96.0.0/12"), 5, Some(ip("192.168.0.2")));
        let after = Route { source: Some(ip("192.168.0.3")), ..before };
        assert_eq!(diff([&before], [&after]), [RouteChange::Replace(after)]);
        assert_eq!(diff([&before], [&before]), []);
    }

    #[test]
    fn a_second_route_under_one_key_goes() {
        let ours = Route::local(net("10.96.0.0/12"), 5, None);
        let appended = Route { device: Some(9), ..ours };
        assert_eq!(diff([&appended, &ours], [&ours]), [RouteChange::Delete(appended)]);
        let wanted = Route { device: Some(7), ..ours };
        assert_eq!(
            diff([&appended, &ours], [&wanted]),
            [RouteChange::Replace(wanted), RouteChange::Delete(ours)]
        );
    }

    fn destination() -> impl Strategy<Value = IpNet> {
        // Few values, so that keys meet.
        (0u8..4, 24u8..=32, any::<bool>()).prop_map(|(last, length, v6)| {
            let address = if v6 { ip(&format!("fd00::{last}")) } else { ip(&format!("10.0.0.{last}")) };
            IpNet::new(address, if v6 { length + 96 } else { length }).unwrap().trunc()
        })
    }

    fn route() -> impl Strategy<Value = Route> {
        (destination(), 1u32..4, prop::option::of(1u8..4)).prop_map(|(destination, device, source)| {
            let source = source.map(|last| match Family::of(destination.addr()) {
                Family::V4 => ip(&format!("192.168.0.{last}")),
                Family::V6 => ip(&format!("fd01::{last}")),
            });
            Route::local(destination, device, source)
        })
    }

    fn stranger() -> impl Strategy<Value = Route> {
        (route(), prop::sample::select(vec![2u8, 3, 4, 17])).prop_map(|(mut route, protocol)| {
            route.protocol = protocol;
            route.key.metric = 0;
            route
        })
    }

    fn unique(routes: Vec<Route>) -> Vec<Route> {
        let mut seen = std::collections::HashSet::new();
        routes.into_iter().filter(|route| seen.insert(route.key)).collect()
    }

    /// The kernel's rules, plainly. At no step may a key that is wanted and was there be absent.
    fn apply(table: &mut Vec<Route>, changes: &[RouteChange], always: &[RouteKey]) {
        for change in changes {
            match change {
                RouteChange::Add(route) => {
                    assert!(!table.iter().any(|other| other.key == route.key), "EEXIST: {route}");
                    table.push(*route);
                }
                RouteChange::Replace(route) => {
                    let place =
                        table.iter_mut().find(|other| other.key == route.key).expect("one to replace");
                    *place = *route;
                }
                RouteChange::Delete(route) => {
                    let position = table.iter().position(|other| other == route).expect("ESRCH");
                    table.remove(position);
                }
            }
            for key in always {
                assert!(table.iter().any(|route| route.key == *key), "gap at {key:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Route::decode(&bytes);
        }

        #[test]
        fn what_is_written_is_read_back(route in route(), table in any::<u32>(), metric in any::<u32>()) {
            let mut route = route;
            route.key.table = table;
            route.key.metric = metric;
            let mut batch = Batch::new();
            encode(&mut batch, &RouteChange::Add(route));
            prop_assert_eq!(Route::decode(&batch.bytes()[16..]).unwrap(), Some(route));
        }

        #[test]
        fn applying_the_difference_gives_what_is_desired(
            ours in prop::collection::vec(route(), 0..12),
            strangers in prop::collection::vec(stranger(), 0..6),
            desired in prop::collection::vec(route(), 0..12),
        ) {
            let desired = unique(desired);
            let mut table = ours;
            table.dedup();
            table.extend(&strangers);
            let always: Vec<RouteKey> = desired
                .iter()
                .map(|route| route.key)
                .filter(|key| table.iter().any(|route| route.key == *key))
                .collect();
            let changes = diff(&table, &desired);
            apply(&mut table, &changes, &always);

            let mut left: Vec<Route> = table.iter().filter(|r| r.protocol != PROTOCOL).copied().collect();
            let mut strangers = strangers;
            left.sort_unstable();
            strangers.sort_unstable();
            prop_assert_eq!(left, strangers);

            let mut now: Vec<Route> = table.iter().filter(|r| r.protocol == PROTOCOL).copied().collect();
            let mut wanted = desired.clone();
            now.sort_unstable();
            wanted.sort_unstable();
            prop_assert_eq!(now, wanted);
            prop_assert!(diff(&table, &desired).is_empty());
        }

        #[test]
        fn a_narrow_difference_is_the_wide_one_at_its_keys(
            actual in prop::collection::vec(route(), 0..10),
            desired in prop::collection::vec(route(), 0..10),
            keys in prop::collection::vec(destination(), 0..6),
        ) {
            let (actual, desired) = (unique(actual), unique(desired));
            let inside = |route: &&Route| keys.contains(&route.key.destination);
            let narrow = diff(actual.iter().filter(inside), desired.iter().filter(inside));
            let wide: Vec<RouteChange> =
                diff(&actual, &desired).into_iter().filter(|change| inside(&change.route())).collect();
            prop_assert_eq!(narrow, wide);
        }
    }
}
