//! The online role: captures requests on this host and replays them to the targets.
//!
//! This file puts the parts together and takes them apart again: it decides what is attached where, in which order, and what is
//! printed. The order matters twice: nothing is attached to the production interface before everything else stands, and it is the
//! first thing to go.

use crate::afxdp::{Endpoint as PortEndpoint, Port, PortConfig, PortError};
use crate::capture::choice::{self, Facts};
use crate::capture::{Backend, Capture, CaptureArg, Source, Verdicts, span};
use crate::channel::assistants::{Assistants, Change, Found};
use crate::channel::random_instance;
use crate::cli::{OnlineArgs, ReplayArgs, Role, ServiceArg, StatsFormat};
use crate::clock;
use crate::configuration::{self, Configuration, Partly, Settings};
use crate::diagnosis::{self, Diagnosis};
use crate::growth::Growth;
use crate::metrics::{self, Metrics};
use crate::net::{Device, Monitor, NetError, Network};
use crate::placement::{Placement, Workers};
use crate::privileges::{self, Keep};
use crate::reload::Reload;
use crate::report::{self, Figures};
use crate::say::{self, caution, plain, say};
use crate::server_connections::{self, Connection};
use crate::signals::{Asked, Signals};
use crate::sizing::{self, Demand, Supply};
use crate::worker::{Ask, Shared, Worker};
use anyhow::{Context, Result, bail};
use core_affinity::CoreId;
use nix::net::if_::if_nameindex;
use replayer_common::addr::{ANY, Endpoint, to_std};
use replayer_common::hash::{FLOW_SEED, flow_hash, sample_threshold};
use replayer_common::packet::Protocol;
use replayer_engine::Engine;
use replayer_engine::config::Limits;
use serde_json::json;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a next hop may take to tell its address at the start.
const NEXT_HOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long a target may take to accept a connection of a check.
const TARGET_PATIENCE: Duration = Duration::from_secs(2);
/// After so long connections that were in the middle of a request are looked at once more: the kernel's times of their sockets have moved on
/// by a tick (4 ms at 250 Hz). Also how long a look may take to be worth another one, for captured packets wait meanwhile; and how long a packet may be on
/// its way through the programs.
const MOMENT: Duration = Duration::from_millis(5);
/// Frames of all workers' ports together, half of them for captured packets that wait for a worker: 128 MiB. Data that waits for the
/// target is not held in them.
const FRAMES: u32 = 65_536;
/// Frames of a worker's port at least, for its bursts.
const FRAMES_MIN: u32 = 16_384;
/// An Ethernet header with two VLAN tags.
const ETHERNET_HEADER: u32 = 22;

/// Keys of `--config` that a running role takes over.
const LIVE: [&str; 2] = ["sample", "ramp"];

/// Runs the role until SIGTERM or SIGINT. SIGHUP has the configuration read again and the report written as it is then.
///
/// # Errors
/// When the role cannot start, with the cause and the remedy; when a worker dies or an interface is removed; when the report cannot
/// be written; when nothing of what was captured came to a target, or the accounts do not add up.
pub fn run(mut args: OnlineArgs, configuration: Configuration) -> Result<()> {
    privileges::check()?;
    let signals = Signals::install()?;
    let started = Instant::now();
    let Some(mut online) = Online::start(&args, configuration, &signals)? else { return Ok(()) };
    privileges::drop_all_but(Keep::Main);
    let ended = online.serve(&mut args, &signals, started);
    // After an error too: the sessions end cleanly, and what was done until then is told.
    let stopped = online.stop();
    let verdicts = online.capture.verdicts();
    online.say_tls();
    let mut figures = online.figures(&verdicts);
    figures.handed_over = verdicts.handed_over();
    let (seconds, cpu) = spent(started);
    let mut summary = figures.summary(seconds, cpu);
    let not_chosen = verdicts.not_chosen();
    if not_chosen > 0 {
        summary += &format!(
            "\n  {not_chosen} packets of clients that were not chosen (--clients, --exclude-clients) were left alone"
        );
    }
    say!("{summary}");
    let written = match &args.replay.report {
        Some(path) => {
            let report = figures.report("online", Some(&verdicts), seconds, cpu);
            report::write(path, &report, &figures.identities())
        }
        None => Ok(()),
    };
    ended.and(stopped).and(written).and_then(|()| figures.ensure_done())
}

/// Seconds since the start, and of processor time.
pub(crate) fn spent(started: Instant) -> (f64, f64) {
    (started.elapsed().as_secs_f64(), clock::process_cpu() as f64 / 1e9)
}

/// The running role. Dropping it detaches everything.
struct Online {
    configuration: Configuration,
    assistants: Assistants,
    capture: Capture,
    _monitor: Monitor,
    /// Where it captures and where it sends.
    devices: [Device; 2],
    services: Vec<ServiceArg>,
    /// Services whose clients were said to speak TLS.
    tls_said: BTreeSet<usize>,
    ramp: Ramp,
    metrics: Option<Metrics>,
    workers: Vec<Running>,
    reload: Reload<Reloaded>,
}

/// What SIGHUP has brought, to be taken over.
struct Reloaded {
    /// What the configuration file says, if there is one.
    said: Option<(Box<OnlineArgs>, Settings)>,
    assistants: Found,
}

/// A worker's thread.
struct Running {
    shared: Arc<Shared>,
    /// `None` once it has been waited for.
    thread: Option<JoinHandle<()>>,
    cpu: Option<usize>,
}

impl Online {
    /// `None`: everything was found to be there, and that is all that was asked for, or a signal came.
    fn start(args: &OnlineArgs, configuration: Configuration, signals: &Signals) -> Result<Option<Online>> {
        args.replay.check()?;
        if args.spread > 60_000 {
            bail!("--spread {}: give at most 60000 milliseconds", args.spread);
        }
        if args.zero_copy && args.capture != CaptureArg::Span {
            bail!(
                "--zero-copy is for --capture span: the others copy packets anyway, so as not to touch the production interface"
            );
        }
        if args.busy_poll > 1_000_000 {
            bail!("--busy-poll {}: give at most 1000000 microseconds", args.busy_poll);
        }
        let services = args.replay.services();
        let clients = args.replay.whose.chosen()?;
        let mut network = Network::open()?;
        let output = output_device(&mut network, &args.replay, &services)?;
        let device = capture_device(&mut network, args, &services)?;
        let wildcard = services.iter().any(|service| service.service.online.ip == ANY);
        let facts = Facts::find(&mut network, &device, wildcard)?;
        let (backend, why) = choice::choose(args.capture, &device, &facts)?;
        let placement = match backend {
            Backend::Mirror | Backend::Ring => Placement::choose(args.workers, args.cpus.as_ref())?,
            Backend::Span => {
                check_span(&services)?;
                let workers = span::workers(&device, args.workers)?;
                check_span_workers(args, &device, workers)?;
                Placement::choose(Some(Workers::Count(workers)), args.cpus.as_ref()).with_context(|| {
                    format!("{0} has {workers} receive queues, each with a worker (`ethtool -L {0}` gives it fewer)", device.name)
                })?
            }
        };
        let metrics = Metrics::serve(args.replay.metrics)?;
        let (assistants, mut channels) =
            Assistants::connect(&args.replay.named(&args.assistants), &services, placement.workers)?;
        let monitor = Monitor::start(
            services.iter().map(|service| to_std(&service.service.target.ip)).collect(),
            args.replay.output_interface.clone(),
            args.replay.tags().to_vec(),
        )?;

        let online: BTreeSet<_> =
            services.iter().map(|s| (s.protocol, s.service.online.ip, s.service.online.port)).collect();
        let threshold = sample_threshold(args.replay.sample.0);
        let mut capture = Capture::prepare(backend, &device, &online, &clients, placement.workers)?;
        let mut ports = open_ports(args, &placement, &capture, &device, &output)?;
        if args.busy_poll > 0 {
            for port in &mut ports {
                port.poll_busily(args.busy_poll).context("--busy-poll: the kernel refuses it to a socket")?;
            }
        }
        let workers = ports.len() as u32;
        channels.truncate(ports.len());
        let sources: Vec<Source> = (0..)
            .zip(&ports)
            .map(|(worker, port)| capture.source(worker, workers, Some(port)))
            .collect::<Result<_>>()?;
        let ramp = Ramp::new(args.ramp, 0, threshold);
        capture.configure(workers, ramp.threshold(Duration::ZERO))?;

        let mut config = args.replay.engine_config(ports.len())?;
        config.sample_threshold = threshold;
        config.spread_ns = u64::from(args.spread) * 1_000_000;
        let port_modes: Vec<String> = ports.iter().map(|port| port.mode().to_owned()).collect();
        let mut made = Vec::new();
        for (number, ((port, source), channels)) in ports.into_iter().zip(sources).zip(channels).enumerate() {
            let mut config = config.clone();
            config.worker = number as u32;
            config.seed = random_instance();
            config.frame_room = port.area() as u16;
            let shared = Shared::new()?;
            let engine = Engine::new(config, clock::now());
            let mut worker =
                Worker::new(engine, port, Some(source), channels, monitor.watch(), shared.clone());
            worker.poll_busily(u64::from(args.busy_poll) * 1000);
            let cpu = placement.cpu(number as u32).map(|cpu| cpu.id);
            worker.grow_by(Growth::start(cpu).context("start a thread")?);
            made.push((worker, shared));
        }

        if args.check {
            say!("{backend} on {}, sending on {}: {why}", device.name, output.name);
            conclude_check(&services)?;
            return Ok(None);
        }

        // Everything stands: now the production interface. What its open connections are at is looked up before and after.
        let of_tcp = services.iter().filter(|service| service.protocol == Protocol::Tcp);
        let ports: BTreeSet<u16> = of_tcp.map(|service| service.service.online.port).collect();
        let ports: Vec<u16> = ports.into_iter().collect();
        // What a mirror port shows are connections of other hosts.
        let look = !args.replay.new_connections_only && backend != Backend::Span;
        let open_connections = || {
            let mut open = if look { open_connections(&ports) } else { Vec::new() };
            open.retain(|connection| clients.contains(&connection.client.ip));
            open
        };
        let earlier = open_connections();
        say_shortfalls(&args.replay, workers, &config.limits, &earlier);
        signals.clean_from_here();
        capture.attach()?;
        let attached = Instant::now();
        let later = open_connections();
        let (quiet, others) = between_turns(&earlier, &later);
        let mut online = Online {
            configuration,
            assistants,
            capture,
            _monitor: monitor,
            devices: [device, output],
            services,
            tls_said: BTreeSet::new(),
            ramp,
            metrics,
            workers: Vec::new(),
            reload: Reload::default(),
        };
        for (number, (worker, _)) in (0..).zip(&mut made) {
            worker.join(&of_worker(number, workers, &quiet), &of_worker(number, workers, &others));
        }
        // Of those that were in the middle of a request most are not any more a moment later. Nobody empties the rings meanwhile.
        let mut settled = Vec::new();
        if quiet.len() + others.len() < later.len() && attached.elapsed() < MOMENT {
            std::thread::sleep(MOMENT);
            settled = between_turns_now(&later, &open_connections());
        }
        for (number, (mut worker, shared)) in (0..).zip(made) {
            let settled = of_worker(number, workers, &settled);
            if !settled.is_empty() {
                worker.join(&Pairs::new(), &settled);
            }
            online.workers.push(Running::start(number, placement.cpu(number), worker, shared)?);
        }

        say!("capturing on {}, sending on {}", online.capture, online.devices[1].name);
        say!("{backend}: {why}");
        for (number, (mode, worker)) in port_modes.iter().zip(&online.workers).enumerate() {
            let cpu = worker.cpu.map_or_else(String::new, |cpu| format!(" on CPU {cpu}"));
            say!("worker {number}{cpu}: {mode}");
        }
        for service in &online.services {
            say!("{} is copied to {}", service.online_name(), service.service.target);
        }
        if !later.is_empty() {
            say!(
                "{} connections are open already, {} of them between two requests",
                later.len(),
                quiet.len() + others.len() + settled.len()
            );
        }
        say::ready(format_args!("stop with SIGTERM or Ctrl-C"));
        Ok(Some(online))
    }

    /// A device that is down may come up again; one that is gone took programs and sockets along.
    fn check_devices(&self) -> Result<()> {
        let present = if_nameindex().context("list the interfaces")?;
        for device in &self.devices {
            if !present.iter().any(|other| other.index() == device.ifindex) {
                bail!("the interface {} was removed; start the replayer again when it is back", device.name);
            }
        }
        Ok(())
    }

    /// Prints a line now and then, until a signal comes or something is broken beyond repair.
    fn serve(&mut self, args: &mut OnlineArgs, signals: &Signals, started: Instant) -> Result<()> {
        let mut before = Figures::default();
        let mut interval = args.replay.stats_interval();
        let attached = Instant::now();
        self.ramp.began = attached;
        let mut next_line = attached + interval;
        let mut next_look = attached + diagnosis::INTERVAL;
        let mut diagnosis = Diagnosis::new(true, &self.services);
        let mut longest_lag_us = 0;
        loop {
            match signals.wait_until(self.next_step().map_or(next_look, |step| step.min(next_look)))? {
                Some(Asked::Stop) => return Ok(()),
                Some(Asked::Reload) => self.reload.ask(),
                None => {}
            }
            if self.reload.is_due()
                && let Err(error) = self.begin_reload(args, signals)
            {
                configuration::say_not_taken_over(&error);
            }
            if let Some(outcome) = self.reload.outcome() {
                let asked = args.replay.stats;
                if let Err(error) = outcome.and_then(|reloaded| self.take_over(args, reloaded)) {
                    configuration::say_not_taken_over(&error);
                }
                let verdicts = self.capture.verdicts();
                let figures = self.figures(&verdicts);
                longest_lag_us = longest_lag_us.max(figures.lag_us);
                let (seconds, cpu) = spent(started);
                let report = figures.report("online", Some(&verdicts), seconds, cpu);
                report::write_interim(args.replay.report.as_deref(), &report);
                if asked != args.replay.stats {
                    interval = args.replay.stats_interval();
                    next_line = Instant::now() + interval;
                    before = figures;
                }
            }
            self.take_step()?;
            if Instant::now() < next_look {
                continue;
            }
            next_look = (next_look + diagnosis::INTERVAL).max(Instant::now());
            if !self.reload.is_under_way() {
                let changes = self.assistants.leave(Instant::now(), self.workers.len());
                self.change_assistants(changes);
            }
            if self.workers.iter().any(|worker| worker.thread.as_ref().is_none_or(JoinHandle::is_finished)) {
                bail!("a worker died; this is a bug of the replayer, please report it with the lines above");
            }
            self.check_devices()?;
            self.say_tls();
            let verdicts = self.capture.verdicts();
            let mut figures = self.figures(&verdicts);
            longest_lag_us = longest_lag_us.max(figures.lag_us);
            if let Some(metrics) = &self.metrics {
                let (seconds, cpu) = spent(started);
                metrics.publish(metrics::of_replay("online", &figures, Some(&verdicts), seconds, cpu));
            }
            let (left_out, not_chosen) = (verdicts.left_out(), verdicts.not_chosen());
            for trouble in diagnosis.look(attached.elapsed(), &figures, left_out, not_chosen) {
                let text = trouble.describe(&self.services, &args.replay, &self.devices[0].name);
                caution!(trouble.fields(); "{text}");
            }
            if args.replay.stats.is_some() && Instant::now() >= next_line {
                next_line += interval;
                figures.lag_us = std::mem::take(&mut longest_lag_us);
                let line = figures.line(started.elapsed().as_secs_f64());
                match args.replay.stats_format {
                    StatsFormat::Json => report::print(&line)?,
                    StatsFormat::Text => {
                        let text = figures.line_text(&before, interval.as_secs_f64());
                        plain!(json!({"figures": line}); "{text}");
                    }
                }
                before = figures;
            }
        }
    }

    /// Looks at what the configuration file says now, and at where the assistants' names lead now.
    fn begin_reload(&mut self, args: &OnlineArgs, signals: &Signals) -> Result<()> {
        let configuration = self.configuration.clone();
        let search = self.assistants.search(self.workers.len() as u32);
        let (names, replay) = (args.assistants.clone(), args.replay.clone());
        self.reload.begin(signals, move || {
            let said = match configuration.read_again()? {
                Some((Role::Online(new), settings)) => Some((new, settings)),
                _ => None,
            };
            let named = match &said {
                Some((new, _)) => {
                    new.replay.check()?;
                    new.replay.named(&new.assistants)
                }
                None => replay.named(&names),
            };
            let assistants = search.run(&named)?;
            Ok(Reloaded { said, assistants })
        })
    }

    /// Takes that over, as far as no session notices.
    fn take_over(&mut self, args: &mut OnlineArgs, Reloaded { said, assistants }: Reloaded) -> Result<()> {
        let changes = self.assistants.take_over(assistants, Instant::now());
        self.change_assistants(changes);
        let Some((new, settings)) = said else { return Ok(()) };
        let Online { capture, ramp, workers, .. } = self;
        if (new.ramp, new.replay.sample) != (args.ramp, args.replay.sample) {
            let threshold = sample_threshold(new.replay.sample.0);
            // What leaves the sample is not captured any more before its sessions end, and what enters it, only when it is welcome.
            if threshold < capture.threshold() {
                let taken =
                    Partly("the assistants and the key are as the file says now, all else is as before");
                capture.configure(workers.len() as u32, threshold).context(taken)?;
            }
            for worker in workers.iter() {
                worker.shared.ask(Ask::Sample(threshold));
            }
            *ramp = Ramp::new(new.ramp, capture.threshold(), threshold);
            (args.ramp, args.replay.sample) = (new.ramp, new.replay.sample);
        }
        args.assistants = new.assistants;
        args.replay.adopt(new.replay);
        self.configuration.taken_over(settings, &[&LIVE[..], &ReplayArgs::LIVE].concat());
        Ok(())
    }

    fn change_assistants(&self, changes: Vec<Change>) {
        for (worker, change) in self.workers.iter().zip(changes) {
            worker.shared.ask(Ask::Assistants(change));
        }
    }

    /// When the share of connections grows next; `None`: it does not any more.
    fn next_step(&self) -> Option<Instant> {
        let growing = self.capture.threshold() < self.ramp.full;
        growing.then(|| Instant::now() + Ramp::STEP)
    }

    /// Lets the program take the share of connections that the ramp has come to.
    fn take_step(&mut self) -> Result<()> {
        let threshold = self.ramp.threshold(self.ramp.began.elapsed());
        if threshold != self.capture.threshold() {
            self.capture.configure(self.workers.len() as u32, threshold)?;
        }
        Ok(())
    }

    /// Says once of each service whose clients speak TLS that it cannot be replayed.
    fn say_tls(&mut self) {
        let is_tls = |index| {
            self.workers.iter().any(|worker| {
                let snapshot =
                    worker.shared.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                snapshot.tls.get(index) == Some(&true)
            })
        };
        for (index, service) in self.services.iter().enumerate() {
            if is_tls(index) && self.tls_said.insert(index) {
                caution!(
                    "clients of {} speak TLS, which cannot be replayed: only the production server has the keys. \
                     These connections are counted (packets_tls) and left out; to replay them, capture behind the TLS endpoint",
                    service.online_name()
                );
            }
        }
    }

    /// Those of all workers, and what was lost before it came to them.
    fn figures(&self, verdicts: &Verdicts) -> Figures {
        let mut figures = Figures::of(&self.services);
        for worker in &self.workers {
            let mut snapshot =
                worker.shared.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            figures.add(&snapshot, worker.cpu);
            snapshot.lag_us = 0;
        }
        figures.lost_before(verdicts.losses());
        figures
    }

    /// Detaches from the production interface, lets the workers end their sessions, and waits for them.
    ///
    /// # Errors
    /// When one has died.
    fn stop(&mut self) -> Result<()> {
        self.capture.detach();
        // What the programs have in hand arrives.
        std::thread::sleep(MOMENT);
        for worker in &self.workers {
            worker.shared.stop.store(true, Ordering::Release);
            // A full counter wakes the worker just as well.
            let _ = worker.shared.wake.write(1);
        }
        let threads: Vec<_> = self.workers.iter_mut().filter_map(|worker| worker.thread.take()).collect();
        let died = threads.into_iter().filter_map(|thread| thread.join().err()).count();
        if died > 0 {
            bail!(
                "{died} of {} workers died; this is a bug of the replayer, please report it with the lines above. Some sessions may be open \
                 at the target",
                self.workers.len()
            );
        }
        Ok(())
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        // After an error: nothing stays attached, no thread stays behind.
        if self.workers.iter().any(|worker| worker.thread.is_some())
            && let Err(error) = self.stop()
        {
            caution!("{error:#}");
        }
    }
}

/// `-g`: the share of connections grows evenly. By the hash, so that who is in it stays in it.
#[derive(Clone, Copy, Debug)]
struct Ramp {
    began: Instant,
    duration: Duration,
    /// The threshold at its beginning.
    from: u64,
    /// The threshold at its end.
    full: u64,
}

impl Ramp {
    /// Between two steps.
    const STEP: Duration = Duration::from_millis(100);

    /// One that begins now.
    fn new(seconds: u32, from: u64, full: u64) -> Ramp {
        Ramp { began: Instant::now(), duration: Duration::from_secs(u64::from(seconds)), from, full }
    }

    /// The threshold of flow hashes so long after its beginning.
    fn threshold(&self, elapsed: Duration) -> u64 {
        if elapsed >= self.duration {
            return self.full;
        }
        let part = elapsed.as_secs_f64() / self.duration.as_secs_f64();
        self.from + (self.full.saturating_sub(self.from) as f64 * part) as u64
    }
}

impl Running {
    /// Starts a worker's thread, on its CPU if it has one.
    fn start(number: u32, cpu: Option<CoreId>, worker: Worker, shared: Arc<Shared>) -> Result<Running> {
        let thread = std::thread::Builder::new()
            .name(format!("worker {number}"))
            .spawn(move || {
                privileges::drop_all_but(Keep::Nothing);
                // The CPU is one that this process may use; it can only have been taken away since.
                if let Some(cpu) = cpu.filter(|&cpu| !core_affinity::set_for_current(cpu)) {
                    log::warn!("worker {number} could not be bound to CPU {} and runs anywhere", cpu.id);
                }
                worker.run();
            })
            .context("start a thread")?;
        Ok(Running { shared, thread: Some(thread), cpu: cpu.map(|cpu| cpu.id) })
    }
}

/// Warns of a pool, or of limits, that are too small for the traffic of now.
fn say_shortfalls(args: &ReplayArgs, workers: u32, limits: &Limits, open: &[Connection]) {
    /// How long connections are counted.
    const LOOK: Duration = Duration::from_millis(250);
    let supply = Supply::of(args, workers, limits.identities);
    if !supply.matters() {
        return;
    }
    let before = sizing::accepted();
    std::thread::sleep(LOOK);
    let accepted = sizing::accepted().zip(before).map_or(0, |(after, before)| after - before);
    let demand = Demand::of(open, accepted as f64 / LOOK.as_secs_f64());
    for shortfall in supply.shortfalls(&demand) {
        caution!("{shortfall}");
    }
}

/// A port for each worker: where the back end receives, and a TX queue of the output device.
fn open_ports(
    args: &OnlineArgs,
    placement: &Placement,
    capture: &Capture,
    device: &Device,
    output: &Device,
) -> Result<Vec<Port>> {
    let wanted = placement.workers;
    let frame_size = if device.mtu.max(output.mtu) + ETHERNET_HEADER <= 2048 - 256 { 2048 } else { 4096 };
    let mut ports = Vec::new();
    for worker in 0..wanted {
        let rx = capture.receiving_end(worker);
        // Without a receiving side there is no half for packets that wait: they wait in the ring.
        let frames = if rx.is_some() { FRAMES } else { FRAMES / 2 };
        let mut config = PortConfig {
            frames: (frames / wanted.next_power_of_two()).max(FRAMES_MIN),
            frame_size,
            rx,
            tx: Some(PortEndpoint {
                device: output.name.clone(),
                queues: 0..output.transmit_queues_in_use(),
                namespace: None,
            }),
            zero_copy: args.zero_copy,
        };
        let mut port = Port::open(&config);
        if let Err(PortError::Socket { source, .. }) = &port
            && config.zero_copy
        {
            say!(
                "no zero-copy between {} and {} ({source}): packets are copied instead",
                device.name,
                output.name
            );
            config.zero_copy = false;
            port = Port::open(&config);
        }
        match port {
            Ok(port) => ports.push(port),
            Err(PortError::Busy { device, .. } | PortError::NoQueue { device, .. })
                if device == output.name && worker > 0 =>
            {
                let name = &output.name;
                let remedy = format!(
                    "each worker needs a TX queue of its own; `ethtool -L {name} combined {wanted}` gives {name} more where it can (a veth: `ethtool -L {name} rx {wanted} tx {wanted}`)"
                );
                if !placement.fewer_will_do {
                    bail!(
                        "--workers {wanted}: {name} has free TX queues for {worker} of them; {remedy}, or use fewer workers"
                    );
                }
                say!("{worker} workers instead of {wanted}, one for each free TX queue of {name}; {remedy}");
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ports)
}

/// What a mirror port makes impossible: it shows the packets of many hosts, perhaps those of the replay itself.
fn check_span(services: &[ServiceArg]) -> Result<()> {
    if let Some(ServiceArg { service, .. }) = services.iter().find(|s| s.service.online.ip == ANY) {
        bail!(
            "-x {}-{}: a mirror port may show many hosts with that port, the target among them; name the server's address, -x IP:{0}-{1}",
            service.online.port,
            service.target
        );
    }
    let is_copied = |one: &&ServiceArg| {
        services
            .iter()
            .any(|other| (other.protocol, other.service.online) == (one.protocol, one.service.target))
    };
    if let Some(ServiceArg { service, .. }) = services.iter().find(is_copied) {
        bail!(
            "-x: {} is copied to {}, which is copied itself: if the mirror port shows it, the copies are copied again; start one replayer for each",
            service.online,
            service.target
        );
    }
    Ok(())
}

/// Which worker a connection comes to is decided by the NIC, so ports of a client's own address cannot be shared out.
fn check_span_workers(args: &OnlineArgs, device: &Device, workers: u32) -> Result<()> {
    if workers > 1 && args.replay.copies.0 > 1_000_000 && args.replay.pool.is_empty() {
        let name = &device.name;
        bail!(
            "-n with {workers} workers on a mirror port: each needs addresses of its own for the copies; give them with -c, or give {name} one \
             receive queue by `ethtool -L {name} combined 1` (`rx 1` where `ethtool -l {name}` shows no combined ones)"
        );
    }
    Ok(())
}

/// The device that sends. A target whose next hop does not answer may come up later; one without a route is a mistake.
pub(crate) fn output_device(
    network: &mut Network,
    replay: &ReplayArgs,
    services: &[ServiceArg],
) -> Result<Device> {
    let output = replay.output_interface.as_deref();
    let mut chosen: Option<Device> = None;
    for service in services {
        let target = to_std(&service.service.target.ip);
        let link = network.resolve(target, output, NEXT_HOP_PATIENCE);
        let device = match link.and_then(|link| link.tagged(replay.tags())) {
            Ok(link) => network.device_by_index(link.ifindex)?,
            Err(error @ NetError::Unresolved { .. }) => {
                caution!("{error}; going on, packets to it are counted as segments_no_link until then");
                let NetError::Unresolved { device, .. } = error else { continue };
                network.device(&device)?
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(other) = &chosen
            && other.ifindex != device.ifindex
        {
            bail!(
                "the targets are reached through different interfaces, {} and {}; start one replayer for each, or name one with -o",
                other.name,
                device.name
            );
        }
        chosen = Some(device);
    }
    chosen.context("-x names no service")
}

/// The end of a check that has found everything else: whether something listens where copies of TCP go.
pub(crate) fn conclude_check(services: &[ServiceArg]) -> Result<()> {
    for service in services.iter().filter(|service| service.protocol == Protocol::Tcp) {
        let target = service.service.target.to_std();
        match TcpStream::connect_timeout(&target, TARGET_PATIENCE) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                bail!(
                    "nothing listens on {target}: start the server under test, or name another target with -x"
                )
            }
            Err(error) => caution!(
                "{target} does not answer this host itself ({error}): where it sends everything to an assistant, that is as it \
                 should be; else it is down, or a firewall is on the path"
            ),
        }
    }
    say!("everything is there; on the target, `ip route get CLIENT` has to lead to an assistant");
    Ok(())
}

fn capture_device(network: &mut Network, args: &OnlineArgs, services: &[ServiceArg]) -> Result<Device> {
    let device = match &args.interface {
        Some(name) => network.device(name)?,
        None => {
            let source = services.iter().map(|service| service.service.online.ip).find(|ip| *ip != ANY);
            network
                .find_capture_interface(source.as_ref().map(to_std), to_std(&services[0].service.target.ip))?
        }
    };
    if !device.up {
        return Err(NetError::Down { name: device.name }.into());
    }
    Ok(device)
}

fn open_connections(ports: &[u16]) -> Vec<Connection> {
    server_connections::established(ports).unwrap_or_else(|error| {
        caution!(
            "the open connections cannot be looked up ({error}); each is joined at its second request from now on"
        );
        Vec::new()
    })
}

type Pairs = Vec<(Endpoint, Endpoint)>;

/// Those of the connections whose packets capture gives to a worker.
fn of_worker(worker: u32, workers: u32, connections: &Pairs) -> Pairs {
    let is_its = |client: &Endpoint| flow_hash(FLOW_SEED, &client.ip, client.port) % workers == worker;
    connections.iter().filter(|(client, _)| is_its(client)).copied().collect()
}

/// The connections whose next data starts a turn. The first have received nothing between the two looks, so whatever is captured of
/// them is that next data. Of the others something arrived meanwhile, which may be the end of a request: what is captured of
/// them before the second look does not count.
fn between_turns(earlier: &[Connection], later: &[Connection]) -> (Pairs, Pairs) {
    let earlier: HashMap<_, _> =
        earlier.iter().map(|c| ((c.client.to_std(), c.server.to_std()), c)).collect();
    let mut quiet = Vec::new();
    let mut others = Vec::new();
    for connection in later.iter().filter(|connection| connection.between_turns) {
        let before = earlier.get(&(connection.client.to_std(), connection.server.to_std()));
        let unchanged =
            before.is_some_and(|before| before.between_turns && before.received == connection.received);
        let list = if unchanged { &mut quiet } else { &mut others };
        list.push((connection.client, connection.server));
    }
    (quiet, others)
}

/// Those that were in the middle of a request at the look before, and are between two at this one.
fn between_turns_now(before: &[Connection], now: &[Connection]) -> Pairs {
    let pair = |connection: &Connection| (connection.client, connection.server);
    let busy: HashSet<_> = before.iter().filter(|connection| !connection.between_turns).map(pair).collect();
    now.iter().filter(|connection| connection.between_turns).map(pair).filter(|c| busy.contains(c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::addr::from_v4;

    #[test]
    fn only_those_are_looked_up_again_that_were_in_the_middle_of_a_request() {
        let at = |port: u16, between_turns: bool| Connection {
            client: Endpoint { ip: from_v4([192, 0, 2, 1]), port },
            server: Endpoint { ip: from_v4([192, 0, 2, 2]), port: 80 },
            between_turns,
            received: 1,
        };
        let before = [at(1, true), at(2, false), at(3, false), at(4, false)];
        let now = [at(1, true), at(2, true), at(3, false), at(5, true)];
        assert_eq!(between_turns_now(&before, &now), [(at(2, true).client, at(2, true).server)]);
    }

    #[test]
    fn b044_a_ramp_only_grows_and_ends_at_the_sample() {
        let ramp = Ramp::new(10, 0, sample_threshold(20.0));
        let at = |tenths: u64| ramp.threshold(Duration::from_millis(100 * tenths));
        assert_eq!(at(0), 0);
        assert!((0..150).all(|tenths| at(tenths) <= at(tenths + 1)));
        assert_eq!(at(50), sample_threshold(10.0));
        assert_eq!((at(100), at(1000)), (ramp.full, ramp.full));
        assert_eq!(Ramp::new(0, 0, 7).threshold(Duration::ZERO), 7);
        // To a larger share while it runs: from what there is.
        let ramp = Ramp::new(10, sample_threshold(20.0), sample_threshold(40.0));
        let at = |seconds| ramp.threshold(Duration::from_secs(seconds));
        assert_eq!([at(0), at(5), at(10)], [20.0, 30.0, 40.0].map(sample_threshold));
    }
}
