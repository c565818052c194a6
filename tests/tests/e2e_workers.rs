//! Several workers: behaviours 1, 2, 9, 13, 41 and 53 with two of them, each on a CPU and a queue of its own.
//!
//! Root only; each test has a lab of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use replayer_common::addr::from_v4;
use replayer_common::hash::{FLOW_SEED, flow_hash};
use replayer_tests::clients::{Load, output_of};
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::replay::{Replay, Report, Role, service};
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::wait_for;

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;

fn two_queues() -> Result<Lab> {
    Lab::up(Plan { online_queues: 2, ..Plan::default() })
}

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// Both workers worked, each from its queue of the mirror to its queue of the NIC, and neither has a share of the sessions
/// that chance does not explain. Which worker a client belongs to is a coin toss by its port: of `n` sessions, fewer than
/// `n/2 - 5 sqrt(n)/2` (five standard deviations) fall to one side less than once in a million runs.
fn ensure_shared(report: &Report) -> Result<()> {
    let workers = &report.workers;
    ensure!(workers.len() == 2, "{workers:?}");
    let all: u64 = workers.iter().map(|worker| worker.sessions_opened).sum();
    let fewest = (all as f64 - 5.0 * (all as f64).sqrt()) / 2.0;
    for worker in workers {
        let idle = worker.packets_captured == 0 || worker.packets_transmitted == 0;
        ensure!(!idle && worker.sessions_opened as f64 > fewest, "not shared: {workers:#?}");
    }
    Ok(())
}

/// The worker out of `workers` that the client at `address` belongs to.
fn worker_of(address: &str, workers: usize) -> Result<usize> {
    let address: SocketAddr = address.parse()?;
    let IpAddr::V4(ip) = address.ip() else { bail!("{address} is not IPv4") };
    Ok(flow_hash(FLOW_SEED, &from_v4(ip.octets()), address.port()) as usize % workers)
}

/// By thread name: the CPUs that a process's threads may run on.
fn cpus_of_threads(process: Pid) -> Result<BTreeMap<String, String>> {
    let mut cpus = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let status = fs::read_to_string(entry?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned()).with_context(|| format!("no {name} in {status}"))
        };
        cpus.insert(field("Name:")?, field("Cpus_allowed_list:")?);
    }
    Ok(cpus)
}

/// How often the worker's thread of a process has gone to sleep of itself.
fn sleeps(process: Pid) -> Result<u64> {
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let status = fs::read_to_string(entry?.path().join("status"))?;
        if status.starts_with("Name:\tworker 0\n") {
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            return Ok(count.context("no count of sleeps")?.trim().parse()?);
        }
    }
    bail!("no worker")
}

#[test]
fn with_busy_polling_a_worker_does_not_sleep_between_requests() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    for (first, capture) in [(0, "ring"), (1, "mirror")] {
        for (second, (arguments, is_busy)) in
            [(&[][..], false), (&["--busy-poll", "1000000"][..], true)].into_iter().enumerate()
        {
            let mut streams = StreamPair::start(&lab, STREAM)?;
            let replay = Replay::start(&lab, &[STREAM], &[&["--capture", capture], arguments].concat())?;
            let said = replay.online.process.errors();
            assert_eq!(said.contains("busy polling"), is_busy && capture == "mirror", "{said}");
            let load = |name: &str, more: &str| {
                let common = format!("--connect {}:{STREAM} --connections 2 {more}", lab.online().v4());
                Load::run(&lab, &format!("{name}-{first}-{second}"), &common)
            };
            // The first one's connections, pages and files are new.
            assert_all_answered(&load("first", "--requests 20 --rate 100")?, 20);
            let before = sleeps(replay.online.process.pid())?;
            assert_all_answered(&load("load", "--requests 200 --rate 200 --first-id 1000")?, 200);
            let slept = sleeps(replay.online.process.pid())? - before;
            ensure!((slept < 50) == is_busy, "{capture} {arguments:?}: slept {slept} times in 200 requests");
            streams.ensure_equal(220)?;
            replay.stop()?;
        }
    }
    Ok(())
}

#[test]
fn b001_b002_two_workers_share_the_clients_and_the_ledgers_are_equal() -> Result<()> {
    let lab = two_queues()?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let replay = Replay::start(&lab, &[HTTP], &["--workers", "2", "--cpus", "1,0"])?;
    let cpus = cpus_of_threads(replay.online.process.pid())?;
    assert_eq!(cpus.get("worker 0").map(String::as_str), Some("1"), "{cpus:?}");
    assert_eq!(cpus.get("worker 1").map(String::as_str), Some("0"), "{cpus:?}");
    let load = |more: &str| {
        format!("--connect {}:{HTTP} --protocol http --expect-server online {more}", lab.online().v4())
    };
    let short = "--connections 20 --per-connection 1 --requests 2000 --rate 2000";
    assert_all_answered(&Load::run(&lab, "short", &load(short))?, 2000);
    let long = "--connections 40 --per-connection 100 --requests 4000 --rate 4000 --first-id 1000000";
    assert_all_answered(&Load::run(&lab, "long", &load(long))?, 4000);
    nginx.ensure_equal(6000)?;
    let (report, _) = replay.stop()?;
    ensure_shared(&report)?;
    let cpus: Vec<_> = report.workers.iter().map(|worker| worker.cpu).collect();
    assert_eq!(cpus, [Some(1), Some(0)]);
    Ok(())
}

#[test]
fn b041_copies_made_by_two_workers_take_no_identity_twice() -> Result<()> {
    // From the client's one address, and from a pool: both are divided between the workers.
    for pool in [&[][..], &["-c", "172.29.0.0/24"]] {
        let lab = two_queues()?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let arguments = [&["--workers", "2", "-n", "3"], pool].concat();
        let replay = Replay::start(&lab, &[HTTP], &arguments)?;
        let load = format!(
            "--connect {}:{HTTP} --protocol http --connections 100 --per-connection 10 --requests 1000 --rate 2000",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 1000);
        let ledger = nginx.target.settled_ledger(3000, ARRIVAL)?;
        ledger.ensure_copied(1000, 3, 10)?;
        let (report, assistant) = replay.stop()?;
        ensure_shared(&report)?;
        assert_eq!(assistant["routing"]["conflicts"], 0, "{assistant:#}");
    }
    Ok(())
}

#[test]
fn b013_open_connections_are_joined_by_the_worker_that_captures_them() -> Result<()> {
    let lab = two_queues()?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let server = (lab.online().v4(), STREAM).into();
    let mut connections: Vec<Conversation> =
        (0..60).map(|_| Conversation::open(lab.client(), server)).collect::<Result<_>>()?;
    for (id, connection) in (1..).zip(&mut connections) {
        connection.ask(RequestHeader { id, body: 2000, response: 100, delay_ms: 0 })?;
    }
    let replay = Replay::start(&lab, &[STREAM], &["--workers", "2"])?;
    let mut expected = BTreeSet::new();
    for (id, connection) in (1001..).zip(&mut connections) {
        connection.ask(RequestHeader { id, body: 5000, response: 100, delay_ms: 0 })?;
        expected.insert((connection.local()?, vec![id]));
    }
    let target = streams.target.record_of(60, ARRIVAL)?;
    let there: BTreeSet<_> = target.connections.iter().map(|it| (it.peer.clone(), it.ids.clone())).collect();
    assert_eq!(there, expected);
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("connections_joined"), 60);
    let mut shares = [0; 2];
    for (client, _) in &expected {
        shares[worker_of(client, 2)?] += 1;
    }
    let opened: Vec<_> = report.workers.iter().map(|worker| worker.sessions_opened).collect();
    assert_eq!(opened, shares);
    Ok(())
}

#[test]
fn b009_too_few_transmit_queues_are_named_with_the_remedy() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let services = [service(HTTP, lab.target().v4(), HTTP)];
    let online = |arguments: &[&str]| {
        Role::online(&lab, lab.online(), &services, lab.assistant().v4().into(), arguments)
    };
    // The kernel lets a socket be bound to a second TX queue that is not in use when there is a second RX queue, and sends nothing from it.
    for more_receive_queues in [false, true] {
        if more_receive_queues {
            output_of(lab.online().command("ethtool").args(["-L", NIC, "rx", "2"]))?;
        }
        let error = online(&["--workers", "2"]).err();
        let refused = format!("{:#}", error.context("two workers on one TX queue")?);
        for words in ["--workers 2", &format!("`ethtool -L {NIC}"), "fewer workers"] {
            assert!(refused.contains(words), "{words} is not in: {refused}");
        }
    }
    // Asked for as many as possible, it is content with one, and says so.
    let mut modest = online(&["--workers", "auto", "--cpus", "0,1"])?;
    let said = modest.process.errors();
    assert!(said.contains("1 workers instead of 2") && said.contains("ethtool -L"), "{said}");
    let report: Report = modest.stop()?;
    assert_eq!(report.workers.len(), 1);
    drop(assistant);
    Ok(())
}

#[test]
fn b053_both_workers_find_a_restarted_assistant_again() -> Result<()> {
    let lab = two_queues()?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &["--workers", "2"])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 40 --rate 400 --seconds 5 --body 1-2000 --response 1-2000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for("requests at the target", ARRIVAL, || {
        streams.target.record().is_ok_and(|record| record.requests() > 200)
    })?;
    replay.assistant.process.kill()?;
    let before = streams.online.record()?.requests();
    wait_for("requests without the assistant", ARRIVAL, || {
        streams.online.record().is_ok_and(|record| record.requests() > before + 400)
    })?;
    replay.assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let summary = load.finish()?;
    assert_all_answered(&summary, summary.requests);
    let (_, target) = streams.ensure_equal_within(summary.requests as usize, Duration::from_secs(10))?;
    // The sessions of before went on: none was made anew.
    assert_eq!(target.connections.len(), 40);
    let (report, _) = replay.stop()?;
    ensure_shared(&report)
}
