//! A TCP server that records what it receives: for each connection a hash of all bytes, the requests in it, and how it ended.
//!
//! It answers the requests of [`replayer_tests::stream`], in their order, and can misbehave on demand. One thread; idle it
//! sleeps. The record goes to `--out` on SIGUSR1 and when SIGTERM or SIGINT ends it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use mio::net::{TcpListener, TcpStream, UnixStream};
use mio::{Events, Interest, Poll, Token};
use nix::errno::Errno;
use nix::sys::socket::{Backlog, SockaddrStorage, bind, setsockopt, sockopt};
use replayer_tests::process::raise_file_limit;
use replayer_tests::stream::{
    Connection, End, GREETING, Reader, Record, RequestHeader, StreamHash, append_body, response_header,
};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

/// Answers requests and records their bytes.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address to listen on.
    #[arg(long, default_value = "[::]:9000")]
    listen: SocketAddr,
    /// File that the record is written to, as JSON.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Speak first: send a greeting, this many milliseconds after a connection was accepted.
    #[arg(long, value_name = "MS", num_args = 0..=1, default_missing_value = "0")]
    greet: Option<u64>,
    /// Wait before each response, in addition to what the request asks for.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    delay_ms: u64,
    /// Answer with this many times the length that was asked for.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    response_scale: f64,
    /// Never answer the requests with these ids.
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    never_answer: Vec<u64>,
    /// Send FIN after this many responses on a connection, and read on.
    #[arg(long, value_name = "RESPONSES")]
    close_after: Option<u64>,
    /// Read no faster than this on each connection.
    #[arg(long, value_name = "BYTES_PER_SECOND")]
    slow_read: Option<u64>,
    /// Accept further paths of a connection (MPTCP): clients that offer them put options into every segment.
    #[arg(long)]
    multipath: bool,
    /// Probe an idle connection so often, and give it up when two probes in a row are not answered.
    #[arg(long, value_name = "SECONDS")]
    keepalive: Option<u32>,
    /// Receive buffer of each connection, instead of one that the kernel tunes.
    #[arg(long, value_name = "BYTES")]
    receive_buffer: Option<usize>,
}

const LISTENER: Token = Token(usize::MAX);
const DUMP: Token = Token(usize::MAX - 1);
const STOP: Token = Token(usize::MAX - 2);
/// Bytes read from a socket at once, and bytes of a response made at once.
const CHUNK: usize = 64 * 1024;
/// How often a connection that is read slowly gets its next share.
const SLOW_READ_INTERVAL: Duration = Duration::from_millis(10);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    raise_file_limit()?;
    let mut server = Server::new(&arguments)?;
    server.run()
}

fn listen(arguments: &Arguments) -> Result<std::net::TcpListener> {
    let family = if arguments.listen.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let protocol = if arguments.multipath { libc::IPPROTO_MPTCP } else { libc::IPPROTO_TCP };
    // SAFETY: one system call with integers.
    let socket = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
    Errno::result(socket).context("making a socket")?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(arguments.listen))?;
    // As many connections at once as the host allows: the 128 of the standard library are what a burst of copies overflows.
    nix::sys::socket::listen(&socket, Backlog::MAXALLOWABLE)?;
    Ok(socket.into())
}

struct Server<'a> {
    arguments: &'a Arguments,
    never_answer: HashSet<u64>,
    poll: Poll,
    listener: TcpListener,
    /// By token; an ended connection keeps its place and its record.
    peers: Vec<Peer>,
    /// When which connection has something to write or to read again.
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    buffer: Vec<u8>,
}

/// One accepted connection.
struct Peer {
    stream: Option<TcpStream>,
    record: Connection,
    hash: StreamHash,
    reader: Reader,
    /// Responses not begun: when they may be, their request's id, their length.
    pending: VecDeque<(Instant, u64, u32)>,
    /// The response being written: id, length, bytes of it already in `out`.
    current: Option<(u64, u32, u32)>,
    out: Vec<u8>,
    written: usize,
    responses: u64,
    /// The client's FIN has come; what is pending is still answered.
    half_closed: bool,
    /// When slow reading may go on, and whether the socket may have bytes.
    read_at: Instant,
}

impl<'a> Server<'a> {
    fn new(arguments: &'a Arguments) -> Result<Self> {
        let listener = listen(arguments)
            .with_context(|| format!("listening on {}: is another server there?", arguments.listen))?;
        if let Some(bytes) = arguments.receive_buffer {
            setsockopt(&listener, sockopt::RcvBuf, &bytes).context("setting the receive buffer")?;
        }
        listener.set_nonblocking(true)?;
        let mut listener = TcpListener::from_std(listener);
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        Ok(Self {
            arguments,
            never_answer: arguments.never_answer.iter().copied().collect(),
            poll,
            listener,
            peers: Vec::new(),
            timers: BinaryHeap::new(),
            buffer: vec![0; CHUNK],
        })
    }

    fn run(&mut self) -> Result<()> {
        let mut dump = self.signal_pipe(&[SIGUSR1], DUMP)?;
        let _stop = self.signal_pipe(&[SIGTERM, SIGINT], STOP)?;
        let mut events = Events::with_capacity(1024);
        loop {
            let timeout =
                self.timers.peek().map(|Reverse((at, _))| at.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            for event in &events {
                match event.token() {
                    LISTENER => self.accept()?,
                    STOP => return self.dump(),
                    DUMP => {
                        // Emptied: the pipe reports each signal once.
                        while dump.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
                        self.dump()?;
                    }
                    Token(index) => self.serve(index),
                }
            }
            let now = Instant::now();
            while let Some(Reverse((at, index))) = self.timers.peek().copied()
                && at <= now
            {
                self.timers.pop();
                self.serve(index);
            }
        }
    }

    fn signal_pipe(&self, signals: &[i32], token: Token) -> Result<UnixStream> {
        let (sender, receiver) = std::os::unix::net::UnixStream::pair()?;
        for signal in signals {
            signal_hook::low_level::pipe::register(*signal, sender.try_clone()?)?;
        }
        receiver.set_nonblocking(true)?;
        let mut receiver = UnixStream::from_std(receiver);
        self.poll.registry().register(&mut receiver, token, Interest::READABLE)?;
        Ok(receiver)
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let (mut stream, address) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The client gave up before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error).context("accepting (too many open files?)"),
            };
            stream.set_nodelay(true)?;
            if let Some(seconds) = self.arguments.keepalive {
                setsockopt(&stream, sockopt::TcpKeepIdle, &seconds)?;
                setsockopt(&stream, sockopt::TcpKeepInterval, &seconds)?;
                setsockopt(&stream, sockopt::TcpKeepCount, &2)?;
                setsockopt(&stream, sockopt::KeepAlive, &true)?;
            }
            let index = self.peers.len();
            self.poll.registry().register(
                &mut stream,
                Token(index),
                Interest::READABLE | Interest::WRITABLE,
            )?;
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            self.peers.push(Peer::new(stream, address));
            if let Some(delay_ms) = self.arguments.greet {
                let at = Instant::now() + Duration::from_millis(delay_ms);
                self.peers[index].pending.push_back((at, 0, GREETING_ENTRY));
                self.timers.push(Reverse((at, index)));
            }
        }
    }

    /// Reads and writes as much as can be on one connection.
    fn serve(&mut self, index: usize) {
        let Some(peer) = self.peers.get_mut(index) else { return };
        // Only what the socket itself reports ends a connection; any error but these means the peer reset it.
        let outcome = peer
            .read(self.arguments, &self.never_answer, &mut self.buffer)
            .and_then(|()| peer.write(self.arguments));
        if outcome.is_err() {
            peer.end(End::Rst);
            return;
        }
        let answered = peer.pending.is_empty() && peer.current.is_none() && peer.out.is_empty();
        if peer.half_closed && answered {
            let end = if peer.record.end == End::Server { End::Server } else { End::Fin };
            peer.end(end);
            return;
        }
        let now = Instant::now();
        if let Some((at, ..)) = peer.pending.front()
            && *at > now
        {
            self.timers.push(Reverse((*at, index)));
        }
        if peer.read_at > now {
            self.timers.push(Reverse((peer.read_at, index)));
        }
    }

    fn dump(&self) -> Result<()> {
        let connections = self.peers.iter().map(Peer::to_record).collect();
        let text = serde_json::to_string(&Record { connections })?;
        let Some(path) = &self.arguments.out else {
            println!("{text}");
            return Ok(());
        };
        // A reader sees the old record or the new one, never half of one.
        let unfinished = path.with_extension("unfinished");
        fs::write(&unfinished, text).with_context(|| format!("writing {}", unfinished.display()))?;
        fs::rename(&unfinished, path).with_context(|| format!("writing {}", path.display()))
    }
}

/// A "length" that no response has, for the greeting in the queue of responses.
const GREETING_ENTRY: u32 = u32::MAX;

impl Peer {
    fn new(stream: TcpStream, address: SocketAddr) -> Self {
        Self {
            stream: Some(stream),
            record: Connection {
                peer: address.to_string(),
                bytes: 0,
                hash: String::new(),
                ids: Vec::new(),
                times_us: Vec::new(),
                opened_us: epoch_us(),
                ended_us: None,
                early: 0,
                at_boundary: true,
                end: End::Open,
                mismatch: None,
            },
            hash: StreamHash::default(),
            reader: Reader::default(),
            pending: VecDeque::new(),
            current: None,
            out: Vec::new(),
            written: 0,
            responses: 0,
            half_closed: false,
            read_at: Instant::now(),
        }
    }

    fn read(
        &mut self,
        arguments: &Arguments,
        never: &HashSet<u64>,
        buffer: &mut [u8],
    ) -> std::io::Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let mut share = usize::MAX;
        if let Some(rate) = arguments.slow_read {
            let now = Instant::now();
            if self.read_at > now {
                return Ok(());
            }
            share = ((rate as f64 * SLOW_READ_INTERVAL.as_secs_f64()) as usize).max(1);
            self.read_at = now + SLOW_READ_INTERVAL;
        }
        while !self.half_closed && share > 0 {
            let limit = buffer.len().min(share);
            let count = match stream.read(&mut buffer[..limit]) {
                Ok(0) => {
                    self.half_closed = true;
                    break;
                }
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // Nothing to come back for: the socket will say when there is.
                    self.read_at = Instant::now();
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            share -= count;
            self.hash.update(&buffer[..count]);
            let busy = !self.pending.is_empty() || self.current.is_some() || !self.out.is_empty();
            self.record.early += u64::from(busy && self.reader.at_boundary());
            let (now, now_us) = (Instant::now(), epoch_us());
            let (ids, times, pending) = (&mut self.record.ids, &mut self.record.times_us, &mut self.pending);
            let result = self.reader.requests(&buffer[..count], |request: RequestHeader| {
                ids.push(request.id);
                times.push(now_us);
                if !never.contains(&request.id) {
                    let start = pending.back().map_or(now, |(before, ..)| now.max(*before));
                    let delay = Duration::from_millis(arguments.delay_ms + u64::from(request.delay_ms));
                    let length = (f64::from(request.response) * arguments.response_scale) as u32;
                    pending.push_back((start + delay, request.id, length));
                }
            });
            if let Err(mismatch) = result {
                self.record.mismatch =
                    Some(format!("byte {}: expected {}", mismatch.offset, mismatch.expected));
            }
        }
        Ok(())
    }

    fn write(&mut self, arguments: &Arguments) -> std::io::Result<()> {
        loop {
            self.produce(arguments);
            let Some(stream) = &mut self.stream else { return Ok(()) };
            if self.out.is_empty() {
                if arguments.close_after.is_some_and(|count| self.responses >= count)
                    && self.record.end == End::Open
                {
                    self.record.end = End::Server;
                    stream.shutdown(Shutdown::Write)?;
                }
                return Ok(());
            }
            match stream.write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.written == self.out.len() {
                self.out.clear();
                self.written = 0;
            }
        }
    }

    /// Makes bytes of responses that may begin, as many as fit into a chunk.
    fn produce(&mut self, arguments: &Arguments) {
        let now = Instant::now();
        while self.out.len() < CHUNK {
            if let Some((id, length, done)) = self.current {
                let next = length.min(done + CHUNK as u32);
                append_body(id, done, next, &mut self.out);
                self.current = (next < length).then_some((id, length, next));
                self.responses += u64::from(next == length);
                continue;
            }
            let closed = arguments.close_after.is_some_and(|count| self.responses >= count);
            match self.pending.front() {
                _ if closed => {
                    self.pending.clear();
                    return;
                }
                Some((_, _, GREETING_ENTRY)) if self.pending[0].0 <= now => {
                    self.out.extend_from_slice(GREETING);
                    self.pending.pop_front();
                }
                Some(&(at, id, length)) if at <= now => {
                    self.out.extend_from_slice(&response_header(id, length));
                    self.current = Some((id, length, 0));
                    self.pending.pop_front();
                }
                _ => return,
            }
        }
    }

    /// Closes it and frees what only an open connection needs.
    fn end(&mut self, end: End) {
        self.stream = None;
        self.record.ended_us = Some(epoch_us());
        self.record.end = end;
        self.pending = VecDeque::new();
        self.current = None;
        self.out = Vec::new();
    }

    fn to_record(&self) -> Connection {
        Connection {
            bytes: self.hash.length(),
            hash: self.hash.hex(),
            at_boundary: self.reader.at_boundary(),
            ..self.record.clone()
        }
    }
}

fn epoch_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64)
}
