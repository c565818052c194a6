//! The ways to capture, each started as a user would: what every one of them must do is tested with all.

use anyhow::{Context, Result};

use crate::lab::{Host, Lab, NIC, Plan};
use crate::replay::{Replay, Report, Role, service};
use crate::servers::{Driver, MIRROR_PORT_NIC, mirror_port};

/// A way to capture, and where: `span` at a host of its own, which a mirror port of the switch shows what goes to the online host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Clones through a private veth pair.
    Mirror,
    /// Copies in a BPF ring buffer.
    Ring,
    /// The packets of a mirror port.
    Span,
}

/// All of them.
pub const WAYS: [Way; 3] = [Way::Mirror, Way::Ring, Way::Span];

impl Way {
    /// As `--capture` has it.
    pub fn name(self) -> &'static str {
        match self {
            Way::Mirror => "mirror",
            Way::Ring => "ring",
            Way::Span => "span",
        }
    }

    /// A lab with so many queues where they are needed.
    pub fn lab(self, plan: Plan, queues: u8) -> Result<Lab> {
        let onlines = if self == Way::Span { 2 } else { 1 };
        let lab = Lab::up(Plan { onlines, online_queues: queues, ..plan })?;
        if self == Way::Span {
            mirror_port(&lab, lab.online(), self.host(&lab), queues, Driver::NativeXdp)?;
        }
        Ok(lab)
    }

    /// The host that captures.
    pub fn host(self, lab: &Lab) -> &Host {
        if self == Way::Span { lab.host("online2") } else { lab.online() }
    }

    /// The NIC that is captured on.
    pub fn nic(self) -> &'static str {
        if self == Way::Span { MIRROR_PORT_NIC } else { NIC }
    }

    /// A port of the online server, copied to the same of the target.
    pub fn service(self, lab: &Lab, port: u16) -> String {
        let service = service(port, lab.target().v4(), port);
        if self == Way::Span { format!("{}:{service}", lab.online().v4()) } else { service }
    }

    /// Starts an assistant and an online role that copies `ports`.
    pub fn start(self, lab: &Lab, ports: &[u16], arguments: &[&str]) -> Result<Replay> {
        let services: Vec<String> = ports.iter().map(|&port| self.service(lab, port)).collect();
        self.start_services(lab, &services, arguments)
    }

    /// The same with services as `-x` has them.
    pub fn start_services(self, lab: &Lab, services: &[String], arguments: &[&str]) -> Result<Replay> {
        let assistant = Role::assistant(lab, lab.assistant(), &[])?;
        let arguments = [&["--capture", self.name()], arguments].concat();
        let assistants = [lab.assistant().v4().into()];
        let online = Role::online_at(lab, self.host(lab), self.nic(), services, &assistants, &arguments)?;
        Ok(Replay { online, assistant })
    }

    /// The value of a verdict of the program on the capture interface.
    pub fn verdict(self, report: &Report, name: &str) -> Result<u64> {
        let value = &report.kernel[self.name()][name];
        value.as_u64().with_context(|| format!("no verdict {name} of {}: {:#}", self.name(), report.kernel))
    }
}
