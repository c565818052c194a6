//! The command line: what was typed, parsed into types. What it means is decided in the roles' own files.
//!
//! - [`replay`]: the flags that both replaying roles have, and what they mean together
//! - [`values`]: what flags take

use crate::online::OnlineArgs;
use crate::say::LogFormat;
use clap::{Args, Parser, Subcommand};

pub mod replay;
pub mod values;

pub use replay::ReplayArgs;
pub use values::{PercentArg, ServiceArg, StatsFormat};

/// What is below the help of a role that runs until it is stopped.
const SIGNALS: &str = "Signals:
  SIGTERM and SIGINT end it cleanly, SIGHUP does not: it has the file of --config read again and the report written as it is then
  (record: completes the file), and ends only a role whose terminal is gone.";

/// Replays the live requests of a production server, TCP and UDP, to a target server.
#[derive(Debug, Parser)]
#[command(name = "replayer", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// The role of this host.
    #[command(subcommand)]
    pub role: Role,

    /// How messages on standard error look: lines for people, or one JSON object a line.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// The roles.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// On the production server: capture requests and replay them to the target.
    #[command(after_help = SIGNALS)]
    Online(Box<OnlineArgs>),
    /// On a spare host of the target's segment: take the target's responses off the wire, and return their headers.
    #[command(after_help = SIGNALS)]
    Assistant(crate::assistant::AssistantArgs),
    /// Replay capture files to the target.
    #[command(after_help = SIGNALS)]
    Offline(Box<crate::offline::OfflineArgs>),
    /// Write the requests that arrive at this host to capture files, to be replayed later.
    #[command(after_help = SIGNALS)]
    Record(crate::record::RecordArgs),
    /// Say what capture files hold, and how much of it can be replayed.
    Inspect(crate::inspect::InspectArgs),
    /// Check whether a role finds everything that it needs, without attaching or replaying anything: interfaces, route, target, assistants, queues,
    /// files, rights.
    Check(CheckArgs),
    /// Show what running roles are doing, each second, from the addresses of their --metrics.
    Top(crate::top::TopArgs),
}

/// Arguments of `replayer check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The role, with the arguments that it is to be started with.
    #[command(subcommand)]
    pub role: CheckedRole,
}

/// Roles that can be checked.
#[derive(Debug, Subcommand)]
pub enum CheckedRole {
    /// `replayer online` with the same arguments.
    Online(Box<OnlineArgs>),
    /// `replayer assistant` with the same arguments.
    Assistant(crate::assistant::AssistantArgs),
    /// `replayer offline` with the same arguments.
    Offline(Box<crate::offline::OfflineArgs>),
}

impl Role {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Role::Online(_) => "online",
            Role::Assistant(_) => "assistant",
            Role::Offline(_) => "offline",
            Role::Record(_) => "record",
            Role::Inspect(_) => "inspect",
            Role::Check(args) => match args.role {
                CheckedRole::Online(_) => "online",
                CheckedRole::Assistant(_) => "assistant",
                CheckedRole::Offline(_) => "offline",
            },
            Role::Top(_) => "top",
        }
    }
}

impl CheckArgs {
    /// The role, told to check only.
    pub fn told_to_check(self) -> Role {
        match self.role {
            CheckedRole::Online(mut args) => {
                args.check = true;
                Role::Online(args)
            }
            CheckedRole::Assistant(mut args) => {
                args.check = true;
                Role::Assistant(args)
            }
            CheckedRole::Offline(mut args) => {
                args.check = true;
                Role::Offline(args)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_documentation_has_every_flag() {
        let page = include_str!("../../../docs/flags.md");
        let (online, assistant) = page.split_once("## `replayer assistant`").unwrap();
        for (role, of_role) in [("online", online), ("assistant", assistant)] {
            let mut command = Cli::command();
            command.build();
            let flags = command.find_subcommand(role).unwrap().get_arguments();
            for flag in flags.filter(|flag| !flag.is_hide_set()).filter_map(|flag| flag.get_long()) {
                let is_there = of_role.split(['`', ' ', '[']).any(|word| word == format!("--{flag}"));
                assert!(is_there || flag == "help", "--{flag} of {role}");
            }
        }
    }
}
