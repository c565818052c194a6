//! Opening connections and sessions, with the identities that they get.

use crate::config::timing;
use crate::connection::{Connection, NewConnection, Origin};
use crate::counters::Counter;
use crate::engine::{Engine, ServiceState};
use crate::gate::{Ahead, Turns};
use crate::output::Output;
use crate::session::{Session, Turn};
use crate::slab::NONE;
use crate::timer::{Due, Tick, tick, ticks};
use replayer_common::addr::{ANY, Endpoint, is_v4};
use replayer_common::hash::{FLOW_SEED, flow_hash, pair_hash};
use replayer_common::packet::Protocol;

impl Engine {
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
        if self.ports.has_none(&client.ip, target, protocol, now) {
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
        self.ports.set_none(client.ip, *target, protocol, now);
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
}
