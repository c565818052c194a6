//! What clients sent according to capture files, by a reassembly that shares no code with the replayer; and those files: the project's own, recorded
//! in the lab, which are always there, and captures from elsewhere beside the checkout.

#![allow(dead_code, reason = "a test that has this needs a part of it")]

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use pcap_parser::{Block, PcapBlockOwned, PcapError, create_reader};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// A file of the project's own.
pub(crate) fn own(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/captures").join(name)
}

/// A file of [`WHOLE`] or [`OTHERS`], if it is there.
pub(crate) fn capture(name: &str) -> Option<PathBuf> {
    if let Some(name) = name.strip_prefix("own/") {
        return Some(own(name));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pcaps").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// Files whose clients' streams are whole from their SYN on: all of them must be sent, byte for byte.
pub(crate) const WHOLE: &[(&str, u16)] = &[
    ("own/keep-alive.pcap", 8080),
    ("own/keep-alive-ipv6.pcap", 8080),
    ("own/redis-pipelined.pcap", 6379),
    ("trex/delay_10_http_browsing_0.pcap", 80),
    ("trex/http_post.pcap", 80),
    ("trex/tcp2_http_drop_c.pcap", 80),
    ("trex/tcp2_http_ipv6_c.pcap", 80),
    ("trex/tcp2_http_reorder_c.pcap", 80),
    ("trex/tcp2_http_rst_middle_c.pcap", 80),
    ("zeek/100-continue.pcap", 80),
    ("zeek/206_example_b.pcap", 80),
    ("zeek/bulk-loading.pcap", 6379),
    ("zeek/get-without-fins.pcap", 80),
    ("zeek/get.pcap", 80),
    ("zeek/handshake-reorder.pcap", 80),
    ("zeek/http-post-large.pcap", 80),
    ("zeek/http-post-large.pcap", 5000),
    ("zeek/http-vlan-0.pcap", 80),
    ("zeek/miss_end_data.pcap", 80),
    ("zeek/mysql.pcap", 3306),
    ("zeek/payload-syn.pcap", 80),
    ("zeek/pipelined-requests.pcap", 80),
    ("zeek/rst-inject-rae.pcap", 6649),
    ("zeek/tcp-fast-open.pcap", 80),
];

/// Others: what is sent must be what was captured, whatever is left out.
pub(crate) const OTHERS: &[(&str, u16)] = &[
    ("zeek/get_nosyn.pcap", 80),
    ("zeek/missing-syn.pcap", 80),
    ("zeek/no-handshake.pcap", 80),
    ("zeek/reassembly.pcap", 80),
    ("zeek/retransmit-fast009.pcap", 80),
    ("zeek/retransmit-timeout.pcapng", 80),
    ("zeek/tls1.2.pcap", 443),
];

/// A segment of TCP.
pub(crate) struct Segment {
    pub(crate) time_ns: u64,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) rst: bool,
    pub(crate) payload: Vec<u8>,
}

pub(crate) fn segments(path: &Path) -> Vec<Segment> {
    let mut reader = create_reader(1 << 20, File::open(path).unwrap()).unwrap();
    let mut found = Vec::new();
    let (mut link, mut unit) = (1, 1000);
    loop {
        match reader.next() {
            Ok((used, block)) => {
                let mut packet = |time_ns: u64, data: &[u8]| {
                    let data = match link {
                        0 => SlicedPacket::from_ip(&data[4..]),
                        101 => SlicedPacket::from_ip(data),
                        _ => SlicedPacket::from_ethernet(data),
                    };
                    found.extend(data.ok().and_then(|sliced| segment(time_ns, &sliced)));
                };
                match block {
                    PcapBlockOwned::LegacyHeader(header) => {
                        link = header.network.0;
                        unit = if header.is_nanosecond_precision() { 1 } else { 1000 };
                    }
                    PcapBlockOwned::Legacy(record) => {
                        let time =
                            u64::from(record.ts_sec) * 1_000_000_000 + u64::from(record.ts_usec) * unit;
                        packet(time, record.data);
                    }
                    PcapBlockOwned::NG(Block::EnhancedPacket(record)) => {
                        packet(0, &record.data[..record.caplen as usize]);
                    }
                    PcapBlockOwned::NG(_) => {}
                }
                reader.consume(used);
            }
            Err(PcapError::Eof) => return found,
            Err(PcapError::Incomplete(_)) => reader.refill().unwrap(),
            Err(error) => panic!("{}: {error:?}", path.display()),
        }
    }
}

fn segment(time_ns: u64, packet: &SlicedPacket<'_>) -> Option<Segment> {
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { return None };
    let (source, destination): (IpAddr, IpAddr) = match packet.net.as_ref()? {
        NetSlice::Ipv4(v4) => (v4.header().source_addr().into(), v4.header().destination_addr().into()),
        NetSlice::Ipv6(v6) => (v6.header().source_addr().into(), v6.header().destination_addr().into()),
        NetSlice::Arp(_) => return None,
    };
    Some(Segment {
        time_ns,
        source: SocketAddr::new(source, tcp.source_port()),
        destination: SocketAddr::new(destination, tcp.destination_port()),
        seq: tcp.sequence_number(),
        syn: tcp.syn(),
        ack: tcp.ack(),
        rst: tcp.rst(),
        payload: tcp.payload().to_vec(),
    })
}

/// What a client sent on a connection: bytes by their sequence number, from the SYN on.
#[derive(Default)]
pub(crate) struct Stream {
    /// The number of the first byte, when a SYN says it.
    first: Option<u32>,
    pub(crate) bytes: BTreeMap<u32, u8>,
}

impl Stream {
    fn add(&mut self, segment: &Segment) {
        let seq = segment.seq.wrapping_add(u32::from(segment.syn));
        if segment.syn {
            self.first = Some(seq);
        }
        for (i, &byte) in segment.payload.iter().enumerate() {
            // What came first counts.
            self.bytes.entry(seq.wrapping_add(i as u32)).or_insert(byte);
        }
    }

    /// From its first byte to the first that is missing.
    pub(crate) fn contiguous(&self) -> Option<Vec<u8>> {
        let first = self.first?;
        Some((0u32..).map_while(|i| self.bytes.get(&first.wrapping_add(i)).copied()).collect())
    }
}

/// The streams to a port, by client; a client that connects again has several.
pub(crate) fn streams(segments: &[Segment], port: u16) -> BTreeMap<SocketAddr, Vec<Stream>> {
    let mut all: BTreeMap<SocketAddr, Vec<Stream>> = BTreeMap::new();
    for segment in segments.iter().filter(|segment| segment.destination.port() == port) {
        if segment.rst {
            continue;
        }
        let streams = all.entry(segment.source).or_default();
        let opening = segment.syn && !segment.ack;
        let same = streams.last().is_some_and(|last| {
            !opening || last.first.is_none_or(|first| first == segment.seq.wrapping_add(1))
        });
        if !same {
            streams.push(Stream::default());
        }
        if let Some(last) = streams.last_mut() {
            last.add(segment);
        }
    }
    all
}
