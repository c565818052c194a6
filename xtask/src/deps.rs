//! What the machine must have besides Rust. On Debian and its derivatives it is installed, elsewhere named.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::privilege::{as_root, on_path};

/// Something that has to be there, and the Debian package that brings it.
pub(crate) struct Dependency {
    package: &'static str,
    sign: Sign,
    needed_by: &'static str,
}

/// How its presence shows.
enum Sign {
    Program(&'static str),
    Header(&'static str),
}

const fn program(package: &'static str, program: &'static str, needed_by: &'static str) -> Dependency {
    Dependency { package, sign: Sign::Program(program), needed_by }
}

const fn header(package: &'static str, path: &'static str, needed_by: &'static str) -> Dependency {
    Dependency { package, sign: Sign::Header(path), needed_by }
}

const BUILD: &str = "building (the linker)";
const LAB: &str = "the lab";
const BENCH: &str = "instruction counts in benchmarks";
const FUZZING: &str = "fuzzing (libFuzzer, which libfuzzer-sys compiles)";
const CLIENTS: &str = "the demo and the tests";

/// What benchmarks need besides.
pub(crate) const BENCHMARKS: &[Dependency] = &[
    program("valgrind", "valgrind", BENCH),
    program("tcpreplay", "tcpreplay", "benchmarks of sending, to compare with"),
];

/// What fuzzing needs besides.
pub(crate) const FUZZERS: &[Dependency] = &[program("g++", "g++", FUZZING)];

/// Everything that builds, lab, demo and tests need.
pub(crate) const ALL: &[Dependency] = &[
    program("gcc", "gcc", BUILD),
    header("libc6-dev", "/usr/include/stdio.h", BUILD),
    program("iproute2", "ip", LAB),
    program("ethtool", "ethtool", LAB),
    program("nftables", "nft", LAB),
    program("nginx-light", "nginx", LAB),
    program("curl", "curl", LAB),
    program("bpftool", "bpftool", CLIENTS),
    program("wrk", "wrk", CLIENTS),
    program("apache2-utils", "ab", CLIENTS),
    program("tcpdump", "tcpdump", CLIENTS),
    program("nghttp2-client", "h2load", CLIENTS),
    program("redis-server", "redis-server", CLIENTS),
    program("redis-tools", "redis-cli", CLIENTS),
];

impl Dependency {
    fn is_there(&self) -> bool {
        match self.sign {
            Sign::Program(name) => on_path(name),
            Sign::Header(path) => Path::new(path).exists(),
        }
    }

    fn description(&self) -> String {
        let what = match self.sign {
            Sign::Program(name) => format!("program `{name}`"),
            Sign::Header(path) => format!("header {path}"),
        };
        format!("  {what} (Debian package {}), for {}", self.package, self.needed_by)
    }
}

/// Installs what is missing; an error names what could not be.
pub(crate) fn install(dependencies: &[Dependency]) -> Result<()> {
    let missing = || dependencies.iter().filter(|dependency| !dependency.is_there());
    let packages: Vec<&str> = missing().map(|dependency| dependency.package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing().map(Dependency::description).collect();
    eprintln!("xtask: this machine lacks\n{}", list.join("\n"));
    if !on_path("apt-get") {
        bail!(
            "only Debian's packages can be installed here by themselves: install what is named above, then try again"
        );
    }
    eprintln!("xtask: installing {}", packages.join(" "));
    apt_get(&["update", "-q"])?;
    apt_get(&[&["install", "-y", "-q", "--no-install-recommends"], packages.as_slice()].concat())?;
    let left: Vec<String> = missing().map(Dependency::description).collect();
    if !left.is_empty() {
        bail!("still missing after the installation:\n{}", left.join("\n"));
    }
    Ok(())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    // Through env(1): sudo does not hand the variable on.
    let mut command: Command = as_root("env", "installing packages")?;
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(arguments);
    let status = command.status().context("starting apt-get")?;
    if !status.success() {
        bail!("`apt-get {}` failed ({status}): see its messages above", arguments.join(" "));
    }
    Ok(())
}
