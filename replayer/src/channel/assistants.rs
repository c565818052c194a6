//! The assistants of a role that replays: their names, where those lead, and a channel of each worker to each of them. At the start and, for SIGHUP,
//! while it runs.

use super::client::{Client, ClientConfig};
use super::limits::MAX_KEY;
use super::random_instance;
use super::wire::ServiceEntry;
use crate::cli::{ServiceArg, assistant_addresses};
use crate::clock;
use crate::say::say;
use crate::worker::MAX_CHANNELS;
use anyhow::{Result, bail};
use std::net::SocketAddr;

/// What a user says of them.
#[derive(Clone, Copy, Debug)]
pub struct Named<'a> {
    /// `-s`.
    pub names: &'a [String],
    /// Where no port is given.
    pub port: u16,
    /// The key that they were started with.
    pub key: &'a str,
}

/// Whom the workers are connected to.
#[derive(Debug)]
pub struct Assistants {
    instance: u64,
    services: Vec<ServiceEntry>,
    addresses: Vec<SocketAddr>,
    key: String,
}

/// What becomes of a worker's channels.
pub struct Change {
    /// Those to these addresses stay, the others end.
    pub keep: Vec<SocketAddr>,
    /// These come in addition; connected.
    pub new: Vec<Client>,
    /// The key from now on, should one have to connect again.
    pub key: Vec<u8>,
}

impl Assistants {
    /// Connects each worker to every assistant; a role does not start without them.
    ///
    /// # Errors
    /// When a name does not resolve, or an assistant cannot be reached or refuses; with the remedy.
    pub fn connect(
        named: &Named<'_>,
        services: &[ServiceArg],
        workers: u32,
    ) -> Result<(Assistants, Vec<Vec<Client>>)> {
        let services = (0..).zip(services);
        let entry = |(number, &ServiceArg { protocol, service }): (u16, &ServiceArg)| ServiceEntry {
            service: number,
            protocol,
            target: service.target,
        };
        let mut assistants = Assistants {
            instance: random_instance(),
            services: services.map(entry).collect(),
            addresses: Vec::new(),
            key: String::new(),
        };
        let changes = assistants.change(named, workers)?;
        Ok((assistants, changes.into_iter().map(|change| change.new).collect()))
    }

    /// Looks the names up again and connects each worker to those that are new; what each of them has to do then. An address that a name
    /// still has stays, though it may have others too.
    ///
    /// # Errors
    /// As of [`Assistants::connect`]; nothing is changed then.
    pub fn change(&mut self, named: &Named<'_>, workers: u32) -> Result<Vec<Change>> {
        if named.names.len() > MAX_CHANNELS {
            bail!("-s names {} assistants; at most {MAX_CHANNELS} are possible", named.names.len());
        }
        if named.key.len() > MAX_KEY {
            bail!("--key is {} bytes long; use at most {MAX_KEY}", named.key.len());
        }
        let mut found = Vec::new();
        for name in named.names {
            found.push((name.as_str(), assistant_addresses(name, named.port)?));
        }
        let addresses = choose(&found, &self.addresses)?;
        let keep: Vec<SocketAddr> =
            self.addresses.iter().filter(|known| addresses.contains(known)).copied().collect();
        let new: Vec<SocketAddr> =
            addresses.iter().filter(|address| !keep.contains(address)).copied().collect();
        let mut changes = Vec::new();
        for worker in 0..workers {
            let connect = |&assistant: &SocketAddr| -> Result<Client> {
                let mut channel = Client::new(ClientConfig {
                    assistant,
                    key: named.key.as_bytes().to_vec(),
                    instance: self.instance,
                    worker: worker as u16,
                    services: self.services.clone(),
                })?;
                channel.wait_until_up(clock::now)?;
                Ok(channel)
            };
            let new = new.iter().map(connect).collect::<Result<_>>()?;
            changes.push(Change { keep: keep.clone(), new, key: named.key.as_bytes().to_vec() });
        }
        self.addresses = keep.into_iter().chain(new).collect();
        named.key.clone_into(&mut self.key);
        Ok(changes)
    }

    /// For a role that runs: as [`Assistants::change`], but nothing where nothing is different; and says what is.
    ///
    /// # Errors
    /// As of [`Assistants::change`].
    pub fn reload(&mut self, named: &Named<'_>, workers: u32) -> Result<Vec<Change>> {
        let (before, key) = (self.addresses.clone(), self.key.clone());
        let changes = self.change(named, workers)?;
        for gone in before.iter().filter(|address| !self.addresses.contains(address)) {
            say!("SIGHUP: the assistant at {gone} is none any more");
        }
        for new in self.addresses.iter().filter(|address| !before.contains(address)) {
            say!("SIGHUP: connected to the assistant at {new}");
        }
        Ok(if before == self.addresses && key == self.key { Vec::new() } else { changes })
    }
}

/// An address of each name, no two the same: one that is `known` already if there is one.
fn choose(found: &[(&str, Vec<SocketAddr>)], known: &[SocketAddr]) -> Result<Vec<SocketAddr>> {
    let mut chosen: Vec<SocketAddr> = Vec::new();
    for (name, addresses) in found {
        let mut free = addresses.iter().filter(|address| !chosen.contains(address));
        let known = free.clone().find(|address| known.contains(address));
        match known.or_else(|| free.next()) {
            Some(&address) => chosen.push(address),
            None if addresses.is_empty() => bail!("-s {name}: the name has no address"),
            None => bail!("-s names {} twice", addresses[0]),
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_the_address_that_it_still_has() {
        let at = |text: &str| -> Vec<SocketAddr> {
            text.split(' ').map(|part| format!("192.0.2.{part}:7").parse().unwrap()).collect()
        };
        let found = [("a", at("1 2")), ("b", at("3"))];
        assert_eq!(choose(&found, &[]).unwrap(), at("1 3"));
        // Whatever order a name server gives them in.
        assert_eq!(choose(&found, &at("2 3")).unwrap(), at("2 3"));
        assert_eq!(choose(&found, &at("9")).unwrap(), at("1 3"));
        // Two names of one host with two addresses are two assistants; two names of one address are a mistake.
        assert_eq!(choose(&[("a", at("1 2")), ("b", at("2 1"))], &at("1")).unwrap(), at("1 2"));
        let error = choose(&[("a", at("1")), ("b", at("1"))], &[]).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1:7 twice"), "{error}");
    }
}
