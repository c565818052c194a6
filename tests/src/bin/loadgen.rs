//! A TCP client that drives `stream-server`, or any HTTP/1.1 server, at a given rate or as fast as it answers.
//!
//! One thread, asleep between events. Every request has an id of its own, every answer is checked against the request it
//! belongs to, and the summary says of every connection what was sent, received, and how it ended. Runs are bounded: by
//! `--requests`, by `--seconds`, and by `--patience` for answers that do not come.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Parser, ValueEnum};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use replayer_tests::http;
use replayer_tests::load::{ConnectionSummary, Latencies, Random, Summary};
use replayer_tests::process::raise_file_limit;
use replayer_tests::stream::{self, GREETING, RequestHeader, StreamHash};

/// Drives a server and checks its answers.
#[derive(Debug, Parser)]
struct Arguments {
    /// Server to connect to.
    #[arg(long, value_name = "IP:PORT")]
    connect: SocketAddr,
    /// What is spoken on the connections.
    #[arg(long, value_enum, default_value_t = Protocol::Stream)]
    protocol: Protocol,
    /// Connections open at once.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Requests of one connection, after which another takes its place; 0: no end.
    #[arg(long, default_value_t = 0)]
    per_connection: u64,
    /// Requests in all.
    #[arg(long)]
    requests: Option<u64>,
    /// Begin no request after this time.
    #[arg(long)]
    seconds: Option<f64>,
    /// Requests per second over all connections, instead of as fast as they are answered.
    #[arg(long)]
    rate: Option<f64>,
    /// When the requests of a rate begin.
    #[arg(long, value_enum, default_value_t = Arrivals::Ticks)]
    arrivals: Arrivals,
    /// Requests of one connection that may be under way at once.
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
    /// Pause of a connection between an answer and the next request.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    think_ms: u64,
    /// Length of request bodies, `N` or `MIN-MAX`, uniformly distributed. HTTP: POST where it is not 0.
    #[arg(long, value_parser = parse_range, default_value = "0")]
    body: RangeInclusive<u32>,
    /// Length of response bodies that are asked for (stream protocol).
    #[arg(long, value_parser = parse_range, default_value = "16")]
    response: RangeInclusive<u32>,
    /// Delay that the server is asked for before each response (stream protocol).
    #[arg(long, value_name = "MS", default_value_t = 0)]
    delay_ms: u32,
    /// Path of the requests (HTTP); `?id=N` is added.
    #[arg(long, default_value = "/r")]
    path: String,
    /// Value that the header X-Server of every answer must have (HTTP).
    #[arg(long)]
    expect_server: Option<String>,
    /// The server speaks first (stream protocol).
    #[arg(long)]
    greet: bool,
    /// Source addresses, used in turn.
    #[arg(long, value_delimiter = ',')]
    source: Vec<IpAddr>,
    /// Source port of the first connection; the others count up from it, once all source addresses have had it. Without it
    /// the kernel chooses.
    #[arg(long)]
    source_port: Option<u16>,
    /// How a connection that is done is closed.
    #[arg(long, value_enum, default_value_t = Close::Fin)]
    close: Close,
    /// First request id.
    #[arg(long, default_value_t = 1)]
    first_id: u64,
    /// Seed of the lengths.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long to wait for answers after the last request.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    patience: f64,
    /// Where the summary goes, with its list of connections; standard output gets it without.
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Protocol {
    /// The messages of the project's own stream-server.
    Stream,
    /// HTTP/1.1.
    Http,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Arrivals {
    /// Evenly; those of a millisecond at once when nothing else wakes the program in it.
    Ticks,
    /// Independently of each other, as from many clients (a Poisson process), each at its own time.
    Poisson,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Close {
    /// After the last answer.
    Fin,
    /// After the last answer, by a reset.
    Rst,
    /// FIN right after the last request; the answers are read to the server's FIN.
    Half,
    /// After the server's FIN, so that the port can be used again at once.
    Last,
}

/// Bytes read from a socket at once.
const CHUNK: usize = 64 * 1024;
/// Pause before a connection that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Failed connections after which the run is given up.
const MAX_FAILURES: u64 = 10_000;

fn parse_range(text: &str) -> Result<RangeInclusive<u32>> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (low.parse()?, high.parse()?);
    ensure!(low <= high && high <= stream::MAX_BODY, "a range goes from a smaller to a larger number");
    Ok(low..=high)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.requests.is_none() && arguments.seconds.is_none() {
        bail!("a run needs an end: --requests or --seconds");
    }
    raise_file_limit()?;
    let mut summary = Load::new(&arguments)?.run()?;
    if let Some(path) = &arguments.out {
        fs::write(path, serde_json::to_string(&summary)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    summary.connections = Vec::new();
    println!("{}", serde_json::to_string(&summary)?);
    Ok(())
}

struct Load<'a> {
    arguments: &'a Arguments,
    poll: Poll,
    slots: Vec<Slot>,
    /// Slots that open their connection or may send again, and when.
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    random: Random,
    started: Instant,
    /// Requests begun.
    begun: u64,
    opened: u64,
    /// Requests that open connections may still begin, where each has a number of its own: no more are opened than it takes.
    reserved: u64,
    /// When the next request is to begin (rate mode).
    due: Duration,
    /// Where the search for a slot for the next request begins (rate mode).
    next_slot: usize,
    latencies: Latencies,
    summary: Summary,
    buffer: Vec<u8>,
}

/// The place of one connection at a time.
#[derive(Default)]
struct Slot {
    connection: Option<Connection>,
}

struct Connection {
    stream: TcpStream,
    connected: bool,
    /// The server still has to speak first.
    greeting: Option<Vec<u8>>,
    sent_fin: bool,
    /// Requests begun on this connection.
    begun: u64,
    /// Not before this is the next one begun.
    next_at: Instant,
    under_way: VecDeque<(u64, Instant)>,
    answered: u64,
    out: Vec<u8>,
    written: usize,
    responses: Responses,
    sent: StreamHash,
    received: StreamHash,
}

/// What reads the answers.
enum Responses {
    Stream(stream::Reader),
    Http(http::Reader),
}

/// Why a connection is over.
#[derive(Clone, Copy)]
enum Over {
    Done,
    Reset,
    /// The server's FIN came before the last answer.
    Early,
    /// An answer was not what was asked for.
    Wrong,
    GivenUp,
}

impl Over {
    fn name(self) -> &'static str {
        match self {
            Over::Done => "done",
            Over::Reset => "reset",
            Over::Early => "closed by the server",
            Over::Wrong => "wrong answer",
            Over::GivenUp => "given up",
        }
    }
}

impl<'a> Load<'a> {
    fn new(arguments: &'a Arguments) -> Result<Self> {
        Ok(Self {
            arguments,
            poll: Poll::new()?,
            slots: (0..arguments.connections).map(|_| Slot::default()).collect(),
            timers: BinaryHeap::new(),
            random: Random::new(arguments.seed),
            started: Instant::now(),
            begun: 0,
            opened: 0,
            reserved: 0,
            due: Duration::ZERO,
            next_slot: 0,
            latencies: Latencies::default(),
            summary: Summary::default(),
            buffer: vec![0; CHUNK],
        })
    }

    fn run(mut self) -> Result<Summary> {
        let now = Instant::now();
        for index in 0..self.slots.len() {
            self.timers.push(Reverse((now, index)));
        }
        let mut events = Events::with_capacity(1024);
        let mut ended: Option<Instant> = None;
        loop {
            let now = Instant::now();
            while let Some(Reverse((at, index))) = self.timers.peek().copied()
                && at <= now
            {
                self.timers.pop();
                self.drive(index)?;
            }
            self.begin_what_is_due()?;
            if self.is_over() {
                let since = *ended.get_or_insert(now);
                let patience = Duration::from_secs_f64(self.arguments.patience);
                let open: Vec<usize> =
                    (0..self.slots.len()).filter(|&n| self.slots[n].connection.is_some()).collect();
                if open.is_empty() {
                    break;
                }
                for index in open {
                    if now.duration_since(since) >= patience {
                        self.close(index, Over::GivenUp)?;
                    } else if ended == Some(now) {
                        self.drive(index)?; // Those without a request under way close now.
                    }
                }
            }
            ensure!(self.summary.errors <= MAX_FAILURES, "{MAX_FAILURES} connections failed: giving up");
            match self.wait(&mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            for event in &events {
                self.drive(event.token().0)?;
            }
        }
        let elapsed = ended.unwrap_or_else(Instant::now).duration_since(self.started);
        self.summary.finish(&mut self.latencies, self.begun, elapsed);
        Ok(self.summary)
    }

    /// Whether no further request is to begin.
    fn is_over(&self) -> bool {
        self.arguments.requests.is_some_and(|all| self.begun >= all)
            || self.arguments.seconds.is_some_and(|limit| self.started.elapsed().as_secs_f64() >= limit)
    }

    /// Waits for sockets and for the next time at which there is something to do.
    fn wait(&mut self, events: &mut Events) -> std::io::Result<()> {
        let mut pause = self.pause();
        if self.arguments.arrivals == Arrivals::Poisson {
            // The poller's clock ticks in milliseconds, that of ppoll(2) does not.
            // SAFETY: the poller is open, here and until the call is over.
            let poller = unsafe { BorrowedFd::borrow_raw(self.poll.as_raw_fd()) };
            let mut fds = [PollFd::new(poller, PollFlags::POLLIN)];
            ppoll(&mut fds, Some(TimeSpec::from_duration(pause)), None)?;
            pause = Duration::ZERO;
        }
        self.poll.poll(events, Some(pause))
    }

    /// How long there is nothing to do unless a socket says so.
    fn pause(&self) -> Duration {
        let now = Instant::now();
        let mut pause = Duration::from_millis(200);
        if let Some(Reverse((at, _))) = self.timers.peek() {
            pause = pause.min(at.saturating_duration_since(now));
        }
        if !self.is_over() {
            if self.arguments.rate.is_some() {
                let ahead = self.due.saturating_sub(self.started.elapsed());
                // What is due already waits for a connection. What falls due within a tick goes out as a batch.
                let exact = self.arguments.arrivals == Arrivals::Poisson && !ahead.is_zero();
                pause = pause.min(if exact { ahead } else { ahead.max(Duration::from_millis(1)) });
            }
            if let Some(limit) = self.arguments.seconds {
                pause = pause.min(Duration::from_secs_f64(limit).saturating_sub(self.started.elapsed()));
            }
        }
        pause
    }

    /// Rate mode: begins the requests whose time has come, each on the next connection that is free.
    fn begin_what_is_due(&mut self) -> Result<()> {
        let Some(rate) = self.arguments.rate else { return Ok(()) };
        while !self.is_over() && self.due <= self.started.elapsed() {
            let count = self.slots.len();
            let free =
                (0..count).map(|step| (self.next_slot + step) % count).find(|&index| self.is_free(index));
            let Some(index) = free else { return Ok(()) };
            self.next_slot = (index + 1) % count;
            self.begin(index);
            self.due += Duration::from_secs_f64(match self.arguments.arrivals {
                Arrivals::Ticks => 1.0 / rate,
                Arrivals::Poisson => self.random.interval(rate),
            });
            self.flush(index)?;
            self.finish(index)?;
        }
        Ok(())
    }

    fn is_free(&self, index: usize) -> bool {
        let Some(connection) = &self.slots[index].connection else { return false };
        connection.connected
            && connection.greeting.is_none()
            && !connection.sent_fin
            && connection.under_way.len() < self.arguments.pipeline
            && !self.is_exhausted(connection)
            && connection.next_at <= Instant::now()
    }

    fn is_exhausted(&self, connection: &Connection) -> bool {
        self.arguments.per_connection > 0 && connection.begun >= self.arguments.per_connection
    }

    /// Whatever can be done on a slot now: open, read, begin requests, write, close.
    fn drive(&mut self, index: usize) -> Result<()> {
        if self.slots[index].connection.is_none() {
            let enough = self.arguments.requests.is_some_and(|all| self.begun + self.reserved >= all);
            return if enough || self.is_over() { Ok(()) } else { self.open(index) };
        }
        if let Err(over) = self.read(index) {
            return self.close(index, over);
        }
        if self.arguments.rate.is_none() {
            while !self.is_over() && self.is_free(index) {
                self.begin(index);
            }
        }
        self.flush(index)?;
        self.finish(index)
    }

    /// Half-closes or closes a connection that has nothing more to ask.
    fn finish(&mut self, index: usize) -> Result<()> {
        let over = self.is_over();
        let Some(connection) = &self.slots[index].connection else { return Ok(()) };
        let no_more =
            connection.connected && (over || self.is_exhausted(connection)) && connection.out.is_empty();
        if !no_more {
            return Ok(());
        }
        if self.arguments.close == Close::Last {
            return Ok(());
        }
        if self.arguments.close == Close::Half {
            let Some(connection) = &mut self.slots[index].connection else { return Ok(()) };
            if !connection.sent_fin {
                connection.sent_fin = true;
                // A reset that came meanwhile is seen by the next read.
                let _ = connection.stream.shutdown(Shutdown::Write);
            }
            return Ok(());
        }
        if connection.under_way.is_empty() { self.close(index, Over::Done) } else { Ok(()) }
    }

    fn open(&mut self, index: usize) -> Result<()> {
        let target = SockaddrStorage::from(self.arguments.connect);
        let family =
            if self.arguments.connect.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
            .context("making a socket (too many open files?)")?;
        let sources = &self.arguments.source;
        if !sources.is_empty() || self.arguments.source_port.is_some() {
            let unspecified = if self.arguments.connect.is_ipv4() { "0.0.0.0" } else { "::" };
            let address = match sources.is_empty() {
                true => unspecified.parse()?,
                false => sources[self.opened as usize % sources.len()],
            };
            let port =
                self.arguments.source_port.map_or(0, |first| first + (index / sources.len().max(1)) as u16);
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            if port == 0 {
                // The port is chosen by connect(2), which knows the destination.
                setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            }
            let source = SocketAddr::new(address, port);
            bind(socket.as_raw_fd(), &SockaddrStorage::from(source))
                .with_context(|| format!("binding to {source}"))?;
        }
        self.opened += 1;
        match connect(socket.as_raw_fd(), &target) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => {
                self.fail(index, &format!("connecting: {error}"));
                return Ok(());
            }
        }
        let mut stream = TcpStream::from_std(socket.into());
        self.poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
        let responses = match self.arguments.protocol {
            Protocol::Stream => Responses::Stream(stream::Reader::default()),
            Protocol::Http => Responses::Http(http::Reader::new(self.arguments.expect_server.clone())),
        };
        self.reserved += self.arguments.per_connection;
        self.slots[index].connection = Some(Connection {
            stream,
            connected: false,
            greeting: self.arguments.greet.then(Vec::new),
            sent_fin: false,
            begun: 0,
            next_at: Instant::now(),
            under_way: VecDeque::new(),
            answered: 0,
            out: Vec::new(),
            written: 0,
            responses,
            sent: StreamHash::default(),
            received: StreamHash::default(),
        });
        Ok(())
    }

    /// Counts a connection that could not be made and tries again later.
    fn fail(&mut self, index: usize, message: &str) {
        self.summary.error(message);
        self.timers.push(Reverse((Instant::now() + RETRY_PAUSE, index)));
    }

    /// Reads until there is nothing more; an error says why the connection is over.
    fn read(&mut self, index: usize) -> Result<(), Over> {
        let exhausted =
            self.slots[index].connection.as_ref().is_some_and(|connection| self.is_exhausted(connection));
        let Some(connection) = &mut self.slots[index].connection else { return Ok(()) };
        if !connection.connected {
            match connection.stream.peer_addr() {
                Ok(_) => {
                    connection.connected = true;
                    // Small requests must not wait for the acknowledgement of the one before.
                    let _ = connection.stream.set_nodelay(true);
                }
                // Under way still, or refused, which is to be read from the socket.
                Err(_) => {
                    return match connection.stream.take_error() {
                        Ok(None) => Ok(()),
                        _ => Err(Over::Reset),
                    };
                }
            }
        }
        loop {
            let count = match connection.stream.read(&mut self.buffer) {
                Ok(0) if (connection.sent_fin || exhausted) && connection.under_way.is_empty() => {
                    return Err(Over::Done);
                }
                Ok(0) => return Err(Over::Early),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Err(Over::Reset),
            };
            let mut bytes = &self.buffer[..count];
            connection.received.update(bytes);
            if let Some(greeting) = &mut connection.greeting {
                let part = bytes.len().min(GREETING.len() - greeting.len());
                greeting.extend_from_slice(&bytes[..part]);
                bytes = &bytes[part..];
                if greeting.len() == GREETING.len() {
                    if greeting != GREETING {
                        return Err(Over::Wrong);
                    }
                    connection.greeting = None;
                }
            }
            let now = Instant::now();
            let (under_way, latencies) = (&mut connection.under_way, &mut self.latencies);
            let mut wrong = false;
            let mut answers = 0;
            let mut answer = |id: Option<u64>| match under_way.pop_front() {
                Some((expected, at)) if id.is_none_or(|id| id == expected) => {
                    latencies.add(now.duration_since(at));
                    answers += 1;
                }
                _ => wrong = true,
            };
            let result = match &mut connection.responses {
                Responses::Stream(reader) => {
                    reader.responses(bytes, |id| answer(Some(id))).map_err(|m| m.expected)
                }
                Responses::Http(reader) => reader.read(bytes, || answer(None)),
            };
            connection.answered += answers;
            self.summary.responses += answers;
            if answers > 0 && self.arguments.think_ms > 0 {
                connection.next_at = now + Duration::from_millis(self.arguments.think_ms);
                self.timers.push(Reverse((connection.next_at, index)));
            }
            if wrong || result.is_err() {
                return Err(Over::Wrong);
            }
        }
    }

    /// Puts the next request of a connection into its output.
    fn begin(&mut self, index: usize) {
        let id = self.arguments.first_id + self.begun;
        let body = self.random.within(&self.arguments.body);
        let response = self.random.within(&self.arguments.response);
        let per_connection = self.arguments.per_connection;
        let Some(connection) = &mut self.slots[index].connection else { return };
        self.begun += 1;
        self.reserved = self.reserved.saturating_sub(1);
        connection.begun += 1;
        let before = connection.out.len();
        match self.arguments.protocol {
            Protocol::Stream => {
                let header = RequestHeader { id, body, response, delay_ms: self.arguments.delay_ms };
                connection.out.extend_from_slice(&header.to_bytes());
            }
            Protocol::Http => {
                let last = per_connection > 0 && connection.begun == per_connection;
                let head = http::request(&self.arguments.path, id, self.arguments.connect, body, last);
                connection.out.extend_from_slice(head.as_bytes());
            }
        }
        stream::append_body(id, 0, body, &mut connection.out);
        connection.sent.update(&connection.out[before..]);
        connection.under_way.push_back((id, Instant::now()));
    }

    /// Writes as much as the socket takes.
    fn flush(&mut self, index: usize) -> Result<()> {
        let Some(connection) = &mut self.slots[index].connection else { return Ok(()) };
        while connection.written < connection.out.len() {
            match connection.stream.write(&connection.out[connection.written..]) {
                Ok(count) => connection.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.close(index, Over::Reset),
            }
        }
        connection.out.clear();
        connection.written = 0;
        Ok(())
    }

    /// Ends a connection, counts what became of it, and lets the next take its place.
    fn close(&mut self, index: usize, over: Over) -> Result<()> {
        let Some(mut connection) = self.slots[index].connection.take() else { return Ok(()) };
        self.reserved -= self.arguments.per_connection.saturating_sub(connection.begun);
        if !connection.connected {
            self.fail(index, &format!("connecting: {}", over.name()));
            return Ok(());
        }
        let local =
            connection.stream.local_addr().map_err(|error| anyhow!(error)).context("address of a socket")?;
        if self.arguments.close == Close::Rst {
            // Unsent and unread data are discarded and a reset goes out (tcp(7), SO_LINGER with time 0).
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&connection.stream, sockopt::Linger, &linger)?;
        }
        self.poll.registry().deregister(&mut connection.stream)?;
        if !matches!(over, Over::Done) {
            self.summary.error(over.name());
            self.summary.resets_received += u64::from(matches!(over, Over::Reset));
        }
        self.summary.unanswered += connection.under_way.len() as u64;
        self.summary.bytes_sent += connection.sent.length();
        self.summary.bytes_received += connection.received.length();
        self.summary.connections_used += 1;
        self.summary.connections.push(ConnectionSummary {
            local: local.to_string(),
            requests: connection.begun,
            answered: connection.answered,
            sent_bytes: connection.sent.length(),
            sent_hash: connection.sent.hex(),
            received_bytes: connection.received.length(),
            received_hash: connection.received.hex(),
            end: over.name().to_owned(),
        });
        self.timers.push(Reverse((Instant::now(), index)));
        Ok(())
    }
}
