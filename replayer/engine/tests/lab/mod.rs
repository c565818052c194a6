//! A world for the engine without a network: captured segments and header records are typed in, what it sends is read out.
//!
//! Segments are written as a trace prints them: `"PA 1+100 ack 1"` has the flags PSH and ACK, 100 bytes from number 1 on, and
//! acknowledges up to 1. Numbers are relative, as in Wireshark: a client's count from its ISN, an acknowledgment from the ISN of the side
//! that it goes to, so a SYN is 0 and the first byte 1. Flags are `S F R P A`, or `.` for none; after the numbers may come
//! `win N`, `mss N`, `scale N`, `ts VALUE/ECHO`, `sack A-B` and `sackok`.
//!
//! The byte with relative number `n` of a stream is always [`byte`]`(n)`. Every segment that the engine sends is parsed by a parser
//! that is not its own, with its checksums, and each of its payload bytes is compared, so no test can overlook a byte that the
//! client did not send.

#![allow(dead_code, reason = "each test binary uses its part of it")]
#![allow(unreachable_pub, missing_docs, reason = "a module of test binaries")]

pub mod wire;

use replayer_common::addr::Endpoint;
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::config::{Config, Limits, Service};
use replayer_engine::counters::Counter;
use replayer_engine::{Engine, Link};
use std::collections::HashMap;
use std::net::SocketAddr;
pub use wire::{Segment, Wire};

pub const MS: u64 = 1_000_000;
pub const S: u64 = 1000 * MS;

pub const CLIENT: &str = "10.0.0.1:40000";
pub const ONLINE: &str = "10.0.1.1:80";
pub const TARGET: &str = "10.0.2.1:8080";

/// The first sequence numbers: relative ones count from here.
#[derive(Clone, Copy, Debug)]
pub struct Isns {
    pub client: u32,
    pub online: u32,
    pub target: u32,
}

/// The byte with relative sequence number `n` of every client's stream.
pub fn byte(n: u32) -> u8 {
    (n ^ (n >> 8) ^ (n >> 13)) as u8
}

/// Numbers below the bound that each is asked for with, the same ones for a seed that is not 0 (xorshift, Marsaglia 2003).
pub fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    move |bound| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    }
}

pub fn endpoint(text: &str) -> Endpoint {
    text.parse::<SocketAddr>().unwrap().into()
}

pub fn link() -> Link {
    Link { source_mac: [2; 6], destination_mac: [4; 6], tags: [None; 2], mtu: 1500 }
}

/// Small limits: a test should not reserve gigabytes.
pub fn config() -> Config {
    let mut config = Config::new(vec![Service { online: endpoint(ONLINE), target: endpoint(TARGET) }]);
    config.limits = Limits {
        connections: 1000,
        sessions: 1000,
        held_bytes: 4 << 20,
        held_bytes_per_connection: 1 << 20,
        identities: 1 << 16,
        unanswered_syns: 1 << 14,
        copies_unanswered: 1 << 14,
    };
    config
}

/// One engine and what is around it.
pub struct Lab {
    pub engine: Engine,
    pub wire: Wire,
    /// The clock, ns.
    pub now: u64,
    pub isns: Isns,
    /// The client whose segments are captured, and that `target` answers unless it is told another identity.
    pub client: Endpoint,
    pub service: u16,
    /// ISNs of identities that are not the client's or that began in the middle of its stream: by the SYN they sent.
    pub isn_of: HashMap<Endpoint, u32>,
}

impl Lab {
    pub fn new() -> Lab {
        Lab::with(config())
    }

    pub fn with(config: Config) -> Lab {
        Lab::with_isns(config, Isns { client: 1_000_000, online: 2_000_000, target: 3_000_000 })
    }

    pub fn with_isns(config: Config, isns: Isns) -> Lab {
        // A host that has been up for a while.
        let now = 5_000 * S;
        let services = config.services.len();
        let mut engine = Engine::new(config, now);
        for service in 0..services {
            engine.set_link(service, Some(link()));
        }
        Lab {
            engine,
            wire: Wire::new(512),
            now,
            isns,
            client: endpoint(CLIENT),
            service: 0,
            isn_of: HashMap::new(),
        }
    }

    // ---- what comes in ----

    /// A segment of the client is captured.
    #[track_caller]
    pub fn client(&mut self, text: &str) {
        self.client_segments(&[text]);
    }

    /// Segments that are captured in one batch.
    #[track_caller]
    pub fn client_segments(&mut self, texts: &[&str]) {
        let mut frames: Vec<_> = texts.iter().map(|text| self.capture(text)).collect();
        self.engine.on_captured(self.now, &mut frames, &mut self.wire);
        self.check();
    }

    /// A segment of the client with bytes that are not [`byte`]'s: what is sent of them cannot be read by [`Lab::sent`].
    #[track_caller]
    pub fn client_bytes(&mut self, text: &str, payload: &[u8]) {
        let frame = self.capture_bytes(&Typed::parse(text), payload.to_vec());
        self.engine.on_captured(self.now, &mut vec![frame], &mut self.wire);
        self.check();
    }

    fn capture(&mut self, text: &str) -> (wire::Frame, usize) {
        let typed = Typed::parse(text);
        let bytes = (0..typed.len).map(|i| byte(typed.seq.wrapping_add(i))).collect();
        self.capture_bytes(&typed, bytes)
    }

    fn capture_bytes(&mut self, typed: &Typed, payload: Vec<u8>) -> (wire::Frame, usize) {
        let segment = Segment {
            source: self.client,
            destination: endpoint(ONLINE),
            seq: self.isns.client.wrapping_add(typed.seq),
            ack: typed.ack.map_or(0, |ack| self.isns.online.wrapping_add(ack)),
            flags: typed.flags,
            window: typed.window.unwrap_or(500),
            mss: typed.mss,
            window_scale: typed.scale,
            sack_permitted: typed.sack_permitted,
            timestamps: typed.timestamps,
            payload,
        };
        self.wire.captured(&segment)
    }

    /// The header record of a segment that the target sent to the client.
    #[track_caller]
    pub fn target(&mut self, text: &str) {
        self.target_to(self.client, &[text]);
    }

    /// Header records that come in one batch, to a certain identity.
    #[track_caller]
    pub fn target_to(&mut self, identity: Endpoint, texts: &[&str]) {
        let records: Vec<_> = texts.iter().map(|text| self.record(identity, text)).collect();
        self.engine.on_responses(self.now, &records, &mut self.wire);
        self.check();
    }

    fn record(&self, identity: Endpoint, text: &str) -> ResponseHeader {
        let typed = Typed::parse(text);
        let mut record = ResponseHeader {
            service: self.service,
            flags: typed.flags,
            port: identity.port,
            addr: identity.ip,
            window: typed.window.unwrap_or(60_000),
            seq: self.isns.target.wrapping_add(typed.seq),
            ack: typed.ack.map_or(0, |ack| self.isns.client.wrapping_add(ack)),
            payload_len: typed.len,
            ..Default::default()
        };
        if let Some((value, echo)) = typed.timestamps {
            record.present |= present::TIMESTAMPS;
            (record.ts_val, record.ts_ecr) = (value, echo);
        }
        if let Some(mss) = typed.mss {
            record.present |= present::MSS;
            record.mss = mss;
        }
        if let Some(scale) = typed.scale {
            record.present |= present::WINDOW_SCALE;
            record.window_scale = scale;
        }
        if let Some((left, right)) = typed.sack {
            record.sack_count = 1;
            record.sack[0] = (self.isns.client.wrapping_add(left), self.isns.client.wrapping_add(right));
        }
        record
    }

    /// The clock goes on, and timers run as often as they ask to.
    pub fn pass(&mut self, duration: u64) {
        let until = self.now + duration;
        loop {
            let ahead = self.engine.next_deadline_ns(self.now);
            // A worker never waits longer than a second.
            let next = ahead.map_or(until, |ahead| self.now + ahead.max(65_536)).min(self.now + S).min(until);
            self.now = next;
            self.engine.on_timers(self.now, &mut self.wire);
            if self.now >= until {
                break;
            }
        }
        self.check();
    }

    // ---- what goes out ----

    /// All that was sent since the last look, to any target.
    pub fn sent(&mut self) -> Vec<Segment> {
        let sent = self.wire.take_sent();
        for segment in &sent {
            if segment.flags & flags::SYN != 0 {
                self.isn_of.insert(segment.source, segment.seq);
            }
            for (i, &got) in segment.payload.iter().enumerate() {
                let n = segment.seq.wrapping_sub(self.isns.client).wrapping_add(i as u32);
                assert_eq!(got, byte(n), "byte {n} of the stream, in {segment:?}");
            }
        }
        sent
    }

    /// The segment in the notation, without options.
    pub fn text(&self, segment: &Segment) -> String {
        let mut text = String::new();
        for (flag, letter) in
            [(flags::SYN, 'S'), (flags::FIN, 'F'), (flags::RST, 'R'), (flags::PSH, 'P'), (flags::ACK, 'A')]
        {
            if segment.flags & flag != 0 {
                text.push(letter);
            }
        }
        text += &format!(" {}", segment.seq.wrapping_sub(self.isns.client));
        if !segment.payload.is_empty() {
            text += &format!("+{}", segment.payload.len());
        }
        if segment.flags & flags::ACK != 0 {
            text += &format!(" ack {}", segment.ack.wrapping_sub(self.isns.target));
        }
        text
    }

    /// Just these segments were sent since the last look.
    #[track_caller]
    pub fn expect(&mut self, expected: &[&str]) {
        let sent = self.sent();
        let sent: Vec<_> = sent.iter().map(|segment| self.text(segment)).collect();
        assert_eq!(sent, expected);
    }

    /// The only session's handshake: the client's SYN, the target's answer, an acknowledgment.
    #[track_caller]
    pub fn handshake(&mut self) {
        self.client("S 0 mss 1460 scale 7 sackok");
        self.expect(&["S 0"]);
        self.client("A 1 ack 1");
        self.target("SA 0 ack 1 mss 1460 scale 7 win 60000");
        self.expect(&["A 1 ack 1"]);
    }

    // ---- what is true at any time ----

    pub fn count(&self, counter: Counter) -> u64 {
        self.engine.counters()[counter]
    }

    /// The accounting identities, and no frame lost.
    #[track_caller]
    pub fn check(&self) {
        for (name, left, right) in self.engine.counters().identities(&self.engine.pending()) {
            assert_eq!(left, right, "{name}: {:?}", self.engine.counters());
        }
        self.wire.check();
        #[cfg(debug_assertions)]
        self.engine.check();
    }

    /// Stops the engine; the target answers nothing. Nothing may be left.
    #[track_caller]
    pub fn stop(&mut self) {
        self.engine.stop(self.now, &mut self.wire);
        self.stop_after();
    }

    /// After the engine was told to stop.
    #[track_caller]
    pub fn stop_after(&mut self) {
        self.check();
        self.pass(600 * MS);
        assert!(self.engine.stopped(), "{:?}", self.engine.gauges());
        let pending = self.engine.pending();
        assert_eq!((pending.sessions, pending.replay_bytes, pending.out_of_order_bytes), (0, 0, 0));
        assert_eq!(self.engine.gauges().held_bytes, 0);
    }
}

/// A segment as typed, numbers relative.
#[derive(Default)]
struct Typed {
    flags: u8,
    seq: u32,
    len: u32,
    ack: Option<u32>,
    window: Option<u16>,
    mss: Option<u16>,
    scale: Option<u8>,
    sack_permitted: bool,
    timestamps: Option<(u32, u32)>,
    sack: Option<(u32, u32)>,
}

impl Typed {
    #[track_caller]
    fn parse(text: &str) -> Typed {
        let mut typed = Typed::default();
        let mut words = text.split_whitespace();
        for letter in words.next().expect("flags").chars() {
            typed.flags |= match letter {
                'S' => flags::SYN,
                'F' => flags::FIN,
                'R' => flags::RST,
                'P' => flags::PSH,
                'A' => flags::ACK,
                '.' => 0,
                _ => panic!("flag {letter} in {text:?}"),
            };
        }
        // Negative numbers lie before the ISN.
        let number =
            |word: &str| word.parse::<i64>().unwrap_or_else(|_| panic!("{word:?} in {text:?}")) as u32;
        let pair = |word: &str, between: char| {
            let (a, b) = word.split_once(between).unwrap_or_else(|| panic!("{word:?} in {text:?}"));
            (number(a), number(b))
        };
        let place = words.next().expect("sequence number");
        (typed.seq, typed.len) = if place.contains('+') { pair(place, '+') } else { (number(place), 0) };
        while let Some(word) = words.next() {
            if word == "sackok" {
                typed.sack_permitted = true;
                continue;
            }
            let value = words.next().unwrap_or_else(|| panic!("{word:?} without a value in {text:?}"));
            match word {
                "ack" => typed.ack = Some(number(value)),
                "win" => typed.window = Some(number(value) as u16),
                "mss" => typed.mss = Some(number(value) as u16),
                "scale" => typed.scale = Some(number(value) as u8),
                "ts" => typed.timestamps = Some(pair(value, '/')),
                "sack" => typed.sack = Some(pair(value, '-')),
                _ => panic!("{word:?} in {text:?}"),
            }
        }
        typed
    }
}
