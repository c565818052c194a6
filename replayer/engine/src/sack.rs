//! What a target has beyond its acknowledgment (RFC 2018), so that in recovery each loss is made up for at once and nothing that arrived
//! goes again: the shape of RFC 6675, with one retransmission for each acknowledgment that says that something arrived.
//!
//! Few sessions recover from losses at the same time, so boards are not part of a session. Where there is none left, or a board is
//! full, what is not remembered costs a retransmission too many, or a wait for the timeout.

use crate::engine::Engine;
use crate::output::Output;
use crate::session::seq_before;
use replayer_common::response::ResponseHeader;

/// Runs of bytes that are remembered: a target tells of three at a time, the newest first.
const RUNS: usize = 6;

/// Boards at once.
pub(crate) const MAX_BOARDS: usize = 1 << 14;

/// The number of no board.
pub(crate) const NO_BOARD: u16 = u16::MAX;

/// What arrived of a session's bytes in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Board {
    /// Sorted, apart from each other, after the acknowledgment: first byte, end.
    runs: [(u32, u32); RUNS],
    len: u8,
    /// What lies before this was sent again in this recovery, as far as it was missing.
    resent: u32,
}

impl Board {
    fn new(una: u32) -> Board {
        Board { runs: [(0, 0); RUNS], len: 0, resent: una }
    }

    fn runs(&self) -> &[(u32, u32)] {
        &self.runs[..usize::from(self.len)]
    }

    /// Takes note of a run that arrived.
    fn add(&mut self, mut left: u32, mut right: u32) {
        let mut kept = [(0, 0); RUNS + 1];
        let mut count = 0;
        let mut placed = false;
        for &(l, r) in self.runs() {
            if seq_before(r, left) {
                kept[count] = (l, r);
                count += 1;
            } else if seq_before(right, l) {
                if !placed {
                    kept[count] = (left, right);
                    count += 1;
                    placed = true;
                }
                kept[count] = (l, r);
                count += 1;
            } else {
                // They touch.
                left = if seq_before(l, left) { l } else { left };
                right = if seq_before(right, r) { r } else { right };
            }
        }
        if !placed {
            kept[count] = (left, right);
            count += 1;
        }
        // The highest is forgotten: it is needed last.
        let count = count.min(RUNS);
        self.runs.copy_from_slice(&kept[..RUNS]);
        self.len = count as u8;
    }

    /// Forgets what lies before the acknowledgment.
    fn acknowledge(&mut self, una: u32) {
        let passed = self.runs().iter().filter(|&&(_, right)| !seq_before(una, right)).count();
        self.runs.copy_within(passed.., 0);
        self.len -= passed as u8;
        if self.len > 0 && seq_before(self.runs[0].0, una) {
            self.runs[0].0 = una;
        }
        if seq_before(self.resent, una) {
            self.resent = una;
        }
    }

    fn bytes(&self) -> u32 {
        self.runs().iter().map(|&(left, right)| right.wrapping_sub(left)).sum()
    }

    /// The first bytes that are missing before some that arrived, and were not sent again yet.
    fn next_hole(&self, una: u32) -> Option<(u32, u32)> {
        let mut start = una;
        for &(left, right) in self.runs() {
            let from = if seq_before(start, self.resent) { self.resent } else { start };
            if seq_before(from, left) {
                return Some((from, left));
            }
            start = right;
        }
        None
    }
}

impl Engine {
    /// Takes note of what a record says beyond its acknowledgment.
    pub(crate) fn note_sack(&mut self, s: u32, record: &ResponseHeader) {
        let session = &self.sessions[s];
        let (una, max) = (session.snd_una, session.snd_max());
        let mut board = self.sessions.board(s);
        if board != NO_BOARD {
            self.boards[u32::from(board)].acknowledge(una);
        }
        for &(left, right) in record.sack.iter().take(usize::from(record.sack_count)) {
            // Not what was acknowledged (RFC 2883), nor what was never sent.
            let sound = seq_before(una, left) && seq_before(left, right) && !seq_before(max, right);
            if !sound {
                continue;
            }
            if board == NO_BOARD {
                let Some(new) = self.boards.insert(Board::new(una)) else { return };
                board = new as u16;
                self.sessions.in_trouble(s).1.board = board;
            }
            self.boards[u32::from(board)].add(left, right);
        }
        let in_recovery = self.sessions.trouble(s).is_some_and(|trouble| trouble.in_recovery);
        if board != NO_BOARD && self.boards[u32::from(board)].len == 0 && !in_recovery {
            self.forget_sack(s);
        }
    }

    /// The board is not believed any more (RFC 2018 section 8: after a timeout the target may have thrown away what it had).
    pub(crate) fn forget_sack(&mut self, s: u32) {
        let (_, Some(trouble)) = self.sessions.with_trouble(s) else { return };
        let board = core::mem::replace(&mut trouble.board, NO_BOARD);
        if board != NO_BOARD {
            self.boards.remove(u32::from(board));
        }
    }

    /// Bytes that the target has beyond its acknowledgment.
    pub(crate) fn sacked(&self, s: u32) -> u32 {
        match self.sessions.board(s) {
            NO_BOARD => 0,
            board => self.boards[u32::from(board)].bytes(),
        }
    }

    /// Sends the next bytes again that are missing before some that arrived. False when there are none.
    pub(crate) fn retransmit_hole<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) -> bool {
        let (una, board) = (self.sessions[s].snd_una, self.sessions.board(s));
        if board == NO_BOARD {
            return false;
        }
        let Some((start, end)) = self.boards[u32::from(board)].next_hole(una) else { return false };
        let len = self.retransmit(now_ns, s, start, end.wrapping_sub(start), out);
        self.boards[u32::from(board)].resent = start.wrapping_add(len);
        len > 0
    }

    /// A recovery begins: nothing was sent again in it.
    pub(crate) fn begin_resending(&mut self, s: u32) {
        let board = self.sessions.board(s);
        if board != NO_BOARD {
            self.boards[u32::from(board)].resent = self.sessions[s].snd_una;
        }
    }

    /// Whether the first missing bytes were sent again in this recovery.
    pub(crate) fn was_resent(&self, s: u32) -> bool {
        let board = self.sessions.board(s);
        board != NO_BOARD && seq_before(self.sessions[s].snd_una, self.boards[u32::from(board)].resent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `text`: runs in the order in which they are told of.
    fn board(una: u32, runs: &[(u32, u32)]) -> Board {
        let mut board = Board::new(una);
        for &(left, right) in runs {
            board.add(left, right);
        }
        board
    }

    #[test]
    fn runs_are_sorted_and_joined() {
        let b = board(0, &[(50, 60), (10, 20), (30, 40), (20, 30)]);
        assert_eq!(b.runs(), [(10, 40), (50, 60)]);
        let b = board(0, &[(10, 20), (30, 40), (50, 60), (15, 55)]);
        assert_eq!(b.runs(), [(10, 60)]);
        assert_eq!(b.bytes(), 50);
    }

    #[test]
    fn any_order_gives_the_same_board_and_a_full_one_forgets_the_highest() {
        let runs: [(u32, u32); 8] = core::array::from_fn(|i| (10 + 20 * i as u32, 20 + 20 * i as u32));
        for turn in 0..8 {
            let mut rotated = runs;
            rotated.rotate_left(turn);
            let b = board(0, &rotated);
            assert_eq!(b.len as usize, RUNS);
            assert!(b.runs().windows(2).all(|pair| pair[0].1 < pair[1].0), "{:?}", b.runs());
        }
        assert_eq!(board(0, &runs).runs(), &runs[..RUNS]);
    }

    #[test]
    fn holes_are_found_once_across_the_wrap() {
        let una = u32::MAX - 9;
        let at = |n: u32| una.wrapping_add(n);
        let mut b = board(una, &[(at(10), at(20)), (at(30), at(40))]);
        assert_eq!(b.next_hole(una), Some((una, at(10))));
        b.resent = at(4);
        assert_eq!(b.next_hole(una), Some((at(4), at(10))));
        b.resent = at(10);
        assert_eq!(b.next_hole(una), Some((at(20), at(30))));
        b.resent = at(30);
        assert_eq!(b.next_hole(una), None);
        b.acknowledge(at(35));
        assert_eq!((b.runs(), b.resent), (&[(at(35), at(40))][..], at(35)));
        assert_eq!(b.next_hole(at(35)), None);
    }
}
