//! A session: one TCP connection replayed to a target. This file holds its state and what can be said of one session alone;
//! `sender.rs` and `receiver.rs` hold what it does, `gate/` when its turns may begin.
//!
//! Sequence numbers are the client's own: the session's ISN is the client's, or, when it joins in the middle, the one that makes
//! the first byte sent the next one. So a byte has the same number in the capture, in the store and towards the target.

use crate::config::timing;
use crate::counters::EndReason;
use crate::gate::Turns;
use crate::sack::NO_BOARD;
use crate::slab::{Column, Frontier, NONE, Slab};
use crate::timer::{Due, Tick, before, ticks};
use alloc::{vec, vec::Vec};
use replayer_common::addr::{Endpoint, from_v4, is_v4, v4_octets};

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

/// A timestamp that is older by at most this is of a segment that others have overtaken: a second of Linux's clock. RFC 7323 would drop that
/// one too, for TCP asks for it again; the highest number that was seen counts here.
const OVERTAKEN: i32 = 1000;

/// Sequence number comparison (RFC 9293 section 3.4).
#[inline]
pub(crate) fn seq_before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// What the target is owed for what it sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owes {
    Nothing,
    /// An acknowledgment, by `ack_at`.
    Ack,
    /// An acknowledgment with this batch.
    AckNow,
}

/// What is so of the turn that was sent last, or of the next: in bits, for there are a million sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn(u8);

impl Turn {
    /// The first turn follows no other: it waits for nothing.
    pub(crate) const JOINED: u8 = 1;
    /// Its response has not begun.
    pub(crate) const AWAITS_RESPONSE: u8 = 2;
    /// A response that does not acknowledge it shows that it went too early.
    pub(crate) const WATCHED: u8 = 4;

    pub(crate) fn has(self, what: u8) -> bool {
        self.0 & what != 0
    }

    pub(crate) fn set(&mut self, what: u8, so: bool) {
        self.0 = if so { self.0 | what } else { self.0 & !what };
    }
}

/// Laid out by use: data that can go at once reads and changes the first cache line only, whatever copies there are; an acknowledgment the
/// second too. What a response or the beginning of a turn needs besides is in [`Turns`], and what only a session needs that something
/// happened to is in [`Trouble`].
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Session {
    pub(crate) state: State,
    /// Takes no further data; it closes, for this reason, when what it has, up to [`Trouble::last_segment`], is delivered.
    pub(crate) cut: Option<EndReason>,
    /// The target may know of the connection only by its first segment: the others wait until that was acknowledged.
    pub(crate) first_alone: bool,
    pub(crate) timestamps: bool,
    /// A round trip is being measured (RFC 6298).
    pub(crate) timing: bool,
    pub(crate) owes: Owes,
    /// After a timeout `snd_nxt` went back behind `snd_max`.
    pub(crate) rewound: bool,
    /// In the list of sessions that this batch has touched.
    pub(crate) dirty: bool,
    pub(crate) service: u16,
    pub(crate) mss: u16,
    /// The identity's port.
    port: u16,
    /// The retransmission timeout before any backoff, in units of [`RTO_TICKS`].
    rto: u16,
    /// The last four bytes of the identity's address: all of an IPv4 address.
    ip_low: [u8; 4],
    /// The next copy of the same connection.
    pub(crate) next_copy: u32,
    /// First segment not wholly acknowledged, and the place of `snd_nxt`; `NONE`: at the end of what is stored.
    pub(crate) una_segment: u32,
    pub(crate) next_segment: u32,
    // Send side (RFC 9293 section 3.3.1).
    pub(crate) snd_nxt: u32,
    /// The number before which the target's window and ours end: see [`Session::set_limit`].
    snd_limit: u32,
    // Receive side.
    pub(crate) rcv_nxt: u32,
    // Timestamps (RFC 7323).
    pub(crate) ts_recent: u32,
    // Deadlines; `None` when not wanted.
    pub(crate) rto_at: Option<Due>,
    /// When the timer in the wheel fires, at the latest; so that the wheel need not be looked at.
    pub(crate) armed_at: Option<Due>,
    /// While `timing`: the number whose acknowledgment ends it. While `rewound`, when nothing is timed: what `snd_max` was.
    pub(crate) timed_seq: u32,
    pub(crate) timed_at_us: u32,

    /// The client connection that it copies.
    pub(crate) connection: u32,
    /// Until the SYN is acknowledged, its number.
    pub(crate) snd_una: u32,
    pub(crate) snd_wnd: u32,
    /// The congestion window (RFC 5681).
    pub(crate) cwnd: u32,
    /// The place of its [`Trouble`], or `NONE`.
    trouble: u32,
    pub(crate) ack_at: Option<Due>,
    pub(crate) release_at: Option<Due>,
    /// Since when the next turn waits.
    pub(crate) hold_since: Option<Due>,
    pub(crate) srtt_us: u32,
    pub(crate) rttvar_us: u32,
    /// The shortest round trip measured.
    pub(crate) rtt_min_us: u32,
    pub(crate) response_at: Tick,
    /// The current turn's first byte.
    pub(crate) turn_seq: u32,
    /// When it was sent.
    pub(crate) turn_sent_us: u32,
    /// Responses of up to this many bytes end where their first write ends, as far as was seen of this target.
    pub(crate) whole: u16,
    pub(crate) turn: Turn,
    pub(crate) unacked_segments: u8,
    pub(crate) dup_acks: u8,
    pub(crate) tries: u8,
    pub(crate) snd_wscale: u8,
    /// The identity's address is not all in `ip_low`.
    v6: bool,
}

/// What only a session has to which something happened: a loss, or that it takes no more data. There since then, until it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trouble {
    // Congestion (RFC 5681, RFC 6582).
    pub(crate) ssthresh: u32,
    pub(crate) recover: u32,
    /// The last that it was given, where it was `cut`.
    last_segment: u32,
    /// What the target has beyond its acknowledgment, or `NO_BOARD`.
    pub(crate) board: u16,
    /// The path's MTU that is being tried, and not acknowledged yet; else 0.
    pub(crate) narrowed_to: u16,
    pub(crate) in_recovery: bool,
}

/// The unit of [`Session::rto`], ticks: 1.05 ms.
const RTO_TICKS: u32 = 16;
const RTO_MIN: u16 = rto_units(timing::RTO_MIN_US);

// Whoever needs more has to look for what is not needed any more: a million of them are read at random.
const _: () = assert!(size_of::<Session>() == 128 && core::mem::offset_of!(Session, connection) == 64);

impl Session {
    /// Asks for the cache line that data needs, so that it is there when it comes.
    #[inline]
    pub(crate) fn read_ahead(&self) {
        replayer_prefetch::line(&self.state);
    }

    /// Asks for the second, which an acknowledgment needs.
    #[inline]
    pub(crate) fn read_ahead_acknowledgment(&self) {
        replayer_prefetch::line(&self.connection);
    }

    /// A segment with an acknowledgment goes out: nothing more is owed to the target. Also when it cannot be sent: a deadline that stays in
    /// the past would fire for ever.
    #[inline]
    pub(crate) fn acknowledged(&mut self) {
        if self.owes != Owes::Nothing {
            self.owes = Owes::Nothing;
            self.unacked_segments = 0;
            self.ack_at = None;
        }
    }

    /// Whether a segment with this timestamp is an old duplicate (PAWS, RFC 7323 section 5.3).
    #[inline]
    pub(crate) fn is_overtaken(&self, ts_value: u32) -> bool {
        self.ts_recent.wrapping_sub(ts_value) as i32 > OVERTAKEN
    }

    /// Whether something happened to it that its [`Trouble`] tells of.
    #[inline]
    pub(crate) fn is_in_trouble(&self) -> bool {
        self.trouble != NONE
    }

    /// Its address and port towards the target, where it is known to be IPv4: see [`Sessions::identity`].
    #[inline]
    pub(crate) fn identity_v4(&self) -> ([u8; 4], u16) {
        (self.ip_low, self.port)
    }

    /// Whether it is this one, where it is known to be IPv4.
    #[inline]
    pub(crate) fn has_identity_v4(&self, identity: &Endpoint) -> bool {
        self.identity_v4() == (v4_octets(&identity.ip), identity.port) && is_v4(&identity.ip)
    }

    /// The highest number ever sent, plus one.
    #[inline]
    pub(crate) fn snd_max(&self) -> u32 {
        if self.rewound { self.timed_seq } else { self.snd_nxt }
    }

    /// What comes next is `seq`: all before it was sent, or needs not be any more.
    #[inline]
    pub(crate) fn advance_to(&mut self, seq: u32) {
        self.snd_nxt = seq;
        self.rewound = self.rewound && seq_before(seq, self.timed_seq);
    }

    /// What was sent from `seq` on goes again.
    pub(crate) fn go_back_to(&mut self, seq: u32) {
        self.timed_seq = self.snd_max();
        self.timing = false;
        self.snd_nxt = seq;
        self.rewound = seq != self.timed_seq;
    }

    /// To be called when the target's window, ours, or what is acknowledged has changed.
    #[inline]
    pub(crate) fn set_limit(&mut self) {
        self.snd_limit = self.limit();
    }

    fn limit(&self) -> u32 {
        self.snd_una.wrapping_add(self.snd_wnd.min(self.cwnd))
    }

    /// Whether it takes `len` bytes of new data and may send them at once, as far as windows and what it does otherwise go.
    #[inline]
    pub(crate) fn is_free_for(&self, len: u32) -> bool {
        self.state == State::Established
            && self.cut.is_none()
            && !self.first_alone
            && !self.rewound
            && self.next_segment == NONE
            && len <= u32::from(self.mss)
            && self.snd_limit.wrapping_sub(self.snd_nxt) as i32 >= len as i32
    }

    /// Panics where what is kept twice contradicts itself.
    #[cfg(debug_assertions)]
    pub(crate) fn check(&self) {
        assert!(
            self.state == State::SynSent || self.snd_limit == self.limit(),
            "where the windows end: {self:?}"
        );
        assert_eq!(self.rto, rto_units(self.first_rto_us()), "the retransmission timeout");
        assert!(!self.rewound || !self.timing && seq_before(self.snd_nxt, self.timed_seq), "{self:?}");
        let owes = self.ack_at.is_some() || self.unacked_segments > 0;
        assert!(!owes || self.owes != Owes::Nothing, "an acknowledgment is owed: {self:?}");
    }

    /// Whether its first SYN is still to be sent.
    pub(crate) fn is_unasked(&self) -> bool {
        self.state == State::SynSent && self.snd_nxt == self.snd_una
    }

    /// The retransmission timeout with its backoff, ticks.
    pub(crate) fn rto_ticks(&self) -> u32 {
        if self.tries == 0 && self.state != State::SynSent {
            return self.first_rto_ticks();
        }
        ticks(u64::from(self.rto_us_after(self.tries)) * 1000)
    }

    /// The same before any timeout.
    #[inline]
    pub(crate) fn first_rto_ticks(&self) -> u32 {
        u32::from(self.rto) * RTO_TICKS
    }

    #[inline]
    fn first_rto_us(&self) -> u32 {
        if self.srtt_us == 0 {
            return timing::SYN_TIMEOUT_US;
        }
        (self.srtt_us + (4 * self.rttvar_us).max(1000)).clamp(timing::RTO_MIN_US, timing::RTO_MAX_US)
    }

    /// The same after so many timeouts, microseconds.
    pub(crate) fn rto_us_after(&self, tries: u8) -> u32 {
        if self.state == State::SynSent {
            return (timing::SYN_TIMEOUT_US << tries.min(timing::SYN_TRIES)).min(timing::BACKOFF_MAX_US);
        }
        let base = self.first_rto_us();
        base.saturating_mul(1 << tries.min(6)).min(base.max(timing::BACKOFF_MAX_US))
    }

    /// Takes a round-trip time into the estimate (RFC 6298 section 2).
    #[inline]
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
        let rto_us = self.first_rto_us();
        // Most often the shortest, which is known.
        self.rto = if rto_us == timing::RTO_MIN_US { RTO_MIN } else { rto_units(rto_us) };
    }

    /// Bytes sent and not acknowledged (SYN and FIN count one each).
    pub(crate) fn in_flight(&self) -> u32 {
        self.snd_nxt.wrapping_sub(self.snd_una)
    }

    /// Whether its timer in the wheel fires too late for this deadline.
    #[inline]
    pub(crate) fn fires_after(&self, deadline: Due) -> bool {
        self.armed_at.is_none_or(|at| before(deadline.tick(), at.tick()))
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
            service,
            state: State::SynSent,
            connection,
            next_copy: NONE,
            dirty: false,
            cut: None,
            owes: Owes::Nothing,
            turn: Turn::default(),
            port: identity.port,
            ip_low: v4_octets(&identity.ip),
            v6: !is_v4(&identity.ip),
            trouble: NONE,
            rewound: false,
            snd_limit: iss,
            rto: rto_units(timing::SYN_TIMEOUT_US),
            snd_una: iss,
            snd_nxt: iss,
            snd_wnd: 0,
            snd_wscale: 0,
            mss: 536,
            una_segment: NONE,
            next_segment: NONE,
            cwnd: 0,
            dup_acks: 0,
            tries: 0,
            srtt_us: 0,
            rttvar_us: 0,
            rtt_min_us: 0,
            first_alone: false,
            timing: false,
            timed_seq: 0,
            timed_at_us: 0,
            rcv_nxt: 0,
            unacked_segments: 0,
            timestamps: false,
            ts_recent: 0,
            response_at: 0,
            whole: 0,
            turn_seq: iss,
            hold_since: None,
            turn_sent_us: 0,
            rto_at: None,
            armed_at: None,
            ack_at: None,
            release_at: None,
        }
    }
}

/// In units of [`RTO_TICKS`], rounded up.
const fn rto_units(us: u32) -> u16 {
    (ticks(us as u64 * 1000).div_ceil(RTO_TICKS)) as u16
}

/// The sessions, by place: each in its first two cache lines, and what it has besides in places that no other touches.
#[derive(Debug)]
pub(crate) struct Sessions {
    sessions: Slab<Session>,
    turns: Column<Turns>,
    /// The identities' addresses but for their last four bytes. Not touched for IPv4.
    ip_high: Vec<[u8; 12]>,
    troubles: Slab<Trouble>,
}

impl Sessions {
    /// Room for `capacity` sessions.
    pub(crate) fn new(capacity: usize) -> Sessions {
        Sessions {
            sessions: Slab::new(capacity),
            turns: Column::new(capacity),
            ip_high: vec![[0; 12]; capacity],
            troubles: Slab::new(capacity),
        }
    }

    /// How far sessions are filled, and what their turns need.
    pub(crate) fn frontiers(&self) -> [Frontier; 2] {
        [self.sessions.frontier(), self.turns.frontier()]
    }

    /// Sessions that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }

    /// One past the highest place that was ever in use.
    pub(crate) fn high_water(&self) -> u32 {
        self.sessions.high_water()
    }

    /// A place for a session with this identity, or `None` when all are taken.
    pub(crate) fn insert(&mut self, session: Session, turns: Turns, identity: &Endpoint) -> Option<u32> {
        let s = self.sessions.insert(session)?;
        self.turns.set(s, turns);
        if session.v6 {
            let [ip_high @ .., _, _, _, _] = identity.ip;
            self.ip_high[s as usize] = ip_high;
        }
        Some(s)
    }

    /// Gives the place back, and that of its trouble. What else it has stays readable until the next session takes it.
    pub(crate) fn remove(&mut self, s: u32) {
        let trouble = core::mem::replace(&mut self.sessions[s].trouble, NONE);
        if trouble != NONE {
            self.troubles.remove(trouble);
        }
        self.sessions.remove(s);
    }

    /// What its gate keeps.
    #[inline]
    pub(crate) fn turns(&self, s: u32) -> &Turns {
        &self.turns[s]
    }

    /// The same beside it, to change both.
    #[inline]
    pub(crate) fn with_turns(&mut self, s: u32) -> (&mut Session, &mut Turns) {
        (&mut self.sessions[s], &mut self.turns[s])
    }

    /// Its address and port towards the target.
    #[inline]
    pub(crate) fn identity(&self, s: u32) -> Endpoint {
        let session = &self.sessions[s];
        let mut ip = from_v4(session.ip_low);
        if session.v6 {
            ip[..12].copy_from_slice(&self.ip_high[s as usize]);
        }
        Endpoint { ip, port: session.port }
    }

    /// What happened to it, if anything did.
    #[inline]
    pub(crate) fn trouble(&self, s: u32) -> Option<&Trouble> {
        match self.sessions[s].trouble {
            NONE => None,
            trouble => Some(&self.troubles[trouble]),
        }
    }

    /// The same beside it, to change both.
    #[inline]
    pub(crate) fn with_trouble(&mut self, s: u32) -> (&mut Session, Option<&mut Trouble>) {
        let session = &mut self.sessions[s];
        let trouble = match session.trouble {
            NONE => None,
            trouble => Some(&mut self.troubles[trouble]),
        };
        (session, trouble)
    }

    /// The same where something happens to it now. There is a place for every session.
    pub(crate) fn in_trouble(&mut self, s: u32) -> (&mut Session, &mut Trouble) {
        let session = &mut self.sessions[s];
        if session.trouble == NONE {
            let trouble = Trouble {
                ssthresh: u32::MAX,
                recover: session.snd_una,
                last_segment: NONE,
                board: NO_BOARD,
                narrowed_to: 0,
                in_recovery: false,
            };
            session.trouble = self.troubles.insert(trouble).unwrap_or(NONE);
        }
        let trouble = &mut self.troubles[session.trouble];
        (session, trouble)
    }

    /// The number of its board, or `NO_BOARD`.
    pub(crate) fn board(&self, s: u32) -> u16 {
        self.trouble(s).map_or(NO_BOARD, |trouble| trouble.board)
    }

    /// The last of the segments that it was given if it takes no more, else `NONE`: then they go on to the end of its connection's.
    #[inline]
    pub(crate) fn last_segment(&self, s: u32) -> u32 {
        if self.sessions[s].cut.is_none() {
            return NONE;
        }
        self.trouble(s).map_or(NONE, |trouble| trouble.last_segment)
    }

    /// It takes no more data, for this reason, and `last` was the last that it was given.
    pub(crate) fn cut(&mut self, s: u32, reason: EndReason, last: u32) {
        let (session, trouble) = self.in_trouble(s);
        session.cut = Some(reason);
        trouble.last_segment = last;
    }

    /// Panics unless each trouble is that of one session. `live`: the sessions.
    #[cfg(debug_assertions)]
    pub(crate) fn check(&self, live: impl Iterator<Item = u32>) {
        let mut places: Vec<u32> = live.map(|s| self.sessions[s].trouble).filter(|&at| at != NONE).collect();
        assert_eq!(places.len(), self.troubles.len(), "every trouble is a live session's");
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0] != pair[1]), "no two sessions share one");
    }
}

impl core::ops::Index<u32> for Sessions {
    type Output = Session;
    #[inline]
    fn index(&self, s: u32) -> &Session {
        &self.sessions[s]
    }
}

impl core::ops::IndexMut<u32> for Sessions {
    #[inline]
    fn index_mut(&mut self, s: u32) -> &mut Session {
        &mut self.sessions[s]
    }
}

/// What comes after `segment` among those of a session whose last one is `last`.
#[inline]
pub(crate) fn segment_after(segment: u32, last: u32, next: u32) -> u32 {
    if segment == last { NONE } else { next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_was_used_has_nothing_of_the_session_before() {
        let v6 = |last| Endpoint { ip: [0xfd, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 0, 0, last], port: 80 };
        let v4 = |last| Endpoint { ip: from_v4([10, 0, 0, last]), port: 81 };
        let mut sessions = Sessions::new(3);
        let insert = |sessions: &mut Sessions, identity| {
            let session = Session::new(identity, 0, 0, 7);
            let s = sessions.insert(session, Turns::default(), &identity).unwrap();
            assert_eq!(sessions.identity(s), identity);
            assert!(sessions.trouble(s).is_none());
            assert_eq!((sessions.last_segment(s), sessions.board(s)), (NONE, NO_BOARD));
            s
        };
        let mut live: Vec<u32> = [v6(1), v4(2), v6(3)].map(|identity| insert(&mut sessions, identity)).into();
        for round in 4..40 {
            let old = live.remove(usize::from(round) % 3);
            sessions.cut(old, EndReason::Gap, 5);
            sessions.in_trouble(old).1.board = 9;
            assert_eq!((sessions.last_segment(old), sessions.board(old)), (5, 9));
            sessions.in_trouble(live[0]);
            sessions.check(live.iter().copied().chain([old]));
            sessions.remove(old);
            let s = insert(&mut sessions, if round % 2 == 0 { v4(round) } else { v6(round) });
            assert_eq!(s, old);
            live.push(s);
            sessions.check(live.iter().copied());
        }
    }
}
