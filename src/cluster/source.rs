//! Where the cluster's state comes from, and the task that keeps it coming.

use std::path::PathBuf;

use super::access::{self, Access};
use super::interests::Interests;
use super::{Cluster, file, watch};
use crate::report::Reporter;

/// What to read.
#[derive(Clone, Debug)]
pub enum Source {
    /// An API server.
    Api(Access),
    /// A folder of YAML and JSON files (`--manifests`).
    Manifests(PathBuf),
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
            cluster.set_namespace(client.default_namespace());
            let watches = watch::watch_all(&client, &cluster, &interests, &reporter);
            futures::future::join(watches, reporter.post_events(client.clone())).await;
            Ok(())
        }
        Source::Manifests(folder) => Ok(file::watch(folder, cluster, &interests, &reporter).await?),
    }
}
