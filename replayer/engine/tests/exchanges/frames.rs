//! Captured frames as they come: tags, IPv6, IP options, fragments, options of TCP that nobody asked for, frames cut short.

use crate::lab::{Lab, ONLINE, S, TARGET, byte, config, endpoint, link};
use replayer_common::addr::{is_v4, v4_octets};
use replayer_common::packet::flags;
use replayer_engine::counters::Counter;

/// A client's packet, piece by piece. Checksums are left out: captured ones mean nothing.
struct Frame<'a> {
    tags: &'a [u16],
    client: &'a str,
    server: &'a str,
    ip_options: &'a [u8],
    /// The fragment field of IPv4.
    fragment: u16,
    flags: u8,
    seq: u32,
    ack: u32,
    options: &'a [u8],
    payload: usize,
}

const SYN: Frame<'_> = Frame {
    tags: &[],
    client: crate::lab::CLIENT,
    server: ONLINE,
    ip_options: &[],
    fragment: 0x4000,
    flags: flags::SYN,
    seq: 0,
    ack: 0,
    options: &[2, 4, 5, 180],
    payload: 0,
};
const REQUEST: Frame<'_> =
    Frame { flags: flags::PSH | flags::ACK, seq: 1, ack: 1, options: &[], payload: 100, ..SYN };

impl Frame<'_> {
    fn bytes(&self, lab: &Lab) -> Vec<u8> {
        let (client, server) = (endpoint(self.client), endpoint(self.server));
        let mut tcp = Vec::new();
        tcp.extend(client.port.to_be_bytes());
        tcp.extend(server.port.to_be_bytes());
        tcp.extend(lab.isns.client.wrapping_add(self.seq).to_be_bytes());
        let ack = if self.flags & flags::ACK == 0 { 0 } else { lab.isns.online.wrapping_add(self.ack) };
        tcp.extend(ack.to_be_bytes());
        tcp.extend([(20 + self.options.len() as u8) << 2, self.flags, 1, 0, 0, 0, 0, 0]);
        tcp.extend(self.options);
        tcp.extend((0..self.payload as u32).map(|i| byte(self.seq + i)));
        let mut frame = vec![8; 12];
        for tag in self.tags {
            frame.extend([0x81, 0, (tag >> 8) as u8, *tag as u8]);
        }
        if is_v4(&client.ip) {
            let len = 20 + self.ip_options.len();
            frame.extend([8, 0, 0x40 | (len / 4) as u8, 0]);
            frame.extend(((len + tcp.len()) as u16).to_be_bytes());
            frame.extend([0, 1]);
            frame.extend(self.fragment.to_be_bytes());
            frame.extend([64, 6, 0, 0]);
            frame.extend(v4_octets(&client.ip));
            frame.extend(v4_octets(&server.ip));
            frame.extend(self.ip_options);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(((self.ip_options.len() + tcp.len()) as u16).to_be_bytes());
            frame.extend([if self.ip_options.is_empty() { 6 } else { 60 }, 64]);
            frame.extend(client.ip);
            frame.extend(server.ip);
            frame.extend(self.ip_options);
        }
        frame.extend(tcp);
        frame
    }
}

#[track_caller]
fn capture(lab: &mut Lab, bytes: &[u8]) {
    let frame = lab.wire.captured_bytes(bytes);
    lab.engine.on_captured(lab.now, &mut vec![frame], &mut lab.wire);
    lab.check();
}

/// Captures a SYN and a request, as `change` makes them, and expects the request at the target.
#[track_caller]
fn replays<'a>(mut lab: Lab, change: impl Fn(Frame<'a>) -> Frame<'a>) {
    lab.client = endpoint(change(SYN).client);
    let syn = change(SYN).bytes(&lab);
    capture(&mut lab, &syn);
    lab.expect(&["S 0"]);
    lab.target("SA 0 ack 1 mss 1460");
    let request = change(REQUEST).bytes(&lab);
    capture(&mut lab, &request);
    lab.expect(&["A 1 ack 1", "PA 1+100 ack 1"]);
    lab.target("PA 1+50 ack 101");
    assert_eq!(lab.count(Counter::ReplayBytesDelivered), 100);
    lab.stop();
}

fn v6() -> Lab {
    let mut config = config();
    config.services[0].online = endpoint("[fd00::1:1]:80");
    config.services[0].target = endpoint("[fd00::2:1]:8080");
    Lab::with(config)
}

const V6_CLIENT: &str = "[fd00::1]:40000";
const V6_SERVER: &str = "[fd00::1:1]:80";

#[test]
fn b010_ipv6() {
    replays(v6(), |frame| Frame { client: V6_CLIENT, server: V6_SERVER, ..frame });
}

#[test]
fn b010_ipv6_with_destination_options() {
    let padding = [6u8, 0, 1, 4, 0, 0, 0, 0];
    replays(v6(), |frame| Frame { client: V6_CLIENT, server: V6_SERVER, ip_options: &padding, ..frame });
}

#[test]
fn b010_a_connection_that_was_open_before_over_ipv6() {
    let mut lab = v6();
    lab.client = endpoint(V6_CLIENT);
    lab.engine.expect_turn(lab.now, lab.client, endpoint(V6_SERVER));
    let request = Frame { client: V6_CLIENT, server: V6_SERVER, ..REQUEST }.bytes(&lab);
    capture(&mut lab, &request);
    lab.expect(&["S 0"]);
    lab.target("SA 0 ack 1 mss 1460");
    lab.expect(&["PA 1+100 ack 1"]);
}

#[test]
fn b011_vlan_tags_and_stacked_ones() {
    replays(Lab::new(), |frame| Frame { tags: &[7], ..frame });
    replays(Lab::new(), |frame| Frame { tags: &[1000, 7], ..frame });
}

#[test]
fn b011_tags_on_the_way_to_the_target() {
    let mut lab = Lab::new();
    let mut tagged = link();
    tagged.tags = [Some((0x88a8, 100)), Some((0x8100, 7))];
    lab.engine.set_link(0, Some(tagged));
    lab.handshake();
    lab.client("PA 1+100 ack 1");
    let sent = lab.wire.take_sent_bytes();
    assert_eq!(sent[0][12..22], [0x88, 0xa8, 0, 100, 0x81, 0, 0, 7, 8, 0]);
}

#[test]
fn b039_ip_options() {
    // Record route, and no operation.
    replays(Lab::new(), |frame| Frame { ip_options: &[7, 7, 4, 0, 0, 0, 0, 1], ..frame });
}

#[test]
fn b039_fragments_are_counted_and_leave_a_hole() {
    let mut lab = Lab::new();
    lab.handshake();
    for fragment in [0x2000, 0x0010, 0x2010] {
        let bytes = Frame { fragment, ..REQUEST }.bytes(&lab);
        capture(&mut lab, &bytes);
    }
    assert_eq!(lab.count(Counter::PacketsUnparsable), 3);
    // What follows them is not a request by itself.
    lab.client("PA 101+100 ack 1");
    lab.pass(2 * S);
    assert_eq!(lab.count(Counter::BytesGap), 100);
    assert_eq!(lab.count(Counter::ReplayBytesOffered), 0);
}

#[test]
fn b039_every_way_to_cut_a_frame_short() {
    for frame in [SYN, REQUEST, Frame { tags: &[7, 8], ip_options: &[1; 8], options: &[1; 12], ..REQUEST }] {
        let whole = frame.bytes(&Lab::new());
        let mut lab = Lab::new();
        for len in 0..whole.len() {
            capture(&mut lab, &whole[..len]);
        }
        assert_eq!(lab.count(Counter::PacketsUnparsable), whole.len() as u64);
        assert_eq!(lab.engine.gauges().connections_live, 0);
    }
}

#[test]
fn b039_odd_tcp_options() {
    let options: [&[u8]; 8] = [
        // Unknown, experimental, MD5 signature, user timeout.
        &[200, 4, 0, 0],
        &[253, 8, 1, 2, 3, 4, 5, 6],
        &[19, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
        &[28, 4, 0x80, 10],
        // Lengths of nothing, beyond the end, and too short for what they are.
        &[200, 0, 0, 0],
        &[200, 40, 0, 0],
        &[2, 3, 1, 1],
        // The end, and what comes after it.
        &[0, 2, 4, 0],
    ];
    for options in options {
        replays(Lab::new(), |frame| Frame { options, ..frame });
    }
}

/// The SYN that the target gets for one with these options and flags.
fn syn_for(options: &[u8], more_flags: u8, payload: usize) -> (Lab, Vec<u8>) {
    let mut lab = Lab::new();
    let syn = Frame { options, flags: flags::SYN | more_flags, payload, ..SYN }.bytes(&lab);
    capture(&mut lab, &syn);
    let mut sent = lab.wire.take_sent_bytes();
    assert_eq!(sent.len(), 1);
    (lab, sent.remove(0))
}

#[test]
fn b019_neither_multipath_nor_fast_open_nor_ecn_is_promised_to_the_target() {
    let mss = [2, 4, 5, 180];
    let multipath = [30, 4, 1, 0x81];
    let fast_open = [34, 2, 1, 1];
    let cookie = [34, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1];
    for (option, more_flags, payload) in
        [(&multipath[..], 0, 0), (&fast_open, 0, 0), (&cookie, 0, 60), (&[], flags::ECE | flags::CWR, 0)]
    {
        let options = [&mss, option].concat();
        let (mut lab, syn) = syn_for(&options, more_flags, payload);
        assert_eq!(syn[34 + 13], flags::SYN, "flags");
        assert_eq!(syn[34 + 20..], [2, 4, 5, 180], "options, and no data");
        lab.target("SA 0 ack 1 mss 1460");
        let sent = lab.wire.take_sent();
        assert_eq!(sent.iter().map(|segment| segment.payload.len()).sum::<usize>(), payload);
    }
}

#[test]
fn b039_urgent_data_is_data() {
    replays(Lab::new(), |frame| match frame.payload {
        0 => frame,
        _ => Frame { flags: frame.flags | flags::URG, ..frame },
    });
}

#[test]
fn b045_the_target_may_be_of_the_other_family_with_a_pool() {
    let mut config = config();
    config.services[0].target = endpoint("[fd00::2:1]:8080");
    config.pool = vec![replayer_engine::AddressRange { first: endpoint("[fd00::9:1]:1").ip, count: 1 }];
    let mut lab = Lab::with(config);
    lab.client("S 0 mss 1460");
    let sent = lab.sent();
    assert_eq!(sent.len(), 1);
    assert!(!is_v4(&sent[0].source.ip) && sent[0].destination != endpoint(TARGET));
}
