//! The next hop's MAC address.
//!
//! What AF_XDP sends does not pass through the kernel's neighbour table, so that nothing in the kernel
//! notices that an entry is in use: it goes stale, and a next hop that changes its MAC address is not noticed
//! either. Whoever relies on an entry therefore asks for it again and again ([`super::Monitor`] does), which
//! makes the kernel probe it as it would for traffic of its own.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Device, Mac, NetError, Network};

/// Between two looks at an entry that is being resolved. An answer takes less than a millisecond on a
/// segment.
const INTERVAL: Duration = Duration::from_millis(2);

impl Network {
    /// The MAC address of `hop` on the segment of `device`. Makes the kernel ask for it when it is not known
    /// or stale; waits for an unknown one at most `patience`. `None`: no answer yet.
    ///
    /// # Errors
    /// The kernel's.
    pub fn neighbour(
        &mut self,
        device: &Device,
        hop: IpAddr,
        patience: Duration,
    ) -> Result<Option<Mac>, NetError> {
        if device.noarp {
            // As the kernel does for such devices (net/ipv4/arp.c, `arp_constructor`).
            return Ok(device.mac);
        }
        let deadline = Instant::now() + patience;
        let mut asked = false;
        loop {
            let (mac, fresh) = self.lookup(device, hop)?;
            if !fresh && !asked {
                self.probe(device, hop)?;
                asked = true;
            }
            if mac.is_some() || Instant::now() >= deadline {
                return Ok(mac);
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// What the table says: the address if it has a usable one, and whether the kernel takes it as confirmed.
    fn lookup(&mut self, device: &Device, hop: IpAddr) -> Result<(Option<Mac>, bool), NetError> {
        let request = RouteNetlinkMessage::GetNeighbour(entry(device, hop));
        let answers = match self.netlink.request(request, 0) {
            Ok(answers) => answers,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((None, false)),
            Err(error) => return Err(error.into()),
        };
        let Some(message) = answers.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => Some(message),
            _ => None,
        }) else {
            return Ok((None, false));
        };
        let (usable, fresh) = match message.header.state {
            NeighbourState::Reachable | NeighbourState::Permanent | NeighbourState::Noarp => (true, true),
            // Being confirmed already.
            NeighbourState::Delay | NeighbourState::Probe => (true, true),
            NeighbourState::Stale => (true, false),
            _ => (false, false),
        };
        let mac = message.attributes.into_iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => bytes.try_into().ok(),
            _ => None,
        });
        Ok((mac.filter(|_| usable), fresh))
    }

    /// Makes the kernel do for this entry what it does when it has a packet to send: solicit it, or confirm a
    /// stale one (net/core/neighbour.c, `neigh_add`: `NTF_USE`). No packet but ARP or neighbour discovery
    /// leaves.
    fn probe(&mut self, device: &Device, hop: IpAddr) -> Result<(), NetError> {
        let mut request = entry(device, hop);
        request.header.flags = NeighbourFlags::Use;
        let request = RouteNetlinkMessage::NewNeighbour(request);
        self.netlink.request(request, NLM_F_CREATE | NLM_F_REPLACE)?;
        Ok(())
    }
}

fn entry(device: &Device, hop: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = device.ifindex;
    let (family, address) = match hop {
        IpAddr::V4(ip) => (AddressFamily::Inet, NeighbourAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, NeighbourAddress::Inet6(ip)),
    };
    message.header.family = family;
    message.attributes = vec![NeighbourAttribute::Destination(address)];
    message
}
