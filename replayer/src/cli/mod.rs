//! The command line: what was typed, parsed into types. What it means is decided in the roles' own files.
//!
//! - [`replay`]: the flags that both replaying roles have, and what they mean together
//! - [`values`]: what flags take

use crate::capture::CaptureArg;
use crate::configuration::ConfigArg;
use crate::placement::{CpuList, Workers};
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

/// Arguments of the online role.
#[derive(Debug, Args)]
pub struct OnlineArgs {
    /// A file with more of them.
    #[command(flatten)]
    pub config: ConfigArg,

    /// What is replayed, and how.
    #[command(flatten)]
    pub replay: ReplayArgs,

    /// The assistants. Where no port is given, it is that of -p.
    #[arg(
        display_order = 1,
        short = 's',
        long = "assistant",
        value_name = "HOST[:PORT]",
        required = true,
        value_delimiter = ','
    )]
    pub assistants: Vec<String>,

    /// Capture on this interface [default: the one that has the source address, or the one of the route to the target].
    #[arg(display_order = 2, short = 'i', long = "interface", value_name = "IFACE")]
    pub interface: Option<String>,

    /// The same as `replayer check online`.
    #[arg(long, hide = true)]
    pub check: bool,

    /// How requests are taken off the wire.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub capture: CaptureArg,

    /// With span: exchange packets with the drivers of both interfaces without copying them, where they support it.
    #[arg(long)]
    pub zero_copy: bool,

    /// Workers keep polling for so many microseconds after the last packet, instead of sleeping until the next one wakes them: requests leave
    /// sooner, but each worker takes a core of its own while there is traffic. With span and mirror they run the driver's polling too.
    #[arg(long, value_name = "USECS", default_value_t = 0)]
    pub busy_poll: u32,

    /// Spread the copies of a connection over so many milliseconds instead of sending them all at once.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub spread: u32,

    /// Begin with no connection, and reach the share of -r step by step within so many seconds.
    #[arg(short = 'g', long = "ramp", value_name = "SECONDS", default_value_t = 0)]
    pub ramp: u32,

    /// Threads that replay, each with a share of the clients and a TX queue of the output interface: a number, or auto for one to every two CPUs,
    /// or to each of --cpus, as far as there are queues [default: 1, or one to each of --cpus].
    #[arg(long, value_name = "COUNT|auto")]
    pub workers: Option<Workers>,

    /// The CPUs that the workers are bound to, one each [default: several workers to the last CPUs, a single one to none].
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
}
