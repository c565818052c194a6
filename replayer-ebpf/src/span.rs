//! XDP on the NIC of a mirror port, which serves nobody: hands what is to be replayed to the AF_XDP socket of its queue.
//!
//! The NIC runs in promiscuous mode for the sake of capture. What came in only because of that ends here; what the NIC
//! would have accepted without it (its own address, broadcast, multicast) goes on to the kernel unless it is taken.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT};
use aya_ebpf::helpers::bpf_xdp_get_buff_len;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use replayer_common::counters::SpanVerdict;
use replayer_common::packet::Bytes;

use crate::frame::Frame;
use crate::maps::{CONFIG, SPAN_COUNTERS, XSKS, count};
use crate::select::select;

/// "frags": without it the kernel refuses the program on a device whose MTU exceeds one page.
#[xdp(frags)]
fn span(context: XdpContext) -> u32 {
    // SAFETY: a helper that reads the context that the kernel passed.
    let len = unsafe { bpf_xdp_get_buff_len(context.ctx) };
    let frame = Frame::of_xdp(&context, len as usize);
    // A wildcard service means whatever the mirror port shows.
    let (action, verdict) = match select(&frame, || true) {
        Ok(_) => match XSKS.redirect(context.rx_queue_index(), XDP_DROP.into()) {
            Ok(_) => (XDP_REDIRECT, SpanVerdict::Redirected),
            Err(_) => (XDP_DROP, SpanVerdict::NoSocket),
        },
        Err(reason) => {
            (if is_for_others(&frame) { XDP_DROP } else { XDP_PASS }, SpanVerdict::refused(reason))
        }
    };
    count(&SPAN_COUNTERS, verdict.index());
    log_verdict!(&context, "span", verdict);
    action
}

/// Whether the frame is for one other host.
#[inline(always)]
fn is_for_others(frame: &Frame) -> bool {
    let (Some(destination), Some(config)) = (frame.bytes::<6>(0), CONFIG.get(0)) else { return false };
    destination[0] & 1 == 0 && destination != config.mac
}
