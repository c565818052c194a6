//! The rings that a socket shares with the kernel. Two end at the kernel (fill, TX) and two at us (RX, completion).
//!
//! Layout and order of accesses are the kernel's: include/uapi/linux/if_xdp.h, net/xdp/xsk_queue.h, Documentation/networking/af_xdp.rst.
//! Whoever writes a ring stores its `producer` after the slots (release), whoever reads it stores `consumer` after it has read them; each looks at
//! the other's (acquire) only when what it saw last is used up, since that line is in the other's cache.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::memory::mapped;
use super::sockets::{mmap_offsets, set_option};

/// One of the four rings of a socket.
#[derive(Clone, Copy, Debug)]
pub(super) enum Which {
    Fill,
    Completion,
    Rx,
    Tx,
}

impl Which {
    /// Makes the ring, of `size` slots, a power of two.
    pub(super) fn make(self, socket: BorrowedFd<'_>, size: u32) -> io::Result<()> {
        let option = match self {
            Which::Fill => libc::XDP_UMEM_FILL_RING,
            Which::Completion => libc::XDP_UMEM_COMPLETION_RING,
            Which::Rx => libc::XDP_RX_RING,
            Which::Tx => libc::XDP_TX_RING,
        };
        set_option(socket, libc::SOL_XDP, option, &size)
    }

    /// Where it is to be mapped from, and how its fields lie there.
    fn place(self, offsets: &libc::xdp_mmap_offsets) -> (u64, &libc::xdp_ring_offset) {
        match self {
            Which::Fill => (libc::XDP_UMEM_PGOFF_FILL_RING, &offsets.fr),
            Which::Completion => (libc::XDP_UMEM_PGOFF_COMPLETION_RING, &offsets.cr),
            Which::Rx => (libc::XDP_PGOFF_RX_RING as u64, &offsets.rx),
            Which::Tx => (libc::XDP_PGOFF_TX_RING as u64, &offsets.tx),
        }
    }
}

/// A ring in memory. `T` is what its slots hold: an address (`u64`) in the fill and the completion ring, a descriptor in the others.
#[derive(Debug)]
struct Ring<T> {
    map: NonNull<u8>,
    len: usize,
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    slots: NonNull<T>,
    mask: u32,
}

// SAFETY: the mapping is the process's and belongs to nobody else in it.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// Maps a ring that [`Which::make`] has made, of `size` slots, a power of two.
    fn map(socket: BorrowedFd<'_>, which: Which, size: u32) -> io::Result<Ring<T>> {
        let offsets = mmap_offsets(socket)?;
        let (place, offset) = which.place(&offsets);
        let len = offset.desc as usize + size as usize * size_of::<T>();
        // SAFETY: a new mapping at an address that the kernel chooses touches nobody's memory.
        let map = unsafe {
            libc::mmap(
                null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                socket.as_raw_fd(),
                place as libc::off_t,
            )
        };
        let map = mapped(map)?;
        // SAFETY: the kernel says where within the mapping they lie, and aligns them.
        unsafe {
            Ok(Ring {
                map,
                len,
                producer: map.add(offset.producer as usize).cast(),
                consumer: map.add(offset.consumer as usize).cast(),
                flags: map.add(offset.flags as usize).cast(),
                slots: map.add(offset.desc as usize).cast(),
                mask: size - 1,
            })
        }
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points into the mapping, which lives as long as `self`; both sides access it atomically.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    /// Whose number is `at`.
    #[inline]
    fn slot(&self, at: u32) -> *mut T {
        // SAFETY: the mask keeps it within the slots.
        unsafe { self.slots.add((at & self.mask) as usize).as_ptr() }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this ring's, and no pointer into it leaves it.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.len) };
    }
}

/// The writing end of a fill or TX ring.
#[derive(Debug)]
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// The number of the next slot to be written.
    next: u32,
    /// Up to this number there is room, by what the kernel had read when last looked at.
    end: u32,
}

impl<T: Copy> Producer<T> {
    pub(super) fn map(socket: BorrowedFd<'_>, which: Which, size: u32) -> io::Result<Producer<T>> {
        Ok(Producer { ring: Ring::map(socket, which, size)?, next: 0, end: size })
    }

    /// For how many there is room; looks again only when what it knows of is less than `wanted`.
    #[inline]
    pub(super) fn room(&mut self, wanted: u32) -> u32 {
        if self.end.wrapping_sub(self.next) < wanted {
            self.end = self.ring.consumer().load(Ordering::Acquire).wrapping_add(self.ring.mask + 1);
        }
        self.end.wrapping_sub(self.next)
    }

    /// Writes the next slot; false when there is no room. The kernel sees it after [`Producer::publish`].
    #[inline]
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.room(1) == 0 {
            return false;
        }
        // SAFETY: a slot that the kernel has read, or never had.
        unsafe { self.ring.slot(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Shows the kernel what was written.
    #[inline]
    pub(super) fn publish(&mut self) {
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// How many the kernel has not taken.
    #[inline]
    pub(super) fn waiting(&self) -> u32 {
        self.next.wrapping_sub(self.ring.consumer().load(Ordering::Acquire))
    }

    /// Whether the kernel has to be called to look (`XDP_RING_NEED_WAKEUP`).
    #[inline]
    pub(super) fn needs_wakeup(&self) -> bool {
        // A driver says so and then looks once more; what was published must be there before this is read, or both would wait.
        fence(Ordering::SeqCst);
        // SAFETY: points into the mapping, which lives as long as `self`; both sides access it atomically.
        unsafe { self.ring.flags.as_ref() }.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// The reading end of an RX or completion ring.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// The number of the next slot to be read.
    next: u32,
    /// Up to this number there is something, by what the kernel had written when last looked at.
    end: u32,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn map(socket: BorrowedFd<'_>, which: Which, size: u32) -> io::Result<Consumer<T>> {
        Ok(Consumer { ring: Ring::map(socket, which, size)?, next: 0, end: 0 })
    }

    /// Hands what is there to `take`, at most `most`; how many.
    #[inline]
    pub(super) fn take(&mut self, most: u32, mut take: impl FnMut(T)) -> u32 {
        if self.next == self.end {
            self.end = self.ring.producer().load(Ordering::Acquire);
        }
        let count = self.end.wrapping_sub(self.next).min(most);
        for _ in 0..count {
            // SAFETY: the kernel has written this slot, and leaves it alone until `consumer` is behind it.
            take(unsafe { self.ring.slot(self.next).read() });
            self.next = self.next.wrapping_add(1);
        }
        if count > 0 {
            self.ring.consumer().store(self.next, Ordering::Release);
        }
        count
    }
}
