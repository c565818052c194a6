//! Benchmarks of the session engine alone: no kernel, one core. Each figure stands beside what the same run measured for the least
//! that any replayer has to do with a packet: parse its headers and sum up its bytes for a checksum.
//!
//! `cargo run --release -p bench`

use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::{flags, parse_tcp};
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::config::{Config, Limits, Service};
use replayer_engine::counters::Counter;
use replayer_engine::{BATCH, Engine, Link, Output};
use std::hint::black_box;
use std::time::Instant;

const SERVER: Endpoint = Endpoint { ip: v4(10, 0, 0, 1), port: 80 };
const TARGET: Endpoint = Endpoint { ip: v4(10, 0, 0, 2), port: 80 };
const FRAME_ROOM: usize = 1792;

const fn v4(a: u8, b: u8, c: u8, d: u8) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Frames in plain memory; what is sent is looked at by nobody.
#[derive(Default)]
struct Memory {
    #[expect(clippy::vec_box, reason = "a frame is a token: moving it must not move its bytes")]
    free: Vec<Box<[u8; FRAME_ROOM]>>,
    sent: u64,
}

impl Output for Memory {
    type Frame = Box<[u8; FRAME_ROOM]>;

    fn allocate(&mut self) -> Option<Self::Frame> {
        Some(self.free.pop().unwrap_or_else(|| Box::new([0; FRAME_ROOM])))
    }
    fn bytes<'a>(&'a mut self, frame: &'a mut Self::Frame) -> &'a mut [u8] {
        &mut frame[..]
    }
    fn release(&mut self, frame: Self::Frame) {
        self.free.push(frame);
    }
    fn transmit(&mut self, frame: Self::Frame, len: usize) -> bool {
        black_box(frame[len - 1]);
        self.sent += 1;
        self.free.push(frame);
        true
    }
    fn register(&mut self, _: u16, _: Endpoint) {}
    fn unregister(&mut self, _: u16, _: Endpoint) {}
}

/// The client of session `i`.
fn client(i: u32) -> Endpoint {
    let [a, b, _, _] = (i / 60_000).to_be_bytes();
    let [_, _, c, d] = (i / 60_000).to_be_bytes();
    Endpoint { ip: from_v4([11, a | b, c, d]), port: 1024 + (i % 60_000) as u16 }
}

/// An Ethernet frame with a client's segment: timestamps, `payload` bytes.
fn write_segment(
    frame: &mut [u8],
    client: &Endpoint,
    seq: u32,
    ack: u32,
    control: u8,
    payload: usize,
) -> usize {
    let total = 20 + 32 + payload;
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    frame[16..18].copy_from_slice(&(total as u16).to_be_bytes());
    frame[26..30].copy_from_slice(&client.ip[12..]);
    frame[30..34].copy_from_slice(&SERVER.ip[12..]);
    frame[34..36].copy_from_slice(&client.port.to_be_bytes());
    frame[36..38].copy_from_slice(&SERVER.port.to_be_bytes());
    frame[38..42].copy_from_slice(&seq.to_be_bytes());
    frame[42..46].copy_from_slice(&ack.to_be_bytes());
    frame[46..54].copy_from_slice(&[0x80, control, 0xff, 0xff, 0, 0, 0, 0]);
    frame[54..66].copy_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0]);
    14 + total
}

fn response(client: &Endpoint, control: u8, seq: u32, ack: u32, payload_len: u32) -> ResponseHeader {
    ResponseHeader {
        flags: control,
        port: client.port,
        addr: client.ip,
        window: 0xffff,
        seq,
        ack,
        payload_len,
        present: present::TIMESTAMPS | present::MSS | present::WINDOW_SCALE,
        mss: 1460,
        window_scale: 7,
        ..ResponseHeader::default()
    }
}

/// A permutation without a table: every session once a round, in an order that no prefetcher guesses.
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

struct Bench {
    engine: Engine,
    memory: Memory,
    batch: Vec<(Box<[u8; FRAME_ROOM]>, usize)>,
    now: u64,
}

impl Bench {
    fn new(sessions: u32) -> Bench {
        let mut config = Config::new(vec![Service { online: SERVER, target: TARGET }]);
        config.limits = Limits {
            sessions: sessions as usize + 1,
            connections: sessions as usize + 1,
            held_bytes: (sessions as usize * 2048).max(64 << 20),
            ..Limits::default()
        };
        config.frame_room = FRAME_ROOM as u16;
        let mut engine = Engine::new(config, 0);
        let link = Link { source_mac: [2; 6], destination_mac: [4; 6], tags: [None; 2], mtu: 1500 };
        engine.set_link(0, Some(link));
        Bench { engine, memory: Memory::default(), batch: Vec::with_capacity(BATCH), now: 1 }
    }

    fn capture(&mut self, client: &Endpoint, seq: u32, ack: u32, control: u8, payload: usize) {
        let mut frame = self.memory.free.pop().unwrap_or_else(|| Box::new([0; FRAME_ROOM]));
        let len = write_segment(&mut frame[..], client, seq, ack, control, payload);
        self.batch.push((frame, len));
    }

    fn run(&mut self) {
        self.now += 10_000;
        self.engine.on_captured(self.now, &mut self.batch, &mut self.memory);
    }

    fn respond(&mut self, records: &[ResponseHeader]) {
        self.now += 10_000;
        self.engine.on_responses(self.now, records, &mut self.memory);
    }

    /// Opens `sessions` sessions; ns for each: SYN captured, SYN sent, SYN-ACK, ACK sent.
    fn open(&mut self, sessions: u32) -> f64 {
        let mut records = Vec::with_capacity(BATCH);
        let mut spent = 0.0;
        for first in (0..sessions).step_by(BATCH) {
            let last = (first + BATCH as u32).min(sessions);
            for i in first..last {
                self.capture(&client(i), 1000, 0, flags::SYN, 0);
                records.push(response(&client(i), flags::SYN | flags::ACK, 5000, 1001, 0));
            }
            let start = Instant::now();
            self.run();
            self.respond(&records);
            spent += start.elapsed().as_nanos() as f64;
            records.clear();
        }
        spent / f64::from(sessions)
    }

    /// ns for a data packet (captured, sent) and ns for the acknowledgment of it, sessions in random order.
    fn data(&mut self, sessions: u32, payload: usize, rounds: u32) -> (f64, f64) {
        let (mut sending, mut acknowledging) = (0.0, 0.0);
        let mut records = Vec::with_capacity(BATCH);
        for round in 0..rounds {
            let seq = 1001 + round * payload as u32;
            for first in (0..sessions).step_by(BATCH) {
                let last = (first + BATCH as u32).min(sessions);
                for i in first..last {
                    let client = client(shuffled(i, sessions));
                    self.capture(&client, seq, 5001, flags::ACK, payload);
                    records.push(response(&client, flags::ACK, 5001, seq + payload as u32, 0));
                }
                let start = Instant::now();
                self.run();
                let middle = Instant::now();
                self.respond(&records);
                sending += (middle - start).as_nanos() as f64;
                acknowledging += middle.elapsed().as_nanos() as f64;
                records.clear();
            }
        }
        let packets = f64::from(sessions) * f64::from(rounds);
        (sending / packets, acknowledging / packets)
    }
}

/// ns for the least that has to be done: the same frames in the same batches, parsed, and their segment summed up.
fn least(payload: usize, packets: u32) -> f64 {
    let mut frames: Vec<Box<[u8; FRAME_ROOM]>> = (0..BATCH).map(|_| Box::new([0; FRAME_ROOM])).collect();
    let mut spent = 0.0;
    for first in (0..packets).step_by(BATCH) {
        let mut len = 0;
        for (i, frame) in frames.iter_mut().enumerate() {
            len = write_segment(&mut frame[..], &client(first + i as u32), 1001, 5001, flags::ACK, payload);
        }
        let start = Instant::now();
        for frame in &frames {
            let bytes = &frame[..len];
            let segment = parse_tcp(&bytes);
            let (words, _) = bytes[34..].as_chunks::<4>();
            let sum = words.iter().map(|&word| u64::from(u32::from_ne_bytes(word))).sum::<u64>();
            black_box((segment.is_ok(), sum));
        }
        spent += start.elapsed().as_nanos() as f64;
    }
    spent / f64::from(packets)
}

fn main() {
    println!(
        "session engine alone, one core; a packet is captured, looked up, stored, rewritten, summed up and sent"
    );
    println!(
        "{:>10} {:>8} {:>12} {:>12} {:>12} {:>8} {:>10}",
        "sessions", "payload", "data ns", "ack ns", "least ns", "ratio", "open ns"
    );
    for sessions in [1u32, 1_000, 1_000_000] {
        for payload in [10usize, 1_400] {
            // A million sessions with a full segment each would need 2 GiB of frames and store: enough for a figure is less.
            let sessions = if payload > 1000 { sessions.min(100_000) } else { sessions };
            let mut bench = Bench::new(sessions);
            let open = bench.open(sessions);
            let rounds = (400_000 / sessions).max(2);
            let (data, ack) = bench.data(sessions, payload, rounds);
            let least = least(payload, 400_000);
            let sent = bench.engine.counters()[Counter::PacketsData];
            assert_eq!(sent, u64::from(sessions) * u64::from(rounds), "every packet was taken");
            println!(
                "{sessions:>10} {payload:>8} {data:>12.1} {ack:>12.1} {least:>12.1} {:>8.1} {open:>10.1}",
                data / least
            );
        }
    }
}
