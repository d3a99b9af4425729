//! Tracked flows: list, tell which are stale, delete exactly those.
//!
//! A UDP client that keeps its source port keeps its conntrack entry, and with it the endpoint that
//! entry was translated to (or the lack of one), until the entry times out. When an endpoint goes,
//! its flows must go; when a virtual server gets its first endpoint, flows from the time without one
//! must go. All other flows, healthy ones to the same VIP and port included, stay.
//!
//! Wire format: nfnetlink subsystem 1 and CTA_* of linux/netfilter/nfnetlink_conntrack.h.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ferroute_netlink::{Attribute, Batch, Body, DecodeError, Protocol, Socket, attributes, flags};

use super::{Error, Family};

/// NFNL_SUBSYS_CTNETLINK in the high byte, then IPCTNL_MSG_CT_NEW, _GET and _DELETE.
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CT_DELETE: u16 = 0x102;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;

const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

const CTA_FILTER_ORIG_FLAGS: u16 = 1;
/// CTA_FILTER_F_CTA_IP_DST and its kin (net/netfilter/nf_internals.h).
const FILTER_DESTINATION: u32 = 1 << 1;
const FILTER_PROTOCOL: u32 = 1 << 3;
const FILTER_DESTINATION_PORT: u32 = 1 << 5;

/// IPPROTO_UDP.
const UDP: u8 = 17;

/// Length of `struct nfgenmsg`.
const HEADER: usize = 4;

/// One direction of a flow. Protocols without ports have 0 in their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Who sends.
    pub source: SocketAddr,
    /// Who receives.
    pub destination: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
}

/// A tracked flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// As the first packet came, before any translation.
    pub original: Tuple,
    /// As replies are expected: its source is whoever really answers.
    pub reply: Tuple,
    /// The connection mark.
    pub mark: u32,
    /// Conntrack zone.
    pub zone: u16,
    /// The kernel's number of this entry: a keyed hash of its tuple and its place in memory. A
    /// later flow of the same tuple has another number unless it took the same place.
    pub id: u32,
}

impl Flow {
    /// Reads a conntrack entry; `None` for what has no addresses or only one direction.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (_, rest) = super::split_header::<HEADER>(payload)?;
        let (mut original, mut reply) = (None, None);
        let (mut mark, mut zone, mut id) = (0, 0, 0);
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                CTA_TUPLE_ORIG => original = tuple(&attribute)?,
                CTA_TUPLE_REPLY => reply = tuple(&attribute)?,
                CTA_MARK => mark = attribute.be32()?,
                CTA_ZONE => zone = attribute.be16()?,
                CTA_ID => id = attribute.be32()?,
                _ => {}
            }
        }
        Ok(original.zip(reply).map(|(original, reply)| Flow { original, reply, mark, zone, id }))
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tuple { source, destination, protocol } = self.original;
        write!(f, "protocol {protocol} {source} -> {destination} answered by {}", self.reply.source)
    }
}

fn tuple(attribute: &Attribute<'_>) -> Result<Option<Tuple>, DecodeError> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut source_port, mut destination_port) = (0, 0, 0);
    for part in attribute.nested() {
        let part = part?;
        match part.kind {
            CTA_TUPLE_IP => {
                for address in part.nested() {
                    let address = address?;
                    match address.kind {
                        CTA_IP_V4_SRC | CTA_IP_V6_SRC => source = Some(address.address()?),
                        CTA_IP_V4_DST | CTA_IP_V6_DST => destination = Some(address.address()?),
                        _ => {}
                    }
                }
            }
            CTA_TUPLE_PROTO => {
                for field in part.nested() {
                    let field = field?;
                    match field.kind {
                        CTA_PROTO_NUM => protocol = field.u8()?,
                        CTA_PROTO_SRC_PORT => source_port = field.be16()?,
                        CTA_PROTO_DST_PORT => destination_port = field.be16()?,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(source.zip(destination).map(|(source, destination)| Tuple {
        source: SocketAddr::new(source, source_port),
        destination: SocketAddr::new(destination, destination_port),
        protocol,
    }))
}

/// An endpoint that a virtual server no longer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemovedEndpoint {
    /// Address and port that clients speak to: a VIP, or a node address with a NodePort.
    pub virtual_server: SocketAddr,
    /// Address and port of the endpoint.
    pub endpoint: SocketAddr,
}

/// Tells stale UDP flows from healthy ones; the cost per flow does not depend on how many endpoints
/// were removed.
#[derive(Clone, Debug, Default)]
pub struct StaleUdp {
    removed: HashSet<(SocketAddr, SocketAddr), foldhash::fast::RandomState>,
    appeared: HashSet<SocketAddr, foldhash::fast::RandomState>,
}

impl StaleUdp {
    /// `removed`: endpoints that are gone. `appeared`: addresses and ports of virtual servers that
    /// went from no endpoint to some.
    pub fn new(removed: &[RemovedEndpoint], appeared: &[SocketAddr]) -> Self {
        Self {
            removed: removed.iter().map(|gone| (gone.virtual_server, gone.endpoint)).collect(),
            appeared: appeared.iter().copied().collect(),
        }
    }

    /// Whether a flow is stale: translated to a removed endpoint, or never translated although its
    /// virtual server now has endpoints.
    pub fn matches(&self, flow: &Flow) -> bool {
        let destination = flow.original.destination;
        flow.original.protocol == UDP
            && (self.removed.contains(&(destination, flow.reply.source))
                || (flow.reply.source == destination && self.appeared.contains(&destination)))
    }

    fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.appeared.is_empty()
    }

    /// The virtual servers of one family that stale flows were sent to.
    fn destinations(&self, family: Family) -> HashSet<SocketAddr, foldhash::fast::RandomState> {
        self.removed
            .iter()
            .map(|(virtual_server, _)| *virtual_server)
            .chain(self.appeared.iter().copied())
            .filter(|address| Family::of(address.ip()) == family)
            .collect()
    }
}

/// The flows among `flows` that are stale; see [`StaleUdp`].
pub fn stale_udp<'a>(
    flows: impl IntoIterator<Item = &'a Flow>,
    removed: &[RemovedEndpoint],
    appeared: &[SocketAddr],
) -> Vec<Flow> {
    let stale = StaleUdp::new(removed, appeared);
    flows.into_iter().filter(|flow| stale.matches(flow)).copied().collect()
}

/// Which flows to list. From 5.8 the kernel filters; every flow is checked again here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowFilter {
    /// Family of the original direction.
    pub family: Family,
    /// Only this IP protocol.
    pub protocol: Option<u8>,
    /// Only flows sent to this address before translation.
    pub destination: Option<IpAddr>,
    /// Only flows sent to this port before translation; the kernel needs `protocol` for it.
    pub destination_port: Option<u16>,
}

impl FlowFilter {
    /// All flows of a family.
    pub fn all(family: Family) -> Self {
        Self { family, protocol: None, destination: None, destination_port: None }
    }

    /// Whether a flow passes.
    pub fn admits(&self, flow: &Flow) -> bool {
        let Tuple { destination, protocol, .. } = flow.original;
        Family::of(destination.ip()) == self.family
            && self.protocol.is_none_or(|wanted| wanted == protocol)
            && self.destination.is_none_or(|wanted| wanted == destination.ip())
            && self.destination_port.is_none_or(|wanted| wanted == destination.port())
    }
}

/// What a deletion did.
#[derive(Debug, Default)]
pub struct Deleted {
    /// Flows that were looked at to find these; what the kernel filtered away is not among them.
    pub examined: usize,
    /// Flows deleted.
    pub deleted: usize,
    /// Flows that had ended by themselves in between.
    pub gone: usize,
    /// Flows the kernel would not delete.
    pub failures: Vec<Error>,
}

/// One conntrack netlink socket.
pub struct Conntrack {
    socket: Socket,
    batch: Batch,
}

impl Conntrack {
    /// Opens a socket in the network namespace of the calling thread. Needs CAP_NET_ADMIN.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open(Protocol::Netfilter)
            .map_err(|source| Error::Transport { action: "open a conntrack socket", source })?;
        Ok(Self { socket, batch: Batch::new() })
    }

    /// Messages sent so far, for tests and metrics.
    pub fn messages_sent(&self) -> u64 {
        self.socket.messages_sent()
    }

    /// How many of them only read.
    pub fn requests_sent(&self) -> u64 {
        self.socket.requests_sent()
    }

    /// Lists the flows that pass `filter` and `keep`. Flows are checked as they arrive: memory
    /// follows what is kept, not what is tracked.
    pub fn flows(&mut self, filter: FlowFilter, keep: impl FnMut(&Flow) -> bool) -> Result<Vec<Flow>, Error> {
        self.list(filter, &mut 0, keep)
    }

    fn list(
        &mut self,
        filter: FlowFilter,
        examined: &mut usize,
        mut keep: impl FnMut(&Flow) -> bool,
    ) -> Result<Vec<Flow>, Error> {
        encode_dump(&mut self.batch, &filter);
        self.socket
            .dump(&self.batch, |kind, payload| {
                if kind != CT_NEW {
                    return Ok(None);
                }
                *examined += 1;
                Ok(Flow::decode(payload)?.filter(|flow| filter.admits(flow) && keep(flow)))
            })
            .map_err(|source| Error::Transport { action: "list tracked flows", source })
    }

    /// Deletes these flows and no others: an entry is named by its tuple, zone and number.
    pub fn delete(&mut self, flows: &[Flow]) -> Result<Deleted, Error> {
        let mut result = Deleted::default();
        if flows.is_empty() {
            return Ok(result);
        }
        self.batch.clear();
        for flow in flows {
            encode_delete(&mut self.batch, flow);
        }
        let failures = self
            .socket
            .execute(&self.batch)
            .map_err(|source| Error::Transport { action: "delete tracked flows", source })?;
        result.deleted = flows.len() - failures.len().min(flows.len());
        for failure in failures {
            if failure.errno == nix::libc::ENOENT {
                result.gone += 1;
            } else if let Some(flow) = flows.get(failure.index) {
                result.failures.push(Error::refused("delete tracked flow", flow.to_string(), failure));
            }
        }
        Ok(result)
    }

    /// Deletes the stale UDP flows of both families. Costs one dump per family concerned, narrowed
    /// by the kernel to UDP, and to one virtual server when there is only one.
    pub fn delete_stale_udp(
        &mut self,
        removed: &[RemovedEndpoint],
        appeared: &[SocketAddr],
    ) -> Result<Deleted, Error> {
        let stale = StaleUdp::new(removed, appeared);
        let mut flows = Vec::new();
        let mut examined = 0;
        if stale.is_empty() {
            return Ok(Deleted::default());
        }
        for family in Family::BOTH {
            let destinations = stale.destinations(family);
            let mut filter = FlowFilter { protocol: Some(UDP), ..FlowFilter::all(family) };
            let mut destinations = destinations.iter();
            match (destinations.next(), destinations.next()) {
                (None, _) => continue,
                (Some(only), None) => {
                    filter.destination = Some(only.ip());
                    filter.destination_port = Some(only.port());
                }
                _ => {}
            }
            flows.extend(self.list(filter, &mut examined, |flow| stale.matches(flow))?);
        }
        Ok(Deleted { examined, ..self.delete(&flows)? })
    }
}

impl Conntrack {
    /// Deletes every flow that one of these addresses sends, gets or answers. Costs one dump per
    /// family concerned.
    pub fn delete_of(&mut self, addresses: &[IpAddr]) -> Result<Deleted, Error> {
        let wanted: HashSet<IpAddr, foldhash::fast::RandomState> = addresses.iter().copied().collect();
        let mut flows = Vec::new();
        let mut examined = 0;
        for family in Family::BOTH {
            if !addresses.iter().any(|address| Family::of(*address) == family) {
                continue;
            }
            flows.extend(self.list(FlowFilter::all(family), &mut examined, |flow| {
                [flow.original, flow.reply].iter().any(|tuple| {
                    wanted.contains(&tuple.source.ip()) || wanted.contains(&tuple.destination.ip())
                })
            })?);
        }
        Ok(Deleted { examined, ..self.delete(&flows)? })
    }
}

/// `struct nfgenmsg`: family, version 0, resource 0.
fn header(family: Family) -> [u8; HEADER] {
    [family.number(), 0, 0, 0]
}

fn encode_dump(batch: &mut Batch, filter: &FlowFilter) {
    let mut bits = 0;
    // 6.1 was seen to leave out the wanted flows when asked for an IPv6 destination, so the address
    // is compared here only; protocol and port narrow enough.
    let destination = filter.destination.filter(IpAddr::is_ipv4);
    if destination.is_some() {
        bits |= FILTER_DESTINATION;
    }
    if filter.protocol.is_some() {
        bits |= FILTER_PROTOCOL;
        if filter.destination_port.is_some() {
            bits |= FILTER_DESTINATION_PORT;
        }
    }
    batch.clear();
    batch.message(CT_GET, flags::DUMP, |body| {
        body.raw(&header(filter.family));
        if bits == 0 {
            return;
        }
        // Kernels before 5.8 do not know CTA_FILTER, ignore all of this and list everything.
        body.nest(CTA_TUPLE_ORIG, |tuple| {
            if let Some(destination) = destination {
                tuple.nest(CTA_TUPLE_IP, |ip| write_destination(ip, destination));
            }
            if let Some(protocol) = filter.protocol {
                tuple.nest(CTA_TUPLE_PROTO, |fields| {
                    fields.u8(CTA_PROTO_NUM, protocol);
                    if let Some(port) = filter.destination_port {
                        fields.be16(CTA_PROTO_DST_PORT, port);
                    }
                });
            }
        });
        body.nest(CTA_FILTER, |body| body.u32(CTA_FILTER_ORIG_FLAGS, bits));
    });
}

fn encode_delete(batch: &mut Batch, flow: &Flow) {
    let Tuple { source, destination, protocol } = flow.original;
    batch.message(CT_DELETE, 0, |body| {
        body.raw(&header(Family::of(destination.ip())));
        // Without a tuple this message would empty the whole table.
        body.nest(CTA_TUPLE_ORIG, |tuple| {
            tuple.nest(CTA_TUPLE_IP, |ip| {
                let kind = if source.is_ipv4() { CTA_IP_V4_SRC } else { CTA_IP_V6_SRC };
                super::write_address(ip, kind, source.ip());
                write_destination(ip, destination.ip());
            });
            tuple.nest(CTA_TUPLE_PROTO, |fields| {
                fields.u8(CTA_PROTO_NUM, protocol);
                fields.be16(CTA_PROTO_SRC_PORT, source.port());
                fields.be16(CTA_PROTO_DST_PORT, destination.port());
            });
        });
        body.be32(CTA_ID, flow.id);
        if flow.zone != 0 {
            body.be16(CTA_ZONE, flow.zone);
        }
    });
}

fn write_destination(body: &mut Body<'_>, address: IpAddr) {
    let kind = if address.is_ipv4() { CTA_IP_V4_DST } else { CTA_IP_V6_DST };
    super::write_address(body, kind, address);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn flow(protocol: u8, client: &str, to: &str, answered_by: &str) -> Flow {
        let (client, to, by) = (address(client), address(to), address(answered_by));
        Flow {
            original: Tuple { source: client, destination: to, protocol },
            reply: Tuple { source: by, destination: client, protocol },
            mark: 0,
            zone: 0,
            id: 1,
        }
    }

    const VIP: &str = "10.96.0.10:53";
    const GONE: &str = "10.244.1.5:5353";

    #[test]
    fn only_flows_to_the_removed_endpoint_of_that_virtual_server_are_stale() {
        let removed = [RemovedEndpoint { virtual_server: address(VIP), endpoint: address(GONE) }];
        let stale = flow(17, "10.0.0.1:1000", VIP, GONE);
        let flows = [
            stale,
            flow(17, "10.0.0.1:1001", VIP, "10.244.1.6:5353"),
            flow(17, "10.0.0.1:1002", VIP, "10.244.1.5:9153"),
            flow(17, "10.0.0.1:1003", "10.96.0.11:53", GONE),
            flow(17, "10.0.0.1:1004", "10.96.0.10:54", GONE),
            flow(17, "10.0.0.1:1005", GONE, GONE),
            flow(17, "10.0.0.1:1006", VIP, VIP),
            flow(6, "10.0.0.1:1000", VIP, GONE),
        ];
        assert_eq!(stale_udp(&flows, &removed, &[]), [stale]);
        assert_eq!(stale_udp(&flows, &[], &[]), []);
    }

    #[test]
    fn first_endpoints_make_untranslated_flows_stale() {
        let waiting = flow(17, "[fd00::1]:1000", "[fd00:96::a]:53", "[fd00:96::a]:53");
        let flows = [
            waiting,
            flow(17, "[fd00::1]:1001", "[fd00:96::a]:53", "[fd00:244::5]:53"),
            flow(17, "[fd00::1]:1002", "[fd00:96::b]:53", "[fd00:96::b]:53"),
        ];
        assert_eq!(stale_udp(&flows, &[], &[address("[fd00:96::a]:53")]), [waiting]);
    }

    #[test]
    fn a_deletion_always_carries_its_tuple_and_number() {
        let mut batch = Batch::new();
        let flow = Flow { zone: 3, id: 0xdead_beef, ..flow(17, "10.0.0.1:1000", VIP, GONE) };
        encode_delete(&mut batch, &flow);
        let kinds: Vec<u16> =
            attributes(&batch.bytes()[20..]).map(|attribute| attribute.unwrap().kind).collect();
        assert_eq!(kinds, [CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE]);
        let first = attributes(&batch.bytes()[20..]).next().unwrap().unwrap();
        assert_eq!(tuple(&first).unwrap(), Some(flow.original));
    }

    #[test]
    fn the_kernel_filters_by_what_is_asked() {
        let mut batch = Batch::new();
        encode_dump(&mut batch, &FlowFilter::all(Family::V6));
        assert_eq!(batch.bytes()[16..], [10, 0, 0, 0]);
        let filter = FlowFilter {
            protocol: Some(UDP),
            destination: Some(address(VIP).ip()),
            destination_port: Some(53),
            ..FlowFilter::all(Family::V4)
        };
        encode_dump(&mut batch, &filter);
        let bits = attributes(&batch.bytes()[20..])
            .map(Result::unwrap)
            .find(|attribute| attribute.kind == CTA_FILTER)
            .and_then(|filter| filter.nested().next())
            .unwrap()
            .unwrap();
        assert_eq!((bits.kind, bits.u32().unwrap()), (CTA_FILTER_ORIG_FLAGS, 0b10_1010));
        let v6 = FlowFilter {
            destination: Some("fd00::1".parse().unwrap()),
            protocol: Some(UDP),
            ..FlowFilter::all(Family::V6)
        };
        encode_dump(&mut batch, &v6);
        let tuple = attributes(&batch.bytes()[20..]).next().unwrap().unwrap();
        let parts: Vec<u16> = tuple.nested().map(|part| part.unwrap().kind).collect();
        assert_eq!(parts, [CTA_TUPLE_PROTO], "no kernel is trusted to compare IPv6 addresses");
        assert!(filter.admits(&flow(17, "10.0.0.1:1000", VIP, GONE)));
        assert!(!filter.admits(&flow(17, "10.0.0.1:1000", "10.96.0.10:54", GONE)));
        assert!(!filter.admits(&flow(6, "10.0.0.1:1000", VIP, GONE)));
        assert!(!filter.admits(&flow(17, "[::1]:1000", "[::2]:53", "[::2]:53")));
    }

    fn write_tuple(body: &mut Body<'_>, kind: u16, tuple: &Tuple) {
        body.nest(kind, |body| {
            body.nest(CTA_TUPLE_IP, |ip| {
                let v4 = tuple.source.is_ipv4();
                super::super::write_address(
                    ip,
                    if v4 { CTA_IP_V4_SRC } else { CTA_IP_V6_SRC },
                    tuple.source.ip(),
                );
                write_destination(ip, tuple.destination.ip());
            });
            body.nest(CTA_TUPLE_PROTO, |fields| {
                fields.u8(CTA_PROTO_NUM, tuple.protocol);
                fields.be16(CTA_PROTO_SRC_PORT, tuple.source.port());
                fields.be16(CTA_PROTO_DST_PORT, tuple.destination.port());
            });
        });
    }

    fn any_tuple() -> impl Strategy<Value = Tuple> {
        (any::<(IpAddr, IpAddr, u16, u16)>(), any::<u8>()).prop_map(|((a, b, from, to), protocol)| Tuple {
            source: SocketAddr::new(a, from),
            destination: SocketAddr::new(b, to),
            protocol,
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Flow::decode(&bytes);
        }

        #[test]
        fn an_entry_is_read_whole(
            original in any_tuple(),
            reply in any_tuple(),
            mark in any::<u32>(),
            zone in any::<u16>(),
            id in any::<u32>(),
        ) {
            let mut batch = Batch::new();
            batch.message(CT_NEW, 0, |body| {
                body.raw(&header(Family::V4));
                write_tuple(body, CTA_TUPLE_ORIG, &original);
                write_tuple(body, CTA_TUPLE_REPLY, &reply);
                body.be32(CTA_MARK, mark);
                body.be32(CTA_ID, id);
                body.be16(CTA_ZONE, zone);
            });
            let flow = Flow { original, reply, mark, zone, id };
            prop_assert_eq!(Flow::decode(&batch.bytes()[16..]).unwrap(), Some(flow));
        }
    }
}
