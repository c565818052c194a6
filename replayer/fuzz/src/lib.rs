//! What hostile bytes must not do: one function for each target, which panics where something is wrong. libFuzzer calls them with bytes that
//! it makes up (`cargo xtask fuzz`), and `tests/corpus.rs` with those that are committed under `corpus/`.
//!
//! - [`frame`]: the header parser
//! - [`tcp_options`]: the options parser, and the header record that carries what it found
//! - [`engine`]: sequences of events at the session engine
//! - [`return_channel`]: the return channel's decoder
//! - [`capture_file`]: the reader of capture files, and what is made of them: inspection, and a dry run of the offline role

pub mod capture_file;
pub mod engine;
pub mod frame;
#[path = "../../engine/tests/lab/mod.rs"]
mod lab;
pub mod return_channel;
pub mod tcp_options;

/// A target's name, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 5] = [
    ("frame", frame::run),
    ("tcp_options", tcp_options::run),
    ("engine", engine::run),
    ("return_channel", return_channel::run),
    ("capture_file", capture_file::run),
];
