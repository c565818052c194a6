//! What anybody can send in the name of a connection's client: none of it ends a session whose client goes on.

use crate::lab::{Lab, MS, ONLINE, S, config, endpoint, numbers};
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

/// The client goes on with its session, and with none else.
#[track_caller]
fn goes_on(lab: &mut Lab) {
    lab.sent();
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    lab.target("PA 51+50 ack 201");
    lab.pass(50 * MS);
    lab.client("PA 201+100 ack 101");
    lab.expect(&["A 201 ack 101", "PA 201+100 ack 101"]);
    lab.target("A 101 ack 301");
    assert_eq!((lab.count(Counter::SessionsGap), lab.count(Counter::ConnectionsJoined)), (0, 0));
    assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().held_bytes), (1, 0));
}

#[test]
fn a_strangers_data_or_fin_far_ahead_ends_nothing_however_long_the_client_is_silent() {
    let far = [
        "PA 200000101+1 ack 51",
        "PA 1048678+1400 ack 51",
        // Near, with an acknowledgment that is not.
        "PA 300+100 ack 300000000",
        "PA 300+100 ack -300000000",
        "FA 200000101 ack 51",
        "FA 300 ack 300000000",
        "FPA 200000101+10 ack 51",
    ];
    for text in far {
        let mut lab = between_turns();
        lab.client(text);
        lab.pass(3 * S);
        assert_eq!(lab.engine.pending().out_of_order_bytes, 0, "{text}");
        lab.pass(1_000 * S);
        goes_on(&mut lab);
    }
    // One after another, and each with what follows it: but for one connection, nothing piles up.
    let mut lab = between_turns();
    for text in far {
        lab.client_segments(&[text, "PA 90000000+10 ack 7", "PA 90000010+10 ack 17", "R 90000020"]);
        lab.pass(2 * S);
        lab.client_segments(&["PA 90000020+10 ack 27", "PA 3000000000+10 ack 27"]);
        assert!(lab.engine.gauges().connections_live <= 2);
    }
    let gap = lab.count(Counter::SessionsGap);
    assert_eq!(gap, 0);
    lab.sent();
    lab.client("PA 101+100 ack 51");
    let texts: Vec<_> = lab.sent().iter().map(|segment| lab.text(segment)).collect();
    assert!(texts.contains(&"PA 101+100 ack 51".to_owned()), "{texts:?}");
    lab.stop();
}

#[test]
fn a_flood_of_data_at_guessed_numbers_ends_no_session() {
    let mut lab = between_turns();
    // Never within what a capture may have missed.
    for i in 0..400u32 {
        let (place, ack) = (1_500_000 + i * 10_730_000, u64::from(i) * 10_737_419);
        lab.client(&format!("PA {place}+100 ack {ack}"));
        if i % 10 == 0 {
            lab.pass(1_100 * MS);
        }
        assert!(lab.engine.gauges().connections_live <= 2);
    }
    lab.pass(10 * S);
    assert_eq!(lab.engine.gauges().sessions_live, 1);
    goes_on(&mut lab);
}

#[test]
fn a_strangers_data_far_ahead_of_a_busy_client_is_not_held_for_long() {
    for text in ["PA 200000101+1400 ack 51", "PA 2000+1400 ack 300000000", "FA 200000101 ack 51"] {
        let mut lab = between_turns();
        lab.client(text);
        for i in 0..12 {
            let text = format!("A {}+10 ack 51", 101 + i * 10);
            lab.client(&text);
            lab.target(&format!("A 51 ack {}", 111 + i * 10));
            // Never silent for as long as a hole may be open.
            lab.pass(100 * MS);
        }
        assert_eq!(lab.engine.pending().out_of_order_bytes, 0, "{text}");
        // It went on after that: the hole was not the client's.
        lab.pass(10 * S);
        assert_eq!((lab.count(Counter::SessionsGap), lab.engine.gauges().connections_live), (0, 1), "{text}");
    }
}

#[test]
fn much_data_at_guessed_numbers_is_not_much_data_behind_a_hole() {
    let mut lab = between_turns();
    for i in 1..100 {
        lab.client(&format!("PA {}+1400 ack 51", i * 2_500_000));
    }
    lab.pass(3 * S);
    goes_on(&mut lab);
}

#[test]
fn b031_a_wide_hole_that_is_being_filled_has_its_time() {
    let mut lab = between_turns();
    let (begin, end) = (101, 101 + 800 * 1400);
    for i in 0..100 {
        lab.client(&format!("A {}+1400 ack 51", end + i * 1400));
    }
    for i in 0..800 {
        lab.client(&format!("A {}+1400 ack 51", begin + i * 1400));
        lab.target(&format!("A 51 ack {}", begin + (i + 1) * 1400));
        // Until it is as wide as a capture may have missed it takes longer than a hole may be open.
        lab.pass(if i < 60 { 25 * MS } else { MS });
        lab.sent();
    }
    assert_eq!(lab.count(Counter::BytesAccepted), 100 + 900 * 1400);
    assert_eq!((lab.count(Counter::BytesGap), lab.engine.gauges().connections_live), (0, 1));
}

#[test]
fn b033_a_client_that_goes_on_far_behind_a_hole_is_joined_there() {
    // More than is taken for the client's at once, and more than there may be between two segments of a stream.
    for missed in [2_000_000, 250_000_000, 300_000_000, 3_000_000_000u32] {
        for copies in [500_000, 1_000_000] {
            let mut config = config();
            config.copies_millionths = copies;
            let mut lab = Lab::with(config);
            // Of half a copy for each, it is every other connection's.
            if copies < 1_000_000 {
                lab.client("S 0");
                lab.client("R 1");
                lab.sent();
            }
            lab.handshake();
            lab.client("PA 1+100 ack 1");
            lab.target("PA 1+50 ack 101");
            lab.pass(50 * MS);
            lab.sent();
            let place = 101 + missed;
            lab.client(&format!("PA {place}+100 ack 51"));
            lab.pass(2 * S);
            lab.expect(&[]);
            lab.client(&format!("PA {}+100 ack 151", place + 100));
            let sent = lab.sent();
            assert_eq!(lab.text(&sent[0]), format!("S {}", place + 99), "{missed}");
            assert_eq!(lab.count(Counter::ConnectionsJoined), 1, "{missed}, {copies}");
            // The session before was left in the middle, like any other whose client is gone without a word.
            lab.pass(8_300 * S);
            lab.target("FA 51 ack 102");
            lab.pass(20 * S);
            assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (0, 1));
        }
    }
}

#[test]
fn b033_behind_a_wide_hole_much_data_is_the_clients() {
    let mut lab = between_turns();
    for i in 0..50 {
        lab.client(&format!("A {}+1400 ack 51", 20_000_000 + i * 1400));
    }
    lab.pass(1_100 * MS);
    lab.expect(&["FA 101 ack 51"]);
    lab.target("FA 51 ack 102");
    assert_eq!(lab.count(Counter::SessionsGap), 1);
    assert_eq!(lab.engine.gauges().connections_live, 1);
}

#[test]
fn a_reset_at_the_end_of_a_strangers_data_is_not_believed() {
    for texts in [["PA 200000101+10 ack 51", "R 200000111"], ["FA 200000101 ack 51", "R 200000102"]] {
        let mut lab = between_turns();
        lab.client_segments(&texts);
        lab.pass(3 * S);
        assert_eq!(lab.count(Counter::SessionsClientReset), 0);
        goes_on(&mut lab);
    }
}

#[test]
fn a_strangers_fin_does_not_take_the_place_of_the_clients_behind_a_hole() {
    let mut lab = between_turns();
    lab.client_segments(&["FA 201 ack 51", "FA 200000101 ack 51", "PA 101+100 ack 51"]);
    lab.expect(&["PA 101+100 ack 51", "FA 201 ack 51"]);
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

/// Connections without a session that a stranger would like to have replaced: what there was before, and the client's next segments, the last of
/// which opens a session.
fn without_sessions() -> Vec<(&'static str, Lab, [&'static str; 2])> {
    let watched = {
        let mut lab = Lab::new();
        lab.client("PA 101+100 ack 51");
        lab
    };
    let between_turns = {
        let mut lab = Lab::new();
        lab.engine.expect_turn(lab.now, lab.client, endpoint(ONLINE));
        lab
    };
    let refused = {
        let mut config = config();
        config.limits.sessions = 2;
        let mut lab = Lab::with(config);
        for port in [40_001, 40_002, 40_000] {
            lab.client.port = port;
            lab.client("S 0 mss 1460");
        }
        lab.client_segments(&["A 1 ack 1", "PA 1+200 ack 1"]);
        lab.pass(100 * S);
        assert_eq!(lab.engine.gauges().sessions_live, 0);
        lab.sent();
        lab
    };
    vec![
        ("watched", watched, ["PA 201+100 ack 51", "PA 301+100 ack 101"]),
        ("between turns", between_turns, ["A 301 ack 101", "PA 301+100 ack 101"]),
        ("refused", refused, ["PA 201+100 ack 1", "PA 301+100 ack 101"]),
    ]
}

#[test]
fn b013_a_strangers_connection_does_not_replace_one_that_has_no_session() {
    for (name, mut lab, [next, last]) in without_sessions() {
        stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1"]);
        lab.pass(S);
        lab.sent();
        lab.client(next);
        lab.client(last);
        let sent = lab.sent();
        assert!(sent.iter().any(|segment| lab.text(segment) == "S 300"), "{name}: {sent:?}");
        lab.stop();
    }
}

#[test]
fn a_connection_without_a_session_behind_another_is_forgotten_after_a_while() {
    for (name, mut lab, _) in without_sessions() {
        stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1"]);
        assert_eq!(lab.engine.gauges().connections_live, 2, "{name}");
        lab.pass(400 * S);
        assert_eq!(lab.engine.gauges().connections_live, 1, "{name}");
    }
}

#[test]
fn a_strangers_connection_does_not_replace_one_that_is_tls() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client_bytes("PA 1 ack 1", &[0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3, 9, 9, 9]);
    lab.target("FA 1 ack 2");
    lab.client_bytes("PA 15 ack 4000", &[0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5]);
    stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1"]);
    lab.client_bytes("PA 25 ack 5000", &[0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5]);
    assert_eq!((lab.count(Counter::PacketsTls), lab.count(Counter::ConnectionsTls)), (3, 1));
}

#[test]
fn a_syn_inside_a_connection_that_is_not_replayed_is_forgotten_when_its_client_goes_on() {
    for (name, mut lab, [next, _]) in without_sessions() {
        if name == "between turns" {
            continue;
        }
        stranger(&mut lab, 77_000_000, &["S 0 mss 1460"]);
        lab.client(next);
        stranger(&mut lab, 77_000_000, &["A 1 ack 1", "PA 1+10 ack 1"]);
        assert_eq!(lab.engine.gauges().connections_live, 1, "{name}");
        let sent = lab.sent();
        assert!(!sent.iter().any(|segment| segment.seq == 77_000_000), "{name}: {sent:?}");
    }
    // Of no copy.
    let mut config = config();
    config.copies_millionths = 500_000;
    let mut lab = Lab::with(config);
    lab.client_segments(&["S 0", "A 1 ack 1", "PA 1+10 ack 1"]);
    stranger(&mut lab, 77_000_000, &["S 0 mss 1460"]);
    lab.client("PA 11+10 ack 1");
    stranger(&mut lab, 77_000_000, &["A 1 ack 1", "PA 1+10 ack 1"]);
    assert_eq!(lab.engine.gauges().connections_live, 1);
    assert_eq!(lab.count(Counter::PacketsSampledOut), 3);
}

#[test]
fn a_strangers_fin_ends_no_connection_that_is_not_replayed() {
    for (name, mut lab, [next, last]) in without_sessions() {
        if name != "watched" {
            continue;
        }
        lab.client("FA 50000000 ack 51");
        lab.client(next);
        lab.client(last);
        lab.expect(&["S 300"]);
    }
    let mut lab = Lab::new();
    lab.handshake();
    lab.client_bytes("PA 1 ack 1", &[0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3, 9, 9, 9]);
    lab.target("FA 1 ack 2");
    lab.client("FA 50000000 ack 51");
    lab.client_bytes("PA 15 ack 4000", &[0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5]);
    assert_eq!(lab.count(Counter::PacketsTls), 3);
    lab.client("FA 25 ack 51");
    assert_eq!(lab.engine.gauges().connections_live, 0);
    // Of every other connection's copy it is not this one's; nor is it another connection after a stranger's FIN.
    let mut config = config();
    config.copies_millionths = 500_000;
    let mut lab = Lab::with(config);
    lab.client_segments(&["S 0", "A 1 ack 1", "PA 1+10 ack 1", "FA 50000000 ack 51", "PA 11+10 ack 51"]);
    assert_eq!(lab.count(Counter::PacketsSampledOut), 3);
    lab.client("FA 21 ack 51");
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

/// A client's first connection, which its server reset, is behind the second.
fn reset_by_its_server() -> Lab {
    let mut lab = between_turns();
    stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1"]);
    lab.sent();
    assert_eq!(lab.engine.gauges().connections_live, 2);
    lab
}

#[test]
fn a_connection_has_its_place_again_only_with_an_acknowledgment_of_its_own() {
    let mut lab = reset_by_its_server();
    // Near the first one's number, not near what it has read.
    lab.client("PA 900+10 ack 300000000");
    lab.client("PA 900+10 ack -300000000");
    stranger(&mut lab, 77_000_000, &["PA 11+10 ack 1"]);
    lab.pass(3 * S);
    assert_eq!((lab.count(Counter::PacketsData), lab.engine.gauges().sessions_live), (3, 2));
    assert_eq!(lab.count(Counter::SessionsGap), 0);
}

#[test]
fn who_guesses_a_number_of_the_connection_before_does_not_end_the_one_in_its_place() {
    let mut lab = reset_by_its_server();
    let second = lab.engine.counters()[Counter::SessionsOpened];
    lab.client("PA 900+10 ack 51");
    stranger(&mut lab, 77_000_000, &["PA 11+10 ack 1"]);
    lab.pass(3 * S);
    stranger(&mut lab, 77_000_000, &["PA 21+10 ack 1"]);
    // Its own data, one after the other, and of the second session.
    assert_eq!(lab.count(Counter::SessionsOpened), second);
    assert_eq!(lab.count(Counter::ReplayBytesOffered), 100 + 10 + 10 + 10);
}

#[test]
fn a_connection_before_that_was_reset_does_not_have_its_place_again() {
    let mut lab = reset_by_its_server();
    // Its session is in the middle of a turn, and ends after that.
    lab.client("PA 101+100 ack 51");
    stranger(&mut lab, 88_000_000, &["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1"]);
    lab.client("R 201");
    assert_eq!(lab.engine.gauges().sessions_live, 3);
    lab.client("PA 201+10 ack 51");
    stranger(&mut lab, 88_000_000, &["PA 11+10 ack 1"]);
    lab.pass(S);
    // Of the third connection: nothing of it was lost.
    assert_eq!(lab.count(Counter::BytesGap) + lab.count(Counter::BytesAfterEnd), 0);
    assert_eq!(lab.count(Counter::ReplayBytesOffered), 100 + 10 + 100 + 10 + 10);
}

#[test]
fn b028_a_strangers_data_far_ahead_that_reaches_a_limit_is_dropped_and_the_sessions_stay() {
    // Each byte takes a block; the acknowledgment fits or not. From the end on, then between what is held: then the places take many steps.
    for ack in ["51", "300000000"] {
        for step in [2, -2] {
            let mut lab = between_turns();
            for i in 0..6_000 {
                lab.client(&format!("A {}+1 ack {ack}", 200_000_000 + step * i));
            }
            assert!(lab.count(Counter::PacketsLimit) > 0, "{ack}, {step}");
            assert_eq!(lab.count(Counter::SessionsLimit), 0, "{ack}, {step}");
            goes_on_after(&mut lab, 3 * S);
        }
        let mut lab = between_turns();
        for i in 0..2_000 {
            lab.client(&format!("A {}+1 ack {ack}", 200_000_000 + 4 * i));
        }
        for i in 0..2_000 {
            // Now at the one end of them, now at the other.
            let place = if i % 2 == 0 { i } else { 2_000 - i };
            lab.client(&format!("A {}+1 ack {ack}", 200_000_002 + 4 * place));
        }
        assert!(lab.count(Counter::PacketsLimit) > 0, "{ack}");
        assert_eq!(lab.count(Counter::SessionsLimit), 0, "{ack}");
        goes_on_after(&mut lab, 3 * S);
    }
}

/// The client goes on once what a stranger sent has had its time.
#[track_caller]
fn goes_on_after(lab: &mut Lab, time: u64) {
    lab.pass(time);
    assert_eq!(lab.engine.pending().out_of_order_bytes, 0);
    goes_on(lab);
}

#[test]
fn b028_a_strangers_data_far_ahead_takes_no_room_from_the_clients() {
    let mut lab = between_turns();
    // All blocks but one.
    for i in 0..4_095 {
        lab.client(&format!("A {}+1 ack 51", 200_000_000 + 2 * i));
    }
    assert_eq!(lab.count(Counter::PacketsLimit), 0);
    lab.client("PA 101+1000 ack 51");
    lab.expect(&["PA 101+1000 ack 51"]);
    assert_eq!((lab.count(Counter::SessionsLimit), lab.count(Counter::BytesLimit)), (0, 4_095));
    // Nor is what the client sends behind a hole dropped with that.
    for i in 0..4_090 {
        lab.client(&format!("A {}+1 ack 51", 200_000_000 + 2 * i));
        if i == 2_000 {
            lab.client("PA 1201+100 ack 51");
        }
    }
    lab.client("PA 1301+1000 ack 51");
    lab.client("PA 1301+1000 ack 51");
    assert_eq!(lab.count(Counter::SessionsLimit), 0);
    assert_eq!(lab.engine.pending().out_of_order_bytes, 1_100);
    lab.client("PA 1101+100 ack 51");
    lab.expect(&["PA 1101+100 ack 51", "PA 1201+100 ack 51", "PA 1301+1000 ack 51"]);
}

#[test]
fn b028_a_strangers_data_far_ahead_sheds_nothing_where_the_store_is_full() {
    let mut config = config();
    config.limits.held_bytes = 64 * 256;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.pass(50 * MS);
    for i in 0..100 {
        lab.client(&format!("A {}+1 ack 51", 200_000_000 + 2 * i));
    }
    assert!(lab.count(Counter::PacketsLimit) > 0);
    assert_eq!(lab.count(Counter::SessionsLimit), 0);
    goes_on_after(&mut lab, 3 * S);
}

#[test]
fn where_no_connection_can_be_put_beside_it_a_strangers_data_far_ahead_ends_nothing() {
    // The table is full.
    let mut config = config();
    config.limits.connections = 1;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+50 ack 101");
    lab.pass(50 * MS);
    lab.client("PA 200000101+10 ack 51");
    goes_on_after(&mut lab, 3 * S);
    // The client has used its port again, and the connection before is still there.
    let mut lab = between_turns();
    lab.isns.client = 77_000_000;
    lab.client_segments(&["S 0 mss 1460", "A 1 ack 1", "PA 1+100 ack 1"]);
    let second = lab.sent()[0].source;
    lab.target_to(second, &["SA 0 ack 1 mss 1460"]);
    lab.sent();
    lab.target_to(second, &["PA 1+50 ack 101"]);
    lab.pass(50 * MS);
    assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (2, 2));
    lab.sent();
    for place in ["200000101", "3000000000"] {
        lab.client(&format!("PA {place}+10 ack 51"));
        lab.pass(3 * S);
    }
    lab.client("PA 101+100 ack 51");
    lab.expect(&["PA 101+100 ack 51"]);
    assert_eq!((lab.count(Counter::SessionsGap), lab.count(Counter::ConnectionsJoined)), (0, 0));
    lab.stop();
}

#[test]
fn a_strangers_fin_far_behind_a_hole_that_is_given_up_is_not_the_end() {
    let mut lab = between_turns();
    // 101..201 was never captured.
    lab.client_segments(&["PA 201+100 ack 51", "FA 200000101 ack 51"]);
    lab.pass(1_100 * MS);
    lab.expect(&["FA 101 ack 51"]);
    lab.client("PA 301+100 ack 151");
    lab.expect(&["S 300"]);
    assert_eq!(lab.count(Counter::PacketsAfterEnd), 0);
    lab.stop();
}

#[test]
fn a_strangers_data_far_ahead_does_not_take_the_clients_fin_away() {
    let mut lab = between_turns();
    // 101..201 was never captured.
    lab.client_segments(&["FA 201 ack 51", "PA 200000101+10 ack 51"]);
    lab.pass(1_100 * MS);
    lab.expect(&["FA 101 ack 51"]);
    lab.target("FA 51 ack 102");
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn a_connection_that_has_ended_behind_a_hole_is_not_joined() {
    let mut lab = between_turns();
    lab.client_segments(&["PA 201+100 ack 51", "FA 301 ack 51"]);
    lab.pass(1_100 * MS);
    lab.expect(&["FA 101 ack 51"]);
    lab.client_segments(&["PA 301+100 ack 151", "PA 201+100 ack 51"]);
    lab.expect(&[]);
    assert_eq!((lab.count(Counter::PacketsAfterEnd), lab.count(Counter::PacketsDuplicate)), (1, 1));
    lab.target("FA 51 ack 102");
    lab.expect(&["A 102 ack 52"]);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn a_strangers_acknowledgment_behind_a_hole_does_not_say_what_the_client_has_read() {
    let mut lab = between_turns();
    lab.client_segments(&["PA 201+100 ack 51", "PA 301+1 ack 900000000"]);
    lab.pass(1_100 * MS);
    lab.expect(&["FA 101 ack 51"]);
    lab.client("PA 302+100 ack 151");
    lab.expect(&["S 301"]);
    lab.stop();
}

#[test]
fn what_a_client_repeats_behind_a_strangers_connection_is_its_own() {
    // The last data once more, its last byte, a keepalive probe, and the same with an acknowledgment far from the last.
    let repeated = ["PA 1+100 ack 51", "PA 51+50 ack 51", "A 100+1 ack 51", "A 100+1 ack 300000000"];
    for text in repeated {
        for (name, forgotten) in [("SYN", false), ("data", false), ("data", true)] {
            let mut lab = between_turns();
            if name == "data" {
                lab.client("PA 200000101+10 ack 51");
                lab.pass(2 * S);
            } else {
                stranger(&mut lab, 77_000_000, &["S 0 mss 1460", "A 1 ack 1"]);
            }
            assert_eq!(lab.engine.gauges().connections_live, 2, "{name}");
            if forgotten {
                lab.pass(1_000 * S);
                assert_eq!(lab.engine.gauges().connections_live, 1);
            }
            lab.sent();
            lab.client(text);
            lab.client(text);
            // Within a turn, and at a new one.
            lab.client("PA 101+100 ack 51");
            lab.expect(&["PA 101+100 ack 51"]);
            lab.target("PA 51+50 ack 201");
            lab.pass(50 * MS);
            lab.client("PA 201+100 ack 101");
            let texts: Vec<_> = lab.sent().iter().map(|segment| lab.text(segment)).collect();
            assert!(
                texts.contains(&"PA 201+100 ack 101".to_owned()),
                "{name}, {forgotten}, {text}: {texts:?}"
            );
            assert_eq!(lab.count(Counter::ConnectionsJoined), 0, "{name}, {forgotten}, {text}");
            lab.stop();
        }
    }
}

#[test]
fn what_a_client_repeats_together_with_new_bytes_gives_its_connection_its_place_again() {
    let mut lab = reset_by_its_server();
    lab.client("PA 51+100 ack 51");
    let texts: Vec<_> = lab.sent().iter().map(|segment| lab.text(segment)).collect();
    assert!(texts.contains(&"PA 101+50 ack 51".to_owned()), "{texts:?}");
}

#[test]
fn a_strangers_acknowledgment_before_any_data_does_not_say_what_the_client_has_read() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.expect(&["S 0"]);
    lab.client("A 900000000 ack -40000000");
    lab.client("A 1 ack 1");
    lab.client("A 900000000 ack -40000000");
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["A 1 ack 1"]);
    // It waits for nothing.
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
}

#[test]
fn whatever_a_stranger_guesses_the_client_has_its_session_and_every_byte() {
    for seed in 1..=400u64 {
        let mut below = numbers(seed);
        let mut lab = Lab::new();
        lab.handshake();
        let (mut sent, mut read, mut arrived) = (1u32, 1u32, 1u32);
        // What the stranger has sent up to.
        let mut guess = 1u32 << 31;
        // The client's last data, and what it had read then.
        let mut last = None;
        for _ in 0..60 {
            if below(4) == 0 {
                let len = 1 + below(1400) as u32;
                lab.client(&format!("PA {sent}+{len} ack {read}"));
                last = Some((sent, len));
                sent += len;
                lab.pass(MS * below(60));
                for segment in lab.sent() {
                    if segment.source == lab.client && !segment.payload.is_empty() {
                        assert_eq!(segment.seq.wrapping_sub(lab.isns.client), arrived, "seed {seed}");
                        arrived += segment.payload.len() as u32;
                    }
                }
                assert_eq!(arrived, sent, "seed {seed}: all of it, at once");
                let answer = 1 + below(1000) as u32;
                lab.target(&format!("PA {read}+{answer} ack {sent}"));
                read += answer;
                lab.pass(60 * MS);
                continue;
            }
            if let Some((begin, len)) = last
                && below(6) == 0
            {
                // Its acknowledgment was lost, or the connection is idle: nothing new.
                lab.client(&match below(3) {
                    0 => format!("PA {begin}+{len} ack {read}"),
                    1 => format!("A {}+1 ack {read}", sent - 1),
                    _ => format!("A {} ack {read}", sent - 1),
                });
                lab.pass(MS * below(2500));
                continue;
            }
            // Anywhere but within what may be missing of the client's stream, or on from the last guess.
            if below(3) > 0 {
                guess = sent.wrapping_add((1 << 21) + below((1u64 << 32) - (1 << 22)) as u32);
            }
            let len = below(300) as u32;
            let ack = if below(2) == 0 { u64::from(read) } else { below(1 << 32) };
            let text = match below(8) {
                0 => format!("S {guess}"),
                1 => format!("R {guess}"),
                2 => format!("RA {guess} ack {ack}"),
                3 => format!("FA {guess} ack {ack}"),
                4 => format!("FPA {guess}+{len} ack {ack}"),
                5 => format!("A {guess} ack {ack}"),
                _ => format!("PA {guess}+{len} ack {ack}"),
            };
            lab.client(&text);
            guess = guess.wrapping_add(if text.starts_with('S') { 1 } else { len });
            lab.pass(MS * below(2500));
        }
        // The stranger's, which its target never answers.
        lab.pass(100 * S);
        assert!(lab.engine.gauges().connections_live <= 2, "seed {seed}: {:?}", lab.engine.gauges());
        lab.client(&format!("FA {sent} ack {read}"));
        lab.pass(100 * MS);
        let last = lab.sent().into_iter().rfind(|segment| segment.source == lab.client).unwrap();
        assert_eq!(lab.text(&last), format!("FA {sent} ack {read}"), "seed {seed}");
        lab.stop();
    }
}

/// Requests of 100 bytes from `place` on, each with 50 bytes more read. Returns the number of the first one with which a session is opened.
fn turns_until_joined(lab: &mut Lab, mut place: u32, mut ack: u32) -> Option<u32> {
    lab.sent();
    for turn in 1..=20 {
        lab.client(&format!("PA {place}+100 ack {ack}"));
        let syn = format!("S {}", place - 1);
        if lab.sent().iter().any(|segment| lab.text(segment) == syn) {
            return Some(turn);
        }
        (place, ack) = (place + 100, ack + 50);
    }
    None
}

#[test]
fn a_guess_that_is_near_costs_a_silent_client_its_session_and_one_turn() {
    for text in ["PA 500101+10 ack 51", "PA 350+1400 ack 200000000", "PA 202+1400 ack -200000000"] {
        let mut lab = between_turns();
        lab.client(text);
        lab.pass(1_100 * MS);
        lab.expect(&["FA 101 ack 51"]);
        lab.target("FA 51 ack 102");
        assert_eq!(lab.count(Counter::SessionsGap), 1);
        // Once more after that.
        lab.client(text);
        assert_eq!(turns_until_joined(&mut lab, 101, 51), Some(2), "{text}");
        lab.stop();
    }
}

#[test]
fn b013_a_strangers_data_keeps_no_connection_from_being_joined() {
    // Anywhere, with any acknowledgment: before the client's next data, and before each of it.
    for place in ["151+10", "500101+10", "200000101+10", "-5000+10", "3000000000+10"] {
        for ack in ["51", "900000000", "3000000000", "-40000"] {
            let mut lab = Lab::new();
            lab.client("PA 1+100 ack 51");
            lab.client(&format!("PA {place} ack {ack}"));
            let turn = turns_until_joined(&mut lab, 101, 101);
            assert!(turn.is_some_and(|turn| turn <= 2), "{place}, {ack}: {turn:?}");
            lab.stop();
        }
    }
}

#[test]
fn b014_a_hole_in_a_request_that_is_filled_late_is_no_turn() {
    // Of a request up to 401 the part 101..201 was lost on the way to the server, and comes again, with a newer acknowledgment, when the hole had its
    // time; then what follows it, once more. So it is where the connection is watched.
    for is_watched in [false, true] {
        let mut lab = if is_watched { Lab::new() } else { between_turns() };
        if is_watched {
            lab.client("PA 1+100 ack 51");
        }
        lab.client_segments(&["A 201+100 ack 51", "PA 301+100 ack 51"]);
        lab.pass(2 * S);
        lab.target("FA 51 ack 102");
        lab.sent();
        lab.client_segments(&["A 101+50 ack 52", "A 151+50 ack 52", "A 201+100 ack 54", "PA 301+100 ack 55"]);
        assert_eq!(lab.count(Counter::ConnectionsJoined), 0, "{is_watched}");
        assert_eq!(turns_until_joined(&mut lab, 401, 101), Some(1), "{is_watched}");
    }
}

#[test]
fn b033_a_client_that_goes_on_far_behind_a_second_hole_is_joined_there_when_the_connection_before_was_silent_for_long()
 {
    let mut lab = between_turns();
    for (place, silence, is_joined) in [
        (3_000_000, 2 * S, true),
        (6_000_000, 2 * S, false),
        (9_000_000, 300 * S, false),
        (400_000_000, 2 * S, true),
    ] {
        lab.client(&format!("PA {place}+100 ack 51"));
        lab.pass(silence);
        lab.sent();
        lab.client(&format!("PA {}+100 ack 151", place + 100));
        let syn = format!("S {}", place + 99);
        let sent = lab.sent();
        assert_eq!(sent.iter().any(|segment| lab.text(segment) == syn), is_joined, "{place}");
        assert!(lab.engine.gauges().connections_live <= 3);
        // What is held behind a hole has its time.
        lab.pass(2 * S);
    }
    lab.stop();
}

/// Whatever was seen of a client's address and port, a client that goes on there is replayed within a few turns.
#[test]
fn whatever_a_stranger_has_sent_a_client_that_goes_on_is_joined() {
    for seed in 1..=3_000u64 {
        let mut below = numbers(seed);
        let mut lab = Lab::new();
        let (mut place, mut read) = (1u32, 1u32);
        if below(2) == 0 {
            lab.handshake();
        }
        let (mut said, mut is_guessed) = (Vec::new(), false);
        for number in 0..1 + below(6) {
            let text = if number == 0 || below(3) == 0 {
                // The client's own, of which a part may not be captured.
                place += [0, 0, 0, 100, 5_000][below(5) as usize];
                let len = 1 + below(1400) as u32;
                let text = format!("PA {place}+{len} ack {read}");
                (place, read) = (place + len, read + below(300) as u32);
                text
            } else {
                let near = below(1 << 21) as u32;
                let at = match below(3) {
                    // One of 4 096 is: so there is one.
                    0 if !is_guessed => {
                        is_guessed = true;
                        place.wrapping_add(near)
                    }
                    1 => place.wrapping_sub(near),
                    _ => place.wrapping_add((1 << 21) + below((1 << 32) - (1 << 22)) as u32),
                };
                let ack = if below(2) == 0 { read } else { below(1 << 32) as u32 };
                let len = below(300);
                match below(7) {
                    0 => format!("S {at}"),
                    1 => format!("R {at}"),
                    2 => format!("A {at} ack {ack}"),
                    _ => format!("PA {at}+{len} ack {ack}"),
                }
            };
            lab.client(&text);
            said.push(text);
            lab.pass(MS * [0, 10, 1_200, 3_000][below(4) as usize]);
        }
        if lab.engine.gauges().connections_live > 1 {
            continue;
        }
        let mut accepted = 0;
        for _ in 0..5 {
            accepted = lab.count(Counter::BytesAccepted);
            lab.client(&format!("PA {place}+100 ack {read}"));
            accepted = lab.count(Counter::BytesAccepted) - accepted;
            (place, read) = (place + 100, read + 50);
            lab.pass(1_200 * MS);
        }
        assert!(accepted >= 100, "seed {seed}: {said:?}, then from {} on", place - 500);
    }
}
