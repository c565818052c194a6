//! Identities: the source address and port that a session uses towards its target.

use crate::timer::{Tick, ticks};
use alloc::{collections::VecDeque, vec::Vec};
use replayer_common::addr::{Endpoint, Ip};
use replayer_common::packet::Protocol;

/// The lowest port of an identity that is not the client's own.
const FIRST_PORT: u16 = 1024;
/// Ports of an address that an identity may have.
pub const PORTS_PER_ADDRESS: u32 = 65_536 - FIRST_PORT as u32;
const PORTS: u64 = PORTS_PER_ADDRESS as u64;

/// A run of consecutive addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// The first address.
    pub first: Ip,
    /// How many.
    pub count: u32,
}

/// What `-c` gives: addresses whose ports 1024 to 65535 are this worker's to use.
///
/// The space of identities is carved up by worker: identity `i` belongs to worker `i % workers`, so no two workers ever use
/// the same one. Identities go round: each is used again only when all others of the worker were, and when its
/// quarantine is over.
#[derive(Debug)]
pub(crate) struct Pool {
    ranges: Vec<AddressRange>,
    addresses: u64,
    worker: u64,
    workers: u64,
    /// Identities of this worker that were never used: from here to `size`.
    fresh: u64,
    size: u64,
    released: VecDeque<(u32, Tick)>,
    quarantine: u32,
}

impl Pool {
    /// At most `max` identities are used; `quarantine` is in ticks.
    pub(crate) fn new(
        ranges: &[AddressRange],
        worker: u32,
        workers: u32,
        max: usize,
        quarantine: u32,
    ) -> Pool {
        let addresses: u64 = ranges.iter().map(|range| u64::from(range.count)).sum();
        let size = (addresses * PORTS / u64::from(workers)).min(max as u64);
        Pool {
            ranges: ranges.to_vec(),
            addresses,
            worker: u64::from(worker),
            workers: u64::from(workers),
            fresh: 0,
            size,
            released: VecDeque::with_capacity(size as usize),
            quarantine,
        }
    }

    /// The identity with number `index` of this worker.
    fn identity(&self, index: u32) -> Endpoint {
        let global = u64::from(index) * self.workers + self.worker;
        // Neighbouring numbers have different addresses, so that a target sees the load spread over all clients.
        let mut address = global % self.addresses;
        let port = FIRST_PORT + (global / self.addresses % PORTS) as u16;
        let mut ip = [0; 16];
        for range in &self.ranges {
            if address < u64::from(range.count) {
                ip = (u128::from_be_bytes(range.first) + u128::from(address)).to_be_bytes();
                break;
            }
            address -= u64::from(range.count);
        }
        Endpoint { ip, port }
    }

    /// The number of an identity of this worker.
    fn index(&self, identity: &Endpoint) -> u32 {
        let mut address = 0;
        for range in &self.ranges {
            let offset = u128::from_be_bytes(identity.ip).wrapping_sub(u128::from_be_bytes(range.first));
            if offset < u128::from(range.count) {
                address += offset as u64;
                break;
            }
            address += u64::from(range.count);
        }
        let global = u64::from(identity.port - FIRST_PORT) * self.addresses + address;
        (global / self.workers) as u32
    }

    /// A free identity, or `None` when all are in use or in quarantine.
    pub(crate) fn take(&mut self, now: Tick) -> Option<Endpoint> {
        let index = if self.fresh < self.size {
            self.fresh += 1;
            self.fresh as u32 - 1
        } else {
            let &(index, since) = self.released.front()?;
            if now.wrapping_sub(since) < self.quarantine {
                return None;
            }
            self.released.pop_front();
            index
        };
        Some(self.identity(index))
    }

    /// Gives an identity back; its quarantine begins.
    pub(crate) fn release(&mut self, identity: &Endpoint, now: Tick) {
        self.released.push_back((self.index(identity), now));
    }
}

/// How many copies each connection gets: a share that may be fractional, exact over time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copies {
    /// Millionths of a copy per connection.
    rate: u64,
    carried: u64,
}

impl Copies {
    /// Each worker rounds at another time, so that all of them together are exact too.
    pub(crate) fn new(millionths: u64, worker: u32, workers: u32) -> Copies {
        Copies { rate: millionths, carried: u64::from(worker) * 1_000_000 / u64::from(workers.max(1)) }
    }

    /// The copies of the next connection.
    pub(crate) fn next(&mut self) -> u16 {
        self.carried += self.rate;
        let whole = self.carried / 1_000_000;
        self.carried %= 1_000_000;
        whole.min(u64::from(u16::MAX)) as u16
    }
}

/// Candidates for a port of the client's own address, when its own port is taken or when it has several copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    next: u32,
    /// Of what address none was free towards what target, by what protocol, and when.
    none: Option<(Ip, Endpoint, Protocol, Tick)>,
}

/// For so long, a millisecond, no other port of that address is looked for: where all are taken, each missing copy would look at hundreds at every
/// turn.
const NONE_FOR: u32 = ticks(1_000_000);

impl Ports {
    pub(crate) fn new(seed: u64) -> Ports {
        Ports { next: seed as u32, none: None }
    }

    /// Whether it was found a moment ago that the address has none free.
    pub(crate) fn has_none(&self, ip: &Ip, target: &Endpoint, protocol: Protocol, now: Tick) -> bool {
        self.none.is_some_and(|(of, to, by, since)| {
            (of, to, by) == (*ip, *target, protocol) && now.wrapping_sub(since) < NONE_FOR
        })
    }

    pub(crate) fn set_none(&mut self, ip: Ip, target: Endpoint, protocol: Protocol, now: Tick) {
        self.none = Some((ip, target, protocol, now));
    }

    pub(crate) fn candidate(&mut self) -> u16 {
        // A step that is coprime to the number of ports visits all of them, far from each other.
        self.next = self.next.wrapping_add(25_309);
        FIRST_PORT + (u64::from(self.next) % PORTS) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Service};
    use crate::engine::Engine;
    use crate::gate::Turns;
    use crate::session::Session;
    use replayer_common::addr::from_v4;
    use std::collections::HashSet;
    use std::vec;

    #[test]
    fn workers_share_no_identity_and_use_all() {
        let ranges = [
            AddressRange { first: from_v4([10, 0, 0, 255]), count: 2 },
            AddressRange { first: from_v4([10, 9, 0, 1]), count: 1 },
        ];
        let mut seen = HashSet::new();
        for worker in 0..4 {
            let mut pool = Pool::new(&ranges, worker, 4, usize::MAX >> 1, 10);
            while let Some(identity) = pool.take(0) {
                assert!(seen.insert((identity.ip, identity.port)), "{identity} twice");
                assert_eq!(pool.identity(pool.index(&identity)), identity);
            }
        }
        assert_eq!(seen.len() as u64, 3 * PORTS);
        assert!(seen.contains(&(from_v4([10, 0, 1, 0]), 1024)));
    }

    #[test]
    fn a_released_identity_waits_for_its_quarantine() {
        let ranges = [AddressRange { first: from_v4([10, 0, 0, 1]), count: 1 }];
        let mut pool = Pool::new(&ranges, 0, 1, 2, 100);
        let first = pool.take(0).unwrap();
        pool.take(0).unwrap();
        assert_eq!(pool.take(0), None);
        pool.release(&first, 50);
        assert_eq!(pool.take(149), None);
        assert_eq!(pool.take(150), Some(first));
    }

    #[test]
    fn b041_fractional_copies_are_exact_over_time() {
        let mut copies = Copies::new(2_500_000, 0, 1);
        assert_eq!((0..1000).map(|_| u32::from(copies.next())).sum::<u32>(), 2500);
        let mut copies = Copies::new(10_000, 0, 1);
        assert_eq!((0..1000).map(|_| u32::from(copies.next())).sum::<u32>(), 10);
        // Four workers with a few connections each, which are hundred in all.
        let few = |worker| {
            let mut copies = Copies::new(10_000, worker, 4);
            (0..25).map(|_| u32::from(copies.next())).sum::<u32>()
        };
        assert_eq!((0..4).map(few).sum::<u32>(), 1);
    }

    #[test]
    fn b041_of_an_address_whose_ports_are_all_taken_none_is_looked_for_again_and_again() {
        let end = |ip, port| Endpoint { ip: from_v4(ip), port };
        let (client, target) = (end([192, 0, 2, 1], 1), end([10, 0, 2, 1], 80));
        let mut config = Config::new(vec![Service { online: end([10, 0, 1, 1], 80), target }]);
        config.limits.sessions = 1 << 17;
        let mut engine = Engine::new(config, 0);
        for port in FIRST_PORT..=u16::MAX {
            let identity = Endpoint { port, ..client };
            let session = Session::new(identity, 0, 0, 0);
            let s = engine.sessions.insert(session, Turns::default(), &identity).unwrap();
            engine.by_identity.insert(engine.identity_hash(s), s);
        }
        let mut look = |client: Endpoint, now| {
            let before = engine.ports;
            let found = engine.choose_identity(now, client, &target, 1, Protocol::Tcp);
            (found.is_some(), engine.ports.next != before.next)
        };
        assert_eq!(look(client, 1), (false, true));
        assert_eq!(look(client, 1), (false, false));
        assert_eq!(look(end([192, 0, 2, 2], 1), 1), (true, true));
        assert_eq!(look(client, NONE_FOR), (false, false));
        assert_eq!(look(client, NONE_FOR + 1), (false, true), "some may be free again");
        let by_udp = engine.choose_identity(NONE_FOR + 1, client, &target, 1, Protocol::Udp);
        assert!(by_udp.is_some(), "those of TCP are others");
    }
}
