//! Requests to the kernel over netlink: send one, read all of its answers.
//!
//! What may not happen here: no interpretation of what the answers mean.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_sys::{Socket, SocketAddr, constants};

/// A kind of netlink message, and the protocol that it belongs to.
pub(crate) trait Protocol: NetlinkSerializable + NetlinkDeserializable {
    const PROTOCOL: isize;
}

impl Protocol for RouteNetlinkMessage {
    const PROTOCOL: isize = constants::NETLINK_ROUTE;
}

impl Protocol for SockDiagMessage {
    const PROTOCOL: isize = constants::NETLINK_SOCK_DIAG;
}

/// A netlink socket of the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open<T: Protocol>() -> io::Result<Netlink> {
        let mut socket = Socket::new(T::PROTOCOL)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// One request and its answers. `flags` are added to `NLM_F_REQUEST | NLM_F_ACK`.
    ///
    /// # Errors
    /// What the kernel answered, or those of the socket.
    pub(crate) fn request<T: Protocol>(&mut self, message: T, flags: u16) -> io::Result<Vec<T>> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags)
    }

    /// One request for a list.
    pub(crate) fn dump<T: Protocol>(&mut self, message: T) -> io::Result<Vec<T>> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_DUMP)
    }

    fn exchange<T: Protocol>(&mut self, message: T, flags: u16) -> io::Result<Vec<T>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages::<T>(&datagram) {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

/// The messages of a datagram. One that cannot be decoded (a newer kernel may say things that the decoder
/// does not know) is left out; those behind it are not.
pub(crate) fn messages<T: NetlinkDeserializable>(datagram: &[u8]) -> impl Iterator<Item = NetlinkMessage<T>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let message = rest.get(..length).filter(|message| message.len() >= NETLINK_HEADER)?;
        // RFC 3549 section 2.3.2: messages are aligned to four bytes.
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(NetlinkMessage::deserialize(message).ok())
    })
    .flatten()
}

const NETLINK_HEADER: usize = 16;
