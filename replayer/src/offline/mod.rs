//! The offline role: replays capture files instead of what a live host receives.
//!
//! - [`args`]: its arguments
//! - [`feed`]: from files to the engine, in the order and at the time that the arguments ask for
//! - [`read_ahead`]: the thread that reads the files
//! - [`status`]: what both show of the files
//! - [`pace`]: when a packet is due
//! - `replay`: the replay itself, to the target
//! - [`dry_run`]: the whole engine without a network

pub mod args;
pub mod dry_run;
pub mod feed;
pub mod pace;
pub mod read_ahead;
mod replay;
pub mod status;

use crate::channel::random_instance;
use crate::cli::ServiceArg;
use crate::cli::replay::nanoseconds;
use crate::clock;
use crate::configuration::Configuration;
use crate::figures::{self, Figures};
use crate::inspect::{inspect, progress_line};
use crate::pcap::input::STANDARD_INPUT;
use crate::pcap::writer::Writer;
use crate::pcap::{Files, Order};
use crate::placement::Workers;
use crate::report::{self, Quantiles};
use crate::say::{caution, plain, say, show, to_terminal};
use crate::signals::{Asked, Signals};
use crate::worker::Snapshot;
use anyhow::{Context, Result, bail};
pub use args::OfflineArgs;
use dry_run::Memory;
use feed::{Feed, FeedPace};
use read_ahead::FeedConfig;
use replayer_common::hash::sample_threshold;
use replayer_engine::Engine;
use replayer_engine::config::Config;
use replayer_engine::counters::Counter;
use serde::Serialize;
use status::{FileFigures, Status};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// After the last packet was given: how much longer than the hold limit the target may be silent.
const LAST_RESPONSE_NS: u64 = 1_000_000_000;
/// How often progress is shown.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the role until the files are replayed, or SIGTERM or SIGINT. SIGHUP has the configuration read again and the
/// report written as it is then.
///
/// # Errors
/// When the role cannot start, with the cause and the remedy; when a file cannot be read to its end, after what was before that was
/// replayed; when nothing in the files is for a service.
pub fn run(mut args: OfflineArgs, configuration: Configuration) -> Result<()> {
    let services = args.replay.services();
    check(&args)?;
    if !args.check && (args.dry_run || args.write.is_some()) {
        return run_dry(&args, &services);
    }
    replay::run(&mut args, configuration, &services)
}

/// What clap cannot see.
fn check(args: &OfflineArgs) -> Result<()> {
    args.replay.check()?;
    if args.loops.0 != Some(1) && args.files.iter().any(|file| file.as_os_str() == STANDARD_INPUT) {
        bail!("--loop: standard input can be read only once; name a file");
    }
    if args.workers.is_some_and(|workers| matches!(workers, Workers::Count(2..))) {
        bail!(
            "--workers: files are replayed by one worker, since their packets have one order and one pace; leave it out"
        );
    }
    if args.stop.is_some_and(|stop| stop <= args.start) {
        bail!("--stop must be later than --start");
    }
    Ok(())
}

/// The longest time that an argument may say, seconds: 31 years.
const LONGEST: f64 = 1e9;

fn order(args: &OfflineArgs) -> Order {
    if args.sequential { Order::Sequential } else { Order::Merged }
}

fn engine_config(args: &OfflineArgs, frame_room: u16) -> Result<Config> {
    let mut config = args.replay.engine_config(1)?;
    // The feed chooses the sample, by the addresses in the file.
    config.sample_threshold = 1 << 32;
    config.seed = random_instance();
    config.frame_room = frame_room;
    Ok(config)
}

fn start_feed(
    args: &OfflineArgs,
    services: &[ServiceArg],
    frame_room: usize,
    in_flight: u64,
) -> Result<Feed> {
    let config = FeedConfig {
        files: args.files.clone(),
        order: order(args),
        services: services.iter().map(|s| (s.protocol, s.service.online)).collect(),
        clients: args.replay.whose.chosen()?,
        sample_threshold: sample_threshold(args.replay.sample.0),
        loops: args.loops.0,
        start_ns: nanoseconds(args.start, "--start", 0.0, LONGEST)?,
        stop_ns: args.stop.map(|stop| nanoseconds(stop, "--stop", 0.0, LONGEST)).transpose()?,
        frame_room,
    };
    let duration =
        args.duration.map(|seconds| nanoseconds(seconds, "--duration", 0.001, LONGEST)).transpose()?;
    let max_gap = args.max_gap.map(|ms| nanoseconds(ms / 1000.0, "--max-gap", 0.0, LONGEST)).transpose()?;
    Feed::start(
        config,
        FeedPace {
            speed: args.pace()?,
            max_gap: max_gap.map(Duration::from_nanos),
            duration: duration.map(Duration::from_nanos),
            in_flight,
            copies: args.replay.most_copies() * services.len() as u64,
            hold_limit_ns: args.replay.hold_limit_ns()?,
        },
    )
}

fn run_dry(args: &OfflineArgs, services: &[ServiceArg]) -> Result<()> {
    let started = Instant::now();
    let config = engine_config(args, dry_run::FRAME_ROOM as u16)?;
    let sessions = config.limits.sessions;
    let mut engine = Engine::new(config, dry_run::START_NS);
    for service in 0..services.len() {
        engine.set_link(service, Some(dry_run::LINK));
    }
    let writer = match &args.write {
        Some(path) => Some(
            Writer::create(path)
                .with_context(|| format!("cannot write to {}; choose a writable path", path.display()))?,
        ),
        None => None,
    };
    // The target answers at once: there is nothing to wait for.
    let mut feed = start_feed(args, services, dry_run::FRAME_ROOM, u64::MAX)?;
    let status = feed.status();
    let epoch_ns = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
    let copies = args.replay.most_copies() as usize * services.len();
    let mut out = Memory::new(services, copies, sessions, writer, epoch_ns, random_instance());
    let signals = Signals::install()?;
    signals.clean_from_here();
    let stop = AtomicBool::new(false);
    let patience_ns = args.replay.hold_limit_ns()? + LAST_RESPONSE_NS;
    let terminal = to_terminal();
    let mut show_at = Instant::now() + PROGRESS_INTERVAL;
    let mut signalled = false;
    let now = dry_run::run(&mut engine, &mut feed, &mut out, patience_ns, &stop, |engine| {
        if Instant::now() < show_at {
            return;
        }
        show_at = Instant::now() + PROGRESS_INTERVAL;
        signalled = signals.take() == Some(Asked::Stop);
        stop.store(signalled, Ordering::Relaxed);
        if terminal || args.replay.stats.is_some() {
            show(&status, engine, started, terminal);
        }
    })
    .with_context(|| match &args.write {
        Some(path) => format!("cannot write to {}", path.display()),
        None => "the dry run failed".to_owned(),
    })?;
    if terminal {
        show!("\r\x1b[K");
    }
    let mut snapshot =
        Snapshot { counters: *engine.counters(), pending: Some(engine.pending()), ..Snapshot::default() };
    snapshot.services.extend(engine.service_counters());
    snapshot.gauges = engine.gauges();
    let mut figures = Figures::of(services);
    figures.add(&snapshot, None);
    let (seconds, cpu) = (started.elapsed().as_secs_f64(), clock::process_cpu() as f64 / 1e9);
    let replay_seconds = (now - dry_run::START_NS) as f64 / 1e9;
    let mut text = summary(&figures, &status, replay_seconds, seconds, out.bytes_sent());
    if let Some(path) = &args.write {
        text += &format!("\n  written to {}", path.display());
    }
    say!("{text}");
    conclude(args, services, &figures, &status, (seconds, cpu), signalled)
}

fn show(status: &Status, engine: &Engine, started: Instant, terminal: bool) {
    let (done, size) = status.progress();
    let line = progress_line(done, size, status.packets_replayed(), started);
    let counters = engine.counters();
    let line = format!(
        "{line}; {} requests in {} sessions, {} live",
        counters[Counter::TurnsSent],
        counters[Counter::SessionsOpened],
        engine.gauges().sessions_live
    );
    if terminal { show!("\r\x1b[K{line}") } else { plain!("{line}") }
}

/// What a dry run found, for a person.
fn summary(figures: &Figures, status: &Status, replay_seconds: f64, seconds: f64, bytes_sent: u64) -> String {
    let file = status.figures();
    let c = &figures.counters;
    let mut text = format!(
        "read {} packets in {seconds:.2} s ({:.0}/s), {} of them to the services\n\
         would send {} requests in {} sessions: {} packets, {} bytes of clients' data, {bytes_sent} bytes with headers, in {replay_seconds:.3} s",
        file.packets,
        file.packets as f64 / seconds.max(1e-9),
        file.packets_given,
        c[Counter::TurnsSent],
        c[Counter::SessionsOpened],
        c[Counter::SegmentsSent],
        c[Counter::ReplayBytesDelivered],
    );
    if c[Counter::DatagramsSent] > 0 {
        text += &format!(
            "\nand {} datagrams of {} bytes",
            c[Counter::DatagramsSent],
            c[Counter::DatagramBytesSent]
        );
    }
    for (counter, count) in figures.losses() {
        text += &format!("\n  {count} {}: {}", counter.name(), counter.what());
    }
    text + &not_given(&file)
}

/// What of the files was not given to the engine, for a person: lines with their beginnings.
fn not_given(file: &FileFigures) -> String {
    let mut text = String::new();
    if file.packets_truncated > 0 {
        text += &format!(
            "\n  {} packets to the services are cut short, the first is number {}: their requests cannot be replayed; capture with tcpdump -s 0",
            file.packets_truncated, file.first_truncated
        );
    }
    for (count, what) in [
        (file.packets_link_type, "packets of link types that are not known"),
        (file.packets_unparsable, "packets without whole TCP or UDP headers"),
        (file.packets_fragments, "fragments to the services' addresses: not replayed"),
        (file.packets_too_large, "datagrams that are larger than a frame: not replayed"),
        (
            file.packets_client_not_chosen,
            "packets of clients that were not chosen (--clients, --exclude-clients)",
        ),
        (file.packets_sampled_out, "packets of connections outside the sample"),
    ] {
        if count > 0 {
            text += &format!("\n  {count} {what}");
        }
    }
    text
}

/// The report, and whether the run did what was asked.
fn conclude(
    args: &OfflineArgs,
    services: &[ServiceArg],
    figures: &Figures,
    status: &Status,
    (seconds, cpu): (f64, f64),
    interrupted: bool,
) -> Result<()> {
    let file = status.figures();
    if let Some(path) = &args.replay.report {
        report::write(path, &report_of(figures, status, (seconds, cpu)), &figures.identities())?;
    }
    let problems = status.take_problems();
    // The first is what the run ends with.
    for problem in problems.iter().skip(1) {
        caution!("{problem}");
    }
    if file.packets_given == 0 && file.packets_sampled_out == 0 && !interrupted {
        if file.packets_client_not_chosen > 0 {
            bail!(
                "all {} packets to the services are of clients that --clients and --exclude-clients leave out",
                file.packets_client_not_chosen
            );
        }
        bail!("{}", nothing_matched(args, services, file.packets));
    }
    if let Some(first) = problems.first() {
        bail!("{first}");
    }
    figures.ensure_done()
}

/// For `--report`.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    figures: figures::Report<'a>,
    file: FileFigures,
    late_us: Quantiles,
}

fn report_of<'a>(figures: &'a Figures, status: &Status, (seconds, cpu): (f64, f64)) -> Report<'a> {
    Report {
        figures: figures.report("offline", None, seconds, cpu),
        file: status.figures(),
        late_us: Quantiles::of(&status.lateness()),
    }
}

/// No packet was for a service: which services the files have instead.
fn nothing_matched(args: &OfflineArgs, services: &[ServiceArg], packets: u64) -> String {
    let wanted: Vec<String> = services.iter().map(ServiceArg::online_name).collect();
    let mut text = format!("none of the {packets} packets goes to {}", wanted.join(" or to "));
    if args.files.iter().any(|file| file.as_os_str() == STANDARD_INPUT) {
        return text + "; `replayer inspect` says what is in a file";
    }
    let Ok(mut files) = Files::open(&args.files, order(args)) else { return text };
    let report = inspect(&mut files, to_terminal());
    if report.services.is_empty() && report.udp.is_empty() {
        return text + ", and nothing of TCP or UDP is in the files";
    }
    text += "; these services are in the files (name one with -x):";
    for service in report.services.iter().take(20) {
        text += &format!(
            "\n  {}: {} connections, {} requests",
            service.server, service.connections, service.requests
        );
    }
    for udp in report.udp.iter().take(10) {
        text += &format!("\n  udp:{}: {} clients, {} datagrams", udp.server, udp.clients, udp.datagrams);
    }
    text
}
