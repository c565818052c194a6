//! Behaviours 12, 13, 15, 16, 18, 21, 22, 32, 35 and 40: a session's beginning, its turns, and its end.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use replayer_tests::clients::{Load, Watch, counter, output_of};
use replayer_tests::conversation::{Conversation, bytes_of};
use replayer_tests::lab::{Host, Lab, Plan};
use replayer_tests::ledger;
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::replay::{Replay, Report};
use replayer_tests::servers::{Direction, Nginx, impair, start_redis};
use replayer_tests::stream::{self, End, Record, RequestHeader};
use replayer_tests::wait::{holds_within, wait_for};

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;

/// A lab in whose cables `impair` can stand.
fn plain_lab() -> Result<Lab> {
    Lab::up(Plan { offloads: false, ..Plan::default() })
}

fn seconds_now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// Ids of all requests in a record, whatever connections they came on.
fn ids(record: &Record) -> Vec<u64> {
    let mut ids: Vec<u64> = record.connections.iter().flat_map(|connection| connection.ids.clone()).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn b012_data_captured_before_the_syn_ack_is_held_and_sent_once() -> Result<()> {
    let lab = plain_lab()?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let _slow = impair(&lab, lab.target(), Direction::FromHost, "--only syn-ack --delay-ms 200")?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --per-connection 5 --requests 100 --body 1-5000 --response 1-5000",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 100);
    let (online, target) = streams.ensure_equal(100)?;
    for connection in &target.connections {
        let there =
            online.connections.iter().find(|it| it.peer == connection.peer).context("a peer of both")?;
        let later_us = connection.times_us[0].saturating_sub(there.times_us[0]);
        // The delay began with the handshake, a little before the request.
        assert!(later_us >= 150_000, "the first request came {later_us} us later");
    }
    replay.stop()?;
    Ok(())
}

/// Of the connections that were open already, how many were in the middle of a request, by what the online role says.
fn in_a_request(said: &str) -> Result<usize> {
    let numbers = said.lines().find_map(|line| {
        let (open, rest) = line.strip_prefix("online: ")?.split_once(" connections are open already, ")?;
        Some((open.parse::<usize>().ok()?, rest.split_once(' ')?.0.parse::<usize>().ok()?))
    });
    let (open, between) = numbers.with_context(|| format!("no word of open connections: {said}"))?;
    ensure!(between + 5 >= open, "{between} of {open} connections are between two requests");
    Ok(open - between)
}

#[test]
fn b013_connections_that_were_open_before_are_joined_or_left_out() -> Result<()> {
    for only_new in [false, true] {
        let lab = Lab::up(Plan::default())?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let load = |more: &str| {
            format!("--connect {}:{HTTP} --protocol http --expect-server online {more}", lab.online().v4())
        };
        let running = load("--connections 100 --rate 500 --seconds 5 --first-id 1000000");
        let mut running = Load::start(&lab, lab.client(), "running", &running)?;
        wait_for("requests before the replayer", Duration::from_secs(10), || {
            nginx.online.ledger().is_ok_and(|ledger| ledger.connections().len() == 100)
        })?;
        let arguments: &[&str] = if only_new { &["-O"] } else { &[] };
        let replay = Replay::start(&lab, &[HTTP], arguments)?;
        let ready = seconds_now()?;
        let in_a_request = if only_new { 0 } else { in_a_request(&replay.online.process.errors())? };
        assert_all_answered(
            &Load::run(&lab, "new", &load("--connections 20 --per-connection 5 --requests 500"))?,
            500,
        );
        let summary = running.finish()?;
        assert_eq!(summary.errors, 0, "{summary:?}");
        let total = summary.requests as usize + 500;

        let is_old = |entry: &ledger::Entry| entry.uri.len() > "/r?id=99999".len();
        let (online, target) =
            (nginx.online.settled_ledger(total, ARRIVAL)?, nginx.target.settled_ledger(total, ARRIVAL)?);
        let difference = ledger::compare(
            &online.filtered(|entry| !is_old(entry)),
            &target.filtered(|entry| !is_old(entry)),
        );
        assert_eq!((difference.online, difference.missing, difference.extra), (500, 0, 0), "{difference:?}");
        let old_at_target = target.filtered(is_old);
        if only_new {
            assert!(old_at_target.is_empty(), "{} requests of older connections", old_at_target.len());
        } else {
            // What was on its way at the very start may belong to either side of it.
            let after = online.filtered(|entry| is_old(entry) && entry.time > ready + 0.05);
            let difference = ledger::compare(&after, &old_at_target);
            assert!(after.len() > 1000, "{difference:?}");
            // A connection that was in the middle of a request is joined at its second one from then on.
            assert!(
                difference.missing <= in_a_request,
                "{difference:?}, {in_a_request} in the middle of one"
            );
            assert_eq!(ledger::compare(&online, &target).extra, 0);
        }
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b015_a_lost_syn_or_syn_ack_is_made_up_for() -> Result<()> {
    for (direction, segment) in [(Direction::ToHost, "syn"), (Direction::FromHost, "syn-ack")] {
        let lab = plain_lab()?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let cable =
            impair(&lab, lab.target(), direction, &format!("--only {segment} --loss 100 --lose-at-most 1"))?;
        let replay = Replay::start(&lab, &[STREAM], &[])?;
        let load = format!("--connect {}:{STREAM} --requests 3 --per-connection 3", lab.online().v4());
        assert_all_answered(&Load::run(&lab, "load", &load)?, 3);
        streams.ensure_equal_within(3, Duration::from_secs(4)).with_context(|| format!("{segment} lost"))?;
        assert_eq!(cable.output().lines().count(), 1, "no {segment} was lost");
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b016_a_closed_port_is_asked_rarely_and_copying_resumes_when_it_opens() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let online = Nginx::start(&lab, lab.online(), HTTP)?;
    let syn = "tcp flags & (syn | ack) == syn";
    let watch = Watch::arriving(lab.target(), &[("syns", syn)])?;
    let replay = Replay::start(&lab, &[HTTP], &[])?;
    let before_kib = replay.online.process.resident_kib()?;
    let load = |path: &str, amount: &str| {
        format!(
            "--connect {}:{HTTP} --protocol http --expect-server online --path {path} --connections 20 --per-connection 1 \
             --rate 1000 {amount}",
            lab.online().v4()
        )
    };
    let mut before = Load::start(&lab, lab.client(), "load", &load("/before", "--seconds 30"))?;
    let count = || online.ledger().map_or(0, |ledger| ledger.len());
    wait_for("3000 connections online", Duration::from_secs(10), || count() >= 3000)?;
    let syns = watch.packets()?["syns"];
    assert!(syns > 0 && syns <= 300, "{syns} SYNs for 3000 connections");
    let grown_kib = replay.online.process.resident_kib()?.saturating_sub(before_kib);
    assert!(grown_kib < 32 * 1024, "the online role has grown by {grown_kib} KiB");

    let target = Nginx::start(&lab, lab.target(), HTTP)?;
    let opened = seconds_now()?;
    let first = || target.ledger().ok()?.entries.iter().map(|entry| entry.time).reduce(f64::min);
    wait_for("a request at the target", ARRIVAL, || first().is_some())?;
    let first = first().context("no request")?;
    assert!(first < opened + 1.0, "the first request came {} s after the port opened", first - opened);
    before.process.kill()?;
    // From then on nothing is missing.
    let summary = Load::run(&lab, "after", &load("/after", "--requests 1500"))?;
    assert_all_answered(&summary, 1500);
    let after =
        |nginx: &Nginx| nginx.ledger().map(|ledger| ledger.filtered(|entry| entry.uri.starts_with("/after")));
    let all = |nginx: &Nginx| after(nginx).is_ok_and(|ledger| ledger.len() == 1500);
    wait_for("all requests on both sides", ARRIVAL, || all(&online) && all(&target))?;
    let difference = ledger::compare(&after(&online)?, &after(&target)?);
    assert_eq!((difference.online, difference.missing, difference.extra), (1500, 0, 0), "{difference:?}");
    replay.stop()?;
    Ok(())
}

#[test]
fn b018_a_port_that_is_used_again_at_once_gives_two_sessions() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start_with(&lab, STREAM, &["--close-after", "1"], &["--delay-ms", "2000"])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --source-port 25000 --connections 5 --per-connection 1 --requests 15 --close last",
        lab.online().v4()
    );
    let summary = Load::run(&lab, "load", &load)?;
    assert_all_answered(&summary, 15);
    let ports: BTreeSet<&str> =
        summary.connections.iter().map(|connection| connection.local.as_str()).collect();
    assert_eq!(ports.len(), 5);
    assert!(summary.seconds < 1.5, "the client was not faster than the target: {} s", summary.seconds);
    let (online, target) = streams.records(15, Duration::from_secs(15))?;
    assert_eq!(ids(&online), (1..=15).collect::<Vec<u64>>());
    assert_eq!(ids(&target), ids(&online));
    assert!(target.connections.iter().all(|it| it.at_boundary && it.mismatch.is_none()), "{target:?}");
    replay.stop()?;
    Ok(())
}

#[test]
fn b021_a_request_waits_for_the_answer_to_the_one_before_unless_told_not_to() -> Result<()> {
    for no_wait in [false, true] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--delay-ms", "300"])?;
        let arguments: &[&str] = if no_wait { &["-W"] } else { &[] };
        let replay = Replay::start(&lab, &[STREAM], arguments)?;
        let load = format!(
            "--connect {}:{STREAM} --connections 10 --per-connection 5 --requests 50 --think-ms 20 --body 1-3000 \
             --response 1-3000",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 50);
        let (_, target) = streams.ensure_equal(50)?;
        let early: u64 = target.connections.iter().map(|connection| connection.early).sum();
        // The client needs 80 ms for the four after the first, to which the target answers after 300 ms.
        assert_eq!(early, if no_wait { 40 } else { 0 }, "requests that came early, -W: {no_wait}");
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b022_pipelined_requests_arrive_in_order() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _servers = [start_redis(&lab, lab.online(), 6379)?, start_redis(&lab, lab.target(), 6379)?];
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[6379, STREAM], &[])?;
    let online = lab.online().v4().to_string();
    // One client that appends to one list: the list's order is that of the commands.
    let list = ["-c", "1", "-n", "20000", "-r", "1000000", "-q", "RPUSH", "list", "__rand_int__"];
    output_of(lab.client().command("redis-benchmark").args(["-h", &online, "-P", "50"]).args(list))?;
    let load = format!(
        "--connect {online}:{STREAM} --connections 20 --per-connection 500 --requests 10000 --pipeline 50 --body 0-300 \
         --response 1-300"
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 10_000);
    streams.ensure_equal(10_000)?;
    let digest = |host: &Host| output_of(host.command("redis-cli").args(["DEBUG", "DIGEST"]));
    let expected = digest(lab.online())?;
    wait_for("the same list at the target", ARRIVAL, || {
        digest(lab.target()).is_ok_and(|found| found == expected)
    })?;
    replay.stop()?;
    Ok(())
}

#[test]
fn b032_what_clients_send_twice_is_replayed_once() -> Result<()> {
    let lab = plain_lab()?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    // Some segments come twice, and some of the online server's acknowledgements are lost, so that clients repeat data.
    let _to_online =
        impair(&lab, lab.client(), Direction::FromHost, "--only established --duplicate 20 --loss 1")?;
    let _to_client = impair(&lab, lab.online(), Direction::FromHost, "--only established --loss 2")?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --per-connection 20 --requests 400 --body 100-20000 --response 1-5000",
        lab.online().v4()
    );
    let retransmitted = counter(lab.client(), "Tcp:", "RetransSegs")?;
    assert_all_answered(&Load::run(&lab, "load", &load)?, 400);
    assert!(counter(lab.client(), "Tcp:", "RetransSegs")? > retransmitted, "clients sent nothing twice");
    streams.ensure_equal(400)?;
    // A receiver says by a duplicate SACK that data came that it had (RFC 2883). What the session itself sent again, since an
    // acknowledgement was late, is no client's retransmission.
    let repeated = counter(lab.target(), "TcpExt:", "TCPDSACKOldSent")?
        + counter(lab.target(), "TcpExt:", "TCPDSACKOfoSent")?;
    let (report, _) = replay.stop()?;
    assert!(report.counter("packets_duplicate") > 0, "nothing was captured twice");
    let own = report.counter("segments_retransmitted");
    assert!(repeated <= own, "the target got {repeated} segments twice, of which {own} are retransmissions");
    Ok(())
}

#[test]
fn b035_half_close_and_reset_reach_the_target_after_the_data() -> Result<()> {
    for (close, expected) in [("half", End::Fin), ("fin", End::Fin), ("rst", End::Rst)] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--delay-ms", "20"])?;
        let replay = Replay::start(&lab, &[STREAM], &[])?;
        let load = format!(
            "--connect {}:{STREAM} --connections 10 --per-connection 4 --requests 40 --body 1-5000 --response 1-20000 \
             --close {close}",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 40);
        streams.ensure_equal(40)?;
        let ended = holds_within(ARRIVAL, || {
            streams
                .target
                .record()
                .is_ok_and(|record| record.connections.iter().all(|it| it.end != End::Open))
        });
        let target = streams.target.record()?;
        assert!(ended, "closed by {close}: {target:?}");
        let as_expected = target.connections.iter().filter(|it| it.end == expected).count();
        assert_eq!(as_expected, 10, "closed by {close}: {target:?}");
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b035_a_reset_in_the_middle_of_a_response_ends_the_session_in_the_middle_of_the_target_s() -> Result<()> {
    const CONNECTIONS: u64 = 10;
    /// More than sockets on both sides hold, so that the online server is in the middle of it.
    const RESPONSE: u32 = 32 << 20;
    const READ: usize = 200_000;
    const LATER_US: u64 = 300_000;
    let lab = Lab::up(Plan::default())?;
    let later = (LATER_US / 1000).to_string();
    let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--delay-ms", &later])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    for id in 1..=CONNECTIONS {
        let mut client = Conversation::open(lab.client(), (lab.online().v4(), STREAM).into())?;
        client.send(&bytes_of(RequestHeader { id, body: 3000, response: RESPONSE, delay_ms: 0 }))?;
        client.read_within_an_answer(READ)?;
        client.reset()?;
    }
    let count = CONNECTIONS as usize;
    let online = streams.online.ended_record_of(count, ARRIVAL)?;
    let target = streams.target.ended_record_of(count, ARRIVAL)?;
    assert!(online.connections.iter().all(|it| it.end == End::Rst), "{online:?}");
    let compared = stream::compare(&online, &target);
    assert_eq!((compared.equal, compared.differences.len()), (count, 0), "{compared:?}");
    for connection in &target.connections {
        // A server that had written all of its answer, or had none to write, would not say so.
        assert_eq!(connection.end, End::Rst, "{connection:?}");
        let after_us = connection.ended_us.context("an end")?.saturating_sub(connection.times_us[0]);
        assert!(after_us >= LATER_US, "reset {after_us} us after the request, before any answer to it");
    }
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("sessions_client_reset"), CONNECTIONS, "{:?}", report.counters);
    assert_eq!(report.counter("replay_bytes_delivered"), report.counter("bytes_accepted"));
    Ok(())
}

#[test]
fn b035_when_the_target_closes_first_later_requests_take_a_new_connection() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--close-after", "2"])?;
    let watch = Watch::arriving(lab.target(), &[("resets", "tcp flags & rst == rst")])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 5 --per-connection 6 --requests 30 --body 1-2000 --think-ms 200",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 30);
    let (online, target) = streams.records(30, ARRIVAL)?;
    assert_eq!(ids(&target), ids(&online));
    assert_eq!(target.connections.len(), 15);
    assert!(target.connections.iter().all(|connection| connection.mismatch.is_none()), "{target:?}");
    assert_eq!(watch.packets()?["resets"], 0);
    replay.stop()?;
    Ok(())
}

#[test]
fn b040_a_stop_leaves_no_connection_at_the_target() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let lab = Lab::up(Plan::default())?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let mut replay = Replay::start(&lab, &[HTTP], &[])?;
        let load = format!(
            "--connect {}:{HTTP} --protocol http --connections 50 --rate 2000 --seconds 5",
            lab.online().v4()
        );
        let mut load = Load::start(&lab, lab.client(), "load", &load)?;
        wait_for("50 connections at the target", Duration::from_secs(5), || {
            established(lab.target(), HTTP).is_ok_and(|count| count == 50)
        })?;
        // The second begins with the signal, whatever the process does until it ends.
        replay.online.process.signal(signal)?;
        wait_for("no connection at the target", Duration::from_secs(1), || {
            established(lab.target(), HTTP).is_ok_and(|count| count == 0)
        })?;
        let report: Report = replay.online.ended_well()?;
        assert_eq!(established(lab.target(), HTTP)?, 0, "a connection came after the stop");
        report.check_accounts()?;
        replay.assistant.stop::<serde_json::Value>()?;
        let summary = load.finish()?;
        assert_eq!((summary.errors, summary.responses), (0, summary.requests));
        ensure!(!nginx.target.ledger()?.is_empty(), "nothing was replayed");
    }
    Ok(())
}

/// Connections of a host's server that are established, or that only one side has closed.
fn established(host: &Host, port: u16) -> Result<usize> {
    let filter = format!("sport = :{port}");
    let states = ["-Htn", "state", "established", "state", "close-wait"];
    Ok(output_of(host.command("ss").args(states).arg(filter))?.lines().count())
}
