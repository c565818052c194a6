//! The assistant: a black hole for the target's responses, which returns their headers to the workers that replay.
//!
//! ```text
//!   NIC ─► XDP `responses` ─► AF_XDP ring ─► parse ─► Routing ─► a peer's queue ─► TCP ─► worker
//!          cut to headers                              ▲  │
//!          all else: the kernel's              Register  Early (waits for its registration)
//! ```
//!
//! One thread and one poll(2). A turn of the loop reads what the peers sent (registrations come before the responses to
//! them), takes what is in the rings, and writes once to each peer. Under load it pauses between turns, so that each
//! carries many records ([`crate::moderation`]); idle, it sleeps in poll(2) and wakes once a second to send heartbeats, or every
//! ten seconds when there is no peer.
//!
//! - [`blackhole`]: the XDP program and the AF_XDP sockets; [`pin`]: how it stays when the process is killed
//! - [`routing`]: whose response is it; [`early`]: responses that overtook their registration
//! - [`host`]: interfaces, addresses, forwarding
//! - [`report`]: what was counted

pub mod blackhole;
pub mod early;
pub mod host;
pub mod pin;
pub mod report;
pub mod routing;

use crate::channel::limits::DEFAULT_PORT;
use crate::channel::{Server, ServerConfig};
use crate::cli::Role;
use crate::cli::values::STATS;
use crate::clock;
use crate::configuration::{ConfigArg, Configuration};
use crate::metrics::{self, Metrics};
use crate::moderation::{Moderation, Next};
use crate::privileges::{self, Keep};
use crate::report::Identity;
use crate::say::{self, caution, plain, say, told};
use crate::signals::{Asked, Signals};
use anyhow::{Context, Result, anyhow, bail};
use blackhole::BlackHole;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pin::Pin;
use replayer_common::addr::Endpoint;
use replayer_common::packet::{self, PROTOCOL_UDP, Protocol, Reject, TcpSegment, UdpDatagram};
use replayer_common::response::ResponseHeader;
use replayer_common::tcp_options;
use report::{Now, Report};
use routing::{Route, Routing, TargetChange};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// Between two looks at this host's addresses, and at the interface, ns.
const HOST_INTERVAL: u64 = 10_000_000_000;

/// Between two calls of [`Routing::tick`], ns.
const TICK: u64 = 1_000_000_000;

/// Options of `replayer assistant`.
#[derive(Clone, Debug, clap::Args)]
pub struct AssistantArgs {
    /// A file with more of them.
    #[command(flatten)]
    pub config: ConfigArg,
    /// The interface on which the target's responses arrive [default: the only one that is up]
    #[arg(short = 'i', long, value_name = "IFACE")]
    pub interface: Option<String>,
    /// The TCP port to which the online role connects
    #[arg(short, long, default_value_t = DEFAULT_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// The local address to listen on [default: all]
    #[arg(long, value_name = "IP")]
    pub listen: Option<IpAddr>,
    /// A shared key: only online roles that were given the same one are served. From the environment it does not show in the list of processes
    #[arg(long, env = "REPLAYER_KEY", hide_env_values = true, default_value = "", hide_default_value = true)]
    pub key: String,
    /// Start even though this host forwards IP packets
    #[arg(long)]
    pub allow_forwarding: bool,
    /// Go on dropping the target's responses if this process is killed, or fails, until it is started again: FILE, on a BPF file system, keeps
    /// the program in its place. A clean stop removes it [default of FILE: /sys/fs/bpf/replayer/assistant-IFACE]
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub keep_dropping: Option<Option<PathBuf>>,
    /// Use zero-copy sockets, where the driver supports them
    #[arg(long)]
    pub zero_copy: bool,
    /// The same as `replayer check assistant`
    #[arg(long, hide = true)]
    pub check: bool,
    /// Write all counters to this file as JSON when the role stops, and on SIGHUP
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Serve the figures to Prometheus at this address, as http://IP:PORT/metrics
    #[arg(long, value_name = "IP:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Print a line of counters this often, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(STATS))]
    pub stats: Option<u32>,
}

/// Keys of `--config` that a running role takes over.
const LIVE: [&str; 3] = ["key", "report", "stats"];

/// Runs the role until SIGTERM or SIGINT. SIGHUP has the configuration read again, the report written as it is then, and this host's addresses
/// looked up anew.
///
/// # Errors
/// With cause and remedy: what keeps it from starting (interface, forwarding, permission, port), or from going on (the
/// interface is gone), or from writing its report; when a frame is in no account.
pub fn run(mut args: AssistantArgs, configuration: Configuration) -> Result<()> {
    crate::report::check_writable(args.report.as_deref())?;
    let interface = host::choose_interface(args.interface.as_deref())?;
    if !args.allow_forwarding {
        host::refuse_forwarding(&interface)?;
    }
    let ifindex = if_nametoindex(interface.as_str()).with_context(|| format!("interface {interface}"))?;
    let signals = Signals::install()?;
    let server = Server::bind(ServerConfig {
        address: args.listen,
        port: args.port,
        key: args.key.clone().into_bytes(),
    })?;
    let metrics = Metrics::serve(args.metrics)?;
    let listening = server.local_addr().context("cannot read the address that it listens on")?;
    let keep = args.keep_dropping.is_some();
    let pin = Pin::new(args.keep_dropping.as_ref().and_then(Option::as_deref), &interface);
    if args.check {
        BlackHole::check(&interface, args.zero_copy, &pin, keep)?;
        say!("everything is there: {interface} for the target's responses, {listening} for online roles");
        return Ok(());
    }
    // Pauses are a fraction of a millisecond: the default slack of 50 us would stretch them.
    nix::sys::prctl::set_timerslack(1_000).context("cannot set the timer slack")?;
    signals.clean_from_here();
    let blackhole = BlackHole::open(&interface, args.zero_copy, &host::local_addresses()?, pin, keep)?;
    let mut routing = Routing::new(crate::channel::random_instance());
    for (protocol, target) in blackhole.targets() {
        routing.inherit(clock::now(), protocol, target);
    }
    privileges::drop_all_but(if args.report.is_some() { Keep::Writing } else { Keep::Nothing });
    configuration.say_if_out_of_reach();
    say::ready(format_args!(
        "takes responses at {interface}, {}; listens on {listening}{}{}",
        blackhole.mode(),
        if args.key.is_empty() { ", without a key" } else { "" },
        blackhole.file().map_or_else(String::new, |file| format!(
            "; if it is killed, {} keeps dropping them",
            file.display()
        ))
    ));
    let mut assistant = Assistant {
        configuration,
        interface,
        ifindex,
        server,
        routing,
        blackhole,
        moderation: Moderation::new(LONGEST_PAUSE),
        frames: Frames::default(),
        start: clock::now(),
        last_tick: 0,
        last_look: clock::now(),
        forwards: args.allow_forwarding,
    };
    let mut writer = InterimWriter::default();
    let ended = assistant.serve(&mut args, &signals, metrics.as_ref(), &mut writer);
    writer.wait();
    // First of all: whatever else fails, a clean stop ends it, and after another one it is said how to.
    let let_go = match (&ended, assistant.blackhole.file()) {
        (Ok(()), _) => assistant.blackhole.let_go(),
        (Err(_), Some(file)) => {
            let file = file.display();
            caution!("the target's responses go on being dropped: `rm {file}` ends that");
            Ok(())
        }
        (Err(_), None) => Ok(()),
    };
    let reported = assistant.report().and_then(|report| {
        plain!("{}", report.to_string().trim_end());
        let accounts = report.identities();
        let write = |path| crate::report::write(path, &report, &accounts);
        let written = args.report.as_deref().map_or(Ok(()), write);
        // A turn that failed may have left frames in no account.
        let accounted =
            if ended.is_ok() { accounts.into_iter().try_for_each(Identity::ensure) } else { Ok(()) };
        all([written, accounted])
    });
    all([ended, let_go, reported])
}

/// What went wrong, all of it, in one message.
fn all(results: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let both = |before: Result<()>, result: Result<()>| match (before, result) {
        (Err(before), Err(error)) => Err(anyhow!("{}; and {}", told(&before), told(&error))),
        (before, result) => before.and(result),
    };
    results.into_iter().fold(Ok(()), both)
}

/// The longest pause, ns: at a million records a second the rings, 4096 places each, do not overflow meanwhile; and one
/// that a handshake does not notice.
const LONGEST_PAUSE: u64 = 1_000_000;

/// What became of the frames before routing.
#[derive(Default)]
struct Frames {
    received: u64,
    rejected: [u64; REJECTS.len()],
}

const REJECTS: [Reject; 6] = [
    Reject::Truncated,
    Reject::NotIp,
    Reject::NotTcp,
    Reject::Fragment,
    Reject::Malformed,
    Reject::ExtensionHeaders,
];

struct Assistant {
    configuration: Configuration,
    interface: String,
    ifindex: u32,
    server: Server,
    routing: Routing,
    blackhole: BlackHole,
    moderation: Moderation,
    frames: Frames,
    start: u64,
    last_tick: u64,
    last_look: u64,
    /// That this host forwards was said, or is allowed.
    forwards: bool,
}

impl Assistant {
    /// Turns until a signal comes.
    fn serve(
        &mut self,
        args: &mut AssistantArgs,
        signals: &Signals,
        metrics: Option<&Metrics>,
        writer: &mut InterimWriter,
    ) -> Result<()> {
        let interval = |args: &AssistantArgs| args.stats.map(|seconds| u64::from(seconds) * 1_000_000_000);
        let mut stats = interval(args);
        let mut next_stats = stats.map_or(u64::MAX, |interval| clock::now() + interval);
        let mut next_metrics = metrics.map_or(u64::MAX, |_| clock::now());
        let mut more = false;
        let mut ready = Vec::new();
        loop {
            let now = clock::now();
            let wait = if more || self.routing.is_sweeping() {
                0
            } else {
                match self.moderation.next(now, self.routing.is_hurried(now)) {
                    Next::Wait => self.deadline().min(next_stats).min(next_metrics).saturating_sub(now),
                    Next::Pause(pause) => {
                        clock::sleep(pause);
                        0
                    }
                    Next::Spin => {
                        std::thread::yield_now();
                        0
                    }
                }
            };
            let Ready { signal, broken } = self.wait(signals, wait, &mut ready)?;
            let asked = if signal { signals.take() } else { None };
            if asked == Some(Asked::Stop) {
                return Ok(());
            }
            more = self.turn(&ready)?;
            let now = clock::now();
            if broken || asked == Some(Asked::Reload) || now >= self.last_look + HOST_INTERVAL {
                self.look_at_host(now)?;
            }
            if asked == Some(Asked::Reload) {
                self.reload(args);
                if stats != interval(args) {
                    stats = interval(args);
                    next_stats = stats.map_or(u64::MAX, |interval| now + interval);
                }
                writer.write(args.report.clone(), self.report()?);
            }
            if let Some(metrics) = metrics
                && now >= next_metrics
            {
                next_metrics = now + metrics::INTERVAL.as_nanos() as u64;
                metrics.publish(metrics::of_assistant(&self.report()?));
            }
            if let Some(interval) = stats
                && now >= next_stats
            {
                next_stats = now + interval;
                say!("{}", self.report()?.line());
            }
        }
    }

    /// Takes over what the configuration file says now, as far as nobody notices.
    fn reload(&mut self, args: &mut AssistantArgs) {
        let Assistant { configuration, server, .. } = self;
        configuration.reload(&LIVE, |role| {
            let Some(Role::Assistant(new)) = role else { return Ok(()) };
            crate::report::check_writable(new.report.as_deref())?;
            server.set_key(new.key.clone().into_bytes())?;
            (args.key, args.report, args.stats) = (new.key, new.report, new.stats);
            Ok(())
        });
    }

    /// When the next turn is due if nothing happens.
    fn deadline(&self) -> u64 {
        let routing = if self.routing.is_busy() { self.last_tick + TICK } else { u64::MAX };
        // Idle too: the kernel does not wake who waits for packets of an interface that is gone.
        routing.min(self.last_look + HOST_INTERVAL).min(self.server.deadline().unwrap_or(u64::MAX))
    }

    /// Waits at most `ns` for anything; `ready` answers the server's interests.
    fn wait(&self, signals: &Signals, ns: u64, ready: &mut Vec<PollFlags>) -> Result<Ready> {
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.blackhole.fds().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let peers = fds.len();
        fds.extend(self.server.interests());
        let timeout = if ns == u64::MAX {
            PollTimeout::NONE
        } else {
            PollTimeout::try_from(ns.div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
        };
        ready.clear();
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            // If the signal was ours, the next call finds its byte in the pipe.
            Err(nix::errno::Errno::EINTR) => return Ok(Ready { signal: false, broken: false }),
            Err(error) => return Err(error).context("cannot wait for packets and peers"),
        }
        let flags = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        ready.extend(fds[peers..].iter().map(flags));
        let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        Ok(Ready {
            signal: !flags(&fds[0]).is_empty(),
            broken: fds[1..peers].iter().any(|fd| flags(fd).intersects(broken)),
        })
    }

    /// Peers, rings, peers. Returns whether the rings hold more.
    fn turn(&mut self, ready: &[PollFlags]) -> Result<bool> {
        let now = clock::now();
        self.server.drive(now, ready, &mut self.routing);
        if now >= self.last_tick + TICK {
            self.last_tick = now;
            self.routing.tick(now);
        }
        self.routing.work();
        for change in self.routing.take_changes() {
            // Before the flush below: a worker learns that it is welcome when its targets' responses are taken.
            match change {
                TargetChange::Add(protocol, target) => {
                    log::info!("taking the responses of {target} ({})", name(protocol));
                    self.blackhole.add_target(protocol, &target)?;
                }
                TargetChange::Remove(protocol, target) => {
                    log::info!("leaving the responses of {target} ({}) alone again", name(protocol));
                    self.blackhole.remove_target(protocol, &target)?;
                }
            }
        }
        let Assistant { blackhole, server, routing, moderation, frames, .. } = self;
        let more = blackhole.receive(|frame| {
            frames.received += 1;
            match parse(frame) {
                Ok((protocol, source, mut header)) => {
                    moderation.record(header.port, header.addr[15]);
                    if let Route::Peer(peer) = routing.route(now, protocol, &source, &mut header) {
                        server.send(peer, &header);
                    }
                }
                Err(reject) => {
                    if let Some(at) = REJECTS.iter().position(|&known| known == reject) {
                        frames.rejected[at] += 1;
                    }
                }
            }
        });
        self.server.flush(now, &mut self.routing);
        Ok(more)
    }

    /// The interface may have gone, addresses may have changed.
    fn look_at_host(&mut self, now: u64) -> Result<()> {
        self.last_look = now;
        // One of the same name may have taken its place, without the program.
        if if_nametoindex(self.interface.as_str()) != Ok(self.ifindex) {
            // What is attached to nothing is nothing to be taken over.
            if let Err(error) = self.blackhole.let_go() {
                caution!("{}", told(&error));
            }
            bail!(
                "interface {} is gone, and the target's responses with it; start the assistant again when it is back",
                self.interface
            );
        }
        let on = host::forwarding(&self.interface);
        if !on.is_empty() && !std::mem::replace(&mut self.forwards, true) {
            caution!(
                "this host forwards IP packets since a moment ago: if the assistant stops, the target's responses are routed to the real clients. \
                 Switch forwarding off with `sysctl -w {}`, or start the assistant with --allow-forwarding if no client can be reached from \
                 here, and with --keep-dropping too if one can",
                on.join(" ")
            );
        }
        self.blackhole.set_local_addresses(&host::local_addresses()?)
    }

    fn report(&self) -> Result<Report> {
        let socket = self.blackhole.statistics()?;
        let rejected: BTreeMap<_, _> =
            REJECTS.iter().zip(self.frames.rejected).map(|(reject, count)| (reject.name(), count)).collect();
        Ok(Report {
            role: "assistant",
            interface: self.interface.clone(),
            mode: self.blackhole.mode(),
            seconds: clock::now().saturating_sub(self.start) as f64 / 1e9,
            received: self.frames.received,
            rejected,
            waiting: self.routing.waiting() as u64,
            dropped_by_kernel: socket.lost(),
            dropped_ring_full: socket.rx_ring_full,
            verdicts: self.blackhole.verdicts()?,
            routing: *self.routing.counters(),
            channel: *self.server.counters(),
            now: Now {
                targets: self.routing.targets() as u64,
                workers: self.routing.workers() as u64,
                registrations: self.routing.registrations() as u64,
                table_bytes: self.routing.table_bytes() as u64,
            },
        })
    }
}

/// Writes reports of a role that goes on, in a thread of its own: responses do not wait for a disk.
#[derive(Default)]
struct InterimWriter {
    thread: Option<JoinHandle<()>>,
}

impl InterimWriter {
    fn write(&mut self, path: Option<PathBuf>, report: Report) {
        if self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            say!("SIGHUP: the report of the one before is still being written");
            return;
        }
        let write = move || crate::report::write_interim(path.as_deref(), &report);
        match std::thread::Builder::new().name("report".into()).spawn(write) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => caution!("no thread to write the report with: {error}"),
        }
    }

    /// So that the last report is the last one.
    fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It has no way to panic.
            let _ = thread.join();
        }
    }
}

/// What a wait found.
struct Ready {
    signal: bool,
    /// A ring's socket reports an error: the interface may be gone.
    broken: bool,
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    }
}

/// The protocol of a frame, where it comes from, and its headers as they are returned.
fn parse(frame: &[u8]) -> Result<(Protocol, Endpoint, ResponseHeader), Reject> {
    let packet = packet::locate(&frame)?;
    if packet.protocol == PROTOCOL_UDP {
        let UdpDatagram { src, src_port, dst, dst_port, payload_len, .. } = packet.udp(&frame)?;
        let header = ResponseHeader { port: dst_port, addr: dst, payload_len, ..Default::default() };
        return Ok((Protocol::Udp, Endpoint { ip: src, port: src_port }, header));
    }
    let segment = packet.tcp(&frame)?;
    let source = Endpoint { ip: segment.src, port: segment.src_port };
    Ok((Protocol::Tcp, source, header_of(&segment, frame)))
}

/// A segment's headers as they are returned. `frame` is the one that it was parsed from.
fn header_of(segment: &TcpSegment, frame: &[u8]) -> ResponseHeader {
    let mut header = ResponseHeader {
        service: 0,
        flags: segment.flags,
        port: segment.dst_port,
        window: segment.window,
        addr: segment.dst,
        seq: segment.seq,
        ack: segment.ack,
        payload_len: segment.payload_len,
        ..Default::default()
    };
    let options = usize::from(segment.tcp_offset) + 20..usize::from(segment.payload_offset);
    header.set_options(&tcp_options::parse(frame.get(options).unwrap_or_default()));
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_is_all_in_the_message() {
        assert!(all([Ok(()), Ok(())]).is_ok());
        let error = all([Err(anyhow!("a")), Ok(()), Err(anyhow!("b").context("c"))]).unwrap_err();
        assert_eq!(error.to_string(), "a; and c: b");
    }
    use replayer_common::addr::from_v4;
    use replayer_common::packet::parse_tcp;
    use replayer_common::response::present;

    #[test]
    fn a_syn_ack_becomes_a_record() {
        let builder = etherparse::PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv4([10, 9, 0, 1], [192, 0, 2, 1], 64)
            .tcp(80, 40_000, 7, 512)
            .syn()
            .ack(9)
            .options(&[
                etherparse::TcpOptionElement::MaximumSegmentSize(1460),
                etherparse::TcpOptionElement::SelectiveAcknowledgementPermitted,
                etherparse::TcpOptionElement::Timestamp(3, 4),
                etherparse::TcpOptionElement::WindowScale(7),
            ])
            .unwrap();
        let mut frame = Vec::new();
        builder.write(&mut frame, b"early data").unwrap();
        let segment = parse_tcp(&&frame[..]).unwrap();
        let header = header_of(&segment, &frame);
        assert_eq!((header.addr, header.port), (from_v4([192, 0, 2, 1]), 40_000));
        assert_eq!((header.seq, header.ack, header.payload_len, header.window), (7, 9, 10, 512));
        assert_eq!((header.mss, header.window_scale, header.ts_val, header.ts_ecr), (1460, 7, 3, 4));
        assert_eq!(
            header.present,
            present::MSS | present::TIMESTAMPS | present::WINDOW_SCALE | present::SACK_PERMITTED
        );
    }

    #[test]
    fn a_datagram_becomes_a_record() {
        let builder = etherparse::PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv4([10, 9, 0, 1], [192, 0, 2, 1], 64)
            .udp(53, 40_000);
        let mut frame = Vec::new();
        builder.write(&mut frame, b"an answer").unwrap();
        // As the program cuts it.
        frame.truncate(14 + 20 + 8);
        let (protocol, source, header) = parse(&frame).unwrap();
        assert_eq!((protocol, source.to_string().as_str()), (Protocol::Udp, "10.9.0.1:53"));
        assert_eq!((header.addr, header.port, header.payload_len), (from_v4([192, 0, 2, 1]), 40_000, 9));
    }

    #[test]
    fn every_frame_is_in_one_counter() {
        let mut report = Report { received: 21, waiting: 1, ..Default::default() };
        report.rejected.insert("truncated", 2);
        report.routing.unregistered = 3;
        report.routing.unknown_target = 4;
        report.routing.early_overflow = 5;
        report.channel.records_sent = 6;
        report.identities()[0].ensure().unwrap();
        report.channel.records_dropped = 1;
        assert!(report.identities()[0].ensure().unwrap_err().to_string().contains("please report"));
    }
}
