//! SIGTERM, SIGINT and SIGHUP (a terminal that is gone) as something to wait for: all three end a role cleanly. A role that was started by
//! nohup(1), which has SIGHUP ignored, goes on without its terminal.

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::PipeReader;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

/// Readable when a signal has come.
pub struct Signals {
    pipe: PipeReader,
}

impl Signals {
    /// Takes the signals over. The second one of a kind ends the process at once, so that nobody has to wait for a clean end.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn install() -> Result<Signals> {
        let (pipe, writer) = std::io::pipe().context("make a pipe")?;
        for signal in
            [SIGTERM, SIGINT, SIGHUP].into_iter().filter(|&signal| signal != SIGHUP || !ignored(signal))
        {
            let armed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            // In this order: none that comes now is lost, and the first one finds the flag unset, and sets it.
            signal_hook::low_level::pipe::register(signal, writer.try_clone().context("make a pipe")?)
                .context("register a signal")?;
            signal_hook::flag::register_conditional_default(signal, armed.clone())
                .context("register a signal")?;
            signal_hook::flag::register(signal, armed).context("register a signal")?;
        }
        Ok(Signals { pipe })
    }

    /// Waits until `deadline` or a signal; true for a signal.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn wait_until(&self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
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

/// For a loop that waits for other things too.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
