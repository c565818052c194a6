//! A soak: the highest rate that the machine sustains, for as long as wanted, and whether the roles come out of it as they went in.
//!
//! First both kinds of load (kept connections, and one connection for each request) are run as fast as they are answered, replayed, a moment
//! each. Then both at once, each at a share of what it reached: half and half would be all that the machine has. That goes on in rounds. While a
//! round runs both roles are looked at each second; at its end all connections are closed, the two servers' ledgers are compared id by id, and
//! the roles must be at rest: no session, no byte held, no identity registered, no frame under way. What they have then can be compared from round to
//! round: memory and descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::clients::Load;
use crate::lab::{Host, Lab};
use crate::ledger::{self, Difference};
use crate::load::Summary;
use crate::pairs::NginxPair;
use crate::process::{Process, raise_file_limit};
use crate::replay::{Role, service};
use crate::wait::{holds_within, wait_for};

const HTTP: u16 = 8080;
const METRICS_PORT: u16 = 9464;
/// Connections of either load.
const CONNECTIONS: u32 = 50;
/// How long each load is run alone, to see what the machine sustains.
const TRIAL_SECONDS: u32 = 2;
/// How long after a round the target may take to get everything, and the roles to be at rest.
const REST_LIMIT: Duration = Duration::from_secs(20);
/// Rounds at least: the first half of them warms up.
const ROUNDS_MIN: u32 = 4;
/// How much more ordinary memory a role may have at rest in the second half of the rounds than in the first, KiB: room for a small table that
/// doubles.
const MEMORY_GROWTH_KIB: u64 = 2048;

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Soak {
    /// How long the load lasts, in all.
    pub seconds: u32,
    /// About how long a round of it lasts.
    pub round_seconds: u32,
    /// How much of what the machine sustains, up to 1.
    pub share: f64,
}

/// A role at rest, after a round, and the most that it had during it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Held {
    /// Resident memory, KiB.
    pub resident_kib: u64,
    /// Of it, in huge pages: large tables, whose size is fixed at the start. A page counts from its first use on.
    pub huge_kib: u64,
    /// The most resident memory while the load ran, KiB.
    pub resident_kib_most: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// The most open descriptors while the load ran.
    pub descriptors_most: u64,
}

/// What came of a round.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// Requests that the online server logged, each of which the target logged once.
    pub requests: u64,
    /// Connections that carried them.
    pub connections: u64,
    /// Requests a second.
    pub rate: f64,
    /// The most sessions at once.
    pub sessions_most: u64,
    /// 99 % of the clients' responses took no longer, on kept connections, us.
    pub client_p99_us: f64,
    /// The online role.
    pub online: Held,
    /// The assistant.
    pub assistant: Held,
}

/// What came of all of it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// What either load reached alone, requests a second: kept connections, a connection for each request.
    pub sustained: [f64; 2],
    /// Round by round.
    pub rounds: Vec<Round>,
}

impl Soak {
    /// Runs it in a lab of its own; `show` is told each round when it is over.
    ///
    /// # Errors
    /// When a request is lost, comes twice, or is answered to nobody; when a role is not at rest after a round, or loses packets, or its accounts
    /// do not add up. What the rounds say of memory and descriptors is judged by [`Outcome::judge`].
    pub fn run(self, lab: &Lab, mut show: impl FnMut(usize, &Round)) -> Result<Outcome> {
        raise_file_limit()?;
        // Or the client's ports are used up within a minute.
        lab.client().namespace().set_sysctl("ipv4/tcp_tw_reuse", "1")?;
        let metrics = format!("127.0.0.1:{METRICS_PORT}");
        let arguments = ["--metrics", metrics.as_str()];
        let mut this = Running {
            lab,
            nginx: NginxPair::start(lab, HTTP)?,
            assistant: Role::assistant(lab, lab.assistant(), &arguments)?,
            online: Role::online(
                lab,
                lab.online(),
                &[service(HTTP, lab.target().v4(), HTTP)],
                lab.assistant().v4().into(),
                &arguments,
            )?,
            requests: 0,
        };
        let mut sustained = [0.0; 2];
        for (reached, kind) in sustained.iter_mut().zip(KINDS) {
            *reached = this.load(kind, None, TRIAL_SECONDS)?.finish()?.requests_per_second;
        }
        // What the trial did to the machine is over, and does not count.
        this.rest()?;
        this.compare()?;
        let lost = this.lost()?;
        let rates = sustained.map(|rate| rate * self.share / 2.0);
        let count = (self.seconds / self.round_seconds).max(ROUNDS_MIN);
        let mut rounds = Vec::new();
        for number in 0..count as usize {
            let round =
                this.round(rates, self.seconds.div_ceil(count)).with_context(|| format!("round {number}"))?;
            show(number, &round);
            rounds.push(round);
        }
        ensure!(this.lost()? == lost, "packets were lost in the kernel: {:?}, before {lost:?}", this.lost()?);
        this.online.stop_online()?;
        this.assistant.stop::<serde_json::Value>()?;
        Ok(Outcome { sustained, rounds })
    }
}

/// A kept connection, then one for each request.
const KINDS: [&str; 2] = ["kept", "short"];

struct Running<'a> {
    lab: &'a Lab,
    nginx: NginxPair,
    /// Dropped, and so ended, before the assistant.
    online: Role,
    assistant: Role,
    /// Until now, for the ids of the next.
    requests: u64,
}

impl Running<'_> {
    fn load(&mut self, kind: &str, rate: Option<f64>, seconds: u32) -> Result<Load> {
        let per_connection = if kind == "short" { 1 } else { 0 };
        let mut arguments = format!(
            "--connect {}:{HTTP} --protocol http --expect-server online --connections {CONNECTIONS} \
             --per-connection {per_connection} --seconds {seconds} --path /{kind} --first-id {}",
            self.lab.online().v4(),
            self.requests + 1
        );
        if let Some(rate) = rate {
            arguments += &format!(" --rate {rate}");
        }
        Load::start(self.lab, self.lab.client(), kind, &arguments)
    }

    fn round(&mut self, rates: [f64; 2], seconds: u32) -> Result<Round> {
        let mut loads = Vec::new();
        for (kind, rate) in KINDS.into_iter().zip(rates) {
            loads.push(self.load(kind, Some(rate), seconds)?);
        }
        let (mut held, mut sessions_most) = ([Held::default(); 2], 0.0f64);
        let until = Instant::now() + Duration::from_secs(seconds.into());
        while Instant::now() < until {
            std::thread::sleep(Duration::from_secs(1).min(until - Instant::now()));
            for (held, role) in held.iter_mut().zip([&self.online, &self.assistant]) {
                held.resident_kib_most = held.resident_kib_most.max(role.process.resident_kib()?);
                held.descriptors_most = held.descriptors_most.max(descriptors(&role.process)?);
            }
            sessions_most = sessions_most.max(figures(self.lab.online())?["replayer_sessions_live"]);
        }
        let summaries: Vec<Summary> = loads.iter_mut().map(Load::finish).collect::<Result<_>>()?;
        for summary in &summaries {
            ensure!(
                (summary.errors, summary.unanswered) == (0, 0),
                "a client saw errors: {:?}",
                summary.errors_by_kind
            );
        }
        self.rest()?;
        for (held, role) in held.iter_mut().zip([&self.online, &self.assistant]) {
            held.resident_kib = role.process.resident_kib()?;
            held.huge_kib = role.process.huge_kib()?;
            held.descriptors = descriptors(&role.process)?;
        }
        let requests: u64 = summaries.iter().map(|summary| summary.requests).sum();
        let compared = self.compare()?;
        ensure!(compared == requests, "{requests} requests were made, {compared} are in the ledgers");
        Ok(Round {
            requests,
            connections: summaries.iter().map(|summary| summary.connections_used).sum(),
            rate: summaries.iter().map(|summary| summary.requests_per_second).sum(),
            sessions_most: sessions_most as u64,
            client_p99_us: summaries[0].latency_us.p99,
            online: held[0],
            assistant: held[1],
        })
    }

    /// Waits until no session is live, nothing is held, no identity registered, and no frame under way.
    fn rest(&self) -> Result<()> {
        let gauges = [
            (self.lab.online(), "replayer_sessions_live"),
            (self.lab.online(), "replayer_held_bytes"),
            (self.lab.assistant(), "replayer_assistant_registrations"),
            (self.lab.assistant(), "replayer_assistant_records_waiting"),
        ];
        for (host, name) in gauges {
            let now = || figures(host).ok().and_then(|figures| figures.get(name).copied());
            wait_for(&format!("0 {name}"), REST_LIMIT, || now() == Some(0.0))
                .with_context(|| format!("{:?}", now()))?;
        }
        let under_way = || {
            let figures = figures(self.lab.online()).ok()?;
            let of = |name: &str| figures.get(&format!("replayer_port_{name}_total")).copied();
            Some(of("transmitted")? - of("completed")?)
        };
        wait_for("all transmitted frames back", REST_LIMIT, || under_way() == Some(0.0))
            .with_context(|| format!("{:?}", under_way()))
    }

    /// Compares what both servers logged, and lets them forget it: how many requests each logged.
    fn compare(&mut self) -> Result<u64> {
        // The sessions are over; the last lines are on their way to the files.
        let mut compared = Ok(Difference::default());
        let equal = holds_within(REST_LIMIT, || {
            compared =
                self.nginx.ledgers(0).map(|(online, target)| ledger::compare_addresses(&online, &target));
            compared.as_ref().is_ok_and(|it| (it.missing, it.extra) == (0, 0))
        });
        let difference = compared?;
        if !equal {
            bail!("the ledgers differ: {difference:#?}");
        }
        self.nginx.online.forget()?;
        self.nginx.target.forget()?;
        self.requests += difference.online as u64;
        Ok(difference.online as u64)
    }

    /// Packets for which some ring had no room.
    fn lost(&self) -> Result<[u64; 2]> {
        let of = |host, name: &str| -> Result<u64> {
            Ok(*figures(host)?.get(name).with_context(|| format!("no {name}"))? as u64)
        };
        Ok([
            of(self.lab.online(), "replayer_packets_lost_in_capture_total")?,
            of(self.lab.assistant(), "replayer_assistant_frames_dropped_by_kernel_total")?,
        ])
    }
}

/// The figures that a role on this host serves (`--metrics`), by name and labels.
fn figures(host: &Host) -> Result<BTreeMap<String, f64>> {
    let text = host.namespace().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", METRICS_PORT)).context("connecting to a role")?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(text.lines().filter(|line| line.starts_with("replayer_")).filter_map(sample).collect())
}

/// Open descriptors of a process.
fn descriptors(process: &Process) -> Result<u64> {
    Ok(fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count() as u64)
}

impl Outcome {
    /// Requests of all rounds.
    pub fn requests(&self) -> u64 {
        self.rounds.iter().map(|round| round.requests).sum()
    }

    /// Compares the second half of the rounds with the first, in which tables and buffers got as large as this load needs them. What leaks with
    /// each request, each connection or each second grows on. Tables reach as far as the busiest moment needed them, and a busier one may come at
    /// any time; what leaks places of them needs more of them after every round.
    ///
    /// # Errors
    /// When a role's ordinary memory at rest, or its number of descriptors at rest or under load, was higher in the second half, for memory
    /// by more than 2 MiB; when more huge pages were in use after each of its rounds than after the one before.
    pub fn judge(&self) -> Result<()> {
        for (role, of) in [("online", Round::online as fn(&Round) -> Held), ("assistant", Round::assistant)] {
            let held: Vec<Held> = self.rounds.iter().map(of).collect();
            let all = |figure: fn(&Held) -> u64| held.iter().map(figure).collect::<Vec<_>>();
            for (what, allowed, all) in [
                (
                    "KiB of ordinary memory at rest",
                    MEMORY_GROWTH_KIB,
                    all(|held| held.resident_kib.saturating_sub(held.huge_kib)),
                ),
                ("descriptors at rest", 0, all(|held| held.descriptors)),
                ("descriptors under load", 0, all(|held| held.descriptors_most)),
            ] {
                let (first, second) = all.split_at(all.len() / 2);
                let (before, after) =
                    first.iter().max().zip(second.iter().max()).context("too few rounds")?;
                ensure!(*after <= before + allowed, "{role}: {after} {what}, {before} before: {all:?}");
            }
            let tables = all(|held| held.huge_kib);
            let second = &tables[(tables.len() / 2).saturating_sub(1)..];
            ensure!(
                second.windows(2).any(|pair| pair[1] <= pair[0]),
                "{role}: KiB of tables in use grow with every round: {tables:?}"
            );
        }
        Ok(())
    }
}

impl Round {
    fn online(&self) -> Held {
        self.online
    }

    fn assistant(&self) -> Held {
        self.assistant
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(ordinary_kib: [u64; 6], huge_pages: [u64; 6], descriptors: [u64; 6]) -> Outcome {
        let memory = ordinary_kib.into_iter().zip(huge_pages.map(|pages| 2048 * pages));
        let rounds = memory.zip(descriptors).map(|((ordinary_kib, huge_kib), descriptors)| Round {
            requests: 1,
            connections: 1,
            rate: 1.0,
            sessions_most: 1,
            client_p99_us: 1.0,
            online: Held::default(),
            assistant: Held {
                resident_kib: ordinary_kib + huge_kib,
                huge_kib,
                resident_kib_most: ordinary_kib + huge_kib,
                descriptors,
                descriptors_most: descriptors,
            },
        });
        Outcome { sustained: [1.0; 2], rounds: rounds.collect() }
    }

    #[test]
    fn what_grows_on_after_the_warm_up_is_named() {
        let (flat, open) = ([20_000, 30_000, 31_000, 31_004, 31_000, 33_048], [29, 30, 30, 30, 30, 29]);
        // Busier moments in the fourth and in the last round.
        let steps = [7, 9, 9, 14, 14, 15];
        outcome(flat, steps, open).judge().unwrap();
        let error = |outcome: Outcome| outcome.judge().unwrap_err().to_string();
        let leak = error(outcome([30_000, 32_000, 34_000, 36_000, 38_000, 40_000], steps, open));
        assert!(leak.starts_with("assistant: 40000 KiB of ordinary memory at rest, 34000 before"), "{leak}");
        let leak = error(outcome(flat, [7, 8, 9, 10, 11, 12], open));
        assert!(leak.contains("grow with every round"), "{leak}");
        let leak = error(outcome(flat, steps, [29, 30, 30, 30, 30, 31]));
        assert!(leak.contains("31 descriptors at rest"), "{leak}");
    }
}
