//! The turn gate: when the next turn of a session may begin, by what its target has sent so far. Times are arguments; what the gate knows of
//! the target's responses is [`Turns`].

use crate::config::timing;
use crate::session::{INITIAL_WINDOW, Session, seq_before};
use crate::timer::{Due, Tick, before};

/// Where responses may have ended: ends of writes (see [`Turns::note_response`]) that a turn may still ask for, oldest first. A client
/// that pipelines may be many responses behind its target, so when there are too many, the oldest are kept, and the newest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Marks {
    /// Sequence numbers, in bytes: so that other bytes fit behind.
    ends: [[u8; 4]; MARKS],
    /// How many, and where others are missing.
    count: u8,
}

/// Boundaries that are kept.
const MARKS: usize = 4;
/// Boundaries before the first one are missing.
const LOST_BEFORE: u8 = 0x40;
/// Boundaries before the last one are missing.
const LOST_INSIDE: u8 = 0x80;

impl Marks {
    fn len(&self) -> usize {
        usize::from(self.count & !(LOST_BEFORE | LOST_INSIDE))
    }

    fn lost(&self, where_to: u8) -> bool {
        self.count & where_to != 0
    }

    fn known(&self) -> impl DoubleEndedIterator<Item = u32> {
        self.ends[..self.len()].iter().map(|&end| u32::from_ne_bytes(end))
    }

    /// Adds the newest. Boundaries up to `base` are the first to go.
    fn push(&mut self, end: u32, base: u32) {
        if self.len() == MARKS && !self.lost(LOST_INSIDE) {
            if self.known().next().is_some_and(|oldest| seq_before(base, oldest)) {
                self.count |= LOST_INSIDE;
            } else {
                self.ends.rotate_left(1);
                self.count = (self.count - 1) | LOST_BEFORE;
            }
        }
        if !self.lost(LOST_INSIDE) {
            self.count += 1;
        }
        self.ends[self.len() - 1] = end.to_ne_bytes();
    }

    /// Whether nobody knows if `seq` is a boundary.
    fn is_unknown(&self, seq: u32) -> bool {
        let Some(first) = self.known().next() else { return false };
        if self.lost(LOST_BEFORE) && seq_before(seq, first) {
            return true;
        }
        let mut newest_first = self.known().rev();
        let (last, before) = (newest_first.next(), newest_first.next());
        self.lost(LOST_INSIDE)
            && last.is_some_and(|last| seq_before(seq, last))
            && before.is_none_or(|before| seq_before(before, seq))
    }

    /// The first boundary at or after `seq`. When it is not known, `seq` itself is the best guess.
    fn first_from(&self, seq: u32) -> Option<u32> {
        if self.is_unknown(seq) { Some(seq) } else { self.known().find(|&end| !seq_before(end, seq)) }
    }

    /// Whether `seq` is known to be a boundary.
    fn has(&self, seq: u32) -> bool {
        self.known().any(|end| end == seq)
    }

    /// Forgets the boundaries up to `seq`.
    fn forget_up_to(&mut self, seq: u32) {
        let passed = self.known().filter(|&end| !seq_before(seq, end)).count();
        if passed == self.len() {
            self.count = 0;
            return;
        }
        self.ends.rotate_left(passed);
        self.count -= passed as u8;
        if passed > 0 {
            self.count &= !LOST_BEFORE;
        }
        if self.len() == 1 && self.lost(LOST_INSIDE) {
            self.count = 1 | LOST_BEFORE;
        }
    }

    /// All that came belongs to earlier turns: boundaries to come find room.
    fn begin(&mut self) {
        if self.lost(LOST_INSIDE) {
            let last = self.len() - 1;
            self.ends.swap(0, last);
            self.count = 1 | LOST_BEFORE;
        }
    }
}

/// The most of [`Turns::agreed`] that is kept, and from where on the other count is believed.
const AGREED_MOST: i8 = 32;
const DISAGREED: i8 = -2;
/// Response bytes that a turn waits for at most: numbers are compared by which half of all they are in (RFC 9293 section 3.4), and the two counts
/// may be apart by some too. A client that has read more since its last data is asked for this much.
const MOST_NEED: u32 = (1 << 31) - (1 << 28) - 1;

/// How the last segment of the response came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Response {
    /// Without PSH: more follows.
    Open,
    /// With PSH, but full: more may follow.
    Pushed,
    /// It ended a write of the target's server.
    Ended,
}

/// How often of late a write of the target ended at a turn's very count and more had come already: it answers several requests that are
/// under way, with the sizes of the online server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ahead(u8);

impl Ahead {
    /// The target sends without being asked: its silences say nothing, only its byte count does.
    pub(crate) const FLOWING: Ahead = Ahead(u8::MAX);
    /// From here on a count is believed without its boundary: so many are surely remembered.
    const SURE: u8 = MARKS as u8 - 1;
    /// The most that is kept.
    const MOST: u8 = 16;

    fn is_flowing(self) -> bool {
        self == Ahead::FLOWING
    }

    pub(crate) fn is_seen(self) -> bool {
        self.0 > 0 && !self.is_flowing()
    }

    fn is_sure(self) -> bool {
        self.0 >= Ahead::SURE && !self.is_flowing()
    }

    fn confirm(&mut self) {
        if !self.is_flowing() {
            self.0 = (self.0 + 1).min(Ahead::MOST);
        }
    }

    fn doubt(&mut self) {
        if !self.is_flowing() {
            self.0 = self.0.saturating_sub(1);
        }
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

/// What a session's gate keeps of its target's responses, beside what the session has of them in its second cache line: a place of its own by
/// the session's number, for only a response needs it, and the beginning of a turn.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct Turns {
    /// Response bytes before this number belong to earlier turns.
    pub(crate) base: u32,
    /// The same, if target and online server answer alike, which a silence does not change.
    pub(crate) online_base: u32,
    /// When the first response byte after `base` came.
    pub(crate) response_began: Tick,
    marks: Marks,
    pub(crate) ahead: Ahead,
    response: Response,
    /// How often of late a write of the target ended at a turn's count from the beginning; below 0, how often in a row at the one from the
    /// last silence alone.
    agreed: i8,
}

// Half a cache line: there are a million of them.
const _: () = assert!(size_of::<Turns>() == 32);

impl Default for Turns {
    fn default() -> Turns {
        Turns {
            base: 0,
            online_base: 0,
            response_began: 0,
            marks: Marks::default(),
            ahead: Ahead::default(),
            response: Response::Open,
            agreed: 0,
        }
    }
}

impl Turns {
    /// Asks for its cache line.
    #[inline]
    pub(crate) fn read_ahead(&self) {
        replayer_prefetch::line(&self.base);
    }

    /// All that was received, up to `rcv_nxt`, belongs to earlier turns.
    pub(crate) fn begin_at(&mut self, rcv_nxt: u32) {
        self.base = rcv_nxt;
        self.online_base = rcv_nxt;
    }

    /// Takes note of a segment of the response, new up to `end`.
    ///
    /// PSH alone does not say that a server has written all it had: Linux sets it on every TSO packet (net/ipv4/tcp_output.c,
    /// `__tcp_transmit_skb`), which is cut into full segments. A segment that is not full does, for there was nothing to fill it with.
    pub(crate) fn note_response(
        &mut self,
        session: &mut Session,
        client_mss: u16,
        payload_len: u32,
        end: u32,
        push: bool,
        fin: bool,
        now: Tick,
    ) {
        let options = if session.timestamps { 12 } else { 0 };
        // The target's segments keep to the smaller MSS of the two, as ours do.
        let full = session.mss.min(client_mss.saturating_sub(options));
        session.response_at = now;
        self.response = if fin || push && payload_len < u32::from(full) {
            self.marks.push(end, self.base);
            Response::Ended
        } else if push {
            Response::Pushed
        } else {
            Response::Open
        };
    }

    /// How long the target must be silent for its response to count as ended, ticks: as long as the response has lasted, for who sends slowly
    /// pauses longer, and where it is longer than a flight, longer than it waits for an acknowledgment when its congestion window is full.
    /// After a full segment more is likely to follow; and what comes too early may cost a request: an end of the stream, or where many are
    /// under way, one that is more than the server takes at once.
    fn quiet_ticks(&self, session: &Session, early_hurts: bool) -> u32 {
        let one_flight = Self::is_one_flight(session, session.rcv_nxt.wrapping_sub(self.base));
        let round_trips = if one_flight && !self.ahead.is_flowing() {
            session.rtt_min_us
        } else {
            2 * session.srtt_us.min(1 << 24) + 4 * session.rttvar_us.min(1 << 24)
        };
        let lasted = crate::timer::microseconds(session.response_at.wrapping_sub(self.response_began));
        let ended = self.response == Response::Ended && !early_hurts;
        let least = if ended { timing::QUIET_MIN_US } else { timing::QUIET_MAX_US };
        // Delayed acknowledgments make the smoothed round trip longer than the path's, so it alone does not set the limit.
        let most = timing::QUIET_MAX_US.max(2 * session.rtt_min_us.min(1 << 24));
        crate::timer::ticks(u64::from(round_trips.max(lasted).clamp(least, most)) * 1000)
    }

    /// Whether so many bytes are sent without waiting for an acknowledgment.
    fn is_one_flight(session: &Session, length: u32) -> bool {
        length <= INITIAL_WINDOW * u32::from(session.mss)
    }

    /// Whether the next turn may begin, or with `closes` the stream end, given that online the client had read `need` response bytes since
    /// the turn before. `later` are the counts of the turns that wait behind it, added up.
    ///
    /// Where target and online server answer with the same sizes, a write of the target ends at the very count, and the turn goes at
    /// once. Where they do not, the end of a response is seen by silence, and the next turn's count begins there: a longer or
    /// shorter response shifts nothing that comes after it. Silence costs time, so responses of one flight that are no longer than one
    /// that was found to have come in one write are taken to end with their first write, until one does not.
    ///
    /// A pause is not an end, though, and what is beyond a count is not a longer response, where several requests are under way. So the count
    /// from the beginning is kept beside the one from the last silence, and that one holds at which a write ends.
    pub(crate) fn gate(
        &mut self,
        session: &mut Session,
        need: u32,
        later: impl Iterator<Item = u32>,
        closes: bool,
        hold_limit: u32,
        now: Tick,
    ) -> Gate {
        if need == 0 {
            return Gate::Bytes;
        }
        let need = need.min(MOST_NEED);
        let alike = self.online_base.wrapping_add(need);
        let counted =
            if closes { self.counted_to_the_end(session, need) } else { self.counted(session, need) };
        if let Some(end) = counted {
            self.pass(session, alike, end);
            return Gate::Bytes;
        }
        // Once may be by chance: whose sizes have not agreed of late has to prove it twice.
        let proofs = if self.agreed > 0 { 1 } else { 2 };
        if !closes && !self.ahead.is_flowing() && self.ends_later(session, alike, later, proofs) {
            self.online_base = alike;
            self.agreed = (self.agreed.max(0) + 1).min(AGREED_MOST);
            // The target has answered what is still to be sent here: it had that from turns before.
            self.ahead.confirm();
            self.begin_count(session, alike);
            return Gate::Bytes;
        }
        if let Some(end) = self.first_write(session, need).filter(|_| !closes) {
            self.pass(session, alike, end);
            return Gate::Bytes;
        }
        let expected = self.base.wrapping_add(need);
        let enough = !seq_before(session.rcv_nxt, expected);
        let length = session.rcv_nxt.wrapping_sub(self.base);
        let first = if enough { expected } else { self.base.wrapping_add(1) };
        let in_one_write = self.marks.first_from(first) == Some(session.rcv_nxt);
        // Much less than online may be the header before the rest.
        let about_as_long = length <= u32::from(session.whole) && length >= need / 2;
        if !enough && in_one_write && about_as_long && session.in_flight() == 0 {
            self.pass_all(session, alike);
            return Gate::Quiet;
        }
        let since = session.hold_since.get_or_insert(Due::at(now)).tick();
        let limit = since.wrapping_add(hold_limit);
        let something = seq_before(self.base, session.rcv_nxt);
        // A count that is reached in the middle of a burst waits for the burst's end, like a response that is shorter.
        let pushed = self.response != Response::Open;
        let ended = something && (enough || pushed) && session.in_flight() == 0;
        // Where the count from the beginning has been right, and several requests are under way, the rest is still to come after a pause.
        let pause = self.agreed > 0 && self.ahead.is_seen() && seq_before(session.rcv_nxt, alike);
        let early_hurts = closes || pause || self.ahead.is_flowing() && !enough;
        let quiet_at = session.response_at.wrapping_add(self.quiet_ticks(session, early_hurts));
        if ended && !before(now, quiet_at) {
            // What is longer than a flight comes in several, with pauses and ends of writes where they fall.
            if !in_one_write {
                session.whole = 0;
            } else if Self::is_one_flight(session, length) && !self.ahead.is_flowing() {
                session.whole = session.whole.max(u16::try_from(length).unwrap_or(0));
            }
            self.pass_all(session, alike);
            return Gate::Quiet;
        }
        if !before(now, limit) {
            // All that was asked for has come, and silence never: it does not wait for us either.
            if enough {
                self.ahead = Ahead::FLOWING;
                session.whole = 0;
            }
            self.pass_all(session, alike);
            return Gate::HoldLimit;
        }
        Gate::Wait(if ended && before(quiet_at, limit) { quiet_at } else { limit })
    }

    /// Where the response that the next turn waits for ended, if a count says so.
    fn counted(&self, session: &Session, need: u32) -> Option<u32> {
        let (expected, alike) = (self.base.wrapping_add(need), self.online_base.wrapping_add(need));
        // What came before the last silence counts only if the sizes have been the same of late.
        let after_silence = seq_before(self.base, alike);
        let likely = after_silence || self.agreed > 0 || self.ahead.is_seen();
        if self.is_end(session, alike) && likely && !self.ahead.is_flowing() {
            return Some(alike);
        }
        // Two responses may share a segment, and boundaries are not all remembered.
        if self.ahead.is_sure() && seq_before(alike, session.rcv_nxt) {
            return Some(alike);
        }
        self.is_end(session, expected).then_some(expected)
    }

    /// Where the first write after the count ended, if that is believed to be the end of the response.
    fn first_write(&self, session: &Session, need: u32) -> Option<u32> {
        let expected = self.base.wrapping_add(need);
        if seq_before(session.rcv_nxt, expected) {
            return None;
        }
        let end = self.marks.first_from(expected)?;
        let trusted = end != expected && end.wrapping_sub(self.base) <= u32::from(session.whole);
        (self.ahead.is_flowing() || trusted).then_some(end)
    }

    /// The same for the end of the stream. A server may drop the responses that are under way when it comes, so nothing may be beyond the
    /// count.
    fn counted_to_the_end(&self, session: &Session, need: u32) -> Option<u32> {
        let all = session.rcv_nxt;
        let (expected, alike) = (self.base.wrapping_add(need), self.online_base.wrapping_add(need));
        let trusted = self.marks.first_from(expected) == Some(all)
            && all.wrapping_sub(self.base) <= u32::from(session.whole);
        (self.is_end(session, all) && (all == expected || all == alike) || trusted).then_some(all)
    }

    /// Whether what is beyond the count `alike` are whole responses to the turns behind, which came in one write with this one's: writes ended
    /// at the counts of so many of them.
    fn ends_later(
        &self,
        session: &Session,
        alike: u32,
        later: impl Iterator<Item = u32>,
        proofs: usize,
    ) -> bool {
        if !seq_before(alike, session.rcv_nxt) {
            return false;
        }
        let mut last = 0;
        let counts = later.filter(|&later| core::mem::replace(&mut last, later) != later);
        counts.filter(|&later| self.is_end(session, alike.wrapping_add(later))).take(proofs).count() == proofs
    }

    /// Whether a write of the target is known to have ended at `seq`. The last segment of a response may be a full one.
    fn is_end(&self, session: &Session, seq: u32) -> bool {
        self.marks.has(seq) || session.rcv_nxt == seq && self.response != Response::Open
    }

    /// A turn goes, whose response ended at `end`; at `alike` if both servers answer alike.
    fn pass(&mut self, session: &Session, alike: u32, end: u32) {
        let expected = self.base.wrapping_add(alike.wrapping_sub(self.online_base));
        self.online_base = alike;
        if self.is_end(session, alike) {
            self.agreed = (self.agreed.max(0) + 1).min(AGREED_MOST);
            if alike != session.rcv_nxt || !seq_before(self.base, alike) {
                self.ahead.confirm();
            }
        } else if end == expected && self.is_end(session, end) {
            // Once may be by chance.
            self.agreed = self.agreed.min(0) - 1;
            if self.agreed == DISAGREED {
                self.agreed = 0;
                self.online_base = end;
            }
        } else if self.agreed < 0 {
            self.agreed = 0;
        } else if !self.marks.is_unknown(alike) {
            self.agreed = (self.agreed - 1).max(0);
            self.ahead.doubt();
        }
        self.begin_count(session, end);
    }

    /// A turn goes, and what was received belongs to earlier ones.
    fn pass_all(&mut self, session: &Session, alike: u32) {
        self.pass(session, alike, session.rcv_nxt);
        self.marks.begin();
    }

    fn begin_count(&mut self, session: &Session, base: u32) {
        self.base = base;
        // What is beyond began at the latest now.
        self.response_began = session.response_at;
        self.marks.forget_up_to(if seq_before(base, self.online_base) { base } else { self.online_base });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::State;
    use alloc::vec::Vec;
    use replayer_common::addr::Endpoint;

    /// A session and its gate.
    struct Gated {
        session: Session,
        turns: Turns,
    }

    impl Gated {
        fn gate(
            &mut self,
            need: u32,
            later: impl Iterator<Item = u32>,
            closes: bool,
            hold_limit: u32,
            now: Tick,
        ) -> Gate {
            self.turns.gate(&mut self.session, need, later, closes, hold_limit, now)
        }
    }

    impl core::ops::Deref for Gated {
        type Target = Session;
        fn deref(&self) -> &Session {
            &self.session
        }
    }

    impl core::ops::DerefMut for Gated {
        fn deref_mut(&mut self) -> &mut Session {
            &mut self.session
        }
    }

    fn session() -> Gated {
        let mut session = Session::new(Endpoint { ip: [0; 16], port: 1 }, 0, 0, 0);
        session.state = State::Established;
        session.rcv_nxt = 1000;
        (session.srtt_us, session.rttvar_us, session.rtt_min_us) = (100, 10, 100);
        let mut turns = Turns::default();
        turns.begin_at(1000);
        Gated { session, turns }
    }

    fn none() -> core::iter::Empty<u32> {
        core::iter::empty()
    }

    /// The gate opens by silence, not before.
    #[track_caller]
    fn quiet(s: &mut Gated, need: u32, now: Tick) -> Tick {
        let Gate::Wait(at) = s.gate(need, none(), false, 100_000, now) else { panic!("no wait") };
        assert!(matches!(s.gate(need, none(), false, 100_000, at - 1), Gate::Wait(_)));
        assert_eq!(s.gate(need, none(), false, 100_000, at), Gate::Quiet);
        s.hold_since = None;
        at
    }

    fn response(s: &mut Gated, bytes: u32, push: bool, now: Tick) {
        if s.rcv_nxt == s.turns.base {
            s.turns.response_began = now;
        }
        let end = s.rcv_nxt.wrapping_add(bytes);
        s.rcv_nxt = end;
        s.turns.note_response(&mut s.session, 1460, bytes, end, push, false, now);
    }

    #[test]
    fn b021_a_turn_waits_for_the_whole_response() {
        let mut s = session();
        assert!(matches!(s.gate(300, none(), false, 1000, 10), Gate::Wait(1010)));
        response(&mut s, 200, false, 11);
        assert!(matches!(s.gate(300, none(), false, 1000, 12), Gate::Wait(1010)));
        response(&mut s, 100, true, 13);
        assert_eq!(s.gate(300, none(), false, 1000, 13), Gate::Bytes);
        assert_eq!(s.turns.base, 1300);
    }

    #[test]
    fn b026_longer_and_shorter_responses_shift_nothing() {
        let mut s = session();
        // 50 bytes longer: the turn goes at its end, and the next one counts from there.
        response(&mut s, 350, true, 1);
        let at = quiet(&mut s, 300, 1);
        assert!(at < 40, "{at}");
        assert!(
            matches!(s.gate(300, none(), false, 1000, at), Gate::Wait(_)),
            "the surplus does not count for the next turn"
        );
        s.hold_since = None;
        // Shorter: quiet after PSH.
        response(&mut s, 100, true, at + 10);
        let at = quiet(&mut s, 300, at + 10);
        response(&mut s, 300, true, at + 10);
        assert_eq!(s.gate(300, none(), false, 1000, at + 10), Gate::Bytes);
    }

    #[test]
    fn b026_no_early_release_in_the_middle_of_a_burst() {
        let mut s = session();
        response(&mut s, 400, false, 1);
        assert!(matches!(s.gate(300, none(), false, 1000, 1), Gate::Wait(_)));
        response(&mut s, 400, true, 2);
        quiet(&mut s, 300, 2);
        assert_eq!(s.turns.base, 1800);
    }

    #[test]
    fn b026_a_longer_response_in_several_writes_is_waited_for_to_its_end() {
        let mut s = session();
        let mut now = 0;
        for write in 0..20 {
            now += 10;
            response(&mut s, 120, true, now);
            assert!(matches!(s.gate(610, none(), false, 1000, now), Gate::Wait(_)), "after {write} writes");
        }
        quiet(&mut s, 610, now);
        assert_eq!(s.turns.base, 1000 + 20 * 120);
    }

    #[test]
    fn b026_responses_that_are_written_at_once_cost_one_silence() {
        let mut s = session();
        response(&mut s, 350, true, 1);
        let now = quiet(&mut s, 300, 1);
        for length in [340, 350, 301] {
            response(&mut s, length, true, now);
            assert_eq!(s.gate(300, none(), false, 1000, now), Gate::Bytes, "{length}");
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
            assert_eq!(s.gate(400, none(), false, 1000, now), Gate::Quiet, "{length}");
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
        let at_rest = |rtt_us: u32, lasted: Tick, bytes: u32| {
            let mut s = session();
            (s.srtt_us, s.rttvar_us, s.rtt_min_us) = (rtt_us, 0, rtt_us);
            response(&mut s, bytes, false, 0);
            response(&mut s, 349, true, lasted);
            let Gate::Wait(at) = s.gate(300, none(), false, 1_000_000, lasted) else { panic!() };
            crate::timer::microseconds(at - lasted)
        };
        assert!((1_000..1_100).contains(&at_rest(100, 0, 1)));
        assert!((4_000..4_100).contains(&at_rest(2_000, 0, 7_000)));
        // Who is far away and waits for acknowledgments is silent for a round trip.
        assert!((200_000..200_100).contains(&at_rest(100_000, 0, 7_000)));
        // What fits into one flight does not wait for them.
        assert!((2_000..2_100).contains(&at_rest(2_000, 0, 1)));
        // Who needs 20 ms to send so much may pause as long.
        assert!((20_000..20_100).contains(&at_rest(100, crate::timer::ticks(20_000_000), 1)));
        assert!((50_000..50_100).contains(&at_rest(100, crate::timer::ticks(900_000_000), 1)));
    }

    #[test]
    fn b026_full_segments_with_psh_are_not_the_end_of_a_response() {
        let mut s = session();
        s.mss = 500;
        for at in 1..=4 {
            response(&mut s, 500, true, at);
            assert!(
                matches!(s.gate(900, none(), false, 1000, at), Gate::Wait(_)),
                "after {at} full segments"
            );
        }
        response(&mut s, 100, true, 5);
        let now = quiet(&mut s, 900, 5);
        assert_eq!(s.turns.base, 3100);
        // Of the same size as online, the last segment full.
        response(&mut s, 500, true, now);
        response(&mut s, 500, true, now);
        assert_eq!(s.gate(1000, none(), false, 1000, now), Gate::Bytes);
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
        assert_eq!(s.gate(100, none(), false, 1000, 1), Gate::Bytes);
        assert_eq!(s.gate(50, none(), false, 1000, 1), Gate::Bytes);
        assert!(matches!(s.gate(50, none(), false, 1000, 1), Gate::Wait(_)));
    }

    #[test]
    fn b023_a_stream_that_runs_ahead_keeps_its_surplus() {
        let mut s = session();
        for _ in 0..4 {
            response(&mut s, 10, true, 1);
        }
        for turn in 0..2 {
            assert_eq!(s.gate(20, none(), false, 1000, 1), Gate::Bytes, "turn {turn}");
        }
    }

    /// A client that keeps 20 requests under way, at servers that answer one after another. Times are ticks.
    struct Stream {
        /// How long each server takes for an answer.
        online: Tick,
        target: Tick,
        /// In a hundred answers, those for which a server was not woken in time: they go out with the next ones, in one write.
        late: u32,
        /// The target's answer is so many times as long.
        scale: u32,
        turns: usize,
    }

    #[derive(Default)]
    struct Paced {
        bytes: u32,
        quiet: u32,
        hold_limit: u32,
        /// How much later than captured turns went, sorted.
        late: Vec<Tick>,
        /// When the last one went.
        end: Tick,
    }

    impl Stream {
        fn replay(&self, seed: u64) -> Paced {
            const UNDER_WAY: usize = 20;
            const STILL_LATE: u32 = 75;
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = move |bound: u32| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 33) as u32 % bound
            };
            let sizes: Vec<u32> = (0..self.turns + UNDER_WAY).map(|_| 17 + random(500)).collect();
            // Turns as captured: when, the count, how many requests.
            let mut turns: Vec<(Tick, u32, usize)> = Vec::new();
            let (mut now, mut answered) = (0, 0);
            while answered < self.turns {
                let mut together = 1 + usize::from(random(100) < self.late);
                while together > 1 && together < UNDER_WAY && random(100) < STILL_LATE {
                    together += 1;
                }
                let upto = (answered + together).min(self.turns);
                now += self.online * (upto - answered) as u32;
                turns.push((now, sizes[answered..upto].iter().sum(), upto - answered));
                answered = upto;
            }
            let mut s = session();
            s.mss = 1460;
            let mut paced = Paced::default();
            let (mut asked, mut written, mut due) = (UNDER_WAY, 0, self.target);
            let mut turns = turns.iter().peekable();
            let mut ready = 0;
            for now in 0.. {
                if written < asked && due == now {
                    ready += 1;
                    if ready == asked - written
                        || random(100) >= if ready > 1 { STILL_LATE } else { self.late }
                    {
                        let bytes = sizes[written..written + ready].iter().sum::<u32>() * self.scale;
                        response(&mut s, bytes, true, now);
                        written += ready;
                        ready = 0;
                    }
                    due = now + self.target;
                }
                while let Some(&&(captured, need, requests)) = turns.peek()
                    && captured <= now
                {
                    let waiting = turns.clone().skip(1).take_while(|&&(captured, ..)| captured <= now);
                    let later = waiting.take(crate::sender::SEGMENTS_BEHIND).scan(0, |sum, &(_, need, _)| {
                        *sum += need;
                        Some(*sum)
                    });
                    match s.gate(need, later, false, 30_000, now) {
                        Gate::Wait(_) => break,
                        Gate::Bytes => paced.bytes += 1,
                        Gate::Quiet => paced.quiet += 1,
                        Gate::HoldLimit => paced.hold_limit += 1,
                    }
                    s.hold_since = None;
                    paced.late.push(now - captured);
                    if asked == written + ready {
                        due = now + self.target;
                    }
                    asked += requests;
                    turns.next();
                }
                if turns.peek().is_none() {
                    paced.end = now;
                    break;
                }
            }
            paced.late.sort_unstable();
            paced
        }
    }

    #[test]
    fn b023_messages_in_both_directions_keep_pace_whichever_server_is_faster() {
        // 75 ticks are 5 ms.
        for (online, target) in [(75, 45), (75, 75), (45, 75), (75, 15), (15, 15), (300, 300), (300, 180)] {
            for (late, seed) in [0, 1, 3, 20].iter().flat_map(|&late| (1..4).map(move |seed| (late, seed))) {
                let turns = 2000;
                let paced = Stream { online, target, late, scale: 1, turns }.replay(seed);
                let (median, slower) =
                    (paced.late[paced.late.len() / 2], target.saturating_sub(online) * turns as u32);
                let case = std::format!(
                    "{online} {target} {late}: {} by bytes, {} by quiet, half {median} late, {} at the end",
                    paced.bytes,
                    paced.quiet,
                    paced.end
                );
                assert_eq!(paced.hold_limit, 0, "{case}");
                let ideal = online.max(target) * turns as u32;
                assert!(paced.end <= ideal + ideal / if late > 5 { 5 } else { 50 }, "{case}");
                assert!(late > 5 || median <= slower * 3 / 4 + target, "{case}");
            }
        }
    }

    #[test]
    fn b023_messages_in_both_directions_keep_pace_for_minutes() {
        let turns = 40_000;
        let paced = Stream { online: 75, target: 75, late: 3, scale: 1, turns }.replay(1);
        let ideal = 75 * turns as u32;
        assert_eq!(paced.hold_limit, 0);
        assert!(paced.end <= ideal + ideal / 100, "{} of {ideal}", paced.end);
    }

    #[test]
    fn b026_messages_of_another_size_in_both_directions_never_stop() {
        for (online, target) in [(75, 45), (75, 75), (45, 75), (1500, 1500)] {
            for late in [0, 5] {
                let turns = 2000;
                let paced = Stream { online, target, late, scale: 2, turns }.replay(7);
                let ideal = online.max(target) * turns as u32;
                assert_eq!(paced.hold_limit, 0, "{online} {target} {late}");
                assert!(paced.end < ideal + ideal / 5, "{online} {target} {late}: {}", paced.end);
            }
        }
    }

    #[test]
    fn b023_two_responses_in_one_write_release_the_turns_of_both() {
        let mut s = session();
        response(&mut s, 100, true, 1);
        assert_eq!(s.gate(100, none(), false, 1000, 1), Gate::Bytes);
        response(&mut s, 130, true, 2);
        let later = |counts: &'static [u32]| counts.iter().copied();
        assert!(matches!(s.gate(50, later(&[70]), false, 1000, 2), Gate::Wait(_)), "a longer one, perhaps");
        assert_eq!(s.gate(50, later(&[80, 160]), false, 1000, 2), Gate::Bytes);
        assert_eq!(s.gate(80, later(&[80]), false, 1000, 2), Gate::Bytes);
        assert!(matches!(s.gate(80, none(), false, 1000, 2), Gate::Wait(_)));
    }

    #[test]
    fn b023_a_pause_is_no_end_to_who_counts_from_the_beginning() {
        let mut s = session();
        // The client had read two responses. The first comes, then a pause: taken for all.
        response(&mut s, 120, true, 1);
        let now = quiet(&mut s, 200, 1);
        response(&mut s, 80, true, now);
        response(&mut s, 70, true, now);
        assert_eq!(s.gate(70, none(), false, 1000, now), Gate::Bytes);
        assert_eq!((s.turns.base, s.turns.online_base), (1270, 1270));
    }

    #[test]
    fn b023_a_pause_before_a_count_that_has_been_right_is_no_end() {
        let mut s = session();
        // Three responses have come when the first turn goes: several requests are under way.
        for _ in 0..3 {
            response(&mut s, 100, true, 1);
        }
        for _ in 0..3 {
            assert_eq!(s.gate(100, none(), false, 1000, 1), Gate::Bytes);
        }
        // Online, three came together; here one, and a pause.
        response(&mut s, 100, true, 2);
        let Gate::Wait(at) = s.gate(300, none(), false, 100_000, 2) else { panic!() };
        assert_eq!(at - 2, crate::timer::ticks(u64::from(timing::QUIET_MAX_US) * 1000));
        response(&mut s, 100, true, 80);
        response(&mut s, 100, true, 160);
        assert_eq!(s.gate(300, none(), false, 100_000, 160), Gate::Bytes);
        assert_eq!((s.turns.base, s.turns.online_base), (1600, 1600));
    }

    #[test]
    fn b023_writes_that_end_at_the_counts_of_two_later_turns_put_a_lost_count_right() {
        let mut s = session();
        // The very first write has four responses in it.
        response(&mut s, 100 + 110 + 120 + 130, true, 1);
        let later = |counts: &'static [u32]| counts.iter().copied();
        let waits = |s: &mut Gated, counts| {
            assert!(matches!(s.gate(100, later(counts), false, 100_000, 1), Gate::Wait(_)), "{counts:?}");
        };
        waits(&mut s, &[110, 230]);
        waits(&mut s, &[110, 230, 360]);
        // Segments of one turn have the same count.
        waits(&mut s, &[110, 230, 360, 360]);
        response(&mut s, 140, true, 2);
        assert_eq!(s.gate(100, later(&[110, 230, 360, 360, 500]), false, 100_000, 2), Gate::Bytes);
        // Now one is enough.
        assert_eq!(s.gate(110, later(&[120, 250]), false, 100_000, 2), Gate::Bytes);
        assert_eq!((s.turns.base, s.turns.online_base), (1210, 1210));
    }

    #[test]
    fn b026_after_one_longer_response_the_next_ones_count_from_its_end() {
        let mut s = session();
        for _ in 0..3 {
            response(&mut s, 300, true, 1);
            assert_eq!(s.gate(300, none(), false, 1000, 1), Gate::Bytes);
        }
        response(&mut s, 350, true, 2);
        let now = quiet(&mut s, 300, 2);
        for turn in 0..20 {
            assert!(matches!(s.gate(200, none(), false, 1000, now), Gate::Wait(_)));
            s.hold_since = None;
            response(&mut s, 200, true, now);
            assert_eq!(s.gate(200, none(), false, 1000, now), Gate::Bytes);
            assert!(turn == 0 || s.turns.online_base == s.turns.base);
        }
    }

    #[test]
    fn the_stream_does_not_end_while_more_comes_than_was_counted() {
        let mut s = session();
        for _ in 0..8 {
            response(&mut s, 100, true, 1);
        }
        for _ in 0..6 {
            assert!(matches!(s.gate(100, none(), true, 1000, 1), Gate::Wait(_)), "two responses more");
            assert_eq!(s.gate(100, none(), false, 1000, 1), Gate::Bytes);
        }
        assert_eq!(s.gate(200, none(), true, 1000, 1), Gate::Bytes);
        // Of another size: after the longest silence.
        response(&mut s, 90, true, 2);
        let Gate::Wait(at) = s.gate(100, none(), true, 100_000, 2) else { panic!() };
        assert_eq!(at - 2, crate::timer::ticks(u64::from(timing::QUIET_MAX_US) * 1000));
    }

    #[test]
    fn the_oldest_boundaries_are_kept_and_the_newest() {
        let mut marks = Marks::default();
        for end in [10, 20, 30, 40, 50, 60] {
            marks.push(end, 0);
        }
        assert!(marks.has(10) && marks.has(30) && marks.has(60) && !marks.has(40));
        assert!(
            marks.is_unknown(40) && marks.is_unknown(35) && !marks.is_unknown(25) && !marks.is_unknown(61)
        );
        assert_eq!(
            (marks.first_from(15), marks.first_from(33), marks.first_from(60)),
            (Some(20), Some(33), Some(60))
        );
        marks.forget_up_to(30);
        assert!(marks.has(60) && marks.is_unknown(35));
        marks.push(70, 30);
        assert!(marks.has(60) && marks.has(70) && marks.is_unknown(35) && !marks.is_unknown(65));
        marks.forget_up_to(60);
        assert!(!marks.is_unknown(65));
        marks.forget_up_to(70);
        assert_eq!(marks.first_from(60), None);
        // Those before the base are the first to go.
        for end in [110, 120, 130, 140, 150] {
            marks.push(end, 115);
        }
        assert!(!marks.has(110) && marks.has(120) && marks.has(150));
        marks.push(160, 155);
        marks.begin();
        assert!(marks.has(150) && marks.has(160) && marks.is_unknown(120));
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
                match s.gate(20, none(), false, 500, now) {
                    Gate::Wait(_) => now += 1,
                    Gate::HoldLimit => break stalls += 1,
                    Gate::Bytes => break,
                    Gate::Quiet => panic!("silent"),
                }
            }
            s.hold_since = None;
        }
        assert_eq!(stalls, 1);
    }

    #[test]
    fn b024_the_hold_limit() {
        let mut s = session();
        assert_eq!(s.gate(300, none(), false, 1000, 5), Gate::Wait(1005));
        assert_eq!(s.gate(300, none(), false, 1000, 1005), Gate::HoldLimit);
    }

    #[test]
    fn a_count_of_which_half_of_all_numbers_are_less_is_not_reached_at_once() {
        for need in [(1 << 31) + 1, 3_000_000_000] {
            let mut s = session();
            assert_eq!(s.gate(need, none(), false, 1000, 5), Gate::Wait(1005), "{need}");
            // Two writes, the second of them just before the limit.
            response(&mut s, 100, true, 6);
            assert!(matches!(s.gate(need, none(), false, 1000, 6), Gate::Wait(_)), "{need}");
            response(&mut s, 100, true, 1005);
            assert_eq!(s.gate(need, none(), false, 1000, 1005), Gate::HoldLimit, "{need}");
            // The target has not sent all that was asked for: silence still ends what it answers.
            assert!(!s.turns.ahead.is_flowing(), "{need}");
        }
    }
}
