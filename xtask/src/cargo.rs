//! Cargo, run as the user who typed the command.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// The cargo that runs this program.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Builds the roles and the test tools as users run them: optimized.
pub(crate) fn build_release() -> Result<()> {
    let mut command = cargo();
    command.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "replayer",
        "--package",
        "replayer-tests",
        "--bins",
    ]);
    eprintln!("xtask: building replayer and the test tools (release)");
    let status = command.status().context("starting cargo")?;
    if !status.success() {
        bail!("the build failed: see its messages above");
    }
    Ok(())
}
