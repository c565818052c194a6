//! Packets of other link types as Ethernet frames: what follows knows only those. The addresses are zero; nobody looks at them.
//!
//! The link types' numbers and layouts: <https://www.tcpdump.org/linktypes.html>.

use std::borrow::Cow;

/// A link type's number, as in capture files (LINKTYPE_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkType(pub u32);

const NULL: u32 = 0;
const ETHERNET: u32 = 1;
const RAW: u32 = 101;
/// What libpcap calls DLT_RAW on BSD and elsewhere; some programs write it to files.
const RAW_OTHER: [u32; 2] = [12, 14];
const LOOP: u32 = 108;
const LINUX_SLL: u32 = 113;
const IPV4: u32 = 228;
const IPV6: u32 = 229;
const LINUX_SLL2: u32 = 276;

const ADDRESSES_LEN: usize = 12;

impl LinkType {
    /// Ethernet.
    pub const ETHERNET: LinkType = LinkType(ETHERNET);
    /// Packets that begin with their IP header.
    pub const RAW: LinkType = LinkType(RAW);

    /// Its name in messages and reports.
    pub fn name(self) -> Cow<'static, str> {
        match self.0 {
            NULL => "NULL".into(),
            ETHERNET => "Ethernet".into(),
            RAW => "RAW".into(),
            number if RAW_OTHER.contains(&number) => "RAW".into(),
            LOOP => "LOOP".into(),
            LINUX_SLL => "SLL".into(),
            IPV4 => "IPv4".into(),
            IPV6 => "IPv6".into(),
            LINUX_SLL2 => "SLL2".into(),
            9 => "PPP".into(),
            105 => "802.11".into(),
            127 => "802.11 radiotap".into(),
            number => format!("link type {number}").into(),
        }
    }

    /// Whether packets of it can be used.
    pub fn is_known(self) -> bool {
        matches!(self.0, NULL | ETHERNET | RAW | LOOP | LINUX_SLL | IPV4 | IPV6 | LINUX_SLL2)
            || RAW_OTHER.contains(&self.0)
    }

    /// The packet as an Ethernet frame, written to `scratch` unless it is one. `None`: the link type is not known, or the packet too short to
    /// tell what it holds.
    pub fn ethernet<'a>(self, packet: &'a [u8], scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let (ethertype, payload) = match self.0 {
            ETHERNET => return Some(packet),
            // Four bytes that tell the address family by the numbers of the system that wrote them; the IP version tells too.
            NULL | LOOP => ip(packet.get(4..)?)?,
            LINUX_SLL => ([*packet.get(14)?, *packet.get(15)?], packet.get(16..)?),
            LINUX_SLL2 => ([*packet.first()?, *packet.get(1)?], packet.get(20..)?),
            number if number == RAW || number == IPV4 || number == IPV6 || RAW_OTHER.contains(&number) => {
                ip(packet)?
            }
            _ => return None,
        };
        scratch.clear();
        scratch.extend_from_slice(&[0; ADDRESSES_LEN]);
        scratch.extend_from_slice(&ethertype);
        scratch.extend_from_slice(payload);
        Some(scratch)
    }
}

fn ip(packet: &[u8]) -> Option<([u8; 2], &[u8])> {
    match packet.first()? >> 4 {
        4 => Some(([0x08, 0x00], packet)),
        6 => Some(([0x86, 0xdd], packet)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::packet::parse_tcp;

    /// An IPv4 packet with a SYN.
    fn packet() -> Vec<u8> {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(1234, 80, 7, 100)
            .syn()
            .write(&mut bytes, &[])
            .unwrap();
        bytes
    }

    #[test]
    fn b060_every_link_type_becomes_ethernet() {
        let ip = packet();
        let sll = |protocol: [u8; 2]| [&[0, 0, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 0, 0][..], &protocol].concat();
        let sll2 = |protocol: [u8; 2]| [&protocol[..], &[0; 18]].concat();
        let tagged = [&[0, 5, 8, 0][..], &ip].concat();
        let cases: [(u32, Vec<u8>); 9] = [
            (0, [&[2, 0, 0, 0][..], &ip].concat()),
            (108, [&[0, 0, 0, 2][..], &ip].concat()),
            (101, ip.clone()),
            (12, ip.clone()),
            (228, ip.clone()),
            (113, [sll([8, 0]), ip.clone()].concat()),
            (113, [sll([0x81, 0]), tagged.clone()].concat()),
            (276, [sll2([8, 0]), ip.clone()].concat()),
            (276, [sll2([0x81, 0]), tagged].concat()),
        ];
        let mut scratch = Vec::new();
        for (number, bytes) in cases {
            let frame = LinkType(number).ethernet(&bytes, &mut scratch).unwrap();
            let segment = parse_tcp(&frame).unwrap_or_else(|reject| panic!("link type {number}: {reject:?}"));
            assert_eq!((segment.src_port, segment.dst_port, segment.seq), (1234, 80, 7));
            // Cut anywhere: no panic.
            for len in 0..bytes.len() {
                let _ = LinkType(number).ethernet(&bytes[..len], &mut scratch);
            }
        }
        assert_eq!(LinkType(105).ethernet(&ip, &mut scratch), None);
    }
}
