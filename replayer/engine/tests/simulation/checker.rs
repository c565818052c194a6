//! Reads every segment that the engine sends, with a parser that is not its own, and holds it against the rules of TCP. It sees what
//! the engine sees (the header records) and what the target really sent, in the order in which things happen; it never looks inside.

use crate::streams::Stream;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};
use replayer_common::tcp_options::{self, TcpOptions};
use replayer_engine::Link;
use std::collections::HashMap;

const MS: u64 = 1_000_000;
/// The clock of the engine's timers, ns; two of them may be lost to rounding.
const TICK: u64 = 1 << 16;
const SYN_TIMEOUT: u64 = 1000 * MS;
const RTO_MIN: u64 = 200 * MS;
const RTO_MAX: u64 = 10_000 * MS;
/// RFC 9293 section 3.8.6.3 allows 500 ms; the engine promises less.
const ACK_DELAY_MAX: u64 = 60 * MS;
const INITIAL_WINDOW: u32 = 10;

fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// A segment of the engine.
#[derive(Clone, Debug)]
pub struct Sent {
    pub source: Endpoint,
    pub destination: Endpoint,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub options: TcpOptions,
    pub payload: (usize, usize),
}

impl Sent {
    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A session as the wire shows it.
#[derive(Debug)]
struct Session {
    stream: usize,
    start: usize,
    iss: u32,
    offered: TcpOptions,
    syn_at: u64,
    syns: u32,
    /// An answer to the SYN that was not for it has just been seen: it may be reset, and the SYN go again at once.
    stranger_acked: Option<u32>,
    established: bool,

    /// What the target really sent: its ISN, and the number after its highest byte.
    target_isn: Option<u32>,
    target_sent: u32,
    target_ts: Option<u32>,
    /// The last number that a record told of, plus one.
    told: u32,
    told_fin: Option<u32>,

    mss: u32,
    shift: u8,
    timestamps: bool,
    una: u32,
    max: u32,
    right_edge: u32,
    window: u32,
    dup_acks: u32,
    /// Numbers that SACK blocks told of: everything below the highest of them may be a hole.
    sacked: Option<u32>,
    recovery_until: Option<u32>,
    go_back_until: Option<u32>,
    /// When the retransmission timer was last started, and how long it ran the last time that it expired.
    timer_since: u64,
    last_rto: Option<u64>,
    acked_once: bool,

    last_ack: Option<u32>,
    last_ts: Option<u32>,
    fin: Option<u32>,
    reset: bool,
    target_reset: bool,
    unacked_since: Option<u64>,
    unacked_segments: u32,
    /// When a window that was zero opened.
    opened_at: u64,
    /// The hold limit let a turn go before its time: nothing is certain about those that follow.
    loose: bool,
    /// When data was last sent for the first time.
    new_data_at: u64,
}

impl Session {
    /// Nothing more may be expected of it.
    fn is_over(&self) -> bool {
        let closed = self.fin.is_some_and(|fin| self.una == fin.wrapping_add(1));
        self.reset || self.target_reset || closed && self.told_fin.is_some()
    }
}

/// What the checker is told of the world.
pub struct Checker<'a> {
    streams: &'a [Stream],
    link: Link,
    sessions: Vec<Session>,
    /// The latest session of an identity and a target.
    current: HashMap<(Endpoint, Endpoint), usize>,
    known: HashMap<(Endpoint, u32), (usize, usize)>,
    /// Turns may only begin when the target has sent all that the client had read online, or after this long.
    pub strict_turns: Option<u64>,
    /// Some segments find no room: acknowledgments can be late.
    pub starved: bool,
    /// Segments that were read.
    pub count: u64,
}

impl std::fmt::Debug for Checker<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} sessions, {} segments", self.sessions.len(), self.count)
    }
}

impl<'a> Checker<'a> {
    pub fn new(streams: &'a [Stream], link: Link) -> Checker<'a> {
        Checker {
            streams,
            link,
            sessions: Vec::new(),
            current: HashMap::new(),
            known: HashMap::new(),
            strict_turns: None,
            starved: false,
            count: 0,
        }
    }

    /// Packets leave by another link from now on; those to come may be no larger than it allows.
    pub fn set_link(&mut self, link: Link) {
        self.link = link;
    }

    /// The stream that a SYN belongs to, and where in it the session begins.
    pub fn session_of(&self, identity: Endpoint, iss: u32) -> Option<(usize, usize)> {
        self.known.get(&(identity, iss)).copied()
    }

    /// Whether the engine did what it can to end the identity's last session at the target: both sides have closed, or one has reset.
    pub fn was_ended(&self, identity: Endpoint) -> bool {
        let mut sessions = self.current.iter().filter(|((at, _), _)| *at == identity);
        sessions.any(|(_, &index)| self.sessions[index].is_over())
    }
}

/// The target's side.
impl Checker<'_> {
    /// The target sends an IP packet (which may be lost afterwards).
    pub fn on_target(&mut self, packet: &[u8]) {
        let Some(segment) = read_ip(packet) else { panic!("the target sends no TCP: {packet:02x?}") };
        let Some(&index) = self.current.get(&(segment.destination, segment.source)) else { return };
        let session = &mut self.sessions[index];
        let len = (segment.payload.1 - segment.payload.0) as u32;
        let end = segment.seq.wrapping_add(len).wrapping_add(u32::from(segment.has(flags::FIN)));
        if segment.has(flags::SYN) {
            // A late SYN may open a second connection, which its ISN tells apart.
            if segment.ack == session.iss.wrapping_add(1) && !session.established {
                session.target_isn = Some(segment.seq);
                session.target_sent = segment.seq.wrapping_add(1);
                session.target_ts = segment.options.timestamps.map(|(value, _)| value);
            }
            return;
        }
        if session.target_isn.is_none() || segment.has(flags::RST) {
            return;
        }
        if before(session.target_sent, end) {
            session.target_sent = end;
        }
        if let Some((value, _)) = segment.options.timestamps {
            session.target_ts = Some(value);
        }
    }

    /// A header record reaches the engine.
    pub fn on_record(&mut self, now: u64, record: &ResponseHeader, target: Endpoint) {
        let identity = Endpoint { ip: record.addr, port: record.port };
        let Some(&index) = self.current.get(&(identity, target)) else { return };
        let session = &mut self.sessions[index];
        let acks = record.flags & flags::ACK != 0;
        if !session.established {
            let ours = acks && record.ack == session.iss.wrapping_add(1);
            if record.flags & flags::RST != 0 {
                session.target_reset |= ours;
            } else if !ours {
                session.stranger_acked = acks.then_some(record.ack);
            } else if record.flags & flags::SYN != 0 && !session.is_over() {
                session.established = true;
                session.una = record.ack;
                session.max = record.ack;
                session.told = record.seq.wrapping_add(1);
                session.mss = u32::from(if record.has(present::MSS) { record.mss } else { 536 });
                let scaled = record.has(present::WINDOW_SCALE) && session.offered.window_scale.is_some();
                session.shift = if scaled { record.window_scale.min(14) } else { 0 };
                session.timestamps = session.offered.timestamps.is_some() && record.has(present::TIMESTAMPS);
                session.window = u32::from(record.window);
                session.right_edge = record.ack.wrapping_add(session.window);
                session.unacked_since = Some(now);
            }
            return;
        }
        let window = 65_535 << session.offered.window_scale.unwrap_or(0).min(14);
        let ahead = record.seq.wrapping_sub(session.told) as i32;
        if ahead > window {
            // Of an older connection.
            return;
        }
        if record.flags & flags::RST != 0 {
            // Far behind: of an older connection too (RFC 9293 section 3.10.7.4). A little behind: in answer to a segment of ours that
            // was late.
            session.target_reset |= ahead > -(1 << 16);
            return;
        }
        if record.flags & flags::SYN != 0 {
            return;
        }
        let fin = record.flags & flags::FIN != 0;
        let end = record.seq.wrapping_add(record.payload_len);
        if fin {
            session.told_fin = Some(end);
        }
        if record.payload_len > 0 && before(session.told, end) {
            session.told = end;
            session.unacked_since.get_or_insert(now);
            session.unacked_segments += 1;
        }
        if acks && !before(record.ack, session.una) && !before(session.max, record.ack) {
            let window = u32::from(record.window) << session.shift;
            let edge = record.ack.wrapping_add(window);
            if before(session.right_edge, edge) {
                session.right_edge = edge;
            }
            for &(_, right) in &record.sack[..usize::from(record.sack_count.min(3))] {
                if session.sacked.is_none_or(|highest| before(highest, right)) {
                    session.sacked = Some(right);
                }
            }
            if record.ack == session.una {
                if record.payload_len == 0 && session.una != session.max && !fin {
                    session.dup_acks += 1;
                }
            } else {
                session.una = record.ack;
                session.dup_acks = 0;
                session.timer_since = now;
                session.last_rto = None;
                session.acked_once = true;
            }
            if session.window == 0 && window > 0 {
                session.opened_at = now;
            }
            session.window = window;
        }
    }

    /// The engine has handled a batch of records: every second segment is acknowledged at once.
    pub fn after_records(&mut self, record: &ResponseHeader, target: Endpoint) {
        let identity = Endpoint { ip: record.addr, port: record.port };
        let Some(&index) = self.current.get(&(identity, target)) else { return };
        let session = &self.sessions[index];
        if !self.starved && !session.is_over() {
            assert!(session.unacked_segments < 2, "two segments are not acknowledged: {session:?}");
        }
    }

    /// Time has passed and everything was handled that was due.
    pub fn on_time(&self, now: u64) {
        if self.starved {
            return;
        }
        for session in &self.sessions {
            if !session.is_over()
                && let Some(since) = session.unacked_since
            {
                assert!(now <= since + ACK_DELAY_MAX, "an acknowledgment is late at {now}: {session:?}");
            }
        }
    }
}

/// The engine's side.
impl Checker<'_> {
    /// The engine sends a frame.
    pub fn on_sent(&mut self, now: u64, frame: &[u8]) -> Sent {
        self.count += 1;
        let segment = self.read_frame(frame);
        let place = (segment.source, segment.destination);
        let payload = &frame[segment.payload.0..segment.payload.1];
        assert!(segment.window > 0, "the window never closes: {segment:?}");
        if segment.has(flags::SYN) {
            self.on_syn(now, place, &segment, payload);
            return segment;
        }
        let Some(&index) = self.current.get(&place) else { panic!("a segment without a SYN: {segment:?}") };
        let session = &mut self.sessions[index];
        let options = &segment.options;
        assert!(
            options.mss.is_none() && options.window_scale.is_none() && !options.sack_permitted,
            "options of a SYN: {segment:?}"
        );
        if session.is_over() {
            // Answers to what the target still sends: nothing that opens or carries anything.
            let allowed = segment.flags == flags::RST
                || segment.flags & !flags::PSH == flags::ACK
                || segment.flags == flags::RST | flags::ACK;
            assert!(allowed && payload.is_empty(), "after the end: {segment:?} {session:?}");
            return segment;
        }
        if segment.has(flags::RST) {
            assert!(payload.is_empty(), "data on a reset: {segment:?}");
            if !session.established && session.stranger_acked == Some(segment.seq) && !segment.has(flags::ACK)
            {
                return segment;
            }
            let place = if session.established {
                [session.una, session.max]
            } else {
                [session.iss.wrapping_add(1); 2]
            };
            assert!(
                place.contains(&segment.seq),
                "a reset that the target cannot take: {segment:?} {session:?}"
            );
            // The second of a pair follows.
            session.reset = true;
            return segment;
        }
        assert!(session.established, "before the handshake: {segment:?} {session:?}");
        assert!(segment.has(flags::ACK), "no ACK: {segment:?}");
        session.on_timestamps(&segment);
        session.on_ack(&segment);
        let len = payload.len() as u32;
        if len == 0 && !segment.has(flags::FIN) {
            let probe = segment.seq == session.una.wrapping_sub(1);
            // The answer to a SYN+ACK that came again, while the target may know nothing of the first segment.
            let first = segment.seq == session.iss.wrapping_add(1) && !session.acked_once;
            let place = segment.seq == session.max || probe || first;
            assert!(place, "a bare ACK out of place: {segment:?} {session:?}");
            if probe && session.una != session.max {
                session.go_back_until = Some(session.max);
            }
            return segment;
        }
        let end = segment.seq.wrapping_add(len);
        let options_len = if session.timestamps { 12 } else { 0 };
        assert!(
            len + options_len <= session.mss.max(64),
            "larger than the target's MSS: {segment:?} {session:?}"
        );
        assert!(!before(session.right_edge, end), "beyond the window: {segment:?} {session:?}");
        let stream = &self.streams[session.stream];
        let from = stream.offset(segment.seq);
        let sent = usize::try_from(from).ok().and_then(|from| stream.bytes.get(from..from + len as usize));
        let equal = sent.is_some_and(|sent| sent.iter().zip(payload).all(|(sent, got)| *sent == Some(*got)));
        assert!(equal, "bytes that the client did not send: {segment:?} of stream {from}.. {session:?}");
        if segment.has(flags::FIN) {
            assert!(session.fin.is_none_or(|fin| fin == end), "a second end: {segment:?} {session:?}");
            session.fin = Some(end);
        } else if let Some(fin) = session.fin {
            assert!(!before(fin, end), "data after the FIN: {segment:?} {session:?}");
        }
        let end = end.wrapping_add(u32::from(segment.has(flags::FIN)));
        if before(segment.seq, session.max) {
            session.on_retransmission(now, &segment);
        } else {
            assert_eq!(segment.seq, session.max, "a hole in what is sent: {segment:?} {session:?}");
            if !session.acked_once && session.dup_acks == 0 {
                let flight = end.wrapping_sub(session.una);
                let most = INITIAL_WINDOW * session.mss + 1;
                assert!(flight <= most, "too much at once: {segment:?} {session:?}");
            }
            if session.una == session.max {
                session.timer_since = now;
                session.last_rto = None;
            }
            let turn = stream.turns.iter().find(|turn| turn.offset as i64 == from);
            // Between pipelined requests a server may fall silent: only a count of one answer a turn is certain.
            let hold = self.strict_turns.filter(|_| stream.answers_one_by_one());
            if let (Some(turn), Some(hold), 0, 1..) = (turn, hold, session.start, len) {
                let have = session.target_sent.wrapping_sub(session.target_isn.unwrap().wrapping_add(1));
                let held = now.saturating_sub(session.new_data_at) + MS;
                session.loose |= held >= hold;
                assert!(
                    have >= turn.read || session.loose,
                    "a turn after {have} of {} response bytes: {segment:?} {session:?}",
                    turn.read
                );
            }
            session.new_data_at = now;
            session.max = end;
        }
        if before(session.max, end) {
            session.max = end;
        }
        segment
    }

    fn on_syn(&mut self, now: u64, place: (Endpoint, Endpoint), segment: &Sent, payload: &[u8]) {
        assert!(payload.is_empty(), "data on a SYN: {segment:?}");
        assert_eq!(segment.flags, flags::SYN, "{segment:?}");
        if let Some(&index) = self.current.get(&place) {
            let session = &mut self.sessions[index];
            if session.iss == segment.seq && !session.is_over() {
                assert!(!session.established, "a SYN after the handshake: {segment:?} {session:?}");
                let interval = now - session.syn_at;
                // RFC 6298 section 2.1 and 5.5; up to the limit of the backoff.
                let backoff = (SYN_TIMEOUT << (session.syns - 1).min(2)).min(4 * SYN_TIMEOUT);
                let again = session.stranger_acked.take().is_some();
                assert!(
                    again || interval + 2 * TICK >= backoff,
                    "a SYN again after {interval} ns: {session:?}"
                );
                session.syn_at = now;
                session.syns += u32::from(!again);
                return;
            }
            // A SYN that was never answered may be given up without a word.
            assert!(session.is_over(), "a SYN on a live connection: {segment:?} {session:?}");
        }
        let (stream, start) = self.find_stream(segment);
        let index = self.sessions.len();
        self.known.insert((segment.source, segment.seq), (stream, start));
        self.current.insert(place, index);
        self.sessions.push(Session {
            stream,
            start,
            iss: segment.seq,
            offered: segment.options,
            syn_at: now,
            syns: 1,
            stranger_acked: None,
            established: false,
            target_isn: None,
            target_sent: 0,
            target_ts: None,
            told: 0,
            told_fin: None,
            mss: 0,
            shift: 0,
            timestamps: false,
            una: segment.seq,
            max: segment.seq.wrapping_add(1),
            right_edge: 0,
            window: 0,
            dup_acks: 0,
            sacked: None,
            recovery_until: None,
            go_back_until: None,
            timer_since: now,
            last_rto: None,
            acked_once: false,
            last_ack: None,
            last_ts: segment.options.timestamps.map(|(value, _)| value),
            fin: None,
            reset: false,
            target_reset: false,
            unacked_since: None,
            unacked_segments: 0,
            opened_at: 0,
            loose: false,
            new_data_at: now,
        });
    }

    /// Whose SYN it is: by its number, which no other stream has.
    fn find_stream(&self, segment: &Sent) -> (usize, usize) {
        let mut found = None;
        for (i, stream) in self.streams.iter().enumerate() {
            let offset = stream.offset(segment.seq.wrapping_add(1));
            let Ok(offset) = usize::try_from(offset) else { continue };
            if offset <= stream.bytes.len() && stream.is_beginning(offset) {
                assert!(found.is_none(), "a SYN of two streams: {segment:?}");
                found = Some((i, offset));
            }
        }
        found.unwrap_or_else(|| panic!("a session that begins within a turn: {segment:?}"))
    }

    fn read_frame(&self, frame: &[u8]) -> Sent {
        let link = &self.link;
        let parsed = SlicedPacket::from_ethernet(frame).expect("a well-formed packet");
        assert_eq!(frame[..12], [link.destination_mac, link.source_mac].concat(), "MAC addresses");
        let tags = link.tags.iter().flatten().count();
        assert_eq!(parsed.link_exts.len(), tags, "tags");
        let ip = &frame[14 + 4 * tags..];
        assert!(ip.len() <= usize::from(link.mtu), "{} bytes on a path of {}", ip.len(), link.mtu);
        let mut sent = read_ip(ip).expect("a whole TCP segment");
        sent.payload.0 += 14 + 4 * tags;
        sent.payload.1 += 14 + 4 * tags;
        assert_eq!(sent.payload.1, frame.len(), "bytes after the packet");
        sent
    }
}

impl Session {
    fn on_timestamps(&mut self, segment: &Sent) {
        assert_eq!(segment.options.timestamps.is_some(), self.timestamps, "timestamps: {segment:?} {self:?}");
        if let Some((value, echo)) = segment.options.timestamps {
            assert!(
                self.last_ts.is_none_or(|last| !before(value, last)),
                "TSval goes back: {segment:?} {self:?}"
            );
            self.last_ts = Some(value);
            assert!(self.target_ts.is_some_and(|sent| !before(sent, echo)), "TSecr: {segment:?} {self:?}");
        }
    }

    fn on_ack(&mut self, segment: &Sent) {
        assert!(
            !before(self.target_sent, segment.ack),
            "acknowledges what was not sent: {segment:?} {self:?}"
        );
        assert!(
            self.last_ack.is_none_or(|last| !before(segment.ack, last)),
            "ACK goes back: {segment:?} {self:?}"
        );
        self.last_ack = Some(segment.ack);
        if !before(segment.ack, self.told) {
            self.unacked_since = None;
            self.unacked_segments = 0;
        }
    }

    /// Something is sent again: for a reason, and not too soon.
    fn on_retransmission(&mut self, now: u64, segment: &Sent) {
        assert!(!before(segment.seq, self.una), "what is acknowledged is sent again: {segment:?} {self:?}");
        let in_flight = |mark: Option<u32>| mark.is_some_and(|mark| before(segment.seq, mark));
        if segment.seq != self.una {
            // In a recovery with SACK each acknowledgment may bring the next hole again, a partial one too (RFC 6675).
            let recovering = self.recovery_until.is_some_and(|mark| before(self.una, mark));
            let partial = now == self.timer_since && recovering;
            let reason =
                in_flight(self.go_back_until) || in_flight(self.sacked) && (self.dup_acks > 0 || partial);
            assert!(reason, "sent again without a reason: {segment:?} {self:?}");
            return;
        }
        // Duplicate acknowledgments, a partial one, an opened window; or the timer.
        let first = self.dup_acks >= 3 && !in_flight(self.recovery_until);
        let partial =
            now == self.timer_since && (in_flight(self.recovery_until) || in_flight(self.go_back_until));
        let sacked = in_flight(self.sacked) && self.dup_acks > 0;
        let opened = in_flight(self.go_back_until) && self.opened_at == now;
        let elapsed = now - self.timer_since;
        let least = self.last_rto.unwrap_or(0).clamp(RTO_MIN, 4000 * MS);
        let timer = elapsed + 2 * TICK >= least;
        if timer {
            self.go_back_until = Some(self.max);
        }
        if first || partial || sacked || opened {
            if !in_flight(self.recovery_until) {
                self.recovery_until = Some(self.max);
            }
            return;
        }
        assert!(timer, "sent again after {elapsed} ns: {segment:?} {self:?}");
        assert!(elapsed <= RTO_MAX + SYN_TIMEOUT, "sent again only after {elapsed} ns: {segment:?} {self:?}");
        self.last_rto = Some(elapsed);
        self.timer_since = now;
        self.recovery_until = None;
    }
}

/// Reads an IP packet and verifies its checksums and lengths; `None`: not TCP.
pub fn read_ip(ip: &[u8]) -> Option<Sent> {
    let parsed = SlicedPacket::from_ip(ip).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { return None };
    let (source, destination, checksum, len) = match parsed.net? {
        NetSlice::Ipv4(v4) => {
            let header = v4.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum(), "IP checksum");
            let checksum = tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap();
            let len = usize::from(header.total_len());
            (from_v4(header.source()), from_v4(header.destination()), checksum, len)
        }
        NetSlice::Ipv6(v6) => {
            let header = v6.header();
            let checksum = tcp.calc_checksum_ipv6(header.source(), header.destination()).unwrap();
            (header.source(), header.destination(), checksum, usize::from(header.payload_length()) + 40)
        }
        NetSlice::Arp(_) => return None,
    };
    assert_eq!(tcp.checksum(), checksum, "TCP checksum");
    assert_eq!(len, ip.len(), "the length of the IP packet");
    let (bits, options) = (tcp.slice()[13], tcp.options());
    assert_eq!(bits & 0xe0, 0, "flags that nobody asked for");
    assert_eq!(tcp.slice()[12] & 0x0f, 0, "reserved bits");
    assert!(options.len() <= 40);
    let start = tcp.payload().as_ptr() as usize - ip.as_ptr() as usize;
    Some(Sent {
        source: Endpoint { ip: source, port: tcp.source_port() },
        destination: Endpoint { ip: destination, port: tcp.destination_port() },
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        flags: bits,
        window: tcp.window_size(),
        options: tcp_options::parse(options),
        payload: (start, start + tcp.payload().len()),
    })
}
