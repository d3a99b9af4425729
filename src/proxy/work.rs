//! What the room cost the kernel so far: exact message counts and the dear parts' time.

use std::time::{Duration, Instant};

/// Kernel tables the room speaks netlink to, in the order of [`Work::messages`].
pub const TABLES: [&str; 4] = ["ipvs", "ipset", "route", "conntrack"];

/// Netlink messages sent about one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Messages {
    /// Those that write.
    pub written: u64,
    /// Those that ask: one dump is one message, whatever its answer's length.
    pub asked: u64,
}

impl Messages {
    /// From a socket's counters: all messages, and how many of them only read.
    pub fn of(sent: u64, asked: u64) -> Self {
        Self { written: sent.saturating_sub(asked), asked }
    }
}

/// Totals since the room was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Netlink messages by table, see [`TABLES`].
    pub messages: [Messages; TABLES.len()],
    /// Audits of virtual servers, sets and routes.
    pub audits: u64,
    /// Time of these audits.
    pub auditing: Duration,
    /// Time spent reading the kernel's tables when the room began.
    pub adopting: Duration,
    /// When the API server's own Service was served with all its rules, if it was there at the start.
    pub api_usable: Option<Instant>,
    /// Time spent in iptables programs.
    pub rules: Duration,
    /// Changes of the cluster that a pass brought into the kernel.
    pub changes: u64,
    /// Their time from the decoding of the oldest to the kernel's last acknowledgement.
    pub latency: Duration,
}
