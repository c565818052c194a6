//! When to look at the rings: at once, or after a pause in which more comes.
//!
//! A sleep, a wake-up, a write to a peer and what TCP does with it cost some 30 us, whether they carry one record or a
//! hundred (measured at 40 000 records a second on 50 sessions: four fifths of the process's time was such cost).
//! Where many sessions are active a pause makes them carry many; a session that waits for its response then waits a
//! little longer. Where few sessions send back and forth as fast as they can, a pause would only slow them down.
//!
//! So the measure is the time between two records of the *same* session: a pause of a fraction of it delays no session
//! noticeably. Pure: the time is an argument.

/// How long the traffic is watched before a decision, ns. Long enough to see each of some hundred sessions once.
const WINDOW: u64 = 4_000_000;

/// Below this rate, records in a window (12 a millisecond), every record has the process for itself anyway.
const FEW_RECORDS: u64 = 48;

/// A pause takes half of the time between two records of a session; most requests have two, so that a session's cycle
/// grows by an eighth on average. Where cycles are long it takes more and leaves this much, ns.
const LEAVE: u64 = 400_000;

/// Pauses shorter than this cost more than they save, ns.
const SHORTEST: u64 = 100_000;

/// Bits of the sketch that counts sessions.
const BITS: u32 = 256;

/// With fewer sessions than this, being behind means that each step of each session waits for a wake-up.
const FEW_SESSIONS: f64 = 4.5;

/// Time between two records of a session above which a wake-up (50 us) more or less does not matter, ns: it is the target that takes time.
const WORTH_SPINNING: u64 = 500_000;

/// What to do before the next look at the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait for whatever comes.
    Wait,
    /// Sleep so many ns first.
    Pause(u64),
    /// Look again at once, and give way to others meanwhile: a wake-up from idle takes longer than the whole exchange (about
    /// 50 us where a hypervisor takes the idle core away).
    Spin,
}

/// Watches records and decides on pauses.
#[derive(Default)]
pub struct Moderation {
    window_start: u64,
    records: u64,
    /// A bit for each hash seen: linear counting (Whang et al. 1990).
    sketch: [u64; BITS as usize / 64],
    pause: u64,
    few_sessions: bool,
    longest: u64,
}

impl Moderation {
    /// Pauses are at most `longest` ns.
    pub fn new(longest: u64) -> Moderation {
        Moderation { longest, ..Moderation::default() }
    }

    /// A record of the session with this port and address ending passed.
    #[inline]
    pub fn record(&mut self, port: u16, addr_end: u8) {
        self.records += 1;
        let hash = (u32::from(port) << 8 | u32::from(addr_end)).wrapping_mul(0x9e37_79b1) >> 24;
        self.sketch[hash as usize / 64] |= 1 << (hash % 64);
    }

    /// What to do before the next look. `behind`: the replay waits for responses.
    pub fn next(&mut self, now: u64, behind: bool) -> Next {
        let elapsed = now.saturating_sub(self.window_start);
        if elapsed >= WINDOW {
            self.decide(elapsed);
            self.records = 0;
            self.sketch = Default::default();
            self.window_start = now;
        }
        match (self.pause, behind) {
            (_, true) if self.few_sessions => Next::Spin,
            // Measured with eight saturated connections: pauses of 0.1 ms on both sides made the replay a third slower.
            (0, _) | (_, true) => Next::Wait,
            (pause, false) => Next::Pause(pause),
        }
    }

    fn decide(&mut self, elapsed: u64) {
        let free = BITS - self.sketch.iter().map(|word| word.count_ones()).sum::<u32>();
        let sessions = f64::from(BITS) * (f64::from(BITS) / f64::from(free.max(1))).ln();
        let between = (elapsed as f64 * sessions / self.records.max(1) as f64) as u64;
        self.few_sessions = sessions < FEW_SESSIONS && self.records > 0 && between < WORTH_SPINNING;
        self.pause = 0;
        if self.records * WINDOW < FEW_RECORDS * elapsed {
            return;
        }
        let pause = (between / 2).max(between.saturating_sub(LEAVE)).min(self.longest);
        if pause >= SHORTEST.min(self.longest) {
            self.pause = pause;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: u64 = 1_000_000;

    /// The pause after 20 ms of so many records a second on so many sessions.
    fn pause(rate: u64, sessions: u64) -> u64 {
        let mut moderation = Moderation::new(LONGEST);
        let mut pause = 0;
        for record in 0..rate / 50 {
            let now = 1_000_000_000 + record * 1_000_000_000 / rate;
            moderation.record(20_000 + (record % sessions) as u16, 7);
            pause = match moderation.next(now, false) {
                Next::Pause(pause) => pause,
                _ => 0,
            };
        }
        pause
    }

    #[test]
    fn few_records_or_few_sessions_are_served_at_once() {
        assert_eq!(pause(1_000, 50), 0);
        assert_eq!(pause(10_000, 500), 0);
        assert_eq!(pause(50_000, 1), 0, "one session back and forth");
        assert_eq!(pause(60_000, 8), 0, "eight of them, 30 000 requests a second");
    }

    #[test]
    fn many_sessions_are_batched_without_delaying_any_noticeably() {
        let fifty = pause(40_000, 50);
        assert!(
            (700_000..=LONGEST).contains(&fifty),
            "{fifty}: 0.4 ms less than the 1.25 ms between records"
        );
        assert_eq!(pause(40_000, 10_000), LONGEST);
        let saturated = pause(100_000, 50);
        assert!((180_000..340_000).contains(&saturated), "{saturated}: half of 0.5 ms");
    }

    #[test]
    fn the_end_of_a_burst_ends_the_pauses() {
        let mut moderation = Moderation::new(LONGEST);
        for record in 0..1000u16 {
            moderation.record(record, 0);
        }
        assert!(matches!(moderation.next(WINDOW, false), Next::Pause(_)));
        assert_eq!(moderation.next(2 * WINDOW, false), Next::Wait);
    }

    #[test]
    fn behind_few_sessions_spin_and_nobody_pauses() {
        // So many sessions, and so many ns between two records of any of them.
        let quick = [(1, 50_000, Next::Spin), (4, 50_000, Next::Spin), (50, 50_000, Next::Wait)];
        let slow_target = [(1, 600_000, Next::Wait), (4, 150_000, Next::Wait)];
        for (sessions, apart, expected) in quick.into_iter().chain(slow_target) {
            let mut moderation = Moderation::new(LONGEST);
            let mut next = Next::Wait;
            for record in 0..400u64 {
                moderation.record(20_000 + (record % sessions) as u16, 7);
                next = moderation.next(1_000_000_000 + record * apart, true);
            }
            assert_eq!(next, expected, "{sessions} sessions, {apart} ns");
            assert_eq!(moderation.next(10_000_000_000, true), Next::Wait, "nothing comes: no spinning");
        }
    }
}
