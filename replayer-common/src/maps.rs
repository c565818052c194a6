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
    /// Array of one [`CaptureConfig`](super::CaptureConfig).
    pub const CONFIG: &str = "CONFIG";
    /// Array of [`HANDSHAKE_SLOTS`](super::HANDSHAKE_SLOTS) `u32`, private to `mirror`.
    pub const HANDSHAKES: &str = "HANDSHAKES";
    /// XSKMAP: queue index to AF_XDP socket.
    pub const XSKS: &str = "XSKS";
    /// Hash: [`Ip`](crate::addr::Ip) of this host to `u32`, which has no meaning.
    pub const LOCAL_ADDRESSES: &str = "LOCAL_ADDRESSES";
    /// Per-CPU array of `u64` by [`MirrorVerdict`](crate::counters::MirrorVerdict).
    pub const MIRROR_COUNTERS: &str = "MIRROR_COUNTERS";
    /// Per-CPU array of `u64` by [`CaptureVerdict`](crate::counters::CaptureVerdict).
    pub const CAPTURE_COUNTERS: &str = "CAPTURE_COUNTERS";
    /// Per-CPU array of `u64` by [`ResponsesVerdict`](crate::counters::ResponsesVerdict).
    pub const RESPONSES_COUNTERS: &str = "RESPONSES_COUNTERS";
}

/// A service: the address and port that requests go to (`mirror`) or responses come from (`responses`).
///
/// For each service two entries are to be inserted: [`ServiceKey::new`], and [`ServiceKey::address_only`], by which
/// fragments, which have no ports, are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ServiceKey {
    /// The address; [`ANY`](crate::addr::ANY) for every address of this host (`mirror` only).
    pub addr: Ip,
    /// The port, host order; 0, which is no port of a service, for the address alone.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

const _: () = assert!(size_of::<ServiceKey>() == 20 && align_of::<ServiceKey>() == 2);

impl ServiceKey {
    /// The service at `addr` and `port` (host order).
    #[inline(always)]
    pub fn new(addr: Ip, port: u16) -> ServiceKey {
        ServiceKey { addr, port, pad: 0 }
    }

    /// The entry that says that some service has this address.
    #[inline(always)]
    pub fn address_only(addr: Ip) -> ServiceKey {
        ServiceKey::new(addr, 0)
    }
}

/// What `mirror` has to know. One writer; the kernel copies it as a whole, but a program may see a torn update: each
/// field is meaningful by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CaptureConfig {
    /// Connections whose flow hash is below this are mirrored: [`sample_threshold`](crate::hash::sample_threshold).
    /// 2^32 is all of them.
    pub sample_threshold: u64,
    /// The mirror's near end; 0 switches mirroring off.
    pub mirror_ifindex: u32,
    /// Shards: queues of the mirror. A connection's shard is its flow hash modulo this; 0 counts as 1.
    pub shards: u32,
}

const _: () = assert!(size_of::<CaptureConfig>() == 16 && align_of::<CaptureConfig>() == 8);

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
