//! One worker and two, each on a core and with a device of its own: what a second core adds. Workers share nothing that is written, so what
//! keeps the second from adding as much as the first has is the machine's (caches, memory, the hypervisor) or the kernel's.

use crate::Options;
use crate::engine;
use crate::report::{Figure, Wanted};
use crate::sending::Amplified;
use crate::wire::{Cable, alone};
use anyhow::{Context, Result, ensure};
use std::sync::Barrier;
use std::time::Duration;

/// What the subject measures.
pub const WHAT: &str = "workers side by side, each on a core of its own";

/// Sessions of each worker: far more than the caches hold.
const SESSIONS: u32 = 200_000;
/// Two workers do at least so many times what one does; the rest is left to caches and memory that cores share.
const AT_LEAST: f64 = 1.8;

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    let rounds = if options.quick { 1 } else { 5 };
    let sessions = if options.quick { SESSIONS / 20 } else { SESSIONS };
    let duration = Duration::from_millis(if options.quick { 100 } else { 1000 });
    let engines = |workers| -> Result<f64> {
        let ns = side_by_side(workers, |ready| Ok(engine::data_packet_ns(sessions, || ready.wait())))?;
        Ok(ns.into_iter().map(|ns| 1e6 / ns).sum())
    };
    let senders = |workers| -> Result<f64> {
        let rates = side_by_side(workers, |ready| {
            alone(|| {
                let cable = Cable::new()?;
                let mut port = cable.sender()?;
                ready.wait();
                let mut amplified = Amplified::new(&mut port);
                let rate = amplified.rate(&mut port, duration);
                amplified.ensure_delivered()?;
                Ok(rate)
            })
        })?;
        Ok(rates.into_iter().map(|rate| rate / 1e3).sum())
    };
    let mut figures = compared(&format!("engine, {sessions} sessions each, data packets"), rounds, engines)?;
    figures.extend(compared("captured packet to 100 copies in a TX ring over veth", rounds, senders)?);
    Ok(figures)
}

/// The rates of one and of two workers, measured in turn.
fn compared(what: &str, rounds: usize, rate: impl Fn(usize) -> Result<f64>) -> Result<Vec<Figure>> {
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        one.push(rate(1)?);
        two.push(rate(2)?);
    }
    let one = Figure::median(format!("{what}: 1 worker"), one, "kpps");
    let two = Figure::median(format!("{what}: 2 workers"), two, "kpps").beside("1 worker", one.value);
    let times = Figure::new(format!("{what}: 2 workers beside 1"), two.value / one.value, "times")
        .wanted(Wanted::AtLeast(AT_LEAST));
    Ok(vec![one, two, times])
}

/// What `work` measures in each of so many threads, each bound to a core; they begin what they measure together.
fn side_by_side(workers: usize, work: impl Fn(&Barrier) -> Result<f64> + Sync) -> Result<Vec<f64>> {
    let cores = core_affinity::get_core_ids().context("looking up this process's cores")?;
    ensure!(cores.len() >= workers, "{workers} workers need as many cores; there are {}", cores.len());
    let ready = Barrier::new(workers);
    std::thread::scope(|scope| {
        let threads: Vec<_> = cores[..workers]
            .iter()
            .map(|&core| {
                let (ready, work) = (&ready, &work);
                scope.spawn(move || {
                    ensure!(core_affinity::set_for_current(core), "binding a thread to core {}", core.id);
                    work(ready)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker panicked")).collect()
    })
}
