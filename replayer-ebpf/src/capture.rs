//! XDP on the mirror's far end: every frame goes to the AF_XDP socket of the queue that it arrived on.
//!
//! The mirror's near end chose the queue by the connection's shard. Nobody else sends into the mirror, and whatever is in
//! it is a copy: dropping loses nothing but captured traffic, and is counted.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_REDIRECT};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use replayer_common::counters::CaptureVerdict;

use crate::maps::{CAPTURE_COUNTERS, XSKS, count};

/// "frags": without it the kernel refuses the program on a device whose MTU exceeds one page.
#[xdp(frags)]
fn capture(context: XdpContext) -> u32 {
    let action = XSKS.redirect(context.rx_queue_index(), XDP_DROP.into()).unwrap_or(XDP_DROP);
    let verdict = if action == XDP_REDIRECT { CaptureVerdict::Redirected } else { CaptureVerdict::NoSocket };
    count(&CAPTURE_COUNTERS, verdict.index());
    log_verdict!(&context, "capture", verdict);
    action
}
