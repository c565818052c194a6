//! The reader of capture files, and what is made of them: inspection, and a dry run of the offline role.

use replayer::cli::ServiceArg;
use replayer::inspect::inspect;
use replayer::offline::dry_run::{self, FRAME_ROOM, LINK, Memory, START_NS};
use replayer::offline::feed::{Feed, FeedPace};
use replayer::offline::pace::Speed;
use replayer::offline::read_ahead::FeedConfig;
use replayer::pcap::input::Input;
use replayer::pcap::{Files, Order, Reader};
use replayer_common::addr::{ANY, Endpoint, from_v4};
use replayer_common::packet::Protocol;
use replayer_engine::Engine;
use replayer_engine::config::{Config, Limits, Service};
use std::io::{Cursor, Read};
use std::sync::atomic::AtomicBool;

/// What is looked at of a file that grows when it is decompressed.
const MAX_BYTES: u64 = 1 << 18;
const PATIENCE_NS: u64 = 3_000_000_000;

/// Reads `data` as a capture file. Its first byte chooses the pace of the dry run and is not part of the file.
///
/// # Panics
/// Where the accounts of the dry run do not add up, or a session is left over.
pub fn run(data: &[u8]) {
    let Some((&choice, file)) = data.split_first() else { return };
    let Ok(input) = Input::new(Cursor::new(file.to_vec()), None) else { return };
    let mut bytes = Vec::new();
    // What comes before an error counts.
    let _ = input.take(MAX_BYTES).read_to_end(&mut bytes);
    let Some(mut files) = open(&bytes) else { return };
    let report = inspect(&mut files, false);
    assert!(!report.text().is_empty());
    for service in &report.services {
        assert!(service.replayable_requests <= service.requests, "{service:?}");
    }
    if let Some(files) = open(&bytes) {
        replay(files, choice);
    }
}

fn open(bytes: &[u8]) -> Option<Files> {
    let input = Input::new(Cursor::new(bytes.to_vec()), None).ok()?;
    Some(Files::new(vec![Reader::new("input".into(), input).ok()?], Order::Merged))
}

/// A dry run for every service on port 80.
fn replay(files: Files, choice: u8) {
    let service = Service {
        online: Endpoint { ip: ANY, port: 80 },
        target: Endpoint { ip: from_v4([198, 51, 100, 7]), port: 8080 },
    };
    let services = [Protocol::Tcp, Protocol::Udp].map(|protocol| ServiceArg { protocol, service });
    let mut config = Config::new(vec![service]);
    config.udp_services = vec![service];
    config.limits = Limits {
        connections: 64,
        sessions: 64,
        held_bytes: 1 << 18,
        held_bytes_per_connection: 1 << 17,
        identities: 1 << 10,
        ..Limits::default()
    };
    config.frame_room = FRAME_ROOM as u16;
    let mut engine = Engine::new(config, START_NS);
    engine.set_link(0, Some(LINK));
    engine.set_link(1, Some(LINK));
    let feed = FeedConfig::all(
        Vec::new(),
        vec![(Protocol::Tcp, service.online), (Protocol::Udp, service.online)],
        FRAME_ROOM,
    );
    let pace = FeedPace {
        // A file's own pace takes as many steps as it has hours.
        speed: if choice & 1 == 0 { Speed::Max } else { Speed::Times(1_000_000.0) },
        max_gap: None,
        duration: None,
        in_flight: 1 + u64::from(choice >> 1),
        copies: 1,
        hold_limit_ns: 2_000_000_000,
    };
    let Ok(mut feed) = Feed::over(files, feed, pace) else { return };
    let mut out = Memory::new(&services, 2, 64, None, 0, 1);
    let stop = AtomicBool::new(false);
    let ended = dry_run::run(&mut engine, &mut feed, &mut out, PATIENCE_NS, &stop, |_| {});
    assert!(ended.is_ok(), "{ended:?}");
    assert!(engine.stopped());
    for (name, left, right) in engine.counters().identities(&engine.pending()) {
        assert_eq!(left, right, "{name}: {:?}", engine.counters());
    }
    let figures = feed.status().figures();
    assert_eq!(
        figures.packets,
        figures.packets_given
            + figures.packets_responses
            + figures.packets_not_service
            + figures.packets_client_not_chosen
            + figures.packets_sampled_out
            + figures.packets_unparsable
            + figures.packets_fragments
            + figures.packets_too_large
            + figures.packets_link_type
            + figures.packets_outside,
        "{figures:?}"
    );
}
