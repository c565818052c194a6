//! `cargo xtask simulate`: the engine's simulations, as many seeds as wanted, or one of them again with its packets in a file.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cargo::cargo;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only simulations whose names contain this.
    test: Option<String>,
    /// Write the table of docs/simulation.md.
    #[arg(long, conflicts_with_all = ["test", "seeds", "seed"])]
    table: bool,
    /// How many seeds; without it as many as in the tests.
    #[arg(long, conflicts_with = "seed")]
    seeds: Option<u64>,
    /// This seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// Write what crossed the seed's wires: captured packets, what the engine sent, what the target sent.
    #[arg(long, value_name = "FILE", requires = "seed")]
    pcap: Option<PathBuf>,
    /// Print what crossed the seed's wires, a line for each packet.
    #[arg(long, requires = "seed")]
    trace: bool,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--quiet", "--package", "replayer-engine", "--test", "simulation"]);
    let test = if arguments.table { Some("the_table") } else { arguments.test.as_deref() };
    command.arg("--").args(test).arg("--nocapture");
    if arguments.table {
        command.env("TABLE", "1");
    }
    for (variable, value) in [("SEEDS", arguments.seeds), ("SEED", arguments.seed)] {
        if let Some(value) = value {
            command.env(variable, value.to_string());
        }
    }
    if let Some(path) = &arguments.pcap {
        // The test runs in the directory of its package.
        command.env("PCAP", std::path::absolute(path).context("the file's path")?);
    }
    if arguments.trace {
        command.env("TRACE", "1");
    }
    let status = command.stdin(Stdio::null()).status().context("starting cargo")?;
    if let Some(path) = arguments.pcap.as_deref().filter(|path| path.exists()) {
        println!("{} has what crossed the wires", path.display());
    }
    if !status.success() {
        bail!("a simulation failed: see the messages above");
    }
    Ok(())
}
