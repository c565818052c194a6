//! What a replay adds to the time at which a request reaches a server: from its way to the online host until its copy has left that host.
//!
//! Measured on the wire, not by the program under test: tcpdump at the switch's end of the online host's cable sees both. Beside it, in the same
//! run and under the same load, a thread that does nothing but sleep: how late it wakes is the machine's part, which no program that sleeps
//! between packets can go below.

use crate::live::{EASY_RATE, HTTP, STEADY_RATE, load};
use crate::report::{Figure, Wanted};
use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::prctl::set_timerslack;
use replayer::pcap::reader::Reader;
use replayer_common::packet::parse_tcp_frame;
use replayer_tests::capture::Capture;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::pairs::NginxPair;
use replayer_tests::replay::Replay;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// tcpdump gets packets from the kernel in blocks, the last of them at most a second late.
const TCPDUMP_BUFFER: Duration = Duration::from_millis(1500);
/// What is told of a distribution.
const SHARES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];
/// As long as a worker sleeps where packets come often.
const SLEEP: Duration = Duration::from_micros(75);

/// A load and the arguments of the online role.
struct Case {
    rate: u32,
    arrivals: &'static str,
    arguments: &'static [&'static str],
    /// What tells it from others of the same rate.
    how: &'static str,
}

/// The one that a value is wanted of.
const EASY: Case = Case { rate: EASY_RATE, arrivals: "poisson", arguments: &[], how: "" };
const OTHERS: [Case; 3] = [
    Case { arrivals: "ticks", how: ", in bursts", ..EASY },
    Case { arguments: &["--busy-poll", "1000"], how: ", busy polling", ..EASY },
    Case { rate: STEADY_RATE, arrivals: "ticks", ..EASY },
];

/// Measures all of it.
pub(crate) fn measure(seconds: u32, rounds: usize) -> Result<Vec<Figure>> {
    let lab = Lab::up(Plan::default())?;
    let _nginx = NginxPair::start(&lab, HTTP)?;
    let (mut delays, mut late) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        delays.add(added(&lab, &EASY, seconds)?);
        late.add(lateness(&lab, &EASY, seconds)?);
    }
    let late =
        late.figures(&format!("a thread that sleeps {} us at a time, no replay: late", SLEEP.as_micros()));
    let mut figures: Vec<Figure> = delays
        .figures(&EASY.name())
        .into_iter()
        .zip(&late)
        .map(|(figure, late)| figure.beside("how late a sleeper wakes", late.value))
        .collect();
    figures[1].wanted = Some(Wanted::AtMost(200.0));
    figures.extend(late);
    for case in &OTHERS {
        let mut delays = Samples::default();
        for _ in 0..rounds {
            delays.add(added(&lab, case, seconds)?);
        }
        figures.extend(delays.figures(&case.name()));
    }
    Ok(figures)
}

impl Case {
    fn name(&self) -> String {
        format!("{} requests/s{}: added delay", self.rate, self.how)
    }
}

/// Of each of [`SHARES`] a value a round, us.
#[derive(Default)]
struct Samples([Vec<f64>; SHARES.len()]);

impl Samples {
    /// Adds those of a round, ns.
    fn add(&mut self, mut round: Vec<u64>) {
        round.sort_unstable();
        for (samples, (_, share)) in self.0.iter_mut().zip(SHARES) {
            let at = (round.len() as f64 * share) as usize;
            samples.push(round.get(at).map_or(f64::NAN, |&ns| ns as f64 / 1e3));
        }
    }

    fn figures(self, what: &str) -> Vec<Figure> {
        let named = self.0.into_iter().zip(SHARES);
        named.map(|(samples, (name, _))| Figure::median(format!("{what}, {name}"), samples, "us")).collect()
    }
}

/// The delays of all requests of a replay, ns.
fn added(lab: &Lab, case: &Case, seconds: u32) -> Result<Vec<u64>> {
    let replay = Replay::start(lab, &[HTTP], case.arguments)?;
    let filter = format!("tcp dst port {HTTP} and tcp[tcpflags] & tcp-push != 0");
    let capture = Capture::on_cable(lab, lab.online(), &filter)?;
    let requests = load(lab, case.rate, case.arrivals, seconds)?;
    std::thread::sleep(TCPDUMP_BUFFER);
    let delays = between_request_and_copy(&capture.stop()?, lab)?;
    replay.stop()?;
    ensure!(delays.len() as u64 == requests, "{} delays of {requests} requests", delays.len());
    Ok(delays)
}

/// For each request in the file its copy's delay, ns. A request is found again by its bytes, which hold an id.
fn between_request_and_copy(file: &Path, lab: &Lab) -> Result<Vec<u64>> {
    let (online, target) =
        (lab.online().v4().to_ipv6_mapped().octets(), lab.target().v4().to_ipv6_mapped().octets());
    let mut reader = Reader::open(file)?;
    let (mut arrived, mut delays) = (HashMap::new(), Vec::new());
    while reader.advance()? {
        let packet = reader.packet().context("a packet was read")?;
        let Ok(segment) = parse_tcp_frame(packet.data) else { continue };
        let payload = &packet.data[usize::from(segment.payload_offset)..];
        if segment.payload_len == 0 {
            continue;
        }
        if segment.dst == online {
            arrived.entry(payload.to_vec()).or_insert(packet.time_ns);
        } else if segment.dst == target
            && let Some(time_ns) = arrived.remove(payload)
        {
            delays.push(packet.time_ns.saturating_sub(time_ns));
        }
    }
    ensure!(arrived.is_empty(), "{} requests had no copy", arrived.len());
    Ok(delays)
}

/// How late a thread wakes that sleeps for [`SLEEP`] again and again while the online server has the load, ns.
fn lateness(lab: &Lab, case: &Case, seconds: u32) -> Result<Vec<u64>> {
    let over = Arc::new(AtomicBool::new(false));
    let sleeper: JoinHandle<Result<Vec<u64>>> = std::thread::spawn({
        let over = over.clone();
        move || {
            // As the workers: the default slack would come on top.
            set_timerslack(1_000).context("cannot set the timer slack")?;
            let mut late = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let before = Instant::now();
                std::thread::sleep(SLEEP);
                late.push(before.elapsed().saturating_sub(SLEEP).as_nanos() as u64);
            }
            Ok(late)
        }
    });
    let loaded = load(lab, case.rate, case.arrivals, seconds);
    over.store(true, Ordering::Relaxed);
    let late = sleeper.join().map_err(|_| anyhow!("the sleeping thread panicked"))?;
    loaded?;
    late
}
