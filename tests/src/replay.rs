//! The roles under test, started on hosts of a lab, and what they report.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::lab::{Host, Lab, NIC};
use crate::load::Percentiles;
use crate::process::Process;
use crate::servers::{start, tool};

/// How long a role may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(15);
/// How long after a stop its report must be complete.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// A running role.
#[derive(Debug)]
pub struct Role {
    /// Its process: signals, output, CPU time.
    pub process: Process,
    report: PathBuf,
}

/// What the online role writes when it stops (`--report`), as far as tests look at it.
#[derive(Debug, Clone, Deserialize)]
pub struct Report {
    /// Every counter, by name.
    pub counters: BTreeMap<String, u64>,
    /// Sums that must be equal.
    pub accounting: Vec<Identity>,
    /// What the BPF programs counted, by program and verdict.
    #[serde(default)]
    pub kernel: Value,
    /// What the ports counted, and the kernel of their sockets.
    #[serde(default)]
    pub port: Value,
    /// By worker.
    pub workers: Vec<Share>,
    /// By service.
    pub services: Vec<ServiceFigures>,
    /// Packets that were to be captured and came to no worker.
    pub packets_lost_in_capture: u64,
    /// From a request's transmission to the first byte of the target's response.
    pub target_response_us: Percentiles,
    /// From a packet's capture to its first transmission.
    pub capture_to_transmit_us: Percentiles,
}

/// What one worker did.
#[derive(Debug, Clone, Deserialize)]
pub struct Share {
    /// The CPU that it was bound to, if any.
    pub cpu: Option<usize>,
    /// Packets that it got from the mirror.
    pub packets_captured: u64,
    /// Sessions that it opened.
    pub sessions_opened: u64,
    /// Packets that left by its queue.
    pub packets_transmitted: u64,
}

/// What became of a service.
#[derive(Debug, Clone, Deserialize)]
pub struct ServiceFigures {
    /// Address and port of the target.
    pub target: String,
    /// Sessions opened.
    pub sessions_opened: u64,
    /// Of these, those that the target accepted.
    pub sessions_established: u64,
    /// Ended, for the target refused them.
    pub sessions_refused: u64,
    /// Ended, for the target did not answer.
    pub sessions_unanswered: u64,
    /// Ended.
    pub sessions_ended: u64,
    /// Datagrams sent.
    pub datagrams_sent: u64,
    /// Datagrams that came back.
    pub datagrams_answered: u64,
}

/// Two sums of counters, each with what the other must come to.
#[derive(Debug, Clone, Deserialize)]
pub struct Identity {
    /// What is added up.
    pub identity: String,
    /// One sum.
    pub left: u64,
    /// The other.
    pub right: u64,
}

/// One line of `replayer online --stats 1 --stats-format json`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Stats {
    /// Seconds since the role was ready.
    pub t: f64,
    /// Sessions now.
    pub sessions_live: u64,
    /// Sessions until now.
    pub sessions_opened: u64,
    /// Turns sent until now.
    pub turns_sent: u64,
    /// Longest time from capture to transmission in the last interval, in microseconds.
    pub lag_us: u64,
    /// Captured bytes that wait to be sent.
    pub held_bytes: u64,
    /// What was not replayed until now, by reason.
    #[serde(default)]
    pub not_replayed: BTreeMap<String, u64>,
    /// Packets that were to be captured and came to no worker, until now.
    #[serde(default)]
    pub packets_lost_in_capture: u64,
}

impl Role {
    /// Starts `replayer assistant -i eth0` with further arguments, ready on return.
    pub fn assistant(lab: &Lab, host: &Host, arguments: &[&str]) -> Result<Self> {
        Self::start(lab, host, "assistant", &["-i", NIC], arguments)
    }

    /// Starts `replayer online -i eth0` with the services and further arguments, ready on return.
    pub fn online(
        lab: &Lab,
        host: &Host,
        services: &[String],
        assistant: IpAddr,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::online_with(lab, host, services, &[assistant], arguments)
    }

    /// The same with several assistants.
    pub fn online_with(
        lab: &Lab,
        host: &Host,
        services: &[String],
        assistants: &[IpAddr],
        arguments: &[&str],
    ) -> Result<Self> {
        Self::online_at(lab, host, NIC, services, assistants, arguments)
    }

    /// The same with another NIC to capture on.
    pub fn online_at(
        lab: &Lab,
        host: &Host,
        nic: &str,
        services: &[String],
        assistants: &[IpAddr],
        arguments: &[&str],
    ) -> Result<Self> {
        let services = services.join(",");
        let assistants = assistants.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
        let fixed = ["-x", &services, "-s", &assistants, "-i", nic, "--stats", "1", "--stats-format", "json"];
        Self::start(lab, host, "online", &fixed, arguments)
    }

    /// Starts a role with a configuration file, ready on return; where its report goes is typed.
    pub fn configured(lab: &Lab, host: &Host, role: &str, file: &Path) -> Result<Self> {
        let file = file.to_str().context("the path is not UTF-8")?;
        Self::start(lab, host, role, &["--config", file], &[])
    }

    fn start(lab: &Lab, host: &Host, role: &str, fixed: &[&str], arguments: &[&str]) -> Result<Self> {
        // A host may run several, at once or one after another: each has files of its own.
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("{role}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let report = lab.dir().join(format!("{}-{name}-report.json", host.name()));
        let mut command = host.command(tool("replayer")?);
        command.arg(role).args(fixed).args(arguments).arg("--report").arg(&report);
        let process = start(lab, host, &name, &mut command)?;
        let mut this = Self { process, report };
        this.process.wait_for_message("ready", READY_LIMIT)?;
        Ok(this)
    }

    /// The newest line of statistics, once there is one.
    pub fn stats(&self) -> Option<Stats> {
        let output = self.process.output();
        let end = output.rfind('\n')?;
        serde_json::from_str(output[..end].lines().next_back()?).ok()
    }

    /// Where its report goes, at its end and on SIGHUP.
    pub fn report_path(&self) -> &Path {
        &self.report
    }

    /// Stops it by SIGTERM: it must end by itself with exit code 0 and leave its report, with the accounts in order.
    pub fn stop<R: DeserializeOwned>(&mut self) -> Result<R> {
        self.process.signal(nix::sys::signal::Signal::SIGTERM)?;
        self.ended_well()
    }

    /// Stops an online role.
    pub fn stop_online(&mut self) -> Result<Report> {
        self.stop()
    }

    /// Waits for its end after a signal, which must be a good one, and reads its report, whose accounts must be in order.
    pub fn ended_well<R: DeserializeOwned>(&mut self) -> Result<R> {
        let status = self.process.wait(STOP_LIMIT)?;
        ensure!(status.success(), "{} ended with {status}:\n{}", self.process.name(), self.process.tail());
        let text =
            fs::read_to_string(&self.report).with_context(|| format!("reading {}", self.report.display()))?;
        let context = || format!("report {}: {text}", self.report.display());
        let report: Value = serde_json::from_str(&text).with_context(context)?;
        let accounting = Vec::<Identity>::deserialize(&report["accounting"]).with_context(context)?;
        check_accounts(&accounting).with_context(context)?;
        serde_json::from_value(report).with_context(context)
    }
}

/// A service of the online role: port of the online host, address and port of the target.
pub fn service(port: u16, target: impl Into<IpAddr>, target_port: u16) -> String {
    match target.into() {
        IpAddr::V4(address) => format!("{port}-{address}:{target_port}"),
        IpAddr::V6(address) => format!("{port}-[{address}]:{target_port}"),
    }
}

/// One assistant and one online role on the first hosts of a lab.
#[derive(Debug)]
pub struct Replay {
    /// The online role; dropped, and so ended, before the assistant.
    pub online: Role,
    /// The assistant.
    pub assistant: Role,
}

impl Replay {
    /// Starts both, copying each of `ports` to the same port of the target over IPv4; `arguments` go to the online role.
    pub fn start(lab: &Lab, ports: &[u16], arguments: &[&str]) -> Result<Self> {
        let services: Vec<String> =
            ports.iter().map(|&port| service(port, lab.target().v4(), port)).collect();
        Self::start_services(lab, &services, lab.assistant().v4().into(), arguments)
    }

    /// Starts both with the given services and the address at which the assistant is reached.
    pub fn start_services(
        lab: &Lab,
        services: &[String],
        assistant: IpAddr,
        arguments: &[&str],
    ) -> Result<Self> {
        let role = Role::assistant(lab, lab.assistant(), &[])?;
        let online = Role::online(lab, lab.online(), services, assistant, arguments)?;
        Ok(Self { online, assistant: role })
    }

    /// Stops both; both reports.
    pub fn stop(mut self) -> Result<(Report, Value)> {
        let online = self.online.stop_online()?;
        Ok((online, self.assistant.stop()?))
    }
}

impl Report {
    /// The value of a counter.
    ///
    /// # Panics
    /// When the role reports no counter of that name: a test that asks for it could not fail.
    pub fn counter(&self, name: &str) -> u64 {
        let names = || self.counters.keys().cloned().collect::<Vec<_>>().join(", ");
        *self.counters.get(name).unwrap_or_else(|| panic!("no counter {name} among {}", names()))
    }

    /// Behaviour 64: what was captured is what was forwarded, is held, or was not replayed for a named reason.
    pub fn check_accounts(&self) -> Result<()> {
        check_accounts(&self.accounting).with_context(|| format!("{:#?}", self.counters))
    }
}

fn check_accounts(accounting: &[Identity]) -> Result<()> {
    ensure!(!accounting.is_empty(), "the report has no accounts");
    let wrong: Vec<&Identity> = accounting.iter().filter(|sums| sums.left != sums.right).collect();
    ensure!(wrong.is_empty(), "the accounts are not in order: {wrong:#?}");
    Ok(())
}
