//! Capture files that are made, not captured: HTTP requests of many clients, the same bytes every time.

use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use crate::http;

/// An Ethernet, an IPv4 and a TCP header without options.
const HEADERS: usize = 14 + 20 + 20;
const SYN: u8 = 2;
const FIN_ACK: u8 = 0x11;
const PSH_ACK: u8 = 0x18;
const ACK: u8 = 0x10;
/// What each client sees of the server: where its stream begins, and how long its responses are.
const SERVER_ISN: u32 = 5000;
const RESPONSE: u32 = 200;
const ISN: u32 = 1000;
/// Between two packets of a connection at least.
const STEP_NS: u64 = 5_000_000;
/// Ports of a client address in use.
const PORTS: u32 = 50_000;

/// What is in a file: the clients' side of HTTP connections, whole from SYN to FIN.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// Connections, of which all begin in the first tenth of the time.
    pub connections: u32,
    /// Requests of each.
    pub requests: u32,
    /// From the first packet to the last, about.
    pub seconds: f64,
    /// Where they go to.
    pub server: SocketAddrV4,
    /// The first client; a further one has the next address.
    pub client: Ipv4Addr,
}

impl Made {
    /// Requests in all.
    pub fn requests(&self) -> u64 {
        u64::from(self.connections) * u64::from(self.requests)
    }

    /// Writes it as pcap with nanoseconds; `rounds` times one after the other, each with clients of its own. The packets written.
    pub fn write(&self, path: &Path, rounds: u32) -> Result<u64> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        for word in [0xa1b2_3c4d_u32, 0x0004_0002, 0, 0, 65_535, 1] {
            out.write_all(&word.to_le_bytes())?;
        }
        let events = self.events();
        let mut packets = 0;
        for round in 0..rounds {
            let begin_ns = (f64::from(round) * (self.seconds + 1.0) * 1e9) as u64;
            for &(time_ns, connection, step) in &events {
                self.packet(&mut out, begin_ns + time_ns, round * self.connections + connection, step)?;
                packets += 1;
            }
        }
        out.flush()?;
        Ok(packets)
    }

    /// Time, connection and step of each packet, in order. Steps: SYN, ACK, the requests, FIN.
    fn events(&self) -> Vec<(u64, u32, u32)> {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut share = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) as f64 / (1u64 << 53) as f64
        };
        let whole_ns = self.seconds * 1e9;
        let mut events = Vec::new();
        for connection in 0..self.connections {
            let begin = share() * whole_ns / 10.0;
            events.push((begin as u64, connection, 0));
            events.push((begin as u64 + 200_000, connection, 1));
            let mut times: Vec<u64> =
                (0..self.requests).map(|_| (begin + share() * (whole_ns - begin)) as u64).collect();
            times.sort_unstable();
            let mut earliest = begin as u64 + STEP_NS;
            for (request, time) in (2..).zip(times) {
                let time = time.max(earliest);
                events.push((time, connection, request));
                earliest = time + STEP_NS;
            }
            events.push((earliest, connection, 2 + self.requests));
        }
        events.sort_unstable();
        events
    }

    fn packet(&self, out: &mut impl Write, time_ns: u64, client: u32, step: u32) -> Result<()> {
        let (flags, sent) = match step {
            0 => (SYN, 0),
            1 => (ACK, 0),
            last if last == 2 + self.requests => (FIN_ACK, self.requests),
            request => (PSH_ACK, request - 2),
        };
        // All requests are of the same length: how much was sent before is a product.
        let text = |request: u32| {
            let id = 1_000_000_000 + u64::from(client) * u64::from(self.requests) + u64::from(request);
            http::request("/made", id, self.server.into(), 0, false)
        };
        let payload = if flags == PSH_ACK { text(sent) } else { String::new() };
        let before = sent * text(0).len() as u32;
        let (seq, ack) = match step {
            0 => (ISN, 0),
            _ => (ISN + 1 + before, SERVER_ISN + 1 + sent * RESPONSE),
        };
        let mut frame = [0; HEADERS];
        // Nobody has these addresses: a switch sends such frames everywhere.
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
        let ip = &mut frame[14..34];
        ip[..10].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6]);
        ip[2..4].copy_from_slice(&((HEADERS - 14 + payload.len()) as u16).to_be_bytes());
        ip[12..16].copy_from_slice(&(u32::from(self.client) + client / PORTS).to_be_bytes());
        ip[16..20].copy_from_slice(&self.server.ip().octets());
        let tcp = &mut frame[34..];
        tcp[..2].copy_from_slice(&(10_000 + (client % PORTS) as u16).to_be_bytes());
        tcp[2..4].copy_from_slice(&self.server.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&seq.to_be_bytes());
        tcp[8..12].copy_from_slice(&ack.to_be_bytes());
        tcp[12..16].copy_from_slice(&[0x50, flags, 0xff, 0xff]);
        let len = (HEADERS + payload.len()) as u32;
        for word in [(time_ns / 1_000_000_000) as u32, (time_ns % 1_000_000_000) as u32, len, len] {
            out.write_all(&word.to_le_bytes())?;
        }
        out.write_all(&frame)?;
        out.write_all(payload.as_bytes())
    }
}
