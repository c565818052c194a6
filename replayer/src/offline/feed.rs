//! The packets of files on their way to the engine: each is given to it when it is due.
//!
//! ```text
//! files ─► reader thread: decompress, parse, merge, choose ─► chunks ─► Feed::give: pace ─► frames ─► engine
//!                              ▲                                           │
//!                              └────────────── empty chunks ◄──────────────┘
//! ```

use super::pace::{Pace, Speed};
use super::read_ahead::{self, Chunk, Chunks, FeedConfig, Item};
use super::status::Status;
use crate::pcap::Files;
use anyhow::Result;
use replayer_engine::histogram::Histogram;
use replayer_engine::{BATCH, Engine, Output};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Where the target sets the pace: its sessions are counted at most so often.
const LOOK_NS: u64 = 1_000_000;
/// Packets whose times in the file are further apart are not given in one batch: holes are timed by batches.
const BATCH_SPAN_NS: u64 = 100_000_000;
/// How often it is shown how far the replay is.
const SHOW_NS: u64 = 50_000_000;

/// What the feed does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Something is due at this time.
    At(u64),
    /// The reader thread has nothing ready, or the target is waited for.
    Soon,
    /// Everything was given.
    Over,
}

/// Gives the packets to an engine when they are due.
#[derive(Debug)]
pub struct Feed {
    chunks: Chunks,
    chunk: Option<Chunk>,
    at: usize,
    pace: Pace,
    speed: Speed,
    /// When the item at `at` is due, ns after the start; not known yet: `None`.
    due: Option<u64>,
    started_at: Option<u64>,
    duration_ns: Option<u64>,
    /// Requests that may wait for the target at once, where it sets the pace.
    in_flight: u64,
    copies: u64,
    hold_limit_ns: u64,
    /// Packets that may be given before the target is looked at again.
    credit: u64,
    looked_at: u64,
    credited_at: u64,
    /// The file's time of the batch that is being put together.
    batch_time_ns: u64,
    /// How far the files were read at the end of the chunk before.
    read_before: (u64, u64),
    lateness: Histogram,
    published_at: u64,
    status: Arc<Status>,
    over: bool,
}

/// The pace of a feed.
#[derive(Clone, Copy, Debug)]
pub struct FeedPace {
    /// How fast.
    pub speed: Speed,
    /// The longest pause.
    pub max_gap: Option<Duration>,
    /// When to stop, whatever is left.
    pub duration: Option<Duration>,
    /// Where the target sets the pace: sessions that may be waiting for it at once.
    pub in_flight: u64,
    /// Sessions that a packet may concern.
    pub copies: u64,
    /// The engine's.
    pub hold_limit_ns: u64,
}

impl Feed {
    /// Opens the files and begins to read.
    ///
    /// # Errors
    /// When a file cannot be opened or is no capture.
    pub fn start(config: FeedConfig, pace: FeedPace) -> Result<Feed> {
        let files = Files::open(&config.files, config.order)?;
        Feed::over(files, config, pace)
    }

    /// Begins to read files that are open. They are opened again, by their names, when they are to be read more than once.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn over(files: Files, config: FeedConfig, pace: FeedPace) -> Result<Feed> {
        let status = Arc::new(Status::default());
        let chunks = read_ahead::start(files, config, status.clone())?;
        Ok(Feed {
            chunks,
            chunk: None,
            at: 0,
            pace: Pace::new(pace.speed, pace.max_gap),
            speed: pace.speed,
            due: None,
            started_at: None,
            duration_ns: pace.duration.map(|duration| duration.as_nanos() as u64),
            in_flight: pace.in_flight.max(1),
            copies: pace.copies.max(1),
            hold_limit_ns: pace.hold_limit_ns,
            credit: 0,
            looked_at: 0,
            credited_at: 0,
            batch_time_ns: 0,
            read_before: (0, 0),
            lateness: Histogram::default(),
            published_at: 0,
            status,
            over: false,
        })
    }

    /// What the reader thread shows.
    pub fn status(&self) -> Arc<Status> {
        self.status.clone()
    }

    /// Whether everything was given to the engine.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// When there is something to do.
    pub fn ahead(&mut self) -> Next {
        if self.over {
            return Next::Over;
        }
        if !self.load(None) {
            return if self.over { Next::Over } else { Next::Soon };
        }
        match (self.started_at, self.due) {
            (Some(started), Some(due)) if self.credit > 0 || !self.speed.waits_for_target() => {
                Next::At(started.saturating_add(due))
            }
            (None, _) => Next::At(0),
            _ => Next::Soon,
        }
    }

    /// Waits until the reader thread has something, or for `limit`.
    pub fn wait(&mut self, limit: Duration) {
        self.load(Some(limit));
    }

    /// Makes sure that there is an item. False: the reader has none yet, or there are no more.
    fn load(&mut self, wait: Option<Duration>) -> bool {
        loop {
            if self.over {
                return false;
            }
            if let Some(chunk) = &self.chunk {
                if self.at < chunk.items.len() {
                    return true;
                }
                if let Some(mut chunk) = self.chunk.take() {
                    self.read_before = chunk.read;
                    chunk.bytes.clear();
                    chunk.items.clear();
                    chunk.turns.clear();
                    // It has room for all chunks; the reader may be gone.
                    let _ = self.chunks.empty.try_send(chunk);
                }
            }
            let next = match wait {
                Some(limit) => {
                    self.chunks.full.recv_timeout(limit).map_err(|error| error == RecvTimeoutError::Timeout)
                }
                None => self.chunks.full.try_recv().map_err(|error| error == TryRecvError::Empty),
            };
            match next {
                Ok(chunk) => {
                    if chunk.read.0 < self.read_before.0 {
                        // Of the next loop, whose bytes count from the beginning.
                        self.read_before.0 = 0;
                    }
                    self.chunk = Some(chunk);
                    self.at = 0;
                }
                Err(true) => return false,
                Err(false) => {
                    self.finish();
                    return false;
                }
            }
        }
    }

    fn finish(&mut self) {
        self.over = true;
        self.show();
        self.status.over.store(true, Ordering::Release);
    }

    /// Shows how far it is: within a chunk by its items, since a chunk may be minutes.
    fn show(&self) {
        let (mut bytes, mut packets) = self.read_before;
        if let Some(chunk) = &self.chunk {
            let part = |before: u64, end: u64| {
                let share = self.at as f64 / chunk.items.len().max(1) as f64;
                before + (end.saturating_sub(before) as f64 * share) as u64
            };
            (bytes, packets) = (part(bytes, chunk.read.0), part(packets, chunk.read.1));
        }
        self.status.replayed.bytes.store(bytes, Ordering::Relaxed);
        self.status.replayed.packets.store(packets, Ordering::Relaxed);
        self.status
            .replayed
            .lateness
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&self.lateness);
    }

    /// Gives the engine what is due at `now`, at most a batch. Returns how many packets that were.
    pub fn give<O: Output>(
        &mut self,
        now: u64,
        engine: &mut Engine,
        batch: &mut Vec<(O::Frame, usize)>,
        out: &mut O,
    ) -> usize {
        let mut given = 0;
        if self.speed.waits_for_target() {
            self.look(now, engine);
        }
        while batch.len() < BATCH && self.load(None) {
            let Some(chunk) = &self.chunk else { break };
            let (time_ns, item) = chunk.items[self.at];
            match item {
                Item::Packet { begin, len, opening } => {
                    let started = *self.started_at.get_or_insert(now);
                    let due =
                        *self.due.get_or_insert_with(|| self.pace.due(time_ns, u64::from(len), opening));
                    if self.duration_ns.is_some_and(|duration| now - started >= duration) {
                        self.stop_early(now, engine, batch, out);
                        break;
                    }
                    if started.saturating_add(due) > now || self.speed.waits_for_target() && self.credit == 0
                    {
                        break;
                    }
                    // The file's time goes on before the packets are looked at: a batch whose times are far apart is not one.
                    if !batch.is_empty() && time_ns.saturating_sub(self.batch_time_ns) > BATCH_SPAN_NS {
                        break;
                    }
                    if batch.is_empty() {
                        self.batch_time_ns = time_ns;
                        engine.set_capture_time(time_ns);
                    }
                    let Some(mut frame) = out.allocate() else { break };
                    let bytes = chunk.packet(begin, len);
                    let room = out.bytes(&mut frame);
                    let len = bytes.len().min(room.len());
                    room[..len].copy_from_slice(&bytes[..len]);
                    batch.push((frame, len));
                    if self.speed.waits_for_target() {
                        self.credit = self.credit.saturating_sub(1);
                    } else {
                        self.lateness.record(((now - started - due) / 1000).min(u64::from(u32::MAX)) as u32);
                    }
                    given += 1;
                }
                Item::Turn(place) => {
                    let (client, server) = chunk.turns[place as usize];
                    engine.on_captured(now, batch, out);
                    engine.expect_turn(now, client, server);
                }
                Item::End => {
                    engine.on_captured(now, batch, out);
                    engine.end_of_capture(now, out);
                }
            }
            self.at += 1;
            self.due = None;
        }
        engine.on_captured(now, batch, out);
        if now >= self.published_at + SHOW_NS {
            self.published_at = now;
            self.show();
        }
        given
    }

    /// The time is over: what was given ends as at the end of the files.
    fn stop_early<O: Output>(
        &mut self,
        now: u64,
        engine: &mut Engine,
        batch: &mut Vec<(O::Frame, usize)>,
        out: &mut O,
    ) {
        engine.on_captured(now, batch, out);
        engine.end_of_capture(now, out);
        self.finish();
    }

    /// Counts what the target is at and gives credit for what may be added to it. A target that does not answer holds nobody up for longer
    /// than the hold limit.
    fn look(&mut self, now: u64, engine: &Engine) {
        if self.credit > 0 || now < self.looked_at + LOOK_NS && self.looked_at > 0 {
            return;
        }
        self.looked_at = now;
        let busy = engine.busy_sessions(now);
        let free = self.in_flight.saturating_sub(busy) / self.copies;
        let overdue = now - self.credited_at > self.hold_limit_ns;
        self.credit = if free == 0 && overdue { 1 } else { free };
        if self.credit > 0 {
            self.credited_at = now;
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        // The reader may wait for an empty chunk or for room: both ends go with this.
        self.status.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::ServiceArg;
    use crate::offline::dry_run::{FRAME_ROOM, LINK, Memory, START_NS};
    use crate::pcap::writer::Writer;
    use replayer_common::addr::Endpoint;
    use replayer_common::packet::Protocol;
    use replayer_engine::config::{Config, Limits, Service};

    #[test]
    fn the_progress_is_that_of_the_replay_and_not_of_reading() {
        const SECOND: u64 = 1_000_000_000;
        let path = std::env::temp_dir().join(format!("replayer-feed-{}.pcap", std::process::id()));
        let mut writer = Writer::create(&path).unwrap();
        for second in 0..4 {
            let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
                .ipv4([10, 0, 0, 1], [192, 0, 2, 1], 64)
                .udp(4000, 53);
            let mut frame = Vec::new();
            builder.write(&mut frame, b"query").unwrap();
            writer.packet(second * SECOND, &frame).unwrap();
        }
        writer.flush().unwrap();
        let size = writer.written();

        let endpoint = |ip: [u8; 4]| Endpoint { ip: replayer_common::addr::from_v4(ip), port: 53 };
        let service = Service { online: endpoint([192, 0, 2, 1]), target: endpoint([198, 51, 100, 1]) };
        let mut config = Config::new(Vec::new());
        config.udp_services = vec![service];
        config.limits = Limits { connections: 8, sessions: 8, held_bytes: 1 << 16, ..Limits::default() };
        config.frame_room = FRAME_ROOM as u16;
        let mut engine = Engine::new(config, START_NS);
        engine.set_link(0, Some(LINK));
        let mut out = Memory::new(&[ServiceArg { protocol: Protocol::Udp, service }], 1, 8, None, 0, 1);
        let config = FeedConfig::all(vec![path.clone()], vec![(Protocol::Udp, service.online)], FRAME_ROOM);
        let pace = FeedPace {
            speed: Speed::Times(1.0),
            max_gap: None,
            duration: None,
            in_flight: 1,
            copies: 1,
            hold_limit_ns: SECOND,
        };
        let mut feed = Feed::start(config, pace).unwrap();
        let status = feed.status();
        // The reader is at the end of the file before the first packet is given.
        feed.wait(Duration::from_secs(10));
        let mut batch = Vec::new();
        let mut shares = Vec::new();
        for second in 0..4 {
            assert_eq!(feed.give(START_NS + second * SECOND, &mut engine, &mut batch, &mut out), 1);
            let (done, all) = status.progress();
            assert_eq!(all, Some(size));
            shares.push(done as f64 / size as f64);
        }
        assert!(shares.is_sorted() && shares[0] < 0.5 && shares[1] < 0.7, "{shares:?}");
        while !feed.is_over() {
            feed.wait(Duration::from_secs(10));
        }
        assert_eq!(status.progress(), (size, Some(size)));
        assert_eq!(status.lateness().count(), 4);
        std::fs::remove_file(path).unwrap();
    }
}
