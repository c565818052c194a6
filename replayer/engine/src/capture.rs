//! What captured packets do: they find their connection, and what they are to it. The data of one that is followed goes to its stream
//! (`stream.rs`).

use crate::connection::{End, NewConnection, Phase, Place, PlainEnds, Syn};
use crate::counters::{Counter, EndReason};
use crate::engine::{BATCH, Engine, ServiceState};
use crate::fast_path::COPIES_AHEAD;
use crate::output::{InHand, Output};
use crate::protocol;
use crate::session::State;
use crate::slab::NONE;
use crate::stream::MAX_DISTANCE;
use crate::timer::{before, tick};
use alloc::vec::Vec;
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::hash::{pair_hash, pair_hash_v4};
use replayer_common::packet::{TcpSegment, UsualSegment, flags, parse_tcp_frame, parse_usual};
use replayer_common::tcp_options::{self, TcpOptions};

/// Where a packet ends in the accounts: its counter, or why it is not replayed, with the counter for its bytes.
pub(crate) type Fate = Result<Counter, (Counter, Counter)>;

/// What a batch's first pass found out of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looked {
    /// Of the segment's ends; 0 if it is none.
    hash: u32,
    /// Most likely its connection, or `NONE`.
    place: u32,
    /// Known of IPv4 without options.
    ends: PlainEnds,
    data: Data,
}

/// Data of a segment that nothing else comes with; all of it is in the frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data {
    /// Its place in the client's stream.
    pub(crate) seq: u32,
    /// The segment's acknowledgment number, also where there is no data.
    pub(crate) ack: u32,
    /// Bytes; 0: there is none, or something else is to be done as well.
    pub(crate) len: u32,
    /// Where it lies in the frame.
    pub(crate) offset: u16,
    pub(crate) push: bool,
}

impl Looked {
    const NOTHING: Looked = Looked {
        hash: 0,
        place: NONE,
        ends: PlainEnds { src: 0, dst: 0, src_port: 0, dst_port: 0 },
        data: Data { seq: 0, ack: 0, len: 0, offset: 0, push: false },
    };
}

impl Data {
    #[inline(always)]
    fn new(seq: u32, ack: u32, control: u8, offset: u16, len: u32, frame_len: usize) -> Data {
        let is_all = control & (flags::SYN | flags::FIN | flags::RST) == 0
            && usize::from(offset) + len as usize <= frame_len;
        Data { seq, ack, len: if is_all { len } else { 0 }, offset, push: control & flags::PSH != 0 }
    }
}

impl Engine {
    /// Handles captured packets: each is `(frame, length)`, Ethernet first. The frames are taken: sent, or released. `frames` is
    /// empty afterwards and keeps its capacity.
    pub fn on_captured<O: Output>(&mut self, now_ns: u64, frames: &mut Vec<(O::Frame, usize)>, out: &mut O) {
        // Several passes over each batch: the first parses, the next read ahead what the last will use.
        let mut looked = core::mem::take(&mut self.looked);
        while !frames.is_empty() {
            let count = frames.len().min(BATCH);
            looked.truncate(count);
            looked.resize(count, Looked::NOTHING);
            for (packet, (frame, len)) in looked.iter_mut().zip(&mut *frames) {
                let bytes = out.bytes(frame);
                self.look(&bytes[..(*len).min(bytes.len())], packet);
            }
            self.read_ahead(&mut looked);
            for (packet, (frame, len)) in looked.iter().zip(frames.drain(..count)) {
                self.on_packet(now_ns, packet, frame, len, out);
            }
        }
        self.looked = looked;
        if self.sent_at_once > 0 {
            let count = core::mem::take(&mut self.sent_at_once);
            self.capture_to_transmit.record_all(0, count);
            self.lag.record(0, 0, count);
        }
    }

    /// Asks for what the batch's packets will need, one step of the way for all packets before the next step: with a million sessions each
    /// step is a miss of the caches and of the TLB, and those of one short loop overlap.
    fn read_ahead(&self, looked: &mut [Looked]) {
        for packet in looked.iter() {
            self.by_client.read_ahead(packet.hash);
        }
        for packet in looked.iter_mut() {
            if let Some(c) = self.by_client.guess(packet.hash) {
                packet.place = c;
                self.connections[c].read_ahead();
            }
        }
        for packet in looked.iter() {
            if packet.place != NONE {
                self.sessions_ahead(packet);
            }
        }
        for packet in looked.iter() {
            if packet.place != NONE {
                let first_session = self.connections[packet.place].first_session;
                if first_session != NONE && self.sessions[first_session].armed_at.is_none() {
                    self.wheel.read_ahead(first_session);
                }
            }
        }
    }

    /// Where a packet's connection is to be looked for. Written where it stays: a copy of what was just written in parts has to wait for them.
    #[inline(always)]
    fn look(&self, bytes: &[u8], looked: &mut Looked) {
        let Some(segment) = parse_usual(bytes) else { return self.look_closer(bytes, looked) };
        let UsualSegment { src, dst, src_port, dst_port, seq, ack, .. } = segment;
        if segment.flags & flags::SYN != 0 {
            self.identity_ahead(Endpoint { ip: from_v4(src.to_ne_bytes()), port: src_port });
        }
        looked.hash = pair_hash_v4(self.config.seed, src, src_port, dst, dst_port);
        looked.place = NONE;
        looked.ends = PlainEnds { src, dst, src_port, dst_port };
        looked.data =
            Data::new(seq, ack, segment.flags, segment.payload_offset, segment.payload_len, bytes.len());
    }

    /// The same of a frame that is not of the usual form.
    #[inline(never)]
    fn look_closer(&self, bytes: &[u8], looked: &mut Looked) {
        *looked = Looked::NOTHING;
        if let Ok(segment) = parse_tcp_frame(bytes) {
            let TcpSegment { src, dst, src_port, dst_port, ack, .. } = segment;
            if segment.is_opening() {
                self.identity_ahead(Endpoint { ip: src, port: src_port });
            }
            looked.hash = pair_hash(self.config.seed, &src, src_port, &dst, dst_port);
            looked.data.ack = ack;
        }
    }

    /// Asks for where the session of a new connection will look for its identity: most often the client's own.
    fn identity_ahead(&self, client: Endpoint) {
        if let Some(ServiceState { target, .. }) = self.services.first() {
            let hash = pair_hash(self.config.seed, &client.ip, client.port, &target.ip, target.port);
            self.by_identity.read_ahead(hash);
        }
    }

    /// Asks for the sessions of the packet's connection.
    #[inline]
    fn sessions_ahead(&self, packet: &Looked) {
        let connection = &self.connections[packet.place];
        // In the connection's first line: how many sessions there are besides is not.
        let (first_session, takers) = (connection.first_session, u32::from(connection.takers));
        if first_session == NONE {
            return;
        }
        self.sessions[first_session].read_ahead();
        // Most likely a turn begins.
        if packet.data.ack != connection.last_ack {
            self.sessions[first_session].read_ahead_acknowledgment();
            self.sessions.turns(first_session).read_ahead();
        }
        for copy in 1..takers.min(COPIES_AHEAD).min(first_session + 1) {
            self.sessions[first_session - copy].read_ahead();
        }
    }

    /// A connection that was open before capture began and is between two turns: its next data starts one.
    pub fn expect_turn(&mut self, now_ns: u64, client: Endpoint, server: Endpoint) {
        let hash = pair_hash(self.config.seed, &client.ip, client.port, &server.ip, server.port);
        if self.config.new_connections_only
            || !self.services_of(&server).0
            || !self.in_sample(&client)
            || self.find_connection(hash, &client, &server).is_some()
        {
            return;
        }
        let now = tick(now_ns);
        self.new_connection(NewConnection::new(client, server, Phase::BetweenTurns, now), now);
    }

    fn find_connection(&self, hash: u32, client: &Endpoint, server: &Endpoint) -> Option<u32> {
        self.find_placed(hash, client, server, Place::Current)
    }

    /// The connection between these ends that has this place; each of those in the table is there once at most.
    pub(crate) fn find_placed(
        &self,
        hash: u32,
        client: &Endpoint,
        server: &Endpoint,
        place: Place,
    ) -> Option<u32> {
        self.by_client.find(hash, |index| {
            let connection = &self.connections[index];
            connection.client == *client
                && self.connections.server(index) == server
                && connection.place == place
        })
    }

    /// Takes a packet of a batch, most often by what its first pass has found.
    #[inline(always)]
    fn on_packet<O: Output>(
        &mut self,
        now_ns: u64,
        looked: &Looked,
        mut frame: O::Frame,
        len: usize,
        out: &mut O,
    ) {
        self.counters[Counter::PacketsCaptured] += 1;
        let c = looked.place;
        // What was found when the batch began still holds if the place is that of this very connection.
        if looked.data.len > 0 && c != NONE && self.connections.is_of_plain(c, &looked.ends) {
            frame = match self.on_usual(now_ns, c, &looked.data, frame, out) {
                Ok(()) => {
                    self.counters[Counter::BytesCaptured] += u64::from(looked.data.len);
                    return;
                }
                Err(frame) => frame,
            };
        }
        self.on_parsed(now_ns, looked, frame, len, out);
    }

    /// The same by all that its headers say.
    #[inline(never)]
    fn on_parsed<O: Output>(
        &mut self,
        now_ns: u64,
        looked: &Looked,
        mut frame: O::Frame,
        len: usize,
        out: &mut O,
    ) {
        let bytes = out.bytes(&mut frame);
        let len = len.min(bytes.len());
        let Ok(segment) = &parse_tcp_frame(&bytes[..len]) else {
            return self.on_other_packet(now_ns, frame, len, out);
        };
        self.counters[Counter::BytesCaptured] += u64::from(segment.payload_len);
        let c = looked.place;
        let data = Data::new(
            segment.seq,
            segment.ack,
            segment.flags,
            segment.payload_offset,
            segment.payload_len,
            len,
        );
        // Over IPv6, or with options of IP.
        if looked.data.len == 0 && data.len > 0 && c != NONE && self.connections.is_of(c, segment) {
            frame = match self.on_usual(now_ns, c, &data, frame, out) {
                Ok(()) => return,
                Err(frame) => frame,
            };
        }
        let payload_offset = usize::from(segment.payload_offset);
        let payload_len = segment.payload_len as usize;
        let fate = if payload_offset + payload_len > len {
            out.release(frame);
            Err((Counter::PacketsUnparsable, Counter::BytesUnparsable))
        } else {
            let mut in_hand = Some(InHand { frame, payload_offset, payload_len, segment: NONE });
            let fate = self.on_segment_captured(now_ns, looked.hash, segment, &mut in_hand, out);
            if let Some(hand) = in_hand {
                out.release(hand.frame);
            }
            fate
        };
        match fate {
            Ok(counter) => self.counters[counter] += 1,
            Err((packets, bytes)) => {
                self.counters[packets] += 1;
                self.counters[bytes] += u64::from(segment.payload_len);
            }
        }
    }

    fn on_segment_captured<O: Output>(
        &mut self,
        now_ns: u64,
        hash: u32,
        segment: &TcpSegment,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        let client = Endpoint { ip: segment.src, port: segment.src_port };
        let server = Endpoint { ip: segment.dst, port: segment.dst_port };
        if !self.services_of(&server).0 {
            return Err((Counter::PacketsNotService, Counter::BytesNotService));
        }
        if self.stopping.is_some() {
            return Err((Counter::PacketsStopping, Counter::BytesStopping));
        }
        if !self.in_sample(&client) {
            return Err((Counter::PacketsSampledOut, Counter::BytesSampledOut));
        }
        let mut found = self.find_connection(hash, &client, &server);
        if let (Some(time), Some(c)) = (self.capture_time, found)
            && let Some(since) = self.connections.gap_since(c)
            && !before(time, since.wrapping_add(self.gap_timeout))
        {
            // Its timer may be late by that clock.
            self.end_hole(now_ns, c, out);
            found = self.find_connection(hash, &client, &server);
            if found.is_none() && !segment.is_opening() {
                return Err((Counter::PacketsAfterEnd, Counter::BytesAfterEnd));
            }
        }
        let options = &Self::options(segment, out, in_hand);
        if segment.is_opening() {
            let connection = NewConnection::new(client, server, Phase::Following, tick(now_ns));
            return self.on_client_syn(now_ns, found, connection, segment, options, in_hand, out);
        }
        let found = if self.earlier == 0 && found.is_none_or(|c| self.connections[c].is_uninterrupted()) {
            found
        } else {
            self.whose(now_ns, hash, found, (&client, &server), segment, out)?
        };
        let Some(c) = found else {
            return self.on_unknown(
                now_ns,
                NewConnection::new(client, server, Phase::Watching, tick(now_ns)),
                segment,
                options,
            );
        };
        self.connections[c].last_seen = tick(now_ns);
        if segment.flags & flags::RST != 0 {
            return self.on_client_reset(now_ns, c, segment, out);
        }
        if segment.flags & flags::SYN != 0 {
            // With an ACK: its own SYN once more, where both sides opened at once (RFC 9293 section 3.5). What follows its number is
            // not at the place of data.
            return Err((Counter::PacketsSynRepeated, Counter::BytesOutOfWindow));
        }
        match self.connections[c].phase {
            Phase::Following => self.on_stream(now_ns, c, segment, segment.seq, in_hand, out),
            Phase::Encrypted => self.on_encrypted(c, segment),
            // A forgotten one is not in the table.
            Phase::Watching | Phase::BetweenTurns | Phase::Forgotten => {
                self.on_watched(now_ns, c, segment, options, in_hand, out)
            }
        }
    }

    /// The options of the packet in hand.
    fn options<O: Output>(
        segment: &TcpSegment,
        out: &mut O,
        in_hand: &mut Option<InHand<O::Frame>>,
    ) -> TcpOptions {
        let range = usize::from(segment.tcp_offset) + 20..usize::from(segment.payload_offset);
        let bytes = in_hand.as_mut().and_then(|hand| out.bytes(&mut hand.frame).get(range));
        tcp_options::parse(bytes.unwrap_or(&[]))
    }

    fn on_client_syn<O: Output>(
        &mut self,
        now_ns: u64,
        found: Option<u32>,
        mut new: NewConnection,
        segment: &TcpSegment,
        options: &TcpOptions,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        let syn = Syn::new(segment.seq, options, now_ns);
        if let Some(c) = found {
            // Where the stream has ended it is a connection of its own: the same file once more, if not the same number by chance.
            let is_open = self.connections.end(c) == End::Open;
            if is_open && self.connections.origin(c).isn() == Some(segment.seq) {
                if segment.payload_len > 0 {
                    return self.on_syn_data(now_ns, c, segment, in_hand, out);
                }
                return Ok(Counter::PacketsSynRepeated);
            }
            if is_open && self.connections[c].is_known() {
                if segment.payload_len == 0 {
                    self.connections.set_syn_inside(c, Some(syn));
                    return Ok(Counter::PacketsDoubtful);
                }
                // Its data would have to be kept until it is known whose it is.
                let c = self.open_inside(now_ns, c, &syn, out)?;
                return self.on_syn_data(now_ns, c, segment, in_hand, out);
            }
            self.replace(now_ns, c, out);
        }
        new.set_syn(&syn);
        let Some(c) = self.new_connection(new, tick(now_ns)) else {
            return Err((Counter::PacketsLimit, Counter::BytesLimit));
        };
        self.open_sessions(now_ns, c, segment.seq, false, out);
        if segment.payload_len > 0 {
            // Counted as the data that it carries.
            return self.on_syn_data(now_ns, c, segment, in_hand, out);
        }
        Ok(Counter::PacketsSyn)
    }

    /// Data in a SYN (Fast Open, RFC 7413) comes after the SYN's own number; the target gets it after the handshake. The ACK field means
    /// nothing: what the client has read is first said by a later segment.
    fn on_syn_data<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        segment: &TcpSegment,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        let connection = &self.connections[c];
        let (last_ack, ack_known) = (connection.last_ack, connection.ack_known);
        let fate = self.on_stream(now_ns, c, segment, segment.seq.wrapping_add(1), in_hand, out);
        let connection = &mut self.connections[c];
        (connection.last_ack, connection.ack_known) = (last_ack, ack_known);
        fate
    }

    /// The client uses the same port for a new connection: what the old one has is still delivered, then it closes.
    pub(crate) fn replace<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        self.drop_out_of_order(c, Counter::BytesGap);
        self.connections.set_early_end(c, None);
        self.connections.set_syn_inside(c, None);
        if self.connections.end(c) == End::Open {
            let need = u32::from(self.connections[c].any_data);
            self.connections.set_end(c, End::Fin { need });
        }
        self.output_all(now_ns, c, out);
        self.detach(c);
        self.forget_if_over(c);
    }

    /// Lets all sessions of a connection send what they may. The connection may be gone afterwards only if it was over.
    pub(crate) fn output_all<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let mut s = self.connections[c].first_session;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            self.output(now_ns, s, out, &mut None);
            s = next;
        }
    }

    fn on_unknown(
        &mut self,
        now_ns: u64,
        mut new: NewConnection,
        segment: &TcpSegment,
        options: &TcpOptions,
    ) -> Fate {
        if segment.payload_len == 0 || segment.flags & (flags::RST | flags::SYN) != 0 {
            return Err((Counter::PacketsNoConnection, Counter::BytesMidstream));
        }
        let midstream = Err((Counter::PacketsMidstream, Counter::BytesMidstream));
        if self.config.new_connections_only || segment.flags & flags::FIN != 0 {
            return midstream;
        }
        // It may be in the middle of a request: remember how far the client had read, and join when it has read more.
        let connection = &mut new.connection;
        connection.next_seq = segment.seq.wrapping_add(segment.payload_len);
        connection.last_ack = segment.ack;
        connection.ack_known = true;
        connection.set_timestamps(options, now_ns);
        match self.new_connection(new, tick(now_ns)) {
            Some(_) => midstream,
            None => Err((Counter::PacketsLimit, Counter::BytesLimit)),
        }
    }

    /// A connection that is not followed yet, or was lost to a hole: joined at the first segment that surely starts a turn. That is one
    /// that follows without a hole what was seen last, or in another place where the stream may go on, and acknowledges more of the response.
    fn on_watched<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        segment: &TcpSegment,
        options: &TcpOptions,
        in_hand: &mut Option<InHand<O::Frame>>,
        out: &mut O,
    ) -> Fate {
        if segment.is_pure_ack() {
            return Ok(Counter::PacketsAck);
        }
        if self.connections.end(c) != End::Open {
            return self.after_end(c, segment.seq, segment.payload_len);
        }
        let connection = &self.connections[c];
        let starts_turn = segment.payload_len > 0
            && (connection.phase == Phase::BetweenTurns
                || (segment.seq == connection.next_seq && connection.ack_advances(segment.ack))
                || self.starts_turn_where_left(c, segment));
        if starts_turn {
            self.connections.set_left(c, None);
        }
        // With `-O`, connections that were open before are not in the table: one that is here was lost to a hole or a limit.
        if starts_turn && protocol::tls_record(Self::payload(out, in_hand)) {
            self.begin_encrypted(now_ns, c, out);
            return self.on_encrypted(c, segment);
        }
        let connection = &mut self.connections[c];
        if starts_turn {
            connection.phase = Phase::Following;
            connection.next_seq = segment.seq;
            connection.ack_known = false;
            connection.any_data = false;
            // Sessions that are about to end, and the new ones of their addresses, go on with the clock that they had.
            if !connection.timestamps {
                connection.set_timestamps(options, now_ns);
            }
            self.counters[Counter::ConnectionsJoined] += 1;
            self.open_sessions(now_ns, c, segment.seq.wrapping_sub(1), true, out);
            return self.on_stream(now_ns, c, segment, segment.seq, in_hand, out);
        }
        self.watch(c, segment);
        self.follow_idly(c, segment, segment.seq);
        Err((Counter::PacketsMidstream, Counter::BytesMidstream))
    }

    /// The connection is TLS: nothing of it is replayed, and the sessions that its SYN opened end.
    pub(crate) fn begin_encrypted<O: Output>(&mut self, now_ns: u64, c: u32, out: &mut O) {
        let (_, source) = self.services_of(self.connections.server(c));
        for service in self.services.iter_mut().filter(|service| service.online == source) {
            service.tls = true;
        }
        self.counters[Counter::ConnectionsTls] += 1;
        self.drop_out_of_order(c, Counter::BytesTls);
        self.connections[c].phase = Phase::Encrypted;
        self.end_behind_hole(c);
        let mut s = self.connections[c].first_session;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            if self.sessions[s].state == State::SynSent {
                // Not known at the target, or about to be: the reset takes it back.
                self.send_reset(now_ns, s, out);
                self.end_session(tick(now_ns), s, EndReason::Tls, out);
            } else {
                self.cut(s, EndReason::Tls);
                self.output(now_ns, s, out, &mut None);
            }
            s = next;
        }
    }

    fn on_encrypted(&mut self, c: u32, segment: &TcpSegment) -> Fate {
        if segment.is_pure_ack() {
            return Ok(Counter::PacketsAck);
        }
        self.follow_idly(c, segment, segment.seq);
        Err((Counter::PacketsTls, Counter::BytesTls))
    }

    fn on_client_reset<O: Output>(&mut self, now_ns: u64, c: u32, segment: &TcpSegment, out: &mut O) -> Fate {
        let connection = &mut self.connections[c];
        let distance = segment.seq.wrapping_sub(connection.next_seq) as i32;
        if connection.phase == Phase::Following && distance.unsigned_abs() > MAX_DISTANCE {
            return Err((Counter::PacketsOutOfWindow, Counter::BytesOutOfWindow));
        }
        let acknowledged = (segment.flags & flags::ACK != 0).then_some(segment.ack);
        if self.connections.end(c) == End::Open {
            if !self.is_reset_believed(c, segment.seq) {
                self.on_doubtful_reset(now_ns, c, segment.seq, acknowledged);
                return Err((Counter::PacketsDoubtful, Counter::BytesOutOfWindow));
            }
            self.reset_stream(now_ns, c, acknowledged, out);
        }
        self.counters[Counter::BytesAfterEnd] += u64::from(segment.payload_len);
        Ok(Counter::PacketsEnd)
    }

    /// The client resets its connection, and had read up to `acknowledged`, if it says so.
    pub(crate) fn reset_stream<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        acknowledged: Option<u32>,
        out: &mut O,
    ) {
        let connection = &self.connections[c];
        // The session ends after the pending turn: when as much of its response has come as the client had read.
        let need = acknowledged
            .filter(|&ack| connection.ack_advances(ack))
            .map_or(u32::from(connection.any_data), |ack| ack.wrapping_sub(connection.last_ack));
        self.connections.set_end(c, End::Reset { need });
        self.connections.set_early_end(c, None);
        self.drop_out_of_order(c, Counter::BytesGap);
        self.output_all(now_ns, c, out);
        if !self.connections[c].is_detached() {
            self.forget_if_over(c);
        }
    }
}
