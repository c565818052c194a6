//! tcx ingress on the production interface: copies what is to be replayed into the ring buffer of its worker.
//!
//! It never changes, delays or drops a packet: when the ring is full, the copy is what is lost, and it is counted.
//!
//! The verifier wants a record's size as a constant, so a packet gets the smallest of some sizes that holds it; the record's
//! header says how much of it is the packet. A packet that receive offload put together is copied as it is, 64 KiB at most,
//! and cut to segments again by the reader.

use aya_ebpf::bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use replayer_common::counters::RingVerdict;
use replayer_common::maps::{RING_HEADER_LEN, RING_MAX_PACKET, RingHeader};

use crate::maps::{RING_COUNTERS, RINGS, Ring, SLEEPING, count};
use crate::select::{NEXT, select_skb};

#[classifier]
fn ring(context: TcContext) -> i32 {
    let verdict = match select_skb(&context) {
        Ok(selected) => copy(&context, selected.shard),
        Err(reason) => RingVerdict::refused(reason),
    };
    count(&RING_COUNTERS, verdict.index());
    log_verdict!(&context, "ring", verdict);
    NEXT
}

/// Copies the packet into its worker's ring.
#[inline(always)]
fn copy(context: &TcContext, shard: u32) -> RingVerdict {
    let Some(ring) = RINGS.get(shard) else { return RingVerdict::NoRing };
    // Sizes of records: small requests, full segments with and without an inner VLAN tag, jumbo frames, offloaded ones.
    match context.len() as usize {
        0..=112 => copy_into::<112>(context, ring, shard),
        113..=240 => copy_into::<240>(context, ring, shard),
        241..=496 => copy_into::<496>(context, ring, shard),
        497..=1008 => copy_into::<1008>(context, ring, shard),
        1009..=1528 => copy_into::<1528>(context, ring, shard),
        1529..=4088 => copy_into::<4088>(context, ring, shard),
        4089..=9208 => copy_into::<9208>(context, ring, shard),
        9209..=16_376 => copy_into::<16_376>(context, ring, shard),
        16_377..=32_760 => copy_into::<32_760>(context, ring, shard),
        32_761..=RING_MAX_PACKET => copy_into::<RING_MAX_PACKET>(context, ring, shard),
        _ => RingVerdict::TooLarge,
    }
}

/// Copies a packet of at most `SIZE` bytes.
#[inline(always)]
fn copy_into<const SIZE: usize>(context: &TcContext, ring: &Ring, shard: u32) -> RingVerdict {
    let Some(mut record) = ring.reserve_bytes(RING_HEADER_LEN + SIZE, 0) else {
        return RingVerdict::RingFull;
    };
    let skb = context.skb.skb;
    let bytes = record.as_mut_ptr();
    // SAFETY: the record has `RING_HEADER_LEN + SIZE` bytes and is aligned to eight; the context is the one that the kernel
    // passed, and the helper writes `len` bytes, at most `SIZE`, or fails. The verifier checks all of it again.
    let failed = unsafe {
        let len = (*skb).len;
        let header = RingHeader { len, segment_len: (*skb).gso_size, captured_ns: bpf_ktime_get_ns() };
        bytes.cast::<RingHeader>().write(header);
        // Again, where the verifier sees that this very value is bounded.
        len == 0
            || len as usize > SIZE
            || bpf_skb_load_bytes(skb.cast(), 0, bytes.add(RING_HEADER_LEN).cast(), len) != 0
    };
    if failed {
        record.discard(u64::from(BPF_RB_NO_WAKEUP));
        return RingVerdict::CopyFailed;
    }
    record.submit(u64::from(BPF_RB_NO_WAKEUP));
    wake_sleeping(ring, shard);
    RingVerdict::Copied
}

/// Wakes the ring's reader if it sleeps: that costs more than all the rest.
///
/// To submit a record is a full barrier (kernel/bpf/ringbuf.c, `bpf_ringbuf_commit`). So either this sees that the reader has said
/// that it is about to sleep, or the reader, whose poll(2) looks into the ring after that, sees the record.
#[inline(always)]
fn wake_sleeping(ring: &Ring, shard: u32) {
    let Some(sleeping) = SLEEPING.get_ptr_mut(shard) else { return };
    // SAFETY: the kernel's pointer to an aligned u64 that lives as long as the map. Two CPUs at once wake the reader twice.
    if unsafe { sleeping.read_volatile() } == 0 {
        return;
    }
    // Only a record can wake: an empty one, which the reader never sees.
    let Some(nothing) = ring.reserve_bytes(1, 0) else { return };
    // SAFETY: as above.
    unsafe { sleeping.write_volatile(0) };
    nothing.discard(u64::from(BPF_RB_FORCE_WAKEUP));
}
