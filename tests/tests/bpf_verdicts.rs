//! The verdicts of the BPF programs, in the kernel, on the frames of `tests/frames/verdicts.txt`.
//!
//! Each frame goes through a program by BPF_PROG_TEST_RUN; what the program returned, the one counter that moved, and
//! what became of the frame are compared with what the file says. What only a real device shows (queues, clones,
//! headers out of a program's reach) is shown on veth and tap devices. Each test has a network namespace of its own.
//! It takes root (`cargo xtask test` gets it); without, these tests fail rather than pass unseen.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, PerCpuArray, RingBuf, XskMap};
use aya::programs::{SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, Pod};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::time::{ClockId, clock_gettime};
use replayer_common::addr::{ANY, Ip, from_std};
use replayer_common::counters::{CaptureVerdict, MirrorVerdict, ResponsesVerdict, RingVerdict, SpanVerdict};
use replayer_common::hash::{FLOW_SEED, flow_hash, sample_threshold};
use replayer_common::maps::{CaptureConfig, RING_HEADER_LEN, RingHeader, ServiceKey, names, port_bit};
use replayer_common::packet::{PROTOCOL_TCP, PROTOCOL_UDP, flags, locate};
use replayer_tests::wait::wait_for;

const OBJECT: &[u8] = aya::include_bytes_aligned!("../../replayer-ebpf/replayer.bpf.o");

/// `TCX_NEXT`: the packet goes on, whatever `mirror` did.
const TCX_NEXT: u32 = u32::MAX;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

// Offsets in a frame with an untagged IPv4 header without options.
const SRC_PORT: usize = 34;
const SEQ: usize = 38;

#[test]
fn b011_b039_every_frame_gets_its_verdict() {
    in_own_namespace(|| {
        let mut kernel = Kernel::new();
        for (name, case) in &cases() {
            let run = kernel.mirror(&case.frame);
            assert_eq!(run.moved, [(case.mirror.as_str(), 1)], "{name}: counters of mirror");
            assert_eq!(run.returned, TCX_NEXT, "{name}: mirror");
            assert!(run.frame == case.frame, "{name}: mirror changed the packet");

            // The same packets are captured in every way, and for the same reasons left alone.
            let run = kernel.ring(&case.frame);
            let expected = if case.mirror == "mirrored" { "copied" } else { &case.mirror };
            assert_eq!((run.verdict(), run.returned), (expected, TCX_NEXT), "{name}: ring");
            assert!(run.frame == case.frame, "{name}: ring changed the packet");
            let copied = kernel.record().map(|(header, bytes)| (header.len as usize, bytes));
            let expected = (case.mirror == "mirrored").then(|| (case.frame.len(), case.frame.clone()));
            assert_eq!(copied, expected, "{name}: the record in the ring");

            let run = kernel.span(&case.frame);
            let (expected, action) = match &case.mirror[..] {
                "mirrored" => ("redirected", XDP_REDIRECT),
                // A wildcard service means every address that a mirror port shows.
                "not_for_host" if case.about_fragment() => ("fragment", XDP_DROP),
                "not_for_host" => ("redirected", XDP_REDIRECT),
                other => (other, if for_another_host(&case.frame) { XDP_DROP } else { XDP_PASS }),
            };
            assert_eq!((run.verdict(), run.returned), (expected, action), "{name}: span");
            assert!(run.frame == case.frame, "{name}: span changed the packet");

            let run = kernel.responses(&case.frame);
            assert_eq!(run.moved, [(case.responses.as_str(), 1)], "{name}: counters of responses");
            let (action, left) = match case.cut_len {
                Some(len) => (XDP_REDIRECT, &case.frame[..len]),
                None => (XDP_PASS, &case.frame[..]),
            };
            assert_eq!(run.returned, action, "{name}: responses");
            assert!(run.frame == left, "{name}: {} bytes left of {}", run.frame.len(), case.frame.len());
        }
    });
}

#[test]
fn b025_acknowledgments_before_the_clients_first_byte_are_mirrored() {
    in_own_namespace(|| {
        let cases = cases();
        let mut kernel = Kernel::new();
        let mut send = |name: &str, seq: u32| {
            let mut frame = cases[name].frame.clone();
            frame[SEQ..SEQ + 4].copy_from_slice(&seq.to_be_bytes());
            kernel.mirror(&frame).verdict()
        };
        assert_eq!(send("v4-ack", 1000), "pure_ack", "nothing is known of this connection");
        // The sequence number after u32::MAX is 0.
        for isn in [999, 70_000, u32::MAX] {
            let first_byte = isn.wrapping_add(1);
            assert_eq!(send("v4-syn", isn), "mirrored");
            assert_eq!(send("v4-ack", first_byte), "mirrored", "the handshake's last");
            assert_eq!(send("v4-ack", first_byte), "mirrored", "of a greeting");
            assert_eq!(send("v4-data", first_byte), "mirrored");
            assert_eq!(send("v4-ack", first_byte.wrapping_add(28)), "pure_ack", "after data");
            assert_eq!(send("v4-ack", isn), "pure_ack", "a keepalive probe without data");
        }
    });
}

#[test]
fn b044_a_sample_keeps_whole_connections() {
    in_own_namespace(|| {
        let cases = cases();
        let mut kernel = Kernel::new();
        let client = from_std("192.0.2.1".parse().expect("an address"));
        for (percent, kept) in [(0.0, 0..=0), (20.0, 150..=250), (100.0, 1000..=1000)] {
            let config = CaptureConfig { sample_threshold: sample_threshold(percent), ..kernel.config };
            kernel.configure(config);
            let mut mirrored = 0;
            for port in 20_000..21_000u16 {
                let expected = u64::from(flow_hash(FLOW_SEED, &client, port)) < config.sample_threshold;
                for name in ["v4-syn", "v4-data", "v4-fin"] {
                    let mut frame = cases[name].frame.clone();
                    frame[SRC_PORT..SRC_PORT + 2].copy_from_slice(&port.to_be_bytes());
                    let verdict = if expected { "mirrored" } else { "not_sampled" };
                    assert_eq!(
                        kernel.mirror(&frame).verdict(),
                        verdict,
                        "{name} of port {port} at {percent} %"
                    );
                }
                mirrored += u32::from(expected);
            }
            assert!(kept.contains(&mirrored), "{mirrored} of 1000 connections at {percent} %");
        }
    });
}

/// The same packets, chosen by the longest prefix; the map is not looked at before it is said to be.
#[test]
fn only_chosen_clients_are_captured() {
    in_own_namespace(|| {
        let cases = cases();
        let mut kernel = Kernel::new();
        // The clients of the frames are 192.0.2.1 and 2001:db8:1::1; all prefix lengths are of the mapped address.
        let all = [("::", 0, 0), ("0.0.0.0", 96, 0)];
        let choices = [
            (vec![("192.0.2.0", 120, 1)], true, false),
            (vec![("192.0.2.0", 120, 1), ("192.0.2.1", 128, 0)], false, false),
            (vec![("192.0.2.0", 120, 0), ("192.0.2.0", 121, 1)], true, false),
            (vec![("2001:db8::", 32, 1)], false, true),
            (vec![("2001:db8::", 32, 1), ("2001:db8::", 33, 0)], false, false),
            (vec![("0.0.0.0", 96, 1), ("::", 0, 1)], true, true),
        ];
        for (nets, v4, v6) in choices {
            kernel.configure(CaptureConfig { choose_clients: 0, ..kernel.config });
            kernel.choose(&[&all[..], &nets].concat());
            for (name, chosen) in [("v4-data", v4), ("v6-data", v6), ("v4-udp", v4)] {
                kernel.configure(CaptureConfig { choose_clients: 0, ..kernel.config });
                assert_eq!(kernel.mirror(&cases[name].frame).verdict(), "mirrored", "nobody is left out");
                kernel.configure(CaptureConfig { choose_clients: 1, ..kernel.config });
                let expected = |taken| if chosen { taken } else { "client_not_chosen" };
                let frame = &cases[name].frame;
                assert_eq!(kernel.mirror(frame).verdict(), expected("mirrored"), "{name}: {nets:?}");
                assert_eq!(kernel.ring(frame).verdict(), expected("copied"), "{name}: {nets:?}");
                assert_eq!(kernel.span(frame).verdict(), expected("redirected"), "{name}: {nets:?}");
                while kernel.record().is_some() {}
            }
            assert_eq!(kernel.mirror(&cases["v4-other-port"].frame).verdict(), "unrelated");
        }
    });
}

#[test]
fn b048_what_could_not_be_mirrored_is_counted() {
    in_own_namespace(|| {
        let request = cases().remove("v4-data").expect("the case").frame;
        let mut kernel = Kernel::new();
        kernel.configure(CaptureConfig { mirror_ifindex: 0, ..kernel.config });
        assert_eq!(kernel.mirror(&request).verdict(), "off");
        kernel.configure(CaptureConfig { mirror_ifindex: 999, ..kernel.config });
        assert_eq!(kernel.mirror(&request).verdict(), "clone_failed", "no such device");
        let near = ifindex("near");
        kernel.configure(CaptureConfig { mirror_ifindex: near, ..kernel.config });
        assert_eq!(kernel.mirror(&request).verdict(), "mirrored");
        ip("link set near down");
        let verdict = kernel.mirror(&request).verdict();
        assert!(["clone_failed", "mirror_full"].contains(&verdict), "the mirror is down: {verdict}");
    });
}

#[test]
fn b048_what_finds_no_room_in_the_ring_is_counted_and_what_is_there_stays_whole() {
    in_own_namespace(|| {
        let request = cases().remove("v4-data").expect("the case").frame;
        let mut kernel = Kernel::new();
        let (mut copied, mut full) = (0, 0);
        let mut time = monotonic_ns();
        while full < 10 {
            let run = kernel.ring(&request);
            assert_eq!(run.returned, TCX_NEXT, "the packet goes on");
            match run.verdict() {
                "copied" if full == 0 => copied += 1,
                "ring_full" => full += 1,
                other => panic!("{other} after {copied} copied and {full} that found no room"),
            }
        }
        // A record of 128 bytes and its header of 8; the kernel keeps a ring from filling to the last byte.
        assert!((RING_BYTES / 136 - 2..=RING_BYTES / 136).contains(&copied), "{copied} records");
        for at in 0..copied {
            let (header, bytes) = kernel.record().expect("a record");
            assert!(header.segment_len == 0 && bytes == request, "record {at}");
            assert!(
                (time..=monotonic_ns()).contains(&header.captured_ns),
                "record {at}: {header:?} after {time}"
            );
            time = header.captured_ns;
        }
        assert!(kernel.record().is_none());
        assert_eq!(kernel.ring(&request).verdict(), "copied", "there is room again");
    });
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

#[test]
fn a_packet_without_a_ring_is_counted() {
    in_own_namespace(|| {
        let request = cases().remove("v4-data").expect("the case").frame;
        let mut kernel = Kernel::new();
        // Shards that nobody has made a ring for.
        kernel.configure(CaptureConfig { shards: QUEUES, ..kernel.config });
        let mut verdicts = BTreeMap::new();
        for port in 30_000..30_100u16 {
            let mut frame = request.clone();
            frame[SRC_PORT..SRC_PORT + 2].copy_from_slice(&port.to_be_bytes());
            let client = from_std("192.0.2.1".parse().expect("an address"));
            let shard = flow_hash(FLOW_SEED, &client, port) % QUEUES;
            let expected = if shard == 0 { "copied" } else { "no_ring" };
            let verdict = kernel.ring(&frame).verdict();
            assert_eq!(verdict, expected, "port {port} of shard {shard}");
            *verdicts.entry(verdict).or_insert(0) += 1;
        }
        assert_eq!(verdicts.len(), 2, "{verdicts:?}");
    });
}

/// A reader that sleeps in poll(2) is woken by the first record, one that does not is left alone.
#[test]
fn only_a_reader_that_sleeps_is_woken() {
    in_own_namespace(|| {
        let request = cases().remove("v4-data").expect("the case").frame;
        let mut kernel = Kernel::new();
        assert_eq!(kernel.sleeping(), 0);
        assert_eq!(kernel.ring(&request).verdict(), "copied");
        assert_eq!(kernel.sleeping(), 0);
        assert!(kernel.record().is_some() && kernel.record().is_none());
        kernel.set_sleeping();
        let fd = kernel.reader.as_fd().try_clone_to_owned().expect("a descriptor");
        let sleeper = std::thread::spawn(move || {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(5000u16)).expect("poll")
        });
        // Without a wake-up it would sleep on, whenever it began to.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(kernel.ring(&request).verdict(), "copied");
        assert_eq!(sleeper.join().expect("the sleeper"), 1, "woken before its time");
        assert_eq!(kernel.sleeping(), 0, "and only once");
        // The empty record that woke it is not seen.
        assert!(kernel.record().is_some() && kernel.record().is_none());
    });
}

#[test]
fn span_leaves_to_the_kernel_what_it_would_have_got_anyway() {
    in_own_namespace(|| {
        let unrelated = cases().remove("v4-other-port").expect("the case").frame;
        let mut kernel = Kernel::new();
        let own = [2, 0, 0, 0, 0, 0x77];
        kernel.configure(CaptureConfig { mac: own, ..kernel.config });
        for (destination, action) in [
            (own, XDP_PASS),
            ([2, 0, 0, 0, 0, 0x78], XDP_DROP),
            ([0xff; 6], XDP_PASS),
            ([1, 0x80, 0xc2, 0, 0, 0x0e], XDP_PASS),
        ] {
            let mut frame = unrelated.clone();
            frame[..6].copy_from_slice(&destination);
            let run = kernel.span(&frame);
            assert_eq!((run.verdict(), run.returned), ("unrelated", action), "to {destination:02x?}");
        }
        let request = cases().remove("v4-data").expect("the case").frame;
        kernel.set_socket(0, None);
        let run = kernel.span(&request);
        assert_eq!((run.verdict(), run.returned), ("no_socket", XDP_DROP));
    });
}

#[test]
fn a_response_without_a_socket_is_dropped_not_let_through() {
    in_own_namespace(|| {
        let response = cases().remove("v6-response").expect("the case").frame;
        let mut kernel = Kernel::new();
        kernel.set_socket(0, None);
        let run = kernel.responses(&response);
        assert_eq!((run.verdict(), run.returned), ("no_socket", XDP_DROP));
    });
}

#[test]
fn capture_hands_every_frame_to_its_queues_socket() {
    in_own_namespace(|| {
        let mut kernel = Kernel::new();
        for case in cases().values() {
            let run = kernel.capture(&case.frame);
            assert_eq!((run.verdict(), run.returned), ("redirected", XDP_REDIRECT));
            assert!(run.frame == case.frame);
        }
        kernel.set_socket(0, None);
        let run = kernel.capture(&[0; 60]);
        assert_eq!((run.verdict(), run.returned), ("no_socket", XDP_DROP));
    });
}

/// The clone leaves by the queue of its connection's shard, and arrives on the same queue of the far end.
#[test]
fn a_clone_arrives_on_the_queue_of_its_shard() {
    in_own_namespace(|| {
        let request = cases().remove("v4-data").expect("the case").frame;
        let client = from_std("192.0.2.1".parse().expect("an address"));
        let mut kernel = Kernel::new();
        kernel.configure(CaptureConfig { shards: QUEUES, ..kernel.config });
        let program: &mut Xdp =
            kernel.ebpf.program_mut("capture").expect("the program").try_into().expect("XDP");
        program.attach("far", XdpMode::Driver).expect("native XDP on veth");
        for queue in 0..QUEUES {
            // A socket on one queue only: its clones are redirected, all others find no socket.
            for other in 0..QUEUES {
                let socket = (other == queue).then(xdp_socket);
                kernel.set_socket(other, socket);
            }
            for port in 30_000..30_032u16 {
                let mut frame = request.clone();
                frame[SRC_PORT..SRC_PORT + 2].copy_from_slice(&port.to_be_bytes());
                let before = kernel.counters(names::CAPTURE_COUNTERS);
                assert_eq!(kernel.mirror(&frame).verdict(), "mirrored");
                wait_for("the clone's arrival", Duration::from_secs(5), || {
                    kernel.counters(names::CAPTURE_COUNTERS) != before
                })
                .expect("a clone");
                let after = kernel.counters(names::CAPTURE_COUNTERS);
                let shard = flow_hash(FLOW_SEED, &client, port) % QUEUES;
                let verdict =
                    if shard == queue { CaptureVerdict::Redirected } else { CaptureVerdict::NoSocket };
                let mut expected = before;
                expected[verdict.index() as usize] += 1;
                assert_eq!(after, expected, "port {port} of shard {shard}, socket on queue {queue}");
            }
        }
    });
}

/// The queue that is chosen for the clone must not become the original's: it decides where a packet goes that this host
/// forwards. Here it is forwarded into the mirror, where its queue shows: it came in on queue 0.
#[test]
fn the_original_keeps_its_queue() {
    in_own_namespace(|| {
        let mut frame = cases().remove("v4-data").expect("the case").frame;
        let client = from_std("192.0.2.1".parse().expect("an address"));
        let port =
            (20_000..).find(|&port| flow_hash(FLOW_SEED, &client, port) % QUEUES == 2).expect("a port");
        frame[SRC_PORT..SRC_PORT + 2].copy_from_slice(&port.to_be_bytes());
        let mut kernel = Kernel::new();
        kernel.configure(CaptureConfig { shards: QUEUES, ..kernel.config });
        let program: &mut Xdp =
            kernel.ebpf.program_mut("capture").expect("the program").try_into().expect("XDP");
        program.attach("far", XdpMode::Driver).expect("native XDP on veth");
        let mut tap = fragmenting_tap("tap");
        ip("link set tap up");
        let program: &mut SchedClassifier =
            kernel.ebpf.program_mut("mirror").expect("the program").try_into().expect("a classifier");
        program.attach("tap", TcAttachType::Ingress).expect("tcx");
        // Netfilter's hook comes after tcx.
        run("nft", "add table netdev t");
        run("nft", "add chain netdev t c { type filter hook ingress device \"tap\" priority 0 ; }");
        run("nft", "add rule netdev t c fwd to \"near\"");

        // The socket is on queue 0: it gets the original, and the clone finds none.
        tap.write_all(&frame).expect("writing to tap");
        let arrived = || kernel.counters(names::CAPTURE_COUNTERS).iter().sum::<u64>();
        wait_for("clone and original", Duration::from_secs(5), || arrived() == 2).expect("two frames");
        assert_eq!(kernel.counters(names::CAPTURE_COUNTERS), [1, 1]);
    });
}

/// Some drivers leave the headers in pages that a program can't read directly; tap can be made to do the same.
#[test]
fn headers_outside_of_the_linear_part_are_found() {
    in_own_namespace(|| {
        let cases = cases();
        let mut kernel = Kernel::new();
        let mut tap = fragmenting_tap("tap");
        ip("link set tap up");
        // Receive offload would pull the headers back.
        run("ethtool", "-K tap gro off");
        let program: &mut SchedClassifier =
            kernel.ebpf.program_mut("mirror").expect("the program").try_into().expect("a classifier");
        program.attach("tap", TcAttachType::Ingress).expect("tcx");
        for (name, expected) in [
            ("v4-exact-other-host", "mirrored"),
            ("v6-four-extensions", "mirrored"),
            ("v4-other-port", "unrelated"),
            ("v4-cut-in-options", "truncated"),
        ] {
            let before = kernel.counters(names::MIRROR_COUNTERS);
            let (ethernet, rest) = cases[name].frame.split_at(14);
            let written =
                tap.write_vectored(&[IoSlice::new(ethernet), IoSlice::new(rest)]).expect("writing to tap");
            assert_eq!(written, cases[name].frame.len());
            wait_for("the frame's arrival", Duration::from_secs(5), || {
                kernel.counters(names::MIRROR_COUNTERS) != before
            })
            .expect("a frame");
            let after = kernel.counters(names::MIRROR_COUNTERS);
            assert_eq!(moved(&before, &after, mirror_name), [(expected, 1)], "{name}");
        }
    });
}

/// Not a test: prints what a packet costs. `docs/ebpf.md` has figures.
#[test]
#[ignore = "a measurement: run it with --ignored --nocapture on a quiet machine"]
fn cost_per_packet() {
    in_own_namespace(|| {
        let cases = cases();
        let mut kernel = Kernel::new();
        for name in ["arp", "udp", "v4-other-port", "v6-other-port", "v4-other-address", "v4-ack", "v6-ack"] {
            let nanoseconds = kernel.cost("mirror", &cases[name].frame);
            println!("mirror    {:18} {nanoseconds:4} ns  {}", name, cases[name].mirror);
            println!("ring      {:18} {:4} ns", name, kernel.cost("ring", &cases[name].frame));
            println!("span      {:18} {:4} ns", name, kernel.cost("span", &cases[name].frame));
        }
        kernel.configure(CaptureConfig { choose_clients: 1, ..kernel.config });
        // The lengths that a path through the trie can have: none but those of all and of the client, and one for each bit of an IPv4 address.
        for few in [true, false] {
            let bits = (96..=128).filter(|bits| !few || [96, 120].contains(bits));
            let nets: Vec<_> = bits.map(|bits| (masked("192.0.2.1", bits), bits, 1)).collect();
            kernel.choose(
                &nets.iter().map(|(net, bits, chosen)| (&net[..], *bits, *chosen)).collect::<Vec<_>>(),
            );
            let name = format!("v4-ack, {} nets", nets.len());
            println!("mirror    {name:18} {:4} ns", kernel.cost("mirror", &cases["v4-ack"].frame));
        }
        for name in ["arp", "v4-response-other-port", "v4-response-to-this-host"] {
            let nanoseconds = kernel.cost("responses", &cases[name].frame);
            println!("responses {:18} {nanoseconds:4} ns  {}", name, cases[name].responses);
        }
    });
}

/// The first so many bits of an IPv4 address, counted as those of the IPv6 address that it is mapped to.
fn masked(address: &str, bits: u32) -> String {
    let address: std::net::Ipv4Addr = address.parse().expect("an address");
    let mask = u32::MAX.checked_shl(128 - bits).unwrap_or(0);
    std::net::Ipv4Addr::from_bits(address.to_bits() & mask).to_string()
}

/// `BPF_MAP_TYPE_RINGBUF` of `linux/bpf.h`.
const RINGBUF: u32 = 27;
/// Size of the ring in these tests.
const RING_BYTES: u32 = 1 << 16;
/// Queues of the mirror in these tests.
const QUEUES: u32 = 4;

/// The programs, loaded and configured as the file of frames says, in the calling thread's network namespace.
struct Kernel {
    ebpf: Ebpf,
    config: CaptureConfig,
    /// Kept open: the map of sockets forgets one that is closed.
    sockets: BTreeMap<u32, OwnedFd>,
    /// Of the ring of shard 0, the only one.
    reader: RingBuf<MapData>,
}

/// What a program made of a frame.
struct Run {
    returned: u32,
    frame: Vec<u8>,
    moved: Vec<(&'static str, u64)>,
}

impl Run {
    /// The counter that moved; exactly one must have.
    fn verdict(&self) -> &'static str {
        match self.moved[..] {
            [(name, 1)] => name,
            _ => panic!("not one counter moved by one: {:?}", self.moved),
        }
    }
}

/// Plain bytes as a map's key or value.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: used with ServiceKey and CaptureConfig only, which are repr(C), without padding, and valid for all bytes.
unsafe impl<T: Copy + 'static> Pod for Plain<T> {}

impl Kernel {
    fn new() -> Kernel {
        let queues = format!("numtxqueues {QUEUES} numrxqueues {QUEUES}");
        ip(&format!("link add near {queues} type veth peer name far {queues}"));
        for device in ["near", "far"] {
            // No packets but ours.
            ip(&format!("link set {device} addrgenmode none arp off up"));
        }
        ip("link set lo up");
        let mut ebpf = Ebpf::load(OBJECT).expect("loading the committed object");
        for name in ["mirror", "ring", "span", "capture", "responses"] {
            match ebpf.program_mut(name).expect("the program") {
                aya::programs::Program::Xdp(program) => program.load(),
                aya::programs::Program::SchedClassifier(program) => program.load(),
                _ => unreachable!("another type of program"),
            }
            .expect("the verifier accepts it");
        }
        let config = CaptureConfig {
            sample_threshold: sample_threshold(100.0),
            mirror_ifindex: ifindex("near"),
            shards: 1,
            ..CaptureConfig::default()
        };
        let ring = Map::RingBuf(
            MapData::create(aya_obj::Map::new_from_params(RINGBUF, 0, 0, RING_BYTES, 0), "ring", None)
                .expect("a ring"),
        );
        let reader = RingBuf::try_from(ring).expect("a ring");
        let mut rings: ArrayOfMaps<_, RingBuf<MapData>> =
            ebpf.map_mut(names::RINGS).expect("the map").try_into().expect("an array of maps");
        rings.set(0, &reader, 0).expect("setting");
        let mut kernel = Kernel { ebpf, config, sockets: BTreeMap::new(), reader };
        kernel.configure(config);
        let ip = |text: &str| from_std(text.parse().expect("an address"));
        for (addr, port) in [(ip("198.51.100.7"), 80), (ip("2001:db8::7"), 80), (ANY, 8080)] {
            kernel.add_service(PROTOCOL_TCP, addr, port);
        }
        for (addr, port) in [(ip("198.51.100.7"), 53), (ip("2001:db8::7"), 53), (ANY, 5353)] {
            kernel.add_service(PROTOCOL_UDP, addr, port);
        }
        let mut local: HashMap<_, Ip, u32> =
            kernel.map(names::LOCAL_ADDRESSES).try_into().expect("a hash map");
        local.insert(ip("198.51.100.9"), 1, 0).expect("inserting");
        kernel.set_socket(0, Some(xdp_socket()));
        kernel
    }

    fn map(&mut self, name: &str) -> &mut Map {
        self.ebpf.map_mut(name).expect("the map")
    }

    fn configure(&mut self, config: CaptureConfig) {
        let mut map: Array<_, Plain<CaptureConfig>> = self.map(names::CONFIG).try_into().expect("an array");
        map.set(0, Plain(config), 0).expect("setting");
        self.config = config;
    }

    /// Makes these the networks of `CLIENTS`: an address, a prefix length, and whether it is chosen.
    fn choose(&mut self, nets: &[(&str, u32, u32)]) {
        let mut map: LpmTrie<_, Ip, u32> = self.map(names::CLIENTS).try_into().expect("a trie");
        let old: Vec<Key<Ip>> = map.keys().collect::<Result<_, _>>().expect("keys");
        for key in old {
            map.remove(&key).expect("removing");
        }
        for &(address, bits, chosen) in nets {
            let key = Key::new(bits, from_std(address.parse().expect("an address")));
            map.insert(&key, chosen, 0).expect("inserting");
        }
    }

    fn add_service(&mut self, protocol: u8, addr: Ip, port: u16) {
        let mut services: HashMap<_, Plain<ServiceKey>, u32> =
            self.map(names::SERVICES).try_into().expect("a hash map");
        for key in [ServiceKey::new(protocol, addr, port), ServiceKey::address_only(protocol, addr)] {
            services.insert(Plain(key), 1, 0).expect("inserting");
        }
        let mut ports: Array<_, u64> = self.map(names::PORTS).try_into().expect("an array");
        let (word, mask) = port_bit(port);
        let bits = ports.get(&word, 0).expect("getting");
        ports.set(word, bits | mask, 0).expect("setting");
    }

    /// Puts a socket on `queue`, or takes it away.
    fn set_socket(&mut self, queue: u32, socket: Option<OwnedFd>) {
        let mut map: XskMap<_> =
            self.ebpf.map_mut(names::XSKS).expect("the map").try_into().expect("an XSKMAP");
        match socket {
            Some(socket) => {
                map.set(queue, socket.as_raw_fd(), 0).expect("setting");
                self.sockets.insert(queue, socket);
            }
            None => map.unset(queue).expect("unsetting"),
        }
    }

    fn counters(&self, name: &str) -> Vec<u64> {
        let map: PerCpuArray<_, u64> =
            self.ebpf.map(name).expect("the map").try_into().expect("a per-CPU array");
        map.iter().map(|values| values.expect("a value").iter().sum()).collect()
    }

    fn mirror(&mut self, frame: &[u8]) -> Run {
        self.run("mirror", names::MIRROR_COUNTERS, mirror_name, frame)
    }

    fn ring(&mut self, frame: &[u8]) -> Run {
        self.run("ring", names::RING_COUNTERS, |at| RingVerdict::ALL[at].name(), frame)
    }

    fn span(&mut self, frame: &[u8]) -> Run {
        self.run("span", names::SPAN_COUNTERS, |at| SpanVerdict::ALL[at].name(), frame)
    }

    /// The next record of the ring: its header and the packet.
    fn record(&mut self) -> Option<(RingHeader, Vec<u8>)> {
        let record = self.reader.next()?;
        let (header, bytes) = record.split_at(RING_HEADER_LEN);
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let captured_ns = u64::from_ne_bytes(header[8..].try_into().expect("eight bytes"));
        let header = RingHeader { len: word(0), segment_len: word(4), captured_ns };
        Some((header, bytes[..header.len as usize].to_vec()))
    }

    fn sleeping(&mut self) -> u64 {
        let map: Array<_, u64> = self.map(names::SLEEPING).try_into().expect("an array");
        map.get(&0, 0).expect("getting")
    }

    fn set_sleeping(&mut self) {
        let mut map: Array<_, u64> = self.map(names::SLEEPING).try_into().expect("an array");
        map.set(0, 1, 0).expect("setting");
    }

    fn responses(&mut self, frame: &[u8]) -> Run {
        self.run("responses", names::RESPONSES_COUNTERS, |at| ResponsesVerdict::ALL[at].name(), frame)
    }

    fn capture(&mut self, frame: &[u8]) -> Run {
        self.run("capture", names::CAPTURE_COUNTERS, |at| CaptureVerdict::ALL[at].name(), frame)
    }

    fn run(&self, program: &str, counters: &str, name: fn(usize) -> &'static str, frame: &[u8]) -> Run {
        let before = self.counters(counters);
        let mut out = vec![0; frame.len()];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = self.test_run(program, options);
        out.truncate(result.data_size_out as usize);
        let moved = moved(&before, &self.counters(counters), name);
        Run { returned: result.return_value, frame: out, moved }
    }

    /// Nanoseconds for one packet: the lowest of some means, since whatever else the machine does only adds.
    fn cost(&self, program: &str, frame: &[u8]) -> u128 {
        let mean = |_| {
            let options = TestRunOptions { data_in: Some(frame), repeat: 200_000, ..TestRunOptions::new() };
            self.test_run(program, options).duration.as_nanos()
        };
        (0..10).map(mean).min().unwrap_or_default()
    }

    fn test_run(&self, program: &str, options: TestRunOptions<'_>) -> aya::programs::TestRunResult {
        let frame = options.data_in.unwrap_or_default();
        match self.ebpf.program(program).expect("the program") {
            aya::programs::Program::Xdp(program) => program.test_run(options),
            aya::programs::Program::SchedClassifier(program) => program.test_run(options),
            _ => unreachable!("another type of program"),
        }
        .unwrap_or_else(|error| panic!("BPF_PROG_TEST_RUN with {frame:02x?}: {error:?}"))
    }
}

fn mirror_name(index: usize) -> &'static str {
    MirrorVerdict::ALL[index].name()
}

/// The counters that moved, by name, and by how much.
fn moved(before: &[u64], after: &[u64], name: fn(usize) -> &'static str) -> Vec<(&'static str, u64)> {
    let differences = before.iter().zip(after).map(|(before, after)| after - before).enumerate();
    differences.filter(|&(_, by)| by != 0).map(|(at, by)| (name(at), by)).collect()
}

/// A case of the file of frames.
struct Case {
    mirror: String,
    responses: String,
    /// The length that `responses` cuts the frame to, if it takes it.
    cut_len: Option<usize>,
    frame: Vec<u8>,
}

impl Case {
    /// Whether it is a fragment to the wildcard service's port or address.
    fn about_fragment(&self) -> bool {
        locate(&&self.frame[..]).is_ok_and(|packet| packet.fragment)
    }
}

/// Whether a frame's destination is one host, and not the one at address zero.
fn for_another_host(frame: &[u8]) -> bool {
    frame.len() >= 6 && frame[0] & 1 == 0 && frame[..6] != [0; 6]
}

/// Reads the file of frames; its form is described at its beginning.
fn cases() -> BTreeMap<String, Case> {
    let text = include_str!("../frames/verdicts.txt");
    let mut cases = BTreeMap::new();
    for block in text.split("\n== ").skip(1) {
        let mut lines = block.lines();
        let (name, _about) = lines.next().and_then(|line| line.split_once(": ")).expect("a name");
        let mut case =
            Case { mirror: String::new(), responses: String::new(), cut_len: None, frame: Vec::new() };
        for (label, value) in
            lines.filter(|line| !line.is_empty()).map(|line| line.split_once(": ").expect(line))
        {
            match label {
                "mirror" => case.mirror = value.to_owned(),
                "responses" => {
                    let (verdict, len) = value.split_once(' ').unzip();
                    case.responses = verdict.unwrap_or(value).to_owned();
                    case.cut_len = len.map(|len| len.parse().expect("a length"));
                }
                _ => case.frame.extend(value.as_bytes().chunks(2).map(|pair| {
                    let pair = str::from_utf8(pair).expect("ASCII");
                    u8::from_str_radix(pair, 16)
                        .unwrap_or_else(|_| panic!("{name}: {pair:?} is not hexadecimal"))
                })),
            }
        }
        assert!(cases.insert(name.to_owned(), case).is_none(), "{name} is there twice");
    }
    assert!(cases.len() > 50, "only {} cases", cases.len());
    // What the tests build on.
    assert_eq!(cases["v4-syn"].frame[47], flags::SYN);
    cases
}

/// Runs `test` on a thread with a network namespace that disappears with it.
fn in_own_namespace(test: impl FnOnce() + Send) {
    assert!(nix::unistd::geteuid().is_root(), "needs root for namespaces and BPF: run `cargo xtask test`");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn ip(arguments: &str) {
    run("ip", arguments);
}

fn run(program: &str, arguments: &str) {
    // A child has the namespace of the thread that starts it.
    let output = Command::new(program).args(arguments.split(' ')).output().expect(program);
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ifindex(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).expect("the device")
}

/// An AF_XDP socket that is bound to nothing: enough for a map of sockets to hold.
fn xdp_socket() -> OwnedFd {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "an AF_XDP socket: {}", std::io::Error::last_os_error());
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A tap device of which a write of several parts becomes a packet with all but the first part outside of its linear
/// part (`IFF_NAPI_FRAGS`, drivers/net/tun.c).
fn fragmenting_tap(name: &str) -> File {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    // SAFETY: zero is a valid value for each of its integers and characters.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_NAPI | libc::IFF_NAPI_FRAGS;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let tun: BorrowedFd<'_> = tap.as_fd();
    // SAFETY: a pointer to a request that outlives the call.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    assert!(result == 0, "a tap device: {}", std::io::Error::last_os_error());
    tap
}
