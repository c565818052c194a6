//! `cargo xtask lab`: the lab that stays up until it is taken down.

use std::fs;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use replayer_tests::lab::{Lab, NIC, Plan, Role, remove};
use replayer_tests::servers::{Nginx, StreamServer, tool};

use crate::privilege::become_root;
use crate::{cargo, deps};

/// The lab of `cargo xtask lab` and `cargo xtask run`; tests and demo build others of their own.
const ID: &str = "lab";
/// Where nginx listens on the online host and on the target.
pub(crate) const HTTP_PORT: u16 = 8080;
/// Where stream-server listens on both.
pub(crate) const STREAM_PORT: u16 = 9000;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build it, with nginx and stream-server on the online host and on the target.
    Up {
        /// Number of client hosts.
        #[arg(long, default_value_t = 1)]
        clients: u8,
        /// Source addresses of each client host.
        #[arg(long, default_value_t = 1)]
        client_addresses: u8,
        /// MTU of the segment, in bytes.
        #[arg(long, default_value_t = 1500)]
        mtu: u16,
        /// Switch the NICs' offloads off.
        #[arg(long)]
        no_offloads: bool,
        /// Receive the online host's packets by a kernel thread of the switch instead of within its system calls, so that the CPU time of the
        /// online role is its own: for measuring it.
        #[arg(long)]
        receive_threads: bool,
        /// Queues of the online host's NIC: one for each worker of the online role.
        #[arg(long, default_value_t = 1)]
        online_queues: u8,
    },
    /// Take it down, with everything that runs in it.
    Down,
    /// Show its hosts and what runs on them.
    Status,
    /// A shell on a host, or a command there.
    Shell {
        /// client, online, target, assistant
        host: String,
        /// The command, instead of a shell.
        #[arg(last = true)]
        command: Vec<String>,
    },
}

pub(crate) fn main(arguments: &Arguments, prepared: bool) -> Result<()> {
    match &arguments.command {
        &Command::Up { clients, client_addresses, mtu, no_offloads, receive_threads, online_queues } => {
            prepare(prepared)?;
            let plan = Plan {
                clients,
                client_addresses,
                mtu,
                offloads: !no_offloads,
                receive_threads,
                online_queues,
                ..Plan::default()
            };
            print_hosts(&up(plan)?);
            println!(
                "\n`cargo xtask lab shell HOST` opens a shell there, `cargo xtask lab down` takes all down."
            );
            Ok(())
        }
        Command::Down => {
            become_root("removing network namespaces")?;
            remove(ID)
        }
        Command::Status => {
            become_root("looking into network namespaces")?;
            print_hosts(&open()?);
            Ok(())
        }
        Command::Shell { host, command } => {
            become_root("entering a network namespace")?;
            shell(host, command)
        }
    }
}

/// Packages and builds as the user, then root.
pub(crate) fn prepare(prepared: bool) -> Result<()> {
    if !prepared {
        deps::install(deps::ALL)?;
        cargo::build_release()?;
    }
    become_root("working with network namespaces")
}

/// The standing lab, or a new one.
pub(crate) fn up_or_open() -> Result<Lab> {
    match Lab::open(ID)? {
        Some(lab) => Ok(lab),
        None => up(Plan::default()),
    }
}

fn up(plan: Plan) -> Result<Lab> {
    let mut lab = Lab::up_persistent(ID, plan)?;
    start_servers(&lab)?;
    lab.keep()?;
    Ok(lab)
}

fn start_servers(lab: &Lab) -> Result<()> {
    for host in [lab.online(), lab.target()] {
        Nginx::start(lab, host, HTTP_PORT)?;
        StreamServer::start(lab, host, STREAM_PORT, &[])?;
    }
    Ok(())
}

fn open() -> Result<Lab> {
    Lab::open(ID)?.context("the lab is not up: `cargo xtask lab up` builds it")
}

fn print_hosts(lab: &Lab) {
    println!("{:<11} {:<13} {:<16} on {NIC}; running", "host", "IPv4", "IPv6");
    for host in lab.hosts() {
        let programs: Vec<String> = host
            .namespace()
            .processes()
            .iter()
            .map(|pid| format!("{}({pid})", program_name(pid.as_raw())))
            .collect();
        println!("{:<11} {:<13} {:<16} {}", host.name(), host.v4(), host.v6(), programs.join(" "));
    }
    let online = lab.online().v4();
    println!(
        "\nnginx on {online}:{HTTP_PORT} and on the target, stream-server on port {STREAM_PORT} of both;"
    );
    println!("logs and configuration files in {}.", lab.dir().display());
}

fn program_name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn shell(name: &str, command: &[String]) -> Result<()> {
    let lab = open()?;
    let Some(host) = lab.find(name) else {
        let names: Vec<&str> = lab.hosts().iter().map(|host| host.name()).collect();
        bail!("the lab has no host {name}; its hosts are {}", names.join(", "));
    };
    let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned());
    let (program, rest) =
        command.split_first().map_or((shell.as_str(), &[][..]), |(first, rest)| (first, rest));
    let mut inside = host.command(program);
    inside.args(rest).env("LAB_HOST", name);
    // replayer, loadgen and stream-server by their names.
    if let Some(dir) = tool("loadgen").ok().as_deref().and_then(|path| path.parent()) {
        let path = std::env::var("PATH").unwrap_or_default();
        inside.env("PATH", format!("{}:/usr/sbin:/sbin:{path}", dir.display()));
    }
    if command.is_empty() && host.role() == Role::Client {
        println!("try: curl -i http://{}:{HTTP_PORT}/hello", lab.online().v4());
    }
    Err(inside.exec()).with_context(|| format!("starting {program} on {name}"))
}
