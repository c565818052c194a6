//! What crossed the wires of a simulation, as a capture file that Wireshark reads: `PCAP=file`. Captured packets, what the engine sent
//! and what the target sent, each as it was at its source.

use crate::streams::read;
use replayer_common::addr::Endpoint;
use replayer_common::response::ResponseHeader;
use std::fs::File;
use std::io::{BufWriter, Write};

/// A file that is being written, lines that are printed, or nothing.
#[derive(Default)]
pub struct Recording {
    file: Option<BufWriter<File>>,
    trace: bool,
}

impl Recording {
    pub fn none() -> Recording {
        Recording::default()
    }

    /// The file that `PCAP` names; lines if `TRACE` is set.
    pub fn from_environment() -> Recording {
        let trace = std::env::var_os("TRACE").is_some();
        let Some(path) = std::env::var_os("PCAP") else { return Recording { file: None, trace } };
        let file = File::create(&path).unwrap_or_else(|error| panic!("PCAP={}: {error}", path.display()));
        let mut file = BufWriter::new(file);
        // Nanoseconds, Ethernet: https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-03.html
        for word in [0xa1b2_3c4du32, 2 | 4 << 16, 0, 0, 1 << 18, 1] {
            file.write_all(&word.to_le_bytes()).unwrap();
        }
        Recording { file: Some(file), trace }
    }

    pub fn captured(&mut self, at: u64, frame: &[u8]) {
        self.print(at, "captured", frame);
        self.write(at, &[frame]);
    }

    /// A header record reaches the engine.
    pub fn record(&mut self, at: u64, record: &ResponseHeader) {
        if self.trace {
            let to = Endpoint { ip: record.addr, port: record.port };
            let text = (record.seq, record.payload_len, record.ack, record.window);
            println!("{:>10} {to} <- {} {text:?} sack {}", at / 1000, flags(record.flags), record.sack_count);
        }
    }

    pub fn sent(&mut self, at: u64, frame: &[u8]) {
        self.print(at, "->", frame);
        self.write(at, &[frame]);
    }

    pub fn target(&mut self, at: u64, ip: &[u8]) {
        let ethertype: [u8; 2] = if ip[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
        self.print(at, "target", &[&[0; 12], &ethertype[..], ip].concat());
        self.write(at, &[&[2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4], &ethertype, ip]);
    }

    fn print(&self, at: u64, what: &str, frame: &[u8]) {
        if self.trace
            && let Some(seen) = read(frame)
        {
            let text = (seen.seq, seen.payload.1 - seen.payload.0, seen.ack);
            let flags = flags(seen.flags);
            println!("{:>10} {} {what} {} {flags} {text:?}", at / 1000, seen.source, seen.destination);
        }
    }

    fn write(&mut self, at: u64, parts: &[&[u8]]) {
        let Some(file) = &mut self.file else { return };
        let len = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
        for word in [(at / 1_000_000_000) as u32, (at % 1_000_000_000) as u32, len, len] {
            file.write_all(&word.to_le_bytes()).unwrap();
        }
        for part in parts {
            file.write_all(part).unwrap();
        }
        // A panic must not keep what led to it.
        file.flush().unwrap();
    }
}

fn flags(bits: u8) -> String {
    (0..6).filter(|bit| bits & 1 << bit != 0).map(|bit| ['F', 'S', 'R', 'P', 'A', 'U'][bit]).collect()
}
