//! The target: smoltcp's TCP, so that the engine's idea of TCP is not tested against itself, and an application that compares each
//! byte with what the client sent, and answers where the online server had answered.

use crate::checker::{Checker, read_ip};
use crate::network::Random;
use crate::streams::Stream;
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use replayer_common::addr::{Endpoint, from_v4, v4_octets};
use replayer_common::packet::flags;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};

/// How the target behaves.
#[derive(Clone, Debug)]
pub struct Manners {
    pub receive_buffer: usize,
    /// Bytes that the application reads at a time, and how long it waits between reads, ms.
    pub read_at_most: usize,
    pub read_every_ms: u64,
    /// It once stops reading for so long, ms: the window closes.
    pub pause_ms: u64,
    /// How long it takes to answer, ms.
    pub think_ms: u32,
    /// Answers are longer or shorter than online.
    pub other_sizes: bool,
    /// Answers come in pieces.
    pub in_pieces: bool,
    /// Answers that never come.
    pub silent_per_mille: u32,
    /// One in this many answers is the last of its connection: closed, or reset.
    pub closes: Option<u32>,
    pub resets: Option<u32>,
    /// After the client's FIN it goes on sending for so long, ms.
    pub lingers_ms: u64,
    pub delayed_ack_ms: Option<u64>,
    pub timestamps: bool,
    pub keep_alive: bool,
    pub mtu: usize,
    /// SYNs are answered by RST until then, ms after the start.
    pub refuses_until_ms: u64,
}

/// What a connection received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    pub stream: usize,
    /// Where in the client's stream it began.
    pub start: usize,
    pub bytes: usize,
    /// The client's FIN came after them.
    pub closed: bool,
    /// The target's application closed or reset it.
    pub ours: bool,
}

struct Application {
    received: Received,
    /// The next answer of the stream.
    next_answer: usize,
    pushed: u32,
    accepted_ms: u64,
    /// Pieces of answers being made: ready at, bytes.
    thinking: VecDeque<(u64, usize)>,
    to_send: usize,
    paused_until: Option<u64>,
    closing: bool,
    fin_at_ms: Option<u64>,
}

pub struct Target {
    device: Queues,
    interface: Interface,
    sockets: SocketSet<'static>,
    applications: Vec<(SocketHandle, Option<Application>)>,
    manners: Manners,
    /// What connections received that are over.
    over: Vec<Received>,
    random: Random,
    next_read_ms: u64,
    start_ms: u64,
    /// What was sent last to each peer: from where, its sequence number's successor, its ACK.
    last_sent: HashMap<Endpoint, (Endpoint, u32, u32)>,
}

thread_local! {
    static CLOCK_MS: Cell<u32> = const { Cell::new(0) };
}

fn millis(now_ns: u64) -> u64 {
    now_ns / 1_000_000
}

fn instant(now_ns: u64) -> Instant {
    CLOCK_MS.set(millis(now_ns) as u32);
    Instant::from_micros((now_ns / 1000) as i64)
}

impl Target {
    pub fn new(manners: Manners, random: Random, now_ns: u64) -> Target {
        let mut device = Queues { mtu: manners.mtu, ..Queues::default() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = random.clone().draw();
        let mut interface = Interface::new(config, &mut device, instant(now_ns));
        interface.update_ip_addrs(|addresses| {
            // One network: everything is reached directly.
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 2, 1), 0)).unwrap();
            addresses.push(IpCidr::new(IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 2, 1), 0)).unwrap();
        });
        Target {
            device,
            interface,
            sockets: SocketSet::new(Vec::new()),
            applications: Vec::new(),
            manners,
            over: Vec::new(),
            random,
            next_read_ms: 0,
            start_ms: millis(now_ns),
            last_sent: HashMap::new(),
        }
    }

    /// An IP packet arrives. A socket listens only for a SYN of a new peer: smoltcp would give one that is repeated to any socket that
    /// listens, where a kernel knows its connection; and it answers nothing to a SYN on a connection that it has.
    pub fn receive(&mut self, packet: Vec<u8>, now_ns: u64, checker: &Checker<'_>, streams: &[Stream]) {
        let opening = syn(&packet).filter(|_| {
            // Until then there is no such port.
            millis(now_ns) >= self.start_ms + self.manners.refuses_until_ms
        });
        if let Some((peer, isn, _)) = opening
            && let Some(i) = self.connection_of(peer)
        {
            self.answer_syn(i, peer, isn, streams);
        }
        if let Some((peer, isn, port)) = opening
            && self.connection_of(peer).is_none()
        {
            let (stream, start) = checker.session_of(peer, isn).expect("a SYN that was sent");
            let i = self.free_socket(streams);
            let socket = self.sockets.get_mut::<Socket<'_>>(self.applications[i].0);
            socket.listen(port).unwrap();
            let timestamps = self.manners.timestamps;
            socket.set_tsval_generator(timestamps.then_some(|| CLOCK_MS.get()));
            socket.set_ack_delay(self.manners.delayed_ack_ms.map(Duration::from_millis));
            socket.set_keep_alive(self.manners.keep_alive.then_some(Duration::from_secs(3)));
            let application = Application::new(stream, start, millis(now_ns), &streams[stream]);
            self.applications[i].1 = Some(application);
        }
        self.device.received.push_back(packet);
        self.interface.poll(instant(now_ns), &mut self.device, &mut self.sockets);
        // One that got no SYN after all, or a reset in the middle of the handshake, would listen to everybody.
        for (handle, application) in &mut self.applications {
            let socket = self.sockets.get_mut::<Socket<'_>>(*handle);
            if socket.state() == State::Listen {
                socket.abort();
                *application = None;
            }
        }
    }

    fn connection_of(&self, peer: Endpoint) -> Option<usize> {
        self.applications.iter().position(|(handle, _)| {
            let socket = self.sockets.get::<Socket<'_>>(*handle);
            let remote = socket.remote_endpoint().map(|remote| Endpoint {
                ip: replayer_common::addr::from_std(remote.addr.into()),
                port: remote.port,
            });
            socket.state() != State::Closed && remote == Some(peer)
        })
    }

    /// A SYN for a connection that is there: in TIME-WAIT a newer one takes its place (RFC 6191), otherwise one that is not a repetition
    /// gets a challenge ACK (RFC 5961 section 4.2).
    fn answer_syn(&mut self, i: usize, peer: Endpoint, isn: u32, streams: &[Stream]) {
        let state = self.sockets.get::<Socket<'_>>(self.applications[i].0).state();
        let Some(&(local, seq, ack)) = self.last_sent.get(&peer) else { return };
        if state == State::TimeWait && (isn.wrapping_sub(ack) as i32) > 0 {
            self.finish(i, streams);
            let (handle, _) = self.applications.swap_remove(i);
            self.sockets.remove(handle);
        } else if state != State::SynReceived {
            let mut header = TcpHeader::new(local.port, peer.port, seq, 1000);
            (header.ack, header.acknowledgment_number) = (true, ack);
            let mut packet = Vec::new();
            match replayer_common::addr::is_v4(&peer.ip) {
                true => PacketBuilder::ipv4(v4_octets(&local.ip), v4_octets(&peer.ip), 64),
                false => PacketBuilder::ipv6(local.ip, peer.ip, 64),
            }
            .tcp_header(header)
            .write(&mut packet, &[])
            .unwrap();
            self.device.sent.push_back(packet);
        }
    }

    fn free_socket(&mut self, streams: &[Stream]) -> usize {
        let free = self
            .applications
            .iter()
            .position(|(handle, _)| self.sockets.get::<Socket<'_>>(*handle).state() == State::Closed);
        if let Some(i) = free {
            self.finish(i, streams);
            return i;
        }
        let receive = SocketBuffer::new(vec![0; self.manners.receive_buffer]);
        let send = SocketBuffer::new(vec![0; 16 * 1024]);
        self.applications.push((self.sockets.add(Socket::new(receive, send)), None));
        self.applications.len() - 1
    }

    /// The connection of a closed socket is over.
    fn finish(&mut self, i: usize, streams: &[Stream]) {
        let (handle, application) = &mut self.applications[i];
        if let Some(mut application) = application.take() {
            // What came before a reset is still there.
            let socket = self.sockets.get_mut::<Socket<'_>>(*handle);
            if !application.received.ours {
                application.read(usize::MAX, socket, &streams[application.received.stream]);
            }
            self.over.push(application.received);
        }
    }

    /// Runs the stack and the application; returns the IP packets that leave.
    pub fn run(&mut self, now_ns: u64, streams: &[Stream]) -> Vec<Vec<u8>> {
        let now_ms = millis(now_ns);
        self.interface.poll(instant(now_ns), &mut self.device, &mut self.sockets);
        let may_read = now_ms >= self.next_read_ms;
        if may_read {
            self.next_read_ms = now_ms + self.manners.read_every_ms;
        }
        for i in 0..self.applications.len() {
            let (handle, application) = &mut self.applications[i];
            let socket = self.sockets.get_mut::<Socket<'_>>(*handle);
            if socket.state() == State::Closed {
                self.finish(i, streams);
            } else if let Some(application) = application {
                let stream = &streams[application.received.stream];
                application.run(now_ms, may_read, socket, stream, &self.manners, &mut self.random);
            }
        }
        self.interface.poll(instant(now_ns), &mut self.device, &mut self.sockets);
        let sent: Vec<Vec<u8>> = self.device.sent.drain(..).collect();
        for packet in &sent {
            let segment = read_ip(packet).expect("a whole TCP segment");
            let len = (segment.payload.1 - segment.payload.0) as u32
                + (segment.flags & (flags::SYN | flags::FIN)).count_ones();
            let next = segment.seq.wrapping_add(len);
            self.last_sent.insert(segment.destination, (segment.source, next, segment.ack));
        }
        sent
    }

    /// When it wants to run again, ns.
    pub fn deadline(&mut self, now_ns: u64) -> u64 {
        let at = self.interface.poll_at(instant(now_ns), &self.sockets);
        let mut deadline =
            at.map_or(u64::MAX, |at| (at.total_micros().max(0) as u64 * 1000).max(now_ns + 100_000));
        for (handle, application) in &self.applications {
            let Some(application) = application else { continue };
            let socket = self.sockets.get::<Socket<'_>>(*handle);
            let mut wake_ms = u64::MAX;
            if socket.recv_queue() > 0 {
                wake_ms = application.paused_until.unwrap_or(0).max(self.next_read_ms);
            }
            if let Some(&(ready, _)) = application.thinking.front() {
                wake_ms = wake_ms.min(ready);
            }
            if let Some(at) = application.fin_at_ms.filter(|_| socket.may_send()) {
                wake_ms = wake_ms.min(at + self.manners.lingers_ms);
            }
            if wake_ms != u64::MAX {
                deadline = deadline.min((wake_ms * 1_000_000).max(now_ns + 1_000_000));
            }
        }
        deadline
    }

    /// Peers of connections that are neither closed nor waiting for one, nor only for TIME-WAIT to pass.
    pub fn open(&self) -> Vec<Endpoint> {
        let sockets = self.applications.iter().map(|(handle, _)| self.sockets.get::<Socket<'_>>(*handle));
        sockets
            .filter(|socket| !matches!(socket.state(), State::Closed | State::TimeWait))
            .filter_map(|socket| socket.remote_endpoint())
            .map(|remote| Endpoint {
                ip: replayer_common::addr::from_std(remote.addr.into()),
                port: remote.port,
            })
            .collect()
    }

    /// What all connections received.
    pub fn into_received(mut self, streams: &[Stream]) -> Vec<Received> {
        for i in 0..self.applications.len() {
            self.finish(i, streams);
        }
        self.over
    }
}

/// Who sent the SYN, its number, and the port it is for, if the packet is one.
fn syn(packet: &[u8]) -> Option<(Endpoint, u32, u16)> {
    let parsed = SlicedPacket::from_ip(packet).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { return None };
    let ip = match parsed.net? {
        NetSlice::Ipv4(ip) => from_v4(ip.header().source()),
        NetSlice::Ipv6(ip) => ip.header().source(),
        NetSlice::Arp(_) => return None,
    };
    let peer = Endpoint { ip, port: tcp.source_port() };
    tcp.syn().then(|| (peer, tcp.sequence_number(), tcp.destination_port()))
}

impl Application {
    fn new(stream: usize, start: usize, now_ms: u64, of: &Stream) -> Application {
        // A server that greets does so on every connection.
        let greets = of.answers.first().is_some_and(|answer| answer.after == 0);
        let answered =
            if start == 0 { 0 } else { of.answers.partition_point(|answer| answer.after <= start) };
        let mut thinking = VecDeque::new();
        if greets && start > 0 {
            thinking.push_back((now_ms, of.answers[0].bytes));
        }
        Application {
            received: Received { stream, start, bytes: 0, closed: false, ours: false },
            next_answer: answered,
            pushed: 0,
            accepted_ms: now_ms,
            thinking,
            to_send: 0,
            paused_until: None,
            closing: false,
            fin_at_ms: None,
        }
    }

    fn read(&mut self, mut budget: usize, socket: &mut Socket<'static>, stream: &Stream) {
        while budget > 0 && socket.can_recv() {
            let mut buffer = [0; 2000];
            let room = budget.min(buffer.len());
            let Ok(read) = socket.recv_slice(&mut buffer[..room]) else { break };
            if read == 0 {
                break;
            }
            budget -= read;
            let at = self.received.start + self.received.bytes;
            let sent = stream.bytes.get(at..at + read).expect("no more than the client sent");
            let equal = sent.iter().zip(&buffer).all(|(sent, got)| *sent == Some(*got));
            assert!(equal, "bytes {at}..{} of the stream of {}", at + read, stream.client);
            self.received.bytes += read;
        }
        let over =
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        self.received.closed |= over && socket.recv_queue() == 0;
    }

    fn run(
        &mut self,
        now_ms: u64,
        may_read: bool,
        socket: &mut Socket<'static>,
        stream: &Stream,
        manners: &Manners,
        random: &mut Random,
    ) {
        if manners.pause_ms > 0 && self.paused_until.is_none() && self.received.bytes > 200 {
            self.paused_until = Some(now_ms + manners.pause_ms);
        }
        let paused = self.paused_until.is_some_and(|until| now_ms < until);
        if !self.closing {
            self.read(if may_read && !paused { manners.read_at_most } else { 0 }, socket, stream);
        }
        while !self.closing
            && let Some(answer) = stream.answers.get(self.next_answer)
            && answer.after <= self.received.start + self.received.bytes
        {
            self.next_answer += 1;
            if random.chance(manners.silent_per_mille) {
                continue;
            }
            let bytes = match manners.other_sizes {
                true => answer.bytes / 2 + random.below(answer.bytes as u32 + 1) as usize,
                false => answer.bytes,
            };
            self.think(now_ms, bytes, manners, random);
            if manners.resets.is_some_and(|one_in| random.below(one_in) == 0) {
                socket.abort();
                self.received.ours = true;
                return;
            }
            self.closing = manners.closes.is_some_and(|one_in| random.below(one_in) == 0);
            self.received.ours |= self.closing;
        }
        if let Some((every, bytes, count)) = stream.pushes {
            let due = ((now_ms - self.accepted_ms) / every).min(u64::from(count)) as u32;
            self.to_send += (due - self.pushed) as usize * bytes;
            self.pushed = due;
            if due < count && socket.may_send() {
                // The next one wakes us.
                let next = self.accepted_ms + u64::from(due + 1) * every;
                if self.thinking.is_empty() {
                    self.thinking.push_back((next, 0));
                }
            }
        }
        while let Some(&(ready, length)) = self.thinking.front()
            && ready <= now_ms
        {
            self.to_send += length;
            self.thinking.pop_front();
        }
        while self.to_send > 0 && socket.can_send() {
            let zeros = [0; 4096];
            let Ok(sent) = socket.send_slice(&zeros[..self.to_send.min(zeros.len())]) else { break };
            if sent == 0 {
                break;
            }
            self.to_send -= sent;
        }
        if socket.state() == State::CloseWait && socket.recv_queue() == 0 && self.fin_at_ms.is_none() {
            self.fin_at_ms = Some(now_ms);
            if manners.lingers_ms > 0 {
                self.to_send += 500;
            }
        }
        let lingered = self.fin_at_ms.is_some_and(|at| now_ms >= at + manners.lingers_ms);
        let done = self.thinking.iter().all(|(_, bytes)| *bytes == 0) && self.to_send == 0;
        if (lingered || self.closing) && done && socket.may_send() {
            socket.close();
        }
        if self.closing {
            // Closing with bytes unread: they are thrown away.
            let _ = socket.recv(|bytes| (bytes.len(), ()));
        }
    }

    fn think(&mut self, now_ms: u64, bytes: usize, manners: &Manners, random: &mut Random) {
        // In order: an answer is not ready before the one that precedes it.
        let earliest = self.thinking.back().map_or(now_ms, |(ready, _)| *ready);
        let mut ready = earliest.max(now_ms + u64::from(random.below(manners.think_ms + 1)));
        let mut left = bytes;
        while left > 0 {
            let piece = if manners.in_pieces { (1 + random.below(900) as usize).min(left) } else { left };
            self.thinking.push_back((ready, piece));
            left -= piece;
            ready += u64::from(random.below(8));
        }
    }
}

/// The device: packets in, packets out.
#[derive(Default)]
struct Queues {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
    mtu: usize,
}

struct Taken(Vec<u8>);
struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut packet = vec![0; len];
        let result = write(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Taken, Sending<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Taken(packet), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // Checksums are written and verified.
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities
    }
}
