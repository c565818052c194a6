//! Behaviours 31 and 33: packets that are lost, repeated, late or out of order, on the way and in the capture.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use replayer_tests::clients::Load;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::Replay;
use replayer_tests::servers::{Direction, impair, second_entrance};
use replayer_tests::stream::{self, End, Record};
use replayer_tests::wait::wait_for;

const STREAM: u16 = 9000;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

#[test]
fn b031_streams_are_equal_whatever_the_network_does() -> Result<()> {
    let lab = Lab::up(Plan { offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let _to_online = impair(&lab, lab.client(), Direction::FromHost, "--reorder 25 --duplicate 5 --seed 1")?;
    let _to_target = impair(&lab, lab.target(), Direction::ToHost, "--loss 1 --seed 2")?;
    let _to_assistant = impair(&lab, lab.assistant(), Direction::ToHost, "--loss 1 --seed 3")?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 1000 --per-connection 20 --requests 20000 --rate 2500 --body 1-3000 \
         --response 1-3000",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 20_000);
    let (_, target) = streams.ensure_equal_within(20_000, Duration::from_secs(15))?;
    assert_eq!(target.connections.len(), 1000);
    let (report, _) = replay.stop()?;
    for counter in ["packets_duplicate", "segments_retransmitted"] {
        assert!(report.counter(counter) > 100, "{counter}: {:?}", report.counters);
    }
    assert_eq!(report.counter("sessions_gap"), 0, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b033_packets_that_the_capture_misses_cost_their_turn_and_no_more() -> Result<()> {
    const HIT: u64 = 20;
    let lab = Lab::up(Plan { clients: 2, offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    // One segment of each connection of the second client gets to the online server past the capture.
    let aside = second_entrance(&lab, lab.online())?;
    let hit = lab.host("client2");
    let cable =
        impair(&lab, hit, Direction::FromHost, &format!("--loss 100 --nth-data 10 --divert {aside}"))?;
    let replay = Replay::start(&lab, &[STREAM], &["--gap-timeout", "0.3"])?;
    let load = format!(
        "--connect {}:{STREAM} --connections {HIT} --per-connection 12 --requests {} --think-ms 100 \
         --body 2000-4000 --response 1-3000",
        lab.online().v4(),
        HIT * 12
    );
    let mut others = Load::start(&lab, lab.client(), "others", &load)?;
    let mut hit_load = Load::start(&lab, hit, "hit", &format!("{load} --first-id 10001"))?;
    assert_all_answered(&others.finish()?, HIT * 12);
    assert_all_answered(&hit_load.finish()?, HIT * 12);

    let online = streams.online.record()?;
    assert_eq!(online.requests() as u64, 2 * HIT * 12);
    let last_ids: BTreeSet<u64> = online.connections.iter().filter_map(|it| it.ids.last().copied()).collect();
    let mut target = Record::default();
    wait_for("the last request of each connection, and the end of all", ARRIVAL, || {
        target = streams.target.record().unwrap_or_default();
        target.connections.iter().all(|it| it.end != End::Open)
            && target
                .connections
                .iter()
                .filter(|it| it.ids.last().is_some_and(|id| last_ids.contains(id)))
                .count()
                == last_ids.len()
    })?;

    // Those that were not hit are equal.
    let prefix = format!("{}:", lab.client().v4());
    let untouched = |record: &Record| Record {
        connections: record.connections.iter().filter(|it| it.peer.starts_with(&prefix)).cloned().collect(),
    };
    let comparison = stream::compare(&untouched(&online), &untouched(&target));
    assert!(comparison.differences.is_empty(), "{comparison:#?}");
    assert_eq!(comparison.compared as u64, HIT);

    // Of each that was hit, all came but a few requests in a row, on two connections, nothing twice, and nothing that was not sent.
    for connection in online.connections.iter().filter(|it| !it.peer.starts_with(&prefix)) {
        let pieces: Vec<&[u64]> = target
            .connections
            .iter()
            .map(|it| it.ids.as_slice())
            .filter(|ids| ids.first().is_some_and(|id| connection.ids.contains(id)))
            .collect();
        let [before, after] = pieces[..] else { panic!("{pieces:?} of {:?}", connection.ids) };
        assert!(connection.ids.starts_with(before) && connection.ids.ends_with(after), "{pieces:?}");
        let missing = connection.ids.len() - before.len() - after.len();
        assert!((1..=5).contains(&missing), "{pieces:?} of {:?}", connection.ids);
    }
    assert!(target.connections.iter().all(|it| it.mismatch.is_none()), "{target:?}");

    // What is missing is what was removed and what was counted.
    let (report, _) = replay.stop()?;
    let removed: Vec<u64> = cable.output().lines().map(str::parse).collect::<Result<_, _>>()?;
    assert_eq!(removed.len() as u64, HIT);
    let counters = ["sessions_gap", "connections_joined"].map(|name| report.counter(name));
    assert_eq!(counters, [HIT, HIT], "{:?}", report.counters);
    let captured_once = report.counter("bytes_captured") - report.counter("bytes_duplicate");
    assert_eq!(online.bytes() - captured_once, removed.iter().sum::<u64>(), "{:?}", report.counters);
    let not_replayed = ["bytes_gap", "bytes_midstream", "lost_bytes_gap"].map(|name| report.counter(name));
    assert_eq!(
        online.bytes() - target.bytes(),
        removed.iter().chain(&not_replayed).sum::<u64>(),
        "{:?}",
        report.counters
    );
    Ok(())
}
