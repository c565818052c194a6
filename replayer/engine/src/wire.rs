//! Writing segments: Ethernet (802.1Q when asked), IPv4 or IPv6, TCP. Every checksum is computed from the bytes that are
//! sent: a captured one may be partial (a packet from a local veth carries only the pseudo header's sum).

use replayer_common::addr::{Endpoint, is_v4, v4_octets};

/// How packets leave towards a target: the first hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The output device's address.
    pub source_mac: [u8; 6],
    /// The next hop's address.
    pub destination_mac: [u8; 6],
    /// VLAN tags to send with, the outer one first: EtherType and VLAN number.
    pub tags: [Option<(u16, u16)>; 2],
    /// Largest IP packet, bytes.
    pub mtu: u16,
}

/// Options of a SYN.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SynOptions {
    pub(crate) mss: u16,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sack_permitted: bool,
}

/// A segment to write; the payload is in the frame already.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) source: Endpoint,
    pub(crate) destination: Endpoint,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) syn: Option<SynOptions>,
    /// IPv4 identification.
    pub(crate) ip_id: u16,
}

/// The longest header that is written: Ethernet with two tags, IPv6, TCP with the options of a SYN.
pub(crate) const MAX_HEADER: usize = 22 + 40 + 20 + 24;

impl Header {
    fn tcp_len(&self) -> usize {
        let syn = self.syn.map_or(0, |syn| {
            4 + if syn.window_scale.is_some() { 4 } else { 0 } + if syn.sack_permitted { 4 } else { 0 }
        });
        20 + syn + if self.timestamps.is_some() { 12 } else { 0 }
    }

    /// Bytes before the payload.
    pub(crate) fn len(&self, link: &Link) -> usize {
        ethernet_len(link) + ip_len(&self.destination) + self.tcp_len()
    }

    /// Writes the headers at the start of `frame`, for the `payload_len` bytes that follow them there.
    pub(crate) fn write(&self, link: &Link, frame: &mut [u8], payload_len: usize) {
        let ip_at = ethernet_len(link);
        let v4 = is_v4(&self.destination.ip);
        frame[0..6].copy_from_slice(&link.destination_mac);
        frame[6..12].copy_from_slice(&link.source_mac);
        let ethertype: u16 = if v4 { 0x0800 } else { 0x86dd };
        for (at, (protocol, id)) in [12, 16].into_iter().zip(link.tags.into_iter().flatten()) {
            frame[at..at + 2].copy_from_slice(&protocol.to_be_bytes());
            frame[at + 2..at + 4].copy_from_slice(&id.to_be_bytes());
        }
        frame[ip_at - 2..ip_at].copy_from_slice(&ethertype.to_be_bytes());
        let tcp_len = self.tcp_len();
        let tcp_at = ip_at + ip_len(&self.destination);
        let segment_len = tcp_len + payload_len;
        if v4 {
            self.write_v4(&mut frame[ip_at..tcp_at], segment_len);
        } else {
            self.write_v6(&mut frame[ip_at..tcp_at], segment_len);
        }
        self.write_tcp(&mut frame[tcp_at..tcp_at + tcp_len]);
        // Pseudo header: RFC 9293 section 3.1; RFC 8200 section 8.1.
        let mut sum = 6u64 + segment_len as u64;
        sum = if v4 {
            add(add(sum.to_be() >> 48, &v4_octets(&self.source.ip)), &v4_octets(&self.destination.ip))
        } else {
            add(add(sum.to_be() >> 48, &self.source.ip), &self.destination.ip)
        };
        let checksum = finish(add(sum, &frame[tcp_at..tcp_at + segment_len]));
        frame[tcp_at + 16..tcp_at + 18].copy_from_slice(&checksum);
    }

    fn write_v4(&self, ip: &mut [u8], segment_len: usize) {
        ip[0] = 0x45;
        ip[1] = 0;
        ip[2..4].copy_from_slice(&(20 + segment_len as u16).to_be_bytes());
        ip[4..6].copy_from_slice(&self.ip_id.to_be_bytes());
        // Don't fragment.
        ip[6..8].copy_from_slice(&0x4000u16.to_be_bytes());
        ip[8] = 64;
        ip[9] = 6;
        ip[10..12].copy_from_slice(&[0, 0]);
        ip[12..16].copy_from_slice(&v4_octets(&self.source.ip));
        ip[16..20].copy_from_slice(&v4_octets(&self.destination.ip));
        let checksum = finish(add(0, &ip[..20]));
        ip[10..12].copy_from_slice(&checksum);
    }

    fn write_v6(&self, ip: &mut [u8], segment_len: usize) {
        ip[0..4].copy_from_slice(&0x6000_0000u32.to_be_bytes());
        ip[4..6].copy_from_slice(&(segment_len as u16).to_be_bytes());
        ip[6] = 6;
        ip[7] = 64;
        ip[8..24].copy_from_slice(&self.source.ip);
        ip[24..40].copy_from_slice(&self.destination.ip);
    }

    fn write_tcp(&self, tcp: &mut [u8]) {
        tcp[0..2].copy_from_slice(&self.source.port.to_be_bytes());
        tcp[2..4].copy_from_slice(&self.destination.port.to_be_bytes());
        tcp[4..8].copy_from_slice(&self.seq.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.ack.to_be_bytes());
        tcp[12] = (tcp.len() as u8 / 4) << 4;
        tcp[13] = self.flags;
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        // Checksum to be filled in; no urgent data.
        tcp[16..20].copy_from_slice(&[0; 4]);
        let mut at = 20;
        let mut put = |bytes: &[u8]| {
            tcp[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        if let Some(syn) = self.syn {
            let mss = syn.mss.to_be_bytes();
            put(&[2, 4, mss[0], mss[1]]);
            if syn.sack_permitted {
                put(&[1, 1, 4, 2]);
            }
            if let Some(shift) = syn.window_scale {
                put(&[1, 3, 3, shift]);
            }
        }
        if let Some((value, echo)) = self.timestamps {
            put(&[1, 1, 8, 10]);
            put(&value.to_be_bytes());
            put(&echo.to_be_bytes());
        }
    }
}

fn ethernet_len(link: &Link) -> usize {
    14 + 4 * link.tags.iter().flatten().count()
}

fn ip_len(destination: &Endpoint) -> usize {
    if is_v4(&destination.ip) { 20 } else { 40 }
}

/// The largest payload of a full segment on a path: what the MTU leaves after IP and TCP headers, options included.
pub(crate) fn payload_limit(mtu: u16, destination: &Endpoint, timestamps: bool) -> u16 {
    let headers = ip_len(destination) as u16 + 20 + if timestamps { 12 } else { 0 };
    mtu.saturating_sub(headers)
}

/// Adds bytes to a ones' complement sum (RFC 1071), in the machine's byte order: the sum is the same, its bytes swapped.
#[inline]
fn add(sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    // 32-bit words into a 64-bit sum: no carry is lost below 16 GiB, and the loop becomes vector adds.
    let mut sum = sum + words.iter().map(|&word| u64::from(u32::from_ne_bytes(word))).sum::<u64>();
    let mut last = [0u8; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_ne_bytes(last));
    sum
}

/// Folds the sum to 16 bits and complements it: the bytes of the checksum field.
#[inline]
fn finish(sum: u64) -> [u8; 2] {
    let mut sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use etherparse::{SlicedPacket, TransportSlice};
    use replayer_common::packet::flags;

    fn check(
        source: &str,
        destination: &str,
        tags: [Option<(u16, u16)>; 2],
        payload_len: usize,
        syn: bool,
        timestamps: bool,
    ) {
        let link = Link { source_mac: [2; 6], destination_mac: [4; 6], tags, mtu: 1500 };
        let header = Header {
            source: source.parse::<core::net::SocketAddr>().unwrap().into(),
            destination: destination.parse::<core::net::SocketAddr>().unwrap().into(),
            seq: 0xfeed_beef,
            ack: 7,
            flags: flags::ACK | if syn { flags::SYN } else { flags::PSH },
            window: 0xffff,
            timestamps: timestamps.then_some((0xffff_ff00, 3)),
            syn: syn.then_some(SynOptions { mss: 1460, window_scale: Some(7), sack_permitted: true }),
            ip_id: 0x1234,
        };
        let start = header.len(&link);
        assert!(start <= MAX_HEADER);
        let mut frame = vec![0xaa; start + payload_len];
        for (i, byte) in frame[start..].iter_mut().enumerate() {
            *byte = (i * 31) as u8;
        }
        let payload = frame[start..].to_vec();
        header.write(&link, &mut frame, payload_len);
        let parsed = SlicedPacket::from_ethernet(&frame).unwrap();
        assert_eq!(parsed.link_exts.len(), tags.iter().flatten().count());
        let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("not TCP") };
        assert_eq!(tcp.payload(), payload);
        assert_eq!((tcp.sequence_number(), tcp.acknowledgment_number()), (0xfeed_beef, 7));
        let expected = match parsed.net.unwrap() {
            etherparse::NetSlice::Ipv4(v4) => {
                assert_eq!(v4.header().header_checksum(), v4.header().to_header().calc_header_checksum());
                tcp.calc_checksum_ipv4(v4.header().source(), v4.header().destination()).unwrap()
            }
            etherparse::NetSlice::Ipv6(v6) => {
                tcp.calc_checksum_ipv6(v6.header().source(), v6.header().destination()).unwrap()
            }
            _ => panic!("not IP"),
        };
        assert_eq!(tcp.checksum(), expected);
        let options = replayer_common::tcp_options::parse(tcp.options());
        assert_eq!(options.mss, syn.then_some(1460));
        assert_eq!(options.window_scale, syn.then_some(7));
        assert_eq!(options.timestamps, timestamps.then_some((0xffff_ff00, 3)));
    }

    #[test]
    fn an_independent_parser_agrees() {
        for tags in [[None; 2], [Some((0x8100, 5)), None], [Some((0x88a8, 7)), Some((0x8100, 5))]] {
            for payload_len in [0, 1, 2, 3, 5, 100, 1447, 1448] {
                for (syn, timestamps) in [(true, true), (true, false), (false, true), (false, false)] {
                    check("192.0.2.1:40000", "198.51.100.255:80", tags, payload_len, syn, timestamps);
                    check(
                        "[2001:db8::1]:40000",
                        "[2001:db8:ffff::2]:65535",
                        tags,
                        payload_len,
                        syn,
                        timestamps,
                    );
                }
            }
        }
    }
}
