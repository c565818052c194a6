//! Whose response is it: from (target, identity) to the worker that registered it.
//!
//! Plain memory: no sockets, no clock, no BPF. What it holds:
//!
//! - *targets*: the endpoints, of TCP or UDP, whose responses the XDP program takes; they come with workers' services, and go
//!   [`TARGET_LINGER`] after the last worker that named them (late segments of a session that just ended must not reach
//!   the real client).
//! - *owners*: a worker of an online role, known by instance and number. It outlives its connection by [`OWNER_GRACE`]:
//!   a worker that reconnects finds its identities still there.
//! - *registrations*: 26 bytes each in one open-addressing table, at most 60 bytes with its free places.
//! - *early* records: [`super::early`].
//!
//! A registration carries the generation of its owner. A renewal raises the owner's generation; when it ends, a sweep of
//! the table removes what was not renewed. The same sweep removes dead owners' registrations. It goes through the table
//! in short steps ([`Routing::work`]), so that a million registrations hold up no response.

use super::early::{self, Early};
use crate::channel::limits::HURRY;
use crate::channel::server::{Handler, PeerId, PeerQueue};
use crate::channel::wire::{Entry, Hello, Refusal, ServiceEntry};
use hashbrown::HashTable;
use replayer_common::addr::{Endpoint, Ip};
use replayer_common::hash::flow_hash;
use replayer_common::packet::Protocol;
use replayer_common::response::ResponseHeader;

/// How long a worker's registrations outlive its connection, ns: several of its attempts to reconnect.
pub const OWNER_GRACE: u64 = 10_000_000_000;

/// How long a target's responses are taken after the last worker that wanted them, ns. The target may send late segments
/// of replayed sessions, and those must not reach the real clients; a minute covers its FIN and data retransmissions to
/// peers that have gone, all but the last few.
pub const TARGET_LINGER: u64 = 60_000_000_000;

/// Targets at once.
pub const MAX_TARGETS: usize = 1024;

/// Workers at once, with those that are away.
pub const MAX_OWNERS: usize = 4096;

/// Registrations at once, a gigabyte of them: as many as a worker can have sessions. A peer that wants more is no replayer.
pub const MAX_REGISTRATIONS: usize = 1 << 24;

/// Places of the table that one step of a sweep looks at: some 20 us.
const SWEEP_STEP: usize = 8192;

/// A target, by its place, and an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The identity's address.
    pub addr: Ip,
    /// The identity's port.
    pub port: u16,
    /// The target's place in the table of targets.
    pub target: u16,
}

/// A key's hash, over all 64 bits.
#[inline]
pub(super) fn key_hash(seed: u64, key: &Key) -> u64 {
    widen(flow_hash(seed ^ u64::from(key.target) << 32, &key.addr, key.port))
}

/// hashbrown takes the place from the low bits and a tag from the highest: neither may be constant.
#[inline]
fn widen(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(hash)
}

fn target_hash(seed: u64, protocol: Protocol, endpoint: &Endpoint) -> u64 {
    widen(flow_hash(seed ^ u64::from(protocol.number()), &endpoint.ip, endpoint.port))
}

struct Registration {
    key: Key,
    owner: u16,
    /// The owner's number of the service.
    service: u16,
    generation: u16,
}

const _: () = assert!(size_of::<Registration>() == 26);

struct Target {
    protocol: Protocol,
    endpoint: Endpoint,
    /// Owners that named it.
    users: u32,
    unused_since: u64,
}

struct Owner {
    instance: u64,
    worker: u16,
    attempt: u32,
    peer: Option<PeerId>,
    away_since: u64,
    generation: u16,
    renewing: bool,
    /// Only waits for the sweep that forgets its registrations.
    dead: bool,
    /// Service numbers and the targets' places.
    services: Vec<(u16, u16)>,
}

/// What becomes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To this peer; `service` of the record is filled in.
    Peer(PeerId),
    /// It waits for its registration, or has been counted as lost.
    Kept,
}

/// What the XDP program has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetChange {
    /// Take the responses of this endpoint.
    Add(Protocol, Endpoint),
    /// Leave them alone again.
    Remove(Protocol, Endpoint),
}

/// Plain counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RoutingCounters {
    /// Records of endpoints that are no target: one that was removed a moment ago.
    pub unknown_target: u64,
    /// Records for which no registration came in time.
    pub unregistered: u64,
    /// Records for an identity for which too many waited already.
    pub early_overflow: u64,
    /// Records that waited and were delivered.
    pub early_delivered: u64,
    /// Registrations made.
    pub registered: u64,
    /// Registrations taken back.
    pub unregistered_identities: u64,
    /// Registrations that a renewal or a worker's end removed.
    pub swept: u64,
    /// Registrations that took an identity from another connected worker: two online roles use the same identities.
    pub conflicts: u64,
    /// Registrations for a service that the peer has not named.
    pub bad_registrations: u64,
    /// Registrations for which the table had no room.
    pub refused_registrations: u64,
}

/// The table.
pub struct Routing {
    seed: u64,
    registrations: HashTable<Registration>,
    /// How many there may be.
    most: usize,
    targets: Vec<Option<Target>>,
    /// Endpoint to place in `targets`.
    target_index: HashTable<u16>,
    owners: Vec<Option<Owner>>,
    /// The owner behind each connection.
    peers: Vec<Option<u16>>,
    early: Early,
    changes: Vec<TargetChange>,
    sweep: Sweep,
    hurry_until: u64,
    counters: RoutingCounters,
}

#[derive(Default)]
struct Sweep {
    /// The next place to look at, in a table of so many places.
    at: Option<(usize, usize)>,
    /// Something became due while a sweep was under way: another one follows.
    again: bool,
}

impl Routing {
    /// An empty table; `seed` keeps hostile identities from choosing their places.
    pub fn new(seed: u64) -> Routing {
        Routing::with_most(seed, MAX_REGISTRATIONS)
    }

    /// One of at most so many registrations.
    pub(crate) fn with_most(seed: u64, most: usize) -> Routing {
        Routing {
            seed,
            registrations: HashTable::new(),
            most,
            targets: Vec::new(),
            target_index: HashTable::new(),
            owners: Vec::new(),
            peers: Vec::new(),
            early: Early::new(seed, early::CAPACITY),
            changes: Vec::new(),
            sweep: Sweep::default(),
            hurry_until: 0,
            counters: RoutingCounters::default(),
        }
    }

    /// The counters.
    pub fn counters(&self) -> &RoutingCounters {
        &self.counters
    }

    /// Identities registered.
    pub fn registrations(&self) -> usize {
        self.registrations.len()
    }

    /// Bytes that the table of registrations takes.
    pub fn table_bytes(&self) -> usize {
        self.registrations.allocation_size()
    }

    /// Workers that are connected.
    pub fn workers(&self) -> usize {
        self.owners.iter().flatten().filter(|owner| owner.peer.is_some()).count()
    }

    /// Targets whose responses are taken.
    pub fn targets(&self) -> usize {
        self.target_index.len()
    }

    /// Records that wait for their registration.
    pub fn waiting(&self) -> usize {
        self.early.waiting()
    }

    /// What the XDP program has to be told since the last call.
    pub fn take_changes(&mut self) -> impl Iterator<Item = TargetChange> + '_ {
        self.changes.drain(..)
    }

    /// Finds whose a record is. `source` is the segment's or datagram's source; the identity is in the record.
    #[inline]
    pub fn route(
        &mut self,
        now: u64,
        protocol: Protocol,
        source: &Endpoint,
        header: &mut ResponseHeader,
    ) -> Route {
        let Some(target) = self.find_target(protocol, source) else {
            self.counters.unknown_target += 1;
            return Route::Kept;
        };
        let key = Key { addr: header.addr, port: header.port, target };
        let found = self.registrations.find(key_hash(self.seed, &key), |r| r.key == key);
        if let Some(registration) = found
            && let Some(Some(Owner { peer: Some(peer), .. })) =
                self.owners.get(usize::from(registration.owner))
        {
            header.service = registration.service;
            return Route::Peer(*peer);
        }
        let kept = self.early.hold(now, key, header);
        self.counters.unregistered += kept.expired;
        self.counters.early_overflow += u64::from(!kept.held);
        Route::Kept
    }

    /// Forgets what is overdue; to be called about once a second while [`Routing::is_busy`].
    pub fn tick(&mut self, now: u64) {
        self.counters.unregistered += self.early.expire(now);
        for at in 0..self.owners.len() {
            let Some(owner) = &mut self.owners[at] else { continue };
            if owner.dead || owner.peer.is_some() || now < owner.away_since + OWNER_GRACE {
                continue;
            }
            owner.dead = true;
            for (_, place) in owner.services.drain(..) {
                if let Some(Some(target)) = self.targets.get_mut(usize::from(place)) {
                    target.users -= 1;
                    target.unused_since = now;
                }
            }
            self.request_sweep();
        }
        if self.is_sweeping() {
            // A registration may name the place of a target that would be given away.
            return;
        }
        for place in 0..self.targets.len() {
            let Some(target) = &self.targets[place] else { continue };
            if target.users == 0 && now >= target.unused_since + TARGET_LINGER {
                let (protocol, endpoint) = (target.protocol, target.endpoint);
                let hash = self.endpoint_hash(protocol, &endpoint);
                if let Ok(entry) = self.target_index.find_entry(hash, |&i| usize::from(i) == place) {
                    entry.remove();
                }
                self.targets[place] = None;
                self.changes.push(TargetChange::Remove(protocol, endpoint));
            }
        }
    }

    /// A target whose responses are taken already, though no worker has named it yet: it stays for [`TARGET_LINGER`] like one that the last
    /// worker has left. Where there are too many targets it does nothing.
    pub fn inherit(&mut self, now: u64, protocol: Protocol, endpoint: Endpoint) {
        let Ok(place) = self.find_or_add_target(protocol, endpoint) else { return };
        if let Some(target) = &mut self.targets[usize::from(place)] {
            target.unused_since = now;
        }
    }

    /// Whether a worker has said that it is behind.
    pub fn is_hurried(&self, now: u64) -> bool {
        now < self.hurry_until
    }

    /// Whether [`Routing::tick`] will have something to do.
    pub fn is_busy(&self) -> bool {
        self.early.waiting() > 0 || self.owners.iter().any(Option::is_some) || self.targets() > 0
    }

    /// Whether [`Routing::work`] has something to do.
    pub fn is_sweeping(&self) -> bool {
        self.sweep.at.is_some()
    }

    /// One short step of the sweep under way, if there is one.
    pub fn work(&mut self) {
        let Some((mut at, places)) = self.sweep.at else { return };
        if places != self.registrations.num_buckets() {
            // The table has grown meanwhile and everything has another place.
            at = 0;
        }
        let places = self.registrations.num_buckets();
        let end = places.min(at + SWEEP_STEP);
        for place in at..end {
            let Ok(entry) = self.registrations.get_bucket_entry(place) else { continue };
            let registration = entry.get();
            let stays = self.owners[usize::from(registration.owner)].as_ref().is_some_and(|owner| {
                !owner.dead && (owner.renewing || owner.generation == registration.generation)
            });
            if !stays {
                entry.remove();
                self.counters.swept += 1;
            }
        }
        self.sweep.at = (end < places).then_some((end, places));
        if self.sweep.at.is_none() {
            self.swept();
        }
    }

    fn swept(&mut self) {
        if std::mem::take(&mut self.sweep.again) {
            self.request_sweep();
            return;
        }
        // Nothing refers to the dead any more.
        for owner in &mut self.owners {
            if owner.as_ref().is_some_and(|owner| owner.dead) {
                *owner = None;
            }
        }
        // Give memory back after a wave of sessions. A quarter, so that it is not done over and over.
        let (len, seed) = (self.registrations.len(), self.seed);
        if self.registrations.capacity() > 1 << 16 && len < self.registrations.capacity() / 4 {
            self.registrations.shrink_to(len * 2, |r| key_hash(seed, &r.key));
        }
    }

    fn request_sweep(&mut self) {
        if self.sweep.at.is_some() {
            self.sweep.again = true;
        } else {
            self.sweep.at = Some((0, self.registrations.num_buckets()));
        }
    }

    fn endpoint_hash(&self, protocol: Protocol, endpoint: &Endpoint) -> u64 {
        target_hash(self.seed, protocol, endpoint)
    }

    #[inline]
    fn find_target(&self, protocol: Protocol, endpoint: &Endpoint) -> Option<u16> {
        let is = |&place: &u16| {
            self.targets[usize::from(place)]
                .as_ref()
                .is_some_and(|target| target.endpoint == *endpoint && target.protocol == protocol)
        };
        self.target_index.find(self.endpoint_hash(protocol, endpoint), is).copied()
    }

    fn find_or_add_target(&mut self, protocol: Protocol, endpoint: Endpoint) -> Result<u16, Refusal> {
        if let Some(place) = self.find_target(protocol, &endpoint) {
            return Ok(place);
        }
        let place = first_free(&mut self.targets, MAX_TARGETS).ok_or(Refusal::Services)?;
        self.targets[usize::from(place)] = Some(Target { protocol, endpoint, users: 0, unused_since: 0 });
        let (hash, seed, targets) = (self.endpoint_hash(protocol, &endpoint), self.seed, &self.targets);
        self.target_index.insert_unique(hash, place, |&place| {
            let target = targets[usize::from(place)].as_ref();
            target.map_or(0, |target| target_hash(seed, target.protocol, &target.endpoint))
        });
        self.changes.push(TargetChange::Add(protocol, endpoint));
        Ok(place)
    }

    fn owner_of(&self, peer: PeerId) -> Option<u16> {
        self.peers.get(usize::from(peer.0)).copied().flatten()
    }

    fn owner_mut(&mut self, peer: PeerId) -> Option<&mut Owner> {
        let owner = self.owner_of(peer)?;
        self.owners[usize::from(owner)].as_mut()
    }

    fn key_of(&self, owner: u16, identity: &Entry) -> Option<Key> {
        let owner = self.owners[usize::from(owner)].as_ref()?;
        let (_, target) = owner.services.iter().find(|(id, _)| *id == identity.service)?;
        Some(Key { addr: identity.endpoint.ip, port: identity.endpoint.port, target: *target })
    }
}

impl Handler for Routing {
    fn hello(&mut self, peer: PeerId, hello: &Hello<'_>) -> Result<Option<PeerId>, Refusal> {
        let same = |owner: &Option<Owner>| {
            owner
                .as_ref()
                .is_some_and(|o| !o.dead && (o.instance, o.worker) == (hello.instance, hello.worker))
        };
        let (place, older) = match self.owners.iter().position(same) {
            Some(place) => {
                let Some(owner) = &mut self.owners[place] else { return Err(Refusal::Other) };
                if hello.attempt <= owner.attempt {
                    return Err(Refusal::Superseded);
                }
                owner.attempt = hello.attempt;
                (place as u16, owner.peer.replace(peer))
            }
            None => {
                let place = first_free(&mut self.owners, MAX_OWNERS).ok_or(Refusal::Full)?;
                self.owners[usize::from(place)] = Some(Owner {
                    instance: hello.instance,
                    worker: hello.worker,
                    attempt: hello.attempt,
                    peer: Some(peer),
                    away_since: 0,
                    generation: 0,
                    renewing: false,
                    dead: false,
                    services: Vec::new(),
                });
                (place, None)
            }
        };
        let at = usize::from(peer.0);
        if self.peers.len() <= at {
            self.peers.resize(at + 1, None);
        }
        self.peers[at] = Some(place);
        Ok(older)
    }

    fn service(&mut self, peer: PeerId, service: ServiceEntry) -> Result<(), Refusal> {
        let target = self.find_or_add_target(service.protocol, service.target)?;
        let Some(owner) = self.owner_mut(peer) else { return Err(Refusal::Other) };
        let known = owner.services.contains(&(service.service, target));
        if !known {
            // The number may have meant another target in an older connection.
            let before = owner.services.iter().position(|(id, _)| *id == service.service);
            let before = before.map(|at| owner.services.swap_remove(at).1);
            owner.services.push((service.service, target));
            if let Some(Some(before)) = before.map(|at| self.targets[usize::from(at)].as_mut()) {
                before.users -= 1;
            }
            if let Some(target) = &mut self.targets[usize::from(target)] {
                target.users += 1;
            }
        }
        Ok(())
    }

    fn register(&mut self, now: u64, peer: PeerId, identity: Entry, queue: &mut PeerQueue) {
        let Some(owner) = self.owner_of(peer) else { return };
        let Some(key) = self.key_of(owner, &identity) else {
            self.counters.bad_registrations += 1;
            return;
        };
        let generation = self.owners[usize::from(owner)].as_ref().map_or(0, |owner| owner.generation);
        let registration = Registration { key, owner, service: identity.service, generation };
        let seed = self.seed;
        let hash = key_hash(seed, &key);
        let full = self.registrations.len() >= self.most;
        match self.registrations.entry(hash, |r| r.key == key, |r| key_hash(seed, &r.key)) {
            hashbrown::hash_table::Entry::Occupied(mut place) => {
                let before = std::mem::replace(place.get_mut(), registration).owner;
                let other = self.owners[usize::from(before)].as_ref();
                if before != owner && other.is_some_and(|owner| owner.peer.is_some()) {
                    self.counters.conflicts += 1;
                }
            }
            hashbrown::hash_table::Entry::Vacant(_) if full => {
                self.counters.refused_registrations += 1;
                return;
            }
            hashbrown::hash_table::Entry::Vacant(place) => {
                place.insert(registration);
            }
        }
        self.counters.registered += 1;
        let mut delivered = 0;
        let expired = self.early.take(now, &key, |header| {
            queue.send(&ResponseHeader { service: identity.service, ..*header });
            delivered += 1;
        });
        self.counters.early_delivered += delivered;
        self.counters.unregistered += expired;
    }

    fn unregister(&mut self, peer: PeerId, identity: Entry) {
        let Some(owner) = self.owner_of(peer) else { return };
        let Some(key) = self.key_of(owner, &identity) else {
            self.counters.bad_registrations += 1;
            return;
        };
        // Another worker may have taken the identity since: then it is not this one's to take back.
        let is = |r: &Registration| r.key == key && r.owner == owner;
        if let Ok(entry) = self.registrations.find_entry(key_hash(self.seed, &key), is) {
            entry.remove();
            self.counters.unregistered_identities += 1;
        }
    }

    fn renew_begin(&mut self, peer: PeerId) {
        if let Some(owner) = self.owner_mut(peer) {
            owner.generation = owner.generation.wrapping_add(1);
            owner.renewing = true;
        }
    }

    fn renew_end(&mut self, peer: PeerId) {
        if let Some(owner) = self.owner_mut(peer)
            && owner.renewing
        {
            owner.renewing = false;
            self.request_sweep();
        }
    }

    fn hurry(&mut self, now: u64) {
        self.hurry_until = now + HURRY;
    }

    fn closed(&mut self, now: u64, peer: PeerId) {
        let Some(at) = self.peers.get_mut(usize::from(peer.0)).and_then(Option::take) else { return };
        // Unless a newer connection of the same worker has taken over.
        if let Some(owner) = &mut self.owners[usize::from(at)]
            && owner.peer == Some(peer)
        {
            owner.peer = None;
            owner.away_since = now;
            // What it did not renew is not known to be over.
            owner.renewing = true;
        }
    }
}

/// A free place in a table of at most `limit`.
fn first_free<T>(table: &mut Vec<Option<T>>, limit: usize) -> Option<u16> {
    let place = table.iter().position(Option::is_none).unwrap_or(table.len());
    if place == table.len() {
        if place >= limit {
            return None;
        }
        table.push(None);
    }
    u16::try_from(place).ok()
}
