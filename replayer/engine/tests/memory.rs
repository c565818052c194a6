//! What the engine reserves at its start for its limits is not touched before traffic needs it, and no traffic makes it take more.

mod lab;

use lab::{MS, ONLINE, Segment, TARGET, Wire, endpoint, link};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::config::{Config, Service};
use replayer_engine::counters::Counter;
use replayer_engine::{BATCH, Engine};

/// Bytes that a live, idle connection and its session may take, with what is needed to wake them.
const MOST_PER_SESSION: u64 = 256;
/// Bytes a session of the hash tables that find them, which have their size from the start; the kernel gives their pages at the first use.
const TABLES_PER_SESSION: u64 = 34;
/// After so many sessions nearly every page of the tables has been used.
const WARM: u32 = 10 * 4096;

/// This process's resident memory, KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn config() -> Config {
    Config::new(vec![Service { online: endpoint(ONLINE), target: endpoint(TARGET) }])
}

/// Of the first engine of a process: an allocator may give another one memory that was used before.
fn a_million_sessions_are_reserved_without_touching_their_memory() {
    let before = resident();
    let engine = Engine::new(config(), 0);
    let touched = resident() - before;
    assert_eq!(engine.gauges().sessions_live, 0);
    assert!(touched < 4096, "{touched} KiB touched at the start");
}

/// The client with a number: one of 64 ports of an address.
fn client(number: u32) -> Endpoint {
    let [_, a, b, c] = (number / 64).to_be_bytes();
    Endpoint { ip: from_v4([10 + a, a, b, c]), port: 2000 + (number % 64) as u16 }
}

fn segment(number: u32, flags: u8, seq: u32, payload: usize) -> Segment {
    Segment {
        source: client(number),
        destination: endpoint(ONLINE),
        seq: number.wrapping_mul(7919).wrapping_add(seq),
        ack: if flags & flags::ACK == 0 { 0 } else { 5001 },
        flags,
        window: 500,
        mss: (flags & flags::SYN != 0).then_some(1460),
        window_scale: None,
        sack_permitted: false,
        timestamps: None,
        payload: vec![7; payload],
    }
}

fn record(number: u32, flags: u8, seq: u32, acked: u32, payload_len: u32) -> ResponseHeader {
    let client = client(number);
    ResponseHeader {
        addr: client.ip,
        port: client.port,
        flags,
        present: present::MSS,
        mss: 1460,
        window: 60_000,
        seq: 9000 + seq,
        ack: number.wrapping_mul(7919).wrapping_add(acked),
        payload_len,
        ..Default::default()
    }
}

#[test]
fn b020_a_million_sessions_and_a_flood_of_syns_stay_within_their_memory() {
    a_million_sessions_are_reserved_without_touching_their_memory();
    let config = config();
    let sessions = config.limits.sessions as u32;
    let mut now = 10 * lab::S;
    let mut engine = Engine::new(config, now);
    engine.set_link(0, Some(link()));
    let mut wire = Wire::new(2 * BATCH);
    wire.keep = false;
    let before = resident();
    let mut warm = before;
    let mut frames = Vec::with_capacity(BATCH);
    let mut capture =
        |engine: &mut Engine, wire: &mut Wire, now: u64, segments: &mut dyn Iterator<Item = Segment>| {
            loop {
                frames.extend(segments.take(BATCH).map(|segment| wire.captured(&segment)));
                if frames.is_empty() {
                    break;
                }
                engine.on_captured(now, &mut frames, wire);
            }
        };
    for first in (0..sessions).step_by(4096) {
        if first == WARM {
            warm = resident();
        }
        let numbers = first..(first + 4096).min(sessions);
        capture(&mut engine, &mut wire, now, &mut numbers.clone().map(|n| segment(n, flags::SYN, 0, 0)));
        let records: Vec<_> = numbers.clone().map(|n| record(n, flags::SYN | flags::ACK, 0, 1, 0)).collect();
        engine.on_responses(now, &records, &mut wire);
        let data = flags::ACK | flags::PSH;
        capture(&mut engine, &mut wire, now, &mut numbers.clone().map(|n| segment(n, data, 1, 100)));
        let records: Vec<_> = numbers.map(|n| record(n, data, 1, 101, 200)).collect();
        engine.on_responses(now, &records, &mut wire);
        now += 50 * MS;
        engine.on_timers(now, &mut wire);
    }
    assert_eq!(engine.gauges().sessions_live, u64::from(sessions));
    assert_eq!(engine.gauges().held_bytes, 0, "all was acknowledged");
    let counters = engine.counters();
    assert_eq!(counters[Counter::ReplayBytesDelivered], 100 * u64::from(sessions));
    let each = (resident() - warm) * 1024 / u64::from(sessions - WARM);
    let with_tables = (resident() - before) * 1024 / u64::from(sessions);
    println!("{each} bytes for each of {sessions} sessions, {with_tables} with the tables");
    assert!(each <= MOST_PER_SESSION, "{each} bytes for each of {sessions} sessions");
    assert!(with_tables <= MOST_PER_SESSION + TABLES_PER_SESSION, "{with_tables} bytes with the tables");

    let full = resident();
    capture(&mut engine, &mut wire, now, &mut (0..100_000).map(|n| segment(sessions + n, flags::SYN, 0, 0)));
    assert_eq!(engine.counters()[Counter::PacketsLimit], 100_000);
    let grown = resident().saturating_sub(full);
    assert!(grown < 1024, "{grown} KiB for SYNs that found no room");
    // The live ones were not harmed.
    capture(&mut engine, &mut wire, now, &mut (0..1000).map(|n| segment(n * 1000, flags::ACK, 101, 50)));
    assert_eq!(engine.counters()[Counter::ReplayBytesOffered], 100 * u64::from(sessions) + 50_000);
    for (name, left, right) in engine.counters().identities(&engine.pending()) {
        assert_eq!(left, right, "{name}");
    }
}
