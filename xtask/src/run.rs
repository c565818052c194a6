//! `cargo xtask run --role ROLE [--config FILE] [-- ARGUMENTS]`: builds a role and runs it with the privileges that it needs.
//!
//! Without arguments, and without a file of them, the role runs on its host of the lab, which is brought up when it is not: for a first
//! look at Replayer in a few terminals of one machine. An offline role that is given a file, but no assistant, replays it in the lab: what
//! is in a file goes to a real network only when its assistant was named.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use replayer_tests::capture::Capture;
use replayer_tests::clients::Load;
use replayer_tests::lab::{Lab, NIC, POOL_V4};
use replayer_tests::servers::tool;
use serde_json::Value;

use crate::lab::{self, HTTP_PORT, STREAM_PORT};
use crate::privilege::as_root;
use crate::{cargo, deps};

/// How long requests are captured for an offline role that is given no file.
const CAPTURE_SECONDS: u32 = 5;
/// Arguments with which an offline role does without the lab: an assistant of its own, or none of the network, or a file that knows.
const ELSEWHERE: [(&str, &str); 6] = [
    ("--config", "--config"),
    ("-s", "--assistant"),
    ("-w", "--write"),
    ("--dry-run", "--dry-run"),
    ("-h", "--help"),
    ("-V", "--version"),
];

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Which role to run.
    #[arg(long)]
    role: Role,
    /// The role's configuration file.
    #[arg(long, value_name = "FILE")]
    config: Option<String>,
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
    let config = arguments.config.iter().map(|file| format!("--config={file}"));
    let given: Vec<String> = config.chain(arguments.arguments.iter().cloned()).collect();
    let in_lab = match arguments.role {
        Role::Offline => !ELSEWHERE.iter().any(|flag| names(&given, *flag)),
        Role::Online | Role::Assistant => given.is_empty(),
    };
    if in_lab {
        return run_in_lab(arguments.role, &given, prepared);
    }
    deps::install(deps::ALL)?;
    cargo::build_release()?;
    let program = tool("replayer")?;
    let program = program.to_str().context("the path of replayer is not UTF-8")?;
    println!("on this host, not in the lab: replayer {} {}", arguments.role.name(), given.join(" "));
    let mut command = as_root(program, "capturing and sending packets")?;
    Err(command.arg(arguments.role.name()).args(&given).exec()).context("starting replayer")
}

/// Whether a flag is among the arguments.
fn names(arguments: &[String], (short, long): (&str, &str)) -> bool {
    arguments.iter().any(|argument| match argument.strip_prefix(long) {
        Some(rest) => rest.is_empty() || rest.starts_with('='),
        None => !argument.starts_with("--") && !short.starts_with("--") && argument.starts_with(short),
    })
}

fn run_in_lab(role: Role, given: &[String], prepared: bool) -> Result<()> {
    lab::prepare(prepared)?;
    let lab = lab::up_or_open()?;
    let (online, target, assistant) = (lab.online(), lab.target(), lab.assistant());
    let (host, arguments) = match role {
        Role::Assistant => (assistant, vec!["-i".to_owned(), NIC.to_owned()]),
        Role::Online => (online, online_arguments(&target.v4().to_string(), &assistant.v4().to_string())),
        Role::Offline if !given.is_empty() => {
            (online, with_the_labs(given, &target.v4().to_string(), &assistant.v4().to_string())?)
        }
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

/// The arguments of a user who named a file, completed with what is the lab's: the assistant, the target, for every service of the file
/// unless some are named, and clients whose way back from the target leads to the assistant.
fn with_the_labs(given: &[String], target: &str, assistant: &str) -> Result<Vec<String>> {
    let mut arguments = given.to_vec();
    if !names(given, ("-x", "--service")) {
        let services = services_of(&files_of(given).context("name a file: -f FILE")?)?;
        let to_target = |service: &String| format!("{service}-{target}:{HTTP_PORT}");
        arguments.extend(["-x".to_owned(), services.iter().map(to_target).collect::<Vec<_>>().join(",")]);
    }
    if !names(given, ("-c", "--client-pool")) {
        arguments.extend(["-c", POOL_V4].map(str::to_owned));
    }
    arguments.extend(["-s", assistant].map(str::to_owned));
    Ok(arguments)
}

/// The value of `-f`.
fn files_of(arguments: &[String]) -> Option<String> {
    let at = arguments.iter().position(|argument| names(std::slice::from_ref(argument), ("-f", "--file")))?;
    let attached = arguments[at].strip_prefix("--file=").or_else(|| arguments[at].strip_prefix("-f"));
    attached
        .filter(|files| !files.is_empty())
        .or(arguments.get(at + 1).map(String::as_str))
        .map(str::to_owned)
}

/// The services of TCP over IPv4 that are in capture files, as `replayer inspect` finds them.
fn services_of(files: &str) -> Result<Vec<String>> {
    let output = Command::new(tool("replayer")?)
        .args(["inspect", "--json"])
        .args(files.split(','))
        .output()
        .context("starting replayer")?;
    // Of a damaged file, too, it says what is before the damage.
    let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    };
    let servers = report["services"].as_array().map(Vec::as_slice).unwrap_or_default();
    let servers = servers.iter().filter_map(|service| service["server"].as_str());
    let found: Vec<String> = servers.filter(|server| !server.starts_with('[')).map(str::to_owned).collect();
    ensure!(
        !found.is_empty(),
        "{files}: no service of TCP over IPv4 is in it; name what is to be replayed with -x"
    );
    Ok(found)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_file_is_replayed_in_the_lab_unless_an_assistant_is_named() {
        let elsewhere = |text: &str| ELSEWHERE.iter().any(|flag| names(&split(text), *flag));
        for text in
            ["-f a.pcap", "-f a.pcap --speed max --stats 1 --start 3", "-fa.pcap -x 80-192.0.2.1:80 --stop 9"]
        {
            assert!(!elsewhere(text), "{text}");
        }
        for text in [
            "-f a -s 192.0.2.3",
            "-s192.0.2.3",
            "--assistant=a",
            "--assistant a",
            "-f a --dry-run",
            "-w b",
            "--help",
            "--config=a",
        ] {
            assert!(elsewhere(text), "{text}");
        }
        for text in ["-f a,b", "-x 1 -fa,b", "--file a,b", "--file=a,b -x 1"] {
            assert_eq!(files_of(&split(text)).as_deref(), Some("a,b"), "{text}");
        }
    }
}
