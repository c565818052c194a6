//! What the clock asks for: sessions' timers, holes that stay open, connections and identities that nothing comes of any more.

use crate::config::timing;
use crate::connection::{End, Left, Phase};
use crate::counters::{Counter, EndReason};
use crate::engine::Engine;
use crate::output::Output;
use crate::session::State;
use crate::slab::NONE;
use crate::timer::{Due, Tick, before, tick};

impl Engine {
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
}
