//! The engine's state, its entry points, and what concerns sessions and connections as a whole: opening, ending, timers, limits.
//!
//! Invariants:
//! - A session is in the identity table from its SYN to its end; a connection is in the client table unless detached.
//! - A stored segment's `references` are the sessions whose `una_segment`..tail range holds it; the head of a connection's list is
//!   freed when its references are zero.
//! - Every deadline of a session is at or after the time its timer stands at in the wheel.

use crate::capture::Looked;
use crate::config::{Config, timing};
use crate::connection::{Connection, Connections, End, Left, NewConnection, Origin, Phase, Place};
use crate::counters::{Counter, Counters, EndReason, Pending, ServiceCounters};
use crate::gate::{Ahead, Turns};
use crate::histogram::Histogram;
use crate::identity::{Copies, Pool, Ports};
use crate::output::Output;
use crate::room::Room;
use crate::sack::{Board, MAX_BOARDS};
use crate::sender::{WINDOW, micros};
use crate::session::{Session, Sessions, State, Turn, segment_after};
use crate::slab::{Frontier, NONE, Slab};
use crate::store::Store;
use crate::table::Table;
use crate::timer::{Due, Tick, Wheel, before, tick, ticks};
use crate::udp::Udp;
use crate::wire::{Link, Template};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use replayer_common::addr::{ANY, Endpoint, is_v4};
use replayer_common::hash::{FLOW_SEED, flow_hash, pair_hash};
use replayer_common::packet::Protocol;

/// Packets and records are handled in batches of at most this many.
pub const BATCH: usize = 64;

/// Identities that stay registered after their session; the oldest goes first when there are more.
const MAX_LINGERING: usize = 1 << 16;

/// How the target of a service does.
#[derive(Debug)]
pub(crate) struct ServiceState {
    pub(crate) online: Endpoint,
    pub(crate) target: Endpoint,
    /// What packets to it begin with; `None`: they cannot leave.
    pub(crate) template: Option<Template>,
    pub(crate) ip_id: u16,
    /// Refuses or ignores SYNs: one goes out every `DOWN_PROBE`.
    pub(crate) down: bool,
    pub(crate) next_probe: Tick,
    /// Sessions in SYN-SENT.
    pub(crate) unanswered: u32,
    /// When the target last sent anything.
    pub(crate) heard_at: Tick,
    /// An MTU that was found to be the path's, and when.
    pub(crate) narrow_path: Option<(u16, Tick)>,
    /// When so many SYNs waited for the target's answer that it may have had no room to remember them.
    pub(crate) burst_at: Option<Tick>,
    /// Sessions whose first SYN waits until fewer are unanswered, oldest first; some have ended since.
    pub(crate) waiting: VecDeque<u32>,
    /// A client of this service spoke TLS.
    pub(crate) tls: bool,
    /// The first SYN that was not answered yet.
    pub(crate) unanswered_since: Option<Tick>,
    /// What became of its sessions. `heard` is `heard_at` of the beginning.
    pub(crate) counters: ServiceCounters,
}

impl ServiceState {
    /// Whether a target that is down may be asked again.
    pub(crate) fn probe_is_due(&self, now: Tick) -> bool {
        // Also true when the last one was so long ago that ticks have wrapped.
        let until_probe = self.next_probe.wrapping_sub(now);
        until_probe == 0 || until_probe > timing::DOWN_PROBE
    }
}

/// What a worker shows of itself besides its counters.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Sessions that have not ended.
    pub sessions_live: u64,
    /// Client connections followed.
    pub connections_live: u64,
    /// Client bytes held.
    pub held_bytes: u64,
}

/// Delays from capture to transmission of data sent for the first time, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// How many were measured.
    pub count: u32,
    /// Of these, how many were longer than [`Lag::LATE_US`] where the turn before had begun less than that ago: it is not a slow target
    /// that makes them late, and each wake-up less brings the session nearer.
    pub late: u32,
    /// The longest.
    pub longest_us: u32,
}

impl Lag {
    /// What is late, microseconds. Less only means that the cores were busy with something else.
    pub const LATE_US: u32 = 20_000;

    /// `count` delays of `us`, `since_turn_us` after the turn before them began.
    pub(crate) fn record(&mut self, us: u32, since_turn_us: u32, count: u32) {
        if us > Self::LATE_US && since_turn_us < Self::LATE_US {
            self.late += count;
        }
        self.longest_us = self.longest_us.max(us);
        self.count += count;
    }
}

/// The session engine of one worker.
#[derive(Debug)]
pub struct Engine {
    pub(crate) config: Config,
    pub(crate) hold_limit: u32,
    pub(crate) gap_timeout: u32,
    pub(crate) services: Vec<ServiceState>,
    pub(crate) connections: Connections,
    pub(crate) sessions: Sessions,
    pub(crate) by_client: Table,
    /// Connections in it whose place is [`Place::Earlier`].
    pub(crate) earlier: u32,
    pub(crate) by_identity: Table,
    pub(crate) store: Store,
    pub(crate) room: Room,
    pub(crate) wheel: Wheel,
    pub(crate) boards: Slab<Board>,
    pool: Option<Pool>,
    pub(crate) udp: Udp,
    copies: Copies,
    pub(crate) ports: Ports,
    pub(crate) dirty: Vec<u32>,
    /// The session that a record of the target's was of last: a place, whatever has become of it; `NONE` before the first.
    pub(crate) answered_last: u32,
    /// How many records are looked up together: fewer than a batch where copies are answered in their order.
    pub(crate) looked_up_together: usize,
    /// What the first pass over a batch found; empty between batches.
    pub(crate) looked: Vec<Looked>,
    lingering: VecDeque<(Tick, u16, Endpoint)>,
    /// When connections are looked at next whether they are idle, and from which place on.
    idle_look: (Tick, u32),
    pub(crate) counters: Counters,
    pub(crate) capture_to_transmit: Histogram,
    pub(crate) target_response: Histogram,
    pub(crate) lag: Lag,
    /// Sent in this batch without any delay; not in the two above yet.
    pub(crate) sent_at_once: u32,
    pub(crate) stopping: Option<Tick>,
    /// Where captured packets come from a file: the file's time.
    pub(crate) capture_time: Option<Tick>,
    /// Takes no packet as usual, and no record as the next of a copy: for the comparison of both ways.
    #[cfg(test)]
    pub(crate) step_by_step: bool,
}

impl Engine {
    /// Reserves everything that the limits allow; memory is touched as it is used.
    pub fn new(config: Config, now_ns: u64) -> Engine {
        let limits = config.limits;
        let now = tick(now_ns);
        let amplified = config.copies_millionths > 1_000_000;
        let services = config
            .services
            .iter()
            .map(|service| ServiceState {
                online: service.online,
                target: service.target,
                template: None,
                ip_id: 0,
                down: false,
                next_probe: now,
                unanswered: 0,
                heard_at: now,
                narrow_path: None,
                burst_at: None,
                waiting: VecDeque::with_capacity(if amplified { limits.sessions } else { 0 }),
                tls: false,
                unanswered_since: None,
                counters: ServiceCounters { heard: u64::from(now), ..ServiceCounters::default() },
            })
            .collect();
        let pool = (!config.pool.is_empty()).then(|| {
            Pool::new(&config.pool, config.worker, config.workers, limits.identities, timing::QUARANTINE)
        });
        let store = Store::new(limits.held_bytes);
        Engine {
            hold_limit: ticks(config.hold_limit_ns),
            gap_timeout: ticks(config.gap_timeout_ns),
            services,
            connections: Connections::new(limits.connections),
            sessions: Sessions::new(limits.sessions),
            by_client: Table::new(limits.connections),
            earlier: 0,
            by_identity: Table::new(limits.sessions),
            room: Room::new(store.places(), limits.places_per_connection()),
            store,
            wheel: Wheel::new(limits.sessions + limits.connections, now),
            boards: Slab::new(limits.sessions.min(MAX_BOARDS)),
            pool,
            udp: Udp::new(&config),
            copies: Copies::new(config.copies_millionths, config.worker, config.workers),
            ports: Ports::new(config.seed),
            dirty: Vec::with_capacity(4 * BATCH),
            answered_last: NONE,
            looked_up_together: BATCH,
            looked: Vec::with_capacity(BATCH),
            lingering: VecDeque::with_capacity(MAX_LINGERING),
            idle_look: (now, 0),
            counters: Counters::default(),
            capture_to_transmit: Histogram::default(),
            target_response: Histogram::default(),
            lag: Lag::default(),
            sent_at_once: 0,
            stopping: None,
            capture_time: None,
            #[cfg(test)]
            step_by_step: false,
            config,
        }
    }

    /// Says how packets to a service's target leave, or that they cannot (no route, next hop unresolved).
    pub fn set_link(&mut self, service: usize, link: Option<Link>) {
        if service >= self.services.len() {
            return self.udp.set_link(service - self.services.len(), link);
        }
        let state = &mut self.services[service];
        state.template = link.map(|link| Template::new(&link, &state.target, WINDOW));
        if let Some(link) = link {
            self.narrow(service as u16, link.mtu);
        }
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The same by service, those of UDP last.
    pub fn service_counters(&self) -> impl Iterator<Item = ServiceCounters> {
        let of_tcp = self.services.iter().map(|service| {
            let heard = u64::from(service.heard_at).wrapping_sub(service.counters.heard);
            ServiceCounters { heard, ..service.counters }
        });
        of_tcp.chain(self.udp.service_counters())
    }

    /// From capture to transmission, of data sent for the first time, and from the first byte of a turn sent to the first byte of its
    /// response.
    pub fn histograms(&self) -> (&Histogram, &Histogram) {
        (&self.capture_to_transmit, &self.target_response)
    }

    /// For each service, whether a client of it spoke TLS, which cannot be replayed.
    pub fn tls_seen(&self) -> impl Iterator<Item = bool> {
        self.services.iter().map(|service| service.tls)
    }

    /// The delays from capture to transmission since the last call.
    pub fn take_lag(&mut self) -> Lag {
        core::mem::take(&mut self.lag)
    }

    /// Momentary values.
    pub fn gauges(&self) -> Gauges {
        Gauges {
            sessions_live: self.sessions.len() as u64,
            connections_live: self.connections.len() as u64,
            held_bytes: self.store.held_bytes(),
        }
    }

    /// How far the tables are filled that grow with sessions and with held data: their next pages can be made ready by who has the time.
    pub fn frontiers(&self) -> [Frontier; 7] {
        let ([connections, origins], [sessions, turns]) =
            (self.connections.frontiers(), self.sessions.frontiers());
        let [segments, bytes] = self.store.frontiers();
        let timers = self.wheel.frontier(self.sessions.high_water());
        [connections, origins, sessions, turns, segments, bytes, timers]
    }

    /// Walks everything and measures what is pending: for reports and tests, not for the hot path.
    pub fn pending(&self) -> Pending {
        let mut pending = Pending::default();
        for session in self.live_sessions() {
            pending.sessions += 1;
            pending.replay_bytes += self.undelivered(session);
        }
        for index in 0..self.connections.high_water() {
            let mut segment = self.connections.out_of_order(index);
            while segment != NONE {
                pending.out_of_order_bytes += u64::from(self.store[segment].len);
                segment = self.store[segment].next;
            }
        }
        pending
    }

    /// The live identities, for a new or returned assistant: `(place, service, identity)`, from place `from` on.
    pub fn identities(&self, from: u32) -> impl Iterator<Item = (u32, u16, Endpoint)> {
        let of_tcp = (from..self.sessions.high_water()).filter_map(|index| {
            let session = &self.sessions[index];
            (session.state != State::Closed).then(|| (index, session.service, self.sessions.identity(index)))
        });
        // The places of UDP follow on all that TCP can have.
        let (first, services) = (self.config.limits.sessions as u32, self.services.len() as u16);
        let of_udp = self.udp.identities(from.saturating_sub(first));
        of_tcp.chain(
            of_udp.map(move |(place, service, identity)| (first + place, services + service, identity)),
        )
    }

    pub(crate) fn live_sessions(&self) -> impl Iterator<Item = u32> {
        (0..self.sessions.high_water()).filter(|&index| self.sessions[index].state != State::Closed)
    }

    /// Bytes given to the session that its target has not acknowledged.
    fn undelivered(&self, s: u32) -> u64 {
        let (session, last) = (&self.sessions[s], self.sessions.last_segment(s));
        let mut bytes = 0;
        let mut segment = session.una_segment;
        while segment != NONE {
            let stored = &self.store[segment];
            let acknowledged = session.snd_una.wrapping_sub(stored.seq) as i32;
            bytes += u64::from(stored.len - acknowledged.clamp(0, stored.len as i32) as u32);
            segment = segment_after(segment, last, stored.next);
        }
        bytes
    }

    /// A tick before which nothing needs to be done by the clock, as ns from `now_ns`; `None`: nothing is waiting.
    pub fn next_deadline_ns(&self, now_ns: u64) -> Option<u64> {
        let ahead = |at: Tick| (at.wrapping_sub(tick(now_ns)) as i32).max(0) as u64;
        let idle_look = (self.connections.len() > 0).then_some(self.idle_look.0);
        let next = self.wheel.next().into_iter().chain(idle_look).map(ahead).min()?;
        Some(next << 16)
    }

    // ---- opening ----

    /// The services that a captured destination belongs to: those with its very address, else those with any.
    pub(crate) fn services_of(&self, server: &Endpoint) -> (bool, Endpoint) {
        if self.services.iter().any(|s| s.online == *server) {
            return (true, *server);
        }
        let any = Endpoint { ip: ANY, port: server.port };
        (self.services.iter().any(|s| s.online == any), any)
    }

    pub(crate) fn in_sample(&self, client: &Endpoint) -> bool {
        u64::from(flow_hash(FLOW_SEED, &client.ip, client.port)) < self.config.sample_threshold
    }

    pub(crate) fn next_copies(&mut self) -> u16 {
        self.copies.next()
    }

    /// Makes a connection, with as many copies as it is the next one's turn to have, and puts it in the client table.
    pub(crate) fn new_connection(&mut self, mut new: NewConnection, now: Tick) -> Option<u32> {
        let (_, source) = self.services_of(&new.server);
        let of_it =
            |service: &&ServiceState| service.online == source && self.family_fits(&new.connection, service);
        let services = self.services.iter().filter(of_it).count();
        let copies = new.copies().unwrap_or_else(|| self.next_copies());
        new.set_copies(copies, services);
        if self.connections.len() == 0 {
            // Nobody needed to look since the last one was forgotten.
            self.idle_look.0 = now.wrapping_add(timing::IDLE_LOOK);
        }
        let c = self.connections.insert(new)?;
        self.by_client.insert(self.connections.hash(c, self.config.seed), c);
        Some(c)
    }

    /// Whether every copy of the connection has a session that takes its data.
    pub(crate) fn has_all_sessions(&self, c: u32) -> bool {
        let connection = &self.connections[c];
        u32::from(connection.takers) >= connection.wanted()
    }

    /// Whether the connection's sessions have a source address for the service's target.
    fn family_fits(&self, connection: &Connection, service: &ServiceState) -> bool {
        self.pool.is_some() || is_v4(&connection.client.ip) == is_v4(&service.target.ip)
    }

    /// Opens the sessions that the connection wants and does not have; each begins with the byte after `iss`.
    pub(crate) fn open_sessions<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        iss: u32,
        joined: bool,
        out: &mut O,
    ) {
        let wanted = self.connections.origin(c).copies();
        let mut family_refused = false;
        let (_, source) = self.services_of(self.connections.server(c));
        for service in 0..self.services.len() as u16 {
            if self.services[usize::from(service)].online != source {
                continue;
            }
            if !self.family_fits(&self.connections[c], &self.services[usize::from(service)]) {
                // For each copy once, not at every turn.
                if !self.connections.origin(c).has(Origin::FAMILY_COUNTED) {
                    self.counters[Counter::SessionsWanted] += u64::from(wanted);
                    self.counters[Counter::SessionsRefusedFamily] += u64::from(wanted);
                }
                family_refused = true;
                continue;
            }
            let mut live = 0;
            let mut session = self.connections[c].first_session;
            while session != NONE {
                let s = &self.sessions[session];
                live += u16::from(s.service == service && s.cut.is_none());
                session = s.next_copy;
            }
            for copy in live..wanted {
                if let Some(s) = self.open_session(now_ns, c, service, copy, iss, out) {
                    self.sessions[s].turn.set(Turn::JOINED, joined);
                }
            }
        }
        if family_refused {
            self.connections.origin_mut(c).set(Origin::FAMILY_COUNTED, true);
        }
    }

    pub(crate) fn open_session<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        service: u16,
        copy: u16,
        iss: u32,
        out: &mut O,
    ) -> Option<u32> {
        self.counters[Counter::SessionsWanted] += 1;
        let now = tick(now_ns);
        let state = &mut self.services[usize::from(service)];
        if state.down {
            if !state.probe_is_due(now) {
                self.counters[Counter::SessionsRefusedTargetDown] += 1;
                return None;
            }
            state.next_probe = now.wrapping_add(timing::DOWN_PROBE);
        }
        // A burst to a target that answers is none of these: copies of a thousand connections are opened at once.
        let silent =
            state.unanswered_since.is_some_and(|since| now.wrapping_sub(since) >= timing::SILENT_AFTER);
        if silent && state.unanswered >= self.config.limits.unanswered_syns {
            self.counters[Counter::SessionsRefusedUnanswered] += 1;
            return None;
        }
        let target = state.target;
        let connection = self.connections[c];
        // A stored segment counts the sessions that need it in 16 bits.
        if connection.takers == u16::MAX {
            self.counters[Counter::SessionsRefusedLimit] += 1;
            return None;
        }
        let Some(identity) = self.choose_identity(now, connection.client, &target, copy, Protocol::Tcp)
        else {
            self.counters[Counter::SessionsRefusedPool] += 1;
            return None;
        };
        let hash = pair_hash(self.config.seed, &identity.ip, identity.port, &target.ip, target.port);
        let mut session = Session::new(identity, service, c, iss);
        session.timestamps = connection.timestamps;
        let mut turns = Turns::default();
        if self.connections.origin(c).has(Origin::MULTIPLEXED) {
            turns.ahead = Ahead::FLOWING;
        }
        session.next_copy = connection.first_session;
        let Some(index) = self.sessions.insert(session, turns, &identity) else {
            self.release_identity(&identity, now);
            self.counters[Counter::SessionsRefusedLimit] += 1;
            return None;
        };
        self.by_identity.insert(hash, index);
        self.connections[c].first_session = index;
        self.connections[c].takers += 1;
        self.counters[Counter::SessionsOpened] += 1;
        self.services[usize::from(service)].counters.sessions_opened += 1;
        out.register(service, identity);
        let shift_us = self.shift_us(index);
        if shift_us > 0 {
            let start = now.wrapping_add(ticks(u64::from(shift_us) * 1000).max(1));
            self.sessions[index].rto_at = Some(Due::at(start));
            self.arm_session(index);
        } else {
            self.ask(now_ns, index, out);
        }
        Some(index)
    }

    pub(crate) fn choose_identity(
        &mut self,
        now: Tick,
        client: Endpoint,
        target: &Endpoint,
        copy: u16,
        protocol: Protocol,
    ) -> Option<Endpoint> {
        if let Some(pool) = &mut self.pool {
            return pool.take(now);
        }
        if copy == 0 && !self.in_use(protocol, &client, target) {
            return Some(client);
        }
        if self.ports.has_none(&client.ip, target, now) {
            return None;
        }
        // Another port of the client's own address, of those that capture gives to this worker: another worker's client may have one
        // of the rest.
        let workers = self.config.workers.max(1);
        for _ in 0..128 * workers {
            let candidate = Endpoint { ip: client.ip, port: self.ports.candidate() };
            let shard = flow_hash(FLOW_SEED, &candidate.ip, candidate.port) % workers;
            if shard == self.config.worker && !self.in_use(protocol, &candidate, target) {
                return Some(candidate);
            }
        }
        self.ports.set_none(client.ip, *target, now);
        None
    }

    fn in_use(&self, protocol: Protocol, identity: &Endpoint, target: &Endpoint) -> bool {
        let found = match protocol {
            Protocol::Tcp => self.find_identity(identity, target),
            Protocol::Udp => self.udp.find_identity(self.config.seed, identity, target),
        };
        found.is_some()
    }

    /// An identity of the pool rests.
    pub(crate) fn release_identity(&mut self, identity: &Endpoint, now: Tick) {
        if let Some(pool) = &mut self.pool {
            pool.release(identity, now);
        }
    }

    /// A session's place in the identity table.
    pub(crate) fn identity_hash(&self, s: u32) -> u32 {
        let Endpoint { ip, port } = self.sessions.identity(s);
        let target = &self.services[usize::from(self.sessions[s].service)].target;
        pair_hash(self.config.seed, &ip, port, &target.ip, target.port)
    }

    pub(crate) fn find_identity(&self, identity: &Endpoint, target: &Endpoint) -> Option<u32> {
        let hash = pair_hash(self.config.seed, &identity.ip, identity.port, &target.ip, target.port);
        self.by_identity.find(hash, |index| {
            let service = usize::from(self.sessions[index].service);
            self.sessions.identity(index) == *identity && self.services[service].target == *target
        })
    }

    // ---- ending ----

    /// Ends a session: what it did not deliver is counted under `reason`, its identity rests, and its connection goes with its last
    /// session when the client had closed.
    pub(crate) fn end_session<O: Output>(&mut self, now: Tick, s: u32, reason: EndReason, out: &mut O) {
        let session = self.sessions[s];
        debug_assert_ne!(session.state, State::Closed);
        if session.state == State::SynSent && !session.is_unasked() {
            self.services[usize::from(session.service)].unanswered -= 1;
        }
        let (lost, identity) = (self.undelivered(s), self.sessions.identity(s));
        self.counters[reason.lost_bytes()] += lost;
        self.counters[reason.sessions()] += 1;
        self.services[usize::from(session.service)].counters.ended(reason);
        self.unreference(s, session.una_segment);
        self.by_identity.remove(self.identity_hash(s), s);
        self.release_identity(&identity, now);
        self.linger(now, session.service, identity, out);
        if session.armed_at.is_some() {
            self.wheel.cancel(s);
        }
        self.forget_sack(s);
        let entry = &mut self.sessions[s];
        entry.state = State::Closed;
        entry.dirty = false;
        self.sessions.remove(s);
        let c = session.connection;
        self.unlink_session(c, s);
        self.free_head(c);
        self.forget_if_over(c);
    }

    /// The identity stays registered for a while, so that what the target still sends to it is answered.
    fn linger<O: Output>(&mut self, now: Tick, service: u16, identity: Endpoint, out: &mut O) {
        if self.lingering.len() == MAX_LINGERING
            && let Some((_, service, identity)) = self.lingering.pop_front()
        {
            self.unregister_unless_live(service, identity, out);
        }
        self.lingering.push_back((now, service, identity));
    }

    fn unregister_unless_live<O: Output>(&self, service: u16, identity: Endpoint, out: &mut O) {
        let target = self.services[usize::from(service)].target;
        if self.find_identity(&identity, &target).is_none() {
            out.unregister(service, identity);
        }
    }

    fn end_lingering<O: Output>(&mut self, now: Tick, out: &mut O) {
        while let Some(&(since, service, identity)) = self.lingering.front()
            && !before(now, since.wrapping_add(timing::LINGER))
        {
            self.lingering.pop_front();
            self.unregister_unless_live(service, identity, out);
        }
    }

    fn unlink_session(&mut self, c: u32, s: u32) {
        let Session { next_copy: next, cut, .. } = self.sessions[s];
        let connection = &mut self.connections[c];
        connection.takers -= u16::from(cut.is_none());
        if connection.first_session == s {
            connection.first_session = next;
            return;
        }
        let mut at = connection.first_session;
        while self.sessions[at].next_copy != s {
            at = self.sessions[at].next_copy;
        }
        self.sessions[at].next_copy = next;
    }

    /// Drops the session's references from `segment` to the end of what it was given.
    pub(crate) fn unreference(&mut self, s: u32, mut segment: u32) {
        let last = self.sessions.last_segment(s);
        while segment != NONE {
            self.store[segment].references -= 1;
            segment = segment_after(segment, last, self.store[segment].next);
        }
    }

    /// Frees the segments at the head of the connection's list that no session needs.
    pub(crate) fn free_head(&mut self, c: u32) {
        let connection = &mut self.connections[c];
        while connection.head != NONE && self.store[connection.head].references == 0 {
            let segment = self.store[connection.head];
            self.store.remove(connection.head);
            connection.held_places -= segment.places();
            connection.head = segment.next;
        }
        if connection.head == NONE {
            connection.tail = NONE;
        }
    }

    /// Forgets a connection that has no session and from which nothing more will come.
    pub(crate) fn forget_if_over(&mut self, c: u32) {
        let connection = &self.connections[c];
        if connection.phase != Phase::Forgotten
            && connection.first_session == NONE
            && (connection.is_detached() || self.connections.end(c) != End::Open)
        {
            self.forget(c);
        }
    }

    fn forget(&mut self, c: u32) {
        debug_assert_eq!(self.connections[c].first_session, NONE);
        self.drop_out_of_order(c, Counter::BytesGap);
        self.detach(c);
        self.connections.remove(c);
    }

    /// Takes the connection out of the client table.
    pub(crate) fn detach(&mut self, c: u32) {
        let place = core::mem::replace(&mut self.connections[c].place, Place::Detached);
        if place != Place::Detached {
            self.earlier -= u32::from(place == Place::Earlier);
            let hash = self.connections.hash(c, self.config.seed);
            self.by_client.remove(hash, c);
        }
    }

    /// Drops what waits behind a hole, counted as `fate`.
    pub(crate) fn drop_out_of_order(&mut self, c: u32, fate: Counter) {
        let first = self.connections.out_of_order(c);
        self.connections.set_out_of_order(c, NONE);
        self.drop_held(c, first, fate);
    }

    /// The same of what is held after the segment `last`. Returns whether anything is.
    pub(crate) fn drop_out_of_order_after(&mut self, c: u32, last: u32, fate: Counter) -> bool {
        let first = core::mem::replace(&mut self.store[last].next, NONE);
        if first == NONE {
            return false;
        }
        self.connections.cut_out_of_order(c, last);
        self.drop_held(c, first, fate);
        true
    }

    fn drop_held(&mut self, c: u32, mut segment: u32, fate: Counter) {
        while segment != NONE {
            let stored = self.store[segment];
            self.counters[fate] += u64::from(stored.len);
            self.connections[c].held_places -= stored.places();
            self.store.remove(segment);
            segment = stored.next;
        }
    }

    // ---- timers ----

    /// The timer of a hole of a connection, by its number. One of a hole that was filled fires for nothing.
    pub(crate) fn hole_timer(&self, hole: u32) -> u32 {
        self.config.limits.sessions as u32 + hole
    }

    pub(crate) fn arm_hole(&mut self, hole: u32, at: Tick) {
        self.wheel.arm(self.hole_timer(hole), at);
    }

    /// Puts the session's earliest deadline into the wheel, unless its timer fires earlier already.
    #[inline]
    pub(crate) fn arm_session(&mut self, s: u32) {
        let session = &mut self.sessions[s];
        if let Some(deadline) = session.deadline()
            && session.armed_at.is_none_or(|at| before(deadline, at.tick()))
        {
            session.armed_at = Some(Due::at(deadline));
            self.wheel.arm(s, deadline);
        }
    }

    /// Does what the clock asks for.
    pub fn on_timers<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        let now = tick(now_ns);
        let mut next = None;
        while let Some(timer) = self.wheel.expired(now) {
            if let Some(ahead) = self.wheel.after_next()
                && ahead < self.config.limits.sessions as u32
            {
                let session = &self.sessions[ahead];
                session.read_ahead();
                session.read_ahead_acknowledgment();
                self.sessions.turns(ahead).read_ahead();
                if let Some(next) = next.replace(ahead) {
                    self.connections[self.sessions[next].connection].read_ahead();
                }
            }
            if timer < self.config.limits.sessions as u32 {
                self.sessions[timer].armed_at = None;
                if self.sessions[timer].state != State::Closed {
                    self.on_session_timer(now_ns, timer, out);
                }
            } else {
                self.on_hole_timer(now_ns, timer - self.config.limits.sessions as u32, out);
            }
        }
        self.ask_waiting(now_ns, out);
        self.end_idle_connections(now_ns, out);
        self.end_lingering(now, out);
        self.end_idle_flows(now, out);
        if let Some(since) = self.stopping
            && !before(now, since.wrapping_add(timing::STOP_GRACE))
        {
            self.reset_all(now_ns, out);
        }
    }

    fn on_session_timer<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let now = tick(now_ns);
        let due = |at: Option<Due>| at.is_some_and(|at| !before(now, at.tick()));
        let session = &mut self.sessions[s];
        if due(session.release_at) {
            session.release_at = None;
            self.output(now_ns, s, out, &mut None);
        }
        if self.sessions[s].state != State::Closed && due(self.sessions[s].rto_at) {
            self.sessions[s].rto_at = None;
            self.on_retransmission_timeout(now_ns, s, out);
        }
        if self.sessions[s].state != State::Closed && due(self.sessions[s].ack_at) {
            self.send_ack(now_ns, s, out);
        }
        if self.sessions[s].state != State::Closed {
            self.arm_session(s);
        }
    }

    fn on_hole_timer<O: Output>(&mut self, now_ns: u64, hole: u32, out: &mut O) {
        let now = tick(now_ns);
        let Some((c, since)) = self.connections.hole(hole) else { return };
        let at = since.wrapping_add(self.gap_timeout);
        match self.capture_time {
            // That clock may run at any speed: look again soon.
            Some(time) if before(time, at) => {
                self.arm_hole(hole, now.wrapping_add(timing::CAPTURE_CLOCK));
            }
            None if before(now, at) => self.arm_hole(hole, at),
            _ => self.end_hole(now_ns, c, out),
        }
    }

    /// Looks whether connections are idle, at some of them now and then: a timer for each would take more memory than it is worth, and what
    /// takes minutes may take some seconds more.
    fn end_idle_connections<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        let now = tick(now_ns);
        let (at, from) = self.idle_look;
        if before(now, at) {
            return;
        }
        let all = self.connections.high_water();
        let to = all.min(from + timing::IDLE_LOOK_MOST);
        let limits = &self.config.limits;
        let crowded =
            self.connections.len() > limits.connections / 2 || self.sessions.len() > limits.sessions / 2;
        for c in from..to {
            let connection = &self.connections[c];
            let idle = now.wrapping_sub(connection.last_seen) >= connection.idle_limit(crowded);
            // One with a hole has that timer.
            if connection.phase != Phase::Forgotten && idle && !self.connections.has_hole(c) {
                self.on_idle(now_ns, c, out);
            }
        }
        let looks = all.div_ceil(timing::IDLE_LOOK_MOST).max(1);
        let wait = (timing::IDLE_ROUND / looks).min(timing::IDLE_LOOK);
        self.idle_look = (now.wrapping_add(wait), if to == all { 0 } else { to });
    }

    fn on_idle<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let connection = &mut self.connections[c];
        if connection.first_session == NONE {
            self.forget(c);
            return;
        }
        // The client is gone without a word: its sessions end as if it had closed. Whether they have, and it can be forgotten, the next round
        // sees.
        connection.last_seen = tick(now_ns).wrapping_sub(timing::CONNECTION_IDLE);
        let mut s = connection.first_session;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            self.cut(s, EndReason::Completed);
            self.output(now_ns, s, out, &mut None);
            s = next;
        }
    }

    /// A hole stayed open too long: the sessions end after what came before it, and join again at the next turn.
    pub(crate) fn give_up_hole<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        if let Some(behind) = self.behind_hole(c)
            && self.connections.out_of_order(c) != NONE
        {
            // Unless its client has not sent what is behind the last hole.
            self.connections.set_left(c, Some(Left::before(behind.hole)));
            let connection = &mut self.connections[c];
            connection.next_seq = behind.end;
            if connection.ack_advances(behind.ack) {
                connection.last_ack = behind.ack;
            }
        }
        self.drop_out_of_order(c, Counter::BytesGap);
        self.connections[c].phase = Phase::Watching;
        self.end_behind_hole(c);
        let mut s = self.connections[c].first_session;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            if self.sessions[s].cut.is_none() {
                self.cut(s, EndReason::Gap);
                self.output(now_ns, s, out, &mut None);
            }
            s = next;
        }
        if !self.connections[c].is_detached() {
            self.forget_if_over(c);
        }
    }

    /// Nothing is waited for any more: a FIN behind a hole, near what was last seen, is the end all the same. A reset there is not: its client
    /// may go on.
    pub(crate) fn end_behind_hole(&mut self, c: u32) {
        if let Some(end) = self.connections.early_end(c) {
            self.connections.set_early_end(c, None);
            if !end.is_reset && self.fits(c, end.seq, end.ack) {
                self.connections.set_end(c, End::Fin { need: 0 });
            }
        }
    }

    // ---- capture files ----

    /// Packets come from a file whose time is now `capture_ns`: how long holes stay open is measured by it, however fast the file is read.
    /// To be told before each batch.
    pub fn set_capture_time(&mut self, capture_ns: u64) {
        self.capture_time = Some(tick(capture_ns));
    }

    /// No more packets of the connections that are there will come. Holes are given up; connections that did not end are closed after what
    /// they have, and forgotten, so that packets of the same addresses that come later are of new connections.
    pub fn end_of_capture<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        for c in 0..self.connections.high_water() {
            self.end_connection(now_ns, c, out);
        }
    }

    /// Nothing more of a connection, if it is one, will be captured.
    fn end_connection<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let over =
            |this: &Self| this.connections[c].phase == Phase::Forgotten || this.connections[c].is_detached();
        if over(self) {
            return;
        }
        if self.connections.has_hole(c) {
            self.give_up_hole(now_ns, c, out);
        }
        if !over(self) {
            self.replace(now_ns, c, out);
        }
    }

    // ---- sampling ----

    /// Replays the connections with flow hashes below `threshold` from now on. Those that leave the sample are closed at the targets after what
    /// they have; those that enter it are joined at their next turn. Walks all connections when it falls.
    pub fn set_sample<O: Output>(&mut self, now_ns: u64, threshold: u64, out: &mut O) {
        let before = core::mem::replace(&mut self.config.sample_threshold, threshold);
        if threshold >= before {
            return;
        }
        for c in 0..self.connections.high_water() {
            if !self.in_sample(&self.connections[c].client) {
                self.end_connection(now_ns, c, out);
            }
        }
    }

    /// How many sessions have something to do that needs no further captured packet: connect, deliver, be answered (within the hold limit),
    /// close. Walks all sessions: for looks now and then.
    pub fn busy_sessions(&self, now_ns: u64) -> u64 {
        let hold_limit_us = (self.config.hold_limit_ns / 1000) as u32;
        let busy = |s: u32| {
            let session = &self.sessions[s];
            let waited_us = micros(now_ns).wrapping_sub(session.turn_sent_us);
            session.state != State::Established
                || session.una_segment != NONE
                || session.turn.has(Turn::AWAITS_RESPONSE) && waited_us < hold_limit_us
                || session.cut.is_some()
                || self.connections.end(session.connection) != End::Open
        };
        self.live_sessions().filter(|&s| busy(s)).count() as u64 + self.udp.waiting(now_ns, hold_limit_us)
    }

    // ---- stopping ----

    /// Begins to end every session cleanly: what is in flight may finish, then FIN. After 500 ms the rest is reset by `on_timers`;
    /// `stopped` says when nothing is left.
    pub fn stop<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(tick(now_ns));
        for c in 0..self.connections.high_water() {
            self.drop_out_of_order(c, Counter::BytesStopping);
        }
        for s in 0..self.sessions.high_water() {
            match self.sessions[s].state {
                State::Closed => {}
                State::SynSent => {
                    // Not known at the target, or about to be: the reset takes it back.
                    self.send_reset(now_ns, s, out);
                    self.end_session(tick(now_ns), s, EndReason::Stopped, out);
                }
                _ => {
                    self.cut_unsent(s, EndReason::Stopped);
                    self.output(now_ns, s, out, &mut None);
                    if self.sessions[s].state != State::Closed {
                        self.arm_session(s);
                    }
                }
            }
        }
    }

    /// Whether `stop` has finished.
    pub fn stopped(&self) -> bool {
        self.stopping.is_some() && self.sessions.len() == 0
    }

    fn reset_all<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        for s in 0..self.sessions.high_water() {
            if self.sessions[s].state != State::Closed {
                self.send_reset(now_ns, s, out);
                self.end_session(tick(now_ns), s, EndReason::Stopped, out);
            }
        }
    }
}
