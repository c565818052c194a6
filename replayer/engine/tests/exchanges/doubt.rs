//! SYNs and RSTs inside a connection, which anybody can send in the client's name: none of them ends a session whose client goes on.

use crate::lab::{Lab, MS, S, config};
use replayer_engine::counters::Counter;

/// A request that was answered; the client is quiet since.
fn between_turns() -> Lab {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.pass(50 * MS);
    lab.expect(&["PA 1+100 ack 1", "A 101 ack 51"]);
    lab
}

/// A stranger's segments, numbered from an ISN that is not the client's.
fn stranger(lab: &mut Lab, isn: u32, texts: &[&str]) {
    let client = std::mem::replace(&mut lab.isns.client, isn);
    lab.client_segments(texts);
    lab.isns.client = client;
}

#[test]
fn a_reset_that_the_online_server_does_not_take_ends_nothing() {
    let mut lab = between_turns();
    // Within what a window may be and far from it, before and behind, with an acknowledgment and without.
    for text in ["R 102", "R 100", "RA 90 ack 51", "R 30000", "RA 900000 ack 40000000", "RA 3000 ack 1"] {
        lab.client(text);
        lab.pass(30 * MS);
    }
    assert_eq!(lab.count(Counter::PacketsDoubtful), 6);
    lab.expect(&[]);
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    lab.target("A 51 ack 201");
    lab.pass(2 * S);
    assert_eq!((lab.count(Counter::SessionsClientReset), lab.count(Counter::SessionsGap)), (0, 0));
    // At the very number.
    lab.client("R 201");
    lab.pass(3 * S);
    lab.expect(&["RA 201 ack 51"]);
    assert_eq!(lab.count(Counter::SessionsClientReset), 1);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn a_flood_of_resets_at_guessed_numbers_holds_nothing_and_ends_nothing() {
    let mut lab = between_turns();
    for i in 0..5_000u32 {
        // Never the next number, and mostly not near it.
        let place = 102 + i * 858_993;
        lab.client(&if i % 2 == 0 { format!("R {place}") } else { format!("RA {place} ack 51") });
    }
    assert_eq!(lab.engine.gauges().connections_live, 1);
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    lab.target("PA 51+50 ack 201");
    assert_eq!(lab.engine.gauges().held_bytes, 0);
    assert!(lab.count(Counter::PacketsDoubtful) > 500);
}

#[test]
fn b035_a_reset_whose_data_the_capture_has_missed_ends_the_session_like_a_hole() {
    let mut lab = between_turns();
    // 101..301 was never captured: the server was at the reset's number.
    lab.client("RA 301 ack 51");
    lab.pass(900 * MS);
    lab.expect(&[]);
    lab.pass(200 * MS);
    lab.expect(&["FA 101 ack 51"]);
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    assert_eq!(lab.count(Counter::SessionsGap), 1);
    // If it was a stranger's after all, nothing of the client's next request is missing.
    lab.client("PA 101+100 ack 52");
    lab.expect(&["S 100"]);
}

#[test]
fn b035_a_reset_behind_data_behind_a_hole_is_believed() {
    let mut lab = between_turns();
    lab.client("PA 201+100 ack 51");
    lab.client("R 301");
    lab.pass(3 * S);
    lab.expect(&["RA 101 ack 51"]);
    assert_eq!((lab.count(Counter::SessionsClientReset), lab.count(Counter::BytesGap)), (1, 100));
}

#[test]
fn b035_a_reset_that_has_overtaken_the_last_data_ends_the_session_after_it() {
    let mut lab = between_turns();
    lab.client("RA 201 ack 51");
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    lab.target("A 51 ack 201");
    lab.pass(3 * S);
    lab.expect(&["RA 201 ack 51"]);
    assert_eq!(lab.count(Counter::SessionsClientReset), 1);
}

#[test]
fn a_reset_behind_a_hole_is_not_believed_when_the_client_goes_on() {
    let mut lab = between_turns();
    lab.client("RA 301 ack 51");
    lab.pass(900 * MS);
    lab.client("PA 101+50 ack 51");
    lab.target("PA 51+50 ack 151");
    lab.pass(2 * S);
    lab.client("PA 151+50 ack 101");
    lab.expect(&["PA 101+50 ack 51", "A 151 ack 101", "PA 151+50 ack 101"]);
}

#[test]
fn a_syn_inside_a_connection_changes_nothing_when_its_client_goes_on() {
    let mut lab = between_turns();
    for isn in [77_000_000, 1_000_050, 900] {
        stranger(&mut lab, isn, &["S 0 mss 1460", "S 0 mss 1460"]);
    }
    lab.pass(90 * S);
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::PacketsDoubtful), 6);
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    // Not believed any more.
    stranger(&mut lab, 900, &["PA 1+10 ack 1"]);
    lab.expect(&[]);
    assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (1, 1));
}

#[test]
fn b018_a_client_that_is_reset_by_its_server_uses_its_port_again() {
    // Nothing tells here that the connection before is over. The new ISN is a little after the old one, as Linux chooses it.
    for isn in [1_050_000, 77_000_000, 999_000] {
        let mut lab = between_turns();
        let first = lab.client;
        lab.isns.client = isn;
        lab.client("S 0 mss 1460 scale 7 sackok");
        lab.expect(&[]);
        lab.client("A 1 ack 1");
        let sent = lab.sent();
        assert_eq!(lab.text(&sent[0]), "S 0", "ISN {isn}");
        let second = sent[0].source;
        assert_ne!(second, first);
        lab.client("PA 1+200 ack 1");
        lab.target_to(second, &["SA 0 ack 1 mss 1460"]);
        lab.expect(&["PA 1+200 ack 1"]);
        lab.target_to(second, &["PA 1+50 ack 201"]);
        lab.client("PA 201+100 ack 51");
        lab.client("FA 301 ack 51");
        lab.expect(&["PA 201+100 ack 51", "FA 301 ack 51"]);
        lab.target_to(second, &["FA 51 ack 302"]);
        assert_eq!(lab.count(Counter::SessionsCompleted), 1);
        // The one before is given up as any whose client is gone without a word.
        lab.pass(8_200 * S);
        lab.isns.client = 1_000_000;
        lab.target_to(first, &["FA 51 ack 102"]);
        lab.pass(20 * S);
        assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (0, 0));
    }
}

#[test]
fn b018_a_client_that_was_restarted_and_is_asked_for_the_old_connection_is_replayed() {
    let mut lab = between_turns();
    let isn = std::mem::replace(&mut lab.isns.client, 77_000_000);
    lab.client("S 0 mss 1460");
    lab.isns.client = isn;
    // The server's challenge ACK is answered by a reset, and the SYN comes again.
    lab.client("R 101");
    lab.isns.client = 77_000_000;
    lab.pass(S);
    lab.client("S 0 mss 1460");
    assert_eq!(lab.count(Counter::SessionsClientReset), 1);
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "S 0");
    assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (1, 1));
}

#[test]
fn a_whole_connection_of_a_strangers_does_not_end_the_clients() {
    let mut lab = between_turns();
    // Again and again: nothing piles up.
    for isn in [1_200_000, 77_000_000, 5, 3_000_000_000] {
        stranger(&mut lab, isn, &["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1", "PA 11+10 ack 30"]);
        lab.sent();
        lab.pass(10 * S);
        assert!(lab.engine.gauges().connections_live <= 3, "{:?}", lab.engine.gauges());
    }
    lab.sent();
    lab.client("PA 101+100 ack 51");
    let texts: Vec<_> = lab.sent().iter().map(|segment| lab.text(segment)).collect();
    assert!(texts.contains(&"PA 101+100 ack 51".to_owned()), "{texts:?}");
    lab.target("PA 51+50 ack 201");
    // It has its place again, and a reset or FIN at its number is its own.
    lab.client("FA 201 ack 101");
    lab.expect(&["FA 201 ack 101"]);
    lab.target("FA 101 ack 202");
    assert_eq!(lab.count(Counter::SessionsCompleted), 1);
    lab.stop();
}

#[test]
fn b019_fast_open_data_inside_a_connection_opens_another_and_ends_none() {
    let mut lab = between_turns();
    let first = lab.client;
    lab.isns.client = 77_000_000;
    lab.client("S 0+50 mss 1460");
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), "S 0");
    let second = sent[0].source;
    lab.target_to(second, &["SA 0 ack 1 mss 1460"]);
    // The notation numbers the data of a SYN from the SYN on, so its bytes are others.
    assert_eq!(lab.wire.take_sent()[0].payload.len(), 50);
    // The server did not take it: the client goes on.
    lab.isns.client = 1_000_000;
    lab.client("PA 101+100 ack 51");
    let sent = lab.sent();
    assert!(sent.iter().any(|segment| segment.source == first && lab.text(segment) == "PA 101+100 ack 51"));
    lab.target_to(first, &["A 51 ack 201"]);
    lab.isns.client = 77_000_000;
    lab.target_to(second, &["PA 1+10 ack 51"]);
    lab.pass(100 * MS);
    lab.expect(&["A 51 ack 11", "FA 51 ack 11"]);
}

#[test]
fn a_connection_behind_a_strangers_is_reset_at_its_number_alone() {
    let mut lab = between_turns();
    stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1"]);
    lab.client("R 102");
    lab.pass(3 * S);
    assert_eq!(lab.count(Counter::SessionsClientReset), 0);
    lab.client("R 101");
    lab.pass(3 * S);
    assert_eq!(lab.count(Counter::SessionsClientReset), 1);
}

#[test]
fn a_hole_before_a_fin_has_its_time_however_often_the_fin_comes() {
    let mut lab = between_turns();
    for _ in 0..12 {
        lab.client("FA 201 ack 51");
        // Nor do bytes that were there before give it more.
        lab.client("PA 51+50 ack 51");
        lab.pass(100 * MS);
    }
    lab.expect(&["FA 101 ack 51"]);
    assert_eq!(lab.count(Counter::SessionsGap), 0);
    lab.target("FA 51 ack 102");
    assert_eq!(lab.count(Counter::SessionsGap), 1);
}

#[test]
fn bytes_that_come_in_order_give_a_hole_before_a_fin_more_time() {
    let mut lab = between_turns();
    // The tail of the request was lost before the server, too; the client repeats it segment by segment.
    lab.client("FA 401 ack 51");
    for begin in [101, 201, 301] {
        lab.pass(600 * MS);
        let text = format!("PA {begin}+100 ack 51");
        lab.client(&text);
        let both: [&str; 2] = [&text, "FA 401 ack 51"];
        lab.expect(if begin < 301 { &both[..1] } else { &both });
        lab.target(&format!("A 51 ack {}", begin + 100));
    }
    assert_eq!(lab.count(Counter::SessionsGap), 0);
}

#[test]
fn a_strangers_fin_ends_nothing_when_the_client_goes_on_after_it() {
    let mut lab = between_turns();
    // Behind what the client has sent, and ahead of it.
    lab.client("FA 50 ack 51");
    lab.pass(2 * S);
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    lab.target("PA 51+50 ack 201");
    lab.pass(50 * MS);
    lab.client("FA 251 ack 101");
    lab.client("PA 201+100 ack 101");
    lab.target("PA 101+50 ack 301");
    lab.pass(3 * S);
    lab.client("PA 301+100 ack 151");
    lab.target("PA 151+50 ack 401");
    lab.pass(3 * S);
    let segments = lab.sent();
    let texts = segments.iter().map(|segment| lab.text(segment));
    let sent: Vec<String> = texts.filter(|text| text.starts_with("PA")).collect();
    assert_eq!(sent, ["PA 201+100 ack 101", "PA 301+100 ack 151"]);
    assert_eq!((lab.count(Counter::SessionsGap), lab.count(Counter::SessionsCompleted)), (0, 0));
}

#[test]
fn after_a_strangers_data_far_ahead_the_client_is_joined_again() {
    let mut lab = between_turns();
    lab.client("PA 200000101+1 ack 51");
    lab.pass(3 * S);
    assert_eq!(lab.count(Counter::SessionsGap) + lab.engine.gauges().sessions_live, 1);
    lab.client("PA 101+100 ack 51");
    lab.client("PA 201+100 ack 101");
    assert_eq!(lab.count(Counter::ConnectionsJoined), 1);
}

#[test]
fn with_no_room_for_another_connection_the_one_that_is_there_goes_on() {
    let mut config = config();
    config.limits.connections = 1;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1"]);
    lab.sent();
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
}
