//! Root, where a command needs it: namespaces, XDP and packages.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether `program` is somewhere on the search path.
pub(crate) fn on_path(program: &str) -> bool {
    // Tools of the administrator are not on every user's path, but on root's.
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into))
        .any(|dir| dir.join(program).is_file())
}

/// `program`, to be run as root: itself when this is root, else through sudo, saying so.
pub(crate) fn as_root(program: &str, why: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if !on_path("sudo") {
        bail!("{why} needs root, and there is no sudo here: run this command as root");
    }
    eprintln!("xtask: {why} needs root: using sudo");
    let mut command = Command::new("sudo");
    // What the programs under sudo may be told by their user.
    command.args(["--preserve-env=REPLAYER_BIN_DIR,RUST_BACKTRACE", "--", program]);
    Ok(command)
}

/// Goes on as root: when this is not root, this program is replaced by itself under sudo, told that the user's part (packages,
/// builds) is done.
pub(crate) fn become_root(why: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let program = std::env::current_exe().context("finding this program")?;
    let program = program.to_str().context("this program's path is not UTF-8")?;
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // In front: what follows a `--` belongs to another program.
    arguments.insert(0, "--prepared".into());
    Err(as_root(program, why)?.args(arguments).exec()).context("starting sudo")
}
