//! The header record: what the assistant returns of each of the target's segments.

use crate::addr::Ip;
use crate::tcp_options::TcpOptions;

/// The headers of one segment that the target sent, without its payload. 72 bytes, little endian on the wire. Of a datagram only service, identity
/// and payload length are there, the rest is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ResponseHeader {
    /// The service, by the number that the online role gave it in its hello.
    pub service: u16,
    /// TCP flags.
    pub flags: u8,
    /// Which of the options below were there: [`present`].
    pub present: u8,
    /// The identity's port (the segment's destination port).
    pub port: u16,
    /// The window, unscaled.
    pub window: u16,
    /// The identity's address (the segment's destination).
    pub addr: Ip,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// Payload, bytes.
    pub payload_len: u32,
    /// TSval.
    pub ts_val: u32,
    /// TSecr.
    pub ts_ecr: u32,
    /// MSS (SYN-ACK).
    pub mss: u16,
    /// Window scale shift (SYN-ACK).
    pub window_scale: u8,
    /// How many of `sack` count.
    pub sack_count: u8,
    /// SACK blocks, left and right edge.
    pub sack: [(u32, u32); 3],
}

/// Bits of [`ResponseHeader::present`].
pub mod present {
    /// Timestamps.
    pub const TIMESTAMPS: u8 = 1;
    /// Maximum segment size.
    pub const MSS: u8 = 2;
    /// Window scale.
    pub const WINDOW_SCALE: u8 = 4;
    /// SACK permitted.
    pub const SACK_PERMITTED: u8 = 8;
}

const _: () = assert!(size_of::<ResponseHeader>() == ResponseHeader::SIZE);

impl ResponseHeader {
    /// Bytes of a record on the wire.
    pub const SIZE: usize = 72;

    /// Fills in what the segment's options say.
    pub fn set_options(&mut self, options: &TcpOptions) {
        if let Some((val, ecr)) = options.timestamps {
            self.present |= present::TIMESTAMPS;
            (self.ts_val, self.ts_ecr) = (val, ecr);
        }
        if let Some(mss) = options.mss {
            self.present |= present::MSS;
            self.mss = mss;
        }
        if let Some(shift) = options.window_scale {
            self.present |= present::WINDOW_SCALE;
            self.window_scale = shift;
        }
        if options.sack_permitted {
            self.present |= present::SACK_PERMITTED;
        }
        self.sack_count = options.sack_count.min(3);
        self.sack.copy_from_slice(&options.sack[..3]);
    }

    /// Whether `bit` of [`present`] is set.
    #[inline]
    pub fn has(&self, bit: u8) -> bool {
        self.present & bit != 0
    }

    /// The record as it goes over the wire.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut out = [0u8; Self::SIZE];
        out[0..2].copy_from_slice(&self.service.to_le_bytes());
        out[2] = self.flags;
        out[3] = self.present;
        out[4..6].copy_from_slice(&self.port.to_le_bytes());
        out[6..8].copy_from_slice(&self.window.to_le_bytes());
        out[8..24].copy_from_slice(&self.addr);
        for (at, word) in
            [(24, self.seq), (28, self.ack), (32, self.payload_len), (36, self.ts_val), (40, self.ts_ecr)]
        {
            out[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        out[44..46].copy_from_slice(&self.mss.to_le_bytes());
        out[46] = self.window_scale;
        out[47] = self.sack_count;
        for (i, (left, right)) in self.sack.iter().enumerate() {
            out[48 + i * 8..52 + i * 8].copy_from_slice(&left.to_le_bytes());
            out[52 + i * 8..56 + i * 8].copy_from_slice(&right.to_le_bytes());
        }
        out
    }

    /// Reads a record. Every bit pattern is a record; counts out of range are clamped.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> ResponseHeader {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut addr = [0; 16];
        addr.copy_from_slice(&bytes[8..24]);
        ResponseHeader {
            service: half(0),
            flags: bytes[2],
            present: bytes[3],
            port: half(4),
            window: half(6),
            addr,
            seq: word(24),
            ack: word(28),
            payload_len: word(32),
            ts_val: word(36),
            ts_ecr: word(40),
            mss: half(44),
            window_scale: bytes[46],
            sack_count: bytes[47].min(3),
            sack: [(word(48), word(52)), (word(56), word(60)), (word(64), word(68))],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_then_decode() {
        let mut header =
            ResponseHeader { service: 3, flags: 0x12, port: 40_000, window: 512, ..Default::default() };
        header.addr = crate::addr::from_v4([192, 0, 2, 9]);
        (header.seq, header.ack, header.payload_len) = (u32::MAX, 7, 1448);
        header.set_options(&crate::tcp_options::parse(&[
            2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9, 1, 3, 3, 7,
        ]));
        header.sack = [(1, 2), (3, 4), (5, 6)];
        header.sack_count = 3;
        assert_eq!(ResponseHeader::decode(&header.encode()), header);
        assert!(header.has(present::MSS | present::TIMESTAMPS));
    }
}
