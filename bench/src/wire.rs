//! What the subjects with a kernel in them share: a network namespace of their own, a veth pair whose far end drops, and an engine
//! whose target answers at once.

use anyhow::{Context, Result, ensure};
use replayer::afxdp::{Endpoint as PortEndpoint, Frame, Port, PortConfig};
use replayer::capture::mirror::Mirror;
use replayer::clock;
use replayer::netns::Namespace;
use replayer::programs::Programs;
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::packet::{flags, parse_tcp};
use replayer_common::response::ResponseHeader;
use replayer_engine::config::{Config, Limits, Service};
use replayer_engine::counters::Counters;
use replayer_engine::{AddressRange, BATCH, Engine, Link, Output};
use std::time::{Duration, Instant};

const SERVER: Endpoint = Endpoint { ip: from_v4([10, 0, 0, 1]), port: 80 };
const TARGET: Endpoint = Endpoint { ip: from_v4([10, 0, 0, 2]), port: 80 };
/// A frame of 64 bytes on the wire: 60 without its check sequence.
pub(crate) const FRAME: usize = 60;
/// What is left of it behind Ethernet, IPv4 and TCP.
pub(crate) const PAYLOAD: u32 = 6;
/// The client's ISN.
pub(crate) const ISN: u32 = 1000;
const TARGET_ISN: u32 = 5000;

/// Runs `measure` in a network namespace that nothing else is in, and that goes with it.
pub(crate) fn alone<T: Send>(measure: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    ensure!(nix::unistd::geteuid().is_root(), "devices are made and AF_XDP is used: run this as root");
    Namespace::anonymous()?.run(measure).context("enter a network namespace")?
}

/// A veth pair; what is sent into its near end is dropped by XDP at the far end, or taken by a port there.
pub(crate) struct Cable {
    pub(crate) programs: Programs,
    pub(crate) mirror: Mirror,
}

impl Cable {
    pub(crate) fn new() -> Result<Cable> {
        let mirror = Mirror::create(1500, 1)?;
        let mut programs = Programs::load()?;
        programs.attach_capture(&mirror)?;
        Ok(Cable { programs, mirror })
    }

    /// A port that sends into it.
    pub(crate) fn sender(&self) -> Result<Port> {
        Ok(Port::open(&PortConfig { rx: None, ..self.config(None) })?)
    }

    /// A port that receives what comes out of it and sends into `output`.
    pub(crate) fn forwarder(&mut self, output: &Cable) -> Result<Port> {
        let rx = PortEndpoint::new(self.mirror.far(), 0).within(self.mirror.namespace().clone());
        let port = Port::open(&output.config(Some(rx)))?;
        let (queue, socket) = port.rx_queue().zip(port.rx_fd()).context("no receiving side")?;
        self.programs.set_socket(queue, socket)?;
        Ok(port)
    }

    fn config(&self, rx: Option<PortEndpoint>) -> PortConfig {
        PortConfig {
            frames: 16_384,
            frame_size: 2048,
            rx,
            tx: Some(PortEndpoint::new(self.mirror.near(), 0)),
            zero_copy: false,
        }
    }
}

/// The client of connection `i`.
pub(crate) fn client(i: u32) -> Endpoint {
    Endpoint { ip: from_v4([11, 0, (i >> 14) as u8, 1]), port: 1024 + (i & 0x3fff) as u16 }
}

/// Writes a client's segment: a SYN without, or data of [`PAYLOAD`] bytes with ACK.
pub(crate) fn write_segment(frame: &mut [u8], client: &Endpoint, seq: u32, syn: bool) -> usize {
    let payload = if syn { 0 } else { PAYLOAD as usize };
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    frame[16..18].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    frame[26..30].copy_from_slice(&client.ip[12..]);
    frame[30..34].copy_from_slice(&SERVER.ip[12..]);
    frame[34..36].copy_from_slice(&client.port.to_be_bytes());
    frame[36..38].copy_from_slice(&SERVER.port.to_be_bytes());
    frame[38..42].copy_from_slice(&seq.to_be_bytes());
    let (ack, control) = if syn { (0, flags::SYN) } else { (1u32, flags::ACK | flags::PSH) };
    frame[42..46].copy_from_slice(&ack.to_be_bytes());
    frame[46..FRAME].copy_from_slice(&[5 << 4, control, 0xff, 0xff, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]);
    54 + payload
}

/// An engine between a port and a target that acknowledges whatever is sent, as soon as the batch is done.
pub(crate) struct Replayer {
    engine: Engine,
    batch: Vec<(Frame, usize)>,
    answers: Vec<ResponseHeader>,
    records: Vec<ResponseHeader>,
}

struct Surroundings<'a> {
    port: &'a mut Port,
    answers: &'a mut Vec<ResponseHeader>,
}

impl Output for Surroundings<'_> {
    type Frame = Frame;

    fn allocate(&mut self) -> Option<Frame> {
        if let Some(frame) = self.port.allocate() {
            return Some(frame);
        }
        self.port.flush();
        self.port.reclaim();
        self.port.allocate()
    }

    fn bytes<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        self.port.frame_mut(frame)
    }

    fn release(&mut self, frame: Frame) {
        self.port.release(frame);
    }

    fn transmit(&mut self, frame: Frame, len: usize) -> bool {
        // What the target would say: made from the frame while it is in the cache.
        if let Ok(sent) = parse_tcp(&&self.port.frame(&frame)[..len]) {
            let syn = sent.flags & flags::SYN != 0;
            if syn || sent.payload_len > 0 {
                self.answers.push(ResponseHeader {
                    flags: flags::ACK | if syn { flags::SYN } else { 0 },
                    port: sent.src_port,
                    addr: sent.src,
                    window: u16::MAX,
                    seq: if syn { TARGET_ISN } else { TARGET_ISN + 1 },
                    ack: sent.seq.wrapping_add(sent.payload_len + u32::from(syn)),
                    ..ResponseHeader::default()
                });
            }
        }
        send(self.port, frame, len as u32)
    }

    fn register(&mut self, _: u16, _: Endpoint) {}
    fn unregister(&mut self, _: u16, _: Endpoint) {}
}

/// Queues a packet; false, and the frame is free again, when the ring stays full.
pub(crate) fn send(port: &mut Port, frame: Frame, len: u32) -> bool {
    let Err(frame) = port.transmit(frame, len) else { return true };
    port.flush();
    match port.transmit(frame, len) {
        Ok(()) => true,
        Err(frame) => {
            port.release(frame);
            false
        }
    }
}

impl Replayer {
    /// For so many connections, each copied `copies` times.
    pub(crate) fn new(connections: u32, copies: u32) -> Replayer {
        let mut config = Config::new(vec![Service { online: SERVER, target: TARGET }]);
        let sessions = (connections * copies) as usize;
        config.copies_millionths = u64::from(copies) * 1_000_000;
        if copies > 1 {
            config.pool = vec![AddressRange { first: from_v4([12, 0, 0, 0]), count: 256 }];
        }
        config.limits = Limits {
            sessions,
            connections: connections as usize,
            held_bytes: 64 << 20,
            identities: 2 * sessions,
            ..Limits::default()
        };
        config.frame_room = 1792;
        config.seed = 0x1234_5678_9abc_def0;
        let mut engine = Engine::new(config, clock::now());
        let link = Link { source_mac: [2; 6], destination_mac: [4; 6], tags: [None; 2], mtu: 1500 };
        engine.set_link(0, Some(link));
        let room = BATCH * copies as usize;
        Replayer {
            engine,
            batch: Vec::with_capacity(BATCH),
            answers: Vec::with_capacity(2 * room),
            records: Vec::with_capacity(2 * room),
        }
    }

    /// Adds a captured packet to the batch.
    pub(crate) fn capture(&mut self, frame: Frame, len: usize) {
        self.batch.push((frame, len));
    }

    /// Replays the batch, and takes the target's answers until there are none.
    pub(crate) fn turn(&mut self, port: &mut Port) {
        let now = clock::now();
        let mut out = Surroundings { port, answers: &mut self.answers };
        self.engine.on_captured(now, &mut self.batch, &mut out);
        while !out.answers.is_empty() {
            std::mem::swap(&mut self.records, out.answers);
            self.engine.on_responses(now, &self.records, &mut out);
            self.records.clear();
        }
        self.engine.on_timers(now, &mut out);
        port.flush();
        port.reclaim();
    }

    pub(crate) fn counters(&self) -> &Counters {
        self.engine.counters()
    }
}

/// Packets a second that `port` sends of itself for `duration`: frames as they are, [`FRAME`] bytes.
pub(crate) fn bare_transmit(port: &mut Port, duration: Duration) -> f64 {
    rate(duration, || {
        let mut sent = 0;
        for _ in 0..BATCH {
            let Some(mut frame) = port.allocate() else { break };
            write_segment(port.frame_mut(&mut frame), &client(0), ISN, false);
            sent += u64::from(send(port, frame, FRAME as u32));
        }
        port.flush();
        port.reclaim();
        sent
    })
}

/// How often a second `step` did what it counts.
pub(crate) fn rate(duration: Duration, mut step: impl FnMut() -> u64) -> f64 {
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < duration {
        count += step();
    }
    count as f64 / start.elapsed().as_secs_f64()
}
