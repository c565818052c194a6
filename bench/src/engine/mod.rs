//! The session engine alone: one core, no kernel.
//!
//! What is timed is `on_captured` from the batch of captured frames to the last `transmit` call: lookup, order, store, rewrite, checksum.
//! Frames and records are written before the clock starts, so a batch's headers are in the cache as they are after a
//! copy-mode receive; everything else (tables, connections, sessions, timers, store) is wherever the last million packets left it.
//! Sessions are visited in random order, each once a round; a packet is acknowledged [`IN_FLIGHT`] packets after it was sent.
//! What the memory of a million sessions costs by itself is measured in the same run: the same cache lines, and nothing done with them.
//! Beside each figure stands `least`: the same frames in the same batches, parsed and their segments summed up, nothing else.

pub mod counted;
mod harness;

use crate::Options;
use crate::report::{Figure, Wanted};
use crate::traffic::{Load, SMALL};
use anyhow::Result;
use harness::{Bench, least};
use replayer_engine::counters::Counter;

/// What the subject measures.
pub const WHAT: &str = "the session engine alone, one core: captured batch to transmit call";

/// Packets sent before the first is acknowledged: a target 100 us away at 10 million packets per second.
pub const IN_FLIGHT: u32 = 1024;

/// What a session takes of memory that grows with the sessions: itself and what its turns need, its connection and how that began, a timer.
const SESSION_BYTES: usize = 128 + 32 + 64 + 12 + 12;

/// 10 GbE line rate at 64 bytes: 14.88 million packets per second.
const LINE_RATE_NS: f64 = 67.2;

const SMALL_TIMESTAMPS: Load = Load { payload: 6, timestamps: true, turns: false };
/// 1400 bytes on the wire, with timestamps.
const LARGE: Load = Load { payload: 1400 - 4 - 14 - 20 - 32, timestamps: true, turns: false };
/// Every packet is a request: the target answered the one before, and the client had read the answer.
const REQUESTS: Load = Load { payload: 6, timestamps: true, turns: true };

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let many = if options.quick { 20_000 } else { 1_000_000 };
    // First: memory that another measurement gave back would be used again and not seen.
    figures.push(harness::idle_bytes(many));
    for sessions in [1, 1_000, many] {
        for (what, load) in [("64-byte frames", SMALL), ("1400-byte frames", LARGE)] {
            figures.extend(data(sessions, what, load, options));
        }
    }
    let lines = harness::bare_lines(many);
    figures.push(Figure::median(
        format!("{many} sessions: a packet's three cache lines, and nothing else"),
        lines,
        "ns",
    ));
    figures.extend(data(many, "64 bytes and timestamps", SMALL_TIMESTAMPS, options));
    figures.extend(data(many, "requests and responses", REQUESTS, options));
    for copies in [10, 100] {
        figures.push(amplified(many, copies, options));
    }
    figures.extend(opening(many));
    figures.extend(counted::figures(options)?);
    Ok(figures)
}

/// Data packets and their acknowledgments.
fn data(sessions: u32, what: &str, load: Load, options: Options) -> Vec<Figure> {
    let mut bench = Bench::new(sessions, 1);
    bench.open(0..sessions, load);
    let packets = if options.quick { 20_000 } else { 1_000_000 };
    let rounds = (packets / sessions).clamp(2, 100_000);
    // A round that is not counted: the open sessions' first turn, and the caches as they will be.
    bench.data(sessions, load, 1);
    let before = bench.counters()[Counter::PacketsData];
    let samples: Vec<_> = (0..5).map(|_| bench.data(sessions, load, rounds.div_ceil(5))).collect();
    let sent = bench.counters()[Counter::PacketsData] - before;
    assert_eq!(sent, u64::from(sessions) * u64::from(rounds.div_ceil(5)) * 5, "every packet was taken");
    let floor = least(load, packets);
    let name = format!("{sessions} sessions, {what}");
    let data = Figure::median(format!("{name}: data packet"), samples.iter().map(|s| s.0).collect(), "ns")
        .beside("least", floor);
    let rate = Figure::new(format!("{name}: packets per core"), 1000.0 / data.value, "Mpps");
    let data =
        if load == SMALL && sessions >= 1_000_000 { data.wanted(Wanted::AtMost(LINE_RATE_NS)) } else { data };
    let of = |pick: fn(&(f64, f64, f64)) -> f64| samples.iter().map(pick).collect();
    let ack = Figure::median(format!("{name}: acknowledgment"), of(|s| s.1), "ns");
    let timers = Figure::median(format!("{name}: timers, per data packet"), of(|s| s.2), "ns");
    vec![data, rate, ack, timers]
}

/// Nanoseconds that a data packet and its acknowledgment take, 64-byte frames, with so many sessions; `ready` is called before the measurement.
pub(crate) fn data_packet_ns<T>(sessions: u32, ready: impl FnOnce() -> T) -> f64 {
    let mut bench = Bench::new(sessions, 1);
    bench.open(0..sessions, SMALL);
    bench.data(sessions, SMALL, 1);
    ready();
    let (data, acknowledgment, timers) = bench.data(sessions, SMALL, 2);
    data + acknowledgment + timers
}

/// One captured packet, many copies of it.
fn amplified(sessions: u32, copies: u32, options: Options) -> Figure {
    let connections = sessions / copies;
    let mut bench = Bench::new(connections, copies);
    bench.open(0..connections, SMALL);
    bench.data(connections, SMALL, 1);
    let rounds = if options.quick { 1 } else { 2 };
    let samples = (0..3).map(|_| bench.data(connections, SMALL, rounds).0 / f64::from(copies)).collect();
    let name = format!("{connections} connections x {copies}, 64-byte frames: a copy");
    Figure::median(name, samples, "ns").wanted(Wanted::AtMost(40.0))
}

/// New sessions: SYN captured, SYN sent, SYN-ACK taken, ACK sent.
fn opening(sessions: u32) -> Vec<Figure> {
    // What memory costs by itself that is used for the first time. Under a hypervisor it comes from there, and the process gets it again
    // afterwards: the engine's sessions are opened in memory that is new to the engine, but not to the machine.
    let touch = harness::first_touch(sessions, SESSION_BYTES);
    let mut bench = Bench::new(sessions, 1);
    let fresh = bench.open(0..sessions, SMALL_TIMESTAMPS);
    // A quarter of them ends and opens again: memory that was used before.
    let part = sessions / 4;
    let closing = bench.close(0..part);
    let again = bench.open(0..part, SMALL_TIMESTAMPS);
    let rate = |ns: f64| 1e9 / ns;
    vec![
        Figure::new(
            format!("a session's {SESSION_BYTES} bytes written to memory never used before, nothing else"),
            touch,
            "ns",
        ),
        Figure::new(format!("{sessions} new sessions, memory new to the process"), rate(fresh), "per second")
            .wanted(Wanted::AtLeast(1e6)),
        Figure::new(format!("{part} new sessions beside {}", sessions - part), rate(again), "per second")
            .wanted(Wanted::AtLeast(1e6)),
        Figure::new(
            "closing a session: FIN captured and sent, FIN of the target acknowledged",
            closing,
            "ns",
        ),
    ]
}
