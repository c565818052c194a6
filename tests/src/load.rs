//! What `loadgen` measures, and the summary that it writes.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The outcome of a run of `loadgen`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Requests begun.
    pub requests: u64,
    /// Requests answered, each by the answer that belongs to it.
    pub responses: u64,
    /// Requests whose connection ended before their answer.
    pub unanswered: u64,
    /// Connections that were made.
    pub connections_used: u64,
    /// Connections that failed to be made, or ended otherwise than they should.
    pub errors: u64,
    /// The errors, by what happened.
    pub errors_by_kind: BTreeMap<String, u64>,
    /// Connections that the other side reset.
    pub resets_received: u64,
    /// Bytes put into the connections.
    pub bytes_sent: u64,
    /// Bytes got out of them.
    pub bytes_received: u64,
    /// From the first request's time to the end of requests, in seconds.
    pub seconds: f64,
    /// Requests per second over that time.
    pub requests_per_second: f64,
    /// From a request's beginning to its answer's end, in microseconds.
    pub latency_us: Percentiles,
    /// One for each connection, in the order of their ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub connections: Vec<ConnectionSummary>,
}

/// What was sent and received on one connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConnectionSummary {
    /// Its address and port on this side.
    pub local: String,
    /// Requests begun.
    pub requests: u64,
    /// Requests answered.
    pub answered: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// [`crate::stream::StreamHash`] of them.
    pub sent_hash: String,
    /// Bytes received.
    pub received_bytes: u64,
    /// [`crate::stream::StreamHash`] of them.
    pub received_hash: String,
    /// How it ended; `done` where all went well.
    pub end: String,
}

/// A distribution, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half of the values are no higher.
    pub p50: f64,
    /// 90 % of the values are no higher.
    #[serde(default)]
    pub p90: f64,
    /// 99 % of the values are no higher.
    pub p99: f64,
    /// The highest value.
    pub max: f64,
}

/// Times, kept one by one: runs are bounded.
#[derive(Debug, Default)]
pub struct Latencies {
    values_us: Vec<u32>,
}

impl Latencies {
    /// Adds one.
    pub fn add(&mut self, latency: Duration) {
        self.values_us.push(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
    }

    /// Their distribution; all zero when there are none.
    pub fn percentiles(&mut self) -> Percentiles {
        self.values_us.sort_unstable();
        let Some(last) = self.values_us.len().checked_sub(1) else { return Percentiles::default() };
        let at = |share: f64| f64::from(self.values_us[((last as f64) * share).ceil() as usize]);
        Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

impl Summary {
    /// Counts a connection that did not go well.
    pub fn error(&mut self, kind: &str) {
        self.errors += 1;
        *self.errors_by_kind.entry(kind.to_owned()).or_default() += 1;
    }

    /// Fills in what is known at the end.
    pub fn finish(&mut self, latencies: &mut Latencies, requests: u64, elapsed: Duration) {
        self.requests = requests;
        self.seconds = elapsed.as_secs_f64();
        self.requests_per_second = requests as f64 / self.seconds.max(1e-9);
        self.latency_us = latencies.percentiles();
    }
}

/// Numbers that a seed determines (SplitMix64): the same run can be made again.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number within `range`.
    pub fn within(&mut self, range: &RangeInclusive<u32>) -> u32 {
        let span = u64::from(range.end() - range.start()) + 1;
        // The high half of a product maps a word onto a span evenly (Lemire), without a division.
        range.start() + ((u128::from(self.word()) * u128::from(span)) >> 64) as u32
    }

    /// Seconds until the next of independent events, `rate` of which come in a second on average: exponentially distributed.
    pub fn interval(&mut self, rate: f64) -> f64 {
        // Above 0, at most 1.
        let share = ((self.word() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        -share.ln() / rate
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_hundred_values() {
        let mut latencies = Latencies::default();
        for us in (1..=101).rev() {
            latencies.add(Duration::from_micros(us));
        }
        assert_eq!(latencies.percentiles(), Percentiles { p50: 51.0, p90: 91.0, p99: 100.0, max: 101.0 });
        assert_eq!(Latencies::default().percentiles(), Percentiles::default());
    }

    #[test]
    fn intervals_are_those_of_independent_events() {
        let mut random = Random::new(7);
        let intervals: Vec<f64> = (0..100_000).map(|_| random.interval(5_000.0)).collect();
        let mean = intervals.iter().sum::<f64>() / intervals.len() as f64;
        assert!((198e-6..202e-6).contains(&mean), "{mean}");
        // One in e is longer than the mean.
        let longer = intervals.iter().filter(|&&interval| interval > 200e-6).count();
        assert!((36_000..37_600).contains(&longer), "{longer}");
        assert!(intervals.iter().all(|&interval| interval >= 0.0));
    }

    #[test]
    fn random_numbers_fill_their_range_and_follow_their_seed() {
        let numbers = |seed| -> Vec<u32> {
            let mut random = Random::new(seed);
            (0..1000).map(|_| random.within(&(10..=13))).collect()
        };
        assert_eq!(numbers(1), numbers(1));
        assert_ne!(numbers(1), numbers(2));
        for value in 10..=13 {
            assert!(numbers(1).iter().filter(|&&number| number == value).count() > 200);
        }
        assert!(numbers(1).iter().all(|number| (10..=13).contains(number)));
    }
}
