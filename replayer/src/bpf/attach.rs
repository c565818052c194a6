//! Attaching programs to devices, as links and nothing else, and detaching them.

use std::fmt;
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, Xdp, XdpMode};

use super::error::{errno, program_error};
use super::{Program, Programs, ProgramsError};
use crate::capture::mirror::Mirror;
use crate::net::Device;

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
    /// Hands a program to the kernel, whose verifier may refuse it, and attaches it to nothing yet.
    ///
    /// # Errors
    /// [`ProgramsError::Program`], with what the verifier says.
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
    ///
    /// # Errors
    /// [`ProgramsError::Attach`], with the remedy.
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
    ///
    /// # Errors
    /// [`ProgramsError::Attach`], with the remedy; [`ProgramsError::Namespace`].
    pub fn attach_capture(&mut self, mirror: &Mirror) -> Result<Attachment, ProgramsError> {
        let program: &mut Xdp = program(&mut self.ebpf, Program::Capture.name())?;
        let link = mirror
            .namespace()
            .run(|| attach_xdp(program, Program::Capture.name(), mirror.far(), &[Attachment::Native]))
            .map_err(ProgramsError::Namespace)??;
        self.links.push((Program::Capture, link.0));
        Ok(link.1)
    }

    /// Attaches [`Program::Span`] or [`Program::Responses`] to `device`: in native mode where the driver can, else in generic mode. See
    /// [`before_xdp`].
    ///
    /// # Errors
    /// [`ProgramsError::Attach`], with the remedy.
    pub fn attach_to_nic(&mut self, which: Program, device: &str) -> Result<Attachment, ProgramsError> {
        let program: &mut Xdp = program(&mut self.ebpf, which.name())?;
        let modes = [Attachment::Native, Attachment::Generic];
        let (link, attachment) = attach_xdp(program, which.name(), device, &modes)?;
        self.links.push((which, link));
        Ok(attachment)
    }

    /// Puts [`Program::Responses`] in the place of the program that `link` has attached, without a moment between them.
    ///
    /// # Errors
    /// When `link` is none of XDP; the kernel's. The program before stays then.
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
    ///
    /// # Errors
    /// [`ProgramsError::Pin`], where there is such a file, or no BPF file system.
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

#[cfg(test)]
mod tests {
    use std::io;

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
}
