//! This machine's kernel: dump and apply, nothing clever.
//!
//! - [`link`], [`address`], [`route`], [`forwarding`], [`rule`], [`tunnel`]: rtnetlink, through one
//!   [`Network`] handle; [`fou`]: listeners that unwrap tunnels in UDP.
//! - [`events`]: what changed in links, addresses and routes, as it happens.
//! - [`conntrack`]: flows the kernel tracks; which of them are stale; their exact deletion.
//! - [`sysctl`]: read, compare, write only what differs.
//! - [`kernel`]: what this kernel can do, and the cure for what it cannot; [`extension`]: the matches and
//!   targets of rules; [`modules`]: what its modules bring; [`release`]: its version.
//!
//! No policy lives here: which route, which sysctl or which flow is right is decided by the rooms.
//! Each handle belongs to the network namespace of the thread that opened it.

pub mod address;
pub mod conntrack;
mod error;
pub mod events;
pub mod extension;
pub mod forwarding;
pub mod fou;
pub mod kernel;
pub mod link;
pub mod modules;
pub mod release;
pub mod route;
pub mod rule;
pub mod sysctl;
pub mod tunnel;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferroute_netlink::{Attribute, Batch, Body, DecodeError, Protocol, Socket};

pub use error::Error;

/// An address family of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6.
    V6,
}

impl Family {
    /// IPv4, then IPv6.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// AF_INET or AF_INET6, which are also NFPROTO_IPV4 and NFPROTO_IPV6.
    pub fn number(self) -> u8 {
        match self {
            Family::V4 => 2,
            Family::V6 => 10,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::BOTH.into_iter().find(|family| family.number() == number)
    }

    /// `0.0.0.0` or `::`.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// One rtnetlink socket and its reusable message buffer: links, addresses and routes.
pub struct Network {
    socket: Socket,
    batch: Batch,
}

impl Network {
    /// Opens a socket in the current network namespace. Reading needs no privilege, writing needs
    /// CAP_NET_ADMIN.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open(Protocol::Route)
            .map_err(|source| Error::Transport { action: "open an rtnetlink socket", source })?;
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

    /// Sends the one message in `batch`; a refusal becomes [`Error::Refused`] about `object`.
    fn execute_one(&mut self, action: &'static str, object: impl FnOnce() -> String) -> Result<(), Error> {
        let failures =
            self.socket.execute(&self.batch).map_err(|source| Error::Transport { action, source })?;
        match failures.into_iter().next() {
            None => Ok(()),
            Some(failure) => Err(Error::refused(action, object(), failure)),
        }
    }
}

/// Parts a payload into its fixed header and the attributes behind it.
fn split_header<const LENGTH: usize>(payload: &[u8]) -> Result<(&[u8; LENGTH], &[u8]), DecodeError> {
    payload.split_first_chunk().ok_or(DecodeError::Length {
        what: "header",
        length: LENGTH,
        available: payload.len(),
    })
}

/// A text attribute up to its first NUL. Link names may be any bytes: what is no UTF-8 is replaced,
/// so that one odd name does not hide the other links.
fn text_of(attribute: &Attribute<'_>) -> String {
    let end = attribute.payload.iter().position(|&byte| byte == 0).unwrap_or(attribute.payload.len());
    String::from_utf8_lossy(&attribute.payload[..end]).into_owned()
}

/// Writes an address attribute of either family.
fn write_address(body: &mut Body<'_>, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(address) => body.bytes(kind, &address.octets()),
        IpAddr::V6(address) => body.bytes(kind, &address.octets()),
    }
}
