//! Point-to-point IP tunnels: `ipip` over IPv4, `ip6tnl` over IPv6 (which carries both families), plain
//! or in UDP (GUE). List, make, change.
//!
//! Wire format: IFLA_IPTUN_* of linux/if_tunnel.h, in IFLA_INFO_DATA of a link.

use std::fmt;
use std::net::IpAddr;

use ferroute_netlink::{Attribute, Batch, Body, DecodeError, attributes, flags};

use super::link::{
    HEADER, IFF_UP, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU, Link, RTM_NEWLINK, encode_dump,
    header,
};
use super::{Error, Family, Network, text_of};

const IFLA_INFO_DATA: u16 = 2;

const LOCAL: u16 = 2;
const REMOTE: u16 = 3;
const TTL: u16 = 4;
const ENCAP_LIMIT: u16 = 6;
const FLAGS: u16 = 8;
const PROTO: u16 = 9;
const PMTUDISC: u16 = 10;
const ENCAP_TYPE: u16 = 15;
const ENCAP_FLAGS: u16 = 16;
const ENCAP_SPORT: u16 = 17;
const ENCAP_DPORT: u16 = 18;

/// TUNNEL_ENCAP_NONE, TUNNEL_ENCAP_GUE.
const ENCAP_NONE: u16 = 0;
const ENCAP_GUE: u16 = 2;
/// IP6_TNL_F_IGN_ENCAP_LIMIT: no destination option in each packet, so the overhead is one header.
const IGNORE_ENCAP_LIMIT: u32 = 1;
/// Hops outside: of its own, since one that is inherited would let a traceroute end in the tunnel.
pub const HOP_LIMIT: u8 = 64;

/// What a tunnel carries packets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Encapsulation {
    /// An IP header.
    Plain,
    /// IP, UDP to this port, and a GUE header; the source port tells flows apart.
    Gue(u16),
    /// Seen on a link, never made: this TUNNEL_ENCAP_* number.
    Other(u16),
}

impl Encapsulation {
    /// Bytes that each packet grows by over this family.
    pub fn overhead(self, family: Family) -> u32 {
        let ip = if family == Family::V4 { 20 } else { 40 };
        // UDP 8, GUE without options 4.
        if self == Encapsulation::Plain { ip } else { ip + 12 }
    }
}

impl fmt::Display for Encapsulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Encapsulation::Plain => f.write_str("ipip"),
            Encapsulation::Gue(port) => write!(f, "gue port {port}"),
            Encapsulation::Other(number) => write!(f, "encapsulation {number}"),
        }
    }
}

/// A tunnel's ends and form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tunnel {
    /// This node's end; unspecified when the kernel may choose.
    pub local: IpAddr,
    /// The other end.
    pub remote: IpAddr,
    /// How packets are wrapped.
    pub encapsulation: Encapsulation,
}

impl Tunnel {
    /// The kind of link, as `ip link` names it.
    pub fn kind(&self) -> &'static str {
        if self.remote.is_ipv4() { "ipip" } else { "ip6tnl" }
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {} to {} in {}", self.kind(), self.local, self.remote, self.encapsulation)
    }
}

/// A link that is a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelLink {
    /// The link.
    pub link: Link,
    /// Ends and form.
    pub tunnel: Tunnel,
    /// Of an `ip6tnl`: the inner protocol it is limited to; 0 carries both families.
    pub carries: u8,
}

impl TunnelLink {
    /// Reads an RTM_NEWLINK payload; `None` for what is no `ipip` or `ip6tnl`.
    ///
    /// # Errors
    /// When it is cut off or an attribute has a wrong length.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (_, rest) = super::split_header::<HEADER>(payload)?;
        let (mut kind, mut data) = (None, None);
        for attribute in attributes(rest) {
            let attribute = attribute?;
            if attribute.kind != IFLA_LINKINFO {
                continue;
            }
            for info in attribute.nested() {
                let info = info?;
                match info.kind {
                    IFLA_INFO_KIND => kind = Some(text_of(&info)),
                    IFLA_INFO_DATA => data = Some(info),
                    _ => {}
                }
            }
        }
        let family = match kind.as_deref() {
            Some("ipip") => Family::V4,
            Some("ip6tnl") => Family::V6,
            _ => return Ok(None),
        };
        let (tunnel, carries) = ends(data, family)?;
        Ok(Some(TunnelLink { link: Link::decode(payload)?, tunnel, carries }))
    }
}

fn ends(data: Option<Attribute<'_>>, family: Family) -> Result<(Tunnel, u8), DecodeError> {
    let unspecified = family.unspecified();
    let (mut local, mut remote, mut carries) = (unspecified, unspecified, 0);
    let (mut form, mut port) = (ENCAP_NONE, 0);
    if let Some(data) = data {
        for attribute in data.nested() {
            let attribute = attribute?;
            match attribute.kind {
                LOCAL => local = attribute.address()?,
                REMOTE => remote = attribute.address()?,
                PROTO => carries = attribute.u8()?,
                ENCAP_TYPE => form = attribute.u16()?,
                ENCAP_DPORT => port = attribute.be16()?,
                _ => {}
            }
        }
    }
    let encapsulation = match form {
        ENCAP_NONE => Encapsulation::Plain,
        ENCAP_GUE => Encapsulation::Gue(port),
        other => Encapsulation::Other(other),
    };
    Ok((Tunnel { local, remote, encapsulation }, carries))
}

impl Network {
    /// All `ipip` and `ip6tnl` links, ours or not.
    ///
    /// # Errors
    /// When the kernel cannot be read.
    pub fn tunnels(&mut self) -> Result<Vec<TunnelLink>, Error> {
        encode_dump(&mut self.batch);
        self.socket
            .dump(
                &self.batch,
                |kind, payload| {
                    if kind == RTM_NEWLINK { TunnelLink::decode(payload) } else { Ok(None) }
                },
            )
            .map_err(|source| Error::Transport { action: "list tunnels", source })
    }

    /// Makes a tunnel, already up. An existing link of that name is an error (EEXIST), and so is a
    /// second tunnel of the same ends.
    ///
    /// # Errors
    /// What the kernel refused; EOPNOTSUPP where it lacks the kind of link or GUE.
    pub fn create_tunnel(&mut self, name: &str, tunnel: &Tunnel, mtu: u32) -> Result<(), Error> {
        encode(
            &mut self.batch,
            RTM_NEWLINK,
            flags::CREATE | flags::EXCL,
            header(0, IFF_UP, IFF_UP),
            |body| {
                body.string(IFLA_IFNAME, name);
                body.u32(IFLA_MTU, mtu);
                write(body, tunnel);
            },
        );
        self.execute_one("create link", || format!("{name}: {tunnel}"))
    }

    /// Gives a tunnel other ends, another form or MTU, and sets it up; routes over it stay.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn change_tunnel(&mut self, index: u32, tunnel: &Tunnel, mtu: u32) -> Result<(), Error> {
        encode(&mut self.batch, RTM_NEWLINK, 0, header(index, IFF_UP, IFF_UP), |body| {
            body.u32(IFLA_MTU, mtu);
            write(body, tunnel);
        });
        self.execute_one("change link", || format!("index {index}: {tunnel}"))
    }
}

fn encode(batch: &mut Batch, kind: u16, mode: u16, header: [u8; HEADER], rest: impl FnOnce(&mut Body<'_>)) {
    batch.clear();
    batch.message(kind, mode, |body| {
        body.raw(&header);
        rest(body);
    });
}

fn write(body: &mut Body<'_>, tunnel: &Tunnel) {
    let (form, port) = match tunnel.encapsulation {
        Encapsulation::Plain => (ENCAP_NONE, 0),
        Encapsulation::Gue(port) => (ENCAP_GUE, port),
        Encapsulation::Other(number) => (number, 0),
    };
    body.nest(IFLA_LINKINFO, |info| {
        info.string(IFLA_INFO_KIND, tunnel.kind());
        info.nest(IFLA_INFO_DATA, |data| {
            super::write_address(data, LOCAL, tunnel.local);
            super::write_address(data, REMOTE, tunnel.remote);
            data.u8(TTL, HOP_LIMIT);
            if tunnel.remote.is_ipv4() {
                data.u8(PMTUDISC, 1);
            } else {
                data.u8(PROTO, 0);
                data.u8(ENCAP_LIMIT, 0);
                data.u32(FLAGS, IGNORE_ENCAP_LIMIT);
            }
            // Also where there is none: a change from GUE to plain must say so.
            data.u16(ENCAP_TYPE, form);
            data.u16(ENCAP_FLAGS, 0);
            data.be16(ENCAP_SPORT, 0);
            data.be16(ENCAP_DPORT, port);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tunnel(local: &str, remote: &str, encapsulation: Encapsulation) -> Tunnel {
        Tunnel { local: local.parse().unwrap(), remote: remote.parse().unwrap(), encapsulation }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for wanted in [
            tunnel("10.0.0.1", "10.0.1.1", Encapsulation::Plain),
            tunnel("10.0.0.1", "10.0.1.1", Encapsulation::Gue(5555)),
            tunnel("fd00::1", "fd01::1", Encapsulation::Plain),
            tunnel("fd00::1", "fd01::1", Encapsulation::Gue(6080)),
        ] {
            let mut batch = Batch::new();
            encode(&mut batch, RTM_NEWLINK, 0, header(7, IFF_UP, IFF_UP), |body| {
                body.string(IFLA_IFNAME, "tun-0123456789a");
                write(body, &wanted);
            });
            let read = TunnelLink::decode(&batch.bytes()[16..]).unwrap().unwrap();
            assert_eq!((read.tunnel, read.carries), (wanted, 0));
            assert_eq!((read.link.index, read.link.is_up()), (7, true));
        }
    }

    #[test]
    fn other_links_are_no_tunnels() {
        let mut batch = Batch::new();
        encode(&mut batch, RTM_NEWLINK, 0, header(7, 0, 0), |body| {
            body.nest(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, "sit"));
        });
        assert_eq!(TunnelLink::decode(&batch.bytes()[16..]), Ok(None));
    }

    #[test]
    fn each_form_costs_its_headers() {
        use Encapsulation::{Gue, Plain};
        let cost = |form: Encapsulation| Family::BOTH.map(|family| form.overhead(family));
        assert_eq!((cost(Plain), cost(Gue(5555))), ([20, 40], [32, 52]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = TunnelLink::decode(&bytes);
        }
    }
}
