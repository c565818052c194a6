//! The mirror: a private veth pair through which clones of packets reach the AF_XDP sockets.
//!
//! ```text
//!   network namespace of the host         │  private namespace, kept by one descriptor of this process
//!                                         │
//!   capture device ─ tcx: clone ─► near ══╪══► far ─ XDP (native): redirect ─► AF_XDP sockets, one a queue
//! ```
//!
//! Why the far end is away from the host: nothing there can see it, assign it an address or answer on it, and
//! it goes away with this process. When the descriptor closes, SIGKILL included, the kernel destroys the
//! namespace, with it the far end, and with that the near end.
//!
//! Why the near end has a queue: the ring inside of a veth has 256 places, and what receive offload has put together is cut into up to 45
//! packets at once; a burst of uploads overflows the ring before the far end gets to run. With a queueing discipline
//! veth stops the queue instead of dropping (Linux 6.16), and what does not fit into that is refused to the program, which counts it.
//! Measured: 84 336 packets in half a second, 123 dropped without, none with it.
//!
//! What may not happen here: nothing is ever sent from the far end to the near end, and neither end has an
//! address.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use thiserror::Error;

use crate::net::netlink::Netlink;
use crate::netns::Namespace;

/// The far end's name, in the private namespace.
const FAR: &str = "far";

/// The largest MTU that native XDP on veth takes without multi-buffer programs, on machines with 4 KiB pages:
/// a packet, 256 bytes of headroom and the kernel's `skb_shared_info` have to fit into a page
/// (drivers/net/veth.c, `veth_xdp_set`). Also below the data area of a 4096-byte frame.
pub const MAX_MTU: u32 = 3498;

/// Bytes that the near end's queues hold together: half a second at 1 Gbit/s, and a bound on what clones can pin of the host's memory.
const QUEUE_BYTES: u32 = 64 << 20;

/// Attribute `TCA_OPTIONS` (include/uapi/linux/rtnetlink.h): of a fifo the bare `struct tc_fifo_qopt`, a limit in bytes.
const TCA_OPTIONS: u16 = 2;

/// Names tried before giving up.
const NAME_ATTEMPTS: u32 = 100;

/// The veth pair and the private namespace. Dropping it removes them.
#[derive(Debug)]
pub struct Mirror {
    near: String,
    near_index: u32,
    queues: u32,
    namespace: Arc<Namespace>,
    /// A socket of the near end's namespace, wherever this value is dropped.
    netlink: Netlink,
}

/// Why the mirror could not be made.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// Packets may be larger than what the mirror can carry.
    #[error(
        "the capture interface has an MTU of {mtu}, the mirror carries at most {MAX_MTU}: \
         set its MTU to {MAX_MTU} or less (`ip link set dev … mtu {MAX_MTU}`)"
    )]
    Mtu {
        /// The MTU asked for.
        mtu: u32,
    },
    /// The kernel refused a step.
    #[error("{step}: {source}{}", hint(.source))]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; CAP_NET_ADMIN and CAP_SYS_ADMIN are needed, run as root",
        Some(libc::EOPNOTSUPP) => "; this kernel has no veth devices (CONFIG_VETH)",
        _ => "",
    }
}

impl Mirror {
    /// Makes a pair with `queues` queues in each direction, up, the near end in the namespace of the calling
    /// thread.
    ///
    /// # Errors
    /// See [`MirrorError`]. Nothing is left behind.
    pub fn create(mtu: u32, queues: u32) -> Result<Mirror, MirrorError> {
        if mtu > MAX_MTU {
            return Err(MirrorError::Mtu { mtu });
        }
        let fail = |step| move |source| MirrorError::Kernel { step, source };
        let namespace = Namespace::anonymous().map_err(fail("create a private network namespace"))?;
        let mut netlink = Netlink::open::<RouteNetlinkMessage>().map_err(fail("open a netlink socket"))?;
        let near = create_pair(&mut netlink, &namespace, mtu, queues)
            .map_err(fail("create the mirror's veth pair"))?;
        // From here on dropping the namespace removes the pair.
        silence_ipv6(&mut netlink, &near).map_err(fail("switch IPv6 off on the mirror"))?;
        let near_index = set_up(&mut netlink, &near).map_err(fail("bring the mirror's near end up"))?;
        add_queues(&mut netlink, near_index, queues)
            .map_err(fail("give the mirror's near end its queueing disciplines"))?;
        namespace
            .run(|| {
                let mut netlink = Netlink::open::<RouteNetlinkMessage>()?;
                silence_ipv6(&mut netlink, FAR)?;
                set_up(&mut netlink, FAR)
            })
            .and_then(|result| result)
            .map_err(fail("bring the mirror's far end up"))?;
        Ok(Mirror { near, near_index, queues, namespace: Arc::new(namespace), netlink })
    }

    /// The near end's name, in the host's namespace.
    pub fn near(&self) -> &str {
        &self.near
    }

    /// The near end's interface index: where packets are cloned to.
    pub fn near_index(&self) -> u32 {
        self.near_index
    }

    /// Packets that the near end dropped. Those that its queue refused are not among them: the program counts them.
    ///
    /// # Errors
    /// Those of the netlink socket.
    pub fn dropped(&mut self) -> io::Result<u64> {
        let mut message = LinkMessage::default();
        message.header.index = self.near_index;
        let answers = self.netlink.request(RouteNetlinkMessage::GetLink(message), 0)?;
        let mut attributes = answers.into_iter().flat_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => link.attributes,
            _ => Vec::new(),
        });
        let dropped = attributes.find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats.tx_dropped),
            _ => None,
        });
        dropped.ok_or_else(|| io::Error::other("the kernel does not tell"))
    }

    /// The far end's name, in [`Mirror::namespace`].
    pub fn far(&self) -> &str {
        FAR
    }

    /// Queues of the far end.
    pub fn queues(&self) -> u32 {
        self.queues
    }

    /// The private namespace: sockets are bound and XDP is attached to the far end from within.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // Others may still hold the namespace, and the kernel destroys namespaces at its leisure: this
        // removes both ends now.
        let mut message = LinkMessage::default();
        message.header.index = self.near_index;
        let _ = self.netlink.request(RouteNetlinkMessage::DelLink(message), 0);
    }
}

/// Makes the pair, both ends down; returns the near end's name.
fn create_pair(netlink: &mut Netlink, namespace: &Namespace, mtu: u32, queues: u32) -> io::Result<String> {
    let process = std::process::id();
    for attempt in 0..NAME_ATTEMPTS {
        // Unique among the processes of this PID namespace by the process id; others, and other mirrors of
        // this process, make the kernel answer EEXIST. At most 12 of the 15 bytes of an interface name.
        let near =
            format!("rpl{process:x}{}", if attempt == 0 { String::new() } else { format!("-{attempt}") });
        let end = |name: &str| {
            let mut message = LinkMessage::default();
            message.attributes = vec![
                LinkAttribute::IfName(name.to_owned()),
                LinkAttribute::Mtu(mtu),
                // Native XDP wants at least as many receive queues as the peer has transmit queues.
                LinkAttribute::NumTxQueues(queues),
                LinkAttribute::NumRxQueues(queues),
            ];
            message
        };
        let mut peer = end(FAR);
        peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd()));
        let mut message = end(&near);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        match netlink.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => return Ok(near),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EEXIST))
}

/// A queue in front of each of the near end's queues, in bytes (net/sched/sch_fifo.c, `bfifo`). Where there are several, `mq` is above
/// them, so that CPUs which clone into different queues share no lock.
fn add_queues(netlink: &mut Netlink, index: u32, queues: u32) -> io::Result<()> {
    let limit = QUEUE_BYTES / queues.max(1);
    let options = TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, limit.to_ne_bytes().to_vec()));
    let fifo = vec![TcAttribute::Kind("bfifo".to_owned()), options];
    if queues <= 1 {
        return add_discipline(netlink, index, TcHandle::ROOT, TcHandle::UNSPEC, fifo);
    }
    let mq = TcHandle { major: 1, minor: 0 };
    add_discipline(netlink, index, TcHandle::ROOT, mq, vec![TcAttribute::Kind("mq".to_owned())])?;
    for minor in 1..=u16::try_from(queues).map_err(io::Error::other)? {
        let parent = TcHandle { minor, ..mq };
        add_discipline(netlink, index, parent, TcHandle::UNSPEC, fifo.clone())?;
    }
    Ok(())
}

fn add_discipline(
    netlink: &mut Netlink,
    index: u32,
    parent: TcHandle,
    handle: TcHandle,
    attributes: Vec<TcAttribute>,
) -> io::Result<()> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).map_err(io::Error::other)?;
    message.header.parent = parent;
    message.header.handle = handle;
    message.attributes = attributes;
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    netlink.request(RouteNetlinkMessage::NewQueueDiscipline(message), flags).map(drop)
}

/// No link-local address, so that the device never solicits, joins groups or announces anything.
fn silence_ipv6(netlink: &mut Netlink, name: &str) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )])]),
    ];
    match netlink.request(RouteNetlinkMessage::SetLink(message), 0) {
        Ok(_) => {}
        // A kernel without IPv6 has nothing to be switched off.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(()),
        Err(error) => return Err(error),
    }
    // Also keeps a router's announcements from having an effect. Where /proc/sys is read-only the line above
    // has to do.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    Ok(())
}

/// Up and without ARP; returns the interface index.
fn set_up(netlink: &mut Netlink, name: &str) -> io::Result<u32> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    message.header.flags = LinkFlags::Up | LinkFlags::Noarp;
    message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    netlink.request(RouteNetlinkMessage::SetLink(message), 0)?;
    nix::net::if_::if_nametoindex(name).map_err(io::Error::from)
}
