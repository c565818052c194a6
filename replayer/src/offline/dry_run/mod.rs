//! A dry run: the whole engine with a clock of its own and a target that answers at once. Nothing is sent; the packets may be written to a
//! file.
//!
//! The clock jumps from one thing to do to the next, so an hour of traffic takes seconds, and what would be sent is the same in every run.

mod target;

use crate::cli::ServiceArg;
use crate::offline::feed::{Feed, Next};
use crate::pcap::writer::Writer;
use replayer_common::addr::Endpoint;
use replayer_common::packet::{parse_tcp, parse_udp};
use replayer_engine::counters::Counter;
use replayer_engine::{BATCH, Engine, Link, Output};
use std::fs::File;
use std::io::{self, BufWriter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use target::Target;

/// The links of a dry run: nobody has these addresses.
pub const LINK: Link =
    Link { source_mac: [2, 0, 0, 0, 0, 1], destination_mac: [2, 0, 0, 0, 0, 2], tags: [None; 2], mtu: 1500 };
/// Bytes of a frame.
pub const FRAME_ROOM: usize = 2048;
/// The clock of a run begins here.
pub const START_NS: u64 = 1_000_000_000_000;

/// How long a packet takes, so that time goes on when all are due at once.
const PACKET_NS: u64 = 100;
/// The least that the clock goes on when there is nothing to do.
const STEP_NS: u64 = 65_536;
/// The most that it goes on at once: the engine's timers see half of 78 hours ahead.
const LONGEST_STEP_NS: u64 = 3_600_000_000_000;
/// How long the reader is waited for at once.
const READER_PATIENCE: Duration = Duration::from_millis(100);

/// Runs the engine until everything was given to it and its sessions have ended, or are silent for longer than `patience_ns`. The clock's
/// last value.
///
/// # Errors
/// When the file cannot be written.
pub fn run(
    engine: &mut Engine,
    feed: &mut Feed,
    out: &mut Memory,
    patience_ns: u64,
    stop: &AtomicBool,
    mut watch: impl FnMut(&Engine),
) -> io::Result<u64> {
    let mut now = START_NS;
    let mut batch = Vec::with_capacity(BATCH);
    let mut ended: Option<(u64, u64)> = None;
    let mut steps = 0u32;
    loop {
        out.now = now;
        let given = feed.give(now, engine, &mut batch, out);
        now += given as u64 * PACKET_NS;
        while out.target.has_received() {
            respond(engine, out, now);
        }
        engine.on_timers(now, out);
        if let Some(error) = out.error.take() {
            return Err(error);
        }
        steps = steps.wrapping_add(1);
        if steps.is_multiple_of(1 << 12) {
            watch(engine);
        }
        if stop.load(Ordering::Relaxed) {
            return finish(engine, out, now);
        }
        if given > 0 || out.target.has_received() {
            continue;
        }
        let timer = engine.next_deadline_ns(now).map(|ahead| now + ahead.max(STEP_NS));
        match feed.ahead() {
            Next::At(due) if due <= now => {}
            Next::At(due) => now = timer.map_or(due, |timer| timer.min(due)).min(now + LONGEST_STEP_NS),
            Next::Soon => {
                feed.wait(READER_PATIENCE);
                watch(engine);
                if !matches!(feed.ahead(), Next::At(_) | Next::Over) {
                    // The target is waited for.
                    now = timer.unwrap_or(now + STEP_NS).min(now + 16 * STEP_NS);
                }
            }
            Next::Over => {
                let done = progress(engine);
                let (since, before) = ended.get_or_insert((now, done));
                if *before != done {
                    (*since, *before) = (now, done);
                }
                if engine.gauges().sessions_live == 0 || now - *since > patience_ns {
                    return finish(engine, out, now);
                }
                now = timer.unwrap_or(now + STEP_NS);
            }
        }
    }
}

/// Gives the engine what the target answers to what it has received.
fn respond(engine: &mut Engine, out: &mut Memory, now: u64) {
    let answers = out.target.answers();
    for answers in answers.chunks(BATCH) {
        engine.on_responses(now, answers, out);
    }
    out.target.take_back(answers);
}

/// Goes on when anything does.
fn progress(engine: &Engine) -> u64 {
    let counters = engine.counters();
    [Counter::ReplayBytesDelivered, Counter::TurnsSent, Counter::ResponsesReceived]
        .map(|c| counters[c])
        .iter()
        .sum()
}

/// Ends what is left.
fn finish(engine: &mut Engine, out: &mut Memory, mut now: u64) -> io::Result<u64> {
    out.now = now;
    engine.stop(now, out);
    while !engine.stopped() {
        now += STEP_NS;
        out.now = now;
        respond(engine, out, now);
        engine.on_timers(now, out);
    }
    out.flush()?;
    match out.error.take() {
        Some(error) => Err(error),
        None => Ok(now),
    }
}

/// A frame in memory.
pub type Frame = Box<[u8]>;

/// The engine's output: frames in memory, what is sent goes to the target and to a file.
#[derive(Debug)]
pub struct Memory {
    free: Vec<Frame>,
    target: Target,
    writer: Option<Writer<BufWriter<File>>>,
    error: Option<io::Error>,
    now: u64,
    /// What makes a time since the epoch of the clock.
    epoch_ns: u64,
    bytes_sent: u64,
}

impl Memory {
    /// For an engine of so many `sessions`; `epoch_ns` is the time since the epoch at which the run begins, for the file.
    pub fn new(
        services: &[ServiceArg],
        copies: usize,
        sessions: usize,
        writer: Option<Writer<BufWriter<File>>>,
        epoch_ns: u64,
        seed: u64,
    ) -> Memory {
        let frames = 4 * BATCH + 4 * copies;
        Memory {
            free: (0..frames).map(|_| vec![0; FRAME_ROOM].into_boxed_slice()).collect(),
            target: Target::new(services, sessions, seed),
            writer,
            error: None,
            now: START_NS,
            epoch_ns,
            bytes_sent: 0,
        }
    }

    /// Bytes of all frames that would have been sent.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Writer::flush)
    }
}

impl Output for Memory {
    type Frame = Frame;

    fn allocate(&mut self) -> Option<Frame> {
        self.free.pop()
    }

    fn bytes<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        frame
    }

    fn release(&mut self, frame: Frame) {
        self.free.push(frame);
    }

    fn transmit(&mut self, frame: Frame, len: usize) -> bool {
        let bytes = &frame[..len];
        self.bytes_sent += len as u64;
        if let Some(writer) = &mut self.writer
            && self.error.is_none()
            && let Err(error) = writer.packet(self.epoch_ns + (self.now - START_NS), bytes)
        {
            self.error = Some(error);
        }
        if let Ok(segment) = parse_tcp(&bytes) {
            self.target.segment(&segment);
        } else if let Ok(datagram) = parse_udp(&bytes) {
            self.target.datagram(&datagram);
        }
        self.free.push(frame);
        true
    }

    fn register(&mut self, _: u16, _: Endpoint) {}
    fn unregister(&mut self, _: u16, _: Endpoint) {}
}
