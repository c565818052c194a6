//! The gate beside a session whose responses come when and as a test says.

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
        assert!(matches!(s.gate(900, none(), false, 1000, at), Gate::Wait(_)), "after {at} full segments");
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
                if ready == asked - written || random(100) >= if ready > 1 { STILL_LATE } else { self.late } {
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
