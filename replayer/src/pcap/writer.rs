//! Writing Ethernet frames to a pcap file with nanoseconds.

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
    pub fn create(path: &Path) -> io::Result<Self> {
        Writer::new(BufWriter::with_capacity(1 << 18, File::create(path)?))
    }
}

impl<W: Write> Writer<W> {
    /// Begins with the file's header.
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
}
