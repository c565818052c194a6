//! The BPF maps: their names, their limits, and the layout of their keys and values.
//!
//! Everything here is plain bytes without implicit padding, since the kernel compares keys byte by byte.

use crate::addr::Ip;

/// Services that fit into the `SERVICES` map, two entries each.
pub const MAX_SERVICES: u32 = 4096;
/// Queues of a NIC, or shards of a mirror, that the `XSKS` map can serve.
pub const MAX_QUEUES: u32 = 256;
/// Addresses of this host in the `LOCAL_ADDRESSES` map.
pub const MAX_LOCAL_ADDRESSES: u32 = 4096;
/// Networks of clients, chosen or left out, that fit into the `CLIENTS` map. It holds two entries more: one for all of IPv4, one for all else.
pub const MAX_CLIENT_NETS: u32 = 4096;
/// Words of the port bitmap: 65 536 ports.
pub const PORT_WORDS: u32 = 65_536 / 64;
/// Slots of the handshake table. A slot that two connections share costs one of them the mirroring of its
/// handshake's last ACK, or gains an ACK that nobody needs; no data is ever lost by it.
pub const HANDSHAKE_SLOTS: u32 = 65_536;

/// Names of the maps, as a loader has to spell them.
pub mod names {
    /// Hash: [`ServiceKey`](super::ServiceKey) to `u32`, which has no meaning: what counts is that the key is there.
    pub const SERVICES: &str = "SERVICES";
    /// Array of [`PORT_WORDS`](super::PORT_WORDS) `u64`: bit `port % 64` of word `port / 64` is set when any service
    /// has that port. It makes unrelated traffic cheap, and what it leaves out no program looks at.
    pub const PORTS: &str = "PORTS";
    /// Array of one [`CaptureConfig`](super::CaptureConfig), for `mirror`, `ring` and `span`.
    pub const CONFIG: &str = "CONFIG";
    /// LPM trie: [`Ip`](crate::addr::Ip) and prefix length, of its 128 bits, to `u32`: 1 for a network whose clients are chosen, 0 for one whose
    /// clients are left out. While [`CaptureConfig::choose_clients`](super::CaptureConfig::choose_clients) is set, each address has an entry.
    pub const CLIENTS: &str = "CLIENTS";
    /// Array of [`HANDSHAKE_SLOTS`](super::HANDSHAKE_SLOTS) `u32`, private to `mirror`, `ring` and `span`, of which one runs.
    pub const HANDSHAKES: &str = "HANDSHAKES";
    /// Array of maps: the ring buffer of each shard, private to `ring` and its reader.
    pub const RINGS: &str = "RINGS";
    /// Array of [`MAX_QUEUES`](super::MAX_QUEUES) `u64` by shard: not zero while the ring's reader sleeps. Whoever wakes it sets it to zero.
    pub const SLEEPING: &str = "SLEEPING";
    /// XSKMAP: queue index to AF_XDP socket.
    pub const XSKS: &str = "XSKS";
    /// Hash: [`Ip`](crate::addr::Ip) of this host to `u32`, which has no meaning.
    pub const LOCAL_ADDRESSES: &str = "LOCAL_ADDRESSES";
    /// Per-CPU array of `u64` by [`MirrorVerdict`](crate::counters::MirrorVerdict).
    pub const MIRROR_COUNTERS: &str = "MIRROR_COUNTERS";
    /// Per-CPU array of `u64` by [`RingVerdict`](crate::counters::RingVerdict).
    pub const RING_COUNTERS: &str = "RING_COUNTERS";
    /// Per-CPU array of `u64` by [`SpanVerdict`](crate::counters::SpanVerdict).
    pub const SPAN_COUNTERS: &str = "SPAN_COUNTERS";
    /// Per-CPU array of `u64` by [`CaptureVerdict`](crate::counters::CaptureVerdict).
    pub const CAPTURE_COUNTERS: &str = "CAPTURE_COUNTERS";
    /// Per-CPU array of `u64` by [`ResponsesVerdict`](crate::counters::ResponsesVerdict).
    pub const RESPONSES_COUNTERS: &str = "RESPONSES_COUNTERS";
}

/// A service: the address and port that requests go to (`mirror`, `ring`, `span`) or responses come from (`responses`).
///
/// For each service two entries are to be inserted: [`ServiceKey::new`], and [`ServiceKey::address_only`], by which
/// fragments, which have no ports, are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ServiceKey {
    /// The address; [`ANY`](crate::addr::ANY) for every address of this host (`mirror` and `ring`), for every address (`span`); not
    /// for `responses`.
    pub addr: Ip,
    /// The port, host order; 0, which is no port of a service, for the address alone.
    pub port: u16,
    /// The transport protocol's number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

const _: () = assert!(size_of::<ServiceKey>() == 20 && align_of::<ServiceKey>() == 2);

impl ServiceKey {
    /// The service at `addr` and `port` (host order), of the protocol with this number.
    #[inline(always)]
    pub fn new(protocol: u8, addr: Ip, port: u16) -> ServiceKey {
        ServiceKey { addr, port, protocol, pad: 0 }
    }

    /// The entry that says that some service of the protocol has this address.
    #[inline(always)]
    pub fn address_only(protocol: u8, addr: Ip) -> ServiceKey {
        ServiceKey::new(protocol, addr, 0)
    }
}

/// What comes before the packet in a record of a ring. All are native integers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RingHeader {
    /// Bytes of the packet, from the Ethernet header on. The record may be longer.
    pub len: u32,
    /// Payload of the segments that receive offload put together to this packet, bytes; 0: it is one segment.
    pub segment_len: u32,
    /// When the program had the packet: `bpf_ktime_get_ns()`, which is CLOCK_MONOTONIC, ns.
    pub captured_ns: u64,
}

/// Bytes of a [`RingHeader`].
pub const RING_HEADER_LEN: usize = size_of::<RingHeader>();
/// The largest packet in a ring: what an IP length field can say, behind an Ethernet header with two VLAN tags, rounded up to eight bytes.
pub const RING_MAX_PACKET: usize = (65_535 + 22usize).next_multiple_of(8);

/// What the programs on the capture interface have to know. One writer; the kernel copies it as a whole, but a program may see a torn update: each
/// field is meaningful by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CaptureConfig {
    /// Connections whose flow hash is below this are captured: [`sample_threshold`](crate::hash::sample_threshold).
    /// 2^32 is all of them.
    pub sample_threshold: u64,
    /// `mirror`: the mirror's near end; 0 switches mirroring off.
    pub mirror_ifindex: u32,
    /// `mirror` and `ring`: queues of the mirror, or rings. A connection's shard is its flow hash modulo this; 0 counts as 1.
    pub shards: u32,
    /// `span`: the interface's own address. What is sent to another host's ends here.
    pub mac: [u8; 6],
    /// Not zero: `CLIENTS` says whose packets are captured. Else everybody's are, and the map is not looked at.
    pub choose_clients: u8,
    /// Zero.
    pub pad: u8,
}

const _: () = assert!(size_of::<CaptureConfig>() == 24 && align_of::<CaptureConfig>() == 8);

/// Where a port's bit is in the `PORTS` map: the word's index and the bit's mask.
#[inline(always)]
pub fn port_bit(port: u16) -> (u32, u64) {
    (u32::from(port) / 64, 1 << (port % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_has_its_own_bit() {
        assert_eq!(port_bit(0), (0, 1));
        assert_eq!(port_bit(80), (1, 1 << 16));
        assert_eq!(port_bit(65_535), (PORT_WORDS - 1, 1 << 63));
    }
}
