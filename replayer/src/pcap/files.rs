//! Several capture files as one: merged by time, or one after the other.

use super::reader::{Packet, ReadError, Reader};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How several files become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Packets in the order of their times.
    #[default]
    Merged,
    /// Each file begins when the one before has ended, whatever their times say.
    Sequential,
}

/// The packets of some files. A file that is damaged ends where it is damaged; the others go on.
#[derive(Debug)]
pub struct Files {
    order: Order,
    /// Those that have a packet; the last one read from is `at`.
    readers: Vec<Reader>,
    at: Option<usize>,
    /// Sequential: those that have not begun, the next one last.
    waiting: Vec<Reader>,
    /// Sequential: what makes a time of the whole of a time of the file.
    shift_ns: i64,
    last_time_ns: u64,
    problems: Vec<ReadError>,
    position: Vec<(Option<u64>, Arc<AtomicU64>)>,
}

impl Files {
    /// Opens all.
    ///
    /// # Errors
    /// That of the first that cannot be opened, or does not begin as a capture file.
    pub fn open(paths: &[PathBuf], order: Order) -> Result<Files, ReadError> {
        let readers: Vec<Reader> =
            paths.iter().map(|path| Reader::open(path)).collect::<Result<_, ReadError>>()?;
        Ok(Files::new(readers, order))
    }

    /// Puts open files together.
    pub fn new(readers: Vec<Reader>, order: Order) -> Files {
        let position = readers.iter().map(Reader::progress).collect();
        let mut files = Files {
            order,
            readers: Vec::new(),
            at: None,
            waiting: Vec::new(),
            shift_ns: 0,
            last_time_ns: 0,
            problems: Vec::new(),
            position,
        };
        match order {
            Order::Merged => {
                for reader in readers {
                    files.begin(reader);
                }
            }
            Order::Sequential => files.waiting = readers.into_iter().rev().collect(),
        }
        files
    }

    fn begin(&mut self, mut reader: Reader) {
        match reader.advance() {
            Ok(true) => self.readers.push(reader),
            Ok(false) => {}
            Err(error) => self.problems.push(error),
        }
    }

    /// Goes to the next packet; false at the end of all files.
    pub fn advance(&mut self) -> bool {
        if let Some(at) = self.at.take() {
            let more = self.readers[at].advance().unwrap_or_else(|error| {
                self.problems.push(error);
                false
            });
            if !more {
                self.readers.swap_remove(at);
            }
        }
        if self.order == Order::Sequential {
            while self.readers.is_empty() {
                let Some(next) = self.waiting.pop() else { return false };
                self.begin(next);
                if let Some(packet) = self.readers.first().and_then(Reader::packet)
                    && self.last_time_ns > 0
                {
                    self.shift_ns = self.last_time_ns.wrapping_sub(packet.time_ns) as i64;
                }
            }
        }
        let times = self.readers.iter().map(|reader| reader.packet().map_or(u64::MAX, |p| p.time_ns));
        self.at = times.enumerate().min_by_key(|&(_, time)| time).map(|(at, _)| at);
        if let Some(packet) = self.packet() {
            self.last_time_ns = self.last_time_ns.max(packet.time_ns);
        }
        self.at.is_some()
    }

    /// The packet that [`Files::advance`] went to.
    pub fn packet(&self) -> Option<Packet<'_>> {
        let packet = self.readers.get(self.at?)?.packet()?;
        Some(Packet { time_ns: packet.time_ns.wrapping_add_signed(self.shift_ns), ..packet })
    }

    /// Which file it is from.
    pub fn file(&self) -> Option<&Reader> {
        self.readers.get(self.at?)
    }

    /// What was wrong with the files so far.
    pub fn problems(&self) -> &[ReadError] {
        &self.problems
    }

    /// Takes them.
    pub fn take_problems(&mut self) -> Vec<ReadError> {
        std::mem::take(&mut self.problems)
    }

    /// What tells how far reading is.
    pub fn progress(&self) -> Progress {
        Progress { files: self.position.clone() }
    }
}

/// How far the files were read.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    files: Vec<(Option<u64>, Arc<AtomicU64>)>,
}

impl Progress {
    /// Bytes of the files that were read.
    pub fn read(&self) -> u64 {
        self.files.iter().map(|(_, read)| read.load(Ordering::Relaxed)).sum()
    }

    /// Bytes that the files have; `None` when one of them has no known size: a pipe.
    pub fn size(&self) -> Option<u64> {
        self.files.iter().map(|(size, _)| *size).sum()
    }
}
