//! Netlink requests in batches.
//!
//! A [`Batch`] holds any number of encoded requests. [`Socket::execute`] sends them in as few system
//! calls as fit, asks for an acknowledgement of the last message of each send only, and still brings
//! back every message that failed, with its index, its errno and the kernel's own text: the kernel
//! answers a failed request whether or not an acknowledgement was asked for (netlink(7)).
//! [`Socket::dump`] collects answers and starts again when the kernel says that the table changed
//! under the dump. [`Socket::receive_events`] reads multicast notifications.
//!
//! Bodies are written by hand ([`Body`]) because bulk encoding dominates when a node is programmed;
//! the generic netlink control protocol ([`resolve_family`]) is spoken through neli's types. The
//! socket itself is opened through nix: neli's does not hand out a borrowed descriptor, and without
//! one the buffer sizes cannot be forced past the host's limits in safe code.
//!
//! Nothing here knows what the messages mean; nothing panics on what arrives.

mod attribute;
mod batch;
mod error;
mod family;
mod message;
mod socket;

pub use attribute::{Attribute, Attributes, DecodeError, attributes};
pub use batch::{Batch, Body};
pub use error::{Error, Failure, errno_text};
pub use family::resolve_family;
pub use socket::{Protocol, Socket};

/// `nlmsg_flags`, from `linux/netlink.h`. [`Batch::message`] adds `NLM_F_REQUEST` itself, and
/// [`Socket`] decides about `NLM_F_ACK`.
pub mod flags {
    /// `NLM_F_REPLACE`: replace the existing object.
    pub const REPLACE: u16 = 0x100;
    /// `NLM_F_EXCL`: fail when the object exists.
    pub const EXCL: u16 = 0x200;
    /// `NLM_F_CREATE`: create the object when it does not exist.
    pub const CREATE: u16 = 0x400;
    /// `NLM_F_APPEND`: add after the existing ones.
    pub const APPEND: u16 = 0x800;
    /// `NLM_F_DUMP` (`NLM_F_ROOT | NLM_F_MATCH`): answer with the whole table.
    pub const DUMP: u16 = 0x300;
    pub(crate) const REQUEST: u16 = 0x1;
    pub(crate) const ACK: u16 = 0x4;
    pub(crate) const DUMP_INTERRUPTED: u16 = 0x10;
    pub(crate) const CAPPED: u16 = 0x100;
    pub(crate) const ACK_TLVS: u16 = 0x200;
}

/// Size of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// Netlink aligns messages and attributes to four bytes.
pub(crate) const fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}
