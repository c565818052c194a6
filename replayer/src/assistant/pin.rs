//! The black hole that stays (`--keep-dropping`): the link of `responses` is pinned to a file, so that the program outlives this process.
//!
//! What it goes on dropping then is what it took before: packets from the targets' addresses and ports of that moment to anybody but this host.
//! That ends with the next start, which puts its own program in its place, or with the file. A clean stop removes the file.
//!
//! What may not happen here: the program of another interface is replaced. Numbers of interfaces are those of a network namespace and files are
//! seen from several, so the interface has to have the very program that the file's link has.

use crate::bpf::{self, Attachment, Services};
use crate::net::{Device, Network};
use anyhow::{Context, Result, anyhow, bail};
use aya::programs::links::{FdLink, LinkType, PinnedLink};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use replayer_common::addr::Endpoint;
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Where the kernel wants its BPF file system mounted, and what is in it the replayer's.
const DIRECTORY: &str = "/sys/fs/bpf/replayer";

/// The place of the file, which need not be there.
#[derive(Clone, Debug)]
pub struct Pin {
    path: PathBuf,
    interface: String,
}

/// What an assistant left behind.
pub struct Left {
    /// It has the program attached.
    pub link: FdLink,
    /// How it is attached.
    pub attachment: Attachment,
    /// Whose responses it drops.
    pub services: Services,
    /// How many it has dropped, for there was no socket.
    pub dropped: u64,
}

impl Pin {
    /// The file for an interface: the one asked for, or the usual one.
    pub fn new(asked: Option<&Path>, interface: &str) -> Pin {
        let usual = || Path::new(DIRECTORY).join(format!("assistant-{interface}"));
        Pin { path: asked.map_or_else(usual, Path::to_owned), interface: interface.to_owned() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file can be made.
    ///
    /// # Errors
    /// No BPF file system is mounted there; with the remedy.
    pub fn check(&self) -> Result<()> {
        let there = self.path.ancestors().skip(1).find(|ancestor| ancestor.exists());
        let file_system = there.map(statfs).transpose().with_context(|| self.path.display().to_string())?;
        if file_system.is_none_or(|found| found.filesystem_type() != BPF_FS_MAGIC) {
            bail!(
                "--keep-dropping: {} would not be on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`",
                self.path.display()
            );
        }
        Ok(())
    }

    /// Makes the directory of the file.
    ///
    /// # Errors
    /// As [`Pin::check`], or no permission.
    pub fn prepare(&self) -> Result<()> {
        self.check()?;
        let directory = self.path.parent().unwrap_or(&self.path);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.with_context(|| format!("--keep-dropping: cannot make {}", directory.display()))
    }

    /// What an assistant left on this interface; `None`: there is no file.
    ///
    /// # Errors
    /// The file is something else, or its program is not on this interface; with the remedy.
    pub fn left(&self) -> Result<Option<Left>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let stranger = |what: &str| {
            let path = self.path.display();
            anyhow!(
                "{path} is {what}: remove it with `rm {path}`, or name another file with --keep-dropping=FILE"
            )
        };
        let link = PinnedLink::from_pin(&self.path).map(FdLink::from);
        let link = link.map_err(|error| stranger("no link of a BPF program").context(error))?;
        let info = link.info()?;
        if info.link_type()? != LinkType::Xdp {
            return Err(stranger("no link of an XDP program"));
        }
        let device = Network::open()?.device(&self.interface)?;
        let Some(attachment) = attachment(&device, info.program_id()) else {
            return Err(stranger(&format!("not of {}, or of one that is gone", self.interface)));
        };
        let (services, dropped) = bpf::responses_of(info.program_id())?;
        Ok(Some(Left { link, attachment, services, dropped }))
    }

    /// Removes the file, and its directory where it is empty.
    ///
    /// # Errors
    /// The file stays, and with it the program.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                let path = self.path.display();
                Err(error).with_context(|| {
                    format!("{path} cannot be removed, and the target's responses go on being dropped: `rm {path}` as root ends that")
                })
            }
            _ => {
                if let Some(directory) = self.path.parent().filter(|parent| *parent == Path::new(DIRECTORY)) {
                    // Another assistant may have a file there.
                    let _ = fs::remove_dir(directory);
                }
                Ok(())
            }
        }
    }
}

impl Left {
    /// Whose responses are dropped, for people.
    pub fn names(&self) -> String {
        let name = |(protocol, ip, port): &_| {
            format!("{} ({})", Endpoint { ip: *ip, port: *port }, super::name(*protocol))
        };
        let names: Vec<String> = self.services.iter().take(5).map(name).collect();
        match self.services.len() {
            0 => "nobody".to_owned(),
            count if count > names.len() => format!("{} and {} more", names.join(", "), count - names.len()),
            _ => names.join(", "),
        }
    }
}

/// How a program is attached to a device, if it is.
fn attachment(device: &Device, program: u32) -> Option<Attachment> {
    if device.xdp_native == Some(program) {
        Some(Attachment::Native)
    } else {
        (device.xdp_generic == Some(program)).then_some(Attachment::Generic)
    }
}
