//! Behaviour 68: a soak. This one is short; `cargo xtask soak` takes as long as it is told.
//!
//! Root only; in a lab of its own.

use anyhow::Result;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::soak::Soak;

#[test]
fn b068_a_soak_loses_nothing_and_memory_and_descriptors_stay_as_they_are() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    // Other tests may run beside it: what the machine sustains now it may not sustain a moment later.
    let soak = Soak { seconds: 20, round_seconds: 3, share: 0.5 };
    let outcome = soak.run(&lab, |number, round| println!("round {number}: {round:?}"))?;
    assert!(outcome.requests() > 0);
    outcome.judge()
}
