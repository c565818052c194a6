//! tcx ingress on the production interface: clones into the mirror what is to be replayed.
//!
//! It never changes, delays or drops a packet: whatever happens here, the packet goes on to the next program or to the
//! stack.

use aya_ebpf::helpers::bpf_clone_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use replayer_common::counters::MirrorVerdict;

use crate::maps::{MIRROR_COUNTERS, count};
use crate::select::{NEXT, Selected, select_skb};

#[classifier]
fn mirror(context: TcContext) -> i32 {
    let verdict = match select_skb(&context) {
        Ok(selected) => clone(&context, &selected),
        Err(reason) => MirrorVerdict::refused(reason),
    };
    count(&MIRROR_COUNTERS, verdict.index());
    log_verdict!(&context, "mirror", verdict);
    NEXT
}

/// Sends a clone of the packet to its queue of the mirror.
#[inline(always)]
fn clone(context: &TcContext, selected: &Selected) -> MirrorVerdict {
    if selected.mirror_ifindex == 0 {
        return MirrorVerdict::Off;
    }
    let skb = context.skb.skb;
    // SAFETY: the context that the kernel passed; it translates these accesses to fields of its socket buffer.
    // The device's queue is picked by the RX queue that a buffer recorded, plus one (`skb_tx_hash()`), and the
    // original gets back what it had.
    let result = unsafe {
        let recorded = (*skb).queue_mapping;
        (*skb).queue_mapping = selected.shard + 1;
        let result = bpf_clone_redirect(skb, selected.mirror_ifindex, 0);
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
