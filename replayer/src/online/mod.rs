//! The online role: captures requests on this host and replays them to the targets.
//!
//! - [`args`]: its arguments
//! - `start`: puts the parts together
//! - `joining`: which connections that are open already can be joined at their next request
//! - `ramp`: the share of connections that grows
//!
//! This file has the role while it runs, and takes it apart again. The order matters twice: nothing is attached to the production interface
//! before everything else stands, and it is the first thing to go.

use crate::capture::{Capture, Verdicts};
use crate::channel::assistants::{Assistants, Change, Found};
use crate::cli::{ReplayArgs, Role, ServiceArg, StatsFormat};
use crate::clock::spent;
use crate::configuration::{self, Configuration, Partly, Settings};
use crate::diagnosis::{self, Diagnosis};
use crate::figures::Figures;
use crate::metrics::{self, Metrics};
use crate::net::{Device, Monitor};
use crate::privileges::{self, Keep};
use crate::reload::Reload;
use crate::report;
use crate::say::{caution, plain, say, told};
use crate::signals::{Asked, Signals};
use crate::worker::{Ask, Shared};
use anyhow::{Context, Result, bail};
use nix::net::if_::if_nameindex;
use replayer_common::hash::sample_threshold;
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub mod args;
mod joining;
mod ramp;
mod start;

pub use args::OnlineArgs;

use ramp::Ramp;

/// After so long connections that were in the middle of a request are looked at once more: the kernel's times of their sockets have moved
/// on by a tick (4 ms at 250 Hz). Also how long a look may take to be worth another one, for captured packets wait meanwhile; and how long
/// a packet may be on its way through the programs.
const MOMENT: Duration = Duration::from_millis(5);

/// Keys of `--config` that a running role takes over.
const LIVE: [&str; 2] = ["sample", "ramp"];

/// Runs the role until SIGTERM or SIGINT. SIGHUP has the configuration read again and the report written as it is then.
///
/// # Errors
/// When the role cannot start, with the cause and the remedy; when a worker dies or an interface is removed; when the report cannot
/// be written; when nothing of what was captured came to a target, or the accounts do not add up.
pub fn run(mut args: OnlineArgs, configuration: Configuration) -> Result<()> {
    privileges::check()?;
    let signals = Signals::install()?;
    let started = Instant::now();
    let Some(mut online) = Online::start(&args, configuration, &signals)? else { return Ok(()) };
    privileges::drop_all_but(Keep::Main);
    let ended = online.serve(&mut args, &signals, started);
    // After an error too: the sessions end cleanly, and what was done until then is told.
    let stopped = online.stop();
    let verdicts = online.capture.verdicts();
    online.say_tls();
    let mut figures = online.figures(&verdicts);
    figures.handed_over = verdicts.handed_over();
    let (seconds, cpu) = spent(started);
    let mut summary = figures.summary(seconds, cpu);
    let not_chosen = verdicts.not_chosen();
    if not_chosen > 0 {
        summary += &format!(
            "\n  {not_chosen} packets of clients that were not chosen (--clients, --exclude-clients) were left alone"
        );
    }
    say!("{summary}");
    let written = match &args.replay.report {
        Some(path) => {
            let report = figures.report("online", Some(&verdicts), seconds, cpu);
            report::write(path, &report, &figures.identities())
        }
        None => Ok(()),
    };
    ended.and(stopped).and(written).and_then(|()| figures.ensure_done())
}

/// The running role. Dropping it detaches everything.
struct Online {
    configuration: Configuration,
    assistants: Assistants,
    capture: Capture,
    _monitor: Monitor,
    /// Where it captures and where it sends.
    devices: [Device; 2],
    services: Vec<ServiceArg>,
    /// Services whose clients were said to speak TLS.
    tls_said: BTreeSet<usize>,
    ramp: Ramp,
    metrics: Option<Metrics>,
    workers: Vec<Running>,
    reload: Reload<Reloaded>,
}

/// What SIGHUP has brought, to be taken over.
struct Reloaded {
    /// What the configuration file says, if there is one.
    said: Option<(Box<OnlineArgs>, Settings)>,
    assistants: Found,
}

/// A worker's thread.
struct Running {
    shared: Arc<Shared>,
    /// `None` once it has been waited for.
    thread: Option<JoinHandle<()>>,
    cpu: Option<usize>,
}

impl Online {
    /// A device that is down may come up again; one that is gone took programs and sockets along.
    fn check_devices(&self) -> Result<()> {
        let present = if_nameindex().context("list the interfaces")?;
        for device in &self.devices {
            if !present.iter().any(|other| other.index() == device.ifindex) {
                bail!("the interface {} was removed; start the replayer again when it is back", device.name);
            }
        }
        Ok(())
    }

    /// Prints a line now and then, until a signal comes or something is broken beyond repair.
    fn serve(&mut self, args: &mut OnlineArgs, signals: &Signals, started: Instant) -> Result<()> {
        let mut before = Figures::default();
        let mut interval = args.replay.stats_interval();
        let attached = Instant::now();
        self.ramp.began = attached;
        let mut next_line = attached + interval;
        let mut next_look = attached + diagnosis::INTERVAL;
        let mut diagnosis = Diagnosis::new(true, &self.services);
        let mut longest_lag_us = 0;
        loop {
            match signals.wait_until(self.next_step().map_or(next_look, |step| step.min(next_look)))? {
                Some(Asked::Stop) => return Ok(()),
                Some(Asked::Reload) => self.reload.ask(),
                None => {}
            }
            if let Some(outcome) = self.reload.outcome() {
                let asked = args.replay.stats;
                if let Err(error) = outcome.and_then(|reloaded| self.take_over(args, reloaded)) {
                    configuration::say_not_taken_over(&error);
                }
                let verdicts = self.capture.verdicts();
                let figures = self.figures(&verdicts);
                longest_lag_us = longest_lag_us.max(figures.lag_us);
                let (seconds, cpu) = spent(started);
                let report = figures.report("online", Some(&verdicts), seconds, cpu);
                report::write_interim(args.replay.report.as_deref(), &report);
                if asked != args.replay.stats {
                    interval = args.replay.stats_interval();
                    next_line = Instant::now() + interval;
                    before = figures;
                }
            }
            if self.reload.is_due()
                && let Err(error) = self.begin_reload(args, signals)
            {
                configuration::say_not_taken_over(&error);
            }
            self.take_step()?;
            if Instant::now() < next_look {
                continue;
            }
            next_look = (next_look + diagnosis::INTERVAL).max(Instant::now());
            if !self.reload.is_under_way() {
                let changes = self.assistants.leave(Instant::now(), self.workers.len());
                self.change_assistants(changes);
            }
            if self.workers.iter().any(|worker| worker.thread.as_ref().is_none_or(JoinHandle::is_finished)) {
                bail!("a worker died; this is a bug of the replayer, please report it with the lines above");
            }
            self.check_devices()?;
            self.say_tls();
            let verdicts = self.capture.verdicts();
            let mut figures = self.figures(&verdicts);
            longest_lag_us = longest_lag_us.max(figures.lag_us);
            if let Some(metrics) = &self.metrics {
                let (seconds, cpu) = spent(started);
                metrics.publish(metrics::of_replay("online", &figures, Some(&verdicts), seconds, cpu));
            }
            let (left_out, not_chosen) = (verdicts.left_out(), verdicts.not_chosen());
            for trouble in diagnosis.look(attached.elapsed(), &figures, left_out, not_chosen) {
                let text = trouble.describe(&self.services, &args.replay, &self.devices[0].name);
                caution!(trouble.fields(); "{text}");
            }
            if args.replay.stats.is_some() && Instant::now() >= next_line {
                next_line += interval;
                figures.lag_us = std::mem::take(&mut longest_lag_us);
                let line = figures.line(started.elapsed().as_secs_f64());
                match args.replay.stats_format {
                    StatsFormat::Json => report::print(&line)?,
                    StatsFormat::Text => {
                        let text = figures.line_text(&before, interval.as_secs_f64());
                        plain!(json!({"figures": line}); "{text}");
                    }
                }
                before = figures;
            }
        }
    }

    /// Looks at what the configuration file says now, and at where the assistants' names lead now.
    fn begin_reload(&mut self, args: &OnlineArgs, signals: &Signals) -> Result<()> {
        let configuration = self.configuration.clone();
        let search = self.assistants.search(self.workers.len() as u32);
        let (names, replay) = (args.assistants.clone(), args.replay.clone());
        self.reload.begin(signals, move || {
            let said = match configuration.read_again()? {
                Some((Role::Online(new), settings)) => Some((new, settings)),
                _ => None,
            };
            let named = match &said {
                Some((new, _)) => {
                    new.replay.check()?;
                    new.replay.named(&new.assistants)
                }
                None => replay.named(&names),
            };
            let assistants = search.run(&named)?;
            Ok(Reloaded { said, assistants })
        })
    }

    /// Takes that over, as far as no session notices.
    fn take_over(&mut self, args: &mut OnlineArgs, Reloaded { said, assistants }: Reloaded) -> Result<()> {
        let changes = self.assistants.take_over(assistants, Instant::now());
        self.change_assistants(changes);
        let Some((new, settings)) = said else { return Ok(()) };
        let Online { capture, ramp, workers, .. } = self;
        if (new.ramp, new.replay.sample) != (args.ramp, args.replay.sample) {
            let threshold = sample_threshold(new.replay.sample.0);
            // What leaves the sample is not captured any more before its sessions end, and what enters it, only when it is welcome.
            if threshold < capture.threshold() {
                let taken =
                    Partly("the assistants and the key are as the file says now, all else is as before");
                capture.configure(workers.len() as u32, threshold).context(taken)?;
            }
            for worker in workers.iter() {
                worker.shared.ask(Ask::Sample(threshold));
            }
            *ramp = Ramp::new(new.ramp, capture.threshold(), threshold);
            (args.ramp, args.replay.sample) = (new.ramp, new.replay.sample);
        }
        args.assistants = new.assistants;
        args.replay.adopt(new.replay);
        self.configuration.taken_over(settings, &[&LIVE[..], &ReplayArgs::LIVE].concat());
        Ok(())
    }

    fn change_assistants(&self, changes: Vec<Change>) {
        for (worker, change) in self.workers.iter().zip(changes) {
            worker.shared.ask(Ask::Assistants(change));
        }
    }

    /// When the share of connections grows next; `None`: it does not any more.
    fn next_step(&self) -> Option<Instant> {
        let growing = self.capture.threshold() < self.ramp.full;
        growing.then(|| Instant::now() + Ramp::STEP)
    }

    /// Lets the program take the share of connections that the ramp has come to.
    fn take_step(&mut self) -> Result<()> {
        let threshold = self.ramp.threshold(self.ramp.began.elapsed());
        if threshold != self.capture.threshold() {
            self.capture.configure(self.workers.len() as u32, threshold)?;
        }
        Ok(())
    }

    /// Says once of each service whose clients speak TLS that it cannot be replayed.
    fn say_tls(&mut self) {
        let is_tls = |index| {
            self.workers.iter().any(|worker| {
                let snapshot =
                    worker.shared.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                snapshot.tls.get(index) == Some(&true)
            })
        };
        for (index, service) in self.services.iter().enumerate() {
            if is_tls(index) && self.tls_said.insert(index) {
                caution!(
                    "clients of {} speak TLS, which cannot be replayed: only the production server has the keys. \
                     These connections are counted (packets_tls) and left out; to replay them, capture behind the TLS endpoint",
                    service.online_name()
                );
            }
        }
    }

    /// Those of all workers, and what was lost before it came to them.
    fn figures(&self, verdicts: &Verdicts) -> Figures {
        let mut figures = Figures::of(&self.services);
        for worker in &self.workers {
            let mut snapshot =
                worker.shared.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            figures.add(&snapshot, worker.cpu);
            snapshot.lag_us = 0;
        }
        figures.lost_before(verdicts.losses());
        figures
    }

    /// Detaches from the production interface, lets the workers end their sessions, and waits for them.
    ///
    /// # Errors
    /// When one has died.
    fn stop(&mut self) -> Result<()> {
        self.capture.detach();
        // What the programs have in hand arrives.
        std::thread::sleep(MOMENT);
        for worker in &self.workers {
            worker.shared.stop.store(true, Ordering::Release);
            // A full counter wakes the worker just as well.
            let _ = worker.shared.wake.write(1);
        }
        let threads: Vec<_> = self.workers.iter_mut().filter_map(|worker| worker.thread.take()).collect();
        let died = threads.into_iter().filter_map(|thread| thread.join().err()).count();
        if died > 0 {
            bail!(
                "{died} of {} workers died; this is a bug of the replayer, please report it with the lines above. Some sessions may be open \
                 at the target",
                self.workers.len()
            );
        }
        Ok(())
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        // After an error: nothing stays attached, no thread stays behind.
        if self.workers.iter().any(|worker| worker.thread.is_some())
            && let Err(error) = self.stop()
        {
            caution!("{}", told(&error));
        }
    }
}
