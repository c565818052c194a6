//! A worker: one thread that owns a source of captured packets, its AF_XDP port, its session engine and its return channels. Workers share nothing
//! that changes; what others want to know of one it publishes now and then.
//!
//! ```text
//! capture ────► engine ──► AF_XDP TX
//!                 ▲
//!   return channels (header records)
//! ```
//!
//! The loop does not sleep while there is work. Without work it waits in poll(2), for the capture, the channels and the next timer.
//! Where many sessions are active and the replay keeps up, it pauses first, so that one wake-up serves many packets
//! ([`crate::moderation`]): a wake-up costs more than a packet, and nothing is late by more than [`LONGEST_PAUSE_NS`].
//! With busy polling it does neither until nothing has come for a while.
//! When requests are late, nobody pauses, few sessions are waited for without sleeping, and the assistants are told to do the same.

use crate::afxdp::{Flush, Frame, Port, PortCounters, Statistics};
use crate::capture::Source;
use crate::channel::assistants::Change;
use crate::channel::client::{Client, ClientCounters};
use crate::channel::limits::HURRY;
use crate::channel::wire::Entry;
use crate::clock;
use crate::growth::Growth;
use crate::moderation::{Moderation, Next};
use crate::net::Watch;
use crate::offline::feed::{self, Feed};
use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use replayer_common::addr::Endpoint;
use replayer_common::response::ResponseHeader;
use replayer_engine::counters::{Counter, Counters, Pending, ServiceCounters};
use replayer_engine::histogram::Histogram;
use replayer_engine::{BATCH, Engine, Gauges, Lag, Link, Output};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The longest pause: what a replayed request may be late by for the sake of CPU time. At 20 000 requests a second a fourth of the wake-ups less
/// than with 0.3 ms and a sixth of the time; with 0.5 ms little more is gained.
const LONGEST_PAUSE_NS: u64 = 400_000;
/// How often a busy worker publishes its figures.
const PUBLISH_NS: u64 = 100_000_000;
/// Captured batches handled before the channels get their turn.
const BATCHES_PER_TURN: usize = 4;
/// Reads of one channel in a turn: 64 KiB each, and another only after one that was nearly full.
const READS_PER_TURN: usize = 4;
const FULL_READ: usize = 512;
/// Between packets that the kernel had no room for and the next try.
const RETRY_TRANSMIT_NS: u64 = 200_000;
/// Between two looks at a feed that has nothing ready.
const FEED_AGAIN_NS: u64 = 200_000;
/// After everything of a feed was given: the longest that sessions may go on receiving, however much comes.
const FEED_END_LIMIT_NS: u64 = 60_000_000_000;
/// On stop, the longest that sessions may take to end.
const STOP_LIMIT_NS: u64 = 1_500_000_000;

/// Assistants that a worker may have: each is one more descriptor to wait for.
pub const MAX_CHANNELS: usize = 8;

/// What a worker shows.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The engine's counters.
    pub counters: Counters,
    /// The same by service, those of UDP last.
    pub services: Vec<ServiceCounters>,
    /// Momentary values.
    pub gauges: Gauges,
    /// At most so long had captured packets waited in the ring when the worker took them, microseconds.
    pub ring_wait: Histogram,
    /// From then to transmission, microseconds.
    pub capture_to_transmit: Histogram,
    /// First byte of a turn to first byte of its response, microseconds.
    pub target_response: Histogram,
    /// The longest delay since the last look, in the ring or from there to transmission, microseconds.
    pub lag_us: u32,
    /// What the port counted.
    pub port: PortCounters,
    /// What the kernel counted for its sockets.
    pub sockets: Statistics,
    /// Packets that the capture program handed over, taken by this worker.
    pub taken: u64,
    /// Only in the last one: those that it had no frames for until the end.
    pub left: u64,
    /// By assistant.
    pub channels: Vec<ClientCounters>,
    /// Which of them are connected.
    pub connected: Vec<bool>,
    /// For each service, whether a client of it spoke TLS.
    pub tls: Vec<bool>,
    /// Only in the last one: what was still pending.
    pub pending: Option<Pending>,
}

/// What a worker and the role's main thread share.
pub struct Shared {
    /// The last published figures.
    pub snapshot: Mutex<Snapshot>,
    /// Set, and the worker ends its sessions and returns.
    pub stop: AtomicBool,
    /// Wakes the worker.
    pub wake: EventFd,
    /// What it is to change, and whether there is something.
    asks: Mutex<Vec<Ask>>,
    asked: AtomicBool,
}

/// What a running worker can be asked for.
pub enum Ask {
    /// Channels to other assistants.
    Assistants(Change),
    /// To replay connections with flow hashes below this.
    Sample(u64),
}

impl Shared {
    /// Nothing published, nothing asked for.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> Result<Arc<Shared>> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Arc::new(Shared {
            snapshot: Mutex::default(),
            stop: AtomicBool::new(false),
            wake: EventFd::from_flags(flags).context("eventfd")?,
            asks: Mutex::default(),
            asked: AtomicBool::new(false),
        }))
    }

    /// Has the worker change something in its next turn.
    pub fn ask(&self, ask: Ask) {
        self.asks.lock().unwrap_or_else(PoisonError::into_inner).push(ask);
        self.asked.store(true, Ordering::Release);
        // A full counter wakes the worker just as well.
        let _ = self.wake.write(1);
    }
}

/// A worker's belongings; [`Worker::run`] is its life.
pub struct Worker {
    engine: Engine,
    surroundings: Surroundings,
    shared: Arc<Shared>,
    /// `None`: packets come from a feed.
    source: Option<Source>,
    captured: Vec<(Frame, usize)>,
    /// When packets came last.
    captured_at: u64,
    ring_wait: Histogram,
    headers: Vec<ResponseHeader>,
    renewals: Vec<Option<u32>>,
    network: Watch,
    published_at: u64,
    moderation: Moderation,
    pace: Pace,
    retry_transmit: bool,
    /// How long after the last packet or record it goes on looking instead of sleeping, ns, and when that was.
    busy_poll_ns: u64,
    worked_at: u64,
    feed: Option<Feeding>,
    growth: Option<Growth>,
}

/// Packets from files instead of a capture ring.
struct Feeding {
    feed: Feed,
    /// After everything was given: how long the target may be silent until the sessions are ended.
    patience_ns: u64,
    /// Since when everything was given, when something came of it last, and how much that was.
    over: Option<(u64, u64, u64)>,
}

impl Feeding {
    /// Whether everything was given and there is nothing to wait for any more.
    fn is_done(&mut self, now: u64, engine: &Engine) -> bool {
        if !self.feed.is_over() {
            return false;
        }
        let counters = engine.counters();
        if engine.gauges().sessions_live == 0 && engine.awaits_datagrams(now) {
            return false;
        }
        let done = [Counter::ReplayBytesDelivered, Counter::TurnsSent, Counter::ResponseBytes]
            .map(|counter| counters[counter])
            .iter()
            .sum();
        let (since, last, before) = self.over.get_or_insert((now, now, done));
        if *before != done {
            (*last, *before) = (now, done);
        }
        engine.gauges().sessions_live == 0
            || now - *last > self.patience_ns
            || now - *since > FEED_END_LIMIT_NS
    }
}

/// The engine's surroundings: frames from the port, registrations to the channels.
struct Surroundings {
    port: Port,
    channels: Vec<Client>,
}

impl Output for Surroundings {
    type Frame = Frame;

    #[inline]
    fn allocate(&mut self) -> Option<Frame> {
        match self.port.allocate() {
            Some(frame) => Some(frame),
            None => {
                self.port.flush();
                self.port.reclaim();
                self.port.allocate()
            }
        }
    }

    #[inline]
    fn bytes<'a>(&'a mut self, frame: &'a mut Frame) -> &'a mut [u8] {
        self.port.frame_mut(frame)
    }

    #[inline]
    fn release(&mut self, frame: Frame) {
        self.port.release(frame);
    }

    #[inline]
    fn transmit(&mut self, frame: Frame, len: usize) -> bool {
        let Err(frame) = self.port.transmit(frame, len as u32) else { return true };
        // The ring is full: let the kernel work, then try once more.
        self.port.flush();
        match self.port.transmit(frame, len as u32) {
            Ok(()) => true,
            Err(frame) => {
                self.port.release(frame);
                false
            }
        }
    }

    fn register(&mut self, service: u16, identity: Endpoint) {
        for channel in &mut self.channels {
            channel.register(Entry { service, endpoint: identity });
        }
    }

    fn unregister(&mut self, service: u16, identity: Endpoint) {
        for channel in &mut self.channels {
            channel.unregister(Entry { service, endpoint: identity });
        }
    }
}

/// Whether the replay keeps up.
#[derive(Debug, Default)]
struct Pace {
    since: u64,
    /// Requests of the window, and how many of them were late.
    window: (u32, u32),
    /// The longest delay since the last published figures, in the ring or in the engine, microseconds.
    longest_us: u32,
    /// Until when it counts as behind.
    behind_until: u64,
    told_at: u64,
}

impl Pace {
    /// How often the delays are looked at.
    const WINDOW_NS: u64 = 4_000_000;
    /// Behind is who sends one of so many requests late. Few saturated connections beside many quiet ones are enough; single late requests
    /// are not, for hurrying costs CPU time.
    const ONE_LATE_OF: u32 = 8;

    /// Takes the delays since the last call. True when the assistants are to be told (again) that the replay is behind.
    fn update(&mut self, now: u64, lag: Lag) -> bool {
        if lag.count > 0 {
            self.window.0 += lag.count;
            self.window.1 += lag.late;
            self.longest_us = self.longest_us.max(lag.longest_us);
        }
        if now - self.since >= Self::WINDOW_NS {
            self.since = now;
            let (requests, late) = std::mem::take(&mut self.window);
            if late > requests / Self::ONE_LATE_OF {
                self.behind_until = now + HURRY;
            }
        }
        let tell = self.is_behind(now) && now - self.told_at >= HURRY / 2;
        if tell {
            self.told_at = now;
        }
        tell
    }

    fn is_behind(&self, now: u64) -> bool {
        now < self.behind_until
    }
}

impl Worker {
    /// Puts a worker together.
    pub fn new(
        engine: Engine,
        port: Port,
        source: Option<Source>,
        channels: Vec<Client>,
        network: Watch,
        shared: Arc<Shared>,
    ) -> Worker {
        Worker {
            engine,
            renewals: vec![None; channels.len()],
            surroundings: Surroundings { port, channels },
            shared,
            source,
            captured: Vec::with_capacity(Source::MOST),
            captured_at: 0,
            ring_wait: Histogram::default(),
            headers: Vec::with_capacity(4096),
            network,
            published_at: 0,
            moderation: Moderation::new(LONGEST_PAUSE_NS),
            pace: Pace::default(),
            retry_transmit: false,
            busy_poll_ns: 0,
            worked_at: 0,
            feed: None,
            growth: None,
        }
    }

    /// Has the memory for more sessions made ready before they come.
    pub fn grow_by(&mut self, growth: Growth) {
        self.growth = Some(growth);
    }

    /// Takes packets from files instead of a capture ring. The worker stops when all were replayed and the sessions have ended, or nothing
    /// came from the target for `patience_ns`.
    pub fn feed(&mut self, feed: Feed, patience_ns: u64) {
        self.feed = Some(Feeding { feed, patience_ns, over: None });
    }

    /// Neither sleeps nor pauses until nothing has come for so long, ns.
    pub fn poll_busily(&mut self, nanoseconds: u64) {
        self.busy_poll_ns = nanoseconds;
    }

    /// Connections that were open before capture began and are between two requests: `quiet` ones have sent nothing since before capture
    /// began, of the others what is in the ring already may be the rest of a request.
    pub fn join(&mut self, quiet: &[(Endpoint, Endpoint)], others: &[(Endpoint, Endpoint)]) {
        let now = clock::now();
        self.update_links();
        for &(client, server) in quiet {
            self.engine.expect_turn(now, client, server);
        }
        while self.capture(now) > 0 {}
        for &(client, server) in others {
            self.engine.expect_turn(now, client, server);
        }
    }

    /// Works until told to stop. Allocates nothing while it does.
    pub fn run(mut self) {
        let mut stopping_since = None;
        // What figures need memory for they get now.
        self.publish(clock::now());
        // Pauses are a fraction of a millisecond; the kernel's default slack would add a sixth of that.
        let _ = nix::sys::prctl::set_timerslack(1_000);
        loop {
            let now = clock::now();
            self.update_links();
            if self.shared.asked.load(Ordering::Relaxed) {
                self.change(now);
            }
            let work = self.turn(now);
            self.keep_pace(now);
            let fed = self.feed.as_mut().is_some_and(|feeding| feeding.is_done(now, &self.engine));
            if stopping_since.is_none() && (fed || self.shared.stop.load(Ordering::Acquire)) {
                // What is in the ring already is still replayed; then the sessions end. Files end here.
                while self.feed.is_none() && self.capture(now) > 0 {}
                self.feed = None;
                self.engine.stop(now, &mut self.surroundings);
                self.surroundings.port.flush();
                stopping_since = Some(now);
            }
            if let Some(since) = stopping_since
                && (self.engine.stopped() || now - since > STOP_LIMIT_NS)
            {
                break;
            }
            if now - self.published_at >= PUBLISH_NS {
                self.publish(now);
            }
            if work > 0 {
                self.worked_at = now;
            }
            match self.moderation.next(now, self.pace.is_behind(now)) {
                _ if now - self.worked_at < self.busy_poll_ns && stopping_since.is_none() => {
                    std::thread::yield_now();
                }
                Next::Pause(pause) if work < BATCH && stopping_since.is_none() => clock::sleep(pause),
                Next::Spin => std::thread::yield_now(),
                _ if work > 0 => {}
                Next::Wait | Next::Pause(_) => self.wait(now, stopping_since.is_some()),
            }
        }
        let now = clock::now();
        self.surroundings.port.flush();
        for channel in &mut self.surroundings.channels {
            channel.flush(now);
        }
        self.publish(now);
        let port = &mut self.surroundings.port;
        let left = self.source.as_mut().map_or(0, |source| source.discard(port));
        if let Ok(mut snapshot) = self.shared.snapshot.lock() {
            snapshot.left = left;
            snapshot.pending = Some(self.engine.pending());
        }
    }

    /// Does what it was asked for. Rare, and the only thing after the start that may allocate.
    fn change(&mut self, now: u64) {
        // Before the look: what comes after it is looked at next time.
        self.shared.asked.swap(false, Ordering::Acquire);
        let asks = std::mem::take(&mut *self.shared.asks.lock().unwrap_or_else(PoisonError::into_inner));
        for ask in asks {
            match ask {
                Ask::Sample(threshold) => self.engine.set_sample(now, threshold, &mut self.surroundings),
                Ask::Assistants(change) => self.change_assistants(change),
            }
        }
    }

    /// A new assistant is told of all live identities, as one that came back is.
    fn change_assistants(&mut self, Change { keep, former, new, key }: Change) {
        let channels = std::mem::take(&mut self.surroundings.channels).into_iter();
        let kept = channels.zip(std::mem::take(&mut self.renewals));
        let kept = kept.filter(|(channel, _)| keep.contains(&channel.assistant()));
        let all = kept.chain(new.into_iter().map(|channel| (channel, None)));
        (self.surroundings.channels, self.renewals) = all.unzip();
        for channel in &mut self.surroundings.channels {
            channel.set_key(key.clone());
            channel.set_former(former.contains(&channel.assistant()));
        }
    }

    /// One turn of the loop; returns how many packets and records it handled.
    fn turn(&mut self, now: u64) -> usize {
        let mut work = 0;
        for _ in 0..BATCHES_PER_TURN {
            let count = self.capture(now);
            work += count;
            if count < BATCH {
                break;
            }
        }
        work += self.responses(now);
        self.engine.on_timers(now, &mut self.surroundings);
        self.retry_transmit = self.surroundings.port.flush() == Flush::Pending;
        self.surroundings.port.reclaim();
        self.renew();
        for channel in &mut self.surroundings.channels {
            channel.flush(now);
        }
        work
    }

    /// Looks at how late requests leave, and hurries the assistants when they leave late.
    fn keep_pace(&mut self, now: u64) {
        if self.pace.update(now, self.engine.take_lag()) {
            for channel in &mut self.surroundings.channels {
                channel.hurry();
            }
        }
    }

    fn capture(&mut self, now: u64) -> usize {
        if let Some(feeding) = &mut self.feed {
            return feeding.feed.give(now, &mut self.engine, &mut self.captured, &mut self.surroundings);
        }
        let Some(source) = &mut self.source else { return 0 };
        let count = source.receive(&mut self.surroundings.port, &mut self.captured);
        if count > 0 {
            self.captured_at = now;
            if let Some(first) = source.first_captured_ns() {
                // The others have waited less.
                let waited_us = (now.saturating_sub(first) / 1000) as u32;
                self.ring_wait.record_all(waited_us, count as u32);
                self.pace.longest_us = self.pace.longest_us.max(waited_us);
            }
            self.engine.on_captured(now, &mut self.captured, &mut self.surroundings);
        }
        count
    }

    fn responses(&mut self, now: u64) -> usize {
        let mut work = 0;
        for at in 0..self.surroundings.channels.len() {
            for _ in 0..READS_PER_TURN {
                let headers = &mut self.headers;
                let moderation = &mut self.moderation;
                self.surroundings.channels[at].drive(now, |header| {
                    moderation.record(header.port, header.addr[15]);
                    headers.push(*header);
                });
                let count = self.headers.len();
                work += count;
                self.engine.on_responses(now, &self.headers, &mut self.surroundings);
                self.headers.clear();
                if count < FULL_READ {
                    break;
                }
            }
        }
        work
    }

    /// Tells an assistant that is new or came back of all live identities, as many at a time as its queue has room for.
    fn renew(&mut self) {
        for (channel, renewal) in self.surroundings.channels.iter_mut().zip(&mut self.renewals) {
            if channel.needs_renewal() && channel.begin_renewal() {
                *renewal = Some(0);
            }
            let Some(from) = *renewal else { continue };
            let mut room = channel.room();
            let mut next = None;
            for (place, service, identity) in self.engine.identities(from) {
                if room == 0 {
                    next = Some(place);
                    break;
                }
                channel.register(Entry { service, endpoint: identity });
                room -= 1;
            }
            *renewal = next;
            if next.is_none() && !channel.end_renewal() {
                // Its queue is full: the last step comes again in the next turn.
                *renewal = Some(u32::MAX);
            }
        }
    }

    /// Takes over how packets leave towards each target, when that has changed.
    fn update_links(&mut self) {
        let Some(network) = self.network.changed() else { return };
        for (service, link) in network.links.iter().enumerate() {
            let link = link.as_ref().ok().map(|link| Link {
                source_mac: link.src_mac,
                destination_mac: link.dst_mac,
                tags: link.vlan.map(|tag| tag.map(|tag| (tag.protocol, tag.id))),
                mtu: link.mtu.min(u32::from(u16::MAX)) as u16,
            });
            self.engine.set_link(service, link);
        }
    }

    /// Waits for a packet, a record, a timer or the stop.
    fn wait(&mut self, now: u64, stopping: bool) {
        let mut until = now + 1_000_000_000;
        if let Some(ahead) = self.engine.next_deadline_ns(now) {
            until = until.min(now + ahead);
        }
        if self.retry_transmit {
            until = until.min(now + RETRY_TRANSMIT_NS);
        }
        if let Some(feeding) = &mut self.feed {
            until = until.min(match feeding.feed.ahead() {
                feed::Next::At(due) => due.max(now),
                feed::Next::Soon | feed::Next::Over => now + FEED_AGAIN_NS,
            });
        }
        if stopping {
            until = until.min(now + 1_000_000);
        }
        for channel in &self.surroundings.channels {
            until = until.min(channel.deadline());
        }
        let idle = now.saturating_sub(self.captured_at);
        if let Some(ahead) = self.source.as_mut().and_then(|source| source.about_to_sleep(idle)) {
            until = until.min(now + ahead);
        }
        let woken = {
            let wake = PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN);
            let mut fds = [const { None }; 2 + MAX_CHANNELS];
            let captured = self.source.as_ref().and_then(|source| source.fd(&self.surroundings.port));
            let captured = captured.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let channels = self.surroundings.channels.iter().filter_map(|channel| {
                let write = if channel.wants_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
                Some(PollFd::new(channel.fd()?, PollFlags::POLLIN | write))
            });
            let mut count = 0;
            for (place, fd) in fds.iter_mut().zip([wake].into_iter().chain(captured).chain(channels)) {
                *place = Some(fd);
                count += 1;
            }
            let mut fds =
                fds.map(|fd| fd.unwrap_or(PollFd::new(self.shared.wake.as_fd(), PollFlags::empty())));
            let ahead = until.saturating_sub(now);
            let timeout = TimeSpec::new((ahead / 1_000_000_000) as i64, (ahead % 1_000_000_000) as i64);
            // A signal or an error: the next turn looks at everything anyway.
            let _ = ppoll(&mut fds[..count], Some(timeout), None);
            fds[0].any().unwrap_or(false)
        };
        if woken {
            let _ = self.shared.wake.read();
        }
    }

    fn publish(&mut self, now: u64) {
        self.published_at = now;
        if let Some(growth) = &mut self.growth {
            growth.look(&self.engine);
        }
        // The main thread holds the lock for the time of a copy; when it does just now, the next time will do.
        let Ok(mut snapshot) = self.shared.snapshot.try_lock() else { return };
        snapshot.counters = *self.engine.counters();
        snapshot.services.clear();
        snapshot.services.extend(self.engine.service_counters());
        snapshot.gauges = self.engine.gauges();
        let (capture_to_transmit, target_response) = self.engine.histograms();
        snapshot.ring_wait.clone_from(&self.ring_wait);
        snapshot.capture_to_transmit.clone_from(capture_to_transmit);
        snapshot.target_response.clone_from(target_response);
        snapshot.lag_us = snapshot.lag_us.max(std::mem::take(&mut self.pace.longest_us));
        snapshot.port = self.surroundings.port.counters();
        snapshot.sockets = self.surroundings.port.statistics().unwrap_or_default();
        snapshot.taken = self.source.as_ref().map_or(0, |source| source.taken(&self.surroundings.port));
        snapshot.channels.clear();
        snapshot.channels.extend(self.surroundings.channels.iter().map(|channel| *channel.counters()));
        snapshot.connected.clear();
        let named = self.surroundings.channels.iter().filter(|channel| !channel.is_former());
        snapshot.connected.extend(named.map(Client::is_connected));
        snapshot.tls.clear();
        snapshot.tls.extend(self.engine.tls_seen());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a worker is behind after a window of so many requests, so many of them late.
    fn is_behind(count: u32, late: u32) -> bool {
        let mut pace = Pace::default();
        let now = 1_000_000_000;
        pace.update(now, Lag::default());
        pace.update(now + 1, Lag { count, late, longest_us: 30_000 });
        pace.update(now + Pace::WINDOW_NS, Lag::default());
        pace.is_behind(now + Pace::WINDOW_NS)
    }

    #[test]
    fn few_late_sessions_beside_many_that_are_not_are_enough_to_be_behind() {
        assert!(is_behind(80, 80));
        assert!(is_behind(80, 11));
        assert!(!is_behind(80, 10), "single late ones");
        assert!(!is_behind(80, 0));
        assert!(is_behind(1, 1));
        assert!(!is_behind(0, 0), "nothing came");
    }

    #[test]
    fn assistants_are_told_again_while_it_lasts_and_it_ends_by_itself() {
        let mut pace = Pace::default();
        let late = Lag { count: 1, late: 1, longest_us: 30_000 };
        let mut told = Vec::new();
        for ms in 1_000..1_300u64 {
            let lag = if ms < 1_100 { late } else { Lag::default() };
            if pace.update(ms * 1_000_000, lag) {
                told.push(ms);
            }
        }
        assert_eq!(told.first(), Some(&1_000));
        assert!(told.windows(2).all(|pair| pair[1] - pair[0] == 50), "{told:?}");
        assert!(told.last().is_some_and(|&last| (1_150..1_200).contains(&last)), "{told:?}");
        assert!(!pace.is_behind(1_200 * 1_000_000));
    }
}
