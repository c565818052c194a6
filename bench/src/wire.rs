//! What the subjects with a kernel in them share: a network namespace of their own, a veth pair whose far end drops, clients' packets, and
//! an engine whose target answers at once.

use crate::traffic::{self, CLIENT_ISN, SMALL, SMALL_FRAME, TARGET_ISN, client, response, write_segment};
use anyhow::{Context, Result, ensure};
use replayer::afxdp::{Endpoint as PortEndpoint, Frame, HEADROOM, KICK, Port, PortConfig};
use replayer::bpf::Programs;
use replayer::capture::mirror::Mirror;
use replayer::clock;
use replayer::netns::Namespace;
use replayer_common::addr::Endpoint;
use replayer_common::packet::flags;
use replayer_common::response::ResponseHeader;
use replayer_engine::counters::{Counter, Counters};
use replayer_engine::{BATCH, Engine, Output};
use std::time::{Duration, Instant};

/// Bytes of a frame of the UMEM.
const FRAME_SIZE: u32 = 2048;

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
            frame_size: FRAME_SIZE,
            rx,
            tx: Some(PortEndpoint::new(self.mirror.near(), 0)),
            zero_copy: false,
        }
    }
}

/// Writes packet number `n` of what so many clients send in turn, a SYN each and then data of [`SMALL`]; returns its length.
pub(crate) fn write_packet(frame: &mut [u8], n: u32, connections: u32) -> usize {
    let client = client(n % connections);
    let payload = SMALL.payload as u32;
    match n / connections {
        0 => write_segment(frame, &client, CLIENT_ISN, 0, flags::SYN, SMALL, 0),
        round => {
            let seq = CLIENT_ISN + 1 + (round - 1) * payload;
            write_segment(frame, &client, seq, TARGET_ISN + 1, flags::ACK | flags::PSH, SMALL, SMALL.payload)
        }
    }
}

/// An engine between a port and a target that acknowledges each packet of [`write_packet`], as soon as the batch is done.
///
/// The acknowledgments belong to another host: which they are is known from the packets' numbers, and nothing of what is sent is looked at. Putting
/// a record together here takes about as long as it takes a worker to read it from its channel. They come in the order in which the packets
/// left, as from a target that has one queue.
pub(crate) struct Replayer {
    engine: Engine,
    connections: u32,
    copies: u32,
    batch: Vec<(Frame, usize)>,
    /// Packets that were answered.
    answered: u32,
    /// The identities of connection `i`, in the order in which its copies' packets leave: from `i * copies` on.
    identities: Vec<Endpoint>,
    records: Vec<ResponseHeader>,
}

struct Surroundings<'a> {
    port: &'a mut Port,
    identities: &'a mut Vec<Endpoint>,
}

impl Output for Surroundings<'_> {
    type Frame = Frame;

    #[inline]
    fn allocate(&mut self) -> Option<Frame> {
        if let Some(frame) = self.port.allocate() {
            return Some(frame);
        }
        self.port.flush();
        self.port.reclaim();
        self.port.allocate()
    }

    #[inline]
    fn bytes<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        self.port.frame_mut(frame)
    }

    #[inline]
    fn release(&mut self, frame: Frame) {
        self.port.release(frame);
    }

    #[inline]
    fn transmit(&mut self, frame: Frame, len: usize) -> bool {
        send(self.port, frame, len as u32)
    }

    fn register(&mut self, _: u16, identity: Endpoint) {
        self.identities.push(identity);
    }

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
        Replayer {
            engine: traffic::engine(connections, copies, (FRAME_SIZE - HEADROOM) as usize, clock::now()),
            connections,
            copies,
            batch: Vec::with_capacity(BATCH),
            answered: 0,
            identities: Vec::with_capacity((connections * copies) as usize),
            records: Vec::with_capacity(BATCH * copies as usize),
        }
    }

    /// Adds the next packet to the batch.
    pub(crate) fn capture(&mut self, frame: Frame, len: usize) {
        self.batch.push((frame, len));
    }

    /// Replays the batch, and takes the target's answers to it.
    pub(crate) fn turn(&mut self, port: &mut Port) {
        let now = clock::now();
        let captured = self.batch.len() as u32;
        let mut out = Surroundings { port, identities: &mut self.identities };
        self.engine.on_captured(now, &mut self.batch, &mut out);
        for n in self.answered..self.answered + captured {
            let first = (n % self.connections * self.copies) as usize;
            let (control, seq, ack) = match n / self.connections {
                0 => (flags::SYN | flags::ACK, TARGET_ISN, CLIENT_ISN + 1),
                round => (flags::ACK, TARGET_ISN + 1, CLIENT_ISN + 1 + round * SMALL.payload as u32),
            };
            let identities = &mut out.identities[first..first + self.copies as usize];
            self.records.extend(identities.iter().map(|identity| response(identity, control, seq, ack, 0)));
            if n < self.connections {
                // Of data the copy that was opened last is sent first.
                identities.reverse();
            }
        }
        self.answered += captured;
        self.engine.on_responses(now, &self.records, &mut out);
        self.records.clear();
        self.engine.on_timers(now, &mut out);
        port.flush();
        port.reclaim();
    }

    /// Makes sure that everything found room: what did not was acknowledged nevertheless.
    pub(crate) fn ensure_sent(&self) -> Result<()> {
        let unsent = self.counters()[Counter::SegmentsNoFrame];
        ensure!(unsent == 0, "{unsent} segments were not sent: {:?}", self.counters());
        Ok(())
    }

    pub(crate) fn counters(&self) -> &Counters {
        self.engine.counters()
    }
}

/// Packets a second that `port` sends of itself for `duration`: frames as they are, of [`SMALL`], as many at a time as the port hands over at once.
/// That is within half a percent of its fastest; 64 at a time take 1 % longer.
pub(crate) fn bare_transmit(port: &mut Port, duration: Duration) -> f64 {
    rate(duration, || {
        let mut sent = 0;
        for _ in 0..KICK {
            let Some(mut frame) = port.allocate() else { break };
            // A data packet: the second of a single connection.
            write_packet(port.frame_mut(&mut frame), 1, 1);
            sent += u64::from(send(port, frame, SMALL_FRAME as u32));
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
