//! Behaviours 27 and 28: large responses as fast as a client of its own would get them, and uploads to a target that reads slowly.
//!
//! Root only; each test has a lab of its own.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use replayer_tests::clients::{Load, counter, output_of};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::StreamPair;
use replayer_tests::replay::Replay;
use replayer_tests::stream::{End, Record};

const STREAM: u16 = 9000;
const UPLOAD: u32 = 100_000_000;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// Seconds from the request to its answer's last byte, for the only connection in a record from this address.
fn answer_seconds(record: &Record, client: &Host) -> Result<f64> {
    let address = format!("{}:", client.v4());
    let mut of_client = record.connections.iter().filter(|it| it.peer.starts_with(&address));
    let connection = of_client.next().context("no connection")?;
    ensure!(of_client.next().is_none(), "more than one connection");
    let begun = connection.times_us.first().context("no request")?;
    let ended = connection.ended_us.context("the connection is still open")?;
    Ok((ended - begun) as f64 / 1e6)
}

#[test]
fn b027_a_large_response_comes_as_fast_as_to_a_client_of_its_own() -> Result<()> {
    const RESPONSE: u32 = 50_000_000;
    let lab = Lab::up(Plan::default())?;
    // A NIC of 500 Mbit/s, which the target fills if its client lets it. Without it the loads of this machine would be compared.
    output_of(
        lab.target()
            .command("tc")
            .args(["qdisc", "add", "dev", NIC, "root", "tbf"])
            .args(["rate", "500mbit", "burst", "128k", "latency", "50ms"]),
    )?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let load = |server: &Host| {
        format!("--connect {}:{STREAM} --requests 1 --per-connection 1 --response {RESPONSE}", server.v4())
    };
    // Natively from the online host, which the target reaches directly.
    let mut native = Load::start(&lab, lab.online(), "native", &load(lab.target()))?;
    assert_all_answered(&native.finish()?, 1);
    let native = answer_seconds(&ended(&mut streams, lab.online())?, lab.online())?;

    let timeouts = || counter(lab.target(), "TcpExt:", "TCPTimeouts");
    let before = timeouts()?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    assert_all_answered(&Load::run(&lab, "load", &load(lab.online()))?, 1);
    let replayed = answer_seconds(&ended(&mut streams, lab.client())?, lab.client())?;
    assert_eq!(timeouts()?, before, "the target's segments were not acknowledged in time");
    assert!(native >= replayed * 0.8, "{native} s natively, {replayed} s replayed");
    let (report, _) = replay.stop()?;
    assert!(report.counter("response_bytes") >= u64::from(RESPONSE), "{:?}", report.counters);
    Ok(())
}

/// The target's record once the connection of a client has ended.
fn ended(streams: &mut StreamPair, client: &Host) -> Result<Record> {
    let address = format!("{}:", client.v4());
    let mut record = Record::default();
    let ended = replayer_tests::wait::holds_within(Duration::from_secs(20), || {
        record = streams.target.record().unwrap_or_default();
        record.connections.iter().any(|it| it.peer.starts_with(&address) && it.end != End::Open)
    });
    ensure!(ended, "{address} has not ended: {record:?}");
    Ok(record)
}

#[test]
fn b028_an_upload_to_a_target_that_reads_slowly_arrives_whole_or_is_shed_whole() -> Result<()> {
    for (held_mib, fits) in [(512, true), (16, false)] {
        let lab = Lab::up(Plan::default())?;
        let mut streams =
            StreamPair::start_with(&lab, STREAM, &["--slow-read", "60000000"], &["--slow-read", "20000000"])?;
        let replay = Replay::start(&lab, &[STREAM], &["--max-held", &held_mib.to_string()])?;
        let before_kib = replay.online.process.resident_kib()?;
        let load = format!(
            "--connect {}:{STREAM} --requests 1 --per-connection 1 --body {UPLOAD}",
            lab.online().v4()
        );
        let mut load = Load::start(&lab, lab.client(), "load", &load)?;
        let mut highest_kib = 0;
        while load.process.ended()?.is_none() {
            highest_kib = highest_kib.max(replay.online.process.resident_kib()?);
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_all_answered(&load.finish()?, 1);
        let grown_mib = highest_kib.saturating_sub(before_kib) / 1024;
        assert!(grown_mib < held_mib + 16, "{grown_mib} MiB more, with at most {held_mib} MiB held");
        if fits {
            streams.ensure_equal_within(1, Duration::from_secs(10))?;
            let (report, _) = replay.stop()?;
            assert_eq!(report.counter("sessions_limit"), 0);
        } else {
            let record = ended(&mut streams, lab.client())?;
            assert_eq!(record.requests(), 0, "{record:?}");
            let (report, _) = replay.stop()?;
            assert_eq!(report.counter("sessions_limit"), 1, "{:?}", report.counters);
            assert!(report.counter("lost_bytes_limit") > 1_000_000, "{:?}", report.counters);
        }
    }
    Ok(())
}
