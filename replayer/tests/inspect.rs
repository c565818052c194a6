//! `replayer inspect` over real captures, those of the project and those of `../shared/pcaps` where that is there, and over damaged copies of them.

use replayer::inspect::report::NotReplayable;
use replayer::inspect::{Report, inspect};
use replayer::pcap::input::Input;
use replayer::pcap::{Files, Order, Reader};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// All capture files, sorted.
fn captures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["../tests/captures", "../../shared/pcaps/trex", "../../shared/pcaps/zeek"] {
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else {
            eprintln!("skipped: {} is not there", root.join(folder).display());
            continue;
        };
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.retain(|file| {
        file.extension().is_some_and(|extension| extension.to_string_lossy().contains("pcap"))
    });
    files.sort();
    assert!(!files.is_empty());
    files
}

fn report(bytes: Vec<u8>) -> Option<Report> {
    let input = Input::new(Cursor::new(bytes), None).ok()?;
    let reader = Reader::new("test".into(), input).ok()?;
    Some(inspect(&mut Files::new(vec![reader], Order::Merged), false))
}

/// What is known of some of them: server, connections, requests, client bytes, and requests that can be replayed.
const KNOWN: &[(&str, &str, u64, u64, u64, u64)] = &[
    ("keep-alive.pcap", "172.28.0.11:8080", 1, 5, 3336, 5),
    ("keep-alive-ipv6.pcap", "[fd00:28::11]:8080", 1, 5, 3336, 5),
    ("redis-pipelined.pcap", "172.28.0.11:6379", 7, 25, 9797, 25),
    ("get.pcap", "192.150.187.43:80", 1, 1, 136, 1),
    ("http-vlan-0.pcap", "192.150.187.43:80", 1, 1, 136, 1),
    ("handshake-reorder.pcap", "192.150.187.43:80", 1, 1, 136, 1),
    ("get_nosyn.pcap", "192.150.187.43:80", 1, 1, 136, 0),
    ("payload-syn.pcap", "192.168.0.2:80", 1, 1, 100, 1),
    ("tcp2_http_ipv6_c.pcap", "[::3000:1]:80", 1, 1, 249, 1),
    ("bulk-loading.pcap", "127.0.0.1:6379", 1, 6, 38_823, 6),
    ("tls1.2.pcap", "68.233.76.12:443", 1, 4, 713, 0),
];

#[test]
fn b060_every_capture_is_inspected() {
    let files = captures();
    for path in &files {
        let mut one = Files::open(std::slice::from_ref(path), Order::Merged).unwrap();
        let report = inspect(&mut one, false);
        assert!(one.problems().is_empty(), "{:?}", one.problems());
        assert!(report.packets > 0 && !report.services.is_empty(), "{}: {report:?}", path.display());
        assert!(!report.text().is_empty());
        for service in &report.services {
            let not: u64 = service
                .not_replayable
                .iter()
                .filter(|(reason, _)| **reason != NotReplayable::ConnectionsWithoutData)
                .map(|(_, count)| count)
                .sum();
            assert_eq!(
                service.requests,
                service.replayable_requests + not,
                "{}: {service:?}",
                path.display()
            );
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some(known) = KNOWN.iter().find(|known| known.0 == name) {
            let found = &report.services[0];
            assert_eq!(
                (
                    found.server.as_str(),
                    found.connections,
                    found.requests,
                    found.client_bytes,
                    found.replayable_requests
                ),
                (known.1, known.2, known.3, known.4, known.5),
                "{name}"
            );
        }
    }
}

#[test]
fn hostile_captures_do_no_harm() {
    for path in captures() {
        let bytes = std::fs::read(&path).unwrap();
        let bytes = &bytes[..bytes.len().min(20_000)];
        let mut random = 1u32;
        for _ in 0..100 {
            let mut damaged = bytes.to_vec();
            for _ in 0..8 {
                random ^= random << 13;
                random ^= random >> 17;
                random ^= random << 5;
                let at = random as usize % damaged.len();
                damaged[at] = (random >> 24) as u8;
            }
            let _ = report(damaged).map(|report| report.text());
        }
    }
}

#[test]
fn whoever_reads_the_report_may_go_away() {
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_replayer"))
        .args(["inspect", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(inspect.stdout.take());
    // An empty capture: the report comes after it, so after that.
    let mut header = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0];
    header.resize(24, 0);
    inspect.stdin.take().unwrap().write_all(&header).unwrap();
    let output = inspect.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
