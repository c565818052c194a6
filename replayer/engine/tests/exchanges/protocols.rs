//! What is recognised by a stream's first bytes: TLS, which is not replayed, and HTTP/2.

use crate::lab::{Lab, MS, ONLINE, S, endpoint};
use replayer_engine::counters::Counter;

const HELLO: &[u8] = &[0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3, 9, 9, 9];
const APPLICATION_DATA: &[u8] = &[0x17, 3, 3, 0, 5, 1, 2, 3, 4, 5];

#[test]
fn tls_is_counted_and_nothing_of_it_sent() {
    let mut lab = Lab::new();
    lab.handshake();
    assert!(lab.engine.tls_seen().all(|seen| !seen));
    lab.client_bytes("PA 1 ack 1", HELLO);
    // The connection that the SYN had opened is closed politely.
    lab.expect(&["FA 1 ack 1"]);
    lab.target("FA 1 ack 2");
    lab.expect(&["A 2 ack 2"]);
    lab.client_bytes("PA 15 ack 4000", APPLICATION_DATA);
    lab.client_bytes("PA 25 ack 5000", APPLICATION_DATA);
    lab.pass(3 * S);
    lab.expect(&[]);
    assert!(lab.engine.tls_seen().all(|seen| seen));
    assert_eq!((lab.count(Counter::ConnectionsTls), lab.count(Counter::SessionsTls)), (1, 1));
    assert_eq!((lab.count(Counter::PacketsTls), lab.count(Counter::BytesTls)), (3, 34));
    lab.client("FA 35 ack 5000");
    assert_eq!(lab.engine.gauges().connections_live, 0);
    assert_eq!(lab.engine.gauges().held_bytes, 0);
}

#[test]
fn tls_before_the_target_answered_takes_the_syn_back() {
    let mut lab = Lab::new();
    lab.client("S 0 mss 1460");
    lab.client_bytes("PA 1 ack 1", HELLO);
    lab.expect(&["S 0", "R 1"]);
    lab.pass(20 * MS);
    let heard = |lab: &Lab| lab.engine.service_counters().map(|counters| counters.heard).sum::<u64>();
    assert_eq!(heard(&lab), 0);
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["R 1"]);
    assert!(heard(&lab) > 0, "the target answers, though nothing was replayed");
    assert_eq!(lab.engine.gauges().sessions_live, 0);
}

#[test]
fn tls_that_comes_out_of_order_is_seen_when_it_is_in_order() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client_bytes("PA 15 ack 4000", APPLICATION_DATA);
    lab.client_bytes("FA 25 ack 4000", &[]);
    lab.client_bytes("PA 1 ack 1", HELLO);
    lab.expect(&["FA 1 ack 1"]);
    assert_eq!(lab.count(Counter::BytesTls), 24);
    lab.target("FA 1 ack 2");
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn b013_tls_that_was_open_before_is_not_joined() {
    let mut lab = Lab::new();
    lab.engine.expect_turn(lab.now, lab.client, endpoint(ONLINE));
    lab.client_bytes("PA 5001 ack 9000", APPLICATION_DATA);
    lab.expect(&[]);
    // Without knowing that it is between two turns.
    lab.client.port += 1;
    lab.client_bytes("PA 5001 ack 9000", APPLICATION_DATA);
    lab.client_bytes("PA 5011 ack 9100", APPLICATION_DATA);
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::ConnectionsTls), 2);
    // Forgotten after five minutes, and seen again.
    lab.pass(400 * S);
    assert_eq!(lab.engine.gauges().connections_live, 0);
}

#[test]
fn tls_that_never_ends_is_forgotten_and_a_stop_leaves_nothing() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client_bytes("PA 1 ack 1", HELLO);
    // The target never closes.
    lab.pass(100 * S);
    assert_eq!(lab.count(Counter::SessionsTls) + lab.count(Counter::SessionsRetransmitTimeout), 1);
    lab.client_bytes("PA 15 ack 4000", APPLICATION_DATA);
    lab.stop();
}

#[test]
fn b023_http2_requests_go_while_other_responses_are_on_their_way() {
    let mut lab = Lab::new();
    lab.handshake();
    lab.client_bytes("PA 1 ack 1", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n12345678");
    // Responses of another size than online, never silent.
    for turn in 0..20u32 {
        lab.client(&format!("PA {}+10 ack {}", 33 + turn * 10, 1 + (turn + 1) * 100));
        lab.target(&format!("PA {}+130 ack {}", 1 + turn * 130, 33 + turn * 10));
        lab.pass(MS / 4);
        assert_eq!(lab.count(Counter::TurnsSent), u64::from(turn) + 2);
    }
    lab.wire.take_sent();
    // Also where its stream is joined far from where it was.
    lab.client_segments(&["PA 300000001+10 ack 2001", "PA 300000011+10 ack 2101"]);
    let second = lab.sent()[0].source;
    lab.target_to(second, &["SA 0 ack 300000011 mss 1460"]);
    for turn in 0..20u32 {
        lab.client(&format!("PA {}+10 ack {}", 300_000_021 + turn * 10, 2101 + (turn + 1) * 100));
        lab.target_to(second, &[&format!("PA {}+130 ack {}", 1 + turn * 130, 300_000_021 + turn * 10)]);
        lab.pass(MS / 4);
        assert_eq!(lab.count(Counter::TurnsSent), u64::from(turn) + 23);
    }
}
