//! The filter by which kernels without tcx (before 6.6) capture. No descriptor holds it, so it outlives a role that is killed: the next role
//! with the same device removes it. Whose filter is still somebody's is told by an abstract socket address (unix(7)), which goes with its
//! owner, whatever that dies of, and which everybody in the network namespace sees.

use std::io::{self, ErrorKind};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use crate::net::netlink::Netlink;

/// Programs that are attached so.
const NAMES: [&str; 2] = ["mirror", "ring"];

/// Says of a program's filters, while it exists, that they are not left over.
#[derive(Debug)]
pub(crate) struct Claim {
    _socket: UnixDatagram,
}

impl Claim {
    /// Claims the filters of the program with this id (`struct bpf_prog_info`).
    pub(crate) fn make(program: u32) -> io::Result<Claim> {
        let address = SocketAddr::from_abstract_name(format!("replayer/filter/{program}"))?;
        Ok(Claim { _socket: UnixDatagram::bind_addr(&address)? })
    }
}

/// Removes what a role that was killed has left on the ingress side of a device; how many filters.
pub(crate) fn remove_stale(device: u32) -> io::Result<usize> {
    let mut netlink = Netlink::open::<RouteNetlinkMessage>()?;
    let mut request = TcMessage::with_index(device as i32);
    request.header.parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
    let filters = netlink.dump(RouteNetlinkMessage::GetTrafficFilter(request.clone()))?;
    let mut removed = 0;
    for filter in filters {
        let RouteNetlinkMessage::NewTrafficFilter(filter) = filter else { continue };
        let Some(program) = program_of(&filter) else { continue };
        match Claim::make(program) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AddrInUse => continue,
            Err(error) => return Err(error),
        }
        let mut this = request.clone();
        (this.header.handle, this.header.info) = (filter.header.handle, filter.header.info);
        this.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
        match netlink.request(RouteNetlinkMessage::DelTrafficFilter(this), 0) {
            Ok(_) => removed += 1,
            // Another role has removed it meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// The program of a filter that a role has made.
fn program_of(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let is_ours = |option: &TcOption| matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(name)) if NAMES.contains(&name.as_str()));
    options.iter().any(is_ours).then_some(())?;
    options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    })
}
