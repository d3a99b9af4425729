//! Linux IPVS: virtual servers and their destinations as plain data, the ordered difference of two
//! tables, and a handle that reads and writes the kernel's table over generic netlink.
//!
//! ```no_run
//! use std::sync::Arc;
//! use ferroute_ipvs::{
//!     Destination, Family, Flags, Handle, Netmask, Options, Protocol, Scheduler, VirtualServer,
//!     VirtualServerKey, diff,
//! };
//!
//! let mut ipvs = Handle::open()?;
//! let actual = ipvs.dump()?;
//! let key = VirtualServerKey::Address { protocol: Protocol::Tcp, address: [10, 96, 0, 10].into(), port: 53 };
//! let options = Options {
//!     scheduler: Scheduler::RR,
//!     flags: Flags::NONE,
//!     timeout: 0,
//!     netmask: Netmask::host(Family::V4),
//! };
//! let destinations = vec![Destination::masquerade([10, 1, 2, 3].into(), 5353, 1)];
//! let mut desired = actual.clone();
//! desired.insert(key, Arc::new(VirtualServer::new(options, destinations)));
//! // Only the server named here is touched; what others put into the table stays.
//! for failure in ipvs.apply(&diff(&actual, &desired, [key]))? {
//!     eprintln!("{failure}");
//! }
//! # Ok::<(), ferroute_ipvs::Error>(())
//! ```
//!
//! A table is changed by differences, never flushed and rebuilt: a deleted destination lingers in
//! the kernel for a minute or two, and every addition searches those that linger.
//!
//! Not here: the sync daemon, persistence engines (a server that has one keeps it only as long as it
//! is not updated), counter resets.

mod diff;
mod error;
mod fingerprint;
mod handle;
mod model;
mod stats;
pub mod wire;

pub use diff::{Change, Mismatch, apply_to, diff, diff_all};
pub use error::{ChangeError, ChangeFailure, Error};
pub use fingerprint::{Fingerprint, Listing, fingerprint};
pub use handle::Handle;
pub use model::{
    Destination, DestinationKey, Family, Flags, Forwarding, InvalidScheduler, Netmask, Options, Protocol,
    Scheduler, Table, Tunnel, TunnelKind, VirtualServer, VirtualServerKey,
};
pub use stats::{DestinationStats, Info, Statistics, Timeouts};
