//! The same server on the online host and on the target, and the assertion that both got the same.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::lab::Lab;
use crate::ledger::{self, Ledger};
use crate::servers::{Nginx, StreamServer};
use crate::stream::{self, Record};

/// How long after its load the target may take to get everything.
pub const ARRIVAL: Duration = Duration::from_secs(5);

/// nginx on both sides.
#[derive(Debug)]
pub struct NginxPair {
    /// The online host's.
    pub online: Nginx,
    /// The target's.
    pub target: Nginx,
}

impl NginxPair {
    /// Starts both on the same port.
    pub fn start(lab: &Lab, port: u16) -> Result<Self> {
        Ok(Self {
            online: Nginx::start(lab, lab.online(), port)?,
            target: Nginx::start(lab, lab.target(), port)?,
        })
    }

    /// What both logged, once there are `expected` requests in each or [`ARRIVAL`] has passed.
    pub fn ledgers(&self, expected: usize) -> Result<(Ledger, Ledger)> {
        Ok((self.online.settled_ledger(expected, ARRIVAL)?, self.target.settled_ledger(expected, ARRIVAL)?))
    }

    /// The target got each of the online server's `expected` requests once, from the client's own address and port.
    pub fn ensure_equal(&self, expected: usize) -> Result<(Ledger, Ledger)> {
        let (online, target) = self.ledgers(expected)?;
        let difference = ledger::compare(&online, &target);
        ensure!((difference.missing, difference.extra) == (0, 0), "the ledgers differ: {difference:#?}");
        ensure!(online.len() == expected, "{} requests online, not {expected}", online.len());
        Ok((online, target))
    }
}

/// stream-server on both sides.
#[derive(Debug)]
pub struct StreamPair {
    /// The online host's.
    pub online: StreamServer,
    /// The target's.
    pub target: StreamServer,
}

impl StreamPair {
    /// Starts both on the same port.
    pub fn start(lab: &Lab, port: u16) -> Result<Self> {
        Self::start_with(lab, port, &[], &[])
    }

    /// Starts both on the same port with arguments of their own.
    pub fn start_with(lab: &Lab, port: u16, online: &[&str], target: &[&str]) -> Result<Self> {
        Ok(Self {
            online: StreamServer::start(lab, lab.online(), port, online)?,
            target: StreamServer::start(lab, lab.target(), port, target)?,
        })
    }

    /// What both received, once there are `expected` requests at the target or `limit` has passed.
    pub fn records(&mut self, expected: usize, limit: Duration) -> Result<(Record, Record)> {
        Ok((self.online.record_of(expected, limit)?, self.target.record_of(expected, limit)?))
    }

    /// The target got the online server's `expected` requests, every stream equal byte for byte.
    pub fn ensure_equal(&mut self, expected: usize) -> Result<(Record, Record)> {
        self.ensure_equal_within(expected, ARRIVAL)
    }

    /// The same, with a limit of its own.
    pub fn ensure_equal_within(&mut self, expected: usize, limit: Duration) -> Result<(Record, Record)> {
        let (online, target) = self.records(expected, limit)?;
        let result = stream::compare(&online, &target);
        ensure!(result.differences.is_empty(), "the streams differ: {result:#?}");
        ensure!(online.requests() == expected, "{} requests online, not {expected}", online.requests());
        Ok((online, target))
    }
}
