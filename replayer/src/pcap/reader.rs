//! Packets of one capture file: pcap with micro- or nanoseconds in either byte order, and pcapng. The formats are parsed by the library
//! `pcap-parser` over a buffer of our own, so that memory stays the same however large the file is and an error knows its offset.
//!
//! A file is hostile input: no length in it is believed before it was compared with a limit, and none makes the buffer grow beyond it.

use super::input::{Compression, Input};
use super::link::LinkType;
use pcap_parser::{Block, parse_block_be, parse_block_le};
use pcap_parser::{PcapHeader, parse_pcap_frame, parse_pcap_frame_be, parse_pcap_header};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What is read at once.
const BUFFER: usize = 1 << 20;
/// No packet is longer: four times what libpcap captures of one (MAXIMUM_SNAPLEN).
const MAX_PACKET: usize = 1 << 20;
/// No other block of a pcapng file is longer; decryption secrets and name tables can be long.
const MAX_BLOCK: usize = 16 << 20;
/// Interfaces of a pcapng section.
const MAX_INTERFACES: usize = 1 << 16;

const PCAP_HEADER_LEN: usize = 24;
const PCAP_RECORD_HEADER_LEN: usize = 16;
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
/// Type, length, and for a section header the byte-order magic.
const BLOCK_START_LEN: usize = 12;

/// Why a file cannot be read, or not any further. Offsets are those in the decompressed file.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be opened.
    #[error("cannot open {name}: {cause}; name a readable capture file, or - for standard input")]
    Open {
        /// The file.
        name: String,
        /// What the system says.
        cause: io::Error,
    },
    /// It is something else.
    #[error(
        "{name} is neither a pcap nor a pcapng file: {what}; `tcpdump -w` and `editcap` write such files"
    )]
    NotACapture {
        /// The file.
        name: String,
        /// What it begins with.
        what: String,
    },
    /// It cannot be read any further, or not be decompressed.
    #[error(
        "{name} cannot be read beyond packet {packets}, offset {offset}: {cause}; what is before that is used"
    )]
    Read {
        /// The file.
        name: String,
        /// Packets before.
        packets: u64,
        /// Where reading ended.
        offset: u64,
        /// What the system or the decompressor says.
        cause: String,
    },
    /// It ends in the middle of something.
    #[error(
        "{name} ends within packet {} at offset {offset}: {missing} bytes are missing; was it still being written? What is before that is used",
        packets + 1
    )]
    Cut {
        /// The file.
        name: String,
        /// Whole packets before.
        packets: u64,
        /// Where the packet (or block) begins that is not whole.
        offset: u64,
        /// How many bytes are not there.
        missing: usize,
    },
    /// It says something impossible.
    #[error(
        "{name} is damaged after packet {packets}, at offset {offset}: {what}; what is before that is used"
    )]
    Damaged {
        /// The file.
        name: String,
        /// Packets before.
        packets: u64,
        /// Where it is damaged.
        offset: u64,
        /// What is wrong.
        what: String,
    },
}

/// A captured packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Its number in its file, from 1.
    pub number: u64,
    /// When it was captured, ns since the epoch.
    pub time_ns: u64,
    /// How its bytes begin.
    pub link: LinkType,
    /// What was captured of it.
    pub data: &'a [u8],
    /// Its length on the wire, bytes; more than `data` where the capture cut it.
    pub wire_len: u32,
}

/// The packet that was read last, as places in the buffer.
#[derive(Clone, Copy, Debug)]
struct Current {
    time_ns: u64,
    link: LinkType,
    begin: usize,
    len: usize,
    wire_len: u32,
}

#[derive(Clone, Copy, Debug)]
struct Interface {
    link: LinkType,
    snaplen: u32,
    /// Units of its timestamps per second.
    resolution: u64,
    offset_s: i64,
}

#[derive(Debug)]
enum Format {
    Pcap { big_endian: bool, nanoseconds: bool, link: LinkType },
    PcapNg { big_endian: bool },
}

/// Reads one file.
#[derive(Debug)]
pub struct Reader {
    name: String,
    input: Input,
    format: Format,
    /// Those of the pcapng section.
    interfaces: Vec<Interface>,
    buffer: Vec<u8>,
    /// What of the buffer is not parsed yet.
    begin: usize,
    end: usize,
    /// The offset of `begin` in the decompressed file.
    offset: u64,
    at_end: bool,
    packets: u64,
    current: Option<Current>,
    last_time_ns: u64,
}

impl Reader {
    /// Opens a file, or standard input for `-`, and reads its header.
    ///
    /// # Errors
    /// When it cannot be opened, or does not begin as a capture file.
    pub fn open(path: &Path) -> Result<Reader, ReadError> {
        let name = if path.as_os_str() == super::input::STANDARD_INPUT {
            "standard input".to_owned()
        } else {
            path.display().to_string()
        };
        let input = Input::open(path).map_err(|cause| ReadError::Open { name: name.clone(), cause })?;
        Reader::new(name, input)
    }

    /// Reads the header of an open file.
    ///
    /// # Errors
    /// When it does not begin as a capture file.
    pub fn new(name: String, input: Input) -> Result<Reader, ReadError> {
        let mut reader = Reader {
            name,
            input,
            format: Format::PcapNg { big_endian: false },
            interfaces: Vec::new(),
            buffer: vec![0; BUFFER],
            begin: 0,
            end: 0,
            offset: 0,
            at_end: false,
            packets: 0,
            current: None,
            last_time_ns: 0,
        };
        let len = reader.fill(PCAP_HEADER_LEN)?;
        let first = &reader.buffer[..len.min(PCAP_HEADER_LEN)];
        if first.len() >= 4 && first[..4] == SECTION_HEADER.to_be_bytes() {
            return Ok(reader);
        }
        match parse_pcap_header(first) {
            Ok((_, header)) if header.version_major == 2 => {
                reader.format = Format::Pcap {
                    big_endian: header.is_bigendian(),
                    nanoseconds: header.is_nanosecond_precision(),
                    link: link_of(&header),
                };
                reader.consume(PCAP_HEADER_LEN);
                Ok(reader)
            }
            _ => {
                let what = if len == 0 {
                    "it is empty".to_owned()
                } else {
                    format!("it begins with {:02x?}", &first[..first.len().min(8)])
                };
                Err(ReadError::NotACapture { name: reader.name, what })
            }
        }
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// "pcap" or "pcapng".
    pub fn format(&self) -> &'static str {
        match self.format {
            Format::Pcap { nanoseconds: true, .. } => "pcap with nanoseconds",
            Format::Pcap { .. } => "pcap",
            Format::PcapNg { .. } => "pcapng",
        }
    }

    /// How the file is compressed.
    pub fn compression(&self) -> Compression {
        self.input.compression
    }

    /// The file's size and how many of its bytes were read.
    pub fn progress(&self) -> (Option<u64>, Arc<AtomicU64>) {
        (self.input.size, self.input.position())
    }

    /// Reads the next packet; false at the end.
    ///
    /// # Errors
    /// When the file is cut or damaged. There is nothing more to be read of it then.
    pub fn advance(&mut self) -> Result<bool, ReadError> {
        self.current = None;
        let found = match self.format {
            Format::Pcap { big_endian, nanoseconds, link } => {
                self.next_record(big_endian, nanoseconds, link)?
            }
            Format::PcapNg { .. } => self.next_packet_block()?,
        };
        self.packets += u64::from(found.is_some());
        self.current = found;
        Ok(self.current.is_some())
    }

    /// The packet that [`Reader::advance`] read last.
    pub fn packet(&self) -> Option<Packet<'_>> {
        let current = self.current?;
        Some(Packet {
            number: self.packets,
            time_ns: current.time_ns,
            link: current.link,
            data: &self.buffer[current.begin..current.begin + current.len],
            wire_len: current.wire_len,
        })
    }

    fn next_record(
        &mut self,
        big_endian: bool,
        nanoseconds: bool,
        link: LinkType,
    ) -> Result<Option<Current>, ReadError> {
        let Some(()) = self.want(PCAP_RECORD_HEADER_LEN)? else { return Ok(None) };
        let captured = word(&self.buffer[self.begin + 8..], big_endian) as usize;
        if captured > MAX_PACKET {
            return Err(self.damaged(format!("the next packet claims to have {captured} bytes")));
        }
        let len = PCAP_RECORD_HEADER_LEN + captured;
        if self.want(len)?.is_none() {
            return Ok(None);
        }
        let bytes = &self.buffer[self.begin..self.begin + len];
        let parsed = if big_endian { parse_pcap_frame_be(bytes) } else { parse_pcap_frame(bytes) };
        let Ok((_, record)) = parsed else {
            return Err(self.damaged("the next packet's header makes no sense".to_owned()));
        };
        let unit = if nanoseconds { 1 } else { 1000 };
        let time_ns = u64::from(record.ts_sec) * 1_000_000_000 + u64::from(record.ts_usec) * unit;
        let wire_len = record.origlen;
        let begin = self.begin + PCAP_RECORD_HEADER_LEN;
        self.consume(len);
        Ok(Some(Current { time_ns, link, begin, len: captured, wire_len }))
    }

    fn next_packet_block(&mut self) -> Result<Option<Current>, ReadError> {
        loop {
            let Some(()) = self.want(BLOCK_START_LEN)? else { return Ok(None) };
            let Format::PcapNg { big_endian } = self.format else { return Ok(None) };
            let start = &self.buffer[self.begin..self.begin + BLOCK_START_LEN];
            let section = start[..4] == SECTION_HEADER.to_be_bytes();
            let big_endian = if section { start[8..12] == [0x1a, 0x2b, 0x3c, 0x4d] } else { big_endian };
            let len = word(&start[4..], big_endian) as usize;
            if !(BLOCK_START_LEN..=MAX_BLOCK).contains(&len) || !len.is_multiple_of(4) {
                return Err(self.damaged(format!("the next block claims to have {len} bytes")));
            }
            if self.want(len)?.is_none() {
                return Ok(None);
            }
            let bytes = &self.buffer[self.begin..self.begin + len];
            let parsed = if big_endian { parse_block_be(bytes) } else { parse_block_le(bytes) };
            let Ok((_, block)) = parsed else {
                return Err(self.damaged("the next block makes no sense".to_owned()));
            };
            let place = |data: &[u8], captured: usize| {
                (data.as_ptr() as usize - self.buffer.as_ptr() as usize, captured.min(data.len()))
            };
            let mut found = None;
            let mut fault = None;
            match block {
                Block::SectionHeader(_) => {
                    self.format = Format::PcapNg { big_endian };
                    self.interfaces.clear();
                }
                Block::InterfaceDescription(described) => {
                    let interface = Interface {
                        link: LinkType(described.linktype.0 as u32),
                        snaplen: described.snaplen,
                        resolution: described.ts_resolution().filter(|&units| units > 0).unwrap_or(1_000_000),
                        offset_s: described.ts_offset(),
                    };
                    if self.interfaces.len() >= MAX_INTERFACES {
                        fault = Some(format!("it has more than {MAX_INTERFACES} interfaces"));
                    } else {
                        self.interfaces.push(interface);
                    }
                }
                Block::EnhancedPacket(packet) => match self.interfaces.get(packet.if_id as usize) {
                    Some(interface) => {
                        let (begin, len) = place(packet.data, packet.caplen as usize);
                        let units = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                        found = Some(Current {
                            time_ns: interface.nanoseconds(units),
                            link: interface.link,
                            begin,
                            len,
                            wire_len: packet.origlen,
                        });
                    }
                    None => {
                        fault =
                            Some(format!("a packet of interface {}, which was not described", packet.if_id));
                    }
                },
                Block::SimplePacket(packet) => match self.interfaces.first() {
                    Some(interface) => {
                        let snaplen = match interface.snaplen {
                            0 => u32::MAX,
                            snaplen => snaplen,
                        };
                        let (begin, len) = place(packet.data, packet.origlen.min(snaplen) as usize);
                        // It has no time: that of the packet before is the best guess.
                        found = Some(Current {
                            time_ns: self.last_time_ns,
                            link: interface.link,
                            begin,
                            len,
                            wire_len: packet.origlen,
                        });
                    }
                    None => fault = Some("a packet before any interface was described".to_owned()),
                },
                _ => {}
            }
            if let Some(what) = fault {
                return Err(self.damaged(what));
            }
            self.consume(len);
            if let Some(found) = found {
                self.last_time_ns = found.time_ns;
                return Ok(Some(found));
            }
        }
    }

    /// Makes sure that `len` bytes are there to be parsed; `None` at the end of the file.
    fn want(&mut self, len: usize) -> Result<Option<()>, ReadError> {
        let have = self.end - self.begin;
        if have >= len {
            return Ok(Some(()));
        }
        match self.fill(len)? {
            0 => Ok(None),
            have if have < len => Err(ReadError::Cut {
                name: self.name.clone(),
                packets: self.packets,
                offset: self.offset,
                missing: len - have,
            }),
            _ => Ok(Some(())),
        }
    }

    /// Reads until `len` bytes are there or the file ends; how many there are.
    fn fill(&mut self, len: usize) -> Result<usize, ReadError> {
        if self.begin > 0 {
            self.buffer.copy_within(self.begin..self.end, 0);
            self.end -= self.begin;
            self.begin = 0;
        }
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        while self.end < len && !self.at_end {
            match self.input.read(&mut self.buffer[self.end..]) {
                Ok(0) => self.at_end = true,
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.at_end = true;
                    return Err(ReadError::Read {
                        name: self.name.clone(),
                        packets: self.packets,
                        offset: self.offset + (self.end - self.begin) as u64,
                        cause: if ends_early(&error) {
                            "its compressed bytes end too early; was it still being written?".to_owned()
                        } else {
                            error.to_string()
                        },
                    });
                }
            }
        }
        Ok(self.end - self.begin)
    }

    fn consume(&mut self, len: usize) {
        self.begin += len;
        self.offset += len as u64;
    }

    fn damaged(&mut self, what: String) -> ReadError {
        // Nothing more is read of it.
        self.at_end = true;
        let offset = self.offset;
        self.begin = self.end;
        ReadError::Damaged { name: self.name.clone(), packets: self.packets, offset, what }
    }
}

impl Interface {
    fn nanoseconds(&self, units: u64) -> u64 {
        let ns = match self.resolution {
            1_000_000_000 => units,
            1_000_000 => units.saturating_mul(1000),
            resolution => {
                let ns = u128::from(units) * 1_000_000_000 / u128::from(resolution);
                u64::try_from(ns).unwrap_or(u64::MAX)
            }
        };
        ns.saturating_add_signed(self.offset_s.saturating_mul(1_000_000_000))
    }
}

/// Whether a decompressor wants more than there is.
fn ends_early(error: &io::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if kind == Some(io::ErrorKind::UnexpectedEof) {
            return true;
        }
        next = error.source();
    }
    false
}

/// The link type; the upper bits of the field say other things (pcap-savefile(5)).
fn link_of(header: &PcapHeader) -> LinkType {
    LinkType(header.network.0 as u32 & 0xffff)
}

fn word(bytes: &[u8], big_endian: bool) -> u32 {
    let word = [bytes[0], bytes[1], bytes[2], bytes[3]];
    if big_endian { u32::from_be_bytes(word) } else { u32::from_le_bytes(word) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(bytes: Vec<u8>) -> Result<Reader, ReadError> {
        Reader::new("test".into(), Input::new(io::Cursor::new(bytes), None).unwrap())
    }

    /// Time, bytes, and length on the wire.
    type Found = (u64, Vec<u8>, u32);

    /// The packets, and what ended the file.
    fn packets(bytes: Vec<u8>) -> (Vec<Found>, Option<ReadError>) {
        let mut reader = match reader(bytes) {
            Ok(reader) => reader,
            Err(error) => return (Vec::new(), Some(error)),
        };
        let mut packets = Vec::new();
        loop {
            match reader.advance() {
                Ok(true) => {
                    let packet = reader.packet().unwrap();
                    assert_eq!(packet.number, packets.len() as u64 + 1);
                    packets.push((packet.time_ns, packet.data.to_vec(), packet.wire_len));
                }
                Ok(false) => {
                    assert!(reader.packet().is_none());
                    return (packets, None);
                }
                Err(error) => return (packets, Some(error)),
            }
        }
    }

    struct Bytes {
        big_endian: bool,
        out: Vec<u8>,
    }

    impl Bytes {
        fn words(&mut self, words: &[u32]) {
            for word in words {
                self.out.extend(if self.big_endian { word.to_be_bytes() } else { word.to_le_bytes() });
            }
        }

        fn halves(&mut self, halves: &[u16]) {
            for half in halves {
                self.out.extend(if self.big_endian { half.to_be_bytes() } else { half.to_le_bytes() });
            }
        }

        fn block(&mut self, kind: u32, body: impl FnOnce(&mut Bytes)) {
            let mut inner = Bytes { big_endian: self.big_endian, out: Vec::new() };
            body(&mut inner);
            inner.out.resize(inner.out.len().next_multiple_of(4), 0);
            let len = inner.out.len() as u32 + 12;
            self.words(&[kind, len]);
            self.out.extend(inner.out);
            self.words(&[len]);
        }
    }

    /// Two packets: `abc` at 1.5 s, and `defgh`, cut from 9 bytes, 1 us later.
    fn pcap(big_endian: bool, nanoseconds: bool) -> Vec<u8> {
        let mut bytes = Bytes { big_endian, out: Vec::new() };
        bytes.words(&[if nanoseconds { 0xa1b2_3c4d } else { 0xa1b2_c3d4 }]);
        bytes.halves(&[2, 4]);
        bytes.words(&[0, 0, 65_535, 1]);
        let unit = if nanoseconds { 1 } else { 1000 };
        bytes.words(&[1, 500_000_000 / unit, 3, 3]);
        bytes.out.extend(b"abc");
        bytes.words(&[1, 500_001_000 / unit, 5, 9]);
        bytes.out.extend(b"defgh");
        bytes.out
    }

    /// The same; the second interface has microseconds and is 1 s ahead, which its offset says.
    fn pcapng(big_endian: bool) -> Vec<u8> {
        let mut bytes = Bytes { big_endian, out: Vec::new() };
        bytes.block(SECTION_HEADER, |b| {
            b.words(&[0x1a2b_3c4d]);
            b.halves(&[1, 0]);
            b.words(&[u32::MAX, u32::MAX]);
        });
        // if_tsresol: nanoseconds.
        bytes.block(1, |b| {
            b.halves(&[1, 0]);
            b.words(&[0]);
            b.halves(&[9, 1]);
            b.out.extend([9, 0, 0, 0]);
            b.halves(&[0, 0]);
        });
        bytes.block(1, |b| {
            b.halves(&[1, 0]);
            b.words(&[0]);
        });
        bytes.block(0x0bad_0000, |b| b.words(&[1, 2, 3]));
        bytes.block(6, |b| {
            b.words(&[0, 0, 1_500_000_000, 3, 3]);
            b.out.extend(b"abc");
        });
        bytes.block(6, |b| {
            b.words(&[1, 0, 1_500_001, 5, 9]);
            b.out.extend(b"defgh");
        });
        bytes.out
    }

    #[test]
    fn b060_both_formats_both_units_both_byte_orders() {
        let expected = [(1_500_000_000, b"abc".to_vec(), 3), (1_500_001_000, b"defgh".to_vec(), 9)];
        for big_endian in [false, true] {
            for bytes in [pcap(big_endian, false), pcap(big_endian, true), pcapng(big_endian)] {
                let (found, error) = packets(bytes);
                assert!(error.is_none(), "{error:?}");
                assert_eq!(found, expected);
            }
        }
        // Sections of another byte order may follow.
        let (found, error) = packets([pcapng(false), pcapng(true)].concat());
        assert!(error.is_none(), "{error:?}");
        assert_eq!(found, [expected.clone(), expected].concat());
    }

    #[test]
    fn b060_a_cut_file_says_where_and_gives_what_was_before() {
        for whole in [pcap(false, false), pcap(true, true), pcapng(false), pcapng(true)] {
            let (all, _) = packets(whole.clone());
            for len in 0..whole.len() {
                let (found, error) = packets(whole[..len].to_vec());
                assert_eq!(found, all[..found.len()], "cut at {len}");
                match error {
                    None => {}
                    Some(ReadError::Cut { packets, offset, missing, .. }) => {
                        assert_eq!(packets, found.len() as u64);
                        assert!(offset as usize <= len && missing > 0 && len + missing <= whole.len());
                    }
                    Some(ReadError::NotACapture { .. }) => assert!(len < 24),
                    Some(other) => panic!("cut at {len}: {other}"),
                }
            }
        }
    }

    #[test]
    fn b060_a_damaged_file_says_where_and_gives_what_was_before() {
        let mut bytes = pcap(false, false);
        let second = 24 + 16 + 3;
        bytes[second + 8..second + 12].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        let (found, error) = packets(bytes);
        assert_eq!(found.len(), 1);
        let Some(ReadError::Damaged { packets: 1, offset, .. }) = error else { panic!("{error:?}") };
        assert_eq!(offset as usize, second);

        // The second length of the last block differs from the first.
        let mut bytes = pcapng(true);
        let last = bytes.len() - 1;
        bytes[last] ^= 4;
        let (found, error) = packets(bytes);
        assert_eq!(found.len(), 1);
        assert!(matches!(error, Some(ReadError::Damaged { packets: 1, .. })), "{error:?}");
    }

    #[test]
    fn b060_a_cut_compressed_file_says_that_it_was_cut() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gzip, &pcap(false, false)).unwrap();
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let zstd = ruzstd::encoding::compress_to_vec(&pcap(false, false)[..], level);
        for whole in [gzip.finish().unwrap(), zstd] {
            assert!(packets(whole.clone()).1.is_none());
            let (_, error) = packets(whole[..whole.len() - 9].to_vec());
            let text = error.unwrap().to_string();
            assert!(text.contains("compressed bytes end too early"), "{text}");
        }
    }

    #[test]
    fn b060_what_is_no_capture_is_refused() {
        for bytes in [b"".to_vec(), b"GET / HTTP/1.1\r\nHost: a\r\n".to_vec(), vec![0; 100]] {
            assert!(matches!(reader(bytes), Err(ReadError::NotACapture { .. })));
        }
    }

    /// Any byte of a file may be anything: no panic, no endless loop, no more memory than the limits say.
    #[test]
    fn hostile_files_do_no_harm() {
        for whole in [pcap(false, false), pcap(true, true), pcapng(false), pcapng(true)] {
            for at in 0..whole.len() {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut bytes = whole.clone();
                    bytes[at] = value;
                    let (found, _) = packets(bytes);
                    assert!(found.len() <= 2);
                }
            }
        }
    }
}
