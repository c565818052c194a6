//! Every limit of the return channel, in one place, each with its reason. Nothing here is a setting: a user has no way
//! to judge these, and two ends that differ in them would be hard to reason about.

/// Default port of the assistant. TCPCopy's intercept uses it too, so that firewall rules need no change.
pub const DEFAULT_PORT: u16 = 36_524;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// Bytes of a message's body. Large enough that the 4 bytes of framing are nothing (227 header records), small enough
/// that a half-received message never fills a receive buffer.
pub const MAX_BODY: usize = 16 * 1024;

/// Bytes of the shared key: its length is one byte on the wire.
pub const MAX_KEY: usize = 255;

/// Receive buffer of either side, bytes. One recv(2) takes all of what a fraction of a millisecond at 10 GbE line rate
/// of small responses leaves in the socket.
pub const RECEIVE_BUFFER: usize = 64 * 1024;

/// Registrations that wait in an online worker for the socket, bytes: 13 000 of them, more than a second of 10 000 new
/// sessions. When it is full the worker is asked to register everything again later, so that none is lost for good.
pub const CLIENT_QUEUE: usize = 256 * 1024;

/// Header records that wait in the assistant for one peer, bytes: 14 500 of them, 0.1 s at 145 000 segments a second,
/// on top of what the kernel's socket buffer holds. Behind that a peer is not slow but stuck, and what it gets late is
/// of no use to its sessions.
pub const PEER_QUEUE: usize = 1024 * 1024;

/// Peers of an assistant: 64 online hosts of 4 workers.
pub const MAX_PEERS: usize = 256;

/// Connections that have not said a valid hello yet. The oldest makes room for a new one, so that a port scan does not
/// lock out a worker, which says its hello at once.
pub const MAX_STRANGERS: usize = 32;

/// Connections accepted in one turn of the loop, so that a flood of them does not hold up responses.
pub const ACCEPTS_PER_TURN: usize = 8;

/// Services that one peer may name.
pub const MAX_SERVICES: usize = 256;

/// How long a connection may take for a complete hello, ns.
pub const HELLO_TIMEOUT: u64 = 2 * SECOND;

/// How long a worker waits for the TCP connection, and then for the answer to its hello, ns. Longer than one lost SYN
/// (1 s) and one lost segment.
pub const CONNECT_TIMEOUT: u64 = 3 * SECOND;

/// A side that has sent nothing for this long sends a heartbeat, ns.
pub const HEARTBEAT: u64 = SECOND;

/// A peer from which nothing came for this long is dead, ns: three heartbeats lost and some.
pub const SILENCE: u64 = 4 * SECOND;

/// How long a refused connection stays open for its peer to read the reason, ns. (Closing a socket with unread data
/// resets the connection, and the reason would be lost.)
pub const REFUSED_LINGER: u64 = SECOND;

/// First and longest pause between attempts of a worker to connect, ns. The longest keeps the promise that a worker is
/// back within 2 s of the assistant's return.
pub const BACKOFF: (u64, u64) = (50 * MS, SECOND);

/// Log lines about one kind of trouble are at least this far apart, ns.
pub const LOG_INTERVAL: u64 = SECOND;

/// How long a worker's word that it is behind holds. It says so again while it is, so that nobody has to take it back.
pub const HURRY: u64 = 100 * MS;
