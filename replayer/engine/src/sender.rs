//! What a session sends: SYN, data, FIN, RST, acknowledgments; retransmission and the turn gate.

use crate::config::timing;
use crate::connection::End;
use crate::counters::{Counter, EndReason};
use crate::engine::Engine;
use crate::gate::Gate;
use crate::output::{InHand, Output};
use crate::session::{INITIAL_WINDOW, MIN_MSS, State, Turn, segment_after, seq_before};
use crate::slab::NONE;
use crate::timer::{Due, tick, ticks};
use crate::wire::{self, Header, MAX_HEADER, PLAIN, PlainHeader, SynOptions, payload_limit};
use replayer_common::addr::Endpoint;
use replayer_common::hash::flow_hash;
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};

/// The window field of every segment: with the client's scale it never closes, for nothing is stored of a response.
pub(crate) const WINDOW: u16 = u16::MAX;

/// How many segments behind a turn that waits are looked at for counts of later turns.
pub(crate) const SEGMENTS_BEHIND: usize = 32;

/// Bytes of a stored segment.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) segment: u32,
    pub(crate) offset: u32,
    pub(crate) len: u32,
}

/// Microseconds, wrapping: for durations under an hour.
pub(crate) fn micros(now_ns: u64) -> u32 {
    (now_ns / 1000) as u32
}

/// Milliseconds, wrapping: the unit of timestamps (Linux's clients use it too).
pub(crate) fn millis(now_ns: u64) -> u32 {
    (now_ns / 1_000_000) as u32
}

impl Engine {
    /// A segment for an identity whose session has ended: a repeated FIN is acknowledged (TIME-WAIT without a state), anything
    /// else is reset, so that nothing stays half open at the target.
    pub(crate) fn answer_stray<O: Output>(
        &mut self,
        record: &ResponseHeader,
        identity: Endpoint,
        out: &mut O,
    ) {
        let Some(service) = self.services.get_mut(usize::from(record.service)) else { return };
        let Some(template) = &service.template else { return };
        let acknowledges = record.flags & (flags::FIN | flags::SYN) == flags::FIN;
        if record.flags & flags::RST != 0 || record.flags & flags::ACK == 0 {
            return;
        }
        if !acknowledges && record.payload_len == 0 && record.flags & flags::SYN == 0 {
            return;
        }
        service.ip_id = service.ip_id.wrapping_add(1);
        let header = Header {
            source: identity,
            seq: record.ack,
            ack: if acknowledges { record.seq.wrapping_add(record.payload_len).wrapping_add(1) } else { 0 },
            flags: if acknowledges { flags::ACK } else { flags::RST },
            // The target's own clock keeps PAWS content (RFC 7323 section 5): it echoed ours last.
            timestamps: record.has(present::TIMESTAMPS).then_some((record.ts_ecr, record.ts_val)),
            syn: None,
            ip_id: service.ip_id,
        };
        let Some(mut frame) = out.allocate() else {
            self.counters[Counter::SegmentsNoFrame] += 1;
            return;
        };
        let len = header.len(template);
        let bytes = out.bytes(&mut frame);
        if bytes.len() < MAX_HEADER {
            out.release(frame);
            return;
        }
        header.write(template, &mut bytes[..len], 0, 0);
        self.counters[Counter::SegmentsSent] += 1;
        if !out.transmit(frame, len) {
            self.counters[Counter::SegmentsNoFrame] += 1;
        }
    }

    /// Writes a segment and gives it to the output. With `in_hand`, a captured frame that holds just these bytes is rewritten in
    /// place; otherwise the bytes are copied from the store into a free frame.
    #[inline(never)]
    pub(crate) fn send<O: Output>(
        &mut self,
        now_ns: u64,
        s: u32,
        control: u8,
        seq: u32,
        piece: Option<Piece>,
        out: &mut O,
        in_hand: &mut Option<InHand<O::Frame>>,
    ) {
        let kind = (control & flags::SYN != 0, control & flags::ACK != 0);
        self.send_kind(kind, now_ns, s, control, seq, piece, out, in_hand);
    }

    /// The same of data with an acknowledgment, with or without PSH.
    #[inline]
    pub(crate) fn send_data<O: Output>(
        &mut self,
        now_ns: u64,
        s: u32,
        push: bool,
        seq: u32,
        piece: Piece,
        out: &mut O,
        in_hand: &mut Option<InHand<O::Frame>>,
    ) {
        let control = flags::ACK | if push { flags::PSH } else { 0 };
        self.send_kind((false, true), now_ns, s, control, seq, Some(piece), out, in_hand);
    }

    /// Inlined where the kind, SYN and ACK, is a constant: there is no code for the others then.
    #[inline(always)]
    fn send_kind<O: Output>(
        &mut self,
        (syn, acknowledges): (bool, bool),
        now_ns: u64,
        s: u32,
        control: u8,
        seq: u32,
        piece: Option<Piece>,
        out: &mut O,
        in_hand: &mut Option<InHand<O::Frame>>,
    ) {
        let session = &mut self.sessions[s];
        let service = &mut self.services[usize::from(session.service)];
        if acknowledges {
            session.acknowledged();
        }
        let session = &self.sessions[s];
        let Some(template) = &service.template else {
            self.counters[Counter::SegmentsNoLink] += 1;
            service.counters.packets_no_link += 1;
            return;
        };
        service.ip_id = service.ip_id.wrapping_add(1);
        let ack = if acknowledges { session.rcv_nxt } else { 0 };
        // No timestamp on a reset before the handshake: it is for an older connection, whose clock may have been ahead, and in TIME-WAIT
        // Linux applies PAWS to resets too.
        let timestamps = (session.timestamps && (session.state != State::SynSent || syn))
            .then(|| (self.connections[session.connection].ts_value(now_ns), session.ts_recent));
        let ip_id = service.ip_id;
        let connection = &self.connections;
        // Nearly always the header has the one form for which there is a shorter way.
        let header = (syn || !template.is_plain()).then(|| Header {
            source: self.sessions.identity(s),
            seq,
            ack,
            flags: control,
            timestamps,
            syn: syn.then(|| {
                let from = &connection[session.connection];
                let sack_permitted = connection.origin(session.connection).sack_permitted();
                SynOptions { mss: from.mss, window_scale: from.window_scale(), sack_permitted }
            }),
            ip_id,
        });
        let plain = PLAIN + if timestamps.is_some() { 12 } else { 0 };
        let start = header.as_ref().map_or(plain, |header| header.len(template));
        let len = piece.map_or(0, |piece| piece.len as usize);
        let same = in_hand.take_if(|hand| {
            piece.is_some_and(|piece| {
                piece.segment == hand.segment && piece.offset == 0 && len == hand.payload_len
            })
        });
        let mut frame = if let Some(hand) = same {
            let mut frame = hand.frame;
            if hand.payload_offset != start {
                let bytes = out.bytes(&mut frame);
                if bytes.len() < start + len {
                    self.counters[Counter::SegmentsNoFrame] += 1;
                    out.release(frame);
                    return;
                }
                bytes.copy_within(hand.payload_offset..hand.payload_offset + len, start);
            }
            frame
        } else {
            let Some(mut frame) = out.allocate() else {
                self.counters[Counter::SegmentsNoFrame] += 1;
                return;
            };
            let bytes = out.bytes(&mut frame);
            if bytes.len() < start + len {
                self.counters[Counter::SegmentsNoFrame] += 1;
                out.release(frame);
                return;
            }
            if let Some(piece) = piece {
                self.store.copy_to(piece.segment, piece.offset as usize, &mut bytes[start..start + len]);
            }
            frame
        };
        let bytes = &mut out.bytes(&mut frame)[..start + len];
        let known = piece.map_or(Some(0), |piece| self.store.sum(piece.segment, piece.offset, piece.len));
        let payload_sum = known.unwrap_or_else(|| wire::sum(&bytes[start..]));
        match &header {
            Some(header) => header.write(template, bytes, len, payload_sum),
            None => {
                let (ip, port) = session.identity_v4();
                let fields = PlainHeader { ip, port, seq, ack, flags: control, timestamps, ip_id };
                template.write_plain(bytes, fields, len, payload_sum);
            }
        }
        self.counters[Counter::SegmentsSent] += 1;
        if !out.transmit(frame, start + len) {
            self.counters[Counter::SegmentsNoFrame] += 1;
        }
    }

    pub(crate) fn send_syn<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &mut self.sessions[s];
        if session.is_unasked() {
            let service = &mut self.services[usize::from(session.service)];
            service.unanswered_since.get_or_insert(tick(now_ns));
            // A Linux whose queue of SYNs is full remembers none of the rest (SYN cookies, net/ipv4/syncookies.c): it learns of the
            // connection by its first segment, and resets it when another one comes before.
            let now = tick(now_ns);
            if service.unanswered >= timing::SYN_BURST {
                service.burst_at = Some(now);
            }
            session.first_alone =
                service.burst_at.is_some_and(|at| now.wrapping_sub(at) < timing::SYN_BURST_AGE);
            service.unanswered += 1;
        }
        let iss = session.snd_una;
        session.advance_to(iss.wrapping_add(1));
        session.timing = session.tries == 0;
        (session.timed_seq, session.timed_at_us) = (session.snd_nxt, micros(now_ns));
        session.rto_at = Some(Due::at(tick(now_ns).wrapping_add(session.rto_ticks())));
        if session.tries > 0 {
            self.counters[Counter::SegmentsRetransmitted] += 1;
        }
        self.send(now_ns, s, flags::SYN, iss, None, out, &mut None);
        self.arm_session(s);
    }

    /// Sends a session's first SYN, or lets it wait while too many copies wait for the target's answer.
    pub(crate) fn ask<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &mut self.sessions[s];
        let service = &mut self.services[usize::from(session.service)];
        let busy = service.unanswered >= self.config.limits.copies_unanswered || !service.waiting.is_empty();
        // A full queue has sessions in it that have ended since; then the SYN goes at once. Without copies it holds none.
        if busy && service.waiting.len() < service.waiting.capacity() {
            // Not tried yet, but on its way: see `on_retransmission_timeout`.
            session.tries = 1;
            session.rto_at = Some(Due::at(tick(now_ns).wrapping_add(timing::SYN_WAIT)));
            service.waiting.push_back(s);
            self.arm_session(s);
            return;
        }
        self.send_syn(now_ns, s, out);
    }

    /// Sends the SYNs of sessions that have waited for others to be answered.
    pub(crate) fn ask_waiting<O: Output>(&mut self, now_ns: u64, out: &mut O) {
        let now = tick(now_ns);
        for number in 0..self.services.len() {
            loop {
                let service = &mut self.services[number];
                if service.waiting.is_empty() || service.unanswered >= self.config.limits.copies_unanswered {
                    break;
                }
                if service.down {
                    if !service.probe_is_due(now) {
                        break;
                    }
                    service.next_probe = now.wrapping_add(timing::DOWN_PROBE);
                }
                let Some(s) = service.waiting.pop_front() else { break };
                let session = &mut self.sessions[s];
                // Else it has ended since, and its place may be another's.
                if session.is_unasked() && session.tries > 0 && usize::from(session.service) == number {
                    session.tries = 0;
                    self.send_syn(now_ns, s, out);
                }
            }
        }
    }

    pub(crate) fn send_ack<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        // The first segment may be lost, and a number behind it be the first that the target sees of the connection.
        let seq = if session.first_alone { session.snd_una } else { session.snd_max() };
        self.send(now_ns, s, flags::ACK, seq, None, out, &mut None);
    }

    /// Resets the target's side. The target takes an RST only at the very number that it expects next (RFC 5961): that is
    /// either what it acknowledged last or, if all that is in flight arrived, the highest number sent.
    pub(crate) fn send_reset<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        let (una, max) = (session.snd_una, session.snd_max());
        if session.is_unasked() {
            return;
        }
        if session.state == State::SynSent {
            self.send(now_ns, s, flags::RST, max, None, out, &mut None);
            return;
        }
        self.send(now_ns, s, flags::RST | flags::ACK, max, None, out, &mut None);
        if una != max {
            self.send(now_ns, s, flags::RST | flags::ACK, una, None, out, &mut None);
        }
    }

    /// An answer to a SYN that belongs to an older connection of the same addresses: that one is reset (RFC 9293 section
    /// 3.10.7.3), and the SYN goes again.
    pub(crate) fn reset_old_connection<O: Output>(&mut self, now_ns: u64, s: u32, ack: u32, out: &mut O) {
        self.send(now_ns, s, flags::RST, ack, None, out, &mut None);
        let session = &mut self.sessions[s];
        session.rto_at = Some(Due::at(tick(now_ns).wrapping_add(timing::SYN_AGAIN)));
        self.arm_session(s);
    }

    /// The handshake is done: sizes and windows are known.
    pub(crate) fn begin_sending(&mut self, now: crate::timer::Tick, s: u32, target_mss: u16) {
        let mtu = self.path_mtu(self.sessions[s].service, now).min(self.config.frame_room.saturating_sub(22));
        let session = &mut self.sessions[s];
        let service = &self.services[usize::from(session.service)];
        // RFC 6691: the MSS option does not count options, so what they take is taken off here.
        let options = if session.timestamps { 12 } else { 0 };
        session.mss = payload_limit(mtu, &service.target, session.timestamps)
            .min(target_mss.max(64).saturating_sub(options))
            .max(MIN_MSS);
        session.cwnd = INITIAL_WINDOW * u32::from(session.mss);
        session.set_limit();
    }

    /// The path to a service's target became narrower: what is sent from now on fits.
    pub(crate) fn narrow(&mut self, service: u16, mtu: u16) {
        for s in 0..self.sessions.high_water() {
            let session = &mut self.sessions[s];
            if session.service == service && session.state != State::SynSent {
                let target = &self.services[usize::from(service)].target;
                let limit = payload_limit(mtu, target, session.timestamps).max(MIN_MSS);
                if limit < session.mss {
                    session.mss = limit;
                    // Nothing of this size was lost yet: what timed out before says nothing of it.
                    session.tries = 0;
                }
            }
        }
    }

    /// Sends what may be sent now: data that turn and windows allow, then FIN or RST when the stream has ended. The session may
    /// be gone afterwards.
    pub(crate) fn output<O: Output>(
        &mut self,
        now_ns: u64,
        s: u32,
        out: &mut O,
        in_hand: &mut Option<InHand<O::Frame>>,
    ) {
        let now = tick(now_ns);
        loop {
            let session = &mut self.sessions[s];
            let again = session.rewound;
            if !(session.state.may_send() || again && session.state.fin_sent()) {
                return;
            }
            if session.next_segment == NONE {
                break;
            }
            let stored = self.store[session.next_segment];
            let in_flight = session.in_flight();
            let usable = session.snd_wnd.min(session.cwnd).saturating_sub(in_flight);
            if session.first_alone && in_flight > 0 {
                return;
            }
            let offset = session.snd_nxt.wrapping_sub(stored.seq);
            let mut len = (stored.len - offset).min(u32::from(session.mss));
            if len > usable {
                if in_flight > 0 {
                    // The acknowledgment of what is in flight brings us back here.
                    return;
                }
                if usable == 0 {
                    // Zero window: probe (RFC 9293 section 3.8.6.1).
                    if session.rto_at.is_none() {
                        session.rto_at = Some(Due::at(now.wrapping_add(session.rto_ticks())));
                        self.arm_session(s);
                    }
                    return;
                }
                len = usable;
            }
            let starts_turn = !again && offset == 0 && stored.starts_turn;
            if starts_turn && self.is_early(now_ns, s, stored.captured_us) {
                return;
            }
            let since_turn_us = micros(now_ns).wrapping_sub(self.sessions[s].turn_sent_us);
            if starts_turn && !self.begin_turn(now_ns, s, stored.need) {
                return;
            }
            let shift_us = self.shift_us(s);
            let session = &mut self.sessions[s];
            let piece = Piece { segment: session.next_segment, offset, len };
            let seq = session.snd_nxt;
            let whole = offset + len == stored.len;
            if again {
                self.counters[Counter::SegmentsRetransmitted] += 1;
            } else if offset == 0 {
                let lag = micros(now_ns).wrapping_sub(stored.captured_us).saturating_sub(shift_us);
                self.capture_to_transmit.record(lag);
                self.lag.record(lag, since_turn_us, 1);
            }
            session.advance_to(seq.wrapping_add(len));
            if !session.timing && !again {
                session.timing = true;
                (session.timed_seq, session.timed_at_us) = (session.snd_nxt, micros(now_ns));
            }
            if session.rto_at.is_none() {
                session.rto_at = Some(Due::at(now.wrapping_add(session.rto_ticks())));
            }
            if whole {
                let last = self.sessions.last_segment(s);
                self.sessions[s].next_segment = segment_after(piece.segment, last, stored.next);
            }
            let push = if whole && stored.push { flags::PSH } else { 0 };
            self.send(now_ns, s, flags::ACK | push, seq, Some(piece), out, in_hand);
            self.arm_session(s);
        }
        self.output_end(now_ns, s, out);
    }

    /// How much later than captured a session's turns begin, microseconds: by its identity, evenly distributed.
    pub(crate) fn shift_us(&self, s: u32) -> u32 {
        if self.config.spread_ns == 0 {
            return 0;
        }
        let identity = self.sessions.identity(s);
        let hash = flow_hash(self.config.seed, &identity.ip, identity.port);
        ((self.config.spread_ns / 1000 * u64::from(hash)) >> 32) as u32
    }

    /// Whether the copies are spread and a turn captured at `captured_us` has to wait; arms the time to look again.
    fn is_early(&mut self, now_ns: u64, s: u32, captured_us: u32) -> bool {
        let (shift_us, age_us) = (self.shift_us(s), micros(now_ns).wrapping_sub(captured_us));
        if age_us >= shift_us {
            return false;
        }
        let ahead = ticks(u64::from(shift_us - age_us) * 1000).max(1);
        self.sessions[s].release_at = Some(Due::at(tick(now_ns).wrapping_add(ahead)));
        self.arm_session(s);
        true
    }

    /// Passes the turn gate with the first byte of a turn, if it is open.
    pub(crate) fn begin_turn(&mut self, now_ns: u64, s: u32, need: u32) -> bool {
        if !self.gate_is_open(now_ns, s, need, false) {
            return false;
        }
        let session = &mut self.sessions[s];
        session.turn.set(Turn::AWAITS_RESPONSE, true);
        session.turn_sent_us = micros(now_ns);
        self.counters[Counter::TurnsSent] += 1;
        true
    }

    /// Whether the turn gate is open; arms the time to look again when it is not.
    fn gate_is_open(&mut self, now_ns: u64, s: u32, need: u32, closes: bool) -> bool {
        let now = tick(now_ns);
        let hold_limit = self.hold_limit;
        let last = self.sessions.last_segment(s);
        let (session, turns) = self.sessions.with_turns(s);
        if session.turn.has(Turn::JOINED) || !self.config.wait_for_responses {
            session.turn.set(Turn::JOINED, false);
            turns.begin_at(session.rcv_nxt);
            session.hold_since = None;
            session.turn_seq = session.snd_nxt;
            session.turn.set(Turn::WATCHED, false);
            return true;
        }
        let (mut segment, store) = (session.next_segment, &self.store);
        let behind = core::iter::from_fn(|| {
            segment = if segment == NONE || segment == last { NONE } else { store[segment].next };
            (segment != NONE).then(|| store[segment].need)
        });
        let later = behind.take(SEGMENTS_BEHIND).scan(0u32, |sum, need| {
            *sum = sum.wrapping_add(need);
            Some(*sum)
        });
        let opened_by = match turns.gate(session, need, later, closes, hold_limit, now) {
            Gate::Wait(until) => {
                session.release_at = Some(Due::at(until));
                self.arm_session(s);
                return false;
            }
            Gate::Bytes => Counter::TurnsReleasedByBytes,
            Gate::Quiet => Counter::TurnsReleasedByQuiet,
            Gate::HoldLimit => Counter::TurnsReleasedByHoldLimit,
        };
        session.hold_since = None;
        session.release_at = None;
        session.turn_seq = session.snd_nxt;
        // Where several requests are under way, what comes next need not be the answer to this one.
        let watched = need > 0 && opened_by != Counter::TurnsReleasedByHoldLimit && !turns.ahead.is_seen();
        session.turn.set(Turn::WATCHED, watched);
        if need > 0 {
            self.counters[opened_by] += 1;
        }
        true
    }

    /// Everything stored was sent: the end of the stream, if it has come.
    fn output_end<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        let again = session.rewound;
        if session.state.fin_sent() {
            if again {
                self.counters[Counter::SegmentsRetransmitted] += 1;
                self.send_fin(now_ns, s, out);
            }
            return;
        }
        if again || session.first_alone && session.in_flight() > 0 {
            return;
        }
        let end = if let Some(reason) = session.cut {
            // A hole: the target may still be answering, which a close would disturb.
            let need = u32::from(reason == EndReason::Gap);
            End::Fin { need }
        } else {
            self.connections.end(session.connection)
        };
        match end {
            End::Open => {
                if session.state == State::CloseWait {
                    self.send_fin(now_ns, s, out);
                }
            }
            End::Fin { need } => {
                if session.state == State::CloseWait || self.gate_is_open(now_ns, s, need, true) {
                    self.send_fin(now_ns, s, out);
                }
            }
            End::Reset { need } => {
                // A reset does not wait for what is on its way to arrive: so we do.
                let arrived = session.snd_una == session.snd_max();
                if arrived && (session.state == State::CloseWait || self.gate_is_open(now_ns, s, need, false))
                {
                    self.send_reset(now_ns, s, out);
                    self.end_session(tick(now_ns), s, EndReason::ClientReset, out);
                }
            }
        }
    }

    fn send_fin<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let now = tick(now_ns);
        let session = &mut self.sessions[s];
        let seq = session.snd_nxt;
        session.advance_to(seq.wrapping_add(1));
        match session.state {
            State::Established => session.state = State::FinWait1,
            State::CloseWait => session.state = State::LastAck,
            _ => {}
        }
        session.release_at = None;
        session.rto_at.get_or_insert(Due::at(now.wrapping_add(session.rto_ticks())));
        self.send(now_ns, s, flags::FIN | flags::ACK, seq, None, out, &mut None);
        self.arm_session(s);
    }

    /// The retransmission timer: lost SYN, data or FIN; a zero window to probe; a close that the target does not finish.
    pub(crate) fn on_retransmission_timeout<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let now = tick(now_ns);
        let session = &mut self.sessions[s];
        if session.is_unasked() {
            if session.tries > 0 {
                self.end_session(now, s, EndReason::HandshakeTimeout, out);
            } else {
                self.ask(now_ns, s, out);
            }
            return;
        }
        session.tries = session.tries.saturating_add(1);
        if session.state == State::SynSent {
            if session.tries >= timing::SYN_TRIES {
                // If only its answers are lost, the target has a half-open connection.
                self.send_reset(now_ns, s, out);
                self.end_session(now, s, EndReason::HandshakeTimeout, out);
                return;
            }
            let service = &mut self.services[usize::from(session.service)];
            let silent = |since: u32| now.wrapping_sub(since) >= timing::DOWN_AFTER;
            if !service.down && service.unanswered_since.is_some_and(silent) {
                service.down = true;
                service.next_probe = now;
            }
            if service.down {
                // The sessions that wait share the probes: a target that is away gets one SYN in `DOWN_PROBE`, not one from each.
                if !service.probe_is_due(now) {
                    session.rto_at = Some(Due::at(now.wrapping_add(session.rto_ticks())));
                    return;
                }
                service.next_probe = now.wrapping_add(timing::DOWN_PROBE);
            }
            self.send_syn(now_ns, s, out);
            return;
        }
        if session.snd_una != session.snd_max() {
            if session.tries > timing::RETRANSMIT_TRIES {
                self.send_reset(now_ns, s, out);
                self.end_session(now, s, EndReason::RetransmitTimeout, out);
                return;
            }
            // RFC 5681 section 3.1; then everything after the last acknowledgment goes again (RFC 9293 section 3.8.1).
            let (session, trouble) = self.sessions.in_trouble(s);
            let mss = u32::from(session.mss);
            trouble.ssthresh = (session.snd_max().wrapping_sub(session.snd_una) / 2).max(2 * mss);
            trouble.in_recovery = false;
            trouble.recover = session.snd_max();
            session.cwnd = mss;
            session.dup_acks = 0;
            session.go_back_to(session.snd_una);
            session.set_limit();
            session.next_segment = session.una_segment;
            self.forget_sack(s);
            let session = &mut self.sessions[s];
            // A FIN alone needs no room.
            if session.snd_wnd == 0 && session.una_segment != NONE {
                self.send_window_probe(now_ns, s, out);
            } else {
                self.suspect_path(now_ns, s, out);
                self.output(now_ns, s, out, &mut None);
            }
            return;
        }
        if session.state == State::FinWait2 {
            // Half-closed: a response that takes long may still be coming.
            let until = session.response_at.wrapping_add(timing::FIN_TIMEOUT);
            if now.wrapping_sub(session.response_at) < timing::FIN_TIMEOUT {
                session.rto_at = Some(Due::at(until));
                return;
            }
            self.send_reset(now_ns, s, out);
            self.end_session(now, s, EndReason::FinTimeout, out);
            return;
        }
        if session.next_segment != NONE && session.snd_wnd == 0 {
            if session.tries > timing::RETRANSMIT_TRIES {
                self.send_reset(now_ns, s, out);
                self.end_session(now, s, EndReason::RetransmitTimeout, out);
                return;
            }
            self.send_window_probe(now_ns, s, out);
        }
    }

    /// An old sequence number makes the target say its window (the form that Linux uses; RFC 9293 section 3.8.6.1 wants it answered).
    fn send_window_probe<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &mut self.sessions[s];
        session.rto_at = Some(Due::at(tick(now_ns).wrapping_add(session.rto_ticks())));
        let seq = session.snd_una.wrapping_sub(1);
        self.send(now_ns, s, flags::ACK, seq, None, out, &mut None);
        self.arm_session(s);
    }

    /// Sends the first unacknowledged segment again, without going back (fast retransmit, RFC 6582).
    pub(crate) fn retransmit_first<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        let (seq, sent) = (session.snd_una, session.snd_max().wrapping_sub(session.snd_una));
        if self.retransmit_hole(now_ns, s, out) {
            return;
        }
        self.retransmit(now_ns, s, seq, sent, out);
    }

    /// Sends bytes from `seq` on again, at most `limit` of them and one segment, without going back. Returns how many.
    pub(crate) fn retransmit<O: Output>(
        &mut self,
        now_ns: u64,
        s: u32,
        seq: u32,
        limit: u32,
        out: &mut O,
    ) -> u32 {
        let last = self.sessions.last_segment(s);
        let session = &mut self.sessions[s];
        session.timing = false;
        let mut segment = session.una_segment;
        while segment != NONE && !seq_before(seq, self.store[segment].end()) {
            segment = segment_after(segment, last, self.store[segment].next);
        }
        if segment == NONE {
            if !session.state.fin_sent() {
                return 0;
            }
            self.counters[Counter::SegmentsRetransmitted] += 1;
            self.send(now_ns, s, flags::FIN | flags::ACK, seq, None, out, &mut None);
            return 1;
        }
        let stored = self.store[segment];
        let offset = seq.wrapping_sub(stored.seq);
        let sent = session.snd_max().wrapping_sub(seq);
        let len = (stored.len - offset).min(u32::from(session.mss)).min(sent).min(limit);
        let piece = Piece { segment, offset, len };
        let push = if stored.push && offset + len == stored.len { flags::PSH } else { 0 };
        self.counters[Counter::SegmentsRetransmitted] += 1;
        self.send(now_ns, s, flags::ACK | push, seq, Some(piece), out, &mut None);
        len
    }

    /// The session takes no more data and closes when it has delivered what it was given.
    pub(crate) fn cut(&mut self, s: u32, reason: EndReason) {
        let c = self.sessions[s].connection;
        let tail = self.connections[c].tail;
        if self.sessions[s].cut.is_none() {
            self.sessions.cut(s, reason, tail);
            self.connections[c].takers -= 1;
        }
    }

    /// The session takes no more data and gives up what it has not begun to send, counted as lost for `reason`.
    pub(crate) fn cut_unsent(&mut self, s: u32, reason: EndReason) {
        let first = self.first_unsent(s, false);
        self.lose_from(s, first, reason);
        self.cut_before(s, first, reason);
        let c = self.sessions[s].connection;
        self.free_head(c);
    }

    /// The first segment of which nothing was sent yet (and, with `turn_start`, that starts a turn), or `NONE`.
    pub(crate) fn first_unsent(&self, s: u32, turn_start: bool) -> u32 {
        let (session, last) = (&self.sessions[s], self.sessions.last_segment(s));
        let mut segment = session.una_segment;
        while segment != NONE {
            let stored = &self.store[segment];
            if !seq_before(stored.seq, session.snd_max()) && (!turn_start || stored.starts_turn) {
                return segment;
            }
            segment = segment_after(segment, last, stored.next);
        }
        NONE
    }

    /// Ends what the session was given before `segment`. References from there on are the caller's to drop or to pass on.
    pub(crate) fn cut_before(&mut self, s: u32, segment: u32, reason: EndReason) {
        if segment == NONE {
            self.cut(s, reason);
            return;
        }
        let session = &mut self.sessions[s];
        self.connections[session.connection].takers -= u16::from(session.cut.is_none());
        if session.next_segment == segment {
            session.next_segment = NONE;
        }
        if session.una_segment == segment {
            session.una_segment = NONE;
            self.sessions.cut(s, reason, NONE);
            return;
        }
        let mut last = session.una_segment;
        while self.store[last].next != segment {
            last = self.store[last].next;
        }
        self.sessions.cut(s, reason, last);
    }

    /// The session loses what it was given from `segment` on: counted for `reason`, its references dropped. It is cut there afterwards.
    pub(crate) fn lose_from(&mut self, s: u32, mut segment: u32, reason: EndReason) {
        let last = self.sessions.last_segment(s);
        while segment != NONE {
            let stored = &mut self.store[segment];
            self.counters[reason.lost_bytes()] += u64::from(stored.len);
            stored.references -= 1;
            segment = segment_after(segment, last, stored.next);
        }
    }
}
