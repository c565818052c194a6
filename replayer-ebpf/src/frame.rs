//! Checked reads of a packet in the kernel. Nothing else in this crate dereferences packet data.

use core::marker::PhantomData;

use aya_ebpf::programs::{TcContext, XdpContext};
use replayer_common::packet::{Bytes, MAX_HEADERS_LEN};

/// The part of a packet that a program may read, from the Ethernet header on.
///
/// It borrows the context: a helper that may move the packet (`bpf_skb_pull_data`, `bpf_clone_redirect`,
/// `bpf_xdp_adjust_tail`) ends the validity of these pointers, and the verifier sees to it.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    start: usize,
    end: usize,
    len: usize,
    context: PhantomData<&'a ()>,
}

impl<'a> Frame<'a> {
    /// The linear part of a socket buffer.
    #[inline(always)]
    pub fn of_skb(context: &'a TcContext) -> Frame<'a> {
        let len = context.len() as usize;
        Frame { start: context.data(), end: context.data_end(), len, context: PhantomData }
    }

    /// The first buffer of an XDP frame, `len` bytes in all its buffers.
    #[inline(always)]
    pub fn of_xdp(context: &'a XdpContext, len: usize) -> Frame<'a> {
        Frame { start: context.data(), end: context.data_end(), len, context: PhantomData }
    }

    /// Whether some of the packet is out of reach.
    #[inline(always)]
    pub fn is_partial(&self) -> bool {
        self.end - self.start < self.len
    }
}

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // A constant bound, without which the verifier lets no variable be added to a packet pointer.
        if offset > MAX_HEADERS_LEN {
            return None;
        }
        let at = self.start + offset;
        if at + N > self.end {
            return None;
        }
        // SAFETY: `at .. at + N` lies within `start .. end`, the bounds that the kernel gave for this packet; an array of
        // bytes has no alignment and no invalid value. The verifier checks it again.
        Some(unsafe { *(at as *const [u8; N]) })
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        self.len
    }
}
