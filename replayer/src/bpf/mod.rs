//! The BPF programs: loading, their maps, attaching, their counters.
//!
//! The compiled object is committed beside its source in `replayer-ebpf`; names, layouts and limits of the
//! maps are in [`replayer_common::maps`].
//!
//! Attachments are BPF links and nothing else: a link is a descriptor of this process, so that the kernel
//! removes the program when the process ends, SIGKILL included.
//!
//! What may not happen here: a program is attached before its maps say what to do; nothing else on the device
//! is replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, XskMap};
use aya::pin::PinError;
use aya::programs::links::FdLink;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, Xdp, XdpMode, loaded_programs};
use aya::{Ebpf, EbpfError};
use replayer_common::addr::Ip;
use replayer_common::counters::ResponsesVerdict;
use replayer_common::maps::{
    CaptureConfig, MAX_LOCAL_ADDRESSES, MAX_QUEUES, MAX_SERVICES, ServiceKey, names, port_bit,
};
use replayer_common::packet::Protocol;
use thiserror::Error;

use crate::capture::mirror::Mirror;
use crate::clients::Clients;
use crate::net::Device;

mod counts;

pub use counts::{Counts, Verdict};

/// The object with all programs and maps.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../replayer-ebpf/replayer.bpf.o"));

/// Services: protocols, addresses and ports.
pub type Services = BTreeSet<(Protocol, Ip, u16)>;

/// One loaded copy of the object: its maps, and the programs that were attached. Dropping it detaches them.
pub struct Programs {
    // Fields drop in this order: a program is detached before its maps go.
    links: Vec<(Program, FdLink)>,
    ebpf: Ebpf,
    services: BTreeSet<(Protocol, Ip, u16)>,
    local: BTreeSet<Ip>,
}

/// A program of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// tcx ingress on the capture interface, cloning into the mirror.
    Mirror,
    /// tcx ingress on the capture interface, copying into rings.
    Ring,
    /// XDP on a capture interface that serves nobody.
    Span,
    /// XDP on the mirror's far end.
    Capture,
    /// XDP on the assistant's interface.
    Responses,
}

/// How a program was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// XDP in the driver.
    Native,
    /// XDP in the stack: slower, after the kernel has made its buffer.
    Generic,
    /// tcx link.
    Tcx,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Attachment::Native => "XDP in native mode",
            Attachment::Generic => "XDP in generic mode, which is slower (the driver has no native XDP)",
            Attachment::Tcx => "tcx",
        })
    }
}

/// Why something about the programs did not work.
#[derive(Debug, Error)]
pub enum ProgramsError {
    /// The object could not be loaded.
    #[error("load the BPF programs: {0}; CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are needed, run as root")]
    Load(#[source] Box<EbpfError>),
    /// A program was refused by the verifier, or the object lacks it.
    #[error("BPF program {name}: {source}")]
    Program {
        /// The program's name.
        name: &'static str,
        /// The cause.
        source: Box<ProgramError>,
    },
    /// A program could not be attached.
    #[error("attach {name} to {device}: {source}{}", attach_hint(.source))]
    Attach {
        /// The program's name.
        name: &'static str,
        /// The device.
        device: String,
        /// The cause.
        source: Box<ProgramError>,
    },
    /// The kernel is too old.
    #[error(
        "attach {name} to {device}: this kernel has no XDP links (Linux 5.9); \
         without them a crash would leave the program behind"
    )]
    NoLink {
        /// The program's name.
        name: &'static str,
        /// The device.
        device: String,
    },
    /// A link could not be pinned.
    #[error("pin {name} to {path}: {source}")]
    Pin {
        /// The program's name.
        name: &'static str,
        /// The file.
        path: String,
        /// The cause.
        source: Box<PinError>,
    },
    /// A map could not be read or written.
    #[error("BPF map {name}: {source}")]
    Map {
        /// The map's name.
        name: &'static str,
        /// The cause.
        source: Box<MapError>,
    },
    /// A limit of replayer_common::maps was reached.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many there can be.
        limit: u32,
    },
    /// The mirror's private namespace could not be entered.
    #[error("enter the mirror's network namespace: {0}; CAP_SYS_ADMIN is needed, run as root")]
    Namespace(#[source] io::Error),
}

fn attach_hint(error: &ProgramError) -> &'static str {
    match errno(error) {
        Some(libc::EBUSY | libc::EEXIST) => {
            "; it has an XDP program already, see `ip link show`: remove that one, or use another interface"
        }
        Some(libc::ERANGE) => "; its MTU is too large for XDP",
        Some(libc::EPERM) => "; CAP_BPF and CAP_NET_ADMIN are needed, run as root",
        _ => "",
    }
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").field("services", &self.services.len()).finish_non_exhaustive()
    }
}

/// Whether the kernel has tcx, by which [`Program::Mirror`] and [`Program::Ring`] are attached to `device`. One before 6.6 knows no such
/// attach type (kernel/bpf/syscall.c, `bpf_prog_query`); another refusal is for [`Programs::attach_ingress`] to name.
pub fn has_tcx(device: &str) -> bool {
    !SchedClassifier::query_tcx(device, TcAttachType::Ingress).is_err_and(|error| is_unknown(&error))
}

/// Whether the kernel knows no such attach type.
fn is_unknown(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// What is to be said before XDP is attached to a device: `None` where its link stays up for certain.
pub fn before_xdp(device: &Device) -> Option<String> {
    let driver = match device.kind.as_deref() {
        Some("veth") => return None,
        Some(kind) => kind.to_owned(),
        None => device.driver().unwrap_or_else(|| "unknown".to_owned()),
    };
    Some(format!(
        "attaching XDP to {} (driver {driver}): some drivers (mlx5, ixgbe, ena) reset the link for that, and it is down for a moment",
        device.name
    ))
}

impl Programs {
    /// Makes the maps. A program is loaded when it is attached, or before that by [`Programs::verify`].
    pub fn load() -> Result<Programs, ProgramsError> {
        crate::afxdp::raise_memlock();
        let ebpf = Ebpf::load(OBJECT).map_err(|error| ProgramsError::Load(Box::new(error)))?;
        Ok(Programs { links: Vec::new(), ebpf, services: BTreeSet::new(), local: BTreeSet::new() })
    }

    /// Makes `services` the services: addresses and ports of the online servers for [`Program::Mirror`] (an
    /// address may be [`replayer_common::addr::ANY`]), of the targets for [`Program::Responses`]. May be
    /// called while programs run: services that stay never miss a packet.
    pub fn set_services(&mut self, services: &BTreeSet<(Protocol, Ip, u16)>) -> Result<(), ProgramsError> {
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
    pub fn set_clients(&mut self, clients: &Clients) -> Result<(), ProgramsError> {
        let map = self.ebpf.map_mut(names::CLIENTS).ok_or_else(|| missing(names::CLIENTS))?;
        let mut map: LpmTrie<_, Ip, u32> = map.try_into().map_err(map_error(names::CLIENTS))?;
        for (bits, net, chosen) in clients.nets() {
            map.insert(&Key::new(bits, net), u32::from(chosen), 0).map_err(map_error(names::CLIENTS))?;
        }
        Ok(())
    }

    /// What the programs on the capture interface sample, and where [`Program::Mirror`] clones to.
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
    pub fn set_socket(&mut self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), ProgramsError> {
        if queue >= MAX_QUEUES {
            return Err(ProgramsError::Limit { what: "queues", limit: MAX_QUEUES });
        }
        let map = self.ebpf.map_mut(names::XSKS).ok_or_else(|| missing(names::XSKS))?;
        let mut sockets = XskMap::try_from(map).map_err(map_error(names::XSKS))?;
        sockets.set(queue, socket, 0).map_err(map_error(names::XSKS))
    }

    /// Hands a program to the kernel, whose verifier may refuse it, and attaches it to nothing yet.
    pub fn verify(&mut self, which: Program) -> Result<(), ProgramsError> {
        let name = which.name();
        match self.ebpf.program_mut(name) {
            Some(aya::programs::Program::SchedClassifier(classifier)) => loaded(classifier.load(), name),
            Some(aya::programs::Program::Xdp(xdp)) => loaded(xdp.load(), name),
            _ => Err(program_error(name)(ProgramError::UnexpectedProgramType)),
        }
    }

    /// Attaches [`Program::Mirror`] or [`Program::Ring`] to the ingress side of `device`, in front of what is there already: they
    /// let everything pass. See [`has_tcx`].
    pub fn attach_ingress(&mut self, which: Program, device: &str) -> Result<Attachment, ProgramsError> {
        let name = which.name();
        let program: &mut SchedClassifier = program(&mut self.ebpf, name)?;
        loaded(program.load(), name)?;
        let attach_error =
            |source| ProgramsError::Attach { name, device: device.to_owned(), source: Box::new(source) };
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        let link = program.attach_with_options(device, TcAttachType::Ingress, order).map_err(attach_error)?;
        let link = program.take_link(link).map_err(program_error(name))?;
        let link =
            FdLink::try_from(link).map_err(|_| ProgramsError::NoLink { name, device: device.to_owned() })?;
        self.links.push((which, link));
        Ok(Attachment::Tcx)
    }

    /// Attaches [`Program::Capture`] to the mirror's far end, in native mode: generic XDP skips clones
    /// (net/core/dev.c, `do_xdp_generic`).
    pub fn attach_capture(&mut self, mirror: &Mirror) -> Result<Attachment, ProgramsError> {
        let program: &mut Xdp = program(&mut self.ebpf, Program::Capture.name())?;
        let link = mirror
            .namespace()
            .run(|| attach_xdp(program, Program::Capture.name(), mirror.far(), &[Attachment::Native]))
            .map_err(ProgramsError::Namespace)??;
        self.links.push((Program::Capture, link.0));
        Ok(link.1)
    }

    /// Attaches [`Program::Span`] to `device`: in native mode where the driver can, else in generic mode. See [`before_xdp`].
    pub fn attach_span(&mut self, device: &str) -> Result<Attachment, ProgramsError> {
        let program: &mut Xdp = program(&mut self.ebpf, Program::Span.name())?;
        let modes = [Attachment::Native, Attachment::Generic];
        let link = attach_xdp(program, Program::Span.name(), device, &modes)?;
        self.links.push((Program::Span, link.0));
        Ok(link.1)
    }

    /// Attaches [`Program::Responses`] to `device`: in native mode where the driver can, else in generic mode. See [`before_xdp`].
    pub fn attach_responses(&mut self, device: &str) -> Result<Attachment, ProgramsError> {
        let program: &mut Xdp = program(&mut self.ebpf, Program::Responses.name())?;
        let modes = [Attachment::Native, Attachment::Generic];
        let link = attach_xdp(program, Program::Responses.name(), device, &modes)?;
        self.links.push((Program::Responses, link.0));
        Ok(link.1)
    }

    /// Puts [`Program::Responses`] in the place of the program that `link` has attached, without a moment between them.
    pub fn replace_responses(&mut self, link: FdLink) -> Result<(), ProgramsError> {
        let name = Program::Responses.name();
        let program: &mut Xdp = program(&mut self.ebpf, name)?;
        loaded(program.load(), name)?;
        // Both fail only for a link that is none of XDP.
        let of_xdp = |_| program_error(name)(ProgramError::UnexpectedProgramType);
        let replaced = program.attach_to_link(XdpLink::try_from(link).map_err(of_xdp)?);
        let link = replaced.and_then(|link| program.take_link(link)).map_err(program_error(name))?;
        let link = FdLink::try_from(link).map_err(of_xdp)?;
        self.links.push((Program::Responses, link));
        Ok(())
    }

    /// Pins the link of an attached program to a file: the program stays attached as long as the file is there.
    pub fn pin(&mut self, which: Program, path: &Path) -> Result<(), ProgramsError> {
        let at = self.links.iter().position(|(program, _)| *program == which);
        let Some(at) = at else { return Err(program_error(which.name())(ProgramError::NotAttached)) };
        let (_, link) = self.links.swap_remove(at);
        let pinned = link.pin(path).map_err(|source| ProgramsError::Pin {
            name: which.name(),
            path: path.display().to_string(),
            source: Box::new(source),
        })?;
        self.links.push((which, FdLink::from(pinned)));
        Ok(())
    }

    /// Detaches a program; the maps and the counters stay.
    pub fn detach(&mut self, which: Program) {
        self.links.retain(|(program, _)| *program != which);
    }

    /// What the program with these verdicts has counted.
    pub fn counts<V: Verdict>(&self) -> Result<Counts<V>, ProgramsError> {
        let map = self.ebpf.map(V::MAP).ok_or_else(|| missing(V::MAP))?;
        let map: PerCpuArray<_, u64> = map.try_into().map_err(map_error(V::MAP))?;
        let sums = map.iter().map(|of_cpus| Ok(of_cpus.map_err(map_error(V::MAP))?.iter().sum()));
        Ok(Counts::of(sums.collect::<Result<_, ProgramsError>>()?))
    }

    /// How long a program has run and how often, as far as the kernel kept statistics (`kernel.bpf_stats_enabled`). It must be loaded.
    pub fn run_time(&self, program: Program) -> Result<(Duration, u64), ProgramsError> {
        let name = program.name();
        let info = match self.ebpf.program(name) {
            Some(aya::programs::Program::Xdp(program)) => program.info(),
            Some(aya::programs::Program::SchedClassifier(program)) => program.info(),
            _ => Err(ProgramError::UnexpectedProgramType),
        };
        let info = info.map_err(program_error(name))?;
        Ok((info.run_time(), info.run_count()))
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

impl Program {
    /// Its name in the object.
    pub fn name(self) -> &'static str {
        match self {
            Program::Mirror => "mirror",
            Program::Ring => "ring",
            Program::Span => "span",
            Program::Capture => "capture",
            Program::Responses => "responses",
        }
    }
}

/// Loads the program and attaches it in the first of `modes` that the device takes.
fn attach_xdp(
    program: &mut Xdp,
    name: &'static str,
    device: &str,
    modes: &[Attachment],
) -> Result<(FdLink, Attachment), ProgramsError> {
    loaded(program.load(), name)?;
    let mut refusal = None;
    for &mode in modes {
        let flag = if mode == Attachment::Native { XdpMode::Driver } else { XdpMode::Skb };
        match program.attach(device, flag) {
            Ok(link) => {
                let link = program.take_link(link).map_err(program_error(name))?;
                // aya falls back to netlink, without a link, when the kernel has none.
                let link = FdLink::try_from(link)
                    .map_err(|_| ProgramsError::NoLink { name, device: device.to_owned() })?;
                return Ok((link, mode));
            }
            Err(error) => {
                // The device is taken or the caller may not: another mode would hear the same.
                let last = matches!(errno(&error), Some(libc::EBUSY | libc::EEXIST | libc::EPERM));
                refusal = Some(error);
                if last {
                    break;
                }
            }
        }
    }
    let source = Box::new(refusal.unwrap_or(ProgramError::NotAttached));
    Err(ProgramsError::Attach { name, device: device.to_owned(), source })
}

/// What came of loading a program, which may have been loaded before.
fn loaded(result: Result<(), ProgramError>, name: &'static str) -> Result<(), ProgramsError> {
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(program_error(name)(error)),
    }
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, ProgramsError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let source = || Box::new(ProgramError::UnexpectedProgramType);
    let program = ebpf.program_mut(name).ok_or_else(|| ProgramsError::Program { name, source: source() })?;
    program.try_into().map_err(program_error(name))
}

/// The keys for `services`: each by itself, and each address alone, by which fragments are recognised.
fn entries(services: &BTreeSet<(Protocol, Ip, u16)>) -> BTreeSet<[u8; 20]> {
    let keys = services.iter().flat_map(|&(protocol, ip, port)| {
        let protocol = protocol.number();
        [ServiceKey::new(protocol, ip, port), ServiceKey::address_only(protocol, ip)]
    });
    keys.map(key_bytes).collect()
}

/// The words of the port bitmap that are not zero.
fn port_words(services: &BTreeSet<(Protocol, Ip, u16)>) -> BTreeMap<u32, u64> {
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

fn map_error(name: &'static str) -> impl Fn(MapError) -> ProgramsError {
    move |source| ProgramsError::Map { name, source: Box::new(source) }
}

fn program_error(name: &'static str) -> impl Fn(ProgramError) -> ProgramsError {
    move |source| ProgramsError::Program { name, source: Box::new(source) }
}

/// The object lacks a map that [`replayer_common::maps`] promises.
fn missing(name: &'static str) -> ProgramsError {
    map_error(name)(MapError::InvalidName { name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use replayer_common::addr;

    use super::*;

    #[test]
    fn a_kernel_without_tcx_does_not_know_the_attach_type() {
        let refused = |errno| {
            let io_error = io::Error::from_raw_os_error(errno);
            ProgramError::SyscallError(aya::sys::SyscallError { call: "bpf_prog_query", io_error })
        };
        assert!(is_unknown(&refused(libc::EINVAL)));
        for errno in [libc::EPERM, libc::ENODEV, libc::ENOENT] {
            assert!(!is_unknown(&refused(errno)));
        }
    }

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
