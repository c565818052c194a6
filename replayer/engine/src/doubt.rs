//! SYNs and RSTs inside an open connection: anybody can send them in the client's name. A server takes an RST only at the very number that
//! it expects next, and no SYN at all; it answers by a challenge ACK, and the connection goes on (RFC 5961 sections 3 and 4). Here the server is
//! not seen, so what the client sends next decides. Nothing of that ends a session whose client goes on.
//!
//! - **RST** at the next number: believed. Ahead of it, where the client may have sent what the capture has missed: the end behind a hole. When
//!   nothing else comes, the sessions end as with any hole, and the connection is joined at its next turn; new bytes show that it was not the
//!   client's. At any other number it is left out.
//! - **SYN**: remembered, the last one only. A segment that follows its number shows that the server has answered it; then it opens a connection.
//!   One with data (Fast Open) does so at once. But a stranger can send all that. So the connection before keeps its sessions, and if the next bytes
//!   of its stream come, it has its place again and the other one closes. Each client's address and port has one such connection before at most.
//!
//! A genuine SYN that the server did not take, for it still has an older connection, does no harm either: the client answers the challenge ACK
//! by an RST at the very number, and sends its SYN again.

use crate::connection::{EarlyEnd, NewConnection, Phase, Place, Syn};
use crate::counters::Counter;
use crate::engine::Engine;
use crate::output::Output;
use crate::slab::NONE;
use crate::timer::tick;
use replayer_common::addr::Endpoint;
use replayer_common::packet::{TcpSegment, flags};

/// So many bytes of a stream may be missing before an RST, or before what shows that a stream goes on: more than most windows are, and so few
/// that who guesses a number rarely hits.
pub(crate) const NEAR: u32 = 1 << 20;
/// The response may have gone on by so much since the client's last data, bytes.
const READ: u32 = 1 << 28;
/// How far behind a SYN's number the first segment that follows it may be: no server offers a larger window before it knows the client's
/// scale (RFC 7323 section 2.2), but the first ones may be missing.
const FIRST_WINDOW: u32 = 1 << 16;

impl Engine {
    /// Whether a server that has what was captured takes an RST at `seq`: at the next number, and as Linux does, at the end of the last
    /// segment that it has (net/ipv4/tcp_input.c, `tcp_validate_incoming`).
    pub(crate) fn is_reset_believed(&self, c: u32, seq: u32) -> bool {
        let connection = &self.connections[c];
        // Where no number is known, nothing is replayed either.
        if matches!(connection.phase, Phase::BetweenTurns | Phase::Encrypted) {
            return true;
        }
        let last = match self.connections.out_of_order(c) {
            NONE => None,
            _ => Some(self.store[self.connections.out_of_order_tail(c)].end()),
        };
        let fin =
            self.connections.early_end(c).filter(|end| !end.is_reset).map(|fin| fin.seq.wrapping_add(1));
        seq == connection.next_seq || last == Some(seq) || fin == Some(seq)
    }

    /// An RST at a number that is not the next: it may be behind a hole, if its acknowledgment fits too.
    pub(crate) fn on_doubtful_reset(&mut self, now_ns: u64, c: u32, seq: u32, acknowledged: Option<u32>) {
        let connection = &self.connections[c];
        let Some(ack) = acknowledged else { return };
        let fits = seq.wrapping_sub(connection.next_seq) < NEAR
            && (!connection.ack_known || ack.wrapping_sub(connection.last_ack) < READ);
        if !fits || connection.phase != Phase::Following || self.connections.has_hole(c) {
            return;
        }
        self.connections.set_early_end(c, Some(EarlyEnd { seq, ack, is_reset: true }));
        self.open_hole(c, tick(now_ns));
    }

    /// New bytes of a stream came, up to `end`: its client goes on after the SYN or RST inside it, unless an RST has only overtaken them.
    pub(crate) fn stream_goes_on(&mut self, c: u32, end: u32) {
        if self.connections[c].is_uninterrupted() {
            return;
        }
        self.connections.set_syn_inside(c, None);
        if self.connections.early_end(c).is_some_and(|early| early.is_reset && early.seq != end) {
            self.connections.set_early_end(c, None);
        }
    }

    /// The connection that a segment is of: `found`, which has its addresses, unless it shows that a SYN inside that one was answered, or
    /// that one before it goes on. `Err`: there is no room for another.
    pub(crate) fn whose<O: Output>(
        &mut self,
        now_ns: u64,
        hash: u32,
        found: Option<u32>,
        (client, server): (&Endpoint, &Endpoint),
        segment: &TcpSegment,
        out: &mut O,
    ) -> Result<Option<u32>, (Counter, Counter)> {
        let found = match self.earlier {
            0 => found,
            _ => self.go_back(now_ns, hash, found, (client, server), segment, out),
        };
        let Some(c) = found else { return Ok(None) };
        let Some(syn) = self.connections.syn_inside(c) else { return Ok(found) };
        let behind = segment.seq.wrapping_sub(syn.isn).wrapping_sub(1);
        let is_nearer = behind < self.distance(c, segment.seq);
        if behind < FIRST_WINDOW && is_nearer && segment.flags & (flags::SYN | flags::RST) == 0 {
            return self.open_inside(now_ns, hash, c, &syn, out).map(Some);
        }
        Ok(found)
    }

    /// How far a number is from the next of the connection's stream.
    fn distance(&self, c: u32, seq: u32) -> u32 {
        let connection = &self.connections[c];
        // Without any known number, as far as can be.
        let is_known = !matches!(connection.phase, Phase::BetweenTurns | Phase::Encrypted);
        if is_known { (seq.wrapping_sub(connection.next_seq) as i32).unsigned_abs() } else { u32::MAX }
    }

    /// The connection before `found`, if the segment is the next of its stream.
    fn go_back<O: Output>(
        &mut self,
        now_ns: u64,
        hash: u32,
        found: Option<u32>,
        (client, server): (&Endpoint, &Endpoint),
        segment: &TcpSegment,
        out: &mut O,
    ) -> Option<u32> {
        let Some(before) = self.find_placed(hash, client, server, Place::Earlier) else { return found };
        let ahead = segment.seq.wrapping_sub(self.connections[before].next_seq);
        let is_reset = segment.flags & flags::RST != 0;
        let is_next = if is_reset { ahead == 0 } else { ahead < NEAR && !segment.is_pure_ack() };
        let is_next = is_next && segment.flags & flags::SYN == 0;
        if !is_next || found.is_some_and(|c| self.distance(c, segment.seq) <= ahead) {
            return found;
        }
        if !is_reset {
            if let Some(c) = found {
                self.replace(now_ns, c, out);
            }
            self.connections[before].place = Place::Current;
            self.earlier -= 1;
        }
        Some(before)
    }

    /// Opens a connection with a SYN that came inside another one, which stays behind it while it has sessions: the first one of these
    /// addresses does.
    pub(crate) fn open_inside<O: Output>(
        &mut self,
        now_ns: u64,
        hash: u32,
        c: u32,
        syn: &Syn,
        out: &mut O,
    ) -> Result<u32, (Counter, Counter)> {
        let (client, server) = (self.connections[c].client, *self.connections.server(c));
        let mut new = NewConnection::new(client, server, Phase::Following, tick(now_ns));
        new.set_syn(syn);
        self.connections.set_syn_inside(c, None);
        let stays = self.connections[c].first_session != NONE
            && self.find_placed(hash, &client, &server, Place::Earlier).is_none();
        if stays {
            // Behind the new one in the table too, where that is found first.
            self.by_client.remove(hash, c);
        } else {
            self.replace(now_ns, c, out);
        }
        let opened = self.new_connection(new, tick(now_ns));
        if stays {
            self.by_client.insert(hash, c);
            // Without room for another it has its place as before.
            if opened.is_some() {
                self.connections[c].place = Place::Earlier;
                self.earlier += 1;
            }
        }
        let opened = opened.ok_or((Counter::PacketsLimit, Counter::BytesLimit))?;
        self.open_sessions(now_ns, opened, syn.isn, false, out);
        Ok(opened)
    }
}
