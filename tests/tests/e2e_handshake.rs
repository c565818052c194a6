//! Behaviours 19 and 20: SYNs with more in them than a port, and SYNs of nobody.
//!
//! Root only; each test has a lab of its own.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use replayer_tests::clients::{Load, counter};
use replayer_tests::conversation::{Conversation, Manner};
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::load::Summary;
use replayer_tests::packet::{Frames, PacketSocket};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::Replay;
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::{holds_within, wait_for};

const STREAM: u16 = 9000;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

#[test]
fn b019_fast_open_data_arrives_first_and_once() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    // Bits of tcp_fastopen (Documentation/networking/ip-sysctl.rst): client and server, both without a cookie, all listeners.
    lab.client().namespace().set_sysctl("ipv4/tcp_fastopen", "5")?;
    lab.online().namespace().set_sysctl("ipv4/tcp_fastopen", "1538")?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    converse(&lab, Manner::FastOpen, 20)?;
    assert_eq!(counter(lab.online(), "TcpExt:", "TCPFastOpenPassive")?, 20);
    assert_eq!(counter(lab.target(), "TcpExt:", "TCPFastOpenPassive")?, 0);
    streams.ensure_equal(60)?;
    replay.stop()?;
    Ok(())
}

#[test]
fn b019_clients_of_multipath_tcp_are_copied_to_a_server_with_and_without_it() -> Result<()> {
    for arguments in [&[][..], &["--multipath"]] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start_with(&lab, STREAM, arguments, arguments)?;
        let replay = Replay::start(&lab, &[STREAM], &[])?;
        converse(&lab, Manner::Multipath, 20)?;
        assert_eq!(counter(lab.client(), "MPTcpExt:", "MPCapableSYNTX")?, 20);
        let accepted = counter(lab.online(), "MPTcpExt:", "MPCapableSYNRX")?;
        assert_eq!(accepted, if arguments.is_empty() { 0 } else { 20 });
        // One path leads to the target, and the session offers no other.
        assert_eq!(counter(lab.target(), "MPTcpExt:", "MPCapableSYNRX")?, 0);
        streams.ensure_equal(60)?;
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b019_clients_that_offer_congestion_notification() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    lab.client().namespace().set_sysctl("ipv4/tcp_ecn", "1")?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --per-connection 50 --requests 1000 --body 1-20000 --response 1-5000",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 1000);
    assert!(counter(lab.online(), "IpExt:", "InECT0Pkts")? > 1000, "the clients did not use it");
    streams.ensure_equal(1000)?;
    replay.stop()?;
    Ok(())
}

/// Twenty connections of three requests each, in a special manner.
fn converse(lab: &Lab, manner: Manner, connections: u64) -> Result<()> {
    let server = SocketAddrV4::new(lab.online().v4(), STREAM);
    for number in 1..=connections {
        let mut connection = Conversation::open_in_manner(lab.client(), server, manner)?;
        for (request, body) in [(1, 700), (2, 20_000), (3, 0)] {
            connection.ask(RequestHeader { id: number * 10 + request, body, response: 3000, delay_ms: 0 })?;
        }
    }
    Ok(())
}

#[test]
fn b020_a_flood_of_spoofed_syns_costs_bounded_memory_and_no_live_session() -> Result<()> {
    const SYNS: u32 = 100_000;
    let lab = Lab::up(Plan { clients: 2, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let attacker = lab.host("client2");
    // What the online server answers to them ends at the attacker.
    lab.online()
        .namespace()
        .ip(&format!("route add 172.29.0.0/16 via {} dev {NIC} onlink\n", attacker.v4()))?;
    let mut replay = Replay::start(&lab, &[STREAM], &["--max-sessions", "10000"])?;
    let before_kib = replay.online.process.resident_kib()?;
    let load = format!(
        "--connect {}:{STREAM} --connections 50 --rate 1000 --seconds 6 --body 1-3000 --response 1-3000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for("fifty live sessions", ARRIVAL, || {
        streams.target.record().is_ok_and(|record| {
            record.connections.iter().all(|it| !it.ids.is_empty()) && record.connections.len() == 50
        })
    })?;
    let socket = attacker.namespace().enter(|| PacketSocket::open(NIC, Frames::Arriving))??;
    let begun = Instant::now();
    let mut frame = Vec::new();
    for number in 0..SYNS {
        frame.clear();
        // Another address and another port each time.
        let [.., high, low] = number.to_be_bytes();
        let port = 1024 + (number.wrapping_mul(48_271) % 60_000) as u16;
        PacketBuilder::ethernet2(mac(&attacker.mac())?, mac(&lab.online().mac())?)
            .ipv4([172, 29, high, low], lab.online().v4().octets(), 64)
            .tcp(port, STREAM, number.wrapping_mul(2_654_435_761), 64_240)
            .syn()
            .write(&mut frame, &[])?;
        // A full queue of the NIC empties by itself.
        holds_within(Duration::from_secs(1), || socket.send(&frame).is_ok());
        // Within about four seconds, evenly.
        let due = Duration::from_micros(u64::from(number) * 40);
        if let Some(early) = due.checked_sub(begun.elapsed()) {
            std::thread::sleep(early);
        }
    }
    let grown_kib = replay.online.process.resident_kib()?.saturating_sub(before_kib);
    let summary = load.finish()?;
    assert_all_answered(&summary, summary.requests);
    let expected = summary.requests as usize;
    let (online, target) = streams.records(expected, ARRIVAL)?;
    let live = |record: &replayer_tests::stream::Record| {
        let client = format!("{}:", lab.client().v4());
        let of_client = record.connections.iter().filter(|it| it.peer.starts_with(&client));
        replayer_tests::stream::Record { connections: of_client.cloned().collect() }
    };
    let comparison = replayer_tests::stream::compare(&live(&online), &live(&target));
    assert!(comparison.differences.is_empty() && comparison.compared == 50, "{comparison:#?}");
    assert!(replay.online.process.ended()?.is_none());
    let (report, _) = replay.stop()?;
    assert!(grown_kib < 32 * 1024, "the online role has grown by {grown_kib} KiB");
    // Up to the limit they are sessions like any other; those above it are counted.
    assert_eq!(report.counter("sessions_opened"), 10_000, "{:?}", report.counters);
    let refused = report.counter("sessions_refused_limit") + report.counter("packets_limit");
    assert_eq!(refused, 50 + u64::from(SYNS) - 10_000, "{:?}", report.counters);
    Ok(())
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("a MAC address has six bytes")
}
