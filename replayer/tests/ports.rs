//! The mirror, the BPF programs and the AF_XDP port together, on real devices.
//!
//! Needs root. Each test makes a network namespace of its own, without a name, so that whatever it makes in
//! there is gone with it.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use replayer::afxdp::{BATCH, Endpoint, Flush, Port, PortConfig, PortCounters, PortError, Received};
use replayer::bpf::{Attachment, Program, Programs, ProgramsError, Verdict};
use replayer::capture::mirror::{Mirror, MirrorError};
use replayer::netns::Namespace;
use replayer_common::addr;
use replayer_common::counters::{CaptureVerdict, MirrorVerdict, ResponsesVerdict};
use replayer_common::maps::CaptureConfig;
use replayer_common::packet::Protocol;

const DEADLINE: Duration = Duration::from_secs(5);
const SERVICE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
const ALL: u64 = 1 << 32;
/// Set for a process that is a child of a test.
const CHILD: &str = "REPLAYER_TEST_CHILD";

/// Runs `f` in a namespace with a veth pair `in0`-`in1`, whose second end is the capture device, and a pair
/// `out0`-`out1`, whose first end is the output device.
fn in_lab<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    assert!(nix::unistd::geteuid().is_root(), "needs root: run `cargo xtask test`");
    let lab = Namespace::anonymous().expect("a namespace");
    let body = || {
        ip("link add in0 numtxqueues 2 numrxqueues 2 type veth peer name in1 numtxqueues 2 numrxqueues 2");
        ip("link add out0 numtxqueues 2 numrxqueues 2 type veth peer name out1 numtxqueues 2 numrxqueues 2");
        for device in ["lo", "in0", "in1", "out0", "out1"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1");
            ip(&format!("link set {device} up"));
        }
        f()
    };
    lab.run(body).expect("enter the namespace")
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("run ip");
    assert!(status.success(), "ip {arguments}");
}

fn exists(device: &str) -> bool {
    nix::net::if_::if_nametoindex(device).is_ok()
}

#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Everything that arrives on any device of the calling thread's namespace.
fn sniffer() -> OwnedFd {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, SockProtocol::EthAll)
        .expect("a packet socket");
    setsockopt(&fd, sockopt::RcvBufForce, &(64 << 20)).expect("a large buffer");
    fd
}

/// Packets that arrived on `device` since the last call.
fn drain(sniffer: &OwnedFd, device: &str) -> Vec<Vec<u8>> {
    let index = nix::net::if_::if_nametoindex(device).expect("the device") as usize;
    let mut packets = Vec::new();
    let mut buffer = vec![0; 65536];
    loop {
        match recvfrom::<LinkAddr>(sniffer.as_raw_fd(), &mut buffer) {
            Ok((len, Some(from))) if from.ifindex() == index => packets.push(buffer[..len].to_vec()),
            Ok(_) | Err(Errno::ENETDOWN) => {}
            Err(Errno::EAGAIN) => return packets,
            Err(error) => panic!("packet socket: {error}"),
        }
    }
}

/// A data segment from client port `port` to the service, with `number` as its payload.
fn request(port: u16, number: u32) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([198, 51, 100, 7], SERVICE.octets(), 64)
        .tcp(port, 80, number, 1000)
        .ack(1)
        .psh()
        .write(&mut packet, &number.to_be_bytes())
        .expect("a packet");
    packet
}

/// A port that only transmits, on `in0`.
fn sender() -> Port {
    let config = PortConfig {
        frames: 4096,
        frame_size: 2048,
        rx: None,
        tx: Some(Endpoint::new("in0", 0)),
        zero_copy: false,
    };
    Port::open(&config).expect("a TX port")
}

fn send(port: &mut Port, packet: &[u8]) {
    let start = Instant::now();
    loop {
        port.reclaim();
        if let Some(mut frame) = port.allocate() {
            port.frame_mut(&mut frame)[..packet.len()].copy_from_slice(packet);
            match port.transmit(frame, packet.len() as u32) {
                Ok(()) => return,
                Err(frame) => port.release(frame),
            }
        }
        port.flush();
        assert!(start.elapsed() < DEADLINE, "the TX ring stays full: {:?}", port.frames());
    }
}

fn flush(port: &mut Port) {
    wait_until("everything sent", || port.flush() == Flush::Done);
}

/// Everything that an online role sets up to capture from `in1` and to send on `out0`.
struct Capture {
    // Dropped in this order, as in a role: nothing is cloned to a mirror that is gone.
    programs: Programs,
    ports: Vec<Port>,
    mirror: Mirror,
}

impl Capture {
    fn start(queues: u32) -> Capture {
        let mirror = Mirror::create(1500, queues).expect("a mirror");
        let mut programs = Programs::load().expect("the programs");
        programs
            .set_services(&BTreeSet::from([(Protocol::Tcp, addr::from_v4(SERVICE.octets()), 80)]))
            .expect("services");
        let config = CaptureConfig {
            sample_threshold: ALL,
            mirror_ifindex: mirror.near_index(),
            shards: queues,
            ..CaptureConfig::default()
        };
        programs.set_capture(config).expect("configuration");
        let ports = (0..queues)
            .map(|queue| {
                let config = PortConfig {
                    frames: 8192,
                    frame_size: 2048,
                    rx: Some(Endpoint::new(mirror.far(), queue).within(mirror.namespace().clone())),
                    tx: Some(Endpoint { device: "out0".into(), queues: 0..16, namespace: None }),
                    zero_copy: false,
                };
                let port = Port::open(&config).expect("a port");
                programs.set_socket(queue, port.rx_fd().expect("an RX side")).expect("the socket's place");
                port
            })
            .collect();
        assert_eq!(programs.attach_capture(&mirror).expect("XDP"), Attachment::Native);
        assert_eq!(programs.attach_ingress(Program::Mirror, "in1").expect("tcx"), Attachment::Tcx);
        Capture { programs, ports, mirror }
    }

    /// Packets with this verdict.
    fn count<V: Verdict>(&self, verdict: V) -> u64 {
        self.programs.counts().expect("counts")[verdict]
    }

    /// Packets that the tcx program saw.
    fn seen(&self) -> u64 {
        self.programs.counts::<MirrorVerdict>().expect("counts").iter().map(|(_, count)| count).sum()
    }
}

/// A frame that arrived in the mirror's namespace leaves, changed, on a device of the host's, without a copy
/// in between; none is lost, and all frames come home.
#[test]
fn frames_travel_from_one_namespace_to_another() {
    const COUNT: u32 = 20_000;
    in_lab(|| {
        let mut capture = Capture::start(1);
        let sniffer = sniffer();
        let mut sender = sender();
        let port = &mut capture.ports[0];
        assert!(port.mode().contains("far queue 0 (copy)"), "{}", port.mode());
        let mut batch: Vec<Received> = Vec::with_capacity(BATCH);
        let mut arrived = Vec::new();
        let mut sent = 0;
        let start = Instant::now();
        while arrived.len() < COUNT as usize {
            assert!(start.elapsed() < DEADLINE, "{} of {COUNT}, {:?}", arrived.len(), port.counters());
            // Fewer at a time than the mirror's queue has room for, so that nothing may be lost.
            for _ in 0..200.min(COUNT - sent) {
                send(&mut sender, &request(40_000, sent));
                sent += 1;
            }
            flush(&mut sender);
            while port.receive(&mut batch) > 0 {
                for Received { mut frame, len } in batch.drain(..) {
                    assert_eq!(port.frame(&frame)[12..14], [8, 0]);
                    // The source MAC address, as a mark.
                    port.frame_mut(&mut frame)[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
                    port.transmit(frame, len).expect("room in the TX ring");
                }
                flush(port);
                port.reclaim();
            }
            arrived.extend(drain(&sniffer, "out1"));
        }
        for (number, packet) in arrived.iter().enumerate() {
            let mut expected = request(40_000, number as u32);
            expected[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
            assert_eq!(packet, &expected, "packet {number}");
        }
        wait_until("all frames back", || {
            port.reclaim();
            let frames = port.frames();
            assert_eq!(frames.total(), 8192);
            frames.hand == 0 && frames.transmit == 0
        });
        let expected = PortCounters {
            received: u64::from(COUNT),
            transmitted: u64::from(COUNT),
            completed: u64::from(COUNT),
            kicks: port.counters().kicks,
            ..PortCounters::default()
        };
        assert_eq!(port.counters(), expected);
        let statistics = port.statistics().expect("statistics").rx;
        assert_eq!((statistics.rx_dropped, statistics.rx_ring_full), (0, 0));
        assert_eq!(capture.count(MirrorVerdict::Mirrored), u64::from(COUNT));
        assert_eq!(capture.count(CaptureVerdict::Redirected), u64::from(COUNT));
    });
}

/// Connections are spread over the queues, and each stays on its own.
#[test]
fn a_connection_stays_on_one_queue() {
    in_lab(|| {
        let mut capture = Capture::start(2);
        assert_eq!(capture.ports.iter().map(Port::tx_queue).collect::<Vec<_>>(), [Some(0), Some(1)]);
        let mut sender = sender();
        let mut queue_of_client = HashMap::new();
        let mut received = 0;
        let mut batch = Vec::with_capacity(BATCH);
        for round in 0..3 {
            for client in 0..64 {
                send(&mut sender, &request(50_000 + client, round));
            }
            flush(&mut sender);
            wait_until("a round's packets", || {
                for (queue, port) in capture.ports.iter_mut().enumerate() {
                    port.receive(&mut batch);
                    for Received { frame, .. } in batch.drain(..) {
                        let client: [u8; 2] = port.frame(&frame)[34..36].try_into().expect("a TCP port");
                        assert_eq!(*queue_of_client.entry(client).or_insert(queue), queue);
                        received += 1;
                        port.release(frame);
                    }
                    port.reclaim();
                }
                received == 64 * (round + 1)
            });
        }
        assert!(queue_of_client.values().any(|&queue| queue == 0));
        assert!(queue_of_client.values().any(|&queue| queue == 1));
    });
}

/// Services come and go while the programs run.
#[test]
fn services_change_at_run_time() {
    in_lab(|| {
        let mut capture = Capture::start(1);
        let mut sender = sender();
        let service = (Protocol::Tcp, addr::from_v4(SERVICE.octets()), 80);
        // Shares a word of the port bitmap with the first.
        let other = (Protocol::Tcp, addr::from_v4([192, 0, 2, 81]), 81);
        let mut mirrored = 0;
        for (services, expected) in [
            (BTreeSet::from([service]), 1),
            (BTreeSet::from([service, other]), 1),
            (BTreeSet::from([other]), 0),
            (BTreeSet::new(), 0),
            (BTreeSet::from([service]), 1),
        ] {
            capture.programs.set_services(&services).expect("services");
            let before = capture.seen();
            send(&mut sender, &request(40_000, 0));
            flush(&mut sender);
            wait_until("the packet's verdict", || capture.seen() > before);
            mirrored += expected;
            assert_eq!(capture.count(MirrorVerdict::Mirrored), mirrored, "{services:?}");
        }
    });
}

/// A device that is down keeps packets waiting, and the port goes on when it is up again.
#[test]
fn b051_the_link_goes_down_and_comes_back() {
    in_lab(|| {
        let mut sender = sender();
        let sniffer = sniffer();
        ip("link set in0 down");
        for number in 0..100 {
            send(&mut sender, &request(40_000, number));
        }
        assert_eq!(sender.flush(), Flush::LinkDown);
        assert_eq!(sender.queued(), 100);
        ip("link set in0 up");
        flush(&mut sender);
        let mut arrived = 0;
        wait_until("the packets", || {
            arrived += drain(&sniffer, "in1").len();
            arrived == 100
        });

        // No carrier: the kernel takes packets and throws them away.
        ip("link set in1 down");
        for number in 0..10 {
            send(&mut sender, &request(40_000, number));
        }
        flush(&mut sender);
        assert_eq!(sender.counters().dropped, 10);

        ip("link del in0");
        send(&mut sender, &request(40_000, 0));
        assert_eq!(sender.flush(), Flush::Gone);
    });
}

/// Errors say what is wrong and what to do.
#[test]
fn b009_errors_name_cause_and_remedy() {
    in_lab(|| {
        let config = |device: &str, queues| PortConfig {
            frames: 1024,
            frame_size: 2048,
            rx: None,
            tx: Some(Endpoint { device: device.into(), queues, namespace: None }),
            zero_copy: false,
        };
        let error = Port::open(&config("nosuch", 0..1)).unwrap_err().to_string();
        assert!(error.contains("nosuch") && error.contains("no such interface"), "{error}");
        let error = Port::open(&config("out0", 7..8)).unwrap_err().to_string();
        assert!(error.contains("out0 has no queue 7"), "{error}");
        let _first = Port::open(&config("out0", 0..2)).expect("queue 0");
        let _second = Port::open(&config("out0", 0..2)).expect("queue 1");
        let error = Port::open(&config("out0", 0..16)).unwrap_err();
        assert!(matches!(error, PortError::Busy { .. }), "{error}");
        let error =
            Port::open(&PortConfig { zero_copy: true, ..config("in0", 0..1) }).unwrap_err().to_string();
        assert!(error.contains("copy mode"), "{error}");

        let error = Mirror::create(9000, 1).unwrap_err();
        assert!(matches!(error, MirrorError::Mtu { mtu: 9000 }), "{error}");

        let mut programs = Programs::load().expect("the programs");
        assert_eq!(programs.attach_to_nic(Program::Responses, "in1").expect("XDP"), Attachment::Native);
        let mut other = Programs::load().expect("the programs");
        let error = other.attach_to_nic(Program::Responses, "in1").unwrap_err();
        assert!(matches!(error, ProgramsError::Attach { .. }), "{error}");
        assert!(error.to_string().contains("ip link show"), "{error}");
    });
}

/// What a target sends to a replayed client is taken, cut to its headers; what it sends to this host is left to the
/// kernel. In native mode, and in generic mode where the driver (here macvlan) has no other.
#[test]
fn b052_responses_are_taken_in_native_and_in_generic_mode() {
    let target = ([192, 0, 2, 80], 80);
    let response = |to: [u8; 4]| {
        let mut packet = Vec::new();
        etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4(target.0, to, 64)
            .tcp(target.1, 40_000, 1, 1000)
            .ack(1)
            .write(&mut packet, &[b'r'; 1000])
            .expect("a packet");
        packet
    };
    for (device, expected) in [("in1", Attachment::Native), ("generic", Attachment::Generic)] {
        in_lab(|| {
            if device == "generic" {
                ip("link add generic link in1 address 02:00:00:00:00:02 type macvlan mode private");
                ip("link set generic up");
            }
            let mut programs = Programs::load().expect("the programs");
            programs
                .set_services(&BTreeSet::from([(Protocol::Tcp, addr::from_v4(target.0), target.1)]))
                .expect("services");
            programs
                .set_local_addresses(&BTreeSet::from([addr::from_v4([192, 0, 2, 1])]))
                .expect("addresses");
            let config = PortConfig {
                frames: 1024,
                frame_size: 2048,
                rx: Some(Endpoint::new(device, 0)),
                tx: None,
                zero_copy: false,
            };
            let mut port = Port::open(&config).expect("a port");
            programs.set_socket(0, port.rx_fd().expect("an RX side")).expect("the socket's place");
            assert_eq!(programs.attach_to_nic(Program::Responses, device).expect("XDP"), expected);

            let mut sender = sender();
            let sniffer = sniffer();
            send(&mut sender, &response([192, 0, 2, 1]));
            send(&mut sender, &response([198, 51, 100, 7]));
            flush(&mut sender);
            let mut batch = Vec::with_capacity(BATCH);
            wait_until("a response", || port.receive(&mut batch) > 0);
            let Received { frame, len } = batch.pop().expect("the response");
            assert!(batch.is_empty());
            assert_eq!(port.frame(&frame)[..len as usize], response([198, 51, 100, 7])[..54]);
            port.release(frame);
            let mut passed = Vec::new();
            wait_until("the one for this host", || {
                passed.extend(drain(&sniffer, device));
                !passed.is_empty()
            });
            assert_eq!(passed, [response([192, 0, 2, 1])]);
            let counts = programs.counts().expect("counts");
            let moved: Vec<_> = counts.iter().filter(|&(_, count)| count > 0).collect();
            assert_eq!(moved, [(ResponsesVerdict::Cut, 1), (ResponsesVerdict::ToThisHost, 1)]);
        });
    }
}

/// A token is good for the port that it came from only.
#[test]
#[should_panic(expected = "a frame of another port")]
fn a_frame_of_another_port_is_refused() {
    in_lab(|| {
        let mut one = sender();
        let other = Port::open(&PortConfig {
            frames: 1024,
            frame_size: 2048,
            rx: None,
            tx: Some(Endpoint::new("out0", 0)),
            zero_copy: false,
        });
        let frame = one.allocate().expect("a frame");
        other.expect("a port").release(frame);
    });
}

/// Dropping a mirror removes it, even while its namespace is still referred to.
#[test]
fn a_dropped_mirror_is_gone() {
    in_lab(|| {
        let capture = Capture::start(1);
        let near = capture.mirror.near().to_owned();
        let second = Mirror::create(1500, 1).expect("a second mirror of the same process");
        let second_near = second.near().to_owned();
        assert_ne!(second_near, near);
        let namespace = second.namespace().clone();
        drop(second);
        assert!(!exists(&second_near));
        drop(namespace);
        assert!(exists(&near));
        drop(capture);
        assert!(!exists(&near));
    });
}

/// After SIGKILL the near end, the far end, the tcx program and the XDP program are gone, and the capture
/// device works on.
#[test]
fn b049_sigkill_leaves_nothing() {
    in_lab(|| {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "holds_a_mirror_until_killed", "--nocapture"])
            .env(CHILD, "1")
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let near = loop {
            let line = lines.next().expect("a line before the end").expect("text");
            if let Some((_, near)) = line.split_once("near end: ") {
                break near.to_owned();
            }
        };
        let programs =
            || SchedClassifier::query_tcx("in1", TcAttachType::Ingress).expect("query tcx").1.len();
        assert!(exists(&near));
        assert_eq!(programs(), 1);
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
        wait_until("the program is gone", || programs() == 0);
        wait_until("the near end is gone", || !exists(&near));

        let sniffer = sniffer();
        let mut sender = sender();
        send(&mut sender, &request(40_000, 1));
        flush(&mut sender);
        wait_until("a packet passes", || !drain(&sniffer, "in1").is_empty());
    });
}

/// The child of `b049_sigkill_leaves_nothing`, in whose namespace it runs.
#[test]
fn holds_a_mirror_until_killed() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let capture = Capture::start(1);
    println!("near end: {}", capture.mirror.near());
    loop {
        std::thread::park();
    }
}
