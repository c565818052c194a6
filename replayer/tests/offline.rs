//! Dry runs of the offline role: what it would send, compared byte by byte with what the clients sent according to a reassembly that
//! shares no code with the replayer.

mod reassembly;

use reassembly::{OTHERS, Segment, Stream, WHOLE, capture, own, segments, streams};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const TARGET: &str = "198.51.100.7:80";
const TARGET_V6: &str = "[2001:db8::7]:80";

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("offline");
    std::fs::create_dir_all(&dir).unwrap();
    dir.join(name)
}

fn replayer(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_replayer")).arg("offline").args(arguments).output().unwrap()
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A dry run that must end well; its report.
fn dry_run(name: &str, arguments: &[&str]) -> (Value, String) {
    let report = scratch(&format!("{name}.json"));
    let output = replayer(&[&["--dry-run", "--report", report.to_str().unwrap()], arguments].concat());
    assert!(output.status.success(), "{name}: {}", message(&output));
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    for sums in report["accounting"].as_array().unwrap() {
        assert_eq!(sums["left"], sums["right"], "{name}: {sums}");
    }
    (report, message(&output))
}

fn counter(report: &Value, name: &str) -> u64 {
    report["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
}

fn run_and_reassemble(
    path: &Path,
    port: u16,
    further: &[&str],
) -> (BTreeMap<SocketAddr, Vec<Stream>>, BTreeMap<SocketAddr, Vec<Stream>>) {
    let captured = streams(&segments(path), port);
    let v6 = captured.keys().any(SocketAddr::is_ipv6);
    let name = format!("{}-{port}-{}", path.file_name().unwrap().to_str().unwrap(), further.len());
    let out = scratch(&format!("{name}.pcap"));
    let service = format!("{port}-{}", if v6 { TARGET_V6 } else { TARGET });
    let arguments =
        [&["-f", path.to_str().unwrap(), "-x", &service, "-w", out.to_str().unwrap()], further].concat();
    dry_run(&name, &arguments);
    (captured, streams(&segments(&out), 80))
}

#[test]
fn b061_every_stream_of_the_captures_is_sent_byte_for_byte() {
    for speed in ["1", "max"] {
        for (name, port) in WHOLE {
            let Some(path) = capture(name) else { continue };
            let (captured, sent) = run_and_reassemble(&path, *port, &["--speed", speed]);
            let mut compared = 0;
            for (client, streams) in &captured {
                let expected: Vec<Vec<u8>> = streams
                    .iter()
                    .map(|it| it.contiguous().expect("a SYN"))
                    .filter(|it| !it.is_empty())
                    .collect();
                let found: Vec<Vec<u8>> = sent
                    .get(client)
                    .map(|streams| {
                        streams.iter().filter_map(Stream::contiguous).filter(|it| !it.is_empty()).collect()
                    })
                    .unwrap_or_default();
                assert!(found == expected, "{name} at speed {speed}: {client}");
                compared += expected.len();
            }
            assert!(compared > 0, "{name}: nothing compared");
        }
    }
}

#[test]
fn b061_nothing_is_sent_that_was_not_captured() {
    for (name, port) in OTHERS {
        let Some(path) = capture(name) else { continue };
        let (captured, sent) = run_and_reassemble(&path, *port, &[]);
        for (client, streams) in &sent {
            for (seq, byte) in streams.iter().flat_map(|stream| &stream.bytes) {
                let same = captured[client].iter().any(|stream| stream.bytes.get(seq) == Some(byte));
                assert!(same, "{name}: byte {seq} of {client}");
            }
        }
    }
    // The SYN is missing, the SYN-ACK is not: all of the stream.
    if let Some(path) = capture("zeek/missing-syn.pcap") {
        let (captured, sent) = run_and_reassemble(&path, 80, &[]);
        let all = |streams: &BTreeMap<SocketAddr, Vec<Stream>>| -> usize {
            streams.values().flatten().map(|stream| stream.bytes.len()).sum()
        };
        assert_eq!(all(&sent), all(&captured));
    }
}

#[test]
fn b059_each_loop_sends_everything_once_more_from_other_ports() {
    for (name, port) in
        [("own/keep-alive.pcap", 8080), ("zeek/get.pcap", 80), ("zeek/get-without-fins.pcap", 80)]
    {
        let Some(path) = capture(name) else { continue };
        let (captured, sent) = run_and_reassemble(&path, port, &["--loop", "3", "--speed", "max"]);
        let expected = captured.values().next().unwrap()[0].contiguous().unwrap();
        let found: Vec<Vec<u8>> = sent.values().flatten().filter_map(Stream::contiguous).collect();
        assert_eq!(found, vec![expected; 3], "{name}");
        assert_eq!(sent.keys().collect::<BTreeSet<_>>().len(), 3, "{name}: {:?}", sent.keys());
    }
}

#[test]
fn b060_the_same_packets_in_other_files_are_the_same_run() {
    let path = own("keep-alive.pcap");
    let file = path.to_str().unwrap();
    let service = format!("8080-{TARGET}");
    let (expected, _) = dry_run("plain", &["-f", file, "-x", &service]);
    assert_eq!(counter(&expected, "turns_sent"), 5);

    // Compressed, on standard input.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&std::fs::read(&path).unwrap()).unwrap();
    let gzip = gzip.finish().unwrap();
    let report = scratch("stdin.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_replayer"))
        .args(["offline", "--dry-run", "-f", "-", "-x", &service, "--report", report.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&gzip).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", message(&output));
    let found: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(found["counters"], expected["counters"]);

    // Dealt out over two files by turns, and merged again.
    let bytes = std::fs::read(&path).unwrap();
    let mut halves = [bytes[..24].to_vec(), bytes[..24].to_vec()];
    let (mut at, mut packet) = (24, 0);
    while at < bytes.len() {
        let len = 16 + u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        halves[packet % 2].extend_from_slice(&bytes[at..at + len]);
        (at, packet) = (at + len, packet + 1);
    }
    let paths = [scratch("half-0.pcap"), scratch("half-1.pcap")];
    for (path, half) in paths.iter().zip(&halves) {
        std::fs::write(path, half).unwrap();
    }
    let both = format!("{},{}", paths[0].display(), paths[1].display());
    let (found, _) = dry_run("merged", &["-f", &both, "-x", &service]);
    assert_eq!(found["counters"], expected["counters"]);

    // Twice, one after the other.
    let twice = format!("{file},{file}");
    let (found, _) = dry_run("sequential", &["-f", &twice, "--sequential", "-x", &service]);
    assert_eq!(counter(&found, "turns_sent"), 10);
}

#[test]
fn b060_a_cut_file_is_replayed_as_far_as_it_goes_and_the_exit_code_tells() {
    let bytes = std::fs::read(own("keep-alive.pcap")).unwrap();
    let cut = scratch("cut.pcap");
    std::fs::write(&cut, &bytes[..bytes.len() - 10]).unwrap();
    let report = scratch("cut.json");
    let service = format!("8080-{TARGET}");
    let output = replayer(&[
        "--dry-run",
        "-f",
        cut.to_str().unwrap(),
        "-x",
        &service,
        "--report",
        report.to_str().unwrap(),
    ]);
    let text = message(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("packet 39") && text.contains("offset") && text.contains("bytes are missing"),
        "{text}"
    );
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(counter(&report, "turns_sent"), 5);
}

#[test]
fn b062_a_service_that_is_not_there_is_answered_with_those_that_are() {
    let path = own("redis-pipelined.pcap");
    let output = replayer(&["--dry-run", "-f", path.to_str().unwrap(), "-x", &format!("80-{TARGET}")]);
    let text = message(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("port 80") && text.contains("172.28.0.11:6379: 7 connections, 25 requests"),
        "{text}"
    );
}

#[test]
fn workers_of_the_online_role_are_refused_with_the_reason() {
    let run = |workers| {
        replayer(&["-f", "none.pcap", "-x", &format!("80-{TARGET}"), "--dry-run", "--workers", workers])
    };
    let refused = run("2");
    let text = message(&refused);
    assert!(
        refused.status.code() == Some(1) && text.contains("one worker") && text.contains("one pace"),
        "{text}"
    );
    // One is what there is: the file is looked for.
    assert!(message(&run("1")).contains("cannot open none.pcap"));
}

#[test]
fn b058_the_times_of_the_packets_are_those_of_the_file_scaled_and_capped() {
    let path = own("keep-alive.pcap");
    // From the first packet of the client to its last, and to its last request.
    let spans = |path: &Path| {
        let mut segments = segments(path);
        segments.retain(|segment| [80, 8080].contains(&segment.destination.port()));
        let since_first = |segment: &Segment| (segment.time_ns - segments[0].time_ns) as f64 / 1e9;
        let last_request = segments.iter().rfind(|segment| !segment.payload.is_empty()).unwrap();
        (since_first(segments.last().unwrap()), since_first(last_request))
    };
    let (_, captured) = spans(&path);
    let service = format!("8080-{TARGET}");
    let run = |arguments: &[&str]| {
        let out = scratch(&format!("times{}.pcap", arguments.join("")));
        let fixed = ["-f", path.to_str().unwrap(), "-x", &service, "-w", out.to_str().unwrap()];
        dry_run("times", &[&fixed, arguments].concat());
        spans(&out)
    };
    // Its pauses are 0.1, 0.05, 0.2 and 1.2 s.
    assert!((run(&[]).1 / captured - 1.0).abs() < 0.001);
    assert!((run(&["--speed", "10"]).1 / captured - 0.1).abs() < 0.0001);
    let capped = run(&["--max-gap", "100"]).1;
    assert!((0.35..0.37).contains(&capped), "{capped}");
    // The end follows the last response when the target, whose responses are of another size, has said nothing for 50 ms.
    let (to_end, to_last_request) = run(&["--speed", "max"]);
    assert!(to_last_request < 0.01 && to_end < 0.1, "{to_last_request} {to_end}");
}

/// A file of `connections` connections of `requests` requests, each answered, written by this test.
fn synthetic(path: &Path, connections: u32, requests: u32) -> u64 {
    let mut out = std::io::BufWriter::new(File::create(path).unwrap());
    out.write_all(&[0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0])
        .unwrap();
    let mut packets = 0u64;
    let mut frame = [0u8; 14 + 40 + 100];
    let mut packet = |client: u32, seq: u32, ack: u32, flags: u8, len: usize| {
        let (low, high) = (1024 + (client % 60_000) as u16, (client / 60_000) as u8);
        let last = 1 + (client % 4) as u8;
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        frame[14..34]
            .copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, high, last, 192, 0, 2, 1]);
        frame[16..18].copy_from_slice(&((40 + len) as u16).to_be_bytes());
        frame[34..36].copy_from_slice(&low.to_be_bytes());
        frame[36..38].copy_from_slice(&80u16.to_be_bytes());
        frame[38..42].copy_from_slice(&seq.to_be_bytes());
        frame[42..46].copy_from_slice(&ack.to_be_bytes());
        frame[46..54].copy_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        let time = packets / 100;
        let size = (54 + len) as u32;
        for word in [(time / 1_000_000) as u32, (time % 1_000_000) as u32, size, size] {
            out.write_all(&word.to_le_bytes()).unwrap();
        }
        out.write_all(&frame[..54 + len]).unwrap();
        packets += 1;
    };
    // A thousand connections at once.
    for first in (0..connections).step_by(1000) {
        let now = first..(first + 1000).min(connections);
        now.clone().for_each(|client| packet(client, 1000, 0, 2, 0));
        for request in 0..requests {
            now.clone()
                .for_each(|client| packet(client, 1001 + request * 100, 5001 + request * 50, 0x18, 100));
        }
        now.for_each(|client| packet(client, 1001 + requests * 100, 5001 + requests * 50, 0x11, 0));
    }
    packets
}

#[test]
fn b062_a_dry_run_of_many_connections_accounts_for_every_one() {
    let path = scratch("many.pcap");
    let packets = synthetic(&path, 3000, 10);
    let started = Instant::now();
    let (report, _) =
        dry_run("many", &["-f", path.to_str().unwrap(), "-x", &format!("80-{TARGET}"), "--speed", "max"]);
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!(report["file"]["packets"], packets);
    assert_eq!(counter(&report, "sessions_opened"), 3000);
    assert_eq!(counter(&report, "sessions_completed"), 3000);
    assert_eq!(counter(&report, "turns_sent"), 30_000);
    assert_eq!(counter(&report, "replay_bytes_delivered"), 3_000_000);
    // Copies and samples.
    let (report, _) = dry_run(
        "copies",
        &[
            "-f",
            path.to_str().unwrap(),
            "-x",
            &format!("80-{TARGET}"),
            "--speed",
            "max",
            "-n",
            "3",
            "-r",
            "20",
        ],
    );
    let opened = counter(&report, "sessions_opened");
    assert!((1500..2100).contains(&opened), "{opened} sessions: three copies of a fifth of 3000");
    assert_eq!(counter(&report, "sessions_completed"), opened);
    assert!(report["file"]["packets_sampled_out"].as_u64().unwrap() > 0);
}

#[test]
fn only_chosen_clients_are_replayed_and_the_others_are_counted() {
    let path = scratch("clients.pcap");
    let packets = synthetic(&path, 400, 5);
    let service = format!("80-{TARGET}");
    let base = ["-f", path.to_str().unwrap(), "-x", &service, "--speed", "max"];
    // Four clients have a quarter each: 10.0.0.1 to 10.0.0.4.
    for (choice, quarters) in [
        (&["--exclude-clients", "10.0.0.1"][..], 3),
        (&["-F", "10.0.0.0/30"], 3),
        (&["-F", "10.0.0.0/30", "--exclude-clients", "10.0.0.2,2001:db8::/32"], 2),
        (&["--clients", "10.0.0.4,10.0.0.0/31", "--exclude-clients", "0.0.0.0/0"], 2),
    ] {
        let (report, said) = dry_run("clients", &[&base[..], choice].concat());
        assert_eq!(counter(&report, "sessions_opened"), 100 * quarters, "{choice:?}");
        assert_eq!(counter(&report, "turns_sent"), 500 * quarters, "{choice:?}");
        let of_file = |name: &str| report["file"][name].as_u64().unwrap();
        assert_eq!(of_file("packets_given"), packets / 4 * quarters, "{choice:?}");
        assert_eq!(of_file("packets_client_not_chosen"), packets / 4 * (4 - quarters), "{choice:?}");
        assert_eq!(of_file("packets"), packets);
        assert!(said.contains("packets of clients that were not chosen"), "{said}");
    }
    for (choice, says) in [
        (&["-F", "192.0.2.0/24"][..], "leave out"),
        (&["-F", "10.0.0.1/8"], "write 10.0.0.0/8 for the network"),
        (&["-F", "tcp and src net 10.0.0.0/8"], "Expressions of pcap are not understood"),
        (&["-F", "10.0.0.0/8", "--exclude-clients", "10.0.0.0/8"], "name it in one of them"),
    ] {
        let output = replayer(&[&["--dry-run"], &base[..], choice].concat());
        assert!(
            !output.status.success() && message(&output).contains(says),
            "{choice:?}: {}",
            message(&output)
        );
    }
}
