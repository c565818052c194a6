//! An index from keys to slab places: open addressing, linear probing, deletion by shifting back (no tombstones, so no
//! rehash pauses). It stores a hash and an index; the caller compares the key, which lives in the slab.

use alloc::{vec, vec::Vec};

/// Each slot: the hash in the high half, the index plus one in the low half; zero is empty.
#[derive(Debug)]
pub struct Table {
    slots: Vec<u64>,
    mask: usize,
    len: usize,
}

impl Table {
    /// Room for `capacity` entries at a load of at most one half. Pages are touched as they are used.
    pub fn new(capacity: usize) -> Table {
        let slots = (capacity.max(8) * 2).next_power_of_two();
        Table { slots: vec![0; slots], mask: slots - 1, len: 0 }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Asks for the slot where a search for `hash` begins, so that it is in the cache when the search comes.
    #[inline]
    pub fn read_ahead(&self, hash: u32) {
        replayer_prefetch::line(&self.slots[hash as usize & self.mask]);
    }

    /// The index of the first entry with `hash`, whose key nobody has compared: good enough to read ahead.
    #[inline]
    pub fn guess(&self, hash: u32) -> Option<u32> {
        let mut at = hash as usize & self.mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return None;
            }
            if (slot >> 32) as u32 == hash {
                return Some(slot as u32 - 1);
            }
            at = (at + 1) & self.mask;
        }
    }

    /// The index of the entry with `hash` for which `is_key` holds.
    #[inline]
    pub fn find(&self, hash: u32, mut is_key: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut at = hash as usize & self.mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return None;
            }
            let index = slot as u32 - 1;
            if (slot >> 32) as u32 == hash && is_key(index) {
                return Some(index);
            }
            at = (at + 1) & self.mask;
        }
    }

    /// Adds an entry; the caller knows that the key is not there. The capacity given to `new` is not exceeded by its caller.
    pub fn insert(&mut self, hash: u32, index: u32) {
        debug_assert!(self.len < self.slots.len() / 2 + 1);
        let mut at = hash as usize & self.mask;
        while self.slots[at] != 0 {
            at = (at + 1) & self.mask;
        }
        self.slots[at] = (u64::from(hash) << 32) | u64::from(index + 1);
        self.len += 1;
    }

    /// Removes the entry of `index`, if it is there.
    pub fn remove(&mut self, hash: u32, index: u32) {
        let wanted = (u64::from(hash) << 32) | u64::from(index + 1);
        let mut hole = hash as usize & self.mask;
        while self.slots[hole] != wanted {
            if self.slots[hole] == 0 {
                return;
            }
            hole = (hole + 1) & self.mask;
        }
        self.len -= 1;
        let mut next = hole;
        loop {
            next = (next + 1) & self.mask;
            let slot = self.slots[next];
            if slot == 0 {
                break;
            }
            // An entry moves back into the hole unless its home lies after the hole.
            let home = (slot >> 32) as usize & self.mask;
            if (next.wrapping_sub(home) & self.mask) >= (next.wrapping_sub(hole) & self.mask) {
                self.slots[hole] = slot;
                hole = next;
            }
        }
        self.slots[hole] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_deletion_of_their_neighbours() {
        let mut table = Table::new(64);
        // Few homes, so that runs form and wrap round the end.
        let hash = |i: u32| 126 + i % 5;
        for i in 0..60 {
            table.insert(hash(i), i);
        }
        for i in (0..60).step_by(3) {
            table.remove(hash(i), i);
        }
        for i in 0..60 {
            assert_eq!(table.find(hash(i), |found| found == i).is_some(), i % 3 != 0, "{i}");
        }
        assert_eq!(table.len(), 40);
        table.remove(hash(0), 0);
        assert_eq!(table.len(), 40, "removing what is not there changes nothing");
    }
}
