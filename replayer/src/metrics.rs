//! The figures of a role in the text format of Prometheus (version 0.0.4), by HTTP: `--metrics IP:PORT`.
//!
//! The role renders them once a second; a thread of its own hands them out, to one reader after the other. It holds no lock for longer than a
//! copy, and a slow or hostile reader can keep nothing but the next reader waiting.

use crate::privileges::{self, Keep};
use crate::report::Figures;
use anyhow::{Context, Result};
use replayer_engine::counters::Counter;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a role renders its figures.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// How long a reader may take for its request, and how long for the answer.
const PATIENCE: Duration = Duration::from_secs(1);
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

fn answer_all(listener: &TcpListener, text: &Mutex<String>) {
    for stream in listener.incoming() {
        match stream {
            // Who does not wait for the answer needs none.
            Ok(mut stream) => drop(answer(&mut stream, text)),
            // No descriptors, most likely.
            Err(_) => std::thread::sleep(PATIENCE),
        }
    }
}

fn answer(stream: &mut TcpStream, text: &Mutex<String>) -> std::io::Result<()> {
    let request = read_request(stream)?;
    let (status, body) = if request.starts_with(b"GET /metrics ") || request.starts_with(b"GET / ") {
        ("200 OK", text.lock().unwrap_or_else(PoisonError::into_inner).clone())
    } else {
        ("404 Not Found", "GET /metrics\n".to_owned())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    write_all(stream, &[head, body].concat())
}

/// Writes it in time, or what the reader takes of it.
fn write_all(stream: &mut TcpStream, text: &str) -> std::io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        let count = stream.write(rest)?;
        rest = &rest[count..];
    }
    Ok(())
}

/// A request up to its empty line, or what came of it in time.
fn read_request(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let (mut request, mut piece) = (Vec::new(), [0; 1024]);
    while request.len() < LONGEST_REQUEST && !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => break,
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    Ok(request)
}

/// The figures of a role that replays; `kernel` are the programs' verdicts.
pub fn of_replay(figures: &Figures, kernel: Value, seconds: f64, cpu_seconds: f64) -> String {
    let mut text = Text::default();
    for &counter in Counter::ALL {
        text.counter(counter.name(), counter.what(), figures.counters[counter]);
    }
    text.gauge("sessions_live", "sessions that have not ended", figures.sessions_live);
    text.gauge(
        "held_bytes",
        "client bytes that wait, or that no target has acknowledged yet",
        figures.held_bytes,
    );
    let (up, all) = figures.assistants();
    text.gauge("assistants", "assistants that were named", all as u64);
    text.gauge("assistants_connected", "of these, those that every worker is connected to", up as u64);
    let report = figures.report(kernel, seconds, cpu_seconds);
    text.family("cpu_seconds_total", "counter", "processor time of the process");
    text.sample("cpu_seconds_total", &[], cpu_seconds);
    for (name, summary) in report.as_object().into_iter().flatten() {
        if let (Some(name), Some(_)) = (name.strip_suffix("_us"), summary["count"].as_u64()) {
            text.summary(&format!("{name}_seconds"), summary);
        }
    }
    text.by_label(
        "kernel_packets_total",
        "packets by program and verdict",
        ["program", "verdict"],
        &report["kernel"],
    );
    text.plain("port", "of the AF_XDP ports", &report["port"]);
    text.by_label("socket_total", "of the AF_XDP sockets", ["socket", "what"], &report["port"]);
    text.out
}

/// The figures of an assistant, by its report.
pub fn of_assistant(report: &Value) -> String {
    let mut text = Text { role: "assistant_", ..Text::default() };
    text.counter("frames_received", "frames that came out of the AF_XDP rings", whole(&report["received"]));
    text.counter(
        "frames_dropped_by_kernel",
        "frames for which a ring had no room",
        whole(&report["dropped_by_kernel"]),
    );
    text.gauge("records_waiting", "records that wait for their registration", whole(&report["waiting"]));
    text.by_label(
        "frames_total",
        "frames by verdict, or by why they could not be used",
        ["by", "reason"],
        report,
    );
    text.plain("routing", "of the routing of records", &report["routing"]);
    text.plain("channel", "of the connections of online roles", &report["channel"]);
    for (name, value) in report["now"].as_object().into_iter().flatten() {
        text.gauge(name, "now", whole(value));
    }
    text.out
}

fn whole(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

/// What is written so far.
#[derive(Default)]
struct Text {
    /// What names begin with behind `replayer_`.
    role: &'static str,
    out: String,
}

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', " ");
        let name = format!("replayer_{}{name}", self.role);
        // Writing to a string does not fail.
        let _ = write!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.out, "replayer_{}{name}{labels} {value}", self.role);
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

    /// Quantiles over the whole run, given in microseconds.
    fn summary(&mut self, name: &str, summary: &Value) {
        self.family(name, "summary", "over the whole run");
        for (key, quantile) in
            [("p50", "0.5"), ("p90", "0.9"), ("p99", "0.99"), ("p999", "0.999"), ("max", "1")]
        {
            let seconds = summary[key].as_f64().unwrap_or_default() / 1e6;
            self.sample(name, &[("quantile", quantile)], seconds);
        }
        self.sample(&format!("{name}_count"), &[], summary["count"].as_f64().unwrap_or_default());
    }

    /// Each number of an object, as a counter.
    fn plain(&mut self, prefix: &str, help: &str, object: &Value) {
        for (name, value) in object.as_object().into_iter().flatten() {
            if let Some(value) = value.as_u64() {
                self.counter(&format!("{prefix}_{name}"), help, value);
            }
        }
    }

    /// Each number in the objects of an object, labelled by the names of both.
    fn by_label(&mut self, name: &str, help: &str, labels: [&str; 2], objects: &Value) {
        let objects = objects.as_object().into_iter().flatten();
        let samples: Vec<(&String, &String, u64)> = objects
            .flat_map(|(outer, object)| {
                let inner = object.as_object().into_iter().flatten();
                inner.filter_map(move |(inner, value)| Some((outer, inner, value.as_u64()?)))
            })
            .filter(|(outer, ..)| !["routing", "channel", "now"].contains(&outer.as_str()))
            .collect();
        if !samples.is_empty() {
            self.family(name, "counter", help);
        }
        for (outer, inner, value) in samples {
            self.sample(name, &[(labels[0], outer), (labels[1], inner)], value as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
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
        let mut figures = Figures::default();
        figures.counters[Counter::TurnsSent] = 7;
        let kernel = json!({"capture_by": "ring", "ring": {"copied": 12, "ring_full": 0}});
        let text = of_replay(&figures, kernel, 3.0, 0.5);
        let families = check(&text);
        for counter in Counter::ALL {
            assert!(families.contains(format!("replayer_{}_total", counter.name()).as_str()), "{counter:?}");
        }
        for line in [
            "replayer_turns_sent_total 7",
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
        let report = crate::assistant::report::Report {
            received: 5,
            verdicts: [("cut", 5)].into(),
            ..Default::default()
        };
        let text = of_assistant(&serde_json::to_value(&report).unwrap());
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

    #[test]
    fn readers_that_say_nothing_or_something_else_keep_nobody_out() {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let port = TcpListener::bind(address).unwrap().local_addr().unwrap();
        let metrics = Metrics::serve(Some(port)).unwrap().unwrap();
        metrics.publish("replayer_x 1\n".into());
        let ask = |request: &str| {
            let mut stream = TcpStream::connect(port).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        let _silent = TcpStream::connect(port).unwrap();
        assert!(ask("POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        let answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nreplayer_x 1\n"), "{answer}");
        let error = Metrics::serve(Some(port)).unwrap_err().to_string();
        assert!(error.contains("--metrics 127.0.0.1:") && error.contains("choose"), "{error}");
    }

    #[test]
    fn a_reader_that_takes_little_at_a_time_gets_no_more_than_the_time_allows() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        // More than the buffers of both sockets hold.
        let text = Mutex::new("replayer_x 1\n".repeat(4 << 20));
        let all = text.lock().unwrap().len();
        let answered = std::thread::spawn(move || answer(&mut stream, &text));
        reader.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let (mut piece, mut taken) = ([0; 65_536], 0);
        while !answered.is_finished() && taken < all {
            taken += reader.read(&mut piece).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        answered.join().unwrap().unwrap_err();
        assert!(taken < all);
    }
}
