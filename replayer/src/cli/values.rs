//! What flags take, parsed from how a person writes it. A mistake is answered by how it is written.

use crate::net::VlanTag;
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use replayer_common::addr::{ANY, Endpoint, Ip, from_std};
use replayer_common::packet::Protocol;
use replayer_engine::AddressRange;
use replayer_engine::config::Service;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::str::FromStr;

/// What `--stats` may be, seconds.
pub(crate) const STATS: RangeInclusive<i64> = 1..=86_400;

/// How figures are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatsFormat {
    /// For people, on standard error.
    Text,
    /// One JSON object a line, on standard output.
    Json,
}

/// `-x`: one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceArg {
    /// Its transport protocol.
    pub protocol: Protocol,
    /// From where to where.
    pub service: Service,
}

impl ServiceArg {
    /// Its online side, for people.
    pub fn online_name(&self) -> String {
        let online = self.service.online;
        match (self.protocol, online.ip == ANY) {
            (Protocol::Tcp, true) => format!("port {}", online.port),
            (Protocol::Udp, true) => format!("UDP port {}", online.port),
            (Protocol::Tcp, false) => online.to_string(),
            (Protocol::Udp, false) => format!("UDP {online}"),
        }
    }
}

/// What comes before a service of UDP.
const UDP_PREFIX: &str = "udp:";

impl FromStr for ServiceArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<ServiceArg> {
        let form = "write [udp:][SRC_IP:]SRC_PORT-DST_IP:DST_PORT, for example 80-192.0.2.7:8080, udp:53-192.0.2.7:53 or [2001:db8::1]:80-[2001:db8::7]:80";
        let (protocol, rest) = protocol_of(text);
        let (source, target) =
            rest.split_once('-').ok_or_else(|| anyhow!("there is no '-' in it; {form}"))?;
        let online = online_endpoint(source, form)?;
        let target = endpoint(target, form)?;
        if online.port == 0 || target.port == 0 {
            bail!("port 0 cannot be copied; {form}");
        }
        if target.to_std().ip().is_unspecified() || target.to_std().ip().is_multicast() {
            bail!("{} cannot be a target: name the address of one host", target.to_std().ip());
        }
        if online == target {
            bail!("the target {target} is the online service itself; name another server");
        }
        Ok(ServiceArg { protocol, service: Service { online, target } })
    }
}

/// A service's protocol, `udp:` or `tcp:` or neither, and what follows.
pub(crate) fn protocol_of(text: &str) -> (Protocol, &str) {
    match text.strip_prefix(UDP_PREFIX) {
        Some(rest) => (Protocol::Udp, rest),
        None => (Protocol::Tcp, text.strip_prefix("tcp:").unwrap_or(text)),
    }
}

/// What clients send to: a port of any address, or of one. `form` says how it is written.
pub(crate) fn online_endpoint(text: &str, form: &str) -> Result<Endpoint> {
    if text.contains(':') {
        return endpoint(text, form);
    }
    let port = text.parse().map_err(|_| anyhow!("'{text}' is not a port; {form}"))?;
    Ok(Endpoint { ip: ANY, port })
}

fn endpoint(text: &str, form: &str) -> Result<Endpoint> {
    Ok(SocketAddr::from_str(text).map_err(|_| anyhow!("'{text}' is not IP:PORT; {form}"))?.into())
}

fn address(text: &str, form: &str) -> Result<IpAddr> {
    IpAddr::from_str(text).map_err(|_| anyhow!("'{text}' is not an address; {form}"))
}

/// A network in the notation of CIDR, or one address: an address of it, and how many bits its hosts have. `form` says how it is written.
pub(crate) fn network(text: &str, form: &str) -> Result<(IpAddr, u32)> {
    let Some((ip, bits)) = text.split_once('/') else { return Ok((address(text, form)?, 0)) };
    let ip = address(ip, form)?;
    let width = if ip.is_ipv4() { 32 } else { 128 };
    let bits: u32 = bits
        .parse()
        .ok()
        .filter(|&bits| bits <= width)
        .ok_or_else(|| anyhow!("'/{bits}' is not a prefix length; {form}"))?;
    Ok((ip, width - bits))
}

/// `-c`: addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolArg(pub AddressRange);

impl PoolArg {
    /// Whether the address is one of it.
    pub fn contains(&self, ip: &Ip) -> bool {
        let offset = u128::from_be_bytes(*ip).wrapping_sub(u128::from_be_bytes(self.0.first));
        offset < u128::from(self.0.count)
    }
}

impl FromStr for PoolArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<PoolArg> {
        let form = "write an address, a network such as 172.29.0.0/16, or FIRST-LAST";
        let address = |text: &str| address(text, form);
        let number = |ip: IpAddr| u128::from_be_bytes(from_std(ip));
        let (first, last) = if text.contains('/') {
            let (ip, hosts) = network(text, form)?;
            // At most 2^20 addresses of a network are used: with their ports more than a target can tell apart in a day.
            let count = 1u128 << hosts.min(20);
            let base = if hosts == 128 { 0 } else { number(ip) >> hosts << hosts };
            // Neither the network's own address nor IPv4's broadcast address is a client.
            if hosts >= 2 { (base + 1, base + count - 2) } else { (base, base + count - 1) }
        } else if let Some((first, last)) = text.split_once('-') {
            let (first, last) = (address(first)?, address(last)?);
            if first.is_ipv4() != last.is_ipv4() {
                bail!("{first} and {last} are not of one family; {form}");
            }
            (number(first), number(last))
        } else {
            let ip = number(address(text)?);
            (ip, ip)
        };
        if last < first {
            bail!("the last address is before the first; {form}");
        }
        let count = (last - first + 1).min(1 << 20) as u32;
        Ok(PoolArg(AddressRange { first: first.to_be_bytes(), count }))
    }
}

/// `-n`: copies, in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopiesArg(pub u64);

impl FromStr for CopiesArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<CopiesArg> {
        let copies: f64 = text.parse().context("write a number such as 1, 10 or 2.5")?;
        if !(0.01..=10_000.0).contains(&copies) {
            bail!("{copies} is out of range; copies can be 0.01 to 10000");
        }
        Ok(CopiesArg((copies * 1_000_000.0).round() as u64))
    }
}

/// `--vlan`: tags, the outer one first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VlanArg(pub Vec<VlanTag>);

impl FromStr for VlanArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<VlanArg> {
        let id = |text: &str| match text.parse() {
            // 802.1Q-2022 table 9-2: 4095 is reserved.
            Ok(id @ 0..=4094) => Ok(id),
            _ => Err(anyhow!(
                "'{text}' is not a VLAN's number; write one of 0 to 4094, or two for QinQ, for example 7 or 100.7"
            )),
        };
        let tag = |protocol, text| Ok::<_, anyhow::Error>(VlanTag { protocol, id: id(text)? });
        let (outer, inner) = text.split_once('.').map_or((None, text), |(outer, inner)| (Some(outer), inner));
        let outer = outer.map(|text| tag(0x88a8, text)).transpose()?;
        Ok(VlanArg(outer.into_iter().chain([tag(0x8100, inner)?]).collect()))
    }
}

/// `-r`: a share, in percent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PercentArg(pub f64);

impl FromStr for PercentArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<PercentArg> {
        let percent: f64 = text.trim_end_matches('%').parse().context("write a number such as 20")?;
        if !(percent > 0.0 && percent <= 100.0) {
            bail!("{percent} is out of range; a sample is more than 0 and at most 100 percent");
        }
        Ok(PercentArg(percent))
    }
}

/// An assistant's addresses: `HOST`, `HOST:PORT`, `[IPv6]`, `[IPv6]:PORT` or a bare IPv6 address.
///
/// # Errors
/// When it is neither an address nor a name that resolves.
pub fn assistant_addresses(text: &str, default_port: u16) -> Result<Vec<SocketAddr>> {
    if let Ok(address) = SocketAddr::from_str(text) {
        return Ok(vec![address]);
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if let Ok(ip) = IpAddr::from_str(bare) {
        return Ok(vec![SocketAddr::new(ip, default_port)]);
    }
    let with_port = if text.contains(':') { text.to_owned() } else { format!("{text}:{default_port}") };
    let found = with_port
        .to_socket_addrs()
        .with_context(|| format!("-s {text}: neither an address nor a name that resolves"))?;
    Ok(found.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(text: &str) -> Result<Service> {
        ServiceArg::from_str(text).map(|arg| arg.service)
    }

    #[test]
    fn services() {
        let any = service("8080-192.0.2.7:80").unwrap();
        assert_eq!((any.online.ip, any.online.port), (ANY, 8080));
        assert_eq!(any.target.to_string(), "192.0.2.7:80");
        assert_eq!(service("192.0.2.1:80-192.0.2.7:80").unwrap().online.to_string(), "192.0.2.1:80");
        assert_eq!(
            service("[2001:db8::1]:80-[2001:db8::7]:81").unwrap().target.to_string(),
            "[2001:db8::7]:81"
        );
        let udp = ServiceArg::from_str("udp:53-192.0.2.7:53").unwrap();
        assert_eq!((udp.protocol, udp.service), (Protocol::Udp, service("53-192.0.2.7:53").unwrap()));
        assert_eq!(udp.online_name(), "UDP port 53");
        let v6 = ServiceArg::from_str("udp:[2001:db8::1]:53-[2001:db8::7]:53").unwrap();
        assert_eq!(v6.online_name(), "UDP [2001:db8::1]:53");
        assert_eq!(ServiceArg::from_str("tcp:53-192.0.2.7:53").unwrap().protocol, Protocol::Tcp);
    }

    #[test]
    fn b009_wrong_services_say_what_is_right() {
        for text in [
            "8080",
            "x-192.0.2.7:80",
            "80-192.0.2.7",
            "0-192.0.2.7:80",
            "80-0.0.0.0:80",
            "80-224.0.0.1:80",
            "192.0.2.7:80-192.0.2.7:80",
            "udp:53",
            "sctp:53-192.0.2.7:53",
        ] {
            let error = service(text).unwrap_err().to_string();
            assert!(error.contains("write ") || error.contains("name "), "{text}: {error}");
        }
    }

    #[test]
    fn pools() {
        let pool = |text: &str| {
            PoolArg::from_str(text)
                .map(|arg| (replayer_common::addr::to_std(&arg.0.first).to_string(), arg.0.count))
        };
        assert_eq!(pool("192.0.2.1").unwrap(), ("192.0.2.1".into(), 1));
        assert_eq!(pool("172.29.3.4/16").unwrap(), ("172.29.0.1".into(), 65_534));
        assert_eq!(pool("192.0.2.10-192.0.2.19").unwrap(), ("192.0.2.10".into(), 10));
        assert_eq!(pool("2001:db8::/64").unwrap(), ("2001:db8::1".into(), (1 << 20) - 2));
        for wrong in ["x", "192.0.2.1/33", "192.0.2.9-192.0.2.1", "192.0.2.1-2001:db8::1"] {
            assert!(pool(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn assistants() {
        let address = |text| assistant_addresses(text, 36_524).map(|found| found[0].to_string());
        assert_eq!(address("192.0.2.1").unwrap(), "192.0.2.1:36524");
        assert_eq!(address("192.0.2.1:7").unwrap(), "192.0.2.1:7");
        assert_eq!(address("2001:db8::1").unwrap(), "[2001:db8::1]:36524");
        assert_eq!(address("[2001:db8::1]:7").unwrap(), "[2001:db8::1]:7");
    }

    #[test]
    fn b011_vlan_tags() {
        let tags = |text| VlanArg::from_str(text).map(|arg| arg.0);
        let tag = |protocol, id| VlanTag { protocol, id };
        assert_eq!(tags("7").unwrap(), [tag(0x8100, 7)]);
        assert_eq!(tags("100.7").unwrap(), [tag(0x88a8, 100), tag(0x8100, 7)]);
        for wrong in ["", "x", "4095", "-1", "1.", "1.2.3"] {
            let error = tags(wrong).unwrap_err().to_string();
            assert!(error.contains("for example 7"), "{wrong}: {error}");
        }
    }

    #[test]
    fn copies_and_samples() {
        assert_eq!(CopiesArg::from_str("2.5").unwrap().0, 2_500_000);
        assert!(CopiesArg::from_str("0").is_err());
        assert!(PercentArg::from_str("0").is_err());
        assert_eq!(PercentArg::from_str("20%").unwrap().0, 20.0);
    }
}
