//! The wire format between `loadgen` and `stream-server`, and the records that both keep of it.
//!
//! Little-endian throughout. A request is a header of 24 bytes and its body, a response a header of 16 bytes and its body:
//!
//! ```text
//! request   magic u32 | id u64 | body length u32 | response length u32 | delay u32 (ms) | body
//! response  magic u32 | id u64 | body length u32                                       | body
//! ```
//!
//! Every body byte follows from id and position, so a receiver names the first byte that is not what was sent. The record of
//! a connection carries a hash of all bytes: two servers that got the same stream have the same record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// First word of a request.
const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"RPLQ");
/// First word of a response.
const RESPONSE_MAGIC: u32 = u32::from_le_bytes(*b"RPLA");
/// What a server that greets says first.
pub const GREETING: &[u8; 16] = b"RPLG hello there";
/// Length of a request's header, in bytes.
pub const REQUEST_HEADER: usize = 24;
/// Length of a response's header, in bytes.
pub const RESPONSE_HEADER: usize = 16;
/// No body is longer: a header that says so is damaged.
pub const MAX_BODY: u32 = 1 << 30;

/// What a request's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Unique in a run.
    pub id: u64,
    /// Body bytes that follow.
    pub body: u32,
    /// Body bytes that are asked for.
    pub response: u32,
    /// How long the server waits before it answers, in milliseconds.
    pub delay_ms: u32,
}

impl RequestHeader {
    /// Its bytes on the wire.
    pub fn to_bytes(self) -> [u8; REQUEST_HEADER] {
        let mut bytes = [0; REQUEST_HEADER];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.body.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.response.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.delay_ms.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; REQUEST_HEADER]) -> Option<Self> {
        let header = Self {
            id: u64::from_le_bytes(bytes[4..12].try_into().ok()?),
            body: u32::from_le_bytes(bytes[12..16].try_into().ok()?),
            response: u32::from_le_bytes(bytes[16..20].try_into().ok()?),
            delay_ms: u32::from_le_bytes(bytes[20..24].try_into().ok()?),
        };
        (bytes[0..4] == REQUEST_MAGIC.to_le_bytes() && header.body <= MAX_BODY).then_some(header)
    }
}

/// The header of the response to request `id` with `body` bytes after it.
pub fn response_header(id: u64, body: u32) -> [u8; RESPONSE_HEADER] {
    let mut bytes = [0; RESPONSE_HEADER];
    bytes[0..4].copy_from_slice(&RESPONSE_MAGIC.to_le_bytes());
    bytes[4..12].copy_from_slice(&id.to_le_bytes());
    bytes[12..16].copy_from_slice(&body.to_le_bytes());
    bytes
}

/// Eight bytes of the body of message `id`, the `index`-th such group.
fn body_word(id: u64, index: u64) -> [u8; 8] {
    // The finalizer of SplitMix64 over a counter: each word differs from its neighbours, in this body and in others.
    let mut word = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.wrapping_mul(0xd1b5_4a32_d192_ed03);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (word ^ (word >> 27)).to_le_bytes()
}

/// Appends the body bytes `from..to` of message `id`.
pub fn append_body(id: u64, from: u32, to: u32, out: &mut Vec<u8>) {
    let mut at = from;
    while at < to {
        let word = body_word(id, u64::from(at / 8));
        let start = (at % 8) as usize;
        let count = (8 - start).min((to - at) as usize);
        out.extend_from_slice(&word[start..start + count]);
        at += count as u32;
    }
}

/// Where `bytes`, which should be the body of message `id` from position `from` on, first differ from it.
fn body_mismatch(id: u64, from: u32, bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < bytes.len() {
        let position = from + at as u32;
        let word = body_word(id, u64::from(position / 8));
        let start = (position % 8) as usize;
        let count = (8 - start).min(bytes.len() - at);
        if bytes[at..at + count] != word[start..start + count] {
            return (at..at + count).find(|&index| bytes[index] != word[start + index - at]);
        }
        at += count;
    }
    None
}

/// Hash of a byte stream, 128 bits, the same however the stream is cut into pieces.
///
/// For telling apart streams that differ by accident, not by intent: each step maps the state one to one, so that streams
/// that differ in a single word never collide.
#[derive(Debug, Clone, Default)]
pub struct StreamHash {
    lanes: [u64; 2],
    pending: [u8; 8],
    length: u64,
}

impl StreamHash {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        let filled = (self.length % 8) as usize;
        self.length += bytes.len() as u64;
        if filled > 0 {
            let count = bytes.len().min(8 - filled);
            self.pending[filled..filled + count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if filled + count < 8 {
                return;
            }
            self.word(u64::from_le_bytes(self.pending));
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        self.pending[..rest.len()].copy_from_slice(rest);
    }

    fn word(&mut self, word: u64) {
        self.lanes[0] = (self.lanes[0].rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.lanes[1] = (self.lanes[1].rotate_left(41) ^ word).wrapping_mul(0xd6e8_feb8_6659_fd93);
    }

    /// Number of bytes taken.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The hash so far, as 32 hexadecimal digits.
    pub fn hex(&self) -> String {
        let mut end = self.clone();
        let filled = (end.length % 8) as usize;
        end.pending[filled..].fill(0);
        end.word(u64::from_le_bytes(end.pending));
        end.word(end.length);
        format!("{:016x}{:016x}", end.lanes[0], end.lanes[1])
    }
}

/// Reads messages out of a stream that comes in pieces, checking every byte.
#[derive(Debug, Default)]
pub struct Reader {
    header: Vec<u8>,
    /// The message whose body is being read, and how much of it was.
    body: Option<(RequestHeader, u32)>,
    offset: u64,
    broken: bool,
}

/// The first byte of a stream that is not what its sender sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Bytes of the stream before it.
    pub offset: u64,
    /// What was expected there.
    pub expected: String,
}

impl Reader {
    /// Takes the next bytes of a stream of requests; calls `complete` for each that ends in them. After a mismatch the rest
    /// of the stream is passed over.
    pub fn requests(&mut self, bytes: &[u8], complete: impl FnMut(RequestHeader)) -> Result<(), Mismatch> {
        self.messages::<REQUEST_HEADER>(bytes, RequestHeader::from_bytes, "a request's header", complete)
    }

    /// Takes the next bytes of a stream of responses; calls `complete` with the id of each that ends in them.
    pub fn responses(&mut self, bytes: &[u8], mut complete: impl FnMut(u64)) -> Result<(), Mismatch> {
        let parse = |header: &[u8; RESPONSE_HEADER]| {
            let id = u64::from_le_bytes(header[4..12].try_into().ok()?);
            let body = u32::from_le_bytes(header[12..16].try_into().ok()?);
            let known = header[0..4] == RESPONSE_MAGIC.to_le_bytes() && body <= MAX_BODY;
            known.then_some(RequestHeader { id, body, response: 0, delay_ms: 0 })
        };
        self.messages::<RESPONSE_HEADER>(bytes, parse, "a response's header", |message| complete(message.id))
    }

    /// Whether the stream is at a boundary between messages.
    pub fn at_boundary(&self) -> bool {
        self.header.is_empty() && self.body.is_none() && !self.broken
    }

    fn messages<const N: usize>(
        &mut self,
        mut bytes: &[u8],
        parse: impl Fn(&[u8; N]) -> Option<RequestHeader>,
        header_name: &str,
        mut complete: impl FnMut(RequestHeader),
    ) -> Result<(), Mismatch> {
        while !bytes.is_empty() && !self.broken {
            let Some((message, done)) = self.body else {
                let count = bytes.len().min(N - self.header.len());
                self.header.extend_from_slice(&bytes[..count]);
                bytes = &bytes[count..];
                self.offset += count as u64;
                if let Ok(header) = <&[u8; N]>::try_from(self.header.as_slice()) {
                    match parse(header) {
                        Some(message) if message.body == 0 => complete(message),
                        Some(message) => self.body = Some((message, 0)),
                        None => return self.mismatch(self.offset - N as u64, header_name.to_owned()),
                    }
                    self.header.clear();
                }
                continue;
            };
            let count = bytes.len().min((message.body - done) as usize);
            if let Some(at) = body_mismatch(message.id, done, &bytes[..count]) {
                let position = u64::from(done) + at as u64;
                return self.mismatch(
                    self.offset + at as u64,
                    format!("byte {position} of the body of {}", message.id),
                );
            }
            bytes = &bytes[count..];
            self.offset += count as u64;
            let done = done + count as u32;
            self.body = Some((message, done));
            if done == message.body {
                self.body = None;
                complete(message);
            }
        }
        Ok(())
    }

    fn mismatch(&mut self, offset: u64, expected: String) -> Result<(), Mismatch> {
        self.broken = true;
        Err(Mismatch { offset, expected })
    }
}

/// How a connection ended, as a server saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// Not yet.
    Open,
    /// The client's FIN came.
    Fin,
    /// A RST came.
    Rst,
    /// The server itself closed first.
    Server,
}

/// What a server received on one connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Connection {
    /// Address and port of the client.
    pub peer: String,
    /// Bytes received.
    pub bytes: u64,
    /// [`StreamHash`] of them.
    pub hash: String,
    /// Ids of the requests that came whole, in order.
    pub ids: Vec<u64>,
    /// When each of them was whole, in microseconds since the epoch.
    pub times_us: Vec<u64>,
    /// When the connection was accepted, in microseconds since the epoch.
    pub opened_us: u64,
    /// When it ended, in microseconds since the epoch.
    #[serde(default)]
    pub ended_us: Option<u64>,
    /// How often bytes of a request came before the answer to the request before it had been written out whole.
    pub early: u64,
    /// Whether the stream stops between two requests.
    pub at_boundary: bool,
    /// How it ended.
    pub end: End,
    /// The first byte that is not what was sent, if there is one.
    pub mismatch: Option<String>,
}

/// What `stream-server` writes: its connections in the order in which they came.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// One for each accepted connection.
    pub connections: Vec<Connection>,
}

impl Record {
    /// Requests that came whole.
    pub fn requests(&self) -> usize {
        self.connections.iter().map(|connection| connection.ids.len()).sum()
    }

    /// Bytes received on all connections.
    pub fn bytes(&self) -> u64 {
        self.connections.iter().map(|connection| connection.bytes).sum()
    }

    fn by_peer(&self) -> BTreeMap<&str, Vec<&Connection>> {
        let mut peers: BTreeMap<&str, Vec<&Connection>> = BTreeMap::new();
        for connection in &self.connections {
            peers.entry(&connection.peer).or_default().push(connection);
        }
        peers
    }
}

/// Two servers' streams, paired by client address and, where a client used a port again, by order.
#[derive(Debug, Default, Serialize)]
pub struct Comparison {
    /// Connections at the online server.
    pub compared: usize,
    /// Those whose stream at the target is the same, byte for byte.
    pub equal: usize,
    /// What is different about the others, one line each.
    pub differences: Vec<String>,
}

/// Compares what the target received with what the online server received.
pub fn compare(online: &Record, target: &Record) -> Comparison {
    let mut result = Comparison::default();
    let at_target = target.by_peer();
    for (peer, expected) in online.by_peer() {
        let found = at_target.get(peer).map_or(&[][..], Vec::as_slice);
        result.compared += expected.len();
        for (index, want) in expected.iter().enumerate() {
            match found.get(index) {
                Some(got) if (got.bytes, &got.hash) == (want.bytes, &want.hash) => result.equal += 1,
                Some(got) => result.differences.push(difference(want, got)),
                None => result
                    .differences
                    .push(format!("{peer}: {} bytes online, no connection at the target", want.bytes)),
            }
        }
        for extra in found.iter().skip(expected.len()) {
            result
                .differences
                .push(format!("{peer}: one connection more at the target, {} bytes", extra.bytes));
        }
    }
    let strangers = at_target.keys().filter(|peer| !online.connections.iter().any(|c| c.peer == ***peer));
    result.differences.extend(strangers.map(|peer| format!("{peer}: at the target only")));
    result
}

/// Compares streams whatever addresses they came from: each of the online server's must be at the target `copies` times.
pub fn compare_copies(online: &Record, target: &Record, copies: usize) -> Comparison {
    let mut result = Comparison { compared: online.connections.len() * copies, ..Comparison::default() };
    let mut balance: BTreeMap<(&str, u64), (isize, &Connection)> = BTreeMap::new();
    for connection in &online.connections {
        balance.entry((&connection.hash, connection.bytes)).or_insert((0, connection)).0 += copies as isize;
    }
    for connection in &target.connections {
        let (left, _) = balance.entry((&connection.hash, connection.bytes)).or_insert((0, connection));
        result.equal += usize::from(*left > 0);
        *left -= 1;
    }
    result.differences = balance
        .into_values()
        .filter(|(left, _)| *left != 0)
        .map(|(left, stream)| {
            let what = if left > 0 { "missing at the target" } else { "too many at the target" };
            format!(
                "{} of {} bytes, {} requests from {}: {} {what}",
                stream.hash,
                stream.bytes,
                stream.ids.len(),
                stream.peer,
                left.unsigned_abs()
            )
        })
        .collect();
    result
}

fn difference(want: &Connection, got: &Connection) -> String {
    let cause = got.mismatch.clone().unwrap_or_else(|| {
        let same = want.ids.iter().zip(&got.ids).take_while(|(a, b)| a == b).count();
        format!("{same} of {} requests are the same", want.ids.len())
    });
    format!(
        "{}: {} bytes online, {} at the target ({:?}): {cause}",
        want.peer, want.bytes, got.bytes, got.end
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: u64, body: u32) -> Vec<u8> {
        let mut bytes = RequestHeader { id, body, response: 5, delay_ms: 7 }.to_bytes().to_vec();
        append_body(id, 0, body, &mut bytes);
        bytes
    }

    fn read(pieces: impl Iterator<Item = Vec<u8>>) -> (Vec<RequestHeader>, Result<(), Mismatch>, Reader) {
        let mut reader = Reader::default();
        let mut complete = Vec::new();
        let mut result = Ok(());
        for piece in pieces {
            result = result.and(reader.requests(&piece, |header| complete.push(header)));
        }
        (complete, result, reader)
    }

    #[test]
    fn requests_come_out_whole_however_the_stream_is_cut() {
        let stream: Vec<u8> = [request(1, 0), request(2, 13), request(3, 4096)].concat();
        for size in [1, 2, 3, 7, 24, 25, 1000, stream.len()] {
            let (complete, result, reader) = read(stream.chunks(size).map(<[u8]>::to_vec));
            assert_eq!(result, Ok(()));
            assert_eq!(complete.iter().map(|header| header.id).collect::<Vec<_>>(), [1, 2, 3]);
            assert_eq!(complete[1], RequestHeader { id: 2, body: 13, response: 5, delay_ms: 7 });
            assert!(reader.at_boundary());
        }
    }

    #[test]
    fn the_first_wrong_byte_is_named() {
        let mut stream = [request(1, 100), request(2, 50)].concat();
        stream[REQUEST_HEADER + 33] ^= 1;
        let (complete, result, reader) = read(std::iter::once(stream.clone()));
        assert!(complete.is_empty() && !reader.at_boundary());
        assert_eq!(result.unwrap_err().offset, REQUEST_HEADER as u64 + 33);

        stream[REQUEST_HEADER + 33] ^= 1;
        stream.remove(0);
        assert_eq!(read(std::iter::once(stream)).1.unwrap_err().offset, 0);
    }

    #[test]
    fn responses_come_out_in_order() {
        let mut stream = response_header(9, 3).to_vec();
        append_body(9, 0, 3, &mut stream);
        stream.extend(response_header(10, 0));
        let mut reader = Reader::default();
        let mut ids = Vec::new();
        for byte in stream {
            reader.responses(&[byte], |id| ids.push(id)).unwrap();
        }
        assert_eq!(ids, [9, 10]);
    }

    #[test]
    fn a_body_is_the_same_in_pieces() {
        let (mut whole, mut pieces) = (Vec::new(), Vec::new());
        append_body(5, 0, 1000, &mut whole);
        for (from, to) in [(0, 1), (1, 9), (9, 500), (500, 1000)] {
            append_body(5, from, to, &mut pieces);
        }
        assert_eq!(whole, pieces);
    }

    #[test]
    fn a_hash_tells_streams_apart_and_not_their_pieces() {
        let bytes: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        let hash = |size: usize, bytes: &[u8]| {
            let mut hash = StreamHash::default();
            bytes.chunks(size).for_each(|piece| hash.update(piece));
            hash.hex()
        };
        for size in [1, 3, 8, 9, 64] {
            assert_eq!(hash(size, &bytes), hash(1000, &bytes));
        }
        assert_ne!(hash(1000, &bytes), hash(1000, &bytes[..999]));
        // Swapped neighbours, and zeros at the end.
        let mut other = bytes.clone();
        other.swap(8, 16);
        assert_ne!(hash(1000, &bytes), hash(1000, &other));
        assert_ne!(hash(8, &[0; 7]), hash(8, &[0; 8]));
    }

    fn connection(peer: &str, hash: &str) -> Connection {
        Connection {
            peer: peer.into(),
            bytes: 10,
            hash: hash.into(),
            ids: vec![1],
            times_us: vec![0],
            opened_us: 0,
            ended_us: None,
            early: 0,
            at_boundary: true,
            end: End::Fin,
            mismatch: None,
        }
    }

    #[test]
    fn copies_are_counted_by_their_bytes() {
        let online = Record { connections: vec![connection("a", "1"), connection("b", "2")] };
        let copies = |hashes: &[&str]| Record {
            connections: hashes.iter().map(|hash| connection("c", hash)).collect(),
        };
        let result = compare_copies(&online, &copies(&["1", "2", "2", "1"]), 2);
        assert_eq!((result.compared, result.equal, result.differences.len()), (4, 4, 0));
        let result = compare_copies(&online, &copies(&["1", "2", "2", "3"]), 2);
        assert_eq!((result.compared, result.equal, result.differences.len()), (4, 3, 2));
    }

    #[test]
    fn a_comparison_pairs_connections_by_peer_and_order() {
        let online =
            Record { connections: vec![connection("a", "1"), connection("b", "2"), connection("a", "3")] };
        assert_eq!(compare(&online, &online).equal, 3);
        let target =
            Record { connections: vec![connection("a", "1"), connection("a", "4"), connection("c", "2")] };
        let result = compare(&online, &target);
        assert_eq!((result.compared, result.equal, result.differences.len()), (3, 1, 3));
    }
}
