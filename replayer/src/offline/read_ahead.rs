//! The thread that reads ahead: it decompresses, parses and merges the files, keeps what clients sent to the services, and hands it over in
//! chunks that are used again.
//!
//! What the server said is not replayed, but it tells more of a connection whose beginning is missing: client data that follows a response
//! (or SYN-ACK) without a hole and acknowledges all of it starts a turn, so the connection is joined there.

use super::status::{FileFigures, Status};
use crate::capture::segmentation::{Pieces, USUAL};
use crate::clients::Clients;
use crate::pcap::files::Progress;
use crate::pcap::{Files, Order, ReadError};
use crate::privileges::{self, Keep};
use replayer_common::addr::{ANY, Endpoint, Ip};
use replayer_common::hash::{FLOW_SEED, flow_hash, pair_hash};
use replayer_common::packet::{IpPacket, PROTOCOL_UDP, Protocol, Reject, TcpSegment, flags, locate};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};

/// Chunks in all, and what one holds: read ahead is at most 16 MiB.
const CHUNKS: usize = 16;
const CHUNK_BYTES: usize = 1 << 20;
const CHUNK_PACKETS: usize = 4096;
/// How many bytes before they are looked at packets are asked for.
const READ_AHEAD: usize = 1024;
/// Connections whose last packets are remembered, for joining those whose beginning is missing. A connection that is pushed out is joined
/// later, or told of twice.
const REMEMBERED: usize = 1 << 14;
/// No file is longer, ns (ten years): a time beyond that is damaged.
const MAX_SPAN_NS: u64 = 10 * 365 * 86_400 * 1_000_000_000;
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
    /// Whose packets are kept, by the addresses in the file.
    pub clients: Clients,
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

impl FeedConfig {
    /// All that is in files, once.
    pub fn all(files: Vec<PathBuf>, services: Vec<(Protocol, Endpoint)>, frame_room: usize) -> FeedConfig {
        FeedConfig {
            files,
            order: Order::Merged,
            services,
            clients: Clients::default(),
            sample_threshold: 1 << 32,
            loops: Some(1),
            start_ns: 0,
            stop_ns: None,
            frame_room,
        }
    }
}

/// What the worker does next, in the order of the files.
#[derive(Clone, Copy, Debug)]
pub(super) enum Item {
    /// A frame of a client: where it is in the chunk.
    Packet { begin: u32, len: u32, opening: bool },
    /// The next data of this connection, by its place in the chunk, starts a turn.
    Turn(u32),
    /// Nothing more comes of the connections before.
    End,
}

/// A part of the files.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) bytes: Vec<u8>,
    /// With their times in the stream of all loops, ns.
    pub(super) items: Vec<(u64, Item)>,
    /// Connections: client and server.
    pub(super) turns: Vec<(Endpoint, Endpoint)>,
    /// How far the files were read at its end, in this loop: bytes, and packets in all loops.
    pub(super) read: (u64, u64),
}

impl Chunk {
    /// A packet's bytes. Another core wrote them: those of packets that come soon are asked for.
    pub(super) fn packet(&self, begin: u32, len: u32) -> &[u8] {
        for ahead in [READ_AHEAD, READ_AHEAD + replayer_prefetch::LINE] {
            if let Some(later) = self.bytes.get(begin as usize + ahead) {
                replayer_prefetch::line(later);
            }
        }
        &self.bytes[begin as usize..(begin + len) as usize]
    }
}

/// The worker's ends of the reader thread.
#[derive(Debug)]
pub(super) struct Chunks {
    pub(super) full: Receiver<Chunk>,
    pub(super) empty: SyncSender<Chunk>,
}

/// Begins to read files that are open; what there is to say of them goes to `status`. The thread ends when both channels do.
///
/// # Errors
/// When no thread can be started.
pub(super) fn start(files: Files, config: FeedConfig, status: Arc<Status>) -> std::io::Result<Chunks> {
    let (full_in, full) = sync_channel(CHUNKS);
    let (empty, empty_out) = sync_channel(CHUNKS);
    for _ in 0..CHUNKS {
        let chunk = Chunk {
            // One packet more than where it is sent.
            bytes: Vec::with_capacity(CHUNK_BYTES + (64 << 10)),
            items: Vec::with_capacity(CHUNK_PACKETS),
            turns: Vec::new(),
            read: (0, 0),
        };
        // It has room for all.
        let _ = empty.try_send(chunk);
    }
    let reading = Reading {
        config,
        status,
        full: full_in,
        empty: empty_out,
        chunk: Chunk::default(),
        remembered: vec![(0, Remembered::Client); REMEMBERED],
        scratch: Vec::new(),
        seen: FileFigures::default(),
        progress: Progress::default(),
    };
    // Standard input may never say anything again: the thread is not waited for.
    std::thread::Builder::new().name("reader".into()).spawn(move || {
        privileges::drop_all_but(Keep::Reading);
        reading.run(files);
    })?;
    Ok(Chunks { full, empty })
}

struct Reading {
    config: FeedConfig,
    status: Arc<Status>,
    full: SyncSender<Chunk>,
    empty: Receiver<Chunk>,
    chunk: Chunk,
    remembered: Vec<(u32, Remembered)>,
    scratch: Vec<u8>,
    /// Counts that were not published yet.
    seen: FileFigures,
    progress: Progress,
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
            *self.status.size.lock().unwrap_or_else(PoisonError::into_inner) = self.progress.size();
            let given = self.seen.packets_given;
            let Ok(end_ns) = self.read(&mut opened, time_ns, number) else { return };
            time_ns = end_ns;
            number += 1;
            self.seen.loops = number;
            if number == 1 {
                let mut status = self.status.problems.lock().unwrap_or_else(PoisonError::into_inner);
                status.extend(opened.take_problems());
            }
            if self.push(end_ns, Item::End).is_err() {
                return;
            }
            if self.seen.packets_given == given {
                // Nothing for any service: nothing would come of reading it again.
                break;
            }
        }
        let _ = self.send();
    }

    fn stopped(&self) -> bool {
        self.status.stop.load(Ordering::Relaxed)
    }

    fn problem(&self, error: ReadError) {
        self.status.problems.lock().unwrap_or_else(PoisonError::into_inner).push(error);
    }

    /// Reads the files once; `begin_ns` is the time of its first packet in the stream of all loops. The time of its end.
    fn read(&mut self, files: &mut Files, begin_ns: u64, number: u64) -> Result<u64, Gone> {
        let mut first = None;
        let mut last_ns = begin_ns;
        let mut scratch = std::mem::take(&mut self.scratch);
        self.remembered.fill((0, Remembered::Client));
        while files.advance() {
            let Some(packet) = files.packet() else { break };
            self.seen.packets += 1;
            if self.seen.packets.is_multiple_of(1 << 14) {
                self.status.counters.publish(&self.seen);
                if self.stopped() {
                    break;
                }
            }
            let since_first =
                packet.time_ns.saturating_sub(*first.get_or_insert(packet.time_ns)).min(MAX_SPAN_NS);
            if self.config.stop_ns.is_some_and(|stop| since_first > stop) {
                self.seen.packets_outside += 1;
                break;
            }
            if since_first < self.config.start_ns {
                self.seen.packets_outside += 1;
                continue;
            }
            let time_ns = begin_ns.saturating_add(since_first - self.config.start_ns);
            last_ns = last_ns.max(time_ns);
            let Some(frame) = packet.link.ethernet(packet.data, &mut scratch) else {
                if packet.link.is_known() {
                    self.seen.packets_unparsable += 1;
                } else {
                    self.seen.packets_link_type += 1;
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

    /// Whether packets of the client to a service are given to the engine; counts one that is not.
    fn is_wanted(&mut self, client: &Endpoint) -> bool {
        if !self.config.clients.contains(&client.ip) {
            self.seen.packets_client_not_chosen += 1;
            return false;
        }
        let in_sample =
            u64::from(flow_hash(FLOW_SEED, &client.ip, client.port)) < self.config.sample_threshold;
        self.seen.packets_sampled_out += u64::from(!in_sample);
        in_sample
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
                self.seen.packets_not_service += 1;
                return Ok(());
            }
            Err(_) => {
                self.seen.packets_unparsable += 1;
                return Ok(());
            }
        };
        let source = Endpoint { ip: segment.src, port: segment.src_port };
        let destination = Endpoint { ip: segment.dst, port: segment.dst_port };
        if !self.is_service(Protocol::Tcp, &destination) {
            if self.is_service(Protocol::Tcp, &source) {
                self.seen.packets_responses += 1;
                self.response(&segment, &source, &destination);
            } else {
                self.seen.packets_not_service += 1;
            }
            return Ok(());
        }
        if !self.is_wanted(&source) {
            return Ok(());
        }
        self.seen.packets_given += 1;
        let payload_end = usize::from(segment.payload_offset) + segment.payload_len as usize;
        if payload_end > frame.len() {
            self.seen.packets_truncated += 1;
            if self.seen.first_truncated == 0 {
                self.seen.first_truncated = number;
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
            let figures = &mut self.seen;
            *(if is_of_service {
                &mut figures.packets_fragments
            } else {
                &mut figures.packets_not_service
            }) += 1;
            return Ok(());
        }
        let Ok(datagram) = packet.udp(&frame) else {
            self.seen.packets_unparsable += 1;
            return Ok(());
        };
        let source = Endpoint { ip: datagram.src, port: datagram.src_port };
        let destination = Endpoint { ip: datagram.dst, port: datagram.dst_port };
        if !self.is_service(Protocol::Udp, &destination) {
            let is_response = self.is_service(Protocol::Udp, &source);
            let figures = &mut self.seen;
            *(if is_response { &mut figures.packets_responses } else { &mut figures.packets_not_service }) +=
                1;
            return Ok(());
        }
        if !self.is_wanted(&source) {
            return Ok(());
        }
        let end = usize::from(datagram.payload_offset) + datagram.payload_len as usize;
        if end > self.config.frame_room {
            self.seen.packets_too_large += 1;
            return Ok(());
        }
        self.seen.packets_given += 1;
        if end > frame.len() {
            self.seen.packets_truncated += 1;
            if self.seen.first_truncated == 0 {
                self.seen.first_truncated = number;
            }
        }
        let port = shifted(source.port, turn);
        // Where connections are to begin at a rate, a datagram is one.
        self.frame(time_ns, &frame[..end.min(frame.len())], port, packet.transport_offset as u16, true)
    }

    /// A packet larger than a frame (an offload put several segments together): cut to segments.
    fn pieces(&mut self, time_ns: u64, frame: &[u8], port: u16, segment: &TcpSegment) -> Result<(), Gone> {
        let pieces = Pieces::new(frame, segment, USUAL);
        self.seen.packets_added_by_cutting += pieces.len() as u64 - 1;
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
        self.status.counters.publish(&self.seen);
        if self.chunk.items.is_empty() {
            return Ok(());
        }
        let Ok(next) = self.empty.recv() else { return Err(Gone) };
        let mut chunk = std::mem::replace(&mut self.chunk, next);
        chunk.read = (self.progress.read(), self.seen.packets);
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
        if self.seen.packets_responses == 0 {
            // Of servers nothing was captured: there is nothing to know of.
            return Ok(());
        }
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
            let place = self.chunk.turns.len() as u32;
            self.chunk.turns.push((client, *server));
            self.push(time_ns, Item::Turn(place))?;
        }
        Ok(())
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
