//! Every committed input at its target: what the fuzzer once found, and hostile cases that somebody thought of.

use replayer_fuzz::TARGETS;
use std::path::Path;

#[test]
fn b039_the_corpus_harms_nobody() {
    for (target, run) in TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        let files = std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        let mut count = 0;
        for file in files {
            let path = file.unwrap().path();
            // Where it panics, the name is the last that was printed.
            println!("{}", path.display());
            run(&std::fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count >= 10, "{count} inputs for {target}");
    }
}
