//! Watches of single Secrets, while they are wanted: a name at a time, so that the account needs no right to
//! any other (a Role with `resourceNames`).

use std::collections::BTreeMap;

use futures::StreamExt;
use kube::runtime::watcher::{self, Config, Event};
use kube::{Api, Client};
use tokio::task::{AbortHandle, JoinSet};

use super::super::access::WATCH_SECONDS;
use super::super::secret::Knowledge;
use super::super::trouble::describe;
use super::super::wire::{ApiKind, Item, SecretObject, Version};
use super::super::{Cluster, Kind, ObjectKey, decode};
use super::Outage;

/// Watches the Secrets that are wanted, for ever.
pub async fn watch_wanted(client: &Client, cluster: &Cluster) {
    let mut wanted = cluster.wanted_secrets();
    // Ends them all when it is dropped.
    let mut tasks = JoinSet::new();
    let mut running: BTreeMap<ObjectKey, AbortHandle> = BTreeMap::new();
    loop {
        let now = wanted.borrow_and_update().clone();
        running.retain(|key, task| {
            let stays = now.contains(key);
            if !stays {
                task.abort();
                cluster.forget_secret(key);
            }
            stays
        });
        for key in now {
            let begin = || tasks.spawn(watch(client.clone(), cluster.clone(), key.clone()));
            running.entry(key.clone()).or_insert_with(begin);
        }
        while tasks.try_join_next().is_some() {}
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

async fn watch(client: Client, cluster: Cluster, key: ObjectKey) {
    let version = Version(SecretObject::VERSIONS.first().copied().unwrap_or("v1"));
    let api = Api::<Item<SecretObject>>::namespaced_with(client, &key.namespace, &version);
    let config = Config::default().timeout(WATCH_SECONDS).fields(&format!("metadata.name={}", key.name));
    let mut outage = Outage::default();
    loop {
        let mut listed = None;
        let mut events = watcher::watcher(api.clone(), config.clone()).boxed();
        while let Some(event) = events.next().await {
            let knowledge = match event {
                Ok(Event::Init) => {
                    listed = None;
                    continue;
                }
                Ok(Event::InitApply(item)) => {
                    listed = Some(decode::secret::secret(&item));
                    continue;
                }
                Ok(Event::InitDone) => listed.take().unwrap_or(Knowledge::Missing),
                Ok(Event::Apply(item)) => decode::secret::secret(&item),
                Ok(Event::Delete(_)) => Knowledge::Missing,
                Err(error) => {
                    let why = why(&error, &key);
                    outage.say(Kind::Secret, &why);
                    cluster.apply_secret(key.clone(), Knowledge::Unreadable(why.into()));
                    tokio::time::sleep(outage.delay()).await;
                    continue;
                }
            };
            outage.over(Kind::Secret);
            cluster.apply_secret(key.clone(), knowledge);
        }
    }
}

fn why(error: &watcher::Error, key: &ObjectKey) -> String {
    use kube::Error::Api;
    use watcher::Error::{InitialListFailed, WatchStartFailed};
    match error {
        InitialListFailed(Api(status)) | WatchStartFailed(Api(status)) if status.code == 403 => format!(
            "the API server does not allow it: add {} to resourceNames of the Role in daemonset/bgp-passwords.yaml \
             and apply that",
            key.name
        ),
        error => describe(error),
    }
}
