//! The engine's state, and what it tells of itself. What it does is in the files of its parts: each has functions of [`Engine`].
//!
//! Invariants:
//! - A session is in the identity table from its SYN to its end; a connection is in the client table unless detached.
//! - A stored segment's `references` are the sessions whose `una_segment`..tail range holds it; the head of a connection's list is
//!   freed when its references are zero.
//! - Every deadline of a session is at or after the time its timer stands at in the wheel.

use crate::capture::Looked;
use crate::config::{Config, timing};
use crate::connection::{Connections, End};
use crate::counters::{Counters, Pending, ServiceCounters};
use crate::histogram::Histogram;
use crate::identity::{Copies, Pool, Ports};
use crate::room::Room;
use crate::sack::{Board, MAX_BOARDS};
use crate::sender::{WINDOW, micros};
use crate::session::{Sessions, State, Turn, segment_after};
use crate::slab::{Frontier, NONE, Slab};
use crate::store::Store;
use crate::table::Table;
use crate::timer::{Tick, Wheel, tick, ticks};
use crate::udp::Udp;
use crate::wire::{Link, Template};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use replayer_common::addr::Endpoint;

/// Packets and records are handled in batches of at most this many.
pub const BATCH: usize = 64;

/// Identities that stay registered after their session; the oldest goes first when there are more.
pub(crate) const MAX_LINGERING: usize = 1 << 16;

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
    pub(crate) pool: Option<Pool>,
    pub(crate) udp: Udp,
    pub(crate) copies: Copies,
    pub(crate) ports: Ports,
    pub(crate) dirty: Vec<u32>,
    /// The session that a record of the target's was of last: a place, whatever has become of it; `NONE` before the first.
    pub(crate) answered_last: u32,
    /// How many records are looked up together: fewer than a batch where copies are answered in their order.
    pub(crate) looked_up_together: usize,
    /// What the first pass over a batch found; empty between batches.
    pub(crate) looked: Vec<Looked>,
    pub(crate) lingering: VecDeque<(Tick, u16, Endpoint)>,
    /// When connections are looked at next whether they are idle, and from which place on.
    pub(crate) idle_look: (Tick, u32),
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
    pub(crate) fn undelivered(&self, s: u32) -> u64 {
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

    /// Packets come from a file whose time is now `capture_ns`: how long holes stay open is measured by it, however fast the file is read.
    /// To be told before each batch.
    pub fn set_capture_time(&mut self, capture_ns: u64) {
        self.capture_time = Some(tick(capture_ns));
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
}
