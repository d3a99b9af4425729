//! Secrets that a room asked for by name. No other is ever read, and no value is ever shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use super::{Cluster, Kind, ObjectKey};

/// The values of a Secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret {
    /// By key; `None` where the value is no base64.
    values: BTreeMap<Box<str>, Option<Box<[u8]>>>,
}

impl Secret {
    /// A Secret of these values.
    pub fn new(values: BTreeMap<Box<str>, Option<Box<[u8]>>>) -> Self {
        Self { values }
    }

    /// The value of a key.
    ///
    /// # Errors
    ///
    /// That it has none, or that it is no base64.
    pub fn value(&self, key: &str) -> Result<&[u8], String> {
        match self.values.get(key) {
            Some(Some(value)) => Ok(value),
            Some(None) => Err(format!("its key {key} is no base64")),
            None => {
                let keys: Vec<&str> = self.values.keys().map(AsRef::as_ref).collect();
                Err(format!("it has no key {key}, only [{}]", keys.join(", ")))
            }
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

/// What is known of a Secret that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// This is it.
    Present(Arc<Secret>),
    /// There is none.
    Missing,
    /// It cannot be read, and nothing is known of it.
    Unreadable(Arc<str>),
}

/// All that is known of Secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Secrets {
    /// The namespace this process may read Secrets of: that of its pod, else of its kubeconfig, else `default`.
    pub namespace: Arc<str>,
    /// Those asked for that were heard of.
    pub known: BTreeMap<ObjectKey, Knowledge>,
    /// Those that are not known do not exist.
    pub complete: bool,
}

impl Secrets {
    /// What is known of one; `None` before the first answer.
    pub fn get(&self, key: &ObjectKey) -> Option<Knowledge> {
        self.known.get(key).cloned().or_else(|| self.complete.then_some(Knowledge::Missing))
    }
}

impl Cluster {
    /// Says which Secrets are to be watched from now on; others are forgotten.
    pub fn want_secrets(&self, wanted: BTreeSet<ObjectKey>) {
        self.inner.wanted_secrets.send_if_modified(|before| {
            let changed = *before != wanted;
            *before = wanted;
            changed
        });
    }

    /// The Secrets that are wanted, as that changes.
    pub(super) fn wanted_secrets(&self) -> watch::Receiver<BTreeSet<ObjectKey>> {
        self.inner.wanted_secrets.subscribe()
    }

    /// Says where Secrets are read.
    pub(super) fn set_namespace(&self, namespace: &str) {
        self.read().secrets.namespace = namespace.into();
    }

    /// Says that all Secrets there are were applied.
    pub(super) fn set_secrets_complete(&self) {
        self.change_secrets(|secrets| !std::mem::replace(&mut secrets.complete, true));
    }

    /// Stores what is known of a Secret. One that cannot be read keeps what was known.
    pub fn apply_secret(&self, key: ObjectKey, now: Knowledge) {
        self.change_secrets(|secrets| {
            let before = secrets.known.get(&key);
            let settled = matches!(before, Some(Knowledge::Present(_) | Knowledge::Missing));
            if before == Some(&now) || (settled && matches!(now, Knowledge::Unreadable(_))) {
                return false;
            }
            secrets.known.insert(key, now);
            true
        });
    }

    /// Forgets a Secret.
    pub fn forget_secret(&self, key: &ObjectKey) {
        self.change_secrets(|secrets| secrets.known.remove(key).is_some());
    }

    fn change_secrets(&self, change: impl FnOnce(&mut super::Secrets) -> bool) {
        let changed = change(&mut self.read().secrets);
        if changed {
            self.mark(Kind::Secret, |dirty| dirty.secrets = true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn secret(value: &str) -> Knowledge {
        let values = BTreeMap::from([("password".into(), Some(value.as_bytes().into()))]);
        Knowledge::Present(Arc::new(Secret::new(values)))
    }

    #[test]
    fn only_what_differs_wakes_and_trouble_hides_nothing_known() {
        let cluster = Cluster::new();
        let subscription = cluster.subscribe_to(&[Kind::Secret]);
        let woken = || subscription.wait(Duration::ZERO, Duration::ZERO).secrets;
        let key = ObjectKey::new("kube-system", "tor");
        let known = || cluster.read().secrets.get(&key);
        assert_eq!(known(), None);
        let trouble = Knowledge::Unreadable("forbidden".into());
        cluster.apply_secret(key.clone(), trouble.clone());
        assert_eq!((woken(), known()), (true, Some(trouble.clone())));
        for (now, changes) in [(secret("a"), true), (secret("a"), false), (secret("b"), true)] {
            cluster.apply_secret(key.clone(), now.clone());
            assert_eq!((woken(), known()), (changes, Some(now)));
        }
        cluster.apply_secret(key.clone(), trouble);
        assert_eq!((woken(), known()), (false, Some(secret("b"))));
        cluster.apply_secret(key.clone(), Knowledge::Missing);
        assert_eq!((woken(), known()), (true, Some(Knowledge::Missing)));
        cluster.forget_secret(&key);
        assert_eq!((woken(), known()), (true, None));
        cluster.set_secrets_complete();
        assert_eq!((woken(), known()), (true, Some(Knowledge::Missing)));
    }

    #[test]
    fn no_value_is_shown_and_a_missing_one_names_the_others() {
        let values = BTreeMap::from([
            ("password".into(), Some(b"hunter2".as_slice().into())),
            ("broken".into(), None),
        ]);
        let secret = Secret::new(values);
        assert_eq!(format!("{secret:?}"), "{\"broken\", \"password\"}");
        assert_eq!(secret.value("password"), Ok(b"hunter2".as_slice()));
        assert_eq!(secret.value("broken").unwrap_err(), "its key broken is no base64");
        assert_eq!(secret.value("other").unwrap_err(), "it has no key other, only [broken, password]");
    }
}
