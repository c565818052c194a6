//! Bytes of a capture file or of standard input, decompressed when they are compressed. What they are is told by their first bytes, not
//! by a name.

use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The name that means standard input.
pub const STANDARD_INPUT: &str = "-";
/// The most memory that an xz file may ask for, KiB: `xz -9` needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 512 << 10;
/// Bytes are decompressed in pieces of this size: where a file is damaged, no more than that is lost of what was before.
const DECOMPRESSED_PIECE: usize = 16 << 10;
/// Compressed bytes are read in pieces of this size.
const COMPRESSED_BUFFER: usize = 128 << 10;

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952; several members one after the other are one.
    Gzip,
    /// .xz; several streams one after the other are one.
    Xz,
    /// RFC 8878; several frames one after the other are one.
    Zstd,
}

impl Compression {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
        }
    }

    fn of(first: &[u8]) -> Compression {
        match first {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
            // A frame, or a frame to be skipped, with which some writers begin.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

/// An open file.
pub struct Input {
    reader: Box<dyn Read + Send>,
    /// How it is compressed.
    pub compression: Compression,
    /// The file's size, bytes; `None` when it has none (a pipe).
    pub size: Option<u64>,
    read: Arc<AtomicU64>,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input").field("compression", &self.compression).field("size", &self.size).finish()
    }
}

impl Input {
    /// Opens a file, or standard input for `-`.
    ///
    /// # Errors
    /// The file system's; when it is compressed, and not as it should be.
    pub fn open(path: &Path) -> io::Result<Input> {
        if path.as_os_str() == STANDARD_INPUT {
            return Input::new(io::stdin(), None);
        }
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
        }
        Input::new(file, metadata.is_file().then_some(metadata.len()))
    }

    /// Reads from anything.
    ///
    /// # Errors
    /// That of `source`, whose first bytes are read; when they are of a compression and wrong.
    pub fn new(source: impl Read + Send + 'static, size: Option<u64>) -> io::Result<Input> {
        let read = Arc::new(AtomicU64::new(0));
        let mut source = Counted { source, read: read.clone() };
        let mut first = [0; 6];
        let mut len = 0;
        while len < first.len() {
            match source.read(&mut first[len..]) {
                Ok(0) => break,
                Ok(count) => len += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let compression = Compression::of(&first[..len]);
        let whole = Cursor::new(first[..len].to_vec()).chain(source);
        let buffered = |whole| BufReader::with_capacity(COMPRESSED_BUFFER, whole);
        let reader: Box<dyn Read + Send> = match compression {
            Compression::None => Box::new(whole),
            Compression::Gzip => Box::new(MultiGzDecoder::new(buffered(whole))),
            Compression::Xz => Box::new(XzReader::new_mem_limit(buffered(whole), true, XZ_MEMORY_KIB)),
            Compression::Zstd => Box::new(ZstdFrames::new(buffered(whole))),
        };
        Ok(Input { reader, compression, size, read })
    }

    /// How many bytes of the file itself have been read so far, for showing progress.
    pub fn position(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = match self.compression {
            Compression::None => buffer.len(),
            _ => buffer.len().min(DECOMPRESSED_PIECE),
        };
        self.reader.read(&mut buffer[..len])
    }
}

/// Counts what is read.
struct Counted<R> {
    source: R,
    read: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// All frames of a zstd file: the library's decoder knows one.
struct ZstdFrames<R: Read> {
    source: BufReader<R>,
    decoder: FrameDecoder,
    within: bool,
}

impl<R: Read> ZstdFrames<R> {
    fn new(source: BufReader<R>) -> ZstdFrames<R> {
        ZstdFrames { source, decoder: FrameDecoder::new(), within: false }
    }

    /// Begins the next frame; false at the end of the file.
    fn begin(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.within && !self.begin()? {
                return Ok(0);
            }
            self.within = true;
            if self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBytes(buffer.len().max(1)))
                    .map_err(io::Error::other)?;
            }
            let count = self.decoder.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            if self.decoder.is_finished() {
                self.within = false;
                let said = self.decoder.get_checksum_from_data();
                if said.is_some() && said != self.decoder.get_calculated_checksum() {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a zstd frame's checksum is wrong",
                    ));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(bytes: Vec<u8>) -> (Compression, io::Result<Vec<u8>>) {
        let mut input = Input::new(Cursor::new(bytes), None).unwrap();
        let mut out = Vec::new();
        let result = input.read_to_end(&mut out).map(|_| out);
        (input.compression, result)
    }

    fn text() -> Vec<u8> {
        (0..200_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn b060_parts_of_a_compressed_file_are_one() {
        let text = text();
        let (first, second) = text.split_at(300_000);
        for (compress, expected) in
            [(gzip as fn(&[u8]) -> Vec<u8>, Compression::Gzip), (zstd, Compression::Zstd)]
        {
            let (compression, out) = read([compress(first), compress(second)].concat());
            assert_eq!(compression, expected);
            assert!(out.unwrap() == text, "{expected:?}");
        }
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd(&text)].concat();
        assert!(read(skipped).1.unwrap() == text);
        assert!(read(text.clone()).1.unwrap() == text);
        assert!(read(Vec::new()).1.unwrap().is_empty());
    }

    /// `xz -0` of forty times 0123456789.
    const XZ: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x04, 0xe6, 0xd6, 0xb4, 0x46, 0x02, 0x00, 0x21, 0x01, 0x0c,
        0x00, 0x00, 0x00, 0x8f, 0x98, 0x41, 0x9c, 0xe0, 0x01, 0x8f, 0x00, 0x12, 0x5d, 0x00, 0x18, 0x0c, 0x42,
        0x92, 0x6a, 0x67, 0xbc, 0x0e, 0xd1, 0x33, 0x34, 0x12, 0x3b, 0x0a, 0xd2, 0x4b, 0xa0, 0x00, 0x00, 0x00,
        0x00, 0xc9, 0x84, 0x92, 0xe6, 0x2e, 0x98, 0x80, 0x36, 0x00, 0x01, 0x2e, 0x90, 0x03, 0x00, 0x00, 0x00,
        0x65, 0x38, 0x40, 0x3d, 0xb1, 0xc4, 0x67, 0xfb, 0x02, 0x00, 0x00, 0x00, 0x00, 0x04, 0x59, 0x5a,
    ];

    #[test]
    fn b060_xz() {
        let text = b"0123456789".repeat(40);
        let (compression, out) = read([XZ, XZ].concat());
        assert_eq!(compression, Compression::Xz);
        assert!(out.unwrap() == text.repeat(2));
        assert!(read(XZ[..XZ.len() / 2].to_vec()).1.is_err());
    }

    #[test]
    fn b060_a_damaged_or_cut_compressed_file_is_an_error() {
        for good in [gzip(&text()), zstd(&text())] {
            assert!(read(good[..good.len() / 2].to_vec()).1.is_err());
            let mut bad = good.clone();
            let middle = bad.len() / 2;
            for byte in &mut bad[middle..middle + 8] {
                *byte ^= 0x55;
            }
            assert!(read(bad).1.is_err());
        }
    }
}
