//! Timers: one a session and one a hole of a stream, in a wheel of lists.
//!
//! Arming is lazy: the hot path only moves a timer when it must fire earlier than it stands; a timer that fires early is
//! looked at and armed again. So a session that sends and gets its acknowledgments touches the wheel a few times a second,
//! not once a packet.

use crate::slab::{Frontier, NONE};
use alloc::{vec, vec::Vec};
use core::num::NonZeroU32;

/// The engine's clock in units of 2^16 ns (65.5 us), wrapping after 78 hours; compared by signed difference.
pub(crate) type Tick = u32;

/// The tick of a time in nanoseconds.
pub(crate) fn tick(now_ns: u64) -> Tick {
    (now_ns >> 16) as u32
}

/// A duration in ticks, rounded up.
pub(crate) const fn ticks(duration_ns: u64) -> u32 {
    duration_ns.div_ceil(1 << 16) as u32
}

/// A duration in ticks as microseconds, saturating.
pub(crate) fn microseconds(ticks: u32) -> u32 {
    u32::try_from((u64::from(ticks) << 16) / 1000).unwrap_or(u32::MAX)
}

/// A deadline in four bytes, also when there may be none: tick 0 counts as tick 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due(NonZeroU32);

impl Due {
    #[inline]
    pub(crate) fn at(tick: Tick) -> Due {
        Due(NonZeroU32::new(tick).unwrap_or(NonZeroU32::MIN))
    }

    #[inline]
    pub(crate) fn tick(self) -> Tick {
        self.0.get()
    }
}

/// Whether `a` is before `b`.
pub(crate) fn before(a: Tick, b: Tick) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// A slot is 16 ticks (1.05 ms); the wheel turns once in 4.3 s. Later deadlines wait for another turn.
const SLOTS: usize = 4096;
const SLOT_SHIFT: u32 = 4;
/// Slot times have 28 bits: they wrap when ticks do.
const SLOT_TIME: u32 = u32::MAX >> SLOT_SHIFT;

/// How far slot time `a` is after `b`.
fn slots_after(a: u32, b: u32) -> i32 {
    ((a.wrapping_sub(b) << SLOT_SHIFT) as i32) >> SLOT_SHIFT
}

/// A timer's place in a list: the next one as index plus one; the one before likewise, or of the first one its slot with `FIRST`; and its
/// deadline. Where `PREVIOUS` is 0 it is not armed, so zeroed memory is an empty wheel; an array and not a struct, because `vec!` asks the
/// system for zeroed pages only for types that it knows to be zero.
type Node = [u32; 3];
const NEXT: usize = 0;
const PREVIOUS: usize = 1;
const DEADLINE: usize = 2;
/// Timers' numbers are below this.
const FIRST: u32 = 1 << 31;

#[derive(Debug)]
pub(crate) struct Wheel {
    heads: Vec<u32>,
    occupied: [u64; SLOTS / 64],
    nodes: Vec<Node>,
    /// The next slot to look at, in slot time (tick >> SLOT_SHIFT).
    position: u32,
    armed: usize,
}

impl Wheel {
    /// Timers with numbers below `count`.
    pub(crate) fn new(count: usize, now: Tick) -> Wheel {
        assert!(count < FIRST as usize, "timers have 31 bits");
        Wheel {
            heads: vec![NONE; SLOTS],
            occupied: [0; SLOTS / 64],
            nodes: vec![[0; 3]; count],
            position: now >> SLOT_SHIFT,
            armed: 0,
        }
    }

    /// How far it is filled, where the timers below `used` were used.
    pub(crate) fn frontier(&self, used: u32) -> Frontier {
        Frontier::of(&self.nodes, used as usize)
    }

    /// Makes the timer fire at `deadline` or earlier (one that already stands earlier stays).
    #[inline]
    pub(crate) fn arm(&mut self, timer: u32, deadline: Tick) {
        let node = &self.nodes[timer as usize];
        if node[PREVIOUS] != 0 {
            if !before(deadline, node[DEADLINE]) {
                return;
            }
            self.unlink(timer);
        }
        self.link(timer, deadline);
    }

    /// Asks for what arming the timer changes.
    #[inline]
    pub(crate) fn read_ahead(&self, timer: u32) {
        replayer_prefetch::line(&self.nodes[timer as usize]);
    }

    /// When the timer fires at the latest, if it is armed.
    #[cfg(debug_assertions)]
    pub(crate) fn stands_at(&self, timer: u32) -> Option<Tick> {
        let node = &self.nodes[timer as usize];
        (node[PREVIOUS] != 0).then_some(node[DEADLINE])
    }

    /// Takes the timer out.
    pub(crate) fn cancel(&mut self, timer: u32) {
        if self.nodes[timer as usize][PREVIOUS] != 0 {
            self.unlink(timer);
        }
    }

    fn link(&mut self, timer: u32, deadline: Tick) {
        // A deadline that has passed fires with the next slot; one beyond the horizon waits at the wheel's far end.
        let now = self.position;
        let wanted = deadline.wrapping_add((1 << SLOT_SHIFT) - 1) >> SLOT_SHIFT;
        let ahead = slots_after(wanted, now).clamp(0, SLOTS as i32 - 1) as u32;
        let slot = (now.wrapping_add(ahead)) as usize % SLOTS;
        let head = self.heads[slot];
        self.nodes[timer as usize] = [head.wrapping_add(1), FIRST | slot as u32, deadline];
        if head != NONE {
            self.nodes[head as usize][PREVIOUS] = timer + 1;
        }
        self.heads[slot] = timer;
        self.occupied[slot / 64] |= 1 << (slot % 64);
        self.armed += 1;
    }

    fn unlink(&mut self, timer: u32) {
        let [next, previous, _] = self.nodes[timer as usize];
        if next != 0 {
            self.nodes[next as usize - 1][PREVIOUS] = previous;
        }
        if previous & FIRST == 0 {
            self.nodes[previous as usize - 1][NEXT] = next;
        } else {
            let slot = (previous & !FIRST) as usize;
            self.heads[slot] = next.wrapping_sub(1);
            if self.heads[slot] == NONE {
                self.occupied[slot / 64] &= !(1 << (slot % 64));
            }
        }
        self.nodes[timer as usize][PREVIOUS] = 0;
        self.armed -= 1;
    }

    /// A timer whose deadline has come, taken out of the wheel; call until `None`.
    pub(crate) fn expired(&mut self, now: Tick) -> Option<u32> {
        let until = now >> SLOT_SHIFT;
        loop {
            let behind = slots_after(until, self.position);
            if behind < 0 {
                return None;
            }
            let slot = self.position as usize % SLOTS;
            let head = self.heads[slot];
            if head != NONE {
                self.unlink(head);
                let deadline = self.nodes[head as usize][DEADLINE];
                if before(now, deadline) {
                    // Of a later turn of the wheel: goes round again. The slot just ahead is the earliest it can go to.
                    let place = if deadline >> SLOT_SHIFT == until {
                        until.wrapping_add(1) << SLOT_SHIFT
                    } else {
                        deadline
                    };
                    self.link_after(head, place, deadline);
                    continue;
                }
                return Some(head);
            }
            if behind == 0 {
                return None;
            }
            self.position = self.skip_empty(until);
        }
    }

    /// Of the timers in the slot that is being emptied, the next but one: asked for, so that what it belongs to can be.
    pub(crate) fn after_next(&self) -> Option<u32> {
        let head = self.heads[self.position as usize % SLOTS];
        let after = self.nodes.get(head as usize)?[NEXT].checked_sub(1)?;
        self.read_ahead(after);
        Some(after)
    }

    /// Links with the slot of `place` but keeps the true deadline. Never into the slot being emptied.
    fn link_after(&mut self, timer: u32, place: Tick, deadline: Tick) {
        let earliest = self.position.wrapping_add(1) << SLOT_SHIFT;
        let place = if before(place, earliest) { earliest } else { place };
        self.link(timer, place);
        self.nodes[timer as usize][DEADLINE] = deadline;
    }

    /// The next occupied slot time after the current one, at most `until`.
    fn skip_empty(&self, until: u32) -> u32 {
        let mut at = self.position.wrapping_add(1) & SLOT_TIME;
        while at != until {
            let slot = at as usize % SLOTS;
            let word = self.occupied[slot / 64] >> (slot % 64);
            if word & 1 != 0 {
                return at;
            }
            let left = until.wrapping_sub(at) & SLOT_TIME;
            let step = if word == 0 { 64 - (slot % 64) as u32 } else { word.trailing_zeros() };
            at = at.wrapping_add(step.min(left)) & SLOT_TIME;
        }
        until
    }

    /// A tick before which nothing fires, or `None` when no timer is armed.
    pub(crate) fn next(&self) -> Option<Tick> {
        if self.armed == 0 {
            return None;
        }
        let limit = self.position.wrapping_add(SLOTS as u32) & SLOT_TIME;
        let slot = self.position as usize % SLOTS;
        if self.heads[slot] != NONE {
            return Some(self.position << SLOT_SHIFT);
        }
        Some(self.skip_empty(limit) << SLOT_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fired(wheel: &mut Wheel, now: Tick) -> Vec<u32> {
        let mut all: Vec<u32> = core::iter::from_fn(|| wheel.expired(now)).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn each_fires_once_and_not_early() {
        for start in [0u32, 12_345, u32::MAX - 100, u32::MAX - 70_000] {
            let mut wheel = Wheel::new(8, start);
            for (timer, after) in [(0, 1u32), (1, 16), (2, 500), (3, 65_536), (4, 400_000), (5, 15)] {
                wheel.arm(timer, start.wrapping_add(after));
            }
            let mut seen = [None; 8];
            for step in 0..420_000u32 {
                let now = start.wrapping_add(step);
                while let Some(timer) = wheel.expired(now) {
                    assert!(seen[timer as usize].replace(step).is_none());
                }
            }
            for (timer, after) in [(0usize, 1u32), (1, 16), (2, 500), (3, 65_536), (4, 400_000), (5, 15)] {
                let at = seen[timer].unwrap_or_else(|| panic!("timer {timer} from {start}"));
                assert!(at >= after && at <= after + 32, "timer {timer} from {start}: {at} for {after}");
            }
            assert_eq!(wheel.next(), None);
        }
    }

    #[test]
    fn timers_that_are_armed_after_the_wrap_are_on_time() {
        // The far timer is what the wheel finds first when it looks past the wrap.
        let start = u32::MAX - 100;
        let mut wheel = Wheel::new(2, start);
        wheel.arm(0, start.wrapping_add(40_000));
        for step in (0..30_000).step_by(500) {
            let now = start.wrapping_add(step);
            assert_eq!(wheel.expired(now), None);
            wheel.arm(1, now.wrapping_add(100));
            assert_eq!(wheel.expired(now.wrapping_add(120)), Some(1), "{step} after {start}");
        }
    }

    #[test]
    fn a_long_sleep_fires_all() {
        let mut wheel = Wheel::new(3, 0);
        wheel.arm(0, 100);
        wheel.arm(1, 1_000_000);
        wheel.arm(2, 90_000);
        assert_eq!(fired(&mut wheel, 95_000), [0, 2]);
        assert_eq!(fired(&mut wheel, 2_000_000), [1]);
    }

    #[test]
    fn arming_later_keeps_the_earlier() {
        let mut wheel = Wheel::new(2, 0);
        wheel.arm(0, 1000);
        wheel.arm(0, 5000);
        assert!(wheel.next().is_some_and(|at| at <= 1016));
        assert_eq!(fired(&mut wheel, 1200), [0]);
        wheel.arm(0, 5000);
        wheel.arm(0, 2000);
        assert_eq!(fired(&mut wheel, 2100), [0]);
        wheel.arm(0, 3000);
        wheel.cancel(0);
        assert_eq!(fired(&mut wheel, 9000), []);
    }
}
