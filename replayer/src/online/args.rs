//! The arguments of the online role.

use crate::capture::CaptureArg;
use crate::cli::ReplayArgs;
use crate::configuration::ConfigArg;
use crate::placement::{CpuList, Workers};
use clap::Args;

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
