//! The way to a destination, as the kernel would choose it.

use std::net::IpAddr;

use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Device, NetError, Network};

/// A route to one destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination.
    pub target: IpAddr,
    /// The index of the output device.
    pub ifindex: u32,
    /// The router on the way; `None` when the destination is on the device's segment. May be of the other
    /// family (RFC 5549).
    pub gateway: Option<IpAddr>,
    /// The source address that the kernel would choose.
    pub source: Option<IpAddr>,
    /// The path's MTU where the route has one of its own.
    pub mtu: Option<u32>,
}

impl Route {
    /// Whose MAC address packets go to.
    pub fn next_hop(&self) -> IpAddr {
        self.gateway.unwrap_or(self.target)
    }
}

impl Network {
    /// The route to `target`, through `output` if given.
    ///
    /// # Errors
    /// [`NetError::NoRoute`], [`NetError::Local`], [`NetError::NotUnicast`].
    pub fn route(&mut self, target: IpAddr, output: Option<&Device>) -> Result<Route, NetError> {
        let mut request = RouteMessage::default();
        (request.header.address_family, request.header.destination_prefix_length) = match target {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        request.attributes.push(RouteAttribute::Destination(target.into()));
        request.attributes.extend(output.map(|device| RouteAttribute::Oif(device.ifindex)));
        let no_route = |source| NetError::NoRoute { target, device: output.map(|d| d.name.clone()), source };
        let answers = self.netlink.request(RouteNetlinkMessage::GetRoute(request), 0).map_err(no_route)?;
        let unreachable = || no_route(std::io::Error::from_raw_os_error(libc::ENETUNREACH));
        let message = answers.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewRoute(message) => Some(message),
            _ => None,
        });
        let message = message.ok_or_else(unreachable)?;
        match message.header.kind {
            RouteType::Unicast => {}
            RouteType::Local => return Err(NetError::Local { target }),
            RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast => {
                return Err(NetError::NotUnicast { target });
            }
            // IPv6 answers with such a route where IPv4 answers with an error.
            _ => return Err(unreachable()),
        }
        parse(target, message).ok_or_else(unreachable)
    }

    /// Whether there are routes through a device, those to its own link left out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn routes_through(&mut self, ifindex: u32) -> Result<bool, NetError> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let routes = self.netlink.dump(RouteNetlinkMessage::GetRoute(request))?;
            let found = routes.iter().any(
                |route| matches!(route, RouteNetlinkMessage::NewRoute(route) if leads_through(route, ifindex)),
            );
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether packets to anything but a link-local destination leave through the device.
fn leads_through(message: &RouteMessage, ifindex: u32) -> bool {
    let through = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => *index == ifindex,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.interface_index == ifindex),
        _ => false,
    };
    let link_local = message.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => address.is_link_local(),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => address.is_unicast_link_local(),
        _ => false,
    });
    message.header.kind == RouteType::Unicast && !link_local && message.attributes.iter().any(through)
}

/// `None` without an output device.
fn parse(target: IpAddr, message: RouteMessage) -> Option<Route> {
    let mut ifindex = None;
    let mut route = Route { target, ifindex: 0, gateway: None, source: None, mtu: None };
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(index),
            RouteAttribute::Gateway(address) => route.gateway = ip(&address),
            RouteAttribute::Via(RouteVia::Inet(address)) => route.gateway = Some(address.into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => route.gateway = Some(address.into()),
            RouteAttribute::PrefSource(address) => route.source = ip(&address),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.into_iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if mtu > 0 => Some(mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    route.ifindex = ifindex?;
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
