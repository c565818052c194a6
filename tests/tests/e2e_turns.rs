//! Behaviours 23 to 26: turns of HTTP/2, at targets that answer late, otherwise, or not at all, and at servers that speak first.
//!
//! Root only; each test has a lab of its own.

#[path = "../../replayer/tests/reassembly/mod.rs"]
mod reassembly;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use reassembly::{segments, streams};
use replayer_tests::capture::{Capture, Passed, passed};
use replayer_tests::clients::{Load, output_of};
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::lateness::Sleepers;
use replayer_tests::pairs::{NginxPair, StreamPair};
use replayer_tests::replay::Replay;
use replayer_tests::servers::H2C_PORT;
use replayer_tests::stream::{Connection, Record, RequestHeader};

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;

/// What each client sent to a port, by a reassembly of what tcpdump saw: all of it, without a hole.
fn bytes_sent(file: &Path, port: u16) -> Result<BTreeMap<std::net::SocketAddr, Vec<u8>>> {
    let mut bytes = BTreeMap::new();
    for (client, mut streams) in streams(&segments(file), port) {
        ensure!(streams.len() == 1, "{client} has {} connections", streams.len());
        let stream = streams.remove(0);
        let whole = stream.contiguous().unwrap_or_default();
        ensure!(whole.len() == stream.bytes.len(), "a hole in what {client} sent");
        bytes.insert(client, whole);
    }
    Ok(bytes)
}

/// HTTP/2 has its own flow control and numbers: what arrives is compared as bytes, and the requests that nginx made of them as well.
#[test]
fn b023_a_hundred_streams_of_http_2_on_each_connection() -> Result<()> {
    const CONNECTIONS: usize = 5;
    const REQUESTS: usize = 400;
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let replay = Replay::start(&lab, &[H2C_PORT], &[])?;
    let to_port = format!("tcp dst port {H2C_PORT}");
    let captures = [lab.online(), lab.target()].map(|host| Capture::start(&lab, host, &to_port));
    let list = lab.dir().join("requests.txt");
    let uri = |id: usize| {
        let path = ["r", "bytes/1k", "bytes/10k", "bytes/100k"][id % 4];
        format!("http://{}:{H2C_PORT}/{path}?id={id}\n", lab.online().v4())
    };
    fs::write(&list, (0..REQUESTS).map(uri).collect::<String>())?;
    let output = output_of(
        lab.client()
            .command("h2load")
            .args(["--no-tls-proto=h2c", "-m", "100", "-c", &CONNECTIONS.to_string()])
            .args(["-n", &(CONNECTIONS * REQUESTS).to_string(), "-i"])
            .arg(&list),
    )?;
    assert!(output.contains(&format!("{} succeeded, 0 failed", CONNECTIONS * REQUESTS)), "{output}");
    let (_, target) = nginx.ensure_equal(CONNECTIONS * REQUESTS)?;
    assert_eq!(target.connections().len(), CONNECTIONS);
    let (report, _) = replay.stop()?;
    let [online, target] = captures.map(|capture| bytes_sent(&capture?.stop()?, H2C_PORT));
    let (online, target) = (online?, target?);
    assert!(online.len() == CONNECTIONS && online.values().all(|bytes| bytes.len() > 20 * REQUESTS));
    for (client, bytes) in &online {
        assert!(target.get(client) == Some(bytes), "other bytes of {client} came to the target");
    }
    assert_eq!(target.len(), CONNECTIONS);
    assert_eq!(report.counter("turns_released_by_hold_limit"), 0, "{:?}", report.counters);
    assert_eq!(report.counter("sessions_opened"), CONNECTIONS as u64, "{:?}", report.counters);
    Ok(())
}

/// How much later than the online server the target got each request, sorted, microseconds.
fn lateness_us(online: &Record, target: &Record) -> Vec<i64> {
    let mut late: Vec<i64> = Vec::new();
    for at_online in &online.connections {
        let at_target = of_peer(target, &at_online.peer);
        let times = at_online.times_us.iter().zip(&at_target.times_us);
        late.extend(times.map(|(&online, &target)| target as i64 - online as i64));
    }
    late.sort_unstable();
    late
}

#[test]
fn b023_messages_in_both_directions_all_the_time_keep_pace() -> Result<()> {
    const CONNECTIONS: usize = 5;
    // Each connection has 20 messages under way, and each server takes so many milliseconds for one: online, at the target. At the same pace
    // it goes on for half a minute; a slower target is further behind with each message, and what waits for it is bounded.
    const PACES: [(u64, u64, usize); 3] = [(5, 3, 400), (5, 5, 6000), (3, 5, 400)];
    let lab = Lab::up(Plan::default())?;
    let ports: Vec<u16> = (STREAM..).take(PACES.len()).collect();
    let replay = Replay::start(&lab, &ports, &[])?;
    for (port, (online_ms, target_ms, messages)) in ports.into_iter().zip(PACES) {
        let delays = [online_ms, target_ms].map(|ms| ms.to_string());
        let [at_online, at_target] = delays.each_ref().map(|ms| ["--delay-ms", ms]);
        let mut streams = StreamPair::start_with(&lab, port, &at_online, &at_target)?;
        let load = format!(
            "--connect {}:{port} --connections {CONNECTIONS} --per-connection {messages} --requests {} \
             --pipeline 20 --body 1-500 --response 1-500",
            lab.online().v4(),
            CONNECTIONS * messages
        );
        let summary = Load::run(&lab, "load", &load)?;
        assert_eq!(summary.errors, 0, "{summary:?}");
        // Up to the last request, when 20 were under way.
        let paced_ms = online_ms * (messages as u64 - 20);
        assert!(summary.seconds * 1e3 >= paced_ms as f64, "{} s, not {paced_ms} ms", summary.seconds);
        let (online, target) = streams.ensure_equal(CONNECTIONS * messages)?;
        let late = lateness_us(&online, &target);
        let (median, last) = (late[late.len() / 2], late[late.len() - 1]);
        // Half of the messages are not later than two more of them take. A slower target is later with each message, but never idle.
        let two_us = 2 * 1000 * online_ms.max(target_ms) as i64;
        let slower_us = (target_ms.saturating_sub(online_ms) * 1000 * messages as u64) as i64;
        assert!(
            median < slower_us * 5 / 8 + two_us && last < slower_us * 5 / 4 + 500_000,
            "{online_ms} and {target_ms} ms: half of the messages are {median} us late, the last {last} us"
        );
    }
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("turns_released_by_hold_limit"), 0, "{:?}", report.counters);
    Ok(())
}

fn of_peer(record: &Record, peer: &str) -> Connection {
    let mut found = record.connections.iter().filter(|it| it.peer == peer);
    found.next().unwrap_or_else(|| panic!("no connection of {peer}")).clone()
}

#[test]
fn b024_an_answer_that_never_comes_holds_its_own_connection_for_the_limit() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--never-answer", "3"])?;
    let replay = Replay::start(&lab, &[STREAM], &["--hold-limit", "1"])?;
    let server = (lab.online().v4(), STREAM).into();
    let mut held = Conversation::open(lab.client(), server)?;
    let mut other = Conversation::open(lab.client(), server)?;
    for id in [1, 3, 5, 7] {
        held.ask(RequestHeader { id, body: 100, response: 100, delay_ms: 0 })?;
        other.ask(RequestHeader { id: id + 1, body: 100, response: 100, delay_ms: 0 })?;
    }
    let (_, target) = streams.ensure_equal(8)?;
    let times = of_peer(&target, &held.local()?).times_us;
    let waited_us = times[2] - times[1];
    assert!((950_000..1_500_000).contains(&waited_us), "held for {waited_us} us, not for 1 s");
    let times = of_peer(&target, &other.local()?).times_us;
    let taken_us = times[3] - times[0];
    assert!(taken_us < 500_000, "the other connection took {taken_us} us");
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("turns_released_by_hold_limit"), 1, "{:?}", report.counters);
    Ok(())
}

/// Measured where it is said: on the target's cable, from the greeting on its way out to the first command on its way in, for each connection.
/// Those during which the machine itself was late prove nothing and do not count.
#[test]
fn b025_the_first_command_follows_the_target_s_greeting_within_10_ms() -> Result<()> {
    const TOGETHER: u64 = 7;
    const ROUNDS: u64 = 4;
    const ENOUGH: usize = 21;
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start_with(&lab, STREAM, &["--greet"], &["--greet", "100"])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut judged = Vec::new();
    let mut requests = 0;
    for _ in 0..10 {
        let cable = Capture::on_cable(&lab, lab.target(), &format!("tcp port {STREAM}"))?;
        let sleepers = Sleepers::start()?;
        for _ in 0..ROUNDS {
            let load = format!(
                "--connect {}:{STREAM} --greet --connections {TOGETHER} --per-connection 4 --requests {} --body 1-3000 \
                 --first-id {}",
                lab.online().v4(),
                4 * TOGETHER,
                requests + 1,
            );
            let summary = Load::run(&lab, &format!("load-{requests}"), &load)?;
            assert_eq!((summary.responses, summary.errors), (4 * TOGETHER, 0), "{summary:?}");
            requests += 4 * TOGETHER;
            streams.ensure_equal(requests as usize)?;
        }
        let lateness = sleepers.stop()?;
        let from_greeting = first_commands(&passed(&cable.stop()?)?);
        assert_eq!(from_greeting.len() as u64, ROUNDS * TOGETHER);
        for (greeted_ns, command_ns) in from_greeting {
            let after_us = command_ns.saturating_sub(greeted_ns) / 1000;
            assert!(command_ns > greeted_ns, "a command came before the greeting");
            if !lateness.between(greeted_ns, command_ns) {
                judged.push(after_us);
            }
        }
        if judged.len() >= ENOUGH {
            break;
        }
    }
    replay.stop()?;
    assert!(
        judged.len() >= ENOUGH,
        "the machine was late all the while: only {} connections tell",
        judged.len()
    );
    assert!(judged.iter().all(|&us| us < 10_000), "from the greeting to the first command, us: {judged:?}");
    Ok(())
}

/// When each connection's greeting and its first command passed the target's cable, ns.
fn first_commands(passed: &[Passed]) -> Vec<(u64, u64)> {
    let mut connections: BTreeMap<u16, [Option<u64>; 2]> = BTreeMap::new();
    for Passed { at_ns, segment } in passed.iter().filter(|it| it.segment.payload_len > 0) {
        let (port, way) = match segment.src_port {
            STREAM => (segment.dst_port, 0),
            port => (port, 1),
        };
        connections.entry(port).or_default()[way].get_or_insert(*at_ns);
    }
    connections.into_values().filter_map(|[greeting, command]| Some((greeting?, command?))).collect()
}

#[test]
fn b026_answers_of_another_size_neither_stop_nor_hurry_a_session() -> Result<()> {
    // The server writes each answer at once; up to 120 kB, so that it takes several flights and TSO packets.
    for scale in ["0.3", "2", "4"] {
        let lab = Lab::up(Plan::default())?;
        let scaled = ["--response-scale", scale, "--delay-ms", "5"];
        let mut streams = StreamPair::start_with(&lab, STREAM, &[], &scaled)?;
        let replay = Replay::start(&lab, &[STREAM], &[])?;
        let load = format!(
            "--connect {}:{STREAM} --connections 10 --per-connection 20 --requests 200 --body 1-5000 \
             --response 100-30000",
            lab.online().v4()
        );
        let summary = Load::run(&lab, "load", &load)?;
        assert_eq!((summary.responses, summary.errors), (200, 0), "{summary:?}");
        let (_, target) = streams.ensure_equal(200)?;
        let early: u64 = target.connections.iter().map(|it| it.early).sum();
        let (report, _) = replay.stop()?;
        assert_eq!(
            early, 0,
            "requests came in the middle of an answer, scale {scale}: {:?}",
            report.counters
        );
        assert_eq!(report.counter("turns_released_by_hold_limit"), 0, "scale {scale}: {:?}", report.counters);
    }
    Ok(())
}
