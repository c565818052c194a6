//! The return channel's decoder: bytes of a stranger, whole and in pieces.

use replayer::channel::limits::MAX_BODY;
use replayer::channel::queue::{InBuffer, Received};
use replayer::channel::wire::{Entry, FRAMING, Message, ServiceEntry, WireError, decode};
use replayer_common::response::ResponseHeader;
use std::io::Read;

/// The first byte says in what pieces the rest arrives.
///
/// # Panics
/// Where what is decoded depends on the pieces, or a message is waited for that can never come.
pub fn run(data: &[u8]) {
    let Some((&step, bytes)) = data.split_first() else { return };
    let (whole, error) = decode_all(bytes);
    assert_eq!(in_pieces(bytes, usize::from(step).max(1)), (whole, error));
}

/// What the messages say, as text, and how it ends.
type Decoded = (Vec<String>, Option<WireError>);

fn decode_all(mut bytes: &[u8]) -> Decoded {
    let mut messages = Vec::new();
    loop {
        match decode(bytes) {
            Ok(Some((message, used))) => {
                assert!((FRAMING..=FRAMING + MAX_BODY).contains(&used) && used <= bytes.len());
                // A message is one whatever follows it, and none before its last byte.
                assert_eq!(decode(&bytes[..used]), Ok(Some((message, used))));
                assert_eq!(decode(&bytes[..used - 1]), Ok(None));
                messages.push(text(&message));
                bytes = &bytes[used..];
            }
            Ok(None) => {
                assert!(bytes.len() < FRAMING + MAX_BODY, "more is asked for than a message can have");
                return (messages, None);
            }
            Err(error) => return (messages, Some(error)),
        }
    }
}

/// Reads every record of a message.
fn text(message: &Message<'_>) -> String {
    match message {
        Message::Services(records) => {
            let services: Vec<_> = records.iter().map(ServiceEntry::decode).collect();
            for (service, bytes) in services.iter().zip(*records) {
                assert!(service.is_err() || service.is_ok_and(|service| service.encode() == *bytes));
            }
            format!("{message:?} {services:?}")
        }
        Message::Register(records) | Message::Unregister(records) => {
            let entries: Vec<Entry> = records.iter().map(Entry::decode).collect();
            for (entry, bytes) in entries.iter().zip(*records) {
                assert_eq!(entry.encode(), *bytes);
            }
            format!("{message:?} {entries:?}")
        }
        Message::Headers(records) => {
            let headers: Vec<ResponseHeader> = records.iter().map(ResponseHeader::decode).collect();
            assert!(headers.iter().all(|header| header.sack_count <= 3));
            format!("{message:?} {headers:?}")
        }
        other => format!("{other:?}"),
    }
}

/// A socket that gives at most `step` bytes at a time.
struct Trickle<'a> {
    bytes: &'a [u8],
    step: usize,
}

impl Read for Trickle<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.step.min(into.len()).min(self.bytes.len());
        into[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        Ok(count)
    }
}

fn in_pieces(bytes: &[u8], step: usize) -> Decoded {
    let mut socket = Trickle { bytes, step };
    let mut buffer = InBuffer::default();
    let mut messages = Vec::new();
    loop {
        match decode(buffer.data()) {
            Ok(Some((message, used))) => {
                messages.push(text(&message));
                buffer.consume(used);
            }
            Ok(None) => {
                if buffer.read_from(&mut socket).expect("no error") == Received::End {
                    return (messages, None);
                }
            }
            Err(error) => return (messages, Some(error)),
        }
    }
}
