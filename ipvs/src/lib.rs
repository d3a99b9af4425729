//! Linux IPVS: virtual servers and their destinations as plain data, the ordered difference of two
//! tables, and a handle that reads and writes the kernel's table over generic netlink.

mod diff;
mod model;

pub use diff::{Change, Mismatch, apply_to, diff, diff_all};
pub use model::{
    Destination, DestinationKey, Family, Flags, Forwarding, InvalidScheduler, Netmask, Options, Protocol,
    Scheduler, Table, Tunnel, TunnelKind, VirtualServer, VirtualServerKey,
};
