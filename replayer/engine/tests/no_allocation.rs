//! Nothing is allocated after `Engine::new`: counted by the allocator itself, over tens of thousands of packets, records and timers,
//! with new sessions, copies, losses, ends and limits among them.

mod lab;

use lab::wire::{Frame, Segment};
use lab::{MS, Wire, config, endpoint, link};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};
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

#[test]
fn the_hot_path_allocates_nothing() {
    let mut config = config();
    config.copies_millionths = 1_500_000;
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 0]), count: 4 }];
    config.limits.identities = 3000;
    config.limits.sessions = 800;
    config.limits.connections = 600;
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
    let online = endpoint(lab::ONLINE);
    for _ in 0..1500 {
        for _ in 0..BATCH {
            let client = Endpoint { ip: from_v4([10, 0, 0, 1]), port: 1024 + next(700) as u16 };
            let kind = next(20);
            let segment = Segment {
                source: client,
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
            batch.push(wire.captured(&segment));
        }
        records.clear();
        for (_, _, identity) in engine.identities(0) {
            let kind = next(12);
            records.push(ResponseHeader {
                addr: identity.ip,
                port: identity.port,
                flags: match kind {
                    0 => flags::FIN | flags::ACK,
                    1 if next(4) == 0 => flags::RST | flags::ACK,
                    2..5 => flags::SYN | flags::ACK,
                    _ => flags::ACK | flags::PSH,
                },
                present: present::MSS,
                mss: 1460,
                window: if kind == 5 { 0 } else { 60_000 },
                seq: 9000 + next(10) * 50,
                ack: 1000 + next(20) * 100 + 1,
                payload_len: if kind < 6 { 0 } else { next(1400) },
                ..Default::default()
            });
        }
        total += allocations(|| {
            engine.on_captured(now, &mut batch, &mut wire);
            engine.on_responses(now, &records, &mut wire);
            engine.on_timers(now, &mut wire);
        });
        #[cfg(debug_assertions)]
        engine.check();
        now += u64::from(next(20)) * MS;
    }
    total += allocations(|| {
        engine.stop(now, &mut wire);
        engine.on_timers(now + 600 * MS, &mut wire);
    });
    assert!(engine.stopped());
    let counters = engine.counters();
    for (name, left, right) in counters.identities(&engine.pending()) {
        assert_eq!(left, right, "{name}");
    }
    let opened = counters[replayer_engine::counters::Counter::SessionsOpened];
    assert!(opened > 5_000 && wire.count_sent > 50_000, "{opened} sessions, {} packets", wire.count_sent);
    assert_eq!(total, 0, "allocations");
}
