//! Behaviours 29, 49, 50, 51, 53, 56, 63 and 64: what packets look like, what is left behind, and what may fail meanwhile.
//!
//! Root only; each test has a lab of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use replayer_common::packet::{TcpSegment, flags, parse_tcp};
use replayer_common::tcp_options;
use replayer_tests::clients::{Load, Watch, output_of};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::load::Summary;
use replayer_tests::packet::{Frames, Tap};
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Report, Role};
use replayer_tests::servers::{Direction, impair, tool};
use replayer_tests::wait::wait_for;

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;
/// A SYN that opens a connection.
const SYN_ONLY: &str = "tcp flags & (syn | ack) == syn";

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// TCP segments among frames, with their bytes.
fn segments(frames: &[Vec<u8>]) -> Vec<(TcpSegment, &[u8])> {
    frames.iter().filter_map(|frame| Some((parse_tcp(&frame.as_slice()).ok()?, frame.as_slice()))).collect()
}

#[test]
fn b029_timestamps_follow_the_target() -> Result<()> {
    let lab = Lab::up(Plan { offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let tap = Tap::start(lab.target().namespace(), NIC, Frames::Both)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 10 --per-connection 20 --requests 200 --body 1-10000 --response 1-10000 \
         --think-ms 5",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 200);
    streams.ensure_equal(200)?;
    replay.stop()?;

    let frames = tap.stop()?;
    // By the client's port: the values that the target has sent, and the newest of the session's own.
    let mut target_values: BTreeMap<u16, BTreeSet<u32>> = BTreeMap::new();
    let mut own_value: BTreeMap<u16, u32> = BTreeMap::new();
    let mut checked = 0;
    for (segment, frame) in segments(&frames) {
        let options = tcp_options::parse(
            &frame[usize::from(segment.tcp_offset) + 20..usize::from(segment.payload_offset)],
        );
        let Some((value, echo)) = options.timestamps else { continue };
        if segment.src_port == STREAM {
            target_values.entry(segment.dst_port).or_default().insert(value);
        } else if segment.dst_port == STREAM {
            if let Some(before) = own_value.insert(segment.src_port, value) {
                assert!(value.wrapping_sub(before) < 1 << 31, "TSval went from {before} to {value}");
            }
            if segment.flags & flags::SYN == 0 {
                let sent =
                    target_values.get(&segment.src_port).context("a segment before the target's SYN-ACK")?;
                assert!(sent.contains(&echo), "TSecr {echo} is no TSval of the target");
                checked += 1;
            }
        }
    }
    assert!(checked >= 200, "only {checked} segments had timestamps");
    Ok(())
}

/// Programs at the tcx ingress of a host's NIC, and its devices.
fn attached(host: &Host) -> Result<(usize, BTreeSet<String>)> {
    let (_, programs) = host
        .namespace()
        .enter(|| SchedClassifier::query_tcx(NIC, TcAttachType::Ingress))?
        .context("asking for programs")?;
    let devices = output_of(host.command("ls").arg("/sys/class/net"))?;
    Ok((programs.len(), devices.split_whitespace().map(str::to_owned).collect()))
}

#[test]
fn b049_a_killed_role_leaves_nothing_behind_and_the_server_does_not_notice() -> Result<()> {
    for victim in ["online", "assistant"] {
        let lab = Lab::up(Plan::default())?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let before = attached(lab.online())?;
        let links = || output_of(lab.assistant().command("ip").args(["-d", "link", "show", NIC]));
        ensure!(!links()?.contains("xdp"), "an XDP program before the start");
        let mut replay = Replay::start(&lab, &[HTTP], &[])?;
        assert_ne!(attached(lab.online())?, before);
        ensure!(links()?.contains("xdp"), "no XDP program on the assistant");
        let load = format!(
            "--connect {}:{HTTP} --protocol http --expect-server online --connections 20 --per-connection 50 --rate 2000 \
             --seconds 3",
            lab.online().v4()
        );
        let mut load = Load::start(&lab, lab.client(), "load", &load)?;
        wait_for("requests at the target", Duration::from_secs(5), || {
            nginx.target.ledger().is_ok_and(|ledger| ledger.len() > 500)
        })?;
        if victim == "online" {
            replay.online.process.signal(Signal::SIGKILL)?;
            wait_for("the online host as it was", Duration::from_secs(3), || {
                attached(lab.online()).is_ok_and(|now| now == before)
            })?;
        } else {
            replay.assistant.process.signal(Signal::SIGKILL)?;
            wait_for("the assistant's NIC as it was", Duration::from_secs(3), || {
                links().is_ok_and(|text| !text.contains("xdp"))
            })?;
        }
        let summary = load.finish()?;
        assert_eq!((summary.errors, summary.unanswered, summary.responses), (0, 0, summary.requests));
    }
    Ok(())
}

#[test]
fn b050_the_replayer_does_not_capture_what_it_sends() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    // The target's port is that of the online service, and both leave and come by the same NIC.
    let replay = Replay::start(&lab, &[HTTP], &[])?;
    let load = format!(
        "--connect {}:{HTTP} --protocol http --connections 10 --per-connection 10 --requests 1000",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 1000);
    nginx.ensure_equal(1000)?;
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("packets_syn"), 100, "{:?}", report.counters);
    assert_eq!(report.counter("sessions_opened"), 100);
    Ok(())
}

#[test]
fn b050_a_target_that_is_the_online_service_is_refused() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let (online, assistant) = (lab.online(), lab.assistant().v4().to_string());
    let _running = Role::assistant(&lab, lab.assistant(), &[])?;
    for target in [online.v4().to_string(), "127.0.0.1".to_owned()] {
        let service = format!("{HTTP}-{target}:{HTTP}");
        let mut command = online.command(tool("replayer")?);
        command.args(["online", "-x", &service, "-s", &assistant, "-i", NIC]);
        let mut process = Process::start(&mut command, "loop", &lab.dir())?;
        let status = process.wait(Duration::from_secs(10))?;
        ensure!(
            !status.success() && process.errors().contains(&target),
            "{target}: {status}: {}",
            process.errors()
        );
    }
    Ok(())
}

#[test]
fn b051_a_route_that_goes_and_comes_back_is_survived() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let mut replay = Replay::start(&lab, &[HTTP], &[])?;
    let load = |name: &str, seconds: f64| {
        let arguments = format!(
            "--connect {}:{HTTP} --protocol http --expect-server online --path /{name} --connections 20 \
             --per-connection 5 --rate 500 --seconds {seconds}",
            lab.online().v4()
        );
        Load::run(&lab, name, &arguments)
    };
    let target = lab.target().v4();
    lab.online().namespace().ip(&format!("route add unreachable {target}/32\n"))?;
    let without = load("without", 2.0)?;
    assert_eq!(without.errors, 0, "{without:?}");
    lab.online().namespace().ip(&format!("route del unreachable {target}/32\n"))?;
    // Copying is back once a request arrives; then nothing more is missing.
    wait_for("a request after the route's return", Duration::from_secs(5), || {
        load("probe", 0.1).is_ok()
            && nginx.target.ledger().is_ok_and(|it| it.entries.iter().any(|e| e.uri.starts_with("/probe")))
    })?;
    let after = load("after", 2.0)?;
    assert_eq!(after.errors, 0, "{after:?}");
    let arrived = || {
        nginx
            .target
            .ledger()
            .map_or(0, |it| it.entries.iter().filter(|e| e.uri.starts_with("/after")).count())
    };
    wait_for("all requests after the route's return", ARRIVAL, || arrived() == after.requests as usize)
        .with_context(|| format!("{} of {}", arrived(), after.requests))?;
    ensure!(replay.online.process.ended()?.is_none(), "the online role has ended");
    let (report, _) = replay.stop()?;
    assert!(report.counter("segments_no_link") > 0, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b053_running_sessions_go_on_after_the_assistant_was_restarted() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --rate 400 --seconds 6 --body 1-5000 --response 1-5000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for("requests at the target", Duration::from_secs(5), || {
        streams.target.record().is_ok_and(|record| record.requests() > 400)
    })?;
    replay.assistant.process.kill()?;
    replay.assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let summary = load.finish()?;
    assert_eq!(summary.errors, 0, "{summary:?}");
    let (_, target) = streams.ensure_equal_within(summary.requests as usize, Duration::from_secs(10))?;
    assert_eq!(target.connections.len(), 20);
    replay.stop()?;
    Ok(())
}

#[test]
fn b056_a_syn_ack_that_comes_before_its_registration_is_delivered() -> Result<()> {
    let lab = Lab::up(Plan { offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let syns = format!("ip saddr != {} {SYN_ONLY}", lab.online().v4());
    let watch = Watch::arriving(lab.target(), &[("syns", &syns)])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    // Registrations come 50 ms late to the assistant; SYN-ACKs of the target do not.
    let _cable = impair(&lab, lab.assistant(), Direction::ToHost, "--only established --delay-ms 50")?;
    let load = format!(
        "--connect {}:{STREAM} --connections 50 --per-connection 2 --requests 100 --body 1-2000",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 100);
    streams.ensure_equal(100)?;
    assert_eq!(watch.packets()?["syns"], 50, "no SYN had to be sent again");
    let (_, assistant) = replay.stop()?;
    let early = assistant["routing"]["early_delivered"].as_u64().context("SYN-ACKs that came early")?;
    assert_eq!(early, 50, "SYN-ACKs that came before their registration: {assistant}");
    Ok(())
}

/// Real ClientHellos are recognised: nothing of them goes to the target, and a person is told once.
#[test]
fn tls_is_said_once_and_not_sent() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let mut replay = Replay::start(&lab, &[HTTP], &[])?;
    let url = format!("https://{}:{HTTP}/", lab.online().v4());
    let tls = |count| -> Result<()> {
        for _ in 0..count {
            // The server speaks no TLS, which is not the replayer's affair.
            let arguments = ["--silent", "--insecure", "--max-time", "5", &url];
            let status = lab.client().command("curl").args(arguments).status()?;
            ensure!(!status.success(), "curl got an answer by TLS");
        }
        Ok(())
    };
    tls(2)?;
    replay.online.process.wait_for_message("speak TLS", Duration::from_secs(5))?;
    tls(2)?;
    let load = format!("--connect {}:{HTTP} --protocol http --requests 3", lab.online().v4());
    assert_all_answered(&Load::run(&lab, "load", &load)?, 3);
    let (_, target) = nginx.ledgers(3)?;
    assert_eq!(target.len(), 3, "what is not TLS is replayed, the rest is not");
    let report = replay.online.stop_online()?;
    assert_eq!(report.counter("connections_tls"), 4, "{:?}", report.counters);
    assert_eq!(report.counter("turns_sent"), 3, "{:?}", report.counters);
    assert_eq!(replay.online.process.errors().matches("speak TLS").count(), 1);
    Ok(())
}

#[test]
fn b063_a_stop_by_signal_ends_well_with_a_report() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let lab = Lab::up(Plan::default())?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let mut replay = Replay::start(&lab, &[HTTP], &[])?;
        let load =
            format!("--connect {}:{HTTP} --protocol http --connections 5 --requests 500", lab.online().v4());
        assert_all_answered(&Load::run(&lab, "load", &load)?, 500);
        nginx.ensure_equal(500)?;
        replay.online.process.signal(signal)?;
        let report: Report = replay.online.ended_well()?;
        report.check_accounts()?;
        assert_eq!(report.counter("turns_sent"), 500);
        replay.assistant.process.signal(signal)?;
        let assistant: serde_json::Value = replay.assistant.ended_well()?;
        assert_eq!(assistant["role"], "assistant");
        // A fatal error is no good end: the report cannot be written.
        let nowhere = format!("{}/nowhere/report.json", lab.dir().display());
        let mut command = lab.assistant().command(tool("replayer")?);
        let mut process = Process::start(
            command.args(["assistant", "-i", NIC, "--report", &nowhere]),
            "fatal",
            &lab.dir(),
        )?;
        let status = process.wait(Duration::from_secs(10))?;
        ensure!(!status.success() && process.errors().contains("nowhere"), "{status}: {}", process.errors());
        ensure!(!fs::exists(&nowhere)?, "a report at {nowhere}");
    }
    Ok(())
}
