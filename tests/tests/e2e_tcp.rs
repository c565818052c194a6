//! Behaviours 29 to 31 and 34: numbers that wrap, windows that close, a path that loses segments, and connections that are silent.
//!
//! Root only; each test has a lab of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use replayer_common::packet::{flags, parse_tcp};
use replayer_common::tcp_options;
use replayer_tests::capture::{Capture, Passed, passed};
use replayer_tests::clients::{Load, counter};
use replayer_tests::conversation::{Conversation, bytes_of};
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::packet::{Frames, Tap};
use replayer_tests::pairs::StreamPair;
use replayer_tests::replay::Replay;
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::wait_for;

const STREAM: u16 = 9000;

/// What the target saw of one session's segments.
#[derive(Debug, Default)]
struct Seen {
    sequence_numbers: BTreeSet<u32>,
    timestamps: BTreeSet<u32>,
    last_timestamp: Option<u32>,
    target_timestamps: BTreeSet<u32>,
}

/// Whether numbers go from the end of their range to its beginning.
fn wraps(numbers: &BTreeSet<u32>) -> bool {
    let near_the_end = numbers.range(0xf000_0000..).next().is_some();
    let near_the_beginning = numbers.range(..0x1000_0000).next().is_some();
    near_the_end && near_the_beginning
}

#[test]
fn b029_sequence_numbers_and_timestamps_wrap() -> Result<()> {
    // In half a second of timestamps, and after a few of the requests below.
    const TIMESTAMP: u32 = 0u32.wrapping_sub(1500);
    const ISN: u32 = 0u32.wrapping_sub(20_000);
    let lab = Lab::up(Plan { offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let tap = Tap::start(lab.target().namespace(), NIC, Frames::Both)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let server = std::net::SocketAddrV4::new(lab.online().v4(), STREAM);
    let mut connections = Conversation::open_at(lab.client(), server, 10, ISN, TIMESTAMP)?;
    for round in 0..20 {
        let id = |connection: usize| round * 100 + connection as u64;
        for (index, connection) in connections.iter_mut().enumerate() {
            connection.send(&bytes_of(RequestHeader {
                id: id(index),
                body: 3000,
                response: 3000,
                delay_ms: 60,
            }))?;
        }
        for (index, connection) in connections.iter_mut().enumerate() {
            connection.expect_answer(id(index))?;
        }
    }
    streams.ensure_equal(200)?;
    replay.stop()?;

    let mut sessions: BTreeMap<u16, Seen> = BTreeMap::new();
    for frame in &tap.stop()? {
        let Ok(segment) = parse_tcp(&frame.as_slice()) else { continue };
        let options = &frame[usize::from(segment.tcp_offset) + 20..usize::from(segment.payload_offset)];
        let Some((value, echo)) = tcp_options::parse(options).timestamps else { continue };
        if segment.src_port == STREAM {
            sessions.entry(segment.dst_port).or_default().target_timestamps.insert(value);
        } else if segment.dst_port == STREAM {
            let seen = sessions.entry(segment.src_port).or_default();
            if let Some(before) = seen.last_timestamp.replace(value) {
                assert!(value.wrapping_sub(before) < 1 << 31, "TSval went from {before} to {value}");
            }
            if segment.flags & flags::SYN == 0 {
                assert!(seen.target_timestamps.contains(&echo), "TSecr {echo} is no TSval of the target");
            }
            seen.sequence_numbers.insert(segment.seq);
            seen.timestamps.insert(value);
        }
    }
    assert_eq!(sessions.len(), 10);
    for (port, seen) in sessions {
        assert!(wraps(&seen.sequence_numbers), "no wrap of the sequence numbers of {port}");
        assert!(wraps(&seen.timestamps), "no wrap of the timestamps of {port}: {:?}", seen.timestamps);
    }
    Ok(())
}

/// Measured on the target's cable: from the segment that opens the window, which carries nothing else, to the next data.
#[test]
fn b030_sending_goes_on_within_half_a_second_when_a_closed_window_opens() -> Result<()> {
    const CLOSED: Duration = Duration::from_secs(5);
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut connection = Conversation::open(lab.client(), (lab.online().v4(), STREAM).into())?;
    connection.ask(RequestHeader { id: 1, body: 10, response: 10, delay_ms: 0 })?;
    streams.ensure_equal(1)?;
    let cable = Capture::on_cable(&lab, lab.target(), &format!("tcp port {STREAM}"))?;
    // The target's server does not read: after what its socket takes, the window is closed.
    streams.target.process.signal(Signal::SIGSTOP)?;
    connection.ask(RequestHeader { id: 2, body: 8 << 20, response: 10, delay_ms: 0 })?;
    std::thread::sleep(CLOSED);
    let stats = replay.online.stats().context("statistics of the online role")?;
    assert!(stats.held_bytes > 1 << 20, "the window was not closed: {stats:?}");
    streams.target.process.signal(Signal::SIGCONT)?;
    streams.ensure_equal(2)?;
    replay.stop()?;

    let segments = passed(&cable.stop()?)?;
    let from_target = |it: &&Passed| it.segment.src_port == STREAM;
    let closed = segments.iter().filter(from_target).find(|it| it.segment.window == 0);
    let closed = closed.context("the window was not closed")?;
    let opened = segments
        .iter()
        .filter(from_target)
        .find(|it| it.at_ns > closed.at_ns && it.segment.window > 0)
        .context("the window was not opened")?;
    let closed_ns = opened.at_ns - closed.at_ns;
    assert!(closed_ns >= 4_500_000_000, "the window was closed for {closed_ns} ns");
    assert!(opened.segment.is_pure_ack() && opened.segment.ack == closed.segment.ack, "{opened:?}");
    let resumed = segments
        .iter()
        .find(|it| it.at_ns > opened.at_ns && it.segment.dst_port == STREAM && it.segment.payload_len > 0)
        .context("nothing was sent any more")?;
    let after_ns = resumed.at_ns - opened.at_ns;
    assert!(after_ns < 500_000_000, "sending went on {after_ns} ns after the window had opened");
    Ok(())
}

#[test]
fn b034_a_silent_connection_answers_the_target_s_probes_and_stays_the_same() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--keepalive", "1"])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let server = (lab.online().v4(), STREAM).into();
    let mut connections: Vec<Conversation> =
        (0..10).map(|_| Conversation::open(lab.client(), server)).collect::<Result<_>>()?;
    let request = |id| RequestHeader { id, body: 2000, response: 2000, delay_ms: 0 };
    for (id, connection) in (1..).zip(&mut connections) {
        connection.ask(request(id))?;
    }
    // The target gives a connection up when two probes in a row are not answered.
    let probes = || counter(lab.target(), "TcpExt:", "TCPKeepAlive");
    wait_for("four probes on each connection", Duration::from_secs(10), || {
        probes().is_ok_and(|count| count >= 40)
    })?;
    for (id, connection) in (101..).zip(&mut connections) {
        connection.ask(request(id))?;
    }
    let (_, target) = streams.ensure_equal(20)?;
    assert_eq!(target.connections.len(), 10);
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("sessions_opened"), 10);
    Ok(())
}

/// A twentieth of what goes to the target is lost, and the target remembers no SYN (SYN cookies): it knows of a connection only by the
/// first segment after it, and resets those of which it sees another one first. A burst of connections before the losses begin: only after
/// one does the replayer expect such a target.
#[test]
fn b031_segments_lost_on_the_way_to_a_target_with_syn_cookies() -> Result<()> {
    let lab = Lab::up(Plan { offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let target = lab.target().namespace();
    target.set_sysctl("ipv4/tcp_syncookies", "2")?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = |more: &str| {
        format!("--connect {}:{STREAM} --connections 200 --response 1-5000 {more}", lab.online().v4())
    };
    let burst = Load::run(&lab, "burst", &load("--per-connection 1 --requests 200 --first-id 5000"))?;
    assert_eq!((burst.responses, burst.errors), (200, 0), "{:?}", burst.errors_by_kind);
    streams.ensure_equal(200)?;
    target.nft(&format!(
        "table netdev loss {{\nchain ingress {{\ntype filter hook ingress device {NIC} priority 0;\n\
         tcp dport {STREAM} numgen random mod 100 < 5 drop\n}}\n}}\n"
    ))?;
    let summary = Load::run(&lab, "load", &load("--per-connection 5 --requests 1000 --body 5000-20000"))?;
    assert_eq!((summary.responses, summary.errors), (1000, 0), "{:?}", summary.errors_by_kind);
    let compared = streams.ensure_equal_within(1200, Duration::from_secs(40));
    let (report, _) = replay.stop()?;
    compared.with_context(|| format!("{:?}", report.counters))?;
    assert!(report.counter("segments_retransmitted") > 200, "{:?}", report.counters);
    Ok(())
}
