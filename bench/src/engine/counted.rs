//! Instruction counts: the same work under callgrind. They repeat from run to run, where nanoseconds do not.

use super::harness::Bench;
use super::{LARGE, REQUESTS};
use crate::Options;
use crate::report::Figure;
use crate::traffic::SMALL;
use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use std::process::Command;
use std::time::Duration;

const SESSIONS: u32 = 1_000;
const ROUNDS: u32 = 16;
const COPIES: u32 = 10;

/// Runs the work `name` and nothing else; `name-opening` is only the opening of its sessions. The works of a thousand and of a million sessions
/// say how long each step took, in processor time: comparable with each other also on a machine that has other work.
pub fn work(name: &str) -> Result<()> {
    if let Some(rate) = name.strip_prefix("growing-") {
        let (rate, growth) = match rate.strip_suffix("-ahead") {
            Some(rate) => (rate, Some(replayer::growth::Growth::start(None)?)),
            None => (rate, None),
        };
        let turns = Bench::new(1_000_000, 1).open_paced(200_000, rate.parse()?, growth);
        let over = |us: u64| turns.iter().filter(|&&ns| ns > us * 1000).count();
        println!(
            "turns {}: median {} us, longest {} us; over 0.2 ms {}, 0.5 ms {}, 1 ms {}, 3 ms {}",
            turns.len(),
            turns[turns.len() / 2] / 1000,
            turns[turns.len() - 1] / 1000,
            over(200),
            over(500),
            over(1000),
            over(3000)
        );
        return Ok(());
    }
    let sized = match name {
        "thousand" => Some((1_000, 1, 2_000)),
        "million" => Some((1_000_000, 1, 4)),
        "ten" => Some((100_000, 10, 4)),
        "hundred" => Some((10_000, 100, 4)),
        "turns" => Some((1_000_000, 1, 4)),
        _ => None,
    };
    if let Some((connections, copies, rounds)) = sized {
        let load = if name == "turns" { REQUESTS } else { SMALL };
        let mut bench = Bench::new(connections, copies);
        bench.clock = processor_time;
        let opening = bench.open(0..connections, load);
        bench.data(connections, load, 1);
        let (data, ack, timers) = bench.data(connections, load, rounds);
        let [opening, data, ack, timers] = [opening, data, ack, timers].map(|per| per / f64::from(copies));
        println!(
            "ns a copy: opening {opening:.0}, data {data:.1}, acknowledgment {ack:.1}, timers {timers:.1}"
        );
        return Ok(());
    }
    let (kind, rounds) = name.strip_suffix("-opening").map_or((name, ROUNDS), |kind| (kind, 0));
    let (load, copies) = match kind {
        "small" => (SMALL, 1),
        "large" => (LARGE, 1),
        "requests" => (REQUESTS, 1),
        "copies" => (SMALL, COPIES),
        _ => bail!("no such work: {name}"),
    };
    let mut bench = Bench::new(SESSIONS / copies, copies);
    bench.open(0..SESSIONS / copies, load);
    bench.data(SESSIONS / copies, load, rounds);
    Ok(())
}

/// Processor time of this thread, ns.
pub(crate) fn processor_time() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    time.unwrap_or_default().as_nanos() as u64
}

/// Instructions a packet (or a copy); the opening of the sessions is counted by itself and taken off.
pub(super) fn figures(_: Options) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let packets = f64::from(SESSIONS * ROUNDS);
    for (name, what, function) in [
        ("small", "64-byte frame: data packet", "captured"),
        ("small", "64-byte frame: acknowledgment", "responses"),
        ("large", "1400-byte frame: data packet", "captured"),
        ("requests", "request after a response: data packet", "captured"),
        ("copies", "64-byte frame x 10: a copy", "captured"),
    ] {
        let opening = count(&format!("{name}-opening"), function)?;
        let value = (count(name, function)? - opening) / packets;
        figures.push(Figure::new(format!("{what}, {SESSIONS} sessions"), value, "instructions"));
    }
    Ok(figures)
}

/// Instructions that the harness's `function` and what it calls take in a run of the work `name`.
fn count(name: &str, function: &str) -> Result<f64> {
    let program = std::env::current_exe().context("finding this program")?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(format!("--toggle-collect=*harness*Bench*{function}*"))
        .arg(program)
        .args(["--work", name])
        .output()
        .context("starting valgrind (Debian package valgrind)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected : "));
    let collected = collected.with_context(|| format!("callgrind said no count: {said}"))?.1;
    collected.trim().parse().with_context(|| format!("callgrind's count: {collected}"))
}
