//! The turn gate: when the next turn of a session may begin, by what its target has sent so far. Times are arguments; what the gate knows of
//! the target's responses is [`Turns`].

use crate::config::timing;
use crate::session::{INITIAL_WINDOW, Session, seq_before};
use crate::timer::{Due, Tick, before};
use marks::{MARKS, Marks};

mod marks;
#[cfg(test)]
mod tests;

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
