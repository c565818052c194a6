//! Opening sessions: lost segments, data that comes early, targets that refuse, old connections, joining in the middle.

use crate::lab::{CLIENT, Lab, MS, ONLINE, S, config, endpoint};
use replayer_engine::counters::Counter;

#[test]
fn the_syn_offers_what_the_client_offered() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1400 scale 9 sackok ts 77/0");
    let sent = lab.sent();
    assert_eq!(sent.len(), 1);
    let syn = &sent[0];
    assert_eq!(lab.text(syn), "S 0");
    assert_eq!((syn.source, syn.destination), (endpoint(CLIENT), endpoint("10.0.2.1:8080")));
    assert_eq!((syn.mss, syn.window_scale, syn.sack_permitted), (Some(1400), Some(9), true));
    assert_eq!(syn.timestamps, Some((77, 0)));
}

#[test]
fn b012_data_is_held_until_the_handshake_and_sent_once() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.expect(&["S 0"]);
    lab.client("A 1 ack 1");
    lab.client("PA 1+100 ack 1");
    lab.expect(&[]);
    lab.pass(200 * MS);
    lab.expect(&[]);
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("A 1 ack 101");
    lab.pass(2 * S);
    lab.expect(&[]);
    assert_eq!(lab.engine.gauges().held_bytes, 0);
}

#[test]
fn b015_a_lost_syn_is_sent_again_after_a_second_and_then_less_often() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.expect(&["S 0"]);
    lab.pass(990 * MS);
    lab.expect(&[]);
    lab.pass(20 * MS);
    lab.expect(&["S 0"]);
    lab.pass(1980 * MS);
    lab.expect(&[]);
    lab.pass(40 * MS);
    lab.expect(&["S 0"]);
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["A 1 ack 1"]);
}

#[test]
fn b015_a_repeated_syn_ack_is_acknowledged_again() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["A 1 ack 1"]);
}

#[test]
fn a_silent_target_gets_a_bounded_number_of_syns_and_a_reset() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.client("PA 1+10 ack 1");
    lab.pass(60 * S);
    // The reset: should it be only its answers that are lost, it has a half-open connection.
    lab.expect(&["S 0", "S 0", "S 0", "S 0", "S 0", "S 0", "S 0", "S 0", "R 1"]);
    assert_eq!(lab.count(Counter::SessionsHandshakeTimeout), 1);
    assert_eq!(lab.count(Counter::LostHandshakeTimeout), 10);
}

#[test]
fn b016_a_refusing_target_gets_few_syns_and_is_found_again() {
    let mut lab = Lab::new();
    let mut syns = 0;
    // 900 connections within a second.
    for i in 0..900 {
        lab.client.port = 10_000 + i;
        lab.client("S 0 mss 1460");
        for syn in lab.sent() {
            syns += 1;
            lab.target_to(syn.source, &["RA 0 ack 1"]);
            assert!(lab.sent().is_empty(), "a refusal needs no answer");
        }
        lab.pass(MS);
    }
    assert!((10..=21).contains(&syns), "{syns} SYNs: one in 50 ms");
    assert_eq!(lab.count(Counter::SessionsRefused), syns);
    assert_eq!(lab.count(Counter::SessionsRefusedTargetDown), 900 - syns);
    assert_eq!(lab.engine.gauges().sessions_live, 0);
    // It is back: the next probe goes through, and from then on all.
    lab.pass(60 * MS);
    for port in 5000..5010 {
        lab.client.port = port;
        lab.client("S 0 mss 1460");
        lab.expect(&["S 0"]);
        lab.target("SA 0 ack 1 mss 1460");
        lab.expect(&["A 1 ack 1"]);
    }
}

#[test]
fn b016_a_target_that_was_down_before_a_long_weekend_is_probed_after_it() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.target("RA 0 ack 1");
    lab.sent();
    // More than half the time after which the tick wraps.
    lab.pass(45 * 3600 * S);
    lab.client.port += 1;
    lab.client("S 0 mss 1460");
    lab.expect(&["S 0"]);
}

#[test]
fn b017_an_old_connection_of_the_same_addresses_is_reset_and_the_syn_goes_again() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460 ts 100/0");
    lab.expect(&["S 0"]);
    // A challenge ACK (RFC 5961 section 4) of the old connection.
    lab.target("A 777 ack 555 ts 1/1");
    let sent = lab.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(lab.text(&sent[0]), "R 555");
    // A clock that is behind the old connection's would fail PAWS, which Linux applies to an RST in TIME-WAIT.
    assert_eq!(sent[0].timestamps, None);
    lab.pass(10 * MS);
    lab.expect(&["S 0"]);
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["A 1 ack 1"]);
}

#[test]
fn b019_fast_open_data_comes_after_the_handshake() {
    let mut lab = Lab::new();
    lab.client("S 0+50 mss 1460");
    // The notation numbers payload from the SYN on; the SYN takes one number.
    assert_eq!(lab.count(Counter::BytesAccepted), 50);
    let sent = lab.wire.take_sent();
    assert_eq!(sent.len(), 1);
    assert!(sent[0].payload.is_empty());
    lab.target("SA 0 ack 1 mss 1460");
    let sent = lab.wire.take_sent();
    assert_eq!((sent.len(), sent[0].payload.len()), (1, 50));
    assert_eq!(sent[0].seq, lab.isns.client + 1);
}

#[test]
fn b019_the_turn_after_fast_open_data_waits_for_its_response() {
    let mut lab = Lab::new();
    lab.client("S 0+50 mss 1460");
    lab.target("SA 0 ack 1 mss 1460");
    // A SYN acknowledges nothing; the segment after it says where the server's stream begins.
    lab.client("A 51 ack 1");
    lab.target("A 1 ack 51");
    lab.wire.take_sent();
    lab.client("PA 51+10 ack 301");
    lab.target("A 1+200 ack 51");
    assert_eq!(lab.wire.take_sent().len(), 0);
    lab.target("PA 201+100 ack 51");
    let sent = lab.wire.take_sent();
    assert_eq!((sent.len(), sent[0].payload.len()), (1, 10));
    assert_eq!(lab.count(Counter::TurnsReleasedByBytes), 1);
}

#[test]
fn b013_an_idle_connection_that_was_open_before_is_joined_at_its_next_request() {
    let mut lab = Lab::new();
    lab.engine.expect_turn(lab.now, lab.client, endpoint(ONLINE));
    lab.client("PA 5001+100 ack 9000");
    lab.expect(&["S 5000"]);
    lab.target("SA 0 ack 5001 mss 1460");
    lab.expect(&["PA 5001+100 ack 1"]);
    assert_eq!(lab.count(Counter::ConnectionsJoined), 1);
}

#[test]
fn b013_new_connections_only() {
    let mut config = config();
    config.new_connections_only = true;
    let mut lab = Lab::with(config);
    lab.engine.expect_turn(lab.now, lab.client, endpoint(ONLINE));
    lab.client("PA 5001+100 ack 9000");
    lab.client("PA 5101+100 ack 9500");
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::PacketsMidstream), 2);
    lab.client.port += 1;
    lab.handshake();
}

#[test]
fn b014_the_rest_of_a_request_is_not_sent_the_next_request_is() {
    let mut lab = Lab::new();
    lab.client("A 500001+1448 ack 100");
    lab.client("A 501449+1448 ack 100");
    lab.client("PA 502897+500 ack 100");
    lab.expect(&[]);
    // The client has read the response: this begins a request.
    lab.client("PA 503397+200 ack 400");
    lab.expect(&["S 503396"]);
    lab.target("SA 0 ack 503397 mss 1460");
    lab.expect(&["PA 503397+200 ack 1"]);
    assert_eq!(lab.count(Counter::BytesMidstream), 1448 + 1448 + 500);
}

#[test]
fn b014_a_hole_before_what_seems_to_begin_a_request_is_no_beginning() {
    let mut lab = Lab::new();
    lab.client("PA 1000+100 ack 100");
    lab.client("PA 1200+100 ack 200");
    lab.expect(&[]);
    lab.client("PA 1300+100 ack 300");
    lab.expect(&["S 1299"]);
}

#[test]
fn a_session_opened_later_has_a_clock_that_went_on() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460 ts 5000/0");
    lab.target("SA 0 ack 1 mss 1460 ts 9/5000");
    lab.sent();
    lab.client("PA 1+10 ack 1 ts 5001/1");
    lab.target("PA 1+10 ack 11 ts 10/5001");
    lab.pass(3 * S);
    lab.target("RA 11 ack 11");
    lab.sent();
    lab.client("PA 11+10 ack 11 ts 8001/2");
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), "S 10");
    // Less than before would fail the target's PAWS when it remembers the connection.
    assert_eq!(sent[0].timestamps.map(|(value, _)| value), Some(8000));
}

#[test]
fn b015_in_a_burst_of_syns_each_session_begins_with_one_segment() {
    let mut lab = Lab::new();
    for port in 0..6 {
        lab.client.port = 10_000 + port;
        lab.client("S 0 mss 1460");
        lab.client("A 1+700 ack 1");
        lab.client("A 701+700 ack 1");
        lab.client("PA 1401+100 ack 1");
    }
    lab.sent();
    let all = ["A 1+700 ack 1", "A 701+700 ack 1", "PA 1401+100 ack 1"];
    for port in 0..6 {
        lab.client.port = 10_000 + port;
        lab.target("SA 0 ack 1 mss 1460 win 60000");
        if port < 4 {
            lab.expect(&all);
            continue;
        }
        // The target may know of this one only by its first segment (SYN cookies), which must not be overtaken by the others.
        lab.expect(&all[..1]);
        if port == 5 {
            // It is lost.
            lab.pass(230 * MS);
            let mut sent = lab.sent();
            sent.retain(|segment| segment.source == lab.client);
            assert_eq!(sent.iter().map(|segment| lab.text(segment)).collect::<Vec<_>>(), all[..1]);
        }
        lab.target("A 1 ack 701");
        lab.expect(&all[1..]);
    }
}

#[test]
fn b015_after_a_burst_nothing_but_the_first_segment_s_number_is_sent_before_it_is_acknowledged() {
    let mut lab = Lab::new();
    for port in 0..5 {
        lab.client.port = 10_000 + port;
        lab.client("S 0 mss 1460");
        lab.target("SA 0 ack 1 mss 1460 win 60000");
    }
    lab.sent();
    // Five at once: the sessions of the next minute are careful.
    for port in 0..5 {
        lab.client.port = 11_000 + port;
        lab.client("S 0 mss 1460");
    }
    lab.pass(30 * S);
    lab.sent();
    lab.client.port = 12_000;
    lab.client("S 0 mss 1460");
    lab.client("A 1+1400 ack 1");
    lab.client("PA 1401+100 ack 1");
    lab.expect(&["S 0"]);
    lab.target("SA 0 ack 1 mss 1460 win 60000");
    lab.expect(&["A 1+1400 ack 1"]);
    // It is lost, and the target answered the SYN twice.
    lab.target("SA 0 ack 1 mss 1460 win 60000");
    lab.expect(&["A 1 ack 1"]);
    // Lost again and again: whether the target lives is asked with the first byte.
    let mut sent = Vec::new();
    while !sent.contains(&"A 1+1 ack 1".to_owned()) {
        lab.pass(100 * MS);
        let of_it = lab.sent().into_iter().filter(|segment| segment.source == lab.client);
        sent.extend(of_it.map(|segment| lab.text(&segment)).collect::<Vec<_>>());
        assert!(sent.len() < 10 && sent.iter().all(|text| text.starts_with("A 1+1")), "{sent:?}");
    }
    lab.target("A 1 ack 2");
    lab.target("A 1 ack 1401");
    lab.expect(&["PA 1401+100 ack 1"]);
    // A minute later nothing speaks against two at once.
    lab.pass(61 * S);
    lab.client.port = 13_000;
    lab.client("S 0 mss 1460");
    lab.client("A 1+1400 ack 1");
    lab.client("PA 1401+100 ack 1");
    lab.sent();
    lab.target("SA 0 ack 1 mss 1460 win 60000");
    lab.expect(&["A 1+1400 ack 1", "PA 1401+100 ack 1"]);
}

#[test]
fn b029_an_old_duplicate_of_the_target_moves_nothing() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460 ts 5000/0");
    lab.target("SA 0 ack 1 mss 1460 ts 9000/5000");
    lab.client("PA 1+10 ack 1 ts 5001/9001");
    lab.target("PA 1+10 ack 11 ts 9010/5001");
    lab.pass(50 * MS);
    lab.sent();
    // Of an older connection with these addresses: its number lies within the window.
    lab.target("PA 5001+100 ack 11 ts 8000/5001");
    let sent = lab.sent();
    assert_eq!(sent.iter().map(|segment| lab.text(segment)).collect::<Vec<_>>(), ["A 11 ack 11"]);
    lab.target("FA 11 ack 11 ts 8009/5001");
    let sent = lab.sent();
    assert_eq!(sent.iter().map(|segment| lab.text(segment)).collect::<Vec<_>>(), ["A 11 ack 11"]);
    // A segment that overtook another does not make that one old.
    lab.client("PA 11+10 ack 1 ts 5100/9001");
    lab.target("A 31+20 ack 11 ts 9030/5001");
    lab.target("PA 11+20 ack 21 ts 9020/5100");
    assert_eq!(lab.count(Counter::ReplayBytesDelivered), 20);
}
