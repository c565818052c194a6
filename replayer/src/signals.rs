//! SIGTERM, SIGINT and SIGHUP as something to wait for. The first two end a role cleanly, or, while it starts and there is nothing yet that would have
//! to be cleaned up, at once. SIGHUP asks it to look at its files anew, and it goes on; but when the terminal that it was started from is gone, nobody
//! is left to stop it, and SIGHUP ends it too. A role that was started by nohup(1), which has SIGHUP ignored, knows nothing of it.

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level::pipe};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To end cleanly. It is asked for again each time.
    Stop,
    /// To read the configuration again, write the report as it is now, begin new files, and look at the host anew.
    Reload,
}

/// Readable when a signal has come, until [`Signals::take`].
pub struct Signals {
    pipe: PipeReader,
    writer: PipeWriter,
    /// One for SIGTERM, one for SIGINT: set, and the signal ends the process at once.
    at_once: [Arc<AtomicBool>; 2],
    stop: Arc<AtomicBool>,
    hangup: Arc<AtomicBool>,
    had_terminal: bool,
}

impl Signals {
    /// Takes the signals over, SIGTERM and SIGINT from [`Signals::clean_from_here`] on.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn install() -> Result<Signals> {
        let (pipe, writer) = std::io::pipe().context("make a pipe")?;
        let signals = Signals {
            pipe,
            writer,
            at_once: [true, true].map(|yes| Arc::new(AtomicBool::new(yes))),
            stop: Arc::default(),
            hangup: Arc::default(),
            had_terminal: has_terminal(),
        };
        let clone = || signals.writer.try_clone().context("make a pipe");
        // The flags before the pipe: whoever it wakes finds them set.
        for (signal, at_once) in [SIGTERM, SIGINT].into_iter().zip(&signals.at_once) {
            // The first one finds this flag unset, and sets it.
            flag::register_conditional_default(signal, at_once.clone()).context("register a signal")?;
            flag::register(signal, at_once.clone()).context("register a signal")?;
            flag::register(signal, signals.stop.clone()).context("register a signal")?;
            pipe::register(signal, clone()?).context("register a signal")?;
        }
        if !ignored(SIGHUP) {
            flag::register(SIGHUP, signals.hangup.clone()).context("register a signal")?;
            pipe::register(SIGHUP, clone()?).context("register a signal")?;
        }
        Ok(signals)
    }

    /// From here on the first SIGTERM or SIGINT asks for a clean end. The second ends the process at once, so that nobody has to wait for it; so does
    /// the first before this call.
    pub fn clean_from_here(&self) {
        for at_once in &self.at_once {
            at_once.store(false, Ordering::Relaxed);
        }
    }

    /// Has [`Signals::wait_until`] return, from another thread.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn waker(&self) -> Result<impl FnOnce() + Send + use<>> {
        let mut writer = self.writer.try_clone().context("make a pipe")?;
        Ok(move || {
            // Full, it wakes just as well.
            let _ = writer.write(&[0]);
        })
    }

    /// What the signals that have come until now ask for.
    pub fn take(&self) -> Option<Asked> {
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            // What is left, if there ever were so many, is read next time.
            let _ = (&self.pipe).read(&mut [0; 64]);
        }
        let reload = self.hangup.swap(false, Ordering::Relaxed);
        if reload && self.had_terminal && !has_terminal() {
            self.stop.store(true, Ordering::Relaxed);
        }
        match (self.stop.load(Ordering::Relaxed), reload) {
            (true, _) => Some(Asked::Stop),
            (false, true) => Some(Asked::Reload),
            (false, false) => None,
        }
    }

    /// Waits until `deadline` or a signal.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait_until(&self, deadline: Instant) -> Result<Option<Asked>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(self.take()),
            Err(error) => Err(error).context("wait for signals"),
        }
    }
}

/// Whether this process was started with the signal ignored.
fn ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    mask.and_then(|hex| u64::from_str_radix(hex, 16).ok()).is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

/// Whether this process has a controlling terminal. The kernel takes it away before it sends SIGHUP (drivers/tty/tty_jobctrl.c).
fn has_terminal() -> bool {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    terminal_of(&stat).is_some_and(|number| number != 0)
}

/// Field 7 of proc_pid_stat(5); the second field is a name in brackets that may hold anything.
fn terminal_of(stat: &str) -> Option<i32> {
    stat.rsplit_once(") ")?.1.split(' ').nth(4)?.parse().ok()
}

/// For a loop that waits for other things too.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_is_found_behind_any_name() {
        assert_eq!(terminal_of("7 (a) b) S 1 7 7 34816 7 4194560"), Some(34816));
        assert_eq!(terminal_of("7 (replayer) S 1 7 7 0 -1 4194560"), Some(0));
        assert_eq!(terminal_of(""), None);
    }
}
