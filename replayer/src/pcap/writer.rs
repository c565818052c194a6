//! Writing Ethernet frames to pcap and pcapng files with nanoseconds.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The magic number of pcap files with nanoseconds.
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const LINKTYPE_ETHERNET: u32 = 1;
/// What libpcap writes for "no limit".
const SNAPLEN: u32 = 262_144;

/// Writes a file.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    written: u64,
}

impl Writer<BufWriter<File>> {
    /// Makes the file, or empties it.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(path: &Path) -> io::Result<Self> {
        Writer::new(BufWriter::with_capacity(1 << 18, File::create(path)?))
    }
}

impl<W: Write> Writer<W> {
    /// Begins with the file's header.
    ///
    /// # Errors
    /// That of `out`, as for all that writes.
    pub fn new(mut out: W) -> io::Result<Writer<W>> {
        out.write_all(&MAGIC_NANOSECONDS.to_le_bytes())?;
        out.write_all(&[2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
        out.write_all(&SNAPLEN.to_le_bytes())?;
        out.write_all(&LINKTYPE_ETHERNET.to_le_bytes())?;
        Ok(Writer { out, written: 24 })
    }

    /// Adds a packet: its time, ns since the epoch.
    pub fn packet(&mut self, time_ns: u64, frame: &[u8]) -> io::Result<()> {
        let mut header = [0; 16];
        let len = frame.len() as u32;
        for (place, word) in header.chunks_exact_mut(4).zip([
            (time_ns / 1_000_000_000) as u32,
            (time_ns % 1_000_000_000) as u32,
            len,
            len,
        ]) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.out.write_all(&header)?;
        self.out.write_all(frame)?;
        self.written += 16 + frame.len() as u64;
        Ok(())
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes out what is buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
/// The option `if_tsresol`, one byte: ten to the minus ninth.
const IF_TSRESOL: u16 = 9;
const NANOSECONDS: u8 = 9;

/// Writes Ethernet frames to a pcapng file with nanoseconds: one section, one interface.
#[derive(Debug)]
pub struct NgWriter<W: Write> {
    out: W,
    written: u64,
}

impl NgWriter<BufWriter<File>> {
    /// Makes the file, or empties it.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(path: &Path) -> io::Result<Self> {
        NgWriter::new(BufWriter::with_capacity(1 << 18, File::create(path)?))
    }
}

impl<W: Write> NgWriter<W> {
    /// Begins with the section's and the interface's description.
    ///
    /// # Errors
    /// That of `out`, as for all that writes.
    pub fn new(out: W) -> io::Result<NgWriter<W>> {
        let mut writer = NgWriter { out, written: 0 };
        let mut body = BYTE_ORDER_MAGIC.to_le_bytes().to_vec();
        // Version 1.0; the section's length is not known.
        body.extend([1, 0, 0, 0]);
        body.extend([0xff; 8]);
        writer.block(SECTION_HEADER, &body, &[])?;
        let mut body = LINKTYPE_ETHERNET.to_le_bytes().to_vec();
        body.extend(SNAPLEN.to_le_bytes());
        body.extend(IF_TSRESOL.to_le_bytes());
        body.extend([1, 0, NANOSECONDS, 0, 0, 0]);
        // The end of the options.
        body.extend([0; 4]);
        writer.block(INTERFACE_DESCRIPTION, &body, &[])?;
        Ok(writer)
    }

    /// Adds a packet: its time, ns since the epoch.
    pub fn packet(&mut self, time_ns: u64, frame: &[u8]) -> io::Result<()> {
        let mut header = [0; 20];
        let len = frame.len() as u32;
        for (place, word) in
            header.chunks_exact_mut(4).zip([0, (time_ns >> 32) as u32, time_ns as u32, len, len])
        {
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.block(ENHANCED_PACKET, &header, frame)
    }

    /// A block of two parts, padded to four bytes.
    fn block(&mut self, kind: u32, first: &[u8], second: &[u8]) -> io::Result<()> {
        let padding = second.len().next_multiple_of(4) - second.len();
        let len = (12 + first.len() + second.len() + padding) as u32;
        self.out.write_all(&kind.to_le_bytes())?;
        self.out.write_all(&len.to_le_bytes())?;
        self.out.write_all(first)?;
        self.out.write_all(second)?;
        self.out.write_all(&[0; 3][..padding])?;
        self.out.write_all(&len.to_le_bytes())?;
        self.written += u64::from(len);
        Ok(())
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes out what is buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pcap::{Reader, input::Input};

    #[test]
    fn b062_what_is_written_is_read() {
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.packet(1_700_000_000_123_456_789, b"first").unwrap();
        writer.packet(1_700_000_001_000_000_000, b"").unwrap();
        assert_eq!(writer.written(), writer.out.len() as u64);
        let input = Input::new(io::Cursor::new(writer.out), None).unwrap();
        let mut reader = Reader::new("test".into(), input).unwrap();
        assert!(reader.advance().unwrap());
        let packet = reader.packet().unwrap();
        assert_eq!(
            (packet.time_ns, packet.data, packet.wire_len),
            (1_700_000_000_123_456_789, &b"first"[..], 5)
        );
        assert!(reader.advance().unwrap() && !reader.advance().unwrap());
    }

    #[test]
    fn pcapng_that_is_written_is_read() {
        let mut writer = NgWriter::new(Vec::new()).unwrap();
        let frames: Vec<Vec<u8>> = (0..9).map(|len| vec![len as u8; len]).collect();
        for (i, frame) in frames.iter().enumerate() {
            writer.packet(1_700_000_000_123_456_789 + i as u64, frame).unwrap();
        }
        assert_eq!(writer.written(), writer.out.len() as u64);
        let input = Input::new(io::Cursor::new(writer.out), None).unwrap();
        let mut reader = Reader::new("test".into(), input).unwrap();
        for (i, frame) in frames.iter().enumerate() {
            assert!(reader.advance().unwrap());
            let packet = reader.packet().unwrap();
            assert_eq!((packet.time_ns, packet.data), (1_700_000_000_123_456_789 + i as u64, &frame[..]));
        }
        assert!(!reader.advance().unwrap());
    }
}
