//! One connection to a stream server, driven step by step: for tests in which it matters what is sent when.
//!
//! For loads there is `loadgen`; nothing here measures, and every step blocks, with a limit.

use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};

use crate::lab::Host;
use crate::stream::{Reader, RequestHeader, append_body};

/// How long any step may take.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// An open connection.
#[derive(Debug)]
pub struct Conversation {
    stream: TcpStream,
    reader: Reader,
    /// Ids of answers that have been read and not been asked for.
    answers: std::collections::VecDeque<u64>,
}

/// What is special about a client's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// The first request's data is in the SYN (RFC 7413). Its host has to have `net.ipv4.tcp_fastopen` so.
    FastOpen,
    /// The SYN offers further paths (RFC 8684).
    Multipath,
    /// Every IP header has options: the one of a router alert (RFC 2113), which no router here heeds.
    IpOptions,
}

impl Conversation {
    /// Connects from a host.
    pub fn open(host: &Host, server: SocketAddr) -> Result<Self> {
        let stream = host.namespace().enter(|| TcpStream::connect_timeout(&server, STEP_LIMIT))?;
        Self::over(stream.with_context(|| format!("connecting to {server}"))?)
    }

    /// Connects from a host in a special manner.
    pub fn open_in_manner(host: &Host, server: SocketAddrV4, manner: Manner) -> Result<Self> {
        const ROUTER_ALERT: [u8; 4] = [0x94, 0x04, 0, 0];
        let stream = host.namespace().enter(|| -> Result<TcpStream> {
            let protocol = if manner == Manner::Multipath { libc::IPPROTO_MPTCP } else { libc::IPPROTO_TCP };
            // SAFETY: one system call with constant integers.
            let socket =
                unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
            Errno::result(socket).context("making a socket")?;
            // SAFETY: the descriptor was just made and belongs to nobody else.
            let socket = unsafe { OwnedFd::from_raw_fd(socket) };
            match manner {
                Manner::FastOpen => set_tcp(&socket, libc::TCP_FASTOPEN_CONNECT, 1)?,
                Manner::Multipath => {}
                Manner::IpOptions => set_option(&socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &ROUTER_ALERT)?,
            }
            connect(socket.as_raw_fd(), &SockaddrStorage::from(server))
                .with_context(|| format!("connecting to {server}"))?;
            Ok(TcpStream::from(socket))
        })??;
        Self::over(stream)
    }

    /// Connects `count` times from a host, with sequence numbers that begin at `isn` and timestamps that begin at
    /// `timestamp` (even, in milliseconds, and as old as the call takes: a second).
    ///
    /// The client is the kernel's own: TCP_REPAIR (tcp(7), made for checkpoints) lets the first number be chosen before
    /// connect(2). The timestamps' offset is drawn by connect(2) itself, so the first SYN is lost on purpose, in the host's
    /// own output, and the offset is set before the second leaves.
    pub fn open_at(
        host: &Host,
        server: SocketAddrV4,
        count: usize,
        isn: u32,
        timestamp: u32,
    ) -> Result<Vec<Self>> {
        host.namespace().nft(
            "table ip first_syn {\nchain output {\ntype filter hook output priority 0;\n\
             tcp flags & (syn | ack) == syn drop\n}\n}\n",
        )?;
        let streams = host.namespace().enter(|| -> Result<Vec<TcpStream>> {
            (0..count)
                .map(|_| {
                    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
                    set_tcp(&socket, libc::TCP_REPAIR, REPAIR_ON)?;
                    set_tcp(&socket, libc::TCP_REPAIR_QUEUE, SEND_QUEUE)?;
                    // Numbers on the wire are unsigned, the option's value is not: the bits are what counts.
                    set_tcp(&socket, libc::TCP_QUEUE_SEQ, isn.cast_signed())?;
                    set_tcp(&socket, libc::TCP_REPAIR, REPAIR_OFF_SILENTLY)?;
                    match connect(socket.as_raw_fd(), &SockaddrStorage::from(server)) {
                        Err(Errno::EINPROGRESS) => {}
                        other => return Err(anyhow!("connect: {other:?} while SYNs are dropped")),
                    }
                    set_tcp(&socket, libc::TCP_REPAIR, REPAIR_ON)?;
                    set_tcp(&socket, libc::TCP_TIMESTAMP, timestamp.cast_signed())?;
                    set_tcp(&socket, libc::TCP_REPAIR, REPAIR_OFF_SILENTLY)?;
                    Ok(TcpStream::from(socket))
                })
                .collect()
        })??;
        host.namespace().nft("delete table ip first_syn")?;
        streams
            .into_iter()
            .map(|stream| {
                let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
                let limit = PollTimeout::try_from(STEP_LIMIT).map_err(|error| anyhow!("{error}"))?;
                ensure!(poll(&mut fds, limit)? == 1, "{server} does not answer");
                stream.peer_addr().with_context(|| format!("connecting to {server}"))?;
                let flags = OFlag::from_bits_truncate(fcntl(&stream, FcntlArg::F_GETFL)?);
                fcntl(&stream, FcntlArg::F_SETFL(flags.difference(OFlag::O_NONBLOCK)))?;
                Self::over(stream)
            })
            .collect()
    }

    fn over(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(STEP_LIMIT))?;
        stream.set_write_timeout(Some(STEP_LIMIT))?;
        setsockopt(&stream, sockopt::TcpNoDelay, &true)?;
        Ok(Self { stream, reader: Reader::default(), answers: std::collections::VecDeque::new() })
    }

    /// Its own address and port, as a server's record names its peer.
    pub fn local(&self) -> Result<String> {
        Ok(self.stream.local_addr()?.to_string())
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("sending a request")
    }

    /// Reads up to the next answer, which must be that to request `id`.
    pub fn expect_answer(&mut self, id: u64) -> Result<()> {
        let mut buffer = [0; 16 * 1024];
        while self.answers.is_empty() {
            let count = self.stream.read(&mut buffer).with_context(|| format!("the answer to {id}"))?;
            ensure!(count > 0, "the server closed instead of answering {id}");
            let answers = &mut self.answers;
            self.reader
                .responses(&buffer[..count], |id| answers.push_back(id))
                .map_err(|mismatch| anyhow!("answer to {id}: expected {}", mismatch.expected))?;
        }
        let answered = self.answers.pop_front();
        ensure!(answered == Some(id), "the answer to {answered:?} instead of that to {id}");
        Ok(())
    }

    /// Reads `count` bytes of an answer that is longer.
    pub fn read_within_an_answer(&mut self, count: usize) -> Result<()> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).context("the beginning of an answer")?;
        self.reader
            .responses(&bytes, |_| ())
            .map_err(|mismatch| anyhow!("an answer: expected {}", mismatch.expected))?;
        ensure!(!self.reader.at_boundary(), "the answer is over");
        Ok(())
    }

    /// Ends the connection by a reset (tcp(7), SO_LINGER with time 0).
    pub fn reset(self) -> Result<()> {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&self.stream, sockopt::Linger, &linger).context("setting SO_LINGER")
    }

    /// Sends a request and waits for its answer.
    pub fn ask(&mut self, request: RequestHeader) -> Result<()> {
        self.send(&bytes_of(request))?;
        self.expect_answer(request.id)
    }
}

/// A request's bytes, header and body.
pub fn bytes_of(request: RequestHeader) -> Vec<u8> {
    let mut bytes = request.to_bytes().to_vec();
    append_body(request.id, 0, request.body, &mut bytes);
    bytes
}

// Values of TCP_REPAIR and TCP_REPAIR_QUEUE (include/uapi/linux/tcp.h).
const REPAIR_ON: libc::c_int = 1;
/// Without the window probe that leaving repair sends otherwise.
const REPAIR_OFF_SILENTLY: libc::c_int = -1;
const SEND_QUEUE: libc::c_int = 2;

fn set_tcp(socket: &impl AsRawFd, option: libc::c_int, value: libc::c_int) -> Result<()> {
    set_option(socket, libc::IPPROTO_TCP, option, &value)
}

/// Sets a socket option to a plain value: an integer, or an array of them.
fn set_option<T: std::fmt::Debug>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> Result<()> {
    // SAFETY: `value` lives through the call and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of_val(value) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop).with_context(|| format!("socket option {level}/{option} = {value:?}"))
}
