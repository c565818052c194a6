//! One network namespace: made and removed by iproute2 under `/run/netns`, entered by setns(2).
//!
//! A thread that enters a namespace never leaves it again, so closures run on a thread of their own, and programs are
//! moved between fork and exec. The calling thread's own namespace is never changed.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::holds_within;

/// Where iproute2 keeps its named namespaces.
const NAMESPACE_DIR: &str = "/run/netns";

/// A named network namespace. Dropping the handle leaves the namespace where it is: see [`Namespace::destroy`].
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: File,
}

impl Namespace {
    /// Makes a new namespace.
    pub fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        Self::open(name)
    }

    /// Opens one that exists.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(NAMESPACE_DIR).join(name);
        let handle = File::open(&path).with_context(|| format!("no network namespace {}", path.display()))?;
        Ok(Self { name: name.to_owned(), handle })
    }

    /// Names of all namespaces that begin with `prefix`.
    pub fn list(prefix: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(NAMESPACE_DIR) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        names
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command whose program will run in this namespace, with a `/sys` that shows this namespace's devices.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        match self.handle.try_clone() {
            Ok(handle) => {
                let enter = move || enter_as_process(&handle).map_err(std::io::Error::from);
                // SAFETY: the closure only makes system calls (setns, unshare, mount, umount) with constant
                // arguments; it takes no lock and allocates nothing, as is asked between fork and exec.
                unsafe { command.pre_exec(enter) };
            }
            Err(error) => {
                // Out of descriptors: the program must fail to start rather than start in the wrong namespace.
                let code = error.raw_os_error().unwrap_or(libc::EMFILE);
                // SAFETY: the closure only builds an error from an integer.
                unsafe { command.pre_exec(move || Err(std::io::Error::from_raw_os_error(code))) };
            }
        }
        command
    }

    /// Runs `work` on a thread inside this namespace and returns its value: sockets made there stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| -> Result<T> {
                setns(self.handle.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering namespace {} (are you root?)", self.name))?;
                Ok(work())
            });
            match inside.join() {
                Ok(result) => result,
                // A failed assertion inside is a failed assertion of the caller.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Writes one value below `/proc/sys/net`, e.g. `("ipv4/ip_forward", "0")`.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys/net").join(key);
        self.enter(|| fs::write(&path, value))?
            .with_context(|| format!("{}: {} = {value}", self.name, path.display()))
    }

    /// Runs the lines of an `ip -batch` script in this namespace.
    pub fn ip(&self, script: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        run_with_input(&mut command, script).with_context(|| format!("in namespace {}:\n{script}", self.name))
    }

    /// Loads an nftables ruleset in this namespace.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        run_with_input(self.command("nft").args(["-f", "-"]), ruleset)
            .with_context(|| format!("in namespace {}:\n{ruleset}", self.name))
    }

    /// Processes whose main thread is in this namespace.
    pub fn processes(&self) -> Vec<Pid> {
        let Ok(own) = self.handle.metadata() else { return Vec::new() };
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                // What is gone, or a zombie, has no namespace any more.
                fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|meta| (meta.dev(), meta.ino()) == (own.dev(), own.ino()))
            })
            .map(Pid::from_raw)
            .collect()
    }

    /// Ends every process inside and removes the namespace with its devices.
    pub fn destroy(self) -> Result<()> {
        let gone = holds_within(Duration::from_secs(5), || {
            let inside = self.processes();
            for pid in &inside {
                // One that ended by itself meanwhile is as good.
                let _ = kill(*pid, Signal::SIGKILL);
            }
            inside.is_empty()
        });
        if !gone {
            bail!("namespace {}: processes {:?} do not end", self.name, self.processes());
        }
        run(Command::new("ip").args(["netns", "del", &self.name]))
    }
}

/// Moves the calling (just forked) process into the namespace and gives it a `/sys` of it, as `ip netns exec` does.
fn enter_as_process(handle: &File) -> nix::Result<()> {
    setns(handle.as_fd(), CloneFlags::CLONE_NEWNET)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    // Mounts made here must not spread to the machine.
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    // Where /sys is not mounted, there is nothing to hide.
    let _ = umount2("/sys", MntFlags::MNT_DETACH);
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none)
}

/// Runs a command to its end; its error output becomes the error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    run_with_input(command, "")
}

/// Like [`run`], with standard input.
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{program}` (`cargo xtask deps` installs what is missing)"))?;
    let mut stdin = child.stdin.take().ok_or_else(|| anyhow!("`{program}` has no standard input"))?;
    // A program that reads none of it says why on its error output.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` failed: {}", arguments.join(" "), message.trim());
    }
    Ok(())
}
