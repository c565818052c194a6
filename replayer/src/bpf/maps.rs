//! What the programs are told by their maps: services, clients, the sample, rings and sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, PerCpuArray, RingBuf, XskMap};
use aya::programs::{ProgramError, loaded_programs};
use replayer_common::addr::Ip;
use replayer_common::counters::ResponsesVerdict;
use replayer_common::maps::{
    CaptureConfig, MAX_LOCAL_ADDRESSES, MAX_QUEUES, MAX_SERVICES, ServiceKey, names, port_bit,
};
use replayer_common::packet::Protocol;

use super::error::{map_error, missing, program_error};
use super::{Program, Programs, ProgramsError};
use crate::clients::Clients;

/// Services: protocols, addresses and ports.
pub type Services = BTreeSet<(Protocol, Ip, u16)>;

impl Programs {
    /// Makes `services` the services: addresses and ports of the online servers for [`Program::Mirror`] (an
    /// address may be [`replayer_common::addr::ANY`]), of the targets for [`Program::Responses`]. May be
    /// called while programs run: services that stay never miss a packet.
    ///
    /// # Errors
    /// [`ProgramsError::Limit`] for more than [`MAX_SERVICES`]; [`ProgramsError::Map`].
    pub fn set_services(&mut self, services: &Services) -> Result<(), ProgramsError> {
        if services.len() > MAX_SERVICES as usize {
            return Err(ProgramsError::Limit { what: "services", limit: MAX_SERVICES });
        }
        let (old, new) = (entries(&self.services), entries(services));
        let (old_ports, new_ports) = (port_words(&self.services), port_words(services));
        let mut map = self.hash_map::<[u8; 20]>(names::SERVICES)?;
        for key in new.difference(&old) {
            map.insert(key, 0, 0).map_err(map_error(names::SERVICES))?;
        }
        for key in old.difference(&new) {
            map.remove(key).map_err(map_error(names::SERVICES))?;
        }
        // The bitmap decides who gets to the table at all. Its words are written in one go each.
        let mut ports: Array<_, u64> = self.array(names::PORTS)?;
        for (&word, &bits) in &new_ports {
            ports.set(word, bits, 0).map_err(map_error(names::PORTS))?;
        }
        for &word in old_ports.keys().filter(|word| !new_ports.contains_key(word)) {
            ports.set(word, 0, 0).map_err(map_error(names::PORTS))?;
        }
        self.services.clone_from(services);
        Ok(())
    }

    /// Whose packets the programs on the capture interface take, while [`CaptureConfig::choose_clients`] is set. To be called before that.
    ///
    /// # Errors
    /// [`ProgramsError::Map`]: the kernel's.
    pub fn set_clients(&mut self, clients: &Clients) -> Result<(), ProgramsError> {
        let map = self.ebpf.map_mut(names::CLIENTS).ok_or_else(|| missing(names::CLIENTS))?;
        let mut map: LpmTrie<_, Ip, u32> = map.try_into().map_err(map_error(names::CLIENTS))?;
        for (bits, net, chosen) in clients.nets() {
            map.insert(&Key::new(bits, net), u32::from(chosen), 0).map_err(map_error(names::CLIENTS))?;
        }
        Ok(())
    }

    /// What the programs on the capture interface sample, and where [`Program::Mirror`] clones to.
    ///
    /// # Errors
    /// [`ProgramsError::Map`]: the kernel's.
    pub fn set_capture(&mut self, config: CaptureConfig) -> Result<(), ProgramsError> {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&config.sample_threshold.to_ne_bytes());
        bytes[8..12].copy_from_slice(&config.mirror_ifindex.to_ne_bytes());
        bytes[12..16].copy_from_slice(&config.shards.to_ne_bytes());
        bytes[16..22].copy_from_slice(&config.mac);
        bytes[22] = config.choose_clients;
        self.array::<[u8; 24]>(names::CONFIG)?.set(0, bytes, 0).map_err(map_error(names::CONFIG))
    }

    /// The addresses of this host: what a target sends to one of them is not taken by [`Program::Responses`].
    ///
    /// # Errors
    /// [`ProgramsError::Limit`] for more than [`MAX_LOCAL_ADDRESSES`]; [`ProgramsError::Map`].
    pub fn set_local_addresses(&mut self, addresses: &BTreeSet<Ip>) -> Result<(), ProgramsError> {
        if addresses.len() > MAX_LOCAL_ADDRESSES as usize {
            return Err(ProgramsError::Limit { what: "addresses of this host", limit: MAX_LOCAL_ADDRESSES });
        }
        let old = std::mem::take(&mut self.local);
        let mut map = self.hash_map::<Ip>(names::LOCAL_ADDRESSES)?;
        for address in addresses.difference(&old) {
            map.insert(address, 0, 0).map_err(map_error(names::LOCAL_ADDRESSES))?;
        }
        for address in old.difference(addresses) {
            map.remove(address).map_err(map_error(names::LOCAL_ADDRESSES))?;
        }
        self.local.clone_from(addresses);
        Ok(())
    }

    /// Makes the ring of a shard, for [`Program::Ring`] to copy into: its reading end, and the map in which the reader says at the shard's
    /// place that it sleeps.
    ///
    /// # Errors
    /// [`ProgramsError::Map`]: the kernel's, for want of memory perhaps.
    pub fn add_ring(
        &mut self,
        shard: u32,
        bytes: u32,
    ) -> Result<(RingBuf<MapData>, Array<MapData, u64>), ProgramsError> {
        /// `BPF_MAP_TYPE_RINGBUF` (include/uapi/linux/bpf.h).
        const RINGBUF: u32 = 27;
        let definition = aya_obj::Map::new_from_params(RINGBUF, 0, 0, bytes, 0);
        let data = MapData::create(definition, "ring", None).map_err(map_error(names::RINGS))?;
        let ring = RingBuf::try_from(Map::RingBuf(data)).map_err(map_error(names::RINGS))?;
        let map = self.ebpf.map_mut(names::RINGS).ok_or_else(|| missing(names::RINGS))?;
        let mut rings: ArrayOfMaps<_, RingBuf<MapData>> = map.try_into().map_err(map_error(names::RINGS))?;
        rings.set(shard, &ring, 0).map_err(map_error(names::RINGS))?;
        // A descriptor of its own, since the reader goes to another thread.
        let Some(Map::Array(sleeping)) = self.ebpf.map(names::SLEEPING) else {
            return Err(missing(names::SLEEPING));
        };
        let own = sleeping
            .info()
            .and_then(|info| MapData::from_id(info.id()))
            .map_err(map_error(names::SLEEPING))?;
        let sleeping = Array::try_from(Map::Array(own)).map_err(map_error(names::SLEEPING))?;
        Ok((ring, sleeping))
    }

    /// Sends what [`Program::Capture`], [`Program::Span`] or [`Program::Responses`] take on a queue to an AF_XDP socket bound to
    /// that queue.
    ///
    /// # Errors
    /// [`ProgramsError::Limit`] for a queue beyond [`MAX_QUEUES`]; [`ProgramsError::Map`].
    pub fn set_socket(&mut self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), ProgramsError> {
        if queue >= MAX_QUEUES {
            return Err(ProgramsError::Limit { what: "queues", limit: MAX_QUEUES });
        }
        let map = self.ebpf.map_mut(names::XSKS).ok_or_else(|| missing(names::XSKS))?;
        let mut sockets = XskMap::try_from(map).map_err(map_error(names::XSKS))?;
        sockets.set(queue, socket, 0).map_err(map_error(names::XSKS))
    }

    fn hash_map<K: aya::Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<HashMap<&mut MapData, K, u32>, ProgramsError> {
        let map = self.ebpf.map_mut(name).ok_or_else(|| missing(name))?;
        HashMap::try_from(map).map_err(map_error(name))
    }

    fn array<V: aya::Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, V>, ProgramsError> {
        let map = self.ebpf.map_mut(name).ok_or_else(|| missing(name))?;
        Array::try_from(map).map_err(map_error(name))
    }
}

/// Of a program `responses` that another process has loaded, by its number: whose responses it takes, and how many packets it has dropped
/// since there was no socket.
///
/// # Errors
/// When there is no such program, or it may not be looked at.
pub fn responses_of(program: u32) -> Result<(Services, u64), ProgramsError> {
    let name = Program::Responses.name();
    let programs = loaded_programs().filter_map(Result::ok);
    let info = { programs }.find(|info| info.id() == program);
    let maps =
        info.ok_or(ProgramError::NotLoaded).and_then(|info| info.map_ids()).map_err(program_error(name))?;
    let (mut services, mut dropped) = (Services::new(), 0);
    for id in maps.unwrap_or_default() {
        let data = MapData::from_id(id).map_err(map_error(names::SERVICES))?;
        let info = data.info().map_err(map_error(names::SERVICES))?;
        let map_name = info.name_as_str().unwrap_or_default();
        if map_name == names::SERVICES {
            let map = Map::HashMap(data);
            let map: HashMap<_, [u8; 20], u32> = map.try_into().map_err(map_error(names::SERVICES))?;
            for key in map.keys() {
                services.extend(service_of(&key.map_err(map_error(names::SERVICES))?));
            }
        } else if !map_name.is_empty() && names::RESPONSES_COUNTERS.starts_with(map_name) {
            // The kernel keeps the first fifteen bytes of a name.
            let name = names::RESPONSES_COUNTERS;
            let map: PerCpuArray<_, u64> = Map::PerCpuArray(data).try_into().map_err(map_error(name))?;
            let values = map.get(&ResponsesVerdict::NoSocket.index(), 0).map_err(map_error(name))?;
            dropped = values.iter().sum();
        }
    }
    Ok((services, dropped))
}

/// The service of a key; `None` for that of an address alone.
fn service_of(key: &[u8; 20]) -> Option<(Protocol, Ip, u16)> {
    let (ip, rest) = key.split_first_chunk::<16>()?;
    let port = u16::from_ne_bytes([rest[0], rest[1]]);
    let protocol = Protocol::from_number(rest[2])?;
    (port != 0).then_some((protocol, *ip, port))
}

/// The keys for `services`: each by itself, and each address alone, by which fragments are recognised.
fn entries(services: &Services) -> BTreeSet<[u8; 20]> {
    let keys = services.iter().flat_map(|&(protocol, ip, port)| {
        let protocol = protocol.number();
        [ServiceKey::new(protocol, ip, port), ServiceKey::address_only(protocol, ip)]
    });
    keys.map(key_bytes).collect()
}

/// The words of the port bitmap that are not zero.
fn port_words(services: &Services) -> BTreeMap<u32, u64> {
    let mut words = BTreeMap::new();
    for &(_, _, port) in services {
        let (word, bit) = port_bit(port);
        *words.entry(word).or_default() |= bit;
    }
    words
}

/// The key as it lies in memory.
fn key_bytes(key: ServiceKey) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(&key.addr);
    bytes[16..18].copy_from_slice(&key.port.to_ne_bytes());
    bytes[18] = key.protocol;
    bytes
}

#[cfg(test)]
mod tests {
    use replayer_common::addr;

    use super::*;

    #[test]
    fn services_that_share_an_address_or_a_port_word() {
        let ip = addr::from_v4([192, 0, 2, 1]);
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let services = BTreeSet::from([(tcp, ip, 80), (tcp, ip, 81), (udp, ip, 81), (tcp, addr::ANY, 443)]);
        assert_eq!(entries(&services).len(), 7);
        assert_eq!(entries(&services).iter().filter_map(service_of).collect::<Services>(), services);
        assert_eq!(port_words(&services), BTreeMap::from([(1, 0b11 << 16), (6, 1 << 59)]));
    }
}
