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
    /// What the Service room reads; `node` is the Node this process runs for.
    pub fn service_proxy(node: impl Into<Arc<str>>) -> Self {
        Self {
            kinds: BTreeSet::from([Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr]),
            only_node: Some(node.into()),
        }
    }
}
