//! The worker's side of the return channel.
//!
//! No thread and no clock of its own, nothing that blocks, no allocation per record: the worker's loop calls
//! [`Client::drive`] when the socket is ready or [`Client::deadline`] has come, and [`Client::flush`] once a turn.

use super::limits::{
    BACKOFF, CLIENT_QUEUE, CONNECT_TIMEOUT, HEARTBEAT, MAX_BODY, MAX_KEY, MAX_SERVICES, SILENCE,
};
use super::queue::{InBuffer, OutQueue, Received};
use super::wire::{self, Entry, Hello, Kind, Message, Refusal, ServiceEntry, VERSION, WireError};
use mio::net::TcpStream;
use replayer_common::response::ResponseHeader;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

/// What a worker is told when the channel does not work: the cause, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// No TCP connection.
    #[error(
        "cannot reach the assistant at {assistant}: {cause}; start `replayer assistant` there, and check the address, \
         the port and the firewalls on the path"
    )]
    Unreachable {
        /// Whom the worker tried to reach.
        assistant: SocketAddr,
        /// The operating system's error.
        cause: io::Error,
    },
    /// The assistant answered with a reason.
    #[error(
        "the assistant at {assistant} refused this worker: {reason} (its protocol version is {version}, ours {VERSION})"
    )]
    Refused {
        /// Who refused.
        assistant: SocketAddr,
        /// Why.
        reason: Refusal,
        /// The assistant's protocol version.
        version: u16,
    },
    /// Connected, but nobody says welcome.
    #[error(
        "{assistant} accepted the connection but did not answer within {} s; check that `replayer assistant` is what \
         listens there, and that it is not stopped", CONNECT_TIMEOUT / 1_000_000_000
    )]
    NoAnswer {
        /// Who is silent.
        assistant: SocketAddr,
    },
    /// What came is not the protocol.
    #[error(
        "{assistant} does not speak the return channel's protocol ({cause}); check the address and the port"
    )]
    Stranger {
        /// Who sent it.
        assistant: SocketAddr,
        /// What was wrong with it.
        cause: WireError,
    },
    /// An established connection ended.
    #[error(
        "the assistant at {assistant} closed the connection; it has stopped, or something on the path broke it"
    )]
    Closed {
        /// Who closed it.
        assistant: SocketAddr,
    },
    /// An established connection went silent.
    #[error(
        "nothing came from the assistant at {assistant} for {} s; its host, the process or the path is down",
        SILENCE / 1_000_000_000
    )]
    Silent {
        /// Who is silent.
        assistant: SocketAddr,
    },
    /// The settings cannot work.
    #[error("{0}")]
    Settings(String),
}

/// Whom to connect to, and as what.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The assistant.
    pub assistant: SocketAddr,
    /// The shared key; may be empty.
    pub key: Vec<u8>,
    /// The process: [`super::random_instance`], the same for all of its workers.
    pub instance: u64,
    /// The worker's number in its process.
    pub worker: u16,
    /// The services: a number of the worker's choice, the protocol, and the target.
    pub services: Vec<ServiceEntry>,
}

/// Plain counters of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ClientCounters {
    /// Attempts to connect.
    pub attempts: u64,
    /// Times that the assistant said welcome.
    pub connects: u64,
    /// Header records received.
    pub headers: u64,
    /// Registrations queued.
    pub registered: u64,
    /// Registrations and unregistrations that found the queue full; a renewal makes up for them.
    pub overflows: u64,
    /// Of the current connection, as the assistant says: records that it sent.
    pub assistant_sent: u64,
    /// Of the current connection, as the assistant says: records that it dropped because this worker was slow.
    pub assistant_dropped: u64,
}

enum State {
    /// Not connected; the next attempt is due at `retry_at`.
    Waiting { retry_at: u64 },
    /// connect(2) is under way.
    Connecting { stream: TcpStream, until: u64 },
    /// The hello is on its way.
    Greeting { stream: TcpStream, until: u64 },
    /// Welcome.
    Up { stream: TcpStream },
}

/// One worker's connection to one assistant. Times are nanoseconds of one monotonic clock.
pub struct Client {
    config: ClientConfig,
    state: State,
    backoff: u64,
    input: InBuffer,
    output: OutQueue,
    last_received: u64,
    last_sent: u64,
    renewal_due: bool,
    is_former: bool,
    error: Option<ChannelError>,
    counters: ClientCounters,
}

impl Client {
    /// A channel that connects at the first [`Client::drive`].
    ///
    /// # Errors
    /// [`ChannelError::Settings`] when the key or the number of services is over the limit, or there are no services.
    pub fn new(config: ClientConfig) -> Result<Client, ChannelError> {
        if config.key.len() > MAX_KEY {
            return Err(ChannelError::Settings(format!(
                "--key is {} bytes long; use at most {MAX_KEY}",
                config.key.len()
            )));
        }
        if config.services.is_empty() || config.services.len() > MAX_SERVICES {
            return Err(ChannelError::Settings(format!(
                "{} services; an assistant takes 1 to {MAX_SERVICES} of a worker",
                config.services.len()
            )));
        }
        Ok(Client {
            config,
            state: State::Waiting { retry_at: 0 },
            backoff: BACKOFF.0,
            input: InBuffer::default(),
            output: OutQueue::new(CLIENT_QUEUE, CLIENT_QUEUE),
            last_received: 0,
            last_sent: 0,
            renewal_due: false,
            is_former: false,
            error: None,
            counters: ClientCounters::default(),
        })
    }

    /// Whom it connects to.
    pub fn assistant(&self) -> SocketAddr {
        self.config.assistant
    }

    /// The socket to wait for, if there is one. Another one after each reconnect. Level-triggered readiness is assumed
    /// (poll(2)): after one [`Client::drive`] there may be more to read.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Waiting { .. } => None,
            State::Connecting { stream, .. } | State::Greeting { stream, .. } | State::Up { stream } => {
                Some(stream.as_fd())
            }
        }
    }

    /// Whether to wait for the socket to become writable too.
    pub fn wants_write(&self) -> bool {
        matches!(self.state, State::Connecting { .. }) || !self.output.is_empty()
    }

    /// When [`Client::drive`] must be called even if the socket is not ready.
    pub fn deadline(&self) -> u64 {
        match self.state {
            State::Waiting { retry_at } => retry_at,
            State::Connecting { until, .. } | State::Greeting { until, .. } => until,
            State::Up { .. } => (self.last_sent + HEARTBEAT).min(self.last_received + SILENCE),
        }
    }

    /// The key from the next hello on.
    pub fn set_key(&mut self, key: Vec<u8>) {
        self.config.key = key;
    }

    /// Whether the assistant is one for a short while only.
    pub fn is_former(&self) -> bool {
        self.is_former
    }

    /// Says whether the assistant is one for a short while only.
    pub fn set_former(&mut self, is_former: bool) {
        self.is_former = is_former;
    }

    /// Whether the assistant has said welcome and the connection stands.
    pub fn is_connected(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// The last trouble; `None` once connected.
    pub fn error(&self) -> Option<&ChannelError> {
        self.error.as_ref()
    }

    /// The counters.
    pub fn counters(&self) -> &ClientCounters {
        &self.counters
    }

    /// Whether the assistant does not know all of this worker's identities. The worker then calls
    /// [`Client::begin_renewal`], registers all live identities over as many turns as [`Client::room`] asks for, and
    /// calls [`Client::end_renewal`]. When this turns true again meanwhile, it begins anew.
    pub fn needs_renewal(&self) -> bool {
        self.renewal_due && self.is_connected()
    }

    /// Opens a renewal: see [`Client::needs_renewal`]. `false` when it has to be tried again later.
    pub fn begin_renewal(&mut self) -> bool {
        let begun = self.is_connected() && self.output.push_message(Kind::RenewBegin, &[]);
        if begun {
            self.renewal_due = false;
        }
        begun
    }

    /// Ends a renewal: the assistant forgets what was not registered since it began. Does nothing if an overflow or a
    /// reconnect has made a new renewal due. `false` when it has to be called again later.
    pub fn end_renewal(&mut self) -> bool {
        self.renewal_due || !self.is_connected() || self.output.push_message(Kind::RenewEnd, &[])
    }

    /// Tells the assistant that sessions wait for responses and are behind: it then batches nothing for
    /// [`super::limits::HURRY`].
    pub fn hurry(&mut self) {
        if self.is_connected() {
            // Without room the assistant is busy anyway.
            self.output.push_message(Kind::Hurry, &[]);
        }
    }

    /// How many registrations the queue has room for.
    pub fn room(&self) -> usize {
        if self.is_connected() { self.output.room(Entry::SIZE) } else { 0 }
    }

    /// Asks for the responses to an identity. Without a connection nothing is queued: the renewal that follows a connect
    /// covers it. When the queue is full it is counted, and a renewal becomes due.
    #[inline]
    pub fn register(&mut self, identity: Entry) {
        self.counters.registered += u64::from(self.queue(Kind::Register, identity));
    }

    /// Takes an identity back; otherwise like [`Client::register`].
    #[inline]
    pub fn unregister(&mut self, identity: Entry) {
        self.queue(Kind::Unregister, identity);
    }

    #[inline]
    fn queue(&mut self, kind: Kind, identity: Entry) -> bool {
        if !self.is_connected() {
            return false;
        }
        let queued = self.output.push_record(kind, &identity.encode());
        if !queued {
            self.counters.overflows += 1;
            self.renewal_due = true;
        }
        queued
    }

    /// Connects, reads once what is there, and hands each header record to `sink`; keeps the connection alive. Never
    /// blocks; a broken connection is closed and tried again after a pause, see [`Client::error`].
    pub fn drive(&mut self, now: u64, mut sink: impl FnMut(&ResponseHeader)) {
        if let Err(error) = self.try_drive(now, &mut sink) {
            self.fail(now, error);
        }
    }

    /// Writes what is queued, once. Call it at the end of a turn of the loop; costs no system call when nothing is.
    pub fn flush(&mut self, now: u64) {
        if !self.output.is_empty()
            && let Err(error) = self.try_flush(now)
        {
            self.fail(now, error);
        }
    }

    /// For the start of a role: drives the channel until it is up, or fails with the reason. `clock` gives the time.
    ///
    /// # Errors
    /// The first [`ChannelError`] met; the channel goes on trying afterwards if it is driven.
    pub fn wait_until_up(&mut self, clock: impl Fn() -> u64) -> Result<(), ChannelError> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            self.drive(clock(), |_| {});
            if self.is_connected() {
                return Ok(());
            }
            if let Some(error) = self.error.take() {
                return Err(error);
            }
            let wait = self.deadline().saturating_sub(clock()).div_ceil(1_000_000);
            let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
            if let Some(fd) = self.fd() {
                let write = if self.wants_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
                // An error here (EINTR) only means that the next turn comes early.
                let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN | write)], timeout);
            }
        }
    }

    fn try_drive(&mut self, now: u64, sink: &mut impl FnMut(&ResponseHeader)) -> Result<(), ChannelError> {
        self.advance(now)?;
        if matches!(self.state, State::Greeting { .. } | State::Up { .. }) {
            self.receive(now, sink)?;
        }
        match self.state {
            State::Greeting { until, .. } if now >= until => {
                return Err(ChannelError::NoAnswer { assistant: self.config.assistant });
            }
            State::Up { .. } if now >= self.last_received + SILENCE => {
                return Err(ChannelError::Silent { assistant: self.config.assistant });
            }
            State::Up { .. } if now >= self.last_sent + HEARTBEAT && self.output.is_empty() => {
                self.output.push_message(Kind::Heartbeat, &[]);
            }
            _ => {}
        }
        // A hello, a heartbeat, or the rest of what the socket did not take before.
        if self.output.is_empty() { Ok(()) } else { self.try_flush(now) }
    }

    /// Takes the states before the hello as far as they go.
    fn advance(&mut self, now: u64) -> Result<(), ChannelError> {
        let assistant = self.config.assistant;
        let unreachable = |cause| ChannelError::Unreachable { assistant, cause };
        if let State::Waiting { retry_at } = self.state
            && now >= retry_at
        {
            self.counters.attempts += 1;
            let stream = TcpStream::connect(assistant).map_err(unreachable)?;
            self.state = State::Connecting { stream, until: now + CONNECT_TIMEOUT };
        }
        let State::Connecting { stream, until } = &self.state else { return Ok(()) };
        if let Some(cause) = stream.take_error().map_err(unreachable)? {
            return Err(unreachable(cause));
        }
        if stream.peer_addr().is_err() {
            // Not connected yet, and no error: connect(2) is still under way.
            return if now < *until { Ok(()) } else { Err(unreachable(io::ErrorKind::TimedOut.into())) };
        }
        stream.set_nodelay(true).map_err(unreachable)?;
        if let State::Connecting { stream, .. } = self.take_state(now) {
            self.state = State::Greeting { stream, until: now + CONNECT_TIMEOUT };
            self.last_received = now;
            self.greet();
        }
        Ok(())
    }

    /// Queues hello and services; the queue is empty before, and has room for them: asserted below.
    fn greet(&mut self) {
        const {
            let hello = 25 + MAX_KEY;
            let services = MAX_SERVICES * ServiceEntry::SIZE;
            assert!(hello + services + 3 * wire::FRAMING + MAX_BODY <= CLIENT_QUEUE);
        }
        let (body, length) = wire::hello(&Hello {
            instance: self.config.instance,
            worker: self.config.worker,
            attempt: self.counters.attempts as u32,
            key: &self.config.key,
        });
        self.output.push_message(Kind::Hello, &body[..length]);
        for service in &self.config.services {
            self.output.push_record(Kind::Services, &service.encode());
        }
    }

    fn receive(&mut self, now: u64, sink: &mut impl FnMut(&ResponseHeader)) -> Result<(), ChannelError> {
        let assistant = self.config.assistant;
        let (State::Greeting { stream, .. } | State::Up { stream }) = &mut self.state else { return Ok(()) };
        let received = self.input.read_from(stream);
        if let Ok(Received::Bytes(_)) = received {
            self.last_received = now;
        }
        let stranger = |cause| ChannelError::Stranger { assistant, cause };
        while let Some((message, used)) = wire::decode(self.input.data()).map_err(stranger)? {
            let up = matches!(self.state, State::Up { .. });
            let mut welcome = false;
            match message {
                Message::Headers(records) if up => {
                    self.counters.headers += records.len() as u64;
                    for record in records {
                        sink(&ResponseHeader::decode(record));
                    }
                }
                Message::Counters { sent, dropped } if up => {
                    self.counters.assistant_sent = sent;
                    self.counters.assistant_dropped = dropped;
                }
                Message::Welcome { .. } if !up => welcome = true,
                Message::Refused { reason, version } => {
                    return Err(ChannelError::Refused { assistant, reason, version });
                }
                _ => return Err(stranger(WireError::Malformed)),
            }
            self.input.consume(used);
            if welcome {
                self.welcomed(now);
            }
        }
        match received {
            Ok(Received::End) => Err(ChannelError::Closed { assistant }),
            Ok(_) => Ok(()),
            // A reset: the assistant died, or its host came back without it.
            Err(_) => Err(ChannelError::Closed { assistant }),
        }
    }

    fn welcomed(&mut self, now: u64) {
        if let State::Greeting { stream, .. } = self.take_state(now) {
            self.state = State::Up { stream };
        }
        self.backoff = BACKOFF.0;
        self.renewal_due = true;
        self.counters.connects += 1;
        if self.error.take().is_some() || self.counters.connects > 1 {
            log::info!("connected to the assistant at {} again", self.config.assistant);
        }
    }

    fn take_state(&mut self, now: u64) -> State {
        std::mem::replace(&mut self.state, State::Waiting { retry_at: now })
    }

    fn try_flush(&mut self, now: u64) -> Result<(), ChannelError> {
        let (State::Greeting { stream, .. } | State::Up { stream }) = &mut self.state else { return Ok(()) };
        match self.output.write_to(stream) {
            Ok(0) => Ok(()),
            Ok(_) => {
                self.last_sent = now;
                Ok(())
            }
            // A refusal may wait to be read behind the error: the next drive finds it, or the end of the stream.
            Err(_) if matches!(self.state, State::Greeting { .. }) => {
                self.output.clear();
                Ok(())
            }
            Err(_) => Err(ChannelError::Closed { assistant: self.config.assistant }),
        }
    }

    /// Closes, says why (once for each kind of trouble), and plans the next attempt.
    fn fail(&mut self, now: u64, error: ChannelError) {
        let same = self
            .error
            .as_ref()
            .is_some_and(|before| std::mem::discriminant(before) == std::mem::discriminant(&error));
        // Who waits for the first connection is told by an error.
        if !same && self.counters.connects > 0 {
            log::warn!("{error}; trying again");
        }
        self.error = Some(error);
        self.state = State::Waiting { retry_at: now + self.backoff };
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        self.input.clear();
        self.output.clear();
    }
}
