//! Packets that an offload put together, or that are larger than a frame, cut to segments as a sender would have made them.
//!
//! Pure: bytes in, bytes out.

use std::ops::Range;

use replayer_common::packet::{TcpSegment, UDP_HEADER_LEN, UdpDatagram, flags};

/// Payload of the pieces of a packet of which nothing is known: one full segment on a path of 1500 bytes, with timestamps.
pub const USUAL: usize = 1448;
/// Payload of a piece at least, however short the segments were: it bounds how many come of one packet.
const LEAST: usize = 512;
/// The most pieces of one packet, whose payload is less than 64 KiB.
pub const MOST: usize = 65_536 / LEAST;

/// The pieces of a packet.
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    segment: TcpSegment,
    size: usize,
    numbers: Range<usize>,
}

/// A segment that is to be made of the packet.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    segment: TcpSegment,
    /// Where its payload begins in that of the packet.
    begin: usize,
    last: bool,
}

impl<'a> Pieces<'a> {
    /// Cuts the packet in `frame`, whose headers are `segment`, to pieces with `size` bytes of payload, but some hundred at least. A
    /// packet without payload is one piece.
    pub fn new(frame: &'a [u8], segment: &TcpSegment, size: usize) -> Pieces<'a> {
        let size = size.max(LEAST);
        let (headers, rest) = frame.split_at(usize::from(segment.payload_offset).min(frame.len()));
        let payload = &rest[..rest.len().min(segment.payload_len as usize)];
        let count = payload.len().div_ceil(size).max(1);
        Pieces { headers, payload, segment: *segment, size, numbers: 0..count }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let begin = self.numbers.next()? * self.size;
        let payload = &self.payload[begin..self.payload.len().min(begin + self.size)];
        let last = self.numbers.is_empty();
        Some(Piece { headers: self.headers, payload, segment: self.segment, begin, last })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.numbers.size_hint()
    }
}

impl ExactSizeIterator for Pieces<'_> {}

impl Piece<'_> {
    /// Its length from the Ethernet header on, bytes.
    pub fn len(&self) -> usize {
        self.headers.len() + self.payload.len()
    }

    /// Whether there is nothing of it: never, unless the packet was empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes it to the beginning of `to`, which must have room for it. Of a packet that was captured in part, the last piece says how
    /// long it would have been.
    ///
    /// # Panics
    /// When `to` is shorter than [`Piece::len`].
    pub fn write(&self, to: &mut [u8]) {
        let (headers, payload) = to[..self.len()].split_at_mut(self.headers.len());
        headers.copy_from_slice(self.headers);
        payload.copy_from_slice(self.payload);
        let segment = &self.segment;
        let (ip, tcp) = (usize::from(segment.ip_offset), usize::from(segment.tcp_offset));
        let said = if self.last { segment.payload_len as usize - self.begin } else { self.payload.len() };
        let ip_len = headers.len() + said.min(usize::from(u16::MAX) - headers.len()) - ip;
        if segment.is_v6 {
            headers[ip + 4..ip + 6].copy_from_slice(&((ip_len - 40) as u16).to_be_bytes());
        } else {
            headers[ip + 2..ip + 4].copy_from_slice(&(ip_len as u16).to_be_bytes());
        }
        let seq = segment.seq.wrapping_add(self.begin as u32);
        headers[tcp + 4..tcp + 8].copy_from_slice(&seq.to_be_bytes());
        if !self.last {
            headers[tcp + 13] &= !(flags::FIN | flags::PSH);
        }
    }
}

/// One of the datagrams that an offload put together.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    ip_len_at: usize,
    /// Bytes of the headers that the IP length field counts.
    ip_counts: usize,
}

/// The datagrams in a packet: each but the last has `size` bytes of payload.
pub fn datagrams<'a>(
    frame: &'a [u8],
    datagram: &UdpDatagram,
    size: usize,
) -> impl Iterator<Item = Datagram<'a>> {
    let (headers, rest) = frame.split_at(usize::from(datagram.payload_offset).min(frame.len()));
    let payload = &rest[..rest.len().min(datagram.payload_len as usize)];
    let ip = usize::from(datagram.ip_offset);
    let (ip_len_at, counted_from) = if datagram.is_v6 { (ip + 4, ip + 40) } else { (ip + 2, ip) };
    let ip_counts = headers.len() - counted_from;
    let of_payload = move |payload| Datagram { headers, payload, ip_len_at, ip_counts };
    payload.chunks(size.max(1)).take(MOST).map(of_payload)
}

impl Datagram<'_> {
    /// Its length from the Ethernet header on, bytes.
    #[allow(clippy::len_without_is_empty, reason = "it has headers")]
    pub fn len(&self) -> usize {
        self.headers.len() + self.payload.len()
    }

    /// Writes it to the beginning of `to`; its checksum is that of the whole packet, which nobody looks at.
    ///
    /// # Panics
    /// When `to` is shorter than [`Datagram::len`].
    pub fn write(&self, to: &mut [u8]) {
        let (headers, payload) = to[..self.len()].split_at_mut(self.headers.len());
        headers.copy_from_slice(self.headers);
        payload.copy_from_slice(self.payload);
        let ip_len = (self.ip_counts + self.payload.len()) as u16;
        headers[self.ip_len_at..self.ip_len_at + 2].copy_from_slice(&ip_len.to_be_bytes());
        let udp_len = (UDP_HEADER_LEN + self.payload.len()) as u16;
        let at = headers.len() - UDP_HEADER_LEN + 4;
        headers[at..at + 2].copy_from_slice(&udp_len.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::packet::{parse_tcp, parse_udp};

    #[test]
    fn datagrams_that_were_put_together_are_themselves_again() {
        for v6 in [false, true] {
            let payload: Vec<u8> = (0..2500).map(|at| (at % 251) as u8).collect();
            let mut frame = Vec::new();
            let ethernet = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]);
            let ip = if v6 { ethernet.ipv6([1; 16], [2; 16], 64) } else { ethernet.ipv4([1; 4], [2; 4], 64) };
            ip.udp(4000, 53).write(&mut frame, &payload).unwrap();
            let whole = parse_udp(&&frame[..]).unwrap();
            let made: Vec<Vec<u8>> = datagrams(&frame, &whole, 1000)
                .map(|datagram| {
                    let mut bytes = vec![0; datagram.len()];
                    datagram.write(&mut bytes);
                    let parsed = parse_udp(&&bytes[..]).unwrap();
                    assert_eq!((parsed.src, parsed.src_port), (whole.src, whole.src_port));
                    let begin = usize::from(parsed.payload_offset);
                    assert_eq!(bytes.len(), begin + parsed.payload_len as usize);
                    bytes.split_off(begin)
                })
                .collect();
            let expected: Vec<&[u8]> = payload.chunks(1000).collect();
            assert_eq!(made, expected);
        }
    }

    /// A packet with FIN and PSH and so many bytes of payload, each another one than its neighbours.
    fn packet(payload: usize, v6: bool) -> Vec<u8> {
        let mut frame = vec![2u8; 12];
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((20 + payload as u16).to_be_bytes());
            frame.extend([6, 64]);
            frame.extend([7; 32]);
        } else {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((40 + payload as u16).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend([0x9c, 0x40, 0, 80]);
        frame.extend(0xffff_ff00u32.to_be_bytes());
        frame.extend([0, 0, 0, 9, 0x50, flags::ACK | flags::FIN | flags::PSH, 1, 0, 0, 0, 0, 0]);
        frame.extend((0..payload).map(|at| (at % 251) as u8));
        frame
    }

    #[test]
    fn b038_the_pieces_together_are_the_packet() {
        for (payload, size, expected) in [
            (0, 1448, 1),
            (1, 1448, 1),
            (1448, 1448, 1),
            (1449, 1448, 2),
            (60_000, 1448, 42),
            (60_000, 9, 118),
        ] {
            for v6 in [false, true] {
                let frame = packet(payload, v6);
                let segment = parse_tcp(&&frame[..]).unwrap();
                let pieces = Pieces::new(&frame, &segment, size);
                assert_eq!(pieces.len(), expected);
                assert!(pieces.len() <= MOST);
                let mut bytes = Vec::new();
                for (at, piece) in pieces.enumerate() {
                    let mut made = vec![0xee; piece.len() + 3];
                    piece.write(&mut made);
                    assert_eq!(made[piece.len()..], [0xee; 3]);
                    let made = &made[..piece.len()];
                    let parsed = parse_tcp(&made).unwrap();
                    assert_eq!(parsed.seq, segment.seq.wrapping_add(bytes.len() as u32));
                    assert_eq!(parsed.payload_len as usize + usize::from(parsed.payload_offset), made.len());
                    let ends = parsed.flags & (flags::FIN | flags::PSH) != 0;
                    assert_eq!(ends, at + 1 == expected, "FIN and PSH are the last piece's");
                    bytes.extend_from_slice(&made[usize::from(parsed.payload_offset)..]);
                }
                assert!(bytes == frame[usize::from(segment.payload_offset)..]);
            }
        }
    }

    #[test]
    fn of_a_packet_that_was_cut_the_last_piece_says_how_long_it_was() {
        let frame = packet(5000, false);
        let frame = &frame[..frame.len() - 1000];
        let segment = parse_tcp(&frame).unwrap();
        let last = Pieces::new(frame, &segment, 1500).last().unwrap();
        let mut made = vec![0; last.len()];
        last.write(&mut made);
        let parsed = parse_tcp(&&made[..]).unwrap();
        assert_eq!(parsed.payload_len, 5000 - 3000);
        assert_eq!(made.len() - usize::from(parsed.payload_offset), 4000 - 3000);
    }
}
