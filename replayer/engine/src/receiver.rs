//! What the target's segments do to a session. Only their headers come, some may be lost on the way, and none is ever asked
//! for again: the highest number seen counts as received, so a lost record does no harm.

use crate::config::timing;
use crate::connection::End;
use crate::counters::{Counter, EndReason};
use crate::engine::{BATCH, Engine};
use crate::fast_path::COPIES_AHEAD;
use crate::output::Output;
use crate::sack::NO_BOARD;
use crate::sender::micros;
use crate::session::{Owes, State, Turn, segment_after, seq_before};
use crate::slab::NONE;
use crate::timer::{Due, tick};
use replayer_common::addr::{Endpoint, is_v4};
use replayer_common::hash::pair_hash;
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};

/// No congestion window is larger, bytes: the largest window that TCP can say (RFC 7323 section 2.3).
pub(crate) const MAX_WINDOW: u32 = 1 << 30;

/// Window scale shifts above this are treated as this (RFC 7323 section 2.3).
const MAX_WINDOW_SCALE: u8 = 14;

/// After so many records of copies in their order only one is looked up when the order ends: most likely the copies of another connection begin
/// there. If not, twice as many are next.
const MANY_IN_ORDER: usize = 16;

impl Engine {
    /// Handles header records of the target's segments, in the order in which they came.
    pub fn on_responses<O: Output>(&mut self, now_ns: u64, records: &[ResponseHeader], out: &mut O) {
        self.counters[Counter::ResponsesReceived] += records.len() as u64;
        for batch in records.chunks(BATCH) {
            let mut rest = batch;
            while !rest.is_empty() {
                let in_order = self.on_copies_in_order(now_ns, rest, out);
                rest = &rest[in_order..];
                if in_order >= MANY_IN_ORDER {
                    self.looked_up_together = 1;
                }
                let (together, later) = rest.split_at(rest.len().min(self.looked_up_together));
                self.on_looked_up(now_ns, together, out);
                rest = later;
            }
            self.finish_batch(now_ns, out);
            self.ask_waiting(now_ns, out);
        }
    }

    /// Handles records as long as each is of the copy that comes after the one before: a target answers copies in the order in which they came
    /// to it, and their sessions lie side by side, so that nothing has to be looked up. Returns how many those were.
    fn on_copies_in_order<O: Output>(
        &mut self,
        now_ns: u64,
        records: &[ResponseHeader],
        out: &mut O,
    ) -> usize {
        #[cfg(test)]
        if self.step_by_step {
            return 0;
        }
        let mut last = self.answered_last;
        if last == NONE {
            return 0;
        }
        let mut count = 0;
        for record in records {
            let s = self.sessions[last].next_copy;
            if s == NONE || !self.is_live_and_of(s, record) {
                break;
            }
            if s >= COPIES_AHEAD {
                self.sessions[s - COPIES_AHEAD].read_ahead();
                self.sessions[s - COPIES_AHEAD].read_ahead_acknowledgment();
            }
            self.on_response_of(now_ns, s, record, out);
            last = s;
            count += 1;
        }
        self.answered_last = last;
        count
    }

    /// Handles records after looking all of their sessions up.
    fn on_looked_up<O: Output>(&mut self, now_ns: u64, records: &[ResponseHeader], out: &mut O) {
        if records.is_empty() {
            return;
        }
        self.looked_up_together = (2 * self.looked_up_together).min(BATCH);
        // Read ahead as captured packets are: see `on_captured`.
        let mut hashes = [0u32; BATCH];
        for (hash, record) in hashes.iter_mut().zip(records) {
            if let Some(service) = self.services.get(usize::from(record.service)) {
                let target = service.target;
                *hash = pair_hash(self.config.seed, &record.addr, record.port, &target.ip, target.port);
                self.by_identity.read_ahead(*hash);
            }
        }
        self.read_ahead_for(&hashes[..records.len()], records);
        for (&hash, record) in hashes.iter().zip(records) {
            self.on_response(now_ns, hash, record, out);
        }
        self.copies_ahead();
    }

    /// Asks for the sessions of the copies that come after the last one that was looked up.
    #[inline]
    fn copies_ahead(&self) {
        let last = self.answered_last;
        if last != NONE && self.sessions[last].next_copy != NONE {
            for copy in 1..=COPIES_AHEAD.min(last) {
                self.sessions[last - copy].read_ahead();
                self.sessions[last - copy].read_ahead_acknowledgment();
            }
        }
    }

    /// Asks for the sessions, most likely, of a batch of records, and for what they lead to; the table's slots were asked for before.
    fn read_ahead_for(&self, hashes: &[u32], batch: &[ResponseHeader]) {
        let mut places = [NONE; BATCH];
        let places = &mut places[..hashes.len()];
        for ((place, &hash), record) in places.iter_mut().zip(hashes).zip(batch) {
            if let Some(s) = self.by_identity.guess(hash) {
                *place = s;
                let session = &self.sessions[s];
                session.read_ahead();
                session.read_ahead_acknowledgment();
                if record.payload_len > 0 {
                    self.sessions.turns(s).read_ahead();
                }
            }
        }
        for (&place, record) in places.iter().zip(batch).filter(|&(&place, _)| place != NONE) {
            let session = &self.sessions[place];
            let connection = &self.connections[session.connection];
            connection.read_ahead();
            if record.payload_len > 0 {
                // The time for its acknowledgment is sooner than any other.
                self.wheel.read_ahead(place);
            }
            if session.una_segment != NONE {
                replayer_prefetch::line(&self.store[session.una_segment]);
            }
        }
    }

    /// After a batch: each session that it touched sends what it may, then acknowledges if it still has to.
    fn finish_batch<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        while let Some(s) = self.dirty.pop() {
            if !self.sessions[s].dirty {
                continue;
            }
            self.sessions[s].dirty = false;
            self.output(now_ns, s, out, &mut None);
            if self.sessions[s].state == State::Closed {
                continue;
            }
            if self.sessions[s].owes == Owes::AckNow {
                self.send_ack(now_ns, s, out);
            }
            self.arm_session(s);
        }
    }

    fn on_response<O: Output>(&mut self, now_ns: u64, hash: u32, record: &ResponseHeader, out: &mut O) {
        if usize::from(record.service) >= self.services.len() {
            return self.on_datagram_response(now_ns, record);
        }
        match self.by_identity.find(hash, |s| self.is_of(s, record)) {
            Some(s) => {
                self.answered_last = s;
                self.on_response_of(now_ns, s, record, out);
            }
            None => {
                self.counters[Counter::ResponsesUnknown] += 1;
                // Of a session that has ended meanwhile, most often: the target answers all the same.
                self.services[usize::from(record.service)].heard_at = tick(now_ns);
                self.answer_stray(record, Endpoint { ip: record.addr, port: record.port }, out);
            }
        }
    }

    /// Whether a record is of the session, which is a live one's place.
    #[inline(always)]
    fn is_of(&self, s: u32, record: &ResponseHeader) -> bool {
        let Some(service) = self.services.get(usize::from(record.service)) else { return false };
        let session = &self.sessions[s];
        let identity = Endpoint { ip: record.addr, port: record.port };
        let is_it = if is_v4(&service.target.ip) {
            session.has_identity_v4(&identity)
        } else {
            self.sessions.identity(s) == identity
        };
        // Services may share a target.
        is_it
            && (session.service == record.service
                || self.services[usize::from(session.service)].target == service.target)
    }

    /// The same of any place: it is what a search would find.
    #[inline(always)]
    fn is_live_and_of(&self, s: u32, record: &ResponseHeader) -> bool {
        self.sessions[s].state != State::Closed && self.is_of(s, record)
    }

    /// Handles a record of the session.
    #[inline(always)]
    fn on_response_of<O: Output>(&mut self, now_ns: u64, s: u32, record: &ResponseHeader, out: &mut O) {
        let service = &mut self.services[usize::from(record.service)];
        service.unanswered_since = None;
        service.heard_at = tick(now_ns);
        if record.flags & flags::RST == 0 {
            service.down = false;
        }
        if !self.on_usual_acknowledgment(now_ns, s, record) {
            self.on_unusual_response(now_ns, s, record, out);
        }
    }

    #[inline(never)]
    fn on_unusual_response<O: Output>(&mut self, now_ns: u64, s: u32, record: &ResponseHeader, out: &mut O) {
        if !self.sessions[s].dirty {
            self.sessions[s].dirty = true;
            self.dirty.push(s);
        }
        if self.sessions[s].state == State::SynSent {
            self.on_handshake(now_ns, s, record, out);
        } else {
            self.on_segment(now_ns, s, record, out);
        }
    }

    fn on_handshake<O: Output>(&mut self, now_ns: u64, s: u32, record: &ResponseHeader, out: &mut O) {
        let (session, turns) = self.sessions.with_turns(s);
        if session.is_unasked() {
            // Of an older connection from the same address.
            return;
        }
        let ours = record.flags & flags::ACK != 0 && record.ack == session.snd_nxt;
        if record.flags & flags::RST != 0 {
            if ours {
                let service = &mut self.services[usize::from(session.service)];
                service.down = true;
                service.next_probe = tick(now_ns).wrapping_add(timing::DOWN_PROBE);
                self.end_session(tick(now_ns), s, EndReason::Refused, out);
            }
            return;
        }
        if !ours {
            if record.flags & flags::ACK != 0 {
                self.reset_old_connection(now_ns, s, record.ack, out);
            }
            return;
        }
        if record.flags & flags::SYN == 0 {
            return;
        }
        session.state = State::Established;
        self.services[usize::from(session.service)].unanswered -= 1;
        self.services[usize::from(session.service)].counters.sessions_established += 1;
        session.snd_una = record.ack;
        session.rcv_nxt = record.seq.wrapping_add(1);
        turns.begin_at(session.rcv_nxt);
        session.response_at = tick(now_ns);
        turns.response_began = session.response_at;
        // The window of a SYN is never scaled (RFC 7323 section 2.2).
        session.snd_wnd = u32::from(record.window);
        session.snd_wscale = if record.has(present::WINDOW_SCALE)
            && self.connections[session.connection].window_scale().is_some()
        {
            record.window_scale.min(MAX_WINDOW_SCALE)
        } else {
            0
        };
        session.timestamps = session.timestamps && record.has(present::TIMESTAMPS);
        session.ts_recent = record.ts_val;
        if session.timing {
            session.round_trip(micros(now_ns).wrapping_sub(session.timed_at_us));
            session.timing = false;
        }
        session.tries = 0;
        session.rto_at = None;
        session.owes = Owes::AckNow;
        let mss = if record.has(present::MSS) { record.mss } else { 536 };
        self.begin_sending(tick(now_ns), s, mss);
    }

    fn on_segment<O: Output>(&mut self, now_ns: u64, s: u32, record: &ResponseHeader, out: &mut O) {
        let session = &mut self.sessions[s];
        // A late segment of an older connection with these addresses: the target never sends beyond our window.
        let ahead = record.seq.wrapping_sub(session.rcv_nxt) as i32;
        if ahead > self.connections[session.connection].receive_window() as i32 {
            if record.flags & flags::RST == 0 {
                session.owes = Owes::AckNow;
            }
            return;
        }
        if record.flags & flags::RST != 0 {
            // Anything from what we know to be received on: records may have been lost, so the target may be ahead of us.
            if ahead > -(1 << 16) {
                self.on_target_reset(now_ns, s, out);
            }
            return;
        }
        if record.flags & flags::SYN != 0 {
            // Our handshake's last ACK was lost.
            session.owes = Owes::AckNow;
            return;
        }
        if session.timestamps && record.has(present::TIMESTAMPS) {
            if session.is_overtaken(record.ts_val) {
                // An old duplicate (PAWS, RFC 7323 section 5.3). It would count as received, with all before it.
                session.owes = Owes::AckNow;
                return;
            }
            if !seq_before(record.ts_val, session.ts_recent) {
                session.ts_recent = record.ts_val;
            }
        }
        // Anything else says that the target has the connection.
        session.first_alone = false;
        // The payload first: what the acknowledgment makes us send acknowledges it.
        self.on_payload(now_ns, s, record);
        if record.flags & flags::ACK != 0 {
            self.on_acknowledgment(now_ns, s, record, out);
            self.sessions[s].set_limit();
            if self.sessions[s].state == State::Closed {
                return;
            }
        }
        if record.flags & flags::FIN != 0 {
            let end = record.seq.wrapping_add(record.payload_len);
            // The FIN's own number must be the next one: records of data before it may be lost, but not be still to come.
            if self.sessions[s].rcv_nxt == end {
                self.on_target_fin(now_ns, s, out);
            } else {
                self.sessions[s].owes = Owes::AckNow;
            }
        }
    }

    fn on_payload(&mut self, now_ns: u64, s: u32, record: &ResponseHeader) {
        let session = &mut self.sessions[s];
        let mut end = record.seq.wrapping_add(record.payload_len);
        if record.payload_len == 0 && !seq_before(session.rcv_nxt, record.seq) {
            // A keepalive probe repeats an old number and wants an answer (RFC 9293 section 3.8.4).
            if seq_before(record.seq, session.rcv_nxt) && record.flags & flags::FIN == 0 {
                session.owes = Owes::AckNow;
            }
            return;
        }
        if record.payload_len == 0 && record.flags & flags::FIN == 0 {
            // The number before it may be that of a FIN whose record was lost or is late: it is not acknowledged until it comes, for
            // who gets his FIN acknowledged does not send it again.
            end = end.wrapping_sub(1);
            if end == session.rcv_nxt {
                return;
            }
        }
        if !seq_before(session.rcv_nxt, end) {
            session.owes = Owes::AckNow;
            return;
        }
        self.counters[Counter::ResponseBytes] += u64::from(end.wrapping_sub(session.rcv_nxt));
        let (session, turns) = self.sessions.with_turns(s);
        if session.rcv_nxt == turns.base {
            turns.response_began = tick(now_ns);
        }
        session.rcv_nxt = end;
        // What answers a turn acknowledges its first byte; what does not was sent before the turn arrived.
        if seq_before(session.turn_seq, record.ack) {
            if session.turn.has(Turn::AWAITS_RESPONSE) {
                session.turn.set(Turn::AWAITS_RESPONSE, false);
                self.target_response.record(micros(now_ns).wrapping_sub(session.turn_sent_us));
            }
            session.turn.set(Turn::WATCHED, false);
        } else if session.turn.has(Turn::WATCHED) {
            session.turn.set(Turn::WATCHED, false);
            session.whole = 0;
            self.counters[Counter::TurnsReleasedEarly] += 1;
        }
        let (push, fin) = (record.flags & flags::PSH != 0, record.flags & flags::FIN != 0);
        let client_mss = self.connections[session.connection].mss;
        turns.note_response(session, client_mss, record.payload_len, end, push, fin, tick(now_ns));
        // A record that was lost is made up for by the next: a segment says that all before it was sent.
        // RFC 9293 section 3.8.6.3: at least every second full segment at once, the rest within the delay.
        session.unacked_segments = session.unacked_segments.saturating_add(1);
        if session.unacked_segments >= 2 {
            session.owes = Owes::AckNow;
        } else if session.ack_at.is_none() {
            session.ack_at = Some(Due::at(tick(now_ns).wrapping_add(timing::DELAYED_ACK)));
            if session.owes == Owes::Nothing {
                session.owes = Owes::Ack;
            }
        }
    }

    fn on_acknowledgment<O: Output>(&mut self, now_ns: u64, s: u32, record: &ResponseHeader, out: &mut O) {
        let now = tick(now_ns);
        let session = &mut self.sessions[s];
        let window = u32::from(record.window) << session.snd_wscale;
        let ack = record.ack;
        if seq_before(ack, session.snd_una) || seq_before(session.snd_max(), ack) {
            return;
        }
        if ack == session.snd_una {
            // RFC 5681 section 2; a SACK block tells of an arrival whatever the window does (RFC 6675 section 2).
            let sacked = record.sack_count > 0 && seq_before(ack, record.sack[0].0);
            let repeated = record.payload_len == 0
                && window > 0
                && (window == session.snd_wnd || sacked)
                && session.snd_una != session.snd_max()
                && record.flags & flags::FIN == 0;
            session.snd_wnd = window;
            if window == 0 {
                // It lives and has no room: never given up for that (RFC 9293 section 3.8.6.1), but not probed ever faster either.
                session.tries = session.tries.min(timing::PROBE_BACKOFF);
            }
            if !repeated {
                if window > 0 && session.snd_una == session.snd_max() && session.next_segment != NONE {
                    // An answer to a window probe: the target lives.
                    session.tries = 0;
                    session.rto_at = None;
                }
                return;
            }
            session.dup_acks = session.dup_acks.saturating_add(1);
            self.note_sack(s, record);
            let sacked = self.sacked(s);
            let (session, trouble) = self.sessions.with_trouble(s);
            // RFC 6675 section 5: acknowledgments may have been lost on their way to us.
            let lost = session.dup_acks >= 3 || sacked > 2 * u32::from(session.mss);
            let in_recovery = trouble.as_ref().is_some_and(|trouble| trouble.in_recovery);
            // After a timeout duplicates are answers to what the timeout sent again (RFC 6582 section 3.2, step 1).
            let timed_out = trouble.is_some_and(|trouble| seq_before(ack, trouble.recover));
            if lost && !in_recovery && !timed_out {
                let (session, trouble) = self.sessions.in_trouble(s);
                trouble.in_recovery = true;
                trouble.recover = session.snd_max();
                let flight = session.snd_max().wrapping_sub(session.snd_una);
                trouble.ssthresh = (flight / 2).max(2 * u32::from(session.mss));
                session.cwnd = trouble.ssthresh + 3 * u32::from(session.mss);
                self.begin_resending(s);
                self.retransmit_first(now_ns, s, out);
            } else if in_recovery && !self.retransmit_hole(now_ns, s, out) {
                let session = &mut self.sessions[s];
                session.cwnd = session.cwnd.saturating_add(u32::from(session.mss));
            }
            return;
        }
        // New data acknowledged.
        let acked = ack.wrapping_sub(session.snd_una);
        let fin = session.state.fin_sent() && ack == session.snd_max();
        self.counters[Counter::ReplayBytesDelivered] += u64::from(acked - u32::from(fin));
        session.snd_una = ack;
        session.snd_wnd = window;
        session.dup_acks = 0;
        session.tries = 0;
        if session.is_in_trouble() {
            self.narrower_path_found(now, s);
        }
        let session = &mut self.sessions[s];
        if seq_before(session.snd_nxt, ack) {
            session.advance_to(ack);
        }
        if session.timing && !seq_before(ack, session.timed_seq) {
            session.round_trip(micros(now_ns).wrapping_sub(session.timed_at_us));
            session.timing = false;
        }
        // Slow start until something is lost.
        let (partial, board) = if session.is_in_trouble() {
            self.grow_window(s, ack, acked)
        } else {
            session.cwnd = session.cwnd.saturating_add(acked).min(MAX_WINDOW);
            (false, NO_BOARD)
        };
        let session = &mut self.sessions[s];
        let outstanding = session.snd_una != session.snd_max();
        session.rto_at = outstanding.then(|| Due::at(now.wrapping_add(session.rto_ticks())));
        self.acknowledge_segments(s);
        if record.sack_count > 0 || board != NO_BOARD {
            self.note_sack(s, record);
        }
        if partial {
            if self.was_resent(s) {
                self.retransmit_hole(now_ns, s, out);
            } else {
                self.retransmit_first(now_ns, s, out);
            }
        }
        self.on_fin_acknowledged(now_ns, s, out);
    }

    /// The congestion window of a session that has lost something, after `acked` bytes up to `ack` were acknowledged. Returns whether that was
    /// a part of what a recovery is for, and the session's board.
    fn grow_window(&mut self, s: u32, ack: u32, acked: u32) -> (bool, u16) {
        let (session, trouble) = self.sessions.in_trouble(s);
        let mss = u32::from(session.mss);
        let mut partial = false;
        if trouble.in_recovery {
            if seq_before(ack, trouble.recover) {
                partial = true;
                session.cwnd = session.cwnd.saturating_sub(acked).max(mss) + mss;
            } else {
                trouble.in_recovery = false;
                session.cwnd = trouble.ssthresh;
            }
        } else if session.cwnd < trouble.ssthresh {
            session.cwnd = session.cwnd.saturating_add(acked);
        } else {
            session.cwnd = session.cwnd.saturating_add((mss * mss / session.cwnd).max(1));
        }
        session.cwnd = session.cwnd.min(MAX_WINDOW);
        // Never so far behind that sequence numbers would wrap around it.
        if seq_before(trouble.recover, ack) {
            trouble.recover = ack;
        }
        (partial, trouble.board)
    }

    /// Lets go of segments that are wholly acknowledged, and moves the send position past them.
    fn acknowledge_segments(&mut self, s: u32) {
        let last = self.sessions.last_segment(s);
        let session = &mut self.sessions[s];
        let una = session.snd_una;
        let before = session.una_segment;
        while session.una_segment != NONE {
            let stored = &mut self.store[session.una_segment];
            if seq_before(una, stored.end()) {
                break;
            }
            stored.references -= 1;
            let next = segment_after(session.una_segment, last, stored.next);
            // After a timeout the send position went back; an acknowledgment overtakes it.
            if session.next_segment == session.una_segment {
                session.next_segment = next;
            }
            session.una_segment = next;
        }
        if before != session.una_segment {
            let c = session.connection;
            self.free_head(c);
        }
    }

    fn on_fin_acknowledged<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &mut self.sessions[s];
        if !session.state.fin_sent() || session.snd_una != session.snd_max() {
            return;
        }
        match session.state {
            State::FinWait1 => {
                session.state = State::FinWait2;
                session.rto_at = Some(Due::at(tick(now_ns).wrapping_add(timing::FIN_TIMEOUT)));
            }
            State::Closing | State::LastAck => self.finish(now_ns, s, out),
            _ => {}
        }
    }

    /// Both sides have closed.
    fn finish<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        let client_open = self.connections.end(session.connection) == End::Open;
        let target_closed_first = session.state == State::LastAck;
        let reason = match session.cut.unwrap_or(EndReason::Completed) {
            EndReason::Completed | EndReason::TargetClosed if target_closed_first && client_open => {
                EndReason::TargetClosed
            }
            EndReason::TargetClosed => EndReason::Completed,
            other => other,
        };
        self.end_session(tick(now_ns), s, reason, out);
    }

    /// The target closed its side: what the session has begun to send it finishes, then it closes too. Turns that it has not begun go
    /// to a new session.
    fn on_target_fin<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let (session, turns) = self.sessions.with_turns(s);
        let end = session.rcv_nxt.wrapping_add(1);
        session.rcv_nxt = end;
        session.owes = Owes::AckNow;
        let client_mss = self.connections[session.connection].mss;
        turns.note_response(session, client_mss, 0, end, false, true, tick(now_ns));
        match session.state {
            State::Established => {
                session.state = State::CloseWait;
                if session.cut.is_none() {
                    self.hand_over(now_ns, s, EndReason::TargetClosed, out);
                }
            }
            State::FinWait1 => session.state = State::Closing,
            State::FinWait2 => {
                self.send_ack(now_ns, s, out);
                self.finish(now_ns, s, out);
            }
            _ => {}
        }
    }

    fn on_target_reset<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        // After both FINs a reset is only an impolite way to say the same.
        let over = matches!(session.state, State::LastAck | State::Closing | State::FinWait2)
            && session.una_segment == NONE;
        if over {
            self.finish(now_ns, s, out);
            return;
        }
        if session.cut.is_none() {
            self.hand_over(now_ns, s, EndReason::TargetReset, out);
        }
        self.end_session(tick(now_ns), s, EndReason::TargetReset, out);
    }

    /// Gives the turns that a session has not begun to a new session of the same copy, and cuts the old one there.
    fn hand_over<O: Output>(&mut self, now_ns: u64, s: u32, reason: EndReason, out: &mut O) {
        let first = self.first_unsent(s, true);
        let session = self.sessions[s];
        let c = session.connection;
        if first != NONE {
            let iss = self.store[first].seq.wrapping_sub(1);
            // A session that joined and could send nothing would only hand the same turn on and on, to a target that ends every
            // connection at once. Copy 1: not the client's own port, which the old session still has.
            let new = match session.turn.has(Turn::JOINED) {
                true => None,
                false => self.open_session(now_ns, c, session.service, 1, iss, out),
            };
            match new {
                Some(new) => {
                    let new = &mut self.sessions[new];
                    new.turn.set(Turn::JOINED, true);
                    new.una_segment = first;
                    new.next_segment = first;
                }
                None => self.lose_from(s, first, reason),
            }
        }
        self.cut_before(s, first, reason);
        self.free_head(c);
    }
}
