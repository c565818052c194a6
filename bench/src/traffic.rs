//! What engines are measured with: one service, clients that send to it, what its target says, and an engine for them.

use replayer_common::addr::{Endpoint, from_v4};
use replayer_common::response::{ResponseHeader, present};
use replayer_engine::config::{Config, Limits, Service};
use replayer_engine::{AddressRange, Engine, Link};

pub(crate) const SERVER: Endpoint = Endpoint { ip: from_v4([10, 0, 0, 1]), port: 80 };
pub(crate) const TARGET: Endpoint = Endpoint { ip: from_v4([10, 0, 0, 2]), port: 80 };
/// The ISN of each client.
pub(crate) const CLIENT_ISN: u32 = 1000;
/// The ISN of both servers.
pub(crate) const TARGET_ISN: u32 = 5000;

/// What clients send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Bytes of each data packet.
    pub(crate) payload: usize,
    /// With the timestamps option.
    pub(crate) timestamps: bool,
    /// Each packet is a request, answered by one byte that the client reads before the next.
    pub(crate) turns: bool,
}

/// A frame of 64 bytes on the wire: 60 without its check sequence, which no capture has. No room for timestamps.
pub(crate) const SMALL: Load = Load { payload: 6, timestamps: false, turns: false };
/// Bytes of a data packet of [`SMALL`].
pub(crate) const SMALL_FRAME: usize = 60;

/// The client of connection `i`.
pub(crate) fn client(i: u32) -> Endpoint {
    let [_, a, b, c] = (i / 60_000).to_be_bytes();
    Endpoint { ip: from_v4([11, a, b, c]), port: 1024 + (i % 60_000) as u16 }
}

/// Writes an Ethernet frame with a client's segment; returns its length.
pub(crate) fn write_segment(
    frame: &mut [u8],
    client: &Endpoint,
    seq: u32,
    ack: u32,
    control: u8,
    load: Load,
    payload: usize,
) -> usize {
    let tcp = if load.timestamps { 32 } else { 20 };
    let total = 20 + tcp + payload;
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    frame[16..18].copy_from_slice(&(total as u16).to_be_bytes());
    frame[26..30].copy_from_slice(&client.ip[12..]);
    frame[30..34].copy_from_slice(&SERVER.ip[12..]);
    frame[34..36].copy_from_slice(&client.port.to_be_bytes());
    frame[36..38].copy_from_slice(&SERVER.port.to_be_bytes());
    frame[38..42].copy_from_slice(&seq.to_be_bytes());
    frame[42..46].copy_from_slice(&ack.to_be_bytes());
    frame[46..54].copy_from_slice(&[(tcp as u8 / 4) << 4, control, 0xff, 0xff, 0, 0, 0, 0]);
    if load.timestamps {
        frame[54..66].copy_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0]);
    }
    14 + total
}

/// What the target says to the client of this identity.
pub(crate) fn response(
    identity: &Endpoint,
    control: u8,
    seq: u32,
    ack: u32,
    payload_len: u32,
) -> ResponseHeader {
    ResponseHeader {
        flags: control,
        port: identity.port,
        addr: identity.ip,
        window: 0xffff,
        seq,
        ack,
        payload_len,
        present: present::TIMESTAMPS | present::MSS | present::WINDOW_SCALE,
        mss: 1460,
        window_scale: 7,
        ..ResponseHeader::default()
    }
}

/// An engine with room for `connections`, each copied `copies` times, that sends frames of at most `frame_room` bytes from `now` on.
pub(crate) fn engine(connections: u32, copies: u32, frame_room: usize, now: u64) -> Engine {
    let mut config = Config::new(vec![Service { online: SERVER, target: TARGET }]);
    let sessions = (connections * copies) as usize;
    config.copies_millionths = u64::from(copies) * 1_000_000;
    if copies > 1 {
        config.pool = vec![AddressRange { first: from_v4([12, 0, 0, 0]), count: 256 }];
    }
    config.limits = Limits {
        sessions,
        connections: connections as usize,
        held_bytes: 256 << 20,
        identities: sessions * 2,
        // A batch of connections is opened before it is answered.
        copies_unanswered: u32::MAX,
        ..Limits::default()
    };
    config.frame_room = frame_room as u16;
    config.seed = 0x1234_5678_9abc_def0;
    let mut engine = Engine::new(config, now);
    engine
        .set_link(0, Some(Link { source_mac: [2; 6], destination_mac: [4; 6], tags: [None; 2], mtu: 1500 }));
    engine
}
