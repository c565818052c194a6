//! When a packet of a file is due. Every due time is computed from the start and from what was before it in the file, never from when
//! something was done, so that nothing drifts.

use std::time::Duration;

/// How fast a file is replayed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// So many times as fast as it was captured.
    Times(f64),
    /// As fast as the target answers.
    Max,
    /// So many packets of clients a second.
    PacketsPerSecond(f64),
    /// So many megabits of clients' packets a second, their headers included.
    MegabitsPerSecond(f64),
    /// Connections begin at this rate; what belongs to them goes as fast as the target answers.
    ConnectionsPerSecond(f64),
}

impl Speed {
    /// Whether the target sets the pace, and not a clock alone.
    pub fn waits_for_target(self) -> bool {
        matches!(self, Speed::Max | Speed::ConnectionsPerSecond(_))
    }
}

/// Computes due times.
#[derive(Clone, Debug)]
pub struct Pace {
    speed: Speed,
    max_gap_ns: Option<u64>,
    first_ns: Option<u64>,
    last_due_ns: u64,
    /// What `max_gap_ns` took out so far.
    skipped_ns: u64,
    packets: u64,
    bits: u64,
    connections: u64,
}

impl Pace {
    /// `max_gap`: no pause between two packets is longer than this in the replay.
    pub fn new(speed: Speed, max_gap: Option<Duration>) -> Pace {
        Pace {
            speed,
            max_gap_ns: max_gap.map(|gap| gap.as_nanos() as u64),
            first_ns: None,
            last_due_ns: 0,
            skipped_ns: 0,
            packets: 0,
            bits: 0,
            connections: 0,
        }
    }

    /// The next packet: its time in the file, its length in bytes, whether it opens a connection. When it is due, ns after the start.
    pub fn due(&mut self, time_ns: u64, len: u64, opening: bool) -> u64 {
        let first = *self.first_ns.get_or_insert(time_ns);
        let at_rate = |count: f64, per_second: f64| (count / per_second * 1e9) as u64;
        let due = match self.speed {
            Speed::Times(times) => {
                let due = (time_ns.saturating_sub(first) as f64 / times) as u64;
                due.saturating_sub(self.skipped_ns)
            }
            Speed::Max => 0,
            Speed::PacketsPerSecond(rate) => at_rate(self.packets as f64, rate),
            Speed::MegabitsPerSecond(rate) => at_rate(self.bits as f64, rate * 1e6),
            Speed::ConnectionsPerSecond(rate) => {
                at_rate(self.connections.saturating_sub(u64::from(!opening)) as f64, rate)
            }
        };
        self.packets += 1;
        self.bits += len * 8;
        self.connections += u64::from(opening);
        // Packets go in the order of the file, also where its times go back.
        let due = due.max(self.last_due_ns);
        let due = match self.max_gap_ns {
            Some(gap) if due - self.last_due_ns > gap => {
                self.skipped_ns += due - self.last_due_ns - gap;
                self.last_due_ns + gap
            }
            _ => due,
        };
        self.last_due_ns = due;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn dues(speed: Speed, max_gap_ms: Option<u64>, times_ms: &[u64]) -> Vec<u64> {
        let mut pace = Pace::new(speed, max_gap_ms.map(Duration::from_millis));
        times_ms.iter().map(|time| pace.due(1_000_000_000_000 + time * MS, 1000, false) / MS).collect()
    }

    #[test]
    fn b058_gaps_are_kept_scaled_and_capped() {
        let times = [0, 10, 500, 490, 3000, 3001];
        assert_eq!(dues(Speed::Times(1.0), None, &times), [0, 10, 500, 500, 3000, 3001]);
        assert_eq!(dues(Speed::Times(10.0), None, &times), [0, 1, 50, 50, 300, 300]);
        assert_eq!(dues(Speed::Times(0.5), None, &times), [0, 20, 1000, 1000, 6000, 6002]);
        // 390 ms and then 2400 ms are taken out.
        assert_eq!(dues(Speed::Times(1.0), Some(100), &times), [0, 10, 110, 110, 210, 211]);
        assert_eq!(dues(Speed::Max, None, &times), [0; 6]);
    }

    #[test]
    fn b058_rates_do_not_drift() {
        let mut pace = Pace::new(Speed::PacketsPerSecond(3.0), None);
        let last = (0..3_000_001).map(|_| pace.due(0, 60, false)).last().unwrap();
        assert_eq!(last, 1_000_000_000_000_000);
        let mut pace = Pace::new(Speed::MegabitsPerSecond(8.0), None);
        assert_eq!([0, 1, 2].map(|_| pace.due(0, 1000, false)), [0, MS, 2 * MS]);
        // A connection's own packets do not wait.
        let mut pace = Pace::new(Speed::ConnectionsPerSecond(10.0), None);
        let packets = [true, false, false, true, false, true];
        assert_eq!(packets.map(|opening| pace.due(0, 60, opening) / MS), [0, 0, 0, 100, 100, 200]);
    }
}
