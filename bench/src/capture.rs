//! What capture costs whoever is served meanwhile: one thread sends packets into a veth whose other end delivers them to TCP, all of
//! it on one core, so that the time of a packet's sending is that of its delivery. The reader is on another core.
//!
//! Whether a packet wakes the reader is most of what it costs: as many packets as the reader takes, single ones at a steady rate, and rare ones
//! are measured apart.
//!
//! What a program costs a packet that is for nobody is a few per cent of what the machine itself varies by, so it is compared with the moments
//! without it: the program is attached and detached in turn, and nothing else changes.
//!
//! `span` takes from a NIC of its own, which serves nobody: a packet's whole delivery is what is said of it.
//!
//! Each way to capture stands beside none, beside an AF_PACKET socket and beside a raw IP socket, both with a filter in the kernel, and
//! reads all that it was sent: the sender waits for the reader, outside of what is timed, so that nothing is cheap because it is thrown
//! away.

use crate::Options;
use crate::report::{Figure, Wanted};
use crate::wire::{Cable, alone};
use anyhow::{Context, Result, ensure};
use aya::sys::{Stats, enable_stats};
use core_affinity::CoreId;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::{libc, setsockopt_impl, sockopt_impl};
use replayer::afxdp::{Endpoint as PortEndpoint, Port, PortConfig};
use replayer::capture::{Backend, Capture, Source};
use replayer::clients::Clients;
use replayer::net::Network;
use replayer_common::addr::from_v4;
use replayer_common::packet::{Protocol, flags};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the subject measures.
pub const WHAT: &str = "what a packet costs the serving path, by way of capturing it; veth to TCP on one core, the reader on another";

/// The service's port, and one that is nobody's.
const SERVICE: u16 = 80;
const OTHER: u16 = 81;
const SERVER: [u8; 4] = [10, 0, 0, 1];
/// Packets that differ, each of a connection of its own: a system call sends all of them.
const BATCH: usize = 64;
/// Packets that the reader may be behind.
const BEHIND: u64 = 512;
/// Between two packets, at a steady rate and when they are rare.
const STEADY: Duration = Duration::from_micros(200);
const RARE: Duration = Duration::from_millis(4);
/// How those that are sent are called.
const MANY: &str = "a packet of many";
const AT_A_RATE: &str = "a packet, 5000 a second";
const NOW_AND_THEN: &str = "a packet, 250 a second";
/// What is under way arrives within this time, or it was lost.
const ARRIVAL: Duration = Duration::from_secs(2);
/// Bytes of the frames.
const SIZES: [usize; 2] = [60, 1514];

/// Who takes packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Nobody,
    Capture(Backend),
    PacketSocket,
    RawSocket,
}

const WAYS: [Way; 6] = [
    Way::Nobody,
    Way::Capture(Backend::Ring),
    Way::Capture(Backend::Mirror),
    Way::Capture(Backend::Span),
    Way::PacketSocket,
    Way::RawSocket,
];

/// Comparisons with and without of an unrelated packet, in the time of a sample.
const TURNS: u32 = 10;

impl Way {
    /// Whether it takes from an interface that serves.
    fn serves(self) -> bool {
        self != Way::Capture(Backend::Span)
    }

    /// The NIC that packets come to.
    fn device(self) -> &'static str {
        if self.serves() { "serving" } else { "mirrored" }
    }

    /// The other end of its cable.
    fn sender(self) -> &'static str {
        if self.serves() { "near" } else { "port" }
    }

    fn name(self) -> String {
        match self {
            Way::Nobody => "no capture".to_owned(),
            Way::Capture(backend) => backend.to_string(),
            Way::PacketSocket => "AF_PACKET socket".to_owned(),
            Way::RawSocket => "raw IP socket".to_owned(),
        }
    }
}

/// One way's measurements with packets of one size.
#[derive(Clone, Debug, Default)]
struct Samples {
    /// Of a packet to the service among as many as the reader takes, ns.
    many: Vec<f64>,
    /// Of one every [`STEADY`], and every [`RARE`], with a system call of its own.
    steady: Vec<f64>,
    rare: Vec<f64>,
    /// Of a packet that is for nobody, and by how many per cent that is more than without capture.
    unrelated: Vec<f64>,
    more: Vec<f64>,
    /// The reader's processor time of a packet, ns.
    reading: Vec<f64>,
    /// The BPF program's own time of a packet of each kind, ns.
    program: Vec<f64>,
    program_unrelated: Vec<f64>,
}

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    alone(move || {
        let site = Site::new()?;
        let duration = Duration::from_millis(if options.quick { 50 } else { 200 });
        let mut figures = Vec::new();
        for size in SIZES {
            let mut samples = vec![Samples::default(); WAYS.len()];
            for _ in 0..if options.quick { 1 } else { 7 } {
                for (way, samples) in WAYS.iter().zip(&mut samples) {
                    site.measure(*way, size, duration, samples)?;
                }
            }
            figures.extend(figures_of(size, &samples));
        }
        Ok(figures)
    })
}

fn figures_of(size: usize, samples: &[Samples]) -> Vec<Figure> {
    let name = |way: &Way, what: &str| format!("{}, {size}-byte frames: {what}", way.name());
    let base = &samples[0];
    let [many, steady, rare, unrelated] = [
        (MANY, &base.many),
        (AT_A_RATE, &base.steady),
        (NOW_AND_THEN, &base.rare),
        ("an unrelated packet", &base.unrelated),
    ]
    .map(|(what, samples)| Figure::median(name(&Way::Nobody, what), samples.clone(), "ns"));
    let mut figures = Vec::new();
    for (way, samples) in WAYS.iter().zip(samples).skip(1) {
        let is_ours = matches!(way, Way::Capture(_));
        let serves = way.serves();
        let beside = |figure: Figure, without: &Figure| {
            if serves { figure.beside("no capture", without.value) } else { figure }
        };
        figures.extend([
            beside(Figure::median(name(way, MANY), samples.many.clone(), "ns"), &many),
            beside(Figure::median(name(way, AT_A_RATE), samples.steady.clone(), "ns"), &steady),
            beside(Figure::median(name(way, NOW_AND_THEN), samples.rare.clone(), "ns"), &rare),
            Figure::median(name(way, "reading, a packet"), samples.reading.clone(), "ns"),
        ]);
        if serves {
            let what = "an unrelated packet";
            let more = Figure::median(name(way, "more for an unrelated packet"), samples.more.clone(), "%");
            figures.extend([
                beside(Figure::median(name(way, what), samples.unrelated.clone(), "ns"), &unrelated),
                if is_ours { more.wanted(Wanted::AtMost(5.0)) } else { more },
            ]);
        }
        if is_ours {
            let program = |what, samples: &[f64]| Figure::median(name(way, what), samples.to_vec(), "ns");
            let other = program("the program, an unrelated packet", &samples.program_unrelated);
            figures.extend([
                program("the program, a packet to the service", &samples.program),
                if serves { other.wanted(Wanted::AtMost(0.05 * unrelated.value)) } else { other },
            ]);
        }
    }
    [vec![many, steady, rare, unrelated], figures].concat()
}

/// A host with an interface that serves, `serving`, at a cable whose other end is `near`, and the NIC of a mirror port, `mirrored`, at `port`.
struct Site {
    sender: OwnedFd,
    /// Where the port of a worker would send.
    output: Cable,
    /// The sender has the first, the reader the last.
    cpus: Vec<CoreId>,
}

impl Site {
    fn new() -> Result<Site> {
        for arguments in [
            "link set lo up",
            "link add near type veth peer name serving address 02:00:00:00:00:01",
            "link set near up",
            "link set serving up",
            "addr add 10.0.0.1/24 dev serving",
            "route add default via 10.0.0.2",
            "link add port type veth peer name mirrored",
            "link set port up",
            "link set mirrored up",
        ] {
            let status = Command::new("ip").args(arguments.split(' ')).status().context("starting ip")?;
            ensure!(status.success(), "ip {arguments}: {status}");
        }
        for device in ["all", "serving"] {
            let path = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
            fs::write(&path, "0").with_context(|| format!("writing {path}"))?;
        }
        let sender = packet_socket(None)?;
        setsockopt(&sender, QdiscBypass, &1).context("PACKET_QDISC_BYPASS")?;
        let cpus = core_affinity::get_core_ids().context("look up the CPUs")?;
        ensure!(cpus.len() > 1, "sender and reader need a core each, and there is one");
        Ok(Site { sender, output: Cable::new()?, cpus })
    }

    /// Takes one sample of everything.
    fn measure(&self, way: Way, size: usize, duration: Duration, samples: &mut Samples) -> Result<()> {
        let (to_service, to_other) = (frames(size, SERVICE), frames(size, OTHER));
        let (taken, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        pin(self.cpus[0])?;
        let to = nix::net::if_::if_nametoindex(way.sender())?;
        let mut reader = Reader::open(way, self)?;
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                pin(self.cpus[self.cpus.len() - 1])?;
                // As a worker: the kernel's default slack is as long as some of its sleeps.
                let _ = nix::sys::prctl::set_timerslack(1_000);
                reader.read(&taken, &stop)?;
                anyhow::Ok(reader)
            });
            let measured = (|| {
                let reads = (way != Way::Nobody).then_some(&taken);
                self.send(to, &to_service, duration / 10, reads)?;
                let (many, _) = self.send(to, &to_service, duration, reads)?;
                let before = taken.load(Ordering::Acquire);
                let (steady, mut sent) = self.send_singly(to, &to_service[..1], STEADY, duration, reads)?;
                let (rare, more) = self.send_singly(to, &to_service[..1], RARE, duration, reads)?;
                sent += more;
                let (unrelated, _) = self.send(to, &to_other, duration, None)?;
                ensure!(
                    reads.is_none() || taken.load(Ordering::Acquire) - before == sent,
                    "unrelated packets were taken"
                );
                samples.many.push(many);
                samples.steady.push(steady);
                samples.rare.push(rare);
                samples.unrelated.push(unrelated);
                Ok(())
            })();
            stop.store(true, Ordering::Release);
            let reader = reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
            measured?;
            if way != Way::Nobody {
                samples.reading.push(reader.spent.as_nanos() as f64 / reader.count as f64);
            }
            anyhow::Ok(())
        })?;
        if way == Way::Nobody {
            return Ok(());
        }
        // Where nobody is served, nobody waits for an unrelated packet.
        if way.serves() {
            samples.more.push(self.more_for_unrelated(way, to, &to_other, duration)?);
        }
        let Way::Capture(_) = way else { return Ok(()) };
        // Again with the kernel's own clock, which costs time itself.
        let reader = Reader::open(way, self)?;
        let From::Capture { capture, .. } = &reader.from else { return Ok(()) };
        let _stats = enable_stats(Stats::RunTime).context("BPF statistics")?;
        for (frames, times) in
            [(&to_service, &mut samples.program), (&to_other, &mut samples.program_unrelated)]
        {
            let (time, count) = capture.run_time()?;
            // As much as is held without a reader, at most.
            for _ in 0..32 {
                self.send_batch(to, frames)?;
            }
            let (now, total) = capture.run_time()?;
            ensure!(total > count, "the program did not run");
            times.push((now - time).as_nanos() as f64 / (total - count) as f64);
        }
        Ok(())
    }

    /// By how many per cent an unrelated packet takes longer with capture than without, in turn.
    fn more_for_unrelated(&self, way: Way, to: u32, frames: &[Vec<u8>], duration: Duration) -> Result<f64> {
        let mut reader = Reader::open(way, self)?;
        let mut times = [const { Vec::new() }; 2];
        for turn in 0..TURNS {
            // With, without, without, with: what changes steadily meanwhile falls on both alike.
            for with in [turn % 2 == 0, turn % 2 != 0] {
                match (&mut reader.from, with) {
                    (From::Capture { capture, .. }, false) => capture.detach(),
                    (From::Capture { capture, attached, .. }, true) if !*attached => capture.attach()?,
                    (From::Socket(_), false) => reader.from = From::Nobody,
                    (From::Nobody, true) => reader = Reader::open(way, self)?,
                    _ => {}
                }
                if let From::Capture { attached, .. } = &mut reader.from {
                    *attached = with;
                }
                let (ns, _) = self.send(to, frames, duration / TURNS, None)?;
                times[usize::from(with)].push(ns);
            }
        }
        let [without, with] = times.map(|times| Figure::median("", times, "ns").value);
        Ok(100.0 * (with / without - 1.0))
    }

    /// Sends for `duration`, without what is spent waiting for the reader: nanoseconds a packet, and how many. Returns when all were read.
    fn send(
        &self,
        to: u32,
        frames: &[Vec<u8>],
        duration: Duration,
        taken: Option<&AtomicU64>,
    ) -> Result<(f64, u64)> {
        let before = taken.map_or(0, |taken| taken.load(Ordering::Acquire));
        let (mut spent, mut sent) = (Duration::ZERO, 0u64);
        let mut waited = Instant::now();
        loop {
            let behind = taken.map_or(0, |taken| sent - (taken.load(Ordering::Acquire) - before));
            let done = spent >= duration;
            if done && behind == 0 {
                return Ok((spent.as_nanos() as f64 / sent as f64, sent));
            }
            if done || behind > BEHIND {
                ensure!(waited.elapsed() < ARRIVAL, "{behind} packets were lost: the figure would be wrong");
                std::hint::spin_loop();
                continue;
            }
            let start = Instant::now();
            self.send_batch(to, frames)?;
            spent += start.elapsed();
            sent += frames.len() as u64;
            waited = Instant::now();
        }
    }

    /// Sends a packet every `interval` for `duration`: nanoseconds a packet, and how many. Returns when all were read.
    fn send_singly(
        &self,
        to: u32,
        frame: &[Vec<u8>],
        interval: Duration,
        duration: Duration,
        taken: Option<&AtomicU64>,
    ) -> Result<(f64, u64)> {
        let before = taken.map_or(0, |taken| taken.load(Ordering::Acquire));
        let (begun, mut spent, mut sent) = (Instant::now(), Duration::ZERO, 0u32);
        while begun.elapsed() < duration {
            if begun.elapsed() < interval * sent {
                std::hint::spin_loop();
                continue;
            }
            let start = Instant::now();
            self.send_batch(to, frame)?;
            spent += start.elapsed();
            sent += 1;
        }
        let ended = Instant::now();
        while taken.is_some_and(|taken| taken.load(Ordering::Acquire) - before < sent.into()) {
            ensure!(ended.elapsed() < ARRIVAL, "packets were lost: the figure would be wrong");
            std::thread::yield_now();
        }
        Ok((spent.as_nanos() as f64 / f64::from(sent), sent.into()))
    }

    fn send_batch(&self, to: u32, frames: &[Vec<u8>]) -> Result<()> {
        // SAFETY: all-zero is a valid value of these C structures.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = to as i32;
        address.sll_halen = 6;
        let mut pieces: Vec<libc::iovec> = frames
            .iter()
            .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = pieces
            .iter_mut()
            .map(|piece| {
                // SAFETY: as above.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_name = (&raw mut address).cast();
                message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
                message.msg_hdr.msg_iov = piece;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        // SAFETY: each header points to the address, its piece and its frame, which outlive the call and are only read.
        let sent = unsafe {
            libc::sendmmsg(self.sender.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0)
        };
        ensure!(Errno::result(sent)? as usize == frames.len(), "only {sent} packets were sent");
        Ok(())
    }
}

/// Takes packets and counts them.
struct Reader {
    from: From,
    /// Time spent reading while at work, and how many packets were read in it.
    spent: Duration,
    count: u64,
}

enum From {
    Nobody,
    Capture { source: Box<Source>, port: Box<Port>, capture: Box<Capture>, attached: bool },
    Socket(OwnedFd),
}

impl Reader {
    fn open(way: Way, site: &Site) -> Result<Reader> {
        let from = match way {
            Way::Nobody => From::Nobody,
            Way::Capture(backend) => {
                let device = Network::open()?.device(way.device())?;
                let services = BTreeSet::from([(Protocol::Tcp, from_v4(SERVER), SERVICE)]);
                let mut capture = Capture::prepare(backend, &device, &services, &Clients::default(), 1)?;
                let port = Port::open(&PortConfig {
                    frames: 16_384,
                    frame_size: 2048,
                    rx: capture.receiving_end(0),
                    tx: Some(PortEndpoint::new(site.output.mirror.near(), 0)),
                    zero_copy: false,
                })?;
                let source = capture.source(0, 1, Some(&port))?;
                capture.configure(1, 1 << 32)?;
                capture.attach()?;
                From::Capture {
                    source: Box::new(source),
                    port: Box::new(port),
                    capture: Box::new(capture),
                    attached: true,
                }
            }
            Way::PacketSocket => From::Socket(packet_socket(Some(way.device()))?),
            Way::RawSocket => From::Socket(raw_socket()?),
        };
        Ok(Reader { from, spent: Duration::ZERO, count: 0 })
    }

    fn read(&mut self, taken: &AtomicU64, stop: &AtomicBool) -> Result<()> {
        let mut taken_at = Instant::now();
        let mut batch = Vec::with_capacity(Source::MOST);
        let mut buffer = [0; 2048];
        while !stop.load(Ordering::Acquire) {
            let mut count = 0u64;
            let start = Instant::now();
            match &mut self.from {
                From::Nobody => return Ok(()),
                From::Capture { source, port, .. } => {
                    count = source.receive(port, &mut batch) as u64;
                    batch.drain(..).for_each(|(frame, _)| port.release(frame));
                    port.reclaim();
                    if count == 0 {
                        let ahead = source.about_to_sleep(taken_at.elapsed().as_nanos() as u64);
                        sleep(source.fd(port).context("no descriptor")?, ahead);
                    }
                }
                From::Socket(socket) => {
                    while count < BATCH as u64 {
                        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                            Ok(_) => count += 1,
                            Err(Errno::EAGAIN) => break,
                            Err(error) => return Err(error).context("receive"),
                        }
                    }
                    if count == 0 {
                        sleep(socket.as_fd(), None);
                    }
                }
            }
            if count > 0 {
                taken_at = Instant::now();
                self.spent += taken_at - start;
                self.count += count;
            }
            taken.fetch_add(count, Ordering::AcqRel);
        }
        Ok(())
    }
}

fn sleep(fd: BorrowedFd<'_>, ahead_ns: Option<u64>) {
    let timeout = TimeSpec::from(Duration::from_nanos(ahead_ns.unwrap_or(2_000_000)));
    let _ = ppoll(&mut [PollFd::new(fd, PollFlags::POLLIN)], Some(timeout), None);
}

/// Segments that TCP takes a look at and throws away: resets of connections that it does not have, each with data and right checksums.
fn frames(size: usize, port: u16) -> Vec<Vec<u8>> {
    (0..BATCH as u16)
        .map(|i| {
            let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
            frame.extend((size as u16 - 14).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2]);
            frame.extend(SERVER);
            frame.extend((20_000 + i).to_be_bytes());
            frame.extend(port.to_be_bytes());
            frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags::RST | flags::ACK, 1, 0, 0, 0, 0, 0]);
            frame.resize(size, 0x5a);
            let header = checksum(0, &frame[14..34]);
            frame[24..26].copy_from_slice(&header.to_be_bytes());
            // The pseudo header: addresses, protocol, length (RFC 9293 section 3.1).
            let pseudo = 6 + (size as u32 - 34);
            let tcp = checksum(pseudo, &frame[26..]);
            frame[50..52].copy_from_slice(&tcp.to_be_bytes());
            frame
        })
        .collect()
}

/// The Internet checksum (RFC 1071) of an even number of bytes, or of an odd one with a zero behind it.
fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into()));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

sockopt_impl!(
    /// `PACKET_QDISC_BYPASS` of packet(7).
    QdiscBypass,
    SetOnly,
    libc::SOL_PACKET,
    libc::PACKET_QDISC_BYPASS,
    i32
);

/// A packet socket that takes requests from a device, or none and sends.
fn packet_socket(device: Option<&str>) -> Result<OwnedFd> {
    let protocol = if device.is_some() { Some(SockProtocol::EthAll) } else { None };
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let Some(device) = device else { return Ok(socket) };
    // IPv4, TCP, to the service's port; Ethernet and IP headers without options.
    filter(
        &socket,
        &[
            load_half(12),
            equal(0x800, 5),
            load_byte(23),
            equal(6, 3),
            load_half(36),
            equal(SERVICE.into(), 1),
        ],
    )?;
    // SAFETY: all-zero bytes are a valid value of this plain structure.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(device)? as i32;
    // SAFETY: `address` lives through the call and its size is given.
    let bound =
        unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) };
    Errno::result(bound).context("bind to the interface")?;
    Ok(socket)
}

/// A raw socket that gets a copy of the requests as IP delivers them.
fn raw_socket() -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let socket =
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_TCP) };
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(Errno::result(socket).context("a raw socket")?) };
    filter(&socket, &[load_half(22), equal(SERVICE.into(), 1)])?;
    Ok(socket)
}

/// Attaches a classic BPF filter: each jump leads to the end, which refuses, and what gets through is taken. And a receive buffer of 64 MiB.
fn filter(socket: &OwnedFd, tests: &[libc::sock_filter]) -> Result<()> {
    setsockopt(socket, sockopt::RcvBufForce, &(64 << 20)).context("a larger receive buffer")?;
    let ret = |k| libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k };
    let mut program = [tests, &[ret(u32::MAX), ret(0)]].concat();
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program and what it points to live through the call.
    let attached = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as u32,
        )
    };
    Errno::result(attached).context("attach a filter")?;
    Ok(())
}

fn load_half(at: u32) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: at }
}

fn load_byte(at: u32) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: at }
}

/// Goes on if the loaded value is `k`, else jumps over `over` instructions.
fn equal(k: u32, over: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: over, k }
}

/// Binds the calling thread to a CPU.
fn pin(cpu: CoreId) -> Result<()> {
    ensure!(core_affinity::set_for_current(cpu), "bind a thread to CPU {}", cpu.id);
    Ok(())
}
