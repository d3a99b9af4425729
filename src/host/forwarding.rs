//! Routes that forward: over one link or gateway, or shared among several (ECMP). Listed, written and
//! compared as those of [`super::route`], whose key, changes and difference they share.
//!
//! Ours carry [`METRIC`]: larger than what the kernel gives its own routes (0; in IPv6 256 and 1024) and
//! larger than what administrators and DHCP use, so that where both have a prefix, theirs is taken.
//!
//! Wire format: `struct rtmsg`, RTA_MULTIPATH with `struct rtnexthop`, RTA_VIA of linux/rtnetlink.h.

use std::fmt;
use std::net::IpAddr;

use ferroute_netlink::{Body, DecodeError, attributes};
use ipnet::IpNet;

use super::route::{
    CLONED, HEADER, PROTOCOL, RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE,
    RouteFilter, RouteKey, RouteKind, RouteRecord, SCOPE_LINK,
};
use super::{Error, Family, Network};

/// Metric of our forwarding routes.
pub const METRIC: u32 = 20_000;

const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
/// Length of `struct rtnexthop`.
const HOP_HEADER: usize = 8;

/// One way a route may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hop {
    /// Index of the outgoing link; 0 when the kernel named none.
    pub device: u32,
    /// Next router; none on a tunnel or for a connected network.
    pub gateway: Option<IpAddr>,
}

/// A route with any number of next hops.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ForwardingRoute {
    /// Destination, table and metric.
    pub key: RouteKey,
    /// Sorted. None for routes that lead nowhere (blackhole and its kin).
    pub hops: Vec<Hop>,
    /// Source address for packets of this host that name none.
    pub source: Option<IpAddr>,
    /// Who made the route (RTPROT_*).
    pub protocol: u8,
    /// What happens to the packets.
    pub kind: RouteKind,
}

impl ForwardingRoute {
    /// A route of ours.
    pub fn new(destination: IpNet, table: u32, mut hops: Vec<Hop>, source: Option<IpAddr>) -> Self {
        hops.sort_unstable();
        hops.dedup();
        ForwardingRoute {
            key: RouteKey { destination: destination.trunc(), table, metric: METRIC },
            hops,
            source,
            protocol: PROTOCOL,
            kind: RouteKind::Unicast,
        }
    }

    /// Reads an RTM_NEWROUTE or RTM_DELROUTE payload; `None` for what is no IP route.
    ///
    /// # Errors
    /// When it is cut off or an attribute has a wrong length.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (header, rest) = super::split_header::<HEADER>(payload)?;
        let [family, prefix_length, _, _, table, protocol, _, kind, bits @ ..] = *header;
        let Some(family) = Family::from_number(family) else { return Ok(None) };
        if u32::from_ne_bytes(bits) & CLONED != 0 {
            return Ok(None);
        }
        let mut key = RouteKey {
            // Replaced below, or the default route.
            destination: IpNet::from(family.unspecified()),
            table: u32::from(table),
            metric: 0,
        };
        let mut destination = family.unspecified();
        let (mut single, mut hops, mut source) = (Hop { device: 0, gateway: None }, Vec::new(), None);
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                RTA_DST => destination = attribute.address()?,
                RTA_OIF => single.device = attribute.u32()?,
                RTA_GATEWAY => single.gateway = Some(attribute.address()?),
                RTA_VIA => single.gateway = via(attribute.payload),
                RTA_PRIORITY => key.metric = attribute.u32()?,
                RTA_PREFSRC => source = Some(attribute.address()?),
                RTA_TABLE => key.table = attribute.u32()?,
                RTA_MULTIPATH => hops = multipath(attribute.payload)?,
                _ => {}
            }
        }
        if Family::of(destination) != family {
            return Ok(None);
        }
        let Ok(destination) = IpNet::new(destination, prefix_length) else { return Ok(None) };
        key.destination = destination.trunc();
        if hops.is_empty() && (single.device != 0 || single.gateway.is_some()) {
            hops.push(single);
        }
        hops.sort_unstable();
        Ok(Some(ForwardingRoute { key, hops, source, protocol, kind: RouteKind::from_number(kind) }))
    }

    /// Whether packets leave by this link.
    pub fn uses(&self, device: u32) -> bool {
        self.hops.iter().any(|hop| hop.device == device)
    }
}

fn multipath(mut payload: &[u8]) -> Result<Vec<Hop>, DecodeError> {
    let mut hops = Vec::new();
    while !payload.is_empty() {
        let (header, _) = super::split_header::<HOP_HEADER>(payload)?;
        let [low, high, _, _, device @ ..] = *header;
        let length = usize::from(u16::from_ne_bytes([low, high]));
        let cut = || DecodeError::Length { what: "next hop", length, available: payload.len() };
        let inside = payload.get(HOP_HEADER..length).ok_or_else(cut)?;
        let mut hop = Hop { device: u32::from_ne_bytes(device), gateway: None };
        for attribute in attributes(inside) {
            let attribute = attribute?;
            match attribute.kind {
                RTA_GATEWAY => hop.gateway = Some(attribute.address()?),
                RTA_VIA => hop.gateway = via(attribute.payload),
                _ => {}
            }
        }
        hops.push(hop);
        // Hops are aligned to four bytes; the last one's padding may be missing.
        payload = payload.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(hops)
}

/// `struct rtvia`: a gateway of another family than the destination.
fn via(payload: &[u8]) -> Option<IpAddr> {
    let (family, address) = payload.split_first_chunk::<2>()?;
    match Family::from_number(u8::try_from(u16::from_ne_bytes(*family)).ok()?)? {
        Family::V4 => <[u8; 4]>::try_from(address).ok().map(IpAddr::from),
        Family::V6 => <[u8; 16]>::try_from(address).ok().map(IpAddr::from),
    }
}

fn write_gateway(body: &mut Body<'_>, destination: IpAddr, gateway: IpAddr) {
    if destination.is_ipv4() == gateway.is_ipv4() {
        return super::write_address(body, RTA_GATEWAY, gateway);
    }
    let mut bytes = u16::from(Family::of(gateway).number()).to_ne_bytes().to_vec();
    match gateway {
        IpAddr::V4(address) => bytes.extend(address.octets()),
        IpAddr::V6(address) => bytes.extend(address.octets()),
    }
    body.bytes(RTA_VIA, &bytes);
}

impl RouteRecord for ForwardingRoute {
    fn key(&self) -> RouteKey {
        self.key
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn scope(&self) -> u8 {
        let is_direct = self.hops.iter().all(|hop| hop.gateway.is_none());
        if self.key.destination.addr().is_ipv4() && is_direct && self.kind == RouteKind::Unicast {
            SCOPE_LINK
        } else {
            0
        }
    }

    fn kind(&self) -> RouteKind {
        self.kind
    }

    fn write(&self, body: &mut Body<'_>) {
        let destination = self.key.destination.addr();
        match self.hops.as_slice() {
            [] => {}
            [hop] => {
                if hop.device != 0 {
                    body.u32(RTA_OIF, hop.device);
                }
                if let Some(gateway) = hop.gateway {
                    write_gateway(body, destination, gateway);
                }
            }
            hops => {
                let mut bytes = Vec::with_capacity(hops.len() * 28);
                for hop in hops {
                    let mut inside = ferroute_netlink::Batch::new();
                    inside.message(0, 0, |body| {
                        if let Some(gateway) = hop.gateway {
                            write_gateway(body, destination, gateway);
                        }
                    });
                    let attributes = inside.bytes().get(MESSAGE_HEADER..).unwrap_or_default();
                    // At most 8 + 4 + 20 bytes.
                    let length = u16::try_from(HOP_HEADER + attributes.len()).unwrap_or(u16::MAX);
                    bytes.extend(length.to_ne_bytes());
                    bytes.extend([0, 0]);
                    bytes.extend(hop.device.to_ne_bytes());
                    bytes.extend(attributes);
                }
                body.bytes(RTA_MULTIPATH, &bytes);
            }
        }
        if let Some(source) = self.source {
            super::write_address(body, RTA_PREFSRC, source);
        }
    }
}

/// Length of `struct nlmsghdr`, which a batch puts before each body.
const MESSAGE_HEADER: usize = 16;

impl fmt::Display for ForwardingRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RouteKey { destination, table, metric } = self.key;
        write!(f, "{} {destination}", self.kind)?;
        for (index, hop) in self.hops.iter().enumerate() {
            if index > 0 {
                f.write_str(" and")?;
            }
            if let Some(gateway) = hop.gateway {
                write!(f, " via {gateway}")?;
            }
            write!(f, " dev index {}", hop.device)?;
        }
        write!(f, " table {table} metric {metric} proto {}", self.protocol)?;
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        Ok(())
    }
}

impl Network {
    /// Lists routes with all their next hops. A filter's device is passed by when any hop uses it.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub fn forwarding_routes(&mut self, filter: RouteFilter) -> Result<Vec<ForwardingRoute>, Error> {
        let RouteFilter { family, protocol, table, device } = filter;
        let admits = |route: &ForwardingRoute| {
            family.is_none_or(|family| family == Family::of(route.key.destination.addr()))
                && protocol.is_none_or(|protocol| protocol == route.protocol)
                && table.is_none_or(|table| table == route.key.table)
                && device.is_none_or(|device| route.uses(device))
        };
        self.list_routes(RouteFilter { device: None, ..filter }, |payload| {
            Ok(ForwardingRoute::decode(payload)?.filter(|route| admits(route)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::route::{RouteChange, TABLE_MAIN, diff, encode};
    use super::*;
    use ferroute_netlink::Batch;
    use proptest::prelude::*;

    fn hop() -> impl Strategy<Value = Hop> {
        (1u32..9, any::<IpAddr>(), any::<bool>())
            .prop_map(|(device, gateway, has)| Hop { device, gateway: has.then_some(gateway) })
    }

    fn read_back(route: &ForwardingRoute) -> Option<ForwardingRoute> {
        let mut batch = Batch::new();
        encode(&mut batch, &RouteChange::Add(route.clone()));
        assert_eq!(batch.len(), 1);
        ForwardingRoute::decode(&batch.bytes()[16..]).unwrap()
    }

    #[test]
    fn a_shared_route_in_bytes() {
        let hops = ["10.0.0.2", "10.0.0.1"]
            .map(|gateway| Hop { device: 3, gateway: Some(gateway.parse().unwrap()) });
        let route = ForwardingRoute::new("10.1.0.0/24".parse().unwrap(), TABLE_MAIN, hops.to_vec(), None);
        let mut batch = Batch::new();
        encode(&mut batch, &RouteChange::Add(route.clone()));
        let bytes = batch.bytes();
        assert_eq!(bytes[16..28], [2, 24, 0, 0, 254, 70, 0, 1, 0, 0, 0, 0]);
        // RTA_MULTIPATH: two hops of 16 bytes, in order.
        let wanted = [
            36, 0, 9, 0, 16, 0, 0, 0, 3, 0, 0, 0, 8, 0, 5, 0, 10, 0, 0, 1, 16, 0, 0, 0, 3, 0, 0, 0, 8, 0, 5,
            0, 10, 0, 0, 2,
        ];
        assert!(bytes.windows(wanted.len()).any(|window| window == wanted), "{bytes:?}");
        assert_eq!(
            route.to_string(),
            "unicast 10.1.0.0/24 via 10.0.0.1 dev index 3 and via 10.0.0.2 dev index 3 table 254 metric 20000 proto 70"
        );
        assert_eq!(read_back(&route), Some(route));
    }

    #[test]
    fn a_tunnel_route_is_of_link_scope_in_ipv4() {
        let hops = vec![Hop { device: 3, gateway: None }];
        let mut route = ForwardingRoute::new("10.1.0.0/24".parse().unwrap(), 77, hops, None);
        assert_eq!(route.scope(), SCOPE_LINK);
        route.hops[0].gateway = Some("10.0.0.1".parse().unwrap());
        assert_eq!(route.scope(), 0);
        let v6 = ForwardingRoute::new(
            "fd00::/64".parse().unwrap(),
            77,
            vec![Hop { device: 3, gateway: None }],
            None,
        );
        assert_eq!(v6.scope(), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..160)) {
            let _ = ForwardingRoute::decode(&bytes);
            let _ = multipath(&bytes);
            let _ = via(&bytes);
        }

        #[test]
        fn what_is_written_is_read_back(
            ip in any::<IpAddr>(), length in 0u8..=32, table in any::<u32>(), metric in any::<u32>(),
            hops in prop::collection::vec(hop(), 1..6), source in prop::option::of(any::<IpAddr>()),
        ) {
            let mut route = ForwardingRoute::new(IpNet::new(ip, length).unwrap(), table, hops, source);
            route.key.metric = metric;
            prop_assert_eq!(read_back(&route), Some(route.clone()));
            prop_assert!(diff([&route], [&route]).is_empty());
        }
    }
}
