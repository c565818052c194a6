//! The memory area that a port's sockets and the kernel share, the UMEM, cut into frames of one size.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::slice;

use super::sockets::set_option;
use super::{Frame, HEADROOM};

/// Pages of it may be huge ones where the allocator asks for them.
const ALIGNMENT: usize = 2 << 20;

/// A UMEM.
#[derive(Debug)]
pub(super) struct Memory {
    base: NonNull<u8>,
    layout: Layout,
    frames: u32,
    /// The logarithm of a frame's size: to divide by it would be half of the work on a frame that comes back.
    frame_bits: u32,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Memory {}

impl Memory {
    /// So many frames of so many bytes, a power of two.
    pub(super) fn new(frames: u32, frame_size: u32) -> io::Result<Memory> {
        let layout = Layout::from_size_align(frames as usize * frame_size as usize, ALIGNMENT)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: callers ask for at least one frame, so that its size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Memory { base, layout, frames, frame_bits: frame_size.ilog2() })
    }

    /// Makes it the UMEM of a socket. The kernel keeps its pages in place from now on, and counts them as locked.
    pub(super) fn register(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let registration = libc::xdp_umem_reg {
            addr: self.base.as_ptr() as u64,
            len: self.layout.size() as u64,
            chunk_size: 1 << self.frame_bits,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        set_option(socket, libc::SOL_XDP, libc::XDP_UMEM_REG, &registration)
    }

    /// Bytes of the whole.
    pub(super) fn bytes(&self) -> u64 {
        self.layout.size() as u64
    }

    /// Where a frame's packet begins, as the kernel counts: from the start of the area.
    #[inline]
    pub(super) fn address(&self, index: u32) -> u64 {
        (u64::from(index) << self.frame_bits) + u64::from(HEADROOM)
    }

    /// The frame in which an address lies, and whether a packet of ours would begin there.
    ///
    /// # Panics
    /// When the address is outside of the area: the kernel only gives back what it was given.
    #[inline]
    pub(super) fn index(&self, address: u64) -> (u32, bool) {
        let index = (address >> self.frame_bits) as u32;
        assert!(index < self.frames, "address {address} is in no frame");
        (index, address == self.address(index))
    }

    /// Bytes of a frame's data area.
    #[inline]
    pub(super) fn area(&self) -> usize {
        (1 << self.frame_bits) - HEADROOM as usize
    }

    #[inline]
    fn start(&self, frame: &Frame) -> *mut u8 {
        assert!(frame.index < self.frames);
        // SAFETY: within the area, as was just looked at.
        unsafe { self.base.as_ptr().add(self.address(frame.index) as usize) }
    }

    /// A frame's data area.
    #[inline]
    pub(super) fn data(&self, frame: &Frame) -> &[u8] {
        // SAFETY: initialised memory of that length. The token proves that neither ring nor kernel has the frame, and whoever wants to write
        // needs `&mut self`.
        unsafe { slice::from_raw_parts(self.start(frame), self.area()) }
    }

    /// A frame's data area, to write to.
    #[inline]
    pub(super) fn data_mut(&mut self, frame: &mut Frame) -> &mut [u8] {
        // SAFETY: as above; `&mut self` makes it the only reference.
        unsafe { slice::from_raw_parts_mut(self.start(frame), self.area()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout. Sockets that are still open have the pages, not the addresses.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}
