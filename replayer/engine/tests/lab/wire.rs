//! The engine's output for tests: a fixed number of frames, what was sent and registered, and segments to and from bytes by a parser
//! that is not the engine's.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use replayer_common::addr::{Endpoint, is_v4, v4_octets};
use replayer_common::packet::flags;
use replayer_common::tcp_options;
use replayer_engine::Output;
use std::collections::HashSet;

/// Bytes of a frame, where nothing else is said.
const FRAME: usize = 2048;

/// The number of a frame: not `Copy`, so it is in one place.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame(usize);

/// Frames, and what the engine did with them. It allocates nothing in the engine's calls while `sent` has room.
pub struct Wire {
    frames: Vec<u8>,
    /// Bytes of a frame.
    room: usize,
    free: Vec<Frame>,
    sent: Vec<(Frame, usize)>,
    /// Which of `sent` found no room; only kept with [`Wire::keep_refused`].
    refused: Vec<usize>,
    pub keep_refused: bool,
    /// Frames that were taken away.
    away: usize,
    /// Registrations that are in force.
    pub registered: HashSet<(u16, Endpoint)>,
    /// Packets that are lost for want of room in the transmit ring, from now on.
    pub full: bool,
    /// Keep what is sent; otherwise frames go back at once.
    pub keep: bool,
    pub count_sent: u64,
}

impl Wire {
    pub fn new(frames: usize) -> Wire {
        Wire::with_room(frames, FRAME)
    }

    /// With frames that hold packets of `room` bytes.
    pub fn with_room(frames: usize, room: usize) -> Wire {
        Wire {
            frames: vec![0; frames * room],
            room,
            free: (0..frames).map(Frame).collect(),
            sent: Vec::with_capacity(frames),
            refused: Vec::new(),
            keep_refused: false,
            away: 0,
            registered: HashSet::new(),
            full: false,
            keep: true,
            count_sent: 0,
        }
    }

    fn frame(&mut self, frame: &Frame) -> &mut [u8] {
        &mut self.frames[frame.0 * self.room..][..self.room]
    }

    /// Frames that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes frames away, as if they were in a ring that is not emptied; give them to [`Wire::give_back`].
    pub fn take_away(&mut self, count: usize) -> Vec<Frame> {
        self.away += count;
        self.free.split_off(self.free.len() - count)
    }

    pub fn give_back(&mut self, frames: Vec<Frame>) {
        self.away -= frames.len();
        self.free.extend(frames);
    }

    /// A frame that holds the segment, as capture would give it.
    pub fn captured(&mut self, segment: &Segment) -> (Frame, usize) {
        let bytes = segment.to_bytes();
        self.captured_bytes(&bytes)
    }

    pub fn captured_bytes(&mut self, bytes: &[u8]) -> (Frame, usize) {
        let frame = self.free.pop().expect("a free frame");
        let len = bytes.len().min(self.room);
        self.frame(&frame)[..len].copy_from_slice(&bytes[..len]);
        (frame, len)
    }

    /// What was sent since the last call.
    pub fn take_sent(&mut self) -> Vec<Segment> {
        let mut segments = Vec::new();
        for (frame, len) in self.sent.drain(..).collect::<Vec<_>>() {
            segments.push(Segment::from_bytes(&self.frame(&frame)[..len]));
            self.free.push(frame);
        }
        segments
    }

    /// What was sent since the last call, as bytes.
    pub fn take_sent_bytes(&mut self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for (frame, len) in self.sent.drain(..).collect::<Vec<_>>() {
            packets.push(self.frame(&frame)[..len].to_vec());
            self.free.push(frame);
        }
        packets
    }

    /// What was tried to be sent since the last call, as bytes, and whether there was room.
    pub fn take_tried_bytes(&mut self) -> Vec<(bool, Vec<u8>)> {
        let refused = std::mem::take(&mut self.refused);
        let tried = self.take_sent_bytes().into_iter().enumerate();
        tried.map(|(i, bytes)| (!refused.contains(&i), bytes)).collect()
    }

    /// Each frame is free or was sent.
    pub fn check(&self) {
        assert_eq!(
            self.free.len() + self.sent.len() + self.away,
            self.frames.len() / self.room,
            "a frame was lost"
        );
    }
}

impl Output for Wire {
    type Frame = Frame;

    fn allocate(&mut self) -> Option<Frame> {
        self.free.pop()
    }

    fn bytes<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        self.frame(frame)
    }

    fn release(&mut self, frame: Frame) {
        self.free.push(frame);
    }

    fn transmit(&mut self, frame: Frame, len: usize) -> bool {
        if self.full {
            if self.keep_refused {
                self.refused.push(self.sent.len());
                self.sent.push((frame, len));
            } else {
                self.free.push(frame);
            }
            return false;
        }
        self.count_sent += 1;
        if self.keep {
            self.sent.push((frame, len));
        } else {
            self.free.push(frame);
        }
        true
    }

    fn register(&mut self, service: u16, identity: Endpoint) {
        if self.keep {
            self.registered.insert((service, identity));
        }
    }

    fn unregister(&mut self, service: u16, identity: Endpoint) {
        // An identity that was used twice in a short time is taken back twice.
        self.registered.remove(&(service, identity));
    }
}

/// A TCP segment, absolute numbers.
#[derive(Clone, Debug)]
pub struct Segment {
    pub source: Endpoint,
    pub destination: Endpoint,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub mss: Option<u16>,
    pub window_scale: Option<u8>,
    pub sack_permitted: bool,
    pub timestamps: Option<(u32, u32)>,
    pub payload: Vec<u8>,
}

impl Segment {
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The frame, Ethernet first.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut tcp = TcpHeader::new(self.source.port, self.destination.port, self.seq, self.window);
        tcp.acknowledgment_number = self.ack;
        tcp.syn = self.has(flags::SYN);
        tcp.fin = self.has(flags::FIN);
        tcp.rst = self.has(flags::RST);
        tcp.psh = self.has(flags::PSH);
        tcp.ack = self.has(flags::ACK);
        let mut options = Vec::new();
        if let Some(mss) = self.mss {
            options.extend([2, 4]);
            options.extend(mss.to_be_bytes());
        }
        if let Some(shift) = self.window_scale {
            options.extend([1, 3, 3, shift]);
        }
        if self.sack_permitted {
            options.extend([1, 1, 4, 2]);
        }
        if let Some((value, echo)) = self.timestamps {
            options.extend([1, 1, 8, 10]);
            options.extend(value.to_be_bytes());
            options.extend(echo.to_be_bytes());
        }
        tcp.set_options_raw(&options).unwrap();
        let ethernet = PacketBuilder::ethernet2([6; 6], [8; 6]);
        let ip = if is_v4(&self.source.ip) {
            ethernet.ipv4(v4_octets(&self.source.ip), v4_octets(&self.destination.ip), 64)
        } else {
            ethernet.ipv6(self.source.ip, self.destination.ip, 64)
        };
        let mut bytes = Vec::new();
        ip.tcp_header(tcp).write(&mut bytes, &self.payload).unwrap();
        bytes
    }

    /// Parses a frame that the engine sent and checks its checksums.
    pub fn from_bytes(bytes: &[u8]) -> Segment {
        let packet = SlicedPacket::from_ethernet(bytes).expect("a well-formed packet");
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("not TCP: {bytes:02x?}") };
        let (source, destination, checksum) = match packet.net.expect("an IP packet") {
            NetSlice::Ipv4(v4) => {
                let header = v4.header();
                assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
                (
                    replayer_common::addr::from_v4(header.source()),
                    replayer_common::addr::from_v4(header.destination()),
                    tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap(),
                )
            }
            NetSlice::Ipv6(v6) => {
                let header = v6.header();
                (
                    header.source(),
                    header.destination(),
                    tcp.calc_checksum_ipv6(header.source(), header.destination()).unwrap(),
                )
            }
            NetSlice::Arp(_) => panic!("ARP"),
        };
        assert_eq!(tcp.checksum(), checksum, "TCP checksum");
        let mut bits = 0;
        for (set, flag) in [
            (tcp.syn(), flags::SYN),
            (tcp.fin(), flags::FIN),
            (tcp.rst(), flags::RST),
            (tcp.psh(), flags::PSH),
            (tcp.ack(), flags::ACK),
        ] {
            bits |= if set { flag } else { 0 };
        }
        let options = tcp_options::parse(tcp.options());
        Segment {
            source: Endpoint { ip: source, port: tcp.source_port() },
            destination: Endpoint { ip: destination, port: tcp.destination_port() },
            seq: tcp.sequence_number(),
            ack: tcp.acknowledgment_number(),
            flags: bits,
            window: tcp.window_size(),
            mss: options.mss,
            window_scale: options.window_scale,
            sack_permitted: options.sack_permitted,
            timestamps: options.timestamps,
            payload: tcp.payload().to_vec(),
        }
    }
}
