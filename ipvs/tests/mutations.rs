//! A short run of what `examples/hammer.rs` does for as long as it is let.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../fuzz/harness.rs"]
mod harness;
use harness::{Numbers, judge, mutate, seeds};

#[test]
fn seeds_make_sense() {
    for (number, seed) in seeds().iter().enumerate().take(7) {
        assert_ne!(judge(seed), Ok(0), "seed {number}");
    }
}

#[test]
fn changed_answers_are_read_or_refused() {
    let corpus = seeds();
    let mut numbers = Numbers(0x5eed);
    let mut sense = 0;
    for _ in 0..100_000 {
        let bytes = mutate(&corpus, &mut numbers);
        match judge(&bytes) {
            Ok(ways) => sense += usize::from(ways > 0),
            Err(finding) => panic!("{finding}: {bytes:02x?}"),
        }
    }
    assert!(sense > 1000, "{sense} of 100,000 made sense: the rest tests nothing");
}
