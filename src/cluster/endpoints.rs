//! EndpointSlices as the rooms see them.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use super::service::Protocol;

/// One port of an EndpointSlice. Ports without a number are left out ("all ports" is not served).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    /// Port name; empty when absent.
    pub name: Arc<str>,
    /// Transport protocol (default TCP).
    pub protocol: Protocol,
    /// Target port on the endpoint.
    pub port: NonZeroU16,
}

/// Where an endpoint's traffic should come from (`endpoints[].hints`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    /// `forZones[].name`.
    pub zones: Vec<Arc<str>>,
    /// `forNodes[].name`.
    pub nodes: Vec<Arc<str>>,
}

/// One endpoint address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address; of the slice's family.
    pub address: IpAddr,
    /// `conditions.ready`; nil means true.
    pub ready: bool,
    /// `conditions.serving`; nil means the same as ready.
    pub serving: bool,
    /// `conditions.terminating`; nil means false.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints`, shared between endpoints with equal ones.
    pub hints: Option<Arc<Hints>>,
}

/// An EndpointSlice of address type IPv4 or IPv6.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// The ports; shared between slices with equal ones.
    pub ports: Arc<[SlicePort]>,
    /// The endpoints that parse, in the order written.
    pub endpoints: Vec<Endpoint>,
}
