//! Behaviours 36, 37, 49, 51, 53 and 54: what goes away under load and comes back: target, network, either role.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use replayer_tests::clients::{Load, Watch, output_of};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::ledger::{self, Ledger};
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::servers::{StreamServer, start, tool};
use replayer_tests::stream::{self, Record};
use replayer_tests::wait::{holds_within, wait_for};

const STREAM: u16 = 9000;
const HTTP: u16 = 8080;

fn now_us() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64)
}

/// Starts requests on 20 connections that stay open, 400 a second.
fn steady_load(lab: &Lab, seconds: u32) -> Result<Load> {
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --rate 400 --seconds {seconds} --body 1-3000 --response 1-3000",
        lab.online().v4()
    );
    Load::start(lab, lab.client(), "steady", &load)
}

/// Waits until the target has got `count` requests.
fn wait_for_requests(streams: &mut StreamPair, count: usize) -> Result<()> {
    wait_for("requests at the target", ARRIVAL, || {
        streams.target.record().is_ok_and(|record| record.requests() >= count)
    })
}

/// Ids of requests that were whole later than this.
fn ids_after(record: &Record, time_us: u64) -> BTreeSet<u64> {
    let timed = record.connections.iter().flat_map(|it| it.ids.iter().zip(&it.times_us));
    timed.filter(|&(_, &at)| at > time_us).map(|(&id, _)| id).collect()
}

#[test]
fn b036_requests_after_the_target_s_restart_arrive() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut load = steady_load(&lab, 4)?;
    wait_for_requests(&mut streams, 200)?;
    streams.target.process.kill()?;
    streams.target = StreamServer::start(&lab, lab.target(), STREAM, &[])?;
    let restarted_us = now_us()?;
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");

    // A target that refuses is asked every 50 ms, and what comes between is left out: the last such question came before it listened, the next
    // is answered, and as much again is for the machine.
    let expected = ids_after(&streams.online.record()?, restarted_us + 100_000);
    ensure!(expected.len() > 400, "only {} requests after the restart", expected.len());
    let missing = |record: &Record| expected.difference(&ids_after(record, 0)).count();
    let complete =
        holds_within(ARRIVAL, || streams.target.record().is_ok_and(|record| missing(&record) == 0));
    let target = streams.target.record()?;
    assert!(complete, "{} of {} requests are missing", missing(&target), expected.len());
    assert!(target.connections.iter().all(|it| it.mismatch.is_none()), "half a request came: {target:?}");
    // Each of the twenty ended with its server, for a reason that is told, and what it had under way with it.
    let (report, _) = replay.stop()?;
    let sum = |names: [&str; 3]| names.iter().map(|name| report.counter(name)).sum::<u64>();
    let ended = sum(["sessions_target_reset", "sessions_target_closed", "sessions_refused"]);
    assert!(ended >= 20, "{:?}", report.counters);
    let lost = sum(["lost_bytes_target_reset", "lost_bytes_target_closed", "lost_bytes_refused"]);
    let accepted = report.counter("bytes_accepted");
    assert_eq!(report.counter("replay_bytes_delivered") + lost, accepted, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b037_half_a_minute_without_the_target_is_made_up_for_within_seconds() -> Result<()> {
    const OUTAGE: Duration = Duration::from_secs(30);
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let before_kib = replay.online.process.resident_kib()?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --rate 200 --seconds 34 --body 1-1000 --response 1-1000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for_requests(&mut streams, 100)?;
    lab.switch().ip("link set target down\n")?;
    std::thread::sleep(OUTAGE);
    let stats = replay.online.stats().context("statistics of the online role")?;
    assert!(stats.held_bytes > 1 << 20, "nothing waits for the target: {stats:?}");
    let grown = (replay.online.process.resident_kib()?.saturating_sub(before_kib)) * 1024;
    assert!(grown < stats.held_bytes + (16 << 20), "the online role has grown by {grown} bytes: {stats:?}");
    lab.switch().ip("link set target up\n")?;
    let back_us = now_us()?;
    let everywhere = |record: &Record| {
        record.connections.iter().filter(|it| it.times_us.last().is_some_and(|&at| at > back_us)).count()
    };
    wait_for("requests on all connections", Duration::from_secs(5), || {
        streams.target.record().is_ok_and(|record| everywhere(&record) == 20)
    })?;
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    streams.ensure_equal_within(summary.requests as usize, Duration::from_secs(10))?;
    replay.stop()?;
    Ok(())
}

/// Everything about a host that a role changes: devices, queueing disciplines, BPF programs on either.
fn interfaces(host: &Host) -> Result<String> {
    let devices = output_of(host.command("ls").arg("/sys/class/net"))?;
    let queueing = output_of(host.command("tc").args(["qdisc", "show"]))?;
    let programs = output_of(host.command("bpftool").args(["net", "show"]))?;
    // Which older ones of bpftool do not show.
    let (_, tcx) = host.namespace().enter(|| SchedClassifier::query_tcx(NIC, TcAttachType::Ingress))??;
    Ok(format!("{devices}{queueing}{programs}{} at the ingress of {NIC}", tcx.len()))
}

#[test]
fn b049_a_killed_role_leaves_its_host_as_it_was_and_can_start_again() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let hosts = [lab.online(), lab.assistant()];
    let before = [interfaces(hosts[0])?, interfaces(hosts[1])?];
    let not_online = format!("ip protocol tcp ip saddr != {}", lab.online().v4());
    let watch =
        Watch::arriving(lab.client(), &[("resets", "tcp flags & rst == rst"), ("strangers", &not_online)])?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    for (host, before) in hosts.iter().zip(&before) {
        assert_ne!(interfaces(host)?, *before, "{} has no program", host.name());
    }
    let mut load = steady_load(&lab, 3)?;
    wait_for_requests(&mut streams, 200)?;
    replay.online.process.kill()?;
    replay.assistant.process.kill()?;
    // A private namespace is taken down by a worker of the kernel, soon after its last process.
    for (host, before) in hosts.iter().zip(&before) {
        let clean = holds_within(ARRIVAL, || interfaces(host).is_ok_and(|now| now == *before));
        assert!(clean, "{} before:\n{before}\nafter:\n{}", host.name(), interfaces(host)?);
    }
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    let packets = watch.packets()?;
    assert_eq!((packets["resets"], packets["strangers"]), (0, 0), "{packets:?}");

    drop(replay);
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let again = format!(
        "--connect {}:{STREAM} --connections 10 --per-connection 10 --requests 100 --first-id 1000001 --body 1-3000",
        lab.online().v4()
    );
    assert_eq!(Load::run(&lab, "again", &again)?.responses, 100);
    let arrived = |record: &Record| ids_after(record, 0).range(1_000_001..).count();
    wait_for("the requests after the restart", ARRIVAL, || {
        streams.target.record().is_ok_and(|record| arrived(&record) == 100)
    })?;
    replay.stop()?;
    Ok(())
}

#[test]
fn b049_a_killed_recorder_or_replay_of_a_file_leaves_its_host_as_it_was() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let hosts = [lab.online(), lab.assistant()];
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let before = [interfaces(hosts[0])?, interfaces(hosts[1])?];
    let as_before = |role: &str| -> Result<()> {
        for (host, before) in hosts.iter().zip(&before) {
            let clean = holds_within(ARRIVAL, || interfaces(host).is_ok_and(|now| now == *before));
            assert!(clean, "{role}: {} before:\n{before}\nafter:\n{}", host.name(), interfaces(host)?);
        }
        Ok(())
    };
    let mut recorded = Vec::new();
    for way in ["ring", "mirror"] {
        let file = lab.dir().join(way);
        let mut command = lab.online().command(tool("replayer")?);
        command.args(["record", "-i", NIC, "--capture", way, "-x", &STREAM.to_string()]);
        command.args(["--file-size", "0.2", "-w"]).arg(&file);
        let mut recorder = start(&lab, lab.online(), "record", &mut command)?;
        recorder.wait_for_message("ready", ARRIVAL)?;
        assert_ne!(interfaces(hosts[0])?, before[0], "nothing is attached by {way}");
        let mut load = steady_load(&lab, 3)?;
        recorded.push(lab.dir().join(format!("{way}-00001.pcapng")));
        wait_for("a complete file", ARRIVAL, || recorded[recorded.len() - 1].exists())?;
        recorder.kill()?;
        as_before(way)?;
        let summary = load.finish()?;
        assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    }
    // What a killed recorder has written can be replayed; this, too, is killed on its way.
    let target = service(STREAM, lab.target().v4(), STREAM);
    let mut command = lab.online().command(tool("replayer")?);
    command.arg("offline").arg("-f").arg(&recorded[0]).args(["-x", &target, "--loop", "100", "-s"]);
    let mut offline = start(&lab, lab.online(), "offline", command.arg(lab.assistant().v4().to_string()))?;
    wait_for_requests(&mut streams, 100)?;
    // Which needs sockets only: nothing is attached that could be left.
    assert_eq!(interfaces(hosts[0])?, before[0]);
    offline.kill()?;
    as_before("offline")
}

#[test]
fn b051_a_target_that_is_off_the_network_for_seconds_gets_everything_afterwards() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut load = steady_load(&lab, 4)?;
    wait_for_requests(&mut streams, 200)?;
    // No cable, and its MAC address forgotten: the next hop cannot be resolved.
    lab.switch().ip("link set target down\n")?;
    lab.online().namespace().ip(&format!("neigh del {} dev {NIC}\n", lab.target().v4()))?;
    let before = streams.target.record()?.requests();
    let online = streams.online.record()?.requests();
    wait_for("a second of requests that cannot arrive", ARRIVAL, || {
        streams.online.record().is_ok_and(|record| record.requests() >= online + 400)
    })?;
    assert!(streams.target.record()?.requests() <= before + 20, "the target was not cut off");
    lab.switch().ip("link set target up\n")?;
    wait_for("copying", Duration::from_secs(5), || {
        streams.target.record().is_ok_and(|record| record.requests() > before + 100)
    })?;
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    let (_, target) = streams.ensure_equal_within(summary.requests as usize, Duration::from_secs(10))?;
    assert_eq!(target.connections.len(), 20);
    ensure!(replay.online.process.ended()?.is_none(), "the online role has ended");
    let (report, _) = replay.stop()?;
    assert!(report.counter("segments_no_link") > 0, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b051_the_online_host_s_link_may_go_down_and_come_back() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut load = steady_load(&lab, 4)?;
    wait_for_requests(&mut streams, 200)?;
    lab.switch().ip("link set online down\n")?;
    std::thread::sleep(Duration::from_secs(1));
    lab.switch().ip("link set online up\n")?;
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    streams.ensure_equal_within(summary.requests as usize, Duration::from_secs(10))?;
    ensure!(replay.online.process.ended()?.is_none(), "the online role has ended");
    replay.stop()?;
    Ok(())
}

#[test]
fn b051_a_target_may_come_up_after_the_replayer() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    lab.switch().ip("link set target down\n")?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let warning = replay.online.process.errors();
    assert!(warning.contains(&lab.target().v4().to_string()) && warning.contains("warning"), "{warning}");
    let run = |name: &str, first_id: u32| {
        let load = format!(
            "--connect {}:{STREAM} --connections 10 --per-connection 5 --requests 200 --rate 400 --first-id {first_id}",
            lab.online().v4()
        );
        Load::run(&lab, name, &load)
    };
    assert_eq!(run("before", 1)?.responses, 200);
    assert_eq!(streams.target.record()?.requests(), 0);
    lab.switch().ip("link set target up\n")?;
    let mut probes = 0;
    wait_for("copying after the target came up", Duration::from_secs(5), || {
        probes += 1;
        run(&format!("probe{probes}"), 10_000 * probes).is_ok()
            && streams.target.record().is_ok_and(|record| record.requests() > 0)
    })?;
    assert_eq!(run("after", 1_000_001)?.responses, 200);
    let arrived = |record: &Record| ids_after(record, 0).range(1_000_001..).count();
    wait_for("all requests after that", ARRIVAL, || {
        streams.target.record().is_ok_and(|record| arrived(&record) == 200)
    })?;
    ensure!(replay.online.process.ended()?.is_none(), "the online role has ended");
    let (report, _) = replay.stop()?;
    assert!(report.counter("segments_no_link") > 0, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b053_sessions_outlive_an_assistant_that_is_away_for_seconds() -> Result<()> {
    const AWAY: Duration = Duration::from_secs(2);
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut load = steady_load(&lab, 6)?;
    wait_for_requests(&mut streams, 200)?;
    replay.assistant.process.kill()?;
    std::thread::sleep(AWAY);
    replay.assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let returned_us = now_us()?;
    // A connection made now is copied once the return channel stands again.
    let short = format!(
        "--connect {}:{STREAM} --connections 5 --per-connection 1 --rate 50 --seconds 2.5 --first-id 1000001",
        lab.online().v4()
    );
    let short = Load::run(&lab, "short", &short)?;
    let summary = load.finish()?;
    for summary in [&summary, &short] {
        assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    }
    let total = (summary.requests + short.requests) as usize;
    let (_, target) = streams.ensure_equal_within(total, Duration::from_secs(10))?;
    assert_eq!(target.connections.len() as u64, 20 + short.connections_used);
    let new = target.connections.iter().filter(|it| it.ids.iter().any(|&id| id > 1_000_000));
    let first_us = new.flat_map(|it| it.times_us.iter()).min().context("no request of a new connection")?;
    let after_us = first_us.saturating_sub(returned_us);
    assert!(after_us < 2_000_000, "the first new request came {after_us} us after the assistant's return");
    ensure!(replay.online.process.ended()?.is_none(), "the online role has ended");
    replay.stop().context("after the restart")?;
    Ok(())
}

#[test]
fn b054_an_assistant_that_stands_still_for_ten_seconds_stops_nothing_for_good() -> Result<()> {
    const STILL: Duration = Duration::from_secs(10);
    let lab = Lab::up(Plan { clients: 2, onlines: 2, ..Plan::default() })?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let mut replay = Replay::start(&lab, &[HTTP], &[])?;
    // Another online host at the same assistant, whose few connections stay open.
    let (other, other_client) = (lab.host("online2"), lab.host("client2"));
    let mut others = [other, lab.target()].map(|host| StreamServer::start(&lab, host, STREAM, &[]));
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    let mut other_role = Role::online(&lab, other, &services, lab.assistant().v4().into(), &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 10 --rate 100 --seconds 16 --body 1-1000 --response 1-1000",
        other.v4()
    );
    let mut other_load = Load::start(&lab, other_client, "other", &load)?;
    let before_kib = [replay.online.process.resident_kib()?, replay.assistant.process.resident_kib()?];
    let load = format!(
        "--connect {}:{HTTP} --protocol http --expect-server online --connections 200 --per-connection 1 --rate 5000 --seconds 16",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for("requests at the target", ARRIVAL, || nginx.target.ledger().is_ok_and(|it| it.len() > 1000))?;
    replay.assistant.process.signal(Signal::SIGSTOP)?;
    std::thread::sleep(STILL);
    replay.assistant.process.signal(Signal::SIGCONT)?;
    let back = now_us()? as f64 / 1e6;
    let grown = |before: u64, process: &Process| -> Result<u64> {
        Ok(process.resident_kib()?.saturating_sub(before) >> 10)
    };
    let grown_mib =
        [grown(before_kib[0], &replay.online.process)?, grown(before_kib[1], &replay.assistant.process)?];
    assert!(grown_mib[0] < 128 && grown_mib[1] < 32, "the roles have grown by {grown_mib:?} MiB");
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");

    // The other host: whatever waited in the assistant for the one with the many connections, each of its own went on and got everything.
    let summary_of_other = other_load.finish()?;
    assert_eq!((summary_of_other.errors, summary_of_other.responses), (0, summary_of_other.requests));
    let count = summary_of_other.requests as usize;
    let [at_other, at_target] = others.each_mut().map(|server| -> Result<Record> {
        server.as_mut().map_err(|error| anyhow!("{error:#}"))?.ended_record_of(count, ARRIVAL)
    });
    let compared = stream::compare(&at_other?, &at_target?);
    assert_eq!((compared.equal, compared.differences.len()), (10, 0), "{compared:?}");
    let report = other_role.stop_online()?;
    assert_eq!(report.counter("sessions_opened"), 10, "{:?}", report.counters);

    // From a second after its return on nothing is missing; what was left out meanwhile is counted. A client uses its ports again while sessions
    // of before are not over, so that those take others.
    let online = nginx.online.settled_ledger(summary.requests as usize, ARRIVAL)?;
    let expected = online.filtered(|entry| entry.time > back + 1.0);
    ensure!(expected.len() > 1000, "only {} requests after the return", expected.len());
    let difference = |of: &Ledger| Ok::<_, anyhow::Error>(ledger::compare_uris(of, &nginx.target.ledger()?));
    holds_within(ARRIVAL, || difference(&expected).is_ok_and(|it| it.missing == 0));
    let (report, _) = replay.stop()?;
    assert_eq!(difference(&expected)?.missing, 0, "of {}: {:?}", expected.len(), report.counters);
    let all = difference(&online)?;
    let left_out: u64 =
        ["sessions_refused_target_down", "sessions_refused_unanswered", "sessions_target_reset"]
            .iter()
            .chain(&["sessions_handshake_timeout", "sessions_retransmit_timeout"])
            .map(|name| report.counter(name))
            .sum();
    assert_eq!(all.extra, 0, "{all:?}");
    assert!(all.missing as u64 <= left_out, "{all:?}, {:?}", report.counters);
    Ok(())
}
