//! `replayer top`: what running roles are doing, from the addresses of their `--metrics`.
//!
//! It is a reader like Prometheus: nothing is asked of a role but its page. Rates come from the role's own clock, which is on that page; a role
//! renders it each second, so two looks may find the same one, and the rates of before stay.

use crate::signals::{Asked, Signals};
use anyhow::{Context, Result, bail};
use clap::Args;
use replayer_engine::counters::Counter;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a role may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a role is asked for one second's figures.
const MOST_LOOKS: u32 = 10;
/// A page is some 30 KB.
const LONGEST_PAGE: u64 = 1 << 20;

/// Arguments of `replayer top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Where roles serve their figures: what was given to their --metrics
    #[arg(required = true, value_name = "IP:PORT")]
    pub addresses: Vec<String>,

    /// Show the figures of one second, and end
    #[arg(long)]
    pub once: bool,
}

/// Shows roles until SIGTERM or SIGINT, or until nobody reads any more: a screen where there is a terminal, a line for each role and second
/// elsewhere.
///
/// # Errors
/// With `--once`, when a role does not answer. Without it, that is shown.
pub fn run(args: &TopArgs) -> Result<()> {
    let signals = Signals::install()?;
    signals.clean_from_here();
    let mut roles: Vec<Watched> = args.addresses.iter().map(|address| Watched::new(address)).collect();
    let screen = std::io::stdout().is_terminal() && !args.once;
    let started = Instant::now();
    for look in 0.. {
        let mut text = String::new();
        for role in &mut roles {
            let found = role.look();
            if args.once {
                found.with_context(|| role.address.clone())?;
            }
            text += &if screen { role.screen() } else { role.line() };
        }
        // The first look finds no rates.
        let done = args.once && roles.iter().all(|role| role.rates.is_some());
        if screen {
            // Over what was there, then nothing more.
            text = format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"));
        }
        let say = done || !(args.once || look == 0 && !screen);
        if say && write!(std::io::stdout(), "{text}").and_then(|()| std::io::stdout().flush()).is_err() {
            return Ok(());
        }
        if done {
            return Ok(());
        }
        if args.once && look == MOST_LOOKS {
            bail!(
                "a role has rendered no new figures for {MOST_LOOKS} s; it may be stopped or still starting"
            );
        }
        let next = (started + INTERVAL * (look + 1)).max(Instant::now());
        if signals.wait_until(next)? == Some(Asked::Stop) {
            return Ok(());
        }
    }
    Ok(())
}

/// Figures by name, with their labels as they are written.
type Page = BTreeMap<String, f64>;

/// One role.
struct Watched {
    address: String,
    page: Page,
    /// By second, of every figure.
    rates: Option<Page>,
    trouble: Option<String>,
}

impl Watched {
    fn new(address: &str) -> Watched {
        Watched { address: address.to_owned(), page: Page::new(), rates: None, trouble: None }
    }

    /// Reads its page anew.
    fn look(&mut self) -> Result<()> {
        let found = fetch(&self.address);
        self.trouble = found.as_ref().err().map(|error| format!("{error:#}"));
        let page = parse(&found?);
        let seconds = |page: &Page| running(page).map(|(_, seconds)| seconds);
        let (Some(now), before) = (seconds(&page), seconds(&self.page)) else { return Ok(()) };
        match before {
            // The same page.
            Some(before) if before == now => return Ok(()),
            Some(before) if before < now => {
                let rate = |(name, value): (&String, &f64)| {
                    Some((name.clone(), (value - self.page.get(name)?) / (now - before)))
                };
                self.rates = Some(page.iter().filter_map(rate).collect());
            }
            // The first one, or that of another run.
            _ => self.rates = None,
        }
        self.page = page;
        Ok(())
    }

    fn rate(&self, name: &str) -> f64 {
        self.rates.as_ref().and_then(|rates| rates.get(name)).copied().unwrap_or_default()
    }

    fn value(&self, name: &str) -> f64 {
        self.page.get(name).copied().unwrap_or_default()
    }

    /// What is shown of it: a value, and what it is.
    fn figures(&self) -> Vec<(String, &'static str)> {
        let whole = |value: f64| format!("{value:.0}");
        if self.is_assistant() {
            let of = |name: &str| self.value(&format!("replayer_assistant_{name}"));
            let rate = |name| self.rate(&format!("replayer_assistant_{name}_total"));
            return vec![
                (whole(rate("frames_received")), "responses/s"),
                (whole(rate("channel_records_sent")), "records/s returned"),
                (whole(of("workers")), "workers"),
                (whole(of("targets")), "targets"),
                (whole(of("registrations")), "identities registered"),
                (whole(of("records_waiting")), "records waiting"),
            ];
        }
        let of = |name: &str| self.value(&format!("replayer_{name}"));
        let rate = |name| self.rate(&format!("replayer_{name}_total"));
        let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
        let quantile = |q| ms(of(&format!("target_response_seconds{{quantile=\"{q}\"}}")));
        vec![
            (whole(rate("turns_sent") + rate("packets_datagrams")), "requests/s"),
            (whole(rate("packets_captured")), "packets/s captured"),
            (whole(rate("segments_sent") + rate("datagrams_sent")), "packets/s sent"),
            (whole(of("sessions_live")), "sessions"),
            (whole(rate("sessions_opened")), "sessions/s opened"),
            (ms(of("lag_seconds")), "ms lag"),
            (whole(of("held_bytes") / 1024.0), "KiB held"),
            (format!("{}, {}", quantile("0.5"), quantile("0.99")), "ms to the target's answer, p50 and p99"),
            (whole(rate("cpu_seconds") * 100.0), "% of a CPU"),
            (format!("{} of {}", of("assistants_connected"), of("assistants")), "assistants connected"),
        ]
    }

    /// What was not replayed, or not returned: how many, how many a second, name and meaning.
    fn losses(&self) -> Vec<(f64, f64, String, &'static str)> {
        let names: Vec<(String, &str)> = if self.is_assistant() {
            [
                ("frames_dropped_by_kernel", "responses for which a ring had no room"),
                ("routing_unregistered", "records whose registration did not come in time"),
                ("routing_early_overflow", "records that were too many to wait for one registration"),
                ("routing_unknown_target", "responses of no target any more"),
                ("channel_records_dropped", "records for a worker that was too slow, or gone"),
            ]
            .map(|(name, what)| (format!("assistant_{name}"), what))
            .into()
        } else {
            let lost = ("packets_lost_in_capture".to_owned(), "the kernel had no room for them");
            let of_engine = Counter::ALL.iter().filter(|counter| counter.is_loss());
            std::iter::once(lost).chain(of_engine.map(|c| (c.name().to_owned(), c.what()))).collect()
        };
        let figures = names.into_iter().map(|(name, what)| {
            let full = format!("replayer_{name}_total");
            let short = name.trim_start_matches("assistant_").to_owned();
            (self.value(&full), self.rate(&full), short, what)
        });
        figures.filter(|(count, ..)| *count > 0.0).collect()
    }

    fn is_assistant(&self) -> bool {
        matches!(running(&self.page), Some(("assistant", _)))
    }

    fn head(&self) -> String {
        let Some((role, seconds)) = running(&self.page) else { return self.address.clone() };
        format!("{role} at {}, {seconds:.0} s", self.address)
    }

    /// A block of lines.
    fn screen(&self) -> String {
        let mut text = format!("{}\n", self.head());
        // Writing to a string does not fail.
        if let Some(trouble) = &self.trouble {
            let _ = writeln!(text, "  {trouble}");
        }
        if !self.page.is_empty() {
            for (value, what) in self.figures() {
                let _ = writeln!(text, "{value:>14}  {what}");
            }
            for (count, rate, name, what) in self.losses() {
                let _ = writeln!(text, "{count:>14}  {name} ({rate:.0}/s): {what}");
            }
        }
        text + "\n"
    }

    fn line(&self) -> String {
        if let Some(trouble) = &self.trouble {
            return format!("{}: {trouble}\n", self.head());
        }
        let mut parts: Vec<String> =
            self.figures().into_iter().map(|(value, what)| format!("{value} {what}")).collect();
        parts.extend(self.losses().into_iter().map(|(count, _, name, _)| format!("{name} {count}")));
        format!("{}: {}\n", self.head(), parts.join(", "))
    }
}

/// Whose page it is, and since when it runs, seconds; `None`: it has no figures yet.
fn running(page: &Page) -> Option<(&str, f64)> {
    let role =
        page.keys().find_map(|sample| sample.strip_prefix("replayer_build_info{role=\"")?.split('"').next());
    let seconds = ["replayer_running_seconds", "replayer_assistant_running_seconds"];
    let seconds = seconds.iter().find_map(|name| page.get(*name))?;
    Some((role?, *seconds))
}

/// A role's page.
fn fetch(address: &str) -> Result<String> {
    let mut addresses =
        address.to_socket_addrs().context("not IP:PORT; name what was given to the role's --metrics")?;
    let target = addresses.next().context("the name has no address")?;
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE).context(
        "nobody answers; start the role with --metrics IP:PORT, and check address, port and firewalls",
    )?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("ask for the figures")?;
    let mut answer = String::new();
    stream.take(LONGEST_PAGE).read_to_string(&mut answer).context("read the figures")?;
    match answer.split_once("\r\n\r\n") {
        Some((head, page)) if head.starts_with("HTTP/1.1 200") => Ok(page.to_owned()),
        _ => bail!("what answers is no role of Replayer; name what was given to its --metrics"),
    }
}

/// Samples of the text format; whatever else there is does not count.
fn parse(text: &str) -> Page {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assistant::report::{Now, Report};
    use crate::capture::verdicts::Place;
    use crate::figures::Figures;
    use crate::metrics::{of_assistant, of_replay};
    use replayer_common::counters::RingVerdict;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    /// What is shown when a role serves these pages, one after the other.
    fn watched(pages: &[String]) -> Watched {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut role = Watched::new(&listener.local_addr().unwrap().to_string());
        for page in pages {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let asked = BufReader::new(&stream).lines().map_while(Result::ok);
                    let request: Vec<String> = asked.take_while(|line| !line.is_empty()).collect();
                    assert!(request[0].starts_with("GET /metrics "));
                    write!(stream, "HTTP/1.1 200 OK\r\n\r\n{page}").unwrap();
                });
                role.look().unwrap();
            });
        }
        role
    }

    fn page(seconds: f64, turns: u64, tls: u64) -> String {
        let mut figures = Figures::default();
        (figures.sessions_live, figures.lag_us) = (7, 1500);
        figures.counters[Counter::TurnsSent] = turns;
        figures.counters[Counter::PacketsTls] = tls;
        figures.lost_before(vec![(Place::Ring(RingVerdict::RingFull), 3)]);
        of_replay("online", &figures, None, seconds, 0.5 * seconds)
    }

    #[test]
    fn b066_rates_are_by_the_clock_of_the_role() {
        // The same page again is none: half a second is between the two.
        let role = watched(&[page(10.0, 100, 0), page(10.5, 200, 1), page(10.5, 200, 1)]);
        let line = role.line();
        assert!(line.starts_with("online at 127.0.0.1:"), "{line}");
        for part in [": 200 requests/s,", " 7 sessions,", " 1.5 ms lag,", " 50 % of a CPU,"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(line.ends_with(", packets_lost_in_capture 3, packets_tls 1\n"), "{line}");
        let screen = role.screen();
        let tls = screen.lines().find(|line| line.contains("packets_tls (2/s): not replayed: "));
        assert!(tls.is_some_and(|line| line.trim_start().starts_with("1 ")), "{screen}");
        // Started anew: no rates until the next page.
        let role = watched(&[page(10.0, 100, 0), page(11.0, 200, 1), page(1.0, 5, 0)]);
        assert!(role.rates.is_none() && role.line().contains(": 0 requests/s"), "{}", role.line());
    }

    #[test]
    fn b066_an_assistant_is_told_by_its_page() {
        let at = |seconds: f64, received: u64| {
            let now = Now { workers: 2, ..Now::default() };
            of_assistant(&Report { seconds, received, now, dropped_by_kernel: 4, ..Report::default() })
        };
        let line = watched(&[at(1.0, 10), at(3.0, 40)]).line();
        assert!(line.starts_with("assistant at 127.0.0.1:") && line.contains(": 15 responses/s, "), "{line}");
        assert!(line.contains(", 2 workers, ") && line.ends_with("frames_dropped_by_kernel 4\n"), "{line}");
    }

    #[test]
    fn what_does_not_answer_is_shown_with_its_remedy() {
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let mut role = Watched::new(&free.to_string());
        role.look().unwrap_err();
        assert!(role.line().contains("--metrics") && role.screen().contains("--metrics"), "{}", role.line());
    }
}
