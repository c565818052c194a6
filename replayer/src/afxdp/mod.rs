//! The AF_XDP port: packets in and out of the kernel by way of one memory area, the UMEM.
//!
//! A port has an RX side, a TX side, or both. Both sides use the same frames although they belong to two
//! devices, and often to two network namespaces: a packet that came in on the mirror is rewritten and goes
//! out on the output device without being copied in user space. It is one of the few modules with `unsafe` in it.
//!
//! - this file: the hot path
//! - [`frames`]: who has which frame
//! - [`memory`]: the memory area
//! - [`rings`]: what is shared with the kernel
//! - [`sockets`]: the sockets, and why there may be none
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
//!       FREE ◄───────────────────────┼──┘                            TX ring,
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
//! For zero-copy some drivers (ice, i40e) want the fill ring of a receiving socket to be filled before bind(2), as it is here.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use libc::xdp_desc;

mod frames;
mod memory;
mod rings;
mod sockets;
mod statistics;

pub use frames::Frames;
pub(crate) use sockets::raise_memlock;
pub use sockets::{Endpoint, PortConfig, PortError};
pub use statistics::{PortCounters, SocketStatistics, Statistics};

use frames::{Book, Place};
use memory::Memory;
use rings::{Consumer, Producer};
use sockets::{Mode, SideRing, Unbound, raise_tx_limits, set_busy_poll};

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
    /// Nothing: the kernel has taken every packet, or its driver is at work on the ring and will.
    Done,
    /// Packets that the kernel or the device has no room for now. Call again soon, or after poll(2) for
    /// output.
    Pending,
    /// Packets that wait for the device to be up again.
    LinkDown,
    /// The device does not exist any more. This port will not transmit again; open another.
    Gone,
}

/// A UMEM and its sockets. For one thread at a time.
#[derive(Debug)]
pub struct Port {
    id: NonZeroU32,
    // Fields drop in this order: sockets before the UMEM that they use.
    rx: Option<RxSide>,
    tx: Option<TxSide>,
    memory: Memory,
    book: Book,
    counters: PortCounters,
    mode: String,
}

#[derive(Debug)]
struct RxSide {
    socket: OwnedFd,
    ring: Consumer<xdp_desc>,
    fill: Producer<u64>,
    queue_id: u32,
    polls_busily: bool,
}

#[derive(Debug)]
struct TxSide {
    socket: OwnedFd,
    ring: Producer<xdp_desc>,
    completion: Consumer<u64>,
    queue_id: u32,
    /// Packets in the ring that the kernel was not shown yet. Fewer than [`BATCH`].
    unpublished: u32,
    /// Packets since the kernel was last asked to take them.
    unasked: u32,
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
        if !matches!(config.frame_size, 2048 | 4096) {
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
        let mut book = Book::new(config.frames);
        let memory = Memory::new(config.frames, config.frame_size).map_err(|source| PortError::Memory {
            bytes: u64::from(config.frames) * u64::from(config.frame_size),
            source,
        })?;

        // The UMEM is that of its first socket, which has to be made in that one's namespace.
        let (is_rx, ring) = if config.rx.is_some() { (true, rx_ring) } else { (false, tx_ring) };
        let (memory, book, first_socket) = first.run(move || {
            let mut socket = Unbound::new(&memory, is_rx, ring)?;
            if is_rx {
                book.refill(&memory, &mut socket.fill);
            }
            let socket = socket.bind(first, Mode::Own { zero_copy: config.zero_copy })?;
            Ok::<_, PortError>((memory, book, socket))
        })??;
        let (first_socket, second_socket) = match second {
            Some(tx) => tx.run(move || {
                let socket = Unbound::sharing(false, tx_ring)?.bind(tx, Mode::As(&first_socket))?;
                Ok::<_, PortError>((first_socket, Some(socket)))
            })??,
            None => (first_socket, None),
        };

        let mut port = Port {
            id,
            rx: None,
            tx: None,
            memory,
            book,
            counters: PortCounters::default(),
            mode: String::new(),
        };
        let mut mode = Vec::new();
        for socket in [Some(first_socket), second_socket].into_iter().flatten() {
            let described = socket.describe();
            let (fd, queue_id, side, fill, completion) = socket.apart();
            match side {
                SideRing::Rx(ring) => {
                    mode.push(format!("RX {described}"));
                    port.rx = Some(RxSide { socket: fd, ring, fill, queue_id, polls_busily: false });
                }
                SideRing::Tx(ring) => {
                    let budget = raise_tx_limits(fd.as_fd(), tx_ring, config.frame_size);
                    mode.push(format!("TX {described}, {budget} packets a system call"));
                    let (unpublished, unasked) = (0, 0);
                    port.tx = Some(TxSide { socket: fd, ring, completion, queue_id, unpublished, unasked });
                }
            }
        }
        mode.push(format!("{} frames of {} bytes", config.frames, config.frame_size));
        port.mode = mode.join("; ");
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
        set_busy_poll(rx.socket.as_fd(), usecs)?;
        rx.polls_busily = true;
        self.mode.push_str("; busy polling");
        Ok(())
    }

    /// Appends received packets to `out`: at most [`BATCH`], and no more than its capacity has room for.
    /// Returns how many.
    pub fn receive(&mut self, out: &mut Vec<Received>) -> usize {
        let Port { id, rx: Some(rx), memory, book, counters, .. } = self else { return 0 };
        let room = (out.capacity() - out.len()).min(BATCH) as u32;
        let before = out.len();
        let mut take = |desc: xdp_desc| {
            let (index, is_in_place) = memory.index(desc.addr);
            book.relocate(index, Place::Fill, Place::Hand);
            if is_in_place {
                out.push(Received { frame: Frame { index, port: *id }, len: desc.len });
            } else {
                counters.misplaced += 1;
                book.release(index);
            }
        };
        let mut count = rx.ring.take(room, &mut take);
        if count == 0 && rx.polls_busily {
            poll_driver(rx.socket.as_fd());
            count = rx.ring.take(room, &mut take);
        }
        counters.received += u64::from(count);
        book.check();
        out.len() - before
    }

    /// The data area of a frame: from where a packet begins to the end of the frame.
    #[inline]
    pub fn frame(&self, frame: &Frame) -> &[u8] {
        assert_eq!(frame.port, self.id, "a frame of another port");
        self.memory.data(frame)
    }

    /// The data area of a frame, to write to.
    #[inline]
    pub fn frame_mut(&mut self, frame: &mut Frame) -> &mut [u8] {
        assert_eq!(frame.port, self.id, "a frame of another port");
        self.memory.data_mut(frame)
    }

    /// Bytes of a data area: the largest packet.
    pub fn area(&self) -> usize {
        self.memory.area()
    }

    /// A free frame; `None` when there is none left ([`Port::reclaim`] may find some). Its contents are those
    /// of an earlier packet.
    #[inline]
    pub fn allocate(&mut self) -> Option<Frame> {
        Some(Frame { index: self.book.allocate()?, port: self.id })
    }

    /// Gives a frame back.
    #[inline]
    pub fn release(&mut self, frame: Frame) {
        assert_eq!(frame.port, self.id, "a frame of another port");
        self.book.release(frame.index);
    }

    /// Queues the first `len` bytes of a frame's data area as a packet. It leaves with the next
    /// [`Port::flush`], or when there are [`KICK`] of them.
    ///
    /// # Errors
    /// Gives the frame back when the TX ring is full or the port has no TX side: flush, and try again later
    /// or drop it.
    ///
    /// # Panics
    /// When `len` is 0, which the kernel would never complete, or larger than [`Port::area`].
    #[inline]
    pub fn transmit(&mut self, frame: Frame, len: u32) -> Result<(), Frame> {
        assert_eq!(frame.port, self.id, "a frame of another port");
        assert!(0 < len && len as usize <= self.area(), "a packet of {len} bytes");
        let Some(tx) = &mut self.tx else { return Err(frame) };
        if !tx.ring.push(xdp_desc { addr: self.memory.address(frame.index), len, options: 0 }) {
            return Err(frame);
        }
        tx.unpublished += 1;
        if tx.unpublished == BATCH as u32 {
            tx.publish();
        }
        tx.unasked += 1;
        let many = tx.unasked >= KICK;
        self.counters.transmitted += 1;
        self.book.relocate(frame.index, Place::Hand, Place::Transmit);
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
            tx.publish();
            let queued = tx.ring.waiting();
            // Without a need to be woken: zero-copy and the driver is at work, it will come by without being called.
            if queued == 0 || !tx.ring.needs_wakeup() {
                return Flush::Done;
            }
            self.counters.kicks += 1;
            match kick(tx.socket.as_fd()) {
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
            if tx.ring.waiting() == queued && self.complete() == 0 {
                return Flush::Pending;
            }
        }
    }

    /// Takes back the frames of transmitted packets and gives the kernel frames to receive into. To be called
    /// once a turn of the worker's loop.
    pub fn reclaim(&mut self) {
        self.complete();
        if let Some(rx) = &mut self.rx {
            self.book.refill(&self.memory, &mut rx.fill);
            // Zero-copy: a driver that has run out of frames looks again only when it is called.
            if rx.fill.needs_wakeup() {
                poll_driver(rx.socket.as_fd());
            }
        }
        self.book.check();
    }

    /// Becomes readable when packets have arrived; belongs into the XSKMAP.
    pub fn rx_fd(&self) -> Option<BorrowedFd<'_>> {
        self.rx.as_ref().map(|rx| rx.socket.as_fd())
    }

    /// Becomes writable when the TX ring is at least half empty.
    pub fn tx_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tx.as_ref().map(|tx| tx.socket.as_fd())
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
    pub fn queued(&self) -> u32 {
        self.tx.as_ref().map_or(0, |tx| tx.ring.waiting())
    }

    /// Frames that are kept free of captured packets, for those that the engine makes itself.
    pub fn reserve(&self) -> u32 {
        self.book.reserve()
    }

    /// Frames by place.
    pub fn frames(&self) -> Frames {
        self.book.frames()
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
            rx: self.rx.as_ref().map(|rx| read(rx.socket.as_fd())).transpose()?.unwrap_or_default(),
            tx: self.tx.as_ref().map(|tx| read(tx.socket.as_fd())).transpose()?.unwrap_or_default(),
        })
    }

    /// One line: what was got.
    pub fn mode(&self) -> &str {
        &self.mode
    }

    /// Moves completed frames to the free list; returns how many.
    fn complete(&mut self) -> u32 {
        let Some(tx) = &mut self.tx else { return 0 };
        let total = self.book.complete(&self.memory, &mut tx.completion);
        self.counters.completed += u64::from(total);
        total
    }
}

impl TxSide {
    /// Shows the kernel what is in the ring.
    #[inline]
    fn publish(&mut self) {
        if self.unpublished > 0 {
            self.unpublished = 0;
            self.ring.publish();
        }
    }
}

/// Asks the kernel to transmit what is in the ring. The error is an errno.
fn kick(socket: BorrowedFd<'_>) -> Result<(), i32> {
    // SAFETY: an empty message; the kernel reads no memory of ours.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0)
    };
    if sent >= 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

/// Has the driver look for received packets. What it says is of no use: whether something came is in the ring.
fn poll_driver(socket: BorrowedFd<'_>) {
    // SAFETY: no buffer; the kernel writes no memory of ours.
    unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            std::ptr::null_mut(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
}
