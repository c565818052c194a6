//! UDP services: a captured datagram goes at once to every target of its service, from the identities of its flow. There is no stream, no
//! order and no acknowledgment, so nothing waits, nothing is held and nothing is sent again; what cannot be sent is counted.
//!
//! A flow is a client's address and port with a server's; it has as many copies as a TCP connection would have. It is forgotten when
//! nothing came of it for [`timing::FLOW_IDLE`], and its identities rest then like those of a TCP session.

use crate::config::{Config, Service, timing};
use crate::counters::{Counter, ServiceCounters};
use crate::engine::Engine;
use crate::output::Output;
use crate::sender::micros;
use crate::slab::{NONE, Slab};
use crate::table::Table;
use crate::timer::{Tick, before, tick};
use crate::wire::{Link, address_sum, checksum, ethernet, sum};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use replayer_common::addr::{ANY, Endpoint, is_v4, v4_octets};
use replayer_common::hash::pair_hash;
use replayer_common::packet::{PROTOCOL_UDP, Protocol, UDP_HEADER_LEN, UdpDatagram, parse_udp};
use replayer_common::response::ResponseHeader;

/// Ethernet with two tags, IPv6, UDP.
const MAX_HEADERS: usize = 22 + 40 + UDP_HEADER_LEN;

/// Where a datagram ends in the accounts: the counters of packets and of bytes.
type Fate = (Counter, Counter);

/// Everything about UDP.
#[derive(Debug)]
pub(crate) struct Udp {
    /// The number of a service is the number of TCP services plus its place here.
    services: Vec<UdpService>,
    flows: Slab<Flow>,
    sessions: Slab<Session>,
    by_client: Table,
    by_identity: Table,
    /// Each flow once: when it is to be looked at whether it is idle.
    aging: VecDeque<(Tick, u32)>,
    /// The payload in hand.
    payload: Vec<u8>,
    /// Datagrams that were not answered, of all sessions, and when one was sent last, ns.
    unanswered: u64,
    sent_at_ns: u64,
}

#[derive(Debug)]
struct UdpService {
    online: Endpoint,
    target: Endpoint,
    /// `None`: packets to it cannot leave.
    template: Option<Template>,
    counters: ServiceCounters,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    client: Endpoint,
    server: Endpoint,
    /// Of each service.
    copies: u16,
    /// All services' copies together that can have an identity.
    wanted: u32,
    sessions: u32,
    first_session: u32,
    last_seen: Tick,
}

/// A copy of a flow.
#[derive(Clone, Copy, Debug)]
struct Session {
    identity: Endpoint,
    /// By its place in [`Udp::services`].
    service: u16,
    live: bool,
    /// Datagrams sent and not answered: a response answers one.
    unanswered: u16,
    sent_us: u32,
    next_copy: u32,
}

/// What the headers of all datagrams to a target have in common.
#[derive(Clone, Copy, Debug)]
struct Template {
    bytes: [u8; MAX_HEADERS],
    ip_at: usize,
    udp_at: usize,
    v4: bool,
    ip_sum: u64,
    /// Of the UDP header with its pseudo header.
    udp_sum: u64,
    /// Largest IP packet, bytes.
    mtu: u16,
}

impl Template {
    fn new(link: &Link, target: &Endpoint) -> Template {
        let v4 = is_v4(&target.ip);
        let mut bytes = [0; MAX_HEADERS];
        let ip_at = ethernet(link, v4, &mut bytes);
        let udp_at = ip_at + if v4 { 20 } else { 40 };
        let ip = &mut bytes[ip_at..udp_at];
        if v4 {
            // Five words, don't fragment (so that the identification need not differ: RFC 6864), TTL 64.
            ip[0] = 0x45;
            ip[6..10].copy_from_slice(&[0x40, 0, 64, PROTOCOL_UDP]);
            ip[16..20].copy_from_slice(&v4_octets(&target.ip));
        } else {
            ip[0] = 0x60;
            ip[6..8].copy_from_slice(&[PROTOCOL_UDP, 64]);
            ip[24..40].copy_from_slice(&target.ip);
        }
        let ip_sum = u64::from(sum(ip));
        bytes[udp_at + 2..udp_at + 4].copy_from_slice(&target.port.to_be_bytes());
        // Pseudo header: RFC 768; RFC 8200 section 8.1.
        let udp_sum = u64::from(PROTOCOL_UDP) + u64::from(target.port) + address_sum(&target.ip, v4);
        Template { bytes, ip_at, udp_at, v4, ip_sum, udp_sum, mtu: link.mtu }
    }

    /// Bytes before the payload.
    fn headers_len(&self) -> usize {
        self.udp_at + UDP_HEADER_LEN
    }

    fn fits(&self, payload_len: usize, frame_room: usize) -> bool {
        let len = self.headers_len() + payload_len;
        len - self.ip_at <= usize::from(self.mtu) && len <= frame_room
    }

    /// Writes the headers at the start of `frame`. `payload_sum` is `None` when there is to be no checksum, which only IPv4 allows.
    fn write(&self, frame: &mut [u8], source: &Endpoint, payload_len: usize, payload_sum: Option<u16>) {
        let Template { ip_at, udp_at, v4, .. } = *self;
        frame[..self.headers_len()].copy_from_slice(&self.bytes[..self.headers_len()]);
        let udp_len = (UDP_HEADER_LEN + payload_len) as u16;
        let source_sum = address_sum(&source.ip, v4);
        let ip = &mut frame[ip_at..udp_at];
        if v4 {
            let total_len = 20 + udp_len;
            ip[2..4].copy_from_slice(&total_len.to_be_bytes());
            ip[10..12].copy_from_slice(&checksum(self.ip_sum + u64::from(total_len) + source_sum));
            ip[12..16].copy_from_slice(&v4_octets(&source.ip));
        } else {
            ip[4..6].copy_from_slice(&udp_len.to_be_bytes());
            ip[8..24].copy_from_slice(&source.ip);
        }
        let udp = &mut frame[udp_at..udp_at + UDP_HEADER_LEN];
        udp[0..2].copy_from_slice(&source.port.to_be_bytes());
        udp[4..6].copy_from_slice(&udp_len.to_be_bytes());
        if let Some(payload_sum) = payload_sum {
            // The length counts twice: in the header and in the pseudo header.
            let sum = self.udp_sum
                + source_sum
                + u64::from(source.port)
                + 2 * u64::from(udp_len)
                + u64::from(payload_sum);
            // Zero would say that there is none: its other form is sent (RFC 768).
            let value = match checksum(sum) {
                [0, 0] => [0xff, 0xff],
                value => value,
            };
            udp[6..8].copy_from_slice(&value);
        }
    }
}

impl Udp {
    /// Reserves what the limits allow, when there is a service at all.
    pub(crate) fn new(config: &Config) -> Udp {
        let capacity = |limit: usize| if config.udp_services.is_empty() { 0 } else { limit };
        let (flows, sessions) = (capacity(config.limits.connections), capacity(config.limits.sessions));
        let service = |service: &Service| UdpService {
            online: service.online,
            target: service.target,
            template: None,
            counters: ServiceCounters::default(),
        };
        Udp {
            services: config.udp_services.iter().map(service).collect(),
            flows: Slab::new(flows),
            sessions: Slab::new(sessions),
            by_client: Table::new(flows),
            by_identity: Table::new(sessions),
            aging: VecDeque::with_capacity(flows),
            payload: Vec::with_capacity(capacity(usize::from(u16::MAX))),
            unanswered: 0,
            sent_at_ns: 0,
        }
    }

    /// Says how packets to the target of the service at this place leave, or that they cannot.
    pub(crate) fn set_link(&mut self, place: usize, link: Option<Link>) {
        let service = &mut self.services[place];
        service.template = link.map(|link| Template::new(&link, &service.target));
    }

    /// By service.
    pub(crate) fn service_counters(&self) -> impl Iterator<Item = ServiceCounters> {
        self.services.iter().map(|UdpService { counters, .. }| ServiceCounters {
            heard: counters.datagrams_answered,
            ..*counters
        })
    }

    pub(crate) fn find_identity(&self, seed: u64, identity: &Endpoint, target: &Endpoint) -> Option<u32> {
        let hash = pair_hash(seed, &identity.ip, identity.port, &target.ip, target.port);
        self.by_identity.find(hash, |index| {
            let session = &self.sessions[index];
            session.identity == *identity && self.services[usize::from(session.service)].target == *target
        })
    }

    /// Live sessions from place `from` on: their places, services' places, and identities.
    pub(crate) fn identities(&self, from: u32) -> impl Iterator<Item = (u32, u16, Endpoint)> {
        (from..self.sessions.high_water()).filter_map(|index| {
            let session = &self.sessions[index];
            session.live.then_some((index, session.service, session.identity))
        })
    }

    /// Datagrams that the target may still answer: of sessions that sent the last one less than `limit_us` ago.
    pub(crate) fn waiting(&self, now_ns: u64, limit_us: u32) -> u64 {
        if self.unanswered == 0 {
            return 0;
        }
        let waiting = |index: u32| {
            let session = &self.sessions[index];
            let recent = session.live && micros(now_ns).wrapping_sub(session.sent_us) < limit_us;
            if recent { u64::from(session.unanswered) } else { 0 }
        };
        (0..self.sessions.high_water()).map(waiting).sum()
    }
}

impl Engine {
    /// Whether the target may still answer a datagram: one has not been answered, and the last was sent a moment ago.
    pub fn awaits_datagrams(&self, now_ns: u64) -> bool {
        self.udp.unanswered > 0 && now_ns.saturating_sub(self.udp.sent_at_ns) < timing::DATAGRAM_ANSWER_NS
    }

    /// A captured packet that is no TCP.
    pub(crate) fn on_other_packet<O: Output>(
        &mut self,
        now_ns: u64,
        mut frame: O::Frame,
        len: usize,
        out: &mut O,
    ) {
        let bytes = out.bytes(&mut frame);
        let bytes: &[u8] = &bytes[..len.min(bytes.len())];
        let datagram = if self.udp.services.is_empty() { None } else { parse_udp(&bytes).ok() };
        let Some(datagram) = datagram else {
            self.counters[Counter::PacketsUnparsable] += 1;
            out.release(frame);
            return;
        };
        let begin = usize::from(datagram.payload_offset);
        let payload = bytes.get(begin..begin + datagram.payload_len as usize);
        let whole = payload.is_some_and(|payload| payload.len() <= self.udp.payload.capacity());
        self.udp.payload.clear();
        self.udp.payload.extend_from_slice(payload.filter(|_| whole).unwrap_or(&[]));
        out.release(frame);
        let (packets, bytes) = if whole {
            self.on_datagram(now_ns, &datagram, out)
        } else {
            (Counter::PacketsUnparsable, Counter::BytesUnparsable)
        };
        self.counters[Counter::BytesCaptured] += u64::from(datagram.payload_len);
        self.counters[packets] += 1;
        self.counters[bytes] += u64::from(datagram.payload_len);
    }

    /// A datagram whose payload is in hand.
    fn on_datagram<O: Output>(&mut self, now_ns: u64, datagram: &UdpDatagram, out: &mut O) -> Fate {
        let client = Endpoint { ip: datagram.src, port: datagram.src_port };
        let server = Endpoint { ip: datagram.dst, port: datagram.dst_port };
        let Some(source) = self.udp_source(&server) else {
            return (Counter::PacketsNotService, Counter::BytesNotService);
        };
        if self.stopping.is_some() {
            return (Counter::PacketsStopping, Counter::BytesStopping);
        }
        let sampled_out = (Counter::PacketsSampledOut, Counter::BytesSampledOut);
        if !self.in_sample(&client) {
            return sampled_out;
        }
        let hash = pair_hash(self.config.seed, &client.ip, client.port, &server.ip, server.port);
        let known = self.udp.by_client.find(hash, |index| {
            let flow = &self.udp.flows[index];
            flow.client == client && flow.server == server
        });
        let now = tick(now_ns);
        let Some(f) = known.or_else(|| self.new_flow(now, hash, client, server, &source)) else {
            return (Counter::PacketsLimit, Counter::BytesLimit);
        };
        self.udp.flows[f].last_seen = now;
        if self.udp.flows[f].copies == 0 {
            return sampled_out;
        }
        self.refuse_other_family(f, &source);
        if self.udp.flows[f].sessions < self.udp.flows[f].wanted {
            self.open_copies(now, f, &source, out);
        }
        // RFC 768: a zero says that the sender made none. IPv6 has no such thing (RFC 8200 section 8.1).
        let payload_sum = (datagram.checksum != 0 || datagram.is_v6).then(|| sum(&self.udp.payload));
        let mut s = self.udp.flows[f].first_session;
        while s != NONE {
            self.send_datagram(now_ns, s, payload_sum, out);
            s = self.udp.sessions[s].next_copy;
        }
        (Counter::PacketsDatagrams, Counter::BytesDatagrams)
    }

    /// The online side of the services that a captured destination belongs to: its very address, else any.
    fn udp_source(&self, server: &Endpoint) -> Option<Endpoint> {
        let any = Endpoint { ip: ANY, port: server.port };
        [*server, any].into_iter().find(|source| self.udp.services.iter().any(|s| s.online == *source))
    }

    /// Whether a flow's copies have a source address for the target.
    fn udp_family_fits(&self, client: &Endpoint, target: &Endpoint) -> bool {
        !self.config.pool.is_empty() || is_v4(&client.ip) == is_v4(&target.ip)
    }

    fn new_flow(
        &mut self,
        now: Tick,
        hash: u32,
        client: Endpoint,
        server: Endpoint,
        source: &Endpoint,
    ) -> Option<u32> {
        let fits = |s: &&UdpService| s.online == *source && self.udp_family_fits(&client, &s.target);
        let services = self.udp.services.iter().filter(fits).count() as u32;
        if self.udp.flows.is_full() {
            return None;
        }
        let copies = self.next_copies();
        let flow = Flow {
            client,
            server,
            copies,
            wanted: services * u32::from(copies),
            sessions: 0,
            first_session: NONE,
            last_seen: now,
        };
        let f = self.udp.flows.insert(flow)?;
        self.udp.by_client.insert(hash, f);
        self.udp.aging.push_back((now.wrapping_add(timing::FLOW_IDLE), f));
        self.counters[Counter::DatagramFlows] += 1;
        Some(f)
    }

    /// Counts the copies that can have no source address.
    fn refuse_other_family(&mut self, f: u32, source: &Endpoint) {
        let Flow { client, copies, .. } = self.udp.flows[f];
        let refused = |s: &&UdpService| s.online == *source && !self.udp_family_fits(&client, &s.target);
        let copies = self.udp.services.iter().filter(refused).count() as u64 * u64::from(copies);
        self.counters[Counter::DatagramsWanted] += copies;
        self.counters[Counter::DatagramsRefusedFamily] += copies;
    }

    /// Gives the flow the copies that it wants and does not have; those that get no identity are counted.
    fn open_copies<O: Output>(&mut self, now: Tick, f: u32, source: &Endpoint, out: &mut O) {
        let flow = self.udp.flows[f];
        for place in 0..self.udp.services.len() {
            let UdpService { online, target, .. } = self.udp.services[place];
            if online != *source || !self.udp_family_fits(&flow.client, &target) {
                continue;
            }
            let mut live = 0;
            let mut s = flow.first_session;
            while s != NONE {
                live += u16::from(usize::from(self.udp.sessions[s].service) == place);
                s = self.udp.sessions[s].next_copy;
            }
            for copy in live..flow.copies {
                let refusal = if self.udp.sessions.is_full() {
                    Counter::DatagramsRefusedLimit
                } else if let Some(identity) =
                    self.choose_identity(now, flow.client, &target, copy, Protocol::Udp)
                {
                    self.open_copy(f, place, identity, out);
                    continue;
                } else {
                    Counter::DatagramsRefusedPool
                };
                self.counters[Counter::DatagramsWanted] += 1;
                self.counters[refusal] += 1;
            }
        }
    }

    fn open_copy<O: Output>(&mut self, f: u32, place: usize, identity: Endpoint, out: &mut O) {
        let session = Session {
            identity,
            service: place as u16,
            live: true,
            unanswered: 0,
            sent_us: 0,
            next_copy: self.udp.flows[f].first_session,
        };
        let Some(s) = self.udp.sessions.insert(session) else { return };
        let hash = self.udp_identity_hash(&session);
        self.udp.by_identity.insert(hash, s);
        let flow = &mut self.udp.flows[f];
        flow.first_session = s;
        flow.sessions += 1;
        out.register(self.udp_number(session.service), identity);
    }

    /// A service's number, by its place among those of UDP.
    fn udp_number(&self, place: u16) -> u16 {
        self.services.len() as u16 + place
    }

    fn udp_identity_hash(&self, session: &Session) -> u32 {
        let Endpoint { ip, port } = session.identity;
        let target = self.udp.services[usize::from(session.service)].target;
        pair_hash(self.config.seed, &ip, port, &target.ip, target.port)
    }

    fn send_datagram<O: Output>(&mut self, now_ns: u64, s: u32, payload_sum: Option<u16>, out: &mut O) {
        self.counters[Counter::DatagramsWanted] += 1;
        let fate = self.try_send_datagram(s, payload_sum, out);
        self.counters[fate] += 1;
        let place = usize::from(self.udp.sessions[s].service);
        let of_service = &mut self.udp.services[place].counters;
        of_service.datagrams_sent += u64::from(fate == Counter::DatagramsSent);
        of_service.packets_no_link += u64::from(fate == Counter::DatagramsNoLink);
        if fate != Counter::DatagramsSent {
            return;
        }
        self.counters[Counter::DatagramBytesSent] += self.udp.payload.len() as u64;
        let session = &mut self.udp.sessions[s];
        self.udp.unanswered += u64::from(session.unanswered < u16::MAX);
        session.unanswered = session.unanswered.saturating_add(1);
        session.sent_us = micros(now_ns);
        self.udp.sent_at_ns = now_ns;
    }

    fn try_send_datagram<O: Output>(&mut self, s: u32, payload_sum: Option<u16>, out: &mut O) -> Counter {
        let session = &self.udp.sessions[s];
        let payload = &self.udp.payload;
        let Some(template) = &self.udp.services[usize::from(session.service)].template else {
            return Counter::DatagramsNoLink;
        };
        if !template.fits(payload.len(), usize::from(self.config.frame_room)) {
            return Counter::DatagramsTooLarge;
        }
        let Some(mut frame) = out.allocate() else { return Counter::DatagramsNoFrame };
        let begin = template.headers_len();
        let bytes = out.bytes(&mut frame);
        bytes[begin..begin + payload.len()].copy_from_slice(payload);
        // A copy to IPv6 has a checksum in any case.
        let payload_sum = payload_sum.or_else(|| (!template.v4).then(|| sum(payload)));
        template.write(bytes, &session.identity, payload.len(), payload_sum);
        if out.transmit(frame, begin + payload.len()) {
            Counter::DatagramsSent
        } else {
            Counter::DatagramsNoFrame
        }
    }

    /// A datagram of a target, of which only the length is known.
    pub(crate) fn on_datagram_response(&mut self, now_ns: u64, record: &ResponseHeader) {
        let place = usize::from(record.service) - self.services.len();
        let identity = Endpoint { ip: record.addr, port: record.port };
        let found = self
            .udp
            .services
            .get(place)
            .and_then(|service| self.udp.find_identity(self.config.seed, &identity, &service.target));
        let Some(s) = found else {
            self.counters[Counter::ResponsesUnknown] += 1;
            return;
        };
        self.counters[Counter::DatagramResponses] += 1;
        self.udp.services[place].counters.datagrams_answered += 1;
        self.counters[Counter::DatagramResponseBytes] += u64::from(record.payload_len);
        let session = &mut self.udp.sessions[s];
        if session.unanswered > 0 {
            if session.unanswered == 1 {
                self.target_response.record(micros(now_ns).wrapping_sub(session.sent_us));
            }
            session.unanswered -= 1;
            self.udp.unanswered -= 1;
        }
    }

    /// Forgets the flows of which nothing came for long.
    pub(crate) fn end_idle_flows<O: Output>(&mut self, now: Tick, out: &mut O) {
        while let Some(&(due, f)) = self.udp.aging.front()
            && !before(now, due)
        {
            self.udp.aging.pop_front();
            let flow = self.udp.flows[f];
            if before(now, flow.last_seen.wrapping_add(timing::FLOW_IDLE)) {
                // Not idle: looked at again a whole time later, so that the queue stays in order.
                self.udp.aging.push_back((now.wrapping_add(timing::FLOW_IDLE), f));
            } else {
                self.forget_flow(now, f, out);
            }
        }
    }

    fn forget_flow<O: Output>(&mut self, now: Tick, f: u32, out: &mut O) {
        let flow = self.udp.flows[f];
        let mut s = flow.first_session;
        while s != NONE {
            let session = self.udp.sessions[s];
            self.udp.by_identity.remove(self.udp_identity_hash(&session), s);
            self.release_identity(&session.identity, now);
            out.unregister(self.udp_number(session.service), session.identity);
            self.udp.unanswered -= u64::from(session.unanswered);
            self.udp.sessions[s].live = false;
            self.udp.sessions.remove(s);
            s = session.next_copy;
        }
        let (client, server) = (flow.client, flow.server);
        let hash = pair_hash(self.config.seed, &client.ip, client.port, &server.ip, server.port);
        self.udp.by_client.remove(hash, f);
        self.udp.flows.remove(f);
    }
}
