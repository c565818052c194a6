//! Keeps what the workers have to know about the network current.
//!
//! A thread listens to the kernel's announcements (links, addresses, routes, rules, neighbours), asks again
//! when there is one, and publishes a [`Snapshot`] when the answer has changed. A worker looks at a
//! generation number, one relaxed load, and takes the lock only when the number has changed.

use std::collections::BTreeSet;
use std::io::{self, PipeReader, PipeWriter};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::{Link, NetError, Network, VlanTag};
use crate::privileges::{self, Keep};

/// Multicast groups (include/uapi/linux/rtnetlink.h, `enum rtnetlink_groups`): links, neighbours, addresses,
/// routes and rules of both families. A group's bit is its number minus one.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// Between two rounds of questions, so that a host whose routes change all the time does not keep a core
/// busy.
const PAUSE: Duration = Duration::from_millis(50);

/// Between two rounds when there is no announcement: keeps neighbours from going stale unnoticed, see
/// [`super::neighbour`]. Below the time after which the kernel doubts an entry (`base_reachable_time`, 30 s).
const REFRESH: Duration = Duration::from_secs(10);

/// The same while a target is out of reach.
const RETRY: Duration = Duration::from_millis(500);

/// What the network looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The way to each target, in the order given to [`Monitor::start`], or why there is none.
    pub links: Vec<Result<Link, String>>,
    /// The addresses of this host.
    pub addresses: BTreeSet<IpAddr>,
}

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub struct Monitor {
    published: Arc<Published>,
    thread: Option<JoinHandle<()>>,
    /// Closing it tells the thread to end.
    stop: Option<PipeWriter>,
}

/// A reader's place. Cheap to ask, and never in the way of the thread.
#[derive(Clone, Debug)]
pub struct Watch {
    published: Arc<Published>,
    seen: u64,
}

#[derive(Debug, Default)]
struct Published {
    /// Counts the snapshots.
    generation: AtomicU64,
    snapshot: Mutex<Arc<Snapshot>>,
}

impl Monitor {
    /// Starts the thread in the calling thread's network namespace. Packets leave through `output`, if it is given, with `tags` in front of
    /// those of VLAN devices. The first snapshot is there when this
    /// returns; targets whose next hop has to be asked for follow.
    ///
    /// # Errors
    /// When netlink sockets or threads cannot be had. A target that cannot be reached is none: its place in
    /// the snapshot says so.
    pub fn start(
        targets: Vec<IpAddr>,
        output: Option<String>,
        tags: Vec<VlanTag>,
    ) -> Result<Monitor, NetError> {
        let announcements = listen().map_err(io::Error::from)?;
        let (stopped, stop) = io::pipe()?;
        let mut questions = Questions { network: Network::open()?, targets, output, tags };
        let published = Arc::new(Published::default());
        published.update(questions.ask()?);
        let listener = Listener { announcements, stopped, published: published.clone() };
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || {
            privileges::drop_all_but(Keep::Network);
            listener.run(questions);
        })?;
        Ok(Monitor { published, thread: Some(thread), stop: Some(stop) })
    }

    /// A reader that has seen nothing yet.
    pub fn watch(&self) -> Watch {
        Watch { published: self.published.clone(), seen: 0 }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has no way to panic that its owner could do anything about.
            let _ = thread.join();
        }
    }
}

impl Watch {
    /// The snapshot, if there is one that this reader has not seen.
    #[inline]
    pub fn changed(&mut self) -> Option<Arc<Snapshot>> {
        // The lock orders the snapshot itself.
        let generation = self.published.generation.load(Ordering::Relaxed);
        if generation == self.seen {
            return None;
        }
        let snapshot = self.published.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        self.seen = self.published.generation.load(Ordering::Relaxed);
        Some(snapshot.clone())
    }
}

impl Published {
    fn all_reachable(&self) -> bool {
        let current = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        current.links.iter().all(Result::is_ok)
    }

    fn update(&self, snapshot: Snapshot) {
        let mut current = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        if **current != snapshot || self.generation.load(Ordering::Relaxed) == 0 {
            *current = Arc::new(snapshot);
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn listen() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    let groups = GROUPS.iter().fold(0, |bits, group| bits | 1 << (group - 1));
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(fd)
}

struct Questions {
    network: Network,
    targets: Vec<IpAddr>,
    output: Option<String>,
    tags: Vec<VlanTag>,
}

impl Questions {
    fn ask(&mut self) -> Result<Snapshot, NetError> {
        let devices = self.network.devices()?;
        let links = self.targets.iter().map(|&target| {
            let link = self.network.resolve_among(&devices, target, self.output.as_deref(), Duration::ZERO);
            link.and_then(|link| link.tagged(&self.tags)).map_err(|error| error.to_string())
        });
        let links = links.collect();
        let addresses = devices.into_iter().flat_map(|device| device.addresses).collect();
        Ok(Snapshot { links, addresses })
    }
}

struct Listener {
    announcements: OwnedFd,
    stopped: PipeReader,
    published: Arc<Published>,
}

impl Listener {
    fn run(self, mut questions: Questions) {
        while self.wait(if self.published.all_reachable() { REFRESH } else { RETRY }) {
            match questions.ask() {
                Ok(snapshot) => self.published.update(snapshot),
                // The last snapshot stays, and the next round may do better.
                Err(error) => log::warn!("{error}"),
            }
        }
    }

    /// Waits for an announcement, at most for `patience`; `false` when it is time to end.
    fn wait(&self, patience: Duration) -> bool {
        let mut fds = [
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.announcements.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut fds, timeout(patience)) {
                Ok(0) => return true,
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    log::error!("the network is not watched any more: poll: {error}");
                    return false;
                }
            }
        }
        // The other end was closed.
        if fds[0].any() != Some(false) {
            return false;
        }
        // Announcements come in groups, and more of them while the pause lasts say nothing that the questions
        // after it would not find out.
        let stopped = poll(&mut fds[..1], timeout(PAUSE)).is_ok_and(|ready| ready > 0);
        let mut buffer = [0; 16384];
        // What an announcement says does not matter, nor that some were lost (ENOBUFS).
        let mut more = || recv(self.announcements.as_raw_fd(), &mut buffer, MsgFlags::empty());
        while matches!(more(), Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR)) {}
        !stopped
    }
}

fn timeout(duration: Duration) -> PollTimeout {
    PollTimeout::try_from(duration).unwrap_or(PollTimeout::MAX)
}
