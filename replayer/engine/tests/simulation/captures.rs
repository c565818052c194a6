//! Traffic of real clients, out of the project's capture files and those of `../shared/pcaps` where that is there: each goes through the
//! engine as it is, and over lossy paths. What must arrive is put together from the file by the code here and in `streams`, with another
//! parser than the engine's.

use crate::for_seeds;
use crate::network::Path;
use crate::streams::{Answer, Ending, Packet, Seen, Stream, Turn, read};
use crate::world::{World, run};
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};
use replayer_common::addr::Endpoint;
use replayer_common::packet::flags;
use std::fs::File;
use std::path::PathBuf;

const MS: u64 = 1_000_000;
const DIRECTORIES: [&str; 3] =
    ["../../tests/captures", "../../../shared/pcaps/trex", "../../../shared/pcaps/zeek"];
/// Lives of each file: the first without losses.
const LIVES: u64 = 50;
/// Nobody waits longer between two packets of a file.
const LONGEST_PAUSE: u64 = 3000 * MS;

#[test]
fn b061_real_captures_arrive_as_they_were_reassembled() {
    let captures: Vec<Vec<Packet>> = files().iter().map(|file| packets(file)).collect();
    let outcome = for_seeds("real_captures", 0..captures.len() as u64 * LIVES, |seed, recording| {
        let path = match seed % LIVES {
            0 => Path { latency_us: 100, ..Path::default() },
            _ => Path {
                lost_per_mille: 50,
                repeated_per_mille: 50,
                reordered_per_mille: 250,
                latency_us: 100 + (seed % LIVES) as u32 * 200,
                late_us: 4000,
            },
        };
        let packets = &captures[(seed / LIVES) as usize];
        let world = World { misses: true, room: 65_700, ..World::plain(path) };
        let streams = streams(packets, world.start);
        run(&world, &streams, seed, recording)
    });
    println!("{outcome:?}");
    assert!(outcome.sound > 0);
}

/// In the order of their names.
fn files() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    for directory in DIRECTORIES.map(|name| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name)) {
        match std::fs::read_dir(&directory) {
            Ok(entries) => files.extend(entries.map(|entry| entry.unwrap().path())),
            Err(_) => println!("skipped: {} is not there", directory.display()),
        }
    }
    files.retain(|file| {
        file.extension().is_some_and(|extension| extension.to_string_lossy().contains("pcap"))
    });
    files.sort();
    files
}

/// The packets of a file, Ethernet first, times from its beginning.
fn packets(file: &std::path::Path) -> Vec<Packet> {
    let opened = File::open(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let mut reader =
        create_reader(1 << 17, opened).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    // Of each interface: its link type, and how long a unit of its clock is, ns.
    let mut interfaces: Vec<(Linktype, u64)> = Vec::new();
    let mut packets: Vec<Packet> = Vec::new();
    let mut last = None;
    let mut add = |(link, unit): (Linktype, u64), ticks: u64, bytes: &[u8]| {
        let at = ticks * unit;
        let pause = at.saturating_sub(last.unwrap_or(at)).min(LONGEST_PAUSE);
        last = Some(at);
        let at = packets.last().map_or(0, |packet: &Packet| packet.at) + pause;
        packets.push(Packet { at, bytes: ethernet(link, bytes) });
    };
    loop {
        match reader.next() {
            Ok((offset, block)) => {
                match block {
                    PcapBlockOwned::LegacyHeader(header) => {
                        let unit = if header.is_nanosecond_precision() { 1 } else { 1000 };
                        interfaces.push((header.network, unit));
                    }
                    PcapBlockOwned::Legacy(packet) => {
                        let second = 1_000_000_000 / interfaces[0].1;
                        let ticks = u64::from(packet.ts_sec) * second + u64::from(packet.ts_usec);
                        add(interfaces[0], ticks, packet.data);
                    }
                    PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
                        let unit = 1_000_000_000 / interface.ts_resolution().expect("a resolution");
                        interfaces.push((interface.linktype, unit));
                    }
                    PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                        let ticks = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                        let len = packet.caplen as usize;
                        add(interfaces[packet.if_id as usize], ticks, &packet.data[..len]);
                    }
                    PcapBlockOwned::NG(_) => {}
                }
                reader.consume(offset);
            }
            Err(PcapError::Eof) => break,
            Err(PcapError::Incomplete(_)) => reader.refill().expect("readable"),
            Err(error) => panic!("{}: {error}", file.display()),
        }
    }
    packets
}

fn ethernet(link: Linktype, bytes: &[u8]) -> Vec<u8> {
    let skipped = match link {
        Linktype::ETHERNET => return bytes.to_vec(),
        Linktype::RAW => 0,
        Linktype::NULL => 4,
        other => panic!("link type {other}"),
    };
    let ip = &bytes[skipped..];
    let ethertype: [u8; 2] =
        if ip.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] };
    [&[0; 12], &ethertype[..], ip].concat()
}

/// Two ends, client first.
type Pair = (Endpoint, Endpoint);

/// The connections of a file.
fn streams(packets: &[Packet], start: u64) -> Vec<Stream> {
    let mut builders: Vec<Builder> = Vec::new();
    let mut strays = Vec::new();
    for packet in packets {
        let packet = Packet { at: start + packet.at, bytes: packet.bytes.clone() };
        let Some(seen) = read(&packet.bytes) else {
            strays.push(packet);
            continue;
        };
        let opens = seen.flags & (flags::SYN | flags::ACK) == flags::SYN;
        let pair = (seen.source, seen.destination);
        // The latest connection of two ends.
        let known = builders.iter().rposition(|one| one.pair == pair || one.pair == (pair.1, pair.0));
        let again = known.is_some_and(|i| opens && builders[i].isn.is_some_and(|isn| isn != seen.seq));
        let i = known.filter(|_| !again).unwrap_or_else(|| {
            builders.push(Builder::new(client_first(&seen)));
            builders.len() - 1
        });
        builders[i].add(&seen, packet);
    }
    let mut streams: Vec<Stream> = builders.into_iter().filter_map(Builder::finish).collect();
    // What cannot be read belongs to nobody; it is captured all the same.
    if let Some(first) = streams.first_mut() {
        first.packets.extend(strays);
        first.packets.sort_by_key(|packet| packet.at);
    }
    streams
}

/// Who opened the connection; where nobody saw it, the server is who has the lower port.
fn client_first(seen: &Seen) -> Pair {
    let from_server = match seen.flags & (flags::SYN | flags::ACK) {
        flags::SYN => false,
        bits if bits == flags::SYN | flags::ACK => true,
        _ => seen.source.port < seen.destination.port,
    };
    if from_server { (seen.destination, seen.source) } else { (seen.source, seen.destination) }
}

/// A connection as it is put together: each byte is what was captured first.
struct Builder {
    pair: Pair,
    isn: Option<u32>,
    server_isn: Option<u32>,
    /// Client bytes, and what the segment that brought each had acknowledged.
    bytes: Vec<Option<(u8, u32)>>,
    /// Server bytes seen so far, and the highest client byte that it had acknowledged.
    server_end: u32,
    answers: Vec<Answer>,
    packets: Vec<Packet>,
    end: Ending,
}

impl Builder {
    fn new(pair: Pair) -> Builder {
        Builder {
            pair,
            isn: None,
            server_isn: None,
            bytes: Vec::new(),
            server_end: 0,
            answers: Vec::new(),
            packets: Vec::new(),
            end: Ending::Silence,
        }
    }

    fn add(&mut self, seen: &Seen, packet: Packet) {
        let payload = &packet.bytes[seen.payload.0..seen.payload.1];
        let syn = seen.flags & flags::SYN != 0;
        let first = seen.seq.wrapping_add(u32::from(syn));
        if seen.source == self.pair.1 {
            let isn = *self.server_isn.get_or_insert(first.wrapping_sub(1));
            let end = first.wrapping_sub(isn).wrapping_sub(1).wrapping_add(payload.len() as u32);
            let more = end.wrapping_sub(self.server_end) as i32;
            // A reset may have been injected, with any number.
            if more > 0 && !payload.is_empty() && seen.flags & flags::RST == 0 && more < 1 << 24 {
                let after = self.isn.map_or(0, |isn| seen.ack.wrapping_sub(isn).wrapping_sub(1));
                let after = if after > 1 << 30 { 0 } else { after as usize };
                let after = after.min(self.bytes.len()).max(self.answers.last().map_or(0, |last| last.after));
                self.answers.push(Answer { after, bytes: more as usize });
                self.server_end = end;
            }
            return;
        }
        if !payload.is_empty() || syn {
            let isn = *self.isn.get_or_insert(first.wrapping_sub(1));
            let from = first.wrapping_sub(isn).wrapping_sub(1) as usize;
            // What lies before the first that was seen, or far away, is of no stream.
            if from < 1 << 28 {
                self.bytes.resize(self.bytes.len().max(from + payload.len()), None);
                for (place, byte) in self.bytes[from..].iter_mut().zip(payload) {
                    place.get_or_insert((*byte, if syn { 0 } else { seen.ack }));
                }
            }
        }
        if self.end == Ending::Silence {
            if seen.flags & flags::FIN != 0 {
                self.end = Ending::Fin;
            }
            if seen.flags & flags::RST != 0 {
                self.end = Ending::Reset;
            }
        }
        self.packets.push(packet);
    }

    /// `None`: nothing of the client was seen.
    fn finish(self) -> Option<Stream> {
        let mut turns = Vec::new();
        let mut highest: Option<u32> = None;
        for (offset, byte) in self.bytes.iter().enumerate() {
            let Some((_, ack)) = *byte else { continue };
            if highest.is_none_or(|highest| (ack.wrapping_sub(highest) as i32) > 0) {
                highest = Some(ack);
                let read = self.server_isn.map_or(0, |isn| ack.wrapping_sub(isn).wrapping_sub(1));
                turns.push(Turn { offset, read });
            }
        }
        Some(Stream {
            client: self.pair.0,
            server: self.pair.1,
            isn: self.isn?,
            bytes: self.bytes.iter().map(|byte| byte.map(|(byte, _)| byte)).collect(),
            answers: self.answers,
            pushes: None,
            turns,
            packets: self.packets,
            end: self.end,
        })
    }
}
