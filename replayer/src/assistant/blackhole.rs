//! The black hole: the XDP program `responses` on the interface, and an AF_XDP socket on each of its queues.
//!
//! It knows frames and endpoints, not peers. The program is attached by a BPF link: it goes when this process goes, even
//! by SIGKILL, and the kernel has the interface to itself again, unless it was told to stay ([`super::pin`]).

use super::pin::{Left, Pin};
use crate::afxdp::{BATCH, Endpoint as Queue, Port, PortConfig, PortError, Received, SocketStatistics};
use crate::bpf::{Attachment, Counts, Program, Programs, Services, before_xdp};
use crate::net::Network;
use crate::say::{caution, say, told};
use anyhow::{Result, anyhow, bail};
use replayer_common::addr::{Endpoint, Ip};
use replayer_common::counters::ResponsesVerdict;
use replayer_common::maps::MAX_QUEUES;
use replayer_common::packet::Protocol;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Frames of a socket, and of one from the fifth on: an interface with many queues spreads its load, and would take
/// much memory otherwise. The RX ring is half of it.
const FRAMES: (u32, u32) = (8192, 2048);

/// Headers fit easily: the program cuts what follows.
const FRAME_SIZE: u32 = 2048;

/// Batches taken from one queue before the others and the peers have their turn.
const BATCHES_PER_TURN: usize = 16;

/// The program and the sockets.
pub struct BlackHole {
    /// Sockets first: what arrives while they go is dropped by the program, and does not reach a real client.
    ports: Vec<Port>,
    received: Vec<Received>,
    programs: Programs,
    targets: Services,
    attachment: Attachment,
    /// Where the link is pinned, if it is.
    pin: Option<Pin>,
}

impl BlackHole {
    /// Attaches to an interface, and stays there when `keep` says so. Nothing is taken before [`BlackHole::add_target`] but what an
    /// assistant before took whose program has stayed: those are [`BlackHole::targets`] from the beginning. `local`: as
    /// [`BlackHole::set_local_addresses`] has it.
    ///
    /// # Errors
    /// With cause and remedy: no permission, the interface has another XDP program or none is possible, no socket, no file to stay by.
    pub fn open(
        interface: &str,
        zero_copy: bool,
        local: &BTreeSet<Ip>,
        pin: Pin,
        keep: bool,
    ) -> Result<BlackHole> {
        let mut programs = Programs::load()?;
        let ports = open_ports(interface, zero_copy)?;
        for port in &ports {
            if let (Some(queue), Some(socket)) = (port.rx_queue(), port.rx_fd()) {
                programs.set_socket(queue, socket)?;
            }
        }
        programs.set_local_addresses(local)?;
        let received = Vec::with_capacity(BATCH);
        if !keep {
            say_before_xdp(interface)?;
            let attachment =
                programs.attach_to_nic(Program::Responses, interface).map_err(|error| match pin.left() {
                    Ok(Some(left)) => anyhow!(
                        "{}: --keep-dropping takes it over, `rm {}` removes it",
                        left_by_another(&pin, &left),
                        pin.path().display()
                    ),
                    _ => error.into(),
                })?;
            return Ok(BlackHole {
                ports,
                received,
                programs,
                targets: Services::new(),
                attachment,
                pin: None,
            });
        }
        pin.prepare()?;
        let (targets, attachment) = match pin.left()? {
            Some(left) => {
                let said = left_by_another(&pin, &left);
                programs.set_services(&left.services)?;
                programs.replace_responses(left.link)?;
                say!("{said}: taken over");
                (left.services, left.attachment)
            }
            None => {
                say_before_xdp(interface)?;
                let attachment = programs.attach_to_nic(Program::Responses, interface)?;
                programs.pin(Program::Responses, pin.path())?;
                (Services::new(), attachment)
            }
        };
        Ok(BlackHole { ports, received, programs, targets, attachment, pin: Some(pin) })
    }

    /// Ends a black hole that would stay: it goes with this process.
    ///
    /// # Errors
    /// Its file cannot be removed.
    pub fn let_go(&mut self) -> Result<()> {
        self.pin.take().map_or(Ok(()), |pin| pin.remove())
    }

    /// The file by which it stays, if it does.
    pub fn file(&self) -> Option<&Path> {
        self.pin.as_ref().map(Pin::path)
    }

    /// Whose responses are taken.
    pub fn targets(&self) -> impl Iterator<Item = (Protocol, Endpoint)> + '_ {
        self.targets.iter().map(|&(protocol, ip, port)| (protocol, Endpoint { ip, port }))
    }

    /// Whether programs and sockets can be had. Attaches nothing: some drivers reset their link then.
    ///
    /// # Errors
    /// As those of [`BlackHole::open`], but for the attachment's.
    pub fn check(interface: &str, zero_copy: bool, pin: &Pin, keep: bool) -> Result<()> {
        Programs::load()?;
        open_ports(interface, zero_copy)?;
        if keep {
            pin.check()?;
        }
        match pin.left() {
            Ok(None) => {}
            Ok(Some(left)) => say!(
                "{}; --keep-dropping takes it over, `rm {}` removes it",
                left_by_another(pin, &left),
                pin.path().display()
            ),
            Err(error) if keep => return Err(error),
            Err(error) => caution!("{}", told(&error)),
        }
        Ok(())
    }

    /// One line: what was got.
    pub fn mode(&self) -> String {
        let port = self.ports.first().map_or("", |port| port.mode());
        let queues = self.ports.len();
        format!("{}, {queues} queue{}, {port}", self.attachment, if queues == 1 { "" } else { "s" })
    }

    /// The sockets to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ports.iter().filter_map(|port| port.rx_fd())
    }

    /// From here on the responses of `target` are taken.
    ///
    /// # Errors
    /// The map of services is full, or the kernel's.
    pub fn add_target(&mut self, protocol: Protocol, target: &Endpoint) -> Result<()> {
        self.targets.insert((protocol, target.ip, target.port));
        Ok(self.programs.set_services(&self.targets)?)
    }

    /// The responses of `target` go on to the kernel again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_target(&mut self, protocol: Protocol, target: &Endpoint) -> Result<()> {
        self.targets.remove(&(protocol, target.ip, target.port));
        Ok(self.programs.set_services(&self.targets)?)
    }

    /// Segments to these addresses are this host's own, even if a target sends them.
    ///
    /// # Errors
    /// The map of addresses is full, or the kernel's.
    pub fn set_local_addresses(&mut self, addresses: &BTreeSet<Ip>) -> Result<()> {
        Ok(self.programs.set_local_addresses(addresses)?)
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
            sum += port.statistics()?.rx;
        }
        Ok(sum)
    }

    /// What the program did with the interface's packets.
    ///
    /// # Errors
    /// The kernel's.
    pub fn verdicts(&self) -> Result<Counts<ResponsesVerdict>> {
        Ok(self.programs.counts()?)
    }
}

fn say_before_xdp(interface: &str) -> Result<()> {
    if let Some(notice) = before_xdp(&Network::open()?.device(interface)?) {
        say!("{notice}");
    }
    Ok(())
}

fn left_by_another(pin: &Pin, left: &Left) -> String {
    format!(
        "an assistant that is gone left its black hole at {}, which has dropped {} packets since then and drops those of {}",
        pin.path().display(),
        left.dropped,
        left.names()
    )
}

/// A socket for each queue: as many as the kernel lets be bound.
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
            Err(PortError::NoQueue { .. }) if queue > 0 => break,
            // More queues would not help, as with other ports: each is taken from, and there is room for one program.
            Err(PortError::Busy { .. }) => bail!(
                "another process takes packets from {interface} by AF_XDP, another assistant for example: one serves many online hosts; \
                 let them share it, or stop it"
            ),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ports)
}
