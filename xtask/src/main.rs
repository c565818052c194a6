//! Everything a person types: `cargo xtask COMMAND`.
//!
//! - [`deps`]: what the machine must have, installed or named
//! - [`cargo`]: builds and test binaries; [`privilege`]: root, where a command needs it
//! - [`ebpf`], [`lab`], [`run`], [`demo`], [`test`], [`simulate`], [`soak`], [`fuzz`], [`bench`]: the commands
//!
//! This program itself needs nothing but Rust: it must not depend on a crate that builds C code, since it installs what
//! such builds need. Builds run as the user who typed the command; only what works with namespaces runs as root.

mod bench;
mod cargo;
mod demo;
mod demo_offline;
mod deps;
mod ebpf;
mod fuzz;
mod lab;
mod privilege;
mod run;
mod simulate;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs, shows and tests Replayer.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Everything is installed and built: set when a command starts itself again as root.
    #[arg(long, global = true, hide = true)]
    prepared: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what builds, lab and tests need, or name what is missing.
    Deps,
    /// A world of network namespaces on this machine: clients, online server, target, assistant.
    Lab(lab::Arguments),
    /// Build a role of Replayer and run it; without arguments of its own, in the lab.
    Run(run::Arguments),
    /// Rebuild the committed BPF object, or check it.
    Ebpf(ebpf::EbpfArgs),
    /// Show replay in the lab, live or from a capture file: traffic, a line per second, and a comparison of both servers.
    Demo(demo::Arguments),
    /// Run every test of the workspace.
    Test(test::Arguments),
    /// Simulate lives of the engine with lossy networks and a TCP of somebody else: more seeds, or one of them again.
    Simulate(simulate::Arguments),
    /// Replay the highest rate that this machine sustains, for long: nothing may be lost, and nothing may grow.
    Soak(soak::Arguments),
    /// Give hostile bytes to parsers, decoder and engine, for a bounded time.
    Fuzz(fuzz::Arguments),
    /// Measure: each figure beside what it is compared with in the same run.
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Deps => deps::install(deps::ALL),
        Command::Lab(lab) => lab::main(&lab, arguments.prepared),
        Command::Run(run) => run::main(&run, arguments.prepared),
        Command::Ebpf(ebpf) => ebpf::run(ebpf.check),
        Command::Demo(demo) => demo::main(&demo, arguments.prepared),
        Command::Test(test) => test::main(&test),
        Command::Simulate(simulate) => simulate::main(&simulate),
        Command::Soak(soak) => soak::main(&soak, arguments.prepared),
        Command::Fuzz(fuzz) => fuzz::main(&fuzz),
        Command::Bench(bench) => bench::main(&bench),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
