//! A client's connection in capture files: its stream put in order, with what is missing in it, and its requests.

use super::report::{NotReplayable, Service};
use replayer_common::packet::{TcpSegment, flags};

/// Pieces of a stream that wait for a hole to be filled; beyond that the hole counts as one that stays.
const MAX_PIECES: usize = 256;
/// A segment this far from its stream's place is not of this stream; as in the engine.
const MAX_DISTANCE: u32 = 1 << 28;

/// A client's stream, as far as it was seen.
#[derive(Debug, Default)]
pub(super) struct Connection {
    pub(super) isn: Option<u32>,
    /// The beginning of its data is known: SYN or SYN-ACK is in the file.
    beginning: bool,
    next_seq: Option<u32>,
    last_ack: Option<u32>,
    /// Begin and end of what lies behind a hole, sorted, with the ACK number of its packet.
    pieces: Vec<(u32, u32, u32)>,
    pub(super) client_fin: bool,
    pub(super) server_fin: bool,
    pub(super) reset: bool,
    tls: bool,
    pub(super) any_data: bool,
    /// What comes next cannot be replayed, for this reason, until the next turn.
    blocked: Option<NotReplayable>,
    /// A packet of it was cut: its bytes are a hole.
    truncated: bool,
    pub(super) last_seen_ns: u64,
    /// It does not count as one of those at once any more.
    left: bool,
    server_next: Option<u32>,
}

fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Connection {
    /// Takes note of a segment of the client's; of its payload, what is in the file.
    pub(super) fn client(&mut self, service: &mut Service, segment: &TcpSegment, payload: &[u8]) {
        let mut seq = segment.seq;
        if segment.flags & flags::RST != 0 {
            self.reset = true;
            return;
        }
        if segment.is_opening() {
            if self.isn.is_none() {
                self.isn = Some(seq);
                self.next_seq = Some(seq.wrapping_add(1));
                if !self.beginning {
                    self.beginning = true;
                    service.with_beginning += 1;
                }
            }
            seq = seq.wrapping_add(1);
        }
        let whole = payload.len() as u32 == segment.payload_len;
        if segment.payload_len > 0 {
            if !whole {
                self.truncated = true;
            }
            self.data(service, seq, segment.ack, payload, whole);
        } else if !self.any_data && segment.flags & flags::ACK != 0 && self.last_ack.is_none() {
            self.last_ack = Some(segment.ack);
        }
        self.client_fin |= segment.flags & flags::FIN != 0;
    }

    fn data(&mut self, service: &mut Service, seq: u32, ack: u32, payload: &[u8], whole: bool) {
        let len = payload.len() as u32;
        let next = *self.next_seq.get_or_insert(seq);
        let ahead = seq.wrapping_sub(next) as i32;
        if ahead.unsigned_abs() > MAX_DISTANCE {
            return;
        }
        if !whole {
            // What was cut away is a hole from the beginning of this packet on: the engine does not take half a packet.
            if ahead >= 0 {
                self.hole(service, ahead as u32 + len, NotReplayable::CutBySnaplen);
                self.next_seq = Some(seq.wrapping_add(len));
            }
            return;
        }
        if ahead > 0 {
            let at = self.pieces.partition_point(|piece| !before(seq, piece.0));
            if self
                .pieces
                .iter()
                .any(|&(begin, end, _)| !before(seq, begin) && !before(end, seq.wrapping_add(len)))
            {
                service.repeated_bytes += u64::from(len);
                return;
            }
            self.pieces.insert(at, (seq, seq.wrapping_add(len), ack));
            if self.pieces.len() > MAX_PIECES {
                self.give_up_hole(service);
            }
            return;
        }
        let seen = ahead.unsigned_abs().min(len);
        service.repeated_bytes += u64::from(seen);
        if seen < len {
            if !self.any_data && self.beginning {
                self.tls = payload.starts_with(&[0x16, 3]);
            }
            self.in_order(service, ack, len - seen);
        }
        while let Some(&(begin, end, ack)) = self.pieces.first() {
            let Some(next) = self.next_seq else { break };
            if before(next, begin) {
                break;
            }
            self.pieces.remove(0);
            let fresh = end.wrapping_sub(next) as i32;
            let repeated = end.wrapping_sub(begin) - fresh.max(0) as u32;
            service.repeated_bytes += u64::from(repeated);
            if fresh > 0 {
                self.in_order(service, ack, fresh as u32);
            }
        }
    }

    /// New bytes that follow what is there.
    fn in_order(&mut self, service: &mut Service, ack: u32, len: u32) {
        service.client_bytes += u64::from(len);
        self.next_seq = self.next_seq.map(|next| next.wrapping_add(len));
        let answered = self.last_ack.is_some_and(|last| before(last, ack));
        if answered || self.last_ack.is_none() {
            self.last_ack = Some(ack);
        }
        let first = !self.any_data;
        self.any_data = true;
        if !(first || answered) {
            return;
        }
        service.requests += 1;
        let blocked = if self.tls {
            Some(NotReplayable::Tls)
        } else if first && !self.beginning {
            Some(NotReplayable::BeginningNotCaptured)
        } else if answered {
            // A new turn: what was before is over.
            self.blocked = None;
            None
        } else {
            self.blocked
        };
        match blocked {
            Some(reason) => *service.not_replayable.entry(reason).or_default() += 1,
            None => service.replayable_requests += 1,
        }
    }

    /// `len` bytes are missing at the end of what is there: the request that they belong to cannot be replayed.
    fn hole(&mut self, service: &mut Service, len: u32, reason: NotReplayable) {
        service.holes += 1;
        service.missing_bytes += u64::from(len);
        if !self.any_data {
            // It is a request of which nothing was counted yet.
            service.requests += 1;
            self.any_data = true;
            *service.not_replayable.entry(reason).or_default() += 1;
        } else if self.blocked.is_none() && !self.tls {
            if service.replayable_requests > 0 {
                service.replayable_requests -= 1;
            }
            *service.not_replayable.entry(reason).or_default() += 1;
        }
        self.blocked = Some(reason);
    }

    fn give_up_hole(&mut self, service: &mut Service) {
        let pieces = std::mem::take(&mut self.pieces);
        for (begin, end, ack) in pieces {
            let Some(next) = self.next_seq else { return };
            let ahead = begin.wrapping_sub(next) as i32;
            if ahead > 0 {
                let reason =
                    if self.truncated { NotReplayable::CutBySnaplen } else { NotReplayable::BehindAHole };
                self.hole(service, ahead as u32, reason);
                self.next_seq = Some(begin);
            }
            let fresh = end.wrapping_sub(self.next_seq.unwrap_or(begin)) as i32;
            if fresh > 0 {
                self.in_order(service, ack, fresh as u32);
            }
        }
    }

    /// Takes note of a segment of the server's.
    pub(super) fn server(&mut self, service: &mut Service, segment: &TcpSegment) {
        if segment.flags & flags::RST != 0 {
            self.reset = true;
        }
        if segment.flags & flags::SYN != 0 {
            // The SYN may be missing: the SYN-ACK tells where the client's data begins.
            if segment.flags & flags::ACK != 0 && !self.beginning && !self.any_data {
                self.beginning = true;
                service.with_beginning += 1;
                self.next_seq = Some(segment.ack);
                self.last_ack = Some(segment.seq.wrapping_add(1));
            }
            return;
        }
        let end = segment.seq.wrapping_add(segment.payload_len);
        let fresh = match self.server_next {
            Some(next) => (end.wrapping_sub(next) as i32).clamp(0, segment.payload_len as i32) as u32,
            None => segment.payload_len,
        };
        if fresh > 0 || self.server_next.is_none() {
            self.server_next = Some(end);
        }
        service.server_bytes += u64::from(fresh);
        self.server_fin |= segment.flags & flags::FIN != 0;
    }

    /// Whether it is over.
    pub(super) fn gone(&self) -> bool {
        self.reset || self.client_fin && self.server_fin
    }

    /// It is no longer one of those at once.
    pub(super) fn leave(&mut self, live: &mut u64) {
        if !self.left {
            *live = live.saturating_sub(1);
            self.left = true;
        }
    }

    /// Nothing more comes of it.
    pub(super) fn close(&mut self, service: &mut Service, live: &mut u64) {
        self.give_up_hole(service);
        if self.gone() || self.client_fin || self.server_fin {
            service.with_end += 1;
        }
        if !self.any_data {
            *service.not_replayable.entry(NotReplayable::ConnectionsWithoutData).or_default() += 1;
        }
        self.leave(live);
    }
}
