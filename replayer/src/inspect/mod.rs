//! `replayer inspect`: what capture files hold: services, connections, requests, bytes, holes; what of it can be replayed, what cannot,
//! and why.
//!
//! It looks at both directions and at no target: a dry run (`replayer offline --dry-run`) asks the engine itself. A request is a turn: a
//! run of client data that depends on no new response data.
//!
//! - `connection`: a client's stream, put in order
//! - [`report`]: what is told of it

use crate::pcap::link::LinkType;
use crate::pcap::{Files, Order, Packet};
use crate::say::{self, show, to_terminal};
use anyhow::{Context, Result, bail};
use clap::Args;
use replayer_common::addr::Endpoint;
use replayer_common::packet::{PROTOCOL_UDP, TcpSegment, UdpDatagram, flags, locate};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

mod connection;
pub mod report;

use connection::Connection;
use report::{Service, Udp, Unusable};

pub use report::Report;

/// Connections followed at once; those that have ended make room, then those that are silent.
const MAX_CONNECTIONS: usize = 1 << 20;
/// A connection that is silent for so long makes room when there are too many.
const SILENT_NS: u64 = 60_000_000_000;
/// Services that are listed, of TCP and of UDP.
const MAX_LISTED: usize = 10_000;
/// How often progress is shown on a terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// How many packets are read between two looks at the clock.
const PROGRESS_PACKETS: u64 = 1 << 16;

/// Arguments of `replayer inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Capture files (pcap or pcapng, also compressed by gzip, xz or zstd), or - for standard input; several are read as one, merged by time.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,

    /// Read the files one after the other instead of merging them by time.
    #[arg(long)]
    pub sequential: bool,

    /// Print everything as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Prints what the files hold.
///
/// # Errors
/// When a file cannot be read to its end: what was before that is printed all the same.
pub fn run(args: &InspectArgs) -> Result<()> {
    let order = if args.sequential { Order::Sequential } else { Order::Merged };
    let mut files = Files::open(&args.files, order)?;
    let report = inspect(&mut files, to_terminal());
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() };
    // The terminal shows no progress any more.
    say::finish();
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it, `head` for one, has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        written => written.context("write to standard output")?,
    }
    match files.problems() {
        [] => Ok(()),
        [first, ..] => bail!("{first}"),
    }
}

/// Reads the files to their end.
pub fn inspect(files: &mut Files, show_progress: bool) -> Report {
    let mut inspection = Inspection::default();
    let progress = files.progress();
    let started = Instant::now();
    let mut shown_at = started;
    while files.advance() {
        let Some(packet) = files.packet() else { break };
        inspection.packet(&packet);
        if show_progress
            && inspection.report.packets.is_multiple_of(PROGRESS_PACKETS)
            && shown_at.elapsed() >= PROGRESS_INTERVAL
        {
            shown_at = Instant::now();
            show!(
                "\r\x1b[K{}",
                progress_line(progress.read(), progress.size(), inspection.report.packets, started)
            );
        }
    }
    if shown_at != started {
        show!("\r\x1b[K");
    }
    inspection.report.problems = files.problems().iter().map(ToString::to_string).collect();
    inspection.finish()
}

/// How far it is, for a person: `done` bytes of `size`, and so many packets.
pub fn progress_line(done: u64, size: Option<u64>, packets: u64, started: Instant) -> String {
    let seconds = started.elapsed().as_secs_f64().max(0.001);
    let mut line = format!("{packets} packets, {:.0}/s", packets as f64 / seconds);
    if let Some(size) = size.filter(|&size| size > 0) {
        let share = (done as f64 / size as f64).clamp(0.0, 1.0);
        let _ = write!(line, ", {:.1} % of {:.1} MB", share * 100.0, size as f64 / 1e6);
        if share > 0.0 {
            let _ = write!(line, ", {:.0} s left", seconds * (1.0 - share) / share);
        }
    } else {
        let _ = write!(line, ", {:.1} MB", done as f64 / 1e6);
    }
    line
}

/// Client and server.
type Pair = (Endpoint, Endpoint);

#[derive(Default)]
struct Inspection {
    report: Report,
    times: Option<(u64, u64)>,
    last_time_ns: u64,
    connections: HashMap<Pair, Connection>,
    services: HashMap<Endpoint, (Service, u64)>,
    udp: HashMap<Endpoint, Udp>,
    /// Of UDP; those beyond [`MAX_CONNECTIONS`] are taken by their ports.
    flows: HashSet<Pair>,
    links: HashMap<LinkType, u64>,
    rejects: BTreeMap<Unusable, u64>,
    scratch: Vec<u8>,
}

impl Inspection {
    fn packet(&mut self, packet: &Packet<'_>) {
        let report = &mut self.report;
        report.packets += 1;
        report.captured_bytes += packet.data.len() as u64;
        report.wire_bytes += u64::from(packet.wire_len).max(packet.data.len() as u64);
        if (packet.data.len() as u64) < u64::from(packet.wire_len) {
            report.truncated_packets += 1;
            report.first_truncated.get_or_insert(packet.number);
        }
        report.out_of_time_order += u64::from(packet.time_ns < self.last_time_ns);
        self.last_time_ns = packet.time_ns;
        let (first, last) = self.times.get_or_insert((packet.time_ns, packet.time_ns));
        (*first, *last) = ((*first).min(packet.time_ns), (*last).max(packet.time_ns));
        *self.links.entry(packet.link).or_default() += 1;

        let mut scratch = std::mem::take(&mut self.scratch);
        let reject = match packet.link.ethernet(packet.data, &mut scratch) {
            Some(frame) => self.frame(frame, packet.time_ns).err(),
            None => Some(if packet.link.is_known() { Unusable::Truncated } else { Unusable::LinkType }),
        };
        self.scratch = scratch;
        if let Some(reject) = reject {
            *self.rejects.entry(reject).or_default() += 1;
        }
    }

    fn frame(&mut self, frame: &[u8], time_ns: u64) -> Result<(), Unusable> {
        let ip = locate(&frame)?;
        if ip.protocol == PROTOCOL_UDP && !ip.fragment {
            let datagram = ip.udp(&frame)?;
            let whole = usize::from(datagram.payload_offset) + datagram.payload_len as usize <= frame.len();
            return self.datagram(&datagram, whole);
        }
        let segment = ip.tcp(&frame)?;
        let payload = frame.get(usize::from(segment.payload_offset)..).unwrap_or(&[]);
        let captured = payload.len().min(segment.payload_len as usize);
        self.segment(&segment, &payload[..captured], time_ns);
        Ok(())
    }

    fn datagram(&mut self, datagram: &UdpDatagram, whole: bool) -> Result<(), Unusable> {
        let source = Endpoint { ip: datagram.src, port: datagram.src_port };
        let destination = Endpoint { ip: datagram.dst, port: datagram.dst_port };
        let from_client = if self.flows.contains(&(source, destination)) {
            true
        } else if self.flows.contains(&(destination, source)) {
            false
        } else if self.udp.contains_key(&destination) != self.udp.contains_key(&source) {
            self.udp.contains_key(&destination)
        } else {
            // Servers have the lower port, but for a few.
            destination.port <= source.port
        };
        let (client, server) = if from_client { (source, destination) } else { (destination, source) };
        if self.udp.len() >= MAX_LISTED && !self.udp.contains_key(&server) {
            return Err(Unusable::TooManyServices);
        }
        let service = self.udp.entry(server).or_default();
        if self.flows.len() < MAX_CONNECTIONS && self.flows.insert((client, server)) {
            service.clients += 1;
        }
        let payload_len = u64::from(datagram.payload_len);
        if from_client {
            service.datagrams += 1;
            service.client_bytes += payload_len;
            service.truncated += u64::from(!whole);
        } else {
            service.responses += 1;
            service.server_bytes += payload_len;
        }
        Ok(())
    }

    fn segment(&mut self, segment: &TcpSegment, payload: &[u8], time_ns: u64) {
        let source = Endpoint { ip: segment.src, port: segment.src_port };
        let destination = Endpoint { ip: segment.dst, port: segment.dst_port };
        let from_client = if self.connections.contains_key(&(source, destination)) {
            true
        } else if self.connections.contains_key(&(destination, source)) {
            false
        } else {
            let syn = segment.flags & flags::SYN != 0;
            if !syn && segment.payload_len == 0 {
                // Nothing of it can be told, and nothing of it can be replayed.
                *self.rejects.entry(Unusable::NoConnection).or_default() += 1;
                return;
            }
            if syn {
                segment.flags & flags::ACK == 0
            } else if self.services.contains_key(&destination) != self.services.contains_key(&source) {
                self.services.contains_key(&destination)
            } else {
                // Servers have the lower port, but for a few.
                segment.dst_port <= segment.src_port
            }
        };
        let pair = if from_client { (source, destination) } else { (destination, source) };
        if !self.connections.contains_key(&pair) {
            self.make_room(time_ns);
            if !self.begin(pair) {
                *self.rejects.entry(Unusable::TooManyConnections).or_default() += 1;
                return;
            }
        }
        let Some((service, live)) = self.services.get_mut(&pair.1) else { return };
        let Some(connection) = self.connections.get_mut(&pair) else { return };
        if from_client {
            service.client_packets += 1;
            let reused = segment.is_opening() && connection.isn.is_some_and(|isn| isn != segment.seq)
                || segment.is_opening() && connection.isn.is_none() && connection.any_data;
            if reused {
                connection.close(service, live);
                *connection = Connection::default();
                service.connections += 1;
                *live += 1;
                service.concurrent = service.concurrent.max(*live);
            }
            connection.last_seen_ns = time_ns;
            connection.client(service, segment, payload);
        } else {
            service.server_packets += 1;
            connection.last_seen_ns = time_ns;
            connection.server(service, segment);
        }
        if connection.gone() {
            connection.leave(live);
        }
    }

    fn begin(&mut self, pair: Pair) -> bool {
        if self.connections.len() >= MAX_CONNECTIONS
            || self.services.len() >= MAX_LISTED && !self.services.contains_key(&pair.1)
        {
            return false;
        }
        let (service, live) = self.services.entry(pair.1).or_default();
        service.connections += 1;
        *live += 1;
        service.concurrent = service.concurrent.max(*live);
        self.connections.insert(pair, Connection::default());
        true
    }

    /// Forgets connections that are over when there are too many, else silent ones.
    fn make_room(&mut self, time_ns: u64) {
        if self.connections.len() < MAX_CONNECTIONS {
            return;
        }
        let services = &mut self.services;
        let mut forget = |silent: bool, (pair, connection): (&Pair, &mut Connection)| {
            let over =
                connection.gone() || silent && time_ns.saturating_sub(connection.last_seen_ns) > SILENT_NS;
            if over && let Some((service, live)) = services.get_mut(&pair.1) {
                connection.close(service, live);
            }
            !over
        };
        self.connections.retain(|pair, connection| forget(false, (pair, connection)));
        if self.connections.len() > MAX_CONNECTIONS / 4 * 3 {
            self.connections.retain(|pair, connection| forget(true, (pair, connection)));
        }
    }

    fn finish(mut self) -> Report {
        for (pair, connection) in &mut self.connections {
            if let Some((service, live)) = self.services.get_mut(&pair.1) {
                connection.close(service, live);
            }
        }
        let report = &mut self.report;
        if let Some((first, last)) = self.times {
            report.first_time = first as f64 / 1e9;
            report.duration_seconds = (last - first) as f64 / 1e9;
        }
        let rate = |count: f64, duration: f64| if duration > 0.0 { count / duration } else { 0.0 };
        report.packets_per_second = rate(report.packets as f64, report.duration_seconds);
        report.mbit_per_second = rate(report.wire_bytes as f64 * 8e-6, report.duration_seconds);
        for (link, count) in &self.links {
            *report.link_types.entry(link.name().into_owned()).or_default() += count;
        }
        report.not_usable = self.rejects;
        report.services = self
            .services
            .into_iter()
            .map(|(server, (service, _))| Service {
                server: server.to_string(),
                requests_per_second: rate(service.requests as f64, report.duration_seconds),
                ..service
            })
            .collect();
        report.services.sort_by(|a, b| {
            (b.requests, b.connections, &a.server).cmp(&(a.requests, a.connections, &b.server))
        });
        report.udp = self
            .udp
            .into_iter()
            .map(|(server, udp)| Udp {
                server: server.to_string(),
                datagrams_per_second: rate(udp.datagrams as f64, report.duration_seconds),
                ..udp
            })
            .collect();
        report.udp.sort_by(|a, b| (b.datagrams, &a.server).cmp(&(a.datagrams, &b.server)));
        self.report
    }
}
