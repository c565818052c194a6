//! `cargo xtask test`: every test of the workspace, and a count at the end.
//!
//! Test binaries are built as the user and run as root: the end-to-end tests make namespaces and attach XDP programs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use crate::cargo::{build_release, cargo};
use crate::deps;
use crate::privilege::as_root;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Run only tests whose names contain this.
    filter: Option<String>,
}

/// What the tests came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: usize,
}

pub(crate) fn main(arguments: &Arguments) -> Result<()> {
    deps::install(deps::ALL)?;
    build_release()?;
    let mut counts = Counts::default();
    let mut broken = Vec::new();
    for binary in build_tests()? {
        println!("\n=== {}", binary.name);
        let mut command =
            as_root(binary.path.to_str().context("the path of a test is not UTF-8")?, "running tests")?;
        command.current_dir(&binary.package_dir);
        if binary.uses_lab {
            // One lab at a time: each moves real traffic, and what is measured must not depend on a neighbour.
            command.arg("--test-threads=1");
        }
        run(command.args(&arguments.filter), &binary.name, &mut counts, &mut broken)?;
    }
    println!("\n=== documentation");
    let mut command = cargo();
    command.args(["test", "--quiet", "--workspace", "--doc", "--"]).args(&arguments.filter);
    run(&mut command, "documentation", &mut counts, &mut broken)?;

    for name in &broken {
        println!("failed: {name}");
    }
    if !Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pcaps").is_dir() {
        println!("\nTests over capture files had those of tests/captures only: there is no ../shared/pcaps.");
    }
    let Counts { passed, failed, skipped } = counts;
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 || !broken.is_empty() {
        // The count stays the last line of the output.
        std::process::exit(1);
    }
    if passed == 0 {
        bail!("no test ran: is the filter right?");
    }
    Ok(())
}

struct TestBinary {
    name: String,
    path: PathBuf,
    package_dir: PathBuf,
    uses_lab: bool,
}

/// One line of cargo's `--message-format=json`, as far as it is of interest here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    /// Whether it is a program of tests: the others are built since tests start them.
    test: bool,
}

fn build_tests() -> Result<Vec<TestBinary>> {
    eprintln!("xtask: building the tests");
    let mut child = cargo()
        .args(["test", "--quiet", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .stdout(Stdio::piped())
        .spawn()
        .context("starting cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut binaries = Vec::new();
    for line in BufReader::new(output).lines() {
        binaries.extend(serde_json::from_str(&line?).ok().and_then(test_binary));
    }
    if !child.wait()?.success() {
        bail!("the tests do not build: see the messages above");
    }
    Ok(binaries)
}

fn test_binary(message: Message) -> Option<TestBinary> {
    let (target, path) = (message.target?, message.executable?);
    let package_dir = message.manifest_path?.parent()?.to_owned();
    if message.reason != "compiler-artifact" || !message.profile?.test {
        return None;
    }
    let package = package_dir.file_name()?.to_string_lossy().into_owned();
    let integration = target.kind.iter().any(|kind| kind == "test");
    Some(TestBinary {
        name: format!("{package} {}", target.name),
        path,
        uses_lab: integration && package_dir.ends_with(Path::new("tests")),
        package_dir,
    })
}

/// Runs one test program, shows its output and adds up its results.
fn run(command: &mut Command, name: &str, counts: &mut Counts, broken: &mut Vec<String>) -> Result<()> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("starting {name}"))?;
    let output = child.stdout.take().context("the test has no output")?;
    let mut said_result = false;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        if let Some(result) = parse_result(&line) {
            said_result = true;
            counts.passed += result.passed;
            counts.failed += result.failed;
            counts.skipped += result.skipped;
        }
    }
    let status = child.wait()?;
    if !status.success() {
        if !said_result {
            // It died in the middle: what it had passed is not known.
            counts.failed += 1;
        }
        broken.push(format!("{name} ({status})"));
    }
    Ok(())
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.1s`
fn parse_result(line: &str) -> Option<Counts> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| {
        numbers.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse().ok()).unwrap_or_default()
    };
    Some(Counts { passed: number("passed"), failed: number("failed"), skipped: number("ignored") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_counted() {
        let line = "test result: FAILED. 13 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.14s";
        assert_eq!(parse_result(line), Some(Counts { passed: 13, failed: 2, skipped: 1 }));
        assert_eq!(parse_result("test a::b ... ok"), None);
    }
}
