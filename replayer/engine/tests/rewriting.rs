//! What holds of every rewritten packet, whatever was captured: options, tags, partial checksums, numbers before and after a wrap. Cases
//! are made up by proptest, which makes those that fail small; packets are built and read by etherparse.

mod lab;

use etherparse::{
    IpHeaders, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, NetSlice, PacketBuilder, SlicedPacket,
    TcpHeader, TcpOptionsIterator, TransportSlice,
};
use lab::{MS, S, Wire, config, endpoint};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::RngSeed;
use replayer_common::addr::{Endpoint, is_v4, v4_octets};
use replayer_common::packet::{flags, parse_tcp};
use replayer_common::response::{ResponseHeader, present};
use replayer_common::tcp_options::{self, TcpOptions};
use replayer_engine::{Engine, Link};

/// A client, and how its packets look where they are captured.
#[derive(Clone, Debug)]
struct Capture {
    v6: bool,
    isn: u32,
    online_isn: u32,
    /// Options of its SYN and of its other segments, as raw bytes.
    syn_options: Vec<u8>,
    options: Vec<u8>,
    ip_options: usize,
    tags: usize,
    /// What the checksum fields hold: a packet from a local veth has anything there.
    checksums: Option<u16>,
}

/// The target, and the way to it.
#[derive(Clone, Debug)]
struct Target {
    isn: u32,
    mss: Option<u16>,
    window: u16,
    window_scale: Option<u8>,
    timestamps: bool,
    tags: usize,
    mtu: u16,
}

/// All numbers, and often those about the wrap.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        (0u32..4000).prop_map(|back| 0u32.wrapping_sub(back)),
        0x7fff_f000..0x8000_1000u32
    ]
}

/// What clients really send, and bytes that nobody should.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let known = vec![
        vec![1],
        vec![2, 4, 0x05, 0xb4],
        vec![2, 4, 0, 1],
        vec![3, 3, 7],
        vec![3, 3, 200],
        vec![4, 2],
        vec![8, 10, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9],
        vec![5, 10, 0, 0, 0, 1, 0, 0, 0, 9],
        // Multipath TCP, a Fast Open cookie, an authentication.
        vec![30, 12, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8],
        vec![34, 10, 1, 2, 3, 4, 5, 6, 7, 8],
        vec![19, 18, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    ];
    let listed = vec(select(known), 0..8).prop_map(|options| options.concat());
    prop_oneof![4 => listed, 1 => vec(any::<u8>(), 0..=40)].prop_map(|mut bytes| {
        bytes.truncate(40);
        bytes
    })
}

fn capture() -> impl Strategy<Value = Capture> {
    let numbers = (any::<bool>(), number(), number());
    let looks = (options(), options(), 0..=10usize, 0..=2usize, option::of(any::<u16>()));
    (numbers, looks).prop_map(
        |((v6, isn, online_isn), (syn_options, options, ip_options, tags, checksums))| Capture {
            v6,
            isn,
            online_isn,
            syn_options,
            options,
            ip_options,
            tags,
            checksums,
        },
    )
}

fn target() -> impl Strategy<Value = Target> {
    let mss = option::of(select(vec![0, 1, 88, 536, 1440, 1460, 8960, u16::MAX]));
    let scale = option::of(select(vec![0, 1, 7, 14, 15, 255]));
    let mtu = select(vec![576, 1280, 1400, 1500, 9000]);
    (number(), mss, 1..=u16::MAX, scale, any::<bool>(), 0..=2usize, mtu).prop_map(
        |(isn, mss, window, window_scale, timestamps, tags, mtu)| Target {
            isn,
            mss,
            window,
            window_scale,
            timestamps,
            tags,
            mtu,
        },
    )
}

impl Capture {
    fn ends(&self) -> (Endpoint, Endpoint) {
        match self.v6 {
            false => (endpoint(lab::CLIENT), endpoint(lab::ONLINE)),
            true => (endpoint("[fd00::1]:40000"), endpoint("[fd00::1:1]:80")),
        }
    }

    /// The frame of a segment, numbers relative to the ISNs.
    fn frame(&self, seq: u32, ack: u32, control: u8, payload: &[u8]) -> Vec<u8> {
        let (client, server) = self.ends();
        let mut tcp = TcpHeader::new(client.port, server.port, self.isn.wrapping_add(seq), 500);
        tcp.syn = control & flags::SYN != 0;
        tcp.ack = control & flags::ACK != 0;
        tcp.psh = control & flags::PSH != 0;
        tcp.fin = control & flags::FIN != 0;
        tcp.acknowledgment_number = if tcp.ack { self.online_isn.wrapping_add(ack) } else { 0 };
        tcp.set_options_raw(if tcp.syn { &self.syn_options } else { &self.options }).unwrap();
        let tcp_len = tcp.header_len();
        let ip = if self.v6 {
            IpHeaders::Ipv6(
                Ipv6Header { source: client.ip, destination: server.ip, hop_limit: 64, ..Default::default() },
                Default::default(),
            )
        } else {
            let ends = (v4_octets(&client.ip), v4_octets(&server.ip));
            let mut header = Ipv4Header::new(0, 64, IpNumber::TCP, ends.0, ends.1).unwrap();
            header.options = Ipv4Options::try_from(&[1u8; 40][..4 * self.ip_options]).unwrap();
            IpHeaders::Ipv4(header, Default::default())
        };
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2([6; 6], [8; 6]).ip(ip).tcp_header(tcp).write(&mut bytes, payload).unwrap();
        if let Some(garbage) = self.checksums {
            let tcp_at = bytes.len() - payload.len() - tcp_len;
            bytes[tcp_at + 16..tcp_at + 18].copy_from_slice(&garbage.to_be_bytes());
            if !self.v6 {
                bytes[14 + 10..14 + 12].copy_from_slice(&garbage.to_be_bytes());
            }
        }
        for _ in 0..self.tags {
            bytes.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
        }
        bytes
    }
}

/// A segment that was sent, after all was verified that can be seen of it alone.
struct Sent {
    seq: u32,
    flags: u8,
    options: TcpOptions,
    payload: Vec<u8>,
}

struct World {
    engine: Engine,
    wire: Wire,
    now: u64,
    capture: Capture,
    target: Target,
    link: Link,
}

impl World {
    fn new(capture: Capture, target: Target) -> World {
        let mut config = config();
        config.frame_room = 9216;
        let place = if capture.v6 { "[fd00::2:1]:8080" } else { lab::TARGET };
        config.services[0].online = capture.ends().1;
        config.services[0].target = endpoint(place);
        let mut link = Link { mtu: target.mtu, ..lab::link() };
        for tag in &mut link.tags[..target.tags] {
            *tag = Some((0x8100, 9));
        }
        let now = 5000 * S;
        let mut engine = Engine::new(config, now);
        engine.set_link(0, Some(link));
        World { engine, wire: Wire::with_room(64, 9216), now, capture, target, link }
    }

    fn captured(&mut self, seq: u32, ack: u32, control: u8, payload: &[u8]) {
        let frame = self.capture.frame(seq, ack, control, payload);
        let mut frames = vec![self.wire.captured_bytes(&frame)];
        self.engine.on_captured(self.now, &mut frames, &mut self.wire);
    }

    /// A record of the target, numbers relative to the ISNs.
    fn record(&mut self, control: u8, seq: u32, ack: u32) {
        let target = &self.target;
        let client = self.capture.ends().0;
        let syn = control & flags::SYN != 0;
        let mut record = ResponseHeader {
            flags: control,
            port: client.port,
            addr: client.ip,
            window: target.window,
            seq: target.isn.wrapping_add(seq),
            ack: self.capture.isn.wrapping_add(ack),
            ..Default::default()
        };
        if let (Some(mss), true) = (target.mss, syn) {
            record.present |= present::MSS;
            record.mss = mss;
        }
        if let (Some(shift), true) = (target.window_scale, syn) {
            record.present |= present::WINDOW_SCALE;
            record.window_scale = shift;
        }
        if target.timestamps {
            record.present |= present::TIMESTAMPS;
            record.ts_val = (self.now / MS) as u32;
        }
        self.engine.on_responses(self.now, &[record], &mut self.wire);
    }

    fn pass(&mut self, duration: u64) {
        let until = self.now + duration;
        while self.now < until {
            let ahead = self.engine.next_deadline_ns(self.now).map_or(S, |ahead| ahead.clamp(65_536, S));
            self.now = (self.now + ahead).min(until);
            self.engine.on_timers(self.now, &mut self.wire);
        }
    }

    fn sent(&mut self) -> Vec<Sent> {
        self.wire.take_sent_bytes().iter().map(|frame| self.read(frame)).collect()
    }

    fn read(&self, frame: &[u8]) -> Sent {
        let packet = SlicedPacket::from_ethernet(frame).expect("a well-formed packet");
        assert_eq!(packet.link_exts.len(), self.target.tags);
        assert_eq!(frame[..12], [self.link.destination_mac, self.link.source_mac].concat());
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("not TCP") };
        let (client, target) = (self.capture.ends().0, self.engine_target());
        let expected = match packet.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                assert_eq!(header.source(), v4_octets(&client.ip));
                assert_eq!(header.destination(), v4_octets(&target.ip));
                assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
                assert!(header.options().is_empty(), "IP options are the online path's");
                tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap()
            }
            NetSlice::Ipv6(ip) => {
                assert_eq!((ip.header().source(), ip.header().destination()), (client.ip, target.ip));
                tcp.calc_checksum_ipv6(client.ip, target.ip).unwrap()
            }
            NetSlice::Arp(_) => panic!("ARP"),
        };
        assert_eq!(tcp.checksum(), expected, "TCP checksum");
        assert_eq!((tcp.source_port(), tcp.destination_port()), (client.port, target.port));
        assert_eq!(tcp.urgent_pointer(), 0);
        let ip_len = frame.len() - 14 - 4 * self.target.tags;
        assert!(ip_len <= usize::from(self.target.mtu), "{ip_len} bytes on a path of {}", self.target.mtu);
        assert!(tcp.options().len() <= 40);
        for option in TcpOptionsIterator::from_slice(tcp.options()) {
            option.expect("an option that everybody knows, of the right length");
        }
        // The parser of the capture sees the same.
        let ours = parse_tcp(&frame).expect("what is sent could be captured");
        assert_eq!((ours.seq, ours.ack), (tcp.sequence_number(), tcp.acknowledgment_number()));
        assert_eq!((ours.src, ours.dst, ours.flags), (client.ip, target.ip, tcp.slice()[13]));
        let offset = usize::from(ours.payload_offset);
        assert_eq!(&frame[offset..offset + ours.payload_len as usize], tcp.payload());
        Sent {
            seq: tcp.sequence_number().wrapping_sub(self.capture.isn),
            flags: ours.flags,
            options: tcp_options::parse(tcp.options()),
            payload: tcp.payload().to_vec(),
        }
    }

    fn engine_target(&self) -> Endpoint {
        endpoint(if is_v4(&self.capture.ends().0.ip) { lab::TARGET } else { "[fd00::2:1]:8080" })
    }

    /// The client's SYN, the target's answer.
    fn handshake(&mut self) {
        self.captured(0, 0, flags::SYN, &[]);
        let sent = self.sent();
        assert_eq!(sent.len(), 1);
        let captured = tcp_options::parse(&self.capture.syn_options);
        let offered = &sent[0].options;
        assert_eq!((sent[0].seq, sent[0].flags), (0, flags::SYN));
        assert_eq!(offered.mss, Some(captured.mss.unwrap_or(536)));
        assert_eq!(offered.window_scale, captured.window_scale.map(|shift| shift.min(14)));
        assert_eq!(offered.sack_permitted, captured.sack_permitted);
        assert_eq!(offered.timestamps.is_some(), captured.timestamps.is_some());
        self.record(flags::SYN | flags::ACK, 0, 1);
        self.captured(1, 1, flags::ACK, &[]);
        let sent = self.sent();
        assert!(sent.iter().all(|segment| segment.flags == flags::ACK && segment.payload.is_empty()));
    }

    /// The target acknowledges what comes until it has `len` bytes; returns them.
    fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut received = Vec::new();
        let mut last_timestamp = None;
        for _ in 0..4 * len + 100 {
            let sent = self.sent();
            if sent.is_empty() && received.len() == len {
                break;
            }
            if sent.is_empty() {
                self.pass(50 * MS);
            }
            for segment in sent {
                if let Some((value, _)) = segment.options.timestamps {
                    let earlier = last_timestamp
                        .replace(value)
                        .is_some_and(|last: u32| (value.wrapping_sub(last) as i32) < 0);
                    assert!(!earlier, "TSval goes back");
                }
                // In order or again, never ahead.
                let at = segment.seq.wrapping_sub(1) as usize;
                if segment.payload.is_empty() {
                    continue;
                }
                assert!(at <= received.len(), "a hole: {at} after {}", received.len());
                let known = (received.len() - at).min(segment.payload.len());
                assert_eq!(segment.payload[..known], received[at..at + known]);
                received.extend_from_slice(&segment.payload[known..]);
            }
            self.record(flags::ACK, 1, 1 + received.len() as u32);
        }
        received
    }

    fn finish(mut self) {
        for (name, left, right) in self.engine.counters().identities(&self.engine.pending()) {
            assert_eq!(left, right, "{name}");
        }
        #[cfg(debug_assertions)]
        self.engine.check();
        self.engine.stop(self.now, &mut self.wire);
        self.pass(600 * MS);
        self.sent();
        assert!(self.engine.stopped());
        self.wire.check();
    }
}

/// Not the beginning of a protocol that the engine knows.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 1..4000).prop_map(|mut bytes| {
        bytes[0] = b'-';
        bytes
    })
}

/// The same cases in every run; PROPTEST_RNG_SEED makes others.
fn config_of_cases() -> ProptestConfig {
    let rng_seed = match std::env::var_os("PROPTEST_RNG_SEED") {
        Some(_) => ProptestConfig::default().rng_seed,
        None => RngSeed::Fixed(0x5eed),
    };
    ProptestConfig { failure_persistence: None, rng_seed, ..ProptestConfig::with_cases(2000) }
}

proptest! {
    #![proptest_config(config_of_cases())]

    #[test]
    fn b029_b039_what_is_sent_is_what_was_captured_and_well_formed(
        capture in capture(),
        target in target(),
        stream in payload(),
        cuts in vec(any::<Index>(), 0..6),
    ) {
        let mut world = World::new(capture, target);
        world.handshake();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        for ends in cuts.windows(2).filter(|ends| ends[0] < ends[1]) {
            world.captured(1 + ends[0] as u32, 1, flags::ACK | flags::PSH, &stream[ends[0]..ends[1]]);
        }
        prop_assert_eq!(world.receive(stream.len()), stream);
        world.finish();
    }

    #[test]
    fn b032_pieces_in_any_order_overlapping_and_repeated_make_the_stream_once(
        capture in capture(),
        target in target(),
        stream in payload(),
        pieces in vec((any::<Index>(), 1usize..1400), 0..12),
        order in any::<u64>(),
    ) {
        let mut world = World::new(capture, target);
        world.handshake();
        // Some of it anywhere, then all of it from back to front or from front to back.
        let mut ranges: Vec<(usize, usize)> = pieces
            .iter()
            .map(|(at, len)| (at.index(stream.len()), *len))
            .map(|(at, len)| (at, (at + len).min(stream.len())))
            .collect();
        let mut rest: Vec<(usize, usize)> =
            (0..stream.len()).step_by(700).map(|at| (at, (at + 700).min(stream.len()))).collect();
        if order & 1 == 1 {
            rest.reverse();
        }
        ranges.extend(rest);
        for (from, upto) in ranges {
            world.captured(1 + from as u32, 1, flags::ACK, &stream[from..upto]);
        }
        prop_assert_eq!(world.receive(stream.len()), stream);
        world.finish();
    }
}
