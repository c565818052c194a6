//! tcpdump on a host of a lab: what it captures is a file to be replayed, or tells what passed a cable, and when.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use pcap_parser::{PcapBlockOwned, PcapError, create_reader};
use replayer_common::packet::{TcpSegment, parse_tcp_frame};

use crate::lab::{Host, Lab, NIC};
use crate::process::Process;
use crate::servers::start;

/// How long tcpdump may take to begin, and to end.
const LIMIT: Duration = Duration::from_secs(10);

/// tcpdump has a block handed over after a second, full or not.
const BLOCK: Duration = Duration::from_millis(1200);

/// A TCP segment that passed a cable.
#[derive(Debug, Clone, Copy)]
pub struct Passed {
    /// When, ns since the epoch.
    pub at_ns: u64,
    /// Its headers.
    pub segment: TcpSegment,
}

/// The TCP segments in a file of [`Capture::on_cable`], in their order.
pub fn passed(file: &Path) -> Result<Vec<Passed>> {
    let mut reader = create_reader(1 << 20, File::open(file)?)
        .map_err(|error| anyhow!("{}: {error:?}", file.display()))?;
    let mut all = Vec::new();
    loop {
        match reader.next() {
            Ok((used, block)) => {
                if let PcapBlockOwned::Legacy(record) = block
                    && let Ok(segment) = parse_tcp_frame(record.data)
                {
                    let at_ns = u64::from(record.ts_sec) * 1_000_000_000 + u64::from(record.ts_usec);
                    all.push(Passed { at_ns, segment });
                }
                reader.consume(used);
            }
            Err(PcapError::Eof) => return Ok(all),
            Err(PcapError::Incomplete(_)) => reader.refill().map_err(|error| anyhow!("{error:?}"))?,
            Err(error) => bail!("{}: {error:?}", file.display()),
        }
    }
}

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    /// How long a packet may wait in a block that is not full.
    block: Duration,
}

impl Capture {
    /// Captures what passes the host's NIC and `filter` (pcap-filter(7)), whole packets, to a file in the lab's directory.
    pub fn start(lab: &Lab, host: &Host, filter: &str) -> Result<Self> {
        Self::start_to(lab, host, filter, &lab.dir().join(format!("{}.pcap", host.name())))
    }

    /// The same, to a file of a certain name.
    pub fn start_to(lab: &Lab, host: &Host, filter: &str, file: &Path) -> Result<Self> {
        let mut command = host.command("tcpdump");
        command.args(["-i", NIC, "-s", "0", "--immediate-mode"]);
        Self::run(lab, host, command, filter, file)
    }

    /// Captures what passes the switch's end of the host's cable, both ways, with nanoseconds: there a packet has left the host, by
    /// whatever way. Only the first 256 bytes of each, in blocks, so that it costs little.
    pub fn on_cable(lab: &Lab, host: &Host, filter: &str) -> Result<Self> {
        Self::on_cable_by(lab, host, filter, lab.switch().command("tcpdump"))
    }

    /// The same by a tcpdump that runs only on a core which nobody else wants (SCHED_IDLE), for measurements: what has gathered in a second
    /// it writes in one go, and everything else that is to run on that core would wait up to 3 ms for it.
    pub fn on_cable_at_leisure(lab: &Lab, host: &Host, filter: &str) -> Result<Self> {
        let mut command = lab.switch().command("chrt");
        command.args(["--idle", "0", "tcpdump"]);
        Self::on_cable_by(lab, host, filter, command)
    }

    fn on_cable_by(lab: &Lab, host: &Host, filter: &str, mut command: Command) -> Result<Self> {
        command.args(["-i", host.name(), "-s", "256", "--time-stamp-precision=nano"]);
        Self::run(lab, host, command, filter, &lab.dir().join(format!("cable-{}.pcap", host.name())))
    }

    fn run(lab: &Lab, host: &Host, mut command: Command, filter: &str, file: &Path) -> Result<Self> {
        command.args(["-B", "65536", "-Z", "root", "-w"]).arg(file).arg(filter);
        let is_immediate = command.get_args().any(|argument| argument == "--immediate-mode");
        let block = if is_immediate { Duration::ZERO } else { BLOCK };
        let mut process = start(lab, host, "tcpdump", &mut command)?;
        process.wait_for_message("listening on", LIMIT)?;
        Ok(Self { process, file: file.to_owned(), block })
    }

    /// Ends it; its file, of which nothing may be missing.
    pub fn stop(mut self) -> Result<PathBuf> {
        // What is in a block at the end is lost.
        std::thread::sleep(self.block);
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(LIMIT)?;
        let text = self.process.errors();
        ensure!(text.contains("\n0 packets dropped by kernel"), "tcpdump lost packets:\n{text}");
        Ok(self.file)
    }
}
