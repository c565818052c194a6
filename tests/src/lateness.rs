//! When the machine itself was late: threads that do nothing but sleep, one on each CPU, see how late they wake.
//!
//! A test that says within how many milliseconds something happens measures the machine too: its hypervisor takes CPUs away, and other work
//! waits for them. What no program could have done in time proves nothing of ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// How long each sleeps.
const NAP: Duration = Duration::from_millis(1);
/// Later than this is late.
const LATE: Duration = Duration::from_millis(1);

/// The threads.
#[derive(Debug)]
pub struct Sleepers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Span>>>>,
}

/// From when to when a sleeper was away, ns since the epoch.
type Span = (u64, u64);

/// When a CPU was late.
#[derive(Debug)]
pub struct Lateness(Vec<Span>);

impl Sleepers {
    /// Starts one on each CPU that this process may use.
    pub fn start() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("the CPUs of this process")?;
        let threads = (0..CpuSet::count())
            .filter(|&cpu| allowed.is_set(cpu).unwrap_or(false))
            .map(|cpu| {
                let stop = stop.clone();
                std::thread::spawn(move || sleep_on(cpu, &stop))
            })
            .collect();
        Ok(Self { stop, threads })
    }

    /// Ends them; what they saw.
    pub fn stop(self) -> Result<Lateness> {
        self.stop.store(true, Ordering::Relaxed);
        let mut late = Vec::new();
        for thread in self.threads {
            late.extend(thread.join().map_err(|_| anyhow!("a sleeper panicked"))??);
        }
        Ok(Lateness(late))
    }
}

impl Lateness {
    /// Whether a CPU was late at any time between these, ns since the epoch.
    pub fn between(&self, from_ns: u64, to_ns: u64) -> bool {
        self.0.iter().any(|&(begin, end)| begin <= to_ns && from_ns <= end)
    }
}

fn sleep_on(cpu: usize, stop: &AtomicBool) -> Result<Vec<Span>> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only).context("binding a sleeper to its CPU")?;
    let mut late = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let (began, began_ns) =
            (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64);
        std::thread::sleep(NAP);
        let slept = began.elapsed();
        if slept > NAP + LATE {
            late.push((began_ns, began_ns + slept.as_nanos() as u64));
        }
    }
    Ok(late)
}
