//! What is told of capture files, as JSON and as text.

use replayer_common::packet::Reject;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// What is in the files.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Packets of all kinds.
    pub packets: u64,
    /// Their bytes in the files, and on the wire.
    pub captured_bytes: u64,
    /// More than `captured_bytes` where packets were cut.
    pub wire_bytes: u64,
    /// When the first packet was captured, seconds since the epoch.
    pub first_time: f64,
    /// From the earliest to the latest packet.
    pub duration_seconds: f64,
    /// Over the whole duration.
    pub packets_per_second: f64,
    /// Over the whole duration, of the bytes on the wire.
    pub mbit_per_second: f64,
    /// Packets by link type.
    pub link_types: BTreeMap<String, u64>,
    /// Packets that the capture cut short (a snaplen that is too small), and the number of the first.
    pub truncated_packets: u64,
    /// Its number in its file.
    pub first_truncated: Option<u64>,
    /// Packets whose time is before that of the packet before.
    pub out_of_time_order: u64,
    /// Packets that are no segments or datagrams of a service, by reason.
    pub not_usable: BTreeMap<Unusable, u64>,
    /// The services of UDP, the busiest first.
    pub udp: Vec<Udp>,
    /// The services, the one with most requests first.
    pub services: Vec<Service>,
    /// What was wrong with the files.
    pub problems: Vec<String>,
}

/// What went to a server's UDP port.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Udp {
    /// Address and port of the server.
    pub server: String,
    /// Addresses and ports that sent to it.
    pub clients: u64,
    /// Datagrams of the clients: each is a request.
    pub datagrams: u64,
    /// Over the whole duration.
    pub datagrams_per_second: f64,
    /// Their payload.
    pub client_bytes: u64,
    /// Datagrams of the server, as far as they are in the file.
    pub responses: u64,
    /// Their payload.
    pub server_bytes: u64,
    /// Datagrams of the clients whose payload was cut by the capture: they cannot be replayed.
    pub truncated: u64,
}

/// What went to a server's address and port.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Service {
    /// Address and port of the server.
    pub server: String,
    /// Connections to it.
    pub connections: u64,
    /// Of these, those whose beginning is in the file.
    pub with_beginning: u64,
    /// Of these, those whose end is in the file.
    pub with_end: u64,
    /// Requests: turns of client data.
    pub requests: u64,
    /// Over the whole duration.
    pub requests_per_second: f64,
    /// The most connections at once.
    pub concurrent: u64,
    /// Client data, each byte once.
    pub client_bytes: u64,
    /// Client data that came again.
    pub repeated_bytes: u64,
    /// Response data, as far as it is in the file.
    pub server_bytes: u64,
    /// Packets of the clients.
    pub client_packets: u64,
    /// Packets of the server.
    pub server_packets: u64,
    /// Holes in client streams, and how many bytes are missing there.
    pub holes: u64,
    /// Bytes of the holes, as far as it is known.
    pub missing_bytes: u64,
    /// Requests that a replay can send.
    pub replayable_requests: u64,
    /// Requests, or connections without any, that it cannot, by reason.
    pub not_replayable: BTreeMap<NotReplayable, u64>,
}

/// Why a packet is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unusable {
    /// More or longer IPv6 extension headers than are followed.
    ExtensionHeaders,
    /// A fragment.
    Fragment,
    /// Of a link type that is not known.
    LinkType,
    /// Header fields that contradict each other.
    Malformed,
    /// Without data, of a connection of which nothing else is there.
    NoConnection,
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// IP, but neither TCP nor UDP.
    NotTcp,
    /// Of more connections than are followed at once.
    TooManyConnections,
    /// Of more UDP services than are listed.
    TooManyServices,
    /// Ends inside its headers.
    Truncated,
}

impl From<Reject> for Unusable {
    fn from(reject: Reject) -> Unusable {
        match reject {
            Reject::Truncated => Unusable::Truncated,
            Reject::NotIp => Unusable::NotIp,
            Reject::NotTcp => Unusable::NotTcp,
            Reject::Fragment => Unusable::Fragment,
            Reject::Malformed => Unusable::Malformed,
            Reject::ExtensionHeaders => Unusable::ExtensionHeaders,
        }
    }
}

impl Unusable {
    /// For a person.
    fn what(self) -> &'static str {
        match self {
            Unusable::ExtensionHeaders => "more IPv6 extension headers than are followed",
            Unusable::Fragment => "IP fragments",
            Unusable::LinkType => "of a link type that is not known",
            Unusable::Malformed => "malformed headers",
            Unusable::NoConnection => "without data, of connections of which nothing else is there",
            Unusable::NotIp => "neither IPv4 nor IPv6",
            Unusable::NotTcp => "IP, but neither TCP nor UDP",
            Unusable::TooManyConnections => "of more connections than are followed at once",
            Unusable::TooManyServices => "of more UDP services than are listed",
            Unusable::Truncated => "cut within their headers",
        }
    }
}

/// Why a request cannot be replayed, or a connection without any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NotReplayable {
    /// It may have begun before the capture.
    BeginningNotCaptured,
    /// Bytes of it were not captured.
    BehindAHole,
    /// The client sent nothing.
    ConnectionsWithoutData,
    /// Packets of it were cut by the capture.
    CutBySnaplen,
    /// It is encrypted.
    Tls,
}

impl NotReplayable {
    /// For a person.
    fn what(self) -> &'static str {
        match self {
            NotReplayable::BeginningNotCaptured => "requests that may have begun before the capture",
            NotReplayable::BehindAHole => "requests with bytes that were not captured",
            NotReplayable::ConnectionsWithoutData => "connections on which the client sent nothing",
            NotReplayable::CutBySnaplen => {
                "requests whose packets were cut by the capture (capture with a larger snaplen, such as tcpdump -s 0)"
            }
            NotReplayable::Tls => "requests are encrypted (TLS)",
        }
    }
}

impl Report {
    /// For a person.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let links: Vec<String> =
            self.link_types.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let _ = writeln!(
            text,
            "{} packets ({}) in {:.3} s: {:.0} packets/s, {:.2} Mbit/s",
            self.packets,
            if links.is_empty() { "none".to_owned() } else { links.join(", ") },
            self.duration_seconds,
            self.packets_per_second,
            self.mbit_per_second
        );
        if let Some(first) = self.first_truncated {
            let _ = writeln!(
                text,
                "{} packets are cut short, the first is number {first}: their data cannot be replayed; capture with tcpdump -s 0",
                self.truncated_packets
            );
        }
        for (reason, count) in &self.not_usable {
            let _ = writeln!(text, "{count} packets not usable: {}", reason.what());
        }
        if self.services.is_empty() && self.udp.is_empty() {
            let _ = writeln!(text, "no TCP connection and no UDP datagram is in it");
        }
        for service in &self.services {
            let _ = writeln!(
                text,
                "\n{}: {} connections ({} with their beginning, {} with their end, at most {} at once), {} requests, {:.1}/s\n  \
                 clients sent {} bytes in {} packets, the server {} bytes in {} packets",
                service.server,
                service.connections,
                service.with_beginning,
                service.with_end,
                service.concurrent,
                service.requests,
                service.requests_per_second,
                service.client_bytes,
                service.client_packets,
                service.server_bytes,
                service.server_packets,
            );
            if service.repeated_bytes > 0 {
                let _ = writeln!(text, "  {} bytes were sent again: replayed once", service.repeated_bytes);
            }
            if service.holes > 0 {
                let _ = writeln!(
                    text,
                    "  {} holes in clients' streams, {} bytes missing",
                    service.holes, service.missing_bytes
                );
            }
            let _ = writeln!(text, "  {} requests can be replayed", service.replayable_requests);
            for (reason, count) in &service.not_replayable {
                let _ = writeln!(text, "  {count} not: {}", reason.what());
            }
        }
        for udp in &self.udp {
            let _ = writeln!(
                text,
                "\nudp:{}: {} clients, {} datagrams, {:.1}/s\n  \
                 clients sent {} bytes, the server {} bytes in {} datagrams",
                udp.server,
                udp.clients,
                udp.datagrams,
                udp.datagrams_per_second,
                udp.client_bytes,
                udp.server_bytes,
                udp.responses,
            );
            if udp.truncated > 0 {
                let _ = writeln!(text, "  {} datagrams were cut by the capture: not replayed", udp.truncated);
            }
        }
        text
    }
}
