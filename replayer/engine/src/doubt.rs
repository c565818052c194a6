//! Segments that anybody can send in the name of an open connection's client. A server takes an RST only at the very number that it expects next,
//! no SYN at all, and data only within its window and with an acknowledgment that may be; it answers the rest by a challenge ACK, and the
//! connection goes on (RFC 5961 sections 3 to 5). Here the server is not seen, nor most of what the client acknowledges, and captured packets may be
//! missing. So what the client sends next decides. Nothing of that ends a session whose client goes on, but for a jump of one that was silent for five minutes,
//! and for near guesses (docs/engine.md says what they cost).
//!
//! - **RST** at the next number: believed. Ahead of it, where the client may have sent what the capture has missed: the end behind a hole. When
//!   nothing else comes, the sessions end as with any hole, and the connection is joined at its next turn; new bytes show that it was not the
//!   client's. At any other number it is left out.
//! - **SYN**: remembered, the last one only. A segment that follows its number shows that the server has answered it; then it opens a connection.
//!   One with data (Fast Open) does so at once. But a stranger can send all that. So the connection before keeps its sessions, and if the next bytes
//!   of its stream come, it has its place again and the other one closes. Each client's address and port has one such connection before at most.
//! - **Data or a FIN far ahead** of the stream, or with an acknowledgment far from the last: where nothing fills the hole before it, the connection
//!   stays, behind another one that waits for what follows that data, as with a SYN. Nothing is refused, for it may be the client's.
//!
//! A genuine SYN that the server did not take, for it still has an older connection, does no harm either: the client answers the challenge ACK
//! by an RST at the very number, and sends its SYN again.

use crate::config::timing;
use crate::connection::{EarlyEnd, End, Left, NewConnection, Phase, Place, Syn, acknowledges_more};
use crate::counters::Counter;
use crate::engine::Engine;
use crate::output::Output;
use crate::session::seq_before;
use crate::slab::NONE;
use crate::stream::{FREE_STEPS, MOST_STEPS};
use crate::timer::tick;
use replayer_common::addr::Endpoint;
use replayer_common::packet::{TcpSegment, flags};

/// So many bytes of a stream may be missing before what shows that a stream goes on, or ends: more than most windows are, and so few that who
/// guesses a number rarely hits.
pub(crate) const NEAR: u32 = 1 << 20;
/// Where more is missing, so much behind the hole is the client's all the same, bytes: a stranger would have to send it for each number that he guesses.
const MUCH: u32 = 1 << 16;
/// The response may have gone on by so much since the client's last data, bytes, as far as that is no reason for doubt.
const READ: u32 = 1 << 28;
/// How far behind a SYN's number the first segment that follows it may be: no server offers a larger window before it knows the client's
/// scale (RFC 7323 section 2.2), but the first ones may be missing.
const FIRST_WINDOW: u32 = 1 << 16;

/// What is held behind a hole.
pub(crate) struct Behind {
    /// The numbers of the first segment, and what it acknowledges.
    first: (u32, u32),
    bytes: u32,
    /// How many segments.
    steps: u32,
    /// The last segment, or `NONE` where there is none but an end, and where it ends.
    last: u32,
    pub(crate) end: u32,
    /// The most that one of them acknowledges, near what the first one does.
    pub(crate) ack: u32,
    /// The last place where bytes are missing before some of them: the first number, and the one after.
    pub(crate) hole: (u32, u32),
}

impl Engine {
    /// Whether a server that has what was captured takes an RST at `seq`: at the next number, and as Linux does, at the end of the last
    /// segment that it has (net/ipv4/tcp_input.c, `tcp_validate_incoming`).
    pub(crate) fn is_reset_believed(&self, c: u32, seq: u32) -> bool {
        let connection = &self.connections[c];
        // Where no number is known, nothing is replayed either.
        if connection.phase == Phase::BetweenTurns || seq == connection.next_seq {
            return true;
        }
        // Behind a hole it counts only with what is the client's.
        let last = match self.connections.out_of_order(c) {
            NONE => None,
            _ => Some(&self.store[self.connections.out_of_order_tail(c)]),
        };
        let fin = self.connections.early_end(c).filter(|end| !end.is_reset);
        last.is_some_and(|last| seq == last.end() && self.fits(c, last.seq, last.ack))
            || fin.is_some_and(|fin| seq == fin.seq.wrapping_add(1) && self.fits(c, fin.seq, fin.ack))
    }

    /// Whether a segment at `seq`, ahead of the stream, is the client's beyond reasonable doubt: near, with an acknowledgment near the last.
    pub(crate) fn fits(&self, c: u32, seq: u32, ack: u32) -> bool {
        seq.wrapping_sub(self.connections[c].next_seq) < NEAR && self.acknowledgment_fits(c, ack)
    }

    /// Whether `ack` is near what the client has acknowledged before. Pure acknowledgments are not captured, so a client that has read much is
    /// further on.
    pub(crate) fn acknowledgment_fits(&self, c: u32, ack: u32) -> bool {
        let connection = &self.connections[c];
        !connection.ack_known || ack.wrapping_sub(connection.last_ack).wrapping_add(READ) < 2 * READ
    }

    /// What is behind the hole of a stream, as far as it may be of one sender: the first segment and what is near it.
    pub(crate) fn behind_hole(&self, c: u32) -> Option<Behind> {
        let mut next = self.connections.out_of_order(c);
        let (first, end) = match (next, self.connections.early_end(c)) {
            (NONE, None) => return None,
            (NONE, Some(EarlyEnd { seq, ack, .. })) => ((seq, ack), seq),
            _ => ((self.store[next].seq, self.store[next].ack), self.store[next].seq),
        };
        let hole = (self.connections[c].next_seq, first.0);
        let mut behind = Behind { first, bytes: 0, steps: 0, last: NONE, end, ack: first.1, hole };
        while next != NONE && self.store[next].seq.wrapping_sub(behind.end) < NEAR {
            let stored = &self.store[next];
            if stored.seq != behind.end {
                behind.hole = (behind.end, stored.seq);
            }
            behind.bytes += stored.len;
            behind.steps += 1;
            (behind.last, behind.end) = (next, stored.end());
            if seq_before(behind.ack, stored.ack) && stored.ack.wrapping_sub(first.1) < READ {
                behind.ack = stored.ack;
            }
            next = stored.next;
        }
        Some(behind)
    }

    /// In a stream that has a hole new bytes come before it: what is behind it is still waited for, if it is the client's.
    pub(crate) fn go_on_before_hole(&mut self, now_ns: u64, c: u32) {
        let first = match self.connections.out_of_order(c) {
            NONE => self.connections.early_end(c).map(|end| (end.seq, end.ack)),
            first => Some((self.store[first].seq, self.store[first].ack)),
        };
        if first.is_some_and(|(seq, ack)| self.fits(c, seq, ack)) {
            self.open_hole(c, tick(now_ns));
        } else {
            self.connections.go_on_before_hole(c);
        }
    }

    /// Whether what is behind a hole is the client's beyond reasonable doubt.
    fn is_the_clients(&self, c: u32, behind: &Behind) -> bool {
        let (seq, ack) = behind.first;
        self.fits(c, seq, ack) || behind.bytes >= MUCH && self.acknowledgment_fits(c, ack)
    }

    /// There is no room to hold more of the stream. Drops what is held of it and may be a stranger's. Returns whether anything was.
    pub(crate) fn drop_doubtful(&mut self, c: u32) -> bool {
        let Some(behind) = self.behind_hole(c).filter(|behind| behind.last != NONE) else { return false };
        let is_dropped = if self.is_the_clients(c, &behind) {
            self.drop_out_of_order_after(c, behind.last, Counter::BytesLimit)
        } else {
            self.drop_out_of_order(c, Counter::BytesLimit);
            true
        };
        if is_dropped {
            self.connections.forget_walk(c);
        } else {
            // Who comes again and again leads through all of it for nothing.
            self.connections.walk(c, behind.steps, self.connections.walked_to(c), FREE_STEPS);
        }
        is_dropped
    }

    /// The same, unless that led through too much of it for nothing already: where the store stays full it would for each segment.
    pub(crate) fn drop_doubtful_for_room(&mut self, c: u32) -> bool {
        self.connections.walked(c) <= MOST_STEPS && self.drop_doubtful(c)
    }

    /// Whether what is held behind the hole is not near it, if anything is.
    pub(crate) fn is_doubtful_behind_hole(&self, c: u32) -> bool {
        let first = self.connections.out_of_order(c);
        first != NONE && !self.fits(c, self.store[first].seq, self.store[first].ack)
    }

    /// Whether a segment at `seq` is of one sender with what is held behind the hole, where nothing of that is doubtful.
    pub(crate) fn continues(&self, c: u32, seq: u32, ack: u32) -> bool {
        let from = self.connections[c].next_seq;
        let most = match self.connections.out_of_order(c) {
            NONE => from,
            _ => self.store[self.connections.out_of_order_tail(c)].end(),
        };
        seq.wrapping_sub(from) < most.wrapping_sub(from).wrapping_add(NEAR)
            && self.acknowledgment_fits(c, ack)
    }

    /// The time of a hole is over. Where what is behind it may be a stranger's, the sessions stay, and unless the stream has gone on, another
    /// connection waits for what follows that, if there is room for one.
    pub(crate) fn end_hole<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let Some(behind) = self.behind_hole(c) else { return };
        let end = self.connections.early_end(c);
        let is_the_clients = self.is_the_clients(c, &behind);
        if !is_the_clients && behind.last != NONE && end.is_some_and(|end| self.fits(c, end.seq, end.ack)) {
            // The end is, and then it is all that is behind the hole.
            self.drop_out_of_order(c, Counter::BytesGap);
            return self.end_hole(now_ns, c, out);
        }
        let went_on = self.connections.went_on_before_hole(c);
        if is_the_clients && went_on {
            return self.open_hole(c, tick(now_ns));
        }
        // Behind another connection it has had its time, and behind an end nothing follows.
        let waits = !went_on && end.is_none() && self.connections[c].place == Place::Current;
        if self.connections[c].phase != Phase::Following || is_the_clients {
            return self.give_up_hole(now_ns, c, out);
        }
        self.drop_out_of_order(c, Counter::BytesGap);
        self.connections.set_early_end(c, None);
        if waits && self.may_stay(now_ns, c, out) {
            let left = Left::before(behind.hole);
            self.watch_beside(now_ns, c, (behind.end, behind.ack), Some(left), out);
        }
    }

    /// Whether `c` may stay behind another connection of its addresses: there is room for that, and none before it. One that was silent for long makes
    /// way: else a stream that jumps twice would be lost for as long as that one may be idle.
    fn may_stay<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) -> bool {
        let is_current = self.connections[c].place == Place::Current;
        if !is_current || self.connections.end(c) != End::Open || self.connections.is_full() {
            return false;
        }
        if let Some(before) = self.before(c) {
            if tick(now_ns).wrapping_sub(self.connections[before].last_seen) < timing::WATCHED_IDLE {
                return false;
            }
            self.replace(now_ns, before, out);
        }
        true
    }

    /// The connection behind `c`.
    fn before(&self, c: u32) -> Option<u32> {
        if self.earlier == 0 {
            return None;
        }
        let hash = self.connections.hash(c, self.config.seed);
        self.find_placed(hash, &self.connections[c].client, self.connections.server(c), Place::Earlier)
    }

    /// Data up to `end` may be the client's, far from its stream: a connection in the place of `c` waits for what follows, and `c` stays behind it.
    fn watch_beside<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        (end, ack): (u32, u32),
        left: Option<Left>,
        out: &mut O,
    ) {
        let (old, server, origin) =
            (&self.connections[c], *self.connections.server(c), self.connections.origin(c));
        let mut new = NewConnection::beside(old, server, origin, tick(now_ns));
        (new.connection.next_seq, new.connection.last_ack) = (end, ack);
        new.connection.ack_known = true;
        if let Some(new) = self.put_before(now_ns, c, new, out) {
            self.connections.set_left(new, left);
        }
    }

    /// A segment is further from the stream than any window is. A part of the stream may not have been captured: it is looked for there as well.
    pub(crate) fn look_far(&mut self, now_ns: u64, c: u32, segment: &TcpSegment, out: &mut impl Output) {
        let is_data = segment.payload_len > 0 && segment.flags & (flags::SYN | flags::FIN | flags::RST) == 0;
        if is_data && self.connections.origin(c).copies() > 0 && self.may_stay(now_ns, c, out) {
            let end = segment.seq.wrapping_add(segment.payload_len);
            self.watch_beside(now_ns, c, (end, segment.ack), None, out);
        }
    }

    /// Whether a turn starts with the segment where the stream was before it was seen further on.
    pub(crate) fn starts_turn_where_left(&self, c: u32, segment: &TcpSegment) -> bool {
        let Some(Left { seq, ack: Some(ack), .. }) = self.connections.left(c) else { return false };
        segment.seq == seq && acknowledges_more(ack, segment.ack)
    }

    /// Takes note of data with which no turn of a watched stream is known to start: what it acknowledges, and where else the stream may go on.
    /// To be told before [`Engine::follow_idly`].
    pub(crate) fn watch(&mut self, c: u32, segment: &TcpSegment) {
        let (seq, len) = (segment.seq, segment.payload_len);
        if len == 0 {
            return;
        }
        let connection = &self.connections[c];
        let next_seq = connection.next_seq;
        let is_repeated = next_seq.wrapping_sub(seq.wrapping_add(len)) < NEAR;
        let follows = next_seq.wrapping_sub(seq) < len;
        match self.connections.left(c) {
            Some(left) if seq == left.seq || is_repeated && left.has(seq) => {
                // What was seen before and comes once more behind a hole that was filled starts no turn. Or it is seen there now, not further on.
                let is_over = left.until.wrapping_sub(seq) <= len || !is_repeated;
                let new = Left { seq: seq.wrapping_add(len), ack: Some(segment.ack), ..left };
                self.connections.set_left(c, (!is_over).then_some(new));
            }
            // What was seen near the place that was left is more likely the client's than what is seen now; further on, it is less.
            left if !is_repeated && !follows && left.is_none_or(|left| left.is_narrow()) => {
                self.connections.set_left(c, Some(Left::before((next_seq, seq))));
            }
            _ => {}
        }
        let connection = &mut self.connections[c];
        // Where it is not of one sender with what came before, that says nothing. Nothing is known of one that was shed at the data in its SYN.
        if !connection.ack_known || seq != next_seq && !is_repeated {
            (connection.last_ack, connection.ack_known) = (segment.ack, true);
        }
    }

    /// Takes note of a segment of which nothing is replayed: data from `seq` on, or a FIN.
    pub(crate) fn follow_idly(&mut self, c: u32, segment: &TcpSegment, seq: u32) {
        let is_near = self.connections[c].phase == Phase::BetweenTurns || self.distance(c, seq) < NEAR;
        let end = seq.wrapping_add(segment.payload_len);
        if is_near && segment.payload_len > 0 {
            self.stream_goes_on(c, end);
        }
        // Far behind is no repetition: the number that was there was not the client's.
        let connection = &mut self.connections[c];
        if segment.payload_len > 0 && connection.next_seq.wrapping_sub(end).wrapping_sub(1) >= NEAR {
            connection.next_seq = end;
        }
        if is_near && segment.flags & flags::FIN != 0 {
            self.connections.set_end(c, End::Fin { need: 0 });
            self.forget_if_over(c);
        }
    }

    /// An RST at a number that is not the next: it may be behind a hole, if its acknowledgment fits too.
    pub(crate) fn on_doubtful_reset(&mut self, now_ns: u64, c: u32, seq: u32, acknowledged: Option<u32>) {
        let connection = &self.connections[c];
        let Some(ack) = acknowledged else { return };
        let fits = seq.wrapping_sub(connection.next_seq) < NEAR
            && (!connection.ack_known || ack.wrapping_sub(connection.last_ack) < READ);
        if !fits || connection.phase != Phase::Following || self.connections.has_hole(c) {
            return;
        }
        self.connections.set_early_end(c, Some(EarlyEnd { seq, ack, is_reset: true }));
        self.open_hole(c, tick(now_ns));
    }

    /// New bytes of a stream came, up to `end`: its client goes on after the SYN or RST inside it, unless an RST has only overtaken them.
    pub(crate) fn stream_goes_on(&mut self, c: u32, end: u32) {
        if self.connections[c].is_uninterrupted() {
            return;
        }
        self.connections.set_syn_inside(c, None);
        if self.connections.early_end(c).is_some_and(|early| early.is_reset && early.seq != end) {
            self.connections.set_early_end(c, None);
        }
    }

    /// The connection that a segment is of: `found`, which has its addresses, unless it shows that a SYN inside that one was answered, or
    /// that one before it goes on. `Err`: there is no room for another.
    pub(crate) fn whose<O: Output>(
        &mut self,
        now_ns: u64,
        hash: u32,
        found: Option<u32>,
        (client, server): (&Endpoint, &Endpoint),
        segment: &TcpSegment,
        out: &mut O,
    ) -> Result<Option<u32>, (Counter, Counter)> {
        let found = match self.earlier {
            0 => found,
            _ => self.go_back(now_ns, hash, found, (client, server), segment, out),
        };
        let Some(c) = found else { return Ok(None) };
        let Some(syn) = self.connections.syn_inside(c) else { return Ok(found) };
        let behind = segment.seq.wrapping_sub(syn.isn).wrapping_sub(1);
        let is_nearer = behind < self.distance(c, segment.seq);
        if behind < FIRST_WINDOW && is_nearer && segment.flags & (flags::SYN | flags::RST) == 0 {
            return self.open_inside(now_ns, c, &syn, out).map(Some);
        }
        Ok(found)
    }

    /// How far a number is from the next of the connection's stream.
    fn distance(&self, c: u32, seq: u32) -> u32 {
        let connection = &self.connections[c];
        // Without any known number, as far as can be.
        let is_known = connection.phase != Phase::BetweenTurns;
        if is_known { (seq.wrapping_sub(connection.next_seq) as i32).unsigned_abs() } else { u32::MAX }
    }

    /// The connection before `found`, if the segment is of its stream: the next of it, or what lies just behind that.
    fn go_back<O: Output>(
        &mut self,
        now_ns: u64,
        hash: u32,
        found: Option<u32>,
        (client, server): (&Endpoint, &Endpoint),
        segment: &TcpSegment,
        out: &mut O,
    ) -> Option<u32> {
        let Some(before) = self.find_placed(hash, client, server, Place::Earlier) else { return found };
        let connection = &self.connections[before];
        // Where none is known, what is near no other stream is of this one.
        let is_known = connection.phase != Phase::BetweenTurns;
        let (away, next_seq) = match is_known {
            true => (self.distance(before, segment.seq), connection.next_seq),
            false => (NEAR - 1, segment.seq),
        };
        let is_reset = segment.flags & flags::RST != 0;
        let fits = away < NEAR && self.acknowledgment_fits(before, segment.ack);
        let is_of = away == 0 || fits && !is_reset;
        let is_of = is_of && segment.flags & flags::SYN == 0 && (is_reset || !segment.is_pure_ack());
        let is_behind = seq_before(segment.seq, next_seq);
        let is_nearer = found.is_none_or(|c| {
            let other = self.distance(c, segment.seq);
            match self.connections[c].phase {
                // Where nothing is replayed, its number may have come from this very stream.
                Phase::Watching | Phase::Encrypted => away <= other,
                // A stream has repetitions of its own.
                _ if is_behind => other >= NEAR,
                _ => away < other,
            }
        });
        if !is_of || !is_nearer || self.connections.end(before) != End::Open {
            return found;
        }
        let fin = u32::from(segment.flags & flags::FIN != 0);
        let end = segment.seq.wrapping_add(segment.payload_len).wrapping_add(fin);
        if is_reset || is_behind && !seq_before(next_seq, end) {
            // Nothing new, but not of another stream either.
            return Some(before);
        }
        self.connections[before].place = Place::Current;
        self.earlier -= 1;
        match found {
            // Who does not know the very number may be a stranger: the other one stays.
            Some(c) if away > 0 && self.connections.end(c) == End::Open => self.put_behind(hash, c),
            Some(c) => self.replace(now_ns, c, out),
            None => {}
        }
        Some(before)
    }

    /// A connection has its place behind another one of its addresses, also in the table, where that is found first.
    fn put_behind(&mut self, hash: u32, c: u32) {
        self.by_client.remove(hash, c);
        self.by_client.insert(hash, c);
        self.connections[c].place = Place::Earlier;
        self.earlier += 1;
    }

    /// Puts a new connection in the place of `c`, which stays behind it while it is open: the first one of these addresses does. `None`: there is
    /// no room for another.
    fn put_before<O: Output>(&mut self, now_ns: u64, c: u32, new: NewConnection, out: &mut O) -> Option<u32> {
        self.connections.set_syn_inside(c, None);
        // Without room for another, one that has no session makes it.
        let is_kept = self.connections[c].first_session != NONE || !self.connections.is_full();
        if is_kept && self.connections.end(c) == End::Open && self.before(c).is_none() {
            let opened = self.new_connection(new, tick(now_ns))?;
            self.put_behind(self.connections.hash(c, self.config.seed), c);
            return Some(opened);
        }
        self.replace(now_ns, c, out);
        self.new_connection(new, tick(now_ns))
    }

    /// Opens a connection with a SYN that came inside another one.
    pub(crate) fn open_inside<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        syn: &Syn,
        out: &mut O,
    ) -> Result<u32, (Counter, Counter)> {
        let (client, server) = (self.connections[c].client, *self.connections.server(c));
        let mut new = NewConnection::new(client, server, Phase::Following, tick(now_ns));
        new.set_syn(syn);
        let opened = self.put_before(now_ns, c, new, out);
        let opened = opened.ok_or((Counter::PacketsLimit, Counter::BytesLimit))?;
        self.open_sessions(now_ns, opened, syn.isn, false, out);
        Ok(opened)
    }
}
