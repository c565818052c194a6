//! The fast path: what is usual, in one piece. Of captured packets: new data, the next in the order of a stream that is followed, not its
//! first, with no hole open and nothing ended. Of the target's segments: an acknowledgment, and nothing else, of what was sent once.
//!
//! Nearly all are like that, so this is what a packet costs. It does for them in one piece what `capture.rs`, `sender.rs` and `receiver.rs`
//! do step by step, with the same outcome; whatever is not usual, of the packet or of one of its sessions, is left to them. The test at the
//! end holds the two against each other.

use crate::capture::Data;
use crate::counters::Counter;
use crate::engine::Engine;
use crate::output::{InHand, Output};
use crate::receiver::MAX_WINDOW;
use crate::sender::{Piece, micros};
use crate::session::{Session, State, seq_before};
use crate::slab::NONE;
use crate::store::{self, Segment};
use crate::timer::{Due, Tick, Wheel, tick};
use crate::wire::{PLAIN, PlainHeader, Stamp};
use replayer_common::packet::flags;
use replayer_common::response::{ResponseHeader, present};

/// The copies of a connection are opened together and lie side by side, the last first: so far ahead they are read.
pub(crate) const COPIES_AHEAD: u32 = 16;

impl Engine {
    /// Takes captured data if it is the usual; otherwise nothing was done, and the frame comes back.
    #[inline(always)]
    pub(crate) fn on_usual<O: Output>(
        &mut self,
        now_ns: u64,
        c: u32,
        captured: &Data,
        mut frame: O::Frame,
        out: &mut O,
    ) -> Result<(), O::Frame> {
        let now = tick(now_ns);
        let &Data { seq, ack, len, offset, push } = captured;
        let connection = &mut self.connections[c];
        let takers = u32::from(connection.takers);
        let answered = connection.ack_advances(ack);
        let places = store::places(len);
        let usual = connection.goes_on()
            && connection.next_seq == seq
            && self.room.has(connection.held_places, places)
            && self.stopping.is_none()
            // Without a session nothing is stored; with too few, a turn opens those that are missing.
            && takers > 0
            && !(answered && takers < connection.wanted());
        #[cfg(test)]
        let usual = usual && !self.step_by_step;
        if !usual {
            return Err(frame);
        }
        let Some(room) = out.bytes(&mut frame).get(usize::from(offset)..) else { return Err(frame) };
        let need = if answered { ack.wrapping_sub(connection.last_ack) } else { 0 };
        let now_us = micros(now_ns);
        // Made where they are needed: what is made before and passed on is written to the stack first.
        let segment = || Segment::new(seq, ack, push, now_us).given(takers as u16, answered, need);
        let Ok((stored, sum)) = self.store.insert_from(segment, room, len as usize) else {
            return Err(frame);
        };

        if answered || !connection.ack_known {
            connection.last_ack = ack;
            connection.ack_known = true;
        }
        connection.next_seq = seq.wrapping_add(len);
        connection.last_seen = now;
        connection.held_places += places;
        let before = core::mem::replace(&mut connection.tail, stored);
        if before == NONE {
            connection.head = stored;
        } else {
            self.store[before].next = stored;
        }
        self.counters[Counter::PacketsData] += 1;
        self.counters[Counter::BytesAccepted] += u64::from(len);
        self.counters[Counter::ReplayBytesOffered] += u64::from(len) * u64::from(takers);

        let s = connection.first_session;
        let data =
            || NewData { now_ns, now, now_us, connection: c, segment: stored, seq, len, offset, push, sum };
        // A turn that has to wait is asked again there, and waits as well.
        let goes = self.sessions[s].next_copy == NONE
            && self.is_free(s, len)
            && (!answered || self.begin_turn(now_ns, s, need));
        if goes {
            self.send_new(s, &data(), Some(frame), out, &mut None);
            self.sent_at_once += 1;
        } else {
            self.on_usual_of_many(s, (answered, need), data(), frame, out);
        }
        Ok(())
    }

    /// What [`Engine::on_usual`] does where a connection has several sessions, or its only one has to wait.
    #[inline(never)]
    fn on_usual_of_many<O: Output>(
        &mut self,
        first: u32,
        (answered, need): (bool, u32),
        data: NewData,
        frame: O::Frame,
        out: &mut O,
    ) {
        let (data, stored) = (&data, data.segment);
        let mut in_hand = Some(data.in_hand(frame));
        let mut stamp = None;
        let mut s = first;
        while s != NONE {
            let next = self.sessions[s].next_copy;
            if next != NONE && s >= COPIES_AHEAD {
                self.sessions[s - COPIES_AHEAD].read_ahead();
            }
            let free = self.is_free(s, data.len);
            if free && (!answered || self.begin_turn(data.now_ns, s, need)) {
                let frame = in_hand.take().map(|hand| hand.frame);
                self.send_new(s, data, frame, out, &mut stamp);
                self.sent_at_once += 1;
            } else {
                let session = &mut self.sessions[s];
                if session.cut.is_none() {
                    if session.una_segment == NONE {
                        session.una_segment = stored;
                    }
                    if session.next_segment == NONE {
                        session.next_segment = stored;
                    }
                }
                if !free {
                    self.output(data.now_ns, s, out, &mut in_hand);
                }
            }
            s = next;
        }
        if let Some(hand) = in_hand {
            out.release(hand.frame);
        }
    }

    /// Whether the session may send so much new data at once, unless it is the first of a turn, which may have to wait.
    #[inline(always)]
    fn is_free(&self, s: u32, len: u32) -> bool {
        self.sessions[s].is_free_for(len) && self.config.spread_ns == 0
    }

    /// Sends data that was just captured: the next of a session that has sent all it had, and may. `captured`: the frame that it came in, if
    /// that is still there.
    #[inline(always)]
    fn send_new<O: Output>(
        &mut self,
        s: u32,
        data: &NewData,
        captured: Option<O::Frame>,
        out: &mut O,
        stamp: &mut Option<Stamp>,
    ) {
        let &NewData { now_ns, seq, len, push, .. } = data;
        let session = &mut self.sessions[s];
        debug_assert_eq!(session.snd_nxt, seq);
        session.snd_nxt = seq.wrapping_add(len);
        if session.una_segment == NONE {
            session.una_segment = data.segment;
        }
        if !session.timing {
            session.timing = true;
            (session.timed_seq, session.timed_at_us) = (session.snd_nxt, data.now_us);
        }
        if session.rto_at.is_none() {
            start_timeout(session, &mut self.wheel, s, data.now);
        }

        let service = &mut self.services[usize::from(session.service)];
        let start = PLAIN + if session.timestamps { 12 } else { 0 };
        let template = service.template.as_ref().filter(|template| template.is_plain());
        let (Some(template), true) = (template, captured.is_none() || usize::from(data.offset) == start)
        else {
            let piece = Piece { segment: data.segment, offset: 0, len };
            let mut in_hand = captured.map(|frame| data.in_hand(frame));
            self.send_data(now_ns, s, push, seq, piece, out, &mut in_hand);
            // Where packets cannot leave.
            if let Some(hand) = in_hand {
                out.release(hand.frame);
            }
            return;
        };
        // Without a frame it is as if the segment had been lost.
        session.acknowledged();
        service.ip_id = service.ip_id.wrapping_add(1);
        let is_in_place = captured.is_some();
        let Some(mut frame) = captured.or_else(|| out.allocate()) else {
            self.counters[Counter::SegmentsNoFrame] += 1;
            return;
        };
        let end = start + len as usize;
        let bytes = out.bytes(&mut frame);
        if bytes.len() < end {
            self.counters[Counter::SegmentsNoFrame] += 1;
            out.release(frame);
            return;
        }
        let (ip, port) = session.identity_v4();
        let (ack, ip_id) = (session.rcv_nxt, service.ip_id);
        let timestamps = session
            .timestamps
            .then(|| (self.connections[data.connection].ts_value(now_ns), session.ts_recent));
        let control = flags::ACK | if push { flags::PSH } else { 0 };
        let fields = PlainHeader { ip, port, seq, ack, flags: control, timestamps, ip_id };
        if is_in_place || end > Stamp::MAX {
            if !is_in_place {
                self.store.copy_whole(data.segment, &mut bytes[start..]);
            }
            template.write_plain(bytes, fields, len as usize, data.sum);
        } else {
            if stamp.as_ref().is_none_or(|stamp| !stamp.is_of(session.service, timestamps.is_some())) {
                let mut new = Stamp::new(session.service, timestamps.is_some());
                let room = new.room(start);
                self.store.copy_whole(data.segment, room);
                new.fill(template, fields, len as usize, data.sum);
                *stamp = Some(new);
            }
            if let Some(stamp) = stamp {
                stamp.write(bytes, end, fields);
            }
        }
        self.counters[Counter::SegmentsSent] += 1;
        if !out.transmit(frame, end) {
            self.counters[Counter::SegmentsNoFrame] += 1;
        }
    }
}

impl Engine {
    /// Takes a segment of the target if it is the usual one; otherwise nothing was done.
    #[inline(always)]
    pub(crate) fn on_usual_acknowledgment(&mut self, now_ns: u64, s: u32, record: &ResponseHeader) -> bool {
        let session = &mut self.sessions[s];
        let timestamps = session.timestamps && record.has(present::TIMESTAMPS);
        let usual = record.flags & !flags::PSH == flags::ACK
            && record.payload_len == 0
            && record.sack_count == 0
            && record.seq == session.rcv_nxt
            && seq_before(session.snd_una, record.ack)
            && !seq_before(session.snd_nxt, record.ack)
            && session.state == State::Established
            && session.next_segment == NONE
            && !session.rewound
            && !session.is_in_trouble()
            && !(timestamps && session.is_overtaken(record.ts_val));
        #[cfg(test)]
        let usual = usual && !self.step_by_step;
        // With an end of its stream, the session has to close now.
        if !usual || !self.connections[session.connection].is_uninterrupted() {
            return false;
        }
        if timestamps && !seq_before(record.ts_val, session.ts_recent) {
            session.ts_recent = record.ts_val;
        }
        session.first_alone = false;
        let acked = record.ack.wrapping_sub(session.snd_una);
        self.counters[Counter::ReplayBytesDelivered] += u64::from(acked);
        session.snd_una = record.ack;
        session.snd_wnd = u32::from(record.window) << session.snd_wscale;
        (session.dup_acks, session.tries) = (0, 0);
        if session.timing && !seq_before(record.ack, session.timed_seq) {
            session.round_trip(micros(now_ns).wrapping_sub(session.timed_at_us));
            session.timing = false;
        }
        // Nothing was ever lost: slow start (RFC 5681 section 3.1).
        session.cwnd = session.cwnd.saturating_add(acked).min(MAX_WINDOW);
        session.set_limit();
        let mut segment = session.una_segment;
        let mut is_one_free = false;
        while segment != NONE {
            let stored = &mut self.store[segment];
            if seq_before(record.ack, stored.end()) {
                break;
            }
            stored.references -= 1;
            is_one_free |= stored.references == 0;
            segment = stored.next;
        }
        session.una_segment = segment;
        let c = session.connection;
        session.rto_at = None;
        if session.snd_una != session.snd_nxt {
            start_timeout(session, &mut self.wheel, s, tick(now_ns));
        }
        if is_one_free {
            self.free_head(c);
        }
        true
    }
}

/// Starts the retransmission timeout anew, without backoff: for a session that nothing has timed out of since the last acknowledgment.
#[inline(always)]
fn start_timeout(session: &mut Session, wheel: &mut Wheel, s: u32, now: Tick) {
    let due = Due::at(now.wrapping_add(session.first_rto_ticks()));
    session.rto_at = Some(due);
    if session.fires_after(due) {
        session.armed_at = Some(due);
        wheel.arm(s, due.tick());
    }
}

/// Data that was just captured and stored.
struct NewData {
    now_ns: u64,
    now: Tick,
    now_us: u32,
    connection: u32,
    segment: u32,
    seq: u32,
    len: u32,
    /// Where it lies in the frame that it came in.
    offset: u16,
    push: bool,
    /// The checksum's sum of it.
    sum: u16,
}

impl NewData {
    /// With the frame that it came in.
    fn in_hand<F>(&self, frame: F) -> InHand<F> {
        let (payload_offset, payload_len) = (usize::from(self.offset), self.len as usize);
        InHand { frame, payload_offset, payload_len, segment: self.segment }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Service};
    use crate::wire::{Header, Link, SynOptions, Template, sum};
    use crate::{AddressRange, BATCH};
    use alloc::{vec, vec::Vec};
    use replayer_common::addr::{Endpoint, from_v4};
    use std::format;

    /// How packets come and go.
    #[derive(Clone, Copy, Debug)]
    struct Way {
        v6: bool,
        /// VLAN tags of captured packets and of those that are sent.
        captured_in: [Option<(u16, u16)>; 2],
        sent_in: [Option<(u16, u16)>; 2],
    }

    impl Way {
        const TAGGED: [Option<(u16, u16)>; 2] = [Some((0x8100, 5)), None];
        const PLAIN: Way = Way { v6: false, captured_in: [None; 2], sent_in: [None; 2] };

        fn end(self, v4: [u8; 4], port: u16) -> Endpoint {
            let mut ip = from_v4(v4);
            if self.v6 {
                (ip[0], ip[1]) = (0x20, 0x01);
            }
            Endpoint { ip, port }
        }
        fn online(self) -> Endpoint {
            self.end([10, 0, 1, 1], 80)
        }
        fn link(self, tags: [Option<(u16, u16)>; 2]) -> Link {
            Link { source_mac: [2; 6], destination_mac: [4; 6], tags, mtu: 1500 }
        }
    }

    /// Keeps what was sent.
    #[derive(Default)]
    struct Kept(Vec<Vec<u8>>);

    impl Output for Kept {
        type Frame = Vec<u8>;

        fn allocate(&mut self) -> Option<Vec<u8>> {
            Some(vec![0; 2048])
        }
        fn bytes<'a>(&'a mut self, frame: &'a mut Vec<u8>) -> &'a mut [u8] {
            frame
        }
        fn release(&mut self, _: Vec<u8>) {}
        fn transmit(&mut self, mut frame: Vec<u8>, len: usize) -> bool {
            frame.truncate(len);
            self.0.push(frame);
            true
        }
        fn register(&mut self, _: u16, _: Endpoint) {}
        fn unregister(&mut self, _: u16, _: Endpoint) {}
    }

    fn engine(copies_millionths: u64, services: usize, way: Way, now: u64) -> Engine {
        let targets = [way.end([10, 0, 2, 1], 80), way.end([10, 0, 2, 2], 8080)];
        let services =
            targets[..services].iter().map(|&target| Service { online: way.online(), target }).collect();
        let mut config = Config::new(services);
        config.copies_millionths = copies_millionths;
        config.limits.sessions = 400;
        config.limits.connections = 60;
        config.limits.held_bytes = 1 << 20;
        config.limits.held_bytes_per_connection = 1 << 17;
        if copies_millionths != 1_000_000 {
            config.pool = vec![AddressRange { first: way.end([10, 9, 0, 0], 0).ip, count: 4 }];
        }
        let mut engine = Engine::new(config, now);
        (0..engine.services.len()).for_each(|service| engine.set_link(service, Some(way.link(way.sent_in))));
        engine
    }

    /// A client, its stream and what it knows of the server's.
    #[derive(Clone, Copy)]
    struct Client {
        seq: u32,
        ack: u32,
        timestamps: bool,
    }

    /// Timers of the same time fire in the order in which they were armed, and sessions that are touched by one batch are armed in another order by
    /// each way: what each session sent, in its order, without the IP identification that follows from the order of all.
    fn by_session(way: Way, packets: &mut [Vec<u8>]) {
        let ip = 14 + 4 * way.sent_in.iter().flatten().count();
        let (source, port) = if way.v6 { (ip + 8..ip + 24, ip + 40) } else { (ip + 12..ip + 16, ip + 20) };
        for packet in packets.iter_mut().filter(|_| !way.v6) {
            packet[ip + 4..ip + 6].fill(0);
            packet[ip + 10..ip + 12].fill(0);
        }
        packets.sort_by_key(|packet| (packet[source.clone()].to_vec(), packet[port..port + 2].to_vec()));
    }

    #[test]
    fn both_ways_send_the_same_packets_and_count_the_same() {
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut random = move |bound: u32| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 33) as u32 % bound
        };
        let v6 = Way { v6: true, ..Way::PLAIN };
        let tagged_in = Way { captured_in: Way::TAGGED, ..Way::PLAIN };
        let tagged_out = Way { sent_in: Way::TAGGED, ..Way::PLAIN };
        let cases = [
            (1_000_000, 1, Way::PLAIN),
            (1_000_000, 2, Way::PLAIN),
            (2_500_000, 1, Way::PLAIN),
            (12_000_000, 1, Way::PLAIN),
            (1_000_000, 1, v6),
            (3_000_000, 1, v6),
            (1_000_000, 1, tagged_in),
            (2_000_000, 1, tagged_out),
        ];
        let mut alike = 0;
        for (number, (copies, services, way)) in cases.iter().copied().enumerate() {
            // Every other time ticks wrap on the way.
            let mut now = if number % 2 == 0 { 1_000_000_000 } else { (1 << 48) - 20_000_000_000 };
            let mut engines = [engine(copies, services, way, now), engine(copies, services, way, now)];
            engines[1].step_by_step = true;
            let mut in_one_order = true;
            let mut clients = [Client { seq: 0, ack: 0, timestamps: false }; 40];
            let template = Template::new(&way.link(way.captured_in), &way.online(), 500);
            for _ in 0..400 {
                let mut batch = Vec::new();
                for _ in 0..BATCH {
                    let i = random(clients.len() as u32);
                    let client = &mut clients[i as usize];
                    let payload = vec![random(256) as u8; [6, 300, 1400, 2900][random(4) as usize]];
                    let kind = random(150);
                    let (control, back, payload) = match kind {
                        0 => {
                            let timestamps = random(2) == 0;
                            *client = Client { seq: random(u32::MAX), ack: random(u32::MAX), timestamps };
                            (flags::SYN, 0, &payload[..0])
                        }
                        1 => (flags::FIN | flags::ACK, 0, &payload[..0]),
                        2 => (flags::RST, 0, &payload[..0]),
                        3 => (flags::ACK, 0, &payload[..0]),
                        // Seen before, in part or as a whole, or behind a hole.
                        4 => (flags::ACK, random(400), &payload[..]),
                        5 => (flags::ACK, 100u32.wrapping_neg(), &payload[..]),
                        6..20 => (flags::ACK, 0, &payload[..]),
                        _ => (flags::ACK | flags::PSH, 0, &payload[..]),
                    };
                    if kind % 4 == 3 {
                        client.ack = client.ack.wrapping_add(random(500));
                    }
                    let header = Header {
                        source: way.end([10, 7, 0, i as u8], 40_000),
                        seq: client.seq.wrapping_sub(back),
                        ack: client.ack,
                        flags: control,
                        timestamps: client.timestamps.then_some((now as u32, 7)),
                        syn: (kind == 0).then_some(SynOptions {
                            mss: 1460,
                            window_scale: Some(7),
                            sack_permitted: true,
                        }),
                        ip_id: 0,
                    };
                    let start = header.len(&template);
                    let mut frame = vec![0; 4096];
                    frame[start..start + payload.len()].copy_from_slice(payload);
                    header.write(&template, &mut frame, payload.len(), sum(payload));
                    batch.push((frame, start + payload.len()));
                    let end =
                        header.seq.wrapping_add(payload.len() as u32).wrapping_add(u32::from(kind == 0));
                    if end.wrapping_sub(client.seq) as i32 > 0 {
                        client.seq = end;
                    }
                }
                let mut records = Vec::new();
                for (s, service, identity) in engines[0].identities(0) {
                    let session = &engines[0].sessions[s];
                    let kind = random(14);
                    // Seldom out of order, behind what is known.
                    let seq_back = if random(40) == 0 { random(300) } else { 0 };
                    let sacked = random(60) == 0 && session.in_flight() > 40;
                    let mut sack = [(0, 0); 3];
                    sack[0] = (session.snd_una.wrapping_add(10), session.snd_una.wrapping_add(30));
                    records.push(ResponseHeader {
                        service,
                        addr: identity.ip,
                        port: identity.port,
                        flags: match kind {
                            _ if session.state == State::SynSent => flags::SYN | flags::ACK,
                            0 if random(60) == 0 => flags::FIN | flags::ACK,
                            1 if random(60) == 0 => flags::RST | flags::ACK,
                            2..5 => flags::ACK,
                            _ => flags::ACK | flags::PSH,
                        },
                        present: present::MSS | present::TIMESTAMPS | present::WINDOW_SCALE,
                        mss: [536, 1460][random(2) as usize],
                        window_scale: random(3) as u8,
                        window: match kind {
                            5 => 0,
                            12 => random(3000) as u16,
                            _ => 60_000,
                        },
                        // The target's clock is at its wrap; seldom a segment is far behind it.
                        ts_val: 0u32
                            .wrapping_sub(40)
                            .wrapping_add((now / 1_000_000) as u32)
                            .wrapping_sub(if random(30) == 0 { random(3000) } else { 0 }),
                        sack_count: u8::from(sacked),
                        sack,
                        seq: session.rcv_nxt.wrapping_sub(seq_back),
                        ack: match kind {
                            6 => session.snd_una,
                            // A part of what is under way.
                            7 => session.snd_una.wrapping_add(session.in_flight() / 2),
                            _ => session.snd_max(),
                        },
                        payload_len: random(3) * random(500),
                        ..Default::default()
                    });
                }
                // As if copies were answered in the order in which they were sent.
                if random(3) > 0 {
                    records.reverse();
                }
                let mut sent = engines.each_mut().map(|engine| {
                    let mut out = Kept::default();
                    engine.on_captured(now, &mut batch.clone(), &mut out);
                    engine.on_responses(now, &records, &mut out);
                    let before_timers = out.0.len();
                    engine.on_timers(now, &mut out);
                    #[cfg(debug_assertions)]
                    engine.check();
                    (out.0, before_timers)
                });
                in_one_order &= sent[0] == sent[1];
                let sent = sent.each_mut().map(|(packets, before_timers)| {
                    by_session(way, &mut packets[*before_timers..]);
                    packets
                });
                assert!(sent[0] == sent[1], "packets after {now} ns, {copies} millionths of a copy, {way:?}");
                let counted = engines.each_ref().map(|engine| format!("{:?}", engine.counters()));
                assert_eq!(counted[0], counted[1]);
                now += u64::from(random(400_000)) * 1000;
            }
            let [sessions, state] =
                [0, 1].map(|i| format!("{:?}{:?}", engines[i].sessions, engines[i].connections));
            // What ends in another order leaves places in another order.
            assert!(sessions == state || !in_one_order);
            alike += u32::from(in_one_order);
            let counters = engines[0].counters();
            assert!(counters[Counter::PacketsData] > 2_000, "{counters:?}");
            assert!(counters[Counter::TurnsSent] > 500, "{counters:?}");
            // When nothing more comes, nothing is left.
            let (engine, mut out) = (&mut engines[0], Kept::default());
            engine.end_of_capture(now, &mut out);
            for _ in 0..200 {
                now += 1_000_000_000;
                engine.on_timers(now, &mut out);
                #[cfg(debug_assertions)]
                engine.check();
            }
            assert_eq!((engine.sessions.len(), engine.connections.len(), engine.boards.len()), (0, 0, 0));
            assert_eq!((engine.store.held_bytes(), engine.store.places_held()), (0, 0));
            assert_eq!(engine.next_deadline_ns(now), None);
        }
        assert!(alike > cases.len() as u32 / 2, "{alike} cases in the very same order");
    }

    #[test]
    fn a_record_for_a_copy_that_has_ended_is_for_nobody() {
        let (way, now) = (Way::PLAIN, 1_000_000_000);
        let (mut engine, mut out) = (engine(3_000_000, 1, way, now), Kept::default());
        let template = Template::new(&way.link(way.captured_in), &way.online(), 500);
        let syn = Header {
            source: way.end([10, 7, 0, 1], 40_000),
            seq: 7,
            ack: 0,
            flags: flags::SYN,
            timestamps: None,
            syn: Some(SynOptions { mss: 1460, window_scale: None, sack_permitted: false }),
            ip_id: 0,
        };
        let mut frame = vec![0; 4096];
        syn.write(&template, &mut frame, 0, 0);
        engine.on_captured(now, &mut vec![(frame, syn.len(&template))], &mut out);
        let record = |identity: Endpoint, control| ResponseHeader {
            addr: identity.ip,
            port: identity.port,
            flags: control | flags::ACK,
            seq: 100,
            ack: 8,
            window: 1000,
            ..Default::default()
        };
        let mut copies: Vec<_> = engine.identities(0).map(|(_, _, identity)| identity).collect();
        copies.reverse();
        let accepted: Vec<_> = copies.iter().map(|&copy| record(copy, flags::SYN)).collect();
        engine.on_responses(now, &accepted, &mut out);
        // The first copy ends by a record, the others without one.
        engine.on_responses(now, &[ResponseHeader { seq: 101, ..record(copies[0], flags::RST) }], &mut out);
        engine.stop(now, &mut out);
        engine.on_timers(now + 1_000_000_000, &mut out);
        assert!(engine.stopped());
        let unknown = engine.counters()[Counter::ResponsesUnknown];
        engine.on_responses(now, &[record(copies[1], 0)], &mut out);
        assert_eq!(engine.counters()[Counter::ResponsesUnknown], unknown + 1);
    }
}
