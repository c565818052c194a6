//! Behaviours 38 and 39: segments larger than the path to the target carries, and packets that are odd or broken.
//!
//! Root only; each test has a lab of its own.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, Result};
use etherparse::{IpFragOffset, Ipv4Header, PacketBuilder, TcpOptionElement};
use replayer_tests::clients::{Load, Watch};
use replayer_tests::conversation::{Conversation, Manner};
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::load::{Random, Summary};
use replayer_tests::packet::{Frames, PacketSocket};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::{Replay, service};
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::{holds_within, wait_for};

const STREAM: u16 = 9000;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

fn uploads(lab: &Lab) -> String {
    format!(
        "--connect {}:{STREAM} --connections 10 --per-connection 30 --requests 300 --body 1000-100000 --response 1-1000",
        lab.online().v4()
    )
}

#[test]
fn b038_no_packet_is_larger_than_the_path_to_the_target() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let target = lab.target().v4();
    lab.online().namespace().ip(&format!("route add {target} dev {NIC} mtu 1400\n"))?;
    let from_clients = format!("ip saddr {}", lab.client().v4());
    let longer = |bytes: u32| format!("{from_clients} ip length > {bytes}");
    let watch = Watch::arriving(
        lab.target(),
        &[("above_1400", &longer(1400)), ("above_1300", &longer(1300)), ("above_1200", &longer(1200))],
    )?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    assert_all_answered(&Load::run(&lab, "first", &uploads(&lab))?, 300);
    streams.ensure_equal(300)?;
    let before = watch.packets()?;
    assert_eq!(before["above_1400"], 0, "{before:?}");
    assert!(before["above_1300"] > 1000, "{before:?}");

    // The path becomes smaller while connections are open and sending.
    let load = format!("{} --first-id 1001 --rate 100", uploads(&lab));
    let mut second = Load::start(&lab, lab.client(), "second", &load)?;
    let arrived = |count: usize| streams.target.record().is_ok_and(|record| record.requests() > count);
    let mut arrived = arrived;
    assert!(holds_within(Duration::from_secs(5), || arrived(350)));
    lab.online().namespace().ip(&format!("route change {target} dev {NIC} mtu 1200\n"))?;
    assert!(holds_within(Duration::from_secs(5), || arrived(400)));
    let changed = watch.packets()?;
    assert_all_answered(&second.finish()?, 300);
    streams.ensure_equal(600)?;
    let after = watch.packets()?;
    assert_eq!(after["above_1200"], changed["above_1200"], "{changed:?} {after:?}");
    replay.stop()?;
    Ok(())
}

#[test]
fn b038_a_path_that_narrows_without_a_word_is_found_by_a_session_and_used_by_all() -> Result<()> {
    for v6 in [false, true] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let [client, online, target, assistant]: [IpAddr; 4] =
            [lab.client(), lab.online(), lab.target(), lab.assistant()]
                .map(|host| if v6 { host.v6().into() } else { host.v4().into() });
        let server = SocketAddr::new(online, STREAM);
        let uploads = |first: u64| {
            format!(
                "--connect {server} --connections 10 --per-connection 30 --requests 300 --first-id {first} --rate 100 \
                 --body 1000-30000 --response 1-1000"
            )
        };
        // As IPv4 counts: with the header, which a length of IPv6 leaves out.
        let longer = |bytes: u16| match v6 {
            true => format!("ip6 saddr {client} ip6 length > {}", bytes - 40),
            false => format!("ip saddr {client} ip length > {bytes}"),
        };
        let watch = Watch::arriving(lab.target(), &[("too_large", &longer(1350)), ("large", &longer(1200))])?;
        let replay = Replay::start_services(&lab, &[service(STREAM, target, STREAM)], assistant, &[])?;
        let mut first = Load::start(&lab, lab.client(), "first", &uploads(1))?;
        wait_for("half of the requests at the target", ARRIVAL, || {
            streams.target.record().is_ok_and(|record| record.requests() > 100)
        })?;
        // A router of the path loses what is too large for it, and nobody hears of that.
        lab.target().namespace().nft(&format!(
            "table netdev path {{ chain router {{ type filter hook ingress device {NIC} priority 1;\n{} drop\n}}\n}}\n",
            longer(1350)
        ))?;
        assert_all_answered(&first.finish()?, 300);
        streams.ensure_equal_within(300, Duration::from_secs(20))?;
        let found = watch.packets()?;
        // New sessions know what the others found out.
        assert_all_answered(&Load::run(&lab, "second", &uploads(1001))?, 300);
        streams.ensure_equal(600)?;
        let after = watch.packets()?;
        assert_eq!(after["too_large"], found["too_large"], "IPv6 {v6}: {found:?} {after:?}");
        assert!(after["large"] > found["large"] + 1000, "IPv6 {v6}: {found:?} {after:?}");
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("sessions_opened"), 20, "IPv6 {v6}: {:?}", report.counters);
    }
    Ok(())
}

#[test]
fn b038_jumbo_frames_are_cut_for_a_target_without_them() -> Result<()> {
    for (mtu, offloads) in [(9000, true), (9000, false), (3400, true), (3400, false)] {
        let lab = Lab::up(Plan { mtu, offloads, ..Plan::default() })?;
        // The target's own NIC tells its clients, the session among them, what fits.
        lab.target().namespace().ip(&format!("link set {NIC} mtu 1500\n"))?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let longer = format!("ip saddr {} ip length > 1500", lab.client().v4());
        let to_target = Watch::arriving(lab.target(), &[("above_1500", &longer)])?;
        let to_online = Watch::arriving(lab.online(), &[("above_1500", &longer)])?;
        let replay = Replay::start(&lab, &[STREAM], &[])?;
        assert_all_answered(&Load::run(&lab, "load", &uploads(&lab))?, 300);
        streams.ensure_equal(300)?;
        assert!(to_online.packets()?["above_1500"] > 100, "the clients sent no large packets");
        assert_eq!(to_target.packets()?["above_1500"], 0);
        replay.stop()?;
    }
    Ok(())
}

#[test]
fn b039_requests_with_ip_options_are_replayed() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let watch = Watch::arriving(lab.online(), &[("options", "ip hdrlength > 5")])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let server = SocketAddrV4::new(lab.online().v4(), STREAM);
    for number in 1..=10 {
        let mut connection = Conversation::open_in_manner(lab.client(), server, Manner::IpOptions)?;
        for (request, body) in [(1, 700), (2, 20_000), (3, 0)] {
            connection.ask(RequestHeader { id: number * 10 + request, body, response: 3000, delay_ms: 0 })?;
        }
    }
    assert!(watch.packets()?["options"] > 100);
    streams.ensure_equal(30)?;
    replay.stop()?;
    Ok(())
}

#[test]
fn b039_broken_packets_are_counted_and_harm_nothing() -> Result<()> {
    const FRAMES: u32 = 20_000;
    let lab = Lab::up(Plan { clients: 2, offloads: false, ..Plan::default() })?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --rate 500 --seconds 3 --body 1-5000 --response 1-5000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    let source = lab.host("client2");
    let socket = source.namespace().enter(|| PacketSocket::open(NIC, Frames::Arriving))??;
    let mut random = Random::new(39);
    let header =
        (mac(&source.mac())?, mac(&lab.online().mac())?, source.v4().octets(), lab.online().v4().octets());
    for _ in 0..FRAMES {
        let frame = broken_frame(&mut random, header)?;
        holds_within(Duration::from_secs(1), || socket.send(&frame).is_ok());
    }
    let summary = load.finish()?;
    assert_all_answered(&summary, summary.requests);
    let (online, target) = streams.records(summary.requests as usize, Duration::from_secs(5))?;
    let of_client = |record: &replayer_tests::stream::Record| {
        let client = format!("{}:", lab.client().v4());
        let connections =
            record.connections.iter().filter(|it| it.peer.starts_with(&client)).cloned().collect();
        replayer_tests::stream::Record { connections }
    };
    let comparison = replayer_tests::stream::compare(&of_client(&online), &of_client(&target));
    assert!(comparison.differences.is_empty() && comparison.compared == 20, "{comparison:#?}");
    let (report, _) = replay.stop()?;
    for counter in ["packets_unparsable", "packets_no_connection"] {
        assert!(report.counter(counter) > 100, "{counter}: {:?}", report.counters);
    }
    Ok(())
}

type Header = ([u8; 6], [u8; 6], [u8; 4], [u8; 4]);

/// A TCP segment to the service with any flags, options and data, which is then broken in one of several ways, or not at all.
fn broken_frame(random: &mut Random, (from, to, source, destination): Header) -> Result<Vec<u8>> {
    let mut number = |limit: u32| random.within(&(0..=limit - 1));
    let options = [
        TcpOptionElement::MaximumSegmentSize(number(65_536) as u16),
        TcpOptionElement::WindowScale(number(256) as u8),
        TcpOptionElement::Timestamp(number(u32::MAX), number(u32::MAX)),
        TcpOptionElement::SelectiveAcknowledgementPermitted,
    ];
    let count = number(options.len() as u32 + 1) as usize;
    let payload: Vec<u8> = (0..number(1200)).map(|at| at as u8).collect();
    let fragment = number(4);
    let ip = Ipv4Header {
        dont_fragment: false,
        more_fragments: fragment == 1,
        fragment_offset: IpFragOffset::try_new(if fragment == 2 { 185 } else { 0 })?,
        identification: number(65_536) as u16,
        ..Ipv4Header::new(0, 64, etherparse::IpNumber::TCP, source, destination)?
    };
    let mut tcp = etherparse::TcpHeader::new(1024 + number(60_000) as u16, STREAM, number(u32::MAX), 64_240);
    tcp.set_options(&options[..count])?;
    tcp.acknowledgment_number = number(u32::MAX);
    let flags = number(64);
    tcp.syn = flags & 1 != 0;
    tcp.ack = flags & 2 != 0;
    tcp.fin = flags & 4 != 0;
    tcp.rst = flags & 8 != 0;
    tcp.psh = flags & 16 != 0;
    tcp.urg = flags & 32 != 0;
    let builder = PacketBuilder::ethernet2(from, to)
        .ip(etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default()))
        .tcp_header(tcp);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, &payload)?;
    match number(4) {
        // Cut short anywhere behind the Ethernet header.
        0 => frame.truncate(14 + number(frame.len() as u32 - 14) as usize),
        // Some bytes of the headers are others.
        1 => {
            for _ in 0..=number(4) {
                let at = 14 + number(60.min(frame.len() as u32 - 14)) as usize;
                frame[at] = number(256) as u8;
            }
        }
        // Option lengths that are none.
        2 => {
            for byte in frame.iter_mut().skip(54).take(12) {
                *byte = number(256) as u8;
            }
        }
        _ => {}
    }
    Ok(frame)
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("a MAC address has six bytes")
}
