//! The generic netlink form of changes and answers (`linux/ip_vs.h`).
//!
//! Encoding and decoding are pure; [`crate::Handle`] does the talking. Decoding is total: any bytes
//! give a value or an error. Ports and marks of IPv4 netmasks travel in network order, everything
//! else in host order; addresses are sent with their own length (the kernel pads) and received with
//! 16 bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferroute_netlink::{Attribute, Batch, Body, DecodeError, attributes, flags};

use crate::{
    Change, Destination, DestinationKey, DestinationStats, Family, Flags, Forwarding, Info, Netmask, Options,
    Protocol, Scheduler, Statistics, Timeouts, Tunnel, TunnelKind, VirtualServerKey,
};

/// Name of the generic netlink family (`IPVS_GENL_NAME`).
pub const FAMILY: &str = "IPVS";
/// `IPVS_GENL_VERSION`.
const VERSION: u8 = 1;

/// `IPVS_CMD_*`.
mod command {
    pub(super) const NEW_SERVICE: u8 = 1;
    pub(super) const SET_SERVICE: u8 = 2;
    pub(super) const DEL_SERVICE: u8 = 3;
    pub(super) const GET_SERVICE: u8 = 4;
    pub(super) const NEW_DEST: u8 = 5;
    pub(super) const SET_DEST: u8 = 6;
    pub(super) const DEL_DEST: u8 = 7;
    pub(super) const GET_DEST: u8 = 8;
    pub(super) const SET_CONFIG: u8 = 12;
    pub(super) const GET_CONFIG: u8 = 13;
    pub(super) const GET_INFO: u8 = 15;
    pub(super) const FLUSH: u8 = 17;
}

/// `IPVS_CMD_ATTR_*`.
mod top {
    pub(super) const SERVICE: u16 = 1;
    pub(super) const DEST: u16 = 2;
    pub(super) const TIMEOUT_TCP: u16 = 4;
    pub(super) const TIMEOUT_TCP_FIN: u16 = 5;
    pub(super) const TIMEOUT_UDP: u16 = 6;
}

/// `IPVS_SVC_ATTR_*`.
mod svc {
    pub(super) const AF: u16 = 1;
    pub(super) const PROTOCOL: u16 = 2;
    pub(super) const ADDR: u16 = 3;
    pub(super) const PORT: u16 = 4;
    pub(super) const FWMARK: u16 = 5;
    pub(super) const SCHED_NAME: u16 = 6;
    pub(super) const FLAGS: u16 = 7;
    pub(super) const TIMEOUT: u16 = 8;
    pub(super) const NETMASK: u16 = 9;
    pub(super) const STATS: u16 = 10;
    pub(super) const STATS64: u16 = 12;
}

/// `IPVS_DEST_ATTR_*`.
mod dest {
    pub(super) const ADDR: u16 = 1;
    pub(super) const PORT: u16 = 2;
    pub(super) const FWD_METHOD: u16 = 3;
    pub(super) const WEIGHT: u16 = 4;
    pub(super) const U_THRESH: u16 = 5;
    pub(super) const L_THRESH: u16 = 6;
    pub(super) const ACTIVE_CONNS: u16 = 7;
    pub(super) const INACT_CONNS: u16 = 8;
    pub(super) const PERSIST_CONNS: u16 = 9;
    pub(super) const STATS: u16 = 10;
    pub(super) const ADDR_FAMILY: u16 = 11;
    pub(super) const STATS64: u16 = 12;
    pub(super) const TUN_TYPE: u16 = 13;
    pub(super) const TUN_PORT: u16 = 14;
    pub(super) const TUN_FLAGS: u16 = 15;
}

/// `IPVS_INFO_ATTR_*`.
mod info {
    pub(super) const VERSION: u16 = 1;
    pub(super) const CONN_TAB_SIZE: u16 = 2;
}

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Appends the message of one change. `family` is the number of the generic netlink family.
pub fn change(batch: &mut Batch, family: u16, change: &Change) {
    match change {
        Change::CreateServer { key, options } => {
            full_server(batch, family, command::NEW_SERVICE, key, options)
        }
        Change::UpdateServer { key, options } => {
            full_server(batch, family, command::SET_SERVICE, key, options)
        }
        Change::DeleteServer { key } => message(batch, family, command::DEL_SERVICE, 0, |body| {
            body.nest(top::SERVICE, |body| server_key(body, key));
        }),
        Change::CreateDestination { server, destination } => {
            full_destination(batch, family, command::NEW_DEST, server, destination);
        }
        Change::UpdateDestination { server, destination } => {
            full_destination(batch, family, command::SET_DEST, server, destination);
        }
        Change::DeleteDestination { server, destination } => {
            message(batch, family, command::DEL_DEST, 0, |body| {
                body.nest(top::SERVICE, |body| server_key(body, server));
                body.nest(top::DEST, |body| destination_key(body, destination));
            });
        }
    }
}

/// Appends the request for all virtual servers.
pub fn get_servers(batch: &mut Batch, family: u16) {
    message(batch, family, command::GET_SERVICE, flags::DUMP, |_| {});
}

/// Appends the request for all destinations of a server.
pub fn get_destinations(batch: &mut Batch, family: u16, server: &VirtualServerKey) {
    message(batch, family, command::GET_DEST, flags::DUMP, |body| {
        body.nest(top::SERVICE, |body| server_key(body, server));
    });
}

/// Appends the request for the timeouts.
pub fn get_timeouts(batch: &mut Batch, family: u16) {
    message(batch, family, command::GET_CONFIG, 0, |_| {});
}

/// Appends the request that sets the timeouts.
pub fn set_timeouts(batch: &mut Batch, family: u16, timeouts: &Timeouts) {
    message(batch, family, command::SET_CONFIG, 0, |body| {
        body.u32(top::TIMEOUT_TCP, timeouts.tcp);
        body.u32(top::TIMEOUT_TCP_FIN, timeouts.tcp_fin);
        body.u32(top::TIMEOUT_UDP, timeouts.udp);
    });
}

/// Appends the request for version and table size.
pub fn get_info(batch: &mut Batch, family: u16) {
    message(batch, family, command::GET_INFO, 0, |_| {});
}

/// Appends the request that deletes everything.
pub fn flush(batch: &mut Batch, family: u16) {
    message(batch, family, command::FLUSH, 0, |_| {});
}

#[inline]
fn message(batch: &mut Batch, family: u16, command: u8, flags: u16, body: impl FnOnce(&mut Body<'_>)) {
    batch.message(family, flags, |writer| {
        // struct genlmsghdr
        writer.raw(&[command, VERSION, 0, 0]);
        body(writer);
    });
}

fn full_server(batch: &mut Batch, family: u16, command: u8, key: &VirtualServerKey, options: &Options) {
    message(batch, family, command, 0, |body| {
        body.nest(top::SERVICE, |body| {
            server_key(body, key);
            body.string(svc::SCHED_NAME, options.scheduler.name());
            // struct ip_vs_flags: the flags, then which of them to set: all.
            let [a, b, c, d] = options.flags.bits().to_ne_bytes();
            body.bytes(svc::FLAGS, &[a, b, c, d, 255, 255, 255, 255]);
            body.u32(svc::TIMEOUT, options.timeout);
            match options.netmask {
                Netmask::V4(mask) => body.be32(svc::NETMASK, u32::from(mask)),
                Netmask::V6(prefix) => body.u32(svc::NETMASK, u32::from(prefix)),
            }
        });
    });
}

#[inline]
fn full_destination(
    batch: &mut Batch,
    family: u16,
    command: u8,
    server: &VirtualServerKey,
    destination: &Destination,
) {
    message(batch, family, command, 0, |body| {
        body.nest(top::SERVICE, |body| server_key(body, server));
        body.nest(top::DEST, |body| {
            destination_key(body, &destination.key());
            let (method, tunnel) = match destination.forwarding {
                Forwarding::Masquerade => (0, None),
                Forwarding::LocalNode => (1, None),
                Forwarding::Tunnel(tunnel) => (2, Some(tunnel)),
                Forwarding::DirectRoute => (3, None),
                Forwarding::Bypass => (4, None),
                Forwarding::Other(number) => (u32::from(number), None),
            };
            body.u32(dest::FWD_METHOD, method);
            body.u32(dest::WEIGHT, destination.weight);
            body.u32(dest::U_THRESH, destination.upper_threshold);
            body.u32(dest::L_THRESH, destination.lower_threshold);
            // Without them the kernel sets zero, which is plain IP in IP.
            if let Some(tunnel) = tunnel.filter(|&tunnel| tunnel != Tunnel::IPIP) {
                body.u8(
                    dest::TUN_TYPE,
                    match tunnel.kind {
                        TunnelKind::Ipip => 0,
                        TunnelKind::Gue => 1,
                        TunnelKind::Gre => 2,
                        TunnelKind::Other(number) => number,
                    },
                );
                body.be16(dest::TUN_PORT, tunnel.port);
                body.u16(dest::TUN_FLAGS, tunnel.flags);
            }
        });
    });
}

#[inline]
fn server_key(body: &mut Body<'_>, key: &VirtualServerKey) {
    body.u16(svc::AF, family_number(key.family()));
    match key {
        VirtualServerKey::Address { protocol, address, port } => {
            body.u16(svc::PROTOCOL, u16::from(protocol.number()));
            put_address(body, svc::ADDR, address);
            body.be16(svc::PORT, *port);
        }
        VirtualServerKey::Mark { mark, .. } => body.u32(svc::FWMARK, *mark),
    }
}

#[inline]
fn destination_key(body: &mut Body<'_>, key: &DestinationKey) {
    body.u16(dest::ADDR_FAMILY, family_number(Family::of(&key.address)));
    put_address(body, dest::ADDR, &key.address);
    body.be16(dest::PORT, key.port);
}

#[inline]
fn put_address(body: &mut Body<'_>, kind: u16, address: &IpAddr) {
    match address {
        IpAddr::V4(address) => body.bytes(kind, &address.octets()),
        IpAddr::V6(address) => body.bytes(kind, &address.octets()),
    }
}

const fn family_number(family: Family) -> u16 {
    match family {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    }
}

/// An answer about a virtual server. The statistics are decoded only when asked for.
#[derive(Debug, Clone, Copy)]
pub struct ServerAnswer<'a> {
    /// Which server.
    pub key: VirtualServerKey,
    /// What it is like.
    pub options: Options,
    statistics: Option<Attribute<'a>>,
}

/// An answer about a destination. The statistics are decoded only when asked for.
#[derive(Debug, Clone, Copy)]
pub struct DestinationAnswer<'a> {
    /// The destination.
    pub destination: Destination,
    active: u32,
    inactive: u32,
    persistent: u32,
    statistics: Option<Attribute<'a>>,
}

impl ServerAnswer<'_> {
    /// The counters.
    ///
    /// # Errors
    ///
    /// When they are malformed or missing.
    pub fn statistics(&self) -> Result<Statistics, DecodeError> {
        statistics(self.statistics)
    }
}

impl DestinationAnswer<'_> {
    /// The connections and counters.
    ///
    /// # Errors
    ///
    /// When they are malformed or missing.
    pub fn statistics(&self) -> Result<DestinationStats, DecodeError> {
        Ok(DestinationStats {
            active_connections: self.active,
            inactive_connections: self.inactive,
            persistent_connections: self.persistent,
            statistics: statistics(self.statistics)?,
        })
    }
}

/// Decodes the answer about a virtual server (what follows the netlink header).
///
/// # Errors
///
/// When the kernel's answer lacks something or holds a value that IPVS does not have.
pub fn decode_server(payload: &[u8]) -> Result<ServerAnswer<'_>, DecodeError> {
    let (mut family, mut protocol, mut address, mut port, mut mark) = (None, None, None, None, None);
    let (mut scheduler, mut flags, mut timeout, mut netmask) = (None, None, None, None);
    let (mut stats, mut stats64) = (None, None);
    for attribute in nest(payload, top::SERVICE, "IPVS_CMD_ATTR_SERVICE")?.nested() {
        let attribute = attribute?;
        match attribute.kind {
            svc::AF => family = Some(decode_family("IPVS_SVC_ATTR_AF", attribute.u16()?)?),
            svc::PROTOCOL => protocol = Some(attribute.u16()?),
            svc::ADDR => address = Some(attribute),
            svc::PORT => port = Some(attribute.be16()?),
            svc::FWMARK => mark = Some(attribute.u32()?),
            svc::SCHED_NAME => scheduler = Some(attribute.string()?),
            svc::FLAGS => flags = Some(decode_flags(attribute)?),
            svc::TIMEOUT => timeout = Some(attribute.u32()?),
            svc::NETMASK => netmask = Some(attribute),
            svc::STATS => stats = Some(attribute),
            svc::STATS64 => stats64 = Some(attribute),
            _ => {}
        }
    }
    let family = required(family, "IPVS_SVC_ATTR_AF")?;
    let key = match mark {
        Some(mark) if mark != 0 => VirtualServerKey::Mark { family, mark },
        _ => {
            let number = required(protocol, "IPVS_SVC_ATTR_PROTOCOL")?;
            VirtualServerKey::Address {
                protocol: Protocol::from_number(number)
                    .ok_or(DecodeError::Value { what: "IPVS_SVC_ATTR_PROTOCOL", value: number.into() })?,
                address: decode_address(family, required(address, "IPVS_SVC_ATTR_ADDR")?)?,
                port: required(port, "IPVS_SVC_ATTR_PORT")?,
            }
        }
    };
    let netmask = required(netmask, "IPVS_SVC_ATTR_NETMASK")?;
    let options = Options {
        scheduler: Scheduler::new(required(scheduler, "IPVS_SVC_ATTR_SCHED_NAME")?)
            .map_err(|_| DecodeError::Text { kind: svc::SCHED_NAME })?,
        flags: required(flags, "IPVS_SVC_ATTR_FLAGS")?,
        timeout: required(timeout, "IPVS_SVC_ATTR_TIMEOUT")?,
        netmask: match family {
            Family::V4 => Netmask::V4(Ipv4Addr::from(netmask.be32()?)),
            Family::V6 => {
                let prefix = netmask.u32()?;
                Netmask::V6(
                    u8::try_from(prefix)
                        .ok()
                        .filter(|prefix| *prefix <= 128)
                        .ok_or(DecodeError::Value { what: "IPVS_SVC_ATTR_NETMASK", value: prefix.into() })?,
                )
            }
        },
    };
    Ok(ServerAnswer { key, options, statistics: stats64.or(stats) })
}

/// Decodes the answer about a destination of a server of this family (what follows the netlink
/// header). Kernels before 3.18 do not tell the destination's own family.
///
/// # Errors
///
/// When the kernel's answer lacks something or holds a value that IPVS does not have.
pub fn decode_destination(family: Family, payload: &[u8]) -> Result<DestinationAnswer<'_>, DecodeError> {
    let mut family = family;
    let (mut address, mut port, mut method, mut weight) = (None, None, None, None);
    let (mut upper, mut lower, mut tunnel) = (0, 0, Tunnel::IPIP);
    let (mut active, mut inactive, mut persistent) = (0, 0, 0);
    let (mut stats, mut stats64) = (None, None);
    for attribute in nest(payload, top::DEST, "IPVS_CMD_ATTR_DEST")?.nested() {
        let attribute = attribute?;
        match attribute.kind {
            dest::ADDR => address = Some(attribute),
            dest::PORT => port = Some(attribute.be16()?),
            dest::FWD_METHOD => method = Some(attribute.u32()?),
            dest::WEIGHT => weight = Some(attribute.u32()?),
            dest::U_THRESH => upper = attribute.u32()?,
            dest::L_THRESH => lower = attribute.u32()?,
            dest::ACTIVE_CONNS => active = attribute.u32()?,
            dest::INACT_CONNS => inactive = attribute.u32()?,
            dest::PERSIST_CONNS => persistent = attribute.u32()?,
            dest::STATS => stats = Some(attribute),
            dest::STATS64 => stats64 = Some(attribute),
            dest::ADDR_FAMILY => family = decode_family("IPVS_DEST_ATTR_ADDR_FAMILY", attribute.u16()?)?,
            dest::TUN_TYPE => {
                tunnel.kind = match attribute.u8()? {
                    0 => TunnelKind::Ipip,
                    1 => TunnelKind::Gue,
                    2 => TunnelKind::Gre,
                    other => TunnelKind::Other(other),
                }
            }
            dest::TUN_PORT => tunnel.port = attribute.be16()?,
            dest::TUN_FLAGS => tunnel.flags = attribute.u16()?,
            _ => {}
        }
    }
    let method = required(method, "IPVS_DEST_ATTR_FWD_METHOD")?;
    let destination = Destination {
        address: decode_address(family, required(address, "IPVS_DEST_ATTR_ADDR")?)?,
        port: required(port, "IPVS_DEST_ATTR_PORT")?,
        forwarding: match method {
            0 => Forwarding::Masquerade,
            1 => Forwarding::LocalNode,
            2 => Forwarding::Tunnel(tunnel),
            3 => Forwarding::DirectRoute,
            4 => Forwarding::Bypass,
            _ => Forwarding::Other(u8::try_from(method).map_err(|_| DecodeError::Value {
                what: "IPVS_DEST_ATTR_FWD_METHOD",
                value: method.into(),
            })?),
        },
        weight: required(weight, "IPVS_DEST_ATTR_WEIGHT")?,
        upper_threshold: upper,
        lower_threshold: lower,
    };
    Ok(DestinationAnswer { destination, active, inactive, persistent, statistics: stats64.or(stats) })
}

/// Decodes the timeouts (what follows the netlink header).
///
/// # Errors
///
/// When one is malformed. A protocol that the kernel was built without has 0.
pub fn decode_timeouts(payload: &[u8]) -> Result<Timeouts, DecodeError> {
    let mut timeouts = Timeouts::default();
    for attribute in attributes(after_header(payload)?) {
        let attribute = attribute?;
        match attribute.kind {
            top::TIMEOUT_TCP => timeouts.tcp = attribute.u32()?,
            top::TIMEOUT_TCP_FIN => timeouts.tcp_fin = attribute.u32()?,
            top::TIMEOUT_UDP => timeouts.udp = attribute.u32()?,
            _ => {}
        }
    }
    Ok(timeouts)
}

/// Decodes version and table size (what follows the netlink header).
///
/// # Errors
///
/// When one is malformed or missing.
pub fn decode_info(payload: &[u8]) -> Result<Info, DecodeError> {
    let (mut version, mut size) = (None, None);
    for attribute in attributes(after_header(payload)?) {
        let attribute = attribute?;
        match attribute.kind {
            info::VERSION => version = Some(attribute.u32()?),
            info::CONN_TAB_SIZE => size = Some(attribute.u32()?),
            _ => {}
        }
    }
    let [_, major, minor, patch] = required(version, "IPVS_INFO_ATTR_VERSION")?.to_be_bytes();
    Ok(Info {
        version: (major, minor, patch),
        connection_table_size: required(size, "IPVS_INFO_ATTR_CONN_TAB_SIZE")?,
    })
}

fn statistics(nest: Option<Attribute<'_>>) -> Result<Statistics, DecodeError> {
    let mut values = [0; 10];
    for attribute in required(nest, "IPVS_SVC_ATTR_STATS")?.nested() {
        let attribute = attribute?;
        // IPVS_STATS_ATTR_*: 1 to 10 in this order, 11 is padding.
        let Some(value) = usize::from(attribute.kind).checked_sub(1).and_then(|at| values.get_mut(at)) else {
            continue;
        };
        *value = if attribute.payload.len() == 4 { attribute.u32()?.into() } else { attribute.u64()? };
    }
    let [connections, incoming_packets, outgoing_packets, incoming_bytes, outgoing_bytes, rates @ ..] =
        values;
    let [
        connections_rate,
        incoming_packets_rate,
        outgoing_packets_rate,
        incoming_bytes_rate,
        outgoing_bytes_rate,
    ] = rates;
    Ok(Statistics {
        connections,
        incoming_packets,
        outgoing_packets,
        incoming_bytes,
        outgoing_bytes,
        connections_rate,
        incoming_packets_rate,
        outgoing_packets_rate,
        incoming_bytes_rate,
        outgoing_bytes_rate,
    })
}

fn after_header(payload: &[u8]) -> Result<&[u8], DecodeError> {
    payload.get(4..).ok_or(DecodeError::Length {
        what: "generic netlink header",
        length: 4,
        available: payload.len(),
    })
}

fn nest<'a>(payload: &'a [u8], kind: u16, what: &'static str) -> Result<Attribute<'a>, DecodeError> {
    for attribute in attributes(after_header(payload)?) {
        let attribute = attribute?;
        if attribute.kind == kind {
            return Ok(attribute);
        }
    }
    Err(DecodeError::Missing { what })
}

fn required<T>(value: Option<T>, what: &'static str) -> Result<T, DecodeError> {
    value.ok_or(DecodeError::Missing { what })
}

fn decode_family(what: &'static str, number: u16) -> Result<Family, DecodeError> {
    match number {
        AF_INET => Ok(Family::V4),
        AF_INET6 => Ok(Family::V6),
        _ => Err(DecodeError::Value { what, value: number.into() }),
    }
}

/// `union nf_inet_addr`: 16 bytes, of which IPv4 uses the first four.
fn decode_address(family: Family, attribute: Attribute<'_>) -> Result<IpAddr, DecodeError> {
    let size =
        |expected| DecodeError::Size { kind: attribute.kind, expected, actual: attribute.payload.len() };
    match family {
        Family::V4 => attribute
            .payload
            .first_chunk::<4>()
            .map(|octets| Ipv4Addr::from(*octets).into())
            .ok_or_else(|| size(4)),
        Family::V6 => attribute
            .payload
            .first_chunk::<16>()
            .map(|octets| Ipv6Addr::from(*octets).into())
            .ok_or_else(|| size(16)),
    }
}

fn decode_flags(attribute: Attribute<'_>) -> Result<Flags, DecodeError> {
    attribute
        .payload
        .first_chunk::<4>()
        .map(|bits| Flags::from_bits(u32::from_ne_bytes(*bits)))
        .ok_or(DecodeError::Size { kind: attribute.kind, expected: 8, actual: attribute.payload.len() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHANGE: u16 = 0x1c;

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::from), any::<Ipv6Addr>().prop_map(IpAddr::from)]
    }

    fn any_key() -> impl Strategy<Value = VirtualServerKey> {
        let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
        let family = prop::sample::select(vec![Family::V4, Family::V6]);
        prop_oneof![
            (protocol, any_address(), any::<u16>())
                .prop_map(|(protocol, address, port)| VirtualServerKey::Address { protocol, address, port }),
            (family, 1..=u32::MAX).prop_map(|(family, mark)| VirtualServerKey::Mark { family, mark }),
        ]
    }

    fn any_options(family: Family) -> impl Strategy<Value = Options> {
        let netmask = (any::<Ipv4Addr>(), 0..=128u8).prop_map(move |(mask, prefix)| match family {
            Family::V4 => Netmask::V4(mask),
            Family::V6 => Netmask::V6(prefix),
        });
        ("[!-~]{1,15}", any::<u32>(), any::<u32>(), netmask).prop_map(|(name, flags, timeout, netmask)| {
            Options {
                scheduler: Scheduler::new(&name).unwrap(),
                flags: Flags::from_bits(flags),
                timeout,
                netmask,
            }
        })
    }

    fn any_destination() -> impl Strategy<Value = Destination> {
        let kind = prop_oneof![
            Just(TunnelKind::Ipip),
            Just(TunnelKind::Gue),
            Just(TunnelKind::Gre),
            (3..=u8::MAX).prop_map(TunnelKind::Other),
        ];
        let tunnel =
            (kind, any::<u16>(), any::<u16>()).prop_map(|(kind, port, flags)| Tunnel { kind, port, flags });
        let forwarding = prop_oneof![
            Just(Forwarding::Masquerade),
            Just(Forwarding::LocalNode),
            tunnel.prop_map(Forwarding::Tunnel),
            Just(Forwarding::DirectRoute),
            Just(Forwarding::Bypass),
            (5..=7u8).prop_map(Forwarding::Other),
        ];
        (any_address(), any::<u16>(), forwarding, any::<u32>(), any::<u32>(), any::<u32>()).prop_map(
            |(address, port, forwarding, weight, upper_threshold, lower_threshold)| Destination {
                address,
                port,
                forwarding,
                weight,
                upper_threshold,
                lower_threshold,
            },
        )
    }

    /// The only message of a batch, without its netlink header. Requests and answers have one form.
    fn payload(batch: &Batch) -> &[u8] {
        &batch.bytes()[16..]
    }

    proptest! {
        #[test]
        fn servers_come_back_as_sent((key, options) in any_key().prop_flat_map(|key| {
            (Just(key), any_options(key.family()))
        })) {
            let mut batch = Batch::new();
            change(&mut batch, CHANGE, &Change::CreateServer { key, options });
            let answer = decode_server(payload(&batch)).unwrap();
            prop_assert_eq!((answer.key, answer.options), (key, options));
        }

        #[test]
        fn destinations_come_back_as_sent(server in any_key(), destination in any_destination()) {
            let mut batch = Batch::new();
            change(&mut batch, CHANGE, &Change::UpdateDestination { server, destination });
            let answer = decode_destination(server.family(), payload(&batch)).unwrap();
            prop_assert_eq!(answer.destination, destination);
        }

        #[test]
        fn timeouts_come_back_as_sent(tcp: u32, tcp_fin: u32, udp: u32) {
            let timeouts = Timeouts { tcp, tcp_fin, udp };
            let mut batch = Batch::new();
            set_timeouts(&mut batch, CHANGE, &timeouts);
            prop_assert_eq!(decode_timeouts(payload(&batch)).unwrap(), timeouts);
        }

        #[test]
        fn any_bytes_decode_to_something(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            decode_all(&bytes);
        }

        #[test]
        fn damaged_messages_decode_to_something(
            server in any_key(),
            destination in any_destination(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            end: prop::sample::Index,
        ) {
            let mut batch = Batch::new();
            change(&mut batch, CHANGE, &Change::CreateDestination { server, destination });
            let mut bytes = payload(&batch).to_vec();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(end.index(bytes.len() + 1));
            decode_all(&bytes);
        }
    }

    /// What the fuzz target does.
    fn decode_all(bytes: &[u8]) {
        if let Ok(answer) = decode_server(bytes) {
            let _ = answer.statistics();
        }
        for family in [Family::V4, Family::V6] {
            if let Ok(answer) = decode_destination(family, bytes) {
                let _ = answer.statistics();
            }
        }
        let _ = (decode_timeouts(bytes), decode_info(bytes));
    }

    #[test]
    fn counters_are_read_in_both_widths() {
        let answer = |wide: bool| {
            let mut batch = Batch::new();
            message(&mut batch, CHANGE, command::GET_DEST, 0, |body| {
                body.nest(top::DEST, |body| {
                    destination_key(body, &DestinationKey { address: [10, 0, 0, 1].into(), port: 80 });
                    body.u32(dest::FWD_METHOD, 0);
                    body.u32(dest::WEIGHT, 1);
                    body.u32(dest::ACTIVE_CONNS, 3);
                    body.nest(dest::STATS, |body| (1..=10).for_each(|kind| body.u32(kind, u32::from(kind))));
                    if wide {
                        body.nest(dest::STATS64, |body| {
                            (1..=10).for_each(|kind| body.u64(kind, u64::from(kind) << 40));
                        });
                    }
                });
            });
            decode_destination(Family::V4, payload(&batch)).unwrap().statistics().unwrap()
        };
        let (narrow, wide) = (answer(false), answer(true));
        assert_eq!(narrow.active_connections, 3);
        assert_eq!((narrow.statistics.connections, narrow.statistics.outgoing_bytes_rate), (1, 10));
        assert_eq!((wide.statistics.connections, wide.statistics.outgoing_bytes_rate), (1 << 40, 10 << 40));
    }
}
