//! How a port comes to be: its memory area, and AF_XDP sockets bound to queues of devices.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroU32;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use xsk_rs::config::{BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig};
use xsk_rs::socket::Fd;
use xsk_rs::{CompQueue, FillQueue, FrameDesc, RxQueue, Socket, TxQueue, Umem};

use super::{BATCH, HEADROOM};
use crate::netns::Namespace;

/// How long queues that are all in use may take to become free.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);

/// From include/uapi/linux/if_xdp.h, Linux 6.17; libc and libxdp do not have it yet.
const XDP_MAX_TX_SKB_BUDGET: i32 = 9;

/// From include/uapi/asm-generic/socket.h, Linux 5.11; libc does not have them for every platform.
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_BUSY_POLL_BUDGET: i32 = 70;

/// A queue of a device, for one side of a port.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The device's name, in `namespace`.
    pub device: String,
    /// The first of these queues that no other AF_XDP socket is bound to is taken. The range may end beyond the
    /// queues that the device has. The kernel lets a queue have one UMEM only.
    pub queues: Range<u32>,
    /// Where the device is; `None`: where [`Port::open`](super::Port::open) is called.
    pub namespace: Option<Arc<Namespace>>,
}

/// What [`Port::open`](super::Port::open) is to make.
#[derive(Clone, Debug)]
pub struct PortConfig {
    /// Frames of the UMEM.
    pub frames: u32,
    /// Bytes of a frame, 2048 or 4096; [`HEADROOM`] of them are not for packets.
    pub frame_size: u32,
    /// The receiving side.
    pub rx: Option<Endpoint>,
    /// The transmitting side.
    pub tx: Option<Endpoint>,
    /// Zero-copy for both sides; see the head of this file.
    pub zero_copy: bool,
}

/// Why a port could not be opened.
#[derive(Debug, Error)]
pub enum PortError {
    /// The configuration contradicts itself.
    #[error("AF_XDP port: {0}")]
    Config(&'static str),
    /// No memory for the UMEM.
    #[error(
        "no memory for {bytes} bytes of packet buffers ({source}); \
         without CAP_IPC_LOCK they count against the limit of locked memory, `ulimit -l`"
    )]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// All queues have an AF_XDP socket of another UMEM.
    #[error(
        "all {busy} {side} queues of {device} are in use by AF_XDP sockets, of another replayer for example; give \
         {device} one more by `ethtool -L {device} {side} {}` (`combined` where that is what `ethtool -l {device}` shows), \
         use fewer workers, or stop the other user",
        busy + 1
    )]
    Busy {
        /// The device.
        device: String,
        /// Its queues that were tried.
        busy: u32,
        /// Which of its queues: `tx` or `rx`.
        side: &'static str,
    },
    /// The device does not use that many queues.
    #[error("{device} has no queue {queue} (see `ethtool -l {device}`)")]
    NoQueue {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
    },
    /// The kernel refused the socket.
    #[error("AF_XDP socket on {device} queue {queue}: {source}{}", hint(.source))]
    Socket {
        /// The device.
        device: String,
        /// Its queue.
        queue: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The namespace of an endpoint could not be entered.
    #[error("enter the network namespace of {device}: {source}; CAP_SYS_ADMIN is needed")]
    Namespace {
        /// The device.
        device: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; CAP_NET_RAW is needed, run as root",
        Some(libc::ENODEV) => "; there is no such interface",
        Some(libc::EOPNOTSUPP) => "; the driver has no zero-copy, use copy mode",
        Some(libc::ENOBUFS | libc::ENOMEM) => "; the limit of locked memory is too low (`ulimit -l`)",
        Some(libc::EAFNOSUPPORT) => "; this kernel has no AF_XDP (CONFIG_XDP_SOCKETS)",
        _ => "",
    }
}

impl Endpoint {
    /// That queue, in the namespace where the port is opened.
    pub fn new(device: impl Into<String>, queue: u32) -> Endpoint {
        Endpoint { device: device.into(), queues: queue..queue + 1, namespace: None }
    }

    /// The same in another namespace.
    pub fn within(self, namespace: Arc<Namespace>) -> Endpoint {
        Endpoint { namespace: Some(namespace), ..self }
    }

    pub(super) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, PortError> {
        match &self.namespace {
            None => Ok(f()),
            Some(namespace) => namespace
                .run(f)
                .map_err(|source| PortError::Namespace { device: self.device.clone(), source }),
        }
    }
}

/// A bound socket with all its rings.
pub(super) struct Bound {
    device: String,
    pub(super) queue: u32,
    pub(super) rx: RxQueue,
    pub(super) tx: TxQueue,
    pub(super) fill: FillQueue,
    pub(super) completion: CompQueue,
}

impl Bound {
    pub(super) fn describe(&self) -> String {
        let zero_copy = match xdp_options(self.rx.fd()) {
            Ok(flags) if flags & libc::XDP_OPTIONS_ZEROCOPY != 0 => "zero-copy",
            Ok(_) => "copy",
            Err(_) => "unknown mode",
        };
        format!("{} queue {} ({zero_copy})", self.device, self.queue)
    }
}

pub(super) type Memory = (Umem, Vec<FrameDesc>, bool);

/// The UMEM, the data area of each frame, and whether it lies in huge pages.
pub(super) fn create_umem(
    frames: u32,
    frame_size: u32,
    fill: u32,
    completion: u32,
) -> Result<Memory, PortError> {
    const HUGE_PAGE: u64 = 2 << 20;

    let config = UmemConfig::builder()
        .frame_size(FrameSize::new(frame_size).map_err(|_| PortError::Config("frame size"))?)
        .fill_queue_size(ring_size(fill)?)
        .comp_queue_size(ring_size(completion)?)
        .build()
        .map_err(|_| PortError::Config("frame size and headroom"))?;
    let count = NonZeroU32::new(frames).ok_or(PortError::Config("no frames"))?;
    let bytes = u64::from(frames) * u64::from(frame_size);
    let huge = if bytes.is_multiple_of(HUGE_PAGE) { Umem::new(config, count, true).ok() } else { None };
    let is_huge = huge.is_some();
    let (umem, mut areas) = match huge {
        Some(made) => made,
        None => Umem::new(config, count, false)
            .map_err(|error| PortError::Memory { bytes, source: os_error(&error) })?,
    };
    for desc in &mut areas {
        debug_assert_eq!(desc.addr() as u32 % frame_size, HEADROOM);
        // SAFETY: a descriptor of this UMEM; only its length is set, the memory is not touched.
        unsafe { umem.data_mut(desc) }.cursor().set_pos((frame_size - HEADROOM) as usize);
    }
    Ok((umem, areas, is_huge))
}

/// Binds a socket to the first free queue of `endpoint`, in the namespace of the calling thread. The kernel takes the sockets of a process that
/// was killed apart in its own time, so that queues are given some to become free.
pub(super) fn bind(
    umem: &Umem,
    endpoint: &Endpoint,
    rings: (u32, u32),
    flags: BindFlags,
) -> Result<Bound, PortError> {
    let begun = Instant::now();
    loop {
        match bind_now(umem, endpoint, rings, flags) {
            Err(PortError::Busy { .. }) if begun.elapsed() < BUSY_PATIENCE => {
                std::thread::sleep(BUSY_PATIENCE / 20);
            }
            result => return result,
        }
    }
}

fn bind_now(
    umem: &Umem,
    endpoint: &Endpoint,
    (rx_ring, tx_ring): (u32, u32),
    flags: BindFlags,
) -> Result<Bound, PortError> {
    let device = endpoint.device.clone();
    let interface: Interface =
        device.parse().map_err(|_| PortError::Config("a NUL byte in the interface's name"))?;
    let config = SocketConfig::builder()
        .rx_queue_size(ring_size(rx_ring)?)
        .tx_queue_size(ring_size(tx_ring)?)
        // Programs are attached and maps filled by crate::programs.
        .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
        .bind_flags(flags)
        .build();
    let mut busy = 0;
    for queue in endpoint.queues.clone() {
        // SAFETY: libxdp loads no program, which is what the contract asks for.
        match unsafe { Socket::new(config, umem, &interface, queue) } {
            Ok((tx, rx, Some((fill, completion)))) => {
                return Ok(Bound { device, queue, rx, tx, fill, completion });
            }
            Ok((_, _, None)) => return Err(PortError::Config("both sides on the same queue")),
            Err(error) => match os_error(&error) {
                source if source.raw_os_error() == Some(libc::EBUSY) => busy += 1,
                source if source.raw_os_error() == Some(libc::EINVAL) => {
                    // Behind queues that are there but taken, taken is what matters.
                    if busy > 0 {
                        break;
                    }
                    return Err(PortError::NoQueue { device, queue });
                }
                source => return Err(PortError::Socket { device, queue, source }),
            },
        }
    }
    Err(PortError::Busy { device, busy, side: if tx_ring > rx_ring { "tx" } else { "rx" } })
}

/// The kernel's answer inside an error of xsk-rs.
fn os_error(error: &dyn std::error::Error) -> io::Error {
    error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error)
        .map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}

fn ring_size(size: u32) -> Result<QueueSize, PortError> {
    QueueSize::new(size).map_err(|_| PortError::Config("a ring's size is not a power of two"))
}

/// Lets one system call transmit the whole ring, and lets the socket own that much memory on its way out.
/// Returns how many packets a call transmits. Both are only faster, so that a refusal is no error.
pub(super) fn raise_tx_limits(fd: &Fd, ring: u32, frame_size: u32) -> u32 {
    // What a packet in copy mode is charged: its data and the kernel's own structures, about as much again.
    let bytes = (ring * frame_size * 2).min(i32::MAX as u32) as i32;
    let _ = set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, bytes));
    match set_option(fd, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, ring as i32) {
        Ok(()) => ring,
        Err(_) => 32,
    }
}

/// Prefers polling the driver from the socket's own calls, `usecs` and a batch at a time.
pub(super) fn set_busy_poll(fd: &Fd, usecs: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, SO_PREFER_BUSY_POLL, 1)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL, usecs as i32)?;
    set_option(fd, libc::SOL_SOCKET, SO_BUSY_POLL_BUDGET, BATCH as i32)
}

fn set_option(fd: &Fd, level: i32, option: i32, value: i32) -> io::Result<()> {
    let size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the pointer and the size are those of a live i32.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast::<c_void>(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn xdp_options(fd: &Fd) -> io::Result<u32> {
    let mut options = libc::xdp_options { flags: 0 };
    let mut size = size_of::<libc::xdp_options>() as libc::socklen_t;
    let pointer = (&raw mut options).cast::<c_void>();
    // SAFETY: the pointers are those of live values, and `size` is that of `options`.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_XDP, libc::XDP_OPTIONS, pointer, &mut size) };
    if result == 0 { Ok(options.flags) } else { Err(io::Error::last_os_error()) }
}

/// UMEM pages count against the limit of locked memory unless the process has `CAP_IPC_LOCK`. A refusal shows
/// when the UMEM is made.
pub(crate) fn raise_memlock() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a pointer to a live value that the kernel only reads.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
}
