//! Benchmarks, one module a subject; `cargo xtask bench SUBJECT` builds and runs this crate's binary.
//!
//! - [`report`]: what a subject returns: figures beside what they are compared with, the machine, a table and JSON
//! - [`engine`]: the session engine alone, one core, no kernel
//! - [`capture`]: what capture costs the serving path
//! - [`path`]: RX ring to TX ring over veth
//! - [`sending`]: copies into a TX ring, beside other ways to send
//! - [`scale`]: one worker and two
//! - [`live`]: the roles in the lab, with real servers and clients
//! - `delays`, `neighbour`: parts of it: from a request to its copy; what capture costs a saturated server
//! - [`offline`]: capture files: pace, speed, memory
//! - `traffic`, `wire`: what several of them share: clients and target; devices and a replayer between them
//!
//! A subject is a function from [`Options`] to figures, listed in [`SUBJECTS`]. Whatever it compares itself with is measured in the
//! same run, and a figure says what was wanted of it, so that a reader needs no second document.

pub mod capture;
mod delays;
pub mod engine;
pub mod live;
mod neighbour;
pub mod offline;
pub mod path;
pub mod report;
pub mod scale;
pub mod sending;
mod traffic;
mod wire;

use report::Figure;

/// How a subject is to be measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Fewer sessions and rounds: whether it runs, not how fast.
    pub quick: bool,
}

/// A subject: its name on the command line, what it measures, and the measurement.
pub struct Subject {
    /// The name on the command line and of the result's file.
    pub name: &'static str,
    /// One sentence for the table's head.
    pub what: &'static str,
    /// Measures.
    pub run: fn(Options) -> anyhow::Result<Vec<Figure>>,
}

/// All of them, in the order in which they run.
pub const SUBJECTS: &[Subject] = &[
    Subject { name: "engine", what: engine::WHAT, run: engine::run },
    Subject { name: "capture", what: capture::WHAT, run: capture::run },
    Subject { name: "path", what: path::WHAT, run: path::run },
    Subject { name: "sending", what: sending::WHAT, run: sending::run },
    Subject { name: "scale", what: scale::WHAT, run: scale::run },
    Subject { name: "live", what: live::WHAT, run: live::run },
    Subject { name: "offline", what: offline::WHAT, run: offline::run },
];
