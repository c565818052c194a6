//! A client's stream as it is captured: put in order, held, cut into turns, given to its sessions, and ended.

use crate::capture::Fate;
use crate::config::timing;
use crate::connection::{EarlyEnd, End, Origin};
use crate::counters::Counter;
use crate::doubt::NEAR;
use crate::engine::Engine;
use crate::gate::Ahead;
use crate::output::{InHand, Output};
use crate::protocol::{self, Opening};
use crate::sender::micros;
use crate::session::seq_before;
use crate::slab::NONE;
use crate::store::{self, Segment};
use crate::timer::{Tick, tick};
use replayer_common::packet::{TcpSegment, flags};

/// A segment this far from its stream's place is not of this stream.
pub(crate) const MAX_DISTANCE: u32 = 1 << 28;

/// Steps through what is held behind a hole to the place of a segment: so many cost little, and are free for each.
pub(crate) const FREE_STEPS: u32 = 64;
/// Steps beyond that, of one connection. Where a network reorders packets they are a few for each; who strews thousands of segments and then sends
/// others in between wants to keep the worker busy.
pub(crate) const MOST_STEPS: u32 = 1 << 17;

impl Engine {
    /// A segment of a stream that is followed. `seq` is that of its first payload byte.
    pub(crate) fn on_stream<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        segment: &TcpSegment,
        seq: u32,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        let connection = &mut self.connections[c];
        let len = segment.payload_len;
        let fin = segment.flags & flags::FIN != 0;
        if segment.is_pure_ack() {
            // The lowest tells where the server's stream begins: for servers that speak first, and after data in the SYN.
            let lower = !connection.any_data && seq_before(segment.ack, connection.last_ack);
            let is_near = seq.wrapping_sub(connection.next_seq).wrapping_add(NEAR) < 2 * NEAR;
            if (!connection.ack_known || lower) && is_near && segment.flags & flags::ACK != 0 {
                connection.ack_known = true;
                connection.last_ack = segment.ack;
            }
            return Ok(Counter::PacketsAck);
        }
        if self.connections.origin(c).copies() == 0 {
            self.follow_idly(c, segment, seq);
            return Err((Counter::PacketsSampledOut, Counter::BytesSampledOut));
        }
        let ahead = seq.wrapping_sub(self.connections[c].next_seq) as i32;
        if ahead.unsigned_abs() > MAX_DISTANCE {
            self.look_far(now_ns, c, segment, out);
            return Err((Counter::PacketsOutOfWindow, Counter::BytesOutOfWindow));
        }
        if self.connections.end(c) != End::Open {
            return self.after_end(c, seq, len);
        }
        let mut fate = Ok(if fin { Counter::PacketsEnd } else { Counter::PacketsDuplicate });
        let seen = if ahead < 0 { ahead.unsigned_abs().min(len) } else { 0 };
        if seen < len {
            self.stream_goes_on(c, seq.wrapping_add(len));
        }
        let had_hole = self.connections.has_hole(c);
        if seen < len {
            self.counters[Counter::BytesDuplicate] += u64::from(seen);
            if let Some(hand) = in_hand {
                hand.payload_offset += seen as usize;
                hand.payload_len -= seen as usize;
            }
            let start = seq.wrapping_add(seen);
            let push = segment.flags & flags::PSH != 0;
            fate = if ahead > 0 {
                self.keep_out_of_order(now_ns, c, start, segment.ack, push, in_hand, out)
            } else {
                self.append(now_ns, c, start, segment.ack, push, in_hand, out)
            };
            if let Err((packets, bytes)) = fate {
                // The bytes seen before are counted already.
                self.counters[bytes] += u64::from(len - seen);
                fate = Ok(packets);
            }
            if self.connections[c].is_detached() {
                return fate;
            }
            self.take_in_order(now_ns, c, out);
        } else {
            self.counters[Counter::BytesDuplicate] += u64::from(len);
        }
        let next_seq = self.connections[c].next_seq;
        let fin = fin && self.connections.end(c) == End::Open;
        // One that may be a stranger's is not taken instead of another.
        if fin
            && (self.connections.early_end(c).is_none()
                || self.fits(c, seq.wrapping_add(len), segment.ack)
                || seq.wrapping_add(len) == next_seq)
        {
            let end = EarlyEnd { seq: seq.wrapping_add(len), ack: segment.ack, is_reset: false };
            self.connections.set_early_end(c, Some(end));
        }
        self.end_stream(now_ns, c, out);
        if self.connections.has_hole(c) {
            if !had_hole {
                self.open_hole(c, tick(now_ns));
            } else if ahead <= 0 && seen < len {
                self.go_on_before_hole(now_ns, c);
            }
        }
        fate
    }

    /// A segment of a stream that has ended.
    pub(crate) fn after_end(&self, c: u32, seq: u32, len: u32) -> Fate {
        let fresh = seq_before(self.connections[c].next_seq, seq.wrapping_add(len));
        if fresh && len > 0 {
            Err((Counter::PacketsAfterEnd, Counter::BytesAfterEnd))
        } else {
            Err((Counter::PacketsDuplicate, Counter::BytesDuplicate))
        }
    }

    /// The payload in hand, as bytes.
    pub(crate) fn payload<'a, O: Output>(
        out: &'a mut O,
        in_hand: &'a mut Option<InHand<O::Frame>>,
    ) -> &'a [u8] {
        match in_hand {
            Some(hand) => {
                let range = hand.payload_offset..hand.payload_offset + hand.payload_len;
                out.bytes(&mut hand.frame).get(range).unwrap_or(&[])
            }
            None => &[],
        }
    }

    /// Takes the payload in hand as the next of the stream.
    fn append<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        seq: u32,
        ack: u32,
        push: bool,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        let len = Self::payload(out, in_hand).len() as u32;
        let places = store::places(len);
        let segment = loop {
            let new = Segment::new(seq, ack, push, micros(now_ns));
            if let Some(segment) = self.hold(c, new, Self::payload(out, in_hand)) {
                break segment;
            }
            if !self.drop_doubtful_for_room(c) && !self.make_room(now_ns, c, len, out) {
                return self.over_limit(now_ns, c, seq.wrapping_add(len), ack, out);
            }
        };
        if let Some(hand) = in_hand {
            hand.segment = segment;
        }
        self.connections[c].held_places += places;
        Ok(self.link(now_ns, c, segment, in_hand, out))
    }

    /// Puts a stored segment at the end of the stream and lets the sessions send it.
    fn link<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        segment: u32,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Counter {
        let stored = self.store[segment];
        if !self.connections[c].any_data && self.connections.origin(c).isn().is_some() {
            let mut first = [0; protocol::LOOK];
            let first = &mut first[..protocol::LOOK.min(stored.len as usize)];
            self.store.copy_to(segment, 0, first);
            match protocol::opening(first) {
                Opening::Tls => {
                    self.connections[c].held_places -= stored.places();
                    self.store.remove(segment);
                    self.counters[Counter::BytesTls] += u64::from(stored.len);
                    self.connections[c].next_seq = stored.end();
                    self.begin_encrypted(now_ns, c, out);
                    return Counter::PacketsTls;
                }
                Opening::Http2 => self.set_multiplexed(c),
                Opening::Other => {}
            }
        }
        let connection = &mut self.connections[c];
        let answered = connection.ack_advances(stored.ack);
        let starts_turn = answered || !connection.any_data;
        let need = if answered { stored.ack.wrapping_sub(connection.last_ack) } else { 0 };
        if answered || !connection.ack_known {
            connection.last_ack = stored.ack;
            connection.ack_known = true;
        }
        connection.next_seq = stored.end();
        // Sessions that ended (the target closed, reset or refused) come back at the beginning of a turn, never within one.
        let surely_new_turn = answered && connection.any_data;
        connection.any_data = true;
        if surely_new_turn && !self.has_all_sessions(c) {
            self.open_sessions(now_ns, c, stored.seq.wrapping_sub(1), true, out);
        }
        let mut takers = 0;
        let mut s = self.connections[c].first_session;
        while s != NONE {
            let session = &mut self.sessions[s];
            if session.cut.is_none() {
                takers += 1;
                if session.una_segment == NONE {
                    session.una_segment = segment;
                }
                if session.next_segment == NONE {
                    session.next_segment = segment;
                }
            }
            s = session.next_copy;
        }
        let entry = &mut self.store[segment];
        entry.next = NONE;
        if takers == 0 {
            self.connections[c].held_places -= stored.places();
            self.store.remove(segment);
            self.counters[Counter::BytesNoSession] += u64::from(stored.len);
            return Counter::PacketsNoSession;
        }
        entry.references = takers;
        (entry.starts_turn, entry.need) = (starts_turn, need);
        self.counters[Counter::BytesAccepted] += u64::from(stored.len);
        self.counters[Counter::ReplayBytesOffered] += u64::from(stored.len) * u64::from(takers);
        let connection = &mut self.connections[c];
        if connection.tail == NONE {
            connection.head = segment;
        } else {
            self.store[connection.tail].next = segment;
        }
        connection.tail = segment;
        let mut s = connection.first_session;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            self.output(now_ns, s, out, in_hand);
            s = next;
        }
        Counter::PacketsData
    }

    fn set_multiplexed(&mut self, c: u32) {
        self.connections.origin_mut(c).set(Origin::MULTIPLEXED, true);
        let mut s = self.connections[c].first_session;
        while s != NONE {
            self.sessions.with_turns(s).1.ahead = Ahead::FLOWING;
            s = self.sessions[s].next_copy;
        }
    }

    /// Keeps a segment that lies behind a hole, in pieces between those that are there; bytes that are there already are not kept
    /// twice.
    fn keep_out_of_order<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        mut seq: u32,
        ack: u32,
        push: bool,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        let whole = Self::payload(out, in_hand).len();
        let end = seq.wrapping_add(whole as u32);
        // How many bytes are done, of them kept, and not.
        let (mut done, mut kept, mut duplicate) = (0, 0, 0);
        let (mut previous, steps) = self.out_of_order_before(c, seq);
        if self.connections.out_of_order(c) == NONE {
            self.connections.forget_walk(c);
        } else if steps > 0 && self.connections.walk(c, steps, previous, FREE_STEPS) > MOST_STEPS {
            if self.drop_doubtful(c) {
                return Err((Counter::PacketsLimit, Counter::BytesLimit));
            }
            return self.over_limit(now_ns, c, end, ack, out);
        }
        while done < whole {
            if previous != NONE {
                let covered = (self.store[previous].end().wrapping_sub(seq) as i32).max(0) as usize;
                let covered = covered.min(whole - done);
                done += covered;
                seq = seq.wrapping_add(covered as u32);
                duplicate += covered as u64;
            }
            let next = match previous {
                NONE => self.connections.out_of_order(c),
                previous => self.store[previous].next,
            };
            let len = match next {
                NONE => whole - done,
                next => ((self.store[next].seq.wrapping_sub(seq) as i32).max(0) as usize).min(whole - done),
            };
            let segment = loop {
                if len == 0 {
                    break NONE;
                }
                let piece = &Self::payload(out, in_hand)[done..done + len];
                let new = Segment::new(seq, ack, push && done + len == whole, micros(now_ns));
                if let Some(segment) = self.hold(c, new, piece) {
                    break segment;
                }
                if self.drop_doubtful_for_room(c) || !self.continues(c, seq, ack) {
                    // What was kept of it is still held, or has just been counted.
                    self.counters[Counter::BytesLimit] += whole as u64 - kept;
                    return Ok(Counter::PacketsLimit);
                }
                if !self.make_room(now_ns, c, len as u32, out) {
                    let fate = self.over_limit(now_ns, c, end, ack, out);
                    // The caller counts the whole packet; what was kept of it has just been counted too.
                    self.counters[Counter::BytesLimit] -= kept;
                    return fate;
                }
            };
            if segment != NONE {
                kept += len as u64;
                self.link_out_of_order(c, previous, segment, next);
                seq = seq.wrapping_add(len as u32);
                done += len;
            }
            previous = next;
        }
        self.counters[Counter::BytesDuplicate] += duplicate;
        if kept == 0 {
            return Ok(Counter::PacketsDuplicate);
        }
        Ok(Counter::PacketsData)
    }

    /// The last segment behind a hole that begins at or before `seq`, or `NONE`, and how many others it took to find it.
    fn out_of_order_before(&self, c: u32, seq: u32) -> (u32, u32) {
        let (mut next, last) = (self.connections.out_of_order(c), self.connections.out_of_order_tail(c));
        // After a loss all that follows comes in order: it goes to the end, without a walk.
        if next != NONE && !seq_before(seq, self.store[last].seq) {
            return (last, 0);
        }
        // What is sent again comes in order too: from the place of the one before on.
        let walked_to = self.connections.walked_to(c);
        if walked_to != NONE && !seq_before(seq, self.store[walked_to].seq) {
            next = walked_to;
        }
        let (mut previous, mut steps) = (NONE, 0);
        while next != NONE && !seq_before(seq, self.store[next].seq) {
            previous = next;
            next = self.store[next].next;
            steps += 1;
        }
        (previous, steps)
    }

    fn link_out_of_order(&mut self, c: u32, previous: u32, segment: u32, next: u32) {
        self.connections[c].held_places += self.store[segment].places();
        self.store[segment].next = next;
        if previous == NONE {
            self.connections.set_out_of_order(c, segment);
        } else {
            self.store[previous].next = segment;
        }
        if next == NONE {
            self.connections.set_out_of_order_tail(c, segment);
        }
    }

    /// The connection has a hole that it did not have before.
    pub(crate) fn open_hole(&mut self, c: u32, now: Tick) {
        let hole = self.connections.open_hole(c, self.capture_time.unwrap_or(now));
        let wait = if self.capture_time.is_some() { timing::CAPTURE_CLOCK } else { self.gap_timeout };
        self.arm_hole(hole, now.wrapping_add(wait));
    }

    /// Appends what waited for the hole that was just filled.
    fn take_in_order<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let mut progress = false;
        loop {
            let segment = self.connections.out_of_order(c);
            if segment == NONE || seq_before(self.connections[c].next_seq, self.store[segment].seq) {
                break;
            }
            let stored = self.store[segment];
            self.connections.set_out_of_order(c, stored.next);
            let connection = &mut self.connections[c];
            progress = true;
            let seen = connection.next_seq.wrapping_sub(stored.seq);
            if seen >= stored.len {
                connection.held_places -= stored.places();
                self.counters[Counter::BytesDuplicate] += u64::from(stored.len);
                self.store.remove(segment);
                continue;
            }
            if seen > 0 {
                // Its first bytes came in another packet.
                self.counters[Counter::BytesDuplicate] += u64::from(seen);
                self.store.trim_front(segment, seen);
            }
            self.link(now_ns, c, segment, &mut None, out);
        }
        if progress && self.connections.has_hole(c) {
            // Another hole: it has its own time.
            self.open_hole(c, tick(now_ns));
        }
    }

    /// Ends the stream when its end is the next in order.
    fn end_stream<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let Some(EarlyEnd { seq, ack, is_reset }) = self.connections.early_end(c) else { return };
        let connection = &self.connections[c];
        if seq_before(seq, connection.next_seq) {
            // No stream goes on after its end: it was somebody else's.
            self.connections.set_early_end(c, None);
            return;
        }
        if connection.next_seq != seq {
            return;
        }
        if is_reset {
            return self.reset_stream(now_ns, c, Some(ack), out);
        }
        let need = if connection.ack_advances(ack) { ack.wrapping_sub(connection.last_ack) } else { 0 };
        self.connections.set_end(c, End::Fin { need });
        self.connections.set_early_end(c, None);
        self.output_all(now_ns, c, out);
        if !self.connections[c].is_detached() {
            self.forget_if_over(c);
        }
    }
}
