//! Links: list, find by name, create, set up, delete.
//!
//! Wire format: `struct ifinfomsg` and IFLA_* of linux/rtnetlink.h and linux/if_link.h.

use ferroute_netlink::{Batch, DecodeError, attributes, flags};

use super::{Error, Network, text_of};

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;

pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
pub(super) const IFLA_LINKINFO: u16 = 18;
pub(super) const IFLA_INFO_KIND: u16 = 1;

pub(super) const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 1 << 3;

/// Length of `struct ifinfomsg`.
pub(super) const HEADER: usize = 16;

/// The longest link name the kernel takes (IFNAMSIZ without the terminating zero).
pub const NAME_LIMIT: usize = 15;

/// A network link of this namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index; never reused while the link lives.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Kind of a software link as `ip -d link` names it (`dummy`, `bridge`, `veth`, `ipip`); `None`
    /// for hardware and the loopback.
    pub kind: Option<String>,
    /// IFF_* bits (linux/if.h).
    pub flags: u32,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Index of the bridge or bond this link is a port of.
    pub master: Option<u32>,
}

impl Link {
    /// Whether the link is administratively up.
    pub fn is_up(&self) -> bool {
        self.flags & IFF_UP != 0
    }

    /// Whether this is the loopback.
    pub fn is_loopback(&self) -> bool {
        self.flags & IFF_LOOPBACK != 0
    }

    /// Reads an RTM_NEWLINK or RTM_DELLINK payload. Unknown attributes are passed over; a missing
    /// name leaves it empty.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let (header, rest) = super::split_header::<HEADER>(payload)?;
        let mut link = Link {
            index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
            name: String::new(),
            kind: None,
            flags: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            mtu: 0,
            master: None,
        };
        for attribute in attributes(rest) {
            let attribute = attribute?;
            match attribute.kind {
                IFLA_IFNAME => link.name = text_of(&attribute),
                IFLA_MTU => link.mtu = attribute.u32()?,
                IFLA_MASTER => link.master = Some(attribute.u32()?).filter(|&index| index != 0),
                IFLA_LINKINFO => {
                    for info in attribute.nested() {
                        let info = info?;
                        if info.kind == IFLA_INFO_KIND {
                            link.kind = Some(text_of(&info));
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(link)
    }
}

impl Network {
    /// All links of the namespace, in index order as the kernel lists them.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        encode_dump(&mut self.batch);
        self.socket
            .dump(
                &self.batch,
                |kind, payload| {
                    if kind == RTM_NEWLINK { Link::decode(payload).map(Some) } else { Ok(None) }
                },
            )
            .map_err(|source| Error::Transport { action: "list links", source })
    }

    /// The link of that name, if there is one. Lists all links: a lookup by name that fails is an
    /// error in rtnetlink, an empty answer here.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    /// Creates a link of `kind` (`dummy`, `bridge`, ...), already up, with the kind's defaults.
    /// An existing link of that name is an error (EEXIST), whatever its kind.
    pub fn create_link(&mut self, name: &str, kind: &str) -> Result<(), Error> {
        encode_create(&mut self.batch, name, kind);
        self.execute_one("create link", || format!("{name} type {kind}"))
    }

    /// Sets a link administratively up.
    pub fn set_link_up(&mut self, index: u32) -> Result<(), Error> {
        encode_up(&mut self.batch, index);
        self.execute_one("set link up", || format!("index {index}"))
    }

    /// Sets a link's largest packet, in bytes.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), Error> {
        self.batch.clear();
        self.batch.message(RTM_NEWLINK, 0, |body| {
            body.raw(&header(index, 0, 0));
            body.u32(IFLA_MTU, mtu);
        });
        self.execute_one("set MTU of link", || format!("index {index} to {mtu}"))
    }

    /// Deletes a link with everything on it.
    pub fn delete_link(&mut self, index: u32) -> Result<(), Error> {
        encode_delete(&mut self.batch, index);
        self.execute_one("delete link", || format!("index {index}"))
    }
}

/// `struct ifinfomsg`, family unspecified.
pub(super) fn header(index: u32, bits: u32, change: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&bits.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

pub(super) fn encode_dump(batch: &mut Batch) {
    batch.clear();
    batch.message(RTM_GETLINK, flags::DUMP, |body| body.raw(&header(0, 0, 0)));
}

fn encode_create(batch: &mut Batch, name: &str, kind: &str) {
    batch.clear();
    batch.message(RTM_NEWLINK, flags::CREATE | flags::EXCL, |body| {
        body.raw(&header(0, IFF_UP, IFF_UP));
        body.string(IFLA_IFNAME, name);
        body.nest(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, kind));
    });
}

fn encode_up(batch: &mut Batch, index: u32) {
    batch.clear();
    batch.message(RTM_NEWLINK, 0, |body| body.raw(&header(index, IFF_UP, IFF_UP)));
}

fn encode_delete(batch: &mut Batch, index: u32) {
    batch.clear();
    batch.message(RTM_DELLINK, 0, |body| body.raw(&header(index, 0, 0)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut batch = Batch::new();
        encode_create(&mut batch, "kube-dummy-if", "dummy");
        assert_eq!(batch.len(), 1);
        let link = Link::decode(&batch.bytes()[16..]).unwrap();
        assert_eq!(
            (link.name.as_str(), link.kind.as_deref(), link.is_up()),
            ("kube-dummy-if", Some("dummy"), true)
        );
        encode_up(&mut batch, 7);
        assert_eq!(Link::decode(&batch.bytes()[16..]).unwrap().index, 7);
    }

    #[test]
    fn a_port_of_a_bridge_names_its_master() {
        let mut batch = Batch::new();
        batch.message(RTM_NEWLINK, 0, |body| {
            body.raw(&header(9, 0x1_1043, 0));
            body.bytes(IFLA_IFNAME, b"veth\xff\0");
            body.u32(IFLA_MTU, 1480);
            body.u32(IFLA_MASTER, 4);
            body.nest(IFLA_LINKINFO, |info| info.bytes(IFLA_INFO_KIND, b"veth"));
        });
        let link = Link::decode(&batch.bytes()[16..]).unwrap();
        assert_eq!(
            link,
            Link {
                index: 9,
                name: "veth\u{fffd}".to_owned(),
                kind: Some("veth".to_owned()),
                flags: 0x1_1043,
                mtu: 1480,
                master: Some(4),
            }
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Link::decode(&bytes);
        }
    }
}
