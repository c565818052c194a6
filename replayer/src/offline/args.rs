//! The arguments of the offline role.

use crate::cli::ReplayArgs;
use crate::configuration::ConfigArg;
use crate::placement::Workers;
use anyhow::{Result, anyhow, bail};
use clap::Args;
use std::path::PathBuf;
use std::str::FromStr;

use super::pace::Speed;

/// Arguments of the offline role.
#[derive(Debug, Args)]
pub struct OfflineArgs {
    /// A file with more of them.
    #[command(flatten)]
    pub config: ConfigArg,

    /// Capture files (pcap or pcapng, as they are or compressed by gzip, xz or zstd), or - for standard input. Several are merged by time.
    #[arg(short = 'f', long = "file", value_name = "FILE", required = true, value_delimiter = ',')]
    pub files: Vec<PathBuf>,

    /// Replay the files one after the other instead of merging them by time.
    #[arg(long)]
    pub sequential: bool,

    /// What is replayed, and how.
    #[command(flatten)]
    pub replay: ReplayArgs,

    /// The assistants. Where no port is given, it is that of -p.
    #[arg(
        short = 's',
        long = "assistant",
        value_name = "HOST[:PORT]",
        required_unless_present_any = ["dry_run", "write"],
        value_delimiter = ','
    )]
    pub assistants: Vec<String>,

    /// Send nothing: run the engine against a target that answers at once, and say what would be sent.
    #[arg(long)]
    pub dry_run: bool,

    /// Write the packets to this pcap file instead of sending them; as in a dry run.
    #[arg(short = 'w', long = "write", value_name = "OUT.pcap")]
    pub write: Option<PathBuf>,

    /// The pace: so many times as fast as captured, or max, as fast as the target answers.
    #[arg(long, value_name = "TIMES|max", default_value = "1", group = "pace")]
    pub speed: SpeedArg,

    /// Another pace: so many packets of clients a second.
    #[arg(long, value_name = "PACKETS", group = "pace")]
    pub pps: Option<f64>,

    /// Another pace: so many megabits of clients' packets a second.
    #[arg(long, value_name = "MBIT", group = "pace")]
    pub mbps: Option<f64>,

    /// Another pace: so many new connections a second, each as fast as the target answers.
    #[arg(long, value_name = "CONNECTIONS", group = "pace")]
    pub cps: Option<f64>,

    /// With --speed max and --cps: the most sessions that wait for the target at once.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub in_flight: u64,

    /// Shorten pauses of the replay that are longer than this.
    #[arg(long, value_name = "MILLISECONDS")]
    pub max_gap: Option<f64>,

    /// Leave out what is earlier than so many seconds after the first packet.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub start: f64,

    /// Leave out what is later than so many seconds after the first packet.
    #[arg(long, value_name = "SECONDS")]
    pub stop: Option<f64>,

    /// Replay the files so many times, with other ports of the clients each time.
    #[arg(long = "loop", value_name = "COUNT|forever", default_value = "1")]
    pub loops: LoopArg,

    /// End after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<f64>,

    /// The same as `replayer check offline`.
    #[arg(long, hide = true)]
    pub check: bool,

    /// As of the online role, whose command line may be at hand: there is one.
    #[arg(long, value_name = "COUNT|auto", hide = true)]
    pub workers: Option<Workers>,
}

impl OfflineArgs {
    /// How fast, from the arguments that say so.
    ///
    /// # Errors
    /// When a rate is not one.
    pub fn pace(&self) -> Result<Speed> {
        let rate = |value: f64, flag: &str| {
            if value.is_finite() && value > 0.0 {
                Ok(value)
            } else {
                Err(anyhow!("{flag} {value}: give a rate above 0"))
            }
        };
        Ok(match (self.pps, self.mbps, self.cps) {
            (Some(pps), _, _) => Speed::PacketsPerSecond(rate(pps, "--pps")?),
            (_, Some(mbps), _) => Speed::MegabitsPerSecond(rate(mbps, "--mbps")?),
            (_, _, Some(cps)) => Speed::ConnectionsPerSecond(rate(cps, "--cps")?),
            _ => self.speed.0,
        })
    }
}

/// `--speed`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpeedArg(pub Speed);

impl FromStr for SpeedArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<SpeedArg> {
        if text == "max" {
            return Ok(SpeedArg(Speed::Max));
        }
        match text.parse::<f64>() {
            Ok(times) if (0.001..=1_000_000.0).contains(&times) => Ok(SpeedArg(Speed::Times(times))),
            Ok(times) => bail!("{times} is out of range; give 0.001 to 1000000, or max"),
            Err(_) => bail!("write a number such as 1, 10 or 0.5, or max"),
        }
    }
}

/// `--loop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopArg(pub Option<u64>);

impl FromStr for LoopArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<LoopArg> {
        match text.parse::<u64>() {
            Ok(count) if count > 0 => Ok(LoopArg(Some(count))),
            _ if text == "forever" => Ok(LoopArg(None)),
            _ => bail!("write a number from 1 on, or forever"),
        }
    }
}
