//! Pods and Namespaces as the rooms see them.

use std::net::IpAddr;
use std::sync::Arc;

pub use ferroute_policy::{Labels, NamedPort};

use super::ObjectKey;

/// `status.phase` of a Pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Accepted, containers not all started; also an absent phase.
    #[default]
    Pending,
    /// Bound to a node and started.
    Running,
    /// Ended well; its address may already belong to another Pod.
    Succeeded,
    /// Ended badly; its address may already belong to another Pod.
    Failed,
    /// The node does not answer.
    Unknown,
}

/// A Pod, trimmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.uid`, for events.
    pub uid: Arc<str>,
    /// `metadata.labels`; pods of one kind share them.
    pub labels: Arc<Labels>,
    /// `status.podIPs` (else `podIP`) that parse.
    pub ips: Vec<IpAddr>,
    /// `status.hostIPs` (else `hostIP`) that parse.
    pub host_ips: Vec<IpAddr>,
    /// `spec.hostNetwork`: shares the node's addresses, so policy cannot select it.
    pub host_network: bool,
    /// `status.phase`.
    pub phase: Phase,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// Named ports of containers and of init containers that keep running. Ports without a name are
    /// documentation.
    pub ports: Vec<NamedPort>,
    /// Condition `Ready` is true.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
}

/// A Namespace, trimmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.labels`.
    pub labels: Arc<Labels>,
}
