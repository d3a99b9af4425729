//! What a ferroute left in the kernel, read back; and the least messages that make it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ferroute::host::Network;
use ferroute::host::route::{self, PROTOCOL, Route, RouteChange, RouteFilter, TABLE_LOCAL};
use ferroute_iptables::ipset::{self, Entry, Extra, Set, SetType, Sets};
use ferroute_ipvs as ipvs;
use ferroute_netlink::{Batch, Body, Protocol, Socket, flags, resolve_family};

/// Most bytes of entries in one ipset message: an attribute holds 65,535.
const ENTRIES: usize = 60_000;

/// The kernel's tables.
pub struct Tables {
    pub servers: ipvs::Table,
    pub sets: Sets,
    pub routes: Vec<Route>,
}

impl Tables {
    /// Reads everything that is there.
    pub fn read() -> Result<Self> {
        let filter =
            RouteFilter { protocol: Some(PROTOCOL), table: Some(TABLE_LOCAL), ..RouteFilter::default() };
        Ok(Self {
            servers: ipvs::Handle::open()?.dump()?,
            sets: ipset::Handle::open()?.read(&[""])?,
            routes: Network::open()?.routes(filter)?,
        })
    }

    fn empty() -> Self {
        Self { servers: ipvs::Table::default(), sets: Sets::new(), routes: Vec::new() }
    }

    /// Equal for equal tables.
    pub fn digest(&self) -> u64 {
        let mut lines: Vec<String> = self
            .servers
            .iter()
            .map(|(key, server)| format!("{key:?} {server:?}"))
            .chain(self.sets.iter().map(|(name, set)| format!("{name} {:?}", set.entries())))
            .chain(self.routes.iter().map(|route| format!("{route:?}")))
            .collect();
        lines.sort_unstable();
        let mut hasher = DefaultHasher::new();
        lines.hash(&mut hasher);
        hasher.finish()
    }

    /// The virtual servers as `ipvsadm --restore` reads them.
    pub fn ipvsadm(&self) -> Result<String> {
        let mut text = String::new();
        for (key, server) in &self.servers {
            let ipvs::VirtualServerKey::Address { address, port, .. } = key else {
                bail!("a mark in the measured state")
            };
            writeln!(text, "-A -t {address}:{port} -s {}", server.scheduler.name())?;
            for d in &server.destinations {
                writeln!(text, "-a -t {address}:{port} -r {}:{} -m -w {}", d.address, d.port, d.weight)?;
            }
        }
        Ok(text)
    }
}

/// Messages of one step, encoded: one batch per table, each sent at once.
#[derive(Default)]
pub struct Step {
    pub sets: Batch,
    pub servers: Batch,
    pub routes: Batch,
}

/// Everything a floor run replays.
#[derive(Default)]
pub struct Script {
    pub digest: u64,
    pub cold: Step,
    pub endpoints_added: Vec<Step>,
    pub services_added: Vec<Step>,
    pub services_removed: Vec<Step>,
    pub endpoints_removed: Vec<Step>,
}

/// The least messages from nothing to these tables.
pub fn cold(tables: &Tables) -> Result<Step> {
    let family = ipvs_family()?;
    let mut step = Step::default();
    for (name, set) in &tables.sets {
        create_set(&mut step.sets, name.as_str(), set)?;
    }
    for (name, set) in &tables.sets {
        write_entries(&mut step.sets, true, name.as_str(), set, set.entries().iter().map(|(e, x)| (*e, *x)));
    }
    for change in ipvs::diff_all(&Tables::empty().servers, &tables.servers) {
        ipvs::wire::change(&mut step.servers, family, &change);
    }
    for route in &tables.routes {
        write_route(&mut step.routes, &RouteChange::Add(*route));
    }
    Ok(step)
}

/// The least messages from one state to another, told apart by the VIP they are about.
pub fn steps(before: &Tables, after: &Tables) -> Result<Vec<Step>> {
    let family = ipvs_family()?;
    let mut steps: BTreeMap<IpAddr, Step> = BTreeMap::new();
    for change in ipvs::diff_all(&before.servers, &after.servers) {
        let ipvs::VirtualServerKey::Address { address, .. } = change.server() else {
            bail!("a mark in the measured state")
        };
        ipvs::wire::change(&mut steps.entry(address).or_default().servers, family, &change);
    }
    for (name, set) in &after.sets {
        let known = before.sets.get(name).context("a set appeared")?;
        for (entry, extra) in set.entries() {
            if known.entries().get(entry) != Some(extra) {
                let step = steps.entry(address_of(entry)).or_default();
                write_entries(&mut step.sets, true, name.as_str(), set, [(*entry, *extra)]);
            }
        }
        for (entry, extra) in known.entries() {
            if !set.entries().contains_key(entry) {
                let step = steps.entry(address_of(entry)).or_default();
                write_entries(&mut step.sets, false, name.as_str(), set, [(*entry, *extra)]);
            }
        }
    }
    for change in route::diff(&before.routes, &after.routes) {
        let step = steps.entry(change.route().key.destination.addr()).or_default();
        write_route(&mut step.routes, &change);
    }
    Ok(steps.into_values().collect())
}

/// Number of the IPVS family in this kernel.
pub fn ipvs_family() -> Result<u16> {
    Ok(resolve_family(&mut Socket::open(Protocol::Generic)?, ipvs::wire::FAMILY)?)
}

fn address_of(entry: &Entry) -> IpAddr {
    match entry {
        Entry::Ip(ip) | Entry::IpPort(ip, ..) | Entry::IpPortIp(ip, ..) | Entry::IpPortNet(ip, ..) => *ip,
        Entry::Net(net) | Entry::NetNet(net, _) => net.addr(),
    }
}

// What follows encodes on its own, so that the floor does not inherit ferroute's choices.

const IPSET: u16 = 6 << 8;
const NET: u16 = 0x4000;

fn family_of(set: &Set) -> u8 {
    if set.kind().family == ferroute_iptables::Family::V4 { 2 } else { 10 }
}

/// Makes an empty set.
pub fn create_set(batch: &mut Batch, name: &str, set: &Set) -> Result<()> {
    // The oldest revision with all that is used here (Linux 3.19).
    let revision = match set.kind().set_type {
        SetType::HashIp => 4,
        SetType::HashNet => 6,
        SetType::HashIpPort | SetType::HashIpPortIp => 5,
        SetType::HashIpPortNet => 7,
        SetType::HashNetNet => 2,
        SetType::Other => bail!("set {name} is of an unknown type"),
    };
    let family = family_of(set);
    let options = set.options();
    let buckets = u32::try_from(set.entries().len().next_power_of_two().max(1024))?;
    batch.message(IPSET | 2, flags::CREATE | flags::EXCL, |body| {
        body.raw(&[family, 0, 0, 0]);
        body.u8(1, 7);
        body.string(2, name);
        body.string(3, set.kind().set_type.name());
        body.u8(4, revision);
        body.u8(5, family);
        body.nest(7, |data| {
            data.be32(18 | NET, buckets);
            data.be32(19 | NET, options.maxelem);
            if let Some(timeout) = options.timeout {
                data.be32(6 | NET, timeout);
            }
            if options.skbinfo {
                data.be32(8 | NET, 1 << 6);
            }
        });
    });
    Ok(())
}

/// Adds entries to a set or takes them out.
pub fn write_entries(
    batch: &mut Batch,
    add: bool,
    name: &str,
    set: &Set,
    entries: impl IntoIterator<Item = (Entry, Extra)>,
) {
    let mut entries = entries.into_iter().peekable();
    while entries.peek().is_some() {
        batch.message(IPSET | if add { 9 } else { 10 }, 0, |body| {
            body.raw(&[family_of(set), 0, 0, 0]);
            body.u8(1, 7);
            body.string(2, name);
            body.u32(9, 0);
            body.nest(8, |list| {
                let start = list.written();
                while list.written() - start < ENTRIES
                    && let Some((entry, extra)) = entries.next()
                {
                    list.nest(7, |data| write_entry(data, &entry, extra));
                }
            });
        });
    }
}

/// Takes a set away.
pub fn destroy_set(batch: &mut Batch, name: &str) {
    batch.message(IPSET | 3, 0, |body| {
        body.raw(&[2, 0, 0, 0]);
        body.u8(1, 7);
        body.string(2, name);
    });
}

fn write_entry(data: &mut Body<'_>, entry: &Entry, extra: Extra) {
    let address = |data: &mut Body<'_>, kind: u16, ip: IpAddr| {
        data.nest(kind, |nest| match ip {
            IpAddr::V4(ip) => nest.bytes(1 | NET, &ip.octets()),
            IpAddr::V6(ip) => nest.bytes(2 | NET, &ip.octets()),
        });
    };
    let (ip, port, second, prefix) = match *entry {
        Entry::Ip(ip) => (ip, None, None, None),
        Entry::Net(net) => (net.addr(), None, None, Some((3, net.prefix_len()))),
        Entry::IpPort(ip, protocol, port) => (ip, Some((protocol, port)), None, None),
        Entry::IpPortIp(ip, protocol, port, second) => (ip, Some((protocol, port)), Some(second), None),
        Entry::IpPortNet(ip, protocol, port, net) => {
            (ip, Some((protocol, port)), Some(net.addr()), Some((21, net.prefix_len())))
        }
        Entry::NetNet(net, second) => {
            data.u8(3, net.prefix_len());
            (net.addr(), None, Some(second.addr()), Some((21, second.prefix_len())))
        }
    };
    address(data, 1, ip);
    if let Some((protocol, port)) = port {
        data.be16(4 | NET, port);
        data.u8(7, protocol.0);
    }
    if let Some(second) = second {
        address(data, 20, second);
    }
    if let Some((kind, length)) = prefix {
        data.u8(kind, length);
    }
    if let Some(mark) = extra.mark {
        data.bytes(27 | NET, &(u64::from(mark.value) << 32 | u64::from(mark.mask)).to_be_bytes());
    }
}

fn write_route(batch: &mut Batch, change: &RouteChange) {
    let (kind, mode) = match change {
        RouteChange::Add(_) => (24, flags::CREATE | flags::EXCL),
        RouteChange::Replace(_) => (24, flags::CREATE | flags::REPLACE),
        RouteChange::Delete(_) => (25, 0),
    };
    let route = change.route();
    let destination = route.key.destination;
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    // Table local, type local.
    let family = if destination.addr().is_ipv4() { 2 } else { 10 };
    let header = [family, destination.prefix_len(), 0, 0, 255, route.protocol, route.scope, 2, 0, 0, 0, 0];
    batch.message(kind, mode, |body| {
        body.raw(&header);
        body.bytes(1, &bytes(destination.addr()));
        if route.key.metric != 0 {
            body.u32(6, route.key.metric);
        }
        if let Some(device) = route.device {
            body.u32(4, device);
        }
        if let Some(source) = route.source {
            body.bytes(7, &bytes(source));
        }
    });
}

impl Script {
    /// Writes it to a file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut out = self.digest.to_le_bytes().to_vec();
        for part in self.parts() {
            out.extend(u32::try_from(part.len())?.to_le_bytes());
            for step in part {
                for batch in [&step.sets, &step.servers, &step.routes] {
                    out.extend(u32::try_from(batch.bytes().len())?.to_le_bytes());
                    out.extend(batch.bytes());
                }
            }
        }
        std::fs::File::create(path)?.write_all(&out)?;
        Ok(())
    }

    /// Reads it back.
    pub fn load(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.read_to_end(&mut bytes)?;
        let (digest, mut rest) = bytes.split_first_chunk().context("an empty script")?;
        let mut parts = Vec::new();
        for _ in 0..5 {
            let mut steps = Vec::new();
            for _ in 0..take_length(&mut rest)? {
                let mut batches = Vec::new();
                for _ in 0..3 {
                    let length = take_length(&mut rest)?;
                    let (batch, tail) = rest.split_at_checked(length).context("a short script")?;
                    rest = tail;
                    batches.push(batch_of(batch)?);
                }
                let [sets, servers, routes] = batches.try_into().ok().context("three batches")?;
                steps.push(Step { sets, servers, routes });
            }
            parts.push(steps);
        }
        let [cold, endpoints_added, services_added, services_removed, endpoints_removed] =
            parts.try_into().ok().context("five parts")?;
        Ok(Self {
            digest: u64::from_le_bytes(*digest),
            cold: cold.into_iter().next().context("no cold start")?,
            endpoints_added,
            services_added,
            services_removed,
            endpoints_removed,
        })
    }

    fn parts(&self) -> [&[Step]; 5] {
        [
            std::slice::from_ref(&self.cold),
            &self.endpoints_added,
            &self.services_added,
            &self.services_removed,
            &self.endpoints_removed,
        ]
    }
}

fn take_length(rest: &mut &[u8]) -> Result<usize> {
    let (length, tail) = rest.split_first_chunk::<4>().context("a short script")?;
    *rest = tail;
    Ok(usize::try_from(u32::from_le_bytes(*length))?)
}

/// The same messages as a batch again.
pub fn batch_of(mut bytes: &[u8]) -> Result<Batch> {
    let mut batch = Batch::with_capacity(bytes.len());
    while let Some(header) = bytes.first_chunk::<16>() {
        let length = usize::try_from(u32::from_ne_bytes([header[0], header[1], header[2], header[3]]))?;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let mode = u16::from_ne_bytes([header[6], header[7]]);
        let body = bytes.get(16..length).context("a short message")?;
        batch.message(kind, mode, |writer| writer.raw(body));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(batch)
}
