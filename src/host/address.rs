//! Addresses of the host's links.
//!
//! Wire format: `struct ifaddrmsg` and IFA_* of linux/if_addr.h.

use std::net::IpAddr;

use ferroute_netlink::{Batch, DecodeError, attributes, flags};
use ipnet::IpNet;

use super::link::Link;
use super::{Error, Family, Network};

pub(super) const RTM_NEWADDR: u16 = 20;
pub(super) const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;

const IFA_F_NODAD: u32 = 0x02;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;

/// Length of `struct ifaddrmsg`.
const HEADER: usize = 8;

/// Link names that make an address no node address: VIP dummies, pod bridges, container bridges
/// (kube-router's rule for `kube-router-local-ips`).
const NOT_NODE_LINKS: [&str; 3] = ["dummy", "kube", "docker"];

/// One address of one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkAddress {
    /// Index of the link.
    pub link: u32,
    /// The local address with its prefix length.
    pub address: IpNet,
    /// RT_SCOPE_*: 0 global, 253 link, 254 host.
    pub scope: u8,
    /// IFA_F_* bits.
    pub flags: u32,
}

impl LinkAddress {
    /// Whether the address can be used now: not tentative (duplicate address detection running)
    /// and not found duplicate. Only IPv6 addresses are ever unusable.
    pub fn is_usable(&self) -> bool {
        self.flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) == 0
    }

    /// Reads an RTM_NEWADDR or RTM_DELADDR payload; `None` for a family that is not IP or a
    /// message without an address.
    pub fn decode(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (header, rest) = super::split_header::<HEADER>(payload)?;
        let [family, prefix_length, flags, scope, link @ ..] = *header;
        let mut flags = u32::from(flags);
        let (mut address, mut local) = (None, None);
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                IFA_ADDRESS => address = Some(attribute.address()?),
                IFA_LOCAL => local = Some(attribute.address()?),
                IFA_FLAGS => flags = attribute.u32()?,
                _ => {}
            }
        }
        // On a point-to-point link IFA_ADDRESS is the peer; IFA_LOCAL, where present, is ours.
        let Some(address) = local.or(address) else { return Ok(None) };
        if Family::of(address).number() != family {
            return Ok(None);
        }
        let Ok(address) = IpNet::new(address, prefix_length) else { return Ok(None) };
        Ok(Some(LinkAddress { link: u32::from_ne_bytes(link), address, scope, flags }))
    }
}

/// Addresses that belong to the node itself: those of every link whose name contains none of
/// `dummy`, `kube`, `docker`. Loopback and link-local addresses are in, as in kube-router's set
/// `kube-router-local-ips`. Sorted, each once.
pub fn node_addresses(links: &[Link], addresses: &[LinkAddress]) -> Vec<IpAddr> {
    let foreign: Vec<u32> = links
        .iter()
        .filter(|link| NOT_NODE_LINKS.iter().any(|part| link.name.contains(part)))
        .map(|link| link.index)
        .collect();
    let mut found: Vec<IpAddr> = addresses
        .iter()
        .filter(|address| !foreign.contains(&address.link))
        .map(|address| address.address.addr())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

impl Network {
    /// All addresses of both families on all links.
    pub fn addresses(&mut self) -> Result<Vec<LinkAddress>, Error> {
        self.batch.clear();
        self.batch.message(RTM_GETADDR, flags::DUMP, |body| body.raw(&[0; HEADER]));
        self.socket
            .dump(
                &self.batch,
                |kind, payload| {
                    if kind == RTM_NEWADDR { LinkAddress::decode(payload) } else { Ok(None) }
                },
            )
            .map_err(|source| Error::Transport { action: "list addresses", source })
    }

    /// Adds an address to a link. IPv6 addresses skip duplicate address detection: what we add is
    /// ours by configuration, and a tentative address can carry no traffic.
    pub fn add_address(&mut self, link: u32, address: IpNet) -> Result<(), Error> {
        encode(&mut self.batch, RTM_NEWADDR, flags::CREATE | flags::EXCL, link, address);
        self.execute_one("add address", || format!("{address} to link index {link}"))
    }

    /// Deletes an address from a link.
    pub fn delete_address(&mut self, link: u32, address: IpNet) -> Result<(), Error> {
        encode(&mut self.batch, RTM_DELADDR, 0, link, address);
        self.execute_one("delete address", || format!("{address} from link index {link}"))
    }
}

fn encode(batch: &mut Batch, kind: u16, mode: u16, link: u32, address: IpNet) {
    let ip = address.addr();
    let mut header = [Family::of(ip).number(), address.prefix_len(), 0, 0, 0, 0, 0, 0];
    if ip.is_ipv6() && kind == RTM_NEWADDR {
        header[2] = IFA_F_NODAD as u8;
    }
    header[4..].copy_from_slice(&link.to_ne_bytes());
    batch.clear();
    batch.message(kind, mode, |body| {
        body.raw(&header);
        super::write_address(body, IFA_LOCAL, ip);
        super::write_address(body, IFA_ADDRESS, ip);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.to_owned(), kind: None, flags: 0, mtu: 1500, master: None }
    }

    fn on(link: u32, address: &str) -> LinkAddress {
        LinkAddress { link, address: address.parse().unwrap(), scope: 0, flags: 0 }
    }

    #[test]
    fn addresses_of_pod_and_dummy_links_are_not_the_nodes() {
        let links = [
            link(1, "lo"),
            link(2, "eth0"),
            link(3, "kube-bridge"),
            link(4, "docker0"),
            link(5, "my-dummy1"),
            link(6, "tun-17"),
        ];
        let addresses = [
            on(2, "192.168.0.2/24"),
            on(1, "127.0.0.1/8"),
            on(3, "10.244.0.1/24"),
            on(4, "172.17.0.1/16"),
            on(5, "10.9.9.9/32"),
            on(6, "10.8.0.1/32"),
            on(2, "fe80::1/64"),
            on(6, "192.168.0.2/32"),
        ];
        let wanted: Vec<IpAddr> =
            ["10.8.0.1", "127.0.0.1", "192.168.0.2", "fe80::1"].iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!(node_addresses(&links, &addresses), wanted);
    }

    #[test]
    fn the_local_end_of_a_point_to_point_link_counts() {
        let mut batch = Batch::new();
        batch.message(RTM_NEWADDR, 0, |body| {
            body.raw(&[2, 32, 0x80, 0, 6, 0, 0, 0]);
            body.bytes(IFA_ADDRESS, &[10, 8, 0, 2]);
            body.bytes(IFA_LOCAL, &[10, 8, 0, 1]);
            body.u32(IFA_FLAGS, 0x280);
        });
        let read = LinkAddress::decode(&batch.bytes()[16..]).unwrap().unwrap();
        assert_eq!(read.address, "10.8.0.1/32".parse().unwrap());
        assert_eq!(read.flags, 0x280);
    }

    #[test]
    fn tentative_and_duplicate_addresses_are_unusable() {
        let address = |flags| LinkAddress { flags, ..on(2, "fd00::1/64") };
        assert!(address(0x80).is_usable());
        assert!(!address(0x80 | IFA_F_TENTATIVE).is_usable());
        assert!(!address(0x80 | IFA_F_DADFAILED).is_usable());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = LinkAddress::decode(&bytes);
        }

        #[test]
        fn what_is_written_is_read_back(ip in any::<IpAddr>(), length in 0u8..=32, link in any::<u32>()) {
            let address = IpNet::new(ip, length).unwrap();
            let mut batch = Batch::new();
            encode(&mut batch, RTM_NEWADDR, 0, link, address);
            let read = LinkAddress::decode(&batch.bytes()[16..]).unwrap().unwrap();
            prop_assert_eq!((read.link, read.address), (link, address));
        }
    }
}
