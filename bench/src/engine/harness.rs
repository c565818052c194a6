//! An engine in plain memory, clients that send to it and a target that answers.

use super::IN_FLIGHT;
use crate::report::{Figure, Wanted};
use crate::traffic::{self, CLIENT_ISN, Load, SERVER, TARGET, TARGET_ISN, client, response, write_segment};
use replayer::growth::Growth;
use replayer_common::addr::Endpoint;
use replayer_common::packet::{flags, parse_tcp};
use replayer_common::response::ResponseHeader;
use replayer_engine::counters::Counters;
use replayer_engine::{BATCH, Engine, Output};
use std::collections::VecDeque;
use std::hint::black_box;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const FRAME_ROOM: usize = 2048;
/// Between two batches: what they take at 14.88 million packets per second.
const BATCH_NS: u64 = 4_300;

type Frame = Box<[u8; FRAME_ROOM]>;

/// Frames in plain memory; what is sent is looked at by nobody.
struct Memory {
    free: Vec<Frame>,
    sent: u64,
    identities: Vec<Endpoint>,
}

impl Output for Memory {
    type Frame = Frame;

    #[inline]
    fn allocate(&mut self) -> Option<Frame> {
        self.free.pop()
    }
    #[inline]
    fn bytes<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        &mut frame[..]
    }
    #[inline]
    fn release(&mut self, frame: Frame) {
        self.free.push(frame);
    }
    #[inline]
    fn transmit(&mut self, frame: Frame, len: usize) -> bool {
        black_box(frame[len - 1]);
        self.sent += 1;
        self.free.push(frame);
        true
    }
    fn register(&mut self, _: u16, identity: Endpoint) {
        self.identities.push(identity);
    }
    fn unregister(&mut self, _: u16, _: Endpoint) {}
}

/// A permutation without a table: every connection once a round, in an order that no prefetcher guesses.
fn shuffled(i: u32, count: u32) -> u32 {
    let mut x = i;
    loop {
        let bits = count.next_power_of_two().trailing_zeros().max(1);
        let mask = (1u64 << bits) as u32 - 1;
        x = x.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15) & mask;
        x ^= x >> (bits / 2).max(1);
        x = x.wrapping_mul(0x85eb_ca6b) & mask;
        if x < count {
            return x;
        }
    }
}

/// Time since the first call, ns.
fn wall_time() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

pub(super) struct Bench {
    /// What times are taken with, ns.
    pub(super) clock: fn() -> u64,
    engine: Engine,
    memory: Memory,
    batch: Vec<(Frame, usize)>,
    now: u64,
    copies: u32,
    /// The identities of connection `i`: from `i * copies` on.
    identities: Vec<Endpoint>,
    /// By connection: where its client's stream and the target's are, from their ISNs.
    streams: Vec<(u32, u32)>,
    pending: VecDeque<ResponseHeader>,
    records: Vec<ResponseHeader>,
}

impl Bench {
    /// Room for `connections`, each copied `copies` times.
    pub(super) fn new(connections: u32, copies: u32) -> Bench {
        let sessions = (connections * copies) as usize;
        let frames = 2 * BATCH + copies as usize;
        let memory = Memory {
            free: (0..frames).map(|_| Box::new([0; FRAME_ROOM])).collect(),
            sent: 0,
            identities: Vec::with_capacity(sessions),
        };
        Bench {
            clock: wall_time,
            engine: traffic::engine(connections, copies, FRAME_ROOM, 0),
            memory,
            batch: Vec::with_capacity(BATCH),
            now: 1_000_000_000,
            copies,
            identities: vec![SERVER; sessions],
            streams: vec![(0, 0); connections as usize],
            pending: VecDeque::with_capacity((IN_FLIGHT as usize + BATCH) * copies as usize),
            records: Vec::with_capacity(BATCH * copies as usize),
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        self.engine.counters()
    }

    fn capture(&mut self, i: u32, seq: u32, ack: u32, control: u8, load: Load, payload: usize) {
        let Some(mut frame) = self.memory.free.pop() else { panic!("the engine keeps no frames") };
        let len = write_segment(&mut frame[..], &client(i), seq, ack, control, load, payload);
        self.batch.push((frame, len));
    }

    /// What is timed of a captured batch. Not inlined: instruction counts are taken of this function.
    #[inline(never)]
    pub(super) fn captured(&mut self) -> u64 {
        let start = (self.clock)();
        self.engine.on_captured(self.now, &mut self.batch, &mut self.memory);
        (self.clock)() - start
    }

    /// What is timed of records.
    #[inline(never)]
    pub(super) fn responses(&mut self) -> u64 {
        let start = (self.clock)();
        self.engine.on_responses(self.now, &self.records, &mut self.memory);
        (self.clock)() - start
    }

    #[inline(never)]
    pub(super) fn timers(&mut self) -> u64 {
        let start = (self.clock)();
        self.engine.on_timers(self.now, &mut self.memory);
        (self.clock)() - start
    }

    /// Opens sessions at a pace, so many a second; how long each turn took, ns, the shortest first. `growth`: what makes memory ready meanwhile.
    pub(super) fn open_paced(&mut self, connections: u32, rate: u32, mut growth: Option<Growth>) -> Vec<u64> {
        let begin = Instant::now();
        let mut looked = 0;
        let mut turns = Vec::with_capacity(connections as usize / BATCH + 1);
        for first in (0..connections).step_by(BATCH) {
            let due_ns = u64::from(first) * 1_000_000_000 / u64::from(rate);
            let early = Duration::from_nanos(due_ns).saturating_sub(begin.elapsed());
            if due_ns - looked > 100_000_000
                && let Some(growth) = &mut growth
            {
                growth.look(&self.engine);
                looked = due_ns;
            }
            std::thread::sleep(early);
            let start = Instant::now();
            self.open(first..(first + BATCH as u32).min(connections), crate::traffic::SMALL);
            turns.push(start.elapsed().as_nanos() as u64);
        }
        turns.sort_unstable();
        turns
    }

    /// Opens sessions; ns for each connection.
    pub(super) fn open(&mut self, connections: Range<u32>, load: Load) -> f64 {
        let mut spent = 0;
        let count = connections.len();
        for first in connections.clone().step_by(BATCH) {
            let last = (first + BATCH as u32).min(connections.end);
            for i in first..last {
                self.capture(i, CLIENT_ISN, 0, flags::SYN, load, 0);
                self.streams[i as usize] = (0, 0);
            }
            self.memory.identities.clear();
            spent += self.captured();
            self.records.clear();
            for (at, identity) in self.memory.identities.iter().enumerate() {
                self.identities[first as usize * self.copies as usize + at] = *identity;
                self.records.push(response(identity, flags::SYN | flags::ACK, TARGET_ISN, CLIENT_ISN + 1, 0));
            }
            spent += self.responses();
            self.now += BATCH_NS;
            spent += self.timers();
        }
        spent as f64 / count as f64
    }

    /// The client closes, then the target; ns for each connection.
    pub(super) fn close(&mut self, connections: Range<u32>) -> f64 {
        let mut spent = 0;
        let load = Load { payload: 0, timestamps: true, turns: false };
        for first in connections.clone().step_by(BATCH) {
            let last = (first + BATCH as u32).min(connections.end);
            self.records.clear();
            for i in first..last {
                let (seq, ack) = self.streams[i as usize];
                let (seq, ack) = (CLIENT_ISN + 1 + seq, TARGET_ISN + 1 + ack);
                self.capture(i, seq, ack, flags::FIN | flags::ACK, load, 0);
                let identity = &self.identities[(i * self.copies) as usize];
                self.records.push(response(identity, flags::FIN | flags::ACK, ack, seq + 1, 0));
            }
            spent += self.captured();
            spent += self.responses();
            self.now += BATCH_NS;
            spent += self.timers();
        }
        spent as f64 / connections.len() as f64
    }

    /// `rounds` data packets of each connection: ns for a packet captured and sent, for the acknowledgment of it (of all copies
    /// together), and of timers.
    pub(super) fn data(&mut self, connections: u32, load: Load, rounds: u32) -> (f64, f64, f64) {
        let (mut sending, mut acknowledging, mut timers) = (0, 0, 0);
        let payload = load.payload as u32;
        let in_flight = IN_FLIGHT.min(connections / 2) as usize;
        let total = u64::from(connections) * u64::from(rounds);
        let mut at = 0;
        while at < total {
            let mut captured = 0;
            for k in at..(at + BATCH as u64).min(total) {
                let i = shuffled((k % u64::from(connections)) as u32, connections);
                let (seq, answered) = self.streams[i as usize];
                let ack = TARGET_ISN + 1 + answered;
                self.capture(i, CLIENT_ISN + 1 + seq, ack, flags::ACK | flags::PSH, load, load.payload);
                let answer = u32::from(load.turns);
                self.streams[i as usize] = (seq + payload, answered + answer);
                let push = if load.turns { flags::PSH } else { 0 };
                for copy in (0..self.copies).rev() {
                    let identity = &self.identities[(i * self.copies + copy) as usize];
                    let record =
                        response(identity, flags::ACK | push, ack, CLIENT_ISN + 1 + seq + payload, answer);
                    self.pending.push_back(record);
                }
                captured += 1;
                if connections == 1 {
                    // The next request waits for the response.
                    break;
                }
            }
            at += captured;
            sending += self.captured();
            let due = self.pending.len().saturating_sub(if at < total {
                in_flight * self.copies as usize
            } else {
                0
            });
            for records in 0..due.div_ceil(BATCH) {
                let count = (due - records * BATCH).min(BATCH);
                self.records.clear();
                self.records.extend(self.pending.drain(..count));
                acknowledging += self.responses();
            }
            self.now += BATCH_NS;
            timers += self.timers();
        }
        let per = |ns: u64| ns as f64 / total as f64;
        (per(sending), per(acknowledging), per(timers))
    }
}

/// ns for the least that has to be done: the same frames in the same batches, parsed, and their segments summed up.
pub(super) fn least(load: Load, packets: u32) -> f64 {
    let mut frames: Vec<Frame> = (0..BATCH).map(|_| Box::new([0; FRAME_ROOM])).collect();
    let mut spent = 0;
    for first in (0..packets).step_by(BATCH) {
        let mut len = 0;
        for (i, frame) in frames.iter_mut().enumerate() {
            let client = client(first + i as u32);
            len = write_segment(&mut frame[..], &client, 1001, 5001, flags::ACK, load, load.payload);
        }
        let start = Instant::now();
        for frame in &frames {
            let bytes = &frame[..len];
            let segment = parse_tcp(&bytes);
            let (words, _) = bytes[34..].as_chunks::<4>();
            let sum = words.iter().map(|&word| u64::from(u32::from_ne_bytes(word))).sum::<u64>();
            black_box((segment.is_ok(), sum));
        }
        spent += start.elapsed().as_nanos() as u64;
    }
    spent as f64 / f64::from(packets.next_multiple_of(BATCH as u32))
}

/// ns a packet for the memory alone: a slot of a hash table, a cache line of a connection and one of a session, of as many as there are
/// sessions and in the engine's order, read ahead in batches as the engine does it, then changed. One sample a round.
pub(super) fn bare_lines(sessions: u32) -> Vec<f64> {
    let count = sessions as usize;
    let mut slots = vec![1u64; 2 * count.next_power_of_two()];
    let mut of_connections = vec![[1u64; 64 / 8]; count];
    let mut of_sessions = vec![[1u64; 128 / 8]; count];
    let mask = slots.len() - 1;
    let slot = |i: usize| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 & mask;
    let mut places = [0usize; BATCH];
    let mut round = || {
        let mut spent = 0;
        for first in (0..sessions).step_by(BATCH) {
            let len = BATCH.min((sessions - first) as usize);
            let places = &mut places[..len];
            for (at, place) in places.iter_mut().enumerate() {
                *place = shuffled(first + at as u32, sessions) as usize;
            }
            let start = Instant::now();
            places.iter().for_each(|&i| replayer_prefetch::line(&slots[slot(i)]));
            places.iter().for_each(|&i| replayer_prefetch::line(&of_connections[i][0]));
            places.iter().for_each(|&i| replayer_prefetch::line(&of_sessions[i][0]));
            for &i in places.iter() {
                slots[slot(i)] += 1;
                of_connections[i][0] += 1;
                of_sessions[i][0] += 1;
            }
            spent += start.elapsed().as_nanos() as u64;
        }
        spent as f64 / f64::from(sessions)
    };
    round();
    (0..5).map(|_| round()).collect()
}

/// ns a session for writing `bytes` a session to memory that was never used, for that many sessions.
pub(super) fn first_touch(sessions: u32, bytes: usize) -> f64 {
    let mut memory: Vec<u64> = Vec::with_capacity(sessions as usize * bytes / 8);
    let start = Instant::now();
    memory.resize(memory.capacity(), 1);
    let spent = start.elapsed().as_nanos() as f64;
    black_box(&memory);
    spent / f64::from(sessions)
}

/// Resident memory per session, after each has sent a packet that was acknowledged. The first request reserves what all of them
/// need in flight, which is held data and not an idle session's: it is in both readings.
pub(super) fn idle_bytes(sessions: u32) -> Figure {
    let mut bench = Bench::new(sessions, 1);
    let load = Load { payload: 6, timestamps: true, turns: true };
    let warm = sessions / 100;
    bench.open(0..warm, load);
    bench.data(warm, load, 1);
    // Written by the harness itself: not the engine's.
    bench.identities.fill(TARGET);
    bench.streams.fill((1, 1));
    let before = resident();
    bench.open(warm..sessions, load);
    bench.data(sessions, load, 1);
    let bytes = (resident() - before) as f64 / f64::from(sessions - warm);
    Figure::new(format!("an idle session, of {sessions}: resident memory"), bytes, "bytes")
        .wanted(Wanted::AtMost(256.0))
}

/// This process's resident memory, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}
