//! Whole migrations in one process, driven by a seed: see [`pageferry_tests::simulation`]. Each
//! ends with the guest at exactly one place and whole; or with none where its own process was
//! killed; or stopped at the source where nobody is left who could say what became of it.
//!
//!     cargo test --release -p pageferry-tests --test simulation -- --ignored      10,000 seeds
//!     PAGEFERRY_SEEDS=4711:1 cargo test -p pageferry-tests --test simulation -- --ignored --nocapture
//!
//! Changed by hand, the engine was seen to fail among 500 seeds when it: resumed on a lost
//! connection after Commit; skipped the sync after the save; ran the guest at the destination when
//! the source was lost before Commit; did not wait for the last fence; took a doubt for "does not
//! run"; said nothing of a failed seal; took a refusal after Commit for an answer; left no question
//! for its supervisor to ask on; resumed when the sending of Commit failed.

use pageferry_tests::simulation::scenario::{End, run, run_all};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Runs these seeds, and fails with those that have failed.
fn all_are_well(first: u64, count: u64) -> BTreeMap<End, u64> {
    let (ends, broken) = (Mutex::new(BTreeMap::new()), Mutex::new(Vec::new()));
    let slowest = Mutex::new((Duration::ZERO, 0));
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    run_all(first, count, threads, &|seed, verdict, took| {
        *ends.lock().unwrap().entry(verdict.end).or_insert(0) += 1;
        let mut slowest = slowest.lock().unwrap();
        *slowest = (*slowest).max((took, seed));
        if !verdict.wrong.is_empty() {
            broken.lock().unwrap().push((seed, verdict.wrong));
        }
    });
    let (ends, broken) = (ends.into_inner().unwrap(), broken.into_inner().unwrap());
    let slowest = slowest.into_inner().unwrap();
    println!(
        "{count} seeds from {first} in {:.1?}: {ends:?}; the slowest {slowest:?}",
        begun.elapsed()
    );
    for (seed, wrong) in broken.iter().take(20) {
        println!("seed {seed}: {wrong:#?}");
    }
    let seeds: Vec<_> = broken.iter().map(|(seed, _)| seed).collect();
    assert!(
        broken.is_empty(),
        "{} seeds failed: {seeds:?}; one alone: PAGEFERRY_SEEDS={}:1 cargo test -p pageferry-tests --test \
         simulation -- --ignored --nocapture",
        broken.len(),
        seeds[0]
    );
    ends
}

#[test]
fn five_hundred_seeds_end_with_one_owner_of_a_whole_guest() {
    let ends = all_are_well(0, 500);
    let all = [
        End::Moved,
        End::MovedAfterDoubt,
        End::Stayed,
        End::StayedAfterDoubt,
        End::MovedAfterDeath,
        End::StayedAfterDeath,
        End::Lost,
        End::Doubt,
    ];
    for end in all {
        assert!(ends.contains_key(&end), "no seed came to {end:?}: {ends:?}");
    }
}

#[test]
fn a_seed_makes_the_same_run_again() {
    for seed in 0..20 {
        assert_eq!(run(seed, false), run(seed, false), "seed {seed}");
    }
}

#[test]
#[ignore = "ten thousand seeds; for the release build"]
fn ten_thousand_seeds_end_with_one_owner_of_a_whole_guest() {
    let asked = std::env::var("PAGEFERRY_SEEDS").unwrap_or_else(|_| "0:10000".into());
    let (first, count) = asked.split_once(':').expect("PAGEFERRY_SEEDS is FIRST:COUNT");
    let (first, count) = (first.parse().expect("a seed"), count.parse().expect("a number"));
    if count == 1 {
        println!("{:?}", run(first, true));
    }
    all_are_well(first, count);
}
