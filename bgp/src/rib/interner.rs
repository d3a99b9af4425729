//! Equal attribute sets are kept once.

use std::hash::BuildHasher;
use std::mem;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::message::{Attributes, Community, ExtendedCommunity, LargeCommunity, RouterId, UnknownAttribute};

/// Sets in use, and some that no longer are: those are dropped when they could be half of all.
#[derive(Debug, Default)]
pub(super) struct Interner {
    sets: HashTable<Arc<Attributes>>,
    hasher: RandomState,
    /// Estimated memory of all sets.
    bytes: usize,
    /// Uses that ended since the last sweep.
    released: usize,
    /// Size at which the next sweep is due.
    sweep_at: usize,
}

/// No sweep pays below this size.
const SMALL: usize = 64;

impl Interner {
    /// The set equal to this one that is already known, else this.
    pub(super) fn intern(&mut self, attributes: Arc<Attributes>) -> Arc<Attributes> {
        let hash = self.hasher.hash_one(&*attributes);
        if let Some(known) = self.sets.find(hash, |known| **known == *attributes) {
            return Arc::clone(known);
        }
        if self.sets.len() >= self.sweep_at.max(SMALL) {
            self.sweep();
        }
        self.bytes += weight(&attributes);
        let hasher = &self.hasher;
        self.sets.insert_unique(hash, Arc::clone(&attributes), |set| hasher.hash_one(&**set));
        attributes
    }

    /// Notes that a use ended.
    pub(super) fn release(&mut self) {
        self.released += 1;
        if self.released > SMALL + self.sets.len() {
            self.sweep();
        }
    }

    /// Drops what nobody uses.
    pub(super) fn sweep(&mut self) {
        let bytes = &mut self.bytes;
        self.sets.retain(|set| {
            let used = Arc::strong_count(set) > 1;
            if !used {
                *bytes -= weight(set);
            }
            used
        });
        self.released = 0;
        self.sweep_at = self.sets.len() * 2;
        if self.sets.capacity() > SMALL + self.sets.len() * 4 {
            let hasher = &self.hasher;
            self.sets.shrink_to(self.sweep_at, |set| hasher.hash_one(&**set));
        }
    }

    /// Estimated memory of all sets, in bytes.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Estimated memory of a set, in bytes.
fn weight(attributes: &Attributes) -> usize {
    let unknown: usize = attributes.unknown.iter().map(|unknown| unknown.value.len()).sum();
    mem::size_of::<Attributes>()
        + 2 * mem::size_of::<usize>()
        + attributes.as_path.segments().map(|segment| 2 + 4 * segment.len()).sum::<usize>()
        + attributes.communities.len() * mem::size_of::<Community>()
        + attributes.cluster_list.len() * mem::size_of::<RouterId>()
        + attributes.extended_communities.len() * mem::size_of::<ExtendedCommunity>()
        + attributes.large_communities.len() * mem::size_of::<LargeCommunity>()
        + attributes.unknown.len() * mem::size_of::<UnknownAttribute>()
        + unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn med(med: u32) -> Arc<Attributes> {
        Arc::new(Attributes { med: Some(med), ..Attributes::default() })
    }

    #[test]
    fn keeps_equal_sets_once_and_forgets_unused_ones() {
        let mut interner = Interner::default();
        let first = interner.intern(med(1));
        assert!(Arc::ptr_eq(&first, &interner.intern(med(1))));
        assert_eq!((interner.sets.len(), interner.bytes()), (1, weight(&first)));
        for value in 0..10_000 {
            interner.intern(med(value));
            assert!(interner.sets.len() <= 2 * SMALL, "garbage is bounded by what is in use");
        }
        interner.sweep();
        assert_eq!((interner.sets.len(), interner.bytes()), (1, weight(&first)));
        assert!(Arc::ptr_eq(&first, &interner.intern(med(1))));
        drop(first);
        for _ in 0..=2 * SMALL {
            interner.release();
        }
        assert_eq!((interner.sets.len(), interner.bytes()), (0, 0));
    }
}
