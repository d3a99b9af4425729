//! Where the cluster's state comes from, and the task that keeps it coming.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::access::{self, Access};
use super::{Cluster, Kind, file, watch};
use crate::report::Reporter;

/// What to read.
#[derive(Clone, Debug)]
pub enum Source {
    /// An API server.
    Api(Access),
    /// A folder of YAML and JSON files (`--manifests`).
    Manifests(PathBuf),
}

/// What the rooms want to know about.
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

/// A configuration that cannot work; retrying would not help.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API access as configured.
    #[error(transparent)]
    Access(#[from] access::Error),
    /// The folder of manifests.
    #[error(transparent)]
    Folder(#[from] file::Error),
}

/// Keeps `cluster` true to `source` for ever. An API server that is away is waited for, and the
/// last state stays; only a wrong configuration returns.
pub async fn run(
    source: Source,
    cluster: Cluster,
    interests: Interests,
    reporter: Reporter,
) -> Result<(), Error> {
    match source {
        Source::Api(access) => {
            let client = access.client()?;
            let watches = watch::watch_all(&client, &cluster, &interests, &reporter);
            futures::future::join(watches, reporter.post_events(client.clone())).await;
            Ok(())
        }
        Source::Manifests(folder) => Ok(file::watch(folder, cluster, &interests, &reporter).await?),
    }
}
