//! How many streams arrive whole, against loss, delay and reordering: the table in `docs/simulation.md`. `cargo xtask simulate --table`
//! writes it; the test fails where the committed one says something else.

use crate::network::Path;
use crate::world::{World, run};
use crate::{for_seeds, variable};
use std::fmt::Write;
use std::sync::Mutex;

const LOST_PER_MILLE: [u32; 4] = [0, 10, 20, 50];
const LATENCY_US: [u32; 4] = [100, 1_000, 10_000, 100_000];
const REORDERED_PER_MILLE: [u32; 3] = [0, 50, 250];
/// Lives of a cell, with four clients each.
const LIVES: u64 = 25;

const BEGIN: &str = "<!-- made by `cargo xtask simulate --table` -->\n";
const END: &str = "<!-- end -->\n";
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/simulation.md");

fn path(cell: usize) -> Path {
    let reordered_per_mille = REORDERED_PER_MILLE[cell % REORDERED_PER_MILLE.len()];
    let cell = cell / REORDERED_PER_MILLE.len();
    Path {
        lost_per_mille: LOST_PER_MILLE[cell / LATENCY_US.len()],
        repeated_per_mille: reordered_per_mille / 5,
        reordered_per_mille,
        latency_us: LATENCY_US[cell % LATENCY_US.len()],
        late_us: 4000,
    }
}

#[test]
fn the_table_of_losses_is_what_the_engine_does() {
    let cells = LOST_PER_MILLE.len() * LATENCY_US.len() * REORDERED_PER_MILLE.len();
    let sums = Mutex::new(vec![(0, 0); cells]);
    for_seeds("the_table", 0..cells as u64 * LIVES, |seed, recording| {
        let cell = (seed / LIVES) as usize;
        let (world, streams) = World::of_table(path(cell), seed);
        let outcome = run(&world, &streams, seed, recording);
        let (equal, sound) = &mut sums.lock().unwrap()[cell];
        *equal += outcome.equal;
        *sound += outcome.sound;
        outcome
    });
    if variable("SEED").is_some() {
        return;
    }
    let table = table(&sums.into_inner().unwrap());
    let text = std::fs::read_to_string(FILE).unwrap_or_else(|error| panic!("{FILE}: {error}"));
    let (before, rest) = text.split_once(BEGIN).unwrap_or_else(|| panic!("{FILE} lacks {BEGIN:?}"));
    let (committed, after) = rest.split_once(END).unwrap_or_else(|| panic!("{FILE} lacks {END:?}"));
    if std::env::var_os("TABLE").is_some() {
        std::fs::write(FILE, [before, BEGIN, &table, END, after].concat()).unwrap();
    } else {
        assert_eq!(
            table, committed,
            "docs/simulation.md says something else; if that is meant: cargo xtask simulate --table"
        );
    }
}

/// In Markdown.
fn table(sums: &[(u32, u32)]) -> String {
    let percent = |per_mille: u32| format!("{} %", f64::from(per_mille) / 10.0);
    let mut text = String::from("| lost | delay |");
    for reordered in REORDERED_PER_MILLE {
        write!(text, " reordered {} |", percent(reordered)).unwrap();
    }
    text += &format!("\n|{}\n", " --: |".repeat(2 + REORDERED_PER_MILLE.len()));
    for (row, cells) in sums.chunks(REORDERED_PER_MILLE.len()).enumerate() {
        let lost = LOST_PER_MILLE[row / LATENCY_US.len()];
        let delay = f64::from(LATENCY_US[row % LATENCY_US.len()]) / 1000.0;
        write!(text, "| {} | {delay} ms |", percent(lost)).unwrap();
        for (equal, sound) in cells {
            write!(text, " {equal} of {sound} |").unwrap();
        }
        text.push('\n');
    }
    text
}
