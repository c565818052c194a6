//! Room for client data: what makes way where a connection holds all that it may, or the store is full.
//!
//! - What a connection holds far ahead of its stream, which may be a stranger's, goes first: its own, then that of others.
//! - Where the store is full, the connection that holds most is shed, if it holds more than the one that has no room: one that has little is not
//!   shed because others fill the store.
//! - Else who has no room is shed, whole, and joined again at its next turn.

use crate::capture::Fate;
use crate::connection::{Left, Phase};
use crate::counters::{Counter, EndReason};
use crate::engine::Engine;
use crate::output::Output;
use crate::slab::NONE;
use crate::store::{self, Segment};
use crate::timer::tick;
use alloc::vec::Vec;

/// Who holds more than this part of the store is known; fewer than so many can.
const PART: usize = 64;
/// So many of the places where holes are known are looked at for room, each time it is needed.
const LOOK: u32 = 16;

/// Where room may be found.
#[derive(Debug)]
pub(crate) struct Room {
    /// Connections that have held more than `much` since they were last looked at, each once.
    heavy: Vec<u32>,
    /// So many places, and no more, a connection may hold without being heavy, and within its limit.
    much: u32,
    /// How many it may hold.
    most: u32,
    /// The number of the hole that is looked at next.
    next_hole: u32,
}

impl Room {
    /// Of a store of so many places, of which a connection may have `most`.
    pub(crate) fn new(places: usize, most: u32) -> Room {
        let much = most.min((places / PART) as u32);
        Room { heavy: Vec::with_capacity(PART), much, most, next_hole: 0 }
    }

    /// Whether a connection that holds so many places may have more, without becoming heavy by that.
    #[inline(always)]
    pub(crate) fn has(&self, held: u32, more: u32) -> bool {
        held + more <= self.much || self.has_for_heavy(held, more)
    }

    /// The same of one that is heavy: seldom, and then other things take longer.
    #[cold]
    #[inline(never)]
    fn has_for_heavy(&self, held: u32, more: u32) -> bool {
        held > self.much && held + more <= self.most
    }
}

impl Engine {
    /// Stores a segment, if there is room for that, and the connection may have it. The places are not counted as the connection's yet.
    pub(crate) fn hold(&mut self, c: u32, segment: Segment, payload: &[u8]) -> Option<u32> {
        let before = self.connections[c].held_places;
        let held = before + store::places(payload.len() as u32);
        if held > self.room.most {
            return None;
        }
        let stored = self.store.insert(segment, payload).ok()?;
        if before <= self.room.much && held > self.room.much {
            self.note_heavy(c);
        }
        Some(stored)
    }

    fn note_heavy(&mut self, c: u32) {
        let Room { heavy, much, .. } = &mut self.room;
        if heavy.contains(&c) {
            return;
        }
        if heavy.len() == PART {
            heavy.retain(|&c| self.connections[c].held_places > *much);
        }
        heavy.push(c);
    }

    /// Makes room in the store, if it is that which is full, for so many bytes of `c`. Returns whether there may be enough now.
    pub(crate) fn make_room<O: Output>(&mut self, now_ns: u64, c: u32, len: u32, out: &mut O) -> bool {
        let held = self.connections[c].held_places;
        if held + store::places(len) > self.room.most {
            return false;
        }
        for _ in 0..LOOK.min(self.connections.holes()) {
            let hole = self.room.next_hole;
            self.room.next_hole = if hole + 1 < self.connections.holes() { hole + 1 } else { 0 };
            if let Some((other, _)) = self.connections.hole(hole)
                && other != c
                && self.is_doubtful_behind_hole(other)
            {
                self.drop_out_of_order(other, Counter::BytesLimit);
                return true;
            }
        }
        let most = self.room.heavy.iter().copied().max_by_key(|&other| self.connections[other].held_places);
        let Some(most) = most.filter(|&most| self.connections[most].held_places > held) else { return false };
        self.shed(now_ns, most, out);
        true
    }

    /// No room to hold the stream, up to `end`: its sessions are shed whole.
    pub(crate) fn over_limit<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        end: u32,
        ack: u32,
        out: &mut O,
    ) -> Fate {
        let ack_fits = self.acknowledgment_fits(c, ack);
        self.shed(now_ns, c, out);
        let left = Left::before((self.connections[c].next_seq, end));
        self.connections.set_left(c, Some(left));
        let connection = &mut self.connections[c];
        connection.next_seq = end;
        if ack_fits {
            (connection.last_ack, connection.ack_known) = (ack, true);
        }
        Err((Counter::PacketsLimit, Counter::BytesLimit))
    }

    /// Ends all sessions of a connection at once by RST, for a limit; while its stream goes on, it is joined again at its next turn.
    fn shed<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        self.drop_out_of_order(c, Counter::BytesLimit);
        let mut s = self.connections[c].first_session;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            self.send_reset(now_ns, s, out);
            self.end_session(tick(now_ns), s, EndReason::Limit, out);
            s = next;
        }
        // With its last session it may have been forgotten.
        if self.connections[c].phase == Phase::Following {
            self.connections[c].phase = Phase::Watching;
            self.connections.set_early_end(c, None);
        }
    }
}
