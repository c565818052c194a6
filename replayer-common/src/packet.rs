//! The header parser: Ethernet, VLAN tags, IPv4 or IPv6, TCP or UDP, read from hostile bytes.
//!
//! One parser for both sides: a BPF program runs it over a packet that it must not read past, user space over a slice.
//! Hence its habits: every read goes through [`Bytes`], which checks it; every offset has a small constant bound, so
//! that the BPF verifier can follow it; no loop without a constant bound; everything inlined. It reads headers only,
//! keeps nothing, and never trusts a length field before having compared it with what contains it. Checksums are not
//! verified: a copy made on a host has partial ones.

use crate::addr::{self, Ip};

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;
/// VLAN tags that are stepped over: 802.1ad around 802.1Q is two.
pub const MAX_VLAN_TAGS: usize = 2;
/// IPv6 extension headers that are stepped over. Real clients send none or one.
pub const MAX_EXTENSION_HEADERS: usize = 4;
/// A TCP header with all its options (RFC 9293 section 3.1: four bits of 32-bit words).
pub const MAX_TCP_HEADER_LEN: usize = 60;
/// The last offset at which a TCP header may begin: the longest chain of headers that is still followed.
/// Four extension headers of 64 bytes; longer ones are refused as [`Reject::ExtensionHeaders`].
pub const MAX_TCP_OFFSET: usize = ETHERNET_LEN + MAX_VLAN_TAGS * 4 + 40 + MAX_EXTENSION_HEADERS * 64;
/// No header that [`parse_tcp`] accepts reaches beyond this.
pub const MAX_HEADERS_LEN: usize = MAX_TCP_OFFSET + MAX_TCP_HEADER_LEN;

/// TCP flags, as in the header's 14th byte (RFC 9293 section 3.1, RFC 3168 for the last two).
pub mod flags {
    #![allow(missing_docs)] // The names are the RFCs'.
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
    pub const URG: u8 = 32;
    pub const ECE: u8 = 64;
    pub const CWR: u8 = 128;
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q, 802.1ad, and the value that older switches use for the outer tag.
const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// TCP, as the IP header names it.
pub const PROTOCOL_TCP: u8 = 6;
/// UDP, as the IP header names it.
pub const PROTOCOL_UDP: u8 = 17;
/// A UDP header (RFC 768).
pub const UDP_HEADER_LEN: usize = 8;

/// A service's transport protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp = PROTOCOL_TCP,
    /// UDP.
    Udp = PROTOCOL_UDP,
}

impl Protocol {
    /// Its number in an IP header.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The protocol with this number, if it is one of these.
    pub const fn from_number(number: u8) -> Option<Protocol> {
        match number {
            PROTOCOL_TCP => Some(Protocol::Tcp),
            PROTOCOL_UDP => Some(Protocol::Udp),
            _ => None,
        }
    }
}
// IPv6 extension headers (RFC 8200 section 4, RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// The largest packet whose length an IP length field can say.
const MAX_SAID_LEN: usize = 65_535;

/// Checked reads of a frame, from its Ethernet header on.
pub trait Bytes {
    /// The `N` bytes at `offset`; None when the frame does not hold all of them.
    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// The frame's length, bytes. In the kernel it may exceed what `bytes` can read (data that is not linear).
    fn frame_len(&self) -> usize;
}

impl Bytes for &[u8] {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        self.len()
    }
}

/// Why a frame is not a TCP segment that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// The frame ends inside a header.
    Truncated,
    /// Neither IPv4 nor IPv6, or more than [`MAX_VLAN_TAGS`] tags.
    NotIp,
    /// IP, but not the protocol that was asked for: not TCP, most often.
    NotTcp,
    /// A fragment of an IP packet. Only a first fragment has ports, and none has the whole segment.
    Fragment,
    /// A length or version field contradicts another.
    Malformed,
    /// More or longer IPv6 extension headers than are followed.
    ExtensionHeaders,
}

impl Reject {
    /// Its name, for counters.
    pub fn name(self) -> &'static str {
        match self {
            Reject::Truncated => "truncated",
            Reject::NotIp => "not_ip",
            Reject::NotTcp => "not_tcp",
            Reject::Fragment => "fragment",
            Reject::Malformed => "malformed",
            Reject::ExtensionHeaders => "extension_headers",
        }
    }
}

/// Where an IP packet's transport header is: what [`locate`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpPacket {
    /// The IP header, from the frame's beginning.
    pub ip_offset: usize,
    /// What follows the IP header and its extension headers.
    pub transport_offset: usize,
    /// Bytes from `transport_offset` to the packet's end, from the IP length field.
    pub transport_len: usize,
    /// The transport protocol's number.
    pub protocol: u8,
    /// A fragment: `transport_offset` points into the middle of something, or at its first part.
    pub fragment: bool,
    /// IPv6.
    pub is_v6: bool,
    /// ECN "congestion experienced" (RFC 3168 section 5).
    pub ce: bool,
}

impl IpPacket {
    /// The source address.
    #[inline(always)]
    pub fn src(&self, frame: &impl Bytes) -> Result<Ip, Reject> {
        self.address(frame, 12, 8)
    }

    /// The destination address.
    #[inline(always)]
    pub fn dst(&self, frame: &impl Bytes) -> Result<Ip, Reject> {
        self.address(frame, 16, 24)
    }

    #[inline(always)]
    fn address(&self, frame: &impl Bytes, v4_at: usize, v6_at: usize) -> Result<Ip, Reject> {
        if self.is_v6 {
            frame.bytes(self.ip_offset + v6_at).ok_or(Reject::Truncated)
        } else {
            frame.bytes(self.ip_offset + v4_at).map(addr::from_v4).ok_or(Reject::Truncated)
        }
    }

    /// Source and destination port, host order. Only a TCP or UDP packet that is no fragment has them where this looks.
    #[inline(always)]
    pub fn ports(&self, frame: &impl Bytes) -> Result<(u16, u16), Reject> {
        let [a, b, c, d] = frame.bytes(self.transport_offset).ok_or(Reject::Truncated)?;
        Ok((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// The TCP segment in this packet.
    #[inline(always)]
    pub fn tcp(&self, frame: &impl Bytes) -> Result<TcpSegment, Reject> {
        if self.protocol != PROTOCOL_TCP {
            return Err(Reject::NotTcp);
        }
        if self.fragment {
            return Err(Reject::Fragment);
        }
        let header: [u8; 20] = frame.bytes(self.transport_offset).ok_or(Reject::Truncated)?;
        let [s0, s1, d0, d1, q0, q1, q2, q3, a0, a1, a2, a3, offset, flags, w0, w1, ..] = header;
        let header_len = usize::from(offset >> 4) * 4;
        if header_len < 20 || header_len > self.transport_len {
            return Err(Reject::Malformed);
        }
        let payload_offset = self.transport_offset + header_len;
        // The options have to be there too; one read of the header's last byte tells.
        if frame.bytes::<1>(payload_offset - 1).is_none() {
            return Err(Reject::Truncated);
        }
        Ok(TcpSegment {
            src: self.src(frame)?,
            dst: self.dst(frame)?,
            src_port: u16::from_be_bytes([s0, s1]),
            dst_port: u16::from_be_bytes([d0, d1]),
            seq: u32::from_be_bytes([q0, q1, q2, q3]),
            ack: u32::from_be_bytes([a0, a1, a2, a3]),
            flags,
            window: u16::from_be_bytes([w0, w1]),
            ip_offset: self.ip_offset as u16,
            tcp_offset: self.transport_offset as u16,
            payload_offset: payload_offset as u16,
            payload_len: (self.transport_len - header_len) as u32,
            is_v6: self.is_v6,
            ce: self.ce,
        })
    }

    /// The UDP datagram in this packet.
    #[inline(always)]
    pub fn udp(&self, frame: &impl Bytes) -> Result<UdpDatagram, Reject> {
        if self.protocol != PROTOCOL_UDP {
            return Err(Reject::NotTcp);
        }
        if self.fragment {
            return Err(Reject::Fragment);
        }
        let [s0, s1, d0, d1, l0, l1, c0, c1] = frame.bytes(self.transport_offset).ok_or(Reject::Truncated)?;
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        if len < UDP_HEADER_LEN || len > self.transport_len {
            return Err(Reject::Malformed);
        }
        Ok(UdpDatagram {
            src: self.src(frame)?,
            dst: self.dst(frame)?,
            src_port: u16::from_be_bytes([s0, s1]),
            dst_port: u16::from_be_bytes([d0, d1]),
            checksum: u16::from_be_bytes([c0, c1]),
            ip_offset: self.ip_offset as u16,
            payload_offset: (self.transport_offset + UDP_HEADER_LEN) as u16,
            payload_len: (len - UDP_HEADER_LEN) as u32,
            is_v6: self.is_v6,
        })
    }
}

/// A UDP datagram's headers. Offsets are from the frame's beginning and lie within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpDatagram {
    /// Source address.
    pub src: Ip,
    /// Destination address.
    pub dst: Ip,
    /// Source port, host order.
    pub src_port: u16,
    /// Destination port, host order.
    pub dst_port: u16,
    /// The checksum as it is there; zero in IPv4: the sender made none (RFC 768).
    pub checksum: u16,
    /// The IP header.
    pub ip_offset: u16,
    /// What follows the UDP header.
    pub payload_offset: u16,
    /// Payload, bytes, as the UDP length field says; a frame that was cut holds fewer.
    pub payload_len: u32,
    /// IPv6.
    pub is_v6: bool,
}

/// A TCP segment's headers. Offsets are from the frame's beginning and lie within it; the options are the bytes from
/// `tcp_offset + 20` to `payload_offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSegment {
    /// Source address.
    pub src: Ip,
    /// Destination address.
    pub dst: Ip,
    /// Source port, host order.
    pub src_port: u16,
    /// Destination port, host order.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// TCP flags: [`flags`].
    pub flags: u8,
    /// The window, unscaled.
    pub window: u16,
    /// The IP header.
    pub ip_offset: u16,
    /// The TCP header.
    pub tcp_offset: u16,
    /// What follows the TCP header. The frame's length when there is no payload and no padding.
    pub payload_offset: u16,
    /// Payload, bytes, as the IP length field says: neither padding nor a frame that was cut changes it. A frame that
    /// was cut holds fewer bytes.
    pub payload_len: u32,
    /// IPv6.
    pub is_v6: bool,
    /// ECN "congestion experienced".
    pub ce: bool,
}

impl TcpSegment {
    /// An acknowledgment and nothing else: no data, and none of SYN, FIN and RST.
    #[inline(always)]
    pub fn is_pure_ack(&self) -> bool {
        self.payload_len == 0 && self.flags & (flags::SYN | flags::FIN | flags::RST) == 0
    }

    /// The segment that opens a connection: SYN without ACK.
    #[inline(always)]
    pub fn is_opening(&self) -> bool {
        self.flags & (flags::SYN | flags::ACK | flags::RST) == flags::SYN
    }
}

/// The UDP datagram in an Ethernet frame.
#[inline(always)]
pub fn parse_udp(frame: &impl Bytes) -> Result<UdpDatagram, Reject> {
    locate(frame)?.udp(frame)
}

/// The TCP segment in an Ethernet frame.
#[inline(always)]
pub fn parse_tcp(frame: &impl Bytes) -> Result<TcpSegment, Reject> {
    locate(frame)?.tcp(frame)
}

/// The same, in user space, of a frame that is most often of the usual form (Ethernet, IPv4 without options, TCP), whose fields are at
/// fixed places.
#[inline]
pub fn parse_tcp_frame(frame: &[u8]) -> Result<TcpSegment, Reject> {
    match parse_usual(frame) {
        Some(segment) => Ok(segment.into()),
        None => parse_tcp(&frame),
    }
}

/// In the usual form: the IP header and the TCP header.
const IP: usize = ETHERNET_LEN;
const TCP: usize = IP + 20;

/// A segment in the usual form; [`TcpSegment`] says what the fields are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsualSegment {
    /// Source address, its bytes as they are in memory.
    pub src: u32,
    /// Destination address, its bytes as they are in memory.
    pub dst: u32,
    /// Source port, host order.
    pub src_port: u16,
    /// Destination port, host order.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// TCP flags.
    pub flags: u8,
    /// The window, unscaled.
    pub window: u16,
    /// What follows the TCP header.
    pub payload_offset: u16,
    /// Payload, bytes.
    pub payload_len: u32,
    /// ECN "congestion experienced".
    pub ce: bool,
}

impl From<UsualSegment> for TcpSegment {
    #[inline]
    fn from(usual: UsualSegment) -> TcpSegment {
        TcpSegment {
            src: addr::from_v4(usual.src.to_ne_bytes()),
            dst: addr::from_v4(usual.dst.to_ne_bytes()),
            src_port: usual.src_port,
            dst_port: usual.dst_port,
            seq: usual.seq,
            ack: usual.ack,
            flags: usual.flags,
            window: usual.window,
            ip_offset: IP as u16,
            tcp_offset: TCP as u16,
            payload_offset: usual.payload_offset,
            payload_len: usual.payload_len,
            is_v6: false,
            ce: usual.ce,
        }
    }
}

/// What [`parse_tcp`] says of a frame that is, by its headers, TCP over IPv4 without tags, options of IP or fragmentation; None of any other,
/// and of what it refuses.
#[inline(always)]
pub fn parse_usual(frame: &[u8]) -> Option<UsualSegment> {
    let h: &[u8; TCP + 20] = frame.first_chunk()?;
    let half = |at: usize| u16::from_be_bytes([h[at], h[at + 1]]);
    let word = |at: usize| u32::from_ne_bytes([h[at], h[at + 1], h[at + 2], h[at + 3]]);
    let total_len = usize::from(half(IP + 2));
    let header_len = usize::from(h[TCP + 12] >> 4) * 4;
    // Any flags and offset but "don't fragment" are of a fragment.
    let usual = [h[12], h[13], h[IP], h[IP + 9]] == [8, 0, 0x45, PROTOCOL_TCP] && half(IP + 6) & 0x3fff == 0;
    let fits = header_len >= 20 && total_len >= 20 + header_len && frame.len() >= TCP + header_len;
    (usual && fits).then(|| UsualSegment {
        src: word(IP + 12),
        dst: word(IP + 16),
        src_port: half(TCP),
        dst_port: half(TCP + 2),
        seq: u32::from_be(word(TCP + 4)),
        ack: u32::from_be(word(TCP + 8)),
        flags: h[TCP + 13],
        window: half(TCP + 14),
        payload_offset: (TCP + header_len) as u16,
        payload_len: (total_len - 20 - header_len) as u32,
        ce: h[IP + 1] & 3 == 3,
    })
}

/// Finds the IP packet in an Ethernet frame and where its transport header is, without looking at that.
///
/// Fragments are found too and say so. [`Reject::NotTcp`] is never returned.
#[inline(always)]
pub fn locate(frame: &impl Bytes) -> Result<IpPacket, Reject> {
    let mut ip_offset = ETHERNET_LEN;
    let mut ethertype = u16_at(frame, 12)?;
    for _ in 0..MAX_VLAN_TAGS {
        if !ETHERTYPES_VLAN.contains(&ethertype) {
            break;
        }
        ethertype = u16_at(frame, ip_offset + 2)?;
        ip_offset += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => locate_v4(frame, ip_offset),
        ETHERTYPE_IPV6 => locate_v6(frame, ip_offset),
        _ => Err(Reject::NotIp),
    }
}

/// RFC 791 section 3.1.
#[inline(always)]
fn locate_v4(frame: &impl Bytes, ip_offset: usize) -> Result<IpPacket, Reject> {
    let header: [u8; 20] = frame.bytes(ip_offset).ok_or(Reject::Truncated)?;
    let [version_ihl, tos, l0, l1, _, _, f0, f1, _, protocol, ..] = header;
    let header_len = usize::from(version_ihl & 0xf) * 4;
    let total_len = packet_len(frame, ip_offset, u16::from_be_bytes([l0, l1]), 0);
    if version_ihl >> 4 != 4 || header_len < 20 || total_len < header_len {
        return Err(Reject::Malformed);
    }
    Ok(IpPacket {
        ip_offset,
        transport_offset: ip_offset + header_len,
        transport_len: total_len - header_len,
        protocol,
        // More fragments, or an offset.
        fragment: u16::from_be_bytes([f0, f1]) & 0x3fff != 0,
        is_v6: false,
        ce: tos & 3 == 3,
    })
}

/// RFC 8200 section 3 and 4.
#[inline(always)]
fn locate_v6(frame: &impl Bytes, ip_offset: usize) -> Result<IpPacket, Reject> {
    let [b0, b1, _, _, l0, l1, next, _] = frame.bytes(ip_offset).ok_or(Reject::Truncated)?;
    if b0 >> 4 != 6 {
        return Err(Reject::Malformed);
    }
    // The field counts from after the fixed header.
    let end = packet_len(frame, ip_offset, u16::from_be_bytes([l0, l1]), 40);

    let mut protocol = next;
    let mut header_len = 40;
    let mut fragment = false;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if fragment || !is_extension(protocol) {
            break;
        }
        let [next, length, f0, f1] = frame.bytes(ip_offset + header_len).ok_or(Reject::Truncated)?;
        let extension_len = match protocol {
            FRAGMENT => {
                // An "atomic" fragment (RFC 6946) is the whole packet: no offset, no more fragments.
                fragment = u16::from_be_bytes([f0, f1]) & 0xfff9 != 0;
                8
            }
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        if extension_len > 64 {
            return Err(Reject::ExtensionHeaders);
        }
        header_len += extension_len;
        protocol = next;
    }
    if !fragment && is_extension(protocol) {
        return Err(Reject::ExtensionHeaders);
    }
    if end < header_len {
        return Err(Reject::Malformed);
    }
    Ok(IpPacket {
        ip_offset,
        transport_offset: ip_offset + header_len,
        transport_len: end - header_len,
        protocol,
        fragment,
        is_v6: true,
        ce: (b1 >> 4) & 3 == 3,
    })
}

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
}

/// The length of the IP packet at `ip_offset`, whose length field says `said` and leaves out `left_out`.
///
/// Receive offload can make a packet too large for the field, which is zero then ("BIG TCP", Linux `iph_totlen()` and
/// RFC 2675). In a packet that the field could describe, zero means zero.
#[inline(always)]
fn packet_len(frame: &impl Bytes, ip_offset: usize, said: u16, left_out: usize) -> usize {
    let there = frame.frame_len().saturating_sub(ip_offset);
    if said == 0 && there > MAX_SAID_LEN { there } else { usize::from(said) + left_out }
}

#[inline(always)]
fn u16_at(frame: &impl Bytes, offset: usize) -> Result<u16, Reject> {
    frame.bytes(offset).map(u16::from_be_bytes).ok_or(Reject::Truncated)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use etherparse::{LinkSlice, NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice, VlanId};
    use std::{vec, vec::Vec};

    const SRC: [u8; 4] = [192, 0, 2, 1];
    const DST: [u8; 4] = [198, 51, 100, 7];
    const SRC6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    const DST6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    const PAYLOAD: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

    fn tcp_header() -> TcpHeader {
        let mut tcp = TcpHeader::new(40_000, 80, 0xdead_beef, 0x1234);
        tcp.acknowledgment_number = 0xfeed_f00d;
        (tcp.ack, tcp.psh) = (true, true);
        // No-op, no-op, timestamps.
        tcp.set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]).unwrap();
        tcp
    }

    fn v4() -> Vec<u8> {
        let mut out = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(SRC, DST, 64);
        builder.tcp_header(tcp_header()).write(&mut out, PAYLOAD).unwrap();
        out
    }

    fn v6() -> Vec<u8> {
        let mut out = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv6(SRC6, DST6, 64);
        builder.tcp_header(tcp_header()).write(&mut out, PAYLOAD).unwrap();
        out
    }

    fn vlan(tags: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let (outer, inner) = (VlanId::try_new(100).unwrap(), VlanId::try_new(200).unwrap());
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if tags == 1 { builder.single_vlan(outer) } else { builder.double_vlan(outer, inner) };
        builder.ipv4(SRC, DST, 64).tcp_header(tcp_header()).write(&mut out, PAYLOAD).unwrap();
        out
    }

    /// `v4()` with `options` in its IP header. The checksum is not repaired: nobody looks at it.
    fn v4_with_options(options: &[u8]) -> Vec<u8> {
        let mut frame = v4();
        frame.splice(34..34, options.iter().copied());
        frame[14] = 0x40 | (5 + options.len() / 4) as u8;
        let total_len = (frame.len() - 14) as u16;
        frame[16..18].copy_from_slice(&total_len.to_be_bytes());
        frame
    }

    /// `v6()` with extension headers: the kind of each and its bytes, whose first is overwritten by the next kind.
    fn v6_with_extensions(extensions: &[(u8, &[u8])]) -> Vec<u8> {
        let mut frame = v6();
        let mut next = PROTOCOL_TCP;
        for (kind, bytes) in extensions.iter().rev() {
            frame.splice(54..54, bytes.iter().copied());
            frame[54] = next;
            next = *kind;
        }
        frame[20] = next;
        let payload_len = (frame.len() - 54) as u16;
        frame[18..20].copy_from_slice(&payload_len.to_be_bytes());
        frame
    }

    fn parse(frame: &[u8]) -> Result<TcpSegment, Reject> {
        parse_tcp(&frame)
    }

    /// The same question to a parser that shares nothing with this one.
    fn judge(frame: &[u8]) -> Option<TcpSegment> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (Some(TransportSlice::Tcp(tcp)), Some(net)) = (&packet.transport, &packet.net) else {
            return None;
        };
        let (src, dst, ip_len, ecn) = match net {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let (src, dst) = (addr::from_v4(header.source()), addr::from_v4(header.destination()));
                (src, dst, usize::from(header.total_len()), header.ecn().value())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                let ecn = header.traffic_class() & 3;
                (header.source(), header.destination(), usize::from(header.payload_length()) + 40, ecn)
            }
            NetSlice::Arp(_) => return None,
        };
        let header = tcp.to_header();
        let at = |part: &[u8]| part.as_ptr() as usize - frame.as_ptr() as usize;
        let ip_offset = ETHERNET_LEN + 4 * packet.link_exts.len();
        assert!(matches!(packet.link, Some(LinkSlice::Ethernet2(_))));
        Some(TcpSegment {
            src,
            dst,
            src_port: header.source_port,
            dst_port: header.destination_port,
            seq: header.sequence_number,
            ack: header.acknowledgment_number,
            flags: tcp.slice()[13],
            window: header.window_size,
            ip_offset: ip_offset as u16,
            tcp_offset: at(tcp.slice()) as u16,
            payload_offset: at(tcp.payload()) as u16,
            payload_len: (ip_offset + ip_len - at(tcp.payload())) as u32,
            is_v6: matches!(net, NetSlice::Ipv6(_)),
            ce: ecn == 3,
        })
    }

    /// One frame of each kind that is accepted.
    fn accepted() -> Vec<Vec<u8>> {
        let hop_by_hop: (u8, &[u8]) = (HOP_BY_HOP, &[0, 0, 1, 4, 0, 0, 0, 0]);
        let routing: (u8, &[u8]) =
            (ROUTING, &[0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let authentication: (u8, &[u8]) =
            (AUTHENTICATION, &[0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]);
        let destination: (u8, &[u8]) =
            (DESTINATION_OPTIONS, &[0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let atomic_fragment: (u8, &[u8]) = (FRAGMENT, &[0, 0, 0, 0, 0, 0, 0, 7]);
        let mut ce = v4();
        ce[15] |= 3;
        let mut ce6 = v6();
        ce6[15] |= 0x30;
        let mut padded = v4();
        padded.extend([0; 9]);
        vec![
            v4(),
            v6(),
            vlan(1),
            vlan(2),
            v4_with_options(&[1; 4]),
            v4_with_options(&[
                0x94, 4, 0, 0, 7, 35, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ]),
            v6_with_extensions(&[hop_by_hop]),
            v6_with_extensions(&[hop_by_hop, destination, routing, authentication]),
            v6_with_extensions(&[atomic_fragment]),
            ce,
            ce6,
            padded,
        ]
    }

    #[test]
    fn the_fields_of_a_segment() {
        let expected = TcpSegment {
            src: addr::from_v4(SRC),
            dst: addr::from_v4(DST),
            src_port: 40_000,
            dst_port: 80,
            seq: 0xdead_beef,
            ack: 0xfeed_f00d,
            flags: flags::ACK | flags::PSH,
            window: 0x1234,
            ip_offset: 14,
            tcp_offset: 34,
            payload_offset: 66,
            payload_len: PAYLOAD.len() as u32,
            is_v6: false,
            ce: false,
        };
        assert_eq!(parse(&v4()), Ok(expected));
        let v6_expected =
            TcpSegment { src: SRC6, dst: DST6, tcp_offset: 54, payload_offset: 86, is_v6: true, ..expected };
        assert_eq!(parse(&v6()), Ok(v6_expected));
        for tags in [1, 2] {
            let moved = 4 * tags as u16;
            let tagged = TcpSegment {
                ip_offset: 14 + moved,
                tcp_offset: 34 + moved,
                payload_offset: 66 + moved,
                ..expected
            };
            assert_eq!(parse(&vlan(tags)), Ok(tagged));
        }
    }

    #[test]
    fn etherparse_reads_the_same() {
        for frame in accepted() {
            let ours = parse(&frame);
            assert_eq!(ours.ok(), judge(&frame), "{frame:02x?}");
            assert!(ours.is_ok(), "{ours:?} {frame:02x?}");
        }
    }

    #[test]
    fn b039_a_frame_cut_anywhere_is_truncated_or_complete() {
        for frame in accepted() {
            let whole = parse(&frame).unwrap();
            for len in 0..frame.len() {
                let expected =
                    if len < usize::from(whole.payload_offset) { Err(Reject::Truncated) } else { Ok(whole) };
                assert_eq!(parse(&frame[..len]), expected, "cut to {len}");
                assert_eq!(parse_tcp_frame(&frame[..len]), expected, "cut to {len}");
            }
        }
    }

    #[test]
    fn b039_flipped_bits_never_make_it_disagree_with_etherparse() {
        let mut random = 0x2545_f491_4f6c_dd1du64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize
        };
        let mut both = 0;
        for frame in accepted() {
            for _ in 0..4_000 {
                let mut frame = frame.clone();
                for _ in 0..1 + next() % 3 {
                    let bit = next() % (70 * 8);
                    frame[bit / 8] ^= 1 << (bit % 8);
                }
                let ours = parse(&frame);
                assert_eq!(parse_tcp_frame(&frame), ours, "{frame:02x?}");
                if let Ok(segment) = ours {
                    assert!(usize::from(segment.payload_offset) <= frame.len());
                    assert!(usize::from(segment.payload_offset) <= MAX_HEADERS_LEN);
                    // etherparse refuses more: a frame shorter than its IP length, for one.
                    if let Some(theirs) = judge(&frame) {
                        assert_eq!(segment, theirs, "{frame:02x?}");
                        both += 1;
                    }
                }
            }
        }
        assert!(both > 10_000, "only {both} frames were read by both");
    }

    #[test]
    fn b039_fragments() {
        for (high, low) in [(0x20, 0), (0x20, 0x10), (0, 0x10)] {
            let mut frame = v4();
            (frame[20], frame[21]) = (high, low);
            assert_eq!(parse(&frame), Err(Reject::Fragment));
            let packet = locate(&&frame[..]).unwrap();
            assert!(packet.fragment && packet.protocol == PROTOCOL_TCP);
            assert_eq!(packet.dst(&&frame[..]), Ok(addr::from_v4(DST)));
        }
        // Don't fragment is no fragment.
        let mut frame = v4();
        frame[20] = 0x40;
        assert!(parse(&frame).is_ok());
        // First, middle and last fragment in IPv6.
        for (high, low) in [(0, 1), (5, 1), (5, 0)] {
            let frame = v6_with_extensions(&[(FRAGMENT, &[0, 0, high, low, 0, 0, 0, 7])]);
            assert_eq!(parse(&frame), Err(Reject::Fragment));
        }
    }

    #[test]
    fn b039_lengths_that_lie() {
        let with = |at: usize, value: u8| {
            let mut frame = v4();
            frame[at] = value;
            parse(&frame)
        };
        assert_eq!(with(14, 0x44), Err(Reject::Malformed), "IHL of 4 words");
        assert_eq!(with(14, 0x65), Err(Reject::Malformed), "version 6 in an IPv4 frame");
        assert_eq!(with(17, 19), Err(Reject::Malformed), "total length below the IP header");
        assert_eq!(with(17, 51), Err(Reject::Malformed), "total length below the TCP header");
        assert_eq!(with(17, 0), Err(Reject::Malformed), "total length zero");
        assert_eq!(with(46, 0x40), Err(Reject::Malformed), "data offset of 4 words");
        assert_eq!(
            with(46, 0xf0).map(|s| s.payload_len),
            Err(Reject::Malformed),
            "options beyond the packet"
        );
        assert_eq!(with(17, 52).map(|s| s.payload_len), Ok(0), "padding is no payload");
        assert_eq!(
            with(16, 0x40).map(|s| s.payload_len),
            Ok(0x4000 + PAYLOAD.len() as u32),
            "a frame that was cut"
        );
        let mut frame = v6();
        (frame[18], frame[19]) = (0, 31);
        assert_eq!(parse(&frame), Err(Reject::Malformed), "IPv6 payload length below the TCP header");
    }

    #[test]
    fn b038_a_packet_too_large_for_its_length_field() {
        for mut frame in [v4(), v6()] {
            let payload = frame.len() - PAYLOAD.len();
            let at = if frame[12] == 8 { 16 } else { 18 };
            (frame[at], frame[at + 1]) = (0, 0);
            frame.resize(payload + 100_000, 0);
            assert_eq!(parse(&frame).map(|s| s.payload_len), Ok(100_000));
        }
    }

    #[test]
    fn the_fields_of_a_datagram_and_lengths_that_lie() {
        let build = |v6: bool, payload: &[u8]| {
            let mut out = Vec::new();
            let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let builder =
                if v6 { ethernet.ipv6(SRC6, DST6, 64) } else { ethernet.ipv4(SRC, DST, 64) }.udp(4000, 53);
            builder.write(&mut out, payload).unwrap();
            out
        };
        for (v6, udp) in [(false, 34), (true, 54)] {
            let frame = build(v6, b"query");
            let (src, dst) = if v6 { (SRC6, DST6) } else { (addr::from_v4(SRC), addr::from_v4(DST)) };
            let expected = UdpDatagram {
                src,
                dst,
                src_port: 4000,
                dst_port: 53,
                checksum: u16::from_be_bytes([frame[udp + 6], frame[udp + 7]]),
                ip_offset: 14,
                payload_offset: udp as u16 + 8,
                payload_len: 5,
                is_v6: v6,
            };
            assert_eq!(parse_udp(&&frame[..]), Ok(expected));
            assert_eq!(parse_tcp(&&frame[..]), Err(Reject::NotTcp));
            for cut in 0..frame.len() {
                let whole = cut >= udp + 8;
                let found = parse_udp(&&frame[..cut]);
                assert_eq!(found, if whole { Ok(expected) } else { Err(Reject::Truncated) }, "cut to {cut}");
            }
            for (len, wanted) in
                [(7, Err(Reject::Malformed)), (14, Err(Reject::Malformed)), (8, Ok(0)), (12, Ok(4))]
            {
                let mut frame = frame.clone();
                frame[udp + 5] = len;
                assert_eq!(parse_udp(&&frame[..]).map(|datagram| datagram.payload_len), wanted, "{len}");
            }
        }
        assert_eq!(parse_udp(&&v4()[..]), Err(Reject::NotTcp));
        let mut fragment = build(false, b"query");
        fragment[20] = 0x20;
        assert_eq!(parse_udp(&&fragment[..]), Err(Reject::Fragment));
    }

    #[test]
    fn what_is_no_tcp_is_named() {
        let mut frame = v4();
        frame[23] = 17;
        assert_eq!(parse(&frame), Err(Reject::NotTcp));
        (frame[12], frame[13]) = (8, 6);
        assert_eq!(parse(&frame), Err(Reject::NotIp));
        let mut three_tags = vlan(2);
        three_tags.splice(12..12, [0x88, 0xa8, 0, 1]);
        assert_eq!(parse(&three_tags), Err(Reject::NotIp));
        let small: (u8, &[u8]) = (DESTINATION_OPTIONS, &[0, 0, 1, 4, 0, 0, 0, 0]);
        assert_eq!(parse(&v6_with_extensions(&[small; 5])), Err(Reject::ExtensionHeaders));
        let mut long = [0; 72];
        long[1] = 8;
        assert_eq!(
            parse(&v6_with_extensions(&[(DESTINATION_OPTIONS, &long)])),
            Err(Reject::ExtensionHeaders)
        );
    }

    #[test]
    fn kinds_of_segments() {
        let with = |flags: u8, total_len: u8| {
            let mut frame = v4();
            (frame[47], frame[17]) = (flags, total_len);
            parse(&frame).unwrap()
        };
        assert!(with(flags::ACK, 52).is_pure_ack());
        assert!(!with(flags::ACK, 53).is_pure_ack());
        assert!(!with(flags::ACK | flags::FIN, 52).is_pure_ack());
        assert!(with(flags::SYN | flags::ECE | flags::CWR, 52).is_opening());
        assert!(!with(flags::SYN | flags::ACK, 52).is_opening());
    }
}
