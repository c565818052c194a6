//! One simulated life: what happens in it follows from its seed. Clients or captures on one side, the target on the other, lossy paths
//! between them and the engine, and at the end the comparison of what was sent with what arrived.

use crate::checker::Checker;
use crate::clients::{self, Habit, Shape};
use crate::lab::{self, MS, S, Wire, endpoint, link};
use crate::network::{Events, Path, Random};
use crate::recording::Recording;
use crate::streams::{CapturePath, Ending, Expected, Stream};
use crate::target::{Manners, Received, Target};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::response::ResponseHeader;
use replayer_common::tcp_options;
use replayer_engine::config::{Config, Service};
use replayer_engine::counters::{Counter, Counters};
use replayer_engine::{AddressRange, Engine, Link};

/// No life is longer.
const LIMIT: u64 = 600 * S;

/// Packets or records that come at once, at most: more than the engine's batch.
const LARGEST_BATCH: usize = 100;

/// Everything about a life except its traffic.
#[derive(Clone, Debug)]
pub struct World {
    pub to_target: Path,
    pub to_assistant: Path,
    pub to_engine: Path,
    pub manners: Manners,
    /// Clients, servers and target speak IPv6.
    pub v6: bool,
    pub copies: u32,
    pub pool: u32,
    pub link: Link,
    /// The path to the target becomes narrower, at this time after the start.
    pub narrower: Option<(u64, u16)>,
    pub waits: bool,
    /// The capture itself misses packets.
    pub misses: bool,
    /// More is lost than the engine promises to make up for: it is counted how many streams arrive whole.
    pub forgiving: bool,
    /// Bytes of room in a frame: captured packets may be that long.
    pub room: usize,
    /// Now and then there is no room in the transmit ring.
    pub full_per_mille: u32,
    /// The worker looks no more often than this: what came meanwhile is one batch.
    pub pause_us: u32,
    pub start: u64,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Sessions whose capture was whole, and how many of these delivered exactly their stream.
    pub sound: u32,
    pub equal: u32,
    /// Streams with a hole in their capture, and the pieces of these that had to arrive.
    pub holes: u32,
    pub pieces: u32,
    /// From the last captured packet until all was over, ns.
    pub tail: u64,
    pub segments: u64,
}

impl World {
    /// A world that a seed makes, with clients that it makes up.
    pub fn of(seed: u64) -> (World, Vec<Stream>) {
        let mut random = Random::new(seed);
        let random = &mut random;
        let path = |random: &mut Random| Path {
            lost_per_mille: random.below(51),
            repeated_per_mille: random.below(51),
            reordered_per_mille: random.below(251),
            latency_us: 50 + random.below(500),
            late_us: 1 + random.below(4000),
        };
        let mut world = World::kind(random);
        (world.to_target, world.to_assistant, world.to_engine) = (path(random), path(random), path(random));
        let mut capture = CapturePath { network: path(random), missed_per_mille: 0 };
        // Half of the worlds are kind. The others have holes in the capture, or a target with bad manners.
        match random.below(12) {
            0 | 1 => capture.missed_per_mille = 5 + random.below(40),
            2 => world.manners.closes = Some(2 + random.below(6)),
            3 => world.manners.resets = Some(3 + random.below(8)),
            4 => world.manners.silent_per_mille = 50 + random.below(200),
            5 => world.manners.refuses_until_ms = u64::from(random.below(3000)),
            _ => {}
        }
        world.misses = capture.missed_per_mille > 0;
        let streams = world.clients(capture, random);
        (world, streams)
    }

    fn kind(random: &mut Random) -> World {
        let v6 = random.chance(300);
        let offload = random.chance(200);
        let mut tags = [None; 2];
        for tag in &mut tags[..[0, 0, 0, 1, 2][random.below(5) as usize]] {
            *tag = Some((random.pick(&[0x8100, 0x88a8]), random.below(4095) as u16));
        }
        let mtu = random.pick(&[1500, 1500, 1400, 1280, 9000]);
        let link = Link { tags, mtu, ..link() };
        World {
            to_target: Path::default(),
            to_assistant: Path::default(),
            to_engine: Path::default(),
            manners: Manners {
                receive_buffer: random.pick(&[2000, 8000, 65_000, 200_000]),
                read_at_most: random.pick(&[700, 20_000, 1_000_000]),
                read_every_ms: u64::from(random.below(5)),
                pause_ms: if random.chance(150) { 500 + u64::from(random.below(5000)) } else { 0 },
                think_ms: random.below(30),
                other_sizes: random.chance(300),
                in_pieces: random.chance(200),
                silent_per_mille: 0,
                closes: None,
                resets: None,
                lingers_ms: if random.chance(100) { u64::from(random.below(300)) } else { 0 },
                delayed_ack_ms: random.pick(&[None, Some(10), Some(40), Some(200)]),
                timestamps: random.chance(600),
                keep_alive: random.chance(200),
                mtu: random.pick(&[1500, 1500, 1280, 9000]),
                refuses_until_ms: 0,
            },
            copies: 1 + random.below(5) / 2,
            pool: if random.chance(300) { 4 + random.below(60) } else { 0 },
            narrower: random.chance(100).then(|| (u64::from(random.below(400)) * MS, 1280)),
            waits: random.chance(900),
            misses: false,
            forgiving: false,
            room: if offload { 65_700 } else { 2048 },
            full_per_mille: if random.chance(100) { 20 } else { 0 },
            pause_us: random.pick(&[0, 0, 300, 2000]),
            // Some live through a wrap of the ticks, others of the milliseconds.
            start: match random.below(6) {
                0 => (1u64 << 48) - u64::from(random.below(3000)) * MS,
                1 => (1u64 << 32) * MS - u64::from(random.below(3000)) * MS,
                _ => 1000 * S,
            },
            v6,
            link,
        }
    }

    /// A world that is the same on all paths and has nothing else to it.
    pub fn plain(path: Path) -> World {
        World {
            to_target: path,
            to_assistant: path,
            to_engine: path,
            manners: Manners {
                receive_buffer: 65_000,
                read_at_most: 65_000,
                read_every_ms: 0,
                pause_ms: 0,
                think_ms: 5,
                other_sizes: false,
                in_pieces: false,
                silent_per_mille: 0,
                closes: None,
                resets: None,
                lingers_ms: 0,
                delayed_ack_ms: Some(10),
                timestamps: true,
                keep_alive: false,
                mtu: 1500,
                refuses_until_ms: 0,
            },
            v6: false,
            copies: 1,
            pool: 0,
            link: link(),
            narrower: None,
            waits: true,
            misses: false,
            forgiving: false,
            room: 2048,
            full_per_mille: 0,
            pause_us: 0,
            start: 1000 * S,
        }
    }

    /// One with four clients, for the table. Its seed makes the traffic.
    pub fn of_table(path: Path, seed: u64) -> (World, Vec<Stream>) {
        let random = &mut Random::new(seed);
        let world = World { forgiving: true, ..World::plain(path) };
        let shape = Shape {
            server: endpoint(lab::ONLINE),
            path: CapturePath { network: path, missed_per_mille: 0 },
            offload: false,
            tags: 0,
            longest: 20_000,
            requests: 12,
        };
        let streams = (0..4u32).map(|number| {
            let client = Endpoint { ip: from_v4([10, 0, 0, 1 + number as u8]), port: 40_000 };
            let begin = world.start + u64::from(random.below(50)) * MS;
            let isn = (number << 28).wrapping_sub(random.below(40_000));
            let habit = random.pick(&[Habit::Requests, Habit::Requests, Habit::Pipelined, Habit::Greeted]);
            clients::make(client, isn, begin, habit, Ending::Fin, &shape, random)
        });
        let streams = streams.collect();
        (world, streams)
    }

    fn clients(&self, capture: CapturePath, random: &mut Random) -> Vec<Stream> {
        let v6 = self.v6;
        let shape = Shape {
            server: endpoint(if v6 { "[fd00::1:1]:80" } else { lab::ONLINE }),
            path: capture,
            offload: self.room > 2048,
            tags: random.pick(&[0, 0, 1, 2]),
            longest: if random.chance(50) { 150_000 } else { 20_000 },
            requests: 12,
        };
        let mut streams: Vec<Stream> = Vec::new();
        let count = 1 + random.below(4);
        for number in 0..count {
            let ip = match v6 {
                false => from_v4([10, 0, 0, 1 + number as u8]),
                true => endpoint(&format!("[fd00::{}]:1", 1 + number)).ip,
            };
            let mut client = Endpoint { ip, port: 40_000 };
            let mut begin = self.start + u64::from(random.below(50)) * MS;
            // Regions of sequence numbers that do not touch; the first is about the wrap.
            let mut isn = (number << 28).wrapping_sub(random.below(40_000));
            if number > 0 && random.chance(200) {
                // A client that uses its port again, at once.
                let old = streams.last().unwrap();
                client = old.client;
                begin = old.packets.last().map_or(begin, |packet| packet.at + MS);
                isn = old.isn.wrapping_add(1 << 26);
            }
            let habit = random.pick(&[
                Habit::Requests,
                Habit::Requests,
                Habit::Pipelined,
                Habit::Greeted,
                Habit::Streaming,
                Habit::FastOpen,
            ]);
            let end = match random.below(20) {
                0 => Ending::Reset,
                1 => Ending::Silence,
                _ => Ending::Fin,
            };
            streams.push(clients::make(client, isn, begin, habit, end, &shape, random));
        }
        streams
    }

    /// Whether a target that gets a connection reads all of it and closes when its peer does.
    fn target_behaves(&self) -> bool {
        self.manners.closes.is_none() && self.manners.resets.is_none() && self.manners.refuses_until_ms == 0
    }
}

enum Event {
    Captured(Vec<u8>),
    AtTarget(Vec<u8>),
    AtAssistant(Vec<u8>),
    Record(ResponseHeader),
}

/// Services for all servers of the streams, each with a port of its own at the target.
fn services(streams: &[Stream]) -> Vec<Service> {
    let mut services: Vec<Service> = Vec::new();
    for stream in streams {
        if services.iter().all(|service| service.online != stream.server) {
            let v4 = replayer_common::addr::is_v4(&stream.server.ip);
            let ip = endpoint(if v4 { lab::TARGET } else { "[fd00::2:1]:8080" }).ip;
            let port = 8080 + services.len() as u16;
            services.push(Service { online: stream.server, target: Endpoint { ip, port } });
        }
    }
    services
}

fn config(world: &World, seed: u64, services: &[Service]) -> Config {
    let mut config = lab::config();
    config.services = services.to_vec();
    config.copies_millionths = u64::from(world.copies) * 1_000_000;
    config.seed = seed;
    config.frame_room = world.room.min(9216) as u16;
    config.wait_for_responses = world.waits;
    config.limits.connections = 256;
    config.limits.sessions = 256;
    config.limits.identities = 4096;
    if world.pool > 0 {
        let first = match services.iter().any(|service| replayer_common::addr::is_v4(&service.target.ip)) {
            true => from_v4([10, 9, 0, 0]),
            false => endpoint("[fd00::9:0]:1").ip,
        };
        config.pool = vec![AddressRange { first, count: world.pool }];
    }
    config
}

/// The header record of an IP packet of the target.
fn record(packet: &[u8], services: &[Service]) -> ResponseHeader {
    let parsed = SlicedPacket::from_ip(packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("not TCP") };
    let (source, destination) = match parsed.net {
        Some(NetSlice::Ipv4(ip)) => (from_v4(ip.header().source()), from_v4(ip.header().destination())),
        Some(NetSlice::Ipv6(ip)) => (ip.header().source(), ip.header().destination()),
        _ => panic!("not IP"),
    };
    let source = Endpoint { ip: source, port: tcp.source_port() };
    let service = services.iter().position(|service| service.target == source).expect("a service");
    let mut record = ResponseHeader {
        service: service as u16,
        addr: destination,
        port: tcp.destination_port(),
        flags: tcp.slice()[13],
        window: tcp.window_size(),
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        payload_len: tcp.payload().len() as u32,
        ..Default::default()
    };
    record.set_options(&tcp_options::parse(tcp.options()));
    record
}

/// Lives through a world; panics where a rule is broken.
pub fn run(world: &World, streams: &[Stream], seed: u64, recording: &mut Recording) -> Outcome {
    let mut random = Random::new(seed ^ 0x5eed);
    let services = services(streams);
    let config = config(world, seed, &services);
    let (gap_timeout, hold_limit) = (config.gap_timeout_ns, config.hold_limit_ns);
    let start = world.start;
    let mut engine = Engine::new(config, start);
    for service in 0..services.len() {
        engine.set_link(service, Some(world.link));
    }
    let mut wire = Wire::with_room(if world.room > 2048 { 256 } else { 1024 }, world.room);
    wire.keep_refused = true;
    let mut target = Target::new(world.manners.clone(), Random::new(random.draw()), start);
    let mut checker = Checker::new(streams, world.link);
    let mut expected: Vec<Expected> = streams.iter().map(|stream| stream.expected(gap_timeout)).collect();
    for (i, stream) in streams.iter().enumerate() {
        // A port that is used again, by a SYN that nobody saw: it looks like more of the old connection.
        let reused =
            streams[..i].iter().any(|old| old.client == stream.client && old.server == stream.server);
        if reused && !expected[i].syn_captured {
            expected[i].pieces.clear();
        }
    }
    let m = &world.manners;
    let exact = !m.other_sizes && !m.in_pieces && m.silent_per_mille == 0 && world.target_behaves();
    checker.strict_turns = (exact && world.waits && !world.misses).then_some(hold_limit);
    checker.starved = world.full_per_mille > 0;

    let mut events = Events::new();
    let mut captures_left = 0;
    for packet in streams.iter().flat_map(|stream| &stream.packets) {
        events.add(packet.at, Event::Captured(packet.bytes.clone()));
        captures_left += 1;
    }
    let mut narrower = world.narrower;
    let mut now = start;
    let mut stopped_at = None;
    let mut last_captured = start;
    let mut quiet_since = start;
    loop {
        if let Some((at, mtu)) = narrower
            && now >= start + at
        {
            narrower = None;
            let link = Link { mtu: world.link.mtu.min(mtu), ..world.link };
            for service in 0..services.len() {
                engine.set_link(service, Some(link));
            }
            checker.set_link(link);
        }
        wire.full = random.chance(world.full_per_mille);
        let mut frames = Vec::new();
        let mut records = Vec::new();
        while let Some(event) = events.due(now) {
            match event {
                Event::Captured(bytes) => {
                    captures_left -= 1;
                    last_captured = now;
                    recording.captured(now - start, &bytes);
                    frames.push(wire.captured_bytes(&bytes));
                    if events.next_due(now).is_none_or(|next| !matches!(next, Event::Captured(_)))
                        || frames.len() == LARGEST_BATCH
                    {
                        engine.on_captured(now, &mut frames, &mut wire);
                    }
                }
                Event::AtTarget(packet) => target.receive(packet, now, &checker, streams),
                Event::AtAssistant(packet) => {
                    let record = record(&packet, &services);
                    // The assistant returns what was asked for, nothing else.
                    let identity = Endpoint { ip: record.addr, port: record.port };
                    if wire.registered.contains(&(record.service, identity)) {
                        for arrival in world.to_engine.arrivals(now, &mut random) {
                            events.add(arrival, Event::Record(record));
                        }
                    }
                }
                Event::Record(record) => {
                    let from = services[usize::from(record.service)].target;
                    recording.record(now - start, &record);
                    checker.on_record(now, &record, from);
                    records.push(record);
                    // One of each session: the checker cannot know between which of several the engine sent something.
                    let more = events.next_due(now).is_some_and(|next| {
                        let same =
                            |a: &ResponseHeader, b: &ResponseHeader| (a.addr, a.port) == (b.addr, b.port);
                        matches!(next, Event::Record(next) if !records.iter().any(|other| same(next, other)))
                    });
                    if !more || records.len() == LARGEST_BATCH {
                        engine.on_responses(now, &records, &mut wire);
                        transmit(world, now, &mut wire, &mut checker, recording, &mut events, &mut random);
                        for record in records.drain(..) {
                            checker.after_records(&record, services[usize::from(record.service)].target);
                        }
                    }
                }
            }
            transmit(world, now, &mut wire, &mut checker, recording, &mut events, &mut random);
        }
        engine.on_timers(now, &mut wire);
        transmit(world, now, &mut wire, &mut checker, recording, &mut events, &mut random);
        checker.on_time(now);
        for packet in target.run(now, streams) {
            recording.target(now - start, &packet);
            checker.on_target(&packet);
            for arrival in world.to_assistant.arrivals(now, &mut random) {
                events.add(arrival, Event::AtAssistant(packet.clone()));
            }
        }
        #[cfg(debug_assertions)]
        if random.chance(20) {
            engine.check();
        }

        let pending = engine.pending();
        if captures_left > 0 || pending.replay_bytes > 0 || pending.out_of_order_bytes > 0 {
            quiet_since = now;
        }
        let idle = captures_left == 0 && engine.gauges().sessions_live == 0;
        // Who never closes is stopped when it has been quiet for longer than anything takes.
        let quiet = now > quiet_since + 70 * S;
        if stopped_at.is_none() && (idle || quiet || now >= start + LIMIT) {
            assert!(now < start + LIMIT, "it never ends: {:?}", engine.counters());
            engine.stop(now, &mut wire);
            transmit(world, now, &mut wire, &mut checker, recording, &mut events, &mut random);
            stopped_at = Some(now);
        }
        // The target may not have got the last acknowledgment: it asks again, and is answered without a session.
        if stopped_at.is_some_and(|at| now > at + S && (target.open().is_empty() || now > at + 20 * S)) {
            break;
        }
        let mut next = now + 200 * MS;
        if let Some(at) = events.next_at() {
            next = next.min(at);
        }
        if let Some(ahead) = engine.next_deadline_ns(now) {
            next = next.min(now + ahead.max(65_536));
        }
        now = next.min(target.deadline(now)).max(now + 1000 * u64::from(world.pause_us.max(1)));
    }

    let counters = *engine.counters();
    let pending = engine.pending();
    for (name, left, right) in counters.identities(&pending) {
        assert_eq!(left, right, "{name}: {counters:?}");
    }
    assert!(engine.stopped());
    assert_eq!(pending, Default::default());
    wire.check();
    #[cfg(debug_assertions)]
    engine.check();
    let open = target.open();
    let received = target.into_received(streams);
    let mut outcome = judge(world, streams, &expected, &received, &counters);
    // A connection stays open only where the last segment of all was lost: a reset, or the acknowledgment of a FIN that came again only
    // when the identity was no longer registered.
    for identity in open {
        assert!(
            checker.was_ended(identity),
            "{identity} is left open at the target: {}",
            story(world, &counters)
        );
    }
    outcome.tail = stopped_at.unwrap().saturating_sub(last_captured);
    outcome.segments = checker.count;
    outcome
}

fn story(world: &World, counters: &Counters) -> String {
    let counted: Vec<String> = Counter::ALL
        .iter()
        .filter(|counter| counters[**counter] > 0)
        .map(|counter| format!("{} {}", counter.name(), counters[*counter]))
        .collect();
    format!("{world:?}\n{}", counted.join(", "))
}

#[allow(clippy::too_many_arguments, reason = "everything that a packet passes")]
fn transmit(
    world: &World,
    now: u64,
    wire: &mut Wire,
    checker: &mut Checker<'_>,
    recording: &mut Recording,
    events: &mut Events<Event>,
    random: &mut Random,
) {
    for (sent, frame) in wire.take_tried_bytes() {
        checker.on_sent(now, &frame);
        if !sent {
            continue;
        }
        recording.sent(now - world.start, &frame);
        let headers = 14 + 4 * world.link.tags.iter().flatten().count();
        for arrival in world.to_target.arrivals(now, random) {
            events.add(arrival, Event::AtTarget(frame[headers..].to_vec()));
        }
    }
}

/// Compares what arrived with what had to.
fn judge(
    world: &World,
    streams: &[Stream],
    expected: &[Expected],
    received: &[Received],
    counters: &Counters,
) -> Outcome {
    let mut outcome = Outcome::default();
    let copies = world.copies;
    let refused = counters[Counter::SessionsRefusedPool] + counters[Counter::SessionsRefusedLimit];
    for (i, (stream, expected)) in streams.iter().zip(expected).enumerate() {
        let theirs: Vec<&Received> = received.iter().filter(|received| received.stream == i).collect();
        let mut coverage = vec![0u32; stream.bytes.len()];
        for piece in &theirs {
            assert!(stream.is_beginning(piece.start), "{piece:?} begins within a turn");
            for times in &mut coverage[piece.start..piece.start + piece.bytes] {
                *times += 1;
            }
        }
        let most = coverage.iter().max().copied().unwrap_or(0);
        assert!(most <= copies, "bytes came {most} times: {theirs:?} {}", story(world, counters));
        if !world.target_behaves() || refused > 0 {
            continue;
        }
        if stream.is_encrypted() {
            assert!(most == 0, "bytes of an encrypted stream: {theirs:?} {}", story(world, counters));
            continue;
        }
        // A client that only knocks need not be seen by the application.
        let knocks = stream.bytes.is_empty() && stream.end == Ending::Reset;
        if expected.sound && !knocks {
            let whole = theirs
                .iter()
                .filter(|piece| piece.start == 0 && piece.bytes == stream.bytes.len())
                .filter(|piece| piece.closed || stream.end != Ending::Fin)
                .count() as u32;
            outcome.sound += copies;
            outcome.equal += whole;
            if world.forgiving {
                continue;
            }
            let fin = stream.end == Ending::Fin;
            assert_eq!(whole, copies, "stream {i} (FIN: {fin}): {theirs:?}\n{}", story(world, counters));
        }
        let pieces = if world.forgiving { &[][..] } else { &expected.pieces };
        if !expected.sound {
            outcome.holes += 1;
            outcome.pieces += pieces.iter().filter(|piece| !piece.is_empty()).count() as u32;
        }
        for piece in pieces {
            let missing = coverage[piece.clone()].iter().position(|times| *times != copies);
            if let Some(at) = missing {
                panic!(
                    "byte {} of stream {i} of {} came {} times, not {copies}: {theirs:?} of {:?}\n{}",
                    piece.start + at,
                    stream.bytes.len(),
                    coverage[piece.start + at],
                    expected.pieces,
                    story(world, counters)
                );
            }
        }
    }
    if world.target_behaves() {
        let bytes: u64 = received.iter().map(|piece| piece.bytes as u64).sum();
        let delivered = counters[Counter::ReplayBytesDelivered];
        assert!(bytes >= delivered, "{delivered} bytes delivered, {bytes} arrived");
    }
    outcome
}
