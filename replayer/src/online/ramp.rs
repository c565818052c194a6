//! `-g`: the share of connections grows step by step.

use std::time::{Duration, Instant};

/// The share grows evenly. By the hash, so that who is in it stays in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ramp {
    pub(super) began: Instant,
    duration: Duration,
    /// The threshold at its beginning.
    from: u64,
    /// The threshold at its end.
    pub(super) full: u64,
}

impl Ramp {
    /// Between two steps.
    pub(super) const STEP: Duration = Duration::from_millis(100);

    /// One that begins now.
    pub(super) fn new(seconds: u32, from: u64, full: u64) -> Ramp {
        Ramp { began: Instant::now(), duration: Duration::from_secs(u64::from(seconds)), from, full }
    }

    /// The threshold of flow hashes so long after its beginning.
    pub(super) fn threshold(&self, elapsed: Duration) -> u64 {
        if elapsed >= self.duration {
            return self.full;
        }
        let part = elapsed.as_secs_f64() / self.duration.as_secs_f64();
        self.from + (self.full.saturating_sub(self.from) as f64 * part) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::hash::sample_threshold;

    #[test]
    fn b044_a_ramp_only_grows_and_ends_at_the_sample() {
        let ramp = Ramp::new(10, 0, sample_threshold(20.0));
        let at = |tenths: u64| ramp.threshold(Duration::from_millis(100 * tenths));
        assert_eq!(at(0), 0);
        assert!((0..150).all(|tenths| at(tenths) <= at(tenths + 1)));
        assert_eq!(at(50), sample_threshold(10.0));
        assert_eq!((at(100), at(1000)), (ramp.full, ramp.full));
        assert_eq!(Ramp::new(0, 0, 7).threshold(Duration::ZERO), 7);
        // To a larger share while it runs: from what there is.
        let ramp = Ramp::new(10, sample_threshold(20.0), sample_threshold(40.0));
        let at = |seconds| ramp.threshold(Duration::from_secs(seconds));
        assert_eq!([at(0), at(5), at(10)], [20.0, 30.0, 40.0].map(sample_threshold));
    }
}
