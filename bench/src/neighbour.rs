//! What a neighbour costs a server that has a core to itself, with its clients and the network between them: the programs that capture its requests,
//! one that only sleeps, and none at all, which tells how far the machine's own unrest goes.
//!
//! Each is measured between two measurements without a neighbour, and compared with their mean: what a machine does drifts from second to second.

use crate::live::{EASY_RATE, HTTP, SATURATING, latency, wrk};
use crate::report::{Figure, Wanted};
use anyhow::{Context, Result, anyhow, bail};
use core_affinity::CoreId;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl::set_timerslack;
use nix::unistd::Pid;
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::process::Process;
use replayer_tests::servers::{Nginx, start, tool};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the sleeping one sleeps.
const SLEEP: Duration = Duration::from_micros(50);

/// What shares the machine with the server, on a core of its own.
#[derive(Clone, Copy)]
enum Neighbour {
    Nobody,
    Sleeper,
    Tcpdump,
    /// `replayer record`, whose capture is the online role's, by this back end.
    Capture(&'static str),
}

const NEIGHBOURS: [Neighbour; 5] = [
    Neighbour::Nobody,
    Neighbour::Sleeper,
    Neighbour::Tcpdump,
    Neighbour::Capture("ring"),
    Neighbour::Capture("mirror"),
];

impl Neighbour {
    fn name(self) -> String {
        match self {
            Neighbour::Nobody => "nobody".into(),
            Neighbour::Sleeper => format!("one that sleeps {} us at a time", SLEEP.as_micros()),
            Neighbour::Tcpdump => "tcpdump".into(),
            Neighbour::Capture(back_end) => format!("capture by {back_end}"),
        }
    }

    /// Starts it on the CPU; it works when this returns.
    fn start(self, lab: &Lab, cpu: CoreId) -> Result<Running> {
        let online = lab.online();
        let file = lab.dir().join("recorded");
        let (mut command, ready) = match self {
            Neighbour::Nobody => return Ok(Running::Nobody),
            Neighbour::Sleeper => return on_cpu(cpu, || Ok(Running::Sleeper(Sleeper::start()))),
            Neighbour::Tcpdump => {
                let mut command = online.command("tcpdump");
                command.args(["-i", NIC, "-s", "0", "-Z", "root", "-w"]).arg(file);
                command.arg(format!("tcp dst port {HTTP}"));
                (command, "listening on")
            }
            Neighbour::Capture(back_end) => {
                let mut command = online.command(tool("replayer")?);
                command.args(["record", "-i", NIC, "--capture", back_end, "--files", "1", "-x"]);
                command.args([&HTTP.to_string(), "-w"]).arg(file);
                (command, "record ready")
            }
        };
        let mut process = on_cpu(cpu, || start(lab, online, "recorder", &mut command))?;
        process.wait_for_message(ready, Duration::from_secs(10))?;
        Ok(Running::Process(process))
    }
}

enum Running {
    Nobody,
    Sleeper(Sleeper),
    Process(Process),
}

impl Running {
    fn stop(self) -> Result<()> {
        match self {
            Running::Nobody => Ok(()),
            Running::Sleeper(sleeper) => sleeper.stop(),
            Running::Process(mut process) => process.stop().map(drop),
        }
    }
}

struct Sleeper {
    over: Arc<AtomicBool>,
    thread: JoinHandle<nix::Result<()>>,
}

impl Sleeper {
    /// On the CPUs of whoever starts it.
    fn start() -> Sleeper {
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let thread = std::thread::spawn(move || {
            // As the workers: the default slack would come on top.
            set_timerslack(1_000)?;
            while !told.load(Ordering::Relaxed) {
                std::thread::sleep(SLEEP);
            }
            Ok(())
        });
        Sleeper { over, thread }
    }

    fn stop(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        let slept = self.thread.join().map_err(|_| anyhow!("the sleeping thread panicked"))?;
        slept.context("cannot set the timer slack")
    }
}

/// Both measures with each neighbour, so many times: seconds a measurement.
pub(crate) fn measure(seconds: u32, rounds: usize) -> Result<Vec<Figure>> {
    let cpus = core_affinity::get_core_ids().context("look up the CPUs that this process may use")?;
    let [serving, other, ..] = cpus[..] else { bail!("one CPU: no neighbour would have its own") };
    let lab = Lab::up(Plan::default())?;
    // The clients as well, and with them the network between the hosts, whose work is done by the one who sends.
    let _nginx = on_cpu(serving, || Nginx::start(&lab, lab.online(), HTTP))?;
    let rate = || on_cpu(serving, || wrk(&lab, SATURATING, seconds));
    let p99 = || on_cpu(serving, || latency(&lab, EASY_RATE, seconds));
    let mut figures = compare(&lab, other, rounds, rate, "requests/s", "the saturated server's rate")?;
    let what = format!("p99 at {EASY_RATE} requests/s");
    figures.extend(compare(&lab, other, rounds.div_ceil(2), p99, "us", &what)?);
    Ok(figures)
}

fn compare(
    lab: &Lab,
    cpu: CoreId,
    rounds: usize,
    measure: impl Fn() -> Result<f64>,
    unit: &'static str,
    what: &str,
) -> Result<Vec<Figure>> {
    let mut alone = vec![measure()?];
    let mut shares = [const { Vec::new() }; NEIGHBOURS.len()];
    for _ in 0..rounds {
        for (neighbour, shares) in NEIGHBOURS.into_iter().zip(&mut shares) {
            let before = alone[alone.len() - 1];
            let running = neighbour.start(lab, cpu)?;
            let with = measure()?;
            running.stop()?;
            let after = measure()?;
            shares.push(200.0 * with / (before + after));
            alone.push(after);
        }
    }
    let mut figures = vec![Figure::median(format!("server on one core, no neighbour: {what}"), alone, unit)];
    figures.extend(NEIGHBOURS.into_iter().zip(shares).map(|(neighbour, shares)| {
        let name = format!("neighbour, {}: {what}", neighbour.name());
        let figure = Figure::median(name, shares, "% of without");
        let wanted = if unit == "us" { Wanted::AtMost(102.0) } else { Wanted::AtLeast(98.0) };
        if matches!(neighbour, Neighbour::Capture(_)) { figure.wanted(wanted) } else { figure }
    }));
    Ok(figures)
}

/// Runs `start` on one CPU, and whatever it starts.
fn on_cpu<T>(cpu: CoreId, start: impl FnOnce() -> Result<T>) -> Result<T> {
    let all = sched_getaffinity(Pid::from_raw(0))?;
    let mut one = CpuSet::new();
    one.set(cpu.id)?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    let outcome = start();
    sched_setaffinity(Pid::from_raw(0), &all)?;
    outcome
}
