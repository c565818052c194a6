//! The one clock of a role: CLOCK_MONOTONIC, nanoseconds.

use nix::time::{ClockId, clock_gettime};
use std::time::Instant;

/// Now.
#[inline]
pub fn now() -> u64 {
    // CLOCK_MONOTONIC cannot fail on Linux; a zero would only delay timers.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// CPU time of the whole process, nanoseconds.
pub fn process_cpu() -> u64 {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Seconds since `started`, and processor time of the whole process, seconds.
pub fn spent(started: Instant) -> (f64, f64) {
    (started.elapsed().as_secs_f64(), process_cpu() as f64 / 1e9)
}

/// Sleeps for so many nanoseconds, or until a signal comes.
pub fn sleep(ns: u64) {
    let span = nix::sys::time::TimeSpec::new((ns / 1_000_000_000) as i64, (ns % 1_000_000_000) as i64);
    // Woken early by a signal: the caller looks at everything again anyway.
    let _ =
        nix::time::clock_nanosleep(ClockId::CLOCK_MONOTONIC, nix::time::ClockNanosleepFlags::empty(), &span);
}
