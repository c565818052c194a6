//! The lab: hosts as network namespaces, each with one NIC `eth0`, all on one segment.
//!
//! ```text
//!   client      online      target      assistant        each a namespace with one NIC, eth0
//!  172.28.1.1  172.28.0.11 172.28.0.21 172.28.0.31       fd00:28:0:1::1, fd00:28::11, …
//!     └───────────┴───────────┴───────────┘
//!                   br0 in `switch`
//! ```
//!
//! Clients live in other subnets than the servers: every host reaches them directly, except the target, whose routes to the
//! clients and to the identity pool (172.29.0.0/16, fd00:29::/64) go through the assistant. That is the one change that
//! Replayer asks of a target.
//!
//! A lab belongs to the process that made it and is removed with it: on drop, on panic, on SIGINT, SIGTERM and SIGHUP, and
//! after SIGKILL by the next process that makes a lab. Several labs stand side by side; nothing in the machine's own network
//! namespace is made or changed, and nothing outside of a lab's namespaces is ever sent to.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::namespace::{Namespace, run};

/// Where labs keep their owner, plan, configuration files and logs.
const STATE_DIR: &str = "/run/replayer-lab";
/// What the name of every namespace of every lab begins with.
const NAMESPACE_PREFIX: &str = "rpl-";
/// The NIC of every host.
pub const NIC: &str = "eth0";
/// Addresses that the target can reach only through the assistant and that belong to no host: identities for `-c` and `-n`.
pub const POOL_V4: &str = "172.29.0.0/16";
/// The same for IPv6.
pub const POOL_V6: &str = "fd00:29::/64";
/// Queues that the NIC of an online host has at least; `ethtool -L` there uses more of them.
const SPARE_QUEUES: u8 = 2;
/// Owner of a lab that stays up until it is taken down by name.
const PERSISTENT: &str = "persistent";

/// What a lab consists of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Number of client hosts (`client`, `client2`, …), each in a subnet of its own.
    pub clients: u8,
    /// Source addresses of each client host, in both families.
    pub client_addresses: u8,
    /// Number of online hosts (`online`, `online2`, …).
    pub onlines: u8,
    /// Number of targets (`target`, `target2`, …).
    pub targets: u8,
    /// Number of assistants (`assistant`, `assistant2`, …); all return traffic is routed to the first.
    pub assistants: u8,
    /// MTU of the segment, in bytes.
    pub mtu: u16,
    /// Whether NICs aggregate, segment and checksum in "hardware" (GRO, GSO, TSO, checksum offload).
    pub offloads: bool,
    /// Whether the packets of online hosts are received by kernel threads of the switch instead of within the sender's system call, so that
    /// the CPU time of a process is its own: for measuring it. Like a NIC, their `eth0` then has a ring that can be full and a queueing discipline.
    #[serde(default)]
    pub receive_threads: bool,
    /// Transmit and receive queues in use of an online host's NIC.
    #[serde(default = "one")]
    pub online_queues: u8,
}

fn one() -> u8 {
    1
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            clients: 1,
            client_addresses: 1,
            onlines: 1,
            targets: 1,
            assistants: 1,
            mtu: 1500,
            offloads: true,
            receive_threads: false,
            online_queues: 1,
        }
    }
}

/// The part that a host plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Sends requests to the online host.
    Client,
    /// The production server.
    Online,
    /// The server under test.
    Target,
    /// Where the target's answers end.
    Assistant,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Client => "client",
            Role::Online => "online",
            Role::Target => "target",
            Role::Assistant => "assistant",
        }
    }
}

/// One host: a namespace with one NIC.
#[derive(Debug)]
pub struct Host {
    name: String,
    role: Role,
    /// 1 for the first of its role.
    number: u8,
    namespace: Namespace,
}

impl Host {
    /// `online`, `online2`, …
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The part that it plays.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its network namespace: commands, closures, routes and rules inside it.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A command that runs on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.namespace.command(program)
    }

    /// The MAC address of its NIC.
    pub fn mac(&self) -> String {
        mac(self.role, self.number)
    }

    /// Its (first) IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        v4(self.role, self.number, 0)
    }

    /// Its (first) IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        v6(self.role, self.number, 0)
    }

    /// The `index`-th IPv4 source address of a client, counted from 0.
    pub fn client_v4(&self, index: u8) -> Ipv4Addr {
        v4(self.role, self.number, index)
    }

    /// The `index`-th IPv6 source address of a client, counted from 0.
    pub fn client_v6(&self, index: u8) -> Ipv6Addr {
        v6(self.role, self.number, index)
    }
}

fn v4(role: Role, number: u8, index: u8) -> Ipv4Addr {
    match role {
        Role::Client => Ipv4Addr::new(172, 28, number, 1 + index),
        _ => Ipv4Addr::new(172, 28, 0, server_number(role, number)),
    }
}

fn v6(role: Role, number: u8, index: u8) -> Ipv6Addr {
    match role {
        Role::Client => Ipv6Addr::new(0xfd00, 0x28, 0, number.into(), 0, 0, 0, 1 + u16::from(index)),
        // The same digits as in the IPv4 address, read as hexadecimal.
        _ => {
            let digits = u16::from(server_number(role, number));
            Ipv6Addr::new(0xfd00, 0x28, 0, 0, 0, 0, 0, digits / 10 * 16 + digits % 10)
        }
    }
}

fn server_number(role: Role, number: u8) -> u8 {
    let base = match role {
        Role::Client | Role::Online => 10,
        Role::Target => 20,
        Role::Assistant => 30,
    };
    base + number
}

/// A locally administered MAC address that tells role and number.
fn mac(role: Role, number: u8) -> String {
    format!("02:28:00:00:{:02x}:{number:02x}", role as u8 + 1)
}

/// A standing lab.
#[derive(Debug)]
pub struct Lab {
    id: String,
    plan: Plan,
    hosts: Vec<Host>,
    switch: Namespace,
    /// Whether it is meant to outlive this process.
    persistent: bool,
    /// Whether it still goes with this process.
    owned: bool,
}

impl Lab {
    /// Builds a lab that belongs to this process, after removing those whose owners are dead.
    ///
    /// Needs root, `ip` and (for the offload switch) `ethtool`.
    pub fn up(plan: Plan) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("p{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self::build(&id, plan, false)
    }

    /// Builds a lab named `id` (letters and digits) that stays until [`remove`]`(id)`, once [`keep`](Self::keep) says that it is complete.
    pub fn up_persistent(id: &str, plan: Plan) -> Result<Self> {
        Self::build(id, plan, true)
    }

    /// Lets a persistent lab outlive this process: until then it goes with it, half built as it is.
    pub fn keep(&mut self) -> Result<()> {
        // Not while a signal takes it down: then this process ends here.
        let _building = building();
        fs::write(self.dir().join("owner"), PERSISTENT)?;
        self.owned = false;
        Ok(())
    }

    /// Opens a standing persistent lab; `None` when there is none of that name.
    pub fn open(id: &str) -> Result<Option<Self>> {
        let Ok(text) = fs::read_to_string(state_dir(id).join("plan.json")) else { return Ok(None) };
        let plan: Plan = serde_json::from_str(&text).context("plan of the lab")?;
        let switch = Namespace::open(&namespace_name(id, "switch"))?;
        let hosts = hosts_of(&plan)
            .map(|(role, number)| {
                let name = host_name(role, number);
                Ok(Host { namespace: Namespace::open(&namespace_name(id, &name))?, name, role, number })
            })
            .collect::<Result<_>>()?;
        Ok(Some(Self { id: id.to_owned(), plan, hosts, switch, persistent: true, owned: false }))
    }

    fn build(id: &str, plan: Plan, persistent: bool) -> Result<Self> {
        ensure!(!id.is_empty() && id.len() <= 20, "a lab's name has 1 to 20 characters, not {id:?}");
        ensure!(
            id.chars().all(|c| c.is_ascii_alphanumeric()),
            "a lab's name has letters and digits only, not {id:?}"
        );
        ensure!(plan.client_addresses >= 1 && plan.client_addresses <= 250, "1 to 250 addresses a client");
        if !nix::unistd::geteuid().is_root() {
            bail!("making network namespaces needs root: run this with sudo");
        }
        remove_on_signals();
        let _building = building();
        {
            let _lock = lock_state()?;
            remove_stale()?;
            let dir = state_dir(id);
            if dir.exists() {
                bail!("a lab named {id} is up already; `cargo xtask lab down` removes it");
            }
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            fs::write(dir.join("owner"), this_process())?;
        }
        match Self::wire(id, &plan) {
            Ok((hosts, switch)) => {
                fs::write(state_dir(id).join("plan.json"), serde_json::to_string(&plan)?)?;
                Ok(Self { id: id.to_owned(), plan, hosts, switch, persistent, owned: true })
            }
            Err(error) => {
                // What failed is the message; what is left of it goes away as far as it can.
                let _ = remove_parts(id);
                Err(error.context("building the lab"))
            }
        }
    }

    /// Makes the namespaces, the bridge, the cables, the addresses and the routes.
    fn wire(id: &str, plan: &Plan) -> Result<(Vec<Host>, Namespace)> {
        let switch = Namespace::create(&namespace_name(id, "switch"))?;
        switch.set_sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        // A switch has no firewall; where the kernel's bridge runs its own, that is a tenth of the CPU time that a packet costs.
        for family in ["arptables", "iptables", "ip6tables"] {
            let _ = switch.set_sysctl(&format!("bridge/bridge-nf-call-{family}"), "0");
        }
        let mut cables = format!(
            "link add br0 mtu {} type bridge stp_state 0 mcast_snooping 0\nlink set br0 up\nlink set lo up\n",
            plan.mtu
        );
        let mut hosts = Vec::new();
        for (role, number) in hosts_of(plan) {
            let name = host_name(role, number);
            let namespace = Namespace::create(&namespace_name(id, &name))?;
            tune(&namespace)?;
            let queues = if role == Role::Online { plan.online_queues.max(SPARE_QUEUES) } else { 1 };
            cables += &format!(
                "link add {name} mtu {mtu} numtxqueues {queues} numrxqueues {queues} type veth \
                 peer name {NIC} mtu {mtu} numtxqueues {queues} numrxqueues {queues} address {mac} netns {peer}\n\
                 link set {name} master br0 up\n",
                mtu = plan.mtu,
                mac = mac(role, number),
                peer = namespace.name(),
            );
            hosts.push(Host { name, role, number, namespace });
        }
        switch.ip(&cables)?;
        for host in &hosts {
            host.namespace.ip(&addresses_and_routes(host, plan))?;
            set_offloads(&host.namespace, NIC, plan.offloads)?;
            set_offloads(&switch, &host.name, plan.offloads)?;
            if host.role == Role::Online && plan.online_queues < SPARE_QUEUES {
                set_queues(&host.namespace, NIC, plan.online_queues)?;
                set_queues(&switch, &host.name, plan.online_queues)?;
            }
            if plan.receive_threads && host.role == Role::Online {
                deliver_by_own_thread(host, &switch)?;
            }
        }
        Ok((hosts, switch))
    }

    /// The name that tells it from other labs.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it was built from.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether it outlives this process.
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    /// Directory for configuration files and logs; removed with the lab.
    pub fn dir(&self) -> PathBuf {
        state_dir(&self.id)
    }

    /// Mounts a BPF file system of the lab's own, which goes with it; its root. Hosts find it there, since only their `/sys` is their own.
    pub fn bpf_file_system(&self) -> Result<PathBuf> {
        let path = bpf_file_system(&self.id);
        fs::create_dir_all(&path)?;
        let none: Option<&str> = None;
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), none)
            .context("mounting a BPF file system")?;
        Ok(path)
    }

    /// All hosts, the switch not among them.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host of that name, if the lab has it.
    pub fn find(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name == name)
    }

    /// The host of that name.
    ///
    /// # Panics
    /// When the plan has no such host: a mistake in the caller.
    pub fn host(&self, name: &str) -> &Host {
        self.find(name).unwrap_or_else(|| panic!("the lab has no host {name}"))
    }

    /// The first client.
    pub fn client(&self) -> &Host {
        self.host("client")
    }

    /// The first online host.
    pub fn online(&self) -> &Host {
        self.host("online")
    }

    /// The first target.
    pub fn target(&self) -> &Host {
        self.host("target")
    }

    /// The first assistant.
    pub fn assistant(&self) -> &Host {
        self.host("assistant")
    }

    /// The namespace of the segment: its bridge `br0` has a port named after each host. For loss, reorder and taps.
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// Routes the target's answers to `destination` (an address or prefix) through another assistant.
    pub fn route_through(&self, target: &Host, destination: &str, assistant: &Host) -> Result<()> {
        let via: IpAddr =
            if destination.contains(':') { assistant.v6().into() } else { assistant.v4().into() };
        target.namespace.ip(&format!("route replace {destination} via {via} dev {NIC}\n"))
    }

    /// Takes it down, with every process inside.
    pub fn down(mut self) -> Result<()> {
        self.owned = false; // The removal below is the only one.
        remove(&self.id)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = remove(&self.id)
        {
            eprintln!("removing the lab {}: {error:#}", self.id);
        }
    }
}

/// Removes the lab `id`: its processes, namespaces and files. Removing what is not there is no error.
pub fn remove(id: &str) -> Result<()> {
    let _building = building();
    remove_parts(id)
}

fn remove_parts(id: &str) -> Result<()> {
    for name in Namespace::list(&namespace_name(id, "")) {
        Namespace::open(&name)?.destroy()?;
    }
    // Most labs have none.
    let _ = umount2(&bpf_file_system(id), MntFlags::MNT_DETACH);
    match fs::remove_dir_all(state_dir(id)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("removing the lab's files")
        }
        _ => Ok(()),
    }
}

/// Removes every lab whose owner is dead.
fn remove_stale() -> Result<()> {
    for id in labs_where(|owner| owner != PERSISTENT && !is_running(owner)) {
        remove_parts(&id).with_context(|| format!("removing the stale lab {id}"))?;
    }
    Ok(())
}

/// The names of the labs with such an owner.
fn labs_where(is_meant: impl Fn(&str) -> bool) -> Vec<String> {
    let Ok(entries) = fs::read_dir(STATE_DIR) else { return Vec::new() };
    let owned = entries.flatten().filter(|entry| {
        let owner = fs::read_to_string(entry.path().join("owner")).unwrap_or_default();
        entry.path().is_dir() && is_meant(&owner)
    });
    owned.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Removes this process's labs when a signal asks it to end, then ends it with 128 + the signal's number.
fn remove_on_signals() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // Held until the end: a test that is about to build its next lab must not get that far.
                let _building = building();
                let own = this_process();
                for id in labs_where(|owner| owner == own) {
                    if let Err(error) = remove_parts(&id) {
                        eprintln!("removing the lab {id}: {error:#}");
                    }
                }
                std::process::exit(128 + signal);
            }
        });
    });
}

/// Labs of this process are built and removed one at a time.
fn building() -> MutexGuard<'static, ()> {
    static BUILDING: Mutex<()> = Mutex::new(());
    BUILDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Between processes: only one at a time claims a name or removes what is stale.
fn lock_state() -> Result<Flock<File>> {
    fs::create_dir_all(STATE_DIR).with_context(|| format!("creating {STATE_DIR}"))?;
    let file = File::create(Path::new(STATE_DIR).join("lock"))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("locking the state of the labs")
}

/// Process id and start time of this process: an id alone may be used again.
fn this_process() -> String {
    let pid = std::process::id();
    format!("{pid} {}", start_time(pid).unwrap_or_default())
}

fn is_running(owner: &str) -> bool {
    owner.split_once(' ').is_some_and(|(pid, started)| {
        pid.parse().ok().and_then(start_time).is_some_and(|time| time.to_string() == started)
    })
}

/// Field 22 of `/proc/PID/stat`: ticks after boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn state_dir(id: &str) -> PathBuf {
    Path::new(STATE_DIR).join(id)
}

fn bpf_file_system(id: &str) -> PathBuf {
    state_dir(id).join("bpf")
}

fn namespace_name(id: &str, host: &str) -> String {
    format!("{NAMESPACE_PREFIX}{id}-{host}")
}

fn host_name(role: Role, number: u8) -> String {
    match number {
        1 => role.name().to_owned(),
        _ => format!("{}{number}", role.name()),
    }
}

fn hosts_of(plan: &Plan) -> impl Iterator<Item = (Role, u8)> {
    let counts = [
        (Role::Client, plan.clients),
        (Role::Online, plan.onlines),
        (Role::Target, plan.targets),
        (Role::Assistant, plan.assistants),
    ];
    counts.into_iter().flat_map(|(role, count)| (1..=count).map(move |number| (role, number)))
}

/// Settings of a host's kernel, before it has a NIC.
fn tune(host: &Namespace) -> Result<()> {
    for (key, value) in [
        // A black hole that routes is none.
        ("ipv4/ip_forward", "0"),
        // Replayed packets come from a MAC that is not the route's.
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/default/accept_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
        // Addresses are usable at once.
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/accept_redirects", "0"),
        // Tens of thousands of connections a second from few addresses.
        ("ipv4/ip_local_port_range", "1024 65000"),
        ("ipv4/tcp_max_syn_backlog", "65535"),
        ("core/somaxconn", "65535"),
    ] {
        host.set_sysctl(key, value)?;
    }
    Ok(())
}

fn addresses_and_routes(host: &Host, plan: &Plan) -> String {
    let mut lines = format!("link set lo up\nlink set {NIC} up\n");
    if host.role == Role::Client {
        for index in 0..plan.client_addresses {
            let (v4, v6) = (host.client_v4(index), host.client_v6(index));
            lines += &format!("addr add {v4}/24 dev {NIC}\naddr add {v6}/64 dev {NIC} nodad\n");
        }
        let (v4, v6) = (host.v4(), host.v6());
        lines += &format!(
            "route add 172.28.0.0/24 dev {NIC} src {v4}\nroute add fd00:28::/64 dev {NIC} src {v6}\n"
        );
        return lines;
    }
    lines += &format!("addr add {}/24 dev {NIC}\naddr add {}/64 dev {NIC} nodad\n", host.v4(), host.v6());
    let assistant = (v4(Role::Assistant, 1, 0), v6(Role::Assistant, 1, 0));
    for client in 1..=plan.clients {
        let (net4, net6) = (format!("172.28.{client}.0/24"), format!("fd00:28:0:{client:x}::/64"));
        lines += &match host.role {
            Role::Target => through(&net4, &net6, assistant),
            _ => format!("route add {net4} dev {NIC}\nroute add {net6} dev {NIC}\n"),
        };
    }
    if host.role == Role::Target {
        lines += &through(POOL_V4, POOL_V6, assistant);
    }
    lines
}

fn through(net4: &str, net6: &str, (via4, via6): (Ipv4Addr, Ipv6Addr)) -> String {
    format!("route add {net4} via {via4} dev {NIC}\nroute add {net6} via {via6} dev {NIC}\n")
}

fn set_offloads(namespace: &Namespace, device: &str, on: bool) -> Result<()> {
    let value = if on { "on" } else { "off" };
    let mut command = namespace.command("ethtool");
    command.args(["-K", device]);
    // In this order: segmentation needs checksum offload.
    for feature in ["tx", "sg", "tso", "gso", "gro"] {
        command.args([feature, value]);
    }
    run(&mut command)
}

/// Uses so many of the queues that a device has.
fn set_queues(namespace: &Namespace, device: &str, count: u8) -> Result<()> {
    let count = count.max(1).to_string();
    run(namespace.command("ethtool").args(["-L", device, "tx", &count, "rx", &count]))
}

/// Lets a kernel thread of the switch, and not the sender, do what happens to a packet after the host's NIC.
///
/// On veth the sender of a packet runs the whole receive path of the others within its own system call: bridge, IP and TCP of the target.
/// On the online host that is charged to the process whose CPU time is measured, more than half of it, while on a NIC it is the work of
/// other machines. So the switch's end of the cable receives by a thread of its own (threaded NAPI); veth uses NAPI only for packets of a
/// device without TSO (`veth_skb_is_eligible_for_gro()` in drivers/net/veth.c). Between sender and thread lies a ring of 256 packets; like
/// a NIC the device makes its sender wait instead of losing the packet, which veth does only where it has a queueing discipline
/// (`veth_xmit()`, from Linux 6.17). Each such thread adds a wake-up to a packet's way, and an impaired cable ([`crate::servers::impair`])
/// is none for what it aggregates: other hosts and other labs do without.
fn deliver_by_own_thread(host: &Host, switch: &Namespace) -> Result<()> {
    run(host.namespace.command("ethtool").args(["-K", NIC, "tso", "off"]))?;
    run(host.namespace.command("tc").args(["qdisc", "add", "dev", NIC, "root", "pfifo", "limit", "1000"]))?;
    // NAPI runs only with GRO; a kernel before 5.12 has no such threads, and the lab works all the same.
    run(switch.command("ethtool").args(["-K", &host.name, "gro", "on"]))?;
    let threaded = format!("/sys/class/net/{}/threaded", host.name);
    run(switch.command("sh").args(["-c", &format!("! test -e {threaded} || echo 1 > {threaded}")]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_tell_role_and_number() {
        assert_eq!(v4(Role::Online, 2, 0).to_string(), "172.28.0.12");
        assert_eq!(v6(Role::Online, 2, 0).to_string(), "fd00:28::12");
        assert_eq!(v4(Role::Client, 1, 7).to_string(), "172.28.1.8");
        assert_eq!(v6(Role::Assistant, 1, 0).to_string(), "fd00:28::31");
    }

    #[test]
    fn an_owner_is_a_process_with_its_start_time() {
        assert!(is_running(&this_process()));
        assert!(!is_running(&format!("{} 1", std::process::id())));
        assert!(!is_running("nonsense"));
    }
}
