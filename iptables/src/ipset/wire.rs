//! ipset messages to the model and back (nfnetlink subsystem 6, protocol 7; linux/netfilter/ipset/ip_set.h).
//!
//! Decoding is total: any bytes give a value or a [`DecodeError`].

use std::iter::Peekable;
use std::net::IpAddr;

use ferroute_netlink::{Attribute, Batch, Body, DecodeError, attributes, flags};
use ipnet::IpNet;

use super::{Entry, Extra, Kind, Mark, Options, SetType};
use crate::{Family, Protocol, SetName};

const SUBSYSTEM: u16 = 6 << 8;
/// Since Linux 4.20.
pub(super) const PROTOCOL: u8 = 7;

const CMD_PROTOCOL: u16 = 1;
const CMD_CREATE: u16 = 2;
const CMD_DESTROY: u16 = 3;
const CMD_FLUSH: u16 = 4;
const CMD_RENAME: u16 = 5;
const CMD_SWAP: u16 = 6;
const CMD_LIST: u16 = 7;
const CMD_ADD: u16 = 9;
const CMD_DEL: u16 = 10;
const CMD_TYPE: u16 = 13;

// Attributes of a command.
const ATTR_PROTOCOL: u16 = 1;
const ATTR_SETNAME: u16 = 2;
const ATTR_TYPENAME: u16 = 3;
const ATTR_SETNAME2: u16 = 3;
const ATTR_REVISION: u16 = 4;
const ATTR_FAMILY: u16 = 5;
const ATTR_FLAGS: u16 = 6;
const ATTR_DATA: u16 = 7;
const ATTR_ADT: u16 = 8;
const ATTR_LINENO: u16 = 9;
const ATTR_REVISION_MIN: u16 = 10;

// Attributes of an entry and of a set's options.
const ATTR_IP: u16 = 1;
const ATTR_CIDR: u16 = 3;
const ATTR_PORT: u16 = 4;
const ATTR_TIMEOUT: u16 = 6;
const ATTR_PROTO: u16 = 7;
const ATTR_CADT_FLAGS: u16 = 8;
const ATTR_MARKMASK: u16 = 11;
const ATTR_BITMASK: u16 = 12;
const ATTR_HASHSIZE: u16 = 18;
const ATTR_MAXELEM: u16 = 19;
const ATTR_NETMASK: u16 = 20;
const ATTR_IP2: u16 = 20;
const ATTR_CIDR2: u16 = 21;
const ATTR_ELEMENTS: u16 = 24;
const ATTR_REFERENCES: u16 = 25;
const ATTR_MEMSIZE: u16 = 26;
const ATTR_SKBMARK: u16 = 27;

const ADDRESS_V4: u16 = 1;
const ADDRESS_V6: u16 = 2;

/// `NLA_F_NET_BYTEORDER`: ipset refuses numbers and addresses without it.
const NET: u16 = 0x4000;

const FLAG_LIST_HEADER: u32 = 1 << 2;
const FLAG_NOMATCH: u32 = 1 << 2;
const FLAG_WITH_COUNTERS: u32 = 1 << 3;
const FLAG_WITH_COMMENT: u32 = 1 << 4;
const FLAG_WITH_FORCEADD: u32 = 1 << 5;
const FLAG_WITH_SKBINFO: u32 = 1 << 6;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Bytes of entries after which a message is full: an error answer repeats the whole request, and
/// many of those must fit the socket's buffer.
const MESSAGE_LIMIT: usize = 15 << 10;

fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    }
}

/// `struct nfgenmsg` (family, version, resource) and the protocol attribute that starts every message.
fn begin(body: &mut Body<'_>, family: u8) {
    body.raw(&[family, 0, 0, 0]);
    body.u8(ATTR_PROTOCOL, PROTOCOL);
}

fn named(batch: &mut Batch, command: u16, set: SetName) {
    batch.message(SUBSYSTEM | command, 0, |body| {
        begin(body, AF_INET);
        body.string(ATTR_SETNAME, set.as_str());
    });
}

fn named_twice(batch: &mut Batch, command: u16, first: SetName, second: SetName) {
    batch.message(SUBSYSTEM | command, 0, |body| {
        begin(body, AF_INET);
        body.string(ATTR_SETNAME, first.as_str());
        body.string(ATTR_SETNAME2, second.as_str());
    });
}

pub(super) fn protocol(batch: &mut Batch) {
    batch.message(SUBSYSTEM | CMD_PROTOCOL, 0, |body| begin(body, AF_INET));
}

pub(super) fn revisions(batch: &mut Batch, kind: Kind) {
    batch.message(SUBSYSTEM | CMD_TYPE, 0, |body| {
        let family = family_number(kind.family);
        begin(body, family);
        body.string(ATTR_TYPENAME, kind.set_type.name());
        body.u8(ATTR_FAMILY, family);
    });
}

/// Asks for the headers of all sets.
pub(super) fn headers(batch: &mut Batch) {
    batch.message(SUBSYSTEM | CMD_LIST, flags::DUMP, |body| {
        begin(body, AF_INET);
        body.be32(ATTR_FLAGS | NET, FLAG_LIST_HEADER);
    });
}

/// Asks for one set with its entries.
pub(super) fn list(batch: &mut Batch, set: SetName) {
    batch.message(SUBSYSTEM | CMD_LIST, flags::DUMP, |body| {
        begin(body, AF_INET);
        body.string(ATTR_SETNAME, set.as_str());
    });
}

/// Without `NLM_F_EXCL` an equal set that exists is no error; a different one is EEXIST.
pub(super) fn create(
    batch: &mut Batch,
    set: SetName,
    kind: Kind,
    options: &Options,
    hashsize: u32,
    revision: u8,
) {
    batch.message(SUBSYSTEM | CMD_CREATE, flags::CREATE, |body| {
        let family = family_number(kind.family);
        begin(body, family);
        body.string(ATTR_SETNAME, set.as_str());
        body.string(ATTR_TYPENAME, kind.set_type.name());
        body.u8(ATTR_REVISION, revision);
        body.u8(ATTR_FAMILY, family);
        body.nest(ATTR_DATA, |data| {
            data.be32(ATTR_HASHSIZE | NET, hashsize);
            data.be32(ATTR_MAXELEM | NET, options.maxelem);
            if let Some(timeout) = options.timeout {
                data.be32(ATTR_TIMEOUT | NET, timeout);
            }
            if options.skbinfo {
                data.be32(ATTR_CADT_FLAGS | NET, FLAG_WITH_SKBINFO);
            }
        });
    });
}

pub(super) fn destroy(batch: &mut Batch, set: SetName) {
    named(batch, CMD_DESTROY, set);
}

pub(super) fn flush(batch: &mut Batch, set: SetName) {
    named(batch, CMD_FLUSH, set);
}

pub(super) fn swap(batch: &mut Batch, first: SetName, second: SetName) {
    named_twice(batch, CMD_SWAP, first, second);
}

pub(super) fn rename(batch: &mut Batch, from: SetName, to: SetName) {
    named_twice(batch, CMD_RENAME, from, to);
}

/// Adds as many entries as one message holds. Returns how many were taken.
pub(super) fn add(
    batch: &mut Batch,
    set: SetName,
    entries: &mut Peekable<impl Iterator<Item = (Entry, Extra)>>,
) -> usize {
    fill(batch, CMD_ADD, set, entries)
}

/// Deletes as many entries as one message holds. Returns how many were taken.
pub(super) fn delete(
    batch: &mut Batch,
    set: SetName,
    entries: &mut Peekable<impl Iterator<Item = (Entry, Extra)>>,
) -> usize {
    fill(batch, CMD_DEL, set, entries)
}

fn fill(
    batch: &mut Batch,
    command: u16,
    set: SetName,
    entries: &mut Peekable<impl Iterator<Item = (Entry, Extra)>>,
) -> usize {
    let Some(first) = entries.next() else { return 0 };
    let mut taken = 1;
    batch.message(SUBSYSTEM | command, 0, |body| {
        begin(body, AF_INET);
        body.string(ATTR_SETNAME, set.as_str());
        if entries.peek().is_none() {
            body.nest(ATTR_DATA, |data| put(data, &first.0, first.1));
            return;
        }
        // Demanded beside ATTR_ADT; entries carry none of their own, so a failure comes back as a
        // plain error.
        body.u32(ATTR_LINENO, 0);
        body.nest(ATTR_ADT, |list| {
            let start = list.written();
            list.nest(ATTR_DATA, |data| put(data, &first.0, first.1));
            while list.written() - start < MESSAGE_LIMIT
                && let Some((entry, extra)) = entries.next()
            {
                list.nest(ATTR_DATA, |data| put(data, &entry, extra));
                taken += 1;
            }
        });
    });
    taken
}

fn put(data: &mut Body<'_>, entry: &Entry, extra: Extra) {
    let port = |data: &mut Body<'_>, protocol: Protocol, port: u16| {
        data.be16(ATTR_PORT | NET, port);
        data.u8(ATTR_PROTO, protocol.0);
    };
    match entry {
        Entry::Ip(ip) => put_address(data, ATTR_IP, *ip),
        Entry::Net(net) => {
            put_address(data, ATTR_IP, net.addr());
            data.u8(ATTR_CIDR, net.prefix_len());
        }
        Entry::IpPort(ip, protocol, number) => {
            put_address(data, ATTR_IP, *ip);
            port(data, *protocol, *number);
        }
        Entry::IpPortIp(ip, protocol, number, second) => {
            put_address(data, ATTR_IP, *ip);
            port(data, *protocol, *number);
            put_address(data, ATTR_IP2, *second);
        }
        Entry::IpPortNet(ip, protocol, number, net) => {
            put_address(data, ATTR_IP, *ip);
            port(data, *protocol, *number);
            put_address(data, ATTR_IP2, net.addr());
            data.u8(ATTR_CIDR2, net.prefix_len());
        }
        Entry::NetNet(first, second) => {
            put_address(data, ATTR_IP, first.addr());
            data.u8(ATTR_CIDR, first.prefix_len());
            put_address(data, ATTR_IP2, second.addr());
            data.u8(ATTR_CIDR2, second.prefix_len());
        }
    }
    if extra.nomatch {
        data.be32(ATTR_CADT_FLAGS | NET, FLAG_NOMATCH);
    }
    if let Some(mark) = extra.mark {
        let full = u64::from(mark.value) << 32 | u64::from(mark.mask);
        data.bytes(ATTR_SKBMARK | NET, &full.to_be_bytes());
    }
}

fn put_address(data: &mut Body<'_>, kind: u16, ip: IpAddr) {
    data.nest(kind, |nest| match ip {
        IpAddr::V4(ip) => nest.bytes(ADDRESS_V4 | NET, &ip.octets()),
        IpAddr::V6(ip) => nest.bytes(ADDRESS_V6 | NET, &ip.octets()),
    });
}

/// What the kernel says about a set beside its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its name; any bytes the kernel accepted, so not always a [`SetName`].
    pub name: String,
    /// The kernel's name of its type.
    pub type_name: String,
    /// Type and family; the family of a type without addresses reads as IPv4.
    pub kind: Kind,
    /// What it was created with.
    pub options: Options,
    /// Revision of the type.
    pub revision: u8,
    /// How many rules and lists name it.
    pub references: u32,
    /// How many entries it holds; counted while the kernel fills it, so an estimate.
    pub elements: u32,
    /// Memory in bytes.
    pub memory: u32,
}

/// One message of a listing: a set's header, some of its entries, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Of which set.
    pub name: String,
    /// Only in the set's first message.
    pub header: Option<Header>,
    /// Entries of types that this crate writes; others are not decoded.
    pub entries: Vec<(Entry, Extra)>,
}

/// Decodes one message of a listing. `kind` is that of the set's header, for messages after the first.
///
/// # Errors
/// The bytes are not what ip_set sends.
pub fn decode_part(payload: &[u8], kind: Option<Kind>) -> Result<Part, DecodeError> {
    let body = payload.get(4..).ok_or(DecodeError::Length {
        what: "nfgenmsg",
        length: 4,
        available: payload.len(),
    })?;
    let (mut name, mut type_name, mut family, mut revision) = (None, None, 0, 0);
    let (mut data, mut entries) = (None, None);
    for attribute in attributes(body) {
        let attribute = attribute?;
        match attribute.kind {
            ATTR_SETNAME => name = Some(text(&attribute)),
            ATTR_TYPENAME => type_name = Some(text(&attribute)),
            ATTR_REVISION => revision = attribute.u8()?,
            ATTR_FAMILY => family = attribute.u8()?,
            ATTR_DATA => data = Some(attribute),
            ATTR_ADT => entries = Some(attribute),
            _ => {}
        }
    }
    let name = name.ok_or(DecodeError::Missing { what: "IPSET_ATTR_SETNAME" })?;
    let mut header = None;
    if let Some(type_name) = type_name {
        let family = if family == AF_INET6 { Family::V6 } else { Family::V4 };
        let kind = Kind { set_type: SetType::from_name(&type_name), family };
        header = Some(decode_header(name.clone(), type_name, kind, revision, data)?);
    }
    let kind = header.as_ref().map(|header| header.kind).or(kind);
    let mut part = Part { name, header, entries: Vec::new() };
    if let (Some(list), Some(kind)) = (entries, kind)
        && kind.set_type != SetType::Other
    {
        for entry in list.nested() {
            let entry = entry?;
            if entry.kind == ATTR_DATA {
                part.entries.push(decode_entry(&entry, kind)?);
            }
        }
    }
    Ok(part)
}

/// Text up to the first NUL, whatever its bytes: names of strangers must not stop a listing.
fn text(attribute: &Attribute<'_>) -> String {
    let bytes = attribute.payload.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

fn decode_header(
    name: String,
    type_name: String,
    kind: Kind,
    revision: u8,
    data: Option<Attribute<'_>>,
) -> Result<Header, DecodeError> {
    let options = Options { maxelem: 0, timeout: None, skbinfo: false, others: false };
    let mut header =
        Header { name, type_name, kind, options, revision, references: 0, elements: 0, memory: 0 };
    for attribute in data.iter().flat_map(Attribute::nested) {
        let attribute = attribute?;
        match attribute.kind {
            ATTR_MAXELEM => header.options.maxelem = attribute.be32()?,
            ATTR_TIMEOUT => header.options.timeout = Some(attribute.be32()?),
            ATTR_CADT_FLAGS => {
                let flags = attribute.be32()?;
                header.options.skbinfo = flags & FLAG_WITH_SKBINFO != 0;
                header.options.others |=
                    flags & (FLAG_WITH_COUNTERS | FLAG_WITH_COMMENT | FLAG_WITH_FORCEADD) != 0;
            }
            ATTR_NETMASK | ATTR_BITMASK | ATTR_MARKMASK => header.options.others = true,
            ATTR_REFERENCES => header.references = attribute.be32()?,
            ATTR_ELEMENTS => header.elements = attribute.be32()?,
            ATTR_MEMSIZE => header.memory = attribute.be32()?,
            _ => {}
        }
    }
    Ok(header)
}

fn decode_entry(data: &Attribute<'_>, kind: Kind) -> Result<(Entry, Extra), DecodeError> {
    let (mut ip, mut ip2, mut cidr, mut cidr2) = (None, None, None, None);
    let (mut port, mut protocol, mut extra) = (None, None, Extra::default());
    for attribute in data.nested() {
        let attribute = attribute?;
        match attribute.kind {
            ATTR_IP => ip = Some(address(&attribute)?),
            ATTR_IP2 => ip2 = Some(address(&attribute)?),
            ATTR_CIDR => cidr = Some(attribute.u8()?),
            ATTR_CIDR2 => cidr2 = Some(attribute.u8()?),
            ATTR_PORT => port = Some(attribute.be16()?),
            ATTR_PROTO => protocol = Some(Protocol(attribute.u8()?)),
            ATTR_CADT_FLAGS => extra.nomatch = attribute.be32()? & FLAG_NOMATCH != 0,
            ATTR_SKBMARK => {
                let full = attribute.be64()?;
                let mark = Mark { value: (full >> 32) as u32, mask: full as u32 };
                extra.mark = (mark.mask != 0).then_some(mark);
            }
            _ => {}
        }
    }
    let ip = ip.ok_or(DecodeError::Missing { what: "IPSET_ATTR_IP" })?;
    let ip2 = || ip2.ok_or(DecodeError::Missing { what: "IPSET_ATTR_IP2" });
    let port = || port.ok_or(DecodeError::Missing { what: "IPSET_ATTR_PORT" });
    let protocol = || protocol.ok_or(DecodeError::Missing { what: "IPSET_ATTR_PROTO" });
    let entry = match kind.set_type {
        SetType::HashIp => Entry::Ip(ip),
        SetType::HashNet => Entry::Net(network(ip, cidr)?),
        SetType::HashIpPort => Entry::IpPort(ip, protocol()?, port()?),
        SetType::HashIpPortIp => Entry::IpPortIp(ip, protocol()?, port()?, ip2()?),
        SetType::HashIpPortNet => Entry::IpPortNet(ip, protocol()?, port()?, network(ip2()?, cidr2)?),
        SetType::HashNetNet => Entry::NetNet(network(ip, cidr)?, network(ip2()?, cidr2)?),
        SetType::Other => return Err(DecodeError::Missing { what: "IPSET_ATTR_TYPENAME" }),
    };
    Ok((entry, extra))
}

fn address(nest: &Attribute<'_>) -> Result<IpAddr, DecodeError> {
    let inner = nest.nested().next().ok_or(DecodeError::Missing { what: "IPSET_ATTR_IPADDR" })?;
    inner?.address()
}

fn network(ip: IpAddr, prefix: Option<u8>) -> Result<IpNet, DecodeError> {
    let full = if ip.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.unwrap_or(full);
    IpNet::new(ip, prefix).map_err(|_| DecodeError::Value { what: "IPSET_ATTR_CIDR", value: prefix.into() })
}

/// Highest and lowest revision from the answer to [`revisions`].
pub(super) fn decode_revisions(payload: &[u8]) -> Result<Option<(u8, u8)>, DecodeError> {
    let (mut lowest, mut highest) = (0, None);
    for attribute in attributes(payload.get(4..).unwrap_or_default()) {
        let attribute = attribute?;
        match attribute.kind {
            ATTR_REVISION => highest = Some(attribute.u8()?),
            ATTR_REVISION_MIN => lowest = attribute.u8()?,
            _ => {}
        }
    }
    Ok(highest.map(|highest| (lowest, highest)))
}

/// Protocol version from the answer to [`protocol`].
pub(super) fn decode_protocol(payload: &[u8]) -> Result<Option<u8>, DecodeError> {
    for attribute in attributes(payload.get(4..).unwrap_or_default()) {
        let attribute = attribute?;
        if attribute.kind == ATTR_PROTOCOL {
            return Ok(Some(attribute.u8()?));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An entry encoded by [`put`] reads back the same: requests and listings share their attributes.
    fn round_trip(entry: Entry, extra: Extra, set_type: SetType) {
        let mut batch = Batch::new();
        let mut entries = [(entry, extra)].into_iter().peekable();
        let set = SetName::new("s").unwrap();
        assert_eq!(add(&mut batch, set, &mut entries), 1);
        // Behind nlmsghdr and nfgenmsg.
        let data =
            attributes(&batch.bytes()[20..]).map(Result::unwrap).find(|a| a.kind == ATTR_DATA).unwrap();
        let kind = Kind { set_type, family: Family::V4 };
        assert_eq!(decode_entry(&data, kind), Ok((entry, extra)));
    }

    proptest! {
        #[test]
        fn entries_round_trip(
            ip in any::<IpAddr>(), second in any::<IpAddr>(), port in any::<u16>(), protocol in any::<u8>(),
            prefix in 0u8..=128, value in any::<u32>(), mask in 1u32.., marked in any::<bool>(), nomatch in any::<bool>(),
        ) {
            let net = IpNet::new(second, if second.is_ipv4() { prefix % 33 } else { prefix }).unwrap();
            let extra = Extra { nomatch, mark: marked.then_some(Mark { value, mask }) };
            let protocol = Protocol(protocol);
            round_trip(Entry::Ip(ip), extra, SetType::HashIp);
            round_trip(Entry::Net(net), extra, SetType::HashNet);
            round_trip(Entry::IpPort(ip, protocol, port), extra, SetType::HashIpPort);
            round_trip(Entry::IpPortIp(ip, protocol, port, second), extra, SetType::HashIpPortIp);
            round_trip(Entry::IpPortNet(ip, protocol, port, net), extra, SetType::HashIpPortNet);
            round_trip(Entry::NetNet(net, IpNet::from(ip)), extra, SetType::HashNetNet);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(payload in prop::collection::vec(any::<u8>(), 0..200), v6 in any::<bool>()) {
            for set_type in SetType::WRITTEN {
                let family = if v6 { Family::V6 } else { Family::V4 };
                let _ = decode_part(&payload, Some(Kind { set_type, family }));
            }
            let _ = (decode_revisions(&payload), decode_protocol(&payload));
        }
    }

    #[test]
    fn one_entry_is_one_message_and_many_share_few() {
        let entry = |n: u32| (Entry::Ip(IpAddr::from(n.to_be_bytes())), Extra::default());
        let set = SetName::new("s").unwrap();
        let mut batch = Batch::new();
        assert_eq!(add(&mut batch, set, &mut std::iter::once(entry(1)).peekable()), 1);
        assert_eq!(batch.len(), 1);
        let mut many = (1..=5000).map(entry).peekable();
        let mut taken = 0;
        while many.peek().is_some() {
            taken += add(&mut batch, set, &mut many);
        }
        assert_eq!(taken, 5000);
        assert_eq!(batch.len(), 1 + 6, "20 bytes an entry, 15 KiB a message... 768 entries each");
    }
}
