//! Virtual servers and destinations as plain data.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::{BitOr, BitOrAssign};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// All virtual servers of a network namespace. Servers are shared, so that an unchanged one costs a
/// pointer in each table that knows it.
pub type Table = HashMap<VirtualServerKey, Arc<VirtualServer>, foldhash::fast::RandomState>;

/// Transport protocols that IPVS balances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// IP protocol 6.
    Tcp,
    /// IP protocol 17.
    Udp,
    /// IP protocol 132.
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol of an IP protocol number.
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Address families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "IPv4")]
    V4,
    /// IPv6.
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: &IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Which packets a virtual server takes: those to an address and port, or those with a firewall mark.
///
/// Displayed as `TCP 10.0.0.1:80`, `UDP [fd00::1]:53` or `FWM 0x40000001 IPv4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VirtualServerKey {
    /// Packets to an address and port. Port 0 takes all ports, for persistent servers only.
    Address {
        /// Transport protocol.
        protocol: Protocol,
        /// Destination address of the packets.
        address: IpAddr,
        /// Destination port of the packets.
        port: u16,
    },
    /// Packets of one family that carry a firewall mark, whatever their protocol and address.
    Mark {
        /// Family of the packets.
        family: Family,
        /// The mark, not zero.
        mark: u32,
    },
}

impl VirtualServerKey {
    /// The family of the packets.
    pub const fn family(&self) -> Family {
        match self {
            Self::Address { address, .. } => Family::of(address),
            Self::Mark { family, .. } => *family,
        }
    }

    /// The transport protocol, where the server has one.
    pub const fn protocol(&self) -> Option<Protocol> {
        match self {
            Self::Address { protocol, .. } => Some(*protocol),
            Self::Mark { .. } => None,
        }
    }
}

impl fmt::Display for VirtualServerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { protocol, address, port } => {
                write!(f, "{protocol} ")?;
                address_and_port(f, address, *port)
            }
            Self::Mark { family, mark } => write!(f, "FWM {mark:#x} {family}"),
        }
    }
}

impl Serialize for VirtualServerKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The name of a scheduler, at most 15 bytes (`IP_VS_SCHEDNAME_MAXLEN`), stored in place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scheduler([u8; 15]);

/// A scheduler name that no kernel can know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} cannot be a scheduler: a name has 1 to 15 visible ASCII characters")]
pub struct InvalidScheduler {
    /// The refused name.
    pub name: String,
}

impl Scheduler {
    /// Round robin.
    pub const RR: Self = Self::known("rr");
    /// Weighted round robin.
    pub const WRR: Self = Self::known("wrr");
    /// Least connections.
    pub const LC: Self = Self::known("lc");
    /// Weighted least connections.
    pub const WLC: Self = Self::known("wlc");
    /// Locality-based least connections.
    pub const LBLC: Self = Self::known("lblc");
    /// Locality-based least connections with replication.
    pub const LBLCR: Self = Self::known("lblcr");
    /// Destination hashing.
    pub const DH: Self = Self::known("dh");
    /// Source hashing.
    pub const SH: Self = Self::known("sh");
    /// Shortest expected delay.
    pub const SED: Self = Self::known("sed");
    /// Never queue.
    pub const NQ: Self = Self::known("nq");
    /// Weighted failover.
    pub const FO: Self = Self::known("fo");
    /// Weighted overflow.
    pub const OVF: Self = Self::known("ovf");
    /// Maglev hashing (Linux 4.18).
    pub const MH: Self = Self::known("mh");
    /// Weighted random twos choice (Linux 6.0).
    pub const TWOS: Self = Self::known("twos");

    /// Every scheduler of the mainline kernel.
    pub const ALL: [Self; 14] = [
        Self::RR,
        Self::WRR,
        Self::LC,
        Self::WLC,
        Self::LBLC,
        Self::LBLCR,
        Self::DH,
        Self::SH,
        Self::SED,
        Self::NQ,
        Self::FO,
        Self::OVF,
        Self::MH,
        Self::TWOS,
    ];

    const fn known(name: &str) -> Self {
        let name = name.as_bytes();
        let mut bytes = [0; 15];
        let mut at = 0;
        while at < name.len() {
            bytes[at] = name[at];
            at += 1;
        }
        Self(bytes)
    }

    /// A scheduler by name. Whether the kernel has it shows only when a server asks for it.
    ///
    /// # Errors
    ///
    /// When the name is empty, too long, or holds anything but visible ASCII characters.
    pub fn new(name: &str) -> Result<Self, InvalidScheduler> {
        let mut bytes = [0; 15];
        let fits =
            !name.is_empty() && name.len() <= bytes.len() && name.bytes().all(|byte| byte.is_ascii_graphic());
        if !fits {
            return Err(InvalidScheduler { name: name.to_owned() });
        }
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Ok(Self(bytes))
    }

    /// The name.
    pub fn name(&self) -> &str {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(self.0.len());
        // Only ASCII gets in.
        std::str::from_utf8(&self.0[..end]).unwrap_or_default()
    }
}

impl FromStr for Scheduler {
    type Err = InvalidScheduler;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Scheduler {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Flags of a virtual server (`IP_VS_SVC_F_*` in `linux/ip_vs.h`). [`Flags::HASHED`] belongs to the
/// kernel and does not count when flags are compared.
#[derive(Clone, Copy, Default, Serialize)]
pub struct Flags(u32);

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// Connections of one client stay with one destination.
    pub const PERSISTENT: Self = Self(0x01);
    /// Set by the kernel on every server in its table.
    pub const HASHED: Self = Self(0x02);
    /// Every UDP datagram is balanced anew.
    pub const ONE_PACKET: Self = Self(0x04);
    /// First flag of the scheduler.
    pub const SCHED_1: Self = Self(0x08);
    /// Second flag of the scheduler.
    pub const SCHED_2: Self = Self(0x10);
    /// Third flag of the scheduler.
    pub const SCHED_3: Self = Self(0x20);
    /// `sh`: pass to the next destination when the hashed one is unavailable.
    pub const SH_FALLBACK: Self = Self::SCHED_1;
    /// `sh`: hash the source port too.
    pub const SH_PORT: Self = Self::SCHED_2;
    /// `mh`: pass to the next destination when the hashed one is unavailable.
    pub const MH_FALLBACK: Self = Self::SCHED_1;
    /// `mh`: hash the source port too.
    pub const MH_PORT: Self = Self::SCHED_2;

    /// Flags from their bits.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is not the kernel's own.
    const fn chosen(self) -> u32 {
        self.0 & !Self::HASHED.0
    }
}

impl PartialEq for Flags {
    fn eq(&self, other: &Self) -> bool {
        self.chosen() == other.chosen()
    }
}

impl Eq for Flags {}

impl Hash for Flags {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.chosen().hash(state);
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flags({:#x})", self.0)
    }
}

/// Which part of a client's address persistence looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(untagged)]
pub enum Netmask {
    /// IPv4: a mask.
    V4(Ipv4Addr),
    /// IPv6: a prefix length, 1 to 128.
    V6(u8),
}

impl Netmask {
    /// The whole address: each client for itself.
    pub const fn host(family: Family) -> Self {
        match family {
            Family::V4 => Self::V4(Ipv4Addr::BROADCAST),
            Family::V6 => Self::V6(128),
        }
    }
}

/// What a virtual server is beside its destinations: 32 bytes, copied freely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Options {
    /// How connections are spread.
    pub scheduler: Scheduler,
    /// Flags.
    pub flags: Flags,
    /// Persistence in seconds; means nothing without [`Flags::PERSISTENT`], but is kept.
    pub timeout: u32,
    /// Granularity of persistence.
    pub netmask: Netmask,
}

/// A virtual server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VirtualServer {
    /// How connections are spread.
    pub scheduler: Scheduler,
    /// Flags.
    pub flags: Flags,
    /// Persistence in seconds; means nothing without [`Flags::PERSISTENT`], but is kept.
    pub timeout: u32,
    /// Granularity of persistence.
    pub netmask: Netmask,
    /// Sorted by [`Destination::key`], each key once: [`diff`](crate::diff) walks them in that order.
    pub destinations: Vec<Destination>,
}

impl VirtualServer {
    /// A server with these destinations, which are sorted; of equal keys the first stays.
    pub fn new(options: Options, mut destinations: Vec<Destination>) -> Self {
        let Options { scheduler, flags, timeout, netmask } = options;
        // Stable, so that the first of equal keys stays; free when they are sorted.
        destinations.sort_by_key(Destination::key);
        destinations.dedup_by_key(|destination| destination.key());
        Self { scheduler, flags, timeout, netmask, destinations }
    }

    /// All but the destinations.
    pub const fn options(&self) -> Options {
        Options { scheduler: self.scheduler, flags: self.flags, timeout: self.timeout, netmask: self.netmask }
    }

    /// The destination with this key.
    pub fn destination(&self, key: DestinationKey) -> Option<&Destination> {
        let at = self.destinations.binary_search_by_key(&key, Destination::key).ok()?;
        self.destinations.get(at)
    }
}

/// What tells the destinations of a virtual server apart. Displayed as `10.1.2.3:8080`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DestinationKey {
    /// Address of the real server.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

impl fmt::Display for DestinationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        address_and_port(f, &self.address, self.port)
    }
}

impl Serialize for DestinationKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A real server behind a virtual one. 40 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Destination {
    /// Address; of the other family than the server's only with [`Forwarding::Tunnel`].
    pub address: IpAddr,
    /// Port; with tunnel and direct routing that of the virtual server, 0 behind a mark.
    pub port: u16,
    /// How packets get there.
    pub forwarding: Forwarding,
    /// Share of new connections; 0 takes none and keeps the present ones. At most 2^31 - 1.
    pub weight: u32,
    /// Connections from which on it takes no new ones; 0 is no limit.
    pub upper_threshold: u32,
    /// Connections below which it takes new ones again; at most the upper threshold.
    pub lower_threshold: u32,
}

impl Destination {
    /// A masqueraded destination without thresholds.
    pub const fn masquerade(address: IpAddr, port: u16, weight: u32) -> Self {
        Self {
            address,
            port,
            forwarding: Forwarding::Masquerade,
            weight,
            upper_threshold: 0,
            lower_threshold: 0,
        }
    }

    /// What tells it apart within its server.
    pub const fn key(&self) -> DestinationKey {
        DestinationKey { address: self.address, port: self.port }
    }
}

/// How packets reach a destination (`IP_VS_CONN_F_FWD_MASK`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Forwarding {
    /// Addresses are rewritten both ways.
    Masquerade,
    /// To a process of this machine; the kernel's own choice on old versions.
    LocalNode,
    /// Wrapped in another packet; the destination answers the client itself.
    Tunnel(Tunnel),
    /// Unchanged, by link layer address; the destination answers the client itself.
    DirectRoute,
    /// The kernel's own choice for packets that pass by the table.
    Bypass,
    /// A number (5 to 7) that the kernel stores without knowing it.
    Other(u8),
}

/// Encapsulation towards a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Tunnel {
    /// Which encapsulation.
    pub kind: TunnelKind,
    /// UDP port of GUE, else 0.
    pub port: u16,
    /// `IP_VS_TUNNEL_ENCAP_FLAG_*`: 0 no checksum, 1 checksum, 2 remote checksum offload.
    pub flags: u16,
}

impl Tunnel {
    /// Plain IP in IP, of all families.
    pub const IPIP: Self = Self { kind: TunnelKind::Ipip, port: 0, flags: 0 };
}

/// `IP_VS_CONN_F_TUNNEL_TYPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TunnelKind {
    /// IP in IP.
    Ipip,
    /// Generic UDP encapsulation (Linux 5.3).
    Gue,
    /// Generic routing encapsulation (Linux 5.3).
    Gre,
    /// A number that the kernel stores without knowing it.
    Other(u8),
}

fn address_and_port(f: &mut fmt::Formatter<'_>, address: &IpAddr, port: u16) -> fmt::Result {
    match address {
        IpAddr::V4(address) => write!(f, "{address}:{port}"),
        IpAddr::V6(address) => write!(f, "[{address}]:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_as_ipvsadm_users_expect() {
        let key = |address: &str, port| VirtualServerKey::Address {
            protocol: Protocol::Sctp,
            address: address.parse().unwrap(),
            port,
        };
        assert_eq!(key("10.0.0.1", 80).to_string(), "SCTP 10.0.0.1:80");
        assert_eq!(key("fd00::1", 80).to_string(), "SCTP [fd00::1]:80");
        let mark = VirtualServerKey::Mark { family: Family::V6, mark: 0x4000_0001 };
        assert_eq!(mark.to_string(), "FWM 0x40000001 IPv6");
    }

    #[test]
    fn names_of_schedulers_are_checked() {
        for scheduler in Scheduler::ALL {
            assert_eq!(Scheduler::new(scheduler.name()).unwrap(), scheduler);
        }
        assert_eq!(Scheduler::new("fifteen-letters").unwrap().name(), "fifteen-letters");
        for name in ["", "sixteen--letters", "r r", "r\0", "é"] {
            assert!(Scheduler::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn the_kernels_flag_does_not_count() {
        assert_eq!(Flags::PERSISTENT | Flags::HASHED, Flags::PERSISTENT);
        assert_ne!(Flags::PERSISTENT, Flags::ONE_PACKET);
        assert!((Flags::SH_PORT | Flags::SH_FALLBACK).contains(Flags::SCHED_1));
    }

    #[test]
    fn destinations_are_sorted_and_unique() {
        let options = Options {
            scheduler: Scheduler::RR,
            flags: Flags::NONE,
            timeout: 0,
            netmask: Netmask::host(Family::V4),
        };
        let at = |address: [u8; 4], weight| Destination::masquerade(address.into(), 80, weight);
        let server =
            VirtualServer::new(options, vec![at([2, 0, 0, 2], 1), at([1, 0, 0, 1], 2), at([2, 0, 0, 2], 3)]);
        assert_eq!(server.destinations, [at([1, 0, 0, 1], 2), at([2, 0, 0, 2], 1)]);
        assert_eq!(server.destination(at([2, 0, 0, 2], 9).key()), Some(&at([2, 0, 0, 2], 1)));
    }

    #[test]
    fn a_hundred_thousand_destinations_take_four_megabytes() {
        assert_eq!(size_of::<Destination>(), 40);
        assert!(size_of::<VirtualServerKey>() <= 24);
        assert!(size_of::<VirtualServer>() <= 56);
    }
}
