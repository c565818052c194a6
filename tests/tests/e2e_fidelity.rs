//! Every byte of every session: large requests and responses on many connections at once, with and without offloads, and with a target
//! that is slower than the online server.

use anyhow::{Context, Result};
use replayer_tests::clients::Load;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::pairs::StreamPair;
use replayer_tests::replay::Replay;

/// stream-server.
const STREAM: u16 = 9000;
const CONNECTIONS: usize = 200;
const REQUESTS: usize = CONNECTIONS * 20;

/// Replays 200 connections of 20 requests and compares every stream.
fn replay_large_requests(plan: Plan, target: &[&str]) -> Result<()> {
    let receive_threads = plan.receive_threads;
    let lab = Lab::up(plan)?;
    let mut streams = StreamPair::start_with(&lab, STREAM, &[], target)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections {CONNECTIONS} --per-connection 20 --requests {REQUESTS} \
         --body 10-60000 --response 1-60000",
        lab.online().v4()
    );
    let summary = Load::run(&lab, "load", &load)?;
    assert_eq!((summary.responses, summary.errors), (REQUESTS as u64, 0), "{summary:?}");
    let compared = streams.ensure_equal(REQUESTS);
    let (report, _) = replay.stop()?;
    if receive_threads {
        // A device that is busy says so, and what it is to send stays in the ring; older ones (before Linux 6.16) drop, and that is counted.
        let count = |name: &str| report.port[name].as_u64().with_context(|| format!("no {name}"));
        let (refused, dropped) = (count("kicks_cut_short")?, count("dropped_by_device")?);
        assert!(refused + dropped > 0, "the device was never full: {:#}", report.port);
        assert_eq!(count("transmitted")?, count("completed")?, "{:#}", report.port);
    }
    compared.map_err(|error| error.context(format!("{:?}", report.counters)))?;
    Ok(())
}

/// 116 MB as fast as the online server takes them; receive offload makes packets of up to 64 KB of them.
#[test]
fn b002_large_requests_with_offloads() -> Result<()> {
    replay_large_requests(Plan::default(), &[])
}

#[test]
fn b002_large_requests_without_offloads() -> Result<()> {
    replay_large_requests(Plan { offloads: false, ..Plan::default() }, &[])
}

/// A transmit ring of 256 packets that can be full: what the device refuses is kept and sent again.
#[test]
fn b051_large_requests_through_a_device_that_makes_its_sender_wait() -> Result<()> {
    replay_large_requests(Plan { offloads: false, receive_threads: true, ..Plan::default() }, &[])
}

/// Each response 50 ms later than online: nearly everything waits for its turn.
#[test]
fn b021_large_requests_to_a_slower_target() -> Result<()> {
    replay_large_requests(Plan::default(), &["--delay-ms", "50"])
}
