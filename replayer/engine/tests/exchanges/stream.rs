//! The captured stream: order, duplicates, overlaps, holes, wraps.

use crate::lab::{Isns, Lab, MS, S, byte, config};
use replayer_engine::counters::Counter;

#[test]
fn b031_reordered_segments_go_out_in_order() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("A 101+100 ack 1");
    lab.client("PA 201+100 ack 1");
    lab.expect(&[]);
    lab.client("A 1+100 ack 1");
    lab.expect(&["A 1+100 ack 1", "A 101+100 ack 1", "PA 201+100 ack 1"]);
    assert_eq!(lab.engine.pending().out_of_order_bytes, 0);
}

#[test]
fn b032_what_was_seen_is_not_sent_twice() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.client("PA 1+100 ack 1");
    lab.client("PA 1+40 ack 1");
    lab.expect(&[]);
    // Overlaps are trimmed.
    lab.client("PA 51+100 ack 1");
    lab.expect(&["PA 101+50 ack 1"]);
    assert_eq!((lab.count(Counter::BytesDuplicate), lab.count(Counter::BytesAccepted)), (190, 150));
}

#[test]
fn b032_a_keepalive_probe_of_the_client_is_no_data() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("A 100 ack 1");
    lab.client("A 100+1 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
}

#[test]
fn b031_a_retransmission_that_covers_several_pieces_behind_a_hole_is_kept_whole() {
    let mut lab = Lab::new();
    lab.handshake();
    // Two pieces behind a hole; then one segment over and beyond both (Linux joins small segments when it sends them again).
    lab.client("A 51+10 ack 1");
    lab.client("A 81+10 ack 1");
    lab.client("PA 41+80 ack 1");
    assert_eq!(lab.engine.pending().out_of_order_bytes, 80);
    lab.client("A 1+40 ack 1");
    let sent = lab.sent();
    let len: usize = sent.iter().map(|segment| segment.payload.len()).sum();
    assert_eq!(len, 120, "nothing is missing behind the hole");
    assert_eq!(lab.count(Counter::BytesDuplicate), 20);
}

#[test]
fn b031_any_order_of_overlapping_pieces_gives_the_same_stream() {
    // All pieces of [1, 13) with two of the cuts, in many orders: a seeded shuffle of overlapping segments.
    for seed in 1..400u32 {
        let mut lab = Lab::new();
        lab.handshake();
        let mut random = seed;
        let mut next = |bound: u32| {
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            random % bound
        };
        for _ in 0..30 {
            let start = 1 + next(40);
            let len = 1 + next(20);
            lab.client(&format!("A {start}+{len} ack 1"));
        }
        lab.client("A 1+60 ack 1");
        let mut stream = [None; 100];
        for segment in lab.sent() {
            for (i, &got) in segment.payload.iter().enumerate() {
                let place = segment.seq.wrapping_sub(lab.isns.client) as usize + i;
                assert!(stream[place].replace(got).is_none(), "seed {seed}: byte {place} twice");
            }
        }
        for (place, &got) in stream.iter().enumerate().take(61).skip(1) {
            assert_eq!(got, Some(byte(place as u32)), "seed {seed}: byte {place}");
        }
        assert_eq!(lab.count(Counter::BytesAccepted), 60, "seed {seed}");
    }
}

#[test]
fn b033_a_hole_ends_the_session_and_the_next_request_is_joined() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.expect(&["PA 1+100 ack 1"]);
    // 101..201 is never captured.
    lab.client("PA 201+100 ack 51");
    lab.pass(900 * MS);
    lab.expect(&["A 101 ack 51"]);
    lab.pass(200 * MS);
    // Closed after what came before the hole, with the response that was pending.
    lab.expect(&["FA 101 ack 51"]);
    assert_eq!(lab.count(Counter::BytesGap), 100);
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    assert_eq!(lab.count(Counter::SessionsGap), 1);
    // Still the request with the hole: the client has read nothing since.
    lab.client("PA 301+10 ack 51");
    lab.expect(&[]);
    // The next request.
    lab.client("PA 311+40 ack 151");
    lab.expect(&["S 310"]);
    lab.target("SA 0 ack 311 mss 1460");
    lab.expect(&["PA 311+40 ack 1"]);
}

#[test]
fn b033_each_hole_has_its_own_time_whichever_was_before() {
    let mut lab = Lab::new();
    lab.handshake();
    // A hole that is filled in time, here and at another client.
    lab.client("PA 101+100 ack 1");
    lab.pass(500 * MS);
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1", "PA 101+100 ack 1"]);
    lab.target("A 1 ack 201");
    lab.client.port += 1;
    lab.handshake();
    lab.client("PA 101+100 ack 1");
    // The time of the first one passes, then that of the second.
    lab.pass(900 * MS);
    assert_eq!(lab.count(Counter::BytesGap), 0);
    assert_eq!(lab.engine.pending().out_of_order_bytes, 100);
    lab.pass(200 * MS);
    assert_eq!(lab.count(Counter::BytesGap), 100);
    lab.stop();
}

#[test]
fn b033_with_new_connections_only_a_connection_that_began_under_capture_is_joined_again_after_a_hole() {
    let mut config = config();
    config.new_connections_only = true;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 201+100 ack 51");
    lab.pass(2 * S);
    lab.sent();
    lab.client("PA 301+100 ack 151");
    lab.expect(&["S 300"]);
}

#[test]
fn b033_a_fin_behind_a_hole() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.client("FA 201 ack 51");
    lab.pass(1100 * MS);
    lab.expect(&["PA 1+100 ack 1", "A 101 ack 51", "FA 101 ack 51"]);
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn b029_sequence_numbers_wrap_on_both_sides() {
    for before_wrap in [0, 1, 50, 149, 150, 151] {
        let isn = 0u32.wrapping_sub(before_wrap);
        let mut lab = Lab::with_isns(config(), Isns { client: isn, online: isn, target: isn });
        lab.handshake();
        lab.client("A 101+100 ack 1");
        lab.client("A 1+100 ack 1");
        lab.expect(&["A 1+100 ack 1", "A 101+100 ack 1"]);
        lab.target("A 1+100 ack 101");
        lab.target("PA 101+100 ack 201");
        lab.expect(&["A 201 ack 201"]);
        lab.client("PA 201+10 ack 201");
        lab.expect(&["PA 201+10 ack 201"]);
        lab.target("A 201 ack 211");
        lab.client("FA 211 ack 201");
        lab.expect(&["FA 211 ack 201"]);
        lab.target("FA 201 ack 212");
        lab.expect(&["A 212 ack 202"]);
        assert_eq!(lab.count(Counter::SessionsCompleted), 1);
        assert_eq!(lab.count(Counter::ReplayBytesDelivered), 210);
    }
}

#[test]
fn b039_segments_far_from_the_stream_are_left_out() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1000000001+100 ack 1");
    lab.client("R 1000000001");
    lab.expect(&[]);
    assert_eq!((lab.count(Counter::PacketsOutOfWindow), lab.count(Counter::PacketsDoubtful)), (1, 1));
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
}

#[test]
fn b039_odd_flags_do_no_harm() {
    let mut lab = Lab::new();
    lab.handshake();
    for text in ["SA 0 ack 1", "SFRPA 5 ack 1", "SF 0", ". 1", ". 1+5", "SR 0", "SPF 0+9"] {
        lab.client(text);
    }
    lab.stop();
}

#[test]
fn b039_a_syn_with_an_ack_from_a_client_is_no_data() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("SA 0+10 ack 1");
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::PacketsSynRepeated), 1);
    lab.client("PA 1+10 ack 1");
    lab.expect(&["PA 1+10 ack 1"]);
    lab.stop();
}
