//! What a replay adds to the time at which a request reaches a server: from its way to the online host until its copy has left that host.
//!
//! Measured on the wire, not by the program under test: tcpdump at the switch's end of the online host's cable sees both. Beside it, in the same
//! run and under the same load, a thread that only sleeps and looks at the clock: how long a request would have waited for its next look is the
//! machine's part, which no program that sleeps between packets can go below.

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

/// What is told of a distribution.
const SHARES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];
/// As long as a worker sleeps where packets come often.
const SLEEP: Duration = Duration::from_micros(50);

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
    let (mut delays, mut looks) = (Samples::default(), Samples::default());
    // Single rounds differ as much as the machine stands still in them.
    for _ in 0..3 * rounds {
        delays.add(shares_of(added(&lab, &EASY, seconds)?));
        looks.add(shares_of_waiting(looks_apart(&lab, &EASY, seconds)?));
    }
    let looks = looks.figures(&format!(
        "no replay, a thread that looks every {} us: until its next look",
        SLEEP.as_micros()
    ));
    let mut figures: Vec<Figure> = delays
        .figures(&EASY.name())
        .into_iter()
        .zip(&looks)
        .map(|(figure, looks)| figure.beside("until a thread looks that only sleeps", looks.value))
        .collect();
    figures[1].wanted = Some(Wanted::AtMost(200.0));
    figures.extend(looks);
    for case in &OTHERS {
        let mut delays = Samples::default();
        for _ in 0..rounds {
            delays.add(shares_of(added(&lab, case, seconds)?));
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
    fn add(&mut self, round: [f64; SHARES.len()]) {
        for (samples, value) in self.0.iter_mut().zip(round) {
            samples.push(value);
        }
    }

    fn figures(self, what: &str) -> Vec<Figure> {
        let named = self.0.into_iter().zip(SHARES);
        named.map(|(samples, (name, _))| Figure::median(format!("{what}, {name}"), samples, "us")).collect()
    }
}

/// [`SHARES`] of delays in ns, us.
fn shares_of(mut delays: Vec<u64>) -> [f64; SHARES.len()] {
    delays.sort_unstable();
    SHARES.map(|(_, share)| {
        let at = (delays.len() as f64 * share) as usize;
        delays.get(at).map_or(f64::NAN, |&ns| ns as f64 / 1e3)
    })
}

/// [`SHARES`] of how long it takes from any moment to the next look, us, from the times between looks, ns. Long ones have more moments.
fn shares_of_waiting(mut apart: Vec<u64>) -> [f64; SHARES.len()] {
    apart.sort_unstable();
    let all = apart.iter().sum::<u64>() as f64;
    SHARES.map(|(_, share)| {
        // Of each gap as much has passed as is shorter than the result.
        let mut shorter = 0.0;
        for (at, &gap) in apart.iter().enumerate() {
            let rest = (apart.len() - at) as f64;
            if shorter + rest * gap as f64 >= share * all {
                return (share * all - shorter) / rest / 1e3;
            }
            shorter += gap as f64;
        }
        f64::NAN
    })
}

/// The delays of all requests of a replay, ns.
fn added(lab: &Lab, case: &Case, seconds: u32) -> Result<Vec<u64>> {
    let replay = Replay::start(lab, &[HTTP], case.arguments)?;
    let filter = format!("tcp dst port {HTTP} and tcp[tcpflags] & tcp-push != 0");
    let capture = Capture::on_cable_at_leisure(lab, lab.online(), &filter)?;
    let requests = load(lab, case.rate, case.arrivals, seconds)?;
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

/// How far apart the looks at the clock are of a thread that sleeps for [`SLEEP`] again and again while the online server has the load, ns.
fn looks_apart(lab: &Lab, case: &Case, seconds: u32) -> Result<Vec<u64>> {
    let over = Arc::new(AtomicBool::new(false));
    let sleeper: JoinHandle<Result<Vec<u64>>> = std::thread::spawn({
        let over = over.clone();
        move || {
            // As the workers: the default slack would come on top.
            set_timerslack(1_000).context("cannot set the timer slack")?;
            let mut apart = Vec::new();
            let mut last = Instant::now();
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(SLEEP);
                let now = Instant::now();
                apart.push((now - last).as_nanos() as u64);
                last = now;
            }
            Ok(apart)
        }
    });
    let loaded = load(lab, case.rate, case.arrivals, seconds);
    over.store(true, Ordering::Relaxed);
    let apart = sleeper.join().map_err(|_| anyhow!("the sleeping thread panicked"))?;
    loaded?;
    apart
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_lies_in_a_long_gap_more_often() {
        // 9 times 1 us and once 91 us: of 100 moments 9 are in the short ones.
        let mut apart = vec![1_000; 9];
        apart.push(91_000);
        let [half, most, _] = shares_of_waiting(apart);
        assert!(
            (half - 41.0).abs() < 1e-9,
            "{half}: 9 us of short ones and 1 us of each moment in the long one"
        );
        assert!((most - 90.0).abs() < 1e-9, "{most}");
        assert!(shares_of_waiting(Vec::new())[0].is_nan());
    }
}
