//! Nothing is allocated after `Engine::new`: counted by the allocator itself, over tens of thousands of packets, records and timers,
//! with new sessions, copies, copies spread over time, losses, holes, connections that are joined again, IPv6, datagrams, ends and limits among
//! them.

mod lab;

use etherparse::PacketBuilder;
use lab::wire::{Frame, Segment};
use lab::{MS, Wire, config, endpoint, link};
use replayer_common::addr::{Endpoint, Ip, from_v4};
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::config::{Config, Service};
use replayer_engine::counters::Counter;
use replayer_engine::{AddressRange, BATCH, Engine};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    /// Allocations of this thread while it counts: the test runner's own thread allocates when it likes.
    static COUNTED: Cell<usize> = const { Cell::new(0) };
    static COUNTING: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if COUNTING.get() {
        COUNTED.set(COUNTED.get() + 1);
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches two cells and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations while `work` runs.
fn allocations(work: impl FnOnce()) -> usize {
    COUNTED.set(0);
    COUNTING.set(true);
    work();
    COUNTING.set(false);
    COUNTED.get()
}

/// Stops the engine, whose accounts must add up and have at least so much of each; allocations meanwhile.
fn end(engine: &mut Engine, now: u64, wire: &mut Wire, least: &[(Counter, u64)]) -> usize {
    let count = allocations(|| {
        engine.stop(now, wire);
        engine.on_timers(now + 600 * MS, wire);
    });
    assert!(engine.stopped());
    let counters = engine.counters();
    for (name, left, right) in counters.identities(&engine.pending()) {
        assert_eq!(left, right, "{name}");
    }
    for &(counter, least) in least {
        assert!(counters[counter] >= least, "{} {}", counters[counter], counter.name());
    }
    count
}

#[test]
fn the_hot_path_allocates_nothing_with_copies_and_a_pool() {
    let mut config = config();
    config.copies_millionths = 1_500_000;
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 0]), count: 4 }];
    config.limits.identities = 3000;
    live(config, from_v4([10, 0, 0, 1]));
}

#[test]
fn the_hot_path_allocates_nothing_with_copies_that_are_spread_over_time() {
    let mut config = config();
    config.copies_millionths = 2_000_000;
    config.spread_ns = 200 * MS;
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 0]), count: 4 }];
    config.limits.identities = 3000;
    live(config, from_v4([10, 0, 0, 1]));
}

#[test]
fn the_hot_path_allocates_nothing_with_datagrams() {
    const ROUNDS: usize = 500;
    let udp = Service { online: endpoint("10.0.1.1:53"), target: endpoint("10.0.2.1:5353") };
    let mut config = config();
    config.services = Vec::new();
    config.udp_services = vec![udp];
    config.copies_millionths = 1_500_000;
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 0]), count: 4 }];
    config.limits.sessions = 800;
    config.limits.connections = 600;
    config.limits.identities = 3000;
    let mut engine = Engine::new(config, 0);
    engine.set_link(0, Some(link()));
    let mut wire = Wire::new(256);
    wire.keep = false;
    let mut now = 10 * lab::S;
    let mut batch: Vec<(Frame, usize)> = Vec::with_capacity(BATCH);
    let mut records: Vec<ResponseHeader> = Vec::with_capacity(4096);
    let mut total = 0;
    for round in 0..ROUNDS {
        for place in 0..BATCH {
            // More clients than there may be flows, each of which comes back after others.
            let port = 1024 + ((round * 37 + place * 11) % 1500) as u16;
            let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let packet = ethernet.ipv4([10, 0, 0, 1], [10, 0, 1, 1], 64).udp(port, 53);
            let payload = [7; 300];
            let mut bytes = Vec::with_capacity(packet.size(payload.len()));
            packet.write(&mut bytes, &payload[..place % 300]).unwrap();
            batch.push(wire.captured_bytes(&bytes));
        }
        records.clear();
        records.extend(engine.identities(0).take(4096).map(|(_, service, identity)| ResponseHeader {
            service,
            addr: identity.ip,
            port: identity.port,
            payload_len: 100,
            ..Default::default()
        }));
        total += allocations(|| {
            engine.on_captured(now, &mut batch, &mut wire);
            engine.on_responses(now, &records, &mut wire);
            engine.on_timers(now, &mut wire);
        });
        // A flow is forgotten after minutes: in the second half they come and go.
        now += if round < ROUNDS / 2 { 20 * MS } else { 10 * lab::S };
    }
    let least = [
        (Counter::DatagramsSent, 10_000),
        (Counter::DatagramFlows, 2_000),
        (Counter::DatagramsRefusedLimit, 100),
        (Counter::DatagramResponses, 10_000),
    ];
    total += end(&mut engine, now, &mut wire, &least);
    assert_eq!(total, 0, "allocations");
}

#[test]
fn b010_the_hot_path_allocates_nothing_with_ipv6() {
    let mut config = config();
    config.copies_millionths = 2_000_000;
    config.services =
        vec![Service { online: endpoint("[fd00::1:1]:80"), target: endpoint("[fd00::2:1]:8080") }];
    live(config, endpoint("[fd00::1]:1").ip);
}

/// Clients whose streams go on where they were, now and then with a hole: they are lost and joined again.
const ORDERLY: usize = 40;

/// A while of an engine's life, among clients of one address, that ends with a stop.
fn live(mut config: Config, client: Ip) {
    config.limits.sessions = 800;
    config.limits.connections = 600;
    let online = config.services[0].online;
    let mut engine = Engine::new(config, 0);
    engine.set_link(0, Some(link()));
    let mut wire = Wire::new(256);
    wire.keep = false;
    let mut now = 10 * lab::S;
    let mut batch: Vec<(Frame, usize)> = Vec::with_capacity(BATCH);
    let mut records: Vec<ResponseHeader> = Vec::with_capacity(4096);
    let mut total = 0;
    let mut random = 88_172_645_463_325_252u64;
    let mut next = move |bound: u32| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 33) as u32 % bound
    };
    // The next number and what was read; 0: nothing was sent.
    let mut orderly = [(0u32, 5000u32); ORDERLY];
    for _ in 0..2000 {
        for _ in 0..BATCH {
            let kind = next(20);
            let mut segment = Segment {
                source: Endpoint { ip: client, port: 1024 + next(700) as u16 },
                destination: online,
                seq: 1000 + next(20) * 100,
                ack: 5000 + next(4) * 100,
                flags: match kind {
                    0 | 1 => flags::SYN,
                    2 => flags::FIN | flags::ACK,
                    3 => flags::RST,
                    _ => flags::ACK,
                },
                window: 500,
                mss: (kind < 2).then_some(1460),
                window_scale: None,
                sack_permitted: false,
                timestamps: None,
                payload: vec![7; if kind < 4 { 0 } else { 100 + next(1300) as usize }],
            };
            if next(4) == 0 {
                let number = next(ORDERLY as u32) as usize;
                let (seq, read) = &mut orderly[number];
                segment.source.port = 30_000 + number as u16;
                segment.payload = vec![7; 150];
                segment.flags = flags::ACK | flags::PSH;
                if *seq == 0 {
                    (segment.payload, segment.flags) = (Vec::new(), flags::SYN);
                    *seq = 1000;
                } else if next(20) == 0 {
                    *seq += 300;
                }
                *read += next(2) * 50;
                (segment.seq, segment.ack) = (*seq, *read);
                *seq += (segment.payload.len() as u32).max(1);
            }
            batch.push(wire.captured(&segment));
        }
        records.clear();
        for (_, service, identity) in engine.identities(0) {
            let kind = next(12);
            records.push(ResponseHeader {
                service,
                addr: identity.ip,
                port: identity.port,
                flags: match kind {
                    0 if next(8) == 0 => flags::FIN | flags::ACK,
                    1 if next(16) == 0 => flags::RST | flags::ACK,
                    2..5 => flags::SYN | flags::ACK,
                    _ => flags::ACK | flags::PSH,
                },
                present: present::MSS,
                mss: 1460,
                window: if kind == 5 { 0 } else { 60_000 },
                seq: 9000 + next(10) * 50,
                ack: if kind == 11 { 1000 + next(2000) * 150 + 1 } else { 1000 + next(20) * 100 + 1 },
                payload_len: if kind < 6 { 0 } else { next(1400) },
                ..Default::default()
            });
        }
        let idle = Endpoint { ip: client, port: 20_000 + next(1000) as u16 };
        total += allocations(|| {
            engine.expect_turn(now, idle, online);
            engine.on_captured(now, &mut batch, &mut wire);
            engine.on_responses(now, &records, &mut wire);
            engine.on_timers(now, &mut wire);
        });
        #[cfg(debug_assertions)]
        engine.check();
        now += u64::from(next(20)) * MS;
    }
    // All that the hot path can do was among it.
    let least = [
        (Counter::SessionsOpened, 2_000),
        (Counter::PacketsDoubtful, 1_000),
        (Counter::ConnectionsJoined, 50),
        (Counter::BytesGap, 5_000),
        (Counter::SegmentsRetransmitted, 1_000),
        (Counter::ReplayBytesDelivered, 100_000),
        (Counter::TurnsSent, 500),
    ];
    total += end(&mut engine, now, &mut wire, &least);
    assert!(wire.count_sent > 50_000, "{} packets", wire.count_sent);
    assert_eq!(total, 0, "allocations");
}
