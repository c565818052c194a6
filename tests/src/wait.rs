//! Waiting for a condition with a deadline: what tests do instead of sleeping for luck.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `condition` holds; false when `limit` passed before it did.
pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Waits until `condition` holds, or fails naming `what` was waited for.
pub fn wait_for(what: &str, limit: Duration, condition: impl FnMut() -> bool) -> Result<()> {
    if !holds_within(limit, condition) {
        bail!("{what}: not within {limit:?}");
    }
    Ok(())
}

/// Waits until `value` has not changed for `quiet`, at most `limit`; returns the last value.
///
/// For counting what a server got after its load ended, when the number to expect is what is being measured.
pub fn settled<T: PartialEq>(quiet: Duration, limit: Duration, mut value: impl FnMut() -> T) -> T {
    let deadline = Instant::now() + limit;
    let mut last = value();
    let mut since = Instant::now();
    while since.elapsed() < quiet && Instant::now() < deadline {
        std::thread::sleep(POLL_INTERVAL);
        let now = value();
        if now != last {
            last = now;
            since = Instant::now();
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_looked_at_until_it_holds() {
        let mut looks = 0;
        assert!(holds_within(Duration::from_secs(5), || {
            looks += 1;
            looks == 3
        }));
        assert!(!holds_within(Duration::from_millis(20), || false));
    }

    #[test]
    fn a_value_settles_once_it_stops_changing() {
        let mut value = 0;
        let last = settled(Duration::from_millis(60), Duration::from_secs(5), || {
            value = 5.min(value + 1);
            value
        });
        assert_eq!(last, 5);
    }
}
