//! `cargo xtask bench [SUBJECT…]`: builds the benchmarks and runs them; what they measure is the crate `bench`'s business.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::Path;
use std::process::Stdio;

use crate::cargo::cargo;
use crate::deps;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// What to measure; everything when nothing is named.
    subjects: Vec<String>,
    /// JSON, a line for each subject, instead of tables.
    #[arg(long)]
    json: bool,
    /// Fewer sessions and rounds: whether it runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Keep the results under docs/benchmarks/, as DATE-SUBJECT.json with the single measurements, the machine and the commit.
    #[arg(long)]
    save: bool,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    deps::install(deps::ALL)?;
    deps::install(deps::BENCHMARKS)?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "bench", "--"]).args(&arguments.subjects);
    if arguments.json {
        command.arg("--json");
    }
    if arguments.quick {
        command.arg("--quick");
    }
    if arguments.save {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs").join("benchmarks");
        command.arg("--save").arg(directory);
    }
    let status = command.stdin(Stdio::null()).status().context("starting cargo")?;
    if !status.success() {
        bail!("the benchmarks failed ({status}): see the messages above");
    }
    Ok(())
}
