//! A session: one TCP connection replayed to a target. This file holds its state and what can be said of one session alone;
//! `sender.rs` and `receiver.rs` hold what it does.
//!
//! Sequence numbers are the client's own: the session's ISN is the client's, or, when it joins in the middle, the one that makes
//! the first byte sent the next one. So a byte has the same number in the capture, in the store and towards the target.

use crate::config::timing;
use crate::sack::NO_BOARD;
use crate::slab::NONE;
use crate::timer::{Due, Tick, before};
use replayer_common::addr::Endpoint;

/// RFC 9293 section 3.3.2. LISTEN and SYN-RECEIVED do not occur: the engine is a client. TIME-WAIT is not kept: the identity
/// rests in quarantine instead, and a repeated FIN of the target is acknowledged without a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    SynSent,
    Established,
    FinWait1,
    FinWait2,
    Closing,
    CloseWait,
    LastAck,
    Closed,
}

impl State {
    /// Whether data may be sent.
    pub(crate) fn may_send(self) -> bool {
        matches!(self, State::Established | State::CloseWait)
    }

    /// Whether our FIN was sent.
    pub(crate) fn fin_sent(self) -> bool {
        matches!(self, State::FinWait1 | State::FinWait2 | State::Closing | State::LastAck)
    }
}

/// Initial congestion window, segments (RFC 6928).
pub(crate) const INITIAL_WINDOW: u32 = 10;

/// No MSS is believed to be smaller: Linux's `TCP_MIN_SND_MSS`.
pub(crate) const MIN_MSS: u16 = 48;

/// Sequence number comparison (RFC 9293 section 3.4).
#[inline]
pub(crate) fn seq_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// Where responses may have ended: the last ends of writes seen (see [`Session::note_response`]), oldest first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Marks {
    /// Sequence numbers, in bytes: so that other bytes fit behind.
    ends: [[u8; 4]; MARKS],
    /// How many there were: one more than are kept says that older ones were pushed out.
    count: u8,
}

/// Boundaries that are kept.
const MARKS: usize = 4;

impl Marks {
    fn len(&self) -> usize {
        usize::from(self.count).min(MARKS)
    }

    fn overflowed(&self) -> bool {
        usize::from(self.count) > MARKS
    }

    fn known(&self) -> impl Iterator<Item = u32> {
        self.ends[..self.len()].iter().map(|&end| u32::from_ne_bytes(end))
    }

    pub(crate) fn push(&mut self, end: u32) {
        if self.len() == MARKS {
            self.ends.rotate_left(1);
            self.ends[MARKS - 1] = end.to_ne_bytes();
            self.count = MARKS as u8 + 1;
        } else {
            self.ends[self.len()] = end.to_ne_bytes();
            self.count += 1;
        }
    }

    /// The first boundary at or after `seq`. When boundaries between the two were pushed out, where the response ended is not known, and
    /// `seq` itself is the better guess.
    fn first_from(&self, seq: u32) -> Option<u32> {
        let (found, end) = self.known().enumerate().find(|&(_, end)| !seq_before(end, seq))?;
        Some(if found == 0 && self.overflowed() { seq } else { end })
    }

    /// Whether `seq` is known to be a boundary.
    fn has(&self, seq: u32) -> bool {
        self.known().any(|end| end == seq)
    }

    /// Forgets the boundaries up to `seq`.
    fn forget_up_to(&mut self, seq: u32) {
        let passed = self.known().filter(|&end| !seq_before(seq, end)).count();
        if passed > 0 {
            self.count = (self.len() - passed) as u8;
            self.ends.rotate_left(passed);
        }
    }

    fn clear(&mut self) {
        self.count = 0;
    }
}

/// What let a turn go, or what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// As many response bytes as the client had read online.
    Bytes,
    /// The response had ended.
    Quiet,
    /// The hold limit.
    HoldLimit,
    /// Look again at this tick.
    Wait(Tick),
}

/// Laid out by use: data that can go at once reads and changes the first two cache lines, what a response or a turn needs besides is in
/// the third.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Session {
    pub(crate) state: State,
    /// Takes no further data; it closes when what it has, up to `last_segment`, is delivered, for `cut_reason`.
    pub(crate) cut: bool,
    /// Its first turn follows no other: it waits for nothing.
    pub(crate) joined: bool,
    /// In the list of sessions that this batch has touched.
    pub(crate) dirty: bool,
    pub(crate) service: u16,
    pub(crate) mss: u16,
    /// The client connection that it copies, and the next copy of the same.
    pub(crate) connection: u32,
    pub(crate) next_copy: u32,
    /// First segment not wholly acknowledged, and the place of `snd_nxt`; `NONE`: at the end of what is stored.
    pub(crate) una_segment: u32,
    pub(crate) next_segment: u32,
    pub(crate) next_offset: u32,
    // Send side (RFC 9293 section 3.3.1). Until the SYN is acknowledged, `snd_una` is its number.
    pub(crate) snd_una: u32,
    pub(crate) snd_nxt: u32,
    /// The highest number ever sent, plus one: after a timeout `snd_nxt` goes back behind it.
    pub(crate) snd_max: u32,
    pub(crate) snd_wnd: u32,
    // Congestion (RFC 5681, RFC 6582).
    pub(crate) cwnd: u32,
    // Receive side.
    pub(crate) rcv_nxt: u32,
    // Deadlines; `None` when not wanted.
    pub(crate) rto_at: Option<Due>,
    /// When the timer in the wheel fires, at the latest; so that the wheel need not be looked at.
    pub(crate) armed_at: Option<Due>,
    // Timestamps (RFC 7323).
    pub(crate) ts_offset: u32,

    pub(crate) ts_recent: u32,
    pub(crate) identity: Endpoint,
    pub(crate) timestamps: bool,
    /// A round trip is being measured (RFC 6298).
    pub(crate) timing: bool,
    pub(crate) timed_seq: u32,
    pub(crate) timed_at_us: u32,
    pub(crate) srtt_us: u32,
    pub(crate) rttvar_us: u32,
    pub(crate) tries: u8,
    /// The target may know of the connection only by its first segment: the others wait until that was acknowledged.
    pub(crate) first_alone: bool,
    pub(crate) unacked_segments: u8,
    pub(crate) ack_now: bool,
    pub(crate) ack_at: Option<Due>,
    pub(crate) release_at: Option<Due>,
    /// Response bytes before this number belong to earlier turns.
    pub(crate) turn_base: u32,
    /// The current turn's first byte, and whether a response that does not acknowledge it shows that the turn went too early.
    pub(crate) turn_seq: u32,
    /// When the current turn's first byte was sent; its response has not begun.
    pub(crate) turn_sent_us: u32,

    pub(crate) awaiting_response: bool,
    pub(crate) watch_early: bool,
    pub(crate) holding: bool,
    /// The target sends without being asked: its silences say nothing, only its byte count does.
    pub(crate) flowing: bool,
    pub(crate) hold_since: Tick,
    pub(crate) response_at: Tick,
    /// When the first response byte after `turn_base` came.
    pub(crate) response_began: Tick,
    /// Responses of up to this many bytes end where their first write ends, as far as was seen of this target.
    pub(crate) whole: u32,
    /// The shortest round trip measured.
    pub(crate) rtt_min_us: u32,
    pub(crate) ssthresh: u32,
    pub(crate) recover: u32,
    pub(crate) last_segment: u32,
    pub(crate) marks: Marks,
    pub(crate) dup_acks: u8,
    /// The path's MTU that is being tried, and not acknowledged yet; else 0.
    pub(crate) narrowed_to: u16,
    /// What the target has beyond its acknowledgment, or `NO_BOARD`.
    pub(crate) board: u16,
    pub(crate) in_recovery: bool,
    pub(crate) snd_wscale: u8,
    /// The last segment of the response ended a write of the target's server.
    pub(crate) response_ended: bool,
    /// It had PSH, but was full: more may follow.
    pub(crate) response_pushed: bool,
    pub(crate) cut_reason: crate::counters::EndReason,
    /// The target sent FIN before us.
    pub(crate) target_closed_first: bool,
}

// Whoever needs more has to look for what is not needed any more: a million of them are read at random.
const _: () = assert!(size_of::<Session>() == 192);

impl Session {
    /// Asks for the cache lines that data needs, so that they are there when it comes.
    #[inline]
    pub(crate) fn read_ahead(&self) {
        replayer_prefetch::line(&self.state);
        replayer_prefetch::line(&self.ts_recent);
    }

    /// Asks for the third, which a response needs and the beginning of a turn.
    #[inline]
    pub(crate) fn read_ahead_rest(&self) {
        replayer_prefetch::line(&self.awaiting_response);
    }

    /// A segment with an acknowledgment goes out: nothing more is owed to the target. Also when it cannot be sent: a deadline that stays in
    /// the past would fire for ever.
    #[inline]
    pub(crate) fn acknowledged(&mut self) {
        self.ack_now = false;
        self.unacked_segments = 0;
        self.ack_at = None;
    }

    /// Whether its first SYN is still to be sent.
    pub(crate) fn is_unasked(&self) -> bool {
        self.state == State::SynSent && self.snd_nxt == self.snd_una
    }

    /// The retransmission timeout with its backoff, microseconds.
    #[inline(always)]
    pub(crate) fn rto_us(&self) -> u32 {
        if self.tries == 0 && self.state != State::SynSent {
            return self.first_rto_us();
        }
        self.rto_us_after(self.tries)
    }

    /// The same before any timeout.
    #[inline(always)]
    pub(crate) fn first_rto_us(&self) -> u32 {
        if self.srtt_us == 0 {
            return timing::SYN_TIMEOUT_US;
        }
        (self.srtt_us + (4 * self.rttvar_us).max(1000)).clamp(timing::RTO_MIN_US, timing::RTO_MAX_US)
    }

    /// The same after so many timeouts.
    pub(crate) fn rto_us_after(&self, tries: u8) -> u32 {
        if self.state == State::SynSent {
            return (timing::SYN_TIMEOUT_US << tries.min(timing::SYN_TRIES)).min(timing::BACKOFF_MAX_US);
        }
        let base = self.first_rto_us();
        base.saturating_mul(1 << tries.min(6)).min(base.max(timing::BACKOFF_MAX_US))
    }

    /// Takes a round-trip time into the estimate (RFC 6298 section 2).
    pub(crate) fn round_trip(&mut self, rtt_us: u32) {
        let rtt = rtt_us.clamp(1, 60_000_000);
        if self.srtt_us == 0 {
            self.rtt_min_us = rtt;
            self.srtt_us = rtt;
            self.rttvar_us = rtt / 2;
        } else {
            self.rtt_min_us = self.rtt_min_us.min(rtt);
            self.rttvar_us = (3 * self.rttvar_us + self.srtt_us.abs_diff(rtt)) / 4;
            self.srtt_us = ((7 * u64::from(self.srtt_us) + u64::from(rtt)) / 8) as u32;
        }
    }

    /// Bytes sent and not acknowledged (SYN and FIN count one each).
    pub(crate) fn in_flight(&self) -> u32 {
        self.snd_nxt.wrapping_sub(self.snd_una)
    }

    /// The segment after `segment` among those that the session was given, or `NONE`.
    pub(crate) fn segment_after(&self, segment: u32, next: u32) -> u32 {
        if self.cut && segment == self.last_segment { NONE } else { next }
    }

    /// Takes note of a segment of the response, new up to `end`.
    ///
    /// PSH alone does not say that a server has written all it had: Linux sets it on every TSO packet (net/ipv4/tcp_output.c,
    /// `__tcp_transmit_skb`), which is cut into full segments. A segment that is not full does, for there was nothing to fill it with.
    pub(crate) fn note_response(
        &mut self,
        client_mss: u16,
        payload_len: u32,
        end: u32,
        push: bool,
        fin: bool,
        now: Tick,
    ) {
        let options = if self.timestamps { 12 } else { 0 };
        // The target's segments keep to the smaller MSS of the two, as ours do.
        let full = self.mss.min(client_mss.saturating_sub(options));
        self.response_at = now;
        self.response_ended = fin || push && payload_len < u32::from(full);
        self.response_pushed = push || fin;
        if self.response_ended {
            self.marks.push(end);
        }
    }

    /// How long the target must be silent for its response to count as ended, ticks: longer than it waits for an acknowledgment when its
    /// congestion window is full, and as long as the response has lasted, for who sends slowly pauses longer. After a full segment more
    /// is likely to follow.
    fn quiet_ticks(&self) -> u32 {
        let round_trips = 2 * self.srtt_us.min(1 << 24) + 4 * self.rttvar_us.min(1 << 24);
        let lasted = crate::timer::microseconds(self.response_at.wrapping_sub(self.response_began));
        let least = if self.response_ended { timing::QUIET_MIN_US } else { timing::QUIET_MAX_US };
        // Delayed acknowledgments make the smoothed round trip longer than the path's, so it alone does not set the limit.
        let most = timing::QUIET_MAX_US.max(2 * self.rtt_min_us.min(1 << 24));
        crate::timer::ticks(u64::from(round_trips.max(lasted).clamp(least, most)) * 1000)
    }

    /// Whether the next turn may begin, given that online the client had read `need` response bytes since the turn before.
    ///
    /// Where target and online server answer with the same sizes, a write of the target ends at the very count, and the turn goes at
    /// once. Where they do not, the end of a response is seen by silence, and the next turn's count begins there: a longer or
    /// shorter response shifts nothing that comes after it. Silence costs time, so responses of one flight that are no longer than one
    /// that was found to have come in one write are taken to end with their first write, until one does not.
    pub(crate) fn gate(&mut self, need: u32, hold_limit: u32, now: Tick) -> Gate {
        let expected = self.turn_base.wrapping_add(need);
        let enough = !seq_before(self.rcv_nxt, expected);
        if enough && need == 0 {
            return Gate::Bytes;
        }
        if enough {
            // The last segment of a response may be a full one.
            let exact = self.marks.has(expected) || self.response_pushed && self.rcv_nxt == expected;
            let end = if exact { Some(expected) } else { self.marks.first_from(expected) };
            let trusted = |end: u32| end != expected && end.wrapping_sub(self.turn_base) <= self.whole;
            if let Some(end) = end.filter(|&end| exact || self.flowing || trusted(end)) {
                self.turn_base = end;
                self.marks.forget_up_to(end);
                return Gate::Bytes;
            }
        }
        let length = self.rcv_nxt.wrapping_sub(self.turn_base);
        let first = if enough { expected } else { self.turn_base.wrapping_add(1) };
        let in_one_write = self.marks.first_from(first) == Some(self.rcv_nxt);
        // Much less than online may be the header before the rest.
        let about_as_long = length <= self.whole && length >= need / 2;
        if !enough && in_one_write && about_as_long && self.in_flight() == 0 {
            self.begin_count();
            return Gate::Quiet;
        }
        if !self.holding {
            self.holding = true;
            self.hold_since = now;
        }
        let limit = self.hold_since.wrapping_add(hold_limit);
        let something = seq_before(self.turn_base, self.rcv_nxt);
        // A count that is reached in the middle of a burst waits for the burst's end, like a response that is shorter.
        let ended = something && (enough || self.response_pushed) && self.in_flight() == 0;
        let quiet_at = self.response_at.wrapping_add(self.quiet_ticks());
        if ended && !before(now, quiet_at) {
            // What is longer than a flight comes in several, with pauses and ends of writes where they fall.
            if !in_one_write {
                self.whole = 0;
            } else if length <= INITIAL_WINDOW * u32::from(self.mss) {
                self.whole = self.whole.max(length);
            }
            self.begin_count();
            return Gate::Quiet;
        }
        if !before(now, limit) {
            // All that was asked for has come, and silence never: it does not wait for us either.
            self.flowing |= enough;
            self.begin_count();
            return Gate::HoldLimit;
        }
        Gate::Wait(if ended && before(quiet_at, limit) { quiet_at } else { limit })
    }

    /// What was received belongs to earlier turns.
    fn begin_count(&mut self) {
        self.turn_base = self.rcv_nxt;
        self.marks.clear();
    }

    /// The earliest deadline.
    #[inline]
    pub(crate) fn deadline(&self) -> Option<Tick> {
        let earlier = |a: Option<Tick>, b: Option<Due>| match (a, b.map(Due::tick)) {
            (Some(a), Some(b)) => Some(if before(b, a) { b } else { a }),
            (a, b) => a.or(b),
        };
        earlier(earlier(self.rto_at.map(Due::tick), self.ack_at), self.release_at)
    }

    /// A session about to send its SYN.
    pub(crate) fn new(identity: Endpoint, service: u16, connection: u32, iss: u32) -> Session {
        Session {
            identity,
            service,
            state: State::SynSent,
            connection,
            next_copy: NONE,
            dirty: false,
            cut: false,
            last_segment: NONE,
            joined: false,
            cut_reason: crate::counters::EndReason::Completed,
            target_closed_first: false,
            board: NO_BOARD,
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            snd_wnd: 0,
            snd_wscale: 0,
            mss: 536,
            una_segment: NONE,
            next_segment: NONE,
            next_offset: 0,
            cwnd: 0,
            ssthresh: u32::MAX,
            recover: iss,
            in_recovery: false,
            dup_acks: 0,
            tries: 0,
            srtt_us: 0,
            rttvar_us: 0,
            rtt_min_us: 0,
            narrowed_to: 0,
            first_alone: false,
            timing: false,
            timed_seq: 0,
            timed_at_us: 0,
            rcv_nxt: 0,
            ack_now: false,
            unacked_segments: 0,
            timestamps: false,
            ts_offset: 0,
            ts_recent: 0,
            turn_base: 0,
            marks: Marks::default(),
            response_ended: false,
            response_pushed: false,
            response_at: 0,
            response_began: 0,
            whole: 0,
            flowing: false,
            turn_seq: iss,
            watch_early: false,
            holding: false,
            hold_since: 0,
            awaiting_response: false,
            turn_sent_us: 0,
            rto_at: None,
            armed_at: None,
            ack_at: None,
            release_at: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let mut s = Session::new(Endpoint { ip: [0; 16], port: 1 }, 0, 0, 0);
        s.state = State::Established;
        (s.rcv_nxt, s.turn_base) = (1000, 1000);
        (s.srtt_us, s.rttvar_us, s.rtt_min_us) = (100, 10, 100);
        s
    }

    /// The gate opens by silence, not before.
    #[track_caller]
    fn quiet(s: &mut Session, need: u32, now: Tick) -> Tick {
        let Gate::Wait(at) = s.gate(need, 100_000, now) else { panic!("no wait") };
        assert!(matches!(s.gate(need, 100_000, at - 1), Gate::Wait(_)));
        assert_eq!(s.gate(need, 100_000, at), Gate::Quiet);
        s.holding = false;
        at
    }

    fn response(s: &mut Session, bytes: u32, push: bool, now: Tick) {
        if s.rcv_nxt == s.turn_base {
            s.response_began = now;
        }
        s.rcv_nxt = s.rcv_nxt.wrapping_add(bytes);
        s.note_response(1460, bytes, s.rcv_nxt, push, false, now);
    }

    #[test]
    fn b021_a_turn_waits_for_the_whole_response() {
        let mut s = session();
        assert!(matches!(s.gate(300, 1000, 10), Gate::Wait(1010)));
        response(&mut s, 200, false, 11);
        assert!(matches!(s.gate(300, 1000, 12), Gate::Wait(1010)));
        response(&mut s, 100, true, 13);
        assert_eq!(s.gate(300, 1000, 13), Gate::Bytes);
        assert_eq!(s.turn_base, 1300);
    }

    #[test]
    fn b026_longer_and_shorter_responses_shift_nothing() {
        let mut s = session();
        // 50 bytes longer: the turn goes at its end, and the next one counts from there.
        response(&mut s, 350, true, 1);
        let at = quiet(&mut s, 300, 1);
        assert!(at < 40, "{at}");
        assert!(
            matches!(s.gate(300, 1000, at), Gate::Wait(_)),
            "the surplus does not count for the next turn"
        );
        s.holding = false;
        // Shorter: quiet after PSH.
        response(&mut s, 100, true, at + 10);
        let at = quiet(&mut s, 300, at + 10);
        response(&mut s, 300, true, at + 10);
        assert_eq!(s.gate(300, 1000, at + 10), Gate::Bytes);
    }

    #[test]
    fn b026_no_early_release_in_the_middle_of_a_burst() {
        let mut s = session();
        response(&mut s, 400, false, 1);
        assert!(matches!(s.gate(300, 1000, 1), Gate::Wait(_)));
        response(&mut s, 400, true, 2);
        quiet(&mut s, 300, 2);
        assert_eq!(s.turn_base, 1800);
    }

    #[test]
    fn b026_a_longer_response_in_several_writes_is_waited_for_to_its_end() {
        let mut s = session();
        let mut now = 0;
        for write in 0..20 {
            now += 10;
            response(&mut s, 120, true, now);
            assert!(matches!(s.gate(610, 1000, now), Gate::Wait(_)), "after {write} writes");
        }
        quiet(&mut s, 610, now);
        assert_eq!(s.turn_base, 1000 + 20 * 120);
    }

    #[test]
    fn b026_responses_that_are_written_at_once_cost_one_silence() {
        let mut s = session();
        response(&mut s, 350, true, 1);
        let now = quiet(&mut s, 300, 1);
        for length in [340, 350, 301] {
            response(&mut s, length, true, now);
            assert_eq!(s.gate(300, 1000, now), Gate::Bytes, "{length}");
        }
        // A longer one than was seen before: it may have more writes.
        response(&mut s, 360, true, now);
        response(&mut s, 10, true, now);
        let now = quiet(&mut s, 300, now);
        // It had: so may the others.
        response(&mut s, 350, true, now);
        quiet(&mut s, 300, now);
    }

    #[test]
    fn b026_shorter_responses_that_are_written_at_once_cost_one_silence() {
        let mut s = session();
        response(&mut s, 350, true, 1);
        let mut now = quiet(&mut s, 400, 1);
        for length in [340, 350, 201] {
            response(&mut s, length, true, now);
            assert_eq!(s.gate(400, 1000, now), Gate::Quiet, "{length}");
        }
        // Longer than any before, and less than half of what came online: perhaps not all of it.
        for length in [360, 190] {
            response(&mut s, length, true, now);
            now = quiet(&mut s, 400, now);
        }
        // In two writes: from now on each may be.
        response(&mut s, 20, true, now);
        response(&mut s, 300, true, now);
        now = quiet(&mut s, 400, now);
        response(&mut s, 300, true, now);
        quiet(&mut s, 400, now);
    }

    #[test]
    fn b026_silence_is_as_long_as_the_path_and_the_response() {
        let at_rest = |rtt_us: u32, lasted: Tick| {
            let mut s = session();
            (s.srtt_us, s.rttvar_us, s.rtt_min_us) = (rtt_us, 0, rtt_us);
            response(&mut s, 1, true, 0);
            response(&mut s, 349, true, lasted);
            let Gate::Wait(at) = s.gate(300, 1_000_000, lasted) else { panic!() };
            crate::timer::microseconds(at - lasted)
        };
        assert!((1_000..1_100).contains(&at_rest(100, 0)));
        assert!((4_000..4_100).contains(&at_rest(2_000, 0)));
        // Who is far away and waits for acknowledgments is silent for a round trip.
        assert!((200_000..200_100).contains(&at_rest(100_000, 0)));
        // Who needs 20 ms to send so much may pause as long.
        assert!((20_000..20_100).contains(&at_rest(100, crate::timer::ticks(20_000_000))));
        assert!((50_000..50_100).contains(&at_rest(100, crate::timer::ticks(900_000_000))));
    }

    #[test]
    fn b026_full_segments_with_psh_are_not_the_end_of_a_response() {
        let mut s = session();
        s.mss = 500;
        for at in 1..=4 {
            response(&mut s, 500, true, at);
            assert!(matches!(s.gate(900, 1000, at), Gate::Wait(_)), "after {at} full segments");
        }
        response(&mut s, 100, true, 5);
        let now = quiet(&mut s, 900, 5);
        assert_eq!(s.turn_base, 3100);
        // Of the same size as online, the last segment full.
        response(&mut s, 500, true, now);
        response(&mut s, 500, true, now);
        assert_eq!(s.gate(1000, 1000, now), Gate::Bytes);
        // Shorter, the last segment full: a longer silence.
        response(&mut s, 500, true, now);
        let at = quiet(&mut s, 900, now);
        assert_eq!(at - now, crate::timer::ticks(u64::from(timing::QUIET_MAX_US) * 1000));
    }

    #[test]
    fn b023_two_messages_that_come_together_release_two_turns() {
        let mut s = session();
        response(&mut s, 100, true, 1);
        response(&mut s, 50, true, 1);
        assert_eq!(s.gate(100, 1000, 1), Gate::Bytes);
        assert_eq!(s.gate(50, 1000, 1), Gate::Bytes);
        assert!(matches!(s.gate(50, 1000, 1), Gate::Wait(_)));
    }

    #[test]
    fn b023_a_stream_that_runs_ahead_keeps_its_surplus() {
        let mut s = session();
        for _ in 0..4 {
            response(&mut s, 10, true, 1);
        }
        for turn in 0..2 {
            assert_eq!(s.gate(20, 1000, 1), Gate::Bytes, "turn {turn}");
        }
    }

    #[test]
    fn b023_a_stream_that_is_never_silent_stalls_once() {
        let mut s = session();
        let mut stalls = 0;
        let mut now = 1;
        // Messages of 30 bytes, 20 online, one each tick: never silent, never at the count.
        for _ in 0..50 {
            loop {
                response(&mut s, 30, true, now);
                match s.gate(20, 500, now) {
                    Gate::Wait(_) => now += 1,
                    Gate::HoldLimit => break stalls += 1,
                    Gate::Bytes => break,
                    Gate::Quiet => panic!("silent"),
                }
            }
            s.holding = false;
        }
        assert_eq!(stalls, 1);
    }

    #[test]
    fn b024_the_hold_limit() {
        let mut s = session();
        assert_eq!(s.gate(300, 1000, 5), Gate::Wait(1005));
        assert_eq!(s.gate(300, 1000, 1005), Gate::HoldLimit);
    }
}
