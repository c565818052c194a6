//! Capture files: reading them whatever their format, compression and link type, as one stream of Ethernet frames in the order of
//! time; writing them.
//!
//! - [`input`]: bytes from a file or standard input, decompressed
//! - [`reader`]: packets of one pcap or pcapng file
//! - [`link`]: packets of other link types as Ethernet frames
//! - [`files`]: several files as one
//! - [`writer`]: writes files

pub mod files;
pub mod input;
pub mod link;
pub mod reader;
pub mod writer;

pub use files::{Files, Order};
pub use reader::{Packet, ReadError, Reader};
