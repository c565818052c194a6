//! The TCP connections that a server has at this moment, from the kernel's socket diagnostics.
//!
//! A replayer that starts while keep-alive connections run sees their next packets without having seen what
//! was before. Whether the next data begins a request or is the middle of one cannot be told from the
//! packets; the server's sockets know.
//!
//! What may not happen here: nothing about a socket is changed.

use std::collections::HashMap;
use std::io;

use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use replayer_common::addr::{self, Endpoint};

use crate::net::netlink::Netlink;

/// What is known of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The client's end.
    pub client: Endpoint,
    /// The server's end.
    pub server: Endpoint,
    /// Whether the next data from the client begins a request: the server has read everything, and has sent
    /// something since data last arrived, or none ever did.
    ///
    /// The kernel keeps the times in ticks (4 ms at 250 Hz): a request that arrived in the tick of the answer
    /// before it, and was read, passes for answered.
    pub between_turns: bool,
    /// Bytes of data that ever arrived.
    pub received: u64,
}

/// The established connections to `ports` in the calling thread's network namespace, both families; those
/// over IPv4 of an IPv6 socket count as IPv4.
///
/// # Errors
/// Those of the netlink socket; a kernel without `INET_DIAG` answers `ENOENT`.
pub fn established(ports: &[u16]) -> io::Result<Vec<Connection>> {
    let mut netlink = Netlink::open::<SockDiagMessage>()?;
    // A dump is not a snapshot: a socket may show up twice, and the later word counts.
    let mut connections = HashMap::new();
    for &port in ports {
        for (family, mut socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            socket_id.source_port = port;
            let request = InetRequest {
                family,
                protocol: IPPROTO_TCP,
                extensions: ExtensionFlags::INFO,
                states: StateFlags::ESTABLISHED,
                socket_id,
            };
            for message in netlink.dump(SockDiagMessage::InetRequest(request))? {
                if let SockDiagMessage::InetResponse(response) = message
                    // The kernel has filtered by port; older ones hand out more than they were asked for.
                    && response.header.socket_id.source_port == port
                {
                    let connection = Connection::from(&*response);
                    connections.insert((connection.client, connection.server), connection);
                }
            }
        }
    }
    Ok(connections.into_values().collect())
}

impl From<&InetResponse> for Connection {
    fn from(response: &InetResponse) -> Connection {
        let id = &response.header.socket_id;
        let info = response.nlas.iter().find_map(|nla| match nla {
            Nla::TcpInfo(bytes) => TcpInfo::parse(bytes),
            _ => None,
        });
        Connection {
            client: Endpoint { ip: addr::from_std(id.destination_address), port: id.destination_port },
            server: Endpoint { ip: addr::from_std(id.source_address), port: id.source_port },
            // Without information nothing is joined in its middle.
            between_turns: response.header.recv_queue == 0 && info.is_some_and(|info| info.answered()),
            received: info.map_or(0, |info| info.bytes_received),
        }
    }
}

/// The part of the kernel's `struct tcp_info` (include/uapi/linux/tcp.h) that is of interest.
#[derive(Clone, Copy, Debug)]
struct TcpInfo {
    /// Milliseconds since data was last sent.
    last_data_sent: u32,
    /// Milliseconds since data last arrived.
    last_data_recv: u32,
    /// Bytes of data that ever arrived.
    bytes_received: u64,
    /// Data segments that were ever sent.
    data_segs_out: u32,
}

impl TcpInfo {
    /// `None`: too short, from a kernel before 4.6.
    fn parse(bytes: &[u8]) -> Option<TcpInfo> {
        Some(TcpInfo {
            last_data_sent: u32::from_ne_bytes(*bytes.get(44..)?.first_chunk()?),
            last_data_recv: u32::from_ne_bytes(*bytes.get(52..)?.first_chunk()?),
            bytes_received: u64::from_ne_bytes(*bytes.get(128..)?.first_chunk()?),
            data_segs_out: u32::from_ne_bytes(*bytes.get(156..)?.first_chunk()?),
        })
    }

    fn answered(self) -> bool {
        // Both times start at the connection's own beginning: whether data was ever sent has to be asked
        // apart.
        self.bytes_received == 0 || self.data_segs_out > 0 && self.last_data_sent <= self.last_data_recv
    }
}
