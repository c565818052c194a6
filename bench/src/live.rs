//! The roles at work: nginx on the online host and on the target, real clients, all of it in the lab, everything on this machine's cores.
//!
//! CPU time is measured in a lab where the packets that the roles send are received by threads of the switch, so that a role's time is its own.
//! Delays: `delays.rs`. What capture alone costs the online server: `neighbour.rs`.

use crate::Options;
use crate::delays;
use crate::neighbour;
use crate::report::{Figure, Wanted};
use anyhow::{Context, Result, ensure};
use replayer_tests::clients::{Load, output_of};
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::NginxPair;
use replayer_tests::replay::Replay;
use replayer_tests::servers::NginxRequests;
use replayer_tests::wait::settled;
use std::time::{Duration, Instant};

/// What the subject measures.
pub const WHAT: &str = "the roles at work: real servers and clients, all hosts on this machine";

pub(crate) const HTTP: u16 = 8080;
/// Requests a second that a production server is meant to have.
pub(crate) const STEADY_RATE: u32 = 20_000;
/// Requests a second at which these machines have time left.
pub(crate) const EASY_RATE: u32 = 5_000;
const CONNECTIONS: u32 = 50;
/// Connections that saturate the server.
pub(crate) const SATURATING: u32 = 16;
/// How long after a load copies may still arrive, and how long nothing may come until all have.
const ARRIVAL: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_millis(700);

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    let seconds = if options.quick { 1 } else { 4 };
    let rounds = if options.quick { 1 } else { 3 };
    let mut figures = saturated(seconds, rounds)?;
    figures.extend(mixed(seconds, rounds)?);
    figures.extend(steady(seconds, rounds)?);
    figures.extend(delays::measure(seconds, rounds)?);
    figures.extend(neighbour::measure(seconds.div_ceil(4), 4 * rounds - 3)?);
    Ok(figures)
}

/// As many requests as the machine takes, all of them replayed.
fn saturated(seconds: u32, rounds: usize) -> Result<Vec<Figure>> {
    let lab = Lab::up(Plan::default())?;
    let _nginx = NginxPair::start(&lab, HTTP)?;
    let (mut online, mut target) = (NginxRequests::default(), NginxRequests::default());
    let (mut alone, mut replayed, mut missing) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        alone.push(wrk(&lab, SATURATING, seconds)?);
        let before = (online.read(lab.online())?, target.read(lab.target())?);
        let replay = Replay::start(&lab, &[HTTP], &[])?;
        replayed.push(wrk(&lab, SATURATING, seconds)?);
        settled(QUIET, ARRIVAL, || target.read(lab.target()).ok());
        let after = (online.read(lab.online())?, target.read(lab.target())?);
        missing += (after.0 - before.0).abs_diff(after.1 - before.1);
        replay.stop()?;
    }
    let alone =
        Figure::median(format!("wrk, {SATURATING} connections, without a replay"), alone, "requests/s");
    let replayed = Figure::median(format!("wrk, {SATURATING} connections, replayed"), replayed, "requests/s")
        .beside("without a replay", alone.value);
    let missing = Figure::new("of these requests, not at the target", missing as f64, "requests")
        .wanted(Wanted::AtMost(0.0));
    Ok(vec![replayed, missing, alone])
}

/// Saturated connections beside quiet ones: how many of the requests are replayed while the load lasts.
fn mixed(seconds: u32, rounds: usize) -> Result<Vec<Figure>> {
    let lab = Lab::up(Plan::default())?;
    let _nginx = NginxPair::start(&lab, HTTP)?;
    let (mut online, mut target) = (NginxRequests::default(), NginxRequests::default());
    let mut count = || anyhow::Ok((online.read(lab.online())?, target.read(lab.target())?));
    let (mut replayed, mut served) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let replay = Replay::start(&lab, &[HTTP], &[])?;
        let mut quiet =
            Load::start(&lab, lab.client(), "quiet", &arguments(&lab, 40, EASY_RATE, "ticks", seconds + 1))?;
        let (before, since) = (count()?, Instant::now());
        wrk(&lab, 8, seconds)?;
        let (after, elapsed) = (count()?, since.elapsed().as_secs_f64());
        replayed.push((after.1 - before.1) as f64 / elapsed);
        served.push((after.0 - before.0) as f64 / elapsed);
        answered(quiet.finish()?)?;
        settled(QUIET, ARRIVAL, || count().ok());
        replay.stop()?;
    }
    let what = format!("8 saturated connections beside 40 with {EASY_RATE} requests/s");
    let served = Figure::median(format!("{what}, answered online"), served, "requests/s");
    let replayed = Figure::median(format!("{what}, replayed meanwhile"), replayed, "requests/s")
        .beside("answered online", served.value);
    Ok(vec![replayed, served])
}

/// CPU time of the roles for a request, and while there is nothing to do.
fn steady(seconds: u32, rounds: usize) -> Result<Vec<Figure>> {
    let lab = Lab::up(Plan { receive_threads: true, ..Plan::default() })?;
    let _nginx = NginxPair::start(&lab, HTTP)?;
    let replay = Replay::start(&lab, &[HTTP], &[])?;
    let mut target = NginxRequests::default();
    let cpu = || anyhow::Ok((replay.online.process.cpu_seconds()?, replay.assistant.process.cpu_seconds()?));
    let (mut online, mut assistant, mut missing) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        let (before, arrived) = (cpu()?, target.read(lab.target())?);
        let requests = load(&lab, STEADY_RATE, "ticks", seconds)?;
        settled(QUIET, ARRIVAL, || target.read(lab.target()).ok());
        let after = cpu()?;
        missing += requests.abs_diff(target.read(lab.target())? - arrived);
        online.push((after.0 - before.0) * 1e6 / requests as f64);
        assistant.push((after.1 - before.1) * 1e6 / requests as f64);
    }
    let (before, since) = (cpu()?, Instant::now());
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let (after, idle) = (cpu()?, since.elapsed().as_secs_f64());
    replay.stop()?;
    let what = format!("{STEADY_RATE} requests/s on {CONNECTIONS} connections");
    Ok(vec![
        Figure::median(format!("{what}: CPU of the online role"), online, "us/request")
            .wanted(Wanted::AtMost(4.0)),
        Figure::median(format!("{what}: CPU of the assistant"), assistant, "us/request")
            .wanted(Wanted::AtMost(2.0)),
        Figure::new(format!("{what}: not at the target"), missing as f64, "requests")
            .wanted(Wanted::AtMost(0.0)),
        Figure::new("idle: CPU of the online role", 100.0 * (after.0 - before.0) / idle, "% of a core")
            .wanted(Wanted::AtMost(0.5)),
        Figure::new("idle: CPU of the assistant", 100.0 * (after.1 - before.1) / idle, "% of a core")
            .wanted(Wanted::AtMost(0.5)),
    ])
}

/// Runs loadgen at a rate, with its kind of arrivals; how many requests were answered, which must be all.
pub(crate) fn load(lab: &Lab, rate: u32, arrivals: &str, seconds: u32) -> Result<u64> {
    Ok(summary(lab, rate, arrivals, seconds)?.responses)
}

/// 99 % of the responses were complete after so many microseconds.
pub(crate) fn latency(lab: &Lab, rate: u32, seconds: u32) -> Result<f64> {
    Ok(summary(lab, rate, "ticks", seconds)?.latency_us.p99)
}

fn summary(lab: &Lab, rate: u32, arrivals: &str, seconds: u32) -> Result<Summary> {
    answered(Load::run(lab, "bench", &arguments(lab, CONNECTIONS, rate, arrivals, seconds))?)
}

/// Arguments of loadgen.
fn arguments(lab: &Lab, connections: u32, rate: u32, arrivals: &str, seconds: u32) -> String {
    format!(
        "--connect {}:{HTTP} --protocol http --expect-server online --connections {connections} --rate {rate} \
         --arrivals {arrivals} --seconds {seconds}",
        lab.online().v4()
    )
}

/// No client may have seen anything else than answers.
fn answered(summary: Summary) -> Result<Summary> {
    ensure!((summary.errors, summary.unanswered) == (0, 0), "a client saw errors: {summary:?}");
    Ok(summary)
}

/// As many requests as are answered on so many keep-alive connections; how many a second.
pub(crate) fn wrk(lab: &Lab, connections: u32, seconds: u32) -> Result<f64> {
    let url = format!("http://{}:{HTTP}/wrk", lab.online().v4());
    let (connections, seconds) = (format!("-c{connections}"), format!("-d{seconds}"));
    let text = output_of(lab.client().command("wrk").args(["-t1", &connections, &seconds, &url]))?;
    rated(&text).with_context(|| format!("unexpected output of wrk: {text}"))
}

/// Reads `Requests/sec:  12345.67`; none when wrk saw errors.
fn rated(text: &str) -> Option<f64> {
    if text.contains("Socket errors") || text.contains("Non-2xx") {
        return None;
    }
    text.lines().find_map(|line| line.strip_prefix("Requests/sec:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_wrk_is_read_unless_it_saw_errors() {
        let text = "  100 requests in 1.00s, 1.00MB read\nRequests/sec:  12345.67\nTransfer/sec: 1.0MB\n";
        assert_eq!(rated(text), Some(12345.67));
        assert_eq!(rated(&format!("  Socket errors: connect 0, read 1\n{text}")), None);
    }
}
