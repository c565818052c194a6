//! A started program: its output in files, waiting for what it says, and its certain end.
//!
//! Each process leads a process group of its own, so that Ctrl-C in a terminal reaches only the program that owns the lab,
//! and so that children of the program (nginx workers) end with it. Signals go to ids that were started here, never to names.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::wait::holds_within;

/// How long a program may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How much of a program's error output is shown when it failed, in bytes.
const SHOWN_OUTPUT: usize = 4000;

/// A running program; dropping it kills it and all that it started.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    status: Option<ExitStatus>,
    detached: bool,
}

impl Process {
    /// Starts `command`; what it prints goes to `DIR/NAME.out` and `DIR/NAME.err`.
    ///
    /// The kernel ends it when the calling *thread* ends, should that come to pass without a drop (SIGKILL).
    pub fn start(command: &mut Command, name: &str, dir: &Path) -> Result<Self> {
        Self::spawn(command, name, dir, false)
    }

    /// Starts `command` to outlive this program, as servers of a lab that stays up do.
    pub fn start_detached(command: &mut Command, name: &str, dir: &Path) -> Result<Self> {
        Self::spawn(command, name, dir, true)
    }

    fn spawn(command: &mut Command, name: &str, dir: &Path, detached: bool) -> Result<Self> {
        let stdout = dir.join(format!("{name}.out"));
        let stderr = dir.join(format!("{name}.err"));
        command.process_group(0).stdin(Stdio::null());
        command.stdout(File::create(&stdout).with_context(|| format!("creating {}", stdout.display()))?);
        command.stderr(File::create(&stderr)?);
        if !detached {
            // SAFETY: prctl with constant integers is one system call; nothing is allocated or locked.
            unsafe {
                command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("starting `{program}` (`cargo xtask deps` installs what is missing)"))?;
        Ok(Self { child, name: name.to_owned(), stdout, stderr, status: None, detached })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// The name that it was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it has printed on its standard output.
    pub fn output(&self) -> String {
        read(&self.stdout)
    }

    /// Where its standard output goes.
    pub fn output_path(&self) -> &Path {
        &self.stdout
    }

    /// What it has printed on its error output.
    pub fn errors(&self) -> String {
        read(&self.stderr)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Sends a signal to the program itself.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_none() {
            kill(self.pid(), signal).with_context(|| format!("{signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut result = Ok(None);
        holds_within(limit, || {
            result = self.ended();
            !matches!(result, Ok(None))
        });
        match result? {
            Some(status) => Ok(status),
            None => bail!("{} has not ended within {limit:?}", self.name),
        }
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(STOP_LIMIT)
    }

    /// Ends it at once (SIGKILL), with all that it started.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if self.ended()?.is_none() {
            // The group is the program's own: see the head of this file.
            let _ = killpg(self.pid(), Signal::SIGKILL);
        }
        self.wait(STOP_LIMIT)
    }

    /// Waits until a line of its error output contains `text`; fails at once when the program ends before.
    pub fn wait_for_message(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.wait_until(&format!("the message \"{text}\""), limit, |this| this.errors().contains(text))
    }

    /// Waits until it (or a child of it) listens on the TCP `port` in its network namespace.
    pub fn wait_listening(&mut self, port: u16, limit: Duration) -> Result<()> {
        self.wait_until(&format!("listening on port {port}"), limit, |this| listens(this.pid(), port))
    }

    fn wait_until(&mut self, what: &str, limit: Duration, condition: impl Fn(&Self) -> bool) -> Result<()> {
        let mut met = false;
        holds_within(limit, || {
            met = condition(self);
            met || !matches!(self.ended(), Ok(None))
        });
        match (met, self.ended()?) {
            (true, _) => Ok(()),
            (false, Some(status)) => bail!("{} ended ({status}) before {what}:\n{}", self.name, self.tail()),
            (false, None) => bail!("{}: {what}: not within {limit:?}:\n{}", self.name, self.tail()),
        }
    }

    /// The end of its error output, for a person to read.
    pub fn tail(&self) -> String {
        let text = self.errors();
        let start = text.ceil_char_boundary(text.len().saturating_sub(SHOWN_OUTPUT));
        text[start..].to_owned()
    }

    /// Resident memory, in KiB (`VmRSS` of proc_pid_status(5)).
    pub fn resident_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .with_context(|| format!("{} has ended", self.name))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Of its resident memory, what is in huge pages, in KiB (`AnonHugePages` of proc_pid_smaps(5)).
    pub fn huge_kib(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid()))
            .with_context(|| format!("{} has ended", self.name))?;
        let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
        Ok(line.context("no AnonHugePages")?.trim().trim_end_matches(" kB").parse()?)
    }

    /// CPU time that it has used in all its threads, in seconds (`utime + stime` of proc_pid_stat(5)).
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()))
            .with_context(|| format!("{} has ended", self.name))?;
        cpu_seconds(&stat).with_context(|| format!("unexpected format: {stat}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.detached {
            return;
        }
        let _ = self.kill();
        if std::thread::panicking() {
            let how = self.status.map_or("running".to_owned(), describe);
            eprintln!("--- {} ({how}), end of its error output:\n{}", self.name, self.tail());
        }
    }
}

/// Lets this process open as many files as its user may (the soft limit is often 1024).
pub fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("ended by signal {signal}"),
        None => status.to_string(),
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Whether some socket of the namespace of process `pid` listens on `port`.
///
/// Looked up in `/proc`, not tried with a connection, which the server under test would count.
fn listens(pid: Pid, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        fs::read_to_string(format!("/proc/{pid}/net/{table}")).is_ok_and(|text| has_listener(&text, port))
    })
}

/// Reads a table in the format of proc_pid_net(5): `sl local_address rem_address st …`, state 0A is LISTEN.
fn has_listener(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let local = columns.next().unwrap_or_default();
        let state = columns.nth(1).unwrap_or_default();
        local.ends_with(&suffix) && state == "0A"
    })
}

/// Fields 14 and 15 of `/proc/PID/stat`; the second field is a name in brackets that may hold anything.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    // USER_HZ, which proc(5) counts in, is 100 on every architecture that this runs on.
    Some((user + system) as f64 / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_among_other_sockets() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     \x20  0: 00000000:1F90 00000000:0000 0A 00000000:00000000\n\
                     \x20  1: 0100007F:2328 0100007F:1F91 01 00000000:00000000\n";
        assert!(has_listener(table, 8080));
        assert!(!has_listener(table, 9000));
        assert!(!has_listener(table, 8081));
    }

    #[test]
    fn cpu_time_survives_a_program_name_with_brackets() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 900 0 0 0 150 50 0 0 20 0 1 0 100 1000 10";
        assert_eq!(cpu_seconds(stat), Some(2.0));
    }

    #[test]
    fn output_status_and_end_of_a_program() {
        let dir = std::env::temp_dir().join(format!("replayer-process-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo now ready >&2; exec sleep 60"]);
        let mut process = Process::start(&mut command, "program", &dir).unwrap();
        process.wait_for_message("ready", Duration::from_secs(10)).unwrap();
        assert_eq!(process.output(), "out\n");
        assert!(process.ended().unwrap().is_none());
        assert_eq!(process.stop().unwrap().signal(), Some(Signal::SIGTERM as i32));

        let mut command = Command::new("sh");
        command.args(["-c", "echo broken >&2; exit 3"]);
        let mut process = Process::start(&mut command, "broken", &dir).unwrap();
        let error = process.wait_for_message("ready", Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains('3'), "{error}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
