//! `cargo xtask demo offline`: record today, replay tonight. Real clients' requests to nginx are captured by tcpdump; then the file is looked
//! at, and replayed to the target twice: at its own pace, and as fast as the target answers.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use replayer_tests::lab::Lab;
use replayer_tests::ledger::{self, Difference, Ledger};
use replayer_tests::pairs::ARRIVAL;
use replayer_tests::process::Process;
use replayer_tests::replay::Role;
use replayer_tests::servers::{Nginx, start, tool};
use serde::Serialize;

use crate::lab::HTTP_PORT;
use crate::run::{capture, offline_arguments};

/// A replay that takes so much longer than its file has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the demo shows at its end.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    /// One for each replay.
    replays: Vec<Replayed>,
}

#[derive(Debug, Serialize)]
struct Replayed {
    how: &'static str,
    seconds: f64,
    requests: Difference,
}

pub(crate) fn show(lab: &Lab, seconds: u32) -> Result<Outcome> {
    let online = Nginx::start(lab, lab.online(), HTTP_PORT)?;
    let target = Nginx::start(lab, lab.target(), HTTP_PORT)?;
    eprintln!("tcpdump at the online server while clients make requests for {seconds} s");
    let (file, made) = capture(lab, seconds)?;
    let requests = online.settled_ledger(made as usize, ARRIVAL)?;

    eprintln!("\nreplayer inspect {}", file.display());
    let mut inspect = lab.online().command(tool("replayer")?);
    let status = inspect.arg("inspect").arg(&file).status().context("starting replayer")?;
    if !status.success() {
        bail!("replayer inspect ended with {status}");
    }

    let _assistant = Role::assistant(lab, lab.assistant(), &[])?;
    let mut replays = Vec::new();
    let mut before = 0;
    for (how, further) in
        [("at its own pace", &[][..]), ("as fast as the target answers", &["--speed", "max"])]
    {
        let seconds = replay(lab, &file, further, Duration::from_secs(seconds.into()) + PATIENCE)?;
        let all = target.settled_ledger(before + requests.len(), ARRIVAL)?;
        let this = Ledger { entries: all.entries[before..].to_vec() };
        before = all.len();
        replays.push(Replayed { how, seconds, requests: ledger::compare(&requests, &this) });
    }
    Ok(Outcome { replays })
}

/// Replays the file; how long it took, in seconds.
fn replay(lab: &Lab, file: &Path, further: &[&str], limit: Duration) -> Result<f64> {
    let (target, assistant) = (lab.target().v4().to_string(), lab.assistant().v4().to_string());
    let mut arguments = offline_arguments(file, &target, &assistant);
    arguments.extend(further.iter().map(|&argument| argument.to_owned()));
    eprintln!("\nreplayer offline {}", arguments.join(" "));
    let mut command = lab.online().command(tool("replayer")?);
    let begun = Instant::now();
    let mut process: Process = start(lab, lab.online(), "offline", command.arg("offline").args(&arguments))?;
    let mut shown = 0;
    loop {
        let ended = process.ended()?;
        let text = process.errors();
        eprint!("{}", &text[shown..]);
        shown = text.len();
        match ended {
            Some(status) if status.success() => return Ok(begun.elapsed().as_secs_f64()),
            Some(status) => bail!("replayer offline ended with {status}"),
            None if begun.elapsed() > limit => bail!("replayer offline has not ended within {limit:?}"),
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

impl Outcome {
    /// Prints it. An error when the target did not get what the online server got.
    pub(crate) fn conclude(&self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
        } else {
            println!("\n{:<32}{:>10}{:>10}{:>10}", "", "online", "target", "seconds");
            for replay in &self.replays {
                println!(
                    "{:<32}{:>10}{:>10}{:>10.1}   missing {}, extra {}",
                    replay.how,
                    replay.requests.online,
                    replay.requests.target,
                    replay.seconds,
                    replay.requests.missing,
                    replay.requests.extra
                );
            }
        }
        for replay in &self.replays {
            let requests = &replay.requests;
            if requests.online == 0 || requests.missing > 0 || requests.extra > 0 {
                let examples: String = requests.examples.iter().map(|line| format!("\n  {line}")).collect();
                bail!("the target did not get what the online server got{examples}");
            }
        }
        Ok(())
    }
}
