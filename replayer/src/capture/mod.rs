//! Capture: how requests get from the wire to the workers, with one interface in front of three back ends.
//!
//! - [`choice`]: which back end, by `--capture` and by what is there
//! - [`mirror`]: clones into a private veth pair, at whose far end are AF_XDP sockets
//! - [`ring`]: copies in BPF ring buffers
//! - [`span`]: AF_XDP sockets on the NIC of a mirror port, which serves nobody
//! - [`segmentation`]: packets that an offload put together, cut to segments
//! - [`verdicts`]: what the programs counted, and what of it is lost
//!
//! What a back end costs, and why it is as it is, is in docs/capture.md.
//!
//! What may not happen here: a program is attached before everything behind it stands. All of it goes with this process: programs are
//! links, rings and sockets are descriptors, and so are the mirror's namespace and the promiscuous mode.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use replayer_common::addr::Ip;
use replayer_common::maps::CaptureConfig;
use replayer_common::packet::Protocol;

use crate::afxdp::{Endpoint, Frame, Port, Received};
use crate::bpf::{Counts, Program, Programs, Verdict, before_xdp};
use crate::clients::Clients;
use crate::net::Device;
use crate::say::say;

pub mod choice;
pub mod mirror;
pub mod ring;
pub mod segmentation;
pub mod span;
pub mod verdicts;

pub use choice::{Backend, CaptureArg};
pub use verdicts::Verdicts;

use mirror::Mirror;
use ring::Reader;
use span::Promiscuous;
use verdicts::Unreadable;

/// One back end on one device. Dropping it detaches and removes everything.
#[derive(Debug)]
pub struct Capture {
    // Fields drop in this order: first the programs are detached.
    programs: Programs,
    parts: Parts,
    device: Device,
    config: CaptureConfig,
    /// How it is attached, for people.
    how: String,
}

/// What a back end has besides its programs.
#[derive(Debug)]
enum Parts {
    Mirror(Mirror),
    Ring,
    Span(Option<Promiscuous>),
}

impl Capture {
    /// Makes everything of a back end but what is on the device itself, for requests of `clients` to `services` and at most
    /// `workers` workers.
    ///
    /// # Errors
    /// What the kernel refused, with the remedy. Nothing is left behind.
    pub fn prepare(
        backend: Backend,
        device: &Device,
        services: &BTreeSet<(Protocol, Ip, u16)>,
        clients: &Clients,
        workers: u32,
    ) -> Result<Capture> {
        let choose_clients = u8::from(!clients.is_everybody());
        let mut config = CaptureConfig { shards: workers, choose_clients, ..CaptureConfig::default() };
        let mut how = String::new();
        let mirror = match backend {
            Backend::Mirror => Some(Mirror::create(device.mtu, workers)?),
            Backend::Ring | Backend::Span => None,
        };
        let mut programs = Programs::load()?;
        programs.set_services(services)?;
        programs.set_clients(clients)?;
        let parts = match mirror {
            Some(mirror) => {
                config.mirror_ifindex = mirror.near_index();
                how = format!(", mirror {} ({})", mirror.near(), programs.attach_capture(&mirror)?);
                Parts::Mirror(mirror)
            }
            None if backend == Backend::Ring => Parts::Ring,
            None => {
                span::check_mtu(device)?;
                config.mac = device.mac.unwrap_or_default();
                Parts::Span(None)
            }
        };
        let mut capture = Capture { programs, parts, device: device.clone(), config, how };
        capture.programs.verify(capture.program())?;
        Ok(capture)
    }

    /// Where the port of a worker receives; `None`: it has no receiving side.
    pub fn receiving_end(&self, worker: u32) -> Option<Endpoint> {
        match &self.parts {
            Parts::Mirror(mirror) => {
                Some(Endpoint::new(mirror.far(), worker).within(mirror.namespace().clone()))
            }
            Parts::Ring => None,
            Parts::Span(_) => Some(Endpoint::new(self.device.name.clone(), worker)),
        }
    }

    /// What comes from the wire for a worker out of `workers`: by the receiving side of `port`, which was opened for it, or else.
    ///
    /// # Errors
    /// What the kernel refused; a port without a receiving side where the back end needs one.
    pub fn source(&mut self, worker: u32, workers: u32, port: Option<&Port>) -> Result<Source> {
        let Parts::Ring = self.parts else {
            let receiving = port.and_then(|port| port.rx_queue().zip(port.rx_fd()));
            let (queue, socket) = receiving.context("the port has no capture side")?;
            self.programs.set_socket(queue, socket)?;
            return Ok(Source::Port(Vec::with_capacity(crate::afxdp::BATCH)));
        };
        Ok(Source::Ring(Box::new(Reader::new(&mut self.programs, worker, workers)?)))
    }

    /// Takes connections with flow hashes below `threshold`, shared by `workers`. May be called at any time.
    ///
    /// # Errors
    /// What the kernel refused: a map that cannot be written.
    pub fn configure(&mut self, workers: u32, threshold: u64) -> Result<()> {
        self.config = CaptureConfig { sample_threshold: threshold, shards: workers, ..self.config };
        Ok(self.programs.set_capture(self.config)?)
    }

    /// The threshold of flow hashes that is taken now.
    pub fn threshold(&self) -> u64 {
        self.config.sample_threshold
    }

    /// Attaches to the device: from here on packets come.
    ///
    /// # Errors
    /// What the kernel refused, with the remedy. Nothing is attached then.
    pub fn attach(&mut self) -> Result<()> {
        let attachment = match &mut self.parts {
            Parts::Mirror(_) => self.programs.attach_ingress(Program::Mirror, &self.device.name)?,
            Parts::Ring => self.programs.attach_ingress(Program::Ring, &self.device.name)?,
            Parts::Span(promiscuous) => {
                if let Some(notice) = before_xdp(&self.device) {
                    say!("{notice}");
                }
                let attachment = self.programs.attach_to_nic(Program::Span, &self.device.name)?;
                *promiscuous = Some(Promiscuous::set(&self.device)?);
                attachment
            }
        };
        self.how.insert_str(0, &attachment.to_string());
        Ok(())
    }

    /// Detaches from the device. The counters stay.
    pub fn detach(&mut self) {
        if let Parts::Span(promiscuous) = &mut self.parts {
            *promiscuous = None;
        }
        self.programs.detach(self.program());
    }

    /// What the programs counted.
    pub fn verdicts(&mut self) -> Verdicts {
        fn read<V: Verdict>(programs: &Programs) -> Result<Counts<V>, Unreadable> {
            programs.counts().map_err(|error| Unreadable { error: error.to_string() })
        }
        match &mut self.parts {
            Parts::Mirror(mirror) => Verdicts::Mirror {
                mirror: read(&self.programs),
                capture: read(&self.programs),
                mirror_device_dropped: mirror.dropped().map_err(|error| error.to_string()),
            },
            Parts::Ring => Verdicts::Ring { ring: read(&self.programs) },
            Parts::Span(_) => Verdicts::Span { span: read(&self.programs) },
        }
    }

    /// How long the program on the device has run, and how often, while the kernel kept such statistics (`kernel.bpf_stats_enabled`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn run_time(&self) -> Result<(Duration, u64)> {
        Ok(self.programs.run_time(self.program())?)
    }

    fn program(&self) -> Program {
        match self.backend() {
            Backend::Mirror => Program::Mirror,
            Backend::Ring => Program::Ring,
            Backend::Span => Program::Span,
        }
    }

    fn backend(&self) -> Backend {
        match self.parts {
            Parts::Mirror(_) => Backend::Mirror,
            Parts::Ring => Backend::Ring,
            Parts::Span(_) => Backend::Span,
        }
    }
}

/// One line for people: where it captures, and how.
impl fmt::Display for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {} ({})", self.device.name, self.backend(), self.how)
    }
}

/// Where a worker's packets come from. For one thread at a time.
pub enum Source {
    /// The receiving side of its port; what was received, for a moment.
    Port(Vec<Received>),
    /// A ring.
    Ring(Box<Reader>),
}

impl Source {
    /// The most packets that one call of [`Source::receive`] adds.
    pub const MOST: usize = crate::afxdp::BATCH + segmentation::MOST;

    /// Appends captured packets to `out` as frames of `port`, some [`BATCH`](crate::afxdp::BATCH) at a time; how many.
    pub fn receive(&mut self, port: &mut Port, out: &mut Vec<(Frame, usize)>) -> usize {
        match self {
            Source::Port(received) => {
                let count = port.receive(received);
                out.extend(received.drain(..).map(|packet| (packet.frame, packet.len as usize)));
                count
            }
            Source::Ring(reader) => reader.receive(port, out),
        }
    }

    /// Throws away what was not taken; how many packets, as the program handed them over.
    pub fn discard(&mut self, port: &mut Port) -> u64 {
        let mut count = 0;
        match self {
            Source::Port(received) => {
                received.clear();
                while port.receive(received) > 0 {
                    count += received.len() as u64;
                    received.drain(..).for_each(|packet| port.release(packet.frame));
                    port.reclaim();
                }
            }
            Source::Ring(reader) => {
                while reader.skip() {
                    count += 1;
                }
            }
        }
        count
    }

    /// How many of the packets that the capture program handed over were taken: [`Verdicts::handed_over`] says how many there were.
    pub fn taken(&self, port: &Port) -> u64 {
        match self {
            Source::Port(_) => port.counters().received,
            Source::Ring(reader) => reader.taken(),
        }
    }

    /// When the kernel had the first of the packets that were received last, ns of CLOCK_MONOTONIC; `None`: only a ring notes it.
    pub fn first_captured_ns(&self) -> Option<u64> {
        match self {
            Source::Port(_) => None,
            Source::Ring(reader) => Some(reader.first_captured_ns()),
        }
    }

    /// Becomes readable when there is something, but see [`Source::about_to_sleep`].
    pub fn fd<'a>(&'a self, port: &'a Port) -> Option<BorrowedFd<'a>> {
        match self {
            Source::Port(_) => port.rx_fd(),
            Source::Ring(reader) => Some(reader.as_fd()),
        }
    }

    /// To be called before waiting for [`Source::fd`], `idle_ns` after the last packet. `Some`: nobody will be woken; to look again after so
    /// many ns.
    pub fn about_to_sleep(&mut self, idle_ns: u64) -> Option<u64> {
        match self {
            Source::Port(_) => None,
            Source::Ring(reader) => reader.about_to_sleep(idle_ns),
        }
    }
}
