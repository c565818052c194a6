//! The assistant's final report, as text and as JSON.
//!
//! Every frame that was received ends in exactly one place: [`Report::identities`] has both sums.

use super::routing::RoutingCounters;
use crate::bpf::Counts;
use crate::channel::server::ServerCounters;
use crate::report::Identity;
use replayer_common::counters::ResponsesVerdict;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// Everything that the role counted.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Always "assistant".
    pub role: &'static str,
    /// The interface.
    pub interface: String,
    /// How frames are taken.
    pub mode: String,
    /// Since the role was ready, seconds.
    pub seconds: f64,
    /// Frames that came out of the AF_XDP rings.
    pub received: u64,
    /// Of these, not a TCP segment that can be used, by reason.
    pub rejected: BTreeMap<&'static str, u64>,
    /// Header records that wait for a registration now.
    pub waiting: u64,
    /// Frames of the targets that the kernel could not put into a ring.
    pub dropped_by_kernel: u64,
    /// Of these, because the ring was full: this process did not keep up.
    pub dropped_ring_full: u64,
    /// What the XDP program did with the interface's packets, by verdict.
    pub verdicts: Counts<ResponsesVerdict>,
    /// Looking up whose a record is.
    pub routing: RoutingCounters,
    /// The peers' connections.
    pub channel: ServerCounters,
    /// Targets, workers and registrations now.
    pub now: Now,
}

/// What there is at the moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Now {
    /// Targets whose responses are taken.
    pub targets: u64,
    /// Workers connected.
    pub workers: u64,
    /// Identities registered.
    pub registrations: u64,
    /// Bytes of the table of registrations.
    pub table_bytes: u64,
}

impl Report {
    /// The accounting identities: the frames that were received, and those that are in a counter.
    pub fn identities(&self) -> [Identity; 1] {
        let known = self.rejected.values().sum::<u64>()
            + self.routing.unknown_target
            + self.routing.unregistered
            + self.routing.early_overflow
            + self.waiting
            + self.channel.records_sent
            + self.channel.records_dropped;
        let name = "frames received = returned + not returned by reason + waiting";
        [Identity::new(name, self.received, known)]
    }

    /// One line for a person who watches.
    pub fn line(&self) -> String {
        format!(
            "{} workers, {} registrations, {} frames received, {} records returned, {} unregistered, \
             {} dropped (slow peer), {} dropped (kernel)",
            self.now.workers,
            self.now.registrations,
            self.received,
            self.channel.records_sent,
            self.routing.unregistered,
            self.channel.records_dropped,
            self.dropped_by_kernel
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "assistant report: {} for {:.1} s ({})", self.interface, self.seconds, self.mode)?;
        let mut row = |name: &str, value: u64| writeln!(f, "  {value:>14}  {name}");
        row("frames received", self.received)?;
        row("  records returned", self.channel.records_sent)?;
        row("    of these, arrived before their registration", self.routing.early_delivered)?;
        row("  dropped: the peer was too slow, or gone", self.channel.records_dropped)?;
        row("  dropped: no registration came in time", self.routing.unregistered)?;
        row("  dropped: too many waited for one identity", self.routing.early_overflow)?;
        row("  dropped: of no target any more", self.routing.unknown_target)?;
        row("  waiting for a registration", self.waiting)?;
        for (reason, count) in &self.rejected {
            row(&format!("  unusable: {reason}"), *count)?;
        }
        row("frames lost in the kernel", self.dropped_by_kernel)?;
        row("  of these, because the ring was full", self.dropped_ring_full)?;
        for (verdict, count) in self.verdicts.iter() {
            row(&format!("XDP verdict: {}", verdict.name()), count)?;
        }
        row("identities registered", self.routing.registered)?;
        row("  of these, taken from another connected worker", self.routing.conflicts)?;
        row("identities refused: the table is full", self.routing.refused_registrations)?;
        row("connections accepted", self.channel.accepted)?;
        row("  welcomed", self.channel.welcomed)?;
        let refused = [
            ("wrong key", self.channel.refused_key),
            ("another version", self.channel.refused_version),
            ("not the protocol", self.channel.refused_protocol),
            ("no hello in time", self.channel.refused_slow),
            ("too many", self.channel.refused_full),
            ("other reasons", self.channel.refused_other),
            ("gone before a hello", self.channel.strangers_gone),
        ];
        for (reason, count) in refused {
            row(&format!("  refused: {reason}"), count)?;
        }
        Ok(())
    }
}
