//! `--capture`: which back end, and for `auto` why that one.

use std::fmt;

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::mirror::MAX_MTU;
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
}

impl Facts {
    /// Looks at the device. `wildcard`: some service is a port on any address.
    pub fn find(network: &mut Network, device: &Device, wildcard: bool) -> Result<Facts, NetError> {
        Ok(Facts { serves: network.service_of(device)?, offloaded: device.gro_max_size, wildcard })
    }
}

/// Decides. The second is the reason, in one line.
///
/// # Errors
/// When what was asked for is not possible here, with the remedy.
pub fn choose(asked: CaptureArg, device: &Device, facts: &Facts) -> Result<(Backend, String)> {
    let name = &device.name;
    let as_asked = || "as asked for".to_owned();
    match asked {
        CaptureArg::Mirror => Ok((Backend::Mirror, as_asked())),
        CaptureArg::Ring => Ok((Backend::Ring, as_asked())),
        CaptureArg::Span => {
            if let Some(serves) = &facts.serves {
                bail!(
                    "--capture span on {name}: {serves}; what span takes reaches no server of this host, so it is for a NIC that serves nobody and is \
                     fed by a switch's mirror port. Name that NIC with -i, or use --capture ring (or auto) here"
                );
            }
            Ok((Backend::Span, as_asked()))
        }
        CaptureArg::Auto => Ok(match &facts.serves {
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
        }),
    }
}

/// What receive offload makes without "BIG TCP": packets whose length an IP header can say.
const RING_OFFLOADED: u32 = 65_536;
