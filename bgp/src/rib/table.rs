//! Where the prefixes of a family are kept: numbered entries in chunks that never move, and an index by
//! prefix. The three RIBs share it, so that a prefix is stored and looked up once.

use std::fmt::Debug;
use std::hash::{BuildHasher, Hash};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Slot;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::adj_out::Advertised;
use super::few::Few;
use super::loc::Path;

/// A prefix of one family. IPv4 tables do not pay for the length of IPv6.
pub(super) trait Prefix: Copy + Eq + Hash + Debug + Into<IpNet> {}

impl Prefix for Ipv4Net {}
impl Prefix for Ipv6Net {}

/// What is known of a prefix.
#[derive(Debug)]
pub(super) struct Entry<P> {
    /// Adj-RIB-In of all peers and Loc-RIB: every path with what became of it. The best is the first.
    pub(super) paths: Few<Path>,
    /// Adj-RIB-Out of all peers, ordered by peer and path identifier.
    pub(super) advertised: Few<Advertised>,
    pub(super) prefix: P,
    /// Whether whoever programs routes was told one and has not been told that it is gone.
    pub(super) installed: bool,
}

impl<P> Entry<P> {
    /// Whether nobody would miss it.
    fn is_unused(&self) -> bool {
        !self.installed && matches!((&self.paths, &self.advertised), (Few::None, Few::None))
    }
}

const CHUNK: usize = 512;

/// The entries of a family.
#[derive(Debug)]
pub(super) struct Table<P> {
    chunks: Vec<Vec<Entry<P>>>,
    /// Numbers to be used again.
    vacant: Vec<u32>,
    index: HashTable<u32>,
    hasher: RandomState,
}

impl<P> Default for Table<P> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            vacant: Vec::new(),
            index: HashTable::new(),
            hasher: RandomState::default(),
        }
    }
}

impl<P: Prefix> Table<P> {
    /// How many prefixes there are.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// All numbers in use are below this.
    pub(super) fn end(&self) -> u32 {
        match self.chunks.last() {
            // Numbers are 32 bits: 2^32 entries would take 300 GB before this wraps.
            Some(last) => ((self.chunks.len() - 1) * CHUNK + last.len()) as u32,
            None => 0,
        }
    }

    /// An entry by its number, which came from this table.
    pub(super) fn get(&self, id: u32) -> &Entry<P> {
        &self.chunks[id as usize / CHUNK][id as usize % CHUNK]
    }

    /// An entry by its number, which came from this table.
    pub(super) fn get_mut(&mut self, id: u32) -> &mut Entry<P> {
        &mut self.chunks[id as usize / CHUNK][id as usize % CHUNK]
    }

    /// The number of a prefix.
    pub(super) fn find(&self, prefix: P) -> Option<u32> {
        let hash = self.hasher.hash_one(prefix);
        self.index.find(hash, |&id| self.get(id).prefix == prefix).copied()
    }

    /// The number of a prefix, new if there was none.
    pub(super) fn find_or_insert(&mut self, prefix: P) -> u32 {
        let hash = self.hasher.hash_one(prefix);
        let (chunks, hasher) = (&mut self.chunks, &self.hasher);
        let at = |id: u32| (id as usize / CHUNK, id as usize % CHUNK);
        let slot = self.index.entry(
            hash,
            |&id| chunks[at(id).0][at(id).1].prefix == prefix,
            |&id| hasher.hash_one(chunks[at(id).0][at(id).1].prefix),
        );
        match slot {
            Slot::Occupied(occupied) => *occupied.get(),
            Slot::Vacant(slot) => {
                let entry = Entry { paths: Few::None, advertised: Few::None, prefix, installed: false };
                let id = match self.vacant.pop() {
                    Some(id) => {
                        chunks[at(id).0][at(id).1] = entry;
                        id
                    }
                    None => {
                        if chunks.last().is_none_or(|last| last.len() == CHUNK) {
                            chunks.push(Vec::with_capacity(CHUNK));
                        }
                        let last = chunks.len() - 1;
                        chunks[last].push(entry);
                        (last * CHUNK + chunks[last].len() - 1) as u32
                    }
                };
                slot.insert(id);
                id
            }
        }
    }

    /// Gives an entry's number back if nobody would miss it.
    pub(super) fn release(&mut self, id: u32) {
        if !self.get(id).is_unused() {
            return;
        }
        let hash = self.hasher.hash_one(self.get(id).prefix);
        if let Ok(slot) = self.index.find_entry(hash, |&other| other == id) {
            slot.remove();
            self.vacant.push(id);
        }
    }

    /// All entries in use or vacant, by number.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + use<P> {
        0..self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_small() {
        assert_eq!(size_of::<Path>(), 40);
        assert_eq!(size_of::<Few<Path>>(), 40);
        assert_eq!(size_of::<Advertised>(), 16);
        assert_eq!(size_of::<Few<Advertised>>(), 24);
        assert_eq!(size_of::<Entry<Ipv4Net>>(), 72);
        assert_eq!(size_of::<Entry<Ipv6Net>>(), 88);
    }

    #[test]
    fn numbers_are_used_again() {
        let mut table = Table::<Ipv4Net>::default();
        let net = |index: u32| Ipv4Net::new(index.into(), 32).unwrap();
        let ids: Vec<u32> = (0..2000).map(|index| table.find_or_insert(net(index))).collect();
        assert_eq!((table.len(), table.end()), (2000, 2000));
        assert!((0..2000).all(|index| table.find(net(index)) == Some(ids[index as usize])));
        assert_eq!(table.find_or_insert(net(7)), ids[7]);
        table.release(ids[7]);
        table.release(ids[7]);
        assert_eq!((table.find(net(7)), table.len()), (None, 1999));
        assert_eq!(table.find_or_insert(net(9999)), ids[7]);
        assert_eq!((table.find(net(9999)), table.end()), (Some(ids[7]), 2000));
        table.get_mut(ids[8]).installed = true;
        table.release(ids[8]);
        assert_eq!(table.find(net(8)), Some(ids[8]));
    }
}
