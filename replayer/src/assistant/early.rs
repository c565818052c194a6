//! Responses that arrived before their registration.
//!
//! A worker registers an identity in the same turn in which it sends the SYN, but over another path: the target's
//! SYN-ACK can overtake the registration. It waits here, for a while, in a ring of fixed size; the oldest makes room.
//! Plain memory: no clock, no sockets.

use super::routing::{Key, key_hash};
use hashbrown::HashTable;
use replayer_common::response::ResponseHeader;

/// How long a record waits for its registration, ns. A worker that flushes once a turn and a healthy path need
/// milliseconds; half a second covers a lost segment or two of the return channel.
pub const WAIT: u64 = 500_000_000;

/// Records that wait at once: 10 ms of responses at 800 000 a second, or 0.5 s at 16 000 new sessions a second.
pub const CAPACITY: usize = 8192;

/// Records that wait for one identity: a SYN-ACK, its retransmission and the first window of a server that greets.
/// Keeps one unregistered session that the target floods from taking the ring.
pub const PER_IDENTITY: u16 = 16;

const NONE: u32 = u32::MAX;

struct Slot {
    at: u64,
    key: Key,
    /// Delivered already; its place is free once it is the oldest.
    taken: bool,
    /// The next younger record of the same identity.
    next: u32,
    /// The oldest record of an identity knows its youngest, and how many there are.
    last: u32,
    count: u16,
    header: ResponseHeader,
}

/// The ring.
pub struct Early {
    seed: u64,
    /// The oldest is at `head`; grows to its capacity once, at the beginning.
    slots: Vec<Slot>,
    head: usize,
    len: usize,
    capacity: usize,
    /// The oldest record of each identity.
    index: HashTable<u32>,
    /// Records in the ring that are not `taken`.
    waiting: usize,
}

/// What [`Early::hold`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Whether the record waits now.
    pub held: bool,
    /// Records that gave up their place to it, or had waited too long.
    pub expired: u64,
}

impl Early {
    /// A ring of `capacity` records whose index is seeded with `seed`.
    pub fn new(seed: u64, capacity: usize) -> Early {
        Early {
            seed,
            slots: Vec::with_capacity(capacity),
            head: 0,
            len: 0,
            capacity,
            index: HashTable::with_capacity(capacity),
            waiting: 0,
        }
    }

    /// How many records wait.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Keeps a record until [`Early::take`] asks for it.
    pub fn hold(&mut self, now: u64, key: Key, header: &ResponseHeader) -> Held {
        let mut expired = self.expire(now);
        if self.len == self.capacity {
            expired += self.pop();
        }
        let at = (self.head + self.len) % self.capacity;
        let place = at as u32;
        let hash = key_hash(self.seed, &key);
        let first = self.index.find(hash, |&i| self.slots[i as usize].key == key).copied();
        if let Some(first) = first {
            let oldest = &mut self.slots[first as usize];
            if oldest.count >= PER_IDENTITY {
                return Held { held: false, expired };
            }
            oldest.count += 1;
            let before = std::mem::replace(&mut oldest.last, place);
            self.slots[before as usize].next = place;
        } else {
            let (slots, seed) = (&self.slots, self.seed);
            self.index.insert_unique(hash, place, |&i| key_hash(seed, &slots[i as usize].key));
        }
        let slot = Slot { at: now, key, taken: false, next: NONE, last: place, count: 1, header: *header };
        if at == self.slots.len() {
            self.slots.push(slot);
        } else {
            self.slots[at] = slot;
        }
        self.len += 1;
        self.waiting += 1;
        Held { held: true, expired }
    }

    /// Hands out what waits for an identity, in the order of arrival. Returns how many had waited too long instead.
    pub fn take(&mut self, now: u64, key: &Key, mut deliver: impl FnMut(&ResponseHeader)) -> u64 {
        if self.waiting == 0 {
            return 0;
        }
        let hash = key_hash(self.seed, key);
        let Ok(entry) = self.index.find_entry(hash, |&i| self.slots[i as usize].key == *key) else {
            return 0;
        };
        let (mut at, _) = entry.remove();
        let mut expired = 0;
        while at != NONE {
            let slot = &mut self.slots[at as usize];
            slot.taken = true;
            self.waiting -= 1;
            if now <= slot.at + WAIT {
                deliver(&slot.header);
            } else {
                expired += 1;
            }
            at = slot.next;
        }
        expired
    }

    /// Drops what has waited too long, and says how many that were.
    pub fn expire(&mut self, now: u64) -> u64 {
        let mut expired = 0;
        while self.len > 0 && (self.slots[self.head].taken || now > self.slots[self.head].at + WAIT) {
            expired += self.pop();
        }
        expired
    }

    /// Drops the oldest: 1 if it was still waiting.
    fn pop(&mut self) -> u64 {
        let at = self.head as u32;
        let Slot { key, taken, next, last, count, .. } = self.slots[self.head];
        self.head = (self.head + 1) % self.capacity;
        self.len -= 1;
        if taken {
            return 0;
        }
        self.waiting -= 1;
        // The oldest of all is the oldest of its identity: the next one takes its place in the index.
        let hash = key_hash(self.seed, &key);
        if next != NONE {
            let heir = &mut self.slots[next as usize];
            (heir.last, heir.count) = (last, count - 1);
            if let Some(place) = self.index.find_mut(hash, |&i| i == at) {
                *place = next;
            }
        } else if let Ok(entry) = self.index.find_entry(hash, |&i| i == at) {
            entry.remove();
        }
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> Key {
        Key { addr: [1; 16], port, target: 0 }
    }

    fn header(seq: u32) -> ResponseHeader {
        ResponseHeader { seq, ..Default::default() }
    }

    fn take(early: &mut Early, now: u64, port: u16) -> Vec<u32> {
        let mut seqs = Vec::new();
        early.take(now, &key(port), |header| seqs.push(header.seq));
        seqs
    }

    #[test]
    fn records_come_out_in_order_and_once() {
        let mut early = Early::new(1, 8);
        for seq in 0..6 {
            assert!(early.hold(seq.into(), key(seq as u16 % 2), &header(seq)).held);
        }
        assert_eq!(take(&mut early, 10, 1), [1, 3, 5]);
        assert_eq!(take(&mut early, 10, 1), [0u32; 0]);
        assert_eq!(take(&mut early, 10, 0), [0, 2, 4]);
        assert_eq!(early.waiting(), 0);
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut early = Early::new(1, 4);
        for seq in 0..9 {
            let expired = early.hold(0, key(seq as u16 / 2), &header(seq)).expired;
            assert_eq!(expired, u64::from(seq >= 4));
        }
        assert_eq!(take(&mut early, 0, 0), [0u32; 0]);
        assert_eq!(take(&mut early, 0, 2), [5], "4 made room, its heir stays to be found");
        assert_eq!(take(&mut early, 0, 3), [6, 7]);
        assert_eq!(take(&mut early, 0, 4), [8]);
    }

    #[test]
    fn what_waited_too_long_is_counted_and_not_delivered() {
        let mut early = Early::new(1, 8);
        early.hold(0, key(1), &header(1));
        early.hold(10, key(1), &header(2));
        assert_eq!(early.take(WAIT + 5, &key(1), |h| assert_eq!(h.seq, 2)), 1);
        early.hold(20, key(1), &header(3));
        assert_eq!(early.expire(WAIT + 20), 0);
        assert_eq!(early.expire(WAIT + 21), 1);
        assert_eq!(early.waiting(), 0);
    }

    #[test]
    fn one_identity_cannot_take_the_ring() {
        let mut early = Early::new(1, CAPACITY);
        let held = (0..100).filter(|&seq| early.hold(0, key(1), &header(seq)).held).count();
        assert_eq!(held, usize::from(PER_IDENTITY));
        assert!(early.hold(0, key(2), &header(0)).held);
    }

    /// Against a model: a list of what waits.
    #[test]
    fn random_use_matches_a_plain_list() {
        let mut state = 7u64;
        let mut next = move |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let mut early = Early::new(3, 32);
        let mut model: Vec<(u64, u16, u32)> = Vec::new();
        let mut places = std::collections::VecDeque::new();
        let mut now = 0;
        for seq in 0..50_000u32 {
            now += next(WAIT / 20);
            let port = next(12) as u16;
            if next(3) < 2 {
                if early.hold(now, key(port), &header(seq)).held {
                    model.push((now, port, seq));
                    places.push_back(seq);
                    if places.len() > 32 {
                        let gone = places.pop_front();
                        model.retain(|r| Some(r.2) != gone);
                    }
                }
            } else {
                let want: Vec<u32> =
                    model.iter().filter(|r| r.1 == port && now <= r.0 + WAIT).map(|r| r.2).collect();
                assert_eq!(take(&mut early, now, port), want);
                model.retain(|r| r.1 != port);
            }
            model.retain(|r| now <= r.0 + WAIT);
            // Places that the ring has given back: from the front, taken or too old.
            early.expire(now);
            while places.len() > early.len {
                places.pop_front();
            }
            assert_eq!(early.waiting(), model.len());
        }
    }
}
