//! The AF_XDP port: packets in and out of the kernel by way of one memory area, the UMEM.
//!
//! A port has an RX side, a TX side, or both. Both sides use the same frames although they belong to two
//! devices, and often to two network namespaces: a packet that came in on the mirror is rewritten and goes
//! out on the output device without being copied in user space. Only this module knows xsk-rs, and
//! it is one of the few with `unsafe` in it.
//!
//! - this file: frames and rings, the hot path
//! - [`sockets`]: the memory area and the sockets, and why there may be none
//! - [`statistics`]: what is counted
//!
//! # Who owns a frame when
//!
//! The UMEM is cut into frames of one size. A frame is in exactly one of four places:
//!
//! ```text
//!                 allocate()                        transmit()
//!         ┌─────────────────────────► HAND ───────────────────────────┐
//!         │                          ▲  │ (a Frame token)             ▼
//!         │                          │  │                         TRANSMIT
//!       FREE ◄───────────────────────┼──┘                   batch of 64, TX ring,
//!       │  ▲        release()        │                    kernel, completion ring
//!       │  │                         │ receive()                      │
//!       │  │                         │                                │
//!       │  └─────────────────────────┼────────────────────────────────┘
//!       ▼                            │            reclaim(): completions
//!     FILL ──────────────────────────┘
//!     fill ring, kernel, RX ring
//!       ▲ reclaim(): refill, as long as a reserve stays free for allocate()
//! ```
//!
//! In FILL and TRANSMIT the memory is the kernel's. In HAND it belongs to whoever holds the [`Frame`], a
//! token that can be moved but not copied; the engine gives each back before its call returns. A
//! token that is dropped is a frame that is lost, which [`Port::frames`] shows. Builds with debug assertions
//! record the place of each frame, check every move and add the places up.
//!
//! Received packets and packets to be transmitted begin at the same offset in a frame ([`HEADROOM`]), so that
//! a frame can be turned around whatever it was used for before.
//!
//! # What may not happen here
//!
//! After [`Port::open`] nothing is allocated. Nothing blocks: waiting is the caller's business, by poll(2) on
//! [`Port::rx_fd`] and [`Port::tx_fd`].
//!
//! # Copy mode and zero-copy
//!
//! One of the two is always asked for by name. With neither the kernel takes zero-copy wherever the driver
//! has it, and with some drivers (igb) such a socket cannot transmit unless an XDP program is attached too.
//!
//! In copy mode the kernel transmits from within the `sendto` of [`Port::flush`], at most 32 descriptors a
//! call; the socket option `XDP_MAX_TX_SKB_BUDGET` (Linux 6.17) raises that to the size of the ring
//! (net/xdp/xsk.c, `__xsk_generic_xmit`). The output device needs no XDP program for it.
//!
//! For zero-copy some drivers (ice, i40e) want the fill ring to be filled before bind(2), which xsk-rs 0.11
//! cannot do: it hands the fill ring out with the bound socket. Zero-copy is therefore off unless it is asked
//! for.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use xsk_rs::config::{BindFlags, XDP_UMEM_MIN_CHUNK_SIZE};
use xsk_rs::socket::Fd;
use xsk_rs::{CompQueue, FillQueue, FrameDesc, RxQueue, TxQueue, Umem};

mod sockets;
mod statistics;

pub(crate) use sockets::raise_memlock;
pub use sockets::{Endpoint, PortConfig, PortError};
pub use statistics::{PortCounters, SocketStatistics, Statistics};

use sockets::{bind, create_umem, raise_tx_limits, set_busy_poll};

/// Packets handed over by one call of [`Port::receive`], and descriptors written to a ring at a time. Large
/// enough to make the cost of a ring's shared cache lines vanish, small enough for a batch's headers to stay
/// in the first-level cache.
pub const BATCH: usize = 64;

/// Where a packet begins in its frame, in bytes: the room that the kernel keeps for XDP programs
/// (`XDP_PACKET_HEADROOM`).
pub const HEADROOM: u32 = 256;

/// Slots of the TX ring and of its completion ring. A worker that produces a millisecond's worth of small
/// packets at 2 Mpps between two flushes does not find it full.
const TX_RING: u32 = 2048;

/// After so many packets the kernel is asked to take them, without waiting for [`Port::flush`]: their frames come back while they are still in
/// the caches. With copies of a whole turn's packets in the ring, each would be written to memory that was used a thousand packets ago. Fewer
/// would be more system calls: those cost as much as a packet (Zen 4, copy mode, veth).
pub const KICK: u32 = 128;

/// The largest fill and RX ring: a quarter of a second of 1500-byte packets at 1.5 Gbit/s, for a worker that has to wait for
/// its core that long on a busy host.
const RX_RING_MAX: u32 = 32_768;

/// Of the frames, one in so many is kept out of the fill ring, for packets that the engine makes itself: however much
/// is captured, acknowledgments and retransmissions find a frame.
const RESERVE: u32 = 16;

/// Frames that the device may refuse in one [`Port::flush`] before it gives up: each costs a system call.
const DROPS_PER_FLUSH: u32 = BATCH as u32;

/// A frame in the caller's hand.
///
/// Belongs to the port it came from; the others refuse it (by a panic, since that is a programming error). To
/// be given back by [`Port::release`] or [`Port::transmit`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a frame that is dropped is lost to its port"]
pub struct Frame {
    index: u32,
    port: NonZeroU32,
}

/// A received packet.
#[derive(Debug)]
pub struct Received {
    /// The frame that holds it.
    pub frame: Frame,
    /// Its length from the Ethernet header on, in bytes.
    pub len: u32,
}

/// What [`Port::flush`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Nothing: the kernel has taken every packet.
    Done,
    /// Packets that the kernel or the device has no room for now. Call again soon, or after poll(2) for
    /// output.
    Pending,
    /// Packets that wait for the device to be up again.
    LinkDown,
    /// The device does not exist any more. This port will not transmit again; open another.
    Gone,
}

/// Frames by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frames {
    /// Ready for [`Port::allocate`].
    pub free: u32,
    /// On their way to be received: fill ring, kernel, RX ring.
    pub fill: u32,
    /// In the caller's hand.
    pub hand: u32,
    /// On their way out: TX ring, kernel, completion ring.
    pub transmit: u32,
}

/// A UMEM and its sockets. For one thread at a time.
#[derive(Debug)]
pub struct Port {
    id: NonZeroU32,
    // Fields drop in this order: sockets before the UMEM that they use.
    rx: Option<RxSide>,
    tx: Option<TxSide>,
    umem: Umem,
    /// By frame index: where its data area begins and, as the length, how long it is.
    areas: Vec<FrameDesc>,
    frame_size: u32,
    /// Its logarithm: to divide by it would be half of the work on a frame that comes back.
    frame_bits: u32,
    /// Indices of free frames, the one used last on top, since its memory is likely to be in a cache.
    free: Vec<u32>,
    frames: Frames,
    counters: PortCounters,
    scratch: [FrameDesc; BATCH],
    mode: String,
    #[cfg(debug_assertions)]
    places: Vec<Place>,
}

#[derive(Debug)]
struct RxSide {
    queue: RxQueue,
    fill: FillQueue,
    queue_id: u32,
    polls_busily: bool,
    // xsk-rs and libxdp make all four rings for a socket; these two stay empty.
    _tx: TxQueue,
    _completion: CompQueue,
}

#[derive(Debug)]
struct TxSide {
    queue: TxQueue,
    completion: CompQueue,
    queue_id: u32,
    ring: u32,
    /// Packets that are not in the TX ring yet. At most [`BATCH`].
    batch: Vec<FrameDesc>,
    /// Packets since the kernel was last asked to take them.
    unasked: u32,
    _rx: RxQueue,
    _fill: FillQueue,
}

#[cfg_attr(not(debug_assertions), allow(dead_code, reason = "only debug assertions follow each frame"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Fill,
    Hand,
    Transmit,
}

/// One line for the log: what was got.
impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.mode)
    }
}

impl Port {
    /// Makes the UMEM and its sockets. What the RX side's XDP program redirects arrives as soon as
    /// [`Port::rx_fd`] is in its `XSKMAP` under [`Port::rx_queue`].
    ///
    /// # Errors
    /// See [`PortError`]. Needs `CAP_NET_RAW`, and `CAP_SYS_ADMIN` for an endpoint in another namespace.
    pub fn open(config: &PortConfig) -> Result<Port, PortError> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(1);

        let (Some(first), second) = (match (&config.rx, &config.tx) {
            (Some(rx), tx) => (Some(rx), tx.as_ref()),
            (None, tx) => (tx.as_ref(), None),
        }) else {
            return Err(PortError::Config("neither a receiving nor a transmitting side"));
        };
        if !matches!(config.frame_size, XDP_UMEM_MIN_CHUNK_SIZE | 4096) {
            return Err(PortError::Config("the frame size must be 2048 or 4096"));
        }
        if config.frames < 4 * BATCH as u32 {
            return Err(PortError::Config("fewer than 256 frames"));
        }
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let id = NonZeroU32::new(id).ok_or(PortError::Config("more than 2^32 ports"))?;

        raise_memlock();
        // A power of two that leaves at least half of the frames for the engine.
        let rx_ring = (1 << (config.frames / 2).ilog2()).min(RX_RING_MAX);
        let tx_ring = TX_RING.min(1 << config.frames.ilog2());
        let bind_flags = BindFlags::XDP_USE_NEED_WAKEUP
            | if config.zero_copy { BindFlags::XDP_ZEROCOPY } else { BindFlags::XDP_COPY };

        // The UMEM's descriptor is that of its first socket, so it has to be made in that one's namespace.
        let ((umem, areas, huge), first_socket) = first.run(|| {
            let memory = create_umem(config.frames, config.frame_size, rx_ring, tx_ring)?;
            let rings = if config.rx.is_some() { (rx_ring, BATCH as u32) } else { (BATCH as u32, tx_ring) };
            let socket = bind(&memory.0, first, rings, bind_flags)?;
            Ok::<_, PortError>((memory, socket))
        })??;
        let second_socket = match second {
            Some(tx) => Some(tx.run(|| bind(&umem, tx, (BATCH as u32, tx_ring), bind_flags))??),
            None => None,
        };
        let (rx, tx) = match (&config.rx, second_socket) {
            (None, _) => (None, Some(first_socket)),
            (Some(_), second) => (Some(first_socket), second),
        };

        let mut mode = Vec::new();
        let rx = rx.map(|s| {
            mode.push(format!("RX {}", s.describe()));
            RxSide {
                queue: s.rx,
                fill: s.fill,
                queue_id: s.queue,
                polls_busily: false,
                _tx: s.tx,
                _completion: s.completion,
            }
        });
        let tx = tx.map(|s| {
            let budget = raise_tx_limits(s.tx.fd(), tx_ring, config.frame_size);
            mode.push(format!("TX {}, {budget} packets a system call", s.describe()));
            TxSide {
                queue: s.tx,
                completion: s.completion,
                queue_id: s.queue,
                ring: tx_ring,
                batch: Vec::with_capacity(BATCH),
                unasked: 0,
                _rx: s.rx,
                _fill: s.fill,
            }
        });
        mode.push(format!(
            "{} frames of {} bytes{}",
            config.frames,
            config.frame_size,
            if huge { " in huge pages" } else { "" }
        ));

        let mut port = Port {
            id,
            rx,
            tx,
            scratch: [areas[0]; BATCH],
            frame_size: config.frame_size,
            frame_bits: config.frame_size.ilog2(),
            free: (0..config.frames).rev().collect(),
            frames: Frames { free: config.frames, ..Frames::default() },
            counters: PortCounters::default(),
            mode: mode.join("; "),
            #[cfg(debug_assertions)]
            places: vec![Place::Free; config.frames as usize],
            umem,
            areas,
        };
        port.refill();
        Ok(port)
    }

    /// Lets [`Port::receive`] run the driver's polling of the receiving queue itself when it finds nothing (`SO_PREFER_BUSY_POLL`,
    /// Documentation/networking/napi.rst), instead of waiting for the interrupt to do so: for a caller that looks again and again.
    /// `usecs` is the longest that one look may take. Without a receiving side it does nothing.
    ///
    /// # Errors
    /// Those of setsockopt(2): the kernel has no busy polling (before 5.11), or `CAP_NET_ADMIN` is missing.
    pub fn poll_busily(&mut self, usecs: u32) -> io::Result<()> {
        let Some(rx) = &mut self.rx else { return Ok(()) };
        set_busy_poll(rx.queue.fd(), usecs)?;
        rx.polls_busily = true;
        self.mode.push_str("; busy polling");
        Ok(())
    }

    /// Appends received packets to `out`: at most [`BATCH`], and no more than its capacity has room for.
    /// Returns how many.
    pub fn receive(&mut self, out: &mut Vec<Received>) -> usize {
        let Some(rx) = &mut self.rx else { return 0 };
        let room = (out.capacity() - out.len()).min(BATCH);
        // SAFETY: the descriptors are overwritten, not used; the ring belongs to this UMEM.
        let mut count = unsafe { rx.queue.consume(&mut self.scratch[..room]) };
        if count == 0 && rx.polls_busily {
            poll_driver(rx.queue.fd());
            // SAFETY: as above.
            count = unsafe { rx.queue.consume(&mut self.scratch[..room]) };
        }
        let before = out.len();
        for i in 0..count {
            let desc = self.scratch[i];
            let index = (desc.addr() >> self.frame_bits) as u32;
            self.relocate(index, Place::Fill, Place::Hand);
            let frame = Frame { index, port: self.id };
            if desc.addr() == self.areas[index as usize].addr() {
                out.push(Received { frame, len: desc.lengths().data() as u32 });
            } else {
                self.counters.misplaced += 1;
                self.release(frame);
            }
        }
        self.counters.received += count as u64;
        self.check();
        out.len() - before
    }

    /// The data area of a frame: from where a packet begins to the end of the frame.
    #[inline]
    pub fn frame(&self, frame: &Frame) -> &[u8] {
        assert_eq!(frame.port, self.id, "a frame of another port");
        // SAFETY: the descriptor is one of this UMEM and its length is that of the area. The token proves
        // that neither ring nor kernel has the frame, and a unique reference to it would need `&mut self`.
        unsafe { self.umem.data(&self.areas[frame.index as usize]) }.contents()
    }

    /// The data area of a frame, to write to.
    #[inline]
    pub fn frame_mut(&mut self, frame: &mut Frame) -> &mut [u8] {
        assert_eq!(frame.port, self.id, "a frame of another port");
        let desc = &mut self.areas[frame.index as usize];
        // SAFETY: as in `frame`; `&mut self` makes it the only reference.
        let mut area = unsafe { self.umem.data_mut(desc) };
        let area: *mut [u8] = area.contents_mut();
        // SAFETY: the memory lives as long as the UMEM, that is, as `self`; xsk-rs ties the slice to its
        // short-lived view.
        unsafe { &mut *area }
    }

    /// Bytes of a data area: the largest packet.
    pub fn area(&self) -> usize {
        (self.frame_size - HEADROOM) as usize
    }

    /// A free frame; `None` when there is none left ([`Port::reclaim`] may find some). Its contents are those
    /// of an earlier packet.
    #[inline]
    pub fn allocate(&mut self) -> Option<Frame> {
        let index = self.free.pop()?;
        self.relocate(index, Place::Free, Place::Hand);
        Some(Frame { index, port: self.id })
    }

    /// Gives a frame back.
    #[inline]
    pub fn release(&mut self, frame: Frame) {
        assert_eq!(frame.port, self.id, "a frame of another port");
        self.relocate(frame.index, Place::Hand, Place::Free);
        self.free.push(frame.index);
    }

    /// Queues the first `len` bytes of a frame's data area as a packet. It leaves with the next
    /// [`Port::flush`], or when there are [`KICK`] of them.
    ///
    /// # Errors
    /// Gives the frame back when the TX ring is full or the port has no TX side: flush, and try again later
    /// or drop it.
    ///
    /// # Panics
    /// When `len` is larger than [`Port::area`].
    #[inline]
    pub fn transmit(&mut self, frame: Frame, len: u32) -> Result<(), Frame> {
        assert_eq!(frame.port, self.id, "a frame of another port");
        assert!(len as usize <= self.area(), "a packet larger than its frame");
        let Some(tx) = &mut self.tx else { return Err(frame) };
        if tx.batch.len() == BATCH {
            tx.submit();
            if tx.batch.len() == BATCH {
                return Err(frame);
            }
        }
        let mut desc = self.areas[frame.index as usize];
        // SAFETY: a descriptor of this UMEM; only its length is set, the memory is not touched.
        unsafe { self.umem.data_mut(&mut desc) }.cursor().set_pos(len as usize);
        desc.set_options(0);
        tx.batch.push(desc);
        tx.unasked += 1;
        let many = tx.unasked >= KICK;
        self.counters.transmitted += 1;
        self.relocate(frame.index, Place::Hand, Place::Transmit);
        if many {
            // What the kernel does not take now, a later call asks for again.
            self.flush();
            self.complete();
        }
        Ok(())
    }

    /// Hands the queued packets to the kernel and lets it transmit until it has taken all or makes no
    /// progress.
    pub fn flush(&mut self) -> Flush {
        let mut drops = 0;
        loop {
            let Some(tx) = &mut self.tx else { return Flush::Done };
            tx.unasked = 0;
            tx.submit();
            let queued = tx.queued();
            if queued == 0 && tx.batch.is_empty() {
                return Flush::Done;
            }
            if !tx.queue.needs_wakeup() {
                // Zero-copy and the driver is at work: it will come by without being called.
                return if tx.batch.is_empty() { Flush::Done } else { Flush::Pending };
            }
            self.counters.kicks += 1;
            match kick(tx.queue.fd()) {
                Ok(()) => {}
                // The budget of a call is used up, the completion ring or the socket's buffer is full, or the
                // device is busy. Which one shows in whether there was progress.
                Err(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => self.counters.again += 1,
                // One packet was taken and thrown away (net/core/dev.c, `__dev_direct_xmit`: no carrier, or
                // dropped by the driver).
                Err(libc::EBUSY) => {
                    self.counters.dropped += 1;
                    drops += 1;
                    if drops == DROPS_PER_FLUSH {
                        return Flush::Pending;
                    }
                }
                Err(libc::ENETDOWN) => {
                    self.counters.link_down += 1;
                    return Flush::LinkDown;
                }
                // ENXIO: unbound because the device was unregistered. Others are not known; none of them
                // heals by itself.
                Err(_) => {
                    self.counters.link_down += 1;
                    return Flush::Gone;
                }
            }
            if tx.queued() == queued && self.complete() == 0 {
                return Flush::Pending;
            }
        }
    }

    /// Takes back the frames of transmitted packets and gives the kernel frames to receive into. To be called
    /// once a turn of the worker's loop.
    pub fn reclaim(&mut self) {
        self.complete();
        self.refill();
        self.check();
    }

    /// Becomes readable when packets have arrived; belongs into the XSKMAP.
    pub fn rx_fd(&self) -> Option<BorrowedFd<'_>> {
        self.rx.as_ref().map(|rx| borrow_fd(rx.queue.fd()))
    }

    /// Becomes writable when the TX ring is at least half empty.
    pub fn tx_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tx.as_ref().map(|tx| borrow_fd(tx.queue.fd()))
    }

    /// The queue that the RX side is bound to.
    pub fn rx_queue(&self) -> Option<u32> {
        self.rx.as_ref().map(|rx| rx.queue_id)
    }

    /// The queue that the TX side is bound to.
    pub fn tx_queue(&self) -> Option<u32> {
        self.tx.as_ref().map(|tx| tx.queue_id)
    }

    /// Packets of [`Port::transmit`] that the kernel has not taken yet.
    pub fn queued(&mut self) -> u32 {
        self.tx.as_mut().map_or(0, |tx| tx.queued() + tx.batch.len() as u32)
    }

    /// Frames that are kept free of captured packets, for those that the engine makes itself.
    pub fn reserve(&self) -> u32 {
        self.areas.len() as u32 / RESERVE
    }

    /// Frames by place.
    pub fn frames(&self) -> Frames {
        self.frames
    }

    /// What this port counted.
    pub fn counters(&self) -> PortCounters {
        self.counters
    }

    /// What the kernel counted. A system call for each side.
    ///
    /// # Errors
    /// Those of getsockopt(2); none is known to happen on a bound socket.
    pub fn statistics(&self) -> io::Result<Statistics> {
        let read = SocketStatistics::read;
        Ok(Statistics {
            rx: self.rx.as_ref().map(|rx| read(rx.queue.fd())).transpose()?.unwrap_or_default(),
            tx: self.tx.as_ref().map(|tx| read(tx.queue.fd())).transpose()?.unwrap_or_default(),
        })
    }

    /// One line: what was got.
    pub fn mode(&self) -> &str {
        &self.mode
    }

    /// Moves completed frames to the free list; returns how many.
    fn complete(&mut self) -> u32 {
        let Some(tx) = &mut self.tx else { return 0 };
        let mut total = 0;
        loop {
            // SAFETY: the descriptors are overwritten, not used; the ring belongs to this UMEM.
            let count = unsafe { tx.completion.consume(&mut self.scratch) };
            for desc in &self.scratch[..count] {
                let index = (desc.addr() >> self.frame_bits) as u32;
                self.free.push(index);
                #[cfg(debug_assertions)]
                {
                    assert_eq!(self.places[index as usize], Place::Transmit, "frame {index}");
                    self.places[index as usize] = Place::Free;
                }
            }
            total += count as u32;
            if count < BATCH {
                break;
            }
        }
        self.frames.transmit -= total;
        self.frames.free += total;
        self.counters.completed += u64::from(total);
        total
    }

    /// Fills the fill ring from the free list, in whole batches, down to the reserve.
    fn refill(&mut self) {
        let reserve = self.reserve();
        let Some(rx) = &mut self.rx else { return };
        while self.frames.free >= reserve + BATCH as u32 && rx.fill.nb_free(BATCH as u32) >= BATCH as u32 {
            let start = self.free.len() - BATCH;
            for (slot, &index) in self.scratch.iter_mut().zip(&self.free[start..]) {
                *slot = self.areas[index as usize];
                #[cfg(debug_assertions)]
                {
                    assert_eq!(self.places[index as usize], Place::Free, "frame {index}");
                    self.places[index as usize] = Place::Fill;
                }
            }
            // SAFETY: free frames of this UMEM, which leave the free list in the next line.
            let count = unsafe { rx.fill.produce(&self.scratch) };
            debug_assert_eq!(count, BATCH, "the ring said that it had room");
            self.free.truncate(start);
            self.frames.free -= BATCH as u32;
            self.frames.fill += BATCH as u32;
        }
    }

    /// Accounts for a frame that goes from one place to another.
    #[inline]
    fn relocate(&mut self, index: u32, from: Place, to: Place) {
        #[cfg(debug_assertions)]
        {
            assert_eq!(self.places[index as usize], from, "frame {index}");
            self.places[index as usize] = to;
        }
        let _ = index;
        *self.frames.at(from) -= 1;
        *self.frames.at(to) += 1;
    }

    /// Adds the frames up (debug assertion).
    fn check(&self) {
        debug_assert_eq!(self.frames.total() as usize, self.areas.len(), "{:?}", self.frames);
        debug_assert_eq!(self.frames.free as usize, self.free.len(), "{:?}", self.frames);
    }
}

impl Frames {
    /// All of them.
    pub fn total(&self) -> u32 {
        self.free + self.fill + self.hand + self.transmit
    }

    #[inline]
    fn at(&mut self, place: Place) -> &mut u32 {
        match place {
            Place::Free => &mut self.free,
            Place::Fill => &mut self.fill,
            Place::Hand => &mut self.hand,
            Place::Transmit => &mut self.transmit,
        }
    }
}

impl TxSide {
    /// Moves as much of the batch as fits to the TX ring.
    fn submit(&mut self) {
        let count = self.batch.len().min(self.queue.nb_free(self.batch.len() as u32) as usize);
        // SAFETY: frames of this UMEM whose tokens were handed in by `transmit`, so that nobody else refers
        // to them.
        let count = unsafe { self.queue.produce(&self.batch[..count]) };
        self.batch.drain(..count);
    }

    /// Packets in the TX ring that the kernel has not taken.
    fn queued(&mut self) -> u32 {
        self.ring - self.queue.nb_free_exact()
    }
}

/// Asks the kernel to transmit what is in the ring. The error is an errno.
fn kick(fd: &Fd) -> Result<(), i32> {
    // SAFETY: an empty message; the kernel reads no memory of ours.
    let sent =
        unsafe { libc::sendto(fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
    if sent >= 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

/// Has the driver look for received packets. What it says is of no use: whether something came is in the ring.
fn poll_driver(fd: &Fd) {
    // SAFETY: no buffer; the kernel writes no memory of ours.
    unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
}

fn borrow_fd(fd: &Fd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the socket, whose rings the port owns; the borrow is one of
    // the port.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
