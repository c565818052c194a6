//! Client data that the engine keeps: segments as they were captured, in places of a fixed size.
//!
//! A captured payload is copied here once, however many copies are made of its session, and stays until each of them had
//! it acknowledged by its target: it is what retransmission and waiting for a turn draw on. Capture frames are never
//! held, so a slow target cannot starve capture of frames. Nothing is allocated after start; freed places are used
//! again first, so the memory that is touched is what was held at the worst moment.

use crate::slab::{Frontier, NONE};
use crate::wire;
use alloc::{vec, vec::Vec};

/// Bytes of payload in a place. A small request takes one place, a full Ethernet segment six.
pub(crate) const BLOCK: usize = 256;

/// How many places so many bytes take, more than none and no more than a packet has.
#[inline]
pub(crate) fn places(len: u32) -> u32 {
    // Not `div_ceil`, which takes twice as many instructions for the sake of lengths near 2^32.
    (len + (BLOCK as u32 - 1)) >> BLOCK.trailing_zeros()
}

/// So many bytes are copied by a few moves of fixed length.
const FEW: usize = wire::FEW;

/// Copies the first `len` bytes of `from`, or more when they are few and there is room for more.
#[inline(always)]
pub(crate) fn copy(from: &[u8], to: &mut [u8], len: usize) {
    match (from.first_chunk::<FEW>(), to.first_chunk_mut::<FEW>()) {
        (Some(from), Some(to)) if len <= FEW => *to = *from,
        _ => to[..len].copy_from_slice(&from[..len]),
    }
}

/// A captured segment's place in its client's stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// The next segment of the list, or `NONE`. Of a free place: the next free one.
    pub(crate) next: u32,
    /// The place of the bytes that this one has no room for, or `NONE`. All that counts of a place that is not a segment's first.
    more: u32,
    /// Sequence number of the first byte, in the client's numbering (which is the target's too).
    pub(crate) seq: u32,
    /// The client's ACK number on this segment.
    pub(crate) ack: u32,
    /// Response bytes that the client had read since the turn before, if this segment starts a turn.
    pub(crate) need: u32,
    /// When it was captured, microseconds (wrapping).
    pub(crate) captured_us: u32,
    /// Bytes.
    pub(crate) len: u32,
    /// Bytes at the beginning of the first place that are not part of it any more.
    skip: u32,
    /// The checksum's sum of all its bytes (see [`wire::sum`]); not kept up when some are trimmed off.
    sum: u16,
    /// Its places, this one among them.
    places: u16,
    /// Sessions that still need it.
    pub(crate) references: u16,
    /// Whether it starts a turn.
    pub(crate) starts_turn: bool,
    /// PSH as captured.
    pub(crate) push: bool,
}

impl Segment {
    /// Without a payload yet.
    #[inline(always)]
    pub(crate) fn new(seq: u32, ack: u32, push: bool, captured_us: u32) -> Segment {
        Segment {
            next: NONE,
            more: NONE,
            seq,
            ack,
            need: 0,
            captured_us,
            len: 0,
            skip: 0,
            sum: 0,
            places: 0,
            references: 0,
            starts_turn: false,
            push,
        }
    }

    /// As given to so many sessions, at a turn's start or within it.
    #[inline(always)]
    pub(crate) fn given(self, references: u16, starts_turn: bool, need: u32) -> Segment {
        Segment { references, starts_turn, need, ..self }
    }

    /// How many places of the store it has. What was trimmed off gives none back.
    #[inline]
    pub(crate) fn places(&self) -> u32 {
        u32::from(self.places)
    }

    /// The sequence number after its last byte.
    pub(crate) fn end(&self) -> u32 {
        self.seq.wrapping_add(self.len)
    }
}

/// All held segments of a worker. A segment and the bytes in its place have the same index.
#[derive(Debug)]
pub(crate) struct Store {
    segments: Vec<Segment>,
    /// [`BLOCK`] a place.
    bytes: Vec<u8>,
    /// Places that were used before.
    free: u32,
    used: usize,
    held_bytes: u64,
}

/// The store is full.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Store {
    /// Room for `max_bytes` in places.
    pub(crate) fn new(max_bytes: usize) -> Store {
        let places = (max_bytes / BLOCK).clamp(64, (NONE - 1) as usize);
        Store {
            segments: Vec::with_capacity(places),
            // Zeroed memory from the system: pages are touched as places are used.
            bytes: vec![0; places * BLOCK],
            free: NONE,
            used: 0,
            held_bytes: 0,
        }
    }

    /// How far segments are filled, and their bytes.
    pub(crate) fn frontiers(&self) -> [Frontier; 2] {
        let used = self.segments.len();
        [Frontier::of(&self.segments, used), Frontier::of(&self.bytes, used * BLOCK)]
    }

    /// Payload bytes held now.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Places in use now.
    #[cfg(test)]
    pub(crate) fn places_held(&self) -> usize {
        self.used
    }

    /// Places there are.
    pub(crate) fn places(&self) -> usize {
        self.bytes.len() / BLOCK
    }

    /// The bytes of a place.
    #[inline(always)]
    fn block(&self, place: u32) -> &[u8; BLOCK] {
        &self.bytes.as_chunks().0[place as usize]
    }

    /// A free place, with bytes in it. What is said of it is of its past.
    #[inline]
    fn fill(&mut self, bytes: &[u8]) -> Result<u32, Full> {
        let index = self.free;
        let index = if let Some(place) = self.segments.get(index as usize) {
            self.free = place.next;
            index
        } else if self.segments.len() < self.places() {
            self.segments.push(Segment::new(0, 0, false, 0));
            self.segments.len() as u32 - 1
        } else {
            return Err(Full);
        };
        self.used += 1;
        let block = &mut self.bytes.as_chunks_mut::<BLOCK>().0[index as usize];
        match bytes.first_chunk::<BLOCK>() {
            Some(full) => *block = *full,
            None => block[..bytes.len()].copy_from_slice(bytes),
        }
        Ok(index)
    }

    /// Keeps the first `len` bytes of `room`, most often few, in a place that was used before. `segment` says all the rest of it; it is in no
    /// list yet. Returns its index and the checksum's sum of its bytes. Also [`Full`] if there are fewer bytes.
    #[inline(always)]
    pub(crate) fn insert_from(
        &mut self,
        segment: impl Fn() -> Segment,
        room: &[u8],
        len: usize,
    ) -> Result<(u32, u16), Full> {
        let index = self.free;
        if let (Some(few), true) = (room.first_chunk::<FEW>(), len <= FEW)
            && let Some(place) = self.segments.get_mut(index as usize)
            && let Some(block) = self.bytes.as_chunks_mut::<BLOCK>().0.get_mut(index as usize)
            && let Some(begin) = block.first_chunk_mut::<FEW>()
        {
            *begin = *few;
            self.free = place.next;
            let sum = wire::sum_few(few, len);
            *place = Segment { len: len as u32, sum, places: 1, ..segment() };
            self.used += 1;
            self.held_bytes += len as u64;
            return Ok((index, sum));
        }
        let index = self.insert(segment(), room.get(..len).ok_or(Full)?)?;
        Ok((index, self.sum_whole(index)))
    }

    /// Keeps `payload`. `segment` says all the rest of it; it is in no list yet.
    pub(crate) fn insert(&mut self, mut segment: Segment, payload: &[u8]) -> Result<u32, Full> {
        if self.places() - self.used < payload.len().div_ceil(BLOCK).max(1) {
            return Err(Full);
        }
        let (chunk, rest) = payload.split_at(payload.len().min(BLOCK));
        let first = self.fill(chunk)?;
        (segment.len, segment.sum) = (payload.len() as u32, wire::sum(payload));
        segment.places = places(segment.len) as u16;
        let mut last = first;
        let mut more = NONE;
        for chunk in rest.chunks(BLOCK) {
            let place = self.fill(chunk)?;
            if last == first {
                more = place;
            } else {
                self.segments[last as usize].more = place;
            }
            last = place;
        }
        self.segments[last as usize].more = NONE;
        segment.more = more;
        self.segments[first as usize] = segment;
        self.held_bytes += payload.len() as u64;
        Ok(first)
    }

    /// Lets go of a segment that is in no list any more.
    #[inline]
    pub(crate) fn remove(&mut self, index: u32) {
        self.held_bytes -= u64::from(self.segments[index as usize].len);
        let mut place = index;
        while place != NONE {
            let segment = &mut self.segments[place as usize];
            segment.next = self.free;
            self.free = place;
            self.used -= 1;
            place = segment.more;
        }
    }

    /// Forgets the first `count` bytes of a segment that no session has; fewer than it has.
    pub(crate) fn trim_front(&mut self, index: u32, count: u32) {
        let segment = &mut self.segments[index as usize];
        debug_assert!(count < segment.len);
        segment.skip += count;
        segment.len -= count;
        segment.seq = segment.seq.wrapping_add(count);
        self.held_bytes -= u64::from(count);
    }

    /// The checksum's sum of all of a segment's bytes, none of which was trimmed off.
    #[inline]
    pub(crate) fn sum_whole(&self, index: u32) -> u16 {
        self.segments[index as usize].sum
    }

    /// The checksum's sum of `len` bytes from `offset` on, if it is known: of a whole segment.
    #[inline]
    pub(crate) fn sum(&self, index: u32, offset: u32, len: u32) -> Option<u16> {
        let segment = &self.segments[index as usize];
        (offset == 0 && len == segment.len && segment.skip == 0).then_some(segment.sum)
    }

    /// Copies the whole segment to the beginning of `out`, and perhaps more after it.
    #[inline]
    pub(crate) fn copy_whole(&self, index: u32, out: &mut [u8]) {
        let segment = &self.segments[index as usize];
        let len = segment.len as usize;
        if segment.skip == 0 && len <= FEW {
            copy(self.block(index), out, len);
        } else {
            self.copy_to(index, 0, &mut out[..len]);
        }
    }

    /// Copies `out.len()` bytes of a segment, from its byte `offset` on. The range lies in the segment.
    #[inline]
    pub(crate) fn copy_to(&self, index: u32, offset: usize, out: &mut [u8]) {
        let segment = &self.segments[index as usize];
        debug_assert!(offset + out.len() <= segment.len as usize);
        let offset = offset + segment.skip as usize;
        if let Some(bytes) = self.block(index).get(offset..offset + out.len()) {
            out.copy_from_slice(bytes);
        } else {
            self.copy_places(index, offset, out);
        }
    }

    fn copy_places(&self, mut place: u32, offset: usize, out: &mut [u8]) {
        for _ in 0..offset / BLOCK {
            place = self.segments[place as usize].more;
        }
        let mut within = offset % BLOCK;
        let mut out = out;
        while !out.is_empty() {
            let n = out.len().min(BLOCK - within);
            let (now, later) = out.split_at_mut(n);
            now.copy_from_slice(&self.block(place)[within..within + n]);
            out = later;
            place = self.segments[place as usize].more;
            within = 0;
        }
    }
}

impl core::ops::Index<u32> for Store {
    type Output = Segment;
    #[inline]
    fn index(&self, index: u32) -> &Segment {
        &self.segments[index as usize]
    }
}

impl core::ops::IndexMut<u32> for Store {
    #[inline]
    fn index_mut(&mut self, index: u32) -> &mut Segment {
        &mut self.segments[index as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(seq: u32) -> Segment {
        Segment::new(seq, 0, false, 0)
    }

    #[test]
    fn bytes_come_back_from_any_offset() {
        let mut store = Store::new(1 << 16);
        let payload: Vec<u8> = (0..1448u32).map(|i| (i * 7) as u8).collect();
        let a = store.insert(segment(5), &payload).unwrap();
        let b = store.insert(segment(5), &payload[..100]).unwrap();
        store.remove(b);
        for (offset, len) in [(0, 1448), (1, 300), (255, 2), (256, 256), (1447, 1), (700, 0)] {
            let mut out = vec![0; len];
            store.copy_to(a, offset, &mut out);
            assert_eq!(out, payload[offset..offset + len], "{offset}+{len}");
        }
    }

    #[test]
    fn trimmed_bytes_are_not_there() {
        let mut store = Store::new(1 << 16);
        let payload: Vec<u8> = (0..600u32).map(|i| i as u8).collect();
        let index = store.insert(segment(100), &payload).unwrap();
        store.trim_front(index, 300);
        assert_eq!((store[index].seq, store[index].len, store.held_bytes()), (400, 300, 300));
        let mut out = [0; 300];
        store.copy_to(index, 0, &mut out);
        assert_eq!(out, payload[300..]);
        store.remove(index);
        assert_eq!(store.held_bytes(), 0);
    }

    #[test]
    fn full_is_said_and_what_is_freed_is_used_again() {
        let mut store = Store::new(64 * BLOCK);
        let mut held = Vec::new();
        while let Ok(index) = store.insert(segment(0), &[1; 600]) {
            held.push(index);
        }
        assert_eq!(held.len(), 64 / 3);
        assert_eq!(store.held_bytes(), 600 * held.len() as u64);
        for index in held.drain(..) {
            store.remove(index);
        }
        assert_eq!((store.held_bytes(), store.places_held()), (0, 0));
        assert!(store.insert(segment(0), &[1; 64 * BLOCK]).is_ok());
        assert_eq!(store.insert(segment(0), &[1]), Err(Full));
    }
}
