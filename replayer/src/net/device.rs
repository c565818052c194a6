//! Devices and addresses.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
};

use super::{Mac, NetError, Network};

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// The interface index.
    pub ifindex: u32,
    /// The name.
    pub name: String,
    /// Its address, if it is an Ethernet device (loopback is not).
    pub mac: Option<Mac>,
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Has a carrier: its cable or its peer is connected and up.
    pub carrier: bool,
    /// Does no ARP.
    pub noarp: bool,
    /// Transmit queues that the device was made with; it may use fewer.
    pub tx_queues: u32,
    /// Receive queues that the device was made with; it may use fewer.
    pub rx_queues: u32,
    /// `veth`, `vlan`, `bridge` and so on; `None` for hardware.
    pub kind: Option<String>,
    /// Of a VLAN device: the index of the device below it (`None`: that is in another namespace), and the
    /// tag.
    pub vlan: Option<(Option<u32>, VlanTag)>,
    /// The device below it, if it is made on top of one.
    pub lower: Option<u32>,
    /// The bridge, bond or the like that it is a port of.
    pub master: Option<u32>,
    /// The largest packet that receive offload puts together, bytes.
    pub gro_max_size: u32,
    /// The number of the XDP program in its driver.
    pub xdp_native: Option<u32>,
    /// That of the generic one.
    pub xdp_generic: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Device {
    /// The driver of hardware; `None`: it is none, or /sys is not to be seen.
    pub fn driver(&self) -> Option<String> {
        let driver = fs::read_link(format!("/sys/class/net/{}/device/driver", self.name)).ok()?;
        Some(driver.file_name()?.to_string_lossy().into_owned())
    }

    /// Receive queues that it uses.
    pub fn receive_queues_in_use(&self) -> u32 {
        self.queues_in_use("rx-").unwrap_or(self.rx_queues.max(1))
    }

    /// Transmit queues that it uses.
    pub fn transmit_queues_in_use(&self) -> u32 {
        self.queues_in_use("tx-").unwrap_or(self.tx_queues.max(1))
    }

    /// Counts the kernel's entries; `None`: /sys is not to be seen, or shows another namespace's devices.
    fn queues_in_use(&self, prefix: &str) -> Option<u32> {
        let entries = fs::read_dir(format!("/sys/class/net/{}/queues", self.name)).ok()?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let count = names.filter(|name| name.starts_with(prefix)).count() as u32;
        (count > 0).then_some(count)
    }
}

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanTag {
    /// The EtherType that announces it: 0x8100 (802.1Q) or 0x88a8 (802.1ad).
    pub protocol: u16,
    /// The VLAN's number, 12 bits.
    pub id: u16,
}

impl Network {
    /// All devices.
    ///
    /// # Errors
    /// The kernel's.
    pub fn devices(&mut self) -> Result<Vec<Device>, NetError> {
        let messages = self.netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let mut devices: Vec<Device> = messages.into_iter().filter_map(parse).collect();
        let mut addresses: HashMap<u32, Vec<IpAddr>> = HashMap::new();
        for (ifindex, address) in self.addresses()? {
            addresses.entry(ifindex).or_default().push(address);
        }
        for device in &mut devices {
            device.addresses = addresses.remove(&device.ifindex).unwrap_or_default();
        }
        Ok(devices)
    }

    /// The device of that name.
    ///
    /// # Errors
    /// [`NetError::NoInterface`] lists those that exist.
    pub fn device(&mut self, name: &str) -> Result<Device, NetError> {
        by_name(&self.devices()?, name).cloned()
    }

    /// The device with that index.
    ///
    /// # Errors
    /// [`NetError`], with the devices that there are, when there is none.
    pub fn device_by_index(&mut self, ifindex: u32) -> Result<Device, NetError> {
        by_index(&self.devices()?, ifindex).cloned()
    }

    /// What a device does for this host, in words, with what would end it; `None`: nothing. Link-local addresses, which every device has,
    /// serve nobody.
    ///
    /// # Errors
    /// The kernel's.
    pub fn service_of(&mut self, device: &Device) -> Result<Option<String>, NetError> {
        let name = &device.name;
        if let Some(address) = device.addresses.iter().find(|address| !is_link_local(address)) {
            return Ok(Some(format!(
                "it has the address {address} of this host (`ip addr del {address} dev {name}` would take it away)"
            )));
        }
        let devices = self.devices()?;
        if let Some(master) = device.master {
            let master = by_index(&devices, master)?;
            return Ok(Some(format!("it is a port of {} (`ip link set {name} nomaster`)", master.name)));
        }
        // The two ends of a veth pair name each other, and neither is on top.
        let on_top = |upper: &&Device| {
            upper.lower == Some(device.ifindex) && upper.up && upper.kind.as_deref() != Some("veth")
        };
        if let Some(upper) = devices.iter().find(on_top) {
            return Ok(Some(format!(
                "{} is made on top of it (`ip link set {} down`)",
                upper.name, upper.name
            )));
        }
        if self.routes_through(device.ifindex)? {
            return Ok(Some(format!("there are routes through it (`ip route flush dev {name}`)")));
        }
        Ok(None)
    }

    /// All addresses, each with the index of its device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpAddr)>, NetError> {
        let messages = self.netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        let parse = |message| {
            let RouteNetlinkMessage::NewAddress(message) = message else { return None };
            let mut address = None;
            for attribute in message.attributes {
                match attribute {
                    // On point-to-point devices `Address` is the peer's.
                    AddressAttribute::Local(local) => address = Some(local),
                    AddressAttribute::Address(any) if address.is_none() => address = Some(any),
                    _ => {}
                }
            }
            Some((message.header.index, address?))
        };
        Ok(messages.into_iter().filter_map(parse).collect())
    }
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

pub(super) fn by_name<'a>(devices: &'a [Device], name: &str) -> Result<&'a Device, NetError> {
    devices.iter().find(|device| device.name == name).ok_or_else(|| missing(devices, name.to_owned()))
}

pub(super) fn by_index(devices: &[Device], ifindex: u32) -> Result<&Device, NetError> {
    let found = devices.iter().find(|device| device.ifindex == ifindex);
    found.ok_or_else(|| missing(devices, format!("with index {ifindex}")))
}

fn missing(devices: &[Device], name: String) -> NetError {
    let existing = devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
    NetError::NoInterface { name, existing }
}

fn parse(message: RouteNetlinkMessage) -> Option<Device> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let flags = message.header.flags;
    let mut device = Device {
        ifindex: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        noarp: flags.contains(LinkFlags::Noarp),
        tx_queues: 1,
        rx_queues: 1,
        kind: None,
        vlan: None,
        lower: None,
        master: None,
        gro_max_size: 0,
        xdp_native: None,
        xdp_generic: None,
        addresses: Vec::new(),
    };
    let mut lower = None;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Mtu(mtu) => device.mtu = mtu,
            LinkAttribute::NumTxQueues(queues) => device.tx_queues = queues,
            LinkAttribute::NumRxQueues(queues) => device.rx_queues = queues,
            LinkAttribute::Address(mac) if message.header.link_layer_type == LinkLayerType::Ether => {
                device.mac = mac.try_into().ok();
            }
            LinkAttribute::Link(ifindex) => lower = Some(ifindex).filter(|&ifindex| ifindex != 0),
            // The lower device's index is one of that other namespace.
            LinkAttribute::LinkNetNsId(_) => lower = None,
            LinkAttribute::Controller(master) => device.master = Some(master).filter(|&master| master != 0),
            LinkAttribute::GroMaxSize(size) | LinkAttribute::GroIpv4MaxSize(size) => {
                device.gro_max_size = device.gro_max_size.max(size);
            }
            LinkAttribute::Xdp(attributes) => {
                for attribute in attributes {
                    match attribute {
                        LinkXdp::DrvProgId(program) => device.xdp_native = Some(program),
                        LinkXdp::SkbProgId(program) => device.xdp_generic = Some(program),
                        _ => {}
                    }
                }
            }
            LinkAttribute::LinkInfo(infos) => parse_info(infos, &mut device),
            _ => {}
        }
    }
    if let Some((known, _)) = &mut device.vlan {
        *known = lower;
    }
    device.lower = lower;
    Some(device)
}

fn parse_info(infos: Vec<LinkInfo>, device: &mut Device) {
    for info in infos {
        match info {
            LinkInfo::Kind(kind) => device.kind = Some(InfoKind::to_string(&kind)),
            LinkInfo::Data(InfoData::Vlan(infos)) => {
                let mut tag = VlanTag { protocol: 0x8100, id: 0 };
                for info in infos {
                    match info {
                        InfoVlan::Id(id) => tag.id = id,
                        InfoVlan::Protocol(protocol) => tag.protocol = protocol.into(),
                        _ => {}
                    }
                }
                device.vlan = Some((None, tag));
            }
            _ => {}
        }
    }
}
