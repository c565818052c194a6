//! A histogram of microseconds: fixed memory, eight buckets to each power of two (at most 12.5 % off).

const SUB: u32 = 3;
const BUCKETS: usize = 32 << SUB;

/// Counts by duration.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: u32,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: [0; BUCKETS], count: 0, max: 0 }
    }
}

fn bucket(us: u32) -> usize {
    if us < 1 << SUB {
        return us as usize;
    }
    let exponent = 31 - us.leading_zeros();
    let sub = (us >> (exponent - SUB)) & ((1 << SUB) - 1);
    (((exponent - SUB + 1) << SUB) + sub) as usize
}

/// The highest duration of a bucket.
fn upper(bucket: usize) -> u32 {
    let bucket = bucket as u32;
    if bucket < 1 << SUB {
        return bucket;
    }
    let exponent = (bucket >> SUB) + SUB - 1;
    let sub = bucket & ((1 << SUB) - 1);
    let low = (1u64 << exponent) + (u64::from(sub) << (exponent - SUB));
    (low + (1 << (exponent - SUB)) - 1).min(u64::from(u32::MAX)) as u32
}

impl Histogram {
    /// Counts a duration in microseconds.
    #[inline]
    pub fn record(&mut self, us: u32) {
        self.record_all(us, 1);
    }

    /// Counts `count` durations that are the same.
    #[inline]
    pub fn record_all(&mut self, us: u32, count: u32) {
        self.buckets[bucket(us)] += u64::from(count);
        self.count += u64::from(count);
        self.max = self.max.max(us);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest, exactly.
    pub fn max(&self) -> u32 {
        self.max
    }

    /// The duration that a share `q` (0 to 1) did not exceed, to the bucket's upper end; 0 when nothing was counted.
    pub fn quantile(&self, q: f64) -> u32 {
        let rank = ((self.count as f64 * q) as u64).min(self.count.saturating_sub(1));
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen > rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }

    /// Adds another worker's counts.
    pub fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max = self.max.max(other.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        for us in (0..100_000).chain([1 << 20, u32::MAX / 2, u32::MAX]) {
            let b = bucket(us);
            assert!(upper(b) >= us, "{us}");
            assert!(b == 0 || upper(b - 1) < us, "{us}");
            assert!(u64::from(upper(b)) * 8 <= u64::from(us) * 9 + 8, "{us}: {}", upper(b));
        }
    }

    #[test]
    fn quantiles() {
        let mut h = Histogram::default();
        assert_eq!(h.quantile(0.5), 0);
        (1..=1000).for_each(|us| h.record(us));
        assert!((500..=563).contains(&h.quantile(0.5)), "{}", h.quantile(0.5));
        assert_eq!(h.quantile(1.0), 1000);
    }
}
