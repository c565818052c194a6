//! What a role says of itself: a line now and then, and at the end everything.

use crate::afxdp::{PortCounters, SocketStatistics, Statistics};
use crate::channel::client::ClientCounters;
use crate::cli::ServiceArg;
use crate::say::{caution, say};
use crate::worker::Snapshot;
use anyhow::{Context, Result, bail};
use replayer_common::addr::ANY;
use replayer_common::packet::Protocol;
use replayer_engine::counters::{Counter, Counters, Pending, ServiceCounters};
use replayer_engine::histogram::Histogram;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;

/// Makes sure of the place of a report before a role starts: at its end, after hours perhaps, would be late to hear of it. What is in
/// the file stays until then, and where there is none, none is left.
///
/// # Errors
/// When the file cannot be written.
pub fn check_writable(path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut options = OpenOptions::new();
    match options.append(true).create_new(true).open(path) {
        Ok(_) => std::fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            options.create_new(false).create(true).open(path).map(drop)
        }
        Err(error) => Err(error),
    }
    .with_context(|| unwritable(path))
}

/// Writes a role's report where `--report` says.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, report: &Value) -> Result<()> {
    std::fs::write(path, format!("{report:#}\n")).with_context(|| unwritable(path))
}

/// Writes the report of a role that goes on, and says so. `running` in it tells it from a final one. The accounts are not in it: that they
/// add up can be seen when everything stands still.
pub(crate) fn write_interim(path: Option<&Path>, mut report: Value) {
    let Some(path) = path else {
        say!("SIGHUP: there is no report to write (--report FILE)");
        return;
    };
    if let Some(report) = report.as_object_mut() {
        report.remove("accounting");
        report.insert("running".into(), true.into());
    }
    match write(path, &report) {
        Ok(()) => say!("SIGHUP: the report until now is in {}", path.display()),
        Err(error) => caution!("{error:#}"),
    }
}

fn unwritable(path: &Path) -> String {
    format!("cannot write the report to {}; choose a writable path", path.display())
}

/// Prints a line of figures to standard output. Whoever reads them may go away: that ends no replay.
pub fn print(line: &Value) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The figures of all workers together.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Sums of the engines' counters.
    pub counters: Counters,
    /// The same by service.
    pub services: Vec<ServiceFigures>,
    /// Packets that were to be captured and came to no worker, by where they were lost.
    pub lost_by_place: Vec<(&'static str, u64)>,
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
        let (mine, theirs) = (&mut self.port, &worker.port);
        mine.received += theirs.received;
        mine.misplaced += theirs.misplaced;
        mine.transmitted += theirs.transmitted;
        mine.completed += theirs.completed;
        mine.dropped += theirs.dropped;
        mine.kicks += theirs.kicks;
        mine.again += theirs.again;
        mine.link_down += theirs.link_down;
        for (mine, theirs) in
            [(&mut self.sockets.rx, &worker.sockets.rx), (&mut self.sockets.tx, &worker.sockets.tx)]
        {
            mine.rx_dropped += theirs.rx_dropped;
            mine.rx_ring_full += theirs.rx_ring_full;
            mine.rx_fill_ring_empty += theirs.rx_fill_ring_empty;
            mine.rx_invalid_descs += theirs.rx_invalid_descs;
            mine.tx_invalid_descs += theirs.tx_invalid_descs;
            mine.tx_ring_empty += theirs.tx_ring_empty;
        }
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
    pub fn lost_before(&mut self, losses: impl Iterator<Item = (&'static str, u64)>) {
        self.lost_by_place = losses.collect();
        let socket = &self.sockets.rx;
        self.lost_by_place.extend([
            ("capture_socket.rx_ring_full", socket.rx_ring_full),
            ("capture_socket.rx_dropped", socket.rx_dropped),
            ("left_at_the_end", self.left),
        ]);
    }

    /// Packets that were to be captured and came to no worker.
    pub fn lost_in_capture(&self) -> u64 {
        self.lost_by_place.iter().map(|(_, count)| count).sum()
    }

    /// What was captured and not replayed, by reason: packets, sessions and bytes whose count is not zero.
    pub fn not_replayed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Counter::ALL
            .iter()
            .filter(|counter| is_loss(**counter))
            .map(|&counter| (counter.name(), self.counters[counter]))
            .filter(|&(_, value)| value > 0)
    }

    /// The same, each with what it counts.
    pub fn losses(&self) -> impl Iterator<Item = (&'static str, u64, &'static str)> {
        Counter::ALL
            .iter()
            .filter(|counter| is_loss(**counter) && self.counters[**counter] > 0)
            .map(|&counter| (counter.name(), self.counters[counter], counter.what()))
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

    /// One line of JSON for programs.
    pub fn line_json(&self, seconds: f64) -> Value {
        json!({
            "t": (seconds * 10.0).round() / 10.0,
            "sessions_live": self.sessions_live,
            "sessions_opened": self.counters[Counter::SessionsOpened],
            "turns_sent": self.counters[Counter::TurnsSent],
            "datagrams_sent": self.counters[Counter::DatagramsSent],
            "datagram_responses": self.counters[Counter::DatagramResponses],
            "lag_us": self.lag_us,
            "held_bytes": self.held_bytes,
            "packets_lost_in_capture": self.lost_in_capture(),
            "not_replayed": self.not_replayed().map(|(name, value)| (name.to_owned(), value.into())).collect::<Map<_, _>>(),
        })
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
        for (name, value) in lost.into_iter().chain(self.not_replayed()) {
            let _ = write!(line, ", {name} {value}");
        }
        line
    }

    /// The accounting identities: name, left, right.
    pub fn identities(&self) -> Vec<(&'static str, u64, u64)> {
        let mut identities = self.counters.identities(&self.pending.unwrap_or_default()).to_vec();
        if let Some(handed_over) = self.handed_over {
            let accounted = self.taken + self.left + self.sockets.rx.lost();
            let name = "packets handed over by the capture program = taken by a worker + lost at its socket + left at the end";
            identities.push((name, handed_over, accounted));
        }
        identities
    }

    /// Whether the run did what was asked, when it has ended. That some of the traffic was not replayed, for reasons that are counted, is no
    /// failure; that nothing was, is one.
    ///
    /// # Errors
    /// When the accounts do not add up, or nothing of what was to be replayed came to a target.
    pub fn ensure_done(&self) -> Result<()> {
        for (name, left, right) in self.identities() {
            if left != right {
                bail!("the accounts do not add up: {name}: {left} against {right}; please report this");
            }
        }
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
        Ok(())
    }

    /// Why not everything was replayed.
    fn reasons(&self) -> String {
        let c = &self.counters;
        let ended =
            Counter::ALL.iter().filter(|counter| counter.what().starts_with("ended: ") && c[**counter] > 0);
        let ended = ended.map(|counter| (counter.name(), c[*counter], counter.what()));
        let reasons: Vec<String> = ended
            .chain(self.losses())
            .map(|(name, value, what)| format!("{value} {name} ({what})"))
            .collect();
        if reasons.is_empty() { "it did not answer".to_owned() } else { reasons.join(", ") }
    }

    /// Everything, for `--report`. `kernel` are the programs' verdicts.
    pub fn report(&self, kernel: Value, seconds: f64, cpu_seconds: f64) -> Value {
        let counters: Map<String, Value> = Counter::ALL
            .iter()
            .map(|&counter| (counter.name().into(), self.counters[counter].into()))
            .collect();
        let identities: Vec<Value> = self
            .identities()
            .into_iter()
            .map(|(name, left, right)| json!({"identity": name, "left": left, "right": right, "holds": left == right}))
            .collect();
        json!({
            "role": "online",
            "version": env!("CARGO_PKG_VERSION"),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "counters": counters,
            "accounting": identities,
            "services": self.services.iter().map(ServiceFigures::report).collect::<Vec<_>>(),
            "packets_lost_in_capture": self.lost_in_capture(),
            "ring_wait_us": histogram(&self.ring_wait),
            "capture_to_transmit_us": histogram(&self.capture_to_transmit),
            "target_response_us": histogram(&self.target_response),
            "kernel": kernel,
            "port": {
                "received": self.port.received,
                "misplaced": self.port.misplaced,
                "transmitted": self.port.transmitted,
                "completed": self.port.completed,
                "dropped_by_device": self.port.dropped,
                "kicks": self.port.kicks,
                "kicks_cut_short": self.port.again,
                "link_down": self.port.link_down,
                "capture_socket": socket(&self.sockets.rx),
                "transmit_socket": socket(&self.sockets.tx),
            },
            "return_channels": self.channels,
            "workers": self.workers,
        })
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
        for &counter in Counter::ALL.iter().filter(|&&counter| is_loss(counter) && c[counter] > 0) {
            let _ = write!(text, "\n  {} {}: {}", c[counter], counter.name(), counter.what());
        }
        for &(place, lost) in self.lost_by_place.iter().filter(|(_, lost)| *lost > 0) {
            let _ = write!(
                text,
                "\n  {lost} packets were lost in the capture ({place}): the workers did not keep up"
            );
        }
        for (name, left, right) in self.identities() {
            if left != right {
                let _ = write!(
                    text,
                    "\n  the accounts do not add up: {name}: {left} against {right}; please report this"
                );
            }
        }
        text
    }
}

impl ServiceFigures {
    fn report(&self) -> Value {
        let mut report = Map::new();
        for (label, value) in self.labels() {
            report.insert(label.into(), value.into());
        }
        report.extend(self.counters.named().map(|(name, _, count)| (name.to_owned(), count.into())));
        report.into()
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

/// Whether a counter says that something captured was not replayed.
pub(crate) fn is_loss(counter: Counter) -> bool {
    counter.what().starts_with("not replayed")
        || counter.what().starts_with("not opened")
        || counter.name().starts_with("lost_bytes")
}

/// A histogram's values that are reported.
pub(crate) fn histogram(h: &Histogram) -> Value {
    json!({
        "count": h.count(),
        "p50": h.quantile(0.5),
        "p90": h.quantile(0.9),
        "p99": h.quantile(0.99),
        "p999": h.quantile(0.999),
        "max": h.max(),
    })
}

fn socket(s: &SocketStatistics) -> Value {
    json!({
        "rx_dropped": s.rx_dropped,
        "rx_ring_full": s.rx_ring_full,
        "rx_fill_ring_empty": s.rx_fill_ring_empty,
        "rx_invalid_descriptors": s.rx_invalid_descs,
        "tx_invalid_descriptors": s.tx_invalid_descs,
        "tx_ring_empty": s.tx_ring_empty,
    })
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
        let told = run(&[C::PacketsCaptured], 0);
        assert!(
            told.contains("do not add up: packets captured = sum by fate: 1 against 0; please report"),
            "{told}"
        );
    }

    #[test]
    fn to_look_whether_a_report_can_be_written_leaves_everything_as_it_was() {
        let dir = std::env::temp_dir().join(format!("replayer-report-{}", std::process::id()));
        let path = dir.join("report.json");
        let error = check_writable(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("writable path") && error.contains("report.json"), "{error}");
        std::fs::create_dir(&dir).unwrap();
        check_writable(Some(&path)).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "of the run before").unwrap();
        check_writable(Some(&path)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "of the run before");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
