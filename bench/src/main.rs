//! `bench SUBJECT… [--json] [--quick]`: what `cargo xtask bench` runs.

use anyhow::{Context, Result};
use bench::report::Report;
use bench::{Options, SUBJECTS};
use clap::Parser;
use replayer_huge_pages::HugePages;
use std::path::PathBuf;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: HugePages = HugePages;

#[derive(Debug, Parser)]
struct Arguments {
    /// What to measure; all subjects when none is named.
    subjects: Vec<String>,
    /// One JSON document a subject, a line each, instead of tables.
    #[arg(long)]
    json: bool,
    /// Fewer sessions and rounds: whether it runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Keep each result in this directory, as DATE-SUBJECT.json.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Run a fixed piece of work once, and no more: for a profiler.
    #[arg(long, hide = true)]
    work: Option<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(work) = arguments.work {
        return if work == "sending" { bench::sending::work() } else { bench::engine::counted::work(&work) };
    }
    let mut chosen = Vec::new();
    for name in &arguments.subjects {
        let subject = SUBJECTS.iter().find(|subject| subject.name == name);
        let names = SUBJECTS.iter().map(|subject| subject.name).collect::<Vec<_>>().join(", ");
        chosen.push(subject.with_context(|| format!("no such subject: {name}; there are: {names}"))?);
    }
    if chosen.is_empty() {
        chosen.extend(SUBJECTS);
    }
    for subject in chosen {
        let figures = (subject.run)(Options { quick: arguments.quick })
            .with_context(|| format!("measuring {}", subject.name))?;
        let report = Report::new(subject.name, figures);
        if let Some(directory) = &arguments.save {
            let path = directory.join(format!("{}-{}.json", report.date.replace(':', ""), subject.name));
            std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
            let text = serde_json::to_string_pretty(&report)? + "\n";
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        if arguments.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            println!("{}", report.table(subject.what));
        }
    }
    Ok(())
}
