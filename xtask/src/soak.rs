//! `cargo xtask soak`: the highest rate that the machine sustains, for long, in a lab of its own; fails when something is lost or grows.

use anyhow::Result;
use clap::Args;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::soak::Soak;

use crate::lab::prepare;

/// How long a round lasts: the two servers' logs of one are compared in memory.
const ROUND_SECONDS: u32 = 20;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How long the load lasts, pauses between its rounds not counted.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(8..))]
    seconds: u32,
    /// How much of what the machine sustains.
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(1..=100))]
    share: u8,
    /// Print the outcome as JSON; the line of each round goes to the error output.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(arguments: &Arguments, prepared: bool) -> Result<()> {
    prepare(prepared)?;
    let soak = Soak {
        seconds: arguments.seconds,
        round_seconds: ROUND_SECONDS,
        share: f64::from(arguments.share) / 100.0,
    };
    let lab = Lab::up(Plan::default())?;
    let outcome = soak.run(&lab, |number, round| {
        let (online, assistant) = (round.online, round.assistant);
        eprintln!(
            "round {number}: {} requests, {:.0}/s, {} connections, {} sessions at most; at rest: online {} KiB, {} descriptors; assistant {} KiB, {} \
             descriptors",
            round.requests,
            round.rate,
            round.connections,
            round.sessions_most,
            online.resident_kib,
            online.descriptors,
            assistant.resident_kib,
            assistant.descriptors
        );
    })?;
    lab.down()?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    }
    outcome.judge()?;
    let [kept, short] = outcome.sustained;
    eprintln!(
        "{} requests in {} rounds, none lost, none twice; alone, the machine took {kept:.0}/s on kept connections, {short:.0}/s with a connection each",
        outcome.requests(),
        outcome.rounds.len()
    );
    Ok(())
}
