//! `cargo xtask fuzz [TARGET…]`: gives hostile bytes to parsers, decoder and engine, for a bounded time.
//!
//! The targets are the crate `replayer/fuzz`'s. libFuzzer drives them; it needs the compiler's coverage instrumentation, which stable Rust
//! has, and no sanitizer of memory: the code under test has no unsafe block.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cargo::cargo;
use crate::deps;

const TARGETS: [&str; 5] = ["frame", "tcp_options", "engine", "return_channel", "capture_file"];

/// What `cargo fuzz` passes too: edges are counted, and what is compared guides the changes.
const INSTRUMENTATION: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Which ones; all when none is named.
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
    /// How long each runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Run this input only, which an earlier run has left behind.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    deps::install(deps::ALL)?;
    deps::install(deps::FUZZERS)?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let work = root.join("target").join("fuzz");
    let programs = build(&work)?;
    let all = TARGETS.map(str::to_owned);
    let targets = if arguments.targets.is_empty() { &all[..] } else { &arguments.targets };
    if arguments.input.is_some() && targets.len() != 1 {
        bail!("an input is one target's: name it");
    }
    for target in targets {
        eprintln!("xtask: fuzzing {target}");
        let mut command = Command::new(programs.join(target));
        let found = work.join("corpus").join(target);
        let artifacts = work.join("artifacts").join(target);
        for directory in [&found, &artifacts] {
            std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        match &arguments.input {
            Some(input) => command.arg(input),
            // What is new goes to the first.
            None => command.arg(found).arg(root.join("replayer/fuzz/corpus").join(target)).args([
                format!("-max_total_time={}", arguments.seconds),
                "-timeout=20".to_owned(),
                "-print_final_stats=1".to_owned(),
            ]),
        };
        command.arg("-max_len=8192").arg(format!("-artifact_prefix={}/", artifacts.display()));
        let status = command.stdin(Stdio::null()).status().with_context(|| format!("starting {target}"))?;
        if !status.success() {
            bail!(
                "{target} found something, see above; the input is in {}. Again: cargo xtask fuzz {target} --input FILE. Once it \
                 is fixed it belongs to replayer/fuzz/corpus/{target}, where the tests run it",
                artifacts.display()
            );
        }
    }
    Ok(())
}

/// Builds all targets; where their programs are.
fn build(work: &Path) -> Result<PathBuf> {
    let triple = host()?;
    let status = cargo()
        .args(["build", "--quiet", "--profile", "fuzz", "--package", "replayer-fuzz", "--bins"])
        // With a target named, build scripts and macros are not instrumented.
        .args(["--features", "libfuzzer", "--target", &triple, "--target-dir"])
        .arg(work)
        .env("RUSTFLAGS", INSTRUMENTATION)
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("the fuzz targets do not build: see the messages above");
    }
    Ok(work.join(triple).join("fuzz"))
}

fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("-vV").output().context("starting rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host =
        text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not say its host")?;
    Ok(host.to_owned())
}
