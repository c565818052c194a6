//! The reader of a ring of captured packets, one for each worker.
//!
//! The program copies a packet into the ring as the kernel has it: receive offload may have put up to 64 KiB of segments together. The
//! reader copies it once more, into frames from which it can be transmitted, and cuts it to segments on the way.
//!
//! A reader that is about to sleep says so, and only then the program wakes it: a wake-up costs the serving path more than the copy. While packets
//! come often it does not say so, but looks by itself.

use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use aya::maps::{Array, MapData, RingBuf};
use replayer_common::maps::{RING_HEADER_LEN, RingHeader};
use replayer_common::packet::{parse_tcp, parse_udp};

use super::segmentation::{self, Pieces};
use crate::afxdp::{BATCH, Frame, Port};
use crate::bpf::Programs;

/// Bytes of all workers' rings together: half a second at 1 Gbit/s.
const BYTES: u32 = 64 << 20;
/// A ring has at least so many: some hundred packets of the largest kind.
const LEAST_BYTES: u32 = 8 << 20;

/// While packets come at least as often as this, the reader wakes by itself: a wake-up costs the serving path ten times what the copy does. Where
/// they come more rarely, six looks in vain cost this host more than that.
const OFTEN_NS: u64 = 300_000;
/// How often it does. A request is late by half of it on average.
const LOOK_NS: u64 = 50_000;

/// A ring's reading end.
pub struct Reader {
    ring: RingBuf<MapData>,
    /// Of all rings; its own place says whether it sleeps.
    sleeping: Array<MapData, u64>,
    shard: u32,
    /// When the program had the first of the packets that were received last, ns.
    first_captured_ns: u64,
    taken: u64,
}

impl Reader {
    /// Makes the ring of the worker, one of `workers`.
    pub(super) fn new(programs: &mut Programs, worker: u32, workers: u32) -> Result<Reader> {
        let bytes = (BYTES / workers.max(1).next_power_of_two()).max(LEAST_BYTES);
        let (ring, sleeping) = programs
            .add_ring(worker, bytes)
            .with_context(|| format!("make a ring of {} MiB for worker {worker}", bytes >> 20))?;
        Ok(Reader { ring, sleeping, shard: worker, first_captured_ns: 0, taken: 0 })
    }

    /// Appends packets to `out`, in frames of `port`, until there are [`BATCH`] new ones; how many.
    pub(super) fn receive(&mut self, port: &mut Port, out: &mut Vec<(Frame, usize)>) -> usize {
        let (before, room) = (out.len(), port.area());
        while out.len() - before < BATCH && has_room(port) {
            let Some(record) = self.ring.next() else { break };
            self.taken += 1;
            let Some((header, packet)) = split(&record) else { continue };
            if out.len() == before {
                self.first_captured_ns = header.captured_ns;
            }
            for_each_segment(header, packet, room, |len, write| {
                // There is one: see `has_room`.
                if let Some(mut frame) = port.allocate() {
                    write(&mut port.frame_mut(&mut frame)[..len]);
                    out.push((frame, len));
                }
            });
        }
        out.len() - before
    }

    /// Throws the next packet away; false when there is none.
    pub(super) fn skip(&mut self) -> bool {
        self.ring.next().is_some()
    }

    /// Packets that were taken out of it with [`Reader::receive`], as the program copied them: not yet cut to segments.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// When the program had the first of the packets that were received last, ns of CLOCK_MONOTONIC.
    pub(super) fn first_captured_ns(&self) -> u64 {
        self.first_captured_ns
    }

    /// Hands the packets of the next record to `take`, which gets when the program had it, ns of CLOCK_MONOTONIC, and the bytes of one
    /// after the other; false when there is none.
    pub fn next_packets(&mut self, scratch: &mut Vec<u8>, mut take: impl FnMut(u64, &[u8])) -> bool {
        let Some(record) = self.ring.next() else { return false };
        let Some((header, packet)) = split(&record) else { return true };
        for_each_segment(header, packet, usize::MAX, |len, write| {
            scratch.resize(len, 0);
            write(scratch);
            take(header.captured_ns, scratch);
        });
        true
    }

    /// To be called before waiting for [`Reader::as_fd`] to become readable, `idle_ns` after the last packet. `Some`: packets come so often that
    /// none of them is to wake it; it has to look again after so many ns.
    pub fn about_to_sleep(&mut self, idle_ns: u64) -> Option<u64> {
        if idle_ns < OFTEN_NS {
            return Some(LOOK_NS);
        }
        // Cannot fail: the place is there. If it did, the next timer would do instead of a wake-up.
        let _ = self.sleeping.set(self.shard, 1, 0);
        None
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// Whether there are frames for all that can come of one record, besides those that the engine needs for its own packets. If not, the
/// packets wait in the ring.
fn has_room(port: &mut Port) -> bool {
    let enough = |port: &Port| port.frames().free as usize >= port.reserve() as usize + segmentation::MOST;
    if !enough(port) {
        port.flush();
        port.reclaim();
    }
    enough(port)
}

/// A record's header and its packet. `None`: it is shorter than a header, which the program never writes.
fn split(record: &[u8]) -> Option<(RingHeader, &[u8])> {
    fn field<const N: usize>(record: &[u8], at: usize) -> Option<[u8; N]> {
        record.get(at..)?.first_chunk().copied()
    }
    let header = RingHeader {
        len: u32::from_ne_bytes(field(record, offset_of!(RingHeader, len))?),
        segment_len: u32::from_ne_bytes(field(record, offset_of!(RingHeader, segment_len))?),
        captured_ns: u64::from_ne_bytes(field(record, offset_of!(RingHeader, captured_ns))?),
    };
    let rest = record.get(RING_HEADER_LEN..)?;
    Some((header, &rest[..rest.len().min(header.len as usize)]))
}

/// Calls `each` for every segment of a packet with its length and a function that writes it, `room` bytes at most.
fn for_each_segment(
    header: RingHeader,
    packet: &[u8],
    room: usize,
    mut each: impl FnMut(usize, &dyn Fn(&mut [u8])),
) {
    if header.segment_len == 0 && packet.len() <= room {
        return each(packet.len(), &|to| to.copy_from_slice(packet));
    }
    if header.segment_len > 0
        && let Ok(datagram) = parse_udp(&packet)
        && usize::from(datagram.payload_offset) + header.segment_len as usize <= room
    {
        for piece in segmentation::datagrams(packet, &datagram, header.segment_len as usize) {
            each(piece.len(), &|to| piece.write(to));
        }
        return;
    }
    // The program has parsed it by the same function before; if it had not, the engine would count it.
    let Ok(segment) = parse_tcp(&packet) else {
        let len = packet.len().min(room);
        return each(len, &|to| to.copy_from_slice(&packet[..len]));
    };
    let headers = usize::from(segment.payload_offset);
    let size = if header.segment_len > 0 { header.segment_len as usize } else { segmentation::USUAL };
    for piece in Pieces::new(packet, &segment, size.min(room - headers.min(room))) {
        each(piece.len(), &|to| piece.write(to));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_the_packet_and_not_what_lies_behind_it() {
        let mut record = vec![0; RING_HEADER_LEN];
        record[..4].copy_from_slice(&5u32.to_ne_bytes());
        record[8..16].copy_from_slice(&77_000_000_000u64.to_ne_bytes());
        record.extend([1, 2, 3, 4, 5, 99, 99, 99]);
        let (header, packet) = split(&record).unwrap();
        assert_eq!((header.segment_len, header.captured_ns), (0, 77_000_000_000));
        let mut seen = Vec::new();
        for_each_segment(header, packet, 1500, |len, write| {
            let mut bytes = vec![0; len];
            write(&mut bytes);
            seen.push(bytes);
        });
        assert_eq!(seen, [[1, 2, 3, 4, 5]]);
        // Shorter than its header, or than it says.
        assert_eq!(split(&record[..3]), None);
        record[..4].copy_from_slice(&5000u32.to_ne_bytes());
        assert_eq!(split(&record).unwrap().1.len(), 8);
    }
}
