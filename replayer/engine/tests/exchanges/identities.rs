//! Copies and the addresses that they use.

use crate::lab::{CLIENT, Lab, MS, ONLINE, S, TARGET, config, endpoint};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::hash::{FLOW_SEED, flow_hash};
use replayer_engine::AddressRange;
use replayer_engine::config::Service;
use replayer_engine::counters::Counter;
use std::collections::HashSet;

#[test]
fn b041_three_copies_each_with_the_whole_stream() {
    let mut config = config();
    config.copies_millionths = 3_000_000;
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    lab.client("A 1 ack 1");
    let syns = lab.sent();
    let sources: HashSet<_> = syns.iter().map(|syn| syn.source).collect();
    assert_eq!((syns.len(), sources.len()), (3, 3), "each its own identity");
    assert!(sources.contains(&endpoint(CLIENT)));
    lab.client("PA 1+100 ack 1");
    for &source in &sources {
        lab.target_to(source, &["SA 0 ack 1 mss 1460"]);
    }
    let data = lab.sent();
    assert_eq!(data.iter().map(|segment| segment.source).collect::<HashSet<_>>(), sources);
    assert!(data.iter().all(|segment| segment.payload.len() == 100));
    assert_eq!(lab.engine.gauges().held_bytes, 100, "held once for all copies");
    // They go on each at its own pace.
    lab.client("PA 101+100 ack 51");
    lab.target_to(syns[1].source, &["PA 1+50 ack 101"]);
    let data = lab.sent();
    assert_eq!((data.len(), data[0].source), (1, syns[1].source));
    lab.target_to(syns[1].source, &["PA 51+50 ack 201"]);
    lab.target_to(syns[2].source, &["RA 1 ack 1"]);
    lab.stop();
}

#[test]
fn b041_two_and_a_half_copies() {
    let mut config = config();
    config.copies_millionths = 2_500_000;
    let mut lab = Lab::with(config);
    for port in 0..100 {
        lab.client.port = 20_000 + port;
        lab.client("S 0 mss 1460");
        let syns = lab.sent().len();
        assert_eq!(syns, if port % 2 == 0 { 2 } else { 3 });
    }
    assert_eq!(lab.count(Counter::SessionsOpened), 250);
}

#[test]
fn b041_a_pool_that_is_too_small_is_a_counted_shortfall() {
    let mut config = config();
    config.copies_millionths = 10_000_000;
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 1]), count: 2 }];
    config.limits.identities = 25;
    let mut lab = Lab::with(config);
    for port in 0..4 {
        lab.client.port = 20_000 + port;
        lab.client("S 0 mss 1460");
    }
    let sent = lab.sent();
    assert_eq!(sent.len(), 25);
    assert_eq!(sent.iter().map(|syn| syn.source).collect::<HashSet<_>>().len(), 25);
    assert!(sent.iter().all(|syn| syn.source.ip[15] <= 2 && syn.source.ip[13] == 9));
    assert_eq!(lab.count(Counter::SessionsRefusedPool), 15);
}

#[test]
fn b042_identities_of_a_pool_rest_and_come_back_also_after_days() {
    let mut config = config();
    config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 1]), count: 1 }];
    config.limits.identities = 1;
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    let syn = lab.sent().remove(0);
    lab.target_to(syn.source, &["SA 0 ack 1 mss 1460", "RA 1 ack 1"]);
    lab.sent();
    lab.client.port += 1;
    lab.client("S 0 mss 1460");
    lab.expect(&[]);
    // More than half the time after which the tick wraps.
    lab.pass(45 * 3600 * S);
    lab.client.port += 1;
    lab.client("S 0 mss 1460");
    lab.expect(&["S 0"]);
}

#[test]
fn b045_one_service_to_two_targets() {
    let mut config = config();
    config.services.push(Service { online: endpoint(ONLINE), target: endpoint("10.0.2.2:8080") });
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    let syns = lab.sent();
    let targets: HashSet<_> = syns.iter().map(|syn| syn.destination).collect();
    assert_eq!(targets, HashSet::from([endpoint(TARGET), endpoint("10.0.2.2:8080")]));
    assert!(
        syns.iter().all(|syn| syn.source == endpoint(CLIENT)),
        "each target sees the client's own address"
    );
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["A 1 ack 1"]);
    lab.service = 1;
    lab.target("RA 0 ack 1");
    assert_eq!(lab.engine.gauges().sessions_live, 1);
    let by_service: Vec<_> = lab
        .engine
        .service_counters()
        .map(|c| [c.sessions_opened, c.sessions_established, c.sessions_refused, c.sessions_ended])
        .collect();
    assert_eq!(by_service, [[1, 1, 0, 0], [1, 0, 1, 1]]);
    let heard = |lab: &Lab| lab.engine.service_counters().map(|c| c.heard).collect::<Vec<_>>();
    let before = heard(&lab);
    lab.pass(MS);
    assert_eq!(heard(&lab), before);
    lab.service = 0;
    lab.target("A 1 ack 1");
    assert_eq!((heard(&lab)[0] != before[0], heard(&lab)[1]), (true, before[1]));
}

#[test]
fn ports_of_the_clients_address_are_those_that_capture_gives_to_the_same_worker() {
    // Otherwise two workers could use one identity: the other one's client may have that very port.
    for worker in 0..3 {
        let mut config = config();
        config.copies_millionths = 20_000_000;
        (config.worker, config.workers) = (worker, 3);
        let mut lab = Lab::with(config);
        lab.client.port =
            (20_000..).find(|&port| flow_hash(FLOW_SEED, &lab.client.ip, port) % 3 == worker).unwrap();
        lab.client("S 0 mss 1460");
        let syns = lab.sent();
        assert_eq!(syns.len(), 20);
        for syn in syns {
            assert_eq!(flow_hash(FLOW_SEED, &syn.source.ip, syn.source.port) % 3, worker);
        }
    }
}

#[test]
fn b010_a_v4_client_and_a_v6_target_need_a_pool() {
    let mut config = config();
    config.services[0].target = endpoint("[2001:db8::9]:8080");
    let mut lab = Lab::with(config.clone());
    lab.client("S 0 mss 1460");
    lab.expect(&[]);
    assert_eq!(lab.count(Counter::SessionsRefusedFamily), 1);
    config.pool = vec![AddressRange { first: endpoint("[2001:db8::1:0]:1").ip, count: 10 }];
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    lab.expect(&["S 0"]);
}

#[test]
fn b043_each_instance_keeps_to_its_pool() {
    let sources = |first: [u8; 4]| {
        let mut config = config();
        config.pool = vec![AddressRange { first: from_v4(first), count: 2 }];
        let mut lab = Lab::with(config);
        for port in 0..200 {
            lab.client.port = 10_000 + port;
            lab.client("S 0 mss 1460");
        }
        let syns = lab.sent();
        assert_eq!(syns.len(), 200);
        syns.into_iter().map(|syn| syn.source).collect::<HashSet<_>>()
    };
    let (one, other) = (sources([10, 9, 0, 0]), sources([10, 9, 0, 2]));
    assert_eq!((one.len(), other.len()), (200, 200));
    assert!(one.is_disjoint(&other));
}

#[test]
fn b044_a_sample_is_a_fifth_of_the_connections_whole_and_always_the_same() {
    let sampled = |seed| {
        let mut config = config();
        config.sample_threshold = (1 << 32) / 5;
        config.limits.connections = 10_000;
        config.limits.sessions = 10_000;
        config.seed = seed;
        let mut lab = Lab::with(config);
        let mut kept = HashSet::new();
        for i in 0..4000u32 {
            lab.client = endpoint(&format!("10.3.{}.{}:{}", i / 200 % 200, 1 + i % 200, 2000 + i));
            // All of a connection or nothing: its SYN and its data.
            lab.client_segments(&["S 0 mss 1460", "A 1 ack 1", "PA 1+10 ack 1"]);
            let kept_it = lab.sent().len() == 1;
            if kept_it {
                kept.insert(lab.client);
            }
            assert_eq!(lab.count(Counter::BytesAccepted), 10 * kept.len() as u64);
        }
        kept
    };
    let kept = sampled(1);
    assert!((720..880).contains(&kept.len()), "{} of 4000", kept.len());
    assert_eq!(kept, sampled(99), "whatever seed its tables have");
}

#[test]
fn b044_a_smaller_sample_closes_what_leaves_it_and_a_larger_one_joins_it_at_a_turn() {
    let mut lab = Lab::new();
    let hash = u64::from(flow_hash(FLOW_SEED, &lab.client.ip, lab.client.port));
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    lab.expect(&["PA 1+100 ack 1"]);
    // It is in this one too.
    lab.engine.set_sample(lab.now, hash + 1, &mut lab.wire);
    lab.client("PA 101+100 ack 51");
    lab.target("PA 1+50 ack 101");
    lab.expect(&["PA 101+100 ack 51"]);
    // Out of this one, and what it has sent is still answered and acknowledged.
    lab.engine.set_sample(lab.now, hash, &mut lab.wire);
    lab.check();
    lab.client("PA 201+100 ack 101");
    assert_eq!((lab.count(Counter::PacketsSampledOut), lab.count(Counter::BytesSampledOut)), (1, 100));
    lab.target("PA 51+50 ack 201");
    lab.pass(100 * MS);
    assert!(lab.sent().iter().any(|segment| lab.text(segment).starts_with("FA 201")));
    lab.target("FA 101 ack 202");
    assert_eq!((lab.engine.gauges().sessions_live, lab.engine.gauges().connections_live), (0, 0));
    lab.sent();
    lab.engine.set_sample(lab.now, 1 << 32, &mut lab.wire);
    lab.client("PA 301+100 ack 151");
    lab.expect(&[]);
    lab.client("PA 401+100 ack 201");
    assert_eq!((lab.sent().len(), lab.count(Counter::SessionsOpened)), (1, 2));
}

/// A client that has sent a request.
fn thirty_copies_of_which_eight_may_wait() -> Lab {
    let mut config = config();
    config.copies_millionths = 30_000_000;
    config.limits.copies_unanswered = 8;
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    lab.client_segments(&["A 1 ack 1", "PA 1+100 ack 1"]);
    lab
}

#[test]
fn b041_copies_beyond_what_a_backlog_holds_wait_for_others_to_be_answered() {
    let mut lab = thirty_copies_of_which_eight_may_wait();
    let mut asked = Vec::new();
    let mut delivered = 0;
    while asked.len() < 30 {
        let sent = lab.sent();
        delivered += sent.iter().filter(|segment| segment.payload.len() == 100).count();
        let syns: Vec<_> = sent.into_iter().filter(|segment| segment.has(2)).collect();
        assert!(!syns.is_empty() && syns.len() <= 8, "{} SYNs at once", syns.len());
        // Three answers make room for three.
        for syn in syns {
            asked.push(syn.source);
            lab.target_to(syn.source, &["SA 0 ack 1 mss 1460"]);
        }
    }
    delivered += lab.sent().iter().filter(|segment| segment.payload.len() == 100).count();
    assert_eq!(asked.iter().collect::<HashSet<_>>().len(), 30, "each copy once");
    assert_eq!(delivered, 30, "with the data that was captured while they waited");
    assert_eq!(lab.count(Counter::SessionsOpened), 30);
    lab.stop();
}

#[test]
fn b016_copies_that_wait_for_a_silent_target_are_given_up_in_the_end() {
    let mut lab = thirty_copies_of_which_eight_may_wait();
    assert_eq!(lab.sent().len(), 8);
    lab.pass(60 * S);
    assert_eq!(lab.count(Counter::SessionsHandshakeTimeout), 30);
    assert_eq!(lab.engine.gauges().sessions_live, 0);
    assert_eq!(lab.engine.gauges().held_bytes, 0);
}

#[test]
fn b041_spread_copies_begin_each_turn_later_by_their_share() {
    let mut config = config();
    config.copies_millionths = 20_000_000;
    config.spread_ns = 1000 * MS;
    config.hold_limit_ns = 60 * S;
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    lab.client_segments(&["A 1 ack 1", "PA 1+100 ack 1"]);
    lab.expect(&[]);
    let mut begun: Vec<Vec<(u64, Endpoint)>> = Vec::new();
    for turn in 0..2 {
        let start = lab.now;
        if turn == 1 {
            // Each copy has read its response long ago, and still keeps its distance.
            lab.client("PA 101+100 ack 51");
        }
        let mut times = Vec::new();
        while lab.now < start + 1100 * MS {
            lab.pass(5 * MS);
            for segment in lab.sent() {
                if segment.has(2) {
                    lab.target_to(segment.source, &["SA 0 ack 1 mss 1460"]);
                } else if !segment.payload.is_empty() {
                    times.push((lab.now - start, segment.source));
                    let answer = format!("PA {}+50 ack {}", 1 + 50 * turn, 101 + 100 * turn);
                    lab.target_to(segment.source, &[&answer]);
                }
            }
            // The SYN's answer lets the data go.
            for segment in lab.sent().iter().filter(|segment| !segment.payload.is_empty()) {
                times.push((lab.now - start, segment.source));
                lab.target_to(segment.source, &["PA 1+50 ack 101"]);
            }
        }
        assert!(lab.engine.take_lag().longest_us < 10_000, "a wanted delay is no lag");
        begun.push(times);
    }
    for times in &begun {
        assert_eq!(times.len(), 20);
        assert!(times.iter().all(|&(at, _)| at <= 1010 * MS));
        let late = times.iter().filter(|&&(at, _)| at > 500 * MS).count();
        assert!((4..=16).contains(&late), "{times:?}");
    }
    for (at, source) in &begun[0] {
        let (again, _) = begun[1].iter().find(|(_, other)| other == source).expect("the same copies");
        assert!(at.abs_diff(*again) <= 10 * MS, "{source}: {at} and {again}");
    }
    lab.stop();
}
