//! tcx ingress on the production interface: clones into the mirror what is to be replayed.
//!
//! It never changes, delays or drops a packet: whatever happens here, the packet goes on to the next program or to the
//! stack. Of a packet for nobody it reads the headers up to the ports and one word of a map.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::bpf_clone_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use replayer_common::addr::ANY;
use replayer_common::counters::MirrorVerdict;
use replayer_common::hash::{FLOW_SEED, flow_hash};
use replayer_common::maps::{CaptureConfig, HANDSHAKE_SLOTS, ServiceKey};
use replayer_common::packet::{self, IpPacket, MAX_HEADERS_LEN, PROTOCOL_TCP, Reject, TcpSegment};

use crate::frame::Frame;
use crate::maps::{CONFIG, HANDSHAKES, MIRROR_COUNTERS, count, is_service, is_service_port};

/// `PACKET_HOST` of `linux/if_packet.h`: the frame was addressed to this host.
const PACKET_HOST: u32 = 0;

/// "Next program": `TCX_NEXT`, and `TC_ACT_UNSPEC` where the program is attached as a clsact filter.
const NEXT: i32 = TC_ACT_UNSPEC;

#[classifier]
fn mirror(context: TcContext) -> i32 {
    let verdict = match decide(&context) {
        Ok(clone) => clone.send(&context),
        Err(verdict) => verdict,
    };
    count(&MIRROR_COUNTERS, verdict.index());
    log_verdict!(&context, "mirror", verdict);
    NEXT
}

/// A clone to be made.
struct Clone {
    ifindex: u32,
    queue: u32,
}

impl Clone {
    /// Sends a clone of the packet to its queue of the mirror.
    #[inline(always)]
    fn send(&self, context: &TcContext) -> MirrorVerdict {
        let skb = context.skb.skb;
        // SAFETY: the context that the kernel passed; it translates these accesses to fields of its socket buffer.
        // The device's queue is picked by the RX queue that a buffer recorded, plus one (`skb_tx_hash()`), and the
        // original gets back what it had.
        let result = unsafe {
            let recorded = (*skb).queue_mapping;
            (*skb).queue_mapping = self.queue + 1;
            let result = bpf_clone_redirect(skb, self.ifindex, 0);
            (*skb).queue_mapping = recorded;
            result
        };
        match result {
            0 => MirrorVerdict::Mirrored,
            // NET_XMIT_DROP and its like: the device refused it.
            1.. => MirrorVerdict::MirrorFull,
            _ => MirrorVerdict::CloneFailed,
        }
    }
}

/// What to do with the packet; `Err` is the reason to leave it alone.
#[inline(always)]
fn decide(context: &TcContext) -> Result<Clone, MirrorVerdict> {
    let decision = classify(context, &Frame::of_skb(context));
    if !matches!(decision, Err(MirrorVerdict::Truncated)) || !Frame::of_skb(context).is_partial() {
        return decision;
    }
    // Some drivers leave headers outside of the linear part, where a program can't read. Pulling them there is what the
    // stack would do next; most packets never come here.
    if context.pull_data(context.len().min(MAX_HEADERS_LEN as u32)).is_err() {
        return decision;
    }
    classify(context, &Frame::of_skb(context))
}

#[inline(always)]
fn classify(context: &TcContext, frame: &Frame) -> Result<Clone, MirrorVerdict> {
    let packet = packet::locate(frame).map_err(refusal)?;
    if packet.protocol != PROTOCOL_TCP {
        return Err(MirrorVerdict::Unrelated);
    }
    if packet.fragment {
        return Err(classify_fragment(context, frame, &packet));
    }
    let (_, port) = packet.ports(frame).map_err(refusal)?;
    if !is_service_port(port) {
        return Err(MirrorVerdict::Unrelated);
    }
    let segment = packet.tcp(frame).map_err(refusal)?;
    find_service(context, ServiceKey::new(segment.dst, segment.dst_port))?;
    let config = CONFIG.get(0).ok_or(MirrorVerdict::Off)?;
    if config.mirror_ifindex == 0 {
        return Err(MirrorVerdict::Off);
    }
    choose(config, &segment)
}

/// Of the segments to a service: which are mirrored, and to which queue.
#[inline(always)]
fn choose(config: &CaptureConfig, segment: &TcpSegment) -> Result<Clone, MirrorVerdict> {
    let hash = flow_hash(FLOW_SEED, &segment.src, segment.src_port);
    if u64::from(hash) >= config.sample_threshold {
        return Err(MirrorVerdict::NotSampled);
    }
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
                return Err(MirrorVerdict::PureAck);
            }
        }
    }
    // `max`: a configuration without shards has one queue.
    Ok(Clone { ifindex: config.mirror_ifindex, queue: hash % config.shards.max(1) })
}

/// Fragments are not replayed. Only the first has ports, so the address alone says whether one concerns a service.
#[inline(always)]
fn classify_fragment(context: &TcContext, frame: &Frame, packet: &IpPacket) -> MirrorVerdict {
    let Ok(dst) = packet.dst(frame) else { return MirrorVerdict::Truncated };
    match find_service(context, ServiceKey::address_only(dst)) {
        Ok(()) => MirrorVerdict::Fragment,
        Err(verdict) => verdict,
    }
}

/// Looks for the exact address, then for the wildcard, which means addresses of this host.
#[inline(always)]
fn find_service(context: &TcContext, key: ServiceKey) -> Result<(), MirrorVerdict> {
    if is_service(&key) {
        return Ok(());
    }
    if !is_service(&ServiceKey { addr: ANY, ..key }) {
        return Err(MirrorVerdict::Unrelated);
    }
    // SAFETY: the context that the kernel passed; a read of one of its fields.
    if unsafe { (*context.skb.skb).pkt_type } != PACKET_HOST {
        return Err(MirrorVerdict::NotForHost);
    }
    Ok(())
}

#[inline(always)]
fn refusal(reject: Reject) -> MirrorVerdict {
    match reject {
        Reject::NotIp | Reject::NotTcp => MirrorVerdict::Unrelated,
        Reject::Truncated => MirrorVerdict::Truncated,
        Reject::Fragment => MirrorVerdict::Fragment,
        Reject::Malformed => MirrorVerdict::Malformed,
        Reject::ExtensionHeaders => MirrorVerdict::ExtensionHeaders,
    }
}
