//! The command: parses what was typed and hands it to a role.

use clap::Parser;
use replayer::cli::{Cli, Role};
use replayer_huge_pages::HugePages;
use std::io::Write;
use std::process::ExitCode;

/// A worker's tables are hundreds of megabytes, read at random.
#[global_allocator]
static ALLOCATOR: HugePages = HugePages;

fn main() -> ExitCode {
    // `RUST_LOG=debug` shows more, `RUST_LOG=error` less.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_target(false)
        .init();
    let result = match Cli::parse().role {
        Role::Online(args) => replayer::online::run(&args),
        Role::Assistant(args) => replayer::assistant::run(args),
        Role::Offline(args) => replayer::offline::run(&args),
        Role::Record(args) => replayer::record::run(&args),
        Role::Inspect(args) => replayer::inspect::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be listening.
            let _ = writeln!(std::io::stderr(), "replayer: {error:#}");
            ExitCode::FAILURE
        }
    }
}
