//! Which container holds which address, as far as ADD calls told since the daemon started.
//!
//! A DEL may come late, twice, or for a sandbox that has already been replaced by another one of the
//! same pod: only the holder of an address can give it back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crate::cluster::ObjectKey;
use crate::cni::protocol::Identity;

/// More attachments than any node has; beyond, a DEL goes by what it says itself.
const MOST: usize = 8192;

/// One interface of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Name of the network.
    pub network: String,
    /// The pod.
    pub pod: ObjectKey,
    /// Its uid, where the runtime gave one.
    pub uid: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// All attachments known.
#[derive(Debug, Default)]
pub struct Attachments {
    held: BTreeMap<Identity, Held>,
    holders: HashMap<IpAddr, Identity>,
}

impl Attachments {
    /// An ADD: these addresses are this container's now, whoever had them.
    pub fn begin(&mut self, identity: Identity, held: Held) {
        self.end(&identity, None);
        if self.held.len() >= MOST {
            return;
        }
        for address in &held.addresses {
            self.holders.insert(*address, identity.clone());
        }
        self.held.insert(identity, held);
    }

    /// A DEL: the pod with the addresses that are free now. `told` is what the call itself says, for
    /// a container of which nothing is known (the daemon has restarted).
    pub fn end(&mut self, identity: &Identity, told: Option<Held>) -> Option<Held> {
        let gone = match self.held.remove(identity) {
            Some(mut held) => {
                held.addresses.retain(|address| self.holders.get(address) == Some(identity));
                for address in &held.addresses {
                    self.holders.remove(address);
                }
                held
            }
            None => {
                let mut told = told?;
                told.addresses.retain(|address| !self.holders.contains_key(address));
                told
            }
        };
        (!gone.addresses.is_empty()).then_some(gone)
    }

    /// A GC: what of this network is not valid any more.
    pub fn retain(&mut self, network: &str, valid: &[Identity]) -> Vec<Held> {
        let valid: BTreeSet<&Identity> = valid.iter().collect();
        let stale: Vec<Identity> = self
            .held
            .iter()
            .filter(|(identity, held)| held.network == network && !valid.contains(identity))
            .map(|(identity, _)| identity.clone())
            .collect();
        stale.iter().filter_map(|identity| self.end(identity, None)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(container: &str) -> Identity {
        Identity { container: container.to_owned(), interface: "eth0".to_owned() }
    }

    fn held(pod: &str, addresses: &[&str]) -> Held {
        Held {
            network: "mynet".to_owned(),
            pod: ObjectKey::new("shop", pod),
            uid: None,
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn only_the_holder_gives_an_address_back() {
        let mut all = Attachments::default();
        all.begin(id("a"), held("p", &["10.0.0.1", "fd00::1"]));
        // Another sandbox of the same pod has taken one of the addresses.
        all.begin(id("b"), held("p", &["10.0.0.1"]));
        assert_eq!(all.end(&id("a"), None), Some(held("p", &["fd00::1"])));
        assert_eq!(all.end(&id("a"), None), None, "a second DEL");
        assert_eq!(all.end(&id("b"), None), Some(held("p", &["10.0.0.1"])));
        assert!(all.held.is_empty() && all.holders.is_empty());
    }

    #[test]
    fn a_repeated_add_replaces() {
        let mut all = Attachments::default();
        all.begin(id("a"), held("p", &["10.0.0.1"]));
        all.begin(id("a"), held("p", &["10.0.0.2"]));
        assert_eq!(all.end(&id("a"), None), Some(held("p", &["10.0.0.2"])));
        assert!(all.holders.is_empty());
    }

    #[test]
    fn after_a_restart_a_del_goes_by_its_own_words() {
        let mut all = Attachments::default();
        assert_eq!(all.end(&id("old"), None), None);
        assert_eq!(all.end(&id("old"), Some(held("p", &["10.0.0.1"]))), Some(held("p", &["10.0.0.1"])));
        all.begin(id("new"), held("q", &["10.0.0.1"]));
        assert_eq!(all.end(&id("old"), Some(held("p", &["10.0.0.1"]))), None, "it has a new holder");
    }

    #[test]
    fn gc_forgets_what_is_not_valid_of_its_network() {
        let mut all = Attachments::default();
        all.begin(id("a"), held("p", &["10.0.0.1"]));
        all.begin(id("b"), held("q", &["10.0.0.2"]));
        all.begin(id("c"), Held { network: "other".to_owned(), ..held("r", &["10.0.0.3"]) });
        assert_eq!(all.retain("mynet", &[id("b")]), [held("p", &["10.0.0.1"])]);
        assert_eq!(all.held.len(), 2);
    }

    #[test]
    fn memory_has_a_bound() {
        let mut all = Attachments::default();
        for number in 0..MOST + 10 {
            all.begin(id(&number.to_string()), held("p", &["10.0.0.1"]));
        }
        assert_eq!((all.held.len(), all.holders.len()), (MOST, 1));
    }
}
