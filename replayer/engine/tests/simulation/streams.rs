//! What clients do, and what of it must reach the target: the truth that a run is compared with. It is known from how the traffic
//! was made, or from an independent reassembly of what was captured; nothing here asks the engine.

use crate::network::{Path, Random};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::flags;
use std::ops::Range;

/// Bytes that the server sends once it has read so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Client bytes read; 0: it speaks first.
    pub after: usize,
    pub bytes: usize,
}

/// Client data that follows response bytes which the client had read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Where it begins in the client's stream.
    pub offset: usize,
    /// Response bytes that the client had read by then.
    pub read: u32,
}

/// A packet as the online server's wire shows it.
#[derive(Clone, Debug)]
pub struct Packet {
    pub at: u64,
    /// Ethernet first.
    pub bytes: Vec<u8>,
}

/// One connection of a client.
#[derive(Clone, Debug)]
pub struct Stream {
    pub client: Endpoint,
    pub server: Endpoint,
    pub isn: u32,
    /// What the client sent; `None`: bytes of a capture that nobody has.
    pub bytes: Vec<Option<u8>>,
    pub answers: Vec<Answer>,
    /// What the server sends by itself: bytes every so many ms, so often.
    pub pushes: Option<(u64, usize, u32)>,
    pub turns: Vec<Turn>,
    /// What the capture gives to the engine, in order.
    pub packets: Vec<Packet>,
    /// How the client ends.
    pub end: Ending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Fin,
    Reset,
    /// It says nothing more.
    Silence,
}

/// A segment as found in captured bytes, by a parser that is not the engine's.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub source: Endpoint,
    pub destination: Endpoint,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: (usize, usize),
}

/// Reads an Ethernet frame; `None`: not a whole TCP segment.
pub fn read(frame: &[u8]) -> Option<Seen> {
    let parsed = SlicedPacket::from_ethernet(frame).ok()?;
    let (source, destination) = match parsed.net.as_ref()? {
        NetSlice::Ipv4(ip) => (from_v4(ip.header().source()), from_v4(ip.header().destination())),
        NetSlice::Ipv6(ip) => (ip.header().source(), ip.header().destination()),
        NetSlice::Arp(_) => return None,
    };
    let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { return None };
    let start = tcp.payload().as_ptr() as usize - frame.as_ptr() as usize;
    Some(Seen {
        source: Endpoint { ip: source, port: tcp.source_port() },
        destination: Endpoint { ip: destination, port: tcp.destination_port() },
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        flags: tcp.slice()[13] & 0x3f,
        payload: (start, start + tcp.payload().len()),
    })
}

/// What of a stream must arrive at a target that behaves, by rules 7 and 8: pieces that begin with the stream or with a turn and have no
/// hole.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Must arrive.
    pub pieces: Vec<Range<usize>>,
    /// One session carries it all: the SYN was captured, and every byte in time.
    pub sound: bool,
    pub syn_captured: bool,
}

impl Stream {
    pub fn offset(&self, seq: u32) -> i64 {
        i64::from(seq.wrapping_sub(self.isn.wrapping_add(1)) as i32)
    }

    /// Whether a session may begin there: at the start of the stream, or of a turn.
    pub fn is_beginning(&self, offset: usize) -> bool {
        offset == 0 || self.turns.iter().any(|turn| turn.offset == offset)
    }

    /// Whether it begins with a TLS ClientHello (RFC 8446 section 4.1.2 in a record of section 5.1).
    pub fn is_encrypted(&self) -> bool {
        matches!(self.bytes[..], [Some(22), Some(3), _, _, _, Some(1), ..])
    }

    /// Whether each turn has one answer.
    pub fn answers_one_by_one(&self) -> bool {
        let in_turn = |from: usize, upto: usize| {
            self.answers.iter().filter(|answer| answer.after > from && answer.after <= upto).count()
        };
        let mut from = 0;
        self.pushes.is_none()
            && self
                .turns
                .iter()
                .all(|turn| in_turn(core::mem::replace(&mut from, turn.offset), turn.offset) <= 1)
    }

    /// Works through the captured packets. `gap_timeout`: how long a hole may stay open, ns.
    pub fn expected(&self, gap_timeout: u64) -> Expected {
        // A hole that is filled about when its time is over may be seen either way: nothing is promised then.
        const MARGIN: u64 = 5_000_000;
        let mut expected = Expected::default();
        let mut begun_with_syn = false;
        // What is followed: where it began, and the next byte. `None`: it is watched.
        let mut following: Option<(usize, usize)> = None;
        // Bytes behind a hole, and when the first of them came.
        let mut behind: Vec<Range<usize>> = Vec::new();
        let mut waits_since = 0;
        // The end of the last data seen, the highest ACK on data, and until when the engine may still be waiting for a hole.
        let mut last_end: Option<usize> = None;
        let mut highest_ack: Option<u32> = None;
        let mut closed_until = 0;
        let mut end_at = None;
        for packet in &self.packets {
            let Some(segment) = read(&packet.bytes) else { continue };
            let len = segment.payload.1 - segment.payload.0;
            if segment.flags & flags::SYN != 0 {
                if segment.seq == self.isn && !begun_with_syn && last_end.is_none() {
                    begun_with_syn = true;
                    following = Some((0, 0));
                }
                if len == 0 {
                    continue;
                }
            }
            let data_seq = segment.seq.wrapping_add(u32::from(segment.flags & flags::SYN != 0));
            let Ok(start) = usize::try_from(self.offset(data_seq)) else { continue };
            let end = start + len;
            if segment.flags & flags::FIN != 0 {
                end_at = Some(end);
            }
            if let Some((_, next)) = following
                && !behind.is_empty()
                && packet.at + MARGIN >= waits_since + gap_timeout
            {
                // Given up.
                expected.pieces.push(following.unwrap().0..next);
                following = None;
                closed_until = waits_since + gap_timeout + MARGIN;
                last_end = behind.iter().map(|range| range.end).max();
                behind.clear();
            }
            if segment.flags & flags::RST != 0 {
                // What it overtook is not replayed.
                break;
            }
            if len == 0 {
                if segment.flags & flags::FIN != 0
                    && let Some((_, next)) = following
                    && next < end
                    && behind.is_empty()
                {
                    waits_since = packet.at;
                    behind.push(end..end);
                }
                continue;
            }
            let newer = highest_ack.is_none_or(|highest| (segment.ack.wrapping_sub(highest) as i32) > 0);
            let fresh_turn = newer && highest_ack.is_some();
            if newer {
                highest_ack = Some(segment.ack);
            }
            if let Some((begin, next)) = following {
                if start <= next {
                    let mut next = next.max(end);
                    let before = behind.len();
                    while let Some(i) = behind.iter().position(|range| range.start <= next) {
                        next = next.max(behind.remove(i).end);
                    }
                    if behind.len() != before {
                        waits_since = packet.at;
                    }
                    following = Some((begin, next));
                } else {
                    if behind.is_empty() {
                        waits_since = packet.at;
                    }
                    behind.push(start..end);
                }
                continue;
            }
            // Joined, for certain, where the data goes on without a hole and acknowledges more.
            if packet.at > closed_until && fresh_turn && last_end == Some(start) {
                following = Some((start, end));
                behind.clear();
            }
            last_end = Some(last_end.map_or(end, |last| last.max(end)));
        }
        if let Some((begin, next)) = following {
            expected.pieces.push(begin..next);
        }
        expected.syn_captured = begun_with_syn;
        expected.sound = begun_with_syn
            && expected.pieces.len() == 1
            && expected.pieces[0] == (0..self.bytes.len())
            && behind.is_empty()
            && (self.end != Ending::Fin || end_at == Some(self.bytes.len()));
        expected
    }
}

/// How the packets of a client reach the capture.
#[derive(Clone, Copy, Debug)]
pub struct CapturePath {
    /// The network before the capture: what it loses, the client sends again.
    pub network: Path,
    /// What the capture itself does not see; the server does.
    pub missed_per_mille: u32,
}

/// Puts packets on the wire as the network before the capture makes them arrive.
pub struct Arrivals<'a> {
    path: CapturePath,
    random: &'a mut Random,
    packets: Vec<Packet>,
}

impl<'a> Arrivals<'a> {
    pub fn new(path: CapturePath, random: &'a mut Random) -> Arrivals<'a> {
        Arrivals { path, random, packets: Vec::new() }
    }

    /// The client sends it, again and again until it arrives; when it first does.
    pub fn send(&mut self, mut at: u64, first_timeout: u64, bytes: &[u8]) -> u64 {
        let mut timeout = first_timeout;
        loop {
            let mut first = u64::MAX;
            for arrival in self.path.network.arrivals(at, self.random) {
                first = first.min(arrival);
                if !self.random.chance(self.path.missed_per_mille) {
                    self.packets.push(Packet { at: arrival, bytes: bytes.to_vec() });
                }
            }
            if first != u64::MAX {
                return first;
            }
            at += timeout;
            timeout = (2 * timeout).min(10_000_000_000);
        }
    }

    /// In the order of arrival.
    pub fn finish(mut self) -> Vec<Packet> {
        self.packets.sort_by_key(|packet| packet.at);
        self.packets
    }
}
