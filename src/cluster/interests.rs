//! What the rooms want to know about.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Kind;

/// The kinds to watch, and how narrowly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interests {
    /// Kinds to watch. Others are never asked for.
    pub kinds: BTreeSet<Kind>,
    /// Watch only this Node and not all of them: their heartbeats are most of the traffic of a
    /// big, quiet cluster.
    pub only_node: Option<Arc<str>>,
}

impl Interests {
    /// What the Service room reads. All Nodes: an address of another one must never be a VIP here.
    pub fn service_proxy() -> Self {
        Self { kinds: BTreeSet::from(Self::SERVICE_PROXY), only_node: None }
    }

    /// Kinds that the Service room reads.
    pub const SERVICE_PROXY: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr];

    /// Kinds that the policy room reads. Other Nodes are not needed: Pods tell their own and, on
    /// the host's network, their node's addresses.
    pub const NETWORK_POLICY: [Kind; 4] = [Kind::Pod, Kind::Namespace, Kind::NetworkPolicy, Kind::Node];

    /// What the policy room reads; `node` is the Node this process runs for.
    pub fn network_policy(node: impl Into<Arc<str>>) -> Self {
        Self { kinds: BTreeSet::from(Self::NETWORK_POLICY), only_node: Some(node.into()) }
    }

    /// Kinds without which the route room decides nothing: its own Node and those of its peers, and Services
    /// with what serves them.
    pub const ROUTES: [Kind; 4] = Self::SERVICE_PROXY;

    /// The same, with the Secrets that its peers name: passwords may come later.
    pub const ROUTES_AND_SECRETS: [Kind; 5] =
        [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr, Kind::Secret];

    /// What the route room reads.
    pub fn routes() -> Self {
        Self { kinds: BTreeSet::from(Self::ROUTES_AND_SECRETS), only_node: None }
    }

    /// The kinds of which everything there is gets listed. Secrets are not: they are watched one by one, once
    /// a peer names them.
    pub fn listed_kinds(&self) -> Vec<Kind> {
        self.kinds.iter().copied().filter(|kind| *kind != Kind::Secret).collect()
    }

    /// What both together read.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.kinds.extend(other.kinds);
        if self.only_node != other.only_node {
            self.only_node = None;
        }
        self
    }
}
