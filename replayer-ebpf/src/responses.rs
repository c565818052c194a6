//! XDP on the assistant: a black hole for the segments and datagrams that a target sends to the replayed clients.
//!
//! They are cut to their headers and handed to an AF_XDP socket; how much payload there was remains in the IP length
//! field. A target's segment never goes on to the kernel, unless it is for this host itself. Everything else (ARP, ICMP,
//! fragments, other services) does, unchanged.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT};
use aya_ebpf::helpers::{bpf_xdp_adjust_tail, bpf_xdp_get_buff_len};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use replayer_common::addr::Ip;
use replayer_common::counters::ResponsesVerdict;
use replayer_common::maps::ServiceKey;
use replayer_common::packet::{self, PROTOCOL_TCP, PROTOCOL_UDP, Reject};

use crate::frame::Frame;
use crate::maps::{LOCAL_ADDRESSES, RESPONSES_COUNTERS, XSKS, count, is_service, is_service_port};

/// "frags": jumbo frames span buffers, and cutting one to its headers leaves a single buffer.
#[xdp(frags)]
fn responses(context: XdpContext) -> u32 {
    // SAFETY: a helper that reads the context that the kernel passed.
    let len = unsafe { bpf_xdp_get_buff_len(context.ctx) };
    let (action, verdict) = match classify(&Frame::of_xdp(&context, len as usize)) {
        Ok(headers_len) => take(&context, len as i32, headers_len.into()),
        Err(verdict) => (XDP_PASS, verdict),
    };
    count(&RESPONSES_COUNTERS, verdict.index());
    log_verdict!(&context, "responses", verdict);
    action
}

/// Cuts the frame to its headers, if that can be done, and hands it to the socket of its queue.
#[inline(always)]
fn take(context: &XdpContext, len: i32, headers_len: i32) -> (u32, ResponsesVerdict) {
    // SAFETY: a helper on the context that the kernel passed; no pointer into the packet is used after it.
    let cut = len == headers_len || unsafe { bpf_xdp_adjust_tail(context.ctx, headers_len - len) } == 0;
    match XSKS.redirect(context.rx_queue_index(), XDP_DROP.into()) {
        Ok(_) if cut => (XDP_REDIRECT, ResponsesVerdict::Cut),
        Ok(_) => (XDP_REDIRECT, ResponsesVerdict::Whole),
        Err(_) => (XDP_DROP, ResponsesVerdict::NoSocket),
    }
}

/// The length of the headers of a segment to be taken; `Err` is the reason to leave the frame to the kernel.
#[inline(always)]
fn classify(frame: &Frame) -> Result<u16, ResponsesVerdict> {
    let packet = packet::locate(frame).map_err(refusal)?;
    if packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP {
        return Err(ResponsesVerdict::Unrelated);
    }
    if packet.fragment {
        let key = ServiceKey::address_only(packet.protocol, packet.src(frame).map_err(refusal)?);
        return Err(if is_service(&key) { ResponsesVerdict::Fragment } else { ResponsesVerdict::Unrelated });
    }
    let (port, _) = packet.ports(frame).map_err(refusal)?;
    if !is_service_port(port) {
        return Err(ResponsesVerdict::Unrelated);
    }
    let (src, dst, headers_len) = if packet.protocol == PROTOCOL_UDP {
        let datagram = packet.udp(frame).map_err(refusal)?;
        (datagram.src, datagram.dst, datagram.payload_offset)
    } else {
        let segment = packet.tcp(frame).map_err(refusal)?;
        (segment.src, segment.dst, segment.payload_offset)
    };
    if !is_service(&ServiceKey::new(packet.protocol, src, port)) {
        return Err(ResponsesVerdict::Unrelated);
    }
    if is_local(&dst) {
        return Err(ResponsesVerdict::ToThisHost);
    }
    Ok(headers_len)
}

#[inline(always)]
fn is_local(addr: &Ip) -> bool {
    LOCAL_ADDRESSES.get_ptr(addr).is_some()
}

#[inline(always)]
fn refusal(reject: Reject) -> ResponsesVerdict {
    match reject {
        Reject::NotIp | Reject::NotTcp => ResponsesVerdict::Unrelated,
        Reject::Truncated => ResponsesVerdict::Truncated,
        Reject::Fragment => ResponsesVerdict::Fragment,
        Reject::Malformed => ResponsesVerdict::Malformed,
        Reject::ExtensionHeaders => ResponsesVerdict::ExtensionHeaders,
    }
}
