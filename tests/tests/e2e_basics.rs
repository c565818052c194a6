//! Behaviours 1 to 5, 8 and 9: requests of real clients arrive at the target, whole, in order, and unseen by the clients.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use replayer_tests::clients::{Load, Unnoticed, output_of};
use replayer_tests::lab::{Host, Lab, Plan};
use replayer_tests::ledger::{self, Ledger};
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Role};
use replayer_tests::servers::{start_redis, tool};
use replayer_tests::wait::wait_for;

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

#[test]
fn b001_ten_thousand_requests_on_a_connection_each() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let unnoticed = Unnoticed::by_client(&lab)?;
    let replay = Replay::start(&lab, &[HTTP], &[])?;
    let summary = Load::run(
        &lab,
        "load",
        &format!(
            "--connect {}:{HTTP} --protocol http --expect-server online --connections 20 --per-connection 1 \
             --requests 10000",
            lab.online().v4()
        ),
    )?;
    assert_all_answered(&summary, 10_000);
    nginx.ensure_equal(10_000)?;
    replay.stop()?;
    // Of each connection a SYN-ACK and an answer at least.
    unnoticed.ensure(20_000)?;
    Ok(())
}

#[test]
fn b002_keep_alive_keeps_order_and_bytes() -> Result<()> {
    for offloads in [true, false] {
        let lab = Lab::up(Plan { offloads, ..Plan::default() })?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let unnoticed = Unnoticed::by_client(&lab)?;
        let replay = Replay::start(&lab, &[HTTP, STREAM], &[])?;
        let host = lab.online().v4();
        let http = format!(
            "--connect {host}:{HTTP} --protocol http --expect-server online --connections 50 --per-connection 100 \
             --requests 5000 --body 0-3000"
        );
        assert_all_answered(&Load::run(&lab, "http", &http)?, 5000);
        let load = format!(
            "--connect {host}:{STREAM} --connections 50 --per-connection 100 --requests 5000 --body 10-20000 \
             --response 1-20000"
        );
        assert_all_answered(&Load::run(&lab, "streams", &load)?, 5000);

        let (online, target) = nginx.ensure_equal(5000)?;
        let sequence = |ledger: &Ledger| -> Vec<(String, u16, Vec<String>)> {
            let uris = |entries: Vec<&ledger::Entry>| entries.iter().map(|entry| entry.uri.clone()).collect();
            ledger.connections().into_iter().map(|((ip, port), entries)| (ip, port, uris(entries))).collect()
        };
        assert!(sequence(&online) == sequence(&target), "the order of requests differs");
        streams.ensure_equal(5000)?;
        replay.stop()?;
        unnoticed.ensure(10_000)?;
    }
    Ok(())
}

#[test]
fn b003_two_redis_hold_the_same_data() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _servers = [start_redis(&lab, lab.online(), 6379)?, start_redis(&lab, lab.target(), 6379)?];
    let unnoticed = Unnoticed::by_client(&lab)?;
    let replay = Replay::start(&lab, &[6379], &[])?;
    let online = lab.online().v4().to_string();
    // Commands whose order among clients does not matter: what is to be equal is the data.
    output_of(
        lab.client()
            .command("redis-benchmark")
            .args(["-h", &online, "-c", "50", "-n", "20000", "-q"])
            .args(["-r", "5000", "-t", "incr,sadd,hset"]),
    )?;
    let digest = |host: &Host| output_of(host.command("redis-cli").args(["DEBUG", "DIGEST"]));
    let expected = digest(lab.online())?;
    ensure!(!expected.trim().trim_matches('0').is_empty(), "nothing was written: {expected}");
    wait_for("the same data at the target", ARRIVAL, || {
        digest(lab.target()).is_ok_and(|found| found == expected)
    })?;
    replay.stop()?;
    unnoticed.ensure(20_000)?;
    Ok(())
}

#[test]
fn b004_clients_notice_nothing() -> Result<()> {
    // What clients get without the replayer, and with it.
    let mut answers = Vec::new();
    for with_replayer in [false, true] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let unnoticed = Unnoticed::by_client(&lab)?;
        let replay = with_replayer.then(|| Replay::start(&lab, &[STREAM], &[])).transpose()?;
        let load = format!(
            "--connect {}:{STREAM} --source-port 20000 --connections 20 --per-connection 50 --requests 1000 \
             --rate 2000 --body 10-5000 --response 1-20000",
            lab.online().v4()
        );
        let summary = Load::run(&lab, "load", &load)?;
        assert_all_answered(&summary, 1000);
        let received: BTreeSet<(String, String)> =
            summary.connections.into_iter().map(|it| (it.local, it.received_hash)).collect();
        answers.push((
            received,
            streams.online.record()?.connections.iter().map(|it| it.hash.clone()).collect::<BTreeSet<_>>(),
        ));
        if let Some(replay) = replay {
            streams.ensure_equal(1000)?;
            replay.stop()?;
        }
        unnoticed.ensure(1000)?;
    }
    assert_eq!(answers[0].0.len(), 20);
    assert_eq!(answers[0], answers[1]);
    Ok(())
}

#[test]
fn b005_the_target_sees_client_addresses_or_those_of_the_pool() -> Result<()> {
    for pool in [None, Some("172.29.3.0/28")] {
        let lab = Lab::up(Plan { client_addresses: 5, ..Plan::default() })?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let arguments: Vec<&str> = pool.iter().flat_map(|pool| ["-c", pool]).collect();
        let replay = Replay::start(&lab, &[HTTP], &arguments)?;
        let sources: Vec<String> = (0..5).map(|index| lab.client().client_v4(index).to_string()).collect();
        let summary = Load::run(
            &lab,
            "load",
            &format!(
                "--connect {}:{HTTP} --protocol http --connections 10 --per-connection 5 --requests 1000 --source {}",
                lab.online().v4(),
                sources.join(",")
            ),
        )?;
        assert_all_answered(&summary, 1000);
        let (online, target) = nginx.ledgers(1000)?;
        let difference = ledger::compare_uris(&online, &target);
        assert_eq!((difference.missing, difference.extra), (0, 0), "{difference:?}");
        let addresses: BTreeSet<&str> = target.entries.iter().map(|entry| entry.address.as_str()).collect();
        if pool.is_some() {
            assert!(addresses.iter().all(|address| address.starts_with("172.29.3.")), "{addresses:?}");
        } else {
            assert_eq!(addresses, sources.iter().map(String::as_str).collect());
            nginx.ensure_equal(1000)?;
        }
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b008_one_client_port_talks_to_two_services() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[HTTP, STREAM], &[])?;
    let host = lab.online().v4();
    let common = "--source-port 30000 --connections 50 --requests 5000 --per-connection 100 --rate 2000";
    let mut http = Load::start(
        &lab,
        lab.client(),
        "http",
        &format!("--connect {host}:{HTTP} --protocol http --expect-server online {common}"),
    )?;
    let summary = Load::run(&lab, "streams", &format!("--connect {host}:{STREAM} --body 1-2000 {common}"))?;
    let http = http.finish()?;
    assert_all_answered(&http, 5000);
    assert_all_answered(&summary, 5000);
    let ports =
        |summary: &Summary| summary.connections.iter().map(|it| it.local.clone()).collect::<BTreeSet<_>>();
    assert_eq!(ports(&http), ports(&summary));

    nginx.ensure_equal(5000)?;
    streams.ensure_equal(5000)?;
    replay.stop()?;
    Ok(())
}

/// Runs `replayer` with arguments that it must refuse; its message.
fn refused(lab: &Lab, host: &Host, runner: &[&str], arguments: &str) -> Result<String> {
    // Where any user may execute it.
    let program = lab.dir().join("replayer");
    if !program.exists() {
        fs::copy(tool("replayer")?, &program)?;
    }
    let mut command = match runner {
        [] => host.command(&program),
        [first, rest @ ..] => {
            let mut command = host.command(first);
            command.args(rest).arg(&program);
            command
        }
    };
    command.args(arguments.split_ascii_whitespace());
    let mut process = Process::start(&mut command, "refused", &lab.dir())?;
    let status = process.wait(Duration::from_secs(15)).with_context(|| format!("replayer {arguments}"))?;
    let message = process.errors();
    ensure!(!status.success(), "`replayer {arguments}` ended with {status}:\n{message}");
    ensure!(!message.contains("panicked"), "`replayer {arguments}` panicked:\n{message}");
    Ok(message)
}

#[test]
fn b009_what_cannot_work_is_named_with_its_remedy() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let (online, assistant) = (lab.online(), lab.assistant());
    let service = format!("-x 8080-{}:8080", lab.target().v4());
    let channel = format!("-s {}", assistant.v4());
    let whole = format!("online {service} {channel} -i eth0");
    let _running = Role::assistant(&lab, assistant, &[])?;
    let unprivileged = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

    // Host, how it is run, arguments, and words that the message must have: the cause, and the remedy.
    let cases: &[(&Host, &[&str], &str, &[&str])] = &[
        (online, &[], "online", &["--service", "--assistant"]),
        (online, &[], &format!("online -x 8080 {channel}"), &["SRC_PORT-DST_IP:DST_PORT"]),
        (online, &[], &format!("online -x 8080-nonsense:1 {channel}"), &["nonsense", "IP:PORT"]),
        (online, &[], &format!("{whole} -n 0"), &["copies", "0.01"]),
        (online, &[], &format!("{whole} -p 0"), &["--assistant-port", "1..=65535"]),
        (online, &[], &format!("{whole} --report /nowhere/x.json"), &["/nowhere", "writable"]),
        (online, &[], &format!("{whole} -c 10.0.0.9-10.0.0.1"), &["10.0.0.9", "before"]),
        (online, &[], &format!("{whole} -c 10.0.0.0/24,10.0.0.9"), &["-c", "10.0.0.9", "twice"]),
        (online, &[], &format!("{whole} -c 172.28.0.0/24"), &["-c", "172.28.0.21", "leave it out"]),
        (online, &[], &format!("online {service} {channel} -i eth7"), &["eth7"]),
        (
            online,
            &[],
            &format!("online -x 8080-198.51.100.7:80 {channel} -i eth0"),
            &["198.51.100.7", "route"],
        ),
        (
            online,
            &[],
            &format!("online {service} -s {} -i eth0", lab.target().v4()),
            &["172.28.0.21", "assistant"],
        ),
        (online, &unprivileged, &whole, &["root"]),
        (assistant, &[], "assistant -i eth7", &["eth7"]),
        (assistant, &[], "assistant -i eth0", &["36524", "-p"]),
        (assistant, &[], "assistant -i eth0 -p 40000", &["another assistant", "share it"]),
        (assistant, &unprivileged, "assistant -i eth0 -p 40000", &["root"]),
    ];
    for (host, runner, arguments, words) in cases {
        let message = refused(&lab, host, runner, arguments)?;
        for word in *words {
            assert!(message.contains(word), "`replayer {arguments}` does not say {word:?}:\n{message}");
        }
    }

    assistant.namespace().set_sysctl("ipv4/ip_forward", "1")?;
    let message = refused(&lab, assistant, &[], "assistant -i eth0 -p 40000")?;
    assert!(message.contains("forwarding"), "{message}");
    Ok(())
}
