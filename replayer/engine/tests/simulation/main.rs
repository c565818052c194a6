//! Whole lives in memory: clients (made up, or out of captures), a network that loses, delays, reorders and repeats on each of its four
//! paths, the engine, and a target with a TCP of its own. Every segment that the engine sends is held against the rules of TCP, and
//! what arrived is compared with what was sent. Everything follows from a seed.
//!
//! `cargo xtask simulate --seeds N` runs more of them, `--seed N` one again; then `--pcap FILE` writes what crossed its wires, and `--trace`
//! prints it. (To the test these are the variables `SEEDS`, `SEED`, `PCAP` and `TRACE`.)
//!
//! - `network`: randomness, paths, events
//! - `streams`: what must arrive, known independently of the engine
//! - `clients`: traffic that is made up
//! - `captures`: traffic out of capture files
//! - `target`: smoltcp and an application
//! - `checker`: the rules of TCP
//! - `world`: one life
//! - `table`: loss, delay and reordering against how many streams arrive
//! - `recording`: capture files

#![allow(unreachable_pub, missing_docs, reason = "a test binary")]

mod captures;
mod checker;
mod clients;
#[path = "../lab/mod.rs"]
mod lab;
mod network;
mod recording;
mod streams;
mod table;
mod target;
mod world;

use recording::Recording;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use world::{Outcome, World, run};

/// Seeds of a normal run: about half a minute on two cores.
const SEEDS: u64 = 10_000;

/// Seeds that fail until the rest is not tried any more.
const MAX_FAILURES: usize = 20;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// Runs the seeds on all processors; a failure names the command that repeats it.
fn for_seeds(
    test: &str,
    seeds: std::ops::Range<u64>,
    life: impl Fn(u64, &mut Recording) -> Outcome + Sync,
) -> Outcome {
    let (from, upto) = match variable("SEED") {
        Some(seed) => (seed, seed + 1),
        None => (seeds.start, seeds.end),
    };
    let next = AtomicU64::new(from);
    let sum = Mutex::new(Outcome::default());
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= upto || failed.lock().unwrap().len() >= MAX_FAILURES {
                        break;
                    }
                    let mut recording = match variable("SEED") {
                        Some(_) => Recording::from_environment(),
                        None => Recording::none(),
                    };
                    match catch_unwind(AssertUnwindSafe(|| life(seed, &mut recording))) {
                        Ok(outcome) => {
                            let mut sum = sum.lock().unwrap();
                            sum.sound += outcome.sound;
                            sum.equal += outcome.equal;
                            sum.holes += outcome.holes;
                            sum.pieces += outcome.pieces;
                            sum.segments += outcome.segments;
                            sum.tail = sum.tail.max(outcome.tail);
                        }
                        Err(_) => failed.lock().unwrap().push(seed),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    if let Some(seed) = failed.first() {
        panic!(
            "seeds {failed:?} failed; the first again, with its packets in a file: \
             cargo xtask simulate {test} --seed {seed} --pcap seed-{seed}.pcap"
        );
    }
    sum.into_inner().unwrap()
}

#[test]
fn every_stream_arrives_or_its_end_is_counted() {
    let seeds = variable("SEEDS").unwrap_or(SEEDS);
    let outcome = for_seeds("every_stream", 1..seeds + 1, |seed, recording| {
        let (world, streams) = World::of(seed);
        run(&world, &streams, seed, recording)
    });
    println!("{outcome:?}");
}
