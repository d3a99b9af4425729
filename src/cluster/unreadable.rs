//! Objects that cannot be parsed and of which this process never knew a good state.
//!
//! One whose last good state is known is no trouble: that state stays in force. After a restart there
//! is none, and what the kernel holds for such an object must not be taken for a leftover.

use std::fmt;

use super::{Cluster, Kind, ObjectKey, ServiceKey};

/// What cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unreadable {
    /// Its kind; `None` for a file or folder of manifests, which may hold objects of any.
    pub kind: Option<Kind>,
    /// Its key, or the path. The name is empty where it cannot be read either.
    pub key: ObjectKey,
}

impl Unreadable {
    /// An object.
    pub fn object(kind: Kind, key: ObjectKey) -> Self {
        Self { kind: Some(kind), key }
    }

    /// A file or folder of manifests, named by its path.
    pub fn manifest(path: ObjectKey) -> Self {
        Self { kind: None, key: path }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.map_or("Manifest", Kind::name);
        if self.key.name.is_empty() {
            write!(f, "{kind} without a name")
        } else {
            write!(f, "{kind} {}", self.key)
        }
    }
}

impl Cluster {
    /// Notes that something cannot be read and has no last good state. `service` is the only Service
    /// whose endpoints it may tell, where that is known.
    pub fn set_unreadable(&self, what: Unreadable, service: Option<ServiceKey>) {
        let kind = what.kind;
        if self.read().unreadable.insert(what, service.clone()) != Some(service) {
            self.mark_unreadable(kind);
        }
    }

    /// Notes that something can be read now, or is gone.
    pub fn set_readable(&self, what: &Unreadable) {
        if self.read().unreadable.remove(what).is_some() {
            self.mark_unreadable(what.kind);
        }
    }

    fn mark_unreadable(&self, kind: Option<Kind>) {
        let kinds = kind.as_ref().map_or(&Kind::ALL[..], std::slice::from_ref);
        for kind in kinds {
            self.mark(*kind, |dirty| dirty.unreadable = true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_reads_the_kind_is_told_once_and_of_files_everybody() {
        let cluster = Cluster::new();
        let services = cluster.subscribe_to(&[Kind::Service]);
        let pods = cluster.subscribe_to(&[Kind::Pod]);
        let told = || [&services, &pods].map(|who| who.wait(Duration::ZERO, Duration::ZERO).unreadable);
        let object = Unreadable::object(Kind::Service, ObjectKey::new("shop", "web"));
        cluster.set_unreadable(object.clone(), None);
        assert_eq!(told(), [true, false]);
        cluster.set_unreadable(object.clone(), None);
        assert_eq!(told(), [false, false]);
        cluster.set_readable(&object);
        cluster.set_readable(&object);
        assert_eq!(told(), [true, false]);
        let file = Unreadable::manifest(ObjectKey::new("", "a.yaml"));
        cluster.set_unreadable(file.clone(), None);
        assert_eq!(told(), [true, true]);
        assert_eq!([object.to_string(), file.to_string()], ["Service shop/web", "Manifest a.yaml"]);
    }
}
