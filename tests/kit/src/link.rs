//! Links, addresses and routes by rtnetlink (linux/rtnetlink.h, if_link.h, if_addr.h).
//!
//! Written apart from ferroute's own netlink crate, so that a fault there cannot hide here; in
//! process, because starting `ip` costs 8 ms in User-Mode Linux and a message 25 us.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;

const NLMSG_ERROR: u16 = 2;
const REQUEST_ACK: u16 = 0x1 | 0x4;
const REPLACE: u16 = 0x100;
const EXCL: u16 = 0x200;
const CREATE: u16 = 0x400;

const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 0x02;

const RTA_DST: u16 = 1;
const RTA_GATEWAY: u16 = 5;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_NOWHERE: u8 = 255;
const RTN_UNICAST: u8 = 1;

/// An rtnetlink socket of one namespace.
#[derive(Debug)]
pub struct Links(OwnedFd);

/// Bytes of one message after the netlink header.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn attribute(&mut self, kind: u16, payload: &[u8]) -> &mut Self {
        // Payloads here are names, addresses and a few next hops: far below the 64 KiB of a length.
        let length = (4 + payload.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn string(&mut self, kind: u16, text: &str) -> &mut Self {
        self.attribute(kind, format!("{text}\0").as_bytes())
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Body)) -> &mut Self {
        let mut inner = Body::default();
        fill(&mut inner);
        self.attribute(kind, &inner.0)
    }

    /// `struct ifinfomsg`.
    fn link(&mut self, index: u32, flags: u32, change: u32) -> &mut Self {
        self.0.extend([0; 4]);
        self.0.extend(index.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend(change.to_ne_bytes());
        self
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 2 } else { 10 }
}

impl Links {
    /// A socket of the calling thread's namespace.
    pub(crate) fn open() -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?))
    }

    fn request(&self, kind: u16, flags: u16, body: &Body) -> Result<(), Errno> {
        let mut message = Vec::with_capacity(16 + body.0.len());
        message.extend(((16 + body.0.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | REQUEST_ACK).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(&body.0);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0; 8192];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        if length < 20 || u16::from_ne_bytes([answer[4], answer[5]]) != NLMSG_ERROR {
            return Err(Errno::EBADMSG);
        }
        match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
            0 => Ok(()),
            negative => Err(Errno::from_raw(-negative)),
        }
    }

    /// Makes a link of a kind without settings (`bridge`, `dummy`) and brings it up.
    ///
    /// # Errors
    /// When the kernel refuses; EOPNOTSUPP means that it has no such kind.
    pub fn add(&self, name: &str, kind: &str) -> Result<()> {
        let mut body = Body::default();
        body.link(0, IFF_UP, IFF_UP).string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, kind);
        });
        self.request(RTM_NEWLINK, CREATE | EXCL, &body).with_context(|| format!("add {kind} link {name}"))
    }

    /// Makes a veth pair: `name` here, its peer in another namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_veth(&self, name: &str, peer: &str, peer_netns: BorrowedFd<'_>) -> Result<()> {
        let mut body = Body::default();
        body.link(0, 0, 0).string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |other| {
                    let fd = peer_netns.as_raw_fd().to_ne_bytes();
                    other.link(0, 0, 0).string(IFLA_IFNAME, peer).attribute(IFLA_NET_NS_FD, &fd);
                });
            });
        });
        self.request(RTM_NEWLINK, CREATE | EXCL, &body)
            .with_context(|| format!("add veth link {name} with peer {peer}"))
    }

    /// Removes a link.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn delete(&self, name: &str) -> Result<()> {
        let mut body = Body::default();
        body.link(0, 0, 0).string(IFLA_IFNAME, name);
        self.request(RTM_DELLINK, 0, &body).with_context(|| format!("delete link {name}"))
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn up(&self, name: &str) -> Result<()> {
        self.set_flags(name, IFF_UP)
    }

    /// Brings a link down.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn down(&self, name: &str) -> Result<()> {
        self.set_flags(name, 0)
    }

    /// Gives a bridge an address of its own, as the `bridge` CNI plugin does. Else it has the lowest of
    /// its ports': a new port changes it, and what neighbours still send to the old one is lost.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn pin_address(&self, name: &str) -> Result<()> {
        static NUMBER: AtomicU16 = AtomicU16::new(1);
        let [high, low] = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mut body = Body::default();
        body.link(0, 0, 0).string(IFLA_IFNAME, name).attribute(IFLA_ADDRESS, &[0x02, 0xfe, 0, 0, high, low]);
        self.request(RTM_NEWLINK, 0, &body).with_context(|| format!("set address of link {name}"))
    }

    fn set_flags(&self, name: &str, flags: u32) -> Result<()> {
        let mut body = Body::default();
        body.link(0, flags, IFF_UP).string(IFLA_IFNAME, name);
        self.request(RTM_NEWLINK, 0, &body).with_context(|| format!("set flags of link {name}"))
    }

    /// Makes a link a port of a bridge and brings it up. With hairpin mode a frame may leave by
    /// the port it came from: a pod that reaches itself through a Service needs it.
    ///
    /// # Errors
    /// When either link is missing.
    pub fn enslave(&self, name: &str, bridge: u32, hairpin: bool) -> Result<()> {
        let mut body = Body::default();
        body.link(0, IFF_UP, IFF_UP).string(IFLA_IFNAME, name).attribute(IFLA_MASTER, &bridge.to_ne_bytes());
        self.request(RTM_NEWLINK, 0, &body).with_context(|| format!("put link {name} on its bridge"))?;
        if hairpin {
            let mut body = Body::default();
            body.link(0, 0, 0).string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
                info.string(IFLA_INFO_SLAVE_KIND, "bridge").nest(IFLA_INFO_SLAVE_DATA, |data| {
                    data.attribute(IFLA_BRPORT_MODE, &[1]);
                });
            });
            self.request(RTM_NEWLINK, 0, &body).with_context(|| format!("set hairpin mode of {name}"))?;
        }
        Ok(())
    }

    /// Adds an address without duplicate address detection.
    ///
    /// # Errors
    /// When it exists or the kernel refuses.
    pub fn add_address(&self, index: u32, address: IpNet) -> Result<()> {
        self.address(RTM_NEWADDR, CREATE | EXCL, index, address)
            .with_context(|| format!("add address {address}"))
    }

    /// Removes an address.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete_address(&self, index: u32, address: IpNet) -> Result<()> {
        self.address(RTM_DELADDR, 0, index, address).with_context(|| format!("delete address {address}"))
    }

    fn address(&self, kind: u16, flags: u16, index: u32, address: IpNet) -> Result<(), Errno> {
        let mut body = Body::default();
        let ip = address.addr();
        let nodad = if ip.is_ipv6() { IFA_F_NODAD } else { 0 };
        body.0.extend([family(ip), address.prefix_len(), nodad, RT_SCOPE_UNIVERSE]);
        body.0.extend(index.to_ne_bytes());
        body.attribute(IFA_LOCAL, &octets(ip)).attribute(IFA_ADDRESS, &octets(ip));
        self.request(kind, flags, &body)
    }

    /// Adds or replaces a route of the main table through these next hops (several: equal cost).
    ///
    /// # Errors
    /// When a next hop is not reachable or of another family.
    pub fn set_route(&self, to: IpNet, via: &[IpAddr]) -> Result<()> {
        let mut body = Body::default();
        body.0.extend([family(to.addr()), to.prefix_len(), 0, 0]);
        body.0.extend([RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0, 0, 0, 0]);
        if to.prefix_len() > 0 {
            body.attribute(RTA_DST, &octets(to.network()));
        }
        match via {
            [] => bail!("route to {to}: no next hop given"),
            [gateway] => {
                body.attribute(RTA_GATEWAY, &octets(*gateway));
            }
            several => {
                let mut hops = Vec::new();
                for gateway in several {
                    let mut hop = Body::default();
                    hop.attribute(RTA_GATEWAY, &octets(*gateway));
                    // struct rtnexthop: length, flags, weight - 1, interface (found by the gateway).
                    hops.extend(((8 + hop.0.len()) as u16).to_ne_bytes());
                    hops.extend([0; 6]);
                    hops.extend(hop.0);
                }
                body.attribute(RTA_MULTIPATH, &hops);
            }
        }
        self.request(RTM_NEWROUTE, CREATE | REPLACE, &body)
            .with_context(|| format!("route to {to} via {via:?}"))
    }

    /// Adds or replaces an on-link route of the main table.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_link_route(&self, to: IpNet, index: u32) -> Result<()> {
        let mut body = Body::default();
        body.0.extend([family(to.addr()), to.prefix_len(), 0, 0]);
        body.0.extend([RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_LINK, RTN_UNICAST, 0, 0, 0, 0]);
        body.attribute(RTA_DST, &octets(to.network())).attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(RTM_NEWROUTE, CREATE | REPLACE, &body).with_context(|| format!("route to {to} on link"))
    }

    /// Removes a route of the main table.
    ///
    /// # Errors
    /// When there is none.
    pub fn delete_route(&self, to: IpNet) -> Result<()> {
        let mut body = Body::default();
        body.0.extend([family(to.addr()), to.prefix_len(), 0, 0]);
        body.0.extend([RT_TABLE_MAIN, 0, RT_SCOPE_NOWHERE, 0, 0, 0, 0, 0]);
        if to.prefix_len() > 0 {
            body.attribute(RTA_DST, &octets(to.network()));
        }
        self.request(RTM_DELROUTE, 0, &body).with_context(|| format!("delete route to {to}"))
    }
}

impl crate::Netns {
    /// The index of a link of this namespace.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn link_index(&self, name: &str) -> Result<u32> {
        self.run(|| if_nametoindex(name)).with_context(|| format!("link {name} in {}", self.name()))
    }
}
