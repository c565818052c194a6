//! Which clients are replayed or recorded: `--clients` and `--exclude-clients`.
//!
//! Of the networks that a client's address is in, the one with the longest prefix decides. A client that is in none is left out where
//! `--clients` names any, and taken otherwise. The same rules are in a map for the BPF programs (`CLIENTS`) and looked up here for files.

use crate::cli::values::network;
use anyhow::{Result, bail};
use clap::Args;
use replayer_common::addr::{Ip, from_std, from_v4, is_v4, to_std};
use replayer_common::maps::MAX_CLIENT_NETS;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The prefix length of all of IPv4, whose addresses are mapped into IPv6.
const V4_BITS: u32 = 96;

/// Flags of every role that takes requests.
#[derive(Clone, Debug, Default, Args)]
pub struct ClientArgs {
    /// Take only the requests of clients in these networks, or at these addresses.
    #[arg(short = 'F', long = "clients", value_name = "IP|CIDR", value_delimiter = ',')]
    pub clients: Vec<ClientNet>,

    /// Leave out clients in these networks, or at these addresses. Of the networks of both flags that a client is in, the smallest decides.
    #[arg(long, value_name = "IP|CIDR", value_delimiter = ',')]
    pub exclude_clients: Vec<ClientNet>,
}

/// A network of clients, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientNet {
    /// Prefix length, of the 128 bits of `first`.
    bits: u32,
    /// Its lowest address.
    first: u128,
}

impl FromStr for ClientNet {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<ClientNet> {
        let form = "write an address or a network, such as 198.51.100.0/24 or 2001:db8::/32; several with commas. Expressions of pcap are \
                    not understood";
        let (address, host_bits) = network(text, form)?;
        let ip = u128::from_be_bytes(from_std(address));
        let net = ClientNet { bits: 128 - host_bits, first: prefix(ip, 128 - host_bits) };
        if net.first != ip {
            bail!(
                "{text} has bits beyond its prefix: write {net} for the network, or {address} for the address"
            );
        }
        Ok(net)
    }
}

impl fmt::Display for ClientNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = self.first.to_be_bytes();
        let is_v4 = is_v4(&ip) && self.bits >= V4_BITS;
        write!(f, "{}/{}", to_std(&ip), if is_v4 { self.bits - V4_BITS } else { self.bits })
    }
}

/// The first so many bits.
fn prefix(ip: u128, bits: u32) -> u128 {
    if bits == 0 { 0 } else { ip >> (128 - bits) << (128 - bits) }
}

/// Whose requests are taken. By default everybody's.
#[derive(Clone, Debug, Default)]
pub struct Clients {
    /// By prefix length, then by the network's lowest address: whether it was chosen. Empty, or with an entry for every address.
    nets: BTreeMap<u32, BTreeMap<u128, bool>>,
}

impl ClientArgs {
    /// What the two flags say together.
    ///
    /// # Errors
    /// When they contradict each other, or name too many networks.
    pub fn chosen(&self) -> Result<Clients> {
        let mut nets: BTreeMap<u32, BTreeMap<u128, bool>> = BTreeMap::new();
        let count = self.clients.len() + self.exclude_clients.len();
        if count > MAX_CLIENT_NETS as usize {
            bail!(
                "--clients and --exclude-clients name {count} networks; at most {MAX_CLIENT_NETS} are possible: put neighbours together"
            );
        }
        if count > 0 {
            for all in [ClientNet { bits: 0, first: 0 }, ALL_V4] {
                nets.entry(all.bits).or_default().insert(all.first, self.clients.is_empty());
            }
        }
        for net in &self.clients {
            nets.entry(net.bits).or_default().insert(net.first, true);
        }
        for net in &self.exclude_clients {
            if self.clients.contains(net) {
                bail!("{net} is in --clients and in --exclude-clients; name it in one of them");
            }
            nets.entry(net.bits).or_default().insert(net.first, false);
        }
        Ok(Clients { nets })
    }
}

const ALL_V4: ClientNet = ClientNet { bits: V4_BITS, first: u128::from_be_bytes(from_v4([0; 4])) };

impl Clients {
    /// Whether nobody is left out, for no flag was given.
    pub fn is_everybody(&self) -> bool {
        self.nets.is_empty()
    }

    /// Whether the requests of the client at `ip` are taken.
    pub fn contains(&self, ip: &Ip) -> bool {
        let ip = u128::from_be_bytes(*ip);
        let mut longest_first = self.nets.iter().rev();
        longest_first.find_map(|(&bits, nets)| nets.get(&prefix(ip, bits)).copied()).unwrap_or(true)
    }

    /// The networks, each with its prefix length of 128 bits and whether its clients are taken.
    pub fn nets(&self) -> impl Iterator<Item = (u32, Ip, bool)> {
        self.nets.iter().flat_map(|(&bits, nets)| {
            nets.iter().map(move |(net, &chosen)| (bits, net.to_be_bytes(), chosen))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(text: &str) -> Vec<ClientNet> {
        text.split(',').filter(|net| !net.is_empty()).map(|net| net.parse().unwrap()).collect()
    }

    fn clients(chosen: &str, excluded: &str) -> Result<Clients> {
        ClientArgs { clients: nets(chosen), exclude_clients: nets(excluded) }.chosen()
    }

    /// Those of the addresses that are taken.
    fn taken<'a>(clients: &Clients, addresses: &[&'a str]) -> Vec<&'a str> {
        let is_taken = |text: &&str| clients.contains(&from_std(text.parse().unwrap()));
        addresses.iter().copied().filter(is_taken).collect()
    }

    #[test]
    fn the_longest_prefix_decides() {
        let addresses =
            ["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1", "2001:db8::1", "2001:db8:1::1", "::1"];
        let of = |chosen, excluded| taken(&clients(chosen, excluded).unwrap(), &addresses);
        assert_eq!(of("", ""), addresses);
        assert_eq!(of("10.0.0.0/8", ""), ["10.0.0.1", "10.1.0.1", "10.1.2.3"]);
        assert_eq!(of("10.0.0.0/8", "10.1.0.0/16"), ["10.0.0.1"]);
        assert_eq!(of("10.0.0.0/8,10.1.2.3", "10.1.0.0/16"), ["10.0.0.1", "10.1.2.3"]);
        assert_eq!(of("", "10.0.0.0/8"), ["192.0.2.1", "2001:db8::1", "2001:db8:1::1", "::1"]);
        assert_eq!(of("2001:db8::/32", "2001:db8:1::/48"), ["2001:db8::1"]);
        // All of one family is nothing of the other.
        assert_eq!(of("0.0.0.0/0", ""), ["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1"]);
        assert_eq!(of("::/0", ""), ["2001:db8::1", "2001:db8:1::1", "::1"]);
        assert_eq!(of("", "::/0"), ["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1"]);
        assert_eq!(of("::/0", "::/1"), [""; 0]);
        assert_eq!(of("192.0.2.1,::1", ""), ["192.0.2.1", "::1"]);
    }

    #[test]
    fn what_is_no_network_is_refused_with_the_remedy() {
        for (text, says) in [
            ("10.0.0.1/8", "write 10.0.0.0/8 for the network, or 10.0.0.1 for the address"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("10.0.0.0/33", "'/33' is not a prefix length"),
            ("10.0.0.0/", "'/' is not a prefix length"),
            ("10.0.0/8", "'10.0.0' is not an address"),
            ("tcp and src net 10.0.0.0/8", "pcap are not understood"),
            ("", "not an address"),
        ] {
            let error = format!("{:#}", text.parse::<ClientNet>().unwrap_err());
            assert!(error.contains(says), "{text}: {error}");
        }
        let error = clients("10.0.0.0/8,::/0", "::/0").unwrap_err().to_string();
        assert!(error.contains("::/0 is in --clients and in --exclude-clients"), "{error}");
        let all: Vec<ClientNet> =
            (0..=MAX_CLIENT_NETS).map(|i| ClientNet { bits: 128, first: i.into() }).collect();
        let many =
            |count| ClientArgs { clients: all[..count].to_vec(), exclude_clients: Vec::new() }.chosen();
        assert_eq!(many(MAX_CLIENT_NETS as usize).unwrap().nets().count(), MAX_CLIENT_NETS as usize + 2);
        let error = many(MAX_CLIENT_NETS as usize + 1).unwrap_err().to_string();
        assert!(error.contains("4097 networks; at most 4096"), "{error}");
    }
}
