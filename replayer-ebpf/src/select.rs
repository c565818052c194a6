//! Which packets are to be replayed: the same for every way to capture.
//!
//! A pure function of the packet and the maps. Of a packet for nobody it reads the headers up to the ports and one word
//! of a map.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::programs::TcContext;
use replayer_common::addr::{ANY, Ip};
use replayer_common::counters::Refusal;
use replayer_common::hash::{FLOW_SEED, flow_hash};
use replayer_common::maps::{CaptureConfig, HANDSHAKE_SLOTS, ServiceKey};
use replayer_common::packet::{
    self, IpPacket, MAX_HEADERS_LEN, PROTOCOL_TCP, PROTOCOL_UDP, Reject, TcpSegment,
};

use crate::frame::Frame;
use crate::maps::{CONFIG, HANDSHAKES, is_chosen, is_service, is_service_port};

/// `PACKET_HOST` of `linux/if_packet.h`: the frame was addressed to this host.
const PACKET_HOST: u32 = 0;

/// "Next program": `TCX_NEXT`, which is the number of `TC_ACT_UNSPEC` too.
pub const NEXT: i32 = TC_ACT_UNSPEC;

/// A packet to be captured.
pub struct Selected {
    /// Its connection's shard: a queue of the mirror, or a ring.
    pub shard: u32,
    /// The mirror's near end, if there is one.
    pub mirror_ifindex: u32,
}

/// Whether the packet is to be captured; `Err` is the reason to leave it alone.
#[inline(always)]
pub fn select_skb(context: &TcContext) -> Result<Selected, Refusal> {
    // SAFETY: the context that the kernel passed; a read of one of its fields.
    let is_for_host = || unsafe { (*context.skb.skb).pkt_type } == PACKET_HOST;
    let decision = select(&Frame::of_skb(context), is_for_host);
    if !matches!(decision, Err(Refusal::Truncated)) || !Frame::of_skb(context).is_partial() {
        return decision;
    }
    // Some drivers leave headers outside of the linear part, where a program can't read. Pulling them there is what the
    // stack would do next; most packets never come here.
    if context.pull_data(context.len().min(MAX_HEADERS_LEN as u32)).is_err() {
        return decision;
    }
    select(&Frame::of_skb(context), is_for_host)
}

/// The same of any frame. `is_for_host`: whether a wildcard service may be meant.
#[inline(always)]
pub fn select(frame: &Frame, is_for_host: impl Fn() -> bool) -> Result<Selected, Refusal> {
    let packet = packet::locate(frame).map_err(refusal)?;
    if packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP {
        return Err(Refusal::Unrelated);
    }
    if packet.fragment {
        return Err(select_fragment(frame, &packet, is_for_host));
    }
    let (_, port) = packet.ports(frame).map_err(refusal)?;
    if !is_service_port(port) {
        return Err(Refusal::Unrelated);
    }
    if packet.protocol == PROTOCOL_UDP {
        let datagram = packet.udp(frame).map_err(refusal)?;
        find_service(ServiceKey::new(PROTOCOL_UDP, datagram.dst, datagram.dst_port), is_for_host)?;
        let config = CONFIG.get(0).ok_or(Refusal::NotSampled)?;
        return Ok(selected(config, wanted(config, &datagram.src, datagram.src_port)?));
    }
    let segment = packet.tcp(frame).map_err(refusal)?;
    find_service(ServiceKey::new(PROTOCOL_TCP, segment.dst, segment.dst_port), is_for_host)?;
    let config = CONFIG.get(0).ok_or(Refusal::NotSampled)?;
    choose(config, &segment)
}

/// The client's hash, if it was chosen and is in the sample.
#[inline(always)]
fn wanted(config: &CaptureConfig, addr: &Ip, port: u16) -> Result<u32, Refusal> {
    if config.choose_clients != 0 && !is_chosen(addr) {
        return Err(Refusal::ClientNotChosen);
    }
    let hash = flow_hash(FLOW_SEED, addr, port);
    if u64::from(hash) < config.sample_threshold { Ok(hash) } else { Err(Refusal::NotSampled) }
}

/// A packet of the client with this hash.
#[inline(always)]
fn selected(config: &CaptureConfig, hash: u32) -> Selected {
    // `max`: a configuration without shards has one.
    Selected { shard: hash % config.shards.max(1), mirror_ifindex: config.mirror_ifindex }
}

/// Of the segments to a service: which are captured, and by which worker.
#[inline(always)]
fn choose(config: &CaptureConfig, segment: &TcpSegment) -> Result<Selected, Refusal> {
    let hash = wanted(config, &segment.src, segment.src_port)?;
    // The replay makes its own acknowledgments. It needs the client's only until the client has sent data: they say where
    // the server's stream begins, and how much of a greeting the client has read. Such an ACK has the sequence number
    // after the SYN's, which is remembered here.
    if let Some(first_byte) = HANDSHAKES.get_ptr_mut(hash % HANDSHAKE_SLOTS) {
        // SAFETY: the kernel's pointer to an aligned u32 that lives as long as the map. Another CPU may write it at the
        // same time; either value is one that a SYN left, and the worst a wrong one does is said at HANDSHAKE_SLOTS.
        unsafe {
            if segment.is_opening() {
                first_byte.write_volatile(segment.seq.wrapping_add(1));
            } else if segment.is_pure_ack() && first_byte.read_volatile() != segment.seq {
                return Err(Refusal::PureAck);
            }
        }
    }
    Ok(selected(config, hash))
}

/// Fragments are not replayed. Only the first has ports, so the address alone says whether one concerns a service.
#[inline(always)]
fn select_fragment(frame: &Frame, packet: &IpPacket, is_for_host: impl Fn() -> bool) -> Refusal {
    let Ok(dst) = packet.dst(frame) else { return Refusal::Truncated };
    match find_service(ServiceKey::address_only(packet.protocol, dst), is_for_host) {
        Ok(()) => Refusal::Fragment,
        Err(reason) => reason,
    }
}

/// Looks for the exact address, then for the wildcard.
#[inline(always)]
fn find_service(key: ServiceKey, is_for_host: impl Fn() -> bool) -> Result<(), Refusal> {
    if is_service(&key) {
        return Ok(());
    }
    if !is_service(&ServiceKey { addr: ANY, ..key }) {
        return Err(Refusal::Unrelated);
    }
    if is_for_host() { Ok(()) } else { Err(Refusal::NotForHost) }
}

#[inline(always)]
fn refusal(reject: Reject) -> Refusal {
    match reject {
        Reject::NotIp | Reject::NotTcp => Refusal::Unrelated,
        Reject::Truncated => Refusal::Truncated,
        Reject::Fragment => Refusal::Fragment,
        Reject::Malformed => Refusal::Malformed,
        Reject::ExtensionHeaders => Refusal::ExtensionHeaders,
    }
}
