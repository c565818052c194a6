//! What the BPF programs and user space share.
//!
//! - [`addr`]: addresses, one form for IPv4 and IPv6
//! - [`counters`]: the verdicts of the BPF programs
//! - [`hash`]: the flow hash that sampling and sharding use
//! - [`tcp_options`]: TCP options, read from hostile bytes
//! - [`maps`]: keys, values and limits of the BPF maps
//! - [`packet`]: the header parser, from Ethernet to TCP
//! - [`response`]: the header record that the assistant returns
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod counters;
pub mod hash;
pub mod maps;
pub mod packet;
pub mod response;
pub mod tcp_options;
