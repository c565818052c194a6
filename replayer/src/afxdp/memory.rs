//! The memory area that a port's sockets and the kernel share, the UMEM, cut into frames of one size.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::slice;

use super::sockets::set_option;
use super::{Frame, HEADROOM};

/// A UMEM: a mapping of its own, since a driver may write to its pages for a moment after the sockets were closed. Then they are nobody's, and
/// not the next one's to whom an allocator gives them.
#[derive(Debug)]
pub(super) struct Memory {
    base: NonNull<u8>,
    len: usize,
    frames: u32,
    /// The logarithm of a frame's size: to divide by it would be half of the work on a frame that comes back.
    frame_bits: u32,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Memory {}

impl Memory {
    /// So many frames of so many bytes, a power of two.
    pub(super) fn new(frames: u32, frame_size: u32) -> io::Result<Memory> {
        let len = frames as usize * frame_size as usize;
        // SAFETY: a new mapping at an address that the kernel chooses touches nobody's memory.
        let base = unsafe {
            libc::mmap(
                null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let base = mapped(base)?;
        // Only asks. The kernel pins small pages as well as huge ones.
        // SAFETY: the mapping just made.
        unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Memory { base, len, frames, frame_bits: frame_size.ilog2() })
    }

    /// Makes it the UMEM of a socket. The kernel keeps its pages in place from now on, and counts them as locked.
    pub(super) fn register(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let registration = libc::xdp_umem_reg {
            addr: self.base.as_ptr() as u64,
            len: self.len as u64,
            chunk_size: 1 << self.frame_bits,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        set_option(socket, libc::SOL_XDP, libc::XDP_UMEM_REG, &registration)
    }

    /// Bytes of the whole.
    pub(super) fn bytes(&self) -> u64 {
        self.len as u64
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
        // SAFETY: the mapping is this value's, and no reference into it outlives it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// What mmap(2) returned.
pub(super) fn mapped(address: *mut libc::c_void) -> io::Result<NonNull<u8>> {
    match NonNull::new(address.cast::<u8>()) {
        Some(address) if address.as_ptr().cast() != libc::MAP_FAILED => Ok(address),
        _ => Err(io::Error::last_os_error()),
    }
}
