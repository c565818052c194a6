//! The figures of a role in the text format of Prometheus (version 0.0.4), by HTTP: `--metrics IP:PORT`.
//!
//! The role renders them once a second; a thread of its own hands them out. It holds no lock for longer than a copy, and a slow or hostile reader
//! keeps nobody waiting: neither the role nor other readers.

use crate::afxdp::Statistics;
use crate::assistant::report::Report;
use crate::capture::Verdicts;
use crate::figures::{Figures, ServiceFigures};
use crate::privileges::{self, Keep};
use crate::report::Quantiles;
use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use replayer_engine::counters::{Counter, ServiceCounters};
use serde::Serialize;
use serde_json::Value;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a role renders its figures.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// How long a reader may take for its request, and how long for the answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Readers at once: for one more the oldest has to go.
const MOST_READERS: usize = 16;
/// The sample whose labels say which role a page is of, behind `replayer_`.
const BUILD_INFO: &str = "build_info";
/// A request that is longer is none.
const LONGEST_REQUEST: usize = 8192;

/// Where a role puts its figures. The thread that hands them out ends with the process.
#[derive(Debug)]
pub struct Metrics {
    text: Arc<Mutex<String>>,
}

impl Metrics {
    /// Listens, where `--metrics` says so.
    ///
    /// # Errors
    /// When it cannot, with the address.
    pub fn serve(address: Option<SocketAddr>) -> Result<Option<Metrics>> {
        let Some(address) = address else { return Ok(None) };
        let listener = TcpListener::bind(address).with_context(|| {
            format!("--metrics {address}: cannot listen there; choose another address or port")
        })?;
        listener.set_nonblocking(true).context("--metrics")?;
        let text = Arc::new(Mutex::new(String::new()));
        let shared = text.clone();
        std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || {
                privileges::drop_all_but(Keep::Nothing);
                answer_all(&listener, &shared);
            })
            .context("start a thread")?;
        Ok(Some(Metrics { text }))
    }

    /// What readers get from here on.
    pub fn publish(&self, text: String) {
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

/// Answers whoever comes. One thread for all, and nobody waits for anybody.
fn answer_all(listener: &TcpListener, text: &Mutex<String>) {
    // The oldest first.
    let mut readers: VecDeque<Reader> = VecDeque::new();
    loop {
        wait(listener, &readers);
        let now = Instant::now();
        readers.retain_mut(|reader| now < reader.until && reader.go_on(text).unwrap_or(false));
        for _ in 0..MOST_READERS {
            let accepted = listener.accept().and_then(|(stream, _)| Reader::new(stream));
            let mut reader = match accepted {
                Ok(reader) => reader,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(_) => {
                    // No descriptors, most likely: trying again at once would keep a core busy.
                    std::thread::sleep(PATIENCE);
                    break;
                }
            };
            // Most have asked by now.
            if reader.go_on(text).unwrap_or(false) {
                if readers.len() == MOST_READERS {
                    readers.pop_front();
                }
                readers.push_back(reader);
            }
        }
    }
}

/// Waits until somebody comes, asks, or takes more of its answer; or is out of time.
fn wait(listener: &TcpListener, readers: &VecDeque<Reader>) {
    let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    fds.extend(readers.iter().map(|reader| {
        let interest = if reader.answer.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
        PollFd::new(reader.stream.as_fd(), interest)
    }));
    let until = readers.iter().map(|reader| reader.until).min();
    let timeout = until.map_or(PollTimeout::NONE, |until| {
        let left = until.saturating_duration_since(Instant::now());
        PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    });
    // An error is one of the descriptors', and found there.
    let _ = poll(&mut fds, timeout);
}

/// Somebody who asks, then reads.
struct Reader {
    stream: TcpStream,
    /// When it is out of time for what it does now.
    until: Instant,
    request: Vec<u8>,
    /// Empty until it has asked.
    answer: Vec<u8>,
    /// How much of it is sent.
    sent: usize,
}

impl Reader {
    fn new(stream: TcpStream) -> std::io::Result<Reader> {
        stream.set_nonblocking(true)?;
        let until = Instant::now() + PATIENCE;
        Ok(Reader { stream, until, request: Vec::new(), answer: Vec::new(), sent: 0 })
    }

    /// Goes as far as it goes without waiting; false when that was all. Who does not wait for the answer needs none.
    fn go_on(&mut self, text: &Mutex<String>) -> std::io::Result<bool> {
        match self.ask(text).and_then(|()| self.send()) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(true),
            Err(error) => Err(error),
            Ok(()) => Ok(false),
        }
    }

    /// Reads the request up to its empty line, or to the end.
    fn ask(&mut self, text: &Mutex<String>) -> std::io::Result<()> {
        if !self.answer.is_empty() {
            return Ok(());
        }
        let mut piece = [0; 1024];
        while self.request.len() < LONGEST_REQUEST && !self.request.windows(4).any(|end| end == b"\r\n\r\n") {
            match self.stream.read(&mut piece)? {
                0 => break,
                count => self.request.extend_from_slice(&piece[..count]),
            }
        }
        self.answer = answer(&self.request, text).into_bytes();
        self.until = Instant::now() + PATIENCE;
        Ok(())
    }

    fn send(&mut self) -> std::io::Result<()> {
        while self.sent < self.answer.len() {
            self.sent += self.stream.write(&self.answer[self.sent..])?;
        }
        Ok(())
    }
}

fn answer(request: &[u8], text: &Mutex<String>) -> String {
    let (status, body) = if request.starts_with(b"GET /metrics ") || request.starts_with(b"GET / ") {
        ("200 OK", text.lock().unwrap_or_else(PoisonError::into_inner).clone())
    } else {
        ("404 Not Found", "GET /metrics\n".to_owned())
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// The figures of a role that replays, `online` or `offline`. `kernel`: what the programs counted, where packets are captured.
pub fn of_replay(
    role: &'static str,
    figures: &Figures,
    kernel: Option<&Verdicts>,
    seconds: f64,
    cpu_seconds: f64,
) -> String {
    let mut text = Text::new(role, "");
    for &counter in Counter::ALL {
        text.counter(counter.name(), counter.what(), figures.counters[counter]);
    }
    text.gauge("sessions_live", "sessions that have not ended", figures.sessions_live);
    text.gauge(
        "held_bytes",
        "client bytes that wait, or that no target has acknowledged yet",
        figures.held_bytes,
    );
    text.family(
        "lag_seconds",
        "gauge",
        "longest time of a packet from its capture to its transmission, within the last second",
    );
    text.sample("lag_seconds", &[], f64::from(figures.lag_us) / 1e6);
    text.counter(
        "packets_lost_in_capture",
        "packets that the kernel had no room for; they are not among those captured",
        figures.lost_in_capture(),
    );
    text.by_service(&figures.services);
    text.running(seconds);
    let (up, all) = figures.assistants();
    text.gauge("assistants", "assistants that were named", all as u64);
    text.gauge("assistants_connected", "of these, those that every worker is connected to", up as u64);
    text.family("cpu_seconds_total", "counter", "processor time of the process");
    text.sample("cpu_seconds_total", &[], cpu_seconds);
    let report = figures.report(role, kernel, seconds, cpu_seconds);
    text.summary("ring_wait_seconds", &report.ring_wait_us);
    text.summary("capture_to_transmit_seconds", &report.capture_to_transmit_us);
    text.summary("target_response_seconds", &report.target_response_us);
    if let Some(kernel) = kernel {
        let (help, labels) = ("packets by program and verdict", ["program", "verdict"]);
        text.by_label("kernel_packets_total", help, labels, kernel.by_program());
    }
    text.each("port", "of the AF_XDP ports", &report.port.counters);
    let Statistics { rx, tx } = &report.port.sockets;
    let sockets = [("capture_socket", named(rx)), ("transmit_socket", named(tx))];
    text.by_label("socket_total", "of the AF_XDP sockets", ["socket", "what"], sockets);
    text.out
}

/// The figures of an assistant.
pub fn of_assistant(report: &Report) -> String {
    let mut text = Text::new("assistant", "assistant_");
    text.counter("frames_received", "frames that came out of the AF_XDP rings", report.received);
    text.counter("frames_dropped_by_kernel", "frames for which a ring had no room", report.dropped_by_kernel);
    text.running(report.seconds);
    text.gauge("records_waiting", "records that wait for their registration", report.waiting);
    let rejected = report.rejected.iter().map(|(&reason, &count)| (reason, count)).collect();
    let verdicts = report.verdicts.iter().map(|(verdict, count)| (verdict.name(), count)).collect();
    text.by_label(
        "frames_total",
        "frames by verdict, or by why they could not be used",
        ["by", "reason"],
        [("rejected", rejected), ("verdicts", verdicts)],
    );
    text.each("routing", "of the routing of records", &report.routing);
    text.each("channel", "of the connections of online roles", &report.channel);
    for (name, value) in named(&report.now) {
        text.gauge(&name, "now", value);
    }
    text.out
}

/// The numbers of a struct, each with its name in reports.
fn named(counters: &impl Serialize) -> Vec<(String, u64)> {
    let Ok(Value::Object(counters)) = serde_json::to_value(counters) else { return Vec::new() };
    counters.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect()
}

/// What is written so far.
struct Text {
    /// What names begin with behind `replayer_`.
    prefix: &'static str,
    out: String,
}

impl Text {
    /// Begins with whose page it is.
    fn new(role: &str, prefix: &'static str) -> Text {
        let mut text = Text { prefix: "", out: String::new() };
        text.family(BUILD_INFO, "gauge", "1, of this role and version");
        text.sample(BUILD_INFO, &[("role", role), ("version", env!("CARGO_PKG_VERSION"))], 1.0);
        Text { prefix, ..text }
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', " ");
        let name = format!("replayer_{}{name}", self.prefix);
        // Writing to a string does not fail.
        let _ = write!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.out, "replayer_{}{name}{labels} {value}", self.prefix);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let name = format!("{name}_total");
        self.family(&name, "counter", help);
        self.sample(&name, &[], value as f64);
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value as f64);
    }

    fn running(&mut self, seconds: f64) {
        self.family("running_seconds", "gauge", "since the role was started");
        self.sample("running_seconds", &[], seconds);
    }

    /// Quantiles over the whole run, given in microseconds.
    fn summary(&mut self, name: &str, of: &Quantiles) {
        self.family(name, "summary", "over the whole run");
        for (quantile, us) in
            [("0.5", of.p50), ("0.9", of.p90), ("0.99", of.p99), ("0.999", of.p999), ("1", of.max)]
        {
            self.sample(name, &[("quantile", quantile)], f64::from(us) / 1e6);
        }
        self.sample(&format!("{name}_count"), &[], of.count as f64);
    }

    /// What is counted by service, each count a family with the services as labels.
    fn by_service(&mut self, services: &[ServiceFigures]) {
        if services.is_empty() {
            return;
        }
        for (at, (name, help, _)) in ServiceCounters::default().named().into_iter().enumerate() {
            let name = format!("service_{name}_total");
            self.family(&name, "counter", help);
            for service in services {
                let labels = service.labels();
                let labels = labels.each_ref().map(|(label, value)| (*label, value.as_str()));
                self.sample(&name, &labels, service.counters.named()[at].2 as f64);
            }
        }
    }

    /// Each number of a struct, as a counter.
    fn each(&mut self, prefix: &str, help: &str, counters: &impl Serialize) {
        for (name, value) in named(counters) {
            self.counter(&format!("{prefix}_{name}"), help, value);
        }
    }

    /// Counts with two labels: the values of the first, each with those of the second.
    fn by_label<N: AsRef<str>>(
        &mut self,
        name: &str,
        help: &str,
        [outer, inner]: [&str; 2],
        counts: impl IntoIterator<Item = (&'static str, Vec<(N, u64)>)>,
    ) {
        self.family(name, "counter", help);
        for (of_outer, counts) in counts {
            for (of_inner, count) in counts {
                self.sample(name, &[(outer, of_outer), (inner, of_inner.as_ref())], count as f64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::Counts;
    use replayer_common::counters::{ResponsesVerdict, RingVerdict};
    use std::collections::HashSet;

    /// Each sample follows the head of its family, and no family comes twice.
    fn check(text: &str) -> HashSet<&str> {
        let (mut families, mut family) = (HashSet::new(), "");
        for line in text.lines() {
            if let Some(head) = line.strip_prefix("# ") {
                let mut words = head.split(' ');
                let (kind, name) = (words.next().unwrap(), words.next().unwrap());
                if kind == "HELP" {
                    assert!(families.insert(name), "{name} twice");
                    family = name;
                }
                assert!(name == family && words.next().is_some(), "{line}");
                continue;
            }
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            assert!(name == family || name.strip_suffix("_count") == Some(family), "{line} in {family}");
            assert!(
                name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit())
            );
            value.parse::<f64>().unwrap();
        }
        families
    }

    #[test]
    fn b066_the_figures_of_a_replay() {
        let services =
            ["80-192.0.2.7:8080", "udp:192.0.2.1:53-[2001:db8::7]:53"].map(|text| text.parse().unwrap());
        let mut figures = Figures::of(&services);
        figures.counters[Counter::TurnsSent] = 7;
        figures.services[1].counters.datagrams_sent = 9;
        let mut ring = Counts::default();
        ring[RingVerdict::Copied] = 12;
        let text = of_replay("offline", &figures, Some(&Verdicts::Ring { ring: Ok(ring) }), 3.0, 0.5);
        let families = check(&text);
        for counter in Counter::ALL {
            assert!(families.contains(format!("replayer_{}_total", counter.name()).as_str()), "{counter:?}");
        }
        for line in [
            concat!("replayer_build_info{role=\"offline\",version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "replayer_turns_sent_total 7",
            "replayer_service_sessions_opened_total{protocol=\"tcp\",service=\"80\",target=\"192.0.2.7:8080\"} 0",
            "replayer_service_datagrams_sent_total{protocol=\"udp\",service=\"192.0.2.1:53\",target=\"[2001:db8::7]:53\"} 9",
            "replayer_cpu_seconds_total 0.5",
            "replayer_kernel_packets_total{program=\"ring\",verdict=\"copied\"} 12",
            "replayer_target_response_seconds{quantile=\"0.99\"} 0",
            "replayer_target_response_seconds_count 0",
            "replayer_port_transmitted_total 0",
            "replayer_socket_total{socket=\"transmit_socket\",what=\"tx_ring_empty\"} 0",
        ] {
            assert!(text.lines().any(|written| written == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn b066_the_figures_of_an_assistant() {
        let mut report = Report { received: 5, ..Default::default() };
        report.verdicts[ResponsesVerdict::Cut] = 5;
        let text = of_assistant(&report);
        check(&text);
        for line in [
            "replayer_assistant_frames_received_total 5",
            "replayer_assistant_frames_total{by=\"verdicts\",reason=\"cut\"} 5",
            "replayer_assistant_channel_welcomed_total 0",
            "replayer_assistant_workers 0",
        ] {
            assert!(text.lines().any(|written| written == line), "{line} is not in\n{text}");
        }
    }

    fn served() -> (SocketAddr, Metrics) {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let port = TcpListener::bind(address).unwrap().local_addr().unwrap();
        (port, Metrics::serve(Some(port)).unwrap().unwrap())
    }

    fn ask(port: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    const GET: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

    #[test]
    fn readers_that_say_nothing_or_something_else_keep_nobody_waiting() {
        let (port, metrics) = served();
        metrics.publish("replayer_x 1\n".into());
        let silent: Vec<TcpStream> =
            (0..3 * MOST_READERS).map(|_| TcpStream::connect(port).unwrap()).collect();
        // All of them are answered before the first silent one is out of time.
        let started = Instant::now();
        assert!(ask(port, "POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        for _ in 0..10 {
            let answer = ask(port, GET);
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            assert!(answer.ends_with("\r\n\r\nreplayer_x 1\n"), "{answer}");
        }
        assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
        // And those who only listen are not kept.
        for mut stream in silent {
            stream.set_read_timeout(Some(10 * PATIENCE)).unwrap();
            let end = stream.read(&mut [0]);
            assert!(
                matches!(end, Ok(0)) || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
            );
        }
        let error = Metrics::serve(Some(port)).unwrap_err().to_string();
        assert!(error.contains("--metrics 127.0.0.1:") && error.contains("choose"), "{error}");
    }

    #[test]
    fn a_reader_that_takes_little_at_a_time_keeps_nobody_waiting_and_gets_no_more_than_the_time_allows() {
        let (port, metrics) = served();
        // More than the buffers of both sockets hold.
        let text = "replayer_x 1\n".repeat(4 << 20);
        let all = text.len();
        metrics.publish(text);
        let mut reader = TcpStream::connect(port).unwrap();
        reader.write_all(GET.as_bytes()).unwrap();
        let (mut piece, mut taken) = ([0; 65_536], reader.read(&mut [0]).unwrap());
        metrics.publish("replayer_x 2\n".into());
        let started = Instant::now();
        assert!(ask(port, GET).ends_with("\nreplayer_x 2\n"));
        assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
        while let Ok(count @ 1..) = reader.read(&mut piece) {
            taken += count;
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(taken < all);
    }
}
