//! The ledger: what two servers logged, compared id by id.
//!
//! An entry is a request line with the client's address and port. An id that came three times online has to come three times
//! at the target.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// One line of an access log; `servers.rs` sets its format.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Address of the client.
    pub address: String,
    /// Port of the client.
    pub port: u16,
    /// Position in its connection, counted from 1.
    pub position: u64,
    /// HTTP status of the answer.
    pub status: u16,
    /// Time from the first byte of the request to the last of the answer, in seconds.
    pub request_seconds: f64,
    /// When the request was logged, in seconds since the epoch.
    pub time: f64,
    /// Path and query.
    pub uri: String,
}

/// All requests that a server logged, in the order of their ends.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// One for each request.
    pub entries: Vec<Entry>,
}

/// The difference between two ledgers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Requests online.
    pub online: usize,
    /// Requests at the target.
    pub target: usize,
    /// Requests that came online more often than at the target.
    pub missing: usize,
    /// Requests that came at the target more often than online.
    pub extra: usize,
    /// Some of either, for a person to read.
    pub examples: Vec<String>,
}

/// How many examples of missing and of extra requests are kept.
const EXAMPLES: usize = 5;

impl Ledger {
    /// Reads an access log; a last line that is not written whole yet is left out.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let entries = whole
            .lines()
            .map(|line| parse(line).with_context(|| format!("{}: unexpected line: {line}", path.display())))
            .collect::<Result<_>>()?;
        Ok(Self { entries })
    }

    /// Number of requests.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing was requested.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Requests by client address and port, each connection's in order.
    pub fn connections(&self) -> BTreeMap<(String, u16), Vec<&Entry>> {
        let mut connections: BTreeMap<_, Vec<&Entry>> = BTreeMap::new();
        for entry in &self.entries {
            connections.entry((entry.address.clone(), entry.port)).or_default().push(entry);
        }
        connections
    }

    /// Makes sure that each of so many requests is there `copies` times, and that each connection has `per_connection` of them: nobody
    /// else used its address and port.
    pub fn ensure_copied(&self, requests: usize, copies: usize, per_connection: usize) -> Result<()> {
        let mut times: BTreeMap<&str, usize> = BTreeMap::new();
        for entry in &self.entries {
            *times.entry(&entry.uri).or_default() += 1;
        }
        ensure!(times.len() == requests, "{} requests of {requests}", times.len());
        ensure!(times.values().all(|&count| count == copies), "not each {copies} times: {times:?}");
        let connections = self.connections();
        ensure!(connections.values().all(|of| of.len() == per_connection), "shared: {connections:?}");
        Ok(())
    }

    /// Those entries for which `keep` holds.
    pub fn filtered(&self, keep: impl Fn(&Entry) -> bool) -> Self {
        Self { entries: self.entries.iter().filter(|entry| keep(entry)).cloned().collect() }
    }
}

/// Compares ledgers by client address, port and URI: for runs in which sessions keep their clients' identities.
pub fn compare(online: &Ledger, target: &Ledger) -> Difference {
    compare_by(online, target, |entry| format!("{}:{} {}", entry.address, entry.port, entry.uri))
}

/// Compares ledgers by client address and URI: for runs with so many short connections that a client uses a port again while the target is
/// still at the connection before; the session then takes another port.
pub fn compare_addresses(online: &Ledger, target: &Ledger) -> Difference {
    compare_by(online, target, |entry| format!("{} {}", entry.address, entry.uri))
}

/// Compares ledgers by URI alone: for runs in which the target sees other addresses.
pub fn compare_uris(online: &Ledger, target: &Ledger) -> Difference {
    compare_by(online, target, |entry| entry.uri.clone())
}

fn compare_by(online: &Ledger, target: &Ledger, key: impl Fn(&Entry) -> String) -> Difference {
    let mut balance: BTreeMap<String, i64> = BTreeMap::new();
    for entry in &online.entries {
        *balance.entry(key(entry)).or_default() += 1;
    }
    for entry in &target.entries {
        *balance.entry(key(entry)).or_default() -= 1;
    }
    let mut difference = Difference { online: online.len(), target: target.len(), ..Difference::default() };
    let (mut shown_missing, mut shown_extra) = (0, 0);
    for (request, count) in balance {
        let (total, shown, word) = match count {
            0 => continue,
            1.. => (&mut difference.missing, &mut shown_missing, "missing"),
            _ => (&mut difference.extra, &mut shown_extra, "extra"),
        };
        *total += count.unsigned_abs() as usize;
        if *shown < EXAMPLES {
            *shown += 1;
            difference.examples.push(format!("{word}: {request}"));
        }
    }
    difference
}

fn parse(line: &str) -> Option<Entry> {
    let mut fields = line.split(' ');
    let mut next = || fields.next();
    let address = next()?.to_owned();
    let port = next()?.parse().ok()?;
    let position = next()?.parse().ok()?;
    let status = next()?.parse().ok()?;
    let _request_length = next()?;
    let request_seconds = next()?.parse().ok()?;
    let time = next()?.parse().ok()?;
    let _method = next()?;
    Some(Entry { address, port, position, status, request_seconds, time, uri: next()?.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(lines: &[&str]) -> Ledger {
        let entries = lines.iter().map(|line| {
            parse(&format!("{line} 200 80 0.001 1700000000.5 GET /r?id={}", line.len())).unwrap()
        });
        Ledger { entries: entries.collect() }
    }

    #[test]
    fn a_line_is_read() {
        let entry = parse("172.28.1.1 40000 2 200 81 0.003 1700000000.250 GET /r?id=7").unwrap();
        assert_eq!(
            (entry.port, entry.position, entry.status, entry.uri.as_str()),
            (40000, 2, 200, "/r?id=7")
        );
        assert!(parse("172.28.1.1 40000 2 200").is_none());
    }

    #[test]
    fn what_is_missing_and_what_is_too_much_is_counted() {
        let online = ledger(&["10.0.0.1 1 1", "10.0.0.1 1 2", "10.0.0.2 33 1"]);
        assert_eq!(compare(&online, &online).missing, 0);
        let target = ledger(&["10.0.0.1 1 1", "10.0.0.3 444 1"]);
        let difference = compare(&online, &target);
        assert_eq!(
            (difference.online, difference.target, difference.missing, difference.extra),
            (3, 2, 2, 1)
        );
        assert_eq!(difference.examples.len(), 3);
    }
}
