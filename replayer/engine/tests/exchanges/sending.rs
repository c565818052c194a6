//! TCP mechanics towards the target: windows, losses, sizes, clocks.

use crate::lab::{Lab, MS, S, config, endpoint, link};
use replayer_common::packet::flags;
use replayer_engine::counters::Counter;

/// A session with `window` bytes of the target's window.
fn established(window: u16, mss: u16) -> Lab {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.client("A 1 ack 1");
    lab.target(&format!("SA 0 ack 1 mss {mss} win {window}"));
    lab.expect(&["S 0", "A 1 ack 1"]);
    lab
}

#[test]
fn segments_are_cut_to_the_targets_mss() {
    let mut lab = established(60_000, 536);
    lab.client("PA 1+1400 ack 1");
    lab.expect(&["A 1+536 ack 1", "A 537+536 ack 1", "PA 1073+328 ack 1"]);
}

#[test]
fn b038_segments_shrink_with_the_path() {
    let mut lab = established(60_000, 1460);
    let mut narrow = link();
    narrow.mtu = 1000;
    lab.engine.set_link(0, Some(narrow));
    lab.client("PA 1+1400 ack 1");
    lab.expect(&["A 1+960 ack 1", "PA 961+440 ack 1"]);
}

#[test]
fn the_targets_window_is_honoured_and_scaled() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460 scale 7");
    lab.target("SA 0 ack 1 mss 1460 scale 3 win 2000");
    lab.sent();
    lab.client("A 1+1400 ack 1");
    lab.client("A 1401+1400 ack 1");
    // The window of the SYN-ACK is not scaled: the second does not fit.
    lab.expect(&["A 1+1400 ack 1"]);
    lab.target("A 1 ack 1401 win 300");
    lab.expect(&["A 1401+1400 ack 1"]);
    lab.client("A 2801+1400 ack 1");
    lab.expect(&[]);
    lab.target("A 1 ack 2801 win 100");
    // 800 bytes of room and nothing in flight.
    lab.expect(&["A 2801+800 ack 1"]);
    lab.target("A 1 ack 3601 win 100");
    lab.expect(&["A 3601+600 ack 1"]);
}

#[test]
fn b030_a_zero_window_is_probed_and_an_update_resumes_at_once() {
    let mut lab = established(0, 1460);
    lab.client("PA 1+100 ack 1");
    lab.expect(&[]);
    for _ in 0..5 {
        lab.pass(S);
        for probe in lab.sent() {
            assert_eq!(lab.text(&probe), "A 0 ack 1");
            lab.target("A 1 ack 1 win 0");
        }
    }
    lab.target("A 1 ack 1 win 500");
    lab.expect(&["PA 1+100 ack 1"]);
}

#[test]
fn b030_a_target_that_answers_probes_is_not_given_up() {
    for in_flight in [false, true] {
        let mut lab = established(if in_flight { 100 } else { 0 }, 1460);
        lab.client("PA 1+100 ack 1");
        lab.client("PA 101+100 ack 1");
        if in_flight {
            lab.target("A 1 ack 1 win 0");
        }
        let mut probes = 0;
        for _ in 0..60_000 {
            lab.pass(10 * MS);
            if !lab.sent().is_empty() {
                probes += 1;
                lab.target("A 1 ack 1 win 0");
            }
        }
        assert_eq!(lab.engine.gauges().sessions_live, 1, "in flight: {in_flight}");
        assert!((100..2000).contains(&probes), "{probes} probes in ten minutes");
        lab.target("A 1 ack 1 win 500");
        lab.pass(500 * MS);
        let sent = lab.sent();
        assert!(sent.iter().any(|segment| lab.text(segment) == "PA 1+100 ack 1"), "{sent:?}");
    }
}

#[test]
fn b030_a_zero_window_and_no_answer_ends_the_session() {
    let mut lab = established(0, 1460);
    lab.client("PA 1+100 ack 1");
    lab.pass(300 * S);
    assert_eq!(lab.count(Counter::SessionsRetransmitTimeout), 1);
    assert_eq!(lab.count(Counter::LostRetransmitTimeout), 100);
    let sent = lab.sent();
    assert_eq!(lab.text(sent.last().unwrap()), "RA 1 ack 1");
}

#[test]
fn three_duplicate_acknowledgments_bring_the_lost_segment_again() {
    let mut lab = established(60_000, 1460);
    for i in 0..5 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    assert_eq!(lab.sent().len(), 5);
    lab.target("A 1 ack 1001");
    lab.target("A 1 ack 1001 sack 2001-3001");
    lab.target("A 1 ack 1001 sack 2001-4001");
    lab.expect(&[]);
    lab.target("A 1 ack 1001 sack 2001-5001");
    lab.expect(&["A 1001+1000 ack 1"]);
    lab.target("A 1 ack 5001");
    lab.pass(5 * S);
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::SegmentsRetransmitted), 1);
}

#[test]
fn duplicate_acknowledgments_after_a_timeout_bring_nothing_again() {
    // RFC 6582 section 3.2: they answer what the timeout sent again.
    let mut lab = established(60_000, 1460);
    for i in 0..6 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    assert_eq!(lab.sent().len(), 6);
    lab.pass(220 * MS);
    lab.expect(&["A 1+1000 ack 1"]);
    lab.target("A 1 ack 2001");
    lab.expect(&["A 2001+1000 ack 1", "A 3001+1000 ack 1", "A 4001+1000 ack 1"]);
    for _ in 0..3 {
        lab.target("A 1 ack 2001");
    }
    lab.expect(&[]);
}

#[test]
fn what_a_segment_makes_us_send_acknowledges_it() {
    let mut lab = established(60_000, 1460);
    for i in 0..5 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    lab.target("A 1 ack 1001");
    lab.sent();
    for right in [3001, 4001, 5001] {
        lab.target(&format!("A 1 ack 1001 sack 2001-{right}"));
    }
    lab.expect(&["A 1001+1000 ack 1"]);
    // A partial acknowledgment, with the first byte of the response.
    lab.target("A 1+70 ack 2001");
    lab.expect(&["A 2001+1000 ack 71"]);
}

#[test]
fn b018_a_late_segment_of_an_older_connection_moves_nothing() {
    let mut lab = established(60_000, 1460);
    lab.target("PA 500000000+100 ack 1");
    lab.expect(&["A 1 ack 1"]);
    lab.target("RA 500000000 ack 1");
    lab.client("PA 1+10 ack 1");
    lab.expect(&["PA 1+10 ack 1"]);
}

#[test]
fn duplicate_acknowledgments_count_with_another_window_too_when_they_carry_sack() {
    // Linux changes its window as it goes; RFC 6675 counts an ACK with new SACK information.
    let mut lab = established(60_000, 1460);
    for i in 0..5 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    lab.target("A 1 ack 1001");
    lab.sent();
    lab.target("A 1 ack 1001 win 60010 sack 2001-3001");
    lab.target("A 1 ack 1001 win 60020 sack 2001-4001");
    lab.target("A 1 ack 1001 win 60030 sack 2001-5001");
    lab.expect(&["A 1001+1000 ack 1"]);
}

#[test]
fn a_lost_tail_comes_again_after_the_timeout_with_backoff() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    let mut at = Vec::new();
    let start = lab.now;
    while lab.now - start < 20 * S {
        lab.pass(5 * MS);
        for again in lab.sent() {
            assert_eq!(lab.text(&again), "PA 1+100 ack 1");
            at.push((lab.now - start) / MS);
        }
    }
    // 200, 600, 1400 … ms; never more than 4 s between two, so that a target that was away is not kept waiting (b037).
    assert!(
        (195..=215).contains(&at[0]) && (595..=620).contains(&at[1]) && (1395..=1430).contains(&at[2]),
        "{at:?}"
    );
    assert!(at.windows(2).all(|pair| pair[1] - pair[0] <= 4_050), "{at:?}");
    lab.target("A 1 ack 101");
    lab.pass(5 * S);
    lab.expect(&[]);
    lab.client("PA 101+10 ack 1");
    lab.expect(&["PA 101+10 ack 1"]);
}

#[test]
fn a_target_that_never_acknowledges_is_given_up_with_a_reset() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.pass(120 * S);
    assert_eq!(lab.count(Counter::SessionsRetransmitTimeout), 1);
    assert_eq!(lab.count(Counter::LostRetransmitTimeout), 100);
    let sent = lab.sent();
    let last: Vec<_> = sent[sent.len() - 2..].iter().map(|segment| lab.text(segment)).collect();
    assert_eq!(last, ["RA 101 ack 1", "RA 1 ack 1"]);
}

#[test]
fn after_a_timeout_all_goes_again_and_turns_stay_in_order() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.client("PA 101+100 ack 1");
    lab.client("PA 201+100 ack 51");
    assert_eq!(lab.sent().len(), 2);
    lab.pass(230 * MS);
    // One segment (RFC 5681), the next when it is acknowledged; never the turn that waits.
    lab.expect(&["PA 1+100 ack 1", "PA 101+100 ack 1"]);
    lab.target("PA 1+50 ack 201");
    lab.expect(&["PA 201+100 ack 51"]);
}

#[test]
fn b029_timestamps_echo_the_targets_and_never_go_back_across_the_wrap() {
    let mut lab = Lab::new();
    let near_wrap = u32::MAX - 500;
    lab.client(&format!("S 0 mss 1460 ts {near_wrap}/0"));
    lab.target(&format!("SA 0 ack 1 mss 1460 ts {near_wrap}/{near_wrap}"));
    let mut last = near_wrap;
    lab.sent();
    for i in 0..20u32 {
        lab.pass(100 * MS);
        lab.client(&format!("PA {}+10 ack 1 ts 1/1", 1 + i * 10));
        let value = near_wrap.wrapping_add(i * 100);
        for segment in lab.sent() {
            let (ours, echo) = segment.timestamps.unwrap();
            assert!(ours.wrapping_sub(last) < 1000, "{ours} after {last}");
            last = ours;
            assert_eq!(echo, if i == 0 { near_wrap } else { value.wrapping_sub(100) });
        }
        lab.target(&format!("A 1 ack {} ts {value}/{last}", 11 + i * 10));
    }
    assert!(last < near_wrap, "it wrapped");
}

#[test]
fn b027_every_second_segment_is_acknowledged_the_last_within_40_ms() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.sent();
    lab.target("A 1+1460 ack 101");
    lab.expect(&[]);
    lab.target("A 1461+1460 ack 101");
    lab.expect(&["A 101 ack 2921"]);
    // The record of 2921..4381 is lost: the next tells of it.
    lab.target("PA 4381+10 ack 101");
    lab.expect(&[]);
    lab.pass(45 * MS);
    lab.expect(&["A 101 ack 4391"]);
    assert_eq!(lab.count(Counter::ResponseBytes), 4390);
}

#[test]
fn b034_keepalive_probes_of_the_target_are_answered() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+10 ack 101");
    lab.pass(100 * MS);
    lab.sent();
    for _ in 0..60 {
        lab.pass(30 * S);
        lab.target("A 10 ack 101");
        lab.expect(&["A 101 ack 11"]);
    }
    assert_eq!(lab.engine.gauges().sessions_live, 1);
}

#[test]
fn b051_a_route_that_goes_away_while_an_acknowledgment_is_due() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+10 ack 101");
    lab.sent();
    lab.engine.set_link(0, None);
    lab.pass(S);
    lab.client("PA 101+100 ack 11");
    lab.pass(S);
    lab.expect(&[]);
    assert!(lab.count(Counter::SegmentsNoLink) >= 2);
    // It is back: what was given meanwhile arrives.
    lab.engine.set_link(0, Some(link()));
    lab.pass(4 * S);
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), "PA 101+100 ack 11");
}

#[test]
fn b051_no_frame_and_no_room_are_made_up_for() {
    let mut lab = established(60_000, 1460);
    let taken = lab.wire.take_away(lab.wire.free() - 1);
    // The only frame holds the captured packet; the handshake of another client finds none.
    lab.client.port += 1;
    lab.client("S 0 mss 1460");
    lab.wire.give_back(taken);
    lab.sent();
    lab.client = endpoint(crate::lab::CLIENT);
    lab.wire.full = true;
    lab.client("PA 1+100 ack 1");
    lab.wire.full = false;
    lab.expect(&[]);
    lab.pass(230 * MS);
    lab.expect(&["PA 1+100 ack 1"]);
}

#[test]
fn b039_records_that_make_no_sense_do_no_harm() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    for text in [
        "A 1 ack 999999",
        "A 1 ack -5000",
        "A -100+50 ack 101",
        "S 0",
        "SA 77 ack 1 mss 0",
        "FSPA 0 ack 1",
        ". 5",
        "RA -2000000000 ack 1",
    ] {
        lab.target(text);
    }
    for service in [1, 65535] {
        lab.service = service;
        lab.target("SA 0 ack 1");
    }
    lab.service = 0;
    assert_eq!(lab.engine.gauges().sessions_live, 1);
    lab.pass(60 * S);
}

#[test]
fn targets_with_impossible_options_get_small_segments() {
    for mss in [0, 1, 12, 47] {
        let mut lab = established(60_000, mss);
        lab.client("PA 1+1000 ack 1");
        let sent = lab.sent();
        assert!(sent.len() >= 10 && sent.iter().all(|segment| segment.payload.len() <= 64));
    }
    let mut config = config();
    config.frame_room = 400;
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460 scale 255");
    lab.target("SA 0 ack 1 mss 65535 scale 255 win 65535");
    lab.client("PA 1+1000 ack 1");
    assert!(lab.sent().iter().all(|segment| segment.payload.len() <= 340));
}

/// What a path lets through and a target that acknowledges it all do; returns whether everything came.
fn through_a_path_of(lab: &mut Lab, payload: usize, upto: u32, limit_ms: u64) -> bool {
    let mut next = 1u32;
    for _ in 0..limit_ms {
        for segment in lab.sent() {
            let at = segment.seq.wrapping_sub(lab.isns.client);
            if segment.payload.len() <= payload && !segment.has(2) {
                if at == next {
                    next += segment.payload.len() as u32;
                }
                if !segment.payload.is_empty() || at.wrapping_sub(next) as i32 == -1 {
                    lab.target(&format!("A 1 ack {next}"));
                }
            }
        }
        if next == upto {
            return true;
        }
        lab.pass(MS);
    }
    false
}

#[test]
fn b038_a_path_that_narrowed_without_a_word_is_found() {
    for path in [1400, 700] {
        let mut lab = established(60_000, 1460);
        for i in 0..5 {
            lab.client(&format!("A {}+1460 ack 1", 1 + i * 1460));
        }
        assert!(through_a_path_of(&mut lab, path - 40, 7301, 8000), "a path of {path}");
        // The next session knows; nothing is lost.
        lab.client.port += 1;
        lab.client("S 0 mss 1460");
        lab.target("SA 0 ack 1 mss 1460 win 60000");
        lab.client("A 1+1460 ack 1");
        let before = lab.count(Counter::SegmentsRetransmitted);
        assert!(through_a_path_of(&mut lab, path - 40, 1461, 100));
        assert_eq!(lab.count(Counter::SegmentsRetransmitted), before);
        // After ten minutes it may have become wider again.
        lab.pass(601 * S);
        lab.sent();
        lab.client.port += 1;
        lab.client("S 0 mss 1460");
        lab.target("SA 0 ack 1 mss 1460 win 60000");
        lab.client("A 1+1460 ack 1");
        let sent = lab.sent();
        assert_eq!(lab.text(sent.last().unwrap()), "A 1+1460 ack 1");
    }
}

#[test]
fn b038_sessions_that_wait_are_made_as_narrow_as_the_path_and_no_narrower() {
    const SESSIONS: u16 = 4;
    let mut lab = established(60_000, 1460);
    let first = lab.client.port;
    for port in first..first + SESSIONS {
        lab.client.port = port;
        if port != first {
            lab.client("S 0 mss 1460");
            lab.target("SA 0 ack 1 mss 1460 win 60000");
        }
        lab.client("A 1+1460 ack 1");
        lab.pass(2 * MS);
    }
    // All of them lose their segment, each a little after the others.
    let mut next = [1u32; SESSIONS as usize];
    let mut shortest = [usize::MAX; SESSIONS as usize];
    for _ in 0..20_000 {
        for segment in lab.sent() {
            let session = usize::from(segment.source.port - first);
            let at = segment.seq.wrapping_sub(lab.isns.client);
            let fits = segment.payload.len() <= 1360;
            if fits && !segment.payload.is_empty() && at == next[session] {
                next[session] += segment.payload.len() as u32;
                if next[session] != 1461 {
                    shortest[session] = shortest[session].min(segment.payload.len());
                }
            }
            if fits && !segment.has(flags::SYN) {
                lab.target_to(segment.source, &[&format!("A 1 ack {}", next[session])]);
            }
        }
        lab.pass(MS);
    }
    assert_eq!(next, [1461; SESSIONS as usize]);
    assert_eq!(shortest, [1240; SESSIONS as usize], "as 1280 bytes hold");
}

#[test]
fn b038_a_target_that_is_away_does_not_make_the_path_narrow() {
    let mut lab = established(60_000, 1460);
    lab.client("A 1+1460 ack 1");
    lab.pass(10 * S);
    lab.sent();
    lab.pass(4 * S);
    let sent = lab.sent();
    assert!(sent.iter().any(|segment| segment.payload.len() == 1460), "{sent:?}");
    lab.target("A 1 ack 1461");
    lab.client("A 1461+1460 ack 1");
    lab.expect(&["A 1461+1460 ack 1"]);
}

#[test]
fn b031_with_sack_each_loss_of_a_flight_is_made_up_for_in_one_round_trip() {
    let mut lab = established(60_000, 1000);
    for i in 0..10 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    assert_eq!(lab.sent().len(), 10);
    // 1, 3001 and 6001 are lost.
    lab.target("A 1 ack 1 sack 1001-2001");
    lab.target("A 1 ack 1 sack 1001-3001");
    lab.expect(&[]);
    lab.target("A 1 ack 1 sack 4001-5001");
    lab.expect(&["A 1+1000 ack 1"]);
    lab.target("A 1 ack 1 sack 4001-6001");
    // Nothing arrived after 6001 yet: it may still be on its way.
    lab.expect(&["A 3001+1000 ack 1"]);
    lab.target("A 1 ack 1 sack 7001-8001");
    lab.expect(&["A 6001+1000 ack 1"]);
    lab.target("A 1 ack 1 sack 7001-9001");
    lab.target("A 1 ack 1 sack 7001-10001");
    lab.expect(&[]);
    // What was sent again arrives: nothing goes twice.
    lab.target("A 1 ack 3001 sack 7001-10001");
    lab.target("A 1 ack 6001 sack 7001-10001");
    lab.target("A 1 ack 10001");
    lab.pass(5 * S);
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::SegmentsRetransmitted), 3);
}

#[test]
fn b031_one_acknowledgment_with_enough_sack_is_enough() {
    let mut lab = established(60_000, 1000);
    for i in 0..6 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    lab.sent();
    // The records of the others were lost.
    lab.target("A 1 ack 1 sack 1001-5001");
    lab.expect(&["A 1+1000 ack 1"]);
}

#[test]
fn b031_after_a_timeout_sack_is_not_believed() {
    let mut lab = established(60_000, 1000);
    for i in 0..4 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    lab.sent();
    lab.target("A 1 ack 1 sack 1001-2001");
    lab.target("A 1 ack 1 sack 1001-3001");
    lab.pass(230 * MS);
    lab.expect(&["A 1+1000 ack 1"]);
    lab.target("A 1 ack 1001");
    let sent = lab.sent();
    assert_eq!(lab.text(&sent[0]), "A 1001+1000 ack 1");
}

#[test]
fn b039_sack_that_makes_no_sense_does_no_harm() {
    let mut lab = established(60_000, 1000);
    for i in 0..6 {
        lab.client(&format!("A {}+1000 ack 1", 1 + i * 1000));
    }
    lab.sent();
    for sack in ["0-1", "5001-4001", "1-1", "500000-600000", "1-6001", "2000000000-2000000001"] {
        lab.target(&format!("A 1 ack 1 sack {sack}"));
    }
    lab.target("A 1 ack 6001");
    lab.pass(S);
    assert_eq!(lab.count(Counter::ReplayBytesDelivered), 6000);
}

#[test]
fn b034_after_half_an_hour_it_is_still_the_same_connection() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+10 ack 101");
    lab.pass(S);
    lab.sent();
    lab.pass(1800 * S);
    lab.expect(&[]);
    lab.client("PA 101+100 ack 11");
    lab.expect(&["PA 101+100 ack 11"]);
    assert_eq!((lab.count(Counter::SessionsOpened), lab.count(Counter::ConnectionsJoined)), (1, 0));
}

#[test]
fn b034_keepalive_probes_of_the_client_keep_it_for_days_and_are_not_sent() {
    let mut lab = established(60_000, 1460);
    lab.client("PA 1+100 ack 1");
    lab.target("PA 1+10 ack 101");
    lab.pass(S);
    lab.sent();
    for _ in 0..100 {
        lab.pass(3600 * S);
        lab.client("A 100 ack 11");
    }
    lab.expect(&[]);
    lab.client("PA 101+100 ack 11");
    lab.expect(&["PA 101+100 ack 11"]);
}

#[test]
fn b029_timestamps_of_the_target_wrap_and_an_old_one_is_not_echoed() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460 ts 1/0");
    lab.target(&format!("SA 0 ack 1 mss 1460 ts {}/1", u32::MAX));
    lab.sent();
    // RFC 7323 section 4.3: the newest of the target's, across the wrap.
    for (value, echo) in [(u32::MAX, u32::MAX), (5, 5), (u32::MAX - 1, 5), (6, 6)] {
        lab.target(&format!("A 0 ack 1 ts {value}/1"));
        let sent = lab.sent();
        assert_eq!(sent[0].timestamps.map(|(_, echo)| echo), Some(echo), "after {value}");
    }
}

#[test]
fn b029_a_target_without_timestamps_gets_none() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460 ts 1/0");
    lab.target("SA 0 ack 1 mss 1460");
    lab.client("PA 1+100 ack 1 ts 2/5");
    assert!(lab.sent()[1..].iter().all(|segment| segment.timestamps.is_none()));
}
