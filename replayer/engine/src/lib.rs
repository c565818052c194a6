//! The session engine: captured packets and header records of responses in, packets to targets out.
//!
//! Pure: bytes and events in, packets and decisions out, the time an argument. No sockets, no clock, no allocation after
//! [`Engine::new`], no panic that a captured byte can reach. One engine belongs to one worker and shares nothing.
//!
//! - [`config`]: what to replay, and the limits
//! - [`output`]: what the engine needs from its surroundings
//! - `engine`: the state, opening and ending sessions, timers
//! - `capture`: captured packets: order, turns, joining in the middle, holes
//! - `doubt`: segments inside a connection that its client may not have sent
//! - `connection`: a client connection as it was captured
//! - `session`: a connection replayed to a target
//! - `gate`: the turn gate
//! - `sender`: what a session sends, and sends again
//! - `sack`: what a target has beyond its acknowledgment
//! - `receiver`: what a target's segments do
//! - [`counters`], [`histogram`]: where everything ends
//! - `udp`: datagrams, which are sent on as they come
//! - `usual`: the packet that nearly all are, in one piece
//! - `identity`: source addresses and ports
//! - `path`: the path's MTU where nobody tells it
//! - `protocol`: what a stream's first bytes say of it
//! - `store`: client data that is held
//! - `room`: who makes way where there is no room for more of it
//! - `timer`, [`table`], [`slab`]: mechanism
//! - `wire`: writing segments
//! - `check`: the invariants, in debug builds
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod capture;
#[cfg(debug_assertions)]
mod check;
pub mod config;
mod connection;
pub mod counters;
mod doubt;
mod engine;
mod gate;
pub mod histogram;
mod identity;
pub mod output;
mod path;
mod protocol;
mod receiver;
mod room;
mod sack;
mod sender;
mod session;
pub mod slab;
mod store;
pub mod table;
mod timer;
mod udp;
mod usual;
mod wire;

pub use config::QUARANTINE_SECONDS;
pub use engine::{BATCH, Engine, Gauges, Lag};
pub use identity::{AddressRange, PORTS_PER_ADDRESS};
pub use output::Output;
pub use wire::Link;
