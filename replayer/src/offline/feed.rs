//! The packets of files on their way to the engine: a thread reads ahead, keeps what clients sent to the services, and hands it over in
//! chunks that are used again; the worker's side gives each packet to the engine when it is due.
//!
//! ```text
//! files ─► reader thread: decompress, parse, merge, choose ─► chunks ─► Feed::give: pace ─► frames ─► engine
//!                              ▲                                           │
//!                              └────────────── empty chunks ◄──────────────┘
//! ```
//!
//! What the server said is not replayed, but it tells more of a connection whose beginning is missing: client data that follows a response
//! (or SYN-ACK) without a hole and acknowledges all of it starts a turn, so the connection is joined there.

use super::pace::{Pace, Speed};
use crate::capture::pieces::{Pieces, USUAL};
use crate::pcap::files::Progress;
use crate::pcap::{Files, Order, ReadError};
use anyhow::Result;
use replayer_common::addr::{ANY, Endpoint, Ip};
use replayer_common::hash::{FLOW_SEED, flow_hash, pair_hash};
use replayer_common::packet::{IpPacket, PROTOCOL_UDP, Protocol, Reject, TcpSegment, flags, locate};
use replayer_engine::histogram::Histogram;
use replayer_engine::{BATCH, Engine, Output};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Chunks in all, and what one holds: read ahead is at most 16 MiB.
const CHUNKS: usize = 16;
const CHUNK_BYTES: usize = 1 << 20;
const CHUNK_PACKETS: usize = 4096;
/// Connections whose last packets are remembered, for joining those whose beginning is missing. A connection that is pushed out is joined
/// later, or told of twice.
const REMEMBERED: usize = 1 << 14;
/// No file is longer, ns (ten years): a time beyond that is damaged.
const MAX_SPAN_NS: u64 = 10 * 365 * 86_400 * 1_000_000_000;
/// Where the target sets the pace: its sessions are counted at most so often.
const LOOK_NS: u64 = 1_000_000;
/// Packets whose times in the file are further apart are not given in one batch: holes are timed by batches.
const BATCH_SPAN_NS: u64 = 100_000_000;
/// How often it is shown how far the replay is.
const SHOW_NS: u64 = 50_000_000;
/// A port that is shifted stays on its side of this: servers treat lower ones as privileged.
const FIRST_PORT: u16 = 1024;
/// A step that is coprime to the number of ports: loops that follow each other have ports far apart.
const PORT_STEP: u64 = 25_309;

/// What is read, and how.
#[derive(Clone, Debug)]
pub struct FeedConfig {
    /// The files.
    pub files: Vec<PathBuf>,
    /// How several are one.
    pub order: Order,
    /// Online endpoints of the services.
    pub services: Vec<(Protocol, Endpoint)>,
    /// Connections kept: flow hashes below this (of 2^32), by the addresses in the file.
    pub sample_threshold: u64,
    /// How often; `None`: for ever.
    pub loops: Option<u64>,
    /// What is used of the files, ns after their first packet.
    pub start_ns: u64,
    /// Where it ends.
    pub stop_ns: Option<u64>,
    /// Packets in a frame have at most so many bytes.
    pub frame_room: usize,
}

/// What became of the files' packets before the engine saw any. `packets` is the sum of the others that are packets.
#[derive(Debug, Default)]
pub struct Counters {
    packets: AtomicU64,
    given: AtomicU64,
    cut_to_segments: AtomicU64,
    responses: AtomicU64,
    other: AtomicU64,
    sampled_out: AtomicU64,
    unparsable: AtomicU64,
    fragments: AtomicU64,
    too_large: AtomicU64,
    link_type: AtomicU64,
    outside: AtomicU64,
    truncated: AtomicU64,
    first_truncated: AtomicU64,
    loops: AtomicU64,
}

/// The values of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileFigures {
    /// Packets read.
    pub packets: u64,
    /// Of these, given to the engine: packets of clients to a service.
    pub packets_given: u64,
    /// Packets of a service to its clients: used only to join connections.
    pub packets_responses: u64,
    /// Packets that are neither to nor from a service.
    pub packets_not_service: u64,
    /// Packets of connections outside the sample.
    pub packets_sampled_out: u64,
    /// Packets that are no whole headers of TCP or UDP.
    pub packets_unparsable: u64,
    /// Fragments to a service's address; fragments are not replayed.
    pub packets_fragments: u64,
    /// Datagrams that are larger than a frame: not replayed.
    pub packets_too_large: u64,
    /// Packets of link types that are not known.
    pub packets_link_type: u64,
    /// Packets before --start or after --stop.
    pub packets_outside: u64,
    /// Further packets that came of cutting those that are larger than a frame.
    pub packets_added_by_cutting: u64,
    /// Of the packets given, those that the capture had cut short.
    pub packets_truncated: u64,
    /// The first of them, by its number.
    pub first_truncated: u64,
    /// How often the files were read to their end.
    pub loops: u64,
}

impl Counters {
    fn figures(&self) -> FileFigures {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FileFigures {
            packets: load(&self.packets),
            packets_given: load(&self.given),
            packets_responses: load(&self.responses),
            packets_not_service: load(&self.other),
            packets_sampled_out: load(&self.sampled_out),
            packets_unparsable: load(&self.unparsable),
            packets_fragments: load(&self.fragments),
            packets_too_large: load(&self.too_large),
            packets_link_type: load(&self.link_type),
            packets_outside: load(&self.outside),
            packets_added_by_cutting: load(&self.cut_to_segments),
            packets_truncated: load(&self.truncated),
            first_truncated: load(&self.first_truncated),
            loops: load(&self.loops),
        }
    }
}

/// How far the feed's side is.
#[derive(Debug, Default)]
struct Replayed {
    bytes: AtomicU64,
    packets: AtomicU64,
    lateness: Mutex<Histogram>,
}

/// What the reader thread and the feed show.
#[derive(Debug, Default)]
pub struct Shown {
    counters: Counters,
    /// What was wrong with the files.
    problems: Mutex<Vec<ReadError>>,
    /// Bytes of the files, if known, in one loop.
    size: Mutex<Option<u64>>,
    replayed: Replayed,
    stop: AtomicBool,
    /// The feed's side: everything was given to the engine.
    over: AtomicBool,
}

impl Shown {
    /// The counters now.
    pub fn figures(&self) -> FileFigures {
        self.counters.figures()
    }

    /// Takes what was wrong with the files.
    pub fn take_problems(&self) -> Vec<ReadError> {
        std::mem::take(&mut self.problems.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How far the replay is, in this loop: bytes of the files whose packets were given to the engine, and of all, if known. Reading is
    /// ahead of that.
    pub fn progress(&self) -> (u64, Option<u64>) {
        let size = *self.size.lock().unwrap_or_else(PoisonError::into_inner);
        (self.replayed.bytes.load(Ordering::Relaxed), size)
    }

    /// Packets of the files that are behind that.
    pub fn packets_replayed(&self) -> u64 {
        self.replayed.packets.load(Ordering::Relaxed)
    }

    /// How much later than due packets were given to the engine, microseconds; none where the target sets the pace.
    pub fn lateness(&self) -> Histogram {
        self.replayed.lateness.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether everything was given to the engine.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

#[derive(Clone, Copy, Debug)]
enum Item {
    /// A frame of a client: where it is in the chunk.
    Packet { begin: u32, len: u32, opening: bool },
    /// The next data of this connection starts a turn.
    Turn(Endpoint, Endpoint),
    /// Nothing more comes of the connections before.
    End,
}

#[derive(Debug, Default)]
struct Chunk {
    bytes: Vec<u8>,
    /// With their times in the stream of all loops, ns.
    items: Vec<(u64, Item)>,
    /// How far the files were read at its end, in this loop: bytes, and packets in all loops.
    read: (u64, u64),
}

// ---- the reader thread ----

struct Reading {
    config: FeedConfig,
    shown: Arc<Shown>,
    full: SyncSender<Chunk>,
    empty: Receiver<Chunk>,
    chunk: Chunk,
    remembered: Vec<(u32, Remembered)>,
    scratch: Vec<u8>,
    seen: Seen,
    progress: Progress,
}

/// Counts of this thread that were not published yet.
#[derive(Default)]
struct Seen {
    figures: FileFigures,
}

/// What is known of a connection.
#[derive(Clone, Copy, Debug)]
enum Remembered {
    /// Its client's packets are with the engine.
    Client,
    /// The server answered last: it had received up to `received` and sent up to `sent`.
    Server { received: u32, sent: u32 },
}

/// The worker went away.
struct Gone;

impl Reading {
    /// Reads the files as often as asked.
    fn run(mut self, first: Files) {
        let mut files = Some(first);
        let mut time_ns = 0;
        let mut number = 0u64;
        while self.config.loops.is_none_or(|loops| number < loops) && !self.stopped() {
            let mut opened = match files.take() {
                Some(files) => files,
                None => match Files::open(&self.config.files, self.config.order) {
                    Ok(files) => files,
                    Err(error) => {
                        self.problem(error);
                        break;
                    }
                },
            };
            self.progress = opened.progress();
            *self.shown.size.lock().unwrap_or_else(PoisonError::into_inner) = self.progress.size();
            let given = self.seen.figures.packets_given;
            let Ok(end_ns) = self.read(&mut opened, time_ns, number) else { return };
            time_ns = end_ns;
            number += 1;
            self.seen.figures.loops = number;
            if number == 1 {
                let mut shown = self.shown.problems.lock().unwrap_or_else(PoisonError::into_inner);
                shown.extend(opened.take_problems());
            }
            if self.push(end_ns, Item::End).is_err() {
                return;
            }
            if self.seen.figures.packets_given == given {
                // Nothing for any service: nothing would come of reading it again.
                break;
            }
        }
        let _ = self.send();
    }

    fn stopped(&self) -> bool {
        self.shown.stop.load(Ordering::Relaxed)
    }

    fn problem(&self, error: ReadError) {
        self.shown.problems.lock().unwrap_or_else(PoisonError::into_inner).push(error);
    }

    /// Reads the files once; `begin_ns` is the time of its first packet in the stream of all loops. The time of its end.
    fn read(&mut self, files: &mut Files, begin_ns: u64, number: u64) -> Result<u64, Gone> {
        let mut first = None;
        let mut last_ns = begin_ns;
        let mut scratch = std::mem::take(&mut self.scratch);
        self.remembered.fill((0, Remembered::Client));
        while files.advance() {
            let Some(packet) = files.packet() else { break };
            self.seen.figures.packets += 1;
            if self.seen.figures.packets.is_multiple_of(1 << 14) {
                self.publish();
                if self.stopped() {
                    break;
                }
            }
            let since_first =
                packet.time_ns.saturating_sub(*first.get_or_insert(packet.time_ns)).min(MAX_SPAN_NS);
            if self.config.stop_ns.is_some_and(|stop| since_first > stop) {
                self.seen.figures.packets_outside += 1;
                break;
            }
            if since_first < self.config.start_ns {
                self.seen.figures.packets_outside += 1;
                continue;
            }
            let time_ns = begin_ns.saturating_add(since_first - self.config.start_ns);
            last_ns = last_ns.max(time_ns);
            let Some(frame) = packet.link.ethernet(packet.data, &mut scratch) else {
                if packet.link.is_known() {
                    self.seen.figures.packets_unparsable += 1;
                } else {
                    self.seen.figures.packets_link_type += 1;
                }
                continue;
            };
            self.packet(time_ns, frame, packet.number, number)?;
        }
        self.scratch = scratch;
        Ok(last_ns)
    }

    fn is_service(&self, protocol: Protocol, endpoint: &Endpoint) -> bool {
        self.config.services.iter().any(|(of, service)| {
            *of == protocol
                && service.port == endpoint.port
                && (service.ip == ANY || service.ip == endpoint.ip)
        })
    }

    /// Whether a fragment belongs to something that clients send to a service: only the first has ports.
    fn is_of_service(&self, packet: &IpPacket, destination: &Ip) -> bool {
        self.config.services.iter().any(|(protocol, service)| {
            protocol.number() == packet.protocol && (service.ip == ANY || service.ip == *destination)
        })
    }

    fn packet(&mut self, time_ns: u64, frame: &[u8], number: u64, turn: u64) -> Result<(), Gone> {
        let found = locate(&frame).and_then(|packet| match packet {
            IpPacket { fragment: true, .. } => Ok((packet, None)),
            IpPacket { protocol: PROTOCOL_UDP, .. } => Ok((packet, None)),
            _ => packet.tcp(&frame).map(|segment| (packet, Some(segment))),
        });
        let segment = match found {
            Ok((_, Some(segment))) => segment,
            Ok((packet, None)) => return self.datagram(time_ns, frame, &packet, number, turn),
            Err(Reject::NotTcp | Reject::NotIp) => {
                self.seen.figures.packets_not_service += 1;
                return Ok(());
            }
            Err(_) => {
                self.seen.figures.packets_unparsable += 1;
                return Ok(());
            }
        };
        let source = Endpoint { ip: segment.src, port: segment.src_port };
        let destination = Endpoint { ip: segment.dst, port: segment.dst_port };
        if !self.is_service(Protocol::Tcp, &destination) {
            if self.is_service(Protocol::Tcp, &source) {
                self.seen.figures.packets_responses += 1;
                self.response(&segment, &source, &destination);
            } else {
                self.seen.figures.packets_not_service += 1;
            }
            return Ok(());
        }
        if u64::from(flow_hash(FLOW_SEED, &source.ip, source.port)) >= self.config.sample_threshold {
            self.seen.figures.packets_sampled_out += 1;
            return Ok(());
        }
        self.seen.figures.packets_given += 1;
        let payload_end = usize::from(segment.payload_offset) + segment.payload_len as usize;
        if payload_end > frame.len() {
            self.seen.figures.packets_truncated += 1;
            if self.seen.figures.first_truncated == 0 {
                self.seen.figures.first_truncated = number;
            }
        }
        if segment.payload_len > 0 || segment.flags & (flags::SYN | flags::FIN | flags::RST) != 0 {
            self.request(time_ns, &segment, &source, &destination, turn)?;
        }
        let port = shifted(source.port, turn);
        if frame.len() <= self.config.frame_room {
            let len = payload_end.min(frame.len());
            return self.frame(time_ns, &frame[..len], port, segment.tcp_offset, segment.is_opening());
        }
        self.pieces(time_ns, frame, port, &segment)
    }

    /// A UDP packet, or a fragment.
    fn datagram(
        &mut self,
        time_ns: u64,
        frame: &[u8],
        packet: &IpPacket,
        number: u64,
        turn: u64,
    ) -> Result<(), Gone> {
        if packet.fragment {
            let is_of_service = packet.dst(&frame).is_ok_and(|ip| self.is_of_service(packet, &ip));
            let figures = &mut self.seen.figures;
            *(if is_of_service {
                &mut figures.packets_fragments
            } else {
                &mut figures.packets_not_service
            }) += 1;
            return Ok(());
        }
        let Ok(datagram) = packet.udp(&frame) else {
            self.seen.figures.packets_unparsable += 1;
            return Ok(());
        };
        let source = Endpoint { ip: datagram.src, port: datagram.src_port };
        let destination = Endpoint { ip: datagram.dst, port: datagram.dst_port };
        if !self.is_service(Protocol::Udp, &destination) {
            let is_response = self.is_service(Protocol::Udp, &source);
            let figures = &mut self.seen.figures;
            *(if is_response { &mut figures.packets_responses } else { &mut figures.packets_not_service }) +=
                1;
            return Ok(());
        }
        if u64::from(flow_hash(FLOW_SEED, &source.ip, source.port)) >= self.config.sample_threshold {
            self.seen.figures.packets_sampled_out += 1;
            return Ok(());
        }
        let end = usize::from(datagram.payload_offset) + datagram.payload_len as usize;
        if end > self.config.frame_room {
            self.seen.figures.packets_too_large += 1;
            return Ok(());
        }
        self.seen.figures.packets_given += 1;
        if end > frame.len() {
            self.seen.figures.packets_truncated += 1;
            if self.seen.figures.first_truncated == 0 {
                self.seen.figures.first_truncated = number;
            }
        }
        let port = shifted(source.port, turn);
        // Where connections are to begin at a rate, a datagram is one.
        self.frame(time_ns, &frame[..end.min(frame.len())], port, packet.transport_offset as u16, true)
    }

    /// A packet larger than a frame (an offload put several segments together): cut to segments.
    fn pieces(&mut self, time_ns: u64, frame: &[u8], port: u16, segment: &TcpSegment) -> Result<(), Gone> {
        let pieces = Pieces::new(frame, segment, USUAL);
        self.seen.figures.packets_added_by_cutting += pieces.len() as u64 - 1;
        let mut bytes = Vec::new();
        for piece in pieces {
            bytes.resize(piece.len(), 0);
            piece.write(&mut bytes);
            self.frame(time_ns, &bytes, port, segment.tcp_offset, segment.is_opening())?;
        }
        Ok(())
    }

    /// A frame whose source port, the first of the transport header at `transport`, becomes `port`. Checksums are made anew by the engine.
    fn frame(
        &mut self,
        time_ns: u64,
        frame: &[u8],
        port: u16,
        transport: u16,
        opening: bool,
    ) -> Result<(), Gone> {
        let begin = self.chunk.bytes.len();
        self.chunk.bytes.extend_from_slice(frame);
        let source = begin + usize::from(transport);
        self.chunk.bytes[source..source + 2].copy_from_slice(&port.to_be_bytes());
        self.push(time_ns, Item::Packet { begin: begin as u32, len: frame.len() as u32, opening })
    }

    fn push(&mut self, time_ns: u64, item: Item) -> Result<(), Gone> {
        self.chunk.items.push((time_ns, item));
        if self.chunk.items.len() < CHUNK_PACKETS && self.chunk.bytes.len() < CHUNK_BYTES {
            return Ok(());
        }
        self.send()
    }

    fn send(&mut self) -> Result<(), Gone> {
        self.publish();
        if self.chunk.items.is_empty() {
            return Ok(());
        }
        let Ok(next) = self.empty.recv() else { return Err(Gone) };
        let mut chunk = std::mem::replace(&mut self.chunk, next);
        chunk.read = (self.progress.read(), self.seen.figures.packets);
        self.full.send(chunk).map_err(|_| Gone)
    }

    fn slot(&self, client: &Endpoint, server: &Endpoint) -> (usize, u32) {
        let hash = pair_hash(FLOW_SEED, &client.ip, client.port, &server.ip, server.port);
        // Zero is an empty slot.
        (hash as usize % REMEMBERED, hash | 1)
    }

    /// A packet of the server.
    fn response(&mut self, segment: &TcpSegment, server: &Endpoint, client: &Endpoint) {
        let syn = segment.flags & flags::SYN != 0;
        if segment.payload_len == 0 && !syn || segment.flags & flags::RST != 0 {
            return;
        }
        let (slot, key) = self.slot(client, server);
        let entry = &mut self.remembered[slot];
        if entry.0 == key && matches!(entry.1, Remembered::Client) && !syn {
            return;
        }
        if entry.0 == key && matches!(entry.1, Remembered::Client) {
            // The SYN was there: the engine knows.
            return;
        }
        let sent = segment.seq.wrapping_add(segment.payload_len).wrapping_add(u32::from(syn));
        *entry = (key, Remembered::Server { received: segment.ack, sent });
    }

    /// A packet of the client that says more than that it read something.
    fn request(
        &mut self,
        time_ns: u64,
        segment: &TcpSegment,
        client: &Endpoint,
        server: &Endpoint,
        turn: u64,
    ) -> Result<(), Gone> {
        let (slot, key) = self.slot(client, server);
        let entry = &mut self.remembered[slot];
        let joins = match *entry {
            (known, Remembered::Server { received, sent }) if known == key => {
                segment.payload_len > 0
                    && segment.flags & (flags::SYN | flags::RST) == 0
                    && segment.seq == received
                    && (segment.ack.wrapping_sub(sent) as i32) >= 0
            }
            _ => false,
        };
        *entry = (key, Remembered::Client);
        if joins {
            let client = Endpoint { ip: client.ip, port: shifted(client.port, turn) };
            self.push(time_ns, Item::Turn(client, *server))?;
        }
        Ok(())
    }

    fn publish(&self) {
        let (counters, seen) = (&self.shown.counters, &self.seen.figures);
        for (counter, value) in [
            (&counters.packets, seen.packets),
            (&counters.given, seen.packets_given),
            (&counters.responses, seen.packets_responses),
            (&counters.other, seen.packets_not_service),
            (&counters.sampled_out, seen.packets_sampled_out),
            (&counters.unparsable, seen.packets_unparsable),
            (&counters.fragments, seen.packets_fragments),
            (&counters.too_large, seen.packets_too_large),
            (&counters.link_type, seen.packets_link_type),
            (&counters.outside, seen.packets_outside),
            (&counters.cut_to_segments, seen.packets_added_by_cutting),
            (&counters.truncated, seen.packets_truncated),
            (&counters.first_truncated, seen.first_truncated),
            (&counters.loops, seen.loops),
        ] {
            counter.store(value, Ordering::Relaxed);
        }
    }
}

/// The port that a client has in a loop: a bijection of the ports from 1024 on, another one for each of 64 512 loops, so that no session of a
/// loop has the identity of one of the loops before. Lower ports stay.
fn shifted(port: u16, turn: u64) -> u16 {
    if port < FIRST_PORT {
        return port;
    }
    let ports = 65_536 - u64::from(FIRST_PORT);
    let shift = turn % ports * PORT_STEP % ports;
    FIRST_PORT + ((u64::from(port - FIRST_PORT) + shift) % ports) as u16
}

// ---- the worker's side ----

/// What the feed does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Something is due at this time.
    At(u64),
    /// The reader thread has nothing ready, or the target is waited for.
    Soon,
    /// Everything was given.
    Over,
}

/// Gives the packets to an engine when they are due.
#[derive(Debug)]
pub struct Feed {
    full: Receiver<Chunk>,
    empty: SyncSender<Chunk>,
    chunk: Option<Chunk>,
    at: usize,
    pace: Pace,
    speed: Speed,
    /// When the item at `at` is due, ns after the start; not known yet: `None`.
    due: Option<u64>,
    started_at: Option<u64>,
    duration_ns: Option<u64>,
    /// Requests that may wait for the target at once, where it sets the pace.
    in_flight: u64,
    copies: u64,
    hold_limit_ns: u64,
    /// Packets that may be given before the target is looked at again.
    credit: u64,
    looked_at: u64,
    credited_at: u64,
    /// The file's time of the batch that is being put together.
    batch_time_ns: u64,
    /// How far the files were read at the end of the chunk before.
    read_before: (u64, u64),
    lateness: Histogram,
    shown_at: u64,
    shown: Arc<Shown>,
    reader: Option<JoinHandle<()>>,
    over: bool,
}

/// The pace of a feed.
#[derive(Clone, Copy, Debug)]
pub struct FeedPace {
    /// How fast.
    pub speed: Speed,
    /// The longest pause.
    pub max_gap: Option<Duration>,
    /// When to stop, whatever is left.
    pub duration: Option<Duration>,
    /// Where the target sets the pace: sessions that may be waiting for it at once.
    pub in_flight: u64,
    /// Sessions that a packet may concern.
    pub copies: u64,
    /// The engine's.
    pub hold_limit_ns: u64,
}

impl Feed {
    /// Opens the files and begins to read.
    ///
    /// # Errors
    /// When a file cannot be opened or is no capture.
    pub fn start(config: FeedConfig, pace: FeedPace) -> Result<Feed> {
        let files = Files::open(&config.files, config.order)?;
        Feed::over(files, config, pace)
    }

    /// Begins to read files that are open. They are opened again, by their names, when they are to be read more than once.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn over(files: Files, config: FeedConfig, pace: FeedPace) -> Result<Feed> {
        let (full_in, full) = sync_channel(CHUNKS);
        let (empty, empty_out) = sync_channel(CHUNKS);
        for _ in 0..CHUNKS {
            let chunk = Chunk {
                // One packet more than where it is sent.
                bytes: Vec::with_capacity(CHUNK_BYTES + (64 << 10)),
                items: Vec::with_capacity(CHUNK_PACKETS),
                read: (0, 0),
            };
            // It has room for all.
            let _ = empty.try_send(chunk);
        }
        let shown = Arc::new(Shown::default());
        let reading = Reading {
            config,
            shown: shown.clone(),
            full: full_in,
            empty: empty_out,
            chunk: Chunk::default(),
            remembered: vec![(0, Remembered::Client); REMEMBERED],
            scratch: Vec::new(),
            seen: Seen::default(),
            progress: Progress::default(),
        };
        let reader = std::thread::Builder::new().name("reader".into()).spawn(move || reading.run(files))?;
        Ok(Feed {
            full,
            empty,
            chunk: None,
            at: 0,
            pace: Pace::new(pace.speed, pace.max_gap),
            speed: pace.speed,
            due: None,
            started_at: None,
            duration_ns: pace.duration.map(|duration| duration.as_nanos() as u64),
            in_flight: pace.in_flight.max(1),
            copies: pace.copies.max(1),
            hold_limit_ns: pace.hold_limit_ns,
            credit: 0,
            looked_at: 0,
            credited_at: 0,
            batch_time_ns: 0,
            read_before: (0, 0),
            lateness: Histogram::default(),
            shown_at: 0,
            shown,
            reader: Some(reader),
            over: false,
        })
    }

    /// What the reader thread shows.
    pub fn shown(&self) -> Arc<Shown> {
        self.shown.clone()
    }

    /// Whether everything was given to the engine.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// When there is something to do.
    pub fn ahead(&mut self) -> Next {
        if self.over {
            return Next::Over;
        }
        if !self.load(None) {
            return if self.over { Next::Over } else { Next::Soon };
        }
        match (self.started_at, self.due) {
            (Some(started), Some(due)) if self.credit > 0 || !self.speed.waits_for_target() => {
                Next::At(started.saturating_add(due))
            }
            (None, _) => Next::At(0),
            _ => Next::Soon,
        }
    }

    /// Waits until the reader thread has something, or for `limit`.
    pub fn wait(&mut self, limit: Duration) {
        self.load(Some(limit));
    }

    /// Makes sure that there is an item. False: the reader has none yet, or there are no more.
    fn load(&mut self, wait: Option<Duration>) -> bool {
        loop {
            if self.over {
                return false;
            }
            if let Some(chunk) = &self.chunk {
                if self.at < chunk.items.len() {
                    return true;
                }
                if let Some(mut chunk) = self.chunk.take() {
                    self.read_before = chunk.read;
                    chunk.bytes.clear();
                    chunk.items.clear();
                    // It has room for all chunks; the reader may be gone.
                    let _ = self.empty.try_send(chunk);
                }
            }
            let next = match wait {
                Some(limit) => {
                    self.full.recv_timeout(limit).map_err(|error| error == RecvTimeoutError::Timeout)
                }
                None => self.full.try_recv().map_err(|error| error == TryRecvError::Empty),
            };
            match next {
                Ok(chunk) => {
                    if chunk.read.0 < self.read_before.0 {
                        // Of the next loop, whose bytes count from the beginning.
                        self.read_before.0 = 0;
                    }
                    self.chunk = Some(chunk);
                    self.at = 0;
                }
                Err(true) => return false,
                Err(false) => {
                    self.finish();
                    return false;
                }
            }
        }
    }

    fn finish(&mut self) {
        self.over = true;
        self.show();
        self.shown.over.store(true, Ordering::Release);
    }

    /// Shows how far it is: within a chunk by its items, since a chunk may be minutes.
    fn show(&self) {
        let (mut bytes, mut packets) = self.read_before;
        if let Some(chunk) = &self.chunk {
            let part = |before: u64, end: u64| {
                let share = self.at as f64 / chunk.items.len().max(1) as f64;
                before + (end.saturating_sub(before) as f64 * share) as u64
            };
            (bytes, packets) = (part(bytes, chunk.read.0), part(packets, chunk.read.1));
        }
        self.shown.replayed.bytes.store(bytes, Ordering::Relaxed);
        self.shown.replayed.packets.store(packets, Ordering::Relaxed);
        self.shown
            .replayed
            .lateness
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&self.lateness);
    }

    /// Gives the engine what is due at `now`, at most a batch. Returns how many packets that were.
    pub fn give<O: Output>(
        &mut self,
        now: u64,
        engine: &mut Engine,
        batch: &mut Vec<(O::Frame, usize)>,
        out: &mut O,
    ) -> usize {
        let mut given = 0;
        if self.speed.waits_for_target() {
            self.look(now, engine);
        }
        while batch.len() < BATCH && self.load(None) {
            let Some(chunk) = &self.chunk else { break };
            let (time_ns, item) = chunk.items[self.at];
            match item {
                Item::Packet { begin, len, opening } => {
                    let started = *self.started_at.get_or_insert(now);
                    let due =
                        *self.due.get_or_insert_with(|| self.pace.due(time_ns, u64::from(len), opening));
                    if self.duration_ns.is_some_and(|duration| now - started >= duration) {
                        self.stop_early(now, engine, batch, out);
                        break;
                    }
                    if started.saturating_add(due) > now || self.speed.waits_for_target() && self.credit == 0
                    {
                        break;
                    }
                    // The file's time goes on before the packets are looked at: a batch whose times are far apart is not one.
                    if !batch.is_empty() && time_ns.saturating_sub(self.batch_time_ns) > BATCH_SPAN_NS {
                        break;
                    }
                    if batch.is_empty() {
                        self.batch_time_ns = time_ns;
                        engine.set_capture_time(time_ns);
                    }
                    let Some(mut frame) = out.allocate() else { break };
                    let bytes = &chunk.bytes[begin as usize..(begin + len) as usize];
                    let room = out.bytes(&mut frame);
                    let len = bytes.len().min(room.len());
                    room[..len].copy_from_slice(&bytes[..len]);
                    batch.push((frame, len));
                    if self.speed.waits_for_target() {
                        self.credit = self.credit.saturating_sub(1);
                    } else {
                        self.lateness.record(((now - started - due) / 1000).min(u64::from(u32::MAX)) as u32);
                    }
                    given += 1;
                }
                Item::Turn(client, server) => {
                    engine.on_captured(now, batch, out);
                    engine.expect_turn(now, client, server);
                }
                Item::End => {
                    engine.on_captured(now, batch, out);
                    engine.end_of_capture(now, out);
                }
            }
            self.at += 1;
            self.due = None;
        }
        engine.on_captured(now, batch, out);
        if now >= self.shown_at + SHOW_NS {
            self.shown_at = now;
            self.show();
        }
        given
    }

    /// The time is over: what was given ends as at the end of the files.
    fn stop_early<O: Output>(
        &mut self,
        now: u64,
        engine: &mut Engine,
        batch: &mut Vec<(O::Frame, usize)>,
        out: &mut O,
    ) {
        engine.on_captured(now, batch, out);
        engine.end_of_capture(now, out);
        self.finish();
    }

    /// Counts what the target is at and gives credit for what may be added to it. A target that does not answer holds nobody up for longer
    /// than the hold limit.
    fn look(&mut self, now: u64, engine: &Engine) {
        if self.credit > 0 || now < self.looked_at + LOOK_NS && self.looked_at > 0 {
            return;
        }
        self.looked_at = now;
        let busy = engine.busy_sessions(now);
        let free = self.in_flight.saturating_sub(busy) / self.copies;
        let overdue = now - self.credited_at > self.hold_limit_ns;
        self.credit = if free == 0 && overdue { 1 } else { free };
        if self.credit > 0 {
            self.credited_at = now;
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.shown.stop.store(true, Ordering::Relaxed);
        // The reader may wait for an empty chunk or for room: both ends go.
        let (_, full) = sync_channel(0);
        let (empty, _) = sync_channel(0);
        drop(std::mem::replace(&mut self.full, full));
        drop(std::mem::replace(&mut self.empty, empty));
        if let Some(reader) = self.reader.take() {
            // Standard input may never say anything again: it is not waited for.
            drop(reader);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::ServiceArg;
    use crate::offline::dry_run::{FRAME_ROOM, LINK, Memory, START_NS};
    use crate::pcap::writer::Writer;
    use replayer_engine::config::{Config, Limits, Service};

    #[test]
    fn the_progress_is_that_of_the_replay_and_not_of_reading() {
        const SECOND: u64 = 1_000_000_000;
        let path = std::env::temp_dir().join(format!("replayer-feed-{}.pcap", std::process::id()));
        let mut writer = Writer::create(&path).unwrap();
        for second in 0..4 {
            let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
                .ipv4([10, 0, 0, 1], [192, 0, 2, 1], 64)
                .udp(4000, 53);
            let mut frame = Vec::new();
            builder.write(&mut frame, b"query").unwrap();
            writer.packet(second * SECOND, &frame).unwrap();
        }
        writer.flush().unwrap();
        let size = writer.written();

        let endpoint = |ip: [u8; 4]| Endpoint { ip: replayer_common::addr::from_v4(ip), port: 53 };
        let service = Service { online: endpoint([192, 0, 2, 1]), target: endpoint([198, 51, 100, 1]) };
        let mut config = Config::new(Vec::new());
        config.udp_services = vec![service];
        config.limits = Limits { connections: 8, sessions: 8, held_bytes: 1 << 16, ..Limits::default() };
        config.frame_room = FRAME_ROOM as u16;
        let mut engine = Engine::new(config, START_NS);
        engine.set_link(0, Some(LINK));
        let mut out = Memory::new(&[ServiceArg { protocol: Protocol::Udp, service }], 1, None, 0, 1);
        let config = FeedConfig {
            files: vec![path.clone()],
            order: Order::Merged,
            services: vec![(Protocol::Udp, service.online)],
            sample_threshold: 1 << 32,
            loops: Some(1),
            start_ns: 0,
            stop_ns: None,
            frame_room: FRAME_ROOM,
        };
        let pace = FeedPace {
            speed: Speed::Times(1.0),
            max_gap: None,
            duration: None,
            in_flight: 1,
            copies: 1,
            hold_limit_ns: SECOND,
        };
        let mut feed = Feed::start(config, pace).unwrap();
        let shown = feed.shown();
        // The reader is at the end of the file before the first packet is given.
        feed.wait(Duration::from_secs(10));
        let mut batch = Vec::new();
        let mut shares = Vec::new();
        for second in 0..4 {
            assert_eq!(feed.give(START_NS + second * SECOND, &mut engine, &mut batch, &mut out), 1);
            let (done, all) = shown.progress();
            assert_eq!(all, Some(size));
            shares.push(done as f64 / size as f64);
        }
        assert!(shares.is_sorted() && shares[0] < 0.5 && shares[1] < 0.7, "{shares:?}");
        while !feed.is_over() {
            feed.wait(Duration::from_secs(10));
        }
        assert_eq!(shown.progress(), (size, Some(size)));
        assert_eq!(shown.lateness().count(), 4);
        std::fs::remove_file(path).unwrap();
    }
}
