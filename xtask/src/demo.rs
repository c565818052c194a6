//! `cargo xtask demo`: live replay in a lab of its own, from real clients to two real servers, and what came of it.
//!
//! nginx on both hosts is compared request by request through its access log, stream-server on both byte by byte. The lab
//! goes when the demo goes, also by Ctrl-C.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use replayer_tests::clients::Load;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::ledger::{self, Difference};
use replayer_tests::load::Percentiles;
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Stats};
use replayer_tests::servers::{Nginx, NginxRequests, StreamServer, start};
use replayer_tests::stream::{self, Comparison};
use replayer_tests::wait::settled;
use serde::Serialize;

use crate::demo_offline;
use crate::lab::{HTTP_PORT, STREAM_PORT, prepare};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// live: replayed while it happens; offline: captured to a file first, then replayed from it.
    #[arg(value_enum, default_value = "live")]
    what: What,
    /// How long requests are made.
    #[arg(long, default_value_t = 12)]
    seconds: u32,
    /// Print the outcome as JSON; the live lines go to the error output.
    #[arg(long)]
    json: bool,
}

/// What is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Live,
    Offline,
}

/// How long after the load requests may still arrive at the target.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(10);
/// No new request for so long: the target has what it will get.
const QUIET: Duration = Duration::from_secs(1);
/// Requests per second of the connections whose latency is shown.
const STEADY_RATE: u32 = 1000;
/// Requests per second of the connections whose streams are compared.
const STREAM_RATE: u32 = 200;

/// Requests of ab for each second that it is meant to take.
const AB_REQUESTS_PER_SECOND: u32 = 3000;

/// What the demo shows at its end.
#[derive(Debug, Serialize)]
struct Outcome {
    requests: Difference,
    streams: Comparison,
    /// As clients of the online server saw it.
    online_latency_us: Percentiles,
    /// As the online role saw it.
    target_latency_us: Percentiles,
    online_cpu_us_per_request: f64,
    assistant_cpu_us_per_request: f64,
    not_replayed: BTreeMap<String, u64>,
    client_errors: u64,
}

impl Outcome {
    fn is_complete(&self) -> bool {
        self.requests.missing == 0
            && self.requests.extra == 0
            && self.requests.online > 0
            && self.streams.compared > 0
            && self.streams.equal == self.streams.compared
            && self.client_errors == 0
    }
}

pub(crate) fn main(arguments: &Arguments, prepared: bool) -> Result<()> {
    prepare(prepared)?;
    let lab = Lab::up(Plan::default())?;
    if arguments.what == What::Offline {
        let outcome = demo_offline::show(&lab, arguments.seconds)?;
        lab.down()?;
        return outcome.conclude(arguments.json);
    }
    let outcome = show(&lab, arguments)?;
    lab.down()?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    } else {
        print!("{}", table(&outcome));
    }
    if !outcome.is_complete() {
        let lines = outcome.requests.examples.iter().chain(&outcome.streams.differences).take(10);
        let examples: String = lines.map(|line| format!("\n  {line}")).collect();
        bail!("the target did not get what the online server got{examples}");
    }
    Ok(())
}

fn show(lab: &Lab, arguments: &Arguments) -> Result<Outcome> {
    let (online, target) = (lab.online(), lab.target());
    let (online_nginx, target_nginx) =
        (Nginx::start(lab, online, HTTP_PORT)?, Nginx::start(lab, target, HTTP_PORT)?);
    let mut online_streams = StreamServer::start(lab, online, STREAM_PORT, &[])?;
    let mut target_streams = StreamServer::start(lab, target, STREAM_PORT, &[])?;
    let replay = Replay::start(lab, &[HTTP_PORT, STREAM_PORT], &[])?;
    say(
        arguments,
        &format!(
            "client {} → online server {} (nginx :{HTTP_PORT}, stream-server :{STREAM_PORT}) → replayer → target {}; \
             assistant {}",
            lab.client().v4(),
            online.v4(),
            target.v4(),
            lab.assistant().v4()
        ),
    );

    let cpu_before = (replay.online.process.cpu_seconds()?, replay.assistant.process.cpu_seconds()?);
    let mut live = Live::new(lab, arguments);
    let mut steady = steady_load(lab, arguments.seconds)?;
    let mut streams = stream_load(lab, arguments.seconds)?;
    let half = (arguments.seconds / 2).max(1);
    let clients = [
        ("keep-alive connections: wrk, 8 connections", wrk(lab, half)),
        ("a connection for each request: ab, 10 at once", ab(lab, half)),
    ];
    for (what, command) in clients {
        say(arguments, what);
        live.show_until_end(&mut start_client(lab, what, command)?, &replay)?;
    }
    live.show_until_end(&mut steady.process, &replay)?;
    live.show_until_end(&mut streams.process, &replay)?;

    say(arguments, "the load has ended; waiting for what is still under way");
    let mut at_target = NginxRequests::default();
    settled(QUIET, CATCH_UP_LIMIT, || {
        (at_target.read(target).ok(), target_streams.record().ok().map(|it| it.bytes()))
    });

    let cpu_after = (replay.online.process.cpu_seconds()?, replay.assistant.process.cpu_seconds()?);
    let not_replayed = replay.online.stats().unwrap_or_default().not_replayed;
    let (report, _) = replay.stop()?;
    let (online_ledger, target_ledger) = (online_nginx.ledger()?, target_nginx.ledger()?);
    let (online_record, target_record) = (online_streams.stop()?, target_streams.stop()?);
    let (steady, streams) = (steady.finish()?, streams.finish()?);
    let requests = (online_ledger.len() + online_record.requests()).max(1) as f64;
    Ok(Outcome {
        requests: ledger::compare_addresses(&online_ledger, &target_ledger),
        streams: stream::compare(&online_record, &target_record),
        online_latency_us: steady.latency_us,
        target_latency_us: report.target_response_us,
        online_cpu_us_per_request: (cpu_after.0 - cpu_before.0) * 1e6 / requests,
        assistant_cpu_us_per_request: (cpu_after.1 - cpu_before.1) * 1e6 / requests,
        not_replayed,
        client_errors: steady.errors + streams.errors,
    })
}

/// Keep-alive requests at a steady rate, each with an id of its own.
fn steady_load(lab: &Lab, seconds: u32) -> Result<Load> {
    let arguments = format!(
        "--connect {}:{HTTP_PORT} --protocol http --expect-server online --connections 20 --rate {STEADY_RATE} \
         --seconds {seconds}",
        lab.online().v4()
    );
    Load::start(lab, lab.client(), "steady", &arguments)
}

/// Requests with bodies and responses of all sizes to stream-server.
fn stream_load(lab: &Lab, seconds: u32) -> Result<Load> {
    let arguments = format!(
        "--connect {}:{STREAM_PORT} --connections 20 --per-connection 20 --body 10-20000 --response 1-20000 \
         --rate {STREAM_RATE} --seconds {seconds}",
        lab.online().v4()
    );
    Load::start(lab, lab.client(), "streams", &arguments)
}

fn wrk(lab: &Lab, seconds: u32) -> Vec<String> {
    let url = format!("http://{}:{HTTP_PORT}/wrk", lab.online().v4());
    ["wrk", "-t1", "-c8", &format!("-d{seconds}"), &url].map(str::to_owned).to_vec()
}

/// By number, not by time: when its time is over, ab resets connections whose request is under way, and whether a server
/// still reads that request is chance.
fn ab(lab: &Lab, seconds: u32) -> Vec<String> {
    let url = format!("http://{}:{HTTP_PORT}/ab", lab.online().v4());
    let requests = (seconds * AB_REQUESTS_PER_SECOND).to_string();
    ["ab", "-q", "-c", "10", "-n", &requests, &url].map(str::to_owned).to_vec()
}

fn start_client(lab: &Lab, what: &str, command: Vec<String>) -> Result<Process> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    start(lab, lab.client(), program, lab.client().command(program).args(arguments)).context(what.to_owned())
}

fn say(arguments: &Arguments, line: &str) {
    if arguments.json {
        eprintln!("{line}");
    } else {
        println!("{line}");
    }
    // Seen at once, also through a pipe; where nobody listens, there is nothing to do.
    let _ = std::io::stdout().flush();
}

/// The live lines.
struct Live<'a> {
    lab: &'a Lab,
    arguments: &'a Arguments,
    started: Instant,
    next: Instant,
    last: Instant,
    online: (NginxRequests, u64),
    target: (NginxRequests, u64),
}

impl<'a> Live<'a> {
    fn new(lab: &'a Lab, arguments: &'a Arguments) -> Self {
        let now = Instant::now();
        let counters = || (NginxRequests::default(), 0);
        Self { lab, arguments, started: now, next: now, last: now, online: counters(), target: counters() }
    }

    /// One line a second until `client` has ended, which must be well.
    fn show_until_end(&mut self, client: &mut Process, replay: &Replay) -> Result<()> {
        loop {
            if let Some(status) = client.ended()? {
                if !status.success() {
                    bail!("{} ended with {status}: {}", client.name(), client.tail());
                }
                return Ok(());
            }
            if Instant::now() >= self.next {
                self.next += Duration::from_secs(1);
                self.line(&replay.online.stats().unwrap_or_default())?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn line(&mut self, stats: &Stats) -> Result<()> {
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        let rate = |host, (requests, before): &mut (NginxRequests, u64)| -> Result<f64> {
            let count = requests.read(host)?;
            let difference = count.saturating_sub(*before);
            *before = count;
            Ok(if seconds > 0.0 { difference as f64 / seconds } else { 0.0 })
        };
        let online = rate(self.lab.online(), &mut self.online)?;
        let target = rate(self.lab.target(), &mut self.target)?;
        say(
            self.arguments,
            &format!(
                "{:4.0} s   online {online:6.0} req/s   target {target:6.0} req/s   sessions {:5}   lag {:7.1} ms   \
                 not replayed: {}",
                now.duration_since(self.started).as_secs_f64(),
                stats.sessions_live,
                stats.lag_us as f64 / 1000.0,
                reasons(&stats.not_replayed),
            ),
        );
        Ok(())
    }
}

fn reasons(not_replayed: &BTreeMap<String, u64>) -> String {
    let parts: Vec<String> = not_replayed
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
}

fn table(outcome: &Outcome) -> String {
    let Outcome { requests, streams, online_latency_us: online, target_latency_us: target, .. } = outcome;
    let row = |name: &str, a: String, b: String, note: String| format!("{name:<34}{a:>14}{b:>14}   {note}\n");
    let ms = |us: f64| format!("{:.2} ms", us / 1000.0);
    let us = |us: f64| format!("{us:.1} us");
    let mut text = "\n".to_owned();
    text += &row("", "online".into(), "target".into(), String::new());
    text += &row(
        "HTTP requests",
        requests.online.to_string(),
        requests.target.to_string(),
        format!("missing {}, extra {}", requests.missing, requests.extra),
    );
    text += &row(
        "streams, equal byte for byte",
        streams.compared.to_string(),
        streams.equal.to_string(),
        format!("different {}", streams.compared - streams.equal),
    );
    text += &row("response time, p50", ms(online.p50), ms(target.p50), "client's / replayer's view".into());
    text += &row("response time, p99", ms(online.p99), ms(target.p99), String::new());
    text += &row(
        "replayer's CPU per request",
        us(outcome.online_cpu_us_per_request),
        us(outcome.assistant_cpu_us_per_request),
        "online role / assistant".into(),
    );
    text += &row("not replayed", reasons(&outcome.not_replayed), String::new(), String::new());
    text
}
