//! The target of a dry run: it acknowledges everything at once and answers whatever ends with PSH.
//!
//! Segments are taken as they are sent and answered together: where a session is in memory is asked for when its segment comes, so that
//! it is in the cache when the segment is answered.

use crate::cli::ServiceArg;
use replayer_common::addr::Endpoint;
use replayer_common::hash::pair_hash;
use replayer_common::packet::{Protocol, TcpSegment, UdpDatagram, flags};
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::slab::Slab;
use replayer_engine::table::Table;

/// What it answers: so many bytes, and then one more that ends the response. Longer than most responses, and within the window of a
/// client without window scaling, so that the next request need not wait.
const RESPONSE: u32 = 60_000;
const ISN: u32 = 1_000_000;
const WINDOW_SCALE: u8 = 7;
const MSS: u16 = 1460;

#[derive(Debug)]
pub(super) struct Target {
    /// By the services' numbers.
    services: Vec<(Protocol, Endpoint)>,
    /// Places in `sessions`.
    places: Table,
    sessions: Slab<Session>,
    received: Vec<Received>,
    answers: Vec<ResponseHeader>,
    seed: u64,
}

/// A segment that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Received {
    hash: u32,
    service: u16,
    flags: u8,
    client: Endpoint,
    seq: u32,
    payload_len: u32,
}

#[derive(Clone, Copy, Debug)]
struct Session {
    client: Endpoint,
    service: u16,
    receive_next: u32,
    send_next: u32,
}

impl Target {
    /// For the targets of `services`, by their numbers, and so many `sessions` at once: more are not accepted.
    pub(super) fn new(services: &[ServiceArg], sessions: usize, seed: u64) -> Target {
        Target {
            services: services.iter().map(|s| (s.protocol, s.service.target)).collect(),
            places: Table::new(sessions),
            sessions: Slab::new(sessions),
            received: Vec::new(),
            answers: Vec::new(),
            seed,
        }
    }

    /// The number of a service.
    fn number(&self, protocol: Protocol, target: &Endpoint) -> Option<u16> {
        let at = self.services.iter().position(|(of, service)| *of == protocol && service == target);
        at.map(|number| number as u16)
    }

    /// Receives a segment.
    pub(super) fn segment(&mut self, segment: &TcpSegment) {
        let server = Endpoint { ip: segment.dst, port: segment.dst_port };
        let Some(service) = self.number(Protocol::Tcp, &server) else { return };
        let hash = pair_hash(self.seed, &segment.src, segment.src_port, &server.ip, server.port);
        self.places.read_ahead(hash);
        self.received.push(Received {
            hash,
            service,
            flags: segment.flags,
            client: Endpoint { ip: segment.src, port: segment.src_port },
            seq: segment.seq,
            payload_len: segment.payload_len,
        });
    }

    /// Answers a datagram with one of one byte.
    pub(super) fn datagram(&mut self, datagram: &UdpDatagram) {
        let target = Endpoint { ip: datagram.dst, port: datagram.dst_port };
        let Some(service) = self.number(Protocol::Udp, &target) else { return };
        self.answers.push(ResponseHeader {
            service,
            port: datagram.src_port,
            addr: datagram.src,
            payload_len: 1,
            ..ResponseHeader::default()
        });
    }

    /// Whether there may be something to answer.
    pub(super) fn has_received(&self) -> bool {
        !self.received.is_empty() || !self.answers.is_empty()
    }

    /// The answers to everything that was received since the last call.
    pub(super) fn answers(&mut self) -> Vec<ResponseHeader> {
        for segment in &self.received {
            if let Some(place) = self.places.guess(segment.hash) {
                replayer_prefetch::line(&self.sessions[place]);
            }
        }
        let mut received = std::mem::take(&mut self.received);
        for segment in received.drain(..) {
            self.answer(&segment);
        }
        self.received = received;
        std::mem::take(&mut self.answers)
    }

    /// Takes back the room of what [`Target::answers`] gave.
    pub(super) fn take_back(&mut self, mut answers: Vec<ResponseHeader>) {
        if self.answers.is_empty() {
            answers.clear();
            self.answers = answers;
        }
    }

    fn answer(&mut self, segment: &Received) {
        let answer = |session: &Session, control: u8, payload_len: u32| ResponseHeader {
            service: session.service,
            flags: control,
            port: session.client.port,
            addr: session.client.ip,
            window: u16::MAX,
            seq: session.send_next,
            ack: session.receive_next,
            payload_len,
            ..ResponseHeader::default()
        };
        let known = self.places.find(segment.hash, |place| {
            let session = &self.sessions[place];
            session.client == segment.client && session.service == segment.service
        });
        if segment.flags & flags::SYN != 0 {
            if let Some(old) = known {
                self.forget(segment.hash, old);
            }
            let mut session = Session {
                client: segment.client,
                service: segment.service,
                receive_next: segment.seq.wrapping_add(1),
                send_next: ISN,
            };
            let mut syn_ack = answer(&session, flags::SYN | flags::ACK, 0);
            syn_ack.present = present::MSS | present::WINDOW_SCALE | present::SACK_PERMITTED;
            (syn_ack.mss, syn_ack.window_scale) = (MSS, WINDOW_SCALE);
            session.send_next = session.send_next.wrapping_add(1);
            let Some(place) = self.sessions.insert(session) else { return };
            self.places.insert(segment.hash, place);
            self.answers.push(syn_ack);
            return;
        }
        let Some(place) = known else { return };
        if segment.flags & flags::RST != 0 {
            self.forget(segment.hash, place);
            return;
        }
        let session = &mut self.sessions[place];
        let fin = segment.flags & flags::FIN != 0;
        if segment.seq != session.receive_next || segment.payload_len == 0 && !fin {
            return;
        }
        session.receive_next =
            session.receive_next.wrapping_add(segment.payload_len).wrapping_add(u32::from(fin));
        if segment.flags & flags::PSH != 0 && segment.payload_len > 0 {
            self.answers.push(answer(session, flags::ACK, RESPONSE));
            session.send_next = session.send_next.wrapping_add(RESPONSE);
            self.answers.push(answer(session, flags::ACK | flags::PSH, 1));
            session.send_next = session.send_next.wrapping_add(1);
        } else if !fin {
            self.answers.push(answer(session, flags::ACK, 0));
        }
        if fin {
            self.answers.push(answer(session, flags::ACK | flags::FIN, 0));
            self.forget(segment.hash, place);
        }
    }

    fn forget(&mut self, hash: u32, place: u32) {
        self.places.remove(hash, place);
        self.sessions.remove(place);
    }
}
