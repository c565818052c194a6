//! The allocator of programs with an engine: the system's, except that very large pieces ask for huge pages.
//!
//! A packet of one of a million sessions reads a handful of places in hundreds of megabytes. With pages of 4 KiB each place costs a walk
//! through page tables that are not in the cache either. The engine reserves its tables once and fills most of them from the front, so
//! huge pages take at most one page a table that is not needed.
//!
//! `madvise` only asks: where the kernel has transparent huge pages off (`/sys/kernel/mm/transparent_hugepage/enabled` says `never`), all is
//! as with the system's allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;

/// Above this size: what an engine has with its default limits, also when several workers share them, but free lists.
const LARGE: usize = 4 << 20;

/// Up to this size hash tables are there as a whole at once: the first sessions touch them all over, each in another page. They are what is
/// asked for zeroed with a power of two as its size. The rest, the sessions, connections, timers and held data, is filled from the front, and
/// takes memory as it is. Of it the first page is there at once: to get one takes up to 8 ms where a hypervisor has to find the memory, and
/// a worker's very first request would wait for one after the other.
const AT_ONCE: usize = 16 << 20;

/// A huge page of x86-64 and of arm64 with pages of 4 KiB.
const HUGE_PAGE: usize = 2 << 20;

/// See the module.
#[derive(Debug)]
pub struct HugePages;

fn is_large(layout: &Layout) -> bool {
    layout.size() > LARGE && layout.align() <= HUGE_PAGE
}

/// Whether a zeroed piece is a hash table.
fn is_table(size: usize) -> bool {
    size.is_power_of_two() && size <= AT_ONCE
}

/// Zeroed memory of whole huge pages, or null; `at_once`: all of it is there.
fn map(size: usize, at_once: bool) -> *mut u8 {
    let Some(len) = size.checked_next_multiple_of(HUGE_PAGE) else { return null_mut() };
    let Some(with_slack) = len.checked_add(HUGE_PAGE) else { return null_mut() };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new anonymous mapping at an address that the kernel chooses touches nobody's memory.
    let start = unsafe {
        libc::mmap(null_mut(), with_slack, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if start == libc::MAP_FAILED {
        return null_mut();
    }
    let start = start.cast::<u8>();
    let before = start.align_offset(HUGE_PAGE);
    // SAFETY: all three ranges lie within the mapping just made: `before` is less than a huge page, of which there is one more than `len`.
    // The first and the last are given back, and nobody knows of them.
    unsafe {
        let place = start.add(before);
        if before > 0 {
            libc::munmap(start.cast(), before);
        }
        if before < HUGE_PAGE {
            libc::munmap(place.add(len).cast(), HUGE_PAGE - before);
        }
        libc::madvise(place.cast(), len, libc::MADV_HUGEPAGE);
        // Where the kernel does not know how (before 5.14), pages come when they are touched.
        let populated = if at_once { len } else { HUGE_PAGE };
        libc::madvise(place.cast(), populated, libc::MADV_POPULATE_WRITE);
        place
    }
}

/// Makes the huge pages ready in which these addresses lie, those that are not there yet; where the kernel does not know how (before 5.14) they
/// come when they are touched. What is in them stays. Takes up to 8 ms for each.
pub fn populate(addresses: std::ops::Range<usize>) {
    let start = addresses.start / HUGE_PAGE * HUGE_PAGE;
    let len = addresses.end.saturating_sub(start);
    // SAFETY: whatever lies at these addresses, no byte of it changes: pages are made present and writable where they may be written, and the call
    // fails where nothing is mapped.
    unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_POPULATE_WRITE) };
}

/// The end of the huge page in which an address lies.
pub fn page_end(address: usize) -> usize {
    (address / HUGE_PAGE + 1) * HUGE_PAGE
}

// SAFETY: pieces that are not large go to the system's allocator and back to it, by the same test of the same layout. Large ones are mappings
// of their own, aligned to a huge page, at least `size` long, zeroed by the kernel, and unmapped once.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(&layout) {
            return map(layout.size(), false);
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(&layout) {
            return map(layout.size(), is_table(layout.size()));
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if is_large(&layout) {
            // SAFETY: `map` made a mapping of this length for this layout, and the caller uses it no more.
            unsafe { libc::munmap(pointer.cast(), layout.size().next_multiple_of(HUGE_PAGE)) };
            return;
        }
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `new_size` with this alignment is a layout.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if !is_large(&layout) && !is_large(&new_layout) {
            // SAFETY: as above.
            return unsafe { System.realloc(pointer, layout, new_size) };
        }
        // SAFETY: the new piece is as long as `new_layout` says and is not the old one, which is given back only after the copy.
        unsafe {
            let new = self.alloc(new_layout);
            if !new.is_null() {
                new.copy_from_nonoverlapping(pointer, layout.size().min(new_size));
                self.dealloc(pointer, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    #[global_allocator]
    static ALLOCATOR: HugePages = HugePages;

    /// Held by each test that looks at mappings: what one gives back another may get.
    static ADDRESSES: Mutex<()> = Mutex::new(());

    /// What the kernel says of the mapping at `address` under `name`.
    fn said(address: usize, name: &str) -> Option<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut here = false;
        for line in maps.lines() {
            if let Some((start, end)) = line.split_whitespace().next().and_then(|range| range.split_once('-'))
                && let (Ok(start), Ok(end)) =
                    (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                here = (start..end).contains(&address);
            } else if here && let Some(value) = line.strip_prefix(name) {
                return Some(value.to_owned());
            }
        }
        None
    }

    /// Whether the mapping at `address` may have huge pages: `hg` in its flags.
    fn asks_for_huge_pages(address: usize) -> bool {
        said(address, "VmFlags:").is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hg"))
    }

    /// How much of the mapping at `address` is there.
    fn resident_kib(address: usize) -> usize {
        said(address, "Rss:").unwrap().split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn large_pieces_ask_for_huge_pages_and_small_ones_do_not() {
        let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let large = vec![0u8; LARGE + 5];
        assert!(large.iter().all(|&byte| byte == 0));
        assert_eq!(large.as_ptr().align_offset(HUGE_PAGE), 0);
        assert!(asks_for_huge_pages(large.as_ptr() as usize));
        let small = vec![0u8; LARGE - 5];
        assert!(!asks_for_huge_pages(small.as_ptr() as usize));
    }

    #[test]
    fn what_is_touched_all_over_is_there_at_once_and_of_what_is_filled_slowly_the_first_page() {
        let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let table = vec![0u64; AT_ONCE / 8];
        assert_eq!(resident_kib(table.as_ptr() as usize), AT_ONCE / 1024);
        let slab: Vec<u64> = Vec::with_capacity(AT_ONCE / 8);
        assert_eq!(resident_kib(slab.as_ptr() as usize), HUGE_PAGE / 1024);
        for size in [AT_ONCE - 8, 2 * AT_ONCE] {
            let by_place = vec![0u64; size / 8];
            assert_eq!(resident_kib(by_place.as_ptr() as usize), HUGE_PAGE / 1024, "{size}");
        }
    }

    #[test]
    fn pages_are_made_ready_and_what_is_in_them_stays() {
        let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slab: Vec<u8> = Vec::with_capacity(AT_ONCE);
        slab.extend([7; 100]);
        let start = slab.as_ptr() as usize;
        populate(start + HUGE_PAGE + 5..start + 2 * HUGE_PAGE);
        assert_eq!(resident_kib(start), 2 * HUGE_PAGE / 1024);
        populate(start..page_end(start));
        assert_eq!((resident_kib(start), &slab[..]), (2 * HUGE_PAGE / 1024, &[7; 100][..]));
        // Where there is nothing, nothing happens.
        populate(0..HUGE_PAGE);
    }

    #[test]
    fn pieces_keep_their_bytes_when_they_grow_and_shrink_across_the_limit() {
        let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes: Vec<u8> = Vec::new();
        let byte = |i: usize| (i * 31 % 251) as u8;
        for len in [1 << 20, LARGE - 1, LARGE + 1, 2 * LARGE + 7, AT_ONCE + 3, 3 << 20, 10] {
            bytes.truncate(len);
            bytes.shrink_to_fit();
            bytes.reserve_exact(len - bytes.len());
            bytes.extend((bytes.len()..len).map(byte));
            assert!(bytes.iter().enumerate().all(|(i, &b)| b == byte(i)), "{len}");
        }
    }

    #[test]
    fn what_is_given_back_is_unmapped() {
        let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = vec![1u8; 2 * LARGE];
        let address = piece.as_ptr() as usize;
        assert!(asks_for_huge_pages(address));
        drop(piece);
        assert!(!asks_for_huge_pages(address));
    }
}
