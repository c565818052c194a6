//! The boundaries between a target's responses, as far as they are remembered.

use crate::session::seq_before;

/// Where responses may have ended: ends of writes (see [`Turns::note_response`]) that a turn may still ask for, oldest first. A client
/// that pipelines may be many responses behind its target, so when there are too many, the oldest are kept, and the newest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Marks {
    /// Sequence numbers, in bytes: so that other bytes fit behind.
    ends: [[u8; 4]; MARKS],
    /// How many, and where others are missing.
    count: u8,
}

/// Boundaries that are kept.
pub(super) const MARKS: usize = 4;
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
    pub(super) fn push(&mut self, end: u32, base: u32) {
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
    pub(super) fn is_unknown(&self, seq: u32) -> bool {
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
    pub(super) fn first_from(&self, seq: u32) -> Option<u32> {
        if self.is_unknown(seq) { Some(seq) } else { self.known().find(|&end| !seq_before(end, seq)) }
    }

    /// Whether `seq` is known to be a boundary.
    pub(super) fn has(&self, seq: u32) -> bool {
        self.known().any(|end| end == seq)
    }

    /// Forgets the boundaries up to `seq`.
    pub(super) fn forget_up_to(&mut self, seq: u32) {
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
    pub(super) fn begin(&mut self) {
        if self.lost(LOST_INSIDE) {
            let last = self.len() - 1;
            self.ends.swap(0, last);
            self.count = 1 | LOST_BEFORE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
