//! UDP services: what becomes of captured datagrams, read by a parser that is not the engine's, checksums included.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::hash::sample_threshold;
use replayer_common::response::ResponseHeader;
use replayer_engine::config::{Config, Limits, Service};
use replayer_engine::counters::Counter;
use replayer_engine::{AddressRange, Engine, Link, Output};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

const S: u64 = 1_000_000_000;
const ONLINE: &str = "10.0.1.1:53";
const TARGET: &str = "10.0.2.1:5353";
const CLIENT: &str = "10.0.0.1:40000";
const ONLINE_V6: &str = "[fd00::1]:53";
const TARGET_V6: &str = "[fd00::2]:5353";
const CLIENT_V6: &str = "[fd00::9]:40000";

fn endpoint(text: &str) -> Endpoint {
    text.parse::<SocketAddr>().unwrap().into()
}

fn service(online: &str, target: &str) -> Service {
    Service { online: endpoint(online), target: endpoint(target) }
}

/// TCP to the same addresses as UDP: neither takes the other's packets.
fn config() -> Config {
    let mut config = Config::new(vec![service(ONLINE, TARGET)]);
    config.udp_services = vec![service(ONLINE, TARGET), service(ONLINE_V6, TARGET_V6)];
    config.limits = Limits {
        connections: 1000,
        sessions: 1000,
        held_bytes: 1 << 20,
        identities: 1 << 10,
        ..Limits::default()
    };
    config
}

#[derive(Debug, PartialEq, Eq, Clone)]
struct Sent {
    source: SocketAddr,
    destination: SocketAddr,
    payload: Vec<u8>,
    checksum: u16,
}

#[derive(Default)]
struct Wire {
    sent: Vec<Sent>,
    registered: BTreeSet<(u16, SocketAddr)>,
    full: bool,
}

impl Output for Wire {
    type Frame = Vec<u8>;

    fn allocate(&mut self) -> Option<Vec<u8>> {
        (!self.full).then(|| vec![0xee; 2048])
    }

    fn bytes<'a>(&'a mut self, frame: &'a mut Vec<u8>) -> &'a mut [u8] {
        frame
    }

    fn release(&mut self, _: Vec<u8>) {}

    fn transmit(&mut self, frame: Vec<u8>, len: usize) -> bool {
        self.sent.push(parse(&frame[..len]));
        true
    }

    fn register(&mut self, service: u16, identity: Endpoint) {
        assert!(self.registered.insert((service, identity.to_std())), "{identity} is registered twice");
    }

    fn unregister(&mut self, service: u16, identity: Endpoint) {
        assert!(self.registered.remove(&(service, identity.to_std())), "{identity} was not registered");
    }
}

fn parse(frame: &[u8]) -> Sent {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Udp(udp)) = packet.transport else { panic!("not UDP: {frame:02x?}") };
    let header = udp.to_header();
    let (source, destination, expected): (IpAddr, IpAddr, u16) = match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            let ip = ip.header();
            assert_eq!(ip.header_checksum(), ip.to_header().calc_header_checksum());
            assert_eq!(usize::from(ip.total_len()), frame.len() - 14);
            let expected = header.calc_checksum_ipv4(&ip.to_header(), udp.payload()).unwrap();
            (ip.source_addr().into(), ip.destination_addr().into(), expected)
        }
        NetSlice::Ipv6(ip) => {
            let ip = ip.header();
            assert_ne!(header.checksum, 0, "IPv6 has no datagrams without a checksum");
            let expected = header.calc_checksum_ipv6(&ip.to_header(), udp.payload()).unwrap();
            (ip.source_addr().into(), ip.destination_addr().into(), expected)
        }
        NetSlice::Arp(_) => panic!("ARP"),
    };
    assert!(header.checksum == 0 || header.checksum == expected, "{:04x} {expected:04x}", header.checksum);
    Sent {
        source: SocketAddr::new(source, udp.source_port()),
        destination: SocketAddr::new(destination, udp.destination_port()),
        payload: udp.payload().to_vec(),
        checksum: header.checksum,
    }
}

fn frame(from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => panic!("two families"),
    };
    let mut out = Vec::new();
    ip.udp(from.port(), to.port()).write(&mut out, payload).unwrap();
    out
}

struct Lab {
    engine: Engine,
    wire: Wire,
    now: u64,
}

impl Lab {
    fn new(config: Config) -> Lab {
        let services = config.services.len() + config.udp_services.len();
        let now = 5_000 * S;
        let mut engine = Engine::new(config, now);
        for service in 0..services {
            let link = Link { source_mac: [2; 6], destination_mac: [4; 6], tags: [None; 2], mtu: 1500 };
            engine.set_link(service, Some(link));
        }
        Lab { engine, wire: Wire::default(), now }
    }

    /// A captured frame; what is sent because of it. The accounts hold.
    fn capture(&mut self, frame: Vec<u8>) -> Vec<Sent> {
        let len = frame.len();
        self.engine.on_captured(self.now, &mut vec![(frame, len)], &mut self.wire);
        for (name, left, right) in self.engine.counters().identities(&self.engine.pending()) {
            assert_eq!(left, right, "{name}: {:?}", self.engine.counters());
        }
        std::mem::take(&mut self.wire.sent)
    }

    fn client(&mut self, from: &str, to: &str, payload: &[u8]) -> Vec<Sent> {
        self.capture(frame(from, to, payload))
    }

    fn wait(&mut self, seconds: u64) {
        self.now += seconds * S;
        self.engine.on_timers(self.now, &mut self.wire);
    }

    fn counter(&self, counter: Counter) -> u64 {
        self.engine.counters()[counter]
    }
}

#[test]
fn a_datagram_goes_to_the_target_at_once_from_its_clients_address() {
    let mut lab = Lab::new(config());
    for (client, online, target, number) in
        [(CLIENT, ONLINE, TARGET, 1), (CLIENT_V6, ONLINE_V6, TARGET_V6, 2)]
    {
        for payload in [&b"query"[..], b"", b"odd", &[0xff; 1400]] {
            let sent = lab.client(client, online, payload);
            assert_eq!(sent.len(), 1);
            assert_eq!(sent[0].source, client.parse().unwrap());
            assert_eq!(sent[0].destination, target.parse().unwrap());
            assert_eq!(sent[0].payload, payload);
            assert_ne!(sent[0].checksum, 0);
        }
        assert!(lab.wire.registered.contains(&(number, client.parse().unwrap())));
    }
    assert_eq!(lab.counter(Counter::DatagramFlows), 2);
    assert_eq!(lab.counter(Counter::DatagramsSent), 8);
    assert_eq!(lab.counter(Counter::DatagramBytesSent), 2 * 1408);
}

#[test]
fn no_checksum_stays_none_in_ipv4_and_never_is_in_ipv6() {
    let mut lab = Lab::new(config());
    let mut bare = frame(CLIENT, ONLINE, b"query");
    bare[40..42].fill(0);
    assert_eq!(lab.capture(bare)[0].checksum, 0);
    let mut bare = frame(CLIENT_V6, ONLINE_V6, b"query");
    bare[60..62].fill(0);
    assert_ne!(lab.capture(bare)[0].checksum, 0);
    // A sum that comes out as zero is sent as its other form: one of all values of two bytes has it.
    let mut other_form = 0;
    for value in 0..=u16::MAX {
        let sent = lab.client(CLIENT, ONLINE, &value.to_be_bytes());
        assert_ne!(sent[0].checksum, 0);
        other_form += u32::from(sent[0].checksum == 0xffff);
    }
    assert!(other_form > 0);
}

#[test]
fn copies_have_identities_of_their_own() {
    let mut config = config();
    config.copies_millionths = 3_000_000;
    let mut lab = Lab::new(config.clone());
    let first = lab.client(CLIENT, ONLINE, b"1");
    let sources: BTreeSet<SocketAddr> = first.iter().map(|sent| sent.source).collect();
    assert_eq!(sources.len(), 3);
    assert!(sources.contains(&CLIENT.parse().unwrap()));
    assert!(sources.iter().all(|source| source.ip().to_string() == "10.0.0.1"));
    // The next ones of the flow have the same.
    let second: BTreeSet<SocketAddr> =
        lab.client(CLIENT, ONLINE, b"2").iter().map(|sent| sent.source).collect();
    assert_eq!(second, sources);

    // From a pool, and as many as it has.
    config.pool = vec![AddressRange { first: from_v4([172, 29, 0, 1]), count: 1 }];
    config.udp_services.truncate(1);
    config.limits.identities = 4;
    let mut lab = Lab::new(config);
    assert_eq!(lab.client(CLIENT, ONLINE, b"1").len(), 3);
    let sent = lab.client("10.0.0.2:40000", ONLINE, b"1");
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].source.ip().to_string(), "172.29.0.1");
    assert_eq!(lab.counter(Counter::DatagramsRefusedPool), 2);
    // A flow that is idle gives its identities back, and they are taken up again after their rest.
    lab.wait(29);
    lab.client(CLIENT, ONLINE, b"2");
    lab.wait(2);
    lab.wait(3);
    assert_eq!(lab.client("10.0.0.3:40000", ONLINE, b"1").len(), 1, "that of the second client");
    lab.wait(33);
    lab.wait(3);
    assert_eq!(lab.client("10.0.0.4:40000", ONLINE, b"1").len(), 3);
}

#[test]
fn b044_whole_flows_are_in_the_sample() {
    let mut config = config();
    config.sample_threshold = sample_threshold(20.0);
    let mut lab = Lab::new(config);
    let mut kept = 0;
    for port in 20_000..21_000 {
        let client = format!("10.0.0.1:{port}");
        let sent: usize = (0..3).map(|_| lab.client(&client, ONLINE, b"q").len()).sum();
        assert!(sent == 0 || sent == 3, "{sent}");
        kept += sent;
    }
    assert!((450..750).contains(&kept), "{kept} of 3000");
    assert_eq!(lab.counter(Counter::PacketsSampledOut), 3000 - kept as u64);
}

#[test]
fn what_cannot_be_sent_is_counted_by_reason() {
    let mut lab = Lab::new(config());
    assert!(lab.client(CLIENT, "10.0.1.1:54", b"q").is_empty());
    assert_eq!(lab.counter(Counter::PacketsNotService), 1);
    assert_eq!(lab.client(CLIENT, ONLINE, &[1; 1472]).len(), 1, "1500 bytes with its headers");
    assert!(lab.client(CLIENT, ONLINE, &[1; 1473]).is_empty());
    assert_eq!(lab.counter(Counter::DatagramsTooLarge), 1);
    // The capture cut it, or it is a fragment.
    let mut cut = frame(CLIENT, ONLINE, &[1; 100]);
    cut.truncate(80);
    assert!(lab.capture(cut).is_empty());
    let mut fragment = frame(CLIENT, ONLINE, &[1; 100]);
    fragment[20] = 0x20;
    assert!(lab.capture(fragment).is_empty());
    assert_eq!(lab.counter(Counter::PacketsUnparsable), 2);
    lab.wire.full = true;
    assert!(lab.client(CLIENT, ONLINE, b"q").is_empty());
    assert_eq!(lab.counter(Counter::DatagramsNoFrame), 1);
    lab.wire.full = false;
    lab.engine.set_link(1, None);
    assert!(lab.client(CLIENT, ONLINE, b"q").is_empty());
    assert_eq!(lab.counter(Counter::DatagramsNoLink), 1);
    let by_service: Vec<_> =
        lab.engine.service_counters().map(|c| (c.datagrams_sent, c.packets_no_link)).collect();
    assert_eq!(by_service, [(0, 0), (1, 1), (0, 0)]);
    lab.engine.stop(lab.now, &mut lab.wire);
    assert!(lab.engine.stopped());
    assert!(lab.client(CLIENT, ONLINE, b"q").is_empty());
    assert_eq!(lab.counter(Counter::PacketsStopping), 1);

    // A target of another family has no use for the client's address.
    let mut other = config();
    other.udp_services = vec![service(ONLINE, TARGET_V6), service(ONLINE, TARGET)];
    let mut lab = Lab::new(other);
    assert_eq!(lab.client(CLIENT, ONLINE, b"q").len(), 1);
    assert_eq!(lab.counter(Counter::DatagramsRefusedFamily), 1);

    // More flows than there is room for.
    let mut few = config();
    few.limits.connections = 2;
    let mut lab = Lab::new(few);
    for port in 1..=3 {
        lab.client(&format!("10.0.0.1:{port}"), ONLINE, b"q");
    }
    assert_eq!((lab.counter(Counter::DatagramsSent), lab.counter(Counter::PacketsLimit)), (2, 1));
}

#[test]
fn responses_are_counted_and_never_answered() {
    let mut lab = Lab::new(config());
    lab.client(CLIENT, ONLINE, b"q");
    assert!(lab.engine.awaits_datagrams(lab.now));
    let identity = endpoint(CLIENT);
    let record = ResponseHeader {
        service: 1,
        port: identity.port,
        addr: identity.ip,
        payload_len: 300,
        ..ResponseHeader::default()
    };
    let stranger = ResponseHeader { port: 9, ..record };
    let no_service = ResponseHeader { service: 99, ..record };
    lab.engine.on_responses(lab.now, &[record, record, stranger, no_service], &mut lab.wire);
    assert_eq!(lab.counter(Counter::DatagramResponses), 2);
    assert_eq!(lab.counter(Counter::DatagramResponseBytes), 600);
    let answered: Vec<_> = lab.engine.service_counters().map(|c| c.datagrams_answered).collect();
    assert_eq!(answered, [0, 2, 0]);
    assert_eq!(lab.counter(Counter::ResponsesUnknown), 2);
    assert!(!lab.engine.awaits_datagrams(lab.now));
    assert!(lab.wire.sent.is_empty());
    let live: Vec<(u16, SocketAddr)> =
        lab.engine.identities(0).map(|(_, service, identity)| (service, identity.to_std())).collect();
    assert_eq!(live, [(1, CLIENT.parse().unwrap())]);
    // Idle: nothing stays.
    lab.wait(31);
    assert!(lab.wire.registered.is_empty());
    assert_eq!(lab.engine.identities(0).count(), 0);
}
