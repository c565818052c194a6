//! Sequences of events at a small engine: captured packets, header records, time, links, limits, a file's time and end, sampling, a stop. Ten bytes make an event, so that
//! inputs stay meaningful when the fuzzer moves, repeats or joins parts of them; what is natural next needs the smallest numbers.

use crate::lab::wire::{Frame, Segment, Wire};
use crate::lab::{self, MS, S, byte, endpoint, link};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::config::{Config, Limits, Service};
use replayer_engine::{AddressRange, Engine, Link};

/// Bytes before the events, and of an event.
pub const HEAD: usize = 4;
/// Bytes of an event.
pub const EVENT: usize = 10;
const MAX_EVENTS: usize = 600;
const MTUS: [u16; 4] = [1500, 576, 1280, 9000];
const MAX_FRAME: usize = 2048;

/// Makes an engine from the first bytes of `data`, and events from the rest.
///
/// # Panics
/// Where the engine does, its invariants or accounts do not hold, it sends a byte that no client sent, or something is left after a stop.
pub fn run(data: &[u8]) {
    let Some((head, events)) = data.split_first_chunk::<HEAD>() else { return };
    let mut world = World::new(*head);
    for event in events.as_chunks::<EVENT>().0.iter().take(MAX_EVENTS) {
        world.event(*event);
        world.check();
    }
    world.stop();
}

/// A client whose packets are captured.
struct Client {
    source: Endpoint,
    destination: Endpoint,
    isn: u32,
    next: u32,
    read: u32,
}

/// A session as its identity's segments show it.
struct Peer {
    /// The number after what was sent last.
    end: u32,
    target_isn: u32,
    /// What the target has sent.
    sent: u32,
}

struct World {
    engine: Engine,
    wire: Wire,
    now: u64,
    /// Where packets come from a file: its time.
    file_time: u64,
    clients: Vec<Client>,
    services: Vec<Service>,
    /// Services and identities that were seen, in the order of appearance.
    peers: Vec<((u16, Endpoint), Peer)>,
    away: Vec<Frame>,
    link: Link,
    /// No packet was captured whose payload is not the client's.
    honest: bool,
    stopped: bool,
}

impl World {
    fn new([options, copies, tags, seed]: [u8; HEAD]) -> World {
        let bit = |bit: u8| options & 1 << bit != 0;
        let services = vec![
            Service { online: endpoint(lab::ONLINE), target: endpoint(lab::TARGET) },
            Service { online: endpoint("[fd00::1:1]:80"), target: endpoint("[fd00::2:1]:8080") },
        ];
        let mut config = Config::new(services.clone());
        config.copies_millionths = 500_000 * (1 + u64::from(copies % 6));
        config.seed = u64::from(seed);
        config.wait_for_responses = !bit(0);
        config.new_connections_only = bit(1);
        if bit(2) {
            config.pool = vec![AddressRange { first: from_v4([10, 9, 0, 0]), count: 2 }];
        }
        config.frame_room = MAX_FRAME as u16;
        config.spread_ns = if tags & 16 != 0 { 5 * MS } else { 0 };
        // So small that all are reached.
        config.limits = Limits {
            connections: if bit(3) { 2 } else { 8 },
            sessions: if bit(4) { 3 } else { 16 },
            held_bytes: if bit(5) { 8 << 10 } else { 256 << 10 },
            held_bytes_per_connection: if bit(6) { 4 << 10 } else { 64 << 10 },
            identities: if bit(7) { 4 } else { 64 },
            unanswered_syns: if bit(4) { 2 } else { 64 },
            copies_unanswered: 2,
        };
        let mut link = Link { mtu: MTUS[usize::from(tags >> 2 & 3)], ..link() };
        for tag in &mut link.tags[..usize::from(tags % 3)] {
            *tag = Some((0x8100, 5));
        }
        let now = 5_000 * S;
        let mut engine = Engine::new(config, now);
        engine.set_link(0, Some(link));
        engine.set_link(1, Some(link));
        let client = |source: &str, to: usize, isn: u32| Client {
            source: endpoint(source),
            destination: services[to].online,
            isn,
            next: isn,
            read: 7000,
        };
        World {
            engine,
            wire: Wire::with_room(64, MAX_FRAME),
            now,
            file_time: 0,
            clients: vec![
                client("10.0.0.1:40000", 0, u32::MAX - 100),
                client("10.0.0.1:40001", 0, 1_000_000),
                client("10.0.0.2:40000", 0, (1 << 31) - 1000),
                client("[fd00::1]:40000", 1, 5),
            ],
            services,
            peers: Vec::new(),
            away: Vec::new(),
            link,
            honest: true,
            stopped: false,
        }
    }

    fn event(&mut self, [kind, who, a, b, c, d, e, f, g, h]: [u8; EVENT]) {
        let wide = |low: u8, high: u8| u16::from_le_bytes([low, high]);
        match kind % 16 {
            0..6 => self.captured(who, [a, b, c, d, e, f, g, h]),
            6..11 => self.response(who, [a, b, c, d, e, f, g, h]),
            // Up to a minute.
            11 | 12 => self.pass(u64::from(wide(a, b)) * MS),
            13 => {
                // The captured packet that comes next, changed in a few places.
                let mut frame = self.segment(who, [a, b, 0, 0, 0, 0, 0, 0]).to_bytes();
                for (at, with) in [(c, d), (e, f), (g, h)] {
                    let len = frame.len();
                    frame[usize::from(at) % len] ^= with;
                }
                self.honest = false;
                self.capture(&frame);
            }
            14 => {
                let client = &self.clients[usize::from(who) % self.clients.len()];
                self.engine.expect_turn(self.now, client.source, client.destination);
            }
            _ => match who % 9 {
                0 => self.wire.full = !self.wire.full,
                1 => {
                    self.engine.set_link(usize::from(a % 2), None);
                }
                2 => {
                    self.link.mtu = MTUS[usize::from(a % 4)];
                    self.engine.set_link(0, Some(self.link));
                    self.engine.set_link(1, Some(self.link));
                }
                3 => {
                    // A frame stays for what is captured next.
                    let count = usize::from(a).min(self.wire.free().saturating_sub(1));
                    self.away.extend(self.wire.take_away(count));
                }
                4 => self.wire.give_back(std::mem::take(&mut self.away)),
                5 => {
                    // From here on packets come from a file, which is read at any speed.
                    self.file_time = self.file_time.max(self.now) + u64::from(wide(a, b)) * MS;
                    self.engine.set_capture_time(self.file_time);
                }
                6 => self.engine.end_of_capture(self.now, &mut self.wire),
                7 => self.engine.set_sample(self.now, u64::from(a) << 24, &mut self.wire),
                _ => {
                    if a == 0xff {
                        self.engine.stop(self.now, &mut self.wire);
                        self.stopped = true;
                    }
                }
            },
        }
        self.read_sent();
    }

    /// The client's next segment, or one elsewhere. Zeros: a SYN, or data where data goes on.
    fn segment(&mut self, who: u8, [control, len, seq, far, ack, options, more, _]: [u8; 8]) -> Segment {
        let client = &mut self.clients[usize::from(who) % 4];
        let kinds = [
            flags::ACK | flags::PSH,
            flags::ACK,
            flags::SYN,
            flags::FIN | flags::ACK,
            flags::RST | flags::ACK,
            flags::RST,
            flags::SYN | flags::ACK,
            0,
        ];
        let control = kinds[usize::from(control) % kinds.len()];
        let syn = control & flags::SYN != 0;
        if syn && more & 1 != 0 {
            // The port again.
            client.isn = client.next.wrapping_add(1 << 20);
            client.next = client.isn;
        }
        let offset = (i32::from(seq as i8) * 50).wrapping_mul([1, 1, 100, 1 << 20][usize::from(far % 4)]);
        let seq = client.next.wrapping_add(offset as u32);
        let len = usize::from(len) * if more & 2 != 0 { 1 } else { 6 };
        client.read = client.read.wrapping_add(u32::from(ack) * 10);
        let first = seq.wrapping_add(u32::from(syn));
        let end = first.wrapping_add(len as u32).wrapping_add(u32::from(control & flags::FIN != 0));
        if (end.wrapping_sub(client.next) as i32) > 0 && far == 0 {
            client.next = end;
        }
        Segment {
            source: client.source,
            destination: client.destination,
            seq,
            ack: if syn { 0 } else { client.read },
            flags: control,
            window: 500,
            mss: (syn && options & 1 == 0).then_some([1460, 1, 536, u16::MAX][usize::from(options >> 1 & 3)]),
            window_scale: (syn && options & 8 == 0).then_some([7, 0, 14, 255][usize::from(options >> 4 & 3)]),
            sack_permitted: syn,
            timestamps: (options & 64 != 0).then_some(((self.now / MS) as u32, 5)),
            payload: (0..len as u32).map(|i| byte(first.wrapping_add(i))).collect(),
        }
    }

    fn captured(&mut self, who: u8, numbers: [u8; 8]) {
        let frame = self.segment(who, numbers).to_bytes();
        self.capture(&frame);
    }

    fn capture(&mut self, frame: &[u8]) {
        if self.wire.free() == 0 {
            self.wire.give_back(std::mem::take(&mut self.away));
        }
        let mut frames = vec![self.wire.captured_bytes(frame)];
        self.engine.on_captured(self.now, &mut frames, &mut self.wire);
    }

    /// A record of the target. Zeros: what answers the session's last segment.
    fn response(&mut self, who: u8, [kind, len, high, seq, ack, window, options, sack]: [u8; 8]) {
        let Some(((service, identity), peer)) = self.peers.get_mut(usize::from(who)) else { return };
        let kinds = [
            flags::ACK,
            flags::ACK | flags::PSH,
            flags::SYN | flags::ACK,
            flags::FIN | flags::ACK,
            flags::RST | flags::ACK,
            flags::RST,
            flags::FIN | flags::PSH | flags::ACK,
            flags::SYN,
        ];
        let control = kinds[usize::from(kind) % kinds.len()];
        let syn = control & flags::SYN != 0;
        let len = u32::from(u16::from_le_bytes([len, high]));
        let near = |delta: u8| (i32::from(delta as i8) * if kind & 8 != 0 { 1 << 18 } else { 10 }) as u32;
        let seq = if syn { peer.target_isn } else { peer.sent }.wrapping_add(near(seq));
        if kind & 8 == 0 {
            let fin = u32::from(control & flags::FIN != 0);
            peer.sent = if syn { seq.wrapping_add(1) } else { seq.wrapping_add(len).wrapping_add(fin) };
        }
        let ack = peer.end.wrapping_add(near(ack));
        let mut record = ResponseHeader {
            service: if options & 128 != 0 { 9 } else { *service },
            flags: control,
            present: present::MSS | options & (present::TIMESTAMPS | present::WINDOW_SCALE),
            port: identity.port,
            window: [60_000, 0, 1, 500, u16::MAX, 100, 1460, 3000][usize::from(window % 8)],
            addr: identity.ip,
            seq,
            ack,
            payload_len: if syn { 0 } else { len },
            ts_val: (self.now / MS) as u32,
            ts_ecr: 3,
            mss: [1460, 0, 536, u16::MAX][usize::from(options >> 3 & 3)],
            window_scale: window >> 4,
            ..Default::default()
        };
        if sack > 0 {
            record.sack_count = 1 + sack % 3;
            let left = ack.wrapping_add(u32::from(sack) * 20);
            record.sack = [(left, left.wrapping_add(100)), (left, ack), (ack, left)];
        }
        self.engine.on_responses(self.now, &[record], &mut self.wire);
    }

    /// As a worker would, timers run when they ask to.
    fn pass(&mut self, duration: u64) {
        let until = self.now + duration;
        loop {
            let ahead = self.engine.next_deadline_ns(self.now).map_or(S, |ahead| ahead.clamp(65_536, S));
            self.now = (self.now + ahead).min(until);
            self.engine.on_timers(self.now, &mut self.wire);
            self.read_sent();
            if self.now >= until {
                return;
            }
        }
    }

    /// Parses what was sent, by a parser that is not the engine's and looks at checksums.
    fn read_sent(&mut self) {
        for bytes in self.wire.take_sent_bytes() {
            assert!(bytes.len() <= MAX_FRAME);
            let segment = Segment::from_bytes(&bytes);
            let service = self.services.iter().position(|service| service.target == segment.destination);
            let key = (service.expect("a target") as u16, segment.source);
            let place = self.peers.iter().position(|(known, _)| *known == key).unwrap_or_else(|| {
                let target_isn = segment.seq ^ 0x5555_0000;
                self.peers.push((key, Peer { end: 0, target_isn, sent: target_isn }));
                self.peers.len() - 1
            });
            let peer = &mut self.peers[place].1;
            let len = segment.payload.len() as u32 + (segment.flags & (flags::SYN | flags::FIN)).count_ones();
            if segment.has(flags::SYN) {
                assert!(segment.payload.is_empty(), "data on a SYN");
                peer.sent = peer.target_isn;
            }
            peer.end = segment.seq.wrapping_add(len);
            for (i, &got) in segment.payload.iter().enumerate().filter(|_| self.honest) {
                let number = segment.seq.wrapping_add(i as u32);
                assert_eq!(got, byte(number), "byte {number} is not the client's: {segment:?}");
            }
        }
    }

    fn check(&self) {
        for (name, left, right) in self.engine.counters().identities(&self.engine.pending()) {
            assert_eq!(left, right, "{name}: {:?}", self.engine.counters());
        }
        self.wire.check();
        #[cfg(debug_assertions)]
        self.engine.check();
    }

    fn stop(mut self) {
        self.wire.give_back(std::mem::take(&mut self.away));
        if !self.stopped {
            self.engine.stop(self.now, &mut self.wire);
        }
        self.read_sent();
        self.pass(600 * MS);
        self.check();
        assert!(self.engine.stopped(), "{:?}", self.engine.gauges());
        assert_eq!(self.engine.pending(), Default::default());
        assert_eq!(self.engine.gauges().held_bytes, 0);
    }
}
