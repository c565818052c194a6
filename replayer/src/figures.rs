//! The figures of a run: those of all workers together, and what is told of them: a line now and then, and everything at the end.

use crate::afxdp::{PortCounters, Statistics};
use crate::capture::Verdicts;
use crate::capture::verdicts::Place;
use crate::channel::client::ClientCounters;
use crate::cli::ServiceArg;
use crate::report::{Identity, Quantiles};
use crate::worker::Snapshot;
use anyhow::{Result, bail};
use replayer_common::addr::ANY;
use replayer_common::packet::Protocol;
use replayer_engine::counters::{Counter, Counters, Kind, Pending, ServiceCounters};
use replayer_engine::histogram::Histogram;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The figures of all workers together.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Sums of the engines' counters.
    pub counters: Counters,
    /// The same by service.
    pub services: Vec<ServiceFigures>,
    /// Packets that were to be captured and came to no worker, by where they were lost.
    pub lost_by_place: Vec<(Place, u64)>,
    /// Sessions live.
    pub sessions_live: u64,
    /// Client bytes held.
    pub held_bytes: u64,
    /// The longest delay since the last look, in the ring or from there to transmission, microseconds.
    pub lag_us: u32,
    ring_wait: Histogram,
    capture_to_transmit: Histogram,
    target_response: Histogram,
    port: PortCounters,
    sockets: Statistics,
    taken: u64,
    left: u64,
    /// At the end: packets that the capture program gave to the workers' rings or sockets.
    pub handed_over: Option<u64>,
    /// One for each worker and assistant.
    channels: Vec<ClientCounters>,
    /// By assistant: whether every worker is connected to it.
    connected: Vec<bool>,
    pending: Option<Pending>,
    workers: Vec<Share>,
}

/// What became of a service's sessions and datagrams.
#[derive(Clone, Copy, Debug)]
pub struct ServiceFigures {
    /// Which one.
    pub service: ServiceArg,
    /// Sums of the engines' counters.
    pub counters: ServiceCounters,
}

/// What one worker did.
#[derive(Clone, Debug, Serialize)]
struct Share {
    /// The CPU that it is bound to.
    cpu: Option<usize>,
    packets_captured: u64,
    sessions_opened: u64,
    turns_sent: u64,
    packets_transmitted: u64,
}

impl Figures {
    /// Nothing yet, of these services in the order of their numbers.
    pub fn of(services: &[ServiceArg]) -> Figures {
        let of_service =
            |&service: &ServiceArg| ServiceFigures { service, counters: ServiceCounters::default() };
        Figures { services: services.iter().map(of_service).collect(), ..Figures::default() }
    }

    /// Adds the figures of a worker, which is bound to `cpu` or to none.
    pub fn add(&mut self, worker: &Snapshot, cpu: Option<usize>) {
        self.counters.add(&worker.counters);
        for (mine, theirs) in self.services.iter_mut().zip(&worker.services) {
            mine.counters.add(theirs);
        }
        self.sessions_live += worker.gauges.sessions_live;
        self.held_bytes += worker.gauges.held_bytes;
        self.lag_us = self.lag_us.max(worker.lag_us);
        self.ring_wait.add(&worker.ring_wait);
        self.capture_to_transmit.add(&worker.capture_to_transmit);
        self.target_response.add(&worker.target_response);
        self.taken += worker.taken;
        self.left += worker.left;
        self.port += worker.port;
        self.sockets.rx += worker.sockets.rx;
        self.sockets.tx += worker.sockets.tx;
        self.channels.extend(&worker.channels);
        self.connected.resize(self.connected.len().max(worker.connected.len()), true);
        for (all, one) in self.connected.iter_mut().zip(&worker.connected) {
            *all &= one;
        }
        self.workers.push(Share {
            cpu,
            packets_captured: worker.counters[Counter::PacketsCaptured],
            sessions_opened: worker.counters[Counter::SessionsOpened],
            turns_sent: worker.counters[Counter::TurnsSent],
            packets_transmitted: worker.port.transmitted,
        });
        if let Some(theirs) = worker.pending {
            let mine = self.pending.get_or_insert_default();
            mine.sessions += theirs.sessions;
            mine.replay_bytes += theirs.replay_bytes;
            mine.out_of_order_bytes += theirs.out_of_order_bytes;
        }
    }

    /// Takes what was lost before the workers' sockets, and adds what was lost in them.
    pub fn lost_before(&mut self, losses: Vec<(Place, u64)>) {
        self.lost_by_place = losses;
        let socket = &self.sockets.rx;
        self.lost_by_place.extend([
            (Place::SocketRingFull, socket.rx_ring_full),
            (Place::SocketDropped, socket.rx_dropped),
            (Place::LeftAtTheEnd, self.left),
        ]);
    }

    /// Packets that were to be captured and came to no worker.
    pub fn lost_in_capture(&self) -> u64 {
        self.lost_by_place.iter().map(|(_, count)| count).sum()
    }

    /// What was captured and not replayed, by reason: packets, sessions and bytes whose count is not zero.
    pub fn losses(&self) -> impl Iterator<Item = (Counter, u64)> {
        let counts = Counter::ALL.iter().map(|&counter| (counter, self.counters[counter]));
        counts.filter(|&(counter, count)| counter.is_loss() && count > 0)
    }

    /// Assistants connected, and how many there are.
    pub fn assistants(&self) -> (usize, usize) {
        (self.connected.iter().filter(|&&up| up).count(), self.connected.len())
    }

    /// Which assistants every worker is connected to.
    #[cfg(test)]
    pub(crate) fn connected(&mut self, connected: &[bool]) {
        self.connected = connected.to_vec();
    }

    /// One line for programs.
    pub fn line(&self, seconds: f64) -> Line {
        Line {
            t: (seconds * 10.0).round() / 10.0,
            sessions_live: self.sessions_live,
            sessions_opened: self.counters[Counter::SessionsOpened],
            turns_sent: self.counters[Counter::TurnsSent],
            datagrams_sent: self.counters[Counter::DatagramsSent],
            datagram_responses: self.counters[Counter::DatagramResponses],
            lag_us: self.lag_us,
            held_bytes: self.held_bytes,
            packets_lost_in_capture: self.lost_in_capture(),
            not_replayed: self.losses().map(|(counter, count)| (counter.name(), count)).collect(),
        }
    }

    /// One line for people; `before` are the figures `interval` seconds ago.
    pub fn line_text(&self, before: &Figures, interval: f64) -> String {
        let rate =
            |counter| (self.counters[counter].saturating_sub(before.counters[counter])) as f64 / interval;
        let mut line = format!(
            "{:.0} requests/s, {:.0} packets/s captured, {:.0}/s sent, {} sessions, lag {:.1} ms, {} KiB held",
            rate(Counter::TurnsSent) + rate(Counter::PacketsDatagrams),
            rate(Counter::PacketsCaptured),
            rate(Counter::SegmentsSent) + rate(Counter::DatagramsSent),
            self.sessions_live,
            f64::from(self.lag_us) / 1000.0,
            self.held_bytes / 1024,
        );
        let (up, all) = self.assistants();
        if up < all {
            let _ = write!(line, ", {} of {all} assistants unreachable", all - up);
        }
        let lost = Some(("packets_lost_in_capture", self.lost_in_capture())).filter(|(_, lost)| *lost > 0);
        for (name, value) in
            lost.into_iter().chain(self.losses().map(|(counter, count)| (counter.name(), count)))
        {
            let _ = write!(line, ", {name} {value}");
        }
        line
    }

    /// The accounting identities.
    pub fn identities(&self) -> Vec<Identity> {
        let of_engines = self.counters.identities(&self.pending.unwrap_or_default());
        let mut identities = of_engines.map(|(name, left, right)| Identity::new(name, left, right)).to_vec();
        if let Some(handed_over) = self.handed_over {
            let accounted = self.taken + self.left + self.sockets.rx.lost();
            let name = "packets handed over by the capture program = taken by a worker + lost at its socket + left at the end";
            identities.push(Identity::new(name, handed_over, accounted));
        }
        identities
    }

    /// Whether the run did what was asked, when it has ended. That some of the traffic was not replayed, for reasons that are counted, is no
    /// failure; that nothing was, is one.
    ///
    /// # Errors
    /// When the accounts do not add up, or nothing of what was to be replayed came to a target, or to one of several.
    pub fn ensure_done(&self) -> Result<()> {
        self.identities().into_iter().try_for_each(Identity::ensure)?;
        let c = &self.counters;
        let established: u64 =
            self.services.iter().map(|service| service.counters.sessions_established).sum();
        // What of the traffic itself there was nothing to replay is not the target's fault, nor the set-up's.
        let excused = [
            Counter::SessionsTls,
            Counter::SessionsClientReset,
            Counter::SessionsGap,
            Counter::SessionsLimit,
        ];
        let excused: u64 = excused.into_iter().map(|reason| c[reason]).sum();
        if c[Counter::SessionsWanted] > excused && established == 0 {
            let opened = c[Counter::SessionsOpened];
            bail!(
                "not one session with a target was established, and {opened} were tried: {}",
                self.reasons()
            );
        }
        let sent = c[Counter::ReplayBytesDelivered] + c[Counter::DatagramsSent];
        if c[Counter::BytesAccepted] + c[Counter::PacketsDatagrams] > 0 && sent == 0 {
            bail!("the target took nothing: {}", self.reasons());
        }
        let absence = |service: &ServiceFigures| service.absence(excused);
        let absent: Vec<String> = self.services.iter().filter_map(absence).collect();
        if !absent.is_empty() {
            bail!("nothing was replayed to {}", absent.join(", nor to "));
        }
        Ok(())
    }

    /// Why not everything was replayed.
    fn reasons(&self) -> String {
        let c = &self.counters;
        let counts = Counter::ALL.iter().map(|&counter| (counter, c[counter]));
        let ended = counts.filter(|&(counter, count)| counter.kind() == Some(Kind::Ended) && count > 0);
        let reasons = ended.chain(self.losses());
        let reasons: Vec<String> = reasons
            .map(|(counter, count)| format!("{count} {} ({})", counter.name(), counter.what()))
            .collect();
        if reasons.is_empty() { "it did not answer".to_owned() } else { reasons.join(", ") }
    }

    /// Everything, for `--report` of `role`. `kernel`: what the programs counted, where packets are captured.
    pub fn report<'a>(
        &'a self,
        role: &'static str,
        kernel: Option<&'a Verdicts>,
        seconds: f64,
        cpu_seconds: f64,
    ) -> Report<'a> {
        Report {
            role,
            version: env!("CARGO_PKG_VERSION"),
            seconds,
            cpu_seconds,
            counters: &self.counters,
            services: &self.services,
            packets_lost_in_capture: self.lost_in_capture(),
            ring_wait_us: Quantiles::of(&self.ring_wait),
            capture_to_transmit_us: Quantiles::of(&self.capture_to_transmit),
            target_response_us: Quantiles::of(&self.target_response),
            kernel,
            port: Port { counters: self.port, sockets: self.sockets },
            return_channels: &self.channels,
            workers: &self.workers,
        }
    }

    /// The final report for people.
    pub fn summary(&self, seconds: f64, cpu_seconds: f64) -> String {
        let c = &self.counters;
        let turns = c[Counter::TurnsSent];
        let mut text = format!(
            "replayed {turns} requests in {} sessions ({} bytes delivered) in {seconds:.1} s, CPU {cpu_seconds:.2} s",
            c[Counter::SessionsOpened],
            c[Counter::ReplayBytesDelivered]
        );
        if turns > 0 {
            let _ = write!(text, " ({:.1} us a request)", cpu_seconds * 1e6 / turns as f64);
        }
        if c[Counter::DatagramsWanted] > 0 {
            let _ = write!(
                text,
                "\n  {} datagrams of UDP captured, {} copies of them sent, {} datagrams came back",
                c[Counter::PacketsDatagrams],
                c[Counter::DatagramsSent],
                c[Counter::DatagramResponses]
            );
            if c[Counter::DatagramsSent] > 0 && c[Counter::DatagramResponses] == 0 {
                text += ": the target does not answer, or its route to the clients does not lead to the assistant";
            }
        }
        // Of one alone all is said already.
        for service in self.services.iter().filter(|_| self.services.len() > 1) {
            let _ = write!(text, "\n  {}", service.summary());
        }
        let line = |text: &mut String, what: &str, h: &Histogram| {
            let _ = write!(
                text,
                "\n  {what}: median {} us, p99 {} us, max {} us",
                h.quantile(0.5),
                h.quantile(0.99),
                h.max()
            );
        };
        if self.ring_wait.count() > 0 {
            line(&mut text, "capture to the worker, at most", &self.ring_wait);
        }
        line(&mut text, "the worker to transmission", &self.capture_to_transmit);
        line(&mut text, "target's response begins after", &self.target_response);
        for (counter, count) in self.losses() {
            let _ = write!(text, "\n  {count} {}: {}", counter.name(), counter.what());
        }
        for &(place, lost) in self.lost_by_place.iter().filter(|(_, lost)| *lost > 0) {
            let _ = write!(
                text,
                "\n  {lost} packets were lost in the capture ({place}): the workers did not keep up"
            );
        }
        for error in self.identities().into_iter().filter_map(|identity| identity.ensure().err()) {
            let _ = write!(text, "\n  {error}");
        }
        text
    }
}

/// A line of figures for programs.
#[derive(Debug, Serialize)]
pub struct Line {
    /// Seconds since the start.
    t: f64,
    sessions_live: u64,
    sessions_opened: u64,
    turns_sent: u64,
    datagrams_sent: u64,
    datagram_responses: u64,
    lag_us: u32,
    held_bytes: u64,
    packets_lost_in_capture: u64,
    not_replayed: BTreeMap<&'static str, u64>,
}

/// The report of a role that replays.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    role: &'static str,
    version: &'static str,
    seconds: f64,
    cpu_seconds: f64,
    #[serde(serialize_with = "by_name")]
    counters: &'a Counters,
    services: &'a [ServiceFigures],
    packets_lost_in_capture: u64,
    /// The longest time in the capture ring.
    pub ring_wait_us: Quantiles,
    /// From there to transmission.
    pub capture_to_transmit_us: Quantiles,
    /// From a turn's first byte to its response's.
    pub target_response_us: Quantiles,
    /// `null` where nothing is captured.
    kernel: Option<&'a Verdicts>,
    /// Of all workers together.
    pub port: Port,
    return_channels: &'a [ClientCounters],
    workers: &'a [Share],
}

/// Of ports: what they counted, and the kernel of their sockets.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Port {
    /// What they counted.
    #[serde(flatten)]
    pub counters: PortCounters,
    /// What the kernel counted.
    #[serde(flatten)]
    pub sockets: Statistics,
}

/// The counters by name.
fn by_name<S: Serializer>(counters: &Counters, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(Counter::ALL.iter().map(|&counter| (counter.name(), counters[counter])))
}

/// Its labels and its counts, by name.
impl Serialize for ServiceFigures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (label, value) in self.labels() {
            map.serialize_entry(label, &value)?;
        }
        for (name, _, count) in self.counters.named() {
            map.serialize_entry(name, &count)?;
        }
        map.end()
    }
}

impl ServiceFigures {
    /// The target, and why nothing came to it in the whole run, where something was to come. A client that left at once says nothing of a target
    /// that answers others; nor do `excused` sessions, which may have been closed before it could answer.
    fn absence(&self, excused: u64) -> Option<String> {
        let c = &self.counters;
        let target = self.service.service.target;
        if self.service.protocol == Protocol::Udp {
            let absent = c.datagrams_sent == 0 && c.packets_no_link > 0;
            return absent.then(|| format!("{target} (UDP: no route or next hop)"));
        }
        let missed = c.sessions_refused + c.sessions_unanswered + c.packets_no_link;
        let silent = c.sessions_opened > excused && c.heard == 0;
        (c.sessions_established == 0 && (missed > 0 || silent)).then(|| {
            let counts = [
                (c.sessions_refused, "refused"),
                (c.sessions_unanswered, "not answered"),
                (c.packets_no_link, "packets without a route or next hop"),
            ];
            let counts = counts.into_iter().filter(|(count, _)| *count > 0);
            let counts: String = counts.map(|(count, what)| format!(", {count} {what}")).collect();
            format!("{target} ({} sessions tried{counts})", c.sessions_opened)
        })
    }

    /// What became of it, for people.
    fn summary(&self) -> String {
        let c = &self.counters;
        let (online, target) = (self.service.online_name(), self.service.service.target);
        match self.service.protocol {
            Protocol::Udp => format!(
                "{online} to {target}: {} datagrams sent, {} came back",
                c.datagrams_sent, c.datagrams_answered
            ),
            Protocol::Tcp => format!(
                "{online} to {target}: {} sessions opened, {} established, {} refused, {} not answered",
                c.sessions_opened, c.sessions_established, c.sessions_refused, c.sessions_unanswered
            ),
        }
    }

    /// Which service it is, for programs.
    pub fn labels(&self) -> [(&'static str, String); 3] {
        let ServiceArg { protocol, service } = self.service;
        let protocol = if protocol == Protocol::Udp { "udp" } else { "tcp" };
        let online = match service.online.ip {
            ANY => service.online.port.to_string(),
            _ => service.online.to_string(),
        };
        [("protocol", protocol.into()), ("service", online), ("target", service.target.to_string())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b064_a_run_that_came_to_nothing_or_does_not_add_up_has_failed() {
        let services = ["80-192.0.2.7:80".parse().unwrap(), "udp:53-192.0.2.7:53".parse().unwrap()];
        // What is counted, sessions that were established, and what is said of it.
        let run = |counters: &[Counter], established: u64| {
            let mut figures = Figures::of(&services);
            for &counter in counters {
                figures.counters[counter] += 1;
            }
            figures.services[0].counters.sessions_established = established;
            figures.ensure_done().map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        use Counter as C;
        let refused = [C::SessionsWanted, C::SessionsOpened, C::SessionsRefused];
        let told = run(&refused, 0);
        assert!(
            told.starts_with("not one session") && told.contains("1 sessions_refused (ended: the"),
            "{told}"
        );
        // One of two is an ordinary loss.
        let stopped = [C::SessionsWanted, C::SessionsOpened, C::SessionsStopped];
        assert_eq!(run(&[&refused[..], &stopped[..]].concat(), 1), "");
        let scanned = [C::SessionsWanted, C::SessionsOpened, C::SessionsClientReset];
        assert_eq!(run(&scanned, 0), "");
        let no_room = [C::SessionsWanted, C::SessionsRefusedPool];
        assert!(run(&no_room, 0).contains("0 were tried: 1 sessions_refused_pool"), "{}", run(&no_room, 0));
        let datagram = [C::PacketsCaptured, C::PacketsDatagrams, C::DatagramsWanted];
        let told = run(&[&datagram[..], &[C::DatagramsNoLink]].concat(), 0);
        assert!(told.starts_with("the target took nothing: 1 datagrams_no_link"), "{told}");
        assert_eq!(run(&[&datagram[..], &[C::DatagramsSent]].concat(), 0), "");
        assert_eq!(run(&[], 0), "");
        // A session that turned out to be TLS before the target had answered.
        let mut encrypted = Figures::of(&services[..1]);
        for counter in [C::SessionsWanted, C::SessionsOpened, C::SessionsTls] {
            encrypted.counters[counter] = 1;
        }
        encrypted.services[0].counters.sessions_opened = 1;
        encrypted.ensure_done().unwrap();
        // One of several: `what` happens at a second target of TCP.
        let other = |what: fn(&mut ServiceCounters)| {
            let mut figures = Figures::of(
                &["80-192.0.2.7:80", "80-192.0.2.8:80", "udp:53-192.0.2.7:53"].map(|it| it.parse().unwrap()),
            );
            figures.services[0].counters.sessions_established = 1;
            what(&mut figures.services[1].counters);
            figures.ensure_done().map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(other(|_| ()), "");
        assert_eq!(other(|c| (c.sessions_opened, c.heard) = (1, 1)), "");
        assert_eq!(other(|c| (c.sessions_refused, c.sessions_established) = (1, 1)), "");
        let told = other(|c| (c.sessions_opened, c.sessions_refused, c.heard) = (3, 2, 1));
        assert_eq!(told, "nothing was replayed to 192.0.2.8:80 (3 sessions tried, 2 refused)");
        assert_eq!(
            other(|c| c.sessions_opened = 1),
            "nothing was replayed to 192.0.2.8:80 (1 sessions tried)"
        );
        let told = other(|c| c.packets_no_link = 9);
        assert!(told.contains("0 sessions tried, 9 packets without a route"), "{told}");
        let told = run(&[C::PacketsCaptured], 0);
        assert!(
            told.contains("do not add up: packets captured = sum by fate: 1 against 0; please report"),
            "{told}"
        );
    }
}
