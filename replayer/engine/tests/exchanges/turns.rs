//! When data that depends on a response may go.

use crate::lab::{Lab, MS, S, config};
use replayer_engine::counters::Counter;

#[test]
fn b021_the_second_request_waits_for_the_first_response() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("A 1 ack 101");
    // Online the response had 300 bytes; the target is 300 ms slower.
    lab.client("PA 101+100 ack 301");
    lab.pass(300 * MS);
    lab.expect(&[]);
    lab.target("A 1+200 ack 101");
    lab.expect(&[]);
    lab.target("PA 201+100 ack 101");
    lab.expect(&["PA 101+100 ack 301"]);
    assert_eq!(lab.count(Counter::TurnsReleasedByBytes), 1);
}

#[test]
fn requests_count_as_late_where_it_is_not_the_target_that_takes_its_time() {
    // Four turns, all captured at the start; the first response takes the target so long, each further one so long; which turns are late.
    for (first, takes, late) in [(MS, MS, 0), (21 * MS, MS, 2), (19 * MS, 19 * MS, 2), (21 * MS, 21 * MS, 0)]
    {
        let mut lab = Lab::new();
        lab.handshake();
        lab.client_segments(&[
            "PA 1+100 ack 1",
            "PA 101+100 ack 51",
            "PA 201+100 ack 101",
            "PA 301+100 ack 151",
        ]);
        for turn in 0..4 {
            lab.expect(&[&format!("PA {}+100 ack {}", 1 + 100 * turn, 1 + 50 * turn)]);
            lab.pass(if turn == 0 { first } else { takes });
            lab.target(&format!("PA {}+50 ack {}", 1 + 50 * turn, 101 + 100 * turn));
        }
        let lag = lab.engine.take_lag();
        assert_eq!((lag.count, lag.late), (4, late), "{first} {takes}");
    }
}

#[test]
fn b021_without_waiting() {
    let mut config = config();
    config.wait_for_responses = false;
    let mut lab = Lab::with(config);
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 301");
    lab.expect(&["PA 1+100 ack 1", "PA 101+100 ack 1"]);
}

#[test]
fn b021_the_request_after_a_response_of_gigabytes_waits_and_so_do_those_behind_it() {
    for read in [1_000_000_001, 3_000_000_001u32] {
        let mut lab = Lab::new();
        lab.handshake();
        lab.client("PA 1+100 ack 1");
        lab.expect(&["PA 1+100 ack 1"]);
        lab.target("A 1 ack 101");
        // Pure acknowledgments are not captured: the next request is the first to tell of it.
        lab.client(&format!("PA 101+100 ack {read}"));
        lab.pass(100 * MS);
        lab.expect(&[]);
        lab.target("PA 1+50 ack 101");
        lab.pass(60 * MS);
        lab.expect(&["PA 101+100 ack 51"]);
        lab.target("A 51 ack 201");
        lab.client(&format!("PA 201+100 ack {}", read + 50));
        lab.pass(100 * MS);
        lab.expect(&[]);
        lab.target("PA 51+50 ack 201");
        lab.pass(60 * MS);
        lab.expect(&["PA 201+100 ack 101"]);
    }
}

#[test]
fn b026_a_shorter_response_releases_after_silence() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 1001");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target("PA 1+20 ack 101");
    lab.expect(&[]);
    // 50 ms is the most that is waited for more.
    lab.pass(60 * MS);
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "PA 101+100 ack 21");
    assert_eq!(lab.count(Counter::TurnsReleasedByQuiet), 1);
}

#[test]
fn b026_a_longer_response_releases_at_its_end() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 301");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.target_to(lab.client, &["A 1+1000 ack 101", "A 1001+1000 ack 101"]);
    // Acknowledged, but the burst goes on.
    lab.expect(&["A 101 ack 2001"]);
    lab.target("PA 2001+5 ack 101");
    lab.expect(&[]);
    lab.pass(10 * MS);
    lab.expect(&["PA 101+100 ack 2006"]);
    assert_eq!(lab.count(Counter::TurnsReleasedByQuiet), 1);
}

#[test]
fn b026_a_longer_response_in_several_writes_is_waited_for_to_its_end() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 301");
    lab.expect(&["PA 1+100 ack 1"]);
    for write in 0..30u32 {
        lab.target(&format!("PA {}+400 ack 101", 1 + write * 400));
        lab.pass(MS / 2);
        assert!(lab.sent().iter().all(|segment| segment.payload.is_empty()), "after {write} writes");
    }
    lab.pass(40 * MS);
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "PA 101+100 ack 12001");
    assert_eq!(lab.count(Counter::TurnsReleasedEarly), 0);
}

#[test]
fn b026_a_turn_that_went_too_early_is_counted_and_not_trusted_again() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    for turn in 1..5u32 {
        lab.client(&format!("PA {}+100 ack {}", 1 + turn * 100, 1 + turn * 300));
    }
    lab.target("PA 1+400 ack 101");
    lab.pass(10 * MS);
    assert_eq!(lab.count(Counter::TurnsReleasedByQuiet), 1);
    // The first response came in one write: so, it seems, does the second. It does not.
    lab.target("PA 401+400 ack 201");
    assert_eq!(lab.count(Counter::TurnsReleasedByBytes), 1);
    lab.target("PA 801+400 ack 201");
    assert_eq!(lab.count(Counter::TurnsReleasedEarly), 1);
    lab.target("PA 1201+400 ack 301");
    assert_eq!(lab.count(Counter::TurnsSent), 3, "the fourth request waits");
    lab.target("PA 1601+400 ack 301");
    lab.pass(10 * MS);
    assert_eq!(lab.count(Counter::TurnsSent), 4);
    assert_eq!(lab.count(Counter::TurnsReleasedEarly), 1);
}

#[test]
fn b024_the_hold_limit_releases_what_is_never_answered() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.target("A 1 ack 101");
    lab.client("PA 101+100 ack 301");
    lab.expect(&["PA 1+100 ack 1"]);
    lab.pass(1990 * MS);
    lab.expect(&[]);
    lab.pass(20 * MS);
    lab.expect(&["PA 101+100 ack 1"]);
    assert_eq!(lab.count(Counter::TurnsReleasedByHoldLimit), 1);
    // The session goes on.
    lab.target("PA 1+300 ack 201");
    lab.client("PA 201+10 ack 601");
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "PA 201+10 ack 301");
}

#[test]
fn b025_a_server_that_greets_first() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.client("A 1 ack 1");
    // Online the greeting had 40 bytes. The target's comes after 100 ms and is 55 bytes long.
    lab.client("A 1 ack 41");
    lab.client("PA 1+10 ack 41");
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["S 0", "A 1 ack 1"]);
    lab.pass(100 * MS);
    lab.expect(&[]);
    lab.target("PA 1+55 ack 1");
    lab.pass(10 * MS);
    lab.expect(&["PA 1+10 ack 56"]);
}

#[test]
fn b025_a_greeting_whose_acknowledgment_overtook_that_of_the_handshake() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.target("SA 0 ack 1 mss 1460");
    lab.client("A 1 ack 41");
    lab.client("A 1 ack 1");
    lab.client("PA 1+10 ack 41");
    lab.expect(&["S 0", "A 1 ack 1"]);
    lab.pass(100 * MS);
    lab.expect(&[]);
    lab.target("PA 1+40 ack 1");
    lab.expect(&["PA 1+10 ack 41"]);
}

#[test]
fn b022_pipelined_requests_flow() {
    let mut lab = Lab::new();
    lab.handshake();
    for i in 0..8 {
        lab.client(&format!("PA {}+10 ack 1", 1 + i * 10));
    }
    assert_eq!(lab.sent().len(), 8);
}

#[test]
fn b023_a_stream_in_both_directions_follows_the_responses() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+10 ack 1");
    for i in 0..50u32 {
        // Each message was sent when one of the server's had been read; the target answers in its own time.
        lab.client(&format!("PA {}+10 ack {}", 11 + i * 10, 1 + (i + 1) * 20));
    }
    lab.expect(&["PA 1+10 ack 1"]);
    for i in 0..50u32 {
        lab.target(&format!("PA {}+20 ack {}", 1 + i * 20, 11 + i * 10));
        let sent = lab.sent();
        assert_eq!(sent.len(), 1, "message {i}");
        assert_eq!(lab.text(&sent[0]), format!("PA {}+10 ack {}", 11 + i * 10, 21 + i * 20));
    }
    assert_eq!(lab.count(Counter::TurnsReleasedByBytes), 50);
}

#[test]
fn a_session_that_was_idle_for_hours_waits_for_its_next_response_too() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client("PA 1+10 ack 1");
    lab.target("PA 1+20 ack 11");
    for _ in 0..10 {
        lab.pass(3600 * S);
        lab.client("A 11 ack 21");
    }
    lab.sent();
    lab.client("PA 11+10 ack 21");
    lab.expect(&["PA 11+10 ack 21"]);
    lab.client("PA 21+10 ack 41");
    lab.pass(100 * MS);
    lab.expect(&[]);
    lab.target("PA 21+20 ack 21");
    lab.expect(&["PA 21+10 ack 41"]);
}
