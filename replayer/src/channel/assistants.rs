//! The assistants of a role that replays: their names, where those lead, and a channel of each worker to each of them. At the start and, for SIGHUP,
//! while it runs.

use super::client::{Client, ClientConfig};
use super::limits::MAX_KEY;
use super::random_instance;
use super::wire::ServiceEntry;
use crate::cli::ServiceArg;
use crate::cli::values::assistant_addresses;
use crate::clock;
use crate::say::say;
use crate::worker::MAX_CHANNELS;
use anyhow::{Result, bail};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

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

/// How long a former assistant is kept beside those that are named now: whoever moves the target's route has this time for it, and what the
/// target sends by the old one meanwhile still counts.
const KEEP_FORMER: Duration = Duration::from_secs(30);

/// Whom the workers are connected to.
#[derive(Debug)]
pub struct Assistants {
    instance: u64,
    services: Vec<ServiceEntry>,
    named: Vec<SocketAddr>,
    /// Those that are not named any more, and until when they are kept; the oldest first.
    former: Vec<(SocketAddr, Instant)>,
    key: String,
}

/// Looks for assistants, which may take seconds.
pub struct Search {
    instance: u64,
    services: Vec<ServiceEntry>,
    workers: u32,
    /// To whom workers are connected.
    known: Vec<SocketAddr>,
}

/// What a [`Search`] has found.
pub struct Found {
    named: Vec<SocketAddr>,
    /// Each worker's channels to those that were not known.
    new: Vec<Vec<Client>>,
    key: String,
}

/// What becomes of a worker's channels.
pub struct Change {
    /// Those to these addresses stay, the others end.
    pub keep: Vec<SocketAddr>,
    /// Of these, those that are not to stay for long: nobody has to be told when they are gone.
    pub former: Vec<SocketAddr>,
    /// These come in addition; connected.
    pub new: Vec<Client>,
    /// The key from now on, should one have to connect again.
    pub key: Vec<u8>,
}

impl Assistants {
    /// Connects each worker to every assistant; a role does not start without them.
    ///
    /// # Errors
    /// As of [`Search::run`].
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
            named: Vec::new(),
            former: Vec::new(),
            key: String::new(),
        };
        let found = assistants.search(workers).run(named)?;
        (assistants.named, assistants.key) = (found.named, found.key);
        Ok((assistants, found.new))
    }

    /// A search for those that are to be connected to in addition. Until its outcome is taken over or dropped, none is to be left.
    pub fn search(&self, workers: u32) -> Search {
        let (instance, services) = (self.instance, self.services.clone());
        Search { instance, services, workers, known: self.connected() }
    }

    /// What each worker has to do now that these were found; nothing where nothing is different. Says what is.
    pub fn take_over(&mut self, found: Found, now: Instant) -> Vec<Change> {
        let before = self.connected();
        for new in found.named.iter().filter(|address| !before.contains(address)) {
            say!("SIGHUP: connected to the assistant at {new}");
        }
        self.former.retain(|(address, _)| !found.named.contains(address));
        let gone = self.named.iter().filter(|address| !found.named.contains(address));
        self.former.extend(gone.map(|&gone| (gone, now + KEEP_FORMER)));
        // A worker has room for so many.
        let too_many = (found.named.len() + self.former.len()).saturating_sub(MAX_CHANNELS);
        for (address, _) in self.former.drain(..too_many) {
            say!("SIGHUP: left the assistant at {address}");
        }
        for (address, _) in self.former.iter().filter(|(address, _)| self.named.contains(address)) {
            let seconds = KEEP_FORMER.as_secs();
            say!(
                "SIGHUP: the assistant at {address} is none any more; responses that come through it still count for {seconds} s"
            );
        }
        let same_key = found.key == self.key;
        (self.named, self.key) = (found.named, found.key);
        let now = self.connected();
        if same_key && now.len() == before.len() && now.iter().all(|address| before.contains(address)) {
            return Vec::new();
        }
        self.changes(found.new)
    }

    /// What each worker has to do when the time of former assistants is over; nothing where none's is.
    pub fn leave(&mut self, now: Instant, workers: usize) -> Vec<Change> {
        let before = self.former.len();
        self.former.retain(|&(address, until)| {
            if now >= until {
                say!("left the former assistant at {address}");
            }
            now < until
        });
        if self.former.len() == before { Vec::new() } else { self.changes((0..workers).map(|_| Vec::new())) }
    }

    fn changes(&self, new: impl IntoIterator<Item = Vec<Client>>) -> Vec<Change> {
        let former: Vec<_> = self.former.iter().map(|&(address, _)| address).collect();
        let keep = self.connected();
        let key = self.key.as_bytes();
        let change = |new| Change { keep: keep.clone(), former: former.clone(), new, key: key.to_vec() };
        new.into_iter().map(change).collect()
    }

    fn connected(&self) -> Vec<SocketAddr> {
        self.named.iter().chain(self.former.iter().map(|(address, _)| address)).copied().collect()
    }
}

impl Search {
    /// Looks the names up and connects each worker to those that are new. An address that a name still has stays, though it may have others too.
    ///
    /// # Errors
    /// When a name does not resolve, or an assistant cannot be reached or refuses; with the remedy.
    pub fn run(self, named: &Named<'_>) -> Result<Found> {
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
        let addresses = choose(&found, &self.known)?;
        let mut new = Vec::new();
        for worker in 0..self.workers {
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
            let unknown = addresses.iter().filter(|address| !self.known.contains(address));
            new.push(unknown.map(connect).collect::<Result<_>>()?);
        }
        Ok(Found { named: addresses, new, key: named.key.to_owned() })
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

    fn at(text: &str) -> Vec<SocketAddr> {
        text.split_whitespace().map(|part| format!("192.0.2.{part}:7").parse().unwrap()).collect()
    }

    #[test]
    fn b063_a_former_assistant_is_kept_for_a_while() {
        let mut assistants = Assistants {
            instance: 1,
            services: Vec::new(),
            named: at("1"),
            former: Vec::new(),
            key: String::new(),
        };
        let start = Instant::now();
        // What each of two workers is connected to from then on; `None`: as before.
        let kept = |changes: Vec<Change>| -> Option<Vec<SocketAddr>> {
            let [first, second] = <[Change; 2]>::try_from(changes).ok()?;
            assert_eq!(first.keep, second.keep);
            Some(first.keep)
        };
        let name = |assistants: &mut Assistants, seconds: u64, names: &str, key: &str| {
            let new = vec![Vec::new(), Vec::new()];
            let found = Found { named: at(names), new, key: key.to_owned() };
            kept(assistants.take_over(found, start + Duration::from_secs(seconds)))
        };
        let leave = |assistants: &mut Assistants, seconds: u64| {
            kept(assistants.leave(start + Duration::from_secs(seconds), 2))
        };
        assert_eq!(name(&mut assistants, 0, "1", ""), None);
        assert_eq!(name(&mut assistants, 0, "1", "new"), Some(at("1")));
        assert_eq!(name(&mut assistants, 0, "2", "new"), Some(at("2 1")));
        // Named the same again, it is not kept longer; and is known to a search.
        assert_eq!(name(&mut assistants, 20, "2", "new"), None);
        assert_eq!(assistants.search(2).known, at("2 1"));
        assert_eq!(leave(&mut assistants, 29), None);
        assert_eq!(leave(&mut assistants, 30), Some(at("2")));
        assert_eq!(leave(&mut assistants, 31), None);
        // One that is named again before it was left stays.
        assert_eq!(name(&mut assistants, 40, "3", "new"), Some(at("3 2")));
        assert_eq!(name(&mut assistants, 50, "3 2", "new"), None);
        assert_eq!(leave(&mut assistants, 100), None);
        // There is room for eight: the oldest goes.
        assert_eq!(name(&mut assistants, 110, "3", "new"), None);
        assert_eq!(name(&mut assistants, 120, "4 5 6 7 8 9 10", "new"), Some(at("4 5 6 7 8 9 10 3")));
    }

    #[test]
    fn a_name_keeps_the_address_that_it_still_has() {
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
