//! The return channel's bytes: framing, message kinds, records.
//!
//! Everything that arrives is hostile until proved otherwise: [`decode`] is total, never panics, never allocates, and asks
//! for more bytes only while what came so far can still become a message. No sockets and no policy here.
//!
//! ```text
//! message:      kind u8 | 0 u8 | length of the body u16 | body          (all numbers little endian)
//!
//! Hello         magic "replayer" | version u16 | worker u16 | attempt u32 | instance u64 | key length u8 | key
//! Services      { id u16 | port u16 | address 16 | protocol u8 | 0 u8 } ...   what the ids of this connection mean
//! Register      { service id u16 | port u16 | address 16 } ...           identities whose responses this worker wants
//! Unregister    the same
//! Heartbeat     (empty)
//! RenewBegin    (empty)                                                  from here on all live identities come again;
//! RenewEnd      (empty)                                                  what has not come by now is forgotten
//!
//! Welcome       version u16 | 0 u16 | instance u64
//! Refused       reason u8 | 0 u8 | version u16
//! Headers       { 72 bytes: ResponseHeader } ...
//! Counters      sent u64 | dropped u64                                   records for this peer; doubles as heartbeat
//! ```
//!
//! The framing, the first ten bytes of Hello, and Refused are the same in every version, so that two versions can at
//! least tell each other so.

use super::limits::{MAX_BODY, MAX_KEY};
use replayer_common::addr::{Endpoint, Ip};
use replayer_common::packet::Protocol;
use replayer_common::response::ResponseHeader;

/// The protocol's version: any change of meaning or layout raises it.
pub const VERSION: u16 = 2;

const MAGIC: [u8; 8] = *b"replayer";

/// Bytes before a message's body.
pub const FRAMING: usize = 4;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // The table in the file's header says it better.
pub enum Kind {
    Hello = 1,
    Services = 2,
    Register = 3,
    Unregister = 4,
    Heartbeat = 5,
    RenewBegin = 6,
    RenewEnd = 7,
    Hurry = 8,
    Welcome = 16,
    Refused = 17,
    Headers = 18,
    Counters = 19,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Hello,
            2 => Kind::Services,
            3 => Kind::Register,
            4 => Kind::Unregister,
            5 => Kind::Heartbeat,
            6 => Kind::RenewBegin,
            7 => Kind::RenewEnd,
            8 => Kind::Hurry,
            16 => Kind::Welcome,
            17 => Kind::Refused,
            18 => Kind::Headers,
            19 => Kind::Counters,
            _ => return None,
        })
    }
}

/// Why bytes are not this protocol. The connection that they came from is of no further use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first byte names no message.
    #[error("not the return channel's protocol")]
    UnknownKind,
    /// A body longer than [`MAX_BODY`], or not of the length that its kind has.
    #[error("a message of impossible length")]
    Length,
    /// A hello without the magic.
    #[error("a hello of another protocol")]
    Magic,
    /// A hello, service or answer whose fields make no sense.
    #[error("a malformed message")]
    Malformed,
}

/// Who a worker of an online role is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Random, one per process: tells a worker that reconnects from another that took its address.
    pub instance: u64,
    /// The worker's number in its process.
    pub worker: u16,
    /// Counts this worker's connections, so that a late hello of an older one cannot displace a newer one.
    pub attempt: u32,
    /// The shared key, at most [`MAX_KEY`] bytes.
    pub key: &'a [u8],
}

/// One of a connection's services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Its number on this connection.
    pub service: u16,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// The target.
    pub target: Endpoint,
}

impl ServiceEntry {
    /// Bytes on the wire.
    pub const SIZE: usize = Entry::SIZE + 2;

    /// The record's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let entry = Entry { service: self.service, endpoint: self.target };
        out[..Entry::SIZE].copy_from_slice(&entry.encode());
        out[Entry::SIZE] = self.protocol.number();
        out
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`WireError::Malformed`]: a protocol that is not known.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<ServiceEntry, WireError> {
        let Some((entry, &[protocol, 0])) = bytes.split_first_chunk() else {
            return Err(WireError::Malformed);
        };
        let Entry { service, endpoint: target } = Entry::decode(entry);
        let protocol = Protocol::from_number(protocol).ok_or(WireError::Malformed)?;
        Ok(ServiceEntry { service, protocol, target })
    }
}

/// One of a connection's identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The service's number on this connection.
    pub service: u16,
    /// The identity: the source of a session towards the target.
    pub endpoint: Endpoint,
}

impl Entry {
    /// Bytes on the wire.
    pub const SIZE: usize = 20;

    /// The record's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        out[..2].copy_from_slice(&self.service.to_le_bytes());
        out[2..4].copy_from_slice(&self.endpoint.port.to_le_bytes());
        out[4..].copy_from_slice(&self.endpoint.ip);
        out
    }

    /// Reads a record; every bit pattern is one.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Entry {
        let [s0, s1, p0, p1, ip @ ..] = *bytes;
        let ip: Ip = ip;
        Entry {
            service: u16::from_le_bytes([s0, s1]),
            endpoint: Endpoint { ip, port: u16::from_le_bytes([p0, p1]) },
        }
    }
}

/// Why an assistant refuses a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Refusal {
    /// Another protocol version.
    #[error("it speaks another version of the protocol; run the same release of replayer on both hosts")]
    Version = 1,
    /// Another key.
    #[error("the keys differ; give both roles the same --key")]
    Key = 2,
    /// As many peers as it takes.
    #[error("it has as many peers as it takes; use a further assistant")]
    Full = 3,
    /// Bytes that are not this protocol.
    #[error("it could not read what it was sent; run the same release of replayer on both hosts")]
    Protocol = 4,
    /// No complete hello in time.
    #[error("the hello did not arrive in time; look at the path between the hosts")]
    Slow = 5,
    /// A newer connection of the same worker exists.
    #[error("a newer connection of the same worker took its place")]
    Superseded = 6,
    /// A service that it cannot serve, because its tables are full.
    #[error("its table of services is full; name fewer services or use a further assistant")]
    Services = 7,
    /// A reason that this version has no name for.
    #[error(
        "it gave a reason that this version does not know; run the same release of replayer on both hosts"
    )]
    Other = 255,
}

impl Refusal {
    fn from_byte(byte: u8) -> Refusal {
        match byte {
            1 => Refusal::Version,
            2 => Refusal::Key,
            3 => Refusal::Full,
            4 => Refusal::Protocol,
            5 => Refusal::Slow,
            6 => Refusal::Superseded,
            7 => Refusal::Services,
            _ => Refusal::Other,
        }
    }
}

/// A decoded message; records are views of the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The table in the file's header says it better.
pub enum Message<'a> {
    Hello(Hello<'a>),
    /// A hello of another version; nothing else can be known of it.
    OtherVersion(u16),
    Services(&'a [[u8; ServiceEntry::SIZE]]),
    Register(&'a [[u8; Entry::SIZE]]),
    Unregister(&'a [[u8; Entry::SIZE]]),
    Heartbeat,
    RenewBegin,
    RenewEnd,
    Hurry,
    Welcome {
        instance: u64,
    },
    Refused {
        reason: Refusal,
        version: u16,
    },
    Headers(&'a [[u8; ResponseHeader::SIZE]]),
    Counters {
        sent: u64,
        dropped: u64,
    },
}

/// Reads the message at the beginning of `bytes`. `Ok(None)` asks for more bytes, otherwise the number says how many the
/// message took.
///
/// # Errors
/// [`WireError`]: no further bytes can make this a message.
pub fn decode(bytes: &[u8]) -> Result<Option<(Message<'_>, usize)>, WireError> {
    let Some(&first) = bytes.first() else { return Ok(None) };
    let kind = Kind::from_byte(first).ok_or(WireError::UnknownKind)?;
    let Some((&[_, zero, low, high], rest)) = bytes.split_first_chunk::<FRAMING>() else { return Ok(None) };
    let length = usize::from(u16::from_le_bytes([low, high]));
    if zero != 0 || length > MAX_BODY {
        return Err(WireError::Length);
    }
    if kind == Kind::Hello && !MAGIC.starts_with(&rest[..rest.len().min(length).min(MAGIC.len())]) {
        // Said early: a stranger whose first bytes happen to look like framing is not waited for.
        return Err(WireError::Magic);
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    Ok(Some((decode_body(kind, body)?, FRAMING + length)))
}

fn decode_body(kind: Kind, body: &[u8]) -> Result<Message<'_>, WireError> {
    let message = match kind {
        Kind::Hello => decode_hello(body)?,
        Kind::Services => Message::Services(records(body)?),
        Kind::Register => Message::Register(records(body)?),
        Kind::Unregister => Message::Unregister(records(body)?),
        Kind::Headers => Message::Headers(records(body)?),
        Kind::Heartbeat => empty(body, Message::Heartbeat)?,
        Kind::RenewBegin => empty(body, Message::RenewBegin)?,
        Kind::RenewEnd => empty(body, Message::RenewEnd)?,
        Kind::Hurry => empty(body, Message::Hurry)?,
        Kind::Welcome => {
            let [v0, v1, 0, 0, instance @ ..] = *array::<12>(body)? else { return Err(WireError::Malformed) };
            if u16::from_le_bytes([v0, v1]) != VERSION {
                return Err(WireError::Malformed);
            }
            Message::Welcome { instance: u64::from_le_bytes(instance) }
        }
        Kind::Refused => {
            let [reason, _, v0, v1] = *array::<4>(body)?;
            Message::Refused { reason: Refusal::from_byte(reason), version: u16::from_le_bytes([v0, v1]) }
        }
        Kind::Counters => {
            let (&[sent, dropped], []) = array::<16>(body)?.as_chunks::<8>() else {
                return Err(WireError::Length);
            };
            Message::Counters { sent: u64::from_le_bytes(sent), dropped: u64::from_le_bytes(dropped) }
        }
    };
    Ok(message)
}

fn decode_hello(body: &[u8]) -> Result<Message<'_>, WireError> {
    let (magic, rest) = body.split_first_chunk::<8>().ok_or(WireError::Length)?;
    let (version, rest) = rest.split_first_chunk::<2>().ok_or(WireError::Length)?;
    if *magic != MAGIC {
        return Err(WireError::Magic);
    }
    let version = u16::from_le_bytes(*version);
    if version != VERSION {
        return Ok(Message::OtherVersion(version));
    }
    let (worker, rest) = rest.split_first_chunk::<2>().ok_or(WireError::Length)?;
    let (attempt, rest) = rest.split_first_chunk::<4>().ok_or(WireError::Length)?;
    let (instance, rest) = rest.split_first_chunk::<8>().ok_or(WireError::Length)?;
    let (&key_length, key) = rest.split_first().ok_or(WireError::Length)?;
    if key.len() != usize::from(key_length) {
        return Err(WireError::Malformed);
    }
    Ok(Message::Hello(Hello {
        instance: u64::from_le_bytes(*instance),
        worker: u16::from_le_bytes(*worker),
        attempt: u32::from_le_bytes(*attempt),
        key,
    }))
}

fn records<const N: usize>(body: &[u8]) -> Result<&[[u8; N]], WireError> {
    match body.as_chunks() {
        (records, []) => Ok(records),
        _ => Err(WireError::Length),
    }
}

fn array<const N: usize>(body: &[u8]) -> Result<&[u8; N], WireError> {
    body.try_into().map_err(|_| WireError::Length)
}

fn empty<'a>(body: &[u8], message: Message<'a>) -> Result<Message<'a>, WireError> {
    if body.is_empty() { Ok(message) } else { Err(WireError::Length) }
}

/// The four bytes before a body of `length` bytes, which is at most [`MAX_BODY`].
pub(super) fn framing(kind: Kind, length: usize) -> [u8; FRAMING] {
    debug_assert!(length <= MAX_BODY);
    let [low, high] = (length as u16).to_le_bytes();
    [kind as u8, 0, low, high]
}

/// A hello's body, and how many of its bytes count. A longer key is cut at [`MAX_KEY`] bytes.
pub(super) fn hello(hello: &Hello<'_>) -> ([u8; 25 + MAX_KEY], usize) {
    let mut body = [0; 25 + MAX_KEY];
    let key = &hello.key[..hello.key.len().min(MAX_KEY)];
    body[..8].copy_from_slice(&MAGIC);
    body[8..10].copy_from_slice(&VERSION.to_le_bytes());
    body[10..12].copy_from_slice(&hello.worker.to_le_bytes());
    body[12..16].copy_from_slice(&hello.attempt.to_le_bytes());
    body[16..24].copy_from_slice(&hello.instance.to_le_bytes());
    body[24] = key.len() as u8;
    body[25..25 + key.len()].copy_from_slice(key);
    (body, 25 + key.len())
}

/// A welcome's body.
pub(super) fn welcome(instance: u64) -> [u8; 12] {
    let mut body = [0; 12];
    body[..2].copy_from_slice(&VERSION.to_le_bytes());
    body[4..].copy_from_slice(&instance.to_le_bytes());
    body
}

/// A refusal's body.
pub(super) fn refused(reason: Refusal) -> [u8; 4] {
    let [low, high] = VERSION.to_le_bytes();
    [reason as u8, 0, low, high]
}

/// The body of a peer's counters.
pub(super) fn counters(sent: u64, dropped: u64) -> [u8; 16] {
    let mut body = [0; 16];
    body[..8].copy_from_slice(&sent.to_le_bytes());
    body[8..].copy_from_slice(&dropped.to_le_bytes());
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::addr::from_v4;

    fn message(kind: Kind, body: &[u8]) -> Vec<u8> {
        [&framing(kind, body.len())[..], body].concat()
    }

    /// One of each message, as bytes.
    fn all() -> Vec<Vec<u8>> {
        let entries = [
            Entry { service: 1, endpoint: Endpoint { ip: from_v4([192, 0, 2, 1]), port: 40_000 } },
            Entry { service: 65_535, endpoint: Endpoint { ip: [7; 16], port: 1 } },
        ];
        let bytes: Vec<u8> = entries.iter().flat_map(Entry::encode).collect();
        let service = ServiceEntry { service: 1, protocol: Protocol::Udp, target: entries[0].endpoint };
        let (body, length) = hello(&Hello { instance: 42, worker: 3, attempt: 9, key: b"a key" });
        vec![
            message(Kind::Hello, &body[..length]),
            message(Kind::Services, &service.encode()),
            message(Kind::Register, &bytes),
            message(Kind::Unregister, &bytes[..20]),
            message(Kind::Heartbeat, &[]),
            message(Kind::RenewBegin, &[]),
            message(Kind::RenewEnd, &[]),
            message(Kind::Welcome, &welcome(77)),
            message(Kind::Refused, &refused(Refusal::Key)),
            message(Kind::Headers, &ResponseHeader { seq: 5, ..Default::default() }.encode()),
            message(Kind::Counters, &counters(1, 2)),
        ]
    }

    #[test]
    fn each_message_survives_the_wire() {
        let bytes = all();
        let decoded: Vec<_> = bytes.iter().map(|bytes| decode(bytes).unwrap().unwrap()).collect();
        for ((_, used), bytes) in decoded.iter().zip(&bytes) {
            assert_eq!(*used, bytes.len());
        }
        assert_eq!(
            decoded[0].0,
            Message::Hello(Hello { instance: 42, worker: 3, attempt: 9, key: b"a key" })
        );
        let Message::Services([service]) = decoded[1].0 else { panic!("{:?}", decoded[1]) };
        let service = ServiceEntry::decode(service).unwrap();
        assert_eq!((service.service, service.protocol), (1, Protocol::Udp));
        assert_eq!(service.target.to_std().to_string(), "192.0.2.1:40000");
        let Message::Register(records) = decoded[2].0 else { panic!("{:?}", decoded[2]) };
        assert_eq!(Entry::decode(&records[0]).endpoint.to_std().to_string(), "192.0.2.1:40000");
        assert_eq!(Entry::decode(&records[1]).service, 65_535);
        assert_eq!(decoded[4].0, Message::Heartbeat);
        assert_eq!(decoded[7].0, Message::Welcome { instance: 77 });
        assert_eq!(decoded[8].0, Message::Refused { reason: Refusal::Key, version: VERSION });
        let Message::Headers([record]) = decoded[9].0 else { panic!("{:?}", decoded[9]) };
        assert_eq!(ResponseHeader::decode(record).seq, 5);
        assert_eq!(decoded[10].0, Message::Counters { sent: 1, dropped: 2 });
    }

    #[test]
    fn every_truncation_asks_for_more() {
        for bytes in all() {
            for end in 0..bytes.len() {
                assert_eq!(decode(&bytes[..end]), Ok(None), "{end} of {bytes:?}");
            }
        }
    }

    #[test]
    fn what_follows_a_message_is_not_read() {
        for bytes in all() {
            let longer = [&bytes[..], &[0xff; 9]].concat();
            assert_eq!(decode(&longer).unwrap().unwrap().1, bytes.len());
        }
    }

    #[test]
    fn strangers_are_known_by_their_first_bytes() {
        assert_eq!(decode(b"GET / HTTP/1.1\r\n"), Err(WireError::UnknownKind));
        assert_eq!(decode(b"\x16\x03\x01\x02\x00\x01"), Err(WireError::UnknownKind), "a TLS ClientHello");
        assert_eq!(decode(b"\x00"), Err(WireError::UnknownKind));
        assert_eq!(decode(b"\x01\x00\x20\x00x"), Err(WireError::Magic));
        assert_eq!(decode(b"\x03\x00\xff\xff"), Err(WireError::Length), "a body over the limit");
        assert_eq!(decode(b"\x03\x01\x14\x00"), Err(WireError::Length), "a byte that must be zero");
        assert_eq!(decode(&message(Kind::Register, &[0; 21])), Err(WireError::Length));
        assert_eq!(decode(&message(Kind::Heartbeat, &[0])), Err(WireError::Length));
        assert_eq!(decode(&message(Kind::Counters, &[0; 15])), Err(WireError::Length));
    }

    #[test]
    fn a_hello_of_another_version_is_told_from_garbage() {
        let mut bytes = all().remove(0);
        bytes[FRAMING + 8] = 0x34;
        bytes[FRAMING + 9] = 0x12;
        assert_eq!(decode(&bytes).unwrap().unwrap().0, Message::OtherVersion(0x1234));
    }

    #[test]
    fn a_service_of_an_unknown_protocol_is_malformed() {
        let target = Endpoint { ip: [7; 16], port: 1 };
        let mut bytes = ServiceEntry { service: 1, protocol: Protocol::Tcp, target }.encode();
        assert!(ServiceEntry::decode(&bytes).is_ok());
        bytes[20] = 1;
        assert_eq!(ServiceEntry::decode(&bytes), Err(WireError::Malformed));
        (bytes[20], bytes[21]) = (6, 1);
        assert_eq!(ServiceEntry::decode(&bytes), Err(WireError::Malformed));
    }

    #[test]
    fn a_key_length_that_lies_is_malformed() {
        let mut bytes = all().remove(0);
        bytes[FRAMING + 24] += 1;
        assert_eq!(decode(&bytes), Err(WireError::Malformed));
    }

    /// Random bytes, and every message with random bytes flipped: no panic, and never more taken than was there.
    #[test]
    fn hostile_bytes_do_no_harm() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let messages = all();
        for round in 0..200_000 {
            let mut bytes = if round % 2 == 0 {
                (0..next() % 64).map(|_| next() as u8).collect()
            } else {
                let mut bytes = messages[(next() % messages.len() as u64) as usize].clone();
                for _ in 0..1 + next() % 3 {
                    let at = (next() % bytes.len() as u64) as usize;
                    bytes[at] = next() as u8;
                }
                bytes
            };
            if let Some(first) = bytes.first_mut().filter(|_| round % 4 == 0) {
                *first %= 20; // Past the first check more often.
            }
            if let Ok(Some((_, used))) = decode(&bytes) {
                assert!(used >= FRAMING && used <= bytes.len());
            }
        }
    }
}
