//! The command: parses what was typed, and the file that it names, and hands it to a role.

use replayer::cli::Role;
use replayer::configuration::Configuration;
use replayer::say;
use replayer_huge_pages::HugePages;
use std::process::ExitCode;

/// A worker's tables are hundreds of megabytes, read at random.
#[global_allocator]
static ALLOCATOR: HugePages = HugePages;

fn main() -> ExitCode {
    let (cli, configuration) = match Configuration::parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(usage) => usage.exit(),
            Err(error) => {
                say::fatal(&error);
                return ExitCode::FAILURE;
            }
        },
    };
    let _last_words = say::begin(cli.role.name(), cli.log_format);
    configuration.say_who_reads_the_key();
    match run(cli.role, configuration) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::fatal(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(role: Role, configuration: Configuration) -> anyhow::Result<()> {
    match role {
        Role::Online(args) => replayer::online::run(*args, configuration),
        Role::Assistant(args) => replayer::assistant::run(args, configuration),
        Role::Offline(args) => replayer::offline::run(*args, configuration),
        Role::Record(args) => replayer::record::run(args, configuration),
        Role::Inspect(args) => replayer::inspect::run(&args),
        Role::Check(args) => run(args.told_to_check(), configuration),
        Role::Top(args) => replayer::top::run(&args),
    }
}
