//! The invariants of the engine's state, walked in full: for tests of debug builds. Nothing here changes anything.

use crate::connection::{Phase, Place};
use crate::counters::{Counter, ServiceCounters};
use crate::engine::Engine;
use crate::session::{State, segment_after};
use crate::slab::NONE;
use crate::timer::{Due, before};
use alloc::{vec, vec::Vec};

impl Engine {
    /// Panics when lists, reference counts, tables, timers and sums contradict each other.
    pub fn check(&self) {
        let mut references: Vec<u32> = Vec::new();
        let mut held = 0;
        let (mut sessions, mut rare, mut earlier) = (0, 0, 0);
        for c in 0..self.connections.high_water() {
            let connection = &self.connections[c];
            if connection.phase == Phase::Forgotten {
                continue;
            }
            let mut in_connection = 0;
            let mut last = NONE;
            let mut segment = connection.head;
            while segment != NONE {
                let stored = &self.store[segment];
                references.resize(references.len().max(segment as usize + 1), 0);
                references[segment as usize] = u32::from(stored.references);
                in_connection += stored.places();
                held += u64::from(stored.len);
                last = segment;
                segment = stored.next;
            }
            earlier += u32::from(connection.place == Place::Earlier);
            assert_eq!(last, connection.tail, "the tail is the end of the list");
            let mut segment = self.connections.out_of_order(c);
            let (mut previous_end, mut walked_to) = (None, self.connections.walked_to(c));
            while segment != NONE {
                let stored = &self.store[segment];
                assert_eq!(stored.references, 0, "no session has what waits for order");
                assert!(
                    previous_end.is_none_or(|end: u32| (stored.seq.wrapping_sub(end) as i32) >= 0),
                    "sorted"
                );
                previous_end = Some(stored.end());
                if walked_to == segment {
                    walked_to = NONE;
                }
                in_connection += stored.places();
                held += u64::from(stored.len);
                last = segment;
                segment = stored.next;
            }
            assert_eq!(walked_to, NONE, "a walk leads to what is held");
            if self.connections.out_of_order(c) != NONE {
                assert_eq!(last, self.connections.out_of_order_tail(c));
            }
            let hole = self.connections.check(c);
            rare += usize::from(self.connections.is_rare(c));
            assert!(
                hole.is_none_or(|hole| self.wheel.stands_at(self.hole_timer(hole)).is_some()),
                "a hole has a timer"
            );
            assert_eq!(in_connection, connection.held_places, "what a connection holds");

            let mut takers = 0;
            let mut s = connection.first_session;
            while s != NONE {
                let session = &self.sessions[s];
                assert_eq!(session.connection, c);
                assert_ne!(session.state, State::Closed, "an ended session in its connection's list");
                self.check_session(s, &mut references);
                sessions += 1;
                takers += u16::from(session.cut.is_none());
                s = session.next_copy;
            }
            assert_eq!(takers, connection.takers, "sessions of a connection that take data");
            let mut segment = connection.head;
            while segment != NONE {
                assert_eq!(references[segment as usize], 0, "references are those of the sessions");
                segment = self.store[segment].next;
            }
            assert_eq!(
                self.by_client.find(self.connections.hash(c, self.config.seed), |index| index == c).is_some(),
                !connection.is_detached(),
                "a connection is in the client table unless detached"
            );
        }
        assert_eq!(held, self.store.held_bytes(), "every held segment is in a list");
        assert_eq!(earlier, self.earlier, "connections whose addresses others have as well");
        assert_eq!(rare, self.connections.rare(), "what is rare is a connection's");
        assert_eq!(sessions, self.sessions.len(), "every session is in its connection's list");
        self.sessions.check(self.live_sessions());
        for (number, service) in self.services.iter().enumerate() {
            let unanswered = (0..self.sessions.high_water())
                .map(|s| &self.sessions[s])
                .filter(|session| session.state == State::SynSent && !session.is_unasked())
                .filter(|session| usize::from(session.service) == number);
            assert_eq!(unanswered.count() as u32, service.unanswered, "SYNs that wait for an answer");
        }
        assert!(self.dirty.is_empty(), "no session is left over from a batch");
        self.check_services();
    }

    /// What is counted by service adds up to what is counted of all.
    fn check_services(&self) {
        let mut sum = ServiceCounters::default();
        for counters in self.service_counters() {
            sum.add(&counters);
        }
        let c = &self.counters;
        let all = ServiceCounters {
            sessions_opened: c[Counter::SessionsOpened],
            sessions_established: sum.sessions_established,
            sessions_refused: c[Counter::SessionsRefused],
            sessions_unanswered: c[Counter::SessionsHandshakeTimeout] + c[Counter::SessionsRetransmitTimeout],
            sessions_ended: c.sum(Counter::SessionsCompleted, Counter::SessionsStopped),
            datagrams_sent: c[Counter::DatagramsSent],
            datagrams_answered: c[Counter::DatagramResponses],
            packets_no_link: c[Counter::SegmentsNoLink] + c[Counter::DatagramsNoLink],
            heard: sum.heard,
        };
        assert_eq!(sum, all, "by service, and of all");
        assert!(sum.sessions_established + sum.sessions_refused <= sum.sessions_opened, "{sum:?}");
    }

    /// One session; takes what it holds off `references`.
    fn check_session(&self, s: u32, references: &mut [u32]) {
        let session = &self.sessions[s];
        session.check();
        let last = self.sessions.last_segment(s);
        let mut positions = vec![NONE];
        let mut segment = session.una_segment;
        let mut next_seq = None;
        while segment != NONE {
            let stored = &self.store[segment];
            assert!(next_seq.is_none_or(|seq| seq == stored.seq), "a session's stream has no hole");
            next_seq = Some(stored.end());
            positions.push(segment);
            references[segment as usize] =
                references[segment as usize].checked_sub(1).expect("no fewer references than sessions");
            segment = segment_after(segment, last, stored.next);
        }
        assert!(
            positions.contains(&session.next_segment),
            "the send position is in what the session was given"
        );
        if session.next_segment != NONE && session.state != State::SynSent {
            let stored = &self.store[session.next_segment];
            let offset = session.snd_nxt.wrapping_sub(stored.seq);
            assert!(offset < stored.len, "the send position is in its segment: {session:?} {stored:?}");
        }
        assert!((session.snd_max().wrapping_sub(session.snd_nxt) as i32) >= 0);
        assert!((session.snd_nxt.wrapping_sub(session.snd_una) as i32) >= 0);
        assert!(
            session.snd_una == session.snd_max() || session.rto_at.is_some(),
            "what is in flight has a timer: {session:?}"
        );
        assert_eq!(
            session.armed_at,
            self.wheel.stands_at(s).map(Due::at),
            "a session knows where its timer stands"
        );
        if let Some(deadline) = session.deadline() {
            let stands = self.wheel.stands_at(s).expect("a session with a deadline has its timer armed");
            assert!(!before(deadline, stands), "the timer fires when it must, or earlier");
        }
        assert!(
            self.by_identity.find(self.identity_hash(s), |index| index == s).is_some(),
            "a session can be found"
        );
    }
}
