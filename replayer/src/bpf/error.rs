//! Why something about the programs did not work, with the remedy.

use std::io;

use aya::EbpfError;
use aya::maps::MapError;
use aya::pin::PinError;
use aya::programs::ProgramError;
use thiserror::Error;

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

pub(super) fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

pub(super) fn map_error(name: &'static str) -> impl Fn(MapError) -> ProgramsError {
    move |source| ProgramsError::Map { name, source: Box::new(source) }
}

pub(super) fn program_error(name: &'static str) -> impl Fn(ProgramError) -> ProgramsError {
    move |source| ProgramsError::Program { name, source: Box::new(source) }
}

/// The object lacks a map that [`replayer_common::maps`] promises.
pub(super) fn missing(name: &'static str) -> ProgramsError {
    map_error(name)(MapError::InvalidName { name: name.to_owned() })
}
