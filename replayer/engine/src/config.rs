//! What the engine is told at its start, and the limits within which it stays.

use crate::identity::AddressRange;
use crate::store::BLOCK;
use alloc::vec::Vec;
use replayer_common::addr::Endpoint;

/// An online endpoint and the target endpoint that it is copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Where real clients send to; the address may be [`replayer_common::addr::ANY`].
    pub online: Endpoint,
    /// Where the copies go.
    pub target: Endpoint,
}

/// What to replay, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// The services of TCP; the position is the service's number.
    pub services: Vec<Service>,
    /// The services of UDP; their numbers follow on those of TCP.
    pub udp_services: Vec<Service>,
    /// Copies per connection and service, in millionths: 1 000 000 is one.
    pub copies_millionths: u64,
    /// Copies of a connection are spread over so much time, ns: each replays all of its turns later by a share of it, which its identity decides.
    pub spread_ns: u64,
    /// Sessions kept: flow hashes below this (of 2^32).
    pub sample_threshold: u64,
    /// Addresses for identities; empty: clients keep their own.
    pub pool: Vec<AddressRange>,
    /// Hold a turn until the target has answered the one before (`-W` switches it off).
    pub wait_for_responses: bool,
    /// Leave connections out that were open before (`-O`).
    pub new_connections_only: bool,
    /// The longest that a turn waits, ns.
    pub hold_limit_ns: u64,
    /// How long a hole in a captured stream may stay open, ns.
    pub gap_timeout_ns: u64,
    /// This worker's number and how many there are.
    pub worker: u32,
    /// How many workers there are.
    pub workers: u32,
    /// Random: hash tables that hostile traffic fills depend on it.
    pub seed: u64,
    /// Room for a packet in a frame, bytes.
    pub frame_room: u16,
    /// Bounds.
    pub limits: Limits,
}

/// Bounds on what traffic can make a worker use. Each has a policy: see the counters.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Client connections followed at once.
    pub connections: usize,
    /// Sessions at once.
    pub sessions: usize,
    /// Client bytes held, all sessions together; memory is used in blocks of 256 bytes.
    pub held_bytes: usize,
    /// The same of one connection, by the blocks that its segments take: a small one takes as much memory as one of 256 bytes.
    pub held_bytes_per_connection: u32,
    /// Identities of a pool that one worker uses.
    pub identities: usize,
    /// Sessions of a service whose SYN waits for an answer, while the target has answered nothing for a second.
    pub unanswered_syns: u32,
    /// The same where connections have several copies: sessions beyond it wait until others were answered. No more than what a Linux
    /// server's backlog holds (`net.core.somaxconn`), for it drops the rest.
    pub copies_unanswered: u32,
}

impl Limits {
    /// The blocks that one connection may take.
    #[inline]
    pub(crate) fn places_per_connection(&self) -> u32 {
        self.held_bytes_per_connection / BLOCK as u32
    }

    /// The same with `bytes` of client data held in all. One connection may hold half of them, so that none takes everything, and at most 1 GiB:
    /// sequence numbers tell 2 GiB apart.
    pub fn with_held(self, bytes: usize) -> Limits {
        let held_bytes_per_connection = (bytes / 2).min(1 << 30) as u32;
        Limits { held_bytes: bytes, held_bytes_per_connection, ..self }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 1 << 20,
            sessions: 1 << 20,
            held_bytes: 512 << 20,
            held_bytes_per_connection: 256 << 20,
            identities: 1 << 22,
            unanswered_syns: 1 << 14,
            copies_unanswered: 4096,
        }
    }
}

impl Config {
    /// A configuration with the defaults of the command line.
    pub fn new(services: Vec<Service>) -> Config {
        Config {
            services,
            udp_services: Vec::new(),
            copies_millionths: 1_000_000,
            spread_ns: 0,
            sample_threshold: 1 << 32,
            pool: Vec::new(),
            wait_for_responses: true,
            new_connections_only: false,
            hold_limit_ns: 2_000_000_000,
            gap_timeout_ns: 1_000_000_000,
            worker: 0,
            workers: 1,
            seed: 0,
            frame_room: 1536,
            limits: Limits::default(),
        }
    }
}

/// How long an identity from a pool rests after use, seconds.
pub const QUARANTINE_SECONDS: f64 = 2.0;

/// Durations that are not the user's to set.
pub(crate) mod timing {
    use crate::timer::ticks;

    const MS: u64 = 1_000_000;

    /// The first SYN's retransmission timeout (RFC 6298 section 2.1).
    pub(crate) const SYN_TIMEOUT_US: u32 = 1_000_000;
    /// SYNs sent for a session: after 1, 2, then every 4 s (see `BACKOFF_MAX_US`), 27 s in all; then it is given up. Where each of
    /// SYN, SYN-ACK and record is lost once in twenty times, all eight fail once in five million sessions.
    pub(crate) const SYN_TRIES: u8 = 8;
    /// Bounds of the retransmission timeout. The lower is Linux's; RFC 6298 asks for 1 s, which would make a lost packet cost more
    /// here than with a real client.
    pub(crate) const RTO_MIN_US: u32 = 200_000;
    pub(crate) const RTO_MAX_US: u32 = 10_000_000;
    /// The longest between two retransmissions: a target that was away is found again soon (RFC 6298 section 2.5 would allow more).
    pub(crate) const BACKOFF_MAX_US: u32 = 4_000_000;
    /// How long a session may wait before its SYN is sent, because of those that the target has not answered; then it is given up, as it
    /// is after so many SYNs.
    pub(crate) const SYN_WAIT: u32 = ticks(27_000 * MS);
    /// Retransmissions of the same data without an acknowledgment; then the target is given up (about 50 s).
    pub(crate) const RETRANSMIT_TRIES: u8 = 16;
    /// The backoff of probes of a zero window goes no further than 2^this.
    pub(crate) const PROBE_BACKOFF: u8 = 4;
    /// A delayed acknowledgment (RFC 9293 section 3.8.6.3 allows 500 ms; Linux's is 40 ms at least).
    pub(crate) const DELAYED_ACK: u32 = ticks(40 * MS);
    /// After the target closed its side or acknowledged our FIN, how long the rest may take.
    pub(crate) const FIN_TIMEOUT: u32 = ticks(60_000 * MS);
    /// How long an identity from a pool rests after use.
    pub(crate) const QUARANTINE: u32 = ticks(super::QUARANTINE_SECONDS as u64 * 1_000 * MS);
    /// A connection from which nothing was captured for so long is forgotten: a weekend, and less than the clock's turn. Without data nothing of it
    /// may be captured, not even keepalives.
    pub(crate) const CONNECTION_IDLE: u32 = ticks(72 * 3_600 * 1000 * MS);
    /// The same where half of the places are taken: what a NAT has to keep a connection for at least, 2 h 4 min (RFC 5382 section 5), and then the
    /// lateness of a keepalive timer (kernel/time/timer.c: an eighth of 2 hours is the granularity there).
    pub(crate) const CROWDED_IDLE: u32 = ticks(8_100 * 1000 * MS);
    /// A SYN whose client never acknowledged the SYN-ACK is forgotten sooner: it may be one of a flood.
    pub(crate) const HALF_OPEN_IDLE: u32 = ticks(60_000 * MS);
    /// A connection that never became more than one packet in the middle of nowhere is forgotten sooner.
    pub(crate) const WATCHED_IDLE: u32 = ticks(300_000 * MS);
    /// Connections are looked at for that so often, so many at once, and in so long all of them unless there are few.
    pub(crate) const IDLE_LOOK: u32 = ticks(1_000 * MS);
    pub(crate) const IDLE_LOOK_MOST: u32 = 1024;
    pub(crate) const IDLE_ROUND: u32 = ticks(16_000 * MS);
    /// While a target refuses or ignores SYNs, one is sent so often to see whether it is back.
    pub(crate) const DOWN_PROBE: u32 = ticks(50 * MS);
    /// A target that answered nothing for so long since the first unanswered SYN is given no more than `unanswered_syns` of them.
    pub(crate) const SILENT_AFTER: u32 = ticks(1_000 * MS);
    /// A target that answered nothing for so long since the first unanswered SYN counts as down.
    pub(crate) const DOWN_AFTER: u32 = ticks(3_000 * MS);
    /// After an unexpected ACK in answer to a SYN was answered by RST, when the SYN goes again (RFC 9293 section 3.10.7.3).
    pub(crate) const SYN_AGAIN: u32 = ticks(5 * MS);
    /// Bounds of the quiet time after which a response counts as ended.
    pub(crate) const QUIET_MIN_US: u32 = 1_000;
    pub(crate) const QUIET_MAX_US: u32 = 50_000;
    /// SYNs that wait for the target's answer at the same time, from which on it may have no room to remember them.
    pub(crate) const SYN_BURST: u32 = 4;
    /// For how long after such a burst that is still thought of the target.
    pub(crate) const SYN_BURST_AGE: u32 = ticks(60_000 * MS);
    /// How long a narrower path that was found is believed in (RFC 4821 section 7.5 and RFC 8201 section 4: 10 minutes).
    pub(crate) const PATH_MTU_AGE: u32 = ticks(600_000 * MS);
    /// Where holes are timed by a capture file's time: how often they are looked at.
    pub(crate) const CAPTURE_CLOCK: u32 = ticks(50 * MS);
    /// How long the end of a session is remembered by its registration; shorter than the quarantine.
    pub(crate) const LINGER: u32 = ticks(1_500 * MS);
    /// A UDP flow of which nothing came for so long is forgotten, at twice that at the latest: as a NAT does (RFC 4787 section 4.3 asks for no
    /// less than two minutes, Linux's conntrack takes 30 s; a target cannot tell).
    pub(crate) const FLOW_IDLE: u32 = ticks(30_000 * MS);
    /// How long the answer to a datagram is waited for where everything else is over, ns.
    pub(crate) const DATAGRAM_ANSWER_NS: u64 = 500 * MS;
    /// On stop: sessions may finish closing for so long, then they are reset.
    pub(crate) const STOP_GRACE: u32 = ticks(500 * MS);
}
