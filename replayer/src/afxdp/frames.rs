//! Which frame is where, and which are free.

use super::BATCH;
use super::memory::Memory;
use super::rings::{Consumer, Producer};

/// Of the frames, one in so many is kept out of the fill ring, for packets that the engine makes itself: however much
/// is captured, acknowledgments and retransmissions find a frame.
const RESERVE: u32 = 16;

/// Frames by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frames {
    /// Ready for [`Port::allocate`](super::Port::allocate).
    pub free: u32,
    /// On their way to be received: fill ring, kernel, RX ring.
    pub fill: u32,
    /// In the caller's hand.
    pub hand: u32,
    /// On their way out: TX ring, kernel, completion ring.
    pub transmit: u32,
}

#[cfg_attr(not(debug_assertions), allow(dead_code, reason = "only debug assertions follow each frame"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Free,
    Fill,
    Hand,
    Transmit,
}

/// The free frames, and how many are where.
#[derive(Debug)]
pub(super) struct Book {
    /// Indices of free frames, the one used last on top, since its memory is likely to be in a cache.
    free: Vec<u32>,
    frames: Frames,
    reserve: u32,
    #[cfg(debug_assertions)]
    places: Vec<Place>,
}

impl Book {
    /// All are free.
    pub(super) fn new(frames: u32) -> Book {
        Book {
            free: (0..frames).rev().collect(),
            frames: Frames { free: frames, ..Frames::default() },
            reserve: frames / RESERVE,
            #[cfg(debug_assertions)]
            places: vec![Place::Free; frames as usize],
        }
    }

    /// A free one goes into the caller's hand.
    #[inline]
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let index = self.free.pop()?;
        self.relocate(index, Place::Free, Place::Hand);
        Some(index)
    }

    /// One comes back from there.
    #[inline]
    pub(super) fn release(&mut self, index: u32) {
        self.relocate(index, Place::Hand, Place::Free);
        self.free.push(index);
    }

    /// Transmitted ones come back; how many.
    pub(super) fn complete(&mut self, memory: &Memory, completion: &mut Consumer<u64>) -> u32 {
        let mut total = 0;
        loop {
            let count = completion.take(u32::MAX, |address| {
                let (index, _) = memory.index(address);
                self.follow(index, Place::Transmit, Place::Free);
                self.free.push(index);
            });
            total += count;
            if count == 0 {
                break;
            }
        }
        self.frames.transmit -= total;
        self.frames.free += total;
        total
    }

    /// Fills the fill ring with free ones, in whole batches, down to the reserve.
    pub(super) fn refill(&mut self, memory: &Memory, fill: &mut Producer<u64>) {
        while self.frames.free >= self.reserve + BATCH as u32 && fill.room(BATCH as u32) >= BATCH as u32 {
            for _ in 0..BATCH {
                let Some(index) = self.free.pop() else { break };
                self.relocate(index, Place::Free, Place::Fill);
                fill.push(memory.address(index));
            }
            fill.publish();
        }
    }

    /// How many are kept out of the fill ring.
    pub(super) fn reserve(&self) -> u32 {
        self.reserve
    }

    /// How many are where.
    pub(super) fn frames(&self) -> Frames {
        self.frames
    }

    /// Accounts for a frame that goes from one place to another.
    #[inline]
    pub(super) fn relocate(&mut self, index: u32, from: Place, to: Place) {
        self.follow(index, from, to);
        *self.frames.at(from) -= 1;
        *self.frames.at(to) += 1;
    }

    /// Debug assertion: it was where it comes from.
    #[inline]
    fn follow(&mut self, index: u32, from: Place, to: Place) {
        #[cfg(debug_assertions)]
        {
            assert_eq!(self.places[index as usize], from, "frame {index}");
            self.places[index as usize] = to;
        }
        let _ = (index, from, to);
    }

    /// Debug assertion: they add up.
    pub(super) fn check(&self) {
        #[cfg(debug_assertions)]
        assert_eq!(self.frames.total() as usize, self.places.len(), "{:?}", self.frames);
        debug_assert_eq!(self.frames.free as usize, self.free.len(), "{:?}", self.frames);
    }
}

impl Frames {
    /// All of them.
    pub fn total(&self) -> u32 {
        self.free + self.fill + self.hand + self.transmit
    }

    #[inline]
    fn at(&mut self, place: Place) -> &mut u32 {
        match place {
            Place::Free => &mut self.free,
            Place::Fill => &mut self.fill,
            Place::Hand => &mut self.hand,
            Place::Transmit => &mut self.transmit,
        }
    }
}
