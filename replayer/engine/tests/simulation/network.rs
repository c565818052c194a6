//! The network of a simulation: randomness from a seed, paths that lose, delay, reorder and repeat, and events in the order of time.

use std::collections::BTreeMap;

/// xorshift64 (Marsaglia 2003).
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        // Seeds that differ in a bit begin alike.
        for _ in 0..8 {
            random.draw();
        }
        random
    }

    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u32) -> u32 {
        ((self.draw() >> 32) % u64::from(bound.max(1))) as u32
    }

    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < per_mille
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }
}

/// What happens to packets of a path.
#[derive(Clone, Copy, Debug, Default)]
pub struct Path {
    pub lost_per_mille: u32,
    pub repeated_per_mille: u32,
    /// Packets that come late, and so after some that were sent after them.
    pub reordered_per_mille: u32,
    pub latency_us: u32,
    /// How late at most.
    pub late_us: u32,
}

impl Path {
    /// When the copies of a packet arrive; none: it is lost.
    pub fn arrivals(&self, now: u64, random: &mut Random) -> impl Iterator<Item = u64> + use<> {
        let copies = if random.chance(self.repeated_per_mille) { 2 } else { 1 };
        let mut arrivals = [None; 2];
        for arrival in &mut arrivals[..copies] {
            if random.chance(self.lost_per_mille) {
                continue;
            }
            let late = if random.chance(self.reordered_per_mille) { random.below(self.late_us) } else { 0 };
            *arrival = Some(now + u64::from(self.latency_us + late) * 1000);
        }
        arrivals.into_iter().flatten()
    }
}

/// Events by time; those of the same time stay in the order in which they were added.
pub struct Events<E> {
    queue: BTreeMap<(u64, u64), E>,
    count: u64,
}

impl<E> Events<E> {
    pub fn new() -> Events<E> {
        Events { queue: BTreeMap::new(), count: 0 }
    }

    pub fn add(&mut self, at: u64, event: E) {
        self.count += 1;
        self.queue.insert((at, self.count), event);
    }

    /// The next event that is due.
    pub fn due(&mut self, now: u64) -> Option<E> {
        let entry = self.queue.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }

    /// What `due` would return.
    pub fn next_due(&self, now: u64) -> Option<&E> {
        self.queue.first_key_value().filter(|((at, _), _)| *at <= now).map(|(_, event)| event)
    }

    pub fn next_at(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }
}
