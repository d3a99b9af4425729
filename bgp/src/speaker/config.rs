//! What a speaker is configured to be.

use std::net::SocketAddr;
use std::time::Duration;

use crate::decision;
use crate::message::{Asn, Families, RouterId};
use crate::policy::LocalAddresses;
use crate::session::Restart;

/// A speaker as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeakerConfig {
    /// AS of this node.
    pub asn: Asn,
    /// Identifier of this node: unique within its AS, not zero.
    pub router_id: RouterId,
    /// Cluster that this node reflects routes in; its own identifier if `None` (RFC 4456).
    pub cluster_id: Option<RouterId>,
    /// How paths are compared, and how many share traffic.
    pub decision: decision::Options,
    /// Addresses to listen on; none to dial only.
    pub listen: Vec<SocketAddr>,
    /// Addresses of this node, as next hops of the family that a session does not run over.
    pub addresses: LocalAddresses,
    /// Name of this host, shown in peers' summaries.
    pub host: Option<String>,
    /// Graceful restart of this node (RFC 4724); peers forget its routes at once without.
    pub restart: Option<RestartConfig>,
    /// How long routes of a peer that came back may wait for its End-of-RIB.
    pub stale_time: Duration,
}

/// Graceful restart of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartConfig {
    /// Seconds that peers keep routes and wait, at most 4095.
    pub time: u16,
    /// Families that the kernel goes on forwarding while this process is away.
    pub forwarding: Families,
    /// This process takes over from a former one, and the kernel still has its routes.
    pub restarted: bool,
    /// Longest wait for the routes of peers before this node says and does what follows from them.
    pub deferral: Duration,
}

impl SpeakerConfig {
    /// A speaker that only dials, with what is usual.
    pub fn new(asn: Asn, router_id: RouterId) -> Self {
        Self {
            asn,
            router_id,
            cluster_id: None,
            decision: decision::Options::default(),
            listen: Vec::new(),
            addresses: LocalAddresses::default(),
            host: None,
            restart: None,
            stale_time: Duration::from_secs(180),
        }
    }

    pub(super) fn check(&self) -> Result<(), StartError> {
        if self.asn.0 == 0 {
            return Err(StartError::ZeroAsn);
        }
        if u32::from(self.router_id) == 0 {
            return Err(StartError::ZeroRouterId);
        }
        match self.restart {
            Some(RestartConfig { time, .. }) if !(1..=4095).contains(&time) => {
                Err(StartError::RestartTime(time))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn promise(&self) -> Option<Restart> {
        self.restart.map(|restart| Restart { time: restart.time, forwarding: restart.forwarding })
    }
}

/// Why a speaker cannot be. What concerns a single address or peer is in their status instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// AS 0.
    #[error("AS 0 cannot be used (RFC 7607): give this node an AS number")]
    ZeroAsn,
    /// 0.0.0.0.
    #[error(
        "router id 0.0.0.0 cannot be used: give this node one, as an IPv4 address or derived from its name"
    )]
    ZeroRouterId,
    /// The field has twelve bits.
    #[error("a restart time of {0} s does not fit: 1 to 4095")]
    RestartTime(u16),
}
