//! What the kernel knows about the network: devices, addresses, routes, neighbours.
//!
//! Packets that leave by AF_XDP pass by the kernel's routing, so that a worker has to know what the kernel
//! would have done: the device, the MAC addresses, the VLAN tags, the MTU. [`Network::resolve`] asks for all
//! of it, [`Monitor`] keeps it current.
//!
//! - [`device`]: devices and addresses
//! - [`route`]: the way to a destination
//! - [`neighbour`]: the next hop's MAC address
//! - [`monitor`]: snapshots of all of it for the workers
//! - [`netlink`]: requests and answers
//!
//! What may not happen here: nothing is sent but what resolves a next hop's address (ARP, neighbour
//! discovery); nothing is configured. A worker's loop calls nothing in here but [`Watch::changed`].

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use thiserror::Error;

pub mod device;
pub mod monitor;
pub mod neighbour;
pub(crate) mod netlink;
pub mod route;

pub use device::{Device, VlanTag};
pub use monitor::{Monitor, Snapshot, Watch};
pub use route::Route;

use netlink::Netlink;

/// A MAC address.
pub type Mac = [u8; 6];

/// VLAN devices on top of each other that are followed: 802.1Q and QinQ.
pub const MAX_VLAN_TAGS: usize = 2;

/// Everything that a packet to a target needs below its IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The device that transmits; below the VLAN devices if there are any.
    pub ifindex: u32,
    /// The source MAC address.
    pub src_mac: Mac,
    /// The next hop's.
    pub dst_mac: Mac,
    /// The largest IP packet, in bytes: the smallest of the devices' MTUs and the route's.
    pub mtu: u32,
    /// Tags between the MAC addresses and the EtherType, the outer one first.
    pub vlan: [Option<VlanTag>; MAX_VLAN_TAGS],
}

impl Link {
    /// The same with further tags in front of those that are there. As below the kernel's VLAN devices, one tag finds room beside a packet
    /// of the device's MTU, and another one takes its own from the packet (net/8021q, `netif_reduces_vlan_mtu()`).
    ///
    /// # Errors
    /// [`NetError::NoRoomForTags`].
    pub fn tagged(self, tags: &[VlanTag]) -> Result<Link, NetError> {
        let there: Vec<VlanTag> = self.vlan.into_iter().flatten().collect();
        let count = tags.len() + there.len();
        if count > MAX_VLAN_TAGS {
            return Err(NetError::NoRoomForTags { given: tags.len(), there: there.len() });
        }
        let mut all = tags.iter().chain(&there).copied();
        let vlan = [all.next(), all.next()];
        let beside = count.saturating_sub(1) - there.len().saturating_sub(1);
        Ok(Link { vlan, mtu: self.mtu.saturating_sub(4 * beside as u32), ..self })
    }
}

/// Questions to the kernel about the network namespace in which it was opened. Each method blocks for one or
/// more exchanges with the kernel.
#[derive(Debug)]
pub struct Network {
    netlink: Netlink,
}

/// Why a question has no good answer.
#[derive(Debug, Error)]
pub enum NetError {
    /// The kernel did not answer.
    #[error("ask the kernel about the network: {0}")]
    Netlink(#[from] io::Error),
    /// No such interface.
    #[error("there is no interface {name}; there are: {existing}")]
    NoInterface {
        /// The name asked for.
        name: String,
        /// The interfaces that exist.
        existing: String,
    },
    /// No interface has this address.
    #[error(
        "no interface of this host has the address {address}; they have: {existing}. \
         Name the interface to capture on with -i"
    )]
    NoInterfaceWith {
        /// The address asked for.
        address: IpAddr,
        /// The addresses that exist.
        existing: String,
    },
    /// The interface is down.
    #[error("interface {name} is down; bring it up with `ip link set {name} up`")]
    Down {
        /// Its name.
        name: String,
    },
    /// The interface is up and has no carrier.
    #[error("interface {name} has no carrier; is its cable, or its peer, connected and up?")]
    NoCarrier {
        /// Its name.
        name: String,
    },
    /// The interface has no Ethernet header.
    #[error(
        "interface {name} is not an Ethernet device; packets can only be sent through one, choose it with -o"
    )]
    NotEthernet {
        /// Its name.
        name: String,
    },
    /// More VLAN devices on top of each other than [`MAX_VLAN_TAGS`].
    #[error("interface {name} has more than {MAX_VLAN_TAGS} VLAN tags")]
    TooManyTags {
        /// Its name.
        name: String,
    },
    /// The same with those that were asked for.
    #[error(
        "--vlan asks for {given} VLAN tags, and VLAN interfaces on the way add {there}; a packet has at most {MAX_VLAN_TAGS}"
    )]
    NoRoomForTags {
        /// Tags asked for.
        given: usize,
        /// Tags of the way.
        there: usize,
    },
    /// The VLAN device's lower device is not to be seen.
    #[error(
        "the lower device of VLAN interface {name} is in another network namespace; run the replayer there"
    )]
    HiddenLower {
        /// Its name.
        name: String,
    },
    /// No route.
    #[error(
        "no route to {target}{}: {source}; add one with `ip route add`, see `ip route get {target}`",
        via(.device)
    )]
    NoRoute {
        /// The destination.
        target: IpAddr,
        /// The output device, if one was asked for.
        device: Option<String>,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The target is this host.
    #[error(
        "{target} is an address of this host; \
         the target has to be another host, or in another network namespace"
    )]
    Local {
        /// The destination.
        target: IpAddr,
    },
    /// Broadcast or multicast.
    #[error("{target} is not the address of a host")]
    NotUnicast {
        /// The destination.
        target: IpAddr,
    },
    /// The next hop does not tell its MAC address.
    #[error(
        "{hop}, the next hop to {target}, does not answer on {device}: its MAC address is not known; \
         is it up and on this segment? See `ip neigh show dev {device}`"
    )]
    Unresolved {
        /// The destination.
        target: IpAddr,
        /// The next hop.
        hop: IpAddr,
        /// The output device's name.
        device: String,
    },
}

fn via(device: &Option<String>) -> String {
    device.as_ref().map_or_else(String::new, |name| format!(" through {name}"))
}

impl Network {
    /// Opens a netlink socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> Result<Network, NetError> {
        Ok(Network { netlink: Netlink::open::<RouteNetlinkMessage>()? })
    }

    /// The way to `target`, through `output` if given, else as the kernel routes. Asks the next hop for its
    /// MAC address if that is not known, and waits at most `patience` for the answer.
    ///
    /// # Errors
    /// All of [`NetError`] but [`NetError::NoInterfaceWith`].
    pub fn resolve(
        &mut self,
        target: IpAddr,
        output: Option<&str>,
        patience: Duration,
    ) -> Result<Link, NetError> {
        let devices = self.devices()?;
        self.resolve_among(&devices, target, output, patience)
    }

    fn resolve_among(
        &mut self,
        devices: &[Device],
        target: IpAddr,
        output: Option<&str>,
        patience: Duration,
    ) -> Result<Link, NetError> {
        let output = output.map(|name| device::by_name(devices, name)).transpose()?;
        let route = self.route(target, output)?;
        let device = device::by_index(devices, route.ifindex)?;
        let (ifindex, vlan, device_mtu) = transmitter(devices, device)?;
        let src_mac = device.mac.ok_or_else(|| NetError::NotEthernet { name: device.name.clone() })?;
        let hop = route.next_hop();
        let dst_mac = self.neighbour(device, hop, patience)?.ok_or_else(|| NetError::Unresolved {
            target,
            hop,
            device: device.name.clone(),
        })?;
        let mtu = route.mtu.unwrap_or(u32::MAX).min(device_mtu);
        Ok(Link { ifindex, src_mac, dst_mac, mtu, vlan })
    }

    /// Where to capture when nobody said so: the interface that has the address `source` if that is given,
    /// else the one that packets to `target` leave by.
    ///
    /// # Errors
    /// When no interface has the address, or there is no route.
    pub fn find_capture_interface(
        &mut self,
        source: Option<IpAddr>,
        target: IpAddr,
    ) -> Result<Device, NetError> {
        let devices = self.devices()?;
        let Some(address) = source else {
            let route = self.route(target, None)?;
            return device::by_index(&devices, route.ifindex).cloned();
        };
        let existing = || {
            let addresses = devices.iter().flat_map(|device| &device.addresses);
            addresses.map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
        };
        let found = devices.iter().find(|device| device.addresses.contains(&address));
        found.cloned().ok_or_else(|| NetError::NoInterfaceWith { address, existing: existing() })
    }
}

/// Follows VLAN devices down to the one that transmits: its index, the tags on the way, and the smallest MTU.
/// Checks that all of them are up.
fn transmitter<'a>(
    devices: &'a [Device],
    mut device: &'a Device,
) -> Result<(u32, [Option<VlanTag>; MAX_VLAN_TAGS], u32), NetError> {
    let mut mtu = device.mtu;
    let mut tags = Vec::new();
    loop {
        let name = || device.name.clone();
        if !device.up {
            return Err(NetError::Down { name: name() });
        }
        if !device.carrier {
            return Err(NetError::NoCarrier { name: name() });
        }
        let Some((lower, tag)) = device.vlan else { break };
        if tags.len() == MAX_VLAN_TAGS {
            return Err(NetError::TooManyTags { name: name() });
        }
        tags.push(tag);
        let lower = lower.ok_or_else(|| NetError::HiddenLower { name: name() })?;
        device = device::by_index(devices, lower)?;
        mtu = mtu.min(device.mtu);
    }
    // The device nearest to the wire adds its tag last, in front.
    let mut tags = tags.into_iter().rev();
    Ok((device.ifindex, [tags.next(), tags.next()], mtu))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(ifindex: u32, mtu: u32, vlan: Option<(Option<u32>, VlanTag)>) -> Device {
        Device {
            ifindex,
            name: format!("d{ifindex}"),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu,
            up: true,
            carrier: true,
            noarp: false,
            tx_queues: 1,
            rx_queues: 1,
            kind: None,
            vlan,
            lower: None,
            master: None,
            gro_max_size: 65_536,
            xdp_native: None,
            xdp_generic: None,
            addresses: Vec::new(),
        }
    }

    #[test]
    fn b011_vlan_devices_are_followed_to_the_wire() {
        let inner = VlanTag { protocol: 0x8100, id: 100 };
        let outer = VlanTag { protocol: 0x88a8, id: 7 };
        let mut devices = [
            device(1, 1500, None),
            device(2, 1496, Some((Some(1), outer))),
            device(3, 1500, Some((Some(2), inner))),
        ];
        let follow = |devices: &[Device]| transmitter(devices, &devices[2]);
        assert_eq!(follow(&devices).unwrap(), (1, [Some(outer), Some(inner)], 1496));
        assert_eq!(transmitter(&devices, &devices[0]).unwrap(), (1, [None, None], 1500));
        devices[1].up = false;
        assert!(matches!(follow(&devices), Err(NetError::Down { name }) if name == "d2"));
        devices[1].up = true;
        devices[0].carrier = false;
        assert!(matches!(follow(&devices), Err(NetError::NoCarrier { name }) if name == "d1"));
        devices[2].vlan = Some((None, inner));
        assert!(matches!(follow(&devices), Err(NetError::HiddenLower { name }) if name == "d3"));
    }

    #[test]
    fn b011_tags_that_were_asked_for_stand_in_front() {
        let tag = |protocol, id| VlanTag { protocol, id };
        let (outer, inner) = (tag(0x88a8, 7), tag(0x8100, 100));
        let link = |vlan, mtu| Link { ifindex: 1, src_mac: [2; 6], dst_mac: [4; 6], mtu, vlan };
        let (plain, of_device) = (link([None; 2], 1500), link([Some(inner), None], 1500));
        assert_eq!(plain.tagged(&[]).unwrap(), plain);
        assert_eq!(plain.tagged(&[inner]).unwrap(), of_device);
        let both = link([Some(outer), Some(inner)], 1496);
        assert_eq!(plain.tagged(&[outer, inner]).unwrap(), both);
        assert_eq!(of_device.tagged(&[outer]).unwrap(), both);
        assert_eq!(both.tagged(&[]).unwrap(), both);
        let error = of_device.tagged(&[outer, inner]).unwrap_err().to_string();
        assert!(error.contains("2 VLAN tags") && error.contains("add 1"), "{error}");
    }
}
