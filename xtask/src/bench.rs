//! `cargo xtask bench [SUBJECT…]`: builds the benchmarks and runs them; what they measure is the crate `bench`'s business.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cargo::cargo;
use crate::deps;
use crate::privilege::as_root;

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
    let mut build = cargo();
    // The roles and the lab's programs as well: `live` and `offline` run them.
    let packages = ["bench", "replayer", "replayer-tests"].map(|name| format!("--package={name}"));
    build.args(["build", "--quiet", "--release", "--bins"]).args(packages);
    if !build.status().context("starting cargo")?.success() {
        bail!("the build failed: see its messages above");
    }
    let program =
        std::env::current_exe()?.parent().and_then(Path::parent).map(|dir| dir.join("release/bench"));
    let program = program.context("finding the target directory")?;
    let program = program.to_str().context("the target directory's path is not UTF-8")?;
    // All but the engine alone have a kernel in them.
    let only_engine =
        !arguments.subjects.is_empty() && arguments.subjects.iter().all(|name| name == "engine");
    let mut command =
        if only_engine { Command::new(program) } else { as_root(program, "measuring devices")? };
    command.args(&arguments.subjects);
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
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("starting {program}"))?;
    if !status.success() {
        bail!("the benchmarks failed ({status}): see the messages above");
    }
    Ok(())
}
