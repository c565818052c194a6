//! What SIGHUP asks a role that replays to take over. Looking names up and connecting to assistants may take seconds, which the role's loop has not:
//! meanwhile figures are due, and a stop has to be prompt. So it is done on a thread of its own, and what has come of it is handed to the loop.

use crate::signals::Signals;
use anyhow::{Context, Result, anyhow};
use std::sync::mpsc::{Receiver, TryRecvError, channel};

/// Reloads, one at a time; a stop waits for none.
pub struct Reload<T> {
    asked: bool,
    under_way: Option<Receiver<Result<T>>>,
}

impl<T> Default for Reload<T> {
    fn default() -> Reload<T> {
        Reload { asked: false, under_way: None }
    }
}

impl<T: Send + 'static> Reload<T> {
    /// Asks for one, after the one that is under way if there is one. Asking several times meanwhile asks for one.
    pub fn ask(&mut self) {
        self.asked = true;
    }

    /// Whether one is to begin now.
    pub fn is_due(&self) -> bool {
        self.asked && self.under_way.is_none()
    }

    /// Whether one has begun whose outcome was not taken yet.
    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Begins one; its end wakes whoever waits for signals.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn begin(
        &mut self,
        signals: &Signals,
        prepare: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<()> {
        self.asked = false;
        let wake = signals.waker()?;
        let (outcome, receiver) = channel();
        let thread = std::thread::Builder::new().name("reload".into()).spawn(move || {
            // Nobody waits any more when the role has ended.
            let _ = outcome.send(prepare());
            wake();
        });
        thread.context("start a thread")?;
        self.under_way = Some(receiver);
        Ok(())
    }

    /// What has come of the one that was under way, once it has ended.
    pub fn outcome(&mut self) -> Option<Result<T>> {
        let outcome = match self.under_way.as_ref()?.try_recv() {
            Ok(outcome) => outcome,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                Err(anyhow!("its thread died; this is a bug of the replayer, please report it"))
            }
        };
        self.under_way = None;
        Some(outcome)
    }
}
