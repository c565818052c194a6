//! Writing segments: Ethernet (802.1Q when asked), IPv4 or IPv6, TCP. Every checksum is computed from the bytes that are
//! sent: a captured one may be partial (a packet from a local veth carries only the pseudo header's sum).

use replayer_common::addr::{Endpoint, Ip, is_v4, v4_octets};

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

/// A segment to write; the payload is in the frame already. The rest of its header is the same for all segments of a service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) source: Endpoint,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) syn: Option<SynOptions>,
    /// IPv4 identification.
    pub(crate) ip_id: u16,
}

/// The same of a segment over IPv4 that is no SYN.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlainHeader {
    pub(crate) ip: [u8; 4],
    pub(crate) port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) ip_id: u16,
}

/// Ethernet with two tags, IPv6, TCP without options.
const MAX_TEMPLATE: usize = 22 + 40 + 20;

/// Ethernet without tags, IPv4, TCP without options.
pub(crate) const PLAIN: usize = 14 + 20 + 20;

/// The longest header that is written: with the options of a SYN.
pub(crate) const MAX_HEADER: usize = MAX_TEMPLATE + 24;

/// What the headers of all segments to a service's target have in common, and its part of their checksums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Template {
    /// Ethernet, IP, TCP without options; zero where a segment says something of its own.
    bytes: [u8; MAX_TEMPLATE],
    ip_at: usize,
    tcp_at: usize,
    v4: bool,
    /// IPv4 and no tags: each field is at a place that is known when this is compiled.
    plain: bool,
    /// Sum of the IPv4 header, see [`sum`].
    ip_sum: u64,
    /// Sum of TCP's header with its pseudo header.
    tcp_sum: u64,
    /// Largest IP packet, bytes.
    pub(crate) mtu: u16,
}

impl Template {
    /// For packets to `target` by `link`, all with the same window.
    pub(crate) fn new(link: &Link, target: &Endpoint, window: u16) -> Template {
        let v4 = is_v4(&target.ip);
        let mut bytes = [0; MAX_TEMPLATE];
        let ip_at = ethernet(link, v4, &mut bytes);
        let tcp_at = ip_at + ip_len(target);
        let ip = &mut bytes[ip_at..tcp_at];
        if v4 {
            // Five words, don't fragment, TTL 64.
            ip[0] = 0x45;
            ip[6..10].copy_from_slice(&[0x40, 0, 64, 6]);
            ip[16..20].copy_from_slice(&v4_octets(&target.ip));
        } else {
            ip[0] = 0x60;
            ip[6..8].copy_from_slice(&[6, 64]);
            ip[24..40].copy_from_slice(&target.ip);
        }
        let ip_sum = u64::from(sum(ip));
        let tcp = &mut bytes[tcp_at..tcp_at + 20];
        tcp[2..4].copy_from_slice(&target.port.to_be_bytes());
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
        // Pseudo header: RFC 9293 section 3.1; RFC 8200 section 8.1.
        let tcp_sum = 6 + u64::from(sum(tcp)) + address_sum(&target.ip, v4);
        Template { bytes, ip_at, tcp_at, v4, plain: tcp_at == PLAIN - 20, ip_sum, tcp_sum, mtu: link.mtu }
    }
}

impl Template {
    /// Whether headers can be written by [`Template::write_plain`].
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.plain
    }

    /// As [`Header::write`], where nothing comes before IPv4 and no options but timestamps after TCP: each field is at a fixed place.
    #[inline(always)]
    pub(crate) fn write_plain(
        &self,
        frame: &mut [u8],
        fields: PlainHeader,
        payload_len: usize,
        payload_sum: u16,
    ) {
        let PlainHeader { ip, port, seq, ack, flags, timestamps, ip_id } = fields;
        let Some((header, rest)) = frame.split_first_chunk_mut::<PLAIN>() else { return };
        let Some(start) = self.bytes.first_chunk::<PLAIN>() else { return };
        *header = *start;
        let tcp_len = if timestamps.is_some() { 32 } else { 20 };
        let segment_len = tcp_len + payload_len;
        let total_len = 20 + segment_len as u16;
        let source_sum = u64::from(u32::from_be_bytes(ip));
        let ip_sum = self.ip_sum + u64::from(total_len) + u64::from(ip_id) + source_sum;
        header[16..18].copy_from_slice(&total_len.to_be_bytes());
        header[18..20].copy_from_slice(&ip_id.to_be_bytes());
        header[24..26].copy_from_slice(&checksum(ip_sum));
        header[26..30].copy_from_slice(&ip);
        let offset_and_flags = ((tcp_len / 4) << 12) as u16 | u16::from(flags);
        let mut sum = self.tcp_sum
            + source_sum
            + u64::from(port)
            + u64::from(seq)
            + u64::from(ack)
            + u64::from(offset_and_flags)
            + segment_len as u64
            + u64::from(payload_sum);
        header[34..36].copy_from_slice(&port.to_be_bytes());
        header[38..42].copy_from_slice(&seq.to_be_bytes());
        header[42..46].copy_from_slice(&ack.to_be_bytes());
        header[46..48].copy_from_slice(&offset_and_flags.to_be_bytes());
        if let Some((value, echo)) = timestamps
            && let Some(option) = rest.first_chunk_mut::<12>()
        {
            option[..4].copy_from_slice(&[1, 1, 8, 10]);
            option[4..8].copy_from_slice(&value.to_be_bytes());
            option[8..12].copy_from_slice(&echo.to_be_bytes());
            sum += 0x0101_080a + u64::from(value) + u64::from(echo);
        }
        header[50..52].copy_from_slice(&checksum(sum));
    }
}

/// A small packet without what sets the copies of a session apart: made once, then copied for each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stamp {
    service: u16,
    timestamps: bool,
    bytes: [u8; Stamp::MAX],
    /// The sums of what is the same.
    ip_sum: u64,
    tcp_sum: u64,
}

impl Stamp {
    /// The longest packet, bytes.
    pub(crate) const MAX: usize = 128;
    /// Shorter ones are copied as one cache line.
    const SHORT: usize = 64;

    /// For sessions of the service, with the timestamps option or without.
    pub(crate) fn new(service: u16, timestamps: bool) -> Stamp {
        Stamp { service, timestamps, bytes: [0; Stamp::MAX], ip_sum: 0, tcp_sum: 0 }
    }

    #[inline]
    pub(crate) fn is_of(&self, service: u16, timestamps: bool) -> bool {
        (self.service, self.timestamps) == (service, timestamps)
    }

    /// Where the payload goes.
    pub(crate) fn room(&mut self, start: usize) -> &mut [u8] {
        &mut self.bytes[start..]
    }

    /// Writes what is the same of all sessions that `fields` are those of one of; the payload is there.
    pub(crate) fn fill(
        &mut self,
        template: &Template,
        fields: PlainHeader,
        payload_len: usize,
        payload_sum: u16,
    ) {
        let timestamps = fields.timestamps.map(|(value, _)| (value, 0));
        let fields = PlainHeader { ip: [0; 4], port: 0, ack: 0, timestamps, ip_id: 0, ..fields };
        template.write_plain(&mut self.bytes, fields, payload_len, payload_sum);
        let sum_at = |at: usize| u64::from(!u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]));
        (self.ip_sum, self.tcp_sum) = (sum_at(24), sum_at(50));
    }

    /// Writes the packet of one session.
    #[inline(always)]
    pub(crate) fn write(&self, frame: &mut [u8], len: usize, fields: PlainHeader) {
        let PlainHeader { ip, port, ack, timestamps, ip_id, .. } = fields;
        if let (true, Some(short)) = (len <= Stamp::SHORT, frame.first_chunk_mut::<{ Stamp::SHORT }>()) {
            short.copy_from_slice(&self.bytes[..Stamp::SHORT]);
        } else if let Some(long) = frame.first_chunk_mut::<{ Stamp::MAX }>() {
            *long = self.bytes;
        } else {
            frame[..len].copy_from_slice(&self.bytes[..len]);
        }
        let Some((header, rest)) = frame.split_first_chunk_mut::<PLAIN>() else { return };
        let source_sum = u64::from(u32::from_be_bytes(ip));
        header[18..20].copy_from_slice(&ip_id.to_be_bytes());
        header[24..26].copy_from_slice(&checksum(self.ip_sum + u64::from(ip_id) + source_sum));
        header[26..30].copy_from_slice(&ip);
        header[34..36].copy_from_slice(&port.to_be_bytes());
        header[42..46].copy_from_slice(&ack.to_be_bytes());
        let mut sum = self.tcp_sum + source_sum + u64::from(port) + u64::from(ack);
        if let Some((_, echo)) = timestamps
            && let Some(option) = rest.first_chunk_mut::<12>()
        {
            option[8..12].copy_from_slice(&echo.to_be_bytes());
            sum += u64::from(echo);
        }
        header[50..52].copy_from_slice(&checksum(sum));
    }
}

/// Writes the Ethernet header with its tags at the start of `bytes`. Where the IP header begins.
pub(crate) fn ethernet(link: &Link, v4: bool, bytes: &mut [u8]) -> usize {
    let ip_at = 14 + 4 * link.tags.iter().flatten().count();
    bytes[0..6].copy_from_slice(&link.destination_mac);
    bytes[6..12].copy_from_slice(&link.source_mac);
    for (at, (protocol, id)) in [12, 16].into_iter().zip(link.tags.into_iter().flatten()) {
        bytes[at..at + 2].copy_from_slice(&protocol.to_be_bytes());
        bytes[at + 2..at + 4].copy_from_slice(&id.to_be_bytes());
    }
    let ethertype: u16 = if v4 { 0x0800 } else { 0x86dd };
    bytes[ip_at - 2..ip_at].copy_from_slice(&ethertype.to_be_bytes());
    ip_at
}

impl Header {
    fn tcp_len(&self) -> usize {
        let syn = self.syn.map_or(0, |syn| {
            4 + if syn.window_scale.is_some() { 4 } else { 0 } + if syn.sack_permitted { 4 } else { 0 }
        });
        20 + syn + if self.timestamps.is_some() { 12 } else { 0 }
    }

    /// Bytes before the payload.
    pub(crate) fn len(&self, template: &Template) -> usize {
        template.tcp_at + self.tcp_len()
    }

    /// Writes the headers at the start of `frame`, for the `payload_len` bytes that follow them there, whose [`sum`] is `payload_sum`.
    pub(crate) fn write(&self, template: &Template, frame: &mut [u8], payload_len: usize, payload_sum: u16) {
        let Template { ip_at, tcp_at, v4, .. } = *template;
        frame[..tcp_at + 20].copy_from_slice(&template.bytes[..tcp_at + 20]);
        let tcp_len = self.tcp_len();
        let segment_len = tcp_len + payload_len;
        let source_sum = address_sum(&self.source.ip, v4);
        let ip = &mut frame[ip_at..tcp_at];
        if v4 {
            let total_len = 20 + segment_len as u16;
            let sum = template.ip_sum + u64::from(total_len) + u64::from(self.ip_id) + source_sum;
            ip[2..4].copy_from_slice(&total_len.to_be_bytes());
            ip[4..6].copy_from_slice(&self.ip_id.to_be_bytes());
            ip[10..12].copy_from_slice(&checksum(sum));
            ip[12..16].copy_from_slice(&v4_octets(&self.source.ip));
        } else {
            ip[4..6].copy_from_slice(&(segment_len as u16).to_be_bytes());
            ip[8..24].copy_from_slice(&self.source.ip);
        }
        let offset_and_flags = ((tcp_len / 4) << 12) as u16 | u16::from(self.flags);
        let mut sum = template.tcp_sum
            + source_sum
            + u64::from(self.source.port)
            + u64::from(self.seq)
            + u64::from(self.ack)
            + u64::from(offset_and_flags)
            + segment_len as u64
            + u64::from(payload_sum);
        let tcp = &mut frame[tcp_at..tcp_at + tcp_len];
        tcp[0..2].copy_from_slice(&self.source.port.to_be_bytes());
        tcp[4..8].copy_from_slice(&self.seq.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.ack.to_be_bytes());
        tcp[12..14].copy_from_slice(&offset_and_flags.to_be_bytes());
        if let Some(syn) = self.syn {
            sum += self.write_syn_options(&syn, &mut tcp[20..]);
        }
        if let Some((value, echo)) = self.timestamps {
            // The last of the options.
            let option = &mut tcp[tcp_len - 12..];
            option[..4].copy_from_slice(&[1, 1, 8, 10]);
            option[4..8].copy_from_slice(&value.to_be_bytes());
            option[8..12].copy_from_slice(&echo.to_be_bytes());
            sum += 0x0101_080a + u64::from(value) + u64::from(echo);
        }
        tcp[16..18].copy_from_slice(&checksum(sum));
    }

    /// Returns their sum.
    fn write_syn_options(&self, syn: &SynOptions, options: &mut [u8]) -> u64 {
        let mut at = 0;
        let mut put = |bytes: [u8; 4]| {
            options[at..at + 4].copy_from_slice(&bytes);
            at += 4;
        };
        let mss = syn.mss.to_be_bytes();
        put([2, 4, mss[0], mss[1]]);
        if syn.sack_permitted {
            put([1, 1, 4, 2]);
        }
        if let Some(shift) = syn.window_scale {
            put([1, 3, 3, shift]);
        }
        u64::from(sum(&options[..at]))
    }
}

fn ip_len(destination: &Endpoint) -> usize {
    if is_v4(&destination.ip) { 20 } else { 40 }
}

/// The largest payload of a full segment on a path: what the MTU leaves after IP and TCP headers, options included.
pub(crate) fn payload_limit(mtu: u16, destination: &Endpoint, timestamps: bool) -> u16 {
    let headers = ip_len(destination) as u16 + 20 + if timestamps { 12 } else { 0 };
    mtu.saturating_sub(headers)
}

/// An address as part of a sum: its 32-bit words, which count the same as the 16-bit words in them.
#[inline]
pub(crate) fn address_sum(ip: &Ip, v4: bool) -> u64 {
    if v4 {
        return u64::from(u32::from_be_bytes(v4_octets(ip)));
    }
    let (words, _) = ip.as_chunks::<4>();
    words.iter().map(|&word| u64::from(u32::from_be_bytes(word))).sum()
}

/// The ones' complement sum of bytes as 16-bit words in network order (RFC 1071); an odd last byte is the high half of a word.
#[inline(always)]
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    // In the machine's byte order: the sum is the same, its bytes swapped.
    let (words, rest) = bytes.as_chunks::<8>();
    let mut sum = if words.len() < 8 {
        let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
        words.iter().map(|&word| halves(u64::from_ne_bytes(word))).sum::<u64>()
    } else {
        sum_long(words.as_flattened())
    };
    let (word, rest) = rest.as_chunks::<4>();
    sum += word.first().map_or(0, |&word| u64::from(u32::from_ne_bytes(word)));
    let (word, rest) = rest.as_chunks::<2>();
    sum += word.first().map_or(0, |&word| u64::from(u16::from_ne_bytes(word)));
    sum += rest.first().map_or(0, |&byte| u64::from(u16::from_ne_bytes([byte, 0])));
    u16::from_be(fold(sum))
}

/// So many bytes are few.
pub(crate) const FEW: usize = 64;

/// The [`sum`] of the first `len` bytes, which are few.
#[inline(always)]
pub(crate) fn sum_few(bytes: &[u8; FEW], len: usize) -> u16 {
    let (Some(&word), 0..8) = (bytes.first_chunk(), len) else { return sum(&bytes[..len]) };
    // In the little-endian order, where what comes first is lowest: what is beyond is cut off at the top.
    let word = u64::from_le_bytes(word) & ((1 << (8 * len)) - 1);
    fold((word & 0xffff_ffff) + (word >> 32)).swap_bytes()
}

/// 32-bit words into a 64-bit sum: no carry is lost below 16 GiB, and the loop becomes vector adds.
#[inline(never)]
fn sum_long(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().map(|&word| u64::from(u32::from_ne_bytes(word))).sum()
}

/// A sum in 16 bits. Added to itself with its halves exchanged, the upper half is the sum of both and of the carry out of them.
#[inline]
fn fold(sum: u64) -> u16 {
    let sum = (sum.wrapping_add(sum.rotate_left(32)) >> 32) as u32;
    (sum.wrapping_add(sum.rotate_left(16)) >> 16) as u16
}

/// The bytes of the checksum field for what has this sum.
#[inline]
pub(crate) fn checksum(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_be_bytes()
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
        let destination: Endpoint = destination.parse::<core::net::SocketAddr>().unwrap().into();
        let template = Template::new(&link, &destination, 0xffff);
        let header = Header {
            source: source.parse::<core::net::SocketAddr>().unwrap().into(),
            seq: 0xfeed_beef,
            ack: 7,
            flags: flags::ACK | if syn { flags::SYN } else { flags::PSH },
            timestamps: timestamps.then_some((0xffff_ff00, 3)),
            syn: syn.then_some(SynOptions { mss: 1460, window_scale: Some(7), sack_permitted: true }),
            ip_id: 0x1234,
        };
        let start = header.len(&template);
        assert!(start <= MAX_HEADER);
        let mut frame = vec![0xaa; start + payload_len];
        for (i, byte) in frame[start..].iter_mut().enumerate() {
            *byte = (i * 31) as u8;
        }
        let payload = frame[start..].to_vec();
        header.write(&template, &mut frame, payload_len, sum(&payload));
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
    fn few_bytes_have_the_same_sum() {
        let bytes: [u8; FEW] = core::array::from_fn(|i| (i * 37 + 201) as u8);
        for len in 0..=FEW {
            assert_eq!(sum_few(&bytes, len), sum(&bytes[..len]), "{len} bytes");
        }
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
