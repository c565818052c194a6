//! Both sides over loopback sockets, with the assistant's routing behind the server. The time is an argument; what has to
//! travel through the kernel is waited for with a deadline.

use super::client::{ChannelError, Client, ClientConfig};
use super::limits::{CLIENT_QUEUE, HEARTBEAT, HELLO_TIMEOUT, MAX_STRANGERS, REFUSED_LINGER, SILENCE};
use super::server::{PeerQueue, Server, ServerConfig, ServerError};
use super::wire::{self, Entry, Hello, Kind, Refusal, ServiceEntry, VERSION};
use crate::assistant::routing::{OWNER_GRACE, Route, Routing, TARGET_LINGER, TargetChange};
use nix::poll::{PollFlags, PollTimeout, poll};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::Protocol;
use replayer_common::response::ResponseHeader;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const TARGET: Endpoint = Endpoint { ip: from_v4_const([10, 9, 0, 1]), port: 80 };
const SERVICE: ServiceEntry = ServiceEntry { service: 5, protocol: Protocol::Tcp, target: TARGET };
const DEADLINE: Duration = Duration::from_secs(5);
const SECOND: u64 = 1_000_000_000;

const fn from_v4_const(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

fn identity(n: u16) -> Entry {
    Entry { service: 5, endpoint: Endpoint { ip: from_v4([192, 0, 2, 1]), port: n } }
}

fn header(port: u16, seq: u32) -> ResponseHeader {
    ResponseHeader { addr: from_v4([192, 0, 2, 1]), port, seq, ..Default::default() }
}

/// An assistant without a network interface: responses come from the test.
struct Assistant {
    server: Server,
    routing: Routing,
    now: u64,
}

impl Assistant {
    fn start(port: u16) -> Assistant {
        let config = ServerConfig { address: Some(Ipv4Addr::LOCALHOST.into()), port, key: b"key".to_vec() };
        let server = Server::bind(config).unwrap();
        Assistant { server, routing: Routing::new(1), now: SECOND }
    }

    fn address(&self) -> SocketAddr {
        self.server.local_addr().unwrap()
    }

    fn turn(&mut self) {
        let ready: Vec<PollFlags> = {
            let mut fds: Vec<_> = self.server.interests().collect();
            poll(&mut fds, PollTimeout::ZERO).unwrap();
            fds.iter().map(|fd| fd.revents().unwrap()).collect()
        };
        self.server.drive(self.now, &ready, &mut self.routing);
        while self.routing.is_sweeping() {
            self.routing.work();
        }
        self.server.flush(self.now, &mut self.routing);
    }

    fn respond(&mut self, mut header: ResponseHeader) -> Option<bool> {
        match self.routing.route(self.now, Protocol::Tcp, &TARGET, &mut header) {
            Route::Peer(peer) => Some(self.server.send(peer, &header)),
            Route::Kept => None,
        }
    }
}

struct Worker {
    client: Client,
    got: Vec<ResponseHeader>,
}

impl Worker {
    fn new(assistant: SocketAddr, instance: u64) -> Worker {
        Worker { client: Client::new(config(assistant, instance)).unwrap(), got: Vec::new() }
    }

    fn turn(&mut self, now: u64) {
        let got = &mut self.got;
        self.client.drive(now, |header| got.push(*header));
        self.client.flush(now);
    }
}

fn config(assistant: SocketAddr, instance: u64) -> ClientConfig {
    ClientConfig { assistant, key: b"key".to_vec(), instance, worker: 0, services: vec![SERVICE] }
}

/// Turns both sides until `done`, at a standing time.
fn until(
    assistant: &mut Assistant,
    worker: &mut Worker,
    mut done: impl FnMut(&mut Assistant, &mut Worker) -> bool,
) {
    let start = Instant::now();
    while !done(assistant, worker) {
        assert!(
            start.elapsed() < DEADLINE,
            "not done: {:?}, {:?}",
            worker.client.error(),
            worker.client.counters()
        );
        assistant.turn();
        worker.turn(assistant.now);
        std::thread::yield_now();
    }
}

fn connected(instance: u64) -> (Assistant, Worker) {
    let mut assistant = Assistant::start(0);
    let mut worker = Worker::new(assistant.address(), instance);
    until(&mut assistant, &mut worker, |_, w| w.client.is_connected());
    (assistant, worker)
}

fn renew(worker: &mut Worker, identities: &[Entry]) {
    assert!(worker.client.needs_renewal());
    assert!(worker.client.begin_renewal());
    for identity in identities {
        worker.client.register(*identity);
    }
    assert!(worker.client.end_renewal());
}

/// A connection that is no worker: sends bytes, and waits for what the assistant answers before it closes.
fn stranger(assistant: &mut Assistant, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(assistant.address()).unwrap();
    socket.write_all(bytes).unwrap();
    read_to_end(assistant, &mut socket)
}

fn read_to_end(assistant: &mut Assistant, socket: &mut TcpStream) -> Vec<u8> {
    socket.set_nonblocking(true).unwrap();
    let (mut answer, start) = (Vec::new(), Instant::now());
    loop {
        assert!(start.elapsed() < DEADLINE, "not closed");
        assistant.turn();
        match socket.read_to_end(&mut answer) {
            Ok(_) => return answer,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(_) => return answer,
        }
    }
}

fn refusal(reason: Refusal) -> Vec<u8> {
    [&[Kind::Refused as u8, 0, 4, 0][..], &wire::refused(reason)].concat()
}

fn hello_bytes(key: &[u8]) -> Vec<u8> {
    let (body, length) = wire::hello(&Hello { instance: 9, worker: 0, attempt: 1, key });
    [&wire::framing(Kind::Hello, length)[..], &body[..length]].concat()
}

#[test]
fn registered_identities_get_their_responses_and_no_others() {
    let (mut assistant, mut first) = connected(1);
    let mut second = Worker::new(assistant.address(), 2);
    until(&mut assistant, &mut second, |_, w| w.client.is_connected());
    assert_eq!(
        assistant.routing.take_changes().collect::<Vec<_>>(),
        [TargetChange::Add(Protocol::Tcp, TARGET)]
    );

    first.client.register(identity(1000));
    second.client.register(identity(2000));
    until(&mut assistant, &mut first, |a, _| a.routing.registrations() == 1);
    until(&mut assistant, &mut second, |a, _| a.routing.registrations() == 2);
    for seq in 0..300 {
        assert_eq!(assistant.respond(header(1000, seq)), Some(true));
        assert_eq!(assistant.respond(header(2000, 1000 + seq)), Some(true));
    }
    until(&mut assistant, &mut first, |_, w| w.got.len() == 300);
    until(&mut assistant, &mut second, |_, w| w.got.len() == 300);
    assert!(first.got.iter().enumerate().all(|(i, h)| (h.seq, h.service) == (i as u32, 5)));
    assert!(second.got.iter().all(|h| h.seq >= 1000));

    first.client.unregister(identity(1000));
    until(&mut assistant, &mut first, |a, _| a.routing.registrations() == 1);
    assert_eq!(assistant.respond(header(1000, 0)), None);
}

#[test]
fn b056_a_syn_ack_before_its_registration_is_delivered() {
    let (mut assistant, mut worker) = connected(1);
    assert_eq!(assistant.respond(header(1000, 1)), None);
    assert_eq!(assistant.respond(header(1000, 2)), None);
    worker.client.register(identity(1000));
    until(&mut assistant, &mut worker, |_, w| w.got.len() == 2);
    assert_eq!((worker.got[0].seq, worker.got[1].seq, worker.got[0].service), (1, 2, 5));
    assert_eq!(assistant.routing.counters().early_delivered, 2);
}

#[test]
fn b053_a_restarted_assistant_gets_all_identities_again() {
    let (mut assistant, mut worker) = connected(1);
    renew(&mut worker, &[]);
    worker.client.register(identity(1000));
    until(&mut assistant, &mut worker, |a, _| a.routing.registrations() == 1);
    let (port, mut now) = (assistant.address().port(), assistant.now);
    drop(assistant);
    let start = Instant::now();
    while worker.client.is_connected() {
        assert!(start.elapsed() < DEADLINE);
        worker.turn(now);
    }
    assert!(matches!(worker.client.error(), Some(ChannelError::Closed { .. })));
    // Nobody listens: attempts go on, at most a second apart.
    let attempts = worker.client.counters().attempts;
    while worker.client.counters().attempts < attempts + 8 {
        assert!(start.elapsed() < DEADLINE);
        now = worker.client.deadline().max(now);
        worker.turn(now);
        assert!(worker.client.deadline() <= now + 3 * SECOND);
    }

    let mut assistant = Assistant::start(port);
    assistant.now = now;
    let before = now;
    while !worker.client.is_connected() {
        assert!(start.elapsed() < DEADLINE);
        assistant.turn();
        // Time only jumps over pauses between attempts.
        assistant.now = if worker.client.fd().is_none() { worker.client.deadline() } else { assistant.now };
        worker.turn(assistant.now);
    }
    assert!(assistant.now - before <= 2 * SECOND);
    renew(&mut worker, &[identity(1000)]);
    until(&mut assistant, &mut worker, |a, _| a.routing.registrations() == 1);
    assert_eq!(assistant.respond(header(1000, 7)), Some(true));
    until(&mut assistant, &mut worker, |_, w| w.got.len() == 1);
}

#[test]
fn a_renewal_removes_what_is_over() {
    let (mut assistant, mut worker) = connected(1);
    for n in 0..100 {
        worker.client.register(identity(n));
    }
    renew(&mut worker, &[identity(3), identity(200)]);
    until(&mut assistant, &mut worker, |a, _| a.routing.registrations() == 2);
    assert_eq!(assistant.respond(header(3, 0)), Some(true));
    assert_eq!(assistant.respond(header(4, 0)), None);
    assert_eq!(assistant.respond(header(200, 0)), Some(true));
}

#[test]
fn a_worker_that_reconnects_finds_its_identities_and_a_dead_one_is_forgotten() {
    let (mut assistant, mut worker) = connected(1);
    worker.client.register(identity(1000));
    until(&mut assistant, &mut worker, |a, _| a.routing.registrations() == 1);
    // The worker has a new connection before the assistant learns that the old one is gone.
    let mut again = Worker::new(assistant.address(), 1);
    until(&mut assistant, &mut again, |_, w| w.client.error().is_some());
    assert!(
        matches!(again.client.error(), Some(ChannelError::Refused { reason: Refusal::Superseded, .. })),
        "attempt 1 is not newer than attempt 1"
    );
    assistant.now = again.client.deadline().max(assistant.now);
    until(&mut assistant, &mut again, |_, w| w.client.is_connected());
    assert_eq!(assistant.respond(header(1000, 1)), Some(true));
    until(&mut assistant, &mut again, |_, w| w.got.len() == 1);

    drop(worker);
    drop(again);
    let start = Instant::now();
    while assistant.routing.workers() > 0 {
        assert!(start.elapsed() < DEADLINE);
        assistant.turn();
    }
    assistant.now += OWNER_GRACE - 1;
    assistant.routing.tick(assistant.now);
    assistant.turn();
    assert_eq!(assistant.routing.registrations(), 1);
    assistant.now += 1;
    assistant.routing.tick(assistant.now);
    assistant.turn();
    assert_eq!(assistant.routing.registrations(), 0);
    assistant.routing.take_changes().for_each(drop);
    assistant.now += TARGET_LINGER;
    assistant.routing.tick(assistant.now);
    assert_eq!(
        assistant.routing.take_changes().collect::<Vec<_>>(),
        [TargetChange::Remove(Protocol::Tcp, TARGET)]
    );
    assert!(!assistant.routing.is_busy());
}

#[test]
fn targets_of_an_assistant_before_stay_for_those_who_name_them_in_time() {
    let mut assistant = Assistant::start(0);
    let other = Endpoint { port: 81, ..TARGET };
    for target in [TARGET, other] {
        assistant.routing.inherit(assistant.now, Protocol::Tcp, target);
    }
    assert_eq!(assistant.routing.targets(), 2);
    // A response before the worker is back waits for it.
    assert_eq!(assistant.respond(header(1000, 1)), None);
    let mut worker = Worker::new(assistant.address(), 1);
    until(&mut assistant, &mut worker, |_, w| w.client.is_connected());
    worker.client.register(identity(1000));
    until(&mut assistant, &mut worker, |_, w| w.got.len() == 1);
    assistant.routing.take_changes().for_each(drop);
    assistant.now += TARGET_LINGER;
    assistant.routing.tick(assistant.now);
    let changes: Vec<_> = assistant.routing.take_changes().collect();
    assert_eq!(changes, [TargetChange::Remove(Protocol::Tcp, other)]);
}

#[test]
fn the_newest_of_two_workers_with_the_same_identity_wins() {
    let (mut assistant, mut first) = connected(1);
    let mut second = Worker::new(assistant.address(), 2);
    until(&mut assistant, &mut second, |_, w| w.client.is_connected());
    first.client.register(identity(1000));
    until(&mut assistant, &mut first, |a, _| a.routing.registrations() == 1);
    second.client.register(identity(1000));
    until(&mut assistant, &mut second, |a, _| a.routing.counters().conflicts == 1);
    // The loser cannot take it back from the winner.
    first.client.unregister(identity(1000));
    first.client.register(identity(1001));
    until(&mut assistant, &mut first, |a, _| a.routing.counters().registered == 3);
    assistant.respond(header(1000, 1));
    until(&mut assistant, &mut second, |_, w| w.got.len() == 1);
}

#[test]
fn b055_strangers_are_refused_with_a_reason_while_a_peer_goes_on() {
    let (mut assistant, mut worker) = connected(1);
    worker.client.register(identity(1000));
    until(&mut assistant, &mut worker, |a, _| a.routing.registrations() == 1);

    assert_eq!(stranger(&mut assistant, b"GET / HTTP/1.1\r\n\r\n"), refusal(Refusal::Protocol));
    assert_eq!(stranger(&mut assistant, &hello_bytes(b"wrong")), refusal(Refusal::Key));
    let mut other_version = hello_bytes(b"key");
    other_version[12] = VERSION as u8 + 1;
    assert_eq!(stranger(&mut assistant, &other_version), refusal(Refusal::Version));
    // Registrations without a hello, or before the services.
    let register = [&wire::framing(Kind::Register, 20)[..], &identity(1).encode()].concat();
    assert_eq!(stranger(&mut assistant, &register), refusal(Refusal::Protocol));
    let early = [hello_bytes(b"key"), register].concat();
    assert_eq!(stranger(&mut assistant, &early), refusal(Refusal::Protocol));

    // Half-open, and one that sends its hello byte by byte and never finishes it.
    let mut silent = TcpStream::connect(assistant.address()).unwrap();
    let mut slow = TcpStream::connect(assistant.address()).unwrap();
    until(&mut assistant, &mut worker, |a, _| a.server.counters().accepted == 8);
    for byte in &hello_bytes(b"key")[..20] {
        assert_eq!(assistant.server.counters().refused_slow, 0, "before the time is over");
        slow.write_all(std::slice::from_ref(byte)).unwrap();
        assistant.now += HELLO_TIMEOUT / 20;
        assistant.turn();
        // What is replayed goes on meanwhile.
        let seq = worker.got.len() as u32;
        assert_eq!(assistant.respond(header(1000, seq)), Some(true));
        until(&mut assistant, &mut worker, |_, w| w.got.len() as u32 == seq + 1);
    }
    assert_eq!(read_to_end(&mut assistant, &mut silent), refusal(Refusal::Slow));
    assert_eq!(read_to_end(&mut assistant, &mut slow), refusal(Refusal::Slow));

    // A port scan: more connections than strangers may have.
    let scan: Vec<_> =
        (0..2 * MAX_STRANGERS).map(|_| TcpStream::connect(assistant.address()).unwrap()).collect();
    until(&mut assistant, &mut worker, |a, _| a.server.counters().accepted == 8 + 2 * MAX_STRANGERS as u64);
    assert!(assistant.server.connections() <= MAX_STRANGERS + 1);
    // A worker still gets in.
    let mut second = Worker::new(assistant.address(), 2);
    until(&mut assistant, &mut second, |_, w| w.client.is_connected());
    drop(scan);

    let got = worker.got.len();
    assert_eq!(assistant.respond(header(1000, 3)), Some(true));
    until(&mut assistant, &mut worker, |_, w| w.got.len() == got + 1);
    let counters = assistant.server.counters();
    assert_eq!((counters.refused_protocol, counters.refused_key, counters.refused_version), (3, 1, 1));
    assert_eq!(counters.refused_slow, 2);
    assistant.now += REFUSED_LINGER;
    until(&mut assistant, &mut worker, |a, _| a.server.connections() == 2);
}

#[test]
fn b009_the_worker_learns_why_it_is_refused() {
    let mut assistant = Assistant::start(0);
    let mut config = config(assistant.address(), 1);
    config.key = b"another".to_vec();
    let client = Client::new(config).unwrap();
    let mut worker = Worker { client, got: Vec::new() };
    until(&mut assistant, &mut worker, |_, w| w.client.error().is_some());
    let error = worker.client.error().unwrap();
    assert!(matches!(error, ChannelError::Refused { reason: Refusal::Key, .. }), "{error:?}");
    assert!(error.to_string().contains("--key"), "{error}");
    assert!(!worker.client.is_connected());
}

#[test]
fn b009_an_unreachable_assistant_and_a_silent_one_are_named() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut client = Client::new(config(address, 1)).unwrap();
    let start = Instant::now();
    let clock = move || start.elapsed().as_nanos() as u64;
    let error = client.wait_until_up(clock).unwrap_err();
    assert!(matches!(error, ChannelError::Unreachable { .. }), "{error:?}");

    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Client::new(config(mute.local_addr().unwrap(), 1)).unwrap();
    // A clock that hurries: the deadline comes at once.
    let calls = std::cell::Cell::new(0);
    let clock = || {
        calls.set(calls.get() + 1);
        calls.get() * SECOND
    };
    let error = client.wait_until_up(clock).unwrap_err();
    assert!(matches!(error, ChannelError::NoAnswer { .. } | ChannelError::Unreachable { .. }), "{error:?}");
}

#[test]
fn b009_an_occupied_port_is_named() {
    let assistant = Assistant::start(0);
    let port = assistant.address().port();
    let config = ServerConfig { address: Some(Ipv4Addr::LOCALHOST.into()), port, key: Vec::new() };
    let Err(error) = Server::bind(config) else { panic!("bound twice") };
    assert!(matches!(error, ServerError::Occupied(_)), "{error:?}");
    assert!(error.to_string().contains(&format!("port {port} is occupied")), "{error}");
}

#[test]
fn heartbeats_keep_an_idle_connection_and_silence_ends_it() {
    let (mut assistant, mut worker) = connected(1);
    for _ in 0..20 {
        assistant.now += HEARTBEAT;
        let received = worker.client.deadline();
        until(&mut assistant, &mut worker, |a, w| {
            a.turn();
            w.client.deadline() > received
        });
    }
    assert!(worker.client.is_connected());
    assert_eq!(assistant.server.counters().silent, 0);

    // The assistant stops for longer than a worker waits: the worker closes, and connects again later.
    let later = assistant.now + SILENCE + HEARTBEAT;
    let start = Instant::now();
    while worker.client.is_connected() {
        assert!(start.elapsed() < DEADLINE);
        worker.turn(later);
    }
    assert!(matches!(worker.client.error(), Some(ChannelError::Silent { .. })));
    assistant.now = later + SECOND;
    until(&mut assistant, &mut worker, |_, w| w.client.is_connected());

    // The worker stops: the assistant gives it up.
    assistant.now += SILENCE;
    let start = Instant::now();
    while assistant.routing.workers() > 0 {
        assert!(start.elapsed() < DEADLINE);
        assistant.turn();
    }
    assert_eq!(assistant.server.counters().silent, 1);
}

#[test]
fn a_slow_peer_is_bounded_and_holds_up_nobody() {
    let (mut assistant, mut slow) = connected(1);
    let mut quick = Worker::new(assistant.address(), 2);
    until(&mut assistant, &mut quick, |_, w| w.client.is_connected());
    slow.client.register(identity(1));
    until(&mut assistant, &mut slow, |a, _| a.routing.registrations() == 1);
    quick.client.register(identity(2));
    until(&mut assistant, &mut quick, |a, _| a.routing.registrations() == 2);

    let (mut taken, mut dropped, mut seq) = (0u64, 0u64, 0);
    while dropped < 5000 {
        match assistant.respond(header(1, seq)) {
            Some(true) => taken += 1,
            Some(false) => dropped += 1,
            None => panic!("not registered"),
        }
        seq += 1;
        if seq % 500 == 0 {
            assistant.turn();
        }
        // The kernel's socket buffers, at most some 6 MB each, and the queue.
        assert!(taken * 72 < 16 << 20, "the queue has no end");
    }
    assert_eq!(assistant.server.counters().records_dropped, dropped);
    assistant.respond(header(2, 42));
    until(&mut assistant, &mut quick, |_, w| w.got.len() == 1);

    // Once it reads again it gets what was taken, whole and in order, and is told what it lost.
    until(&mut assistant, &mut slow, |_, w| w.got.len() as u64 == taken);
    assert!(slow.got.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assistant.now += HEARTBEAT;
    until(&mut assistant, &mut slow, |_, w| w.client.counters().assistant_dropped == dropped);
}

#[test]
fn a_full_queue_of_registrations_is_healed_by_a_renewal() {
    let (mut assistant, mut worker) = connected(1);
    renew(&mut worker, &[]);
    let live: Vec<Entry> = (0..20_000).map(identity).collect();
    for identity in &live {
        worker.client.register(*identity);
    }
    assert!(worker.client.counters().overflows > 0 && worker.client.needs_renewal());
    assert!(worker.client.room() < CLIENT_QUEUE);
    // As a worker does: as many a turn as there is room for.
    let (mut cursor, mut ended) = (None, false);
    until(&mut assistant, &mut worker, |a, w| {
        match cursor {
            None => cursor = w.client.begin_renewal().then_some(0),
            Some(at) if at < live.len() => {
                let end = live.len().min(at + w.client.room());
                live[at..end].iter().for_each(|identity| w.client.register(*identity));
                cursor = Some(end);
            }
            Some(_) if !ended => ended = w.client.end_renewal(),
            Some(_) => return a.routing.registrations() == live.len(),
        }
        false
    });
    assert!(!worker.client.needs_renewal());
}

#[test]
fn b057_a_million_registrations_fit_and_are_found() {
    use super::server::{Handler, PeerId};
    let mut routing = Routing::new(99);
    let mut queue = PeerQueue::for_test();
    for peer in 0..4u16 {
        let hello = Hello { instance: 1, worker: peer, attempt: 1, key: b"" };
        routing.hello(PeerId(peer), &hello).unwrap();
        routing.service(PeerId(peer), SERVICE).unwrap();
    }
    let entry = |n: u32| Entry {
        service: 5,
        endpoint: Endpoint { ip: from_v4([10, 0, (n >> 16) as u8, 7]), port: n as u16 },
    };
    let count = 1_000_000u32;
    for n in 0..count {
        routing.register(0, PeerId((n % 4) as u16), entry(n), &mut queue);
    }
    assert_eq!(routing.registrations(), count as usize);
    let each = routing.table_bytes() as f64 / f64::from(count);
    assert!(each < 64.0, "{each} bytes a registration");
    for n in 0..count {
        let Endpoint { ip, port } = entry(n).endpoint;
        let mut header = ResponseHeader { addr: ip, port, ..Default::default() };
        assert_eq!(
            routing.route(0, Protocol::Tcp, &TARGET, &mut header),
            Route::Peer(PeerId((n % 4) as u16))
        );
    }
    // One of the four dies: its quarter goes, in short steps, and the memory of the rest stays right.
    routing.closed(0, PeerId(2));
    routing.tick(OWNER_GRACE);
    let mut steps = 0;
    while routing.is_sweeping() {
        routing.work();
        steps += 1;
    }
    assert!(steps > 100);
    assert_eq!(routing.registrations(), count as usize * 3 / 4);
}

#[test]
fn b055_a_peer_cannot_register_more_than_the_table_may_hold() {
    use super::server::{Handler, PeerId};
    let mut routing = Routing::with_most(99, 3);
    let mut queue = PeerQueue::for_test();
    routing.hello(PeerId(0), &Hello { instance: 1, worker: 0, attempt: 1, key: b"" }).unwrap();
    routing.service(PeerId(0), SERVICE).unwrap();
    let entry = |port| Entry { service: 5, endpoint: Endpoint { ip: from_v4([10, 0, 0, 7]), port } };
    for port in 0..10 {
        routing.register(0, PeerId(0), entry(port), &mut queue);
    }
    // What is there already may come again, and what goes makes room.
    routing.register(0, PeerId(0), entry(1), &mut queue);
    assert_eq!((routing.registrations(), routing.counters().refused_registrations), (3, 7));
    routing.unregister(PeerId(0), entry(1));
    routing.register(0, PeerId(0), entry(9), &mut queue);
    assert_eq!((routing.registrations(), routing.counters().refused_registrations), (3, 7));
}
