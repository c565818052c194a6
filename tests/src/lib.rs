//! The lab and what runs in it.
//!
//! - [`lab`]: hosts as network namespaces on one segment, made and removed as a whole
//! - [`namespace`]: one network namespace: running programs and closures inside it
//! - [`process`]: a started program, its output, and its certain end
//! - [`servers`]: nginx, redis and the project's stream server, started on a host of the lab
//! - [`capture`]: tcpdump on a host
//! - [`capture_file`]: capture files made by a program
//! - [`clients`]: load, and counters of what arrives at a host
//! - [`pairs`]: the same server on both sides, compared
//! - [`conversation`]: one connection, driven step by step
//! - [`replay`]: the roles under test, started on a lab, and their reports
//! - [`ledger`]: requests counted id by id in the access logs of two servers
//! - [`stream`]: the wire format of the project's own server and client, and the records that both write
//! - [`http`]: as much of HTTP/1.1 as the project's own client speaks
//! - [`load`]: what that client measures
//! - [`soak`]: the highest rate that the machine sustains, for long
//! - [`packet`]: whole frames from and to a NIC
//! - [`lateness`]: when the machine itself was late
//! - [`wait`]: waiting for a condition with a deadline
//! - [`capture_ways`]: the ways to capture
//!
//! Binaries: `stream-server` records every byte that it is sent; `loadgen` drives it, or any HTTP server.

pub mod capture;
pub mod capture_file;
pub mod capture_ways;
pub mod clients;
pub mod conversation;
pub mod http;
pub mod lab;
pub mod lateness;
pub mod ledger;
pub mod load;
pub mod namespace;
pub mod packet;
pub mod pairs;
pub mod process;
pub mod replay;
pub mod servers;
pub mod soak;
pub mod stream;
pub mod wait;
