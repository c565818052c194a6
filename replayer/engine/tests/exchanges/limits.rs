//! What is shed when a limit is reached, and that the rest goes on.

use crate::lab::{CLIENT, Lab, MS, ONLINE, S, Segment, Wire, config, endpoint, link, numbers};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::flags;
use replayer_engine::counters::Counter;
use replayer_engine::{AddressRange, Engine};

#[test]
fn b028_a_connection_that_holds_too_much_is_shed_whole_and_joined_again() {
    let mut lab = Lab::new();
    lab.handshake();
    // The target acknowledges nothing. 1 MiB is the limit.
    let mut place = 1u32;
    while lab.count(Counter::PacketsLimit) == 0 {
        lab.client(&format!("A {place}+1400 ack 1"));
        lab.sent();
        place += 1400;
        assert!(place < 2 << 20);
    }
    assert_eq!(lab.count(Counter::SessionsLimit), 1);
    assert_eq!(lab.engine.gauges().held_bytes, 0);
    assert_eq!(lab.count(Counter::LostLimit) + lab.count(Counter::BytesLimit), u64::from(place) - 1);
    lab.client(&format!("A {place}+1400 ack 1"));
    place += 1400;
    lab.expect(&[]);
    lab.client(&format!("PA {place}+100 ack 500"));
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), format!("S {}", place - 1));
}

#[test]
fn how_far_the_tables_are_filled_is_told_as_sessions_and_data_come() {
    let mut lab = Lab::new();
    let before = lab.engine.frontiers();
    lab.handshake();
    lab.client("PA 1+1400 ack 1");
    lab.sent();
    // A connection of 64 bytes and 12, a session of 128 and 32, six blocks of 40 and 256, a timer of 12.
    let after = lab.engine.frontiers();
    let grown: Vec<usize> =
        before.iter().zip(&after).map(|(before, after)| after.from - before.from).collect();
    assert_eq!(grown, [64, 12, 128, 32, 240, 1536, 12]);
    assert!(
        before.iter().zip(&after).all(|(before, after)| before.end == after.end && after.from < after.end)
    );
}

#[test]
fn b028_segments_of_a_byte_count_as_the_blocks_that_they_take() {
    // In order, and behind a hole.
    for first in [1, 3] {
        let mut lab = Lab::new();
        lab.handshake();
        let client = lab.client;
        let most = (1 << 20) / 256;
        for place in 0..most {
            lab.client(&format!("A {}+1 ack 1", first + place));
            lab.sent();
        }
        assert_eq!(lab.count(Counter::PacketsLimit), 0, "{most} blocks are the limit");
        // Others have room all the while.
        lab.client.port += 1;
        lab.handshake();
        lab.client("PA 1+1400 ack 1");
        lab.expect(&["PA 1+1400 ack 1"]);
        lab.client = client;
        lab.client(&format!("A {}+1 ack 1", first + most));
        assert_eq!((lab.count(Counter::PacketsLimit), lab.count(Counter::SessionsLimit)), (1, 1));
        assert_eq!(lab.engine.gauges().held_bytes, 1400);
    }
}

#[test]
fn b028_a_limit_that_is_reached_behind_a_hole_counts_each_byte_once() {
    let mut lab = Lab::new();
    lab.handshake();
    // Pieces with holes between them, then one over all of them that no longer fits.
    let mut place = 1_001u32;
    while u64::from(place) < (1 << 20) + 1000 - 2000 {
        lab.client(&format!("A {place}+1400 ack 1"));
        place += 1400;
    }
    lab.client(&format!("A {}+10 ack 1", place + 500));
    lab.client(&format!("A {place}+1400 ack 1"));
    lab.client(&format!("A {}+10 ack 1", place + 2000));
    lab.client(&format!("A {}+1400 ack 1", place + 1300));
    assert_eq!(lab.count(Counter::PacketsLimit), 1);
    assert_eq!(lab.engine.pending().out_of_order_bytes, 0);
    assert_eq!(lab.engine.gauges().held_bytes, 0);
}

#[test]
fn the_store_that_all_share_is_full() {
    let mut config = config();
    config.limits.held_bytes = 64 * 256;
    let mut lab = Lab::with(config);
    for port in 0..5 {
        lab.client.port = 20_000 + port;
        lab.handshake();
        for i in 0..3 {
            lab.client(&format!("A {}+1400 ack 1", 1 + i * 1400));
        }
        lab.sent();
    }
    assert!(lab.count(Counter::SessionsLimit) >= 1);
    assert_eq!(lab.engine.gauges().sessions_live + lab.count(Counter::SessionsLimit), 5);
    lab.stop();
}

#[test]
fn b028_whoever_fills_the_store_clients_that_hold_little_are_never_shed() {
    for seed in 1..=30u64 {
        let mut random = numbers(seed);
        let mut below = |bound: u32| random(u64::from(bound)) as u32;
        let mut config = config();
        config.limits.held_bytes = 1_280 * 256;
        config.limits.held_bytes_per_connection = 640 * 256;
        let mut lab = Lab::with(config);
        // Clients whose target answers soon; then uploads to a target that does not.
        let (clients, uploads) = (0..20, 20..24);
        // Where each stream is, how far the target has acknowledged it, and what the client has read.
        let mut streams = [(1u32, 1u32, 1u32); 24];
        let port = |number: usize| 20_000 + number as u16;
        for number in 0..streams.len() {
            lab.client.port = port(number);
            lab.handshake();
        }
        for _ in 0..1_500 {
            let number = if below(3) == 0 { below(20) } else { 20 + below(4) } as usize;
            lab.client.port = port(number);
            let (next, acknowledged, read) = &mut streams[number];
            let len = 1 + below(1400);
            if below(4) == 0 {
                lab.client(&format!("A {}+{len} ack {}", below(1 << 27) + (1 << 27), below(1 << 31)));
            } else if uploads.contains(&number) {
                // Of what is shed a part is joined again.
                *read += below(2);
                lab.client(&format!("A {next}+{len} ack {read}"));
                *next += len;
            } else if *next - *acknowledged > 2_000 {
                lab.target(&format!("A {read} ack {next}"));
                *acknowledged = *next;
            } else {
                let accepted = lab.count(Counter::BytesAccepted);
                lab.client(&format!("A {next}+{len} ack {read}"));
                assert_eq!(lab.count(Counter::BytesAccepted) - accepted, u64::from(len), "seed {seed}");
                *next += len;
            }
            let resets = lab.wire.take_sent().into_iter().filter(|segment| segment.flags & flags::RST != 0);
            let shed: Vec<_> = resets.map(|segment| segment.source.port).collect();
            assert!(clients.clone().all(|number| !shed.contains(&port(number))), "seed {seed}: {shed:?}");
        }
        assert!(lab.count(Counter::SessionsLimit) > 0);
        lab.stop();
    }
}

#[test]
fn b020_a_flood_of_syns_is_bounded_and_live_sessions_go_on() {
    let mut config = config();
    config.limits.connections = 100;
    config.limits.sessions = 50;
    let mut lab = Lab::with(config);
    let live = lab.client;
    lab.handshake();
    for port in 1..2000 {
        lab.client.port = port;
        lab.client("S 0 mss 1460");
        lab.sent();
    }
    assert_eq!(lab.engine.gauges().connections_live, 100);
    assert_eq!(lab.engine.gauges().sessions_live, 50);
    assert_eq!(lab.count(Counter::SessionsRefusedLimit), 50);
    assert_eq!(lab.count(Counter::PacketsLimit), 1999 - 99);
    lab.client = live;
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("A 1 ack 101");
    // The flood's addresses answer nothing and are forgotten in the end.
    lab.pass(60 * S);
    lab.sent();
    assert_eq!(lab.engine.gauges().sessions_live, 1);
    lab.pass(70 * S);
    assert_eq!(lab.engine.gauges().connections_live, 1, "a SYN without its ACK is forgotten");
    lab.stop();
}

#[test]
fn b020_of_many_connections_each_is_forgotten_when_its_time_has_come_and_not_before() {
    let mut config = config();
    config.limits.connections = 40_000;
    let mut lab = Lab::with(config);
    let capture = |lab: &mut Lab, clients: std::ops::Range<u32>| {
        for number in clients {
            let [_, _, a, b] = number.to_be_bytes();
            let segment = Segment {
                source: Endpoint { ip: from_v4([10, 9, a, b]), port: 40_000 },
                destination: endpoint(ONLINE),
                seq: 5,
                ack: 7,
                flags: flags::ACK,
                window: 500,
                mss: None,
                window_scale: None,
                sack_permitted: false,
                timestamps: None,
                payload: vec![1; 10],
            };
            let mut frames = vec![lab.wire.captured(&segment)];
            lab.engine.on_captured(lab.now, &mut frames, &mut lab.wire);
        }
    };
    // In the middle of requests, so they are watched, five minutes long.
    capture(&mut lab, 0..40_000);
    lab.pass(200 * S);
    capture(&mut lab, 0..100);
    lab.pass(99 * S);
    assert_eq!(lab.engine.gauges().connections_live, 40_000);
    lab.pass(17 * S);
    assert_eq!(lab.engine.gauges().connections_live, 100);
    lab.pass(200 * S);
    assert_eq!(lab.engine.gauges().connections_live, 0);
    // Nothing is left to look at.
    assert_eq!(lab.engine.next_deadline_ns(lab.now), None);
    lab.stop();
}

/// SYNs among what was sent.
fn syns(lab: &mut Lab) -> usize {
    lab.sent().iter().filter(|segment| segment.has(2)).count()
}

#[test]
fn b020_a_silent_target_has_a_bounded_number_of_syns_to_answer() {
    let mut config = config();
    config.limits.unanswered_syns = 100;
    let mut lab = Lab::with(config);
    let open = |lab: &mut Lab, first: u16, count: u16| {
        for port in first..first + count {
            lab.client.port = port;
            lab.client("S 0 mss 1460");
        }
        syns(lab)
    };
    // It may be about to answer: all of a burst go.
    assert_eq!(open(&mut lab, 10_000, 300), 300);
    lab.pass(1100 * MS);
    syns(&mut lab);
    assert_eq!(open(&mut lab, 20_000, 300), 0);
    assert_eq!(lab.count(Counter::SessionsRefusedUnanswered), 300);
    // It answers one: it lives.
    lab.client.port = 10_000;
    lab.target("SA 0 ack 1 mss 1460");
    lab.sent();
    assert_eq!(open(&mut lab, 30_000, 200), 200);
    lab.stop();
}

#[test]
fn b041_a_hundred_copies_of_a_thousand_connections_at_once_are_no_flood() {
    let mut config = config();
    config.copies_millionths = 100_000_000;
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 0]), count: 4 }];
    config.limits.sessions = 100_000;
    config.limits.identities = 100_000;
    config.limits.unanswered_syns = 100;
    let mut engine = Engine::new(config, 0);
    engine.set_link(0, Some(link()));
    let mut wire = Wire::new(64);
    wire.keep = false;
    for port in 0..1000 {
        let syn = Segment {
            source: Endpoint { port: 10_000 + port, ..endpoint(CLIENT) },
            destination: endpoint(ONLINE),
            seq: 1_000_000 + u32::from(port),
            ack: 0,
            flags: flags::SYN,
            window: 500,
            mss: Some(1460),
            window_scale: None,
            sack_permitted: false,
            timestamps: None,
            payload: Vec::new(),
        };
        let frame = wire.captured(&syn);
        engine.on_captured(5 * S, &mut vec![frame], &mut wire);
    }
    // Their SYNs go as fast as the target answers.
    assert_eq!(engine.gauges().sessions_live, 100_000);
    assert_eq!(engine.counters()[Counter::SessionsRefusedUnanswered], 0);
}

#[test]
fn b037_a_target_that_is_gone_gets_one_syn_in_50_ms_from_all_sessions_together() {
    let mut lab = Lab::new();
    for port in 0..500 {
        lab.client.port = 10_000 + port;
        lab.client("S 0 mss 1460");
    }
    assert_eq!(syns(&mut lab), 500);
    // After 1 s each asks again; after 3 s the target counts as down.
    lab.pass(2500 * MS);
    assert_eq!(syns(&mut lab), 500);
    lab.pass(S);
    syns(&mut lab);
    for second in 0..10 {
        lab.client.port = 20_000 + second;
        lab.client("S 0 mss 1460");
        lab.pass(S);
        let syns = syns(&mut lab);
        assert!(syns <= 21, "{syns} SYNs in a second");
    }
    // It is back: who still waits gets through within 4 s.
    let waiting = lab.engine.gauges().sessions_live;
    assert!(waiting >= 400, "{waiting}");
    for _ in 0..50 {
        lab.pass(100 * MS);
        for segment in lab.sent() {
            if segment.has(2) {
                lab.target_to(segment.source, &["SA 0 ack 1 mss 1460"]);
            }
        }
    }
    lab.sent();
    assert_eq!(lab.engine.gauges().sessions_live, waiting);
    lab.pass(30 * S);
    assert_eq!(syns(&mut lab), 0, "all were answered");
}

#[test]
fn a_target_of_another_address_family_is_counted_once_a_connection() {
    let mut config = config();
    let mut other = config.services[0];
    other.target = endpoint("[fd00::1]:8080");
    config.services.push(other);
    let mut lab = Lab::with(config);
    lab.handshake();
    for turn in 0..10u32 {
        lab.client(&format!("PA {}+10 ack {}", 1 + turn * 10, 1 + turn * 10));
        lab.target(&format!("PA {}+10 ack {}", 1 + turn * 10, 11 + turn * 10));
    }
    assert_eq!(lab.count(Counter::SessionsRefusedFamily), 1);
    assert_eq!(lab.count(Counter::SessionsWanted), 2);
    assert_eq!(lab.count(Counter::TurnsSent), 10);
    // Nor again where its stream is joined far from where it was.
    lab.client_segments(&["PA 300000101+10 ack 101", "PA 300000111+10 ack 201"]);
    assert_eq!((lab.count(Counter::ConnectionsJoined), lab.count(Counter::SessionsWanted)), (1, 3));
    assert_eq!(lab.count(Counter::SessionsRefusedFamily), 1);
}

#[test]
fn b019_a_connection_whose_fast_open_data_found_no_room_is_joined_at_its_next_turn() {
    let mut config = config();
    config.limits.held_bytes_per_connection = 1000;
    let mut lab = Lab::with(config);
    lab.client("S 0+1200 mss 1460");
    assert_eq!(lab.count(Counter::BytesLimit), 1200);
    lab.wire.take_sent();
    // The SYN acknowledged nothing; this segment tells how far the client had read.
    lab.client("PA 1201+10 ack 1");
    lab.client("PA 1211+10 ack 301");
    let sent = lab.wire.take_sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(lab.text(&sent[0]), "S 1210");
}

/// Behind a hole the place of each segment is looked for from the first that is held.
#[test]
fn b039_who_strews_segments_behind_a_hole_to_keep_the_engine_busy_is_shed() {
    let mut config = config();
    config.limits = config.limits.with_held(16 << 20);
    let mut lab = Lab::with(config);
    lab.handshake();
    let strewn = 20_000;
    let texts: Vec<String> = (0..strewn).map(|i| format!("A {}+1 ack 1", 1001 + 2 * i)).collect();
    for texts in texts.chunks(256) {
        lab.client_segments(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    }
    assert_eq!(lab.count(Counter::PacketsLimit), 0);
    // Each into the gap before the last but one: past nearly all.
    for sent in 1.. {
        lab.client(&format!("A {}+1 ack 1", 1002 + 2 * (strewn - 1 - sent)));
        if lab.count(Counter::PacketsLimit) > 0 {
            assert_eq!(sent, 7, "six times 20 000 steps are allowed, seven are not");
            break;
        }
    }
    assert_eq!(lab.count(Counter::SessionsLimit), 1);
    assert_eq!((lab.engine.gauges().held_bytes, lab.engine.pending().out_of_order_bytes), (0, 0));
    lab.stop();
}

#[test]
fn b031_a_network_that_reorders_without_end_is_no_such_client() {
    let mut lab = Lab::new();
    lab.handshake();
    let segment = |number: u32| format!("A {}+10 ack 1", 1 + 10 * number);
    for number in [1, 3, 5, 7] {
        lab.client(&segment(number));
    }
    // Something is behind a hole at any time, and every fourth segment has its place among it: in all more steps than are allowed at once.
    let rounds = 50_000;
    for first in (0..rounds).map(|round| 4 * round) {
        let texts = [first + 11, first + 9, first, first + 2].map(segment);
        lab.client_segments(&texts.each_ref().map(String::as_str));
        lab.target(&format!("A 1 ack {}", 1 + 10 * (first + 4)));
        lab.sent();
    }
    assert_eq!((lab.count(Counter::PacketsLimit), lab.count(Counter::SessionsLimit)), (0, 0));
    assert_eq!(lab.count(Counter::ReplayBytesDelivered), u64::from(40 * rounds));
}

/// Where thousands of segments are on their way and some are lost, all of those are sent again, and the first of them may be lost once more.
#[test]
fn b031_many_losses_at_once_are_no_such_client() {
    let mut config = config();
    config.limits = config.limits.with_held(16 << 20);
    let mut lab = Lab::with(config);
    lab.handshake();
    let segment = |number: u32| format!("A {}+10 ack 1", 1 + 10 * number);
    let sent = 10_000;
    let (again, held): (Vec<u32>, Vec<u32>) = (1..sent).partition(|number| number % 20 == 0);
    for numbers in [held, again] {
        for numbers in numbers.chunks(256) {
            let texts: Vec<String> = numbers.iter().copied().map(segment).collect();
            lab.client_segments(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
    lab.client(&segment(0));
    assert_eq!((lab.count(Counter::PacketsLimit), lab.count(Counter::SessionsLimit)), (0, 0));
    assert_eq!(lab.count(Counter::BytesAccepted), u64::from(10 * sent));
    assert_eq!(lab.engine.pending().out_of_order_bytes, 0);
}

#[test]
fn b028_where_the_store_is_full_who_holds_most_makes_room() {
    let mut config = config();
    config.limits.held_bytes = 640 * 256;
    config.limits.held_bytes_per_connection = 320 * 256;
    let mut lab = Lab::with(config);
    // Two uploads to a target that reads nothing take nearly all of it: one of 300 blocks, one of 318. With a client that holds a little.
    for (port, segments) in [(20_001, 50), (20_002, 53), (20_003, 3)] {
        lab.client.port = port;
        lab.handshake();
        for i in 0..segments {
            lab.client(&format!("A {}+1400 ack 1", 1 + i * 1400));
        }
        lab.sent();
    }
    assert_eq!(lab.count(Counter::SessionsLimit), 0);
    // Others have room, in order and behind a hole.
    lab.client.port = 20_004;
    lab.handshake();
    lab.client_segments(&["PA 1+1400 ack 1", "PA 2801+1400 ack 1"]);
    let sent = lab.sent();
    assert_eq!(sent.iter().filter(|segment| segment.flags & flags::RST != 0).count(), 2);
    assert!(sent.iter().all(|segment| segment.flags & flags::RST == 0 || segment.source.port == 20_002));
    assert_eq!((lab.count(Counter::SessionsLimit), lab.count(Counter::PacketsLimit)), (1, 0));
    lab.client("PA 1401+1400 ack 1");
    assert_eq!(lab.sent().len(), 2);
    // Who was shed is joined at its next turn.
    lab.client.port = 20_002;
    lab.client("PA 74201+100 ack 1");
    lab.client("PA 74301+100 ack 51");
    assert_eq!((lab.sent().len(), lab.count(Counter::ConnectionsJoined)), (1, 1));
    // Who holds most itself makes room itself.
    lab.client.port = 20_001;
    for i in 50..54 {
        lab.client(&format!("A {}+1400 ack 1", 1 + i * 1400));
    }
    assert_eq!(lab.count(Counter::SessionsLimit), 2);
    assert!(
        lab.sent().iter().any(|segment| segment.flags & flags::RST != 0 && segment.source.port == 20_001)
    );
    lab.stop();
}

#[test]
fn b028_strangers_data_on_many_connections_sheds_nobody() {
    let mut config = config();
    config.limits.held_bytes = 640 * 256;
    let mut lab = Lab::with(config);
    for port in 20_000..20_200 {
        lab.client.port = port;
        lab.handshake();
    }
    for i in 0..4 {
        for port in 20_000..20_200 {
            lab.client.port = port;
            lab.client(&format!("A {}+1 ack 1", 200_000_001 + 2 * i));
        }
    }
    assert_eq!(lab.count(Counter::SessionsLimit), 0);
    // The store is full of that. Others have room all the same.
    assert!(lab.count(Counter::PacketsLimit) > 0);
    for port in 21_000..21_200 {
        lab.client.port = port;
        lab.handshake();
        lab.client("PA 1+600 ack 1");
        lab.expect(&["PA 1+600 ack 1"]);
    }
    assert_eq!(lab.count(Counter::SessionsLimit), 0);
    lab.stop();
}

/// What lies near behind a hole is the client's; whether all of it does takes a walk through it.
#[test]
fn b039_who_makes_the_engine_look_through_all_that_it_holds_for_nothing_is_refused_without_a_look() {
    let mut config = config();
    config.limits = config.limits.with_held(16 << 20);
    let mut lab = Lab::with(config);
    lab.handshake();
    let most = (8 << 20) / 256;
    let texts: Vec<String> = (0..most).map(|i| format!("A {}+1 ack 1", 1001 + 2 * i)).collect();
    for texts in texts.chunks(256) {
        lab.client_segments(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    }
    assert_eq!((lab.count(Counter::PacketsLimit), lab.engine.gauges().held_bytes), (0, most));
    // Four times 32 768 steps are allowed, but for those that are free; all of these would be a minute of them.
    let far = 50_000;
    for _ in 0..far / 200 {
        lab.client_segments(&["A 200000001+1 ack 1"; 200]);
    }
    assert_eq!((lab.count(Counter::PacketsLimit), lab.count(Counter::BytesLimit)), (far, far));
    assert_eq!((lab.count(Counter::SessionsLimit), lab.engine.gauges().held_bytes), (0, most));
    lab.stop();
}

/// With each of the strangers' connections that makes room the client's own data could be walked through.
#[test]
fn b039_an_upload_with_a_lost_packet_goes_on_while_strangers_fill_the_store() {
    let mut config = config();
    config.limits.held_bytes = 40_000 * 256;
    config.limits.held_bytes_per_connection = 38_000 * 256;
    let mut lab = Lab::with(config);
    let upload = lab.client;
    lab.handshake();
    let held = 30_000;
    let segment = |i: u32| format!("A {}+1 ack 1", 1001 + i);
    for first in (0..held).step_by(250) {
        let texts: Vec<String> = (first..first + 250).map(segment).collect();
        lab.client_segments(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    }
    for port in 20_000..30_000 {
        lab.client.port = port;
        lab.client("S 0 mss 1460");
        lab.sent();
        lab.client("A 200000001+1 ack 1");
    }
    let refused = lab.count(Counter::PacketsLimit);
    lab.client = upload;
    for i in held..held + 7_000 {
        lab.client(&segment(i));
    }
    assert_eq!((lab.count(Counter::PacketsLimit), lab.count(Counter::SessionsLimit)), (refused, 0));
    assert!(
        lab.count(Counter::BytesLimit) >= 7_000,
        "the strangers' made room: {}",
        lab.count(Counter::BytesLimit)
    );
    lab.client("PA 1+1000 ack 1");
    assert_eq!(lab.count(Counter::BytesAccepted), 1000 + u64::from(held) + 7_000);
    lab.stop();
}
