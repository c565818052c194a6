//! What is different when the packets come from a file: its own time, and its end.

use crate::lab::{Lab, MS, S, config};
use replayer_engine::counters::Counter;

#[test]
fn b061_a_hole_is_timed_by_the_file() {
    let mut config = config();
    config.gap_timeout_ns = S;
    let mut lab = Lab::with(config);
    lab.engine.set_capture_time(100 * S);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 201+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("A 1 ack 101");
    // However long reading is paused, the hole may still be filled.
    lab.pass(10 * S);
    lab.engine.set_capture_time(100 * S + 900 * MS);
    lab.client("A 101+100 ack 1");
    lab.expect(&["A 101+100 ack 1", "PA 201+100 ack 1"]);
    lab.target("A 1 ack 301");
    // However fast it is read, a hole that stayed open too long is given up.
    lab.client("PA 401+100 ack 1");
    lab.engine.set_capture_time(103 * S);
    lab.client("PA 501+100 ack 1");
    assert_eq!(lab.count(Counter::BytesGap), 100);
    lab.target("PA 1+50 ack 301");
    lab.pass(100 * MS);
    assert!(
        lab.sent().iter().any(|segment| lab.text(segment).starts_with("FA 301")),
        "it ends before the hole"
    );
}

#[test]
fn b061_at_the_end_of_the_file_what_is_open_is_closed() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 201+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.engine.end_of_capture(lab.now, &mut lab.wire);
    lab.check();
    assert_eq!(lab.count(Counter::BytesGap), 100);
    lab.target("A 1 ack 101");
    lab.target("PA 1+50 ack 101");
    lab.pass(100 * MS);
    assert!(lab.sent().iter().any(|segment| lab.text(segment).starts_with("FA 101")));
    lab.target("FA 51 ack 102");
    assert_eq!(lab.engine.gauges().sessions_live, 0);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn b059_after_the_end_the_same_addresses_are_a_new_connection() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    assert_eq!(lab.engine.busy_sessions(lab.now), 1, "its request is not answered");
    lab.target("A 1 ack 101");
    lab.target("PA 1+50 ack 101");
    assert_eq!(lab.engine.busy_sessions(lab.now), 0);
    lab.engine.end_of_capture(lab.now, &mut lab.wire);
    lab.pass(100 * MS);
    assert!(lab.sent().iter().any(|segment| lab.text(segment).starts_with("FA 101")));
    assert_eq!(lab.engine.busy_sessions(lab.now), 1, "it closes");
    // The very SYN that opened the connection before.
    lab.client("S 0 mss 1460 scale 7 sackok");
    assert_eq!(lab.count(Counter::SessionsOpened), 2);
    assert_eq!(lab.count(Counter::PacketsSynRepeated), 0);
}

#[test]
fn b061_a_file_right_after_itself_is_every_connection_once_more() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.client("FA 101 ack 51");
    let first = lab.client;
    lab.sent();
    // The target has not closed yet.
    lab.client("S 0 mss 1460 scale 7 sackok");
    let second = lab.sent()[0].source;
    assert_ne!(second, first);
    lab.client("PA 1+100 ack 1");
    lab.target_to(second, &["SA 0 ack 1 mss 1460"]);
    lab.expect(&["PA 1+100 ack 1"]);
    assert_eq!((lab.count(Counter::SessionsOpened), lab.count(Counter::PacketsSynRepeated)), (2, 0));
}
