//! A client connection as it was captured: its stream put in order, and where its turns begin. What its sessions do with the
//! stream is not decided here.

use crate::config::timing;
use crate::slab::NONE;
use crate::timer::Tick;
use replayer_common::addr::Endpoint;
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

/// Laid out by use: a packet with the next data of its stream reads and changes the first cache line, and little of the second.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Connection {
    pub(crate) client: Endpoint,
    pub(crate) server: Endpoint,
    pub(crate) phase: Phase,
    /// A new SYN took its place in the table: only its sessions still need it.
    pub(crate) detached: bool,
    /// It began with a SYN that was captured.
    pub(crate) began_with_syn: bool,
    /// Data was appended.
    pub(crate) any_data: bool,
    /// Watching: the end of the last data seen. Following: the next byte in order.
    pub(crate) next_seq: u32,
    /// The highest ACK number on data (before data: on the handshake's last ACK).
    pub(crate) last_ack: u32,
    pub(crate) last_seen: Tick,
    pub(crate) first_session: u32,
    /// Held segments in order, oldest first, and those behind a hole, sorted.
    pub(crate) head: u32,
    pub(crate) tail: u32,

    pub(crate) out_of_order: u32,
    pub(crate) out_of_order_tail: u32,
    pub(crate) held_bytes: u32,
    /// Copies wanted of each of its services, and how many of them can be.
    pub(crate) copies: u16,
    pub(crate) services: u16,
    /// Its sessions that take data: they are not cut.
    pub(crate) takers: u16,
    /// What its SYN offered, for sessions opened later.
    pub(crate) mss: u16,
    pub(crate) window_scale: Option<u8>,
    /// The client sends timestamps.
    pub(crate) timestamps: bool,
    pub(crate) ack_known: bool,
    pub(crate) sack_permitted: bool,
    /// HTTP/2: responses do not alternate with requests.
    pub(crate) multiplexed: bool,
    /// It was counted that its address does not fit a target's.
    pub(crate) family_counted: bool,
    pub(crate) sessions: u32,
    pub(crate) end: End,
    /// A FIN behind a hole: its sequence number and ACK number.
    pub(crate) early_fin: Option<(u32, u32)>,
    /// The number of the client's SYN.
    pub(crate) isn: u32,
    /// What makes a TSval of the engine's milliseconds: the same for all sessions of the connection, so that one that is opened again
    /// goes on where its predecessor was (RFC 7323 section 5, RFC 6191).
    ts_offset: u32,
    pub(crate) gap_since: Tick,
}

// Whoever needs more has to look for what is not needed any more: a million of them are read at random.
const _: () = assert!(size_of::<Connection>() == 128);

impl Connection {
    pub(crate) fn new(client: Endpoint, server: Endpoint, phase: Phase, now: Tick) -> Connection {
        Connection {
            client,
            server,
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
            services: 0,
            sessions: 0,
            takers: 0,
            first_session: NONE,
            head: NONE,
            tail: NONE,
            out_of_order: NONE,
            out_of_order_tail: NONE,
            held_bytes: 0,
            early_fin: None,
            gap_since: now,
            last_seen: now,
            mss: 1460,
            window_scale: Some(7),
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

    /// Asks for its cache lines, so that they are there when it is used.
    #[inline]
    pub(crate) fn read_ahead(&self) {
        replayer_prefetch::line(&self.client);
        replayer_prefetch::line(&self.out_of_order);
    }

    /// Whether it is in the client table and this is one of its segments.
    #[inline]
    pub(crate) fn is_of(&self, segment: &TcpSegment) -> bool {
        self.client.ip == segment.src
            && self.server.ip == segment.dst
            && (self.client.port, self.server.port) == (segment.src_port, segment.dst_port)
            && !self.detached
    }

    /// How far beyond the last acknowledgment a session's target may send, bytes: what every segment of ours says (RFC 7323 section 2.3).
    pub(crate) fn receive_window(&self) -> u32 {
        u32::from(crate::sender::WINDOW) << self.window_scale.unwrap_or(0)
    }

    /// Its place in the client table.
    pub(crate) fn hash(&self, seed: u64) -> u32 {
        pair_hash(seed, &self.client.ip, self.client.port, &self.server.ip, self.server.port)
    }

    /// The sessions that it wants.
    #[inline]
    pub(crate) fn wanted(&self) -> u32 {
        u32::from(self.copies) * u32::from(self.services)
    }

    /// Whether it waits for a hole to be filled.
    pub(crate) fn has_hole(&self) -> bool {
        self.out_of_order != NONE || self.early_fin.is_some()
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
