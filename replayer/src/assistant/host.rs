//! What the assistant has to know of its host: interfaces, addresses, and whether it forwards packets.

use anyhow::{Context, Result, bail};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use replayer_common::addr::{self, Ip};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The interface to take responses from: the one asked for, or the only one that comes into question.
///
/// # Errors
/// There is no such interface, it is down, or the choice is not clear.
pub fn choose_interface(asked: Option<&str>) -> Result<String> {
    let mut interfaces = BTreeMap::new();
    for interface in getifaddrs().context("cannot list the network interfaces")? {
        interfaces.insert(interface.interface_name, interface.flags);
    }
    choose(asked, &interfaces)
}

fn choose(asked: Option<&str>, interfaces: &BTreeMap<String, InterfaceFlags>) -> Result<String> {
    let fit = |flags: &InterfaceFlags| {
        flags.contains(InterfaceFlags::IFF_UP) && !flags.contains(InterfaceFlags::IFF_LOOPBACK)
    };
    let candidates: Vec<&str> =
        interfaces.iter().filter(|(_, flags)| fit(flags)).map(|(name, _)| &name[..]).collect();
    let choices = candidates.join(", ");
    match (asked, &candidates[..]) {
        (Some(name), _) => match interfaces.get(name) {
            None => bail!("there is no interface {name}; those that are up: {choices}"),
            Some(flags) if !flags.contains(InterfaceFlags::IFF_UP) => {
                bail!("interface {name} is down; bring it up with `ip link set {name} up`")
            }
            Some(flags) if flags.contains(InterfaceFlags::IFF_LOOPBACK) => bail!(
                "{name} is the loopback interface, which the target's responses never reach; those that are up: {choices}"
            ),
            Some(_) => Ok(name.to_owned()),
        },
        (None, [only]) => Ok((*only).to_owned()),
        (None, []) => bail!("no network interface is up; bring one up with `ip link set IFACE up`"),
        (None, _) => {
            bail!("several interfaces are up; say with -i at which the target's responses arrive: {choices}")
        }
    }
}

/// All addresses of this host.
///
/// # Errors
/// The operating system's.
pub fn local_addresses() -> Result<BTreeSet<Ip>> {
    let interfaces = getifaddrs().context("cannot list the addresses of this host")?;
    Ok(interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .map(addr::from_std)
        .collect())
}

/// The settings that let this host forward what comes in at `interface`, and so route the target's responses to real clients if the assistant
/// died: each as `sysctl -w` takes it to switch it off.
pub fn forwarding(interface: &str) -> Vec<String> {
    let mut on = Vec::new();
    for family in ["ipv4", "ipv6"] {
        for which in ["all/forwarding".to_owned(), format!("{interface}/forwarding")] {
            // A host without IPv6 has no such file, and does not forward it.
            let value = std::fs::read_to_string(format!("/proc/sys/net/{family}/conf/{which}"));
            if value.is_ok_and(|value| value.trim() != "0") {
                on.push(format!("net.{family}.conf.{}=0", which.replace('/', ".")));
            }
        }
    }
    on
}

/// Refuses a host that forwards.
///
/// # Errors
/// Forwarding is on, for the host or for `interface`.
pub fn refuse_forwarding(interface: &str) -> Result<()> {
    let on = forwarding(interface);
    if !on.is_empty() {
        bail!(
            "this host forwards IP packets: if the assistant stopped, the target's responses would be routed to the real \
             clients. Switch forwarding off with `sysctl -w {}`, or pass --allow-forwarding if no client can be reached \
             from here, and --keep-dropping with it if one can: then they are dropped all the same",
            on.join(" ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interfaces(list: &[(&str, InterfaceFlags)]) -> BTreeMap<String, InterfaceFlags> {
        list.iter().map(|(name, flags)| ((*name).to_owned(), *flags)).collect()
    }

    #[test]
    fn b009_the_interface_is_found_or_asked_for() {
        let up = InterfaceFlags::IFF_UP;
        let lo = ("lo", up | InterfaceFlags::IFF_LOOPBACK);
        let one = interfaces(&[lo, ("eth0", up), ("eth1", InterfaceFlags::empty())]);
        assert_eq!(choose(None, &one).unwrap(), "eth0");
        assert_eq!(choose(Some("eth0"), &one).unwrap(), "eth0");
        for (asked, says) in [("eth1", "is down"), ("eth2", "no interface eth2"), ("lo", "loopback")] {
            let error = choose(Some(asked), &one).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let two = interfaces(&[lo, ("eth0", up), ("eth1", up)]);
        assert!(choose(None, &two).unwrap_err().to_string().contains("-i at which"), "names the choices");
        assert!(choose(None, &interfaces(&[lo])).is_err());
    }
}
