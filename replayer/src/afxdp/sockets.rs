//! How a port comes to be: AF_XDP sockets, their rings, and queues of devices that they are bound to.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::xdp_desc;
use thiserror::Error;

use super::BATCH;
use super::memory::Memory;
use super::rings::{Consumer, Producer, Which};
use crate::netns::Namespace;

/// How long queues that are all in use may take to become free.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);

/// From include/uapi/linux/if_xdp.h, Linux 6.17; libc does not have it yet.
const XDP_MAX_TX_SKB_BUDGET: i32 = 9;

/// From include/uapi/asm-generic/socket.h, Linux 5.11; libc does not have them for every platform.
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_BUSY_POLL_BUDGET: i32 = 70;

/// A queue of a device, for one side of a port.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The device's name, in `namespace`.
    pub device: String,
    /// The first of these queues that no other AF_XDP socket is bound to is taken. The kernel lets a queue have one UMEM only. It binds to a
    /// transmit queue that is not in use, too, when there is a receive queue of that number, and transmits nothing there.
    pub queues: Range<u32>,
    /// Where the device is; `None`: where [`Port::open`](super::Port::open) is called.
    pub namespace: Option<Arc<Namespace>>,
}

/// What [`Port::open`](super::Port::open) is to make.
#[derive(Clone, Debug)]
pub struct PortConfig {
    /// Frames of the UMEM.
    pub frames: u32,
    /// Bytes of a frame, 2048 or 4096; [`HEADROOM`](super::HEADROOM) of them are not for packets.
    pub frame_size: u32,
    /// The receiving side.
    pub rx: Option<Endpoint>,
    /// The transmitting side.
    pub tx: Option<Endpoint>,
    /// Zero-copy for both sides; see [`afxdp`](super).
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
    /// The kernel gives no AF_XDP socket, or no rings for it.
    #[error("AF_XDP socket: {source}{}", hint(.source))]
    NoSocket {
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
        Some(libc::ENOBUFS | libc::ENOMEM) => "; the kernel has no memory for it",
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

/// A socket with its rings, which is bound to no queue yet.
pub(super) struct Unbound {
    pub(super) fd: OwnedFd,
    pub(super) fill: Producer<u64>,
    completion: Consumer<u64>,
    /// The ring of the side that it is for.
    side: SideRing,
}

/// Where packets come from, or go to.
pub(super) enum SideRing {
    Rx(Consumer<xdp_desc>),
    Tx(Producer<xdp_desc>),
}

/// A socket that is bound to a queue.
pub(super) struct Bound {
    device: String,
    namespace: Option<Arc<Namespace>>,
    pub(super) queue: u32,
    pub(super) socket: Unbound,
}

impl Unbound {
    /// Makes one in the namespace of the calling thread, for receiving or for transmitting, with `ring` slots. `memory` becomes its UMEM.
    pub(super) fn new(memory: &Memory, rx: bool, ring: u32) -> Result<Unbound, PortError> {
        let fd = socket().map_err(no_socket)?;
        memory.register(fd.as_fd()).map_err(|source| PortError::Memory { bytes: memory.bytes(), source })?;
        Unbound::with_rings(fd, rx, ring).map_err(no_socket)
    }

    /// The same, to share the UMEM of a socket that is bound.
    pub(super) fn sharing(rx: bool, ring: u32) -> Result<Unbound, PortError> {
        socket().and_then(|fd| Unbound::with_rings(fd, rx, ring)).map_err(no_socket)
    }

    fn with_rings(fd: OwnedFd, rx: bool, ring: u32) -> io::Result<Unbound> {
        let socket = fd.as_fd();
        // The kernel wants both rings of the UMEM from every socket, also the one that stays empty.
        let (fill, completion) = if rx { (ring, BATCH as u32) } else { (BATCH as u32, ring) };
        Which::Fill.make(socket, fill)?;
        Which::Completion.make(socket, completion)?;
        let side = if rx { Which::Rx } else { Which::Tx };
        side.make(socket, ring)?;
        Ok(Unbound {
            fill: Producer::map(socket, Which::Fill, fill)?,
            completion: Consumer::map(socket, Which::Completion, completion)?,
            side: if rx {
                SideRing::Rx(Consumer::map(socket, side, ring)?)
            } else {
                SideRing::Tx(Producer::map(socket, side, ring)?)
            },
            fd,
        })
    }

    /// Binds it to the first free queue of `endpoint`, in the namespace of the calling thread. The kernel takes the sockets of a process that
    /// was killed, and those of a port that was just dropped, apart in its own time, so that queues are given some to become free.
    pub(super) fn bind(self, endpoint: &Endpoint, mode: Mode<'_>) -> Result<Bound, PortError> {
        let begun = Instant::now();
        loop {
            match self.bind_now(endpoint, &mode) {
                Err(PortError::Busy { .. }) if begun.elapsed() < BUSY_PATIENCE => {
                    std::thread::sleep(BUSY_PATIENCE / 20);
                }
                result => {
                    let (device, namespace) = (endpoint.device.clone(), endpoint.namespace.clone());
                    return result.map(|queue| Bound { device, namespace, queue, socket: self });
                }
            }
        }
    }

    /// The queue that it could be bound to.
    fn bind_now(&self, endpoint: &Endpoint, mode: &Mode<'_>) -> Result<u32, PortError> {
        let device = || endpoint.device.clone();
        let ifindex = nix::net::if_::if_nametoindex(endpoint.device.as_str()).map_err(|error| {
            PortError::Socket { device: device(), queue: endpoint.queues.start, source: error.into() }
        })?;
        let mut busy = 0;
        for queue in endpoint.queues.clone() {
            if let Mode::As(first) = mode
                && first.is_on(endpoint, queue)
            {
                // One queue has one pair of fill and completion ring, and those are the other side's.
                busy += 1;
                continue;
            }
            match bind(self.fd.as_fd(), ifindex, queue, mode) {
                Ok(()) => return Ok(queue),
                Err(source) if source.raw_os_error() == Some(libc::EBUSY) => busy += 1,
                Err(source) if source.raw_os_error() == Some(libc::EINVAL) => {
                    // Behind queues that are there but taken, taken is what matters.
                    if busy > 0 {
                        break;
                    }
                    return Err(PortError::NoQueue { device: device(), queue });
                }
                Err(source) => return Err(PortError::Socket { device: device(), queue, source }),
            }
        }
        let side = match self.side {
            SideRing::Rx(_) => "rx",
            SideRing::Tx(_) => "tx",
        };
        Err(PortError::Busy { device: device(), busy, side })
    }
}

/// How packets are to be passed on.
pub(super) enum Mode<'a> {
    /// Copied, or not; the socket has a UMEM of its own.
    Own { zero_copy: bool },
    /// As the socket does whose UMEM it uses.
    As(&'a Bound),
}

impl Bound {
    fn is_on(&self, endpoint: &Endpoint, queue: u32) -> bool {
        let same_namespace = match (&self.namespace, &endpoint.namespace) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        self.queue == queue && self.device == endpoint.device && same_namespace
    }

    pub(super) fn describe(&self) -> String {
        let zero_copy = match get_option::<libc::xdp_options>(self.socket.fd.as_fd(), libc::XDP_OPTIONS) {
            Ok(options) if options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0 => "zero-copy",
            Ok(_) => "copy",
            Err(_) => "unknown mode",
        };
        format!("{} queue {} ({zero_copy})", self.device, self.queue)
    }

    /// Its descriptor, its queue's number, and the rings of its side.
    pub(super) fn apart(self) -> (OwnedFd, u32, SideRing, Producer<u64>, Consumer<u64>) {
        let Unbound { fd, fill, completion, side } = self.socket;
        (fd, self.queue, side, fill, completion)
    }
}

fn no_socket(source: io::Error) -> PortError {
    PortError::NoSocket { source }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(socket: BorrowedFd<'_>, ifindex: u32, queue: u32, mode: &Mode<'_>) -> io::Result<()> {
    let (flags, shared) = match mode {
        Mode::Own { zero_copy } => {
            let mode = if *zero_copy { libc::XDP_ZEROCOPY } else { libc::XDP_COPY };
            (mode | libc::XDP_USE_NEED_WAKEUP, 0)
        }
        Mode::As(first) => (libc::XDP_SHARED_UMEM, first.socket.fd.as_raw_fd() as u32),
    };
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: flags,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: shared,
    };
    let size = size_of::<libc::sockaddr_xdp>() as libc::socklen_t;
    // SAFETY: the pointer and the size are those of a live address.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How the fields of the rings lie in their mappings.
pub(super) fn mmap_offsets(socket: BorrowedFd<'_>) -> io::Result<libc::xdp_mmap_offsets> {
    get_option(socket, libc::XDP_MMAP_OFFSETS)
}

/// What the kernel counted.
pub(super) fn statistics(socket: BorrowedFd<'_>) -> io::Result<libc::xdp_statistics> {
    get_option(socket, libc::XDP_STATISTICS)
}

/// Lets one system call transmit the whole ring, and lets the socket own that much memory on its way out.
/// Returns how many packets a call transmits. Both are only faster, so that a refusal is no error.
pub(super) fn raise_tx_limits(socket: BorrowedFd<'_>, ring: u32, frame_size: u32) -> u32 {
    // What a packet in copy mode is charged: its data and the kernel's own structures, about as much again.
    let bytes = (ring * frame_size * 2).min(i32::MAX as u32) as i32;
    let _ = set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes)
        .or_else(|_| set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes));
    match set_option(socket, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &ring) {
        Ok(()) => ring,
        Err(_) => 32,
    }
}

/// Prefers polling the driver from the socket's own calls, `usecs` and a batch at a time.
pub(super) fn set_busy_poll(socket: BorrowedFd<'_>, usecs: u32) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, SO_PREFER_BUSY_POLL, &1i32)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_BUSY_POLL, &usecs)?;
    set_option(socket, libc::SOL_SOCKET, SO_BUSY_POLL_BUDGET, &(BATCH as i32))
}

/// Sets an option whose value is an integer or a C structure.
pub(super) fn set_option<T: Copy>(
    socket: BorrowedFd<'_>,
    level: i32,
    option: i32,
    value: &T,
) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    let value: *const T = value;
    // SAFETY: the pointer and the size are those of a live value, which the kernel only reads.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.cast::<c_void>(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Structures of integers: every content is a valid value.
///
/// # Safety
/// That has to be true.
unsafe trait Integers: Copy {}
// SAFETY: see include/uapi/linux/if_xdp.h.
unsafe impl Integers for libc::xdp_options {}
// SAFETY: as above.
unsafe impl Integers for libc::xdp_mmap_offsets {}
// SAFETY: as above.
unsafe impl Integers for libc::xdp_statistics {}

/// Reads an option of AF_XDP sockets.
fn get_option<T: Integers>(socket: BorrowedFd<'_>, option: i32) -> io::Result<T> {
    // SAFETY: all-zero is a valid value as any other.
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut size = size_of::<T>() as libc::socklen_t;
    let pointer = (&raw mut value).cast::<c_void>();
    // SAFETY: the pointers are those of live values, and `size` is that of `value`.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_XDP, option, pointer, &mut size) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // Before Linux 5.4 offsets had another form; statistics only had fewer fields, at their end.
    if option == libc::XDP_MMAP_OFFSETS && size as usize != size_of::<T>() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(value)
}

/// UMEM pages count against the limit of locked memory unless the process has `CAP_IPC_LOCK`. A refusal shows
/// when the UMEM is made.
pub(crate) fn raise_memlock() {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a pointer to a live value that the kernel only reads.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
}
