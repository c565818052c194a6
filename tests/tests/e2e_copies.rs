//! Behaviours 41, 42 and 44: several copies of a connection, identities from a pool, and samples.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use replayer_tests::clients::Load;
use replayer_tests::lab::{Host, Lab, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::servers::StreamServer;
use replayer_tests::stream;
use replayer_tests::wait::settled;

const STREAM: u16 = 9000;
/// How long many copies may take to arrive: the target is the bottleneck.
const COPIES_ARRIVAL: Duration = Duration::from_secs(20);

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// Copies `connections` connections of one client `copies` times: each of their streams arrives so often, or, where `copies` is a
/// fraction, one time more or less, and the sum is exact.
fn copy_connections(copies: f64, connections: usize, requests_each: usize) -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &["-n", &copies.to_string(), "-c", "172.29.1.0/24"])?;
    let requests = connections * requests_each;
    let load = format!(
        "--connect {}:{STREAM} --connections {connections} --per-connection {requests_each} --requests {requests} \
         --body 1-500 --response 1-500",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, requests as u64);
    let sessions = (connections as f64 * copies).round() as usize;
    let target = streams.target.record_of(sessions * requests_each, COPIES_ARRIVAL)?;
    let online = streams.online.record()?;
    let (report, _) = replay.stop()?;
    assert_eq!(online.connections.len(), connections);
    assert_eq!(
        (target.connections.len(), target.requests()),
        (sessions, sessions * requests_each),
        "{:?}",
        report.counters
    );
    if copies.fract() == 0.0 {
        let comparison = stream::compare_copies(&online, &target, copies as usize);
        assert!(comparison.differences.is_empty(), "{comparison:#?}");
    } else {
        for want in &online.connections {
            let found = target.connections.iter().filter(|it| it.hash == want.hash).count() as f64;
            assert!(found == copies.floor() || found == copies.ceil(), "{found} copies of {}", want.peer);
        }
    }
    let identities: BTreeSet<&str> = target.connections.iter().map(|it| it.peer.as_str()).collect();
    assert_eq!(identities.len(), sessions, "sessions share identities");
    assert!(identities.iter().all(|identity| identity.starts_with("172.29.1.")), "{identities:?}");
    assert_eq!(report.counter("sessions_opened"), sessions as u64, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b041_three_copies_of_each_connection() -> Result<()> {
    copy_connections(3.0, 200, 10)?;
    copy_connections(3.0, 1000, 2)
}

#[test]
fn b041_ten_copies_of_each_connection() -> Result<()> {
    copy_connections(10.0, 200, 5)?;
    copy_connections(10.0, 1000, 1)
}

#[test]
fn b041_two_and_a_half_copies_of_each_connection() -> Result<()> {
    copy_connections(2.5, 200, 10)?;
    copy_connections(2.5, 1000, 2)
}

#[test]
fn b042_fifty_clients_share_one_address() -> Result<()> {
    let lab = Lab::up(Plan { client_addresses: 50, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &["-c", "172.29.1.1"])?;
    // All use the same two ports: with one address instead of theirs, ports alone tell them apart.
    let sources: Vec<String> = (0..50).map(|index| lab.client().client_v4(index).to_string()).collect();
    let load = format!(
        "--connect {}:{STREAM} --connections 100 --per-connection 20 --requests 2000 --body 1-3000 --response 1-3000 \
         --source-port 30000 --source {}",
        lab.online().v4(),
        sources.join(",")
    );
    let summary = Load::run(&lab, "load", &load)?;
    assert_all_answered(&summary, 2000);
    let (online, target) = streams.records(2000, ARRIVAL)?;
    let ports: BTreeSet<&str> =
        online.connections.iter().filter_map(|it| it.peer.rsplit(':').next()).collect();
    assert_eq!(ports, BTreeSet::from(["30000", "30001"]));
    let comparison = stream::compare_copies(&online, &target, 1);
    assert!(comparison.differences.is_empty(), "{comparison:#?}");
    assert_eq!(comparison.compared, 100);
    let identities: BTreeSet<&str> = target.connections.iter().map(|it| it.peer.as_str()).collect();
    assert_eq!(identities.len(), 100);
    assert!(identities.iter().all(|identity| identity.starts_with("172.29.1.1:")), "{identities:?}");
    replay.stop()?;
    Ok(())
}

#[test]
fn b044_a_sample_is_the_same_whole_connections_on_every_host_and_in_every_run() -> Result<()> {
    const CONNECTIONS: usize = 4000;
    let lab = Lab::up(Plan { onlines: 2, ..Plan::default() })?;
    let mut assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    let sample = |host: &Host| -> Result<BTreeSet<String>> {
        let mut servers = [
            StreamServer::start(&lab, host, STREAM, &[])?,
            StreamServer::start(&lab, lab.target(), STREAM, &[])?,
        ];
        let mut role = Role::online(&lab, host, &services, lab.assistant().v4().into(), &["-r", "20"])?;
        let load = format!(
            "--connect {}:{STREAM} --source-port 20000 --connections {CONNECTIONS} --per-connection 2 --requests {} \
             --close rst",
            host.v4(),
            2 * CONNECTIONS
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 2 * CONNECTIONS as u64);
        settled(Duration::from_millis(500), ARRIVAL, || {
            servers[1].record().map_or(0, |record| record.requests())
        });
        let report = role.stop_online()?;
        assert_eq!(report.counter("sessions_stopped"), 0, "{:?}", report.counters);
        let (online, target) = (servers[0].record()?, servers[1].stop()?);
        assert_eq!(online.connections.len(), CONNECTIONS);
        let whole = |it: &&stream::Connection| it.ids.len() == 2 && it.at_boundary;
        assert_eq!(target.connections.iter().filter(whole).count(), target.connections.len());
        Ok(target.connections.into_iter().map(|it| it.peer).collect())
    };
    let first = sample(lab.online())?;
    let share = first.len() as f64 / CONNECTIONS as f64;
    assert!((0.18..=0.22).contains(&share), "{share} of the connections are in a sample of 0.2");
    assert_eq!(first, sample(lab.online())?);
    assert_eq!(first, sample(lab.host("online2"))?);
    assistant.stop::<serde_json::Value>()?;
    Ok(())
}
