//! Sets of entry numbers: one bit for each prefix of a table. What a peer sent, what it was sent, and
//! what it has still to be told are such sets; they cost a bit where they are dense and nothing where they are
//! empty, and grow with the table, not with the changes that pile up for a slow peer.

const WORDS: usize = 64;
const BITS: u32 = WORDS as u32 * u64::BITS;

#[derive(Debug, Clone)]
struct Chunk {
    words: [u64; WORDS],
    count: u32,
}

/// A set of numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct IdSet {
    chunks: Vec<Option<Box<Chunk>>>,
    count: usize,
}

impl IdSet {
    pub(super) const fn len(&self) -> usize {
        self.count
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a number; `false` if it was there.
    pub(super) fn insert(&mut self, id: u32) -> bool {
        let (chunk, word, bit) = place(id);
        if self.chunks.len() <= chunk {
            self.chunks.resize(chunk + 1, None);
        }
        let chunk = self.chunks[chunk].get_or_insert_with(|| Box::new(Chunk { words: [0; WORDS], count: 0 }));
        let added = chunk.words[word] & bit == 0;
        chunk.words[word] |= bit;
        chunk.count += u32::from(added);
        self.count += usize::from(added);
        added
    }

    /// Removes a number; `false` if it was not there.
    pub(super) fn remove(&mut self, id: u32) -> bool {
        let (index, word, bit) = place(id);
        let Some(slot) = self.chunks.get_mut(index) else { return false };
        let Some(chunk) = slot else { return false };
        if chunk.words[word] & bit == 0 {
            return false;
        }
        chunk.words[word] &= !bit;
        chunk.count -= 1;
        if chunk.count == 0 {
            *slot = None;
        }
        self.count -= 1;
        true
    }

    #[cfg(test)]
    pub(super) fn contains(&self, id: u32) -> bool {
        let (chunk, word, bit) = place(id);
        matches!(self.chunks.get(chunk), Some(Some(chunk)) if chunk.words[word] & bit != 0)
    }

    /// The lowest number not below `from`: numbers may come and go between calls.
    pub(super) fn next_from(&self, from: u32) -> Option<u32> {
        let (mut index, mut word, bit) = place(from);
        let mut mask = !(bit - 1);
        while index < self.chunks.len() {
            if let Some(chunk) = &self.chunks[index] {
                while word < WORDS {
                    let found = chunk.words[word] & mask;
                    if found != 0 {
                        let low = word as u32 * u64::BITS + found.trailing_zeros();
                        return Some(index as u32 * BITS + low);
                    }
                    mask = u64::MAX;
                    word += 1;
                }
            }
            (index, word, mask) = (index + 1, 0, u64::MAX);
        }
        None
    }

    /// The numbers, rising.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let mut next = self.next_from(0);
        std::iter::from_fn(move || {
            let id = next?;
            next = id.checked_add(1).and_then(|id| self.next_from(id));
            Some(id)
        })
    }

    /// Adds all numbers below `end`.
    pub(super) fn fill(&mut self, end: u32) {
        for id in 0..end {
            self.insert(id);
        }
    }
}

const fn place(id: u32) -> (usize, usize, u64) {
    ((id / BITS) as usize, (id % BITS / u64::BITS) as usize, 1 << (id % u64::BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_tree(changes in prop::collection::vec((0_u32..20_000, any::<bool>()), 0..300), from in 0_u32..20_000) {
            let (mut set, mut model) = (IdSet::default(), BTreeSet::new());
            for (id, add) in changes {
                if add {
                    prop_assert_eq!(set.insert(id), model.insert(id));
                } else {
                    prop_assert_eq!(set.remove(id), model.remove(&id));
                }
            }
            prop_assert_eq!((set.len(), set.is_empty()), (model.len(), model.is_empty()));
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert_eq!(set.next_from(from), model.range(from..).next().copied());
            prop_assert_eq!(set.contains(from), model.contains(&from));
            // Chunks without a bit are given back.
            for id in model {
                set.remove(id);
            }
            prop_assert!(set.chunks.iter().all(Option::is_none));
        }
    }

    #[test]
    fn fills() {
        let mut set = IdSet::default();
        set.insert(5000);
        set.fill(10_000);
        assert_eq!(set.len(), 10_000);
        assert_eq!(set.next_from(9999), Some(9999));
        assert_eq!(set.next_from(10_000), None);
        assert_eq!(set.next_from(u32::MAX), None);
    }
}
