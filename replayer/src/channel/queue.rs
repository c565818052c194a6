//! The two buffers of a connection: what waits to be sent, and what arrived and is not a whole message yet.
//!
//! Both have a fixed limit. Whole records go in or none: a peer never sees half of one.

use super::limits::{MAX_BODY, RECEIVE_BUFFER};
use super::wire::{FRAMING, Kind, framing};
use std::io::{self, ErrorKind, Read, Write};

/// Messages that wait for the socket. Records of one kind that come one after another share a message.
pub struct OutQueue {
    bytes: Vec<u8>,
    /// Bytes of `bytes` that the socket has taken.
    sent: usize,
    /// The message at the end that further records may join: its kind and where its framing lies.
    open: Option<(Kind, usize)>,
    limit: usize,
}

impl OutQueue {
    /// A queue of at most `limit` bytes, `reserve` of which are allocated at once.
    pub fn new(limit: usize, reserve: usize) -> OutQueue {
        OutQueue { bytes: Vec::with_capacity(reserve.min(limit)), sent: 0, open: None, limit }
    }

    /// Adds a record; `false` when the queue is full, and then nothing of it is in.
    #[inline]
    pub fn push_record<const N: usize>(&mut self, kind: Kind, record: &[u8; N]) -> bool {
        if !self.make_room(FRAMING + N) {
            return false;
        }
        if let Some((open, at)) = self.open
            && open == kind
            && self.bytes.len() - at - FRAMING + N <= MAX_BODY
        {
            self.bytes.extend_from_slice(record);
            let length = self.bytes.len() - at - FRAMING;
            self.bytes[at..at + FRAMING].copy_from_slice(&framing(kind, length));
            return true;
        }
        self.open = Some((kind, self.bytes.len()));
        self.bytes.extend_from_slice(&framing(kind, N));
        self.bytes.extend_from_slice(record);
        true
    }

    /// Adds a message of its own; `false` when the queue is full, and then nothing of it is in.
    pub fn push_message(&mut self, kind: Kind, body: &[u8]) -> bool {
        if !self.make_room(FRAMING + body.len()) {
            return false;
        }
        self.open = None;
        self.bytes.extend_from_slice(&framing(kind, body.len()));
        self.bytes.extend_from_slice(body);
        true
    }

    /// Bytes that wait.
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many records of `size` bytes find room.
    pub fn room(&self, size: usize) -> usize {
        // As if each had a message of its own: an estimate on the safe side.
        self.limit.saturating_sub(self.len()) / (size + FRAMING)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
        self.open = None;
    }

    /// Gives the socket what it takes, in one write. Returns how many bytes it took: 0 when there was nothing, or the
    /// socket is full.
    ///
    /// # Errors
    /// The socket's, except that it would block or was interrupted.
    pub fn write_to(&mut self, socket: &mut impl Write) -> io::Result<usize> {
        if self.is_empty() {
            return Ok(0);
        }
        let taken = match socket.write(&self.bytes[self.sent..]) {
            Ok(taken) => taken,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        // Its length may be on its way already.
        self.open = None;
        self.sent += taken;
        if self.sent == self.bytes.len() {
            self.clear();
        }
        Ok(taken)
    }

    #[inline]
    fn make_room(&mut self, more: usize) -> bool {
        if self.len() + more > self.limit {
            return false;
        }
        if self.sent > 0 && self.bytes.len() + more > self.bytes.capacity() {
            // Reuse what the socket has taken before growing. At most the limit is moved, and only for a peer that
            // does not keep up.
            let (sent, waiting) = (self.sent, self.len());
            self.bytes.copy_within(sent.., 0);
            self.bytes.truncate(waiting);
            self.open = self.open.map(|(kind, at)| (kind, at - sent));
            self.sent = 0;
        }
        true
    }
}

/// What came of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, more than none.
    Bytes(usize),
    /// Nothing is there now.
    Nothing,
    /// The peer closed its side.
    End,
}

/// Bytes that arrived and wait to become messages.
pub struct InBuffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

// Room for a read remains even behind a message of which only the last byte is missing.
const _: () = assert!(RECEIVE_BUFFER >= 2 * (MAX_BODY + FRAMING));

impl Default for InBuffer {
    fn default() -> InBuffer {
        InBuffer { bytes: vec![0; RECEIVE_BUFFER].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl InBuffer {
    /// One recv(2) into the free part.
    ///
    /// # Errors
    /// The socket's, except that it would block or was interrupted.
    pub fn read_from(&mut self, socket: &mut impl Read) -> io::Result<Received> {
        if self.start > 0 {
            // What is left is less than one message.
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        match socket.read(&mut self.bytes[self.end..]) {
            Ok(0) => Ok(Received::End),
            Ok(count) => {
                self.end += count;
                Ok(Received::Bytes(count))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(Received::Nothing)
            }
            Err(error) => Err(error),
        }
    }

    /// What waits.
    pub fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Drops the first `count` bytes of [`InBuffer::data`].
    pub fn consume(&mut self, count: usize) {
        debug_assert!(self.start + count <= self.end);
        self.start += count;
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::wire::{Message, decode};

    /// Takes at most `step` bytes of a write, as a socket with little room does.
    struct Trickle {
        taken: Vec<u8>,
        step: usize,
    }

    impl Write for Trickle {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.step);
            self.taken.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn records_of_one_kind_share_a_message() {
        let mut queue = OutQueue::new(1 << 20, 0);
        for _ in 0..1000 {
            assert!(queue.push_record(Kind::Register, &[1u8; 20]));
        }
        // 819 records fill a body of 16 KiB.
        assert_eq!(queue.len(), 1000 * 20 + 2 * FRAMING);
    }

    #[test]
    fn partial_writes_and_pushes_between_them_keep_the_stream_whole() {
        for step in [1, 3, 7, 50, 333] {
            let mut queue = OutQueue::new(900, 64);
            let mut socket = Trickle { taken: Vec::new(), step };
            let mut pushed = Vec::new();
            for round in 0..400u32 {
                let mut record = [0; 20];
                record[..4].copy_from_slice(&round.to_le_bytes());
                let kind = if round % 5 == 0 { Kind::Unregister } else { Kind::Register };
                if queue.push_record(kind, &record) {
                    pushed.push((kind, record));
                }
                assert!(queue.len() <= 900);
                if round % 3 == 0 {
                    queue.write_to(&mut socket).unwrap();
                }
            }
            while !queue.is_empty() {
                queue.write_to(&mut socket).unwrap();
            }
            let mut rest = &socket.taken[..];
            let mut seen = Vec::new();
            while let Some((message, used)) = decode(rest).unwrap() {
                match message {
                    Message::Register(records) => seen.extend(records.iter().map(|r| (Kind::Register, *r))),
                    Message::Unregister(records) => {
                        seen.extend(records.iter().map(|r| (Kind::Unregister, *r)));
                    }
                    other => panic!("{other:?}"),
                }
                rest = &rest[used..];
            }
            assert!(rest.is_empty());
            assert_eq!(seen, pushed, "writes of {step} bytes");
        }
    }

    #[test]
    fn a_full_queue_takes_whole_records_or_none() {
        let mut queue = OutQueue::new(100, 0);
        let taken = (0..10).filter(|_| queue.push_record(Kind::Headers, &[0u8; 72])).count();
        assert_eq!((taken, queue.len()), (1, 76));
        assert!(!queue.push_message(Kind::Counters, &[0; 21]));
        assert!(queue.push_message(Kind::Counters, &[0; 16]));
    }
}
