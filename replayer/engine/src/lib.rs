//! The session engine: captured packets and header records of responses in, packets to targets out.
//!
//! Pure: bytes and events in, packets and decisions out, the time an argument. No sockets, no clock, no allocation after
//! [`Engine::new`], no panic that a captured byte can reach. One engine belongs to one worker and shares nothing.
//!
//! - [`config`]: what to replay, and the limits
//! - [`output`]: what the engine needs from its surroundings
//! - `engine`: the state, and what it tells of itself
//! - `fast_path`: the packet that nearly all are, in one piece
//! - `capture`: captured packets: whose they are; joining in the middle
//! - `stream`: a client's stream: order, turns, holes
//! - `doubt`: segments inside a connection that its client may not have sent
//! - `connection`: a client connection as it was captured
//! - `session`: a connection replayed to a target
//! - `opening`, `ending`: connections and sessions come and go
//! - `deadlines`: what the clock asks for
//! - `gate`: the turn gate
//! - `sender`: what a session sends, and sends again
//! - `sack`: what a target has beyond its acknowledgment
//! - `receiver`: what a target's segments do
//! - [`counters`], [`histogram`]: where everything ends
//! - `udp`: datagrams, which are sent on as they come
//! - `identity`: source addresses and ports
//! - `path_mtu`: the path's MTU where nobody tells it
//! - `protocol`: what a stream's first bytes say of it
//! - `store`: client data that is held
//! - `room`: who makes way where there is no room for more of it
//! - `timer`, [`table`], [`slab`]: mechanism
//! - `wire`: writing segments
//! - `invariants`: what must hold of the state, checked in debug builds
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod capture;
pub mod config;
mod connection;
pub mod counters;
mod deadlines;
mod doubt;
mod ending;
mod engine;
mod fast_path;
mod gate;
pub mod histogram;
mod identity;
#[cfg(debug_assertions)]
mod invariants;
mod opening;
pub mod output;
mod path_mtu;
mod protocol;
mod receiver;
mod room;
mod sack;
mod sender;
mod session;
pub mod slab;
mod store;
mod stream;
pub mod table;
mod timer;
mod udp;
mod wire;

pub use config::QUARANTINE_SECONDS;
pub use engine::{BATCH, Engine, Gauges, Lag};
pub use identity::{AddressRange, PORTS_PER_ADDRESS};
pub use output::Output;
pub use wire::Link;
