//! The return channel: one TCP connection between each worker of an online role and each assistant.
//!
//! The assistant takes the target's responses off the wire and returns their headers; a worker tells it which it wants.
//!
//! ```text
//!   worker (Client)                                   assistant (Server)
//!     | -- connect ------------------------------------> |   at most MAX_STRANGERS without a hello, HELLO_TIMEOUT each
//!     | -- Hello{version, key, instance, worker} ------> |   wrong: Refused{reason}, a log line, closed
//!     | -- Services{id -> target}... ------------------> |   the assistant's XDP program takes their responses now
//!     | <------------------------------------ Welcome -- |
//!     | -- RenewBegin, Register..., RenewEnd ----------> |   identities that were live already (none at the start)
//!     |                                                  |
//!     | -- Register{service, identity}... -------------> |   with, or a little after, the session's SYN
//!     | <------------------------- Headers{records}... - |   batched, in the order of arrival
//!     | -- Unregister{service, identity}... -----------> |
//!     | -- Hurry --------------------------------------> |   sessions are behind: no batching for the next 100 ms
//!     |                                                  |
//!     | -- Heartbeat ------------------------------> <-- |   when a side has sent nothing for a second; Counters is
//!     |                                                  |   the assistant's. Silence for 4 s: closed.
//! ```
//!
//! What holds:
//!
//! - **Either side may die and come back.** A worker reconnects with growing pauses up to a second, says hello with the
//!   same instance and a higher attempt, and registers its live identities again between RenewBegin and RenewEnd, in as
//!   many turns of its loop as it takes. The assistant goes on to serve what the worker registered before its connection
//!   broke, and forgets at RenewEnd what was not renewed. The same walk heals a worker's queue that overflowed.
//! - **Nothing blocks.** Sockets are non-blocking, each side makes one read and one write a turn. What a peer does not
//!   take waits in its own bounded queue; then the newest records are dropped, whole, and counted.
//! - **A stranger achieves nothing.** Before a valid hello nothing is read but a hello, within a deadline; the key is
//!   compared in constant time. The key travels in clear: it keeps mistakes and strangers out, not an eavesdropper on
//!   the path, who sees the replayed traffic itself anyway.
//! - **Records may be lost**, when a peer is slow or a connection breaks. TCP's own acknowledging makes up for that: the
//!   session engine retransmits, and the target acknowledges again.
//!
//! Modules: [`wire`] the bytes, [`limits`] every limit with its reason, [`queue`] the buffers, [`client`] the worker's
//! side, [`assistants`] all of these in a role, [`server`] the assistant's side.

pub mod assistants;
pub mod client;
pub mod limits;
pub mod queue;
pub mod server;
#[cfg(test)]
mod tests;
pub mod wire;

pub use client::{Client, ClientConfig};
pub use server::{PeerId, Server, ServerConfig};

use std::hash::{BuildHasher, Hasher, RandomState};

/// A random number that tells this process from another one.
pub fn random_instance() -> u64 {
    // The standard library seeds its hasher from the kernel's random numbers.
    RandomState::new().build_hasher().finish()
}
