//! Addresses: one form for IPv4 and IPv6, everywhere in the product.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IP address in network order; IPv4 is IPv4-mapped (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2).
pub type Ip = [u8; 16];

/// The wildcard: matches any address of its port.
pub const ANY: Ip = [0; 16];

const V4_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// Whether `ip` is an IPv4 address.
#[inline]
pub fn is_v4(ip: &Ip) -> bool {
    ip[..12] == V4_PREFIX
}

/// An IPv4 address (network order) in the common form.
#[inline]
pub const fn from_v4(v4: [u8; 4]) -> Ip {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

/// The last four bytes: the IPv4 address of an IPv4-mapped one.
#[inline]
pub fn v4_octets(ip: &Ip) -> [u8; 4] {
    [ip[12], ip[13], ip[14], ip[15]]
}

/// Whether it is this IPv4 address, whose bytes are as they are in memory.
#[inline(always)]
pub fn is_v4_of(ip: &Ip, v4: u32) -> bool {
    let [a, b, c, d] = v4.to_ne_bytes();
    let low = u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d]);
    let [i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x] = *ip;
    u64::from_ne_bytes([i, j, k, l, m, n, o, p]) == 0 && u64::from_ne_bytes([q, r, s, t, u, v, w, x]) == low
}

/// From the standard library's type.
pub fn from_std(ip: IpAddr) -> Ip {
    match ip {
        IpAddr::V4(v4) => from_v4(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// To the standard library's type; IPv4-mapped becomes IPv4.
pub fn to_std(ip: &Ip) -> IpAddr {
    if is_v4(ip) { IpAddr::V4(Ipv4Addr::from(v4_octets(ip))) } else { IpAddr::V6(Ipv6Addr::from(*ip)) }
}

/// An address and a port: one end of a TCP connection. Ports are in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The address.
    pub ip: Ip,
    /// The port, host order.
    pub port: u16,
}

impl Endpoint {
    /// To the standard library's type.
    pub fn to_std(&self) -> SocketAddr {
        SocketAddr::new(to_std(&self.ip), self.port)
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Endpoint {
        Endpoint { ip: from_std(addr.ip()), port: addr.port() }
    }
}

impl core::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.to_std().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for text in ["192.0.2.1", "2001:db8::1", "::1", "255.255.255.255"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(to_std(&from_std(ip)), ip);
            assert_eq!(is_v4(&from_std(ip)), ip.is_ipv4());
        }
    }
}
