//! `replayer inspect`: what capture files hold: services, connections, requests, bytes, holes; what of it can be replayed, what cannot,
//! and why.
//!
//! It looks at both directions and at no target: a dry run (`replayer offline --dry-run`) asks the engine itself. A request is a turn: a
//! run of client data that depends on no new response data.

use crate::pcap::link::LinkType;
use crate::pcap::{Files, Order, Packet};
use anyhow::{Context, Result, bail};
use clap::Args;

use crate::say::{show, to_terminal};
use replayer_common::addr::Endpoint;
use replayer_common::packet::{PROTOCOL_UDP, Reject, TcpSegment, UdpDatagram, flags, locate};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Connections followed at once; those that have ended make room, then those that are silent.
const MAX_CONNECTIONS: usize = 1 << 20;
/// A connection that is silent for so long makes room when there are too many.
const SILENT_NS: u64 = 60_000_000_000;
/// Pieces of a stream that wait for a hole to be filled; beyond that the hole counts as one that stays.
const MAX_PIECES: usize = 256;
/// A segment this far from its stream's place is not of this stream; as in the engine.
const MAX_DISTANCE: u32 = 1 << 28;
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

/// What is in the files.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Packets of all kinds.
    pub packets: u64,
    /// Their bytes in the files, and on the wire.
    pub captured_bytes: u64,
    /// More than `captured_bytes` where packets were cut.
    pub wire_bytes: u64,
    /// When the first packet was captured, seconds since the epoch.
    pub first_time: f64,
    /// From the earliest to the latest packet.
    pub duration_seconds: f64,
    /// Over the whole duration.
    pub packets_per_second: f64,
    /// Over the whole duration, of the bytes on the wire.
    pub mbit_per_second: f64,
    /// Packets by link type.
    pub link_types: BTreeMap<String, u64>,
    /// Packets that the capture cut short (a snaplen that is too small), and the number of the first.
    pub truncated_packets: u64,
    /// Its number in its file.
    pub first_truncated: Option<u64>,
    /// Packets whose time is before that of the packet before.
    pub out_of_time_order: u64,
    /// Packets that are no segments or datagrams of a service, by reason.
    pub not_usable: BTreeMap<String, u64>,
    /// The services of UDP, the busiest first.
    pub udp: Vec<Udp>,
    /// The services, the one with most requests first.
    pub services: Vec<Service>,
    /// What was wrong with the files.
    pub problems: Vec<String>,
}

/// What went to a server's UDP port.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Udp {
    /// Address and port of the server.
    pub server: String,
    /// Addresses and ports that sent to it.
    pub clients: u64,
    /// Datagrams of the clients: each is a request.
    pub datagrams: u64,
    /// Over the whole duration.
    pub datagrams_per_second: f64,
    /// Their payload.
    pub client_bytes: u64,
    /// Datagrams of the server, as far as they are in the file.
    pub responses: u64,
    /// Their payload.
    pub server_bytes: u64,
    /// Datagrams of the clients whose payload was cut by the capture: they cannot be replayed.
    pub truncated: u64,
}

/// What went to a server's address and port.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Service {
    /// Address and port of the server.
    pub server: String,
    /// Connections to it.
    pub connections: u64,
    /// Of these, those whose beginning is in the file.
    pub with_beginning: u64,
    /// Of these, those whose end is in the file.
    pub with_end: u64,
    /// Requests: turns of client data.
    pub requests: u64,
    /// Over the whole duration.
    pub requests_per_second: f64,
    /// The most connections at once.
    pub concurrent: u64,
    /// Client data, each byte once.
    pub client_bytes: u64,
    /// Client data that came again.
    pub repeated_bytes: u64,
    /// Response data, as far as it is in the file.
    pub server_bytes: u64,
    /// Packets of the clients.
    pub client_packets: u64,
    /// Packets of the server.
    pub server_packets: u64,
    /// Holes in client streams, and how many bytes are missing there.
    pub holes: u64,
    /// Bytes of the holes, as far as it is known.
    pub missing_bytes: u64,
    /// Requests that a replay can send.
    pub replayable_requests: u64,
    /// Requests, or connections without any, that it cannot, by reason.
    pub not_replayable: BTreeMap<&'static str, u64>,
}

/// The reasons of [`Service::not_replayable`].
mod reason {
    pub(super) const TLS: &str = "tls";
    pub(super) const HOLE: &str = "behind_a_hole";
    pub(super) const MIDSTREAM: &str = "beginning_not_captured";
    pub(super) const TRUNCATED: &str = "cut_by_snaplen";
    pub(super) const NOTHING_SENT: &str = "connections_without_data";

    pub(super) fn what(name: &str) -> &'static str {
        match name {
            TLS => "requests are encrypted (TLS)",
            HOLE => "requests with bytes that were not captured",
            MIDSTREAM => "requests that may have begun before the capture",
            TRUNCATED => {
                "requests whose packets were cut by the capture (capture with a larger snaplen, such as tcpdump -s 0)"
            }
            _ => "connections on which the client sent nothing",
        }
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
    rejects: BTreeMap<&'static str, u64>,
    scratch: Vec<u8>,
}

/// A client's stream, as far as it was seen.
#[derive(Debug, Default)]
struct Connection {
    isn: Option<u32>,
    /// The beginning of its data is known: SYN or SYN-ACK is in the file.
    beginning: bool,
    next_seq: Option<u32>,
    last_ack: Option<u32>,
    /// Begin and end of what lies behind a hole, sorted, with the ACK number of its packet.
    pieces: Vec<(u32, u32, u32)>,
    client_fin: bool,
    server_fin: bool,
    reset: bool,
    tls: bool,
    any_data: bool,
    /// What comes next cannot be replayed, for this reason, until the next turn.
    blocked: Option<&'static str>,
    /// A packet of it was cut: its bytes are a hole.
    truncated: bool,
    last_seen_ns: u64,
    /// It does not count as one of those at once any more.
    left: bool,
    server_next: Option<u32>,
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
            None => Some(if packet.link.is_known() { "truncated" } else { "link_type" }),
        };
        self.scratch = scratch;
        if let Some(reject) = reject {
            *self.rejects.entry(reject).or_default() += 1;
        }
    }

    fn frame(&mut self, frame: &[u8], time_ns: u64) -> Result<(), &'static str> {
        let ip = locate(&frame).map_err(Reject::name)?;
        if ip.protocol == PROTOCOL_UDP && !ip.fragment {
            let datagram = ip.udp(&frame).map_err(Reject::name)?;
            let whole = usize::from(datagram.payload_offset) + datagram.payload_len as usize <= frame.len();
            return self.datagram(&datagram, whole);
        }
        let segment = ip.tcp(&frame).map_err(Reject::name)?;
        let payload = frame.get(usize::from(segment.payload_offset)..).unwrap_or(&[]);
        let captured = payload.len().min(segment.payload_len as usize);
        self.segment(&segment, &payload[..captured], time_ns);
        Ok(())
    }

    fn datagram(&mut self, datagram: &UdpDatagram, whole: bool) -> Result<(), &'static str> {
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
            return Err("too_many_services");
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
                *self.rejects.entry("no_connection").or_default() += 1;
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
                *self.rejects.entry("too_many_connections").or_default() += 1;
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
        if connection.reset || connection.client_fin && connection.server_fin {
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
        report.not_usable = self.rejects.iter().map(|(&name, &count)| (name.to_owned(), count)).collect();
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

fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Connection {
    fn client(&mut self, service: &mut Service, segment: &TcpSegment, payload: &[u8]) {
        let mut seq = segment.seq;
        if segment.flags & flags::RST != 0 {
            self.reset = true;
            return;
        }
        if segment.is_opening() {
            if self.isn.is_none() {
                self.isn = Some(seq);
                self.next_seq = Some(seq.wrapping_add(1));
                if !self.beginning {
                    self.beginning = true;
                    service.with_beginning += 1;
                }
            }
            seq = seq.wrapping_add(1);
        }
        let whole = payload.len() as u32 == segment.payload_len;
        if segment.payload_len > 0 {
            if !whole {
                self.truncated = true;
            }
            self.data(service, seq, segment.ack, payload, whole);
        } else if !self.any_data && segment.flags & flags::ACK != 0 && self.last_ack.is_none() {
            self.last_ack = Some(segment.ack);
        }
        self.client_fin |= segment.flags & flags::FIN != 0;
    }

    fn data(&mut self, service: &mut Service, seq: u32, ack: u32, payload: &[u8], whole: bool) {
        let len = payload.len() as u32;
        let next = *self.next_seq.get_or_insert(seq);
        let ahead = seq.wrapping_sub(next) as i32;
        if ahead.unsigned_abs() > MAX_DISTANCE {
            return;
        }
        if !whole {
            // What was cut away is a hole from the beginning of this packet on: the engine does not take half a packet.
            if ahead >= 0 {
                self.hole(service, ahead as u32 + len, reason::TRUNCATED);
                self.next_seq = Some(seq.wrapping_add(len));
            }
            return;
        }
        if ahead > 0 {
            let at = self.pieces.partition_point(|piece| !before(seq, piece.0));
            if self
                .pieces
                .iter()
                .any(|&(begin, end, _)| !before(seq, begin) && !before(end, seq.wrapping_add(len)))
            {
                service.repeated_bytes += u64::from(len);
                return;
            }
            self.pieces.insert(at, (seq, seq.wrapping_add(len), ack));
            if self.pieces.len() > MAX_PIECES {
                self.give_up_hole(service);
            }
            return;
        }
        let seen = ahead.unsigned_abs().min(len);
        service.repeated_bytes += u64::from(seen);
        if seen < len {
            if !self.any_data && self.beginning {
                self.tls = payload.starts_with(&[0x16, 3]);
            }
            self.in_order(service, ack, len - seen);
        }
        while let Some(&(begin, end, ack)) = self.pieces.first() {
            let Some(next) = self.next_seq else { break };
            if before(next, begin) {
                break;
            }
            self.pieces.remove(0);
            let fresh = end.wrapping_sub(next) as i32;
            let repeated = end.wrapping_sub(begin) - fresh.max(0) as u32;
            service.repeated_bytes += u64::from(repeated);
            if fresh > 0 {
                self.in_order(service, ack, fresh as u32);
            }
        }
    }

    /// New bytes that follow what is there.
    fn in_order(&mut self, service: &mut Service, ack: u32, len: u32) {
        service.client_bytes += u64::from(len);
        self.next_seq = self.next_seq.map(|next| next.wrapping_add(len));
        let answered = self.last_ack.is_some_and(|last| before(last, ack));
        if answered || self.last_ack.is_none() {
            self.last_ack = Some(ack);
        }
        let first = !self.any_data;
        self.any_data = true;
        if !(first || answered) {
            return;
        }
        service.requests += 1;
        let blocked = if self.tls {
            Some(reason::TLS)
        } else if first && !self.beginning {
            Some(reason::MIDSTREAM)
        } else if answered {
            // A new turn: what was before is over.
            self.blocked = None;
            None
        } else {
            self.blocked
        };
        match blocked {
            Some(reason) => *service.not_replayable.entry(reason).or_default() += 1,
            None => service.replayable_requests += 1,
        }
    }

    /// `len` bytes are missing at the end of what is there: the request that they belong to cannot be replayed.
    fn hole(&mut self, service: &mut Service, len: u32, reason: &'static str) {
        service.holes += 1;
        service.missing_bytes += u64::from(len);
        if !self.any_data {
            // It is a request of which nothing was counted yet.
            service.requests += 1;
            self.any_data = true;
            *service.not_replayable.entry(reason).or_default() += 1;
        } else if self.blocked.is_none() && !self.tls {
            if service.replayable_requests > 0 {
                service.replayable_requests -= 1;
            }
            *service.not_replayable.entry(reason).or_default() += 1;
        }
        self.blocked = Some(reason);
    }

    fn give_up_hole(&mut self, service: &mut Service) {
        let pieces = std::mem::take(&mut self.pieces);
        for (begin, end, ack) in pieces {
            let Some(next) = self.next_seq else { return };
            let ahead = begin.wrapping_sub(next) as i32;
            if ahead > 0 {
                let reason = if self.truncated { reason::TRUNCATED } else { reason::HOLE };
                self.hole(service, ahead as u32, reason);
                self.next_seq = Some(begin);
            }
            let fresh = end.wrapping_sub(self.next_seq.unwrap_or(begin)) as i32;
            if fresh > 0 {
                self.in_order(service, ack, fresh as u32);
            }
        }
    }

    fn server(&mut self, service: &mut Service, segment: &TcpSegment) {
        if segment.flags & flags::RST != 0 {
            self.reset = true;
        }
        if segment.flags & flags::SYN != 0 {
            // The SYN may be missing: the SYN-ACK tells where the client's data begins.
            if segment.flags & flags::ACK != 0 && !self.beginning && !self.any_data {
                self.beginning = true;
                service.with_beginning += 1;
                self.next_seq = Some(segment.ack);
                self.last_ack = Some(segment.seq.wrapping_add(1));
            }
            return;
        }
        let end = segment.seq.wrapping_add(segment.payload_len);
        let fresh = match self.server_next {
            Some(next) => (end.wrapping_sub(next) as i32).clamp(0, segment.payload_len as i32) as u32,
            None => segment.payload_len,
        };
        if fresh > 0 || self.server_next.is_none() {
            self.server_next = Some(end);
        }
        service.server_bytes += u64::from(fresh);
        self.server_fin |= segment.flags & flags::FIN != 0;
    }

    fn gone(&self) -> bool {
        self.reset || self.client_fin && self.server_fin
    }

    /// It is no longer one of those at once.
    fn leave(&mut self, live: &mut u64) {
        if !self.left {
            *live = live.saturating_sub(1);
            self.left = true;
        }
    }

    /// Nothing more comes of it.
    fn close(&mut self, service: &mut Service, live: &mut u64) {
        self.give_up_hole(service);
        if self.gone() || self.client_fin || self.server_fin {
            service.with_end += 1;
        }
        if !self.any_data {
            *service.not_replayable.entry(reason::NOTHING_SENT).or_default() += 1;
        }
        self.leave(live);
    }
}

impl Report {
    /// For a person.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let links: Vec<String> =
            self.link_types.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let _ = writeln!(
            text,
            "{} packets ({}) in {:.3} s: {:.0} packets/s, {:.2} Mbit/s",
            self.packets,
            if links.is_empty() { "none".to_owned() } else { links.join(", ") },
            self.duration_seconds,
            self.packets_per_second,
            self.mbit_per_second
        );
        if let Some(first) = self.first_truncated {
            let _ = writeln!(
                text,
                "{} packets are cut short, the first is number {first}: their data cannot be replayed; capture with tcpdump -s 0",
                self.truncated_packets
            );
        }
        for (name, count) in &self.not_usable {
            let _ = writeln!(text, "{count} packets not usable: {}", unusable(name));
        }
        if self.services.is_empty() && self.udp.is_empty() {
            let _ = writeln!(text, "no TCP connection and no UDP datagram is in it");
        }
        for service in &self.services {
            let _ = writeln!(
                text,
                "\n{}: {} connections ({} with their beginning, {} with their end, at most {} at once), {} requests, {:.1}/s\n  \
                 clients sent {} bytes in {} packets, the server {} bytes in {} packets",
                service.server,
                service.connections,
                service.with_beginning,
                service.with_end,
                service.concurrent,
                service.requests,
                service.requests_per_second,
                service.client_bytes,
                service.client_packets,
                service.server_bytes,
                service.server_packets,
            );
            if service.repeated_bytes > 0 {
                let _ = writeln!(text, "  {} bytes were sent again: replayed once", service.repeated_bytes);
            }
            if service.holes > 0 {
                let _ = writeln!(
                    text,
                    "  {} holes in clients' streams, {} bytes missing",
                    service.holes, service.missing_bytes
                );
            }
            let _ = writeln!(text, "  {} requests can be replayed", service.replayable_requests);
            for (&name, count) in &service.not_replayable {
                let _ = writeln!(text, "  {count} not: {}", reason::what(name));
            }
        }
        for udp in &self.udp {
            let _ = writeln!(
                text,
                "\nudp:{}: {} clients, {} datagrams, {:.1}/s\n  \
                 clients sent {} bytes, the server {} bytes in {} datagrams",
                udp.server,
                udp.clients,
                udp.datagrams,
                udp.datagrams_per_second,
                udp.client_bytes,
                udp.server_bytes,
                udp.responses,
            );
            if udp.truncated > 0 {
                let _ = writeln!(text, "  {} datagrams were cut by the capture: not replayed", udp.truncated);
            }
        }
        text
    }
}

fn unusable(name: &str) -> &str {
    match name {
        "link_type" => "of a link type that is not known",
        "not_ip" => "neither IPv4 nor IPv6",
        "not_tcp" => "IP, but neither TCP nor UDP",
        "too_many_services" => "of more UDP services than are listed",
        "fragment" => "IP fragments",
        "truncated" => "cut within their headers",
        "malformed" => "malformed headers",
        "extension_headers" => "more IPv6 extension headers than are followed",
        "no_connection" => "without data, of connections of which nothing else is there",
        "too_many_connections" => "of more connections than are followed at once",
        other => other,
    }
}
