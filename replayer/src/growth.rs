//! Memory for more sessions before they come: a thread that is no worker makes the next pages of a worker's tables ready.
//!
//! A huge page has to be cleared (0.3 ms), and a hypervisor may have to find it first (up to 8 ms). A worker that touches it first waits
//! for that, and every request with it. So a worker says how far its tables are filled ([`Growth::look`]), and where one will soon need its
//! next page, it is asked for here. What does not grow takes nothing.

use crate::placement;
use crate::privileges::{self, Keep};
use replayer_engine::Engine;
use replayer_engine::slab::Frontier;
use replayer_huge_pages::{page_end, populate};
use std::io::Result;
use std::ops::Range;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

/// So much at least is ready beyond what is used, bytes: half a page.
const LEAST_AHEAD: usize = 1 << 20;
/// And at most.
const MOST_AHEAD: usize = 32 << 20;
/// Ranges that the thread may have before it. Room for them is there from the start: a worker allocates nothing.
const MOST_ASKED: usize = 64;
/// The growth from one look to the next times this is ready.
const LOOKS_AHEAD: usize = 4;

/// What a worker's tables have ready.
#[derive(Debug)]
pub struct Growth {
    tables: Vec<Table>,
    asked: SyncSender<Range<usize>>,
}

#[derive(Debug)]
struct Table {
    from: usize,
    /// Up to here all is there, or asked for.
    ready: usize,
}

impl Growth {
    /// Starts the thread, which ends with this value. To be called where threads may run on any CPU; of a worker that is bound to one, `cpu` is that
    /// one: the kernel takes a page from the memory node of the CPU that touches it first.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(cpu: Option<usize>) -> Result<Growth> {
        let (asked, wanted) = sync_channel(MOST_ASKED);
        thread::Builder::new().name("memory".to_owned()).spawn(move || {
            privileges::drop_all_but(Keep::Nothing);
            if let Some(cpu) = cpu {
                placement::stay_near(cpu);
            }
            wanted.into_iter().for_each(populate);
        })?;
        Ok(Growth { tables: Vec::new(), asked })
    }

    /// Asks for what the engine will soon need. To be called several times a second.
    pub fn look(&mut self, engine: &Engine) {
        let frontiers = engine.frontiers();
        if self.tables.is_empty() {
            // The first page of each is there from the start.
            let table = |it: Frontier| Table { from: it.from, ready: page_end(it.from) };
            self.tables = frontiers.map(table).into();
        }
        for (table, Frontier { from, end }) in self.tables.iter_mut().zip(frontiers) {
            if let Some(wanted) = table.grow(from, end) {
                // The thread lives as long as this. If it is that far behind, the worker has to touch these pages itself.
                let _ = self.asked.try_send(wanted);
            }
        }
    }
}

impl Table {
    /// What is to be made ready now that it is filled up to `from`.
    fn grow(&mut self, from: usize, end: usize) -> Option<Range<usize>> {
        let grown = from - self.from;
        self.from = from;
        let ahead = (grown * LOOKS_AHEAD).clamp(LEAST_AHEAD, MOST_AHEAD);
        // What the worker has touched itself by now is there.
        let begin = self.ready.max(from);
        let until = (from + ahead).min(end);
        if until <= begin {
            return None;
        }
        self.ready = page_end(until);
        Some(begin..self.ready.min(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 2 << 20;

    #[test]
    fn a_page_is_asked_for_once_when_half_of_the_one_before_is_used_and_more_the_faster_it_goes() {
        let mut table = Table { from: 0, ready: PAGE };
        let end = 100 * PAGE;
        // What does not grow takes nothing, nor what grows slowly in the first half of its page.
        let eighths = |from: std::ops::Range<usize>| from.map(|eighth| eighth * PAGE / 8);
        assert!(eighths(0..5).all(|from| table.grow(from, end).is_none()));
        assert_eq!(table.grow(PAGE / 2 + 100, end), Some(PAGE..2 * PAGE));
        assert!(eighths(5..9).all(|from| table.grow(from, end).is_none()));
        // Three pages since the last look: four times as many beyond what is used.
        assert_eq!(table.grow(4 * PAGE, end), Some(4 * PAGE..17 * PAGE));
        // However fast it goes, and not beyond the end.
        assert_eq!(table.grow(60 * PAGE, end), Some(60 * PAGE..60 * PAGE + MOST_AHEAD + PAGE));
        assert_eq!(table.grow(90 * PAGE, end), Some(90 * PAGE..end));
        assert_eq!(table.grow(95 * PAGE, end), None);
    }
}
