//! How connections end, on either side, and what becomes of their data.

use crate::lab::{Lab, MS, ONLINE, S, config, endpoint};
use replayer_engine::counters::Counter;

#[test]
fn b035_the_client_closes_after_its_response() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    // The client had read 50 bytes when it closed: so does the replay.
    lab.client("FA 101 ack 51");
    lab.expect(&[]);
    lab.target("PA 1+50 ack 101");
    lab.expect(&["FA 101 ack 51"]);
    lab.target("A 51 ack 102");
    lab.expect(&[]);
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    assert_eq!(lab.count(Counter::SessionsCompleted), 1);
    assert_eq!(lab.engine.gauges().connections_live, 0);
    // The target did not get that: answered without a session.
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    // Data of a connection that nobody knows: reset.
    lab.target("PA 51+7 ack 102");
    lab.expect(&["R 102"]);
    lab.target("R 51");
    lab.target("A 52 ack 102");
    lab.expect(&[]);
    lab.pass(2 * S);
    assert!(lab.wire.registered.is_empty(), "{:?}", lab.wire.registered);
}

#[test]
fn b035_fin_with_data_and_before_order() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("FPA 51+50 ack 1");
    lab.expect(&[]);
    lab.client("A 1+50 ack 1");
    lab.expect(&["A 1+50 ack 1", "PA 51+50 ack 1", "FA 101 ack 1"]);
    lab.client("FPA 51+50 ack 1");
    lab.client("PA 101+50 ack 1");
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::BytesAfterEnd), 50);
}

#[test]
fn a_fin_whose_record_is_lost_is_not_acknowledged_by_what_follows_it() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.client("FA 101 ack 51");
    lab.expect(&["PA 1+100 ack 1", "FA 101 ack 51"]);
    // The target's FIN is 51. It got our FIN and says so from 52.
    lab.target("A 52 ack 102");
    lab.pass(S);
    lab.expect(&[]);
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    assert_eq!(lab.count(Counter::SessionsCompleted), 1);
}

#[test]
fn b035_half_closed_the_target_may_answer_for_minutes() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("FPA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1", "FA 101 ack 1"]);
    lab.target("A 1 ack 102");
    for i in 0..30u32 {
        lab.pass(10 * S);
        lab.target(&format!("PA {}+100 ack 102", 1 + i * 100));
        lab.pass(50 * MS);
        let sent = lab.sent();
        assert_eq!(sent.len(), 1, "after {i} responses");
        assert_eq!(lab.text(&sent[0]), format!("A 102 ack {}", 101 + i * 100));
    }
    lab.target("FA 3001 ack 102");
    lab.expect(&["A 102 ack 3002"]);
    assert_eq!(lab.count(Counter::SessionsCompleted), 1);
}

#[test]
fn a_target_that_never_closes_is_reset_after_a_minute_of_silence() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("FPA 1+100 ack 1");
    lab.target("A 1 ack 102");
    lab.sent();
    lab.pass(59 * S);
    lab.expect(&[]);
    lab.pass(2 * S);
    lab.expect(&["RA 102 ack 1"]);
    assert_eq!(lab.count(Counter::SessionsFinTimeout), 1);
}

#[test]
fn a_lost_fin_comes_again_even_when_the_targets_window_is_closed() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("A 1 ack 101 win 0");
    lab.client("FA 101 ack 1");
    lab.expect(&["PA 1+100 ack 1", "FA 101 ack 1"]);
    lab.pass(230 * MS);
    lab.expect(&["FA 101 ack 1"]);
}

#[test]
fn b035_a_client_reset_ends_the_session_after_the_pending_turn() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("RA 101 ack 31");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("A 1+30 ack 101");
    lab.target("PA 31+500 ack 101");
    lab.pass(10 * MS);
    lab.expect(&["A 101 ack 531", "RA 101 ack 531"]);
    assert_eq!(lab.count(Counter::SessionsClientReset), 1);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn b035_a_client_reset_waits_until_what_came_before_it_has_arrived() {
    // Without waiting for responses, where nothing else holds the reset back.
    let mut config = config();
    config.wait_for_responses = false;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("RA 101 ack 31");
    lab.expect(&["PA 1+100 ack 1"]);
    // The data was lost.
    lab.pass(210 * MS);
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("A 1 ack 101");
    lab.expect(&["RA 101 ack 1"]);
    assert_eq!(lab.count(Counter::ReplayBytesDelivered), 100);
    assert_eq!(lab.count(Counter::SessionsClientReset), 1);
}

#[test]
fn b035_the_target_closes_first_and_more_data_opens_a_new_connection() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.sent();
    lab.target("FPA 1+50 ack 101");
    // Answered by FIN, not by RST.
    lab.expect(&["FA 101 ack 52"]);
    lab.target("A 52 ack 102");
    assert_eq!(lab.count(Counter::SessionsTargetClosed), 1);
    lab.client("PA 101+100 ack 51");
    lab.expect(&["S 100"]);
    lab.target("SA 0 ack 101 mss 1460");
    lab.expect(&["PA 101+100 ack 1"]);
    assert_eq!(lab.engine.gauges().connections_live, 1);
}

#[test]
fn b035_requests_that_wait_go_to_a_new_connection_when_the_target_closes() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 1001");
    lab.client("PA 201+100 ack 2001");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("FPA 1+50 ack 101");
    let sent = lab.sent();
    let texts: Vec<_> = sent.iter().map(|segment| lab.text(segment)).collect();
    assert_eq!(texts, ["S 100", "FA 101 ack 52"]);
    assert_ne!(sent[0].source, lab.client, "the client's own port is still in use");
    lab.target_to(sent[0].source, &["SA 0 ack 101 mss 1460"]);
    lab.expect(&["PA 101+100 ack 1"]);
    lab.target_to(sent[0].source, &["PA 1+1000 ack 201"]);
    lab.expect(&["PA 201+100 ack 1001"]);
}

#[test]
fn b036_a_reset_loses_what_was_begun_and_nothing_else() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 1001");
    lab.sent();
    lab.target("RA 1 ack 1");
    assert_eq!(lab.count(Counter::LostTargetReset), 100);
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), "S 100");
    lab.target_to(sent[0].source, &["SA 0 ack 101 mss 1460", "A 1 ack 101"]);
    lab.expect(&["PA 101+100 ack 1"]);
}

#[test]
fn a_target_that_resets_every_connection_at_once_gets_no_storm_of_them() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    for turn in 1..4u32 {
        lab.client(&format!("PA {}+100 ack {}", 1 + turn * 100, 1 + turn * 1000));
    }
    let mut syns = 0;
    lab.sent();
    lab.target("RA 1 ack 1");
    for _ in 0..1000 {
        lab.pass(MS);
        for segment in lab.sent() {
            if segment.has(2) {
                syns += 1;
                let ack = segment.seq.wrapping_sub(lab.isns.client) + 1;
                lab.target_to(
                    segment.source,
                    &[&format!("SA 0 ack {ack} mss 1460"), &format!("RA 1 ack {ack}")],
                );
            }
        }
    }
    assert!(syns <= 4, "{syns} SYNs for three requests");
    assert_eq!(lab.engine.gauges().sessions_live, 0);
    assert_eq!(lab.engine.gauges().held_bytes, 0);
}

#[test]
fn b018_the_client_uses_its_port_again_before_the_target_is_done() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("FA 101 ack 51");
    lab.sent();
    // The target is slow; the client's next connection begins.
    let first = lab.client;
    lab.isns.client = 77_000_000;
    lab.client("S 0 mss 1460");
    lab.client("A 1 ack 1");
    lab.client("PA 1+200 ack 1");
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), "S 0");
    let second = sent[0].source;
    assert_ne!(second, first);
    lab.target_to(second, &["SA 0 ack 1 mss 1460"]);
    lab.expect(&["PA 1+200 ack 1"]);
    lab.isns.client = 1_000_000;
    lab.target_to(first, &["PA 1+50 ack 101"]);
    lab.expect(&["FA 101 ack 51"]);
    lab.target_to(first, &["FA 51 ack 102"]);
    lab.expect(&["A 102 ack 52"]);
    assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (1, 1));
}

#[test]
fn b018_a_port_used_again_when_the_reset_of_the_old_connection_is_just_due() {
    // The old connection ends in the very call that replaces it: its place must not be freed twice.
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("A 1 ack 101");
    lab.client("RA 101 ack 31");
    lab.sent();
    // The hold limit has passed, but the timers have not run.
    lab.now += 3 * S;
    lab.isns.client = 77_000_000;
    lab.client("S 0 mss 1460");
    let sent = lab.sent();
    assert_eq!(sent.len(), 2);
    for port in 1..5 {
        lab.client.port = port;
        lab.client("S 0 mss 1460");
    }
    assert_eq!(lab.engine.gauges().connections_live, 5);
    lab.stop();
}

#[test]
fn b040_a_stop_leaves_nothing() {
    let mut lab = Lab::new();
    // One in each state.
    lab.client("S 0 mss 1460");
    lab.sent();
    lab.client.port += 1;
    lab.handshake();
    lab.client.port += 1;
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 1001");
    lab.client("PA 301+100 ack 1001");
    lab.sent();
    lab.client.port += 1;
    lab.handshake();
    lab.client("FPA 1+100 ack 1");
    lab.sent();
    lab.stop();
    let sent = lab.sent();
    for port in 0..4 {
        let last = sent.iter().rfind(|segment| segment.source.port == 40_000 + port).unwrap();
        assert!(last.has(4), "{} ends with RST", last.source);
    }
    assert_eq!(lab.count(Counter::LostStopped), 300);
    assert_eq!(lab.count(Counter::BytesStopping), 100);
    lab.client("PA 1+100 ack 1");
    lab.expect(&[]);
}

#[test]
fn b040_a_stop_after_a_hole_with_the_connection_joined_again() {
    // The old session was cut at the hole and still waits to send; a new one has what came after: both lose just their own.
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 1001");
    lab.client("PA 301+100 ack 1001");
    lab.pass(1100 * MS);
    lab.client("PA 401+100 ack 2001");
    lab.sent();
    assert_eq!(lab.engine.gauges().sessions_live, 2);
    lab.engine.stop(lab.now, &mut lab.wire);
    lab.check();
    lab.stop_after();
}

#[test]
fn b033_a_connection_that_began_before_and_is_reset_is_forgotten() {
    let mut lab = Lab::new();
    lab.engine.expect_turn(lab.now, lab.client, endpoint(ONLINE));
    lab.client("R 555555");
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

/// A connection that had a request and its response, where there is room for `connections`.
fn silent_one_of(connections: usize) -> Lab {
    let mut config = config();
    config.limits.connections = connections;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.sent();
    lab
}

/// The session closes, and with it the connection is forgotten.
fn is_closed(lab: &mut Lab) {
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "FA 101 ack 51");
    lab.target("FA 51 ack 102");
    assert_eq!(lab.engine.gauges().sessions_live, 0);
    lab.pass(17 * S);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn b034_a_client_that_is_silent_over_a_weekend_keeps_its_session_where_there_is_room() {
    let mut lab = silent_one_of(2);
    lab.pass(70 * 3600 * S);
    lab.sent();
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    lab.target("PA 51+50 ack 201");
    lab.client("A 201 ack 101");
    lab.pass(72 * 3600 * S + 20 * S);
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "FA 201 ack 101");
}

#[test]
fn where_half_of_the_room_is_taken_a_client_that_keeps_alive_keeps_its_session() {
    let mut lab = silent_one_of(1);
    lab.client("A 101 ack 51");
    for _ in 0..3 {
        // Linux's timer is late by as much as its granularity is there.
        lab.pass(7200 * S + 262 * S);
        lab.client("A 100 ack 51");
    }
    lab.sent();
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
}

#[test]
fn where_half_of_the_room_is_taken_a_silent_client_is_forgotten_after_two_hours_and_a_quarter() {
    let mut lab = silent_one_of(1);
    lab.pass(8_100 * S - 10 * S);
    assert_eq!(lab.engine.gauges().sessions_live, 1);
    lab.pass(20 * S);
    is_closed(&mut lab);
}

#[test]
fn b020_a_client_that_never_ended_its_handshake_is_forgotten_as_soon_as_its_session_has_closed() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.target("SA 0 ack 1 mss 1460");
    lab.pass(62 * S);
    lab.target("FA 1 ack 2");
    assert_eq!(lab.engine.gauges().sessions_live, 0);
    lab.pass(17 * S);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}
