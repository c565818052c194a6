//! Real servers on hosts of a lab, each ready when its function returns.
//!
//! nginx logs every request (see [`crate::ledger`]) and names itself in the header `X-Server`, so that a client can tell
//! whose answer it got.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::lab::{Host, Lab};
use crate::ledger::Ledger;
use crate::namespace::run;
use crate::process::Process;
use crate::stream::{End, Record};
use crate::wait::{holds_within, settled, wait_for};

/// How long a server may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Port at which nginx speaks HTTP/2 without TLS.
pub const H2C_PORT: u16 = 8082;
/// Port of nginx's counters, on the loopback address of its host.
const STATUS_PORT: u16 = 8088;
/// Twice the time after which nginx writes its log out.
const LOG_QUIET: Duration = Duration::from_millis(500);
/// Files that nginx serves below `/bytes/`, with their sizes.
const FILES: [(&str, usize); 4] = [("1k", 1_000), ("10k", 10_000), ("100k", 100_000), ("1m", 1_000_000)];

/// Where a lab keeps what belongs to one host.
fn host_dir(lab: &Lab, host: &Host) -> Result<PathBuf> {
    let dir = lab.dir().join(host.name());
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

/// Starts a program on a host; it lives as long as the guard, or as the lab when the lab outlives this process.
pub fn start(lab: &Lab, host: &Host, name: &str, command: &mut Command) -> Result<Process> {
    let dir = host_dir(lab, host)?;
    if lab.is_persistent() {
        Process::start_detached(command, name, &dir)
    } else {
        Process::start(command, name, &dir)
    }
}

/// nginx on one host.
#[derive(Debug)]
pub struct Nginx {
    /// Its master process.
    pub process: Process,
    log: PathBuf,
}

impl Nginx {
    /// Starts nginx on `port`, IPv4 and IPv6. It answers every path with a short text and `/bytes/{1k,10k,100k,1m}` with so
    /// many bytes; POST bodies are read to their end.
    pub fn start(lab: &Lab, host: &Host, port: u16) -> Result<Self> {
        let dir = host_dir(lab, host)?;
        let log = access_log(&dir);
        let files = dir.join("bytes");
        fs::create_dir_all(&files)?;
        for (name, size) in FILES {
            let text = format!("{} says {name}. ", host.name());
            fs::write(files.join(name), text.bytes().cycle().take(size).collect::<Vec<u8>>())?;
        }
        let config = dir.join("nginx.conf");
        fs::write(&config, nginx_config(host.name(), &dir, port))?;
        let errors = dir.join("nginx-error.log");
        let mut command = host.command("nginx");
        command.arg("-e").arg(&errors).arg("-p").arg(&dir).arg("-c").arg(&config);
        let mut process = start(lab, host, "nginx", &mut command)?;
        process.wait_listening(port, START_LIMIT)?;
        Ok(Self { process, log })
    }

    /// The access log as it stands. Lines come to the file at most a quarter of a second after their request.
    pub fn ledger(&self) -> Result<Ledger> {
        Ledger::read(&self.log)
    }

    /// The access log once it has `expected` lines, or `limit` has passed, and nothing more comes.
    pub fn settled_ledger(&self, expected: usize, limit: Duration) -> Result<Ledger> {
        holds_within(limit, || self.logged() >= expected);
        settled(LOG_QUIET, limit, || self.logged());
        self.ledger()
    }

    /// Empties the access log, which grows with every request. To be called when none is under way.
    pub fn forget(&self) -> Result<()> {
        // nginx appends.
        OpenOptions::new().write(true).truncate(true).open(&self.log).context("emptying an access log")?;
        Ok(())
    }

    /// Lines in the access log.
    fn logged(&self) -> usize {
        let lines = |text: Vec<u8>| text.iter().filter(|&&byte| byte == b'\n').count();
        fs::read(&self.log).map_or(0, lines)
    }
}

/// The access log of the nginx whose files are in `dir`.
fn access_log(dir: &Path) -> PathBuf {
    dir.join("access.log")
}

/// Requests that nginx on `host` has taken since it started, from its own counters, the questions for them not counted.
#[derive(Debug, Default)]
pub struct NginxRequests {
    asked: u64,
}

impl NginxRequests {
    /// Asks nginx.
    pub fn read(&mut self, host: &Host) -> Result<u64> {
        let text = host.namespace().enter(|| -> Result<String> {
            let mut stream =
                TcpStream::connect(("127.0.0.1", STATUS_PORT)).context("connecting to nginx's counters")?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /status HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        self.asked += 1;
        let total = status_requests(&text).with_context(|| format!("unexpected answer of nginx: {text}"))?;
        Ok(total.saturating_sub(self.asked))
    }
}

/// The third number of the line after `server accepts handled requests`.
fn status_requests(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("server accepts handled requests")?;
    rest.trim_start().lines().next()?.split_ascii_whitespace().nth(2)?.parse().ok()
}

fn nginx_config(name: &str, dir: &Path, port: u16) -> String {
    let log = access_log(dir).display().to_string();
    let dir = dir.display();
    format!(
        r#"daemon off;
user root;
worker_processes 1;
worker_rlimit_nofile 200000;
error_log {dir}/nginx-error.log;
pid {dir}/nginx.pid;
events {{
    # A hundred copies of a thousand connections: when fewer than a sixteenth are free, nginx closes idle ones to make room.
    worker_connections 120000;
    multi_accept on;
}}
http {{
    log_format ledger '$remote_addr $remote_port $connection_requests $status $request_length $request_time '
                      '$msec $request_method $request_uri';
    access_log {log} ledger buffer=256k flush=200ms;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    client_max_body_size 0;
    # A connection ends when its client ends it, not after a count or a pause.
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    client_body_timeout 3600s;
    client_header_timeout 3600s;
    tcp_nodelay on;
    default_type text/plain;
    add_header X-Server {name};
    server {{
        listen {port} backlog=65535;
        listen [::]:{port} backlog=65535;
        listen {H2C_PORT} http2 backlog=65535;
        listen [::]:{H2C_PORT} http2 backlog=65535;
        location / {{ return 200 "answer of {name}\n"; }}
        location /bytes/ {{ root {dir}; }}
    }}
    server {{
        listen 127.0.0.1:{STATUS_PORT};
        access_log off;
        location /status {{ stub_status; }}
    }}
}}
"#
    )
}

/// The project's recording server on one host.
#[derive(Debug)]
pub struct StreamServer {
    /// Its process.
    pub process: Process,
    record: PathBuf,
}

impl StreamServer {
    /// Starts it on `port` with further arguments (see `stream-server --help`).
    pub fn start(lab: &Lab, host: &Host, port: u16, arguments: &[&str]) -> Result<Self> {
        let record = host_dir(lab, host)?.join(format!("stream-{port}.json"));
        let mut command = host.command(tool("stream-server")?);
        command.arg("--listen").arg(format!("[::]:{port}")).arg("--out").arg(&record).args(arguments);
        let mut process = start(lab, host, &format!("stream-{port}"), &mut command)?;
        process.wait_listening(port, START_LIMIT)?;
        Ok(Self { process, record })
    }

    /// What it has received until now.
    pub fn record(&mut self) -> Result<Record> {
        // Gone first: what appears afterwards is new.
        let _ = fs::remove_file(&self.record);
        self.process.signal(Signal::SIGUSR1)?;
        wait_for("the record of stream-server", START_LIMIT, || self.record.exists())?;
        self.read_record()
    }

    /// What it has received once its requests number `expected`, or `limit` has passed.
    pub fn record_of(&mut self, expected: usize, limit: Duration) -> Result<Record> {
        self.record_when(limit, |record| record.requests() >= expected)
    }

    /// The same, and all connections have ended: a client's FIN follows the response to its last request.
    pub fn ended_record_of(&mut self, expected: usize, limit: Duration) -> Result<Record> {
        self.record_when(limit, |record| {
            record.requests() >= expected && record.connections.iter().all(|it| it.end != End::Open)
        })
    }

    fn record_when(&mut self, limit: Duration, is_complete: impl Fn(&Record) -> bool) -> Result<Record> {
        let mut record = self.record()?;
        let mut failure = None;
        holds_within(limit, || {
            match self.record() {
                Ok(newer) => record = newer,
                Err(error) => failure = Some(error),
            }
            failure.is_some() || is_complete(&record)
        });
        failure.map_or(Ok(record), Err)
    }

    /// Stops it; what it had received.
    pub fn stop(&mut self) -> Result<Record> {
        self.process.stop()?;
        self.read_record()
    }

    fn read_record(&self) -> Result<Record> {
        let text =
            fs::read_to_string(&self.record).with_context(|| format!("reading {}", self.record.display()))?;
        serde_json::from_str(&text).with_context(|| format!("reading {}", self.record.display()))
    }
}

/// Starts redis on `port` of a host, without persistence; `DEBUG DIGEST` tells data sets apart.
pub fn start_redis(lab: &Lab, host: &Host, port: u16) -> Result<Process> {
    let dir = host_dir(lab, host)?;
    let mut command = host.command("redis-server");
    command.args([
        "--port",
        &port.to_string(),
        "--bind",
        "*",
        "-::*",
        "--protected-mode",
        "no",
        "--save",
        "",
    ]);
    command.args(["--appendonly", "no", "--enable-debug-command", "yes", "--dir"]).arg(&dir);
    let mut process = start(lab, host, "redis", &mut command)?;
    process.wait_listening(port, START_LIMIT)?;
    Ok(process)
}

/// Which way of a host's cable `impair` harms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// What the host sends.
    FromHost,
    /// What the host receives.
    ToHost,
}

/// Puts `impair` into a host's cable, with its arguments separated by spaces; the lab must be one without offloads. Without
/// the returned process the cable is cut.
pub fn impair(lab: &Lab, host: &Host, direction: Direction, arguments: &str) -> Result<Process> {
    anyhow::ensure!(!lab.plan().offloads, "a cable can be impaired in a lab without offloads only");
    let (port, inner, outer) = (host.name(), format!("in-{}", host.name()), format!("out-{}", host.name()));
    let mtu = lab.plan().mtu;
    lab.switch().ip(&format!(
        "link add {inner} mtu {mtu} type veth peer name {outer} mtu {mtu}\n\
         link set {outer} master br0 up\n\
         link set {inner} promisc on up\n\
         link set {port} nomaster promisc on\n"
    ))?;
    let (from, to) = match direction {
        Direction::FromHost => (port, inner.as_str()),
        Direction::ToHost => (inner.as_str(), port),
    };
    let mut command = lab.switch().command(tool("impair")?);
    command.args(["--from", from, "--to", to]).args(arguments.split_ascii_whitespace());
    let mut process = start(lab, host, "impair", &mut command)?;
    process.wait_for_message("ready", START_LIMIT)?;
    Ok(process)
}

/// Gives a host another NIC, `aside`, with the MAC address of its first. What is put into the switch's end, whose name is returned, reaches
/// the host's servers, and no capture on the first NIC sees it.
pub fn second_entrance(lab: &Lab, host: &Host) -> Result<String> {
    let (end, mtu) = (format!("aside-{}", host.name()), lab.plan().mtu);
    lab.switch().ip(&format!(
        "link add {end} mtu {mtu} up type veth peer name aside mtu {mtu} address {} netns {}\n",
        host.mac(),
        host.namespace().name()
    ))?;
    host.namespace().ip("link set aside up\n")?;
    Ok(end)
}

/// The NIC that [`mirror_port`] makes.
pub const MIRROR_PORT_NIC: &str = "span";

/// How the driver of [`MIRROR_PORT_NIC`] runs XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// Itself: a veth.
    NativeXdp,
    /// Not at all, so that the kernel does, behind it: a macvlan that has the veth for itself.
    GenericXdp,
}

/// Gives `monitor` another NIC, [`MIRROR_PORT_NIC`], with so many queues and no address: the switch's mirror port, which sends it a copy of
/// all that it sends to `watched`.
pub fn mirror_port(lab: &Lab, watched: &Host, monitor: &Host, queues: u8, driver: Driver) -> Result<()> {
    let (end, mtu) = (format!("{MIRROR_PORT_NIC}-{}", monitor.name()), lab.plan().mtu);
    let numbers = |queues| format!("numtxqueues {queues} numrxqueues {queues}");
    // By its own XDP a veth receives on the queue that was sent on. Else the kernel takes that number for the receive queue's, and zero for
    // none: the switch's end has a queue more.
    let (cable, ends) = match driver {
        Driver::NativeXdp => (MIRROR_PORT_NIC, numbers(queues)),
        Driver::GenericXdp => ("cable", numbers(queues + 1)),
    };
    lab.switch().ip(&format!(
        "link add {end} mtu {mtu} {ends} up type veth peer name {cable} mtu {mtu} {ends} netns {}\n",
        monitor.namespace().name()
    ))?;
    monitor.namespace().ip(&format!("link set {cable} up\n"))?;
    if driver == Driver::GenericXdp {
        let nic = format!("{MIRROR_PORT_NIC} {} up type macvlan mode passthru", numbers(queues));
        monitor.namespace().ip(&format!("link add link {cable} name {nic}\n"))?;
    }
    // Netfilter at the port's egress: what the switch has decided to send to the host.
    let rules = format!(
        "table netdev mirror {{\nchain {end} {{\ntype filter hook egress device \"{}\" priority 0\ndup to \"{end}\"\n}}\n}}",
        watched.name()
    );
    run(lab.switch().command("nft").arg(rules))
}

/// Path of a binary of this workspace, from its release build: load tools and roles are run as users run them.
///
/// `REPLAYER_BIN_DIR` overrides where they are looked for.
pub fn tool(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("REPLAYER_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => release_dir().context("finding the target directory")?,
    };
    let path = dir.join(name);
    anyhow::ensure!(
        path.exists(),
        "{} is not built: `cargo build --release -p replayer -p replayer-tests` (`cargo xtask` does it by itself)",
        path.display()
    );
    Ok(path)
}

/// `TARGET/release`, where this program is `TARGET/PROFILE/NAME` or `TARGET/PROFILE/deps/NAME`.
fn release_dir() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let dir = program.parent()?;
    let profile_dir = if dir.ends_with("deps") { dir.parent()? } else { dir };
    Some(profile_dir.parent()?.join("release"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_from_the_status_page() {
        let page = "Active connections: 2 \nserver accepts handled requests\n 7 7 31 \nReading: 0 Writing: 1 Waiting: 1 \n";
        assert_eq!(status_requests(page), Some(31));
        assert_eq!(status_requests("HTTP/1.1 404 Not Found"), None);
    }
}
