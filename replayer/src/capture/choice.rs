//! `--capture`: which back end, and for `auto` why that one.

use std::fmt;

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::mirror::MAX_MTU;
use crate::bpf;
use crate::net::{Device, NetError, Network};

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CaptureArg {
    /// By what the interface is for and what the kernel can do.
    #[default]
    Auto,
    /// Clones through a private veth pair.
    Mirror,
    /// Copies in BPF ring buffers.
    Ring,
    /// Packets taken at the NIC of a mirror port, which serves nobody.
    Span,
}

/// How requests are captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// [`super::mirror`].
    Mirror,
    /// [`super::ring`].
    Ring,
    /// [`super::span`].
    Span,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Mirror => "mirror",
            Backend::Ring => "ring",
            Backend::Span => "span",
        })
    }
}

/// What the decision rests on.
#[derive(Clone, Debug)]
pub struct Facts {
    /// What the interface does for this host, and how to end that; `None`: it serves nobody.
    pub serves: Option<String>,
    /// The largest packet that receive offload makes, bytes.
    pub offloaded: u32,
    /// Whether some service has no address.
    pub wildcard: bool,
    /// [`bpf::has_tcx`].
    pub tcx: bool,
}

impl Facts {
    /// Looks at the device. `wildcard`: some service is a port on any address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn find(network: &mut Network, device: &Device, wildcard: bool) -> Result<Facts, NetError> {
        Ok(Facts {
            serves: network.service_of(device)?,
            offloaded: device.gro_max_size,
            wildcard,
            tcx: bpf::has_tcx(&device.name),
        })
    }
}

/// Decides. The second is the reason, in one line.
///
/// # Errors
/// When what was asked for is not possible here, with the remedy.
pub fn choose(asked: CaptureArg, device: &Device, facts: &Facts) -> Result<(Backend, String)> {
    let name = &device.name;
    let as_asked = || "as asked for".to_owned();
    let chosen = match asked {
        CaptureArg::Mirror => (Backend::Mirror, as_asked()),
        CaptureArg::Ring => (Backend::Ring, as_asked()),
        CaptureArg::Span => {
            if let Some(serves) = &facts.serves {
                bail!(
                    "--capture span on {name}: {serves}; what span takes reaches no server of this host, so it is for a NIC that serves nobody and is \
                     fed by a switch's mirror port. Name that NIC with -i, or use --capture ring (or auto) here"
                );
            }
            (Backend::Span, as_asked())
        }
        CaptureArg::Auto => match &facts.serves {
            None if !facts.wildcard => {
                (Backend::Span, format!("{name} serves nobody, so its packets need no copies"))
            }
            None => (
                Backend::Ring,
                format!(
                    "{name} serves nobody, but a service without an address means this host; name the address for span"
                ),
            ),
            Some(_) if facts.offloaded > RING_OFFLOADED && device.mtu <= MAX_MTU => (
                Backend::Mirror,
                format!(
                    "receive offload of {name} makes packets of up to {} bytes, more than a ring's record holds",
                    facts.offloaded
                ),
            ),
            Some(_) => {
                (Backend::Ring, format!("{name} serves this host, and a copy into a ring delays that least"))
            }
        },
    };
    if chosen.0 != Backend::Span && !facts.tcx {
        bail!(
            "--capture {} on {name}: this kernel has no tcx. Run Linux 6.6 or later on this host; or capture on another one, at a NIC that \
             serves nobody and is fed by a switch's mirror port, with --capture span and services that name their addresses",
            chosen.0
        );
    }
    Ok(chosen)
}

/// What receive offload makes without "BIG TCP": packets whose length an IP header can say.
const RING_OFFLOADED: u32 = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_tcx_only_what_needs_none_is_chosen() {
        let device = Device { name: "eth0".to_owned(), mtu: 1500, ..Device::default() };
        let serving = Facts {
            serves: Some("it has an address".to_owned()),
            offloaded: 65_536,
            wildcard: false,
            tcx: true,
        };
        let old = Facts { tcx: false, ..serving.clone() };
        for (asked, backend) in [
            (CaptureArg::Auto, Backend::Ring),
            (CaptureArg::Ring, Backend::Ring),
            (CaptureArg::Mirror, Backend::Mirror),
        ] {
            assert_eq!(choose(asked, &device, &serving).unwrap().0, backend);
            let error = choose(asked, &device, &old).unwrap_err().to_string();
            let begin = format!(
                "--capture {backend} on eth0: this kernel has no tcx. Run Linux 6.6 or later on this host; or "
            );
            assert!(error.starts_with(&begin) && error.contains("--capture span"), "{error}");
        }
        let mirror_port = Facts { serves: None, ..old };
        for asked in [CaptureArg::Auto, CaptureArg::Span] {
            assert_eq!(choose(asked, &device, &mirror_port).unwrap().0, Backend::Span);
        }
        let error = choose(CaptureArg::Auto, &device, &Facts { wildcard: true, ..mirror_port }).unwrap_err();
        assert!(error.to_string().contains("services that name their addresses"), "{error}");
    }
}
