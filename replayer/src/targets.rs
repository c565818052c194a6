//! The way to the targets, as a role finds it before it starts: the device that sends, and whether something listens there.

use crate::cli::{ReplayArgs, ServiceArg};
use crate::net::{Device, NetError, Network};
use crate::say::{caution, say};
use anyhow::{Context, Result, bail};
use replayer_common::addr::to_std;
use replayer_common::packet::Protocol;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

/// How long a next hop may take to tell its address at the start.
const NEXT_HOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long a target may take to accept a connection of a check.
const TARGET_PATIENCE: Duration = Duration::from_secs(2);

/// The device that sends. A target whose next hop does not answer may come up later; one without a route is a mistake.
///
/// # Errors
/// When a target has no route, or two are reached by different interfaces; what the kernel refused.
pub fn output_device(network: &mut Network, replay: &ReplayArgs, services: &[ServiceArg]) -> Result<Device> {
    let output = replay.output_interface.as_deref();
    let mut chosen: Option<Device> = None;
    for service in services {
        let target = to_std(&service.service.target.ip);
        let link = network.resolve(target, output, NEXT_HOP_PATIENCE);
        let device = match link.and_then(|link| link.tagged(replay.tags())) {
            Ok(link) => network.device_by_index(link.ifindex)?,
            Err(error @ NetError::Unresolved { .. }) => {
                caution!("{error}; going on, packets to it are counted as segments_no_link until then");
                let NetError::Unresolved { device, .. } = error else { continue };
                network.device(&device)?
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(other) = &chosen
            && other.ifindex != device.ifindex
        {
            bail!(
                "the targets are reached through different interfaces, {} and {}; start one replayer for each, or name one with -o",
                other.name,
                device.name
            );
        }
        chosen = Some(device);
    }
    chosen.context("-x names no service")
}

/// The end of a check that has found everything else: whether something listens where copies of TCP go.
///
/// # Errors
/// When a target refuses the connection: nothing listens there.
pub fn conclude_check(services: &[ServiceArg]) -> Result<()> {
    for service in services.iter().filter(|service| service.protocol == Protocol::Tcp) {
        let target = service.service.target.to_std();
        match TcpStream::connect_timeout(&target, TARGET_PATIENCE) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                bail!(
                    "nothing listens on {target}: start the server under test, or name another target with -x"
                )
            }
            Err(error) => caution!(
                "{target} does not answer this host itself ({error}): where it sends everything to an assistant, that is as it \
                 should be; else it is down, or a firewall is on the path"
            ),
        }
    }
    say!("everything is there; on the target, `ip route get CLIENT` has to lead to an assistant");
    Ok(())
}
