//! Whether there are identities and sessions enough for what `-n` and `-c` ask for, said before the start.
//!
//! What the traffic will need is estimated from what the host sees now: the connections that are open, and how many were accepted
//! in a moment.

use crate::cli::ReplayArgs;
use crate::server_connections::Connection;
use replayer_common::addr::{Ip, to_std};
use replayer_engine::{PORTS_PER_ADDRESS, QUARANTINE_SECONDS};
use std::collections::HashMap;
use std::fs;

/// What `-n` and `-c` say.
#[derive(Clone, Copy, Debug)]
pub struct Supply {
    /// Copies of a connection.
    copies: f64,
    /// Identities in the pool; `None`: ports of the client's own address.
    pool: Option<f64>,
    /// Sessions at once.
    sessions: f64,
}

/// What the traffic needs.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    /// Connections that are open.
    open: usize,
    /// Of the client that has most, its address and their number.
    busiest: Option<(Ip, usize)>,
    /// New connections a second.
    rate: f64,
}

impl Supply {
    /// With so many identities for a worker at most.
    pub fn of(args: &ReplayArgs, workers: u32, identities_of_worker: usize) -> Supply {
        let addresses: u64 = args.pool.iter().map(|range| u64::from(range.0.count)).sum();
        let most = identities_of_worker as u64 * u64::from(workers);
        Supply {
            copies: args.copies.0 as f64 / 1e6,
            pool: (addresses > 0).then(|| (addresses * u64::from(PORTS_PER_ADDRESS)).min(most) as f64),
            sessions: args.max_sessions as f64,
        }
    }

    /// Whether there is anything that could be too small.
    pub fn matters(&self) -> bool {
        self.pool.is_some() || self.copies > 1.0
    }

    /// What is too small, each with its numbers and the remedy.
    pub fn shortfalls(&self, demand: &Demand) -> Vec<String> {
        let Supply { copies, .. } = *self;
        let mut all = Vec::new();
        if let Some(pool) = self.pool {
            let needed = demand.open as f64 * copies + demand.rate * copies * QUARANTINE_SECONDS;
            if needed > pool {
                all.push(format!(
                    "the pool of -c has {pool:.0} identities (addresses times {PORTS_PER_ADDRESS} ports); {} open connections and {:.0} new ones a second \
                     need {needed:.0} for {copies} copies of each, since an identity rests for {QUARANTINE_SECONDS} s after use. \
                     What finds none is counted (sessions_refused_pool); give -c more addresses",
                    demand.open, demand.rate
                ));
            }
        } else if let Some((address, connections)) = demand.busiest
            && connections as f64 * copies > f64::from(PORTS_PER_ADDRESS)
        {
            all.push(format!(
                "the client {} has {connections} connections open; {copies} copies of each need {:.0} ports of its address, which has {PORTS_PER_ADDRESS}. \
                 What finds none is counted (sessions_refused_pool); give -c a pool of addresses",
                to_std(&address),
                connections as f64 * copies
            ));
        }
        let sessions = demand.open as f64 * copies;
        if sessions > self.sessions {
            all.push(format!(
                "{} open connections make {sessions:.0} sessions with {copies} copies of each, and --max-sessions is {:.0}. \
                 Those beyond it are counted (sessions_refused_limit); raise --max-sessions",
                demand.open, self.sessions
            ));
        }
        all
    }
}

impl Demand {
    /// From the connections that are open, and new ones a second.
    pub fn of(open: &[Connection], rate: f64) -> Demand {
        let mut by_client: HashMap<Ip, usize> = HashMap::new();
        for connection in open {
            *by_client.entry(connection.client.ip).or_default() += 1;
        }
        let busiest = by_client.into_iter().max_by_key(|(_, count)| *count);
        Demand { open: open.len(), busiest, rate }
    }
}

/// TCP connections that this host has accepted since it started (`PassiveOpens` of proc_pid_net(5), `snmp`); `None` when the kernel
/// does not tell.
pub fn accepted() -> Option<u64> {
    passive_opens(&fs::read_to_string("/proc/thread-self/net/snmp").ok()?)
}

/// Two lines begin with `Tcp:`, one with names and one with values.
fn passive_opens(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let place = lines.next()?.split_ascii_whitespace().position(|name| name == "PassiveOpens")?;
    lines.next()?.split_ascii_whitespace().nth(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::addr::from_v4;

    fn demand(open: usize, rate: f64) -> Demand {
        Demand { open, busiest: Some((from_v4([10, 0, 0, 1]), open)), rate }
    }

    #[test]
    fn b041_a_pool_that_is_too_small_is_named_with_its_numbers() {
        let pool = Supply { copies: 10.0, pool: Some(64_512.0), sessions: 1e6 };
        assert!(pool.shortfalls(&demand(1000, 2000.0)).is_empty());
        let said = pool.shortfalls(&demand(1000, 3000.0)).remove(0);
        assert!(said.contains("64512") && said.contains("need 70000"), "{said}");
        let own = Supply { copies: 100.0, pool: None, sessions: 1e6 };
        assert!(own.shortfalls(&demand(600, 1e6)).is_empty());
        let said = own.shortfalls(&demand(1000, 0.0)).remove(0);
        assert!(said.contains("10.0.0.1") && said.contains("need 100000"), "{said}");
        let few = Supply { copies: 10.0, pool: None, sessions: 500.0 };
        assert!(few.shortfalls(&demand(51, 0.0))[0].contains("510 sessions"));
    }

    #[test]
    fn accepted_connections_are_read() {
        let text = "Ip: Forwarding\nIp: 1\nTcp: RtoAlgorithm ActiveOpens PassiveOpens\nTcp: 1 20 300\n";
        assert_eq!(passive_opens(text), Some(300));
        assert!(accepted().is_some());
    }
}
