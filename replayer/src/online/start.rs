//! How the online role starts. Everything stands before the first program is attached to the production interface: what fails before that has
//! touched nothing.

use super::joining::{Pairs, between_turns, between_turns_now, of_worker, open_connections};
use super::ramp::Ramp;
use super::{MOMENT, Online, OnlineArgs, Running};
use crate::afxdp::{Endpoint as PortEndpoint, Port, PortConfig, PortError};
use crate::capture::choice::{self, Facts};
use crate::capture::{Backend, Capture, CaptureArg, Source, span};
use crate::channel::assistants::Assistants;
use crate::channel::random_instance;
use crate::cli::{ReplayArgs, ServiceArg};
use crate::clock;
use crate::configuration::Configuration;
use crate::growth::Growth;
use crate::metrics::Metrics;
use crate::net::{Device, Monitor, NetError, Network};
use crate::placement::{Placement, Workers};
use crate::privileges::{self, Keep};
use crate::reload::Reload;
use crate::say::{self, caution, say};
use crate::server_connections::Connection;
use crate::signals::Signals;
use crate::sizing::{self, Demand, Supply};
use crate::targets::{conclude_check, output_device};
use crate::worker::{Shared, Worker};
use anyhow::{Context, Result, bail};
use core_affinity::CoreId;
use replayer_common::addr::{ANY, to_std};
use replayer_common::hash::sample_threshold;
use replayer_common::packet::Protocol;
use replayer_engine::Engine;
use replayer_engine::config::Limits;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Frames of all workers' ports together, half of them for captured packets that wait for a worker: 128 MiB. Data that waits for the
/// target is not held in them.
const FRAMES: u32 = 65_536;
/// Frames of a worker's port at least, for its bursts.
const FRAMES_MIN: u32 = 16_384;
/// An Ethernet header with two VLAN tags.
const ETHERNET_HEADER: u32 = 22;

impl Online {
    /// `None`: everything was found to be there, and that is all that was asked for, or a signal came.
    pub(super) fn start(
        args: &OnlineArgs,
        configuration: Configuration,
        signals: &Signals,
    ) -> Result<Option<Online>> {
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
