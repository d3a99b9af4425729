//! What the kernel counts, and its settings.

use serde::Serialize;

/// Counters of a virtual server or a destination since it was created, and rates per second over
/// the last few seconds. The kernel's estimator updates both every 2 s.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub incoming_packets: u64,
    /// Packets to clients.
    pub outgoing_packets: u64,
    /// Bytes from clients.
    pub incoming_bytes: u64,
    /// Bytes to clients.
    pub outgoing_bytes: u64,
    /// Connections per second.
    pub connections_rate: u64,
    /// Packets per second from clients.
    pub incoming_packets_rate: u64,
    /// Packets per second to clients.
    pub outgoing_packets_rate: u64,
    /// Bytes per second from clients.
    pub incoming_bytes_rate: u64,
    /// Bytes per second to clients.
    pub outgoing_bytes_rate: u64,
}

/// What the kernel knows about the use of a destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DestinationStats {
    /// Connections in an active state (TCP: established).
    pub active_connections: u32,
    /// Other connections in the table: closing, half open, UDP.
    pub inactive_connections: u32,
    /// Persistence entries that lead here.
    pub persistent_connections: u32,
    /// Counters.
    pub statistics: Statistics,
}

/// Idle timeouts of connections, in seconds. Per network namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Timeouts {
    /// Established TCP connections.
    pub tcp: u32,
    /// TCP connections after a FIN.
    pub tcp_fin: u32,
    /// UDP flows.
    pub udp: u32,
}

/// About the kernel's IPVS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Info {
    /// Major, minor, patch.
    pub version: (u8, u8, u8),
    /// Buckets of the connection table.
    pub connection_table_size: u32,
}
