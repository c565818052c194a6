//! What the offline role's threads show of the files: what became of the packets, how far reading and the replay are, what was wrong.

use crate::pcap::ReadError;
use replayer_engine::histogram::Histogram;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// [`FileFigures`] as the reader thread publishes them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    packets: AtomicU64,
    given: AtomicU64,
    cut_to_segments: AtomicU64,
    responses: AtomicU64,
    other: AtomicU64,
    client_not_chosen: AtomicU64,
    sampled_out: AtomicU64,
    unparsable: AtomicU64,
    fragments: AtomicU64,
    too_large: AtomicU64,
    link_type: AtomicU64,
    outside: AtomicU64,
    truncated: AtomicU64,
    first_truncated: AtomicU64,
    loops: AtomicU64,
}

/// What became of the files' packets before the engine saw any. `packets` is the sum of the others that are packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileFigures {
    /// Packets read.
    pub packets: u64,
    /// Of these, given to the engine: packets of clients to a service.
    pub packets_given: u64,
    /// Packets of a service to its clients: used only to join connections.
    pub packets_responses: u64,
    /// Packets that are neither to nor from a service.
    pub packets_not_service: u64,
    /// Packets to a service of clients that were not chosen.
    pub packets_client_not_chosen: u64,
    /// Packets of connections outside the sample.
    pub packets_sampled_out: u64,
    /// Packets that are no whole headers of TCP or UDP.
    pub packets_unparsable: u64,
    /// Fragments to a service's address; fragments are not replayed.
    pub packets_fragments: u64,
    /// Datagrams that are larger than a frame: not replayed.
    pub packets_too_large: u64,
    /// Packets of link types that are not known.
    pub packets_link_type: u64,
    /// Packets before --start or after --stop.
    pub packets_outside: u64,
    /// Further packets that came of cutting those that are larger than a frame.
    pub packets_added_by_cutting: u64,
    /// Of the packets given, those that the capture had cut short.
    pub packets_truncated: u64,
    /// The first of them, by its number.
    pub first_truncated: u64,
    /// How often the files were read to their end.
    pub loops: u64,
}

impl Counters {
    pub(super) fn publish(&self, seen: &FileFigures) {
        for (counter, value) in [
            (&self.packets, seen.packets),
            (&self.given, seen.packets_given),
            (&self.responses, seen.packets_responses),
            (&self.other, seen.packets_not_service),
            (&self.client_not_chosen, seen.packets_client_not_chosen),
            (&self.sampled_out, seen.packets_sampled_out),
            (&self.unparsable, seen.packets_unparsable),
            (&self.fragments, seen.packets_fragments),
            (&self.too_large, seen.packets_too_large),
            (&self.link_type, seen.packets_link_type),
            (&self.outside, seen.packets_outside),
            (&self.cut_to_segments, seen.packets_added_by_cutting),
            (&self.truncated, seen.packets_truncated),
            (&self.first_truncated, seen.first_truncated),
            (&self.loops, seen.loops),
        ] {
            counter.store(value, Ordering::Relaxed);
        }
    }

    fn figures(&self) -> FileFigures {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FileFigures {
            packets: load(&self.packets),
            packets_given: load(&self.given),
            packets_responses: load(&self.responses),
            packets_not_service: load(&self.other),
            packets_client_not_chosen: load(&self.client_not_chosen),
            packets_sampled_out: load(&self.sampled_out),
            packets_unparsable: load(&self.unparsable),
            packets_fragments: load(&self.fragments),
            packets_too_large: load(&self.too_large),
            packets_link_type: load(&self.link_type),
            packets_outside: load(&self.outside),
            packets_added_by_cutting: load(&self.cut_to_segments),
            packets_truncated: load(&self.truncated),
            first_truncated: load(&self.first_truncated),
            loops: load(&self.loops),
        }
    }
}

/// How far the feed's side is.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    pub(super) bytes: AtomicU64,
    pub(super) packets: AtomicU64,
    pub(super) lateness: Mutex<Histogram>,
}

/// What the reader thread and the feed show.
#[derive(Debug, Default)]
pub struct Status {
    pub(super) counters: Counters,
    /// What was wrong with the files.
    pub(super) problems: Mutex<Vec<ReadError>>,
    /// Bytes of the files, if known, in one loop.
    pub(super) size: Mutex<Option<u64>>,
    pub(super) replayed: Replayed,
    pub(super) stop: AtomicBool,
    /// The feed's side: everything was given to the engine.
    pub(super) over: AtomicBool,
}

impl Status {
    /// The counters now.
    pub fn figures(&self) -> FileFigures {
        self.counters.figures()
    }

    /// Takes what was wrong with the files.
    pub fn take_problems(&self) -> Vec<ReadError> {
        std::mem::take(&mut self.problems.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How far the replay is, in this loop: bytes of the files whose packets were given to the engine, and of all, if known. Reading is
    /// ahead of that.
    pub fn progress(&self) -> (u64, Option<u64>) {
        let size = *self.size.lock().unwrap_or_else(PoisonError::into_inner);
        (self.replayed.bytes.load(Ordering::Relaxed), size)
    }

    /// Packets of the files that are behind that.
    pub fn packets_replayed(&self) -> u64 {
        self.replayed.packets.load(Ordering::Relaxed)
    }

    /// How much later than due packets were given to the engine, microseconds; none where the target sets the pace.
    pub fn lateness(&self) -> Histogram {
        self.replayed.lateness.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether everything was given to the engine.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}
