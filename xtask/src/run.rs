//! `cargo xtask run --role ROLE [-- ARGUMENTS]`: builds a role and runs it with the privileges that it needs.
//!
//! Without arguments the role runs on its host of the lab, which is brought up when it is not: for a first look at Replayer
//! in a few terminals of one machine.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use replayer_tests::capture::Capture;
use replayer_tests::clients::Load;
use replayer_tests::lab::{Lab, NIC};
use replayer_tests::servers::tool;

use crate::lab::{self, HTTP_PORT, STREAM_PORT};
use crate::privilege::as_root;
use crate::{cargo, deps};

/// How long requests are captured for an offline role that is given no file.
const CAPTURE_SECONDS: u32 = 5;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Which role to run.
    #[arg(long)]
    role: Role,
    /// Arguments of the role, as after `replayer ROLE`.
    #[arg(last = true)]
    arguments: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    Online,
    Assistant,
    Offline,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Online => "online",
            Role::Assistant => "assistant",
            Role::Offline => "offline",
        }
    }
}

pub(crate) fn main(arguments: &Arguments, prepared: bool) -> Result<()> {
    if arguments.arguments.is_empty() {
        return run_in_lab(arguments.role, prepared);
    }
    deps::install(deps::ALL)?;
    cargo::build_release()?;
    let program = tool("replayer")?;
    let program = program.to_str().context("the path of replayer is not UTF-8")?;
    let mut command = as_root(program, "capturing and sending packets")?;
    Err(command.arg(arguments.role.name()).args(&arguments.arguments).exec()).context("starting replayer")
}

fn run_in_lab(role: Role, prepared: bool) -> Result<()> {
    lab::prepare(prepared)?;
    let lab = lab::up_or_open()?;
    let (online, target, assistant) = (lab.online(), lab.target(), lab.assistant());
    let (host, arguments) = match role {
        Role::Assistant => (assistant, vec!["-i".to_owned(), NIC.to_owned()]),
        Role::Online => (online, online_arguments(&target.v4().to_string(), &assistant.v4().to_string())),
        Role::Offline => {
            println!("capturing {CAPTURE_SECONDS} s of requests at the online host");
            let (file, _) = capture(&lab, CAPTURE_SECONDS)?;
            (online, offline_arguments(&file, &target.v4().to_string(), &assistant.v4().to_string()))
        }
    };
    println!("on the lab's host {}: replayer {} {}", host.name(), role.name(), arguments.join(" "));
    match role {
        Role::Assistant => println!("in another terminal: cargo xtask run --role online"),
        Role::Online => println!(
            "in other terminals:\n\
             \x20 the assistant, if it does not run yet:  cargo xtask run --role assistant\n\
             \x20 a request to the online server:         cargo xtask lab shell client -- curl -i http://{}:{HTTP_PORT}/hello\n\
             \x20 what arrives at the target:             tail -f {}/target/access.log",
            online.v4(),
            lab.dir().display(),
        ),
        Role::Offline => println!(
            "in other terminals:\n\
             \x20 the assistant, if it does not run yet:  cargo xtask run --role assistant\n\
             \x20 what arrives at the target:             tail -f {}/target/access.log",
            lab.dir().display(),
        ),
    }
    println!("the lab stays up until: cargo xtask lab down\n");
    let mut command = host.command(tool("replayer")?);
    Err(command.arg(role.name()).args(&arguments).exec()).context("starting replayer")
}

/// tcpdump's file of a load on nginx of the online host, and how many requests that was.
pub(crate) fn capture(lab: &Lab, seconds: u32) -> Result<(PathBuf, u64)> {
    let capture = Capture::start(lab, lab.online(), &format!("tcp port {HTTP_PORT}"))?;
    let load = format!(
        "--connect {}:{HTTP_PORT} --protocol http --expect-server online --connections 50 --per-connection 20 \
         --rate 500 --seconds {seconds}",
        lab.online().v4()
    );
    let summary = Load::run(lab, "captured", &load)?;
    Ok((capture.stop()?, summary.responses))
}

/// What the offline role of a lab is told: what went to nginx of the online host goes to that of the target.
pub(crate) fn offline_arguments(file: &Path, target: &str, assistant: &str) -> Vec<String> {
    let service = format!("{HTTP_PORT}-{target}:{HTTP_PORT}");
    let file = file.to_string_lossy();
    ["-f", &file, "-x", &service, "-s", assistant, "--stats", "1"].map(str::to_owned).to_vec()
}

/// What the online role of a lab is told: nginx and stream-server of the online host to those of the target.
pub(crate) fn online_arguments(target: &str, assistant: &str) -> Vec<String> {
    let services = format!("{HTTP_PORT}-{target}:{HTTP_PORT},{STREAM_PORT}-{target}:{STREAM_PORT}");
    ["-x", &services, "-s", assistant, "-i", NIC].map(str::to_owned).to_vec()
}
