//! What is shed when a limit is reached, and that the rest goes on.

use crate::lab::{Lab, S, config};
use replayer_engine::counters::Counter;

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
fn b011_a_limit_that_is_reached_behind_a_hole_counts_each_byte_once() {
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
