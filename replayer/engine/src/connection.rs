//! A client connection as it was captured: its stream put in order, and where its turns begin. What its sessions do with the
//! stream is not decided here.

use crate::config::timing;
use crate::slab::NONE;
use crate::timer::Tick;
use alloc::vec::Vec;
use replayer_common::addr::{Endpoint, is_v4_of};
use replayer_common::hash::pair_hash;
use replayer_common::packet::TcpSegment;
use replayer_common::tcp_options::TcpOptions;

/// How the client's stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It has not.
    Open,
    /// FIN; `need` response bytes were read since the turn before.
    Fin { need: u32 },
    /// RST.
    Reset { need: u32 },
}

/// What is known of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Open before capture began (or lost to a hole): waits for the first segment that surely starts a turn.
    Watching,
    /// Open before capture began, and known to be between two turns: the next data starts one.
    BetweenTurns,
    /// In step with the client: `next_seq` is the next byte.
    Following,
    /// TLS: seen, counted, not replayed.
    Encrypted,
    /// Nothing: the connection is over and its place is free.
    Forgotten,
}

/// Laid out by use: a packet with the next data of its stream, and an acknowledgment of it, read and change the first cache line only.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Connection {
    pub(crate) client: Endpoint,
    /// Which of the known servers its server is, see [`Servers`].
    known_server: u8,
    pub(crate) phase: Phase,
    /// A new SYN took its place in the table: only its sessions still need it.
    pub(crate) detached: bool,
    /// Data was appended.
    pub(crate) any_data: bool,
    pub(crate) ack_known: bool,
    /// The client sends timestamps.
    pub(crate) timestamps: bool,
    /// Its stream has a hole or an end.
    interrupted: bool,
    /// What its SYN offered, for sessions opened later: `NO_SCALE` if it was none.
    window_scale: u8,
    pub(crate) mss: u16,
    /// The sessions that it wants, of all its services.
    wanted: u16,
    /// Its sessions that take data: they are not cut.
    pub(crate) takers: u16,
    /// Watching: the end of the last data seen. Following: the next byte in order.
    pub(crate) next_seq: u32,
    /// The highest ACK number on data (before data: on the handshake's last ACK).
    pub(crate) last_ack: u32,
    pub(crate) last_seen: Tick,
    pub(crate) first_session: u32,
    /// Held segments in order, oldest first.
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) held_bytes: u32,
    /// What makes a TSval of the engine's milliseconds: the same for all sessions of the connection, so that one that is opened again
    /// goes on where its predecessor was (RFC 7323 section 5, RFC 6191).
    ts_offset: u32,

    pub(crate) server: Endpoint,
    /// Copies wanted of each of its services.
    copies: u16,
    /// Held segments behind a hole, sorted.
    out_of_order: u32,
    pub(crate) out_of_order_tail: u32,
    pub(crate) sessions: u32,
    end: End,
    early_fin_seq: u32,
    early_fin_ack: u32,
    /// The number of the client's SYN.
    pub(crate) isn: u32,
    pub(crate) gap_since: Tick,
    pub(crate) sack_permitted: bool,
    /// It began with a SYN that was captured.
    pub(crate) began_with_syn: bool,
    /// HTTP/2: responses do not alternate with requests.
    pub(crate) multiplexed: bool,
    /// It was counted that its address does not fit a target's.
    pub(crate) family_counted: bool,
    has_early_fin: bool,
}

// Whoever needs more has to look for what is not needed any more: a million of them are read at random.
const _: () = assert!(size_of::<Connection>() == 128 && core::mem::offset_of!(Connection, server) == 64);

/// The servers that connections were made to, each known by a number in the connection's first cache line. There are few; if there are
/// more, the rest have none, and are compared in full.
#[derive(Debug)]
pub(crate) struct Servers {
    known: Vec<Endpoint>,
}

/// So many are known.
const KNOWN_SERVERS: usize = 64;
const UNKNOWN: u8 = u8::MAX;
/// No shift is above 14 (RFC 7323 section 2.3).
const NO_SCALE: u8 = u8::MAX;

impl Servers {
    pub(crate) fn new() -> Servers {
        Servers { known: Vec::with_capacity(KNOWN_SERVERS) }
    }

    /// The server's number.
    fn number(&mut self, server: &Endpoint) -> u8 {
        let number = match self.known.iter().position(|known| known == server) {
            Some(number) => number,
            None if self.known.len() == KNOWN_SERVERS => return UNKNOWN,
            None => {
                self.known.push(*server);
                self.known.len() - 1
            }
        };
        number as u8
    }
}

/// Both ends of a segment over IPv4, the client's first. The bytes of addresses are as they are in memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PlainEnds {
    pub(crate) src: u32,
    pub(crate) dst: u32,
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
}

impl Connection {
    pub(crate) fn new(client: Endpoint, server: Endpoint, phase: Phase, now: Tick) -> Connection {
        Connection {
            client,
            server,
            known_server: UNKNOWN,
            interrupted: false,
            phase,
            end: End::Open,
            detached: false,
            began_with_syn: false,
            any_data: false,
            multiplexed: false,
            isn: 0,
            next_seq: 0,
            last_ack: 0,
            ack_known: false,
            copies: 0,
            family_counted: false,
            wanted: 0,
            sessions: 0,
            takers: 0,
            first_session: NONE,
            head: NONE,
            tail: NONE,
            out_of_order: NONE,
            out_of_order_tail: NONE,
            held_bytes: 0,
            has_early_fin: false,
            early_fin_seq: 0,
            early_fin_ack: 0,
            gap_since: now,
            last_seen: now,
            mss: 1460,
            window_scale: 7,
            sack_permitted: true,
            timestamps: false,
            ts_offset: 0,
        }
    }

    /// Takes the client's clock over, if it sends timestamps.
    pub(crate) fn set_timestamps(&mut self, options: &TcpOptions, now_ns: u64) {
        self.timestamps = options.timestamps.is_some();
        self.ts_offset =
            options.timestamps.map_or(0, |(value, _)| value.wrapping_sub(crate::sender::millis(now_ns)));
    }

    /// The TSval of its sessions.
    #[inline]
    pub(crate) fn ts_value(&self, now_ns: u64) -> u32 {
        self.ts_offset.wrapping_add(crate::sender::millis(now_ns))
    }

    /// Asks for the cache line that data needs, so that it is there when it comes.
    #[inline]
    pub(crate) fn read_ahead(&self) {
        replayer_prefetch::line(&self.client);
    }

    /// Whether it is in the client table and this is one of its segments.
    #[inline]
    pub(crate) fn is_of(&self, servers: &Servers, segment: &TcpSegment) -> bool {
        let server = servers.known.get(usize::from(self.known_server)).unwrap_or(&self.server);
        self.client.ip == segment.src
            && server.ip == segment.dst
            && (self.client.port, server.port) == (segment.src_port, segment.dst_port)
            && !self.detached
    }

    /// The same of a segment over IPv4.
    #[inline(always)]
    pub(crate) fn is_of_plain(&self, servers: &Servers, ends: &PlainEnds) -> bool {
        let server = servers.known.get(usize::from(self.known_server)).unwrap_or(&self.server);
        let is = |end: &Endpoint, ip: u32, port: u16| is_v4_of(&end.ip, ip) && end.port == port;
        is(&self.client, ends.src, ends.src_port) && is(server, ends.dst, ends.dst_port) && !self.detached
    }

    /// It is new: how many copies it wants of so many services.
    pub(crate) fn begin(&mut self, servers: &mut Servers, services: usize) {
        self.known_server = servers.number(&self.server);
        self.wanted = u16::try_from(usize::from(self.copies) * services).unwrap_or(u16::MAX);
    }

    /// The window scale that its SYN offered.
    #[inline]
    pub(crate) fn window_scale(&self) -> Option<u8> {
        (self.window_scale != NO_SCALE).then_some(self.window_scale)
    }

    /// Its SYN offered this one.
    pub(crate) fn set_window_scale(&mut self, shift: Option<u8>) {
        self.window_scale = shift.unwrap_or(NO_SCALE);
    }

    /// How far beyond the last acknowledgment a session's target may send, bytes: what every segment of ours says (RFC 7323 section 2.3).
    pub(crate) fn receive_window(&self) -> u32 {
        u32::from(crate::sender::WINDOW) << self.window_scale().unwrap_or(0)
    }

    /// Its place in the client table.
    pub(crate) fn hash(&self, seed: u64) -> u32 {
        pair_hash(seed, &self.client.ip, self.client.port, &self.server.ip, self.server.port)
    }

    /// The sessions that it wants, of all its services.
    #[inline]
    pub(crate) fn wanted(&self) -> u32 {
        u32::from(self.wanted)
    }

    /// Copies wanted of each of its services.
    pub(crate) fn copies(&self) -> u16 {
        self.copies
    }

    pub(crate) fn with_copies(self, copies: u16) -> Connection {
        Connection { copies, ..self }
    }

    /// Whether its stream has neither a hole nor an end.
    #[inline]
    pub(crate) fn is_uninterrupted(&self) -> bool {
        !self.interrupted
    }

    /// Whether it waits for a hole to be filled.
    pub(crate) fn has_hole(&self) -> bool {
        self.out_of_order != NONE || self.has_early_fin
    }

    /// How its stream ended.
    #[inline]
    pub(crate) fn end(&self) -> End {
        // Most often said without the second cache line.
        if self.interrupted { self.end } else { End::Open }
    }

    /// The first segment behind a hole, or `NONE`.
    pub(crate) fn out_of_order(&self) -> u32 {
        self.out_of_order
    }

    /// A FIN behind a hole: its sequence number and ACK number.
    pub(crate) fn early_fin(&self) -> Option<(u32, u32)> {
        self.has_early_fin.then_some((self.early_fin_seq, self.early_fin_ack))
    }

    pub(crate) fn set_end(&mut self, end: End) {
        self.end = end;
        self.note_interruption();
    }

    pub(crate) fn set_out_of_order(&mut self, segment: u32) {
        self.out_of_order = segment;
        self.note_interruption();
    }

    pub(crate) fn set_early_fin(&mut self, fin: Option<(u32, u32)>) {
        self.has_early_fin = fin.is_some();
        (self.early_fin_seq, self.early_fin_ack) = fin.unwrap_or_default();
        self.note_interruption();
    }

    fn note_interruption(&mut self) {
        self.interrupted = self.end != End::Open || self.has_hole();
    }

    /// How long nothing may be captured of it until it is forgotten, ticks.
    pub(crate) fn idle_limit(&self) -> u32 {
        match self.phase {
            Phase::Watching | Phase::Encrypted if self.sessions == 0 => timing::WATCHED_IDLE,
            Phase::Following if !self.ack_known && !self.any_data => timing::HALF_OPEN_IDLE,
            _ => timing::CONNECTION_IDLE,
        }
    }

    /// Whether `ack` says that the client has read more of the response than `last_ack` says.
    pub(crate) fn ack_advances(&self, ack: u32) -> bool {
        self.ack_known && (ack.wrapping_sub(self.last_ack) as i32) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::addr::from_v4;

    #[test]
    fn segments_are_told_apart_by_their_server_also_where_there_are_more_than_are_known() {
        let mut servers = Servers::new();
        let client = Endpoint { ip: from_v4([192, 0, 2, 1]), port: 40_000 };
        let server =
            |i: usize| Endpoint { ip: from_v4([10, 0, 0, (i / 2) as u8]), port: 80 + (i % 2) as u16 };
        let connections: Vec<Connection> = (0..2 * KNOWN_SERVERS)
            .map(|i| {
                let mut connection = Connection::new(client, server(i), Phase::Following, 0);
                connection.begin(&mut servers, 1);
                connection
            })
            .collect();
        assert_eq!(servers.known.len(), KNOWN_SERVERS);
        for (i, connection) in connections.iter().enumerate() {
            for to in 0..connections.len() {
                let Endpoint { ip: dst, port: dst_port } = server(to);
                let segment = TcpSegment {
                    src: client.ip,
                    dst,
                    src_port: client.port,
                    dst_port,
                    seq: 0,
                    ack: 0,
                    flags: 0,
                    window: 0,
                    ip_offset: 14,
                    tcp_offset: 34,
                    payload_offset: 54,
                    payload_len: 0,
                    is_v6: false,
                    ce: false,
                };
                assert_eq!(connection.is_of(&servers, &segment), i == to, "connection {i}, segment to {to}");
            }
        }
    }
}
