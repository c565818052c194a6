//! The target: smoltcp's TCP, so that the engine's idea of TCP is not tested against itself, and an application that reads requests,
//! checks each of their bytes and answers.

use crate::Random;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint, Ipv4Address};
use std::collections::{HashMap, VecDeque};

pub const PORT: u16 = 8080;
const SOCKETS: usize = 24;
pub const HEADER: usize = 8;
const MAGIC: u8 = 0xa5;

/// What a request says of itself: whose it is, which, its body's length, and its response's length online.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    pub client: u8,
    pub index: u16,
    pub body: u16,
    pub response: u16,
}

impl Request {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![MAGIC, self.client];
        bytes.extend(self.index.to_be_bytes());
        bytes.extend(self.body.to_be_bytes());
        bytes.extend(self.response.to_be_bytes());
        bytes.extend((0..self.body).map(|i| self.body_byte(i)));
        bytes
    }

    fn body_byte(&self, i: u16) -> u8 {
        (i ^ self.index.rotate_left(5) ^ (i >> 8)) as u8 ^ self.client
    }

    /// The request at the start of `bytes`, if it is whole.
    fn read(bytes: &[u8]) -> Option<Request> {
        let header: &[u8; HEADER] = bytes.first_chunk()?;
        assert_eq!(header[0], MAGIC, "a request begins here");
        let request = Request {
            client: header[1],
            index: u16::from_be_bytes([header[2], header[3]]),
            body: u16::from_be_bytes([header[4], header[5]]),
            response: u16::from_be_bytes([header[6], header[7]]),
        };
        let body = bytes.get(HEADER..HEADER + usize::from(request.body))?;
        for (i, &byte) in body.iter().enumerate() {
            assert_eq!(byte, request.body_byte(i as u16), "byte {i} of {request:?}");
        }
        Some(request)
    }
}

/// How the target behaves.
#[derive(Clone, Debug)]
pub struct Manners {
    pub receive_buffer: usize,
    /// Bytes that the application reads at a time, and how long it waits between reads, ms.
    pub read_at_most: usize,
    pub read_every_ms: u64,
    /// How long it takes to answer, ms.
    pub think_ms: u32,
    /// Answers are longer or shorter than online.
    pub other_sizes: bool,
    /// One in this many requests is the last of its connection: closed, or reset.
    pub closes: Option<u32>,
    pub resets: Option<u32>,
}

#[derive(Default)]
struct Application {
    received: Vec<u8>,
    last_index: Option<(u8, u16)>,
    to_send: VecDeque<u8>,
    /// Responses being made: ready at, bytes.
    thinking: VecDeque<(u64, usize)>,
    closing: bool,
}

pub struct Target {
    device: Queues,
    interface: Interface,
    sockets: SocketSet<'static>,
    applications: Vec<(SocketHandle, Application)>,
    manners: Manners,
    /// How often each request arrived whole.
    pub arrived: HashMap<Request, u32>,
    random: Random,
    next_read: u64,
}

impl Target {
    pub fn new(manners: Manners, seed: u64) -> Target {
        let mut device = Queues::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // One network: everything is reached directly.
            addresses.push(IpCidr::new(Ipv4Address::new(10, 0, 2, 1).into(), 8)).unwrap();
        });
        let mut sockets = SocketSet::new(Vec::new());
        let applications = (0..SOCKETS)
            .map(|_| {
                let receive = SocketBuffer::new(vec![0; manners.receive_buffer]);
                let send = SocketBuffer::new(vec![0; 16 * 1024]);
                (sockets.add(Socket::new(receive, send)), Application::default())
            })
            .collect();
        Target {
            device,
            interface,
            sockets,
            applications,
            manners,
            arrived: HashMap::new(),
            random: Random(seed | 1),
            next_read: 0,
        }
    }

    /// An IP packet arrives. A socket listens only for a SYN of a new peer: smoltcp would give one that is repeated to any socket that
    /// listens, where a kernel knows its connection.
    pub fn receive(&mut self, packet: Vec<u8>, now_ns: u64) {
        let sockets = &mut self.sockets;
        let mut listening = None;
        if let Some(peer) = peer_of_syn(&packet) {
            let mut handles = self.applications.iter().map(|(handle, _)| *handle);
            let known = |handle| {
                let socket: &Socket<'_> = sockets.get(handle);
                socket.state() != State::Closed && socket.remote_endpoint() == Some(peer)
            };
            if !handles.clone().any(known) {
                listening =
                    handles.find(|&handle| sockets.get::<Socket<'_>>(handle).state() == State::Closed);
            }
        }
        if let Some(handle) = listening {
            sockets.get_mut::<Socket<'_>>(handle).listen(PORT).unwrap();
        }
        self.device.received.push_back(packet);
        let now = Instant::from_micros((now_ns / 1000) as i64);
        self.interface.poll(now, &mut self.device, &mut self.sockets);
        if let Some(handle) = listening {
            let socket = self.sockets.get_mut::<Socket<'_>>(handle);
            if socket.state() == State::Listen {
                socket.abort();
            }
            for (_, application) in self.applications.iter_mut().filter(|(other, _)| *other == handle) {
                *application = Application::default();
            }
        }
    }

    /// Runs the stack and the application; returns the IP packets that leave.
    pub fn run(&mut self, now_ns: u64) -> Vec<Vec<u8>> {
        let now_ms = now_ns / 1_000_000;
        let now = Instant::from_micros((now_ns / 1000) as i64);
        self.interface.poll(now, &mut self.device, &mut self.sockets);
        let may_read = now_ms >= self.next_read;
        if may_read {
            self.next_read = now_ms + self.manners.read_every_ms;
        }
        for (handle, application) in &mut self.applications {
            let socket = self.sockets.get_mut::<Socket>(*handle);
            if socket.state() == State::Closed {
                *application = Application::default();
                continue;
            }
            application.run(now_ms, may_read, socket, &self.manners, &mut self.random, &mut self.arrived);
        }
        self.interface.poll(now, &mut self.device, &mut self.sockets);
        self.device.sent.drain(..).collect()
    }

    /// When it wants to run again, ns.
    pub fn deadline(&mut self, now_ns: u64) -> u64 {
        let now = Instant::from_micros((now_ns / 1000) as i64);
        let stack = self
            .interface
            .poll_at(now, &self.sockets)
            .map_or(u64::MAX, |at| (at.total_micros().max(0) as u64 * 1000).max(now_ns + 100_000));
        let busy = self.applications.iter().any(|(handle, application)| {
            application.is_busy() || self.sockets.get::<Socket>(*handle).recv_queue() > 0
        });
        if busy { stack.min(now_ns + 1_000_000) } else { stack }
    }

    /// Connections that are neither closed nor waiting for one, nor only for TIME-WAIT to pass.
    pub fn open(&self) -> usize {
        let states = self.applications.iter().map(|(handle, _)| self.sockets.get::<Socket>(*handle).state());
        states.filter(|state| !matches!(state, State::Closed | State::TimeWait)).count()
    }
}

/// Who sent the SYN, if the packet is one.
fn peer_of_syn(packet: &[u8]) -> Option<IpEndpoint> {
    let parsed = SlicedPacket::from_ip(packet).ok()?;
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) = (parsed.net, parsed.transport) else {
        return None;
    };
    tcp.syn().then(|| IpEndpoint::new(ip.header().source_addr().into(), tcp.source_port()))
}

impl Application {
    fn is_busy(&self) -> bool {
        !self.to_send.is_empty() || !self.thinking.is_empty() || self.closing
    }

    fn run(
        &mut self,
        now_ms: u64,
        may_read: bool,
        socket: &mut Socket<'static>,
        manners: &Manners,
        random: &mut Random,
        arrived: &mut HashMap<Request, u32>,
    ) {
        let mut budget = if may_read { manners.read_at_most } else { 0 };
        while budget > 0 && socket.can_recv() && !self.closing {
            let mut buffer = vec![0; budget.min(2000)];
            let Ok(read) = socket.recv_slice(&mut buffer) else { break };
            if read == 0 {
                break;
            }
            budget -= read;
            self.received.extend(&buffer[..read]);
        }
        while !self.closing
            && let Some(request) = Request::read(&self.received)
        {
            self.received.drain(..HEADER + usize::from(request.body));
            // A connection carries the requests of one client, in order.
            if let Some((client, index)) = self.last_index {
                assert!(client == request.client && index < request.index, "{request:?} after {index}");
            }
            self.last_index = Some((request.client, request.index));
            *arrived.entry(request).or_default() += 1;
            let online = usize::from(request.response);
            let length = match manners.other_sizes {
                true => online / 2 + random.below(online as u32 + 1) as usize,
                false => online,
            };
            let ready = now_ms + u64::from(random.below(manners.think_ms + 1));
            self.thinking.push_back((ready, length));
            if manners.resets.is_some_and(|one_in| random.below(one_in) == 0) {
                socket.abort();
                *self = Application::default();
                return;
            }
            self.closing = manners.closes.is_some_and(|one_in| random.below(one_in) == 0);
        }
        while let Some(&(ready, length)) = self.thinking.front()
            && ready <= now_ms
        {
            self.to_send.extend(std::iter::repeat_n(0, length));
            self.thinking.pop_front();
        }
        while !self.to_send.is_empty() && socket.can_send() {
            let (front, _) = self.to_send.as_slices();
            let Ok(sent) = socket.send_slice(front) else { break };
            if sent == 0 {
                break;
            }
            self.to_send.drain(..sent);
        }
        let over = !socket.may_recv() && socket.state() == State::CloseWait || self.closing;
        if over
            && self.thinking.is_empty()
            && self.to_send.is_empty()
            && socket.may_send()
            && !socket.can_recv()
        {
            socket.close();
        } else if self.closing && self.thinking.is_empty() && self.to_send.is_empty() {
            // Closing with bytes unread: they are thrown away.
            socket.close();
            let _ = socket.recv(|bytes| (bytes.len(), ()));
        }
    }
}

/// The device: packets in, packets out.
#[derive(Default)]
struct Queues {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
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
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        // Checksums are written and verified.
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities
    }
}
