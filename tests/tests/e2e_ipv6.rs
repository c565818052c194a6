//! Behaviour 10: IPv6, and both families mixed.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Result;
use replayer_tests::clients::Load;
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::replay::{Replay, service};
use replayer_tests::servers::StreamServer;
use replayer_tests::stream::{self, RequestHeader};

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;
const OTHER_STREAM: u16 = 9001;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// A load of the recording server, with large and small messages.
fn stream_load(server: IpAddr, port: u16, source: IpAddr) -> String {
    let to = std::net::SocketAddr::new(server, port);
    format!(
        "--connect {to} --source {source} --connections 30 --per-connection 50 --requests 3000 --body 1-8000 \
         --response 1-8000"
    )
}

#[test]
fn b010_requests_over_ipv6() -> Result<()> {
    for offloads in [true, false] {
        let lab = Lab::up(Plan { offloads, ..Plan::default() })?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let target = lab.target().v6();
        let services = [service(HTTP, target, HTTP), service(STREAM, target, STREAM)];
        let replay = Replay::start_services(&lab, &services, lab.assistant().v6().into(), &[])?;
        let server = lab.online().v6();
        let http = format!(
            "--connect [{server}]:{HTTP} --protocol http --expect-server online --connections 20 --per-connection 1 \
             --requests 3000 --rate 2000"
        );
        assert_all_answered(&Load::run(&lab, "http", &http)?, 3000);
        let streams_load = stream_load(server.into(), STREAM, lab.client().v6().into());
        assert_all_answered(&Load::run(&lab, "streams", &streams_load)?, 3000);
        let (_, at_target) = nginx.ensure_equal(3000)?;
        let client = lab.client().v6().to_string();
        assert!(at_target.entries.iter().all(|entry| entry.address == client));
        streams.ensure_equal(3000)?;
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("sessions_opened"), 3060, "{:?}", report.counters);
    }
    Ok(())
}

#[test]
fn b010_idle_ipv6_connections_are_joined_at_their_next_request() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let server = (lab.online().v6(), STREAM).into();
    let request = |id, body| RequestHeader { id, body, response: 100, delay_ms: 0 };
    let mut connections: Vec<Conversation> =
        (0..100).map(|_| Conversation::open(lab.client(), server)).collect::<Result<_>>()?;
    for (id, connection) in (1..).zip(&mut connections) {
        connection.ask(request(id, 2000))?;
    }
    let services = [service(STREAM, lab.target().v6(), STREAM)];
    let replay = Replay::start_services(&lab, &services, lab.assistant().v6().into(), &[])?;
    let mut expected = BTreeSet::new();
    for (id, connection) in (1001..).zip(&mut connections) {
        connection.ask(request(id, 5000))?;
        connection.ask(request(id + 1000, 0))?;
        expected.insert((connection.local()?, vec![id, id + 1000]));
    }
    let target = streams.target.record_of(200, ARRIVAL)?;
    let found: BTreeSet<_> = target.connections.iter().map(|it| (it.peer.clone(), it.ids.clone())).collect();
    assert_eq!(found, expected);
    assert!(target.connections.iter().all(|it| it.at_boundary && it.mismatch.is_none()), "{target:?}");
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("connections_joined"), 100);
    Ok(())
}

#[test]
fn b010_one_service_is_copied_to_two_targets_over_ipv6() -> Result<()> {
    let lab = Lab::up(Plan { targets: 2, ..Plan::default() })?;
    let targets = [lab.target(), lab.host("target2")];
    let mut online = StreamServer::start(&lab, lab.online(), STREAM, &[])?;
    let mut servers = [
        StreamServer::start(&lab, targets[0], STREAM, &[])?,
        StreamServer::start(&lab, targets[1], STREAM, &[])?,
    ];
    let services = targets.map(|target| service(STREAM, target.v6(), STREAM));
    let replay = Replay::start_services(&lab, &services, lab.assistant().v6().into(), &[])?;
    let load = stream_load(lab.online().v6().into(), STREAM, lab.client().v6().into());
    assert_all_answered(&Load::run(&lab, "load", &load)?, 3000);
    let expected = online.record()?;
    for server in &mut servers {
        let comparison = stream::compare(&expected, &server.record_of(3000, ARRIVAL)?);
        assert!(comparison.differences.is_empty(), "{comparison:#?}");
        assert_eq!(comparison.compared, 60);
    }
    replay.stop()?;
    Ok(())
}

#[test]
fn b010_both_families_to_targets_of_both_families() -> Result<()> {
    let lab = Lab::up(Plan { targets: 2, ..Plan::default() })?;
    let mut servers = [
        StreamServer::start(&lab, lab.online(), STREAM, &[])?,
        StreamServer::start(&lab, lab.online(), OTHER_STREAM, &[])?,
    ];
    let mut targets = [
        StreamServer::start(&lab, lab.target(), STREAM, &[])?,
        StreamServer::start(&lab, lab.host("target2"), STREAM, &[])?,
    ];
    // Clients of each family to a target of theirs, with their own addresses, in one process.
    let services = [
        format!("{}-{}", host_port(lab.online().v4(), STREAM), host_port(lab.target().v4(), STREAM)),
        format!(
            "{}-{}",
            host_port(lab.online().v6(), OTHER_STREAM),
            host_port(lab.host("target2").v6(), STREAM)
        ),
    ];
    let replay = Replay::start_services(&lab, &services, lab.assistant().v4().into(), &[])?;
    let (client, online) = (lab.client(), lab.online());
    let v4 = stream_load(online.v4().into(), STREAM, client.v4().into());
    let v6 = stream_load(online.v6().into(), OTHER_STREAM, client.v6().into());
    let mut first = Load::start(&lab, client, "v4", &v4)?;
    assert_all_answered(&Load::run(&lab, "v6", &v6)?, 3000);
    assert_all_answered(&first.finish()?, 3000);
    for (server, target) in servers.iter_mut().zip(&mut targets) {
        let comparison = stream::compare(&server.record()?, &target.record_of(3000, ARRIVAL)?);
        assert!(comparison.differences.is_empty(), "{comparison:#?}");
        assert_eq!(comparison.compared, 60);
    }
    replay.stop()?;
    Ok(())
}

#[test]
fn b010_clients_of_the_other_family_get_addresses_of_a_pool() -> Result<()> {
    for to_v6 in [true, false] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let (target, assistant, pool): (IpAddr, IpAddr, &str) = if to_v6 {
            (lab.target().v6().into(), lab.assistant().v6().into(), "fd00:29::4:0/124")
        } else {
            (lab.target().v4().into(), lab.assistant().v4().into(), "172.29.4.0/28")
        };
        let services = [service(STREAM, target, STREAM)];
        let replay = Replay::start_services(&lab, &services, assistant, &["-c", pool])?;
        let (client, online) = (lab.client(), lab.online());
        let v4 = stream_load(online.v4().into(), STREAM, client.v4().into());
        let v6 = stream_load(online.v6().into(), STREAM, client.v6().into());
        let mut first = Load::start(&lab, client, "v4", &v4)?;
        assert_all_answered(&Load::run(&lab, "v6", &(v6 + " --first-id 10001"))?, 3000);
        assert_all_answered(&first.finish()?, 3000);
        let (at_online, at_target) = streams.records(6000, ARRIVAL)?;
        let comparison = stream::compare_copies(&at_online, &at_target, 1);
        assert!(comparison.differences.is_empty(), "{comparison:#?}");
        assert_eq!(comparison.compared, 120);
        let prefix = if to_v6 { "[fd00:29::4:" } else { "172.29.4." };
        assert!(at_target.connections.iter().all(|it| it.peer.starts_with(prefix)), "{at_target:?}");
        replay.stop()?;
    }
    Ok(())
}

fn host_port(ip: impl Into<IpAddr>, port: u16) -> String {
    std::net::SocketAddr::new(ip.into(), port).to_string()
}
