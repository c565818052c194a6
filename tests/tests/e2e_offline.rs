//! Behaviours 58 to 62 with real servers: what tcpdump captured at the online host is replayed from its file.
//!
//! Root only; each test has a lab of its own. Dry runs are tested in `replayer/tests/offline.rs`.

#[path = "../../replayer/tests/reassembly/mod.rs"]
mod reassembly;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use pcap_parser::{PcapBlockOwned, PcapError, create_reader};
use reassembly::{OTHERS, WHOLE, capture, segments, streams};
use replayer_tests::capture::Capture;
use replayer_tests::capture_file::Made;
use replayer_tests::clients::Load;
use replayer_tests::lab::{Host, Lab, POOL_V4, POOL_V6, Plan};
use replayer_tests::ledger::{self, Ledger};
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::replay::{Report, Role, service};
use replayer_tests::servers::{start, tool};
use replayer_tests::stream::Connection;
use replayer_tests::wait::settled;

const HTTP: u16 = 8080;
/// How long a replay of these tests may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A replay of a file that must end by itself, and well.
struct Offline {
    report: Report,
    seconds: f64,
    /// Seconds since the epoch.
    ended: f64,
}

fn offline(lab: &Lab, file: &Path, services: &str, arguments: &[&str]) -> Result<Offline> {
    let report = lab.dir().join("offline-report.json");
    let _ = std::fs::remove_file(&report);
    let assistant = lab.assistant().v4().to_string();
    let mut command = lab.online().command(tool("replayer")?);
    command.arg("offline").arg("-f").arg(file).args(["-x", services, "-s", &assistant]).args(arguments);
    let begun = Instant::now();
    let mut process = start(lab, lab.online(), "offline", command.arg("--report").arg(&report))?;
    let status = process.wait(LIMIT)?;
    let ended = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    ensure!(status.success(), "offline {arguments:?} ended with {status}:\n{}", process.errors());
    let report: Report = serde_json::from_str(&std::fs::read_to_string(&report)?)?;
    report.check_accounts()?;
    Ok(Offline { report, seconds: begun.elapsed().as_secs_f64(), ended })
}

fn to_target(lab: &Lab) -> String {
    format!("{HTTP}-{}:{HTTP}", lab.target().v4())
}

/// When each request of each client was captured, seconds; a packet that came again counts once.
fn request_times(path: &Path) -> Result<BTreeMap<SocketAddr, Vec<f64>>> {
    let mut reader = create_reader(1 << 20, File::open(path)?)?;
    let mut times: BTreeMap<SocketAddr, Vec<f64>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    loop {
        match reader.next() {
            Ok((used, block)) => {
                if let PcapBlockOwned::Legacy(record) = block
                    && let Some((client, seq)) = request(record.data)
                    && seen.insert((client, seq))
                {
                    let time = f64::from(record.ts_sec) + f64::from(record.ts_usec) / 1e6;
                    times.entry(client).or_default().push(time);
                }
                reader.consume(used);
            }
            Err(PcapError::Eof) => return Ok(times),
            Err(PcapError::Incomplete(_)) => reader.refill().map_err(|error| anyhow::anyhow!("{error:?}"))?,
            Err(error) => anyhow::bail!("{}: {error:?}", path.display()),
        }
    }
}

/// The client of a packet with data to the service, and its sequence number.
fn request(frame: &[u8]) -> Option<(SocketAddr, u32)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return None };
    let NetSlice::Ipv4(ip) = packet.net? else { return None };
    let client = SocketAddr::new(ip.header().source_addr().into(), tcp.source_port());
    (tcp.destination_port() == HTTP && !tcp.payload().is_empty()).then_some((client, tcp.sequence_number()))
}

/// From the first request to the last.
fn span(times: &BTreeMap<SocketAddr, Vec<f64>>) -> f64 {
    let all = || times.values().flatten().copied();
    all().fold(f64::MIN, f64::max) - all().fold(f64::MAX, f64::min)
}

/// How fast the target's clock went while the online host's went by a second, over all requests: by least squares, so that a machine that
/// was busy when the first or the last request went does not decide it.
fn slope(online: &BTreeMap<SocketAddr, Vec<f64>>, target: &BTreeMap<SocketAddr, Vec<f64>>) -> f64 {
    let pairs: Vec<(f64, f64)> = online
        .iter()
        .filter_map(|(client, times)| Some(times.iter().copied().zip(target.get(client)?.iter().copied())))
        .flatten()
        .collect();
    let count = pairs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|pair| pair.0), mean(|pair| pair.1));
    let covariance: f64 = pairs.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let variance: f64 = pairs.iter().map(|(x, _)| (x - x_mean) * (x - x_mean)).sum();
    covariance / variance
}

/// By how much the gaps between the requests of a connection differ, sorted.
fn gap_errors(online: &BTreeMap<SocketAddr, Vec<f64>>, target: &BTreeMap<SocketAddr, Vec<f64>>) -> Vec<f64> {
    let gaps = |times: &[f64]| -> Vec<f64> { times.windows(2).map(|pair| pair[1] - pair[0]).collect() };
    let mut errors = Vec::new();
    for (client, times) in online {
        let Some(replayed) = target.get(client) else { continue };
        errors.extend(gaps(times).iter().zip(gaps(replayed)).map(|(a, b)| (a - b).abs()));
    }
    errors.sort_by(f64::total_cmp);
    errors
}

/// Requests of keep-alive connections at a steady rate, captured at the online host.
fn captured_load(lab: &Lab, filter: &str, load: &str) -> Result<PathBuf> {
    let capture = Capture::start(lab, lab.online(), filter)?;
    let summary = Load::run(
        lab,
        "load",
        &format!("--connect {}:{HTTP} --protocol http --expect-server online {load}", lab.online().v4()),
    )?;
    ensure!(summary.errors == 0, "{summary:?}");
    capture.stop()
}

#[test]
fn b058_gaps_are_kept_and_scaled() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let both = format!("tcp port {HTTP}");
    let file = captured_load(&lab, &both, "--connections 50 --rate 400 --requests 2000")?;
    let online_ledger = nginx.online.settled_ledger(2000, ARRIVAL)?;
    let online = request_times(&file)?;
    assert_eq!(online.values().map(Vec::len).sum::<usize>(), 2000);
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;

    let mut requests = 0;
    for (arguments, scale) in [(&[][..], 1.0), (&["--speed", "10"][..], 0.1)] {
        let capture = Capture::start(&lab, lab.target(), &both)?;
        let run = offline(&lab, &file, &to_target(&lab), arguments)?;
        let target = request_times(&capture.stop()?)?;
        requests += 2000;
        assert_eq!(run.report.counter("turns_sent"), 2000);
        let ledger = nginx.target.settled_ledger(requests, ARRIVAL)?;
        let this = Ledger { entries: ledger.entries[requests - 2000..].to_vec() };
        let difference = ledger::compare(&online_ledger, &this);
        assert_eq!((difference.missing, difference.extra), (0, 0), "{difference:?}");
        let share = slope(&online, &target) / scale;
        assert!((share - 1.0).abs() < 0.02, "{arguments:?}: {share:.3} of the time it should take");
        if scale == 1.0 {
            let errors = gap_errors(&online, &target);
            assert_eq!(errors.len(), 1950);
            let (median, p99) = (errors[errors.len() / 2], errors[errors.len() * 99 / 100]);
            eprintln!("error of the gaps: median {:.3} ms, p99 {:.3} ms", median * 1e3, p99 * 1e3);
            assert!(median < 0.001, "median error of a gap: {:.3} ms", median * 1e3);
        }
    }

    // As fast as the target answers, and at given rates.
    let run = offline(&lab, &file, &to_target(&lab), &["--speed", "max"])?;
    assert_eq!(run.report.counter("turns_sent"), 2000);
    assert!(run.seconds < span(&online) / 2.0, "{} s", run.seconds);
    let capture = Capture::start(&lab, lab.target(), &both)?;
    // SYN, ACK, 40 requests, FIN and the ACKs of the responses.
    let packets = run.report.counter("packets_captured") as f64;
    offline(&lab, &file, &to_target(&lab), &["--pps", &format!("{}", packets / 2.0)])?;
    let taken = span(&request_times(&capture.stop()?)?);
    assert!((1.5..2.1).contains(&taken), "{taken} s at half of all packets a second");
    Ok(())
}

/// The target takes longer than the online server did, so that its answers are what the speed is to be measured by.
#[test]
fn b058_at_the_highest_speed_each_request_follows_the_answer_to_the_one_before() -> Result<()> {
    const STREAM: u16 = 9000;
    const CONNECTIONS: usize = 20;
    const EACH: usize = 40;
    const ANSWER_US: u64 = 20_000;
    let lab = Lab::up(Plan::default())?;
    let delay_ms = (ANSWER_US / 1000).to_string();
    let mut streams = StreamPair::start_with(&lab, STREAM, &[], &["--delay-ms", &delay_ms])?;
    let capture = Capture::start(&lab, lab.online(), &format!("tcp port {STREAM}"))?;
    // Each connection asks twelve times a second: in the file, a request is 83 ms after the one before.
    let load = format!(
        "--connect {}:{STREAM} --connections {CONNECTIONS} --per-connection {EACH} --requests {} --rate 240 --body 1-3000 \
         --response 1-30000",
        lab.online().v4(),
        CONNECTIONS * EACH
    );
    let summary = Load::run(&lab, "load", &load)?;
    ensure!(summary.errors == 0, "{summary:?}");
    let file = capture.stop()?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    offline(&lab, &file, &service(STREAM, lab.target().v4(), STREAM), &["--speed", "max"])?;
    let (_, target) = streams.ensure_equal(CONNECTIONS * EACH)?;
    let of_each = |it: &Connection| it.times_us.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>();
    let mut gaps: Vec<u64> = target.connections.iter().flat_map(of_each).collect();
    gaps.sort_unstable();
    let median = gaps[gaps.len() / 2];
    assert_eq!(target.connections.iter().map(|it| it.early).sum::<u64>(), 0, "requests before the answer");
    // A server's own timer is up to a millisecond late.
    assert!((ANSWER_US..ANSWER_US + 3_000).contains(&median), "{median} us from request to request");
    // All connections at once: the whole takes no longer than one of them.
    let all = || target.connections.iter().flat_map(|it| &it.times_us);
    let span_us = all().max().zip(all().min()).map(|(last, first)| last - first).context("no request")?;
    let one_us = median * (EACH as u64 - 1);
    assert!(span_us < one_us * 3 / 2, "{span_us} us in all, {one_us} us for one connection");
    Ok(())
}

#[test]
fn b059_three_loops_are_three_times_everything() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    // Only the clients' side, and no connection ends in the file.
    let filter = format!("tcp dst port {HTTP} and tcp[tcpflags] & (tcp-fin|tcp-rst) == 0");
    let file =
        captured_load(&lab, &filter, "--connections 20 --rate 1000 --requests 1000 --per-connection 25")?;
    let online = nginx.online.settled_ledger(1000, ARRIVAL)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let run = offline(&lab, &file, &to_target(&lab), &["--loop", "3"])?;
    let target = nginx.target.settled_ledger(3000, ARRIVAL)?;
    let thrice = Ledger { entries: [&online.entries[..], &online.entries, &online.entries].concat() };
    let difference = ledger::compare_addresses(&thrice, &target);
    assert_eq!((difference.missing, difference.extra), (0, 0), "{difference:?}\n{:?}", run.report.counters);
    assert_eq!(target.connections().len(), 3 * online.connections().len(), "identities of their own");
    let last = target.entries.iter().map(|entry| entry.time).fold(0.0, f64::max);
    assert!(run.ended - last < 1.0, "it ended {:.2} s after the last response", run.ended - last);
    Ok(())
}

#[test]
fn b059_each_loop_of_a_made_file_asks_everything_once() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let file = lab.dir().join("made.pcap");
    let server = SocketAddrV4::new(lab.online().v4(), HTTP);
    let client = Ipv4Addr::new(172, 29, 0, 1);
    Made { connections: 200, requests: 5, seconds: 5.0, server, client }.write(&file, 1)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let run = offline(&lab, &file, &to_target(&lab), &["--speed", "10", "--loop", "3"])?;
    assert_eq!(run.report.counter("sessions_opened"), 600);
    let target = nginx.target.settled_ledger(3000, ARRIVAL)?;
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in &target.entries {
        *times.entry(entry.uri.as_str()).or_default() += 1;
    }
    assert_eq!(times.len(), 1000);
    assert!(times.values().all(|&count| count == 3), "{times:?}");
    let last = target.entries.iter().map(|entry| entry.time).fold(0.0, f64::max);
    assert!(run.ended - last < 1.0, "it ended {:.2} s after the last response", run.ended - last);
    Ok(())
}

#[test]
fn b061_real_captures_arrive_as_they_were_captured() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let recorder = Recorder::start(lab.target(), HTTP)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    for (whole, (name, port)) in
        WHOLE.iter().map(|file| (true, file)).chain(OTHERS.iter().map(|file| (false, file)))
    {
        let Some(file) = capture(name) else { continue };
        let captured = streams(&segments(&file), *port);
        let v6 = captured.keys().any(SocketAddr::is_ipv6);
        let (target, pool): (IpAddr, _) =
            if v6 { (lab.target().v6().into(), POOL_V6) } else { (lab.target().v4().into(), POOL_V4) };
        let service = service(*port, target, HTTP);
        let run = offline(&lab, &file, &service, &["--speed", "max", "-c", pool])?;
        let mut received = recorder.take();
        received.retain(|bytes| !bytes.is_empty());
        let bytes = received.iter().map(Vec::len).sum::<usize>() as u64;
        for counter in ["bytes_accepted", "replay_bytes_delivered"] {
            assert_eq!(bytes, run.report.counter(counter), "{name}: {counter} {:?}", run.report.counters);
        }
        let all = captured.values().flatten();
        if whole {
            let mut expected: Vec<Vec<u8>> =
                all.map(|stream| stream.contiguous().context("a SYN")).collect::<Result<_>>()?;
            expected.retain(|bytes| !bytes.is_empty());
            expected.sort();
            received.sort();
            assert!(
                !expected.is_empty() && received == expected,
                "{name}: {} streams of {}",
                received.len(),
                expected.len()
            );
        } else {
            let bytes: Vec<Vec<u8>> = all.map(|stream| stream.bytes.values().copied().collect()).collect();
            for stream in &received {
                let is_part = |all: &Vec<u8>| all.windows(stream.len()).any(|part| part == stream);
                assert!(bytes.iter().any(is_part), "{name}: {} bytes that nobody sent", stream.len());
            }
        }
    }
    Ok(())
}

#[test]
fn b060_a_damaged_file_is_replayed_as_far_as_it_goes() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let filter = format!("tcp port {HTTP}");
    let file = captured_load(&lab, &filter, "--connections 1 --requests 50 --per-connection 1")?;
    let bytes = std::fs::read(&file)?;
    let cut = lab.dir().join("cut.pcap");
    std::fs::write(&cut, &bytes[..bytes.len() - 7])?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let assistant = lab.assistant().v4().to_string();
    let mut command = lab.online().command(tool("replayer")?);
    command.arg("offline").arg("-f").arg(&cut).args(["-x", &to_target(&lab), "-s", &assistant]);
    let mut process = start(&lab, lab.online(), "offline", &mut command)?;
    let status = process.wait(LIMIT)?;
    let text = process.errors();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("bytes are missing") && text.contains("offset"), "{text}");
    nginx.ensure_equal(50)?;

    // A service that is not in the file: which are.
    let mut command = lab.online().command(tool("replayer")?);
    let wrong = format!("9999-{}:{HTTP}", lab.target().v4());
    command.arg("offline").arg("-f").arg(&file).args(["-x", &wrong, "-s", &assistant]);
    let mut process = start(&lab, lab.online(), "offline-wrong", &mut command)?;
    assert_eq!(process.wait(LIMIT)?.code(), Some(1));
    let text = process.errors();
    assert!(text.contains(&format!("{}:{HTTP}: 50 connections, 50 requests", lab.online().v4())), "{text}");
    Ok(())
}

#[test]
fn what_was_recorded_is_replayed() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let nginx = NginxPair::start(&lab, HTTP)?;
    let report = lab.dir().join("record-report.json");
    let prefix = lab.dir().join("recorded");
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["record", "-i", "eth0", "-x", "8080", "--file-size", "0.05", "-w"]).arg(&prefix);
    let mut record = start(&lab, lab.online(), "record", command.arg("--report").arg(&report))?;
    record.wait_for_message("record ready", Duration::from_secs(15))?;
    let load = "--connections 20 --rate 1000 --requests 1000 --per-connection 25 --body 0-500";
    let summary = Load::run(
        &lab,
        "load",
        &format!("--connect {}:{HTTP} --protocol http --expect-server online {load}", lab.online().v4()),
    )?;
    ensure!(summary.errors == 0, "{summary:?}");
    record.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = record.wait(Duration::from_secs(10))?;
    ensure!(status.success(), "record ended with {status}:\n{}", record.errors());

    let mut files: Vec<PathBuf> = std::fs::read_dir(lab.dir())?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pcapng"))
        .collect();
    files.sort();
    assert!(files.len() > 3, "{files:?}");
    let all = files.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>().join(",");
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let run = offline(&lab, Path::new(&all), &to_target(&lab), &["--speed", "max"])?;
    assert_eq!(run.report.counter("turns_sent"), 1000);
    nginx.ensure_equal(1000)?;
    Ok(())
}

/// What a connection received so far.
type Received = Arc<Mutex<Vec<u8>>>;

/// A server that takes whatever comes, answers a little, and remembers the bytes of each connection.
struct Recorder {
    received: Arc<Mutex<Vec<Received>>>,
}

impl Recorder {
    fn start(host: &Host, port: u16) -> Result<Self> {
        let listener = host.namespace().enter(|| TcpListener::bind(("::", port)))?.context("listening")?;
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let all = received.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let bytes = Received::default();
                all.lock().unwrap().push(bytes.clone());
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        bytes.lock().unwrap().extend_from_slice(&buffer[..count]);
                        if stream.write_all(b"ok").is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self { received })
    }

    /// What the connections since the last call received, once nothing more comes.
    fn take(&self) -> Vec<Vec<u8>> {
        let bytes = || -> Vec<Vec<u8>> {
            self.received.lock().unwrap().iter().map(|bytes| bytes.lock().unwrap().clone()).collect()
        };
        settled(Duration::from_millis(100), ARRIVAL, || bytes().iter().map(Vec::len).sum::<usize>());
        let found = bytes();
        self.received.lock().unwrap().clear();
        found
    }
}
