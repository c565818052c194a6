//! The assistant's side of the return channel: the listening socket and its peers.
//!
//! It knows connections, messages and queues; what the messages mean is the [`Handler`]'s business. One thread, nothing
//! that blocks. The loop asks for [`Server::interests`], waits, hands the readiness to [`Server::drive`], sends with
//! [`Server::send`], and ends its turn with [`Server::flush`].

use super::limits::{
    ACCEPTS_PER_TURN, HEARTBEAT, HELLO_TIMEOUT, LOG_INTERVAL, MAX_KEY, MAX_PEERS, MAX_SERVICES,
    MAX_STRANGERS, PEER_QUEUE, REFUSED_LINGER, SILENCE,
};
use super::queue::{InBuffer, OutQueue, Received};
use super::wire::{self, Entry, Hello, Kind, Message, Refusal, ServiceEntry, WireError};
use nix::poll::{PollFd, PollFlags};
use replayer_common::addr::Endpoint;
use replayer_common::response::ResponseHeader;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

/// A connection, from its hello to [`Handler::closed`]. Numbers are used again afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerId(pub u16);

/// What the messages of peers lead to.
pub trait Handler {
    /// A worker said hello, with the right version and key. Answers which older connection of the same worker ends.
    ///
    /// # Errors
    /// Why the worker is refused.
    fn hello(&mut self, peer: PeerId, hello: &Hello<'_>) -> Result<Option<PeerId>, Refusal>;

    /// A service of the peer: its number there, and the target.
    ///
    /// # Errors
    /// Why the worker is refused.
    fn service(&mut self, peer: PeerId, service: ServiceEntry) -> Result<(), Refusal>;

    /// The peer wants the responses to this identity; those that came too early may go into its queue at once.
    fn register(&mut self, now: u64, peer: PeerId, identity: Entry, queue: &mut PeerQueue);

    /// The peer does not want the responses to this identity any more.
    fn unregister(&mut self, peer: PeerId, identity: Entry);

    /// The peer's live identities come again from here on.
    fn renew_begin(&mut self, peer: PeerId);

    /// What the peer has not registered since [`Handler::renew_begin`] is over.
    fn renew_end(&mut self, peer: PeerId);

    /// The peer's replay is behind and waits for responses: for [`super::limits::HURRY`] nothing is held up for the sake of batching.
    fn hurry(&mut self, now: u64);

    /// The peer's connection ended.
    fn closed(&mut self, now: u64, peer: PeerId);
}

/// Where to listen, and for whom.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The local address; `None` listens on all, IPv6 and IPv4.
    pub address: Option<IpAddr>,
    /// The port; 0 lets the kernel choose one.
    pub port: u16,
    /// The shared key; may be empty.
    pub key: Vec<u8>,
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Somebody else listens there.
    #[error(
        "port {port} is occupied: another process listens on {0}; stop it (`ss -ltnp 'sport = :{port}'` names it) or \
         choose another port with -p (and with -s of the online role)", port = .0.port()
    )]
    Occupied(SocketAddr),
    /// The port needs a privilege.
    #[error("no permission to listen on {0}; choose a port above 1023 with -p, or run as root")]
    Permission(SocketAddr),
    /// Not an address of this host.
    #[error(
        "{0} is not an address of this host; name one of `ip address`, or leave the option out to listen on all"
    )]
    NotLocal(IpAddr),
    /// The key is too long.
    #[error("--key is {0} bytes long; use at most {MAX_KEY}")]
    Key(usize),
    /// Another error of the operating system.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
}

/// Plain counters of all connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ServerCounters {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that became peers.
    pub welcomed: u64,
    /// Connections refused: another version.
    pub refused_version: u64,
    /// Connections refused: another key.
    pub refused_key: u64,
    /// Connections refused: as many peers as there may be.
    pub refused_full: u64,
    /// Connections refused: bytes that are not the protocol.
    pub refused_protocol: u64,
    /// Connections refused: no complete hello in time.
    pub refused_slow: u64,
    /// Connections refused: a newer one of the same worker, or no room for services.
    pub refused_other: u64,
    /// Connections that ended before a hello.
    pub strangers_gone: u64,
    /// Peers that ended their connection, or whose connection broke.
    pub closed: u64,
    /// Peers from which nothing came for too long.
    pub silent: u64,
    /// Header records put into peers' queues.
    pub records_sent: u64,
    /// Header records for which a peer's queue had no room.
    pub records_dropped: u64,
    /// write(2) calls.
    pub writes: u64,
}

/// The header records of one peer that wait for its socket.
pub struct PeerQueue {
    out: OutQueue,
    sent: u64,
    dropped: u64,
}

impl PeerQueue {
    fn new(limit: usize) -> PeerQueue {
        PeerQueue { out: OutQueue::new(limit, 0), sent: 0, dropped: 0 }
    }

    #[cfg(test)]
    pub(super) fn for_test() -> PeerQueue {
        PeerQueue::new(PEER_QUEUE)
    }

    /// Adds a record; `false`, and counted, when the peer is too slow for it.
    #[inline]
    pub fn send(&mut self, header: &ResponseHeader) -> bool {
        let queued = self.out.push_record(Kind::Headers, &header.encode());
        self.sent += u64::from(queued);
        self.dropped += u64::from(!queued);
        queued
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing valid came yet.
    Stranger,
    /// A valid hello came, the services have not.
    Greeted,
    /// Welcome.
    Peer,
    /// Refused; open until `until` for the reason to be read.
    Refused { until: u64 },
}

struct Peer {
    stream: TcpStream,
    from: Endpoint,
    stage: Stage,
    since: u64,
    services: usize,
    input: InBuffer,
    queue: PeerQueue,
    last_received: u64,
    last_sent: u64,
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    Silent,
    Refuse(Refusal),
}

/// The listening socket and the peers.
pub struct Server {
    listener: TcpListener,
    key: Vec<u8>,
    instance: u64,
    peers: Vec<Option<Peer>>,
    /// How many of them were welcomed.
    live: usize,
    /// Of [`Server::drive`], kept for its allocation.
    readable: Vec<usize>,
    queue_limit: usize,
    accept_paused_until: u64,
    last_tick: u64,
    counters: ServerCounters,
    gate: LogGate,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// [`ServerError`], with the remedy in its text.
    pub fn bind(config: ServerConfig) -> Result<Server, ServerError> {
        if config.key.len() > MAX_KEY {
            return Err(ServerError::Key(config.key.len()));
        }
        let listener = match config.address {
            Some(address) => listen(SocketAddr::new(address, config.port))?,
            None => match listen((Ipv6Addr::UNSPECIFIED, config.port).into()) {
                // A host without IPv6.
                Err(ServerError::Listen(..) | ServerError::NotLocal(_)) => {
                    listen((Ipv4Addr::UNSPECIFIED, config.port).into())?
                }
                other => other?,
            },
        };
        Ok(Server {
            listener,
            key: config.key,
            instance: super::random_instance(),
            peers: Vec::new(),
            live: 0,
            readable: Vec::new(),
            queue_limit: PEER_QUEUE,
            accept_paused_until: 0,
            last_tick: 0,
            counters: ServerCounters::default(),
            gate: LogGate::default(),
        })
    }

    /// The key that further connections have to have.
    ///
    /// # Errors
    /// When it is too long.
    pub fn set_key(&mut self, key: Vec<u8>) -> Result<(), ServerError> {
        if key.len() > MAX_KEY {
            return Err(ServerError::Key(key.len()));
        }
        self.key = key;
        Ok(())
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The operating system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The counters.
    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }

    /// Connections of any stage.
    pub fn connections(&self) -> usize {
        self.peers.iter().flatten().count()
    }

    /// When [`Server::drive`] must be called even if nothing is ready; `None` when there is nobody to look after.
    pub fn deadline(&self) -> Option<u64> {
        let paused = self.accept_paused_until > self.last_tick;
        (paused || self.peers.iter().any(Option::is_some)).then_some(self.last_tick + HEARTBEAT)
    }

    /// What to wait for: the listening socket, then one entry a peer. [`Server::drive`] takes the answers in this order.
    pub fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let accept =
            if self.accept_paused_until > self.last_tick { PollFlags::empty() } else { PollFlags::POLLIN };
        let peers = self.peers.iter().flatten().map(|peer| {
            let write = if peer.queue.out.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            PollFd::new(peer.stream.as_fd(), PollFlags::POLLIN | write)
        });
        std::iter::once(PollFd::new(self.listener.as_fd(), accept)).chain(peers)
    }

    /// Accepts, reads once from each peer that is ready, and once a second sends heartbeats and ends what is overdue.
    /// `ready` answers [`Server::interests`], with nothing changed in between; what is missing from it is not ready.
    pub fn drive(&mut self, now: u64, ready: &[PollFlags], handler: &mut impl Handler) {
        let (accept, ready) = ready.split_first().map_or((PollFlags::empty(), &[][..]), |(a, r)| (*a, r));
        let mut readable = std::mem::take(&mut self.readable);
        readable.clear();
        // POLLERR and POLLHUP are learnt of by reading.
        let wanted = PollFlags::POLLIN | PollFlags::POLLERR | PollFlags::POLLHUP;
        let occupied = (0..self.peers.len()).filter(|&slot| self.peers[slot].is_some());
        readable
            .extend(occupied.zip(ready).filter(|(_, flags)| flags.intersects(wanted)).map(|(slot, _)| slot));
        // Only now: a message of one peer may end another and empty its slot.
        for &slot in &readable {
            self.receive(now, slot, handler);
        }
        self.readable = readable;
        if !accept.is_empty() {
            self.accept(now, handler);
        }
        // After the reads: if this process was stopped for a while, what came meanwhile counts.
        if now >= self.last_tick + HEARTBEAT {
            self.tick(now, handler);
        }
    }

    /// Puts a record into a peer's queue; `false`, and counted, when it is full or the peer is gone.
    #[inline]
    pub fn send(&mut self, peer: PeerId, header: &ResponseHeader) -> bool {
        let sent = match self.peers.get_mut(usize::from(peer.0)) {
            Some(Some(peer)) if peer.stage == Stage::Peer => peer.queue.send(header),
            _ => false,
        };
        self.counters.records_sent += u64::from(sent);
        self.counters.records_dropped += u64::from(!sent);
        sent
    }

    /// One write to each peer for which something waits.
    pub fn flush(&mut self, now: u64, handler: &mut impl Handler) {
        for slot in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[slot] else { continue };
            if peer.queue.out.is_empty() {
                continue;
            }
            self.counters.writes += 1;
            match peer.queue.out.write_to(&mut peer.stream) {
                Ok(0) => {}
                Ok(_) => peer.last_sent = now,
                Err(_) => self.end(now, slot, End::Closed, handler),
            }
        }
    }

    fn accept(&mut self, now: u64, handler: &mut impl Handler) {
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((stream, from)) => self.admit(now, stream, from, handler),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The connection died in the queue: accept(2) reports it in place of the connection.
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => {
                    // Out of descriptors or memory: the connection stays in the queue, and poll(2) would report it at
                    // once again.
                    self.accept_paused_until = now + HEARTBEAT;
                    self.last_tick = now;
                    log::warn!(
                        "cannot accept connections for now: {error}; raise the limit with `ulimit -n`"
                    );
                    return;
                }
            }
        }
    }

    fn admit(&mut self, now: u64, stream: TcpStream, from: SocketAddr, handler: &mut impl Handler) {
        self.counters.accepted += 1;
        if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
            self.counters.strangers_gone += 1;
            return;
        }
        let strangers =
            || self.peers.iter().enumerate().filter(|(_, p)| p.as_ref().is_some_and(Peer::is_stranger));
        if strangers().count() >= MAX_STRANGERS
            && let Some((oldest, _)) = strangers().min_by_key(|(_, p)| p.as_ref().map(|p| p.since))
        {
            if !matches!(self.peers[oldest], Some(Peer { stage: Stage::Refused { .. }, .. })) {
                self.end(now, oldest, End::Refuse(Refusal::Full), handler);
            }
            self.peers[oldest] = None;
        }
        let slot = match self.peers.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.peers.push(None);
                self.peers.len() - 1
            }
        };
        self.peers[slot] = Some(Peer {
            stream,
            from: from.into(),
            stage: Stage::Stranger,
            since: now,
            services: 0,
            input: InBuffer::default(),
            queue: PeerQueue::new(self.queue_limit),
            last_received: now,
            last_sent: now,
        });
        if self.connections() == 1 {
            // The ticks rest while there is nobody.
            self.last_tick = self.last_tick.max(now.saturating_sub(HEARTBEAT));
        }
        // A worker's hello follows its connect at once.
        self.receive(now, slot, handler);
    }

    /// Reads once and handles the messages that are complete.
    fn receive(&mut self, now: u64, slot: usize, handler: &mut impl Handler) {
        let Some(peer) = &mut self.peers[slot] else { return };
        if matches!(peer.stage, Stage::Refused { .. }) {
            // Read and forgotten, so that closing does not reset the connection before the reason was read.
            peer.input.clear();
            if !matches!(peer.input.read_from(&mut peer.stream), Ok(Received::Bytes(_) | Received::Nothing)) {
                self.peers[slot] = None;
            }
            return;
        }
        let received = peer.input.read_from(&mut peer.stream);
        if let Ok(Received::Bytes(_)) = received {
            peer.last_received = now;
        }
        if let Err(end) = self.handle(now, slot, handler) {
            self.end(now, slot, end, handler);
        } else if matches!(received, Ok(Received::End) | Err(_)) {
            self.end(now, slot, End::Closed, handler);
        }
    }

    fn handle(&mut self, now: u64, slot: usize, handler: &mut impl Handler) -> Result<(), End> {
        let id = PeerId(slot as u16);
        loop {
            let Some(peer) = &mut self.peers[slot] else { return Ok(()) };
            let message =
                wire::decode(peer.input.data()).map_err(|_: WireError| End::Refuse(Refusal::Protocol))?;
            let Some((message, used)) = message else { return Ok(()) };
            let mut superseded = None;
            match (peer.stage, message) {
                (Stage::Stranger, Message::OtherVersion(_)) => return Err(End::Refuse(Refusal::Version)),
                (Stage::Stranger, Message::Hello(hello)) => {
                    if !same_key(hello.key, &self.key) {
                        return Err(End::Refuse(Refusal::Key));
                    }
                    superseded = handler.hello(id, &hello).map_err(End::Refuse)?;
                    peer.stage = Stage::Greeted;
                }
                (Stage::Greeted | Stage::Peer, Message::Services(services)) => {
                    peer.services += services.len();
                    if peer.services > MAX_SERVICES {
                        return Err(End::Refuse(Refusal::Services));
                    }
                    for service in services {
                        let service = ServiceEntry::decode(service)
                            .map_err(|_: WireError| End::Refuse(Refusal::Protocol))?;
                        handler.service(id, service).map_err(End::Refuse)?;
                    }
                    if peer.stage == Stage::Greeted {
                        if self.live >= MAX_PEERS {
                            return Err(End::Refuse(Refusal::Full));
                        }
                        self.live += 1;
                        peer.stage = Stage::Peer;
                        peer.queue.out.push_message(Kind::Welcome, &wire::welcome(self.instance));
                        self.counters.welcomed += 1;
                        log::info!("peer {} connected", peer.from);
                    }
                }
                (Stage::Peer, Message::Register(identities)) => {
                    let before = (peer.queue.sent, peer.queue.dropped);
                    for identity in identities {
                        handler.register(now, id, Entry::decode(identity), &mut peer.queue);
                    }
                    self.counters.records_sent += peer.queue.sent - before.0;
                    self.counters.records_dropped += peer.queue.dropped - before.1;
                }
                (Stage::Peer, Message::Unregister(identities)) => {
                    for identity in identities {
                        handler.unregister(id, Entry::decode(identity));
                    }
                }
                (Stage::Peer, Message::RenewBegin) => handler.renew_begin(id),
                (Stage::Peer, Message::RenewEnd) => handler.renew_end(id),
                (Stage::Peer, Message::Hurry) => handler.hurry(now),
                (Stage::Peer, Message::Heartbeat) => {}
                _ => return Err(End::Refuse(Refusal::Protocol)),
            }
            peer.input.consume(used);
            if let Some(older) = superseded {
                self.end(now, usize::from(older.0), End::Refuse(Refusal::Superseded), handler);
            }
        }
    }

    fn tick(&mut self, now: u64, handler: &mut impl Handler) {
        self.last_tick = now;
        for slot in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[slot] else { continue };
            match peer.stage {
                Stage::Stranger | Stage::Greeted if now >= peer.since + HELLO_TIMEOUT => {
                    self.end(now, slot, End::Refuse(Refusal::Slow), handler);
                }
                Stage::Refused { until } if now >= until => self.peers[slot] = None,
                Stage::Peer if now >= peer.last_received + SILENCE => {
                    self.end(now, slot, End::Silent, handler);
                }
                // Half an interval of tolerance: ticks are an interval apart, give or take.
                Stage::Peer if now >= peer.last_sent + HEARTBEAT / 2 => {
                    let body = wire::counters(peer.queue.sent, peer.queue.dropped);
                    peer.queue.out.push_message(Kind::Counters, &body);
                }
                _ => {}
            }
        }
    }

    fn end(&mut self, now: u64, slot: usize, end: End, handler: &mut impl Handler) {
        let Some(Some(peer)) = self.peers.get_mut(slot) else { return };
        let known = matches!(peer.stage, Stage::Greeted | Stage::Peer);
        let from = peer.from;
        self.live -= usize::from(peer.stage == Stage::Peer);
        match end {
            End::Closed if known => {
                self.counters.closed += 1;
                log::info!("peer {from} closed its connection");
            }
            End::Closed => self.counters.strangers_gone += 1,
            End::Silent => {
                self.counters.silent += 1;
                log::warn!("peer {from}: nothing came for {} s, closed", SILENCE / 1_000_000_000);
            }
            End::Refuse(reason) => {
                *self.counters.refused(reason) += 1;
                if let Some(suppressed) = self.gate.open(now, reason) {
                    log::warn!("refused {from}: {}{suppressed}", describe(reason));
                }
            }
        }
        match end {
            End::Refuse(reason) => {
                peer.stage = Stage::Refused { until: now + REFUSED_LINGER };
                // A peer with a long queue may not get to see the reason; a stranger, who has none, does.
                peer.queue.out.push_message(Kind::Refused, &wire::refused(reason));
                let written = peer.queue.out.write_to(&mut peer.stream);
                if written.is_err() || peer.stream.shutdown(Shutdown::Write).is_err() {
                    self.peers[slot] = None;
                }
            }
            End::Closed | End::Silent => self.peers[slot] = None,
        }
        if known {
            handler.closed(now, PeerId(slot as u16));
        }
    }
}

impl Peer {
    fn is_stranger(&self) -> bool {
        self.stage != Stage::Peer
    }
}

impl ServerCounters {
    fn refused(&mut self, reason: Refusal) -> &mut u64 {
        match reason {
            Refusal::Version => &mut self.refused_version,
            Refusal::Key => &mut self.refused_key,
            Refusal::Full => &mut self.refused_full,
            Refusal::Protocol => &mut self.refused_protocol,
            Refusal::Slow => &mut self.refused_slow,
            Refusal::Superseded | Refusal::Services | Refusal::Other => &mut self.refused_other,
        }
    }
}

/// The reason as the assistant's operator reads it; [`Refusal`]'s own text is for the other side.
fn describe(reason: Refusal) -> &'static str {
    match reason {
        Refusal::Version => "another version of the protocol",
        Refusal::Key => "wrong key",
        Refusal::Full => "too many connections",
        Refusal::Protocol => "not the return channel's protocol",
        Refusal::Slow => "no complete hello in time",
        Refusal::Superseded => "a newer connection of the same worker exists",
        Refusal::Services => "too many services",
        Refusal::Other => "unknown reason",
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, ServerError> {
    let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => ServerError::Occupied(address),
        ErrorKind::PermissionDenied => ServerError::Permission(address),
        ErrorKind::AddrNotAvailable => ServerError::NotLocal(address.ip()),
        _ => ServerError::Listen(address, error),
    })?;
    listener.set_nonblocking(true).map_err(|error| ServerError::Listen(address, error))?;
    Ok(listener)
}

/// Compares keys in a time that does not depend on what they are.
fn same_key(a: &[u8], b: &[u8]) -> bool {
    let mut difference = a.len() ^ b.len();
    for i in 0..MAX_KEY {
        let (a, b) = (a.get(i).copied().unwrap_or(0), b.get(i).copied().unwrap_or(0));
        difference |= usize::from(std::hint::black_box(a ^ b));
    }
    difference == 0
}

/// Lets one line a second through for each reason, so that a port scan does not fill the disk.
#[derive(Default)]
struct LogGate {
    reasons: [(u64, u64); 16],
}

impl LogGate {
    /// The end of the line when it may be written: how many were not since the last one.
    fn open(&mut self, now: u64, reason: Refusal) -> Option<String> {
        let (closed_until, suppressed) = &mut self.reasons[reason as usize % 16];
        if now < *closed_until {
            *suppressed += 1;
            return None;
        }
        *closed_until = now + LOG_INTERVAL;
        let text = if *suppressed > 0 { format!(" (and {suppressed} more before)") } else { String::new() };
        *suppressed = 0;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_equal_or_not() {
        assert!(same_key(b"", b""));
        assert!(same_key(b"secret", b"secret"));
        assert!(!same_key(b"secret", b"secre\0"));
        assert!(!same_key(b"secret", b"secret\0"));
        assert!(!same_key(b"", b"\0"));
    }

    #[test]
    fn the_log_gate_counts_what_it_swallows() {
        let mut gate = LogGate::default();
        assert_eq!(gate.open(0, Refusal::Key).as_deref(), Some(""));
        assert_eq!(gate.open(1, Refusal::Key), None);
        assert_eq!(gate.open(2, Refusal::Key), None);
        assert_eq!(gate.open(2, Refusal::Protocol).as_deref(), Some(""), "another reason has its own line");
        assert_eq!(gate.open(LOG_INTERVAL, Refusal::Key).as_deref(), Some(" (and 2 more before)"));
    }
}
