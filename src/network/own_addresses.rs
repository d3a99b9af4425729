//! This node's addresses for whoever else needs them: the room that chose them puts them here.

use std::sync::{Arc, Mutex};

use super::node_address::Addresses;
use crate::cluster::Waker;
use crate::metrics::lock;

/// The addresses chosen last. Clones are the same.
#[derive(Clone, Default)]
pub struct OwnAddresses(Arc<Mutex<Content>>);

#[derive(Default)]
struct Content {
    chosen: Option<Addresses>,
    followers: Vec<Waker>,
}

impl OwnAddresses {
    /// Wakes this room whenever another address is chosen.
    pub fn follow(&self, waker: Waker) {
        lock(&self.0).followers.push(waker);
    }

    /// What was chosen last; `None` when nothing was looked for yet.
    pub fn get(&self) -> Option<Addresses> {
        lock(&self.0).chosen.clone()
    }

    pub(super) fn put(&self, chosen: Addresses) {
        let mut content = lock(&self.0);
        if content.chosen.as_ref() != Some(&chosen) {
            content.chosen = Some(chosen);
            content.followers.iter().for_each(Waker::wake);
        }
    }
}
