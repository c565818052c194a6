//! Packets that an offload put together, or that are larger than a frame, cut to segments as a sender would have made them.
//!
//! Pure: bytes in, bytes out.

use std::ops::Range;

use replayer_common::packet::{TcpSegment, flags};

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

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::packet::parse_tcp;

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
