//! Capture files: how exactly a replay keeps their gaps, beside tcpreplay with the same file, and how fast and in how much memory they are
//! read.
//!
//! The gaps are those between the requests of a connection, as tcpdump at the target has them; each request counts when it first comes.

use crate::Options;
use crate::report::{Figure, Wanted};
use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use replayer::pcap::{Files, Order};
use replayer_common::addr::Ip;
use replayer_common::packet::parse_tcp;
use replayer_tests::capture::Capture;
use replayer_tests::capture_file::Made;
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::replay::Role;
use replayer_tests::servers::{Nginx, start, tool};
use serde_json::Value;
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What the subject measures.
pub const WHAT: &str = "capture files: gaps kept at 1x, and the speed of a dry run";

const PORT: u16 = 8080;
/// Addresses whose way back from the target leads to the assistant.
const CLIENTS: Ipv4Addr = Ipv4Addr::new(172, 29, 0, 1);

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    let mut figures = gaps(options)?;
    figures.extend(reading(options)?);
    Ok(figures)
}

/// A replay at the file's own pace in the lab, and tcpreplay.
fn gaps(options: Options) -> Result<Vec<Figure>> {
    let lab = Lab::up(Plan::default())?;
    let seconds = if options.quick { 5.0 } else { 60.0 };
    let made = Made {
        connections: if options.quick { 100 } else { 1000 },
        requests: if options.quick { 5 } else { 20 },
        seconds,
        server: SocketAddrV4::new(lab.online().v4(), PORT),
        client: CLIENTS,
    };
    let file = lab.dir().join("made.pcap");
    made.write(&file, 1)?;
    let wanted = request_times(&file)?;
    ensure!(wanted.len() == made.connections as usize, "{} connections in the file", wanted.len());
    let _nginx = Nginx::start(&lab, lab.target(), PORT)?;
    let filter = format!("tcp dst port {PORT}");
    let limit = Duration::from_secs_f64(seconds + 30.0);

    let assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let report = lab.dir().join("offline-report.json");
    let replay = |arguments: &[&str], requests: u64| -> Result<(Times, f64)> {
        let capture = Capture::start(&lab, lab.target(), &filter)?;
        let service = format!("{PORT}-{}:{PORT}", lab.target().v4());
        let mut command = lab.online().command(tool("replayer")?);
        command.arg("offline").arg("-f").arg(&file).args(["-x", &service]).args(arguments);
        command.args(["-s", &lab.assistant().v4().to_string(), "--report"]).arg(&report);
        let mut process = start(&lab, lab.online(), "offline", &mut command)?;
        let status = process.wait(limit)?;
        let ended = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        ensure!(status.success(), "the replay ended with {status}: {}", process.errors());
        let report: Value = serde_json::from_slice(&std::fs::read(&report)?)?;
        let sent = report["counters"]["turns_sent"].as_u64();
        ensure!(sent == Some(requests), "{sent:?} requests sent of {requests}");
        let times = request_times(&capture.stop()?)?;
        let last = times.values().flatten().copied().fold(0.0, f64::max);
        Ok((times, ended - last))
    };
    let (times, end) = replay(&[], made.requests())?;
    let replayed = gap_errors(&wanted, &times)?;
    let (times, _) = replay(&["--speed", "10"], made.requests())?;
    let tenth = 10.0 * span(&times) / span(&wanted);
    let (_, end_of_loops) = replay(&["--speed", "10", "--loop", "3"], 3 * made.requests())?;
    drop(assistant);

    let capture = Capture::start(&lab, lab.target(), &filter)?;
    let mut command = lab.online().command("tcpreplay");
    let mut process = start(&lab, lab.online(), "tcpreplay", command.args(["-i", NIC]).arg(&file))?;
    let status = process.wait(limit)?;
    ensure!(status.success(), "tcpreplay ended with {status}: {}", process.errors());
    let theirs = gap_errors(&wanted, &request_times(&capture.stop()?)?)?;
    lab.down()?;

    let what = format!("{} connections, {} requests in {seconds:.0} s", made.connections, made.requests());
    let of = |errors: &[f64], share: f64| errors[(errors.len() as f64 * share) as usize] * 1e3;
    let figure = |name: &str, share: f64, limit: f64| {
        Figure::new(format!("error of a gap, {name}: {what}"), of(&replayed, share), "ms")
            .beside("tcpreplay", of(&theirs, share))
            .wanted(Wanted::AtMost(limit))
    };
    Ok(vec![
        figure("median", 0.5, 1.0),
        figure("p99", 0.99, 5.0),
        Figure::new("--speed 10: ten times its time, off that of the file", 100.0 * (tenth - 1.0).abs(), "%")
            .wanted(Wanted::AtMost(2.0)),
        Figure::new("from the last request to the end of the run", end.max(end_of_loops), "s")
            .wanted(Wanted::AtMost(1.0)),
    ])
}

/// A client of the file and the number of its first request's sequence, to the time at which each request first came, seconds.
type Times = HashMap<(Ip, u16), Vec<f64>>;

fn request_times(path: &Path) -> Result<Times> {
    let mut files = Files::open(&[path.to_owned()], Order::Merged)?;
    let mut firsts: HashMap<(Ip, u16), Vec<(u32, f64)>> = HashMap::new();
    while files.advance() {
        let Some(packet) = files.packet() else { break };
        let Ok(segment) = parse_tcp(&packet.data) else { continue };
        if segment.payload_len == 0 || segment.dst_port != PORT {
            continue;
        }
        let requests = firsts.entry((segment.src, segment.src_port)).or_default();
        if !requests.iter().any(|&(seq, _)| seq == segment.seq) {
            requests.push((segment.seq, packet.time_ns as f64 / 1e9));
        }
    }
    let times = |mut requests: Vec<(u32, f64)>| {
        requests.sort_unstable_by_key(|&(seq, _)| seq);
        requests.into_iter().map(|(_, time)| time).collect()
    };
    Ok(firsts.into_iter().map(|(client, requests)| (client, times(requests))).collect())
}

/// From the first request to the last, seconds.
fn span(times: &Times) -> f64 {
    let all = || times.values().flatten().copied();
    all().fold(f64::MIN, f64::max) - all().fold(f64::MAX, f64::min)
}

/// By how much each gap differs, seconds, sorted. No request may be missing.
fn gap_errors(wanted: &Times, found: &Times) -> Result<Vec<f64>> {
    let mut errors = Vec::new();
    for (client, times) in wanted {
        let found = found.get(client).map(Vec::as_slice).unwrap_or_default();
        ensure!(found.len() == times.len(), "{} of {} requests of a client came", found.len(), times.len());
        let gaps = |times: &[f64]| -> Vec<f64> { times.windows(2).map(|pair| pair[1] - pair[0]).collect() };
        errors.extend(gaps(times).iter().zip(gaps(found)).map(|(a, b)| (a - b).abs()));
    }
    errors.sort_by(f64::total_cmp);
    Ok(errors)
}

/// Dry runs of a small file and of one of more than 2 GB, which stays in the page cache.
fn reading(options: Options) -> Result<Vec<Figure>> {
    let made = Made {
        connections: 20_000,
        requests: 10,
        seconds: 10.0,
        server: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 80),
        client: Ipv4Addr::new(10, 0, 0, 1),
    };
    let file = std::env::temp_dir().join(format!("replayer-bench-made-{}.pcap", std::process::id()));
    let measured = (|| {
        // A round is 29 MB.
        let (rounds, more, times) = if options.quick { (1, 10, 1) } else { (3, 25, 3) };
        let small = dry_runs(&made, &file, rounds, 1)?;
        let large = dry_runs(&made, &file, more * rounds, times)?;
        anyhow::Ok((small, large))
    })();
    let _ = std::fs::remove_file(&file);
    let (small, large) = measured?;
    let packets = format!("{:.1} million packets, {:.0} MB", large.packets / 1e6, large.megabytes);
    Ok(vec![
        Figure::median(format!("dry run, {packets}"), large.per_second, "packets/s"),
        Figure::median("the same for each second of CPU time", large.per_cpu_second, "packets/s")
            .wanted(Wanted::AtLeast(1e6)),
        Figure::new("memory, the most", large.memory_mb, "MB")
            .beside(format!("with {:.0} MB", small.megabytes), small.memory_mb)
            .wanted(Wanted::AtMost(small.memory_mb * 1.1)),
    ])
}

struct DryRuns {
    packets: f64,
    megabytes: f64,
    per_second: Vec<f64>,
    per_cpu_second: Vec<f64>,
    memory_mb: f64,
}

fn dry_runs(made: &Made, file: &Path, rounds: u32, times: u32) -> Result<DryRuns> {
    let packets = made.write(file, rounds)? as f64;
    let megabytes = std::fs::metadata(file)?.len() as f64 / 1e6;
    let report = file.with_extension("json");
    let mut runs =
        DryRuns { packets, megabytes, per_second: Vec::new(), per_cpu_second: Vec::new(), memory_mb: 0.0 };
    for _ in 0..times {
        let mut command = Command::new(tool("replayer")?);
        command.args(["offline", "--dry-run", "--speed", "max", "-x", "80-198.51.100.1:80", "-f"]).arg(file);
        let output = command.arg("--report").arg(&report).output().context("starting replayer")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "the dry run ended with {}: {said}", output.status);
        let text = std::fs::read(&report)?;
        let _ = std::fs::remove_file(&report);
        let report: Value = serde_json::from_slice(&text)?;
        let sent = report["counters"]["turns_sent"].as_u64().unwrap_or(0);
        ensure!(sent == made.requests() * u64::from(rounds), "{sent} requests sent: {said}");
        let seconds = |name: &str| report[name].as_f64().context("the report has no times");
        runs.per_second.push(packets / seconds("seconds")?);
        runs.per_cpu_second.push(packets / seconds("cpu_seconds")?);
        // Of all processes that were waited for, the largest: the others here are smaller.
        runs.memory_mb = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss() as f64 / 1e3;
    }
    Ok(runs)
}
