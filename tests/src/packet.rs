//! Whole frames from and to a NIC of the lab, past its host's network stack (packet(7)).

use std::io::Error;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};

use crate::namespace::Namespace;

/// Longer than any frame of a NIC without offloads, jumbo frames among them.
pub const FRAME_LIMIT: usize = 16 * 1024;
/// Room for a burst that its reader is late for, in bytes.
const RECEIVE_BUFFER: usize = 64 << 20;

/// Which frames a socket gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frames {
    /// Those that arrive at the NIC.
    Arriving,
    /// Also those that leave it.
    Both,
}

/// A socket for whole frames, non-blocking.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens one at a NIC of the calling thread's namespace.
    pub fn open(device: &str, frames: Frames) -> Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
            .context("opening a packet socket (root?)")?;
        let index = if_nametoindex(device).with_context(|| format!("no NIC {device}"))?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).context("a larger receive buffer")?;
        let ignore_outgoing = libc::c_int::from(frames == Frames::Arriving);
        // SAFETY: `ignore_outgoing` lives through the call and its size is given.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_IGNORE_OUTGOING,
                (&raw const ignore_outgoing).cast(),
                size_of_val(&ignore_outgoing) as libc::socklen_t,
            )
        };
        Errno::result(result).context("PACKET_IGNORE_OUTGOING")?;
        // SAFETY: all-zero bytes are a valid value of this plain structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        // SAFETY: `address` lives through the call and its size is given.
        let result = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        Errno::result(result).with_context(|| format!("binding to {device}"))?;
        Ok(Self(socket))
    }

    /// The next frame's length, its bytes in `buffer`; `None` when there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match recv(self.0.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error).context("receiving frames"),
        }
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty()).map(|_| ()).map_err(Error::from)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Keeps every frame that passes a NIC until it is stopped.
#[derive(Debug)]
pub struct Tap {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Result<Vec<Vec<u8>>>>,
}

impl Tap {
    /// Starts at a NIC of a namespace; frames are kept in the order of their passing.
    pub fn start(namespace: &Namespace, device: &str, frames: Frames) -> Result<Self> {
        let socket = namespace.enter(|| PacketSocket::open(device, frames))??;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = std::thread::spawn(move || {
            let (mut kept, mut buffer) = (Vec::new(), vec![0; FRAME_LIMIT]);
            loop {
                // What had passed before the stop is read to its end.
                let last = stopped.load(Ordering::Acquire);
                while let Some(length) = socket.receive(&mut buffer)? {
                    kept.push(buffer[..length].to_vec());
                }
                if last {
                    return Ok(kept);
                }
                poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(20u8))?;
            }
        });
        Ok(Self { stop, reader })
    }

    /// All frames that have passed.
    pub fn stop(self) -> Result<Vec<Vec<u8>>> {
        self.stop.store(true, Ordering::Release);
        self.reader.join().map_err(|_| anyhow!("the tap's thread panicked"))?
    }
}
