//! The offline role with a network: a worker whose packets come from files, a port that only transmits, the assistants' channels.

use super::{
    LAST_RESPONSE_NS, OfflineArgs, conclude, engine_config, not_given, order, report_of, start_feed,
};
use crate::afxdp::{Endpoint as PortEndpoint, Port, PortConfig};
use crate::channel::assistants::{Assistants, Change, Found};
use crate::cli::{ReplayArgs, Role, ServiceArg, StatsFormat};
use crate::clock::{self, spent};
use crate::configuration::{self, Configuration, Settings};
use crate::diagnosis::{self, Diagnosis};
use crate::figures::{self, Figures};
use crate::growth::Growth;
use crate::inspect::progress_line;
use crate::metrics::{self, Metrics};
use crate::net::{Monitor, Network};
use crate::offline::status::{FileFigures, Status};
use crate::pcap::Files;
use crate::pcap::input::STANDARD_INPUT;
use crate::privileges::{self, Keep};
use crate::reload::Reload;
use crate::report;
use crate::say::{self, caution, plain, say, show, to_terminal};
use crate::signals::{Asked, Signals};
use crate::targets::{conclude_check, output_device};
use crate::worker::{Ask, Shared, Worker};
use anyhow::{Context, Result, bail};
use replayer_common::addr::to_std;
use replayer_engine::Engine;
use serde::Serialize;
use serde_json::json;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Frames of the port: 64 MiB, all for packets to be sent.
const FRAMES: u32 = 32_768;
/// An Ethernet header with two VLAN tags.
const ETHERNET_HEADER: u32 = 22;
/// How often it is looked whether the worker has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

pub(super) fn run(
    args: &mut OfflineArgs,
    configuration: Configuration,
    services: &[ServiceArg],
) -> Result<()> {
    privileges::check()?;
    let signals = Signals::install()?;
    let metrics = Metrics::serve(args.replay.metrics)?;
    let mut network = Network::open()?;
    let output = output_device(&mut network, &args.replay, services)?;
    let (assistants, mut channels) = Assistants::connect(&args.replay.named(&args.assistants), services, 1)?;
    let channels = channels.pop().context("-s names no assistant")?;
    let monitor = Monitor::start(
        services.iter().map(|service| to_std(&service.service.target.ip)).collect(),
        args.replay.output_interface.clone(),
        args.replay.tags().to_vec(),
    )?;
    let port = Port::open(&PortConfig {
        frames: FRAMES,
        frame_size: if output.mtu + ETHERNET_HEADER <= 2048 - 256 { 2048 } else { 4096 },
        rx: None,
        tx: Some(PortEndpoint {
            device: output.name.clone(),
            queues: 0..output.transmit_queues_in_use(),
            namespace: None,
        }),
        zero_copy: false,
    })?;
    if args.check {
        for file in args.files.iter().filter(|file| file.as_os_str() != STANDARD_INPUT) {
            Files::open(std::slice::from_ref(file), order(args))?;
        }
        say!("sending on {}: {}", output.name, port.mode());
        return conclude_check(services);
    }
    let room = port.area();
    let feed = start_feed(args, services, room, args.in_flight)?;
    let status = feed.status();
    let shared = Shared::new()?;
    let port_mode = port.mode().to_owned();
    let engine = Engine::new(engine_config(args, room as u16)?, clock::now());
    let mut worker = Worker::new(engine, port, None, channels, monitor.watch(), shared.clone());
    worker.grow_by(Growth::start(None).context("start a thread")?);
    worker.feed(feed, args.replay.hold_limit_ns()? + LAST_RESPONSE_NS);
    say!("sending on {}: {port_mode}", output.name);
    for service in services {
        say!("{} is copied to {}", service.online_name(), service.service.target);
    }
    let started = Instant::now();
    signals.clean_from_here();
    let worker = std::thread::Builder::new()
        .name("worker 0".into())
        .spawn(move || {
            privileges::drop_all_but(Keep::Nothing);
            worker.run();
        })
        .context("start a thread")?;
    let mut running =
        Running { configuration, assistants, shared, worker: Some(worker), reload: Reload::default() };
    privileges::drop_all_but(Keep::Main);
    say::ready(format_args!("stop with SIGTERM or Ctrl-C"));

    let ended = running.serve(args, services, &signals, metrics.as_ref(), &status, started);
    running.stop()?;
    let figures = running.figures(services);
    let (seconds, cpu) = spent(started);
    let file = status.figures();
    let mut summary = figures.summary(seconds, cpu);
    summary +=
        &format!("\n  of {} packets in the files, {} went to the services", file.packets, file.packets_given);
    let late = status.lateness();
    if late.count() > 0 {
        summary += &format!(
            "\n  given to the engine after they were due: median {} us, p99 {} us, max {} us",
            late.quantile(0.5),
            late.quantile(0.99),
            late.max()
        );
    }
    say!("{summary}{}", not_given(&file));
    let interrupted = *ended.as_ref().unwrap_or(&false);
    conclude(args, services, &figures, &status, (seconds, cpu), interrupted)?;
    ended.map(drop)
}

/// A line of figures for programs, with what there is to say of the files.
#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    figures: figures::Line,
    file: FileFigures,
    file_bytes_replayed: u64,
    file_bytes: Option<u64>,
}

/// The worker's thread. Dropping it ends it.
struct Running {
    configuration: Configuration,
    assistants: Assistants,
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
    reload: Reload<Reloaded>,
}

/// What SIGHUP has brought, to be taken over.
struct Reloaded {
    /// What the configuration file says, if there is one.
    said: Option<(Box<OfflineArgs>, Settings)>,
    assistants: Found,
}

impl Running {
    /// Shows progress until the files are replayed, or a signal comes: true for a signal.
    fn serve(
        &mut self,
        args: &mut OfflineArgs,
        services: &[ServiceArg],
        signals: &Signals,
        metrics: Option<&Metrics>,
        status: &Status,
        started: Instant,
    ) -> Result<bool> {
        let mut terminal = to_terminal() && args.replay.stats_format == StatsFormat::Text;
        let mut interval = args.replay.stats_interval();
        let mut next = Instant::now() + interval;
        let mut before = Figures::default();
        let mut diagnosis = Diagnosis::new(false, services);
        let (mut next_look, mut longest_lag_us) = (started + diagnosis::INTERVAL, 0);
        let mut signalled = false;
        while !self.worker.as_ref().is_none_or(JoinHandle::is_finished) {
            match signals.wait_until(Instant::now() + LOOK_INTERVAL)? {
                Some(Asked::Stop) => {
                    signalled = true;
                    break;
                }
                Some(Asked::Reload) => self.reload.ask(),
                None => {}
            }
            if let Some(outcome) = self.reload.outcome() {
                let asked = (args.replay.stats, terminal);
                match outcome {
                    Ok(reloaded) => self.take_over(args, reloaded),
                    Err(error) => configuration::say_not_taken_over(&error),
                }
                terminal = to_terminal() && args.replay.stats_format == StatsFormat::Text;
                let figures = self.figures(services);
                longest_lag_us = longest_lag_us.max(figures.lag_us);
                let report = report_of(&figures, status, spent(started));
                report::write_interim(args.replay.report.as_deref(), &report);
                if asked != (args.replay.stats, terminal) {
                    interval = args.replay.stats_interval();
                    next = Instant::now() + interval;
                    before = figures;
                }
            }
            if self.reload.is_due()
                && let Err(error) = self.begin_reload(args, signals)
            {
                configuration::say_not_taken_over(&error);
            }
            if Instant::now() >= next_look {
                next_look += diagnosis::INTERVAL;
                if !self.reload.is_under_way() {
                    let changes = self.assistants.leave(Instant::now(), 1);
                    self.change_assistants(changes);
                }
                let figures = self.figures(services);
                longest_lag_us = longest_lag_us.max(figures.lag_us);
                if let Some(metrics) = metrics {
                    let (seconds, cpu) = spent(started);
                    metrics.publish(metrics::of_replay("offline", &figures, None, seconds, cpu));
                }
                for trouble in diagnosis.look(started.elapsed(), &figures, 0, 0) {
                    if terminal {
                        show!("\r\x1b[K");
                    }
                    let text = trouble.describe(services, &args.replay, "");
                    caution!(trouble.fields(); "{text}");
                }
            }
            if Instant::now() < next {
                continue;
            }
            next += interval;
            if args.replay.stats.is_none() && !terminal {
                continue;
            }
            let mut figures = self.figures(services);
            figures.lag_us = figures.lag_us.max(std::mem::take(&mut longest_lag_us));
            let line = figures.line_text(&before, interval.as_secs_f64());
            let (done, size) = status.progress();
            let progress = progress_line(done, size, status.packets_replayed(), started);
            let figures_line = Line {
                figures: figures.line(started.elapsed().as_secs_f64()),
                file: status.figures(),
                file_bytes_replayed: done,
                file_bytes: size,
            };
            match args.replay.stats_format {
                StatsFormat::Json => report::print(&figures_line)?,
                StatsFormat::Text if terminal => show!("\r\x1b[K{progress}; {line}"),
                StatsFormat::Text => plain!(json!({"figures": figures_line}); "{progress}; {line}"),
            }
            before = figures;
        }
        if terminal {
            show!("\r\x1b[K");
        }
        Ok(signalled)
    }

    /// Looks at what the configuration file says now, and at where the assistants' names lead now.
    fn begin_reload(&mut self, args: &OfflineArgs, signals: &Signals) -> Result<()> {
        let configuration = self.configuration.clone();
        let search = self.assistants.search(1);
        let (names, replay) = (args.assistants.clone(), args.replay.clone());
        self.reload.begin(signals, move || {
            let said = match configuration.read_again()? {
                Some((Role::Offline(new), settings)) => Some((new, settings)),
                _ => None,
            };
            let named = match &said {
                Some((new, _)) => {
                    super::check(new)?;
                    new.replay.named(&new.assistants)
                }
                None => replay.named(&names),
            };
            let assistants = search.run(&named)?;
            Ok(Reloaded { said, assistants })
        })
    }

    /// Takes that over, as far as no session notices.
    fn take_over(&mut self, args: &mut OfflineArgs, Reloaded { said, assistants }: Reloaded) {
        let changes = self.assistants.take_over(assistants, Instant::now());
        self.change_assistants(changes);
        if let Some((new, settings)) = said {
            args.assistants = new.assistants;
            args.replay.adopt(new.replay);
            self.configuration.taken_over(settings, &ReplayArgs::LIVE);
        }
    }

    fn change_assistants(&self, changes: Vec<Change>) {
        for change in changes {
            self.shared.ask(Ask::Assistants(change));
        }
    }

    fn figures(&self, services: &[ServiceArg]) -> Figures {
        let mut figures = Figures::of(services);
        let mut snapshot = self.shared.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        figures.add(&snapshot, None);
        snapshot.lag_us = 0;
        figures
    }

    /// Lets the worker end its sessions, and waits for it.
    fn stop(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Release);
        // A full counter wakes the worker just as well.
        let _ = self.shared.wake.write(1);
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            bail!("the worker died; this is a bug of the replayer, please report it with the lines above");
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After an error: no thread stays behind. What went wrong is told already.
        let _ = self.stop();
    }
}
