//! The NIC of a mirror port: it serves nobody, and for as long as requests are captured it takes in what is sent to others.
//!
//! One AF_XDP socket on each of its receive queues. A socket gets what arrives on its queue and nothing else, so a connection
//! lives in the worker of the queue that the NIC puts it on. NICs choose the queue by a hash of the addresses and ports, so it is one queue for
//! all packets of a connection; which one, only the NIC knows.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket};
use nix::{setsockopt_impl, sockopt_impl};

use crate::net::Device;
use crate::placement::Workers;

sockopt_impl!(
    /// `PACKET_ADD_MEMBERSHIP` of packet(7).
    PacketMembership,
    SetOnly,
    libc::SOL_PACKET,
    libc::PACKET_ADD_MEMBERSHIP,
    libc::packet_mreq
);

/// Promiscuous mode, for as long as this value, or its process, lives: the kernel counts who wants it by socket.
#[derive(Debug)]
pub struct Promiscuous {
    _socket: OwnedFd,
}

impl Promiscuous {
    /// Takes in all that arrives at the device.
    ///
    /// # Errors
    /// What the kernel refused, with the remedy.
    pub fn set(device: &Device) -> Result<Promiscuous> {
        let what =
            || format!("switch {} to promiscuous mode; CAP_NET_RAW is needed, run as root", device.name);
        // Without a protocol it receives nothing.
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).with_context(what)?;
        let membership = libc::packet_mreq {
            mr_ifindex: device.ifindex as i32,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        setsockopt(&socket, PacketMembership, &membership).with_context(what)?;
        Ok(Promiscuous { _socket: socket })
    }
}

/// A socket takes no packet that is larger than a frame.
///
/// # Errors
/// When the device lets such packets in, with the remedy.
pub fn check_mtu(device: &Device) -> Result<()> {
    // A frame, without the kernel's headroom and an Ethernet header with two tags.
    const LARGEST: u32 = 4096 - crate::afxdp::HEADROOM - 22;
    if device.mtu > LARGEST {
        bail!(
            "the capture interface has an MTU of {}, an AF_XDP socket takes at most {LARGEST}: set its MTU to {LARGEST} or less \
             (`ip link set dev {} mtu {LARGEST}`)",
            device.mtu,
            device.name
        );
    }
    Ok(())
}

/// How many workers there must be: one for each receive queue, since what arrives on a queue without one is lost.
///
/// # Errors
/// When another number was asked for, with the remedies.
pub fn workers(device: &Device, asked: Option<Workers>) -> Result<u32> {
    let queues = device.receive_queues_in_use();
    if let Some(Workers::Count(count)) = asked
        && count != queues
    {
        let name = &device.name;
        bail!(
            "--workers {count}: {name} has {queues} receive queues, and each needs a worker of its own; use --workers {queues}, or give {name} \
             as many queues as workers by `ethtool -L {name} combined {count}` (`rx {count}` where `ethtool -l {name}` shows no combined ones)"
        );
    }
    Ok(queues)
}
