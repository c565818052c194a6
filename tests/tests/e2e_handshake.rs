//! Behaviour 19: SYNs with more in them than an offer to talk.
//!
//! Root only; each test has a lab of its own.

use std::net::SocketAddrV4;

use anyhow::Result;
use replayer_tests::clients::{Load, counter};
use replayer_tests::conversation::{Conversation, Manner};
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::StreamPair;
use replayer_tests::replay::Replay;
use replayer_tests::stream::RequestHeader;

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
