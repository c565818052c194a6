//! What a port and the kernel count.

use std::io;
use std::ops::AddAssign;
use std::os::fd::BorrowedFd;

use serde::Serialize;

use super::sockets::statistics;

/// What a port counted itself. All only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PortCounters {
    /// Packets received.
    pub received: u64,
    /// Received packets that began elsewhere in their frame than at [`HEADROOM`](super::HEADROOM) and were thrown away. Not
    /// zero means that an XDP program in front of this port moves the head of packets.
    pub misplaced: u64,
    /// Packets accepted by [`Port::transmit`](super::Port::transmit).
    pub transmitted: u64,
    /// Packets whose frame the kernel gave back; `dropped` ones are among them.
    pub completed: u64,
    /// Packets that the device refused, for example without a carrier.
    #[serde(rename = "dropped_by_device")]
    pub dropped: u64,
    /// System calls that asked the kernel to transmit.
    pub kicks: u64,
    /// Of these, the ones that the kernel stopped before the ring was empty.
    #[serde(rename = "kicks_cut_short")]
    pub again: u64,
    /// Of these, the ones that found the device down or gone.
    pub link_down: u64,
}

/// What the kernel counted for one socket (`XDP_STATISTICS`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SocketStatistics {
    /// Received packets dropped: larger than a frame, or (copied) for want of a frame in the fill ring.
    pub rx_dropped: u64,
    /// Received packets dropped because the RX ring was full.
    pub rx_ring_full: u64,
    /// Times that the kernel found no frame in the fill ring. Of copied packets each is among `rx_dropped`, too.
    pub rx_fill_ring_empty: u64,
    /// Descriptors of the receiving side that the kernel refused.
    #[serde(rename = "rx_invalid_descriptors")]
    pub rx_invalid_descs: u64,
    /// Descriptors in the TX ring that the kernel refused.
    #[serde(rename = "tx_invalid_descriptors")]
    pub tx_invalid_descs: u64,
    /// Times that the kernel looked into an empty TX ring.
    pub tx_ring_empty: u64,
}

/// Statistics of both sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Of the receiving side.
    #[serde(rename = "capture_socket")]
    pub rx: SocketStatistics,
    /// Of the transmitting side.
    #[serde(rename = "transmit_socket")]
    pub tx: SocketStatistics,
}

impl AddAssign for PortCounters {
    fn add_assign(&mut self, other: PortCounters) {
        self.received += other.received;
        self.misplaced += other.misplaced;
        self.transmitted += other.transmitted;
        self.completed += other.completed;
        self.dropped += other.dropped;
        self.kicks += other.kicks;
        self.again += other.again;
        self.link_down += other.link_down;
    }
}

impl AddAssign for SocketStatistics {
    fn add_assign(&mut self, other: SocketStatistics) {
        self.rx_dropped += other.rx_dropped;
        self.rx_ring_full += other.rx_ring_full;
        self.rx_fill_ring_empty += other.rx_fill_ring_empty;
        self.rx_invalid_descs += other.rx_invalid_descs;
        self.tx_invalid_descs += other.tx_invalid_descs;
        self.tx_ring_empty += other.tx_ring_empty;
    }
}

impl SocketStatistics {
    /// Received packets that were lost between kernel and port.
    pub fn lost(&self) -> u64 {
        self.rx_dropped + self.rx_ring_full
    }

    pub(super) fn read(socket: BorrowedFd<'_>) -> io::Result<SocketStatistics> {
        let s = statistics(socket)?;
        Ok(SocketStatistics {
            rx_dropped: s.rx_dropped,
            rx_ring_full: s.rx_ring_full,
            rx_fill_ring_empty: s.rx_fill_ring_empty_descs,
            rx_invalid_descs: s.rx_invalid_descs,
            tx_invalid_descs: s.tx_invalid_descs,
            tx_ring_empty: s.tx_ring_empty_descs,
        })
    }
}
