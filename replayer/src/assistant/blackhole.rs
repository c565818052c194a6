//! The black hole: the XDP program `responses` on the interface, and an AF_XDP socket on each of its queues.
//!
//! It knows frames and endpoints, not peers. The program is attached by a BPF link: it goes when this process goes, even
//! by SIGKILL, and the kernel has the interface to itself again.

use crate::afxdp::{BATCH, Endpoint as Queue, Port, PortConfig, PortError, Received, SocketStatistics};
use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, XskMap};
use aya::programs::{ProgramError, Xdp, XdpMode};
use aya::{Ebpf, include_bytes_aligned};
use replayer_common::addr::{Endpoint, Ip};
use replayer_common::counters::ResponsesVerdict;
use replayer_common::maps::{MAX_QUEUES, ServiceKey, names, port_bit};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Frames of a socket, and of one from the fifth on: an interface with many queues spreads its load, and would take
/// much memory otherwise. The RX ring is half of it.
const FRAMES: (u32, u32) = (8192, 2048);

/// Headers fit easily: the program cuts what follows.
const FRAME_SIZE: u32 = 2048;

/// Batches taken from one queue before the others and the peers have their turn.
const BATCHES_PER_TURN: usize = 16;

/// How the program is to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Native where the driver has it, generic otherwise.
    #[default]
    Auto,
    /// In the driver.
    Native,
    /// In the network stack: slower, works everywhere.
    Generic,
}

/// The program and the sockets.
pub struct BlackHole {
    /// Sockets first: dropped before the program that feeds them.
    ports: Vec<Port>,
    received: Vec<Received>,
    maps: Maps,
    targets: BTreeSet<(Ip, u16)>,
    local: Vec<Ip>,
    mode: &'static str,
    _bpf: Ebpf,
}

/// The maps that change while the program runs.
struct Maps {
    services: HashMap<MapData, [u8; 20], u32>,
    ports: Array<MapData, u64>,
    local: HashMap<MapData, [u8; 16], u32>,
    counters: PerCpuArray<MapData, u64>,
}

impl BlackHole {
    /// Attaches to an interface. Nothing is taken before [`BlackHole::add_target`].
    ///
    /// # Errors
    /// With cause and remedy: no permission, the interface has another XDP program or none is possible, no socket.
    pub fn open(interface: &str, mode: Mode, zero_copy: bool) -> Result<BlackHole> {
        let mut bpf = Ebpf::load(include_bytes_aligned!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../replayer-ebpf/replayer.bpf.o"
        )))
        .context(
            "cannot load the BPF programs; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
        )?;
        let ports = open_ports(interface, zero_copy)?;
        let mut sockets = XskMap::try_from(take_map(&mut bpf, names::XSKS)?)?;
        for port in &ports {
            if let (Some(queue), Some(fd)) = (port.rx_queue(), port.rx_fd()) {
                sockets
                    .set(queue, fd.as_raw_fd(), 0)
                    .context("cannot enter an AF_XDP socket into its map")?;
            }
        }
        let maps = Maps {
            services: HashMap::try_from(take_map(&mut bpf, names::SERVICES)?)?,
            ports: Array::try_from(take_map(&mut bpf, names::PORTS)?)?,
            local: HashMap::try_from(take_map(&mut bpf, names::LOCAL_ADDRESSES)?)?,
            counters: PerCpuArray::try_from(take_map(&mut bpf, names::RESPONSES_COUNTERS)?)?,
        };
        let program: &mut Xdp =
            bpf.program_mut("responses").context("the BPF object has no program `responses`")?.try_into()?;
        program
            .load()
            .context("the kernel refused the program `responses`; Linux 5.18 or newer is needed")?;
        let mode = attach(program, interface, mode)?;
        Ok(BlackHole {
            ports,
            received: Vec::with_capacity(BATCH),
            maps,
            targets: BTreeSet::new(),
            local: Vec::new(),
            mode,
            _bpf: bpf,
        })
    }

    /// Native or generic, and what the sockets got.
    pub fn mode(&self) -> String {
        let port = self.ports.first().map_or("", |port| port.mode());
        format!("{} XDP, {} queue(s), {port}", self.mode, self.ports.len())
    }

    /// The sockets to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ports.iter().filter_map(|port| port.rx_fd())
    }

    /// From here on the responses of `target` are taken.
    ///
    /// # Errors
    /// The kernel's: the map is full.
    pub fn add_target(&mut self, target: &Endpoint) -> Result<()> {
        let full = "cannot enter a target into the map of the XDP program";
        self.maps.services.insert(key(&ServiceKey::new(target.ip, target.port)), 1, 0).context(full)?;
        self.maps.services.insert(key(&ServiceKey::address_only(target.ip)), 1, 0).context(full)?;
        self.targets.insert((target.ip, target.port));
        // Last: what the bitmap leaves out the program does not look at.
        self.write_port_bit(target.port)
    }

    /// The responses of `target` go on to the kernel again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_target(&mut self, target: &Endpoint) -> Result<()> {
        if !self.targets.remove(&(target.ip, target.port)) {
            return Ok(());
        }
        self.write_port_bit(target.port)?;
        self.maps.services.remove(&key(&ServiceKey::new(target.ip, target.port)))?;
        if !self.targets.iter().any(|(ip, _)| *ip == target.ip) {
            self.maps.services.remove(&key(&ServiceKey::address_only(target.ip)))?;
        }
        Ok(())
    }

    /// Segments to these addresses are this host's own, even if a target sends them.
    ///
    /// # Errors
    /// The kernel's: the map is full.
    pub fn set_local_addresses(&mut self, addresses: Vec<Ip>) -> Result<()> {
        for address in addresses.iter().filter(|address| !self.local.contains(address)) {
            self.maps
                .local
                .insert(address, 1, 0)
                .context("cannot enter this host's addresses into their map")?;
        }
        for address in self.local.iter().filter(|address| !addresses.contains(address)) {
            // It may be gone already; nothing depends on it.
            let _ = self.maps.local.remove(address);
        }
        self.local = addresses;
        Ok(())
    }

    /// Hands each frame that has arrived to `sink`, up to a bound. Returns whether there may be more.
    pub fn receive(&mut self, mut sink: impl FnMut(&[u8])) -> bool {
        let mut more = false;
        for port in &mut self.ports {
            for round in 1..=BATCHES_PER_TURN {
                let count = port.receive(&mut self.received);
                for Received { frame, len } in self.received.drain(..) {
                    let data = port.frame(&frame);
                    sink(&data[..data.len().min(len as usize)]);
                    port.release(frame);
                }
                if count > 0 {
                    port.reclaim();
                }
                if count < BATCH {
                    break;
                }
                more |= round == BATCHES_PER_TURN;
            }
        }
        more
    }

    /// What the kernel counted for the sockets, added up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn statistics(&self) -> Result<SocketStatistics> {
        let mut sum = SocketStatistics::default();
        for port in &self.ports {
            let rx = port.statistics()?.rx;
            sum.rx_dropped += rx.rx_dropped;
            sum.rx_ring_full += rx.rx_ring_full;
            sum.rx_fill_ring_empty += rx.rx_fill_ring_empty;
            sum.rx_invalid_descs += rx.rx_invalid_descs;
        }
        Ok(sum)
    }

    /// What the program did, by verdict, over all CPUs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn verdicts(&self) -> Result<Vec<(ResponsesVerdict, u64)>> {
        let read = |&verdict: &ResponsesVerdict| {
            let values = self.maps.counters.get(&verdict.index(), 0)?;
            Ok((verdict, values.iter().sum()))
        };
        ResponsesVerdict::ALL.iter().map(read).collect()
    }

    fn write_port_bit(&mut self, port: u16) -> Result<()> {
        let (word, _) = port_bit(port);
        let bits = self.targets.iter().map(|(_, port)| port_bit(*port));
        let bits = bits.filter(|(at, _)| *at == word).fold(0, |bits, (_, bit)| bits | bit);
        self.maps.ports.set(word, bits, 0).context("cannot write the map of ports")
    }
}

fn open_ports(interface: &str, zero_copy: bool) -> Result<Vec<Port>> {
    let mut ports = Vec::new();
    for queue in 0..MAX_QUEUES {
        let config = PortConfig {
            frames: if queue < 4 { FRAMES.0 } else { FRAMES.1 },
            frame_size: FRAME_SIZE,
            rx: Some(Queue::new(interface, queue)),
            tx: None,
            zero_copy,
        };
        match Port::open(&config) {
            Ok(port) => ports.push(port),
            // Beyond the last queue.
            Err(PortError::Socket { ref source, .. })
                if queue > 0 && source.raw_os_error() == Some(libc::EINVAL) =>
            {
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ports)
}

fn attach(program: &mut Xdp, interface: &str, mode: Mode) -> Result<&'static str> {
    let native = match mode {
        Mode::Auto | Mode::Native => program.attach(interface, XdpMode::Driver),
        Mode::Generic => return attached(program.attach(interface, XdpMode::Skb), interface, "generic"),
    };
    match (native, mode) {
        (Err(ref error), Mode::Auto)
            if matches!(errno(error), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ERANGE)) =>
        {
            log::warn!("{interface} has no native XDP ({error}); generic XDP is used, which is slower");
            attached(program.attach(interface, XdpMode::Skb), interface, "generic")
        }
        (native, _) => attached(native, interface, "native"),
    }
}

fn attached<T>(result: Result<T, ProgramError>, interface: &str, mode: &'static str) -> Result<&'static str> {
    let Err(error) = result else { return Ok(mode) };
    match errno(&error) {
        Some(libc::EBUSY | libc::EEXIST) => bail!(
            "{interface} has another XDP program; `ip link show {interface}` names it, `ip link set {interface} xdp off` \
             removes it"
        ),
        Some(libc::EPERM | libc::EACCES) => {
            bail!("no permission to attach an XDP program to {interface}; run as root, or with CAP_NET_ADMIN")
        }
        Some(libc::EOPNOTSUPP) => {
            bail!("the driver of {interface} has no {mode} XDP; try --xdp generic")
        }
        _ => Err(error).with_context(|| format!("cannot attach the XDP program to {interface} ({mode})")),
    }
}

/// The system call's error below `error`.
fn errno(error: &ProgramError) -> Option<i32> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.raw_os_error();
        }
        cause = error.source();
    }
    None
}

fn take_map(bpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    bpf.take_map(name).with_context(|| format!("the BPF object has no map {name}"))
}

/// The key's bytes as the program sees them: [`ServiceKey`] has no padding, its port is in the machine's order.
fn key(key: &ServiceKey) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(&key.addr);
    bytes[16..18].copy_from_slice(&key.port.to_ne_bytes());
    bytes
}
