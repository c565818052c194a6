//! Behaviours 41 and 44: copies by the hundred, exact or counted; spread in time; a share of the connections that grows.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use replayer_tests::clients::Load;
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Lab, POOL_V4, Plan};
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::replay::{Replay, Report};
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::wait_for;

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;

/// How often each URI came, by how many URIs came so often.
fn times(uris: impl Iterator<Item = String>) -> BTreeMap<usize, usize> {
    let mut by_uri: BTreeMap<String, usize> = BTreeMap::new();
    for uri in uris {
        *by_uri.entry(uri).or_default() += 1;
    }
    let mut times = BTreeMap::new();
    for count in by_uri.into_values() {
        *times.entry(count).or_default() += 1;
    }
    times
}

/// `requests` over `connections` that open at once, replayed with `arguments`: what the target got of each, and the report.
fn amplified(
    connections: usize,
    requests: usize,
    arguments: &[&str],
    expected: usize,
) -> Result<(BTreeMap<usize, usize>, Report)> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let replay = Replay::start(&lab, &[HTTP], arguments)?;
    let load = format!(
        "--connect {}:{HTTP} --protocol http --connections {connections} --requests {requests} --per-connection {}",
        lab.online().v4(),
        requests / connections
    );
    let summary = Load::run(&lab, "load", &load)?;
    assert_eq!((summary.responses, summary.errors), (requests as u64, 0), "{summary:?}");
    let ledger = nginx.target.settled_ledger(expected, Duration::from_secs(30))?;
    let (report, _) = replay.stop()?;
    Ok((times(ledger.entries.into_iter().map(|entry| entry.uri)), report))
}

#[test]
fn b041_a_hundred_copies_of_two_hundred_connections_that_open_at_once() -> Result<()> {
    let (times, report) = amplified(200, 400, &["-n", "100", "-c", POOL_V4], 40_000)?;
    assert_eq!(times, BTreeMap::from([(100, 400)]), "{:#?}", report.counters);
    assert_eq!(report.counter("sessions_opened"), 20_000);
    Ok(())
}

#[test]
fn b041_two_and_a_half_copies_of_a_thousand_connections_from_one_address() -> Result<()> {
    let (times, report) = amplified(1000, 1000, &["-n", "2.5"], 2500)?;
    assert_eq!(times, BTreeMap::from([(2, 500), (3, 500)]), "{:#?}", report.counters);
    Ok(())
}

#[test]
fn b041_what_a_pool_cannot_give_is_counted() -> Result<()> {
    // 64 512 identities, and each copy takes one.
    let (times, report) = amplified(70, 70, &["-n", "1000", "-c", "172.29.0.9"], 64_512)?;
    let delivered: usize = times.iter().map(|(count, uris)| count * uris).sum();
    assert_eq!(report.counter("sessions_wanted"), 70_000);
    assert_eq!(report.counter("sessions_refused_pool"), 70_000 - 64_512);
    assert_eq!(delivered, 64_512, "{times:?} {:#?}", report.counters);
    Ok(())
}

#[test]
fn b041_spread_copies_arrive_one_after_another() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &["-n", "8", "--spread", "1000", "-c", POOL_V4])?;
    let mut connection = Conversation::open(lab.client(), (lab.online().v4(), STREAM).into())?;
    let request = |id| RequestHeader { id, body: 100, response: 100, delay_ms: 0 };
    connection.ask(request(1))?;
    connection.ask(request(2))?;
    let record = streams.target.record_of(16, ARRIVAL)?;
    assert_eq!(record.connections.len(), 8);
    let times = |turn: usize| record.connections.iter().map(move |it| it.times_us[turn]);
    // Within a second of its capture, each copy by a share of its own, the same for both turns.
    for turn in 0..2 {
        let (first, last) = (times(turn).min(), times(turn).max());
        let apart = last.zip(first).map_or(0, |(last, first)| last - first);
        assert!((50_000..1_050_000).contains(&apart), "turn {turn}: all within {apart} us");
    }
    let apart: Vec<u64> = record.connections.iter().map(|it| it.times_us[1] - it.times_us[0]).collect();
    let (shortest, longest) = (apart.iter().min(), apart.iter().max());
    assert!(longest.zip(shortest).is_some_and(|(l, s)| l - s < 60_000), "each keeps its distance: {apart:?}");
    drop(connection);
    replay.stop()?;
    Ok(())
}

#[test]
fn b044_a_ramp_grows_to_the_sample_and_keeps_whom_it_has() -> Result<()> {
    const RAMP: Duration = Duration::from_secs(4);
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let replay = Replay::start(&lab, &[HTTP], &["-r", "50", "-g", "4"])?;
    // It began a little earlier, so after this time it is over.
    let began = Instant::now();
    let load = |first_id: u64| {
        // The same 400 ports each time.
        let load = format!(
            "--connect {}:{HTTP} --protocol http --connections 400 --per-connection 1 --requests 400 --source-port 20000 --close rst --first-id {first_id}",
            lab.online().v4()
        );
        Load::run(&lab, "load", &load)
    };
    let mut before: Vec<u16> = Vec::new();
    let mut sizes = Vec::new();
    for round in 0.. {
        let over = began.elapsed() > RAMP;
        let summary = load(1 + 1000 * round)?;
        ensure!((summary.responses, summary.errors) == (400, 0), "{summary:?}");
        // All that was sent has arrived, as the role says twice: what it says once may be of a moment before.
        let at_end = replay.online.stats().map_or(0.0, |stats| stats.t);
        wait_for("what was sent at the target", ARRIVAL, || {
            let stats = replay.online.stats().unwrap_or_default();
            let arrived = nginx.target.ledger().map_or(0, |ledger| ledger.len());
            stats.t > at_end + 1.5 && stats.sessions_opened == arrived as u64
        })?;
        let ids = 1 + 1000 * round..1000 * (round + 1);
        let of_round = |uri: &str| {
            uri.rsplit_once('=').is_some_and(|(_, id)| id.parse().is_ok_and(|id: u64| ids.contains(&id)))
        };
        let ports = || -> Result<Vec<u16>> {
            let ledger = nginx.target.ledger()?.filtered(|entry| of_round(&entry.uri));
            let mut ports: Vec<u16> = ledger.entries.iter().map(|entry| entry.port).collect();
            ports.sort_unstable();
            Ok(ports)
        };
        let ports = ports()?;
        assert!(
            before.iter().all(|port| ports.contains(port)),
            "who was in it is in it: {before:?} {ports:?}"
        );
        sizes.push(ports.len());
        before = ports;
        if over {
            break;
        }
    }
    let last = before.len();
    assert!(sizes[0] < last / 2, "it begins low: {sizes:?}");
    assert!((160..=240).contains(&last), "half of 400: {sizes:?}");
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("sessions_opened"), sizes.iter().sum::<usize>() as u64);
    Ok(())
}
