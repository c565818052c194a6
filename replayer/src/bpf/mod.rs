//! The BPF programs: loaded, told by their maps what to do, attached, and their counters read.
//!
//! - `maps`: what they are told
//! - `attach`: attaching and detaching
//! - `counts`: what they counted
//! - `error`: why something did not work
//!
//! The compiled object is committed beside its source in `replayer-ebpf`; names, layouts and limits of the
//! maps are in [`replayer_common::maps`].
//!
//! Attachments are BPF links and nothing else: a link is a descriptor of this process, so that the kernel
//! removes the program when the process ends, SIGKILL included.
//!
//! What may not happen here: a program is attached before its maps say what to do; nothing else on the device
//! is replaced.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::PerCpuArray;
use aya::programs::ProgramError;
use aya::programs::links::FdLink;
use replayer_common::addr::Ip;

mod attach;
mod counts;
mod error;
mod maps;

pub use attach::{Attachment, before_xdp, has_tcx};
pub use counts::{Counts, Verdict};
pub use error::ProgramsError;
pub use maps::{Services, responses_of};

use error::{map_error, missing, program_error};

/// The object with all programs and maps.
static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../replayer-ebpf/replayer.bpf.o"));

/// One loaded copy of the object: its maps, and the programs that were attached. Dropping it detaches them.
pub struct Programs {
    // Fields drop in this order: a program is detached before its maps go.
    links: Vec<(Program, FdLink)>,
    ebpf: Ebpf,
    services: Services,
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

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").field("services", &self.services.len()).finish_non_exhaustive()
    }
}

impl Programs {
    /// Makes the maps. A program is loaded when it is attached, or before that by [`Programs::verify`].
    ///
    /// # Errors
    /// [`ProgramsError::Load`], for want of rights most often.
    pub fn load() -> Result<Programs, ProgramsError> {
        crate::afxdp::raise_memlock();
        let ebpf = Ebpf::load(OBJECT).map_err(|error| ProgramsError::Load(Box::new(error)))?;
        Ok(Programs { links: Vec::new(), ebpf, services: BTreeSet::new(), local: BTreeSet::new() })
    }

    /// What the program with these verdicts has counted.
    ///
    /// # Errors
    /// [`ProgramsError::Map`]: the kernel's.
    pub fn counts<V: Verdict>(&self) -> Result<Counts<V>, ProgramsError> {
        let map = self.ebpf.map(V::MAP).ok_or_else(|| missing(V::MAP))?;
        let map: PerCpuArray<_, u64> = map.try_into().map_err(map_error(V::MAP))?;
        let sums = map.iter().map(|of_cpus| Ok(of_cpus.map_err(map_error(V::MAP))?.iter().sum()));
        Ok(Counts::of(sums.collect::<Result<_, ProgramsError>>()?))
    }

    /// How long a program has run and how often, as far as the kernel kept statistics (`kernel.bpf_stats_enabled`). It must be loaded.
    ///
    /// # Errors
    /// [`ProgramsError::Program`]: the kernel's.
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
