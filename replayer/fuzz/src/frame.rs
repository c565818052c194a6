//! The header parser of frames, against one that is not ours.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use replayer_common::addr::from_v4;
use replayer_common::packet::{MAX_HEADERS_LEN, Reject, TcpSegment, parse_tcp, parse_udp};

/// Parses `data` as an Ethernet frame.
///
/// # Panics
/// Where an offset lies outside the frame or the two parsers disagree.
pub fn run(data: &[u8]) {
    run_udp(data);
    let ours = parse_tcp(&data);
    if let Ok(segment) = ours {
        let (tcp, payload) = (usize::from(segment.tcp_offset), usize::from(segment.payload_offset));
        assert!(usize::from(segment.ip_offset) + 20 <= tcp && tcp + 20 <= payload && payload <= data.len());
        assert!(payload <= MAX_HEADERS_LEN);
        // Nothing behind the headers is looked at, but for the length.
        assert_eq!(parse_tcp(&&data[..payload]).map(|s| s.payload_offset), Ok(segment.payload_offset));
        for cut in [0, 13, tcp, payload - 1] {
            assert_eq!(parse_tcp(&&data[..cut]), Err(Reject::Truncated), "cut to {cut}");
        }
    }
    // etherparse refuses more: a frame shorter than its IP length, for one.
    if let (Ok(ours), Some(theirs)) = (ours, judge(data)) {
        let seen = Seen {
            source: (ours.src, ours.src_port),
            destination: (ours.dst, ours.dst_port),
            numbers: (ours.seq, ours.ack),
            flags: ours.flags,
            window: ours.window,
            payload: (usize::from(ours.payload_offset), payload_len(&ours, data)),
        };
        assert_eq!(seen, theirs);
    }
}

/// The same for UDP.
fn run_udp(data: &[u8]) {
    let Ok(ours) = parse_udp(&data) else { return };
    let begin = usize::from(ours.payload_offset);
    assert!(usize::from(ours.ip_offset) + 28 <= begin && begin <= data.len() && begin <= MAX_HEADERS_LEN);
    for cut in [0, 13, begin - 1] {
        assert_eq!(parse_udp(&&data[..cut]), Err(Reject::Truncated), "cut to {cut}");
    }
    let Ok(packet) = SlicedPacket::from_ethernet(data) else { return };
    let (Some((source, destination)), Some(TransportSlice::Udp(theirs))) =
        (addresses(&packet), packet.transport)
    else {
        return;
    };
    assert_eq!((ours.src, ours.dst), (source, destination));
    assert_eq!((ours.src_port, ours.dst_port), (theirs.source_port(), theirs.destination_port()));
    assert_eq!(ours.checksum, theirs.checksum());
    assert_eq!(ours.payload_len as usize + 8, usize::from(theirs.length()));
}

fn addresses(packet: &SlicedPacket<'_>) -> Option<([u8; 16], [u8; 16])> {
    match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => Some((from_v4(ip.header().source()), from_v4(ip.header().destination()))),
        NetSlice::Ipv6(ip) => Some((ip.header().source(), ip.header().destination())),
        NetSlice::Arp(_) => None,
    }
}

/// What both parsers say of a segment.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    source: ([u8; 16], u16),
    destination: ([u8; 16], u16),
    numbers: (u32, u32),
    flags: u8,
    window: u16,
    payload: (usize, usize),
}

/// A frame that was cut holds less than its length field says.
fn payload_len(segment: &TcpSegment, data: &[u8]) -> usize {
    (segment.payload_len as usize).min(data.len() - usize::from(segment.payload_offset))
}

fn judge(data: &[u8]) -> Option<Seen> {
    let packet = SlicedPacket::from_ethernet(data).ok()?;
    let (source, destination) = addresses(&packet)?;
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return None };
    Some(Seen {
        source: (source, tcp.source_port()),
        destination: (destination, tcp.destination_port()),
        numbers: (tcp.sequence_number(), tcp.acknowledgment_number()),
        flags: tcp.slice()[13],
        window: tcp.window_size(),
        payload: (tcp.payload().as_ptr() as usize - data.as_ptr() as usize, tcp.payload().len()),
    })
}
