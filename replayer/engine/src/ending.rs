//! Ending: a session for whatever reason, a connection that is over, those that leave the sample or whose file ends, and all of them at a stop.

use crate::config::timing;
use crate::connection::{End, Phase, Place};
use crate::counters::{Counter, EndReason};
use crate::engine::{Engine, MAX_LINGERING};
use crate::output::Output;
use crate::session::{Session, State, segment_after};
use crate::slab::NONE;
use crate::timer::{Tick, before, tick};
use replayer_common::addr::Endpoint;

impl Engine {
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

    pub(crate) fn end_lingering<O: Output>(&mut self, now: Tick, out: &mut O) {
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

    pub(crate) fn forget(&mut self, c: u32) {
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

    pub(crate) fn reset_all<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        for s in 0..self.sessions.high_water() {
            if self.sessions[s].state != State::Closed {
                self.send_reset(now_ns, s, out);
                self.end_session(tick(now_ns), s, EndReason::Stopped, out);
            }
        }
    }
}
